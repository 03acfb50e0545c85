//! What is going to happen, in order.

use std::collections::BinaryHeap;

use super::event::Event;

/// Nanoseconds since the beginning.
pub type Nanos = u64;

/// A millisecond.
pub const MILLISECOND: Nanos = 1_000_000;

/// A second.
pub const SECOND: Nanos = 1000 * MILLISECOND;

/// The events to come. Of those for the same moment the one that was put in first comes first.
#[derive(Default)]
pub struct Agenda {
    entries: BinaryHeap<Entry>,
    made: u64,
}

struct Entry {
    at: Nanos,
    number: u64,
    event: Event,
}

impl Agenda {
    /// Puts an event in.
    pub fn put(&mut self, at: Nanos, event: Event) {
        self.made += 1;
        self.entries.push(Entry { at, number: self.made, event });
    }

    /// Takes the next event out.
    pub fn take(&mut self) -> Option<(Nanos, Event)> {
        self.entries.pop().map(|entry| (entry.at, entry.event))
    }

    /// How many events were put in so far.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.made
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // The heap gives the greatest first.
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Entry {}
