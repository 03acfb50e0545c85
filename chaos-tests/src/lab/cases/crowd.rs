//! Many nodes with slow links that pull one image at the same moment, so that something can happen in the middle of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::future::try_join_all;
use serde_json::Value;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use crate::lab::agent::{Cluster, Metrics, Remote};
use crate::lab::client::{Pulled, Received};
use crate::lab::command::wait_for;
use crate::lab::cpu::Ticks;
use crate::lab::image::Image;
use crate::lab::origin::{Coverage, Origin};
use crate::lab::world::World;

/// Nodes of the usual crowd.
pub(super) const NODES: usize = 10;

/// Every link of it, in each direction, the origin's too: ten nodes at this rate are about what two cores can carry.
pub(super) const MEGABITS: u32 = 100;

/// The layers of noise of the usual image, which has 64 MiB with busybox: the largest first, for the middle of the pull to
/// be in the middle of it.
pub(super) const LAYERS_BYTES: [usize; 4] = [(28 << 20) + 4321, 17 << 20, 10 << 20, 7 << 20];

/// What a node has received when the pull is in its middle: a quarter of the image.
const MIDDLE_BYTES: u64 = 16 << 20;

/// How long until it has. Undisturbed and idle it takes 2 s.
const MIDDLE_DEADLINE: Duration = Duration::from_secs(60);

/// The longest that a client may be left without a byte. What is aimed at is 0.5 s after a death and 1 s beside a frozen
/// node; this is for a machine of two cores that does other things as well.
const STALL_MAX: Duration = Duration::from_secs(5);

/// The pull that nothing happened to, measured once per run of the lab.
static CALM: OnceCell<Served> = OnceCell::const_new();

/// Agents, clients and an origin behind links that are limited.
pub(super) struct Crowd {
    pub(super) cluster: Cluster,
    pub(super) origin: Origin,
    /// What each node had received before the pull that matters.
    received_before: Vec<u64>,
}

/// How clients were served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Served {
    /// The slowest client's time.
    pub(super) took: Duration,
    /// The longest wait for a first byte.
    first_byte: Duration,
    /// The longest wait within a response: of half of them, of all but a hundredth, and of any.
    stalls: [Duration; 3],
}

impl Crowd {
    /// Nodes with links of `megabits`, and an origin with all images of one layout.
    pub(super) async fn gather(world: &mut World, nodes: usize, megabits: u32, images: &Image) -> Result<Self> {
        let origin = Origin::start(world, images).await?;
        let remote = Remote { name: &origin.name, ca: None };
        let cluster = Cluster::start(world, remote, nodes, &Value::Null).await?;
        let crowd = Self::of(cluster, origin);
        crowd.limit(megabits).await?;
        Ok(crowd)
    }

    /// Nodes that nobody has pulled through yet, and their origin.
    pub(super) fn of(cluster: Cluster, origin: Origin) -> Self {
        let received_before = vec![0; cluster.agents.len()];
        Self { cluster, origin, received_before }
    }

    /// Limits every link, the origin's too, to `megabits` per second in each direction.
    pub(super) async fn limit(&self, megabits: u32) -> Result<()> {
        let hosts = self.cluster.agents.iter().map(|agent| &agent.host).chain([&self.origin.host]);
        try_join_all(hosts.map(|host| host.limit(megabits))).await.map(drop)
    }

    /// The usual crowd and its image, which nobody has pulled. Before, if that is not known yet, it is measured how a pull
    /// goes that nothing happens to.
    pub(super) async fn usual(world: &mut World, greeting: &str) -> Result<(Self, Image)> {
        let layout = world.directory("image")?;
        let calm = Image::build(&layout, "calm", &LAYERS_BYTES)?;
        let image = Image::build(&layout, greeting, &LAYERS_BYTES)?;
        let mut crowd = Self::gather(world, NODES, MEGABITS, &image).await?;
        CALM.get_or_try_init(|| crowd.measure_calm(&calm)).await?;
        crowd.received_before = try_join_all((0..NODES).map(|node| crowd.received(node))).await?;
        Ok((crowd, image))
    }

    async fn measure_calm(&self, image: &Image) -> Result<Served> {
        let mut pulls = self.pull(image)?;
        pulls.finish(|_| true).await.context("before anything had happened")?;
        pulls.served(|_| true)
    }

    /// A client on every node begins to pull.
    pub(super) fn pull(&self, image: &Image) -> Result<Pulls> {
        let mut running = JoinSet::new();
        for (node, agent) in self.cluster.agents.iter().enumerate() {
            let client = agent.client(&image.manifest)?;
            running.spawn(async move { (node, client.pull().await) });
        }
        Ok(Pulls { running, ended: BTreeMap::new(), image: image.clone(), began: Ticks::now()? })
    }

    /// Blob bytes that a node has received from anywhere since it was started.
    pub(super) async fn received(&self, node: usize) -> Result<u64> {
        let metrics = self.cluster.agents.get(node).context("no such node")?.metrics().await?;
        Ok(metrics.from_peers() + metrics.from_registry())
    }

    /// Waits until a node has received so much more than `before`.
    pub(super) async fn wait_for_bytes(&self, node: usize, before: u64, bytes: u64) -> Result<()> {
        let there = || async { self.received(node).await.is_ok_and(|now| now >= before + bytes) };
        wait_for(&format!("node {node} to receive {bytes} bytes"), MIDDLE_DEADLINE, there).await
    }

