//! One pull per digest per node: finds the one in progress or begins it, and lets any number of clients read from it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_swarm::task::ReaderId;
use darter_swarm::upload::Unshared;
use darter_swarm::wire::Offer;
use darter_tracker::{Geometry, NodeId, PieceIndex, PieceProof, PieceSizeRule, TaskId};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::arriving::Arriving;
use super::fetching::Fetching;
use super::place::Places;
use super::possession::{self, Possession};
use super::prefetch::{AskedSeat, Prefetch};
use super::task::{Driver, Event};
use super::{BlobRequest, PullError};
use crate::admin::metrics::{FallbackReason, Metrics};
use crate::gossip::Gossip;
use crate::gossip::tracker::GossipTracker;
use crate::net::{Receiver, Sender, Transport};
use crate::source::registry::Upstream;
use crate::source::tally::Tally;
use crate::store::{Blob, Outcome, Reader, Store, StoreError};

/// Events that wait for a pull's loop; whoever sends more waits. A piece is an event, and the loop takes microseconds.
const EVENTS_MAX: usize = 256;

/// Pulls at a time on one node; a client beyond that is passed on to the registry. Each costs some 100 KiB.
pub(super) const FLIGHTS_MAX: usize = 512;

/// How often a client is let into a pull that ends at the same moment.
const JOIN_ATTEMPTS: usize = 3;

/// Blobs that failed their digest and are fetched from the registry alone for now.
const DISTRUSTED_MAX: usize = 1024;

/// What every pull of this node works with.
pub struct Context {
    /// Where bytes are checked and kept.
    pub store: Arc<Store>,
    /// Registries.
    pub upstream: Arc<Upstream>,
    /// The homes.
    pub tracker: Arc<GossipTracker>,
    /// Peers; `None` without a secret.
    pub transport: Option<Transport>,
    /// Membership and events; `None` without a secret.
    pub gossip: Option<Arc<Gossip>>,
    /// The cluster's keys.
    pub keys: Arc<ClusterKeys>,
    /// This node's key, which vouches for what it fetches.
    pub node: Arc<NodeKey>,
    /// How blobs are cut where nobody has cut them yet.
    pub piece_size: PieceSizeRule,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What came from where.
    pub tally: Arc<Tally>,
}

/// The pulls of this node.
pub struct Flights {
    pub(super) context: Context,
    /// For pieces on their way from peers.
    pub(super) places: Arc<Places>,
    pub(super) fetching: Fetching,
    flights: Mutex<BTreeMap<TaskId, Arc<Flight>>>,
    beginning: tokio::sync::Mutex<()>,
    /// Blobs whose bytes did not match, with the proofs of those who vouched for them.
    distrusted: Mutex<BTreeMap<TaskId, Vec<(PieceIndex, PieceProof)>>>,
    /// Which registries that nobody named have shown which blobs.
    possession: Possession,
    pub(super) loops: TaskTracker,
    pub(super) stopping: CancellationToken,
    next_reader: AtomicU64,
    /// What is started before it is asked for.
    pub(super) prefetch: Prefetch,
}

/// One pull, as its clients and peers see it.
pub(super) struct Flight {
    pub(super) blob: Arc<Blob>,
    pub(super) readers: Mutex<BTreeMap<ReaderId, PieceIndex>>,
    pub(super) readers_changed: Notify,
    /// What comes from the registry at this moment.
    pub(super) arriving: Arriving,
    /// Whether a client was given some of that: no other answer can be given to it any more.
    pub(super) given: AtomicBool,
    /// For how many clients it is fetched ahead of their asking.
    pub(super) ahead: AtomicUsize,
    /// What this node alone has of it.
    pub(super) unshared: Mutex<Unshared>,
    pub(super) events: mpsc::Sender<Event>,
    failed: watch::Receiver<Option<PullError>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds these locks can panic half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flight {
    pub(super) fn reading(&self) -> BTreeMap<ReaderId, PieceIndex> {
        lock(&self.readers).clone()
    }

    /// Waits for the end of the pull: why it failed, or nothing if it did not.
    pub(super) async fn end(&self) -> Option<PullError> {
        verdict(self.failed.clone()).await
    }
}

impl Flights {
    /// No pulls yet.
    #[must_use]
    pub fn new(context: Context) -> Arc<Self> {
        Arc::new(Self {
            context,
            places: Arc::default(),
            fetching: Fetching::default(),
            flights: Mutex::default(),
            beginning: tokio::sync::Mutex::default(),
            distrusted: Mutex::default(),
            possession: Possession::default(),
            loops: TaskTracker::new(),
            stopping: CancellationToken::new(),
            next_reader: AtomicU64::new(1),
            prefetch: Prefetch::default(),
        })
    }

