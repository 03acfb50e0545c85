//! What all contestants run on: a registry with an image, hosts, links.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use futures_util::future::try_join_all;

use super::args::Settings;
use crate::lab::client::REPOSITORY;
use crate::lab::image::Image;
use crate::lab::netns::Host;
use crate::lab::registry::{Access, Registry, Sent};
use crate::lab::skopeo;
use crate::lab::world::World;

/// What a slow uplink has of the others' rate.
pub const SLOW_DIVISOR: u32 = 4;

/// A registry with an image, and hosts that want it.
#[derive(Debug)]
pub struct Course {
    /// The registry, over plain HTTP, as TLS would be another for each contestant.
    pub registry: Registry,
    /// The nodes.
    pub hosts: Vec<Host>,
    /// What they want.
    pub image: Image,
}

/// What the registry has sent by a moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    /// By its own log.
    pub sent: Sent,
    /// By its host's interface.
    pub interface_bytes: u64,
}

impl Course {
    /// Starts the registry, plugs the hosts in, and pushes the image. Links have no limit yet.
    pub async fn set(world: &mut World, settings: &Settings) -> Result<Self> {
        let registry = Registry::start(world, Access::Plain).await?;
        let mut hosts = Vec::new();
        for number in 1..=settings.nodes {
            hosts.push(world.host(&format!("h{number}")).await?);
        }
        let layout = world.directory("image")?;
        let image = Image::of_noise(&layout, &format!("bench {}", settings.seed), &settings.layers_bytes)?;
        skopeo::push_plain(world, &registry.host, &image, &registry.image(REPOSITORY)).await?;
        Ok(Self { registry, hosts, image })
    }

    /// Limits all links; the uplinks of `slow` to a part of what the others have.
    pub async fn shape(&self, settings: &Settings, slow: &[usize]) -> Result<()> {
        self.registry.host.limit(settings.registry_rate).await?;
        try_join_all(self.hosts.iter().map(|host| host.limit(settings.rate))).await?;
        let slow = slow.iter().filter_map(|node| self.hosts.get(*node));
        try_join_all(slow.map(|host| host.limit_egress((settings.rate / SLOW_DIVISOR).max(1)))).await.map(drop)
    }

    /// What the registry has sent so far, once it has come to rest.
    pub async fn count(&mut self) -> Result<Counted> {
        let sent = self.registry.sent().await?;
        Ok(Counted { sent, interface_bytes: self.registry.host.left_bytes().await? })
    }
}

/// Numbers that follow from a seed, for choices that nobody should be able to guess but everybody to repeat: splitmix64.
#[derive(Clone, Copy, Debug)]
pub struct Choices(u64);

impl Choices {
    /// Those of a run.
    #[must_use]
    pub fn new(seed: u64, run: usize) -> Self {
        Self(seed.wrapping_mul(0x1000_0000_01b3).wrapping_add(run as u64))
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end.max(1)
    }
}

/// Seconds from one moment to another; 0 where the other was earlier.
#[must_use]
pub fn seconds_between(from: SystemTime, to: SystemTime) -> f64 {
    let since_epoch = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    (since_epoch(to) - since_epoch(from)).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_follow_from_seed_and_run() {
        let take = |seed, run| {
            let mut choices = Choices::new(seed, run);
            (0..20).map(|_| choices.below(10)).collect::<Vec<_>>()
        };
        assert_eq!(take(1, 2), take(1, 2));
        assert_ne!(take(1, 2), take(1, 3));
        assert_ne!(take(1, 2), take(2, 2));
        assert!(take(1, 2).iter().all(|choice| *choice < 10));
    }
}
