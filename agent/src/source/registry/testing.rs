//! A registry for tests that says exactly the bytes it is told to, right or wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

// The agent's own tests have no use for some of what it can do.
#[allow(dead_code)]
mod server;

use std::collections::BTreeMap;
use std::sync::Arc;

use http::{HeaderName, HeaderValue};

use super::{BlobOrigin, RegistryPolicy, Settings, Upstream};
use crate::admin::metrics::Metrics;
pub(crate) use server::{Origin, Reply, Seen, reply};

/// Serves `blob` as a registry does.
pub(crate) fn serve(blob: &[u8], seen: &Seen) -> Reply {
    let length = blob.len().to_string();
    Reply::Say(match (seen.method.as_str(), seen.range()) {
        ("HEAD", _) => reply(200, &[("content-length", &length), ("etag", "\"e\"")], b""),
        (_, Some(range)) => {
            let content_range = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            reply(206, &[("content-range", &content_range)], &blob[range])
        }
        (_, None) => reply(200, &[], blob),
    })
}

/// An upstream that may talk to 127.0.0.1, and its counters.
pub(crate) fn upstream() -> (Arc<Upstream>, Arc<Metrics>) {
    upstream_with(&[("127.0.0.1", RegistryPolicy::default())])
}

pub(crate) fn upstream_with(policies: &[(&str, RegistryPolicy)]) -> (Arc<Upstream>, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::default());
    let policies: BTreeMap<_, _> = policies.iter().map(|(host, policy)| ((*host).to_owned(), policy.clone())).collect();
    let settings = Settings { policies, ..Settings::default() };
    (Arc::new(Upstream::new(settings, metrics.clone()).unwrap()), metrics)
}

pub(crate) fn origin(url: &str, headers: &[(&str, &str)]) -> BlobOrigin {
    let headers = headers
        .iter()
        .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap()))
        .collect();
    BlobOrigin { url: url.parse().unwrap(), headers }
}
