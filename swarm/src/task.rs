//! The downloader of one task: what to ask of whom, and when to stop waiting.
//!
//! Owned by one loop that feeds it events and executes the [`Action`]s it gives:
//!
//! ```text
//! loop { event -> task.handle_*(.., now); while let Some(action) = task.poll_action() { execute }; sleep until task.poll_timeout() }
//! ```
//!
//! - [`action`] lists what it may ask for;
//! - [`link`] keeps in touch with the task's home;
//! - `acquaint` meets neighbours and hears what they offer;
//! - [`neighbour`] is what it knows of one peer, [`pick`] which piece to ask it for;
//! - [`origin`] paces the runs that this node fetches from the registry;
//! - [`fallback`] is the one place that decides that a reader has waited long enough (D11).
//!
//! Not here: bytes. A piece is reported after the shell has checked and stored it.

mod acquaint;
pub mod action;
pub mod fallback;
pub mod link;
pub mod neighbour;
pub mod origin;
pub mod pick;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use darter_tracker::{
    Bitmap, ClientErrorRequest, ErrorKind, Geometry, LeaseId, LeaseState, NodeId, PieceIndex, PieceRange,
    PullPieceResponse, RegisterResponse, ReportPieceResponse, TaskId, TrackerError,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

pub use self::action::{Action, Fallback, OriginFailure, ReaderId, RunId};
use self::fallback::Stranded;
use self::link::Link;
use self::neighbour::Neighbour;
use self::origin::Origin;
use self::pick::STARVED_MAX;
use crate::home::STALLED;
use crate::intake::Pace;
use crate::patience::{PATIENCE_MAX, Patience};

/// Pieces that arrived are told to the neighbours together if they come within this time: a message per piece would
/// cost a thousand per GiB and neighbour. At a gigabit per second a piece takes 2 ms, and news that is as old as some pieces
/// costs time (simulated with 100 nodes: 10 ms cost 2 %, 30 ms 13 %).
const HAVE_BATCH: Duration = Duration::from_millis(5);

/// So many neighbours that hold a piece make it common: who lacks it is told by them, and could get it from any.
const COMMON: u32 = 4;

/// The same time for common pieces, unless something else is told before. Half of all messages between peers were such news.
/// Simulated with 16 and 50 nodes this leaves out 38 and 50 % of the news, at no cost in time; with twice the time or 2 instead
/// of [`COMMON`] it costs 1 % with 100 nodes.
const HAVE_LATER: Duration = Duration::from_millis(500);

/// A wake-up that comes this much too late means that this node is starved of CPU, so nobody else's silence is judged
/// for [`GRACE`].
const LATE: Duration = Duration::from_millis(50);

/// How long others are given the benefit of the doubt after this node was late itself.
const GRACE: Duration = Duration::from_millis(150);

/// The same after it stood still for [`STALLED`]: its connections are dead, and until it has met the others again it knows of
/// nobody who has what its readers wait for.
pub const GRACE_AFTER_STALL: Duration = Duration::from_secs(2);

/// A peer whose pieces take so many times as long as those of the fastest is slow.
const SLOWER: u32 = 3;

/// The shortest sleep, so that no mistake in a deadline becomes a busy loop.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);

/// The downloader of one task.
#[derive(Debug)]
pub struct Task {
    id: TaskId,
    geometry: Geometry,
    have: Bitmap,
    neighbours: BTreeMap<NodeId, Neighbour>,
    /// Neighbours that offer a piece, per piece.
    availability: Vec<u32>,
    link: Link,
    origin: Origin,
    /// Runs that this node's other tasks have.
    fetching_elsewhere: usize,
    /// Whether it would fetch if they had fewer.
    held_back: bool,
    /// Neither held nor asked of a peer; what the registry is asked for is among it.
    unasked: Bitmap,
    /// Since when no turn is asked for, as this node had no room for what one would have brought.
    starved: Option<Instant>,
    /// Questions for what there is room for that nobody answers: others are asked.
    unanswered: usize,
    readers: BTreeMap<ReaderId, Waiting>,
    stranded: Stranded,
    patience: Patience,
    /// Peers that were given up as silent, and when they had last given a sign of life: should they give another, they were alive.
    doubted: BTreeMap<NodeId, Instant>,
    /// It is fetched ahead of anybody's reading.
    background: bool,
    /// Arrived, and not told to the neighbours yet; when it is to be told.
    untold: Vec<PieceIndex>,
    tell_at: Option<Instant>,
    grace_until: Option<Instant>,
    expected_wake: Option<Instant>,
    /// When everything was last looked at.
    advanced: Instant,
    /// The next deadline, as far as it was worked out since something last changed.
    deadline: Option<Instant>,
    actions: VecDeque<Action>,
    rng: StdRng,
}

/// What a client of this node waits for.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    piece: PieceIndex,
    since: Instant,
}

