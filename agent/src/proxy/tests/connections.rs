//! Connections: limits, patience, TLS on the listener, and how it all ends.

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::support::{
    PATIENCE, Registry, Setup, Swarm, TestCa, blob_path, exchange, hello, request, server_name, tls_client, trusting,
};
use crate::proxy::ProxyError;

/// Sends bytes as they are and reads until the proxy closes.
async fn raw(stream: &mut TcpStream, bytes: &[u8]) -> String {
    stream.write_all(bytes).await.unwrap();
    let mut heard = Vec::new();
    // A reset counts as an end; what came before it is what matters.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut heard)).await.unwrap();
    String::from_utf8_lossy(&heard).into_owned()
}

// S26, S29.
#[tokio::test]
async fn oversized_and_ambiguous_requests_are_refused() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup::of(&registry).start().await;
    for (headers, status) in [
        (format!("x: {}\r\n", "a".repeat(33 * 1024)), "431"),
        ("x: y\r\n".repeat(101), "431"),
        ("content-length: 1\r\ncontent-length: 2\r\n".into(), "400"),
        ("a: b\r\n folded\r\n".into(), "400"),
        ("no colon\r\n".into(), "400"),
    ] {
        let request = format!("GET /v2/ HTTP/1.1\r\nhost: h\r\n{headers}\r\n");
        let answer = raw(&mut proxy.dial().await, request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status} {answer}");
    }
    let chunked = b"POST /v2/ HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    assert!(raw(&mut proxy.dial().await, chunked).await.contains(" 400 "));
    assert!(registry.take().is_empty());
}

#[tokio::test(start_paused = true)]
async fn silent_clients_are_let_go() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup::of(&registry).start().await;
    let start = Instant::now();
    let mut silent = proxy.dial().await;
    let mut heard = Vec::new();
    silent.read_to_end(&mut heard).await.unwrap();
    assert!((10..60).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());

    let mut idle = proxy.dial().await;
    idle.write_all(b"GET /v2/a/blobs/x HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
    let start = Instant::now();
    idle.read_to_end(&mut heard).await.unwrap();
    assert!((60..120).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(heard.starts_with(b"HTTP/1.1 400 "));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_in_its_request_is_given_up() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup::of(&registry).start().await;
    let mut stops = proxy.dial().await;
    let (start, authority) = (Instant::now(), "registry.example");
    let head = format!(
        "POST http://{authority}/v2/a/blobs/uploads/ HTTP/1.1\r\nhost: {authority}\r\ncontent-length: 10\r\n\r\n12345"
    );
    stops.write_all(head.as_bytes()).await.unwrap();
    let mut heard = Vec::new();
    stops.read_to_end(&mut heard).await.unwrap();
    assert!((60..120).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(heard.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&heard));
}

#[tokio::test]
async fn a_tls_listener_speaks_nothing_else() {
    let ca = TestCa::new();
    let registry = Registry::start(None, hello).await;
    let mut setup = Setup::of(&registry);
    setup.settings.tls = Some(ca.certificate(&["localhost"]));
    let proxy = setup.start().await;
    let answer = raw(&mut proxy.dial().await, b"GET /v2/ HTTP/1.1\r\nhost: h\r\n\r\n").await;
    assert!(!answer.starts_with("HTTP/"), "{answer}");
    assert!(registry.take().is_empty());
    let tls = tls_client(&trusting(&[&ca.pair.certificate]));
    let stream = tls.connect(server_name("localhost"), proxy.dial().await).await.unwrap();
    let answer = exchange(stream, request("GET", &blob_path(1), &[])).await.unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes().len(), 1500);
}

#[tokio::test]
async fn a_key_of_another_certificate_is_refused_at_start() {
    let ca = TestCa::new();
    let mut pair = ca.certificate(&["localhost"]);
    pair.key = ca.certificate(&["localhost"]).key;
    let registry = Registry::start(None, hello).await;
    let setup = Setup::of(&registry);
    let settings = crate::proxy::Settings { tls: Some(pair), ..setup.settings.clone() };
    let running = setup.start().await;
    let origin = std::sync::Arc::new(Setup::of(&registry).origin);
    let made = crate::proxy::Proxy::new(
        &settings,
        origin,
        running.authorize.clone(),
        running.blobs.clone(),
        running.metrics.clone(),
    );
    assert!(matches!(made, Err(ProxyError::Tls(_))));
}

#[tokio::test]
async fn a_stop_lets_answers_finish_and_takes_no_new_clients() {
    let registry = Registry::start(None, hello).await;
    let (give, given) = mpsc::channel(1);
    let mut proxy = Setup { swarm: Swarm::Waits(Mutex::new(Some(given))), ..Setup::of(&registry) }.start().await;
    give.send(Ok(Bytes::from(vec![1; 500]))).await.unwrap();
    let mut body = proxy.send(request("GET", &blob_path(1), &[])).await.into_body();
    body.frame().await.unwrap().unwrap();
    proxy.stop.cancel();
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(proxy.address).await.is_ok() {
        assert!(Instant::now() < deadline, "the listener is still open");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    give.send(Ok(Bytes::from(vec![2; 1000]))).await.unwrap();
    assert_eq!(timeout(PATIENCE, body.collect()).await.unwrap().unwrap().to_bytes().len(), 1000);
    timeout(PATIENCE, proxy.task.take().unwrap()).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stop_cuts_what_does_not_finish() {
    let registry = Registry::start(None, hello).await;
    let (give, given) = mpsc::channel(1);
    let mut proxy = Setup { swarm: Swarm::Waits(Mutex::new(Some(given))), ..Setup::of(&registry) }.start().await;
    give.send(Ok(Bytes::from(vec![1; 500]))).await.unwrap();
    let answer = proxy.send(request("GET", &blob_path(1), &[])).await;
    proxy.stop.cancel();
    let start = Instant::now();
    proxy.task.take().unwrap().await.unwrap();
    assert!((10..20).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(answer.into_body().collect().await.is_err());
}
