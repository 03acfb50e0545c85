//! The one place where what went wrong becomes an HTTP answer.

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_RANGE, CONTENT_TYPE, HeaderValue};
use http::{HeaderName, Response, StatusCode};

use super::body::{self, AnswerBody, BoxError, SilentError};
use super::seam::Fault;
use crate::admin::metrics::Metrics;

/// Why a client does not get what it asked for. Nothing was changed by any of these.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// The request is not one that a proxy, or a registry, understands. The client's mistake.
    #[error("{0}")]
    Malformed(&'static str),
    /// The request has more header fields than anybody needs.
    #[error("the request has too many header fields")]
    TooManyHeaders,
    /// The client has stopped in the middle of its request. What the registry got of it is the registry's to forget.
    #[error(transparent)]
    Silent(SilentError),
    /// The client may not go there through this proxy.
    #[error("this proxy does not connect to {host}")]
    Forbidden {
        /// Where it wanted to go.
        host: String,
    },
    /// The request is for another host than its connection.
    #[error("this connection is for {host} only")]
    Misdirected {
        /// Whom the connection is for.
        host: String,
    },
    /// The path names a blob by something that is no digest.
    #[error("the digest is malformed")]
    Digest,
    /// The Range header cannot be read.
    #[error("invalid range")]
    RangeSyntax,
    /// The range begins past the end of the blob.
    #[error("invalid range: failed to overlap")]
    RangePastEnd {
        /// The blob's length in bytes.
        length: u64,
    },
    /// The host did not answer, or not usefully.
    #[error("{host} did not answer")]
    Upstream {
        /// Which host.
        host: String,
        /// Whose fault it is.
        fault: Fault,
        /// What happened.
        #[source]
        source: BoxError,
    },
    /// The registry, or a peer, gave other bytes than the digest stands for.
    #[error("the blob does not match its digest")]
    Wrong(#[source] BoxError),
    /// Nobody could be asked whether the client may have the blob.
    #[error("the registry cannot be asked")]
    Unavailable(#[source] BoxError),
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(_) | Self::Digest => StatusCode::BAD_REQUEST,
            Self::Silent(_) => StatusCode::REQUEST_TIMEOUT,
            Self::TooManyHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Forbidden { .. } | Self::Upstream { fault: Fault::Forbidden, .. } => StatusCode::FORBIDDEN,
            Self::Misdirected { .. } => StatusCode::MISDIRECTED_REQUEST,
            Self::RangeSyntax | Self::RangePastEnd { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Upstream { fault: Fault::Unreachable, .. } | Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Upstream { fault: Fault::Broken, .. } | Self::Wrong(_) => StatusCode::BAD_GATEWAY,
        }
    }
}

/// The answer to a request that is refused; logged and counted here, once.
pub(super) fn refuse(refusal: &Refusal, metrics: &Metrics) -> Response<AnswerBody> {
    let status = refusal.status();
    if status.is_client_error() {
        metrics.client_refusals.inc();
        tracing::debug!(%status, refusal = %refusal, "refused a client's request");
    } else {
        tracing::warn!(%status, error = %chain(refusal), "a request failed");
    }
    let mut answer = match refusal {
        Refusal::Digest => digest_invalid(),
        _ => text(status, refusal),
    };
    if matches!(refusal, Refusal::Malformed(_) | Refusal::Silent(_)) {
        // Who is not understood once may mean something else by what follows, too.
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if let Refusal::RangePastEnd { length } = refusal
        && let Ok(value) = HeaderValue::try_from(format!("bytes */{length}"))
    {
        answer.headers_mut().insert(CONTENT_RANGE, value);
    }
    answer
}

/// The registry's own answer, passed on.
pub(super) fn pass_on(answer: Response<Bytes>) -> Response<AnswerBody> {
    answer.map(body::full)
}

/// The answer that turns a CONNECT into a tunnel.
pub(super) fn connected() -> Response<AnswerBody> {
    Response::new(body::full(Bytes::new()))
}

/// Plain text, as Go's `http.Error` writes it, which is what registries answer with outside the API's own errors.
fn text(status: StatusCode, message: &Refusal) -> Response<AnswerBody> {
    let mut answer = Response::new(body::full(format!("{message}\n")));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    answer
}

/// The distribution specification's error document for a digest that is none.
fn digest_invalid() -> Response<AnswerBody> {
    let document = serde_json::json!({
        "errors": [{"code": "DIGEST_INVALID", "message": "provided digest is malformed"}]
    });
    let mut answer = Response::new(body::full(document.to_string()));
    *answer.status_mut() = StatusCode::BAD_REQUEST;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// An error and what caused it, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
