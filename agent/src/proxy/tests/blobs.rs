//! Blobs: which bytes with which status, who may have them, and what happens when the swarm fails.

use std::sync::Mutex;

use bytes::Bytes;
use darter_tracker::Digest;
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::support::{PATIENCE, Registry, Setup, Swarm, blob_bytes, blob_path, hello, request};
use crate::admin::metrics::{FallbackLabel, FallbackReason};
use crate::proxy::seam::Verdict;

/// Where the blob is that the registry has.
fn hello_path() -> String {
    format!("/v2/library/busybox/blobs/{}", Digest::Sha256(Sha256::digest(b"from the registry").into()))
}

#[tokio::test]
async fn a_blob_is_answered_as_the_registry_would() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup::of(&registry).start().await;
    for (range, status, content_range, bytes) in [
        (None, 200, None, 0..1500),
        (Some("bytes=500-1499"), 206, Some("bytes 500-1499/1500"), 500..1500),
        (Some("bytes=500-"), 206, Some("bytes 500-1499/1500"), 500..1500),
        (Some("bytes=-500"), 206, Some("bytes 1000-1499/1500"), 1000..1500),
        (Some("bytes=1000-5000"), 206, Some("bytes 1000-1499/1500"), 1000..1500),
        (Some("bytes=0-0"), 206, Some("bytes 0-0/1500"), 0..1),
        (Some("bytes=500-0"), 416, None, 0..0),
        (Some("bytes=2000-5000"), 416, Some("bytes */1500"), 0..0),
        (Some("lines=1-2"), 416, None, 0..0),
    ] {
        let headers: Vec<_> = range.iter().map(|range| ("range", *range)).collect();
        let (head, body) = proxy.get(&blob_path(1), &headers).await;
        assert_eq!(head.status, status, "{range:?}");
        let text = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(text("content-range").as_deref(), content_range, "{range:?}");
        if head.status.is_success() {
            assert_eq!(&body[..], &blob_bytes()[bytes.clone()], "{range:?}");
            assert_eq!(text("content-length"), Some(bytes.len().to_string()), "{range:?}");
            assert_eq!(text("accept-ranges").as_deref(), Some("bytes"));
            assert_eq!(text("docker-content-digest").as_deref(), Some("sha256:abc"));
            assert_eq!(text("etag").as_deref(), Some("\"sha256:abc\""));
        }
    }
    assert!(registry.take().is_empty(), "nothing of this needs the registry");
    assert_eq!(proxy.metrics.client_bytes.get(), 1500 + 1000 + 1000 + 500 + 500 + 1);
    let (repository, url) = proxy.authorize.asked.lock().unwrap()[0].clone();
    assert_eq!(
        (repository.registry.as_str(), repository.name.as_str()),
        ("http://registry.example:80", "library/busybox")
    );
    assert_eq!(url, format!("http://registry.example{}", blob_path(1)));
}

#[tokio::test]
async fn what_the_registry_knows_better_it_answers_itself() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup::of(&registry).start().await;
    for headers in [
        [("range", "bytes=0-1,4-5"), ("x-a", "b")],
        [("range", "bytes=-0"), ("x-a", "b")],
        [("range", "bytes=0-1"), ("if-range", "\"x\"")],
        [("if-none-match", "\"sha256:abc\""), ("x-a", "b")],
        [("if-match", "*"), ("x-a", "b")],
    ] {
        let (head, body) = proxy.get(&hello_path(), &headers).await;
        assert_eq!((head.status, &body[..]), (StatusCode::OK, &b"from the registry"[..]));
        let seen = registry.one();
        for (name, value) in headers {
            assert_eq!(seen.headers[name], value);
        }
    }
    assert_eq!(proxy.opened(), 0);
    assert_eq!(proxy.metrics.passed_bytes.get(), 5 * 17);
}

// D8, S20: the swarm is not even asked where the registry would refuse.
#[tokio::test]
async fn a_refused_client_gets_the_registrys_own_words() {
    let registry = Registry::start(None, hello).await;
    let verdict = || {
        let answer = Response::builder()
            .status(401)
            .header("www-authenticate", "Bearer realm=\"https://auth.example/token\"")
            .header("content-type", "application/json");
        Verdict::Refused(answer.body(Bytes::from("{\"errors\":[]}")).unwrap())
    };
    let proxy = Setup { verdict, ..Setup::of(&registry) }.start().await;
    for headers in [&[][..], &[("range", "bytes=9999-")], &[("range", "nonsense")]] {
        let (head, body) = proxy.get(&blob_path(1), headers).await;
        assert_eq!(head.status, 401);
        assert_eq!(head.headers["www-authenticate"], "Bearer realm=\"https://auth.example/token\"");
        assert_eq!(&body[..], b"{\"errors\":[]}");
    }
    assert_eq!((proxy.opened(), proxy.metrics.client_bytes.get()), (0, 0));

    let verdict = || Verdict::Unavailable("down".into());
    let proxy = Setup { verdict, ..Setup::of(&registry) }.start().await;
    assert_eq!(proxy.get(&blob_path(1), &[]).await.0.status, 503);
    assert_eq!((proxy.opened(), registry.take().len()), (0, 0));
}

