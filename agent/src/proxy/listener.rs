//! Client connections: how many, how long, and how they end.
//!
//! A connection is one task from its first byte to its last, the tunnel that a CONNECT turns it into included, so all
//! of them are owned here and none outlives [`Proxy::serve`].
//!
//! HTTP/1.1 is served here, HTTP/2 in [`http2`].

mod http2;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::header::{CONNECTION, HeaderValue};
use hyper::rt::{Sleep, Timer};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Proxy;
use super::address::HostPort;
use super::connect::Upgrade;
use super::framing::heads::Watched;
use super::framing::{HEADER_BYTES_MAX, HEADERS_MAX, is_chunked};
use super::respond::{self, Refusal};
use super::seam::{Authorize, Blobs, Origin};

/// Connections at a time, tunnels included. A thousand clients is what the memory budget is for; the next ones wait in
/// the kernel's queue, which a client sees as a slow connect. As many requests over HTTP/2 are answered at a time.
pub(super) const CONNECTIONS_MAX: usize = 1024;

/// How long a client may take for the headers of its first request. A client that connects has something to ask.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may be idle between requests, the next headers included. Longer than the pauses that Docker
/// and containerd make within a pull.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Read and write buffer of a connection: with [`CONNECTIONS_MAX`] of them 64 MiB, if every client is slow at once.
const BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Pause after a failed accept. The usual cause is too few file descriptors, which passes as connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long connections may finish what they are doing when the agent stops. Longer than a layer takes on an ordinary
/// link would keep a restart waiting; a client that is cut resumes.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a request came from.
pub(super) struct Arrival {
    /// Whether client and listener are both on loopback, so that whoever asks is on this machine.
    pub(super) trusted: bool,
    /// Where the tunnel leads that this request came out of.
    pub(super) hijacked: Option<HostPort>,
    /// Where to leave what the connection is to become. None inside a tunnel: tunnels are not nested.
    pub(super) upgrade: Option<UpgradeSlot>,
}

/// What a connection becomes when HTTP is done with it; a request's handler leaves it, the connection's task takes it.
#[derive(Clone, Default)]
pub(super) struct UpgradeSlot(Arc<Mutex<Option<Upgrade>>>);

impl UpgradeSlot {
    pub(super) fn leave(&self, upgrade: Upgrade) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(upgrade);
    }

    fn take(&self) -> Option<Upgrade> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<O: Origin, A: Authorize, B: Blobs> Proxy<O, A, B> {
    /// Serves clients until `stop`, then lets them finish for up to ten seconds and cuts the rest.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        let on_loopback = listener.local_addr().is_ok_and(|address| is_loopback(&address));
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        loop {
            let (stream, client, permit) = tokio::select! {
                () = stop.cancelled() => break,
                Some(ended) = connections.join_next() => {
                    report(ended);
                    continue;
                }
                accepted = accept(&listener, &room) => accepted,
            };
            let trusted = on_loopback && is_loopback(&client);
            let (proxy, stop) = (Arc::clone(&self), stop.clone());
            connections.spawn(async move {
                proxy.connection(stream, trusted, &stop).await;
                drop(permit);
            });
        }
        drop(listener);
        let drained = timeout(DRAIN_TIMEOUT, async {
            while let Some(ended) = connections.join_next().await {
                report(ended);
            }
        });
        if drained.await.is_err() {
            tracing::info!(connections = connections.len(), "cutting clients that did not finish in time");
            connections.shutdown().await;
        }
    }

    async fn connection(self: &Arc<Self>, stream: TcpStream, trusted: bool, stop: &CancellationToken) {
        // Answers are written as they come; waiting for more to send would delay the first byte of a blob.
        let _ = stream.set_nodelay(true);
        match &self.tls {
            None => self.client(stream, trusted, stop).await,
            Some(identity) => match identity.accept(stream, None).await {
                Ok(stream) => self.client(stream, trusted, stop).await,
                Err(error) => tracing::debug!(%error, "a client's TLS connection failed"),
            },
        }
    }

    async fn client<I>(self: &Arc<Self>, io: I, trusted: bool, stop: &CancellationToken)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let slot = UpgradeSlot::default();
        self.requests(io, Arrival { trusted, hijacked: None, upgrade: Some(slot.clone()) }, stop).await;
        if let Some(upgrade) = slot.take() {
            self.upgraded(upgrade, trusted, stop).await;
        }
    }

    /// Answers the requests of a connection until it ends, is upgraded, or `stop` lets the last one finish.
    pub(super) async fn requests<I>(self: &Arc<Self>, io: I, arrival: Arrival, stop: &CancellationToken)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let arrival = Arc::new(arrival);
        let (io, twice) = Watched::new(io);
        let service = service_fn(|request| {
            let (proxy, arrival, twice) = (Arc::clone(self), Arc::clone(&arrival), twice.was_seen());
            async move {
                if twice {
                    let refusal = Refusal::Malformed("a request has a length or chunks, and not both");
                    return Ok(respond::refuse(&refusal, &proxy.metrics));
                }
                let is_last = is_chunked(&request);
                let mut answer = proxy.handle(request, &arrival).await;
                if is_last {
                    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(answer)
            }
        });
        let connection = http1::Builder::new()
            .timer(Patience::default())
            .header_read_timeout(HEADERS_TIMEOUT)
            .max_headers(HEADERS_MAX)
            .max_header_size(HEADER_BYTES_MAX)
            .max_buf_size(BUFFER_BYTES_MAX)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a client's connection broke");
        }
    }
}

async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(room).acquire_owned().await else { std::future::pending().await };
        match listener.accept().await {
            Ok((stream, client)) => return (stream, client, permit),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a client's connection ended in a defect");
    }
}

/// hyper has one timeout for a request's headers and runs it while a connection is idle as well. This timer tells the
/// two apart: it asks for a new sleep per request, the first of which is taken as it is and the later ones as idle time.
#[derive(Clone, Default)]
struct Patience(Arc<AtomicBool>);

impl Timer for Patience {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        TokioTimer::new().sleep(duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        let again = self.0.swap(true, Ordering::Relaxed);
        let more = if again { IDLE_TIMEOUT.saturating_sub(HEADERS_TIMEOUT) } else { Duration::ZERO };
        TokioTimer::new().sleep_until(deadline + more)
    }

    fn now(&self) -> Instant {
        TokioTimer::new().now()
    }

    fn reset(&self, sleep: &mut Pin<Box<dyn Sleep>>, deadline: Instant) {
        TokioTimer::new().reset(sleep, deadline);
    }
}
