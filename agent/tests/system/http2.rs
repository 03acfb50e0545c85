//! HTTP/2 through an agent: what comes is what comes over HTTP/1.1, many at a time, and neither much slower nor at the cost of
//! memory. What is refused is in `corpus`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use darter_agent::demo::image::Blob;
use futures_util::future::join_all;
use http::request::Builder;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::ServerName;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::task::AbortOnDropHandle;

use crate::corpus::http2::{frame, over_http2, preface, string};
use crate::stage::{MIB, Plan, Stage, metric, reconfigure};
use crate::unruly::server::{Origin, Reply, reply};
use crate::wait;
use crate::wire::{self, Way};

/// Requests at a time; an agent takes no more over one connection.
const STREAMS: u64 = 100;

/// What a slow client may make an agent hold for each of its requests.
const SLOW_BYTES_MAX: u64 = MIB;

/// How much longer a blob that the agent has may take over HTTP/2. Frames cost something; a window that is too small would cost
/// a multiple of this.
const SLOWER_MAX: u32 = 3;

/// An HTTP/2 connection to a hijacked host.
struct Client {
    to: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
    _driver: AbortOnDropHandle<()>,
}

impl Client {
    async fn connect(stage: &Stage, at: usize, to: SocketAddr) -> Self {
        let io = TokioIo::new(tunnel(stage, at, to).await);
        let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            // Whoever waits for an answer gets the same error.
            let _ = connection.await;
        }));
        Self { to, sender, _driver: driver }
    }

    fn request(&self, method: &Method, path: &str) -> Builder {
        Request::builder().method(method).uri(format!("https://{}{path}", self.to))
    }

    async fn send(&self, request: Builder, body: Bytes) -> (http::response::Parts, Incoming) {
        let answer = self.sender.clone().send_request(request.body(Full::new(body)).unwrap());
        tokio::time::timeout(wait::PATIENCE, answer).await.expect("an answer").unwrap().into_parts()
    }

    async fn whole(&self, request: Builder) -> (http::response::Parts, Bytes) {
        let (head, body) = self.send(request, Bytes::new()).await;
        (head, body.collect().await.unwrap().to_bytes())
    }
}

