//! Running other programs: always with a deadline, never with this machine's environment.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::future::Future;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

/// What a command may take unless it says otherwise: `ip`, `curl` and the like answer at once, so this is only for a
/// machine that is busy compiling.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);

/// How often a condition is looked at while waiting for it.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How much of a failed command's output goes into the error, in bytes from its end.
const OUTPUT_SHOWN_BYTES: usize = 2000;

/// Where Debian keeps the tools; a plain user's PATH often lacks the second half.
const SYSTEM_PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin";

/// A program about to be run.
#[derive(Debug)]
pub struct Run {
    command: Command,
    shown: String,
    deadline: Duration,
}

/// What a finished program left.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; -1 after a signal.
    pub code: i32,
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
}

impl Run {
    /// A command with an environment of nothing but PATH.
    #[must_use]
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let shown = program.as_ref().to_string_lossy().into_owned();
        let mut command = Command::new(program);
        command.env_clear().env("PATH", SYSTEM_PATH).stdin(Stdio::null()).kill_on_drop(true);
        Self { command, shown, deadline: COMMAND_DEADLINE }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        let _ = write!(self.shown, " {}", arg.as_ref().to_string_lossy());
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(self, args: impl IntoIterator<Item = A>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets one environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Replaces the deadline.
    #[must_use]
    pub fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs it to its end, whatever its exit code; an error if it cannot start or misses the deadline.
    pub async fn finish(mut self) -> Result<Finished> {
        let shown = self.shown;
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = timeout(self.deadline, self.command.output())
            .await
            .with_context(|| format!("`{shown}` did not end within {:?}", self.deadline))?
            .with_context(|| format!("cannot run `{shown}`"))?;
        Ok(Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs it and returns its standard output; any exit code but 0 is an error that shows what it printed.
    pub async fn output(self) -> Result<String> {
        let shown = self.shown.clone();
        let finished = self.finish().await?;
        if finished.code != 0 {
            bail!("`{shown}` ended with {}: {}{}", finished.code, tail(&finished.stderr), tail(&finished.stdout));
        }
        Ok(finished.stdout)
    }

    /// Starts it with both outputs appended to `log`. The caller owns the process; see [`crate::lab::daemon`].
    pub(super) fn spawn(mut self, log: &Path) -> Result<tokio::process::Child> {
        let file = std::fs::File::options().create(true).append(true).open(log)?;
        self.command.stdout(file.try_clone()?).stderr(file);
        self.command.spawn().with_context(|| format!("cannot start `{}`", self.shown))
    }
}

/// Waits until `condition` holds. The error says `what` was waited for.
pub async fn wait_for<F: Future<Output = bool>>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> F,
) -> Result<()> {
    let end = Instant::now() + deadline;
    loop {
        if condition().await {
            return Ok(());
        }
        if Instant::now() >= end {
            bail!("waited {deadline:?} in vain for {what}");
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// Whether a program is installed.
#[must_use]
pub fn installed(program: &str) -> bool {
    SYSTEM_PATH.split(':').any(|directory| Path::new(directory).join(program).is_file())
}

fn tail(text: &str) -> &str {
    let mut start = text.len().saturating_sub(OUTPUT_SHOWN_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.get(start..).unwrap_or_default()
}
