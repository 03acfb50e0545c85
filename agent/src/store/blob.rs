//! One cached blob, whole or in part.

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_tracker::{Bitmap, Geometry, PieceIndex, PieceProof, TaskId};
use tokio::sync::{oneshot, watch};

use super::directory::Place;
use super::error::StoreError;
use super::memory::BlobId;
use super::partial::Files;
use super::state::{Claim, Outcome, Progress, State, lock};
use super::verify::{self, Hashed, VerifiedPiece};
use super::{Context, Store, publish};
use crate::admin::metrics::PieceOrigin;

/// One blob of the cache.
///
/// An `Arc<Blob>` is a hold: as long as anybody but the store has one (a pull, an upload, a [`Reader`](super::Reader)),
/// the blob is not evicted.
pub struct Blob {
    pub(super) id: BlobId,
    task: TaskId,
    geometry: Geometry,
    state: Mutex<State>,
    progress: watch::Sender<Progress>,
    /// The open files, while somebody uses them. Held locked while they are opened or moved.
    pub(super) files: Mutex<Weak<Files>>,
    pub(super) context: Arc<Context>,
    store: Weak<Store>,
}

/// The right to write one piece; given back when dropped.
struct Claimed {
    blob: Arc<Blob>,
    piece: PieceIndex,
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let mut state = lock(&self.blob.state);
        if state.release(self.piece) {
            // Somebody may wait to try in our place.
            self.blob.progress.send_replace(state.changed());
        }
    }
}

impl Blob {
    /// A blob whose files are at `place` and hold the pieces `held`, last used `idle` ago.
    pub(super) fn new(
        store: &Weak<Store>,
        context: &Arc<Context>,
        task: TaskId,
        geometry: Geometry,
        held: Bitmap,
        place: Place,
        idle: Duration,
    ) -> Self {
        let state = State::new(*task.digest(), geometry, held, place, idle);
        Self {
            id: context.memory.name(),
            task,
            geometry,
            progress: watch::Sender::new(state.progress()),
            state: Mutex::new(state),
            files: Mutex::new(Weak::new()),
            context: Arc::clone(context),
            store: store.clone(),
        }
    }

    /// What the blob is the bytes of.
    #[must_use]
    pub fn task(&self) -> &TaskId {
        &self.task
    }

    /// How it is cut.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The pieces that are there. Empty for a poisoned blob and for one that is gone: nothing of it may be given out.
    #[must_use]
    pub fn held(&self) -> Bitmap {
        self.look(|state| match state.outcome() {
            Outcome::Incomplete | Outcome::Complete => state.held().clone(),
            Outcome::Poisoned | Outcome::Gone => Bitmap::new(self.geometry.pieces()),
        })
    }

