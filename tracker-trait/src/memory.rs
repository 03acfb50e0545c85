//! The in-memory twin: the simplest tracker that keeps every promise of the interface.
//!
//! One [`Cluster`] holds all state; [`Cluster::node`] gives a member's view of it, which is what implements
//! [`Tracker`]. It leases one piece at a time, introduces everybody to everybody and never forgets, so it shows what the
//! interface means, not how to be fast.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{
    Added, Bitmap, ClientErrorRequest, Geometry, Lease, LeaseId, LeaseState, NodeId, PieceIndex, PieceRange,
    PieceSource, PullPieceRequest, PullPieceResponse, RegisterRequest, RegisterResponse, ReportPieceRequest,
    ReportPieceResponse, ServiceDownRequest, TaskId, Tracker, TrackerError,
};

/// When to ask again while others fetch.
const RETRY: Duration = Duration::from_millis(10);

/// Leases of this tracker never lapse: a member that dies is taken out with ServiceDown.
const LAPSE: Duration = Duration::MAX;

/// The state that all members share.
#[derive(Clone, Debug, Default)]
pub struct Cluster(Arc<Mutex<BTreeMap<TaskId, Task>>>);

#[derive(Debug, Default)]
struct Task {
    geometry: Option<Geometry>,
    members: BTreeMap<NodeId, BTreeSet<PieceIndex>>,
    leases: BTreeMap<LeaseId, (NodeId, PieceIndex)>,
    next_lease: u64,
    /// (who complained, about whom)
    blamed: BTreeSet<(NodeId, NodeId)>,
}

/// One member's view of the cluster.
#[derive(Clone, Debug)]
pub struct MemoryTracker {
    me: NodeId,
    cluster: Cluster,
}

