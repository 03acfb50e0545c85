//! The cache: blobs by digest, whole or in part, on disk (D7, D10).
//!
//! In the order of a piece's way: `partial` (files, written in place) under names that `directory` computes, after
//! `verify` has compared the bytes; `journal` remembers them; `memory` keeps for some seconds what most ask for again, while the
//! blob is not whole; `read` streams them out in order; `publish` moves a blob whose whole digest matched, or throws it out;
//! `recover` finds all of it again; `evict` makes room. `blob` is what the rest of the agent holds of one blob, `state` what is
//! known of it in memory.
//!
//! Invariants:
//!
//! - bytes leave through a [`Reader`] or [`Blob::piece`] only after `verify` compared them, and no byte of a blob that is
//!   known to be poisoned does;
//! - a record is in the journal only after its piece was handed to the kernel, and a piece is readable only after that;
//! - a blob is under `blobs/` only if its whole digest matched;
//! - a blob that anybody holds an `Arc` of is not evicted.
//!
//! Not here: signatures (checked before a piece comes here), the network, and whether a client may have the blob (D8).

mod blob;
mod directory;
mod error;
mod evict;
mod journal;
mod memory;
mod partial;
mod publish;
mod read;
mod recover;
mod state;
#[cfg(test)]
mod tests;
pub(crate) mod verify;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use darter_tracker::{Bitmap, Geometry, TaskId};
use tokio::sync::broadcast;
use tokio_util::task::TaskTracker;

pub use self::blob::Blob;
pub use self::error::StoreError;
pub use self::read::Reader;
pub use self::state::{Outcome, Progress};
pub use self::verify::Hashed;

use self::directory::{Directory, Place};
use self::evict::{Candidate, Limits};
use self::memory::Memory;
use self::partial::Files;
use self::state::{State, lock};
use crate::admin::metrics::Metrics;

/// Removed tasks that a slow listener may lag behind: more than a sweep takes out of an ordinary cache. Whoever lags
/// further is told so, and announces anew what [`Store::tasks`] says.
const REMOVED_BACKLOG: usize = 1024;

/// What an agent keeps in memory of what has just come: an eighth of what it may take in all. Of 16 agents that pull eight layers
/// of 16 MiB at 100 Mb/s, 56 % of what was read from files comes from here; with twice as much it is 78 %, and no less CPU time.
pub const MEMORY_BYTES: u64 = 16 * 1024 * 1024;

/// How long the syncing of whole blobs may be put off while others are being fetched: as long as the kernel lets written bytes wait
/// before it writes them to the disk by itself.
pub const PUT_OFF: Duration = Duration::from_secs(30);

/// How the cache is to be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The directory; made if it is missing, refused if it is not ours alone.
    pub dir: PathBuf,
    /// Bytes that all blobs together may take, partial ones counted whole. 0 means that nothing is cached.
    pub max_bytes: u64,
    /// Bytes that stay free on the file system.
    pub min_free_bytes: u64,
    /// How long a blob is kept that nobody uses.
    pub idle: Duration,
    /// Give nothing to readers before the whole blob has matched its digest.
    pub verify_before_stream: bool,
    /// Bytes of pieces that are kept in memory after they came.
    pub memory_bytes: u64,
    /// How long the syncing of whole blobs may be put off while others are being fetched.
    pub put_off: Duration,
}

/// The cache of one agent.
pub struct Store {
    limits: Limits,
    context: Arc<Context>,
    index: Mutex<BTreeMap<TaskId, Arc<Blob>>>,
    removed: broadcast::Sender<TaskId>,
    this: Weak<Store>,
}

/// What the store shares with its blobs.
struct Context {
    directory: Directory,
    metrics: Arc<Metrics>,
    verify_before_stream: bool,
    /// What has just come.
    memory: Memory,
    /// How long the syncing of whole blobs may be put off.
    put_off: Duration,
    /// Whose turn it is to be synced.
    publishing: tokio::sync::Mutex<()>,
    /// Everything that runs on blocking threads, or waits to.
    jobs: TaskTracker,
    /// Long jobs end after the piece that they are at.
    stopping: AtomicBool,
    /// Since when the store is being closed.
    closing: OnceLock<Instant>,
    /// Taken by whoever makes, moves or removes files, and before the index where both are needed.
    disk: Mutex<()>,
}

