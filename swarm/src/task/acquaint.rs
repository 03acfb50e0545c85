//! Neighbours come and go, and tell what they hold.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use darter_tracker::{Bitmap, ErrorKind, NodeId, PieceIndex, PieceRange, PieceSource};

use super::neighbour::{self, Neighbour};
use super::{Action, Task};

impl Task {
    /// A neighbour is connected and holds `has`; also if it was not asked for, since either side may begin.
    pub fn handle_neighbour_up(&mut self, peer: NodeId, has: Bitmap, now: Instant) {
        if has.pieces() != self.geometry.pieces() {
            return;
        }
        // Where both sides begin a session at the same moment there are two: what the first has told since the second
        // one's offer was written down still holds.
        if self.neighbours.get(&peer).is_some_and(|neighbour| !neighbour.is_up()) {
            self.forget_offers(peer);
        }
        if self.know(peer, now) {
            self.note_offers(peer, has.iter(), now);
            if let Some(neighbour) = self.neighbours.get_mut(&peer) {
                neighbour.up();
            }
        }
        self.advance(now);
    }

    /// A neighbour has more pieces.
    pub fn handle_have(&mut self, peer: NodeId, pieces: &[PieceRange], now: Instant) {
        let existing: Vec<PieceRange> = pieces.iter().filter_map(|run| self.existing(*run)).collect();
        let total = self.geometry.pieces() as usize;
        self.note_offers(peer, existing.into_iter().flat_map(PieceRange::iter).take(total), now);
        // By far the most common event: all that can follow is that this neighbour is asked, or that what was fetched counts as
        // passed on.
        if self.origin.waits_to_pass_on() {
            self.advance(now);
        } else {
            self.drive_request(peer, now);
        }
    }

    /// A neighbour has told which home has it on its list.
    pub fn handle_neighbour_home(&mut self, peer: NodeId, home: NodeId) {
        if let Some(neighbour) = self.neighbours.get_mut(&peer) {
            neighbour.home = Some(home);
        }
    }

    /// The homes of neighbours that are not this node's, but for those that do not answer it. Whoever knows the ranks tells with
    /// [`Self::handle_rival`] if one of them comes before the present one.
    #[must_use]
    pub fn other_homes(&self, now: Instant) -> BTreeSet<NodeId> {
        let ours = self.registered_home();
        let connected = self.neighbours.values().filter(|neighbour| neighbour.is_up());
        connected
            .filter_map(|neighbour| neighbour.home)
            .filter(|home| ours.is_some_and(|ours| ours != *home) && !self.link.put_off(*home, now))
            .collect()
    }

    /// The session with a neighbour ended, or could not be begun. `serving` tells that it still gives what it offered.
    pub fn handle_neighbour_gone(&mut self, peer: NodeId, serving: bool, now: Instant) {
        if !serving {
            self.forget_offers(peer);
        }
        if let Some(neighbour) = self.neighbours.get_mut(&peer) {
            neighbour.gone(now);
        }
        self.advance(now);
    }

    /// A peer could not even be connected to: it is avoided for a while, and the home is told.
    pub fn handle_unreachable(&mut self, peer: NodeId, now: Instant) {
        self.forget_offers(peer);
        if let Some(neighbour) = self.neighbours.get_mut(&peer) {
            neighbour.lost(now);
        }
        self.blame(peer, Vec::new(), ErrorKind::Unreachable);
        self.advance(now);
    }

    /// A peer that was named as a source, or a neighbour, does not know the task: the home is told, so that it names
    /// somebody else or gives a lease.
    pub fn handle_without_task(&mut self, peer: NodeId, now: Instant) {
        self.forget_offers(peer);
        if let Some(neighbour) = self.neighbours.get_mut(&peer) {
            neighbour.lost(now);
        }
        self.blame(peer, Vec::new(), ErrorKind::NotFound);
        self.advance(now);
    }

    pub(super) fn meet(&mut self, nodes: &[NodeId], now: Instant) {
        for node in nodes {
            if self.know(*node, now)
                && let Some(neighbour) = self.neighbours.get_mut(node)
                && neighbour.begin_connect(now)
            {
                self.actions.push_back(Action::Connect { peer: *node });
            }
        }
    }

    /// The home's word counts as an offer: if news of a piece was lost between neighbours it is asked for all the same,
    /// and if the member does not have it, the home hears of that. Otherwise it would be named for ever.
    pub(super) fn meet_sources(&mut self, sources: &[PieceSource], now: Instant) {
        for source in sources {
            self.meet(&[source.node], now);
            self.note_offers(source.node, self.existing(source.pieces).into_iter().flat_map(PieceRange::iter), now);
        }
    }

    /// Makes sure that `peer` is among the neighbours; at the bound one of no use goes. False if none can.
    fn know(&mut self, peer: NodeId, now: Instant) -> bool {
        if !self.neighbours.contains_key(&peer) {
            if self.neighbours.len() >= neighbour::NEIGHBOURS_MAX {
                let expendable = self.neighbours.iter().find(|(_, neighbour)| neighbour.expendable(&self.have, now));
                let Some(expendable) = expendable.map(|(peer, _)| *peer) else { return false };
                self.forget_offers(expendable);
                self.neighbours.remove(&expendable);
            }
            let patience = self.patience.with(peer, Duration::ZERO);
            self.neighbours.insert(peer, Neighbour::new(self.geometry.pieces(), patience));
        }
        true
    }

    fn note_offers(&mut self, peer: NodeId, pieces: impl Iterator<Item = PieceIndex>, now: Instant) {
        let Some(neighbour) = self.neighbours.get_mut(&peer) else { return };
        for piece in pieces {
            if neighbour.offer(piece, now) {
                self.availability[piece.0 as usize] += 1;
                self.origin.shared(piece);
            }
        }
    }

    pub(super) fn forget_offers(&mut self, peer: NodeId) -> Vec<PieceIndex> {
        let offered = self.neighbours.get_mut(&peer).map(Neighbour::withdraw_all).unwrap_or_default();
        for piece in &offered {
            self.availability[piece.0 as usize] -= 1;
        }
        offered
    }
}