    /// Opens a blob for reading, and pulls it if it is not here. Failures before the first bytes come from the stream.
    ///
    /// # Errors
    /// See [`PullError`]; nothing was given to the client yet, so its request may be passed on to the registry.
    pub async fn open(self: &Arc<Self>, request: BlobRequest) -> Result<BlobStream, PullError> {
        if request.length == 0 || request.range.is_empty() {
            return Err(PullError::Unsuited { reason: "it has no bytes".to_owned() });
        }
        let asked = self.note_asked(&request);
        let upstream = &self.context.upstream;
        let believed = request.named || self.possession.is_known(upstream, &request.origin, request.task);
        if let Some(blob) = self.context.store.find(&request.task)
            && blob.held().is_full()
            && blob.state().borrow().outcome == Outcome::Complete
        {
            if blob.geometry().length() != request.length {
                return Err(PullError::Unsuited { reason: "its length is another than was said".to_owned() });
            }
            if !believed {
                self.possession.check(upstream, &request.origin, &blob).await?;
            }
            let reader = blob.reader(request.range);
            return Ok(Reading { reader, seat: None, as_it_comes: false, asked }.stream());
        }
        for _ in 0..JOIN_ATTEMPTS {
            let flight = self.join(&request, FLIGHTS_MAX).await?;
            let id = ReaderId(self.next_reader.fetch_add(1, Ordering::Relaxed));
            if flight.events.send(Event::Client(Box::new(request.origin.clone()), request.named)).await.is_ok() {
                let reader = flight.blob.reader(request.range.clone());
                // Of what is given only after its registry has shown some of it, whole pieces are given.
                let reading = Reading { reader, seat: Some(Seat::take(flight, id)), as_it_comes: believed, asked };
                let bytes = reading.stream();
                if believed {
                    return Ok(bytes);
                }
                let (at, length) = (request.range.start, request.length);
                return Ok(possession::gated(upstream.clone(), request.origin, at, length, bytes));
            }
            self.forget(&request.task, &flight);
        }
        Err(PullError::Unavailable { reason: "the pull ended again and again".to_owned() })
    }

    /// The pull of a blob, begun if there is none, unless there are `flights_max` already.
    pub(super) async fn join(
        self: &Arc<Self>,
        request: &BlobRequest,
        flights_max: usize,
    ) -> Result<Arc<Flight>, PullError> {
        if self.stopping.is_cancelled() {
            return Err(PullError::Stopping);
        }
        // One blob is begun at a time, so that no two are begun for one task while room is made on the disk.
        let _beginning = self.beginning.lock().await;
        if let Some(flight) = lock(&self.flights).get(&request.task) {
            if flight.blob.geometry().length() != request.length {
                return Err(PullError::Unsuited { reason: "its length is another than was said".to_owned() });
            }
            return Ok(flight.clone());
        }
        if lock(&self.flights).len() >= flights_max {
            return Err(PullError::Unsuited { reason: "too many pulls at a time".to_owned() });
        }
        let geometry = self.geometry(&request.task, request.length)?;
        let blob = self.create(request.task, geometry).await?;
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let (failed, failure) = watch::channel(None);
        let flight = Arc::new(Flight {
            blob,
            readers: Mutex::default(),
            readers_changed: Notify::new(),
            arriving: Arriving::default(),
            given: AtomicBool::new(false),
            ahead: AtomicUsize::new(0),
            unshared: Mutex::default(),
            events,
            failed: failure,
        });
        let alone = lock(&self.distrusted).contains_key(&request.task);
        let driver =
            Driver::new(self.clone(), flight.clone(), (request.origin.clone(), request.named), receiver, failed, alone);
        let stopping = self.stopping.clone();
        let (flights_again, task, ended) = (self.clone(), request.task, flight.clone());
        lock(&self.flights).insert(request.task, flight.clone());
        self.loops.spawn(async move {
            driver.run(stopping).await;
            flights_again.forget(&task, &ended);
        });
        Ok(flight)
    }

