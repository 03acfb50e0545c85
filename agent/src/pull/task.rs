//! The loop of one pull: it owns the core, feeds it events, starts what it asks for, and sleeps until something is due.
//!
//! `exchange` is what it has to do with peers; `homes` is which members it deals with, and whether they answer; `farewell` is
//! what the loop says of itself: to the cluster while it runs, to clients and the home when it ends.

mod exchange;
mod farewell;
mod homes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use darter_swarm::task::{Action, Fallback, OriginFailure, ReaderId, RunId, Task};
use darter_swarm::wire::{Offer, SessionFrame};
use darter_tracker::{
    Added, ErrorKind, LeaseId, NodeId, PieceIndex, PieceRange, PullPieceResponse, RegisterResponse,
    ReportPieceResponse, Tracker as _, TrackerError,
};
use http::StatusCode;
use rand::RngExt as _;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::PullError;
use super::execute;
use super::fetching::Share;
use super::flight::{Context, Flight, Flights, lock};
use super::origins::Origins;
use super::place::{Place, Seat};
use crate::admin::metrics::FallbackReason;
use crate::gossip::Roster;
use crate::net::{Receiver, Sender};
use crate::source::peer::{Line, Turn};
use crate::source::registry::{BlobOrigin, OriginError};
use crate::store::{Outcome, Progress, StoreError};

/// With no client left for this long the pull ends and the partial stays (D9).
const READERLESS: Duration = Duration::from_secs(5);

/// The same for a pull that was ahead of its client and was given up: the client may be coming for it at this moment.
const GIVEN_UP: Duration = Duration::from_secs(1);

/// With the registry refusing every client, peers get this long to deliver before the clients are told.
const REFUSED_PATIENCE: Duration = Duration::from_secs(5);

/// With the registry failing and no peer delivering for this long the clients are told.
const STALLED_PATIENCE: Duration = Duration::from_secs(60);

/// Requests that the registry answers wrongly, or not at all, before a pull that has no byte yet, and nobody to get one
/// from, leaves its clients to the registry (D11): they get its own answer, before any headers of the agent's were sent.
const TROUBLES_MAX: u32 = 3;

/// With neighbours, who may have the blob even if the registry has trouble, such a pull waits for them; so does one that has given
/// a client the beginning of a piece, and can give it no other answer.
const TROUBLED_PATIENCE: Duration = Duration::from_secs(10);

/// A registry that wants to be left alone for no longer than this is waited for; so long a client gets no byte.
const BUSY_PATIENCE: Duration = TROUBLED_PATIENCE;

/// Events that are taken in before what follows from them is done.
const EVENTS_AT_ONCE: usize = 32;

/// How often the transport is asked whether those who owe an answer are alive: well below the time after which they count as
/// silent.
const PULSE: Duration = Duration::from_millis(100);

/// Frames that wait to be sent to one neighbour. One that does not read so many is cut off.
const NEWS_MAX: usize = 64;

/// Sessions of one pull: what the core deals with.
const SESSIONS_MAX: usize = darter_swarm::task::neighbour::NEIGHBOURS_MAX;

/// Sessions with one peer: where both sides begin one at the same moment there are two, and each side uses both, since
/// neither can know which of them the other would give up.
const SESSIONS_PER_PEER: usize = 2;

/// Credits of one run that the loop may be ahead by; the core gives two.
const CREDITS_MAX: usize = 4;

/// Names one session of a pull, so that the end of an old one is not taken for that of its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SessionId(u64);

