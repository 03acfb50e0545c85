//! What a node does in the toy network: it hands every event to its real parts and carries out what they decide.

use super::*;
use crate::home::swarm::ADVERTISERS;

impl Net {
    pub(super) fn handle(&mut self, node: usize, event: Event) {
        let now = self.now;
        let id = |net: &Self, other: usize| net.nodes[other].id;
        match event {
            Event::Start => self.begin(node),
            Event::Wake if self.nodes[node].wake > now => {}
            Event::Wake => {
                // Spent, so that the next one is set even for the same moment.
                self.nodes[node].wake = now + Duration::from_secs(3600);
                self.with(node, |task| task.handle_timeout(now));
            }
            Event::Pulse => self.pulse(node),
            Event::Call(from, key, call) if self.reaches(from, node) => self.answer(node, from, key, call),
            Event::Answer(home, key, answer) if self.reaches(home, node) && self.nodes[node].open.remove(&key) => {
                let home = id(self, home);
                self.with(node, |task| match answer {
                    Answer::Register(Ok(response)) => task.handle_registered(home, &response, now),
                    Answer::Pull(Ok(response)) => task.handle_pulled(home, response, now),
                    Answer::Report(lease, Ok(response)) => task.handle_reported(home, lease, response, now),
                    Answer::Register(Err(error)) | Answer::Pull(Err(error)) | Answer::Report(_, Err(error)) => {
                        task.handle_home_failed(home, &error, now);
                    }
                });
            }
            Event::CallFails(home, key) if self.nodes[node].open.remove(&key) => {
                let (home, error) = (id(self, home), TrackerError::Unreachable { reason: String::new() });
                self.nodes[node].silent.insert(home, now + SILENT_FOR);
                self.with(node, |task| task.handle_home_failed(home, &error, now));
            }
            Event::Connect(from, key, have, home) if self.reaches(from, node) => {
                let known = self.nodes[node].task.as_ref().map(|task| task.have().clone());
                let told = known.map(|known| (known, self.nodes[node].told_home));
                if told.is_some() {
                    self.up(node, from, have, home);
                }
                self.push(WIRE, from, Event::Connected(node, key, told));
            }
            Event::Connected(peer, key, told) if self.reaches(peer, node) && self.nodes[node].open.remove(&key) => {
                match told {
                    Some((have, home)) => self.up(node, peer, have, home),
                    None => {
                        let peer = id(self, peer);
                        self.with(node, |task| task.handle_without_task(peer, now));
                    }
                }
            }
            Event::ConnectFails(peer, key) if self.nodes[node].open.remove(&key) => {
                let peer = id(self, peer);
                self.with(node, |task| task.handle_unreachable(peer, now));
            }
            Event::SessionEnds(peer) if !self.reaches(node, peer) && self.nodes[node].sessions.remove(&peer) => {
                let peer = id(self, peer);
                self.with(node, |task| task.handle_neighbour_gone(peer, false, now));
            }
            Event::Have(from, pieces) if self.reaches(from, node) => {
                let from = id(self, from);
                self.with(node, |task| task.handle_have(from, &pieces, now));
            }
            Event::HomeOf(from, home) if self.reaches(from, node) => {
                let from = id(self, from);
                self.with(node, |task| task.handle_neighbour_home(from, home));
                self.compare_homes(node);
            }
            Event::OriginBusy(run, left) => {
                self.with(node, |task| task.handle_origin_failed(run, OriginFailure::Busy(left), now));
            }
            Event::OriginPiece(run, piece) => self.with(node, |task| task.handle_origin_piece(run, piece, now)),
            Event::Ask(from) if self.reaches(from, node) => self.asked(node, from),
            Event::Turn(from, ticket, rather) if self.reaches(from, node) => self.turn(node, from, ticket, rather),
            Event::NoTurn(from, kind) if self.reaches(from, node) => {
                let from = id(self, from);
                self.with(node, |task| task.handle_turn_failed(from, kind, now));
            }
            Event::Take(from, ticket, piece) if self.reaches(from, node) => self.take(node, from, ticket, piece),
            Event::Lapse(ticket)
                if self.nodes[node].uploading.get(&ticket).is_some_and(|(_, piece)| piece.is_none()) =>
            {
                self.finish(node, ticket);
            }
            Event::Decline(from) => {
                let uploads = self.nodes[node].uploading.iter();
                let mut waiting = uploads.filter(|(_, (to, piece))| *to == from && piece.is_none());
                if let Some(ticket) = waiting.next().map(|(ticket, _)| *ticket) {
                    self.finish(node, ticket);
                }
            }
            Event::Uploaded(ticket) => {
                if let Some((_, Some(piece))) = self.nodes[node].uploading.get(&ticket).copied() {
                    self.with(node, |task| task.handle_uploaded(piece, now));
                }
                self.finish(node, ticket);
            }
            Event::Delivered(peer, piece) if self.reaches(peer, node) => {
                let from = id(self, peer);
                let wanted = |task: &Task| task.neighbours.get(&from).is_some_and(|peer| peer.asked(piece));
                if self.nodes[node].task.as_ref().is_some_and(wanted) {
                    self.with(node, |task| task.handle_piece(from, piece, now));
                }
                self.leave_place(node, peer, piece);
            }
            Event::Refused(peer, piece, kind) if self.reaches(peer, node) => {
                let from = id(self, peer);
                self.with(node, |task| task.handle_piece_failed(from, piece, kind, now));
                self.leave_place(node, peer, piece);
            }
            Event::Gone(other) => {
                self.nodes[node].view.remove(&other);
                let gone = id(self, other);
                self.nodes[node].home.member_down(gone);
                self.reconsider_homes(node);
            }
            Event::Come(other) => {
                self.nodes[node].view.insert(other);
                self.reconsider_homes(node);
            }
            // What was lost on the way, or is moot.
            _ => {}
        }
    }

