//! A right that ends while the blob is in the cache: nobody reads a byte of it once a minute has passed (D8).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body_util::BodyExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::support::{Swarm, TestBlobs, blob_bytes, blob_path, exchange, mirror_of, pass, request};
use crate::proxy::Proxy;
use crate::proxy::authorize::{Authorizer, WhenRegistryDown};
use crate::source::registry::testing::{Origin, Reply, reply, serve, upstream};

/// How long a yes holds.
const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn who_was_revoked_gets_nothing_after_a_minute() {
    let revoked = Arc::new(AtomicBool::new(false));
    let ended = revoked.clone();
    let registry = Origin::start(move |seen| match seen.header("authorization") {
        Some("Basic alice") if !ended.load(Ordering::SeqCst) => serve(&blob_bytes(), seen),
        Some("Basic carol") => serve(&blob_bytes(), seen),
        _ => Reply::Say(reply(403, &[], b"")),
    })
    .await;
    let (upstream, metrics) = upstream();
    let authorizer = Arc::new(Authorizer::new(upstream.clone(), WhenRegistryDown::Seen));
    let blobs = Arc::new(TestBlobs { swarm: Swarm::Gives, opened: AtomicUsize::new(0) });
    let proxy =
        Arc::new(Proxy::new(&mirror_of(registry.url("")), upstream, authorizer, blobs.clone(), metrics).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let _serving = AbortOnDropHandle::new(tokio::spawn(proxy.serve(listener, CancellationToken::new())));
    let get = async |who: &str, range: Option<&str>| -> (StatusCode, Bytes) {
        let mut headers = vec![("authorization", who)];
        headers.extend(range.map(|range| ("range", range)));
        let stream = TcpStream::connect(address).await.unwrap();
        let answer = exchange(stream, request("GET", &blob_path(1), &headers)).await.unwrap();
        (answer.status(), answer.into_body().collect().await.unwrap().to_bytes())
    };

    assert_eq!(get("Basic alice", None).await, (StatusCode::OK, blob_bytes().into()));
    revoked.store(true, Ordering::SeqCst);
    pass(MINUTE - Duration::from_secs(1)).await;
    assert_eq!(get("Basic alice", Some("bytes=0-0")).await.0, StatusCode::PARTIAL_CONTENT, "it was allowed to");
    pass(Duration::from_secs(1)).await;
    let opened = blobs.opened.load(Ordering::SeqCst);
    for range in [None, Some("bytes=0-0"), Some("bytes=1499-1499"), Some("bytes=-1"), Some("bytes=7-")] {
        assert_eq!(get("Basic alice", range).await, (StatusCode::FORBIDDEN, Bytes::new()), "{range:?}");
    }
    assert_eq!(blobs.opened.load(Ordering::SeqCst), opened, "not even begun");
    // Of somebody else it says nothing.
    assert_eq!(get("Basic carol", None).await, (StatusCode::OK, blob_bytes().into()));
}
