//! What can happen.

use std::rc::Rc;

use darter_swarm::task::RunId;
use darter_swarm::upload::Ticket;
use darter_swarm::wire::HomeNews;
use darter_tracker::{
    Bitmap, ClientErrorRequest, ErrorKind, LeaseId, NodeId, PieceIndex, PieceRange, PullPieceRequest,
    PullPieceResponse, RegisterRequest, RegisterResponse, ReportPieceRequest, ReportPieceResponse, TrackerError,
};

use super::agenda::Nanos;
use super::links::FlowId;

/// The number of a node.
pub type NodeNumber = u32;

/// The number of a layer.
pub type Layer = u16;

/// Something that happens. Where a node is named first, it happens to that node.
#[derive(Debug)]
pub enum Event {
    /// A client asks for the image.
    Join(NodeNumber),
    /// What a downloader wanted to be woken for.
    Wake(NodeNumber, Layer, Nanos),
    /// It is time to look who is alive.
    Pulse(NodeNumber),
    /// A call has come to a home.
    Called(NodeNumber, Box<Called>),
    /// The home's answer has come.
    Answered(NodeNumber, Box<Answered>),
    /// No answer has come.
    CallFailed(NodeNumber, Layer, NodeNumber, u64),
    /// Another home has told what it knows.
    Compared(NodeNumber, NodeNumber, Box<HomeNews>),
    /// It has told so in answer.
    ComparedBack(NodeNumber, NodeNumber, Box<HomeNews>),
    /// Another node begins a session.
    Met(NodeNumber, Box<Meeting>),
    /// The other node's offer has come, if it knows the task.
    MetBack(NodeNumber, Layer, NodeNumber, Option<Box<Meeting>>, u64),
    /// The other node cannot be reached.
    MeetingFailed(NodeNumber, Layer, NodeNumber, u64),
    /// The connection with another node is dead.
    Parted(NodeNumber, NodeNumber),
    /// What a node holds more has come to neighbours.
    Have(NodeNumber, Layer, Rc<[NodeNumber]>, Rc<[PieceRange]>),
    /// The same, to one of them, later.
    HaveLate(NodeNumber, NodeNumber, Layer, Rc<[PieceRange]>),
    /// A neighbour has another home.
    HomeOf(NodeNumber, NodeNumber, Layer, NodeId),
    /// Another node, that holds so many pieces, asks for a turn.
    Asked(NodeNumber, NodeNumber, Layer, u32),
    /// Another node offers the turn that it was asked for.
    Offered(NodeNumber, NodeNumber, Layer, Ticket, Option<PieceIndex>),
    /// An offered turn has lapsed, if nothing was said to it.
    OfferLapsed(NodeNumber, Ticket),
    /// It offers none; `None` is busy.
    NotOffered(NodeNumber, NodeNumber, Layer, Option<ErrorKind>),
    /// Another node takes the turn that it was offered, for this piece.
    Taken(NodeNumber, NodeNumber, Layer, Ticket, PieceIndex),
    /// Another node wants no turn any more.
    Declined(NodeNumber, NodeNumber, Layer),
    /// Another node does not want a piece any more.
    Unasked(NodeNumber, NodeNumber, Layer, PieceIndex),
    /// Another node does not give a piece; `None` is busy.
    Denied(NodeNumber, NodeNumber, Layer, PieceIndex, Option<ErrorKind>),
    /// A chunk has left a place.
    ChunkLeft(NodeNumber),
    /// A chunk has arrived.
    ChunkArrived(NodeNumber, FlowId, u64),
    /// The receiver has acknowledged all of a piece.
    Acknowledged(NodeNumber, Ticket),
    /// The registry begins to answer.
    RegistryAnswers(NodeNumber, Layer, RunId),
    /// Gossip tells that a member is down.
    Gone(NodeNumber, NodeNumber),
    /// The node dies.
    Kill(NodeNumber),
    /// The node stands still, or goes on.
    Freeze(NodeNumber, bool),
}

/// A call.
#[derive(Debug)]
pub struct Called {
    /// Who calls.
    pub from: NodeNumber,
    /// About which layer.
    pub layer: Layer,
    /// Names the call.
    pub key: u64,
    /// What is asked.
    pub call: Call,
}

/// What is asked of a home.
#[derive(Debug)]
pub enum Call {
    /// Register.
    Register(RegisterRequest),
    /// PullPiece.
    Pull(PullPieceRequest),
    /// ReportPiece.
    Report(ReportPieceRequest),
    /// ReportError.
    Blame(ClientErrorRequest),
}

/// An answer.
#[derive(Debug)]
pub struct Answered {
    /// Who answers.
    pub home: NodeNumber,
    /// About which layer.
    pub layer: Layer,
    /// Which call.
    pub key: u64,
    /// What is answered.
    pub answer: Answer,
}

/// What a home answers.
#[derive(Debug)]
pub enum Answer {
    /// To Register.
    Register(Result<RegisterResponse, TrackerError>),
    /// To PullPiece.
    Pull(Result<PullPieceResponse, TrackerError>),
    /// To ReportPiece that named this lease.
    Report(Option<LeaseId>, Result<ReportPieceResponse, TrackerError>),
}

/// What one side of a session says first.
#[derive(Debug)]
pub struct Meeting {
    /// Who says it.
    pub from: NodeNumber,
    /// About which layer.
    pub layer: Layer,
    /// What it holds.
    pub have: Bitmap,
    /// Its home.
    pub home: Option<NodeId>,
    /// Names the attempt.
    pub key: u64,
}

impl Event {
    /// The node that it happens to; `None` for what happens to links and neighbours.
    #[must_use]
    pub fn node(&self) -> Option<NodeNumber> {
        match self {
            Self::Join(node)
            | Self::Wake(node, ..)
            | Self::Pulse(node)
            | Self::Called(node, _)
            | Self::Answered(node, _)
            | Self::CallFailed(node, ..)
            | Self::Compared(node, ..)
            | Self::ComparedBack(node, ..)
            | Self::Met(node, _)
            | Self::MetBack(node, ..)
            | Self::MeetingFailed(node, ..)
            | Self::Parted(node, _)
            | Self::HaveLate(node, ..)
            | Self::HomeOf(node, ..)
            | Self::Asked(node, ..)
            | Self::Offered(node, ..)
            | Self::OfferLapsed(node, ..)
            | Self::NotOffered(node, ..)
            | Self::Taken(node, ..)
            | Self::Declined(node, ..)
            | Self::Unasked(node, ..)
            | Self::Denied(node, ..)
            | Self::ChunkArrived(node, ..)
            | Self::Acknowledged(node, _)
            | Self::RegistryAnswers(node, ..)
            | Self::Gone(node, _) => Some(*node),
            Self::Have(..) | Self::ChunkLeft(_) | Self::Kill(_) | Self::Freeze(..) => None,
        }
    }
}
