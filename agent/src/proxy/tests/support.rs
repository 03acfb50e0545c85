//! What the tests are made of.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use darter_tracker::Digest;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::header::HOST;
use http::{HeaderMap, Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use crate::admin::metrics::Metrics;
use crate::proxy::body::{BoxError, ClientBody};
use crate::proxy::mirror::MirrorSettings;
use crate::proxy::seam::{
    Authorize, BlobOrigin, BlobRequest, Blobs, Client, Descriptor, Fault, Origin, Repository, Verdict,
};
use crate::proxy::tls::{Identity, PemPair};
use crate::proxy::{Proxy, Settings};

/// How long a test waits for anything.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Moves the clock. Sockets are real, so time stands still only while it is moved.
pub(super) async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// A mirror of one registry, and nothing else.
pub(super) fn mirror_of(registry: String) -> Settings {
    Settings {
        tls: None,
        mirror: MirrorSettings { remote: Some(registry), direct: false },
        rules: Vec::new(),
        hijack: None,
        registries: Vec::new(),
    }
}

/// A repository's blob URL path for a digest of repeated bytes.
pub(super) fn blob_path(byte: u8) -> String {
    format!("/v2/library/busybox/blobs/{}", Digest::Sha256([byte; 32]))
}

/// What a registry was asked.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) uri: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// A small registry: notes every request and answers with what a function makes of it.
pub(super) struct Registry {
    pub(super) address: SocketAddr,
    pub(super) seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

/// A request with this header is answered after a second: as soon as nothing else is left to do, where time is a test's own.
pub(super) const LATE: &str = "x-late";

pub(super) type Answerer = fn(&Seen) -> Response<Full<Bytes>>;

/// Answers everything with its own name.
pub(super) fn hello(_: &Seen) -> Response<Full<Bytes>> {
    Response::builder().header("x-from", "registry").body(Full::from("from the registry")).unwrap()
}

impl Registry {
    pub(super) async fn start(tls: Option<&PemPair>, answer: Answerer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let identity = tls.map(|pair| Identity::of_listener(pair).unwrap());
        let log = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (log, identity) = (Arc::clone(&log), identity.clone());
                connections.spawn(async move {
                    match identity {
                        None => answer_all(stream, log, answer).await,
                        Some(identity) => {
                            if let Ok(stream) = identity.accept(stream, None).await {
                                answer_all(stream, log, answer).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, seen, task }
    }

    pub(super) fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// The one request that came.
    pub(super) fn one(&self) -> Seen {
        let mut seen = self.take();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen.remove(0)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer_all<I>(io: I, log: Arc<Mutex<Vec<Seen>>>, answer: Answerer)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let log = Arc::clone(&log);
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes().to_vec();
            let seen = Seen { method: head.method.to_string(), uri: head.uri.to_string(), headers: head.headers, body };
            let answer = answer(&seen);
            let late = seen.headers.contains_key(LATE);
            log.lock().unwrap().push(seen);
            if late {
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
            Ok::<_, Infallible>(answer)
        }
    });
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(io), service).await;
}

/// Hosts outside, each at an address of this machine.
pub(super) struct TestOrigin {
    /// By `host:port`.
    pub(super) hosts: BTreeMap<String, SocketAddr>,
    /// Certificates that are trusted when a host is asked over https.
    pub(super) roots: RootCertStore,
}

impl Origin for TestOrigin {
    type Error = io::Error;

    async fn send(&self, request: Request<ClientBody>) -> Result<Response<Incoming>, io::Error> {
        let (mut head, body) = request.into_parts();
        let https = head.uri.scheme_str() == Some("https");
        let host = head.uri.host().unwrap().to_owned();
        let port = head.uri.port_u16().unwrap_or(if https { 443 } else { 80 });
        let stream = self.dial(&host, port).await?;
        for name in ["connection", "proxy-connection", "transfer-encoding", "upgrade"] {
            head.headers.remove(name);
        }
        head.headers.insert(HOST, head.uri.authority().unwrap().as_str().parse().unwrap());
        head.uri = head.uri.path_and_query().unwrap().as_str().parse().unwrap();
        let request = Request::from_parts(head, body);
        if https {
            exchange(tls_client(&self.roots).connect(server_name(&host), stream).await?, request).await
        } else {
            exchange(stream, request).await
        }
    }

    async fn dial(&self, host: &str, port: u16) -> Result<TcpStream, io::Error> {
        match self.hosts.get(&format!("{host}:{port}")) {
            Some(address) => TcpStream::connect(address).await,
            None => Err(io::Error::new(io::ErrorKind::PermissionDenied, "refused by the dial filter")),
        }
    }

    fn fault(error: &io::Error) -> Fault {
        match error.kind() {
            io::ErrorKind::PermissionDenied => Fault::Forbidden,
            io::ErrorKind::ConnectionRefused => Fault::Unreachable,
            _ => Fault::Broken,
        }
    }
}

/// One exchange over a fresh connection.
pub(super) async fn exchange<I, B>(io: I, request: Request<B>) -> Result<Response<Incoming>, io::Error>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(io::Error::other)
}

pub(super) fn server_name(host: &str) -> ServerName<'static> {
    ServerName::try_from(host.to_owned()).unwrap()
}

pub(super) fn tls_client(roots: &RootCertStore) -> TlsConnector {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

pub(super) fn trusting(pems: &[&[u8]]) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    for pem in pems {
        roots.add(CertificateDer::from_pem_slice(pem).unwrap()).unwrap();
    }
    roots
}

/// A CA, and certificates out of it.
pub(super) struct TestCa {
    pub(super) pair: PemPair,
    issuer: Issuer<'static, KeyPair>,
}

impl TestCa {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let certificate = params.self_signed(&key).unwrap().pem().into_bytes();
        let pair = PemPair { certificate, key: key.serialize_pem().into_bytes() };
        Self { pair, issuer: Issuer::new(params, key) }
    }

    pub(super) fn certificate(&self, hosts: &[&str]) -> PemPair {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(hosts.iter().map(|&host| host.to_owned()).collect::<Vec<_>>()).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem().into_bytes();
        PemPair { certificate, key: key.serialize_pem().into_bytes() }
    }
}

/// Says what it was told to say about every blob, and notes the manifests.
pub(super) struct TestAuthorize {
    pub(super) verdict: fn() -> Verdict,
    pub(super) asked: Mutex<Vec<(Repository, String)>>,
    pub(super) manifests: Mutex<Vec<(Repository, String, Vec<u8>)>>,
}

impl Authorize for TestAuthorize {
    async fn blob(&self, origin: &BlobOrigin, repository: &Repository, _: &Digest) -> Verdict {
        self.asked.lock().unwrap().push((repository.clone(), origin.url.to_string()));
        (self.verdict)()
    }

    fn saw_manifest(&self, repository: &Repository, _: &HeaderMap, content_type: &str, body: &[u8]) -> Vec<Descriptor> {
        self.manifests.lock().unwrap().push((repository.clone(), content_type.to_owned(), body.to_vec()));
        Vec::new()
    }

    fn saw_manifest_head(&self, _: &Repository, _: &HeaderMap, _: &HeaderMap) {}

    fn forget(&self, _: &Repository, _: &Digest) {}

    fn held_manifest(
        &self,
        origin: &BlobOrigin,
        repository: &Repository,
        _: &Digest,
        content_type: &str,
        body: &[u8],
    ) -> Vec<Descriptor> {
        self.saw_manifest(repository, &origin.headers, content_type, body)
    }
}

/// What the swarm does with the next blobs.
pub(super) enum Swarm {
    /// Gives the bytes of [`BLOB`].
    Gives,
    /// Cannot even begin.
    FailsToOpen,
    /// Fails instead of the first byte.
    FailsAtFirst,
    /// Ends instead of giving the first byte.
    EndsAtFirst,
    /// Finds that the bytes do not match the digest before it gives any.
    IsWrong,
    /// Gives what the test sends.
    Waits(Mutex<Option<mpsc::Receiver<io::Result<Bytes>>>>),
}

/// The blob that the swarm has, whatever it is asked for.
pub(super) const BLOB_LENGTH: u64 = 1500;

pub(super) fn blob_bytes() -> Vec<u8> {
    (0..BLOB_LENGTH).map(|at| (at % 251) as u8).collect()
}

pub(super) struct TestBlobs {
    pub(super) swarm: Swarm,
    pub(super) opened: AtomicUsize,
}

impl Blobs for TestBlobs {
    type Error = io::Error;
    type Body = BoxStream<'static, Result<Bytes, io::Error>>;

    fn expect(&self, _: Client, _: &[Descriptor]) {}

    async fn open(&self, request: BlobRequest) -> Result<Self::Body, io::Error> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        assert_eq!(request.length, BLOB_LENGTH);
        let bytes = Bytes::from(blob_bytes()).slice(request.range.start as usize..request.range.end as usize);
        let gone = || io::Error::other("gone");
        let items = match &self.swarm {
            Swarm::FailsToOpen => return Err(gone()),
            Swarm::Waits(given) => {
                let mut given = given.lock().unwrap().take().unwrap();
                return Ok(futures_util::stream::poll_fn(move |cx| given.poll_recv(cx)).boxed());
            }
            Swarm::Gives => bytes.chunks(400).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect(),
            Swarm::FailsAtFirst => vec![Err(gone())],
            Swarm::EndsAtFirst => Vec::new(),
            Swarm::IsWrong => vec![Err(io::Error::from(io::ErrorKind::InvalidData))],
        };
        Ok(futures_util::stream::iter(items).boxed())
    }

    fn is_wrong(error: &io::Error) -> bool {
        error.kind() == io::ErrorKind::InvalidData
    }
}