    /// How far the blob is. The receiver sees the present value at once and every later one at least in its last form.
    pub fn state(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Who vouches for what: for the pieces that are held, or, after [`Outcome::Poisoned`], for those that were; the
    /// latter are given once. Empty if the journal cannot be read.
    ///
    /// Reads the journal, some 170 bytes a piece, while nothing else happens on the thread; it is for the rare occasion
    /// that somebody is to be blamed.
    #[must_use]
    pub fn proofs(&self) -> Vec<(PieceIndex, PieceProof)> {
        if self.look(|state| state.outcome()) == Outcome::Poisoned {
            return self.look(|state| std::mem::take(&mut state.blame));
        }
        let held = self.held();
        let read = self.files().and_then(|files| {
            files.proofs().map_err(|source| StoreError::reading("reading the proofs of a blob", source))
        });
        match read {
            Ok(proofs) => proofs.into_iter().filter(|(piece, _)| held.contains(*piece)).collect(),
            Err(error) => {
                tracing::debug!(task = %self.task, %error, "who vouches for a blob cannot be read");
                Vec::new()
            }
        }
    }

    /// Stores a piece and makes it readable; `false` if it was there. May be called for any pieces at the same time.
    ///
    /// The signature of `proof` must have been checked. If the future is dropped, the piece is stored all the same.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] or [`StoreError::NoSuchPiece`] if the sender is to blame, [`StoreError::Full`] or
    /// [`StoreError::Unwritable`] if the disk is, [`StoreError::Poisoned`] or [`StoreError::Gone`] if the blob takes no
    /// pieces any more. The piece is then not held.
    pub async fn write(
        self: &Arc<Self>,
        piece: PieceIndex,
        proof: &PieceProof,
        bytes: Hashed,
        source: PieceOrigin,
    ) -> Result<bool, StoreError> {
        if !self.geometry.contains(piece) {
            return Err(StoreError::NoSuchPiece { piece });
        }
        let mut progress = self.state();
        let claimed = loop {
            progress.borrow_and_update();
            match self.claim(piece)? {
                Claim::Held => return Ok(false),
                Claim::Granted => break Claimed { blob: Arc::clone(self), piece },
                Claim::Busy => progress.changed().await.map_err(|_| StoreError::Gone)?,
            }
        };
        let (proof, blob) = (*proof, Arc::clone(self));
        let (done, written) = oneshot::channel();
        drop(self.context.jobs.spawn_blocking(move || {
            let (files, result) = match claimed.write(&proof, bytes, source) {
                Ok(files) => (Some(files), Ok(true)),
                Err(error) => (None, Err(error)),
            };
            // Nobody waits for the whole to be hashed on; that nobody waits at all any more makes no difference.
            let _ = done.send(result);
            if let Some(files) = files {
                verify::run_along(&blob, &files);
            }
        }));
        written.await.map_err(|_| StoreError::Stopped)?
    }

    /// A piece and its proof, for an upload. The bytes are compared with the proof once more, unless they are in memory since they
    /// were.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`] if the piece is not there, rotted, or was removed from outside, [`StoreError::Poisoned`]
    /// if nothing may be given out.
    pub async fn piece(self: &Arc<Self>, piece: PieceIndex) -> Result<(PieceProof, Bytes), StoreError> {
        self.look(|state| match state.outcome() {
            Outcome::Poisoned => Err(StoreError::Poisoned),
            Outcome::Incomplete | Outcome::Complete if state.held().contains(piece) => {
                state.touch();
                Ok(())
            }
            _ => Err(StoreError::NotHeld { piece }),
        })?;
        let at_hand = || self.open_files().and_then(|files| verify::stored_at_hand(&files, piece));
        let stored = match self.remembered(piece).or_else(at_hand) {
            Some(stored) => stored,
            None => self.stored(piece).await?,
        };
        // It may have been found to be poisoned while it was read.
        match self.look(|state| state.outcome()) {
            Outcome::Incomplete | Outcome::Complete => Ok(stored.into_parts()),
            Outcome::Poisoned => Err(StoreError::Poisoned),
            Outcome::Gone => Err(StoreError::NotHeld { piece }),
        }
    }

    /// A piece from the disk, on a thread that may block.
    async fn stored(self: &Arc<Self>, piece: PieceIndex) -> Result<VerifiedPiece, StoreError> {
        let blob = Arc::clone(self);
        self.blocking(move || {
            let files = blob.files().map_err(|error| match error {
                StoreError::Gone => StoreError::NotHeld { piece },
                other => other,
            })?;
            verify::stored(&files, piece).map_err(|_| {
                publish::lose(&blob, &files, piece);
                StoreError::NotHeld { piece }
            })
        })
        .await?
    }

    /// A piece that came a moment ago, from memory. Whether it may be given is for the asker to know.
    pub(super) fn remembered(&self, piece: PieceIndex) -> Option<VerifiedPiece> {
        self.context.memory.get(self.id, piece)
    }

    /// The blob's files, if somebody has them open.
    fn open_files(&self) -> Option<Arc<Files>> {
        self.files.try_lock().ok()?.upgrade()
    }

    fn claim(&self, piece: PieceIndex) -> Result<Claim, StoreError> {
        self.look(|state| match state.outcome() {
            Outcome::Poisoned => Err(StoreError::Poisoned),
            Outcome::Gone => Err(StoreError::Gone),
            Outcome::Incomplete | Outcome::Complete => Ok(state.claim(piece)),
        })
    }

    /// Looks at the state, or changes what nobody waits for.
    pub(super) fn look<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut lock(&self.state))
    }

    /// Changes the state and wakes whoever waits.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = lock(&self.state);
        let outcome = change(&mut state);
        self.progress.send_replace(state.changed());
        outcome
    }

    /// The blob's files, opened if nobody has them open. Blocking.
    pub(super) fn files(&self) -> Result<Arc<Files>, StoreError> {
        let opened = {
            let mut files = lock(&self.files);
            if let Some(files) = files.upgrade() {
                return Ok(files);
            }
            let (place, suspect) = self.look(|state| match state.outcome() {
                Outcome::Poisoned => Err(StoreError::Poisoned),
                Outcome::Gone => Err(StoreError::Gone),
                Outcome::Incomplete | Outcome::Complete => Ok((state.place, state.suspect)),
            })?;
            match self.context.directory.open_pair(place, self.task.digest()) {
                Ok(pair) => {
                    let opened = Arc::new(Files::new(self.task, self.geometry, pair));
                    if suspect {
                        opened.distrust();
                    }
                    *files = Arc::downgrade(&opened);
                    return Ok(opened);
                }
                Err(source) => StoreError::reading("opening a blob", source),
            }
        };
        if matches!(opened, StoreError::Gone) {
            tracing::warn!(task = %self.task, "the files of a blob were removed");
            self.vanish();
        }
        Err(opened)
    }

    /// Runs `work` on a blocking thread that the store's tracker knows of.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        self.context.jobs.spawn_blocking(work).await.map_err(|_| StoreError::Stopped)
    }

    /// Whether this is the blob that the store knows under its name.
    pub(super) fn is_current(&self) -> bool {
        self.store.upgrade().is_some_and(|store| store.knows(self))
    }

    /// Whether other blobs are being written.
    pub(super) fn others_come(&self) -> bool {
        self.store.upgrade().is_some_and(|store| store.is_fetching())
    }

    /// Takes the blob out of the store because its files are not what they should be.
    pub(super) fn vanish(&self) {
        match self.store.upgrade() {
            Some(store) => store.forget(self),
            None => self.change(State::leave),
        }
    }

    /// What the blob takes from the cache's room.
    pub(super) fn allocated_bytes(&self) -> u64 {
        match self.look(|state| state.outcome()) {
            Outcome::Incomplete | Outcome::Complete => self.geometry.length(),
            // The files of a poisoned blob are removed at once.
            Outcome::Poisoned | Outcome::Gone => 0,
        }
    }

    /// How long nobody has used the blob.
    pub(super) fn idle(&self, now: Instant) -> Duration {
        self.look(|state| state.idle(now))
    }
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob({}, {:?})", self.task, *self.progress.borrow())
    }
}

impl Claimed {
    /// Writes the piece, and counts it: the last one ends the pull, and with it whoever waits for it.
    fn write(self, proof: &PieceProof, bytes: Hashed, source: PieceOrigin) -> Result<Arc<Files>, StoreError> {
        let (blob, piece) = (&self.blob, self.piece);
        let length = bytes.length();
        let verified = verify::received(&blob.geometry, piece, proof, bytes)?;
        let files = blob.files()?;
        files.write(&verified).map_err(|source| StoreError::writing("writing a piece", length, source))?;
        // Whoever sees that it has come finds it there.
        blob.context.memory.keep(blob.id, verified);
        if !blob.change(|state| state.arrived(piece)) {
            blob.context.memory.forget(blob.id, piece);
            return Err(match blob.look(|state| state.outcome()) {
                Outcome::Poisoned => StoreError::Poisoned,
                _ => StoreError::Gone,
            });
        }
        blob.context.metrics.piece(source);
        Ok(files)
    }
}
