//! When this member takes a new epoch, and which: after it was declared dead, or when its address is claimed.
//!
//! SWIM never takes a death back, so a member that was declared dead by mistake comes back as another. Not here: how it
//! learns that.

use std::time::{Duration, Instant};

/// Between two changes of the epoch. Whoever makes it change faster is not obeyed.
const INTERVAL: Duration = Duration::from_secs(1);
/// Changes in a row after which the epoch grows in doubling steps: somebody remembers this address with an epoch far
/// ahead, as when the clock was set back, and does not say which.
const BEFORE_DOUBLING: u32 = 3;
/// After this long without a change the next one is the first of a row again.
const ROW_ENDS_AFTER: Duration = Duration::from_secs(60);
/// The epoch never grows by more than 2 to this at once, a century and a bit in seconds.
const STEP_BITS_MAX: u32 = 32;

/// The next change of the epoch and the last ones.
#[derive(Debug, Default)]
pub(super) struct Rejoin {
    due: Option<Instant>,
    last: Option<Instant>,
    in_a_row: u32,
}

impl Rejoin {
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// As soon as the last change is long enough ago.
    pub(super) fn plan(&mut self, now: Instant) {
        if self.due.is_none() {
            self.due = Some(self.last.map_or(now, |last| (last + INTERVAL).max(now)));
        }
    }

    pub(super) fn cancel(&mut self) {
        self.due = None;
    }

    /// Changes now: an epoch above `current` and above what was `heard` of this address.
    pub(super) fn next_epoch(&mut self, now: Instant, current: u64, heard: Option<u64>) -> u64 {
        let goes_on = self.last.is_some_and(|last| now.saturating_duration_since(last) < ROW_ENDS_AFTER);
        self.in_a_row = if goes_on { self.in_a_row.saturating_add(1) } else { 1 };
        self.last = Some(now);
        self.due = None;
        let bits = self.in_a_row.saturating_sub(BEFORE_DOUBLING).min(STEP_BITS_MAX);
        current.max(heard.unwrap_or(0)).saturating_add(1 << bits)
    }
}

#[cfg(test)]
// A simulation needs some instant to start at; from there its own clock moves it.
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_rare_and_an_epoch_far_ahead_is_caught_up_with() {
        let mut now = Instant::now();
        let (begin, mut rejoin, mut epoch) = (now, Rejoin::default(), 1_000_000);
        while epoch < 1_000_000 + 3600 {
            rejoin.plan(now);
            now = rejoin.due().unwrap_or(now);
            assert!(rejoin.is_due(now));
            epoch = rejoin.next_epoch(now, epoch, None);
        }
        let took = now - begin;
        assert!(took > 5 * INTERVAL && took < 20 * INTERVAL, "{took:?}");
        now += ROW_ENDS_AFTER;
        assert_eq!(rejoin.next_epoch(now, 5, Some(9)), 10, "a new row, above what was heard");
    }
}
