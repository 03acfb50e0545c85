//! Keeps in touch with the home of a task: registers, asks for work, reports, and moves on when it is silent.
//!
//! The first home in rank that answers is the present one. When nothing comes from it any more, the next is asked; those of
//! higher rank are asked again now and then, and the first of them that answers is the present one again. What this node is
//! fetching goes along ([`RegisterRequest::runs`]), so that nobody fetches it a second time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use darter_tracker::{
    Added, Bitmap, LeaseId, NodeId, Pause, PieceIndex, PieceRange, PieceSource, PullPieceRequest, RegisterRequest,
    ReportPieceRequest, TrackerError,
};

use super::origin::RUNS_PER_NODE;
use super::pick::READER_PATIENCE;
use super::{Action, Task, Waiting};
use crate::patience::Patience;

/// A home that owes an answer and from which nothing has come for this long is left for the next in rank.
///
/// The design asks the next one after 100 ms and leaves after 500 (D3). With the running leases carried along, leaving is
/// cheap and undone by the first answer, so one time does for both; less than this is common on a busy machine. (With 250 ms, of 50
/// members on two cores one to thirty left a home that was alive, most of them before 330 ms were over, and each may cost a
/// run that is fetched once more.)
pub const SILENT_HOME: Duration = Duration::from_millis(400);

/// The same for the first home of all: the first call includes a handshake.
pub const SILENT_STRANGER: Duration = Duration::from_millis(500);

/// With no home answering for this long a reader is served from the registry, piece by piece,
pub const SILENT_READER: Duration = Duration::from_millis(700);

/// and after this all that is left is fetched alone.
pub const GIVEN_UP: Duration = Duration::from_secs(2);

/// A home that has not answered a call for this long is left though it is alive: its link is of no use.
pub const ANSWER_MAX: Duration = Duration::from_secs(3);

/// When a home that was left, or has refused, is asked again; doubled each time, up to the maximum.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(8);

/// Who still knows nobody when a reader has waited for so long, a few round trips, is not one of many who begin together: nobody
/// else will fetch what it needs (simulated with 16 nodes that begin within 50 ms: 2 ms cost them 0.2 %, 8 ms nothing).
pub const ALONE: Duration = Duration::from_millis(8);

/// The shortest for which a home can have a node wait.
pub const WAIT_MIN: Duration = Duration::from_millis(20);

/// The shortest time between two PullPiece calls that gave no lease, unless the home has the node wait for less.
pub const PULL_INTERVAL: Duration = Duration::from_millis(100);

/// What a reader needs at once is asked for again after this part of the time for which the home has others wait, within
/// [`PULL_INTERVAL`] and [`URGENT_INTERVAL_MAX`]: a home of ten thousand is not to be asked ten times a second by each of them.
const URGENT_PART: u32 = 5;
const URGENT_INTERVAL_MAX: Duration = Duration::from_millis(500);

/// Where the home has named peers for it, not before this. Else whoever waits for a peer that does not give would ask for nothing
/// else meanwhile, and nothing would be lent to him.
const TOLD: Duration = Duration::from_secs(1);

/// The longest.
pub const PULL_INTERVAL_MAX: Duration = Duration::from_secs(2);

/// A lease is renewed this often while its bytes come, a tenth of the time after which it lapses; while none come the fetcher
/// shows that it is alive.
pub const RENEW: Duration = Duration::from_millis(400);

/// The relation to the homes.
#[derive(Debug)]
pub(super) struct Link {
    order: Vec<NodeId>,
    /// Position in `order` of the present home.
    at: usize,
    registered: bool,
    /// Whether any home has ever answered a Register.
    moved: bool,
    /// How Register stands with each home that was asked.
    asked: BTreeMap<NodeId, Asked>,
    pull_sent: Option<Instant>,
    /// Whether that may be answered with a lease.
    pull_may_lend: bool,
    /// The piece for which it says that a reader needs it at once.
    pull_urgent: Option<PieceIndex>,
    /// Such pieces for which the home has named peers, and when; counts for [`TOLD`].
    told: BTreeMap<PieceIndex, Instant>,
    report_sent: Option<Instant>,
    /// When something last came from the present home, if that was noticed.
    heard: Option<Instant>,
    next_pull: Instant,
    /// How long after a PullPiece the next one goes out that asks for what a reader needs at once.
    urgent_interval: Duration,
    /// When the last PullPiece went out, or the pull began.
    pulled_at: Instant,
    /// Arrived and not reported yet.
    unreported: Vec<PieceIndex>,
    report_due: bool,
    /// Since when no home has answered; `None` while the present one does.
    silent_since: Option<Instant>,
}

