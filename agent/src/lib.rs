//! The IO shell of darter. A request reads like this list:
//!
//! `proxy` takes it, `pull` drives the sans-IO core, `source` gets pieces from peers or the registry, `store` checks
//! and keeps them, `proxy::body` streams the verified bytes to the client, `upload` gives pieces to others.
//! Beside that path: `gossip` (members, events, the tracker), `net` (sockets and TLS), `admin`, `config`, `app`;
//! `client` plays a container runtime.

pub mod proxy;
pub mod pull;
pub mod source;
pub mod store;
pub mod upload;

pub mod gossip;
pub mod net;

pub mod admin;
pub mod app;
pub mod cli;
pub mod client;
pub mod config;
pub mod demo;
