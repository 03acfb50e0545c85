//! What the agent counts. One struct, made by the composition root and handed to whoever counts.
//!
//! Labels come from closed sets, so no client can grow the number of series.

use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// Where a piece came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum PieceOrigin {
    /// The registry.
    Registry,
    /// Another member.
    Peer,
    /// The disk, after a restart.
    Disk,
}

/// Why the registry was asked although the swarm was meant to deliver (D11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum FallbackReason {
    /// The task's home did not answer in time.
    HomeSilent,
    /// No peer delivered within a reader's budget.
    PeersSlow,
    /// This node has failed with everybody it asked, and asks the registry alone for a while.
    Isolated,
    /// The blob failed its digest and is fetched again.
    Poisoned,
    /// No pull could begin (no room in the cache, a blob that is not for the swarm, a registry without ranges, a refusal):
    /// the client got the registry's own answer.
    NoCache,
}

impl FallbackReason {
    /// All of them: each is a series from the start, so that its first count is seen as a rise.
    const ALL: [Self; 4] = [Self::HomeSilent, Self::PeersSlow, Self::Poisoned, Self::NoCache];
}

/// Why a stream that was meant for TCP went over QUIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum TcpFallback {
    /// The member does not listen there.
    Closed,
    /// Nothing comes back from there.
    Silent,
    /// No connection could be spared, here or there.
    Full,
    /// One of the two did not accept the other.
    Refused,
    /// The connection broke before it was made.
    Broken,
    /// One of the above, a while ago.
    Remembered,
    /// It was not there soon enough; the next stream may have it.
    Slow,
}

/// Which transport bytes went over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Carrier {
    /// QUIC.
    Quic,
    /// TLS over TCP.
    Tcp,
}

impl From<crate::net::Way> for Carrier {
    fn from(way: crate::net::Way) -> Self {
        match way {
            crate::net::Way::Quic => Self::Quic,
            crate::net::Way::Tcp => Self::Tcp,
        }
    }
}

/// Why a gossip datagram was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum DropReason {
    /// Too short, another version, or an unknown kind.
    Malformed,
    /// Its clear key id is none of ours: another cluster on the same network.
    OtherCluster,
    /// It did not open under the key that it names.
    Forged,
    /// It was seen before, or is too old to tell.
    Replayed,
    /// A bound was reached.
    Full,
}

/// Label `source`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabel {
    /// Where from.
    pub source: PieceOrigin,
}

/// Label `reason` of fallbacks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FallbackLabel {
    /// Why.
    pub reason: FallbackReason,
}

/// Label `reason` of streams over QUIC instead of TCP.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TcpFallbackLabel {
    /// Why.
    pub reason: TcpFallback,
}

/// Label `transport`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TransportLabel {
    /// Over what.
    pub transport: Carrier,
}

/// Label `reason` of dropped datagrams.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DropLabel {
    /// Why.
    pub reason: DropReason,
}

