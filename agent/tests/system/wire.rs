//! HTTP as a test wants it: one request per connection, by any way, with the body as it comes.
//!
//! The demonstration's client checks digests; this one shows status, headers, bytes and where they stopped.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

/// Longer than anything takes that works.
const STALL_MAX: Duration = Duration::from_secs(30);

/// The longest head of an answer to CONNECT.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// How a request gets to its registry.
#[derive(Clone)]
pub(crate) enum Way {
    /// Straight there, or to a mirror that is spoken to as if it were the registry. HTTPS where something is trusted.
    To(SocketAddr, Option<Arc<rustls::ClientConfig>>),
    /// Through a proxy, by CONNECT, then TLS.
    Tunnel { proxy: SocketAddr, to: SocketAddr, tls: Arc<rustls::ClientConfig> },
    /// Through a proxy that is given the whole URL.
    Absolute { proxy: SocketAddr, to: SocketAddr },
}

/// An answer whose body is still coming.
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    /// The certificate that the server showed, in DER, where there was TLS.
    pub(crate) certificate: Option<Vec<u8>>,
    _driver: AbortOnDropHandle<()>,
}

/// A body that has ended, one way or the other.
pub(crate) struct Ended {
    pub(crate) bytes: Bytes,
    /// Whether the connection broke before the end of the body.
    pub(crate) cut: bool,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// A GET.
pub(crate) async fn get(way: &Way, path: &str, headers: &[(&'static str, &str)]) -> Reply {
    send(way, Method::GET, path, headers).await
}

/// Any request without a body.
pub(crate) async fn send(way: &Way, method: Method, path: &str, headers: &[(&'static str, &str)]) -> Reply {
    send_body(way, method, path, headers, Bytes::new()).await
}

/// Any request.
pub(crate) async fn send_body(
    way: &Way,
    method: Method,
    path: &str,
    headers: &[(&'static str, &str)],
    body: Bytes,
) -> Reply {
    let exchange = async {
        let (stream, certificate, uri, host) = connect(way, path).await;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            // Whoever reads the body gets the same error.
            let _ = connection.await;
        }));
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri.parse().unwrap();
        request.headers_mut().insert(http::header::HOST, HeaderValue::try_from(host).unwrap());
        for (name, value) in headers {
            request.headers_mut().append(*name, HeaderValue::try_from(*value).unwrap());
        }
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        Reply { status: head.status, headers: head.headers, body, certificate, _driver: driver }
    };
    tokio::time::timeout(STALL_MAX, exchange).await.expect("an answer")
}

async fn connect(way: &Way, path: &str) -> (Box<dyn Io>, Option<Vec<u8>>, String, String) {
    match way {
        Way::To(address, None) => (Box::new(tcp(*address).await), None, path.to_owned(), address.to_string()),
        Way::To(address, Some(tls)) => {
            let (stream, certificate) = secure(tcp(*address).await, *address, tls).await;
            (stream, certificate, path.to_owned(), address.to_string())
        }
        Way::Tunnel { proxy, to, tls } => {
            let (status, stream) = tunnel(*proxy, &to.to_string()).await;
            assert_eq!(status, StatusCode::OK, "CONNECT {to}");
            let (stream, certificate) = secure(stream, *to, tls).await;
            (stream, certificate, path.to_owned(), to.to_string())
        }
        Way::Absolute { proxy, to } => {
            (Box::new(tcp(*proxy).await), None, format!("http://{to}{path}"), to.to_string())
        }
    }
}

async fn tcp(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

async fn secure(stream: TcpStream, to: SocketAddr, tls: &Arc<rustls::ClientConfig>) -> (Box<dyn Io>, Option<Vec<u8>>) {
    let name = ServerName::IpAddress(to.ip().into());
    let stream = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await.unwrap();
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| Some(chain.first()?.to_vec()));
    (Box::new(stream), shown)
}

/// Asks a proxy for a way to `to`; what it answered, and the connection.
pub(crate) async fn tunnel(proxy: SocketAddr, to: &str) -> (StatusCode, TcpStream) {
    let mut stream = tcp(proxy).await;
    let head = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") && answer.len() < HEAD_BYTES_MAX {
        // Byte by byte: what follows the head belongs to somebody else.
        answer.push(stream.read_u8().await.unwrap());
    }
    let status = std::str::from_utf8(&answer).unwrap().split(' ').nth(1).unwrap();
    (status.parse().unwrap(), stream)
}

impl Reply {
    /// A header's text; empty if it is missing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The next bytes; `None` at the end, an error where the connection broke.
    pub(crate) async fn next(&mut self) -> Option<Result<Bytes, hyper::Error>> {
        loop {
            let frame = tokio::time::timeout(STALL_MAX, self.body.frame()).await.expect("the body goes on")?;
            match frame.map(|frame| frame.into_data()) {
                Ok(Ok(bytes)) => return Some(Ok(bytes)),
                Ok(Err(_trailers)) => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Everything up to the end or the break.
    pub(crate) async fn end(mut self) -> Ended {
        let mut bytes = BytesMut::new();
        loop {
            match self.next().await {
                Some(Ok(more)) => bytes.extend_from_slice(&more),
                Some(Err(_)) => return Ended { bytes: bytes.freeze(), cut: true },
                None => return Ended { bytes: bytes.freeze(), cut: false },
            }
        }
    }

    /// The whole body, which must not be cut.
    pub(crate) async fn whole(self) -> Bytes {
        let ended = self.end().await;
        assert!(!ended.cut, "cut after {} bytes", ended.bytes.len());
        ended.bytes
    }
}
