//! A node of Wikimedia's after `darter config import`: Dragonfly v1's file decides what goes through the swarm.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use darter_agent::demo::authority::Authority;
use darter_agent::demo::image::Image;
use darter_agent::demo::registry::{self, Registry};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::stage::{MIB, Plan, Stage, metric, program, reconfigure};
use crate::wait;

/// GET as docker does it there: TLS to the proxy, CONNECT, TLS to the registry.
async fn get(
    stage: &Stage,
    at: usize,
    tls: &Arc<ClientConfig>,
    registry: &Registry,
    path: &str,
) -> (StatusCode, Bytes) {
    let (proxy, to) = (stage.agent(at).addresses().proxy, registry.address());
    let tls = TlsConnector::from(tls.clone());
    let stream = TcpStream::connect(proxy).await.unwrap();
    let mut stream = tls.connect(ServerName::IpAddress(proxy.ip().into()), stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]), "Go sends CONNECT as HTTP/1.1");
    stream.write_all(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", head.escape_ascii());
    let stream = tls.connect(ServerName::IpAddress(to.ip().into()), stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, TokioIo::new(stream)).await.unwrap();
    let exchange = async {
        let request = Request::get(format!("https://{to}{path}")).body(Empty::<Bytes>::new()).unwrap();
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        (head.status, body.collect().await.unwrap().to_bytes())
    };
    let exchange = async {
        tokio::select! {
            answer = exchange => answer,
            ended = connection => panic!("{ended:?}"),
        }
    };
    tokio::time::timeout(wait::PATIENCE, exchange).await.expect("an answer")
}

/// Rows 82 and 86, and a file whose supernodes are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_images_go_through_the_swarm_and_nothing_else_does() {
    let mut stage = Stage::start(Plan { agents: 2, layers: vec![MIB], ..Plan::default() }).await;
    let host = stage.subnet.registry().to_string();
    let authority = Authority::new("wikimedia", &[&host]).unwrap();
    let names =
        ["wikimedia/mediawiki", "restricted/mediawiki-multiversion", "wikimedia/mediawiki-services-parsoid", "python3"];
    let images: Vec<_> =
        names.iter().zip(20..).map(|(name, seed)| Image::new(name, "1", &[MIB + seed], seed)).collect();
    let options = registry::Options {
        listen: (stage.subnet.registry(), 0).into(),
        tls: Some(authority.server(&host).unwrap()),
        ..registry::Options::default()
    };
    let registry = Registry::start(&images, options).await.unwrap();

    // One certificate for the proxy itself and for the registry's name.
    let folder = stage.cluster.directory().to_owned();
    let proxies = stage.agents().iter().map(|agent| agent.addresses().proxy.ip().to_string());
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(proxies.chain([host]).collect::<Vec<_>>()).unwrap().self_signed(&key).unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path.display().to_string()
    };
    let cert = file("dfdaemon.crt", &certificate.pem());
    let key = file("dfdaemon.key", &key.serialize_pem());
    let ca = file("wikimedia-ca.crt", authority.certificate_pem());
    let to = registry.address();
    let old = file(
        "dfdaemon.yml",
        &format!(
            r#"registry_mirror:
  remote: "https://{to}"
hostIp: 0.0.0.0
port: 65001
certpem: "{cert}"
keypem: "{key}"
proxies:
  - regx: "wikimedia/mediawiki/blobs/sha256.*"
    use_https: true
  - regx: "restricted/mediawiki-multiversion/blobs/sha256.*"
    use_https: true
hijack_https:
  cert: "{cert}"
  key: "{key}"
  hosts:
    - regx: "{to}"
      certs: ["{ca}"]
dfget_flags: ["--home", "/var/lib/dragonfly-dfdaemon/dfget", "--ip", "0.0.0.0", "--port", "15001"]
ratelimit: 100M
supernodes: ["dragonfly1001.eqiad.wmnet"]
"#
        ),
    );
    let imported = folder.join("imported.yaml");
    let import = Command::new(program()).args(["config", "import", &old, "--output"]).arg(&imported).output().unwrap();
    assert!(import.status.success(), "{}", String::from_utf8_lossy(&import.stderr));
    let imported: Value = serde_saphyr::from_str(&fs::read_to_string(imported).unwrap()).unwrap();
    for at in 0..2 {
        let agent = stage.cluster.agent_mut(at).unwrap();
        agent.stop().await;
        reconfigure(agent, |config| {
            for section in ["rules", "hijack", "registries", "registry_mirror"] {
                assert!(!imported[section].is_null(), "{imported}");
                config[section] = imported[section].clone();
            }
            // Ports and addresses are the test's.
            config["proxy"]["tls"] = imported["proxy"]["tls"].clone();
            assert_eq!(config["proxy"]["tls"], json!({"cert": cert, "key": key}));
        });
        agent.start().unwrap();
    }
    stage.ready().await;

    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut tls = tls.with_root_certificates(roots).with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let tls = Arc::new(tls);
    for (image, through_swarm) in images.iter().zip([true, true, false, false]) {
        let layer = &image.layers()[0];
        for at in 0..2 {
            let before = metric(stage.agent(at), "darter_client_sent_bytes_total").await;
            let (repository, digest) = (image.repository(), layer.digest());
            let manifest = get(&stage, at, &tls, &registry, &format!("/v2/{repository}/manifests/1")).await;
            assert!(manifest.0 == StatusCode::OK && manifest.1 == image.manifest());
            let blob = get(&stage, at, &tls, &registry, &format!("/v2/{repository}/blobs/{digest}")).await;
            assert!(blob.0 == StatusCode::OK && blob.1 == layer.read(0..layer.length()), "{repository}");
            let sent = metric(stage.agent(at), "darter_client_sent_bytes_total").await - before;
            assert_eq!(sent, if through_swarm { layer.length() } else { 0 }, "{repository}");
        }
        let sent = registry.stats().blobs[&layer.digest()].body_bytes;
        assert_eq!(sent, layer.length() * if through_swarm { 1 } else { 2 }, "{}", image.repository());
    }
    registry.stop().await;
    stage.stop().await;
}
