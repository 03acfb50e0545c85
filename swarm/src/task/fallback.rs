//! The one place that decides that a reader has waited long enough (D11).
//!
//! Everything that waits on a peer has a budget; when it is spent, the registry serves the piece that the reader needs
//! next, as an urgent lease from the home or, if no home answers, on this node's own decision. Waiting for a lease that
//! makes progress is no stall: the home says so by answering Wait.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use darter_tracker::{ErrorKind, NodeId, PieceIndex, PieceRange};

use super::link::SILENT_READER;
use super::neighbour::Neighbour;
use super::pick::READER_PATIENCE;
use super::{Action, Fallback, Task, Waiting};

/// A reader that waits this long for one piece has it asked for as urgent.
pub const READER_BUDGET: Duration = Duration::from_millis(500);

/// A reader that has waited this long for a piece that peers offer and do not give complains of them, so that the home lends it
/// the piece. They may be alive, and busy with others or with nobody: a peer can say so for ever.
pub const STRANDED: Duration = Duration::from_secs(10);

/// While a reader waits so, it is looked at this often; one that was not looked at for twice as long counts from anew, since this
/// node was held up itself.
const LOOK: Duration = Duration::from_secs(1);

/// Readers that wait for what somebody offers.
#[derive(Debug, Default)]
pub(super) struct Stranded {
    /// The pieces, and since when they are offered and waited for.
    since: BTreeMap<PieceIndex, Instant>,
    looked: Option<Instant>,
}

impl Stranded {
    /// Those that are waited for now; returns the ones that have been for [`STRANDED`], whose time begins again.
    fn look(&mut self, awaited: impl Iterator<Item = PieceIndex>, now: Instant) -> Vec<PieceIndex> {
        let held_up = self.looked.replace(now).is_some_and(|at| now.saturating_duration_since(at) > LOOK * 2);
        let before = std::mem::take(&mut self.since);
        let since = |piece: &PieceIndex| before.get(piece).copied().filter(|_| !held_up).unwrap_or(now);
        self.since = awaited.map(|piece| (piece, since(&piece))).collect();
        let overdue = |at: &Instant| now.saturating_duration_since(*at) >= STRANDED;
        let overdue: Vec<PieceIndex> =
            self.since.iter().filter(|(_, at)| overdue(at)).map(|(piece, _)| *piece).collect();
        for piece in &overdue {
            self.since.insert(*piece, now);
        }
        overdue
    }

    /// When to look again.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let next = self.looked? + LOOK;
        (!self.since.is_empty()).then_some(next).filter(|at| *at > now)
    }
}

/// What is done for a reader now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It has the piece, or somebody is about to deliver it.
    Nothing,
    /// The peer that was asked is slow: ask a second one.
    Hedge,
    /// Nobody delivers, but a home answers: ask it for an urgent lease.
    Urgent,
    /// Nobody delivers and no home answers: go to the registry.
    Alone,
}

/// When a reader that waits since `since` may need something else.
pub(super) fn deadlines(since: Instant, now: Instant) -> impl Iterator<Item = Instant> {
    [since + SILENT_READER, since + READER_BUDGET].into_iter().filter(move |at| *at > now)
}

impl Task {
    /// What a reader needs that it does not get.
    fn need(&self, waiting: &Waiting, now: Instant) -> Need {
        let piece = waiting.piece;
        let waited = now.saturating_duration_since(waiting.since);
        if self.have.contains(piece) || self.origin.covers(piece) || !self.may_judge(now) {
            return Need::Nothing;
        }
        let asked: Vec<_> = self.neighbours.values().filter(|neighbour| neighbour.asked(piece)).collect();
        if !asked.is_empty() {
            // A second one is asked of a slow peer, a third only when both are silent.
            let late = |neighbour: &&Neighbour| match asked.len() {
                1 => neighbour.slow(piece, now),
                _ => neighbour.silent(piece, now),
            };
            return if asked.iter().all(late) { Need::Hedge } else { Need::Nothing };
        }
        if waited >= SILENT_READER && self.link.silent(&self.patience, now) {
            return Need::Alone;
        }
        if waited >= READER_BUDGET { Need::Urgent } else { Need::Nothing }
    }

    /// The piece to ask the home for as urgent: not one that a peer can give whom it has just named.
    pub(super) fn urgent(&self, now: Instant) -> Option<PieceIndex> {
        let urgent = |waiting: &&Waiting| {
            self.need(waiting, now) == Need::Urgent
                && !(self.link.told_of(waiting.piece, now) && self.offered(waiting.piece, now))
        };
        self.waiting().iter().find(urgent).map(|waiting| waiting.piece)
    }

    /// Whether somebody offers `piece` who has not failed.
    fn offered(&self, piece: PieceIndex, now: Instant) -> bool {
        self.neighbours.values().any(|neighbour| neighbour.has(piece) && !neighbour.paused(now))
    }

    /// What is waited for and not held, once however many readers do, as long as the first of them.
    fn waiting(&self) -> Vec<Waiting> {
        let mut first: BTreeMap<PieceIndex, Instant> = BTreeMap::new();
        for waiting in self.readers.values().filter(|waiting| !self.have.contains(waiting.piece)) {
            let since = first.entry(waiting.piece).or_insert(waiting.since);
            *since = waiting.since.min(*since);
        }
        first.into_iter().map(|(piece, since)| Waiting { piece, since }).collect()
    }

    /// Does what readers need at once.
    pub(super) fn drive_fallback(&mut self, now: Instant) {
        if self.link.homeless() {
            return self.fetch_all(now);
        }
        self.give_up_the_idle(now);
        for waiting in self.waiting() {
            match self.need(&waiting, now) {
                Need::Nothing | Need::Urgent => {}
                Need::Hedge if !self.hedge(waiting.piece, now) && self.link.silent(&self.patience, now) => {
                    self.go_alone(waiting.piece, now)
                }
                Need::Hedge => {}
                Need::Alone => self.go_alone(waiting.piece, now),
            }
        }
    }