impl Task {
    /// A downloader that holds `have` of the blob. `homes` are the members to ask, best first, the last of them this
    /// node itself, since a node that reaches nobody is its own home. Where there are none, nobody is asked and
    /// everything comes from the registry. `seed` feeds the tie-breaks.
    #[must_use]
    pub fn new(id: TaskId, geometry: Geometry, have: Bitmap, homes: Vec<NodeId>, seed: u64, now: Instant) -> Self {
        let mut task = Self {
            id,
            geometry,
            availability: vec![0; geometry.pieces() as usize],
            have,
            neighbours: BTreeMap::new(),
            link: Link::new(homes, now),
            origin: Origin::default(),
            fetching_elsewhere: 0,
            held_back: false,
            unasked: Bitmap::new(geometry.pieces()),
            starved: None,
            unanswered: 0,
            readers: BTreeMap::new(),
            stranded: Stranded::default(),
            patience: Patience::default(),
            doubted: BTreeMap::new(),
            background: false,
            untold: Vec::new(),
            tell_at: None,
            grace_until: None,
            expected_wake: None,
            advanced: now,
            deadline: None,
            actions: VecDeque::new(),
            rng: StdRng::seed_from_u64(seed),
        };
        for piece in task.have.missing() {
            task.unasked.insert(piece);
        }
        task.advance(now);
        task
    }

    /// What is held, verified and stored.
    #[must_use]
    pub fn have(&self) -> &Bitmap {
        &self.have
    }

    /// The cut of the blob.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The member that is asked at present.
    #[must_use]
    pub fn home(&self) -> Option<NodeId> {
        self.link.home()
    }

    /// The home that has this node on its list.
    #[must_use]
    pub fn registered_home(&self) -> Option<NodeId> {
        self.link.registered_home()
    }

    /// Whether every piece is held.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.have.is_full()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`] if nothing happens before.
    pub fn poll_timeout(&mut self, now: Instant) -> Instant {
        let deadline = self.deadline.unwrap_or_else(|| self.next_deadline(now));
        self.deadline = Some(deadline);
        // Not from now on: asked again and again a deadline that has passed would never come.
        let wake = deadline.max(self.advanced + TIMEOUT_MIN);
        self.expected_wake = Some(wake);
        wake
    }

    // === inputs: the home ===

    /// The members to ask have changed. The present home is kept while it is among them; those before it are asked whether
    /// they are a home, and the first that answers is the present one then. From none on, everything comes from the registry.
    pub fn handle_homes(&mut self, homes: Vec<NodeId>, now: Instant) {
        self.link.set_order(homes, now);
        self.advance(now);
    }

    /// Members have come or gone, and `homes` are those to ask now. Whoever comes, a pull keeps the home that has it on its
    /// list while that is a member, unless it is the last of `homes`: a node that is not in rank is its own last resort.
    pub fn handle_members(&mut self, mut homes: Vec<NodeId>, present_is_member: bool, now: Instant) {
        let present = self.link.registered_home().filter(|home| present_is_member && homes.last() != Some(home));
        if let Some(present) = present {
            homes.retain(|home| *home != present);
            homes.insert(0, present);
        }
        self.handle_homes(homes, now);
    }

    /// A neighbour's home comes before the present one in rank: it shall be everybody's. `homes` are those to ask otherwise.
    pub fn handle_rival(&mut self, rival: NodeId, mut homes: Vec<NodeId>, now: Instant) {
        let first = std::iter::once(rival).chain(self.link.home().filter(|home| *home != rival));
        homes.retain(|home| *home != rival && Some(*home) != self.link.home());
        homes.splice(0..0, first);
        self.handle_homes(homes, now);
    }

