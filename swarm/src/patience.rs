//! How long to wait for a sign of life.
//!
//! A fixed time is wrong somewhere: what proves a death on an idle network is common on a crowded link, where every false
//! alarm costs the registry bytes and makes the link more crowded. So whoever gives a sign of life after a long silence shows
//! that silence of that length proves nothing here, and is waited for longer from then on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use darter_tracker::NodeId;

/// Silence that is longer than this is no crowded link: the peer stood still, and whoever waits has gone elsewhere.
pub(crate) const PATIENCE_MAX: Duration = Duration::from_secs(2);

/// Shorter gaps are everyday, and within what is waited for anyway.
const NOTABLE: Duration = Duration::from_millis(150);

/// A gap is remembered for at least this long, and at most twice as long.
const WINDOW: Duration = Duration::from_secs(30);

/// Peers whose gaps are remembered at a time; those of further ones are not.
const PEERS_MAX: usize = 256;

/// The longest silences that ended with a sign of life.
///
/// One peer's gaps say something of that peer only, so that none can make others wait; two peers' say something of the way
/// from here.
#[derive(Clone, Debug, Default)]
pub(crate) struct Patience {
    recent: BTreeMap<NodeId, Duration>,
    before: BTreeMap<NodeId, Duration>,
    /// When `recent` was begun.
    begun: Option<Instant>,
    /// The second longest of all.
    shared: Duration,
}

impl Patience {
    /// Notes that `peer`, from which something was due, gave a sign of life after it had been silent for `gap`.
    /// Tells whether anything has changed.
    pub(crate) fn note(&mut self, peer: NodeId, gap: Duration, now: Instant) -> bool {
        let over = self.begun.is_some_and(|begun| now >= begun + WINDOW);
        if over {
            self.before = std::mem::take(&mut self.recent);
            self.begun = (!self.before.is_empty()).then_some(now);
            self.share();
        }
        let known = self.recent.get(&peer).copied().unwrap_or_default();
        if gap < NOTABLE || gap > PATIENCE_MAX || gap <= known || self.recent.len() >= PEERS_MAX {
            return over;
        }
        self.begun.get_or_insert(now);
        self.recent.insert(peer, gap);
        self.share();
        true
    }

    fn share(&mut self) {
        let mut gaps = self.recent.clone();
        for (peer, gap) in &self.before {
            let longest = gaps.entry(*peer).or_default();
            *longest = (*longest).max(*gap);
        }
        let mut gaps: Vec<Duration> = gaps.into_values().collect();
        gaps.sort_unstable();
        self.shared = gaps.iter().rev().nth(1).copied().unwrap_or_default();
    }

    /// After what silence `peer` is given up, where `least` would do on an idle network.
    pub(crate) fn with(&self, peer: NodeId, least: Duration) -> Duration {
        let own = [&self.recent, &self.before].into_iter().filter_map(|gaps| gaps.get(&peer)).max().copied();
        let longest = own.unwrap_or_default().max(self.shared);
        // Half as long again: the next gap may be longer than any before.
        (longest + longest / 2).min(PATIENCE_MAX).max(least)
    }
}

#[cfg(test)]
mod tests {
    // A test needs some instant to start at.
    #![allow(clippy::disallowed_methods)]

    use super::*;

    const LEAST: Duration = Duration::from_millis(250);

    fn peer(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 16])
    }

    #[test]
    fn one_slow_peer_is_waited_for_and_two_make_everybody_waited_for() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        patience.note(peer(1), Duration::from_millis(100), now);
        assert_eq!(patience.with(peer(1), LEAST), LEAST, "that is everyday");
        patience.note(peer(1), Duration::from_secs(1), now);
        assert_eq!(patience.with(peer(1), LEAST), Duration::from_millis(1500));
        assert_eq!(patience.with(peer(2), LEAST), LEAST, "it says nothing of others");
        patience.note(peer(2), Duration::from_millis(400), now);
        assert_eq!(patience.with(peer(3), LEAST), Duration::from_millis(600));
        assert_eq!(patience.with(peer(1), LEAST), Duration::from_millis(1500));
    }

    #[test]
    fn patience_is_bounded_and_ends() {
        let (mut patience, mut now) = (Patience::default(), Instant::now());
        patience.note(peer(1), PATIENCE_MAX * 2, now);
        assert_eq!(patience.with(peer(1), LEAST), LEAST, "it stood still");
        patience.note(peer(1), PATIENCE_MAX, now);
        assert_eq!(patience.with(peer(1), LEAST), PATIENCE_MAX);
        assert_eq!(patience.with(peer(1), PATIENCE_MAX * 2), PATIENCE_MAX * 2, "never less than was asked for");
        for _ in 0..3 {
            now += WINDOW;
            patience.note(peer(9), NOTABLE, now);
        }
        assert_eq!(patience.with(peer(1), LEAST), LEAST);
    }
}
