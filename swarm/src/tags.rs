//! What tags mean: which manifest a registry gave for a tag, how long ago, and who is asking it right now.
//!
//! The home of a tag keeps this for the cluster, so that one member asks the registry and all others learn of it; each agent keeps
//! the same of what it has learnt itself. A tag is known by a hash alone ([`TagId`]), and so is what its asker accepts
//! ([`Accepts`]): a registry may choose by that, so no two kinds of asker are given each other's answer.
//!
//! Nothing here gives anybody a right: whoever is told a digest still has to be allowed that manifest by the registry. Not here
//! either: how old is too old. Everybody asks for an answer that is fresh enough for himself. Time comes in as an argument.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use darter_tracker::{Digest, NodeId, TaskId};
use serde::{Deserialize, Serialize};

use crate::recent::Recent;

/// The oldest answer that is ever given. For as long as this a credential counts as seen while a registry is down, so what is older
/// could hardly be of use.
pub const TTL_MAX: Duration = Duration::from_secs(24 * 3600);

/// How long a member that asks the registry is waited for. A registry that is well answers within a second.
pub const ASKING: Duration = Duration::from_secs(2);

/// Tags that are kept; at the bound the one unused longest is forgotten, and asked of the registry again. With [`ACCEPTS_MAX`] kinds
/// of asker each that is some 12 MiB, with the usual one or two 2 MiB.
pub const TAGS_MAX: usize = 4096;

/// Kinds of asker of one tag: there are about as many container runtimes. At the bound the one unused longest is forgotten.
pub const ACCEPTS_MAX: usize = 8;

/// The longest manifest that is kept: registries refuse larger ones.
pub const LENGTH_MAX: u64 = 4 * 1024 * 1024;

/// When those who wait ask again: soon where they are few, and together some thousand times a second where they are many.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_EACH: Duration = Duration::from_millis(1);

/// The longest that somebody is told to wait before he asks again.
pub const RETRY_MAX: Duration = Duration::from_millis(500);

/// A tag of a repository of a registry, as a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TagId([u8; 32]);

impl TagId {
    /// The tag `tag` of `repository`, at the registry `scheme://host:port`.
    #[must_use]
    pub fn new(registry: &str, repository: &str, tag: &str) -> Self {
        Self(hash("darter tag v1", [registry, repository, tag]))
    }

    /// The hash.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What the home of this tag is found by: it is no blob's digest, since no blob has a BLAKE3 digest for its SHA-256.
    #[must_use]
    pub const fn task(&self) -> TaskId {
        TaskId::blob(Digest::Sha256(self.0))
    }
}

/// What an asker accepts, as a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Accepts([u8; 32]);

impl Accepts {
    /// Of the values of the `Accept` headers of a request. Order, repetition and case do not count (RFC 9110, section 12.5.1); all
    /// else does.
    #[must_use]
    pub fn new<'a>(values: impl IntoIterator<Item = &'a str>) -> Self {
        let ranges =
            values.into_iter().flat_map(|value| value.split(',')).map(|range| range.trim().to_ascii_lowercase());
        let ranges: BTreeSet<String> = ranges.filter(|range| !range.is_empty()).collect();
        Self(hash("darter accept v1", ranges.iter().map(String::as_str)))
    }

    /// The hash.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Lengths stand in front, so that no two lists run together to the same bytes.
fn hash<'a>(domain: &str, parts: impl IntoIterator<Item = &'a str>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(domain);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// What a manifest is: one of the types that the swarm carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ManifestType {
    /// `application/vnd.oci.image.manifest.v1+json`
    OciImage,
    /// `application/vnd.oci.image.index.v1+json`
    OciIndex,
    /// `application/vnd.docker.distribution.manifest.v2+json`
    DockerImage,
    /// `application/vnd.docker.distribution.manifest.list.v2+json`
    DockerList,
}

/// What a tag means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meaning {
    /// The manifest's digest.
    pub digest: Digest,
    /// What it is.
    pub media_type: ManifestType,
    /// Its length in bytes, 1 to [`LENGTH_MAX`].
    pub length: u64,
}

/// What is known of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TagAnswer {
    /// What it means.
    Means {
        /// That.
        meaning: Meaning,
        /// How long ago the registry was asked for it.
        age: Duration,
    },
    /// Nothing: the asker is to ask the registry, and to tell what comes of it.
    Ask,
    /// Somebody else is asking the registry.
    Wait {
        /// When to come again.
        retry_after: Duration,
    },
}

/// What somebody has learnt of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TagNews {
    /// The registry has said what it means.
    Means {
        /// To an asker of this kind.
        accepts: Accepts,
        /// What.
        meaning: Meaning,
        /// How long ago it was asked.
        age: Duration,
    },
    /// The one who was to ask has got no answer that is of use; somebody else may be luckier.
    Failed {
        /// An asker of this kind.
        accepts: Accepts,
    },
    /// It was written or deleted: what was said of it before counts no more.
    Forget,
}

