//! What a downloader asks its shell to do.

use darter_tracker::{
    ClientErrorRequest, NodeId, PieceIndex, PieceRange, PullPieceRequest, RegisterRequest, ReportPieceRequest,
};
use std::time::Duration;

/// Names a client's response that is being streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReaderId(pub u64);

/// Names one ranged response from the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(pub u64);

/// One thing to do. The answer comes back as an event; none is needed where none is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Call Register; answer with `handle_registered` or `handle_home_failed`.
    Register {
        /// Whom to ask.
        home: NodeId,
        /// What to ask.
        request: RegisterRequest,
    },
    /// Call PullPiece; answer with `handle_pulled` or `handle_home_failed`.
    Pull {
        /// Whom to ask.
        home: NodeId,
        /// What to ask.
        request: PullPieceRequest,
    },
    /// Call ReportPiece; answer with `handle_reported`, naming the request's lease, or `handle_home_failed`.
    Report {
        /// Whom to tell.
        home: NodeId,
        /// What to tell.
        request: ReportPieceRequest,
    },
    /// Call ReportError; no answer.
    Blame {
        /// Whom to tell.
        home: NodeId,
        /// What to tell.
        request: ClientErrorRequest,
    },
    /// Begin a session; answer with `handle_neighbour_up` or `handle_unreachable`.
    Connect {
        /// With whom.
        peer: NodeId,
    },
    /// Ask a peer for a turn; answer with `handle_turn` or `handle_turn_failed`.
    Ask {
        /// Whom.
        peer: NodeId,
    },
    /// No turn is wanted from that peer any more, or the one that it has offered is not taken; no answer.
    Decline {
        /// Who was asked.
        peer: NodeId,
    },
    /// Take the turn that a peer has offered, for this piece; answer with `handle_piece` or `handle_piece_failed`.
    Take {
        /// Whose.
        peer: NodeId,
        /// Which.
        piece: PieceIndex,
    },
    /// The piece is not wanted from that peer any more; no answer.
    Cancel {
        /// Who was asked.
        peer: NodeId,
        /// For what.
        piece: PieceIndex,
    },
    /// Tell neighbours that these pieces are held; no answer.
    Have {
        /// Whom.
        peers: Vec<NodeId>,
        /// Which.
        pieces: Vec<PieceRange>,
    },
    /// Open a ranged response for these pieces and read none of it before [`Action::ReadOn`]. Each piece is answered
    /// with `handle_origin_piece`, trouble with `handle_origin_failed`.
    Fetch {
        /// Names the response.
        run: RunId,
        /// What to ask for.
        pieces: PieceRange,
    },
    /// Read one piece more of a response.
    ReadOn {
        /// Which response.
        run: RunId,
    },
    /// Drop a response; no answer.
    Stop {
        /// Which response.
        run: RunId,
    },
    /// Count that the registry is asked in the swarm's place; no answer.
    CountFallback(Fallback),
}

/// Why the registry is asked in the swarm's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// The home does not answer.
    HomeSilent,
    /// Neighbours do not deliver within a reader's budget.
    PeersSlow,
}

/// Why a ranged response ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OriginFailure {
    /// The registry refuses these credentials. It is not asked with them again.
    Refused,
    /// The registry asked to be left alone for a while.
    Busy(Duration),
    /// Anything that may pass: broken off, unreachable, a reply that did not fit.
    Transient,
}
