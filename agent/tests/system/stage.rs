//! A registry, an image, and agents to pull it through.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use darter_agent::client::{Client, Credentials, PullError, Pulled, Transfer};
use darter_agent::demo::authority::Authority;
use darter_agent::demo::cluster::{self, Agent, Cluster, Subnet, Upstream};
use darter_agent::demo::image::{Blob, Image};
use darter_agent::demo::registry::{self, BlobStats, Registry, Stats};
use darter_tracker::{Digest, Geometry, PieceIndex, PieceSize, PieceSizeRule};
use futures_util::future::join_all;
use http::{HeaderMap, Method, StatusCode};
use serde_json::Value;
use tokio::sync::{Mutex, MutexGuard};

use crate::wait;
use crate::wire::Way;

/// One cluster at a time.
static TURN: Mutex<()> = Mutex::const_new(());

/// How long the agents may take to find each other.
const READY_MAX: Duration = Duration::from_secs(30);

/// Fallbacks that a busy machine is forgiven. Agents that do without leases have one for most pieces.
const FALLBACKS_MAX: u64 = 3;

/// What the registry may send beside the image, at the most, where nothing counts as a fallback.
const EXCESS_PERCENT_MAX: u64 = 2;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// What a test wants.
pub(crate) struct Plan {
    pub(crate) agents: usize,
    /// The layers' lengths in bytes.
    pub(crate) layers: Vec<u64>,
    /// Whether the registry speaks HTTPS.
    pub(crate) tls: bool,
    /// How blobs are cut; `None` is as agents do by themselves.
    pub(crate) piece_bytes: Option<u64>,
    /// How the registry behaves; where it listens and its certificate are the stage's.
    pub(crate) registry: registry::Options,
    /// Laid over the agents' configuration; it is given the registry's address.
    pub(crate) overrides: fn(SocketAddr) -> Value,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            agents: 2,
            layers: vec![8 * MIB],
            tls: true,
            piece_bytes: None,
            registry: registry::Options::default(),
            overrides: |_| Value::Null,
        }
    }
}

/// All of it, running.
pub(crate) struct Stage {
    pub(crate) cluster: Cluster,
    pub(crate) registry: Registry,
    pub(crate) image: Image,
    /// Vouches for the registry.
    pub(crate) authority: Authority,
    tls: bool,
    piece_bytes: Option<u64>,
    credentials: Option<Credentials>,
    pub(crate) subnet: Subnet,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    /// Starts everything and waits until every agent counts all others as members.
    pub(crate) async fn start(plan: Plan) -> Self {
        let mut stage = Self::start_unready(plan).await;
        stage.ready().await;
        stage
    }

    /// Starts everything and waits for nothing.
    pub(crate) async fn start_unready(plan: Plan) -> Self {
        let turn = TURN.lock().await;
        let layers = plan.layers;
        let image = tokio::task::spawn_blocking(move || Image::new("demo/app", "latest", &layers, 1)).await.unwrap();
        let subnet = Subnet::claim().unwrap();
        let host = subnet.registry().to_string();
        let authority = Authority::new("registry", &[&host]).unwrap();
        let credentials = plan.registry.credentials.clone();
        let serving = registry::Options {
            listen: SocketAddr::new(subnet.registry(), 0),
            tls: plan.tls.then(|| authority.server(&host).unwrap()),
            ..plan.registry
        };
        let registry = Registry::start(std::slice::from_ref(&image), serving).await.unwrap();
        let upstream = Upstream {
            address: registry.address(),
            authority_pem: plan.tls.then(|| authority.certificate_pem().to_owned()),
        };
        let mut overrides = (plan.overrides)(registry.address());
        if let Some(piece_bytes) = plan.piece_bytes {
            overrides = serde_json::json!({"piece_size": piece_bytes});
        }
        let options = cluster::Options { agents: plan.agents, program: program(), registry: upstream, overrides };
        let cluster = Cluster::start(&options, &subnet).unwrap();
        Self {
            cluster,
            registry,
            image,
            authority,
            tls: plan.tls,
            piece_bytes: plan.piece_bytes,
            credentials,
            subnet,
            _turn: turn,
        }
    }

