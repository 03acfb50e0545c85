//! Carries out what the core asks for: one future per action, each ending in an event for the loop.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use darter_swarm::intake::Pace;
use darter_swarm::task::{OriginFailure, RunId};
use darter_swarm::wire::{Offer, SessionFrame};
use darter_tracker::{Geometry, NodeId, PieceIndex, PieceRange, TaskId};
use tokio::sync::mpsc;

use super::arriving::{Arrival, Arriving};
use super::flight::Context;
use super::place::{Place, Places};
use super::task::Event;
use crate::admin::metrics::PieceOrigin;
use crate::net::{NetError, Peer, Receiver, Sender};
use crate::source::peer::{self, Line, PeerError, Turn};
use crate::source::registry::{BlobOrigin, OriginError, RangeBody};
use crate::store::{Blob, Hashed, StoreError};

/// Bytes that are read from the registry at a time: progress is seen at least this often, and a fetcher holds little.
const READ_BYTES: usize = 64 * 1024;

/// A peer that has not answered an offer by then is not worth waiting for; it may be asked again later.
const SESSION_TIMEOUT: Duration = Duration::from_secs(5);

/// How often progress within a piece is told: well below the time after which a lease lapses.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Waits for a turn at a peer, on the line of the last one if there is one, and takes a place for what it brings if there is one then.
pub(super) async fn ask(
    context: &Context,
    places: &Arc<Places>,
    (task, geometry): (TaskId, Geometry),
    (peer, pace, line): (Peer, Pace, Option<Line>),
    holds: u32,
) -> Event {
    let Some(transport) = &context.transport else {
        return Event::NoTurn(peer.id, Some(darter_tracker::ErrorKind::Unreachable));
    };
    match peer::turn(transport, peer, line, task, holds).await {
        // The largest piece that it can be.
        Ok(turn) => Event::Turn(peer.id, Box::new(turn), places.take(geometry.piece_size().bytes(), pace)),
        Err(error) => Event::NoTurn(peer.id, error.kind()),
    }
}

/// What a piece is taken with: the turn that its sender has offered, and a place for it here.
pub(super) struct Taking {
    pub(super) turn: Turn,
    pub(super) place: Place,
}

/// Gets one piece from a peer into the store, on the turn that `ticket` names.
pub(super) async fn take(
    context: &Context,
    blob: &Arc<Blob>,
    (peer, ticket): (Peer, u64),
    place: Place,
    piece: PieceIndex,
) -> Event {
    let Some(transport) = &context.transport else {
        return Event::PieceFailed(peer.id, piece, Some(darter_tracker::ErrorKind::Unreachable));
    };
    let (task, geometry) = (*blob.task(), *blob.geometry());
    // The place is held until the piece is stored, or lost.
    match peer::piece(transport, &context.keys, peer, ticket, task, geometry, piece).await {
        Ok((proof, bytes, way)) => {
            let length = bytes.length();
            place.came(length as u32);
            // Before they are written: the write that completes the blob ends the pull, and with it this job.
            context.metrics.received(way, length);
            context.tally.peer(peer.addr, length);
            match blob.write(piece, &proof, bytes, PieceOrigin::Peer).await {
                Ok(_) => {
                    tracing::debug!(%task, piece = piece.0, peer = %peer.addr, transport = %way, "downloading piece");
                    Event::Piece(peer.id, piece)
                }
                Err(error) => Event::Store(error),
            }
        }
        Err(error) => {
            if let PeerError::Wrong(what) = error {
                context.metrics.peer_wrong_bytes.inc_by(u64::from(geometry.piece_length(piece)));
                tracing::warn!(%task, piece = piece.0, peer = %peer.addr, what, "a peer sent a wrong piece");
            }
            Event::PieceFailed(peer.id, piece, error.kind())
        }
    }
}

/// A session that this node begins.
pub(super) async fn connect(context: &Context, offer: Offer, peer: Peer) -> Event {
    let Some(transport) = &context.transport else { return Event::Unreachable(peer.id) };
    let session = peer::session(transport, peer, offer);
    match tokio::time::timeout(SESSION_TIMEOUT, session).await {
        Ok(Ok((sender, receiver, offer))) => Event::Connected(Box::new((peer.id, offer, sender, receiver))),
        Ok(Err(PeerError::Declined | PeerError::Unreachable(NetError::Full))) => Event::Declined(peer.id),
        Ok(Err(error)) => {
            tracing::debug!(peer = %peer.addr, %error, "no session");
            Event::Unreachable(peer.id)
        }
        Err(_) => {
            tracing::debug!(peer = %peer.addr, "no session in time");
            Event::Unreachable(peer.id)
        }
    }
}

/// What this node holds of a blob whose home is `home`, where one has it on its list.
pub(crate) fn own_offer(blob: &Blob, home: Option<NodeId>) -> Offer {
    Offer {
        task: *blob.task(),
        geometry: Some(*blob.geometry()),
        have: Some(blob.held()).filter(|have| !have.is_empty()),
        home,
    }
}

