//! The custom events that gossip carries to every member.
//!
//! They hold what must outlive the home of a task. Each is signed by its author, idempotent, and ordered by (epoch,
//! sequence) per author: the last one wins. Piece-by-piece availability is never gossiped.

use serde::{Deserialize, Serialize};

use crate::peer::NodeId;
use crate::task::{Geometry, TaskId};

/// An event and its place in its author's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Who says it.
    pub author: NodeId,
    /// The author's boot epoch.
    pub epoch: u64,
    /// Counts the author's events within the epoch.
    pub sequence: u64,
    /// What is said.
    pub body: EventBody,
}

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventBody {
    /// Download start: the author is getting a task and will serve what it has of it.
    Start {
        /// The task.
        task: TaskId,
    },
    /// Download progress: how much of a task the author holds.
    Progress {
        /// The task.
        task: TaskId,
        /// In quarters, 1 to 4; 4 is all of it, verified.
        quarters: u8,
    },
    /// File remove: the author serves the task no longer.
    Remove {
        /// The task.
        task: TaskId,
    },
    /// The length of a task and how it is cut, so that nobody needs to ask the registry.
    Length {
        /// The task.
        task: TaskId,
        /// Its cut.
        geometry: Geometry,
    },
    /// The author has lost what it knew (a restart, a new home) and asks holders to say it again.
    Recover {
        /// The task, or everything.
        task: Option<TaskId>,
    },
}
