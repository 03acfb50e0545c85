//! With `tag_ttl` a registry is asked for a tag once by all agents together, and is not missed while it is down.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use darter_agent::demo::image::Blob;
use darter_agent::net::Incoming;
use darter_swarm::tags::TagId;
use darter_swarm::wire::{Call, Open};
use futures_util::future::join_all;
use http::{Method, StatusCode};
use serde_json::json;
use tokio_util::task::AbortOnDropHandle;

use crate::member::Member;
use crate::stage::{KIB, Plan, Stage};
use crate::unruly::server::{Origin, Reply, Seen, reply};
use crate::wire::{self, Way};

const AGENTS: usize = 4;
const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const TAG: &str = "/v2/team/app/manifests/latest";
/// Tags that begin like this mean the same.
const OLD: &str = "/v2/team/app/manifests/old-";
const ALICE: [(&str, &str); 2] = [("authorization", "Basic alice"), ("accept", IMAGE)];

/// One of the manifests that the tag may mean.
fn manifest(number: usize) -> Blob {
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{IMAGE}","config":{{}},"layers":[],"annotations":{{"n":"{number}"}}}}"#
    );
    Blob::held(IMAGE, text.into())
}

/// Where this registry listens, so that the agents' operator can name it: beside the stage's own, on an address that nobody else has.
fn beside(registry: SocketAddr) -> SocketAddr {
    SocketAddr::new(registry.ip(), registry.port() ^ 1)
}

/// A registry that lets alice in; the tag means the manifest with this number.
fn answer(number: &AtomicUsize, seen: &Seen) -> Reply {
    if seen.header("authorization") != Some("Basic alice") {
        return Reply::Say(reply(401, &[("www-authenticate", "Basic realm=\"r\"")], b""));
    }
    if seen.method == "PUT" {
        number.fetch_add(1, Ordering::SeqCst);
        return Reply::Say(reply(201, &[], b""));
    }
    let last = number.load(Ordering::SeqCst);
    let named = (0..=last).find(|number| seen.path.ends_with(&manifest(*number).digest().to_string()));
    let Some(number) = named.or_else(|| (seen.path == TAG || seen.path.starts_with(OLD)).then_some(last)) else {
        return Reply::Say(reply(404, &[], b""));
    };
    let blob = manifest(number);
    let (digest, length) = (blob.digest().to_string(), blob.length());
    let (whole, text) = (blob.read(0..length), length.to_string());
    let common = [("content-type", IMAGE), ("docker-content-digest", digest.as_str())];
    Reply::Say(match seen.range() {
        _ if seen.method == "HEAD" => reply(200, &[&common[..], &[("content-length", &text)]].concat(), b""),
        Some(range) => {
            let part = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            reply(206, &[&common[..], &[("content-range", &part)]].concat(), &whole[range])
        }
        None => reply(200, &common, &whole),
    })
}

/// How often the registry was asked with this method for the tag, or for manifests by digest.
fn asked(registry: &Origin, method: &str, tag: bool) -> usize {
    registry.seen().iter().filter(|seen| seen.method == method && (seen.path == TAG) == tag).count()
}

