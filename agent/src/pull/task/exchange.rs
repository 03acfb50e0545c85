//! What a pull has to do with peers: sessions, turns, pieces.

use std::time::{Duration, Instant};

use darter_swarm::upload::OFFER_MAX;
use darter_swarm::wire::{Offer, SessionFrame};
use darter_tracker::{ClientErrorRequest, ErrorKind, NodeId, PieceIndex, PieceRange, Tracker as _};
use tokio::sync::mpsc;

use super::{Driver, Event, NEWS_MAX, SESSIONS_MAX, SESSIONS_PER_PEER, SessionId};
use crate::net::{Receiver, Sender};
use crate::pull::execute;
use crate::pull::place::Place;
use crate::source::peer::{Line, Turn};

/// So long a line is kept on which nothing is waited for: most questions come sooner, and its other end keeps it longer.
const LINE_IDLE: Duration = Duration::from_millis(1500);

const _: () = assert!(LINE_IDLE.as_millis() < OFFER_MAX.as_millis());

impl Driver {
    pub(super) fn open_session(
        &mut self,
        peer: NodeId,
        offer: Offer,
        sender: Sender,
        receiver: Receiver,
        inbound: bool,
    ) {
        let now = Instant::now();
        let geometry = *self.flight.blob.geometry();
        let fits = offer.geometry.is_none_or(|theirs| theirs == geometry);
        let known = self.sessions_with(peer);
        if self.alone || !fits || self.sessions.len() >= SESSIONS_MAX || known >= SESSIONS_PER_PEER {
            if known == 0 {
                self.core.handle_neighbour_gone(peer, false, now);
            }
            return;
        }
        let flight = self.flight.clone();
        let (news, queue) = mpsc::channel(NEWS_MAX);
        let first = if inbound {
            SessionFrame::Offer(execute::own_offer(&self.flight.blob, self.told_home))
        } else {
            // What has arrived since the offer was written down was told to the sessions of that moment only.
            SessionFrame::Have(PieceRange::gather(self.core.have().iter()))
        };
        // The queue is new and empty.
        let _ = news.try_send(first);
        let session = SessionId(self.next_session);
        self.next_session += 1;
        self.sessions.insert((peer, session), news);
        self.talks.spawn(execute::talk(sender, queue));
        self.spawn(
            async move { Event::SessionEnded(peer, session, execute::listen(receiver, peer, &flight.events).await) },
        );
        let has = offer.have.unwrap_or_else(|| darter_tracker::Bitmap::new(geometry.pieces()));
        self.core.handle_neighbour_up(peer, has, now);
        if let Some(home) = offer.home {
            self.core.handle_neighbour_home(peer, home);
            self.compare_homes();
        }
    }

    pub(super) fn sessions_with(&self, peer: NodeId) -> usize {
        self.sessions.range((peer, SessionId(0))..=(peer, SessionId(u64::MAX))).count()
    }

    pub(super) fn connect(&mut self, peer: NodeId) {
        let Some(address) = self.context().tracker.peer(peer) else {
            return self.core.handle_unreachable(peer, Instant::now());
        };
        let flights = self.flights.clone();
        let offer = execute::own_offer(&self.flight.blob, self.told_home);
        self.spawn(async move { execute::connect(&flights.context, offer, address).await });
    }

    pub(super) fn ask(&mut self, peer: NodeId) {
        let Some(address) = self.context().tracker.peer(peer) else {
            return self.core.handle_turn_failed(peer, Some(ErrorKind::Unreachable), Instant::now());
        };
        let (flights, holds) = (self.flights.clone(), self.core.have().count());
        let what = (*self.flight.blob.task(), self.core.geometry());
        let whom = (address, self.core.pace(peer), self.lines.remove(&peer).map(|(line, _)| line));
        let job = self.spawn(async move { execute::ask(&flights.context, &flights.places, what, whom, holds).await });
        self.asks.insert(peer, job);
    }

    /// There is room for one more piece: somebody is asked for it, or it is left to the next pull.
    pub(super) fn room(&mut self) {
        if !self.core.handle_room(Instant::now()) {
            self.seat.pass_on();
        }
    }

    /// A neighbour offers a turn: it is used at once, or left to others.
    pub(super) fn turn(&mut self, peer: NodeId, turn: Turn, place: Option<Place>, now: Instant) {
        self.asks.remove(&peer);
        let (room, rather) = (place.is_some(), turn.rather);
        match place {
            Some(place) => self.offer = Some((peer, execute::Taking { turn, place })),
            None => self.pass(peer, turn.line, now),
        }
        self.core.handle_turn(peer, rather, room, now);
        self.perform();
        if let Some((_, execute::Taking { turn, .. })) = self.offer.take() {
            self.pass(peer, turn.line, now);
        }
    }

    pub(super) fn take(&mut self, peer: NodeId, piece: PieceIndex) {
        let Some((_, execute::Taking { turn, place })) = self.offer.take().filter(|(from, _)| *from == peer) else {
            return;
        };
        let now = Instant::now();
        let Some(address) = self.context().tracker.peer(peer) else {
            return self.core.handle_piece_failed(peer, piece, Some(ErrorKind::Unreachable), now);
        };
        let whom = (address, turn.ticket);
        self.lines.insert(peer, (turn.line, now));
        let (flights, flight) = (self.flights.clone(), self.flight.clone());
        let job = self.spawn(async move { execute::take(&flights.context, &flight.blob, whom, place, piece).await });
        self.requests.insert((peer, piece), job);
    }

    /// Leaves a turn to others, and keeps its line for the next.
    fn pass(&mut self, peer: NodeId, line: Line, now: Instant) {
        if let Some(line) = line.pass() {
            self.lines.insert(peer, (line, now));
        }
    }

    /// What was to be taken at `peer` has failed: its turn may be left, and others shall have it. But not those of other pieces.
    pub(super) fn leave_line(&mut self, peer: NodeId) {
        if self.requests.range((peer, PieceIndex(0))..=(peer, PieceIndex(u32::MAX))).next().is_none() {
            self.lines.remove(&peer);
        }
    }

    /// Gives up lines that nobody has used for a while.
    pub(super) fn leave_lines(&mut self) {
        self.lines.retain(|_, (_, since)| since.elapsed() < LINE_IDLE);
    }

    /// Tells the home that a peer has failed.
    pub(super) fn blame(&mut self, home: NodeId, request: ClientErrorRequest) {
        let tracker = self.context().tracker.clone();
        self.spawn(async move {
            let peer = request.peer;
            if let Err(error) = tracker.report_error(home, request).await {
                tracing::debug!(%peer, %error, "the home could not be told of a failure");
            }
            Event::Nothing
        });
    }
}
