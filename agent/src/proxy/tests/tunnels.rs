//! CONNECT: blind tunnels, TLS that ends here, and where clients may not go.

use http_body_util::BodyExt;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::support::{
    PATIENCE, Registry, Running, Setup, TestCa, blob_path, exchange, hello, request, server_name, tls_client, trusting,
};
use crate::proxy::hijack::HijackSettings;
use crate::proxy::tls::PemPair;

fn certificate(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

/// TLS through a tunnel, as a client that trusts `ca` and asks for `name`.
async fn through(proxy: &Running, to: &str, name: &str, ca: &[u8]) -> std::io::Result<TlsStream<TcpStream>> {
    let (stream, status) = proxy.connect(to).await;
    assert_eq!(status, 200, "{to}");
    timeout(PATIENCE, tls_client(&trusting(&[ca])).connect(server_name(name), stream)).await.unwrap()
}

fn hijack(pair: &PemPair, hosts: &[&str]) -> Option<HijackSettings> {
    Some(HijackSettings { pair: pair.clone(), hosts: hosts.iter().map(|host| host.parse().unwrap()).collect() })
}

#[tokio::test]
async fn a_tunnel_shows_the_origins_own_certificate() {
    let ca = TestCa::new();
    let own = ca.certificate(&["registry.example"]);
    let registry = Registry::start(Some(&own), hello).await;
    let mut setup = Setup::of(&registry);
    setup.settings.hijack = hijack(&TestCa::new().pair, &["other.example", "registry.example:5000"]);
    let proxy = setup.start().await;
    let stream = through(&proxy, "registry.example:443", "registry.example", &ca.pair.certificate).await.unwrap();
    let answer = exchange(stream, request("GET", &blob_path(1), &[])).await.unwrap();
    assert_eq!(&answer.into_body().collect().await.unwrap().to_bytes()[..], b"from the registry");
    assert_eq!(proxy.opened(), 0);
    assert!(proxy.metrics.passed_bytes.get() > 17);
}

#[tokio::test]
async fn each_end_of_a_tunnel_closes_as_the_other_does() {
    let registry = Registry::start(None, hello).await;
    let far = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::of(&registry);
    setup.origin.hosts.insert("far.example:443".into(), far.local_addr().unwrap());
    let proxy = setup.start().await;
    let (mut near, status) = proxy.connect("far.example:443").await;
    assert_eq!(status, 200);
    let (mut far, _) = far.accept().await.unwrap();
    near.write_all(b"ping").await.unwrap();
    near.shutdown().await.unwrap();
    let mut heard = Vec::new();
    timeout(PATIENCE, far.read_to_end(&mut heard)).await.unwrap().unwrap();
    assert_eq!(heard, b"ping", "the far end sees the end and can still answer");
    far.write_all(b"pong!").await.unwrap();
    drop(far);
    heard.clear();
    timeout(PATIENCE, near.read_to_end(&mut heard)).await.unwrap().unwrap();
    assert_eq!((&heard[..], proxy.metrics.passed_bytes.get()), (&b"pong!"[..], 5));
}

// S31.
#[tokio::test]
async fn tunnels_lead_only_where_they_may() {
    let registry = Registry::start(None, hello).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let setup = |listen| {
        let mut setup = Setup::of(&registry);
        setup.listen = listen;
        setup.settings.registries = vec!["named.example:5000".parse().unwrap(), "plain.example".parse().unwrap()];
        for host in
            ["named.example:5000", "named.example:443", "plain.example:443", "plain.example:22", "any.example:443"]
        {
            setup.origin.hosts.insert(host.into(), registry.address);
        }
        setup.origin.hosts.insert("dead.example:443".into(), closed);
        setup
    };
    let local = setup("127.0.0.1:0").start().await;
    let everywhere = setup("0.0.0.0:0").start().await;
    for (to, on_loopback, elsewhere) in [
        ("named.example:5000", 200, 200),
        ("plain.example:443", 200, 200),
        ("any.example:443", 200, 403),
        ("named.example:443", 200, 403),
        ("plain.example:22", 403, 403),
        ("any.example:22", 403, 403),
        ("dead.example:443", 503, 403),
        ("filtered.example:443", 403, 403),
        ("registry.example:80", 200, 200),
        ("any.example:0", 400, 400),
        ("u@any.example:443", 400, 400),
    ] {
        assert_eq!(local.connect(to).await.1, on_loopback, "{to} on loopback");
        assert_eq!(everywhere.connect(to).await.1, elsewhere, "{to} elsewhere");
    }
    for (url, on_loopback, elsewhere) in [
        ("http://registry.example/", 200, 200),
        ("http://named.example:5000/", 200, 200),
        ("http://plain.example:22/", 200, 403),
        ("http://any.example:443/", 200, 403),
        ("/v2/?ns=any.example", 502, 403),
    ] {
        assert_eq!(local.get(url, &[]).await.0.status, on_loopback, "{url} on loopback");
        assert_eq!(everywhere.get(url, &[]).await.0.status, elsewhere, "{url} elsewhere");
    }
}

#[tokio::test]
async fn a_hijacked_host_is_served_with_the_operators_certificate() {
    let (ca, real) = (TestCa::new(), TestCa::new());
    let registry = Registry::start(Some(&real.certificate(&["registry.example"])), hello).await;
    let mut setup = Setup::of(&registry);
    setup.settings.hijack = hijack(&ca.certificate(&["registry.example"]), &["registry.example"]);
    setup.origin.roots = trusting(&[&real.pair.certificate]);
    let proxy = setup.start().await;
    for (path, length) in [(blob_path(1), 1500), ("/v2/".into(), "from the registry".len())] {
        let stream = through(&proxy, "registry.example:443", "registry.example", &ca.pair.certificate).await.unwrap();
        let answer = exchange(stream, request("GET", &path, &[("host", "registry.example")])).await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes().len(), length, "{path}");
    }
    assert_eq!(registry.one().headers["host"], "registry.example");
    assert_eq!(proxy.authorize.asked.lock().unwrap()[0].1, format!("https://registry.example{}", blob_path(1)));
}

