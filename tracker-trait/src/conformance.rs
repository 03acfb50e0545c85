//! What every [`Tracker`] must do, asserted through its effects. The in-memory tracker and the gossip tracker, over real
//! sockets, pass the same suite.
//!
//! The suite is `async` but brings no runtime: whoever calls it drives it.

use crate::{
    Added, Bitmap, ClientErrorRequest, Digest, ErrorKind, Geometry, Lease, LeaseState, NodeId, PieceIndex, PieceRange,
    PieceSize, PullPieceRequest, PullPieceResponse, RegisterRequest, ReportPieceRequest, ServiceDownRequest, TaskId,
    Tracker, TrackerError,
};

/// Three members of one cluster, and the member that all of them ask.
#[derive(Debug)]
pub struct Subjects<T> {
    /// The members.
    pub members: [(NodeId, T); 3],
    /// The `node` argument of every call.
    pub home: NodeId,
}

/// Runs the whole suite. `salt` keeps the tasks of several runs over one cluster apart.
///
/// # Errors
/// Says which promise was broken.
pub async fn check<T: Tracker>(subjects: &Subjects<T>, salt: u8) -> Result<(), String> {
    let suite = Suite { subjects, salt };
    suite.unknown_tasks_are_refused().await?;
    suite.register_introduces_and_agrees().await?;
    suite.leases_are_exclusive_and_reports_end_them().await?;
    suite.service_down_frees_and_hides().await?;
    suite.report_error_changes_the_source().await?;
    suite.runs_under_way_stay_with_their_fetcher().await?;
    suite.all_pieces_mean_finish().await
}

struct Suite<'a, T> {
    subjects: &'a Subjects<T>,
    salt: u8,
}

/// Pieces of every task of the suite.
const PIECES: u32 = 4;

fn all() -> Vec<PieceRange> {
    vec![PieceRange { first: PieceIndex(0), count: PIECES }]
}

fn geometry() -> Result<Geometry, String> {
    let size = PieceSize::new(PieceSize::MIN_BYTES).ok_or("the smallest piece is a piece")?;
    Geometry::new(u64::from(PIECES) * u64::from(size.bytes()) - 1, size).map_err(|error| error.to_string())
}

fn ensure(holds: bool, promise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(promise.to_owned()) }
}

