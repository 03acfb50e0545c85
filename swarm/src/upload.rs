//! Whom to serve: a few pieces at a time, whose turn it is next, and which piece is named with it.
//!
//! Who wants something of a task waits in line, and says which piece only when it is offered its turn: by then it knows what it
//! lacks, and nothing that it might get elsewhere waits for a busy link. Tasks take turns; of those who want the same, the
//! neediest comes first. Were the neediest of all tasks first, an image's last layers, of which nobody holds much yet, would keep
//! its first ones from their end: their last pieces stayed with one holder for over fifteen seconds, until others who waited
//! fetched them again (16 nodes at 25 Mb/s: 1.02 to 1.04 copies instead of 1.00 to 1.01).

mod slots;

use std::collections::BTreeMap;
use std::time::Duration;

use darter_tracker::{NodeId, PieceIndex, TaskId};

use slots::Slots;

/// Uploads at a time, at most, for all tasks, since they share the link. Also bounds memory to this many pieces. With fewer the link is idle
/// when a receiver is slow; with more each piece arrives later, and cannot be passed on before it is whole (simulated with 100
/// nodes on equal links: 2 at a time cost 26 % of the time, 3 cost 7 %; what [`crate::intake`] takes goes along).
pub const ACTIVE: usize = 4;

/// Turns that are offered, or taken and not begun, beyond the uploads in progress: while one piece leaves the next is asked for,
/// so that the link is never idle for a round trip.
pub const AHEAD: usize = 1;

/// Peers that wait in line, per task: all neighbours, and some whom the home has sent.
pub const QUEUE_PER_TASK: usize = 64;

/// How long an offered turn is kept for a peer that does not say what it wants, since it is dead or frozen. Whoever owns the line
/// gives it to the next then. An answer may be on its way through a crowded link for long: where it takes longer than this, no
/// turn is ever taken.
pub const OFFER_MAX: Duration = Duration::from_secs(2);

/// Names a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What is to be done next for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Its turn has come: let the peer say which piece, then call [`Uploads::take`]; [`Uploads::finish`] if it wants none.
    Offer(Ticket),
    /// Serve what it has said; call [`Uploads::finish`] afterwards.
    Serve(Ticket),
}

/// The uploads of this node.
#[derive(Debug, Default)]
pub struct Uploads {
    next: u64,
    requests: BTreeMap<Ticket, Request>,
    /// The number of the last turn that was offered for each task of which somebody wants something; at first that of any task's, so
    /// that one that comes again and again does not come before the others.
    offered: BTreeMap<TaskId, u64>,
    /// Turns that were offered.
    offers: u64,
    slots: Slots,
}

#[derive(Debug)]
struct Request {
    task: TaskId,
    peer: NodeId,
    /// Pieces that the peer holds: the fewer, the needier.
    holds: u32,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Offered,
    /// It has said which piece, and waits for an upload to end.
    Ready,
    Active,
}

impl Uploads {
    /// A peer that holds `holds` pieces of `task` wants one; `None` is "busy": the line is full, or it waits already.
    pub fn request(&mut self, task: TaskId, peer: NodeId, holds: u32) -> Option<(Ticket, Vec<Step>)> {
        let waiting = || self.of(task).filter(|request| request.state == State::Waiting);
        if waiting().count() >= QUEUE_PER_TASK || waiting().any(|request| request.peer == peer) {
            return None;
        }
        self.next += 1;
        let ticket = Ticket(self.next);
        self.requests.insert(ticket, Request { task, peer, holds, state: State::Waiting });
        self.offered.entry(task).or_insert(self.offers);
        Some((ticket, self.proceed()))
    }

    /// The peer has said which piece it wants. Empty if it was not its turn, or if it has to wait for an upload to end.
    pub fn take(&mut self, ticket: Ticket) -> Vec<Step> {
        match self.requests.get_mut(&ticket) {
            Some(request) if request.state == State::Offered => request.state = State::Ready,
            _ => return Vec::new(),
        }
        self.proceed()
    }

    /// A request is over, whether it was being served or waited; returns what follows for others.
    pub fn finish(&mut self, ticket: Ticket) -> Vec<Step> {
        if let Some(request) = self.requests.remove(&ticket)
            && self.of(request.task).next().is_none()
        {
            self.offered.remove(&request.task);
        }
        self.proceed()
    }

