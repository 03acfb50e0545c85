//! Runtimes with the files that `darter node configure` writes, and what they do once the agent is gone.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;

use super::stage::{LAYERS_BYTES, Stage, summary};
use crate::lab::agent::PROXY;
use crate::lab::containerd::{self, Containerd};
use crate::lab::containers::{Containers, Tool};
use crate::lab::docker::Docker;
use crate::lab::etc::{Etc, Files};
use crate::lab::registry::Access;
use crate::lab::world::World;

/// Nodes that pull at the same moment.
const NODES: usize = 2;

/// How much longer than a pull from the registry one may take whose agent is dead: nobody waits for an agent that refuses
/// connections. A second for a machine that is busy otherwise, for each of its layers one after the other.
const FALLBACK_LATER_MAX: Duration = Duration::from_secs(5);

/// The examples for another registry.
const SHIPPED: [(&str, &str); 2] = [
    ("50-crio.conf", include_str!("../../../../deploy/node/crio/10-darter.conf")),
    ("51-podman.conf", include_str!("../../../../deploy/node/podman/10-darter.conf")),
];

/// A stage whose hosts have their own /etc, with what its operator had there before.
struct Nodes {
    stage: Stage,
    etcs: Vec<Etc>,
    before: Vec<Files>,
}

impl Nodes {
    /// `prepare` writes what the operator had, given the registry's name and its authority in PEM.
    async fn set(
        world: &mut World,
        greeting: &str,
        prepare: impl Fn(&World, &Etc, &crate::lab::netns::Host, &str, &str) -> Result<()>,
    ) -> Result<Self> {
        let stage = Stage::set(world, Access::Open, NODES, greeting, &LAYERS_BYTES).await?;
        let ca = stage.registry.ca.as_ref().context("a registry without TLS")?;
        let ca = std::fs::read_to_string(ca)?;
        let (mut etcs, mut before) = (Vec::new(), Vec::new());
        for agent in &stage.cluster.agents {
            let etc = Etc::new(world, &agent.host).await?;
            prepare(world, &etc, &agent.host, &stage.registry.name, &ca)?;
            before.push(etc.files()?);
            etcs.push(etc);
        }
        Ok(Self { stage, etcs, before })
    }

    async fn configure(&mut self, runtime: &str) -> Result<()> {
        for (agent, etc) in self.stage.cluster.agents.iter_mut().zip(&self.etcs) {
            etc.configure(agent, runtime, &self.stage.name).await?;
        }
        self.stage.cluster.wait_for_members(NODES).await
    }

    /// Undoes it on the first host.
    async fn undo(&self, runtime: &str) -> Result<()> {
        self.etcs[0].undo(&self.stage.cluster.agents[0], runtime, &self.before[0]).await
    }

    /// Waits for a pull of which nothing goes through an agent; says how long it took.
    async fn direct(&mut self, pull: impl Future<Output = Result<()>>) -> Result<Duration> {
        let before = self.stage.registry.sent().await?;
        let began = Instant::now();
        pull.await?;
        let took = began.elapsed();
        let sent = self.stage.registry.sent_since(before).await?.blob_bytes;
        ensure!(
            sent == self.stage.image.bytes(),
            "{sent} blob bytes came from the registry, the whole image was wanted"
        );
        Ok(took)
    }
}

fn at_once(what: &str, fallback: Duration, direct: Duration) -> Result<()> {
    ensure!(
        fallback <= direct + FALLBACK_LATER_MAX,
        "{what} took {fallback:?} without its agent, and {direct:?} where it was never told of one"
    );
    Ok(())
}

