//! The tracker over real sockets keeps the same promises as the one in memory, whichever member is the home (rows 1 to
//! 4 and 7).

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use darter_agent::admin::metrics::Metrics;
use darter_agent::gossip::tracker::{GossipTracker, HomeHandle};
use darter_agent::gossip::{Gossip, Settings};
use darter_agent::net::{Mode, Transport};
use darter_agent::pull::{Context, Flights};
use darter_agent::source::registry::Upstream;
use darter_agent::source::tally::Tally;
use darter_agent::store::{self, Store};
use darter_agent::upload::Uploader;
use darter_swarm::home::Home;
use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_tracker::conformance::{self, Subjects};
use darter_tracker::{NodeId, PieceSizeRule, Role};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::wait::PATIENCE;

/// The parts of an agent that a tracker call goes through, wired as the agent wires them.
struct Node {
    id: NodeId,
    gossip: Arc<Gossip>,
    transport: Transport,
    tracker: Option<GossipTracker>,
    home: JoinHandle<()>,
    uploads: JoinHandle<()>,
    stopping: CancellationToken,
    _seeds: watch::Sender<BTreeSet<SocketAddr>>,
    _cache: tempfile::TempDir,
}

impl Node {
    fn start(number: u8, mode: Mode, seeds: BTreeSet<SocketAddr>) -> Self {
        let metrics = Arc::new(Metrics::default());
        let keys = Arc::new(ClusterKeys::new("lab", &[[1; 32]]).unwrap());
        let node = Arc::new(NodeKey::new(&keys, &[number; 32], 1).unwrap());
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let transport = Transport::bind(any, mode, keys.clone(), &node, metrics.clone()).unwrap();
        let settings = Settings {
            listen: any,
            advertise: Ipv4Addr::LOCALHOST.into(),
            peer_port: transport.local_addr().port(),
            role: Role::Node,
            zone: 0,
        };
        let (sender, seeds) = watch::channel(seeds);
        let gossip = Gossip::start(&settings, keys.clone(), node.clone(), seeds, metrics.clone()).unwrap();
        let gossip = Arc::new(gossip);
        let cache = tempfile::tempdir().unwrap();
        let store = store::Settings {
            dir: cache.path().join("cache"),
            max_bytes: 1 << 20,
            min_free_bytes: 0,
            idle: PATIENCE,
            verify_before_stream: false,
            memory_bytes: 0,
            put_off: std::time::Duration::ZERO,
        };
        let store = Store::open(store, metrics.clone()).unwrap();
        let (home, home_loop) = HomeHandle::start(
            Home::new(node.id(), u64::from(number)),
            store.clone(),
            Some((gossip.clone(), transport.clone())),
        );
        let tracker =
            || GossipTracker::new(node.id(), home.clone(), Some((transport.clone(), gossip.roster())), Arc::default());
        let upstream = darter_agent::source::registry::Settings {
            policies: [].into(),
            own_ports: Vec::new(),
            local_hosts: BTreeSet::new(),
        };
        let flights = Flights::new(Context {
            store: store.clone(),
            upstream: Arc::new(Upstream::new(upstream, metrics.clone()).unwrap()),
            tracker: Arc::new(tracker()),
            transport: Some(transport.clone()),
            gossip: Some(gossip.clone()),
            keys,
            node: node.clone(),
            piece_size: PieceSizeRule::Auto,
            metrics: metrics.clone(),
            tally: Arc::new(Tally::default()),
        });
        let stopping = CancellationToken::new();
        let uploader = Uploader::new(store, flights, home.clone(), metrics);
        let uploads = tokio::spawn(uploader.run(transport.clone(), stopping.clone(), PATIENCE));
        let tracker = Some(tracker());
        Self {
            id: node.id(),
            gossip,
            transport,
            tracker,
            home: home_loop,
            uploads,
            stopping,
            _seeds: sender,
            _cache: cache,
        }
    }

    async fn stop(self) {
        self.stopping.cancel();
        self.uploads.await.unwrap();
        self.gossip.leave().await;
        self.transport.close().await;
        self.home.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gossip_tracker_conforms() {
    conforms([Mode::Auto; 3]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gossip_tracker_conforms_over_tcp() {
    // The last has no TCP.
    conforms([Mode::Tcp, Mode::Tcp, Mode::Quic]).await;
}

async fn conforms(modes: [Mode; 3]) {
    let first = Node::start(1, modes[0], BTreeSet::new());
    let seed = BTreeSet::from([first.gossip.local_addr()]);
    let mut nodes = [first, Node::start(2, modes[1], seed.clone()), Node::start(3, modes[2], seed)];
    for node in &nodes {
        let mut roster = node.gossip.roster();
        let met = tokio::time::timeout(PATIENCE, roster.wait_for(|roster| roster.members.len() == 2)).await;
        assert!(met.is_ok_and(|met| met.is_ok()), "all three meet");
    }
    let mut subjects = Subjects {
        members: [0, 1, 2].map(|at: usize| (nodes[at].id, nodes[at].tracker.take().unwrap())),
        home: nodes[0].id,
    };
    for (salt, home) in (1..).zip(nodes.each_ref().map(|node| node.id)) {
        subjects.home = home;
        let outcome = tokio::time::timeout(PATIENCE, conformance::check(&subjects, salt)).await.expect("it ends");
        assert_eq!(outcome, Ok(()), "with member {salt} as the home");
    }
    // A member that is gone is an error, not a wait.
    let [_, _, last] = nodes.each_ref().map(|node| node.id);
    subjects.home = last;
    let [a, b, gone] = nodes;
    gone.stop().await;
    assert!(conformance::check(&subjects, 9).await.is_err());
    drop(subjects);
    a.stop().await;
    b.stop().await;
}
