//! The agent as a service of systemd: it crashes, and clients notice no more than a wait.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::lab::agent::PROXY;
use crate::lab::command::wait_for;
use crate::lab::netns::Host;
use crate::lab::systemd::{SERVICE, Systemd};
use crate::lab::world::World;

/// How often the agent crashes.
const CRASHES: u32 = 3;

/// The user that the unit and `darter.sysusers.conf` give it.
const USER: &str = "darter";

/// How long until systemd has noticed a crash, and until it has counted the restart.
const NOTICE_DEADLINE: Duration = Duration::from_secs(5);

/// A connection to a socket that is open takes no time, whoever serves it.
const CONNECT_SECONDS_MAX: f64 = 0.5;

/// What a client waits at the most: the unit's two seconds, the agent's start, and a machine that is busy.
const ANSWER_SECONDS_MAX: f64 = 15.0;

/// `kill -9`, again and again, under the units as they are shipped.
pub(super) async fn systemd(world: &mut World) -> Result<String> {
    let host = world.host("h1").await?;
    let systemd = Systemd::boot(world, &host).await?;
    let mut found = crash_all(&systemd, &host).await;
    if let Err(error) = found {
        found = Err(error.context(systemd.journal().await));
    }
    systemd.stop().await?;
    found
}

async fn crash_all(systemd: &Systemd, host: &Host) -> Result<String> {
    let mut slowest = 0.0;
    for crash in 1..=CRASHES {
        let answered = crash_once(systemd, host, crash).await.with_context(|| format!("crash {crash}"))?;
        slowest = f64::max(slowest, answered);
    }
    Ok(format!(
        "{CRASHES} crashes, restarted each time as {USER}; clients that came meanwhile were answered after {slowest:.1} s at most"
    ))
}

/// Kills the agent and asks it while it does not run; gives the seconds until the answer.
async fn crash_once(systemd: &Systemd, host: &Host, crash: u32) -> Result<f64> {
    let before = systemd.show("MainPID").await?;
    systemd.run("systemctl")?.args(["kill", "--signal=KILL", SERVICE]).output().await?;
    let noticed = || async { systemd.show("SubState").await.is_ok_and(|state| state == "auto-restart") };
    wait_for("systemd to notice", NOTICE_DEADLINE, noticed).await?;
    let (connected, answered) = ask(host).await?;
    ensure!(connected <= CONNECT_SECONDS_MAX, "the connection took {connected} s: nobody held the socket");
    ensure!(answered <= ANSWER_SECONDS_MAX, "the answer took {answered} s");

    let restarted = || async { systemd.show("NRestarts").await.is_ok_and(|times| times == crash.to_string()) };
    wait_for("the restart to be counted", NOTICE_DEADLINE, restarted).await?;
    let running = || async { systemd.show("SubState").await.is_ok_and(|state| state == "running") };
    wait_for("the service to run", NOTICE_DEADLINE, running).await?;
    let after = systemd.show("MainPID").await?;
    ensure!(after != before, "the process {before} outlived SIGKILL");
    let user = systemd.run("stat")?.args(["--format", "%U", &format!("/proc/{after}")]).output().await?;
    ensure!(user.trim() == USER, "the agent runs as {user}");
    Ok(answered)
}

/// Asks the proxy for anything: seconds until there was a connection, and until there was an answer, of whatever status.
async fn ask(host: &Host) -> Result<(f64, f64)> {
    let limit = ANSWER_SECONDS_MAX.to_string();
    let curl = host.run("curl").args(["-sS", "--max-time", &limit, "--output", "/dev/null"]);
    let times = curl.args(["--write-out", "%{time_connect} %{time_total}", &format!("{PROXY}/v2/")]).output().await?;
    let (connected, answered) = times.trim().split_once(' ').context("curl said something else")?;
    Ok((connected.parse()?, answered.parse()?))
}
