//! Fifty agents on one machine: they meet, one dies and comes back, the network falls in two and heals. And all of them pull
//! one blob at the same moment, which is a case of its own, since it takes a machine that does nothing else.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::json;

use super::crowd::Crowd;
use crate::lab::agent::{Agent, Cluster, GOSSIP_PORT, Remote, secret};
use crate::lab::command::wait_for;
use crate::lab::cpu::Ticks;
use crate::lab::image::Image;
use crate::lab::netns::Host;
use crate::lab::watch::Watch;
use crate::lab::world::World;

/// Agents.
const NODES: usize = 50;

/// The one that is killed: neither the seed nor next to it.
const VICTIM: usize = 25;

/// The image's one layer of noise.
const LAYER_BYTES: usize = (32 << 20) + 4321;

/// How long until all processes have their gossip socket: two cores start fifty at once, and may have other work.
const LISTENING_DEADLINE: Duration = Duration::from_secs(60);

/// What is promised: all know all so long after the last of them has its gossip socket.
const COLD_START_MAX: Duration = Duration::from_secs(3);

/// What is promised: everybody knows of a death so long after it.
const DEATH_KNOWN_MAX: Duration = Duration::from_secs(12);

/// A process that is started again knocks at those that it knew; it has its own start to do before.
const RETURN_MAX: Duration = Duration::from_secs(12);

/// How long the network stays split at the most. Each half has declared the other dead within a few probes of every
/// member, one a second, and the five seconds in which a suspicion may be refuted.
const SPLIT_MAX: Duration = Duration::from_secs(90);

/// What is promised: all know all so long after the network is whole again.
const HEALED_MAX: Duration = Duration::from_secs(30);

/// Every link during the pull, in each direction, the origin's too. Without a limit, or with 10 Mb/s beside other work, fifty
/// agents and clients on two cores are not a network but a queue for the cores: pieces come so late that agents turn to the
/// origin, as they should then.
const MEGABITS: u32 = 5;

/// What the origin may send, over the image.
const ORIGIN_SHARE_MAX: f64 = 1.05;

/// The registry that agents are told about where nobody pulls.
const REMOTE: Remote<'_> = Remote { name: "registry.lab", ca: None };

/// How long the start took: from the first process until all have a gossip socket, and from then until all know all.
struct ColdStart {
    listening: Duration,
    known: Duration,
}

/// They meet, lose one, part and meet again, without a pull. See the constants for what is promised.
pub(super) async fn fifty(world: &mut World) -> Result<String> {
    let watch = Watch::new(world).await?;
    let mut cluster = install(world).await?;
    let cold = cold_start(&mut cluster, &watch).await?;
    let (death, back) = die_and_return(&mut cluster, &watch).await?;
    let (parted, healed) = part_and_heal(&cluster, &watch).await?;
    Ok(format!(
        "{NODES} agents: all known {:.1} s after the last gossip socket (which came {:.1} s after the first process); a \
         death known to all after {:.1} s, its return after {:.1} s; halves declared dead after {:.1} s, all known again \
         {:.1} s after the split",
        cold.known.as_secs_f64(),
        cold.listening.as_secs_f64(),
        death.as_secs_f64(),
        back.as_secs_f64(),
        parted.as_secs_f64(),
        healed.as_secs_f64(),
    ))
}

/// A client on every node pulls, at the same moment, and the registry sends little more than one copy.
pub(super) async fn one_blob(world: &mut World) -> Result<String> {
    let image = Image::build(&world.directory("image")?, "fifty", &[LAYER_BYTES])?;
    let crowd = Crowd::gather(world, NODES, MEGABITS, &image).await?;
    let ticks = Ticks::now()?;
    let mut pulls = crowd.pull(&image)?;
    pulls.finish(|_| true).await?;
    let busy = ticks.busy_since()? * 100.0;
    let share = crowd.origin_share(&image).await?;
    let (_, again) = crowd.origin_work(&image).await?;
    let mib = image.bytes() >> 20;
    let figures = format!(
        "{NODES} clients pulled {mib} MiB at {MEGABITS} Mb/s: origin {share:.3} x the image, {again} bytes of it again; {}; \
         cores {busy:.0} % busy",
        pulls.served(|_| true)?
    );
    ensure!(share <= ORIGIN_SHARE_MAX, "the origin sent more than {ORIGIN_SHARE_MAX} x the image: {figures}");
    Ok(figures)
}

/// Agents that have nothing in their discovery but the first one's address, and do not run yet.
async fn install(world: &mut World) -> Result<Cluster> {
    let mut hosts = Vec::new();
    for number in 1..=NODES {
        hosts.push(world.host(&format!("h{number}")).await?);
    }
    let seed = hosts.first().context("a cluster of nobody")?.address;
    let mut config = Watch::config();
    config["secret_file"] = json!(secret(world).await?);
    config["discovery"] = json!([{"static": {"addresses": [format!("{seed}:{GOSSIP_PORT}")]}}]);
    let mut agents = Vec::new();
    for host in &hosts {
        agents.push(Agent::install(world, host, REMOTE, &config).await?);
    }
    Ok(Cluster { agents })
}

/// Starts all processes, one right after the other. What is promised counts from the moment in which the last one has its
/// gossip socket, by when the first ones may have met: how long fifty processes take to start is this machine's doing.
/// The sockets are looked at twenty times a second, the members as fast as fifty agents answer one after the other.
async fn cold_start(cluster: &mut Cluster, watch: &Watch) -> Result<ColdStart> {
    let begin = Instant::now();
    for agent in &mut cluster.agents {
        agent.launch()?;
    }
    let all_listen = || async { cluster.agents.iter().all(|agent| agent.gossips().unwrap_or(false)) };
    wait_for("all gossip sockets", LISTENING_DEADLINE, all_listen).await?;
    let (listening, since) = (begin.elapsed(), Instant::now());
    let known = watch.members(&cluster.agents, NODES, since, COLD_START_MAX).await.context("the cold start")?;
    Ok(ColdStart { listening, known })
}

/// Kills an agent and starts it again: how long until all others count it out, and until all count it in.
async fn die_and_return(cluster: &mut Cluster, watch: &Watch) -> Result<(Duration, Duration)> {
    let since = Instant::now();
    cluster.agents[VICTIM].kill().await?;
    let death = watch.members(&cluster.agents, NODES - 1, since, DEATH_KNOWN_MAX).await.context("a death")?;
    let since = Instant::now();
    cluster.agents[VICTIM].launch()?;
    let back = watch.members(&cluster.agents, NODES, since, RETURN_MAX).await.context("a return")?;
    Ok((death, back))
}

/// Splits the network until both halves count nobody of the other, and heals it: how long each took. The healing counts
/// from before the first rule is removed.
async fn part_and_heal(cluster: &Cluster, watch: &Watch) -> Result<(Duration, Duration)> {
    let hosts: Vec<&Host> = cluster.agents.iter().map(|agent| &agent.host).collect();
    let (left, right) = hosts.split_at(NODES / 2);
    let others: Vec<Ipv4Addr> = right.iter().map(|host| host.address).collect();
    let since = Instant::now();
    try_join_all(left.iter().map(|host| host.part_from(&others))).await?;
    let parted = watch.members(&cluster.agents, NODES / 2, since, SPLIT_MAX).await.context("the split")?;
    let since = Instant::now();
    try_join_all(left.iter().map(|host| host.reunite())).await?;
    let healed = watch.members(&cluster.agents, NODES, since, HEALED_MAX).await.context("after the split")?;
    Ok((parted, healed))
}