/// A proxy that runs, with stubs behind it.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    pub(super) metrics: Arc<Metrics>,
    pub(super) authorize: Arc<TestAuthorize>,
    pub(super) blobs: Arc<TestBlobs>,
    pub(super) stop: CancellationToken,
    pub(super) task: Option<JoinHandle<()>>,
}

/// What a proxy is made of, to be changed before it starts.
pub(super) struct Setup {
    pub(super) listen: &'static str,
    pub(super) settings: Settings,
    pub(super) origin: TestOrigin,
    pub(super) verdict: fn() -> Verdict,
    pub(super) swarm: Swarm,
}

impl Setup {
    /// A mirror of `registry`, known as `registry.example`, without TLS or rules.
    pub(super) fn of(registry: &Registry) -> Self {
        let hosts = [80, 443].map(|port| (format!("registry.example:{port}"), registry.address));
        Self {
            listen: "127.0.0.1:0",
            settings: mirror_of("http://registry.example".into()),
            origin: TestOrigin { hosts: hosts.into(), roots: RootCertStore::empty() },
            verdict: granted,
            swarm: Swarm::Gives,
        }
    }

    pub(super) async fn start(self) -> Running {
        let listener = TcpListener::bind(self.listen).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let metrics = Arc::new(Metrics::default());
        let authorize =
            Arc::new(TestAuthorize { verdict: self.verdict, asked: Mutex::default(), manifests: Mutex::default() });
        let blobs = Arc::new(TestBlobs { swarm: self.swarm, opened: AtomicUsize::new(0) });
        let proxy = Proxy::new(
            &self.settings,
            Arc::new(self.origin),
            Arc::clone(&authorize),
            Arc::clone(&blobs),
            Arc::clone(&metrics),
        );
        let stop = CancellationToken::new();
        let task = tokio::spawn(Arc::new(proxy.unwrap()).serve(listener, stop.clone()));
        Running { address: ([127, 0, 0, 1], port).into(), metrics, authorize, blobs, stop, task: Some(task) }
    }
}

