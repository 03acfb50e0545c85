//! Streams between members: QUIC with mutual authentication (DESIGN D2, D12).
//!
//! A [`Transport`] is one UDP socket. [`Transport::open`] gives a stream to a peer, on a connection that is dialled
//! when there is none; [`Transport::accept`] gives the streams that peers open. Who a peer is has been proven before
//! either returns. Read in this order: `identity` (certificates), `tls` (who is let in), `quic` (socket and
//! windows), `pool` (which connections there are), `link` (one of them), `frame` (what travels on a stream),
//! `error`, `refusals`.
//!
//! Not here: what peers say to each other, deadlines of requests, whom to ask next.

pub mod dial;

mod error;
mod frame;
mod identity;
mod link;
mod pool;
mod quic;
mod refusals;
mod tls;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;

use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_tracker::NodeId;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::admin::metrics::Metrics;

pub use error::NetError;
pub use frame::{FRAME_BYTES_MAX, Receiver, Sender, Stream};
pub use identity::{CertifyError, Refusal};
pub(crate) use pool::CLOSE_MAX;

use link::Census;
use pool::{OpenRequest, Pool};
use quic::Timing;
use tls::Tls;

/// Streams of all peers that wait to be accepted. When they are so many, further ones wait at their connection, and
/// their senders stop when the windows are full.
const ACCEPT_QUEUE: usize = 256;
/// Calls of `open` on their way to the pool; more wait in line.
const OPEN_QUEUE: usize = 256;
/// How often `open` asks for a connection: the first may have died unnoticed.
const OPEN_ATTEMPTS: usize = 2;

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
    /// From where. An IPv4 address is given as such, also where the socket is IPv6.
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
    opens: mpsc::Sender<OpenRequest>,
    incoming: Mutex<mpsc::Receiver<Incoming>>,
    closing: CancellationToken,
    pool: Mutex<Option<AbortOnDropHandle<()>>>,
}

impl Transport {
    /// Listens on `listen`, UDP, as the member that `node` is in the cluster of `keys`. An unspecified IPv6 address
    /// listens for IPv4 as well.
    ///
    /// # Errors
    /// [`NetError::Bind`] and [`NetError::Certify`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn bind(
        listen: SocketAddr,
        keys: Arc<ClusterKeys>,
        node: &NodeKey,
        metrics: Arc<Metrics>,
    ) -> Result<Self, NetError> {
        Self::with_tls(listen, Tls::new(keys, node)?, metrics, Timing::AGENT)
    }

    fn with_tls(listen: SocketAddr, tls: Tls, metrics: Arc<Metrics>, timing: Timing) -> Result<Self, NetError> {
        let bind = |source| NetError::Bind { address: listen, source: Arc::new(source) };
        let server = tls.server()?.try_into()?;
        let endpoint = quic::endpoint(listen, server, &timing).map_err(bind)?;
        let local = endpoint.local_addr().map_err(bind)?;
        let (opens, requests) = mpsc::channel(OPEN_QUEUE);
        let (streams, incoming) = mpsc::channel(ACCEPT_QUEUE);
        let closing = CancellationToken::new();
        let census = Arc::new(Census::default());
        let pool = Pool::new(endpoint.clone(), tls, timing, metrics, streams, census.clone());
        let task = tokio::spawn(pool.run(requests, closing.clone()));
        Ok(Self {
            shared: Arc::new(Shared {
                #[cfg(test)]
                endpoint,
                local,
                timing,
                census,
                opens,
                incoming: Mutex::new(incoming),
                closing,
                pool: Mutex::new(Some(AbortOnDropHandle::new(task))),
            }),
        })
    }

    /// The address that is listened on, with the port that the system chose if none was asked for.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.local
    }

    /// How many packets have come from `peer` on its live connections. While the number rises the peer's process is alive,
    /// whether or not it answers what it was asked: a crowded link delays answers by seconds, and a frozen process
    /// acknowledges nothing.
    #[must_use]
    pub fn received(&self, peer: NodeId) -> u64 {
        self.shared.census.received(peer)
    }

    /// Opens a stream to `peer`, and to nobody else who may answer there. Calls for one peer share one connection and
    /// one dial. The peer learns of the stream with the first bytes that are sent on it.
    ///
    /// Takes at most a handshake (3 s) twice; a peer that does not answer costs one. Cancelling is harmless.
    ///
    /// # Errors
    /// Why there is no stream; nothing has been said to the peer.
    pub async fn open(&self, peer: Peer) -> Result<Stream, NetError> {
        let mut last = NetError::Closed;
        for _ in 0..OPEN_ATTEMPTS {
            let link = self.link(peer).await?;
            // Blocks only while the peer has as many streams open as it may.
            match tokio::time::timeout(self.shared.timing.connect, link.connection().open_bi()).await {
                Ok(Ok((send, receive))) => return Ok(Stream::new(send, receive, link)),
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
        let mut pool = self.shared.pool.lock().await;
        if let Some(task) = pool.as_mut() {
            // An error would be a panic of the pool, which has been reported and leaves nothing to close.
            let _ = task.await;
        }
        *pool = None;
    }
}
