//! What becomes of a blob on disk once something is known about it: published, poisoned, or less than it was.
//!
//! A blob is published by syncing its files and moving both; readers and peers do not wait for that, since the bytes have
//! matched and a crash before the move costs only hashing them once more. It is put off while others are being fetched, whose
//! clients wait for the disk and the cores. Everything else here runs on blocking threads.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use darter_tracker::PieceIndex;

use super::Context;
use super::blob::Blob;
use super::directory::Place;
use super::partial::Files;
use super::state::{Outcome, lock};

/// How often is looked whether others are still being fetched, or the store closes.
const LOOK: Duration = Duration::from_millis(500);

/// When the store closes, whole blobs are synced one after the other for so long, which leaves as much of what systemd and Kubernetes
/// give an agent to stop (20 s) to the last of them and to what comes before. The others are hashed again at the next start.
const CLOSING_MAX: Duration = Duration::from_secs(5);

/// The whole matched: readers get their last piece, then the blob is published.
///
/// Returns `false` if the bytes have changed since they were hashed: then it has to be done again.
pub(super) fn complete(blob: &Arc<Blob>, files: &Files, generation: u64) -> bool {
    if !blob.change(|state| state.decide(generation, Outcome::Complete)) {
        return false;
    }
    blob.context.memory.forget_all(blob.id);
    if blob.context.put_off.is_zero() {
        publish(blob, files);
    } else {
        // The store's tracker owns the job.
        blob.context.jobs.spawn(publish_later(blob.context.clone(), Arc::downgrade(blob)));
    }
    true
}

/// Publishes a blob when no others come, or when that is put off no longer. What is evicted meanwhile has nothing to be published.
async fn publish_later(context: Arc<Context>, blob: Weak<Blob>) {
    let until = Instant::now() + context.put_off;
    while Instant::now() < until && !context.stopping.load(Ordering::Relaxed) {
        tokio::time::sleep(LOOK).await;
        if !blob.upgrade().is_some_and(|blob| blob.others_come()) {
            break;
        }
    }
    // One after the other: the disk has others to serve.
    let _turn = context.publishing.lock().await;
    if context.closing.get().is_some_and(|since| since.elapsed() >= CLOSING_MAX) {
        return;
    }
    let published = context.jobs.spawn_blocking(move || {
        let Some(blob) = blob.upgrade() else { return };
        match blob.files() {
            Ok(files) => publish(&blob, &files),
            Err(error) => not_published(&blob, &error),
        }
    });
    // It fails only when the runtime is shutting down.
    drop(published.await);
}

fn publish(blob: &Arc<Blob>, files: &Files) {
    if let Err(error) = sync_and_move(blob, files) {
        not_published(blob, &error);
    }
}

/// It is served from where it is; after a restart it is hashed and published again.
fn not_published(blob: &Blob, error: &dyn std::fmt::Display) {
    tracing::warn!(task = %blob.task(), %error, "a blob that matched its digest could not be published");
}

fn sync_and_move(blob: &Arc<Blob>, files: &Files) -> std::io::Result<()> {
    files.sync().inspect_err(|_| {
        // The kernel may forget what it could not write, so what was compared in memory says nothing of the disk.
        blob.look(|state| state.suspect = true);
        files.distrust();
    })?;
    let moved = {
        let _disk = lock(&blob.context.disk);
        let opening = lock(&blob.files);
        let due = blob.look(|state| state.outcome() == Outcome::Complete && state.place == Place::Partial);
        if !due || !blob.is_current() {
            return Ok(());
        }
        let directory = &blob.context.directory;
        let digest = blob.task().digest();
        let moved = directory.relocate(Place::Partial, Place::Blobs, digest).inspect_err(|_| {
            // One of the two may have moved. If it cannot go back either, the next opening finds the blob gone.
            drop(directory.relocate(Place::Blobs, Place::Partial, digest));
        })?;
        blob.look(|state| state.place = Place::Blobs);
        drop(opening);
        moved
    };
    moved.sync()
}

/// The whole differs although every piece matched its proof: who signed what is kept for blame, the files go.
///
/// Returns `false` if the bytes have changed since they were hashed: then it has to be done again.
pub(super) fn poison(blob: &Arc<Blob>, files: &Files, generation: u64) -> bool {
    let proofs = files.proofs().unwrap_or_else(|error| {
        tracing::warn!(task = %blob.task(), %error, "who signed a poisoned blob cannot be read");
        Vec::new()
    });
    // Whoever sees the outcome may create the blob anew under the same names, but not before these are free.
    let _disk = lock(&blob.context.disk);
    let decided = blob.change(|state| {
        let decided = state.decide(generation, Outcome::Poisoned);
        if decided {
            state.blame = proofs;
        }
        decided
    });
    if !decided {
        return false;
    }
    blob.context.memory.forget_all(blob.id);
    blob.context.metrics.poisoned.inc();
    tracing::warn!(task = %blob.task(), "a blob does not match its digest");
    if blob.is_current()
        && let Err(error) = blob.context.directory.remove(Place::Partial, blob.task().digest())
    {
        tracing::warn!(task = %blob.task(), %error, "a file of the cache was left behind");
    }
    true
}

/// A held piece is not on disk as it was: it is dropped, everything else stays. A published blob becomes a partial again,
/// since what will take the piece's place has not been hashed with the rest.
pub(super) fn lose(blob: &Arc<Blob>, files: &Files, piece: PieceIndex) {
    if !blob.change(|state| state.lose(piece)) {
        return;
    }
    blob.context.memory.forget(blob.id, piece);
    tracing::warn!(task = %blob.task(), piece = piece.0, "a piece of the cache has rotted and is dropped");
    if let Err(error) = files.forget(piece) {
        // Its record still names other bytes, so the piece will be found rotten again.
        tracing::warn!(task = %blob.task(), %error, "the journal of a blob cannot be written");
    }
    if let Err(error) = demote(blob) {
        tracing::warn!(task = %blob.task(), %error, "a rotten blob could not be taken back and is dropped");
        blob.vanish();
    }
    // Only now may the piece be written: a crash must not find it among published bytes.
    blob.change(|state| state.release(piece));
}

fn demote(blob: &Arc<Blob>) -> std::io::Result<()> {
    let moved = {
        let _disk = lock(&blob.context.disk);
        let _opening = lock(&blob.files);
        if blob.look(|state| state.place) == Place::Partial || !blob.is_current() {
            return Ok(());
        }
        let moved = blob.context.directory.relocate(Place::Blobs, Place::Partial, blob.task().digest())?;
        blob.look(|state| state.place = Place::Partial);
        moved
    };
    moved.sync()
}
