//! What a request is about, judged by its path alone and once.
//!
//! Only a path in exactly the form that the OCI distribution specification gives is taken for a blob or a manifest.
//! Anything with an escape, an empty segment or a dot segment could mean one thing here and another at the registry,
//! so it is nothing special: it passes through as it came, and the registry judges it by itself (S28).

use darter_tracker::Digest;

/// Longest repository name, as the specification advises clients to assume.
const NAME_BYTES_MAX: usize = 255;

/// Longest tag, by the specification's grammar.
const TAG_BYTES_MAX: usize = 128;

/// What a path is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// `/v2/<name>/blobs/<digest>` with a digest that can be checked here.
    Blob {
        /// The repository's name.
        name: String,
        /// The blob's digest.
        digest: Digest,
    },
    /// `/v2/<name>/blobs/<something that is no digest>`.
    MalformedDigest,
    /// `/v2/<name>/manifests/<tag or digest>`.
    Manifest {
        /// The repository's name.
        name: String,
        /// The reference, if it is a digest.
        digest: Option<Digest>,
    },
    /// Everything else.
    Other,
}

/// Judges the path of a request.
pub(super) fn route(path: &str) -> Route {
    let Some(rest) = path.strip_prefix("/v2/") else { return Route::Other };
    if let Some((name, digest)) = rest.rsplit_once("/blobs/").filter(|(name, _)| is_name(name)) {
        return blob(name, digest);
    }
    match rest.rsplit_once("/manifests/") {
        Some((name, reference)) if is_name(name) && is_reference(reference) => {
            Route::Manifest { name: name.to_owned(), digest: reference.parse().ok() }
        }
        _ => Route::Other,
    }
}

/// The tag that a path is about, if it is about one.
pub(super) fn tag(path: &str) -> Option<&str> {
    let is_tag = matches!(route(path), Route::Manifest { digest: None, .. });
    path.rsplit_once("/manifests/").map(|(_, tag)| tag).filter(|_| is_tag)
}

fn blob(name: &str, text: &str) -> Route {
    // An upload's status, or something that the registry would read differently.
    if text == "uploads" || text.contains(['/', '%']) {
        return Route::Other;
    }
    match text.parse() {
        Ok(digest) => Route::Blob { name: name.to_owned(), digest },
        // A well-formed digest of an algorithm that is not checked here: some registry may know it.
        Err(_) if is_foreign_digest(text) => Route::Other,
        Err(_) => Route::MalformedDigest,
    }
}

/// `algorithm:encoded` by the grammar of the image specification, other than the two that are known here.
fn is_foreign_digest(text: &str) -> bool {
    let Some((algorithm, encoded)) = text.split_once(':') else { return false };
    let component = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let known = algorithm == "sha256" || algorithm == "sha512";
    let character = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'=' | b'_' | b'-');
    !known
        && algorithm.split(['+', '.', '_', '-']).all(component)
        && !encoded.is_empty()
        && encoded.bytes().all(character)
}

/// The specification's grammar for names: components of lower-case letters and digits, joined by `.`, `_`, `__` or
/// any number of `-`, separated by single slashes.
fn is_name(name: &str) -> bool {
    name.len() <= NAME_BYTES_MAX && name.split('/').all(is_component)
}

fn is_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = component.bytes().next().is_some_and(alphanumeric) && component.bytes().last().is_some_and(alphanumeric);
    let separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    ends && separators.into_iter().all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

fn is_reference(reference: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let tag = reference.len() <= TAG_BYTES_MAX
        && reference.bytes().next().is_some_and(word)
        && reference.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'));
    tag || reference.parse::<Digest>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Case, escapes, dots and doubled slashes are where routers and registries disagree (S28).
    #[test]
    fn only_the_plain_form_is_a_blob() {
        let hex = "ab".repeat(32);
        let good = format!("sha256:{hex}");
        for name in ["a", "library/busybox", "a/b/c", "a.b_c__d---e/f0", "blobs/blobs"] {
            let path = format!("/v2/{name}/blobs/{good}");
            assert!(matches!(route(&path), Route::Blob { name: n, .. } if n == name), "{path}");
        }
        for path in [
            format!("/v2//blobs/{good}"),
            format!("/v2/a//b/blobs/{good}"),
            format!("//v2/a/blobs/{good}"),
            format!("/v2/../v2/a/blobs/{good}"),
            format!("/v2/a/../b/blobs/{good}"),
            format!("/v2/./a/blobs/{good}"),
            format!("/v2/a%2fb/blobs/{good}"),
            format!("/v2/a/blobs/sha256%3A{hex}"),
            format!("/v2/a/%62lobs/{good}"),
            format!("/V2/a/blobs/{good}"),
            format!("/v2/A/blobs/{good}"),
            format!("/v2/a.-b/blobs/{good}"),
            format!("/v2/a___b/blobs/{good}"),
            format!("/v2/-a/blobs/{good}"),
            format!("/v2/{}/blobs/{good}", "a".repeat(256)),
            format!("/v2/a/blobs/{good}/"),
            format!("/v2/a/blobs/{good}/x"),
            format!("/v1/a/blobs/{good}"),
            format!("/v2/a/blobs/blake3:{hex}"),
            format!("/v2/a/blobs/sha256+b64:{hex}"),
            "/v2/a/blobs/uploads".into(),
            "/v2/a/blobs/uploads/".into(),
            "/v2/a/blobs/uploads/0a1b".into(),
            "/v2/a/tags/list".into(),
            "/v2/".into(),
            "/".into(),
        ] {
            assert_eq!(route(&path), Route::Other, "{path}");
        }
        for text in ["", "x", "sha256:", &format!("sha256:{hex}0"), &format!("SHA256:{hex}"), "sha256:..", "a:b:c"] {
            assert_eq!(route(&format!("/v2/a/blobs/{text}")), Route::MalformedDigest, "{text}");
        }
    }

    #[test]
    fn manifests_are_tags_and_digests() {
        let good = format!("sha256:{}", "ab".repeat(32));
        for reference in ["latest", "v1.2-rc_3", &good] {
            let expected = Route::Manifest { name: "a/b".into(), digest: reference.parse().ok() };
            let path = format!("/v2/a/b/manifests/{reference}");
            assert_eq!(route(&path), expected);
            assert_eq!(tag(&path), (reference != good).then_some(reference));
        }
        for reference in ["", ".x", "a/b", "sha256:ab", "a%2fb"] {
            let path = format!("/v2/a/b/manifests/{reference}");
            assert_eq!((route(&path), tag(&path)), (Route::Other, None), "{reference}");
        }
    }

    proptest! {
        #[test]
        fn nothing_odd_is_ever_a_blob(path in "/v2/[a-z/.%_-]{0,12}/blobs/sha256:[a-f0-9]{64}") {
            if let Route::Blob { name, .. } = route(&path) {
                prop_assert!(!name.contains("//") && !name.contains("..") && !name.contains('%'));
                prop_assert!(!name.starts_with('/') && !name.ends_with('/'));
            }
        }
    }
}
