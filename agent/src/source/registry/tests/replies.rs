//! Replies that are wrong in one way each.

use std::time::Duration;

use super::*;

/// Fetches bytes 5 to 9 of the blob from a registry that always replies so.
async fn fetched(reply: Vec<u8>) -> Result<Vec<u8>, OriginError> {
    let registry = Origin::start(move |_| Reply::Close(reply.clone())).await;
    let (upstream, _) = upstream();
    read_all(upstream.fetch(&origin(&registry.url("/b"), &[]), 5..10, LENGTH).await?).await
}

const RANGE: (&str, &str) = ("content-range", "bytes 5-9/36");
const CHUNKED: (&str, &str) = ("transfer-encoding", "chunked");

#[tokio::test]
async fn a_reply_is_taken_if_it_is_exactly_what_was_asked_for() {
    for right in [
        reply(206, &[RANGE], b"56789"),
        reply(206, &[RANGE, ("content-encoding", "Identity")], b"56789"),
        reply(206, &[RANGE, CHUNKED], b"2\r\n56\r\n3\r\n789\r\n0\r\n\r\n"),
    ] {
        assert_eq!(fetched(right).await.unwrap(), b"56789");
    }
}

#[tokio::test]
async fn a_reply_that_contradicts_is_broken() {
    for wrong in [
        reply(206, &[("content-range", "bytes 5-9/*")], b"56789"),
        reply(206, &[("content-type", "multipart/byteranges; boundary=x")], b"56789"),
        reply(206, &[RANGE, RANGE], b"56789"),
        reply(206, &[RANGE, ("content-length", "6")], b"567890"),
        reply(206, &[RANGE, CHUNKED], b"4\r\n5678\r\n0\r\n\r\n"),
        reply(206, &[RANGE, CHUNKED], b"6\r\n567890\r\n0\r\n\r\n"),
        reply(204, &[], b""),
        reply(304, &[], b""),
        reply(300, &[], b""),
        reply(302, &[], b""),
    ] {
        let text = String::from_utf8_lossy(&wrong).into_owned();
        let error = fetched(wrong).await.unwrap_err();
        assert!(matches!(error, OriginError::Broken(_)), "{text}: {error}");
        assert!(error.is_retryable());
    }
}

#[tokio::test]
async fn who_serves_none_of_the_parts_other_ones_or_encoded_ones_serves_no_ranges() {
    for wrong in [
        reply(416, &[("content-range", "bytes */3")], b""),
        reply(206, &[("content-range", "bytes 4-8/36")], b"45678"),
        reply(206, &[("content-range", "bytes 5-8/36")], b"5678"),
        reply(206, &[RANGE, ("content-encoding", "gzip")], b"56789"),
    ] {
        let text = String::from_utf8_lossy(&wrong).into_owned();
        let error = fetched(wrong).await.unwrap_err();
        assert!(matches!(error, OriginError::NoRange) && !error.is_retryable(), "{text}: {error}");
    }
}

#[tokio::test]
async fn another_length_is_not_asked_for_again() {
    let error = fetched(reply(206, &[("content-range", "bytes 5-9/37")], b"56789")).await.unwrap_err();
    assert!(matches!(error, OriginError::OtherLength) && !error.is_retryable() && !error.is_down(), "{error}");
}

#[tokio::test]
async fn a_reply_that_breaks_off_is_cut() {
    for short in
        [reply(206, &[RANGE, ("content-length", "5")], b"567"), reply(206, &[RANGE, CHUNKED], b"2\r\n56\r\n3\r\n7")]
    {
        let error = fetched(short).await.unwrap_err();
        assert!(matches!(error, OriginError::Cut(_)) && error.is_retryable(), "{error}");
    }
    // Nothing that could be taken for a complete reply, and no head at all.
    for none in [Vec::new(), b"HTTP/1.1 206".to_vec(), b"SSH-2.0-x\r\n\r\n".to_vec()] {
        let error = fetched(none).await.unwrap_err();
        assert!(matches!(error, OriginError::Unreachable(UpstreamError::Exchange { .. })), "{error}");
        assert!(error.is_down());
    }
    // S26: a head without end is not collected.
    let endless = format!("HTTP/1.1 206 x\r\nx: {}\r\n\r\n", "y".repeat(1024 * 1024));
    assert!(matches!(fetched(endless.into()).await, Err(OriginError::Unreachable(_))));
}

