//! An HTTP server that speaks list and watch as the Kubernetes API does, with failures that a test says. One kind of
//! objects, whichever path is asked for.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What becomes of the next request of a kind.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    Status(u16),
    /// No answer, until the client gives up.
    Hangs,
    /// An answer that is not JSON.
    Garbage,
}

/// A request as a test wants to see it.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) authorization: String,
}

impl Asked {
    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    pub(crate) fn is_watch(&self) -> bool {
        self.parameter("watch") == Some("true")
    }
}

pub(crate) struct State {
    objects: BTreeMap<String, Value>,
    version: u64,
    /// Lines of a watch, by the version at which they came.
    history: Vec<(u64, String)>,
    /// Versions below this are forgotten: whoever asks for them gets 410.
    oldest: u64,
    /// Whether a version that is too old is told in the stream, as servers do, or as the answer's status.
    expires_in_stream: bool,
    pub(crate) list_faults: VecDeque<Fault>,
    pub(crate) watch_faults: VecDeque<Fault>,
    pub(crate) asked: Vec<Asked>,
    page_max: usize,
    /// Lines of the history that have left on the watch that looked last.
    sent: usize,
}

impl State {
    /// Whether all lines are on their way.
    pub(crate) fn all_sent(&self) -> bool {
        self.sent == self.history.len()
    }

    pub(crate) fn lists(&self) -> usize {
        self.asked.iter().filter(|asked| !asked.is_watch() && asked.parameter("continue").is_none()).count()
    }

    pub(crate) fn watches(&self) -> Vec<Asked> {
        self.asked.iter().filter(|asked| asked.is_watch()).cloned().collect()
    }
}

/// The server. Stops when it is dropped.
pub(crate) struct Server {
    state: Arc<Mutex<State>>,
    /// Counts changes; and how often all watches were cut.
    changes: watch::Sender<(u64, u64)>,
    dir: TempDir,
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

impl Server {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            objects: BTreeMap::new(),
            version: 10,
            history: Vec::new(),
            oldest: 0,
            expires_in_stream: true,
            list_faults: VecDeque::new(),
            watch_faults: VecDeque::new(),
            asked: Vec::new(),
            page_max: usize::MAX,
            sent: 0,
        };
        let state = Arc::new(Mutex::new(state));
        let changes = watch::Sender::new((0, 0));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, state.clone(), changes.clone()));
        let dir = tempfile::tempdir().unwrap();
        Self { state, changes, dir, address, _tasks: tasks }
    }

    /// A file that says how this server is reached.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        let path = self.dir.path().join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "test", "user": {"token": "of-the-agent"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "of-the-pod"}}],
        });
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an object, or changes it.
    pub(crate) fn put(&self, name: &str, mut object: Value) {
        let mut state = self.state();
        state.version += 1;
        object["metadata"] = json!({"name": name, "resourceVersion": state.version.to_string()});
        let kind = if state.objects.insert(name.to_owned(), object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        push(&mut state, json!({"type": kind, "object": object}).to_string());
        self.changed(state);
    }

    pub(crate) fn delete(&self, name: &str) {
        let mut state = self.state();
        state.version += 1;
        let mut object = state.objects.remove(name).unwrap();
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        push(&mut state, json!({"type": "DELETED", "object": object}).to_string());
        self.changed(state);
    }

    /// Sends a bookmark at the newest version, which goes on by as many as given first.
    pub(crate) fn bookmark(&self, versions: u64) {
        let mut state = self.state();
        state.version += versions;
        let object = json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
            "metadata": {"resourceVersion": state.version.to_string()}});
        push(&mut state, json!({"type": "BOOKMARK", "object": object}).to_string());
        self.changed(state);
    }

    /// Sends a line as it is, which stands for a change that the client cannot know.
    pub(crate) fn line(&self, line: &str) {
        let mut state = self.state();
        state.version += 1;
        push(&mut state, line.to_owned());
        self.changed(state);
    }

    /// Forgets all history, as compaction does.
    pub(crate) fn forget(&self, told_in_stream: bool) {
        let mut state = self.state();
        state.oldest = state.version;
        state.expires_in_stream = told_in_stream;
    }

    /// Breaks all watches off, without an end.
    pub(crate) fn cut(&self) {
        self.changes.send_modify(|(_, cuts)| *cuts += 1);
    }

    pub(crate) fn page_max(&self, objects: usize) {
        self.state().page_max = objects;
    }

    fn changed(&self, state: MutexGuard<'_, State>) {
        drop(state);
        self.changes.send_modify(|(changes, _)| *changes += 1);
    }
}

