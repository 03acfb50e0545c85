//! Two and more transports over real sockets on loopback.

#![allow(clippy::unwrap_used, clippy::panic)]

mod tcp;
mod trust;

use super::*;
use crate::net::tcp::Failure;
use bytes::Bytes;
use darter_tracker::PieceSize;
use std::net::Ipv4Addr;
use std::time::Duration;
use tokio::time::timeout;

/// Longer than anything here takes; a test that needs it has failed.
const DEADLINE: Duration = Duration::from_secs(20);

/// Shorter than what agents use where a test waits for it to pass.
const TIMING: Timing = Timing {
    connect: Duration::from_secs(5),
    idle: Duration::from_secs(2),
    keep_alive: Duration::from_millis(200),
    unused: Duration::from_secs(60),
};

/// A transport and what a test wants to know of it.
struct Node {
    transport: Transport,
    metrics: Arc<Metrics>,
    id: NodeId,
    /// What its own streams go over.
    way: Way,
}

fn ring(byte: u8) -> Arc<ClusterKeys> {
    Arc::new(ClusterKeys::new("lab", &[[byte; 32]]).unwrap())
}

fn key(ring: &ClusterKeys, seed: u8) -> NodeKey {
    NodeKey::new(ring, &[seed; 32], 1).unwrap()
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

impl Node {
    /// A member of the cluster with the secret `ring(1)`.
    fn start(way: Way, seed: u8) -> Self {
        Self::with(way, seed, TIMING)
    }

    fn with(way: Way, seed: u8, timing: Timing) -> Self {
        let ring = ring(1);
        let key = key(&ring, seed);
        Self::with_tls(way, Tls::new(ring, &key).unwrap(), key.id(), timing, 0)
    }

    fn with_tls(way: Way, tls: Tls, id: NodeId, timing: Timing, port: u16) -> Self {
        let metrics = Arc::new(Metrics::default());
        let mode = if way == Way::Tcp { Mode::Tcp } else { Mode::Quic };
        let transport = Transport::with_tls(loopback(port), mode, tls, metrics.clone(), timing).unwrap();
        Self { transport, metrics, id, way }
    }

    fn peer(&self) -> Peer {
        Peer { id: self.id, addr: self.transport.local_addr() }
    }

    async fn open(&self, to: &Node) -> Result<Stream, NetError> {
        self.open_to(to.peer()).await
    }

    /// Over its own transport and no other.
    async fn open_to(&self, peer: Peer) -> Result<Stream, NetError> {
        let opening = async {
            match self.way {
                Way::Quic => self.transport.open_quic(peer).await,
                Way::Tcp => self.transport.open_tcp(peer).await.map_err(|failure| match failure {
                    Failure::Refused(error) => error,
                    Failure::Closed | Failure::Silent | Failure::Slow | Failure::Remembered => NetError::Unreachable,
                    Failure::Full => NetError::Full,
                    Failure::Broken => NetError::Protocol,
                    Failure::Ending => NetError::Closed,
                }),
            }
        };
        timeout(DEADLINE, opening).await.unwrap()
    }

    async fn accept(&self) -> Incoming {
        timeout(DEADLINE, self.transport.accept()).await.unwrap().unwrap()
    }

    /// A stream from here to `to`, seen from both ends.
    async fn pair(&self, to: &Node) -> (Stream, Stream) {
        let mut near = self.open(to).await.unwrap();
        near.send(&()).await.unwrap();
        let mut far = to.accept().await.stream;
        assert_eq!(far.receive().await.unwrap(), Some(()));
        (near, far)
    }

    fn dialled(&self) -> u64 {
        self.transport.shared.endpoint.stats().outgoing_handshakes
    }

    fn connections(&self) -> usize {
        match self.way {
            Way::Quic => self.transport.shared.endpoint.open_connections(),
            Way::Tcp => self.metrics.tcp_connections.get().try_into().unwrap(),
        }
    }
}

/// Runs tests for each transport.
macro_rules! over_both {
    ($($test:ident),* $(,)?) => {
        mod over_quic {
            $(#[tokio::test]
            async fn $test() {
                super::$test(super::Way::Quic).await;
            })*
        }
        mod over_tcp {
            $(#[tokio::test]
            async fn $test() {
                super::$test(super::Way::Tcp).await;
            })*
        }
    };
}
pub(crate) use over_both;

over_both!(
    frames_and_bytes_travel_both_ways,
    a_frame_and_the_largest_piece_end_together,
    a_cancelled_receive_loses_nothing,
    lengths_are_checked_before_memory_is_taken,
    what_breaks_off_or_does_not_decode_is_said_to,
    a_dead_connection_is_replaced,
    closing_ends_everything,
    an_unused_connection_is_closed_and_a_used_one_is_not,
    an_ipv6_socket_serves_ipv4_peers_under_their_own_address,
    a_peer_that_vanishes_is_noticed,
);

/// Waits until `condition` holds; there is nothing to be notified by for what the library counts.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let reached = timeout(DEADLINE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(reached.await.is_ok(), "never: {what}");
}

