//! D8 against a registry that counts what it is asked. No test waits for time to pass: the clock is moved.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod held;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;

use super::memory::{NO, SEEN, YES};
use super::*;
use crate::proxy::manifest::Descriptor;
use crate::source::registry::testing::{Origin, Reply, Seen, origin, reply, serve, upstream};

const BLOB: &[u8] = b"0123456789";
const LENGTH: u64 = BLOB.len() as u64;
const ALICE: &[(&str, &str)] = &[("authorization", "Basic alice")];
/// Why somebody may not have a blob.
const NO_IN_WORDS: &[u8] = br#"{"errors":[{"code":"DENIED","message":"ask alice"}]}"#;
const BOB: &[(&str, &str)] = &[("authorization", "Basic bob")];
const NOBODY: &[(&str, &str)] = &[];

fn digest(letter: char) -> Digest {
    format!("sha256:{}", letter.to_string().repeat(64)).parse().unwrap()
}

/// One agent's authorizer in front of one registry.
struct Front {
    authorizer: Authorizer,
    registry: Origin,
    base: String,
}

impl Front {
    async fn start(policy: WhenRegistryDown, handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let registry = Origin::start(handler).await;
        let base = registry.url("");
        Self { authorizer: Authorizer::new(upstream().0, policy), registry, base }
    }

    fn repository(&self, name: &str) -> Repository {
        Repository { registry: self.base.clone(), name: name.to_owned() }
    }

    async fn ask(&self, who: &[(&str, &str)], name: &str, letter: char) -> Verdict {
        let url = format!("{}/v2/{name}/blobs/{}", self.base, digest(letter));
        self.authorizer.blob(&origin(&url, who), &self.repository(name), &digest(letter)).await
    }

    fn show_manifest(&self, who: &[(&str, &str)], name: &str, letter: char, size: u64) {
        let body = format!(r#"{{"layers":[{{"digest":"{}","size":{size}}}]}}"#, digest(letter));
        let headers = origin("http://x/", who).headers;
        let content_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = self.authorizer.saw_manifest(&self.repository(name), &headers, content_type, body.as_bytes());
        assert_eq!(manifest.blobs, [Descriptor { digest: digest(letter), size }]);
    }

    fn questions(&self) -> usize {
        self.registry.seen().len()
    }
}

/// A registry that knows alice.
fn alices(seen: &Seen) -> Reply {
    match seen.header("authorization") {
        Some("Basic alice") => serve(BLOB, seen),
        Some(_) => Reply::Say(reply(403, &[], if seen.method == "GET" { NO_IN_WORDS } else { b"" })),
        None => Reply::Say(reply(401, &[("www-authenticate", "Basic realm=\"r\"")], b"")),
    }
}

fn granted(verdict: &Verdict) -> u64 {
    match verdict {
        Verdict::Granted { length, .. } => *length,
        other => panic!("{other:?}"),
    }
}

fn refused(verdict: Verdict) -> Response<Bytes> {
    match verdict {
        Verdict::Refused(answer) => answer,
        other => panic!("{other:?}"),
    }
}

/// Moves the clock. The registry answers over real sockets, so time stands still only while it is moved.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

// S20
#[tokio::test]
async fn each_client_gets_what_the_registry_would_give_it() {
    let front = Front::start(WhenRegistryDown::Seen, alices).await;
    for _ in 0..3 {
        let verdict = front.ask(ALICE, "a", 'd').await;
        assert_eq!(granted(&verdict), LENGTH);
        let Verdict::Granted { headers, .. } = verdict else { unreachable!() };
        assert_eq!(
            (&headers["etag"], &headers["accept-ranges"]),
            (&"\"e\"".parse().unwrap(), &"bytes".parse().unwrap())
        );
        assert!(!headers.contains_key("content-length"));
        let answer = refused(front.ask(BOB, "a", 'd').await);
        assert_eq!((answer.status().as_u16(), &answer.body()[..]), (403, NO_IN_WORDS));
        let answer = refused(front.ask(NOBODY, "a", 'd').await);
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["www-authenticate"]),
            (401, &"Basic realm=\"r\"".parse().unwrap())
        );
        assert_eq!(refused(front.ask(&[("cookie", "Basic alice")], "a", 'd').await).status(), 401);
    }
    // One question each: yes and no are kept. A no is asked for in words.
    let asked = |method| front.registry.seen().iter().filter(|seen| seen.method == method).count();
    assert_eq!((asked("HEAD"), asked("GET")), (4, 3));
    // Another blob or repository is another question.
    front.ask(ALICE, "a", 'e').await;
    front.ask(ALICE, "b", 'd').await;
    assert_eq!(front.questions(), 9);
}

