//! The seeds of a set of objects that come and go one by one. Pure; it does not know what the objects are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

/// Addresses kept of all objects together: room for a service of tens of thousands, in some MiB. More are not taken; the
/// index keeps far fewer of them anyway.
pub(super) const ADDRESSES_MAX: usize = 65_536;

/// What taking an object over came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Applied {
    /// It says what it said before.
    Same,
    Changed,
    /// There was no room: it counts as if it was not there.
    Full,
}

/// What every object says, by its name.
#[derive(Debug, Default)]
pub(super) struct Objects {
    by_name: BTreeMap<String, BTreeSet<SocketAddr>>,
    addresses: usize,
}

impl Objects {
    /// Takes what an object says now, in place of what it said before. Objects that say nothing take no room.
    pub(super) fn apply(&mut self, name: String, seeds: BTreeSet<SocketAddr>) -> Applied {
        if self.by_name.get(&name).map_or(seeds.is_empty(), |before| *before == seeds) {
            return Applied::Same;
        }
        self.delete(&name);
        if seeds.is_empty() {
            return Applied::Changed;
        }
        if self.addresses + seeds.len() > ADDRESSES_MAX {
            return Applied::Full;
        }
        self.addresses += seeds.len();
        self.by_name.insert(name, seeds);
        Applied::Changed
    }

    /// Forgets an object. Returns whether it had said something.
    pub(super) fn delete(&mut self, name: &str) -> bool {
        let said = self.by_name.remove(name);
        self.addresses -= said.as_ref().map_or(0, BTreeSet::len);
        said.is_some()
    }

    /// The seeds of all objects.
    pub(super) fn seeds(&self) -> BTreeSet<SocketAddr> {
        self.by_name.values().flatten().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(number: u32) -> SocketAddr {
        SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + number), 8002))
    }

    #[test]
    fn addresses_are_bounded_and_room_comes_back() {
        let mut objects = Objects::default();
        let many: BTreeSet<_> = (0..ADDRESSES_MAX as u32).map(address).collect();
        let other: BTreeSet<_> = (1..=ADDRESSES_MAX as u32).map(address).collect();
        let one = BTreeSet::from([address(1)]);
        assert_eq!(objects.apply("a".into(), many), Applied::Changed);
        assert_eq!(objects.apply("b".into(), one.clone()), Applied::Full);
        // An object that changes is not in its own way.
        assert_eq!(objects.apply("a".into(), other.clone()), Applied::Changed);
        assert_eq!(objects.apply("a".into(), other), Applied::Same);
        assert!(objects.delete("a") && !objects.delete("a"));
        assert_eq!(objects.apply("b".into(), one), Applied::Changed);
        assert_eq!(objects.seeds(), BTreeSet::from([address(1)]));
    }

    proptest! {
        /// The seeds are those of the last word of every object that is there.
        #[test]
        fn seeds_are_of_last_words(
            events in prop::collection::vec((0..4u8, prop::option::of(prop::collection::btree_set(0..9u32, 0..5))), 0..40),
        ) {
            let mut objects = Objects::default();
            let mut last = BTreeMap::new();
            for (name, said) in events {
                let before = objects.seeds();
                let changed = match said {
                    Some(said) => {
                        let applied = objects.apply(name.to_string(), said.iter().copied().map(address).collect());
                        last.insert(name, said);
                        applied == Applied::Changed
                    }
                    None => {
                        last.remove(&name);
                        objects.delete(&name.to_string())
                    }
                };
                prop_assert!(changed || before == objects.seeds());
                let expected: BTreeSet<_> = last.values().flatten().copied().map(address).collect();
                prop_assert_eq!(objects.seeds(), expected);
                prop_assert_eq!(objects.addresses, last.values().map(BTreeSet::len).sum::<usize>());
            }
        }
    }
}
