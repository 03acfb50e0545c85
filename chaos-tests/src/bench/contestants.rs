//! Who runs: the agents, clients without any, and two BitTorrent programs. Each is a team of daemons that are up before the
//! start, and a client per node that begins when it is told.

mod swarm;

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use rustix::process::Pid;
use serde_json::Value;

use super::course::Course;
use super::join::Api;
use crate::lab::agent::{Cluster, Remote};
use crate::lab::client::{Client, Order};
use crate::lab::command::installed;
use crate::lab::world::World;

pub use swarm::Swarm;

/// Who runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// An agent on each node.
    Darter,
    /// Nothing: clients ask the registry.
    Direct,
    /// aria2 on each node, with the registry as web seed.
    Aria2,
    /// rqbit on each node and, since it knows no web seeds, on the registry's host.
    Rqbit,
}

impl Contestant {
    /// Those that the agents can be compared with.
    pub const OTHERS: [Self; 3] = [Self::Direct, Self::Aria2, Self::Rqbit];

    /// Its name on the command line and in what is printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Darter => "darter",
            Self::Direct => "direct",
            Self::Aria2 => "aria2",
            Self::Rqbit => "rqbit",
        }
    }

    /// Where its program is, if it has one; or how to get it.
    pub fn program(self, darter: &Path, tools: &Path) -> Result<PathBuf, String> {
        let beside = tools.join("rqbit");
        match self {
            Self::Darter if darter.is_file() => Ok(darter.to_owned()),
            Self::Darter => Err(format!("there is no {}", darter.display())),
            Self::Direct => Ok(PathBuf::new()),
            Self::Aria2 if installed("aria2c") => Ok("aria2c".into()),
            Self::Aria2 => Err("aria2 is not installed: apt-get install aria2".to_owned()),
            Self::Rqbit if beside.is_file() => Ok(beside),
            Self::Rqbit if installed("rqbit") => Ok("rqbit".into()),
            Self::Rqbit => Err(format!(
                "rqbit is not installed: cargo install rqbit --version 9.1.0 --locked --no-default-features \
                 --features rust-tls --root {}",
                tools.parent().unwrap_or(tools).display()
            )),
        }
    }
}

/// A contestant's daemons, up and running.
#[derive(Debug)]
pub enum Team {
    /// Agents.
    Agents(Cluster),
    /// None.
    Nobody,
    /// A BitTorrent program.
    Swarm(Swarm),
}

impl Team {
    /// Starts what has to be there before the start. Links have no limit yet.
    pub async fn ready(contestant: Contestant, program: &Path, world: &World, course: &Course) -> Result<Self> {
        Ok(match contestant {
            Contestant::Darter => {
                let remote = Remote { name: &course.registry.name, ca: None };
                Self::Agents(Cluster::on(world, &course.hosts, remote, &Value::Null).await?)
            }
            Contestant::Direct => Self::Nobody,
            Contestant::Aria2 => Self::Swarm(Swarm::start(Api::Aria2, program, world, course).await?),
            Contestant::Rqbit => Self::Swarm(Swarm::start(Api::Rqbit, program, world, course).await?),
        })
    }

    /// A client of a node that begins at a given moment, or at once.
    pub fn client(
        &self,
        course: &Course,
        node: usize,
        at: Option<SystemTime>,
        last_layers: Option<usize>,
    ) -> Result<Client> {
        let host = course.hosts.get(node).context("no such node")?;
        let order = Order { at, last_layers, ..Order::new(&course.registry.name, &course.image.manifest) };
        match self {
            Self::Agents(_) => Client::new(host, &order),
            Self::Nobody => Client::new(host, &Order { direct: true, ..order }),
            Self::Swarm(swarm) => swarm.client(host, at),
        }
    }

    /// Processes of the nodes' daemons, those that run.
    pub fn pids(&self) -> Result<Vec<Pid>> {
        match self {
            Self::Agents(cluster) => {
                cluster.agents.iter().filter(|agent| agent.is_running()).map(crate::lab::agent::Agent::pid).collect()
            }
            Self::Nobody => Ok(Vec::new()),
            Self::Swarm(swarm) => Ok(swarm.pids()),
        }
    }

    /// The agents, where it is them.
    pub fn agents(&mut self) -> Option<&mut Cluster> {
        match self {
            Self::Agents(cluster) => Some(cluster),
            Self::Nobody | Self::Swarm(_) => None,
        }
    }
}
