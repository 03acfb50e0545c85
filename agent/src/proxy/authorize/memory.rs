//! What registries said, for as long as it holds. Pure: every function is told the time.

use std::num::NonZeroUsize;
use std::time::Duration;

use darter_tracker::Digest;
use http::{HeaderMap, StatusCode};
use lru::LruCache;
use tokio::time::Instant;

use super::{Question, Repository, Verdict, WhenRegistryDown, described};
use crate::proxy::manifest::Manifest;
use crate::source::registry::Credential;

/// How long a yes holds, from when the registry was asked. A revoked right ends within it.
pub(super) const YES: Duration = Duration::from_secs(60);

/// How long a no holds: long enough that a client which retries at once does not hammer the registry.
pub(super) const NO: Duration = Duration::from_secs(5);

/// How long a credential that was let into a repository counts as seen.
pub(super) const SEEN: Duration = Duration::from_secs(24 * 60 * 60);

/// Answers that are kept: 1000 images of 8 blobs within a minute, in about 8 MiB. Beyond it the least recently used is
/// asked again.
const ANSWERS_MAX: NonZeroUsize = NonZeroUsize::new(8192).unwrap();

/// Credentials per repository that count as seen. Beyond it the least recently used is not served while its registry is
/// down.
const SEEN_MAX: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Blobs whose length in a repository is known. Beyond it the least recently used is not served while its registry is
/// down.
const LENGTHS_MAX: NonZeroUsize = NonZeroUsize::new(16384).unwrap();

/// One answer.
struct Answer {
    verdict: Verdict,
    /// When the registry was asked; none if it was not.
    asked: Option<Instant>,
    answered: Instant,
    expires: Instant,
}

/// How a length is known.
#[derive(Clone, Copy)]
enum Length {
    /// A manifest says so.
    Claimed(u64),
    /// The registry says so.
    Said(u64),
}

/// What is remembered.
pub(super) struct Memory {
    answers: LruCache<Question, Answer>,
    seen: LruCache<(Repository, Credential), Instant>,
    /// By repository too: a blob that one repository has is not for those who were let into another.
    lengths: LruCache<(Repository, Digest), Length>,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self { answers: LruCache::new(ANSWERS_MAX), seen: LruCache::new(SEEN_MAX), lengths: LruCache::new(LENGTHS_MAX) }
    }

    /// What is known for a client that arrived at `arrived`: an answer that still holds, or one to a question that was
    /// in flight while the client waited.
    pub(super) fn verdict(&mut self, question: &Question, arrived: Instant, now: Instant) -> Option<Verdict> {
        let answer = self.answers.get(question)?;
        if now < answer.expires || answer.answered >= arrived {
            return Some(answer.verdict.clone());
        }
        self.answers.pop(question);
        None
    }

    /// Keeps the registry's answer to a question that was asked at `asked` and answered at `now`.
    pub(super) fn answered(&mut self, question: Question, verdict: Verdict, asked: Instant, now: Instant) {
        let expires = match &verdict {
            Verdict::Granted { .. } => asked + YES,
            // That the blob is missing too: it may be pushed the next moment, but then a manifest that lists it says so.
            Verdict::Refused(_) => now + NO,
            Verdict::PassThrough | Verdict::Unavailable(_) => now,
        };
        self.answers.put(question, Answer { verdict, asked: Some(asked), answered: now, expires });
    }

    /// Keeps what was decided at `now` without the registry, which is asked again as soon as after a no.
    pub(super) fn decided(&mut self, question: Question, verdict: Verdict, now: Instant) {
        self.answers.put(question, Answer { verdict, asked: None, answered: now, expires: now + NO });
    }

    /// Draws from the registry's own word what is to be known while it is down.
    pub(super) fn heard(&mut self, question: &Question, verdict: &Verdict, asked: Instant) {
        let who = (question.repository.clone(), question.credential);
        match verdict {
            Verdict::Granted { length, .. } => {
                self.seen.put(who, asked);
                self.lengths.put((question.repository.clone(), question.digest), Length::Said(*length));
            }
            Verdict::Refused(answer) if matches!(answer.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                self.seen.pop(&who);
            }
            Verdict::Refused(_) | Verdict::PassThrough | Verdict::Unavailable(_) => {}
        }
    }

    /// Forgets every answer about a digest in a repository. It goes through all of them, and is asked for when something is deleted.
    pub(super) fn forget(&mut self, repository: &Repository, digest: &Digest) {
        let about = |question: &Question| question.repository == *repository && question.digest == *digest;
        let stale: Vec<Question> =
            self.answers.iter().map(|(question, _)| question).filter(|question| about(question)).cloned().collect();
        for question in stale {
            self.answers.pop(&question);
        }
        self.lengths.pop(&(repository.clone(), *digest));
    }

    /// When the registry was asked that granted this last; none if it did not.
    pub(super) fn granted_at(&self, question: &Question) -> Option<Instant> {
        let answer = self.answers.peek(question)?;
        answer.asked.filter(|_| matches!(answer.verdict, Verdict::Granted { .. }))
    }

    /// Notes all blobs that a manifest lists, which the registry granted at `asked`.
    pub(super) fn listed_all(&mut self, of: &Repository, to: Credential, manifest: &Manifest, asked: Instant) {
        for blob in &manifest.blobs {
            let repository = of.clone();
            let question = Question { repository, credential: to, digest: blob.digest, manifest: false };
            self.listed(question, blob.size, described(&blob.digest), asked);
        }
    }

    /// Notes a blob that a manifest lists. Where the registry itself named a length, that one stays.
    pub(super) fn listed(&mut self, question: Question, claimed: u64, headers: HeaderMap, now: Instant) {
        let blob = (question.repository.clone(), question.digest);
        let length = match self.lengths.get(&blob) {
            Some(Length::Said(length)) => *length,
            Some(Length::Claimed(_)) | None => {
                self.lengths.put(blob, Length::Claimed(claimed));
                claimed
            }
        };
        self.seen.put((question.repository.clone(), question.credential), now);
        self.answered(question, Verdict::Granted { length, headers }, now, now);
    }

    /// The blob's length, if it may be served while its registry is down.
    pub(super) fn when_down(&mut self, policy: WhenRegistryDown, question: &Question, now: Instant) -> Option<u64> {
        let allowed = match policy {
            WhenRegistryDown::Deny => false,
            WhenRegistryDown::Allow => true,
            WhenRegistryDown::Seen => self
                .seen
                .get(&(question.repository.clone(), question.credential))
                .is_some_and(|since| now.saturating_duration_since(*since) < SEEN),
        };
        let length = self.lengths.get(&(question.repository.clone(), question.digest)).copied();
        length.filter(|_| allowed).map(|(Length::Claimed(length) | Length::Said(length))| length)
    }
}