impl Store {
    /// Opens the cache and finds what is in it. Blocking: it reads what partial blobs there are, for 2 s at most, and
    /// the names of all others.
    ///
    /// # Errors
    /// If the directory cannot be made or read, is used by another process, or is open to other users.
    pub fn open(settings: Settings, metrics: Arc<Metrics>) -> Result<Arc<Self>, StoreError> {
        let context = Arc::new(Context {
            directory: Directory::open(&settings.dir)?,
            metrics,
            verify_before_stream: settings.verify_before_stream,
            memory: Memory::new(settings.memory_bytes),
            put_off: settings.put_off,
            publishing: tokio::sync::Mutex::default(),
            jobs: TaskTracker::new(),
            stopping: AtomicBool::new(false),
            closing: OnceLock::new(),
            disk: Mutex::new(()),
        });
        let Settings { max_bytes, min_free_bytes, idle, .. } = settings;
        let store = Arc::new_cyclic(|this| Self {
            limits: Limits { max_bytes, min_free_bytes, idle },
            context,
            index: Mutex::new(BTreeMap::new()),
            removed: broadcast::Sender::new(REMOVED_BACKLOG),
            this: this.clone(),
        });
        let found = recover::recover(&store.this, &store.context)?;
        tracing::info!(blobs = found.len(), dir = %settings.dir.display(), "the cache is open");
        *lock(&store.index) = found;
        Ok(store)
    }

    /// The blob of a task, whole or in part, which counts as a use of it.
    #[must_use]
    pub fn find(&self, task: &TaskId) -> Option<Arc<Blob>> {
        let blob = lock(&self.index).get(task).map(Arc::clone)?;
        self.used(&blob);
        Some(blob)
    }

    /// The blob of a task, to be written: what is held of it already, or an empty partial that has taken its room on the
    /// disk, for which others may have been evicted. A complete blob of that length is given back however it is cut.
    ///
    /// Some system calls, which block for as long as unlinking and allocating take.
    ///
    /// # Errors
    /// [`StoreError::Full`] if there is no room, and then nothing was evicted; [`StoreError::Unwritable`] if the disk
    /// fails; [`StoreError::Geometry`] if it is held with another cut and in use; [`StoreError::Poisoned`] if it has to
    /// be discarded first.
    pub fn create(&self, task: &TaskId, geometry: Geometry) -> Result<Arc<Blob>, StoreError> {
        let _disk = lock(&self.context.disk);
        if let Some(blob) = self.resume(task, geometry)? {
            self.used(&blob);
            return Ok(blob);
        }
        self.make_room(geometry.length())?;
        drop(Files::create(&self.context.directory, *task, geometry)?);
        let held = Bitmap::new(geometry.pieces());
        let blob = Blob::new(&self.this, &self.context, *task, geometry, held, Place::Partial, Duration::ZERO);
        let blob = Arc::new(blob);
        lock(&self.index).insert(*task, Arc::clone(&blob));
        Ok(blob)
    }

    /// Forgets a blob and removes its files, whoever uses it: readers get [`StoreError::Gone`], or
    /// [`StoreError::Poisoned`] if that is what it was. [`Self::removed`] does not tell of it, since the caller knows.
    pub fn discard(&self, task: &TaskId) {
        let _disk = lock(&self.context.disk);
        let blob = lock(&self.index).remove(task);
        if let Some(blob) = blob {
            self.erase(&blob);
        }
    }

    /// What may be given to others: every blob with its cut and the pieces that are there.
    #[must_use]
    pub fn tasks(&self) -> Vec<(TaskId, Geometry, Bitmap)> {
        let index = lock(&self.index);
        let tasks = index.values().map(|blob| (*blob.task(), *blob.geometry(), blob.held()));
        tasks.filter(|(_, _, held)| !held.is_empty()).collect()
    }

    /// The tasks that are evicted, or whose files were removed from outside, from now on.
    #[must_use]
    pub fn removed(&self) -> broadcast::Receiver<TaskId> {
        self.removed.subscribe()
    }

    /// Evicts what nobody has used for too long and what is over the limits. To be called every few seconds.
    pub async fn sweep(self: &Arc<Self>) {
        let store = Arc::clone(self);
        // It fails only when the runtime is shutting down.
        drop(self.context.jobs.spawn_blocking(move || store.sweep_at(Instant::now())).await);
    }

    /// [`Self::sweep`] as if it were `now`. Blocking.
    pub fn sweep_at(&self, now: Instant) {
        self.context.memory.sweep(now);
        let _disk = lock(&self.context.disk);
        self.note_uses();
        // A file system that does not say what is free is not a full one.
        let free_bytes = self.context.directory.free_bytes().unwrap_or(u64::MAX);
        self.evict(|candidates| evict::overdue(candidates, &self.limits, free_bytes), now);
    }

    /// Ends what runs in the background and waits for it; of whole blobs whose syncing was put off, no more are begun with after some
    /// seconds. Blobs that are still used can be used on, but their whole digest does not get any further.
    pub async fn close(&self) {
        self.context.closing.get_or_init(Instant::now);
        self.context.stopping.store(true, Ordering::Relaxed);
        self.context.jobs.close();
        self.context.jobs.wait().await;
    }

