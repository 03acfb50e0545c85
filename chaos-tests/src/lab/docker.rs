//! A docker daemon of a host's own, and the docker command against it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::command::{Run, wait_for};
use super::daemon::Daemon;
use super::etc::Etc;
use super::image::Image;
use super::netns::Host;
use super::world::World;

/// How long dockerd, which starts a containerd first, may take to answer.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// How long a pull may take, on a machine that runs several at once.
pub(super) const PULL_DEADLINE: Duration = Duration::from_secs(180);

/// How long a container may take to print its few lines.
pub(super) const RUN_DEADLINE: Duration = Duration::from_secs(60);

/// The daemon's own client where there is one: a newer one elsewhere on the PATH may refuse Debian's old daemon.
const CLIENTS: [&str; 2] = ["/usr/bin/docker", "docker"];

/// Where systemd looks for what is added to docker's unit, below /etc.
const DROP_INS: &str = "systemd/system/docker.service.d";

/// How a client reaches the registry.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    /// The registry's name in image names.
    pub registry: &'a str,
    /// The certificate authority to trust for it: the registry's own, or the local agent's.
    pub ca: &'a Path,
    /// Value of `HTTPS_PROXY`, if any.
    pub proxy: Option<&'a str>,
}

/// A docker daemon. Its whole configuration is the proxy and the certificate authority, or what an /etc of its own says.
#[derive(Debug)]
pub struct Docker {
    socket: String,
    home: std::path::PathBuf,
    daemon: Daemon,
}

impl Docker {
    /// Starts a daemon on `host` and waits until it answers.
    pub async fn start(world: &World, host: &Host, route: Route<'_>) -> Result<Self> {
        let run = host.run_trusting(route.registry, route.ca, "dockerd");
        let run = match route.proxy {
            Some(proxy) => run.env("HTTPS_PROXY", proxy),
            None => run,
        };
        Self::launch(world, host, run).await
    }

    /// Starts a daemon on `host` that is configured by `etc`, the environment in drop-ins of its unit included.
    pub async fn start_configured(world: &World, host: &Host, etc: &Etc) -> Result<Self> {
        let mut run = etc.run("dockerd");
        for (path, bytes) in etc.files()?.iter().filter(|(path, _)| path.starts_with(DROP_INS)) {
            let text = std::str::from_utf8(bytes).with_context(|| format!("{} is no text", path.display()))?;
            let lines = text.lines().filter_map(|line| line.strip_prefix("Environment=\"")?.strip_suffix('"'));
            run = lines.filter_map(|line| line.split_once('=')).fold(run, |run, (name, value)| run.env(name, value));
        }
        Self::launch(world, host, run).await
    }

    async fn launch(world: &World, host: &Host, run: Run) -> Result<Self> {
        let name = format!("{}-docker", host.name);
        let dir = world.directory(&name)?;
        let socket = format!("unix://{}", dir.join("sock").display());
        let run = run
            .arg("--data-root")
            .arg(dir.join("data"))
            .arg("--exec-root")
            .arg(dir.join("exec"))
            .args(["-H", &socket, "-p"])
            .arg(dir.join("pid"))
            .args(["--iptables=false", "--ip6tables=false", "--bridge=none"]);
        let daemon = Daemon::start(&name, run, &world.log(&name))?;
        let mut docker = Self { socket, home: dir, daemon };
        let answers = || async { docker.command(["version"]).output().await.is_ok() };
        let started = wait_for(&name, START_DEADLINE, answers).await;
        docker.daemon.check()?;
        started.map(|()| docker)
    }

    /// `docker pull`.
    pub async fn pull(&self, image: &str) -> Result<()> {
        self.command(["pull", "--quiet", image]).within(PULL_DEADLINE).output().await.map(drop)
    }

    /// Checks that what was pulled is `image`, and that a container of it prints what it should.
    pub async fn verify(&self, name: &str, image: &Image) -> Result<()> {
        let id = self.command(["image", "inspect", "--format", "{{.Id}}", name]).output().await?;
        ensure!(id.trim() == image.id, "docker has image {}, pushed was {}", id.trim(), image.id);
        let run = self.command(["run", "--rm", "--network", "none", name]).within(RUN_DEADLINE);
        let printed = run.output().await?;
        ensure!(printed == image.prints, "the container printed {printed:?} instead of {:?}", image.prints);
        Ok(())
    }

    /// Removes the image, so that the next pull is cold for docker.
    pub async fn forget(&self, image: &str) -> Result<()> {
        self.command(["image", "rm", "--force", image]).output().await.map(drop)
    }

    /// Ends the daemon.
    pub async fn stop(self) -> Result<()> {
        self.daemon.stop().await
    }

    fn command<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Run {
        let client = CLIENTS.into_iter().find(|client| Path::new(client).is_file()).unwrap_or("docker");
        Run::new(client).env("HOME", &self.home).args(["-H", &self.socket]).args(args)
    }
}
