//! Members that find each other through a DNS server, dnsmasq, whose records change while agents run.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use crate::lab::agent::{Agent, Cluster, GOSSIP_PORT, Remote, secret};
use crate::lab::command::wait_for;
use crate::lab::daemon::Daemon;
use crate::lab::netns::Host;
use crate::lab::world::World;

/// How long the records live, in seconds.
const TTL: u64 = 2;

/// What is promised: a change is acted on so long after the records of before have run out.
const ACTED_ON: Duration = Duration::from_secs(1);

/// How long the server may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// How long agents may take to find a server that was not there when they started: they ask every 5 s at most.
const FOUND_DEADLINE: Duration = Duration::from_secs(20);

/// A service, with SRV records, and a name that has only addresses.
const SERVICE: &str = "darter.lab";
const NAME: &str = "seeds.lab";

/// An address of the lab's network that no host has.
const NOBODY: &str = "10.77.0.250";

/// The registry that agents are told about; nobody pulls.
const REMOTE: Remote<'_> = Remote { name: "registry.lab", ca: None };

/// The server, and the files that it serves from.
struct Server<'a> {
    world: &'a World,
    host: Host,
    daemon: Option<Daemon>,
}

impl<'a> Server<'a> {
    /// Says where the service is; dnsmasq reads that only as it starts.
    async fn serve(&mut self, address: &str) -> Result<()> {
        if let Some(daemon) = self.daemon.take() {
            daemon.stop().await?;
        }
        let dir = self.world.directory("dnsmasq")?;
        let config = dir.join("dnsmasq.conf");
        let lines = [
            "no-resolv".to_owned(),
            "no-hosts".to_owned(),
            "local=/lab/".to_owned(),
            "bind-interfaces".to_owned(),
            "user=root".to_owned(),
            "pid-file".to_owned(),
            format!("listen-address={}", self.host.address),
            format!("local-ttl={TTL}"),
            format!("addn-hosts={}", dir.join("hosts").display()),
            format!("host-record=one.{SERVICE},{address}"),
            format!("srv-host=_gossip._udp.{SERVICE},one.{SERVICE},{GOSSIP_PORT}"),
        ];
        fs::write(&config, lines.join("\n") + "\n")?;
        let run = self.host.run("dnsmasq").arg("--keep-in-foreground").arg(format!("--conf-file={}", config.display()));
        self.daemon = Some(Daemon::start("dnsmasq", run, &self.world.log("dnsmasq"))?);
        Ok(())
    }

    /// Says where the name is; dnsmasq reads that again when told to.
    fn name(&self, address: &str) -> Result<()> {
        fs::write(self.world.directory("dnsmasq")?.join("hosts"), format!("{address} {NAME}\n"))?;
        self.daemon.as_ref().map_or(Ok(()), |daemon| daemon.signal(Signal::HUP))
    }
}

/// Two agents look for the others by SRV, one by addresses; the records lead nowhere at first, then to the first agent.
pub(super) async fn dns(world: &mut World) -> Result<String> {
    let name_server = world.host("dns").await?;
    let mut hosts = Vec::new();
    for name in ["h1", "h2", "h3"] {
        hosts.push(world.host(name).await?);
    }
    let world = &*world;
    let secret = secret(world).await?;
    let mut cluster = Cluster { agents: Vec::new() };
    for (host, name) in hosts.iter().zip([SERVICE, SERVICE, NAME]) {
        let dns = json!({"name": name, "servers": [name_server.address.to_string()]});
        let config = json!({"secret_file": secret, "discovery": [{"dns": dns}]});
        // Each is ready although nobody answers.
        cluster.agents.push(Agent::start(world, host, REMOTE, &config).await?);
    }
    cluster.wait_for_members(1).await?;

    let first = hosts.first().context("there is one")?.address.to_string();
    let mut server = Server { world, host: name_server, daemon: None };
    server.name(NOBODY)?;
    server.serve(NOBODY).await?;
    for agent in &cluster.agents {
        seeds(agent, 1, FOUND_DEADLINE).await?;
    }

    let start = Instant::now();
    server.name(&first)?;
    let by_address = members(&cluster.agents[2], 2, start).await?;
    let start = Instant::now();
    server.serve(&first).await?;
    let by_service = members(&cluster.agents[1], 3, start).await?;
    cluster.wait_for_members(3).await?;
    let limit = Duration::from_secs(TTL) + ACTED_ON;
    ensure!(by_address <= limit && by_service <= limit, "joined after {by_address:?} and {by_service:?}");

    // What was found outlives the server.
    if let Some(daemon) = server.daemon.take() {
        daemon.stop().await?;
    }
    let lost = || async { seeds(&cluster.agents[2], 0, Duration::ZERO).await.is_ok() };
    let kept = wait_for("the seeds to be forgotten", Duration::from_secs(2 * TTL) + ACTED_ON, lost).await.is_err();
    ensure!(kept, "an agent forgot its seeds when the server went");
    Ok(format!(
        "TTL {TTL} s: joined {:.1} s after an address changed, {:.1} s after a service did",
        by_address.as_secs_f64(),
        by_service.as_secs_f64()
    ))
}

/// Waits until an agent has found so many seeds.
async fn seeds(agent: &Agent, count: u64, deadline: Duration) -> Result<()> {
    let found = || async { agent.metrics().await.is_ok_and(|now| now.total("darter_seeds") == count) };
    wait_for(&format!("{count} seeds on {}", agent.host.name), deadline, found).await
}

/// Waits until an agent counts so many members; gives the time since `start`.
async fn members(agent: &Agent, count: u64, start: Instant) -> Result<Duration> {
    let joined = || async { agent.metrics().await.is_ok_and(|now| now.total("darter_members") >= count) };
    wait_for(&format!("{count} members on {}", agent.host.name), ANSWER_DEADLINE, joined).await?;
    Ok(start.elapsed())
}
