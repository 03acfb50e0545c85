//! Everything there is, and what happens to it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use darter_swarm::home::Home;
use darter_swarm::home::swarm::TOLD;
use darter_swarm::intake::{Intake, Pace};
use darter_swarm::rendezvous;
use darter_swarm::task::{RunId, Task};
use darter_swarm::upload::{Ticket, Unshared, Uploads};
use darter_tracker::{Geometry, NodeId, PieceIndex, PieceRange, Role, TaskId};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::agenda::{Agenda, MILLISECOND, Nanos};
use super::event::{Event, Layer, NodeNumber};
use super::links::{FlowId, Links};
use super::plan::{self, Plan};
use super::report::Tally;
use super::scenario::Scenario;

/// Homes that a downloader deals with, beside itself: the agent's number.
pub(super) const HOMES: usize = 5;

/// A message that is lost is sent again after this: what QUIC's probe timeout comes to between machines a millisecond apart.
const RESENT_AFTER: Nanos = 25 * MILLISECOND;

/// Bytes of packet headers and seals that a message costs beside itself, if it travels alone.
pub(super) const PACKET_BYTES: u64 = 64;

/// A pull that is not over by then never will be.
const LONGEST: Duration = Duration::from_secs(3600);

/// What a layer is.
pub struct Content {
    /// Its name.
    pub id: TaskId,
    /// Its cut.
    pub geometry: Geometry,
}

/// A node.
pub struct Node {
    /// Its name.
    pub id: NodeId,
    /// What was drawn for it.
    pub plan: plan::Planned,
    /// Its part as a home.
    pub home: Home,
    /// Whom it serves.
    pub(super) uploads: Uploads,
    pub(super) uploading: BTreeMap<Ticket, Upload>,
    /// Pieces given so far, per layer and node.
    pub(super) shares: BTreeMap<(Layer, NodeNumber), u32>,
    /// What is on its way to it.
    pub(super) intake: Intake,
    /// The layer that is told of room first.
    pub(super) next_room: Layer,
    /// Its pulls of the layers that are begun, from the first on.
    pub pulls: Vec<Pull>,
    /// Layers that its client has asked for, from the first on.
    pub(super) asked: usize,
    /// Members that it knows to be down.
    pub(super) gone: BTreeSet<NodeNumber>,
    /// Members that did not answer a call, and until when they are not asked.
    pub(super) silent: BTreeMap<NodeNumber, Nanos>,
    /// Whether it lives.
    pub alive: bool,
    /// While it stands still: what has come for it.
    pub(super) frozen: Option<Vec<Event>>,
    /// When it last looked who is alive.
    pub(super) felt: Nanos,
    /// Since when nothing comes from it.
    pub(super) still_since: Option<Nanos>,
    /// Control bytes that came to it in the present second, and in its worst.
    pub(super) heard: Heard,
    /// When its client has the first piece of its first layer.
    pub first_piece: Option<Nanos>,
    /// When its client has everything.
    pub done: Option<Nanos>,
}

/// What a node's home had to take in and give out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heard {
    second: Nanos,
    bytes: u64,
    /// The most in one second.
    pub worst: u64,
}

impl Heard {
    pub(super) fn note(&mut self, bytes: u64, now: Nanos) {
        let second = now / super::agenda::SECOND;
        if second != self.second {
            (self.second, self.bytes) = (second, 0);
        }
        self.bytes += bytes;
        self.worst = self.worst.max(self.bytes);
    }
}

/// A piece that is being given, or waits to be.
pub(super) struct Upload {
    pub(super) to: NodeNumber,
    pub(super) layer: Layer,
    /// Which, once it has said so.
    pub(super) piece: Option<PieceIndex>,
    pub(super) flow: Option<FlowId>,
    /// Since when it is served.
    pub(super) since: Nanos,
}

/// A layer that a node is getting.
pub struct Pull {
    /// The downloader.
    pub task: Task,
    pub(super) sessions: BTreeSet<NodeNumber>,
    pub(super) told_home: Option<NodeId>,
    /// Calls and meetings that are not answered.
    pub(super) open: BTreeSet<u64>,
    pub(super) runs: BTreeMap<RunId, Run>,
    /// How many of them the node's other layers know of.
    pub(super) fetching: usize,
    /// The piece that the client waits for, if it reads this layer, and since when.
    pub(super) reading: Option<(u32, Nanos)>,
    /// The next wake-up; earlier ones ring in vain.
    pub(super) wake: Nanos,
    /// The longest that the client has waited for a piece.
    pub stall: Nanos,
    /// What it alone has.
    pub(super) unshared: Unshared,
    /// The turn that is being offered at this moment, and at which pace its piece will come.
    pub(super) offer: Option<(Ticket, Pace)>,
    /// Places that are taken, by whom a piece is to come from.
    pub(super) places: BTreeMap<(NodeNumber, PieceIndex), Pace>,
    pub(super) advertised: Option<u8>,
    pub(super) advertise: bool,
}

