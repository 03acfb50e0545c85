//! Several agents on this machine, each a process of its own with its own addresses, configuration file and cache.
//!
//! They are the real binary and talk over real sockets. Everything they write is below one directory that is removed
//! with the cluster. Not here: what is asked of them.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use base64::Engine as _;
use tempfile::TempDir;
use tokio::time::Instant;

use super::authority::{Authority, AuthorityError};

mod address;
mod agent;
mod config;

pub use address::{Addresses, Subnet};
pub use agent::{Agent, Sources};
use config::Rendered;

/// Most agents of a cluster: more are a matter for the simulator, not for one machine.
pub const AGENTS_MAX: usize = 64;

/// Bytes of the cluster's secret: the least that an agent accepts.
const SECRET_BYTES: usize = darter_swarm::identity::SECRET_BYTES_MIN;

/// How often a starting agent is asked whether it is ready. It is a local question, and starting takes a second or so.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Readable and writable by the owner only.
const PRIVATE_MODE: u32 = 0o600;
/// Readable by all: certificates and configurations.
const PUBLIC_MODE: u32 = 0o644;

/// What a cluster is made of.
#[derive(Debug)]
pub struct Options {
    /// How many agents; 1 to [`AGENTS_MAX`].
    pub agents: usize,
    /// The `darter` binary.
    pub program: PathBuf,
    /// The registry that they hijack and trust.
    pub registry: Upstream,
    /// Laid over every agent's configuration, mapping by mapping; `null` for nothing.
    pub overrides: serde_json::Value,
}

/// A registry as agents are told of it.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Where it is.
    pub address: SocketAddr,
    /// The certificate, in PEM, of the authority behind its own; `None` if it speaks plain HTTP.
    pub authority_pem: Option<String>,
}

