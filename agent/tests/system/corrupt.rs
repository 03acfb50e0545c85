//! Wrong bytes, from the registry and from a disk: no client ever has them as a complete blob (D7).

use std::path::Path;

use darter_agent::demo::image::Blob;
use futures_util::future::join_all;
use http::StatusCode;

use crate::stage::{MIB, Plan, Stage, metric, pieces, published};
use crate::wait;
use crate::wire;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lying_registry_is_never_believed() {
    let stage = Stage::start(Plan { agents: 3, layers: vec![MIB, 8 * MIB + 5], ..Plan::default() }).await;
    let blob = stage.image.layers()[1].clone();
    stage.registry.corrupt(blob.digest());

    // Each agent by itself, then all at once: what one of them got wrong must not come in through the others.
    for agents in [vec![0], vec![1], vec![0, 1, 2]] {
        let path = stage.blob_path(&blob.digest());
        let gets = agents.iter().map(|&at| {
            let (way, path) = (stage.through(at), path.clone());
            async move { (at, wire::get(&way, &path, &[]).await.end().await) }
        });
        for (at, ended) in join_all(gets).await {
            let name = stage.agent(at).name();
            assert!(ended.cut, "{name} gave {} of {} bytes as a whole", ended.bytes.len(), blob.length());
            let withheld = pieces(stage.geometry(&blob)).pop().unwrap();
            assert!(ended.bytes.len() as u64 <= withheld.start, "{name} gave the last piece away");
        }
        for agent in stage.agents() {
            assert!(!published(agent, &blob.digest()).exists(), "{} published it", agent.name());
        }
    }
    assert!(stage.sum("darter_poisoned_blobs_total").await >= 3);
    let pulled = stage.try_pull(2).await;
    assert!(pulled.is_err(), "{pulled:?}");

    stage.registry.heal(&blob.digest());
    wait::until("a pull succeeds again", async || stage.try_pull(0).await.is_ok()).await;
    stage.pull_all().await;
    for agent in stage.agents() {
        let path = published(agent, &blob.digest());
        wait::until("the blob is published", async || path.exists()).await;
        assert_eq!(std::fs::read(&path).unwrap(), blob.read(0..blob.length()), "{}", agent.name());
    }
    stage.stop().await;
}

/// A blob of one piece is withheld whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_wrong_blob_of_one_piece_leaves() {
    let stage = Stage::start(Plan { agents: 2, layers: vec![100_000], ..Plan::default() }).await;
    let blob = &stage.image.layers()[0];
    assert_eq!(stage.geometry(blob).pieces(), 1);
    stage.registry.corrupt(blob.digest());
    let ways = [stage.through(0), stage.through(1)];
    let path = stage.blob_path(&blob.digest());
    for reply in join_all(ways.iter().map(|way| wire::get(way, &path, &[]))).await {
        let status = reply.status;
        let ended = reply.end().await;
        let nothing = status == StatusCode::BAD_GATEWAY || ended.cut && ended.bytes.is_empty();
        assert!(nothing, "{status}, {} bytes, cut: {}", ended.bytes.len(), ended.cut);
    }
    stage.registry.heal(&blob.digest());
    wait::until("a pull succeeds again", async || stage.try_pull(0).await.is_ok()).await;
    stage.pull_all().await;
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_cache_harms_nobody() {
    rotten_cache(1).await;
}

/// The home counts itself among the holders, until it is told otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_cache_of_the_home_harms_nobody() {
    rotten_cache(0).await;
}

/// Agent 0 has the blob, and a flipped bit in it.
async fn rotten_cache(home: usize) {
    let mut stage = Stage::start(Plan { agents: 4, layers: vec![2 * MIB, 12 * MIB], ..Plan::default() }).await;
    stage.make_home(home).await;
    let blob = stage.image.layers()[1].clone();
    stage.pull([0]).await;
    let path = published(stage.agent(0), &blob.digest());
    wait::until("the blob is published", async || path.exists()).await;
    let rotten = blob.length() / 2;
    flip(&path, rotten);

    // The others still get the right bytes; the rotten piece comes from the registry, and not much else.
    stage.pull(1..4).await;
    let again = stage.settled().await.blob_bytes() - stage.image.blob_bytes();
    let piece = u64::from(stage.geometry(&blob).piece_size().bytes());
    assert!((piece..=blob.length() / 4).contains(&again), "{again} bytes were sent again\n{}", stage.logs());
    assert_eq!(stage.sum("darter_poisoned_blobs_total").await, 0);
    for at in 1..4 {
        assert!(metric(stage.agent(at), "darter_peer_received_bytes_total").await > 0);
    }

    // And so does the client of the agent whose disk it is: perhaps not at once, but nothing wrong as a whole.
    let whole = blob.read(0..blob.length());
    wait::until("the agent with the rotten disk delivers the right bytes", async || {
        let ended = wire::get(&stage.through(0), &stage.blob_path(&blob.digest()), &[]).await.end().await;
        assert!(ended.cut || ended.bytes == whole, "wrong bytes as a complete blob");
        !ended.cut
    })
    .await;
    stage.stop().await;
}

/// Flips one bit of a file.
fn flip(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.sync_all().unwrap();
}

/// So that the tests above mean what they say.
#[test]
fn a_flipped_bit_is_seen() {
    let blob = Blob::layer(1, 1000);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("blob");
    std::fs::write(&path, blob.read(0..1000)).unwrap();
    flip(&path, 500);
    assert_ne!(std::fs::read(&path).unwrap(), blob.read(0..1000));
}
