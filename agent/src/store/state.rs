//! What is known of one blob in memory, and how that may change. One value, changed under one lock, without IO.
//!
//! ```text
//! Incomplete --whole digest matches--> Complete --a piece rots--> Incomplete
//!     |  \--whole digest differs--> Poisoned
//!     \--discarded, evicted, files removed--> Gone (from Complete too)
//! ```

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_tracker::{Bitmap, Digest, Geometry, PieceIndex, PieceProof};

use super::directory::Place;
use super::verify::Whole;

/// What has become of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Pieces are missing, or the whole has not been compared with its digest.
    Incomplete,
    /// All bytes are there and match the digest.
    Complete,
    /// All bytes are there and do not match. Nothing is served from it; it stays so until it is discarded.
    Poisoned,
    /// Discarded, evicted, or removed from outside. This value will not change any more.
    Gone,
}

/// How far a blob is, for those who wait on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Grows with every change.
    pub version: u64,
    /// How many pieces are held.
    pub held: u32,
    /// How many held pieces were dropped because they rotted on the disk. When this grows, look at
    /// [`Blob::held`](super::Blob::held) again: a piece that was there has to be fetched.
    pub lost: u64,
    /// What has become of it.
    pub outcome: Outcome,
}

/// Takes a lock whoever panicked under it: critical sections here leave nothing half done.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a piece may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// By the asker, who must release it.
    Granted,
    /// Not needed.
    Held,
    /// Somebody is at it; look again after the next change.
    Busy,
}

/// The next step of hashing the whole.
pub(super) struct Turn {
    pub(super) generation: u64,
    pub(super) hasher: Whole,
    /// `None` when every piece has been hashed.
    pub(super) piece: Option<PieceIndex>,
}

/// How far the whole has been hashed.
struct Hashing {
    /// Grows when a piece that was hashed is dropped: what a thread then brings back is worthless.
    generation: u64,
    next: PieceIndex,
    /// `None` while a thread has it, so there are never two.
    hasher: Option<Whole>,
}

/// The state of one blob.
pub(super) struct State {
    digest: Digest,
    pieces: u32,
    version: u64,
    held: Bitmap,
    lost: u64,
    outcome: Outcome,
    hashing: Hashing,
    busy: BTreeSet<PieceIndex>,
    used: LastUse,
    used_on_disk: bool,
    /// Where the files are.
    pub(super) place: Place,
    /// The disk failed to take what the kernel had accepted: pieces are compared each time they are read.
    pub(super) suspect: bool,
    /// Who vouched for what in a poisoned blob.
    pub(super) blame: Vec<(PieceIndex, PieceProof)>,
}

/// When a blob was last used: an instant, less what had passed before that.
///
/// An `Instant` of before this process cannot be had, and wall clocks jump.
#[derive(Clone, Copy, Debug)]
struct LastUse {
    at: Instant,
    before: Duration,
}

impl State {
    pub(super) fn new(digest: Digest, geometry: Geometry, held: Bitmap, place: Place, idle: Duration) -> Self {
        let outcome = if place == Place::Blobs { Outcome::Complete } else { Outcome::Incomplete };
        Self {
            digest,
            pieces: geometry.pieces(),
            version: 0,
            held,
            lost: 0,
            outcome,
            hashing: Hashing { generation: 0, next: PieceIndex(0), hasher: Some(Whole::new(&digest)) },
            busy: BTreeSet::new(),
            used: LastUse { at: Instant::now(), before: idle },
            used_on_disk: true,
            place,
            suspect: false,
            blame: Vec::new(),
        }
    }

    pub(super) fn progress(&self) -> Progress {
        Progress { version: self.version, held: self.held.count(), lost: self.lost, outcome: self.outcome }
    }

    /// To be called with every change that somebody may wait for.
    pub(super) fn changed(&mut self) -> Progress {
        self.version += 1;
        self.progress()
    }

    pub(super) fn held(&self) -> &Bitmap {
        &self.held
    }

