//! A small OCI registry: the pull side of the distribution API, over HTTPS or plain HTTP, with a count of every blob
//! byte that went out.
//!
//! It serves [`Image`]s that are made as they are read, so it needs neither memory nor disk for them. The demonstration
//! runs it beside its agents; tests run it with a rate, a delay, a password, without ranges, or with a blob whose bytes
//! are wrong. Not here: pushing, token services, redirects.
//!
//! The count is of body bytes that the connection has taken. The TLS layer and the kernel hold little (see
//! [`SEND_BUFFER_BYTES`]), so when a client hangs up it is close to what the client read; when nobody does, it is exact.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_tracker::Digest;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use super::image::{Blob, Image};
use crate::client::Credentials;

mod body;
mod route;
mod stats;
#[cfg(test)]
mod tests;

use body::Pace;
use stats::BlobCount;
pub use stats::{BlobStats, Served, Stats};

/// The kernel's send buffer per connection. Small, so that what a client never read is not counted as sent for long;
/// large enough to keep loopback busy. Linux doubles it.
pub const SEND_BUFFER_BYTES: usize = 64 << 10;

/// What the TLS layer may hold before it pushes back; the same reason.
const TLS_BUFFER_BYTES: usize = 32 << 10;

/// Connections at once. Beyond it new ones wait in the listen queue until one ends.
const CONNECTIONS_MAX: usize = 4096;

/// A client that has not finished its handshake by then is cut off.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// How long a connection may be idle between requests: longer than clients keep one, so that they close first.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// How long the listener rests after the system refused a connection, for want of file descriptors for example.
const ACCEPT_REST: Duration = Duration::from_millis(50);

/// Requests during a rest that are remembered.
const RESTS_MAX: usize = 4096;

/// How the registry behaves. The default is a plain, open, fast one on any free port of 127.0.0.1.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// HTTPS with this certificate; plain HTTP without.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Asks every request for these by HTTP basic authentication.
    pub credentials: Option<Credentials>,
    /// Bytes per second for each blob, all its readers together.
    pub blob_rate: Option<NonZeroU64>,
    /// Whether `Range` is honoured; if not, the whole blob comes with 200.
    pub ranges: bool,
    /// Blobs that are served with one wrong byte in the middle.
    pub corrupt: BTreeSet<Digest>,
    /// Passes before each answer begins.
    pub delay: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tls: None,
            credentials: None,
            blob_rate: None,
            ranges: true,
            corrupt: BTreeSet::new(),
            delay: Duration::ZERO,
        }
    }
}

/// Why the registry did not start. The address or the system is to blame; nothing is left running.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// A running registry. It stops, and cuts its connections, when dropped.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: AbortOnDropHandle<()>,
}

impl Registry {
    /// Listens and serves `images`.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub async fn start(images: &[Image], options: Options) -> Result<Self, RegistryError> {
        let failed = |source| RegistryError::Listen { address: options.listen, source };
        let listener = TcpListener::bind(options.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared::new(images, options));
        let task = AbortOnDropHandle::new(tokio::spawn(accept(listener, Arc::clone(&shared))));
        Ok(Self { address, shared, task })
    }

    /// Where it listens, with the port that was chosen.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What was asked and sent so far. Bytes of an answer that has just ended may be counted a moment later.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let blobs = self.shared.blobs.iter().map(|(digest, served)| (*digest, served.count.read())).collect();
        self.shared.totals.read(blobs)
    }

    /// Serves the blob with a wrong byte in its middle from the next request on.
    pub fn corrupt(&self, digest: Digest) {
        self.shared.corrupt.lock().unwrap_or_else(PoisonError::into_inner).insert(digest);
    }

    /// Serves the blob as it is from the next request on.
    pub fn heal(&self, digest: &Digest) {
        self.shared.corrupt.lock().unwrap_or_else(PoisonError::into_inner).remove(digest);
    }

    /// Answers the next GET of a blob, and those that come within `pause` of it, with 429 and `Retry-After`.
    pub fn rest(&self, pause: Duration) {
        *self.shared.rest.lock().unwrap_or_else(PoisonError::into_inner) =
            Rest { pause: Some(pause), asked: Vec::new() };
    }

    /// When it was asked for blobs while it rested, the first time included.
    #[must_use]
    pub fn asked_at_rest(&self) -> Vec<Instant> {
        self.shared.rest.lock().unwrap_or_else(PoisonError::into_inner).asked.clone()
    }

    /// Stops listening and cuts all connections.
    pub async fn stop(self) {
        self.task.abort();
        // Its only outcome is that it was aborted.
        let _ = self.task.await;
    }
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    repositories: BTreeMap<String, Repository>,
    blobs: BTreeMap<Digest, Arc<ServedBlob>>,
    corrupt: Mutex<BTreeSet<Digest>>,
    rest: Mutex<Rest>,
    totals: stats::Totals,
    authorization: Option<String>,
    options: Options,
}

