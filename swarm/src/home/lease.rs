//! Origin leases of one task: which member may fetch which run of pieces from the registry, each piece once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use darter_tracker::{Bitmap, Geometry, Lease, LeaseId, NodeId, PieceIndex, PieceRange};

use crate::patience::{PATIENCE_MAX, Patience};

/// A lease lapses after this long without progress: the registry is slow or the fetcher is gone. Fetchers renew while
/// bytes come, so a slow registry does not cost the lease; on a crowded link a renewal takes a second or two to arrive. The
/// leases of a dead fetcher do not wait for this: who asks it for something notices sooner, and says so.
pub const LAPSE: Duration = Duration::from_secs(4);

/// A lease lapses as well when nothing at all has come from its fetcher for this long, or for longer where that is common: it
/// says something every [`crate::task::link::RENEW`] while it is alive.
pub const SILENT_FETCHER: Duration = Duration::from_secs(1);

/// After this a reader does not wait for such a fetcher.
pub const SILENT_URGENT: Duration = Duration::from_millis(500);

/// Fetchers at a time in a cluster of [`LARGE_CLUSTER`] members or more.
pub const FETCHERS_LARGE: usize = 8;

/// Fetchers at a time in a smaller cluster: more would cut the blob into runs too short for their requests.
pub const FETCHERS_SMALL: usize = 4;

/// From how many members on a cluster counts as large.
pub const LARGE_CLUSTER: usize = 32;

/// Until a member holds something of a task, one fetches, but for no longer than this: its first piece, for which every client
/// waits, then comes before the registry's link is shared with runs that nobody waits for. (Simulated with 16 nodes and 8 layers at
/// 100 Mb/s: the first byte after 0.20 s instead of 0.33, at 25 Mb/s after 0.88 instead of 1.55, and the last one, over three seeds, no later.)
pub const FIRST_ALONE: Duration = Duration::from_secs(1);

/// The longest run: 16 MiB leave a joiner something to fetch and keep the order near the readers.
pub const RUN_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Registry requests that a blob may cost beside one per [`RUN_BYTES_MAX`].
pub const REQUESTS_BASE: u64 = 8;

/// So many pieces in a row that a reader needs at once are lent one by one, then 2, 4, ... at a time. What a holder does not give
/// would else come piece by piece to the end, each after a reader's wait; but who could not reach him for a moment shall not fetch
/// what all others get from him.
pub const SINGLES: u32 = 3;

/// The runs that are being fetched.
#[derive(Debug, Default)]
pub struct Leases {
    held: BTreeMap<LeaseId, Held>,
    /// When the first was given.
    first: Option<Instant>,
    patience: Patience,
    /// Fetchers that were given up as silent, and when something had last come from them.
    doubted: BTreeMap<NodeId, Instant>,
    /// How many runs in a row were lent as urgent, by the piece that follows the last.
    urgent: BTreeMap<u32, u32>,
}

#[derive(Debug)]
struct Held {
    to: NodeId,
    /// Pieces of the run that were not reported yet.
    open: Bitmap,
    progress: Instant,
    /// When something last came from the fetcher.
    alive: Instant,
    /// Whether the fetcher had begun before it came here, under a lease of another home.
    adopted: bool,
}

impl Leases {
    /// Frees the leases that made no progress for [`LAPSE`].
    pub fn expire(&mut self, now: Instant) {
        self.doubted.retain(|_, last| now.saturating_duration_since(*last) <= PATIENCE_MAX);
        self.held.retain(|_, held| {
            let since = |at: Instant| now.saturating_duration_since(at);
            let silent = since(held.alive) >= self.patience.with(held.to, SILENT_FETCHER);
            let alive = since(held.progress) < LAPSE && !silent;
            if silent {
                self.doubted.entry(held.to).or_insert(held.alive);
            }
            if !alive {
                tracing::debug!(to = %held.to, open = held.open.count(), "a lease lapses");
            }
            alive
        });
    }

    /// Notes that `pieces` are lent since a reader needs the first of them at once.
    pub fn note_urgent(&mut self, pieces: PieceRange) {
        let before = self.urgent.get(&pieces.first.0).copied().unwrap_or_default();
        self.urgent.insert(pieces.end(), before + 1);
    }

    /// The longest run that is lent where a reader needs `first` at once.
    #[must_use]
    pub fn urgent_length(&self, first: PieceIndex) -> u32 {
        let before = self.urgent.get(&first.0).copied().unwrap_or_default();
        // As many pieces as a task may have at the most.
        1 << before.saturating_sub(SINGLES).min(u16::BITS)
    }

    /// Whether somebody who is not in `without` is fetching `piece`.
    #[must_use]
    pub fn covers(&self, piece: PieceIndex, without: &BTreeSet<NodeId>) -> bool {
        self.held.values().any(|held| held.open.contains(piece) && !without.contains(&held.to))
    }

    /// Whether the fetcher of `piece` has been silent for so long that no reader shall wait for it.
    #[must_use]
    pub fn silent(&self, piece: PieceIndex, now: Instant) -> bool {
        let silent =
            |held: &&Held| now.saturating_duration_since(held.alive) >= self.patience.with(held.to, SILENT_URGENT);
        self.held.values().filter(|held| held.open.contains(piece)).all(|held| silent(&held))
    }

