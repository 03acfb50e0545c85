//! What a pull says of itself: how far it is, to the whole cluster; how it ended, to its clients and its home.

use std::time::Duration;

use darter_swarm::wire::SessionFrame;
use darter_tracker::{
    Added, ClientErrorRequest, ErrorKind, EventBody, PieceIndex, PieceRange, RegisterRequest, ReportPieceRequest,
    ServiceDownRequest, Tracker as _,
};
use tokio::task::{AbortHandle, JoinSet};

use super::Driver;
use crate::pull::PullError;
use crate::store::Outcome;

/// Progress is told to the cluster in quarters.
const QUARTERS: u64 = 4;

/// How long the goodbyes of a finished pull may take.
const FAREWELL: Duration = Duration::from_secs(1);

impl Driver {
    /// Tells the cluster what is held here, if the home has nominated this node for it (D4).
    pub(super) fn announce(&mut self) {
        let (Some(gossip), true) = (&self.context().gossip, self.advertise) else { return };
        let (task, geometry) = (*self.flight.blob.task(), self.core.geometry());
        let whole = self.flight.blob.state().borrow().outcome == Outcome::Complete;
        let counted = (u64::from(self.core.have().count()) * QUARTERS / u64::from(geometry.pieces())) as u8;
        // The last quarter is whole only when the digest of the whole has matched.
        let quarters = if whole { QUARTERS as u8 } else { counted.min(QUARTERS as u8 - 1) };
        if self.advertised.is_none() {
            gossip.publish(EventBody::Length { task, geometry });
            gossip.publish(EventBody::Start { task });
        }
        if quarters > self.advertised.unwrap_or(0) {
            gossip.publish(EventBody::Progress { task, quarters });
        }
        self.advertised = Some(quarters.max(self.advertised.unwrap_or(0)));
    }

    /// Tells the home that everything is here, and who vouched for other bytes if the blob had failed its digest before.
    fn tell_complete(&self) -> impl Future<Output = ()> + Send + 'static {
        let (task, geometry) = (*self.flight.blob.task(), *self.flight.blob.geometry());
        let tracker = self.context().tracker.clone();
        let have = self.flight.blob.held();
        let wrong = self.flights.settled(&self.flight.blob);
        let home = self.core.home();
        async move {
            let told = if let Some(home) = home {
                let pieces = PieceRange::gather(have.iter());
                let request = ReportPieceRequest { task, lease: None, pieces, release: false, pause: Added::default() };
                tracker.report_piece(home, request).await.map(|_| home)
            } else {
                // Fetched from the registry alone: the home does not know this node yet. An isolated node tries as well.
                let Some(home) = tracker.homes_if_reached(&task).first().copied() else { return };
                let request = RegisterRequest::new(task, Some(geometry), Some(have));
                tracker.register(home, request).await.map(|_| home)
            };
            let home = match told {
                Ok(home) => home,
                Err(error) => return tracing::debug!(%task, %error, "the home could not be told that the blob is here"),
            };
            for (piece, proof) in wrong {
                let (peer, pieces) = (proof.signer.node(), vec![PieceRange { first: piece, count: 1 }]);
                let request = ClientErrorRequest { task, peer, pieces, kind: ErrorKind::Mismatch };
                if let Err(error) = tracker.report_error(home, request).await {
                    tracing::debug!(%task, %peer, %error, "the home could not be told of a failure");
                }
            }
        }
    }

    /// Ends the pull: clients are told, the home is told, a poisoned blob is thrown away.
    pub(super) async fn conclude(mut self, outcome: Result<(), PullError>) {
        let task = *self.flight.blob.task();
        self.context().metrics.active_tasks.dec();
        // What it was told of it uses no more.
        self.seat.leave();
        self.seat.pass_on();
        match &outcome {
            Ok(()) => tracing::info!(%task, "the blob is complete"),
            Err(PullError::Resting) => tracing::info!(%task, "no client is left, the pull rests"),
            Err(error) => tracing::warn!(%task, %error, "the pull has ended"),
        }
        if outcome == Err(PullError::Poisoned) {
            self.flights.distrust(&self.flight.blob);
        }
        let mut last_words = JoinSet::new();
        if outcome.is_ok() {
            // The last pieces may not have reached the core before the digest matched.
            let all = vec![PieceRange { first: PieceIndex(0), count: self.core.geometry().pieces() }];
            self.sessions.retain(|_, news| news.try_send(SessionFrame::Have(all.clone())).is_ok());
            last_words.spawn(self.tell_complete());
        } else if let Some(home) = self.core.home() {
            let tracker = self.context().tracker.clone();
            last_words.spawn(async move {
                // A home that cannot be told finds out by what it names this node for.
                let _ = tracker.service_down(home, ServiceDownRequest { task }).await;
            });
        }
        // A refusal is worth nothing to a later client of the same pull, so the pull is closed to newcomers first.
        self.events.close();
        if let Err(error) = outcome {
            self.failed.send_replace(Some(error));
        } else {
            self.announce();
        }
        // Sessions end with a goodbye once their queues are sent.
        self.sessions.clear();
        self.runs.values().for_each(|open| open.job.abort());
        self.requests.values().for_each(AbortHandle::abort);
        // Turns that were not used are others'.
        self.lines.clear();
        let farewell = async {
            while last_words.join_next().await.is_some() {}
            while self.talks.join_next().await.is_some() {}
        };
        // Who does not listen by then finds out by asking.
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
        self.jobs.shutdown().await;
    }
}
