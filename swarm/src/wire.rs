//! What peers say to each other on a stream. Each stream begins with [`Open`]; what follows depends on it.
//!
//! A request names a digest and pieces, nothing else: no URL, no path, no address (S2, S11). Encoded with postcard;
//! variants are only ever added at the end. docs/wire.md describes the bytes.

use darter_tracker::{
    Bitmap, ClientErrorRequest, Geometry, NodeId, PieceIndex, PieceProof, PieceRange, PullPieceRequest,
    PullPieceResponse, RegisterRequest, RegisterResponse, ReportPieceRequest, ReportPieceResponse, ServiceDownRequest,
    TaskId, TrackerError,
};
use serde::{Deserialize, Serialize};

/// The first frame of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Open {
    /// One tracker call; the answer is one [`Reply`] and the end of the stream.
    Call(Call),
    /// A session about a task; both sides send [`SessionFrame`]s until one ends it.
    Session(Offer),
    /// One piece; the answer is a [`PieceReply`] other than `Queued`, which may precede it, followed by the bytes if it is `Piece`.
    Piece {
        /// The task.
        task: TaskId,
        /// The piece.
        piece: PieceIndex,
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
    /// To `ServiceDown` and `ReportError`.
    Done,
    /// To any: it failed.
    Failed(TrackerError),
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
    /// Too many others are being served; ask again, or somebody else.
    Busy,
    /// The sender does not have the piece.
    NotHeld,
    /// It is not the asker's turn yet. Said now and then until another answer follows, so that waiting in line is not taken
    /// for silence.
    Queued,
}