    pub(super) fn outcome(&self) -> Outcome {
        self.outcome
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// How long the blob has not been used.
    pub(super) fn idle(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.used.at).saturating_add(self.used.before)
    }

    pub(super) fn touch(&mut self) {
        self.used = LastUse { at: Instant::now(), before: Duration::ZERO };
        self.used_on_disk = false;
    }

    /// Whether the blob was used since this was last asked.
    pub(super) fn take_used(&mut self) -> bool {
        !std::mem::replace(&mut self.used_on_disk, true)
    }

    /// Asks to write a piece.
    pub(super) fn claim(&mut self, piece: PieceIndex) -> Claim {
        if self.held.contains(piece) {
            Claim::Held
        } else if self.busy.insert(piece) {
            Claim::Granted
        } else {
            Claim::Busy
        }
    }

    /// Gives a claim back; tells whether it was still there.
    pub(super) fn release(&mut self, piece: PieceIndex) -> bool {
        self.busy.remove(&piece)
    }

    /// A claimed piece is on disk. Tells whether the blob still takes pieces.
    pub(super) fn arrived(&mut self, piece: PieceIndex) -> bool {
        self.busy.remove(&piece);
        if self.outcome != Outcome::Incomplete {
            return false;
        }
        self.held.insert(piece);
        self.touch();
        true
    }

    /// A held piece is not what it was. It is claimed, so that nobody writes it while its record is removed; tells
    /// whether it was held at all.
    pub(super) fn lose(&mut self, piece: PieceIndex) -> bool {
        if !matches!(self.outcome, Outcome::Incomplete | Outcome::Complete) || !self.held.remove(piece) {
            return false;
        }
        self.busy.insert(piece);
        self.lost += 1;
        let at_it = self.hashing.hasher.is_none() && piece == self.hashing.next;
        if piece < self.hashing.next || at_it || self.outcome == Outcome::Complete {
            self.hashing.generation += 1;
            self.hashing.next = PieceIndex(0);
            if self.hashing.hasher.is_some() || self.outcome == Outcome::Complete {
                self.hashing.hasher = Some(Whole::new(&self.digest));
            }
        }
        self.outcome = Outcome::Incomplete;
        true
    }

    /// Whether there is something to hash and nobody at it.
    pub(super) fn has_turn(&self) -> bool {
        let next = self.hashing.next;
        self.outcome == Outcome::Incomplete
            && self.hashing.hasher.is_some()
            && (next.0 == self.pieces || self.held.contains(next))
    }

    /// Takes the next step of hashing the whole.
    pub(super) fn take_turn(&mut self) -> Option<Turn> {
        if !self.has_turn() {
            return None;
        }
        let next = self.hashing.next;
        let piece = (next.0 < self.pieces).then_some(next);
        let generation = self.hashing.generation;
        self.hashing.hasher.take().map(|hasher| Turn { generation, hasher, piece })
    }

    /// Brings the hasher back, one piece further if `advanced`.
    pub(super) fn end_turn(&mut self, generation: u64, hasher: Whole, advanced: bool) {
        if generation != self.hashing.generation {
            if self.hashing.hasher.is_none() {
                self.hashing.hasher = Some(Whole::new(&self.digest));
            }
            return;
        }
        self.hashing.hasher = Some(hasher);
        if advanced {
            self.hashing.next.0 += 1;
        }
    }

    /// The whole was compared with its digest. Tells whether that still says something about the bytes that are held.
    pub(super) fn decide(&mut self, generation: u64, outcome: Outcome) -> bool {
        if self.outcome != Outcome::Incomplete || generation != self.hashing.generation || !self.held.is_full() {
            self.end_turn(generation, Whole::new(&self.digest), false);
            return false;
        }
        self.outcome = outcome;
        true
    }

