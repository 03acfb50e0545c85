//! Hosts as network namespaces, joined by a router that is a namespace too. Not by a bridge: all namespaces share one table
//! of neighbours, which holds 1024, and fifty hosts that know each other's hardware addresses need 2450.
//!
//! Nothing is made in the machine's own namespace, so any number of labs may use the same addresses at once.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::command::{Run, wait_for};

/// Every lab's network. Only visible inside its namespaces.
const SUBNET: [u8; 3] = [10, 77, 0];

/// The router's address at each of its ports. Link-local, so that no host has it.
const ROUTER: &str = "169.254.77.1";

/// Hosts per router: the last byte of the address, without network and broadcast.
const HOSTS_MAX: u8 = 254;

/// How long killed processes may take to be gone, and with them their mounts.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// What TCP regulates its rate by in hosts that ask for no other: what Linux has unless its distribution or its administrator
/// chose another. Set in every host, so that figures do not depend on the machine's choice.
pub const CONGESTION: &str = "cubic";

/// What [`Network::new`] can be told instead, as `sysctl` lists it.
const CONGESTIONS: &str = "/proc/sys/net/ipv4/tcp_available_congestion_control";

/// Those of them that a namespace other than the machine's own may have. The machine's choice is one of them, cubic need
/// not be: an administrator who has chosen another has, as a rule, left it out.
const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// Names of nft's counters of what [`Host::lose`] sees and drops.
const ARRIVED: &str = "arrived";
const LOST: &str = "lost";

/// Payload over what a limited link carries: measured with TCP through [`Host::limit`].
pub const GOODPUT: f64 = 0.956;

/// Where iproute2 keeps named namespaces.
const NAMESPACES: &str = "/run/netns";

/// A router and the hosts plugged into it.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    congestion: String,
    hosts: u8,
}

/// One host: a namespace with `lo` and `eth0`.
#[derive(Clone, Debug)]
pub struct Host {
    /// Short name, unique in its network.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    namespace: String,
    router: String,
    /// The other end of `eth0`, at the router.
    port: String,
}

impl Network {
    /// Makes the router. All names begin with `prefix`; hosts will have the congestion control of this name, one of
    /// [`congestions`]. Where the machine does not allow it in namespaces, it does from now on.
    pub async fn new(prefix: &str, congestion: &str) -> Result<Self> {
        allow(congestion)?;
        let router = format!("{prefix}-router");
        ip(&["netns", "add", &router]).await?;
        set(&router, "net/ipv4/ip_forward", "1").await?;
        Ok(Self { prefix: prefix.to_owned(), congestion: congestion.to_owned(), hosts: 0 })
    }

    /// Plugs in another host; the first is `.1`, the next `.2`.
    pub async fn host(&mut self, name: &str) -> Result<Host> {
        self.hosts = self.hosts.checked_add(1).filter(|n| *n <= HOSTS_MAX).context("too many hosts")?;
        let address = Ipv4Addr::new(SUBNET[0], SUBNET[1], SUBNET[2], self.hosts);
        let (namespace, router) = (format!("{}-{name}", self.prefix), format!("{}-router", self.prefix));
        let port = format!("p{}", self.hosts);
        let (own, inside) = (format!("{address}/32"), ["-n", &namespace]);
        ip(&["netns", "add", &namespace]).await?;
        set(&namespace, "net/ipv4/tcp_congestion_control", &self.congestion).await?;
        let pair =
            ["link", "add", "eth0", "netns", &namespace, "type", "veth", "peer", "name", &port, "netns", &router];
        ip(&pair).await?;
        ip(&["-n", &router, "addr", "add", &format!("{ROUTER}/32"), "dev", &port]).await?;
        ip(&["-n", &router, "link", "set", &port, "up"]).await?;
        ip(&["-n", &router, "route", "add", &own, "dev", &port]).await?;
        for args in [
            &["addr", "add", &own, "dev", "eth0"][..],
            &["link", "set", "lo", "up"],
            &["link", "set", "eth0", "up"],
            &["route", "add", ROUTER, "dev", "eth0"],
            &["route", "add", "default", "via", ROUTER, "dev", "eth0"],
        ] {
            ip(&[&inside[..], args].concat()).await?;
        }
        Ok(Host { name: name.to_owned(), address, namespace, router, port })
    }
}