/// How Register stands with a home.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    /// When it was asked, if it owes the answer.
    sent: Option<Instant>,
    /// Not to be asked before.
    again: Option<Instant>,
    /// How often in a row it was left or has failed.
    failures: u32,
}

impl Asked {
    fn ready(&self, now: Instant) -> bool {
        self.sent.is_none() && self.again.is_none_or(|at| now >= at)
    }

    fn put_off(&mut self, now: Instant) {
        let pause = (AGAIN * 2u32.saturating_pow(self.failures.min(8))).min(AGAIN_MAX);
        self.failures += 1;
        self.again = Some(now + pause);
    }
}

impl Link {
    pub(super) fn new(order: Vec<NodeId>, now: Instant) -> Self {
        Self {
            order,
            at: 0,
            registered: false,
            moved: false,
            asked: BTreeMap::new(),
            pull_sent: None,
            pull_may_lend: false,
            pull_urgent: None,
            told: BTreeMap::new(),
            report_sent: None,
            heard: None,
            next_pull: now,
            urgent_interval: PULL_INTERVAL,
            pulled_at: now,
            unreported: Vec::new(),
            report_due: false,
            silent_since: None,
        }
    }

    pub(super) fn home(&self) -> Option<NodeId> {
        self.order.get(self.at).copied()
    }

    /// Whether there is nobody to ask.
    pub(super) fn homeless(&self) -> bool {
        self.order.is_empty()
    }

    pub(super) fn registered_home(&self) -> Option<NodeId> {
        self.home().filter(|_| self.registered)
    }

    /// Whether a home other than the present one owes an answer, or is not to be asked yet since it gave none.
    pub(super) fn put_off(&self, home: NodeId, now: Instant) -> bool {
        self.home() != Some(home) && self.asked.get(&home).is_some_and(|asked| !asked.ready(now))
    }

    pub(super) fn set_order(&mut self, order: Vec<NodeId>, now: Instant) {
        let current = self.home();
        self.order = order;
        self.asked.retain(|node, _| self.order.contains(node));
        match self.order.iter().position(|node| Some(*node) == current) {
            Some(at) => self.at = at,
            None => self.turn_to(0, now),
        }
    }

    /// Notes an answer to Register; tells whether the one who gave it is the present home now.
    pub(super) fn registered(&mut self, home: NodeId, have: &Bitmap, now: Instant) -> bool {
        let Some(at) = self.order.iter().position(|node| *node == home) else { return false };
        self.asked.insert(home, Asked::default());
        // One of lower rank, from the time before the present one answered.
        if at > self.at {
            return false;
        }
        if at < self.at {
            (self.at, self.heard, self.pull_sent, self.report_sent) = (at, None, None, None);
            // It was asked a while ago, and knows what was there at that time.
            self.unreported = have.iter().collect();
            self.report_due = true;
        }
        (self.registered, self.moved, self.silent_since, self.next_pull) = (true, true, None, now);
        true
    }

    pub(super) fn pulled(&mut self, home: NodeId, now: Instant) -> bool {
        self.answered(home, now, |link| link.pull_sent = None)
    }

    pub(super) fn reported(&mut self, home: NodeId, now: Instant) -> bool {
        self.answered(home, now, |link| link.report_sent = None)
    }

    fn answered(&mut self, home: NodeId, now: Instant, clear: impl FnOnce(&mut Self)) -> bool {
        if self.home() == Some(home) {
            clear(self);
            self.silent_since = None;
            return true;
        }
        // One that was left is alive after all.
        if let Some(asked) = self.asked.get_mut(&home) {
            asked.again = Some(now);
        }
        false
    }

