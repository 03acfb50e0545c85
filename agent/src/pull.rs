//! The way from "a client wants this blob" to verified bytes: one pull per digest per node, however many clients ask.
//!
//! - [`flight`] finds or begins the pull and lets clients read from it;
//! - [`task`] is its loop: the one owner of a [`darter_swarm::task::Task`], which decides;
//! - `execute` carries out what the core asks for, one future per action;
//! - `arriving` lets clients have the registry's bytes as they come;
//! - `place` bounds what may be on its way from peers, over all pulls;
//! - `ahead` decides which layers are started before a client asks for them, `prefetch` does it.
//!
//! Not here: HTTP (see `proxy`), bytes on disk (see `store`), what a peer or the registry says (see `source`).

pub mod flight;
pub mod task;

mod ahead;
mod arriving;
mod execute;
mod fetching;
mod origins;
mod place;
mod possession;
mod prefetch;

use std::ops::Range;

use darter_tracker::TaskId;
use http::HeaderMap;

pub(crate) use self::execute::own_offer;
pub use self::flight::{BlobStream, Context, Flights};
use crate::source::registry::{BlobOrigin, Credential};
use crate::store::StoreError;

/// What a client wants, after it was found to be allowed to have it.
#[derive(Clone, Debug)]
pub struct BlobRequest {
    /// The blob.
    pub task: TaskId,
    /// Its length in bytes, as the registry or a manifest says.
    pub length: u64,
    /// Where the client asked, with its own headers: the registry is only ever asked there and with those.
    pub origin: BlobOrigin,
    /// The bytes that the client wants, within `0..length`.
    pub range: Range<u64>,
    /// Whether the operator named the registry that was asked. Another one shows that it has the blob.
    pub named: bool,
    /// Who asks, where that can be told: what it was given the manifest of may be started before it is asked for.
    pub client: Option<Client>,
}

/// A client as far as it can be told from others: what it was given in one repository under one credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    registry: String,
    repository: String,
    credential: Credential,
}

impl Client {
    /// Whoever sends these headers to that repository of that registry.
    #[must_use]
    pub fn new(registry: &str, repository: &str, headers: &HeaderMap) -> Self {
        let (registry, repository) = (registry.to_owned(), repository.to_owned());
        Self { registry, repository, credential: Credential::of(headers) }
    }
}

/// Why a pull failed. What is stored and verified stays, so asking again goes on from there, except for `Poisoned`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PullError {
    /// The blob is not for the swarm: empty, or of more pieces than a task may have. Pass the request on.
    #[error("the blob is not for the swarm: {reason}")]
    Unsuited {
        /// What is the matter with it.
        reason: String,
    },
    /// The registry refuses every client of this node, and no peer delivers. The next client may fare better.
    #[error("the registry refuses the blob and no peer has it")]
    Refused,
    /// The registry cannot serve parts of a blob. Pass the request on.
    #[error("the registry does not serve ranges")]
    NoRange,
    /// Neither the registry nor a peer has delivered for a long time. Later may work.
    #[error("nobody delivers: {reason}")]
    Unavailable {
        /// The last thing that went wrong.
        reason: String,
    },
    /// The bytes do not match the digest. All of them were thrown away; asking again fetches them from the registry.
    #[error("the bytes do not match the digest")]
    Poisoned,
    /// The cache cannot be read or written. Pass the request on.
    #[error("the cache failed: {reason}")]
    Store {
        /// What the disk said.
        reason: String,
    },
    /// No client was left, and the pull ended as this one came. Begin it again.
    #[error("the pull had just come to rest")]
    Resting,
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
}

impl From<StoreError> for PullError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Poisoned => Self::Poisoned,
            error => Self::Store { reason: error.to_string() },
        }
    }
}
