//! In what portions a task is moved, and how a portion proves that it is the right one.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::peer::NodeId;
use crate::task::Geometry;

/// The position of a piece in its task, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PieceIndex(pub u32);

/// A run of neighbouring pieces, never empty in a valid message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PieceRange {
    /// The first piece.
    pub first: PieceIndex,
    /// How many pieces.
    pub count: u32,
}

impl PieceRange {
    /// The pieces of the run, in order.
    pub fn iter(self) -> impl Iterator<Item = PieceIndex> {
        (self.first.0..self.end()).map(PieceIndex)
    }

    /// The index after the last piece.
    #[must_use]
    pub const fn end(self) -> u32 {
        self.first.0.saturating_add(self.count)
    }

    /// Whether `piece` is in the run.
    #[must_use]
    pub const fn contains(self, piece: PieceIndex) -> bool {
        piece.0 >= self.first.0 && piece.0 < self.end()
    }

    /// Neighbouring indices gathered into runs. `pieces` must be sorted.
    #[must_use]
    pub fn gather(pieces: impl IntoIterator<Item = PieceIndex>) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for piece in pieces {
            match runs.last_mut() {
                Some(run) if run.end() == piece.0 => run.count += 1,
                _ => runs.push(Self { first: piece, count: 1 }),
            }
        }
        runs
    }
}

/// Bytes in a piece: between 4 KiB and 16 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct PieceSize(u32);

impl PieceSize {
    /// Below this the header of a piece outweighs what it is good for.
    pub const MIN_BYTES: u32 = 4 * 1024;
    /// What an agent is prepared to hold in memory for one piece.
    pub const MAX_BYTES: u32 = 16 * 1024 * 1024;

    /// A piece size, if `bytes` is within the bounds.
    #[must_use]
    pub const fn new(bytes: u32) -> Option<Self> {
        if bytes >= Self::MIN_BYTES && bytes <= Self::MAX_BYTES { Some(Self(bytes)) } else { None }
    }

    /// The permitted size nearest to `bytes`.
    #[must_use]
    pub fn clamped(bytes: u64) -> Self {
        Self(bytes.clamp(u64::from(Self::MIN_BYTES), u64::from(Self::MAX_BYTES)) as u32)
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for PieceSize {
    type Error = &'static str;
    fn try_from(bytes: u32) -> Result<Self, Self::Error> {
        Self::new(bytes).ok_or("a piece has 4 KiB to 16 MiB")
    }
}

impl From<PieceSize> for u32 {
    fn from(size: PieceSize) -> Self {
        size.0
    }
}

/// The BLAKE3 digest of one piece.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PieceDigest([u8; 32]);

impl PieceDigest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// A digest from its raw bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for PieceDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0[..4] {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Who vouches for a piece: the member that fetched it from the registry.
///
/// The tag shows that the key belongs to a member without asking anybody, so proofs outlive the member that made them
/// and travel faster than gossip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Signer {
    /// Ed25519 public key.
    pub public_key: [u8; 32],
    /// Boot epoch of the member that the key was made for.
    pub epoch: u64,
    /// MAC under the cluster's secret over key, cluster and epoch.
    pub tag: [u8; 16],
}

impl Signer {
    /// The member that signed.
    #[must_use]
    pub fn node(&self) -> NodeId {
        NodeId::of_key(&self.public_key)
    }
}

/// What travels with a piece: its digest, signed by the member that fetched it from the registry.
///
/// The signature covers the task, the index, the cut and the digest, so a proof cannot be moved to another piece.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceProof {
    /// BLAKE3 of the piece.
    pub digest: PieceDigest,
    /// Who fetched it.
    pub signer: Signer,
    /// First half of the Ed25519 signature (serde derives arrays of up to 32).
    signature_r: [u8; 32],
    /// Second half.
    signature_s: [u8; 32],
}

impl PieceProof {
    /// Puts a proof together; whether the signature is right is not checked here.
    #[must_use]
    pub fn new(digest: PieceDigest, signer: Signer, signature: &[u8; 64]) -> Self {
        let (mut signature_r, mut signature_s) = ([0; 32], [0; 32]);
        signature_r.copy_from_slice(&signature[..32]);
        signature_s.copy_from_slice(&signature[32..]);
        Self { digest, signer, signature_r, signature_s }
    }

