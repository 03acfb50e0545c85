//! One agent's process: starting, asking, stopping, killing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tokio::process::{Child, Command};

use super::{Addresses, ClusterError};
use crate::client::Client;

/// How long an agent may take to leave after SIGTERM. A pull that is going on is given a few seconds.
const LEAVE_MAX: Duration = Duration::from_secs(10);

/// How much of its log is shown when an agent fails.
const LOG_TAIL_BYTES: u64 = 4096;

/// What an agent's `/api/v1/sources` says: where its blob bytes came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Sources {
    /// From registries.
    pub registry_bytes: u64,
    /// From peers, by their name or the address of their peer port.
    #[serde(default)]
    pub peers: BTreeMap<String, u64>,
}

/// An agent of a cluster. It is killed when dropped.
#[derive(Debug)]
pub struct Agent {
    name: String,
    addresses: Addresses,
    home: PathBuf,
    program: PathBuf,
    tls: Arc<rustls::ClientConfig>,
    child: Option<Child>,
}

impl Agent {
    pub(super) fn new(
        name: String,
        addresses: Addresses,
        home: PathBuf,
        program: PathBuf,
        tls: Arc<rustls::ClientConfig>,
    ) -> Self {
        Self { name, addresses, home, program, tls, child: None }
    }

    /// Its name, `agent-1` and on.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// What a client must trust to be served by it as the registry.
    #[must_use]
    pub fn tls(&self) -> Arc<rustls::ClientConfig> {
        Arc::clone(&self.tls)
    }

