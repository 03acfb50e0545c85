//! What a tag means is asked once where `tag_ttl` is set, and nobody gets by it what the registry would not give him.
//!
//! Agents with the real judgement on who may read what, in front of a registry that counts; the tag's home and the swarm are stubs.
//! No test waits for time to pass: the clock is moved.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use darter_swarm::tags::TagAnswer;
use darter_tracker::{Digest, NodeId};
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt as _, StreamExt as _};
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt as _;
use sha2::{Digest as _, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::support::{exchange, mirror_of, pass, request};
use crate::proxy::Proxy;
use crate::proxy::authorize::{Authorizer, WhenRegistryDown};
use crate::proxy::seam::{
    Accepts, BlobRequest, Blobs, Client, Descriptor, HeldTags, ManifestType, Meaning, TagHomes, TagId, TagNews,
};
use crate::proxy::tags::TagTtls;
use crate::source::registry::testing::{Origin, Reply, Seen, reply, upstream};

const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const TAG: &str = "/v2/a/b/manifests/latest";
const TTL: Duration = Duration::from_secs(300);
const SECOND: Duration = Duration::from_secs(1);

/// One of the images that the tag may mean.
fn manifest(number: u8) -> Bytes {
    format!(r#"{{"schemaVersion":2,"mediaType":"{IMAGE}","layers":[],"annotations":{{"image":"{number}"}}}}"#).into()
}

fn digest(number: u8) -> Digest {
    Digest::Sha256(Sha256::digest(manifest(number)).into())
}

/// What the registry does; alice and carol may read, others may not.
#[derive(Default)]
struct Behaviour {
    /// The image that the tag means.
    image: AtomicUsize,
    down: AtomicBool,
    /// It knows no HEAD of a tag.
    headless: AtomicBool,
    /// It names another digest than its manifest has.
    wrong: AtomicBool,
}

impl Behaviour {
    fn answer(&self, seen: &Seen) -> Reply {
        let path = seen.path.split('?').next().unwrap();
        if self.down.load(Ordering::SeqCst) {
            return Reply::Close(Vec::new());
        }
        match seen.header("authorization") {
            Some("Basic alice" | "Basic carol") => {}
            Some(_) => return Reply::Say(reply(403, &[], if seen.method == "HEAD" { b"" } else { b"not you" })),
            None => return Reply::Say(reply(401, &[("www-authenticate", "Basic realm=\"r\"")], b"")),
        }
        let image = self.image.load(Ordering::SeqCst) as u8;
        match seen.method.as_str() {
            "PUT" | "DELETE" => {
                self.image.store(usize::from(image) + 1, Ordering::SeqCst);
                return Reply::Say(reply(201, &[], b""));
            }
            "HEAD" if path == TAG && self.headless.load(Ordering::SeqCst) => {
                return Reply::Say(reply(405, &[], b""));
            }
            _ => {}
        }
        // The registry keeps what the tag has meant before.
        let by_digest = (0..=image).find(|image| path == format!("/v2/a/b/manifests/{}", digest(*image)));
        let Some(number) = by_digest.or_else(|| (path == TAG).then_some(image)) else {
            return Reply::Say(reply(404, &[], b""));
        };
        let named = if self.wrong.load(Ordering::SeqCst) { digest(99) } else { digest(number) }.to_string();
        let (bytes, length) = (manifest(number), manifest(number).len().to_string());
        let headers = [("content-type", IMAGE), ("docker-content-digest", &named), ("content-length", &length)];
        Reply::Say(reply(200, &headers, if seen.method == "HEAD" { b"" } else { &bytes }))
    }
}

/// The home of all tags.
#[derive(Default)]
struct Home {
    tags: Mutex<HeldTags>,
    deaf: AtomicBool,
}

/// The way of one agent to it.
struct Way {
    agent: NodeId,
    home: Arc<Home>,
}

fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}

impl TagHomes for Way {
    fn ask(&self, tag: TagId, accepts: Accepts, fresh: Duration) -> BoxFuture<'_, Option<(Meaning, Duration)>> {
        async move {
            while !self.home.deaf.load(Ordering::SeqCst) {
                let answer = self.home.tags.lock().unwrap().ask(self.agent, tag, accepts, fresh, now());
                match answer {
                    TagAnswer::Means { meaning, age } => return Some((meaning, age)),
                    TagAnswer::Ask => return None,
                    TagAnswer::Wait { retry_after } => tokio::time::sleep(retry_after).await,
                }
            }
            None
        }
        .boxed()
    }

    fn tell(&self, tag: TagId, news: TagNews) -> BoxFuture<'_, ()> {
        if !self.home.deaf.load(Ordering::SeqCst) {
            self.home.tags.lock().unwrap().tell(self.agent, tag, news, now());
        }
        std::future::ready(()).boxed()
    }
}

