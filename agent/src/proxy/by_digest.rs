//! A manifest asked for by its digest: from the swarm like a layer, once the registry has said yes to this client.
//!
//! Whatever is unusual passes to the registry. The type is what the registry said of it; while the registry is down it
//! is what the manifest, whose bytes match the digest, says of itself.

use bytes::{Bytes, BytesMut};
use darter_tracker::{Digest, TaskId};
use futures_util::StreamExt as _;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Response, StatusCode};

use super::Proxy;
use super::blob::Failure;
use super::body::{self, AnswerBody};
use super::manifest::{self, MANIFEST_BYTES_MAX};
use super::pass::{is_usual, known_type};
use super::respond::{self, Refusal};
use super::seam::{Authorize, BlobOrigin, BlobRequest, Blobs, Client, Origin, Repository, Verdict};

impl<O: Origin, A: Authorize, B: Blobs> Proxy<O, A, B> {
    /// Answers a GET, without a body or a query, of a manifest that the swarm may deliver.
    pub(super) async fn deliver_manifest(
        &self,
        head: Parts,
        repository: Repository,
        digest: Digest,
    ) -> Result<Response<AnswerBody>, Refusal> {
        if is_usual(&head.headers) {
            let origin = BlobOrigin { url: head.uri.clone(), headers: head.headers.clone() };
            match self.authorize.blob(&origin, &repository, &digest).await {
                Verdict::Granted { length, headers } if can_be_held(length, &headers) => {
                    if let Some(answer) = self.held_manifest(&origin, &repository, digest, length, headers).await? {
                        return Ok(answer);
                    }
                }
                // A challenge needs no body. Of other refusals the client gets the registry's own words.
                Verdict::Refused(answer) if answer.status() == StatusCode::UNAUTHORIZED => {
                    return Ok(respond::pass_on(answer));
                }
                _ => {}
            }
        }
        self.pass_manifest(head, &repository, |_| {}).await
    }

    /// The manifest out of the swarm; none where the registry has to answer.
    pub(super) async fn held_manifest(
        &self,
        origin: &BlobOrigin,
        repository: &Repository,
        digest: Digest,
        length: u64,
        mut headers: HeaderMap,
    ) -> Result<Option<Response<AnswerBody>>, Refusal> {
        let named = self.is_named(&origin.url);
        // Without a client, since that is how layers are counted which are asked for one after the other.
        let request = BlobRequest {
            task: TaskId::blob(digest),
            length,
            origin: origin.clone(),
            range: 0..length,
            named,
            client: None,
        };
        let whole = match self.whole(request, length).await {
            Ok(whole) if whole.len() as u64 == length => whole,
            Ok(_) => return Ok(None),
            Err(Failure::Wrong(error)) => return Err(Refusal::Wrong(error)),
            Err(Failure::Other(error)) => {
                tracing::warn!(%digest, error = %respond::chain(&*error), "the registry delivers a manifest instead");
                return Ok(None);
            }
        };
        let said = known_type(&headers);
        let Some(content_type) = said.or_else(|| manifest::own_type(&whole).and_then(super::pass::known)) else {
            return Ok(None);
        };
        let layers = self.authorize.held_manifest(origin, repository, &digest, content_type, &whole);
        self.blobs.expect(Client::new(&repository.registry, &repository.name, &origin.headers), &layers);
        self.metrics.client_bytes.inc_by(length);
        if said.is_none() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        }
        headers.remove(ACCEPT_RANGES);
        headers.insert(CONTENT_LENGTH, length.into());
        let mut answer = Response::new(body::full(whole));
        *answer.headers_mut() = headers;
        Ok(Some(answer))
    }

    /// All bytes, which are few. They come checked.
    async fn whole(&self, request: BlobRequest, length: u64) -> Result<Bytes, Failure> {
        let (first, mut rest) = self.open(request).await?;
        let mut whole = BytesMut::from(first.unwrap_or_default());
        while (whole.len() as u64) < length {
            match rest.next().await {
                Some(Ok(bytes)) => whole.extend_from_slice(&bytes),
                Some(Err(error)) if B::is_wrong(&error) => return Err(Failure::Wrong(error.into())),
                Some(Err(error)) => return Err(Failure::Other(error.into())),
                None => break,
            }
        }
        Ok(whole.freeze())
    }
}

/// Whether the swarm can carry it: small, and of a known type or, while the registry is down, of one yet to be read.
pub(super) fn can_be_held(length: u64, headers: &HeaderMap) -> bool {
    length <= MANIFEST_BYTES_MAX as u64 && (!headers.contains_key(CONTENT_TYPE) || known_type(headers).is_some())
}
