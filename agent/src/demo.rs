//! `darter demo`: the job done before one's eyes, on one machine.
//!
//! A small registry and several agents, each a process of its own, on loopback. Clients pull one image through every
//! agent at the same moment, then again; the report says what came from where and whether all is right. The agents are
//! this very binary, and every part can be used by tests: [`registry`], [`image`], [`cluster`]. What pulls is [`crate::client`].
//!
//! Not here: anything that an agent does.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Barrier;
use tokio_util::task::AbortOnDropHandle;

use crate::client::{Client, PullError, Pulled, Transfer};

pub mod authority;
pub mod cluster;
pub mod image;
pub mod progress;
pub mod registry;
pub mod report;

use authority::{Authority, AuthorityError};
use cluster::{Agent, Cluster, ClusterError, Sources, Subnet, Upstream};
use image::Image;
use progress::{Progress, Style};
use registry::{Registry, RegistryError, Stats};
use report::{AgentReport, Outcome, Report};

/// Bytes of the image unless told otherwise: 160 MiB, in layers from 300 KiB to 96 MiB.
pub const SIZE_BYTES: u64 = 160 << 20;

/// How long the agents may take to find each other. A second is usual; their first round of discovery may take three,
/// and a machine that has just compiled all this may be busy.
const READY_MAX: Duration = Duration::from_secs(60);

/// How long the counts of registry and agents may take to agree after the last byte: they are read at one moment and
/// written at another.
const SETTLE_MAX: Duration = Duration::from_secs(2);

/// How often they are read meanwhile.
const SETTLE_EVERY: Duration = Duration::from_millis(20);

/// Disk that is wanted beside the caches: journals, logs, the file system's own.
const SPARE_BYTES: u64 = 64 << 20;

/// What to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many agents, 1 to [`cluster::AGENTS_MAX`].
    pub agents: usize,
    /// About how many bytes the image has; the layers keep their proportions.
    pub size_bytes: u64,
    /// Write nothing but one JSON object, and errors.
    pub json: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { agents: 3, size_bytes: SIZE_BYTES, json: false }
    }
}

