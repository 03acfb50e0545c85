//! Who of a task's members is introduced to whom: a random graph whose degrees are even, mostly within zones.
//!
//! A few poorly connected nodes are the whole tail of a pull, and more neighbours than [`DEGREE`] do not make it faster. Traffic
//! between zones is expensive, so a member knows few beyond its own, but never none.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use darter_tracker::NodeId;

/// Neighbours that a downloader is introduced to. More do not make it faster; fewer leave poorly connected nodes, which
/// are the whole tail (simulated with 16 and 32 at 1000 nodes).
pub const DEGREE: usize = 16;

/// Neighbours beyond which a downloader is introduced to nobody else: the first to come would know everybody.
pub const DEGREE_MAX: usize = DEGREE + DEGREE / 2;

/// Neighbours in other zones that a member is introduced to, if it has enough in its own: with one, a zone would wait for that
/// one whenever it is slow.
pub const FOREIGN: usize = 4;

/// Neighbours in other zones at most, for one that has few in its own or is asked by such.
pub const FOREIGN_MAX: usize = DEGREE / 2;

/// The number of a zone; 0 is none.
pub type Zone = u16;

/// The graph.
#[derive(Debug, Default)]
pub struct Introductions {
    members: BTreeMap<NodeId, Member>,
    /// By zone, then by how many they know, then as drawn: who is introduced next.
    order: BTreeMap<Zone, BTreeSet<(usize, u64, NodeId)>>,
}

#[derive(Debug)]
struct Member {
    zone: Zone,
    /// Drawn at its entry: equals are introduced in random order.
    draw: u64,
    knows: BTreeSet<NodeId>,
}

impl Introductions {
    /// Takes a member in; one that is there already stays as it is.
    pub fn enter(&mut self, node: NodeId, zone: Zone, draw: u64) {
        if let Entry::Vacant(place) = self.members.entry(node) {
            place.insert(Member { zone, draw, knows: BTreeSet::new() });
            self.order.entry(zone).or_default().insert((0, draw, node));
        }
    }

    /// Forgets a member.
    pub fn leave(&mut self, node: NodeId) {
        let Some(member) = self.members.get(&node) else { return };
        for other in member.knows.clone() {
            self.change(other, |knows| {
                knows.remove(&node);
            });
        }
        if let Some(member) = self.members.remove(&node)
            && let Some(order) = self.order.get_mut(&member.zone)
        {
            order.remove(&(member.knows.len(), member.draw, node));
            if order.is_empty() {
                self.order.remove(&member.zone);
            }
        }
    }

    /// Introduces `node` to those who know the fewest, and names everybody whom it knows. Who is in `without` is not named, and
    /// introduced to nobody.
    pub fn introduce(&mut self, node: NodeId, without: &BTreeSet<NodeId>) -> Vec<NodeId> {
        let Some(member) = self.members.get(&node) else { return Vec::new() };
        let (zone, known) = (member.zone, member.knows.clone());
        let foreign = self.foreign(node);
        let own = known.len() - foreign;
        let has_others = self.order.keys().any(|other| *other != zone);
        // Places for other zones are kept free only where there are any.
        let kept = if has_others { FOREIGN.saturating_sub(foreign) } else { 0 };
        let unfit = |other: &NodeId| *other == node || known.contains(other) || without.contains(other);
        let fit = |(_, _, other): &&(usize, u64, NodeId)| !unfit(other);
        let wanted = DEGREE.saturating_sub(known.len() + kept);
        let mut chosen: Vec<NodeId> = self
            .order
            .get(&zone)
            .into_iter()
            .flatten()
            .take_while(|(degree, ..)| *degree < DEGREE_MAX)
            .filter(fit)
            .take(wanted)
            .map(|(_, _, other)| *other)
            .collect();
        let few = if own + chosen.len() < FOREIGN_MAX { FOREIGN_MAX } else { FOREIGN };
        let mut wanted = few.saturating_sub(foreign).min(DEGREE.saturating_sub(known.len() + chosen.len()));
        let mut others: Vec<_> = self
            .order
            .iter()
            .filter(|(other, _)| **other != zone)
            .flat_map(|(_, order)| {
                let open = order.iter().take_while(|(degree, ..)| *degree < DEGREE_MAX).filter(fit);
                open.filter(|(_, _, other)| self.foreign(*other) < FOREIGN_MAX).take(wanted)
            })
            .collect();
        others.sort_unstable();
        for (_, _, other) in others {
            if wanted == 0 {
                break;
            }
            wanted -= 1;
            chosen.push(*other);
        }
        for other in chosen {
            self.change(node, |knows| {
                knows.insert(other);
            });
            self.change(other, |knows| {
                knows.insert(node);
            });
        }
        // Everybody it knows of is named again: it may have lost one, and names are cheap.
        let known = self.members.get(&node).into_iter().flat_map(|member| &member.knows);
        known.filter(|other| !without.contains(*other)).copied().collect()
    }