    /// The blob that is there already, if it can be gone on with; one that cannot and that nobody uses is removed.
    fn resume(&self, task: &TaskId, geometry: Geometry) -> Result<Option<Arc<Blob>>, StoreError> {
        let mut index = lock(&self.index);
        let Some(blob) = index.get(task) else { return Ok(None) };
        let held = *blob.geometry();
        let outcome = blob.look(|state| state.outcome());
        if outcome == Outcome::Poisoned {
            return Err(StoreError::Poisoned);
        }
        if held == geometry || (outcome == Outcome::Complete && held.length() == geometry.length()) {
            return Ok(Some(Arc::clone(blob)));
        }
        if outcome == Outcome::Complete || in_use(blob) {
            return Err(StoreError::Geometry { held });
        }
        if let Some(blob) = index.remove(task) {
            drop(index);
            self.erase(&blob);
        }
        Ok(None)
    }

    /// Evicts until a blob of `wanted` bytes fits. The disk is locked.
    fn make_room(&self, wanted: u64) -> Result<(), StoreError> {
        let full = StoreError::Full { bytes: wanted };
        let free_bytes = self.context.directory.free_bytes().unwrap_or(u64::MAX);
        let mut fits = true;
        self.evict(
            |candidates| {
                let gone = evict::room_for(wanted, candidates, &self.limits, free_bytes);
                fits = gone.is_some();
                gone.unwrap_or_default()
            },
            Instant::now(),
        );
        if fits { Ok(()) } else { Err(full) }
    }

    /// Evicts those that `choose` names. The disk is locked.
    fn evict(&self, choose: impl FnOnce(Vec<Candidate>) -> Vec<TaskId>, now: Instant) {
        let gone: Vec<Arc<Blob>> = {
            // Under this lock nobody can get hold of a blob that nobody holds.
            let mut index = lock(&self.index);
            let candidates = index.values().map(|blob| Candidate {
                task: *blob.task(),
                bytes: blob.allocated_bytes(),
                idle: blob.idle(now),
                in_use: in_use(blob),
                void: blob.look(|state| state.outcome()) == Outcome::Poisoned,
            });
            let chosen = choose(candidates.collect());
            chosen.iter().filter_map(|task| index.remove(task)).collect()
        };
        for blob in gone {
            self.erase(&blob);
            self.context.metrics.evictions.inc();
            // Without a listener there is nobody to tell.
            let _ = self.removed.send(*blob.task());
            tracing::debug!(task = %blob.task(), "evicted");
        }
    }

    /// Removes the files of a blob that is out of the index. The disk is locked.
    fn erase(&self, blob: &Blob) {
        let place = blob.look(|state| state.place);
        blob.change(State::leave);
        blob.context.memory.forget_all(blob.id);
        if let Err(error) = self.context.directory.remove(place, blob.task().digest()) {
            tracing::warn!(task = %blob.task(), %error, "a file of the cache could not be removed");
        }
    }

    /// Tells the disk which blobs were used, so that a restart knows their order roughly. The disk is locked.
    fn note_uses(&self) {
        let used: Vec<_> = {
            let index = lock(&self.index);
            let used = index.values().filter(|blob| blob.look(State::take_used));
            used.map(|blob| (*blob.task(), blob.look(|state| state.place))).collect()
        };
        for (task, place) in used {
            let noted = self
                .context
                .directory
                .open_pair(place, task.digest())
                .and_then(|(_, journal)| journal.set_modified(SystemTime::now()));
            if let Err(error) = noted {
                tracing::debug!(%task, %error, "the use of a blob could not be noted");
            }
        }
    }

    fn used(&self, blob: &Arc<Blob>) {
        blob.look(State::touch);
        // A partial that was found after a restart may be whole, or have a prefix that is not hashed yet.
        verify::kick(blob, None);
    }

    /// Whether blobs are being written.
    fn is_fetching(&self) -> bool {
        let index = lock(&self.index);
        index.values().any(|blob| in_use(blob) && blob.look(|state| state.outcome()) == Outcome::Incomplete)
    }

    /// Whether `blob` is the one that is known under its name.
    fn knows(&self, blob: &Blob) -> bool {
        lock(&self.index).get(blob.task()).is_some_and(|known| std::ptr::eq(Arc::as_ptr(known), blob))
    }

    /// Takes out a blob whose files somebody removed. Blocking; the disk is not locked.
    fn forget(&self, blob: &Blob) {
        let _disk = lock(&self.context.disk);
        if self.knows(blob) {
            lock(&self.index).remove(blob.task());
            self.erase(blob);
            let _ = self.removed.send(*blob.task());
        } else {
            blob.change(State::leave);
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.context.stopping.store(true, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// Whether anybody but the index holds the blob. The index must be locked.
fn in_use(blob: &Arc<Blob>) -> bool {
    Arc::strong_count(blob) > 1
}