    fn with(&mut self, node: usize, act: impl FnOnce(&mut Task)) {
        if let Some(task) = &mut self.nodes[node].task {
            act(task);
        }
    }

    fn begin(&mut self, node: usize) {
        if self.nodes[node].absent {
            return;
        }
        let (homes, have, now) = (self.homes(node), self.nodes[node].kept.clone(), self.now);
        self.nodes[node].task = Some(Task::new(self.id, self.geometry, have, homes, self.rng.random(), now));
        self.nodes[node].read_at = now;
        self.nodes[node].felt = now;
        self.push(PULSE, node, Event::Pulse);
    }

    fn pulse(&mut self, node: usize) {
        let now = self.now;
        if now >= std::mem::replace(&mut self.nodes[node].felt, now) + crate::home::STALLED {
            self.nodes[node].home.handle_stall(now);
        }
        let Some(task) = self.nodes[node].task.as_ref() else { return };
        let debtors = task.debtors();
        let fetchers = self.nodes[node].home.fetchers();
        for debtor in debtors {
            let at = self.index(debtor);
            if self.reaches(node, at) && self.nodes[at].frozen.is_none() {
                self.with(node, |task| task.handle_alive(debtor, now));
            }
        }
        for fetcher in fetchers {
            let at = self.index(fetcher);
            if self.reaches(node, at) && self.nodes[at].frozen.is_none() {
                self.nodes[node].home.handle_alive(fetcher, now);
            }
        }
        self.push(PULSE, node, Event::Pulse);
    }

    fn answer(&mut self, node: usize, from: usize, key: u64, call: Call) {
        let (caller, now) = (self.nodes[from].id, self.now);
        let answer = match call {
            Call::Register(request) => {
                self.learn(node);
                Answer::Register(self.nodes[node].home.register(caller, request, now))
            }
            Call::Pull(request) => Answer::Pull(self.nodes[node].home.pull_piece(caller, &request, now)),
            Call::Report(request) => {
                Answer::Report(request.lease, self.nodes[node].home.report_piece(caller, &request, now))
            }
            Call::Blame(request) => {
                let _ = self.nodes[node].home.report_error(caller, &request, now);
                return;
            }
        };
        self.push(WIRE, from, Event::Answer(node, key, answer));
    }

