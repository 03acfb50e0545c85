//! The only place that says that bytes are right (D7).
//!
//! Nobody else can make a [`VerifiedPiece`] or a [`VerifiedRange`]: the write path takes the one and the read path the
//! other, so bytes that were not compared with a digest cannot get to the disk, to a peer or to a client.
//!
//! A piece is compared with the BLAKE3 digest that its proof names when it arrives, and again when it is read back from
//! files that were opened since; what `memory` has kept was not on a disk, and is not compared again. The whole blob's SHA-256 or SHA-512 runs along in order, from memory where it can.
//!
//! Not here: whether a proof was signed by a member; that is checked before a piece is given to the store.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use darter_tracker::{Digest, Geometry, PieceDigest, PieceIndex, PieceProof};
use sha2::{Digest as _, Sha256, Sha512};

use super::blob::Blob;
use super::error::StoreError;
use super::partial::Files;
use super::publish;
use super::state::Turn;

/// What is read from the disk at once: large enough that system calls do not show, small enough that a thousand readers
/// fit into memory.
pub(super) const CHUNK_BYTES: usize = 256 * 1024;

/// Bytes with their digest, which only hashing gives: who has them need not hash them again.
#[derive(Clone, Debug)]
pub struct Hashed {
    bytes: Bytes,
    digest: PieceDigest,
}

impl Hashed {
    /// Hashes a piece: a chunk at once, which takes less time than to wake another thread; more on a thread that may block.
    ///
    /// # Errors
    /// [`StoreError::Stopped`] if the runtime ends.
    pub async fn of(bytes: Bytes) -> Result<Self, StoreError> {
        if bytes.len() <= CHUNK_BYTES {
            return Ok(Self::now(bytes));
        }
        let hashed = tokio::task::spawn_blocking(|| Self::now(bytes));
        hashed.await.map_err(|_| StoreError::Stopped)
    }

    pub(super) fn now(bytes: Bytes) -> Self {
        Self { digest: PieceDigest::of(&bytes), bytes }
    }

    /// The digest of the bytes.
    #[must_use]
    pub fn digest(&self) -> PieceDigest {
        self.digest
    }

    /// How many bytes it is.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// A piece whose bytes match the proof that they came with.
#[derive(Clone)]
pub(super) struct VerifiedPiece {
    piece: PieceIndex,
    proof: PieceProof,
    bytes: Bytes,
}

/// Bytes from the disk, of a piece that matches its record.
pub(super) struct VerifiedRange {
    bytes: Bytes,
}

/// The bytes on disk are not those that the journal speaks of, or cannot be read.
#[derive(Debug)]
pub(super) struct Rotten;

impl From<io::Error> for Rotten {
    fn from(error: io::Error) -> Self {
        tracing::warn!(%error, "a piece of the cache cannot be read");
        Self
    }
}

impl VerifiedPiece {
    pub(super) fn piece(&self) -> PieceIndex {
        self.piece
    }

    pub(super) fn proof(&self) -> &PieceProof {
        &self.proof
    }

    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub(super) fn into_parts(self) -> (PieceProof, Bytes) {
        (self.proof, self.bytes)
    }