/// What happens to a pull.
pub(super) enum Event {
    /// A client has come, with an address and headers to fetch with.
    /// The flag says whether the operator named the registry.
    Client(Box<BlobOrigin>, bool),
    /// A peer began a session.
    Session(Box<(NodeId, Offer, Sender, Receiver)>),
    /// A session that this node began is open.
    Connected(Box<(NodeId, Offer, Sender, Receiver)>),
    /// The peer wants none.
    Declined(NodeId),
    /// It could not be begun.
    Unreachable(NodeId),
    Have(NodeId, Vec<PieceRange>),
    /// The home of a neighbour.
    NeighbourHome(NodeId, NodeId),
    SessionEnded(NodeId, SessionId, bool),
    Registered(NodeId, Result<RegisterResponse, TrackerError>),
    Pulled(NodeId, Result<PullPieceResponse, TrackerError>),
    Reported(NodeId, Option<LeaseId>, Result<ReportPieceResponse, TrackerError>),
    /// A neighbour offers a turn, and there is a place for what it brings or not.
    Turn(NodeId, Box<Turn>, Option<Place>),
    /// It offers none; `None` is busy.
    NoTurn(NodeId, Option<ErrorKind>),
    Piece(NodeId, PieceIndex),
    PieceFailed(NodeId, PieceIndex, Option<ErrorKind>),
    OriginPiece(RunId, PieceIndex),
    OriginProgress(RunId),
    OriginFailed(RunId, OriginFailure, OriginError),
    Uploaded(PieceIndex),
    Store(StoreError),
    Nothing,
}

/// A response that is being read.
struct OpenRun {
    credits: mpsc::Sender<()>,
    job: AbortHandle,
    /// Whose address and headers it was asked for with.
    origin: BlobOrigin,
}

/// The loop.
pub(super) struct Driver {
    flights: Arc<Flights>,
    flight: Arc<Flight>,
    core: Task,
    events: mpsc::Receiver<Event>,
    failed: watch::Sender<Option<PullError>>,
    jobs: JoinSet<()>,
    /// What is being said to neighbours; these end by themselves when their session is dropped.
    talks: JoinSet<()>,
    sessions: BTreeMap<(NodeId, SessionId), mpsc::Sender<SessionFrame>>,
    next_session: u64,
    /// Turns that are waited for.
    asks: BTreeMap<NodeId, AbortHandle>,
    /// Where turns were asked for, and will be again; since when nothing is waited for there.
    lines: BTreeMap<NodeId, (Line, Instant)>,
    /// The turn that is being offered at this moment.
    offer: Option<(NodeId, execute::Taking)>,
    requests: BTreeMap<(NodeId, PieceIndex), AbortHandle>,
    runs: BTreeMap<RunId, OpenRun>,
    /// Where it waits for room for pieces.
    seat: Seat,
    /// What this pull and others fetch from registries.
    fetching: Share,
    /// Packets that had come from those who owe an answer, when last looked at.
    received: BTreeMap<NodeId, u64>,
    origins: Origins,
    readers: BTreeMap<ReaderId, PieceIndex>,
    /// It is fetched ahead of a client's asking.
    ahead: bool,
    /// Peers are left out: the blob failed its digest before.
    alone: bool,
    /// This node isolates itself: nobody is asked, and whoever comes is welcome.
    isolated: bool,
    readerless_since: Option<Instant>,
    progress: (u32, Instant),
    lost_before: Option<u64>,
    last_trouble: String,
    /// Failures of the registry since the last piece.
    troubles: u32,
    /// The home has told of a pause of another registry than this node asks.
    other_registry: bool,
    /// The home that neighbours know of.
    told_home: Option<NodeId>,
    advertise: bool,
    advertised: Option<u8>,
}