    /// Waits until every agent counts all others as members.
    pub(crate) async fn ready(&mut self) {
        self.cluster.ready(READY_MAX).await.unwrap();
    }

    /// Makes an agent the home of every task: seeds come first, and it is the only one.
    pub(crate) async fn make_home(&mut self, at: usize) {
        let agent = self.cluster.agent_mut(at).unwrap();
        agent.stop().await;
        reconfigure(agent, |config| config["node"]["role"] = "seed".into());
        agent.start().unwrap();
        self.ready().await;
    }

    /// Lets the agents leave.
    pub(crate) async fn stop(self) {
        self.cluster.stop().await.unwrap();
        self.registry.stop().await;
    }

    pub(crate) fn agents(&self) -> &[Agent] {
        self.cluster.agents()
    }

    pub(crate) fn agent(&self, at: usize) -> &Agent {
        &self.cluster.agents()[at]
    }

    /// The path of a blob of the image.
    pub(crate) fn blob_path(&self, digest: &Digest) -> String {
        format!("/v2/{}/blobs/{digest}", self.image.repository())
    }

    /// The path of the image's manifest.
    pub(crate) fn manifest_path(&self) -> String {
        format!("/v2/{}/manifests/{}", self.image.repository(), self.image.tag())
    }

    /// The way to the registry through the proxy of an agent, as `HTTPS_PROXY` or `HTTP_PROXY` would have it.
    pub(crate) fn through(&self, at: usize) -> Way {
        let (proxy, to) = (self.agent(at).addresses().proxy, self.registry.address());
        if self.tls { Way::Tunnel { proxy, to, tls: self.agent(at).tls() } } else { Way::Absolute { proxy, to } }
    }

    /// The way straight to the registry.
    pub(crate) fn direct(&self) -> Way {
        Way::To(self.registry.address(), self.tls.then(|| self.authority.client().unwrap()))
    }

    /// A client that pulls through an agent, with the credentials that the registry asks for.
    pub(crate) fn client(&self, at: usize) -> Client {
        let tls = self.tls.then(|| self.agent(at).tls());
        let client = Client::direct(self.registry.address(), tls).through(self.agent(at).addresses().proxy);
        Client { credentials: self.credentials.clone(), ..client }
    }

    /// Pulls the image through one agent.
    pub(crate) async fn try_pull(&self, at: usize) -> Result<Pulled, PullError> {
        self.client(at).pull(self.image.repository(), self.image.tag(), &Transfer::default()).await
    }

    /// Pulls the image through some agents at once, which must succeed.
    pub(crate) async fn pull(&self, agents: impl IntoIterator<Item = usize>) {
        let pulls = agents.into_iter().map(|at| async move { (at, self.try_pull(at).await) });
        for (at, pulled) in join_all(pulls).await {
            let pulled = pulled.unwrap_or_else(|error| {
                panic!("{}: {}\n{}", self.agent(at).name(), chain(&error), self.agent(at).log_tail())
            });
            assert_eq!(pulled.blob_bytes, self.image.blob_bytes());
            assert_eq!(pulled.digests_checked, self.image.blobs().count());
        }
    }

    /// Pulls the image through all agents at once, which must succeed.
    pub(crate) async fn pull_all(&self) {
        self.pull(0..self.agents().len()).await;
    }

    /// What the registry sent, once no pull is left.
    pub(crate) async fn settled(&self) -> Stats {
        wait::until("no pull is left", async || self.sum("darter_active_tasks").await == 0).await;
        self.registry.stats()
    }

