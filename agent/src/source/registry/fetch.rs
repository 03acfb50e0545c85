//! A part of a blob from the registry, with every claim of the reply checked.

use std::fmt;
use std::ops::Range;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderMap};
use http::{Response, StatusCode, Uri};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::headers::{Credential, Redacted, strip_hop_by_hop};
use super::limit::retry_after;
use super::redirect::Asked;
use super::{Upstream, UpstreamError};

/// How long a registry may go without sending a byte of a body.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of a refusal's body that are passed on; a registry's error document has a few hundred.
const REFUSAL_BYTES_MAX: usize = 64 * 1024;

/// How long a refusal's body may take altogether. Its status and headers are what matters.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a client asked for a blob and how: what is needed to ask again on its behalf.
#[derive(Clone)]
pub struct BlobOrigin {
    /// Absolute URL, as the client asked for it.
    pub url: Uri,
    /// The client's own headers. They hold credentials.
    pub headers: HeaderMap,
}

impl fmt::Debug for BlobOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither the query nor a user name in front of the host: both may hold a secret.
        let host = self.url.host().unwrap_or_default();
        f.debug_struct("BlobOrigin")
            .field("host", &host)
            .field("path", &self.url.path())
            .field("headers", &Redacted(&self.headers))
            .finish()
    }
}

/// Why a registry did not deliver.
#[derive(thiserror::Error)]
pub enum OriginError {
    /// It refused: the client's credentials or the blob are not what it wants. Not retried with the same credentials;
    /// the answer is for the client.
    #[error("the registry answered {}", .answer.status())]
    Refused {
        /// Its own answer, headers for one connection taken out, the body cut at 64 KiB.
        answer: Box<Response<Bytes>>,
        /// Whether the registry itself said so, as opposed to a host that it redirected to.
        by_registry: bool,
    },
    /// It wants to be left alone for a while; nobody should ask with these credentials before.
    #[error("the registry is busy for {retry_after:?}")]
    Busy {
        /// For how long.
        retry_after: Duration,
        /// Its own answer, for a client that would rather have it than wait. None while a former one still holds.
        answer: Option<Box<Response<Bytes>>>,
    },
    /// Its reply contradicts itself or what was asked. The registry's fault; another try may help.
    #[error("the registry's reply is wrong: {0}")]
    Broken(&'static str),
    /// It says that the blob has another length than it, or a manifest, said before. Its own answer is what helps.
    #[error("the blob has another length than was said")]
    OtherLength,
    /// It does not serve the parts of the blob that are asked for, but none, others, or encoded ones.
    #[error("the registry does not serve ranges")]
    NoRange,
    /// It stopped sending. May be retried.
    #[error("the registry sent nothing for {} s", IDLE_TIMEOUT.as_secs())]
    Stalled,
    /// It answered with a server error. May be retried.
    #[error("the registry answered {0}")]
    Failed(StatusCode),
    /// There is no answer.
    #[error("the registry cannot be asked")]
    Unreachable(#[source] UpstreamError),
    /// The connection broke in the middle of a body. May be retried.
    #[error("the registry's reply broke off")]
    Cut(#[source] hyper::Error),
}

impl fmt::Debug for OriginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As it is displayed: an answer's headers may set cookies.
        write!(f, "OriginError({self})")
    }
}

impl OriginError {
    /// Whether asking the same thing again, with the same credentials, may help.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused { by_registry, .. } => !by_registry,
            Self::NoRange | Self::OtherLength => false,
            Self::Unreachable(error) => !error.is_refused(),
            Self::Busy { .. } | Self::Broken(_) | Self::Stalled | Self::Failed(_) | Self::Cut(_) => true,
        }
    }

    /// Whether the registry is down or out of reach.
    #[must_use]
    pub fn is_down(&self) -> bool {
        match self {
            Self::Unreachable(error) => error.is_down(),
            Self::Failed(_) | Self::Stalled | Self::Cut(_) => true,
            Self::Refused { .. } | Self::Busy { .. } | Self::Broken(_) | Self::NoRange | Self::OtherLength => false,
        }
    }
}

impl Upstream {
    /// Gets `bytes` of a blob that is `length` bytes long. Waits for its turn where the registry is already asked for
    /// much.
    ///
    /// # Errors
    /// See [`OriginError`].
    pub async fn fetch(&self, origin: &BlobOrigin, bytes: Range<u64>, length: u64) -> Result<RangeBody, OriginError> {
        let registry = self.origin_of(&origin.url).map_err(OriginError::Unreachable)?;
        let permit = self.limits.fetch(&registry).await;
        self.fetch_in_turn(&registry, origin, bytes, length, permit).await
    }

