//! How many pieces may be on their way to this node, over all tasks: they share its link, and have to be held in memory until
//! they are whole.
//!
//! A sender gives several at a time, and all members together send as much as they receive. Who took more at a time would get
//! each of them later, and keep senders waiting whose time others could use; who took fewer would have an idle link whenever one
//! of its senders is slow.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Pieces at a time: one more than a sender gives, so that the link is full though some come slowly. A turn that comes when there
/// are so many is left to others: kept until there is a place it would be a sender's idle slot (simulated with 16 to 100 nodes on
/// equal links: one kept turn cost 2 % of the time, two 4 to 6 %).
pub const PIECES_MAX: usize = 5;

/// Bytes at a time: large pieces are fewer, but one may always come.
pub const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Pieces of slow peers that do not count among those: each keeps its place for several times as long, and a node with
/// many slow neighbours would have hardly a place left for what the rest could give. Simulated with 1000 nodes, a tenth of them
/// with a quarter of the rate: without such places the last one took 1.22 times the bound instead of 1.08.
pub const SLOW_MAX: usize = 3;

/// Pieces by which it is judged how much comes.
const SAMPLES: usize = 16;

/// After so long without pieces that says nothing.
const STALE: Duration = Duration::from_secs(10);

/// How long the pieces of a peer take, beside those of others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// About as long as those of the fast ones, as far as is known.
    #[default]
    Usual,
    /// Much longer.
    Slow,
}

/// What is on its way.
#[derive(Debug, Default)]
pub struct Intake {
    usual: usize,
    slow: usize,
    bytes: u64,
    /// When the last pieces came, and their bytes.
    came: VecDeque<(Instant, u32)>,
}

impl Intake {
    /// Takes a place for a piece of at most so many bytes from a peer of this pace, which [`Self::release`] gives back; tells
    /// whether there is one. If not, the turn is left to others.
    #[must_use]
    pub fn take(&mut self, bytes: u32, pace: Pace) -> bool {
        let place = self.left() > 0 || pace == Pace::Slow && self.slow < SLOW_MAX;
        let room = place && self.fits(bytes);
        if room {
            *self.count(pace) += 1;
            self.bytes += u64::from(bytes);
        }
        room
    }

    /// Whether so many more bytes may come, if there is a place: one piece always may.
    #[must_use]
    pub fn fits(&self, bytes: u32) -> bool {
        self.usual + self.slow == 0 || self.bytes + u64::from(bytes) <= BYTES_MAX
    }

    /// A piece that had a place, taken with these figures, has come or never will.
    pub fn release(&mut self, bytes: u32, pace: Pace) {
        let count = self.count(pace);
        *count = count.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(u64::from(bytes));
    }

    /// A piece of so many bytes has come from a peer.
    pub fn came(&mut self, bytes: u32, now: Instant) {
        if self.came.len() >= SAMPLES {
            self.came.pop_front();
        }
        self.came.push_back((now, bytes));
    }

    /// What comes from peers, in bytes per second; `None` where that is not known, since too little has come of late.
    #[must_use]
    pub fn rate(&self, now: Instant) -> Option<u64> {
        let (first, last) = (self.came.front()?.0, self.came.back()?.0);
        if self.came.len() < SAMPLES || now >= last + STALE {
            return None;
        }
        let bytes: u64 = self.came.iter().skip(1).map(|(_, bytes)| u64::from(*bytes)).sum();
        let took = u64::try_from(last.saturating_duration_since(first).as_micros()).unwrap_or(u64::MAX);
        Some(bytes * 1_000_000 / took.max(1))
    }

    /// Places that are left for pieces of any pace.
    #[must_use]
    pub fn left(&self) -> usize {
        PIECES_MAX.saturating_sub(self.usual + self.slow.saturating_sub(SLOW_MAX))
    }

    /// Bytes that have places at the most.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn count(&mut self, pace: Pace) -> &mut usize {
        match pace {
            Pace::Usual => &mut self.usual,
            Pace::Slow => &mut self.slow,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "a test needs some instant to start at")]

    use super::*;

    #[test]
    fn what_comes_is_known_from_some_pieces_and_not_for_long() {
        let (mut intake, begin) = (Intake::default(), Instant::now());
        let at = |tenths: u32| begin + Duration::from_millis(100) * tenths;
        for number in 0..40 {
            assert_eq!(intake.rate(at(number)).is_some(), number >= SAMPLES as u32, "{number}");
            intake.came(if number < 20 { 7 } else { 1000 }, at(number));
        }
        assert_eq!(intake.rate(at(40)), Some(10_000), "of the last ones");
        assert_eq!(intake.rate(at(39) + STALE), None);
    }

    fn taken(intake: &mut Intake, bytes: u32, pace: Pace) -> usize {
        (0..20).take_while(|_| intake.take(bytes, pace)).count()
    }

    #[test]
    fn places_are_bounded_by_number_and_by_bytes() {
        for (bytes, most) in [(1024, PIECES_MAX), (8 << 20, 2), (32 << 20, 1)] {
            let mut intake = Intake::default();
            assert_eq!(taken(&mut intake, bytes, Pace::Usual), most, "{bytes} bytes");
            intake.release(bytes, Pace::Usual);
            assert_eq!(taken(&mut intake, bytes, Pace::Usual), 1, "what was given back");
        }
    }

    #[test]
    fn a_few_slow_pieces_take_no_place_from_others() {
        let mut intake = Intake::default();
        assert_eq!(taken(&mut intake, 1, Pace::Slow), SLOW_MAX + PIECES_MAX, "more of them are like any other");
        (0..PIECES_MAX).for_each(|_| intake.release(1, Pace::Slow));
        assert_eq!(taken(&mut intake, 1, Pace::Usual), PIECES_MAX);
        assert!(!intake.take(1, Pace::Slow));
        intake.release(1, Pace::Slow);
        assert!(!intake.take(1, Pace::Usual), "its place is for no other");
        assert!(intake.take(1, Pace::Slow));
    }
}