#[tokio::test]
async fn a_hundred_clients_ask_one_question() {
    let front = Front::start(WhenRegistryDown::Seen, alices).await;
    let verdicts = join_all((0..100).map(|_| front.ask(ALICE, "a", 'd'))).await;
    assert!(verdicts.iter().all(|verdict| granted(verdict) == LENGTH));
    assert_eq!(front.questions(), 1);
    assert!(front.authorizer.asking.lock().unwrap().is_empty());

    // Also where the answer is none that is kept.
    let front = Front::start(WhenRegistryDown::Seen, |_| Reply::Say(reply(500, &[], b""))).await;
    for verdict in join_all((0..100).map(|_| front.ask(ALICE, "a", 'd'))).await {
        assert!(matches!(verdict, Verdict::Unavailable(_)), "{verdict:?}");
    }
    assert_eq!(front.questions(), 1);
    front.ask(ALICE, "a", 'd').await;
    assert_eq!(front.questions(), 2);
}

/// Row 134.
#[tokio::test]
async fn a_blob_that_is_missing_is_asked_for_once_in_five_seconds() {
    let pushed = Arc::new(AtomicBool::new(false));
    let flag = pushed.clone();
    let front = Front::start(WhenRegistryDown::Seen, move |seen| {
        if flag.load(Ordering::SeqCst) { serve(BLOB, seen) } else { Reply::Say(reply(404, &[], b"")) }
    })
    .await;
    let questions = || front.registry.seen().iter().filter(|seen| seen.method == "HEAD").count();
    for _ in 0..10 {
        assert_eq!(refused(front.ask(ALICE, "a", 'd').await).status(), 404);
    }
    assert_eq!(questions(), 1);
    // Another client, blob or repository is another question.
    for (who, name, letter) in [(BOB, "a", 'd'), (ALICE, "b", 'd'), (ALICE, "a", 'e')] {
        refused(front.ask(who, name, letter).await);
    }
    assert_eq!(questions(), 4);
    // Who has pushed it and asks for the manifest need not wait; who only asks for the blob waits this long.
    pushed.store(true, Ordering::SeqCst);
    front.show_manifest(ALICE, "a", 'e', LENGTH);
    assert_eq!(granted(&front.ask(ALICE, "a", 'e').await), LENGTH);
    refused(front.ask(ALICE, "a", 'd').await);
    assert_eq!(questions(), 4);
    pass(NO).await;
    assert_eq!(granted(&front.ask(ALICE, "a", 'd').await), LENGTH);
    assert_eq!(questions(), 5);
}

