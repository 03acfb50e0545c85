//! Private registries, by password and by token: who may read a blob gets it through any agent, whoever else gets no byte of
//! it, and nobody finds a credential where it does not belong (D8, S17, S20, S24; rows 92 and 93).
//!
//! That a right which was revoked ends within a minute is shown where time can be moved: `proxy/authorize/tests.rs`, and
//! `proxy/tests/revoked.rs` with a client and its bytes.

mod registry;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use darter_swarm::wire::{Offer, Open, SessionFrame, TurnReply};
use darter_tracker::{Geometry, PieceSizeRule, TaskId};
use futures_util::future::join_all;
use http::{HeaderMap, Method};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::member::Member;
use crate::stage::{KIB, Plan, Stage, admin, log, metric, reconfigure};
use crate::wait;
use crate::wire::{self, Way};
use registry::{Guarded, Scheme, basic, digest};

/// Who may read `alpha/...` and `shared/both`.
const ALICE: (&str, &str) = ("alice", "pw-0f-al1ce");

/// Who may read `beta/own` and `shared/both`.
const BOB: (&str, &str) = ("bob", "pw-0f-b0b");

const RIGHTS: [(&str, &str); 5] = [
    ("alice", "alpha/private"),
    ("alice", "alpha/second"),
    ("alice", "shared/both"),
    ("bob", "beta/own"),
    ("bob", "shared/both"),
];

const REPOSITORIES: [&str; 5] = ["alpha/private", "alpha/second", "beta/own", "shared/both", "nobody/at-all"];

/// Refused attempts that the test makes at least: a promise of the project.
const REFUSED_MIN: usize = 1000;

/// Attempts that run at the same time.
const AT_ONCE: usize = 25;

/// Bytes of which a part would be recognised in an answer.
const TRACE_BYTES: usize = 24;

/// A blob under its name.
#[derive(Clone)]
struct Named {
    digest: String,
    bytes: Bytes,
}

