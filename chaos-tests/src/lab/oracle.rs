//! Whether what was counted is what the design promises.

use anyhow::{Result, ensure};

/// Blob bytes from the registry over bytes of the image: once, and a twentieth for what was asked for twice.
const REGISTRY_SHARE_MAX: f64 = 1.05;

/// How much less than its share a node may get from peers, in image sizes.
const PEER_SHARE_SLACK: f64 = 0.05;

/// What was counted while some nodes pulled an image that none of them had.
#[derive(Clone, Debug)]
pub struct ColdPull {
    /// Bytes of the image's blobs.
    pub image_bytes: u64,
    /// Blob bytes that the registry sent, by its own log.
    pub registry_bytes: u64,
    /// Piece bytes that each node received from peers.
    pub peer_bytes: Vec<u64>,
    /// How often nodes gave up on the swarm, all together.
    pub fallbacks: u64,
}

impl ColdPull {
    /// Registry bytes over image bytes.
    #[must_use]
    pub fn registry_share(&self) -> f64 {
        ratio(self.registry_bytes, self.image_bytes)
    }

    /// Peer bytes of an average node over image bytes.
    #[must_use]
    pub fn peer_share(&self) -> f64 {
        ratio(self.peer_bytes.iter().sum(), self.image_bytes) / self.peer_bytes.len().max(1) as f64
    }

    /// An undisturbed pull: the image leaves the registry about once, peers deliver the rest, and nobody falls back.
    pub fn check(&self) -> Result<()> {
        let nodes = self.peer_bytes.len() as f64;
        let peer_share_min = (nodes - 1.0) / nodes - PEER_SHARE_SLACK;
        ensure!(
            self.registry_share() <= REGISTRY_SHARE_MAX,
            "the registry sent {:.3} x the image, at most {REGISTRY_SHARE_MAX} is allowed: {self:?}",
            self.registry_share()
        );
        ensure!(
            self.peer_share() >= peer_share_min,
            "peers sent a node {:.3} x the image, at least {peer_share_min:.3} is wanted: {self:?}",
            self.peer_share()
        );
        ensure!(self.fallbacks == 0, "{} fallbacks in an undisturbed pull: {self:?}", self.fallbacks);
        Ok(())
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> ColdPull {
        ColdPull { image_bytes: 300, registry_bytes: 303, peer_bytes: vec![200, 210, 187], fallbacks: 0 }
    }

    #[test]
    fn accepts_a_good_pull() {
        assert!(good().check().is_ok());
    }

    #[test]
    fn refuses_too_much_from_the_registry_too_little_from_peers_and_fallbacks() {
        assert!(ColdPull { registry_bytes: 316, ..good() }.check().is_err());
        assert!(ColdPull { peer_bytes: vec![200, 200, 150], ..good() }.check().is_err());
        assert!(ColdPull { fallbacks: 1, ..good() }.check().is_err());
    }
}
