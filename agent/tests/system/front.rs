//! What clients see: the registry's own answers, whichever way they ask.

use std::num::NonZeroU64;
use std::time::Instant;

use darter_agent::demo::authority::Authority;
use darter_agent::demo::image::Image;
use darter_agent::demo::registry::{self, Registry};
use futures_util::future::join_all;
use http::{Method, StatusCode};
use serde_json::json;

use crate::stage::{MIB, Plan, Stage, metric, reconfigure};
use crate::wire::{self, Way};

/// Method, path and headers.
type Asked<'a> = (Method, &'a str, Vec<(&'static str, &'a str)>);

/// Statuses, headers and bodies are those that the registry itself gives, before the agent has the blob and after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_registrys() {
    let stage = Stage::start(Plan { agents: 2, layers: vec![3 * MIB + 5], ..Plan::default() }).await;
    let blob = stage.image.layers()[0].clone();
    let (last, end) = (blob.length() - 1, blob.length());
    let path = stage.blob_path(&blob.digest());
    let manifest = stage.manifest_path();
    let by_digest = format!("/v2/{}/manifests/{}", stage.image.repository(), stage.image.manifest_digest());
    let unknown = format!("/v2/{}/blobs/sha256:{}", stage.image.repository(), "0".repeat(64));
    let elsewhere = format!("/v2/else/where/blobs/{}", blob.digest());
    let ranges = [
        "bytes=0-0".to_owned(),
        "bytes=100-199".to_owned(),
        "bytes=262143-262144".to_owned(),
        "bytes=1000000-".to_owned(),
        "bytes=-5".to_owned(),
        format!("bytes={last}-"),
        format!("bytes=0-{last}"),
        format!("bytes=0-{}", end + 1000),
        format!("bytes={end}-"),
        format!("bytes={}-{}", end + 10, end + 20),
        "bytes=0-1,5-6".to_owned(),
    ];
    let mut asked: Vec<Asked<'_>> = vec![
        (Method::HEAD, &path, vec![]),
        (Method::GET, &manifest, vec![]),
        (Method::HEAD, &manifest, vec![]),
        (Method::GET, &by_digest, vec![]),
        (Method::GET, &unknown, vec![]),
        (Method::HEAD, &unknown, vec![]),
        (Method::GET, &elsewhere, vec![]),
        (Method::GET, "/v2/", vec![]),
        (Method::GET, "/v2/demo/app/tags/list", vec![]),
        (Method::POST, "/v2/demo/app/blobs/uploads/", vec![]),
        (Method::DELETE, &manifest, vec![]),
        (Method::GET, "/v2/no/such/manifests/latest", vec![]),
    ];
    asked.extend(ranges.iter().map(|range| (Method::GET, path.as_str(), vec![("range", range.as_str())])));
    asked.push((Method::GET, &path, vec![]));
    for round in ["cold", "warm"] {
        for (method, path, headers) in &asked {
            let case = format!("{round}: {method} {path} {headers:?}");
            let own = wire::send(&stage.direct(), method.clone(), path, headers).await;
            let agents = wire::send(&stage.through(0), method.clone(), path, headers).await;
            assert_eq!(agents.status, own.status, "{case}");
            // The agent words its own refusals of ranges.
            let refused = own.status == StatusCode::RANGE_NOT_SATISFIABLE;
            for (name, value) in own.headers.iter().filter(|(name, _)| *name != "date") {
                let described = ["content-length", "content-type", "docker-distribution-api-version"];
                if refused && described.contains(&name.as_str()) {
                    continue;
                }
                assert_eq!(agents.headers.get(name), Some(value), "{case}: {name} in {:?}", agents.headers);
            }
            let (own, agents) = (own.whole().await, agents.whole().await);
            assert!(refused || own == agents, "{case}: {} bytes instead of {}", agents.len(), own.len());
        }
    }
    // What does not ask for the blob's bytes is no pull; what does is one, and the second agent needs no registry.
    let before = stage.settled().await.blob_bytes();
    assert!(wire::get(&stage.through(1), &path, &[]).await.whole().await == blob.read(0..end));
    assert_eq!(stage.settled().await.blob_bytes(), before);
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_registry_would_take_is_refused_as_it_would() {
    let stage = Stage::start(Plan { agents: 1, layers: vec![MIB], ..Plan::default() }).await;
    let path = stage.blob_path(&stage.image.layers()[0].digest());
    for way in
        [stage.through(0), Way::Absolute { proxy: stage.agent(0).addresses().proxy, to: stage.registry.address() }]
    {
        for digest in ["sha256:abc", "sha256:", "nothing", &format!("sha256:{}", "Z".repeat(64))] {
            let refused = wire::get(&way, &format!("/v2/demo/app/blobs/{digest}"), &[]).await;
            assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{digest}");
            let document: serde_json::Value = serde_json::from_slice(&refused.whole().await).unwrap();
            assert_eq!(document["errors"][0]["code"], "DIGEST_INVALID", "{digest}");
        }
    }
    // As docker-registry does; the RFC would have the whole.
    for range in ["bytes=5-4", "bytes=x-", "items=0-1"] {
        let refused = wire::get(&stage.through(0), &path, &[("range", range)]).await;
        assert_eq!(refused.status, StatusCode::RANGE_NOT_SATISFIABLE, "{range}");
    }
    let long = "x".repeat(64 << 10);
    let refused = wire::get(&stage.through(0), &path, &[("x-long", &long)]).await;
    assert_eq!(refused.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert_eq!(stage.registry.stats().blob_bytes(), 0);
    stage.stop().await;
}

/// A second registry that the agent is told of, and does not hijack.
async fn site(stage: &Stage) -> (Registry, Image, Authority) {
    let host = stage.subnet.registry().to_string();
    let authority = Authority::new("site", &[&host]).unwrap();
    let image = Image::new("other/app", "latest", &[MIB], 99);
    let options = registry::Options {
        listen: (stage.subnet.registry(), 0).into(),
        tls: Some(authority.server(&host).unwrap()),
        ..registry::Options::default()
    };
    (Registry::start(std::slice::from_ref(&image), options).await.unwrap(), image, authority)
}

/// Makes the agents trust the second registry.
async fn introduce(stage: &mut Stage, site: &Registry, authority: &Authority) {
    let ca_file = stage.cluster.directory().join("site.crt");
    std::fs::write(&ca_file, authority.certificate_pem()).unwrap();
    let remote = format!("https://{}", stage.registry.address());
    for at in 0..stage.agents().len() {
        let agent = stage.cluster.agent_mut(at).unwrap();
        agent.stop().await;
        reconfigure(agent, |config| {
            config["registries"][site.address().to_string()] = json!({"ca_file": ca_file});
            config["registry_mirror"] = json!({"remote": remote});
        });
        agent.start().unwrap();
    }
    stage.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_are_blind_and_hijacks_are_not() {
    let mut stage = Stage::start(Plan { agents: 1, layers: vec![MIB], ..Plan::default() }).await;
    let (site, image, authority) = site(&stage).await;
    introduce(&mut stage, &site, &authority).await;
    let proxy = stage.agent(0).addresses().proxy;

    let trusts_site = authority.client().unwrap();
    let own = wire::get(&Way::To(site.address(), Some(trusts_site.clone())), "/v2/", &[]).await;
    let tunnel = Way::Tunnel { proxy, to: site.address(), tls: trusts_site };
    let tunnelled = wire::get(&tunnel, "/v2/", &[]).await;
    assert_eq!(tunnelled.status, StatusCode::OK);
    assert!(own.certificate.is_some() && tunnelled.certificate == own.certificate, "the site's own certificate");
    let layer = &image.layers()[0];
    let path = format!("/v2/other/app/blobs/{}", layer.digest());
    let passed = metric(stage.agent(0), "darter_passed_bytes_total").await;
    assert!(wire::get(&tunnel, &path, &[]).await.whole().await == layer.read(0..layer.length()));
    crate::wait::until("the tunnel's bytes are counted", async || {
        metric(stage.agent(0), "darter_passed_bytes_total").await >= passed + layer.length()
    })
    .await;
    assert_eq!(metric(stage.agent(0), "darter_client_sent_bytes_total").await, 0, "none of it through the swarm");

    let hijacked = wire::get(&stage.through(0), "/v2/", &[]).await;
    let direct = wire::get(&stage.direct(), "/v2/", &[]).await;
    assert_eq!(hijacked.status, StatusCode::OK);
    assert!(hijacked.certificate.is_some() && hijacked.certificate != direct.certificate, "the agent's certificate");

    // Addresses that nobody named: this host's own, the cloud's metadata, the agent's own port.
    let admin = stage.agent(0).addresses().admin.to_string();
    for to in ["127.0.0.1:443", "169.254.169.254:443", "[fd00:ec2::254]:443", "[::1]:443", "10.255.255.1:22", &admin] {
        assert_eq!(wire::tunnel(proxy, to).await.0, StatusCode::FORBIDDEN, "CONNECT {to}");
    }
    site.stop().await;
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_serves_the_registry_that_is_meant() {
    let mut stage = Stage::start(Plan { agents: 2, layers: vec![4 * MIB], ..Plan::default() }).await;
    let (site, other, authority) = site(&stage).await;
    introduce(&mut stage, &site, &authority).await;
    let (main, second) = (stage.registry.address().to_string(), site.address().to_string());
    let layer = stage.image.layers()[0].clone();
    let path = stage.blob_path(&layer.digest());
    for at in 0..2 {
        let mirror = Way::To(stage.agent(at).addresses().proxy, None);
        for ns in [String::new(), format!("?ns={main}"), format!("?ns={}", main.replace(':', "%3A"))] {
            let manifest = wire::get(&mirror, &format!("{}{ns}", stage.manifest_path()), &[]).await;
            assert_eq!(manifest.header("docker-content-digest"), stage.image.manifest_digest().to_string(), "{ns}");
            assert!(manifest.whole().await == stage.image.manifest());
            let blob = wire::get(&mirror, &format!("{path}{ns}"), &[]).await;
            assert_eq!(blob.header("docker-content-digest"), layer.digest().to_string(), "{ns}");
            assert!(blob.whole().await == layer.read(0..layer.length()), "{ns}");
        }
        let theirs = &other.layers()[0];
        let path = format!("/v2/other/app/blobs/{}", theirs.digest());
        let blob = wire::get(&mirror, &format!("{path}?ns={second}"), &[]).await;
        assert!(blob.whole().await == theirs.read(0..theirs.length()));
        assert_eq!(wire::get(&mirror, &path, &[]).await.status, StatusCode::NOT_FOUND, "it is not the mirrored one's");
        let odd = wire::get(&mirror, &format!("{path}?ns=a/b"), &[]).await;
        assert_eq!(odd.status, StatusCode::BAD_REQUEST);
    }
    let sent = &stage.registry.stats().blobs[&layer.digest()];
    assert_eq!(sent.body_bytes, layer.length(), "through the mirror, and once for both agents");
    assert_eq!(site.stats().blobs[&other.layers()[0].digest()].body_bytes, other.layers()[0].length());
    site.stop().await;
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn absolute_form_goes_to_the_swarm() {
    let stage = Stage::start(Plan { agents: 3, layers: vec![MIB, 5 * MIB], tls: false, ..Plan::default() }).await;
    stage.pull_all().await;
    stage.sent_once().await;
    stage.stop().await;
}

/// Row 81: a registry whose certificate nobody vouches for is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_with_an_unknown_certificate_is_refused() {
    let mut stage = Stage::start(Plan { agents: 1, layers: vec![MIB], ..Plan::default() }).await;
    let agent = stage.cluster.agent_mut(0).unwrap();
    agent.stop().await;
    reconfigure(agent, |config| config["registries"] = json!({}));
    agent.start().unwrap();
    stage.ready().await;
    for path in [stage.manifest_path(), stage.blob_path(&stage.image.layers()[0].digest())] {
        let refused = wire::get(&stage.through(0), &path, &[]).await;
        assert!(refused.status.is_server_error(), "{path}: {}", refused.status);
    }
    assert_eq!((stage.registry.stats().manifests, stage.registry.stats().blob_gets()), (0, 0));
    stage.stop().await;
}

/// Row 89: v1 stored a layer before it gave the first byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_byte_comes_long_before_the_last() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(4 * MIB), ..registry::Options::default() };
    let stage = Stage::start(Plan { agents: 2, layers: vec![10 * MIB], registry, ..Plan::default() }).await;
    let layer = stage.image.layers()[0].clone();
    let started = Instant::now();
    let mut reply = wire::get(&stage.through(0), &stage.blob_path(&layer.digest()), &[]).await;
    let first = reply.next().await.unwrap().unwrap();
    let to_first = started.elapsed();
    let sent = stage.registry.stats().blobs[&layer.digest()].body_bytes;
    let rest = reply.whole().await;
    let to_last = started.elapsed();
    assert!([first, rest].concat() == layer.read(0..layer.length()));
    assert!(to_first * 3 < to_last, "the first byte after {to_first:?}, the last after {to_last:?}");
    assert!(sent < layer.length() / 2, "{sent} bytes had left the registry by then");
    stage.stop().await;
}

/// Row 60: one transfer per node, however many clients ask.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_clients_are_one_pull() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(16 * MIB), ..registry::Options::default() };
    let stage = Stage::start(Plan { agents: 2, layers: vec![10 * MIB], registry, ..Plan::default() }).await;
    let layer = stage.image.layers()[0].clone();
    let path = stage.blob_path(&layer.digest());
    let gets = (0..10).map(|_| async { wire::get(&stage.through(0), &path, &[]).await.whole().await });
    for bytes in join_all(gets).await {
        assert!(bytes == layer.read(0..layer.length()));
    }
    let sent = stage.settled().await.blobs[&layer.digest()].clone();
    assert_eq!((sent.body_bytes, sent.repeated_bytes()), (layer.length(), 0));
    assert_eq!(metric(stage.agent(0), "darter_client_sent_bytes_total").await, 10 * layer.length());
    stage.stop().await;
}
