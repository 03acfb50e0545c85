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
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
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
    /// on loopback are only for an agent that is itself reached there. An unspecified one, as in `0.0.0.0:8002`, stands
    /// for that port at every address of this host.
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
        let everywhere = own.iter().filter(|own| own.ip().is_unspecified()).map(SocketAddr::port).collect();
        tasks.spawn(collect(Index::new(own), everywhere, waiting, updates, seeds_tx, first_round_tx));
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
    everywhere: BTreeSet<u16>,
    mut waiting: BTreeSet<SourceId>,
    mut updates: mpsc::Receiver<Update>,
    published: watch::Sender<BTreeSet<SocketAddr>>,
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
                let mut seeds = update.seeds;
                drop_own(&mut seeds, &everywhere);
                if let Some(union) = index.apply(update.source, seeds) {
                    tracing::info!(seeds = union.len(), "seed addresses changed");
                    published.send_replace(union);
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

/// Seeds that are looked at for being this host's: as many as the index keeps, and the addresses that a host may have.
const LOOKED_AT_MAX: usize = index::SEEDS_PER_SOURCE_MAX + 64;

/// Takes out what reaches this very agent, which listens at these ports of all addresses of its host.
fn drop_own(seeds: &mut BTreeSet<SocketAddr>, ports: &BTreeSet<u16>) {
    if ports.is_empty() {
        return;
    }
    let looked_at = seeds.iter().take(LOOKED_AT_MAX);
    let own: Vec<_> = looked_at.filter(|seed| ports.contains(&seed.port()) && is_here(**seed)).copied().collect();
    for seed in own {
        seeds.remove(&seed);
    }
}

/// Whether an address is one of this host's: packets to it would come from itself. Nothing is sent; the kernel is asked for
/// a route. (Binding to it would say yes to all where `ip_nonlocal_bind` is set.)
fn is_here(seed: SocketAddr) -> bool {
    let any: IpAddr = if seed.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let source = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(seed)?;
        socket.local_addr()
    };
    source().is_ok_and(|source: SocketAddr| source.ip() == seed.ip())
}

#[cfg(test)]
mod tests;
