//! What the registry counts: for each blob who asked for which bytes and how many of them left.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use darter_tracker::Digest;

/// Requests that are remembered one by one for each blob; a test asks for far fewer. Those beyond are counted in the
/// sums only.
const REQUESTS_MAX: usize = 65_536;

/// Everything since the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// By digest; every blob of every image is there, asked for or not.
    pub blobs: BTreeMap<Digest, BlobStats>,
    /// GET and HEAD of manifests that were answered with one.
    pub manifests: u64,
    /// Requests answered 401.
    pub unauthorized: u64,
    /// Answers with bytes of blobs that were on their way at the same moment, at the most.
    pub blob_gets_at_once: u64,
}

impl Stats {
    /// Body bytes of all blobs that the connections took.
    #[must_use]
    pub fn blob_bytes(&self) -> u64 {
        self.blobs.values().map(|blob| blob.body_bytes).sum()
    }

    /// GETs of blobs that were answered 200 or 206.
    #[must_use]
    pub fn blob_gets(&self) -> u64 {
        self.blobs.values().map(|blob| blob.gets).sum()
    }

    /// GETs of blobs whose answer has not got out to its end: cut, or still on its way.
    #[must_use]
    pub fn blob_cuts(&self) -> u64 {
        let served = self.blobs.values().flat_map(|blob| &blob.served);
        served.filter(|served| served.sent_range() != served.range).count() as u64
    }

    /// HEADs of blobs that were answered 200.
    #[must_use]
    pub fn blob_heads(&self) -> u64 {
        self.blobs.values().map(|blob| blob.heads).sum()
    }
}

/// One blob's share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlobStats {
    /// GETs answered 200 or 206.
    pub gets: u64,
    /// HEADs answered 200.
    pub heads: u64,
    /// Body bytes that the connections took.
    pub body_bytes: u64,
    /// The GETs, in the order of their answers; at most the first 65,536.
    pub served: Vec<Served>,
}

impl BlobStats {
    /// How many of the bytes had been sent before: 0 when each left once at the most.
    #[must_use]
    pub fn repeated_bytes(&self) -> u64 {
        let mut sent: Vec<Range<u64>> = self.served.iter().map(Served::sent_range).collect();
        sent.sort_unstable_by_key(|range| range.start);
        let (mut repeated, mut reached) = (0, 0);
        for range in sent {
            repeated += reached.min(range.end).saturating_sub(range.start);
            reached = reached.max(range.end);
        }
        repeated
    }

    /// How often bytes of `range` were sent: the number of answers that got at least one of them out.
    #[must_use]
    pub fn times_sent(&self, range: &Range<u64>) -> usize {
        let overlaps = |sent: Range<u64>| sent.start.max(range.start) < sent.end.min(range.end);
        self.served.iter().filter(|served| overlaps(served.sent_range())).count()
    }
}

/// One answered GET of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// The bytes that the answer covers: the asked range, or the whole blob.
    pub range: Range<u64>,
    /// How many of them, from its start, the connection took.
    pub sent_bytes: u64,
}

impl Served {
    /// The bytes that left.
    #[must_use]
    pub fn sent_range(&self) -> Range<u64> {
        self.range.start..self.range.start + self.sent_bytes
    }
}

/// Counts that belong to no blob.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) manifests: AtomicU64,
    pub(super) unauthorized: AtomicU64,
    open: Arc<Open>,
}

