//! An HTTP server for tests that says exactly the bytes it is told to, right or wrong, and remembers what it was asked.
//!
//! The crate's own tests and those of the agent as a whole share it, so it knows nothing of the agent.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

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
    /// Say this and reset the connection.
    Reset(Vec<u8>),
    /// Say this a few bytes at a time, with a pause after each, and wait for the next request.
    Dribble {
        /// What to say.
        bytes: Vec<u8>,
        /// How many at a time.
        step: usize,
        /// How long in between.
        pause: Duration,
    },
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

/// A running server. Dropping it closes everything.
pub(crate) struct Origin {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
    scheme: &'static str,
    tasks: JoinSet<()>,
    reserved: Option<tokio::net::TcpSocket>,
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
                // To reset the connection below whatever TLS there is.
                let stream = stream.into_std().unwrap();
                let socket = stream.try_clone().unwrap();
                let stream = TcpStream::from_std(stream).unwrap();
                let connection = count.fetch_add(1, Ordering::SeqCst);
                let (handler, log, tls) = (handler.clone(), log.clone(), tls.clone());
                clients.spawn(async move {
                    match tls {
                        None => answer(stream, &socket, connection, &*handler, &log).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                answer(stream, &socket, connection, &*handler, &log).await;
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
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        self.reserved = Some(socket);
    }
}

async fn answer(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    socket: &std::net::TcpStream,
    connection: usize,
    handler: &(impl Fn(&Seen) -> Reply + Send + Sync),
    log: &Mutex<Vec<Seen>>,
) {
    let mut buffer = Vec::new();
    loop {
        let Some(seen) = receive(&mut stream, &mut buffer, connection).await else { return };
        log.lock().unwrap().push(seen.clone());
        let said = match handler(&seen) {
            Reply::Say(bytes) => say(&mut stream, &bytes).await,
            Reply::Dribble { bytes, step, pause } => dribble(&mut stream, &bytes, step, pause).await,
            Reply::Close(bytes) => {
                let _ = say(&mut stream, &bytes).await;
                let _ = stream.shutdown().await;
                return;
            }
            Reply::Reset(bytes) => {
                let _ = say(&mut stream, &bytes).await;
                // Closing resets instead of ending the stream.
                socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap();
                return;
            }
            Reply::Hang(bytes) => {
                let _ = say(&mut stream, &bytes).await;
                // Until the client closes.
                while stream.read_buf(&mut buffer).await.is_ok_and(|n| n > 0) {}
                return;
            }
        };
        if said.is_err() {
            return;
        }
    }
}

async fn say(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

async fn dribble(
    stream: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    step: usize,
    pause: Duration,
) -> std::io::Result<()> {
    for part in bytes.chunks(step) {
        say(stream, part).await?;
        tokio::time::sleep(pause).await;
    }
    Ok(())
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
    let body = if headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked") {
        chunks(stream, buffer).await?
    } else {
        let length = headers.get("content-length").map_or(0, |length| length.to_str().unwrap().parse().unwrap());
        take(stream, buffer, length).await?
    };
    Some(Seen { connection, method, path, headers, body })
}

async fn take(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>, length: usize) -> Option<Vec<u8>> {
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    Some(buffer.drain(..length).collect())
}

/// A body in chunks, without trailers.
async fn chunks(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(2).position(|two| two == b"\r\n") {
                break end;
            }
            if stream.read_buf(buffer).await.ok()? == 0 {
                return None;
            }
        };
        let size: Vec<u8> = buffer.drain(..end + 2).take(end).collect();
        let length = usize::from_str_radix(std::str::from_utf8(&size).unwrap(), 16).unwrap();
        let chunk = take(stream, buffer, length + 2).await?;
        body.extend_from_slice(&chunk[..length]);
        if length == 0 {
            return Some(body);
        }
    }
}