/// containerd: the agent goes in front of what a `hosts.toml` says already, and without it the registry is asked at once.
pub(super) async fn containerd(world: &mut World) -> Result<String> {
    let mut nodes = Nodes::set(world, "configure-containerd", |world, etc, host, registry, ca| {
        etc.write(containerd::CONFIG, &Containerd::config(world, host)?)?;
        etc.write("ssl/lab.crt", ca)?;
        let server = format!("https://{registry}");
        let ours = format!(
            "# ours\nserver = \"{server}\"\n\n[host.\"{server}\"]\ncapabilities = [\"pull\", \"resolve\"]\n\
             ca = \"/etc/ssl/lab.crt\"\n"
        );
        etc.write(&format!("{}/{registry}/hosts.toml", containerd::HOSTS), &ours)
    })
    .await?;
    nodes.configure("containerd").await?;
    let hosts = nodes.etcs[0].read(&format!("{}/{}/hosts.toml", containerd::HOSTS, nodes.stage.registry.name))?;
    ensure!(hosts.contains("# ours\n") && hosts.contains(PROXY), "hosts.toml lost something: {hosts}");

    let mut containerds = Vec::new();
    for (agent, etc) in nodes.stage.cluster.agents.iter().zip(&nodes.etcs) {
        containerds.push(Containerd::start_configured(world, &agent.host, etc).await?);
    }
    let (name, image) = (nodes.stage.name.clone(), nodes.stage.image.clone());
    let before = nodes.stage.registry.sent().await?;
    try_join_all(containerds.iter().map(|containerd| containerd.pull(&name))).await?;
    for containerd in &containerds {
        containerd.verify(&name, &image).await?;
    }
    let cold = nodes.stage.counted_since(before).await?;
    cold.check()?;

    nodes.stage.cluster.agents[0].kill().await?;
    containerds[0].forget(&name).await?;
    let fallback = nodes.direct(containerds[0].pull(&name)).await?;
    containerds[0].verify(&name, &image).await?;
    nodes.undo("containerd").await?;
    containerds[0].forget(&name).await?;
    let direct = nodes.direct(containerds[0].pull(&name)).await?;
    at_once("containerd", fallback, direct)?;
    for containerd in containerds {
        containerd.stop().await?;
    }
    Ok(format!("{}; without its agent {fallback:.1?}, undone {direct:.1?}", summary(&cold)))
}