#[tokio::test]
async fn blobs_without_length_or_bytes_pass_through() {
    let registry = Registry::start(None, hello).await;
    let empty = || Verdict::Granted { length: 0, headers: http::HeaderMap::new() };
    for verdict in [(|| Verdict::PassThrough) as fn() -> Verdict, empty] {
        let proxy = Setup { verdict, ..Setup::of(&registry) }.start().await;
        assert_eq!(&proxy.get(&hello_path(), &[]).await.1[..], b"from the registry");
        // D7: what has another digest is never whole.
        assert_eq!(proxy.get(&blob_path(1), &[]).await.0.status, 502);
        assert_eq!((proxy.opened(), registry.take().len()), (0, 2));
    }
}

// D11.
#[tokio::test]
async fn the_registry_delivers_when_the_swarm_does_not_begin() {
    let registry = Registry::start(None, hello).await;
    for swarm in [Swarm::FailsToOpen, Swarm::FailsAtFirst, Swarm::EndsAtFirst] {
        let proxy = Setup { swarm, ..Setup::of(&registry) }.start().await;
        let headers = [("range", "bytes=0-99"), ("authorization", "Bearer t")];
        let (head, body) = proxy.get(&blob_path(1), &headers).await;
        assert_eq!((head.status, &body[..]), (StatusCode::OK, &b"from the registry"[..]));
        let seen = registry.one();
        assert_eq!(
            (&seen.headers["range"], &seen.headers["authorization"]),
            (&"bytes=0-99".parse().unwrap(), &"Bearer t".parse().unwrap())
        );
        let label = FallbackLabel { reason: FallbackReason::NoCache };
        assert_eq!(proxy.metrics.fallbacks.get_or_create(&label).get(), 1);
    }
}

// D7: the registry's own answer would be the wrong bytes, unchecked.
#[tokio::test]
async fn the_registry_does_not_deliver_what_is_known_to_be_wrong() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup { swarm: Swarm::IsWrong, ..Setup::of(&registry) }.start().await;
    assert_eq!(proxy.get(&blob_path(1), &[]).await.0.status, StatusCode::BAD_GATEWAY);
    assert_eq!((proxy.opened(), registry.take().len()), (1, 0));
}

#[tokio::test]
async fn a_failure_midway_cuts_the_connection() {
    let registry = Registry::start(None, hello).await;
    for failure in [Some(Err(std::io::Error::other("gone"))), None, Some(Ok(Bytes::from(vec![2; 1001])))] {
        let (give, given) = mpsc::channel(1);
        let proxy = Setup { swarm: Swarm::Waits(Mutex::new(Some(given))), ..Setup::of(&registry) }.start().await;
        give.send(Ok(Bytes::from(vec![1; 500]))).await.unwrap();
        let answer = proxy.send(request("GET", &blob_path(1), &[])).await;
        assert_eq!((answer.status(), answer.headers()["content-length"].to_str().unwrap()), (StatusCode::OK, "1500"));
        let mut body = answer.into_body();
        timeout(PATIENCE, body.frame()).await.unwrap().unwrap().unwrap();
        if let Some(failure) = failure {
            give.send(failure).await.unwrap();
        }
        drop(give);
        let rest = timeout(PATIENCE, body.collect()).await.unwrap();
        assert!(rest.is_err(), "a short body must not look whole");
    }
    assert!(registry.take().is_empty());
}

#[tokio::test]
async fn bytes_reach_the_client_while_others_are_awaited() {
    let registry = Registry::start(None, hello).await;
    let (give, given) = mpsc::channel(1);
    let proxy = Setup { swarm: Swarm::Waits(Mutex::new(Some(given))), ..Setup::of(&registry) }.start().await;
    give.send(Ok(Bytes::from(vec![1; 500]))).await.unwrap();
    let mut body = proxy.send(request("GET", &blob_path(1), &[])).await.into_body();
    let first = timeout(PATIENCE, body.frame()).await.unwrap().unwrap().unwrap();
    assert_eq!(first.into_data().unwrap().len(), 500);
    give.send(Ok(Bytes::from(vec![2; 1000]))).await.unwrap();
    assert_eq!(timeout(PATIENCE, body.collect()).await.unwrap().unwrap().to_bytes().len(), 1000);
}

#[tokio::test(start_paused = true)]
async fn headers_do_not_wait_for_bytes_for_ever() {
    let registry = Registry::start(None, hello).await;
    let (give, given) = mpsc::channel(2);
    let proxy = Setup { swarm: Swarm::Waits(Mutex::new(Some(given))), ..Setup::of(&registry) }.start().await;
    let answer = proxy.send(request("GET", &blob_path(1), &[])).await;
    assert_eq!(answer.status(), 200);
    give.send(Ok(Bytes::from(blob_bytes()))).await.unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), blob_bytes());
}