/// One request, and what a registry would say to it.
struct Attempt {
    agent: usize,
    mirror: bool,
    scheme: Scheme,
    name: &'static str,
    blob: Named,
    method: Method,
    range: Option<(usize, usize)>,
    headers: Vec<(&'static str, String)>,
    /// The status that refuses it.
    refused: Option<u16>,
}

/// The stage, the registries, and everything that may be asked with.
struct Scene {
    stage: Stage,
    guarded: Guarded,
    blobs: Vec<Named>,
    authorizations: Vec<(Scheme, Option<String>)>,
    rng: StdRng,
    /// Blob bytes that agents gave to whom they were for, but for what was passed through.
    given: u64,
    refused: usize,
    granted: usize,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_read_a_blob_gets_no_byte_of_it_in_a_thousand_attempts() {
    let mut scene = Scene::start(20_261_126).await;
    let ear = Ear::listen(&scene).await;

    // Nobody has anything yet: attempts that are refused do not even make an agent fetch.
    let before = scene.attempts(250, |attempt| attempt.refused.is_some());
    scene.run(before).await;
    for name in ["darter_registry_received_bytes_total", "darter_peer_received_bytes_total"] {
        assert_eq!(scene.stage.sum(name).await, 0, "{name}");
    }
    // What Alice has pulled through one agent is no more Bob's through that one, and the other does not fetch it for him.
    scene.pull_all(0).await;
    let half = scene.attempts(400, |attempt| attempt.refused.is_some());
    scene.run(half).await;
    assert_eq!(metric(scene.stage.agent(1), "darter_peer_received_bytes_total").await, 0);
    assert_eq!(metric(scene.stage.agent(1), "darter_registry_received_bytes_total").await, 0);
    // Both have it, and those who may read it do.
    scene.pull_all(1).await;
    let mut mixed = scene.attempts(400, |attempt| attempt.refused.is_some());
    mixed.extend(scene.attempts(200, |attempt| attempt.refused.is_none()));
    mixed.sort_by_key(|_| scene.rng.random::<u32>());
    scene.run(mixed).await;
    println!("{} attempts refused, {} granted", scene.refused, scene.granted);
    assert!(scene.refused >= REFUSED_MIN && scene.granted == 200, "{} {}", scene.refused, scene.granted);
    // Every byte that left the agents' caches is one that somebody got who may.
    wait::until("all that was given was given to whom it is for", async || {
        scene.stage.sum("darter_client_sent_bytes_total").await == scene.given
    })
    .await;

    scene.nothing_leaks(&ear).await;
    ear.member.depart().await;
    scene.stage.stop().await;
}

/// Row 93: agents obtain no tokens and keep none. Each client asks for its own, once, and those that ask in the same words at the
/// same time are one question, of each of the two users at least one; the registry is asked by none of them whether it may have
/// what its manifest lists; and the blob leaves the registry once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_pulls_cost_the_token_server_one_request_each_at_most() {
    const PULLS: usize = 50;
    let scene = Scene::start(1).await;
    let name = "shared/both";
    let blob = &scene.blobs[2];
    let registry = Way::Absolute {
        proxy: scene.stage.agent(0).addresses().proxy,
        to: scene.guarded.registry(Scheme::Bearer).address,
    };
    let pull = |at: usize| {
        let (registry, scene) = (registry.clone(), &scene);
        async move {
            let manifest = format!("/v2/{name}/manifests/latest");
            let challenge = wire::get(&registry, &manifest, &[]).await;
            assert_eq!(challenge.status, 401);
            assert!(challenge.header("www-authenticate").starts_with("Bearer realm="), "{:?}", challenge.headers);
            let who = if at.is_multiple_of(2) { ALICE } else { BOB };
            let bearer = scene.token(0, &basic(who.0, who.1), name).await;
            let with = [("authorization", bearer.as_str())];
            assert_eq!(wire::get(&registry, &manifest, &with).await.whole().await[..1], b"{"[..]);
            let path = format!("/v2/{name}/blobs/{}", blob.digest);
            assert!(wire::get(&registry, &path, &with).await.whole().await == blob.bytes);
        }
    };
    let before = scene.guarded.token_server().seen().len();
    join_all((0..PULLS).map(pull)).await;
    let tokens = scene.guarded.token_server().seen().len() - before;
    assert!((2..=PULLS).contains(&tokens), "{tokens}");
    let asked = scene.guarded.registry(Scheme::Bearer).seen();
    let count = |method: &str, kind: &str| {
        asked.iter().filter(|seen| seen.method == method && seen.path.contains(kind)).count()
    };
    let manifests = count("GET", "/manifests/");
    assert!((3..=2 * PULLS).contains(&manifests), "{manifests}, with those that bring the challenge");
    assert_eq!(count("HEAD", "/blobs/"), 0, "the manifest has said it");
    assert_eq!(metric(scene.stage.agent(0), "darter_registry_received_bytes_total").await, blob.bytes.len() as u64);
    scene.stage.stop().await;
}

// === impl Scene ===

impl Scene {
    async fn start(seed: u64) -> Self {
        let mut stage = Stage::start(Plan { layers: vec![64 * KIB], tls: false, ..Plan::default() }).await;
        let mut rng = StdRng::seed_from_u64(seed);
        let lengths = [700_001, 300_000, 500_000, 400_000, 1000];
        let blobs = lengths.map(|length| (0..length).map(|_| rng.random::<u8>()).collect::<Vec<u8>>());
        let [private, second, both, own, small] = &blobs;
        let held: [(&str, &[Vec<u8>]); 4] = [
            ("alpha/private", &[private.clone(), small.clone()]),
            ("alpha/second", std::slice::from_ref(second)),
            ("shared/both", std::slice::from_ref(both)),
            ("beta/own", std::slice::from_ref(own)),
        ];
        let guarded = Guarded::start(stage.subnet.registry(), &[ALICE, BOB], &RIGHTS, &held).await;
        for at in 0..stage.agents().len() {
            let agent = stage.cluster.agent_mut(at).unwrap();
            agent.stop().await;
            reconfigure(agent, |config| {
                for address in guarded.addresses() {
                    config["registries"][address.to_string()] = json!({"insecure_http": true});
                }
                config["registry_mirror"] = Value::Null;
            });
            agent.start_with(&[("DARTER_LOG", "trace")]).unwrap();
        }
        stage.ready().await;
        let blobs = blobs.map(|bytes| Named { digest: digest(&bytes), bytes: bytes.into() }).to_vec();
        let mut scene =
            Self { stage, guarded, blobs, authorizations: Vec::new(), rng, given: 0, refused: 0, granted: 0 };
        scene.authorizations = scene.authorizations().await;
        scene
    }