    /// Room for a blob. What was fetched ahead and not read yet makes room for what is asked for.
    async fn create(&self, task: TaskId, geometry: Geometry) -> Result<Arc<Blob>, PullError> {
        let create = async || {
            let store = self.context.store.clone();
            let created = tokio::task::spawn_blocking(move || store.create(&task, geometry)).await;
            created.map_err(|_| PullError::Stopping)
        };
        match create().await? {
            Err(StoreError::Full { .. }) if self.prefetch.let_go() => Ok(create().await??),
            created => Ok(created?),
        }
    }

    /// How the blob is cut: as the cluster does already, as a former run of this node did, or by the rule.
    fn geometry(&self, task: &TaskId, length: u64) -> Result<Geometry, PullError> {
        let known = self.context.gossip.as_ref().and_then(|gossip| gossip.geometry(task));
        let stored = self.context.store.find(task).map(|blob| *blob.geometry());
        if let Some(geometry) = stored.or(known).filter(|geometry| geometry.length() == length) {
            return Ok(geometry);
        }
        Geometry::new(length, self.context.piece_size.piece_size(length))
            .map_err(|error| PullError::Unsuited { reason: error.to_string() })
    }

    /// Hands a session that a peer began to the pull of its task; gives it back if there is none.
    pub(crate) async fn session(
        &self,
        peer: NodeId,
        offer: Offer,
        sender: Sender,
        receiver: Receiver,
    ) -> Result<(), (Sender, Receiver)> {
        let Some(flight) = lock(&self.flights).get(&offer.task).cloned() else { return Err((sender, receiver)) };
        let event = Event::Session(Box::new((peer, offer, sender, receiver)));
        match flight.events.send(event).await {
            Ok(()) => Ok(()),
            Err(mpsc::error::SendError(Event::Session(session))) => {
                let (_, _, sender, receiver) = *session;
                Err((sender, receiver))
            }
            Err(_) => Ok(()),
        }
    }

    /// Notes that a piece was uploaded, for the brake of its fetcher.
    pub(crate) fn uploaded(&self, task: &TaskId, piece: PieceIndex) {
        if let Some(flight) = lock(&self.flights).get(task) {
            // Where the queue is full the brake opens by itself a quarter of a second later.
            let _ = flight.events.try_send(Event::Uploaded(piece));
        }
    }

    /// The piece to name on the next turn that is offered: one that nobody else has, while this is being pulled.
    pub(crate) fn rather(&self, task: &TaskId) -> Option<PieceIndex> {
        let flight = lock(&self.flights).get(task).cloned()?;
        lock(&flight.unshared).name()
    }

    /// What comes from peers, in bytes per second, as far as that is known.
    pub(crate) fn rate(&self) -> Option<u64> {
        self.places.rate()
    }

    /// The tasks that are being pulled.
    #[must_use]
    pub fn active(&self) -> BTreeSet<TaskId> {
        lock(&self.flights).keys().copied().collect()
    }

    /// Ends every pull and waits for their loops. Clients' responses are cut.
    pub async fn stop(&self) {
        self.stopping.cancel();
        self.loops.close();
        self.loops.wait().await;
    }

    fn forget(&self, task: &TaskId, flight: &Arc<Flight>) {
        let mut flights = lock(&self.flights);
        if flights.get(task).is_some_and(|current| Arc::ptr_eq(current, flight)) {
            flights.remove(task);
        }
    }

    /// Throws a blob away that does not match its digest. The next pull of it asks the registry alone.
    pub(super) fn distrust(&self, blob: &Blob) {
        let task = *blob.task();
        tracing::error!(%task, "the bytes do not match the digest: thrown away, the registry alone is asked next");
        self.context.metrics.fallback(FallbackReason::Poisoned);
        let mut distrusted = lock(&self.distrusted);
        if distrusted.len() >= DISTRUSTED_MAX {
            distrusted.pop_first();
        }
        distrusted.entry(task).or_insert_with(|| blob.proofs());
        drop(distrusted);
        self.context.store.discard(&task);
    }

