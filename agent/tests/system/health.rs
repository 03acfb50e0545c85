//! The admin port, and how an agent leaves.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use darter_agent::client::Client;
use http::{HeaderMap, Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use crate::stage::{MIB, Plan, Stage, admin, metric, program, samples};
use crate::wait;

/// How soon the others know that an agent has left.
const LEFT_WITHIN: Duration = Duration::from_secs(2);

/// How long an agent may take to end.
const ENDED_WITHIN: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_admin_port_tells_what_operators_ask() {
    let stage = Stage::start(Plan { agents: 2, layers: vec![3 * MIB], ..Plan::default() }).await;
    stage.pull_all().await;
    stage.sent_once().await;
    let whole = stage.image.blob_bytes();
    for agent in stage.agents() {
        for path in ["/livez", "/readyz"] {
            assert_eq!(admin(agent, path).await.unwrap().0, StatusCode::OK, "{path}");
        }
        wait::until("no pull is left", async || metric(agent, "darter_active_tasks").await == 0).await;
        let samples = samples(agent).await;
        let build: Vec<&String> = samples.keys().filter(|series| series.starts_with("darter_build_info{")).collect();
        assert!(
            build.len() == 1 && build[0].contains(concat!("version=\"", env!("CARGO_PKG_VERSION"), "\"")),
            "{build:?}"
        );
        assert_eq!((samples["darter_members"], samples["darter_members_lost_total"]), (2, 0));
        assert_eq!(samples["darter_client_sent_bytes_total"], whole);
        let bytes = samples["darter_registry_received_bytes_total"] + samples["darter_peer_received_bytes_total"];
        assert!(bytes >= whole, "{samples:?}");
        assert_eq!(admin(agent, "/nothing").await.unwrap().0, StatusCode::NOT_FOUND);
        let post =
            Client::direct(agent.addresses().admin, None).request(Method::POST, "/metrics", HeaderMap::new()).await;
        assert_eq!(post.unwrap().status(), StatusCode::METHOD_NOT_ALLOWED);
    }
    let mut pieces = BTreeMap::new();
    for agent in stage.agents() {
        let samples = samples(agent).await.into_iter().filter(|(series, _)| series.starts_with("darter_pieces_total{"));
        samples.for_each(|(series, count)| *pieces.entry(series).or_insert(0) += count);
    }
    let sources: Vec<&str> = pieces.keys().filter_map(|series| series.split('"').nth(1)).collect();
    assert_eq!(sources, ["Peer", "Registry"], "{pieces:?}");
    let (sent, got) =
        (stage.sum("darter_peer_sent_bytes_total").await, stage.sum("darter_peer_received_bytes_total").await);
    assert!(sent >= got && got >= whole, "sent {sent}, received {got}");
    stage.stop().await;
}

/// Row 117: what v1's users learned from the supernode. A series is there before it counts, so that its rise is seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_is_seen_from_any_node() {
    let stage = Stage::start(Plan { agents: 3, layers: vec![MIB, 2 * MIB], ..Plan::default() }).await;
    let counted = |samples: &BTreeMap<String, u64>| (samples["darter_known_tasks"], samples["darter_holders"]);
    for agent in stage.agents() {
        let samples = samples(agent).await;
        assert_eq!(samples["darter_members"], 3);
        assert_eq!(counted(&samples), (0, 0), "nobody has anything yet");
        for reason in ["HomeSilent", "PeersSlow", "Poisoned", "NoCache"] {
            assert_eq!(samples[&format!("darter_fallbacks_total{{reason=\"{reason}\"}}")], 0);
        }
        assert_eq!(samples["darter_evictions_total"], 0);
        assert_eq!(samples["darter_registry_received_bytes_total"], 0);
        assert_eq!(samples["darter_peer_received_bytes_total"], 0);
    }
    stage.pull([0, 1]).await;
    // Two have every blob and were told to say so; the third hears it from both, each of the two from the other.
    let blobs = stage.image.blobs().count() as u64;
    for (at, holders) in [(0, 1), (1, 1), (2, 2)] {
        wait::until("the node knows who has what", async || {
            counted(&samples(stage.agent(at)).await) == (blobs, blobs * holders)
        })
        .await;
    }
    let mut pieces = 0;
    for at in [0, 1] {
        let samples = samples(stage.agent(at)).await;
        let whole = stage.image.blob_bytes();
        let got = samples["darter_registry_received_bytes_total"] + samples["darter_peer_received_bytes_total"];
        assert!(got >= whole, "{samples:?}");
        pieces +=
            samples.iter().filter(|(name, _)| name.starts_with("darter_pieces_total{")).map(|it| it.1).sum::<u64>();
    }
    let all: u64 = stage.image.blobs().map(|blob| u64::from(stage.geometry(blob).pieces())).sum();
    assert_eq!(pieces, 2 * all, "each of the two stored every piece");
    // Who is gone holds nothing that anybody could get.
    let mut stage = stage;
    stage.cluster.agent_mut(1).unwrap().stop().await;
    wait::until("a leaver counts no more", async || counted(&samples(stage.agent(2)).await) == (blobs, blobs)).await;
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_told_to_stop_leaves_first() {
    let mut stage = Stage::start(Plan { agents: 3, ..Plan::default() }).await;
    let leaver = 2;
    // Started here, for its exit code.
    stage.cluster.agent_mut(leaver).unwrap().stop().await;
    let agent = stage.agent(leaver);
    let mut child = tokio::process::Command::new(program())
        .arg("agent")
        .arg("--config")
        .arg(agent.config_file())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    for agent in stage.agents() {
        wait::until("all three are members", async || {
            admin(agent, "/readyz").await.is_some_and(|it| it.0 == 200) && metric(agent, "darter_members").await == 3
        })
        .await;
    }
    let told = Instant::now();
    kill_process(Pid::from_raw(child.id().unwrap() as i32).unwrap(), Signal::TERM).unwrap();
    for at in [0, 1] {
        let left = LEFT_WITHIN.saturating_sub(told.elapsed());
        wait::within(left, "the others know that it has left", async || {
            (metric(stage.agent(at), "darter_members").await == 2).then_some(())
        })
        .await;
    }
    let status = tokio::time::timeout(ENDED_WITHIN, child.wait()).await.expect("it ends").unwrap();
    assert!(told.elapsed() < ENDED_WITHIN);
    assert_eq!(status.code(), Some(0));
    stage.stop().await;
}

/// An agent that is told to stop while clients read ends all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_keeps_no_agent() {
    let mut stage = Stage::start(Plan { agents: 1, layers: vec![24 * MIB], ..Plan::default() }).await;
    let path = stage.blob_path(&stage.image.layers()[0].digest());
    let mut reply = crate::wire::get(&stage.through(0), &path, &[]).await;
    assert!(reply.next().await.is_some_and(|bytes| bytes.is_ok()));
    let told = Instant::now();
    let agent = stage.cluster.agent_mut(0).unwrap();
    let child = Pid::from_raw(agent.process_id().unwrap() as i32).unwrap();
    kill_process(child, Signal::TERM).unwrap();
    // Waiting for it is what makes it no zombie; its own deadline is longer than this test's.
    agent.stop().await;
    assert!(told.elapsed() < ENDED_WITHIN, "{:?}", told.elapsed());
    assert!(reply.end().await.cut, "the client sees that it has not got everything");
    stage.stop().await;
}