/// Has every image, until it has not.
#[derive(Default)]
struct Swarm {
    empty: AtomicBool,
    opened: AtomicUsize,
}

impl Blobs for Swarm {
    type Error = io::Error;
    type Body = BoxStream<'static, Result<Bytes, io::Error>>;

    async fn open(&self, request: BlobRequest) -> Result<Self::Body, io::Error> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        let all: BTreeMap<Digest, Bytes> = (0..10).map(|number| (digest(number), manifest(number))).collect();
        let found = all.get(request.task.digest()).filter(|_| !self.empty.load(Ordering::SeqCst));
        let bytes = found.cloned().ok_or_else(|| io::Error::other("gone"))?;
        Ok(futures_util::stream::iter([Ok(bytes)]).boxed())
    }

    fn expect(&self, _: Client, _: &[Descriptor]) {}

    fn is_wrong(_: &io::Error) -> bool {
        false
    }
}

struct Agent {
    address: std::net::SocketAddr,
    swarm: Arc<Swarm>,
    _serving: AbortOnDropHandle<()>,
}

type Answer = (StatusCode, HeaderMap, Bytes);

impl Agent {
    async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (head, body) = exchange(stream, request(method, path, headers)).await.unwrap().into_parts();
        (head.status, head.headers, body.collect().await.unwrap().to_bytes())
    }

    async fn get(&self, who: &str) -> Answer {
        self.ask("GET", TAG, &[("authorization", who), ("accept", IMAGE)]).await
    }

    /// The image that a client is given.
    async fn gets(&self, who: &str, number: u8) {
        let (status, headers, body) = self.get(who).await;
        assert_eq!((status, &body), (StatusCode::OK, &manifest(number)));
        assert_eq!(headers["docker-content-digest"], digest(number).to_string());
        assert_eq!(headers["content-type"], IMAGE);
    }
}

/// A registry, the home, and agents.
struct Cluster {
    behaviour: Arc<Behaviour>,
    registry: Origin,
    home: Arc<Home>,
    agents: Vec<Agent>,
}

impl Cluster {
    async fn start(count: u8, policy: WhenRegistryDown, ttls: impl Fn(&Origin) -> TagTtls) -> Self {
        let behaviour = Arc::new(Behaviour::default());
        let answers = behaviour.clone();
        let registry = Origin::start(move |seen| answers.answer(seen)).await;
        let home = Arc::new(Home::default());
        let mut agents = Vec::new();
        for number in 1..=count {
            let (upstream, metrics) = upstream();
            let authorizer = Arc::new(Authorizer::new(upstream.clone(), policy));
            let swarm = Arc::new(Swarm::default());
            let way = Way { agent: NodeId::from_bytes([number; 16]), home: home.clone() };
            let proxy = Proxy::new(&mirror_of(registry.url("")), upstream, authorizer, swarm.clone(), metrics).unwrap();
            let proxy = Arc::new(proxy.with_tags(ttls(&registry), Arc::new(way)));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let serving = AbortOnDropHandle::new(tokio::spawn(proxy.serve(listener, CancellationToken::new())));
            agents.push(Agent { address, swarm, _serving: serving });
        }
        Self { behaviour, registry, home, agents }
    }

    async fn of(count: u8, policy: WhenRegistryDown) -> Self {
        Self::start(count, policy, |_| TagTtls { default: TTL, registries: Vec::new() }).await
    }

    /// How often the registry was asked for the tag, and for manifests by digest.
    fn asked(&self) -> (usize, usize) {
        let seen = self.registry.seen();
        let reads = seen.iter().filter(|seen| matches!(seen.method.as_str(), "GET" | "HEAD"));
        let (tags, others): (Vec<_>, Vec<_>) = reads.partition(|seen| seen.path == TAG);
        (tags.len(), others.len())
    }
}

