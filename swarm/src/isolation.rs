//! Whether it is this node that fails rather than the others.
//!
//! Who reaches none of several others in a row has a bad link, a firewall in its way or another version, and every further
//! try costs its clients time: such a node isolates itself, which means that it asks the registry alone, and tries the
//! others again after a while. One answer of anybody ends that.
//!
//! Not here: which peer is avoided by whom ([`crate::task`]), and what others hold against it ([`crate::home`]).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use darter_tracker::NodeId;

/// So many members have to fail one after the other; where there are fewer, all of them.
pub const FAILED_MEMBERS: usize = 5;

/// One member that fails says nothing about this node, even if there is no other.
const FAILED_MEMBERS_MIN: usize = 2;

/// How long a node isolates itself at first, doubled each time until somebody answers, up to the maximum: a link that is
/// broken for hours costs its clients one try in five minutes.
const TERM: Duration = Duration::from_secs(10);
const TERM_MAX: Duration = Duration::from_secs(300);

/// One node's judgement of itself.
#[derive(Clone, Debug, Default)]
pub struct Isolation {
    /// Who has failed since somebody answered last.
    failed: BTreeSet<NodeId>,
    until: Option<Instant>,
    /// Terms since somebody answered last.
    terms: u32,
}

impl Isolation {
    /// A member did not answer, or could not be reached. `others` is how many there are beside this node. Tells whether the
    /// node isolates itself because of it.
    pub fn failed(&mut self, member: NodeId, others: usize, now: Instant) -> bool {
        if self.is_isolated(now) {
            return false;
        }
        self.failed.insert(member);
        // After a term one failure more shows that nothing has changed.
        let enough = if self.terms > 0 { 1 } else { others.clamp(FAILED_MEMBERS_MIN, FAILED_MEMBERS) };
        if self.failed.len() < enough {
            return false;
        }
        let term = TERM * 2u32.saturating_pow(self.terms.min(8));
        self.until = Some(now + term.min(TERM_MAX));
        self.terms = self.terms.saturating_add(1);
        self.failed.clear();
        true
    }

    /// A member answered. Tells whether it is the first since an isolation.
    pub fn answered(&mut self) -> bool {
        std::mem::take(self).terms > 0
    }

    /// When the present term ends, or the last one has ended, if nobody has answered since.
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Whether nobody but the registry is to be asked.
    #[must_use]
    pub fn is_isolated(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    // A test needs some instant to start at.
    #![allow(clippy::disallowed_methods)]

    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 16])
    }

    #[test]
    fn a_node_that_reaches_nobody_isolates_itself() {
        let now = Instant::now();
        for (others, enough) in [(1, 2), (2, 2), (4, 4), (5, 5), (100, 5)] {
            let mut isolation = Isolation::default();
            for member in 1..enough {
                assert!(!isolation.failed(node(member), others, now));
                assert!(!isolation.failed(node(member), others, now), "one member counts once");
            }
            assert!(!isolation.is_isolated(now));
            assert!(isolation.failed(node(enough), others, now));
            assert!(isolation.is_isolated(now));
        }
    }

    #[test]
    fn one_answer_shows_that_it_is_the_others() {
        let now = Instant::now();
        let mut isolation = Isolation::default();
        for turn in 0..10 {
            for member in 0..4 {
                assert!(!isolation.failed(node(turn * 4 + member), 100, now));
            }
            assert!(!isolation.answered());
        }
    }

    #[test]
    fn each_term_is_longer_until_somebody_answers() {
        let mut now = Instant::now();
        let mut isolation = Isolation::default();
        isolation.failed(node(1), 2, now);
        assert!(isolation.failed(node(2), 2, now));
        for term in [10, 20, 40, 80, 160, 300, 300, 300] {
            now += Duration::from_secs(term) - Duration::from_millis(1);
            assert!(isolation.is_isolated(now), "{term}");
            assert!(!isolation.failed(node(1), 2, now), "it is isolated already");
            now += Duration::from_millis(1);
            assert!(!isolation.is_isolated(now), "{term}");
            assert!(isolation.failed(node(1), 2, now), "one more suffices");
        }
        assert!(isolation.answered());
        assert!(!isolation.is_isolated(now));
        assert!(!isolation.failed(node(1), 2, now), "it begins anew");
    }
}
