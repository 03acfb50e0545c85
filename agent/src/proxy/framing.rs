//! What of a request's head two readers could take for different requests: refused before anything else is decided (S29).
//!
//! Most of it never gets here. The HTTP library refuses lengths that differ or are no numbers, a body that is chunked in
//! HTTP/1.0 or not chunked last, folded lines, and spaces where none belong. Where a length stands beside chunks it goes by
//! the chunks, forgets the length, and closes the connection, as RFC 9112, section 6.3 has it.

use http::header::{HOST, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Request, Version};
use hyper::body::Body;

use super::address::HostPort;
use super::respond::Refusal;

/// Says why a request is none that can be passed on.
pub(super) fn check<B: Body>(request: &Request<B>) -> Result<(), Refusal> {
    host(request.version(), request.headers())?;
    let mut codings = request.headers().get_all(TRANSFER_ENCODING).iter();
    let chunks = codings.next().is_none_or(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"));
    if !chunks || codings.next().is_some() {
        // Passed on without its name, a coding would become a part of the body.
        return Err(Refusal::Malformed("chunked is the only transfer coding"));
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
