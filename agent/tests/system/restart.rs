//! `kill -9`, again and again: what is on the disk is not fetched a second time.

use std::num::NonZeroU64;

use darter_agent::demo::client::Transfer;
use darter_agent::demo::registry::{self, Stats};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::stage::{MIB, Plan, Stage, published};
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

/// Different bytes of a blob that were sent.
fn distinct(stats: &Stats, digest: darter_tracker::Digest) -> u64 {
    let blob = &stats.blobs[&digest];
    blob.body_bytes - blob.repeated_bytes()
}

/// Bytes that were sent before.
fn repeated(stats: &Stats) -> u64 {
    stats.blobs.values().map(darter_agent::demo::registry::BlobStats::repeated_bytes).sum()
}
