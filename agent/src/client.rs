//! Plays a container runtime: pulls an image as docker does, through an agent's proxy or straight from a registry, and
//! checks every digest. For the demonstration, for tests, and for the probe of `darter node configure`.
//!
//! The manifest by its tag, the configuration, then the layers, three at a time; bodies are hashed and thrown away.
//! Not here: retries. A runtime would try again; the demonstration and the tests want to see the first failure.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use darter_tracker::Digest;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use http::header::{ACCEPT, AUTHORIZATION};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use sha2::{Digest as _, Sha256, Sha512};

mod connect;
#[cfg(test)]
mod tests;

pub use connect::ConnectError;
use connect::Exchange;

/// Layers fetched at once: what docker and containerd do unless told otherwise.
pub const LAYERS_AT_ONCE: usize = 3;

/// How long an answer may take to begin: more than an agent's worst case for a blob that is being fetched, which is
/// piece by piece and never this slow unless something hangs.
const HEAD_MAX: Duration = Duration::from_secs(60);

/// How long a body may pause, for the same reason.
const STALL_MAX: Duration = Duration::from_secs(60);

/// Larger manifests and other small answers are refused; the specification asks clients for 4 MiB.
const SMALL_BODY_BYTES_MAX: usize = 4 << 20;

/// Media type of an image manifest.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// A user name and a password of HTTP's basic authentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The password.
    pub password: String,
}

impl Credentials {
    /// The value of an `Authorization` header.
    #[must_use]
    pub fn authorization(&self) -> String {
        let pair = format!("{}:{}", self.user, self.password);
        format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
    }
}

/// Where a client pulls from, and by which way.
#[derive(Clone, Debug)]
pub struct Client {
    /// The registry's name or address, as in an image reference.
    pub host: String,
    /// The registry's port.
    pub port: u16,
    /// HTTPS, trusting what this says; plain HTTP without.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// The proxy to go through, as with `HTTPS_PROXY`; straight to the registry without.
    pub proxy: Option<SocketAddr>,
    /// Sent with every request.
    pub credentials: Option<Credentials>,
}

/// How far a pull is. Written by the pull, read by whoever shows it.
#[derive(Debug, Default)]
pub struct Transfer {
    expected_bytes: AtomicU64,
    done_bytes: AtomicU64,
}

impl Transfer {
    /// Blob bytes that the manifest promised; 0 before it is there.
    #[must_use]
    pub fn expected_bytes(&self) -> u64 {
        self.expected_bytes.load(Ordering::Relaxed)
    }

    /// Blob bytes that arrived.
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn expect(&self, bytes: u64) {
        self.expected_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A pull that ended well: everything arrived and matched its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// Blobs whose bytes were hashed and found right, the configuration included.
    pub digests_checked: usize,
    /// Their bytes.
    pub blob_bytes: u64,
    /// From the first connection to the last byte.
    pub elapsed: Duration,
}

/// Why a pull failed. Nothing is kept of it.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// No connection to the registry, or the proxy refused one.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection broke, in the head or in the body.
    #[error("the connection broke at {path}")]
    Broken {
        /// What was asked for.
        path: String,
        /// What happened.
        #[source]
        source: hyper::Error,
    },
    /// Nothing came for too long.
    #[error("nothing came for {waited:?} from {path}")]
    Stalled {
        /// What was asked for.
        path: String,
        /// How long.
        waited: Duration,
    },
    /// The answer was not 200.
    #[error("{path} was answered {status}")]
    Status {
        /// What was asked for.
        path: String,
        /// The answer.
        status: StatusCode,
    },
    /// A small answer was not small.
    #[error("{path} is larger than {SMALL_BODY_BYTES_MAX} bytes")]
    TooLarge {
        /// What was asked for.
        path: String,
    },
    /// The manifest is not one, or not the one that the header named.
    #[error("the manifest is wrong: {0}")]
    Manifest(String),
    /// A blob arrived whole and is not what it should be.
    #[error("{digest} came with {bytes} bytes that hash to {got}")]
    Mismatch {
        /// What was asked for.
        digest: Digest,
        /// What came. Boxed, so that results stay small.
        got: Box<Digest>,
        /// How much came.
        bytes: u64,
    },
    /// The path or a header cannot be sent. The caller's mistake.
    #[error("a request cannot be made")]
    Request(#[from] http::Error),
}

/// The part of a manifest that a pull needs.
#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
}

/// A blob that the manifest lists.
struct Wanted {
    digest: Digest,
    bytes: u64,
}

impl Client {
    /// A client of the registry at `address` that goes there directly.
    #[must_use]
    pub fn direct(address: SocketAddr, tls: Option<Arc<rustls::ClientConfig>>) -> Self {
        Self { host: address.ip().to_string(), port: address.port(), tls, proxy: None, credentials: None }
    }

    /// The same client, through a proxy.
    #[must_use]
    pub fn through(&self, proxy: SocketAddr) -> Self {
        Self { proxy: Some(proxy), ..self.clone() }
    }

    /// Pulls `repository:tag` and counts into `transfer` on the way.
    ///
    /// # Errors
    /// With the first thing that goes wrong; what else is on its way is dropped.
    pub async fn pull(&self, repository: &str, tag: &str, transfer: &Transfer) -> Result<Pulled, PullError> {
        let started = Instant::now();
        let (config, layers) = self.manifest(repository, tag).await?;
        let blob_bytes = config.bytes + layers.iter().map(|layer| layer.bytes).sum::<u64>();
        transfer.expect(blob_bytes);
        self.blob(repository, &config, transfer).await?;
        let fetches: Vec<_> = layers.iter().map(|layer| self.blob(repository, layer, transfer)).collect();
        stream::iter(fetches).buffer_unordered(LAYERS_AT_ONCE).try_collect::<()>().await?;
        Ok(Pulled { digests_checked: 1 + layers.len(), blob_bytes, elapsed: started.elapsed() })
    }

