//! What is going to happen, in order.
//!
//! Ten thousand nodes have a million events before them, most of them within milliseconds: one heap of all spends its time waiting
//! for memory. So only those of the present moment lie in a heap, those of the next moments in a ring of lists, and the few that
//! are further away in a heap of their own.

use std::collections::BinaryHeap;

use super::event::Event;

/// Nanoseconds since the beginning.
pub type Nanos = u64;

/// A millisecond.
pub const MILLISECOND: Nanos = 1_000_000;

/// A second.
pub const SECOND: Nanos = 1000 * MILLISECOND;

/// A moment is 2^15 ns, 33 us: with ten thousand nodes some hundred events.
const MOMENT_BITS: u32 = 15;

/// Moments of the ring, 134 ms: bytes, messages and pulses lie within.
const RING: u64 = 4096;

/// The events to come. Of those for the same time the one that was put in first comes first.
pub struct Agenda {
    present: BinaryHeap<Entry>,
    /// The number of the present moment.
    moment: u64,
    ring: Vec<Vec<Entry>>,
    in_ring: usize,
    far: BinaryHeap<Entry>,
    made: u64,
}

struct Entry {
    at: Nanos,
    number: u64,
    event: Event,
}

impl Default for Agenda {
    fn default() -> Self {
        Self {
            present: BinaryHeap::new(),
            moment: 0,
            ring: (0..RING).map(|_| Vec::new()).collect(),
            in_ring: 0,
            far: BinaryHeap::new(),
            made: 0,
        }
    }
}

impl Agenda {
    /// Puts an event in.
    pub fn put(&mut self, at: Nanos, event: Event) {
        self.made += 1;
        let (entry, moment) = (Entry { at, number: self.made, event }, at >> MOMENT_BITS);
        if moment <= self.moment {
            self.present.push(entry);
        } else if moment < self.moment + RING {
            self.ring[(moment % RING) as usize].push(entry);
            self.in_ring += 1;
        } else {
            self.far.push(entry);
        }
    }

    /// Takes the next event out.
    pub fn take(&mut self) -> Option<(Nanos, Event)> {
        while self.present.is_empty() {
            let far = self.far.peek().map(|entry| entry.at >> MOMENT_BITS);
            self.moment = if self.in_ring > 0 { self.moment + 1 } else { far? };
            let slot = &mut self.ring[(self.moment % RING) as usize];
            self.in_ring -= slot.len();
            self.present.extend(slot.drain(..));
            while self.far.peek().is_some_and(|entry| entry.at >> MOMENT_BITS <= self.moment) {
                self.present.extend(self.far.pop());
            }
        }
        self.present.pop().map(|entry| (entry.at, entry.event))
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

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    #[test]
    fn events_come_in_their_order_however_far_they_are() {
        let (mut agenda, mut rng) = (Agenda::default(), StdRng::seed_from_u64(3));
        let (mut now, mut put, mut taken) = (0, 0, 0);
        let mut at_same_time = Vec::new();
        for step in 0..20_000u32 {
            for _ in 0..rng.random_range(0..if step < 10_000 { 4 } else { 2 }) {
                let delay = [0, 7, 500_000, 100 * MILLISECOND, 134 * MILLISECOND, 3 * SECOND, 90 * SECOND];
                agenda.put(now + delay[rng.random_range(0..delay.len())], Event::Join(put));
                put += 1;
            }
            let Some((at, Event::Join(number))) = agenda.take() else { continue };
            assert!(at >= now, "{at} after {now}");
            if at > now {
                at_same_time.clear();
            }
            assert!(at_same_time.last().is_none_or(|before| *before < number), "{number} before {at_same_time:?}");
            at_same_time.push(number);
            (now, taken) = (at, taken + 1);
        }
        while agenda.take().is_some() {
            taken += 1;
        }
        assert_eq!(taken, put);
    }
}