    /// Everything that somebody could come with: nothing, what is wrong, what is somebody else's, what is for another
    /// repository or another registry.
    async fn authorizations(&self) -> Vec<(Scheme, Option<String>)> {
        let (alice, bob) = (basic(ALICE.0, ALICE.1), basic(BOB.0, BOB.1));
        let mut all = vec![
            None,
            Some(basic(ALICE.0, "wr0ng-pw")),
            Some(basic(ALICE.0, BOB.1)),
            Some(basic("mallory", ALICE.1)),
            Some(basic("", "")),
            Some("Basic".to_owned()),
            Some("Bearer tok3n-f0rged".to_owned()),
            Some(alice.to_lowercase()),
            Some(alice.clone()),
            Some(bob.clone()),
        ];
        for who in [&alice, &bob] {
            for name in REPOSITORIES {
                all.push(Some(self.token(0, who, name).await));
            }
        }
        [Scheme::Basic, Scheme::Bearer]
            .into_iter()
            .flat_map(|scheme| all.clone().into_iter().map(move |with| (scheme, with)))
            .collect()
    }

    /// A token for a repository, got through an agent.
    async fn token(&self, agent: usize, authorization: &str, name: &str) -> String {
        let proxy = self.stage.agent(agent).addresses().proxy;
        let way = Way::Absolute { proxy, to: self.guarded.token_server().address };
        let answer = wire::get(&way, &Guarded::token_path(name), &[("authorization", authorization)]).await;
        let document: Value = serde_json::from_slice(&answer.whole().await).unwrap();
        format!("Bearer {}", document["token"].as_str().unwrap())
    }

    /// Gets every blob for those who may have it, as they would: the manifest first.
    async fn pull_all(&mut self, agent: usize) {
        for (name, who) in [("alpha/private", ALICE), ("alpha/second", ALICE), ("shared/both", BOB), ("beta/own", BOB)]
        {
            let with = basic(who.0, who.1);
            let with = [("authorization", with.as_str())];
            let proxy = self.stage.agent(agent).addresses().proxy;
            let way = Way::Absolute { proxy, to: self.guarded.registry(Scheme::Basic).address };
            assert_eq!(wire::get(&way, &format!("/v2/{name}/manifests/latest"), &with).await.status, 200);
            for blob in &self.blobs {
                if self.guarded.office.blob(name, &blob.digest).is_some() {
                    let path = format!("/v2/{name}/blobs/{}", blob.digest);
                    assert!(wire::get(&way, &path, &with).await.whole().await == blob.bytes, "{path}");
                    self.given += blob.bytes.len() as u64;
                }
            }
        }
    }

    /// So many attempts of a kind.
    fn attempts(&mut self, count: usize, wanted: impl Fn(&Attempt) -> bool) -> Vec<Attempt> {
        let mut attempts = Vec::with_capacity(count);
        while attempts.len() < count {
            let attempt = self.attempt();
            if wanted(&attempt) {
                attempts.push(attempt);
            }
        }
        attempts
    }

