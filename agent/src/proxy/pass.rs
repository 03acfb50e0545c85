//! Requests that are none of the swarm's business: handed to the registry and back, untouched.
//!
//! Manifests pass too, but are looked at on their way: what a registry lists for a client, the client may read. Equal requests
//! for a manifest or a token that come at the same time are one (`join`).

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use darter_tracker::Digest;
use futures_util::{StreamExt as _, future, stream};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RANGE, SET_COOKIE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use super::Proxy;
use super::blob::{CONDITIONS, FIRST_BYTES_WAIT};
use super::body::{self, AnswerBody, ByteCounter, CheckedBody, ClientBody, CutError, PassedBody, SilentError};
use super::join::{Came, Same};
use super::manifest::MANIFEST_BYTES_MAX;
use super::respond::{Refusal, chain};
use super::route::{Route, route};
use super::seam::{Authorize, Blobs, Client, Fault, Origin, Repository};
use crate::store::verify::Whole;

/// What a manifest is, by its media type. Nothing else that looks like one is taken for one (S27).
pub(super) const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// What a registry says it has given.
pub(super) const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Bytes of a token server's answer that are shared: a token with many rights has some kilobytes.
const TOKEN_BYTES_MAX: usize = 64 * 1024;

/// An answer, or why there is none, for all who wait for it.
pub(super) type Answered = Result<Response<Bytes>, Failed>;

/// Why a host did not answer.
#[derive(Clone)]
pub(super) struct Failed {
    host: String,
    pub(super) fault: Fault,
    said: Arc<str>,
}

impl From<Failed> for Refusal {
    fn from(failed: Failed) -> Self {
        Self::Upstream { host: failed.host, fault: failed.fault, source: failed.said.to_string().into() }
    }
}

