//! Who is let in, and who is not.

use super::*;
use crate::net::identity::forge;
use crate::net::tls::Verdict;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;

super::over_both!(
    another_cluster_is_refused_in_both_directions,
    a_secret_that_only_one_side_has_yet_is_refused_by_the_other,
    another_member_than_the_one_dialled_is_refused,
    a_forged_certificate_is_refused,
    a_client_without_certificate_is_refused,
    another_version_of_the_protocol_is_refused,
);

fn member(way: Way, tls: Tls, id: NodeId) -> Node {
    Node::with_tls(way, tls, id, TIMING, 0)
}

/// A member of another cluster, which has the secret `ring(2)`.
fn stranger(way: Way, seed: u8) -> Node {
    let ring = ring(2);
    let key = key(&ring, seed);
    member(way, Tls::new(ring, &key).unwrap(), key.id())
}

/// Refused at both ends, counted at both, and no stream has come through.
async fn assert_refused(dialler: &Node, listener: &Node, outcome: Result<Stream, NetError>) {
    match outcome {
        Err(NetError::Refused(_) | NetError::RefusedByPeer) => {}
        // The client's side of the handshake is over before the server has seen its certificate.
        Ok(mut stream) => {
            let _ = stream.send(&()).await;
            let refused = timeout(DEADLINE, stream.receive::<()>()).await.unwrap();
            assert!(matches!(refused, Err(NetError::RefusedByPeer)), "{refused:?}");
        }
        Err(other) => panic!("{other:?}"),
    }
    until("both count it", || dialler.metrics.peers_refused.get() == 1 && listener.metrics.peers_refused.get() == 1)
        .await;
    let mut queue = listener.transport.shared.incoming.lock().await;
    assert!(queue.try_recv().is_err(), "a stream of a stranger");
}

async fn another_cluster_is_refused_in_both_directions(way: Way) {
    let (a, b) = (Node::start(way, 1), stranger(way, 2));
    let outcome = a.open(&b).await;
    assert!(matches!(outcome, Err(NetError::Refused(Refusal::NotAMember))), "{outcome:?}");
    assert_refused(&a, &b, outcome).await;
    let (a, b) = (stranger(way, 1), Node::start(way, 2));
    let outcome = a.open(&b).await;
    assert_refused(&a, &b, outcome).await;
}

async fn a_secret_that_only_one_side_has_yet_is_refused_by_the_other(way: Way) {
    // The dialler already sends under the new secret and still accepts the old; the listener has the old one only.
    let both = Arc::new(ClusterKeys::new("lab", &[[2; 32], [1; 32]]).unwrap());
    let node = key(&both, 1);
    let (a, b) = (member(way, Tls::new(both, &node).unwrap(), node.id()), Node::start(way, 2));
    let outcome = a.open(&b).await;
    assert_refused(&a, &b, outcome).await;
}

async fn another_member_than_the_one_dialled_is_refused(way: Way) {
    let (a, b) = (Node::start(way, 1), Node::start(way, 2));
    let expected = NodeId::from_bytes([9; 16]);
    let outcome = a.open_to(Peer { id: expected, ..b.peer() }).await;
    let Err(NetError::Refused(refusal)) = outcome else { panic!("{outcome:?}") };
    assert_eq!(refusal, Refusal::Another { expected, found: b.id });
    assert_refused(&a, &b, Err(refusal.into())).await;
    // Its right name is served nevertheless.
    let _streams = a.pair(&b).await;
}

async fn a_forged_certificate_is_refused(way: Way) {
    let ring = ring(1);
    let (victim, thief) = (key(&ring, 3), key(&ring, 4));
    let forged = |credentials| member(way, Tls::with_credentials(ring.clone(), credentials).unwrap(), victim.id());
    // The victim's tag on the thief's key, then the victim's whole certificate without the key that belongs to it.
    let copied_tag = || forge::with_tag_of(&thief, &victim.signer());
    let copied_certificate = || forge::with_certificate_of(&thief, &victim);
    let makers: [&dyn Fn() -> identity::Credentials; 2] = [&copied_tag, &copied_certificate];
    for make in makers {
        let (a, listener) = (forged(make()), Node::start(way, 2));
        let outcome = a.open(&listener).await;
        assert!(!matches!(outcome, Err(NetError::Unreachable)), "{outcome:?}");
        assert_refused_by_server(&listener, outcome).await;

        let (a, listener) = (Node::start(way, 1), forged(make()));
        let outcome = a.open(&listener).await;
        assert!(matches!(outcome, Err(NetError::Refused(_) | NetError::Protocol)), "{outcome:?}");
        until("the listener learns of it", || listener.metrics.peers_refused.get() == 1).await;
    }
}

