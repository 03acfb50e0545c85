//! Bodies of answers: a few held bytes, or a blob made chunk by chunk as the connection takes it.

use std::num::NonZeroU64;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::super::image::Blob;
use super::stats::OnItsWay;

/// Made at a time: a few times a TLS record, little memory for each connection.
const CHUNK_BYTES: u64 = 64 << 10;

/// With a rate, chunks become due this often, so that a slow blob trickles instead of jerking.
const CHUNKS_PER_SECOND: u64 = 50;

/// Bytes that count themselves when the connection has taken them.
#[derive(Debug)]
pub(super) struct Chunk {
    bytes: Bytes,
    taken: Option<Arc<AtomicU64>>,
}

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if let Some(taken) = &self.taken {
            taken.fetch_add(count as u64, Ordering::Relaxed);
        }
    }
}

/// The rate of one blob, shared by its readers: a point in time until which it is spoken for.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: NonZeroU64,
    free: Mutex<Instant>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: NonZeroU64) -> Self {
        Self { bytes_per_second, free: Mutex::new(Instant::now()) }
    }

    /// Books the time that `bytes` take and returns its end, when they may go.
    fn book(&self, bytes: u64) -> Instant {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (*free).max(Instant::now());
        *free = start + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second.get() as f64);
        *free
    }

    fn chunk_bytes(&self) -> u64 {
        (self.bytes_per_second.get() / CHUNKS_PER_SECOND).clamp(1, CHUNK_BYTES)
    }
}

/// What an answer carries.
pub(super) enum Answer {
    /// Bytes that are not counted.
    Held(Option<Bytes>),
    /// Part of a blob.
    Blob(Box<Part>),
}

/// A range of a blob on its way out.
pub(super) struct Part {
    pub(super) blob: Blob,
    /// What is still to be made.
    pub(super) left: Range<u64>,
    /// The byte that is served wrong.
    pub(super) wrong: Option<u64>,
    pub(super) pace: Option<Arc<Pace>>,
    /// When the next chunk may go, if there is a rate and it is booked.
    pub(super) due: Option<Pin<Box<Sleep>>>,
    pub(super) taken: Arc<AtomicU64>,
    /// Counted until the body is dropped.
    pub(super) _open: OnItsWay,
}

impl Answer {
    pub(super) fn empty() -> Self {
        Self::Held(None)
    }
}

impl Part {
    fn poll_chunk(&mut self, context: &mut Context<'_>) -> Poll<Option<Chunk>> {
        if self.left.is_empty() {
            return Poll::Ready(None);
        }
        let most = self.pace.as_ref().map_or(CHUNK_BYTES, |pace| pace.chunk_bytes());
        let range = self.left.start..self.left.end.min(self.left.start + most);
        if let Some(pace) = &self.pace {
            let due =
                self.due.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(pace.book(range.end - range.start))));
            ready!(due.as_mut().poll(context));
            self.due = None;
        }
        self.left.start = range.end;
        Poll::Ready(Some(Chunk { bytes: self.bytes(&range), taken: Some(Arc::clone(&self.taken)) }))
    }

    fn bytes(&self, range: &Range<u64>) -> Bytes {
        let bytes = self.blob.read(range.clone());
        let Some(wrong) = self.wrong.filter(|wrong| range.contains(wrong)) else {
            return bytes;
        };
        let mut bytes = Vec::from(bytes);
        // A chunk is at most CHUNK_BYTES long, and the byte lies in it.
        bytes[(wrong - range.start) as usize] ^= 1;
        bytes.into()
    }
}

impl Body for Answer {
    type Data = Chunk;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let chunk = match self.get_mut() {
            Self::Held(bytes) => bytes.take().map(|bytes| Chunk { bytes, taken: None }),
            Self::Blob(part) => ready!(part.poll_chunk(context)),
        };
        Poll::Ready(chunk.map(|chunk| Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.size_hint().exact() == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::Held(bytes) => bytes.as_ref().map_or(0, |bytes| bytes.len() as u64),
            Self::Blob(part) => part.left.end - part.left.start,
        })
    }
}
