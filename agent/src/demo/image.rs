//! An OCI image that is made, not stored: its layers come out of a keyed stream that can be read at any offset.
//!
//! The bytes cannot be compressed, are the same on every machine, and are not kept anywhere, so a registry of many GiB
//! costs no memory and no disk. Not here: file systems. The layers are declared as tar archives and hold noise; nobody
//! unpacks them.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use darter_tracker::Digest;
use sha2::{Digest as _, Sha256};

use crate::client::MANIFEST_TYPE;

/// Media type of an image configuration.
pub const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a layer that is not compressed.
pub const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// Bytes of the five layers of the demonstration's image: from one that fits in two pieces to one that is most of the
/// image, as images are. They add up to 160 MiB.
pub const LAYER_BYTES: [u64; 5] = [300 << 10, (4096 - 300) << 10, 12 << 20, 48 << 20, 96 << 20];

/// How much is made at a time while a layer's digest is computed. Large enough for the hash, small enough for a cache.
const HASH_STEP_BYTES: u64 = 256 << 10;

/// Separates these streams from every other use of BLAKE3.
const STREAM_CONTEXT: &str = "darter demo 2026 layer content v1";

/// Where a blob's bytes come from.
#[derive(Clone)]
enum Content {
    /// Held in memory: configurations.
    Held(Bytes),
    /// Made when read: layers.
    Stream(Box<blake3::OutputReader>),
}

/// One blob of a registry.
#[derive(Clone)]
pub struct Blob {
    digest: Digest,
    media_type: &'static str,
    length: u64,
    content: Content,
}

impl Blob {
    /// A blob of these very bytes.
    #[must_use]
    pub fn held(media_type: &'static str, bytes: Bytes) -> Self {
        let digest = Digest::Sha256(Sha256::digest(&bytes).into());
        Self { digest, media_type, length: bytes.len() as u64, content: Content::Held(bytes) }
    }

    /// A layer of `length` bytes, the same for the same `seed`. Takes as long as hashing it does.
    #[must_use]
    pub fn layer(seed: u64, length: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(STREAM_CONTEXT);
        hasher.update(&seed.to_le_bytes()).update(&length.to_le_bytes());
        let content = Content::Stream(Box::new(hasher.finalize_xof()));
        let mut blob = Self { digest: Digest::Sha256([0; 32]), media_type: LAYER_TYPE, length, content };
        let mut hash = Sha256::new();
        let mut at = 0;
        while at < length {
            let end = length.min(at + HASH_STEP_BYTES);
            hash.update(blob.read(at..end));
            at = end;
        }
        blob.digest = Digest::Sha256(hash.finalize().into());
        blob
    }

    /// Its digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Its media type.
    #[must_use]
    pub fn media_type(&self) -> &'static str {
        self.media_type
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The bytes of `range`, as far as the blob reaches.
    #[must_use]
    pub fn read(&self, range: Range<u64>) -> Bytes {
        let end = range.end.min(self.length);
        let start = range.start.min(end);
        match &self.content {
            // Held content has a length that is a usize, and neither end lies beyond it.
            Content::Held(bytes) => bytes.slice(start as usize..end as usize),
            Content::Stream(stream) => {
                let mut stream = stream.clone();
                let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(usize::MAX)];
                stream.set_position(start);
                stream.fill(&mut bytes);
                bytes.into()
            }
        }
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({}, {} bytes)", self.digest, self.length)
    }
}

/// A tagged image: manifest, configuration and layers.
#[derive(Clone, Debug)]
pub struct Image {
    repository: String,
    tag: String,
    manifest: Bytes,
    manifest_digest: Digest,
    config: Blob,
    layers: Vec<Blob>,
}

