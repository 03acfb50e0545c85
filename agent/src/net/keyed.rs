//! Tasks that are known by a key until they end, also if they end in a panic.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::task::Poll;

use tokio::task::{Id, JoinError, JoinSet};

/// A set of running tasks, each with its key. Dropping it aborts them.
pub(super) struct Keyed<K, T> {
    running: JoinSet<T>,
    keys: BTreeMap<Id, K>,
}

impl<K: Copy + PartialEq, T: Send + 'static> Keyed<K, T> {
    pub(super) fn new() -> Self {
        Self { running: JoinSet::new(), keys: BTreeMap::new() }
    }

    pub(super) fn spawn(&mut self, key: K, task: impl Future<Output = T> + Send + 'static) {
        self.keys.insert(self.running.spawn(task).id(), key);
    }

    /// The next task that ends, and what it ended with; never, while there is none. Cancelling loses nothing.
    pub(super) async fn next(&mut self) -> (K, Result<T, JoinError>) {
        poll_fn(|cx| {
            // The loop is for a task without a key, which does not exist.
            while let Poll::Ready(Some(ended)) = self.running.poll_join_next_with_id(cx) {
                let id = match &ended {
                    Ok((id, _)) => *id,
                    Err(error) => error.id(),
                };
                if let Some(key) = self.keys.remove(&id) {
                    return Poll::Ready((key, ended.map(|(_, value)| value)));
                }
            }
            Poll::Pending
        })
        .await
    }

    pub(super) fn contains(&self, key: K) -> bool {
        self.keys.values().any(|other| *other == key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &K> {
        self.keys.values()
    }

    pub(super) fn len(&self) -> usize {
        self.running.len()
    }

    /// Waits for all to end.
    pub(super) async fn drain(&mut self) {
        while self.running.join_next().await.is_some() {}
        self.keys.clear();
    }

    /// Aborts all and waits until they are gone.
    pub(super) async fn shutdown(&mut self) {
        self.running.shutdown().await;
        self.keys.clear();
    }
}
