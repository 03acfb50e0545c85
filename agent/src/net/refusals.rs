//! Counts the peers that were refused, and says so in the log no more than once a minute for each address: whoever
//! tries again and again, out of malice or with yesterday's secret, must not fill the disk.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use tokio::time::{Duration, Instant};
use tracing::warn;

use crate::admin::metrics::Metrics;

/// Pause between two log lines about one address.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Addresses remembered; the one that was longest quiet is forgotten first, and may then be logged again.
const ADDRESSES_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// The refusals of one transport.
pub(super) struct Refusals {
    metrics: Arc<Metrics>,
    logged: LruCache<IpAddr, Instant>,
}

impl Refusals {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, logged: LruCache::new(ADDRESSES_MAX) }
    }

    /// Counts a refusal, and logs it if this address was not logged lately. Returns whether it was logged.
    pub(super) fn note(&mut self, remote: IpAddr, reason: &dyn std::fmt::Display, now: Instant) -> bool {
        self.metrics.peers_refused.inc();
        if self.logged.get(&remote).is_some_and(|last| now.duration_since(*last) < LOG_EVERY) {
            return false;
        }
        self.logged.put(remote, now);
        warn!(%remote, %reason, "a peer is outside the cluster, or is not the one that was expected");
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn every_refusal_is_counted_and_one_a_minute_logged() {
        let metrics = Arc::new(Metrics::default());
        let mut refusals = Refusals::new(metrics.clone());
        let (first, second) = (IpAddr::from(Ipv4Addr::new(10, 0, 0, 1)), IpAddr::from(Ipv4Addr::new(10, 0, 0, 2)));
        let start = Instant::now();
        assert!(refusals.note(first, &"x", start));
        assert!(!refusals.note(first, &"x", start + LOG_EVERY / 2));
        assert!(refusals.note(second, &"x", start + LOG_EVERY / 2));
        assert!(refusals.note(first, &"x", start + LOG_EVERY));
        assert_eq!(metrics.peers_refused.get(), 4);
    }
}
