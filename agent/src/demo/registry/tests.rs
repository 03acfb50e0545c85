//! The registry over real sockets, asked by the client of this module's sibling.

#![allow(clippy::unwrap_used, clippy::panic)]

use http::header::{AUTHORIZATION, RANGE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use super::*;
use crate::client::{Client, PullError, Transfer};
use crate::demo::authority::Authority;

/// More than any of these tests takes on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(30);

fn image() -> Image {
    Image::new("demo/app", "latest", &[1000, 300 << 10, 5 << 20], 1)
}

async fn registry(options: Options) -> (Registry, Client, Image) {
    let image = image();
    let registry = Registry::start(std::slice::from_ref(&image), options).await.unwrap();
    let client = Client::direct(registry.address(), None);
    (registry, client, image)
}

async fn ask(client: &Client, method: Method, path: &str, range: Option<&str>) -> Response<Bytes> {
    let mut headers = HeaderMap::new();
    if let Some(range) = range {
        headers.insert(RANGE, HeaderValue::from_str(range).unwrap());
    }
    client.request(method, path, headers).await.unwrap()
}

fn header<'a>(reply: &'a Response<Bytes>, name: &str) -> &'a str {
    reply.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

fn code(reply: &Response<Bytes>) -> String {
    let body: serde_json::Value = serde_json::from_slice(reply.body()).unwrap();
    body["errors"][0]["code"].as_str().unwrap().to_owned()
}

