//! The bodies that pass between clients, the swarm and registries. All are pulled: what a client does not read is not
//! asked for.

use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use darter_tracker::Digest;
use futures_util::Stream;
use http_body_util::combinators::{BoxBody, UnsyncBoxBody};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Body, Frame, SizeHint};
use prometheus_client::metrics::counter::Counter;
use tokio::time::Sleep;

use super::respond::chain;
use crate::store::verify::Whole;

/// An error of any body. It ends the connection; nobody looks into it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What a client sends, on its way to an upstream.
pub type ClientBody = BoxBody<Bytes, BoxError>;

/// What a client is answered with.
pub type AnswerBody = UnsyncBoxBody<Bytes, BoxError>;

/// Counts bytes.
pub(super) type ByteCounter = Counter<u64, AtomicU64>;

/// A request without a body.
pub(super) fn nothing() -> ClientBody {
    Empty::new().map_err(|never| match never {}).boxed()
}

/// A client that sends nothing of a body for so long, though the registry would take it, is given up: as long as one may be silent
/// between two requests.
pub(super) const SILENT_BODY: Duration = Duration::from_secs(60);

/// A client stopped in the middle of its request.
#[derive(Debug, thiserror::Error)]
#[error("the client sent nothing more of its request for {} s", SILENT_BODY.as_secs())]
pub(super) struct SilentError;

