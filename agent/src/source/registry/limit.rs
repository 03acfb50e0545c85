//! How much a registry is asked for at a time, and how long it is left alone when it says so.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use http::header::RETRY_AFTER;
use lru::LruCache;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::headers::Credential;

/// Fetches that one registry serves this agent at a time; more wait. A cold pull of ten layers has about as many, and
/// each holds a connection and its buffers.
pub(super) const FETCHES_MAX: usize = 16;

/// Questions (HEAD) to one registry at a time; more wait. They are small, but a scan of an image list must not take a
/// registry down.
const QUESTIONS_MAX: usize = 32;

/// Registries that are kept account of. Beyond it the least recently asked one is forgotten, and may be asked for twice
/// the bound while its old requests end.
const REGISTRIES_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// Pauses that are remembered, one per registry and credential. Beyond it the oldest is forgotten, which costs one
/// request.
const PAUSES_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// What a busy registry gets if it does not say how long.
const PAUSE_DEFAULT: Duration = Duration::from_secs(1);

/// The longest pause that is honoured. Registries have asked for hours; a client must get their answer before that.
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// The account of one registry.
struct Gate {
    fetches: Arc<Semaphore>,
    questions: Arc<Semaphore>,
}

/// The accounts of all registries.
pub(super) struct Limits {
    gates: Mutex<LruCache<String, Gate>>,
    pauses: Mutex<LruCache<(String, Credential), Instant>>,
}

impl Limits {
    pub(super) fn new() -> Self {
        Self { gates: Mutex::new(LruCache::new(REGISTRIES_MAX)), pauses: Mutex::new(LruCache::new(PAUSES_MAX)) }
    }

    /// Waits for a fetch's turn. The turn ends when the permit is dropped.
    pub(super) async fn fetch(&self, registry: &str) -> Option<OwnedSemaphorePermit> {
        let gate = self.gate(registry, |gate| gate.fetches.clone());
        // A semaphore that is never closed always gives.
        gate.acquire_owned().await.ok()
    }

    /// Waits for a question's turn.
    pub(super) async fn question(&self, registry: &str) -> Option<OwnedSemaphorePermit> {
        let gate = self.gate(registry, |gate| gate.questions.clone());
        gate.acquire_owned().await.ok()
    }

    fn gate(&self, registry: &str, which: impl Fn(&Gate) -> Arc<Semaphore>) -> Arc<Semaphore> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        which(gates.get_or_insert_ref(registry, || Gate {
            fetches: Arc::new(Semaphore::new(FETCHES_MAX)),
            questions: Arc::new(Semaphore::new(QUESTIONS_MAX)),
        }))
    }

    /// Notes that the registry wants to be left alone by this credential.
    pub(super) fn pause(&self, registry: &str, credential: Credential, pause: Duration) {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        pauses.put((registry.to_owned(), credential), Instant::now() + pause);
    }

    /// How long it still wants to be left alone.
    pub(super) fn paused(&self, registry: &str, credential: Credential) -> Option<Duration> {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (registry.to_owned(), credential);
        let left = pauses.get(&key)?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        if left.is_none() {
            pauses.pop(&key);
        }
        left
    }
}

/// What a busy registry asks for in `Retry-After`, seconds or a date (RFC 9110, 10.2.3), within bounds.
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Duration {
    let Some(text) = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()) else {
        return PAUSE_DEFAULT;
    };
    let text = text.trim();
    let pause = match (text.parse(), httpdate::parse_http_date(text)) {
        (Ok(seconds), _) => Duration::from_secs(seconds),
        // A date that has passed means: now.
        (_, Ok(date)) => date.duration_since(now).unwrap_or_default(),
        _ => PAUSE_DEFAULT,
    };
    pause.min(PAUSE_MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (text, expected) in [
            (Some("7"), 7),
            (Some(" 0 "), 0),
            (Some("86400"), 300),
            (Some("99999999999999999999999"), 1),
            (Some("Sun, 06 Nov 1994 08:50:07 GMT"), 30),
            (Some("Sun, 06 Nov 1994 08:00:00 GMT"), 0),
            (Some("-5"), 1),
            (Some("soon"), 1),
            (None, 1),
        ] {
            let headers = text.map(|text| (RETRY_AFTER, text.parse().unwrap())).into_iter().collect();
            assert_eq!(retry_after(&headers, now), Duration::from_secs(expected), "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_holds_for_one_credential_and_ends() {
        let limits = Limits::new();
        let who = Credential::of(&HeaderMap::new());
        limits.pause("https://a:443", who, Duration::from_secs(5));
        assert_eq!(limits.paused("https://a:443", who), Some(Duration::from_secs(5)));
        assert_eq!(limits.paused("https://b:443", who), None);
        assert_eq!(limits.paused("https://a:443", who.with_query(Some("x"))), None);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(limits.paused("https://a:443", who), None);
    }

    #[tokio::test]
    async fn one_registry_does_not_block_another() {
        let limits = Limits::new();
        let mut held = Vec::new();
        for _ in 0..FETCHES_MAX {
            held.push(limits.fetch("a").await.unwrap());
        }
        assert!(futures_util::FutureExt::now_or_never(limits.fetch("a")).is_none());
        assert!(futures_util::FutureExt::now_or_never(limits.fetch("b")).is_some());
        assert!(futures_util::FutureExt::now_or_never(limits.question("a")).is_some());
        held.pop();
        assert!(futures_util::FutureExt::now_or_never(limits.fetch("a")).is_some());
    }
}