    pub(super) fn failed(&mut self, home: NodeId, error: &TrackerError, now: Instant) {
        let asked = self.asked.entry(home).or_default();
        asked.sent = None;
        let present = self.order.get(self.at) == Some(&home);
        match error {
            // A restarted home: say again what is wanted and held.
            TrackerError::NotRegistered { .. } if present => {
                asked.again = None;
                self.registered = false;
                (self.pull_sent, self.report_sent) = (None, None);
            }
            TrackerError::NotRegistered { .. } => {}
            TrackerError::Unreachable { .. } | TrackerError::Refused { .. } | TrackerError::Overloaded => {
                asked.put_off(now);
                if present {
                    self.turn_to(self.at + 1, now);
                }
            }
        }
    }

    pub(super) fn pull_at(&mut self, at: Instant) {
        self.next_pull = at;
    }

    /// The home has this node ask again after `retry_after`.
    pub(super) fn put_off_by(&mut self, retry_after: Duration) {
        self.urgent_interval = (retry_after / URGENT_PART).clamp(PULL_INTERVAL, URGENT_INTERVAL_MAX);
    }

    /// The home names peers; that may answer what it was asked for as urgent.
    pub(super) fn names_peers(&mut self, sources: &[PieceSource], now: Instant) {
        self.told.retain(|_, at| now.saturating_duration_since(*at) < TOLD);
        if let Some(piece) = self.pull_urgent.filter(|piece| sources.iter().any(|it| it.pieces.contains(*piece))) {
            self.told.insert(piece, now);
        }
    }

    /// Whether the home has just named peers for `piece`.
    pub(super) fn told_of(&self, piece: PieceIndex, now: Instant) -> bool {
        self.told.get(&piece).is_some_and(|at| now.saturating_duration_since(*at) < TOLD)
    }

    pub(super) fn unreported(&mut self, piece: PieceIndex) {
        self.unreported.push(piece);
    }

    pub(super) fn report_soon(&mut self) {
        self.report_due = true;
    }

    /// The home, if it owes an answer.
    pub(super) fn debtor(&self) -> Option<NodeId> {
        self.home().filter(|_| self.owed_since().is_some())
    }

    /// Notes that something has come from `node`; returns since when it had been silent, if it is the home and owed an answer.
    pub(super) fn heard(&mut self, node: NodeId, now: Instant) -> Option<Instant> {
        if self.home() != Some(node) {
            return None;
        }
        let silent_since = self.silent_since();
        self.heard = Some(now);
        silent_since
    }

    /// Since when nothing has come from the present home, if it owes an answer.
    fn silent_since(&self) -> Option<Instant> {
        self.owed_since().map(|owed| self.heard.map_or(owed, |heard| heard.max(owed)))
    }

    /// When the first call was made that the present home has not answered.
    fn owed_since(&self) -> Option<Instant> {
        // Once registered, a Register that is still on its way is not waited for.
        let register = self.present().and_then(|asked| asked.sent).filter(|_| !self.registered);
        [register, self.pull_sent, self.report_sent].into_iter().flatten().min()
    }

    fn present(&self) -> Option<&Asked> {
        self.asked.get(self.order.get(self.at)?)
    }

    /// Since when nothing has come from the present home, which owes an answer. Its life counts for [`ANSWER_MAX`].
    fn waiting_since(&self) -> Option<Instant> {
        let owed = self.owed_since()?;
        Some(self.heard.map_or(owed, |heard| heard.clamp(owed, owed + ANSWER_MAX)))
    }

    /// When the present home is to be left, unless something comes from it.
    fn leave_at(&self, patience: &Patience) -> Option<Instant> {
        let first = !self.moved && self.at == 0;
        let silence = if first { SILENT_STRANGER } else { SILENT_HOME };
        Some(self.waiting_since()? + patience.with(self.home()?, silence))
    }

    /// Since when no home has answered.
    fn without_since(&self) -> Option<Instant> {
        [self.silent_since, self.waiting_since()].into_iter().flatten().min()
    }

    /// Whether a reader has waited for a home long enough.
    pub(super) fn silent(&self, patience: &Patience, now: Instant) -> bool {
        self.homeless() || self.silent_at(patience).is_some_and(|at| now >= at)
    }

