//! Many clients of one agent: one pull for a thousand, little memory for those that do not read, and no place for more than there
//! may be.

use std::num::NonZeroU64;

use darter_agent::demo::registry;
use futures_util::future::join_all;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::shapes::{MEMORY_BYTES_MAX, memory_peak};
use crate::stage::{MIB, Plan, Stage, metric};
use crate::wait;
use crate::wire;

const CROWD: usize = 1000;

/// Handshakes at a time, so that no client waits longer for its own than an agent allows.
const HANDSHAKES: usize = 16;

/// Clients that do not read. What the kernel holds for them is not the agent's.
const SLOW: usize = 200;

/// What each of them may make the agent hold.
const SLOW_BYTES_MAX: u64 = MIB;

/// As many connections as an agent takes at a time.
const CONNECTIONS_MAX: usize = 1024;

/// A stage whose agents, and this process, may have as many files open as the machine lets them.
async fn stage(plan: Plan) -> Stage {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    Stage::start(plan).await
}

/// Row 60, and the budget of memory for as many clients as it is meant for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_are_one_pull() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(MIB), ..registry::Options::default() };
    let stage = stage(Plan { agents: 1, layers: vec![MIB / 2], registry, ..Plan::default() }).await;
    let layer = stage.image.layers()[0].clone();
    let path = stage.blob_path(&layer.digest());
    let turns = Semaphore::new(HANDSHAKES);
    let begun = join_all((0..CROWD).map(|_| async {
        let _turn = turns.acquire().await;
        wire::get(&stage.through(0), &path, &[]).await
    }))
    .await;
    // All of them hold an answer whose end they have not seen.
    let whole = layer.read(0..layer.length());
    for bytes in join_all(begun.into_iter().map(wire::Reply::whole)).await {
        assert!(bytes == whole);
    }
    let sent = stage.settled().await.blobs[&layer.digest()].clone();
    assert_eq!((sent.body_bytes, sent.repeated_bytes()), (layer.length(), 0));
    assert_eq!(metric(stage.agent(0), "darter_client_sent_bytes_total").await, CROWD as u64 * layer.length());
    let peak = memory_peak(stage.agent(0));
    println!("{CROWD} clients: {} MiB at the most", peak / MIB);
    assert!(peak <= MEMORY_BYTES_MAX, "{} MiB", peak / MIB);
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_read_nothing_cost_little_memory() {
    let stage = stage(Plan { agents: 1, layers: vec![32 * MIB], ..Plan::default() }).await;
    let layer = stage.image.layers()[0].clone();
    let path = stage.blob_path(&layer.digest());
    assert!(wire::get(&stage.through(0), &path, &[]).await.whole().await.len() as u64 == layer.length());
    let before = memory_peak(stage.agent(0));
    let turns = Semaphore::new(HANDSHAKES);
    let held = join_all((0..SLOW).map(|_| async {
        let _turn = turns.acquire().await;
        wire::get(&stage.through(0), &path, &[]).await
    }))
    .await;
    let (mut last, mut same) = (0, 0);
    wait::until("no more is sent", async || {
        let sent = metric(stage.agent(0), "darter_client_sent_bytes_total").await;
        same = if sent == last { same + 1 } else { 0 };
        last = sent;
        same > 20
    })
    .await;
    let grown = memory_peak(stage.agent(0)) - before;
    println!("{SLOW} clients that read nothing: {} KiB each", (grown >> 10) / SLOW as u64);
    assert!(grown <= SLOW as u64 * SLOW_BYTES_MAX, "{} MiB", grown / MIB);
    // Others are served meanwhile.
    assert!(wire::get(&stage.through(0), &path, &[]).await.whole().await.len() as u64 == layer.length());
    drop(held);
    stage.stop().await;
}

/// Silent clients hold their places for as long as the first headers may take, and everybody else waits; after that, all is well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_when_all_places_are_taken_waits_for_one() {
    let stage = stage(Plan { agents: 1, layers: vec![MIB], ..Plan::default() }).await;
    let proxy = stage.agent(0).addresses().proxy;
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        silent.push(TcpStream::connect(proxy).await.unwrap());
    }
    let (way, path) = (stage.through(0), stage.manifest_path());
    let mut answer = Box::pin(wire::get(&way, &path, &[]));
    let first = &mut silent[0];
    tokio::select! {
        _ = &mut answer => panic!("there was a place"),
        ended = first.read_u8() => assert!(ended.is_err(), "the first silent client is let go"),
    }
    assert!(answer.await.whole().await == stage.image.manifest());
    stage.stop().await;
}
