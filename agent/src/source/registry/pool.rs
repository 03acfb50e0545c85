//! HTTP clients with their idle connections, one per credential.
//!
//! A connection that carried one client's credentials is never used for another's (S29), whatever a registry or a
//! proxy in front of it remembers about a connection.

use std::future::Future;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper::rt::Executor;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioIo, TokioTimer};
use lru::LruCache;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::JoinSet;

use super::body::ProxyBody;
use super::headers::Credential;
use crate::net::dial::tls::{Link, RegistryTls};
use crate::net::dial::{BLOB_RECEIVE_BYTES, DialError, Dialer, canonical};

/// Credentials whose connections are kept. Beyond it the least recently used one's idle connections are closed.
const CLIENTS_MAX: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// Idle connections kept per credential and host: as many as a pull of a few layers uses at a time.
const IDLE_MAX: usize = 8;

/// How long a connection is kept idle: the pause between the runs of a pull. Registries close theirs after 60 s or
/// more, so that the agent is the one who closes.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Read buffer per connection, which also bounds a response's head (S26). Registries send heads of 1 to 4 KiB.
const READ_BYTES_MAX: usize = 64 * 1024;

/// Header fields of a response that are accepted (S26).
const HEADERS_MAX: usize = 100;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Purpose {
    /// A client's own request, passed on.
    Pass,
    /// Pieces of a blob, read as fast as the swarm takes them.
    Blob,
}

/// All clients. Dropping it ends every connection.
pub(super) struct Pool {
    dialer: Dialer,
    tls: Arc<RegistryTls>,
    clients: Mutex<LruCache<(Credential, Purpose), Client<Connector, ProxyBody>>>,
    connections: Arc<Mutex<JoinSet<()>>>,
}

impl Pool {
    pub(super) fn new(dialer: Dialer, tls: RegistryTls) -> Self {
        Self {
            dialer,
            tls: Arc::new(tls),
            clients: Mutex::new(LruCache::new(CLIENTS_MAX)),
            connections: Arc::default(),
        }
    }

    /// The client whose connections are `credential`'s alone.
    pub(super) fn client(&self, credential: Credential, purpose: Purpose) -> Client<Connector, ProxyBody> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.get_or_insert((credential, purpose), || self.build(purpose)).clone()
    }

    fn build(&self, purpose: Purpose) -> Client<Connector, ProxyBody> {
        let receive_bytes = match purpose {
            Purpose::Pass => None,
            Purpose::Blob => Some(BLOB_RECEIVE_BYTES),
        };
        Client::builder(Owned(Arc::downgrade(&self.connections)))
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_MAX)
            .http1_max_buf_size(READ_BYTES_MAX)
            .http1_max_headers(HEADERS_MAX)
            .build(Connector { dialer: self.dialer.clone(), tls: self.tls.clone(), receive_bytes })
    }
}

/// Runs connections in the pool's own set, so that none outlives the pool.
#[derive(Clone)]
struct Owned(Weak<Mutex<JoinSet<()>>>);

impl<F> Executor<F> for Owned
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, connection: F) {
        // Without the pool the connection is dropped, and with it the request that wanted it.
        let Some(connections) = self.0.upgrade() else { return };
        let mut connections = connections.lock().unwrap_or_else(PoisonError::into_inner);
        while connections.try_join_next().is_some() {}
        connections.spawn(async {
            connection.await;
        });
    }
}

/// Opens the connections of one client.
#[derive(Clone)]
pub(super) struct Connector {
    dialer: Dialer,
    tls: Arc<RegistryTls>,
    receive_bytes: Option<u32>,
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<Upstreamed>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Self { dialer, tls, receive_bytes } = self.clone();
        Box::pin(async move {
            // The URI is a target's, which always has a host.
            let host = canonical(uri.host().unwrap_or_default());
            let https = uri.scheme_str() == Some("https");
            let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
            let link = if https {
                Link::Tls(Box::new(tls.connect(&dialer, &host, port, receive_bytes).await?))
            } else {
                Link::Plain(dialer.dial(&host, port, receive_bytes).await?)
            };
            Ok(TokioIo::new(Upstreamed(link)))
        })
    }
}

/// A link that the HTTP client may use.
pub(super) struct Upstreamed(Link);

impl Connection for Upstreamed {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Upstreamed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Upstreamed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
