//! A member of the cluster that is no agent: a test holds the secret and speaks for it, so that it can say and do what no
//! agent would. It has no cache and no proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use bytes::Bytes;
use darter_agent::admin::metrics::Metrics;
use darter_agent::demo::image::Blob;
use darter_agent::gossip::tracker::{GossipTracker, HomeHandle};
use darter_agent::gossip::{Gossip, Settings};
use darter_agent::net::{Incoming, Mode, NetError, Peer, Transport};
use darter_agent::store::{self, Store};
use darter_swarm::home::Home;
use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_swarm::tags::TagId;
use darter_swarm::wire::{Call, Offer, Open, PieceReply, Reply, SessionFrame, TurnReply};
use darter_tracker::{
    Added, Bitmap, Geometry, NodeId, PieceDigest, PieceIndex, PieceProof, PieceRange, PullPieceRequest,
    PullPieceResponse, RegisterRequest, Role, ServiceDownRequest, TaskId, Tracker as _,
};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::task::AbortOnDropHandle;

use crate::stage::{MIB, Stage, metric};
use crate::wait;

/// The cluster of the stage's agents.
const CLUSTER: &str = "demo";

/// A member.
pub(crate) struct Member {
    pub(crate) id: NodeId,
    pub(crate) transport: Transport,
    key: Arc<NodeKey>,
    gossip: Arc<Gossip>,
    tracker: GossipTracker,
    home: HomeHandle,
    home_loop: JoinHandle<()>,
    _seeds: watch::Sender<BTreeSet<SocketAddr>>,
    /// Empty: what it gives does not come from there.
    _cache: TempDir,
}

impl Member {
    /// Joins the stage's agents; `others` more members than the agents are there already.
    pub(crate) async fn join(stage: &Stage, others: u64) -> Self {
        let secret = std::fs::read_to_string(stage.cluster.directory().join("secret")).unwrap();
        let secret = base64::engine::general_purpose::STANDARD.decode(secret.trim()).unwrap();
        let keys = Arc::new(ClusterKeys::new(CLUSTER, &[secret]).unwrap());
        let key = Arc::new(NodeKey::new(&keys, &rand::random(), 1).unwrap());
        let metrics = Arc::new(Metrics::default());
        let any = SocketAddr::new(stage.subnet.registry(), 0);
        // Over QUIC agents are known by the port that they come from.
        let transport = Transport::bind(any, Mode::Quic, keys.clone(), &key, metrics.clone()).unwrap();
        let settings = Settings {
            listen: any,
            advertise: any.ip(),
            peer_port: transport.local_addr().port(),
            role: Role::Node,
            zone: 0,
        };
        let running = stage.agents().iter().filter(|agent| agent.process_id().is_some());
        let (seeds, followed) = watch::channel(running.clone().map(|agent| agent.addresses().gossip).collect());
        let gossip = Arc::new(Gossip::start(&settings, keys, key.clone(), followed, metrics.clone()).unwrap());
        let cache = tempfile::tempdir().unwrap();
        let settings = store::Settings {
            dir: cache.path().join("cache"),
            max_bytes: MIB,
            min_free_bytes: 0,
            idle: wait::PATIENCE,
            verify_before_stream: false,
            memory_bytes: 0,
            put_off: std::time::Duration::ZERO,
        };
        let store = Store::open(settings, metrics.clone()).unwrap();
        let peers = (gossip.clone(), transport.clone());
        let (home, home_loop) = HomeHandle::start(Home::new(key.id(), 1), store, Some(peers));
        let peers = (transport.clone(), gossip.roster());
        let tracker = GossipTracker::new(key.id(), home.clone(), Some(peers), metrics);
        let count = running.clone().count() as u64 + others + 1;
        for agent in running {
            wait::until("the agents count the new member", async || metric(agent, "darter_members").await == count)
                .await;
        }
        let mut roster = gossip.roster();
        let met = roster.wait_for(|roster| roster.members.len() as u64 == count - 1);
        assert!(tokio::time::timeout(wait::PATIENCE, met).await.is_ok_and(|met| met.is_ok()), "it knows all of them");
        Self { id: key.id(), transport, key, gossip, tracker, home, home_loop, _seeds: seeds, _cache: cache }
    }

    /// The member that answers peers at an address.
    pub(crate) fn at(&self, addr: SocketAddr) -> Peer {
        let roster = self.gossip.roster();
        let roster = roster.borrow();
        let id = roster.members.values().find(|member| member.peer == addr).expect("a member").id;
        Peer { id, addr }
    }

    /// Waits until gossip has told that a member has left.
    pub(crate) async fn sees_leave(&self, id: NodeId) {
        let mut roster = self.gossip.roster();
        roster.wait_for(|roster| !roster.members.contains_key(&id)).await.unwrap();
    }

    /// Whether it is the home of a tag.
    pub(crate) fn is_home(&self, tag: TagId) -> bool {
        self.tracker.homes(&tag.task()).first() == Some(&self.id)
    }

    /// Tells the home of a task that it is here: all of it, or nothing.
    pub(crate) async fn register(&self, task: TaskId, geometry: Geometry, whole: bool) {
        let have = whole.then(|| Bitmap::full(geometry.pieces()));
        let home = self.tracker.homes(&task)[0];
        self.tracker.register(home, RegisterRequest::new(task, Some(geometry), have)).await.unwrap();
    }

    /// Asks the home for a lease or sources of all pieces.
    pub(crate) async fn pull_piece(&self, task: TaskId, geometry: Geometry) -> PullPieceResponse {
        let lacking = vec![PieceRange { first: PieceIndex(0), count: geometry.pieces() }];
        let request =
            PullPieceRequest { task, have: None, lacking, urgent: None, can_fetch: true, registry: Added::default() };
        self.tracker.pull_piece(self.tracker.homes(&task)[0], request).await.unwrap()
    }

