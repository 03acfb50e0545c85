//! What can go wrong with the cache, told so that the caller knows whether to ask another peer, fetch again, or go on
//! without the disk.

use std::io;
use std::path::PathBuf;

use darter_tracker::{Geometry, PieceIndex};

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The cache directory, or one below it, is not safe to use. The operator's to mend; nothing was touched.
    #[error("the cache directory {path:?} {reason}")]
    Refused {
        /// Which directory.
        path: PathBuf,
        /// What is wrong with it, as the end of a sentence.
        reason: &'static str,
    },
    /// Another process uses the cache directory. The operator's to mend, or wait until it has ended.
    #[error("the cache directory {path:?} is in use by another process")]
    InUse {
        /// Which directory.
        path: PathBuf,
    },
    /// The blob cannot fit within the limits, or the disk is full. Nobody's fault; what is held stays held. Stream
    /// without the cache; later may work.
    #[error("no room in the cache for {bytes} bytes")]
    Full {
        /// How many bytes were to be written.
        bytes: u64,
    },
    /// The disk did not take a write, a file or a rename. Its fault; the piece or blob in question is not held, all else
    /// stays. Stream without the cache; repeating may work.
    #[error("the cache cannot be written: {doing}")]
    Unwritable {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The disk did not give back what it holds. Its fault; nothing changed. Repeating may work.
    #[error("the cache cannot be read: {doing}")]
    Unreadable {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The blob has no such piece. The caller's or the peer's mistake; nothing changed, repeating cannot help.
    #[error("there is no piece {}", piece.0)]
    NoSuchPiece {
        /// Which piece.
        piece: PieceIndex,
    },
    /// The bytes are not those that the proof names, in number or in digest. Whoever sent them is to blame; nothing was
    /// stored. Fetch the piece elsewhere.
    #[error("piece {} does not match its proof", piece.0)]
    Mismatch {
        /// Which piece.
        piece: PieceIndex,
    },
    /// The piece is not there, or was there, rotted on the disk, and has just been dropped. Fetch it.
    #[error("piece {} is not held", piece.0)]
    NotHeld {
        /// Which piece.
        piece: PieceIndex,
    },
    /// A piece that was held when the reader was made has rotted on the disk and was dropped. The disk's fault. Everything
    /// given out so far is right: look at [`Blob::held`](super::Blob::held) again, fetch what is missing, and read on
    /// from [`Reader::offset`](super::Reader::offset) with a new reader.
    #[error("a piece was lost on the disk")]
    Lost,
    /// What a reader was given of a piece as it came is not what was stored of it. The registry's fault, or that of whoever sent
    /// the piece in the end; nothing changed. The reader's bytes are of no use; begin again from the start.
    #[error("a piece is not what has come of it before")]
    Differs,
    /// The whole does not match its digest although every piece matched its proof: whoever signed is to blame. Nothing is
    /// served from it; discard it, fetch it again.
    #[error("the blob does not match its digest")]
    Poisoned,
    /// The blob was discarded, or its files were removed from outside. Create it again.
    #[error("the blob is gone from the cache")]
    Gone,
    /// The blob is in use with another length or piece size. The caller's or a peer's mistake; nothing changed.
    #[error("the blob is held as {held:?}")]
    Geometry {
        /// How it is cut here.
        held: Geometry,
    },
    /// The agent is shutting down; nothing can be said about the state.
    #[error("the store is stopping")]
    Stopped,
}

impl StoreError {
    /// Whether the disk is to blame: the caller then goes on without the cache instead of blaming a peer.
    #[must_use]
    pub fn is_disk(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::Unwritable { .. } | Self::Unreadable { .. } | Self::Lost)
    }

    /// A failed write: a full disk or quota is [`Self::Full`], anything else is [`Self::Unwritable`].
    pub(super) fn writing(doing: &'static str, bytes: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { bytes },
            _ => Self::Unwritable { doing, source },
        }
    }

    /// A failed read; a file that somebody removed is [`Self::Gone`].
    pub(super) fn reading(doing: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::Gone,
            _ => Self::Unreadable { doing, source },
        }
    }
}
