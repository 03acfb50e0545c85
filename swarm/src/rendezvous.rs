//! Which member is the home of a task: highest-random-weight hashing over the live members, seed nodes first.
//!
//! Everybody computes the same order from what gossip told him; a member's death moves only the tasks that it was home
//! for.

use darter_tracker::{NodeId, Role, TaskId};

/// The members in the order in which they are home for `task`: all seeds before all nodes, each by falling weight.
#[must_use]
pub fn order(task: &TaskId, members: impl IntoIterator<Item = (NodeId, Role)>) -> Vec<NodeId> {
    let mut ranked: Vec<_> =
        members.into_iter().map(|(node, role)| (role == Role::Seed, weight(task, node), node)).collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.into_iter().map(|(_, _, node)| node).collect()
}

/// Whether `one` comes before `other` in rank for `task`, were both of the same role.
#[must_use]
pub fn before(task: &TaskId, one: NodeId, other: NodeId) -> bool {
    (weight(task, one), one) > (weight(task, other), other)
}

/// Where among `places` a member begins that shall not begin where another one does.
#[must_use]
pub fn place(task: &TaskId, node: NodeId, places: u32) -> u32 {
    let [one, two, three, four, ..] = weight(task, node);
    u32::from_be_bytes([one, two, three, four]) % places.max(1)
}

fn weight(task: &TaskId, node: NodeId) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(task.digest().as_bytes());
    hasher.update(node.as_bytes());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_tracker::Digest;
    use proptest::prelude::*;

    fn node(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 16])
    }

    proptest! {
        #[test]
        fn a_death_moves_nobody_else(task in any::<[u8; 32]>(), count in 2..40u8, dead in any::<prop::sample::Index>()) {
            let task = TaskId::blob(Digest::Sha256(task));
            let members: Vec<_> = (0..count).map(|n| (node(n), if n % 9 == 8 { Role::Seed } else { Role::Node })).collect();
            let before = order(&task, members.clone());
            let gone = members[dead.index(members.len())].0;
            let after = order(&task, members.iter().copied().filter(|(n, _)| *n != gone).rev());
            let expected: Vec<_> = before.into_iter().filter(|n| *n != gone).collect();
            prop_assert_eq!(after, expected);
        }
    }

    #[test]
    fn homes_are_spread_and_seeds_come_first() {
        let members: Vec<_> = (0..20).map(|n| (node(n), Role::Node)).collect();
        let mut homes = std::collections::BTreeMap::new();
        for byte in 0..200u8 {
            let task = TaskId::blob(Digest::Sha256([byte; 32]));
            *homes.entry(order(&task, members.clone())[0]).or_insert(0) += 1;
            let with_seed = members.iter().copied().chain([(node(77), Role::Seed)]);
            assert_eq!(order(&task, with_seed)[0], node(77));
        }
        assert!(homes.len() >= 18, "{homes:?}");
        assert!(homes.values().all(|count| *count <= 25), "{homes:?}");
    }
}