impl Host {
    /// A program inside this host's network, and outside in every other respect. `nsenter` rather than `ip netns
    /// exec`, which mounts another /sys and so hides the cgroups from container runtimes.
    #[must_use]
    pub fn run(&self, program: &str) -> Run {
        Run::new("nsenter").arg(format!("--net={NAMESPACES}/{}", self.namespace)).arg(program)
    }

    /// Like [`Host::run`], with mounts of its own and /etc/docker replaced by an empty directory whose `certs.d` trusts
    /// `ca` for `registry`: all docker daemons of a machine share that directory otherwise.
    #[must_use]
    pub fn run_trusting(&self, registry: &str, ca: &Path, program: &str) -> Run {
        const PREPARE: &str = r#"set -e
mkdir -p /etc/docker
mount -t tmpfs -o mode=755,size=1m tmpfs /etc/docker
mkdir -p "/etc/docker/certs.d/$1"
cp "$2" "/etc/docker/certs.d/$1/ca.crt"
shift 2
exec "$@""#;
        let isolated = self.run("unshare").args(["--mount", "--propagation", "private", "sh", "-c", PREPARE, "sh"]);
        isolated.arg(registry).arg(ca).arg(program)
    }

    /// Drops everything that arrives for or leaves towards these ports, UDP and TCP, on the wire; loopback is spared.
    pub async fn cut_off(&self, ports: &[u16]) -> Result<()> {
        let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
        let chain = |hook: &str, device: &str| {
            format!(
                "chain {hook} {{\n type filter hook {hook} priority 0\n {device} lo accept\n \
                 meta l4proto {{ tcp, udp }} th dport {{ {ports} }} drop\n \
                 meta l4proto {{ tcp, udp }} th sport {{ {ports} }} drop\n }}\n"
            )
        };
        let rules = format!("table inet cut {{\n{}{}}}\n", chain("input", "iif"), chain("output", "oif"));
        self.run("nft").arg(rules).output().await.map(drop)
    }

    /// Drops everything that comes from these hosts or goes to them, until [`Host::reunite`].
    pub async fn part_from(&self, others: &[Ipv4Addr]) -> Result<()> {
        let others = others.iter().map(Ipv4Addr::to_string).collect::<Vec<_>>().join(",");
        let chain = |hook: &str, end: &str| {
            format!("chain {hook} {{\n type filter hook {hook} priority 0\n ip {end} {{ {others} }} drop\n }}\n")
        };
        let rules = format!("table inet parted {{\n{}{}}}\n", chain("input", "saddr"), chain("output", "daddr"));
        self.run("nft").arg(rules).output().await.map(drop)
    }

    /// Undoes [`Host::part_from`].
    pub async fn reunite(&self) -> Result<()> {
        self.run("nft").args(["delete", "table", "inet", "parted"]).output().await.map(drop)
    }

    /// Loses so many of a hundred of the UDP datagrams that arrive at `port`, picked at random, and counts them.
    pub async fn lose(&self, port: u16, percent: u8) -> Result<()> {
        let rules = format!(
            "table inet lossy {{\n counter {ARRIVED} {{ }}\n counter {LOST} {{ }}\n chain input {{\n \
             type filter hook input priority 0\n udp dport {port} counter name {ARRIVED}\n \
             udp dport {port} numgen random mod 100 < {percent} counter name {LOST} drop\n }}\n}}\n"
        );
        self.run("nft").arg(rules).output().await.map(drop)
    }

    /// What arrived since [`Host::lose`], and what of it was lost.
    pub async fn losses(&self) -> Result<(u64, u64)> {
        let text = self.run("nft").args(["-j", "list", "counters", "table", "inet", "lossy"]).output().await?;
        let listed: Value = serde_json::from_str(&text)?;
        let count = |name: &str| {
            let mut counters = listed["nftables"].as_array()?.iter().map(|entry| &entry["counter"]);
            counters.find(|counter| counter["name"] == name)?["packets"].as_u64()
        };
        count(ARRIVED).zip(count(LOST)).context("the counters are gone")
    }

