//! One run of one contestant, in a world of its own.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use rustix::process::Pid;
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;

use super::args::{Mode, Settings};
use super::contestants::{Contestant, Team};
use super::course::{Choices, Course, SLOW_DIVISOR, seconds_between};
use super::figures::{Links, Measured, Since, Times, rounded};
use super::memory;
use crate::lab::agent::Metrics;
use crate::lab::client::{Pulled, wait_until};
use crate::lab::cpu::{Tree, peak_memory_bytes, times_of};
use crate::lab::world::World;

/// From the decision to begin to the beginning: clients' processes have to be up by then. A part for all, and one for each.
const LEAD: Duration = Duration::from_millis(500);
const LEAD_PER_NODE: Duration = Duration::from_millis(25);

/// What a run may take over what the registry alone would need for everybody, so that a hang ends.
const DEADLINE_FACTOR: f64 = 2.0;
const DEADLINE_SLACK: Duration = Duration::from_secs(60);

/// When two agents are killed, as a part of the bound: well before the end, and after the beginning.
const KILL_AT: f64 = 0.4;

/// Agents that are killed, or uplinks that are slow.
pub const PICKED: usize = 2;

/// Who runs, and whether something is done to him.
#[derive(Clone, Debug)]
pub struct Entrant {
    /// Who.
    pub contestant: Contestant,
    /// His program.
    pub program: PathBuf,
    /// Whether two of his daemons are killed.
    pub killed: bool,
}

impl Entrant {
    /// What he is called in what is printed.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}{}", self.contestant.name(), if self.killed { "-killed" } else { "" })
    }
}

/// Lets an entrant run in `world`, which is new. Runs are counted from 0.
pub async fn play(world: &mut World, settings: &Settings, entrant: &Entrant, run: usize) -> Result<Measured> {
    let mut course = Course::set(world, settings).await?;
    let team = Team::ready(entrant.contestant, &entrant.program, world, &course).await?;
    let mut stage = Stage { settings, team, last_layers: (settings.mode == Mode::Partial).then_some(1) };
    let slow = if settings.mode == Mode::Slow { slow_nodes(settings.nodes, run) } else { Vec::new() };
    let nodes = if settings.mode == Mode::Warm {
        stage.team.client(&course, 0, None, None)?.pull().await.context("the neighbour that is to have the image")?;
        1..settings.nodes
    } else {
        0..settings.nodes
    };
    course.shape(settings, &slow).await?;
    let mut choices = Choices::new(settings.seed, run);
    let (bytes, links) = (stage.wanted_bytes(&course)?, links(settings, &nodes, &slow));
    memory::touch(bytes.saturating_mul(nodes.len() as u64)).await?;

    let before = course.count().await?;
    let agents_before = stage.metrics().await?;
    let pids = stage.team.pids()?;
    let cpu_before = cpu_times(&pids);
    let tree = Tree::now()?;
    let (pulls, victims) = stage.run(&course, nodes, entrant.killed, links.fluid_bound(bytes), &mut choices).await?;
    let (own_share, machine_share) = (tree.busy_since()?, tree.machine_busy_since()?);
    let (cpu, cpu_kernel) = used_between(&cpu_before, &cpu_times(&pids));
    let peak_memory_bytes = pids.iter().filter_map(|pid| peak_memory_bytes(*pid).ok()).max();
    let after = course.count().await?;
    let agents_after = stage.metrics().await?;

    let times = times(&pulls)?;
    let last_start = times.iter().map(|times| times.began).fold(0.0, f64::max);
    let rolling = settings.mode == Mode::Rolling;
    let gained = gained(&agents_before, &agents_after);
    let mut measured = Measured {
        times,
        since: if rolling { Since::OwnStart } else { Since::FirstStart },
        // Waves begin when others end, so nothing but the contestant says when.
        bound: (!rolling).then(|| links.bound(bytes, last_start)),
        wanted_bytes: bytes,
        sent: after.sent.since(before.sent),
        interface_bytes: after.interface_bytes - before.interface_bytes,
        cpu,
        cpu_kernel,
        peak_memory_bytes,
        peer_bytes: (!gained.is_empty()).then(|| gained.iter().map(|(_, gain)| gain.from_peers).sum()),
        own_share,
        machine_share,
        extra: Map::new(),
    };
    measured.extra.extend(found(settings, &gained, &slow, &victims, course.image.bytes()));
    Ok(measured)
}

