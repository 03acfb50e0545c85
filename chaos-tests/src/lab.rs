//! The lab: one machine, many hosts.
//!
//! A [`World`](world::World) is what one case needs: a router in a namespace of its own, a namespace per host, a
//! directory for everything that is written. Hosts run a registry, agents and clients; the [`oracle`] says whether what
//! was counted is what the design promises. Everything that a world starts ends with it, also after a failure, Ctrl-C
//! or, at the next run, a `kill -9`; two labs on one machine do not meet, since every name holds the process id.
//!
//! Not here: simulation (virtual time, thousands of nodes) and injected link faults.

pub mod cases;
pub mod runner;

pub mod world;

pub mod agent;
pub mod client;
pub mod containerd;
pub mod containers;
pub mod docker;
pub mod origin;
pub mod registry;
pub mod skopeo;
pub mod systemd;
pub mod watch;

pub mod image;
pub mod oracle;

pub mod certificates;
pub mod command;
pub mod cpu;
pub mod daemon;
pub mod etc;
pub mod netns;
