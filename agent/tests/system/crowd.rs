//! Many clients of one agent: one pull for a thousand, and little memory for those that do not read.

use std::num::NonZeroU64;

use darter_agent::demo::registry;
use futures_util::future::join_all;
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

/// Row 60, and the budget of memory for as many clients as it is meant for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_are_one_pull() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(MIB / 2), ..registry::Options::default() };
    let stage = Stage::start(Plan { agents: 1, layers: vec![MIB], registry, ..Plan::default() }).await;
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
    let stage = Stage::start(Plan { agents: 1, layers: vec![32 * MIB], ..Plan::default() }).await;
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
