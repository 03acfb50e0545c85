//! How many pieces leave at a time: as many as it takes to fill the way out, and fewer where that is slower than the way in.
//!
//! The more pieces leave at a time on a slow way out, the longer each takes; and what waits in front of such a link delays what this
//! node says and acknowledges, so that little comes to it either. In the lab two of 16 nodes with a quarter of the rate out (6 of 25
//! Mb/s), where round trips took 150 to 230 ms, were done after 1.24 to 1.44 times the bound, and after 1.13 giving one at a time.
//!
//! In a pull of many, members give about as much as they get. Who gives half of that or less though all its slots are in use has
//! too many of them. One more is tried again from time to time, since with few of them it may also be the receivers that are slow.

use std::time::Duration;

use super::ACTIVE;

/// Pieces after whose leaving the number is thought over, by the median: one receiver that is slow says nothing.
const SAMPLES: usize = 8;

/// What one more has to bring, beside what it would bring if nothing stood in its way.
const GAIN_MIN: f64 = 0.5;

/// Most times that nothing speaks against the number before one more is tried. It doubles with each that brought nothing.
const PATIENCE_MAX: u32 = 8;

/// The number of pieces that may leave at a time.
#[derive(Debug)]
pub(super) struct Slots {
    allowed: usize,
    /// Pieces that began to leave before the number changed.
    old: usize,
    /// At how many bytes per second each of those left that began since.
    rates: Vec<f64>,
    /// Times that nothing spoke against the number.
    kept: u32,
    /// How many of them it takes until one more is tried.
    patience: u32,
    /// While one more is tried, what left without it, in bytes per second.
    before: Option<f64>,
}

impl Default for Slots {
    fn default() -> Self {
        Self { allowed: ACTIVE, old: 0, rates: Vec::new(), kept: 0, patience: 1, before: None }
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
        self.rates.push(f64::from(bytes) / took.as_secs_f64().max(f64::EPSILON));
        if self.rates.len() == SAMPLES {
            self.rates.sort_unstable_by(f64::total_cmp);
            // What leaves while all slots are in use. While some are not it is less, and there is no harm in that.
            let gives = self.allowed as f64 * self.rates[SAMPLES / 2];
            self.rates.clear();
            self.judge(gives, gives / gets.max(1) as f64);
        }
    }

    /// Thinks the number over: so many bytes leave per second, and they are this share of what comes.
    fn judge(&mut self, gives: f64, share: f64) {
        if let Some(before) = self.before.take() {
            let without = self.allowed - 1;
            if gives < before * (1.0 + GAIN_MIN / without as f64) {
                self.patience = (self.patience * 2).min(PATIENCE_MAX);
                return self.set(without, share);
            }
            self.patience = 1;
        }
        let fit = ((ACTIVE as f64 * share).round() as usize).clamp(1, ACTIVE);
        if fit * 2 <= self.allowed {
            return self.set(fit, share);
        }
        self.kept += 1;
        if self.allowed < ACTIVE && self.kept >= self.patience {
            self.before = Some(gives);
            self.set(self.allowed + 1, share);
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
        for share in [0.7, 1.0, 3.0] {
            let mut slots = Slots::default();
            assert_eq!(give(&mut slots, 500, 40.0 * share, 15.0, 40.0), [ACTIVE; 500], "{share}");
        }
    }

    #[test]
    fn a_slow_way_out_is_left_to_few_pieces_at_a_time() {
        for (out, least) in [(10.0, 1), (20.0, 2), (1.0, 1)] {
            let mut slots = Slots::default();
            let numbers = give(&mut slots, 500, out, 15.0, 40.0);
            assert!(numbers[50..].iter().all(|number| (least..=least + 1).contains(number)), "{out}: {numbers:?}");
            let more = numbers[50..].iter().filter(|number| **number > least).count();
            assert!(more * 4 < numbers.len(), "{out}: one more is tried rarely: {more} of {}", numbers.len());
        }
    }

    #[test]
    fn a_link_that_recovers_is_used_again() {
        let mut slots = Slots::default();
        give(&mut slots, 500, 10.0, 15.0, 40.0);
        assert_eq!(slots.allowed(), 1);
        let numbers = give(&mut slots, 200, 40.0, 10.0, 40.0);
        assert_eq!(numbers[150..], [ACTIVE; 50], "{numbers:?}");
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
