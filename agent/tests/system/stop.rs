//! Row 114: an agent that is told to stop finishes what it gives to others, hands over what it was to fetch, and ends.

use std::num::NonZeroU64;
use std::time::Duration;

use darter_agent::demo::registry;
use darter_swarm::wire::{Open, PieceReply, TurnReply};
use darter_tracker::{PieceIndex, PullPieceResponse, TaskId};
use rustix::process::{Pid, Signal, kill_process};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::member::Member;
use crate::stage::{MIB, Plan, Stage, log};
use crate::wait;
use crate::wire;

/// How soon the others know that an agent leaves.
const LEFT_WITHIN: Duration = Duration::from_secs(2);

/// How long an agent may take to end.
const ENDED_WITHIN: Duration = Duration::from_secs(10);

/// How soon somebody else may fetch what a leaver was fetching: well before the leaver's last client is cut off, and before
/// the lease of a fetcher lapses that is alive.
const FREE_WITHIN: Duration = Duration::from_secs(2);

/// The largest there is: far more than the windows of a stream hold, so that an unread piece keeps its upload waiting.
const PIECE_BYTES: u64 = 16 * MIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_ends_before_the_agent_does() {
    stopped_while_giving(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_read_keeps_no_agent() {
    stopped_while_giving(false).await;
}

async fn stopped_while_giving(reads: bool) {
    let plan = Plan { agents: 2, layers: vec![20 * MIB], piece_bytes: Some(PIECE_BYTES), ..Plan::default() };
    let mut stage = Stage::start(plan).await;
    let blob = stage.image.layers()[0].clone();
    wire::get(&stage.through(0), &stage.blob_path(&blob.digest()), &[]).await.whole().await;

    let reader = Member::join(&stage, 0).await;
    let giver = reader.at(stage.agent(0).addresses().peer);
    let task = TaskId::blob(blob.digest());
    let mut line = reader.transport.open(giver).await.unwrap();
    line.send(&Open::Ask { task, holds: 0 }).await.unwrap();
    let turn = tokio::time::timeout(wait::PATIENCE, line.receive::<TurnReply>()).await.expect("an answer");
    let Ok(Some(TurnReply::Turn { ticket, .. })) = turn else { panic!("{turn:?}") };
    let mut stream = reader.transport.open(giver).await.unwrap();
    stream.send(&Open::Piece { task, piece: PieceIndex(0), ticket }).await.unwrap();
    stream.finish();
    let reply = tokio::time::timeout(wait::PATIENCE, stream.receive::<PieceReply>()).await.expect("an answer");
    let Ok(Some(PieceReply::Piece { length, .. })) = reply else { panic!("{reply:?}") };
    assert_eq!(u64::from(length), PIECE_BYTES);

    let admin = stage.agent(0).addresses().admin;
    let told = Instant::now();
    terminate(&stage, 0);
    let left = LEFT_WITHIN.saturating_sub(told.elapsed());
    tokio::time::timeout(left, reader.sees_leave(giver.id)).await.expect("the others know that it leaves");
    // Read on only when nothing else keeps the agent: its farewells are over, and its admin port closes with its uploads.
    wait::until("only uploads are waited for", async || TcpStream::connect(admin).await.is_err()).await;
    if reads {
        let piece = tokio::time::timeout(ENDED_WITHIN, stream.receive_bytes(length as usize)).await.expect("an end");
        assert!(piece.unwrap() == blob.read(0..PIECE_BYTES), "the piece has come as a whole");
    }
    // Waiting for it is what makes it no zombie; its own deadline is no shorter than this test's.
    stage.cluster.agent_mut(0).unwrap().stop().await;
    assert!(told.elapsed() < ENDED_WITHIN, "{:?}", told.elapsed());
    assert!(log(stage.agent(0)).trim_end().ends_with("stopped"), "{}", stage.agent(0).log_tail());
    if !reads {
        assert!(stream.receive_bytes(length as usize).await.is_err(), "a piece that was not read was cut off");
    }
    reader.leave().await;
    stage.stop().await;
}

/// The fetcher still has a client, so it lives for some seconds more: nobody waits for its lease to lapse.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leavers_lease_is_free_at_once() {
    // One piece, and a registry that takes a minute for it.
    let rate = NonZeroU64::new(PIECE_BYTES / 60);
    let registry = registry::Options { blob_rate: rate, ..registry::Options::default() };
    let plan =
        Plan { agents: 2, layers: vec![PIECE_BYTES], piece_bytes: Some(PIECE_BYTES), registry, ..Plan::default() };
    let mut stage = Stage::start(plan).await;
    stage.make_home(0).await;
    let blob = stage.image.layers()[0].clone();
    let (task, geometry) = (TaskId::blob(blob.digest()), stage.geometry(&blob));
    assert_eq!(geometry.pieces(), 1);

    let other = Member::join(&stage, 0).await;
    let (way, path) = (stage.through(1), stage.blob_path(&blob.digest()));
    // The answer's head comes only with the first piece, or not at all.
    let client = tokio::spawn(async move { wire::get(&way, &path, &[]).await.status });
    let sent = || stage.registry.stats().blobs.get(&blob.digest()).map_or(0, |blob| blob.body_bytes);
    wait::until("the fetcher fetches", async || sent() > 0).await;
    other.register(task, geometry, false).await;
    let answer = other.pull_piece(task, geometry).await;
    assert!(matches!(answer, PullPieceResponse::Wait { .. }), "while it is being fetched: {answer:?}");

    let told = Instant::now();
    terminate(&stage, 1);
    let lease = wait::within(FREE_WITHIN, "the lease is free", async || match other.pull_piece(task, geometry).await {
        PullPieceResponse::Lease(lease) => Some(lease),
        _ => None,
    })
    .await;
    assert!(lease.pieces.contains(PieceIndex(0)));
    assert!(TcpStream::connect(stage.agent(1).addresses().admin).await.is_ok(), "the leaver was still there");
    stage.cluster.agent_mut(1).unwrap().stop().await;
    assert!(told.elapsed() < ENDED_WITHIN, "{:?}", told.elapsed());
    client.abort();
    other.leave().await;
    stage.stop().await;
}

fn terminate(stage: &Stage, at: usize) {
    let id = stage.agent(at).process_id().unwrap();
    kill_process(Pid::from_raw(id as i32).unwrap(), Signal::TERM).unwrap();
}
