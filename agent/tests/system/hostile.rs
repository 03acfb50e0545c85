//! A member that has the secret, says that it has a blob, and gives wrong bytes or none: clients get the right ones, and
//! it is asked by nobody before long (rows 6, 27 and 28).

use std::time::Duration;

use darter_agent::demo::image::Blob;
use darter_swarm::task::neighbour::PIPELINE;
use darter_tracker::TaskId;
use futures_util::future::join_all;
use tokio::time::Instant;

use crate::member::{Liar, Manner, Member};
use crate::stage::{KIB, MIB, Plan, Stage, log, metric};
use crate::wait;
use crate::wire;

/// So small that whoever gets the blob asks everybody who has it.
const PIECE_BYTES: u64 = 128 * KIB;

/// Pieces that may leave the registry again because the machine is busy: nothing else makes it necessary.
const AGAIN_MAX: u64 = 2;

/// How long a peer that broke off is left alone at first; doubled each time (`swarm/src/task/neighbour.rs`).
const PAUSE: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_wrong_bytes_is_asked_no_more() {
    let asked_max = |_| PIPELINE;
    lied_to(Manner::WrongBytes, asked_max).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_breaks_off_is_asked_seldom_and_by_others_not_at_all() {
    let asked_max = |pulled: Duration| {
        let pauses = (0..).scan(Duration::ZERO, |sum, at| {
            *sum += PAUSE * 2u32.pow(at);
            Some(*sum)
        });
        PIPELINE * (1 + pauses.take_while(|sum| *sum <= pulled).count())
    };
    lied_to(Manner::BreaksOff, asked_max).await;
}

/// Two agents are sent to a liar, and to an honest holder. How often each of them may ask the liar depends on how long the
/// pull took.
async fn lied_to(manner: Manner, asked_max: impl Fn(Duration) -> usize) {
    let plan = Plan { agents: 4, layers: vec![24 * MIB], piece_bytes: Some(PIECE_BYTES), ..Plan::default() };
    let mut stage = Stage::start(plan).await;
    let (home, victims, late) = (0, [1, 2], 3);
    stage.make_home(home).await;
    let blob = stage.image.layers()[0].clone();
    let (task, geometry) = (TaskId::blob(blob.digest()), stage.geometry(&blob));
    get(&stage, home, &blob).await;

    let liar = Member::join(&stage, 0).await;
    let witness = Member::join(&stage, 1).await;
    liar.register(task, geometry, true).await;
    let (liar, _serving) = Liar::start(liar, manner, blob.clone(), geometry);
    wait::until("the home sends others to the liar", async || witness.is_sent_to(liar.member.id, task, geometry).await)
        .await;

    let begun = Instant::now();
    join_all(victims.map(|at| get(&stage, at, &blob))).await;
    let pulled = begun.elapsed();
    for at in victims {
        let asked = liar.asked_by(stage.agent(at).addresses().peer);
        assert!((1..=asked_max(pulled)).contains(&asked), "agent {at} asked it {asked} times in {pulled:?}");
        if manner == Manner::WrongBytes {
            assert!(metric(stage.agent(at), "darter_peer_wrong_bytes_total").await >= PIECE_BYTES);
            assert!(log(stage.agent(at)).contains("a peer sent a wrong piece"), "{}", stage.logs());
        }
    }
    // What it did not give came from others.
    let again = stage.registry.stats().blobs[&blob.digest()].repeated_bytes();
    assert!(again <= AGAIN_MAX * PIECE_BYTES, "{again} bytes again\n{}", stage.logs());
    assert_eq!(stage.sum("darter_poisoned_blobs_total").await, 0);

    // Both have told the home, so whoever comes now is not sent there, nor introduced to it.
    wait::until("the home sends nobody to the liar", async || {
        !witness.is_sent_to(liar.member.id, task, geometry).await
    })
    .await;
    get(&stage, late, &blob).await;
    assert_eq!(liar.asked_by(stage.agent(late).addresses().peer), 0, "the latecomer asked it");
    witness.leave().await;
    stage.stop().await;
}

/// A member can vouch for wrong bytes, and then only the digest of the whole shows it. The client never has them as the
/// whole blob, the agent fetches all of it from the registry, finds out who it was, and tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_vouches_for_wrong_bytes_is_found_out() {
    let plan = Plan { agents: 3, layers: vec![12 * MIB], piece_bytes: Some(PIECE_BYTES), ..Plan::default() };
    let mut stage = Stage::start(plan).await;
    let (home, victim, late) = (0, 1, 2);
    stage.make_home(home).await;
    let blob = stage.image.layers()[0].clone();
    let (task, geometry) = (TaskId::blob(blob.digest()), stage.geometry(&blob));
    get(&stage, home, &blob).await;

    let liar = Member::join(&stage, 0).await;
    let witness = Member::join(&stage, 1).await;
    liar.register(task, geometry, true).await;
    let (liar, _serving) = Liar::start(liar, Manner::SignsWrongBytes, blob.clone(), geometry);

    let path = stage.blob_path(&blob.digest());
    let ended = wire::get(&stage.through(victim), &path, &[]).await.end().await;
    assert!(liar.asked_by(stage.agent(victim).addresses().peer) > 0, "it was lied to");
    assert!(ended.cut, "{} bytes as the whole blob", ended.bytes.len());
    assert!((ended.bytes.len() as u64) < blob.length());
    assert_eq!(metric(stage.agent(victim), "darter_poisoned_blobs_total").await, 1);

    get(&stage, victim, &blob).await;
    wait::until("the home sends nobody to the liar", async || {
        !witness.is_sent_to(liar.member.id, task, geometry).await
    })
    .await;
    get(&stage, late, &blob).await;
    assert_eq!(liar.asked_by(stage.agent(late).addresses().peer), 0, "the latecomer asked it");
    assert_eq!(metric(stage.agent(late), "darter_poisoned_blobs_total").await, 0);
    witness.leave().await;
    stage.stop().await;
}

/// Gets a blob through an agent; it must be right.
async fn get(stage: &Stage, at: usize, blob: &Blob) {
    let got = wire::get(&stage.through(at), &stage.blob_path(&blob.digest()), &[]).await.whole().await;
    assert!(got == blob.read(0..blob.length()), "agent {at} gave wrong bytes");
}
