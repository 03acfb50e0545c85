//! Layers that are started before their client asks for them, and clients that do not come for them.

use std::num::NonZeroU64;
use std::time::Duration;

use darter_agent::client::LAYERS_AT_ONCE;
use darter_agent::demo::registry;
use futures_util::future::join_all;

use crate::stage::{KIB, MIB, Plan, Stage, metric};
use crate::{wait, wire};

/// An image of ten layers, each of several pieces.
const LAYERS: [u64; 10] = [MIB; 10];

/// What nobody reads may be this much of an image, in thousandths, where clients hold all layers but one.
const UNREAD_PERMILLE_MAX: u64 = 10;

/// How long it takes until what was given up counts: see `pull::ahead`.
const COUNTED_MAX: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_layers_are_there_when_the_client_comes_for_them() {
    // Each layer takes the registry a second, three at a time or six.
    let registry = registry::Options { blob_rate: NonZeroU64::new(MIB), ..registry::Options::default() };
    let stage = Stage::start(Plan { agents: 2, layers: LAYERS.to_vec(), registry, ..Plan::default() }).await;
    stage.pull_all().await;
    assert!(stage.sum("darter_layers_ahead_total").await >= LAYERS.len() as u64 - LAYERS_AT_ONCE as u64);
    let sent = stage.sent_once().await;
    assert_eq!(sent.blob_heads(), 0);
    assert_eq!(stage.sum("darter_unread_bytes_total").await, 0);
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_clients_that_hold_nine_layers_of_ten_cost_that_layer() {
    let stage = Stage::start(Plan { agents: 16, layers: LAYERS.to_vec(), ..Plan::default() }).await;
    let blobs: Vec<_> = stage.image.blobs().cloned().collect();
    // In the middle: docker holds a beginning, containerd and CRI-O anything.
    let (config, lacked) = (&blobs[0], &blobs[5]);
    join_all((0..16).map(async |at| {
        let way = stage.through(at);
        wire::get(&way, &stage.manifest_path(), &[]).await.whole().await;
        for blob in [config, lacked] {
            let bytes = wire::get(&way, &stage.blob_path(&blob.digest()), &[]).await.whole().await;
            assert_eq!(bytes.len() as u64, blob.length());
        }
    }))
    .await;
    let sent = stage.settled().await;
    let wanted = config.length() + lacked.length();
    let asked: u64 = [config, lacked].iter().map(|blob| sent.blobs[&blob.digest()].body_bytes).sum();
    let unread = sent.blob_bytes() - asked;
    assert!(unread * 1000 <= stage.image.blob_bytes() * UNREAD_PERMILLE_MAX, "{unread} bytes that nobody asked for");
    assert!(asked < 2 * wanted, "{asked} of {wanted}");
    assert_eq!(stage.sum("darter_layers_ahead_total").await, 0);
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_client_does_not_come_for_is_given_up_and_counted() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(256 * KIB), ..registry::Options::default() };
    let stage = Stage::start(Plan { agents: 1, layers: LAYERS.to_vec(), registry, ..Plan::default() }).await;
    let blobs: Vec<_> = stage.image.blobs().cloned().collect();
    let way = stage.through(0);
    wire::get(&way, &stage.manifest_path(), &[]).await.whole().await;
    let paths: Vec<String> = blobs[1..4].iter().map(|blob| stage.blob_path(&blob.digest())).collect();
    // The client goes when it has begun to read three layers.
    let mut replies = join_all(paths.iter().map(|path| wire::get(&way, path, &[]))).await;
    for reply in &mut replies {
        reply.next().await.unwrap().unwrap();
    }
    wait::until("layers are started", async || metric(stage.agent(0), "darter_layers_ahead_total").await == 3).await;
    let ahead: Vec<_> = blobs[4..7].iter().map(|blob| blob.digest()).collect();
    wait::until("bytes of them come", async || {
        let stats = stage.registry.stats();
        ahead.iter().any(|digest| stats.blobs[digest].body_bytes > 256 * KIB)
    })
    .await;
    drop(replies);
    wait::until("all pulls have ended", async || stage.sum("darter_active_tasks").await == 0).await;
    wait::within(COUNTED_MAX, "what nobody reads is counted", async || {
        (metric(stage.agent(0), "darter_unread_bytes_total").await >= 256 * KIB).then_some(())
    })
    .await;
    let stats = stage.registry.stats();
    assert!(ahead.iter().all(|digest| stats.blobs[digest].body_bytes < MIB), "they were not fetched to their end");
    stage.stop().await;
}