#[tokio::test]
async fn without_a_ttl_every_tag_is_asked_for() {
    let cluster = Cluster::start(1, WhenRegistryDown::Seen, |_| TagTtls::default()).await;
    for asked in 1..4 {
        cluster.agents[0].gets("Basic alice", 0).await;
        assert_eq!(cluster.asked(), (asked, 0));
    }
    cluster.behaviour.image.store(1, Ordering::SeqCst);
    cluster.agents[0].gets("Basic alice", 1).await;
    cluster.behaviour.down.store(true, Ordering::SeqCst);
    assert_eq!(cluster.agents[0].get("Basic alice").await.0, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_cluster_asks_once_and_each_agent_whether_its_client_may() {
    let cluster = Cluster::of(3, WhenRegistryDown::Seen).await;
    for _ in 0..2 {
        for agent in &cluster.agents {
            agent.gets("Basic alice", 0).await;
        }
    }
    // The first agent's client was told by the registry itself; the other two were asked about.
    assert_eq!(cluster.asked(), (1, 2));
    // What a HEAD is told is the same, and begins no pull.
    let pulls = || cluster.agents.iter().map(|agent| agent.swarm.opened.load(Ordering::SeqCst)).sum::<usize>();
    let before = pulls();
    let headers = [("authorization", "Basic alice"), ("accept", IMAGE)];
    for agent in &cluster.agents {
        let (status, headers, body) = agent.ask("HEAD", TAG, &headers).await;
        assert_eq!((status, body), (StatusCode::OK, Bytes::new()));
        assert_eq!(headers["docker-content-digest"], digest(0).to_string());
        assert_eq!(headers["content-type"], IMAGE);
        assert_eq!(headers["content-length"], manifest(0).len().to_string());
    }
    assert_eq!((cluster.asked(), pulls()), ((1, 2), before));
    // Conditions are the registry's business, and so is what stands behind a query.
    let conditional = [&headers[..], &[("if-none-match", "\"x\"")]].concat();
    assert_eq!(cluster.agents[0].ask("GET", TAG, &conditional).await.0, StatusCode::OK);
    assert_eq!(cluster.agents[0].ask("GET", &format!("{TAG}?a=b"), &headers).await.0, StatusCode::OK);
    assert_eq!(cluster.asked(), (2, 3), "of which the one with a query is counted with the others");
}

#[tokio::test]
async fn a_head_that_is_asked_first_is_asked_once_too() {
    let cluster = Cluster::of(2, WhenRegistryDown::Seen).await;
    let headers = [("authorization", "Basic alice"), ("accept", IMAGE)];
    for agent in &cluster.agents {
        let (status, headers, _) = agent.ask("HEAD", TAG, &headers).await;
        assert_eq!(
            (status, &headers["docker-content-digest"]),
            (StatusCode::OK, &digest(0).to_string().parse().unwrap())
        );
    }
    cluster.agents[0].gets("Basic alice", 0).await;
    assert_eq!(cluster.asked(), (1, 1));
}

#[tokio::test]
async fn who_may_not_read_it_gets_the_registrys_refusal() {
    let cluster = Cluster::of(2, WhenRegistryDown::Seen).await;
    cluster.agents[0].gets("Basic alice", 0).await;
    for agent in &cluster.agents {
        let opened = agent.swarm.opened.load(Ordering::SeqCst);
        let (status, _, body) = agent.get("Basic bob").await;
        assert_eq!((status, &body[..]), (StatusCode::FORBIDDEN, &b"not you"[..]));
        for method in ["GET", "HEAD"] {
            let (status, headers, body) = agent.ask(method, TAG, &[("accept", IMAGE)]).await;
            assert_eq!((status, body), (StatusCode::UNAUTHORIZED, Bytes::new()));
            assert_eq!(headers["www-authenticate"], "Basic realm=\"r\"");
            assert!(!headers.contains_key("docker-content-digest"));
        }
        assert_eq!(agent.swarm.opened.load(Ordering::SeqCst), opened, "not even begun");
    }
    // Where they come first they get it as well, and it keeps nobody else from asking.
    let cluster = Cluster::of(1, WhenRegistryDown::Seen).await;
    assert_eq!(cluster.agents[0].get("Basic bob").await.0, StatusCode::FORBIDDEN);
    assert_eq!(cluster.agents[0].ask("GET", TAG, &[("accept", IMAGE)]).await.0, StatusCode::UNAUTHORIZED);
    cluster.agents[0].gets("Basic alice", 0).await;
}

#[tokio::test]
async fn an_answer_ends_with_its_ttl() {
    let cluster = Cluster::of(2, WhenRegistryDown::Seen).await;
    cluster.agents[0].gets("Basic alice", 0).await;
    cluster.behaviour.image.store(1, Ordering::SeqCst);
    pass(TTL - SECOND).await;
    cluster.agents[1].gets("Basic alice", 0).await;
    pass(SECOND).await;
    cluster.agents[1].gets("Basic alice", 1).await;
    cluster.agents[0].gets("Basic alice", 1).await;
    assert_eq!(cluster.asked().0, 2);
}

#[tokio::test]
async fn who_accepts_something_else_gets_an_answer_of_his_own() {
    let cluster = Cluster::of(1, WhenRegistryDown::Seen).await;
    let mut asked = 0;
    for (accept, is_new) in [
        (IMAGE, true),
        ("*/*", true),
        (IMAGE, false),
        ("*/*, application/vnd.oci.image.index.v1+json", true),
        ("application/vnd.oci.image.index.v1+json,*/*", false),
        ("*/*;q=0.1", true),
        // Nobody's business but the registry's, each time.
        ("\"*/*\"", true),
        ("\"*/*\"", true),
    ] {
        let headers = [("authorization", "Basic alice"), ("accept", accept)];
        assert_eq!(cluster.agents[0].ask("GET", TAG, &headers).await.2, manifest(0));
        asked += usize::from(is_new);
        assert_eq!(cluster.asked().0, asked, "{accept}");
    }
    assert_eq!(cluster.agents[0].ask("GET", TAG, &[("authorization", "Basic alice")]).await.2, manifest(0));
    assert_eq!(cluster.asked().0, asked + 1);
}

#[tokio::test]
async fn a_push_through_any_agent_is_seen_at_once() {
    let cluster = Cluster::of(2, WhenRegistryDown::Seen).await;
    for (number, method) in ["PUT", "DELETE"].into_iter().enumerate() {
        let number = number as u8;
        for agent in &cluster.agents {
            agent.gets("Basic alice", number).await;
        }
        let (status, _, _) = cluster.agents[0].ask(method, TAG, &[("authorization", "Basic alice")]).await;
        assert_eq!(status, StatusCode::CREATED);
        for agent in &cluster.agents {
            agent.gets("Basic alice", number + 1).await;
        }
    }
    // Of another tag it says nothing.
    let asked = cluster.asked().0;
    let other = "/v2/a/b/manifests/other";
    cluster.agents[0].ask("PUT", other, &[("authorization", "Basic bob")]).await;
    cluster.agents[0].gets("Basic alice", 2).await;
    assert_eq!(cluster.asked().0, asked);
}

#[tokio::test]
async fn while_the_registry_is_down_a_young_answer_serves_whom_the_policy_names() {
    for (policy, alice, bob) in [
        (WhenRegistryDown::Seen, true, false),
        (WhenRegistryDown::Allow, true, true),
        (WhenRegistryDown::Deny, false, false),
    ] {
        for knows_home in [true, false] {
            let cluster = Cluster::of(1, policy).await;
            let agent = &cluster.agents[0];
            agent.gets("Basic alice", 0).await;
            cluster.behaviour.down.store(true, Ordering::SeqCst);
            // The home has died, and another knows nothing; or does not answer either.
            if !knows_home {
                *cluster.home.tags.lock().unwrap() = HeldTags::default();
            }
            // What the registry granted for a minute is over.
            pass(Duration::from_secs(60)).await;
            for (who, may) in [("Basic alice", alice), ("Basic bob", bob)] {
                for deaf in [false, true] {
                    cluster.home.deaf.store(deaf && !knows_home, Ordering::SeqCst);
                    let (status, headers, body) = agent.get(who).await;
                    if may {
                        assert_eq!((status, body), (StatusCode::OK, manifest(0)), "{policy:?} {who} {knows_home}");
                        let asked = [("authorization", who), ("accept", IMAGE)];
                        let (status, described, _) = agent.ask("HEAD", TAG, &asked).await;
                        assert_eq!(status, StatusCode::OK);
                        for name in ["content-type", "content-length", "docker-content-digest"] {
                            assert_eq!(described[name], headers[name]);
                        }
                    } else {
                        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{policy:?} {who} {knows_home}");
                    }
                }
            }
            // Not a moment longer than the answer is young, and nothing that was never asked for.
            cluster.home.deaf.store(false, Ordering::SeqCst);
            pass(TTL - Duration::from_secs(60)).await;
            assert_eq!(agent.get("Basic alice").await.0, StatusCode::SERVICE_UNAVAILABLE);
            let other = agent.ask("GET", "/v2/a/b/manifests/other", &[("authorization", "Basic alice")]).await;
            assert_eq!(other.0, StatusCode::SERVICE_UNAVAILABLE);
        }
    }
}

/// What the swarm has not, and what the registry does not know, is asked for as if nothing were known.
#[tokio::test]
async fn where_an_answer_is_of_no_use_the_registry_answers() {
    let cluster = Cluster::of(1, WhenRegistryDown::Seen).await;
    let agent = &cluster.agents[0];
    agent.swarm.empty.store(true, Ordering::SeqCst);
    agent.gets("Basic alice", 0).await;
    assert_eq!(cluster.asked(), (2, 0));
    agent.swarm.empty.store(false, Ordering::SeqCst);

    // A member says that the tag means what is not in this repository, or says how long it is and is wrong.
    let tag = TagId::new(&cluster.registry.url(""), "a/b", "latest");
    let accepts = Accepts::new([IMAGE]);
    let length = manifest(0).len() as u64;
    let media_type = ManifestType::OciImage;
    for meaning in [
        Meaning { digest: digest(5), media_type, length: manifest(5).len() as u64 },
        Meaning { digest: digest(0), media_type, length: length + 1 },
    ] {
        pass(SECOND).await;
        let liar = Way { agent: NodeId::from_bytes([66; 16]), home: cluster.home.clone() };
        liar.tell(tag, TagNews::Means { accepts, meaning, age: Duration::ZERO }).await;
        assert_eq!(liar.ask(tag, accepts, TTL).await.unwrap().0, meaning, "it is believed so far");
        agent.gets("Basic alice", 0).await;
    }
    // What kind of manifest it is a member may say, and it counts for nothing.
    pass(SECOND).await;
    let liar = Way { agent: NodeId::from_bytes([66; 16]), home: cluster.home.clone() };
    let meaning = Meaning { digest: digest(0), media_type: ManifestType::DockerList, length };
    liar.tell(tag, TagNews::Means { accepts, meaning, age: Duration::ZERO }).await;
    agent.gets("Basic alice", 0).await;
}

#[tokio::test]
async fn a_registry_that_knows_no_head_is_asked_with_get_and_believed_if_its_bytes_are_right() {
    let cluster = Cluster::of(1, WhenRegistryDown::Seen).await;
    let agent = &cluster.agents[0];
    cluster.behaviour.headless.store(true, Ordering::SeqCst);
    cluster.behaviour.wrong.store(true, Ordering::SeqCst);
    for asked in [2, 4] {
        assert_eq!(agent.get("Basic alice").await.2, manifest(0));
        assert_eq!(cluster.asked().0, asked, "what it says is wrong, so nothing is kept of it");
    }
    cluster.behaviour.wrong.store(false, Ordering::SeqCst);
    for _ in 0..2 {
        agent.gets("Basic alice", 0).await;
        assert_eq!(cluster.asked().0, 6);
    }
}

#[tokio::test]
async fn those_who_come_at_once_ask_once_whoever_they_are() {
    let cluster = Cluster::of(2, WhenRegistryDown::Seen).await;
    let clients = cluster.agents.iter().flat_map(|agent| ["Basic alice", "Basic carol"].map(|who| (agent, who)));
    join_all(clients.cycle().take(40).map(|(agent, who)| agent.gets(who, 0))).await;
    assert_eq!(cluster.asked().0, 1);
    assert!(cluster.asked().1 <= 3, "whether they may, once for each but the one who asked");
}

#[tokio::test]
async fn registries_have_a_ttl_each() {
    for (default, named, once) in [(TTL, Duration::ZERO, false), (Duration::ZERO, TTL, true)] {
        let ttls = |registry: &Origin| TagTtls {
            default,
            registries: vec![
                (format!("{}:1", registry.address.ip()).parse().unwrap(), TTL * 2),
                (registry.address.to_string().parse().unwrap(), named),
            ],
        };
        let cluster = Cluster::start(1, WhenRegistryDown::Seen, ttls).await;
        for _ in 0..2 {
            cluster.agents[0].gets("Basic alice", 0).await;
        }
        assert_eq!(cluster.asked().0, if once { 1 } else { 2 });
    }
}