    /// Waits until a node is in the middle of its pull, and returns which share of the image the origin has sent by then.
    /// An error if it had nothing of the largest layer left to send: then it is too late for trouble.
    pub(super) async fn wait_for_middle(&self, node: usize, image: &Image) -> Result<f64> {
        self.wait_for_bytes(node, self.received_before[node], MIDDLE_BYTES).await?;
        let largest = image.largest()?;
        let sent = self.sent(image).await?;
        ensure!(
            sent[&largest.digest].distinct_bytes < largest.bytes,
            "the pull was too fast to be disturbed: {sent:?}"
        );
        Ok(sent.values().map(|blob| blob.distinct_bytes).sum::<u64>() as f64 / image.bytes() as f64)
    }

    /// Blob bytes that the origin sent over those that the image has.
    pub(super) async fn origin_share(&self, image: &Image) -> Result<f64> {
        let sent = self.sent(image).await?;
        Ok(sent.values().map(|blob| blob.sent_bytes).sum::<u64>() as f64 / image.bytes() as f64)
    }

    /// Responses of the origin with bytes of the image, and bytes in them that it had sent before.
    pub(super) async fn origin_work(&self, image: &Image) -> Result<(usize, u64)> {
        let sent = self.sent(image).await?;
        Ok((sent.values().map(|blob| blob.responses).sum(), sent.values().map(Coverage::again_bytes).sum()))
    }

    /// Piece bytes that the nodes sent to each other, and those of them that arrived.
    pub(super) async fn between_peers(&self) -> Result<(u64, u64)> {
        let all = self.cluster.metrics().await?;
        Ok((all.iter().map(Metrics::to_peers).sum(), all.iter().map(Metrics::from_peers).sum()))
    }

    async fn sent(&self, image: &Image) -> Result<BTreeMap<String, Coverage>> {
        let sent = self.origin.sent().await?;
        let covered = |digest: &String| Coverage::of(sent.get(digest).map(Vec::as_slice).unwrap_or_default());
        Ok(image.blobs.iter().map(|blob| (blob.digest.clone(), covered(&blob.digest))).collect())
    }

    /// Checks what the origin sent and how the clients of `whose` were served, all of whom have finished.
    pub(super) async fn judge(&self, pulls: &Pulls, whose: impl Fn(usize) -> bool, share_max: f64) -> Result<String> {
        let busy = pulls.began.busy_since()?;
        let (share, served) = (self.origin_share(&pulls.image).await?, pulls.served(whose)?);
        let calm = *CALM.get().context("nothing to compare with")?;
        let figures =
            format!("origin {share:.3} x the image, {served}; calm: {calm}; cores {:.0} % busy", busy * 100.0);
        ensure!(share <= share_max, "the origin sent more than {share_max} x the image: {figures}");
        ensure!(served.stalls[2] <= STALL_MAX + calm.stalls[2], "a client was left without a byte: {figures}");
        Ok(figures)
    }
}

/// A pull on every node, under way or ended.
pub(super) struct Pulls {
    running: JoinSet<(usize, Result<Pulled>)>,
    ended: BTreeMap<usize, Result<Pulled>>,
    image: Image,
    began: Ticks,
}

impl Pulls {
    /// Waits for the clients of `whose`. An error names every one of them that did not get the whole image.
    pub(super) async fn finish(&mut self, whose: impl Fn(usize) -> bool) -> Result<()> {
        let all = self.running.len() + self.ended.len();
        while !(0..all).filter(|node| whose(*node)).all(|node| self.ended.contains_key(&node)) {
            let (node, pulled) = self.running.join_next().await.context("a client without an end")??;
            self.ended.insert(node, pulled);
        }
        let of_these = self.ended.iter().filter(|(node, _)| whose(**node));
        let checked = of_these.map(|(node, pulled)| match pulled {
            Ok(pulled) => pulled.check(&self.image).map_err(|error| format!("node {node}: {error:#}")),
            Err(error) => Err(format!("node {node}: {error:#}")),
        });
        let failures: Vec<String> = checked.filter_map(Result::err).collect();
        if !failures.is_empty() {
            bail!("{} clients failed: {}", failures.len(), failures.join("; "));
        }
        Ok(())
    }

    /// How the clients of `whose` were served, of those that have finished.
    pub(super) fn served(&self, whose: impl Fn(usize) -> bool) -> Result<Served> {
        let finished =
            self.ended.iter().filter(|(node, _)| whose(**node)).filter_map(|(_, pulled)| pulled.as_ref().ok());
        let finished: Vec<&Pulled> = finished.collect();
        let responses: Vec<&Received> = finished.iter().flat_map(|pulled| &pulled.blobs).collect();
        let mut gaps: Vec<Duration> = responses.iter().map(|response| response.longest_gap).collect();
        gaps.sort_unstable();
        let rank = |percent: usize| gaps.get((gaps.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Ok(Served {
            took: finished.iter().map(|pulled| pulled.took).max().context("nobody finished")?,
            first_byte: responses.iter().map(|response| response.first_byte).max().unwrap_or_default(),
            stalls: [50, 99, 100].map(|percent| rank(percent).unwrap_or_default()),
        })
    }
}

impl std::fmt::Display for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [half, most, all] = self.stalls.map(|stall| stall.as_secs_f64());
        let (took, first_byte) = (self.took.as_secs_f64(), self.first_byte.as_secs_f64());
        write!(f, "{took:.1} s, stalls p50 {half:.2} p99 {most:.2} max {all:.2} s, first byte {first_byte:.2} s")
    }
}

/// Everybody but these.
pub(super) fn all_but(these: &[usize]) -> impl Fn(usize) -> bool + use<'_> {
    |node| !these.contains(&node)
}

/// Time since, for things that are to last.
pub(super) async fn until(since: Instant, passed: Duration) {
    tokio::time::sleep_until((since + passed).into()).await;
}