/// Why a cluster did not start, or an agent did not do as it should. What was started is stopped when the cluster is
/// dropped.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// More or fewer than possible were asked for. The caller's mistake.
    #[error("{0} agents: it takes 1 to {AGENTS_MAX}")]
    Count(usize),
    /// The system has no address or port left.
    #[error("cannot find addresses for the agents")]
    Addresses(#[source] io::Error),
    /// A file cannot be written.
    #[error("cannot write {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The system gave no random bytes for the secret.
    #[error("the system gives no random bytes")]
    Random,
    /// A configuration cannot be written as YAML. A bug, or overrides that are none.
    #[error("cannot render a configuration")]
    Render(#[from] serde_saphyr::ser::Error),
    /// The binary cannot be run.
    #[error("cannot run {program}")]
    Spawn {
        /// Which.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An agent ended by itself.
    #[error("{agent} ended by itself: {status}\n{log}")]
    Exited {
        /// Its name.
        agent: String,
        /// How.
        status: ExitStatus,
        /// The last lines it wrote.
        log: String,
    },
    /// An agent was not there in time.
    #[error("{agent} was not ready after {waited:?}: {missing}\n{log}")]
    NotReady {
        /// Its name.
        agent: String,
        /// How long it had.
        waited: Duration,
        /// What it lacked.
        missing: String,
        /// The last lines it wrote.
        log: String,
    },
    /// An agent's admin port did not answer as it should.
    #[error("{agent} does not answer {path}: {reason}")]
    Admin {
        /// Its name.
        agent: String,
        /// What was asked.
        path: &'static str,
        /// What came instead.
        reason: String,
    },
}

/// Running agents. Dropping it kills them; [`Cluster::stop`] lets them leave.
#[derive(Debug)]
pub struct Cluster {
    // Before the directory, so that they are killed before it is removed.
    agents: Vec<Agent>,
    directory: TempDir,
}

impl Cluster {
    /// Writes the files of `options.agents` agents with addresses in `subnet` and starts the processes.
    ///
    /// # Errors
    /// If a file, a port or the binary is missing. An agent that fails later is seen by [`Cluster::ready`].
    pub fn start(options: &Options, subnet: &Subnet) -> Result<Self, ClusterError> {
        if !(1..=AGENTS_MAX).contains(&options.agents) {
            return Err(ClusterError::Count(options.agents));
        }
        let directory = tempfile::Builder::new().prefix("darter-demo-").tempdir();
        let directory = directory.map_err(|source| ClusterError::File { path: std::env::temp_dir(), source })?;
        let addresses =
            subnet.agents(options.agents, options.registry.address.port()).map_err(ClusterError::Addresses)?;
        let secret_file = directory.path().join("secret");
        write(&secret_file, &secret()?, PRIVATE_MODE)?;
        let ca_file = match &options.registry.authority_pem {
            Some(pem) => {
                let path = directory.path().join("registry-ca.crt");
                write(&path, pem, PUBLIC_MODE)?;
                Some(path)
            }
            None => None,
        };
        let mut cluster = Self { agents: Vec::with_capacity(options.agents), directory };
        for (own, at) in addresses.iter().zip(1..) {
            let name = format!("agent-{at}");
            let home = cluster.directory.path().join(&name);
            std::fs::create_dir(&home).map_err(|source| ClusterError::File { path: home.clone(), source })?;
            let hijack = Authority::new(&format!("{name} hijack"), &[&options.registry.address.ip().to_string()])?;
            write(&home.join("hijack.crt"), hijack.certificate_pem(), PUBLIC_MODE)?;
            write(&home.join("hijack.key"), hijack.key_pem(), PRIVATE_MODE)?;
            let rendered = Rendered {
                name: &name,
                home: &home,
                secret_file: &secret_file,
                own,
                all: &addresses,
                registry: options.registry.address,
                ca_file: ca_file.as_deref(),
                overrides: &options.overrides,
            };
            write(&home.join("darter.yaml"), &rendered.yaml()?, PUBLIC_MODE)?;
            let mut agent = Agent::new(name, *own, home, options.program.clone(), hijack.client()?);
            agent.start()?;
            cluster.agents.push(agent);
        }
        Ok(cluster)
    }

    /// Waits until every agent says that it is ready and counts all the others as members.
    ///
    /// # Errors
    /// If one ends, or is not ready `within` that time.
    pub async fn ready(&mut self, within: Duration) -> Result<(), ClusterError> {
        let end = Instant::now() + within;
        let count = self.agents.len() as u64;
        for agent in &mut self.agents {
            loop {
                agent.running()?;
                let asked = tokio::time::timeout_at(end, agent.joined(count)).await;
                let Err(missing) = asked.unwrap_or_else(|_| Err("it does not answer".to_owned())) else { break };
                if Instant::now() >= end {
                    let (name, log) = (agent.name().to_owned(), agent.log_tail());
                    return Err(ClusterError::NotReady { agent: name, waited: within, missing, log });
                }
                tokio::time::sleep(ASK_EVERY).await;
            }
        }
        Ok(())
    }

    /// The agents, in order of their names.
    #[must_use]
    pub fn agents(&self) -> &[Agent] {
        &self.agents
    }

    /// One agent to kill or start again.
    pub fn agent_mut(&mut self, at: usize) -> Option<&mut Agent> {
        self.agents.get_mut(at)
    }

    /// Where everything is written.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Lets all agents leave, kills those that do not, and removes their files.
    ///
    /// # Errors
    /// If the files cannot be removed.
    pub async fn stop(mut self) -> io::Result<()> {
        futures_util::future::join_all(self.agents.iter_mut().map(Agent::stop)).await;
        self.directory.close()
    }
}

fn secret() -> Result<String, ClusterError> {
    let mut bytes = [0; SECRET_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| ClusterError::Random)?;
    Ok(base64::engine::general_purpose::STANDARD.encode(bytes) + "\n")
}

/// Writes a file that was not there, with its permissions from the start.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), ClusterError> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| ClusterError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