/// Sends what a session's queue holds until it is closed; then says that nothing more will come.
pub(super) async fn talk(mut sender: Sender, mut news: mpsc::Receiver<SessionFrame>) {
    while let Some(frame) = news.recv().await {
        if sender.send(&frame).await.is_err() {
            return;
        }
    }
    // The other side may be gone already, which is what this would tell it.
    let _ = sender.send(&SessionFrame::Finished).await;
    sender.finish();
}

/// Turns what a neighbour says into events until it stops. Tells whether it goes on serving.
pub(super) async fn listen(mut receiver: Receiver, peer: NodeId, events: &mpsc::Sender<Event>) -> bool {
    loop {
        match receiver.receive::<SessionFrame>().await {
            Ok(Some(SessionFrame::Have(pieces))) => {
                if events.send(Event::Have(peer, pieces)).await.is_err() {
                    return false;
                }
            }
            Ok(Some(SessionFrame::Home(home))) => {
                if events.send(Event::NeighbourHome(peer, home)).await.is_err() {
                    return false;
                }
            }
            Ok(Some(SessionFrame::Finished)) => return true,
            Ok(Some(SessionFrame::Offer(_)) | None) | Err(_) => return false,
        }
    }
}

/// A run to be fetched from the registry.
pub(super) struct Order {
    /// Where, and with whose headers.
    pub(super) origin: BlobOrigin,
    /// Its name.
    pub(super) run: RunId,
    /// Its pieces.
    pub(super) pieces: PieceRange,
    /// Whether a client waits for one of them.
    pub(super) awaited: bool,
}

/// Fetches a run of pieces from the registry: one ranged response, read a piece per credit.
pub(super) async fn fetch(
    context: &Context,
    blob: &Arc<Blob>,
    order: Order,
    mut credits: mpsc::Receiver<()>,
    arriving: &Arriving,
    events: &mpsc::Sender<Event>,
) -> Event {
    let Order { origin, run, pieces, awaited } = order;
    let geometry = *blob.geometry();
    let last = PieceIndex(pieces.end() - 1);
    let range = geometry.offset(pieces.first)..geometry.offset(last) + u64::from(geometry.piece_length(last));
    // The request goes out with the first credit, so that a braked run does not make the registry wait.
    if credits.recv().await.is_none() {
        return Event::Nothing;
    }
    // A client's next bytes do not stand in line behind what others fetch ahead.
    let fetched = if awaited {
        context.upstream.fetch_urgent(&origin, range, geometry.length()).await
    } else {
        context.upstream.fetch(&origin, range, geometry.length()).await
    };
    let mut body = match fetched {
        Ok(body) => body,
        Err(error) => return failed(run, blob.task(), error),
    };
    for (at, piece) in pieces.iter().enumerate() {
        if at > 0 && credits.recv().await.is_none() {
            return Event::Nothing;
        }
        // Until it is stored, so that nobody who reads it finds a gap.
        let arrival = arriving.begin(piece);
        let bytes = match read_piece(&mut body, &arrival, geometry.piece_length(piece), run, events).await {
            Ok(bytes) => bytes,
            Err(error) => return failed(run, blob.task(), error),
        };
        let bytes = match Hashed::of(bytes).await {
            Ok(bytes) => bytes,
            Err(error) => return Event::Store(error),
        };
        let proof = context.node.sign_piece(blob.task(), &geometry, piece, bytes.digest());
        if let Err(error) = blob.write(piece, &proof, bytes, PieceOrigin::Registry).await {
            return Event::Store(error);
        }
        tracing::debug!(task = %blob.task(), piece = piece.0, peer = "registry", "downloading piece");
        if events.send(Event::OriginPiece(run, piece)).await.is_err() {
            return Event::Nothing;
        }
    }
    Event::Nothing
}

async fn read_piece(
    body: &mut RangeBody,
    arrival: &Arrival<'_>,
    length: u32,
    run: RunId,
    events: &mpsc::Sender<Event>,
) -> Result<Bytes, OriginError> {
    let length = length as usize;
    let mut bytes = BytesMut::with_capacity(length);
    let mut told = tokio::time::Instant::now();
    while bytes.len() < length {
        match body.read(READ_BYTES.min(length - bytes.len())).await? {
            Some(part) => {
                bytes.extend_from_slice(&part);
                arrival.part(&part);
            }
            None => return Err(OriginError::Broken("the body ended early")),
        }
        if told.elapsed() >= PROGRESS_EVERY {
            told = tokio::time::Instant::now();
            // Only news of progress, which the next piece brings as well.
            let _ = events.try_send(Event::OriginProgress(run));
        }
    }
    Ok(bytes.freeze())
}

fn failed(run: RunId, task: &TaskId, error: OriginError) -> Event {
    tracing::warn!(%task, %error, "the registry gave no pieces");
    let failure = match &error {
        OriginError::Refused { .. } => OriginFailure::Refused,
        OriginError::Busy { retry_after, .. } => OriginFailure::Busy(*retry_after),
        _ => OriginFailure::Transient,
    };
    Event::OriginFailed(run, failure, error)
}

/// A write that failed ends the pull.
pub(super) fn store_failed(error: &StoreError) -> super::PullError {
    super::PullError::Store { reason: error.to_string() }
}
