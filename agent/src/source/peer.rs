//! Pieces and sessions from another member.

use darter_swarm::identity::{ClusterKeys, verify_piece};
use darter_swarm::wire::{LineFrame, Offer, Open, PieceReply, SessionFrame, TurnReply};
use darter_tracker::{ErrorKind, Geometry, PieceIndex, PieceProof, TaskId};
use futures_util::FutureExt as _;

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

/// A stream on which turns of one task are asked for at one peer. Whoever drops it leaves what he has asked for to others.
#[derive(Debug)]
pub struct Line(Stream);

impl Line {
    /// Leaves the turn that was offered to others; gives the line back if that could be said at once.
    #[must_use]
    pub fn pass(mut self) -> Option<Self> {
        let said = self.0.send(&LineFrame::Pass).now_or_never();
        matches!(said, Some(Ok(()))).then_some(self)
    }
}

/// A turn that a peer has offered. It is given up with its line, which is kept until the piece that is taken on it was asked for.
#[derive(Debug)]
pub struct Turn {
    /// Names it when the piece is asked for.
    pub ticket: u64,
    /// What the peer would rather give.
    pub rather: Option<PieceIndex>,
    /// Where the next one can be asked for.
    pub line: Line,
}

/// Waits for a turn at `peer`, as one who holds so many pieces of `task`; on the `line` of an earlier one where that is still good.
///
/// # Errors
/// See [`PeerError`]; [`PeerError::NotHeld`] if it has nothing of the task.
pub async fn turn(
    transport: &Transport,
    peer: Peer,
    line: Option<Line>,
    task: TaskId,
    holds: u32,
) -> Result<Turn, PeerError> {
    if let Some(Line(mut stream)) = line
        && stream.send(&LineFrame::Again { holds }).await.is_ok()
    {
        match answer(stream).await {
            // The peer has ended it, or its connection is gone: nothing is wrong with the peer yet.
            Err(PeerError::Unreachable(_) | PeerError::Wrong(_)) => {}
            outcome => return outcome,
        }
    }
    transport.expect_bulk(peer);
    let mut stream = transport.open(peer).await?;
    stream.send(&Open::Ask { task, holds }).await?;
    answer(stream).await
}

async fn answer(mut stream: Stream) -> Result<Turn, PeerError> {
    loop {
        match stream.receive::<TurnReply>().await? {
            Some(TurnReply::Turn { ticket, rather }) => {
                return Ok(Turn { ticket, rather: rather.0, line: Line(stream) });
            }
            Some(TurnReply::Busy) => return Err(PeerError::Busy),
            Some(TurnReply::NotHeld) => return Err(PeerError::NotHeld),
            // However often: the core judges silence, and nothing is lost by waiting.
            Some(TurnReply::Queued) => {}
            None => return Err(PeerError::Wrong("no answer")),
        }
    }
}

/// Takes one piece from `peer` on the turn that `ticket` names and checks it: length, BLAKE3, and a member's signature under that.
///
/// # Errors
/// See [`PeerError`]; bytes that failed a check are dropped here.
pub async fn piece(
    transport: &Transport,
    keys: &ClusterKeys,
    peer: Peer,
    ticket: u64,
    task: TaskId,
    geometry: Geometry,
    piece: PieceIndex,
) -> Result<(PieceProof, Hashed, Way), PeerError> {
    let mut stream = transport.open_bulk(peer).await?;
    let way = stream.way();
    let open = Open::Piece { task, piece, ticket };
    match way {
        // The end of this direction, said when the piece is here, takes the acknowledgement of it along.
        Way::Quic => stream.send(&open).await?,
        Way::Tcp => stream.send_last(&open).await?,
    }
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
    drop(stream);
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
