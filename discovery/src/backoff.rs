//! When to ask a source again that could not answer. Pure: the jitter is handed in, the waiting is the caller's.

use std::time::Duration;

/// The first wait. Short, since at boot the resolver often comes up within a second of the agent.
pub const DELAY_MIN: Duration = Duration::from_millis(250);

/// The longest wait: as long as between two questions to a source that does answer, so that a dead one costs no more.
pub const DELAY_MAX: Duration = Duration::from_secs(30);

/// Waits that double from [`DELAY_MIN`] to a bound, [`DELAY_MAX`] or less, each spread over its upper half.
#[derive(Clone, Debug)]
pub struct Backoff {
    failures: u32,
    max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::up_to(DELAY_MAX)
    }
}

impl Backoff {
    /// For a source that is cheaper to ask: waits that stay below `max`.
    #[must_use]
    pub fn up_to(max: Duration) -> Self {
        Self { failures: 0, max: max.clamp(DELAY_MIN, DELAY_MAX) }
    }

    /// How long to wait after one more failure. `jitter`, in `0.0..1.0`, keeps a thousand agents that lost their
    /// resolver at the same moment from asking it at the same moment again; what is outside is taken as the nearest.
    pub fn failed(&mut self, jitter: f64) -> Duration {
        let full = DELAY_MIN.saturating_mul(1u32.checked_shl(self.failures).unwrap_or(u32::MAX)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        let jitter = if jitter.is_nan() { 0.0 } else { jitter.clamp(0.0, 1.0) };
        full.mul_f64(0.5 + jitter / 2.0)
    }

    /// Forgets the failures.
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn waits_double_up_to_the_bound_and_start_again() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..9).map(|_| backoff.failed(1.0).as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(backoff.failed(0.0), DELAY_MAX / 2);
        backoff.succeeded();
        assert_eq!(backoff.failed(1.0), DELAY_MIN);
    }

    proptest! {
        #[test]
        fn waits_are_bounded(failures in 0..u32::MAX, max in 0..100_000u64, jitter: f64) {
            let mut backoff = Backoff { failures, ..Backoff::up_to(Duration::from_millis(max)) };
            let wait = backoff.failed(jitter);
            prop_assert!(wait >= DELAY_MIN / 2 && wait <= DELAY_MAX.min(Duration::from_millis(max).max(DELAY_MIN)));
        }
    }
}
