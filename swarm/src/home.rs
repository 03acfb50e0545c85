//! The home of a task: an ordinary agent that knows who wants it and who has it, and sees to it that every piece leaves
//! the registry once.
//!
//! - [`introductions`] makes neighbours of them.
//! - `kept` finds out fetchers that give nobody what they have fetched.
//! - [`lease`] keeps which member may fetch which run of pieces from the registry.
//! - [`pause`] keeps which registries are to be left alone.
//! - [`swarm`] keeps the members of one task: what they hold, whom they know, who is blamed.
//!
//! All of it is soft state: whoever loses his home goes to the next in rank and says what he holds. Time comes in as an
//! argument, randomness as a seed.

pub mod introductions;
mod kept;
pub mod lease;
pub mod pause;
pub mod swarm;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use darter_tracker::{
    ClientErrorRequest, Geometry, NodeId, PullPieceRequest, PullPieceResponse, RegisterRequest, RegisterResponse,
    ReportPieceRequest, ReportPieceResponse, ServiceDownRequest, TaskId, TrackerError,
};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng};

use self::introductions::Zone;
use self::swarm::{NEWS, Swarm};
use crate::tags::Tags;
use crate::wire::HomeNews;

/// Tasks that one home keeps; at the bound the one unused longest is forgotten (its members register again). 4096
/// tasks of a thousand members are some 600 MB in the worst case, of fifty members 30 MB.
pub const TASKS_MAX: usize = 4096;

/// Pieces of all tasks together, the other bound on them: a home counts the holders of each, in four bytes. A thousand tasks of a
/// thousand pieces are an eighth of it; what a member invents costs 32 MiB and not a gigabyte. Tasks that are being pulled are
/// mentioned several times a second, so that it is the invented ones that go.
pub const PIECES_MAX: usize = 8 * 1024 * 1024;

/// A task nobody has mentioned for this long is forgotten; what holders have is still in everybody's `holdings`.
pub const TASK_IDLE: Duration = Duration::from_secs(3600);

/// How long a home must have stood still for [`Home::handle_stall`]: those who ask it leave it after a fraction of that.
pub const STALLED: Duration = Duration::from_secs(2);

/// The tasks that this member is home for.
#[derive(Debug)]
pub struct Home {
    me: NodeId,
    cluster_size: usize,
    /// Members that stand in a zone.
    zones: BTreeMap<NodeId, Zone>,
    tasks: BTreeMap<TaskId, Swarm>,
    tags: Tags,
    next_lease: u64,
    /// When other homes are to be thought of; `None` is at once.
    news_at: Option<Instant>,
    rng: StdRng,
}

