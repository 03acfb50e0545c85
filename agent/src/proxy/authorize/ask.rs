//! The question itself: HEAD of the client's own URL with the client's own headers, and GET for the words of a no.

use std::sync::Arc;

use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, ETAG, EXPIRES, HeaderMap, HeaderValue, LAST_MODIFIED,
};
use http::{HeaderName, Method, StatusCode};

use super::{Question, Verdict};
use crate::source::registry::{Asked, BlobOrigin, OriginError, Upstream};

/// What of a registry's answer is said again to clients. Cookies, for one, are not.
const SAID_AGAIN: [HeaderName; 8] = [
    ACCEPT_RANGES,
    CACHE_CONTROL,
    CONTENT_TYPE,
    ETAG,
    EXPIRES,
    LAST_MODIFIED,
    HeaderName::from_static("docker-content-digest"),
    HeaderName::from_static("docker-distribution-api-version"),
];

/// Asks the registry.
pub(super) async fn blob(upstream: &Upstream, origin: &BlobOrigin, question: &Question) -> Verdict {
    let Some(_turn) = upstream.question(&question.repository.registry).await else { return Verdict::PassThrough };
    match head_or_first_byte(upstream, origin).await {
        Ok(asked) => verdict(asked, question).await,
        Err(error) => Verdict::Unavailable(Arc::new(error)),
    }
}

/// HEAD, or the blob's first byte where HEAD says too little: some registries do not know it, some redirect it to a URL
/// that was signed for GET, and a refusal of HEAD comes without the document that tells the client why.
async fn head_or_first_byte(upstream: &Upstream, origin: &BlobOrigin) -> Result<Asked, OriginError> {
    let asked = upstream.follow(&Method::HEAD, origin, None).await?;
    let status = asked.response.status();
    // A registry that limits the rate is not asked again.
    let limited = asked.by_registry && status == StatusCode::TOO_MANY_REQUESTS;
    if (status.is_client_error() && !limited) || status == StatusCode::NOT_IMPLEMENTED {
        return upstream.part(origin, &(0..1)).await;
    }
    Ok(asked)
}

async fn verdict(asked: Asked, question: &Question) -> Verdict {
    let status = asked.response.status();
    if !status.is_success() {
        return match asked.refusal().await {
            OriginError::Refused { answer, .. } => Verdict::Refused(*answer),
            // A registry that limits this client's rate has answered; one that is overloaded has not.
            OriginError::Busy { answer: Some(answer), .. } if status == StatusCode::TOO_MANY_REQUESTS => {
                Verdict::Refused(*answer)
            }
            OriginError::Busy { .. } => Verdict::Unavailable(Arc::new(OriginError::Failed(status))),
            // An empty blob has no first byte.
            OriginError::Broken(_) if status == StatusCode::RANGE_NOT_SATISFIABLE => Verdict::PassThrough,
            error => Verdict::Unavailable(Arc::new(error)),
        };
    }
    let headers = asked.response.headers();
    let encoded = headers.get_all(CONTENT_ENCODING).iter().any(|coding| coding != "identity");
    let another = headers
        .get("docker-content-digest")
        .is_some_and(|said| said.as_bytes() != question.digest.to_string().as_bytes());
    match asked.blob_length() {
        Some(length) if length > 0 && !encoded && !another => Verdict::Granted { length, headers: said_again(headers) },
        _ => Verdict::PassThrough,
    }
}

pub(super) fn said_again(headers: &HeaderMap) -> HeaderMap {
    let mut said: HeaderMap =
        SAID_AGAIN.iter().filter_map(|name| headers.get(name).map(|value| (name.clone(), value.clone()))).collect();
    // Whatever the registry can do, the agent serves ranges.
    said.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    said
}
