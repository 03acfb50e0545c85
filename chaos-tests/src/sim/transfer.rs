//! How pieces move: from peers, who serve a few at a time, and from the registry, which is read as fast as credit allows.

use darter_swarm::intake::Pace;
use darter_swarm::task::{OriginFailure, RunId};
use darter_swarm::upload::{OFFER_MAX, Step, Ticket};
use darter_tracker::{ErrorKind, PieceIndex};
use rand::RngExt as _;
use std::time::Duration;

use super::agenda::Nanos;
use super::event::{Event, Layer, NodeNumber};
use super::links::{Cargo, FlowId};
use super::plan::Character;
use super::world::{Upload, World};

/// What a registry's connection takes in ahead of its reader: the agent's sockets have small buffers.
const SOCKET_BYTES: u64 = 64 * 1024;

/// What a busy registry asks for.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Bytes of a request to the registry and its answer's head, beside the body; counted as control.
const REQUEST_BYTES: u64 = 800;

/// The head of a piece: digest, signer and signature.
const PROOF_BYTES: u64 = 160;

/// An offer of a turn, and its answer, beside the packet.
const TURN_BYTES: u64 = 12;

impl World {
    // === peers ===

    pub(super) fn asked(&mut self, node: NodeNumber, from: NodeNumber, layer: Layer, holds: u32) {
        let this = &mut self.nodes[node as usize];
        if this.plan.character == Character::Lazy {
            return;
        }
        if this.pulls.get(layer as usize).is_none() {
            return self.send(1, Event::NotOffered(from, node, layer, Some(ErrorKind::NotFound)));
        }
        // Who claims to hold little is believed as far as it has got little from here.
        let given = this.shares.get(&(layer, from)).copied().unwrap_or(0);
        let peer = super::plan::name(from, self.scenario.seed);
        let Some((ticket, steps)) = this.uploads.request(self.layers[layer as usize].id, peer, holds.max(given)) else {
            self.tally.busy += 1;
            return self.send(1, Event::NotOffered(from, node, layer, None));
        };
        this.uploading.insert(ticket, Upload { to: from, layer, piece: None, flow: None, since: 0 });
        self.go_on(node, steps);
    }

