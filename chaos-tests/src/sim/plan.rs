//! What is drawn from the seed before anything happens: who begins when, who is slow, who lies, who dies.

use darter_tracker::{Digest, NodeId, TaskId};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

use super::agenda::Nanos;
use super::event::NodeNumber;
use super::scenario::Scenario;

/// A slow node's way out has this part of the rate.
const SLOW_PART: u64 = 4;

/// How a node behaves to those who ask it for pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Character {
    /// As it should.
    Honest,
    /// It gives wrong bytes.
    Lying,
    /// It gives nothing.
    Lazy,
}

/// One node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// When its client asks for the image, in nanoseconds.
    pub begins: Nanos,
    /// Rate of its way out, in bits per second.
    pub out: u64,
    /// How it behaves.
    pub character: Character,
    /// Which view of the membership it has.
    pub view: u32,
}

/// All that is drawn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The nodes, by their numbers.
    pub nodes: Vec<Planned>,
    /// Those that are killed in the middle.
    pub killed: Vec<NodeNumber>,
    /// Those that freeze in the middle.
    pub frozen: Vec<NodeNumber>,
}

impl Plan {
    /// Draws a plan.
    #[must_use]
    pub fn draw(scenario: &Scenario, rng: &mut StdRng) -> Self {
        let count = scenario.nodes as usize;
        let mut order: Vec<NodeNumber> = (0..scenario.nodes).collect();
        let mut deal = |share: f64, rng: &mut StdRng| {
            order.shuffle(rng);
            let chosen = (share * count as f64).round() as usize;
            order.iter().take(chosen).copied().collect::<Vec<_>>()
        };
        let slow = deal(scenario.slow, rng);
        let unfit = deal(scenario.lying + scenario.lazy, rng);
        let mut nodes: Vec<Planned> = (0..scenario.nodes)
            .map(|number| Planned {
                begins: rng.random_range(0..=scenario.join.as_nanos() as Nanos),
                out: scenario.rate,
                character: Character::Honest,
                view: number % scenario.views,
            })
            .collect();
        for node in slow {
            nodes[node as usize].out /= SLOW_PART;
        }
        let lying = (scenario.lying * count as f64).round() as usize;
        for (at, node) in unfit.into_iter().enumerate() {
            nodes[node as usize].character = if at < lying { Character::Lying } else { Character::Lazy };
        }
        order.shuffle(rng);
        let (killed, rest) = order.split_at(scenario.kill as usize);
        Self { nodes, killed: killed.to_vec(), frozen: rest[..scenario.freeze as usize].to_vec() }
    }
}

/// The name of a node: its number, so that it is found again, and what the seed says, since homes are chosen by names.
#[must_use]
pub fn name(number: NodeNumber, seed: u64) -> NodeId {
    let mut rng = StdRng::seed_from_u64(seed ^ u64::from(number).rotate_left(32));
    let mut bytes: [u8; NodeId::BYTES] = rng.random();
    bytes[NodeId::BYTES - 4..].copy_from_slice(&number.to_be_bytes());
    NodeId::from_bytes(bytes)
}

/// The number of the node with this name.
#[must_use]
pub fn number(name: NodeId) -> NodeNumber {
    let bytes = name.as_bytes();
    bytes[NodeId::BYTES - 4..].iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// The task of moving a layer.
#[must_use]
pub fn task(layer: u16, seed: u64) -> TaskId {
    let mut rng = StdRng::seed_from_u64(seed.rotate_left(17) ^ u64::from(layer));
    TaskId::blob(Digest::Sha256(rng.random()))
}
