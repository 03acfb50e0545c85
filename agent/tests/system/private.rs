//! A cached private blob stays private (D8).

use darter_agent::client::Credentials;
use darter_agent::demo::registry;
use http::{Method, StatusCode};
use serde_json::json;

use crate::stage::{MIB, Plan, Stage, metric};
use crate::wire::{self, Way};

fn credentials(password: &str) -> Credentials {
    Credentials { user: "puller".to_owned(), password: password.to_owned() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_byte_without_the_registrys_leave() {
    let registry = registry::Options { credentials: Some(credentials("right")), ..registry::Options::default() };
    let plan = Plan {
        agents: 2,
        layers: vec![MIB + 1, 6 * MIB],
        registry,
        overrides: |registry| json!({"registry_mirror": {"remote": format!("https://{registry}")}}),
        ..Plan::default()
    };
    let stage = Stage::start(plan).await;
    stage.pull_all().await;
    let before = stage.settled().await;
    let blob = stage.image.layers()[1].clone();
    let path = stage.blob_path(&blob.digest());
    let (right, wrong) = (credentials("right").authorization(), credentials("wrong").authorization());
    let mut given = Vec::new();
    for at in 0..2 {
        given.push(metric(stage.agent(at), "darter_client_sent_bytes_total").await);
    }

    let mirror = |at: usize| Way::To(stage.agent(at).addresses().proxy, None);
    let ways = [(0, stage.through(0)), (1, stage.through(1)), (0, mirror(0)), (1, mirror(1))];
    for (at, way) in &ways {
        for refused in [&[][..], &[("authorization", wrong.as_str())]] {
            for range in [None, Some("bytes=0-99"), Some("bytes=6291455-")] {
                let mut headers = refused.to_vec();
                headers.extend(range.map(|range| ("range", range)));
                let reply = wire::get(way, &path, &headers).await;
                assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{at} {headers:?}");
                assert!(reply.header("www-authenticate").starts_with("Basic "), "{at} {:?}", reply.headers);
                let ended = reply.end().await;
                assert!(ended.bytes.len() < 1000 && !contains(&blob.read(0..100), &ended.bytes), "{at} {headers:?}");
            }
            let head = wire::send(way, Method::HEAD, &path, refused).await;
            assert_eq!(head.status, StatusCode::UNAUTHORIZED);
            assert!(head.header("www-authenticate").starts_with("Basic "), "{:?}", head.headers);
            // The manifest is the registry's to give.
            let manifest = wire::get(way, &stage.manifest_path(), refused).await;
            assert_eq!(manifest.status, StatusCode::UNAUTHORIZED);
            assert!(manifest.header("www-authenticate").starts_with("Basic "));
        }
    }
    for (at, before) in given.iter().enumerate() {
        let now = metric(stage.agent(at), "darter_client_sent_bytes_total").await;
        assert_eq!(now, *before, "{} gave blob bytes away", stage.agent(at).name());
    }

    // Whom the registry lets in gets them, from the cache.
    for (at, way) in &ways {
        let allowed = [("authorization", right.as_str())];
        let whole = wire::get(way, &path, &allowed).await;
        assert_eq!(whole.status, StatusCode::OK, "{at}");
        assert!(whole.whole().await == blob.read(0..blob.length()), "{at}");
        let part = wire::get(way, &path, &[allowed[0], ("range", "bytes=100000-2000000")]).await;
        assert_eq!(part.status, StatusCode::PARTIAL_CONTENT);
        assert!(part.whole().await == blob.read(100_000..2_000_001), "{at}");
        let head = wire::send(way, Method::HEAD, &path, &allowed).await;
        assert_eq!((head.status, head.header("content-length")), (StatusCode::OK, "6291456"));
    }
    assert_eq!(stage.settled().await.blob_bytes(), before.blob_bytes(), "all that came out of the caches");
    stage.stop().await;
}

/// A yes is for one repository and one credential.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_client_may_have_says_nothing_about_the_next() {
    let registry = registry::Options { credentials: Some(credentials("right")), ..registry::Options::default() };
    let stage = Stage::start(Plan { agents: 1, layers: vec![2 * MIB], registry, ..Plan::default() }).await;
    stage.pull([0]).await;
    let digest = stage.image.layers()[0].digest();
    let right = credentials("right").authorization();
    // Another repository of the same registry does not have the blob, whoever asks.
    let elsewhere = format!("/v2/another/place/blobs/{digest}");
    let direct = wire::get(&stage.direct(), &elsewhere, &[("authorization", &right)]).await;
    let through = wire::get(&stage.through(0), &elsewhere, &[("authorization", &right)]).await;
    assert_eq!((through.status, direct.status), (StatusCode::NOT_FOUND, StatusCode::NOT_FOUND));
    // Two clients that ask at the same time are two questions.
    let path = stage.blob_path(&digest);
    let (way, allowed) = (stage.through(0), [("authorization", right.as_str())]);
    let (yes, no) = tokio::join!(wire::get(&way, &path, &allowed), wire::get(&way, &path, &[]));
    assert_eq!((yes.status, no.status), (StatusCode::OK, StatusCode::UNAUTHORIZED));
    // Credentials are for the registry: they are in no log.
    let log = crate::stage::log(stage.agent(0));
    let secret = right.strip_prefix("Basic ").unwrap();
    assert!(!log.contains(secret) && !log.contains("right"), "{log}");
    stage.stop().await;
}

fn contains(needle: &[u8], bytes: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}
