//! What the agent costs where it has the blob already: beside it nginx, with the same file on the same loopback, for the
//! same client, with the same version and cipher of TLS.
//!
//! The two take turns, each on a connection of its own per run. The client is curl: through the agent as docker asks it,
//! with `CONNECT` and TLS that the agent ends. Not here: pulls, and so no links; nothing leaves the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Pid;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::figures::{extend, median, rounded};
use crate::lab::agent::{Agent, Cluster, Remote};
use crate::lab::cases::TOOLS;
use crate::lab::certificates::RegistryCertificates;
use crate::lab::command::{Run, installed, wait_for};
use crate::lab::cpu::{Tree, used_by};
use crate::lab::daemon::Daemon;
use crate::lab::docker::Route;
use crate::lab::image::{Blob, Image, hex};
use crate::lab::netns::{CONGESTION, Host};
use crate::lab::registry::{Access, Registry};
use crate::lab::runner::interrupted;
use crate::lab::skopeo::{self, Credentials};
use crate::lab::world::{self, World};

/// How it is called.
pub const USAGE: &str =
    "usage: cargo xtask bench hit [RUNS]          as root; one JSON line per run; 5 runs unless told";

const RUNS: usize = 5;
const RUNS_MAX: usize = 100;

/// A large layer, which is a stream, and a small one, which is mostly its first byte.
const LAYERS_BYTES: [usize; 2] = [256 << 20, 64 << 10];

/// How often a run asks for the large layer, for 1 GiB: CPU time is counted in ticks of 10 ms.
const STREAMS: usize = 4;

/// How often a run asks for the small one.
const ASKS: usize = 200;

/// What either side does its encryption with. TLS 1.3 has no other choices that cost anything per byte.
const CIPHER: &str = "TLS_AES_128_GCM_SHA256";

const NGINX: &str = "nginx";
const NGINX_ADDRESS: &str = "127.0.0.1:8443";

/// How long nginx may take to listen.
const NGINX_DEADLINE: Duration = Duration::from_secs(10);

/// How long the requests of a run may take: two seconds are usual.
const CURL_DEADLINE: Duration = Duration::from_secs(120);

/// One side of the comparison.
struct Side {
    name: &'static str,
    /// The daemon.
    pid: Pid,
    host: Host,
    ca: PathBuf,
    proxy: Option<String>,
    /// A blob's URL without its digest's hexadecimals.
    url: String,
}

/// One run of one side.
#[derive(Clone, Copy)]
struct Figures {
    first_byte: f64,
    stream_first_byte: f64,
    mib_per_s: f64,
    cpu_per_gib: f64,
}

/// What curl says of one transfer, times in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Transfer {
    bytes: u64,
    /// From the request to the first byte of the answer.
    first_byte: f64,
    /// From the request to the last byte.
    whole: f64,
}

/// Runs it and prints a line per run, the medians, and what the agent has over nginx.
pub async fn hit(args: &[&str], darter: &Path) -> Result<ExitCode> {
    let runs = match args {
        [] => Some(RUNS),
        [runs] => runs.parse().ok().filter(|runs| (1..=RUNS_MAX).contains(runs)),
        _ => None,
    };
    let runs = runs.with_context(|| format!("a number of runs from 1 to {RUNS_MAX} is wanted\n{USAGE}"))?;
    if let Some(tool) = TOOLS.iter().chain(&[NGINX]).find(|tool| !installed(tool)) {
        bail!("{tool} is not installed");
    }
    world::remove_abandoned().await.context("cannot clear up after an earlier lab")?;
    let measured = tokio::select! {
        measured = measure(runs, darter) => measured,
        () = interrupted() => Err(anyhow::anyhow!("interrupted")),
    };
    world::remove().await?;
    measured.map(|()| ExitCode::SUCCESS)
}

