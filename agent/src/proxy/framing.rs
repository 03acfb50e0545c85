//! What of a request's head two readers could take for different requests: refused before anything else is decided (S29).
//!
//! Most of it never gets here. The HTTP libraries refuse lengths that differ or are no numbers, a body that is chunked in
//! HTTP/1.0 or not chunked last, folded lines, and spaces where none belong; in HTTP/2 also a length that its frames do not have,
//! and every header that speaks of one connection. A length beside chunks they take back; [`heads`] remembers that it was there.

pub(super) mod heads;

use http::header::{CONTENT_LENGTH, COOKIE, HOST, HeaderValue, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, Method, Request, Version};
use hyper::body::Body;

use super::address::HostPort;
use super::respond::Refusal;

/// Header fields of a request; more are answered with 431.
pub(super) const HEADERS_MAX: usize = 100;

/// Bytes of a request's line and headers; more are answered with 431. Registry tokens of 8 KiB are seen in the field.
pub(super) const HEADER_BYTES_MAX: usize = 32 * 1024;

/// Whether a request's body is told by chunks, after which a connection is not used for another.
pub(super) fn is_chunked<B>(request: &Request<B>) -> bool {
    request.headers().contains_key(TRANSFER_ENCODING)
}

/// Makes one header of the cookies that HTTP/2 may send apart and HTTP/1.1 may not (RFC 9113, section 8.2.3).
pub(super) fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() < 2 {
        return;
    }
    // Values that are one each are one with this between them.
    if let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(COOKIE, whole);
    }
}

/// Says why a request is none that can be passed on.
pub(super) fn check<B: Body>(request: &Request<B>) -> Result<(), Refusal> {
    // The HTTP/2 library counts bytes alone.
    if request.headers().len() > HEADERS_MAX {
        return Err(Refusal::TooManyHeaders);
    }
    host(request.version(), request.headers())?;
    // HTTP/1.1 has made one of those that are the same, and HTTP/2 goes by the first.
    if request.headers().get_all(CONTENT_LENGTH).iter().nth(1).is_some() {
        return Err(Refusal::Malformed("a request has at most one length"));
    }
    let mut codings = request.headers().get_all(TRANSFER_ENCODING).iter();
    let chunks = codings.next().is_none_or(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"));
    if !chunks || codings.next().is_some() {
        // Passed on without its name, a coding would become a part of the body.
        return Err(Refusal::Malformed("chunked is the only transfer coding"));
    }
    if request.headers().contains_key(UPGRADE) {
        // Whoever asked for it might take what follows for the other protocol.
        return Err(Refusal::Malformed("a connection goes on in the protocol that it has"));
    }
    if *request.method() == Method::CONNECT && !request.body().is_end_stream() {
        return Err(Refusal::Malformed("a CONNECT has no body"));
    }
    Ok(())
}

/// One Host header that could be a host, or is empty (RFC 9112, section 3.2). Older and newer versions may do without.
fn host(version: Version, headers: &HeaderMap) -> Result<(), Refusal> {
    let mut hosts = headers.get_all(HOST).iter();
    let good = match (hosts.next(), hosts.next()) {
        (None, _) => version != Version::HTTP_11,
        (Some(host), None) => {
            host.is_empty() || host.to_str().is_ok_and(|text| HostPort::parse(text, Some(443)).is_ok())
        }
        (Some(_), Some(_)) => false,
    };
    if good { Ok(()) } else { Err(Refusal::Malformed("a request has exactly one Host header")) }
}
