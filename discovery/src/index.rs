//! What every source says, and the union of it. Pure: no tasks, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// Seeds kept of one source. A cluster needs a handful to join; a name with ten thousand addresses must not make every
/// agent knock at all of them. Beyond it the lowest addresses are kept, so that all agents choose the same.
pub const SEEDS_PER_SOURCE_MAX: usize = 256;

/// One of the sources of an agent, in the order of its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub usize);

/// The seeds of every source.
#[derive(Debug)]
pub struct Index {
    own: BTreeSet<SocketAddr>,
    /// Whether this agent is reached on loopback, as in a demonstration, and so may others be.
    loopback: bool,
    sources: BTreeMap<SourceId, BTreeSet<SocketAddr>>,
    union: BTreeSet<SocketAddr>,
}

impl Index {
    /// An index that knows no seeds. The addresses in `own` never count as such, whoever names them, and those on
    /// loopback only if one of `own` is: to everybody else they are this very host.
    #[must_use]
    pub fn new(own: impl IntoIterator<Item = SocketAddr>) -> Self {
        let own: BTreeSet<_> = own.into_iter().map(canonical).collect();
        let loopback = own.iter().any(|own| own.ip().is_loopback());
        Self { own, loopback, sources: BTreeMap::new(), union: BTreeSet::new() }
    }

    /// Replaces what `source` said before by `seeds`. Returns the new union of all sources if that changed it.
    pub fn apply(
        &mut self,
        source: SourceId,
        seeds: impl IntoIterator<Item = SocketAddr>,
    ) -> Option<BTreeSet<SocketAddr>> {
        let usable: BTreeSet<_> =
            seeds.into_iter().map(canonical).filter(|seed| reachable(seed) && self.foreign(seed)).collect();
        if usable.len() > SEEDS_PER_SOURCE_MAX {
            tracing::warn!(source = source.0, seeds = usable.len(), kept = SEEDS_PER_SOURCE_MAX, "too many seeds");
        }
        self.sources.insert(source, usable.into_iter().take(SEEDS_PER_SOURCE_MAX).collect());
        let union: BTreeSet<_> = self.sources.values().flatten().copied().collect();
        if union == self.union {
            return None;
        }
        self.union = union;
        Some(self.union.clone())
    }

    /// Whether it is not this agent's own address, as far as addresses tell.
    fn foreign(&self, seed: &SocketAddr) -> bool {
        !self.own.contains(seed) && (self.loopback || !seed.ip().is_loopback())
    }

    /// The union of all sources.
    #[must_use]
    pub fn seeds(&self) -> &BTreeSet<SocketAddr> {
        &self.union
    }
}

/// One spelling per address: a resolver may give an IPv4 address in IPv6's clothes.
fn canonical(mut address: SocketAddr) -> SocketAddr {
    address.set_ip(address.ip().to_canonical());
    address
}

/// Whether anybody can answer there. Dialling 0.0.0.0 would reach this very host.
fn reachable(address: &SocketAddr) -> bool {
    let broadcast = matches!(address.ip(), IpAddr::V4(ip) if ip.is_broadcast());
    address.port() != 0 && !address.ip().is_unspecified() && !address.ip().is_multicast() && !broadcast
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seeds(list: &[&str]) -> BTreeSet<SocketAddr> {
        list.iter().map(|seed| seed.parse().unwrap()).collect()
    }

    #[test]
    fn the_union_changes_only_when_it_changes() {
        let (a, b) = (SourceId(0), SourceId(1));
        let mut index = Index::new([]);
        assert_eq!(index.apply(a, []), None);
        assert_eq!(index.apply(a, seeds(&["10.0.0.1:8002"])), Some(seeds(&["10.0.0.1:8002"])));
        assert_eq!(index.apply(b, seeds(&["10.0.0.1:8002"])), None);
        assert_eq!(index.apply(a, []), None, "the other source still says so");
        assert_eq!(index.apply(b, seeds(&["10.0.0.2:8002"])), Some(seeds(&["10.0.0.2:8002"])));
        assert_eq!(index.seeds(), &seeds(&["10.0.0.2:8002"]));
    }

    #[test]
    fn own_and_impossible_addresses_never_count() {
        let own = ["10.0.0.1:8002".parse().unwrap(), "[fd00::1]:8002".parse().unwrap()];
        let mut index = Index::new(own);
        let said = seeds(&[
            "10.0.0.1:8002",
            "[::ffff:10.0.0.1]:8002",
            "[fd00::1]:8002",
            "0.0.0.0:8002",
            "[::]:8002",
            "224.0.0.1:8002",
            "255.255.255.255:8002",
            "10.0.0.2:0",
        ]);
        assert_eq!(index.apply(SourceId(0), said), None);
        // Another port of the same host is another agent.
        assert_eq!(index.apply(SourceId(0), seeds(&["10.0.0.1:8003"])), Some(seeds(&["10.0.0.1:8003"])));
    }

    #[test]
    fn loopback_counts_for_agents_on_loopback_only() {
        let said = ["127.0.0.1:8002", "[::1]:8002", "[::ffff:127.0.0.1]:8003", "127.0.0.9:8002"];
        let mut index = Index::new(["10.0.0.1:8002".parse().unwrap()]);
        assert_eq!(index.apply(SourceId(0), seeds(&said)), None);
        let mut index = Index::new(["127.0.0.1:8002".parse().unwrap()]);
        let others = seeds(&["[::1]:8002", "127.0.0.1:8003", "127.0.0.9:8002"]);
        assert_eq!(index.apply(SourceId(0), seeds(&said)), Some(others));
    }

    #[test]
    fn a_source_is_bounded() {
        let mut index = Index::new([]);
        let many = (1..2000u16).map(|port| SocketAddr::from(([10, 0, 0, 1], port)));
        assert_eq!(index.apply(SourceId(0), many).unwrap().len(), SEEDS_PER_SOURCE_MAX);
    }

    proptest! {
        /// After any sequence of updates the union is that of the last word of every source, own addresses aside, and
        /// a change is reported exactly when there is one.
        #[test]
        fn the_union_is_of_last_words(updates in prop::collection::vec((0..4usize, prop::collection::btree_set(1..12u16, 0..6)), 0..40)) {
            let address = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
            let own = address(7);
            let mut index = Index::new([own]);
            let mut last: BTreeMap<usize, BTreeSet<u16>> = BTreeMap::new();
            let mut published = BTreeSet::new();
            for (source, ports) in updates {
                last.insert(source, ports.clone());
                let expected: BTreeSet<_> = last.values().flatten().map(|p| address(*p)).filter(|a| *a != own).collect();
                match index.apply(SourceId(source), ports.into_iter().map(address)) {
                    Some(union) => { prop_assert_ne!(&union, &published); published = union; }
                    None => prop_assert_eq!(&expected, &published),
                }
                prop_assert_eq!(index.seeds(), &expected);
                prop_assert_eq!(&published, &expected);
            }
        }
    }
}