    /// Bytes that have left this host so far, with IP's and TCP's headers as the kernel hands packets to the interface: it
    /// cuts large ones later, and what that adds is not in it.
    pub async fn left_bytes(&self) -> Result<u64> {
        let text = self.run("ip").args(["-j", "-s", "link", "show", "dev", "eth0"]).output().await?;
        let listed: Value = serde_json::from_str(&text)?;
        listed[0]["stats64"]["tx"]["bytes"].as_u64().context("an interface that counts nothing")
    }

    /// Limits what leaves this host to `megabits` per second, so that a pull lasts long enough to be disturbed.
    pub async fn limit_egress(&self, megabits: u32) -> Result<()> {
        self.run("tc").args(limited("eth0", megabits)).output().await.map(drop)
    }

    /// Limits what leaves this host, and what arrives there, to `megabits` per second each.
    pub async fn limit(&self, megabits: u32) -> Result<()> {
        self.limit_egress(megabits).await?;
        Run::new("tc").args(["-n", &self.router]).args(limited(&self.port, megabits)).output().await.map(drop)
    }

    /// Lifts the limit.
    pub async fn unlimit_egress(&self) -> Result<()> {
        self.run("tc").args(["qdisc", "del", "dev", "eth0", "root"]).output().await.map(drop)
    }
}

/// Arguments of `tc` that limit what leaves a device.
fn limited(device: &str, megabits: u32) -> Vec<String> {
    let rate = format!("{megabits}mbit");
    let args = ["qdisc", "replace", "dev", device, "root", "tbf", "rate", &rate, "burst", "256kb", "latency", "50ms"];
    args.map(str::to_owned).to_vec()
}

/// Adds a congestion control to those that namespaces may have.
fn allow(congestion: &str) -> Result<()> {
    let allowed = std::fs::read_to_string(ALLOWED).with_context(|| format!("reading {ALLOWED}"))?;
    if allowed.split_whitespace().any(|name| name == congestion) {
        return Ok(());
    }
    let more = format!("{} {congestion}", allowed.trim_end());
    std::fs::write(ALLOWED, more).with_context(|| format!("allowing {congestion} in {ALLOWED}"))
}

/// What this machine's kernel can be told to regulate TCP by; nothing where it does not say.
#[must_use]
pub fn congestions() -> Vec<String> {
    let all = std::fs::read_to_string(CONGESTIONS).unwrap_or_default();
    all.split_whitespace().map(str::to_owned).collect()
}

/// Kills whatever still runs in the namespaces whose names begin with `prefix`, and removes them.
///
/// Goes on after an error, so that one stubborn namespace does not leave the others behind; returns the last one.
pub async fn remove_all(prefix: &str) -> Result<()> {
    let mut result = Ok(());
    for namespace in existing(prefix) {
        if let Err(error) = remove(&namespace).await {
            result = Err(error);
        }
    }
    result
}

/// Names of the namespaces that begin with `prefix`.
#[must_use]
pub fn existing(prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(NAMESPACES) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(prefix)).collect()
}

async fn remove(namespace: &str) -> Result<()> {
    // Again and again: a container's shim may start something while its daemon is being killed.
    let emptied = || async {
        let pids = ip(&["netns", "pids", namespace]).await.unwrap_or_default();
        for pid in pids.split_whitespace().filter_map(|pid| pid.parse().ok()).filter_map(Pid::from_raw) {
            // It may have ended between the listing and now, which is what is wanted.
            let _ = kill_process(pid, Signal::KILL);
        }
        pids.trim().is_empty()
    };
    let killed = wait_for(&format!("the processes of {namespace} to end"), KILL_DEADLINE, emptied).await;
    ip(&["netns", "del", namespace]).await?;
    killed
}

/// Sets a kernel parameter, by its path below /proc/sys, of one namespace.
async fn set(namespace: &str, parameter: &str, value: &str) -> Result<()> {
    let write = ["sh", "-c", r#"echo "$2" > "/proc/sys/$1""#, "sh", parameter, value];
    let inside = Run::new("nsenter").arg(format!("--net={NAMESPACES}/{namespace}")).args(write);
    inside.output().await.map(drop)
}

async fn ip(args: &[&str]) -> Result<String> {
    Run::new("ip").args(args).output().await
}
