//! What a node does: it hands every event to its parts, and carries out what they decide.

use std::rc::Rc;

use darter_swarm::home::STALLED;
use darter_swarm::task::{Action, OriginFailure, ReaderId, Task};
use darter_swarm::upload::Unshared;
use darter_tracker::{Bitmap, ErrorKind, PieceIndex, PieceRange, TrackerError};
use rand::RngExt as _;

use super::agenda::{MILLISECOND, Nanos, SECOND};
use super::calls::bytes_of;
use super::event::{Answer, Answered, Event, Layer, Meeting, NodeNumber};
use super::plan;
use super::world::{Pull, Run, World};

/// How often downloaders and homes are told who is alive: the agent's time.
const PULSE: Nanos = 100 * MILLISECOND;

/// A handshake that nobody answers.
const HANDSHAKE_FAILS: Nanos = 3 * SECOND;

/// A member that failed a call is not asked for so long: the agent's time.
const SILENT_FOR: Nanos = 10 * SECOND;

/// A client's one reader of a layer.
const READER: ReaderId = ReaderId(1);

/// Quarters in which progress is gossiped.
const QUARTERS: u64 = 4;

impl World {
    pub(super) fn happen_to_node(&mut self, event: Event) {
        let now = self.instant();
        match event {
            Event::Join(node) => self.join(node),
            Event::Wake(node, layer, at) => {
                let pull = &mut self.nodes[node as usize].pulls[layer as usize];
                if pull.wake == at {
                    // Spent, so that the next one is set even for the same moment.
                    pull.wake = Nanos::MAX;
                    pull.task.handle_timeout(now);
                    self.settle(node, layer);
                }
            }
            Event::Pulse(node) => self.pulse(node),
            Event::Called(node, called) => self.called(node, *called),
            Event::Answered(node, answered) => self.answered(node, *answered),
            Event::CallFailed(node, layer, home, key) => {
                if self.pull(node, layer).open.remove(&key) {
                    let until = self.now + SILENT_FOR;
                    self.nodes[node as usize].silent.insert(home, until);
                    let (name, error) =
                        (self.nodes[home as usize].id, TrackerError::Unreachable { reason: String::new() });
                    self.with(node, layer, |task| task.handle_home_failed(name, &error, now));
                }
            }
            Event::Compared(node, from, news) => self.compared(node, from, *news),
            Event::ComparedBack(node, from, news) => self.compared_back(node, from, *news),
            Event::Met(node, meeting) => self.met(node, *meeting),
            Event::MetBack(node, layer, peer, meeting, key) => {
                if self.pull(node, layer).open.remove(&key) {
                    match meeting {
                        Some(meeting) => self.up(node, *meeting),
                        None => {
                            let peer = self.nodes[peer as usize].id;
                            self.with(node, layer, |task| task.handle_without_task(peer, now));
                        }
                    }
                }
            }
            Event::MeetingFailed(node, layer, peer, key) => {
                if self.pull(node, layer).open.remove(&key) {
                    let peer = self.nodes[peer as usize].id;
                    self.with(node, layer, |task| task.handle_unreachable(peer, now));
                }
            }
            Event::Parted(node, peer) => self.parted(node, peer),
            Event::HaveLate(node, from, layer, pieces) => self.have_one(node, from, layer, &pieces),
            Event::HomeOf(node, from, layer, home) => {
                let from = self.nodes[from as usize].id;
                self.with(node, layer, |task| task.handle_neighbour_home(from, home));
                self.compare_homes(node, layer);
            }
            Event::Asked(node, from, layer, holds) => self.asked(node, from, layer, holds),
            Event::Offered(node, from, layer, ticket, rather) => self.offered(node, from, layer, ticket, rather),
            Event::OfferLapsed(node, ticket) => self.offer_lapsed(node, ticket),
            Event::NotOffered(node, from, layer, kind) => {
                let from = self.nodes[from as usize].id;
                self.with(node, layer, |task| task.handle_turn_failed(from, kind, now));
            }
            Event::Taken(node, from, layer, ticket, piece) => self.taken(node, from, layer, ticket, piece),
            Event::Declined(node, from, layer) => self.declined(node, from, layer),
            Event::Unasked(node, from, layer, piece) => self.unasked(node, from, layer, piece),
            Event::Denied(node, from, layer, piece, kind) => {
                let peer = self.nodes[from as usize].id;
                self.with(node, layer, |task| task.handle_piece_failed(peer, piece, kind, now));
                self.leave_place(node, layer, from, piece);
            }
            Event::ChunkArrived(node, flow, bytes) => self.chunk_arrived(node, flow, bytes),
            Event::Acknowledged(node, ticket) => self.acknowledged(node, ticket),
            Event::RegistryAnswers(node, layer, run) => self.registry_answers(node, layer, run),
            Event::Gone(node, other) => self.gone(node, other),
            Event::ChunkLeft(_) | Event::Kill(_) | Event::Freeze(..) | Event::Have(..) => {}
        }
    }