/// A team on its marks.
struct Stage<'a> {
    settings: &'a Settings,
    team: Team,
    last_layers: Option<usize>,
}

/// Clients under way.
type Running = JoinSet<(usize, Result<Pulled>)>;

impl Stage<'_> {
    /// All clients of `nodes`; and which of them had their agents killed.
    async fn run(
        &mut self,
        course: &Course,
        nodes: Range<usize>,
        killed: bool,
        bound: f64,
        choices: &mut Choices,
    ) -> Result<(Vec<Pulled>, Vec<usize>)> {
        if self.settings.mode == Mode::Rolling {
            let mut pulls = Vec::new();
            for wave in waves(nodes, self.settings.wave) {
                let (running, _) = self.start(course, wave, choices)?;
                pulls.extend(finish(running, &[]).await?);
            }
            return Ok((pulls, Vec::new()));
        }
        let (running, at) = self.start(course, nodes, choices)?;
        let mut victims = Vec::new();
        if killed {
            wait_until(at + Duration::from_secs_f64(bound * KILL_AT)).await;
            victims = self.kill(choices).await?;
        }
        Ok((finish(running, &victims).await?, victims))
    }

    /// Starts clients that will begin together, or within the spread; and says when.
    fn start(&self, course: &Course, nodes: Range<usize>, choices: &mut Choices) -> Result<(Running, SystemTime)> {
        let at = SystemTime::now() + LEAD + LEAD_PER_NODE * u32::try_from(nodes.len())?;
        let spread = u64::try_from(self.settings.spread.as_micros())?;
        let deadline = deadline(self.settings);
        let mut running = JoinSet::new();
        for node in nodes {
            let own = at + Duration::from_micros(choices.below(spread + 1));
            let client = self.team.client(course, node, Some(own), self.last_layers)?.within(deadline);
            let image = self.last_layers.is_none().then(|| course.image.clone());
            running.spawn(async move {
                let pulled = client.pull().await;
                // Who names blobs has to have had them all.
                let checked = pulled.and_then(|pulled| match image {
                    Some(image) if !pulled.blobs.is_empty() => pulled.check(&image).map(|()| pulled),
                    _ => Ok(pulled),
                });
                (node, checked)
            });
        }
        Ok((running, at))
    }

    /// Kills the agent that has fetched most from the registry, and another one.
    async fn kill(&mut self, choices: &mut Choices) -> Result<Vec<usize>> {
        let cluster = self.team.agents().context("only agents are killed")?;
        let all = cluster.metrics().await?;
        let fetched: Vec<u64> = all.iter().map(Metrics::from_registry).collect();
        let victims = victims(&fetched, choices).context("nobody has fetched anything by now")?;
        cluster.kill(&victims).await?;
        Ok(victims)
    }

    /// What the agents count, by node; nothing where it is not agents, or the agent is dead.
    async fn metrics(&mut self) -> Result<Vec<Option<Metrics>>> {
        let mut all = Vec::new();
        if let Some(cluster) = self.team.agents() {
            for agent in &cluster.agents {
                all.push(if agent.is_running() { Some(agent.metrics().await?) } else { None });
            }
        }
        Ok(all)
    }

    fn wanted_bytes(&self, course: &Course) -> Result<u64> {
        let Some(layers) = self.last_layers else { return Ok(course.image.bytes()) };
        let (config, all) = course.image.blobs.split_first().context("an image without blobs")?;
        Ok(config.bytes + all.iter().rev().take(layers).map(|blob| blob.bytes).sum::<u64>())
    }
}

/// Waits for all clients; those of victims may have failed.
async fn finish(mut running: Running, victims: &[usize]) -> Result<Vec<Pulled>> {
    let (mut pulls, mut failures) = (Vec::new(), Vec::new());
    while let Some(ended) = running.join_next().await {
        match ended? {
            (node, _) if victims.contains(&node) => {}
            (_, Ok(pulled)) => pulls.push(pulled),
            (node, Err(error)) => failures.push(format!("node {}: {error:#}", node + 1)),
        }
    }
    if !failures.is_empty() {
        bail!("{} clients failed: {}", failures.len(), failures.join("; "));
    }
    Ok(pulls)
}

/// What each process has used so far, itself and through the kernel; None for one that is gone.
type CpuTimes = Option<(Duration, Duration)>;

fn cpu_times(pids: &[Pid]) -> Vec<CpuTimes> {
    pids.iter().map(|pid| times_of(*pid).ok()).collect()
}