#[tokio::test]
async fn the_whole_blob_is_taken_only_where_it_was_asked_for() {
    let error = fetched(reply(200, &[], BLOB)).await.unwrap_err();
    assert!(matches!(error, OriginError::NoRange), "{error}");
    let (upstream, _) = upstream();
    for (reply, works) in [
        (reply(200, &[], BLOB), true),
        (reply(200, &[], &BLOB[1..]), false),
        (reply(200, &[CHUNKED], &[b"24\r\n", BLOB, b"\r\n0\r\n\r\n"].concat()), true),
        (reply(200, &[CHUNKED], b"0\r\n\r\n"), false),
        (reply(200, &[("content-encoding", "gzip")], BLOB), false),
    ] {
        let registry = Origin::start(move |_| Reply::Close(reply.clone())).await;
        match upstream.fetch(&origin(&registry.url("/b"), &[]), 0..LENGTH, LENGTH).await {
            Ok(body) if works => assert_eq!(&read_all(body).await.unwrap()[..], BLOB),
            Ok(body) => assert!(matches!(read_all(body).await, Err(OriginError::Broken(_)))),
            Err(error) => {
                assert!(
                    !works && matches!(error, OriginError::Broken(_) | OriginError::OtherLength | OriginError::NoRange),
                    "{error}"
                )
            }
        }
    }
    let from = origin("http://127.0.0.1:1/b", &[]);
    for nonsense in [0..0, 5..LENGTH + 1] {
        assert!(matches!(upstream.fetch(&from, nonsense, LENGTH).await, Err(OriginError::Broken(_))));
    }
}

#[tokio::test]
async fn a_refusal_is_the_registrys_own_answer() {
    for status in [401, 403, 404, 400] {
        let challenge = ("www-authenticate", "Bearer realm=\"https://auth.example.org/token\"");
        let error = fetched(reply(status, &[challenge], b"{\"errors\":[]}")).await.unwrap_err();
        assert!(!error.is_retryable() && !error.is_down());
        let OriginError::Refused { answer, by_registry: true } = error else { panic!("{error}") };
        assert_eq!(answer.status(), status);
        assert_eq!(answer.headers()["www-authenticate"], challenge.1);
        assert_eq!(answer.body(), "{\"errors\":[]}");
    }
    let error = fetched(reply(403, &[("set-cookie", "s3cret")], &[b'x'; 100_000])).await.unwrap_err();
    assert!(!format!("{error:?} {error}").contains("s3cret"));
    let OriginError::Refused { answer, .. } = error else { panic!("{error}") };
    assert_eq!(answer.body().len(), 64 * 1024);
    for status in [500, 502, 504] {
        let error = fetched(reply(status, &[], b"")).await.unwrap_err();
        assert!(matches!(error, OriginError::Failed(_)) && error.is_down() && error.is_retryable(), "{error}");
    }
}

#[tokio::test]
async fn a_busy_registry_is_left_alone_by_those_it_said_so_to() {
    let registry = Origin::start(|seen| match seen.header("authorization") {
        Some(_) => serve(BLOB, seen),
        None => Reply::Say(reply(429, &[("retry-after", "20")], b"slow down")),
    })
    .await;
    let (upstream, _) = upstream();
    let from = origin(&registry.url("/b"), &[]);
    let error = upstream.fetch(&from, 5..10, LENGTH).await.unwrap_err();
    let OriginError::Busy { retry_after, answer: Some(answer) } = error else { panic!("{error}") };
    assert_eq!((retry_after, answer.body().as_ref()), (Duration::from_secs(20), &b"slow down"[..]));
    let error = upstream.fetch(&from, 5..10, LENGTH).await.unwrap_err();
    let OriginError::Busy { retry_after, answer: None } = error else { panic!("{error}") };
    assert!(retry_after > Duration::from_secs(10));
    assert_eq!(registry.seen().len(), 1);
    let other = origin(&registry.url("/b"), &[("authorization", "a")]);
    assert!(upstream.fetch(&other, 5..10, LENGTH).await.is_ok());
}

#[tokio::test]
async fn a_registry_that_stops_sending_is_given_up() {
    let registry = Origin::start(|_| Reply::Hang(reply(206, &[RANGE, ("content-length", "5")], b"567"))).await;
    let (upstream, metrics) = upstream();
    let mut body = upstream.fetch(&origin(&registry.url("/b"), &[]), 5..10, LENGTH).await.unwrap();
    assert_eq!(body.read(100).await.unwrap().unwrap(), "567");
    // From here on nothing can come: the clock jumps to the next timer.
    tokio::time::pause();
    let error = body.read(100).await.unwrap_err();
    assert!(matches!(error, OriginError::Stalled) && error.is_retryable(), "{error}");
    assert_eq!(metrics.registry_bytes.get(), 3);
}

#[tokio::test]
async fn a_body_that_is_dropped_closes_its_connection() {
    let length = 64 * 1024 * 1024;
    let head =
        format!("HTTP/1.1 206 x\r\ncontent-range: bytes 0-{}/{length}\r\ncontent-length: {length}\r\n\r\n", length - 1);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (upstream, _) = upstream();
    let serving = async {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut stream, _) = listener.accept().await.unwrap();
        // Some of the request: nobody answers before he is asked.
        stream.read_u8().await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let chunk = vec![0; 64 * 1024];
        let mut sent = 0;
        // Until the other side is gone.
        while stream.write_all(&chunk).await.is_ok() {
            sent += chunk.len();
        }
        sent
    };
    let reading = async {
        let mut body = upstream.fetch(&origin(&format!("http://{address}/b"), &[]), 0..length, length).await.unwrap();
        assert!(body.read(1000).await.unwrap().is_some());
    };
    let (sent, ()) =
        tokio::time::timeout(Duration::from_secs(20), futures_util::future::join(serving, reading)).await.unwrap();
    assert!(sent < length as usize, "{sent}");
}
