//! Which piece to ask of which neighbour: in order within a short window at each reader, so that clients stream;
//! beyond it the rarest first; ties at random. Slow answers are asked for a second time elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use darter_tracker::{Bitmap, ErrorKind, NodeId, PieceIndex};
use rand::RngExt as _;

use super::{Action, Task};

/// Pieces ahead of a reader that are taken in order.
pub const WINDOW: u32 = 8;

/// Bytes asked of peers at a time, over all neighbours of a task; each may have to be held in memory.
const IN_FLIGHT_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Pieces asked of peers at a time, at least and at most, whatever their size.
const IN_FLIGHT_MIN: usize = 4;
const IN_FLIGHT_MAX: usize = 32;

/// Pieces asked of peers at a time for a blob that is fetched ahead of its reading: one that comes, one that is waited for.
const BACKGROUND: usize = 2;

/// How many pieces a downloader asks for at a time. The places at all senders together are four per node, so in a large
/// swarm more requests than that only come back as busy (with 32 each, fifty nodes spent a core on refusing each other). Each
/// delivery raises the number and each refusal lowers it, so that there is about one refusal for two deliveries.
#[derive(Debug)]
pub(super) struct Appetite {
    eighths: usize,
}

impl Default for Appetite {
    fn default() -> Self {
        Self { eighths: 8 * 8 }
    }
}

impl Appetite {
    pub(super) fn delivered(&mut self) {
        self.eighths = (self.eighths + 1).min(8 * IN_FLIGHT_MAX);
    }

    pub(super) fn refused(&mut self) {
        self.eighths = (self.eighths - 2).max(8 * IN_FLIGHT_MIN);
    }

    /// For pieces of this size.
    fn pieces(&self, size: u64) -> usize {
        (self.eighths / 8).min((IN_FLIGHT_BYTES_MAX / size) as usize).max(IN_FLIGHT_MIN)
    }
}

impl Task {
    /// Gives up what is past its deadline. A node that is late itself gives it up without blaming anybody.
    pub(super) fn expire_requests(&mut self, now: Instant) {
        let overdue: Vec<(NodeId, PieceIndex, bool)> = self
            .neighbours
            .iter()
            .flat_map(|(peer, neighbour)| {
                neighbour.overdue(now).into_iter().map(|(piece, silent)| (*peer, piece, silent))
            })
            .collect();
        for (peer, piece, silent) in overdue {
            self.actions.push_back(Action::Cancel { peer, piece });
            let kind = self.may_judge(now).then_some(ErrorKind::Unreachable);
            if let Some(neighbour) = self.neighbours.get_mut(&peer) {
                neighbour.fail(piece, kind, now, &mut self.rng);
            }
            // A peer that is merely slow is of use to others.
            if let Some(kind) = kind.filter(|_| silent) {
                self.blame(peer, vec![darter_tracker::PieceRange { first: piece, count: 1 }], kind);
            }
        }
    }

    /// Uses every free slot of every neighbour.
    pub(super) fn drive_requests(&mut self, now: Instant) {
        if self.is_complete() {
            return;
        }
        let size = u64::from(self.geometry.piece_size().bytes());
        let budget = if self.background { BACKGROUND } else { self.appetite.pieces(size) };
        let mut wanted = self.wanted();
        let windows: BTreeSet<PieceIndex> = self.readers.values().map(|waiting| waiting.piece).collect();
        let late = self.late(now);
        let mut in_flight: usize = self.neighbours.values().map(|neighbour| neighbour.in_flight()).sum();
        let mut idle: Vec<NodeId> =
            self.neighbours.iter().filter(|(_, neighbour)| neighbour.ready(now)).map(|(peer, _)| *peer).collect();
        while in_flight < budget && !idle.is_empty() {
            idle.sort_by_key(|peer| self.neighbours[peer].load());
            let mut asked = false;
            idle.retain(|peer| {
                if in_flight >= budget {
                    return true;
                }
                let Some(piece) = self.choose(*peer, &wanted, &windows, &late) else { return false };
                let bytes = self.geometry.piece_length(piece);
                let Some(neighbour) = self.neighbours.get_mut(peer) else { return false };
                neighbour.ask(piece, bytes, now);
                wanted.remove(piece);
                self.actions.push_back(Action::Request { peer: *peer, piece });
                in_flight += 1;
                asked = true;
                neighbour.ready(now)
            });
            if !asked {
                break;
            }
        }
    }

