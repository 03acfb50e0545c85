//! Which blobs a manifest lists, and nothing else of it (S27).
//!
//! The bytes that a client gets are the registry's own, with the registry's own type. What is read here only says which
//! blobs a credential that was given the manifest may have, and how long they claim to be: a claim of whoever pushed
//! it, which the registry's first ranged reply confirms or contradicts.

use std::borrow::Cow;
use std::collections::BTreeSet;

use darter_tracker::Digest;
use serde::Deserialize;

/// Bytes of a manifest that are looked at (S26); registries refuse larger ones too. A larger one still passes through.
pub const MANIFEST_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Entries of one manifest that count. Images have up to 127 layers; what is listed beyond is asked for one by one.
const ENTRIES_MAX: usize = 1024;

/// One entry of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Of what.
    pub digest: Digest,
    /// Bytes that the manifest says it has; never zero.
    pub size: u64,
}

/// What a manifest lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Config and layers, in the manifest's order, each once.
    pub blobs: Vec<Descriptor>,
    /// Which of them is the config.
    pub config: Option<Digest>,
    /// The manifests of an index.
    pub manifests: Vec<Descriptor>,
}

impl Manifest {
    /// Reads an OCI image manifest or index, or a Docker schema 2 manifest or list, whichever `content_type` says.
    ///
    /// None for anything else, for one that is malformed, too large, or says of itself that it is of another type. Schema
    /// 1 is none of these: it has no sizes.
    #[must_use]
    pub fn parse(content_type: &str, body: &[u8]) -> Option<Self> {
        if body.len() > MANIFEST_BYTES_MAX {
            return None;
        }
        let content_type = content_type.split(';').next().unwrap_or_default().trim();
        match content_type {
            "application/vnd.oci.image.manifest.v1+json" | "application/vnd.docker.distribution.manifest.v2+json" => {
                let image: Image<'_> = serde_json::from_slice(body).ok()?;
                image.media_type.is_none_or(|own| own == content_type).then(|| Self {
                    config: image.config.as_ref().and_then(|config| config.digest.parse().ok()),
                    blobs: entries(image.config.into_iter().chain(image.layers)),
                    manifests: Vec::new(),
                })
            }
            "application/vnd.oci.image.index.v1+json" | "application/vnd.docker.distribution.manifest.list.v2+json" => {
                let index: Index<'_> = serde_json::from_slice(body).ok()?;
                index
                    .media_type
                    .is_none_or(|own| own == content_type)
                    .then(|| Self { manifests: entries(index.manifests), ..Self::default() })
            }
            _ => None,
        }
    }

    /// The layers, in the manifest's order.
    pub fn layers(&self) -> impl Iterator<Item = Descriptor> + '_ {
        self.blobs.iter().copied().filter(|blob| Some(blob.digest) != self.config)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Image<'a> {
    #[serde(borrow)]
    media_type: Option<Cow<'a, str>>,
    config: Option<Entry<'a>>,
    layers: Vec<Entry<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index<'a> {
    #[serde(borrow)]
    media_type: Option<Cow<'a, str>>,
    manifests: Vec<Entry<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'a> {
    #[serde(borrow)]
    media_type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    digest: Cow<'a, str>,
    size: u64,
    #[serde(default)]
    urls: Option<Vec<serde::de::IgnoredAny>>,
}

/// What a manifest says that it is, if it says so once.
pub(super) fn own_type(body: &[u8]) -> Option<&str> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed<'a> {
        media_type: &'a str,
    }
    serde_json::from_slice::<Typed<'_>>(body).ok().map(|typed| typed.media_type)
}

fn entries<'a>(listed: impl IntoIterator<Item = Entry<'a>>) -> Vec<Descriptor> {
    let mut seen = BTreeSet::new();
    listed
        .into_iter()
        .take(ENTRIES_MAX)
        .filter(Entry::is_in_repository)
        .filter_map(|entry| {
            // An algorithm that is unknown here passes through.
            let digest = entry.digest.parse().ok()?;
            (entry.size > 0 && seen.insert(digest)).then_some(Descriptor { digest, size: entry.size })
        })
        .collect()
}

