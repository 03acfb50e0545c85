//! Who of a task's members is introduced to whom: a random graph whose degrees are even, mostly within zones.
//!
//! A few poorly connected nodes are the whole tail of a pull, and more neighbours than [`DEGREE`] do not make it faster. Traffic
//! between zones is expensive, so a member knows few beyond its own, but never none.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use darter_tracker::NodeId;
use rand::{Rng, RngExt as _};

/// Neighbours that a downloader is introduced to. More do not make it faster; fewer leave poorly connected nodes, which
/// are the whole tail (simulated with 16 and 32 at 1000 nodes).
pub const DEGREE: usize = 16;

/// Neighbours that a newcomer is introduced to at once; it has the others by being introduced to who comes after it. Were it to have
/// them all at once, nobody would be left to know but those who came just before: a chain, through which a piece would
/// need many steps to the other end.
pub const DEGREE_NEW: usize = DEGREE / 2;

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
    /// By zone, in random order: those who may be introduced to others.
    open: BTreeMap<Zone, BTreeSet<(u64, NodeId)>>,
}

#[derive(Debug)]
struct Member {
    zone: Zone,
    /// Drawn at its entry: where it stands among the others.
    draw: u64,
    knows: BTreeSet<NodeId>,
}

impl Introductions {
    /// Takes a member in; one that is there already stays as it is.
    pub fn enter(&mut self, node: NodeId, zone: Zone, draw: u64) {
        if let Entry::Vacant(place) = self.members.entry(node) {
            place.insert(Member { zone, draw, knows: BTreeSet::new() });
            self.open.entry(zone).or_default().insert((draw, node));
        }
    }

    /// Forgets a member.
    pub fn leave(&mut self, node: NodeId) {
        let Some(member) = self.members.get(&node) else { return };
        for other in member.knows.clone() {
            if let Some(member) = self.members.get_mut(&other) {
                member.knows.remove(&node);
                self.open.entry(member.zone).or_default().insert((member.draw, other));
            }
        }
        if let Some(member) = self.members.remove(&node) {
            self.close(member.zone, (member.draw, node));
        }
    }

    /// Everybody whom `node` knows and who is not in `without`.
    #[must_use]
    pub fn known(&self, node: NodeId, without: &BTreeSet<NodeId>) -> Vec<NodeId> {
        let known = self.members.get(&node).into_iter().flat_map(|member| &member.knows);
        known.filter(|other| !without.contains(*other)).copied().collect()
    }

    /// Introduces `node` to random others until it knows `degree`, at most [`DEGREE`], and names those. Nobody is introduced to who
    /// is in `without`.
    pub fn introduce(
        &mut self,
        node: NodeId,
        degree: usize,
        without: &BTreeSet<NodeId>,
        rng: &mut impl Rng,
    ) -> Vec<NodeId> {
        let Some(member) = self.members.get(&node) else { return Vec::new() };
        let (zone, known) = (member.zone, member.knows.clone());
        let foreign = self.foreign(node);
        let own = known.len() - foreign;
        let elsewhere = || self.open.iter().filter(|(other, _)| **other != zone);
        // Places for other zones are kept free only where there are any.
        let kept = if elsewhere().next().is_some() { FOREIGN.saturating_sub(foreign) } else { 0 };
        let unfit = |other: &NodeId| *other == node || known.contains(other) || without.contains(other);
        let wanted = degree.saturating_sub(known.len() + kept);
        let mut chosen = BTreeSet::new();
        if let Some(open) = self.open.get(&zone) {
            draw(open, wanted, |other| !unfit(other), &mut chosen, rng);
        }
        let few = if own + chosen.len() < FOREIGN_MAX { FOREIGN_MAX } else { FOREIGN };
        let wanted = few.saturating_sub(foreign).min(DEGREE.saturating_sub(known.len() + chosen.len()));
        let fit = |other: &NodeId| !unfit(other) && self.foreign(*other) < FOREIGN_MAX;
        let mut others = BTreeSet::new();
        for (_, open) in elsewhere() {
            draw(open, others.len() + wanted, fit, &mut others, rng);
        }
        // As many of each zone as of any other: names are random.
        let first = NodeId::from_bytes(rng.random());
        chosen.extend(others.range(first..).chain(others.range(..first)).take(wanted));
        for other in &chosen {
            self.acquaint(node, *other);
            self.acquaint(*other, node);
        }
        chosen.into_iter().collect()
    }