    /// How many that a member knows stand in other zones.
    fn foreign(&self, node: NodeId) -> usize {
        let Some(member) = self.members.get(&node) else { return 0 };
        let elsewhere = |other: &&NodeId| self.members.get(other).is_some_and(|other| other.zone != member.zone);
        member.knows.iter().filter(elsewhere).count()
    }

    fn change(&mut self, node: NodeId, change: impl FnOnce(&mut BTreeSet<NodeId>)) {
        let Some(member) = self.members.get_mut(&node) else { return };
        let Some(order) = self.order.get_mut(&member.zone) else { return };
        order.remove(&(member.knows.len(), member.draw, node));
        change(&mut member.knows);
        order.insert((member.knows.len(), member.draw, node));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    fn nodes(count: u16, zone_of: impl Fn(u16) -> Zone) -> (Introductions, Vec<NodeId>) {
        let (mut graph, mut rng) = (Introductions::default(), StdRng::seed_from_u64(5));
        let nodes: Vec<NodeId> = (0..count).map(|_| NodeId::from_bytes(rng.random())).collect();
        for (number, node) in (0..).zip(&nodes) {
            graph.enter(*node, zone_of(number), rng.random());
            graph.introduce(*node, &BTreeSet::new());
        }
        (graph, nodes)
    }

    fn count(graph: &Introductions, node: NodeId, is: impl Fn(Zone) -> bool) -> usize {
        graph.members[&node].knows.iter().filter(|other| is(graph.members[*other].zone)).count()
    }

    #[test]
    fn degrees_are_even_and_knowing_is_mutual() {
        let (mut graph, nodes) = nodes(500, |_| 0);
        for node in &nodes {
            let known = graph.introduce(*node, &BTreeSet::new());
            assert!((DEGREE..=DEGREE_MAX).contains(&known.len()), "{}", known.len());
            assert!(known.iter().all(|other| graph.members[other].knows.contains(node)));
        }
        let gone = nodes[7];
        graph.leave(gone);
        assert!(graph.members.values().all(|member| !member.knows.contains(&gone)));
        let listed: usize = graph.order.values().map(BTreeSet::len).sum();
        assert_eq!((listed, graph.members.len()), (499, 499), "the order has everybody once");
    }

    #[test]
    fn zones_know_few_of_each_other_and_never_nobody() {
        let (mut graph, nodes) = nodes(300, |number| 1 + number % 3);
        let mut between = 0;
        for node in &nodes {
            graph.introduce(*node, &BTreeSet::new());
        }
        for node in &nodes {
            let zone = graph.members[node].zone;
            let (own, foreign) = (count(&graph, *node, |of| of == zone), count(&graph, *node, |of| of != zone));
            assert!(own >= DEGREE - FOREIGN_MAX && (1..=FOREIGN_MAX).contains(&foreign), "{own} {foreign}");
            between += foreign;
        }
        assert!(between <= nodes.len() * FOREIGN_MAX, "{between} links between zones");
    }

    #[test]
    fn one_alone_in_its_zone_knows_others() {
        let (graph, nodes) = nodes(50, |number| if number == 30 { 9 } else { 1 });
        assert!(count(&graph, nodes[30], |of| of == 1) >= FOREIGN_MAX);
    }

    #[test]
    fn the_unwanted_are_not_introduced() {
        let (mut graph, nodes) = nodes(3, |_| 0);
        let newcomer = NodeId::from_bytes([1; 16]);
        graph.enter(newcomer, 0, 1);
        assert_eq!(graph.introduce(newcomer, &BTreeSet::from([nodes[0], nodes[1]])), [nodes[2]]);
        assert!(graph.introduce(nodes[2], &BTreeSet::from([newcomer])).iter().all(|other| *other != newcomer));
    }
}
