//! What the lab tries, in the order in which it is run: the lab itself first, then real clients, then trouble.

mod calm;
mod conformance;
mod credentials;
mod crowd;
mod cut_off;
mod direct;
mod dns;
mod drops;
mod fifty;
mod freeze;
mod killed;
mod leases;
mod loss;
mod pulls;
mod restart;
mod rolling;
mod runtimes;
mod service;
mod split;
mod stage;

use std::future::Future;
use std::pin::Pin;

use anyhow::Result;

use super::systemd;
use super::world::World;

/// What a case found, in figures, for the line that reports it.
pub type Found<'a> = Pin<Box<dyn Future<Output = Result<String>> + 'a>>;

/// One thing that the lab tries.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Name, which a filter is matched against.
    pub name: &'static str,
    /// Programs beyond those that every case needs.
    pub tools: &'static [&'static str],
    /// Whether it needs the agent's binary.
    pub agent: bool,
    /// Runs it in a world of its own.
    pub run: for<'a> fn(&'a mut World) -> Found<'a>,
}

/// Programs that every case needs.
pub const TOOLS: [&str; 9] = ["ip", "nsenter", "unshare", "nft", "tc", "curl", "docker-registry", "skopeo", "busybox"];

const DOCKER: &[&str] = &["docker", "dockerd", "containerd", "runc"];
const CONTAINERD: &[&str] = &["containerd", "ctr", "runc"];
const CONTAINERS: &[&str] = &["podman", "buildah", "runc"];
const BOTH: &[&str] = &["docker", "dockerd", "containerd", "ctr", "runc"];

/// What the agent passes, and what is run where no filter names anything.
pub const CASES: &[Case] = &[
    Case { name: "direct", tools: BOTH, agent: false, run: |world| Box::pin(direct::direct(world)) },
    Case { name: "docker", tools: DOCKER, agent: true, run: |world| Box::pin(pulls::docker(world)) },
    Case { name: "containerd", tools: CONTAINERD, agent: true, run: |world| Box::pin(pulls::containerd(world)) },
    Case { name: "mirrors", tools: DOCKER, agent: true, run: |world| Box::pin(runtimes::registry_mirrors(world)) },
    Case { name: "configure-docker", tools: DOCKER, agent: true, run: |world| Box::pin(runtimes::docker(world)) },
    Case {
        name: "configure-containerd",
        tools: CONTAINERD,
        agent: true,
        run: |world| Box::pin(runtimes::containerd(world)),
    },
    Case { name: "configure-crio", tools: CONTAINERS, agent: true, run: |world| Box::pin(runtimes::crio(world)) },
    Case { name: "skopeo", tools: &[], agent: true, run: |world| Box::pin(pulls::skopeo(world)) },
    Case { name: "warm", tools: &[], agent: true, run: |world| Box::pin(pulls::warm(world)) },
    Case { name: "credentials", tools: &[], agent: true, run: |world| Box::pin(credentials::credentials(world)) },
    Case { name: "conformance", tools: &[], agent: true, run: |world| Box::pin(conformance::secure(world)) },
    Case { name: "conformance-plain", tools: &[], agent: true, run: |world| Box::pin(conformance::plain(world)) },
    Case { name: "peer-killed", tools: &[], agent: true, run: |world| Box::pin(killed::peer_killed(world)) },
    Case { name: "cut-off-before", tools: &[], agent: true, run: |world| Box::pin(cut_off::before(world)) },
    Case { name: "cut-off-during", tools: &[], agent: true, run: |world| Box::pin(cut_off::during(world)) },
    Case { name: "leases", tools: &[], agent: true, run: |world| Box::pin(leases::leases(world)) },
    Case { name: "calm", tools: &[], agent: true, run: |world| Box::pin(calm::calm(world)) },
    Case { name: "slow", tools: &[], agent: true, run: |world| Box::pin(calm::slow(world)) },
    Case { name: "dns", tools: &["dnsmasq"], agent: true, run: |world| Box::pin(dns::dns(world)) },
    Case { name: "restart", tools: &[], agent: true, run: |world| Box::pin(restart::restart(world)) },
    Case { name: "loss-home", tools: &[], agent: true, run: |world| Box::pin(loss::home(world)) },
    Case { name: "loss-peers", tools: &[], agent: true, run: |world| Box::pin(loss::peers(world)) },
    Case { name: "loss-home-and-standby", tools: &[], agent: true, run: |world| Box::pin(loss::both(world)) },
    Case { name: "freeze", tools: &[], agent: true, run: |world| Box::pin(freeze::freeze(world)) },
    Case { name: "split", tools: &[], agent: true, run: |world| Box::pin(split::split(world)) },
    Case { name: "rolling", tools: &[], agent: true, run: |world| Box::pin(rolling::rolling(world)) },
    Case { name: "each-killed", tools: &[], agent: true, run: |world| Box::pin(rolling::each_killed(world)) },
    Case { name: "fifty", tools: &[], agent: true, run: |world| Box::pin(fifty::fifty(world)) },
];

/// What is run only where a filter names it: the pulls of fifty agents, which two cores do not carry within the bounds; gossip
/// that loses a tenth, which takes ten minutes; and the units, which take a machine on which a second systemd can boot.
pub const ON_DEMAND: &[Case] = &[
    Case { name: "many", tools: &[], agent: true, run: |world| Box::pin(calm::many(world)) },
    Case { name: "one-blob", tools: &[], agent: true, run: |world| Box::pin(fifty::one_blob(world)) },
    Case { name: "drops", tools: &[], agent: true, run: |world| Box::pin(drops::drops(world)) },
    Case { name: "systemd", tools: systemd::TOOLS, agent: true, run: |world| Box::pin(service::systemd(world)) },
];
