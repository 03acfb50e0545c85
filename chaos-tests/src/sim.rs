//! The simulator: thousands of nodes under a virtual clock, on one thread.
//!
//! What is decided is decided by crate `swarm` as it is: its homes, downloaders and upload queues, without a switch for
//! simulation and without a picker of the simulator's own. What is made up here is the world around them: links, a registry,
//! clients that read in order, gossip that tells of the dead, and whatever goes wrong.
//!
//! - [`scenario`] is what can be asked for, [`plan`] what was drawn from its seed;
//! - [`agenda`] is the clock, [`links`] what bytes take, [`event`] what can happen;
//! - [`world`] holds all of it; [`node`] is what a node does with its parts, [`calls`] what it says to homes, [`transfer`]
//!   how pieces move, [`disturb`] what goes wrong;
//! - [`report`] is the outcome, [`trace`] a record of every event, [`sweep`] many runs as a table and plots.
//!
//! The same scenario gives the same outcome, byte for byte: nothing depends on the machine's clock, on addresses or on the
//! order of a hash map.
//!
//! Not simulated: packets, congestion control, CPU and disk; foca (members share one view, and hear of the dead after the
//! time that gossip takes). Links are shared chunk by chunk, so that a link which is full on one side leaves the other side's
//! capacity to others, as TCP and QUIC do. Messages are late by the latency and do not wait behind bytes.

pub mod agenda;
pub mod calls;
pub mod disturb;
pub mod event;
pub mod links;
pub mod node;
pub mod plan;
pub mod report;
pub mod scenario;
pub mod sweep;
pub mod trace;
pub mod transfer;
pub mod world;

pub use report::Report;
pub use scenario::Scenario;

use world::World;

/// Plays a scenario to its end. `observe` sees every event before it happens.
#[must_use]
pub fn play(scenario: &Scenario, observe: &mut dyn FnMut(agenda::Nanos, &event::Event)) -> Report {
    let mut world = World::new(scenario);
    while let Some((at, event)) = world.advance() {
        observe(at, &event);
        world.happen(event);
    }
    Report::of(&world)
}

#[cfg(test)]
#[path = "sim/tests.rs"]
mod tests;
