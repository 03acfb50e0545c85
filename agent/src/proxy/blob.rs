//! A blob for a client: may it have it, which bytes, and from the swarm if the swarm can.
//!
//! Whatever goes wrong before the first byte, the registry answers instead (D11), unless its bytes are what is wrong
//! (D7). After it there is no way back: the connection is cut, and never does a short answer look like a success.

use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use darter_tracker::{Digest, TaskId};
use futures_util::StreamExt;
use http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, IF_MATCH,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, RANGE,
};
use http::request::Parts;
use http::{Response, StatusCode};
use tokio::time::timeout;

use super::Proxy;
use super::body::{self, AnswerBody, BlobBody, BoxError, CutError};
use super::range::{self, Satisfied, Wanted};
use super::respond::{self, Refusal};
use super::seam::{Authorize, BlobOrigin, BlobRequest, Blobs, Client, Origin, Repository, Verdict};
use crate::admin::metrics::FallbackReason;

/// How long the headers wait for the first bytes, so that a failure can still become the registry's own answer. After
/// that they are sent, since some clients give up on a server that does not begin to answer.
pub(super) const FIRST_BYTES_WAIT: Duration = Duration::from_secs(1);

/// Headers that make a request conditional. The registry knows its own validators best, so it answers these itself.
pub(super) const CONDITIONS: [HeaderName; 5] =
    [IF_MATCH, IF_NONE_MATCH, IF_RANGE, IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE];

/// Why no delivery began.
pub(super) enum Failure {
    /// The bytes are wrong. The registry's own answer would give them to the client unchecked.
    Wrong(BoxError),
    /// Anything else: the registry answers instead.
    Other(BoxError),
}

/// A blob that may be delivered.
struct Delivery {
    digest: Digest,
    length: u64,
    headers: HeaderMap,
    part: Option<Range<u64>>,
}

impl<O: Origin, A: Authorize, B: Blobs> Proxy<O, A, B> {
    /// Answers a GET, without a body, of a blob that the swarm may deliver.
    pub(super) async fn deliver(
        &self,
        head: Parts,
        repository: Repository,
        digest: Digest,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let wanted = wanted(&head.headers);
        if wanted == Wanted::Registrys || CONDITIONS.iter().any(|name| head.headers.contains_key(name)) {
            return self.pass_blob(head, digest).await;
        }
        let origin = BlobOrigin { url: head.uri.clone(), headers: head.headers.clone() };
        let (length, headers) = match self.authorize.blob(&origin, &repository, &digest).await {
            Verdict::Granted { length, headers } => (length, headers),
            Verdict::Refused(answer) => return Ok(respond::pass_on(answer)),
            Verdict::PassThrough => return self.pass_blob(head, digest).await,
            Verdict::Unavailable(error) => return Err(Refusal::Unavailable(error)),
        };
        if length == 0 {
            // There is nothing that a swarm could move.
            return self.pass_blob(head, digest).await;
        }
        let part = match wanted {
            Wanted::One(spec) => match spec.within(length) {
                Satisfied::Part(part) => Some(part),
                Satisfied::PastEnd => return Err(Refusal::RangePastEnd { length }),
            },
            Wanted::Invalid => return Err(Refusal::RangeSyntax),
            Wanted::Whole | Wanted::Registrys => None,
        };
        let range = part.clone().unwrap_or(0..length);
        // A query may hold a credential, which the client would not be told apart by.
        let client = Client::new(&repository.registry, &repository.name, &origin.headers);
        let client = Some(client).filter(|_| head.uri.query().is_none());
        let named = self.is_named(&head.uri);
        let request = BlobRequest { task: TaskId::blob(digest), length, origin, range, named, client };
        match self.open(request).await {
            Ok((first, rest)) => Ok(self.delivered(Delivery { digest, length, headers, part }, first, rest)),
            Err(Failure::Wrong(error)) => Err(Refusal::Wrong(error)),
            Err(Failure::Other(error)) => {
                tracing::warn!(%digest, error = %respond::chain(&*error), "the registry delivers a blob instead");
                self.metrics.fallback(FallbackReason::NoCache);
                self.pass_blob(head, digest).await
            }
        }
    }

    /// Begins a delivery and waits a little for its first bytes.
    pub(super) async fn open(&self, request: BlobRequest) -> Result<(Option<Bytes>, Pin<Box<B::Body>>), Failure> {
        let failure = |error: B::Error| {
            if B::is_wrong(&error) { Failure::Wrong(error.into()) } else { Failure::Other(error.into()) }
        };
        let missing = request.range.end - request.range.start;
        let mut stream = Box::pin(self.blobs.open(request).await.map_err(failure)?);
        match timeout(FIRST_BYTES_WAIT, stream.next()).await {
            Ok(Some(Ok(first))) => Ok((Some(first), stream)),
            Ok(Some(Err(error))) => Err(failure(error)),
            Ok(None) => Err(Failure::Other(CutError::Short { missing }.into())),
            // The wait goes on in the body.
            Err(_) => Ok((None, stream)),
        }
    }

    fn delivered(&self, delivery: Delivery, first: Option<Bytes>, rest: Pin<Box<B::Body>>) -> Response<AnswerBody> {
        let Delivery { digest, length, mut headers, part } = delivery;
        let count = part.as_ref().map_or(length, |part| part.end - part.start);
        let stream = BlobBody::new(first, rest, count, digest, self.metrics.client_bytes.clone());
        let mut answer = Response::new(body::streamed(stream));
        headers.remove(CONTENT_RANGE);
        if let Some(part) = part {
            *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
            let text = format!("bytes {}-{}/{length}", part.start, part.end - 1);
            // Digits and punctuation are always a header value.
            if let Ok(value) = HeaderValue::try_from(text) {
                headers.insert(CONTENT_RANGE, value);
            }
        }
        headers.insert(CONTENT_LENGTH, count.into());
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("application/octet-stream"));
        *answer.headers_mut() = headers;
        answer
    }
}

/// What the Range header of a request asks for; several of them are none that can be read.
fn wanted(headers: &HeaderMap) -> Wanted {
    let mut values = headers.get_all(RANGE).iter();
    match (values.next(), values.next()) {
        (None, _) => Wanted::Whole,
        (Some(value), None) => value.to_str().map_or(Wanted::Invalid, range::parse),
        (Some(_), Some(_)) => Wanted::Registrys,
    }
}
