//! What fetchers keep to themselves: a disk that hangs, or malice, and nobody else has the piece.

use std::time::{Duration, Instant};

use darter_tracker::{NodeId, PieceIndex, PullPieceRequest};

use super::swarm::Swarm;

/// A piece that its fetcher alone holds after this long, while a reader waits for it, is kept. Also on a slow way out the pieces
/// that nobody has go first, and a fetcher has few of them before the brake is on.
pub(super) const KEPT: Duration = Duration::from_secs(6);

impl Swarm {
    /// If the piece for which a reader of `asker` waits is kept by its fetcher, he has failed `asker`, and the home itself: that
    /// is enough to name him to nobody, so that what only he has is lent again.
    pub(super) fn find_keeper(&mut self, asker: NodeId, request: &PullPieceRequest, now: Instant) {
        let lacking = |piece: &PieceIndex| request.lacking.iter().any(|run| run.contains(*piece));
        let Some(piece) = request.urgent.filter(lacking) else { return };
        let old = |at: Instant| now.saturating_duration_since(at) >= KEPT;
        if !self.fetched_at(piece).is_some_and(old) {
            return;
        }
        let isolated = self.isolated(now);
        if self.reachable(piece, &isolated) != 1 {
            return;
        }
        let keeper = self.members_with(piece).find(|member| *member != asker && !isolated.contains(member));
        let Some(keeper) = keeper else { return };
        tracing::debug!(%keeper, piece = piece.0, "a fetcher gives nobody what it has fetched");
        self.blame(keeper, asker, now);
        // The home's own word stands under the name of whom it is about: nobody else's can.
        self.blame(keeper, keeper, now);
    }
}
