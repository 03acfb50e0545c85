//! Whether the registry lets a client have a blob (D8).
//!
//! A blob in the cache was once fetched with somebody's credentials; that says nothing about the next client. So each
//! client's right is asked of the registry with the client's own credentials and kept for a short time. A manifest that
//! the registry gave to a credential speaks for the blobs it lists, in its repository, so that a normal pull costs no
//! question at all.
//!
//! Not here: which URLs are blobs (`route`), and what a client is answered (`respond`).

mod ask;
mod memory;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use darter_tracker::Digest;
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue,
};
use http::{HeaderName, Response};
use tokio::time::Instant;

use super::manifest::Manifest;
use super::route::{self, Route};
use crate::source::registry::{BlobOrigin, Credential, OriginError, Redacted, Upstream};
use memory::Memory;

/// What the registry says it has given.
const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A repository of one registry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository {
    /// `scheme://host:port`, one spelling per registry: [`Upstream::origin_of`] gives it.
    pub registry: String,
    /// The name between `/v2/` and `/blobs/`, such as `library/alpine`.
    pub name: String,
}

/// What to do about a blob that is in the cache when its registry cannot be asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenRegistryDown {
    /// Serve it to a credential that the registry let into the blob's repository within the last day.
    #[default]
    Seen,
    /// Serve it to anybody, if the registry ever said that it is in this repository.
    Allow,
    /// Serve nothing.
    Deny,
}

/// What a client may have.
#[derive(Clone)]
pub enum Verdict {
    /// The blob.
    Granted {
        /// Its length in bytes, more than zero. A claim, until the registry's first ranged reply confirms it.
        length: u64,
        /// What the registry would say about it, without a length.
        headers: HeaderMap,
    },
    /// Nothing; this is the registry's own answer.
    Refused(Response<Bytes>),
    /// What the registry itself gives: the blob is empty or its length is unknown, so the swarm cannot carry it.
    PassThrough,
    /// Nothing can be said, since the registry cannot be asked.
    Unavailable(Arc<OriginError>),
}

impl fmt::Debug for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Granted { length, headers } => {
                f.debug_struct("Granted").field("length", length).field("headers", &Redacted(headers)).finish()
            }
            Self::Refused(answer) => f.debug_tuple("Refused").field(&answer.status()).finish(),
            Self::PassThrough => f.write_str("PassThrough"),
            Self::Unavailable(error) => f.debug_tuple("Unavailable").field(error).finish(),
        }
    }
}

/// One question: may this credential have this blob of this repository?
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Question {
    repository: Repository,
    credential: Credential,
    digest: Digest,
    /// As a manifest: a registry that gives one need not give it as a blob.
    manifest: bool,
}

impl Question {
    fn of(origin: &BlobOrigin, repository: &Repository, digest: &Digest) -> Self {
        Self {
            repository: repository.clone(),
            credential: Credential::of(&origin.headers).with_query(origin.url.query()),
            digest: *digest,
            manifest: matches!(route::route(origin.url.path()), Route::Manifest { .. }),
        }
    }
}

/// Asks registries, and remembers for a short time what they said. One per agent; shared.
pub struct Authorizer {
    upstream: Arc<Upstream>,
    when_down: WhenRegistryDown,
    memory: Mutex<Memory>,
    /// One lock per question that is being asked: who holds it asks, the others wait for his answer. As many as clients
    /// are waiting, at most.
    asking: Mutex<HashMap<Question, Arc<tokio::sync::Mutex<()>>>>,
}

impl Authorizer {
    /// An authorizer that remembers nothing yet.
    #[must_use]
    pub fn new(upstream: Arc<Upstream>, when_down: WhenRegistryDown) -> Self {
        Self { upstream, when_down, memory: Mutex::new(Memory::new()), asking: Mutex::default() }
    }

    /// Whether the client who asked `origin` may have the blob. Asks the registry unless it said so within the last
    /// minute, or said no within the last 5 s; clients that ask the same at the same time get the same answer.
    pub async fn blob(&self, origin: &BlobOrigin, repository: &Repository, digest: &Digest) -> Verdict {
        let question = Question::of(origin, repository, digest);
        let arrived = Instant::now();
        if let Some(verdict) = self.memory().verdict(&question, arrived, arrived) {
            return verdict;
        }
        let turn = Turn::take(&self.asking, &question);
        let _held = turn.lock.lock().await;
        // Whoever held the lock before may have been answered while this client waited.
        if let Some(verdict) = self.memory().verdict(&question, arrived, Instant::now()) {
            return verdict;
        }
        let asked = Instant::now();
        let verdict = ask::blob(&self.upstream, origin, &question).await;
        let now = Instant::now();
        let mut memory = self.memory();
        if matches!(&verdict, Verdict::Unavailable(error) if error.is_down())
            && let Some(length) = memory.when_down(self.when_down, &question, now)
        {
            let mut headers = described(digest);
            if question.manifest {
                // The manifest itself has to say.
                headers.remove(CONTENT_TYPE);
            }
            let verdict = Verdict::Granted { length, headers };
            memory.decided(question.clone(), verdict.clone(), now);
            return verdict;
        }
        memory.heard(&question, &verdict, asked);
        memory.answered(question.clone(), verdict.clone(), asked, now);
        verdict
    }

