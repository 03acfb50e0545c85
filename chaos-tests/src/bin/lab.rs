//! `lab [--darter FILE] [FILTER]`: the lab as a program. `cargo xtask lab` builds what it needs and calls it.
//!
//! `lab origin ADDRESS LAYOUT`, `lab client ORDER` and `lab suite ...` are for the lab itself, which runs its counting
//! registry, its clients and the conformance suite that way inside a namespace.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use chaos_tests::conformance;
use chaos_tests::lab::runner::{Plan, run};
use chaos_tests::lab::{client, origin};

/// What it is called with.
const USAGE: &str = "usage: lab [--darter FILE] [FILTER]

Runs the cases whose names contain FILTER, as root; all of them without one. FILE is the agent, by default the `darter` beside
this program.";

/// Exit code for a command line that is wrong, as clap has it.
const USAGE_ERROR: u8 = 2;

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [command, address, layout] = args.as_slice()
        && command == "origin"
    {
        origin::serve(address.parse()?, Path::new(layout)).await?;
        return Ok(ExitCode::SUCCESS);
    }
    if let [command, order] = args.as_slice()
        && command == "client"
    {
        println!("{}", client::pull(&client::Order::read(order)?).await?.write());
        return Ok(ExitCode::SUCCESS);
    }
    if args.len() > 1 && args[0] == "suite" {
        return conformance::main(args).await;
    }
    let mut filter = String::new();
    // Cargo puts all binaries of a profile next to each other.
    let mut darter: PathBuf = std::env::current_exe()?.with_file_name("darter");
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            "--darter" => match args.next() {
                Some(file) => darter = file.into(),
                None => return Ok(misused("--darter wants a file")),
            },
            flag if flag.starts_with('-') => return Ok(misused(&format!("unknown flag {flag}"))),
            _ => filter = arg,
        }
    }
    let darter = std::path::absolute(darter)?;
    let skips_fail = std::env::var_os("CI").is_some_and(|value| value == "true" || value == "1");
    run(&Plan { filter: &filter, darter: &darter, skips_fail }).await
}

fn misused(what: &str) -> ExitCode {
    eprintln!("lab: {what}\n{USAGE}");
    ExitCode::from(USAGE_ERROR)
}
