//! Registries: passing a client's request on, and getting pieces of a blob on the client's behalf.
//!
//! The agent has no credentials of its own. It asks the URL that its client asked, with the headers that the client
//! sent; what answers that with a redirect is followed (for blobs only), without the credentials as soon as it leads to
//! another origin. Nothing here looks into a blob: whether the bytes are right is found out in the store.
//!
//! Reading order: `target` (where a request goes), `headers` (what goes there), `pool` (over which connection),
//! `redirect`, `fetch` (pieces), `limit` (how much at a time).

mod body;
mod fetch;
mod headers;
mod limit;
mod pool;
mod redirect;
mod target;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use body::{BodyError, ProxyBody};
pub use fetch::{BlobOrigin, OriginError, RangeBody};
pub use headers::{Credential, Redacted, strip_hop_by_hop};
pub use redirect::Asked;
pub use target::TargetError;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::header::HOST;
use http::{HeaderMap, Method, Request, Response, Uri, Version};
use hyper::body::{Body as _, Incoming};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout};

use crate::admin::metrics::Metrics;
use crate::net::dial::tls::{CaError, RegistryTls};
use crate::net::dial::{DialError, Dialer, HostPattern};
use limit::Limits;
use pool::{Pool, Purpose};
use target::Target;

/// How long a registry may take to answer a GET or HEAD, connecting included. Pull-through registries fetch before they
/// answer; docker itself gives up after about as long.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a registry may take to answer any other request after its body last moved. Committing a large upload to an object store takes minutes.
const UPLOAD_RESPONSE_TIMEOUT: Duration = Duration::from_secs(600);

/// How one registry is talked to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistryPolicy {
    /// Over plain HTTP, even where a URL says https.
    pub insecure_http: bool,
    /// A file of PEM certificates that are trusted for this registry, beside the host's own roots.
    pub ca_file: Option<PathBuf>,
}

/// What the registry side is built from.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Policies by `host`, `host:port` or `*.suffix`.
    pub policies: BTreeMap<String, RegistryPolicy>,
    /// Ports that this agent listens on, which it never connects to.
    pub own_ports: Vec<u16>,
    /// Hosts that may be on loopback or link-local addresses because somebody configured them by name; the hosts of
    /// `policies` are such hosts too.
    pub local_hosts: BTreeSet<String>,
}

/// Why there is no answer from upstream.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// CA files that cannot be used, all of them. The operator's mistake; nothing started.
    #[error("{} of the registries' CA files cannot be used", .0.len())]
    Settings(Vec<CaError>),
    /// The URL is not one to ask. The asker's mistake; never retried; nothing was sent.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// There is no connection. See [`DialError`]; nothing was sent.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The connection broke, or what came is not HTTP. May be retried; the request may have had its effect.
    #[error("the exchange with {host} failed")]
    Exchange {
        /// With whom.
        host: String,
        /// What the HTTP client says.
        #[source]
        source: hyper_util::client::legacy::Error,
    },
    /// No answer came in time. May be retried; the request may have had its effect.
    #[error("{host} did not answer in time")]
    TimedOut {
        /// Who.
        host: String,
    },
}

impl UpstreamError {
    /// Whether the registry is down or out of reach, as opposed to a request that this agent would not make.
    #[must_use]
    pub fn is_down(&self) -> bool {
        match self {
            Self::Settings(_) | Self::Target(_) => false,
            Self::Dial(error) => error.is_down(),
            Self::Exchange { .. } | Self::TimedOut { .. } => true,
        }
    }

    /// Whether the dial filter or the URL rules declined: the asker's fault.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        match self {
            Self::Target(_) => true,
            Self::Dial(error) => error.is_refused(),
            Self::Settings(_) | Self::Exchange { .. } | Self::TimedOut { .. } => false,
        }
    }
}

/// The agent's side towards registries. One per agent; shared.
pub struct Upstream {
    dialer: Dialer,
    insecure: Vec<HostPattern>,
    pool: Pool,
    limits: Limits,
    metrics: Arc<Metrics>,
}

impl Upstream {
    /// Builds it. Reads the CA files, so it blocks for a moment.
    ///
    /// # Errors
    /// [`UpstreamError::Settings`] with everything that is wrong with the CA files.
    pub fn new(settings: Settings, metrics: Arc<Metrics>) -> Result<Self, UpstreamError> {
        let Settings { policies, own_ports, mut local_hosts } = settings;
        let ca_files = policies
            .iter()
            .filter_map(|(host, policy)| policy.ca_file.as_deref().map(|path| (HostPattern::parse(host), path)));
        let tls = RegistryTls::load(ca_files).map_err(UpstreamError::Settings)?;
        let mut insecure: Vec<HostPattern> = policies
            .iter()
            .filter(|(_, policy)| policy.insecure_http)
            .map(|(host, _)| HostPattern::parse(host))
            .collect();
        for (host, _) in policies.iter().filter(|(_, policy)| policy.insecure_http) {
            tracing::warn!(registry = %host, "this registry is talked to without TLS, as configured");
        }
        insecure.sort_by_key(|pattern| pattern.port().is_none());
        local_hosts.extend(policies.into_keys());
        let dialer = Dialer::new(&own_ports, &local_hosts);
        let pool = Pool::new(dialer.clone(), tls);
        Ok(Self { dialer, insecure, pool, limits: Limits::new(), metrics })
    }