async fn frames_and_bytes_travel_both_ways(way: Way) {
    let (a, b) = (Node::start(way, 1), Node::start(way, 2));
    let mut near = a.open(&b).await.unwrap();
    near.send(&(7u32, "hello".to_owned())).await.unwrap();
    let Incoming { peer, remote, stream: mut far } = b.accept().await;
    assert_eq!((peer, remote.ip()), (a.id, a.transport.local_addr().ip()));
    assert_eq!(remote == a.transport.local_addr(), way == Way::Quic);
    assert_eq!((near.way(), far.way()), (way, way));
    assert_eq!(far.receive().await.unwrap(), Some((7u32, "hello".to_owned())));

    let piece: Bytes = (0..8 * 1024 * 1024u32).map(|at| (at / 7) as u8).collect();
    let sent = piece.clone();
    let sending = tokio::spawn(async move {
        far.send(&sent.len()).await.unwrap();
        far.send_bytes(sent).await.unwrap();
        far.finish();
        far.receive::<()>().await
    });
    let len = near.receive::<usize>().await.unwrap().unwrap();
    assert!(near.receive_bytes(len).await.unwrap() == piece);
    assert_eq!(near.receive::<()>().await.unwrap(), None);
    near.finish();
    assert_eq!(sending.await.unwrap().unwrap(), None);
}

/// It is more than one chunk, and more than the buffers between the two take at once.
async fn a_frame_and_the_largest_piece_end_together(way: Way) {
    let (a, b) = (Node::start(way, 1), Node::start(way, 2));
    let (mut near, mut far) = a.pair(&b).await;
    let piece: Bytes = (0..PieceSize::MAX_BYTES).map(|at| (at / 7) as u8).collect();
    let sent = piece.clone();
    let sending = tokio::spawn(async move {
        far.send_last_with(&sent.len(), sent).await.unwrap();
        far.deliver().await
    });
    let len = near.receive::<usize>().await.unwrap().unwrap();
    assert!(near.receive_bytes(len).await.unwrap() == piece);
    assert_eq!(near.receive::<()>().await.unwrap(), None);
    drop(near);
    timeout(DEADLINE, sending).await.unwrap().unwrap().unwrap();
}

async fn a_cancelled_receive_loses_nothing(way: Way) {
    let (a, b) = (Node::start(way, 1), Node::start(way, 2));
    let (near, mut far) = a.pair(&b).await;
    let (mut sender, _receiver) = near.split();
    let frame = [&[6u8, 0, 0, 0][..], &[5], b"split"].concat();
    for byte in frame {
        let nothing = timeout(Duration::from_millis(1), far.receive::<String>()).await;
        assert!(nothing.is_err());
        sender.send_bytes(Bytes::from(vec![byte])).await.unwrap();
    }
    assert_eq!(far.receive().await.unwrap(), Some("split".to_owned()));
}

async fn lengths_are_checked_before_memory_is_taken(way: Way) {
    let (a, b) = (Node::start(way, 1), Node::start(way, 2));
    let (mut near, mut far) = a.pair(&b).await;
    let huge = near.send(&vec![0u8; FRAME_BYTES_MAX]).await;
    assert!(matches!(huge, Err(NetError::FrameTooLong { bytes }) if bytes > FRAME_BYTES_MAX));

    // The announced bytes are never sent: whoever waited for them, or took memory for them, would not answer.
    near.send_bytes(Bytes::from_static(&[0xff; 4])).await.unwrap();
    for _ in 0..2 {
        let refused = timeout(DEADLINE, far.receive::<Vec<u8>>()).await.unwrap();
        assert!(matches!(refused, Err(NetError::FrameTooLong { bytes }) if bytes == u32::MAX as usize));
    }
    let bytes = PieceSize::MAX_BYTES as usize + 1;
    assert!(matches!(far.receive_bytes(bytes).await, Err(NetError::PieceTooLong { .. })));
}

