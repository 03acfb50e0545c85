//! Seeded cold pulls in virtual time: real homes, downloaders and upload queues, a toy network with fixed delays.

// A simulation needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::home::Home;
use crate::upload::{Admission, Ticket, Uploads};
use darter_tracker::{Digest, PieceSize, ServiceDownRequest};
use rand::RngExt as _;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

const CALL: Duration = Duration::from_millis(1);
const TRANSFER: Duration = Duration::from_millis(4);
const ORIGIN: Duration = Duration::from_millis(3);

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Start,
    Reply(u64),
    Wake,
    OriginPiece(u64, u32),
    Serve(usize, u64, u32),
    Delivered(usize, u32),
    Fail(usize, u32, Option<ErrorKind>),
    Kill,
}

struct Node {
    id: NodeId,
    home: Home,
    task: Option<Task>,
    uploads: Uploads,
    queued: BTreeMap<Ticket, (usize, u32)>,
    sessions: BTreeSet<usize>,
    runs: BTreeMap<RunId, (PieceRange, u32, Instant)>,
    reader: u32,
    /// When the last alarm rings.
    wake: Instant,
    alive: bool,
    answers: bool,
    done_at: Option<Duration>,
}

struct Net {
    nodes: Vec<Node>,
    events: BinaryHeap<Reverse<(Instant, u64, usize, Event)>>,
    replies: BTreeMap<u64, Reply>,
    sequence: u64,
    start: Instant,
    now: Instant,
    id: TaskId,
    geometry: Geometry,
    /// How often each piece left the registry.
    registry: Vec<u32>,
    requests: u32,
    fallbacks: u32,
    registry_refuses: BTreeSet<usize>,
    /// Half of what neighbours tell each other never arrives.
    loses_news: bool,
    /// Members that homes believe to hold everything.
    believed: BTreeSet<usize>,
    rng: StdRng,
}

enum Reply {
    Register(RegisterResponse),
    Pull(PullPieceResponse),
    Report(Option<RunId>, ReportPieceResponse),
    Error(TrackerError),
}

impl Net {
    fn new(count: usize, pieces: u32, seed: u64) -> Self {
        let id = TaskId::blob(Digest::Sha256([seed as u8; 32]));
        let geometry = Geometry::new(u64::from(pieces) << 18, PieceSize::new(1 << 18).unwrap()).unwrap();
        let start = Instant::now();
        let nodes = (0..count)
            .map(|n| {
                let id = NodeId::from_bytes([n as u8 + 1; 16]);
                let mut home = Home::new(id, seed + n as u64);
                home.set_cluster_size(count);
                Node {
                    id,
                    home,
                    task: None,
                    uploads: Uploads::default(),
                    queued: BTreeMap::new(),
                    sessions: BTreeSet::new(),
                    runs: BTreeMap::new(),
                    reader: 0,
                    wake: start,
                    alive: true,
                    answers: true,
                    done_at: None,
                }
            })
            .collect();
        let mut net = Self {
            nodes,
            events: BinaryHeap::new(),
            replies: BTreeMap::new(),
            sequence: 0,
            start,
            now: start,
            id,
            geometry,
            registry: vec![0; pieces as usize],
            requests: 0,
            fallbacks: 0,
            registry_refuses: BTreeSet::new(),
            loses_news: false,
            believed: BTreeSet::new(),
            rng: StdRng::seed_from_u64(seed),
        };
        for node in 0..count {
            let delay = Duration::from_millis(net.rng.random_range(0..20));
            net.push(delay, node, Event::Start);
        }
        net
    }

