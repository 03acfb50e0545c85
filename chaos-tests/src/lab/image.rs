//! Images made from nothing: busybox and layers of noise, as an OCI layout on disk.
//!
//! Layers are plain tar, so a blob is as large as what is in it, and the noise does not compress.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::json;
use sha2::{Digest as _, Sha256};

/// Debian's busybox-static.
const BUSYBOX: &str = "/usr/bin/busybox";

/// Applets that the image's command uses.
const APPLETS: [&str; 3] = ["sh", "cat", "sha256sum"];

/// A tar record.
const TAR_BLOCK_BYTES: usize = 512;

/// What a container of the image does: greets, and checks every file of noise against its digest.
const COMMAND: &str = "cat /etc/greeting && cd /noise && sha256sum -c SUMS";

const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// One blob of an image.
#[derive(Clone, Debug)]
pub struct Blob {
    /// `sha256:...`.
    pub digest: String,
    /// Size.
    pub bytes: u64,
}

/// An image as an OCI layout.
#[derive(Clone, Debug)]
pub struct Image {
    /// The layout's directory; its only tag is `latest`.
    pub layout: PathBuf,
    /// The config's digest, which is what docker calls the image id.
    pub id: String,
    /// The manifest's digest.
    pub manifest: String,
    /// Config first, then the layers.
    pub blobs: Vec<Blob>,
    /// What a container of it prints.
    pub prints: String,
}

impl Image {
    /// Builds an image with one layer of noise for each of `noise_bytes` besides busybox's and the checksums'. The
    /// same `greeting` and sizes give the same image.
    pub fn build(layout: &Path, greeting: &str, noise_bytes: &[usize]) -> Result<Self> {
        let store = layout.join("blobs/sha256");
        fs::create_dir_all(&store)?;
        let mut layers = vec![Self::store(&store, &base_layer(greeting)?)?];
        let (mut sums, mut prints) = (String::new(), format!("{greeting}\n"));
        for (index, bytes) in noise_bytes.iter().enumerate() {
            let noise = noise(&format!("{greeting} {index}"), *bytes);
            sums.push_str(&format!("{}  {index}\n", hex(&Sha256::digest(&noise))));
            prints.push_str(&format!("{index}: OK\n"));
            let mut layer = Tar::default();
            layer.directory("noise");
            layer.file(&format!("noise/{index}"), 0o644, &noise);
            layers.push(Self::store(&store, &layer.finish())?);
        }
        let mut last = Tar::default();
        last.directory("noise");
        last.file("noise/SUMS", 0o644, sums.as_bytes());
        layers.push(Self::store(&store, &last.finish())?);
        Self::finish(layout, &store, layers, prints)
    }

    /// Builds an image that nobody can run: its layers are exactly so large, and noise from the first byte to the last.
    /// The same `seed` and sizes give the same image.
    pub fn of_noise(layout: &Path, seed: &str, layers_bytes: &[usize]) -> Result<Self> {
        let store = layout.join("blobs/sha256");
        fs::create_dir_all(&store)?;
        let layers = layers_bytes.iter().enumerate();
        let layers = layers.map(|(index, bytes)| Self::store(&store, &noise(&format!("{seed} {index}"), *bytes)));
        Self::finish(layout, &store, layers.collect::<Result<_>>()?, String::new())
    }

