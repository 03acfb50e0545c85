//! The piece map on disk: which pieces of a blob are written, and who vouches for each.
//!
//! A header names the cut; after it every piece has a place of its own. A record is written after its piece's bytes, so
//! a record that is there speaks of bytes that were handed to the kernel before it: after `kill -9` both survive, after
//! a power cut either may be missing, and a piece that does not match its record is dropped. Every record carries a
//! checksum bound to the task, so a torn tail, a hole or a journal under another name reads as "not there". Another
//! version of the format reads as no journal at all: the cache is disposable.
//!
//! Not here: files. This module turns values into bytes and back.

use darter_tracker::{Geometry, PieceDigest, PieceIndex, PieceProof, PieceSize, Signer, TaskId};

/// `darter` and what follows it.
const MAGIC: [u8; 8] = *b"darterpj";

/// Raised with every change of the layout.
const VERSION: u32 = 1;

/// Bytes of a checksum: enough to tell a torn record from a whole one; nobody forges files in a directory of ours.
const CHECKSUM_BYTES: usize = 8;

/// Bytes of the header: magic, version, piece size, length, checksum.
pub(super) const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + CHECKSUM_BYTES;

/// Bytes of a record: index, epoch, digest, key, tag, signature, checksum.
pub(super) const RECORD_BYTES: usize = 4 + 8 + 32 + 32 + 16 + 64 + CHECKSUM_BYTES;

/// The first bytes of a journal.
pub(super) fn header(task: &TaskId, geometry: &Geometry) -> [u8; HEADER_BYTES] {
    let mut out = Writer { bytes: [0; HEADER_BYTES], at: 0 };
    out.put(&MAGIC);
    out.put(&VERSION.to_le_bytes());
    out.put(&geometry.piece_size().bytes().to_le_bytes());
    out.put(&geometry.length().to_le_bytes());
    out.seal(task, geometry)
}

/// The cut that a journal was made for; `None` if it is torn, of another version or another task's.
pub(super) fn read_header(task: &TaskId, bytes: &[u8]) -> Option<Geometry> {
    let bytes: &[u8; HEADER_BYTES] = bytes.get(..HEADER_BYTES)?.try_into().ok()?;
    let mut rest = Reader(bytes);
    if rest.take::<8>()? != MAGIC || u32::from_le_bytes(rest.take()?) != VERSION {
        return None;
    }
    let piece_size = PieceSize::new(u32::from_le_bytes(rest.take()?))?;
    let geometry = Geometry::new(u64::from_le_bytes(rest.take()?), piece_size).ok()?;
    sealed(task, &geometry, bytes).then_some(geometry)
}

/// Where the record of `piece` begins.
pub(super) fn slot(piece: PieceIndex) -> u64 {
    HEADER_BYTES as u64 + u64::from(piece.0) * RECORD_BYTES as u64
}

/// The record of a piece.
pub(super) fn record(task: &TaskId, geometry: &Geometry, piece: PieceIndex, proof: &PieceProof) -> [u8; RECORD_BYTES] {
    let mut out = Writer { bytes: [0; RECORD_BYTES], at: 0 };
    out.put(&piece.0.to_le_bytes());
    out.put(&proof.signer.epoch.to_le_bytes());
    out.put(proof.digest.as_bytes());
    out.put(&proof.signer.public_key);
    out.put(&proof.signer.tag);
    out.put(&proof.signature());
    out.seal(task, geometry)
}

/// What a piece's place holds; `None` if that is not a whole record of this piece.
pub(super) fn read_record(task: &TaskId, geometry: &Geometry, piece: PieceIndex, bytes: &[u8]) -> Option<PieceProof> {
    let bytes: &[u8; RECORD_BYTES] = bytes.try_into().ok()?;
    let mut rest = Reader(bytes);
    if u32::from_le_bytes(rest.take()?) != piece.0 || !sealed(task, geometry, bytes) {
        return None;
    }
    let epoch = u64::from_le_bytes(rest.take()?);
    let digest = PieceDigest::from_bytes(rest.take()?);
    let signer = Signer { public_key: rest.take()?, epoch, tag: rest.take()? };
    Some(PieceProof::new(digest, signer, &rest.take()?))
}

/// Every whole record of a journal's bytes, in order.
pub(super) fn read_records(task: &TaskId, geometry: &Geometry, bytes: &[u8]) -> Vec<(PieceIndex, PieceProof)> {
    let slots = bytes.get(HEADER_BYTES..).unwrap_or_default().chunks(RECORD_BYTES);
    (0..geometry.pieces())
        .map(PieceIndex)
        .zip(slots)
        .filter_map(|(piece, slot)| Some((piece, read_record(task, geometry, piece, slot)?)))
        .collect()
}

