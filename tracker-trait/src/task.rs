//! What is moved: a task is a blob, whatever name or registry it is asked for under.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::piece::{PieceIndex, PieceSize};

/// Names a task: the digest of the blob, so that one layer under two names is moved once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId(Digest);

impl TaskId {
    /// The task of moving the blob with this digest.
    #[must_use]
    pub const fn blob(digest: Digest) -> Self {
        Self(digest)
    }

    /// The digest that the finished bytes must have.
    #[must_use]
    pub const fn digest(&self) -> &Digest {
        &self.0
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// How a blob is cut: its length and the size of its pieces. Every member of a task uses the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u64, PieceSize)", into = "(u64, PieceSize)")]
pub struct Geometry {
    length: u64,
    piece_size: PieceSize,
}

/// Why length and piece size do not fit together. The sender's mistake; nothing changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Blobs without bytes never enter the swarm.
    #[error("a task has at least one byte")]
    Empty,
    /// More pieces than a bitmap may hold.
    #[error("{length} bytes are more than {max} pieces of this size", max = Geometry::PIECES_MAX)]
    TooManyPieces {
        /// The blob's length in bytes.
        length: u64,
    },
}

impl Geometry {
    /// Bound on the pieces of a task: a bitmap of 8 KiB, 256 GiB in pieces of 4 MiB. Larger blobs pass through.
    pub const PIECES_MAX: u32 = 65_536;

    /// A cut of `length` bytes into pieces of `piece_size`.
    ///
    /// # Errors
    /// If there are no bytes, or more than [`Self::PIECES_MAX`] pieces.
    pub fn new(length: u64, piece_size: PieceSize) -> Result<Self, GeometryError> {
        if length == 0 {
            return Err(GeometryError::Empty);
        }
        if length.div_ceil(u64::from(piece_size.bytes())) > u64::from(Self::PIECES_MAX) {
            return Err(GeometryError::TooManyPieces { length });
        }
        Ok(Self { length, piece_size })
    }

    /// Length of the blob in bytes, at least 1.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Size of every piece but the last.
    #[must_use]
    pub const fn piece_size(&self) -> PieceSize {
        self.piece_size
    }

    /// How many pieces there are, at least 1.
    #[must_use]
    pub fn pieces(&self) -> u32 {
        // Bounded by PIECES_MAX in `new`.
        self.length.div_ceil(u64::from(self.piece_size.bytes())) as u32
    }

    /// The last piece.
    #[must_use]
    pub fn last(&self) -> PieceIndex {
        PieceIndex(self.pieces() - 1)
    }

    /// Whether the blob has such a piece.
    #[must_use]
    pub fn contains(&self, piece: PieceIndex) -> bool {
        piece.0 < self.pieces()
    }

    /// Where a piece begins, in bytes from the start of the blob.
    #[must_use]
    pub fn offset(&self, piece: PieceIndex) -> u64 {
        u64::from(piece.0) * u64::from(self.piece_size.bytes())
    }

    /// How many bytes a piece has: the piece size, or what is left for the last one; 0 past the end.
    #[must_use]
    pub fn piece_length(&self, piece: PieceIndex) -> u32 {
        let left = self.length.saturating_sub(self.offset(piece));
        left.min(u64::from(self.piece_size.bytes())) as u32
    }

    /// The piece that holds the byte at `offset`.
    #[must_use]
    pub fn piece_at(&self, offset: u64) -> PieceIndex {
        PieceIndex((offset.min(self.length - 1) / u64::from(self.piece_size.bytes())) as u32)
    }
}

impl TryFrom<(u64, PieceSize)> for Geometry {
    type Error = GeometryError;
    fn try_from((length, piece_size): (u64, PieceSize)) -> Result<Self, GeometryError> {
        Self::new(length, piece_size)
    }
}

impl From<Geometry> for (u64, PieceSize) {
    fn from(geometry: Geometry) -> Self {
        (geometry.length, geometry.piece_size)
    }
}

/// How the piece size of a task is chosen from its length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PieceSizeRule {
    /// The next power of two above length / 1024, between 256 KiB and 4 MiB: small layers still pipeline.
    #[default]
    Auto,
    /// Dragonfly v1's rule: 4 MiB up to 200 MiB, then length / 100 MiB + 2 MiB, at most 15 MiB.
    Dragonfly,
    /// The same size for every task.
    Fixed(PieceSize),
}

impl PieceSizeRule {
    /// The piece size for a blob of `length` bytes.
    #[must_use]
    pub fn piece_size(self, length: u64) -> PieceSize {
        const MIB: u64 = 1024 * 1024;
        match self {
            Self::Auto => {
                let wanted = (length / 1024).checked_next_power_of_two().unwrap_or(u64::MAX);
                PieceSize::clamped(wanted.clamp(MIB / 4, 4 * MIB))
            }
            Self::Dragonfly if length <= 200 * MIB => PieceSize::clamped(4 * MIB),
            Self::Dragonfly => PieceSize::clamped(((length / (100 * MIB) + 2) * MIB).min(15 * MIB)),
            Self::Fixed(size) => size,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn piece_sizes_follow_their_rules() {
        const KIB: u64 = 1024;
        const MIB: u64 = 1024 * KIB;
        for (length, auto, dragonfly) in [
            (1, 256 * KIB, 4 * MIB),
            (128 * MIB, 256 * KIB, 4 * MIB),
            (200 * MIB, 256 * KIB, 4 * MIB),
            (200 * MIB + 1, 256 * KIB, 4 * MIB),
            (300 * MIB, 512 * KIB, 5 * MIB),
            (1024 * MIB, MIB, 12 * MIB),
            (1300 * MIB, 2 * MIB, 15 * MIB),
            (10 * 1024 * MIB, 4 * MIB, 15 * MIB),
        ] {
            assert_eq!(u64::from(PieceSizeRule::Auto.piece_size(length).bytes()), auto, "auto {length}");
            assert_eq!(u64::from(PieceSizeRule::Dragonfly.piece_size(length).bytes()), dragonfly, "v1 {length}");
        }
    }

    proptest! {
        #[test]
        fn pieces_tile_the_blob(length in 1..200_000_000u64, size in 12..24u32) {
            let geometry = Geometry::new(length, PieceSize::new(1 << size).unwrap()).unwrap();
            let total: u64 = (0..geometry.pieces()).map(|p| u64::from(geometry.piece_length(PieceIndex(p)))).sum();
            prop_assert_eq!(total, length);
            prop_assert!(geometry.piece_length(geometry.last()) > 0);
            prop_assert_eq!(geometry.piece_length(PieceIndex(geometry.pieces())), 0);
            let probe = length / 3;
            let piece = geometry.piece_at(probe);
            prop_assert!(geometry.offset(piece) <= probe);
            prop_assert!(probe < geometry.offset(piece) + u64::from(geometry.piece_length(piece)));
        }
    }
}
