//! Row 21: a seed anchors the cluster. Nodes that know nobody else meet there, it is the home of every blob, and when it
//! is gone the others go on.

use std::net::SocketAddr;
use std::num::NonZeroU64;

use darter_agent::demo::image::Blob;
use darter_agent::demo::registry;
use futures_util::future::{join, join_all};
use serde_json::json;

use crate::stage::{MIB, Plan, Stage, admin, metric, reconfigure};
use crate::wait;
use crate::wire;

/// Bytes per second of each blob: slow enough to be in the middle of it.
const RATE: u64 = 12 * MIB;

/// What may leave the registry twice because the machine is busy; without a home that both agree on it is everything.
const AGAIN_PERCENT_MAX: u64 = 25;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seed_brings_nodes_together_and_may_go() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(RATE), ..registry::Options::default() };
    let plan = Plan { agents: 3, layers: vec![8 * MIB, 24 * MIB, 8 * MIB], registry, ..Plan::default() };
    let mut stage = Stage::start_unready(plan).await;
    let (seed, nodes) = (0, [1, 2]);
    let meet = stage.agent(seed).addresses().gossip;
    for at in 0..3 {
        let agent = stage.cluster.agent_mut(at).unwrap();
        agent.stop().await;
        // Whom it has met meanwhile is forgotten as well.
        let _ = std::fs::remove_dir_all(agent.cache_dir());
        reconfigure(agent, |config| {
            if at == seed {
                config["node"]["role"] = json!("seed");
                config["discovery"] = json!([]);
            } else {
                config["discovery"] = json!([{"static": {"addresses": [meet]}}]);
            }
        });
    }
    for at in 0..3 {
        stage.cluster.agent_mut(at).unwrap().start().unwrap();
    }
    // All three count all three, though the nodes were told of the seed only.
    stage.ready().await;
    every_home_is(&stage, stage.agent(seed).addresses().peer).await;

    let [calm, rough, alone] = [0, 1, 2].map(|at| stage.image.layers()[at].clone());
    get_all(&stage, &nodes, &calm).await;
    once(&stage, &calm);

    // The seed dies in the middle of a pull: both clients get everything, and the nodes keep each other.
    let (ways, path) = (nodes.map(|at| stage.through(at)), stage.blob_path(&rough.digest()));
    let kill = async {
        let sent = wait::within(wait::PATIENCE, "the pull has begun", async || {
            let stats = stage.registry.stats();
            stats.blobs.get(&rough.digest()).map(|blob| blob.body_bytes).filter(|sent| *sent >= 4 * MIB)
        })
        .await;
        stage.cluster.agent_mut(seed).unwrap().kill().await;
        sent
    };
    let pulls = join_all(ways.iter().map(|way| async { wire::get(way, &path, &[]).await.whole().await }));
    let (pulled, sent) = join(pulls, kill).await;
    assert!(sent < 20 * MIB, "{sent} bytes sent: it was killed too late to matter");
    assert!(pulled.iter().all(|bytes| *bytes == rough.read(0..rough.length())));
    for at in nodes {
        let agent = stage.agent(at);
        wait::until("the seed is known to be dead, the other node to be alive", async || {
            metric(agent, "darter_members").await == 2
        })
        .await;
    }
    get_all(&stage, &nodes, &alone).await;
    once(&stage, &alone);

    // It is found again, and is the home again.
    stage.cluster.agent_mut(seed).unwrap().start().unwrap();
    stage.ready().await;
    every_home_is(&stage, stage.agent(seed).addresses().peer).await;
    stage.stop().await;
}

/// Gets a blob through some agents at once, rightly.
async fn get_all(stage: &Stage, agents: &[usize], blob: &Blob) {
    let path = stage.blob_path(&blob.digest());
    let gets = agents.iter().map(|at| (stage.through(*at), path.clone()));
    for bytes in join_all(gets.map(|(way, path)| async move { wire::get(&way, &path, &[]).await.whole().await })).await
    {
        assert!(bytes == blob.read(0..blob.length()));
    }
}

/// The registry has sent the blob once.
fn once(stage: &Stage, blob: &Blob) {
    let sent = stage.registry.stats().blobs[&blob.digest()].body_bytes;
    let most = blob.length() * (100 + AGAIN_PERCENT_MAX) / 100;
    assert!((blob.length()..=most).contains(&sent), "{sent} bytes of {}\n{}", blob.length(), stage.logs());
}

async fn every_home_is(stage: &Stage, home: SocketAddr) {
    for agent in stage.agents() {
        for blob in stage.image.blobs() {
            let asked = format!("/api/v1/homes?digest={}", blob.digest());
            let (_, json) = admin(agent, &asked).await.unwrap();
            let homes: Vec<SocketAddr> = serde_json::from_str(&json).unwrap();
            assert_eq!((homes.first(), homes.len()), (Some(&home), 3), "{}: {homes:?}", agent.name());
        }
    }
}
