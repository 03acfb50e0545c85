//! Seeds from a Kubernetes API server: the endpoints of a service, or all nodes.
//!
//! The only file that names Kubernetes types. `objects` (pure) is the set of seeds, `lines` (pure) cuts the stream of a
//! watch, `follow` is the loop of list and watch: it decides what a failure means. Here is what an object says, how a
//! request looks, and what an answer means.
//!
//! kube's client is used for the configuration, credentials and TLS. Its own lists and watches read answers of any length
//! into memory, so those are read here.

mod follow;
mod lines;
mod objects;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt as _, Limited};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ObjectList, Request, Status, WatchEvent};
use kube::{Client, Config, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::Update;
use crate::index::SourceId;
use follow::{Failure, Line, Page};

/// The label by which the slices of a service are found, as the API documents it.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// Objects per page of a list. A node with its images, or a slice of a hundred endpoints, has some 20 to 50 KiB.
const PAGE_OBJECTS: u32 = 100;

/// The largest page that is read: three times what a hundred large objects have.
const PAGE_BYTES_MAX: usize = 16 << 20;

/// The largest body of a refusal that is looked at.
const STATUS_BYTES_MAX: usize = 64 << 10;

/// How long connecting may take, within [`follow::ANSWER_MAX`].
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// What is watched, and how the API server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// What is watched.
    pub what: Watched,
    /// The port of nodes, and of endpoints whose slice has no port of that name.
    pub port: u16,
    /// How the server is reached. `None`: as `kubectl` would, or else as a pod does.
    pub kubeconfig: Option<PathBuf>,
}

/// Kinds of objects that have seeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// The endpoints of a service, ready or not: an agent that is starting is as good a seed as any.
    Service {
        /// The namespace. `None`: the one that the agent runs in.
        namespace: Option<String>,
        /// The service's name.
        service: String,
    },
    /// The internal addresses of all nodes.
    Nodes,
}

/// The name of the port that gossip has in a service.
pub const PORT_NAME: &str = "gossip";

/// Follows the objects. Ends when nobody listens.
pub(crate) async fn run(source: SourceId, query: Query, updates: mpsc::Sender<Update>) {
    match query.what {
        Watched::Service { .. } => follow::run(Server::<EndpointSlice>::new(query), source, updates).await,
        Watched::Nodes => follow::run(Server::<Node>::new(query), source, updates).await,
    }
}

/// What an object says. `port` is gossip's, where the object does not name it.
trait Seeds: Resource<DynamicType = ()> + DeserializeOwned + Clone + Send + Sync + 'static {
    fn seeds(&self, port: u16) -> BTreeSet<SocketAddr>;
}

impl Seeds for EndpointSlice {
    fn seeds(&self, port: u16) -> BTreeSet<SocketAddr> {
        let named = self.ports.iter().flatten().find(|port| port.name.as_deref() == Some(PORT_NAME));
        let named = named.and_then(|named| named.port).and_then(|port| u16::try_from(port).ok());
        let port = named.unwrap_or(port);
        let leaving = |endpoint: &&k8s_openapi::api::discovery::v1::Endpoint| {
            let conditions = endpoint.conditions.as_ref();
            conditions.is_some_and(|is| is.serving == Some(false) && is.terminating == Some(true))
        };
        let staying = self.endpoints.iter().filter(|endpoint| !leaving(endpoint));
        // A slice of type FQDN has names here, which are none of ours.
        let ips = staying.flat_map(|endpoint| &endpoint.addresses).filter_map(|text| text.parse::<IpAddr>().ok());
        ips.map(|ip| SocketAddr::new(ip, port)).collect()
    }
}

impl Seeds for Node {
    fn seeds(&self, port: u16) -> BTreeSet<SocketAddr> {
        let addresses = self.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let ips = addresses
            .filter(|address| address.type_ == "InternalIP")
            .filter_map(|address| address.address.parse().ok());
        ips.map(|ip: IpAddr| SocketAddr::new(ip, port)).collect()
    }
}

/// The API server, as far as one kind of objects goes.
struct Server<K> {
    query: Query,
    /// The client and the namespace that it says; none after a failure, since credentials may have changed.
    client: Option<(Client, String)>,
    kind: std::marker::PhantomData<fn() -> K>,
}

impl<K: Seeds> Server<K> {
    fn new(query: Query) -> Self {
        Self { query, client: None, kind: std::marker::PhantomData }
    }

