//! Many nodes behind slow links pull one image, and nothing happens to them: the origin sends it once, and the last node has
//! it not much later than one node alone would have.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use darter_swarm::upload::ACTIVE;

use super::crowd::{Crowd, LAYERS_BYTES, MEGABITS, NODES};
use crate::lab::agent::Agent;
use crate::lab::command::wait_for;
use crate::lab::cpu::Ticks;
use crate::lab::image::Image;
use crate::lab::netns::GOODPUT;
use crate::lab::world::World;

/// What the origin may send, over the image.
const ORIGIN_SHARE_MAX: f64 = 1.02;

/// The same where what a slow node has fetched may be lent once more before it has come out: three pieces of 128.
const UNEVEN_SHARE_MAX: f64 = 1.025;

/// How long a node may take to find its way out slow. The pull takes 15 s at the least.
const SLOTS_DEADLINE: Duration = Duration::from_secs(60);

/// The usual crowd, its image, its links.
pub(super) async fn calm(world: &mut World) -> Result<String> {
    undisturbed(world, NODES, MEGABITS, &LAYERS_BYTES).await
}

/// Links on which a piece takes a tenth of a second, and the machine is idle: what goes wrong is not for want of CPU.
pub(super) async fn slow(world: &mut World) -> Result<String> {
    undisturbed(world, 10, 20, &[32 << 20]).await
}

/// As many nodes as two cores carry.
pub(super) async fn many(world: &mut World) -> Result<String> {
    undisturbed(world, 50, 20, &[32 << 20]).await
}

/// One way out has a quarter of the rate of the others. Its node finds that out and gives fewer pieces at a time, which the others
/// do not, and what it alone has fetched still comes to all.
pub(super) async fn uneven(world: &mut World) -> Result<String> {
    let image = Image::build(&world.directory("image")?, "uneven", &[32 << 20])?;
    let crowd = Crowd::gather(world, 10, 20, &image).await?;
    let (slow, others) = crowd.cluster.agents.split_at(1);
    slow[0].host.limit_egress(5).await?;
    let mut pulls = crowd.pull(&image)?;
    let slots = async |agent: &Agent| agent.metrics().await.map(|now| now.total("darter_upload_slots"));
    let fewer = || async { slots(&slow[0]).await.is_ok_and(|slots| (1..=2).contains(&slots)) };
    let found_out = async {
        wait_for("the slow node to give fewer pieces at a time", SLOTS_DEADLINE, fewer).await?;
        futures_util::future::try_join_all(others.iter().map(slots)).await
    };
    let (of_others, finished) = futures_util::future::join(found_out, pulls.finish(|_| true)).await;
    finished?;
    let (of_others, share, served) = (of_others?, crowd.origin_share(&image).await?, pulls.served(|_| true)?);
    let figures = format!("origin {share:.3} x the image; {served}; the others give {of_others:?} at a time");
    // Who has given nothing yet counts none.
    ensure!(of_others.iter().all(|slots| [0, ACTIVE as u64].contains(slots)), "others give fewer as well: {figures}");
    ensure!(share <= UNEVEN_SHARE_MAX, "the origin sent more than {UNEVEN_SHARE_MAX} x the image: {figures}");
    Ok(figures)
}

async fn undisturbed(world: &mut World, nodes: usize, megabits: u32, layers: &[usize]) -> Result<String> {
    let image = Image::build(&world.directory("image")?, "calm", layers)?;
    let crowd = Crowd::gather(world, nodes, megabits, &image).await?;
    let (begin, ticks) = (Instant::now(), Ticks::now()?);
    let mut pulls = crowd.pull(&image)?;
    pulls.finish(|_| true).await?;
    let (took, busy) = (begin.elapsed().as_secs_f64(), ticks.busy_since()? * 100.0);
    // Registry and nodes have the same links, so the slowest is the one that the image has to come through once.
    let bound = image.bytes() as f64 * 8.0 / (f64::from(megabits) * 1e6 * GOODPUT);
    let share = crowd.origin_share(&image).await?;
    let (responses, again) = crowd.origin_work(&image).await?;
    let served = pulls.served(|_| true)?;
    let (sent, received) = crowd.between_peers().await?;
    let figures = format!(
        "{nodes} nodes at {megabits} Mb/s: origin {share:.3} x the image in {responses} responses, {again} bytes of them \
         again; the last after {:.2} x the bound of {bound:.1} s ({took:.1} s with the start of the clients); {served}; \
         peers sent {:.3} x what arrived; cores {busy:.0} % busy",
        served.took.as_secs_f64() / bound,
        sent as f64 / received as f64,
    );
    ensure!(share <= ORIGIN_SHARE_MAX, "the origin sent more than {ORIGIN_SHARE_MAX} x the image: {figures}");
    Ok(figures)
}
