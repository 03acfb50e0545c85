//! Tests that one process cannot hold: real agents, a real registry and real clients, each in a network namespace.
//!
//! Nothing here is linked into the agent, and the agent is only ever used as a binary.

pub mod lab;
pub mod sim;