    /// At most `length` bytes of it, and no more than a chunk, from `offset` of the blob on.
    pub(super) fn range(&self, geometry: &Geometry, offset: u64, length: u64) -> VerifiedRange {
        let part = Part::of(geometry, self.piece, offset, length);
        let from = (part.offset - part.start) as usize;
        VerifiedRange { bytes: self.bytes.slice(from..from + part.length) }
    }
}

impl VerifiedRange {
    pub(super) fn into_bytes(self) -> Bytes {
        self.bytes
    }
}

/// Compares what was received with its proof.
pub(super) fn received(
    geometry: &Geometry,
    piece: PieceIndex,
    proof: &PieceProof,
    hashed: Hashed,
) -> Result<VerifiedPiece, StoreError> {
    let expected = geometry.piece_length(piece) as usize;
    if hashed.bytes.len() != expected || hashed.digest != proof.digest {
        return Err(StoreError::Mismatch { piece });
    }
    Ok(VerifiedPiece { piece, proof: *proof, bytes: hashed.bytes })
}

/// Reads a whole piece back and compares it with its record, every time: what goes to a peer must be right now.
pub(super) fn stored(files: &Files, piece: PieceIndex) -> Result<VerifiedPiece, Rotten> {
    let proof = files.proof(piece)?.ok_or(Rotten)?;
    let mut bytes = Vec::new();
    files.read(files.geometry.offset(piece), files.geometry.piece_length(piece) as usize, &mut bytes)?;
    received(&files.geometry, piece, &proof, Hashed::now(bytes.into())).map_err(|_| Rotten)
}

/// The same without waiting for the disk, as [`at_hand`].
pub(super) fn stored_at_hand(files: &Files, piece: PieceIndex) -> Option<VerifiedPiece> {
    let (offset, length) = (files.geometry.offset(piece), files.geometry.piece_length(piece) as usize);
    if length > CHUNK_BYTES {
        return None;
    }
    let (proof, bytes) = (files.proof_cached(piece)?, files.read_cached(offset, length)?);
    received(&files.geometry, piece, &proof, Hashed::now(bytes.into())).ok()
}

/// The part of a piece that begins at `offset` of the blob and has at most `length` bytes. The piece is compared with its
/// record, if that has not been done since its files were opened.
pub(super) fn range(files: &Files, piece: PieceIndex, offset: u64, length: u64) -> Result<VerifiedRange, Rotten> {
    let part = Part::of(&files.geometry, piece, offset, length);
    if !files.is_checked(piece) {
        if part.is_of_a_chunk() {
            let mut bytes = Vec::new();
            files.read(part.start, part.piece_length, &mut bytes)?;
            return part.compared(files, bytes, &files.proof(piece)?.ok_or(Rotten)?);
        }
        compare(files, piece, |_| {})?;
    }
    let mut bytes = Vec::new();
    files.read(offset, part.length, &mut bytes)?;
    if bytes.len() == part.length { Ok(VerifiedRange { bytes: bytes.into() }) } else { Err(Rotten) }
}

/// The same without waiting for the disk, and without more than a chunk's work: `None` where it would take either. Another
/// thread is not asked for what takes less time than its waking.
pub(super) fn at_hand(files: &Files, piece: PieceIndex, offset: u64, length: u64) -> Option<VerifiedRange> {
    let part = Part::of(&files.geometry, piece, offset, length);
    if files.is_checked(piece) {
        return files.read_cached(offset, part.length).map(|bytes| VerifiedRange { bytes: bytes.into() });
    }
    if !part.is_of_a_chunk() {
        return None;
    }
    let (proof, bytes) = (files.proof_cached(piece)?, files.read_cached(part.start, part.piece_length)?);
    part.compared(files, bytes, &proof).ok()
}

/// Which bytes of a piece are wanted.
struct Part {
    piece: PieceIndex,
    /// Where the piece begins.
    start: u64,
    piece_length: usize,
    offset: u64,
    length: usize,
}

impl Part {
    fn of(geometry: &Geometry, piece: PieceIndex, offset: u64, length: u64) -> Self {
        let (start, piece_length) = (geometry.offset(piece), geometry.piece_length(piece));
        let left = (start + u64::from(piece_length)).saturating_sub(offset);
        let length = left.min(length).min(CHUNK_BYTES as u64) as usize;
        Self { piece, start, piece_length: piece_length as usize, offset, length }
    }

    /// Whether the whole piece is read at once.
    fn is_of_a_chunk(&self) -> bool {
        self.piece_length <= CHUNK_BYTES
    }