impl Image {
    /// The image `repository:tag` with a layer for each of `layer_bytes`; the same for the same arguments, and with
    /// other bytes in every layer for another `seed`.
    ///
    /// Hashes all of it, so call it where blocking is allowed.
    #[must_use]
    pub fn new(repository: &str, tag: &str, layer_bytes: &[u64], seed: u64) -> Self {
        let layers = layer_bytes.iter().zip(0u64..);
        // Layers of one image differ although they may be equally long.
        let layers: Vec<Blob> = layers.map(|(&length, at)| Blob::layer(seed.rotate_left(16) ^ at, length)).collect();
        let digests: Vec<String> = layers.iter().map(|layer| layer.digest().to_string()).collect();
        let config = serde_json::json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": digests},
        });
        let config = Blob::held(CONFIG_TYPE, config.to_string().into());
        let descriptor = |blob: &Blob| {
            serde_json::json!({
                "mediaType": blob.media_type(),
                "digest": blob.digest().to_string(),
                "size": blob.length(),
            })
        };
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor(&config),
            "layers": layers.iter().map(descriptor).collect::<Vec<_>>(),
        });
        let manifest = Bytes::from(manifest.to_string());
        let manifest_digest = Digest::Sha256(Sha256::digest(&manifest).into());
        Self { repository: repository.to_owned(), tag: tag.to_owned(), manifest, manifest_digest, config, layers }
    }

    /// The demonstration's image, `demo/app:latest`, scaled so that its layers add up to about `size_bytes`.
    #[must_use]
    pub fn demo(size_bytes: u64) -> Self {
        Self::new("demo/app", "latest", &scaled(size_bytes), 0)
    }

    /// The repository's name, such as `demo/app`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, such as `latest`.
    #[must_use]
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The manifest as the registry serves it.
    #[must_use]
    pub fn manifest(&self) -> &Bytes {
        &self.manifest
    }

    /// The manifest's digest.
    #[must_use]
    pub fn manifest_digest(&self) -> Digest {
        self.manifest_digest
    }

    /// The layers, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[Blob] {
        &self.layers
    }

    /// The configuration, then the layers.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        std::iter::once(&self.config).chain(&self.layers)
    }

    /// Bytes of all its blobs: what a node without any of it has to get.
    #[must_use]
    pub fn blob_bytes(&self) -> u64 {
        self.blobs().map(Blob::length).sum()
    }
}

/// [`LAYER_BYTES`] in proportion, none of them empty.
fn scaled(size_bytes: u64) -> [u64; 5] {
    let whole: u128 = LAYER_BYTES.iter().copied().map(u128::from).sum();
    LAYER_BYTES.map(|layer| {
        let bytes = u128::from(layer) * u128::from(size_bytes) / whole;
        // No layer is larger than `size_bytes`, which fits.
        u64::try_from(bytes).unwrap_or(size_bytes).max(1)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_the_same_every_time() {
        let image = Image::new("demo/app", "latest", &[300 << 10, 5, 300 << 10], 7);
        let again = Image::new("demo/app", "latest", &[300 << 10, 5, 300 << 10], 7);
        assert_eq!(image.manifest_digest(), again.manifest_digest());
        assert_ne!(image.layers()[0].digest(), image.layers()[2].digest());
        let other = Image::new("demo/app", "latest", &[300 << 10, 5, 300 << 10], 8);
        assert_ne!(image.layers()[0].digest(), other.layers()[0].digest());
        // A change of the generator would silently change every recorded figure.
        let first = Blob::layer(0, 1 << 20).digest().to_string();
        assert_eq!(first, FIRST_LAYER);
    }

    const FIRST_LAYER: &str = "sha256:0cd5ea87200534d20b66d6f8ba2f6e759ff104f597125c1d91c6571931f47d2e";

    #[test]
    fn any_range_reads_what_the_whole_holds() {
        let blob = Blob::layer(3, 100_003);
        let whole = blob.read(0..blob.length());
        assert_eq!(blob.digest(), Digest::Sha256(Sha256::digest(&whole).into()));
        for range in [0..1, 63..65, 64..128, 99_000..100_003, 100_003..100_003] {
            assert_eq!(blob.read(range.clone()), whole[range.start as usize..range.end as usize], "{range:?}");
        }
        assert_eq!(blob.read(100_000..u64::MAX).len(), 3);
        assert!(blob.read(200_000..300_000).is_empty());
    }

    #[test]
    fn the_manifest_lists_what_is_there() {
        let image = Image::demo(1 << 20);
        let manifest: serde_json::Value = serde_json::from_slice(image.manifest()).unwrap();
        assert_eq!(manifest["schemaVersion"], 2);
        let listed = std::iter::once(&manifest["config"]).chain(manifest["layers"].as_array().unwrap());
        let listed: Vec<_> =
            listed.map(|entry| (entry["digest"].as_str().unwrap(), entry["size"].as_u64().unwrap())).collect();
        let held: Vec<_> = image.blobs().map(|blob| (blob.digest().to_string(), blob.length())).collect();
        assert_eq!(listed, held.iter().map(|(digest, length)| (digest.as_str(), *length)).collect::<Vec<_>>());
    }

    #[test]
    fn sizes_scale_with_the_image() {
        assert_eq!(scaled(160 << 20), LAYER_BYTES);
        assert_eq!(scaled(320 << 20), LAYER_BYTES.map(|bytes| bytes * 2));
        assert_eq!(scaled(1), [1; 5]);
        let huge = scaled(u64::MAX);
        assert!(huge.iter().all(|&bytes| bytes > 1 << 50));
    }
}
