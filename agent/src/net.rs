//! Streams between members: QUIC and TLS over TCP, both with mutual authentication (DESIGN D2, D12).
//!
//! A [`Transport`] is one UDP socket, and one TCP listener on the same port unless QUIC alone is wanted.
//! [`Transport::open`] and [`Transport::open_bulk`] give a stream to a peer, on a connection that is dialled when there is
//! none; [`Transport::accept`] gives the streams that peers open. Who a peer is has been proven before any of them
//! returns. Read in this order: `identity` (certificates), `tls` (who is let in), `way` (which transport), `quic` (socket
//! and windows), `pool` (which QUIC connections there are), `link` (one of them), `tcp` (all of the other transport),
//! `frame` (what travels on a stream of either), `error`, `refusals`.
//!
//! Not here: what peers say to each other, deadlines of requests, whom to ask next.

pub mod dial;

mod error;
mod frame;
mod identity;
mod keyed;
mod link;
mod pool;
mod quic;
mod refusals;
mod tcp;
mod tls;
mod way;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;

use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_tracker::NodeId;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::admin::metrics::{Metrics, TcpFallback};

pub use error::NetError;
pub use frame::{FRAME_BYTES_MAX, Receiver, Sender, Stream};
pub use identity::{CertifyError, Refusal};
pub(crate) use pool::CLOSE_MAX;
pub use way::{Mode, Way};

use link::Census;
use pool::{OpenRequest, Pool};
use quic::Timing;
use tls::Tls;
use way::Cargo;

/// Streams of all peers that wait to be accepted. When they are so many, further ones wait at their connection, and
/// their senders stop when the windows are full.
const ACCEPT_QUEUE: usize = 256;
/// Calls of `open` on their way to the pool; more wait in line.
const OPEN_QUEUE: usize = 256;
/// How often `open` asks for a connection: the first may have died unnoticed.
const OPEN_ATTEMPTS: usize = 2;
/// How often a port is chosen for both protocols, where the system is to choose: the one that is free for UDP may be taken
/// for TCP.
const PORT_ATTEMPTS: usize = 16;

/// Whom to talk to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Who must answer.
    pub id: NodeId,
    /// Where.
    pub addr: SocketAddr,
}

/// A stream that a peer has opened.
#[derive(Debug)]
pub struct Incoming {
    /// Who opened it.
    pub peer: NodeId,
    /// From where. An IPv4 address is given as such, also where the socket is IPv6. Over TCP the port says nothing.
    pub remote: SocketAddr,
    /// The stream.
    pub stream: Stream,
}

/// One agent's connections to its peers. Clones share them; when the last clone is dropped, they are cut.
#[derive(Debug, Clone)]
pub struct Transport {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    #[cfg(test)]
    endpoint: quinn::Endpoint,
    local: SocketAddr,
    timing: Timing,
    census: Arc<Census>,
    mode: Mode,
    metrics: Arc<Metrics>,
    opens: mpsc::Sender<OpenRequest>,
    /// `None` where there is no TCP.
    tcp_opens: Option<mpsc::Sender<tcp::OpenRequest>>,
    incoming: Mutex<mpsc::Receiver<Incoming>>,
    closing: CancellationToken,
    pools: Mutex<Vec<AbortOnDropHandle<()>>>,
}