async fn what_breaks_off_or_does_not_decode_is_said_to(way: Way) {
    let (a, b) = (Node::start(way, 1), Node::start(way, 2));
    let (mut near, mut far) = a.pair(&b).await;
    near.send(&(1u8, 2u8)).await.unwrap();
    assert!(matches!(far.receive::<u8>().await, Err(NetError::Malformed)), "left-over bytes");
    near.send(&200u8).await.unwrap();
    assert!(matches!(far.receive::<bool>().await, Err(NetError::Malformed)));
    near.send_bytes(Bytes::from_static(&[3, 0, 0, 0, 1])).await.unwrap();
    near.finish();
    assert!(matches!(far.receive::<u8>().await, Err(NetError::Truncated)));
    assert!(matches!(near.send(&1u8).await, Err(NetError::Finished)));
    drop(far);
    let (near, mut far) = a.pair(&b).await;
    drop(near);
    assert!(matches!(far.receive_bytes(1).await, Err(NetError::Truncated)));
}

#[tokio::test]
async fn many_callers_share_one_connection() {
    let (a, b) = (Node::start(Way::Quic, 1), Node::start(Way::Quic, 2));
    let opens = (0..64u8).map(|number| {
        let (transport, peer) = (a.transport.clone(), b.peer());
        tokio::spawn(async move {
            let mut stream = transport.open(peer).await.unwrap();
            stream.send(&number).await.unwrap();
            stream.receive::<u8>().await.unwrap().unwrap()
        })
    });
    let opens: Vec<_> = opens.collect();
    for _ in 0..opens.len() {
        let mut incoming = b.accept().await;
        let number = incoming.stream.receive::<u8>().await.unwrap().unwrap();
        incoming.stream.send(&number).await.unwrap();
        incoming.stream.finish();
    }
    for (number, open) in opens.into_iter().enumerate() {
        assert_eq!(usize::from(open.await.unwrap()), number);
    }
    assert_eq!(a.dialled(), 1);
    // And in the other direction on the same one.
    let _streams = b.pair(&a).await;
    assert_eq!((b.dialled(), a.connections(), b.connections()), (0, 1, 1));
}

#[tokio::test]
async fn both_may_dial_at_once() {
    let (a, b) = (Node::start(Way::Quic, 1), Node::start(Way::Quic, 2));
    for _ in 0..8 {
        let (one, other) = tokio::join!(a.pair(&b), b.pair(&a));
        drop((one, other));
    }
    assert!(a.dialled() <= 1 && b.dialled() <= 1, "a later stream needs no new connection");
}

#[tokio::test]
async fn a_peer_that_is_not_there_fails_fast() {
    let deaf = std::net::UdpSocket::bind(loopback(0)).unwrap();
    let a = Node::with(Way::Quic, 1, Timing { connect: Duration::from_millis(200), ..TIMING });
    let peer = Peer { id: NodeId::from_bytes([7; 16]), addr: deaf.local_addr().unwrap() };
    let (first, second) = tokio::join!(a.transport.open(peer), a.transport.open(peer));
    for outcome in [first, second] {
        assert!(matches!(outcome, Err(NetError::Unreachable)));
    }
    assert_eq!((a.dialled(), a.metrics.peers_refused.get()), (1, 0));
    let elsewhere = Peer { addr: "[::1]:9".parse().unwrap(), ..peer };
    assert!(matches!(a.transport.open(elsewhere).await, Err(NetError::Unreachable)));
}

async fn a_peer_that_vanishes_is_noticed(way: Way) {
    let a = Node::start(way, 1);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let b = {
        let _entered = runtime.enter();
        Node::start(way, 2)
    };
    let mut near = a.open(&b).await.unwrap();
    near.send(&1u8).await.unwrap();
    let mut far = b.accept().await.stream;
    assert_eq!(far.receive().await.unwrap(), Some(1u8));
    // The runtime goes first, so that nothing is left to say goodbye.
    runtime.shutdown_background();
    let gone = timeout(DEADLINE, near.receive::<u8>()).await.unwrap();
    // A process that is frozen looks the same: its kernel goes on taking what is sent.
    assert!(matches!(gone, Err(NetError::Silent)), "{gone:?}");
    assert!(matches!(near.send(&1u8).await, Err(NetError::Silent)));
    drop((far, b));
}