    /// A pull that must be there: whatever is said about a layer is said to one who has begun.
    pub(super) fn pull(&mut self, node: NodeNumber, layer: Layer) -> &mut Pull {
        &mut self.nodes[node as usize].pulls[layer as usize]
    }

    /// Lets a downloader know of something, and carries out what follows.
    pub(super) fn with(&mut self, node: NodeNumber, layer: Layer, tell: impl FnOnce(&mut Task)) {
        if let Some(pull) = self.nodes[node as usize].pulls.get_mut(layer as usize) {
            tell(&mut pull.task);
            self.settle(node, layer);
        }
    }

    /// The client has seen the manifest: it reads the first layers.
    fn join(&mut self, node: NodeNumber) {
        self.read_on(node);
        self.nodes[node as usize].felt = self.now;
        self.after(PULSE, Event::Pulse(node));
    }

    /// Lets the client read as many layers at a time as it does, in their order, and begins those that it will ask for next.
    fn read_on(&mut self, node: NodeNumber) {
        let (now, instant, layers) = (self.now, self.instant(), self.layers.len());
        loop {
            let this = &self.nodes[node as usize];
            let reading = this.pulls.iter().filter(|pull| pull.reading.is_some()).count();
            if this.asked == layers || reading >= usize::from(self.scenario.readers) {
                break;
            }
            let layer = this.asked as Layer;
            self.nodes[node as usize].asked += 1;
            self.begin_layer(node, layer);
            let pull = self.pull(node, layer);
            if pull.task.is_complete() {
                continue;
            }
            let piece = pull.task.have().prefix();
            pull.reading = Some((piece, now));
            self.with(node, layer, |task| {
                task.handle_background(false, instant);
                task.handle_reader(READER, PieceIndex(piece), instant);
            });
        }
        self.read_ahead(node);
    }

    /// Begins layers before the client asks for them, once it has something of each that it reads, as agents do.
    fn read_ahead(&mut self, node: NodeNumber) {
        let this = &self.nodes[node as usize];
        if this.pulls.iter().any(|pull| matches!(pull.reading, Some((0, _)))) {
            return;
        }
        let until = self.layers.len().min(this.asked + usize::from(self.scenario.ahead));
        for layer in this.pulls.len()..until {
            self.begin_layer(node, layer as Layer);
            let now = self.instant();
            self.with(node, layer as Layer, |task| task.handle_background(true, now));
        }
    }

    /// Begins a layer, if it is not begun.
    fn begin_layer(&mut self, node: NodeNumber, layer: Layer) {
        if usize::from(layer) < self.nodes[node as usize].pulls.len() {
            return;
        }
        let (now, homes) = (self.instant(), self.homes(node, layer));
        let content = &self.layers[layer as usize];
        let have = Bitmap::new(content.geometry.pieces());
        let mut task = Task::new(content.id, content.geometry, have, homes, self.rng.random(), now);
        let pulls = &mut self.nodes[node as usize].pulls;
        task.handle_fetching_elsewhere(pulls.iter().map(|pull| pull.fetching).sum(), now);
        pulls.push(Pull::new(task));
    }