impl<T: Tracker> Suite<'_, T> {
    fn task(&self, number: u8) -> TaskId {
        let mut digest = [self.salt; 32];
        digest[0] = number;
        TaskId::blob(Digest::Sha256(digest))
    }

    fn id(&self, member: usize) -> NodeId {
        self.subjects.members[member].0
    }

    fn tracker(&self, member: usize) -> &T {
        &self.subjects.members[member].1
    }

    async fn register(&self, member: usize, task: TaskId, have: Option<Bitmap>) -> Result<Vec<NodeId>, String> {
        let request = RegisterRequest::new(task, Some(geometry()?), have);
        let response = self.tracker(member).register(self.subjects.home, request).await.map_err(|e| e.to_string())?;
        ensure(response.task == task, "Register answers for the task that was named")?;
        ensure(response.geometry == Some(geometry()?), "Register tells how the task is cut")?;
        Ok(response.neighbours)
    }

    async fn pull(&self, member: usize, task: TaskId, can_fetch: bool) -> Result<PullPieceResponse, String> {
        let request =
            PullPieceRequest { task, have: None, lacking: all(), urgent: None, can_fetch, registry: Added::default() };
        self.tracker(member).pull_piece(self.subjects.home, request).await.map_err(|error| error.to_string())
    }

    async fn lease(&self, member: usize, task: TaskId) -> Result<Lease, String> {
        match self.pull(member, task, true).await? {
            PullPieceResponse::Lease(lease) => Ok(lease),
            other => Err(format!("a lease was due, not {other:?}")),
        }
    }

    async fn report(
        &self,
        member: usize,
        task: TaskId,
        lease: Option<Lease>,
        pieces: Vec<PieceRange>,
    ) -> Result<LeaseState, String> {
        let request = ReportPieceRequest {
            task,
            lease: lease.map(|lease| lease.id),
            pieces,
            release: false,
            pause: Added::default(),
        };
        let response = self.tracker(member).report_piece(self.subjects.home, request).await;
        response.map(|response| response.lease).map_err(|error| error.to_string())
    }

    async fn unknown_tasks_are_refused(&self) -> Result<(), String> {
        let task = self.task(1);
        let request = PullPieceRequest {
            task,
            have: None,
            lacking: all(),
            urgent: None,
            can_fetch: true,
            registry: Added::default(),
        };
        let outcome = self.tracker(0).pull_piece(self.subjects.home, request).await;
        ensure(outcome == Err(TrackerError::NotRegistered { task }), "PullPiece before Register is refused")?;
        let request = RegisterRequest::new(task, Some(geometry()?), None);
        self.tracker(0).register(self.subjects.home, request).await.map_err(|error| error.to_string())?;
        let size = geometry()?.piece_size();
        let other = Geometry::new(geometry()?.length() + 1, size).map_err(|error| error.to_string())?;
        let request = RegisterRequest::new(task, Some(other), None);
        let outcome = self.tracker(1).register(self.subjects.home, request).await;
        ensure(matches!(outcome, Err(TrackerError::Refused { .. })), "Register with another length is refused")
    }

    async fn register_introduces_and_agrees(&self) -> Result<(), String> {
        let task = self.task(2);
        ensure(self.register(0, task, None).await?.is_empty(), "the first to register meets nobody")?;
        let met = self.register(1, task, None).await?;
        ensure(met == [self.id(0)], "the second to register is introduced to the first, and not to itself")?;
        let request = RegisterRequest::new(task, None, None);
        let response =
            self.tracker(2).register(self.subjects.home, request).await.map_err(|error| error.to_string())?;
        ensure(response.geometry == Some(geometry()?), "who does not know the length learns it")
    }

    async fn leases_are_exclusive_and_reports_end_them(&self) -> Result<(), String> {
        let task = self.task(3);
        self.register(0, task, None).await?;
        self.register(1, task, None).await?;
        ensure(
            !matches!(self.pull(1, task, false).await?, PullPieceResponse::Lease(_)),
            "who cannot fetch gets no lease",
        )?;
        let first = self.lease(0, task).await?;
        ensure(first.pieces.count > 0 && first.pieces.end() <= PIECES, "a lease names pieces of the task")?;
        if let PullPieceResponse::Lease(second) = self.pull(1, task, true).await? {
            let disjoint = first.pieces.iter().all(|piece| !second.pieces.contains(piece));
            ensure(disjoint, "no piece is leased to two members")?;
        }
        ensure(self.report(0, task, Some(first), vec![]).await? == LeaseState::Held, "an empty report renews a lease")?;
        ensure(self.report(1, task, Some(first), vec![]).await? == LeaseState::Over, "nobody renews another's lease")?;
        let state = self.report(0, task, Some(first), vec![first.pieces]).await?;
        ensure(state == LeaseState::Over, "a lease ends with its last piece")?;
        match self.pull(1, task, false).await? {
            PullPieceResponse::Pieces(sources) => {
                let right = sources
                    .iter()
                    .all(|source| source.node == self.id(0) && first.pieces.contains(source.pieces.first));
                ensure(right, "who lacks a reported piece is sent to its holder")
            }
            other => Err(format!("who lacks a reported piece is sent to its holder, not told {other:?}")),
        }
    }

    async fn service_down_frees_and_hides(&self) -> Result<(), String> {
        let task = self.task(4);
        self.register(0, task, None).await?;
        let lease = self.lease(0, task).await?;
        self.report(0, task, None, vec![PieceRange { first: lease.pieces.first, count: 1 }]).await?;
        let gone = self.tracker(0).service_down(self.subjects.home, ServiceDownRequest { task }).await;
        gone.map_err(|error| error.to_string())?;
        let met = self.register(1, task, None).await?;
        ensure(!met.contains(&self.id(0)), "nobody is introduced to who has left")?;
        let again = self.lease(1, task).await?;
        ensure(again.pieces.first == lease.pieces.first, "what only the leaver held or had leased is free again")?;
        let gone = self.tracker(0).service_down(self.subjects.home, ServiceDownRequest { task }).await;
        ensure(gone.is_ok(), "leaving twice is no error")
    }

    async fn report_error_changes_the_source(&self) -> Result<(), String> {
        let task = self.task(5);
        self.register(0, task, Some(Bitmap::full(PIECES))).await?;
        self.register(1, task, None).await?;
        let PullPieceResponse::Pieces(sources) = self.pull(1, task, false).await? else {
            return Err("who lacks a piece is sent to its holder".to_owned());
        };
        ensure(sources.iter().all(|source| source.node == self.id(0)), "the only holder is the source")?;
        let request = ClientErrorRequest { task, peer: self.id(0), pieces: all(), kind: ErrorKind::NotFound };
        let told = self.tracker(1).report_error(self.subjects.home, request).await;
        told.map_err(|error| error.to_string())?;
        let free = self.lease(1, task).await?;
        ensure(free.pieces.count > 0, "who was failed by the only holder may go to the registry")?;
        self.register(2, task, Some(Bitmap::full(PIECES))).await?;
        match self.pull(1, task, false).await? {
            PullPieceResponse::Pieces(sources) => ensure(
                sources.iter().all(|source| source.node == self.id(2)),
                "who failed somebody is not named to him again",
            ),
            other => Err(format!("another holder is named, not {other:?}")),
        }
    }

    async fn runs_under_way_stay_with_their_fetcher(&self) -> Result<(), String> {
        let task = self.task(7);
        let run = PieceRange { first: PieceIndex(1), count: 2 };
        let request =
            RegisterRequest { moved: true, runs: vec![run], ..RegisterRequest::new(task, Some(geometry()?), None) };
        let adopted = self.adopt(0, request.clone()).await?;
        let [lease] = adopted.as_slice() else { return Err(format!("one lease for one run, not {adopted:?}")) };
        ensure(lease.pieces.first == run.first && lease.pieces.end() <= run.end(), "the lease is for that run")?;
        ensure(self.report(0, task, Some(*lease), vec![]).await? == LeaseState::Held, "it can be renewed")?;
        ensure(self.adopt(1, request).await?.is_empty(), "nobody else goes on with it")?;
        if let PullPieceResponse::Lease(other) = self.pull(1, task, true).await? {
            let disjoint = lease.pieces.iter().all(|piece| !other.pieces.contains(piece));
            ensure(disjoint, "nobody else is lent it")?;
        }
        Ok(())
    }

    async fn adopt(&self, member: usize, request: RegisterRequest) -> Result<Vec<Lease>, String> {
        let response = self.tracker(member).register(self.subjects.home, request).await;
        response.map(|response| response.leases).map_err(|error| error.to_string())
    }

    async fn all_pieces_mean_finish(&self) -> Result<(), String> {
        let task = self.task(6);
        self.register(0, task, None).await?;
        self.report(0, task, None, all()).await?;
        let outcome = self.pull(0, task, true).await?;
        ensure(outcome == PullPieceResponse::Finish { geometry: geometry()? }, "who has everything is told to stop")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Cluster;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn the_in_memory_tracker_conforms() {
        let cluster = Cluster::default();
        let member = |byte| {
            let id = NodeId::from_bytes([byte; 16]);
            (id, cluster.node(id))
        };
        let subjects = Subjects { members: [member(1), member(2), member(3)], home: NodeId::from_bytes([1; 16]) };
        // Nothing in the in-memory tracker waits, so one poll is enough.
        let outcome = pin!(check(&subjects, 0)).poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(outcome, Poll::Ready(Ok(())));
    }
}
