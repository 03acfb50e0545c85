//! The routes of the admin port. There is no other table of routes, none of them changes anything, and anything that
//! is not in it is 404.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use darter_tracker::{Digest, TaskId};
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::metrics::Metrics;
use super::process;
use crate::gossip::Gossip;
use crate::source::tally::Tally;

/// Connections at a time: a few scrapers and a person.
const CONNECTIONS_MAX: usize = 64;

/// All there is.
const ROUTES: [&str; 9] = [
    "/livez",
    "/readyz",
    "/metrics",
    "/args",
    "/env",
    "/debug/version",
    "/api/v1/sources",
    "/api/v1/holdings",
    "/api/v1/homes",
];

/// A client that has not sent its request by then is dropped.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether the agent can do its work: the proxy listens, and discovery has had its first round or three seconds.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Says that the agent can do its work.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it can.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What the admin port shows.
pub struct Admin {
    /// Counters, for sources.
    pub metrics: Arc<Metrics>,
    /// What came from whom.
    pub tally: Arc<Tally>,
    /// What others are known to have; `None` without peers.
    pub gossip: Option<Arc<Gossip>>,
    /// Whether the agent is ready.
    pub readiness: Readiness,
    /// The exposition of the counters.
    pub registry: Registry,
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admin").field("readiness", &self.readiness).finish_non_exhaustive()
    }
}

impl Admin {
    /// Serves on `listener` until `stopping`.
    pub async fn run(self, listener: TcpListener, stopping: CancellationToken) {
        let admin = Arc::new(self);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = stopping.cancelled() => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                    Ok((stream, _)) => { connections.spawn(admin.clone().connection(stream)); }
                    // Out of descriptors, most likely: a pause instead of a busy loop.
                    Err(error) => {
                        tracing::warn!(%error, "the admin port cannot accept");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        }
        connections.shutdown().await;
    }

    async fn connection(self: Arc<Self>, stream: tokio::net::TcpStream) {
        let service = service_fn(|request| {
            let response = self.answer(&request);
            async move { Ok::<_, Infallible>(response) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "an admin connection broke off");
        }
    }

    /// Quarters held, per task and peer: 0 is a start, 4 is all of it.
    fn holdings(&self) -> BTreeMap<String, BTreeMap<SocketAddr, u8>> {
        let known = self.gossip.as_ref().map(|gossip| gossip.known()).unwrap_or_default();
        known.into_iter().map(|(task, holders)| (task.to_string(), holders)).collect()
    }

    /// What gossip knows is counted when somebody asks: there is more news than there are questions.
    fn count_holders(&self) {
        let known = self.gossip.as_ref().map(|gossip| gossip.known()).unwrap_or_default();
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.metrics.known_tasks.set(gauge(known.len()));
        self.metrics.holders.set(gauge(known.values().map(BTreeMap::len).sum()));
    }

    /// Where the home of the blob `digest=sha256:...` and its stand-bys answer, in their order; `None` if the query is
    /// none. Nobody is home where there are no peers.
    fn homes(&self, query: Option<&str>) -> Option<Vec<SocketAddr>> {
        let digest: Digest = query?.strip_prefix("digest=")?.parse().ok()?;
        Some(self.gossip.as_ref().map(|gossip| gossip.homes(&TaskId::blob(digest))).unwrap_or_default())
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        const TEXT: &str = "text/plain; charset=utf-8";
        let path = request.uri().path();
        if !ROUTES.contains(&path) {
            return reply(StatusCode::NOT_FOUND, TEXT, "not found\n".into());
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "read-only\n".into());
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            "/readyz" if !self.readiness.is_set() => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, "starting\n".into()),
            "/metrics" => {
                self.count_holders();
                let mut text = String::new();
                if prometheus_client::encoding::text::encode(&mut text, &self.registry).is_err() {
                    return reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "the metrics cannot be written\n".into());
                }
                reply(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", text)
            }
            "/args" => reply(StatusCode::OK, TEXT, process::args()),
            "/env" => reply(StatusCode::OK, TEXT, process::env()),
            "/debug/version" => json(&process::VERSION),
            "/api/v1/sources" => json(&self.tally.read(self.metrics.registry_bytes.get())),
            "/api/v1/holdings" => json(&self.holdings()),
            "/api/v1/homes" => match self.homes(request.uri().query()) {
                Some(homes) => json(&homes),
                None => reply(StatusCode::BAD_REQUEST, TEXT, "ask for ?digest=sha256:...\n".into()),
            },
            _ => reply(StatusCode::OK, TEXT, "ok\n".into()),
        }
    }
}

fn json(value: &impl Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_string(value) {
        Ok(json) => reply(StatusCode::OK, "application/json", json),
        Err(_) => {
            reply(StatusCode::INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", "it cannot be written\n".into())
        }
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
