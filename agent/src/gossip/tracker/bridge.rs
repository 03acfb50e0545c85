//! What this node's home tells other homes of its tasks, and what they answer.

use std::sync::Arc;
use std::time::Instant;

use darter_swarm::home::Home;
use darter_swarm::home::swarm::TOLD;
use darter_swarm::rendezvous;
use darter_swarm::wire::{Call, HomeNews, Open, Reply};
use darter_tracker::{NodeId, TaskId};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::SILENCE;
use crate::gossip::Roster;
use crate::net::{Peer, Transport};

/// What is told at a time: all that one task has to tell, to a few that do not answer, for some tasks. What is beyond is told
/// the next time.
const UNDER_WAY_MAX: usize = 64;

/// The conversation with other homes.
pub(super) struct Bridge {
    transport: Transport,
    roster: watch::Receiver<Arc<Roster>>,
    under_way: JoinSet<Option<(NodeId, HomeNews)>>,
}

impl Bridge {
    pub(super) fn new(transport: Transport, roster: watch::Receiver<Arc<Roster>>) -> Self {
        Self { transport, roster, under_way: JoinSet::new() }
    }

    /// Tells others what `home` has to tell them.
    pub(super) fn tell(&mut self, home: &mut Home) {
        let roster = self.roster.borrow().clone();
        for (to, news) in home.poll_news(Instant::now(), |task| next_in_rank(&roster, task)) {
            let Some(member) = roster.members.get(&to).filter(|_| self.under_way.len() < UNDER_WAY_MAX) else {
                continue;
            };
            let (transport, peer) = (self.transport.clone(), Peer { id: to, addr: member.peer });
            self.under_way.spawn(async move {
                let answer = tokio::time::timeout(SILENCE, ask(&transport, peer, news)).await.ok()??;
                Some((to, answer))
            });
        }
    }

    /// The next answer that has something in it.
    pub(super) async fn answered(bridge: Option<&mut Self>) -> (NodeId, HomeNews) {
        let Some(bridge) = bridge else { return std::future::pending().await };
        while let Some(answer) = bridge.under_way.join_next().await {
            if let Ok(Some(answer)) = answer {
                return answer;
            }
        }
        std::future::pending().await
    }
}

/// The others that may be home of a task, if anybody lacks those before them.
fn next_in_rank(roster: &Roster, task: &TaskId) -> Vec<NodeId> {
    let mut order = rendezvous::order(task, roster.members.values().map(|member| (member.id, member.role)));
    order.truncate(TOLD);
    order
}

async fn ask(transport: &Transport, peer: Peer, news: HomeNews) -> Option<HomeNews> {
    let mut stream = transport.open(peer).await.ok()?;
    stream.send_last(&Open::Call(Call::Compare(news))).await.ok()?;
    match stream.receive::<Reply>().await.ok()?? {
        Reply::Compared(answer) => answer,
        _ => None,
    }
}