    fn push(&mut self, delay: Duration, node: usize, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((self.now + delay, self.sequence, node, event)));
    }

    fn index(&self, id: NodeId) -> usize {
        self.nodes.iter().position(|node| node.id == id).unwrap()
    }

    fn homes(&self, node: usize) -> Vec<NodeId> {
        let members = self.nodes.iter().filter(|n| n.alive).map(|n| (n.id, darter_tracker::Role::Node));
        let mut order = crate::rendezvous::order(&self.id, members);
        order.truncate(3);
        if !order.contains(&self.nodes[node].id) {
            order.push(self.nodes[node].id);
        }
        order
    }

    /// Runs until everybody alive has everything; panics after a minute of virtual time.
    fn run(&mut self) {
        while self.nodes.iter().any(|node| node.alive && node.answers && node.done_at.is_none()) {
            let Reverse((at, _, node, event)) = self.events.pop().expect("somebody waits for nothing");
            assert!(at < self.start + Duration::from_secs(60), "not done after a minute: {:?}", self.state());
            self.now = at;
            if self.nodes[node].alive {
                self.handle(node, event);
            }
        }
    }

    fn state(&self) -> Vec<String> {
        self.nodes.iter().map(|n| format!("{:?}", n.task.as_ref().map(|t| t.have.clone()))).collect()
    }

    fn handle(&mut self, node: usize, event: Event) {
        let now = self.now;
        match event {
            Event::Start => {
                let homes = self.homes(node);
                let have = Bitmap::new(self.geometry.pieces());
                let mut task = Task::new(self.id, self.geometry, have, homes, node as u64, now);
                task.handle_reader(ReaderId(1), PieceIndex(0), now);
                self.nodes[node].task = Some(task);
            }
            Event::Kill => {
                self.nodes[node].alive = false;
                return;
            }
            Event::Wake if self.nodes[node].wake > now => return,
            Event::Wake => self.task(node).handle_timeout(now),
            Event::Reply(reply) => {
                let (home, reply) =
                    (NodeId::from_bytes([(reply % 256) as u8; 16]), self.replies.remove(&reply).unwrap());
                match reply {
                    Reply::Register(response) => self.task(node).handle_registered(home, &response, now),
                    Reply::Pull(response) => self.task(node).handle_pulled(home, response, now),
                    Reply::Report(run, response) => self.task(node).handle_reported(home, run, response, now),
                    Reply::Error(error) => self.task(node).handle_home_failed(home, &error, now),
                }
            }
            Event::OriginPiece(run, piece) => {
                let run = RunId(run);
                if let Some((range, next, _)) = self.nodes[node].runs.get_mut(&run) {
                    *next = piece + 1;
                    if *next == range.end() {
                        self.nodes[node].runs.remove(&run);
                    }
                    self.task(node).handle_origin_piece(run, PieceIndex(piece), now);
                }
            }
            Event::Serve(to, ticket, piece) => self.serve(node, to, ticket, piece),
            Event::Delivered(from, piece) => {
                let id = self.nodes[from].id;
                let wanted = self.task(node).neighbours.get(&id).is_some_and(|n| n.asked(PieceIndex(piece)));
                if wanted {
                    self.task(node).handle_piece(id, PieceIndex(piece), now);
                }
            }
            Event::Fail(from, piece, kind) => {
                let id = self.nodes[from].id;
                self.task(node).handle_piece_failed(id, PieceIndex(piece), kind, now);
            }
        }
        self.drain(node);
    }

    fn task(&mut self, node: usize) -> &mut Task {
        self.nodes[node].task.as_mut().unwrap()
    }

    fn serve(&mut self, node: usize, to: usize, ticket: u64, piece: u32) {
        // `ticket` 0: a request has arrived; otherwise that upload has been sent.
        let holds = self.nodes[to].task.as_ref().map_or(0, |task| task.have().count());
        let peer = self.nodes[to].id;
        if !self.nodes[node].answers {
            return;
        }
        if ticket == 0 {
            if !self.nodes[node].task.as_ref().is_some_and(|task| task.have().contains(PieceIndex(piece))) {
                return self.push(CALL, to, Event::Fail(node, piece, Some(ErrorKind::NotFound)));
            }
            match self.nodes[node].uploads.request(self.id, peer, holds) {
                Admission::Busy => self.push(CALL, to, Event::Fail(node, piece, None)),
                Admission::Queued(ticket) => {
                    self.nodes[node].queued.insert(ticket, (to, piece));
                }
                Admission::Serve(ticket) => self.upload(node, ticket, to, piece),
            }
        } else {
            let (ticket, now) = (
                *self.nodes[node].queued.keys().find(|t| format!("{t:?}") == format!("Ticket({ticket})")).unwrap(),
                self.now,
            );
            self.nodes[node].queued.remove(&ticket);
            self.task(node).handle_uploaded(PieceIndex(piece), now);
            for next in self.nodes[node].uploads.finish(ticket) {
                let (to, piece) = self.nodes[node].queued[&next];
                self.upload(node, next, to, piece);
            }
        }
    }

    fn upload(&mut self, node: usize, ticket: Ticket, to: usize, piece: u32) {
        self.nodes[node].queued.insert(ticket, (to, piece));
        let number = format!("{ticket:?}").trim_start_matches("Ticket(").trim_end_matches(')').parse().unwrap();
        self.push(TRANSFER, to, Event::Delivered(node, piece));
        self.push(TRANSFER, node, Event::Serve(to, number, piece));
    }

    fn drain(&mut self, node: usize) {
        let now = self.now;
        if self.nodes[node].task.is_none() {
            return;
        }
        while let Some(action) = self.task(node).poll_action() {
            self.execute(node, action);
        }
        // The client reads on.
        loop {
            let reader = self.nodes[node].reader;
            if reader >= self.geometry.pieces() || !self.task(node).have().contains(PieceIndex(reader)) {
                break;
            }
            self.nodes[node].reader += 1;
        }
        let reader = self.nodes[node].reader;
        if self.task(node).is_complete() {
            self.nodes[node].done_at.get_or_insert(now - self.start);
        } else {
            let before = self.task(node).readers.get(&ReaderId(1)).map(|waiting| waiting.piece.0);
            if before != Some(reader) {
                self.task(node).handle_reader(ReaderId(1), PieceIndex(reader), now);
                return self.drain(node);
            }
        }
        let wake = self.task(node).poll_timeout(now);
        // Only the last alarm set counts; earlier ones ring in vain.
        self.nodes[node].wake = wake;
        self.push(wake - now, node, Event::Wake);
    }

    fn call(&mut self, node: usize, home: NodeId, call: impl FnOnce(&mut Home, NodeId, Instant) -> Reply) {
        let (at, from) = (self.index(home), self.nodes[node].id);
        if !self.nodes[at].alive || !self.nodes[at].answers {
            return;
        }
        let now = self.now;
        let reply = call(&mut self.nodes[at].home, from, now);
        self.sequence += 1;
        let key = self.sequence << 8 | u64::from(home.as_bytes()[0]);
        self.replies.insert(key, reply);
        self.push(CALL * 2, node, Event::Reply(key));
    }

    fn execute(&mut self, node: usize, action: Action) {
        let geometry = self.geometry;
        let done = self.nodes.iter().filter(|node| node.done_at.is_some() && node.alive);
        let mut holders: Vec<NodeId> = done.map(|node| node.id).take(crate::home::swarm::ADVERTISERS).collect();
        holders.extend(self.believed.iter().map(|node| self.nodes[*node].id));
        match action {
            Action::Register { home, request } => self.call(node, home, |home, from, now| {
                // What gossip has told the home.
                for holder in holders {
                    home.learn_holder(request.task, geometry, holder, now);
                }
                home.register(from, request, now).map_or_else(Reply::Error, Reply::Register)
            }),
            Action::Pull { home, request } => self.call(node, home, |home, from, now| {
                home.pull_piece(from, &request, now).map_or_else(Reply::Error, Reply::Pull)
            }),
            Action::Report { home, run, request } => self.call(node, home, |home, from, now| {
                home.report_piece(from, &request, now).map_or_else(Reply::Error, |r| Reply::Report(run, r))
            }),
            Action::Blame { home, request } => {
                let (at, from, now) = (self.index(home), self.nodes[node].id, self.now);
                let _ = self.nodes[at].home.report_error(from, &request, now);
            }
            Action::Connect { peer } => self.connect(node, peer),
            Action::Request { peer, piece } => {
                let to = self.index(peer);
                self.push(CALL, to, Event::Serve(node, 0, piece.0));
            }
            Action::Cancel { .. } => {}
            Action::Have { pieces } => {
                for other in self.nodes[node].sessions.clone() {
                    if self.loses_news && self.rng.random() {
                        continue;
                    }
                    let (id, now) = (self.nodes[node].id, self.now);
                    if self.nodes[other].alive
                        && let Some(task) = self.nodes[other].task.as_mut()
                    {
                        task.handle_have(id, &pieces, now);
                        self.nodes[other].wake = now;
                        self.push(Duration::ZERO, other, Event::Wake);
                    }
                }
            }
            Action::Fetch { run, pieces } => {
                if self.registry_refuses.contains(&node) {
                    let now = self.now;
                    return self.task(node).handle_origin_failed(run, OriginFailure::Refused, now);
                }
                self.requests += 1;
                let now = self.now;
                self.nodes[node].runs.insert(run, (pieces, pieces.first.0, now));
            }
            Action::ReadOn { run } => {
                let now = self.now;
                if let Some((range, _, free)) = self.nodes[node].runs.get_mut(&run) {
                    let at = (*free).max(now) + ORIGIN;
                    let piece = range.first.0;
                    *free = at;
                    range.first.0 += 1;
                    range.count -= 1;
                    self.registry[piece as usize] += 1;
                    self.push(at - now, node, Event::OriginPiece(run.0, piece));
                }
            }
            Action::Stop { run } => {
                self.nodes[node].runs.remove(&run);
            }
            Action::CountFallback(_) => self.fallbacks += 1,
        }
    }

    fn connect(&mut self, node: usize, peer: NodeId) {
        let (other, now) = (self.index(peer), self.now);
        if !self.nodes[other].alive {
            self.task(node).handle_unreachable(peer, now);
            return;
        }
        let (mine, me) = (self.task(node).have().clone(), self.nodes[node].id);
        if let Some(task) = self.nodes[other].task.as_mut() {
            let theirs = task.have().clone();
            task.handle_neighbour_up(me, mine, now);
            self.task(node).handle_neighbour_up(peer, theirs, now);
            self.nodes[node].sessions.insert(other);
            self.nodes[other].sessions.insert(node);
            self.nodes[other].wake = now;
            self.push(Duration::ZERO, other, Event::Wake);
        } else {
            self.task(node).handle_neighbour_gone(peer, false, now);
        }
    }

    fn fetched(&self) -> u32 {
        self.registry.iter().sum()
    }
}