impl Transport {
    /// Listens on `listen`, UDP and, unless `mode` is QUIC alone, TCP, as the member that `node` is in the cluster of `keys`.
    /// An unspecified IPv6 address listens for IPv4 as well.
    ///
    /// # Errors
    /// [`NetError::Bind`] and [`NetError::Certify`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn bind(
        listen: SocketAddr,
        mode: Mode,
        keys: Arc<ClusterKeys>,
        node: &NodeKey,
        metrics: Arc<Metrics>,
    ) -> Result<Self, NetError> {
        Self::with_tls(listen, mode, Tls::new(keys, node)?, metrics, Timing::AGENT)
    }

    fn with_tls(
        listen: SocketAddr,
        mode: Mode,
        tls: Tls,
        metrics: Arc<Metrics>,
        timing: Timing,
    ) -> Result<Self, NetError> {
        let (endpoint, listener) = sockets(listen, mode, &tls, &timing)?;
        let local = endpoint.local_addr().map_err(|source| cannot_bind(listen, source))?;
        let tls = Arc::new(tls);
        let (opens, requests) = mpsc::channel(OPEN_QUEUE);
        let (streams, incoming) = mpsc::channel(ACCEPT_QUEUE);
        let closing = CancellationToken::new();
        let census = Arc::new(Census::default());
        let mut pools = Vec::new();
        let mut tcp_opens = None;
        if let Some(listener) = listener {
            let server = (tls.server()?, tls.clone());
            let pool = tcp::Pool::new(
                (listener, local),
                server,
                timing,
                metrics.clone(),
                streams.clone(),
                census.clone(),
                // Its own, since it also ends with the last clone of the transport.
                closing.child_token(),
            );
            let (opens, requests) = mpsc::channel(OPEN_QUEUE);
            pools.push(AbortOnDropHandle::new(tokio::spawn(pool.run(requests))));
            tcp_opens = Some(opens);
        }
        let pool = Pool::new(endpoint.clone(), tls, timing, metrics.clone(), streams, census.clone());
        pools.push(AbortOnDropHandle::new(tokio::spawn(pool.run(requests, closing.clone()))));
        Ok(Self {
            shared: Arc::new(Shared {
                #[cfg(test)]
                endpoint,
                local,
                timing,
                census,
                mode,
                metrics,
                opens,
                tcp_opens,
                incoming: Mutex::new(incoming),
                closing,
                pools: Mutex::new(pools),
            }),
        })
    }

    /// The address that is listened on, with the port that the system chose if none was asked for.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.local
    }

    /// How many packets have come from `peer` on its live connections, or over TCP, how many reads brought something. While
    /// the number rises the peer's process is alive, whether or not it answers what it was asked: a crowded link delays
    /// answers by seconds, and a frozen process acknowledges nothing.
    #[must_use]
    pub fn received(&self, peer: NodeId) -> u64 {
        self.shared.census.received(peer)
    }

    /// How many packets have gone to `peer` on its live QUIC connections, so that it knows that this process is alive.
    #[must_use]
    pub fn sent(&self, peer: NodeId) -> u64 {
        self.shared.census.sent(peer)
    }

    /// Opens a stream for messages to `peer`, and to nobody else who may answer there. The peer learns of the stream with
    /// the first bytes that are sent on it.
    ///
    /// Takes at most a handshake (3 s) twice; a peer that does not answer costs one. Cancelling is harmless.
    ///
    /// # Errors
    /// Why there is no stream; nothing has been said to the peer.
    pub async fn open(&self, peer: Peer) -> Result<Stream, NetError> {
        self.open_for(peer, Cargo::Talk).await
    }

    /// Like [`Self::open`], for a piece: over TCP where that gets through, unless QUIC alone is wanted.
    ///
    /// # Errors
    /// As there.
    pub async fn open_bulk(&self, peer: Peer) -> Result<Stream, NetError> {
        self.open_for(peer, Cargo::Bulk).await
    }

    /// Tells that a piece may soon be taken from `peer`, so that its connection is there by then. Does nothing where there is one,
    /// and nothing comes of it where TCP does not get through.
    pub fn expect_bulk(&self, peer: Peer) {
        let wanted = way::wants_tcp(self.shared.mode, Cargo::Bulk) && !self.shared.census.is_proven(peer.id);
        if let Some(opens) = self.shared.tcp_opens.as_ref().filter(|_| wanted) {
            // Where many others wait for connections, this one can wait for its piece.
            let _ = opens.try_send(tcp::OpenRequest { peer, reply: None });
        }
    }

    async fn open_for(&self, peer: Peer, cargo: Cargo) -> Result<Stream, NetError> {
        if !way::wants_tcp(self.shared.mode, cargo) {
            return self.open_quic(peer).await;
        }
        // After that the dial goes on, for the next stream.
        let opened = tokio::time::timeout(way::PATIENCE, self.open_tcp(peer)).await;
        let failure = match opened.unwrap_or(Err(tcp::Failure::Slow)) {
            Ok(stream) => return Ok(stream),
            Err(failure) => failure,
        };
        self.fall_back(
            peer,
            match failure {
                tcp::Failure::Slow => TcpFallback::Slow,
                tcp::Failure::Closed => TcpFallback::Closed,
                tcp::Failure::Silent => TcpFallback::Silent,
                tcp::Failure::Full => TcpFallback::Full,
                tcp::Failure::Refused(_) => TcpFallback::Refused,
                tcp::Failure::Broken => TcpFallback::Broken,
                tcp::Failure::Remembered => TcpFallback::Remembered,
                tcp::Failure::Ending => return Err(NetError::Closed),
            },
        );
        self.open_quic(peer).await
    }

    fn fall_back(&self, peer: Peer, reason: TcpFallback) {
        tracing::debug!(peer = %peer.addr, ?reason, "a stream goes over QUIC instead of TCP");
        self.shared.metrics.tcp_fallback(reason);
    }

    /// Opens a stream over TCP. Calls for one peer share connections that are not in use.
    async fn open_tcp(&self, peer: Peer) -> Result<Stream, tcp::Failure> {
        let opens = self.shared.tcp_opens.as_ref().ok_or(tcp::Failure::Closed)?;
        let (reply, answer) = oneshot::channel();
        opens.send(tcp::OpenRequest { peer, reply: Some(reply) }).await.map_err(|_| tcp::Failure::Ending)?;
        answer.await.map_err(|_| tcp::Failure::Ending)?
    }

    /// Opens a stream over QUIC. Calls for one peer share one connection and one dial.
    async fn open_quic(&self, peer: Peer) -> Result<Stream, NetError> {
        let mut last = NetError::Closed;
        for _ in 0..OPEN_ATTEMPTS {
            let link = self.link(peer).await?;
            // Blocks only while the peer has as many streams open as it may.
            match tokio::time::timeout(self.shared.timing.connect, link.connection().open_bi()).await {
                Ok(Ok((send, receive))) => return Ok(Stream::quic(send, receive, link)),
                Ok(Err(error)) => last = error.into(),
                Err(_) => return Err(NetError::Full),
            }
        }
        Err(last)
    }

    async fn link(&self, peer: Peer) -> Result<link::Use, NetError> {
        let (reply, answer) = oneshot::channel();
        self.shared.opens.send(OpenRequest { peer, reply }).await.map_err(|_| NetError::Closed)?;
        answer.await.map_err(|_| NetError::Closed)?
    }

    /// The next stream that any peer has opened; `None` once the transport is closed. Cancelling loses nothing.
    pub async fn accept(&self) -> Option<Incoming> {
        let mut incoming = self.shared.incoming.lock().await;
        tokio::select! {
            biased;
            () = self.shared.closing.cancelled() => None,
            next = incoming.recv() => next,
        }
    }

    /// Tells every peer that this agent ends, and waits until they know or a second is over. Open streams fail, on
    /// both sides.
    pub async fn close(&self) {
        self.shared.closing.cancel();
        let mut pools = self.shared.pools.lock().await;
        for pool in pools.iter_mut() {
            // An error would be a panic of the pool, which has been reported and leaves nothing to close.
            let _ = pool.await;
        }
        pools.clear();
    }
}

/// The UDP socket, and the TCP listener on the same port.
fn sockets(
    listen: SocketAddr,
    mode: Mode,
    tls: &Tls,
    timing: &Timing,
) -> Result<(quinn::Endpoint, Option<TcpListener>), NetError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let server = tls.server()?.try_into()?;
        let endpoint = quic::endpoint(listen, server, timing).map_err(|source| cannot_bind(listen, source))?;
        if mode == Mode::Quic {
            return Ok((endpoint, None));
        }
        let local = endpoint.local_addr().map_err(|source| cannot_bind(listen, source))?;
        match tcp::listen(local) {
            Ok(listener) => return Ok((endpoint, Some(listener))),
            Err(error) if listen.port() == 0 && attempts < PORT_ATTEMPTS => {
                tracing::debug!(%error, "the port that the system chose for UDP is taken for TCP");
            }
            Err(source) => return Err(cannot_bind(listen, source)),
        }
    }
}

fn cannot_bind(address: SocketAddr, source: std::io::Error) -> NetError {
    NetError::Bind { address, source: Arc::new(source) }
}

/// An IPv4 address as such, where an IPv6 socket shows it mapped.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