    fn silent_at(&self, patience: &Patience) -> Option<Instant> {
        Some(self.without_since()? + self.stretched(SILENT_READER, patience))
    }

    /// A time that follows from [`SILENT_HOME`], as much longer as the present home is waited for longer than that.
    fn stretched(&self, time: Duration, patience: &Patience) -> Duration {
        let silence = self.home().map_or(SILENT_HOME, |home| patience.with(home, SILENT_HOME));
        time.mul_f64(silence.div_duration_f64(SILENT_HOME))
    }

    /// Whether no home has answered for so long that none will.
    pub(super) fn given_up(&self, patience: &Patience, now: Instant) -> bool {
        self.homeless() || self.given_up_at(patience).is_some_and(|at| now >= at)
    }

    fn given_up_at(&self, patience: &Patience) -> Option<Instant> {
        Some(self.silent_since? + self.stretched(GIVEN_UP, patience))
    }

    /// Leaves the present home for the one at `at` in rank, or the first.
    fn turn_to(&mut self, at: usize, now: Instant) {
        self.silent_since = self.without_since().or(Some(now));
        if let Some(left) = self.order.get(self.at) {
            let asked = self.asked.entry(*left).or_default();
            if asked.again.is_none_or(|again| again <= now) {
                asked.put_off(now);
            }
        }
        self.at = if at < self.order.len() { at } else { 0 };
        self.registered = false;
        (self.heard, self.pull_sent, self.report_sent) = (None, None, None);
        self.told.clear();
    }

    /// The homes to register with now: the present one, and those of higher rank that were left.
    fn homes_to_ask(&mut self, now: Instant) -> Vec<NodeId> {
        let registered = self.registered;
        let present = self.at;
        let candidates = self.order.iter().take(present + 1).enumerate();
        let due = candidates.filter(|(at, node)| {
            (*at < present || !registered) && self.asked.get(node).is_none_or(|asked| asked.ready(now))
        });
        let due: Vec<NodeId> = due.map(|(_, node)| *node).collect();
        for node in &due {
            self.asked.entry(*node).or_default().sent = Some(now);
        }
        due
    }

    pub(super) fn deadlines(&self, patience: &Patience, now: Instant) -> impl Iterator<Item = Instant> {
        let pull = Some(self.next_pull).filter(|_| self.registered && self.pull_sent.is_none());
        let again: Vec<Instant> = self
            .order
            .iter()
            .take(self.at + 1)
            .filter_map(|node| self.asked.get(node).filter(|asked| asked.sent.is_none())?.again)
            .collect();
        [self.leave_at(patience), self.silent_at(patience), self.given_up_at(patience), pull]
            .into_iter()
            .flatten()
            .chain(again)
            .filter(move |at| *at > now)
    }
}

impl Task {
    /// Makes the calls that are due.
    pub(super) fn drive_link(&mut self, now: Instant) {
        if self.may_judge(now) && self.link.leave_at(&self.patience).is_some_and(|at| now >= at) {
            if let Some((home, last)) = self.link.home().zip(self.link.silent_since()) {
                tracing::debug!(task = %self.id, %home, silent = ?now.saturating_duration_since(last), "the home is left");
                self.doubt(home, last, now);
            }
            self.link.turn_to(self.link.at + 1, now);
        }
        for home in self.link.homes_to_ask(now) {
            let request = RegisterRequest {
                task: self.id,
                geometry: Some(self.geometry),
                have: Some(self.have.clone()).filter(|have| !have.is_empty()),
                moved: self.link.moved || self.link.order.first() != Some(&home),
                runs: self.origin.under_way(),
            };
            if self.link.home() == Some(home) {
                // The whole bitmap goes with it.
                self.link.unreported.clear();
            }
            self.actions.push_back(Action::Register { home, request });
        }
        if let Some(home) = self.link.registered_home() {
            self.report(home, now);
            self.pull(home, now);
        }
    }

