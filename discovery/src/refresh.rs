//! When to ask again a source that has answered, and said how long the answer lives. Pure, as [`crate::backoff`] is.

use std::time::Duration;

/// The shortest wait, for records that say that they must not be kept at all: a service of a thousand agents is asked two
/// thousand times a second then, which a cluster's DNS bears.
pub const WAIT_MIN: Duration = Duration::from_millis(500);

/// The longest wait, whatever the record says: somebody who moves a service forgets to lower its TTL the day before.
pub const WAIT_MAX: Duration = Duration::from_secs(300);

/// Up to this much is added, so that agents that share a resolver do not all come when its record runs out. Small enough
/// that a change is acted on within the TTL and a second, the time for the answer included.
pub const SPREAD: Duration = Duration::from_millis(250);

/// How long to wait before an answer that lives for `ttl` is asked for again. `jitter` is in `0.0..1.0`; what is outside is
/// taken as the nearest.
#[must_use]
pub fn after(ttl: Duration, jitter: f64) -> Duration {
    let jitter = if jitter.is_nan() { 0.0 } else { jitter.clamp(0.0, 1.0) };
    ttl.clamp(WAIT_MIN, WAIT_MAX) + SPREAD.mul_f64(jitter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers_are_asked_for_again_when_they_run_out() {
        assert_eq!(after(Duration::from_secs(5), 0.0), Duration::from_secs(5));
        assert_eq!(after(Duration::from_secs(5), 1.0), Duration::from_millis(5250));
        assert_eq!(after(Duration::ZERO, 0.0), WAIT_MIN);
        assert_eq!(after(Duration::MAX, 1.0), WAIT_MAX + SPREAD);
    }

    proptest! {
        /// Never before the records have run out (the resolver would only repeat itself), and within a second after.
        #[test]
        fn within_a_second_of_the_ttl(millis in 0..300_000u64, jitter: f64) {
            let ttl = Duration::from_millis(millis);
            let wait = after(ttl, jitter);
            prop_assert!(wait >= ttl && wait >= WAIT_MIN && wait <= ttl + WAIT_MIN + SPREAD);
        }
    }
}
