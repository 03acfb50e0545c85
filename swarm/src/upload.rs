//! Whom to serve: a few pieces at a time, a short queue, the neediest first, and an honest "busy" beyond that.
//!
//! Sharing an uplink between many uploads delays the first copy of every piece, and a piece cannot be passed on before
//! it is whole (4 at a time cost 8 % of the time of a cold pull, 8 cost 20 %).

use std::collections::BTreeMap;

use darter_tracker::{NodeId, TaskId};

/// Uploads at a time for one task.
pub const ACTIVE_PER_TASK: usize = 2;

/// Uploads at a time for all tasks, since they share the link: each layer of an image is a task of its own. Also bounds
/// memory to this many pieces.
pub const ACTIVE_TOTAL: usize = 4;

/// Requests that wait, per task.
pub const QUEUE_PER_TASK: usize = 2;

/// Names a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Serve it now; call [`Uploads::finish`] afterwards.
    Serve(Ticket),
    /// It waits; [`Uploads::finish`] of another names it when its turn has come.
    Queued(Ticket),
    /// Refuse it.
    Busy,
}

/// The uploads of this node.
#[derive(Debug, Default)]
pub struct Uploads {
    next: u64,
    active: BTreeMap<Ticket, TaskId>,
    queue: BTreeMap<Ticket, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    task: TaskId,
    peer: NodeId,
    /// Pieces that the peer holds: the fewer, the needier.
    holds: u32,
}

impl Uploads {
    /// A peer that holds `holds` pieces asks for one of `task`.
    pub fn request(&mut self, task: TaskId, peer: NodeId, holds: u32) -> Admission {
        self.next += 1;
        let ticket = Ticket(self.next);
        if self.slot(&task) {
            self.active.insert(ticket, task);
            return Admission::Serve(ticket);
        }
        let queued = self.queue.values().filter(|waiting| waiting.task == task);
        if queued.clone().count() >= QUEUE_PER_TASK || queued.clone().any(|waiting| waiting.peer == peer) {
            return Admission::Busy;
        }
        self.queue.insert(ticket, Waiting { task, peer, holds });
        Admission::Queued(ticket)
    }

    /// A request is over, whether it was being served or waited; returns those whose turn has come.
    pub fn finish(&mut self, ticket: Ticket) -> Vec<Ticket> {
        self.active.remove(&ticket);
        self.queue.remove(&ticket);
        let mut turn = Vec::new();
        while let Some((next, task)) = self
            .queue
            .iter()
            .filter(|(_, waiting)| self.slot(&waiting.task))
            .min_by_key(|(ticket, waiting)| (waiting.holds, **ticket))
            .map(|(ticket, waiting)| (*ticket, waiting.task))
        {
            self.queue.remove(&next);
            self.active.insert(next, task);
            turn.push(next);
        }
        turn
    }

    /// Uploads in progress.
    #[must_use]
    pub fn active(&self) -> usize {
        self.active.len()
    }

    fn slot(&self, task: &TaskId) -> bool {
        self.active.len() < ACTIVE_TOTAL && self.active.values().filter(|of| *of == task).count() < ACTIVE_PER_TASK
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_tracker::Digest;

    #[test]
    fn the_neediest_waits_least_and_the_rest_are_told() {
        let task = TaskId::blob(Digest::Sha256([1; 32]));
        let other = TaskId::blob(Digest::Sha256([2; 32]));
        let peer = |byte| NodeId::from_bytes([byte; 16]);
        let mut uploads = Uploads::default();
        let Admission::Serve(first) = uploads.request(task, peer(1), 5) else { panic!("the first is served") };
        assert!(matches!(uploads.request(task, peer(2), 5), Admission::Serve(_)));
        let Admission::Queued(rich) = uploads.request(task, peer(3), 9) else { panic!("the third waits") };
        let Admission::Queued(poor) = uploads.request(task, peer(4), 1) else { panic!("the fourth waits") };
        assert_eq!(uploads.request(task, peer(5), 0), Admission::Busy);
        assert!(matches!(uploads.request(other, peer(5), 0), Admission::Serve(_)), "another task has its own slots");
        assert_eq!(uploads.finish(first), vec![poor]);
        assert_eq!(uploads.finish(rich), vec![], "one that gave up takes no slot");
        assert_eq!(uploads.finish(poor), vec![]);
        assert_eq!(uploads.active(), 2);
    }
}