    /// The same for bytes that a reader waits for (D11): other fetches, which may be held back on purpose, do not hold
    /// this one back. There are as many of these as there are readers.
    ///
    /// # Errors
    /// See [`OriginError`].
    pub async fn fetch_urgent(
        &self,
        origin: &BlobOrigin,
        bytes: Range<u64>,
        length: u64,
    ) -> Result<RangeBody, OriginError> {
        let registry = self.origin_of(&origin.url).map_err(OriginError::Unreachable)?;
        self.fetch_in_turn(&registry, origin, bytes, length, None).await
    }

    async fn fetch_in_turn(
        &self,
        registry: &str,
        origin: &BlobOrigin,
        bytes: Range<u64>,
        length: u64,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<RangeBody, OriginError> {
        if bytes.is_empty() || bytes.end > length {
            return Err(OriginError::Broken("a range outside of the blob was asked for"));
        }
        let credential = Credential::of(&origin.headers);
        if let Some(retry_after) = self.limits.paused(registry, credential) {
            return Err(OriginError::Busy { retry_after, answer: None });
        }
        let asked = self.part(origin, &bytes).await?;
        let status = asked.response.status();
        if !status.is_success() {
            let error = refusal(asked).await;
            if let OriginError::Busy { retry_after, .. } = error {
                self.limits.pause(registry, credential, retry_after);
            }
            return Err(error);
        }
        check(&asked.response, &bytes, length)?;
        Ok(RangeBody {
            body: asked.response.into_body(),
            left: Bytes::new(),
            remaining: bytes.end - bytes.start,
            counter: self.metrics.registry_bytes.clone(),
            _permit: permit,
        })
    }
}

/// Whether a status asks to be left alone for a while.
pub(super) fn is_busy(status: StatusCode) -> bool {
    matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
}

/// What an answer that is no success means.
pub(super) async fn refusal(asked: Asked) -> OriginError {
    let status = asked.response.status();
    if is_busy(status) {
        let retry_after = retry_after(asked.response.headers(), SystemTime::now());
        return OriginError::Busy { retry_after, answer: Some(Box::new(collected(asked.response).await)) };
    }
    match status {
        // Only parts of what it said that it has are asked for.
        StatusCode::RANGE_NOT_SATISFIABLE => OriginError::NoRange,
        status if status.is_client_error() => {
            OriginError::Refused { by_registry: asked.by_registry, answer: Box::new(collected(asked.response).await) }
        }
        status if status.is_server_error() => OriginError::Failed(status),
        _ => OriginError::Broken("its status is neither a success nor an error"),
    }
}

/// A small answer as a whole, for the client.
async fn collected(response: Response<Incoming>) -> Response<Bytes> {
    let (mut head, mut body) = response.into_parts();
    strip_hop_by_hop(&mut head.headers);
    // The body may be cut; whoever passes the answer on writes its length.
    head.headers.remove(CONTENT_LENGTH);
    let mut bytes = Vec::new();
    let whole = async {
        while let Some(Ok(frame)) = body.frame().await {
            let Ok(data) = frame.into_data() else { continue };
            let room = REFUSAL_BYTES_MAX - bytes.len();
            bytes.extend_from_slice(&data[..data.len().min(room)]);
            if data.len() >= room {
                break;
            }
        }
    };
    // What came until then is passed on.
    let _ = timeout(REFUSAL_TIMEOUT, whole).await;
    Response::from_parts(head, bytes.into())
}

/// Whether a success holds exactly what was asked for.
fn check(response: &Response<Incoming>, bytes: &Range<u64>, length: u64) -> Result<(), OriginError> {
    let headers = response.headers();
    if headers.get_all(CONTENT_ENCODING).iter().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        // Parts of something else than the blob.
        return Err(OriginError::NoRange);
    }
    let size = content_length(headers)?;
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let (range, total) =
                content_range(headers).ok_or(OriginError::Broken("its range is missing or malformed"))?;
            if total != length {
                return Err(OriginError::OtherLength);
            }
            if range != *bytes {
                return Err(OriginError::NoRange);
            }
            if size.is_some_and(|size| size != bytes.end - bytes.start) {
                return Err(OriginError::Broken("its length does not fit its range"));
            }
            Ok(())
        }
        StatusCode::OK if *bytes != (0..length) => Err(OriginError::NoRange),
        // Without a length the body is counted as it is read.
        StatusCode::OK if size.is_none_or(|size| size == length) => Ok(()),
        StatusCode::OK => Err(OriginError::OtherLength),
        _ => Err(OriginError::Broken("its status is not one for a blob")),
    }
}

