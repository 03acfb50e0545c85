//! What a tag means, where `tag_ttl` lets one answer of a registry serve more than one client (off unless configured).
//!
//! A tag is resolved to a digest, and from there on the request is one for a manifest by digest: the client's own right comes
//! first (D8), then the bytes come through the swarm and are checked. Who says what a tag means is
//!
//! 1. the tag's home, if it knows and that is young enough: so a cluster asks the registry once;
//! 2. the registry, asked with HEAD and this client's own headers; the home is told what it says;
//! 3. this agent's own memory, where the registry is down and the home knows nothing.
//!
//! What comes of none of these, or a client may not have, is asked of the registry as if there were no `tag_ttl`. A push or
//! deletion that passes by makes this agent and the homes forget the tag.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use darter_tracker::NodeId;
use http::header::{ACCEPT, ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri};
use tokio::time::Instant;

use super::Proxy;
use super::address::{HostPattern, HostPort};
use super::body::{self, AnswerBody};
use super::by_digest::can_be_held;
use super::join::{Came, Joins, Same};
use super::manifest::MANIFEST_BYTES_MAX;
use super::pass::{DIGEST, Failed, MANIFEST_TYPES, Read, digest_of, is_usual, manifest_type};
use super::respond::{self, Refusal};
use super::seam::{
    Accepts, Authorize, BlobOrigin, Blobs, Fault, HeldTags, ManifestType, Meaning, Origin, Repository, TagHomes, TagId,
    TagNews, Verdict,
};

/// The types in the order of [`MANIFEST_TYPES`].
const TYPES: [ManifestType; MANIFEST_TYPES.len()] =
    [ManifestType::OciImage, ManifestType::OciIndex, ManifestType::DockerImage, ManifestType::DockerList];

/// This agent's own memory has one who asks and tells: itself.
const SELF: NodeId = NodeId::from_bytes([0; 16]);

/// How long an answer for a tag is of use, by registry.
#[derive(Clone, Debug, Default)]
pub struct TagTtls {
    /// For those that are not named.
    pub default: Duration,
    /// For some; the first that matches counts.
    pub registries: Vec<(HostPattern, Duration)>,
}

impl TagTtls {
    /// Whether no answer is of use to anybody but its asker.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.default.is_zero() && self.registries.iter().all(|(_, ttl)| ttl.is_zero())
    }

    /// For `scheme://host:port`.
    fn of(&self, registry: &str) -> Duration {
        let address = registry.split_once("://").and_then(|(_, address)| HostPort::parse(address, None).ok());
        let named = address.and_then(|address| self.registries.iter().find(|(pattern, _)| pattern.matches(&address)));
        named.map_or(self.default, |(_, ttl)| *ttl)
    }
}

/// What the proxy knows of tags, and whom it asks.
pub(super) struct Tags {
    ttls: TagTtls,
    held: Mutex<HeldTags>,
    homes: Arc<dyn TagHomes>,
    /// Equal questions of this agent's clients that are on their way.
    asking: Joins<Result<Meaning, Failed>>,
}

/// What a client wants to know.
#[derive(Clone, Copy)]
pub(super) struct Question {
    tag: TagId,
    accepts: Accepts,
    /// An answer has to be younger.
    fresh: Duration,
}

impl Tags {
    pub(super) fn new(ttls: TagTtls, homes: Arc<dyn TagHomes>) -> Self {
        Self { ttls, held: Mutex::default(), homes, asking: Joins::default() }
    }

    /// The question that a request for a tag asks; none where the registry has to be asked, whatever is known.
    pub(super) fn question(&self, head: &Parts, repository: &Repository, tag: &str) -> Option<Question> {
        let fresh = self.ttls.of(&repository.registry);
        if fresh.is_zero() || !is_usual(&head.headers) {
            return None;
        }
        let values = head.headers.get_all(ACCEPT).iter().map(|value| value.to_str().ok());
        // A comma in quotes does not end a media range; nobody asks for a manifest like that.
        let values: Vec<&str> =
            values.map(|value| value.filter(|value| !value.contains('"'))).collect::<Option<_>>()?;
        let tag = TagId::new(&repository.registry, &repository.name, tag);
        Some(Question { tag, accepts: Accepts::new(values), fresh })
    }

