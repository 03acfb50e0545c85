//! Keeps in touch with the home of a task: registers, asks for work, reports, and moves on when it is silent.

use std::time::{Duration, Instant};

use darter_tracker::{
    LeaseId, NodeId, PieceIndex, PieceRange, PullPieceRequest, RegisterRequest, ReportPieceRequest, TrackerError,
};

use super::{Action, RunId, Task};

/// A home that owes an answer and from which nothing has come for this long is not waited for by a reader any more.
///
/// The design asks for 100 ms (D3). On a two-core machine that was busy compiling, homes took longer than that for the
/// first call, which includes a handshake, and three of eleven laboratory pulls fetched a piece or two needlessly.
pub const SILENT_READER: Duration = Duration::from_millis(250);

/// A home that owes an answer and from which nothing has come for this long is left for the next in rank (D3).
pub const SILENT_HOME: Duration = Duration::from_millis(500);

/// A home that has not answered a call for this long is left though it is alive: its link is of no use.
pub const ANSWER_MAX: Duration = Duration::from_secs(3);

/// The shortest time between two PullPiece calls that gave no lease.
pub const PULL_INTERVAL: Duration = Duration::from_millis(100);

/// The longest.
pub const PULL_INTERVAL_MAX: Duration = Duration::from_secs(2);

/// A lease is renewed this often while its bytes come; a fifth of the time after which it lapses.
pub const RENEW: Duration = Duration::from_millis(400);

/// The relation to the home.
#[derive(Debug)]
pub(super) struct Link {
    order: Vec<NodeId>,
    /// Position in `order`.
    at: usize,
    registered: bool,
    register_sent: Option<Instant>,
    /// Every home has refused or failed: none is asked before.
    register_at: Instant,
    pull_sent: Option<Instant>,
    report_sent: Option<Instant>,
    /// When something last came from the home, if that was noticed.
    heard: Option<Instant>,
    next_pull: Instant,
    /// Arrived and not reported yet.
    unreported: Vec<PieceIndex>,
    report_due: bool,
    /// Since when no home has answered; `None` while the present one does.
    silent_since: Option<Instant>,
}