impl Driver {
    pub(super) fn new(
        flights: Arc<Flights>,
        flight: Arc<Flight>,
        (origin, named): (BlobOrigin, bool),
        events: mpsc::Receiver<Event>,
        failed: watch::Sender<Option<PullError>>,
        alone: bool,
    ) -> Self {
        let now = Instant::now();
        let mut origins = Origins::default();
        origins.offer(origin, named);
        let blob = &flight.blob;
        // Without a home nobody is asked for anything but the registry.
        let homes = if alone { Vec::new() } else { flights.context.tracker.homes(blob.task()) };
        let core = Task::new(*blob.task(), *blob.geometry(), blob.held(), homes, rand::rng().random(), now);
        flights.context.metrics.active_tasks.inc();
        let isolated = !alone && flights.context.tracker.is_isolated();
        if isolated {
            flights.context.metrics.fallback(FallbackReason::Isolated);
        }
        Self {
            core,
            seat: flights.places.seat(blob.geometry().piece_size().bytes()),
            fetching: flights.fetching.share(),
            progress: (blob.held().count(), now),
            flights,
            flight,
            events,
            failed,
            jobs: JoinSet::new(),
            talks: JoinSet::new(),
            sessions: BTreeMap::new(),
            next_session: 0,
            asks: BTreeMap::new(),
            lines: BTreeMap::new(),
            offer: None,
            requests: BTreeMap::new(),
            runs: BTreeMap::new(),
            received: BTreeMap::new(),
            origins,
            readers: BTreeMap::new(),
            ahead: false,
            alone,
            isolated,
            readerless_since: Some(now),
            lost_before: None,
            last_trouble: "nobody has the blob".to_owned(),
            troubles: 0,
            other_registry: false,
            told_home: None,
            advertise: false,
            advertised: None,
        }
    }

    fn context(&self) -> &Context {
        &self.flights.context
    }

    /// Runs until the blob is complete, has failed, nobody reads it, or the agent stops.
    pub(super) async fn run(mut self, stopping: CancellationToken) {
        let mut state = self.flight.blob.state();
        let mut roster = self.context().tracker.roster();
        let mut pulse = tokio::time::interval(PULSE);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let outcome = loop {
            self.core.handle_fetching_elsewhere(self.fetching.elsewhere(), Instant::now());
            self.perform();
            self.fetching.set(self.core.fetching());
            lock(&self.flight.unshared).set(self.core.unshared());
            if let Some(outcome) = self.outcome(&mut state) {
                break outcome;
            }
            let wake = self.wake();
            let flight = self.flight.clone();
            if !self.core.is_starved() {
                self.seat.leave();
            }
            tokio::select! {
                () = stopping.cancelled() => break Err(PullError::Stopping),
                Some(event) = self.events.recv() => if let Err(error) = self.apply_all(event) { break Err(error) },
                () = flight.readers_changed.notified() => self.seat_readers(),
                Ok(()) = state.changed() => {}
                true = changed(&mut roster) => {
                    self.reconsider_homes();
                }
                _ = pulse.tick() => {
                    self.feel_pulse();
                    self.leave_lines();
                    self.reconsider_isolation();
                    // A deadline that passed while something else was handled is not forgotten.
                    self.core.handle_timeout(Instant::now());
                }
                () = self.fetching.changed() => {}
                () = self.seat.room(), if self.core.is_starved() => self.room(),
                Some(_) = self.jobs.join_next(), if !self.jobs.is_empty() => {}
                Some(_) = self.talks.join_next(), if !self.talks.is_empty() => {}
                () = tokio::time::sleep_until(wake.into()) => self.core.handle_timeout(Instant::now()),
            }
        };
        self.conclude(outcome).await;
    }

    /// Whether the pull is over.
    fn outcome(&mut self, state: &mut watch::Receiver<Progress>) -> Option<Result<(), PullError>> {
        let now = Instant::now();
        let Progress { outcome, lost, .. } = *state.borrow_and_update();
        // What rotted before this pull began is simply missing.
        let lost = lost - *self.lost_before.get_or_insert(lost);
        match outcome {
            Outcome::Poisoned => return Some(Err(PullError::Poisoned)),
            Outcome::Complete => {
                // Everybody is told what is here before the loop ends.
                self.perform();
                return Some(Ok(()));
            }
            Outcome::Gone => {
                return Some(Err(PullError::Store { reason: "the blob was removed from the cache".to_owned() }));
            }
            Outcome::Incomplete => {}
        }
        if lost > 0 {
            return Some(Err(PullError::Store { reason: "a piece has rotted on the disk".to_owned() }));
        }
        if self.events.is_empty() && self.readerless_since.is_some_and(|since| now >= since + READERLESS) {
            return Some(Err(PullError::Resting));
        }
        let held = self.core.have().count();
        if held != self.progress.0 {
            self.progress = (held, now);
            self.troubles = 0;
        }
        let stalled = now.saturating_duration_since(self.progress.1);
        // With every piece here it is only the digest of the whole that takes its time.
        if self.core.is_complete() {
            return None;
        }
        let hopeless = held == 0 && self.sessions.is_empty() && !self.flight.given.load(Ordering::Acquire);
        if self.core.origin_refused() && (hopeless || stalled >= REFUSED_PATIENCE) {
            return Some(Err(PullError::Refused));
        }
        if held == 0 && self.troubles >= TROUBLES_MAX && (hopeless || stalled >= TROUBLED_PATIENCE) {
            return Some(Err(PullError::Unavailable { reason: self.last_trouble.clone() }));
        }
        if stalled >= STALLED_PATIENCE {
            return Some(Err(PullError::Unavailable { reason: self.last_trouble.clone() }));
        }
        None
    }