impl SilentError {
    /// Whether this is what is behind an error of an upstream's.
    pub(super) fn is_behind(error: &(dyn std::error::Error + 'static)) -> bool {
        std::iter::successors(Some(error), |error| error.source()).any(|error| error.is::<Self>())
    }
}

/// A request's body, streamed.
pub(super) fn sent<B>(body: B) -> ClientBody
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + Sync + Unpin + 'static,
{
    SentBody { body, silent: None }.boxed()
}

/// What a client sends, unless it stops.
struct SentBody<B> {
    body: B,
    /// Runs while something is waited for.
    silent: Option<Pin<Box<Sleep>>>,
}

impl<B> Body for SentBody<B>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            this.silent = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let silent = this.silent.get_or_insert_with(|| Box::pin(tokio::time::sleep(SILENT_BODY)));
        ready!(silent.as_mut().poll(cx));
        Poll::Ready(Some(Err(SilentError.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer that is all there.
pub(super) fn full(bytes: impl Into<Bytes>) -> AnswerBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// An answer that streams.
pub(super) fn streamed<B>(body: B) -> AnswerBody
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    body.map_err(Into::into).boxed_unsync()
}

/// Why a blob's body was cut. The client sees a connection that ends too early, never a short success.
#[derive(Debug, thiserror::Error)]
pub(super) enum CutError {
    /// What delivers the blob failed.
    #[error("the blob could not be delivered to its end")]
    Source(#[source] BoxError),
    /// The stream ended before the promised length.
    #[error("the blob ended {missing} bytes early")]
    Short {
        /// How many bytes are missing.
        missing: u64,
    },
    /// The bytes are not those of the digest.
    #[error("the registry's bytes do not match the digest")]
    Wrong,
    /// The stream has more bytes than were promised.
    #[error("the blob is longer than its registry said")]
    Long,
}

/// A blob's bytes on the way to a client: exactly as many as were promised, or an error.
pub(super) struct BlobBody<S> {
    /// Read before the headers were sent, to know that there is something to send.
    first: Option<Bytes>,
    rest: Pin<Box<S>>,
    left: u64,
    digest: Digest,
    sent: ByteCounter,
}

impl<S> BlobBody<S> {
    /// A body of `length` bytes of the blob `digest`: `first`, then the stream.
    pub(super) fn new(first: Option<Bytes>, rest: Pin<Box<S>>, length: u64, digest: Digest, sent: ByteCounter) -> Self {
        Self { first, rest, left: length, digest, sent }
    }

    fn give(&mut self, bytes: Bytes) -> Result<Frame<Bytes>, CutError> {
        let count = bytes.len() as u64;
        self.left = self.left.checked_sub(count).ok_or(CutError::Long)?;
        self.sent.inc_by(count);
        Ok(Frame::data(bytes))
    }
}

impl<S, E> Body for BlobBody<S>
where
    S: Stream<Item = Result<Bytes, E>>,
    E: Into<BoxError>,
{
    type Data = Bytes;
    type Error = CutError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutError>>> {
        let this = self.get_mut();
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(this.give(first)));
        }
        if this.left == 0 {
            return Poll::Ready(None);
        }
        let frame = match ready!(this.rest.as_mut().poll_next(cx)) {
            Some(Ok(bytes)) => this.give(bytes),
            Some(Err(error)) => Err(CutError::Source(error.into())),
            None => Err(CutError::Short { missing: this.left }),
        };
        if let Err(error) = &frame {
            let (digest, left, error) = (&this.digest, this.left, chain(error));
            tracing::warn!(%digest, left, error, "a client is cut off and has to ask again");
        }
        Poll::Ready(Some(frame))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// A whole blob from an upstream on the way to a client: its last bytes are withheld until all have matched the digest
/// (D7), so that wrong ones never look like a success.
pub(super) struct CheckedBody<B> {
    body: B,
    digest: Digest,
    /// None when the end was reached.
    hasher: Option<Whole>,
    withheld: Option<Bytes>,
    /// Read before the headers were sent.
    first: Option<Bytes>,
}

impl<B> CheckedBody<B> {
    /// A body that is to have that digest.
    pub(super) fn new(body: B, digest: Digest) -> Self {
        Self { body, digest, hasher: Some(Whole::new(&digest)), withheld: None, first: None }
    }
}

impl<B> CheckedBody<B>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    /// Reads the first bytes that may go out, so that a blob which is wrong before that can be answered with an error
    /// instead of a connection that ends without any answer. May be given up and left to the body itself.
    pub(super) async fn begin(&mut self) -> Result<(), CutError> {
        if let Some(frame) = self.frame().await {
            self.first = frame?.into_data().ok();
        }
        Ok(())
    }
}

impl<B> Body for CheckedBody<B>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = CutError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutError>>> {
        let this = self.get_mut();
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        while let Some(hasher) = &mut this.hasher {
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Some(Err(CutError::Source(error.into())))),
                None => {
                    let right = this.hasher.take().is_some_and(|hasher| hasher.matches(&this.digest));
                    let last = this.withheld.take().filter(|_| right).map(|bytes| Ok(Frame::data(bytes)));
                    return Poll::Ready(if right { last } else { Some(Err(CutError::Wrong)) });
                }
            };
            // Trailers say nothing about a blob.
            let bytes = frame.into_data().unwrap_or_default();
            hasher.update(&bytes);
            if let Some(before) = this.withheld.take_if(|_| !bytes.is_empty()) {
                this.withheld = Some(bytes);
                return Poll::Ready(Some(Ok(Frame::data(before))));
            }
            this.withheld = this.withheld.take().or(Some(bytes).filter(|bytes| !bytes.is_empty()));
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.hasher.is_none() && self.first.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let withheld = [&self.withheld, &self.first].into_iter().flatten().map(|bytes| bytes.len() as u64).sum::<u64>();
        self.body.size_hint().exact().map_or_else(SizeHint::default, |left| SizeHint::with_exact(left + withheld))
    }
}

/// An upstream's body on the way to a client, unchanged and counted.
pub(super) struct PassedBody<B> {
    body: B,
    passed: ByteCounter,
}

impl<B> PassedBody<B> {
    /// A body that is counted.
    pub(super) fn new(body: B, passed: ByteCounter) -> Self {
        Self { body, passed }
    }
}

impl<B> Body for PassedBody<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        if let Some(bytes) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            this.passed.inc_by(bytes.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use futures_util::{FutureExt, stream};
    use http_body_util::StreamBody;

    type Item = Result<Bytes, BoxError>;

    fn blob(first: Option<&'static str>, rest: Vec<Item>, length: u64) -> (Result<Bytes, CutError>, u64) {
        let sent = ByteCounter::default();
        let rest = Box::pin(stream::iter(rest));
        let digest = Digest::Sha256([0; 32]);
        let body = BlobBody::new(first.map(Bytes::from), rest, length, digest, sent.clone());
        assert_eq!(body.size_hint().exact(), Some(length));
        let collected = body.collect().now_or_never().unwrap();
        (collected.map(|body| body.to_bytes()), sent.get())
    }

    #[test]
    fn a_blob_has_its_promised_length_or_is_cut() {
        let ok = |text: &'static str| Ok(Bytes::from(text));
        let (whole, sent) = blob(Some("ab"), vec![ok("c"), ok(""), ok("de")], 5);
        assert_eq!((whole.unwrap(), sent), (Bytes::from("abcde"), 5));
        assert!(matches!(blob(None, vec![ok("abc")], 5).0, Err(CutError::Short { missing: 2 })));
        assert!(matches!(blob(None, vec![ok("abc"), ok("def")], 5).0, Err(CutError::Long)));
        let (cut, sent) = blob(Some("ab"), vec![ok("c"), Err("gone".into())], 5);
        assert!(matches!(cut, Err(CutError::Source(_))));
        assert_eq!(sent, 3);
    }

    #[test]
    fn a_passed_blob_is_cut_before_its_end_if_it_is_another() {
        let digest: Digest = "sha256:88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589".parse().unwrap();
        let frames = |last: &'static str| [Bytes::from("ab"), Bytes::new(), Bytes::from(last), Bytes::new()];
        let read = |last| {
            let frames = frames(last).map(|bytes| Ok::<_, BoxError>(Frame::data(bytes)));
            let mut body = CheckedBody::new(StreamBody::new(stream::iter(frames)), digest);
            let mut given = Vec::new();
            while let Some(frame) = body.frame().now_or_never().unwrap() {
                match frame {
                    Ok(frame) => given.extend_from_slice(&frame.into_data().unwrap()),
                    Err(error) => return (given, Some(error)),
                }
            }
            assert!(body.is_end_stream());
            (given, None)
        };
        assert!(matches!(read("cd"), (given, None) if given == b"abcd"));
        assert!(matches!(read("cx"), (given, Some(CutError::Wrong)) if given == b"ab"));
        let whole = CheckedBody::new(Full::new(Bytes::from("abcd")), digest);
        assert_eq!(whole.size_hint().exact(), Some(4));
    }
}