/// The registry grants the blob, and says more about it than its length.
pub(super) fn granted() -> Verdict {
    let headers = [("docker-content-digest", "sha256:abc"), ("etag", "\"sha256:abc\""), ("content-length", "7")];
    let headers = headers.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
    Verdict::Granted { length: BLOB_LENGTH, headers: HeaderMap::from_iter(headers) }
}

impl Running {
    pub(super) async fn dial(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends one request over a connection of its own.
    pub(super) async fn send(&self, request: Request<BoxBody<Bytes, BoxError>>) -> Response<Incoming> {
        timeout(PATIENCE, exchange(self.dial().await, request)).await.unwrap().unwrap()
    }

    /// A GET with headers, its answer and the answer's body.
    pub(super) async fn get(&self, uri: &str, headers: &[(&str, &str)]) -> (http::response::Parts, Bytes) {
        let (head, body) = self.send(request("GET", uri, headers)).await.into_parts();
        (head, timeout(PATIENCE, body.collect()).await.unwrap().unwrap().to_bytes())
    }

    /// Opens a tunnel; gives the connection and the status of the answer.
    pub(super) async fn connect(&self, to: &str) -> (TcpStream, u16) {
        let mut stream = self.dial().await;
        stream.write_all(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n").as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap());
        }
        let status = std::str::from_utf8(&head).unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        (stream, status)
    }

    pub(super) fn opened(&self) -> usize {
        self.blobs.opened.load(Ordering::Relaxed)
    }
}

pub(super) fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> Request<BoxBody<Bytes, BoxError>> {
    let mut request = Request::builder().method(method).uri(uri);
    if !headers.iter().any(|(name, _)| *name == "host") {
        request = request.header(HOST, "client.says");
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Empty::new().map_err(|never| match never {}).boxed()).unwrap()
}