    /// A piece of so many bytes has left, so long after it began to. `gets` is what comes to this node meanwhile, in bytes per
    /// second, as [`crate::intake`] knows it.
    pub fn gave(&mut self, bytes: u32, took: Duration, gets: Option<u64>) {
        self.slots.gave(bytes, took, gets);
    }

    /// How many may be in progress at present.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots.allowed()
    }

    /// Uploads in progress.
    #[must_use]
    pub fn active(&self) -> usize {
        self.requests.values().filter(|request| request.state == State::Active).count()
    }

    fn of(&self, task: TaskId) -> impl Iterator<Item = &Request> {
        self.requests.values().filter(move |request| request.task == task)
    }

    /// Fills slots: first with those who have said what they want, then by offering turns.
    fn proceed(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        while self.active() < self.slots.allowed()
            && let Some(ticket) = self.foremost(State::Ready)
        {
            self.set(ticket, State::Active);
            steps.push(Step::Serve(ticket));
        }
        while self.placed() < self.slots.allowed() + AHEAD
            && let Some(ticket) = self.foremost(State::Waiting)
        {
            self.set(ticket, State::Offered);
            self.offers += 1;
            if let Some(request) = self.requests.get(&ticket) {
                self.offered.insert(request.task, self.offers);
            }
            steps.push(Step::Offer(ticket));
        }
        steps
    }

    /// Requests that do more than wait in line.
    fn placed(&self) -> usize {
        self.requests.values().filter(|request| request.state != State::Waiting).count()
    }

    fn set(&mut self, ticket: Ticket, state: State) {
        if let Some(request) = self.requests.get_mut(&ticket) {
            request.state = state;
        }
    }

    /// The neediest of the task that has waited longest for a turn.
    fn foremost(&self, state: State) -> Option<Ticket> {
        let candidates = self.requests.iter().filter(|(_, request)| request.state == state);
        let last = |request: &Request| self.offered.get(&request.task).copied().unwrap_or_default();
        candidates.min_by_key(|(ticket, request)| (last(request), request.holds, **ticket)).map(|(ticket, _)| *ticket)
    }
}

/// What one node alone has of a task, and which of it to name to whoever is offered a turn. Those who are offered turns do not know
/// of each other: where each takes one of the rarest at random, many take the same (of thirteen the last is to be expected on the
/// forty-first turn). Simulated with 16 nodes: 1.062 instead of 1.091 times the bound.
#[derive(Debug, Default)]
pub struct Unshared {
    /// On how many turns each was named.
    named: BTreeMap<PieceIndex, u32>,
}

impl Unshared {
    /// Pieces that are looked at: more than turns that are offered or served at a time, so that each of those names another.
    pub const PIECES_MAX: usize = 32;

    /// These are the pieces now, in their order.
    pub fn set(&mut self, pieces: impl Iterator<Item = PieceIndex> + Clone) {
        // Asked after every event, and seldom another.
        if self.named.keys().copied().eq(pieces.clone()) {
            return;
        }
        let named = |piece| (piece, self.named.get(&piece).copied().unwrap_or_default());
        self.named = pieces.map(named).collect();
    }

    /// The piece to name on the next turn: the one that was named least.
    pub fn name(&mut self) -> Option<PieceIndex> {
        let (piece, named) = self.named.iter_mut().min_by_key(|(_, named)| **named)?;
        *named += 1;
        Some(*piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_tracker::Digest;

    fn task(byte: u8) -> TaskId {
        TaskId::blob(Digest::Sha256([byte; 32]))
    }

    fn peer(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 16])
    }

    #[test]
    fn turns_go_to_the_neediest_and_few_pieces_leave_at_a_time() {
        let mut uploads = Uploads::default();
        let ask = |uploads: &mut Uploads, number: u8, holds| uploads.request(task(1), peer(number), holds).unwrap();
        let first: Vec<Ticket> = (0..ACTIVE as u8)
            .map(|number| {
                let (ticket, steps) = ask(&mut uploads, number, 5);
                assert_eq!(steps, [Step::Offer(ticket)]);
                assert_eq!(uploads.take(ticket), [Step::Serve(ticket)]);
                ticket
            })
            .collect();
        let (ahead, steps) = ask(&mut uploads, 100, 5);
        assert_eq!(steps, [Step::Offer(ahead)], "one more says what it wants meanwhile");
        let (rich, steps) = ask(&mut uploads, 101, 9);
        assert_eq!(steps, [], "its turn has not come");
        let (poor, _) = ask(&mut uploads, 102, 1);
        assert_eq!(uploads.request(task(1), peer(102), 0), None, "it waits already");
        assert_eq!(uploads.take(ahead), [], "enough are being served");
        assert_eq!(uploads.take(rich), [], "it was not offered anything");
        assert_eq!(uploads.finish(first[0]), [Step::Serve(ahead), Step::Offer(poor)]);
        assert_eq!(uploads.finish(poor), [Step::Offer(rich)], "who wants nothing any more leaves its turn to the next");
        assert_eq!(uploads.active(), ACTIVE);
    }

