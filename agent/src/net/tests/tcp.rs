//! What is particular to TCP: connections are used again, and QUIC takes over where TCP does not get through.

use super::*;
use crate::admin::metrics::TcpFallbackLabel;

/// What the pool allows per peer.
const LINKS_PER_PEER: usize = 16;

/// A member with the given mode, whose streams are opened as the agent does.
fn with_mode(mode: Mode, seed: u8) -> (Transport, Arc<Metrics>, Peer) {
    let ring = ring(1);
    let (key, metrics) = (key(&ring, seed), Arc::new(Metrics::default()));
    let tls = Tls::new(ring, &key).unwrap();
    let transport = Transport::with_tls(loopback(0), mode, tls, metrics.clone(), TIMING).unwrap();
    let peer = Peer { id: key.id(), addr: transport.local_addr() };
    (transport, metrics, peer)
}

fn fallbacks(metrics: &Metrics, reason: TcpFallback) -> u64 {
    metrics.tcp_fallbacks.get_or_create(&TcpFallbackLabel { reason }).get()
}

/// A whole exchange on a stream from `a` to `b`; where it was seen to come from.
async fn exchange(a: &Node, b: &Node) -> SocketAddr {
    let mut near = a.open(b).await.unwrap();
    near.send(&7u8).await.unwrap();
    near.finish();
    let mut incoming = b.accept().await;
    assert_eq!(incoming.stream.receive().await.unwrap(), Some(7u8));
    incoming.stream.send(&8u8).await.unwrap();
    let received = tokio::join!(incoming.stream.deliver(), async {
        assert_eq!(near.receive().await.unwrap(), Some(8u8));
        drop(near);
    });
    received.0.unwrap();
    incoming.remote
}

#[tokio::test]
async fn a_connection_is_used_again_after_a_whole_exchange() {
    let (a, b) = (Node::start(Way::Tcp, 1), Node::start(Way::Tcp, 2));
    let first = exchange(&a, &b).await;
    for _ in 0..20 {
        // Its end is cleared up in the background.
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(exchange(&a, &b).await, first);
    }
    assert_eq!((a.connections(), b.connections()), (1, 1));
}

/// Nothing is said between two streams, which is no silence of the peer.
#[tokio::test]
async fn a_connection_that_has_rested_is_used_again() {
    let timing = Timing { idle: Duration::from_millis(400), keep_alive: Duration::from_millis(50), ..TIMING };
    let (a, b) = (Node::with(Way::Tcp, 1, timing), Node::with(Way::Tcp, 2, timing));
    let first = exchange(&a, &b).await;
    tokio::time::sleep(timing.idle * 2).await;
    // Long enough for both sides to look whether the other lives.
    let mut near = a.open(&b).await.unwrap();
    tokio::time::sleep(timing.keep_alive * 2).await;
    near.send(&7u8).await.unwrap();
    let mut incoming = b.accept().await;
    tokio::time::sleep(timing.keep_alive * 2).await;
    incoming.stream.send(&8u8).await.unwrap();
    assert_eq!(near.receive().await.unwrap(), Some(8u8));
    assert_eq!(incoming.remote, first);
}

