//! From a request to its answer: the pull side of the OCI distribution specification, v1.1.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use darter_tracker::Digest;
use http::header::{
    ACCEPT_RANGES, ALLOW, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, IF_RANGE, RANGE,
    RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::response::Builder;
use http::{Method, Request, Response, StatusCode};

use super::body::{Answer, Part};
use super::{Repository, ServedBlob, Shared};
use crate::client::MANIFEST_TYPE;

const API_VERSION: &str = "docker-distribution-api-version";
const CONTENT_DIGEST: &str = "docker-content-digest";

/// The codes of the specification's error bodies that this registry has a use for.
#[derive(Clone, Copy)]
enum Code {
    BlobUnknown,
    DigestInvalid,
    ManifestUnknown,
    NameUnknown,
    RangeInvalid,
    TooManyRequests,
    Unauthorized,
    Unsupported,
}

impl Code {
    fn parts(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::BlobUnknown => (StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "blob unknown to registry"),
            Self::DigestInvalid => (StatusCode::BAD_REQUEST, "DIGEST_INVALID", "the digest is malformed"),
            Self::ManifestUnknown => (StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "manifest unknown"),
            Self::NameUnknown => (StatusCode::NOT_FOUND, "NAME_UNKNOWN", "repository name not known to registry"),
            Self::RangeInvalid => (StatusCode::RANGE_NOT_SATISFIABLE, "RANGE_INVALID", "the blob has no such bytes"),
            Self::TooManyRequests => (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", "too many requests"),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "authentication required"),
            Self::Unsupported => (StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "this registry only serves pulls"),
        }
    }
}

/// Whether the body is wanted too.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    Body,
    Head,
}

/// Answers one request.
pub(super) fn respond<B>(shared: &Shared, request: &Request<B>) -> Response<Answer> {
    let want = match *request.method() {
        Method::GET => Want::Body,
        Method::HEAD => Want::Head,
        _ => return refuse(Response::builder().header(ALLOW, "GET, HEAD"), Code::Unsupported, Want::Body),
    };
    let given = request.headers().get(AUTHORIZATION).map(http::HeaderValue::as_bytes);
    if shared.authorization.as_deref().is_some_and(|expected| given != Some(expected.as_bytes())) {
        shared.totals.unauthorized.fetch_add(1, Ordering::Relaxed);
        let head = Response::builder().header(WWW_AUTHENTICATE, "Basic realm=\"demo registry\"");
        return refuse(head, Code::Unauthorized, want);
    }
    let Some(path) = request.uri().path().strip_prefix("/v2") else {
        return refuse(Response::builder(), Code::NameUnknown, want);
    };
    if path.is_empty() || path == "/" {
        return held(Response::builder(), "application/json", "{}".into(), want);
    }
    // A repository's name may have slashes in it, the other two parts may not.
    let mut parts = path.rsplitn(3, '/');
    let (last, kind, name) = (parts.next(), parts.next(), parts.next());
    let repository = name.and_then(|name| shared.repositories.get(name.trim_start_matches('/')));
    let (Some(last), Some(kind), Some(repository)) = (last, kind, repository) else {
        return refuse(Response::builder(), Code::NameUnknown, want);
    };
    match kind {
        "manifests" => manifest(shared, repository, last, want),
        "blobs" => blob(shared, repository, last, request.headers(), want),
        "tags" if last == "list" => tags(repository, name.unwrap_or_default().trim_start_matches('/'), want),
        _ => refuse(Response::builder(), Code::NameUnknown, want),
    }
}

fn manifest(shared: &Shared, repository: &Repository, reference: &str, want: Want) -> Response<Answer> {
    let digest = if reference.contains(':') {
        match reference.parse() {
            Ok(digest) => Some(digest),
            Err(_) => return refuse(Response::builder(), Code::DigestInvalid, want),
        }
    } else {
        repository.tags.get(reference).copied()
    };
    let found = digest.and_then(|digest| Some((digest, repository.manifests.get(&digest)?)));
    let Some((digest, manifest)) = found else {
        return refuse(Response::builder(), Code::ManifestUnknown, want);
    };
    shared.totals.manifests.fetch_add(1, Ordering::Relaxed);
    held(identified(&digest), MANIFEST_TYPE, manifest.clone(), want)
}

fn tags(repository: &Repository, name: &str, want: Want) -> Response<Answer> {
    let tags: Vec<&String> = repository.tags.keys().collect();
    let list = serde_json::json!({"name": name, "tags": tags});
    held(Response::builder(), "application/json", list.to_string().into(), want)
}