#[test]
fn a_cold_pull_costs_the_registry_one_copy() {
    for seed in 0..15 {
        let count = [2, 3, 5, 16, 40][seed as usize % 5];
        let mut net = Net::new(count, 200, seed);
        net.run();
        assert_eq!(net.fetched(), 200, "seed {seed}: every piece once");
        assert_eq!(net.fallbacks, 0, "seed {seed}");
        assert!(net.requests <= 8 + 4, "seed {seed}: {} requests", net.requests);
        // One node alone takes 600 ms; the last of many shall not take much longer.
        let last = net.nodes.iter().filter_map(|node| node.done_at).max().unwrap();
        assert!(last < Duration::from_millis(1200), "seed {seed}: {count} nodes took {last:?}");
    }
}

#[test]
fn one_node_alone_reads_without_a_pause() {
    let mut net = Net::new(1, 200, 3);
    net.run();
    assert_eq!((net.fetched(), net.requests, net.fallbacks), (200, 1, 0));
    assert!(net.nodes[0].done_at.unwrap() < ORIGIN * 210 + Duration::from_millis(20), "{:?}", net.nodes[0].done_at);
}

#[test]
fn the_rest_finish_when_any_node_dies() {
    for seed in 0..30 {
        let mut net = Net::new(6, 200, seed);
        let victim = seed as usize % 6;
        let at = Duration::from_millis(net.rng.random_range(20..400));
        net.push(at, victim, Event::Kill);
        net.run();
        // What only the dead one held or had leased is fetched again, nothing else.
        assert!(net.fetched() <= 200 + 70, "seed {seed}: {} pieces", net.fetched());
    }
}