/// Waits until the registry has counted what it sent.
async fn settled(registry: &Registry, bytes: u64) -> Stats {
    let end = Instant::now() + DEADLINE;
    loop {
        let stats = registry.stats();
        if stats.blob_bytes() == bytes || Instant::now() > end {
            return stats;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_pull_over_https_is_counted_to_the_byte() {
    let authority = Authority::new("registry test", &["127.0.0.1"]).unwrap();
    let tls = Some(authority.server("127.0.0.1").unwrap());
    let (registry, client, image) = registry(Options { tls, ..Options::default() }).await;
    let client = Client { tls: Some(authority.client().unwrap()), ..client };
    let transfer = Transfer::default();
    let pulled = client.pull("demo/app", "latest", &transfer).await.unwrap();
    assert_eq!((pulled.digests_checked, pulled.blob_bytes), (4, image.blob_bytes()));
    assert_eq!((transfer.done_bytes(), transfer.expected_bytes()), (image.blob_bytes(), image.blob_bytes()));
    let stats = settled(&registry, image.blob_bytes()).await;
    assert_eq!((stats.blob_bytes(), stats.blob_gets(), stats.manifests), (image.blob_bytes(), 4, 1));
    assert!(stats.blobs.values().all(|blob| blob.repeated_bytes() == 0));
    assert_eq!(stats.blob_cuts(), 0);
    registry.stop().await;
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let authority = Authority::new("registry test", &["127.0.0.1"]).unwrap();
    let tls = Some(authority.server("127.0.0.1").unwrap());
    let (_registry, client, _) = registry(Options { tls, ..Options::default() }).await;
    let stranger = Authority::new("registry test", &["127.0.0.1"]).unwrap();
    let client = Client { tls: Some(stranger.client().unwrap()), ..client };
    let refused = client.pull("demo/app", "latest", &Transfer::default()).await;
    assert!(matches!(refused, Err(PullError::Connect(_))), "{refused:?}");
}

#[tokio::test]
async fn an_authority_vouches_for_its_hosts_only() {
    let authority = Authority::new("registry test", &["127.0.0.9", "example.org"]).unwrap();
    let tls = Some(authority.server("127.0.0.1").unwrap());
    let (_registry, client, _) = registry(Options { tls, ..Options::default() }).await;
    let client = Client { tls: Some(authority.client().unwrap()), ..client };
    let refused = client.pull("demo/app", "latest", &Transfer::default()).await;
    assert!(matches!(refused, Err(PullError::Connect(_))), "{refused:?}");
}

#[tokio::test]
async fn blobs_come_whole_and_in_ranges() {
    let (registry, client, image) = registry(Options::default()).await;
    let blob = &image.layers()[1];
    let (path, length) = (format!("/v2/demo/app/blobs/{}", blob.digest()), blob.length());

    let head = ask(&client, Method::HEAD, &path, Some("bytes=0-1")).await;
    assert_eq!((head.status(), head.body().len()), (StatusCode::OK, 0));
    assert_eq!(header(&head, "content-length"), length.to_string());
    assert_eq!(header(&head, "docker-content-digest"), blob.digest().to_string());
    assert_eq!(header(&head, "accept-ranges"), "bytes");
    assert_eq!(header(&head, "docker-distribution-api-version"), "registry/2.0");

    let whole = ask(&client, Method::GET, &path, None).await;
    assert_eq!((whole.status(), whole.body()), (StatusCode::OK, &blob.read(0..length)));

    let part = ask(&client, Method::GET, &path, Some("bytes=1000-70000")).await;
    assert_eq!((part.status(), part.body()), (StatusCode::PARTIAL_CONTENT, &blob.read(1000..70_001)));
    assert_eq!(header(&part, "content-range"), format!("bytes 1000-70000/{length}"));
    assert_eq!(header(&part, "content-length"), "69001");

    let tail = ask(&client, Method::GET, &path, Some("bytes=-10")).await;
    assert_eq!((tail.status(), tail.body()), (StatusCode::PARTIAL_CONTENT, &blob.read(length - 10..length)));

    let beyond = ask(&client, Method::GET, &path, Some(&format!("bytes={length}-"))).await;
    assert_eq!((beyond.status(), code(&beyond)), (StatusCode::RANGE_NOT_SATISFIABLE, "RANGE_INVALID".to_owned()));
    assert_eq!(header(&beyond, "content-range"), format!("bytes */{length}"));

    let stats = settled(&registry, length + 69_001 + 10).await;
    let counted = &stats.blobs[&blob.digest()];
    assert_eq!((counted.gets, counted.heads, counted.body_bytes), (3, 1, length + 69_001 + 10));
    assert_eq!(counted.served[1], Served { range: 1000..70_001, sent_bytes: 69_001 });
    assert_eq!(counted.repeated_bytes(), 69_001 + 10);
    assert_eq!(counted.times_sent(&(1000..1001)), 2);
}

#[tokio::test]
async fn a_condition_on_another_version_gets_the_whole() {
    let (_registry, client, image) = registry(Options::default()).await;
    let blob = &image.layers()[0];
    let path = format!("/v2/demo/app/blobs/{}", blob.digest());
    for (tag, status) in [(blob.digest().to_string(), StatusCode::PARTIAL_CONTENT), ("x".to_owned(), StatusCode::OK)] {
        let headers = HeaderMap::from_iter([
            (RANGE, HeaderValue::from_static("bytes=0-9")),
            (http::header::IF_RANGE, HeaderValue::from_str(&format!("\"{tag}\"")).unwrap()),
        ]);
        assert_eq!(client.request(Method::GET, &path, headers).await.unwrap().status(), status, "{tag}");
    }
}

#[tokio::test]
async fn manifests_come_by_tag_and_by_digest() {
    let (registry, client, image) = registry(Options::default()).await;
    for reference in ["latest".to_owned(), image.manifest_digest().to_string()] {
        let path = format!("/v2/demo/app/manifests/{reference}");
        let reply = ask(&client, Method::GET, &path, None).await;
        assert_eq!((reply.status(), reply.body()), (StatusCode::OK, image.manifest()));
        assert_eq!(header(&reply, "content-type"), crate::client::MANIFEST_TYPE);
        assert_eq!(header(&reply, "docker-content-digest"), image.manifest_digest().to_string());
        let head = ask(&client, Method::HEAD, &path, None).await;
        assert_eq!(header(&head, "content-length"), image.manifest().len().to_string());
        assert!(head.body().is_empty());
    }
    let tags = ask(&client, Method::GET, "/v2/demo/app/tags/list", None).await;
    assert_eq!(tags.body(), r#"{"name":"demo/app","tags":["latest"]}"#);
    assert_eq!(ask(&client, Method::GET, "/v2/", None).await.status(), StatusCode::OK);
    assert_eq!((registry.stats().manifests, registry.stats().blob_bytes()), (4, 0));
}

#[tokio::test]
async fn what_is_not_there_is_said_as_the_specification_does() {
    let (registry, client, image) = registry(Options::default()).await;
    let layer = image.layers()[0].digest();
    let other = format!("sha256:{}", "0".repeat(64));
    for (method, path, status, expected) in [
        (Method::GET, "/v2/demo/app/manifests/other".to_owned(), 404, "MANIFEST_UNKNOWN"),
        (Method::GET, format!("/v2/demo/app/manifests/{other}"), 404, "MANIFEST_UNKNOWN"),
        (Method::GET, "/v2/demo/app/manifests/sha256:xyz".to_owned(), 400, "DIGEST_INVALID"),
        (Method::GET, format!("/v2/demo/app/blobs/{other}"), 404, "BLOB_UNKNOWN"),
        (Method::GET, "/v2/demo/app/blobs/sha256:xyz".to_owned(), 400, "DIGEST_INVALID"),
        (Method::GET, format!("/v2/other/blobs/{layer}"), 404, "NAME_UNKNOWN"),
        (Method::GET, "/v2/demo/app/other".to_owned(), 404, "NAME_UNKNOWN"),
        (Method::GET, "/other".to_owned(), 404, "NAME_UNKNOWN"),
        (Method::PUT, "/v2/demo/app/manifests/latest".to_owned(), 405, "UNSUPPORTED"),
    ] {
        let reply = ask(&client, method, &path, None).await;
        assert_eq!((reply.status().as_u16(), code(&reply).as_str()), (status, expected), "{path}");
        assert_eq!(header(&reply, "content-type"), "application/json");
    }
    assert_eq!(registry.stats().blob_bytes(), 0);
}

#[tokio::test]
async fn nothing_leaves_without_the_password() {
    let credentials = Credentials { user: "demo".to_owned(), password: "s3cret:".to_owned() };
    let options = Options { credentials: Some(credentials.clone()), ..Options::default() };
    let (registry, client, image) = registry(options).await;
    let blob = format!("/v2/demo/app/blobs/{}", image.layers()[0].digest());
    for path in ["/v2/", "/v2/demo/app/manifests/latest", &blob] {
        let refused = ask(&client, Method::GET, path, None).await;
        assert_eq!((refused.status(), code(&refused)), (StatusCode::UNAUTHORIZED, "UNAUTHORIZED".to_owned()));
        assert_eq!(header(&refused, "www-authenticate"), "Basic realm=\"demo registry\"");
    }
    let wrong = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static("Basic ZGVtbzp4"))]);
    let refused = client.request(Method::GET, &blob, wrong).await.unwrap();
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    assert_eq!((registry.stats().unauthorized, registry.stats().blob_bytes()), (4, 0));
    let client = Client { credentials: Some(credentials), ..client };
    client.pull("demo/app", "latest", &Transfer::default()).await.unwrap();
}

#[tokio::test]
async fn ranges_can_be_refused() {
    let (_registry, client, image) = registry(Options { ranges: false, ..Options::default() }).await;
    let path = format!("/v2/demo/app/blobs/{}", image.layers()[0].digest());
    let reply = ask(&client, Method::GET, &path, Some("bytes=10-19")).await;
    assert_eq!((reply.status(), reply.body().len()), (StatusCode::OK, 1000));
    assert_eq!(header(&reply, "accept-ranges"), "");
}

#[tokio::test]
async fn a_corrupt_blob_has_its_length_and_another_hash() {
    let (registry, client, image) = registry(Options::default()).await;
    let layer = &image.layers()[1];
    registry.corrupt(layer.digest());
    let pulled = client.pull("demo/app", "latest", &Transfer::default()).await;
    let Err(PullError::Mismatch { digest, bytes, got }) = pulled else { panic!("{pulled:?}") };
    assert_eq!((digest, bytes), (layer.digest(), layer.length()));
    assert_ne!(*got, digest);
    // Only the one byte is wrong, and ranges without it are right.
    let path = format!("/v2/demo/app/blobs/{digest}");
    let part = ask(&client, Method::GET, &path, Some("bytes=0-999")).await;
    assert_eq!(part.body(), &layer.read(0..1000));
    registry.heal(&digest);
    client.pull("demo/app", "latest", &Transfer::default()).await.unwrap();
}

#[tokio::test]
async fn a_rate_is_shared_by_all_who_read_the_blob() {
    let rate = NonZeroU64::new(1 << 20);
    let (_registry, client, image) = registry(Options { blob_rate: rate, ..Options::default() }).await;
    let layer = &image.layers()[1];
    let path = format!("/v2/demo/app/blobs/{}", layer.digest());
    let started = Instant::now();
    let (one, other) = tokio::join!(ask(&client, Method::GET, &path, None), ask(&client, Method::GET, &path, None));
    let least = 2.0 * layer.length() as f64 / (1 << 20) as f64;
    assert_eq!((one.body().len(), other.body().len()), (300 << 10, 300 << 10));
    assert!(started.elapsed().as_secs_f64() >= least * 0.99, "{:?}", started.elapsed());
}

#[tokio::test]
async fn answers_can_be_delayed() {
    let delay = Duration::from_millis(80);
    let (_registry, client, _) = registry(Options { delay, ..Options::default() }).await;
    let started = Instant::now();
    ask(&client, Method::GET, "/v2/", None).await;
    assert!(started.elapsed() >= delay);
}

#[tokio::test]
async fn a_client_that_hangs_up_is_charged_with_little_more_than_it_read() {
    let image = Image::new("demo/app", "latest", &[64 << 20], 1);
    let registry = Registry::start(std::slice::from_ref(&image), Options::default()).await.unwrap();
    let digest = image.layers()[0].digest();
    let mut stream = {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 << 10).unwrap();
        socket.connect(registry.address()).await.unwrap()
    };
    let request = format!("GET /v2/demo/app/blobs/{digest} HTTP/1.1\r\nhost: x\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut read = vec![0; 1 << 20];
    stream.read_exact(&mut read).await.unwrap();
    // The registry goes on until the buffers are full; the bound holds from the first moment to the last.
    let bound = (read.len() + (1 << 20)) as u64;
    drop(stream);
    let end = Instant::now() + DEADLINE;
    let mut last = 0;
    let mut same = 0;
    while same < 20 && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(5)).await;
        let sent = registry.stats().blob_bytes();
        same = if sent == last { same + 1 } else { 0 };
        last = sent;
    }
    assert_eq!(registry.stats().blob_cuts(), 1);
    let sent = registry.stats().blobs[&digest].served[0].clone();
    assert_eq!(sent.range, 0..64 << 20);
    assert!((900_000..bound).contains(&sent.sent_bytes), "{}", sent.sent_bytes);
}

#[tokio::test]
async fn a_stopped_registry_is_gone() {
    let (registry, client, _) = registry(Options::default()).await;
    registry.stop().await;
    let refused = client.pull("demo/app", "latest", &Transfer::default()).await;
    assert!(matches!(refused, Err(PullError::Connect(_))), "{refused:?}");
}

#[tokio::test]
async fn an_address_in_use_is_an_error() {
    let (registry, ..) = registry(Options::default()).await;
    let options = Options { listen: registry.address(), ..Options::default() };
    assert!(matches!(Registry::start(&[], options).await, Err(RegistryError::Listen { .. })));
}
