//! HTTP/2 inside a tunnel: how a connection ends. What requests may be is in the corpus of `tests/system`.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::support::{
    PATIENCE, Registry, Running, Setup, Swarm, TestCa, blob_path, hello, server_name, tls_client, trusting,
};
use crate::proxy::hijack::HijackSettings;

/// A proxy that ends the TLS of `a.example`.
fn hijacking(registry: &Registry, ca: &TestCa) -> Setup {
    let mut setup = Setup::of(registry);
    setup.settings.hijack = Some(HijackSettings { pair: ca.pair.clone(), hosts: vec!["a.example".parse().unwrap()] });
    setup
}

async fn tls(proxy: &Running, ca: &TestCa) -> TlsStream<TcpStream> {
    let (stream, status) = proxy.connect("a.example:443").await;
    assert_eq!(status, 200);
    let mut config = ClientConfig::clone(tls_client(&trusting(&[&ca.pair.certificate])).config());
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let stream = TlsConnector::from(Arc::new(config)).connect(server_name("a.example"), stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    stream
}

type Sender = SendRequest<Empty<Bytes>>;

/// A client, and the end of its connection.
async fn client(proxy: &Running, ca: &TestCa) -> (Sender, JoinHandle<Result<(), hyper::Error>>) {
    let io = TokioIo::new(tls(proxy, ca).await);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    (sender, tokio::spawn(connection))
}

fn get(path: &str) -> http::Request<Empty<Bytes>> {
    http::Request::get(format!("https://a.example{path}")).body(Empty::new()).unwrap()
}

#[tokio::test]
async fn a_stop_lets_answers_finish_and_takes_no_more_requests() {
    let (registry, ca) = (Registry::start(None, hello).await, TestCa::new());
    let (give, given) = mpsc::channel(1);
    let swarm = Swarm::Waits(Mutex::new(Some(given)));
    let mut proxy = Setup { swarm, ..hijacking(&registry, &ca) }.start().await;
    let (mut sender, ended) = client(&proxy, &ca).await;
    give.send(Ok(Bytes::from(vec![1; 500]))).await.unwrap();
    let mut body = sender.send_request(get(&blob_path(1))).await.unwrap().into_body();
    body.frame().await.unwrap().unwrap();
    proxy.stop.cancel();
    // As soon as the client has been told, it sends no more over this connection.
    let refused = async {
        while sender.send_request(get("/v2/")).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, refused).await.unwrap();
    give.send(Ok(Bytes::from(vec![2; 1000]))).await.unwrap();
    assert_eq!(timeout(PATIENCE, body.collect()).await.unwrap().unwrap().to_bytes().len(), 1000);
    timeout(PATIENCE, proxy.task.take().unwrap()).await.unwrap().unwrap();
    timeout(PATIENCE, ended).await.unwrap().unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stop_cuts_what_does_not_finish() {
    let (registry, ca) = (Registry::start(None, hello).await, TestCa::new());
    let (give, given) = mpsc::channel(1);
    let swarm = Swarm::Waits(Mutex::new(Some(given)));
    let mut proxy = Setup { swarm, ..hijacking(&registry, &ca) }.start().await;
    let (mut sender, _ended) = client(&proxy, &ca).await;
    give.send(Ok(Bytes::from(vec![1; 500]))).await.unwrap();
    let answer = sender.send_request(get(&blob_path(1))).await.unwrap();
    proxy.stop.cancel();
    let start = Instant::now();
    proxy.task.take().unwrap().await.unwrap();
    assert!((10..20).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(answer.into_body().collect().await.is_err());
    // Nobody is left who could take it.
    timeout(PATIENCE, give.closed()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn silent_clients_are_let_go() {
    let (registry, ca) = (Registry::start(None, hello).await, TestCa::new());
    let proxy = hijacking(&registry, &ca).start().await;
    let start = Instant::now();
    let mut nothing = tls(&proxy, &ca).await;
    let _ = nothing.read_to_end(&mut Vec::new()).await;
    assert!((10..60).contains(&start.elapsed().as_secs()), "{:?} without a word", start.elapsed());

    let start = Instant::now();
    let (_sender, ended) = client(&proxy, &ca).await;
    let _ = ended.await.unwrap();
    assert!((10..60).contains(&start.elapsed().as_secs()), "{:?} without a request", start.elapsed());

    let (mut sender, ended) = client(&proxy, &ca).await;
    sender.send_request(get(&blob_path(1))).await.unwrap().into_body().collect().await.unwrap();
    let start = Instant::now();
    let _ = ended.await.unwrap();
    assert!((60..120).contains(&start.elapsed().as_secs()), "{:?} after a request", start.elapsed());
}
