//! Requests that are none of the swarm's business: handed to the registry and back, streamed and untouched.
//!
//! Manifests pass too, but are looked at on their way: what a registry lists for a client, the client may read.

use std::sync::Arc;

use darter_tracker::Digest;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, RANGE};
use http::request::Parts;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use hyper::body::{Body as _, Incoming};
use tokio::time::timeout;

use super::Proxy;
use super::blob::FIRST_BYTES_WAIT;
use super::body::{self, AnswerBody, CheckedBody, ClientBody, CutError, PassedBody, SilentError};
use super::manifest::MANIFEST_BYTES_MAX;
use super::respond::Refusal;
use super::seam::{Authorize, Blobs, Client, Fault, Origin, Repository};

/// What a manifest is, by its media type. Nothing else that looks like one is taken for one (S27).
const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

impl<O: Origin, A: Authorize, B: Blobs> Proxy<O, A, B> {
    /// Hands a request to where its absolute URI says, and the answer to the client.
    pub(super) async fn pass(&self, request: Request<ClientBody>) -> Result<Response<AnswerBody>, Refusal> {
        let answer = self.exchange(request).await?;
        Ok(self.passed(answer))
    }

    /// An answer on its way to the client, unseen but for its length.
    fn passed(&self, answer: Response<Incoming>) -> Response<AnswerBody> {
        let passed = self.metrics.passed_bytes.clone();
        answer.map(|answer| body::streamed(PassedBody::<_, fn(&[u8])>::new(answer, passed)))
    }

    /// The same for a GET of a blob: as a whole it is checked, since no client is to take wrong bytes for a success (D7).
    /// Of a part the client has to check the whole itself.
    pub(super) async fn pass_blob(&self, head: Parts, digest: Digest) -> Result<Response<AnswerBody>, Refusal> {
        let asked_whole = !head.headers.contains_key(RANGE);
        let host = head.uri.host().unwrap_or_default().to_owned();
        let answer = self.exchange(Request::from_parts(head, body::nothing())).await?;
        let whole =
            asked_whole && answer.status() == StatusCode::OK && !answer.headers().contains_key(CONTENT_ENCODING);
        let passed = self.metrics.passed_bytes.clone();
        let answer = answer.map(|answer| PassedBody::<_, fn(&[u8])>::new(answer, passed));
        if !whole {
            return Ok(answer.map(body::streamed));
        }
        let mut answer = answer.map(|counted| CheckedBody::new(counted, digest));
        match timeout(FIRST_BYTES_WAIT, answer.body_mut().begin()).await {
            // In time, or the wait goes on in the body.
            Ok(Ok(())) | Err(_) => Ok(answer.map(body::streamed)),
            Ok(Err(CutError::Source(source))) => Err(Refusal::Upstream { host, fault: Fault::Broken, source }),
            Ok(Err(wrong)) => Err(Refusal::Wrong(wrong.into())),
        }
    }

    /// The same for a manifest, which the authorizer gets to see before the client has all of it.
    pub(super) async fn pass_manifest(
        &self,
        request: Request<ClientBody>,
        repository: Repository,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let client = request.headers().clone();
        let answer = self.exchange(request).await?;
        let Some(content_type) = manifest_type(&answer) else { return Ok(self.passed(answer)) };
        let (authorize, blobs) = (Arc::clone(&self.authorize), Arc::clone(&self.blobs));
        let see = move |whole: &[u8]| {
            let layers = authorize.saw_manifest(&repository, &client, content_type, whole);
            blobs.expect(Client::new(&repository.registry, &repository.name, &client), &layers);
        };
        let passed = self.metrics.passed_bytes.clone();
        Ok(answer.map(|answer| body::streamed(PassedBody::shown(answer, passed, MANIFEST_BYTES_MAX, see))))
    }

    /// The same for HEAD of a manifest: the registry says which one it would give this client.
    pub(super) async fn pass_manifest_head(
        &self,
        request: Request<ClientBody>,
        repository: Repository,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let client = request.headers().clone();
        let answer = self.exchange(request).await?;
        if answer.status() == StatusCode::OK && known_type(answer.headers()).is_some() {
            self.authorize.saw_manifest_head(&repository, &client, answer.headers());
        }
        Ok(self.passed(answer))
    }

    async fn exchange(&self, mut request: Request<ClientBody>) -> Result<Response<Incoming>, Refusal> {
        *request.version_mut() = Version::HTTP_11;
        let host = request.uri().host().unwrap_or_default().to_owned();
        let answer = self.origin.send(request).await;
        let mut answer = answer.map_err(|error| match O::fault(&error) {
            _ if SilentError::is_behind(&error) => Refusal::Silent(SilentError),
            fault => Refusal::Upstream { host, fault, source: error.into() },
        })?;
        // In HTTP/1.0 a body may end with its connection, and one that is cut would look like a whole one.
        *answer.version_mut() = Version::HTTP_11;
        Ok(answer)
    }
}

/// The media type, if the answer is a manifest that can be looked at.
fn manifest_type(answer: &Response<Incoming>) -> Option<&'static str> {
    let small = answer.body().size_hint().lower() <= MANIFEST_BYTES_MAX as u64;
    let plain = !answer.headers().contains_key(CONTENT_ENCODING);
    (answer.status() == StatusCode::OK && small && plain).then(|| known_type(answer.headers())).flatten()
}

pub(super) fn known_type(headers: &HeaderMap) -> Option<&'static str> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    known(value.split(';').next()?.trim())
}

/// The known type with this name.
pub(super) fn known(essence: &str) -> Option<&'static str> {
    MANIFEST_TYPES.into_iter().find(|known| essence.eq_ignore_ascii_case(known))
}