/// The value of `Content-Length`; several different ones are refused.
pub(super) fn content_length(headers: &HeaderMap) -> Result<Option<u64>, OriginError> {
    let mut values = headers.get_all(CONTENT_LENGTH).iter();
    let Some(first) = values.next() else { return Ok(None) };
    if values.any(|value| value != first) {
        return Err(OriginError::Broken("it has two lengths"));
    }
    let length = first.to_str().ok().and_then(decimal);
    length.map(Some).ok_or(OriginError::Broken("its length is malformed"))
}

/// The bytes and the total of `Content-Range` (RFC 9110, 14.4). An unknown total is not good enough.
pub(super) fn content_range(headers: &HeaderMap) -> Option<(Range<u64>, u64)> {
    let mut values = headers.get_all(CONTENT_RANGE).iter();
    let text = values.next()?.to_str().ok()?;
    if values.next().is_some() {
        return None;
    }
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, total) = (decimal(first)?, decimal(last)?, decimal(total)?);
    (first <= last && last < total).then(|| (first..last + 1, total))
}

/// Digits and nothing else: the standard parser takes a sign.
fn decimal(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// The body of a part of a blob. It is read only as fast as it is asked for; dropping it early closes the connection.
pub struct RangeBody {
    body: Incoming,
    left: Bytes,
    remaining: u64,
    counter: Counter<u64, std::sync::atomic::AtomicU64>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl fmt::Debug for RangeBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RangeBody").field("remaining", &self.remaining).finish_non_exhaustive()
    }
}

impl RangeBody {
    /// Bytes that have not been read yet.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// The next bytes, at most `buf_len`; none after exactly as many as were asked for. Cancel safe.
    ///
    /// # Errors
    /// [`OriginError::Broken`] if there are fewer or more bytes than that, [`OriginError::Stalled`] after 30 s without
    /// one, [`OriginError::Cut`] if the connection breaks.
    pub async fn read(&mut self, buf_len: usize) -> Result<Option<Bytes>, OriginError> {
        while self.left.is_empty() {
            match timeout(IDLE_TIMEOUT, self.body.frame()).await {
                Err(_) => return Err(OriginError::Stalled),
                Ok(Some(Err(error))) => return Err(OriginError::Cut(error)),
                Ok(None) if self.remaining == 0 => return Ok(None),
                Ok(None) => return Err(OriginError::Broken("it sent fewer bytes than it said")),
                // Trailers say nothing about a blob.
                Ok(Some(Ok(frame))) => self.left = frame.into_data().unwrap_or_default(),
            }
            self.counter.inc_by(self.left.len() as u64);
            if self.left.len() as u64 > self.remaining {
                return Err(OriginError::Broken("it sent more bytes than were asked for"));
            }
        }
        let part = self.left.split_to(self.left.len().min(buf_len.max(1)));
        self.remaining -= part.len() as u64;
        Ok(Some(part))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn content_range_is_read_strictly() {
        let read = |text: &str| content_range(&[(CONTENT_RANGE, text.parse().unwrap())].into_iter().collect());
        assert_eq!(read("bytes 0-9/10"), Some((0..10, 10)));
        assert_eq!(read("bytes 5-5/10"), Some((5..6, 10)));
        for text in [
            "bytes 0-10/10",
            "bytes 5-4/10",
            "bytes 0-9/*",
            "bytes */10",
            "bytes +0-9/10",
            "bytes=0-9/10",
            "bytes 0-18446744073709551615/18446744073709551615",
            "items 0-9/10",
            "",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    // S17
    #[test]
    fn an_origin_prints_no_secret() {
        let headers = ["authorization", "cookie", "proxy-authorization", "x-api-key"]
            .map(|name| (name.parse::<http::HeaderName>().unwrap(), "s3cret".parse().unwrap()));
        let url = "https://user:s3cret@registry.example.org/v2/a/blobs/b?token=s3cret".parse().unwrap();
        let origin = BlobOrigin { url, headers: headers.into_iter().collect() };
        let text = format!("{origin:?} {origin:#?}");
        assert!(!text.contains("s3cret"), "{text}");
        assert!(text.contains("registry.example.org"), "{text}");
    }
}