async fn measure(runs: usize, darter: &Path) -> Result<()> {
    let mut world = World::new(darter, CONGESTION).await?;
    let registry = Registry::start(&mut world, Access::Open).await?;
    let ca = registry.ca.clone().context("a registry without TLS")?;
    let remote = Remote { name: &registry.name, ca: Some(&ca) };
    let cluster = Cluster::start(&mut world, remote, 1, &Value::Null).await?;
    let agent = cluster.agents.first().context("no agent")?;
    let image = Image::of_noise(&world.directory("image")?, "hit", &LAYERS_BYTES)?;
    let route = Route { registry: &registry.name, ca: &ca, proxy: None };
    skopeo::push(&world, &agent.host, route, Credentials::None, &image, &registry.image("lab/hit")).await?;
    let nginx = Nginx::start(&world, &agent.host, &image).await?;
    let sides = [through(agent, &registry.name)?, nginx.side(&agent.host)];

    let [_, stream, small] = image.blobs.as_slice() else { bail!("not two layers") };
    for side in &sides {
        for blob in [stream, small] {
            side.check(&world, blob).await?;
        }
    }
    let fetched = agent.metrics().await?.from_registry();
    let mut kept: [Vec<Figures>; 2] = Default::default();
    for run in 1..=runs {
        for (side, kept) in sides.iter().zip(&mut kept) {
            let mut line = json!({"mode": "hit", "contestant": side.name, "run": run});
            let tree = Tree::now()?;
            let figures = side.run(stream, small).await?;
            extend(&mut line, figures.json());
            extend(&mut line, json!({"machine_share": rounded(tree.machine_busy_since()?)}));
            println!("{line}");
            kept.push(figures);
        }
    }
    ensure!(agent.metrics().await?.from_registry() == fetched, "the agent asked the registry for bytes that it had");
    let [agent, nginx] = kept.map(|runs| Figures::medians(&runs));
    for (side, median) in sides.iter().zip([agent, nginx]) {
        let mut line = json!({"mode": "hit", "contestant": side.name, "median_of": runs});
        extend(&mut line, median.json());
        println!("{line}");
    }
    println!("{}", agent.over(nginx));
    Ok(())
}

/// The agent, asked as docker asks it.
fn through(agent: &Agent, registry: &str) -> Result<Side> {
    Ok(Side {
        name: "darter",
        pid: agent.pid()?,
        host: agent.host.clone(),
        ca: agent.hijack_ca(),
        proxy: Some(crate::lab::agent::PROXY.to_owned()),
        url: format!("https://{registry}/v2/lab/hit/blobs/sha256:"),
    })
}

/// nginx as Debian configures it where files are concerned, with a single process.
struct Nginx {
    daemon: Daemon,
    ca: PathBuf,
}

impl Nginx {
    async fn start(world: &World, host: &Host, image: &Image) -> Result<Self> {
        let dir = world.directory(NGINX)?;
        let address: std::net::SocketAddrV4 = NGINX_ADDRESS.parse()?;
        let certificates = RegistryCertificates::generate(&dir, *address.ip())?;
        let (shown, blobs) = (dir.display(), image.layout.join("blobs/sha256"));
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let temporary: String = temporary.iter().map(|name| format!("{name}_temp_path {shown}/{name};\n")).collect();
        let config = format!(
            "daemon off;\nmaster_process off;\npid {shown}/pid;\nerror_log {shown}/error.log;\nevents {{}}\nhttp {{\n\
             {temporary}access_log off;\nsendfile on;\ntcp_nopush on;\nserver {{\nlisten {NGINX_ADDRESS} ssl;\n\
             ssl_certificate {};\nssl_certificate_key {};\nssl_protocols TLSv1.3;\nroot {};\n}}\n}}\n",
            certificates.certificate.display(),
            certificates.key.display(),
            blobs.display()
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, config)?;
        let run = host.run(NGINX).arg("-p").arg(&dir).arg("-c").arg(&file);
        let daemon = Daemon::start(NGINX, run, &world.log(NGINX))?;
        let mut nginx = Self { daemon, ca: certificates.ca };
        let side = nginx.side(host);
        let answers = || async { side.curl().args(["--head", &side.url]).output().await.is_ok() };
        let started = wait_for(NGINX, NGINX_DEADLINE, answers).await;
        nginx.daemon.check()?;
        started.map(|()| nginx)
    }

    fn side(&self, host: &Host) -> Side {
        let url = format!("https://{NGINX_ADDRESS}/");
        Side { name: NGINX, pid: self.daemon.pid(), host: host.clone(), ca: self.ca.clone(), proxy: None, url }
    }
}

impl Side {
    fn curl(&self) -> Run {
        let run = self.host.run("curl").args(["-sS", "--http1.1", "--tlsv1.3", "--tls13-ciphers", CIPHER, "--cacert"]);
        let run = run.arg(&self.ca).within(CURL_DEADLINE);
        match &self.proxy {
            Some(proxy) => run.args(["--proxy", proxy]),
            None => run,
        }
    }

    /// Fetches a blob whole, so that it is at hand from then on, and checks it.
    async fn check(&self, world: &World, blob: &Blob) -> Result<()> {
        let file = world.directory("checked")?.join("blob");
        self.curl().arg("--fail").arg("--output").arg(&file).arg(self.blob_url(blob)).output().await?;
        let digest = format!("sha256:{}", hex(&Sha256::digest(fs::read(&file)?)));
        ensure!(digest == blob.digest, "{} sent {digest} for {}", self.name, blob.digest);
        Ok(())
    }

