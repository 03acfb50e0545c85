//! Many nodes behind slow links pull one image, and nothing happens to them: the origin sends it once, and the last node has
//! it not much later than one node alone would have.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::crowd::{Crowd, LAYERS_BYTES, MEGABITS, NODES};
use crate::lab::cpu::Ticks;
use crate::lab::image::Image;
use crate::lab::netns::GOODPUT;
use crate::lab::world::World;

/// What the origin may send, over the image.
const ORIGIN_SHARE_MAX: f64 = 1.02;

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
