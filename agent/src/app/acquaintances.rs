//! The members that were alive when last looked, kept beside the cache: a restarted agent knocks at them as well, so it is
//! back in its cluster at once, though every source of discovery may be down or name nobody but this node.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use darter_discovery::{Address, Source};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::gossip::Roster;

/// The file beside the cache: an address a line.
const FILE: &str = "members";

/// Members that are kept: that all of them have gone means that the cluster has.
const KEPT_MAX: usize = 32;

/// The shortest time between two writes.
const KEEP_EVERY: Duration = Duration::from_secs(2);

/// The source that a former run has left, if there is one. A torn or foreign file is as good as none.
pub(super) fn recall(dir: &Path) -> Option<Source> {
    let text = fs::read_to_string(dir.join(FILE)).ok()?;
    let addresses: Vec<Address> =
        text.lines().take(KEPT_MAX).filter_map(|line| line.parse().ok().map(Address::Literal)).collect();
    (!addresses.is_empty()).then_some(Source::Fixed { addresses })
}

/// Keeps the file up to date until `stopping`.
pub(super) async fn keep(dir: PathBuf, mut roster: watch::Receiver<Arc<Roster>>, stopping: CancellationToken) {
    let mut kept = BTreeSet::new();
    loop {
        let members: BTreeSet<SocketAddr> = {
            let roster = roster.borrow_and_update();
            roster.members.values().map(|member| member.gossip).take(KEPT_MAX).collect()
        };
        // Alone it has lost the others, who may be there when it starts again.
        if !members.is_empty() && members != kept {
            let (dir, addresses) = (dir.clone(), members.clone());
            match tokio::task::spawn_blocking(move || write(&dir, &addresses)).await {
                Ok(Ok(())) => kept = members,
                Ok(Err(error)) => tracing::debug!(%error, "the members cannot be kept for the next start"),
                Err(error) => tracing::error!(%error, "keeping the members for the next start failed"),
            }
        }
        let next = async { tokio::join!(roster.changed(), tokio::time::sleep(KEEP_EVERY)).0 };
        tokio::select! {
            () = stopping.cancelled() => return,
            changed = next => if changed.is_err() { return },
        }
    }
}

fn write(dir: &Path, addresses: &BTreeSet<SocketAddr>) -> io::Result<()> {
    let new = dir.join("members.new");
    // Not synced: what a power cut takes is found again by discovery.
    fs::write(&new, addresses.iter().map(|address| format!("{address}\n")).collect::<String>())?;
    fs::rename(new, dir.join(FILE))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_a_source_and_rubbish_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(recall(dir.path()), None);
        let addresses: BTreeSet<SocketAddr> = ["10.0.0.1:8002", "[fd00::2]:8002"].map(|a| a.parse().unwrap()).into();
        write(dir.path(), &addresses).unwrap();
        let expected = addresses.into_iter().map(Address::Literal).collect();
        assert_eq!(recall(dir.path()), Some(Source::Fixed { addresses: expected }));
        fs::write(dir.path().join(FILE), "\0\u{1}\nnot an address\n").unwrap();
        assert_eq!(recall(dir.path()), None);
    }
}
