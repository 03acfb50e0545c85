//! A toy network under a virtual clock: fixed delays, few uploads at a time per node, a registry that counts; nodes that die,
//! freeze, part and come back. What is decided is decided by the real homes, downloaders and upload queues.

// A simulation needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods)]

mod node;

use super::*;
use crate::home::Home;
use crate::intake::{Intake, Pace};
use crate::upload::{OFFER_MAX, Step, Ticket, Unshared, Uploads};
use darter_tracker::{Digest, PieceSize, PullPieceRequest, RegisterRequest, ReportPieceRequest, Role};

/// One way.
const WIRE: Duration = Duration::from_millis(1);
/// A piece from a peer.
const TRANSFER: Duration = Duration::from_millis(4);
/// A piece from the registry.
pub(super) const ORIGIN: Duration = Duration::from_millis(3);
/// A call to a member from which nothing comes fails after this.
const CALL_FAILS: Duration = Duration::from_secs(2);
/// A member that failed a call is not asked about other tasks for this long.
const SILENT_FOR: Duration = Duration::from_secs(10);
/// A handshake that nobody answers.
const CONNECT_FAILS: Duration = Duration::from_secs(3);
/// A connection on which nothing comes ends.
const IDLE: Duration = Duration::from_secs(5);
/// How often downloaders are told who is alive.
const PULSE: Duration = Duration::from_millis(100);
/// When gossip has found out that a member is dead, at the earliest and the latest.
const DETECTED: std::ops::Range<u64> = 6000..8000;
/// When gossip has told of one that came or left.
const TOLD: std::ops::Range<u64> = 50..500;

#[derive(Debug)]
pub(super) enum Event {
    Start,
    Wake,
    Pulse,
    Call(usize, u64, Call),
    Answer(usize, u64, Answer),
    CallFails(usize, u64),
    Connect(usize, u64, Bitmap, Option<NodeId>),
    Connected(usize, u64, Option<(Bitmap, Option<NodeId>)>),
    ConnectFails(usize, u64),
    SessionEnds(usize),
    Have(usize, Vec<PieceRange>),
    HomeOf(usize, NodeId),
    OriginPiece(RunId, PieceIndex),
    Ask(usize),
    Turn(usize, Ticket, Option<PieceIndex>),
    Lapse(Ticket),
    NoTurn(usize, Option<ErrorKind>),
    Decline(usize),
    Take(usize, Ticket, PieceIndex),
    Uploaded(Ticket),
    Delivered(usize, PieceIndex),
    Refused(usize, PieceIndex, Option<ErrorKind>),
    Gone(usize),
    Come(usize),
    Kill,
    Freeze(bool),
    Part(Option<usize>),
    Restart,
    OriginBusy(RunId, Duration),
}

/// How a member is of no use to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bad {
    /// It sends other bytes than were asked for.
    Lies,
    /// It takes requests and does not answer them.
    Idles,
}

#[derive(Debug)]
pub(super) enum Call {
    Register(RegisterRequest),
    Pull(PullPieceRequest),
    Report(ReportPieceRequest),
    Blame(ClientErrorRequest),
}

#[derive(Debug)]
pub(super) enum Answer {
    Register(Result<RegisterResponse, TrackerError>),
    Pull(Result<PullPieceResponse, TrackerError>),
    Report(Option<LeaseId>, Result<ReportPieceResponse, TrackerError>),
}

pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) home: Home,
    pub(super) task: Option<Task>,
    /// What it held when it was restarted.
    kept: Bitmap,
    pub(super) uploads: Uploads,
    unshared: Unshared,
    pub(super) bad: Option<Bad>,
    uploading: BTreeMap<Ticket, (usize, Option<PieceIndex>)>,
    intake: Intake,
    /// From whom which pieces are to come.
    taken: BTreeMap<(usize, PieceIndex), Pace>,
    /// The turn that is being offered at this moment.
    offer: Option<(Ticket, Pace)>,
    /// When it last looked who is alive.
    felt: Instant,
    sessions: BTreeSet<usize>,
    told_home: Option<NodeId>,
    open: BTreeSet<u64>,
    runs: BTreeMap<RunId, (PieceRange, Instant)>,
    /// Members as its gossip knows them.
    view: BTreeSet<usize>,
    silent: BTreeMap<NodeId, Instant>,
    reader: u32,
    read_at: Instant,
    /// The longest that its client has waited for a piece.
    pub(super) stall: Duration,
    /// When the last alarm rings.
    wake: Instant,
    pub(super) alive: bool,
    /// Whether it is a member that takes no part in the pull.
    pub(super) absent: bool,
    /// Of a frozen node: what has come for it meanwhile.
    frozen: Option<Vec<Event>>,
    pub(super) done_at: Option<Duration>,
}