/// What is known of tags.
#[derive(Debug)]
pub struct Tags {
    tags: Recent<TagId, Tag>,
}

#[derive(Debug)]
struct Tag {
    accepts: Recent<Accepts, Known>,
    /// When it was written or deleted last: what the registry was asked for before may mean the old one.
    forgotten: Option<Instant>,
}

#[derive(Debug, Default)]
struct Known {
    held: Option<Held>,
    asker: Option<Asker>,
}

#[derive(Debug)]
struct Held {
    meaning: Meaning,
    told: Instant,
    /// How old it was then.
    age: Duration,
}

/// Who asks the registry.
#[derive(Debug)]
struct Asker {
    node: NodeId,
    since: Instant,
    /// How often others have come meanwhile.
    waiting: u32,
}

impl Default for Tags {
    fn default() -> Self {
        Self { tags: Recent::new(TAGS_MAX) }
    }
}

impl Tags {
    /// Answers `from`, to whom an answer is of use that is younger than `fresh`. One who is told to ask the registry has
    /// [`ASKING`] to tell what comes of it; after that another is.
    pub fn ask(&mut self, from: NodeId, tag: TagId, accepts: Accepts, fresh: Duration, now: Instant) -> TagAnswer {
        let known = self.tags.get_or_insert_with(tag, Tag::new).accepts.get_or_insert_with(accepts, Known::default);
        if let Some((meaning, age)) = known.held.as_ref().and_then(|held| held.within(fresh, now)) {
            return TagAnswer::Means { meaning, age };
        }
        match &mut known.asker {
            Some(asker) if now.saturating_duration_since(asker.since) < ASKING => {
                let retry_after = RETRY_EACH.saturating_mul(asker.waiting).clamp(RETRY_MIN, RETRY_MAX);
                asker.waiting = asker.waiting.saturating_add(1);
                TagAnswer::Wait { retry_after }
            }
            asker => {
                *asker = Some(Asker { node: from, since: now, waiting: 0 });
                TagAnswer::Ask
            }
        }
    }

    /// What a tag means and how old the answer is, if that is younger than `fresh`.
    #[must_use]
    pub fn meaning(&self, tag: TagId, accepts: Accepts, fresh: Duration, now: Instant) -> Option<(Meaning, Duration)> {
        self.tags.peek(&tag)?.accepts.peek(&accepts)?.held.as_ref()?.within(fresh, now)
    }

    /// Takes in what `from` has learnt. Of two answers the younger one counts, and none that is older than the last
    /// [`TagNews::Forget`].
    pub fn tell(&mut self, from: NodeId, tag: TagId, news: TagNews, now: Instant) {
        match news {
            TagNews::Means { accepts, meaning, age } => {
                if age >= TTL_MAX || meaning.length == 0 || meaning.length > LENGTH_MAX {
                    return;
                }
                let tag = self.tags.get_or_insert_with(tag, Tag::new);
                let outdated = tag.forgotten.is_some_and(|at| now.saturating_duration_since(at) <= age);
                let known = tag.accepts.get_or_insert_with(accepts, Known::default);
                let younger = known.held.as_ref().is_none_or(|held| age < held.age(now));
                if younger && !outdated {
                    known.held = Some(Held { meaning, told: now, age });
                    known.asker = None;
                } else {
                    known.no_longer_asks(from);
                }
            }
            TagNews::Failed { accepts } => {
                let known = self.tags.get_mut(&tag).and_then(|tag| tag.accepts.get_mut(&accepts));
                known.into_iter().for_each(|known| known.no_longer_asks(from));
            }
            // Also of one that is not known: somebody may be about to tell what it meant before.
            TagNews::Forget => {
                self.tags.insert(tag, Tag { forgotten: Some(now), ..Tag::new() });
            }
        }
    }
}

impl Tag {
    fn new() -> Self {
        Self { accepts: Recent::new(ACCEPTS_MAX), forgotten: None }
    }
}

impl Known {
    fn no_longer_asks(&mut self, node: NodeId) {
        self.asker = self.asker.take().filter(|asker| asker.node != node);
    }
}

impl Held {
    fn age(&self, now: Instant) -> Duration {
        self.age.saturating_add(now.saturating_duration_since(self.told))
    }

    fn within(&self, fresh: Duration, now: Instant) -> Option<(Meaning, Duration)> {
        let age = self.age(now);
        (age < fresh.min(TTL_MAX)).then_some((self.meaning, age))
    }
}

#[cfg(test)]
#[path = "tags/tests.rs"]
mod tests;
