//! A host's own /etc, for programs whose paths cannot be told to them: container runtimes, and `darter node configure`,
//! which writes what they read.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::agent::Agent;
use super::command::Run;
use super::netns::Host;
use super::world::World;

/// What every program needs of the machine's own: users, names, libraries, certificates, Debian's choice of programs.
const COPIED: [&str; 8] =
    ["passwd", "group", "nsswitch.conf", "hosts", "resolv.conf", "ld.so.cache", "ssl", "alternatives"];

/// Mounts the first argument on /etc, and runs the rest there.
const ENTER: &str = r#"mount --bind "$1" /etc && shift && exec "$@""#;

/// What runtimes themselves write there: dockerd its identity, podman locks of its networks.
const OWN: [&str; 3] = ["docker/key.json", "cni/net.d/cni.lock", "containers/networks/netavark.lock"];

/// All files, by path without /etc.
pub type Files = BTreeMap<PathBuf, Vec<u8>>;

/// A folder that stands for /etc.
#[derive(Clone, Debug)]
pub struct Etc {
    host: Host,
    dir: PathBuf,
}

impl Etc {
    /// An /etc for `host` with nothing of any container runtime in it.
    pub async fn new(world: &World, host: &Host) -> Result<Self> {
        let dir = world.directory(&format!("{}-etc", host.name))?;
        for name in COPIED {
            let own = Path::new("/etc").join(name);
            if own.exists() {
                Run::new("cp").args(["-aT", "--"]).arg(own).arg(dir.join(name)).output().await?;
            }
        }
        Ok(Self { host: host.clone(), dir })
    }

    /// Writes a file, by its path without /etc.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.dir.join(path);
        fs::create_dir_all(path.parent().context("a file in no folder")?)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads a file, by its path without /etc.
    pub fn read(&self, path: &str) -> Result<String> {
        fs::read_to_string(self.dir.join(path)).with_context(|| format!("cannot read /etc/{path}"))
    }

    /// Every file there is, but for what runtimes write themselves.
    pub fn files(&self) -> Result<Files> {
        let (mut files, mut folders) = (Files::new(), vec![self.dir.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let path = entry?.path();
                if path.is_symlink() {
                    continue;
                }
                if path.is_dir() {
                    folders.push(path);
                } else if !OWN.iter().any(|own| path.ends_with(own)) {
                    files.insert(path.strip_prefix(&self.dir)?.to_owned(), fs::read(&path)?);
                }
            }
        }
        Ok(files)
    }

    /// A program on this host, which sees this /etc.
    #[must_use]
    pub fn run(&self, program: &str) -> Run {
        let isolated = self.host.run("unshare").args(["--mount", "--propagation", "private", "sh", "-c", ENTER, "sh"]);
        isolated.arg(&self.dir).arg(program)
    }

    /// `darter node configure` for this host's agent, as an operator goes about it: too early, while no agent runs, then in
    /// earnest, then once more. Checks that the first changes nothing, and neither does the last.
    pub async fn configure(&self, agent: &mut Agent, runtime: &str, probe: &str) -> Result<()> {
        let before = self.files()?;
        agent.stop().await?;
        let refused = self.node_configure(agent, &["--runtime", runtime])?.finish().await?;
        ensure!(refused.code != 0, "configured without an agent: {}", refused.stdout);
        ensure!(refused.stderr.contains("the probe failed"), "refused for another reason: {}", refused.stderr);
        ensure!(self.files()? == before, "something was written though the probe failed");

        agent.resume().await?;
        let told = self.node_configure(agent, &["--runtime", runtime, "--probe", probe])?.output().await?;
        ensure!(told.contains("written "), "nothing was written: {told}");
        let configured = self.files()?;
        let told = self.node_configure(agent, &["--runtime", runtime, "--probe", probe])?.output().await?;
        ensure!(told.contains("unchanged ") && !told.contains("written "), "written twice: {told}");
        ensure!(self.files()? == configured, "the second time something was changed");
        Ok(())
    }

    /// `darter node configure --undo`; checks that everything is as it was.
    pub async fn undo(&self, agent: &Agent, runtime: &str, before: &Files) -> Result<()> {
        self.node_configure(agent, &["--runtime", runtime, "--undo"])?.output().await?;
        let now = self.files()?;
        let differ = now.iter().filter(|(path, bytes)| before.get(*path) != Some(bytes)).map(|(path, _)| path);
        let missing = before.keys().filter(|path| !now.contains_key(*path));
        let odd: Vec<_> = differ.chain(missing).collect();
        ensure!(odd.is_empty(), "after --undo these are not as they were: {odd:?}");
        Ok(())
    }

    fn node_configure(&self, agent: &Agent, args: &[&str]) -> Result<Run> {
        let darter = agent.program().to_str().context("the path of darter is not UTF-8")?;
        Ok(self.run(darter).args(["node", "configure", "--config"]).arg(agent.config()).args(args))
    }
}