    /// Forgets a tag, here and at its homes.
    pub(super) async fn forget(&self, repository: &Repository, tag: &str) {
        if self.ttls.of(&repository.registry).is_zero() {
            return;
        }
        let tag = TagId::new(&repository.registry, &repository.name, tag);
        self.held().tell(SELF, tag, TagNews::Forget, now());
        self.homes.tell(tag, TagNews::Forget).await;
    }

    /// What the home knows.
    async fn ask_home(&self, question: &Question) -> Option<Meaning> {
        // Before it is asked, so that the answer is taken for older rather than younger than it is.
        let now = now();
        let (meaning, age) = self.homes.ask(question.tag, question.accepts, question.fresh).await?;
        self.held().tell(SELF, question.tag, TagNews::Means { accepts: question.accepts, meaning, age }, now);
        Some(meaning)
    }

    /// Keeps what the registry was asked for at `asked`, and tells the homes.
    async fn learn(&self, question: &Question, meaning: Meaning, asked: Instant) {
        let now = Instant::now();
        let news = TagNews::Means { accepts: question.accepts, meaning, age: now.saturating_duration_since(asked) };
        self.held().tell(SELF, question.tag, news, now.into_std());
        self.homes.tell(question.tag, news).await;
    }

    /// What this agent knows itself; a home that did not know it is told.
    async fn recall(&self, question: &Question) -> Option<Meaning> {
        let known = self.held().meaning(question.tag, question.accepts, question.fresh, now());
        let (meaning, age) = known?;
        self.homes.tell(question.tag, TagNews::Means { accepts: question.accepts, meaning, age }).await;
        Some(meaning)
    }

    /// Lets another ask.
    async fn failed(&self, question: &Question) {
        self.homes.tell(question.tag, TagNews::Failed { accepts: question.accepts }).await;
    }

    fn held(&self) -> MutexGuard<'_, HeldTags> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The authorizer's clock.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// A meaning or why there is none, for all who ask; or for one, the registry's refusal, where that needs no words.
type Resolved = Came<Result<Meaning, Failed>, Option<Response<AnswerBody>>>;

impl<O: Origin, A: Authorize, B: Blobs> Proxy<O, A, B> {
    /// Answers a GET or HEAD, without a body or a query, of a manifest by its tag.
    pub(super) async fn deliver_tag(
        &self,
        tags: &Tags,
        head: Parts,
        repository: Repository,
        question: Question,
    ) -> Result<Response<AnswerBody>, Refusal> {
        match self.resolve(tags, &head, &repository, &question).await {
            Came::All(Ok(meaning)) => {
                if let Some(answer) = self.meant(&head, &repository, meaning).await? {
                    return Ok(answer);
                }
            }
            Came::All(Err(failed)) => return Err(failed.into()),
            Came::One(Some(refusal)) => return Ok(refusal),
            Came::One(None) => {}
        }
        let (asked, mut seen) = (Instant::now(), None);
        let method = head.method.clone();
        let see = |answer: &Response<Bytes>| seen = meaning_of(&method, answer);
        let answer = self.pass_manifest(head, &repository, see).await;
        if let Some(meaning) = seen {
            tags.learn(&question, meaning, asked).await;
        }
        answer
    }

    /// What a tag means. Clients of this agent that ask at the same time are told the same, whoever they are: it gives them nothing.
    async fn resolve(&self, tags: &Tags, head: &Parts, repository: &Repository, question: &Question) -> Resolved {
        let ask = async {
            match tags.ask_home(question).await {
                Some(meaning) => {
                    self.metrics.tags_known.inc();
                    Came::All(Ok(meaning))
                }
                None => self.ask_registry(tags, head, repository, question).await,
            }
        };
        tags.asking.join(Same::tag(&question.tag, &question.accepts), ask).await
    }