impl Entry<'_> {
    /// Whether the registry vouches that the blob is in the manifest's repository. Registries check that when a manifest
    /// is pushed, except for layers that are kept elsewhere: with those, whoever may push anything could name a
    /// private blob of another repository and be given it from the cache.
    fn is_in_repository(&self) -> bool {
        let elsewhere = self.urls.as_ref().is_some_and(|urls| !urls.is_empty());
        let foreign =
            self.media_type.as_ref().is_some_and(|own| own.contains("nondistributable") || own.contains("foreign"));
        !elsewhere && !foreign
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";

    fn digest(letter: char) -> String {
        format!("sha256:{}", letter.to_string().repeat(64))
    }

    fn entry(letter: char, size: u64) -> String {
        format!(r#"{{"mediaType":"x","digest":"{}","size":{size},"annotations":{{"a":"b"}}}}"#, digest(letter))
    }

    fn descriptor(letter: char, size: u64) -> Descriptor {
        Descriptor { digest: digest(letter).parse().unwrap(), size }
    }

    #[test]
    fn lists_config_and_layers_of_an_image() {
        let body = format!(
            r#"{{"schemaVersion":2,"config":{},"layers":[{},{},{},{}],"subject":{}}}"#,
            entry('a', 7),
            entry('b', 8),
            entry('c', 9),
            entry('b', 8),
            entry('d', 0),
            entry('e', 5),
        );
        for content_type in [IMAGE, "application/vnd.docker.distribution.manifest.v2+json; charset=utf-8"] {
            let manifest = Manifest::parse(content_type, body.as_bytes()).unwrap();
            assert_eq!(manifest.blobs, [descriptor('a', 7), descriptor('b', 8), descriptor('c', 9)]);
            assert_eq!(manifest.manifests, []);
            assert_eq!(manifest.layers().collect::<Vec<_>>(), [descriptor('b', 8), descriptor('c', 9)]);
        }
        assert_eq!(Manifest::parse(INDEX, body.as_bytes()), None);
    }

    #[test]
    fn an_index_lists_manifests_and_no_blobs() {
        let body = format!(r#"{{"manifests":[{}],"layers":[{}]}}"#, entry('a', 7), entry('b', 8));
        let manifest = Manifest::parse(INDEX, body.as_bytes()).unwrap();
        assert_eq!((manifest.blobs, manifest.manifests), (vec![], vec![descriptor('a', 7)]));
    }

    #[test]
    fn layers_that_are_kept_elsewhere_do_not_count() {
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        let body = format!(
            r#"{{"layers":[{{"digest":"{}","size":1,"urls":["https://x/"]}},{{"digest":"{}","size":1,"urls":[]}},
                {{"mediaType":"{foreign}","digest":"{}","size":1}}]}}"#,
            digest('a'),
            digest('b'),
            digest('c'),
        );
        assert_eq!(Manifest::parse(IMAGE, body.as_bytes()).unwrap().blobs, [descriptor('b', 1)]);
    }

    #[test]
    fn what_is_ambiguous_or_malformed_counts_for_nothing() {
        let ambiguous = format!(r#"{{"mediaType":"{INDEX}","layers":[{}]}}"#, entry('a', 1));
        let twice = format!(r#"{{"layers":[],"layers":[{}]}}"#, entry('a', 1));
        let negative = format!(r#"{{"layers":[{{"digest":"{}","size":-1}}]}}"#, digest('a'));
        let deep = "[".repeat(100_000);
        let large = format!(r#"{{"layers":[{}]}}{}"#, entry('a', 1), " ".repeat(MANIFEST_BYTES_MAX));
        for body in [&ambiguous, &twice, &negative, &deep, &large, "", "{}", "null"] {
            assert_eq!(Manifest::parse(IMAGE, body.as_bytes()), None, "{:.80}", body);
        }
        let schema1 = r#"{"schemaVersion":1,"fsLayers":[{"blobSum":"sha256:aa"}]}"#;
        for content_type in ["application/vnd.docker.distribution.manifest.v1+prettyjws", "application/json", ""] {
            assert_eq!(Manifest::parse(content_type, schema1.as_bytes()), None);
        }
        // One odd entry does not spoil the others.
        let odd = format!(r#"{{"layers":[{{"digest":"md5:x","size":1}},{}]}}"#, entry('a', 1));
        assert_eq!(Manifest::parse(IMAGE, odd.as_bytes()).unwrap().blobs, [descriptor('a', 1)]);
    }

    #[test]
    fn a_manifest_counts_up_to_a_bound() {
        let listed: Vec<String> = (0..2000).map(|n| format!(r#"{{"digest":"sha256:{n:064x}","size":1}}"#)).collect();
        let body = format!(r#"{{"layers":[{}]}}"#, listed.join(","));
        assert_eq!(Manifest::parse(IMAGE, body.as_bytes()).unwrap().blobs.len(), ENTRIES_MAX);
    }
}
