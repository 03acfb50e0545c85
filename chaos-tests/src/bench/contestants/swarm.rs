//! aria2 and rqbit, each as somebody would set it up who rolls out images with it: daemons that are up beforehand, a torrent
//! that is finished beforehand, a tracker on the registry's host, everything switched off that looks for peers elsewhere, and
//! no limits but those of the links.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use rustix::process::Pid;

use crate::bench::course::Course;
use crate::bench::join::{ARIA2_API, Api, RQBIT_API};
use crate::bench::{torrent, tracker};
use crate::lab::client::{Client, REPOSITORY, micros_since_epoch};
use crate::lab::command::{Run, wait_for};
use crate::lab::daemon::Daemon;
use crate::lab::netns::Host;
use crate::lab::world::World;

/// How long a daemon may take to answer.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// How long the seeder may take to look at all files.
const SEED_DEADLINE: Duration = Duration::from_secs(60);

/// The daemons of one of them.
#[derive(Debug)]
pub struct Swarm {
    api: Api,
    torrent: PathBuf,
    nodes: Vec<Daemon>,
    /// The tracker, and the seeder where there is one.
    _others: Vec<Daemon>,
}

impl Swarm {
    /// Starts tracker, seeder and a daemon on each host.
    pub async fn start(api: Api, program: &Path, world: &World, course: &Course) -> Result<Self> {
        let registry = &course.registry.host;
        let address = SocketAddr::from((registry.address, tracker::PORT));
        let tracker = registry.run(&own_program()?).args(["tracker", &address.to_string()]);
        let mut others = vec![Daemon::start("tracker", tracker, &world.log("tracker"))?];
        let web_seed = format!("http://{}/v2/{REPOSITORY}/", course.registry.name);
        let web_seed = (api == Api::Aria2).then_some(web_seed.as_str());
        let metainfo = torrent::metainfo(&course.image, &format!("http://{address}{}", tracker::PATH), web_seed)?;
        let torrent = world.directory("torrent")?.join("image.torrent");
        fs::write(&torrent, metainfo)?;
        let mut nodes = Vec::new();
        for host in &course.hosts {
            nodes.push(daemon(api, program, world, host)?);
        }
        for host in &course.hosts {
            wait_until_up(api, host).await?;
        }
        let swarm = Self { api, torrent, nodes, _others: Vec::new() };
        if api == Api::Rqbit {
            // It has no web seeds, so the registry's host seeds, through the same link.
            link_blobs(course, &files(world, registry)?)?;
            others.push(daemon(api, program, world, registry)?);
            wait_until_up(api, registry).await?;
            swarm.client(registry, None)?.within(SEED_DEADLINE).pull().await.context("the seeder")?;
        }
        Ok(Self { _others: others, ..swarm })
    }

    /// A client that hands the daemon of its host the torrent.
    pub fn client(&self, host: &Host, at: Option<SystemTime>) -> Result<Client> {
        let at = at.map_or_else(|| "now".to_owned(), |at| micros_since_epoch(at).to_string());
        let run = host.run(&own_program()?).args(["join", self.api.name()]).arg(&self.torrent).arg(at);
        Ok(Client::program(run))
    }

    /// Processes of the nodes' daemons; neither the tracker's nor the seeder's, which stands for the registry.
    #[must_use]
    pub fn pids(&self) -> Vec<Pid> {
        self.nodes.iter().map(Daemon::pid).collect()
    }
}

fn own_program() -> Result<String> {
    let program = std::env::current_exe()?;
    Ok(program.to_str().context("the path of this program is not UTF-8")?.to_owned())
}

/// Where a host's daemon keeps files.
fn files(world: &World, host: &Host) -> Result<PathBuf> {
    world.directory(&format!("{}-files", host.name))
}

fn daemon(api: Api, program: &Path, world: &World, host: &Host) -> Result<Daemon> {
    let program = program.to_str().context("the path of a contestant is not UTF-8")?;
    let files = files(world, host)?;
    let run = host.run(program).env("HOME", &files);
    let run = match api {
        Api::Aria2 => aria2(run, &files),
        Api::Rqbit => rqbit(run, &files),
    };
    let name = format!("{}-{}", host.name, api.name());
    Daemon::start(&name, run, &world.log(&name))
}

fn aria2(run: Run, files: &Path) -> Run {
    let port = ARIA2_API.rsplit_once(':').map_or("", |(_, port)| port);
    run.args(["--no-conf", "--enable-rpc", "--rpc-listen-port", port, "--dir"]).arg(files).args([
        // There are no others than those that the tracker and the peers know.
        "--enable-dht=false",
        "--enable-dht6=false",
        "--disable-ipv6",
        "--bt-enable-lpd=false",
        "--enable-peer-exchange=true",
        // As many peers as there are, rather than up to 55.
        "--bt-max-peers=0",
        // Who is done goes on for the others.
        "--seed-ratio=0.0",
        // Nobody is there to be hidden from, and ciphers cost CPU.
        "--bt-require-crypto=false",
        "--bt-min-crypto-level=plain",
        // The file system knows how to grow files; the default of aria2 writes all of them twice.
        "--file-allocation=none",
        // Nobody looks at its console.
        "--summary-interval=0",
        "--show-console-readout=false",
        "--console-log-level=warn",
        // A registry is asked through one connection per node, as by default: with more, all nodes together ask it for
        // more copies.
        "--max-connection-per-server=1",
    ])
}

fn rqbit(run: Run, files: &Path) -> Run {
    let global = [
        "--http-api-listen-addr",
        RQBIT_API,
        "--ipv4-only",
        // There are no others than those that the tracker and the peers know, and no gateway.
        "--disable-dht",
        "--disable-lsd",
        "--disable-upnp-port-forward",
        // Nodes begin together, so the first is told of nobody: ask again soon, as the tracker says too.
        "--tracker-refresh-interval",
        "5s",
        // Nobody reads more than what goes wrong.
        "-v",
        "warn",
    ];
    run.args(global).args(["server", "start", "--disable-persistence"]).arg(files)
}

/// Puts the blobs where rqbit looks for the torrent's files.
fn link_blobs(course: &Course, files: &Path) -> Result<()> {
    let target = files.join(torrent::NAME);
    fs::create_dir_all(&target)?;
    for blob in &course.image.blobs {
        let hex = blob.digest.strip_prefix("sha256:").context("an odd digest")?;
        let source = course.image.layout.join("blobs/sha256").join(hex);
        fs::hard_link(source, target.join(&blob.digest)).context("cannot link a blob")?;
    }
    Ok(())
}

async fn wait_until_up(api: Api, host: &Host) -> Result<()> {
    let url = match api {
        Api::Aria2 => format!("http://{ARIA2_API}/jsonrpc?method=aria2.getVersion&id=1"),
        Api::Rqbit => format!("http://{RQBIT_API}/torrents"),
    };
    let up = || async {
        host.run("curl")
            .args(["-sS", "--fail", "--max-time", "2", "--output", "/dev/null", &url])
            .output()
            .await
            .is_ok()
    };
    wait_for(&format!("{} on {}", api.name(), host.name), START_DEADLINE, up).await
}
