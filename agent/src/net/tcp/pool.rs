//! Which TCP connections there are. One task owns them all: it dials, accepts, hands them out for streams, takes them back,
//! closes those that nobody uses, and remembers for a while who cannot be reached in this way.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use darter_tracker::NodeId;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinError;
use tokio::time::{Duration, Instant, Interval, MissedTickBehavior};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::conn::{Conn, tls_error};
use super::half::open_halves;
use super::tasks::{self, Dial, Shown};
use super::{CONNECTIONS_MAX, DIALS_MAX, HANDSHAKES_MAX, HANDSHAKES_PER_ADDRESS_MAX, LINKS_PER_PEER_MAX};
use crate::admin::metrics::Metrics;
use crate::net::error::{Chain, NetError};
use crate::net::frame::Stream;
use crate::net::keyed::Keyed;
use crate::net::link::Census;
use crate::net::quic::Timing;
use crate::net::refusals::Refusals;
use crate::net::tls::Tls;
use crate::net::way::PATIENCE;
use crate::net::{Incoming, Peer};

/// How long a peer that could not be reached is not dialled again. It has another name when it was restarted, so this is
/// about what lies between: a firewall that is being changed.
const FAILED_FOR: Duration = Duration::from_secs(300);
/// Peers that this is remembered of; of more, the one that it was remembered of first is dialled again.
const FAILED_MAX: usize = 4096;
/// Callers that wait for a connection with one peer.
const WAITING_MAX: usize = 64;
/// A connection is unused no longer than this part of the time that a QUIC connection may be: one is for one stream, so
/// there are more of them, and a new one takes milliseconds.
const UNUSED_PART: u32 = 3;
/// How often unused connections are looked for, in parts of that time; see the QUIC pool.
const SWEEPS: u32 = 12;
/// Pause after the system could not accept a connection, such as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A call for a stream, or merely for a connection that there is none of.
#[derive(Debug)]
pub(in crate::net) struct OpenRequest {
    pub(in crate::net) peer: Peer,
    pub(in crate::net) reply: Option<Reply>,
}

type Reply = oneshot::Sender<Result<Stream, Failure>>;

/// Why there is no stream over TCP.
#[derive(Debug, Clone)]
pub(in crate::net) enum Failure {
    /// Nobody listens there: the member is of an earlier version, or has been told to use QUIC.
    Closed,
    /// Nobody answers: something in between lets nothing through.
    Silent,
    /// It has taken longer than a stream waits, and goes on.
    Slow,
    /// One of the two has no connection to spare.
    Full,
    /// One of the two did not accept who the other is.
    Refused(NetError),
    /// It did not get as far as that.
    Broken,
    /// It was one of the above a while ago, and has not been tried again.
    Remembered,
    /// This transport is being closed.
    Ending,
}

/// What is known of one peer.
#[derive(Default)]
struct Entry {
    /// Connections that this agent dialled and nobody uses, the one used last at the end.
    idle: Vec<(Instant, Conn)>,
    /// Callers that wait for one.
    waiting: VecDeque<Reply>,
    lent: usize,
    dialling: usize,
    /// Since when there is a dial.
    dialling_since: Option<Instant>,
    accepted: usize,
}

impl Entry {
    fn dialled(&self) -> usize {
        self.idle.len() + self.lent + self.dialling
    }

    fn dial_began(&mut self, now: Instant) {
        self.dialling += 1;
        self.dialling_since.get_or_insert(now);
    }

    fn dial_ended(&mut self) {
        self.dialling -= 1;
        if self.dialling == 0 {
            self.dialling_since = None;
        }
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.dialled() + self.accepted == 0
    }
}

/// The owner of all TCP connections.
pub(in crate::net) struct Pool {
    listener: TcpListener,
    listen: SocketAddr,
    acceptor: TlsAcceptor,
    tls: Arc<Tls>,
    timing: Timing,
    metrics: Arc<Metrics>,
    refusals: Refusals,
    streams: mpsc::Sender<Incoming>,
    census: Arc<Census>,
    peers: BTreeMap<NodeId, Entry>,
    failed: BTreeMap<NodeId, Instant>,
    made: u64,
    dials: Keyed<(NodeId, u64), tasks::Dialled>,
    handshakes: Keyed<(IpAddr, u64), tasks::Shaken>,
    lent: Keyed<(NodeId, u64), Result<Conn, NetError>>,
    serving: Keyed<(NodeId, u64), NetError>,
    sweep: Interval,
    /// Until when no connections are accepted.
    deaf_until: Instant,
    closing: CancellationToken,
}

