//! An agent on a host: `darter agent --config`, as it is installed.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use super::client::{Client, Order};
use super::command::{Run, wait_for};
use super::daemon::Daemon;
use super::docker::Route;
use super::netns::Host;
use super::world::World;

/// Where an agent's proxy listens on its host; what clients are configured with.
pub const PROXY: &str = "http://127.0.0.1:65001";

/// The ports that agents use among each other: pieces and tracker calls, and gossip.
pub const PEER_PORTS: [u16; 2] = [15001, 8002];

/// Gossip's port, for discovery.
pub const GOSSIP_PORT: u16 = 8002;

/// The admin port.
pub const ADMIN_PORT: u16 = 15003;

/// How long an agent may take to become ready: discovery's first round may fail for 3 s, and the machine be busy.
const READY_DEADLINE: Duration = Duration::from_secs(40);

/// How long a cluster of a handful may take until all know all.
const CLUSTER_DEADLINE: Duration = Duration::from_secs(30);

/// What agents log, to be shown when a case fails, unless the environment says otherwise.
const LOG_LEVEL: &str = "info";

/// An agent on a host.
#[derive(Debug)]
pub struct Agent {
    /// Where it runs.
    pub host: Host,
    darter: PathBuf,
    dir: PathBuf,
    registry: String,
    config: PathBuf,
    log: PathBuf,
    daemon: Option<Daemon>,
}

/// The registry that agents are told about.
#[derive(Clone, Copy, Debug)]
pub struct Remote<'a> {
    /// Its name in image names.
    pub name: &'a str,
    /// Its certificate authority; None for one that speaks plain HTTP.
    pub ca: Option<&'a Path>,
}

/// A number of agents that know each other through the first, in front of one registry.
#[derive(Debug)]
pub struct Cluster {
    /// The agents; the first is everybody's seed.
    pub agents: Vec<Agent>,
}

impl Cluster {
    /// Starts `count` agents on new hosts `h1`, `h2`, ... and waits until all know all.
    pub async fn start(world: &mut World, remote: Remote<'_>, count: usize, extra: &Value) -> Result<Self> {
        let mut hosts = Vec::new();
        for number in 1..=count {
            hosts.push(world.host(&format!("h{number}")).await?);
        }
        Self::on(world, &hosts, remote, extra).await
    }

    /// Starts an agent on each of these hosts and waits until all know all.
    pub async fn on(world: &World, hosts: &[Host], remote: Remote<'_>, extra: &Value) -> Result<Self> {
        let secret = secret(world).await?;
        let seed = hosts.first().context("a cluster of nobody")?.address;
        let discovery = json!([{"static": {"addresses": [format!("{seed}:{GOSSIP_PORT}")]}}]);
        let mut config = json!({"secret_file": secret, "discovery": discovery});
        merge(&mut config, extra);
        let start = hosts.iter().map(|host| Agent::start(world, host, remote, &config));
        let agents = try_join_all(start).await?;
        let cluster = Self { agents };
        cluster.wait_for_members(hosts.len()).await?;
        Ok(cluster)
    }

    /// Which agents are a blob's home and its stand-bys, in rank, as indices.
    pub async fn homes(&self, digest: &str) -> Result<Vec<usize>> {
        let teller = self.agents.iter().find(|agent| agent.is_running()).context("no agent runs")?;
        let hosts = teller.homes(digest).await?;
        let index = |host| self.agents.iter().position(|agent| agent.host.address == host);
        hosts.into_iter().map(|host| index(host).with_context(|| format!("{host} is no agent"))).collect()
    }

    /// Kills several agents at the same moment; see [`Agent::kill`].
    pub async fn kill(&mut self, victims: &[usize]) -> Result<()> {
        let agents = self.agents.iter_mut().enumerate().filter(|(index, _)| victims.contains(index));
        try_join_all(agents.map(|(_, agent)| agent.kill())).await.map(drop)
    }

    /// Waits until every running agent counts `members`, itself included.
    pub async fn wait_for_members(&self, members: usize) -> Result<()> {
        for agent in self.agents.iter().filter(|agent| agent.is_running()) {
            let all = || async { agent.metrics().await.is_ok_and(|now| now.total("darter_members") == members as u64) };
            wait_for(&format!("{members} members on {}", agent.host.name), CLUSTER_DEADLINE, all).await?;
        }
        Ok(())
    }

