//! Tells the homes of blobs what is here of them: after a start, when members have come, after an isolation, and when a home
//! asks everybody (Recover).
//!
//! Not here: pulls, which tell their home themselves.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use darter_swarm::holdings::QUARTERS_ALL;
use darter_swarm::home::swarm::ADVERTISERS;
use darter_swarm::membership::{MembershipEvent, Roster};
use darter_tracker::{Bitmap, EventBody, Geometry, NodeId, RegisterRequest, TaskId, Tracker as _};
use rand::RngExt as _;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;

use crate::gossip::Gossip;
use crate::gossip::tracker::GossipTracker;
use crate::pull::Flights;
use crate::store::Store;

/// Blobs of a former run that are made known again at the start; others are found when their home asks.
const KNOWN_AGAIN_MAX: usize = 1000;

/// Pause between two of those: a restarted agent is no reason to burden the homes.
const KNOWN_AGAIN_PAUSE: Duration = Duration::from_millis(5);

/// How long to wait at the start for the other members to be known before the homes of what is here are told.
const MEMBERS_PATIENCE: Duration = Duration::from_secs(10);

/// The members count as known when none has come or gone for this long: a join is heard of in several datagrams.
const MEMBERS_SETTLED: Duration = Duration::from_secs(1);

/// A home that asks everybody is answered after a random delay of up to this per member, and not at all once the cluster has
/// heard of holders enough: some of a thousand answer, not all.
const ANSWER_SPREAD: Duration = Duration::from_millis(10);
const ANSWER_SPREAD_MAX: Duration = Duration::from_secs(5);

/// Questions that wait for their delay; a home that asks more at a time gets no answer to the rest from here.
const QUESTIONS_MAX: usize = 64;

/// A home that asks who holds a blob, and when it is answered.
struct Question {
    task: TaskId,
    home: NodeId,
    due: Instant,
}

/// What it takes to tell homes.
pub(super) struct Informer {
    pub(super) gossip: Arc<Gossip>,
    pub(super) tracker: Arc<GossipTracker>,
    pub(super) store: Arc<Store>,
    pub(super) flights: Arc<Flights>,
}

impl Informer {
    /// Tells homes what a former run has left, and whenever members have come what is here of the blobs that they are home of
    /// now: they were not there when it was said, and would have it fetched from the registry again. After an isolation they
    /// are told everything once more; that nobody hears it is also how a node finds out that it is still cut off.
    pub(super) async fn run(self) {
        let mut roster = self.gossip.roster();
        let mut events = self.gossip.events();
        members_known(roster.clone()).await;
        let mut told = BTreeSet::new();
        let mut questions = Vec::new();
        let mut isolations = self.tracker.isolations();
        loop {
            let members: BTreeSet<NodeId> = roster.borrow_and_update().members.keys().copied().collect();
            let first = told.is_empty();
            let new: BTreeSet<NodeId> = members.difference(&told).copied().collect();
            told = members;
            if first || !new.is_empty() {
                self.tell(|home| first || new.contains(&home)).await;
            }
            // One may have begun and ended meanwhile.
            if self.tracker.isolations() != isolations && !self.tracker.is_isolated() {
                isolations = self.tracker.isolations();
                told.clear();
                continue;
            }
            let mut over = std::pin::pin!(self.tracker.isolation_over());
            loop {
                let next = questions.iter().map(|question: &Question| question.due).min();
                tokio::select! {
                    changed = roster.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    () = &mut over => {
                        // What was fetched meanwhile nobody knows of.
                        isolations = self.tracker.isolations();
                        told.clear();
                        break;
                    }
                    asked = question(&mut events) => match asked {
                        Some((task, home)) => self.note(&mut questions, task, home),
                        None => return,
                    },
                    () = sleep_until(next) => {
                        let now = Instant::now();
                        for due in questions.extract_if(.., |question| question.due <= now) {
                            self.answer(due.task, due.home).await;
                        }
                    }
                }
            }
        }
    }

    /// Tells the homes that are meant what is here.
    async fn tell(&self, meant: impl Fn(NodeId) -> bool) {
        for (task, geometry, have) in self.store.tasks().into_iter().take(KNOWN_AGAIN_MAX) {
            let Some(home) = self.tracker.homes(&task).first().copied() else { continue };
            // A pull that has begun has said so itself, and keeps its home.
            if meant(home) && !self.flights.active().contains(&task) {
                self.make_known(home, (task, geometry, have)).await;
                tokio::time::sleep(KNOWN_AGAIN_PAUSE).await;
            }
        }
    }

    fn note(&self, questions: &mut Vec<Question>, task: TaskId, home: NodeId) {
        let here = self.store.find(&task).is_some_and(|blob| !blob.held().is_empty());
        let roster = self.gossip.roster();
        let is_member = roster.borrow().members.contains_key(&home);
        if !here || !is_member || questions.len() >= QUESTIONS_MAX {
            return;
        }
        let members = roster.borrow().members.len() as u32;
        let spread = (ANSWER_SPREAD * members).min(ANSWER_SPREAD_MAX);
        let due = Instant::now() + spread.mul_f64(rand::rng().random());
        questions.push(Question { task, home, due });
    }

    async fn answer(&self, task: TaskId, home: NodeId) {
        let holders = self.gossip.holders(&task).into_iter().filter(|(_, quarters)| *quarters == QUARTERS_ALL).count();
        let Some(blob) = self.store.find(&task).filter(|_| holders < ADVERTISERS) else { return };
        if !self.flights.active().contains(&task) {
            self.make_known(home, (task, *blob.geometry(), blob.held())).await;
        }
    }

    /// Tells a home what is here of a blob, and the whole cluster if the home says so.
    async fn make_known(&self, home: NodeId, (task, geometry, have): (TaskId, Geometry, Bitmap)) {
        let quarters = (u64::from(have.count()) * u64::from(QUARTERS_ALL) / u64::from(geometry.pieces())) as u8;
        let request = RegisterRequest::new(task, Some(geometry), Some(have));
        match self.tracker.register(home, request).await {
            Ok(response) if response.advertise && response.geometry == Some(geometry) => {
                self.gossip.publish(EventBody::Length { task, geometry });
                // None is no quarter: it is a start.
                self.gossip.publish(match quarters {
                    0 => EventBody::Start { task },
                    quarters => EventBody::Progress { task, quarters },
                });
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%task, %home, %error, "a home could not be told what is here"),
        }
    }
}

/// The next question of a home; `None` when gossip has ended. One that was lost in a burst is asked again when the next client
/// comes, as long as the home knows of no holder.
async fn question(events: &mut broadcast::Receiver<MembershipEvent>) -> Option<(TaskId, NodeId)> {
    loop {
        match events.recv().await {
            Ok(MembershipEvent::Event(signed)) => {
                if let EventBody::Recover { task: Some(task) } = signed.event.body {
                    return Some((task, signed.event.author));
                }
            }
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return None,
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Waits until the other members are known, or are likely not to exist: before that this node is everything's home.
pub(super) async fn members_known(mut roster: watch::Receiver<Arc<Roster>>) {
    let settled = async {
        // Gossip that has ended will not know more.
        let _ = roster.wait_for(|roster| !roster.members.is_empty()).await;
        while let Ok(Ok(())) = tokio::time::timeout(MEMBERS_SETTLED, roster.changed()).await {}
    };
    let _ = tokio::time::timeout(MEMBERS_PATIENCE, settled).await;
}
