//! Seeds from a file: one address per line, read again when it changes.
//!
//! For whoever makes the list with a program of his own (a configuration management, a ConfigMap). It is compared once a
//! second rather than watched: a mounted ConfigMap is a chain of symbolic links that are swapped, and a file on a network
//! file system tells nobody that it changed.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::Update;
use crate::backoff::Backoff;
use crate::fixed::{Address, List, REFRESH};
use crate::index::{SEEDS_PER_SOURCE_MAX, SourceId};

/// How often the file is compared. Reading a few lines out of the page cache costs microseconds.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The largest file that is read: as many lines as seeds are kept of one source, each as long as a name can be, and as much
/// again for comments. A larger one is not this list.
const FILE_BYTES_MAX: u64 = 128 << 10;

/// What a file says, and what in it could not be understood.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parsed {
    addresses: Vec<Address>,
    /// Numbers of the lines that are no addresses, from 1.
    wrong: Vec<usize>,
    /// Addresses beyond [`SEEDS_PER_SOURCE_MAX`], which are left out.
    surplus: usize,
}

/// Reads a list: an address per line, `#` begins a comment. Wrong lines do not keep the others from being used.
fn parse(text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    for (at, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        match line.parse() {
            Ok(_) if parsed.addresses.len() == SEEDS_PER_SOURCE_MAX => parsed.surplus += 1,
            Ok(address) => parsed.addresses.push(address),
            Err(_) => parsed.wrong.push(at + 1),
        }
    }
    parsed
}

/// Follows the file. Ends when nobody listens.
pub(crate) async fn run(source: SourceId, path: PathBuf, updates: mpsc::Sender<Update>) {
    let mut list = List::default();
    let mut backoff = Backoff::default();
    // The outcome of the last look, so that only changes are said and acted on.
    let mut before: Option<Result<String, io::ErrorKind>> = None;
    let mut resolve_at = None;
    loop {
        let now = read(&path).await.map_err(|error| {
            let kind = error.kind();
            if before.as_ref().is_none_or(|before| before.as_ref().err() != Some(&kind)) {
                tracing::warn!(path = %path.display(), %error, "the file of seeds cannot be read, it is tried again");
            }
            kind
        });
        let changed = before.as_ref() != Some(&now);
        if changed {
            let known = match &now {
                Ok(text) => Some(take(&path, text)),
                // No file is an answer: no seeds. Of one that cannot be read the last answer stays.
                Err(io::ErrorKind::NotFound) => Some(Vec::new()),
                Err(_) => None,
            };
            before = Some(now);
            if let Some(addresses) = known {
                list.replace(addresses);
                backoff.succeeded();
                resolve_at = Some(Instant::now());
                let update = Update { source, seeds: list.seeds(), complete: !list.has_names() };
                if updates.send(update).await.is_err() {
                    return;
                }
            }
        }
        if list.has_names() && resolve_at.is_some_and(|at| at <= Instant::now()) {
            let complete = list.look_up().await;
            let wait = if complete { REFRESH } else { backoff.failed(rand::random()) };
            if complete {
                backoff.succeeded();
            }
            resolve_at = Some(Instant::now() + wait);
            if updates.send(Update { source, seeds: list.seeds(), complete }).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = updates.closed() => return,
        }
    }
}

/// The addresses of a text that is new; says what is wrong with it.
fn take(path: &Path, text: &str) -> Vec<Address> {
    let Parsed { addresses, wrong, surplus } = parse(text);
    let path = path.display();
    if let Some(first) = wrong.first() {
        tracing::warn!(%path, lines = wrong.len(), first, "lines of the file of seeds are no addresses as in host:8002");
    }
    if surplus > 0 {
        tracing::warn!(%path, surplus, kept = SEEDS_PER_SOURCE_MAX, "too many seeds in the file");
    }
    addresses.into_iter().collect::<BTreeSet<_>>().into_iter().collect()
}

async fn read(path: &Path) -> io::Result<String> {
    // Asked before it is opened: opening a pipe would wait for somebody to write to it.
    if !tokio::fs::metadata(path).await?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    let mut text = Vec::new();
    tokio::fs::File::open(path).await?.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).await?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {FILE_BYTES_MAX} bytes")));
    }
    String::from_utf8(text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_addresses_or_comments() {
        let text = "# seeds\n10.0.0.1:8002\n\n  seed.example.org:8002  # the old one\n10.0.0.2\r\n[fd00::1]:8002\r\n";
        let parsed = parse(text);
        let texts: Vec<_> = parsed.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.0.0.1:8002", "seed.example.org:8002", "[fd00::1]:8002"]);
        assert_eq!((parsed.wrong, parsed.surplus), (vec![5], 0));
        assert_eq!(parse(""), Parsed::default());
    }

    #[test]
    fn a_list_is_bounded() {
        let text: String = (1..=SEEDS_PER_SOURCE_MAX + 3).map(|port| format!("10.0.0.1:{port}\n")).collect();
        let parsed = parse(&text);
        assert_eq!((parsed.addresses.len(), parsed.surplus), (SEEDS_PER_SOURCE_MAX, 3));
    }

    #[tokio::test]
    async fn what_is_not_a_short_text_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peers");
        std::fs::write(&path, vec![b'#'; FILE_BYTES_MAX as usize]).unwrap();
        assert_eq!(read(&path).await.unwrap().len() as u64, FILE_BYTES_MAX);
        std::fs::write(&path, vec![b'#'; FILE_BYTES_MAX as usize + 1]).unwrap();
        assert_eq!(read(&path).await.unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        std::fs::write(&path, b"\xff").unwrap();
        assert_eq!(read(&path).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(read(dir.path()).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(read(&dir.path().join("gone")).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