    /// The blob is not in the cache any more. A poisoned one stays poisoned, for its readers.
    pub(super) fn leave(&mut self) {
        if self.outcome != Outcome::Poisoned {
            self.outcome = Outcome::Gone;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use darter_tracker::PieceSize;

    fn state(pieces: u32) -> State {
        let size = PieceSize::new(PieceSize::MIN_BYTES).unwrap();
        let geometry = Geometry::new(u64::from(pieces * PieceSize::MIN_BYTES), size).unwrap();
        State::new(Digest::Sha256([0; 32]), geometry, Bitmap::new(pieces), Place::Partial, Duration::ZERO)
    }

    fn arrive(state: &mut State, piece: u32) {
        assert_eq!(state.claim(PieceIndex(piece)), Claim::Granted);
        assert!(state.arrived(PieceIndex(piece)));
    }

    #[test]
    fn one_writer_a_piece() {
        let mut state = state(2);
        assert_eq!(state.claim(PieceIndex(0)), Claim::Granted);
        assert_eq!(state.claim(PieceIndex(0)), Claim::Busy);
        assert_eq!(state.claim(PieceIndex(1)), Claim::Granted);
        assert!(state.release(PieceIndex(0)));
        assert_eq!(state.claim(PieceIndex(0)), Claim::Granted);
        assert!(state.arrived(PieceIndex(0)));
        assert_eq!(state.claim(PieceIndex(0)), Claim::Held);
    }

    #[test]
    fn hashing_is_in_order_and_by_one_thread() {
        let mut state = state(3);
        arrive(&mut state, 1);
        assert!(!state.has_turn());
        arrive(&mut state, 0);
        let turn = state.take_turn().unwrap();
        assert_eq!(turn.piece, Some(PieceIndex(0)));
        assert!(state.take_turn().is_none());
        state.end_turn(turn.generation, turn.hasher, true);
        let turn = state.take_turn().unwrap();
        assert_eq!(turn.piece, Some(PieceIndex(1)));
        arrive(&mut state, 2);
        state.end_turn(turn.generation, turn.hasher, true);
        let turn = state.take_turn().unwrap();
        assert_eq!(turn.piece, Some(PieceIndex(2)));
        state.end_turn(turn.generation, turn.hasher, true);
        let turn = state.take_turn().unwrap();
        assert_eq!(turn.piece, None);
        assert!(state.decide(turn.generation, Outcome::Complete));
        assert!(!state.has_turn());
    }

    #[test]
    fn a_lost_piece_undoes_the_hash_of_what_followed() {
        let mut state = state(3);
        for piece in 0..3 {
            arrive(&mut state, piece);
        }
        let turn = state.take_turn().unwrap();
        state.end_turn(turn.generation, turn.hasher, true);
        let stale = state.take_turn().unwrap();
        assert_eq!(stale.piece, Some(PieceIndex(1)));
        assert!(state.lose(PieceIndex(0)));
        assert!(!state.lose(PieceIndex(0)));
        assert_eq!(state.claim(PieceIndex(0)), Claim::Busy);
        assert!(!state.has_turn());
        state.end_turn(stale.generation, stale.hasher, true);
        assert!(!state.has_turn(), "piece 0 is missing");
        state.release(PieceIndex(0));
        arrive(&mut state, 0);
        assert_eq!(state.take_turn().unwrap().piece, Some(PieceIndex(0)));
    }

    #[test]
    fn a_verdict_on_bytes_that_are_gone_does_not_count() {
        let mut state = state(1);
        arrive(&mut state, 0);
        let turn = state.take_turn().unwrap();
        state.end_turn(turn.generation, turn.hasher, true);
        let last = state.take_turn().unwrap();
        assert!(state.lose(PieceIndex(0)));
        assert!(!state.decide(last.generation, Outcome::Complete));
        assert_eq!(state.outcome(), Outcome::Incomplete);
        state.release(PieceIndex(0));
        arrive(&mut state, 0);
        assert_eq!(state.take_turn().unwrap().piece, Some(PieceIndex(0)));
    }
}
