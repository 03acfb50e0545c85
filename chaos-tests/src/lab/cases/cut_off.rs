//! No peer can be reached at all: everybody is served by the registry, through the same agents.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::{try_join, try_join_all};

use super::stage::{LAYERS_BYTES, Stage};
use crate::lab::agent::{Cluster, PEER_PORTS};
use crate::lab::command::wait_for;
use crate::lab::registry::Access;
use crate::lab::world::World;

/// Nodes that pull.
const NODES: usize = 3;

/// Slow enough for a pull to be disturbed in its middle.
const REGISTRY_MEGABITS: u32 = 200;

/// How far the nodes are when the network between them goes.
const PEER_BYTES_BEFORE: u64 = 4 << 20;

/// How long the first bytes may take.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// The network between the agents goes before they pull, so that each still believes in the others.
pub(super) async fn before(world: &mut World) -> Result<String> {
    let mut stage = Stage::set(world, Access::Open, NODES, "before", &LAYERS_BYTES).await?;
    let sent = stage.registry.sent().await?;
    cut_off(&stage.cluster).await?;
    let start = Instant::now();
    stage.pull_all(world, &stage.cluster.agents).await?;
    let took = start.elapsed();
    let pull = stage.counted_since(sent).await?;
    ensure!(pull.peer_bytes.iter().all(|bytes| *bytes == 0), "bytes came from peers that are cut off: {pull:?}");
    let nodes = NODES as u64;
    ensure!(pull.registry_bytes >= nodes * pull.image_bytes, "the registry sent too little: {pull:?}");
    Ok(format!("all pulled in {:.1} s, registry {:.2} x the image", took.as_secs_f64(), pull.registry_share()))
}

/// The network between the agents goes while pieces travel over it.
pub(super) async fn during(world: &mut World) -> Result<String> {
    let mut stage = Stage::set(world, Access::Open, NODES, "during", &LAYERS_BYTES).await?;
    stage.registry.host.limit_egress(REGISTRY_MEGABITS).await?;
    let sent = stage.registry.sent().await?;
    let cut = async {
        let flowing = || async { peer_bytes(&stage.cluster).await >= PEER_BYTES_BEFORE };
        wait_for("pieces between peers", START_DEADLINE, flowing).await?;
        cut_off(&stage.cluster).await?;
        Ok(peer_bytes(&stage.cluster).await)
    };
    let (at_cut, ()) = try_join(cut, stage.pull_all(world, &stage.cluster.agents)).await?;
    let pull = stage.counted_since(sent).await?;
    ensure!(pull.registry_share() > 1.0, "the network went too late to be missed: {pull:?}");
    Ok(format!("cut after {} MiB between peers, registry {:.2} x the image", at_cut >> 20, pull.registry_share()))
}

async fn cut_off(cluster: &Cluster) -> Result<()> {
    try_join_all(cluster.agents.iter().map(|agent| agent.host.cut_off(&PEER_PORTS))).await.map(drop)
}

async fn peer_bytes(cluster: &Cluster) -> u64 {
    cluster.metrics().await.map_or(0, |all| all.iter().map(|metrics| metrics.from_peers()).sum())
}
