//! One live QUIC connection and who is using it; and the register of all connections with a peer.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use darter_tracker::NodeId;
use tokio::time::{Duration, Instant};

/// A live, mutually authenticated connection.
#[derive(Debug)]
pub(super) struct Link {
    /// The connection.
    pub(super) connection: quinn::Connection,
    /// The member at its other end.
    pub(super) peer: NodeId,
    /// How long it stays open without streams.
    pub(super) unused_max: Duration,
    uses: Mutex<Uses>,
}

/// The live connections, for whoever wants to know whether a peer is alive. The pools keep it up to date.
#[derive(Debug, Default)]
pub(super) struct Census {
    quic: Mutex<BTreeMap<NodeId, Vec<quinn::Connection>>>,
    tcp: Mutex<BTreeMap<NodeId, Tcp>>,
}

/// The TCP connections with one peer.
#[derive(Debug, Default)]
struct Tcp {
    /// Reads that brought something: what the peer's process, not its kernel, has sent.
    heard: Arc<AtomicU64>,
    /// Whether one that this agent dialled came about.
    proven: bool,
}

impl Census {
    pub(super) fn enter(&self, link: &Link) {
        self.with(|links| links.entry(link.peer).or_default().push(link.connection.clone()));
    }

    pub(super) fn strike(&self, link: &Link) {
        self.with(|links| {
            if let Some(of_peer) = links.get_mut(&link.peer) {
                of_peer.retain(|connection| connection.stable_id() != link.connection.stable_id());
                if of_peer.is_empty() {
                    links.remove(&link.peer);
                }
            }
        });
    }

    pub(super) fn clear(&self) {
        self.with(BTreeMap::clear);
    }

    /// UDP datagrams that have come on the live QUIC connections with `peer`, and reads on the TCP connections.
    pub(super) fn received(&self, peer: NodeId) -> u64 {
        let reads = self.with_tcp(|tcp| tcp.get(&peer).map_or(0, |tcp| tcp.heard.load(Ordering::Relaxed)));
        reads + self.datagrams(peer, |stats| stats.udp_rx.datagrams)
    }

    /// UDP datagrams that have gone out on the live QUIC connections with `peer`.
    pub(super) fn sent(&self, peer: NodeId) -> u64 {
        self.datagrams(peer, |stats| stats.udp_tx.datagrams)
    }

    fn datagrams(&self, peer: NodeId, counted: impl Fn(quinn::ConnectionStats) -> u64) -> u64 {
        self.with(|links| links.get(&peer).into_iter().flatten().map(|connection| counted(connection.stats())).sum())
    }

    /// What counts the reads on TCP connections with `peer`, until it is struck.
    pub(super) fn tcp(&self, peer: NodeId) -> Arc<AtomicU64> {
        self.with_tcp(|tcp| tcp.entry(peer).or_default().heard.clone())
    }

    /// Notes that `peer` can be reached over TCP.
    pub(super) fn prove(&self, peer: NodeId) {
        self.with_tcp(|tcp| tcp.entry(peer).or_default().proven = true);
    }

    /// Whether `peer` was reached over TCP, and there are connections still.
    pub(super) fn is_proven(&self, peer: NodeId) -> bool {
        self.with_tcp(|tcp| tcp.get(&peer).is_some_and(|tcp| tcp.proven))
    }

    pub(super) fn strike_tcp(&self, peer: NodeId) {
        self.with_tcp(|tcp| tcp.remove(&peer));
    }

    pub(super) fn clear_tcp(&self) {
        self.with_tcp(BTreeMap::clear);
    }

    fn with_tcp<T>(&self, act: impl FnOnce(&mut BTreeMap<NodeId, Tcp>) -> T) -> T {
        // Nothing that runs under the lock can panic halfway.
        act(&mut self.tcp.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<NodeId, Vec<quinn::Connection>>) -> T) -> T {
        // Nothing that runs under the lock can panic halfway.
        act(&mut self.quic.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Debug)]
struct Uses {
    count: usize,
    /// When `count` last became zero.
    since: Instant,
}

impl Link {
    pub(super) fn new(connection: quinn::Connection, peer: NodeId, unused_max: Duration) -> Arc<Self> {
        let uses = Mutex::new(Uses { count: 0, since: Instant::now() });
        Arc::new(Self { connection, peer, unused_max, uses })
    }

    /// Takes the link into use: it is not closed as unused before the result, and every clone of it, is dropped.
    pub(super) fn hold(self: &Arc<Self>) -> Use {
        self.with_uses(|uses| uses.count += 1);
        Use(self.clone())
    }

    /// Since when nobody uses the link; `None` while somebody does.
    pub(super) fn unused_since(&self) -> Option<Instant> {
        self.with_uses(|uses| (uses.count == 0).then_some(uses.since))
    }

    /// Whether the link is alive.
    pub(super) fn is_open(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    fn with_uses<T>(&self, act: impl FnOnce(&mut Uses) -> T) -> T {
        // Nothing that runs under the lock can panic halfway.
        act(&mut self.uses.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A share in a link, held by each half of each stream.
#[derive(Debug)]
pub(super) struct Use(Arc<Link>);

impl Use {
    pub(super) fn connection(&self) -> &quinn::Connection {
        &self.0.connection
    }
}

impl Clone for Use {
    fn clone(&self) -> Self {
        self.0.hold()
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.with_uses(|uses| {
            uses.count = uses.count.saturating_sub(1);
            if uses.count == 0 {
                uses.since = Instant::now();
            }
        });
    }
}