    /// Tells a home that does not know the task yet what gossip has told.
    fn learn(&mut self, node: usize) {
        if self.nodes[node].home.knows(&self.id) {
            return;
        }
        let (id, geometry, now) = (self.id, self.geometry, self.now);
        let known = |other: &usize| self.nodes[*other].alive && self.reaches(node, *other);
        let everybody: Vec<usize> = (0..self.nodes.len()).filter(known).collect();
        let mut whole: Vec<usize> =
            everybody.iter().copied().filter(|other| self.nodes[*other].done_at.is_some()).take(ADVERTISERS).collect();
        whole.extend(self.believed.iter().copied());
        let getting = |other: &usize| self.nodes[*other].told_home.is_some() && self.nodes[*other].done_at.is_none();
        let getting: Vec<usize> = everybody.into_iter().filter(getting).take(ADVERTISERS).collect();
        for other in whole {
            let holder = self.nodes[other].id;
            self.nodes[node].home.learn_holder(id, geometry, holder, now);
        }
        for other in getting {
            let downloader = self.nodes[other].id;
            self.nodes[node].home.learn_downloader(id, geometry, downloader, now);
        }
    }

    fn up(&mut self, node: usize, peer: usize, have: Bitmap, home: Option<NodeId>) {
        let (id, now) = (self.nodes[peer].id, self.now);
        self.nodes[node].sessions.insert(peer);
        self.with(node, |task| task.handle_neighbour_up(id, have, now));
        if let Some(home) = home {
            self.with(node, |task| task.handle_neighbour_home(id, home));
            self.compare_homes(node);
        }
    }

    fn compare_homes(&mut self, node: usize) {
        let Some(task) = &self.nodes[node].task else { return };
        let Some(ours) = task.registered_home() else { return };
        let known = |home: &NodeId| self.nodes[node].view.contains(&self.index(*home));
        let best = self.rank(task.other_homes(self.now).into_iter().filter(known).chain([ours]))[0];
        if best != ours {
            let (homes, now) = (self.homes(node), self.now);
            self.with(node, |task| task.handle_rival(best, homes, now));
        }
    }

    fn reconsider_homes(&mut self, node: usize) {
        let (homes, now) = (self.homes(node), self.now);
        let present = self.nodes[node].task.as_ref().and_then(Task::registered_home);
        let is_member = present.is_some_and(|home| self.nodes[node].view.contains(&self.index(home)));
        self.with(node, |task| task.handle_members(homes, is_member, now));
    }

    fn asked(&mut self, node: usize, from: usize) {
        if self.nodes[node].task.is_none() {
            return self.push(WIRE, from, Event::NoTurn(node, Some(ErrorKind::NotFound)));
        }
        let holds = self.nodes[from].task.as_ref().map_or(0, |task| task.have().count());
        let peer = self.nodes[from].id;
        let Some((ticket, steps)) = self.nodes[node].uploads.request(self.id, peer, holds) else {
            return self.push(WIRE, from, Event::NoTurn(node, None));
        };
        self.nodes[node].uploading.insert(ticket, (from, None));
        self.go_on(node, steps);
    }