    /// Compares a piece that was read, and cuts the part out of it.
    fn compared(&self, files: &Files, bytes: Vec<u8>, proof: &PieceProof) -> Result<VerifiedRange, Rotten> {
        let verified = received(&files.geometry, self.piece, proof, Hashed::now(bytes.into())).map_err(|_| Rotten)?;
        files.set_checked(self.piece);
        Ok(verified.range(&files.geometry, self.offset, self.length as u64))
    }
}

/// Reads a piece back in chunks, shows each to `see`, and compares the whole piece with its record.
pub(super) fn compare(files: &Files, piece: PieceIndex, mut see: impl FnMut(&[u8])) -> Result<(), Rotten> {
    let proof = files.proof(piece)?.ok_or(Rotten)?;
    let mut hasher = blake3::Hasher::new();
    let mut chunk = Vec::new();
    let mut offset = files.geometry.offset(piece);
    let end = offset + u64::from(files.geometry.piece_length(piece));
    while offset < end {
        files.read(offset, (end - offset).min(CHUNK_BYTES as u64) as usize, &mut chunk)?;
        if chunk.is_empty() {
            return Err(Rotten);
        }
        hasher.update(&chunk);
        see(&chunk);
        offset += chunk.len() as u64;
    }
    if hasher.finalize().as_bytes() != proof.digest.as_bytes() {
        return Err(Rotten);
    }
    files.set_checked(piece);
    Ok(())
}

/// The running digest of a whole blob.
#[derive(Clone)]
pub(crate) enum Whole {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Whole {
    /// A hasher of the algorithm that `digest` is of.
    pub(crate) fn new(digest: &Digest) -> Self {
        match digest {
            Digest::Sha256(_) => Self::Sha256(Sha256::new()),
            Digest::Sha512(_) => Self::Sha512(Sha512::new()),
        }
    }

    /// Takes the next bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// Whether all bytes were those of the digest.
    pub(crate) fn matches(self, digest: &Digest) -> bool {
        match self {
            Self::Sha256(hasher) => hasher.finalize()[..] == *digest.as_bytes(),
            Self::Sha512(hasher) => hasher.finalize()[..] == *digest.as_bytes(),
        }
    }
}

/// Has a blocking thread hash on, if there is something to hash and nobody at it.
///
/// Outside a runtime nothing happens; the next operation on the blob is inside one and asks again.
pub(super) fn kick(blob: &Arc<Blob>, files: Option<Arc<Files>>) {
    if !blob.look(|state| state.has_turn()) || tokio::runtime::Handle::try_current().is_err() {
        return;
    }
    let hashed = Arc::clone(blob);
    // The store's tracker owns the job; it ends with the held prefix, or after a piece when the store stops.
    drop(blob.context.jobs.spawn_blocking(move || match files.map_or_else(|| hashed.files(), Ok) {
        Ok(files) => run_along(&hashed, &files),
        Err(error) => tracing::debug!(task = %hashed.task(), %error, "a blob is not hashed"),
    }));
}

/// Hashes the held prefix on, piece by piece, and decides when the end is reached. Does nothing where another is at it. Blocking.
pub(super) fn run_along(blob: &Arc<Blob>, files: &Arc<Files>) {
    while !blob.context.stopping.load(Ordering::Relaxed) {
        let Some(Turn { generation, mut hasher, piece }) = blob.look(|state| state.take_turn()) else {
            return;
        };
        let Some(piece) = piece else {
            let decided = if hasher.matches(blob.task().digest()) {
                publish::complete(blob, files, generation)
            } else {
                publish::poison(blob, files, generation)
            };
            if decided {
                return;
            }
            continue;
        };
        match blob.remembered(piece) {
            Some(piece) => {
                hasher.update(piece.bytes());
                blob.look(|state| state.end_turn(generation, hasher, true));
            }
            None => {
                let before = hasher.clone();
                let outcome = compare(files, piece, |chunk| hasher.update(chunk));
                let hasher = if outcome.is_ok() { hasher } else { before };
                blob.look(|state| state.end_turn(generation, hasher, outcome.is_ok()));
                if outcome.is_err() {
                    publish::lose(blob, files, piece);
                }
            }
        }
    }
}