    fn report(&mut self, home: NodeId, now: Instant) {
        if self.link.report_sent.is_some() {
            return;
        }
        let renewal = self.origin.renewal(home, now);
        let done = self.is_complete() && !self.link.unreported.is_empty();
        if renewal.is_none() && !self.link.report_due && !done {
            return;
        }
        let Renewal { lease, release, pause } = renewal.unwrap_or_default();
        self.link.unreported.sort_unstable();
        let pieces = PieceRange::gather(self.link.unreported.drain(..));
        self.link.report_due = false;
        self.link.report_sent = Some(now);
        let request = ReportPieceRequest { task: self.id, lease, pieces, release, pause: Added(pause) };
        self.actions.push_back(Action::Report { home, request });
    }

    /// Runs that this task has of the registry, and one if it has asked for it.
    #[must_use]
    pub fn fetching(&self) -> usize {
        self.origin.open() + usize::from(self.link.pull_sent.is_some() && self.link.pull_may_lend)
    }

    /// Tells what [`Self::fetching`] says of this node's other tasks together.
    pub fn handle_fetching_elsewhere(&mut self, runs: usize, now: Instant) {
        self.fetching_elsewhere = runs;
        if self.held_back && self.may_fetch_more() {
            self.link.pull_at(now);
            self.advance(now);
        }
    }

    pub(super) fn may_fetch_more(&self) -> bool {
        self.fetching() + self.fetching_elsewhere < RUNS_PER_NODE
    }

    /// Whether a reader has waited a while for something that nobody offers.
    fn reader_lacks(&self, unoffered: &Bitmap, now: Instant) -> bool {
        let patience = if self.neighbours.is_empty() { ALONE } else { READER_PATIENCE };
        let waits = |waiting: &Waiting| now >= waiting.since + patience && unoffered.contains(waiting.piece);
        self.readers.values().any(waits)
    }

    fn pull(&mut self, home: NodeId, now: Instant) {
        if self.link.pull_sent.is_some() || self.is_complete() {
            return;
        }
        // What a reader needs at once does not wait for the next turn to ask.
        let urgent = self.urgent(now);
        let due = if urgent.is_some() { self.link.pulled_at + self.link.urgent_interval } else { self.link.next_pull };
        if now < due {
            return;
        }
        let wanted = self.wanted();
        let mut unoffered = wanted.clone().into_owned();
        for neighbour in self.neighbours.values().filter(|neighbour| !neighbour.paused(now)) {
            unoffered.remove_all(neighbour.offered());
        }
        // While neighbours give something they will give the rest: whoever is sent to others only stands in more lines.
        let fed = unoffered.count() < wanted.count();
        let needed = self.reader_lacks(&unoffered, now);
        self.held_back = !needed && !self.may_fetch_more();
        if self.held_back
            && self.neighbours.is_empty()
            && let Some(needed_at) =
                self.readers.values().map(|waiting| waiting.since + ALONE).min().filter(|at| *at > now)
        {
            self.link.next_pull = needed_at;
            return;
        }
        let can_fetch =
            self.origin.can_start(now) && !self.held_back && (needed || self.origin.keeps_up(self.giving_time(), now));
        if urgent.is_none() && (unoffered.is_empty() || fed && !can_fetch) {
            self.link.next_pull = now + PULL_INTERVAL;
            return;
        }
        let mut lacking = if fed { Vec::new() } else { PieceRange::gather(unoffered.iter()) };
        // What at most one neighbour offers, and does not give, is as good as lacking: the home knows whether others have it.
        if let Some(piece) = urgent.filter(|piece| self.availability[piece.0 as usize] <= 1)
            && !unoffered.contains(piece)
        {
            lacking.insert(0, PieceRange { first: piece, count: 1 });
        }
        lacking.truncate(PullPieceRequest::LACKING_MAX);
        (self.link.pull_sent, self.link.pulled_at, self.link.pull_may_lend) = (Some(now), now, can_fetch);
        self.link.pull_urgent = urgent;
        let request = PullPieceRequest {
            task: self.id,
            have: Some(self.have.clone()).filter(|have| !have.is_empty()),
            lacking,
            urgent,
            can_fetch,
            registry: Added::default(),
        };
        self.actions.push_back(Action::Pull { home, request });
    }
}

/// A report that a run owes its home.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Renewal {
    /// `None` if nothing has come that would renew it.
    pub(super) lease: Option<LeaseId>,
    pub(super) release: bool,
    /// What the registry has asked for.
    pub(super) pause: Option<Pause>,
}
