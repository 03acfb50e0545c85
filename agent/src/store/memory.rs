//! Pieces that have just come, kept in memory: most are hashed, given to a client and to peers within seconds.
//!
//! Holds pieces of blobs that are not whole yet, the last used first, within a bound over all blobs. What is here matched its proof
//! when it came and was not on a disk since, so it is given without comparing it again. Whether a piece may be given at all is not
//! known here: who asks has looked at the blob's state.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use darter_tracker::PieceIndex;
use lru::LruCache;

use super::state::lock;
use super::verify::VerifiedPiece;

/// A piece that nobody has wanted for so long is left to the disk.
const KEPT: Duration = Duration::from_secs(10);

/// A piece that takes more than this part of the memory is not kept: it would push out what many others are used for.
const PART_MAX: u64 = 2;

/// Names one blob for as long as the process lives; one that was discarded and made anew is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct BlobId(u64);

/// The pieces of all blobs.
pub(super) struct Memory {
    bytes_max: u64,
    /// How many blobs have a name.
    named: AtomicU64,
    shelf: Mutex<Shelf>,
}

struct Shelf {
    pieces: LruCache<(BlobId, PieceIndex), Kept>,
    bytes: u64,
}

struct Kept {
    piece: VerifiedPiece,
    used: Instant,
}

impl Memory {
    /// Room for so many bytes of pieces.
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            named: AtomicU64::new(0),
            shelf: Mutex::new(Shelf { pieces: LruCache::unbounded(), bytes: 0 }),
        }
    }

    /// A name for a blob that is new.
    pub(super) fn name(&self) -> BlobId {
        BlobId(self.named.fetch_add(1, Ordering::Relaxed))
    }

    /// Keeps a piece; others may have to go for it.
    pub(super) fn keep(&self, blob: BlobId, piece: VerifiedPiece) {
        let bytes = piece.bytes().len() as u64;
        if bytes > self.bytes_max / PART_MAX {
            return;
        }
        let mut shelf = lock(&self.shelf);
        let key = (blob, piece.piece());
        let before = shelf.pieces.put(key, Kept { piece, used: Instant::now() });
        shelf.bytes += bytes;
        shelf.bytes -= before.map_or(0, |kept| kept.bytes());
        while shelf.bytes > self.bytes_max && shelf.drop_oldest() {}
    }

    /// A piece, if it is here; that counts as a use.
    pub(super) fn get(&self, blob: BlobId, piece: PieceIndex) -> Option<VerifiedPiece> {
        let mut shelf = lock(&self.shelf);
        let kept = shelf.pieces.get_mut(&(blob, piece))?;
        kept.used = Instant::now();
        Some(kept.piece.clone())
    }

    /// A piece is not what it was believed to be.
    pub(super) fn forget(&self, blob: BlobId, piece: PieceIndex) {
        let mut shelf = lock(&self.shelf);
        if let Some(kept) = shelf.pieces.pop(&(blob, piece)) {
            shelf.bytes -= kept.bytes();
        }
    }

    /// Nothing more of a blob is needed from here.
    pub(super) fn forget_all(&self, blob: BlobId) {
        let mut shelf = lock(&self.shelf);
        let keys: Vec<_> = shelf.pieces.iter().map(|(key, _)| *key).filter(|(of, _)| *of == blob).collect();
        for key in keys {
            if let Some(kept) = shelf.pieces.pop(&key) {
                shelf.bytes -= kept.bytes();
            }
        }
    }

    /// Lets go of what nobody wants any more.
    pub(super) fn sweep(&self, now: Instant) {
        let mut shelf = lock(&self.shelf);
        let old = |kept: &Kept| now.saturating_duration_since(kept.used) >= KEPT;
        while shelf.pieces.peek_lru().is_some_and(|(_, kept)| old(kept)) && shelf.drop_oldest() {}
    }
}

impl Shelf {
    fn drop_oldest(&mut self) -> bool {
        let oldest = self.pieces.pop_lru();
        self.bytes -= oldest.as_ref().map_or(0, |(_, kept)| kept.bytes());
        oldest.is_some()
    }
}

impl Kept {
    fn bytes(&self) -> u64 {
        self.piece.bytes().len() as u64
    }
}
