//! How many pieces leave at a time: as many as it takes to fill the way out, and fewer where that is slower than the way in.
//!
//! The more pieces leave at a time on a slow way out, the longer each takes; and what waits in front of such a link delays what this
//! node says and acknowledges, so that little comes to it either. In the lab two of 16 nodes with a quarter of the rate out (6 of 25
//! Mb/s), where round trips took 150 to 230 ms, were done after 1.24 to 1.44 times the bound, and after 1.12 to 1.13 giving one at a time.
//!
//! In a pull of many, members give about as much as they get. Who gives half of that, though all slots are in use, has too many of
//! them. Who gives somewhat less tries half of them, and keeps to that if no less leaves: what comes is no measure by itself, since
//! it falls with a crowded way out, seen to a third. One more is tried from time to time, since with few slots it may also be
//! the receivers that are slow.

use std::time::Duration;

use super::ACTIVE;

/// Pieces after whose leaving the number is thought over. The slowest of them does not count: it may be its receiver that is slow.
const SAMPLES: usize = 8;

/// Who gives less than this part of what it gets tries fewer slots. In the lab members with equal links gave more, but for a few
/// moments, and slow ones 0.3 to 0.7 of it.
const SHARE_MIN: f64 = 0.7;

/// Most times that the number is thought over before another is tried. It doubles with each that proved worse.
const PATIENCE_MAX: u32 = 8;

/// The number of pieces that may leave at a time.
#[derive(Debug)]
pub(super) struct Slots {
    allowed: usize,
    /// Pieces that began to leave before the number changed.
    old: usize,
    /// The bytes of those that began since and have left, and how long each took.
    left: Vec<(Duration, u32)>,
    /// Times that the number was thought over since it changed.
    kept: u32,
    /// How many of them it takes until another is tried.
    patience: u32,
    /// Whether more are to be tried next, and not fewer.
    more: bool,
    /// While a number is tried, the one before, and how many bytes per second left with that.
    before: Option<(usize, f64)>,
}

impl Default for Slots {
    fn default() -> Self {
        Self { allowed: ACTIVE, old: 0, left: Vec::new(), kept: 0, patience: 1, more: false, before: None }
    }
}

impl Slots {
    /// The number; 1 to [`ACTIVE`].
    pub(super) fn allowed(&self) -> usize {
        self.allowed
    }

    /// A piece of so many bytes has left and took so long, while this node gets so many bytes per second from others; `None` where
    /// it gets nothing, and nothing is known of its links.
    pub(super) fn gave(&mut self, bytes: u32, took: Duration, gets: Option<u64>) {
        let Some(gets) = gets else {
            *self = Self::default();
            return;
        };
        if self.old > 0 {
            self.old -= 1;
            return;
        }
        self.left.push((took, bytes));
        if self.left.len() == SAMPLES {
            self.left.sort_unstable();
            let (took, bytes) = self
                .left
                .iter()
                .take(SAMPLES - 1)
                .fold((Duration::ZERO, 0), |(time, sum), (took, bytes)| (time + *took, sum + u64::from(*bytes)));
            self.left.clear();
            // What leaves while all slots are in use. While some are not it is less, and there is no harm in that.
            let gives = self.allowed as f64 * bytes as f64 / took.as_secs_f64().max(f64::EPSILON);
            self.judge(gives, gives / gets.max(1) as f64);
        }
    }

    /// Thinks the number over: so many bytes leave per second, and they are this share of what comes.
    fn judge(&mut self, gives: f64, share: f64) {
        if let Some((number, gave)) = self.before.take() {
            // Halfway between what leaves if the link is full with either number, and what leaves if it is with neither.
            let worth = gave * (1.0 + self.allowed as f64 / number as f64) / 2.0;
            // What proved better is gone on with, and what proved worse is followed by the opposite.
            self.more = (self.allowed > number) == (gives >= worth);
            if gives < worth {
                self.patience = (self.patience * 2).min(PATIENCE_MAX);
                return self.set(number, share);
            }
            self.patience = 1;
        }
        self.kept += 1;
        if self.kept < self.patience {
            return;
        }
        let fit = ((ACTIVE as f64 * share).round() as usize).max(1);
        // Unless it was seen that more brings more.
        if fit * 2 <= self.allowed && !self.more {
            return self.set(fit, share);
        }
        let fewer = share < SHARE_MIN && self.allowed > 1 && (!self.more || self.allowed == ACTIVE);
        let other = if fewer { self.allowed / 2 } else { self.allowed + 1 };
        if other <= ACTIVE {
            self.before = Some((self.allowed, gives));
            self.set(other, share);
        }
    }

