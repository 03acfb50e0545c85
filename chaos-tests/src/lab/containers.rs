//! podman and buildah: clients without a daemon, which read registries as CRI-O does.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::command::Run;
use super::docker::{PULL_DEADLINE, RUN_DEADLINE};
use super::etc::Etc;
use super::image::Image;
use super::netns::Host;
use super::world::World;

/// Images of whatever origin are taken: who signed them is nobody's business here.
const POLICY: &str = r#"{"default": [{"type": "insecureAcceptAnything"}]}"#;

/// podman raises these otherwise, which a lab inside a container may not.
const LIMITS: [&str; 2] = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"];

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `podman`.
    Podman,
    /// `buildah`.
    Buildah,
}

/// One of the two with a storage of its own, on a host with an /etc of its own.
#[derive(Debug)]
pub struct Containers {
    tool: Tool,
    etc: Etc,
    dir: PathBuf,
}

impl Tool {
    fn program(self) -> &'static str {
        match self {
            Self::Podman => "podman",
            Self::Buildah => "buildah",
        }
    }
}

impl Containers {
    /// Nothing is started. Registries are what `etc` says.
    pub fn new(world: &World, host: &Host, etc: &Etc, tool: Tool) -> Result<Self> {
        etc.write("containers/policy.json", POLICY)?;
        let dir = world.directory(&format!("{}-{}", host.name, tool.program()))?;
        Ok(Self { tool, etc: etc.clone(), dir })
    }

    /// `podman pull`, `buildah pull`.
    pub async fn pull(&self, name: &str) -> Result<()> {
        self.run().args(["pull", "--quiet", name]).within(PULL_DEADLINE).output().await.map(drop)
    }

    /// Checks that what was pulled is `image`; with podman also that a container of it prints what it should.
    pub async fn verify(&self, name: &str, image: &Image) -> Result<()> {
        let inspect = match self.tool {
            Tool::Podman => ["image", "inspect", "--format", "sha256:{{.Id}}", name],
            Tool::Buildah => ["inspect", "--type=image", "--format", "{{.FromImageID}}", name],
        };
        let id = self.run().args(inspect).output().await?;
        let id = id.trim().trim_start_matches("sha256:");
        ensure!(image.id == format!("sha256:{id}"), "{:?} has image {id}, pushed was {}", self.tool, image.id);
        if self.tool == Tool::Podman {
            let run = self.run().args(["--cgroup-manager=cgroupfs", "run", "--rm", "--network=none"]).args(LIMITS);
            let printed = run.arg(name).within(RUN_DEADLINE).output().await?;
            ensure!(printed == image.prints, "the container printed {printed:?} instead of {:?}", image.prints);
        }
        Ok(())
    }

    /// Removes the image, so that the next pull is cold.
    pub async fn forget(&self, name: &str) -> Result<()> {
        self.run().args(["rmi", "--force", name]).output().await.map(drop)
    }

    fn run(&self) -> Run {
        let run = self.etc.run(self.tool.program()).env("HOME", &self.dir).env("TMPDIR", &self.dir);
        let run = run.env("XDG_RUNTIME_DIR", &self.dir).arg("--root").arg(self.dir.join("root"));
        let run = run.arg("--runroot").arg(self.dir.join("run")).args(["--storage-driver", "overlay"]);
        match self.tool {
            // What it keeps besides images would be the machine's otherwise.
            Tool::Podman => run.arg("--tmpdir").arg(self.dir.join("tmp")).args(["--runtime", "runc"]),
            Tool::Buildah => run,
        }
    }
}
