//! Asking for a blob, along the redirects that registries answer with.

use std::ops::Range;

use http::header::{HeaderMap, HeaderValue, LOCATION, RANGE};
use http::{Method, Response, StatusCode};
use hyper::body::Incoming;

use super::fetch::{self, BlobOrigin, OriginError};
use super::pool::Purpose;
use super::{Upstream, headers, target};

/// Hops that are followed (S25). Registries use one, those behind a global load balancer two.
const REDIRECTS_MAX: usize = 5;

/// An answer to a question about a blob, and who gave it.
pub struct Asked {
    /// The answer. Its body has not been read.
    pub response: Response<Incoming>,
    /// Whether it came from the registry's own origin, as opposed to one that it redirected to.
    pub by_registry: bool,
}

impl Asked {
    /// What an answer that is no success means: its own answer where it is for the client.
    pub async fn refusal(self) -> OriginError {
        fetch::refusal(self).await
    }

    /// The length of the whole blob, if the answer names one that can be relied on.
    #[must_use]
    pub fn blob_length(&self) -> Option<u64> {
        let headers = self.response.headers();
        match self.response.status() {
            StatusCode::OK => fetch::content_length(headers).ok().flatten(),
            StatusCode::PARTIAL_CONTENT => fetch::content_range(headers).map(|(_, total)| total),
            _ => None,
        }
    }
}

impl Upstream {
    /// Asks for a part of a blob as [`Self::follow`] does, and once more if the host that the registry redirected to refuses: a
    /// signed URL expires, and the registry gives a fresh one.
    ///
    /// # Errors
    /// As of [`Self::follow`].
    pub async fn part(&self, origin: &BlobOrigin, range: &Range<u64>) -> Result<Asked, OriginError> {
        let asked = self.follow(&Method::GET, origin, Some(range)).await?;
        let status = asked.response.status();
        if asked.by_registry || !status.is_client_error() || fetch::is_busy(status) {
            return Ok(asked);
        }
        self.follow(&Method::GET, origin, Some(range)).await
    }

    /// Asks for a blob, or a part of it, with the client's own headers, and follows redirects. Every hop passes the dial
    /// filter. What the client sent goes to the registry's origin alone; once a hop left it, nothing gets it back.
    ///
    /// # Errors
    /// [`OriginError::Unreachable`] or [`OriginError::Broken`]; any status is an answer, not an error.
    pub async fn follow(
        &self,
        method: &Method,
        origin: &BlobOrigin,
        range: Option<&Range<u64>>,
    ) -> Result<Asked, OriginError> {
        let mut headers = headers::for_blob(&origin.headers);
        let mut target = self.target(&origin.url).map_err(|error| OriginError::Unreachable(error.into()))?;
        let mut by_registry = true;
        for _ in 0..=REDIRECTS_MAX {
            if *method == Method::GET {
                self.metrics.registry_requests.inc();
            }
            let response = self
                .ask(Purpose::Blob, &target, method, &with_range(&headers, range))
                .await
                .map_err(OriginError::Unreachable)?;
            if !is_redirect(response.status()) {
                return Ok(Asked { response, by_registry });
            }
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let location = location.ok_or(OriginError::Broken("it redirected to nowhere"))?;
            let next = target::resolve(&target.uri, location)
                .and_then(|url| self.target(&url))
                .map_err(|_| OriginError::Broken("it redirected to what is no http or https URL"))?;
            if target.https && !next.https && !next.insecure {
                return Err(OriginError::Broken("it redirected from https to http"));
            }
            if next.origin() != target.origin() {
                headers = headers::for_stranger(&headers);
                by_registry = false;
            }
            target = next;
        }
        Err(OriginError::Broken("it redirected too often"))
    }
}

fn with_range(headers: &HeaderMap, range: Option<&Range<u64>>) -> HeaderMap {
    let mut headers = headers.clone();
    let text = range.map(|range| format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
    if let Some(value) = text.and_then(|text| HeaderValue::try_from(text).ok()) {
        headers.insert(RANGE, value);
    }
    headers
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}
