//! A network that loses some of all gossip: nobody may be taken for dead who is not.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;

use super::crowd::until;
use crate::lab::agent::{Cluster, GOSSIP_PORT, Metrics, Remote};
use crate::lab::cpu::used_by;
use crate::lab::watch::Watch;
use crate::lab::world::World;

/// Agents.
const NODES: usize = 30;

/// Of a hundred datagrams, those that are lost.
const LOST_PERCENT: u8 = 10;

/// How far the share that was really lost may be from that. Of a hundred thousand datagrams, chance makes it a tenth; this
/// only tells losing from not losing.
const LOST_PERCENT_OFF: f64 = 1.0;

/// For this long: foca's own settings for a LAN take some living members for dead in ten minutes of it.
const LOSSY: Duration = Duration::from_secs(600);

/// How often it is looked meanwhile, so that a failure does not take ten minutes. The counter forgets nothing in between.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// How long until all know all in the end: a round of anti-entropy, in which each asks another one, and as much again.
const KNOWN_MAX: Duration = Duration::from_secs(20);

/// The registry that agents are told about; nobody pulls.
const REMOTE: Remote<'_> = Remote { name: "registry.lab", ca: None };

/// Thirty agents lose a tenth of what they hear of each other, for ten minutes; none of them takes another off its list, even
/// for a moment.
pub(super) async fn drops(world: &mut World) -> Result<String> {
    let watch = Watch::new(world).await?;
    let cluster = Cluster::start(world, REMOTE, NODES, &Watch::config()).await?;
    let agents = &cluster.agents;
    try_join_all(agents.iter().map(|agent| agent.host.lose(GOSSIP_PORT, LOST_PERCENT))).await?;
    let (since, used_before) = (Instant::now(), used(&cluster)?);
    while since.elapsed() < LOSSY {
        until(since, (since.elapsed() + LOOK_INTERVAL).min(LOSSY)).await;
        let lost: u64 = watch.metrics(agents).await?.iter().map(members_lost).sum();
        ensure!(lost == 0, "{lost} times a living member was taken off a list, within {:?}", since.elapsed());
    }
    let lasted = since.elapsed().as_secs_f64();
    let used = (used(&cluster)? - used_before).as_secs_f64();
    watch.members(agents, NODES, Instant::now(), KNOWN_MAX).await?;
    let counts = try_join_all(agents.iter().map(|agent| agent.host.losses())).await?;
    let (arrived, lost) = counts.iter().fold((0, 0), |(all, gone), (arrived, lost)| (all + arrived, gone + lost));
    let percent = lost as f64 / arrived as f64 * 100.0;
    let figures = format!(
        "{NODES} agents, {lost} of {arrived} datagrams lost ({percent:.2} %) in {lasted:.0} s, nobody taken for dead, all \
         know all; the agents used {used:.0} s of CPU, {:.2} % of a core each",
        used / lasted / NODES as f64 * 100.0
    );
    ensure!((percent - f64::from(LOST_PERCENT)).abs() <= LOST_PERCENT_OFF, "the loss was another: {figures}");
    Ok(figures)
}

fn members_lost(metrics: &Metrics) -> u64 {
    metrics.total("darter_members_lost_total")
}

/// CPU time that all agents have used.
fn used(cluster: &Cluster) -> Result<Duration> {
    cluster.agents.iter().map(|agent| used_by(agent.pid()?)).sum()
}
