//! Memory that the machine has at hand before a run begins.
//!
//! The host of a virtual machine finds a page when the guest first touches it. Where that takes as long as ten copies of the page,
//! as it was seen to, it is the host that is measured: with whoever happens to run first. What a guest tells its host to be free is
//! taken back within seconds, so that is not told while the benchmark runs.

use std::fs;
use std::hint::black_box;

use anyhow::{Context as _, Result};

/// What a run takes, over the bytes that its nodes write: the files, and as much again for sockets and processes.
const SHARE: u64 = 2;

/// What is left of the available memory for everything else.
const LEFT_DIVISOR: u64 = 2;

const CHUNK_BYTES: usize = 64 << 20;

/// The size of the blocks of free pages, as the exponent of two, from which on the host is told of them.
const REPORTED_ORDER: &str = "/sys/module/page_reporting/parameters/page_reporting_order";

/// Larger than any block.
const NO_ORDER: &str = "11";

/// Keeps free memory while it exists.
#[derive(Debug)]
pub struct Hold {
    before: Option<String>,
}

impl Hold {
    /// Has the host told of no free pages; says so on stderr where that cannot be had.
    #[must_use]
    pub fn take() -> Self {
        // Where there is no such parameter nobody is told.
        let before = fs::read_to_string(REPORTED_ORDER).ok().map(|order| order.trim().to_owned());
        let before = before.filter(|order| order != NO_ORDER);
        if before.is_some()
            && let Err(error) = fs::write(REPORTED_ORDER, NO_ORDER)
        {
            eprintln!("bench: free memory goes back to this machine's host meanwhile, and is slow to come: {error}");
        }
        Self { before }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // Where it could not be changed either, nothing has changed.
            let _ = fs::write(REPORTED_ORDER, before);
        }
    }
}

/// Touches as much memory as the writing of so many bytes takes, at most half of what is available, and gives it back.
pub async fn touch(bytes: u64) -> Result<()> {
    let text = tokio::fs::read_to_string("/proc/meminfo").await.context("/proc/meminfo")?;
    let available = available_bytes(&text).context("/proc/meminfo tells no available memory")?;
    let wanted = bytes.saturating_mul(SHARE).min(available / LEFT_DIVISOR);
    let touched = move || {
        let chunks = wanted / CHUNK_BYTES as u64;
        let memory: Vec<Vec<u8>> = (0..chunks).map(|_| vec![1; CHUNK_BYTES]).collect();
        black_box(&memory);
    };
    tokio::task::spawn_blocking(touched).await.context("memory could not be touched")
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_what_is_available() {
        let text = "MemTotal:       24683520 kB\nMemFree:          184320 kB\nMemAvailable:     20971520 kB\n";
        assert_eq!(available_bytes(text), Some(20 << 30));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
    }
}