/// Every counter and gauge of the agent. Cloning a field is cheap and counts into the same series.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Blob bytes read from registries for the swarm.
    pub registry_bytes: Counter<u64, AtomicU64>,
    /// Piece bytes received from peers and found right.
    pub peer_received_bytes: Counter<u64, AtomicU64>,
    /// Piece bytes received from peers and found wrong.
    pub peer_wrong_bytes: Counter<u64, AtomicU64>,
    /// Piece bytes sent to peers.
    pub peer_sent_bytes: Counter<u64, AtomicU64>,
    /// Piece bytes received from peers and found right, by transport.
    pub received_over: Family<TransportLabel, Counter<u64, AtomicU64>>,
    /// Piece bytes sent to peers, by transport.
    pub sent_over: Family<TransportLabel, Counter<u64, AtomicU64>>,
    /// Pieces that may leave for peers at a time.
    pub upload_slots: Gauge<i64, AtomicI64>,
    /// Open TCP connections with peers, in both directions.
    pub tcp_connections: Gauge<i64, AtomicI64>,
    /// Streams that went over QUIC instead of TCP, by reason.
    pub tcp_fallbacks: Family<TcpFallbackLabel, Counter<u64, AtomicU64>>,
    /// Blob bytes sent to clients from the store.
    pub client_bytes: Counter<u64, AtomicU64>,
    /// Bytes sent to clients straight from an upstream, without the swarm.
    pub passed_bytes: Counter<u64, AtomicU64>,
    /// Bytes of layers that were started before a client asked for them, and that it then did not ask for.
    pub unread_bytes: Counter<u64, AtomicU64>,
    /// Layers that were started before a client asked for them.
    pub ahead: Counter<u64, AtomicU64>,
    /// Requests to registries for blob bytes.
    pub registry_requests: Counter<u64, AtomicU64>,
    /// Pieces stored, by source.
    pub pieces: Family<SourceLabel, Counter<u64, AtomicU64>>,
    /// Fallbacks to the registry, by reason.
    pub fallbacks: Family<FallbackLabel, Counter<u64, AtomicU64>>,
    /// Live members, this one included.
    pub members: Gauge<i64, AtomicI64>,
    /// Times that this node failed with everybody it asked, and turned to the registry alone.
    pub isolations: Counter<u64, AtomicU64>,
    /// Members that this one took out of its list: declared dead, gone by themselves, or replaced by a new process.
    pub members_lost: Counter<u64, AtomicU64>,
    /// Addresses that discovery has found.
    pub seeds: Gauge<i64, AtomicI64>,
    /// Blobs that other live members are known to have or to be getting, by gossip. As of the last look at it.
    pub known_tasks: Gauge<i64, AtomicI64>,
    /// Those members, counted once for each such blob.
    pub holders: Gauge<i64, AtomicI64>,
    /// Pulls in progress.
    pub active_tasks: Gauge<i64, AtomicI64>,
    /// Blobs thrown out of the cache.
    pub evictions: Counter<u64, AtomicU64>,
    /// Blobs that did not match their digest.
    pub poisoned: Counter<u64, AtomicU64>,
    /// Gossip datagrams dropped, by reason.
    pub gossip_dropped: Family<DropLabel, Counter<u64, AtomicU64>>,
    /// Events that this node wanted to gossip and could not.
    pub gossip_events_dropped: Counter<u64, AtomicU64>,
    /// Peers refused at the handshake.
    pub peers_refused: Counter<u64, AtomicU64>,
    /// Times that the cluster knew what a tag means, so that the registry was not asked.
    pub tags_known: Counter<u64, AtomicU64>,
    /// Requests that the agent refused a client, such as malformed digests or forbidden hosts.
    pub client_refusals: Counter<u64, AtomicU64>,
}

impl Metrics {
    /// Counts one fallback.
    pub fn fallback(&self, reason: FallbackReason) {
        self.fallbacks.get_or_create(&FallbackLabel { reason }).inc();
    }

    /// Counts one stream that went over QUIC instead of TCP.
    pub fn tcp_fallback(&self, reason: TcpFallback) {
        self.tcp_fallbacks.get_or_create(&TcpFallbackLabel { reason }).inc();
    }

    /// Counts a piece that came from a peer and was right.
    pub fn received(&self, way: crate::net::Way, bytes: u64) {
        self.peer_received_bytes.inc_by(bytes);
        self.received_over.get_or_create(&TransportLabel { transport: way.into() }).inc_by(bytes);
    }

    /// Counts a piece that was sent to a peer.
    pub fn sent(&self, way: crate::net::Way, bytes: u64) {
        self.peer_sent_bytes.inc_by(bytes);
        self.sent_over.get_or_create(&TransportLabel { transport: way.into() }).inc_by(bytes);
    }

    /// Counts one stored piece.
    pub fn piece(&self, source: PieceOrigin) {
        self.pieces.get_or_create(&SourceLabel { source }).inc();
    }

    /// Counts one dropped datagram.
    pub fn dropped(&self, reason: DropReason) {
        self.gossip_dropped.get_or_create(&DropLabel { reason }).inc();
    }