    /// What the registry sent, which must be the image once.
    ///
    /// On a machine that is busy with other work a home may look silent to a reader, who then fetches a piece by itself or
    /// turns to another home (D3). The agents count the first; both together are forgiven up to what the design allows.
    pub(crate) async fn sent_once(&self) -> Stats {
        let stats = self.settled().await;
        let fallbacks = self.sum("darter_fallbacks_total").await;
        assert!(fallbacks <= FALLBACKS_MAX, "{fallbacks} fallbacks\n{}", self.logs());
        let piece = self.image.blobs().map(|blob| u64::from(self.geometry(blob).piece_size().bytes())).max().unwrap();
        let forgiven = (fallbacks * piece).max(self.image.blob_bytes() * EXCESS_PERCENT_MAX / 100);
        let repeated: u64 = stats.blobs.values().map(BlobStats::repeated_bytes).sum();
        assert!(
            repeated <= forgiven,
            "{repeated} bytes were sent twice, with {fallbacks} fallbacks\n{:?}\n{}",
            stats.blobs.values().map(|b| &b.served).collect::<Vec<_>>(),
            self.logs()
        );
        assert_eq!(stats.blob_bytes() - repeated, self.image.blob_bytes());
        // What was cut off was sent, and not read.
        let read = self.sum("darter_registry_received_bytes_total").await;
        assert!(repeated > 0 || read == stats.blob_bytes(), "{read} bytes read of {}", stats.blob_bytes());
        stats
    }

    /// How the agents cut a blob.
    pub(crate) fn geometry(&self, blob: &Blob) -> Geometry {
        let size = self.piece_bytes.map_or_else(|| PieceSizeRule::Auto.piece_size(blob.length()), PieceSize::clamped);
        Geometry::new(blob.length(), size).unwrap()
    }

    /// The last lines of every agent's log.
    pub(crate) fn logs(&self) -> String {
        self.agents().iter().map(|agent| format!("{}:\n{}\n", agent.name(), agent.log_tail())).collect()
    }

    /// A counter or gauge over all running agents, whatever its labels.
    pub(crate) async fn sum(&self, name: &str) -> u64 {
        let running = self.agents().iter().filter(|agent| agent.process_id().is_some());
        join_all(running.map(|agent| metric(agent, name))).await.into_iter().sum()
    }
}

/// The binary under test.
pub(crate) fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_darter"))
}

/// Where a complete blob is kept.
pub(crate) fn published(agent: &Agent, digest: &Digest) -> PathBuf {
    let text = digest.to_string();
    let (algorithm, hex) = text.split_once(':').unwrap();
    agent.cache_dir().join("blobs").join(algorithm).join(&hex[..2]).join(hex)
}

/// The bytes of each piece of a blob, in order.
pub(crate) fn pieces(cut: Geometry) -> Vec<Range<u64>> {
    let piece =
        |at| cut.offset(PieceIndex(at))..cut.offset(PieceIndex(at)) + u64::from(cut.piece_length(PieceIndex(at)));
    (0..cut.pieces()).map(piece).collect()
}

/// An answer of the admin port.
pub(crate) async fn admin(agent: &Agent, path: &str) -> Option<(StatusCode, String)> {
    let client = Client::direct(agent.addresses().admin, None);
    let reply = client.request(Method::GET, path, HeaderMap::new()).await.ok()?;
    Some((reply.status(), String::from_utf8_lossy(reply.body()).into_owned()))
}

/// All samples of `/metrics`, by name with labels.
pub(crate) async fn samples(agent: &Agent) -> BTreeMap<String, u64> {
    let (status, text) = admin(agent, "/metrics").await.unwrap_or_default();
    assert_eq!(status, StatusCode::OK, "{}: {}", agent.name(), agent.log_tail());
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

/// The sum of a metric's series; 0 if it has none yet.
pub(crate) async fn metric(agent: &Agent, name: &str) -> u64 {
    let samples = samples(agent).await;
    samples
        .iter()
        .filter(|(series, _)| *series == name || series.split('{').next() == Some(name))
        .map(|(_, value)| value)
        .sum()
}

/// An agent's whole log.
pub(crate) fn log(agent: &Agent) -> String {
    std::fs::read_to_string(agent.log_file()).unwrap_or_default()
}

/// Changes an agent's configuration file, to be read at its next start.
pub(crate) fn reconfigure(agent: &Agent, change: impl FnOnce(&mut Value)) {
    let text = std::fs::read_to_string(agent.config_file()).unwrap();
    let mut config: Value = serde_saphyr::from_str(&text).unwrap();
    change(&mut config);
    std::fs::write(agent.config_file(), serde_saphyr::to_string(&config).unwrap()).unwrap();
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
