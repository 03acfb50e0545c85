//! `conformance URL`: asks any registry what the distribution specification has; `--help` has the rest.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    chaos_tests::conformance::main(std::env::args()).await
}
