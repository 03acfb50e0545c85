//! Fifty nodes on one machine pull one layer, and the origin sends it once.

use anyhow::{Result, ensure};

use super::crowd::Crowd;
use crate::lab::cpu::Ticks;
use crate::lab::image::Image;
use crate::lab::world::World;

/// Agents, clients and links.
const NODES: usize = 50;

/// The layer.
const LAYER_BYTES: usize = 32 << 20;

/// Every link, in each direction: slow enough for two cores to carry fifty.
const MEGABITS: u32 = 20;

/// What the origin may send, over the image.
const ORIGIN_SHARE_MAX: f64 = 1.02;

/// All clients finish, with every byte right, and the origin sends the image about once.
pub(super) async fn many(world: &mut World) -> Result<String> {
    let image = Image::build(&world.directory("image")?, "many", &[LAYER_BYTES])?;
    let crowd = Crowd::gather(world, NODES, MEGABITS, &image).await?;
    let (begin, ticks) = (std::time::Instant::now(), Ticks::now()?);
    let mut pulls = crowd.pull(&image)?;
    pulls.finish(|_| true).await?;
    let (took, busy) = (begin.elapsed().as_secs_f64(), ticks.busy_since()? * 100.0);
    let share = crowd.origin_share(&image).await?;
    let figures = format!("{NODES} nodes in {took:.1} s, origin {share:.3} x the image, cores {busy:.0} % busy");
    ensure!(share <= ORIGIN_SHARE_MAX, "the origin sent more than {ORIGIN_SHARE_MAX} x the image: {figures}");
    Ok(figures)
}
