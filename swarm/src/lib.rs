//! The core that decides and touches nothing: no sockets, files, clocks, randomness or `async` inside.
//!
//! Inputs are `handle_*(event, now)` and plain calls, outputs are `poll_*` and return values; random seeds are handed
//! in; only ordered maps are used. So the same code runs in the agent and, thousands of times on one thread under a
//! virtual clock, in the simulator.
//!
//! [`identity`] holds the keys, [`membership`] knows who is there, [`holdings`] who has what, [`rendezvous`]
//! says who is home of a task, [`home`] is that role, [`tags`] keeps what tags mean, [`task`] is the downloader, [`isolation`]
//! tells whether it is this node that fails, [`upload`] decides whom to serve, [`intake`] how much may be on its way, [`wire`]
//! is what peers say to each other.

pub mod holdings;
pub mod home;
pub mod identity;
pub mod intake;
pub mod isolation;
pub mod membership;
pub mod rendezvous;
pub mod tags;
pub mod task;
pub mod upload;
pub mod wire;

mod patience;
mod recent;