#[test]
fn a_home_that_freezes_is_left_and_readers_do_not_wait_for_it() {
    for seed in 0..20 {
        let mut net = Net::new(5, 100, seed);
        let home = net.index(net.homes(0)[0]);
        net.nodes[home].answers = false;
        net.run();
        let last = net.nodes.iter().filter_map(|node| node.done_at).max().unwrap();
        assert!(last < Duration::from_secs(6), "seed {seed}: {last:?}");
        assert!(net.fetched() <= 200, "seed {seed}: {} pieces of 100", net.fetched());
    }
}

#[test]
fn whom_the_registry_refuses_gets_the_blob_from_the_others() {
    for seed in 0..20 {
        let mut net = Net::new(5, 100, seed);
        net.registry_refuses = BTreeSet::from([0, 1, 2]);
        net.run();
        assert_eq!(net.fetched(), 100, "seed {seed}");
    }
}

#[test]
fn a_latecomer_costs_the_registry_nothing() {
    let mut net = Net::new(4, 100, 9);
    net.run();
    let id = NodeId::from_bytes([99; 16]);
    let mut home = Home::new(id, 5);
    home.set_cluster_size(5);
    net.nodes.push(Node {
        id,
        home,
        task: None,
        uploads: Uploads::default(),
        queued: BTreeMap::new(),
        sessions: BTreeSet::new(),
        runs: BTreeMap::new(),
        reader: 0,
        wake: net.start,
        alive: true,
        answers: true,
        done_at: None,
    });
    net.push(Duration::from_secs(1), 4, Event::Start);
    net.run();
    assert_eq!(net.fetched(), 100);
}

