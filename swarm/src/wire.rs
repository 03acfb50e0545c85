//! What peers say to each other on a stream. Each stream begins with [`Open`]; what follows depends on it.
//!
//! A request names a digest and pieces, or a tag by its hash, nothing else: no URL, no path, no address (S2, S11). Encoded
//! with postcard; variants are only ever added at the end. docs/wire.md describes the bytes.

use std::time::Duration;

use darter_tracker::{
    Added, Bitmap, ClientErrorRequest, Geometry, NodeId, PieceIndex, PieceProof, PieceRange, PullPieceRequest,
    PullPieceResponse, RegisterRequest, RegisterResponse, ReportPieceRequest, ReportPieceResponse, ServiceDownRequest,
    TaskId, TrackerError,
};
use serde::{Deserialize, Serialize};

use crate::tags::{Accepts, TagAnswer, TagId, TagNews};

/// The first frame of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Open {
    /// One tracker call; the answer is one [`Reply`] and the end of the stream.
    Call(Call),
    /// A session about a task; both sides send [`SessionFrame`]s until one ends it.
    Session(Offer),
    /// One piece, on a turn that was offered; the answer is a [`PieceReply`] other than `Queued`, which may precede it, followed
    /// by the bytes if it is `Piece`.
    Piece {
        /// The task.
        task: TaskId,
        /// The piece.
        piece: PieceIndex,
        /// The turn, from [`TurnReply::Turn`].
        ticket: u64,
    },
    /// A turn to take a piece; the answer is a [`TurnReply`] other than `Queued`, which may precede it. The end of the stream
    /// leaves the turn to others; whoever uses it keeps the stream open until the piece has come, or asks for the next turn on it
    /// by a [`LineFrame`] as soon as he has said which piece he takes.
    Ask {
        /// The task.
        task: TaskId,
        /// How many pieces of it the asker holds: who holds the fewest is served first.
        holds: u32,
    },
}

/// A tracker call to the home of a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// See [`darter_tracker::Tracker::register`].
    Register(RegisterRequest),
    /// See [`darter_tracker::Tracker::pull_piece`].
    PullPiece(PullPieceRequest),
    /// See [`darter_tracker::Tracker::report_piece`].
    ReportPiece(ReportPieceRequest),
    /// See [`darter_tracker::Tracker::service_down`].
    ServiceDown(ServiceDownRequest),
    /// See [`darter_tracker::Tracker::report_error`].
    ReportError(ClientErrorRequest),
    /// What another home of the task knows, which tells what it knows itself.
    Compare(HomeNews),
    /// What a tag means, to one of its homes.
    AskTag {
        /// The tag.
        tag: TagId,
        /// What the asker's client accepts.
        accepts: Accepts,
        /// An answer that is as old or older is of no use.
        fresh: Duration,
    },
    /// What the caller has learnt of a tag.
    TellTag {
        /// The tag.
        tag: TagId,
        /// What.
        news: TagNews,
    },
}

/// The home's answer to a [`Call`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To `Register`.
    Registered(RegisterResponse),
    /// To `PullPiece`.
    Pulled(PullPieceResponse),
    /// To `ReportPiece`.
    Reported(ReportPieceResponse),
    /// To `ServiceDown`, `ReportError` and `TellTag`.
    Done,
    /// To any: it failed.
    Failed(TrackerError),
    /// To `Compare`; nothing where nobody has come to the answering member with this task.
    Compared(Option<HomeNews>),
    /// To `AskTag`.
    Tag(TagAnswer),
}

/// What one home of a task tells another, where members disagree about who is home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeNews {
    /// The task.
    pub task: TaskId,
    /// How the sender cuts it.
    pub geometry: Geometry,
    /// What one or the other of its members holds.
    pub held: Bitmap,
    /// What they are fetching from the registry.
    pub lent: Vec<PieceRange>,
    /// Some of its members, others each time.
    pub members: Vec<NodeId>,
    /// Other homes that have told the sender, and what the members of each hold or fetch: the receiver may know none of them.
    pub others: Vec<(NodeId, Bitmap)>,
}

/// What an asker says on the stream of [`Open::Ask`] after [`TurnReply::Turn`]. A stream for each turn would take more packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LineFrame {
    /// One more turn, answered like the first. The turn before is used: the asker has said which piece it takes, or will at once.
    Again {
        /// How many pieces of the task it holds by now.
        holds: u32,
    },
    /// The turn is left to others.
    Pass,
}

/// What one side of a session holds when it begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The task.
    pub task: TaskId,
    /// How the sender cuts it; `None` if it does not know the task.
    pub geometry: Option<Geometry>,
    /// What the sender holds; `None` is nothing.
    pub have: Option<Bitmap>,
    /// The sender's home of the task, if it has registered with one: two homes of one task are found out by neighbours.
    pub home: Option<NodeId>,
}

/// What either side of a session says after the opening one's offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionFrame {
    /// The other side's offer, its first frame.
    Offer(Offer),
    /// The sender holds these pieces as well.
    Have(Vec<PieceRange>),
    /// The sender needs no more news; it still gives what it offered.
    Finished,
    /// The sender has another home by now.
    Home(NodeId),
}

/// The answer to [`Open::Ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TurnReply {
    /// It is the asker's turn: it may take one piece, if it says at once which.
    Turn {
        /// Names the turn in [`Open::Piece`].
        ticket: u64,
        /// What the sender would rather give than other pieces that are as rare: nobody else has it, and others were named others.
        rather: Added<PieceIndex>,
    },
    /// Too many others wait.
    Busy,
    /// The sender has nothing of the task.
    NotHeld,
    /// It is not the asker's turn yet. Said now and then until another answer follows, so that waiting in line is not taken
    /// for silence.
    Queued,
}

/// The answer to a piece request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PieceReply {
    /// The piece follows: exactly `length` bytes.
    Piece {
        /// Who vouches for it.
        proof: PieceProof,
        /// Bytes that follow.
        length: u32,
    },
    /// The turn is over, or was not the asker's; ask again, or somebody else.
    Busy,
    /// The sender does not have the piece.
    NotHeld,
    /// It is not the asker's turn yet. Said now and then until another answer follows, so that waiting in line is not taken
    /// for silence.
    Queued,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/wire.md has these bytes; a member of an earlier version finds a variant that it does not know.
    #[test]
    fn what_was_added_stands_at_the_end() {
        let (tag, accepts) = (TagId::new("https://r:443", "a", "b"), Accepts::new(["c/d"]));
        let bytes = |call: Call| {
            let bytes = postcard::to_stdvec(&call).unwrap();
            assert_eq!(postcard::from_bytes::<Call>(&bytes), Ok(call));
            bytes
        };
        let ask = bytes(Call::AskTag { tag, accepts, fresh: Duration::new(5, 7) });
        assert_eq!(ask, [&[6], &tag.as_bytes()[..], accepts.as_bytes(), &[5, 7]].concat());
        let forget = bytes(Call::TellTag { tag, news: TagNews::Forget });
        assert_eq!(forget, [&[7], &tag.as_bytes()[..], &[2]].concat());
        assert_eq!(postcard::to_stdvec(&Reply::Tag(TagAnswer::Ask)), Ok(vec![6, 1]));
        let turn = |piece| postcard::to_stdvec(&TurnReply::Turn { ticket: 200, rather: Added(piece) });
        assert_eq!((turn(None), turn(Some(PieceIndex(3)))), (Ok(vec![0, 200, 1]), Ok(vec![0, 200, 1, 3])));
        assert!(postcard::from_bytes::<Call>(&[&[8], &ask[1..]].concat()).is_err());
    }
}
