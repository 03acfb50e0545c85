//! The ways to a registry: through a tunnel, through a plain proxy, and what happens where there is none.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Mutex;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::demo::authority::Authority;
use crate::demo::image::Image;
use crate::demo::registry::{Options, Registry};

/// A proxy that opens tunnels to anywhere, or answers everything with one status, and remembers the request lines.
struct Proxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    _task: AbortOnDropHandle<()>,
}

impl Proxy {
    async fn start(refusal: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            let mut tunnels = tokio::task::JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tunnels.spawn(tunnel(client, refusal, Arc::clone(&notes)));
            }
        });
        Self { address, asked, _task: AbortOnDropHandle::new(task) }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn tunnel(client: TcpStream, refusal: Option<&'static str>, asked: Arc<Mutex<Vec<String>>>) {
    let mut client = BufReader::new(client);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(client.read_line(&mut head).await.unwrap(), 0, "the client left: {head}");
    }
    let line = head.lines().next().unwrap().to_owned();
    let target = line.split(' ').nth(1).unwrap().to_owned();
    asked.lock().unwrap().push(line);
    if let Some(refusal) = refusal {
        let answer = format!("HTTP/1.1 {refusal}\r\ncontent-length: 0\r\n\r\n");
        client.write_all(answer.as_bytes()).await.unwrap();
        return;
    }
    let mut registry = TcpStream::connect(target).await.unwrap();
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    // Whoever hangs up first ends it.
    let _ = tokio::io::copy_bidirectional(&mut client, &mut registry).await;
}

#[tokio::test]
async fn a_pull_goes_through_the_tunnel_and_ends_at_the_registry() {
    let image = Image::demo(1 << 20);
    let authority = Authority::new("registry test", &["127.0.0.1"]).unwrap();
    let tls = Some(authority.server("127.0.0.1").unwrap());
    let registry = Registry::start(std::slice::from_ref(&image), Options { tls, ..Options::default() }).await.unwrap();
    let proxy = Proxy::start(None).await;
    let client = Client::direct(registry.address(), Some(authority.client().unwrap())).through(proxy.address);
    let pulled = client.pull("demo/app", "latest", &Transfer::default()).await.unwrap();
    assert_eq!((pulled.digests_checked, pulled.blob_bytes), (6, image.blob_bytes()));
    // The manifest, the configuration and five layers, each on a connection of its own.
    assert_eq!(proxy.asked(), vec![format!("CONNECT {} HTTP/1.1", registry.address()); 7]);
}

#[tokio::test]
async fn a_refused_tunnel_is_told_with_its_status() {
    let authority = Authority::new("registry test", &["127.0.0.1"]).unwrap();
    let proxy = Proxy::start(Some("403 Forbidden")).await;
    let registry = SocketAddr::from(([127, 0, 0, 1], 9));
    let client = Client::direct(registry, Some(authority.client().unwrap())).through(proxy.address);
    let refused = client.pull("demo/app", "latest", &Transfer::default()).await;
    let Err(PullError::Connect(ConnectError::Refused { to, status })) = refused else { panic!("{refused:?}") };
    assert_eq!((to.as_str(), status), ("127.0.0.1:9", StatusCode::FORBIDDEN));
}

#[tokio::test]
async fn without_tls_a_proxy_gets_the_whole_address() {
    let proxy = Proxy::start(Some("502 Bad Gateway")).await;
    let client = Client { host: "registry.test".to_owned(), port: 5000, tls: None, proxy: None, credentials: None };
    let refused = client.through(proxy.address).pull("demo/app", "latest", &Transfer::default()).await;
    assert!(matches!(&refused, Err(PullError::Status { status: StatusCode::BAD_GATEWAY, .. })), "{refused:?}");
    assert_eq!(proxy.asked(), ["GET http://registry.test:5000/v2/demo/app/manifests/latest HTTP/1.1"]);
}

#[tokio::test]
async fn a_body_that_is_cut_fails_the_pull() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::direct(listener.local_addr().unwrap(), None);
    let cut = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 1024];
        assert_ne!(stream.read(&mut head).await.unwrap(), 0);
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort").await.unwrap();
    };
    let (pulled, ()) = tokio::join!(client.request(Method::GET, "/v2/", HeaderMap::new()), cut);
    assert!(matches!(pulled, Err(PullError::Broken { .. })), "{pulled:?}");
}

#[tokio::test]
async fn nobody_there_is_an_error_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let pulled = Client::direct(address, None).pull("demo/app", "latest", &Transfer::default()).await;
    assert!(matches!(pulled, Err(PullError::Connect(ConnectError::Tcp { .. }))), "{pulled:?}");
}