    fn go_on(&mut self, node: usize, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Offer(ticket) => {
                    let Node { unshared, task, uploading, .. } = &mut self.nodes[node];
                    unshared.set(task.iter().flat_map(Task::unshared));
                    let (to, rather) = (uploading[&ticket].0, unshared.name());
                    self.push(WIRE, to, Event::Turn(node, ticket, rather));
                    self.push(OFFER_MAX, node, Event::Lapse(ticket));
                }
                Step::Serve(ticket) => self.upload(node, ticket),
            }
        }
    }

    fn finish(&mut self, node: usize, ticket: Ticket) {
        self.nodes[node].uploading.remove(&ticket);
        let steps = self.nodes[node].uploads.finish(ticket);
        self.go_on(node, steps);
    }

    fn turn(&mut self, node: usize, from: usize, ticket: Ticket, rather: Option<PieceIndex>) {
        let peer = self.nodes[from].id;
        let pace = self.nodes[node].task.as_ref().map_or(Pace::Usual, |task| task.pace(peer));
        let room = self.nodes[node].intake.take(self.geometry.piece_size().bytes(), pace);
        let now = self.now;
        self.nodes[node].offer = Some((ticket, pace));
        self.with(node, |task| task.handle_turn(peer, rather, room, now));
        self.drain(node);
        if let Some((_, pace)) = self.nodes[node].offer.take().filter(|_| room) {
            self.free_place(node, pace);
        }
    }

    fn leave_place(&mut self, node: usize, peer: usize, piece: PieceIndex) {
        if let Some(pace) = self.nodes[node].taken.remove(&(peer, piece)) {
            self.free_place(node, pace);
        }
    }

    fn free_place(&mut self, node: usize, pace: Pace) {
        let now = self.now;
        self.nodes[node].intake.release(self.geometry.piece_size().bytes(), pace);
        self.with(node, |task| {
            let _ = task.handle_room(now);
        });
    }

    fn take(&mut self, node: usize, from: usize, ticket: Ticket, piece: PieceIndex) {
        if !self.nodes[node].task.as_ref().is_some_and(|task| task.have().contains(piece)) {
            self.finish(node, ticket);
            return self.push(WIRE, from, Event::Refused(node, piece, Some(ErrorKind::NotFound)));
        }
        let Some(upload) = self.nodes[node].uploading.get_mut(&ticket) else {
            return self.push(WIRE, from, Event::Refused(node, piece, None));
        };
        upload.1 = Some(piece);
        let steps = self.nodes[node].uploads.take(ticket);
        self.go_on(node, steps);
    }

    fn upload(&mut self, node: usize, ticket: Ticket) {
        let (to, Some(piece)) = self.nodes[node].uploading[&ticket] else { return };
        match self.nodes[node].bad {
            None => self.push(TRANSFER, to, Event::Delivered(node, piece)),
            Some(Bad::Lies) => self.push(TRANSFER, to, Event::Refused(node, piece, Some(ErrorKind::Mismatch))),
            Some(Bad::Idles) => {}
        }
        self.push(TRANSFER, node, Event::Uploaded(ticket));
    }

    pub(super) fn drain(&mut self, node: usize) {
        let now = self.now;
        if self.nodes[node].task.is_none() {
            return;
        }
        loop {
            while let Some(action) = self.nodes[node].task.as_mut().and_then(Task::poll_action) {
                self.execute(node, action);
            }
            // The client reads on.
            let this = &mut self.nodes[node];
            let Some(task) = &mut this.task else { return };
            let before = task.readers.get(&ReaderId(1)).map(|waiting| waiting.piece.0);
            let next = task.have().prefix();
            if before == Some(next) {
                break;
            }
            this.stall = this.stall.max(now - this.read_at);
            (this.reader, this.read_at) = (next, now);
            if task.is_complete() {
                this.done_at.get_or_insert(now - self.start);
                task.handle_reader_gone(ReaderId(1), now);
                while let Some(action) = self.nodes[node].task.as_mut().and_then(Task::poll_action) {
                    self.execute(node, action);
                }
                break;
            }
            task.handle_reader(ReaderId(1), PieceIndex(next), now);
        }
        self.tell_home(node);
        let Some(task) = &mut self.nodes[node].task else { return };
        let wake = task.poll_timeout(now).max(now);
        // Only the last alarm set counts; earlier ones ring in vain.
        if std::mem::replace(&mut self.nodes[node].wake, wake) != wake {
            self.push(wake - now, node, Event::Wake);
        }
    }

    fn tell_home(&mut self, node: usize) {
        let home = self.nodes[node].task.as_ref().and_then(Task::registered_home);
        if let Some(home) = home.filter(|_| home != self.nodes[node].told_home) {
            self.nodes[node].told_home = Some(home);
            for other in self.nodes[node].sessions.clone() {
                self.push(WIRE, other, Event::HomeOf(node, home));
            }
            self.compare_homes(node);
        }
    }

    fn call(&mut self, node: usize, home: NodeId, call: Call) {
        let (at, key) = (self.index(home), self.sequence);
        if !matches!(call, Call::Blame(_)) {
            self.nodes[node].open.insert(key);
            self.push(CALL_FAILS, node, Event::CallFails(at, key));
        }
        self.push(WIRE, at, Event::Call(node, key, call));
    }

    /// Whether the registry, which is being asked, wants to be left alone.
    fn rests(&mut self) -> bool {
        if let Some(rest) = self.rest.take() {
            self.rest_until = Some(self.now + rest);
            self.asked_in_rest.clear();
            return true;
        }
        let Some(until) = self.rest_until.filter(|until| self.now < *until) else { return false };
        self.asked_in_rest.push(until - self.now);
        true
    }

    fn execute(&mut self, node: usize, action: Action) {
        let now = self.now;
        match action {
            Action::Register { home, request } => self.call(node, home, Call::Register(request)),
            Action::Pull { home, request } => self.call(node, home, Call::Pull(request)),
            Action::Report { home, request } => self.call(node, home, Call::Report(request)),
            Action::Blame { home, request } => self.call(node, home, Call::Blame(request)),
            Action::Connect { peer } => {
                let (to, key) = (self.index(peer), self.sequence);
                let have = self.nodes[node].task.as_ref().unwrap().have().clone();
                self.nodes[node].open.insert(key);
                self.push(WIRE, to, Event::Connect(node, key, have, self.nodes[node].told_home));
                self.push(CONNECT_FAILS, node, Event::ConnectFails(to, key));
            }
            Action::Ask { peer } => self.push(WIRE, self.index(peer), Event::Ask(node)),
            Action::Decline { peer } => self.push(WIRE, self.index(peer), Event::Decline(node)),
            Action::Take { peer, piece } => {
                let to = self.index(peer);
                if let Some((ticket, pace)) = self.nodes[node].offer.take() {
                    self.nodes[node].taken.insert((to, piece), pace);
                    self.push(WIRE, to, Event::Take(node, ticket, piece));
                }
            }
            Action::Cancel { peer, piece } => self.leave_place(node, self.index(peer), piece),
            Action::Have { peers, pieces } => {
                let peers: Vec<usize> = peers.into_iter().map(|peer| self.index(peer)).collect();
                for other in
                    peers.into_iter().filter(|peer| self.nodes[node].sessions.contains(peer)).collect::<Vec<_>>()
                {
                    if !(self.loses_news && self.rng.random::<bool>()) {
                        self.push(WIRE, other, Event::Have(node, pieces.clone()));
                    }
                }
            }
            Action::Fetch { run, .. } if self.registry_refuses.contains(&node) => {
                self.with(node, |task| task.handle_origin_failed(run, OriginFailure::Refused, now));
            }
            Action::Fetch { run, .. } if self.rests() => {
                let left = self.rest_until.map_or(Duration::ZERO, |until| until - now);
                self.push(WIRE * 2, node, Event::OriginBusy(run, left));
            }
            Action::Fetch { run, pieces } => {
                self.requests += 1;
                self.nodes[node].runs.insert(run, (pieces, now));
            }
            Action::ReadOn { run } => {
                if let Some((pieces, free)) = self.nodes[node].runs.get_mut(&run)
                    && pieces.count > 0
                {
                    let (at, piece) = ((*free).max(now) + ORIGIN, pieces.first);
                    *free = at;
                    *pieces = PieceRange { first: PieceIndex(piece.0 + 1), count: pieces.count - 1 };
                    self.registry[piece.0 as usize] += 1;
                    self.push(at - now, node, Event::OriginPiece(run, piece));
                }
            }
            Action::Stop { run } => {
                self.nodes[node].runs.remove(&run);
            }
            Action::CountFallback(_) => self.fallbacks += 1,
        }
    }
}
