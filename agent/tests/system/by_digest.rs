//! Manifests by digest come from the swarm, and only to those whom the registry would give them.

use darter_agent::client::Credentials;
use darter_agent::demo::registry;
use http::StatusCode;

use crate::stage::{MIB, Plan, Stage};
use crate::wire;

fn credentials(password: &str) -> Credentials {
    Credentials { user: "puller".to_owned(), password: password.to_owned() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_leaves_the_registry_once_and_reaches_whom_it_lets_in() {
    const AGENTS: usize = 3;
    let registry = registry::Options { credentials: Some(credentials("right")), ..registry::Options::default() };
    let stage = Stage::start(Plan { agents: AGENTS, layers: vec![MIB], registry, ..Plan::default() }).await;
    let digest = stage.image.manifest_digest();
    let path = format!("/v2/{}/manifests/{digest}", stage.image.repository());
    let (right, wrong) = (credentials("right").authorization(), credentials("wrong").authorization());
    let allowed = [("authorization", right.as_str())];
    let direct = wire::get(&stage.direct(), &path, &allowed).await;
    let said = ["content-type", "docker-content-digest"].map(|name| direct.header(name).to_owned());
    assert!(direct.whole().await == stage.image.manifest()[..]);
    let before = stage.registry.stats();

    for round in 0..2 {
        for at in 0..AGENTS {
            let reply = wire::get(&stage.through(at), &path, &allowed).await;
            assert_eq!(reply.status, StatusCode::OK, "{round} {at}");
            assert_eq!(["content-type", "docker-content-digest"].map(|name| reply.header(name).to_owned()), said);
            assert!(reply.whole().await == stage.image.manifest()[..], "{round} {at}");
            // It is in the cache now, and that says nothing about others.
            for refused in [&[][..], &[("authorization", wrong.as_str())]] {
                let reply = wire::get(&stage.through(at), &path, refused).await;
                assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{round} {at}");
                assert!(reply.header("www-authenticate").starts_with("Basic "), "{:?}", reply.headers);
                let ended = reply.end().await;
                assert!(ended.bytes.len() < 1000 && !ended.bytes.windows(8).any(|part| part == b"\"layers\""));
            }
            // Nor about other repositories.
            let elsewhere = format!("/v2/another/place/manifests/{digest}");
            let reply = wire::get(&stage.through(at), &elsewhere, &allowed).await;
            assert_eq!(reply.status, StatusCode::NOT_FOUND, "{round} {at}");
        }
    }
    // Each agent asked once whether its client may have it, and one of them fetched it.
    let after = stage.settled().await;
    assert_eq!(after.manifests - before.manifests, AGENTS as u64 + 1);

    // Who was told with HEAD what the tag means is not asked about it once more.
    let before = stage.settled().await;
    let other = [("authorization", right.as_str()), ("accept", "*/*")];
    for at in 0..AGENTS {
        let told = wire::send(&stage.through(at), http::Method::HEAD, &stage.manifest_path(), &other).await;
        assert_eq!(told.header("docker-content-digest"), digest.to_string());
        told.end().await;
        let reply = wire::get(&stage.through(at), &path, &other).await;
        assert!(reply.whole().await == stage.image.manifest()[..], "{at}");
    }
    assert_eq!(stage.settled().await.manifests - before.manifests, AGENTS as u64, "HEADs alone");

    // It speaks for its blobs, wherever it came from.
    let blob = stage.image.layers()[0].clone();
    for at in 0..AGENTS {
        let reply = wire::get(&stage.through(at), &stage.blob_path(&blob.digest()), &allowed).await;
        assert!(reply.whole().await == blob.read(0..blob.length()), "{at}");
    }
    assert_eq!(stage.settled().await.blob_heads(), 0);
    stage.stop().await;
}
