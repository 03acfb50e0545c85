//! A peer that dies while others depend on it.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::stage::{LAYERS_BYTES, Stage};
use crate::lab::agent::Agent;
use crate::lab::command::wait_for;
use crate::lab::registry::Access;
use crate::lab::world::World;

/// Slow enough for a pull of 70 MiB by two to be disturbed in its middle.
const SERVING_MEGABITS: u32 = 200;

/// When the serving peer dies: several pieces into the pull, and far from its end.
const SENT_BEFORE_DEATH_BYTES: u64 = 8 << 20;

/// How long the first bytes may take.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// The only holder of an image is killed while two others pull from it: both finish, with every byte right.
pub(super) async fn peer_killed(world: &mut World) -> Result<String> {
    let mut stage = Stage::set(world, Access::Open, 3, "killed", &LAYERS_BYTES).await?;
    stage.pull(world, &stage.cluster.agents[0]).await?;
    stage.cluster.agents[0].host.limit_egress(SERVING_MEGABITS).await?;
    let before = stage.registry.sent().await?;

    let mut holder = stage.cluster.agents.remove(0);
    let killed = async {
        wait_for("the holder to serve", START_DEADLINE, || async { sent(&holder).await >= SENT_BEFORE_DEATH_BYTES })
            .await?;
        let sent = sent(&holder).await;
        holder.kill().await?;
        Ok(sent)
    };
    let (served, ()) = futures_util::future::try_join(killed, stage.pull_all(world, &stage.cluster.agents)).await?;
    ensure!(served < 2 * stage.image.bytes(), "the holder had served everything before it died");
    let after = stage.registry.sent_since(before).await?;
    let share = after.blob_bytes as f64 / stage.image.bytes() as f64;
    ensure!(after.blob_bytes > 0, "the rest came from nowhere");
    Ok(format!("killed after {} MiB, both others finished, registry {share:.2} x the image", served >> 20))
}

async fn sent(agent: &Agent) -> u64 {
    agent.metrics().await.map_or(0, |metrics| metrics.to_peers())
}
