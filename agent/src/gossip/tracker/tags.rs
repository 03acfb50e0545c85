//! What tags mean, asked of the members that keep it and told to them.
//!
//! A tag's home is found like a blob's. It is asked, and if it does not answer the registry is: nobody is blamed, since a member
//! of an earlier version drops the call. The next in rank is told what the home is told, so that an outage of the registry after
//! the home's death still finds it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use darter_swarm::tags::{Accepts, Meaning, RETRY_MAX, TagAnswer, TagId, TagNews};
use darter_swarm::wire::{Call, Reply};
use darter_tracker::NodeId;
use futures_util::future::join_all;
use tokio::time::{sleep, timeout};

use super::{GossipTracker, lock};

/// How long a client waits for what others know of a tag before the registry is asked, whoever else asks it.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// How long one call may take. Members answer in a millisecond; a frozen one must not cost every pull more than this.
const CALL_MAX: Duration = Duration::from_millis(500);

/// A member that did not answer is not asked about tags for this long.
const DEAF_FOR: Duration = Duration::from_secs(10);

/// Who is told: the home, and who is home after it.
const TOLD: usize = 2;

/// This node's side of the conversation.
pub struct TagHomes {
    tracker: Arc<GossipTracker>,
    /// Members that did not answer, until when; no more than there are members.
    deaf: Mutex<BTreeMap<NodeId, Instant>>,
}

impl TagHomes {
    /// Asks whom `tracker` says is home.
    #[must_use]
    pub fn new(tracker: Arc<GossipTracker>) -> Self {
        Self { tracker, deaf: Mutex::default() }
    }

    /// What a tag means and how old the answer is, which is less than `fresh`. None: ask the registry, and [`tell`](Self::tell).
    pub async fn ask(&self, tag: TagId, accepts: Accepts, fresh: Duration) -> Option<(Meaning, Duration)> {
        let home = *self.tracker.homes(&tag.task()).first()?;
        let conversation = async {
            loop {
                match self.call(home, Call::AskTag { tag, accepts, fresh }).await? {
                    // What is too old for this node is nobody's to call young.
                    Reply::Tag(TagAnswer::Means { meaning, age }) => {
                        return Some((meaning, age)).filter(|_| age < fresh);
                    }
                    Reply::Tag(TagAnswer::Wait { retry_after }) => sleep(retry_after.min(RETRY_MAX)).await,
                    _ => return None,
                }
            }
        };
        timeout(PATIENCE, conversation).await.ok().flatten()
    }

    /// Tells those who keep it what has been learnt of a tag.
    pub async fn tell(&self, tag: TagId, news: TagNews) {
        let homes = self.tracker.homes(&tag.task()).into_iter().take(TOLD);
        join_all(homes.map(|home| self.call(home, Call::TellTag { tag, news }))).await;
    }

    async fn call(&self, home: NodeId, call: Call) -> Option<Reply> {
        if home == self.tracker.me {
            return Some(self.tracker.home.call(home, call).await);
        }
        let now = Instant::now();
        let is_deaf = {
            let mut deaf = lock(&self.deaf);
            deaf.retain(|_, until| now < *until);
            deaf.contains_key(&home)
        };
        if is_deaf {
            return None;
        }
        match timeout(CALL_MAX, self.tracker.call_peer(home, call)).await {
            Ok(Ok(reply)) => return Some(reply),
            Ok(Err(error)) => tracing::debug!(%home, error, "a home does not answer about tags"),
            Err(_) => tracing::debug!(%home, "a home does not answer about tags in time"),
        }
        lock(&self.deaf).insert(home, now + DEAF_FOR);
        None
    }
}