    fn wake(&mut self) -> Instant {
        let now = Instant::now();
        let own = [self.readerless_since.map(|since| since + READERLESS), Some(self.progress.1 + REFUSED_PATIENCE)];
        let own = own.into_iter().flatten().filter(|at| *at > now).min();
        let core = self.core.poll_timeout(now);
        own.map_or(core, |own| own.min(core))
    }

    /// Lets the core know which clients wait for what.
    fn seat_readers(&mut self) {
        let now = Instant::now();
        let reading = self.flight.reading();
        for gone in self.readers.keys().filter(|id| !reading.contains_key(id)) {
            self.core.handle_reader_gone(*gone, now);
        }
        for (id, piece) in &reading {
            if self.readers.get(id) != Some(piece) {
                self.core.handle_reader(*id, *piece, now);
            }
        }
        self.readers = reading;
        let ahead = self.flight.ahead.load(Ordering::Acquire) > 0;
        let given_up = std::mem::replace(&mut self.ahead, ahead) && !ahead;
        let since = if given_up { now.checked_sub(READERLESS - GIVEN_UP).unwrap_or(now) } else { now };
        self.readerless_since = (self.readers.is_empty() && !ahead).then(|| self.readerless_since.unwrap_or(since));
        self.core.handle_background(ahead && self.readers.is_empty(), now);
    }

    /// Takes an event in, with those that wait behind it: what the loop looks at after an event it looks at once for all.
    fn apply_all(&mut self, event: Event) -> Result<(), PullError> {
        self.apply(event)?;
        for _ in 1..EVENTS_AT_ONCE {
            let Ok(event) = self.events.try_recv() else { break };
            self.apply(event)?;
        }
        // Each has ended with its event.
        while self.jobs.try_join_next().is_some() {}
        Ok(())
    }

