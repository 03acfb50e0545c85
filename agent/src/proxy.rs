//! The front end: what Docker, containerd, CRI-O and people point their requests at.
//!
//! A request goes down this list. `listener` takes the connection; `connect` tunnels, or [`hijack`] ends the TLS
//! inside; [`mirror`] finds out which registry a bare path means; [`rules`] and `route` decide whether it is a blob
//! that the swarm may deliver; then `blob` delivers it, or `pass` hands it to the registry untouched. [`tags`]
//! may know what a tag means. `respond` turns whatever goes wrong into HTTP.
//!
//! [`seam`] is what is needed of others: registries, the judgement on who may read what, and the blobs themselves. No
//! registry client, no cache and no swarm here.

pub mod address;
pub mod authorize;
pub mod manifest;
pub mod rules;
pub mod seam;
pub mod tags;

pub mod body;
pub mod hijack;
pub mod mirror;
pub mod tls;

mod blob;
mod by_digest;
mod connect;
mod framing;
mod join;
mod listener;
mod pass;
mod range;
mod respond;
mod route;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use http::header::HOST;
use http::request::Parts;
use http::uri::Scheme;
use http::{Method, Request, Response, Uri, Version};
use hyper::body::{Body as _, Incoming};
use tokio::sync::Semaphore;

use crate::admin::metrics::Metrics;
use address::{HostPattern, HostPort};
use body::{AnswerBody, ClientBody};
use hijack::{Hijack, HijackError, HijackSettings};
use join::Joins;
use listener::Arrival;
use mirror::{Mirror, MirrorError, MirrorSettings, implied_port};
use pass::Answered;
use respond::Refusal;
use route::Route;
use rules::{Decision, RuleError, RuleSettings, Rules};
use seam::{Authorize, Blobs, Origin, Repository, TagHomes};
use tags::{TagTtls, Tags};
use tls::{Identity, PemPair, TlsError};

/// What the proxy does, apart from the address that it listens on.
#[derive(Clone)]
pub struct Settings {
    /// Makes the listener itself TLS. Docker sends no credentials to a mirror without it, loopback excepted.
    pub tls: Option<PemPair>,
    /// What a request for a bare path means.
    pub mirror: MirrorSettings,
    /// Rules for proxied GETs; none: every blob by digest may come from the swarm.
    pub rules: Vec<RuleSettings>,
    /// Whose TLS ends here.
    pub hijack: Option<HijackSettings>,
    /// Registries that the operator named. With the mirrored one, the hijacked ones and the targets of rules they are
    /// all that clients can reach where the proxy does not listen on loopback.
    pub registries: Vec<HostPattern>,
}