fn blob(shared: &Shared, repository: &Repository, digest: &str, asked: &HeaderMap, want: Want) -> Response<Answer> {
    let Ok(digest) = digest.parse::<Digest>() else {
        return refuse(Response::builder(), Code::DigestInvalid, want);
    };
    let served = shared.blobs.get(&digest).filter(|_| repository.blobs.contains(&digest));
    let Some(served) = served else {
        return refuse(Response::builder(), Code::BlobUnknown, want);
    };
    let length = served.blob.length();
    let mut head = identified(&digest).header(CONTENT_TYPE, "application/octet-stream");
    if shared.options.ranges {
        head = head.header(ACCEPT_RANGES, "bytes");
    }
    if want == Want::Head {
        served.count.head();
        return finish(head.header(CONTENT_LENGTH, length), Answer::empty());
    }
    if let Some(left) = shared.rest.lock().unwrap_or_else(PoisonError::into_inner).left(Instant::now()) {
        let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
        return refuse(Response::builder().header(RETRY_AFTER, seconds), Code::TooManyRequests, want);
    }
    let range = if shared.options.ranges { asked_range(asked, &digest, length) } else { Asked::Whole };
    let (head, range) = match range {
        Asked::Whole => (head, 0..length),
        Asked::Part(range) => {
            let content = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            (head.status(StatusCode::PARTIAL_CONTENT).header(CONTENT_RANGE, content), range)
        }
        Asked::Nothing => {
            let head = Response::builder().header(CONTENT_RANGE, format!("bytes */{length}"));
            return refuse(head, Code::RangeInvalid, want);
        }
    };
    let head = head.header(CONTENT_LENGTH, range.end - range.start);
    finish(head, Answer::Blob(Box::new(part(shared, served, range))))
}

fn part(shared: &Shared, served: &Arc<ServedBlob>, range: Range<u64>) -> Part {
    let digest = served.blob.digest();
    let corrupt = shared.corrupt.lock().unwrap_or_else(PoisonError::into_inner).contains(&digest);
    Part {
        blob: served.blob.clone(),
        wrong: corrupt.then_some(served.blob.length() / 2),
        pace: served.pace.clone(),
        due: None,
        taken: served.count.answer(range.clone()),
        _open: shared.totals.on_its_way(),
        left: range,
    }
}

/// What a `Range` header comes to, by RFC 9110 section 14.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// No range, one that is malformed or of several parts, or one on condition of another version.
    Whole,
    /// These bytes, at least one.
    Part(Range<u64>),
    /// Well formed, but the blob has none of it.
    Nothing,
}

fn asked_range(headers: &HeaderMap, digest: &Digest, length: u64) -> Asked {
    if headers.get(IF_RANGE).is_some_and(|tag| tag.as_bytes() != etag(digest).as_bytes()) {
        return Asked::Whole;
    }
    let range = headers.get(RANGE).and_then(|range| range.to_str().ok());
    range.and_then(|range| byte_range(range, length)).unwrap_or(Asked::Whole)
}

fn byte_range(text: &str, length: u64) -> Option<Asked> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let range = match (first.trim(), last.trim()) {
        ("", suffix) if digits(suffix) => length.saturating_sub(suffix.parse().unwrap_or(u64::MAX))..length,
        (first, "") if digits(first) => first.parse().unwrap_or(u64::MAX)..length,
        (first, last) if digits(first) && digits(last) => {
            let (first, last) = (first.parse().unwrap_or(u64::MAX), last.parse::<u64>().unwrap_or(u64::MAX));
            if last < first {
                return None;
            }
            first..length.min(last.saturating_add(1))
        }
        _ => return None,
    };
    Some(if range.is_empty() { Asked::Nothing } else { Asked::Part(range) })
}

fn etag(digest: &Digest) -> String {
    format!("\"{digest}\"")
}

fn identified(digest: &Digest) -> Builder {
    Response::builder().header(CONTENT_DIGEST, digest.to_string()).header(ETAG, etag(digest))
}

fn refuse(head: Builder, code: Code, want: Want) -> Response<Answer> {
    let (status, code, message) = code.parts();
    let body = serde_json::json!({"errors": [{"code": code, "message": message, "detail": null}]});
    held(head.status(status), "application/json", body.to_string().into(), want)
}

fn held(head: Builder, content_type: &'static str, bytes: bytes::Bytes, want: Want) -> Response<Answer> {
    let head = head.header(CONTENT_TYPE, content_type).header(CONTENT_LENGTH, bytes.len());
    finish(head, if want == Want::Body { Answer::Held(Some(bytes)) } else { Answer::empty() })
}

fn finish(head: Builder, body: Answer) -> Response<Answer> {
    // Every header above is printable ASCII, so the fallback is never taken.
    head.header(API_VERSION, "registry/2.0").body(body).unwrap_or_else(|_| Response::new(Answer::empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_rfc_says() {
        for (text, asked) in [
            ("bytes=0-0", Some(Asked::Part(0..1))),
            ("bytes=0-99", Some(Asked::Part(0..100))),
            ("bytes=10-", Some(Asked::Part(10..100))),
            ("bytes=90-500", Some(Asked::Part(90..100))),
            ("bytes=-1", Some(Asked::Part(99..100))),
            ("bytes=-500", Some(Asked::Part(0..100))),
            ("bytes=0-99999999999999999999999", Some(Asked::Part(0..100))),
            ("bytes=100-", Some(Asked::Nothing)),
            ("bytes=100-200", Some(Asked::Nothing)),
            ("bytes=99999999999999999999999-", Some(Asked::Nothing)),
            ("bytes=-0", Some(Asked::Nothing)),
            ("bytes=5-4", None),
            ("bytes=-", None),
            ("bytes=0-1,5-6", None),
            ("bytes=+1-2", None),
            ("items=0-1", None),
            ("", None),
        ] {
            assert_eq!(byte_range(text, 100), asked, "{text}");
        }
        assert_eq!(byte_range("bytes=0-", 0), Some(Asked::Nothing));
    }
}
