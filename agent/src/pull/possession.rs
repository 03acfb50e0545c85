//! Whether a registry has the blob that it lets somebody have (D8).
//!
//! A registry speaks for its own blobs alone. Anybody can run one that lists the digest of somebody else's private blob
//! and says yes to everybody, and the cache would deliver what that registry never had. So a registry that the operator
//! did not name shows some bytes first, at places that it cannot foresee; one that was named is believed.
//!
//! Samples, not a proof: who has most of a blob already may get the rest.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use darter_tracker::TaskId;
use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use futures_util::stream::{self, BoxStream};
use lru::LruCache;
use rand::RngExt as _;

use super::PullError;
use crate::source::registry::{BlobOrigin, OriginError, Upstream};
use crate::store::Blob;

/// Bytes of one sample. More than can be guessed, and less than a request's headers.
const SAMPLE_BYTES: u64 = 512;

/// Samples of a blob that is here already. Who lacks a quarter of it is found out with three chances in four or more.
const SAMPLES: usize = 5;

/// Registries and blobs that were found to belong together. Beyond it the least recently used is sampled again.
const SHOWN_MAX: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Which registries have shown which blobs, until the agent ends: who had the bytes once may give them to anybody.
pub(super) struct Possession(Mutex<LruCache<(String, TaskId), ()>>);

impl Default for Possession {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(SHOWN_MAX)))
    }
}

impl Possession {
    /// Whether the registry has shown the blob before.
    pub(super) fn is_known(&self, upstream: &Upstream, origin: &BlobOrigin, task: TaskId) -> bool {
        let Ok(registry) = upstream.origin_of(&origin.url) else { return false };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&(registry, task)).is_some()
    }

    /// Samples a complete blob, and remembers it if the registry has it.
    ///
    /// # Errors
    /// [`PullError::Unsuited`] if the registry does not show the same bytes; the request is for itself to answer.
    pub(super) async fn check(
        &self,
        upstream: &Upstream,
        origin: &BlobOrigin,
        blob: &Arc<Blob>,
    ) -> Result<(), PullError> {
        let length = blob.geometry().length();
        let one = |_| async {
            let range = sample(0..length);
            let mut reader = blob.reader(range.clone());
            let mut ours = BytesMut::new();
            while let Some(part) = reader.next().await? {
                ours.extend_from_slice(&part);
            }
            shows(upstream, origin, range, length, &ours).await
        };
        try_join_all((0..SAMPLES).map(one)).await?;
        if let Ok(registry) = upstream.origin_of(&origin.url) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).put((registry, *blob.task()), ());
        }
        Ok(())
    }
}

/// A stream whose first bytes, which lie at `at`, are given only if the registry shows some of them too.
pub(super) fn gated(
    upstream: Arc<Upstream>,
    origin: BlobOrigin,
    at: u64,
    length: u64,
    mut bytes: BoxStream<'static, Result<Bytes, PullError>>,
) -> BoxStream<'static, Result<Bytes, PullError>> {
    let begin = async move {
        let first = bytes.next().await;
        if let Some(Ok(first)) = &first {
            let range = sample(at..at + first.len() as u64);
            let ours = &first[(range.start - at) as usize..(range.end - at) as usize];
            if let Err(error) = shows(&upstream, &origin, range.clone(), length, ours).await {
                return stream::iter(Some(Err(error))).boxed();
            }
        }
        stream::iter(first).chain(bytes).boxed()
    };
    stream::once(begin).flatten().boxed()
}

/// Some bytes of a range, anywhere in it.
fn sample(range: Range<u64>) -> Range<u64> {
    let count = SAMPLE_BYTES.min(range.end - range.start);
    let start = rand::rng().random_range(range.start..=range.end - count);
    start..start + count
}

/// Whether the registry gives this client the same bytes.
async fn shows(
    upstream: &Upstream,
    origin: &BlobOrigin,
    range: Range<u64>,
    length: u64,
    ours: &[u8],
) -> Result<(), PullError> {
    let theirs = async {
        let mut body = upstream.fetch_urgent(origin, range, length).await?;
        let mut theirs = Vec::with_capacity(ours.len());
        while let Some(part) = body.read(ours.len()).await? {
            theirs.extend_from_slice(&part);
        }
        Ok::<_, OriginError>(theirs)
    };
    match theirs.await {
        Ok(theirs) if theirs == ours => Ok(()),
        Ok(_) => Err(PullError::Unsuited { reason: "its registry has other bytes".to_owned() }),
        Err(error) => Err(PullError::Unsuited { reason: format!("its registry does not show it: {error}") }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::source::registry::testing::{Origin, Reply, origin, reply, serve, upstream};

    fn given() -> BoxStream<'static, Result<Bytes, PullError>> {
        stream::iter([Ok(Bytes::from(vec![7; 2000])), Ok(Bytes::from(vec![8; 1000]))]).boxed()
    }

    // D8: bytes of a blob are no business of a registry that only claims to have it.
    #[tokio::test]
    async fn only_a_registry_that_has_the_bytes_gets_them_for_its_clients() {
        let blob = [vec![1; 500], vec![7; 2000], vec![8; 1000]].concat();
        let lies = [vec![1; 500], vec![6; 2000], vec![8; 1000]].concat();
        let honest = Origin::start(move |seen| serve(&blob, seen)).await;
        let lying = Origin::start(move |seen| serve(&lies, seen)).await;
        let empty = Origin::start(|_| Reply::Say(reply(404, &[], b"{}"))).await;
        let (upstream, _) = upstream();
        for (registry, has) in [(&honest, true), (&lying, false), (&empty, false)] {
            let origin = origin(&registry.url("/v2/a/blobs/b"), &[]);
            let items: Vec<_> = gated(upstream.clone(), origin, 500, 3500, given()).collect().await;
            assert_eq!(items.len(), if has { 2 } else { 1 });
            assert_eq!(items[0].is_ok(), has, "{:?}", items[0].as_ref().err());
            let seen = registry.seen();
            assert_eq!(seen.len(), 1);
            let range = seen[0].range().unwrap();
            assert!(range.start >= 500 && range.end <= 2500 && range.len() as u64 == SAMPLE_BYTES, "{range:?}");
        }
    }

    #[test]
    fn samples_lie_inside_and_are_never_short() {
        for length in [1, 511, 512, 513, 1 << 30] {
            for _ in 0..50 {
                let range = sample(10..10 + length);
                assert!(range.start >= 10 && range.end <= 10 + length);
                assert_eq!(range.end - range.start, SAMPLE_BYTES.min(length));
            }
        }
    }
}