    /// Notes that something has come from `node`.
    pub fn heard(&mut self, node: NodeId, now: Instant) {
        let mut last = self.doubted.remove(&node);
        for held in self.held.values_mut().filter(|held| held.to == node) {
            last = last.max(Some(std::mem::replace(&mut held.alive, now)));
        }
        if let Some(last) = last {
            self.patience.note(node, now.saturating_duration_since(last), now);
        }
    }

    /// Who is fetching.
    pub fn holders(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.held.values().map(|held| held.to)
    }

    /// Whose signs of life count: who is fetching, and who was given up as silent.
    pub fn watched(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.holders().chain(self.doubted.keys().copied())
    }

    /// What of each lease has not come yet.
    pub fn open(&self) -> impl Iterator<Item = &Bitmap> {
        self.held.values().map(|held| &held.open)
    }

    /// How many members are fetching.
    #[must_use]
    pub fn fetchers(&self) -> usize {
        // A member has one lease at a time, except while it answers an urgent need.
        self.held.len()
    }

    /// Whether it is so early that nobody shall fetch beside who does, if nothing of the task is held anywhere. Counted from the
    /// first lease of all: who takes one and gives it back again and again keeps nobody away.
    #[must_use]
    pub fn first_alone(&self, now: Instant) -> bool {
        let early = self.first.is_some_and(|first| now.saturating_duration_since(first) < FIRST_ALONE);
        early && !self.held.is_empty()
    }

    /// Whether `node` has a lease.
    #[must_use]
    pub fn has(&self, node: NodeId) -> bool {
        self.held.values().any(|held| held.to == node)
    }

    /// Gives `pieces` to `node`.
    pub fn grant(&mut self, id: LeaseId, node: NodeId, pieces: PieceRange, total: u32, now: Instant) -> Lease {
        let mut open = Bitmap::new(total);
        for piece in pieces.iter() {
            open.insert(piece);
        }
        self.first.get_or_insert(now);
        self.held.insert(id, Held { to: node, open, progress: now, alive: now, adopted: false });
        Lease { id, pieces, lapse: LAPSE }
    }

    /// Gives `pieces` to `node`, which is fetching them already.
    pub fn adopt(&mut self, id: LeaseId, node: NodeId, pieces: PieceRange, total: u32, now: Instant) -> Lease {
        let lease = self.grant(id, node, pieces, total, now);
        if let Some(held) = self.held.get_mut(&id) {
            held.adopted = true;
        }
        lease
    }

    /// Notes progress of `node`'s lease; `None` if it is over.
    pub fn renew(&mut self, id: LeaseId, node: NodeId, now: Instant) -> Option<()> {
        self.heard(node, now);
        self.held.get_mut(&id).filter(|held| held.to == node)?.progress = now;
        Some(())
    }

    /// Notes that a piece arrived somewhere; a lease whose pieces have all arrived is over.
    pub fn landed(&mut self, piece: PieceIndex) {
        for held in self.held.values_mut() {
            held.open.remove(piece);
        }
        self.end_empty();
    }

    /// Leaves to another home the pieces that it `claims` for the first time. What was adopted goes on until that one's members
    /// `have` it: the fetcher has begun under another home, most likely under that one, which counts on him.
    pub fn leave(&mut self, claims: &Bitmap, have: &Bitmap) {
        for held in self.held.values_mut() {
            held.open.remove_all(if held.adopted { have } else { claims });
        }
        self.end_empty();
    }

    fn end_empty(&mut self) {
        self.held.retain(|_, held| !held.open.is_empty());
    }

    /// Takes a lease back from `node`.
    pub fn release(&mut self, id: LeaseId, node: NodeId) {
        if self.held.get(&id).is_some_and(|held| held.to == node) {
            let open = self.held.remove(&id).map(|held| held.open.count());
            tracing::debug!(%node, open, "a lease is given back");
        }
    }

    /// Takes every lease of `node` back.
    pub fn release_all(&mut self, node: NodeId) {
        self.held.retain(|_, held| held.to != node);
        tracing::debug!(%node, "all leases are taken back");
    }
}

/// How many members may fetch at a time in a cluster of this size.
#[must_use]
pub fn fetchers_max(cluster_size: usize) -> usize {
    if cluster_size < LARGE_CLUSTER { FETCHERS_SMALL } else { FETCHERS_LARGE }
}

/// How many pieces the next run shall have when `free` pieces are neither held nor leased.
///
/// Long runs first, shorter ones towards the end, so that the fetchers finish together; never so short that the blob
/// costs the registry more than [`REQUESTS_BASE`] + size / 16 MiB requests. Alone in the cluster, everything at once.
#[must_use]
pub fn run_length(geometry: &Geometry, free: u32, cluster_size: usize) -> u32 {
    if cluster_size <= 1 {
        return geometry.pieces();
    }
    let requests = REQUESTS_BASE + geometry.length() / RUN_BYTES_MAX;
    let shortest = u64::from(geometry.pieces()).div_ceil(requests);
    let longest = (RUN_BYTES_MAX / u64::from(geometry.piece_size().bytes())).max(1);
    let shares = 2 * fetchers_max(cluster_size) as u64;
    // Bounded by the piece count, which is a u32.
    u64::from(free).div_ceil(shares).min(longest).max(shortest) as u32
}