    /// What each running agent counts at the moment.
    pub async fn metrics(&self) -> Result<Vec<Metrics>> {
        let mut all = Vec::new();
        for agent in self.agents.iter().filter(|agent| agent.is_running()) {
            all.push(agent.metrics().await?);
        }
        Ok(all)
    }
}

impl Agent {
    /// Makes a hijack authority and a config file for `host`, starts the agent, and waits until it is ready. Keys of
    /// `extra` go on top of what every agent of the lab has.
    pub async fn start(world: &World, host: &Host, remote: Remote<'_>, extra: &Value) -> Result<Self> {
        let mut agent = Self::install(world, host, remote, extra).await?;
        agent.resume().await?;
        Ok(agent)
    }

    /// [`Agent::start`] without starting it.
    pub async fn install(world: &World, host: &Host, remote: Remote<'_>, extra: &Value) -> Result<Self> {
        let dir = world.directory(&format!("{}-agent", host.name))?;
        let darter = world.darter().to_owned();
        Run::new(&darter).args(["gen-ca", "--hosts", remote.name, "--out"]).arg(&dir).output().await?;
        let (scheme, trust) = match remote.ca {
            Some(ca) => ("https", json!({"ca_file": ca})),
            None => ("http", json!({"insecure_http": true})),
        };
        let mut config = json!({
            "node": {"name": host.name, "cluster": "lab", "advertise": host.address.to_string()},
            // A machine with a full disk may still run the lab.
            "cache": {"dir": dir.join("cache"), "min_free": "1%"},
            "registry_mirror": {"remote": format!("{scheme}://{}", remote.name)},
            "hijack": {"cert": dir.join("ca.crt"), "key": dir.join("ca.key"), "hosts": [remote.name]},
            "registries": {remote.name: trust},
        });
        merge(&mut config, extra);
        // JSON is YAML too.
        let file = dir.join("agent.yaml");
        fs::write(&file, config.to_string())?;
        let log = world.log(&format!("{}-agent", host.name));
        let registry = remote.name.to_owned();
        Ok(Self { host: host.clone(), darter, dir, registry, config: file, log, daemon: None })
    }

    /// Starts it, again on the same config and cache, and waits until it is ready.
    pub async fn resume(&mut self) -> Result<()> {
        self.launch()?;
        let ready = || async { self.admin("/readyz").output().await.is_ok() };
        let result = wait_for(&format!("the agent on {}", self.host.name), READY_DEADLINE, ready).await;
        if let Some(daemon) = &mut self.daemon {
            daemon.check()?;
        }
        result
    }

    /// Starts its process and waits for nothing.
    pub fn launch(&mut self) -> Result<()> {
        ensure!(self.daemon.is_none(), "{} runs already", self.host.name);
        let run = self.host.run(self.darter.to_str().context("the path of darter is not UTF-8")?);
        let run = run
            .args(["agent", "--config"])
            .arg(&self.config)
            .env("DARTER_LOG", std::env::var("DARTER_LOG").as_deref().unwrap_or(LOG_LEVEL));
        self.daemon = Some(Daemon::start(&format!("{}-agent", self.host.name), run, &self.log)?);
        Ok(())
    }

    /// SIGKILL: no leave, no drain.
    pub async fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("the agent does not run")?.kill().await
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop(&mut self) -> Result<()> {
        self.daemon.take().context("the agent does not run")?.stop().await
    }

