//! `kill -9`, again and again: what is on the disk is not fetched a second time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::num::NonZeroU64;

use darter_agent::client::Transfer;
use darter_agent::demo::registry::{self, Stats};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::stage::{KIB, MIB, Plan, Stage, admin, metric, published};
use crate::wait::{self, PATIENCE};

/// How often the agent is killed.
const KILLS: u64 = 20;

/// Three layers that are open at once.
const LAYERS: [u64; 3] = [10 * MIB + 99, 8 * MIB + 7, 7 * MIB + 1];

/// Large, so that what sockets hold is small beside it.
const PIECE_BYTES: u64 = MIB;

/// What the registry's connection has taken and the agent not read when it is killed: both kernels' buffers.
const SOCKET_BYTES: u64 = 512 << 10;

/// Bytes per second of each layer, so that kills hit at many offsets.
const RATE: u64 = 24 * MIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_cost_a_piece_per_open_layer_each() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(RATE), ..registry::Options::default() };
    let mut stage = Stage::start(Plan {
        agents: 1,
        layers: LAYERS.to_vec(),
        registry,
        piece_bytes: Some(PIECE_BYTES),
        ..Plan::default()
    })
    .await;
    let seed = rand::rng().random();
    let mut rng = StdRng::seed_from_u64(seed);
    let total: u64 = LAYERS.iter().sum();
    let step = total / (KILLS + 1);
    for kill in 0..KILLS {
        // Rising, each somewhere in its own twentieth.
        let offset = kill * step + rng.random_range(0..step);
        let before = stage.registry.stats();
        // What is sent again now was lost when the agent was killed the last time, with these layers open.
        let agent = stage.agent(0);
        let open = stage.image.blobs().filter(|blob| !published(agent, &blob.digest()).exists()).count() as u64;
        let client = stage.client(0);
        let (repository, tag) = (stage.image.repository().to_owned(), stage.image.tag().to_owned());
        let transfer = Transfer::default();
        {
            let pull = client.pull(&repository, &tag, &transfer);
            let reached = wait::within(PATIENCE, "the registry sends more", async || {
                let stats = stage.registry.stats();
                let sent: u64 = stage.image.layers().iter().map(|blob| distinct(&stats, blob.digest())).sum();
                (sent >= offset).then_some(())
            });
            // What becomes of the client does not matter: its agent is killed.
            tokio::select! {
                biased;
                () = reached => {}
                pulled = pull => panic!("seed {seed}: the pull ended before byte {offset}: {pulled:?}"),
            }
        }
        let agent = stage.cluster.agent_mut(0).unwrap();
        agent.kill().await;
        agent.start().unwrap();
        stage.ready().await;
        let again = repeated(&stage.registry.stats()) - repeated(&before);
        let most = open * (PIECE_BYTES + SOCKET_BYTES);
        assert!(again <= most, "seed {seed}: {again} bytes again with {open} layers open, killed at {offset}");
    }
    stage.pull([0]).await;
    let stats = stage.registry.stats();
    for blob in stage.image.blobs() {
        assert_eq!(distinct(&stats, blob.digest()), blob.length());
    }
    let most = KILLS * LAYERS.len() as u64 * (PIECE_BYTES + SOCKET_BYTES);
    assert!(repeated(&stats) <= most, "seed {seed}: {} bytes again in all", repeated(&stats));
    // And after all that the cache is whole: a last restart needs nothing.
    let agent = stage.cluster.agent_mut(0).unwrap();
    agent.kill().await;
    agent.start().unwrap();
    stage.ready().await;
    let gets = stage.registry.stats().blob_gets();
    stage.pull([0]).await;
    assert_eq!(stage.registry.stats().blob_gets(), gets, "what is complete is asked for no more");
    stage.stop().await;
}

/// How often an agent loses its cache.
const LOSSES: usize = 4;

/// Row 15: an agent comes back with nothing while another has everything. Some blobs it is the home of, and has forgotten
/// who has them; of others the holder is. As an agent is another member after each start, they are others each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_with_nothing_gets_it_from_the_others() {
    let layers: Vec<u64> = (0..12).map(|at| 900 * KIB + at).collect();
    let mut stage = Stage::start(Plan { agents: 2, layers, ..Plan::default() }).await;
    let (holder, loser) = (0, 1);
    stage.pull([holder]).await;
    let before = stage.settled().await;
    // It has said so: somebody who dies while a pull takes leave of him is another matter.
    wait::until("the other hears that the holder has everything", async || everything_is_held(&stage, loser).await)
        .await;
    let mut homes = BTreeSet::new();
    for loss in 0..LOSSES {
        let agent = stage.cluster.agent_mut(loser).unwrap();
        if loss % 2 == 0 {
            agent.kill().await
        } else {
            agent.stop().await
        }
        std::fs::remove_dir_all(agent.cache_dir()).unwrap();
        agent.start().unwrap();
        stage.ready().await;
        for blob in stage.image.blobs() {
            homes.insert(first_home(&stage, loser, &blob.digest()).await);
        }
        stage.pull([loser]).await;
        let after = stage.settled().await;
        for blob in stage.image.blobs() {
            let [before, after] = [&before, &after].map(|stats| stats.blobs[&blob.digest()].body_bytes);
            let home = first_home(&stage, loser, &blob.digest()).await;
            assert_eq!(
                after,
                before,
                "loss {loss}: {} came from the registry, home {home}\n{}",
                blob.digest(),
                stage.logs()
            );
        }
        let got = metric(stage.agent(loser), "darter_peer_received_bytes_total").await;
        assert!(got >= stage.image.blob_bytes(), "{got} bytes from the holder");
    }
    let all = stage.agents().iter().map(|agent| agent.addresses().peer).collect();
    assert_eq!(homes, all, "both were homes");
    stage.stop().await;
}

/// Whether an agent knows somebody else who has all of each blob.
async fn everything_is_held(stage: &Stage, at: usize) -> bool {
    const WHOLE: u8 = 4;
    let (_, json) = admin(stage.agent(at), "/api/v1/holdings").await.unwrap();
    let known: BTreeMap<String, BTreeMap<SocketAddr, u8>> = serde_json::from_str(&json).unwrap();
    stage.image.blobs().all(|blob| {
        known.get(&blob.digest().to_string()).is_some_and(|holders| holders.values().any(|held| *held == WHOLE))
    })
}

async fn first_home(stage: &Stage, at: usize, digest: &darter_tracker::Digest) -> SocketAddr {
    let (_, json) = admin(stage.agent(at), &format!("/api/v1/homes?digest={digest}")).await.unwrap();
    serde_json::from_str::<Vec<SocketAddr>>(&json).unwrap()[0]
}

/// Different bytes of a blob that were sent.
fn distinct(stats: &Stats, digest: darter_tracker::Digest) -> u64 {
    let blob = &stats.blobs[&digest];
    blob.body_bytes - blob.repeated_bytes()
}

/// Bytes that were sent before.
fn repeated(stats: &Stats) -> u64 {
    stats.blobs.values().map(darter_agent::demo::registry::BlobStats::repeated_bytes).sum()
}
