//! A containerd of a host's own, and `ctr` against it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::command::{Run, wait_for};
use super::daemon::Daemon;
use super::docker::{PULL_DEADLINE, RUN_DEADLINE};
use super::etc::Etc;
use super::image::Image;
use super::netns::Host;
use super::world::World;

/// How long containerd may take to answer.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Its configuration, below /etc.
pub const CONFIG: &str = "containerd/config.toml";

/// The registries' folders, below /etc.
pub const HOSTS: &str = "containerd/certs.d";

/// A containerd.
#[derive(Debug)]
pub struct Containerd {
    etc: Etc,
    dir: PathBuf,
    daemon: Daemon,
}

impl Containerd {
    /// Starts one on `host` whose images of `registry` come from `mirror`, which is asked with `?ns=`. Without `ca` the
    /// registry itself is not trusted, so that a pull which goes around the mirror fails.
    pub async fn start(world: &World, host: &Host, registry: &str, mirror: &str, ca: Option<&Path>) -> Result<Self> {
        let etc = Etc::new(world, host).await?;
        etc.write(CONFIG, &Self::config(world, host)?)?;
        let trust = ca.map(|ca| format!("ca = {:?}\n", ca.display().to_string())).unwrap_or_default();
        let mirror = format!(
            "server = \"https://{registry}\"\n[host.\"{mirror}\"]\ncapabilities = [\"pull\", \"resolve\"]\n{trust}"
        );
        etc.write(&format!("{HOSTS}/{registry}/hosts.toml"), &mirror)?;
        Self::start_configured(world, host, &etc).await
    }

    /// What its `config.toml` has to say so that it gets in the way of no other containerd of the machine.
    pub fn config(world: &World, host: &Host) -> Result<String> {
        let dir = world.directory(&format!("{}-containerd", host.name))?;
        let path = |file: &str| serde_json::Value::from(dir.join(file).to_string_lossy().into_owned());
        // A JSON string is a TOML string as well.
        Ok(format!(
            "version = 2\nroot = {}\nstate = {}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {}\n[ttrpc]\naddress = {}\n\
             [plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/{HOSTS}\"\n",
            path("root"),
            path("state"),
            path("sock"),
            path("ttrpc")
        ))
    }

    /// Starts one on `host` that is configured by `etc`, which has [`Containerd::config`] as [`CONFIG`].
    pub async fn start_configured(world: &World, host: &Host, etc: &Etc) -> Result<Self> {
        let name = format!("{}-containerd", host.name);
        let dir = world.directory(&name)?;
        let daemon = Daemon::start(&name, etc.run("containerd"), &world.log(&name))?;
        let mut containerd = Self { etc: etc.clone(), dir, daemon };
        let answers = || async { containerd.ctr(["version"]).output().await.is_ok() };
        let started = wait_for(&name, START_DEADLINE, answers).await;
        containerd.daemon.check()?;
        started.map(|()| containerd)
    }

    /// `ctr images pull --hosts-dir`.
    pub async fn pull(&self, image: &str) -> Result<()> {
        let pull = self.ctr(["images", "pull", "--hosts-dir", &format!("/etc/{HOSTS}"), image]);
        pull.within(PULL_DEADLINE).output().await.map(drop)
    }

    /// Checks that what was pulled is `image`, and that a container of it prints what it should.
    pub async fn verify(&self, name: &str, image: &Image) -> Result<()> {
        let list = self.ctr(["images", "list", &format!("name=={name}")]).output().await?;
        let line = list.lines().find(|line| line.starts_with(name)).context("ctr does not list the image")?;
        ensure!(line.contains(&image.manifest), "containerd has {line:?}, pushed was {}", image.manifest);
        let run = self.ctr(["run", "--rm", "--fifo-dir"]).arg(self.dir.join("fifo")).args([name, "lab"]);
        let printed = run.within(RUN_DEADLINE).output().await?;
        ensure!(printed == image.prints, "the container printed {printed:?} instead of {:?}", image.prints);
        Ok(())
    }

    /// Removes the image and what only it needs, so that the next pull is cold for containerd.
    pub async fn forget(&self, image: &str) -> Result<()> {
        self.ctr(["images", "remove", "--sync", image]).output().await.map(drop)
    }

    /// Ends the daemon.
    pub async fn stop(self) -> Result<()> {
        self.daemon.stop().await
    }

    /// `ctr` fetches by itself, so it runs inside the host.
    fn ctr<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Run {
        self.etc.run("ctr").arg("--address").arg(self.dir.join("sock")).args(args)
    }
}