    /// A distrusted blob was fetched again and is right: whoever vouched for other bytes is named.
    pub(super) fn settled(&self, blob: &Blob) -> Vec<(PieceIndex, PieceProof)> {
        let Some(before) = lock(&self.distrusted).remove(blob.task()) else { return Vec::new() };
        let right: BTreeMap<PieceIndex, PieceProof> = blob.proofs().into_iter().collect();
        let wrong = |(piece, proof): &(PieceIndex, PieceProof)| {
            right.get(piece).is_some_and(|right| right.digest != proof.digest)
        };
        before.into_iter().filter(wrong).collect()
    }
}

impl std::fmt::Debug for Flights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flights").field("active", &lock(&self.flights).len()).finish_non_exhaustive()
    }
}

/// A client's place among the readers of a pull, given up when it goes.
struct Seat {
    flight: Arc<Flight>,
    id: ReaderId,
    at: Option<PieceIndex>,
}

impl Seat {
    fn take(flight: Arc<Flight>, id: ReaderId) -> Self {
        Self { flight, id, at: None }
    }

    fn waits_for(&mut self, piece: PieceIndex) {
        if self.at.replace(piece) != Some(piece) {
            lock(&self.flight.readers).insert(self.id, piece);
            self.flight.readers_changed.notify_one();
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.flight.readers).remove(&self.id);
        self.flight.readers_changed.notify_one();
    }
}

/// The bytes that a client asked for, in order, as they become known to be right.
pub type BlobStream = BoxStream<'static, Result<Bytes, PullError>>;

struct Reading {
    reader: Reader,
    seat: Option<Seat>,
    /// Whether bytes from the registry are given before their piece is complete.
    as_it_comes: bool,
    /// The client counts as asking until its response ends.
    asked: Option<AskedSeat>,
}

impl Reading {
    fn stream(self) -> BlobStream {
        stream::unfold(Some(self), |reading| async {
            let mut reading = reading?;
            let piece = reading.reader.position();
            match reading.next().await {
                Ok(Some(bytes)) => {
                    if reading.reader.position() != piece
                        && let Some(asked) = &mut reading.asked
                    {
                        asked.given();
                    }
                    Some((Ok(bytes), Some(reading)))
                }
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    async fn next(&mut self) -> Result<Option<Bytes>, PullError> {
        let Some(seat) = &mut self.seat else { return Ok(self.reader.next().await?) };
        seat.waits_for(self.reader.position());
        let failed = seat.flight.failed.clone();
        let (flight, next, at) = (seat.flight.clone(), self.reader.position(), self.reader.offset());
        let arrives = self.as_it_comes && self.reader.may_run_ahead();
        let ended = tokio::select! {
            // What is stored is given even if the pull has failed meanwhile.
            biased;
            bytes = self.reader.next() => match bytes {
                // The pull that threw the blob away knows why.
                Err(StoreError::Gone) => verdict(failed.clone()).await.or(Some(StoreError::Gone.into())),
                bytes => return Ok(bytes?),
            },
            bytes = flight.arriving.after(next, at - flight.blob.geometry().offset(next)), if arrives => {
                flight.given.store(true, Ordering::Release);
                return Ok(Some(self.reader.run_ahead(bytes)));
            }
            ended = verdict(failed.clone()) => ended,
        };
        match ended {
            Some(error) => Err(error),
            // The loop has ended without a verdict: everything is stored.
            None if self.reader.blob().state().borrow().outcome == Outcome::Complete => Ok(self.reader.next().await?),
            // It has failed in a way that nobody foresaw, and nothing more would ever come.
            None => Err(PullError::Unavailable { reason: "the pull broke off".to_owned() }),
        }
    }
}

/// Waits for the end of a pull: why it failed, or nothing if it did not.
async fn verdict(mut failed: watch::Receiver<Option<PullError>>) -> Option<PullError> {
    failed.wait_for(Option::is_some).await.ok().and_then(|error| error.clone())
}
