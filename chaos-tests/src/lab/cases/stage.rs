//! What most cases begin with: a registry, a cluster, and an image that was pushed through one of its agents.

use anyhow::Result;
use futures_util::future::try_join_all;
use serde_json::Value;

use crate::lab::agent::{Agent, Cluster, Remote};
use crate::lab::image::Image;
use crate::lab::oracle::ColdPull;
use crate::lab::registry::{Access, Registry, Sent};
use crate::lab::skopeo::{self, Credentials};
use crate::lab::world::World;

/// Layers of noise in the usual image: the largest is over 64 MiB and no multiple of any piece size, the smallest is
/// a single piece.
pub(super) const LAYERS_BYTES: [usize; 4] = [(64 << 20) + 12_345, 8 << 20, 1 << 20, 300 << 10];

/// A registry with one image in it, and agents in front of it.
pub(super) struct Stage {
    pub(super) registry: Registry,
    pub(super) cluster: Cluster,
    pub(super) image: Image,
    /// The image's name at the registry.
    pub(super) name: String,
    credentials: Credentials,
}

impl Stage {
    /// `agents` agents; the image greets with `greeting`, and goes to the registry through the first agent.
    pub(super) async fn set(
        world: &mut World,
        access: Access,
        agents: usize,
        greeting: &str,
        layers_bytes: &[usize],
    ) -> Result<Self> {
        let registry = Registry::start(world, access).await?;
        let remote = Remote { name: &registry.name, ca: registry.ca.as_deref() };
        let cluster = Cluster::start(world, remote, agents, &Value::Null).await?;
        let image = Image::build(&world.directory("image")?, greeting, layers_bytes)?;
        let name = registry.image(&format!("lab/{greeting}"));
        let credentials = match access {
            Access::Open | Access::Plain => Credentials::None,
            Access::Password => Credentials::Right,
        };
        if let Some(first) = cluster.agents.first() {
            skopeo::push(world, &first.host, first.route(&first.hijack_ca()), credentials, &image, &name).await?;
        }
        Ok(Self { registry, cluster, image, name, credentials })
    }

    /// Pulls with skopeo through one agent, and checks every byte.
    pub(super) async fn pull(&self, world: &World, agent: &Agent) -> Result<()> {
        let ca = agent.hijack_ca();
        skopeo::pull(world, &agent.host, agent.route(&ca), self.credentials, &self.image, &self.name).await
    }

    /// Pulls with skopeo through several agents at the same moment.
    pub(super) async fn pull_all(&self, world: &World, agents: &[Agent]) -> Result<()> {
        try_join_all(agents.iter().map(|agent| self.pull(world, agent))).await.map(drop)
    }

    /// What was counted for a pull of all agents that began at `before`.
    pub(super) async fn counted_since(&mut self, before: Sent) -> Result<ColdPull> {
        let registry_bytes = self.registry.sent_since(before).await?.blob_bytes;
        let metrics = self.cluster.metrics().await?;
        Ok(ColdPull {
            image_bytes: self.image.bytes(),
            registry_bytes,
            peer_bytes: metrics.iter().map(|agent| agent.from_peers()).collect(),
            fallbacks: metrics.iter().map(|agent| agent.fallbacks()).sum(),
        })
    }
}

/// One line of figures.
pub(super) fn summary(pull: &ColdPull) -> String {
    let mib = pull.image_bytes >> 20;
    format!("image {mib} MiB, registry {:.3} x, peers {:.3} x a node", pull.registry_share(), pull.peer_share())
}