    /// Notes that the registry gave a client this manifest, and returns what it lists: from now on, for a minute, that client
    /// may have those blobs.
    ///
    /// To be called for what the registry itself answered to a GET with 200, and not where the request's URL had a query:
    /// that may have held the credential.
    pub fn saw_manifest(
        &self,
        repository: &Repository,
        headers: &HeaderMap,
        content_type: &str,
        body: &[u8],
    ) -> Manifest {
        let manifest = Manifest::parse(content_type, body).unwrap_or_default();
        self.memory().listed_all(repository, Credential::of(headers), &manifest, Instant::now());
        manifest
    }

    /// Notes what the registry said to a client's HEAD of a manifest: which one it would give him, by its tag or its digest. For a
    /// minute he may have that one.
    ///
    /// To be called for the registry's own 200, and not where the request's URL had a query, as with [`Self::saw_manifest`].
    pub fn saw_manifest_head(&self, repository: &Repository, client: &HeaderMap, answer: &HeaderMap) {
        let digest = answer.get(DIGEST).and_then(|value| value.to_str().ok()?.parse().ok());
        let length = answer.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let (Some(digest), Some(length @ 1..)) = (digest, length) else { return };
        if answer.contains_key(CONTENT_ENCODING) {
            return;
        }
        let question =
            Question { repository: repository.clone(), credential: Credential::of(client), digest, manifest: true };
        let verdict = Verdict::Granted { length, headers: ask::said_again(answer) };
        let now = Instant::now();
        let mut memory = self.memory();
        memory.heard(&question, &verdict, now);
        memory.answered(question, verdict, now, now);
    }

    /// Forgets what the registry said of a blob or a manifest, to whomever.
    pub fn forget(&self, repository: &Repository, digest: &Digest) {
        self.memory().forget(repository, digest);
    }

    /// Like [`Self::saw_manifest`], for a manifest with the right bytes that the registry did not send this time. Its blobs are
    /// granted from when the registry granted the manifest, so that a right which is revoked ends in time; not at all where
    /// it was granted without the registry.
    pub fn held_manifest(
        &self,
        origin: &BlobOrigin,
        repository: &Repository,
        digest: &Digest,
        content_type: &str,
        body: &[u8],
    ) -> Manifest {
        let manifest = Manifest::parse(content_type, body).unwrap_or_default();
        let question = Question::of(origin, repository, digest);
        let mut memory = self.memory();
        if let Some(asked) = memory.granted_at(&question) {
            memory.listed_all(repository, question.credential, &manifest, asked);
        }
        drop(memory);
        manifest
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place in the queue for one question. The queue is forgotten when its last client leaves it.
struct Turn<'a> {
    asking: &'a Mutex<HashMap<Question, Arc<tokio::sync::Mutex<()>>>>,
    question: &'a Question,
    lock: Arc<tokio::sync::Mutex<()>>,
}

impl<'a> Turn<'a> {
    fn take(asking: &'a Mutex<HashMap<Question, Arc<tokio::sync::Mutex<()>>>>, question: &'a Question) -> Self {
        let lock = asking.lock().unwrap_or_else(PoisonError::into_inner).entry(question.clone()).or_default().clone();
        Self { asking, question, lock }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's own and this one: counted under the map's lock, so nobody can take another meanwhile.
        if Arc::strong_count(&self.lock) == 2 {
            asking.remove(self.question);
        }
    }
}

/// What a registry says about a blob, for those that nobody asked it about.
fn described(digest: &Digest) -> HeaderMap {
    const VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
    let text = digest.to_string();
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    // A year: what has a digest for a name never changes.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("max-age=31536000"));
    headers.insert(VERSION, HeaderValue::from_static("registry/2.0"));
    if let (Ok(digest), Ok(tag)) = (HeaderValue::try_from(&text), HeaderValue::try_from(format!("\"{text}\""))) {
        headers.insert(DIGEST, digest);
        headers.insert(ETAG, tag);
    }
    headers
}
