//! A registry for tests that says exactly the bytes it is told to, right or wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinSet;

use super::{BlobOrigin, RegistryPolicy, Settings, Upstream};
use crate::admin::metrics::Metrics;

/// One request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) connection: usize,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub(crate) fn range(&self) -> Option<Range<usize>> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some(first.parse().unwrap()..last.parse::<usize>().unwrap() + 1)
    }
}

/// What to do after a request.
pub(crate) enum Reply {
    /// Say this and wait for the next request.
    Say(Vec<u8>),
    /// Say this and close.
    Close(Vec<u8>),
    /// Say this and nothing more, without closing.
    Hang(Vec<u8>),
}

/// A reply with a length, unless `headers` name one or another framing.
pub(crate) fn reply(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} Status\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length") || *name == "transfer-encoding") {
        text += &format!("content-length: {}\r\n", body.len());
    }
    [text.as_bytes(), b"\r\n", body].concat()
}

/// Serves `blob` as a registry does.
pub(crate) fn serve(blob: &[u8], seen: &Seen) -> Reply {
    let length = blob.len().to_string();
    Reply::Say(match (seen.method.as_str(), seen.range()) {
        ("HEAD", _) => reply(200, &[("content-length", &length), ("etag", "\"e\"")], b""),
        (_, Some(range)) => {
            let content_range = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            reply(206, &[("content-range", &content_range)], &blob[range])
        }
        (_, None) => reply(200, &[], blob),
    })
}

/// A running server. Dropping it closes everything.
pub(crate) struct Origin {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
    scheme: &'static str,
    tasks: JoinSet<()>,
    reserved: Option<TcpSocket>,
}

impl Origin {
    pub(crate) async fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0", None, handler).await
    }

    pub(crate) async fn start_at(
        address: &str,
        tls: Option<tokio_rustls::TlsAcceptor>,
        handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let connections: Arc<AtomicUsize> = Arc::default();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut tasks = JoinSet::new();
        let (handler, log, count) = (Arc::new(handler), seen.clone(), connections.clone());
        tasks.spawn(async move {
            let mut clients = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let connection = count.fetch_add(1, Ordering::SeqCst);
                let (handler, log, tls) = (handler.clone(), log.clone(), tls.clone());
                clients.spawn(async move {
                    match tls {
                        None => answer(stream, connection, &*handler, &log).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                answer(stream, connection, &*handler, &log).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, seen, connections, scheme, tasks, reserved: None }
    }

    /// A URL on this server; `https` needs a name, which `localhost` is.
    pub(crate) fn url(&self, path: &str) -> String {
        match self.scheme {
            "https" => format!("https://localhost:{}{path}", self.address.port()),
            _ => format!("http://{}{path}", self.address),
        }
    }

    /// All requests so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// All connections so far.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Closes everything; the port refuses from now on, and nobody else gets it meanwhile.
    pub(crate) async fn stop(&mut self) {
        self.tasks.shutdown().await;
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        self.reserved = Some(socket);
    }
}

async fn answer(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    connection: usize,
    handler: &(impl Fn(&Seen) -> Reply + Send + Sync),
    log: &Mutex<Vec<Seen>>,
) {
    let mut buffer = Vec::new();
    loop {
        let Some(seen) = receive(&mut stream, &mut buffer, connection).await else { return };
        log.lock().unwrap().push(seen.clone());
        let (bytes, then) = match handler(&seen) {
            Reply::Say(bytes) => (bytes, Some(true)),
            Reply::Close(bytes) => (bytes, Some(false)),
            Reply::Hang(bytes) => (bytes, None),
        };
        if stream.write_all(&bytes).await.is_err() {
            return;
        }
        let _ = stream.flush().await;
        match then {
            Some(true) => {}
            Some(false) => {
                let _ = stream.shutdown().await;
                return;
            }
            None => {
                // Until the client closes.
                while stream.read_buf(&mut buffer).await.is_ok_and(|n| n > 0) {}
                return;
            }
        }
    }
}

async fn receive(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>, connection: usize) -> Option<Seen> {
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer.drain(..end + 4).collect()).unwrap();
    let mut lines = head.trim_end().split("\r\n");
    let mut words = lines.next()?.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers: HeaderMap = lines
        .map(|line| {
            let (name, value) = line.split_once(':').unwrap();
            (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value.trim()).unwrap())
        })
        .collect();
    let length = headers.get("content-length").map_or(0, |length| length.to_str().unwrap().parse().unwrap());
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = buffer.drain(..length).collect();
    Some(Seen { connection, method, path, headers, body })
}

/// An upstream that may talk to 127.0.0.1, and its counters.
pub(crate) fn upstream() -> (Arc<Upstream>, Arc<Metrics>) {
    upstream_with(&[("127.0.0.1", RegistryPolicy::default())])
}

pub(crate) fn upstream_with(policies: &[(&str, RegistryPolicy)]) -> (Arc<Upstream>, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::default());
    let policies: BTreeMap<_, _> = policies.iter().map(|(host, policy)| ((*host).to_owned(), policy.clone())).collect();
    let settings = Settings { policies, ..Settings::default() };
    (Arc::new(Upstream::new(settings, metrics.clone()).unwrap()), metrics)
}

pub(crate) fn origin(url: &str, headers: &[(&str, &str)]) -> BlobOrigin {
    let headers = headers
        .iter()
        .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap()))
        .collect();
    BlobOrigin { url: url.parse().unwrap(), headers }
}