impl Cluster {
    /// The tracker as `me` sees it.
    #[must_use]
    pub fn node(&self, me: NodeId) -> MemoryTracker {
        MemoryTracker { me, cluster: self.clone() }
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<TaskId, Task>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Task {
    fn merge(&mut self, node: NodeId, have: Option<&Bitmap>) {
        if let (Some(have), Some(held)) = (have, self.members.get_mut(&node)) {
            held.extend(have.iter());
        }
    }

    /// Leases the first piece of each run, since a lease is one piece here, if it is free.
    fn adopt(&mut self, node: NodeId, runs: &[PieceRange]) -> Vec<Lease> {
        self.leases.retain(|_, (holder, _)| *holder != node);
        let mut leases = Vec::new();
        for piece in runs.iter().take(RegisterRequest::RUNS_MAX).map(|run| run.first) {
            let leased = self.leases.values().any(|(_, other)| *other == piece);
            if !leased && !self.members.values().any(|held| held.contains(&piece)) {
                leases.push(self.grant(node, piece));
            }
        }
        leases
    }

    fn grant(&mut self, node: NodeId, piece: PieceIndex) -> Lease {
        self.next_lease += 1;
        let id = LeaseId(self.next_lease);
        self.leases.insert(id, (node, piece));
        Lease { id, pieces: PieceRange { first: piece, count: 1 }, lapse: LAPSE }
    }

    fn source(&self, asker: NodeId, piece: PieceIndex) -> Option<NodeId> {
        let holds = |(node, held): &(&NodeId, &BTreeSet<PieceIndex>)| {
            **node != asker && held.contains(&piece) && !self.blamed.contains(&(asker, **node))
        };
        self.members.iter().find(holds).map(|(node, _)| *node)
    }
}

impl Tracker for MemoryTracker {
    async fn register(&self, _node: NodeId, request: RegisterRequest) -> Result<RegisterResponse, TrackerError> {
        let mut tasks = self.cluster.tasks();
        let task = tasks.entry(request.task).or_default();
        if let (Some(known), Some(offered)) = (task.geometry, request.geometry)
            && known.length() != offered.length()
        {
            return Err(TrackerError::Refused { reason: "another length is known".to_owned() });
        }
        task.geometry = task.geometry.or(request.geometry);
        let neighbours = task.members.keys().copied().filter(|node| *node != self.me).collect();
        task.members.entry(self.me).or_default();
        task.merge(self.me, request.have.as_ref());
        let leases = task.adopt(self.me, &request.runs);
        Ok(RegisterResponse { task: request.task, geometry: task.geometry, neighbours, advertise: true, leases })
    }

    async fn pull_piece(&self, _node: NodeId, request: PullPieceRequest) -> Result<PullPieceResponse, TrackerError> {
        let mut tasks = self.cluster.tasks();
        let unknown = TrackerError::NotRegistered { task: request.task };
        let task =
            tasks.get_mut(&request.task).filter(|task| task.members.contains_key(&self.me)).ok_or(unknown.clone())?;
        let geometry = task.geometry.ok_or(unknown)?;
        task.merge(self.me, request.have.as_ref());
        let held = &task.members[&self.me];
        if held.len() == geometry.pieces() as usize {
            return Ok(PullPieceResponse::Finish { geometry });
        }
        let missing: Vec<PieceIndex> =
            (0..geometry.pieces()).map(PieceIndex).filter(|piece| !held.contains(piece)).collect();
        let mut sources = Vec::new();
        for piece in missing.iter().filter(|piece| request.lacking.iter().any(|run| run.contains(**piece))) {
            if let Some(node) = task.source(self.me, *piece) {
                sources.push(PieceSource { node, pieces: PieceRange { first: *piece, count: 1 } });
            }
        }
        if !sources.is_empty() {
            return Ok(PullPieceResponse::Pieces(sources));
        }
        let leased: BTreeSet<PieceIndex> = task.leases.values().map(|(_, piece)| *piece).collect();
        let free = missing.into_iter().find(|piece| !leased.contains(piece) && task.source(self.me, *piece).is_none());
        if let Some(piece) = free.filter(|_| request.can_fetch) {
            return Ok(PullPieceResponse::Lease(task.grant(self.me, piece)));
        }
        let neighbours = task.members.keys().copied().filter(|node| *node != self.me).collect();
        Ok(PullPieceResponse::Wait { retry_after: RETRY, neighbours, paused: Added::default() })
    }

    async fn report_piece(
        &self,
        _node: NodeId,
        request: ReportPieceRequest,
    ) -> Result<ReportPieceResponse, TrackerError> {
        let mut tasks = self.cluster.tasks();
        let unknown = TrackerError::NotRegistered { task: request.task };
        let task = tasks.get_mut(&request.task).ok_or(unknown.clone())?;
        let mine = request.lease.is_some_and(|lease| task.leases.get(&lease).is_some_and(|(node, _)| *node == self.me));
        let held = task.members.get_mut(&self.me).ok_or(unknown)?;
        held.extend(request.pieces.iter().flat_map(|run| run.iter()));
        let held = held.clone();
        task.leases
            .retain(|lease, (_, piece)| !(held.contains(piece) || request.release && Some(*lease) == request.lease));
        let lease = match request.lease {
            None => LeaseState::None,
            Some(lease) if mine && task.leases.contains_key(&lease) => LeaseState::Held,
            Some(_) => LeaseState::Over,
        };
        Ok(ReportPieceResponse { lease, advertise: true })
    }

    async fn service_down(&self, _node: NodeId, request: ServiceDownRequest) -> Result<(), TrackerError> {
        if let Some(task) = self.cluster.tasks().get_mut(&request.task) {
            task.members.remove(&self.me);
            task.leases.retain(|_, (node, _)| *node != self.me);
        }
        Ok(())
    }

    async fn report_error(&self, _node: NodeId, request: ClientErrorRequest) -> Result<(), TrackerError> {
        let mut tasks = self.cluster.tasks();
        let task = tasks.get_mut(&request.task).filter(|task| task.members.contains_key(&self.me));
        task.ok_or(TrackerError::NotRegistered { task: request.task })?.blamed.insert((self.me, request.peer));
        Ok(())
    }
}