/// A response that is being read.
pub(super) struct Run {
    pub(super) pieces: PieceRange,
    /// How many pieces of it may be read.
    pub(super) credit: u32,
    pub(super) flow: Option<FlowId>,
    pub(super) asked: bool,
    /// The piece that comes next.
    pub(super) next: u32,
}

/// All of it.
pub struct World {
    pub(super) scenario: Scenario,
    pub(super) now: Nanos,
    start: Instant,
    pub(super) agenda: Agenda,
    pub(super) rng: StdRng,
    pub(super) layers: Vec<Content>,
    pub(super) nodes: Vec<Node>,
    pub(super) links: Links,
    pub(super) registry: NodeNumber,
    pub(super) registry_open: u32,
    /// The members in the order in which they are home for a layer, as far as anybody asks: per view and layer.
    pub(super) ranks: Vec<Vec<Vec<NodeId>>>,
    /// What was gossiped of a layer: when everybody has heard it, by whom, how many quarters.
    pub(super) gossip: Vec<Vec<(Nanos, NodeNumber, u8)>>,
    pub(super) plan: Plan,
    pub(super) disturbed: bool,
    pub(super) left: u32,
    keys: u64,
    /// What is counted.
    pub tally: Tally,
}

impl World {
    /// The world before anything has happened.
    ///
    /// # Panics
    /// With a scenario that [`Scenario::check`] refuses.
    #[must_use]
    #[allow(clippy::expect_used, reason = "whoever plays a scenario has checked it")]
    pub fn new(scenario: &Scenario) -> Self {
        let geometry = scenario.geometry().expect("the scenario was checked");
        let mut rng = StdRng::seed_from_u64(scenario.seed);
        let plan = Plan::draw(scenario, &mut rng);
        let layers: Vec<Content> =
            (0..scenario.layers).map(|layer| Content { id: plan::task(layer, scenario.seed), geometry }).collect();
        let names: Vec<NodeId> = (0..scenario.nodes).map(|number| plan::name(number, scenario.seed)).collect();
        // A sender hears that a chunk has arrived when it does.
        let wire = u128::from(scenario.rate) * scenario.latency.as_nanos() / (8 * u128::from(super::agenda::SECOND));
        let mut links = Links::new(u64::from(geometry.piece_size().bytes()), wire as u64);
        let mut agenda = Agenda::default();
        let mut nodes = Vec::with_capacity(names.len());
        for (number, (id, planned)) in (0..).zip(names.iter().zip(&plan.nodes)) {
            links.add(planned.out, scenario.rate);
            let mut home = Home::new(*id, rng.random());
            home.set_cluster_size(names.len());
            nodes.push(Node::new(*id, *planned, home));
            agenda.put(planned.begins, Event::Join(number));
        }
        let registry = links.add(scenario.registry_rate, scenario.registry_rate);
        Self {
            now: 0,
            // Only differences matter, and those are virtual.
            start: Instant::now(),
            agenda,
            ranks: ranks(scenario, &layers, &names),
            gossip: vec![Vec::new(); layers.len()],
            layers,
            left: scenario.nodes,
            nodes,
            links,
            registry,
            registry_open: 0,
            plan,
            disturbed: false,
            rng,
            keys: 0,
            tally: Tally::default(),
            scenario: scenario.clone(),
        }
    }

    /// The next event; `None` when every client whose node lives has everything, or never will.
    pub fn advance(&mut self) -> Option<(Nanos, Event)> {
        if self.left == 0 {
            return None;
        }
        let (at, event) = self.agenda.take()?;
        if at > LONGEST.as_nanos() as Nanos {
            return None;
        }
        self.now = at;
        self.tally.events += 1;
        Some((at, event))
    }

    /// The present moment, as the parts see it.
    pub(super) fn instant(&self) -> Instant {
        self.start + Duration::from_nanos(self.now)
    }

    pub(super) fn nanos(&self, instant: Instant) -> Nanos {
        instant.saturating_duration_since(self.start).as_nanos() as Nanos
    }

    pub(super) fn key(&mut self) -> u64 {
        self.keys += 1;
        self.keys
    }