/// How long a journal can get.
pub(super) fn length_max(geometry: &Geometry) -> u64 {
    slot(PieceIndex(geometry.pieces()))
}

fn checksum(task: &TaskId, geometry: &Geometry, body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(task.digest().algorithm().as_bytes());
    hasher.update(task.digest().as_bytes());
    hasher.update(&geometry.length().to_le_bytes());
    hasher.update(&geometry.piece_size().bytes().to_le_bytes());
    hasher.update(body);
    let mut out = [0; CHECKSUM_BYTES];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
    out
}

fn sealed(task: &TaskId, geometry: &Geometry, bytes: &[u8]) -> bool {
    let (body, seal) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    checksum(task, geometry, body) == seal
}

struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    fn put(&mut self, field: &[u8]) {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
    }

    fn seal(mut self, task: &TaskId, geometry: &Geometry) -> [u8; N] {
        let seal = checksum(task, geometry, &self.bytes[..N - CHECKSUM_BYTES]);
        self.put(&seal);
        self.bytes
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use darter_tracker::Digest;
    use proptest::prelude::*;

    fn proof(seed: u8) -> PieceProof {
        let signer = Signer { public_key: [seed; 32], epoch: u64::from(seed) << 40, tag: [seed ^ 1; 16] };
        PieceProof::new(PieceDigest::of(&[seed]), signer, &[seed ^ 2; 64])
    }

    fn cut(pieces: u32) -> (TaskId, Geometry) {
        let size = PieceSize::new(PieceSize::MIN_BYTES).unwrap();
        let length = u64::from(pieces) * u64::from(size.bytes());
        (TaskId::blob(Digest::Sha256([7; 32])), Geometry::new(length, size).unwrap())
    }

    #[test]
    fn a_header_is_its_own_tasks_and_versions() {
        let (task, geometry) = cut(3);
        let bytes = header(&task, &geometry);
        assert_eq!(read_header(&task, &bytes), Some(geometry));
        assert_eq!(read_header(&TaskId::blob(Digest::Sha256([8; 32])), &bytes), None);
        assert_eq!(read_header(&TaskId::blob(Digest::Sha512([7; 64])), &bytes), None);
        for at in 0..bytes.len() {
            let mut torn = bytes;
            torn[at] ^= 1;
            assert_eq!(read_header(&task, &torn), None, "byte {at}");
            assert_eq!(read_header(&task, &bytes[..at]), None, "length {at}");
        }
    }

    #[test]
    fn holes_are_no_records() {
        let (task, geometry) = cut(2);
        let mut bytes = header(&task, &geometry).to_vec();
        bytes.extend([0; RECORD_BYTES]);
        bytes.extend(record(&task, &geometry, PieceIndex(1), &proof(9)));
        assert_eq!(read_records(&task, &geometry, &bytes), vec![(PieceIndex(1), proof(9))]);
        let moved = record(&task, &geometry, PieceIndex(1), &proof(9));
        assert_eq!(read_record(&task, &geometry, PieceIndex(0), &moved), None);
    }

    proptest! {
        #[test]
        fn what_is_torn_or_flipped_is_lost_alone(
            pieces in 1..20u32, keep in 0.0..1.0f64, flip in any::<prop::sample::Index>(),
        ) {
            let (task, geometry) = cut(pieces);
            let mut bytes = header(&task, &geometry).to_vec();
            for piece in 0..pieces {
                bytes.extend(record(&task, &geometry, PieceIndex(piece), &proof(piece as u8)));
            }
            prop_assert_eq!(bytes.len() as u64, length_max(&geometry));
            let whole: Vec<_> = (0..pieces).map(|p| (PieceIndex(p), proof(p as u8))).collect();
            prop_assert_eq!(read_records(&task, &geometry, &bytes), whole.clone());

            let length = HEADER_BYTES + ((bytes.len() - HEADER_BYTES) as f64 * keep) as usize;
            let survivors = (length - HEADER_BYTES) / RECORD_BYTES;
            prop_assert_eq!(read_records(&task, &geometry, &bytes[..length]), whole[..survivors].to_vec());

            let at = HEADER_BYTES + flip.index(bytes.len() - HEADER_BYTES);
            bytes[at] ^= 0x10;
            let mut rest = whole;
            rest.remove((at - HEADER_BYTES) / RECORD_BYTES);
            prop_assert_eq!(read_records(&task, &geometry, &bytes), rest);
        }
    }
}
