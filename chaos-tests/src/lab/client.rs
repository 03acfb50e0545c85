//! A client that notices how it is served: it pulls an image through its agent as a mirror, like docker with three blobs
//! at a time, checks every digest, tries nothing twice, and tells how long it waited for bytes.
//!
//! Curl says what came and not when; real clients try again by themselves, which hides what they were put through.

mod fetch;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

pub use fetch::pull;

use super::command::Run;
use super::image::Image;
use super::netns::Host;

/// How long a pull may take. Over the links of the lab it takes some seconds; what disturbs it adds up to half a minute,
/// and a machine that is busy otherwise slows all of it.
const PULL_DEADLINE: Duration = Duration::from_secs(150);

/// A client about to pull.
#[derive(Debug)]
pub struct Client {
    run: Run,
}

/// One blob as the client got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// `sha256:...`, and what came matched it.
    pub digest: String,
    /// Its size.
    pub bytes: u64,
    /// From the request to the first byte of the body.
    pub first_byte: Duration,
    /// The longest wait for a further byte of the body.
    pub longest_gap: Duration,
}

/// A whole pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// Config and layers, in the manifest's order.
    pub blobs: Vec<Received>,
    /// From the manifest's request to the last byte.
    pub took: Duration,
}

impl Client {
    /// A client on `host` that pulls the image with this manifest's digest from `registry` through the local agent.
    pub(super) fn new(host: &Host, registry: &str, manifest: &str) -> Result<Self> {
        // This very program, as for the origin.
        let program = std::env::current_exe()?;
        let program = program.to_str().context("the path of this program is not UTF-8")?;
        Ok(Self { run: host.run(program).args(["client", registry, manifest]).within(PULL_DEADLINE) })
    }

    /// Pulls; any error of any blob is one of the pull.
    pub async fn pull(self) -> Result<Pulled> {
        Pulled::read(&self.run.output().await?)
    }
}

impl Pulled {
    /// Checks that all of `image` came.
    pub fn check(&self, image: &Image) -> Result<()> {
        let got = self.blobs.iter().map(|blob| (&blob.digest, blob.bytes));
        ensure!(got.eq(image.blobs.iter().map(|blob| (&blob.digest, blob.bytes))), "another image came: {self:?}");
        Ok(())
    }

    /// As JSON: `[microseconds, [[digest, bytes, first byte, longest gap], ...]]`.
    #[must_use]
    pub fn write(&self) -> String {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let row = |it: &Received| json!([it.digest, it.bytes, micros(it.first_byte), micros(it.longest_gap)]);
        json!([micros(self.took), self.blobs.iter().map(row).collect::<Vec<_>>()]).to_string()
    }

    fn read(text: &str) -> Result<Self> {
        type Row = (String, u64, u64, u64);
        let (took, rows): (u64, Vec<Row>) = serde_json::from_str(text).context("not what a client prints")?;
        let received = |(digest, bytes, first_byte, longest_gap): Row| Received {
            digest,
            bytes,
            first_byte: Duration::from_micros(first_byte),
            longest_gap: Duration::from_micros(longest_gap),
        };
        Ok(Self { blobs: rows.into_iter().map(received).collect(), took: Duration::from_micros(took) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_pull_reads_back() {
        let (first_byte, longest_gap) = (Duration::from_micros(3), Duration::from_micros(4));
        let blob = Received { digest: "sha256:00".to_owned(), bytes: 2, first_byte, longest_gap };
        let pulled = Pulled { blobs: vec![blob], took: Duration::from_micros(1) };
        assert_eq!(Pulled::read(&pulled.write()).unwrap(), pulled);
    }
}
