//! The origin's server: the pull half of the distribution API over one OCI layout, with single ranges.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;

use super::ledger::Ledger;

/// Where the ledger is asked for.
pub(super) const LEDGER_PATH: &str = "/ledger";

/// Kept small, so that what was handed over and what the other side has read differ by little: see [`CHUNK_BYTES`].
const SEND_BUFFER_BYTES: u32 = 64 << 10;

/// What is handed over at once, and hyper's smallest buffer.
const CHUNK_BYTES: usize = 8 << 10;

/// Pending connections; more than a lab has agents.
const BACKLOG: u32 = 128;

/// Connections at a time; those beyond wait in the backlog.
const CONNECTIONS_MAX: usize = 256;

struct Shared {
    /// Blobs and manifests by digest, and manifests' tag `latest`.
    content: BTreeMap<String, Bytes>,
    ledger: Ledger,
}

/// Serves the layout in `dir` until the process ends.
pub async fn serve(listen: SocketAddr, dir: &Path) -> Result<()> {
    let shared = Arc::new(Shared { content: load(dir)?, ledger: Ledger::default() });
    let socket = if listen.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    // Accepted connections inherit it.
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    let listener = socket.listen(BACKLOG)?;
    let mut connections = JoinSet::new();
    loop {
        if connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        while connections.try_join_next().is_some() {}
        let (stream, _) = listener.accept().await?;
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move { Ok::<_, Infallible>(answer(&shared, &request)) }
            });
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).max_buf_size(CHUNK_BYTES);
            // An agent that is killed ends its connections with an error, which is what the lab is for.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

fn load(dir: &Path) -> Result<BTreeMap<String, Bytes>> {
    let mut content = BTreeMap::new();
    for entry in fs::read_dir(dir.join("blobs/sha256"))? {
        let entry = entry?;
        let name = format!("sha256:{}", entry.file_name().to_string_lossy());
        content.insert(name, Bytes::from(fs::read(entry.path())?));
    }
    let index: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("index.json"))?)?;
    let digest = index["manifests"][0]["digest"].as_str().context("an index without a manifest")?;
    let manifest = content.get(digest).cloned().context("a manifest that is not there")?;
    content.insert("latest".to_owned(), manifest);
    Ok(content)
}

fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<Counted> {
    let path = request.uri().path();
    if path == LEDGER_PATH {
        return whole(StatusCode::OK, Bytes::from(shared.ledger.write()));
    }
    if path == "/v2/" {
        return whole(StatusCode::OK, Bytes::from_static(b"{}"));
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return whole(StatusCode::METHOD_NOT_ALLOWED, Bytes::new());
    }
    let mut segments = path.rsplit('/');
    let (name, kind) = (segments.next().unwrap_or_default(), segments.next().unwrap_or_default());
    let Some(content) = shared.content.get(name) else { return whole(StatusCode::NOT_FOUND, Bytes::new()) };
    match kind {
        "manifests" => manifest(request, content),
        "blobs" => blob(shared, request, name, content),
        _ => whole(StatusCode::NOT_FOUND, Bytes::new()),
    }
}

fn manifest(request: &Request<Incoming>, content: &Bytes) -> Response<Counted> {
    let parsed: serde_json::Value = serde_json::from_slice(content).unwrap_or_default();
    let media_type = parsed["mediaType"].as_str().unwrap_or("application/json").parse();
    let length = content.len();
    let body = if request.method() == Method::HEAD { Bytes::new() } else { content.clone() };
    let mut response = whole(StatusCode::OK, body);
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    if let Ok(media_type) = media_type {
        response.headers_mut().insert(CONTENT_TYPE, media_type);
    }
    response
}

fn blob(shared: &Shared, request: &Request<Incoming>, digest: &str, content: &Bytes) -> Response<Counted> {
    let length = content.len() as u64;
    let range = request.headers().get(RANGE).and_then(|value| value.to_str().ok());
    let (status, range) = match range.map(|range| parse_range(range, length)) {
        None => (StatusCode::OK, 0..length),
        Some(Some(range)) => (StatusCode::PARTIAL_CONTENT, range),
        Some(None) => return whole(StatusCode::RANGE_NOT_SATISFIABLE, Bytes::new()),
    };
    let mut response = whole(status, Bytes::new());
    if request.method() == Method::GET {
        let index = shared.ledger.begin(digest, range.clone());
        let bytes = content.slice(range.start as usize..range.end as usize);
        *response.body_mut() = Counted { bytes, entry: Some((shared.ledger.clone(), digest.to_owned(), index)) };
    }
    let headers = response.headers_mut();
    headers.insert(CONTENT_LENGTH, (range.end - range.start).into());
    if let Ok(bytes) = "bytes".parse() {
        headers.insert(ACCEPT_RANGES, bytes);
    }
    if status == StatusCode::PARTIAL_CONTENT
        && let Ok(value) = format!("bytes {}-{}/{length}", range.start, range.end - 1).parse()
    {
        headers.insert(CONTENT_RANGE, value);
    }
    response
}

/// `bytes=a-b`, `bytes=a-` or `bytes=-n`, clipped; None if it cannot be satisfied or is none of these.
fn parse_range(range: &str, length: u64) -> Option<Range<u64>> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let range = match (first, last) {
        ("", last) => length.saturating_sub(last.parse().ok()?)..length,
        (first, "") => first.parse().ok()?..length,
        (first, last) => first.parse().ok()?..last.parse::<u64>().ok()?.checked_add(1)?.min(length),
    };
    (range.start < range.end).then_some(range)
}

fn whole(status: StatusCode, bytes: Bytes) -> Response<Counted> {
    let mut response = Response::new(Counted { bytes, entry: None });
    *response.status_mut() = status;
    response
}

/// A body that enters each chunk into the ledger as it is taken.
struct Counted {
    bytes: Bytes,
    entry: Option<(Ledger, String, usize)>,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.bytes.is_empty() {
            return Poll::Ready(None);
        }
        let chunk_bytes = self.bytes.len().min(CHUNK_BYTES);
        let chunk = self.bytes.split_to(chunk_bytes);
        if let Some((ledger, digest, index)) = &self.entry {
            ledger.add(digest, *index, chunk.len() as u64);
        }
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_registries_read_them() {
        let cases = [
            ("bytes=0-9", Some(0..10)),
            ("bytes=90-", Some(90..100)),
            ("bytes=-10", Some(90..100)),
            ("bytes=90-200", Some(90..100)),
            ("bytes=-200", Some(0..100)),
            ("bytes=100-", None),
            ("bytes=9-5", None),
            ("bytes=0-1,5-6", None),
            ("items=0-1", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_range(text, 100), expected, "{text}");
        }
    }
}
