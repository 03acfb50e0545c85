//! Turns at one peer are asked for one after the other on one stream.

use std::time::Duration;

use darter_agent::net::Stream;
use darter_swarm::wire::{LineFrame, Open, PieceReply, TurnReply};
use darter_tracker::{PieceIndex, TaskId};

use crate::member::Member;
use crate::stage::{MIB, Plan, Stage};
use crate::{wait, wire};

const PIECE_BYTES: u64 = MIB;

async fn ticket(line: &mut Stream) -> u64 {
    loop {
        match tokio::time::timeout(wait::PATIENCE, line.receive::<TurnReply>()).await.expect("an answer").unwrap() {
            Some(TurnReply::Turn { ticket, .. }) => return ticket,
            Some(TurnReply::Queued) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn turns_follow_each_other_on_one_stream() {
    let plan = Plan { agents: 2, layers: vec![4 * MIB], piece_bytes: Some(PIECE_BYTES), ..Plan::default() };
    let stage = Stage::start(plan).await;
    let blob = stage.image.layers()[0].clone();
    wire::get(&stage.through(0), &stage.blob_path(&blob.digest()), &[]).await.whole().await;
    let member = Member::join(&stage, 0).await;
    let giver = member.at(stage.agent(0).addresses().peer);
    let task = TaskId::blob(blob.digest());
    let take = async |piece: u32, ticket: u64| {
        let mut stream = member.transport.open_bulk(giver).await.unwrap();
        stream.send_last(&Open::Piece { task, piece: PieceIndex(piece), ticket }).await.unwrap();
        match tokio::time::timeout(wait::PATIENCE, stream.receive::<PieceReply>()).await.expect("an answer").unwrap() {
            Some(PieceReply::Piece { length, .. }) => {
                let bytes = stream.receive_bytes(length as usize).await.unwrap();
                let start = u64::from(piece) * PIECE_BYTES;
                assert!(bytes == blob.read(start..start + PIECE_BYTES));
                true
            }
            Some(PieceReply::Busy) => false,
            other => panic!("{other:?}"),
        }
    };

    let mut line = member.transport.open(giver).await.unwrap();
    line.send(&Open::Ask { task, holds: 0 }).await.unwrap();
    let first = ticket(&mut line).await;
    // The next is asked for before the piece is: what was offered first is good still.
    line.send(&LineFrame::Again { holds: 0 }).await.unwrap();
    let second = ticket(&mut line).await;
    assert!(take(0, first).await && take(1, second).await);
    assert!(!take(2, first).await, "each turn is for one piece");

    line.send(&LineFrame::Again { holds: 2 }).await.unwrap();
    let third = ticket(&mut line).await;
    line.send(&LineFrame::Pass).await.unwrap();
    line.send(&LineFrame::Again { holds: 2 }).await.unwrap();
    let fourth = ticket(&mut line).await;
    assert!(!take(2, third).await, "it was left to others");
    assert!(take(2, fourth).await);

    // A line on which nothing is said for a while is ended by the agent, and one that its asker ends leaves nothing behind.
    let ended = tokio::time::timeout(wait::PATIENCE, line.receive::<TurnReply>()).await.expect("an end");
    assert!(matches!(ended, Ok(None)), "{ended:?}");
    let mut other = member.transport.open(giver).await.unwrap();
    other.send(&Open::Ask { task, holds: 0 }).await.unwrap();
    let left = ticket(&mut other).await;
    drop(other);
    let refused = async {
        while take(3, left).await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(wait::PATIENCE, refused).await.expect("the turn is over");
    member.leave().await;
}
