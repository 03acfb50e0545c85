//! The composition root: builds every part from the configuration, runs them, and takes them down in order.
//!
//! [`wiring`] turns the configuration into the parts' own settings, [`epoch`] keeps a restarted node ahead of its former
//! self, `acquaintances` lets it find its cluster again, [`telemetry`] sets the log up; [`activation`] takes a listener
//! from systemd, [`notify`] tells it how the agent is; `inform` tells the homes of blobs what is here of them.

mod acquaintances;
pub mod activation;
pub mod epoch;
mod inform;
pub mod notify;
pub mod seams;
pub mod telemetry;
pub mod wiring;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use darter_discovery::Discovery;
use darter_swarm::home::Home;
use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_tracker::{EventBody, ServiceDownRequest, TaskId, Tracker as _};
use rand::RngExt as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::metrics::Metrics;
use crate::admin::{Admin, Readiness};
use crate::config::Config;
use crate::gossip::tracker::tags::TagHomes;
use crate::gossip::tracker::{GossipTracker, HomeHandle};
use crate::gossip::{Gossip, LEAVE_TIMEOUT, Roster, Settings as GossipSettings};
use crate::net::{CLOSE_MAX, Transport};
use crate::proxy::Proxy;
use crate::proxy::authorize::Authorizer;
use crate::pull::{Context, Flights};
use crate::source::registry::Upstream;
use crate::source::tally::Tally;
use crate::store::Store;
use crate::upload::Uploader;

/// How often the cache is looked through for what is old or too much.
const SWEEP_EVERY: Duration = Duration::from_secs(15);

/// How long clients that are being served may take when the agent is told to stop.
const DRAIN: Duration = Duration::from_secs(4);

/// How long pulls may take to end: their goodbyes take a second at the most.
const PULLS_END: Duration = Duration::from_millis(1500);

/// How long their clients' connections may take to end once nothing is streamed to them any more.
const CUT: Duration = Duration::from_millis(500);

/// How long uploads may take after that.
const UPLOAD_DRAIN: Duration = Duration::from_secs(2);

/// What the whole stop may take, as service managers and the documents have it.
const STOP_MAX: Duration = Duration::from_secs(10);

/// What of that is left for what has no limit of its own, since it only works off what is there: ending the loops,
/// closing the files.
const STOP_REST: Duration = Duration::from_millis(500);

// Leaving goes on beside the draining of clients; all else is one after the other.
const _: () = {
    assert!(LEAVE_TIMEOUT.as_millis() <= DRAIN.as_millis());
    let steps = [DRAIN, PULLS_END, CUT, UPLOAD_DRAIN, CLOSE_MAX, STOP_REST];
    let (mut at, mut sum_ms) = (0, 0);
    while at < steps.len() {
        sum_ms += steps[at].as_millis();
        at += 1;
    }
    assert!(sum_ms < STOP_MAX.as_millis());
};

/// How long a starting node that has seeds is not ready for want of an answer: the first of a cluster gets none.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);

/// How long it is not ready while members are coming.
const JOIN_PATIENCE: Duration = Duration::from_secs(3);

/// Goodbyes to homes on their way at a time; an eviction of many blobs waits for the first of them.
const GOODBYES_MAX: usize = 32;

/// What runs, in the order of starting.
struct Running {
    gossip: Option<Arc<Gossip>>,
    transport: Option<Transport>,
    discovery: Option<Discovery>,
    flights: Arc<Flights>,
    store: Arc<Store>,
    home: JoinHandle<()>,
    /// Stops what takes new work from clients.
    front: CancellationToken,
    /// Stops what serves peers, and the housekeeping.
    back: CancellationToken,
    fronts: TaskTracker,
    backs: TaskTracker,
}