/// Answers with bytes of blobs that are on their way, and the most that were.
#[derive(Debug, Default)]
struct Open {
    now: AtomicU64,
    most: AtomicU64,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct OnItsWay(Arc<Open>);

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Totals {
    /// Counts an answer as being on its way until what is returned is dropped.
    pub(super) fn on_its_way(&self) -> OnItsWay {
        let now = self.open.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.most.fetch_max(now, Ordering::Relaxed);
        OnItsWay(Arc::clone(&self.open))
    }

    pub(super) fn read(&self, blobs: BTreeMap<Digest, BlobStats>) -> Stats {
        Stats {
            blobs,
            manifests: self.manifests.load(Ordering::Relaxed),
            unauthorized: self.unauthorized.load(Ordering::Relaxed),
            blob_gets_at_once: self.open.most.load(Ordering::Relaxed),
        }
    }
}

/// The running count of one blob.
#[derive(Debug, Default)]
pub(super) struct BlobCount {
    heads: AtomicU64,
    gets: Mutex<Gets>,
}

#[derive(Debug, Default)]
struct Gets {
    count: u64,
    /// Sent by the answers that are not in `answers`.
    unlisted: Arc<AtomicU64>,
    answers: Vec<(Range<u64>, Arc<AtomicU64>)>,
}

impl BlobCount {
    pub(super) fn head(&self) {
        self.heads.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes an answer and returns what its body adds the sent bytes to.
    pub(super) fn answer(&self, range: Range<u64>) -> Arc<AtomicU64> {
        let mut gets = self.gets.lock().unwrap_or_else(PoisonError::into_inner);
        gets.count += 1;
        if gets.answers.len() >= REQUESTS_MAX {
            return Arc::clone(&gets.unlisted);
        }
        let sent = Arc::new(AtomicU64::new(0));
        gets.answers.push((range, Arc::clone(&sent)));
        sent
    }

    pub(super) fn read(&self) -> BlobStats {
        let gets = self.gets.lock().unwrap_or_else(PoisonError::into_inner);
        let served = gets
            .answers
            .iter()
            .map(|(range, sent)| Served { range: range.clone(), sent_bytes: sent.load(Ordering::Relaxed) });
        let served: Vec<Served> = served.collect();
        let listed: u64 = served.iter().map(|served| served.sent_bytes).sum();
        BlobStats {
            gets: gets.count,
            heads: self.heads.load(Ordering::Relaxed),
            body_bytes: listed + gets.unlisted.load(Ordering::Relaxed),
            served,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(sent: &[Range<u64>]) -> BlobStats {
        let served = sent.iter().map(|sent| Served { range: sent.start..1000, sent_bytes: sent.end - sent.start });
        BlobStats { served: served.collect(), ..BlobStats::default() }
    }

    #[test]
    fn repeats_are_what_was_sent_twice() {
        assert_eq!(blob(&[]).repeated_bytes(), 0);
        assert_eq!(blob(&[0..10, 10..20]).repeated_bytes(), 0);
        assert_eq!(blob(&[10..20, 0..10, 30..30]).repeated_bytes(), 0);
        assert_eq!(blob(&[0..10, 5..20]).repeated_bytes(), 5);
        assert_eq!(blob(&[0..100, 10..20, 15..30]).repeated_bytes(), 25);
        assert_eq!(blob(&[0..100, 0..100, 0..100]).repeated_bytes(), 200);
    }

    #[test]
    fn a_byte_that_was_asked_but_not_sent_is_not_counted() {
        let blob = blob(&[0..10, 5..20]);
        assert_eq!(blob.times_sent(&(0..5)), 1);
        assert_eq!(blob.times_sent(&(5..6)), 2);
        assert_eq!(blob.times_sent(&(19..40)), 1);
        assert_eq!(blob.times_sent(&(20..40)), 0);
    }

    #[test]
    fn sums_include_what_is_no_longer_listed() {
        let count = BlobCount::default();
        for _ in 0..REQUESTS_MAX + 3 {
            count.answer(0..2).fetch_add(2, Ordering::Relaxed);
        }
        let stats = count.read();
        assert_eq!(stats.served.len(), REQUESTS_MAX);
        assert_eq!((stats.gets, stats.body_bytes), (REQUESTS_MAX as u64 + 3, 2 * (REQUESTS_MAX as u64 + 3)));
    }
}