/// Why there is nothing to report. Everything that was started is stopped and removed.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The agents are this binary, and it cannot be found.
    #[error("cannot find this program's own file")]
    Program(#[source] std::io::Error),
    /// The caches would not fit.
    #[error("the caches take {needed_bytes} bytes in {directory}, where {free_bytes} are free; TMPDIR names another")]
    Space {
        /// Where they go.
        directory: PathBuf,
        /// What they take.
        needed_bytes: u64,
        /// What is there.
        free_bytes: u64,
    },
    /// No loopback addresses, or the disk could not be asked, or signals not be received.
    #[error("cannot {doing}")]
    System {
        /// What failed.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No certificate for the registry.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// No registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// No agents, or one does not answer.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// A task of the demonstration panicked. A bug.
    #[error("a part of the demonstration broke")]
    Broken(#[from] tokio::task::JoinError),
    /// The person at the keyboard, or the system, had enough.
    #[error("interrupted")]
    Interrupted,
}

/// Shows it all: writes the table, or the JSON object, to standard output. Returns whether everything was right.
///
/// # Errors
/// If there was nothing to show. Processes and files are gone in any case.
pub async fn run(options: Options) -> Result<bool, DemoError> {
    let style = Style::choose(options.json);
    let interrupted = interruption()?;
    let mut cluster = None;
    let report = tokio::select! {
        report = perform(options, style, &mut cluster) => report,
        () = interrupted => Err(DemoError::Interrupted),
    };
    if let Some(cluster) = cluster {
        // An error brings the log of the agent that is to blame; a wrong figure has no culprit yet.
        if report.as_ref().is_ok_and(|report| !report.ok()) {
            for agent in cluster.agents() {
                let _ = writeln!(std::io::stderr(), "{} wrote at last:\n{}", agent.name(), agent.log_tail());
            }
        }
        cluster.stop().await.map_err(|source| DemoError::System { doing: "remove the agents' files", source })?;
    }
    let report = report?;
    if options.json {
        for problem in report.problems() {
            let _ = writeln!(std::io::stderr(), "WRONG: {problem}");
        }
    }
    let text = if options.json { report.json() + "\n" } else { report.to_string() };
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|source| DemoError::System { doing: "write the report", source })?;
    Ok(report.ok())
}

/// Everything up to the report. The cluster is left in `running`, whatever happens.
async fn perform(options: Options, style: Style, running: &mut Option<Cluster>) -> Result<Report, DemoError> {
    enough_space(&options)?;
    let program = std::env::current_exe().map_err(DemoError::Program)?;
    say(style, "making an image of five layers");
    let image = tokio::task::spawn_blocking(move || Image::demo(options.size_bytes)).await?;
    let subnet = Subnet::claim().map_err(|source| DemoError::System { doing: "find loopback addresses", source })?;
    let host = subnet.registry().to_string();
    let authority = Authority::new("darter demo registry", &[&host])?;
    let serving = registry::Options {
        listen: SocketAddr::new(subnet.registry(), 0),
        tls: Some(authority.server(&host)?),
        ..registry::Options::default()
    };
    let registry = Registry::start(std::slice::from_ref(&image), serving).await?;
    let upstream =
        Upstream { address: registry.address(), authority_pem: Some(authority.certificate_pem().to_owned()) };
    say(style, &format!("registry at https://{}, starting {} agents", registry.address(), options.agents));
    let agents =
        cluster::Options { agents: options.agents, program, registry: upstream, overrides: serde_json::Value::Null };
    let cluster = running.insert(Cluster::start(&agents, &subnet)?);
    cluster.ready(READY_MAX).await?;
    let report = observe(cluster, &registry, &image, style).await;
    registry.stop().await;
    report
}

/// Pulls cold and warm, and asks everybody what came from where.
async fn observe(cluster: &Cluster, registry: &Registry, image: &Image, style: Style) -> Result<Report, DemoError> {
    let (agents, address) = (cluster.agents(), registry.address());
    say(style, &format!("pulling {}:{} through every agent at once", image.repository(), image.tag()));
    let cold = pull_through_all(agents, address, image, style).await?;
    let (sources, sent) = settled(agents, registry).await?;
    say(style, "pulling again");
    let warm = pull_through_all(agents, address, image, style).await?;
    let (_, all) = settled(agents, registry).await?;
    let parts = agents.iter().zip(sources).zip(cold.into_iter().zip(warm));
    let parts = parts.map(|((agent, source), (cold, warm))| AgentReport {
        name: agent.name().to_owned(),
        registry_bytes: source.registry_bytes,
        peer_bytes: by_name(agents, source.peers),
        cold,
        warm,
    });
    Ok(Report {
        agents: parts.collect(),
        image_bytes: image.blob_bytes(),
        registry_bytes: sent.blob_bytes(),
        registry_cuts: sent.blob_cuts(),
        warm_registry_bytes: all.blob_bytes() - sent.blob_bytes(),
    })
}

/// Pulls `image` through each of `agents`, all beginning at the same moment, each on a task of its own. The outcomes
/// are in the order of the agents.
///
/// # Errors
/// If a task panicked.
pub async fn pull_through_all(
    agents: &[Agent],
    registry: SocketAddr,
    image: &Image,
    style: Style,
) -> Result<Vec<Outcome>, tokio::task::JoinError> {
    let transfers: Vec<Arc<Transfer>> = agents.iter().map(|_| Arc::default()).collect();
    let start = Arc::new(Barrier::new(agents.len()));
    let pulls = agents.iter().zip(&transfers).map(|(agent, transfer)| {
        let client = Client::direct(registry, Some(agent.tls())).through(agent.addresses().proxy);
        let (repository, tag) = (image.repository().to_owned(), image.tag().to_owned());
        let (start, transfer) = (Arc::clone(&start), Arc::clone(transfer));
        AbortOnDropHandle::new(tokio::spawn(async move {
            start.wait().await;
            let started = Instant::now();
            let pulled = client.pull(&repository, &tag, &transfer).await;
            outcome(&pulled, started.elapsed())
        }))
    });
    // Collected first, so that all of them run before the first is waited for.
    let pulls: Vec<_> = pulls.collect();
    let names = agents.iter().map(|agent| agent.name().to_owned());
    let progress = Progress::new(style, names.zip(transfers));
    progress.during(try_join_all(pulls)).await
}

fn outcome(pulled: &Result<Pulled, PullError>, elapsed: Duration) -> Outcome {
    match pulled {
        Ok(pulled) => Outcome::Whole { elapsed: pulled.elapsed, digests_checked: pulled.digests_checked },
        Err(error) => Outcome::Failed { reason: chain(error), elapsed },
    }
}

/// What the agents read and what the registry sent, as soon as the two agree, or when waiting longer is no use.
async fn settled(agents: &[Agent], registry: &Registry) -> Result<(Vec<Sources>, Stats), ClusterError> {
    let end = Instant::now() + SETTLE_MAX;
    loop {
        let mut sources = Vec::with_capacity(agents.len());
        for agent in agents {
            // The metric is what operators see, so it is the one that is held against the registry's count.
            let registry_bytes = agent.metric("darter_registry_received_bytes_total").await?;
            sources.push(Sources { registry_bytes, ..agent.sources().await? });
        }
        let sent = registry.stats();
        let read: u64 = sources.iter().map(|source| source.registry_bytes).sum();
        if read == sent.blob_bytes() || Instant::now() >= end {
            return Ok((sources, sent));
        }
        tokio::time::sleep(SETTLE_EVERY).await;
    }
}

/// Peers by their names, whether the agent calls them so or by address.
fn by_name(agents: &[Agent], peers: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let mut named = BTreeMap::new();
    for (peer, bytes) in peers {
        let known = agents.iter().find(|agent| agent.addresses().peer.to_string() == peer);
        *named.entry(known.map_or(peer, |agent| agent.name().to_owned())).or_insert(0) += bytes;
    }
    named
}

/// Whether the caches fit, all of them at once.
fn enough_space(options: &Options) -> Result<(), DemoError> {
    let directory = std::env::temp_dir();
    let disk = rustix::fs::statvfs(&directory);
    let disk =
        disk.map_err(|error| DemoError::System { doing: "ask the disk for its free space", source: error.into() })?;
    let free_bytes = disk.f_bavail.saturating_mul(disk.f_frsize);
    let needed_bytes = options.size_bytes.saturating_mul(options.agents as u64).saturating_add(SPARE_BYTES);
    if free_bytes < needed_bytes { Err(DemoError::Space { directory, needed_bytes, free_bytes }) } else { Ok(()) }
}

/// Ends when the process is asked to end. From then on only this decides how.
fn interruption() -> Result<impl Future<Output = ()>, DemoError> {
    let failed = |source| DemoError::System { doing: "wait for signals", source };
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Tells a person what goes on.
fn say(style: Style, text: &str) {
    if style != Style::Silent {
        // Nobody reads it; the work goes on.
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_image_larger_than_the_disk_is_refused() {
        let refused = enough_space(&Options { size_bytes: u64::MAX, ..Options::default() });
        assert!(matches!(refused, Err(DemoError::Space { needed_bytes: u64::MAX, .. })), "{refused:?}");
        assert!(enough_space(&Options { size_bytes: 0, agents: 1, json: true }).is_ok());
    }

    #[test]
    fn causes_are_told_to_the_last() {
        let source = std::io::Error::other("no more");
        let error = DemoError::System { doing: "do it", source };
        assert_eq!(chain(&error), "cannot do it: no more");
    }
}