/// Runs the agent until SIGTERM or SIGINT. `passed` is the proxy's listener, where [`activation::take`] found one.
///
/// # Errors
/// If a part cannot be started: says which and why. Whatever had been started is stopped again.
pub async fn run(config: Config, passed: Option<std::net::TcpListener>) -> anyhow::Result<()> {
    // Before anything is started: a signal during the start stops it right after.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let running = start(&config, passed).await?;
    notify::tell(notify::State::Ready);
    tokio::select! {
        _ = terminate.recv() => tracing::info!("told to stop"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
    }
    notify::tell(notify::State::Stopping);
    running.stop().await;
    Ok(())
}

async fn start(config: &Config, passed: Option<std::net::TcpListener>) -> anyhow::Result<Running> {
    let metrics = Arc::new(Metrics::default());
    let tally = Arc::new(Tally::default());
    let store = Store::open(wiring::store(config)?, metrics.clone()).context("the cache cannot be used")?;
    let epoch = epoch::next(&config.cache.dir).context("the boot epoch cannot be kept")?;

    let has_secret = !config.secrets.is_empty();
    let keys = Arc::new(match config.cluster_keys()? {
        Some(keys) => keys,
        // Nobody else has this secret: what is signed under it stays on this node's own disk.
        None => ClusterKeys::new(&config.node.cluster, &[rand::rng().random::<[u8; 32]>()])?,
    });
    let node = NodeKey::new(&keys, &rand::rng().random(), epoch).context("no key pair could be made")?;
    let node = Arc::new(node);

    let upstream = Arc::new(Upstream::new(wiring::upstream(config), metrics.clone())?);
    let authorizer = Arc::new(Authorizer::new(upstream.clone(), wiring::when_down(config)));

    // Everything is bound before anything is announced.
    let proxy_listener = listen(config.proxy.listen, passed).await.context("proxy.listen")?;
    let admin_listener = TcpListener::bind(config.admin.listen).await.context("admin.listen")?;
    let mut peers = None;
    if has_secret {
        let mode = wiring::transport(config);
        let transport =
            Transport::bind(config.peer.listen, mode, keys.clone(), &node, metrics.clone()).context("peer.listen")?;
        peers = Some(start_gossip(config, &keys, &node, transport, &metrics)?);
    } else {
        metrics.members.set(1);
    }
    let (gossip, transport, discovery) = match peers {
        Some((gossip, transport, discovery)) => (Some(gossip), Some(transport), Some(discovery)),
        None => (None, None, None),
    };

    let (home, home_loop) = {
        let peers = gossip.clone().zip(transport.clone());
        HomeHandle::start(Home::new(node.id(), rand::rng().random()), store.clone(), peers)
    };
    let for_tracker = transport.clone().zip(gossip.as_ref().map(|gossip| gossip.roster()));
    let tracker = Arc::new(GossipTracker::new(node.id(), home.clone(), for_tracker, metrics.clone()));
    let flights = Flights::new(Context {
        store: store.clone(),
        upstream: upstream.clone(),
        tracker: tracker.clone(),
        transport: transport.clone(),
        gossip: gossip.clone(),
        keys,
        node: node.clone(),
        piece_size: config.piece_size,
        metrics: metrics.clone(),
        tally: tally.clone(),
    });

    let (front, back) = (CancellationToken::new(), CancellationToken::new());
    let (fronts, backs) = (TaskTracker::new(), TaskTracker::new());
    let pulls = Arc::new(seams::Pulls(flights.clone()));
    let proxy = Proxy::new(&wiring::proxy(config)?, upstream, authorizer, pulls, metrics.clone())?
        .with_tags(wiring::tag_ttls(config)?, Arc::new(TagHomes::new(tracker.clone())));
    fronts.spawn(Arc::new(proxy).serve(proxy_listener, front.clone()));
    let readiness = Readiness::default();
    let admin = Admin {
        metrics: metrics.clone(),
        tally,
        gossip: gossip.clone(),
        readiness: readiness.clone(),
        registry: metrics.exposition(),
    };
    backs.spawn(admin.run(admin_listener, back.clone()));
    if let Some(transport) = &transport {
        let uploader = Uploader::new(store.clone(), flights.clone(), home, metrics);
        backs.spawn(uploader.run(transport.clone(), back.clone(), UPLOAD_DRAIN));
    }
    backs.spawn(keep_house(store.clone(), gossip.clone(), tracker.clone(), back.clone()));
    if let Some(gossip) = &gossip {
        backs.spawn(acquaintances::keep(config.cache.dir.clone(), gossip.roster(), back.clone()));
    }
    let sought = discovery.as_ref().map(|discovery| (discovery.first_round.clone(), discovery.seeds.clone()));
    backs.spawn(become_ready(
        sought,
        readiness,
        gossip.clone(),
        tracker,
        (store.clone(), flights.clone()),
        back.clone(),
    ));
    tracing::info!(
        name = config.node.name, node = %node.id(), cluster = config.node.cluster, proxy = %config.proxy.listen,
        peers = has_secret, transport = ?config.peer.transport, version = env!("CARGO_PKG_VERSION"), "the agent runs"
    );
    Ok(Running { gossip, transport, discovery, flights, store, home: home_loop, front, back, fronts, backs })
}

/// The proxy's listener: the one that was passed, which is on this address, or else a new one.
async fn listen(address: SocketAddr, passed: Option<std::net::TcpListener>) -> std::io::Result<TcpListener> {
    match passed {
        Some(passed) => {
            tracing::info!(proxy = %address, "the proxy takes over the socket that the service manager holds");
            TcpListener::from_std(passed)
        }
        None => TcpListener::bind(address).await,
    }
}

fn start_gossip(
    config: &Config,
    keys: &Arc<ClusterKeys>,
    node: &Arc<NodeKey>,
    transport: Transport,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<(Arc<Gossip>, Transport, Discovery)> {
    // Where it listens as well: at all addresses of this host, more than one of which others may name.
    let own = vec![SocketAddr::new(config.node.advertise, config.gossip.listen.port()), config.gossip.listen];
    let sources = config.discovery.iter().cloned().chain(acquaintances::recall(&config.cache.dir)).collect();
    let discovery = Discovery::start(sources, own);
    let settings = GossipSettings {
        listen: config.gossip.listen,
        advertise: config.node.advertise,
        peer_port: transport.local_addr().port(),
        role: config.node.role,
        zone: wiring::zone(config),
    };
    let gossip = Gossip::start(&settings, keys.clone(), node.clone(), discovery.seeds.clone(), metrics.clone())?;
    Ok((Arc::new(gossip), transport, discovery))
}

/// Says that the agent is ready once the first discovery round is over and it has joined who was found, then keeps homes informed.
async fn become_ready(
    sought: Option<(watch::Receiver<bool>, watch::Receiver<BTreeSet<SocketAddr>>)>,
    readiness: Readiness,
    gossip: Option<Arc<Gossip>>,
    tracker: Arc<GossipTracker>,
    (store, flights): (Arc<Store>, Arc<Flights>),
    stopping: CancellationToken,
) {
    let ready = async {
        if let Some((mut first_round, seeds)) = sought {
            // An ended discovery has had its round.
            let _ = first_round.wait_for(|over| *over).await;
            if let Some(gossip) = gossip.as_ref().filter(|_| !seeds.borrow().is_empty()) {
                joined(gossip.roster()).await;
            }
        }
        readiness.set();
        if let Some(gossip) = gossip {
            inform::Informer { gossip, tracker, store, flights }.run().await;
        }
    };
    tokio::select! {
        () = stopping.cancelled() => {}
        () = ready => {}
    }
}

/// Waits until a node that has somebody to ask knows the others, and they know it: before that it would fetch what they have.
async fn joined(mut roster: watch::Receiver<Arc<Roster>>) {
    let answered = roster.wait_for(|roster| !roster.members.is_empty());
    if tokio::time::timeout(ANSWER_PATIENCE, answered).await.is_ok() {
        let _ = tokio::time::timeout(JOIN_PATIENCE, inform::members_known(roster.clone())).await;
    }
}

/// Keeps the cache within its bounds and tells the cluster what is gone.
async fn keep_house(
    store: Arc<Store>,
    gossip: Option<Arc<Gossip>>,
    tracker: Arc<GossipTracker>,
    stopping: CancellationToken,
) {
    let mut removed = store.removed();
    let mut goodbyes = JoinSet::new();
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            _ = sweep.tick() => store.sweep().await,
            task = removed.recv() => match task {
                Ok(task) => {
                    withdraw(gossip.as_deref(), task);
                    if goodbyes.len() >= GOODBYES_MAX {
                        goodbyes.join_next().await;
                    }
                    goodbyes.spawn(leave_task(tracker.clone(), task));
                }
                Err(RecvError::Lagged(missed)) => tracing::warn!(missed, "evictions were not told to the cluster"),
                Err(RecvError::Closed) => return,
            },
            Some(_) = goodbyes.join_next(), if !goodbyes.is_empty() => {}
        }
    }
}