/// Seconds of those that still live: all, and the kernel's part of them.
fn used_between(before: &[CpuTimes], after: &[CpuTimes]) -> (f64, f64) {
    let living = before.iter().zip(after).filter_map(|(before, after)| before.zip(*after));
    living.fold((0.0, 0.0), |sum, (before, after)| {
        let kernel = after.1.saturating_sub(before.1);
        let all = kernel + after.0.saturating_sub(before.0);
        (sum.0 + all.as_secs_f64(), sum.1 + kernel.as_secs_f64())
    })
}

fn deadline(settings: &Settings) -> Duration {
    let megabits = settings.layers_sum_bytes() as f64 * 8.0 / 1e6;
    let direct = megabits * settings.nodes as f64 / f64::from(settings.registry_rate.min(settings.rate));
    DEADLINE_SLACK + Duration::from_secs_f64(direct * DEADLINE_FACTOR)
}

fn links(settings: &Settings, nodes: &Range<usize>, slow: &[usize]) -> Links {
    let up = |node| {
        if slow.contains(&node) { f64::from((settings.rate / SLOW_DIVISOR).max(1)) } else { f64::from(settings.rate) }
    };
    // Where a neighbour has the image, it is the source and not the registry.
    let source = if settings.mode == Mode::Warm { settings.rate } else { settings.registry_rate };
    Links { source: f64::from(source), down: f64::from(settings.rate), ups: nodes.clone().map(up).collect() }
}

/// Two others in each run, so that in the end everybody has been slow, and thus everybody who fetches.
fn slow_nodes(nodes: usize, run: usize) -> Vec<usize> {
    (0..PICKED).map(|index| (run * PICKED + index) % nodes).collect()
}

fn waves(nodes: Range<usize>, wave: usize) -> Vec<Range<usize>> {
    nodes.clone().step_by(wave.max(1)).map(|first| first..(first + wave).min(nodes.end)).collect()
}

/// Who has fetched most, and one of the others; None where nobody has fetched anything.
fn victims(fetched: &[u64], choices: &mut Choices) -> Option<Vec<usize>> {
    let (first, bytes) = fetched.iter().enumerate().max_by_key(|(_, bytes)| **bytes)?;
    let others: Vec<usize> = (0..fetched.len()).filter(|node| *node != first).collect();
    let second = others.get(usize::try_from(choices.below(others.len() as u64)).ok()?)?;
    (*bytes > 0).then(|| vec![first, *second])
}

/// Times in seconds since the first of these began.
fn times(pulls: &[Pulled]) -> Result<Vec<Times>> {
    let first = pulls.iter().map(|pulled| pulled.began).min().context("nobody finished")?;
    let of_one = |pulled: &Pulled| {
        let began = seconds_between(first, pulled.began);
        // The config comes first and is nothing that anybody waits for.
        let first_byte = pulled.blobs.get(1).map(|blob| blob.first_byte.as_secs_f64());
        Times { began, ended: began + pulled.took.as_secs_f64(), first_byte }
    };
    Ok(pulls.iter().map(of_one).collect())
}

/// What one agent has counted during the run.
#[derive(Clone, Copy, Debug, Default)]
struct Gain {
    from_peers: u64,
    from_registry: u64,
    to_client: u64,
    fallbacks: u64,
}

/// By node, of those that live.
fn gained(before: &[Option<Metrics>], after: &[Option<Metrics>]) -> Vec<(usize, Gain)> {
    let living = before.iter().zip(after).enumerate().filter_map(|(node, (before, after))| {
        let (before, after) = (before.as_ref()?, after.as_ref()?);
        let gain = |get: fn(&Metrics) -> u64| get(after).saturating_sub(get(before));
        let from = (gain(Metrics::from_peers), gain(Metrics::from_registry));
        let to_client = gain(|metrics| metrics.total("darter_client_sent_bytes_total"));
        let fallbacks = gain(Metrics::fallbacks);
        Some((node, Gain { from_peers: from.0, from_registry: from.1, to_client, fallbacks }))
    });
    living.collect()
}

