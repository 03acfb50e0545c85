//! Which run a member may fetch from the registry, and when one that may fetch none asks again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use darter_tracker::{NodeId, PieceIndex, PieceRange, PullPieceRequest};

use super::Swarm;
use crate::home::lease::{fetchers_max, run_length};
use crate::task::link::WAIT_MIN;

/// When to ask again while others fetch.
const RETRY_BASE: Duration = Duration::from_millis(500);

/// The same while the first piece is on its way: then others shall fetch as soon as it is there. (With 100 ms ten
/// nodes that restart one after the other fetched more a second time.)
const RETRY_FIRST: Duration = WAIT_MIN;

/// At least so long per member, so that a home of a thousand answers 1000 calls a second at most.
const RETRY_PER_MEMBER: Duration = Duration::from_millis(1);

impl Swarm {
    /// The run that `from` may fetch, if it is its turn.
    pub(super) fn next_run(
        &self,
        from: NodeId,
        request: &PullPieceRequest,
        distrusted: &BTreeSet<NodeId>,
        now: Instant,
        cluster_size: usize,
    ) -> Option<PieceRange> {
        let geometry = self.geometry?;
        let free = |piece: PieceIndex, distrusted: &BTreeSet<NodeId>, urgent: bool| {
            geometry.contains(piece)
                && !self.holds(from, piece)
                && (!self.leases.covers(piece, distrusted) || urgent && self.leases.silent(piece, now))
                && self.reachable(piece, distrusted) == 0
                && !self.bridge.claims(piece, now)
        };
        let settling = self.settling.is_some_and(|until| now < until);
        let isolated = self.isolated(now);
        if let Some(first) = request.urgent.filter(|piece| free(*piece, distrusted, true)) {
            let single = settling || self.leases.has(from) || isolated.contains(&from);
            let longest = if single { 1 } else { run_length(&geometry, geometry.pieces(), cluster_size) };
            let most = longest.min(self.leases.urgent_length(first));
            let rest = (first.0 + 1..).take(most as usize - 1).map(PieceIndex);
            let rest = rest.take_while(|piece| free(*piece, distrusted, false));
            return Some(PieceRange { first, count: 1 + rest.count() as u32 });
        }
        let full = self.leases.fetchers() >= fetchers_max(cluster_size) || self.first_alone(now);
        if settling || full || self.leases.has(from) {
            return None;
        }
        // What a holder does not give to this one member others will pass on. Only what none of them could get from him is
        // fetched a second time, beside what a reader waits for.
        if isolated.contains(&from) {
            return None;
        }
        let mut open: Vec<PieceIndex> =
            (0..geometry.pieces()).map(PieceIndex).filter(|piece| free(*piece, &isolated, false)).collect();
        let first = self.bridge.first(now);
        let before = open.partition_point(|piece| piece.0 < first);
        open.rotate_left(before);
        let length = run_length(&geometry, open.len() as u32, cluster_size);
        let first = PieceRange::gather(open).into_iter().next()?;
        Some(PieceRange { first: first.first, count: first.count.min(length) })
    }

    /// Whether the first piece is on its way to the first fetcher, who is left alone with it. Where this home took over there was
    /// something before, which may come to light yet.
    fn first_alone(&self, now: Instant) -> bool {
        self.settling.is_none() && !self.has_holders() && self.leases.first_alone(now)
    }

    /// When a member that was lent nothing shall ask again.
    pub(super) fn retry_after(&self, now: Instant) -> Duration {
        let base = if self.first_alone(now) { RETRY_FIRST } else { RETRY_BASE };
        base.max(RETRY_PER_MEMBER * self.members.len() as u32)
    }
}
