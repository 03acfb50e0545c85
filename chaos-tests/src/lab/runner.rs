//! Runs the cases one after the other and says how they went.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::cases::{CASES, Case, ON_DEMAND, TOOLS};
use super::command::installed;
use super::daemon::log_tail;
use super::netns::CONGESTION;
use super::world::{self, World};

/// The longest that any case may take, so that a hang is a failure and not a job that somebody cancels. The longest one lasts
/// ten minutes on purpose.
const CASE_DEADLINE: Duration = Duration::from_secs(900);

/// How much of each log a failure shows.
const LOG_LINES: usize = 25;

/// What the lab is asked to do.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Only cases whose name contains this; where it is empty, all but those that the agent does not pass yet.
    pub filter: &'a str,
    /// The agent's binary.
    pub darter: &'a Path,
    /// Whether a skipped case is a failure.
    pub skips_fail: bool,
}

enum Outcome {
    Passed(String),
    Failed(anyhow::Error),
    Skipped(String),
    Interrupted,
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// Runs what the plan asks for, prints a line per case and the tally, and returns what the process should end with.
pub async fn run(plan: &Plan<'_>) -> Result<ExitCode> {
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        world::remove_abandoned().await.context("cannot clear up after an earlier lab")?;
    } else {
        println!("the lab makes network namespaces, which takes root: every case is skipped");
    }
    let mut tally = Tally::default();
    let on_demand = if plan.filter.is_empty() { &[] } else { ON_DEMAND };
    for case in CASES.iter().chain(on_demand).filter(|case| case.name.contains(plan.filter)) {
        let start = Instant::now();
        println!("lab {} ...", case.name);
        let outcome = match missing(case, plan, is_root) {
            Some(reason) => Outcome::Skipped(reason),
            None => attempt(case, plan.darter).await,
        };
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Outcome::Passed(found) => {
                tally.passed += 1;
                println!("lab {} ... ok ({seconds:.1} s): {found}", case.name);
            }
            Outcome::Failed(error) => {
                tally.failed += 1;
                println!("lab {} ... FAILED ({seconds:.1} s): {error:#}", case.name);
            }
            Outcome::Skipped(reason) => {
                tally.skipped += 1;
                println!("lab {} ... skipped: {reason}", case.name);
            }
            Outcome::Interrupted => {
                println!("lab {} ... interrupted, everything is cleared up", case.name);
                return Ok(ExitCode::from(130));
            }
        }
    }
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    let nothing_ran = tally.passed + tally.failed + tally.skipped == 0;
    let bad = tally.failed > 0 || nothing_ran || (plan.skips_fail && tally.skipped > 0);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Why a case cannot be run on this machine.
fn missing(case: &Case, plan: &Plan<'_>, is_root: bool) -> Option<String> {
    if !is_root {
        return Some("not root".to_owned());
    }
    if case.agent && !plan.darter.is_file() {
        return Some(format!("there is no {}", plan.darter.display()));
    }
    let mut tools = TOOLS.iter().chain(case.tools);
    tools.find(|tool| !installed(tool)).map(|tool| format!("{tool} is not installed"))
}

async fn attempt(case: &Case, darter: &Path) -> Outcome {
    let tried = async {
        tokio::select! {
            result = timeout(CASE_DEADLINE, play(case, darter)) => match result {
                Ok(Ok(found)) => Outcome::Passed(found),
                Ok(Err(error)) => Outcome::Failed(error),
                Err(_) => Outcome::Failed(anyhow::anyhow!("did not end within {CASE_DEADLINE:?}")),
            },
            () = interrupted() => Outcome::Interrupted,
        }
    };
    // The case's daemons are dropped, and with that killed, before what is left of its world is removed.
    let outcome = tried.await;
    if matches!(outcome, Outcome::Failed(_)) {
        for log in world::logs() {
            print!("--- {}\n{}", log.display(), log_tail(&log, LOG_LINES));
        }
    }
    match (world::remove().await, outcome) {
        (Err(error), Outcome::Passed(_)) => Outcome::Failed(error.context("cannot clear up")),
        (_, outcome) => outcome,
    }
}

async fn play(case: &Case, darter: &Path) -> Result<String> {
    let mut world = World::new(darter, CONGESTION).await?;
    (case.run)(&mut world).await
}

/// Ends with Ctrl-C or SIGTERM; never where neither can be listened for.
pub(crate) async fn interrupted() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