    async fn client(&mut self) -> Result<(Client, String), Failure> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let unusable = |error: &dyn std::error::Error| Failure::Configuration(chain(error));
        let mut config = match &self.query.kubeconfig {
            Some(path) => {
                let read = Kubeconfig::read_from(path).map_err(|error| unusable(&error))?;
                let options = KubeConfigOptions::default();
                Config::from_custom_kubeconfig(read, &options).await.map_err(|error| unusable(&error))?
            }
            None => Config::infer().await.map_err(|error| unusable(&error))?,
        };
        config.connect_timeout = Some(CONNECT_MAX);
        // When to try again is decided in one place, and that is not the client.
        config.default_retry = false;
        let namespace = config.default_namespace.clone();
        let client = Client::try_from(config).map_err(|error| unusable(&error))?;
        Ok(self.client.insert((client, namespace)).clone())
    }

    fn request(&self, namespace: &str) -> (Request, Option<String>) {
        match &self.query.what {
            Watched::Service { namespace: given, service } => {
                let namespace = given.as_deref().unwrap_or(namespace);
                (Request::new(K::url_path(&(), Some(namespace))), Some(format!("{SERVICE_LABEL}={service}")))
            }
            Watched::Nodes => (Request::new(K::url_path(&(), None)), None),
        }
    }

    fn name_and_seeds(&self, object: &K) -> (String, BTreeSet<SocketAddr>) {
        (object.meta().name.clone().unwrap_or_default(), object.seeds(self.query.port))
    }
}

impl<K: Seeds> follow::Server for Server<K> {
    type Body = Body;

    fn reset(&mut self) {
        self.client = None;
    }

    async fn page(&mut self, token: Option<&str>) -> Result<Page, Failure> {
        let (client, namespace) = self.client().await?;
        let (request, labels) = self.request(&namespace);
        // Without a version, which is the newest state: the answer honours the limit, unlike one from the server's cache.
        let list = kube::api::ListParams { label_selector: labels, ..Default::default() }.limit(PAGE_OBJECTS);
        let list = token.iter().fold(list, |list, token| list.continue_token(token));
        let request = request.list(&list).map_err(|error| Failure::Configuration(chain(&error)))?;
        let body = send(&client, request).await?;
        let body = Limited::new(body, PAGE_BYTES_MAX).collect().await;
        let body = body.map_err(|error| Failure::Broken(chain(&*error)))?.to_bytes();
        let list: ObjectList<K> =
            serde_json::from_slice(&body).map_err(|error| Failure::Malformed(error.to_string()))?;
        Ok(Page {
            objects: list.items.iter().map(|object| self.name_and_seeds(object)).collect(),
            version: list.metadata.resource_version.unwrap_or_default(),
            next: list.metadata.continue_.filter(|token| !token.is_empty()),
        })
    }

    async fn watch(&mut self, version: &str, lives: Duration) -> Result<Body, Failure> {
        let (client, namespace) = self.client().await?;
        let (request, labels) = self.request(&namespace);
        let seconds = u32::try_from(lives.as_secs()).unwrap_or(u32::MAX);
        let watch = kube::api::WatchParams { label_selector: labels, ..Default::default() }.timeout(seconds);
        let request = request.watch(&watch, version).map_err(|error| Failure::Configuration(chain(&error)))?;
        send(&client, request).await
    }

    fn line(&self, line: &[u8]) -> Result<Line, Failure> {
        let event = serde_json::from_slice::<WatchEvent<K>>(line);
        Ok(match event.map_err(|error| Failure::Malformed(error.to_string()))? {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                let (name, seeds) = self.name_and_seeds(&object);
                Line::Applied { name, seeds, version: object.meta().resource_version.clone() }
            }
            WatchEvent::Deleted(object) => {
                let (name, _) = self.name_and_seeds(&object);
                Line::Deleted { name, version: object.meta().resource_version.clone() }
            }
            WatchEvent::Bookmark(bookmark) => Line::Bookmark { version: bookmark.metadata.resource_version },
            WatchEvent::Error(status) => return Err(refusal(status.code, &status, None)),
        })
    }
}

/// Sends a request and gives the body of an answer that is what was asked for.
async fn send(client: &Client, request: http::Request<Vec<u8>>) -> Result<Body, Failure> {
    let sent = client.send(request.map(Body::from)).await;
    let response = sent.map_err(|error| Failure::Unreachable(chain(&error)))?;
    if response.status().is_success() {
        return Ok(response.into_body());
    }
    let code = response.status().as_u16();
    let pause = response.headers().get(http::header::RETRY_AFTER);
    let pause = pause.and_then(|value| value.to_str().ok()?.trim().parse().ok()).map(Duration::from_secs);
    let body = Limited::new(response.into_body(), STATUS_BYTES_MAX).collect().await;
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    // Not all that answer are API servers: the code alone must do where there is no status.
    let status = serde_json::from_slice::<Status>(&body).unwrap_or_default();
    Err(refusal(code, &status, pause))
}

/// What a refusal means. The code of the HTTP answer, or of an event that says that the watch is over.
fn refusal(code: u16, status: &Status, pause: Option<Duration>) -> Failure {
    let message = if status.message.is_empty() { status.reason.clone() } else { status.message.clone() };
    match code {
        410 => Failure::Expired,
        _ if matches!(status.reason.as_str(), "Expired" | "Gone") => Failure::Expired,
        401 | 403 => Failure::Forbidden { code, message },
        _ => Failure::Refused { code, message, pause },
    }
}

/// An error with its causes: kube's say little themselves.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