enum Event {
    Open(OpenRequest),
    Knock(io::Result<(TcpStream, SocketAddr)>),
    Shaken(Result<tasks::Shaken, JoinError>),
    Dialled(NodeId, Result<tasks::Dialled, JoinError>),
    Back(NodeId, Result<Result<Conn, NetError>, JoinError>),
    Ended(NodeId, Result<NetError, JoinError>),
    Sweep,
    Close,
}

impl Pool {
    /// A pool without connections that puts the streams of peers into `streams`.
    pub(in crate::net) fn new(
        (listener, listen): (TcpListener, SocketAddr),
        (server, tls): (rustls::ServerConfig, Arc<Tls>),
        timing: Timing,
        metrics: Arc<Metrics>,
        streams: mpsc::Sender<Incoming>,
        census: Arc<Census>,
        closing: CancellationToken,
    ) -> Self {
        let mut sweep = tokio::time::interval(timing.unused / UNUSED_PART / SWEEPS);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            listener,
            listen,
            acceptor: Arc::new(server).into(),
            tls,
            timing,
            refusals: Refusals::new(metrics.clone()),
            metrics,
            streams,
            census,
            peers: BTreeMap::new(),
            failed: BTreeMap::new(),
            made: 0,
            dials: Keyed::new(),
            handshakes: Keyed::new(),
            lent: Keyed::new(),
            serving: Keyed::new(),
            sweep,
            deaf_until: Instant::now(),
            closing,
        }
    }

    /// Serves `requests` until the transport closes, or until nobody is left to ask. Then all connections are cut.
    pub(in crate::net) async fn run(mut self, mut requests: mpsc::Receiver<OpenRequest>) {
        loop {
            let event = self.next(&mut requests).await;
            if matches!(event, Event::Close) {
                break;
            }
            self.apply(event, Instant::now());
            self.metrics.tcp_connections.set(i64::try_from(self.connections()).unwrap_or(i64::MAX));
        }
        drop(requests);
        // Also where it ends for want of somebody to ask.
        self.closing.cancel();
        self.dials.shutdown().await;
        self.handshakes.shutdown().await;
        // The token ends them.
        self.lent.drain().await;
        self.serving.drain().await;
        self.census.clear_tcp();
        self.metrics.tcp_connections.set(0);
    }

    async fn next(&mut self, requests: &mut mpsc::Receiver<OpenRequest>) -> Event {
        let knock = async {
            tokio::time::sleep_until(self.deaf_until).await;
            self.listener.accept().await
        };
        tokio::select! {
            () = self.closing.cancelled() => Event::Close,
            request = requests.recv() => request.map_or(Event::Close, Event::Open),
            knocked = knock => Event::Knock(knocked),
            (_, shaken) = self.handshakes.next() => Event::Shaken(shaken),
            ((peer, _), dialled) = self.dials.next() => Event::Dialled(peer, dialled),
            ((peer, _), back) = self.lent.next() => Event::Back(peer, back),
            ((peer, _), ended) = self.serving.next() => Event::Ended(peer, ended),
            _ = self.sweep.tick() => Event::Sweep,
        }
    }

    fn apply(&mut self, event: Event, now: Instant) {
        match event {
            Event::Open(request) => {
                let peer = request.peer.id;
                self.open(request, now);
                self.forget_if_empty(peer);
            }
            Event::Knock(Ok((stream, remote))) => self.knock(stream, remote),
            Event::Knock(Err(error)) => {
                debug!(%error, "a TCP connection was not accepted");
                self.deaf_until = now + ACCEPT_PAUSE;
            }
            Event::Shaken(Ok((remote, Ok(shown)))) => self.accepted(remote, shown, now),
            Event::Shaken(Ok((remote, Err(error)))) => self.failed_handshake(remote, &error, now),
            Event::Shaken(Err(panic)) => debug!(%panic, "a handshake was lost"),
            Event::Dialled(peer, outcome) => {
                self.count(peer, Entry::dial_ended);
                self.dialled(peer, outcome, now);
                self.forget_if_empty(peer);
            }
            Event::Back(peer, back) => {
                self.count(peer, |entry| entry.lent -= 1);
                self.take_back(peer, back, now);
                self.forget_if_empty(peer);
            }
            Event::Ended(peer, ended) => {
                debug!(%peer, ?ended, "an accepted TCP connection ended");
                self.count(peer, |entry| entry.accepted -= 1);
                self.forget_if_empty(peer);
            }
            Event::Sweep => self.close_unused(now),
            Event::Close => {}
        }
    }

    // === Streams of this agent ===

    fn open(&mut self, OpenRequest { peer, reply }: OpenRequest, now: Instant) {
        let failed = self.failed.get(&peer.id).is_some_and(|since| now.duration_since(*since) < FAILED_FOR);
        let Some(reply) = reply else {
            if !failed && self.peers.get(&peer.id).is_none_or(|entry| entry.dialled() == 0) {
                // Why not, whoever wants a stream is told.
                let _ = self.dial(peer, now);
            }
            return;
        };
        if reply.is_closed() {
            return;
        }
        if failed {
            // A caller that is gone drops what it gets.
            let _ = reply.send(Err(Failure::Remembered));
            return;
        }
        let proven = self.census.is_proven(peer.id);
        let entry = self.peers.entry(peer.id).or_default();
        // Nobody waits anew for what others have waited for in vain.
        if !proven && entry.dialling_since.is_some_and(|since| now.duration_since(since) >= PATIENCE) {
            let _ = reply.send(Err(Failure::Slow));
            return;
        }
        while let Some((since, mut conn)) = entry.idle.pop() {
            if now.duration_since(since) < self.timing.unused / UNUSED_PART && conn.is_usable() {
                return self.lend(peer.id, conn, reply);
            }
        }
        entry.waiting.retain(|reply| !reply.is_closed());
        // One that is being dialled, and that nobody waits for, is for this caller.
        let dialled = if entry.waiting.len() < entry.dialling {
            Ok(())
        } else if entry.waiting.len() < WAITING_MAX {
            self.dial(peer, now)
        } else {
            Err(Failure::Full)
        };
        if let Err(failure) = dialled {
            let _ = reply.send(Err(failure));
            return;
        }
        self.peers.entry(peer.id).or_default().waiting.push_back(reply);
    }

    /// Begins to dial.
    fn dial(&mut self, peer: Peer, now: Instant) -> Result<(), Failure> {
        let room = self.peers.get(&peer.id).is_none_or(|entry| entry.dialled() < LINKS_PER_PEER_MAX);
        if !room || self.dials.len() >= DIALS_MAX || (self.is_full() && !self.make_room()) {
            return Err(Failure::Full);
        }
        let (tls, verdict) = self.tls.client(peer.id).map_err(|_| Failure::Broken)?;
        let (heard, known) = (self.census.tcp(peer.id), self.tls.clone());
        let order =
            Dial { listen: self.listen, remote: peer.addr, peer: peer.id, tls, verdict, heard, timing: self.timing };
        self.peers.entry(peer.id).or_default().dial_began(now);
        self.made += 1;
        self.dials.spawn((peer.id, self.made), tasks::dial(order, move |shown| known.bearer(shown).ok()));
        Ok(())
    }

    fn dialled(&mut self, peer: NodeId, outcome: Result<tasks::Dialled, JoinError>, now: Instant) {
        let (remote, outcome) = match outcome {
            Ok((remote, outcome)) => (Some(remote), outcome),
            Err(_) => (None, Err(Failure::Broken)),
        };
        let failure = match outcome {
            Ok(conn) => return self.put(peer, conn, now),
            Err(failure) => failure,
        };
        debug!(%peer, ?failure, "no TCP connection");
        if let (Failure::Refused(error), Some(remote)) = (&failure, remote) {
            self.refusals.note(remote.ip(), &Chain(error), now);
        }
        if !matches!(failure, Failure::Full) && !self.census.is_proven(peer) {
            self.remember(peer, now);
        }
        let entry = self.peers.entry(peer).or_default();
        // Further dials may end better than this one; each of them is for one caller.
        while entry.waiting.len() > entry.dialling {
            let Some(reply) = entry.waiting.pop_front() else { break };
            let _ = reply.send(Err(failure.clone()));
        }
    }

    fn take_back(&mut self, peer: NodeId, back: Result<Result<Conn, NetError>, JoinError>, now: Instant) {
        match back {
            Ok(Ok(conn)) => self.put(peer, conn, now),
            Ok(Err(error)) => debug!(%peer, %error, "a TCP connection ended"),
            Err(panic) => debug!(%panic, "a TCP connection was lost"),
        }
    }

    /// Gives a connection to whoever waits for one, or keeps it.
    fn put(&mut self, peer: NodeId, conn: Conn, now: Instant) {
        self.census.prove(peer);
        let entry = self.peers.entry(peer).or_default();
        while let Some(reply) = entry.waiting.pop_front() {
            if !reply.is_closed() {
                return self.lend(peer, conn, reply);
            }
        }
        entry.idle.push((now, conn));
    }

    fn lend(&mut self, peer: NodeId, conn: Conn, reply: Reply) {
        let (send, receive, lent) = open_halves(conn);
        self.made += 1;
        self.lent.spawn((peer, self.made), tasks::over(lent, self.timing, self.closing.clone()));
        self.peers.entry(peer).or_default().lent += 1;
        // A caller that is gone drops the stream, which brings the connection back.
        let _ = reply.send(Ok(Stream::tcp(send, receive)));
    }

    fn remember(&mut self, peer: NodeId, now: Instant) {
        if self.failed.len() >= FAILED_MAX {
            self.failed.retain(|_, since| now.duration_since(*since) < FAILED_FOR);
        }
        if self.failed.len() >= FAILED_MAX
            && let Some(oldest) = self.failed.iter().min_by_key(|(_, since)| **since).map(|(peer, _)| *peer)
        {
            self.failed.remove(&oldest);
        }
        self.failed.insert(peer, now);
    }

    // === Connections of peers ===

    fn knock(&mut self, stream: TcpStream, remote: SocketAddr) {
        let address = remote.ip().to_canonical();
        let of_address = self.handshakes.keys().filter(|(other, _)| *other == address).count();
        // Dropped, the connection is closed. A member uses QUIC meanwhile.
        if self.handshakes.len() < HANDSHAKES_MAX && of_address < HANDSHAKES_PER_ADDRESS_MAX {
            self.made += 1;
            let shaking = tasks::shake(stream, remote, self.acceptor.clone(), self.timing);
            self.handshakes.spawn((address, self.made), shaking);
        }
    }

    fn accepted(&mut self, remote: SocketAddr, shown: Shown, now: Instant) {
        let peer = match self.tls.bearer(&shown.certificates) {
            Ok(peer) => peer,
            Err(refusal) => {
                self.refusals.note(remote.ip(), &refusal, now);
                return;
            }
        };
        let conn = Conn::new(shown.tls, peer, remote, self.census.tcp(peer));
        let of_peer = self.peers.get(&peer).map_or(0, |entry| entry.accepted);
        if of_peer >= LINKS_PER_PEER_MAX || (self.is_full() && !self.make_room()) {
            tasks::turn_away(conn);
            self.forget_if_empty(peer);
            return;
        }
        self.peers.entry(peer).or_default().accepted += 1;
        self.made += 1;
        // The side that dialled closes an unused connection first: it knows whether it is about to use it.
        let unused_max = self.timing.unused / UNUSED_PART * 5 / 4;
        let serving = tasks::serve(conn, self.streams.clone(), unused_max, self.timing, self.closing.clone());
        self.serving.spawn((peer, self.made), serving);
    }

    fn failed_handshake(&mut self, remote: SocketAddr, error: &io::Error, now: Instant) {
        if let Some(reason) = tls_error(error) {
            self.refusals.note(remote.ip(), reason, now);
        } else {
            debug!(%remote, %error, "an incoming TCP connection was not made");
        }
    }

    // === All of them ===

    fn connections(&self) -> usize {
        self.lent.len() + self.serving.len() + self.dials.len() + self.idle().count()
    }

    /// Unused connections, with their peers and since when they are unused.
    fn idle(&self) -> impl Iterator<Item = (NodeId, Instant)> {
        self.peers.iter().flat_map(|(peer, entry)| entry.idle.iter().map(|(since, _)| (*peer, *since)))
    }

    fn is_full(&self) -> bool {
        self.connections() >= CONNECTIONS_MAX
    }

    /// Closes the connection that was unused for longest; false if all are in use.
    fn make_room(&mut self) -> bool {
        let Some((peer, _)) = self.idle().min_by_key(|(_, since)| *since) else { return false };
        self.count(peer, |entry| drop(entry.idle.remove(0)));
        true
    }

    fn close_unused(&mut self, now: Instant) {
        let unused_max = self.timing.unused / UNUSED_PART;
        for entry in self.peers.values_mut() {
            entry.idle.retain_mut(|(since, conn)| now.duration_since(*since) < unused_max && conn.is_usable());
        }
        let empty: Vec<NodeId> =
            self.peers.iter().filter(|(_, entry)| entry.is_empty()).map(|(peer, _)| *peer).collect();
        for peer in empty {
            self.forget_if_empty(peer);
        }
    }

    fn count(&mut self, peer: NodeId, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.peers.get_mut(&peer) {
            change(entry);
        }
    }

    /// Forgets a peer that there is no connection with. What is counted of it is not taken away while there is one.
    fn forget_if_empty(&mut self, peer: NodeId) {
        if self.peers.get(&peer).is_none_or(Entry::is_empty) {
            self.peers.remove(&peer);
            self.census.strike_tcp(peer);
        }
    }
}
