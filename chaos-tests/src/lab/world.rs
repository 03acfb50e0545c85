//! What one case lives in: a network and a directory, both gone afterwards.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::netns::{self, Host, Network};

/// All names of all labs begin with this, then the process id.
const PREFIX: &str = "dt-";

/// A Unix socket's path holds 107 bytes; dockerd appends up to 60 of its own to the directory that it is given.
const DIRECTORY_MAX_BYTES: usize = 40;

/// A file that says that a directory is a lab's, so that no other of a similar name is ever removed.
const MARK: &str = ".darter-lab";

/// A network, a directory, and the binary under test.
#[derive(Debug)]
pub struct World {
    dir: PathBuf,
    network: Network,
    darter: PathBuf,
}

impl World {
    /// An empty world. `darter` is the agent's binary, `congestion` what its hosts regulate TCP by ([`Network::new`]).
    pub async fn new(darter: &Path, congestion: &str) -> Result<Self> {
        let prefix = format!("{PREFIX}{}", std::process::id());
        let dir = std::env::temp_dir().join(&prefix);
        ensure!(dir.as_os_str().len() <= DIRECTORY_MAX_BYTES, "{} is too long for sockets: set TMPDIR", dir.display());
        std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        std::fs::write(dir.join(MARK), "")?;
        let network = Network::new(&prefix, congestion).await?;
        Ok(Self { dir, network, darter: darter.to_owned() })
    }

    /// Plugs in another host.
    pub async fn host(&mut self, name: &str) -> Result<Host> {
        self.network.host(name).await
    }

    /// A new directory for `name`.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }

    /// The log of the daemon `name`.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// The agent's binary.
    #[must_use]
    pub fn darter(&self) -> &Path {
        &self.darter
    }
}

/// Paths of the logs that this process's world holds at the moment.
#[must_use]
pub fn logs() -> Vec<PathBuf> {
    let dir = std::env::temp_dir().join(format!("{PREFIX}{}", std::process::id()));
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut logs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.sort();
    logs
}

/// Removes what this process's world consists of, however far it got, and whatever still runs in it.
pub async fn remove() -> Result<()> {
    remove_of(std::process::id()).await
}

/// Removes what labs left behind whose process is gone, as after `kill -9`.
pub async fn remove_abandoned() -> Result<()> {
    let mut names = netns::existing(PREFIX);
    if let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) {
        let entries = entries.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.path().join(MARK).is_file()));
        names.extend(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()));
    }
    let owners = names.iter().filter_map(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok());
    let owners: std::collections::BTreeSet<u32> = owners.collect();
    for owner in owners {
        if !Path::new(&format!("/proc/{owner}")).exists() {
            remove_of(owner).await?;
        }
    }
    Ok(())
}

async fn remove_of(owner: u32) -> Result<()> {
    // With the dash, so that process 12 does not clear up after process 123.
    let network = netns::remove_all(&format!("{PREFIX}{owner}-")).await;
    let dir = std::env::temp_dir().join(format!("{PREFIX}{owner}"));
    let files = if dir.join(MARK).is_file() { std::fs::remove_dir_all(&dir) } else { Ok(()) };
    network?;
    files.with_context(|| format!("cannot remove {}", dir.display()))
}