/// What agents alone can say, and what was done to them.
fn found(
    settings: &Settings,
    gained: &[(usize, Gain)],
    slow: &[usize],
    victims: &[usize],
    image_bytes: u64,
) -> Map<String, Value> {
    let mut found = Map::new();
    let names = |nodes: &[usize]| nodes.iter().map(|node| format!("h{}", node + 1)).collect::<Vec<_>>();
    if !slow.is_empty() {
        found.insert("slow_nodes".to_owned(), json!(names(slow)));
    }
    if !victims.is_empty() {
        found.insert("killed".to_owned(), json!(names(victims)));
    }
    if gained.is_empty() {
        return found;
    }
    found.insert("fallbacks".to_owned(), json!(gained.iter().map(|(_, gain)| gain.fallbacks).sum::<u64>()));
    let fetchers: BTreeSet<usize> =
        gained.iter().filter(|(_, gain)| gain.from_registry > 0).map(|(node, _)| *node).collect();
    found.insert("fetchers".to_owned(), json!(fetchers.len()));
    if !slow.is_empty() {
        let bytes = gained.iter().filter(|(node, _)| slow.contains(node)).map(|(_, gain)| gain.from_registry);
        found.insert("slow_nodes_fetched_bytes".to_owned(), json!(bytes.sum::<u64>()));
    }
    if settings.mode == Mode::Partial {
        // There is no counter of what nobody read: it is what came and did not go to the client.
        let unread = |gain: &Gain| (gain.from_peers + gain.from_registry).saturating_sub(gain.to_client);
        let all: Vec<f64> = gained.iter().map(|(_, gain)| unread(gain) as f64 / image_bytes as f64).collect();
        found.insert(
            "unread_share_of_image_per_node".to_owned(),
            json!(rounded(all.iter().sum::<f64>() / all.len() as f64)),
        );
        found.insert("unread_share_of_image_worst".to_owned(), json!(rounded(all.iter().copied().fold(0.0, f64::max))));
    }
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::lab::client::Received;

    #[test]
    fn everybody_is_slow_once() {
        let all: BTreeSet<usize> = (0..8).flat_map(|run| slow_nodes(16, run)).collect();
        assert_eq!(all, (0..16).collect());
        assert_eq!(slow_nodes(5, 2), [4, 0], "an odd number goes round");
    }

    #[test]
    fn the_last_wave_is_what_is_left() {
        assert_eq!(waves(0..10, 4), [0..4, 4..8, 8..10]);
        assert_eq!(waves(0..5, 4), [0..4, 4..5]);
    }

    #[test]
    fn a_fetcher_dies_and_somebody_else() {
        for run in 0..20 {
            let picked = victims(&[0, 5, 9, 0], &mut Choices::new(1, run)).unwrap();
            assert!(picked[0] == 2 && picked[1] != 2 && picked[1] < 4, "{picked:?}");
        }
        assert_eq!(victims(&[0, 0], &mut Choices::new(1, 0)), None);
        assert_eq!(victims(&[3], &mut Choices::new(1, 0)), None);
    }

    #[test]
    fn times_begin_with_the_first_client() {
        let pulled = |began, took, first_byte| {
            let received = |seconds| Received {
                digest: String::new(),
                bytes: 0,
                first_byte: Duration::from_secs(seconds),
                longest_gap: Duration::ZERO,
            };
            let began = UNIX_EPOCH + Duration::from_secs(began);
            Pulled { blobs: vec![received(99), received(first_byte)], began, took: Duration::from_secs(took) }
        };
        let times = times(&[pulled(105, 7, 2), pulled(103, 4, 1)]).unwrap();
        assert_eq!(times[0], Times { began: 2.0, ended: 9.0, first_byte: Some(2.0) });
        assert_eq!(times[1], Times { began: 0.0, ended: 4.0, first_byte: Some(1.0) });
    }

    #[test]
    fn only_the_living_have_used_anything() {
        let times = |own, kernel| Some((Duration::from_secs(own), Duration::from_secs(kernel)));
        assert_eq!(used_between(&[times(5, 1), times(7, 7)], &[times(8, 3), None]), (5.0, 2.0));
    }

    #[test]
    fn what_an_agent_had_before_and_who_died_does_not_count() {
        let metrics = |peers: u64, client: u64| {
            let text = format!("darter_peer_received_bytes_total {peers}\ndarter_client_sent_bytes_total {client}\n");
            Some(Metrics::parse(&text))
        };
        let gained = gained(&[metrics(10, 1), metrics(0, 0)], &[metrics(15, 4), None]);
        assert_eq!(gained.len(), 1);
        assert_eq!((gained[0].0, gained[0].1.from_peers, gained[0].1.to_client), (0, 5, 3));
    }
}