#[tokio::test]
async fn a_client_that_leaves_while_asking_leaves_the_question_to_the_next() {
    let silent = Arc::new(AtomicBool::new(true));
    let flag = silent.clone();
    let front = Front::start(WhenRegistryDown::Seen, move |seen| {
        if flag.load(Ordering::SeqCst) { Reply::Hang(Vec::new()) } else { serve(BLOB, seen) }
    })
    .await;
    let mut first = Box::pin(front.ask(ALICE, "a", 'd'));
    let mut second = Box::pin(front.ask(ALICE, "a", 'd'));
    // Until the registry was asked by the first; the second waits for it.
    let deadline = Instant::now() + Duration::from_secs(20);
    while front.questions() == 0 {
        assert!(Instant::now() < deadline);
        tokio::select! {
            biased;
            _ = &mut first => panic!("answered"),
            _ = &mut second => panic!("answered"),
            () = tokio::task::yield_now() => {}
        }
    }
    silent.store(false, Ordering::SeqCst);
    drop(first);
    assert_eq!(granted(&second.await), LENGTH);
    assert!(front.authorizer.asking.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_right_that_was_revoked_ends_within_a_minute() {
    let revoked = Arc::new(AtomicBool::new(false));
    let flag = revoked.clone();
    let front = Front::start(WhenRegistryDown::Seen, move |seen| {
        if flag.load(Ordering::SeqCst) { Reply::Say(reply(403, &[], b"")) } else { alices(seen) }
    })
    .await;
    front.ask(ALICE, "a", 'd').await;
    front.show_manifest(ALICE, "a", 'e', 5);
    revoked.store(true, Ordering::SeqCst);
    pass(YES - Duration::from_secs(1)).await;
    granted(&front.ask(ALICE, "a", 'd').await);
    granted(&front.ask(ALICE, "a", 'e').await);
    pass(Duration::from_secs(1)).await;
    assert_eq!(refused(front.ask(ALICE, "a", 'd').await).status(), 403);
    assert_eq!(refused(front.ask(ALICE, "a", 'e').await).status(), 403);
    assert_eq!(front.questions(), 5);
    // A no ends sooner.
    revoked.store(false, Ordering::SeqCst);
    pass(NO - Duration::from_secs(1)).await;
    refused(front.ask(ALICE, "a", 'd').await);
    assert_eq!(front.questions(), 5);
    pass(Duration::from_secs(1)).await;
    granted(&front.ask(ALICE, "a", 'd').await);
}

#[tokio::test]
async fn a_manifest_speaks_for_its_blobs_to_whom_it_was_given() {
    let front = Front::start(WhenRegistryDown::Seen, alices).await;
    front.show_manifest(BOB, "a", 'd', 77);
    let verdict = front.ask(BOB, "a", 'd').await;
    assert_eq!((granted(&verdict), front.questions()), (77, 0));
    let Verdict::Granted { headers, .. } = verdict else { unreachable!() };
    for (name, value) in [
        ("content-type", "application/octet-stream".to_owned()),
        ("docker-content-digest", digest('d').to_string()),
        ("etag", format!("\"{}\"", digest('d'))),
        ("docker-distribution-api-version", "registry/2.0".to_owned()),
        ("accept-ranges", "bytes".to_owned()),
        ("cache-control", "max-age=31536000".to_owned()),
    ] {
        assert_eq!(headers[name], value);
    }
    // Not in another repository, not for another blob, not for another client, not with a query that may be a key.
    refused(front.ask(BOB, "b", 'd').await);
    refused(front.ask(BOB, "a", 'e').await);
    refused(front.ask(NOBODY, "a", 'd').await);
    assert_eq!(front.questions(), 6);
    let url = format!("{}/v2/a/blobs/{}?key=1", front.base, digest('d'));
    refused(front.authorizer.blob(&origin(&url, BOB), &front.repository("a"), &digest('d')).await);
    // What the registry says about a length outlives what a manifest claims.
    granted(&front.ask(ALICE, "a", 'd').await);
    front.show_manifest(BOB, "a", 'd', 77);
    assert_eq!(granted(&front.ask(BOB, "a", 'd').await), LENGTH);
}

#[tokio::test]
async fn when_the_registry_is_down_the_policy_decides() {
    for (policy, seen, unseen) in [
        (WhenRegistryDown::Seen, true, false),
        (WhenRegistryDown::Allow, true, true),
        (WhenRegistryDown::Deny, false, false),
    ] {
        let mut front = Front::start(policy, alices).await;
        granted(&front.ask(ALICE, "a", 'd').await);
        front.show_manifest(ALICE, "b", 'e', 5);
        refused(front.ask(BOB, "a", 'd').await);
        front.registry.stop().await;
        pass(YES).await;
        for (who, name, letter, allowed) in [
            (ALICE, "a", 'd', seen),
            (ALICE, "b", 'e', seen),
            (BOB, "a", 'd', unseen),
            (NOBODY, "a", 'd', unseen),
            // Nobody ever said that this repository has that blob.
            (ALICE, "b", 'd', false),
            (ALICE, "a", 'f', false),
        ] {
            match front.ask(who, name, letter).await {
                Verdict::Granted { length, .. } => {
                    assert!(allowed, "{policy:?} {who:?} {name} {letter}");
                    assert_eq!(length, if name == "a" { LENGTH } else { 5 });
                }
                Verdict::Unavailable(error) => {
                    assert!(error.is_down() && !allowed, "{policy:?} {who:?} {name} {letter}: {error}");
                }
                other => panic!("{other:?}"),
            }
        }
        pass(SEEN).await;
        let verdict = front.ask(ALICE, "a", 'd').await;
        assert_eq!(matches!(verdict, Verdict::Granted { .. }), policy == WhenRegistryDown::Allow, "{verdict:?}");
    }
}

#[tokio::test]
async fn a_registry_with_trouble_is_down_and_one_that_refuses_is_not() {
    let status = Arc::new(std::sync::atomic::AtomicU16::new(200));
    let says = status.clone();
    let front = Front::start(WhenRegistryDown::Seen, move |seen| match says.load(Ordering::SeqCst) {
        200 => serve(BLOB, seen),
        status => Reply::Say(reply(status, &[("retry-after", "9")], b"")),
    })
    .await;
    granted(&front.ask(ALICE, "a", 'd').await);
    for trouble in [500, 503] {
        status.store(trouble, Ordering::SeqCst);
        pass(YES).await;
        assert_eq!(granted(&front.ask(ALICE, "a", 'd').await), LENGTH);
        assert!(matches!(front.ask(BOB, "a", 'd').await, Verdict::Unavailable(_)));
    }
    status.store(429, Ordering::SeqCst);
    pass(NO).await;
    let answer = refused(front.ask(ALICE, "a", 'd').await);
    assert_eq!((answer.status().as_u16(), &answer.headers()["retry-after"]), (429, &"9".parse().unwrap()));
    // Who is refused is no longer one that was seen.
    status.store(403, Ordering::SeqCst);
    pass(NO).await;
    refused(front.ask(ALICE, "a", 'd').await);
    status.store(500, Ordering::SeqCst);
    pass(NO).await;
    assert!(matches!(front.ask(ALICE, "a", 'd').await, Verdict::Unavailable(_)));
}

#[tokio::test]
async fn what_the_agent_will_not_ask_is_not_a_registry_that_is_down() {
    let authorizer = Authorizer::new(upstream().0, WhenRegistryDown::Allow);
    let repository = Repository { registry: "http://169.254.169.254:80".to_owned(), name: "a".to_owned() };
    let body = format!(r#"{{"layers":[{{"digest":"{}","size":5}}]}}"#, digest('d'));
    let content_type = "application/vnd.oci.image.manifest.v1+json";
    authorizer.saw_manifest(&repository, &HeaderMap::new(), content_type, body.as_bytes());
    let from = origin("http://169.254.169.254/v2/a/blobs/d", ALICE);
    let verdict = authorizer.blob(&from, &repository, &digest('d')).await;
    assert!(matches!(&verdict, Verdict::Unavailable(error) if !error.is_down()), "{verdict:?}");
}

#[tokio::test]
async fn registries_that_do_not_answer_head_are_asked_for_one_byte() {
    for status in [405, 501] {
        let front = Front::start(WhenRegistryDown::Seen, move |seen| match seen.method.as_str() {
            "HEAD" => Reply::Say(reply(status, &[("content-length", "0")], b"")),
            _ => serve(BLOB, seen),
        })
        .await;
        assert_eq!(granted(&front.ask(ALICE, "a", 'd').await), LENGTH);
        assert_eq!(front.registry.seen()[1].header("range"), Some("bytes=0-0"));
    }
    // A URL that was signed for GET; credentials stay at home.
    let store = Origin::start(|seen| match seen.method.as_str() {
        "HEAD" => Reply::Say(reply(403, &[("content-length", "0")], b"")),
        _ => serve(BLOB, seen),
    })
    .await;
    let to = store.url("/signed");
    let front = Front::start(WhenRegistryDown::Seen, move |seen| match seen.header("authorization") {
        Some(_) => Reply::Say(reply(307, &[("location", &to)], b"")),
        None => Reply::Say(reply(401, &[], b"")),
    })
    .await;
    assert_eq!(granted(&front.ask(ALICE, "a", 'd').await), LENGTH);
    assert!(store.seen().iter().all(|seen| seen.header("authorization").is_none()));
    assert_eq!(refused(front.ask(NOBODY, "a", 'd').await).status(), 401);
}

#[tokio::test]
async fn what_has_no_length_or_another_content_passes_through() {
    let another = digest('e').to_string();
    for headers in [
        &[("transfer-encoding", "chunked")][..],
        &[("content-length", "0")],
        &[("content-length", "ten")],
        &[("content-length", "10"), ("content-encoding", "gzip")],
        &[("content-length", "10"), ("docker-content-digest", &another)],
    ] {
        let bytes = reply(200, headers, b"");
        let front = Front::start(WhenRegistryDown::Seen, move |_| Reply::Close(bytes.clone())).await;
        let verdict = front.ask(ALICE, "a", 'd').await;
        // A length that is no number does not even get past the HTTP client.
        let broken = headers[0].1 == "ten" && matches!(verdict, Verdict::Unavailable(_));
        assert!(broken || matches!(verdict, Verdict::PassThrough), "{headers:?} {verdict:?}");
    }
}

// S17
#[tokio::test]
async fn a_verdict_prints_no_secret() {
    let front = Front::start(WhenRegistryDown::Seen, |_| {
        Reply::Say(reply(401, &[("set-cookie", "s3cret"), ("www-authenticate", "Bearer s3cret")], b""))
    })
    .await;
    let verdict = front.ask(&[("authorization", "s3cret")], "a", 'd').await;
    assert!(!format!("{verdict:?}").contains("s3cret"));
    assert_eq!(refused(verdict).headers()["www-authenticate"], "Bearer s3cret");
}
