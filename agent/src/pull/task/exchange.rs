//! What a pull has to do with peers: sessions, turns, pieces.

use std::time::Instant;

use darter_swarm::wire::{Offer, SessionFrame};
use darter_tracker::{ErrorKind, NodeId, PieceIndex, PieceRange};
use tokio::sync::mpsc;

use super::{Driver, Event, NEWS_MAX, SESSIONS_MAX, SESSIONS_PER_PEER, SessionId};
use crate::net::{Receiver, Sender};
use crate::pull::execute;
use crate::pull::place::Place;
use crate::source::peer::Turn;

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
        let whom = (address, self.core.pace(peer));
        let job = self.spawn(async move { execute::ask(&flights.context, &flights.places, what, whom, holds).await });
        self.asks.insert(peer, job);
    }

    /// There is room for one more piece: somebody is asked for it, or it is left to the next pull.
    pub(super) fn room(&mut self) {
        if !self.core.handle_room(Instant::now()) {
            self.seat.pass_on();
        }
    }

    /// A neighbour offers a turn: it is used at once, or left to others by dropping it.
    pub(super) fn turn(&mut self, peer: NodeId, turn: Turn, place: Option<Place>, now: Instant) {
        self.asks.remove(&peer);
        let (room, rather) = (place.is_some(), turn.rather);
        self.offer = place.map(|place| (peer, execute::Taking { turn, place }));
        self.core.handle_turn(peer, rather, room, now);
        self.perform();
        self.offer = None;
    }

    pub(super) fn take(&mut self, peer: NodeId, piece: PieceIndex) {
        let Some((_, taking)) = self.offer.take().filter(|(from, _)| *from == peer) else { return };
        let Some(address) = self.context().tracker.peer(peer) else {
            return self.core.handle_piece_failed(peer, piece, Some(ErrorKind::Unreachable), Instant::now());
        };
        let (flights, flight) = (self.flights.clone(), self.flight.clone());
        let job =
            self.spawn(async move { execute::take(&flights.context, &flight.blob, address, taking, piece).await });
        self.requests.insert((peer, piece), job);
    }
}
