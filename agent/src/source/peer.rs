//! Pieces and sessions from another member.

use darter_swarm::identity::{ClusterKeys, verify_piece};
use darter_swarm::wire::{Offer, Open, PieceReply, SessionFrame, TurnReply};
use darter_tracker::{ErrorKind, Geometry, PieceIndex, PieceProof, TaskId};

use crate::net::{NetError, Peer, Receiver, Sender, Stream, Transport, Way};
use crate::store::Hashed;

/// Why a peer gave no piece.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It serves too many others at present; it is not to blame.
    #[error("the peer is busy")]
    Busy,
    /// It wants no session: it has enough of them, or begins one itself.
    #[error("the peer wants no session")]
    Declined,
    /// It does not have the piece that it offered.
    #[error("the peer does not have the piece")]
    NotHeld,
    /// What it sent is not what was asked for, or nobody vouches for it. Nothing was stored.
    #[error("the peer sent something wrong: {0}")]
    Wrong(&'static str),
    /// It could not be reached or broke off.
    #[error("the peer cannot be reached")]
    Unreachable(#[from] NetError),
}

impl PeerError {
    /// How it is reported to the home; `None` if the peer is not to blame.
    #[must_use]
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            // Where this node has no connection to spare, nobody else is to blame.
            Self::Busy | Self::Declined | Self::Unreachable(NetError::Full) => None,
            Self::NotHeld => Some(ErrorKind::NotFound),
            Self::Wrong(_) => Some(ErrorKind::Mismatch),
            Self::Unreachable(_) => Some(ErrorKind::Unreachable),
        }
    }
}

/// A turn that a peer has offered. It is given up when dropped, and to be kept until the piece that is taken on it has come.
#[derive(Debug)]
pub struct Turn {
    ticket: u64,
    /// What the peer would rather give.
    pub rather: Option<PieceIndex>,
    #[expect(dead_code, reason = "held")]
    stream: Stream,
}

/// Waits for a turn at `peer`, as one who holds so many pieces of `task`.
///
/// # Errors
/// See [`PeerError`]; [`PeerError::NotHeld`] if it has nothing of the task.
pub async fn turn(transport: &Transport, peer: Peer, task: TaskId, holds: u32) -> Result<Turn, PeerError> {
    let mut stream = transport.open(peer).await?;
    stream.send(&Open::Ask { task, holds }).await?;
    loop {
        match stream.receive::<TurnReply>().await? {
            Some(TurnReply::Turn { ticket, rather }) => return Ok(Turn { ticket, rather: rather.0, stream }),
            Some(TurnReply::Busy) => return Err(PeerError::Busy),
            Some(TurnReply::NotHeld) => return Err(PeerError::NotHeld),
            // However often: the core judges silence, and nothing is lost by waiting.
            Some(TurnReply::Queued) => {}
            None => return Err(PeerError::Wrong("no answer")),
        }
    }
}

/// Takes one piece from `peer` on `turn` and checks it: length, BLAKE3, and a member's signature under that.
///
/// # Errors
/// See [`PeerError`]; bytes that failed a check are dropped here.
pub async fn piece(
    transport: &Transport,
    keys: &ClusterKeys,
    peer: Peer,
    turn: Turn,
    task: TaskId,
    geometry: Geometry,
    piece: PieceIndex,
) -> Result<(PieceProof, Hashed, Way), PeerError> {
    let mut stream = transport.open_bulk(peer).await?;
    let way = stream.way();
    stream.send(&Open::Piece { task, piece, ticket: turn.ticket }).await?;
    stream.finish();
    let expected = geometry.piece_length(piece);
    let proof = loop {
        match stream.receive::<PieceReply>().await? {
            Some(PieceReply::Piece { proof, length }) if length == expected => break proof,
            Some(PieceReply::Piece { .. }) => return Err(PeerError::Wrong("another length")),
            Some(PieceReply::Busy) => return Err(PeerError::Busy),
            Some(PieceReply::NotHeld) => return Err(PeerError::NotHeld),
            // However often: the core's deadline for the piece ends it.
            Some(PieceReply::Queued) => {}
            None => return Err(PeerError::Wrong("no answer")),
        }
    };
    verify_piece(keys, &task, &geometry, piece, &proof).map_err(|_| PeerError::Wrong("nobody vouches for it"))?;
    let bytes = stream.receive_bytes(expected as usize).await?;
    // Lets the other side know at once that all of it has come.
    drop((stream, turn));
    // The store compares the digests again, in the one place that may let bytes in; here it tells who is to blame.
    let bytes = Hashed::of(bytes).await.map_err(|_| NetError::Closed)?;
    if bytes.digest() != proof.digest {
        return Err(PeerError::Wrong("the bytes do not match their digest"));
    }
    Ok((proof, bytes, way))
}

/// Begins a session about a task: tells what is held here and learns what is held there.
///
/// # Errors
/// [`PeerError::Declined`], [`PeerError::Unreachable`], or [`PeerError::Wrong`] if the peer talks about something else.
pub async fn session(transport: &Transport, peer: Peer, offer: Offer) -> Result<(Sender, Receiver, Offer), PeerError> {
    let task = offer.task;
    let (mut sender, mut receiver) = transport.open(peer).await?.split();
    sender.send(&Open::Session(offer)).await?;
    match receiver.receive::<SessionFrame>().await {
        Ok(Some(SessionFrame::Offer(theirs))) if theirs.task == task => Ok((sender, receiver, theirs)),
        Ok(Some(_)) => Err(PeerError::Wrong("not an offer for this task")),
        Ok(None) | Err(NetError::Abandoned) => Err(PeerError::Declined),
        Err(error) => Err(error.into()),
    }
}
