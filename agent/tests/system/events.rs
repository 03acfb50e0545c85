//! The events that gossip carries to every member: who has what, and who has it no longer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU64;

use darter_agent::demo::registry::{self, Stats};
use darter_swarm::home::swarm::ADVERTISERS;
use http::StatusCode;
use serde_json::json;

use crate::stage::{MIB, Plan, Stage, admin, log, metric};
use crate::wait;
use crate::wire;

/// What one agent knows of others: quarters per blob and address where it is served.
pub(crate) type Holdings = BTreeMap<String, BTreeMap<SocketAddr, u8>>;

/// In quarters: all of it.
pub(crate) const WHOLE: u8 = 4;

/// Rows 11 and 13: a member that did not ask for a blob hears that another has it, and that it has thrown it out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_hear_who_has_a_blob_and_who_has_it_no_longer() {
    // Room for one of the two layers at a time.
    let overrides = |_| json!({"cache": {"max_size": "24MiB"}});
    let layers = vec![14 * MIB, 15 * MIB];
    let mut stage = Stage::start(Plan { agents: 3, layers, overrides, ..Plan::default() }).await;
    // The home of both is a third node, so that what the observer knows it knows from gossip.
    stage.make_home(2).await;
    let holder = stage.agent(0).addresses().peer;
    let layers: Vec<_> = stage.image.layers().iter().map(|blob| blob.digest()).collect();
    everybody_names_the_same_homes(&stage, &layers[0].to_string()).await;

    for (now, before) in [(0, None), (1, Some(0))] {
        let path = stage.blob_path(&layers[now]);
        let length = stage.image.layers()[now].length();
        assert_eq!(wire::get(&stage.through(0), &path, &[]).await.whole().await.len() as u64, length);
        wait::until("the observer hears who has the blob", async || {
            let known = holdings(&stage).await;
            known.get(&layers[now].to_string()).and_then(|holders| holders.get(&holder)) == Some(&WHOLE)
        })
        .await;
        if let Some(before) = before {
            let gone: usize = before;
            wait::until("the observer hears that the other was thrown out", async || {
                let known = holdings(&stage).await;
                known.get(&layers[gone].to_string()).is_none_or(|holders| !holders.contains_key(&holder))
            })
            .await;
            assert!(metric(stage.agent(0), "darter_evictions_total").await > 0);
        }
    }
    stage.stop().await;
}

/// The seed first, then the other two in the same order.
async fn everybody_names_the_same_homes(stage: &Stage, digest: &str) {
    let mut all = Vec::new();
    for agent in stage.agents() {
        let (_, json) = admin(agent, &format!("/api/v1/homes?digest={digest}")).await.unwrap();
        all.push(serde_json::from_str::<Vec<SocketAddr>>(&json).unwrap());
    }
    assert!(all.iter().all(|homes| *homes == all[0]), "{all:?}");
    assert_eq!((all[0].len(), all[0][0]), (3, stage.agent(2).addresses().peer));
    let refused = admin(stage.agent(0), "/api/v1/homes?digest=sha256:1").await.unwrap();
    assert_eq!(refused.0, StatusCode::BAD_REQUEST);
}

/// What the second agent knows from gossip.
pub(crate) async fn holdings(stage: &Stage) -> Holdings {
    let (_, json) = admin(stage.agent(1), "/api/v1/holdings").await.unwrap_or_default();
    serde_json::from_str(&json).unwrap_or_default()
}

/// A home may come to its office when everybody who was announced as a holder is gone, and the one that knew the others as
/// well: then it asks everybody (Recover), and who holds the blob in silence steps forward.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_nobody_announced_is_found_when_the_others_are_gone() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(2 * MIB), ..registry::Options::default() };
    let layers = (0..8).map(|at| 4 * MIB + at).collect();
    let mut stage = Stage::start(Plan { agents: ADVERTISERS + 2, layers, registry, ..Plan::default() }).await;
    let (announced, silent, newcomer) = (0..ADVERTISERS, ADVERTISERS, ADVERTISERS + 1);
    stage.pull(announced.clone()).await;
    stage.settled().await;
    stage.pull([silent]).await;
    stage.settled().await;
    for at in announced {
        stage.cluster.agent_mut(at).unwrap().kill().await;
    }
    for at in [silent, newcomer] {
        wait::until("the dead are known", async || metric(stage.agent(at), "darter_members").await == 2).await;
    }
    let before = stage.registry.stats();
    // Each of the two is the home of some of the layers.
    stage.pull([newcomer]).await;
    let after = stage.settled().await;
    for layer in stage.image.layers() {
        let sent = |stats: &Stats| stats.blobs[&layer.digest()].body_bytes;
        let sent = sent(&after) - sent(&before);
        assert!(sent <= layer.length() / 2, "{sent} bytes of {}\n{}", layer.length(), log(stage.agent(newcomer)));
    }
    assert!(log(stage.agent(silent)).contains("the blob is complete"));
    stage.stop().await;
}
