//! An agent that is killed again and again goes on from what is on its disk.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::{join_all, try_join_all};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::leases::verify;
use crate::lab::agent::{Agent, Cluster, Remote};
use crate::lab::command::wait_for;
use crate::lab::image::{Blob, Image};
use crate::lab::origin::{Coverage, Origin};
use crate::lab::world::World;

/// How often the agent is killed.
const KILLS: u64 = 20;

/// Three layers that are open at once.
const LAYERS_BYTES: [usize; 3] = [(96 << 20) + 99, (64 << 20) + 7, (48 << 20) + 1];

/// The origin's rate, so that kills hit at many offsets.
const ORIGIN_MEGABITS: u32 = 400;

/// Large, so that what sockets hold is small beside it.
const PIECE_BYTES: u64 = 4 << 20;

/// What the origin has handed over and the agent not yet read when it is killed: both kernels' buffers of a connection.
const SOCKET_BYTES: u64 = 1 << 20;

/// How long until the origin has sent the next bit.
const PROGRESS_DEADLINE: Duration = Duration::from_secs(30);

/// How long a last, undisturbed pull may take.
const PULL_DEADLINE: Duration = Duration::from_secs(90);

/// `kill -9` at twenty random offsets: after each, at most the piece under way of each open layer is fetched again.
pub(super) async fn restart(world: &mut World) -> Result<String> {
    let image = Image::build(&world.directory("image")?, "restart", &LAYERS_BYTES)?;
    let mut layers: Vec<Blob> = image.blobs.clone();
    layers.sort_by_key(|blob| std::cmp::Reverse(blob.bytes));
    layers.truncate(LAYERS_BYTES.len());
    let origin = Origin::start(world, &image).await?;
    let remote = Remote { name: &origin.name, ca: None };
    let piece_size = json!({"piece_size": format!("{}MiB", PIECE_BYTES >> 20)});
    let mut cluster = Cluster::start(world, remote, 1, &piece_size).await?;
    let agent = cluster.agents.first_mut().context("a cluster of none")?;
    origin.host.limit_egress(ORIGIN_MEGABITS).await?;
    let files = world.directory("pulled")?;

    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    let total_bytes: u64 = layers.iter().map(|blob| blob.bytes).sum();
    let mut worst = 0;
    for offset in offsets(seed, total_bytes) {
        let before = sent(&origin, &layers).await?;
        // What is sent again now was lost when the agent was killed the last time, with these layers open.
        let open = layers.iter().filter(|blob| !agent.has_published(&blob.digest)).count() as u64;
        interrupt(agent, &origin, &layers, &files, offset).await.with_context(|| format!("seed {seed}"))?;
        agent.resume().await?;
        let after = sent(&origin, &layers).await?;
        let again = again_bytes(&after) - again_bytes(&before);
        worst = worst.max(again);
        ensure!(
            again <= open * (PIECE_BYTES + SOCKET_BYTES),
            "{again} bytes were fetched again with {open} layers open, killed at {offset}, seed {seed}"
        );
    }
    try_join_all(layers.iter().map(|blob| async {
        agent.curl_mirrored(&blob.digest, &files.join(&blob.digest)).within(PULL_DEADLINE).output().await?;
        verify(&files.join(&blob.digest), blob)
    }))
    .await?;
    let again = again_bytes(&sent(&origin, &layers).await?);
    let most = KILLS * layers.len() as u64 * (PIECE_BYTES + SOCKET_BYTES);
    ensure!(again <= most, "{again} bytes were fetched again in all, seed {seed}");
    let per_kill = again as f64 / KILLS as f64 / f64::from(1 << 20);
    Ok(format!(
        "{KILLS} kills, fetched again {per_kill:.2} MiB a kill, at most {:.2} MiB",
        worst as f64 / f64::from(1 << 20)
    ))
}

/// Pulls all layers at once until the origin has sent `offset` different bytes, and kills the agent.
async fn interrupt(
    agent: &mut Agent,
    origin: &Origin,
    layers: &[Blob],
    files: &std::path::Path,
    offset: u64,
) -> Result<()> {
    let pulls: Vec<_> = layers
        .iter()
        .map(|blob| agent.curl_mirrored(&blob.digest, &files.join(&blob.digest)).within(PULL_DEADLINE).finish())
        .collect();
    let kill = async {
        let reached = || async {
            let sent = sent(origin, layers).await.unwrap_or_default();
            sent.iter().map(|blob| blob.distinct_bytes).sum::<u64>() >= offset
        };
        wait_for(&format!("the origin to send {offset} bytes"), PROGRESS_DEADLINE, reached).await?;
        agent.kill().await
    };
    // What becomes of the clients does not matter: the agent they talk to is killed.
    let (killed, _) = futures_util::future::join(kill, join_all(pulls)).await;
    killed
}

async fn sent(origin: &Origin, layers: &[Blob]) -> Result<Vec<Coverage>> {
    let sent = origin.sent().await?;
    let none = Vec::new();
    Ok(layers.iter().map(|blob| Coverage::of(sent.get(&blob.digest).unwrap_or(&none))).collect())
}

fn again_bytes(layers: &[Coverage]) -> u64 {
    layers.iter().map(Coverage::again_bytes).sum()
}

/// Random offsets in rising order, each somewhere in its own twentieth of what there is to send.
fn offsets(seed: u64, total_bytes: u64) -> Vec<u64> {
    let step = total_bytes / (KILLS + 1);
    let random = |kill: u64| {
        let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(kill.to_le_bytes()).finalize();
        digest.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
    };
    (0..KILLS).map(|kill| kill * step + random(kill) % step).collect()
}
