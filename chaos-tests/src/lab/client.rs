//! A client that notices how it is served: it pulls an image through its agent as a mirror, or from the registry itself,
//! like docker with three blobs at a time, checks every digest, tries nothing twice, and tells how long it waited for bytes.
//!
//! Curl says what came and not when; real clients try again by themselves, which hides what they were put through.

mod fetch;
pub(crate) mod http;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

pub(crate) use fetch::REPOSITORY;
pub use fetch::pull;

use super::command::Run;
use super::image::Image;
use super::netns::Host;

/// How long a pull may take. Over the links of the lab it takes some seconds; what disturbs it adds up to half a minute,
/// and a machine that is busy otherwise slows all of it.
const PULL_DEADLINE: Duration = Duration::from_secs(150);

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The registry's name in image names.
    pub registry: String,
    /// The manifest's digest.
    pub manifest: String,
    /// Whether the registry is asked, over plain HTTP, and not the local agent.
    pub direct: bool,
    /// How many of the last layers are asked for, besides the config: a node may hold the others. None for all.
    pub last_layers: Option<usize>,
    /// When to begin, so that clients on many hosts do it together; None for at once.
    pub at: Option<SystemTime>,
}

impl Order {
    /// A whole pull through the local agent, at once.
    #[must_use]
    pub fn new(registry: &str, manifest: &str) -> Self {
        let (registry, manifest) = (registry.to_owned(), manifest.to_owned());
        Self { registry, manifest, direct: false, last_layers: None, at: None }
    }

    /// As JSON, for the command line of the client's process.
    #[must_use]
    pub fn write(&self) -> String {
        json!([self.registry, self.manifest, self.direct, self.last_layers, self.at.map(micros_since_epoch)])
            .to_string()
    }

    /// Reads what [`Order::write`] wrote.
    pub fn read(text: &str) -> Result<Self> {
        type Row = (String, String, bool, Option<usize>, Option<u64>);
        let (registry, manifest, direct, last_layers, at): Row = serde_json::from_str(text).context("not an order")?;
        Ok(Self {
            registry,
            manifest,
            direct,
            last_layers,
            at: at.map(|micros| UNIX_EPOCH + Duration::from_micros(micros)),
        })
    }
}

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
    /// Config and layers, in the manifest's order, of those that were asked for.
    pub blobs: Vec<Received>,
    /// When the manifest was asked for.
    pub began: SystemTime,
    /// From the manifest's request to the last byte.
    pub took: Duration,
}

impl Client {
    /// A client on `host`.
    pub fn new(host: &Host, order: &Order) -> Result<Self> {
        // This very program, as for the origin.
        let program = std::env::current_exe()?;
        let program = program.to_str().context("the path of this program is not UTF-8")?;
        Ok(Self { run: host.run(program).args(["client", &order.write()]).within(PULL_DEADLINE) })
    }

    /// Another program that prints what a client prints.
    #[must_use]
    pub fn program(run: Run) -> Self {
        Self { run: run.within(PULL_DEADLINE) }
    }

    /// Another deadline than that of a pull through agents of the lab.
    #[must_use]
    pub fn within(self, deadline: Duration) -> Self {
        Self { run: self.run.within(deadline) }
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

    /// As JSON: `[began, took, [[digest, bytes, first byte, longest gap], ...]]`, times in microseconds.
    #[must_use]
    pub fn write(&self) -> String {
        let row = |it: &Received| json!([it.digest, it.bytes, micros(it.first_byte), micros(it.longest_gap)]);
        let began = micros_since_epoch(self.began);
        json!([began, micros(self.took), self.blobs.iter().map(row).collect::<Vec<_>>()]).to_string()
    }

    /// Reads what [`Pulled::write`] wrote.
    pub fn read(text: &str) -> Result<Self> {
        type Row = (String, u64, u64, u64);
        let (began, took, rows): (u64, u64, Vec<Row>) =
            serde_json::from_str(text).context("not what a client prints")?;
        let received = |(digest, bytes, first_byte, longest_gap): Row| Received {
            digest,
            bytes,
            first_byte: Duration::from_micros(first_byte),
            longest_gap: Duration::from_micros(longest_gap),
        };
        Ok(Self {
            blobs: rows.into_iter().map(received).collect(),
            began: UNIX_EPOCH + Duration::from_micros(began),
            took: Duration::from_micros(took),
        })
    }
}

/// Waits until the clock shows `at`; not at all where that is past.
pub(crate) async fn wait_until(at: SystemTime) {
    tokio::time::sleep(at.duration_since(SystemTime::now()).unwrap_or_default()).await;
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A moment as the processes of one machine pass it on.
pub(crate) fn micros_since_epoch(at: SystemTime) -> u64 {
    micros(at.duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_pull_reads_back() {
        let (first_byte, longest_gap) = (Duration::from_micros(3), Duration::from_micros(4));
        let blob = Received { digest: "sha256:00".to_owned(), bytes: 2, first_byte, longest_gap };
        let began = UNIX_EPOCH + Duration::from_micros(7);
        let pulled = Pulled { blobs: vec![blob], began, took: Duration::from_micros(1) };
        assert_eq!(Pulled::read(&pulled.write()).unwrap(), pulled);
    }

    #[test]
    fn an_order_reads_back() {
        let whole = Order::new("r:1", "sha256:00");
        let at = Some(UNIX_EPOCH + Duration::from_micros(12));
        let odd = Order { direct: true, last_layers: Some(1), at, ..whole.clone() };
        for order in [whole, odd] {
            assert_eq!(Order::read(&order.write()).unwrap(), order);
        }
    }
}