    /// The home answered a Register.
    pub fn handle_registered(&mut self, home: NodeId, response: &RegisterResponse, now: Instant) {
        if self.link.registered(home, &self.have, now) {
            let stopped = self.origin.rebind(home, &response.leases);
            self.actions.extend(stopped);
            self.meet(&response.neighbours, now);
        }
        self.advance(now);
    }

    /// The home answered a PullPiece.
    pub fn handle_pulled(&mut self, home: NodeId, response: PullPieceResponse, now: Instant) {
        let current = self.link.pulled(home, now);
        match response {
            // Anything that a former home says is moot. A lease of its lapses; it is taken back at once by one that is asked again.
            _ if !current => {}
            PullPieceResponse::Lease(lease) => {
                let again = if let Some(pieces) = self.existing(lease.pieces) {
                    let actions = self.origin.start(Some((home, lease.id)), pieces, now);
                    self.actions.extend(actions);
                    now
                } else {
                    now + link::PULL_INTERVAL_MAX
                };
                self.link.pull_at(again);
            }
            PullPieceResponse::Pieces(sources) => {
                self.meet_sources(&sources, now);
                self.link.names_peers(&sources, now);
                self.link.pull_at(now + link::PULL_INTERVAL);
            }
            PullPieceResponse::Wait { retry_after, neighbours, paused } => {
                self.origin.pause(paused.0, now);
                self.meet(&neighbours, now);
                self.link.put_off_by(retry_after);
                let pause = retry_after.clamp(link::WAIT_MIN, link::PULL_INTERVAL_MAX);
                // What it was not asked for is asked for at once.
                let at_once = self.held_back && self.may_fetch_more();
                self.link.pull_at(if at_once { now } else { now + pause });
            }
            PullPieceResponse::Finish { .. } => self.link.pull_at(now + link::PULL_INTERVAL_MAX),
        }
        self.advance(now);
    }

    /// The home answered a ReportPiece that named this lease.
    pub fn handle_reported(
        &mut self,
        home: NodeId,
        lease: Option<LeaseId>,
        response: ReportPieceResponse,
        now: Instant,
    ) {
        let current = self.link.reported(home, now);
        if let Some(lease) = lease {
            let stopped = self.origin.lease_state((home, lease), response.lease);
            self.actions.extend(stopped);
            if current && response.lease == LeaseState::Over {
                // Free for the next run.
                self.link.pull_at(now);
            }
        }
        self.advance(now);
    }

    /// A call to the home failed.
    pub fn handle_home_failed(&mut self, home: NodeId, error: &TrackerError, now: Instant) {
        self.link.failed(home, error, now);
        self.advance(now);
    }

    // === inputs: pieces ===

    /// How long the pieces of `peer` take, beside those of the fastest: a quarter of those that have given any.
    #[must_use]
    pub fn pace(&self, peer: NodeId) -> Pace {
        let Some(takes) = self.neighbours.get(&peer).and_then(Neighbour::latency) else { return Pace::Usual };
        let mut all: Vec<Duration> = self.neighbours.values().filter_map(Neighbour::latency).collect();
        let quarter = all.len() / 4;
        let (_, fast, _) = all.select_nth_unstable(quarter);
        if takes > *fast * SLOWER { Pace::Slow } else { Pace::Usual }
    }

    /// A piece came from a peer and is stored.
    pub fn handle_piece(&mut self, peer: NodeId, piece: PieceIndex, now: Instant) {
        if let Some(neighbour) = self.neighbours.get_mut(&peer) {
            neighbour.delivered(piece, now);
        }
        self.arrived(piece, now);
        self.advance(now);
    }

    /// Whose signs of life count: the home that owes an answer, every neighbour that was asked for a turn or a piece, and those
    /// that were given up as silent.
    #[must_use]
    pub fn debtors(&self) -> Vec<NodeId> {
        let asked = self.neighbours.iter().filter(|(_, neighbour)| !neighbour.owes_nothing()).map(|(peer, _)| *peer);
        asked.chain(self.link.debtor()).chain(self.doubted.keys().copied()).collect()
    }

    /// Something has come from a member that owes an answer, so it is alive.
    pub fn handle_alive(&mut self, peer: NodeId, now: Instant) {
        let waited = self.neighbours.get_mut(&peer).and_then(|neighbour| neighbour.heard(now));
        let last = [waited, self.link.heard(peer, now), self.doubted.remove(&peer)].into_iter().flatten().min();
        if let Some(last) = last
            && self.patience.note(peer, now.saturating_duration_since(last), now)
        {
            for (peer, neighbour) in &mut self.neighbours {
                neighbour.set_patience(self.patience.with(*peer, Duration::ZERO));
            }
        }
        self.deadline = None;
    }