    /// Lets an event happen after `delay`.
    pub(super) fn after(&mut self, delay: Nanos, event: Event) {
        self.agenda.put(self.now + delay, event);
    }

    /// How late a message is; it may have to be sent more than once.
    pub(super) fn delay(&mut self) -> Nanos {
        let mut delay = self.scenario.latency.as_nanos() as Nanos;
        while self.scenario.loss > 0.0 && self.rng.random_bool(self.scenario.loss) {
            delay += RESENT_AFTER;
        }
        delay
    }

    /// Sends a message of so many bytes.
    pub(super) fn send(&mut self, bytes: u64, event: Event) {
        self.tally.control_bytes += bytes + PACKET_BYTES;
        let delay = self.delay();
        self.after(delay, event);
    }

    /// Whether something comes from a node, if only acknowledgements.
    pub(super) fn shows_life(&self, node: NodeNumber) -> bool {
        self.nodes[node as usize].alive && self.nodes[node as usize].frozen.is_none()
    }

    /// The members that `node` asks about a layer, best first, itself last.
    pub(super) fn homes(&self, node: NodeNumber, layer: Layer) -> Vec<NodeId> {
        let this = &self.nodes[node as usize];
        let asked = |id: &&NodeId| {
            let other = plan::number(**id);
            other == node
                || !this.gone.contains(&other) && this.silent.get(&other).is_none_or(|until| self.now >= *until)
        };
        let rank = &self.ranks[this.plan.view as usize][layer as usize];
        let mut homes: Vec<NodeId> = rank.iter().filter(asked).take(HOMES).copied().collect();
        if !homes.contains(&this.id) {
            homes.push(this.id);
        }
        homes
    }

    /// Whether a node's membership has another one in it.
    pub(super) fn knows(&self, node: NodeNumber, other: NodeId) -> bool {
        let this = &self.nodes[node as usize];
        let number = plan::number(other);
        let hidden = (0..this.plan.view as usize)
            .any(|view| self.ranks[view].iter().any(|rank| rank.iter().take(HOMES).any(|home| *home == other)));
        number == node || !this.gone.contains(&number) && !hidden
    }

    /// Lets an event happen.
    pub fn happen(&mut self, event: Event) {
        if let Some(node) = event.node() {
            let this = &mut self.nodes[node as usize];
            if let Some(waiting) = &mut this.frozen {
                waiting.push(event);
                return;
            }
            if !this.alive {
                return;
            }
        }
        match event {
            Event::ChunkLeft(place) => self.chunk_left(place),
            Event::Kill(node) => self.kill(node),
            Event::Freeze(node, frozen) => self.freeze(node, frozen),
            Event::Have(from, layer, peers, pieces) => self.have(from, layer, &peers, &pieces),
            event => self.happen_to_node(event),
        }
    }
}

/// For each view and layer: the members in order, as many as may ever be asked. Each view lacks the homes of those before it.
fn ranks(scenario: &Scenario, layers: &[Content], names: &[NodeId]) -> Vec<Vec<Vec<NodeId>>> {
    // Homes are asked, others are told, itself left out; so many may die and be passed over.
    let kept = HOMES.max(TOLD + 1) + (scenario.kill + scenario.freeze) as usize;
    let mut hidden: BTreeSet<NodeId> = BTreeSet::new();
    (0..scenario.views)
        .map(|_| {
            let members: Vec<NodeId> = names.iter().filter(|name| !hidden.contains(name)).copied().collect();
            let ranks: Vec<Vec<NodeId>> = layers
                .iter()
                .map(|layer| {
                    let mut order = rendezvous::order(&layer.id, members.iter().map(|id| (*id, Role::Node)));
                    order.truncate(kept);
                    order
                })
                .collect();
            hidden.extend(ranks.iter().flat_map(|rank| rank.iter().take(HOMES)));
            ranks
        })
        .collect()
}

impl Node {
    fn new(id: NodeId, plan: plan::Planned, home: Home) -> Self {
        Self {
            id,
            plan,
            home,
            uploads: Uploads::default(),
            uploading: BTreeMap::new(),
            shares: BTreeMap::new(),
            intake: Intake::default(),
            next_room: 0,
            pulls: Vec::new(),
            asked: 0,
            gone: BTreeSet::new(),
            silent: BTreeMap::new(),
            alive: true,
            frozen: None,
            felt: 0,
            still_since: None,
            heard: Heard::default(),
            first_piece: None,
            done: None,
        }
    }
}