    /// Takes one event in.
    fn apply(&mut self, event: Event) -> Result<(), PullError> {
        let now = Instant::now();
        self.judge(&event);
        match event {
            Event::Client(origin, named) => {
                self.origins.offer(*origin, named);
                // It takes its seat in a moment.
                self.readerless_since = self.readerless_since.map(|_| now);
                self.core.handle_origin_offered(now);
            }
            Event::Session(session) => {
                let (peer, offer, sender, receiver) = *session;
                self.open_session(peer, offer, sender, receiver, true);
            }
            Event::Connected(session) => {
                let (peer, offer, sender, receiver) = *session;
                if offer.geometry.is_none() {
                    self.core.handle_without_task(peer, now);
                } else {
                    self.open_session(peer, offer, sender, receiver, false);
                }
            }
            Event::Declined(peer) => {
                // Where it has begun one itself meanwhile, that one goes on.
                if self.sessions_with(peer) == 0 {
                    self.core.handle_neighbour_gone(peer, true, now);
                }
            }
            Event::Unreachable(peer) => self.core.handle_unreachable(peer, now),
            Event::NeighbourHome(peer, home) => {
                self.core.handle_neighbour_home(peer, home);
                self.compare_homes();
            }
            Event::Have(peer, pieces) => self.core.handle_have(peer, &pieces, now),
            Event::SessionEnded(peer, session, serving) => {
                self.sessions.remove(&(peer, session));
                if self.sessions_with(peer) == 0 {
                    self.core.handle_neighbour_gone(peer, serving, now);
                }
            }
            Event::Registered(home, Ok(response)) => self.registered(home, &response, now),
            Event::Pulled(home, Ok(response)) => {
                let response = self.meant(response);
                self.core.handle_pulled(home, response, now);
            }
            Event::Reported(home, lease, Ok(response)) => {
                self.advertise |= response.advertise;
                self.core.handle_reported(home, lease, response, now);
            }
            Event::Registered(home, Err(error))
            | Event::Pulled(home, Err(error))
            | Event::Reported(home, _, Err(error)) => {
                tracing::debug!(task = %self.flight.blob.task(), %home, %error, "a home failed");
                self.core.handle_home_failed(home, &error, now);
            }
            Event::Turn(peer, turn, place) => self.turn(peer, *turn, place, now),
            Event::NoTurn(peer, kind) => {
                self.asks.remove(&peer);
                self.core.handle_turn_failed(peer, kind, now);
            }
            Event::Piece(peer, piece) => {
                self.requests.remove(&(peer, piece));
                self.core.handle_piece(peer, piece, now);
            }
            Event::PieceFailed(peer, piece, kind) => {
                self.requests.remove(&(peer, piece));
                self.leave_line(peer);
                self.core.handle_piece_failed(peer, piece, kind, now);
            }
            Event::OriginPiece(run, piece) => self.core.handle_origin_piece(run, piece, now),
            Event::OriginProgress(run) => self.core.handle_origin_progress(run, now),
            Event::OriginFailed(run, failure, error) => self.origin_failed(run, failure, &error, now)?,
            Event::Uploaded(piece) => self.core.handle_uploaded(piece, now),
            Event::Store(error) => return Err(execute::store_failed(&error)),
            Event::Nothing => {}
        }
        Ok(())
    }

    fn registered(&mut self, home: NodeId, response: &RegisterResponse, now: Instant) {
        let ours = self.flight.blob.geometry();
        if response.geometry.is_some_and(|geometry| geometry != *ours) {
            // Pieces of another size cannot be exchanged; the settings of the two nodes differ.
            tracing::warn!(task = %self.flight.blob.task(), %home, "others cut the blob differently, going on alone");
            self.alone = true;
            self.core.handle_homes(Vec::new(), now);
            return;
        }
        self.advertise |= response.advertise;
        self.core.handle_registered(home, response, now);
    }

    fn origin_failed(
        &mut self,
        run: RunId,
        failure: OriginFailure,
        error: &OriginError,
        now: Instant,
    ) -> Result<(), PullError> {
        let asked = self.runs.remove(&run);
        self.last_trouble = error.to_string();
        self.troubles += match error {
            // The registry is there but cannot serve: if it goes on like that, the client is to hear it.
            OriginError::Busy { answer: Some(answer), retry_after }
                if answer.status() == StatusCode::SERVICE_UNAVAILABLE && *retry_after <= BUSY_PATIENCE =>
            {
                1
            }
            // The whole cluster waits, and so does the client.
            OriginError::Busy { retry_after, .. } if *retry_after <= BUSY_PATIENCE => 0,
            // A registry that wants to be left alone for longer says so to the client itself.
            OriginError::Busy { .. } => TROUBLES_MAX,
            _ => 1,
        };
        if matches!(error, OriginError::NoRange) {
            return Err(PullError::NoRange);
        }
        if matches!(error, OriginError::OtherLength) {
            return Err(PullError::Unsuited { reason: error.to_string() });
        }
        let mut failure = failure;
        if failure == OriginFailure::Refused {
            // Another client's credentials may be good, be it one that has come since.
            let another = asked.is_none_or(|asked| self.origins.refused(&asked.origin));
            if another {
                failure = OriginFailure::Transient;
            }
        }
        self.core.handle_origin_failed(run, failure, now);
        Ok(())
    }