    async fn ask_registry(&self, tags: &Tags, head: &Parts, repository: &Repository, question: &Question) -> Resolved {
        let asked = Instant::now();
        let mut request = Request::from_parts(head.clone(), body::nothing());
        *request.method_mut() = Method::HEAD;
        let came = self.read(request, MANIFEST_BYTES_MAX).await;
        if let Ok(Read::Whole(answer)) = &came {
            self.saw_manifest(repository, &head.headers, &Method::HEAD, answer);
            if let Some(meaning) = meaning_of(&Method::HEAD, answer) {
                tags.learn(question, meaning, asked).await;
                return Came::All(Ok(meaning));
            }
        }
        let is_down = match &came {
            Ok(Read::Whole(answer)) => answer.status().is_server_error(),
            Ok(Read::More(_)) => false,
            Err(failed) => failed.fault == Fault::Unreachable,
        };
        if is_down && let Some(meaning) = tags.recall(question).await {
            return Came::All(Ok(meaning));
        }
        tags.failed(question).await;
        match came {
            Err(failed) => Came::All(Err(failed)),
            // A challenge needs no body, and a registry that limits the rate is not asked again. Of other refusals the client gets
            // the registry's own words.
            Ok(Read::Whole(mut answer))
                if matches!(answer.status(), StatusCode::UNAUTHORIZED | StatusCode::TOO_MANY_REQUESTS) =>
            {
                if head.method != Method::HEAD {
                    answer.headers_mut().remove(CONTENT_LENGTH);
                }
                Came::One(Some(respond::pass_on(answer)))
            }
            Ok(_) => Came::One(None),
        }
    }

    /// The manifest that a tag means, for a client that the registry gives it to; none where the registry has to answer.
    async fn meant(
        &self,
        head: &Parts,
        repository: &Repository,
        meaning: Meaning,
    ) -> Result<Option<Response<AnswerBody>>, Refusal> {
        let Some(url) = url_of(&head.uri, repository, &meaning) else { return Ok(None) };
        let origin = BlobOrigin { url, headers: head.headers.clone() };
        match self.authorize.blob(&origin, repository, &meaning.digest).await {
            Verdict::Granted { length, mut headers } if length == meaning.length && can_be_held(length, &headers) => {
                // It was not asked for by this name.
                if let Ok(digest) = HeaderValue::try_from(meaning.digest.to_string()) {
                    headers.insert(DIGEST, digest);
                }
                if head.method == Method::HEAD {
                    return Ok(Some(described(meaning, headers)));
                }
                self.held_manifest(&origin, repository, meaning.digest, length, headers).await
            }
            Verdict::Refused(answer) if answer.status() == StatusCode::UNAUTHORIZED => {
                Ok(Some(respond::pass_on(answer)))
            }
            _ => Ok(None),
        }
    }
}

/// The answer to a HEAD.
fn described(meaning: Meaning, mut headers: HeaderMap) -> Response<AnswerBody> {
    headers.remove(ACCEPT_RANGES);
    headers.insert(CONTENT_LENGTH, meaning.length.into());
    if !headers.contains_key(CONTENT_TYPE) {
        let at = TYPES.iter().position(|media_type| *media_type == meaning.media_type).unwrap_or_default();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(MANIFEST_TYPES[at]));
    }
    let mut answer = Response::new(body::full(Bytes::new()));
    *answer.headers_mut() = headers;
    answer
}

/// What a registry has said with 200 that a tag means, and to a GET has shown.
fn meaning_of(method: &Method, answer: &Response<Bytes>) -> Option<Meaning> {
    let content_type = manifest_type(answer)?;
    let at = MANIFEST_TYPES.iter().position(|known| *known == content_type)?;
    let named = |name| answer.headers().get(name)?.to_str().ok();
    let (digest, length) = if *method == Method::HEAD {
        (named(DIGEST)?.parse().ok()?, named(CONTENT_LENGTH)?.parse().ok()?)
    } else {
        (digest_of(answer)?, answer.body().len() as u64)
    };
    let usable = (1..=MANIFEST_BYTES_MAX as u64).contains(&length);
    usable.then_some(Meaning { digest, media_type: TYPES[at], length })
}

/// Where the manifest is asked for by its digest.
fn url_of(url: &Uri, repository: &Repository, meaning: &Meaning) -> Option<Uri> {
    let path = format!("/v2/{}/manifests/{}", repository.name, meaning.digest);
    let mut parts = url.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(path).ok()?);
    Uri::from_parts(parts).ok()
}
