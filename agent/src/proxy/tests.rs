//! The proxy over real loopback sockets: clients of every kind on one side, small registries on the other, stubs for
//! the judgement on who may read what and for the swarm.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod blobs;
mod connections;
mod http2;
mod requests;
mod revoked;
mod support;
mod tags;
mod tunnels;