pub(super) struct Net {
    pub(super) nodes: Vec<Node>,
    events: BTreeMap<(Instant, u64), (usize, Event)>,
    sequence: u64,
    start: Instant,
    pub(super) now: Instant,
    pub(super) id: TaskId,
    pub(super) geometry: Geometry,
    /// How often each piece left the registry.
    pub(super) registry: Vec<u32>,
    pub(super) requests: u32,
    pub(super) fallbacks: u32,
    pub(super) registry_refuses: BTreeSet<usize>,
    /// For how long the registry wants to be left alone when it is asked next.
    pub(super) rest: Option<Duration>,
    pub(super) rest_until: Option<Instant>,
    /// When the registry was asked although it wanted to be left alone, since it said so.
    pub(super) asked_in_rest: Vec<Duration>,
    /// Half of what neighbours tell each other never arrives.
    pub(super) loses_news: bool,
    /// Members that homes believe to hold everything.
    pub(super) believed: BTreeSet<usize>,
    /// Nodes below this number hear nothing of the others.
    parted: Option<usize>,
    pub(super) rng: StdRng,
}

impl Net {
    pub(super) fn new(count: usize, pieces: u32, seed: u64) -> Self {
        let start = Instant::now();
        let mut net = Self {
            nodes: Vec::new(),
            events: BTreeMap::new(),
            sequence: 0,
            start,
            now: start,
            id: TaskId::blob(Digest::Sha256([seed as u8; 32])),
            geometry: Geometry::new(u64::from(pieces) << 18, PieceSize::new(1 << 18).unwrap()).unwrap(),
            registry: vec![0; pieces as usize],
            requests: 0,
            fallbacks: 0,
            registry_refuses: BTreeSet::new(),
            rest: None,
            rest_until: None,
            asked_in_rest: Vec::new(),
            loses_news: false,
            believed: BTreeSet::new(),
            parted: None,
            rng: StdRng::seed_from_u64(seed),
        };
        for _ in 0..count {
            net.join();
        }
        for node in 0..count {
            net.nodes[node].view = (0..count).collect();
            let delay = Duration::from_millis(net.rng.random_range(0..20));
            net.push(delay, node, Event::Start);
        }
        net
    }

    /// A new member that nobody knows yet.
    pub(super) fn join(&mut self) -> usize {
        let number = self.nodes.len();
        let id = NodeId::from_bytes(self.rng.random());
        let mut home = Home::new(id, self.rng.random());
        home.set_cluster_size(number.max(2));
        self.nodes.push(Node {
            id,
            home,
            task: None,
            kept: Bitmap::new(self.geometry.pieces()),
            uploads: Uploads::default(),
            unshared: Unshared::default(),
            bad: None,
            uploading: BTreeMap::new(),
            intake: Intake::default(),
            taken: BTreeMap::new(),
            offer: None,
            felt: self.now,
            sessions: BTreeSet::new(),
            told_home: None,
            open: BTreeSet::new(),
            runs: BTreeMap::new(),
            view: BTreeSet::new(),
            silent: BTreeMap::new(),
            reader: 0,
            read_at: self.now,
            stall: Duration::ZERO,
            wake: self.now,
            alive: true,
            absent: false,
            frozen: None,
            done_at: None,
        });
        for node in &mut self.nodes {
            node.home.set_cluster_size(number + 1);
        }
        number
    }

