//! Which homes a pull asks, and whether those who owe it an answer are alive.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use darter_swarm::wire::SessionFrame;
use darter_tracker::{Added, ErrorKind, NodeId, PullPieceResponse, RegistryTag};

use super::{Driver, Event};
use crate::admin::metrics::FallbackReason;

impl Driver {
    /// Lets the core know who of those who owe an answer is alive: packets come from them, if only acknowledgements.
    pub(super) fn feel_pulse(&mut self) {
        let Some(transport) = self.context().transport.clone() else { return };
        let now = Instant::now();
        let received: BTreeMap<NodeId, u64> =
            self.core.debtors().into_iter().map(|peer| (peer, transport.received(peer))).collect();
        for (peer, packets) in &received {
            if self.received.get(peer).is_some_and(|before| packets > before) {
                self.core.handle_alive(*peer, now);
            }
        }
        self.received = received;
    }

    /// Goes on with the registry alone while this node isolates itself.
    pub(super) fn reconsider_isolation(&mut self) {
        let isolated = self.context().tracker.is_isolated();
        if isolated != self.isolated && !self.alone {
            self.isolated = isolated;
            if isolated {
                self.context().metrics.fallback(FallbackReason::Isolated);
            }
            self.reconsider_homes();
        }
    }

    /// Lets the node know whether others answer it.
    pub(super) fn judge(&self, event: &Event) {
        let tracker = &self.context().tracker;
        match event {
            Event::Unreachable(peer)
            | Event::NoTurn(peer, Some(ErrorKind::Unreachable))
            | Event::PieceFailed(peer, _, Some(ErrorKind::Unreachable)) => tracker.member_failed(*peer),
            Event::Session(_) | Event::Connected(_) | Event::Turn(..) | Event::Piece(..) => tracker.member_answered(),
            _ => {}
        }
    }

    /// The registry that this pull would ask now.
    pub(super) fn registry(&self) -> Option<RegistryTag> {
        let origin = self.origins.best()?;
        self.context().upstream.origin_of(&origin.url).ok().map(|origin| RegistryTag::of(&origin))
    }

    /// What a home says of the registry that this pull asks; that another one wants to be left alone does not concern it.
    pub(super) fn meant(&mut self, mut response: PullPieceResponse) -> PullPieceResponse {
        if let PullPieceResponse::Wait { retry_after, paused, .. } = &mut response
            && let (Some(pause), Some(registry)) = (paused.0, self.registry())
            && pause.registry != registry
        {
            self.other_registry = true;
            // Asked again as soon as may be, now that the home is told which one is meant.
            (*paused, *retry_after) = (Added::default(), Duration::ZERO);
        }
        response
    }

    /// Members have come or gone.
    pub(super) fn reconsider_homes(&mut self) {
        if self.alone {
            return;
        }
        if self.isolated {
            return self.core.handle_homes(Vec::new(), Instant::now());
        }
        let tracker = &self.context().tracker;
        let homes = tracker.homes(self.flight.blob.task());
        let present = self.core.registered_home();
        let is_member = present.is_some_and(|home| homes.contains(&home) || tracker.peer(home).is_some());
        self.core.handle_members(homes, is_member, Instant::now());
    }

    /// Where neighbours have other homes, the one of the highest rank shall be everybody's.
    pub(super) fn compare_homes(&mut self) {
        let Some(ours) = self.core.registered_home().filter(|_| !self.alone) else { return };
        let (tracker, task) = (&self.context().tracker, self.flight.blob.task());
        let best = tracker.best(task, self.core.other_homes(Instant::now()).into_iter().chain([ours]));
        if let Some(theirs) = best.filter(|best| *best != ours) {
            tracing::debug!(%task, %theirs, %ours, "neighbours have a home of higher rank");
            let homes = tracker.homes(task);
            self.core.handle_rival(theirs, homes, Instant::now());
        }
    }

    /// Tells the neighbours if another home has this node on its list.
    pub(super) fn tell_home(&mut self) {
        let home = self.core.registered_home();
        if home.is_some() && home != self.told_home {
            self.told_home = home;
            let frame = home.map(SessionFrame::Home);
            self.sessions.retain(|_, news| frame.clone().is_none_or(|frame| news.try_send(frame).is_ok()));
            self.compare_homes();
        }
    }
}