async fn a_dead_connection_is_replaced(way: Way) {
    let (ring, a) = (ring(1), Node::start(way, 1));
    let again = |port| {
        let key = key(&ring, 2);
        Node::with_tls(way, Tls::new(ring.clone(), &key).unwrap(), key.id(), TIMING, port)
    };
    let b = again(0);
    let (mut near, far) = a.pair(&b).await;
    let port = b.transport.local_addr().port();
    b.transport.close().await;
    assert!(matches!(timeout(DEADLINE, near.receive::<u8>()).await.unwrap(), Err(NetError::ClosedByPeer)));
    drop((near, far, b));
    until("the port is free", || std::net::UdpSocket::bind(loopback(port)).is_ok()).await;
    let b = again(port);
    let _streams = a.pair(&b).await;
    assert_eq!(a.dialled(), if way == Way::Quic { 2 } else { 0 });
}

async fn closing_ends_everything(way: Way) {
    let (a, b) = (Node::start(way, 1), Node::start(way, 2));
    let (mut near, mut far) = a.pair(&b).await;
    let (waiting, closing) = (b.transport.clone(), b.transport.clone());
    let accept = tokio::spawn(async move { waiting.accept().await.is_none() });
    timeout(DEADLINE, async { tokio::join!(b.transport.close(), closing.close()) }).await.unwrap();
    assert!(timeout(DEADLINE, accept).await.unwrap().unwrap());
    assert!(b.transport.accept().await.is_none());
    assert!(matches!(b.open(&a).await, Err(NetError::Closed)));
    assert!(matches!(far.receive::<u8>().await, Err(NetError::Closed)));
    assert!(matches!(timeout(DEADLINE, near.receive::<u8>()).await.unwrap(), Err(NetError::ClosedByPeer)));
}

async fn an_unused_connection_is_closed_and_a_used_one_is_not(way: Way) {
    let timing = Timing { unused: Duration::from_millis(240), ..TIMING };
    let (a, b, c) = (Node::with(way, 1, timing), Node::with(way, 2, timing), Node::with(way, 3, timing));
    let (mut near, mut far) = a.pair(&b).await;
    // The witness that the time has passed.
    drop(a.pair(&c).await);
    until("the unused connection is closed", || c.connections() == 0).await;
    near.send(&5u8).await.unwrap();
    assert_eq!(far.receive().await.unwrap(), Some(5u8));
    drop((near, far));
    until("the other is unused as well", || a.connections() == 0 && b.connections() == 0).await;
    let _streams = a.pair(&b).await;
    assert_eq!(a.dialled(), if way == Way::Quic { 3 } else { 0 });
}

async fn an_ipv6_socket_serves_ipv4_peers_under_their_own_address(way: Way) {
    let (ring, a) = (ring(1), Node::start(way, 1));
    let key = key(&ring, 2);
    let listen = "[::]:0".parse().unwrap();
    // A machine without IPv6 cannot show this.
    let mode = if way == Way::Tcp { Mode::Tcp } else { Mode::Quic };
    let Ok(transport) = Transport::bind(listen, mode, ring, &key, Arc::default()) else { return };
    let addr = loopback(transport.local_addr().port());
    let mut near = a.open_to(Peer { id: key.id(), addr }).await.unwrap();
    near.send(&()).await.unwrap();
    let incoming = timeout(DEADLINE, transport.accept()).await.unwrap().unwrap();
    assert_eq!(incoming.remote.ip(), a.transport.local_addr().ip());
    assert_eq!(transport.open(a.peer()).await.unwrap().way(), way);
}

#[tokio::test]
async fn a_peer_with_too_many_streams_is_full() {
    let (a, b) =
        (Node::with(Way::Quic, 1, Timing { connect: Duration::from_millis(500), ..TIMING }), Node::start(Way::Quic, 2));
    let mut streams = Vec::new();
    let full = loop {
        match a.open(&b).await {
            Ok(mut stream) => {
                stream.send(&()).await.unwrap();
                streams.push(stream);
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(full, NetError::Full));
    assert_eq!(streams.len(), 256);
    // Streams that are over at both ends make room, which is told to the other side in batches.
    for mut done in streams.drain(..64) {
        done.finish();
        let mut far = b.accept().await.stream;
        assert_eq!(far.receive().await.unwrap(), Some(()));
        assert_eq!(far.receive::<()>().await.unwrap(), None);
        far.finish();
        assert_eq!(done.receive::<()>().await.unwrap(), None);
    }
    assert!(a.open(&b).await.is_ok());
}