    fn finish(layout: &Path, store: &Path, layers: Vec<Blob>, prints: String) -> Result<Self> {
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh", "-c", COMMAND]},
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| &layer.digest).collect::<Vec<_>>()},
        });
        let config = Self::store(store, config.to_string().as_bytes())?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor(CONFIG_TYPE, &config),
            "layers": layers.iter().map(|layer| descriptor(LAYER_TYPE, layer)).collect::<Vec<_>>(),
        });
        let manifest = Self::store(store, manifest.to_string().as_bytes())?;
        let mut entry = descriptor(MANIFEST_TYPE, &manifest);
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
        fs::write(layout.join("index.json"), json!({"schemaVersion": 2, "manifests": [entry]}).to_string())?;
        fs::write(layout.join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string())?;

        let id = config.digest.clone();
        let blobs = std::iter::once(config).chain(layers).collect();
        Ok(Self { layout: layout.to_owned(), id, manifest: manifest.digest, blobs, prints })
    }

    /// Bytes of all blobs, without the manifest.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blobs.iter().map(|blob| blob.bytes).sum()
    }

    /// The largest blob.
    pub fn largest(&self) -> Result<&Blob> {
        self.blobs.iter().max_by_key(|blob| blob.bytes).context("an image without blobs")
    }

    fn store(store: &Path, bytes: &[u8]) -> Result<Blob> {
        let hex = hex(&Sha256::digest(bytes));
        fs::write(store.join(&hex), bytes)?;
        Ok(Blob { digest: format!("sha256:{hex}"), bytes: bytes.len() as u64 })
    }
}

fn base_layer(greeting: &str) -> Result<Vec<u8>> {
    let busybox = fs::read(BUSYBOX).with_context(|| format!("cannot read {BUSYBOX}"))?;
    let mut base = Tar::default();
    base.directory("bin");
    base.file("bin/busybox", 0o755, &busybox);
    for applet in APPLETS {
        base.symlink(&format!("bin/{applet}"), "busybox");
    }
    base.directory("etc");
    base.file("etc/greeting", 0o644, format!("{greeting}\n").as_bytes());
    Ok(base.finish())
}

fn descriptor(media_type: &str, blob: &Blob) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": blob.digest, "size": blob.bytes})
}

/// Bytes that look random and follow from the seed: SHA-256 of a counter.
fn noise(seed: &str, bytes: usize) -> Vec<u8> {
    let mut noise = Vec::with_capacity(bytes + 32);
    for counter in 0_u64.. {
        if noise.len() >= bytes {
            break;
        }
        noise.extend_from_slice(&Sha256::new().chain_update(seed).chain_update(counter.to_le_bytes()).finalize());
    }
    noise.truncate(bytes);
    noise
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A tar archive (ustar) in memory.
#[derive(Default)]
struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    fn directory(&mut self, name: &str) {
        self.header(&format!("{name}/"), 0o755, 0, b'5', "");
    }

    fn symlink(&mut self, name: &str, target: &str) {
        self.header(name, 0o777, 0, b'2', target);
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.header(name, mode, content.len(), b'0', "");
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(TAR_BLOCK_BYTES), 0);
    }

    /// Two empty records end an archive.
    fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * TAR_BLOCK_BYTES, 0);
        self.bytes
    }

    fn header(&mut self, name: &str, mode: u32, size: usize, kind: u8, target: &str) {
        let mut header = [0_u8; TAR_BLOCK_BYTES];
        let mut put = |at: usize, value: &[u8]| header[at..at + value.len()].copy_from_slice(value);
        put(0, name.as_bytes());
        put(100, format!("{mode:07o}\0").as_bytes());
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{size:011o}\0").as_bytes());
        // A fixed date, so that the same content is the same layer.
        put(136, b"00000000000\0");
        // The checksum counts itself as blanks.
        put(148, b"        ");
        put(156, &[kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn noise_follows_from_its_seed_and_has_the_size_asked_for() {
        assert_eq!(noise("a", 100), noise("a", 100));
        assert_ne!(noise("a", 100), noise("b", 100));
        assert_eq!(noise("a", 100).len(), 100);
        assert_eq!(noise("a", 0).len(), 0);
    }

    #[test]
    fn a_tar_reads_back_with_the_system_tar() {
        let mut tar = Tar::default();
        tar.directory("d");
        tar.file("d/f", 0o640, b"hello");
        tar.symlink("d/l", "f");
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("t.tar"), tar.finish()).unwrap();
        let output =
            std::process::Command::new("tar").arg("-xf").arg("t.tar").current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(fs::read(dir.path().join("d/l")).unwrap(), b"hello");
    }
}