/// Tells the home of a task that this node does not hold it any more, lest it sends others here for nothing.
async fn leave_task(tracker: Arc<GossipTracker>, task: TaskId) {
    let Some(home) = tracker.homes(&task).first().copied() else { return };
    if let Err(error) = tracker.service_down(home, ServiceDownRequest { task }).await {
        tracing::debug!(%task, %home, %error, "a home could not be told what is gone");
    }
}

fn withdraw(gossip: Option<&Gossip>, task: TaskId) {
    tracing::info!(%task, "evicted from the cache");
    if let Some(gossip) = gossip {
        gossip.publish(EventBody::Remove { task });
    }
}

impl Running {
    /// Leaves the cluster, lets what is being served finish, and closes.
    async fn stop(self) {
        self.front.cancel();
        self.fronts.close();
        self.backs.close();
        let leave = async {
            if let Some(gossip) = &self.gossip {
                gossip.leave().await;
            }
        };
        // Others stop asking while the last clients are served.
        let drained = tokio::time::timeout(DRAIN, self.fronts.wait());
        let (drained, ()) = tokio::join!(drained, leave);
        if drained.is_err() {
            tracing::warn!("clients are cut off that were still being served");
        }
        if tokio::time::timeout(PULLS_END, self.flights.stop()).await.is_err() {
            tracing::warn!("pulls are cut off that had not ended");
        }
        // Responses that were being streamed have ended with their pulls.
        let _ = tokio::time::timeout(CUT, self.fronts.wait()).await;
        self.back.cancel();
        self.backs.wait().await;
        if let Some(transport) = self.transport {
            transport.close().await;
        }
        if let Some(discovery) = self.discovery {
            discovery.shutdown().await;
        }
        self.home.abort();
        let _ = self.home.await;
        self.store.close().await;
        tracing::info!("stopped");
    }
}