    /// The Ed25519 signature.
    #[must_use]
    pub fn signature(&self) -> [u8; 64] {
        let mut signature = [0; 64];
        signature[..32].copy_from_slice(&self.signature_r);
        signature[32..].copy_from_slice(&self.signature_s);
        signature
    }
}

impl fmt::Debug for PieceProof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} by {}", self.digest, self.signer.node())
    }
}

/// A set of pieces of one task: one bit each.
///
/// Its length is fixed when it is made; indices past the end are absent and setting them is a no-op, so a bitmap from
/// the wire cannot grow memory.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WireBitmap", into = "WireBitmap")]
pub struct Bitmap {
    pieces: u32,
    count: u32,
    words: Vec<u64>,
}

#[derive(Clone, Serialize, Deserialize)]
struct WireBitmap {
    pieces: u32,
    words: Vec<u64>,
}

/// The bits that are set, a word at a time: a downloader goes through its bitmaps at every event.
fn ones(words: impl Iterator<Item = u64>) -> impl Iterator<Item = PieceIndex> {
    words.zip(0u32..).flat_map(|(mut word, at)| {
        std::iter::from_fn(move || {
            let bit = (word != 0).then(|| word.trailing_zeros())?;
            word &= word - 1;
            Some(PieceIndex(at * 64 + bit))
        })
    })
}

impl Bitmap {
    /// The empty set for a task of `pieces` pieces, at most [`Geometry::PIECES_MAX`].
    #[must_use]
    pub fn new(pieces: u32) -> Self {
        let pieces = pieces.min(Geometry::PIECES_MAX);
        Self { pieces, count: 0, words: vec![0; pieces.div_ceil(64) as usize] }
    }

    /// The set of all pieces.
    #[must_use]
    pub fn full(pieces: u32) -> Self {
        let mut bitmap = Self::new(pieces);
        for piece in 0..bitmap.pieces {
            bitmap.insert(PieceIndex(piece));
        }
        bitmap
    }

    /// How many pieces the task has.
    #[must_use]
    pub const fn pieces(&self) -> u32 {
        self.pieces
    }

    /// How many pieces are in the set.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// Whether nothing is in the set.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether every piece is in the set.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.count == self.pieces
    }

    /// Whether `piece` is in the set.
    #[must_use]
    pub fn contains(&self, piece: PieceIndex) -> bool {
        self.words.get((piece.0 / 64) as usize).is_some_and(|word| word >> (piece.0 % 64) & 1 == 1)
    }

    /// Adds a piece; tells whether it was new.
    pub fn insert(&mut self, piece: PieceIndex) -> bool {
        if piece.0 >= self.pieces || self.contains(piece) {
            return false;
        }
        self.words[(piece.0 / 64) as usize] |= 1 << (piece.0 % 64);
        self.count += 1;
        true
    }

    /// Takes a piece out; tells whether it was there.
    pub fn remove(&mut self, piece: PieceIndex) -> bool {
        if !self.contains(piece) {
            return false;
        }
        self.words[(piece.0 / 64) as usize] &= !(1 << (piece.0 % 64));
        self.count -= 1;
        true
    }

    /// The pieces in the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = PieceIndex> + '_ {
        ones(self.words.iter().copied())
    }

    /// The pieces that are not in the set, in order.
    pub fn missing(&self) -> impl Iterator<Item = PieceIndex> + '_ {
        let pieces = self.pieces;
        ones(self.words.iter().map(|word| !word)).take_while(move |piece| piece.0 < pieces)
    }

    /// Whether a piece is in both sets.
    #[must_use]
    pub fn intersects(&self, other: &Self) -> bool {
        self.words.iter().zip(&other.words).any(|(one, other)| one & other != 0)
    }

    /// Adds the pieces of another set of the same length.
    pub fn add_all(&mut self, other: &Self) {
        self.combine(other, |one, other| one | other);
    }

    /// Takes the pieces of another set of the same length out.
    pub fn remove_all(&mut self, other: &Self) {
        self.combine(other, |one, other| one & !other);
    }

    fn combine(&mut self, other: &Self, with: impl Fn(u64, u64) -> u64) {
        if self.pieces == other.pieces {
            for (one, other) in self.words.iter_mut().zip(&other.words) {
                *one = with(*one, *other);
            }
            self.count = self.words.iter().map(|word| word.count_ones()).sum();
        }
    }

    /// The pieces that are in `other` as well, in order.
    pub fn common<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = PieceIndex> + 'a {
        ones(self.words.iter().zip(&other.words).map(|(one, other)| one & other))
    }

    /// How many pieces from the start are there without a gap.
    #[must_use]
    pub fn prefix(&self) -> u32 {
        self.missing().next().map_or(self.pieces, |piece| piece.0)
    }
}

impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.count, self.pieces)
    }
}

impl TryFrom<WireBitmap> for Bitmap {
    type Error = &'static str;
    fn try_from(wire: WireBitmap) -> Result<Self, Self::Error> {
        if wire.pieces > Geometry::PIECES_MAX || wire.words.len() != wire.pieces.div_ceil(64) as usize {
            return Err("a bitmap's words do not fit its length");
        }
        let spare = (wire.words.len() * 64) as u32 - wire.pieces;
        if spare > 0 && wire.words.last().is_some_and(|word| word >> (64 - spare) != 0) {
            return Err("a bitmap has bits past its end");
        }
        let count = wire.words.iter().map(|word| word.count_ones()).sum();
        Ok(Self { pieces: wire.pieces, count, words: wire.words })
    }
}

impl From<Bitmap> for WireBitmap {
    fn from(bitmap: Bitmap) -> Self {
        Self { pieces: bitmap.pieces, words: bitmap.words }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_forged_bitmap_is_refused() {
        let full = Bitmap::full(65);
        let bytes = postcard::to_stdvec(&full).unwrap();
        assert_eq!(postcard::from_bytes::<Bitmap>(&bytes).unwrap(), full);
        for forged in [
            WireBitmap { pieces: 65, words: vec![0] },
            WireBitmap { pieces: 65, words: vec![0, 2] },
            WireBitmap { pieces: u32::MAX, words: vec![] },
        ] {
            let bytes = postcard::to_stdvec(&forged).unwrap();
            assert!(postcard::from_bytes::<Bitmap>(&bytes).is_err());
        }
    }

    proptest! {
        #[test]
        fn behaves_like_a_set(pieces in 1..300u32, ops in prop::collection::vec((any::<bool>(), 0..310u32), 0..200)) {
            let (mut bitmap, mut model) = (Bitmap::new(pieces), BTreeSet::new());
            for (add, piece) in ops {
                let changed = if add { bitmap.insert(PieceIndex(piece)) } else { bitmap.remove(PieceIndex(piece)) };
                let expected = if add { piece < pieces && model.insert(piece) } else { model.remove(&piece) };
                prop_assert_eq!(changed, expected);
            }
            prop_assert_eq!(bitmap.count() as usize, model.len());
            prop_assert!(bitmap.iter().map(|p| p.0).eq(model.iter().copied()));
            prop_assert_eq!(bitmap.prefix(), (0..pieces).take_while(|p| model.contains(p)).count() as u32);
            let mut even = Bitmap::new(pieces);
            (0..pieces).step_by(2).for_each(|piece| { even.insert(PieceIndex(piece)); });
            prop_assert_eq!(bitmap.intersects(&even), model.iter().any(|p| p % 2 == 0));
            let (mut both, mut odd) = (bitmap.clone(), bitmap.clone());
            both.add_all(&even);
            odd.remove_all(&even);
            prop_assert_eq!(both.count() as usize, (0..pieces).filter(|p| p % 2 == 0 || model.contains(p)).count());
            prop_assert!(odd.iter().map(|p| p.0).eq(model.iter().copied().filter(|p| p % 2 == 1)));
            prop_assert_eq!(odd.count() as usize, odd.iter().count());
            let runs = PieceRange::gather(bitmap.iter());
            prop_assert!(runs.iter().flat_map(|r| r.iter()).eq(bitmap.iter()));
            prop_assert!(runs.windows(2).all(|w| w[0].end() < w[1].first.0));
        }
    }
}