#[test]
fn a_node_that_leaves_is_nobodys_source() {
    let mut net = Net::new(3, 100, 4);
    net.run();
    let gone = net.nodes[0].id;
    let id = net.id;
    for node in 0..3 {
        net.nodes[node].home.service_down(gone, ServiceDownRequest { task: id });
    }
    let at = net.index(net.homes(1)[0]);
    let now = net.now;
    let request = darter_tracker::RegisterRequest::new(id, Some(net.geometry), None);
    let response = net.nodes[at].home.register(NodeId::from_bytes([77; 16]), request, now).unwrap();
    assert!(!response.neighbours.contains(&gone));
}

#[test]
fn lost_news_between_neighbours_stops_nobody() {
    for seed in 0..20 {
        let mut net = Net::new([2, 5, 16][seed as usize % 3], 100, seed);
        net.loses_news = true;
        net.run();
        assert_eq!(net.fetched(), 100, "seed {seed}: the home names who has what nobody was told of");
        let last = net.nodes.iter().filter_map(|node| node.done_at).max().unwrap();
        assert!(last < Duration::from_secs(3), "seed {seed}: {last:?}");
    }
}

#[test]
fn who_has_dropped_a_blob_that_homes_believe_in_stops_nobody() {
    for seed in 0..20 {
        let mut net = Net::new(5, 100, seed);
        net.believed = BTreeSet::from([4]);
        net.nodes[4].done_at = Some(Duration::ZERO);
        net.events.retain(|Reverse((_, _, node, _))| *node != 4);
        net.run();
        let last = net.nodes.iter().filter_map(|node| node.done_at).max().unwrap();
        assert!(last < Duration::from_secs(3), "seed {seed}: {last:?}");
        assert_eq!(net.fetched(), 100, "seed {seed}");
    }
}
