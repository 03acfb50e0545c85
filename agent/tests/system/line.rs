//! Turns at one peer are asked for one after the other on one stream.

use darter_agent::demo::image::Blob;
use darter_agent::net::{Peer, Stream};
use darter_swarm::upload::{ACTIVE, AHEAD};
use darter_swarm::wire::{LineFrame, Open, PieceReply, TurnReply};
use darter_tracker::{PieceIndex, TaskId};

use crate::member::Member;
use crate::stage::{MIB, Plan, Stage};
use crate::{wait, wire};

const PIECE_BYTES: u64 = MIB;

async fn reply(line: &mut Stream) -> Option<TurnReply> {
    tokio::time::timeout(wait::PATIENCE, line.receive()).await.expect("an answer").unwrap()
}

async fn ticket(line: &mut Stream) -> u64 {
    loop {
        match reply(line).await {
            Some(TurnReply::Turn { ticket, .. }) => return ticket,
            Some(TurnReply::Queued) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// An agent that has a blob, and a member that takes it.
struct Given {
    stage: Stage,
    member: Member,
    giver: Peer,
    blob: Blob,
}

impl Given {
    async fn start() -> Self {
        let plan = Plan { agents: 2, layers: vec![5 * MIB], piece_bytes: Some(PIECE_BYTES), ..Plan::default() };
        let stage = Stage::start(plan).await;
        let blob = stage.image.layers()[0].clone();
        wire::get(&stage.through(0), &stage.blob_path(&blob.digest()), &[]).await.whole().await;
        let member = Member::join(&stage, 0).await;
        let giver = member.at(stage.agent(0).addresses().peer);
        Self { stage, member, giver, blob }
    }

    fn task(&self) -> TaskId {
        TaskId::blob(self.blob.digest())
    }

    /// A stream on which a turn was asked for.
    async fn line(&self) -> Stream {
        let mut line = self.member.transport.open(self.giver).await.unwrap();
        line.send(&Open::Ask { task: self.task(), holds: 0 }).await.unwrap();
        line
    }

    async fn end(self) {
        self.member.leave().await;
        self.stage.stop().await;
    }

    /// Whether a piece is given on a turn.
    async fn take(&self, piece: u32, ticket: u64) -> bool {
        let mut stream = self.member.transport.open_bulk(self.giver).await.unwrap();
        stream.send_last(&Open::Piece { task: self.task(), piece: PieceIndex(piece), ticket }).await.unwrap();
        match tokio::time::timeout(wait::PATIENCE, stream.receive::<PieceReply>()).await.expect("an answer").unwrap() {
            Some(PieceReply::Piece { length, .. }) => {
                let bytes = stream.receive_bytes(length as usize).await.unwrap();
                let start = u64::from(piece) * PIECE_BYTES;
                assert!(bytes == self.blob.read(start..start + PIECE_BYTES));
                true
            }
            Some(PieceReply::Busy) => false,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn turns_follow_each_other_on_one_stream() {
    let given = Given::start().await;
    let take = async |piece: u32, ticket: u64| given.take(piece, ticket).await;

    let mut line = given.line().await;
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
    assert_eq!(reply(&mut line).await, None);
    let mut other = given.line().await;
    let left = ticket(&mut other).await;
    drop(other);
    wait::until("the turn is over", async || !take(3, left).await).await;
    given.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_refused_another_turn_keeps_the_one_before() {
    let given = Given::start().await;
    let mut lines = Vec::new();
    for _ in 0..ACTIVE + AHEAD {
        let mut line = given.line().await;
        let offered = ticket(&mut line).await;
        lines.push((line, offered));
    }
    // All turns are offered, so that it waits, and nobody waits twice.
    let mut waits = given.line().await;
    assert_eq!(reply(&mut waits).await, Some(TurnReply::Queued));
    let (line, offered) = &mut lines[0];
    line.send(&LineFrame::Again { holds: 0 }).await.unwrap();
    assert_eq!(reply(line).await, Some(TurnReply::Busy));
    assert_eq!(reply(line).await, None);
    assert!(given.take(0, *offered).await);
    ticket(&mut waits).await;
    given.end().await;
}