fn push(state: &mut State, line: String) {
    state.history.push((state.version, line));
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>, changes: watch::Sender<(u64, u64)>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (state, changes) = (state.clone(), changes.clone());
        connections.spawn(async move {
            let service = service_fn(|request| answer(request, state.clone(), changes.clone()));
            // Broken off on purpose, or by the client.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
    changes: watch::Sender<(u64, u64)>,
) -> Result<Answer, Infallible> {
    let header = request.headers().get("authorization");
    let asked = Asked {
        path: request.uri().path().to_owned(),
        query: request.uri().query().unwrap_or_default().to_owned(),
        authorization: header.map_or(String::new(), |value| value.to_str().unwrap().to_owned()),
    };
    let fault = {
        let mut state = state.lock().unwrap();
        state.asked.push(asked.clone());
        if asked.is_watch() { state.watch_faults.pop_front() } else { state.list_faults.pop_front() }
    };
    match fault {
        Some(Fault::Status(code)) => return Ok(whole(code, status(code).to_string())),
        Some(Fault::Garbage) => return Ok(whole(200, "<html>\n".to_owned())),
        Some(Fault::Hangs) => std::future::pending().await,
        None => {}
    }
    if !asked.is_watch() {
        return Ok(list(&asked, &state.lock().unwrap()));
    }
    let since: u64 = asked.parameter("resourceVersion").unwrap().parse().unwrap();
    let (expired, in_stream) = {
        let state = state.lock().unwrap();
        (since < state.oldest, state.expires_in_stream)
    };
    Ok(match (expired, in_stream) {
        (true, false) => whole(410, status(410).to_string()),
        (true, true) => whole(200, format!("{}\n", json!({"type": "ERROR", "object": status(410)}))),
        (false, _) => follow(since, state, changes.subscribe()),
    })
}

fn list(asked: &Asked, state: &State) -> Answer {
    let from: usize = asked.parameter("continue").map_or(0, |token| token.parse().unwrap());
    let limit: usize = asked.parameter("limit").map_or(usize::MAX, |limit| limit.parse().unwrap());
    let limit = limit.min(state.page_max);
    let items: Vec<_> = state.objects.values().skip(from).take(limit).collect();
    let mut metadata = json!({"resourceVersion": state.version.to_string()});
    if from + items.len() < state.objects.len() {
        metadata["continue"] = json!((from + items.len()).to_string());
    }
    let list = json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items});
    whole(200, list.to_string())
}

/// The lines after a version, as they come, until the watch is cut.
fn follow(since: u64, state: Arc<Mutex<State>>, changes: watch::Receiver<(u64, u64)>) -> Answer {
    let cuts = changes.borrow().1;
    let start = state.lock().unwrap().history.iter().take_while(|(version, _)| *version <= since).count();
    let lines = stream::unfold((start, false), move |(at, ended)| {
        let (state, mut changes) = (state.clone(), changes.clone());
        async move {
            if ended {
                return None;
            }
            loop {
                if changes.borrow_and_update().1 != cuts {
                    return Some((Err(std::io::Error::other("cut")), (at, true)));
                }
                let next = {
                    let mut state = state.lock().unwrap();
                    state.sent = at;
                    state.history.get(at).cloned()
                };
                if let Some((_, line)) = next {
                    return Some((Ok(Frame::data(Bytes::from(format!("{line}\n")))), (at + 1, false)));
                }
                if changes.changed().await.is_err() {
                    return None;
                }
            }
        }
    });
    Response::new(StreamBody::new(lines).boxed_unsync())
}

fn status(code: u16) -> Value {
    let reason = if code == 410 { "Expired" } else { "InternalError" };
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": "as the test says"})
}

fn whole(code: u16, body: String) -> Answer {
    let body = Full::new(Bytes::from(body)).map_err(|never| match never {});
    Response::builder().status(code).header("content-type", "application/json").body(body.boxed_unsync()).unwrap()
}
