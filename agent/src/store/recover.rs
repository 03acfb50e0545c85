//! What a restart finds on disk.
//!
//! Published blobs are believed by name and size; their pieces are compared when they are used. Pieces of partials are
//! compared here, for as long as [`CHECKING_MAX`] lasts, and when they are used if that was not enough: after `kill -9`
//! all of them are right, after a power cut those that are not are dropped.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use darter_tracker::{Bitmap, Digest, TaskId};

use super::blob::Blob;
use super::directory::{Directory, Found, Pair, Place};
use super::error::StoreError;
use super::partial::{self, Files};
use super::{Context, Store, verify};
use crate::admin::metrics::PieceOrigin;

/// For how long pieces are compared before the agent starts: at 2 GiB/s from the page cache several GiB, and never
/// longer than a restart may take.
const CHECKING_MAX: Duration = Duration::from_secs(2);

/// What is made of one digest's files.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Published,
    Partial,
    /// A crash came between the two renames of a move; both files are whole and were synced before it.
    HalfMoved,
    Rubbish,
}

fn judge(found: &Found) -> Verdict {
    const BOTH: Pair = Pair { bytes: true, journal: true };
    let other = |pair: Pair| Pair { bytes: !pair.bytes, journal: !pair.journal };
    match found {
        Found { blobs: BOTH, .. } => Verdict::Published,
        Found { partial: BOTH, .. } => Verdict::Partial,
        Found { partial, blobs } if *partial == other(*blobs) => Verdict::HalfMoved,
        Found { .. } => Verdict::Rubbish,
    }
}

/// A blob that was found, and when it was last used.
struct Kept {
    files: Files,
    held: Bitmap,
    place: Place,
    used: SystemTime,
}

/// Reads the directory. Blocking.
pub(super) fn recover(store: &Weak<Store>, context: &Arc<Context>) -> Result<BTreeMap<TaskId, Arc<Blob>>, StoreError> {
    let deadline = Instant::now() + CHECKING_MAX;
    let directory = &context.directory;
    let mut kept = Vec::new();
    for (digest, found) in directory.scan()? {
        match inspect(directory, digest, &found, deadline) {
            Ok(Some(blob)) => kept.push(blob),
            Ok(None) => {}
            // One blob that cannot be read is no reason to go without the others.
            Err(error) => tracing::warn!(%digest, %error, "a blob of the cache is left out"),
        }
    }
    // Time counts from the last use of anything, so that neither a night's rest nor a jump of the clock ages the cache.
    let newest = kept.iter().map(|blob| blob.used).max().unwrap_or(SystemTime::UNIX_EPOCH);
    let mut index = BTreeMap::new();
    for Kept { files, held, place, used } in kept {
        if place == Place::Partial {
            for _ in held.iter() {
                context.metrics.piece(PieceOrigin::Disk);
            }
        }
        let idle = newest.duration_since(used).unwrap_or_default();
        let blob = Blob::new(store, context, files.task, files.geometry, held, place, idle);
        index.insert(files.task, Arc::new(blob));
    }
    Ok(index)
}

fn inspect(directory: &Directory, digest: Digest, found: &Found, deadline: Instant) -> io::Result<Option<Kept>> {
    let verdict = judge(found);
    if verdict == Verdict::HalfMoved {
        directory.relocate(Place::Partial, Place::Blobs, &digest)?.sync()?;
    }
    let (place, other) = match verdict {
        Verdict::Published | Verdict::HalfMoved => (Place::Blobs, Place::Partial),
        Verdict::Partial => (Place::Partial, Place::Blobs),
        Verdict::Rubbish => {
            directory.remove(Place::Partial, &digest)?;
            directory.remove(Place::Blobs, &digest)?;
            return Ok(None);
        }
    };
    directory.remove(other, &digest)?;
    let kept = match place {
        Place::Blobs => published(directory, digest)?,
        Place::Partial => partial(directory, digest, deadline)?,
    };
    if kept.is_none() {
        directory.remove(place, &digest)?;
    }
    Ok(kept)
}

fn open(directory: &Directory, place: Place, digest: Digest) -> io::Result<Option<Files>> {
    let task = TaskId::blob(digest);
    let pair = directory.open_pair(place, &digest)?;
    Ok(partial::geometry_of(&task, &pair.1)?.map(|geometry| Files::new(task, geometry, pair)))
}

fn published(directory: &Directory, digest: Digest) -> io::Result<Option<Kept>> {
    let Some(files) = open(directory, Place::Blobs, digest)? else { return Ok(None) };
    if files.length()? != files.geometry.length() {
        return Ok(None);
    }
    let (held, used) = (Bitmap::full(files.geometry.pieces()), files.used()?);
    Ok(Some(Kept { files, held, place: Place::Blobs, used }))
}

fn partial(directory: &Directory, digest: Digest, deadline: Instant) -> io::Result<Option<Kept>> {
    let Some(files) = open(directory, Place::Partial, digest)? else { return Ok(None) };
    let used = files.used()?;
    if let Err(error) = files.allocate() {
        tracing::warn!(%digest, %error, "the rest of a partial blob has no room on the disk");
    }
    let mut held = Bitmap::new(files.geometry.pieces());
    let mut dropped = 0_u32;
    for (piece, _) in files.proofs()? {
        if Instant::now() >= deadline || verify::compare(&files, piece, |_| {}).is_ok() {
            held.insert(piece);
        } else {
            dropped += 1;
            files.forget(piece)?;
        }
    }
    if dropped > 0 {
        tracing::warn!(%digest, pieces = dropped, "pieces did not survive on the disk");
    }
    if held.is_empty() {
        return Ok(None);
    }
    Ok(Some(Kept { files, held, place: Place::Partial, used }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_files_is_judged() {
        let pair = |bits: u8| Pair { bytes: bits & 1 != 0, journal: bits & 2 != 0 };
        for partial in 0..4 {
            for blobs in 0..4 {
                let expected = match (partial, blobs) {
                    (_, 3) => Verdict::Published,
                    (3, _) => Verdict::Partial,
                    (1, 2) | (2, 1) => Verdict::HalfMoved,
                    _ => Verdict::Rubbish,
                };
                assert_eq!(judge(&Found { partial: pair(partial), blobs: pair(blobs) }), expected, "{partial} {blobs}");
            }
        }
    }
}