    fn set(&mut self, allowed: usize, share: f64) {
        tracing::debug!(slots = allowed, before = self.allowed, share, "another number of pieces leaves at a time");
        self.old = self.allowed - 1;
        self.allowed = allowed;
        self.kept = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: u32 = 256 * 1024;

    /// Gives so many pieces on a way out of so many pieces per second, to receivers that take so many each; others give it `gets`
    /// pieces per second. Returns the numbers of slots, one for each piece.
    fn give(slots: &mut Slots, pieces: usize, out: f64, each: f64, gets: f64) -> Vec<usize> {
        let one = |slots: &mut Slots| {
            let rate = each.min(out / slots.allowed() as f64);
            slots.gave(PIECE, Duration::from_secs_f64(1.0 / rate), Some((gets * f64::from(PIECE)) as u64));
            slots.allowed()
        };
        (0..pieces).map(|_| one(slots)).collect()
    }

    #[test]
    fn who_gives_about_as_much_as_he_gets_uses_all_slots() {
        for share in [0.9, 1.0, 3.0] {
            let mut slots = Slots::default();
            assert_eq!(give(&mut slots, 500, 40.0 * share, 15.0, 40.0), [ACTIVE; 500], "{share}");
        }
    }

    #[test]
    fn a_slow_way_out_is_left_to_few_pieces_at_a_time() {
        // Also where so little comes for it that the node gives more than half as much.
        for (out, gets, least) in [(10.0, 40.0, 1), (10.0, 15.0, 1), (20.0, 40.0, 2), (1.0, 40.0, 1)] {
            let mut slots = Slots::default();
            let numbers = give(&mut slots, 1000, out, 15.0, gets);
            let count = |number| numbers[50..].iter().filter(|other| **other == number).count();
            assert!(count(least) * 10 >= (numbers.len() - 50) * 8, "{out}: others are tried rarely: {numbers:?}");
        }
    }

    #[test]
    fn where_receivers_are_slow_all_slots_are_used() {
        let mut slots = Slots::default();
        let numbers = give(&mut slots, 1000, 100.0, 5.0, 40.0);
        let all = numbers.iter().filter(|number| **number == ACTIVE).count();
        assert!(all * 10 >= numbers.len() * 8, "fewer are tried rarely: {numbers:?}");
    }

    #[test]
    fn a_link_that_recovers_is_used_again() {
        let mut slots = Slots::default();
        give(&mut slots, 500, 10.0, 15.0, 40.0);
        assert!(slots.allowed() <= 2);
        let numbers = give(&mut slots, 250, 40.0, 10.0, 40.0);
        assert_eq!(numbers[200..], [ACTIVE; 50], "{numbers:?}");
    }

    #[test]
    fn nothing_is_judged_by_one_slow_receiver_or_without_knowledge() {
        let mut slots = Slots::default();
        let gets = Some(u64::from(PIECE) * 40);
        for number in 0..200 {
            let took = if number % SAMPLES == 0 { 1000 } else { 100 };
            slots.gave(PIECE, Duration::from_millis(took), gets);
            assert_eq!(slots.allowed(), ACTIVE);
        }
        give(&mut slots, 100, 10.0, 15.0, 40.0);
        assert!(slots.allowed() < ACTIVE);
        slots.gave(PIECE, Duration::from_secs(1), None);
        assert_eq!(slots.allowed(), ACTIVE, "who gets nothing has no measure");
    }
}