#[tokio::test]
async fn what_breaks_off_in_the_middle_takes_its_connection_with_it() {
    let (a, b) = (Node::start(Way::Tcp, 1), Node::start(Way::Tcp, 2));
    let (near, mut far) = a.pair(&b).await;
    // More than the buffers between them hold.
    let piece = Bytes::from(vec![1; PieceSize::MAX_BYTES as usize]);
    let sending = tokio::spawn(async move {
        let sent = far.send_bytes(piece).await;
        (sent, far)
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(near);
    let (sent, far) = timeout(DEADLINE, sending).await.unwrap().unwrap();
    assert!(matches!(sent, Err(NetError::ClosedByPeer)), "{sent:?}");
    drop(far);
    until("the connection is gone", || a.connections() == 0 && b.connections() == 0).await;

    // The other way round: the sender gives up.
    let (mut near, mut far) = a.pair(&b).await;
    let piece = Bytes::from(vec![1; PieceSize::MAX_BYTES as usize]);
    assert!(timeout(Duration::from_millis(50), far.send_bytes(piece)).await.is_err());
    drop(far);
    let broken = timeout(DEADLINE, near.receive_bytes(PieceSize::MAX_BYTES as usize)).await.unwrap();
    assert!(matches!(broken, Err(NetError::ClosedByPeer)), "{broken:?}");
}

#[tokio::test]
async fn a_sender_hears_that_a_slow_reader_lives() {
    let (a, b) = (Node::start(Way::Tcp, 1), Node::start(Way::Tcp, 2));
    let (mut near, mut far) = a.pair(&b).await;
    let length = PieceSize::MAX_BYTES as usize;
    let sending = tokio::spawn(async move {
        far.send_bytes(vec![1; length].into()).await.unwrap();
        far.deliver().await
    });
    let mut heard = b.transport.received(a.id);
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        near.receive_bytes(length / 8).await.unwrap();
        until("a sign of life", || b.transport.received(a.id) > heard).await;
        heard = b.transport.received(a.id);
    }
    drop(near);
    timeout(DEADLINE, sending).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn connections_with_one_peer_are_bounded() {
    let (a, b) = (Node::start(Way::Tcp, 1), Node::start(Way::Tcp, 2));
    let mut streams = Vec::new();
    for _ in 0..LINKS_PER_PEER {
        streams.push(a.pair(&b).await);
    }
    assert!(matches!(a.open(&b).await, Err(NetError::Full)));
    // The agent takes QUIC then.
    let stream = timeout(DEADLINE, a.transport.open_bulk(b.peer())).await.unwrap().unwrap();
    assert_eq!((stream.way(), fallbacks(&a.metrics, TcpFallback::Full)), (Way::Quic, 1));
    streams.pop();
    until("there is room", || a.connections() < LINKS_PER_PEER || b.connections() <= LINKS_PER_PEER).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    streams.push(a.pair(&b).await);
}

#[tokio::test]
async fn where_tcp_is_closed_quic_is_used_at_once_and_from_then_on() {
    let (a, metrics, _) = with_mode(Mode::Auto, 1);
    let (_b, _, peer) = with_mode(Mode::Quic, 2);
    // The first may find the handshake of QUIC slow, not that of TCP.
    for _ in 0..3 {
        let stream = timeout(DEADLINE, a.open_bulk(peer)).await.unwrap().unwrap();
        assert_eq!(stream.way(), Way::Quic);
    }
    let (closed, slow) = (fallbacks(&metrics, TcpFallback::Closed), fallbacks(&metrics, TcpFallback::Slow));
    assert_eq!(closed + slow, 1, "one attempt");
    assert_eq!(fallbacks(&metrics, TcpFallback::Remembered), 2);
    assert_eq!(a.open(peer).await.unwrap().way(), Way::Quic);
}

#[tokio::test]
async fn where_tcp_gets_no_answer_quic_is_used_after_some_milliseconds() {
    let (a, metrics, _) = with_mode(Mode::Auto, 1);
    let (_b, _, peer) = with_mode(Mode::Quic, 2);
    // Takes connections and says nothing: what a dialler sees of it is what it sees of a filter that drops its packets, but that
    // the socket is connected.
    let mute = std::net::TcpListener::bind(peer.addr).unwrap();
    drop(timeout(DEADLINE, a.open(peer)).await.unwrap().unwrap());
    let begin = std::time::Instant::now();
    let stream = timeout(DEADLINE, a.open_bulk(peer)).await.unwrap().unwrap();
    // What it costs beyond a QUIC stream is a named time, an order of magnitude below this.
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_eq!((stream.way(), fallbacks(&metrics, TcpFallback::Slow)), (Way::Quic, 1));
    // The dial goes on, and nobody else waits for it.
    let begin = std::time::Instant::now();
    let stream = timeout(DEADLINE, a.open_bulk(peer)).await.unwrap().unwrap();
    assert!(begin.elapsed() < way::PATIENCE, "{:?}", begin.elapsed());
    assert_eq!((stream.way(), fallbacks(&metrics, TcpFallback::Slow)), (Way::Quic, 2));
    drop(mute);
}

#[tokio::test]
async fn a_piece_that_was_expected_finds_a_connection() {
    let ((a, metrics, _), (_b, _, peer)) = (with_mode(Mode::Auto, 1), with_mode(Mode::Auto, 2));
    for _ in 0..3 {
        a.expect_bulk(peer);
    }
    until("the connection is there", || a.shared.census.is_proven(peer.id)).await;
    let stream = timeout(DEADLINE, a.open_bulk(peer)).await.unwrap().unwrap();
    a.expect_bulk(peer);
    assert_eq!((stream.way(), metrics.tcp_connections.get()), (Way::Tcp, 1), "one for all of them");
}

#[tokio::test]
async fn who_uses_quic_alone_expects_nothing() {
    let ((a, metrics, _), (_b, _, peer)) = (with_mode(Mode::Quic, 1), with_mode(Mode::Auto, 2));
    a.expect_bulk(peer);
    let stream = timeout(DEADLINE, a.open_bulk(peer)).await.unwrap().unwrap();
    assert_eq!((stream.way(), metrics.tcp_connections.get()), (Way::Quic, 0));
}

#[tokio::test]
async fn pieces_go_over_tcp_and_calls_as_they_are_told() {
    for (mode, talk) in [(Mode::Auto, Way::Quic), (Mode::Tcp, Way::Tcp), (Mode::Quic, Way::Quic)] {
        let ((a, metrics, _), (_b, _, peer)) = (with_mode(mode, 1), with_mode(Mode::Auto, 2));
        assert_eq!(timeout(DEADLINE, a.open(peer)).await.unwrap().unwrap().way(), talk, "{mode:?}");
        let mut bulk = timeout(DEADLINE, a.open_bulk(peer)).await.unwrap().unwrap();
        if mode != Mode::Quic && bulk.way() == Way::Quic {
            // The first dial took longer than somebody waits for it, on a busy machine.
            until("the connection is there", || metrics.tcp_connections.get() > 0).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            bulk = timeout(DEADLINE, a.open_bulk(peer)).await.unwrap().unwrap();
        }
        assert_eq!(bulk.way() == Way::Tcp, mode != Mode::Quic, "{mode:?}");
    }
}

#[tokio::test]
async fn a_slow_handshake_is_dropped_and_one_address_does_not_keep_others_out() {
    let timing = Timing { connect: Duration::from_millis(500), ..TIMING };
    let (a, b) = (Node::start(Way::Tcp, 1), Node::with(Way::Tcp, 2, timing));
    let addr = b.transport.local_addr();
    let mut slow = Vec::new();
    for _ in 0..100 {
        slow.push(tokio::net::TcpStream::connect(addr).await.unwrap());
    }
    // From another address there is room meanwhile.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let stream = socket.connect(addr).await.unwrap();
    let ring = ring(1);
    let (config, _) = Tls::new(ring.clone(), &key(&ring, 9)).unwrap().client(b.id).unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let member = timeout(DEADLINE, connector.connect("darter".try_into().unwrap(), stream)).await.unwrap();
    assert!(member.is_ok(), "{member:?}");
    // And they all end.
    for mut stream in slow {
        let ended = timeout(DEADLINE, tokio::io::AsyncReadExt::read(&mut stream, &mut [0])).await.unwrap();
        assert!(ended.is_err() || ended.unwrap() == 0);
    }
    exchange(&a, &b).await;
    assert_eq!(b.metrics.peers_refused.get(), 0, "they said nothing that could be refused");
}
