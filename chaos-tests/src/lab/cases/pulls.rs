//! Undisturbed pulls by real clients: the image leaves the registry once, peers deliver the rest.

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;

use super::stage::{LAYERS_BYTES, Stage, summary};
use crate::lab::agent::PROXY;
use crate::lab::containerd::Containerd;
use crate::lab::docker::{Docker, Route};
use crate::lab::registry::Access;
use crate::lab::world::World;

/// Nodes that pull at the same moment.
const NODES: usize = 3;

/// Three docker daemons with nothing but `HTTPS_PROXY` and a certificate authority, cold and then warm; then one without.
pub(super) async fn docker(world: &mut World) -> Result<String> {
    let mut stage = Stage::set(world, Access::Open, NODES, "docker", &LAYERS_BYTES).await?;
    let mut dockers = Vec::new();
    for agent in &stage.cluster.agents {
        dockers.push(Docker::start(world, &agent.host, agent.route(&agent.hijack_ca())).await?);
    }
    let before = stage.registry.sent().await?;
    try_join_all(dockers.iter().map(|docker| docker.pull(&stage.name))).await?;
    for docker in &dockers {
        docker.verify(&stage.name, &stage.image).await?;
    }
    let cold = stage.counted_since(before).await?;
    cold.check()?;

    let before = stage.registry.sent().await?;
    for docker in &dockers {
        docker.forget(&stage.name).await?;
        docker.pull(&stage.name).await?;
        docker.verify(&stage.name, &stage.image).await?;
    }
    let warm = stage.registry.sent_since(before).await?;
    ensure!(warm.blob_bytes == 0, "a warm pull took {} blob bytes from the registry", warm.blob_bytes);

    // Row 113: one node goes without: dockerd is restarted without the proxy, and then there is no agent.
    dockers.remove(0).stop().await?;
    let ca = stage.registry.ca.clone().context("a registry without TLS")?;
    let route = Route { registry: &stage.registry.name, ca: &ca, proxy: None };
    let without = Docker::start(world, &stage.cluster.agents[0].host, route).await?;
    stage.cluster.agents[0].stop().await?;
    let before = stage.registry.sent().await?;
    without.forget(&stage.name).await?;
    without.pull(&stage.name).await?;
    without.verify(&stage.name, &stage.image).await?;
    let direct = stage.registry.sent_since(before).await?;
    ensure!(direct.blob_bytes == stage.image.bytes(), "without an agent {} bytes came directly", direct.blob_bytes);

    for docker in dockers.into_iter().chain([without]) {
        docker.stop().await?;
    }
    for agent in stage.cluster.agents.iter_mut().filter(|agent| agent.is_running()) {
        agent.stop().await?;
    }
    Ok(format!("{}; {} MiB directly on a node without its agent", summary(&cold), direct.blob_bytes >> 20))
}

/// Three containerds with the agent as a mirror, which they ask with `?ns=`.
pub(super) async fn containerd(world: &mut World) -> Result<String> {
    let mut stage = Stage::set(world, Access::Open, NODES, "containerd", &LAYERS_BYTES).await?;
    let mut containerds = Vec::new();
    for agent in &stage.cluster.agents {
        containerds.push(Containerd::start(world, &agent.host, &stage.registry.name, PROXY, None).await?);
    }
    let before = stage.registry.sent().await?;
    try_join_all(containerds.iter().map(|containerd| containerd.pull(&stage.name))).await?;
    for containerd in &containerds {
        containerd.verify(&stage.name, &stage.image).await?;
    }
    let cold = stage.counted_since(before).await?;
    cold.check()?;
    for containerd in containerds {
        containerd.stop().await?;
    }
    Ok(summary(&cold))
}

/// Three times skopeo, through the agent as a proxy.
pub(super) async fn skopeo(world: &mut World) -> Result<String> {
    let mut stage = Stage::set(world, Access::Open, NODES, "skopeo", &LAYERS_BYTES).await?;
    let before = stage.registry.sent().await?;
    stage.pull_all(world, &stage.cluster.agents).await?;
    let cold = stage.counted_since(before).await?;
    cold.check()?;
    Ok(summary(&cold))
}

/// Once a neighbour holds an image, nobody needs the registry's blobs for it, not even after everybody was restarted.
pub(super) async fn warm(world: &mut World) -> Result<String> {
    let mut stage = Stage::set(world, Access::Open, NODES, "warm", &LAYERS_BYTES).await?;
    let (first, others) = stage.cluster.agents.split_at(1);
    stage.pull_all(world, first).await?;
    let before = stage.registry.sent().await?;
    stage.pull_all(world, others).await?;
    let sent = stage.registry.sent_since(before).await?;
    ensure!(sent.blob_bytes == 0, "{} blob bytes from the registry though a neighbour had them", sent.blob_bytes);

    for agent in &mut stage.cluster.agents {
        agent.stop().await?;
    }
    for agent in &mut stage.cluster.agents {
        agent.resume().await?;
    }
    stage.cluster.wait_for_members(NODES).await?;
    stage.pull_all(world, &stage.cluster.agents).await?;
    let sent = stage.registry.sent_since(before).await?;
    ensure!(sent.blob_bytes == 0, "{} blob bytes from the registry after a restart", sent.blob_bytes);
    Ok("0 blob bytes from the registry, before and after a restart".to_owned())
}
