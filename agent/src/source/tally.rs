//! What came from where, for the status pages: bytes per source since the agent started.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

/// Peers that are told apart; what further ones sent is counted under no name. A cluster is smaller.
const PEERS_MAX: usize = 16_384;

/// Bytes per source.
#[derive(Debug, Default)]
pub struct Tally(Mutex<BTreeMap<SocketAddr, u64>>);

/// A reading of the tally.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sources {
    /// Blob bytes that came from registries.
    pub registry_bytes: u64,
    /// Piece bytes per peer, by the address where it serves pieces.
    pub peers: BTreeMap<SocketAddr, u64>,
}

impl Tally {
    /// Counts a piece that came from `peer`.
    pub fn peer(&self, peer: SocketAddr, bytes: u64) {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.len() < PEERS_MAX || peers.contains_key(&peer) {
            *peers.entry(peer).or_default() += bytes;
        }
    }

    /// What came from whom so far; registries are counted by the metrics.
    #[must_use]
    pub fn read(&self, registry_bytes: u64) -> Sources {
        let peers = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Sources { registry_bytes, peers }
    }
}
