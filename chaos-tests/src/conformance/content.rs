//! What the suite pushes, and what it compares answers with: every piece of content has a name, under which a verdict speaks
//! of it.
//!
//! The bytes follow from a seed, so that two ways to one registry can each be the first to ask for theirs, and be compared
//! nevertheless.

use bytes::Bytes;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256, Sha512};

pub(super) const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(super) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub(super) const BLOB: &str = "application/octet-stream";

/// The media type of the empty descriptor, and its content.
const EMPTY: (&str, &[u8]) = ("application/vnd.oci.empty.v1+json", b"{}");

/// What the artifact says it is.
pub(super) const ARTIFACT: &str = "application/vnd.example.sbom.v1";

/// Three pieces of an agent and a bit, in a number that no block size divides.
const LAYER_BYTES: usize = (768 << 10) + 1;

/// Small, for what is pushed and read back.
const SMALL_BYTES: usize = 1000;

/// One piece of content.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) name: String,
    pub(super) bytes: Bytes,
    pub(super) digest: String,
    pub(super) media_type: String,
}

impl Content {
    pub(super) fn new(name: &str, media_type: &str, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let digest = sha256(&bytes);
        Self { name: name.to_owned(), bytes, digest, media_type: media_type.to_owned() }
    }

    /// Bytes that no other name or seed has.
    pub(super) fn noise(name: &str, seed: &str, length: usize) -> Self {
        let mut bytes = Vec::with_capacity(length + 32);
        let mut at = 0_u64;
        while bytes.len() < length {
            let block = Sha256::new().chain_update(name).chain_update([0]).chain_update(seed);
            bytes.extend_from_slice(&block.chain_update(at.to_le_bytes()).finalize());
            at += 1;
        }
        bytes.truncate(length);
        Self::new(name, BLOB, bytes)
    }

    pub(super) fn small(name: &str, seed: &str) -> Self {
        Self::noise(name, seed, SMALL_BYTES)
    }

    fn json(name: &str, media_type: &str, value: &Value) -> Self {
        Self::new(name, media_type, value.to_string())
    }

    /// The same under its SHA-512.
    pub(super) fn by_sha512(self) -> Self {
        Self { digest: format!("sha512:{}", hex(&Sha512::digest(&self.bytes))), ..self }
    }

    /// `bytes` of it as text, for headers.
    pub(super) fn length(&self) -> String {
        self.bytes.len().to_string()
    }

    pub(super) fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.bytes.len()})
    }
}

/// An image for two platforms, and an artifact that refers to it.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) layer: Content,
    pub(super) config: Content,
    pub(super) image: Content,
    pub(super) other_image: Content,
    pub(super) index: Content,
    pub(super) empty: Content,
    pub(super) artifact: Content,
}

impl Made {
    pub(super) fn new(seed: &str) -> Self {
        let layer = Content { media_type: LAYER.to_owned(), ..Content::noise("layer", seed, LAYER_BYTES) };
        let config = json!({
            "architecture": "amd64", "os": "linux", "author": seed,
            "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
        });
        let config = Content::json("config", CONFIG, &config);
        let image = Content::json("image", IMAGE, &manifest(&config, &layer, json!({"platform": "amd64"})));
        let other_image = Content::json("other image", IMAGE, &manifest(&config, &layer, json!({"platform": "arm64"})));
        let entry = |image: &Content, architecture: &str| {
            let mut entry = image.descriptor();
            entry["platform"] = json!({"architecture": architecture, "os": "linux"});
            entry
        };
        let index = json!({
            "schemaVersion": 2, "mediaType": INDEX,
            "manifests": [entry(&image, "amd64"), entry(&other_image, "arm64")],
        });
        let index = Content::json("index", INDEX, &index);
        let empty = Content::new("empty descriptor", EMPTY.0, EMPTY.1);
        let artifact = json!({
            "schemaVersion": 2, "mediaType": IMAGE, "artifactType": ARTIFACT,
            "config": empty.descriptor(), "layers": [empty.descriptor()], "subject": image.descriptor(),
        });
        let artifact = Content::json("artifact", IMAGE, &artifact);
        Self { layer, config, image, other_image, index, empty, artifact }
    }

    pub(super) fn all(&self) -> [&Content; 7] {
        [&self.layer, &self.config, &self.image, &self.other_image, &self.index, &self.empty, &self.artifact]
    }
}

fn manifest(config: &Content, layer: &Content, annotations: Value) -> Value {
    json!({
        "schemaVersion": 2, "mediaType": IMAGE,
        "config": config.descriptor(), "layers": [layer.descriptor()], "annotations": annotations,
    })
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_seed_is_other_content_of_the_same_lengths() {
        let (one, other) = (Made::new("00000001"), Made::new("00000002"));
        for (one, other) in one.all().into_iter().zip(other.all()) {
            assert_eq!((one.bytes.len(), &one.name), (other.bytes.len(), &other.name));
            assert!(one.digest != other.digest || one.name == "empty descriptor", "{}", one.name);
        }
    }
}
