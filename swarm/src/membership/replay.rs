//! The replay window of one salt: which of its counters were seen.
//!
//! A counter is good once, and only while it is less than [`WINDOW`] below the highest that was seen.

/// Counters that are told apart below the highest: what a sender can have in flight while datagrams overtake each
/// other. Older ones are refused, as nobody can tell whether they were seen.
pub const WINDOW: u64 = 1024;

const WORDS: usize = (WINDOW / 64) as usize;

/// The counters of one salt that were seen.
#[derive(Debug, Clone)]
pub struct ReplayWindow {
    /// The highest counter seen.
    head: u64,
    /// One bit per counter of the window, at the counter modulo [`WINDOW`].
    seen: [u64; WORDS],
}

impl ReplayWindow {
    /// A window whose highest counter is `head`, the only one that counts as seen.
    #[must_use]
    pub fn starting_at(head: u64) -> Self {
        let mut window = Self { head, seen: [0; WORDS] };
        window.set(head);
        window
    }

    /// Whether `counter` may still be accepted. Changes nothing: a forged datagram must not move the window.
    #[must_use]
    pub fn is_fresh(&self, counter: u64) -> bool {
        if counter > self.head {
            return true;
        }
        self.head - counter < WINDOW && !self.get(counter)
    }

    /// Marks `counter` as seen, after the datagram proved authentic; tells whether it was fresh.
    pub fn mark(&mut self, counter: u64) -> bool {
        if !self.is_fresh(counter) {
            return false;
        }
        if counter > self.head {
            if counter - self.head >= WINDOW {
                self.seen = [0; WORDS];
            } else {
                for passed in self.head + 1..counter {
                    self.clear(passed);
                }
            }
            self.head = counter;
        }
        self.set(counter);
        true
    }

    fn get(&self, counter: u64) -> bool {
        self.seen[word(counter)] & bit(counter) != 0
    }

    fn set(&mut self, counter: u64) {
        self.seen[word(counter)] |= bit(counter);
    }

    fn clear(&mut self, counter: u64) {
        self.seen[word(counter)] &= !bit(counter);
    }
}

fn word(counter: u64) -> usize {
    (counter % WINDOW / 64) as usize
}

fn bit(counter: u64) -> u64 {
    1 << (counter % 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_edges_of_the_window() {
        let mut window = ReplayWindow::starting_at(5000);
        assert!(!window.is_fresh(5000));
        assert!(window.is_fresh(5000 - WINDOW + 1));
        assert!(!window.is_fresh(5000 - WINDOW));
        assert!(window.mark(u64::MAX));
        assert!(!window.mark(u64::MAX));
        assert!(window.mark(u64::MAX - WINDOW + 1));
        assert!(!window.mark(5001));
    }

    proptest! {
        #[test]
        fn accepts_each_counter_once_and_none_below_the_window(
            steps in prop::collection::vec((0..3u8, 0..2500u64), 1..400),
        ) {
            let (mut window, mut seen, mut head) = (ReplayWindow::starting_at(3000), BTreeSet::from([3000]), 3000u64);
            for (kind, amount) in steps {
                let counter = match kind {
                    0 => head + amount % 5,
                    1 => head.saturating_sub(amount),
                    _ => head + amount,
                };
                let expected = !seen.contains(&counter) && (counter > head || head - counter < WINDOW);
                prop_assert_eq!(window.is_fresh(counter), expected);
                prop_assert_eq!(window.mark(counter), expected);
                seen.insert(counter);
                head = head.max(counter);
            }
        }
    }
}