async fn gets(stage: &Stage, to: SocketAddr, at: usize, number: usize) {
    let way = Way::Absolute { proxy: stage.agent(at).addresses().proxy, to };
    let answer = wire::get(&way, TAG, &ALICE).await;
    let log = || stage.agent(at).log_tail();
    assert_eq!(answer.status, StatusCode::OK, "{at}: {}", log());
    let blob = manifest(number);
    assert_eq!(answer.header("docker-content-digest"), blob.digest().to_string(), "{at}: {}", log());
    assert_eq!(answer.header("content-type"), IMAGE);
    assert!(answer.whole().await == blob.read(0..blob.length()), "{at}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_asks_for_a_tag_once_and_has_it_while_the_registry_is_down() {
    let plan = Plan {
        agents: AGENTS,
        layers: vec![64 * KIB],
        tls: false,
        overrides: |registry| json!({"tag_ttl": "1h", "registries": {beside(registry).to_string(): {"insecure_http": true}}}),
        ..Plan::default()
    };
    let mut stage = Stage::start(plan).await;
    let number = Arc::new(AtomicUsize::new(0));
    let current = number.clone();
    let listen = beside(stage.registry.address()).to_string();
    let mut registry = Origin::start_at(&listen, None, move |seen| answer(&current, seen)).await;
    let to = registry.address;
    let way = |stage: &Stage, at: usize| Way::Absolute { proxy: stage.agent(at).addresses().proxy, to };

    join_all((0..AGENTS).map(|at| gets(&stage, to, at, 0))).await;
    for at in 0..AGENTS {
        gets(&stage, to, at, 0).await;
    }
    assert_eq!((asked(&registry, "HEAD", true), asked(&registry, "GET", true)), (1, 0), "{}", stage.logs());
    assert_eq!(asked(&registry, "HEAD", false), AGENTS - 1, "each agent asks whether its client may have it");
    assert_eq!(asked(&registry, "GET", false), 1, "the manifest leaves the registry once: {}", stage.logs());
    assert_eq!(stage.sum("darter_tags_known_total").await, 2 * AGENTS as u64 - 1);

    // It gives nobody what the registry would not, and a push through one agent is seen through all.
    for at in 0..AGENTS {
        let refused = wire::get(&way(&stage, at), TAG, &[("accept", IMAGE)]).await;
        assert_eq!(refused.status, StatusCode::UNAUTHORIZED, "{at}");
    }
    let pushed = wire::send_body(&way(&stage, 1), Method::PUT, TAG, &ALICE, Bytes::from_static(b"{}")).await;
    assert_eq!(pushed.status, StatusCode::CREATED);
    for at in 0..AGENTS {
        gets(&stage, to, at, 1).await;
    }
    assert_eq!((asked(&registry, "HEAD", true), asked(&registry, "GET", true)), (2, 0), "{}", stage.logs());

    // Also while the agents die one after the other, the tag's homes among them.
    registry.stop().await;
    for dead in 0..AGENTS {
        for at in dead..AGENTS {
            gets(&stage, to, at, 1).await;
        }
        let other = wire::get(&way(&stage, dead), "/v2/team/app/manifests/other", &ALICE).await;
        assert_eq!(other.status, StatusCode::SERVICE_UNAVAILABLE);
        stage.cluster.agent_mut(dead).unwrap().kill().await;
    }
    stage.stop().await;
}

/// A member of an earlier version drops a call that it does not know. It may be the home of a tag as any other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_home_of_a_tag_does_not_answer_the_registry_is_asked() {
    let plan = Plan {
        agents: 1,
        layers: vec![64 * KIB],
        tls: false,
        overrides: |registry| json!({"registries": {beside(registry).to_string(): {"insecure_http": true, "tag_ttl": "1h"}}}),
        ..Plan::default()
    };
    let stage = Stage::start(plan).await;
    let listen = beside(stage.registry.address()).to_string();
    let registry = Origin::start_at(&listen, None, |seen| answer(&AtomicUsize::new(0), seen)).await;
    let member = Arc::new(Member::join(&stage, 0).await);
    let (earlier, dropped) = (member.clone(), Arc::new(AtomicUsize::new(0)));
    let drops = dropped.clone();
    let _serving = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(incoming) = earlier.transport.accept().await {
            let Incoming { peer, mut stream, .. } = incoming;
            match stream.receive::<Open>().await {
                Ok(Some(Open::Call(Call::AskTag { .. } | Call::TellTag { .. }))) => {
                    drops.fetch_add(1, Ordering::SeqCst);
                }
                Ok(Some(Open::Call(call))) => {
                    let reply = earlier.answer(peer, call).await;
                    // An agent that has turned away meanwhile is none of this test's business.
                    let _ = stream.send(&reply).await;
                }
                _ => {}
            }
        }
    }));
    // Of two members each is home of about every other tag.
    let origin = format!("http://{}", registry.address);
    let is_home = |number: &u32| member.is_home(TagId::new(&origin, "team/app", &format!("old-{number}")));
    let path = format!("{OLD}{}", (0..).find(is_home).unwrap());
    let way = Way::Absolute { proxy: stage.agent(0).addresses().proxy, to: registry.address };
    for round in 1..=2 {
        let answer = wire::get(&way, &path, &ALICE).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", stage.logs());
        assert!(answer.whole().await == manifest(0).read(0..manifest(0).length()));
        let asked = registry.seen().iter().filter(|seen| seen.path == path).count();
        assert_eq!(asked, round, "each time");
    }
    assert_eq!(dropped.load(Ordering::SeqCst), 1, "it is not asked again at once");
    assert_eq!(stage.sum("darter_isolations_total").await, 0, "and not blamed");
    member.depart().await;
    stage.stop().await;
}
