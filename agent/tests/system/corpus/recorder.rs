//! Whom the corpus talks to: a registry that notes every request that reached it, as it came and as an HTTP server
//! understands it, and traps that nothing may connect to.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::io::InspectReader;
use tokio_util::task::AbortOnDropHandle;

/// What a client says about its connection with the agent, and what it says to the agent as a proxy.
const FOR_THE_AGENT: [&str; 6] =
    ["connection", "keep-alive", "proxy-authorization", "proxy-connection", "te", "upgrade"];

/// A request that an HTTP server took, body and all.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// What came over one connection.
type Raw = Arc<Mutex<Vec<u8>>>;

/// A registry that answers everything with 200. It ends when dropped.
pub(crate) struct Recorder {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    raw: Arc<Mutex<Vec<Raw>>>,
    _task: AbortOnDropHandle<()>,
}

impl Recorder {
    pub(crate) async fn start(at: SocketAddr) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, raw) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::<Mutex<Vec<Raw>>>::default());
        let (log, connections) = (seen.clone(), raw.clone());
        let task = tokio::spawn(async move {
            let mut serving = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let raw = Raw::default();
                connections.lock().unwrap().push(raw.clone());
                serving.spawn(serve(stream, raw, log.clone()));
            }
        });
        Self { address, seen, raw, _task: AbortOnDropHandle::new(task) }
    }

    /// The requests since the last call.
    pub(crate) fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// What is wrong with the bytes of any connection: line ends that readers differ about, and NUL.
    pub(crate) fn odd_bytes(&self) -> Vec<String> {
        let raw: Vec<Vec<u8>> = self.raw.lock().unwrap().iter().map(|raw| raw.lock().unwrap().clone()).collect();
        let odd = |bytes: &[u8]| {
            let bare = |two: &[u8]| (two[0] == b'\r') != (two[1] == b'\n');
            bytes.first() == Some(&b'\n') || bytes.contains(&0) || bytes.windows(2).any(bare)
        };
        raw.iter().filter(|bytes| odd(bytes)).map(|bytes| bytes.escape_ascii().to_string()).collect()
    }

    /// Every byte of every connection.
    pub(crate) fn raw(&self) -> Vec<u8> {
        self.raw.lock().unwrap().iter().flat_map(|raw| raw.lock().unwrap().clone()).collect()
    }
}

async fn serve(stream: TcpStream, raw: Raw, log: Arc<Mutex<Vec<Seen>>>) {
    let stream = InspectReader::new(stream, move |bytes: &[u8]| raw.lock().unwrap().extend_from_slice(bytes));
    let service = service_fn(move |request: Request<Incoming>| {
        let log = log.clone();
        async move {
            let (head, body) = request.into_parts();
            // A body that breaks off makes no request.
            let body = body.collect().await?.to_bytes();
            log.lock().unwrap().push(Seen { path: head.uri.to_string(), headers: head.headers, body });
            Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from("noted"))))
        }
    });
    // Whoever breaks off is what this is about.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

impl Seen {
    /// What is wrong with a request that an agent passed on to `host`.
    pub(crate) fn faults(&self, host: &str) -> Vec<String> {
        let count = |name| self.headers.get_all(name).iter().count();
        let mut faults = Vec::new();
        if self.headers.get_all(HOST).iter().ne([host]) {
            faults.push("another Host, or not one".to_owned());
        }
        if count(CONTENT_LENGTH) + count(TRANSFER_ENCODING) > 1 {
            faults.push("it is framed twice".to_owned());
        }
        if self.headers.get(TRANSFER_ENCODING).is_some_and(|coding| coding != "chunked") {
            faults.push("an odd transfer coding".to_owned());
        }
        faults.extend(FOR_THE_AGENT.iter().filter(|name| self.headers.contains_key(**name)).map(ToString::to_string));
        if !self.path.starts_with('/') {
            faults.push("it is no path".to_owned());
        }
        faults
    }
}

/// A listener that nobody has any business with.
pub(crate) struct Trap {
    pub(crate) address: SocketAddr,
    caught: Arc<Mutex<Vec<Vec<u8>>>>,
    _task: AbortOnDropHandle<()>,
}

impl Trap {
    /// Listens; `None` where that is not allowed, or somebody else does.
    pub(crate) async fn set(at: SocketAddr) -> Option<Self> {
        let listener = TcpListener::bind(at).await.ok()?;
        let address = listener.local_addr().unwrap();
        let caught = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let log = caught.clone();
        let task = tokio::spawn(async move {
            let mut held = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let log = log.clone();
                let at = {
                    let mut log = log.lock().unwrap();
                    log.push(Vec::new());
                    log.len() - 1
                };
                held.spawn(async move {
                    let mut bytes = [0; 4096];
                    while let Ok(count @ 1..) = stream.read(&mut bytes).await {
                        log.lock().unwrap()[at].extend_from_slice(&bytes[..count]);
                    }
                });
            }
        });
        Some(Self { address, caught, _task: AbortOnDropHandle::new(task) })
    }

    /// What each connection brought.
    pub(crate) fn caught(&self) -> Vec<String> {
        self.caught.lock().unwrap().iter().map(|bytes| bytes.escape_ascii().to_string()).collect()
    }
}