    /// Sends one request on a connection of its own and collects the answer, whatever its status.
    ///
    /// # Errors
    /// If there is no answer, or it is larger than 4 MiB.
    pub async fn request(&self, method: Method, path: &str, headers: HeaderMap) -> Result<Response<Bytes>, PullError> {
        let mut exchange = self.exchange(method, path, headers).await?;
        let mut body = BytesMut::new();
        while let Some(bytes) = next_bytes(&mut exchange, path).await? {
            if body.len() + bytes.len() > SMALL_BODY_BYTES_MAX {
                return Err(PullError::TooLarge { path: path.to_owned() });
            }
            body.extend_from_slice(&bytes);
        }
        Ok(exchange.head.map(|()| body.freeze()))
    }

    async fn manifest(&self, repository: &str, tag: &str) -> Result<(Wanted, Vec<Wanted>), PullError> {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let headers = HeaderMap::from_iter([(ACCEPT, http::HeaderValue::from_static(MANIFEST_TYPE))]);
        let reply = self.request(Method::GET, &path, headers).await?;
        if reply.status() != StatusCode::OK {
            return Err(PullError::Status { path, status: reply.status() });
        }
        let digest = Digest::Sha256(Sha256::digest(reply.body()).into());
        let named = reply.headers().get("docker-content-digest").and_then(|named| named.to_str().ok());
        if named != Some(digest.to_string().as_str()) {
            return Err(PullError::Manifest(format!("it is {digest}, not {}", named.unwrap_or("named in the head"))));
        }
        let wrong = |error: &dyn std::fmt::Display| PullError::Manifest(error.to_string());
        let manifest: Manifest = serde_json::from_slice(reply.body()).map_err(|error| wrong(&error))?;
        let wanted = |blob: &Descriptor| {
            let digest = blob.digest.parse().map_err(|error: darter_tracker::DigestError| wrong(&error))?;
            Ok(Wanted { digest, bytes: blob.size })
        };
        let layers: Result<Vec<Wanted>, PullError> = manifest.layers.iter().map(wanted).collect();
        Ok((wanted(&manifest.config)?, layers?))
    }

    async fn blob(&self, repository: &str, wanted: &Wanted, transfer: &Transfer) -> Result<(), PullError> {
        let path = format!("/v2/{repository}/blobs/{}", wanted.digest);
        let mut exchange = self.exchange(Method::GET, &path, HeaderMap::new()).await?;
        if exchange.head.status() != StatusCode::OK {
            return Err(PullError::Status { path, status: exchange.head.status() });
        }
        let mut hash = Hash::like(&wanted.digest);
        let mut came = 0;
        while let Some(bytes) = next_bytes(&mut exchange, &path).await? {
            hash.update(&bytes);
            came += bytes.len() as u64;
            transfer.add(bytes.len() as u64);
        }
        let got = hash.finish();
        if got != wanted.digest || came != wanted.bytes {
            return Err(PullError::Mismatch { digest: wanted.digest, got: Box::new(got), bytes: came });
        }
        Ok(())
    }

    async fn exchange(&self, method: Method, path: &str, headers: HeaderMap) -> Result<Exchange, PullError> {
        let mut request = Request::builder().method(method).uri(path).body(())?;
        *request.headers_mut() = headers;
        if let Some(credentials) = &self.credentials {
            let value = http::HeaderValue::try_from(credentials.authorization()).map_err(http::Error::from)?;
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let connection = connect::open(self).await?;
        match tokio::time::timeout(HEAD_MAX, connection.send(request)).await {
            Ok(Ok(exchange)) => Ok(exchange),
            Ok(Err(source)) => Err(PullError::Broken { path: path.to_owned(), source }),
            Err(_) => Err(PullError::Stalled { path: path.to_owned(), waited: HEAD_MAX }),
        }
    }
}

/// The next bytes of a body; `None` at its end.
async fn next_bytes(exchange: &mut Exchange, path: &str) -> Result<Option<Bytes>, PullError> {
    loop {
        let frame = tokio::time::timeout(STALL_MAX, exchange.body.frame()).await;
        let frame = frame.map_err(|_| PullError::Stalled { path: path.to_owned(), waited: STALL_MAX })?;
        let frame = frame.transpose().map_err(|source| PullError::Broken { path: path.to_owned(), source })?;
        let Some(frame) = frame else {
            return Ok(None);
        };
        // Trailers are none of a blob's bytes.
        if let Ok(bytes) = frame.into_data() {
            return Ok(Some(bytes));
        }
    }
}

/// The hash that a digest was made with.
enum Hash {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hash {
    fn like(digest: &Digest) -> Self {
        match digest {
            Digest::Sha256(_) => Self::Sha256(Sha256::new()),
            Digest::Sha512(_) => Self::Sha512(Sha512::new()),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
        }
    }

    fn finish(self) -> Digest {
        match self {
            Self::Sha256(hash) => Digest::Sha256(hash.finalize().into()),
            Self::Sha512(hash) => Digest::Sha512(hash.finalize().into()),
        }
    }
}
