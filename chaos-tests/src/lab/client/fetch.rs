//! The client's program: plain HTTP/1.1 over a socket of its own per request, so that nothing between the agent and the
//! clock buffers, retries or smooths.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{Pulled, Received};
use crate::lab::agent::PROXY;
use crate::lab::image::hex;

/// Blobs at a time, as docker does it.
const BLOBS_AT_ONCE: usize = 3;

/// What is read at once.
const READ_BYTES: usize = 64 << 10;

/// The longest head of an answer.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// The largest manifest; the lab's have some hundred bytes.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// What ends a head.
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Pulls the image with this manifest's digest from `registry`.
pub async fn pull(registry: &str, manifest: &str) -> Result<Pulled> {
    let begin = Instant::now();
    let blobs = blobs_of(registry, manifest).await.context("the manifest")?;
    let fetches = blobs.into_iter().enumerate().map(|(index, (digest, bytes))| async move {
        let received = fetch(registry, &digest, bytes).await;
        Ok::<_, anyhow::Error>((index, received.with_context(|| format!("the blob {digest} of {bytes} bytes"))?))
    });
    let mut blobs: Vec<_> = stream::iter(fetches).buffer_unordered(BLOBS_AT_ONCE).try_collect().await?;
    blobs.sort_by_key(|(index, _)| *index);
    Ok(Pulled { blobs: blobs.into_iter().map(|(_, received)| received).collect(), took: begin.elapsed() })
}

/// Digests and sizes of config and layers.
async fn blobs_of(registry: &str, manifest: &str) -> Result<Vec<(String, u64)>> {
    let mut body = Body::get(&format!("/v2/lab/image/manifests/{manifest}?ns={registry}")).await?;
    ensure!(body.left_bytes <= MANIFEST_BYTES_MAX, "{} bytes of manifest", body.left_bytes);
    let mut text = Vec::new();
    while let Some(chunk) = body.next().await? {
        text.extend_from_slice(chunk);
    }
    check(&Sha256::digest(&text), manifest)?;
    let parsed: Value = serde_json::from_slice(&text)?;
    let layers = parsed["layers"].as_array().context("no layers")?;
    let blob = |entry: &Value| Some((entry["digest"].as_str()?.to_owned(), entry["size"].as_u64()?));
    std::iter::once(&parsed["config"]).chain(layers).map(|entry| blob(entry).context("an odd entry")).collect()
}

async fn fetch(registry: &str, digest: &str, bytes: u64) -> Result<Received> {
    let mut last = Instant::now();
    let mut body = Body::get(&format!("/v2/lab/image/blobs/{digest}?ns={registry}")).await?;
    ensure!(body.left_bytes == bytes, "{} bytes are to come", body.left_bytes);
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

fn check(hash: &[u8], digest: &str) -> Result<()> {
    let got = format!("sha256:{}", hex(hash));
    ensure!(got == digest, "what came has the digest {got}");
    Ok(())
}

/// An answer's body, as it comes.
struct Body {
    stream: TcpStream,
    /// What was read last; of it, `ready` is the body's and not yet taken.
    buffer: Vec<u8>,
    ready: std::ops::Range<usize>,
    left_bytes: u64,
}

impl Body {
    /// Asks the local agent. Any status but 200 is an error, and so is an answer without a length.
    async fn get(path: &str) -> Result<Self> {
        let host = PROXY.trim_start_matches("http://");
        let mut stream = TcpStream::connect(host).await.context("cannot connect")?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut buffer = Vec::with_capacity(READ_BYTES);
        let head_bytes = loop {
            if let Some(at) = buffer.windows(HEAD_END.len()).position(|window| window == HEAD_END) {
                break at + HEAD_END.len();
            }
            ensure!(buffer.len() < HEAD_BYTES_MAX, "the head does not end");
            ensure!(stream.read_buf(&mut buffer).await? > 0, "cut off before the head's end");
        };
        let left_bytes = length(&String::from_utf8_lossy(&buffer[..head_bytes]))?;
        let ready = head_bytes..buffer.len();
        Ok(Self { stream, buffer, ready, left_bytes })
    }

    /// The next bytes; None after the last.
    async fn next(&mut self) -> Result<Option<&[u8]>> {
        if self.left_bytes == 0 {
            return Ok(None);
        }
        if self.ready.is_empty() {
            self.buffer.resize(READ_BYTES, 0);
            self.ready = 0..self.stream.read(&mut self.buffer).await?;
        }
        let chunk = &self.buffer[std::mem::take(&mut self.ready)];
        let left = self.left_bytes.checked_sub(chunk.len() as u64).context("more came than was announced")?;
        self.left_bytes = left;
        if chunk.is_empty() {
            bail!("cut off with {left} bytes to come");
        }
        Ok(Some(chunk))
    }
}

/// How long the body is that comes after this head.
fn length(head: &str) -> Result<u64> {
    let mut lines = head.lines();
    let status = lines.next().unwrap_or_default();
    ensure!(status.split(' ').nth(1) == Some("200"), "the answer is {status:?}");
    let fields = lines.filter_map(|line| line.split_once(':'));
    let length = fields.into_iter().find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    length.with_context(|| format!("no length in {head:?}"))?.1.trim().parse().context("an odd length")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_a_whole_answer_with_a_length_is_taken() {
        assert_eq!(length("HTTP/1.1 200 OK\r\nA: b\r\ncontent-length: 12\r\n\r\n").unwrap(), 12);
        assert!(length("HTTP/1.1 206 Partial Content\r\nContent-Length: 12\r\n\r\n").is_err());
        assert!(length("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").is_err());
    }
}