    /// The piece to ask `peer` for, if it has one that is wanted.
    fn choose(
        &mut self,
        peer: NodeId,
        wanted: &Bitmap,
        windows: &BTreeSet<PieceIndex>,
        late: &[PieceIndex],
    ) -> Option<PieceIndex> {
        self.in_window(peer, wanted, windows)
            .or_else(|| self.rarest(peer, wanted))
            .or_else(|| self.late_elsewhere(peer, late))
    }

    /// What is neither held nor on its way. Made once for all that is decided at a moment: to look at every request
    /// for every piece would cost a core in a large swarm.
    pub(super) fn wanted(&self) -> Bitmap {
        let mut wanted = Bitmap::new(self.geometry.pieces());
        for piece in self.have.missing() {
            wanted.insert(piece);
        }
        for piece in self.origin.covered().chain(self.neighbours.values().flat_map(|neighbour| neighbour.requested())) {
            wanted.remove(piece);
        }
        wanted
    }

    /// Whether a piece is on its way, from the registry or from a peer.
    pub(super) fn coming(&self, piece: PieceIndex) -> bool {
        self.origin.covers(piece) || self.neighbours.values().any(|neighbour| neighbour.asked(piece))
    }

    fn in_window(&self, peer: NodeId, wanted: &Bitmap, windows: &BTreeSet<PieceIndex>) -> Option<PieceIndex> {
        let neighbour = self.neighbours.get(&peer)?;
        windows
            .iter()
            .flat_map(|first| (first.0..first.0.saturating_add(WINDOW)).map(PieceIndex))
            .find(|piece| wanted.contains(*piece) && neighbour.has(*piece))
    }

    fn rarest(&mut self, peer: NodeId, wanted: &Bitmap) -> Option<PieceIndex> {
        let neighbour = self.neighbours.get(&peer)?;
        let mut best: Option<(u32, u32, PieceIndex)> = None;
        for piece in neighbour.offers(wanted) {
            let holders = self.availability[piece.0 as usize];
            if best.is_some_and(|(fewest, ..)| holders > fewest) {
                continue;
            }
            let tie = self.rng.random();
            if best.is_none_or(|(fewest, lowest, _)| (holders, tie) < (fewest, lowest)) {
                best = Some((holders, tie, piece));
            }
        }
        best.map(|(.., piece)| piece)
    }

    /// What one neighbour was asked for and is slow with.
    fn late(&self, now: Instant) -> Vec<PieceIndex> {
        let mut asked: BTreeMap<PieceIndex, (usize, bool)> = BTreeMap::new();
        for neighbour in self.neighbours.values() {
            for piece in neighbour.requested() {
                let (count, slow) = asked.entry(piece).or_default();
                *count += 1;
                *slow |= neighbour.slow(piece, now);
            }
        }
        let late =
            asked.into_iter().filter(|(piece, (count, slow))| *count == 1 && *slow && !self.have.contains(*piece));
        late.map(|(piece, _)| piece).collect()
    }

    /// Endgame and hedging: with nothing new to ask for, a piece that another neighbour is slow with.
    fn late_elsewhere(&self, peer: NodeId, late: &[PieceIndex]) -> Option<PieceIndex> {
        let neighbour = self.neighbours.get(&peer)?;
        late.iter().copied().find(|piece| neighbour.has(*piece) && !neighbour.asked(*piece))
    }
}
