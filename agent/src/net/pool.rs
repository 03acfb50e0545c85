//! Which connections there are. One task owns them all: it dials, accepts, hands them out for streams, closes those
//! that nobody uses, and forgets those that died.
//!
//! Two members that dial each other at the same moment end up with two connections. Both stay usable, since either
//! side may already have streams on either; each side opens new streams on the one that it knew first, and the other
//! is closed when it has been unused for long enough.

mod tasks;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use darter_tracker::NodeId;
use quinn::{Connection, ConnectionError, Endpoint, VarInt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Duration, Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use super::error::{Chain, NetError, close, is_refusal};
use super::keyed::Keyed;
use super::link::{Census, Link, Use};
use super::quic::{self, CONNECTIONS_MAX, HANDSHAKES_MAX, HANDSHAKES_UNVALIDATED_MAX, Timing};
use super::refusals::Refusals;
use super::tls::Tls;
use super::{Incoming, Peer};
use crate::admin::metrics::Metrics;

/// Dials at once. More would wait for the same second; their callers have the registry.
const DIALS_MAX: usize = 256;
/// Callers that wait for one dial.
const WAITING_MAX: usize = 1024;
/// Connections with one peer: two when both dial at once, and as many again while the dead ones of a cut cable are
/// not noticed yet.
const LINKS_PER_PEER_MAX: usize = 4;
/// How often unused connections are looked for, in parts of the time that they may be unused. An unused connection is
/// not taken into use again in the last part of its time: the other side may be closing it.
const SWEEPS: u32 = 12;
/// How long a closing transport waits for its peers to hear of it.
pub(crate) const CLOSE_MAX: Duration = Duration::from_secs(1);

/// A call of `Transport::open` that needs a connection.
#[derive(Debug)]
pub(super) struct OpenRequest {
    pub(super) peer: Peer,
    pub(super) reply: Reply,
}

type Reply = oneshot::Sender<Result<Use, NetError>>;

/// Names a link among all that this transport has had.
type LinkKey = (NodeId, u64);

/// What is known of one peer.
#[derive(Default)]
struct Entry {
    /// Live connections, the one for new streams first.
    links: Vec<(u64, Arc<Link>)>,
    /// Callers that wait for a dial.
    waiting: Vec<Reply>,
}

/// The owner of all connections.
pub(super) struct Pool {
    endpoint: Endpoint,
    tls: Arc<Tls>,
    timing: Timing,
    refusals: Refusals,
    streams: mpsc::Sender<Incoming>,
    census: Arc<Census>,
    peers: BTreeMap<NodeId, Entry>,
    /// Links made so far.
    made: u64,
    /// The share of a connection in the receive budget.
    window: VarInt,
    dials: Keyed<NodeId, tasks::Dialled>,
    handshakes: JoinSet<tasks::Shaken>,
    serving: Keyed<LinkKey, ConnectionError>,
    sweep: Interval,
}

/// Everything that makes the pool act.
enum Event {
    Open(OpenRequest),
    /// Boxed, since it is several times the size of the others.
    Knock(Box<quinn::Incoming>),
    Shaken(Result<tasks::Shaken, JoinError>),
    Dialled(NodeId, Result<tasks::Dialled, JoinError>),
    Ended(LinkKey, Result<ConnectionError, JoinError>),
    Sweep,
    Close,
}

impl Pool {
    /// A pool without connections that puts the streams of peers into `streams`.
    pub(super) fn new(
        endpoint: Endpoint,
        tls: Arc<Tls>,
        timing: Timing,
        metrics: Arc<Metrics>,
        streams: mpsc::Sender<Incoming>,
        census: Arc<Census>,
    ) -> Self {
        let mut sweep = tokio::time::interval(timing.unused / SWEEPS);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            endpoint,
            tls,
            timing,
            refusals: Refusals::new(metrics),
            streams,
            census,
            peers: BTreeMap::new(),
            made: 0,
            window: quic::receive_window(1),
            dials: Keyed::new(),
            handshakes: JoinSet::new(),
            serving: Keyed::new(),
            sweep,
        }
    }

    /// Serves `requests` until `closing`, until nobody is left to ask, or until the socket fails.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<OpenRequest>, closing: CancellationToken) {
        loop {
            match self.next(&mut requests, &closing).await {
                Event::Close => break,
                event => self.apply(event, Instant::now()),
            }
        }
        drop(requests);
        self.close().await;
    }

    async fn next(&mut self, requests: &mut mpsc::Receiver<OpenRequest>, closing: &CancellationToken) -> Event {
        tokio::select! {
            () = closing.cancelled() => Event::Close,
            request = requests.recv() => request.map_or(Event::Close, Event::Open),
            incoming = self.endpoint.accept() => incoming.map_or_else(
                || {
                    error!("the peer socket has failed");
                    Event::Close
                },
                |incoming| Event::Knock(Box::new(incoming)),
            ),
            Some(shaken) = self.handshakes.join_next() => Event::Shaken(shaken),
            (peer, dialled) = self.dials.next() => Event::Dialled(peer, dialled),
            (key, ended) = self.serving.next() => Event::Ended(key, ended),
            _ = self.sweep.tick() => Event::Sweep,
        }
    }

    fn apply(&mut self, event: Event, now: Instant) {
        match event {
            Event::Open(request) => self.open(request, now),
            Event::Knock(incoming) => self.knock(*incoming),
            Event::Shaken(Ok((remote, Ok(connection)))) => self.accepted(remote, connection, now),
            Event::Shaken(Ok((remote, Err(error)))) => self.failed(remote, &error, now),
            Event::Shaken(Err(panic)) => debug!(%panic, "a handshake was lost"),
            Event::Dialled(peer, Ok((remote, outcome))) => self.dialled(peer, remote, outcome, now),
            Event::Dialled(peer, Err(_)) => self.answer(peer, &NetError::Unreachable, now),
            Event::Ended(key, ended) => self.ended(key, ended, now),
            Event::Sweep => self.close_unused(now),
            Event::Close => {}
        }
        self.share_windows();
    }

    fn open(&mut self, OpenRequest { peer, reply }: OpenRequest, now: Instant) {
        if let Some(link) = self.usable(peer.id, now) {
            // A caller that is gone drops what it gets.
            let _ = reply.send(Ok(link.hold()));
            return;
        }
        let dialling = self.dials.contains(peer.id);
        if !dialling && (self.dials.len() >= DIALS_MAX || (self.is_full() && self.longest_unused().is_none())) {
            let _ = reply.send(Err(NetError::Full));
            return;
        }
        let waiting = &mut self.peers.entry(peer.id).or_default().waiting;
        waiting.retain(|reply| !reply.is_closed());
        if waiting.len() >= WAITING_MAX {
            let _ = reply.send(Err(NetError::Full));
            return;
        }
        waiting.push(reply);
        if !dialling {
            match self.tls.client(peer.id) {
                Ok((tls, verdict)) => {
                    let dial = tasks::dial(self.endpoint.clone(), tls, verdict, peer.addr, self.timing);
                    self.dials.spawn(peer.id, dial);
                }
                Err(error) => self.answer(peer.id, &error.into(), now),
            }
        }
    }

    fn knock(&mut self, incoming: quinn::Incoming) {
        let count = self.handshakes.len();
        if count >= HANDSHAKES_MAX {
            incoming.ignore();
        } else if count >= HANDSHAKES_UNVALIDATED_MAX && incoming.may_retry() {
            // Fails only for those that may not retry.
            let _ = incoming.retry();
        } else {
            self.handshakes.spawn(tasks::shake(incoming, self.timing.connect));
        }
    }

    fn accepted(&mut self, remote: SocketAddr, connection: Connection, now: Instant) {
        match self.tls.bearer(&tasks::shown(&connection)) {
            Ok(peer) => {
                // The side that dialled closes an unused connection first: it knows whether it is about to use it.
                self.admit(peer, connection, self.timing.unused + self.timing.unused / 4);
                self.answer_if_usable(peer, now);
            }
            Err(refusal) => {
                connection.close(close::STRANGER, b"stranger");
                self.refusals.note(remote.ip(), &refusal, now);
            }
        }
    }

    fn failed(&mut self, remote: SocketAddr, error: &ConnectionError, now: Instant) {
        if is_refusal(error) {
            self.refusals.note(remote.ip(), error, now);
        } else {
            debug!(%remote, %error, "an incoming connection was not made");
        }
    }

    fn dialled(&mut self, peer: NodeId, remote: SocketAddr, outcome: Result<Connection, NetError>, now: Instant) {
        let otherwise = match outcome {
            Ok(connection) if self.tls.bearer(&tasks::shown(&connection)) == Ok(peer) => {
                self.admit(peer, connection, self.timing.unused);
                NetError::Full
            }
            Ok(connection) => {
                // The verifier has seen to it already; this says it once more where the name is taken into use.
                connection.close(close::STRANGER, b"stranger");
                NetError::Protocol
            }
            Err(error) => error,
        };
        if let NetError::Refused(_) | NetError::RefusedByPeer = &otherwise {
            self.refusals.note(remote.ip(), &Chain(&otherwise), now);
        }
        self.answer(peer, &otherwise, now);
    }

    /// Takes a connection whose other end is `peer` into the pool, or closes it if there is no room.
    fn admit(&mut self, peer: NodeId, connection: Connection, unused_max: Duration) {
        let known = self.peers.get(&peer).map_or(0, |entry| entry.links.len());
        if known >= LINKS_PER_PEER_MAX || (self.is_full() && !self.make_room()) {
            connection.close(close::FULL, b"full");
            return;
        }
        self.made += 1;
        connection.set_receive_window(self.window);
        let link = Link::new(connection, peer, unused_max);
        self.census.enter(&link);
        self.serving.spawn((peer, self.made), tasks::serve(link.clone(), self.streams.clone()));
        self.peers.entry(peer).or_default().links.push((self.made, link));
    }

    fn ended(&mut self, (peer, number): LinkKey, ended: Result<ConnectionError, JoinError>, now: Instant) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        let at = entry.links.iter().position(|(other, _)| *other == number);
        let link = at.map(|at| entry.links.remove(at).1);
        self.forget_if_empty(peer);
        if let Some(link) = &link {
            self.census.strike(link);
        }
        if let (Some(link), Ok(error)) = (link, ended) {
            let remote = link.connection.remote_address();
            debug!(%peer, %remote, %error, "a connection ended");
            // A peer that does not accept this agent says so when this agent's side of the handshake is over.
            if is_refusal(&error) {
                self.refusals.note(remote.ip().to_canonical(), &error, now);
            }
        }
    }

    /// Answers everybody who waits for `peer`, with a link if there is one.
    fn answer(&mut self, peer: NodeId, otherwise: &NetError, now: Instant) {
        let link = self.usable(peer, now).cloned();
        let waiting = self.peers.get_mut(&peer).map(|entry| std::mem::take(&mut entry.waiting));
        for reply in waiting.into_iter().flatten() {
            let answer = link.as_ref().map(Link::hold).ok_or_else(|| otherwise.clone());
            let _ = reply.send(answer);
        }
        self.forget_if_empty(peer);
    }

    /// A peer that dialled us spares those who wait for our dial to it.
    fn answer_if_usable(&mut self, peer: NodeId, now: Instant) {
        if self.usable(peer, now).is_some() {
            self.answer(peer, &NetError::Full, now);
        }
    }

    /// The connection for new streams to `peer`.
    fn usable(&self, peer: NodeId, now: Instant) -> Option<&Arc<Link>> {
        self.peers.get(&peer)?.links.iter().map(|(_, link)| link).find(|link| {
            let unused = link.unused_since().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            link.is_open() && unused < self.timing.unused - self.timing.unused / SWEEPS
        })
    }

    fn close_unused(&mut self, now: Instant) {
        for (_, link) in self.peers.values().flat_map(|entry| &entry.links) {
            if link.unused_since().is_some_and(|since| now.saturating_duration_since(since) > link.unused_max) {
                link.connection.close(close::UNUSED, b"unused");
            }
        }
    }

    fn is_full(&self) -> bool {
        self.serving.len() >= CONNECTIONS_MAX
    }

    fn longest_unused(&self) -> Option<&Arc<Link>> {
        let links = self.peers.values().flat_map(|entry| &entry.links).map(|(_, link)| link);
        links
            .filter(|link| link.is_open())
            .filter_map(|link| Some((link.unused_since()?, link)))
            .min_by_key(|(since, _)| *since)
            .map(|(_, link)| link)
    }

    /// Closes the connection that was unused for longest; false if all are in use.
    fn make_room(&self) -> bool {
        let longest = self.longest_unused();
        if let Some(link) = longest {
            link.connection.close(close::UNUSED, b"unused");
        }
        longest.is_some()
    }

    fn share_windows(&mut self) {
        let window = quic::receive_window(self.serving.len());
        if window != self.window {
            self.window = window;
            for (_, link) in self.peers.values().flat_map(|entry| &entry.links) {
                link.connection.set_receive_window(window);
            }
        }
    }

    fn forget_if_empty(&mut self, peer: NodeId) {
        if self.peers.get(&peer).is_some_and(|entry| entry.links.is_empty() && entry.waiting.is_empty()) {
            self.peers.remove(&peer);
        }
    }

    async fn close(mut self) {
        self.dials.shutdown().await;
        self.handshakes.shutdown().await;
        self.endpoint.close(close::ENDING, b"ending");
        // Their connections are closed, which ends them.
        self.serving.drain().await;
        self.peers.clear();
        self.census.clear();
        if tokio::time::timeout(CLOSE_MAX, self.endpoint.wait_idle()).await.is_err() {
            debug!("some peers did not hear that this agent ends");
        }
    }
}