    /// A registry that exposes all of it under the prefix `darter_`.
    #[must_use]
    pub fn exposition(&self) -> Registry {
        for reason in FallbackReason::ALL {
            // Made, and let go.
            drop(self.fallbacks.get_or_create(&FallbackLabel { reason }));
        }
        for transport in [Carrier::Quic, Carrier::Tcp] {
            drop(self.received_over.get_or_create(&TransportLabel { transport }));
            drop(self.sent_over.get_or_create(&TransportLabel { transport }));
        }
        let mut registry = Registry::with_prefix("darter");
        let bytes = Unit::Bytes;
        registry.register_with_unit(
            "registry_received",
            "Blob bytes read from registries for the swarm",
            bytes.clone(),
            self.registry_bytes.clone(),
        );
        registry.register_with_unit(
            "peer_received",
            "Piece bytes received from peers and found right",
            bytes.clone(),
            self.peer_received_bytes.clone(),
        );
        registry.register_with_unit(
            "peer_wrong",
            "Piece bytes received from peers and found wrong",
            bytes.clone(),
            self.peer_wrong_bytes.clone(),
        );
        registry.register_with_unit(
            "peer_sent",
            "Piece bytes sent to peers",
            bytes.clone(),
            self.peer_sent_bytes.clone(),
        );
        registry.register_with_unit(
            "peer_received_over",
            "Piece bytes received from peers and found right, by transport",
            bytes.clone(),
            self.received_over.clone(),
        );
        registry.register_with_unit(
            "peer_sent_over",
            "Piece bytes sent to peers, by transport",
            bytes.clone(),
            self.sent_over.clone(),
        );
        registry.register_with_unit(
            "client_sent",
            "Blob bytes sent to clients from the store",
            bytes.clone(),
            self.client_bytes.clone(),
        );
        registry.register_with_unit(
            "passed",
            "Bytes passed from upstreams to clients outside the swarm",
            bytes.clone(),
            self.passed_bytes.clone(),
        );
        registry.register_with_unit(
            "unread",
            "Bytes of layers started ahead of a client that then did not ask for them",
            bytes,
            self.unread_bytes.clone(),
        );
        registry.register("layers_ahead", "Layers started before a client asked for them", self.ahead.clone());
        registry.register("upload_slots", "Pieces that may leave for peers at a time", self.upload_slots.clone());
        registry.register("tcp_connections", "Open TCP connections with peers", self.tcp_connections.clone());
        registry.register(
            "tcp_fallbacks",
            "Streams to peers that went over QUIC instead of TCP, by reason",
            self.tcp_fallbacks.clone(),
        );
        registry.register("registry_requests", "Requests to registries for blob bytes", self.registry_requests.clone());
        registry.register("pieces", "Pieces stored, by source", self.pieces.clone());
        registry.register("fallbacks", "Fallbacks to the registry, by reason", self.fallbacks.clone());
        registry.register("members", "Live members, this one included", self.members.clone());
        registry.register(
            "isolations",
            "Times that this node failed with everybody and turned to the registry alone",
            self.isolations.clone(),
        );
        registry.register(
            "members_lost",
            "Members that were declared dead, left, or were replaced by a new process",
            self.members_lost.clone(),
        );
        registry.register("seeds", "Addresses that discovery has found", self.seeds.clone());
        registry.register(
            "known_tasks",
            "Blobs that other members are known to have or to be getting",
            self.known_tasks.clone(),
        );
        registry.register(
            "holders",
            "Other members that are known to have a blob or to be getting it, over all blobs",
            self.holders.clone(),
        );
        registry.register("active_tasks", "Pulls in progress", self.active_tasks.clone());
        registry.register("evictions", "Blobs thrown out of the cache", self.evictions.clone());
        registry.register("poisoned_blobs", "Blobs that did not match their digest", self.poisoned.clone());
        registry.register("gossip_dropped", "Gossip datagrams dropped, by reason", self.gossip_dropped.clone());
        registry.register(
            "gossip_events_dropped",
            "Events that this node wanted to gossip and could not",
            self.gossip_events_dropped.clone(),
        );
        registry.register("peers_refused", "Peers refused at the handshake", self.peers_refused.clone());
        registry.register("tags_known", "Times that the cluster knew what a tag means", self.tags_known.clone());
        registry.register("client_refusals", "Client requests that the agent refused", self.client_refusals.clone());
        let build =
            [("version", env!("CARGO_PKG_VERSION")), ("arch", std::env::consts::ARCH), ("os", std::env::consts::OS)];
        registry.register("build", "What is running", Info::new(build.to_vec()));
        registry
    }
}