    /// Whether the home sends somebody who wants all of a blob, and has just come, to `node`.
    pub(crate) async fn is_sent_to(&self, node: NodeId, task: TaskId, geometry: Geometry) -> bool {
        self.register(task, geometry, false).await;
        let named = match self.pull_piece(task, geometry).await {
            PullPieceResponse::Pieces(sources) => sources.iter().any(|source| source.node == node),
            _ => false,
        };
        self.tracker.service_down(self.tracker.homes(&task)[0], ServiceDownRequest { task }).await.unwrap();
        named
    }

    /// Answers a call as the home that it may be.
    pub(crate) async fn answer(&self, peer: NodeId, call: Call) -> Reply {
        self.home.call(peer, call).await
    }

    /// Takes a piece as an agent would, one frame after the other; what is wrong with the frames fails the test.
    pub(crate) async fn take(&self, from: SocketAddr, task: TaskId, piece: PieceIndex) -> Option<(PieceProof, Bytes)> {
        let peer = self.at(from);
        let mut turn = self.transport.open(peer).await.unwrap();
        turn.send(&Open::Ask { task, holds: 0 }).await.unwrap();
        let ticket = loop {
            match turn.receive::<TurnReply>().await.unwrap().unwrap() {
                TurnReply::Turn { ticket, .. } => break ticket,
                TurnReply::Queued => {}
                TurnReply::NotHeld => return None,
                TurnReply::Busy => panic!("nobody else asks"),
            }
        };
        let mut stream = self.transport.open_bulk(peer).await.unwrap();
        stream.send(&Open::Piece { task, piece, ticket }).await.unwrap();
        stream.finish();
        match stream.receive::<PieceReply>().await.unwrap().unwrap() {
            PieceReply::Piece { proof, length } => Some((proof, stream.receive_bytes(length as usize).await.unwrap())),
            PieceReply::NotHeld => None,
            other => panic!("{other:?}"),
        }
    }

    /// Leaves.
    pub(crate) async fn leave(self) {
        self.depart().await;
    }

    /// Leaves, while others still have a hand on it.
    pub(crate) async fn depart(&self) {
        self.gossip.leave().await;
        self.transport.close().await;
        self.home_loop.abort();
    }
}

/// What a member does that should give pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Sends other bytes than it vouches for.
    WrongBytes,
    /// Breaks off in the middle of each piece.
    BreaksOff,
    /// Vouches for wrong bytes, as only a member can.
    SignsWrongBytes,
}

/// A member that says that it has all of one blob.
pub(crate) struct Liar {
    pub(crate) member: Arc<Member>,
    manner: Manner,
    blob: Blob,
    geometry: Geometry,
    /// Who asked for which pieces.
    asked: Mutex<BTreeMap<SocketAddr, Vec<PieceIndex>>>,
}

impl Liar {
    /// Serves peers for as long as the handle is held.
    pub(crate) fn start(member: Member, manner: Manner, blob: Blob, geometry: Geometry) -> (Arc<Self>, impl Drop) {
        let liar = Arc::new(Self { member: Arc::new(member), manner, blob, geometry, asked: Mutex::default() });
        let serving = liar.clone();
        let task = tokio::spawn(async move {
            let mut streams = JoinSet::new();
            while let Some(incoming) = serving.member.transport.accept().await {
                let liar = serving.clone();
                // A peer that goes away in the middle is none of this test's business.
                streams.spawn(async move { liar.serve(incoming).await.ok() });
            }
        });
        (liar, AbortOnDropHandle::new(task))
    }

    /// How many pieces an agent has asked for.
    pub(crate) fn asked_by(&self, peer: SocketAddr) -> usize {
        self.asked.lock().unwrap().get(&peer).map_or(0, Vec::len)
    }

    async fn serve(&self, incoming: Incoming) -> Result<(), NetError> {
        let Incoming { peer, remote, mut stream } = incoming;
        match stream.receive::<Open>().await? {
            None => {}
            Some(Open::Call(call)) => stream.send(&self.member.home.call(peer, call).await).await?,
            Some(Open::Session(Offer { task, .. })) => {
                let have = Some(Bitmap::full(self.geometry.pieces()));
                let ours = Offer { task, geometry: Some(self.geometry), have, home: None };
                let (mut sender, mut receiver) = stream.split();
                sender.send(&SessionFrame::Offer(ours)).await?;
                while receiver.receive::<SessionFrame>().await?.is_some_and(|frame| frame != SessionFrame::Finished) {}
            }
            Some(Open::Ask { .. }) => {
                // It is everybody's turn at once.
                stream.send(&TurnReply::Turn { ticket: 0, rather: Added::default() }).await?;
                stream.receive::<TurnReply>().await?;
            }
            Some(Open::Piece { task, piece, .. }) => {
                self.asked.lock().unwrap().entry(remote).or_default().push(piece);
                let start = self.geometry.offset(piece);
                let length = self.geometry.piece_length(piece);
                let right = self.blob.read(start..start + u64::from(length));
                let mut wrong = right.to_vec();
                wrong[length as usize / 2] ^= 1;
                let digest = match self.manner {
                    Manner::SignsWrongBytes => PieceDigest::of(&wrong),
                    Manner::WrongBytes | Manner::BreaksOff => PieceDigest::of(&right),
                };
                let proof = self.member.key.sign_piece(&task, &self.geometry, piece, digest);
                stream.send(&PieceReply::Piece { proof, length }).await?;
                if self.manner == Manner::BreaksOff {
                    wrong = right[..length as usize / 2].to_vec();
                }
                stream.send_bytes(Bytes::from(wrong)).await?;
                stream.deliver().await?;
            }
        }
        Ok(())
    }
}
