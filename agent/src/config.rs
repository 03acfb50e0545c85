//! What the operator wants: YAML and environment, read once, checked as a whole, all problems told at once.
//!
//! Read in this order: [`defaults`] (every key and why), [`types`] (what comes out), then how it gets there: `tree` (YAML
//! with places), `env` (overrides), `read` (the walk that collects problems), `scalar` and [`hosts`] (what values mean),
//! `files` (what they name), `check` and `coverage` (how they fit each other), `build` (all of it), [`problems`]. [`dfdaemon`]
//! makes a configuration of what Dragonfly v1 had.
//!
//! Not here: starting anything. Sockets are opened for a moment at most, to see whether they could be.

mod build;
mod check;
mod coverage;
pub mod defaults;
pub mod dfdaemon;
mod env;
mod files;
pub mod host;
pub mod hosts;
pub mod problems;
mod read;
pub(crate) mod scalar;
mod sources;
mod tree;
pub mod types;

use std::collections::BTreeMap;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use darter_discovery::Source;
use darter_swarm::identity::{ClusterKeys, KeyError};
use darter_tracker::PieceSizeRule;

pub use hosts::{HostPattern, HostPort};
pub use problems::{Place, Problem, Problems};
pub use types::{
    Admin, Cache, Gossip, Hijack, Identity, Limits, Node, Peer, Proxy, Redacted, Registry, RegistryMirror, Rule, Space,
    Transport, Verify, WhenRegistryDown,
};

use check::{Listeners, Protocol};

/// Bound on the configuration file: a hundred times what the longest list of registries needs.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Everything that can be configured. Whatever is in here has been checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who this agent is.
    pub node: Node,
    /// Where the secrets were read; `None`: a proxy only.
    pub secret_file: Option<PathBuf>,
    /// The cluster's secrets, the sending one first; empty exactly if there is no file of them.
    pub secrets: Vec<Redacted<Vec<u8>>>,
    /// The port for container runtimes.
    pub proxy: Proxy,
    /// Pieces and tracker calls.
    pub peer: Peer,
    /// Membership and events.
    pub gossip: Gossip,
    /// Health, metrics, status.
    pub admin: Admin,
    /// Where the first members are found.
    pub discovery: Vec<Source>,
    /// What is kept on disk.
    pub cache: Cache,
    /// Rates.
    pub limits: Limits,
    /// Whom origin-form requests are for.
    pub registry_mirror: RegistryMirror,
    /// What to do with which URL, the first match first.
    pub rules: Vec<Rule>,
    /// Whose TLS is terminated.
    pub hijack: Hijack,
    /// How single registries are spoken to.
    pub registries: BTreeMap<HostPort, Registry>,
    /// Who is served while a registry is down.
    pub when_registry_down: WhenRegistryDown,
    /// How long a registry's answer for a tag may be used again; zero: every tag is asked for.
    pub tag_ttl: Duration,
    /// How blobs are cut.
    pub piece_size: PieceSizeRule,
    /// When bytes may leave for a client.
    pub verify: Verify,
    /// What is allowed but probably not meant, to be logged once.
    pub warnings: Vec<String>,
    /// Where it all was written.
    origin: Origin,
}

/// Where a configuration was written, for problems that show only when it is put to use.
#[derive(Clone, Debug, Default)]
struct Origin {
    file: String,
    places: BTreeMap<&'static str, Place>,
}

impl Config {
    /// Reads a file, lays the environment over it, and checks all of it, together with the files that it names.
    ///
    /// # Errors
    /// Everything that is wrong, with line and column or the name of the variable. The operator must mend it; trying
    /// again does not help.
    pub fn load(path: &Path, env: impl Iterator<Item = (String, String)>) -> Result<Self, Problems> {
        let shown = path.display().to_string();
        match files::text(path, FILE_BYTES_MAX) {
            Ok(text) => Self::parse(&shown, &text, env),
            Err(message) => Err(Problems::new(shown, vec![Problem::new(Place::Whole, "", message)])),
        }
    }

    /// The same for a text that is called `file` in messages.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn parse(file: &str, text: &str, env: impl Iterator<Item = (String, String)>) -> Result<Self, Problems> {
        let mut problems = Vec::new();
        let mut root = tree::parse(text).map_err(|problem| Problems::new(file, vec![problem]))?;
        env::overlay(&mut root, env, &mut problems);
        let mut reader = read::Reader::new(&root, problems);
        match build::config(&mut reader) {
            Some(mut config) => {
                let places = defaults::KEYS.iter().map(|key| (key.path, reader.place(key.path)));
                config.origin = Origin { file: file.to_owned(), places: places.collect() };
                Ok(config)
            }
            None => Err(Problems::new(file, reader.problems)),
        }
    }

    /// The cluster's key ring; `None` without secrets, and then there are no peers.
    ///
    /// # Errors
    /// If a secret cannot be used, which has been checked.
    pub fn cluster_keys(&self) -> Result<Option<ClusterKeys>, KeyError> {
        if self.secrets.is_empty() {
            return Ok(None);
        }
        let secrets: Vec<_> = self.secrets.iter().map(|secret| secret.expose().as_slice()).collect();
        ClusterKeys::new(&self.node.cluster, &secrets).map(Some)
    }

    /// Whether a key was given, in the file or by the environment, rather than left to its default.
    #[must_use]
    pub fn is_given(&self, key: &str) -> bool {
        self.origin.places.get(key).is_some_and(|place| *place != Place::Whole)
    }

    /// A problem of a key that shows only in use, at the place where the key was given.
    #[must_use]
    pub fn problem(&self, key: &str, message: impl Into<String>) -> Problem {
        Problem::new(self.origin.places.get(key).cloned().unwrap_or_default(), key, message)
    }

    /// Problems of this configuration's file.
    #[must_use]
    pub fn problems(&self, problems: Vec<Problem>) -> Problems {
        Problems::new(self.origin.file.as_str(), problems)
    }

    /// Whether all sockets of this configuration could be opened now: all are opened, side by side, and closed again.
    /// `passed` is the proxy's listener, where it is open already.
    ///
    /// For the start of an agent, so that every address that is taken is told at once; not for checking a file, as an
    /// agent that runs with it takes them all.
    ///
    /// # Errors
    /// One problem for every key whose address is taken or may not be opened.
    pub fn try_listeners(&self, passed: Option<&TcpListener>) -> Result<(), Problems> {
        let peers = !self.secrets.is_empty();
        let listeners = Listeners {
            proxy: passed.is_none().then_some(self.proxy.listen),
            peer: peers.then_some(self.peer.listen),
            gossip: peers.then_some(self.gossip.listen),
            admin: Some(self.admin.listen),
        };
        let (mut tcp, mut udp, mut problems) = (Vec::new(), Vec::new(), Vec::new());
        let quic_only = self.peer.transport == Transport::Quic;
        for (key, protocol, listen) in listeners.opened() {
            if quic_only && (key, protocol) == ("peer.listen", Protocol::Tcp) {
                continue;
            }
            let opened = match protocol {
                Protocol::Tcp => TcpListener::bind(listen).map(|listener| tcp.push(listener)),
                Protocol::Udp => UdpSocket::bind(listen).map(|socket| udp.push(socket)),
            };
            if let Err(error) = opened {
                problems.push(self.problem(key, format!("{listen} cannot be opened: {error}")));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(self.problems(problems)) }
    }
}

#[cfg(test)]
mod tests;