    #[test]
    fn who_has_nothing_of_one_task_does_not_keep_others_from_the_end_of_another() {
        let mut uploads = Uploads::default();
        let mut ask = |number: u8, of, holds| uploads.request(task(of), peer(number), holds).unwrap();
        let (first, _) = ask(0, 1, 60);
        for number in 1..=10 {
            ask(number, 1, 60);
            ask(number, 2, 0);
        }
        let mut served = BTreeMap::<TaskId, usize>::new();
        let mut steps = uploads.take(first);
        while let Some(step) = steps.pop() {
            let (Step::Offer(ticket) | Step::Serve(ticket)) = step;
            if matches!(step, Step::Offer(_)) {
                *served.entry(uploads.requests[&ticket].task).or_default() += 1;
            }
            steps.extend(uploads.finish(ticket));
            if served.values().sum::<usize>() == 10 {
                break;
            }
        }
        assert_eq!(served.into_values().collect::<Vec<_>>(), [5, 5]);
        assert_eq!(uploads.offered.len(), 2);
        let left: Vec<Ticket> = uploads.requests.keys().copied().collect();
        left.into_iter().for_each(|ticket| drop(uploads.finish(ticket)));
        assert!(uploads.offered.is_empty(), "what nobody wants is forgotten");
    }

    #[test]
    fn tasks_that_come_again_as_soon_as_they_are_served_leave_turns_to_others() {
        let mut uploads = Uploads::default();
        let mut steps = Vec::new();
        // One of each of the first tasks, and many of the last, who hold more.
        for number in 1..=20 {
            steps.extend(uploads.request(task(number), peer(number), 0).unwrap().1);
            steps.extend(uploads.request(task(99), peer(number), 60).unwrap().1);
        }
        let mut turns = [0; 2];
        while turns[0] + turns[1] < 210 {
            let step = steps.remove(0);
            let (Step::Offer(ticket) | Step::Serve(ticket)) = step;
            let Request { task, peer, holds, .. } = uploads.requests[&ticket];
            turns[usize::from(holds > 0)] += 1;
            steps.extend(uploads.finish(ticket));
            steps.extend(uploads.request(task, peer, holds).unwrap().1);
        }
        // Of 21 tasks four or five have their turn at the moment, and the others wait for the next.
        assert!((10..=15).contains(&turns[1]), "one in 16: {turns:?}");
    }

    #[test]
    fn what_one_alone_has_is_named_to_one_after_the_other() {
        let mut unshared = Unshared::default();
        let mut name = |pieces: &[u32]| {
            unshared.set(pieces.iter().copied().map(PieceIndex));
            unshared.name().map(|piece| piece.0)
        };
        assert_eq!(name(&[]), None);
        assert_eq!([name(&[3, 5]), name(&[3, 5]), name(&[3, 5])], [Some(3), Some(5), Some(3)]);
        assert_eq!(name(&[3, 5, 9]), Some(9), "what is new was not named yet");
        assert_eq!([name(&[3, 5, 9]), name(&[3, 9]), name(&[3, 9])], [Some(5), Some(9), Some(3)]);
        assert_eq!(name(&[]), None, "somebody has it");
        assert_eq!(name(&[5, 9]), Some(5));
    }

    #[test]
    fn tasks_share_the_link_and_the_line_is_bounded() {
        let mut uploads = Uploads::default();
        let mut offered = 0;
        for number in 0..QUEUE_PER_TASK as u8 {
            for of in 1..=3 {
                let (_, steps) = uploads.request(task(of), peer(number), 0).unwrap();
                offered += steps.len();
            }
        }
        assert_eq!(offered, ACTIVE + AHEAD);
        let more =
            (0..=QUEUE_PER_TASK as u8).take_while(|number| uploads.request(task(1), peer(100 + number), 0).is_some());
        assert_eq!(more.count() + QUEUE_PER_TASK - 2, QUEUE_PER_TASK, "two of this task were offered a turn");
    }
}
