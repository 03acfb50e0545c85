//! What was sent of which blob, and what follows from it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// One response with bytes of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// What was asked for.
    pub asked: Range<u64>,
    /// How far it came: bytes handed to the connection, from the start of `asked`.
    pub sent_bytes: u64,
}

/// All responses of a server, by digest.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    responses: Arc<Mutex<BTreeMap<String, Vec<Response>>>>,
}

impl Ledger {
    /// Enters a response that is about to begin; the returned index names it.
    pub(super) fn begin(&self, digest: &str, asked: Range<u64>) -> usize {
        let mut all = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        let responses = all.entry(digest.to_owned()).or_default();
        responses.push(Response { asked, sent_bytes: 0 });
        responses.len() - 1
    }

    /// Adds to what a response has sent.
    pub(super) fn add(&self, digest: &str, index: usize, bytes: u64) {
        let mut all = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(response) = all.get_mut(digest).and_then(|responses| responses.get_mut(index)) {
            response.sent_bytes += bytes;
        }
    }

    /// As JSON: `{digest: [[start, end, sent], ...]}`.
    pub(super) fn write(&self) -> String {
        let all = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        let digests = all.iter().map(|(digest, responses)| {
            let rows = responses.iter().map(|r| json!([r.asked.start, r.asked.end, r.sent_bytes])).collect();
            (digest.clone(), Value::Array(rows))
        });
        Value::Object(digests.collect()).to_string()
    }
}

/// Reads what [`Ledger::write`] wrote.
pub(super) fn read(text: &str) -> Result<BTreeMap<String, Vec<Response>>> {
    let rows: BTreeMap<String, Vec<[u64; 3]>> = serde_json::from_str(text).context("not a ledger")?;
    let response = |[start, end, sent_bytes]: [u64; 3]| Response { asked: start..end, sent_bytes };
    Ok(rows.into_iter().map(|(digest, rows)| (digest, rows.into_iter().map(response).collect())).collect())
}

/// How often each byte of a blob was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coverage {
    /// Bytes sent, each as often as it was.
    pub sent_bytes: u64,
    /// Different bytes sent.
    pub distinct_bytes: u64,
    /// Responses that sent something.
    pub responses: usize,
}

impl Coverage {
    /// Of one blob's responses.
    #[must_use]
    pub fn of(responses: &[Response]) -> Self {
        let mut spans: Vec<Range<u64>> = responses.iter().map(Response::span).filter(|span| !span.is_empty()).collect();
        spans.sort_by_key(|span| span.start);
        let (mut distinct_bytes, mut reached) = (0, 0);
        for span in &spans {
            distinct_bytes += span.end.saturating_sub(span.start.max(reached));
            reached = reached.max(span.end);
        }
        let sent_bytes = spans.iter().map(|span| span.end - span.start).sum();
        Self { sent_bytes, distinct_bytes, responses: spans.len() }
    }

    /// Bytes that were sent although they had been sent before.
    #[must_use]
    pub fn again_bytes(&self) -> u64 {
        self.sent_bytes - self.distinct_bytes
    }
}

impl Response {
    fn span(&self) -> Range<u64> {
        self.asked.start..self.asked.start + self.sent_bytes
    }

    /// Whether all of `piece` was sent.
    #[must_use]
    pub fn has(&self, piece: &Range<u64>) -> bool {
        let span = self.span();
        span.start <= piece.start && piece.end <= span.end
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn response(start: u64, end: u64, sent_bytes: u64) -> Response {
        Response { asked: start..end, sent_bytes }
    }

    #[test]
    fn overlaps_count_as_sent_again() {
        let covered = Coverage::of(&[response(10, 20, 10), response(0, 15, 12), response(40, 50, 0)]);
        assert_eq!(covered, Coverage { sent_bytes: 22, distinct_bytes: 20, responses: 2 });
        assert_eq!(covered.again_bytes(), 2);
    }

    #[test]
    fn a_ledger_reads_back() {
        let ledger = Ledger::default();
        let index = ledger.begin("sha256:00", 5..9);
        ledger.add("sha256:00", index, 3);
        assert_eq!(read(&ledger.write()).unwrap()["sha256:00"], [response(5, 9, 3)]);
    }

    #[test]
    fn a_piece_counts_as_sent_when_it_is_whole() {
        assert!(response(0, 100, 50).has(&(10..50)));
        assert!(!response(0, 100, 50).has(&(10..51)));
        assert!(!response(11, 100, 50).has(&(10..50)));
    }
}
