//! HTTP/2, for clients inside a tunnel: many requests over one connection, within the bounds that many connections have.

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use http::Request;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Arrival, BUFFER_BYTES_MAX, DRAIN_TIMEOUT, HEADERS_TIMEOUT, IDLE_TIMEOUT};
use crate::proxy::Proxy;
use crate::proxy::framing::{HEADER_BYTES_MAX, join_cookies};
use crate::proxy::seam::{Authorize, Blobs, Origin};

/// Requests at a time over one connection; a client holds back the others. The least that clients may expect (RFC 9113,
/// section 6.5.2), and far more layers than Docker or containerd pull at once.
const STREAMS_MAX: u32 = 100;

/// Bytes of a client's body that wait for an upstream, per request. Enough for clients a millisecond away: 64 MB/s each.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;

/// The same per connection: what a client with many uploads can make the agent hold.
const CONNECTION_WINDOW_BYTES: u32 = 256 * 1024;

/// Requests that a client took back before they were looked at. With more, the connection is closed: nobody who wants
/// answers does that (CVE-2023-44487).
const TAKEN_BACK_MAX: usize = 20;

/// Requests that were malformed and ended by the agent, not yet forgotten. With more, the connection is closed
/// (CVE-2025-8671).
const MALFORMED_MAX: usize = 20;

impl<O: Origin, A: Authorize, B: Blobs> Proxy<O, A, B> {
    /// Answers the requests of a connection until it ends, has none for too long, or `stop` lets the last ones finish.
    pub(in crate::proxy) async fn streams<I>(self: &Arc<Self>, io: I, arrival: Arrival, stop: &CancellationToken)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let arrival = Arc::new(arrival);
        let service = service_fn(|mut request: Request<Incoming>| {
            let (proxy, arrival) = (Arc::clone(self), Arc::clone(&arrival));
            async move {
                join_cookies(request.headers_mut());
                Ok::<_, Infallible>(proxy.handle(request, &arrival).await)
            }
        });
        let streams = Streams::new(Arc::clone(&self.streams));
        let mut open = streams.open.subscribe();
        let header_bytes_max = u32::try_from(HEADER_BYTES_MAX).unwrap_or(u32::MAX);
        let connection = http2::Builder::new(streams.executor())
            .max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_send_buf_size(BUFFER_BYTES_MAX)
            .max_header_list_size(header_bytes_max)
            .max_pending_accept_reset_streams(TAKEN_BACK_MAX)
            .max_local_error_reset_streams(MALFORMED_MAX)
            .serve_connection(TokioIo::new(io), service);
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
            () = idle(&mut open) => {
                connection.as_mut().graceful_shutdown();
                // Whoever does not even take leave is not waited for.
                timeout(DRAIN_TIMEOUT, connection).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a client's connection broke");
        }
    }
}

/// Ends when a connection has no requests for too long; at first it may take as long as the headers of the first one.
async fn idle(open: &mut watch::Receiver<usize>) {
    let mut patience = HEADERS_TIMEOUT;
    loop {
        let changed = if *open.borrow_and_update() > 0 {
            open.changed().await
        } else {
            let Ok(changed) = timeout(patience, open.changed()).await else { return };
            patience = IDLE_TIMEOUT;
            changed
        };
        // The sender is dropped with the connection.
        if changed.is_err() {
            return;
        }
    }
}

/// The requests of one connection, each a task that ends with the connection.
struct Streams {
    tasks: Arc<Mutex<JoinSet<()>>>,
    /// How many there are.
    open: Arc<watch::Sender<usize>>,
    /// Turns, of which all connections have one supply.
    turns: Arc<Semaphore>,
}

impl Streams {
    fn new(turns: Arc<Semaphore>) -> Self {
        Self { tasks: Arc::default(), open: Arc::new(watch::Sender::new(0)), turns }
    }

    fn executor(&self) -> Spawner {
        Spawner { tasks: Arc::downgrade(&self.tasks), open: self.open.clone(), turns: self.turns.clone() }
    }
}

/// What starts them.
#[derive(Clone)]
struct Spawner {
    /// The tasks hold a spawner, so that it must not hold them.
    tasks: Weak<Mutex<JoinSet<()>>>,
    open: Arc<watch::Sender<usize>>,
    turns: Arc<Semaphore>,
}

impl<F> Executor<F> for Spawner
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        let Some(tasks) = self.tasks.upgrade() else { return };
        let mut tasks = tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        let open = Open::new(self.open.clone());
        let turns = self.turns.clone();
        tasks.spawn(async move {
            let _open = open;
            // The semaphore is never closed.
            let _turn = turns.acquire_owned().await;
            stream.await;
        });
    }
}

/// Counts as an open request until it is dropped.
struct Open(Arc<watch::Sender<usize>>);

impl Open {
    fn new(open: Arc<watch::Sender<usize>>) -> Self {
        open.send_modify(|open| *open += 1);
        Self(open)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}
