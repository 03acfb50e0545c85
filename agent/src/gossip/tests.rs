#![allow(clippy::unwrap_used)]

//! Real sockets on loopback.

use std::collections::BTreeSet;

use darter_tracker::{Digest, PieceSize};

use super::*;

/// Within this everything here must happen; it takes well under a second where nothing else runs.
const PATIENCE: Duration = Duration::from_secs(8);

struct Node {
    gossip: Gossip,
    id: NodeId,
    metrics: Arc<Metrics>,
    seeds: watch::Sender<BTreeSet<SocketAddr>>,
}

fn start(cluster: &str, number: u8, seeds: BTreeSet<SocketAddr>) -> Node {
    let keys = Arc::new(ClusterKeys::new(cluster, &[[1; 32]]).unwrap());
    let node = Arc::new(NodeKey::new(&keys, &[number; 32], 1).unwrap());
    let settings = Settings {
        listen: "127.0.0.1:0".parse().unwrap(),
        advertise: "127.0.0.1".parse().unwrap(),
        peer_port: 1000 + u16::from(number),
        role: Role::Node,
        zone: 0,
    };
    let (id, metrics) = (node.id(), Arc::new(Metrics::default()));
    let (seeds, followed) = watch::channel(seeds);
    let gossip = Gossip::start(&settings, keys, node, followed, metrics.clone()).unwrap();
    Node { gossip, id, metrics, seeds }
}

async fn until(node: &Node, what: &str, done: impl Fn(&Roster) -> bool) {
    let mut roster = node.gossip.roster();
    let waited = tokio::time::timeout(PATIENCE, roster.wait_for(|roster| done(roster))).await;
    assert!(waited.is_ok_and(|seen| seen.is_ok()), "{what}: {:?}", node.gossip.roster().borrow());
}

/// Waits for an event to arrive and for what it changes.
async fn until_heard(node: &Node, done: impl Fn(&Gossip) -> bool) {
    let mut events = node.gossip.events();
    let waiting = async {
        while !done(&node.gossip) {
            events.recv().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
}

#[tokio::test]
async fn five_nodes_meet_talk_and_part() {
    let first = start("lab", 1, BTreeSet::new());
    let seed = first.gossip.local_addr();
    let mut nodes = vec![first];
    nodes.extend((2..=5).map(|number| start("lab", number, BTreeSet::from([seed]))));
    let all: BTreeSet<NodeId> = nodes.iter().map(|node| node.id).collect();
    for node in &nodes {
        until(node, "convergence", |roster| {
            let mut view: BTreeSet<NodeId> = roster.members.keys().copied().collect();
            view.insert(roster.me.id);
            view == all
        })
        .await;
        assert_eq!((node.metrics.members.get(), node.metrics.members_lost.get()), (5, 0));
    }
    let peer = nodes[0].gossip.roster().borrow().members[&nodes[3].id].peer;
    assert_eq!(peer, "127.0.0.1:1004".parse().unwrap());

    let task = TaskId::blob(Digest::Sha256([7; 32]));
    let geometry = Geometry::new(1 << 20, PieceSize::new(1 << 18).unwrap()).unwrap();
    nodes[2].gossip.publish(EventBody::Length { task, geometry });
    nodes[2].gossip.publish(EventBody::Progress { task, quarters: 4 });
    for node in [0, 1, 3, 4].map(|at| &nodes[at]) {
        until_heard(node, |gossip| gossip.holders(&task) == [(nodes[2].id, 4)]).await;
        until_heard(node, |gossip| gossip.geometry(&task) == Some(geometry)).await;
    }
    assert_eq!(nodes[2].gossip.holders(&task), [], "the others', not one's own");

    let leaver = nodes.remove(2);
    let began = tokio::time::Instant::now();
    leaver.gossip.leave().await;
    assert!(began.elapsed() < LEAVE_TIMEOUT);
    leaver.gossip.leave().await;
    for node in &nodes {
        until(node, "departure", |roster| !roster.members.contains_key(&leaver.id)).await;
        assert_eq!(node.gossip.holders(&task), []);
        assert_eq!((node.metrics.members.get(), node.metrics.members_lost.get()), (4, 1));
    }
}

#[tokio::test]
async fn seeds_are_followed_and_ones_own_address_is_ignored() {
    let (first, second) = (start("lab", 1, BTreeSet::new()), start("lab", 2, BTreeSet::new()));
    second.seeds.send_replace(BTreeSet::from([second.gossip.local_addr(), first.gossip.local_addr()]));
    until(&first, "joined", |roster| roster.members.contains_key(&second.id)).await;
    until(&second, "joined", |roster| roster.members.contains_key(&first.id)).await;
}

#[tokio::test]
async fn another_cluster_is_counted_and_stays_outside() {
    let first = start("lab", 1, BTreeSet::new());
    let stranger = start("other", 2, BTreeSet::from([first.gossip.local_addr()]));
    let reason = metrics_label();
    let waiting = async {
        while first.metrics.gossip_dropped.get_or_create(&reason).get() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
    assert!(first.gossip.roster().borrow().members.is_empty());
    assert!(stranger.gossip.roster().borrow().members.is_empty());
}

fn metrics_label() -> crate::admin::metrics::DropLabel {
    crate::admin::metrics::DropLabel { reason: crate::admin::metrics::DropReason::OtherCluster }
}

#[tokio::test]
async fn a_taken_address_is_an_error() {
    let first = start("lab", 1, BTreeSet::new());
    let keys = Arc::new(ClusterKeys::new("lab", &[[1; 32]]).unwrap());
    let node = Arc::new(NodeKey::new(&keys, &[2; 32], 1).unwrap());
    let mut settings = Settings {
        listen: first.gossip.local_addr(),
        advertise: "127.0.0.1".parse().unwrap(),
        peer_port: 1,
        role: Role::Node,
        zone: 0,
    };
    let (_, seeds) = watch::channel(BTreeSet::new());
    let start =
        |settings: &Settings| Gossip::start(settings, keys.clone(), node.clone(), seeds.clone(), Arc::default()).err();
    assert!(matches!(start(&settings), Some(GossipError::Bind { .. })));
    settings.advertise = "0.0.0.0".parse().unwrap();
    assert!(matches!(start(&settings), Some(GossipError::Advertise(_))));
}