    pub(super) fn push(&mut self, delay: Duration, node: usize, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + delay, self.sequence), (node, event));
    }

    pub(super) fn index(&self, id: NodeId) -> usize {
        self.nodes.iter().position(|node| node.id == id).unwrap()
    }

    fn rank(&self, nodes: impl Iterator<Item = NodeId>) -> Vec<NodeId> {
        crate::rendezvous::order(&self.id, nodes.map(|id| (id, Role::Node)))
    }

    /// What `GossipTracker::homes` gives.
    pub(super) fn homes(&self, node: usize) -> Vec<NodeId> {
        let (own, silent) = (self.nodes[node].id, &self.nodes[node].silent);
        let members = self.nodes[node].view.iter().map(|other| self.nodes[*other].id);
        let heard = |id: &NodeId| *id == own || silent.get(id).is_none_or(|until| self.now >= *until);
        let mut order = self.rank(members.filter(heard));
        order.truncate(5);
        if !order.contains(&own) {
            order.push(own);
        }
        order
    }

    fn reaches(&self, from: usize, to: usize) -> bool {
        let apart = self.parted.is_some_and(|first| (from < first) != (to < first));
        self.nodes[from].alive && self.nodes[to].alive && !apart
    }

    /// Runs until every client whose node lives has everything; panics after a minute of virtual time.
    pub(super) fn run(&mut self) {
        while self.nodes.iter().any(|node| node.alive && node.done_at.is_none()) {
            self.step();
        }
    }

    /// Runs until some node holds that many pieces, and returns it.
    pub(super) fn run_until(&mut self, pieces: u32) -> usize {
        loop {
            let held = |node: &Node| node.task.as_ref().map_or(0, |task| task.have().count());
            if let Some(node) = self.nodes.iter().position(|node| held(node) >= pieces) {
                return node;
            }
            self.step();
        }
    }

    pub(super) fn step(&mut self) {
        let ((at, _), (node, event)) = self.events.pop_first().expect("somebody waits for nothing");
        assert!(at < self.start + Duration::from_secs(60), "not done after a minute: {:?}", self.state());
        self.now = at;
        let alive = self.nodes[node].alive;
        match (event, &mut self.nodes[node].frozen) {
            (Event::Freeze(frozen), _) => self.freeze(node, frozen),
            (Event::Part(first), _) => self.part(first),
            (Event::Restart, _) => self.restart(node),
            (Event::Kill, _) => self.kill(node, DETECTED),
            (event, Some(waiting)) => waiting.push(event),
            (_, None) if !alive => {}
            (event, None) => {
                self.handle(node, event);
                self.drain(node);
            }
        }
    }

    fn state(&self) -> Vec<String> {
        self.nodes.iter().map(|n| format!("{:?}", n.task.as_ref().map(|t| t.have.clone()))).collect()
    }

    pub(super) fn kill(&mut self, node: usize, known: std::ops::Range<u64>) {
        self.nodes[node].alive = false;
        for other in 0..self.nodes.len() {
            if self.nodes[other].alive {
                let noticed = Duration::from_millis(self.rng.random_range(known.clone()));
                self.push(noticed, other, Event::Gone(node));
                self.push(IDLE, other, Event::SessionEnds(node));
            }
        }
    }

    fn freeze(&mut self, node: usize, frozen: bool) {
        if frozen {
            self.nodes[node].frozen = Some(Vec::new());
        } else {
            for event in self.nodes[node].frozen.take().into_iter().flatten() {
                self.push(Duration::ZERO, node, event);
            }
        }
    }

    fn part(&mut self, first: Option<usize>) {
        self.parted = first;
        let count = self.nodes.len();
        if let Some(first) = first {
            for (one, other) in (0..first).flat_map(|one| (first..count).map(move |other| (one, other))) {
                self.push(IDLE, one, Event::SessionEnds(other));
                self.push(IDLE, other, Event::SessionEnds(one));
            }
        }
    }

    /// As at an upgrade: it leaves, and is back under another identity with what it held.
    fn restart(&mut self, node: usize) {
        self.kill(node, TOLD);
        let kept = self.nodes[node].task.as_ref().map(|task| task.have().clone());
        let new = self.join();
        if let Some(kept) = kept {
            self.nodes[new].kept = kept;
        }
        self.know(new);
        // It is ready, and has a client, once it knows the others and they know it.
        self.push(Duration::from_secs(1), new, Event::Start);
    }

    /// A new member knows everybody at once, and they hear of it by and by.
    pub(super) fn know(&mut self, new: usize) {
        for other in 0..self.nodes.len() {
            if self.nodes[other].alive {
                self.nodes[new].view.insert(other);
                let told = Duration::from_millis(self.rng.random_range(TOLD));
                self.push(told, other, Event::Come(new));
            }
        }
    }

    pub(super) fn fetched(&self) -> u32 {
        self.registry.iter().sum()
    }
}