/// Which part of the settings is of no use. The operator's mistake; nothing started.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The listener's own certificate.
    #[error("the proxy's own certificate")]
    Tls(#[from] TlsError),
    /// The mirrored registry.
    #[error("the registry mirror")]
    Mirror(#[from] MirrorError),
    /// A rule.
    #[error("the proxy's rules")]
    Rules(#[from] RuleError),
    /// The hijack certificate.
    #[error("the hijack certificate")]
    Hijack(#[from] HijackError),
}

/// The front end of one agent.
pub struct Proxy<O, A, B> {
    tls: Option<Identity>,
    mirror: Mirror,
    rules: Rules,
    hijack: Option<Hijack>,
    /// Hosts that clients may reach from anywhere.
    named: Vec<HostPattern>,
    /// Turns for requests over HTTP/2.
    streams: Arc<Semaphore>,
    origin: Arc<O>,
    authorize: Arc<A>,
    blobs: Arc<B>,
    joins: Joins<Answered>,
    /// None: the registry is asked for every tag.
    tags: Option<Tags>,
    metrics: Arc<Metrics>,
}

/// A request's URL, and how it came to be.
struct Asked {
    url: Uri,
    mirrored: bool,
}

impl<O: Origin, A: Authorize, B: Blobs> Proxy<O, A, B> {
    /// Checks the settings and reads the certificates.
    ///
    /// # Errors
    /// At the first setting that is of no use.
    pub fn new(
        settings: &Settings,
        origin: Arc<O>,
        authorize: Arc<A>,
        blobs: Arc<B>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, ProxyError> {
        let tls = settings.tls.as_ref().map(Identity::of_listener).transpose()?;
        let mirror = Mirror::new(&settings.mirror)?;
        let rules = Rules::new(&settings.rules)?;
        let hijack = settings.hijack.as_ref().filter(|hijack| !hijack.hosts.is_empty());
        let mut named = settings.registries.clone();
        named.extend(mirror.pattern());
        named.extend(rules.redirect_hosts());
        named.extend(hijack.iter().flat_map(|hijack| hijack.hosts.iter().cloned()));
        let hijack = hijack.map(Hijack::new).transpose()?;
        let streams = Arc::new(Semaphore::new(listener::CONNECTIONS_MAX));
        let joins = Joins::default();
        Ok(Self { tls, mirror, rules, hijack, named, streams, origin, authorize, blobs, joins, tags: None, metrics })
    }

    /// Lets answers for tags serve more than one client, for as long as `ttls` say.
    #[must_use]
    pub fn with_tags(self, ttls: TagTtls, homes: Arc<dyn TagHomes>) -> Self {
        let tags = (!ttls.is_zero()).then(|| Tags::new(ttls, homes));
        Self { tags, ..self }
    }

    /// Answers one request, whatever happens.
    async fn handle(&self, request: Request<Incoming>, arrival: &Arrival) -> Response<AnswerBody> {
        match self.answer(request, arrival).await {
            Ok(answer) => answer,
            Err(refusal) => respond::refuse(&refusal, &self.metrics),
        }
    }

    async fn answer(&self, request: Request<Incoming>, arrival: &Arrival) -> Result<Response<AnswerBody>, Refusal> {
        framing::check(&request)?;
        if request.method() == Method::CONNECT {
            return self.connect(request, arrival).await;
        }
        let asked = self.asked(&request, arrival)?;
        let decision = self.decide(request.method(), &asked);
        // Rules are about GETs; what a GET would be told, a HEAD may be told.
        let tags = self.tags.as_ref().filter(|_| match *request.method() {
            Method::GET => decision.swarm,
            Method::HEAD => self.decide(&Method::GET, &asked).swarm,
            _ => false,
        });
        let url = decision.rewrite(asked.url).map_err(|_| Refusal::Malformed("the URL cannot be rewritten"))?;
        let registry = self.reachable(&url, arrival)?;
        let bare = request.body().is_end_stream();
        let swarm = decision.swarm && request.method() == Method::GET && bare;
        let (mut head, body) = request.into_parts();
        head.uri = url;
        let reads = head.method == Method::GET || head.method == Method::HEAD;
        match route::route(head.uri.path()) {
            Route::MalformedDigest if reads => Err(Refusal::Digest),
            Route::Blob { name, digest } if swarm => self.deliver(head, Repository { registry, name }, digest).await,
            // A query may hold a credential, which the authorizer would not know of.
            Route::Manifest { name, digest: Some(digest) } if swarm && head.uri.query().is_none() => {
                self.deliver_manifest(head, Repository { registry, name }, digest).await
            }
            Route::Manifest { name, .. } if reads && bare && head.uri.query().is_none() => {
                self.manifest_by_name(head, Repository { registry, name }, tags).await
            }
            Route::Other if bare && pass::is_token_request(&head) => self.pass_token(head).await,
            Route::Blob { name, digest } | Route::Manifest { name, digest: Some(digest) }
                if head.method == Method::DELETE =>
            {
                let answer = self.pass(upstream_request(head, body)).await;
                // Whatever became of it: the registry is asked again.
                self.authorize.forget(&Repository { registry, name }, &digest);
                answer
            }
            Route::Manifest { name, digest: None } if head.method == Method::PUT || head.method == Method::DELETE => {
                self.change_tag(head, body, Repository { registry, name }).await
            }
            _ => self.pass(upstream_request(head, body)).await,
        }
    }

    async fn manifest_by_name(
        &self,
        head: Parts,
        repository: Repository,
        tags: Option<&Tags>,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let asked = tags.zip(route::tag(head.uri.path()));
        let question = asked.and_then(|(tags, tag)| Some((tags, tags.question(&head, &repository, tag)?)));
        match question {
            Some((tags, question)) => self.deliver_tag(tags, head, repository, question).await,
            None => self.pass_manifest(head, &repository, |_| {}).await,
        }
    }

    /// Passes on what gives a tag another meaning, or none.
    async fn change_tag(
        &self,
        head: Parts,
        body: Incoming,
        repository: Repository,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let tag = route::tag(head.uri.path()).map(str::to_owned);
        let known = self.tags.as_ref().zip(tag);
        // Before, since nobody may be there any more afterwards; and whatever became of it.
        if let Some((tags, tag)) = &known {
            tags.forget(&repository, tag).await;
        }
        let answer = self.pass(upstream_request(head, body)).await;
        if let Some((tags, tag)) = &known {
            tags.forget(&repository, tag).await;
        }
        answer
    }

    /// The URL that a request means, absolute and with the host that the agent is to talk to.
    fn asked(&self, request: &Request<Incoming>, arrival: &Arrival) -> Result<Asked, Refusal> {
        let uri = request.uri();
        if let Some(tunnel) = &arrival.hijacked {
            return Ok(Asked { url: inside_tunnel(request, tunnel)?, mirrored: false });
        }
        match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS => {
                Ok(Asked { url: uri.clone(), mirrored: false })
            }
            Some(_) => Err(Refusal::Malformed("only http and https are proxied")),
            None if uri.path().starts_with('/') && uri.authority().is_none() => {
                Ok(Asked { url: self.mirror.target(uri)?, mirrored: true })
            }
            None => Err(Refusal::Malformed("the request names neither a path nor a URL")),
        }
    }

    fn decide(&self, method: &Method, asked: &Asked) -> Decision<'_> {
        match asked.mirrored {
            true if self.mirror.direct => Decision::DIRECT,
            true => Decision::SWARM,
            false => self.rules.decide(method, &asked.url.to_string()),
        }
    }

    /// Whether a client may reach a URL's host through this proxy; the dial filter still judges the address. Returns
    /// the registry's name, `scheme://host:port`: what one host says over HTTP is no word of the one behind HTTPS.
    fn reachable(&self, url: &Uri, arrival: &Arrival) -> Result<String, Refusal> {
        let (Some(scheme), Some(authority)) = (url.scheme(), url.authority()) else {
            return Err(Refusal::Malformed("the URL names no host"));
        };
        let address = HostPort::parse(authority.as_str(), Some(implied_port(scheme)))
            .map_err(|_| Refusal::Malformed("the URL's host is none"))?;
        let tunnelled = arrival.hijacked.as_ref() == Some(&address);
        if arrival.trusted || tunnelled || self.names(&address) {
            return Ok(format!("{scheme}://{address}"));
        }
        Err(Refusal::Forbidden { host: address.to_string() })
    }

    /// Whether the operator named the host of a URL.
    fn is_named(&self, url: &Uri) -> bool {
        let (Some(scheme), Some(authority)) = (url.scheme(), url.authority()) else { return false };
        HostPort::parse(authority.as_str(), Some(implied_port(scheme))).is_ok_and(|address| self.names(&address))
    }

    /// Whether the operator named the address.
    fn names(&self, address: &HostPort) -> bool {
        self.named.iter().any(|pattern| pattern.opens(address))
    }
}

/// The URL of a request inside a tunnel whose TLS ended here. It must be for the host that the tunnel leads to: the
/// certificate was that host's, and so is the policy that let the tunnel be made.
fn inside_tunnel(request: &Request<Incoming>, tunnel: &HostPort) -> Result<Uri, Refusal> {
    let same = |text: &str| HostPort::parse(text, Some(implied_port(&Scheme::HTTPS))).is_ok_and(|it| it == *tunnel);
    // HTTP/1.1 has a Host and may have a URL, HTTP/2 the reverse; whatever there is has to be the tunnel's (RFC 9113, 8.3.1).
    let mut hosts = request.headers().get_all(HOST).iter();
    let mut parts = request.uri().clone().into_parts();
    let named = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().is_ok_and(same),
        (None, _) if request.version() == Version::HTTP_2 && parts.authority.is_some() => true,
        _ => return Err(Refusal::Malformed("a request has exactly one Host header")),
    };
    let as_url = parts.scheme.as_ref().is_none_or(|scheme| *scheme == Scheme::HTTPS);
    if !named || !as_url || !parts.authority.as_ref().is_none_or(|authority| same(authority.as_str())) {
        return Err(Refusal::Misdirected { host: tunnel.to_string() });
    }
    // HTTP/2 sends the path by itself, with whatever it begins.
    if !request.uri().path().starts_with('/') {
        return Err(Refusal::Malformed("a request inside a tunnel has a path"));
    }
    parts.scheme = Some(Scheme::HTTPS);
    parts.authority =
        Some(tunnel.authority(&Scheme::HTTPS).parse().map_err(|_| Refusal::Malformed("the tunnel's host is none"))?);
    Uri::from_parts(parts).map_err(|_| Refusal::Malformed("the path cannot be asked for"))
}

/// A client's request on its way to where its URL says.
fn upstream_request(head: Parts, body: Incoming) -> Request<ClientBody> {
    Request::from_parts(head, body::sent(body))
}
