//! How busy the machine is: on one with two cores, a figure about time says little without it.

use std::fs;

use anyhow::{Context as _, Result};

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_first_line_is_all_cores() {
        let ticks = Ticks::read("cpu  10 1 5 70 4 1 2 7 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n").unwrap();
        assert_eq!((ticks.all, ticks.idle), (100, 74));
    }
}