    /// Does what the line says.
    fn go_on(&mut self, node: NodeNumber, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Offer(ticket) => {
                    if let Some(upload) = self.nodes[node as usize].uploading.get(&ticket) {
                        let (to, layer) = (upload.to, upload.layer);
                        let pull = self.pull(node, layer);
                        pull.unshared.set(pull.task.unshared());
                        let rather = pull.unshared.name();
                        self.send(TURN_BYTES, Event::Offered(to, node, layer, ticket, rather));
                        self.after(OFFER_MAX.as_nanos() as Nanos, Event::OfferLapsed(node, ticket));
                    }
                }
                Step::Serve(ticket) => self.serve(node, ticket),
            }
        }
    }

    /// Uses a turn, if there is a place for what it brings, or leaves it to others.
    pub(super) fn offered(
        &mut self,
        node: NodeNumber,
        from: NodeNumber,
        layer: Layer,
        ticket: Ticket,
        rather: Option<PieceIndex>,
    ) {
        // The largest piece that it can be.
        let bytes = self.layers[layer as usize].geometry.piece_size().bytes();
        let (peer, now) = (self.nodes[from as usize].id, self.instant());
        let pace = self.pull(node, layer).task.pace(peer);
        let room = self.nodes[node as usize].intake.take(bytes, pace);
        let pull = self.pull(node, layer);
        pull.offer = Some((ticket, pace));
        pull.task.handle_turn(peer, rather, room, now);
        self.settle(node, layer);
        if let Some((_, pace)) = self.pull(node, layer).offer.take() {
            self.tally.declined += 1;
            if room {
                self.free_place(node, layer, pace);
            }
        }
    }

    /// Gives a place back, and lets the next of the layers that wait for one know.
    fn free_place(&mut self, node: NodeNumber, layer: Layer, pace: Pace) {
        let bytes = self.layers[layer as usize].geometry.piece_size().bytes();
        let now = self.instant();
        self.nodes[node as usize].intake.release(bytes, pace);
        let layers = self.nodes[node as usize].pulls.len() as Layer;
        let first = self.nodes[node as usize].next_room;
        for layer in (first..layers).chain(0..first) {
            let mut used = false;
            if self.pull(node, layer).task.is_starved() {
                self.with(node, layer, |task| used = task.handle_room(now));
            }
            if used {
                self.nodes[node as usize].next_room = (layer + 1) % layers;
                return;
            }
        }
    }

    /// Takes the turn that is being offered at this moment.
    pub(super) fn take(&mut self, node: NodeNumber, layer: Layer, peer: NodeNumber, piece: PieceIndex) {
        if let Some((ticket, pace)) = self.pull(node, layer).offer.take() {
            self.pull(node, layer).places.insert((peer, piece), pace);
            self.send(TURN_BYTES, Event::Taken(peer, node, layer, ticket, piece));
        }
    }

    /// A piece that was taken has come from a peer, or never will: there is room for another.
    pub(super) fn leave_place(&mut self, node: NodeNumber, layer: Layer, peer: NodeNumber, piece: PieceIndex) {
        if let Some(pace) = self.pull(node, layer).places.remove(&(peer, piece)) {
            self.free_place(node, layer, pace);
        }
    }

    pub(super) fn taken(
        &mut self,
        node: NodeNumber,
        from: NodeNumber,
        layer: Layer,
        ticket: Ticket,
        piece: PieceIndex,
    ) {
        let held = self.pull(node, layer).task.have().contains(piece);
        match self.nodes[node as usize].uploading.get_mut(&ticket) {
            Some(upload) if held => upload.piece = Some(piece),
            _ => {
                self.upload_ends(node, ticket);
                let why = if held { None } else { Some(ErrorKind::NotFound) };
                return self.send(1, Event::Denied(from, node, layer, piece, why));
            }
        }
        *self.nodes[node as usize].shares.entry((layer, from)).or_default() += 1;
        let steps = self.nodes[node as usize].uploads.take(ticket);
        self.go_on(node, steps);
    }

    pub(super) fn offer_lapsed(&mut self, node: NodeNumber, ticket: Ticket) {
        let uploading = self.nodes[node as usize].uploading.get(&ticket);
        if uploading.is_some_and(|upload| upload.piece.is_none()) {
            self.upload_ends(node, ticket);
        }
    }

    pub(super) fn declined(&mut self, node: NodeNumber, from: NodeNumber, layer: Layer) {
        self.withdrawn(node, |upload| upload.to == from && upload.layer == layer && upload.piece.is_none());
    }

    fn withdrawn(&mut self, node: NodeNumber, meant: impl Fn(&Upload) -> bool) {
        let mut uploads = self.nodes[node as usize].uploading.iter();
        if let Some(ticket) = uploads.find(|(_, upload)| meant(upload)).map(|(ticket, _)| *ticket) {
            self.upload_ends(node, ticket);
        }
    }

    fn serve(&mut self, node: NodeNumber, ticket: Ticket) {
        let Some(upload) = self.nodes[node as usize].uploading.get(&ticket) else { return };
        let (to, layer, Some(piece)) = (upload.to, upload.layer, upload.piece) else { return };
        let bytes = u64::from(self.layers[layer as usize].geometry.piece_length(piece));
        self.tally.control_bytes += PROOF_BYTES;
        let since = self.now;
        let flow = self.links.open(node, to, bytes, Cargo::Piece { layer, piece, ticket });
        if let Some(upload) = self.nodes[node as usize].uploading.get_mut(&ticket) {
            upload.flow = Some(flow);
            upload.since = since;
        }
        self.begin(node);
    }

    pub(super) fn unasked(&mut self, node: NodeNumber, from: NodeNumber, layer: Layer, piece: PieceIndex) {
        self.withdrawn(node, |upload| upload.to == from && upload.layer == layer && upload.piece == Some(piece));
    }

    pub(super) fn upload_ends(&mut self, node: NodeNumber, ticket: Ticket) {
        let Some(upload) = self.nodes[node as usize].uploading.remove(&ticket) else { return };
        if let Some(cut) = upload.flow.and_then(|flow| self.links.close(flow)) {
            self.tally.wasted_bytes += cut.sent;
        }
        let steps = self.nodes[node as usize].uploads.finish(ticket);
        self.go_on(node, steps);
    }

    pub(super) fn acknowledged(&mut self, node: NodeNumber, ticket: Ticket) {
        let Some(upload) = self.nodes[node as usize].uploading.get(&ticket) else { return };
        let (layer, piece, now) = (upload.layer, upload.piece, self.instant());
        let took = Duration::from_nanos(self.now - upload.since);
        if let Some(piece) = piece {
            let bytes = self.layers[layer as usize].geometry.piece_length(piece);
            let this = &mut self.nodes[node as usize];
            this.uploads.gave(bytes, took, this.intake.rate(now));
        }
        self.upload_ends(node, ticket);
        if let Some(piece) = piece {
            self.with(node, layer, |task| task.handle_uploaded(piece, now));
        }
    }

    // === links ===

    /// Lets a place send on, if it is idle.
    pub(super) fn begin(&mut self, place: NodeNumber) {
        if let Some(sending) = self.links.begin(place, self.now) {
            self.agenda.put(sending.until, Event::ChunkLeft(place));
        }
    }

    pub(super) fn chunk_left(&mut self, place: NodeNumber) {
        let latency = self.scenario.latency.as_nanos() as Nanos;
        if let Some(left) = self.links.left(place, latency, self.now) {
            if place == self.registry {
                self.tally.registry_bytes += left.bytes;
            }
            if let Some(flow) = self.links.flow(left.flow) {
                self.agenda.put(left.arrives, Event::ChunkArrived(flow.to, left.flow, left.bytes));
            }
        }
        self.begin(place);
    }

    pub(super) fn chunk_arrived(&mut self, node: NodeNumber, id: FlowId, bytes: u64) {
        let Some(flow) = self.links.arrived(id, bytes) else { return };
        self.begin(flow.from);
        match flow.cargo {
            Cargo::Piece { layer, piece, ticket } => {
                if flow.received == u64::from(self.layers[layer as usize].geometry.piece_length(piece)) {
                    self.links.close(id);
                    let latency = self.scenario.latency.as_nanos() as Nanos;
                    self.after(latency, Event::Acknowledged(flow.from, ticket));
                    self.piece_came(node, flow.from, layer, piece);
                }
            }
            Cargo::Run { layer, run } => self.run_comes(node, layer, run, flow.received),
        }
    }

    // === the registry ===

    /// Lets a run be read a piece further. The request goes out with the first.
    pub(super) fn read_run(&mut self, node: NodeNumber, layer: Layer, run: RunId) {
        let Some(open) = self.pull(node, layer).runs.get_mut(&run) else { return };
        open.credit += 1;
        if !std::mem::replace(&mut open.asked, true) {
            self.tally.registry_requests += 1;
            self.tally.control_bytes += REQUEST_BYTES;
            let wait = (self.scenario.latency * 2 + self.scenario.registry_latency).as_nanos() as Nanos;
            return self.after(wait, Event::RegistryAnswers(node, layer, run));
        }
        self.allow(node, layer, run);
    }

    fn allow(&mut self, node: NodeNumber, layer: Layer, run: RunId) {
        let geometry = self.layers[layer as usize].geometry;
        let Some(open) = self.pull(node, layer).runs.get(&run) else { return };
        let Some(flow) = open.flow else { return };
        let bytes = |pieces: u32| {
            let first = open.pieces.first;
            let end = (first.0 + pieces.min(open.pieces.count)).min(geometry.pieces());
            let until = if end == geometry.pieces() { geometry.length() } else { geometry.offset(PieceIndex(end)) };
            until - geometry.offset(first)
        };
        let (whole, credited) = (bytes(open.pieces.count), bytes(open.credit));
        self.links.allow(flow, whole.min(credited + SOCKET_BYTES));
        self.begin(self.registry);
    }

    pub(super) fn registry_answers(&mut self, node: NodeNumber, layer: Layer, run: RunId) {
        if !self.pull(node, layer).runs.contains_key(&run) {
            return;
        }
        if self.scenario.registry_requests_max.is_some_and(|max| self.registry_open >= max) {
            self.tally.registry_refusals += 1;
            return self.run_fails(node, layer, run, OriginFailure::Busy(RETRY_AFTER));
        }
        if self.scenario.registry_errors > 0.0 && self.rng.random_bool(self.scenario.registry_errors) {
            self.tally.registry_refusals += 1;
            return self.run_fails(node, layer, run, OriginFailure::Transient);
        }
        self.registry_open += 1;
        let flow = self.links.open(self.registry, node, 0, Cargo::Run { layer, run });
        if let Some(open) = self.pull(node, layer).runs.get_mut(&run) {
            open.flow = Some(flow);
        }
        self.allow(node, layer, run);
    }

    /// Bytes of a run have come: each piece that is whole now is there.
    fn run_comes(&mut self, node: NodeNumber, layer: Layer, run: RunId, received: u64) {
        let (now, geometry) = (self.instant(), self.layers[layer as usize].geometry);
        let mut whole = false;
        while let Some(open) = self.pull(node, layer).runs.get_mut(&run) {
            let piece = PieceIndex(open.next);
            let start = geometry.offset(open.pieces.first);
            let end = geometry.offset(piece) + u64::from(geometry.piece_length(piece)) - start;
            if received < end || open.next >= open.pieces.end() {
                break;
            }
            open.next += 1;
            whole = true;
            if open.next == open.pieces.end() {
                self.stop_run(node, layer, run);
            }
            if self.pull(node, layer).task.have().contains(piece) {
                self.tally.wasted_bytes += u64::from(geometry.piece_length(piece));
            }
            self.with(node, layer, |task| task.handle_origin_piece(run, piece, now));
            self.middle(node);
        }
        if !whole {
            self.with(node, layer, |task| task.handle_origin_progress(run, now));
        }
    }

    pub(super) fn stop_run(&mut self, node: NodeNumber, layer: Layer, run: RunId) {
        let Some(open) = self.pull(node, layer).runs.remove(&run) else { return };
        if let Some(flow) = open.flow {
            self.links.close(flow);
            self.registry_open -= 1;
        }
    }
}