async fn assert_refused_by_server(listener: &Node, outcome: Result<Stream, NetError>) {
    if let Ok(mut stream) = outcome {
        let refused = timeout(DEADLINE, stream.receive::<()>()).await.unwrap();
        assert!(matches!(refused, Err(NetError::RefusedByPeer)), "{refused:?}");
    }
    until("the listener counts it", || listener.metrics.peers_refused.get() == 1).await;
}

/// Shows no certificate.
#[derive(Debug)]
struct Nothing;

impl ResolvesClientCert for Nothing {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }
    fn has_certs(&self) -> bool {
        false
    }
}

/// A client that is no agent, with an agent's configuration changed by `change`; says why it was refused.
async fn dial_raw(to: &Node, change: impl FnOnce(&mut rustls::ClientConfig)) {
    let ring = ring(1);
    let tls = Tls::new(ring.clone(), &key(&ring, 1)).unwrap();
    let (mut config, _): (_, Verdict) = tls.client(to.id).unwrap();
    change(&mut config);
    timeout(DEADLINE, async {
        match to.way {
            Way::Quic => dial_quic(to, config).await,
            Way::Tcp => dial_tcp(to, config).await,
        }
    })
    .await
    .unwrap();
}

async fn dial_quic(to: &Node, config: rustls::ClientConfig) {
    let endpoint = quinn::Endpoint::client(loopback(0)).unwrap();
    let config = quic::client(config, &TIMING).unwrap();
    let error = match endpoint.connect_with(config, to.transport.local_addr(), "darter").unwrap().await {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    };
    assert!(error::is_refusal(&error), "{error:?}");
}

async fn dial_tcp(to: &Node, config: rustls::ClientConfig) {
    let stream = tokio::net::TcpStream::connect(to.transport.local_addr()).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let error = match connector.connect("darter".try_into().unwrap(), stream).await {
        Ok(mut stream) => tokio::io::AsyncReadExt::read_u8(&mut stream).await.unwrap_err(),
        Err(error) => error,
    };
    let told = error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
    // Who names no protocol at all is not told why.
    assert!(told || error.kind() == std::io::ErrorKind::UnexpectedEof, "{error:?}");
}

async fn a_client_without_certificate_is_refused(way: Way) {
    let b = Node::start(way, 2);
    dial_raw(&b, |config| config.client_auth_cert_resolver = Arc::new(Nothing)).await;
    until("it is counted", || b.metrics.peers_refused.get() == 1).await;
}

async fn another_version_of_the_protocol_is_refused(way: Way) {
    let b = Node::start(way, 2);
    for protocols in [vec![b"darter/999".to_vec()], vec![]] {
        let before = b.metrics.peers_refused.get();
        dial_raw(&b, |config| config.alpn_protocols = protocols).await;
        // The first packet decides, and the server keeps nothing of it: a repetition of it is counted again.
        until("it is counted", || b.metrics.peers_refused.get() > before).await;
    }
}

#[tokio::test]
async fn sessions_are_not_resumed() {
    // The client offers to resume; the second connection must show its certificate again all the same.
    let b = Node::start(Way::Quic, 2);
    let ring = ring(1);
    let tls = Tls::new(ring.clone(), &key(&ring, 1)).unwrap();
    let (mut config, _) = tls.client(b.id).unwrap();
    config.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let endpoint = quinn::Endpoint::client(loopback(0)).unwrap();
    for _ in 0..2 {
        let config = quic::client(config.clone(), &TIMING).unwrap();
        let connecting = endpoint.connect_with(config, b.transport.local_addr(), "darter").unwrap();
        let connecting = connecting.into_0rtt().err().unwrap();
        let connection = timeout(DEADLINE, connecting).await.unwrap().unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(&[0, 0, 0, 0]).await.unwrap();
        let mut incoming = b.accept().await;
        assert_eq!(incoming.stream.receive().await.unwrap(), Some(()));
        assert_eq!(incoming.peer, key(&ring, 1).id());
        connection.close(0u32.into(), b"");
    }
}