impl<O: Origin, A: Authorize, B: Blobs> Proxy<O, A, B> {
    /// Hands a request to where its absolute URI says, and the answer to the client.
    pub(super) async fn pass(&self, request: Request<ClientBody>) -> Result<Response<AnswerBody>, Refusal> {
        let answer = self.exchange(request).await?;
        let passed = self.metrics.passed_bytes.clone();
        Ok(answer.map(|answer| body::streamed(PassedBody::new(answer, passed))))
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
        let answer = answer.map(|answer| PassedBody::new(answer, passed));
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

    /// The same for GET or HEAD of a manifest, which the authorizer gets to see before the client has it. `see` gets every
    /// answer that came.
    pub(super) async fn pass_manifest(
        &self,
        head: Parts,
        repository: &Repository,
        see: impl FnOnce(&Response<Bytes>),
    ) -> Result<Response<AnswerBody>, Refusal> {
        let same = is_usual(&head.headers).then(|| Same::question(&head));
        let (client, method) = (head.headers.clone(), head.method.clone());
        let request = Request::from_parts(head, body::nothing());
        let see = |answer: &Response<Bytes>| {
            self.saw_manifest(repository, &client, &method, answer);
            see(answer);
        };
        self.pass_joined(same, request, MANIFEST_BYTES_MAX, see).await
    }

    /// The same for a GET of a token. It is shared by those who asked for it in the same words at the same time, and by nobody
    /// else: the agent keeps no tokens.
    pub(super) async fn pass_token(&self, head: Parts) -> Result<Response<AnswerBody>, Refusal> {
        let same = Some(Same::bytes(&head));
        self.pass_joined(same, Request::from_parts(head, body::nothing()), TOKEN_BYTES_MAX, |_| {}).await
    }

    /// Hands a request without a body on, unless an equal one is on its way: then its answer is this one's too.
    async fn pass_joined(
        &self,
        same: Option<Same>,
        request: Request<ClientBody>,
        bytes_max: usize,
        see: impl FnOnce(&Response<Bytes>),
    ) -> Result<Response<AnswerBody>, Refusal> {
        let ask = async {
            match self.read(request, bytes_max).await {
                Ok(Read::Whole(answer)) => {
                    see(&answer);
                    // A cookie is meant for one.
                    if answer.headers().contains_key(SET_COOKIE) {
                        Came::One(Ok(answer))
                    } else {
                        Came::All(Ok(answer))
                    }
                }
                Ok(Read::More(answer)) => Came::One(Err(answer)),
                Err(failed) => Came::All(Err(failed)),
            }
        };
        let came = match same {
            Some(same) => self.joins.join(same, ask).await,
            None => ask.await,
        };
        let answer = match came {
            Came::All(answered) => answered?,
            Came::One(Ok(whole)) => whole,
            Came::One(Err(streamed)) => return Ok(streamed),
        };
        self.metrics.passed_bytes.inc_by(answer.body().len() as u64);
        Ok(answer.map(body::full))
    }

    /// Makes a request and reads the answer, if it is small.
    pub(super) async fn read(&self, request: Request<ClientBody>, bytes_max: usize) -> Result<Read, Failed> {
        let host = request.uri().host().unwrap_or_default().to_owned();
        let answer = self.exchange(request).await.map_err(|refusal| match refusal {
            Refusal::Upstream { host, fault, source } => Failed { host, fault, said: chain(&*source).into() },
            other => Failed { host: host.clone(), fault: Fault::Broken, said: chain(&other).into() },
        })?;
        let read = read(answer, bytes_max, self.metrics.passed_bytes.clone()).await;
        read.map_err(|error| Failed { host, fault: Fault::Broken, said: chain(&error).into() })
    }

    /// Notes what a registry said to this client of a manifest.
    pub(super) fn saw_manifest(
        &self,
        repository: &Repository,
        client: &HeaderMap,
        method: &Method,
        answer: &Response<Bytes>,
    ) {
        let Some(content_type) = manifest_type(answer) else { return };
        if *method == Method::HEAD {
            return self.authorize.saw_manifest_head(repository, client, answer.headers());
        }
        let layers = self.authorize.saw_manifest(repository, client, content_type, answer.body());
        self.blobs.expect(Client::new(&repository.registry, &repository.name, client), &layers);
        if let Some(digest) = digest_of(answer) {
            let mut headers = answer.headers().clone();
            headers.insert(CONTENT_LENGTH, answer.body().len().into());
            if let Ok(value) = HeaderValue::try_from(digest.to_string()) {
                headers.insert(DIGEST, value);
            }
            self.authorize.saw_manifest_head(repository, client, &headers);
        }
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

/// An answer that was read.
pub(super) enum Read {
    /// All of it.
    Whole(Response<Bytes>),
    /// Its beginning, since it is long; the rest follows.
    More(Response<AnswerBody>),
}

async fn read(answer: Response<Incoming>, bytes_max: usize, passed: ByteCounter) -> Result<Read, hyper::Error> {
    let (head, mut body) = answer.into_parts();
    let mut kept = BytesMut::new();
    let large = body.size_hint().lower() > bytes_max as u64;
    while !large && kept.len() <= bytes_max {
        let Some(frame) = body.frame().await else { return Ok(Read::Whole(Response::from_parts(head, kept.freeze()))) };
        // Trailers say nothing that a client goes by.
        if let Ok(bytes) = frame?.into_data() {
            kept.extend_from_slice(&bytes);
        }
    }
    let first = stream::once(future::ready(Ok(Frame::data(kept.freeze()))));
    let all = StreamBody::new(first.chain(BodyStream::new(body)));
    Ok(Read::More(Response::from_parts(head, body::streamed(PassedBody::new(all, passed)))))
}

/// Whether a request is for a manifest as a whole, whatever the client has.
pub(super) fn is_usual(headers: &HeaderMap) -> bool {
    !headers.contains_key(RANGE) && !CONDITIONS.iter().any(|name| headers.contains_key(name))
}

/// Whether a request is for a token, by its form in the distribution specification: a GET outside of the registry's own
/// resources, for a service or a scope.
pub(super) fn is_token_request(head: &Parts) -> bool {
    let query = head.uri.query().unwrap_or_default();
    let names =
        |wanted: &str| query.split('&').any(|pair| pair.split_once('=').is_some_and(|(name, _)| name == wanted));
    head.method == Method::GET
        && is_usual(&head.headers)
        && route(head.uri.path()) == Route::Other
        && (names("service") || names("scope"))
}

/// The media type, if the answer is a manifest that can be looked at.
pub(super) fn manifest_type(answer: &Response<Bytes>) -> Option<&'static str> {
    let plain = !answer.headers().contains_key(CONTENT_ENCODING);
    (answer.status() == StatusCode::OK && plain).then(|| known_type(answer.headers())).flatten()
}

/// The digest of an answer's body: the one that the registry names if that is right, SHA-256 if it names none.
pub(super) fn digest_of(answer: &Response<Bytes>) -> Option<Digest> {
    let Some(named) = answer.headers().get(DIGEST) else {
        return Some(Digest::Sha256(Sha256::digest(answer.body()).into()));
    };
    let digest = named.to_str().ok()?.parse().ok()?;
    let mut whole = Whole::new(&digest);
    whole.update(answer.body());
    whole.matches(&digest).then_some(digest)
}

pub(super) fn known_type(headers: &HeaderMap) -> Option<&'static str> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    known(value.split(';').next()?.trim())
}

/// The known type with this name.
pub(super) fn known(essence: &str) -> Option<&'static str> {
    MANIFEST_TYPES.into_iter().find(|known| essence.eq_ignore_ascii_case(known))
}