/// A tunnel in which HTTP/2 was agreed on.
async fn tunnel(stage: &Stage, at: usize, to: SocketAddr) -> TlsStream<TcpStream> {
    let (status, stream) = wire::tunnel(stage.agent(at).addresses().proxy, &to.to_string()).await;
    assert_eq!(status, 200);
    let tls = TlsConnector::from(over_http2(&stage.agent(at).tls()));
    let stream = tls.connect(ServerName::IpAddress(to.ip().into()), stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    stream
}

fn blob(stage: &Stage) -> (Blob, String) {
    let blob = stage.image.layers()[0].clone();
    let path = stage.blob_path(&blob.digest());
    (blob, path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_comes_as_over_http1_a_hundred_at_a_time() {
    let stage = Stage::start(Plan { agents: 2, layers: vec![5 * MIB + 3], ..Plan::default() }).await;
    let (blob, path) = blob(&stage);
    let client = Client::connect(&stage, 0, stage.registry.address()).await;
    let manifest = stage.manifest_path();
    let unknown = format!("/v2/{}/blobs/sha256:{}", stage.image.repository(), "0".repeat(64));
    for (method, path, range) in [
        (Method::GET, "/v2/", None),
        (Method::HEAD, &*manifest, None),
        (Method::GET, &manifest, None),
        (Method::HEAD, &path, None),
        (Method::GET, &unknown, None),
        (Method::GET, &path, Some("bytes=100-199")),
        (Method::GET, &path, Some("bytes=-5")),
        (Method::GET, &path, Some("bytes=0-1,5-6")),
        (Method::POST, "/v2/demo/app/blobs/uploads/", None),
        (Method::DELETE, &manifest, None),
        (Method::GET, "/v2/no/such/manifests/latest", None),
        (Method::GET, &path, None),
    ] {
        let case = format!("{method} {path} {range:?}");
        let headers: Vec<_> = range.iter().map(|range| ("range", *range)).collect();
        let own = wire::send(&stage.direct(), method.clone(), path, &headers).await;
        let mut request = client.request(&method, path);
        for (name, value) in &headers {
            request = request.header(*name, *value);
        }
        let (head, bytes) = client.whole(request).await;
        assert_eq!(head.status, own.status, "{case}");
        let meant = |name: &str| !["date", "connection", "transfer-encoding"].contains(&name);
        for (name, value) in own.headers.iter().filter(|(name, _)| meant(name.as_str())) {
            assert_eq!(head.headers.get(name), Some(value), "{case}: {name} in {:?}", head.headers);
        }
        assert!(bytes == own.whole().await, "{case}");
    }

    let ranges = (0..STREAMS).map(|at| at * 50_000..(at + 1) * 50_000);
    let parts = ranges.map(|range| {
        let said = format!("bytes={}-{}", range.start, range.end - 1);
        let request = client.request(&Method::GET, &path).header("range", said);
        async { (client.whole(request).await, range) }
    });
    for ((head, bytes), range) in join_all(parts).await {
        assert_eq!(head.status, StatusCode::PARTIAL_CONTENT);
        assert!(bytes == blob.read(range));
    }
    // The other agent has it from this one.
    let before = stage.settled().await.blob_bytes();
    let other = Client::connect(&stage, 1, stage.registry.address()).await;
    let (head, bytes) = other.whole(other.request(&Method::GET, &path)).await;
    assert!(head.status == StatusCode::OK && bytes == blob.read(0..blob.length()));
    assert_eq!(stage.settled().await.blob_bytes(), before);
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_arrive_as_they_were_sent() {
    let mut stage = Stage::start(Plan { agents: 1, layers: vec![MIB], ..Plan::default() }).await;
    let taken = |seen: &crate::unruly::server::Seen| Reply::Say(reply(202, &[("location", &seen.path)], b""));
    let registry = Origin::start_at(&format!("{}:0", stage.subnet.registry()), None, taken).await;
    let agent = stage.cluster.agent_mut(0).unwrap();
    agent.stop().await;
    reconfigure(agent, |config| {
        config["registries"][registry.address.to_string()] = json!({"insecure_http": true});
        config["hijack"]["hosts"] = json!([registry.address.to_string()]);
    });
    agent.start().unwrap();
    stage.ready().await;
    let client = Client::connect(&stage, 0, registry.address).await;
    let uploads = (0..20_usize).map(|at| {
        let body = Bytes::from(vec![u8::try_from(at).unwrap(); 300_000 * at]);
        let request = client.request(&Method::PATCH, &format!("/v2/a/blobs/uploads/{at}"));
        async { (client.send(request, body.clone()).await.0.status, body) }
    });
    for (at, (status, body)) in join_all(uploads).await.into_iter().enumerate() {
        assert_eq!(status, StatusCode::ACCEPTED, "{at}");
        let seen: Vec<_> = registry.seen().into_iter().filter(|seen| seen.path.ends_with(&format!("/{at}"))).collect();
        assert!(seen.len() == 1 && seen[0].method == "PATCH" && seen[0].body == body, "{at}");
    }
    stage.stop().await;
}

/// The quickest of three times.
async fn quickest(mut get: impl AsyncFnMut() -> Bytes, length: u64) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let start = Instant::now();
        assert_eq!(get().await.len() as u64, length);
        best = best.min(start.elapsed());
    }
    best
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_is_here_comes_about_as_fast_as_over_http1() {
    let stage = Stage::start(Plan { agents: 1, layers: vec![128 * MIB], ..Plan::default() }).await;
    let (blob, path) = blob(&stage);
    let way: Way = stage.through(0);
    let one = quickest(async || wire::get(&way, &path, &[]).await.whole().await, blob.length()).await;
    let client = Client::connect(&stage, 0, stage.registry.address()).await;
    let two = quickest(async || client.whole(client.request(&Method::GET, &path)).await.1, blob.length()).await;
    println!("128 MiB: {one:?} over HTTP/1.1, {two:?} over HTTP/2");
    assert!(two <= one * SLOWER_MAX, "{one:?} over HTTP/1.1, {two:?} over HTTP/2");
    stage.stop().await;
}

/// A hundred requests for a large blob, with windows as wide as there are, of which no byte is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_nothing_is_sent_little() {
    let stage = Stage::start(Plan { agents: 1, layers: vec![64 * MIB], ..Plan::default() }).await;
    let (blob, path) = blob(&stage);
    assert!(wire::get(&stage.through(0), &path, &[]).await.whole().await.len() as u64 == blob.length());
    let before = metric(stage.agent(0), "darter_client_sent_bytes_total").await;
    let to = stage.registry.address();
    let host = to.to_string();
    let fields = [(":method", "GET"), (":scheme", "https"), (":authority", &*host), (":path", &*path)];
    let block: Vec<u8> =
        fields.iter().flat_map(|(name, value)| [vec![0], string(name), string(value)].concat()).collect();
    let wide = (u32::MAX >> 1).to_be_bytes();
    let mut said = preface();
    said.extend(frame(4, 0, 0, &[&[0, 4][..], &wide].concat()));
    said.extend(frame(8, 0, 0, &((u32::MAX >> 1) - 65_535).to_be_bytes()));
    (0..STREAMS as u32).for_each(|at| said.extend(frame(1, 5, at * 2 + 1, &block)));
    let mut silent = tunnel(&stage, 0, to).await;
    silent.write_all(&said).await.unwrap();
    silent.flush().await.unwrap();

    let (mut last, mut same) = (before, 0);
    wait::until("no more is sent", async || {
        let sent = metric(stage.agent(0), "darter_client_sent_bytes_total").await;
        same = if sent == last && sent > before { same + 1 } else { 0 };
        last = sent;
        same > 20
    })
    .await;
    let sent = last - before;
    println!("{} KiB for {STREAMS} requests of which nothing is read", sent >> 10);
    assert!(sent <= STREAMS * SLOW_BYTES_MAX, "{sent} bytes");
    // Others are served meanwhile.
    assert!(wire::get(&stage.through(0), &path, &[]).await.whole().await.len() as u64 == blob.length());
    drop(silent);
    stage.stop().await;
}
