//! The conformance suite, directly and through agents: whatever a registry says, clients of an agent hear the same, case by
//! case (rows 75 to 78, 87, 88).
//!
//! Here against a registry in memory; the lab's case `conformance` has Debian's docker-registry.

pub(crate) mod registry;

use std::net::SocketAddr;
use std::sync::Arc;

use chaos_tests::conformance::{Outcome, Subject, Target, Verdict, differences, run};
use darter_agent::demo::authority::Authority;
use darter_agent::demo::image::Image;
use darter_agent::demo::registry::{Options, Registry};
use http::Uri;
use serde_json::json;
use tokio_rustls::TlsAcceptor;

use crate::stage::{KIB, Plan, Stage, metric, reconfigure};
use crate::unruly::checked;
use crate::unruly::server::Origin;
use registry::{Slip, Store};

fn url(scheme: &str, address: SocketAddr) -> Uri {
    format!("{scheme}://{address}").parse().unwrap()
}

async fn verdicts(target: &Target, seed: &str, repository: &str) -> Vec<Verdict> {
    let subject = Subject::Pushed { seed: seed.to_owned(), repository: repository.to_owned() };
    run(target, &subject).await.unwrap()
}

/// The same content over plain HTTP and over HTTPS, at the stage's address.
async fn registries(stage: &Stage) -> (Origin, Origin) {
    let store = Arc::new(Store::new(Slip::None));
    let (plain, secure) = (Arc::clone(&store), store);
    let at = format!("{}:0", stage.subnet.registry());
    let tls = TlsAcceptor::from(stage.authority.server(&stage.subnet.registry().to_string()).unwrap());
    let plain = Origin::start_at(&at, None, move |seen| plain.answer(seen)).await;
    (plain, Origin::start_at(&at, Some(tls), move |seen| secure.answer(seen)).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_gets_the_registrys_verdict_case_by_case() {
    let mut stage = Stage::start(Plan { agents: 2, layers: vec![64 * KIB], ..Plan::default() }).await;
    let (plain, secure) = registries(&stage).await;
    let ca_file = stage.cluster.directory().join("conformance.crt");
    std::fs::write(&ca_file, stage.authority.certificate_pem()).unwrap();
    for at in 0..2 {
        let agent = stage.cluster.agent_mut(at).unwrap();
        agent.stop().await;
        reconfigure(agent, |config| {
            config["registries"][plain.address.to_string()] = json!({"insecure_http": true});
            config["registries"][secure.address.to_string()] = json!({"ca_file": ca_file});
            config["hijack"]["hosts"] = json!([secure.address.to_string()]);
            config["registry_mirror"] = json!({"remote": format!("https://{}", secure.address)});
        });
        agent.start().unwrap();
    }
    stage.ready().await;

    let trusts_registry = stage.authority.client().unwrap();
    let proxy = |at: usize| Some(url("http", stage.agent(at).addresses().proxy));
    let direct = Target::direct(url("https", secure.address), Arc::clone(&trusts_registry));
    let own = verdicts(&direct, "00000000", "a/0").await;
    assert!(own.iter().all(|verdict| verdict.outcome == Outcome::Conforms), "{own:#?}");

    let by_url = Target { proxy: proxy(0), ..Target::direct(url("http", plain.address), Arc::clone(&trusts_registry)) };
    let hijacked = Target { proxy: proxy(1), tls: stage.agent(1).tls(), ..direct.clone() };
    let mirror = Target::direct(url("http", stage.agent(0).addresses().proxy), Arc::clone(&trusts_registry));
    let by_namespace = Target { namespace: Some(secure.address.to_string()), ..mirror.clone() };
    // The last two push to another repository what the agents hold already.
    for (way, target, seed, repository) in [
        ("absolute form", &by_url, "00000001", "a/1"),
        ("CONNECT", &hijacked, "00000002", "a/2"),
        ("mirror", &mirror, "00000003", "a/3"),
        ("mirror with a namespace", &by_namespace, "00000004", "a/4"),
        ("CONNECT, warm", &hijacked, "00000001", "a/5"),
        ("mirror, warm", &mirror, "00000002", "a/6"),
    ] {
        let before = metric(stage.agent(0), "darter_client_sent_bytes_total").await
            + metric(stage.agent(1), "darter_client_sent_bytes_total").await;
        let differences = differences(&own, &verdicts(target, seed, repository).await);
        assert!(differences.is_empty(), "{way}:\n{}\n{}", differences.join("\n"), stage.logs());
        let after = metric(stage.agent(0), "darter_client_sent_bytes_total").await
            + metric(stage.agent(1), "darter_client_sent_bytes_total").await;
        assert!(after > before + (1 << 20), "{way}: blobs went past the swarm");
    }
    for agent in stage.agents() {
        crate::wait::until("something is kept", async || checked(&agent.cache_dir().join("blobs")) > 0).await;
    }
    stage.stop().await;
}

/// For registries that are not one's own: an image that is there is read, and nothing is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_is_there_is_only_read() {
    let image = Image::new("some/app", "latest", &[100, 600 * KIB], 1);
    let registry = Registry::start(std::slice::from_ref(&image), Options::default()).await.unwrap();
    let authority = Authority::new("nobody", &["localhost"]).unwrap();
    let target = Target::direct(url("http", registry.address()), authority.client().unwrap());
    let there = Subject::There("some/app".to_owned(), "latest".to_owned());
    let verdicts = run(&target, &there).await.unwrap();
    let outcomes = verdicts.iter().filter(|verdict| matches!(verdict.outcome, Outcome::Violates(_)));
    assert_eq!(outcomes.count(), 0, "{verdicts:#?}");
    assert!(verdicts.iter().any(|verdict| verdict.case == "blob" && verdict.outcome == Outcome::Conforms));
    let mut asked = verdicts.iter().flat_map(|verdict| &verdict.answers).map(|answer| &answer.asked);
    assert!(asked.all(|asked| asked.starts_with("GET ") || asked.starts_with("HEAD ")));
    registry.stop().await;
}

/// A suite that finds nothing wrong with anything would be passed by anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_registry_gets_wrong_is_noticed() {
    let authority = Authority::new("nobody", &["localhost"]).unwrap();
    for (slip, cases) in [
        (Slip::None, &[][..]),
        (Slip::Range, &["range-first-bytes", "range-middle", "range-open-end", "range-suffix", "range-past-the-end"]),
        (Slip::Order, &["blob-chunk-out-of-order"]),
        (Slip::Words, &["manifest-unknown", "blob-unknown", "digest-malformed", "tags-of-nothing", "no-manifest"]),
        (Slip::Deletion, &["delete-tag", "delete-manifest", "delete-blob"]),
    ] {
        let store = Store::new(slip);
        let registry = Origin::start(move |seen| store.answer(seen)).await;
        let target = Target::direct(url("http", registry.address), authority.client().unwrap());
        let verdicts = verdicts(&target, "00000000", "a/0").await;
        let wrong = |verdict: &&Verdict| matches!(verdict.outcome, Outcome::Violates(_));
        let found: Vec<_> = verdicts.iter().filter(wrong).map(|verdict| verdict.case.as_str()).collect();
        assert!(cases.iter().all(|case| found.contains(case)), "{slip:?}: {found:?}");
        assert!(slip != Slip::None || found.is_empty(), "{found:?}");
        // What two ways do not have in common is noticed as well.
        let sound = Store::new(Slip::None);
        let sound = Origin::start(move |seen| sound.answer(seen)).await;
        let sound = Target::direct(url("http", sound.address), authority.client().unwrap());
        let own = self::verdicts(&sound, "00000001", "a/1").await;
        assert_eq!(differences(&own, &verdicts).is_empty(), slip == Slip::None, "{slip:?}");
    }
}