    /// Passes one request on to where its absolute URI says, streaming both bodies. Headers that belong to one
    /// connection are taken out on both ways, the host is the URI's, all else stays as it is. Redirects are answers.
    ///
    /// # Errors
    /// See [`UpstreamError`].
    pub async fn send(&self, request: Request<ProxyBody>) -> Result<Response<Incoming>, UpstreamError> {
        let (mut head, body) = request.into_parts();
        let target = self.target(&head.uri)?;
        headers::strip_hop_by_hop(&mut head.headers);
        let mut response = if body.is_end_stream() && matches!(head.method, Method::GET | Method::HEAD) {
            self.ask(Purpose::Pass, &target, &head.method, &head.headers).await?
        } else {
            let credential = Credential::of(&head.headers);
            self.exchange(Purpose::Pass, credential, &target, &head.method, head.headers, body).await?
        };
        headers::strip_hop_by_hop(response.headers_mut());
        Ok(response)
    }

    /// Opens a connection for a tunnel, through the same filter as everything else.
    ///
    /// # Errors
    /// [`UpstreamError::Dial`].
    pub async fn dial(&self, host: &str, port: u16) -> Result<TcpStream, UpstreamError> {
        Ok(self.dialer.dial(host, port, None).await?)
    }

    /// `scheme://host:port` that `url` is really asked at, one spelling per registry.
    ///
    /// # Errors
    /// [`UpstreamError::Target`].
    pub fn origin_of(&self, url: &Uri) -> Result<String, UpstreamError> {
        Ok(self.target(url)?.origin())
    }

    /// Waits for a turn to ask a registry something small. The turn ends when what is returned is dropped; none only if
    /// the agent is ending.
    pub async fn question(&self, registry: &str) -> Option<OwnedSemaphorePermit> {
        self.limits.question(registry).await
    }

    fn target(&self, url: &Uri) -> Result<Target, TargetError> {
        Target::new(url, &self.insecure)
    }

    /// A request without a body. It is made once more if the connection was closed before an answer began: a registry
    /// may close an idle connection at the very moment that it is used again.
    async fn ask(
        &self,
        purpose: Purpose,
        target: &Target,
        method: &Method,
        headers: &HeaderMap,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let credential = Credential::of(headers);
        let mut attempt = 0;
        loop {
            let answer = self.exchange(purpose, credential, target, method, headers.clone(), ProxyBody::empty()).await;
            match answer {
                Err(UpstreamError::Exchange { source, .. }) if attempt == 0 && was_closed(&source) => attempt += 1,
                answer => return answer,
            }
        }
    }

    async fn exchange(
        &self,
        purpose: Purpose,
        credential: Credential,
        target: &Target,
        method: &Method,
        headers: HeaderMap,
        body: ProxyBody,
    ) -> Result<Response<Incoming>, UpstreamError> {
        let moved = body.moved();
        // What changes something at the registry may take its time even without a body: the end of an upload does.
        let patient = !matches!(*method, Method::GET | Method::HEAD);
        let mut request = Request::new(body);
        *request.method_mut() = method.clone();
        *request.uri_mut() = target.uri.clone();
        *request.version_mut() = Version::HTTP_11;
        *request.headers_mut() = headers;
        // The client library writes the URI's host; a header that named another would reach another virtual host than
        // the one that was judged and that an authorization was noted for.
        request.headers_mut().remove(HOST);
        let answer = self.pool.client(credential, purpose).request(request);
        let answered = if patient {
            tokio::select! {
                answer = answer => Some(answer),
                () = quiet(moved) => None,
            }
        } else {
            timeout(RESPONSE_TIMEOUT, answer).await.ok()
        };
        match answered {
            Some(Ok(response)) => Ok(response),
            Some(Err(error)) => Err(failed(&target.host, error)),
            None => Err(UpstreamError::TimedOut { host: target.host.clone() }),
        }
    }
}

/// Ends when a body has not moved for [`UPLOAD_RESPONSE_TIMEOUT`].
async fn quiet(moved: tokio::sync::watch::Receiver<Instant>) {
    loop {
        let deadline = *moved.borrow() + UPLOAD_RESPONSE_TIMEOUT;
        if deadline <= Instant::now() {
            return;
        }
        sleep_until(deadline).await;
    }
}

/// Digs the dialer's error out of the HTTP client's.
fn failed(host: &str, error: hyper_util::client::legacy::Error) -> UpstreamError {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(dial) = inner.downcast_ref::<DialError>() {
            return UpstreamError::Dial(dial.clone());
        }
        cause = inner.source();
    }
    UpstreamError::Exchange { host: host.to_owned(), source: error }
}

/// Whether the connection ended before any of the answer came.
fn was_closed(error: &hyper_util::client::legacy::Error) -> bool {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(http) = inner.downcast_ref::<hyper::Error>() {
            return http.is_incomplete_message() || http.is_canceled();
        }
        cause = inner.source();
    }
    false
}
