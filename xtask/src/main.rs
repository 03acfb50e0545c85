//! `cargo xtask ci`, `cargo xtask deploy` and `cargo xtask lab`: what CI runs, as one command each; and `cargo xtask bench`,
//! which it does not.
//!
//! Thin on purpose: checks that are code live in [`tidy`] and [`fence`], lab and benchmark in the crate `chaos-tests`.

mod ci;
mod deny;
mod deploy;
mod fence;
mod lab;
mod step;
mod tidy;

use std::process::ExitCode;

const USAGE: &str = "usage:
  cargo xtask ci            fmt, tidy, fence, clippy, docs, deny; the first that fails ends it
  cargo xtask ci STEP       one of them
  cargo xtask deploy        renders and validates deploy/ with kubectl, kubernetes-validate and systemd-analyze
  cargo xtask lab [FILTER]  real clients in network namespaces; as root
  cargo xtask bench MODE    how fast, against the bound and against others; as root; `bench help` says more";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        ["ci"] => ci::run(None),
        ["ci", step] => ci::run(Some(step)),
        ["deploy"] => deploy::check(),
        ["lab", rest @ ..] => lab::run("lab", rest),
        ["bench", rest @ ..] => lab::run("bench", rest),
        _ => Err(anyhow::anyhow!(USAGE)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