    /// How many that a member knows stand in other zones.
    fn foreign(&self, node: NodeId) -> usize {
        let Some(member) = self.members.get(&node) else { return 0 };
        let elsewhere = |other: &&NodeId| self.members.get(other).is_some_and(|other| other.zone != member.zone);
        member.knows.iter().filter(elsewhere).count()
    }

    /// Lets a member know another one.
    fn acquaint(&mut self, node: NodeId, other: NodeId) {
        let Some(member) = self.members.get_mut(&node) else { return };
        member.knows.insert(other);
        if member.knows.len() >= DEGREE_MAX {
            let (zone, place) = (member.zone, (member.draw, node));
            self.close(zone, place);
        }
    }

    /// Introduces a member to nobody else.
    fn close(&mut self, zone: Zone, place: (u64, NodeId)) {
        if let Some(open) = self.open.get_mut(&zone) {
            open.remove(&place);
            if open.is_empty() {
                self.open.remove(&zone);
            }
        }
    }
}

/// Adds random members of `open` to `chosen` until that has `wanted`.
fn draw(
    open: &BTreeSet<(u64, NodeId)>,
    wanted: usize,
    fit: impl Fn(&NodeId) -> bool,
    chosen: &mut BTreeSet<NodeId>,
    rng: &mut impl Rng,
) {
    while chosen.len() < wanted {
        let first = (rng.random(), NodeId::from_bytes([0; NodeId::BYTES]));
        let mut ring = open.range(first..).chain(open.range(..first)).map(|(_, node)| node);
        let Some(next) = ring.find(|node| fit(node) && !chosen.contains(*node)) else { return };
        chosen.insert(*next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    fn nodes(count: u16, zone_of: impl Fn(u16) -> Zone) -> (Introductions, Vec<NodeId>) {
        let (mut graph, mut rng) = (Introductions::default(), StdRng::seed_from_u64(5));
        let nodes: Vec<NodeId> = (0..count).map(|_| NodeId::from_bytes(rng.random())).collect();
        for (number, node) in (0..).zip(&nodes) {
            graph.enter(*node, zone_of(number), rng.random());
            graph.introduce(*node, DEGREE, &BTreeSet::new(), &mut rng);
        }
        (graph, nodes)
    }

    fn count(graph: &Introductions, node: NodeId, is: impl Fn(Zone) -> bool) -> usize {
        graph.members[&node].knows.iter().filter(|other| is(graph.members[*other].zone)).count()
    }

    #[test]
    fn degrees_are_even_and_knowing_is_mutual() {
        let (mut graph, nodes) = nodes(500, |_| 0);
        let mut rng = StdRng::seed_from_u64(6);
        for node in &nodes {
            graph.introduce(*node, DEGREE, &BTreeSet::new(), &mut rng);
            let known = graph.known(*node, &BTreeSet::new());
            assert!((DEGREE..=DEGREE_MAX).contains(&known.len()), "{}", known.len());
            assert!(known.iter().all(|other| graph.members[other].knows.contains(node)));
        }
        let gone = nodes[7];
        graph.leave(gone);
        assert!(graph.members.values().all(|member| !member.knows.contains(&gone)));
        let open = graph.members.values().filter(|member| member.knows.len() < DEGREE_MAX).count();
        assert_eq!((graph.open[&0].len(), graph.members.len()), (open, 499), "who knows few enough is open");
    }

    #[test]
    fn zones_know_few_of_each_other_and_never_nobody() {
        let (mut graph, nodes) = nodes(300, |number| 1 + number % 3);
        let (mut between, mut rng) = (0, StdRng::seed_from_u64(6));
        for node in &nodes {
            graph.introduce(*node, DEGREE, &BTreeSet::new(), &mut rng);
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
        let (newcomer, mut rng) = (NodeId::from_bytes([1; 16]), StdRng::seed_from_u64(6));
        graph.enter(newcomer, 0, 1);
        let unwanted = BTreeSet::from([nodes[0], nodes[1]]);
        assert_eq!(graph.introduce(newcomer, DEGREE, &unwanted, &mut rng), [nodes[2]]);
        let without = BTreeSet::from([newcomer]);
        assert!(graph.introduce(nodes[2], DEGREE, &without, &mut rng).is_empty(), "it knows the other two");
        assert!(graph.known(nodes[2], &BTreeSet::from([newcomer])).iter().all(|other| *other != newcomer));
    }
}
