//! What nodes say to homes, and what homes answer.

use darter_swarm::holdings::QUARTERS_ALL;
use darter_swarm::wire::HomeNews;
use darter_tracker::{NodeId, TaskId};
use serde::Serialize;

use super::agenda::{Nanos, SECOND};
use super::event::{Answer, Answered, Call, Called, Event, Layer, NodeNumber};
use super::plan;
use super::world::{Node, PACKET_BYTES, World};

/// A call to a member from which nothing comes fails after this: the agent's time.
const CALL_FAILS: Nanos = 2 * SECOND;

/// How many bytes something has on the wire. What cannot be encoded is never sent.
pub(super) fn bytes_of(message: &impl Serialize) -> u64 {
    postcard::experimental::serialized_size(message).unwrap_or(0) as u64
}

impl World {
    pub(super) fn call(&mut self, node: NodeNumber, layer: Layer, home: NodeId, call: Call) {
        let (to, key) = (plan::number(home), self.key());
        let bytes = match &call {
            Call::Register(request) => bytes_of(request),
            Call::Pull(request) => bytes_of(request),
            Call::Report(request) => bytes_of(request),
            Call::Blame(request) => bytes_of(request),
        };
        if !matches!(call, Call::Blame(_)) {
            self.pull(node, layer).open.insert(key);
            self.after(CALL_FAILS, Event::CallFailed(node, layer, to, key));
        }
        let now = self.now;
        self.tally.calls += 1;
        self.nodes[to as usize].heard.note(bytes + PACKET_BYTES, now);
        self.send(bytes, Event::Called(to, Box::new(Called { from: node, layer, key, call })));
    }

    pub(super) fn called(&mut self, node: NodeNumber, called: Called) {
        let Called { from, layer, key, call } = called;
        let (caller, now) = (self.nodes[from as usize].id, self.instant());
        let (answer, bytes) = match call {
            Call::Register(request) => {
                self.teach(node, layer);
                let answer = self.nodes[node as usize].home.register(caller, request, now);
                let bytes = answer.as_ref().map_or(0, bytes_of);
                (Answer::Register(answer), bytes)
            }
            Call::Pull(request) => {
                let answer = self.nodes[node as usize].home.pull_piece(caller, &request, now);
                let bytes = answer.as_ref().map_or(0, bytes_of);
                (Answer::Pull(answer), bytes)
            }
            Call::Report(request) => {
                let answer = self.nodes[node as usize].home.report_piece(caller, &request, now);
                let bytes = answer.as_ref().map_or(0, bytes_of);
                (Answer::Report(request.lease, answer), bytes)
            }
            Call::Blame(request) => {
                // It concerns a task that this home has forgotten, which is no news to it.
                let _ = self.nodes[node as usize].home.report_error(caller, &request, now);
                return;
            }
        };
        let now = self.now;
        self.nodes[node as usize].heard.note(bytes + PACKET_BYTES, now);
        self.send(bytes, Event::Answered(from, Box::new(Answered { home: node, layer, key, answer })));
        self.tell_homes(node);
    }

    /// Lets a node's home tell others what it has to tell.
    pub(super) fn tell_homes(&mut self, node: NodeNumber) {
        let now = self.instant();
        let (ranks, layers) = (&self.ranks, &self.layers);
        let Node { home, id, gone, plan, .. } = &mut self.nodes[node as usize];
        let rank = |task: &TaskId| {
            let ranked = layers.iter().zip(&ranks[plan.view as usize]).find(|(layer, _)| layer.id == *task);
            let rank = ranked.map(|(_, rank)| rank.as_slice()).unwrap_or_default();
            rank.iter().filter(|other| *other != id && !gone.contains(&plan::number(**other))).copied().collect()
        };
        for (to, news) in home.poll_news(now, rank) {
            let to = plan::number(to);
            self.tell_home_of(node, to, &news, Event::Compared(to, node, Box::new(news.clone())));
        }
    }

    fn tell_home_of(&mut self, node: NodeNumber, to: NodeNumber, news: &HomeNews, event: Event) {
        let (bytes, now) = (bytes_of(news), self.now);
        self.tally.calls += 1;
        for home in [node, to] {
            self.nodes[home as usize].heard.note(bytes + PACKET_BYTES, now);
        }
        self.send(bytes, event);
    }

    /// Another home has told what it knows.
    pub(super) fn compared(&mut self, node: NodeNumber, from: NodeNumber, news: HomeNews) {
        let (teller, now) = (self.nodes[from as usize].id, self.instant());
        if let Some(news) = self.nodes[node as usize].home.compare(teller, news, now) {
            self.tell_home_of(node, from, &news, Event::ComparedBack(from, node, Box::new(news.clone())));
        }
    }

    /// It has told so in answer.
    pub(super) fn compared_back(&mut self, node: NodeNumber, from: NodeNumber, news: HomeNews) {
        let (teller, now) = (self.nodes[from as usize].id, self.instant());
        self.nodes[node as usize].home.handle_news(teller, news, now);
    }

    /// Tells a home that knows of no holder what gossip has told, as the agent does.
    fn teach(&mut self, node: NodeNumber, layer: Layer) {
        let content = &self.layers[layer as usize];
        let (id, geometry, now) = (content.id, content.geometry, self.instant());
        let home = &mut self.nodes[node as usize].home;
        if home.knows_holders(&id) {
            return;
        }
        let unknown = !home.knows(&id);
        for (heard, other, quarters) in &self.gossip[layer as usize] {
            if *heard > self.now || *other == node {
                continue;
            }
            let other = plan::name(*other, self.scenario.seed);
            let home = &mut self.nodes[node as usize].home;
            match *quarters {
                QUARTERS_ALL => home.learn_holder(id, geometry, other, now),
                _ if unknown => home.learn_downloader(id, geometry, other, now),
                _ => {}
            }
        }
    }

    /// Where neighbours have other homes, the one of the highest rank shall be everybody's.
    pub(super) fn compare_homes(&mut self, node: NodeNumber, layer: Layer) {
        let task = &self.nodes[node as usize].pulls[layer as usize].task;
        let Some(ours) = task.registered_home() else { return };
        let others = task.other_homes(self.instant());
        if others.is_empty() {
            return;
        }
        let known = others.into_iter().filter(|home| self.knows(node, *home)).chain([ours]);
        let id = self.layers[layer as usize].id;
        let ranked = darter_swarm::rendezvous::order(&id, known.map(|home| (home, darter_tracker::Role::Node)));
        if let Some(best) = ranked.first().copied().filter(|best| *best != ours) {
            let (homes, now) = (self.homes(node, layer), self.instant());
            self.with(node, layer, |task| task.handle_rival(best, homes, now));
        }
    }
}