    /// A peer did not give a piece. `kind` is `None` if it was merely busy.
    pub fn handle_piece_failed(&mut self, peer: NodeId, piece: PieceIndex, kind: Option<ErrorKind>, now: Instant) {
        let Some(neighbour) = self.neighbours.get_mut(&peer) else { return };
        // An answer to a request that was cancelled or has timed out says nothing new.
        if !neighbour.fail(piece, kind, now, &mut self.rng) {
            return;
        }
        if kind == Some(ErrorKind::NotFound) && neighbour.withdraw(piece) {
            self.availability[piece.0 as usize] -= 1;
        }
        self.want_again(piece);
        if kind == Some(ErrorKind::Mismatch) {
            self.forget_offers(peer);
        }
        if let Some(kind) = kind {
            self.blame(peer, vec![PieceRange { first: piece, count: 1 }], kind);
        }
        self.advance(now);
    }

    /// A piece of a run came from the registry and is stored.
    pub fn handle_origin_piece(&mut self, run: RunId, piece: PieceIndex, now: Instant) {
        self.origin.delivered(run, piece, now);
        self.arrived(piece, now);
        self.tell_at = Some(now);
        self.advance(now);
    }

    /// Bytes of a run came, though no whole piece yet.
    pub fn handle_origin_progress(&mut self, run: RunId, now: Instant) {
        self.origin.progress(run, now);
        self.advance(now);
    }

    /// A run ended before its last piece.
    pub fn handle_origin_failed(&mut self, run: RunId, failure: OriginFailure, now: Instant) {
        self.origin.failed(run, failure, now);
        self.advance(now);
    }

    /// A client with other credentials has come: the registry may be asked again.
    pub fn handle_origin_offered(&mut self, now: Instant) {
        self.origin.offered();
        self.advance(now);
    }

    /// Whether the registry has refused every client of this node.
    #[must_use]
    pub fn origin_refused(&self) -> bool {
        self.origin.refused()
    }

    /// A piece was uploaded to a neighbour.
    pub fn handle_uploaded(&mut self, piece: PieceIndex, now: Instant) {
        self.origin.passed_on(piece, now);
        self.advance(now);
    }

    // === inputs: readers and time ===

    /// A client of this node waits for `piece`.
    pub fn handle_reader(&mut self, reader: ReaderId, piece: PieceIndex, now: Instant) {
        let waiting = self.readers.entry(reader).or_insert(Waiting { piece, since: now });
        if waiting.piece != piece {
            *waiting = Waiting { piece, since: now };
        }
        self.advance(now);
    }

    /// A client has what it wanted, or went away.
    pub fn handle_reader_gone(&mut self, reader: ReaderId, now: Instant) {
        self.readers.remove(&reader);
        self.advance(now);
    }