    fn pulse(&mut self, node: NodeNumber) {
        let now = self.instant();
        let before = std::mem::replace(&mut self.nodes[node as usize].felt, self.now);
        if self.now - before >= STALLED.as_nanos() as Nanos {
            self.nodes[node as usize].home.handle_stall(now);
        }
        for layer in 0..self.nodes[node as usize].pulls.len() as Layer {
            let debtors = self.pull(node, layer).task.debtors();
            for debtor in debtors {
                if self.shows_life(plan::number(debtor)) {
                    self.pull(node, layer).task.handle_alive(debtor, now);
                }
            }
            if !self.pull(node, layer).task.is_complete() {
                self.with(node, layer, |task| task.handle_timeout(now));
            }
        }
        for fetcher in self.nodes[node as usize].home.fetchers() {
            if self.shows_life(plan::number(fetcher)) {
                self.nodes[node as usize].home.handle_alive(fetcher, now);
            }
        }
        self.tell_homes(node);
        self.forsake_the_silent(node);
        self.after(PULSE, Event::Pulse(node));
    }

    fn answered(&mut self, node: NodeNumber, answered: Answered) {
        let Answered { home, layer, key, answer } = answered;
        if !self.pull(node, layer).open.remove(&key) {
            return;
        }
        let now = self.instant();
        let home = self.nodes[home as usize].id;
        match &answer {
            Answer::Register(Ok(response)) => self.pull(node, layer).advertise |= response.advertise,
            Answer::Report(_, Ok(response)) => self.pull(node, layer).advertise |= response.advertise,
            _ => {}
        }
        self.with(node, layer, |task| match answer {
            Answer::Register(Ok(response)) => task.handle_registered(home, &response, now),
            Answer::Pull(Ok(response)) => task.handle_pulled(home, response, now),
            Answer::Report(lease, Ok(response)) => task.handle_reported(home, lease, response, now),
            Answer::Register(Err(error)) | Answer::Pull(Err(error)) | Answer::Report(_, Err(error)) => {
                task.handle_home_failed(home, &error, now);
            }
        });
    }

    fn met(&mut self, node: NodeNumber, meeting: Meeting) {
        let (peer, layer, key) = (meeting.from, meeting.layer, meeting.key);
        let ours = self.nodes[node as usize].pulls.get(layer as usize).map(|pull| {
            let have = pull.task.have().clone();
            Box::new(Meeting { from: node, layer, have, home: pull.told_home, key })
        });
        let bytes = ours.as_ref().map_or(0, |ours| bytes_of(&ours.have));
        if ours.is_some() {
            self.up(node, meeting);
        }
        self.send(bytes, Event::MetBack(peer, layer, node, ours, key));
    }

    fn up(&mut self, node: NodeNumber, meeting: Meeting) {
        let (now, peer, layer) = (self.instant(), self.nodes[meeting.from as usize].id, meeting.layer);
        self.pull(node, layer).sessions.insert(meeting.from);
        self.with(node, layer, |task| task.handle_neighbour_up(peer, meeting.have, now));
        if let Some(home) = meeting.home {
            self.with(node, layer, |task| task.handle_neighbour_home(peer, home));
            self.compare_homes(node, layer);
        }
    }

    fn parted(&mut self, node: NodeNumber, peer: NodeNumber) {
        if self.shows_life(peer) {
            return;
        }
        let (now, name) = (self.instant(), self.nodes[peer as usize].id);
        for layer in 0..self.nodes[node as usize].pulls.len() as Layer {
            if self.pull(node, layer).sessions.remove(&peer) {
                self.with(node, layer, |task| task.handle_neighbour_gone(name, false, now));
            }
        }
    }

    pub(super) fn have(&mut self, from: NodeNumber, layer: Layer, peers: &[NodeNumber], pieces: &Rc<[PieceRange]>) {
        for peer in peers {
            if self.scenario.loss > 0.0 && self.rng.random_bool(self.scenario.loss) {
                let delay = self.delay();
                self.after(delay, Event::HaveLate(*peer, from, layer, pieces.clone()));
            } else if self.shows_life(*peer) {
                self.have_one(*peer, from, layer, pieces);
            } else if self.nodes[*peer as usize].frozen.is_some() {
                self.after(0, Event::HaveLate(*peer, from, layer, pieces.clone()));
            }
        }
    }

    fn have_one(&mut self, node: NodeNumber, from: NodeNumber, layer: Layer, pieces: &[PieceRange]) {
        let (now, from) = (self.instant(), self.nodes[from as usize].id);
        self.with(node, layer, |task| task.handle_have(from, pieces, now));
    }