    /// Complains where a reader has waited too long for what is offered. Whoever is named after that has as long.
    fn give_up_the_idle(&mut self, now: Instant) {
        if !self.may_judge(now) {
            return;
        }
        let mut awaited: Vec<PieceIndex> = self.waiting().into_iter().map(|waiting| waiting.piece).collect();
        awaited.retain(|piece| self.availability[piece.0 as usize] > 0);
        for piece in self.stranded.look(awaited.into_iter(), now) {
            self.complain(piece, now);
        }
    }

    /// Gives up everybody who offers a piece and has not given it: what they offer counts again when the home names them.
    fn complain(&mut self, piece: PieceIndex, now: Instant) {
        // Not those who may have got it just now.
        let idle = |neighbour: &Neighbour| {
            neighbour.has(piece) && neighbour.news().is_some_and(|news| now >= news + STRANDED / 5)
        };
        let offering: Vec<NodeId> =
            self.neighbours.iter().filter(|(_, neighbour)| idle(neighbour)).map(|(peer, _)| *peer).collect();
        for peer in offering {
            let Some(neighbour) = self.neighbours.get_mut(&peer) else { continue };
            if neighbour.fail_turn(Some(ErrorKind::Unreachable), now, &mut self.rng) {
                self.unanswered += 1;
                self.actions.push_back(Action::Decline { peer });
            }
            let asked: Vec<PieceIndex> = neighbour.requested().collect();
            for asked in &asked {
                neighbour.fail(*asked, Some(ErrorKind::Unreachable), now, &mut self.rng);
                self.actions.push_back(Action::Cancel { peer, piece: *asked });
            }
            for asked in asked {
                self.want_again(asked);
            }
            let offered = self.forget_offers(peer);
            if self.link.registered_home() == Some(peer) {
                // A home does not avoid itself: what it does not give is off its list, and lent.
                let missing = offered.into_iter().filter(|piece| !self.have.contains(*piece));
                let pieces = PieceRange::gather(missing);
                self.blame(peer, pieces, ErrorKind::NotFound);
            } else {
                self.blame(peer, vec![PieceRange { first: piece, count: 1 }], ErrorKind::Unreachable);
            }
        }
    }

    /// Asks others for a turn that have a piece, to take it when that comes; tells whether any does, or was asked already. Without
    /// room one is asked now and then, so that a turn may meet the next place.
    fn hedge(&mut self, piece: PieceIndex, now: Instant) -> bool {
        let gives = |neighbour: &Neighbour| neighbour.has(piece) && !neighbour.asked(piece);
        let ready = |neighbour: &Neighbour| gives(neighbour) && neighbour.ready(now);
        let asked = self.neighbours.values().any(|neighbour| gives(neighbour) && neighbour.is_in_line());
        let others: Vec<_> =
            self.neighbours.iter().filter(|(_, neighbour)| ready(neighbour)).map(|(peer, _)| *peer).collect();
        let lately = |peer: &NodeId| {
            let asked_at = self.neighbours.get(peer).and_then(Neighbour::asked_at);
            asked_at.is_some_and(|at| now.saturating_duration_since(at) < READER_PATIENCE)
        };
        let ask: Vec<NodeId> = match self.is_starved() {
            true if asked => Vec::new(),
            true => others.iter().copied().find(|peer| !lately(peer)).into_iter().collect(),
            false => others.clone(),
        };
        ask.into_iter().for_each(|peer| self.ask(peer, now));
        asked || !others.is_empty()
    }

    /// Begins a run without a lease at `piece`; it is read only while no home answers.
    ///
    /// While one home is merely late the run is a single piece, and each further one costs the reader its wait: a home
    /// that freezes must not make every member fetch everything. Once it has been given up the run is what is left.
    fn go_alone(&mut self, piece: PieceIndex, now: Instant) {
        if !self.origin.may_ask(now) {
            return;
        }
        let length = if self.link.given_up(&self.patience, now) { self.geometry.pieces() } else { 1 };
        let count = (piece.0..self.geometry.pieces())
            .map(PieceIndex)
            .take(length as usize)
            .take_while(|next| !self.have.contains(*next) && !self.coming(*next))
            .count() as u32;
        if count == 0 {
            // A neighbour was asked and is slow: the registry is asked for this one piece as well.
            return self.begin_alone(PieceRange { first: piece, count: 1 }, Fallback::PeersSlow, now);
        }
        self.begin_alone(PieceRange { first: piece, count }, Fallback::HomeSilent, now);
    }

    /// Without any home, what is missing is fetched run by run, from where a reader waits or from the first gap on.
    fn fetch_all(&mut self, now: Instant) {
        if !self.origin.idle() || !self.origin.may_ask(now) {
            return;
        }
        let awaited = self.waiting().first().map(|waiting| waiting.piece);
        let Some(first) = awaited.or_else(|| self.have.missing().next()) else { return };
        let gap = (first.0..self.geometry.pieces()).take_while(|piece| !self.have.contains(PieceIndex(*piece)));
        let pieces = PieceRange { first, count: gap.count() as u32 };
        let actions = self.origin.start(None, pieces, now);
        self.actions.extend(actions);
    }

    fn begin_alone(&mut self, pieces: PieceRange, why: Fallback, now: Instant) {
        self.actions.push_back(Action::CountFallback(why));
        let actions = self.origin.start(None, pieces, now);
        self.actions.extend(actions);
    }
}
