//! What a run has shown.

use serde::{Deserialize, Serialize};

use super::agenda::{Nanos, SECOND};
use super::links::takes;
use super::scenario::Scenario;
use super::world::World;

/// What is counted while it runs. Bytes, unless it says otherwise.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Blob bytes that left the registry.
    pub registry_bytes: u64,
    /// Requests that it answered or refused.
    pub registry_requests: u64,
    /// Those that it refused.
    pub registry_refusals: u64,
    /// Pieces that came from peers.
    pub peer_bytes: u64,
    /// The same as a count.
    pub peer_pieces: u64,
    /// What was moved between peers and was of no use: cut off, twice, wrong.
    pub wasted_bytes: u64,
    /// Everything that is said beside pieces, packet headers included.
    pub control_bytes: u64,
    /// Calls to homes, a count.
    pub calls: u64,
    /// Turns that were asked for at peers, a count.
    pub asked: u64,
    /// Turns that were offered and left to others, a count.
    pub declined: u64,
    /// News of pieces, a count per neighbour that is told.
    pub news: u64,
    /// Requests for pieces that were answered with "busy", a count.
    pub busy: u64,
    /// How often the registry was asked in the swarm's place, a count.
    pub fallbacks: u64,
    /// What happened in all, a count.
    pub events: u64,
}

/// The outcome. Times are in seconds of virtual time, from the moment that the first client could have begun.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was played.
    pub scenario: Scenario,
    /// Clients that have everything.
    pub done: u32,
    /// Clients whose node lives and that have not.
    pub unfinished: u32,
    /// The least that any scheme could take, for the last: what the registry has to send once, what the last to begin has to take
    /// in, what all ways out have to carry.
    pub bound_s: f64,
    /// When the last was done, over the bound.
    pub last: f64,
    /// When 99 of a hundred were done, over the bound.
    pub p99: f64,
    /// When half were done, over the bound.
    pub p50: f64,
    /// How long a client waited for the first piece of its first layer, for half of them.
    pub first_byte_p50_s: f64,
    /// The same for the one that waited longest.
    pub first_byte_max_s: f64,
    /// The longest that a client waited for the next piece of something that it reads, for half of them.
    pub stall_p50_s: f64,
    /// The same for 99 of a hundred.
    pub stall_p99_s: f64,
    /// The same for the one that waited longest.
    pub stall_max_s: f64,
    /// Blob bytes that left the registry, over the image.
    pub egress: f64,
    /// Requests to the registry.
    pub registry_requests: u64,
    /// Those that it refused.
    pub registry_refusals: u64,
    /// Everything said beside pieces, over the pieces' bytes.
    pub control: f64,
    /// The worst second of the busiest home: bytes of calls and answers.
    pub home_bytes_per_s: u64,
    /// Bytes that were of no use, over the bytes of all images.
    pub wasted: f64,
    /// How often the registry was asked in the swarm's place.
    pub fallbacks: u64,
    /// Requests for pieces that were answered with "busy".
    pub busy: u64,
    /// Calls to homes.
    pub calls: u64,
    /// Turns that were asked for, per piece that came from a peer: the agents' CPU time goes by messages.
    pub asked_per_piece: f64,
    /// Turns that were offered and left to others, likewise.
    pub declined_per_piece: f64,
    /// Neighbours that were told of pieces, likewise.
    pub news_per_piece: f64,
    /// Events that happened.
    pub events: u64,
}

impl Report {
    /// What a world that is at its end has to show.
    #[must_use]
    pub fn of(world: &World) -> Self {
        let (scenario, tally) = (&world.scenario, &world.tally);
        let mut done: Vec<Nanos> = world.nodes.iter().filter_map(|node| node.done).collect();
        done.sort_unstable();
        let finished = || world.nodes.iter().filter(|node| node.done.is_some());
        let mut first_bytes: Vec<Nanos> =
            finished().filter_map(|node| Some(node.first_piece? - node.plan.begins)).collect();
        first_bytes.sort_unstable();
        let mut stalls: Vec<Nanos> =
            finished().filter_map(|node| node.pulls.iter().map(|pull| pull.stall).max()).collect();
        stalls.sort_unstable();
        let bound = bound(world);
        let image = scenario.bytes() as f64;
        let over_bound = |percent| percentile(&done, percent) as f64 / bound as f64;
        let per_piece = |count: u64| count as f64 / tally.peer_pieces.max(1) as f64;
        let alive = world.nodes.iter().filter(|node| node.alive && node.done.is_none()).count();
        Self {
            scenario: scenario.clone(),
            done: done.len() as u32,
            unfinished: alive as u32,
            bound_s: seconds(bound),
            last: over_bound(100),
            p99: over_bound(99),
            p50: over_bound(50),
            first_byte_p50_s: seconds(percentile(&first_bytes, 50)),
            first_byte_max_s: seconds(percentile(&first_bytes, 100)),
            stall_p50_s: seconds(percentile(&stalls, 50)),
            stall_p99_s: seconds(percentile(&stalls, 99)),
            stall_max_s: seconds(percentile(&stalls, 100)),
            egress: tally.registry_bytes as f64 / image,
            registry_requests: tally.registry_requests,
            registry_refusals: tally.registry_refusals,
            control: tally.control_bytes as f64 / (tally.peer_bytes + tally.registry_bytes).max(1) as f64,
            home_bytes_per_s: world.nodes.iter().map(|node| node.heard.worst).max().unwrap_or(0),
            wasted: tally.wasted_bytes as f64 / (image * f64::from(scenario.nodes)),
            fallbacks: tally.fallbacks,
            busy: tally.busy,
            calls: tally.calls,
            asked_per_piece: per_piece(tally.asked),
            declined_per_piece: per_piece(tally.declined),
            news_per_piece: per_piece(tally.news),
            events: tally.events,
        }
    }
}

/// The fluid bound: the registry has to send everything once, the last to begin has to take everything in, and everybody's
/// copies have to leave somebody's way out.
fn bound(world: &World) -> Nanos {
    let scenario = &world.scenario;
    let bytes = scenario.bytes();
    let last = world.plan.nodes.iter().map(|node| node.begins).max().unwrap_or(0);
    let ways_out = scenario.registry_rate + world.plan.nodes.iter().map(|node| node.out).sum::<u64>();
    let once = takes(bytes, scenario.registry_rate);
    let taken_in = last + takes(bytes, scenario.rate);
    once.max(taken_in).max(takes(bytes * u64::from(scenario.nodes), ways_out))
}

/// The value that `percent` of a hundred do not exceed; 0 of none.
fn percentile(sorted: &[Nanos], percent: usize) -> Nanos {
    let at = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(at).copied().unwrap_or(0)
}

fn seconds(nanos: Nanos) -> f64 {
    nanos as f64 / SECOND as f64
}