impl Link {
    pub(super) fn new(order: Vec<NodeId>, now: Instant) -> Self {
        Self {
            order,
            at: 0,
            registered: false,
            register_sent: None,
            register_at: now,
            pull_sent: None,
            report_sent: None,
            heard: None,
            next_pull: now,
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

    pub(super) fn set_order(&mut self, order: Vec<NodeId>, now: Instant) {
        let current = self.home();
        self.order = order;
        match self.order.iter().position(|node| Some(*node) == current) {
            Some(at) => self.at = at,
            None => self.turn_to(0, now),
        }
    }

    /// Notes an answer to Register; tells whether it came from the present home.
    pub(super) fn registered(&mut self, home: NodeId, now: Instant) -> bool {
        if self.home() != Some(home) {
            return false;
        }
        self.register_sent = None;
        self.registered = true;
        self.silent_since = None;
        self.next_pull = now;
        true
    }

    pub(super) fn pulled(&mut self, home: NodeId, now: Instant) -> bool {
        self.answered(home, now, |link| link.pull_sent = None)
    }

    pub(super) fn reported(&mut self, home: NodeId, now: Instant) -> bool {
        self.answered(home, now, |link| link.report_sent = None)
    }

    fn answered(&mut self, home: NodeId, _now: Instant, clear: impl FnOnce(&mut Self)) -> bool {
        let current = self.home() == Some(home);
        if current {
            clear(self);
            self.silent_since = None;
        }
        current
    }

    pub(super) fn failed(&mut self, home: NodeId, error: &TrackerError, now: Instant) {
        if self.home() != Some(home) {
            return;
        }
        match error {
            // A restarted home: say again what is wanted and held.
            TrackerError::NotRegistered { .. } => {
                self.registered = false;
                (self.register_sent, self.pull_sent, self.report_sent) = (None, None, None);
            }
            TrackerError::Unreachable { .. } | TrackerError::Refused { .. } | TrackerError::Overloaded => {
                if self.at + 1 >= self.order.len() {
                    // This node's own home answers at once, so asking it round and round would use a core.
                    self.register_at = now + PULL_INTERVAL_MAX;
                }
                self.turn_to(self.at + 1, now);
            }
        }
    }

    pub(super) fn pull_at(&mut self, at: Instant) {
        self.next_pull = at;
    }

    pub(super) fn unreported(&mut self, piece: PieceIndex) {
        self.unreported.push(piece);
    }

    pub(super) fn report_soon(&mut self) {
        self.report_due = true;
    }

    /// The home, if it owes an answer.
    pub(super) fn debtor(&self) -> Option<NodeId> {
        self.home().filter(|_| self.asked().is_some())
    }

    /// Notes that something has come from `node`.
    pub(super) fn heard(&mut self, node: NodeId, now: Instant) {
        if self.home() == Some(node) {
            self.heard = Some(now);
        }
    }

    /// When the first call was made that the present home has not answered.
    fn asked(&self) -> Option<Instant> {
        [self.register_sent, self.pull_sent, self.report_sent].into_iter().flatten().min()
    }

    /// Since when nothing has come from the present home, which owes an answer. Its life counts for [`ANSWER_MAX`].
    fn waiting_since(&self) -> Option<Instant> {
        let asked = self.asked()?;
        Some(self.heard.map_or(asked, |heard| heard.clamp(asked, asked + ANSWER_MAX)))
    }

    /// Whether a reader has waited for a home long enough.
    pub(super) fn silent(&self, now: Instant) -> bool {
        let since = [self.silent_since, self.waiting_since()].into_iter().flatten().min();
        self.homeless() || since.is_some_and(|since| now >= since + SILENT_READER)
    }

    /// Whether one home at least has been waited for in vain and none has answered since.
    pub(super) fn given_up(&self, now: Instant) -> bool {
        self.homeless() || self.silent_since.is_some_and(|since| now >= since + SILENT_HOME)
    }

    fn turn_to(&mut self, at: usize, now: Instant) {
        self.silent_since = self.silent_since.or(self.waiting_since()).or(Some(now));
        self.at = if at < self.order.len() { at } else { 0 };
        self.registered = false;
        self.heard = None;
        (self.register_sent, self.pull_sent, self.report_sent) = (None, None, None);
    }

    pub(super) fn deadlines(&self, now: Instant) -> impl Iterator<Item = Instant> {
        let waiting = self.waiting_since();
        let pull = Some(self.next_pull).filter(|_| self.registered && self.pull_sent.is_none());
        let register = Some(self.register_at).filter(|_| !self.registered && self.register_sent.is_none());
        [waiting.map(|since| since + SILENT_READER), waiting.map(|since| since + SILENT_HOME), pull, register]
            .into_iter()
            .flatten()
            .filter(move |at| *at > now)
    }
}

impl Task {
    /// Makes the calls that are due.
    pub(super) fn drive_link(&mut self, now: Instant) {
        if self.may_judge(now) && self.link.waiting_since().is_some_and(|since| now >= since + SILENT_HOME) {
            self.link.turn_to(self.link.at + 1, now);
        }
        let Some(home) = self.link.home() else { return };
        if !self.link.registered {
            if self.link.register_sent.is_none() && now >= self.link.register_at {
                self.link.register_sent = Some(now);
                // The whole bitmap goes with it.
                self.link.unreported.clear();
                let request = RegisterRequest {
                    task: self.id,
                    geometry: Some(self.geometry),
                    have: Some(self.have.clone()).filter(|have| !have.is_empty()),
                };
                self.actions.push_back(Action::Register { home, request });
            }
            return;
        }
        self.report(home, now);
        self.pull(home, now);
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
        let (run, lease, release) = match renewal {
            Some(renewal) => (Some(renewal.run), Some(renewal.lease), renewal.release),
            None => (None, None, false),
        };
        self.link.unreported.sort_unstable();
        let pieces = PieceRange::gather(self.link.unreported.drain(..));
        self.link.report_due = false;
        self.link.report_sent = Some(now);
        let request = ReportPieceRequest { task: self.id, lease, pieces, release };
        self.actions.push_back(Action::Report { home, run, request });
    }

    fn pull(&mut self, home: NodeId, now: Instant) {
        if self.link.pull_sent.is_some() || now < self.link.next_pull || self.is_complete() {
            return;
        }
        let urgent = self.urgent(now);
        let wanted = self.wanted();
        let mut lacking = PieceRange::gather(wanted.iter().filter(|piece| !self.offered(*piece, now)));
        if lacking.is_empty() && urgent.is_none() {
            self.link.next_pull = now + PULL_INTERVAL;
            return;
        }
        lacking.truncate(PullPieceRequest::LACKING_MAX);
        self.link.pull_sent = Some(now);
        let request = PullPieceRequest {
            task: self.id,
            have: Some(self.have.clone()).filter(|have| !have.is_empty()),
            lacking,
            urgent,
            can_fetch: self.origin.can_start(now),
        };
        self.actions.push_back(Action::Pull { home, request });
    }

    /// Whether a neighbour that is not left alone at present offers a piece.
    fn offered(&self, piece: PieceIndex, now: Instant) -> bool {
        self.neighbours.values().any(|neighbour| neighbour.has(piece) && !neighbour.paused(now))
    }
}

/// A report that a run owes its home.
#[derive(Clone, Copy, Debug)]
pub(super) struct Renewal {
    pub(super) run: RunId,
    pub(super) lease: LeaseId,
    pub(super) release: bool,
}