    /// Its configuration file.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.home.join("darter.yaml")
    }

    /// Its cache.
    #[must_use]
    pub fn cache_dir(&self) -> PathBuf {
        self.home.join("cache")
    }

    /// What it wrote to its standard output and error, over all its lives.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.home.join("log")
    }

    /// The process; `None` when it is stopped.
    #[must_use]
    pub fn process_id(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Starts the process, for the first time or again after [`Agent::stop`] or [`Agent::kill`].
    ///
    /// # Errors
    /// If the log cannot be written or the binary not be run.
    pub fn start(&mut self) -> Result<(), ClusterError> {
        self.start_with(&[])
    }

    /// Starts the process with more in its environment than there is in this one's.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_with(&mut self, environment: &[(&str, &str)]) -> Result<(), ClusterError> {
        let path = self.log_file();
        let log = File::options().create(true).append(true).open(&path).and_then(|log| Ok((log.try_clone()?, log)));
        let (out, err) = log.map_err(|source| ClusterError::File { path, source })?;
        let mut command = Command::new(&self.program);
        command.arg("agent").arg("--config").arg(self.config_file());
        // What the person at the keyboard configured for an agent of his own is not meant for these, except how much he
        // wants to read.
        let own = |name: &str| name.starts_with("DARTER_") && name != "DARTER_LOG";
        for (name, _) in std::env::vars_os().filter(|(name, _)| own(&name.to_string_lossy())) {
            command.env_remove(name);
        }
        command.envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(out).stderr(err).kill_on_drop(true);
        let child = command.spawn();
        self.child = Some(child.map_err(|source| ClusterError::Spawn { program: self.program.clone(), source })?);
        Ok(())
    }

    /// Asks the process to leave and waits for it; kills it if it takes too long.
    pub async fn stop(&mut self) {
        let Some(child) = &mut self.child else { return };
        // The id is there until the process has been waited for, so it is no other's.
        if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
            // It fails only if the process has just ended.
            let _ = kill_process(id, Signal::TERM);
        }
        if tokio::time::timeout(LEAVE_MAX, child.wait()).await.is_err() {
            tracing::warn!(agent = self.name, "it did not leave, so it is killed");
        }
        self.kill().await;
    }

    /// Kills the process as a crash would, and waits for its end.
    pub async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It fails only if the process has ended.
            let _ = child.kill().await;
        }
    }

    /// Whether the process runs.
    pub(super) fn running(&mut self) -> Result<(), ClusterError> {
        let exited = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
        match exited {
            Some(status) => Err(ClusterError::Exited { agent: self.name.clone(), status, log: self.log_tail() }),
            None => Ok(()),
        }
    }

    /// Whether it is ready and counts `members` members, itself included; if not, what is missing.
    pub(super) async fn joined(&self, members: u64) -> Result<(), String> {
        self.admin("/readyz").await.map_err(|error| error.to_string())?;
        match self.metric("darter_members").await {
            Ok(count) if count == members => Ok(()),
            Ok(count) => Err(format!("it knows {count} of {members} members")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The value of an unlabelled counter or gauge in `/metrics`.
    ///
    /// # Errors
    /// If the agent does not answer or does not have it.
    pub async fn metric(&self, name: &str) -> Result<u64, ClusterError> {
        let body = self.admin("/metrics").await?;
        sample(&String::from_utf8_lossy(&body), name).ok_or_else(|| ClusterError::Admin {
            agent: self.name.clone(),
            path: "/metrics",
            reason: format!("{name} is missing"),
        })
    }

    /// Where its blob bytes came from.
    ///
    /// # Errors
    /// If the agent does not answer with that.
    pub async fn sources(&self) -> Result<Sources, ClusterError> {
        const PATH: &str = "/api/v1/sources";
        let body = self.admin(PATH).await?;
        serde_json::from_slice(&body).map_err(|error| self.unanswered(PATH, error))
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log_file()).unwrap_or_else(|error| format!("(no log: {error})"))
    }

    async fn admin(&self, path: &'static str) -> Result<Bytes, ClusterError> {
        let client = Client::direct(self.addresses.admin, None);
        let reply = client.request(Method::GET, path, HeaderMap::new()).await;
        let reply = reply.map_err(|error| self.unanswered(path, error))?;
        match reply.status() {
            StatusCode::OK => Ok(reply.into_body()),
            status => Err(self.unanswered(path, status)),
        }
    }

    fn unanswered(&self, path: &'static str, reason: impl std::fmt::Display) -> ClusterError {
        ClusterError::Admin { agent: self.name.clone(), path, reason: reason.to_string() }
    }
}

/// The value of an unlabelled sample in the text format of OpenMetrics.
fn sample(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    value.split(' ').next()?.parse().ok()
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let cut = length > LOG_TAIL_BYTES;
    // What is left of the first line says nothing.
    let text = if cut { text.split_once('\n').map_or(text.as_ref(), |(_, rest)| rest) } else { text.as_ref() };
    Ok(text.trim_end().to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_their_whole_name() {
        let text = "# HELP darter_members Live members.\n# TYPE darter_members gauge\ndarter_members 3\n\
                    darter_members_max 9\ndarter_pieces_total{source=\"Peer\"} 4\ndarter_x_bytes_total 7 123.4\n# EOF\n";
        assert_eq!(sample(text, "darter_members"), Some(3));
        assert_eq!(sample(text, "darter_x_bytes_total"), Some(7));
        assert_eq!(sample(text, "darter_pieces_total"), None);
        assert_eq!(sample(text, "darter"), None);
        // The real exposition, so that a change of the format is noticed.
        let metrics = crate::admin::metrics::Metrics::default();
        metrics.members.set(5);
        metrics.registry_bytes.inc_by(1 << 40);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &metrics.exposition()).unwrap();
        assert_eq!(sample(&text, "darter_members"), Some(5));
        assert_eq!(sample(&text, "darter_registry_received_bytes_total"), Some(1 << 40));
    }

    #[test]
    fn sources_are_read_with_and_without_peers() {
        let sources: Sources = serde_json::from_str(r#"{"registry_bytes": 5, "peers": {"127.0.0.1:1": 7}}"#).unwrap();
        assert_eq!((sources.registry_bytes, sources.peers["127.0.0.1:1"]), (5, 7));
        let sources: Sources = serde_json::from_str(r#"{"registry_bytes": 5}"#).unwrap();
        assert!(sources.peers.is_empty());
    }

    #[test]
    fn a_tail_is_short_and_starts_with_a_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        assert_eq!(tail(&path).unwrap(), "one\ntwo");
        let long: String = (0..10_000).map(|at| format!("line {at}\n")).collect();
        std::fs::write(&path, long).unwrap();
        let tail = tail(&path).unwrap();
        assert!(tail.starts_with("line ") && tail.ends_with("line 9999"));
        assert!(tail.len() as u64 <= LOG_TAIL_BYTES);
    }
}