    fn attempt(&mut self) -> Attempt {
        let rng = &mut self.rng;
        let name = REPOSITORIES[rng.random_range(0..REPOSITORIES.len())];
        let blob = self.blobs[rng.random_range(0..self.blobs.len())].clone();
        let length = blob.bytes.len();
        let (scheme, with) = self.authorizations[rng.random_range(0..self.authorizations.len())].clone();
        let method = if rng.random_range(0..4) == 0 { Method::HEAD } else { Method::GET };
        let range = (method == Method::GET && rng.random_range(0..2) == 0).then(|| {
            let from = rng.random_range(0..length - TRACE_BYTES);
            (from, rng.random_range(from + TRACE_BYTES..length + TRACE_BYTES).min(length))
        });
        let refused = self.guarded.office.refuses(scheme, with.as_deref(), name);
        let held = self.guarded.office.blob(name, &blob.digest).is_some();
        let mut headers: Vec<_> = with.into_iter().map(|with| ("authorization", with)).collect();
        match rng.random_range(0..6) {
            // The right words in the wrong place.
            0 => headers.push(("cookie", format!("authorization={}", basic(ALICE.0, ALICE.1)))),
            1 => headers.push(("x-forwarded-authorization", basic(ALICE.0, ALICE.1))),
            2 => headers.push(("connection", "x-hop".to_owned())),
            _ => {}
        }
        Attempt {
            agent: rng.random_range(0..2),
            mirror: rng.random_range(0..2) == 0,
            scheme,
            name,
            blob,
            method,
            range,
            headers,
            refused: refused.or((!held).then_some(404)),
        }
    }

    async fn run(&mut self, attempts: Vec<Attempt>) {
        for batch in attempts.chunks(AT_ONCE) {
            for (attempt, given) in
                join_all(batch.iter().map(|attempt| self.make(attempt))).await.into_iter().enumerate()
            {
                match batch[attempt].refused {
                    Some(_) => self.refused += 1,
                    None => self.granted += 1,
                }
                self.given += given;
            }
        }
    }

    /// Makes an attempt, which must end as the registry says; how many bytes of the blob it got.
    async fn make(&self, attempt: &Attempt) -> u64 {
        let proxy = self.stage.agent(attempt.agent).addresses().proxy;
        let registry = self.guarded.registry(attempt.scheme).address;
        let mut path = format!("/v2/{}/blobs/{}", attempt.name, attempt.blob.digest);
        let way = if attempt.mirror {
            path += &format!("?ns={registry}");
            Way::To(proxy, None)
        } else {
            Way::Absolute { proxy, to: registry }
        };
        let range = attempt.range.map(|(from, to)| format!("bytes={from}-{}", to - 1));
        let mut headers: Vec<_> = attempt.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        headers.extend(range.as_deref().map(|range| ("range", range)));
        let reply = wire::send(&way, attempt.method.clone(), &path, &headers).await;
        let (status, answered) = (reply.status.as_u16(), reply.headers.clone());
        let case = format!(
            "{} {path} {:?} through agent {} with {:?}: {status}",
            attempt.method, attempt.range, attempt.agent, attempt.headers
        );
        let body = reply.whole().await;
        if let Some(refused) = attempt.refused {
            assert_eq!(status, refused, "{case}");
            assert!(!shares(&body, &attempt.blob.bytes), "{case}");
            assert!(!names_secret(&answered, &body, &attempt.headers), "{case}: {answered:?}");
            return 0;
        }
        let (from, to) = attempt.range.unwrap_or((0, attempt.blob.bytes.len()));
        assert_eq!(status, if attempt.range.is_some() { 206 } else { 200 }, "{case}");
        if attempt.method == Method::HEAD {
            return 0;
        }
        assert!(body == attempt.blob.bytes.slice(from..to), "{case}");
        body.len() as u64
    }

