//! The body of a request on its way from a client to a registry.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::watch;
use tokio::time::Instant;

/// Why a body ended early.
pub type BodyError = Box<dyn Error + Send + Sync>;

/// A request's body, streamed and never collected. It notes when it last moved, so that a slow upload is told apart
/// from a registry that does not answer.
pub struct ProxyBody {
    inner: BoxBody<Bytes, BodyError>,
    moved: Arc<watch::Sender<Instant>>,
}

impl ProxyBody {
    /// No body.
    #[must_use]
    pub fn empty() -> Self {
        Self::new(Empty::new())
    }

    /// A body out of any other, for example the one that a client is sending.
    pub fn new<B>(body: B) -> Self
    where
        B: Body<Data = Bytes> + Send + Sync + 'static,
        B::Error: Into<BodyError>,
    {
        Self { inner: body.map_err(Into::into).boxed(), moved: Arc::new(watch::Sender::new(Instant::now())) }
    }

    /// Tells when the body last moved.
    pub(super) fn moved(&self) -> watch::Receiver<Instant> {
        self.moved.subscribe()
    }
}

impl From<hyper::body::Incoming> for ProxyBody {
    fn from(body: hyper::body::Incoming) -> Self {
        Self::new(body)
    }
}

impl From<Bytes> for ProxyBody {
    fn from(body: Bytes) -> Self {
        Self::new(Full::new(body))
    }
}

impl Body for ProxyBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        if frame.is_ready() {
            self.moved.send_replace(Instant::now());
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
