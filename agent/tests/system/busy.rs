//! A registry that wants to be left alone, and one that must not be asked for too much at a time.

use std::num::NonZeroU64;
use std::time::Duration;

use darter_agent::client::LAYERS_AT_ONCE;
use darter_agent::demo::registry;

use crate::stage::{KIB, MIB, Plan, Stage};
use crate::wait;

/// What the registry asks for.
const REST: Duration = Duration::from_secs(6);

/// What was under way when it said so still comes; on a busy machine the news of it takes a moment.
const UNDER_WAY: Duration = Duration::from_secs(1);

/// Fetchers of one task in a small cluster: so many requests may be under way.
const FETCHERS_MAX: usize = 4;

/// Fetches that one agent has at a time at one registry, beside one for each layer that its client reads.
const FETCHES_MAX: u64 = 16;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_cluster_leaves_a_registry_alone_that_says_so_to_one() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(4 * MIB), ..registry::Options::default() };
    let plan = Plan { agents: 5, layers: vec![24 * MIB], registry, ..Plan::default() };
    let stage = Stage::start(plan).await;
    let pull = async {
        wait::until("the pull has begun", async || stage.registry.stats().blob_bytes() > 4 * MIB).await;
        stage.registry.rest(REST);
        wait::until("somebody has asked", async || !stage.registry.asked_at_rest().is_empty()).await;
    };
    tokio::join!(stage.pull_all(), pull);
    let asked = stage.registry.asked_at_rest();
    let late = asked.iter().filter(|at| at.duration_since(asked[0]) > UNDER_WAY).count();
    assert_eq!(late, 0, "{asked:?}\n{}", stage.logs());
    assert!(asked.len() <= FETCHERS_MAX, "{asked:?}");
    stage.sent_once().await;
    stage.stop().await;
}

/// An image of forty layers, of which a client asks for three at a time and the agent for three more ahead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_layers_are_not_many_requests_at_a_time() {
    const AGENTS: u64 = 3;
    let registry = registry::Options { blob_rate: NonZeroU64::new(2 * MIB), ..registry::Options::default() };
    let plan = Plan { agents: AGENTS as usize, layers: vec![600 * KIB; 40], registry, ..Plan::default() };
    let stage = Stage::start(plan).await;
    stage.pull_all().await;
    let sent = stage.sent_once().await;
    let most = sent.blob_gets_at_once;
    assert!(most <= AGENTS * (FETCHES_MAX + LAYERS_AT_ONCE as u64), "{most} at a time");
    assert!(most > LAYERS_AT_ONCE as u64, "{most}: it is pulled by several at a time");
    stage.stop().await;
}
