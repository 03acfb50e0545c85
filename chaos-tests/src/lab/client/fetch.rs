//! The client's program.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::http::Body;
use super::{Order, Pulled, Received, wait_until};
use crate::lab::agent::PROXY;
use crate::lab::image::hex;

/// What the lab calls the image; its own registry serves it under every name.
pub(crate) const REPOSITORY: &str = "lab/image";

/// Blobs at a time, as docker does it.
const BLOBS_AT_ONCE: usize = 3;

/// Pulls as it is told.
pub async fn pull(order: &Order) -> Result<Pulled> {
    if let Some(at) = order.at {
        wait_until(at).await;
    }
    let (began, begin) = (SystemTime::now(), Instant::now());
    let blobs = wanted(blobs_of(order).await.context("the manifest")?, order.last_layers);
    let fetches = blobs.into_iter().enumerate().map(|(index, (digest, bytes))| async move {
        let received = fetch(order, &digest, bytes).await;
        Ok::<_, anyhow::Error>((index, received.with_context(|| format!("the blob {digest} of {bytes} bytes"))?))
    });
    let mut blobs: Vec<_> = stream::iter(fetches).buffer_unordered(BLOBS_AT_ONCE).try_collect().await?;
    blobs.sort_by_key(|(index, _)| *index);
    Ok(Pulled { blobs: blobs.into_iter().map(|(_, received)| received).collect(), began, took: begin.elapsed() })
}

/// Digests and sizes of config and layers.
async fn blobs_of(order: &Order) -> Result<Vec<(String, u64)>> {
    let text = get(order, "manifests", &order.manifest).await?.whole().await?;
    check(&Sha256::digest(&text), &order.manifest)?;
    let parsed: Value = serde_json::from_slice(&text)?;
    let layers = parsed["layers"].as_array().context("no layers")?;
    let blob = |entry: &Value| Some((entry["digest"].as_str()?.to_owned(), entry["size"].as_u64()?));
    std::iter::once(&parsed["config"]).chain(layers).map(|entry| blob(entry).context("an odd entry")).collect()
}

/// The config, and the last layers of those that follow it.
fn wanted<T>(mut blobs: Vec<T>, last_layers: Option<usize>) -> Vec<T> {
    if let Some(count) = last_layers {
        let layers = blobs.len().saturating_sub(1);
        blobs.drain(blobs.len().min(1)..1 + layers.saturating_sub(count));
    }
    blobs
}

async fn fetch(order: &Order, digest: &str, bytes: u64) -> Result<Received> {
    let mut last = Instant::now();
    let mut body = get(order, "blobs", digest).await?;
    ensure!(body.left_bytes() == bytes, "{} bytes are to come", body.left_bytes());
    let mut hash = Sha256::new();
    let (mut first_byte, mut longest_gap) = (None, Duration::ZERO);
    while let Some(chunk) = body.next().await? {
        let waited = last.elapsed();
        last += waited;
        match first_byte {
            None => first_byte = Some(waited),
            Some(_) => longest_gap = longest_gap.max(waited),
        }
        hash.update(chunk);
    }
    check(&hash.finalize(), digest)?;
    Ok(Received { digest: digest.to_owned(), bytes, first_byte: first_byte.unwrap_or_default(), longest_gap })
}

/// Asks the local agent as containerd does, or the registry.
async fn get(order: &Order, kind: &str, digest: &str) -> Result<Body> {
    let path = format!("/v2/{REPOSITORY}/{kind}/{digest}");
    if order.direct {
        return Body::get(&order.registry, &path).await;
    }
    Body::get(PROXY.trim_start_matches("http://"), &format!("{path}?ns={}", order.registry)).await
}

fn check(hash: &[u8], digest: &str) -> Result<()> {
    let got = format!("sha256:{}", hex(hash));
    ensure!(got == digest, "what came has the digest {got}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_is_wanted_with_the_last_layers() {
        assert_eq!(wanted(vec![0, 1, 2, 3], None), [0, 1, 2, 3]);
        assert_eq!(wanted(vec![0, 1, 2, 3], Some(1)), [0, 3]);
        assert_eq!(wanted(vec![0, 1, 2, 3], Some(9)), [0, 1, 2, 3]);
        assert_eq!(wanted(vec![0, 1], Some(0)), [0]);
    }
}
