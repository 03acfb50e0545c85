//! The network of the tests: latency, loss, splits, and a clock that only it moves.

// A simulation needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use darter_tracker::Role;

use super::super::*;

/// A datagram under way: when it arrives, its place among those that arrive then, to and from whom, what.
type Flight = Reverse<(Instant, u64, usize, usize, Vec<u8>)>;

struct Node {
    membership: Membership,
    news: Vec<MembershipEvent>,
    cluster: &'static str,
    alive: bool,
}

pub(super) struct Network {
    pub(super) loss: f64,
    /// Members below this number do not reach the others.
    pub(super) split: Option<usize>,
    pub(super) dropped: BTreeMap<String, usize>,
    nodes: BTreeMap<usize, Node>,
    flights: BinaryHeap<Flight>,
    rng: StdRng,
    now: Instant,
    sent: u64,
    starts: u64,
}

fn address(number: usize, port: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, (number / 250) as u8, (number % 250) as u8 + 1], port))
}

fn number(address: SocketAddr) -> usize {
    let SocketAddr::V4(address) = address else { panic!("no such address") };
    let octets = address.ip().octets();
    usize::from(octets[2]) * 250 + usize::from(octets[3]) - 1
}

impl Network {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            loss: 0.0,
            split: None,
            dropped: BTreeMap::new(),
            nodes: BTreeMap::new(),
            flights: BinaryHeap::new(),
            rng: StdRng::seed_from_u64(seed),
            now: Instant::now(),
            sent: 0,
            starts: 0,
        }
    }

    pub(super) fn start(&mut self, number: usize, cluster: &'static str) {
        self.start_with(number, cluster, 1_000_000);
    }

    /// Starts a member whose only seed is number 0.
    pub(super) fn start_with(&mut self, number: usize, cluster: &'static str, epoch: u64) {
        self.start_at(number, number, cluster, epoch);
    }

    /// Starts a member that knows number 0 only by an address that is not the one it advertises.
    pub(super) fn start_with_alias(&mut self, number: usize) {
        self.start_seeded(number, number, "lab", 1_000_000, address(0, 30_000));
    }

    pub(super) fn start_impostor(&mut self, number: usize, victim: usize) {
        self.start_at(number, victim, "lab", 2_000_000);
    }

    fn start_at(&mut self, number: usize, claims: usize, cluster: &'static str, epoch: u64) {
        self.start_seeded(number, claims, cluster, epoch, address(0, 8002));
    }

    fn start_seeded(&mut self, number: usize, claims: usize, cluster: &'static str, epoch: u64, seed: SocketAddr) {
        self.starts += 1;
        let keys = Arc::new(ClusterKeys::new(cluster, &[[1; 32]]).unwrap());
        let mut key_seed = [0; 32];
        key_seed[..8].copy_from_slice(&self.starts.to_le_bytes());
        let node = Arc::new(NodeKey::new(&keys, &key_seed, epoch).unwrap());
        let (gossip, peer) = (address(claims, 8002), address(claims, 15001));
        let me = Member { id: node.id(), gossip, peer, epoch, role: Role::Node, zone: 0 };
        let mut membership = Membership::new(me, keys, node, StdRng::from_rng(&mut self.rng)).unwrap();
        membership.set_seeds(BTreeSet::from([seed]), self.now);
        self.nodes.insert(number, Node { membership, news: Vec::new(), cluster, alive: true });
        self.flush(number);
    }

    pub(super) fn kill(&mut self, number: usize) {
        self.nodes.get_mut(&number).unwrap().alive = false;
    }

    /// Says goodbye, and is gone half a second later.
    pub(super) fn leave(&mut self, number: usize) {
        let now = self.now;
        self.member(number).leave(now);
        self.flush(number);
        self.run_for(Duration::from_millis(500));
        self.kill(number);
    }

    pub(super) fn member(&mut self, number: usize) -> &mut Membership {
        &mut self.nodes.get_mut(&number).unwrap().membership
    }

    pub(super) fn id(&self, number: usize) -> NodeId {
        self.nodes[&number].membership.me().id
    }

    pub(super) fn news(&self, number: usize) -> Vec<MembershipEvent> {
        self.nodes[&number].news.clone()
    }

    pub(super) fn clear_news(&mut self) {
        self.nodes.values_mut().for_each(|node| node.news.clear());
    }

    pub(super) fn views(&self) -> Vec<usize> {
        self.nodes.values().map(|node| node.membership.members().len()).collect()
    }

    /// Whether all who live know exactly each other.
    pub(super) fn is_complete(&self) -> bool {
        let live = || self.nodes.values().filter(|node| node.alive);
        let all: BTreeMap<NodeId, Member> = live().map(|n| (n.membership.me().id, *n.membership.me())).collect();
        live().all(|node| {
            let mut view = node.membership.members().clone();
            view.insert(node.membership.me().id, *node.membership.me());
            view == all
        })
    }

    pub(super) fn run_for(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// How long it took until `done`, if it did within `limit`.
    pub(super) fn run_until(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> Option<Duration> {
        let begin = self.now;
        let mut checked = begin;
        loop {
            if self.now >= checked {
                if done(self) {
                    return Some(self.now - begin);
                }
                checked = self.now + Duration::from_millis(20);
            }
            if !self.step(begin + limit) {
                return None;
            }
        }
    }

    /// Moves on to the next thing that happens; false if that is not before `end`.
    fn step(&mut self, end: Instant) -> bool {
        let arrival = self.flights.peek().map(|Reverse((at, ..))| *at);
        let timers = self.nodes.iter().filter(|(_, node)| node.alive);
        let timer = timers.filter_map(|(number, node)| Some((node.membership.poll_timeout()?, *number))).min();
        let next = arrival.into_iter().chain(timer.map(|(at, _)| at)).min();
        let Some(at) = next.filter(|at| *at < end) else {
            self.now = end;
            return false;
        };
        self.now = self.now.max(at);
        if arrival.is_some_and(|arrival| timer.is_none_or(|(timer, _)| arrival <= timer)) {
            self.deliver();
        } else if let Some((_, number)) = timer {
            let now = self.now;
            self.member(number).handle_timer(now);
            self.flush(number);
        }
        true
    }

    fn deliver(&mut self) {
        let Some(Reverse((_, _, to, from, datagram))) = self.flights.pop() else { return };
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&to).filter(|node| node.alive) else { return };
        if let Err(reason) = node.membership.handle_datagram(address(from, 8002), &datagram, now) {
            *self.dropped.entry(format!("{} {reason}", node.cluster)).or_default() += 1;
        }
        self.flush(to);
    }

    fn flush(&mut self, from: usize) {
        let node = self.nodes.get_mut(&from).unwrap();
        while let Some(event) = node.membership.poll_event() {
            node.news.push(event);
        }
        while let Some((to, datagram)) = node.membership.poll_transmit() {
            assert!(datagram.len() <= seal::DATAGRAM_BYTES_MAX);
            let to = number(to);
            let apart = self.split.is_some_and(|split| (from < split) != (to < split));
            if apart || self.rng.random_bool(self.loss) {
                continue;
            }
            self.sent += 1;
            let latency = Duration::from_micros(self.rng.random_range(300..1500));
            self.flights.push(Reverse((self.now + latency, self.sent, to, from, datagram)));
        }
    }
}
