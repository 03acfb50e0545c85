//! Why a tracker call failed.

use serde::{Deserialize, Serialize};

use crate::task::TaskId;

/// Why a home gave no answer. A download goes on without it in every case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum TrackerError {
    /// The member could not be reached or did not answer in time. Whether it acted is unknown; every call may be
    /// repeated. Ask the next in rank.
    #[error("the home did not answer: {reason}")]
    Unreachable {
        /// What happened, for the log.
        reason: String,
    },
    /// The home does not know the caller as a downloader of the task, for example after a restart. Nothing changed:
    /// register, then repeat.
    #[error("not registered for {task}")]
    NotRegistered {
        /// The task of the call.
        task: TaskId,
    },
    /// The request contradicts what is known, such as another length for the same task. Nothing changed; repeating it
    /// cannot help.
    #[error("refused: {reason}")]
    Refused {
        /// What contradicts what.
        reason: String,
    },
    /// The home has as many tasks or downloaders as it can hold. Nothing changed; later may work.
    #[error("the home is full")]
    Overloaded,
}
