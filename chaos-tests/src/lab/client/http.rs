//! HTTP/1.1 by hand: one request over a socket of its own, and an answer with a length, so that nothing between the other
//! side and the clock buffers, retries or smooths.

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What is read at once.
const READ_BYTES: usize = 64 << 10;

/// The longest head of an answer.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// The longest body that is read as a whole; the lab's manifests have some hundred bytes.
const WHOLE_BYTES_MAX: u64 = 1 << 20;

/// docker-registry withholds an OCI manifest from clients that do not name its type.
const ACCEPTED: &str = "application/vnd.oci.image.manifest.v1+json, */*";

/// What ends a head.
const HEAD_END: &[u8] = b"\r\n\r\n";

/// An answer's body, as it comes.
pub(crate) struct Body {
    stream: TcpStream,
    /// What was read last; of it, `ready` is the body's and not yet taken.
    buffer: Vec<u8>,
    ready: std::ops::Range<usize>,
    left_bytes: u64,
}

impl Body {
    /// GETs a path of `host`, which is an address with a port.
    pub(crate) async fn get(host: &str, path: &str) -> Result<Self> {
        let head = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: {ACCEPTED}\r\nConnection: close\r\n\r\n");
        Self::ask(host, &head, &[]).await
    }

    /// POSTs to a path of `host`.
    pub(crate) async fn post(host: &str, path: &str, content: &[u8]) -> Result<Self> {
        let length = content.len();
        let head =
            format!("POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        Self::ask(host, &head, content).await
    }

    /// Any status but 200 is an error, and so is an answer without a length.
    async fn ask(host: &str, head: &str, content: &[u8]) -> Result<Self> {
        let mut stream = TcpStream::connect(host).await.context("cannot connect")?;
        stream.write_all(&[head.as_bytes(), content].concat()).await?;
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

    /// How many bytes are still to come.
    pub(crate) fn left_bytes(&self) -> u64 {
        self.left_bytes
    }

    /// All of it, where that is not much.
    pub(crate) async fn whole(mut self) -> Result<Vec<u8>> {
        ensure!(self.left_bytes <= WHOLE_BYTES_MAX, "{} bytes are too many", self.left_bytes);
        let mut all = Vec::new();
        while let Some(chunk) = self.next().await? {
            all.extend_from_slice(chunk);
        }
        Ok(all)
    }

    /// The next bytes; None after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<&[u8]>> {
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