    async fn run(&self, stream: &Blob, small: &Blob) -> Result<Figures> {
        let asked = self.transfers(small, ASKS).await?;
        let (before, started) = (used_by(self.pid)?, Instant::now());
        let streamed = self.transfers(stream, STREAMS).await?;
        let cpu = used_by(self.pid)?.checked_sub(before).context("CPU time ran backwards")?;
        ensure!(started.elapsed() > Duration::from_millis(100), "too fast to be measured");
        let bytes: u64 = streamed.iter().map(|transfer| transfer.bytes).sum();
        let seconds: f64 = streamed.iter().map(|transfer| transfer.whole).sum();
        Ok(Figures {
            first_byte: first_byte(&asked),
            stream_first_byte: first_byte(&streamed),
            mib_per_s: bytes as f64 / f64::from(1 << 20) / seconds,
            cpu_per_gib: cpu.as_secs_f64() / (bytes as f64 / f64::from(1 << 30)),
        })
    }

    /// The same blob so many times on one connection.
    async fn transfers(&self, blob: &Blob, times: usize) -> Result<Vec<Transfer>> {
        let mut run = self.curl().args(["--write-out", Transfer::FORMAT]);
        for _ in 0..times {
            run = run.args(["--output", "/dev/null", &self.blob_url(blob)]);
        }
        let printed = run.output().await?;
        let all: Vec<Transfer> = printed.lines().map(Transfer::read).collect::<Result<_>>()?;
        ensure!(all.len() == times, "curl tells of {} transfers instead of {times}", all.len());
        ensure!(all.iter().all(|transfer| transfer.bytes == blob.bytes), "{} sent less than a blob", self.name);
        Ok(all)
    }

    fn blob_url(&self, blob: &Blob) -> String {
        format!("{}{}", self.url, blob.digest.trim_start_matches("sha256:"))
    }
}

impl Transfer {
    const FORMAT: &str = "%{http_code} %{size_download} %{time_pretransfer} %{time_starttransfer} %{time_total}\\n";

    fn read(line: &str) -> Result<Self> {
        let fields: Vec<&str> = line.split(' ').collect();
        let [status, bytes, asked, first, last] = fields.as_slice() else { bail!("curl printed {line:?}") };
        ensure!(*status == "200", "the answer was {status}");
        let asked: f64 = asked.parse()?;
        let since_asked = |at: &str| Ok::<f64, std::num::ParseFloatError>(at.parse::<f64>()? - asked);
        Ok(Self { bytes: bytes.parse()?, first_byte: since_asked(first)?, whole: since_asked(last)? })
    }
}

impl Figures {
    fn medians(of: &[Self]) -> Self {
        let middle = |get: fn(&Self) -> f64| median(&of.iter().map(get).collect::<Vec<_>>()).unwrap_or_default();
        Self {
            first_byte: middle(|it| it.first_byte),
            stream_first_byte: middle(|it| it.stream_first_byte),
            mib_per_s: middle(|it| it.mib_per_s),
            cpu_per_gib: middle(|it| it.cpu_per_gib),
        }
    }

    fn json(self) -> Value {
        json!({
            "first_byte_ms": rounded(self.first_byte * 1e3),
            "stream_first_byte_ms": rounded(self.stream_first_byte * 1e3),
            "mib_per_s": rounded(self.mib_per_s),
            "cpu_s_per_gib": rounded(self.cpu_per_gib),
        })
    }

    fn over(self, other: Self) -> Value {
        json!({
            "mode": "hit", "contestant": "darter", "over": NGINX,
            "first_byte_later_ms": rounded((self.first_byte - other.first_byte) * 1e3),
            "throughput": rounded(self.mib_per_s / other.mib_per_s),
            "cpu": rounded(self.cpu_per_gib / other.cpu_per_gib),
        })
    }
}

fn first_byte(transfers: &[Transfer]) -> f64 {
    median(&transfers.iter().map(|transfer| transfer.first_byte).collect::<Vec<_>>()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_transfer_counts_from_its_request() {
        let transfer = Transfer::read("200 9 0.5 0.75 1.5").unwrap();
        assert_eq!(transfer, Transfer { bytes: 9, first_byte: 0.25, whole: 1.0 });
        assert!(Transfer::read("404 9 0.5 0.75 1.5").is_err());
        assert!(Transfer::read("200 9 0.5 0.75").is_err());
    }

    #[test]
    fn figures_are_medians_and_ratios() {
        let run =
            |first_byte, mib_per_s, cpu_per_gib| Figures { first_byte, stream_first_byte: 0.0, mib_per_s, cpu_per_gib };
        let own = Figures::medians(&[run(0.003, 80.0, 3.0), run(0.001, 90.0, 1.0), run(0.002, 70.0, 2.0)]);
        let over = own.over(run(0.001, 100.0, 1.0));
        assert_eq!(
            (&over["first_byte_later_ms"], &over["throughput"], &over["cpu"]),
            (&json!(1.0), &json!(0.8), &json!(2.0))
        );
    }
}