    /// Starts what the core asks for.
    fn perform(&mut self) {
        while let Some(action) = self.core.poll_action() {
            let tracker = self.context().tracker.clone();
            match action {
                Action::Register { home, request } => {
                    self.spawn(async move { Event::Registered(home, tracker.register(home, request).await) });
                }
                Action::Pull { home, mut request } => {
                    request.registry = Added(self.other_registry.then(|| self.registry()).flatten());
                    self.spawn(async move { Event::Pulled(home, tracker.pull_piece(home, request).await) });
                }
                Action::Report { home, mut request } => {
                    if let (Some(pause), Some(registry)) = (&mut request.pause.0, self.registry()) {
                        pause.registry = registry;
                    }
                    let lease = request.lease;
                    self.spawn(async move { Event::Reported(home, lease, tracker.report_piece(home, request).await) });
                }
                Action::Blame { home, request } => self.blame(home, request),
                Action::Connect { peer } => self.connect(peer),
                Action::Ask { peer } => self.ask(peer),
                Action::Decline { peer } => {
                    if let Some(ask) = self.asks.remove(&peer) {
                        ask.abort();
                    }
                }
                Action::Take { peer, piece } => self.take(peer, piece),
                Action::Cancel { peer, piece } => {
                    if let Some(request) = self.requests.remove(&(peer, piece)) {
                        request.abort();
                    }
                }
                // A neighbour that does not read its news is cut off rather than waited for.
                Action::Have { peers, pieces } => self.sessions.retain(|(peer, _), news| {
                    !peers.contains(peer) || news.try_send(SessionFrame::Have(pieces.clone())).is_ok()
                }),
                Action::Fetch { run, pieces } => self.fetch(run, pieces),
                Action::ReadOn { run } => {
                    if let Some(open) = self.runs.get(&run) {
                        // The core keeps no more credits open than the queue holds.
                        let _ = open.credits.try_send(());
                    }
                }
                Action::Stop { run } => {
                    if let Some(open) = self.runs.remove(&run) {
                        open.job.abort();
                    }
                }
                Action::CountFallback(why) => self.context().metrics.fallback(match why {
                    Fallback::HomeSilent => FallbackReason::HomeSilent,
                    Fallback::PeersSlow => FallbackReason::PeersSlow,
                }),
            }
        }
        self.announce();
        self.tell_home();
    }

    /// Runs a job whose outcome is an event. The loop owns it: it ends with the loop.
    fn spawn(&mut self, job: impl Future<Output = Event> + Send + 'static) -> AbortHandle {
        let flight = self.flight.clone();
        self.jobs.spawn(async move {
            let event = job.await;
            // The loop has ended: nobody is interested.
            let _ = flight.events.send(event).await;
        })
    }

    fn fetch(&mut self, run: RunId, pieces: PieceRange) {
        let Some(origin) = self.origins.best().cloned() else {
            return self.core.handle_origin_failed(run, OriginFailure::Transient, Instant::now());
        };
        let awaited = self.readers.values().any(|piece| pieces.contains(*piece));
        let order = execute::Order { origin: origin.clone(), run, pieces, awaited };
        let (credits, granted) = mpsc::channel(CREDITS_MAX);
        let (flights, flight) = (self.flights.clone(), self.flight.clone());
        let job = self.spawn(async move {
            let (context, flight) = (&flights.context, &*flight);
            execute::fetch(context, &flight.blob, order, granted, &flight.arriving, &flight.events).await
        });
        self.runs.insert(run, OpenRun { credits, job, origin });
    }
}

/// Whether the members have changed; never, without peers.
async fn changed(roster: &mut Option<watch::Receiver<Arc<Roster>>>) -> bool {
    if let Some(receiver) = roster
        && receiver.changed().await.is_ok()
    {
        return true;
    }
    std::future::pending().await
}
