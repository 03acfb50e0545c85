//! Agents that have nothing, agents that have everything, and one that comes late.

use std::num::NonZeroU64;
use std::time::Duration;

use darter_agent::demo::registry::{self, Stats};

use crate::stage::{KIB, MIB, Plan, Stage, admin, metric, pieces, reconfigure};
use crate::wait;

/// How often is looked for children during a pull: a process for each layer would be seen, or leave a zombie.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Pieces that may leave the registry twice because the machine is busy: see [`Stage::sent_once`].
const AGAIN_MAX: usize = 2;

/// From a layer of two pieces to one of many.
const LAYERS: [u64; 4] = [300 * KIB, 3 * MIB + 17, 9 * MIB, 16 * MIB];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_piece_leaves_the_registry_once() {
    let stage = Stage::start(Plan { agents: 5, layers: LAYERS.to_vec(), ..Plan::default() }).await;
    // Cold: five at once, and the registry sends the image once.
    stage.pull_all().await;
    let cold = stage.sent_once().await;
    let mut again = Vec::new();
    for blob in stage.image.blobs() {
        let sent = &cold.blobs[&blob.digest()];
        for piece in pieces(stage.geometry(blob)) {
            let times = sent.times_sent(&piece);
            assert!((1..=2).contains(&times), "{blob:?}: the piece at {} was sent {times} times", piece.start);
            again.extend((times == 2).then_some((blob.digest(), piece)));
        }
    }
    assert!(again.len() <= AGAIN_MAX, "sent twice: {again:?}");
    // The manifest spoke for its blobs, so nobody asked about them.
    assert_eq!(cold.blob_heads(), 0);
    let from_peers = stage.sum("darter_peer_received_bytes_total").await;
    // A piece asked of two peers at the end may come from both.
    assert!(
        from_peers + cold.blob_bytes() >= 5 * stage.image.blob_bytes(),
        "peers sent {from_peers} of what the registry did not send"
    );
    assert_eq!(stage.sum("darter_peer_wrong_bytes_total").await, 0);

    // Warm: everybody has it.
    stage.pull_all().await;
    let warm = stage.settled().await;
    assert_eq!(warm.blobs, cold.blobs, "a warm pull asks for no blob");
    stage.stop().await;
}

/// Row 14: where the home knows, a newcomer asks the registry for nothing, not even for a length.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_latecomer_needs_no_registry() {
    let stage = Stage::start(twelve_layers()).await;
    late(stage, Some(0)).await;
}

/// The newcomer is the home of every layer, and was not there when the others said what they have: they say it again to
/// it. Until they have, which takes them some milliseconds, it would fetch like the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_latecomer_that_is_home_needs_no_registry() {
    let stage = Stage::start(twelve_layers()).await;
    late(stage, None).await;
}

fn twelve_layers() -> Plan {
    Plan { agents: 4, layers: (0..12).map(|at| 900 * KIB + at).collect(), ..Plan::default() }
}

async fn late(mut stage: Stage, home: Option<usize>) {
    if let Some(home) = home {
        stage.make_home(home).await;
    }
    let late = 3;
    stage.cluster.agent_mut(late).unwrap().stop().await;
    stage.pull(0..late).await;
    let before = stage.sent_once().await;
    if home.is_none() {
        reconfigure(stage.agent(late), |config| config["node"]["role"] = "seed".into());
    }
    stage.cluster.agent_mut(late).unwrap().start().unwrap();
    stage.ready().await;
    if home.is_none() {
        // A home that is told of a holder has it gossiped, so what others say of themselves shows that it was told.
        wait::until("the newcomer is told what the others have", async || {
            let (_, json) = admin(stage.agent(late), "/api/v1/holdings").await.unwrap_or_default();
            stage.image.blobs().all(|blob| json.contains(&blob.digest().to_string()))
        })
        .await;
    }
    stage.pull([late]).await;
    let after = stage.registry.stats();
    assert_eq!(gets_and_heads(&after), gets_and_heads(&before), "a latecomer asks the registry for no blob");
    assert!(metric(stage.agent(late), "darter_peer_received_bytes_total").await >= stage.image.blob_bytes());
    stage.stop().await;
}

/// Waiting for a lease that makes progress is no stall: a registry slower than any reader's patience is still asked for
/// each piece once (D11).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_registry_is_asked_once_too() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(2 * MIB), ..registry::Options::default() };
    let plan = Plan { agents: 4, layers: vec![10 * MIB], registry, piece_bytes: Some(MIB), ..Plan::default() };
    let stage = Stage::start(plan).await;
    stage.pull_all().await;
    stage.sent_once().await;
    stage.stop().await;
}

fn gets_and_heads(stats: &Stats) -> (u64, u64, u64) {
    (stats.blob_gets(), stats.blob_heads(), stats.blob_bytes())
}

/// Row 74: v1 started a process for each layer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_layers_need_one_process() {
    let layers: Vec<u64> = (0..100).map(|at| 20 * KIB + at).collect();
    let stage = Stage::start(Plan { agents: 2, layers, ..Plan::default() }).await;
    let agents: Vec<u32> = stage.agents().iter().filter_map(|agent| agent.process_id()).collect();
    assert_eq!(agents.len(), 2);
    let watch = async {
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            look.tick().await;
            for agent in &agents {
                assert_eq!(children(*agent), Vec::<u32>::new(), "an agent has no children, dead or alive");
            }
        }
    };
    tokio::select! {
        () = stage.pull_all() => {}
        () = watch => {}
    }
    stage.sent_once().await;
    let still: Vec<u32> = stage.agents().iter().filter_map(|agent| agent.process_id()).collect();
    assert_eq!(still, agents);
    stage.stop().await;
}

/// Processes whose parent is `parent`, zombies included.
fn children(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_child = |process: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // The name is in parentheses and may hold anything; the state and the parent follow it.
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        after.split_whitespace().nth(1).and_then(|parent| parent.parse().ok()) == Some(parent)
    };
    numbers.filter(is_child).collect()
}
