//! What of a message's headers goes on, what stays, and what may be printed.

use std::fmt;

use http::header::{
    ACCEPT, ACCEPT_CHARSET, ACCEPT_ENCODING, ACCEPT_LANGUAGE, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE,
    DATE, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH,
    IF_RANGE, IF_UNMODIFIED_SINCE, ORIGIN, PRAGMA, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, RANGE, REFERER, TE,
    TRAILER, TRANSFER_ENCODING, UPGRADE, USER_AGENT, VIA,
};

/// Headers that speak of one connection (RFC 9110, 7.6.1), and those meant for a proxy, which the agent is.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// What a client says about the part or the form it wants, or about a body: none of it holds for the agent's own
/// request. The host is taken from the URL alone, so that it cannot name another than the one that was judged.
const ABOUT_THE_REQUEST: [HeaderName; 11] = [
    ACCEPT_ENCODING,
    CONTENT_LENGTH,
    CONTENT_TYPE,
    EXPECT,
    HOST,
    IF_MATCH,
    IF_MODIFIED_SINCE,
    IF_NONE_MATCH,
    IF_RANGE,
    IF_UNMODIFIED_SINCE,
    RANGE,
];

/// All that another host gets to see after a redirect. A list of what goes rather than of what stays, since registries
/// know other credentials than `Authorization` and `Cookie`.
const FOR_STRANGERS: [HeaderName; 4] = [ACCEPT, ACCEPT_LANGUAGE, CACHE_CONTROL, USER_AGENT];

/// Headers that say nothing about who asks. Every other one counts as part of the asker's credentials.
const ANONYMOUS: [HeaderName; 18] = [
    ACCEPT,
    ACCEPT_CHARSET,
    ACCEPT_LANGUAGE,
    CACHE_CONTROL,
    DATE,
    FORWARDED,
    ORIGIN,
    PRAGMA,
    REFERER,
    USER_AGENT,
    VIA,
    HeaderName::from_static("b3"),
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-forwarded-proto"),
    HeaderName::from_static("x-real-ip"),
    HeaderName::from_static("x-request-id"),
];

/// Removes what belongs to one connection, headers named by `Connection` included.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// The headers of the agent's own request for a blob on behalf of a client who sent `client`.
pub(super) fn for_blob(client: &HeaderMap) -> HeaderMap {
    let mut headers = client.clone();
    strip_hop_by_hop(&mut headers);
    for name in &ABOUT_THE_REQUEST {
        headers.remove(name);
    }
    // Pieces are cut from the blob itself, not from a compressed form of it.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers
}

/// What of `headers` another host may see (S25).
pub(super) fn for_stranger(headers: &HeaderMap) -> HeaderMap {
    let mut kept: HeaderMap = FOR_STRANGERS
        .iter()
        .flat_map(|name| headers.get_all(name).iter().map(|value| (name.clone(), value.clone())))
        .collect();
    kept.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    kept
}

/// Who asks, as a hash over the credentials that a request carries. It never leaves this process and is not printed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Credential([u8; 32]);

impl Credential {
    /// Reads the credentials of a request: `Authorization`, `Cookie`, and every header not known to be harmless,
    /// because there are registries that take keys in headers of their own.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let mut names: Vec<&HeaderName> = headers
            .keys()
            .filter(|name| ![&HOP_BY_HOP[..], &ABOUT_THE_REQUEST, &ANONYMOUS].iter().any(|list| list.contains(name)))
            .collect();
        names.sort_by_key(|name| name.as_str());
        let mut hasher = blake3::Hasher::new();
        for name in names {
            for value in headers.get_all(name) {
                for part in [name.as_str().as_bytes(), value.as_bytes()] {
                    // Lengths in front, so that no two sets of headers run together to the same bytes.
                    hasher.update(&(part.len() as u64).to_le_bytes());
                    hasher.update(part);
                }
            }
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The same credential together with a part of the URL that may hold one.
    #[must_use]
    pub fn with_query(self, query: Option<&str>) -> Self {
        match query {
            Some(query) => Self(*blake3::keyed_hash(&self.0, query.as_bytes()).as_bytes()),
            None => self,
        }
    }
}

impl Credential {
    /// The hash, to be hashed further.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(redacted)")
    }
}

/// Prints headers for a log: all names, and the values of those alone that cannot hold a secret (S17).
pub struct Redacted<'a>(pub &'a HeaderMap);

impl fmt::Debug for Redacted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let harmless = [ACCEPT, ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, RANGE, USER_AGENT];
        f.debug_map()
            .entries(self.0.iter().map(|(name, value)| {
                let shown = if harmless.contains(name) { value.to_str().unwrap_or("(not text)") } else { "(redacted)" };
                (name.as_str(), shown)
            }))
            .finish()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn hop_by_hop_headers_stay() {
        let mut map = headers(&[
            ("connection", "close, X-One"),
            ("connection", "x-two"),
            ("x-one", "1"),
            ("x-two", "2"),
            ("x-three", "3"),
            ("keep-alive", "timeout=5"),
            ("proxy-authorization", "Basic c2VjcmV0"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("authorization", "Bearer t"),
        ]);
        strip_hop_by_hop(&mut map);
        assert_eq!(names(&map), ["authorization", "x-three"]);
    }

    #[test]
    fn a_blob_is_asked_for_whole_and_unconditionally_and_strangers_see_little() {
        let client = headers(&[
            ("host", "elsewhere"),
            ("range", "bytes=1-"),
            ("if-none-match", "\"x\""),
            ("accept-encoding", "gzip"),
            ("authorization", "Bearer t"),
            ("cookie", "a=b"),
            ("x-registry-key", "k"),
            ("user-agent", "docker"),
        ]);
        let own = for_blob(&client);
        assert_eq!(names(&own), ["accept-encoding", "authorization", "cookie", "user-agent", "x-registry-key"]);
        assert_eq!(own[ACCEPT_ENCODING], "identity");
        assert_eq!(names(&for_stranger(&own)), ["accept-encoding", "user-agent"]);
    }

    #[test]
    fn a_credential_is_what_could_tell_two_askers_apart() {
        let of = |pairs: &[(&str, &str)]| Credential::of(&headers(pairs));
        let anonymous = of(&[]);
        assert_eq!(of(&[("user-agent", "docker"), ("range", "bytes=0-1"), ("host", "h")]), anonymous);
        let a = of(&[("authorization", "Bearer a")]);
        assert_eq!(of(&[("user-agent", "skopeo"), ("authorization", "Bearer a")]), a);
        for other in [
            of(&[("authorization", "Bearer b")]),
            of(&[("cookie", "Bearer a")]),
            of(&[("x-api-key", "Bearer a")]),
            of(&[("authorization", "Bearer a"), ("cookie", "s=1")]),
            a.with_query(Some("token=1")),
            anonymous,
        ] {
            assert_ne!(other, a);
        }
        assert_eq!(a.with_query(None), a);
    }

    // S17
    #[test]
    fn nothing_secret_is_printed() {
        let map = headers(&[
            ("authorization", "Bearer s3cret"),
            ("cookie", "s3cret"),
            ("proxy-authorization", "s3cret"),
            ("x-api-key", "s3cret"),
            ("user-agent", "docker"),
        ]);
        let text = format!("{:?} {:?}", Redacted(&map), Credential::of(&map));
        assert!(!text.contains("s3cret"), "{text}");
        assert!(text.contains("docker") && text.contains("authorization"), "{text}");
    }
}
