//! Where the first members of a cluster are found: a stream of seed addresses from any number of sources.
//!
//! Read in this order: [`index`] (pure: what every source says, and the union of it), [`backoff`] and [`refresh`] (pure:
//! when to ask again), then one file per kind of source ([`fixed`], `file`, [`dns`], [`kubernetes`]) behind the [`Source`]
//! enum. [`Discovery`] owns their tasks.
//!
//! Seeds are gossip addresses to knock at, nothing more: whoever answers there still has to prove that it is a member.
//! Not here: gossip, members, configuration files.

pub mod backoff;
pub mod dns;
mod file;
pub mod fixed;
pub mod index;
pub mod kubernetes;
pub mod refresh;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

pub use fixed::{Address, AddressError};
use index::{Index, SourceId};

/// How long a source that finds nothing holds up the first round. A node whose DNS is down is still a working proxy,
/// so it must not stay unready for longer than a kubelet's first probes.
pub const FIRST_ROUND_PATIENCE: Duration = Duration::from_secs(3);

/// Updates on their way to the index. Every source sends at most a few a minute; when it is full, the source waits.
const UPDATES_QUEUED_MAX: usize = 16;

/// A place to learn seed addresses from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A list, given by the operator.
    Fixed {
        /// The gossip addresses of some members, by number or by name.
        addresses: Vec<Address>,
    },
    /// A file of such addresses, one per line.
    File {
        /// Where it is. It need not be there yet.
        path: PathBuf,
    },
    /// A name that DNS has records of.
    Dns(dns::Query),
    /// Objects of a Kubernetes API server.
    Kubernetes(kubernetes::Query),
}

/// What a driver reports after it asked its source.
#[derive(Debug)]
struct Update {
    source: SourceId,
    /// All that the source says now; it replaces what it said before.
    seeds: BTreeSet<SocketAddr>,
    /// Whether the source could answer for everything it was asked. The first such answer ends its first round.
    complete: bool,
}

/// All sources of one agent, and the tasks that ask them. Dropping it stops them at once.
#[derive(Debug)]
pub struct Discovery {
    /// The union of what the sources say, without the agent's own addresses. Changes only when the set does.
    pub seeds: watch::Receiver<BTreeSet<SocketAddr>>,
    /// Turns true, once, when every source has answered or [`FIRST_ROUND_PATIENCE`] is over.
    pub first_round: watch::Receiver<bool>,
    tasks: JoinSet<()>,
}

impl Discovery {
    /// Starts one task per source. `own` are the addresses that this agent is reached at: they are never seeds, and those
    /// on loopback are only for an agent that is itself reached there.
    ///
    /// Must be called within a tokio runtime. Nothing here fails: a source that cannot answer is asked again.
    #[must_use]
    pub fn start(sources: Vec<Source>, own: Vec<SocketAddr>) -> Self {
        let (seeds_tx, seeds) = watch::channel(BTreeSet::new());
        let (first_round_tx, first_round) = watch::channel(sources.is_empty());
        let (updates_tx, updates) = mpsc::channel(UPDATES_QUEUED_MAX);
        let mut tasks = JoinSet::new();
        let waiting: BTreeSet<SourceId> = (0..sources.len()).map(SourceId).collect();
        for (at, source) in sources.into_iter().enumerate() {
            let updates = updates_tx.clone();
            let id = SourceId(at);
            match source {
                Source::Fixed { addresses } => tasks.spawn(fixed::run(id, addresses, updates)),
                Source::File { path } => tasks.spawn(file::run(id, path, updates)),
                Source::Dns(query) => tasks.spawn(dns::run(id, query, updates)),
                Source::Kubernetes(query) => tasks.spawn(kubernetes::run(id, query, updates)),
            };
        }
        tasks.spawn(collect(Index::new(own), waiting, updates, seeds_tx, first_round_tx));
        Self { seeds, first_round, tasks }
    }

    /// Waits until the first round is over: every source has answered, or [`FIRST_ROUND_PATIENCE`] has passed.
    pub async fn first_round(&self) {
        // An error means that the tasks are gone, and then there is nothing to wait for.
        let _ = self.first_round.clone().wait_for(|over| *over).await;
    }

    /// Stops all tasks and waits for them.
    pub async fn shutdown(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Owns the index: takes updates one by one, publishes the union when it changes, and ends the first round.
async fn collect(
    mut index: Index,
    mut waiting: BTreeSet<SourceId>,
    mut updates: mpsc::Receiver<Update>,
    seeds: watch::Sender<BTreeSet<SocketAddr>>,
    first_round: watch::Sender<bool>,
) {
    let patience = Instant::now() + FIRST_ROUND_PATIENCE;
    loop {
        tokio::select! {
            update = updates.recv() => {
                // Without sources there is nothing to do; with some, their tasks never end by themselves.
                let Some(update) = update else { return };
                if update.complete {
                    waiting.remove(&update.source);
                }
                if let Some(union) = index.apply(update.source, update.seeds) {
                    tracing::info!(seeds = union.len(), "seed addresses changed");
                    seeds.send_replace(union);
                }
            }
            () = tokio::time::sleep_until(patience), if !waiting.is_empty() => {
                tracing::warn!(sources = waiting.len(), "discovery has found nothing yet, going on without");
                waiting.clear();
            }
        }
        if waiting.is_empty() {
            // After the seeds, so that who waits for the round finds them there.
            first_round.send_if_modified(|over| !std::mem::replace(over, true));
        }
    }
}

#[cfg(test)]
mod tests;
