//! How busy the machine is: on one with two cores, a figure about time says little without it.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::Pid;

/// Ticks per second in what /proc says: the same on every architecture that the agent is built for.
const TICKS_PER_SECOND: f64 = 100.0;

/// Ticks of all cores since the machine started, whoever used them.
#[derive(Clone, Copy, Debug)]
pub struct Ticks {
    all: u64,
    idle: u64,
}

impl Ticks {
    /// As of now.
    pub fn now() -> Result<Self> {
        Self::read(&fs::read_to_string("/proc/stat")?).context("an odd /proc/stat")
    }

    /// The share of the cores' time that was used since, 0 to 1.
    pub fn busy_since(self) -> Result<f64> {
        let now = Self::now()?;
        let (all, idle) = (now.all.saturating_sub(self.all), now.idle.saturating_sub(self.idle));
        Ok(1.0 - idle as f64 / all.max(1) as f64)
    }

    fn read(text: &str) -> Option<Self> {
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        // user, nice, system, idle, waiting for disks, interrupts, and what follows is counted in these or taken away.
        let ticks: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Self { all: ticks.iter().take(8).sum(), idle: ticks.get(3)? + ticks.get(4)? })
    }
}

/// CPU time that a process has used since it was started, its own and the kernel's on its behalf.
pub fn used_by(pid: Pid) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    let ticks = ticks_of(&text).context("an odd /proc/PID/stat")?;
    Ok(Duration::from_secs_f64(ticks as f64 / TICKS_PER_SECOND))
}

fn ticks_of(stat: &str) -> Option<u64> {
    // The program's name is in brackets and may hold any; user and system time are the twelfth and thirteenth after it.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut times = rest.split_whitespace().skip(11).map(str::parse::<u64>);
    Some(times.next()?.ok()? + times.next()?.ok()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_process_has_user_and_system_time() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 40 2 99 99 20 0\n";
        assert_eq!(ticks_of(stat), Some(42));
    }

    #[test]
    fn the_first_line_is_all_cores() {
        let ticks = Ticks::read("cpu  10 1 5 70 4 1 2 7 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n").unwrap();
        assert_eq!((ticks.all, ticks.idle), (100, 74));
    }
}