    /// Nothing that anybody came with is in a log, a metric, an argument, or a message to a peer.
    async fn nothing_leaks(&self, ear: &Ear) {
        let mut secrets: BTreeSet<String> = [ALICE.1, BOB.1, "wr0ng-pw", "tok3n-"].map(str::to_owned).into();
        secrets.extend(self.guarded.office.tokens());
        let given = self.authorizations.iter().filter_map(|(_, with)| with.as_deref()?.split(' ').nth(1));
        secrets.extend(given.filter(|secret| secret.len() > 8).map(str::to_owned));
        let mut places = Vec::new();
        for agent in self.stage.agents() {
            let log = log(agent);
            assert!(log.contains("TRACE") && log.contains("DEBUG") && log.len() > 100_000, "{}", log.len());
            places.push((format!("{}'s log", agent.name()), log.into_bytes()));
            for path in ["/metrics", "/api/v1/sources", "/api/v1/holdings", "/args", "/env", "/debug/version"] {
                let (status, said) = admin(agent, path).await.unwrap();
                assert_eq!(status, 200, "{path}");
                places.push((format!("{}{path}", agent.name()), said.into_bytes()));
            }
            let process = agent.process_id().unwrap();
            places.push((
                format!("{}'s arguments", agent.name()),
                std::fs::read(format!("/proc/{process}/cmdline")).unwrap(),
            ));
        }
        let heard = ear.heard.lock().unwrap().clone();
        assert!(heard.len() > 1000, "the peer heard {} bytes", heard.len());
        places.push(("what a peer was told".to_owned(), heard));
        let sizes: usize = places.iter().map(|(_, bytes)| bytes.len()).sum();
        println!("{} secrets looked for in {sizes} bytes of {} places", secrets.len(), places.len());
        for (place, bytes) in &places {
            let text = String::from_utf8_lossy(bytes);
            for secret in &secrets {
                let found = text.find(secret.as_str());
                assert!(found.is_none(), "{secret} in {place}: {:?}", text.lines().find(|line| line.contains(secret)));
            }
        }
    }
}

/// Whether an answer has bytes of the blob.
fn shares(body: &[u8], blob: &[u8]) -> bool {
    body.len() >= TRACE_BYTES
        && body.chunks_exact(TRACE_BYTES).any(|part| blob.windows(TRACE_BYTES).any(|window| window == part))
}

/// Whether an answer repeats what it was asked with.
fn names_secret(answered: &HeaderMap, body: &[u8], asked: &[(&str, String)]) -> bool {
    let said = format!("{answered:?}{}", String::from_utf8_lossy(body));
    let words = asked.iter().filter_map(|(_, value)| value.rsplit(' ').next()).filter(|word| word.len() > 8);
    words.into_iter().any(|word| said.contains(word))
}

/// A member that is interested in everything and notes every byte that it is told.
struct Ear {
    member: Arc<Member>,
    heard: Arc<Mutex<Vec<u8>>>,
    _listening: AbortOnDropHandle<()>,
}

impl Ear {
    async fn listen(scene: &Scene) -> Self {
        let member = Arc::new(Member::join(&scene.stage, 0).await);
        let heard = Arc::<Mutex<Vec<u8>>>::default();
        let (listener, log) = (member.clone(), heard.clone());
        let listening = tokio::spawn(async move {
            let mut streams = JoinSet::new();
            while let Some(incoming) = listener.transport.accept().await {
                let (listener, log) = (listener.clone(), log.clone());
                streams.spawn(async move {
                    let (peer, mut stream) = (incoming.peer, incoming.stream);
                    let Ok(Some(open)) = stream.receive::<Open>().await else { return };
                    note(&log, &open);
                    match open {
                        Open::Call(call) => {
                            let _ = stream.send(&listener.answer(peer, call).await).await;
                        }
                        Open::Session(Offer { task, geometry, .. }) => {
                            let (mut sender, mut receiver) = stream.split();
                            let ours = Offer { task, geometry, have: None, home: None };
                            let _ = sender.send(&SessionFrame::Offer(ours)).await;
                            while let Ok(Some(frame)) = receiver.receive::<SessionFrame>().await {
                                note(&log, &frame);
                            }
                        }
                        Open::Ask { .. } | Open::Piece { .. } => {
                            let _ = stream.send(&TurnReply::NotHeld).await;
                        }
                    }
                });
            }
        });
        for blob in &scene.blobs {
            let length = blob.bytes.len() as u64;
            let geometry = Geometry::new(length, PieceSizeRule::Auto.piece_size(length)).unwrap();
            member.register(TaskId::blob(blob.digest.parse().unwrap()), geometry, false).await;
        }
        Self { member, heard, _listening: AbortOnDropHandle::new(listening) }
    }
}

/// Notes a message as it was encoded, and as it is printed.
fn note(log: &Mutex<Vec<u8>>, message: &(impl Serialize + std::fmt::Debug)) {
    let mut log = log.lock().unwrap();
    log.extend(postcard::to_allocvec(message).unwrap());
    log.extend(format!("{message:?}\n").into_bytes());
}