    /// Carries out what a downloader wants, lets its client read on, and sets its alarm.
    pub(super) fn settle(&mut self, node: NodeNumber, layer: Layer) {
        loop {
            while let Some(action) = self.pull(node, layer).task.poll_action() {
                self.carry_out(node, layer, action);
            }
            if !self.client_reads(node, layer) {
                break;
            }
        }
        self.tell_home(node, layer);
        self.announce(node, layer);
        self.share_the_fetching(node, layer);
        let now = self.instant();
        let wake = self.pull(node, layer).task.poll_timeout(now);
        let wake = self.nanos(wake).max(self.now);
        if std::mem::replace(&mut self.pull(node, layer).wake, wake) != wake {
            self.agenda.put(wake, Event::Wake(node, layer, wake));
        }
    }

    /// Lets the node's other layers know when this one fetches more or less.
    fn share_the_fetching(&mut self, node: NodeNumber, layer: Layer) {
        let now = self.instant();
        let pull = self.pull(node, layer);
        let fetching = pull.task.fetching();
        if std::mem::replace(&mut pull.fetching, fetching) == fetching {
            return;
        }
        for other in (0..self.nodes[node as usize].pulls.len() as Layer).filter(|other| *other != layer) {
            let elsewhere = |(of, pull): (usize, &Pull)| if of == other as usize { 0 } else { pull.fetching };
            let elsewhere = self.nodes[node as usize].pulls.iter().enumerate().map(elsewhere).sum();
            self.with(node, other, |task| task.handle_fetching_elsewhere(elsewhere, now));
        }
    }

    /// Lets the client take what has come; tells whether it did.
    fn client_reads(&mut self, node: NodeNumber, layer: Layer) -> bool {
        let (now, instant) = (self.now, self.instant());
        let this = &mut self.nodes[node as usize];
        let pull = &mut this.pulls[layer as usize];
        let Some((piece, since)) = pull.reading else { return false };
        let next = pull.task.have().prefix();
        if next == piece {
            return false;
        }
        pull.stall = pull.stall.max(now - since);
        if layer == 0 {
            this.first_piece.get_or_insert(now);
        }
        if !pull.task.is_complete() {
            pull.reading = Some((next, now));
            pull.task.handle_reader(READER, PieceIndex(next), instant);
            if piece == 0 {
                self.read_ahead(node);
            }
            return true;
        }
        pull.reading = None;
        pull.task.handle_reader_gone(READER, instant);
        self.read_on(node);
        let this = &self.nodes[node as usize];
        if this.asked == self.layers.len()
            && this.pulls.iter().all(|pull| pull.reading.is_none())
            && this.done.is_none()
        {
            self.nodes[node as usize].done = Some(now);
            self.left -= 1;
        }
        true
    }

    fn tell_home(&mut self, node: NodeNumber, layer: Layer) {
        let pull = self.pull(node, layer);
        let home = pull.task.registered_home();
        if home == pull.told_home {
            return;
        }
        let Some(home) = home else { return };
        pull.told_home = Some(home);
        for peer in pull.sessions.clone() {
            self.send(bytes_of(&home), Event::HomeOf(peer, node, layer, home));
        }
        self.compare_homes(node, layer);
    }

    /// Tells the cluster how far a node is, if its home has nominated it.
    fn announce(&mut self, node: NodeNumber, layer: Layer) {
        let pull = self.pull(node, layer);
        if !pull.advertise {
            return;
        }
        let have = pull.task.have();
        let quarters = (u64::from(have.count()) * QUARTERS / u64::from(have.pieces())) as u8;
        if pull.advertised.is_none_or(|before| quarters > before) {
            pull.advertised = Some(quarters);
            let heard = self.now + super::disturb::GOSSIP;
            self.gossip[layer as usize].push((heard, node, quarters));
        }
    }