    /// Whether the blob is fetched ahead of anybody's reading it: then it takes little from peers, whose links and this node's
    /// are for what is read.
    pub fn handle_background(&mut self, background: bool, now: Instant) {
        if self.background != background {
            self.background = background;
            self.advance(now);
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.advance(now);
    }

    // === what follows from any input ===

    fn arrived(&mut self, piece: PieceIndex, now: Instant) {
        self.unasked.remove(piece);
        for (peer, neighbour) in &mut self.neighbours {
            if neighbour.cancel(piece) {
                self.actions.push_back(Action::Cancel { peer: *peer, piece });
            }
        }
        let quarter = |count: u32| u64::from(count) * 4 / u64::from(self.geometry.pieces());
        let before = quarter(self.have.count());
        if self.have.insert(piece) {
            self.untold.push(piece);
            let common = self.availability[piece.0 as usize] >= COMMON;
            let at = now + if common { HAVE_LATER } else { HAVE_BATCH };
            self.tell_at = Some(self.tell_at.map_or(at, |sooner| sooner.min(at)));
            self.link.unreported(piece);
            if quarter(self.have.count()) != before {
                self.link.report_soon();
            }
        }
    }

    /// Restores what must hold after every event: calls are out, slots are used, runs go on, nobody waits in vain.
    fn advance(&mut self, now: Instant) {
        // Whatever is the first thing to happen after this node was held up shows it.
        let late = self.expected_wake.take().map_or(Duration::ZERO, |wake| now.saturating_duration_since(wake));
        if late > LATE {
            let grace = if late >= STALLED { GRACE_AFTER_STALL } else { GRACE };
            self.grace_until = self.grace_until.max(Some(now + grace));
        }
        (self.advanced, self.deadline) = (now, None);
        if self.is_complete() {
            self.origin.stop_all(&mut self.actions);
            for (peer, neighbour) in &mut self.neighbours {
                if neighbour.leave_line() {
                    self.actions.push_back(Action::Decline { peer: *peer });
                }
            }
        }
        self.expire_requests(now);
        self.tell_neighbours(now);
        self.drive_fallback(now);
        self.drive_requests(now);
        self.drive_origin(now);
        self.drive_link(now);
    }

    fn tell_neighbours(&mut self, now: Instant) {
        if self.tell_at.is_some_and(|at| at <= now) || self.is_complete() && !self.untold.is_empty() {
            self.tell_at = None;
            self.untold.sort_unstable();
            // Who has told that it holds them does not need to know.
            let lacks =
                |neighbour: &Neighbour| neighbour.is_up() && self.untold.iter().any(|piece| !neighbour.has(*piece));
            let peers: Vec<NodeId> =
                self.neighbours.iter().filter(|(_, neighbour)| lacks(neighbour)).map(|(peer, _)| *peer).collect();
            let pieces = PieceRange::gather(self.untold.drain(..));
            if !peers.is_empty() {
                self.actions.push_back(Action::Have { peers, pieces });
            }
        }
    }

    /// The part of a run from the wire that this blob has.
    fn existing(&self, run: PieceRange) -> Option<PieceRange> {
        let count = run.end().min(self.geometry.pieces()).saturating_sub(run.first.0);
        (count > 0).then_some(PieceRange { first: run.first, count })
    }

    fn blame(&mut self, peer: NodeId, pieces: Vec<PieceRange>, kind: ErrorKind) {
        // A home that cannot be reached cannot be told so. One that lacks what it offers must be: nobody else can take it
        // off its own list of holders, and without that it would lend the piece to nobody.
        let hears = |home: &NodeId| *home != peer || kind != ErrorKind::Unreachable;
        if let Some(home) = self.link.registered_home().filter(hears) {
            let request = ClientErrorRequest { task: self.id, peer, pieces, kind };
            self.actions.push_back(Action::Blame { home, request });
        }
    }

    /// Others are judged only by a node that is not late itself.
    fn may_judge(&self, now: Instant) -> bool {
        self.grace_until.is_none_or(|until| now >= until)
    }

    /// Notes that `peer`, from which nothing has come since `last`, is given up: should it give a sign of life, that was too soon.
    fn doubt(&mut self, peer: NodeId, last: Instant, now: Instant) {
        self.doubted.retain(|_, last| now.saturating_duration_since(*last) <= PATIENCE_MAX);
        self.doubted.entry(peer).or_insert(last);
    }

    /// Something is to be looked at by `at`.
    fn sooner(&mut self, at: Instant) {
        self.deadline = self.deadline.map(|deadline| deadline.min(at));
    }

    fn next_deadline(&self, now: Instant) -> Instant {
        let far = now + Duration::from_secs(5);
        if self.is_complete() && self.untold.is_empty() {
            return far;
        }
        let requests = self.neighbours.values().flat_map(|neighbour| neighbour.deadlines(now));
        let fallbacks = self.readers.values().flat_map(|waiting| fallback::deadlines(waiting.since, now));
        [
            Some(far),
            self.tell_at,
            self.starved.map(|since| since + STARVED_MAX),
            self.grace_until.filter(|until| *until > now),
        ]
        .into_iter()
        .flatten()
        .chain(requests)
        .chain(fallbacks)
        .chain(self.stranded.deadline(now))
        .chain(self.link.deadlines(&self.patience, now))
        .chain(self.origin.deadlines(now))
        .min()
        .unwrap_or(far)
    }
}

#[cfg(test)]
#[path = "task/tests.rs"]
mod tests;

#[cfg(test)]
#[path = "task/faults.rs"]
mod faults;