#[tokio::test]
async fn a_ca_mints_a_leaf_for_every_host_once() {
    let ca = TestCa::new();
    let registry = Registry::start(None, hello).await;
    let mut setup = Setup::of(&registry);
    setup.settings.hijack = hijack(&ca.pair, &["*.example", "127.0.0.7"]);
    let proxy = setup.start().await;
    let mut leaves = Vec::new();
    for host in ["a.example", "b.example", "a.example", "127.0.0.7"] {
        let stream = through(&proxy, &format!("{host}:443"), host, &ca.pair.certificate).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), None, "this client offered none");
        leaves.push(certificate(&stream));
    }
    assert!(leaves[0] != leaves[1] && leaves[0] == leaves[2] && leaves[3] != leaves[0]);
    assert!(through(&proxy, "a.example:443", "a.example", &TestCa::new().pair.certificate).await.is_err());
}

// S31: a tunnel leads to one host, whatever is said inside.
#[tokio::test]
async fn a_hijacked_tunnel_is_for_its_host_alone() {
    let ca = TestCa::new();
    let registry = Registry::start(None, hello).await;
    let mut setup = Setup::of(&registry);
    setup.settings.hijack = hijack(&ca.pair, &["*.example"]);
    let proxy = setup.start().await;
    let inside = async |method: &str, uri: &str, headers: &[(&str, &str)]| {
        let stream = through(&proxy, "a.example:443", "a.example", &ca.pair.certificate).await.unwrap();
        exchange(stream, request(method, uri, headers)).await.unwrap().status().as_u16()
    };
    assert!(through(&proxy, "a.example:443", "b.example", &ca.pair.certificate).await.is_err(), "another name");
    for (uri, host, status) in [
        (blob_path(1), "a.example", 200),
        (blob_path(1), "A.example:443", 200),
        (format!("https://a.example{}", blob_path(1)), "a.example", 200),
        (blob_path(1), "b.example", 421),
        (blob_path(1), "a.example:444", 421),
        (format!("https://b.example{}", blob_path(1)), "a.example", 421),
        (format!("http://a.example{}", blob_path(1)), "a.example", 421),
    ] {
        assert_eq!(inside("GET", &uri, &[("host", host)]).await, status, "{uri} {host}");
    }
    assert_eq!(inside("GET", "/", &[("host", "a.example"), ("host", "b.example")]).await, 400, "two hosts");
    assert_eq!(inside("CONNECT", "a.example:443", &[("host", "a.example")]).await, 400, "a tunnel inside");
    assert!(registry.take().is_empty());
}