    /// Freezes it (SIGSTOP) or lets it go on (SIGCONT).
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        self.daemon.as_ref().context("the agent does not run")?.signal(signal)
    }

    /// Whether it was started and not ended by the lab.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.daemon.is_some()
    }

    /// The program that it is.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.darter
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Its process.
    pub fn pid(&self) -> Result<Pid> {
        Ok(self.daemon.as_ref().context("the agent does not run")?.pid())
    }

    /// Whether its gossip socket is open.
    pub fn gossips(&self) -> Result<bool> {
        // The sockets of the process's network namespace, which is the host's.
        let sockets = fs::read_to_string(format!("/proc/{}/net/udp", self.pid()?.as_raw_nonzero()))?;
        let port = format!(":{GOSSIP_PORT:04X}");
        Ok(sockets.lines().filter_map(|line| line.split_whitespace().nth(1)).any(|local| local.ends_with(&port)))
    }

    /// How a client on this host goes through the agent.
    #[must_use]
    pub fn route<'a>(&'a self, ca: &'a Path) -> Route<'a> {
        Route { registry: &self.registry, ca, proxy: Some(PROXY) }
    }

    /// The hijack authority's certificate, which clients on this host trust.
    #[must_use]
    pub fn hijack_ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// A whole pull through this agent as a mirror, by a client that notices how it is served; see [`super::client`].
    pub fn client(&self, manifest: &str) -> Result<Client> {
        Client::new(&self.host, &Order::new(&self.registry, manifest))
    }

    /// Whether a blob is complete in its cache.
    #[must_use]
    pub fn has_published(&self, digest: &str) -> bool {
        let (algorithm, hex) = digest.split_once(':').unwrap_or_default();
        let shard = hex.get(..2).unwrap_or_default();
        self.dir.join("cache/blobs").join(algorithm).join(shard).join(hex).is_file()
    }

    /// `curl` of a blob from this agent as a mirror, into `file`; it fails unless all of it came.
    #[must_use]
    pub fn curl_mirrored(&self, digest: &str, file: &Path) -> Run {
        let url = format!("{PROXY}/v2/lab/image/blobs/{digest}?ns={}", self.registry);
        self.host.run("curl").args(["-sS", "--fail", "--output"]).arg(file).arg(url)
    }

    /// `curl` through this agent as a proxy, as docker does it.
    #[must_use]
    pub fn curl_proxied(&self) -> Run {
        let run = self.host.run("curl").args(["-sS", "--max-time", "60", "--proxy", PROXY, "--cacert"]);
        run.arg(self.hijack_ca())
    }

    /// What it counts at the moment.
    pub async fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.admin("/metrics").output().await?))
    }

    /// The hosts of a blob's home and its stand-bys in rank, by this agent's word.
    pub async fn homes(&self, digest: &str) -> Result<Vec<Ipv4Addr>> {
        let json = self.admin(&format!("/api/v1/homes?digest={digest}")).output().await?;
        let homes: Vec<SocketAddrV4> = serde_json::from_str(&json)?;
        Ok(homes.into_iter().map(|address| *address.ip()).collect())
    }

    fn admin(&self, path: &str) -> Run {
        self.host.run("curl").args([
            "-sS",
            "--fail",
            "--max-time",
            "5",
            &format!("http://127.0.0.1:{ADMIN_PORT}{path}"),
        ])
    }
}

/// An agent's counters at one moment.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// By name, summed over all labels.
    totals: BTreeMap<String, f64>,
}

impl Metrics {
    /// Reads the text format of Prometheus.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut totals = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            // Labels may hold blanks, values do not; timestamps are not used.
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let name = series.split('{').next().unwrap_or(series);
            *totals.entry(name.to_owned()).or_insert(0.0) += value.parse::<f64>().unwrap_or(0.0);
        }
        Self { totals }
    }

    /// A counter's or gauge's value, summed over its labels; 0 where nothing was counted.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn total(&self, name: &str) -> u64 {
        self.totals.get(name).copied().unwrap_or(0.0) as u64
    }

    /// Piece bytes received from peers.
    #[must_use]
    pub fn from_peers(&self) -> u64 {
        self.total("darter_peer_received_bytes_total")
    }

    /// Blob bytes received from the registry.
    #[must_use]
    pub fn from_registry(&self) -> u64 {
        self.total("darter_registry_received_bytes_total")
    }

    /// Piece bytes sent to peers.
    #[must_use]
    pub fn to_peers(&self) -> u64 {
        self.total("darter_peer_sent_bytes_total")
    }

    /// How often the swarm was given up on.
    #[must_use]
    pub fn fallbacks(&self) -> u64 {
        self.total("darter_fallbacks_total")
    }
}

/// Makes the secret of a cluster; one per world.
pub async fn secret(world: &World) -> Result<PathBuf> {
    let path = world.directory("cluster")?.join("secret");
    let line = Run::new(world.darter()).arg("secret").output().await?;
    write_private(&path, &line)?;
    Ok(path)
}

/// Puts the keys of `extra` over those of `config`, one level deep.
fn merge(config: &mut Value, extra: &Value) {
    if let (Some(config), Some(extra)) = (config.as_object_mut(), extra.as_object()) {
        config.extend(extra.clone());
    }
}

/// Writes a file that only its owner may read.
fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes()).context("cannot write")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_their_labels() {
        let text = "# HELP x y\n# TYPE x counter\na_total{r=\"b c\"} 3\na_total{r=\"d\"} 4\nb 1\n# EOF\n";
        let metrics = Metrics::parse(text);
        assert_eq!((metrics.total("a_total"), metrics.total("b"), metrics.total("c")), (7, 1, 0));
    }
}