    fn carry_out(&mut self, node: NodeNumber, layer: Layer, action: Action) {
        use super::event::Call;
        match action {
            Action::Register { home, request } => self.call(node, layer, home, Call::Register(request)),
            Action::Pull { home, request } => self.call(node, layer, home, Call::Pull(request)),
            Action::Report { home, request } => self.call(node, layer, home, Call::Report(request)),
            Action::Blame { home, request } => self.call(node, layer, home, Call::Blame(request)),
            Action::Connect { peer } => self.meet(node, layer, plan::number(peer)),
            Action::Ask { peer } => {
                self.tally.asked += 1;
                let holds = self.pull(node, layer).task.have().count();
                let bytes = bytes_of(&(self.layers[layer as usize].id, holds));
                self.send(bytes, Event::Asked(plan::number(peer), node, layer, holds));
            }
            Action::Take { peer, piece } => self.take(node, layer, plan::number(peer), piece),
            Action::Decline { peer } => self.send(0, Event::Declined(plan::number(peer), node, layer)),
            Action::Cancel { peer, piece } => {
                self.leave_place(node, layer, plan::number(peer), piece);
                self.send(0, Event::Unasked(plan::number(peer), node, layer, piece));
            }
            Action::Have { peers, pieces } => {
                let sessions = &self.pull(node, layer).sessions;
                let peers: Vec<NodeNumber> =
                    peers.into_iter().map(plan::number).filter(|peer| sessions.contains(peer)).collect();
                self.tally.news += peers.len() as u64;
                self.tally.control_bytes += peers.len() as u64 * (bytes_of(&pieces) + super::world::PACKET_BYTES);
                let latency = self.scenario.latency.as_nanos() as Nanos;
                self.after(latency, Event::Have(node, layer, peers.into(), pieces.into()));
            }
            Action::Fetch { run, pieces } => {
                self.pull(node, layer)
                    .runs
                    .insert(run, Run { pieces, credit: 0, flow: None, asked: false, next: pieces.first.0 });
            }
            Action::ReadOn { run } => self.read_run(node, layer, run),
            Action::Stop { run } => self.stop_run(node, layer, run),
            Action::CountFallback(_) => self.tally.fallbacks += 1,
        }
    }

    fn meet(&mut self, node: NodeNumber, layer: Layer, peer: NodeNumber) {
        let key = self.key();
        let pull = self.pull(node, layer);
        pull.open.insert(key);
        let meeting = Meeting { from: node, layer, have: pull.task.have().clone(), home: pull.told_home, key };
        let bytes = bytes_of(&meeting.have);
        self.send(bytes, Event::Met(peer, Box::new(meeting)));
        self.after(HANDSHAKE_FAILS, Event::MeetingFailed(node, layer, peer, key));
    }

    /// A piece has come from a peer.
    pub(super) fn piece_came(&mut self, node: NodeNumber, from: NodeNumber, layer: Layer, piece: PieceIndex) {
        let now = self.instant();
        let bytes = u64::from(self.layers[layer as usize].geometry.piece_length(piece));
        let (peer, lies) =
            (self.nodes[from as usize].id, self.nodes[from as usize].plan.character == plan::Character::Lying);
        if lies {
            self.tally.wasted_bytes += bytes;
            self.with(node, layer, |task| task.handle_piece_failed(peer, piece, Some(ErrorKind::Mismatch), now));
            return self.leave_place(node, layer, from, piece);
        }
        if self.pull(node, layer).task.have().contains(piece) {
            self.tally.wasted_bytes += bytes;
        }
        self.tally.peer_bytes += bytes;
        self.tally.peer_pieces += 1;
        self.nodes[node as usize].intake.came(bytes as u32, now);
        self.with(node, layer, |task| task.handle_piece(peer, piece, now));
        self.leave_place(node, layer, from, piece);
        self.middle(node);
    }

    /// A run ends before its time.
    pub(super) fn run_fails(
        &mut self,
        node: NodeNumber,
        layer: Layer,
        run: darter_swarm::task::RunId,
        why: OriginFailure,
    ) {
        let now = self.instant();
        self.stop_run(node, layer, run);
        self.with(node, layer, |task| task.handle_origin_failed(run, why, now));
    }
}

impl Pull {
    fn new(task: Task) -> Self {
        Self {
            task,
            sessions: std::collections::BTreeSet::new(),
            told_home: None,
            open: std::collections::BTreeSet::new(),
            runs: std::collections::BTreeMap::new(),
            fetching: 0,
            reading: None,
            wake: Nanos::MAX,
            stall: 0,
            unshared: Unshared::default(),
            offer: None,
            places: std::collections::BTreeMap::new(),
            advertised: None,
            advertise: false,
        }
    }
}
