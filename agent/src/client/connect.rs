//! A connection for one request: TCP, `CONNECT` through a proxy, TLS, HTTP/1.1; and the answer that it carries.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use super::Client;

/// How long a connection may take to stand, all layers together.
const CONNECT_MAX: Duration = Duration::from_secs(15);

/// Why there is no connection to the registry.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens there, or the system refused.
    #[error("cannot connect to {to}")]
    Tcp {
        /// The registry, or the proxy.
        to: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It took too long.
    #[error("no connection to {to} within {CONNECT_MAX:?}")]
    Slow {
        /// The registry.
        to: String,
    },
    /// The proxy answered `CONNECT` with something else than 200.
    #[error("the proxy answered CONNECT {to} with {status}")]
    Refused {
        /// The registry.
        to: String,
        /// The proxy's answer.
        status: StatusCode,
    },
    /// The certificate was not accepted, or the peer does not speak TLS.
    #[error("no TLS with {to}")]
    Tls {
        /// The registry.
        to: String,
        /// What the TLS library said.
        #[source]
        source: std::io::Error,
    },
    /// The registry's name cannot stand in a certificate. The caller's mistake.
    #[error("{to} is not a server name")]
    Name {
        /// The name.
        to: String,
    },
    /// The peer does not speak HTTP.
    #[error("no HTTP with {to}")]
    Http {
        /// The registry, or the proxy.
        to: String,
        /// What the HTTP library said.
        #[source]
        source: hyper::Error,
    },
}

/// A connection that is ready for its request.
pub(super) struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    drivers: Vec<AbortOnDropHandle<()>>,
    authority: String,
    /// In front of the path, where a proxy takes the request itself.
    prefix: String,
}

/// The answer to a request. The connection ends with it.
pub(crate) struct Exchange {
    pub(crate) head: Response<()>,
    pub(crate) body: Incoming,
    /// They move the body's bytes.
    _drivers: Vec<AbortOnDropHandle<()>>,
}

/// Connects as `client` says.
pub(super) async fn open(client: &Client) -> Result<Connection, ConnectError> {
    let to = match client.host.parse::<std::net::Ipv6Addr>() {
        Ok(address) => format!("[{address}]:{}", client.port),
        Err(_) => format!("{}:{}", client.host, client.port),
    };
    let connecting = establish(client, &to);
    tokio::time::timeout(CONNECT_MAX, connecting).await.unwrap_or_else(|_| Err(ConnectError::Slow { to: to.clone() }))
}

async fn establish(client: &Client, to: &str) -> Result<Connection, ConnectError> {
    let mut drivers = Vec::new();
    let (sender, prefix) = match (client.proxy, &client.tls) {
        (None, None) => (speak(tcp(to).await?, to, &mut drivers).await?, String::new()),
        (None, Some(tls)) => {
            let stream = secure(tcp(to).await?, client, tls, to).await?;
            (speak(stream, to, &mut drivers).await?, String::new())
        }
        (Some(proxy), None) => {
            let proxy = proxy.to_string();
            (speak(tcp(&proxy).await?, &proxy, &mut drivers).await?, format!("http://{to}"))
        }
        (Some(proxy), Some(tls)) => {
            let tunnel = tunnel(proxy, to, &mut drivers).await?;
            let stream = secure(tunnel, client, tls, to).await?;
            (speak(stream, to, &mut drivers).await?, String::new())
        }
    };
    Ok(Connection { sender, drivers, authority: to.to_owned(), prefix })
}

async fn tcp(to: &str) -> Result<TcpStream, ConnectError> {
    let failed = |source| ConnectError::Tcp { to: to.to_owned(), source };
    let stream = TcpStream::connect(to).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    Ok(stream)
}

/// Asks the proxy for a way to the registry.
async fn tunnel(
    proxy: SocketAddr,
    to: &str,
    drivers: &mut Vec<AbortOnDropHandle<()>>,
) -> Result<TokioIo<hyper::upgrade::Upgraded>, ConnectError> {
    let proxy = proxy.to_string();
    let failed = |source| ConnectError::Http { to: proxy.clone(), source };
    let (Ok(uri), Ok(host)) = (to.parse::<Uri>(), HeaderValue::from_str(to)) else {
        return Err(ConnectError::Name { to: to.to_owned() });
    };
    let mut request = Request::new(Empty::new());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    request.headers_mut().insert(HOST, host);
    let response = speak(tcp(&proxy).await?, &proxy, drivers).await?.send_request(request).await.map_err(failed)?;
    if response.status() != StatusCode::OK {
        return Err(ConnectError::Refused { to: to.to_owned(), status: response.status() });
    }
    hyper::upgrade::on(response).await.map(TokioIo::new).map_err(failed)
}

async fn secure<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    client: &Client,
    tls: &Arc<rustls::ClientConfig>,
    to: &str,
) -> Result<tokio_rustls::client::TlsStream<S>, ConnectError> {
    let name = ServerName::try_from(client.host.clone()).map_err(|_| ConnectError::Name { to: to.to_owned() })?;
    let connected = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
    connected.map_err(|source| ConnectError::Tls { to: to.to_owned(), source })
}

/// Starts HTTP on a stream; what drives it is added to `drivers`.
async fn speak<S>(
    stream: S,
    to: &str,
    drivers: &mut Vec<AbortOnDropHandle<()>>,
) -> Result<SendRequest<Empty<Bytes>>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let started = handshake(TokioIo::new(stream)).await;
    let (sender, connection) = started.map_err(|source| ConnectError::Http { to: to.to_owned(), source })?;
    drivers.push(AbortOnDropHandle::new(tokio::spawn(async move {
        // Whoever waits for the answer gets the same error.
        let _ = connection.with_upgrades().await;
    })));
    Ok(sender)
}

impl Connection {
    pub(super) async fn send(mut self, request: Request<()>) -> Result<Exchange, hyper::Error> {
        let (mut parts, ()) = request.into_parts();
        // Both parse: they are made of an address, a port and a path that parsed before.
        if let Ok(uri) = format!("{}{}", self.prefix, parts.uri).parse() {
            parts.uri = uri;
        }
        if let Ok(host) = HeaderValue::from_str(&self.authority) {
            parts.headers.insert(HOST, host);
        }
        let response = self.sender.send_request(Request::from_parts(parts, Empty::new())).await?;
        let (parts, body) = response.into_parts();
        Ok(Exchange { head: Response::from_parts(parts, ()), body, _drivers: self.drivers })
    }
}