impl Home {
    /// A home without tasks. `seed` feeds the choice of neighbours.
    #[must_use]
    pub fn new(me: NodeId, seed: u64) -> Self {
        // Lease ids start at a random place, so that those of a home's former life are not taken for its own.
        Self {
            me,
            cluster_size: 1,
            zones: BTreeMap::new(),
            tasks: BTreeMap::new(),
            tags: Tags::default(),
            next_lease: seed & (u64::MAX >> 1),
            news_at: None,
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// The member that this is the home of.
    #[must_use]
    pub fn me(&self) -> NodeId {
        self.me
    }

    /// How many live members the cluster has, this one included: alone, a node fetches a blob in one request.
    pub fn set_cluster_size(&mut self, members: usize) {
        self.cluster_size = members.max(1);
    }

    /// In which zones members stand; who is not named stands in none. It counts for those who register from now on.
    pub fn set_zones(&mut self, zones: BTreeMap<NodeId, Zone>) {
        self.zones = zones;
    }

    /// Answers a Register.
    ///
    /// # Errors
    /// [`TrackerError::Refused`] if the caller's length contradicts what is known, [`TrackerError::Overloaded`] at the
    /// bound on members of a task. Nothing changed then.
    pub fn register(
        &mut self,
        from: NodeId,
        request: RegisterRequest,
        now: Instant,
    ) -> Result<RegisterResponse, TrackerError> {
        if !self.tasks.contains_key(&request.task) {
            self.make_room(now);
        }
        let task = request.task;
        let swarm = self.tasks.entry(task).or_insert_with(|| Swarm::new(task, now));
        let new = swarm.pieces() == 0;
        let answer = swarm.register(from, request, now, &self.zones, &mut self.next_lease, &mut self.rng);
        if new {
            self.keep_within_pieces(&task);
            // Those who may be homes of it as well hear so at once, before much is lent.
            self.news_at = None;
        }
        answer
    }

    /// Answers a PullPiece.
    ///
    /// # Errors
    /// [`TrackerError::NotRegistered`] if the caller is not a member of the task.
    pub fn pull_piece(
        &mut self,
        from: NodeId,
        request: &PullPieceRequest,
        now: Instant,
    ) -> Result<PullPieceResponse, TrackerError> {
        let swarm = self.tasks.get_mut(&request.task).ok_or(TrackerError::NotRegistered { task: request.task })?;
        swarm.pull_piece(from, request, now, self.cluster_size, &mut self.next_lease, &mut self.rng)
    }

    /// Answers a ReportPiece.
    ///
    /// # Errors
    /// [`TrackerError::NotRegistered`] if the caller is not a member of the task.
    pub fn report_piece(
        &mut self,
        from: NodeId,
        request: &ReportPieceRequest,
        now: Instant,
    ) -> Result<ReportPieceResponse, TrackerError> {
        let swarm = self.tasks.get_mut(&request.task).ok_or(TrackerError::NotRegistered { task: request.task })?;
        swarm.report_piece(from, request, now)
    }

    /// Takes a member out of a task; unknown ones are no error, since the call may be repeated.
    pub fn service_down(&mut self, from: NodeId, request: ServiceDownRequest) {
        if let Some(swarm) = self.tasks.get_mut(&request.task) {
            swarm.remove(from);
        }
    }

    /// Notes that `from` was failed by another member.
    ///
    /// # Errors
    /// [`TrackerError::NotRegistered`] if the caller is not a member of the task.
    pub fn report_error(
        &mut self,
        from: NodeId,
        request: &ClientErrorRequest,
        now: Instant,
    ) -> Result<(), TrackerError> {
        let swarm = self.tasks.get_mut(&request.task).ok_or(TrackerError::NotRegistered { task: request.task })?;
        swarm.report_error(from, request, now)
    }

    /// What this home has to tell other members that may be homes of its tasks as well, and to whom; empty most of the time. To be
    /// asked after every call and now and then. `rank` gives the members in rank for a task, without this one.
    pub fn poll_news(&mut self, now: Instant, rank: impl Fn(&TaskId) -> Vec<NodeId>) -> Vec<(NodeId, HomeNews)> {
        if self.news_at.is_some_and(|at| now < at) {
            return Vec::new();
        }
        self.news_at = Some(now + NEWS / 2);
        self.tasks.iter_mut().flat_map(|(task, swarm)| swarm.news(now, || rank(task))).collect()
    }

    /// Another home of a task has told what it knows. The answer is what this one knows; `None` where nobody comes to it with
    /// that task.
    pub fn compare(&mut self, from: NodeId, news: HomeNews, now: Instant) -> Option<HomeNews> {
        self.tasks.get_mut(&news.task)?.compare(from, self.me, news, now)
    }

    /// A member has answered what it was told with what it knows itself.
    pub fn handle_news(&mut self, from: NodeId, news: HomeNews, now: Instant) {
        if let Some(swarm) = self.tasks.get_mut(&news.task) {
            swarm.hear(from, self.me, news, now);
        }
    }

    /// The members whose leases are running, or have just lapsed for their silence: whoever owns this home tells with
    /// [`Self::handle_alive`] when something has come from them.
    #[must_use]
    pub fn fetchers(&self) -> BTreeSet<NodeId> {
        self.tasks.values().flat_map(Swarm::fetchers).collect()
    }

    /// Something has come from a member with a lease, so it is alive.
    pub fn handle_alive(&mut self, node: NodeId, now: Instant) {
        for swarm in self.tasks.values_mut() {
            swarm.heard(node, now);
        }
    }

    /// This node has stood still for [`STALLED`] or longer: members have turned to other homes meanwhile, and fetch under leases
    /// that this one does not know of.
    pub fn handle_stall(&mut self, now: Instant) {
        for swarm in self.tasks.values_mut() {
            swarm.stalled(now);
        }
    }

    /// Takes a member that left the cluster out of everything; its leases are free at once.
    pub fn member_down(&mut self, node: NodeId) {
        for swarm in self.tasks.values_mut() {
            swarm.remove(node);
        }
    }

    /// Adds what gossip or this node's own store knows: `node` holds all of `task`. It is how a new home learns of an image pulled long ago.
    pub fn learn_holder(&mut self, task: TaskId, geometry: Geometry, node: NodeId, now: Instant) {
        if !self.tasks.contains_key(&task) {
            self.make_room(now);
        }
        let (advertised, place) = (node != self.me, self.place(node));
        let swarm = self.tasks.entry(task).or_insert_with(|| Swarm::new(task, now));
        swarm.learn_holder(geometry, node, place, advertised, now);
        self.keep_within_pieces(&task);
    }

    /// Adds what gossip knows: `node` is getting `task`, so whoever comes is introduced to it, and learns from it where its
    /// home is.
    pub fn learn_downloader(&mut self, task: TaskId, geometry: Geometry, node: NodeId, now: Instant) {
        if node == self.me {
            return;
        }
        if !self.tasks.contains_key(&task) {
            self.make_room(now);
        }
        let place = self.place(node);
        self.tasks.entry(task).or_insert_with(|| Swarm::new(task, now)).learn_downloader(geometry, node, place, now);
        self.keep_within_pieces(&task);
    }

    /// Whether somebody is known here to hold a piece of `task`.
    #[must_use]
    pub fn knows_holders(&self, task: &TaskId) -> bool {
        self.tasks.get(task).is_some_and(Swarm::has_holders)
    }

    /// Whether this member keeps state for `task`.
    #[must_use]
    pub fn knows(&self, task: &TaskId) -> bool {
        self.tasks.contains_key(task)
    }

    /// What tags mean that this member is home for.
    pub fn tags(&mut self) -> &mut Tags {
        &mut self.tags
    }

    /// How many tasks are kept.
    #[must_use]
    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// A member's zone, and a draw for the order in which it is introduced.
    fn place(&mut self, node: NodeId) -> (Zone, u64) {
        (self.zones.get(&node).copied().unwrap_or_default(), self.rng.random())
    }

    /// Forgets the tasks unused longest, but for the one just heard of, until all have few enough pieces.
    fn keep_within_pieces(&mut self, new: &TaskId) {
        let mut pieces: usize = self.tasks.values().map(Swarm::pieces).sum();
        while pieces > PIECES_MAX {
            let others = self.tasks.iter().filter(|(task, swarm)| *task != new && swarm.pieces() > 0);
            let Some((oldest, of)) =
                others.min_by_key(|(_, swarm)| swarm.last_used()).map(|(task, swarm)| (*task, swarm.pieces()))
            else {
                return;
            };
            tracing::debug!(task = %oldest, pieces = of, "forgotten, since tasks have too many pieces together");
            self.tasks.remove(&oldest);
            pieces -= of;
        }
    }

    fn make_room(&mut self, now: Instant) {
        self.tasks.retain(|_, swarm| now.saturating_duration_since(swarm.last_used()) < TASK_IDLE);
        while self.tasks.len() >= TASKS_MAX {
            let Some(oldest) = self.tasks.iter().min_by_key(|(_, swarm)| swarm.last_used()).map(|(task, _)| *task)
            else {
                return;
            };
            self.tasks.remove(&oldest);
        }
    }
}

#[cfg(test)]
#[path = "home/tests.rs"]
mod tests;
