//! `darter node configure`: the files with which a container runtime pulls through this node's agent.
//!
//! In this order: what the files should say (`containerd`, `docker`, `crio`; they read what is there and refuse
//! where it would have to go), whether the agent can do what they promise (`probe`), and only then the writing, with a
//! record of what was there before (`record`), so that it can be undone to the byte.
//!
//! Not here: restarting a runtime. That ends containers on some hosts, so it is said and left to the operator.

mod containerd;
mod crio;
mod docker;
mod probe;
mod record;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use super::args::{NodeConfigureArgs, Runtime};
use super::{complain, print};
use crate::config::{Config, HostPort, Problems};
use record::{Record, Root};

/// Names of Docker's hub. Runtimes know it by the first; what is called a registry elsewhere is the second.
const HUB: [&str; 3] = ["docker.io", "registry-1.docker.io", "index.docker.io"];

/// Why a runtime was not configured. Nothing was written, unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The agent's configuration is of no use.
    #[error("the agent's configuration cannot be used\n{0}")]
    Config(Problems),
    /// Going on would do away with somebody's settings, or promise what cannot be kept. The message says what to do.
    #[error("{0}")]
    Refused(String),
    /// The agent does not deliver what the runtime would ask it for.
    #[error("the probe failed, so nothing was written (--force writes all the same): {0}")]
    Probe(String),
    /// A file cannot be read or written. Some may be written already: --undo takes them back.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// A file as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    path: PathBuf,
    text: String,
    /// Whether `text` keeps what is there now. If not, a file of somebody else is in the way.
    merged: bool,
}

/// What a runtime needs.
#[derive(Debug, Default)]
struct Plan {
    files: Vec<Wanted>,
    /// What the operator has to know or to do.
    notes: Vec<String>,
}

/// The agent as its clients see it.
#[derive(Clone, Debug)]
struct Agent {
    proxy: SocketAddr,
    admin: SocketAddr,
    /// The certificate that it serves TLS with, if it does.
    tls_cert: Option<PathBuf>,
}

impl Agent {
    fn of(config: &Config) -> Self {
        let tls_cert = config.proxy.tls.as_ref().map(|identity| identity.cert_file.clone());
        Self { proxy: local(config.proxy.listen), admin: local(config.admin.listen), tls_cert }
    }

    fn url(&self) -> String {
        format!("{}://{}", if self.tls_cert.is_some() { "https" } else { "http" }, self.proxy)
    }
}

/// The address under which a listener is reached from its own host.
fn local(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// Configures a runtime, or undoes that, and says what became of each file.
///
/// # Errors
/// If something was refused or cannot be read or written.
pub async fn configure(args: &NodeConfigureArgs) -> Result<(), NodeError> {
    let root = Root::new(&args.root);
    if args.undo {
        for (path, done) in record::undo(&root, args.runtime)? {
            let _ = print(&format!("{done} {}", path.display()));
        }
        let _ = print(restart(args.runtime));
        return Ok(());
    }
    let config = Config::load(&args.config, super::config::variables()).map_err(NodeError::Config)?;
    let agent = Agent::of(&config);
    let registries = registries(args, &config)?;
    let plan = match args.runtime {
        Runtime::Containerd => containerd::plan(&root, &config, &agent, &registries)?,
        Runtime::Docker => docker::plan(&root, &config, &agent, &registries)?,
        Runtime::Crio => crio::plan(&root, &config, &agent, &registries)?,
    };
    let changes = Record::load(&root, args.runtime)?.changes(&root, &plan.files)?;
    if changes.is_needed() {
        if args.force {
            complain("WARNING: --force: not tried whether the agent delivers; if it does not, pulls may fail");
        } else {
            probe::run(args, &config, &agent, &registries).await?;
        }
    }
    for (path, done) in changes.apply(&root, args.runtime)? {
        let _ = print(&format!("{done} {}", path.display()));
    }
    plan.notes.iter().for_each(|note| complain(note));
    let _ = print(restart(args.runtime));
    Ok(())
}

/// What has to be done by hand before a runtime sees its files.
fn restart(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Containerd => "containerd reads hosts.toml at every pull: nothing has to be restarted",
        Runtime::Docker => "to take effect: systemctl daemon-reload && systemctl restart docker",
        Runtime::Crio => "to take effect: systemctl reload crio (podman, buildah and skopeo read it at every start)",
    }
}

/// The registries that are meant: those asked for, or those of the agent's configuration; without repetition.
fn registries(args: &NodeConfigureArgs, config: &Config) -> Result<Vec<HostPort>, NodeError> {
    let mirrored = || config.registry_mirror.remote.as_ref()?.authority()?.as_str().parse::<HostPort>().ok();
    let named = config.hijack.hosts.iter().filter(|pattern| !pattern.below).map(|pattern| pattern.host.clone());
    let found: Vec<HostPort> = match (args.registries.as_slice(), args.runtime) {
        ([], Runtime::Docker) => named.collect(),
        ([], Runtime::Crio) => mirrored().into_iter().collect(),
        ([], Runtime::Containerd) => {
            // The hub is the default, which is no word of somebody who wants it asked through the agent.
            let mirrored = mirrored().filter(|_| config.is_given("registry_mirror.remote"));
            config.registries.keys().cloned().chain(named).chain(mirrored).collect()
        }
        (given, _) => given.to_vec(),
    };
    let mut seen = BTreeSet::new();
    let found: Vec<_> = found.into_iter().filter(|host| seen.insert(reference(host))).collect();
    if found.is_empty() {
        return Err(refused("the agent's configuration names no registry for this runtime: --registry names one"));
    }
    Ok(found)
}

/// A registry's name as it stands in references of images. Safe as the name of a folder: it has no slash, and is no dot.
fn reference(host: &HostPort) -> String {
    match (HUB.contains(&host.host.as_str()), host.port) {
        (true, None | Some(443)) => HUB[0].to_owned(),
        (false, None) if host.host.contains(':') => format!("[{}]", host.host),
        _ => host.to_string(),
    }
}

/// The URL of a registry.
fn server(host: &HostPort, config: &Config) -> String {
    let plain = config.registries.get(host).is_some_and(|registry| registry.insecure_http);
    let name = match reference(host) {
        name if name == HUB[0] => HUB[1].to_owned(),
        name => name,
    };
    format!("{}://{name}", if plain { "http" } else { "https" })
}

fn refused(message: impl Into<String>) -> NodeError {
    NodeError::Refused(message.into())
}

/// A TOML document; nothing is an empty one.
fn toml(path: &Path, text: Option<&str>) -> Result<toml_edit::DocumentMut, NodeError> {
    text.unwrap_or_default()
        .parse()
        .map_err(|error| refused(format!("{} is not TOML, so it is left alone: {error}", path.display())))
}
