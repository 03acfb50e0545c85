//! The agent as a whole: real `darter agent` processes on loopback addresses, a registry that counts what it sends, and
//! clients that check every byte.
//!
//! One binary for all themes, since linking is what takes long. The clusters of different tests have nothing in common,
//! but they share the machine: [`stage`] lets one test at a time have a cluster, so that what one does with the
//! processors is not what another measures. Nothing here sleeps: [`wait`] asks for a condition until a deadline.
//!
//! Not here: real container runtimes and network namespaces, which need root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod member;
mod stage;
mod wait;
mod wire;

mod about;
mod activation;
mod ahead;
mod alone;
mod busy;
mod by_digest;
mod cold;
mod conformance;
mod corpus;
mod corrupt;
mod crowd;
mod deploy;
mod events;
mod front;
mod health;
mod hostile;
mod http2;
mod imported;
mod input;
mod isolated;
mod kill;
mod line;
mod pieces;
mod ports;
mod private;
mod restart;
mod rights;
mod seed;
mod shapes;
mod stop;
mod tags;
mod tracker;
mod transport;
mod unruly;
