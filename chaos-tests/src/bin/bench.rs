//! `bench MODE [OPTION...]`: the benchmark as a program. `cargo xtask bench` builds what it needs and calls it.
//!
//! `bench client ORDER`, `bench join API TORRENT WHEN` and `bench tracker ADDRESS` are for the benchmark itself, which runs
//! its clients and its tracker that way inside a namespace.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use chaos_tests::bench::args::{Settings, USAGE};
use chaos_tests::bench::hit::{self, hit};
use chaos_tests::bench::join::{Api, join};
use chaos_tests::bench::series::{Programs, series};
use chaos_tests::bench::tracker;
use chaos_tests::lab::client;

/// What a bad command line ends with, as everywhere.
const BAD_USAGE: u8 = 2;

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["client", order] => println!("{}", client::pull(&client::Order::read(order)?).await?.write()),
        ["join", api, torrent, when] => {
            let at = match *when {
                "now" => None,
                micros => Some(UNIX_EPOCH + Duration::from_micros(micros.parse()?)),
            };
            println!("{}", join(Api::read(api)?, Path::new(torrent), at).await?.write());
        }
        ["tracker", address] => tracker::serve(address.parse()?).await?,
        ["help" | "--help" | "-h", ..] => println!("{USAGE}\n\n{}", hit::USAGE),
        ["hit", rest @ ..] => return hit(rest, &beside()?.0).await,
        _ => return bench(&args).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn bench(args: &[String]) -> Result<ExitCode> {
    let settings = match Settings::parse(args) {
        Ok(settings) => settings,
        Err(problems) => {
            problems.iter().for_each(|problem| eprintln!("bench: {problem}"));
            eprintln!("{USAGE}");
            return Ok(ExitCode::from(BAD_USAGE));
        }
    };
    let (darter, tools) = beside()?;
    let darter = settings.darter.clone().unwrap_or(darter);
    let tools = settings.tools.clone().unwrap_or(tools);
    let programs = Programs { darter: std::path::absolute(darter)?, tools: std::path::absolute(tools)? };
    series(&settings, &programs).await
}

/// The agent and the tools that were built with this program: Cargo puts all binaries of a profile next to each other, in a
/// directory of the target's.
fn beside() -> Result<(PathBuf, PathBuf)> {
    let own = std::env::current_exe()?;
    let target = own.parent().and_then(Path::parent).context("this program is in no target directory")?;
    Ok((own.with_file_name("darter"), target.join("tools/bin")))
}