/// docker: the drop-in and the certificate beside those that are there; without the agent pulls fail until it is undone.
pub(super) async fn docker(world: &mut World) -> Result<String> {
    let mut nodes = Nodes::set(world, "configure-docker", |_, etc, _, registry, ca| {
        etc.write("systemd/system/docker.service.d/ours.conf", "[Service]\nEnvironment=\"NO_PROXY=localhost\"\n")?;
        etc.write("docker/daemon.json", r#"{"log-level": "info"}"#)?;
        etc.write(&format!("docker/certs.d/{registry}/ca.crt"), ca)
    })
    .await?;
    nodes.configure("docker").await?;
    let mut dockers = Vec::new();
    for (agent, etc) in nodes.stage.cluster.agents.iter().zip(&nodes.etcs) {
        dockers.push(Docker::start_configured(world, &agent.host, etc).await?);
    }
    let (name, image) = (nodes.stage.name.clone(), nodes.stage.image.clone());
    let before = nodes.stage.registry.sent().await?;
    try_join_all(dockers.iter().map(|docker| docker.pull(&name))).await?;
    for docker in &dockers {
        docker.verify(&name, &image).await?;
    }
    let cold = nodes.stage.counted_since(before).await?;
    cold.check()?;

    nodes.stage.cluster.agents[0].kill().await?;
    dockers[0].forget(&name).await?;
    ensure!(
        dockers[0].pull(&name).await.is_err(),
        "docker pulls although its proxy is gone: the documentation is wrong"
    );
    nodes.undo("docker").await?;
    dockers.remove(0).stop().await?;
    let undone = Docker::start_configured(world, &nodes.stage.cluster.agents[0].host, &nodes.etcs[0]).await?;
    let direct = nodes.direct(undone.pull(&name)).await?;
    undone.verify(&name, &image).await?;
    for docker in dockers.into_iter().chain([undone]) {
        docker.stop().await?;
    }
    Ok(format!("{}; no pull without its agent, undone {direct:.1?}", summary(&cold)))
}

/// podman and buildah, which read what CRI-O reads: a mirror in a drop-in, and without the agent the registry at once.
pub(super) async fn crio(world: &mut World) -> Result<String> {
    let mut nodes = Nodes::set(world, "configure-crio", |_, etc, _, registry, ca| {
        etc.write("containers/registries.conf", "unqualified-search-registries = [\"docker.io\"]\n")?;
        // Any that cannot be parsed fails every pull.
        for (name, text) in SHIPPED {
            etc.write(&format!("containers/registries.conf.d/{name}"), text)?;
        }
        etc.write(&format!("containers/certs.d/{registry}/ca.crt"), ca)
    })
    .await?;
    let (mut podmans, mut buildahs) = (Vec::new(), Vec::new());
    for (agent, etc) in nodes.stage.cluster.agents.iter().zip(&nodes.etcs) {
        podmans.push(Containers::new(world, &agent.host, etc, Tool::Podman)?);
        buildahs.push(Containers::new(world, &agent.host, etc, Tool::Buildah)?);
    }
    for (before, etc) in nodes.before.iter_mut().zip(&nodes.etcs) {
        *before = etc.files()?;
    }
    nodes.configure("crio").await?;

    let (name, image) = (nodes.stage.name.clone(), nodes.stage.image.clone());
    let before = nodes.stage.registry.sent().await?;
    try_join_all(podmans.iter().map(|podman| podman.pull(&name))).await?;
    let cold = nodes.stage.counted_since(before).await?;
    cold.check()?;
    let before = nodes.stage.registry.sent().await?;
    try_join_all(buildahs.iter().map(|buildah| buildah.pull(&name))).await?;
    let warm = nodes.stage.registry.sent_since(before).await?.blob_bytes;
    ensure!(warm == 0, "buildah took {warm} blob bytes from the registry that podman had taken already");
    for client in podmans.iter().chain(&buildahs) {
        client.verify(&name, &image).await?;
    }

    nodes.stage.cluster.agents[0].kill().await?;
    let mut fallbacks = Vec::new();
    for client in [&podmans[0], &buildahs[0]] {
        client.forget(&name).await?;
        fallbacks.push(nodes.direct(client.pull(&name)).await?);
        client.verify(&name, &image).await?;
    }
    nodes.undo("crio").await?;
    for (client, fallback) in [&podmans[0], &buildahs[0]].into_iter().zip(&fallbacks) {
        client.forget(&name).await?;
        let direct = nodes.direct(client.pull(&name)).await?;
        at_once("a client of CRI-O's kind", *fallback, direct)?;
    }
    Ok(format!("{}; without its agent podman {:.1?}, buildah {:.1?}", summary(&cold), fallbacks[0], fallbacks[1]))
}

/// docker with the agent as `registry-mirrors`: images without a registry's name come from what the agent mirrors.
pub(super) async fn registry_mirrors(world: &mut World) -> Result<String> {
    let nodes = Nodes::set(world, "docker-mirror", |_, etc, _, _, _| {
        etc.write("docker/daemon.json", &serde_json::json!({"registry-mirrors": [PROXY]}).to_string())
    });
    let mut nodes = nodes.await?;
    let mut dockers = Vec::new();
    for (agent, etc) in nodes.stage.cluster.agents.iter().zip(&nodes.etcs) {
        dockers.push(Docker::start_configured(world, &agent.host, etc).await?);
    }
    let (name, image) = ("lab/docker-mirror:latest", nodes.stage.image.clone());
    let before = nodes.stage.registry.sent().await?;
    try_join_all(dockers.iter().map(|docker| docker.pull(name))).await?;
    for docker in &dockers {
        docker.verify(name, &image).await?;
    }
    let cold = nodes.stage.counted_since(before).await?;
    cold.check()?;
    for docker in dockers {
        docker.stop().await?;
    }
    Ok(summary(&cold))
}
