//! What foca wants to be told later, in the order that it asks for: by deadline, then by kind, so that a probe that
//! is due together with its own end comes first even when the driver lags.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use foca::Timer;

use super::identity::Identity;

/// A queue of timers. Its size is bounded by what foca schedules: a few per period and one per suspect or dead member.
#[derive(Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, Timer<Identity>, u64)>>,
    /// Keeps equal ones in the order they came, which a heap would not.
    pushed: u64,
}

impl Timers {
    pub(super) fn push(&mut self, at: Instant, timer: Timer<Identity>) {
        self.pushed += 1;
        self.heap.push(Reverse((at, timer, self.pushed)));
    }

    /// The next timer that is due.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Timer<Identity>> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse((_, timer, _))| timer)
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((at, ..))| *at)
    }
}
