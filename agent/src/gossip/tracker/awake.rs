//! Whether this node has been awake. Nobody who kept silent while it stood still (frozen, paused, starved of CPU) has failed:
//! every wait ends at once when it goes on, and its connections are dead.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use darter_swarm::home::STALLED;
use darter_swarm::task::GRACE_AFTER_STALL;

/// Knows of stalls by a pulse that has to be felt much more often than every [`STALLED`].
#[derive(Debug)]
pub(super) struct Awake(Mutex<Pulse>);

#[derive(Debug)]
struct Pulse {
    felt: Instant,
    /// When the last stall was over.
    stalled: Option<Instant>,
}

impl Awake {
    pub(super) fn new(now: Instant) -> Self {
        Self(Mutex::new(Pulse { felt: now, stalled: None }))
    }

    /// A pulse.
    pub(super) fn feel(&self, now: Instant) {
        self.lock().feel(now);
    }

    /// Whether this node stood still a moment ago. What notices a stall first may be any task, so this counts as a pulse.
    pub(super) fn stood_still(&self, now: Instant) -> bool {
        let mut pulse = self.lock();
        pulse.feel(now);
        pulse.stalled.is_some_and(|stalled| now.saturating_duration_since(stalled) < GRACE_AFTER_STALL)
    }

    fn lock(&self) -> MutexGuard<'_, Pulse> {
        // No change of a pulse can panic half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pulse {
    fn feel(&mut self, now: Instant) {
        if now.saturating_duration_since(self.felt) >= STALLED {
            self.stalled = Some(now);
        }
        self.felt = self.felt.max(now);
    }
}

#[cfg(test)]
mod tests {
    // A test needs some instant to start at.
    #![allow(clippy::disallowed_methods)]

    use std::time::Duration;

    use super::*;

    #[test]
    fn a_stall_is_known_whoever_notices_it_first_and_forgotten_afterwards() {
        for pulse_first in [true, false] {
            let mut now = Instant::now();
            let awake = Awake::new(now);
            for _ in 0..100 {
                now += Duration::from_millis(100);
                awake.feel(now);
                assert!(!awake.stood_still(now));
            }
            now += STALLED;
            if pulse_first {
                awake.feel(now);
            }
            assert!(awake.stood_still(now));
            let over = now + GRACE_AFTER_STALL;
            while now + Duration::from_millis(100) < over {
                now += Duration::from_millis(100);
                awake.feel(now);
                assert!(awake.stood_still(now));
            }
            assert!(!awake.stood_still(over));
        }
    }
}
