//! Memory that the machine has at hand before a run begins.
//!
//! The host of a virtual machine finds a page when the guest first touches it. Where that takes as long as ten copies of the page,
//! as it was seen to, it is the host that is measured: with whoever happens to run first.

use std::hint::black_box;

use anyhow::{Context as _, Result};

/// What a run takes, over the bytes that its nodes write: the files, and as much again for sockets and processes.
const SHARE: u64 = 2;

/// What is left of the available memory for everything else.
const LEFT_DIVISOR: u64 = 2;

const CHUNK_BYTES: usize = 64 << 20;

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
