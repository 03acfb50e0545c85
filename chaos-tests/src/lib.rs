//! Tests that one process cannot hold: real agents, a real registry and real clients, each in a network namespace.
//!
//! Nothing here is linked into the agent, and the agent is only ever used as a binary. The [`lab`] says whether what it
//! promises holds, the [benchmark](mod@bench) how good it is. The [`conformance`] suite is for any registry.

pub mod bench;
pub mod conformance;
pub mod lab;
pub mod sim;
