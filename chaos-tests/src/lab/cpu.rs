//! How busy the machine is, and with what: on one with two cores, a figure about time says little without it. And what a
//! process takes of it.

use std::collections::BTreeMap;
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

    /// Ticks of all cores that passed since, idle ones included.
    pub fn passed_since(self) -> Result<u64> {
        Ok(Self::now()?.all.saturating_sub(self.all))
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
    times_of(pid).map(|(own, kernel)| own + kernel)
}

/// The same in two: its own, and the kernel's on its behalf, to which in a lab also belongs much of what its packets take on
/// their way through other hosts.
pub fn times_of(pid: Pid) -> Result<(Duration, Duration)> {
    let text = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    let (own, kernel) = ticks_of(&text).context("an odd /proc/PID/stat")?;
    let seconds = |ticks: u64| Duration::from_secs_f64(ticks as f64 / TICKS_PER_SECOND);
    Ok((seconds(own), seconds(kernel)))
}

/// The most memory that a process has had in use, in bytes (`VmHWM`).
pub fn peak_memory_bytes(pid: Pid) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
    peak_of(&text).context("an odd /proc/PID/status")
}

fn peak_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// CPU time of this process and all that descend from it, those that have ended included.
#[derive(Clone, Copy, Debug)]
pub struct Tree {
    ticks: u64,
    machine: Ticks,
}

impl Tree {
    /// As of now.
    pub fn now() -> Result<Self> {
        let mut stats = BTreeMap::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            // A process may end while it is looked at; then its parent has its time.
            let Ok(text) = fs::read_to_string(entry.path().join("stat")) else { continue };
            if let Some(stat) = Stat::read(&text) {
                stats.insert(stat.pid, stat);
            }
        }
        Ok(Self { ticks: ticks_below(std::process::id(), &stats), machine: Ticks::now()? })
    }

    /// The share of the cores' time that the tree has used since, 0 to 1. What the kernel does for its packets outside of
    /// any process is not in it.
    pub fn busy_since(self) -> Result<f64> {
        let used = Self::now()?.ticks.saturating_sub(self.ticks);
        Ok(used as f64 / self.machine.passed_since()?.max(1) as f64)
    }

    /// The share of the cores' time that anybody has used since, 0 to 1.
    pub fn machine_busy_since(self) -> Result<f64> {
        self.machine.busy_since()
    }
}

/// What a line of /proc/PID/stat says.
#[derive(Clone, Copy, Debug)]
struct Stat {
    pid: u32,
    parent: u32,
    /// Its own, and that of the children that it has waited for.
    ticks: u64,
}

impl Stat {
    fn read(text: &str) -> Option<Self> {
        let (pid, rest) = (text.split(' ').next()?.parse().ok()?, text.rsplit_once(')')?.1);
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let times = fields.get(11..15)?.iter().map(|time| time.parse::<u64>().ok());
        Some(Self { pid, parent: fields.get(1)?.parse().ok()?, ticks: times.sum::<Option<u64>>()? })
    }
}

fn ticks_below(root: u32, stats: &BTreeMap<u32, Stat>) -> u64 {
    let (mut found, mut sum) = (vec![root], 0);
    while let Some(pid) = found.pop() {
        sum += stats.get(&pid).map_or(0, |stat| stat.ticks);
        found.extend(stats.values().filter(|stat| stat.parent == pid).map(|stat| stat.pid));
    }
    sum
}

fn ticks_of(stat: &str) -> Option<(u64, u64)> {
    // The program's name is in brackets and may hold any; user and system time are the twelfth and thirteenth after it.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut times = rest.split_whitespace().skip(11).map(str::parse::<u64>);
    Some((times.next()?.ok()?, times.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_process_has_user_and_system_time() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 40 2 99 99 20 0\n";
        assert_eq!(ticks_of(stat), Some((40, 2)));
    }

    #[test]
    fn a_tree_is_a_process_its_descendants_and_those_that_ended() {
        let lines = [
            "1 (init) S 0 1 1 0 -1 4 0 0 0 0 900 900 900 900 20",
            "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 40 2 3 1 20 0",
            "8 (child) S 7 2 3 4 5 6 7 8 9 10 10 0 0 0 20 0",
            "9 (other) S 1 2 3 4 5 6 7 8 9 10 77 0 0 0 20 0",
            "10 (grandchild) R 8 2 3 4 5 6 7 8 9 10 0 5 0 0 20 0",
        ];
        let stats = lines.iter().map(|line| Stat::read(line).unwrap()).map(|stat| (stat.pid, stat)).collect();
        assert_eq!(ticks_below(7, &stats), 40 + 2 + 3 + 1 + 10 + 5);
    }

    #[test]
    fn the_peak_is_in_kibibytes() {
        assert_eq!(peak_of("VmPeak:\t 9 kB\nVmHWM:\t   12 kB\n"), Some(12 << 10));
        assert_eq!(peak_of("VmPeak:\t 9 kB\n"), None);
    }

    #[test]
    fn the_first_line_is_all_cores() {
        let ticks = Ticks::read("cpu  10 1 5 70 4 1 2 7 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n").unwrap();
        assert_eq!((ticks.all, ticks.idle), (100, 74));
    }
}
