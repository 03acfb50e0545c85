//! A long-running program of the lab: started with a log, stopped by its process id.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;
use tokio::time::timeout;

use super::command::Run;

/// How long a daemon may take to end after SIGTERM: dockerd stops its own containerd first, which takes a few seconds.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// A running daemon. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    pid: Pid,
    log: PathBuf,
}

impl Daemon {
    /// Starts a program that stays in the foreground.
    pub fn start(name: &str, run: Run, log: &Path) -> Result<Self> {
        let child = run.spawn(log)?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let pid = pid.with_context(|| format!("{name} ended at once"))?;
        Ok(Self { name: name.to_owned(), child, pid, log: log.to_owned() })
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// An error, with the end of the log, once the daemon has ended by itself.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}:\n{}", self.name, log_tail(&self.log, 15));
        }
        Ok(())
    }

    /// SIGTERM, then SIGKILL if that does not help in time (which is an error, as it is for an init system).
    pub async fn stop(mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        self.signal(Signal::TERM)?;
        if timeout(STOP_DEADLINE, self.child.wait()).await.is_ok() {
            return Ok(());
        }
        let name = self.name.clone();
        self.kill().await?;
        bail!("{name} did not end within {STOP_DEADLINE:?} of SIGTERM")
    }

    /// SIGKILL, and waits for the end.
    pub async fn kill(mut self) -> Result<()> {
        self.child.kill().await.with_context(|| format!("cannot kill {}", self.name))
    }
}

/// How much of a line is shown, in characters.
const LINE_CHARS_MAX: usize = 400;

/// The last `lines` lines of a log, the long ones shortened.
#[must_use]
pub fn log_tail(log: &Path, lines: usize) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let last = all.get(all.len().saturating_sub(lines)..).unwrap_or_default();
    last.iter().map(|line| line.chars().take(LINE_CHARS_MAX).collect::<String>() + "\n").collect()
}
