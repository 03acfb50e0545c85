//! Each piece leaves the registry once; when a fetcher dies, what it had been lent goes to another.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::{try_join, try_join_all};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::lab::agent::{Agent, Cluster, Remote};
use crate::lab::command::wait_for;
use crate::lab::image::{Blob, Image, hex};
use crate::lab::origin::{Coverage, Origin};
use crate::lab::world::World;

/// Nodes that pull at the same moment.
const NODES: usize = 5;

/// The layer: some seconds at the origin's rate.
const LAYER_BYTES: usize = (96 << 20) + 4321;

/// The origin's rate, so that there is a middle to be killed in.
const ORIGIN_MEGABITS: u32 = 200;

/// Set rather than chosen by the agents, since the case counts by it.
const PIECE_BYTES: u64 = 1 << 20;

/// When a fetcher is killed: once it has fetched this much, far from its share of the layer.
const FETCHED_BEFORE_DEATH_BYTES: u64 = 4 << 20;

/// Pieces that may have to be fetched again because of one dead fetcher: two that it had and not passed on, which is
/// where its brake is, the one under way, and one that its death caught between two peers.
const LOST_PIECES_MAX: usize = 4;

/// How long until a fetcher has fetched that much.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// How long the pull may take. Undisturbed it takes 4 s; a lapsed lease costs some seconds more.
const PULL_DEADLINE: Duration = Duration::from_secs(90);

/// Five nodes pull, the busiest fetcher that is not the layer's home is killed mid-run: the other four finish, every
/// piece was sent once, save the few that died with it, which were sent twice.
pub(super) async fn leases(world: &mut World) -> Result<String> {
    let image = Image::build(&world.directory("image")?, "leases", &[LAYER_BYTES])?;
    let blob = image.largest()?;
    let origin = Origin::start(world, &image).await?;
    let remote = Remote { name: &origin.name, ca: None };
    let piece_size = json!({"piece_size": format!("{}MiB", PIECE_BYTES >> 20)});
    let mut cluster = Cluster::start(world, remote, NODES, &piece_size).await?;
    origin.host.limit_egress(ORIGIN_MEGABITS).await?;

    let files = world.directory("pulled")?;
    let pulls = cluster.agents.iter().map(|agent| {
        let pull = agent.curl_mirrored(&blob.digest, &files.join(&agent.host.name)).within(PULL_DEADLINE);
        let name = agent.host.name.clone();
        async move { Ok::<_, anyhow::Error>((name, pull.finish().await?)) }
    });
    let pulls: Vec<_> = pulls.collect();
    let home = *cluster.homes(&blob.digest).await?.first().context("no home")?;
    let (victim, finished) = try_join(kill_a_fetcher(&mut cluster, home), try_join_all(pulls)).await?;
    for (name, curl) in finished.iter().filter(|(name, _)| *name != victim) {
        ensure!(curl.code == 0, "the pull on {name} ended with {}: {}", curl.code, curl.stderr);
        verify(&files.join(name), blob).with_context(|| format!("on {name}"))?;
    }

    let sent = origin.sent().await?;
    let responses = sent.get(&blob.digest).context("the origin has sent nothing")?;
    let mut again = 0;
    for piece in pieces(blob.bytes) {
        let times = responses.iter().filter(|response| response.has(&piece)).count();
        ensure!(times <= 2, "the piece at {} was sent {times} times: {responses:?}", piece.start);
        again += usize::from(times == 2);
    }
    ensure!(again <= LOST_PIECES_MAX, "{again} pieces were sent twice: {responses:?}");
    let covered = Coverage::of(responses);
    ensure!(covered.distinct_bytes == blob.bytes, "the origin sent only {covered:?}");
    let share = covered.sent_bytes as f64 / blob.bytes as f64;
    Ok(format!("{victim} killed, four finished, {again} pieces sent twice, origin {share:.3} x the layer"))
}

/// Kills the first agent that has fetched enough and is not `home`, whose death is another case's, and returns its name.
async fn kill_a_fetcher(cluster: &mut Cluster, home: usize) -> Result<String> {
    let agents = &cluster.agents;
    let busiest = || async { fetchers(agents).await.into_iter().filter(|(_, index)| *index != home).max() };
    let found = || async { busiest().await.is_some_and(|(bytes, _)| bytes >= FETCHED_BEFORE_DEATH_BYTES) };
    wait_for("a fetcher to be in its run", START_DEADLINE, found).await?;
    let (_, index) = busiest().await.context("no fetchers")?;
    let victim = cluster.agents.get_mut(index).context("no such agent")?;
    victim.kill().await?;
    Ok(victim.host.name.clone())
}

/// What each agent has fetched from the origin, with its index.
async fn fetchers(agents: &[Agent]) -> Vec<(u64, usize)> {
    let mut all = Vec::new();
    for (index, agent) in agents.iter().enumerate() {
        all.push((agent.metrics().await.map_or(0, |metrics| metrics.from_registry()), index));
    }
    all
}

fn pieces(length: u64) -> impl Iterator<Item = Range<u64>> {
    (0..length.div_ceil(PIECE_BYTES)).map(move |index| index * PIECE_BYTES..length.min((index + 1) * PIECE_BYTES))
}

/// Checks that a file is the blob.
pub(super) fn verify(file: &Path, blob: &Blob) -> Result<()> {
    let bytes = fs::read(file)?;
    let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
    ensure!(digest == blob.digest, "{} bytes with {digest} instead of {}", bytes.len(), blob.digest);
    Ok(())
}