/// A registry that wants to be left alone.
#[derive(Debug, Default)]
struct Rest {
    pause: Option<Duration>,
    /// When it was asked.
    asked: Vec<Instant>,
}

impl Rest {
    /// How long it still rests, where it is asked now.
    fn left(&mut self, now: Instant) -> Option<Duration> {
        let pause = self.pause?;
        let until = *self.asked.first().unwrap_or(&now) + pause;
        let left = until.checked_duration_since(now).filter(|left| !left.is_zero());
        if left.is_some() && self.asked.len() < RESTS_MAX {
            self.asked.push(now);
        }
        left
    }
}

/// One repository's names for what it holds.
#[derive(Debug, Default)]
struct Repository {
    tags: BTreeMap<String, Digest>,
    manifests: BTreeMap<Digest, Bytes>,
    blobs: BTreeSet<Digest>,
}

/// A blob, whichever repositories it is in, with its count and its rate.
#[derive(Debug)]
struct ServedBlob {
    blob: Blob,
    count: BlobCount,
    pace: Option<Arc<Pace>>,
}

impl Shared {
    fn new(images: &[Image], options: Options) -> Self {
        let mut repositories = BTreeMap::<String, Repository>::new();
        let mut blobs = BTreeMap::new();
        for image in images {
            let repository = repositories.entry(image.repository().to_owned()).or_default();
            repository.tags.insert(image.tag().to_owned(), image.manifest_digest());
            repository.manifests.insert(image.manifest_digest(), image.manifest().clone());
            for blob in image.blobs() {
                repository.blobs.insert(blob.digest());
                blobs.entry(blob.digest()).or_insert_with(|| {
                    let pace = options.blob_rate.map(|rate| Arc::new(Pace::new(rate)));
                    Arc::new(ServedBlob { blob: blob.clone(), count: BlobCount::default(), pace })
                });
            }
        }
        Self {
            repositories,
            blobs,
            corrupt: Mutex::new(options.corrupt.clone()),
            rest: Mutex::default(),
            totals: stats::Totals::default(),
            authorization: options.credentials.as_ref().map(Credentials::authorization),
            options,
        }
    }
}

/// Takes connections until it is dropped, which cuts them all.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(stream, Arc::clone(&shared)));
                }
                Err(error) => {
                    tracing::debug!(%error, "the demonstration's registry could not take a connection");
                    tokio::time::sleep(ACCEPT_REST).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection. Its errors are the client's: it hung up, or does not speak TLS.
async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let prepared =
        stream.set_nodelay(true).and_then(|()| socket2::SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER_BYTES));
    if let Err(error) = prepared {
        tracing::debug!(%error, "a connection of the demonstration's registry could not be set up");
        return;
    }
    let Some(tls) = shared.options.tls.clone() else {
        return answer(stream, shared).await;
    };
    let handshake = tokio::time::timeout(HANDSHAKE_MAX, TlsAcceptor::from(tls).accept(stream));
    match handshake.await {
        Ok(Ok(mut stream)) => {
            stream.get_mut().1.set_buffer_limit(Some(TLS_BUFFER_BYTES));
            answer(stream, shared).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, "a handshake with the demonstration's registry failed"),
        Err(_) => tracing::debug!("a handshake with the demonstration's registry took too long"),
    }
}

async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin + Send, shared: Arc<Shared>) {
    let service = hyper::service::service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move {
            if !shared.options.delay.is_zero() {
                tokio::time::sleep(shared.options.delay).await;
            }
            Ok::<_, std::convert::Infallible>(route::respond(&shared, &request))
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        // Only with queued buffers does a chunk learn when the connection takes its bytes.
        .writev(true)
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the demonstration's registry ended early");
    }
}
