//! Every agent ends once, one after the other, each in the middle of a cold pull by all nodes.

use anyhow::{Result, ensure};

use super::crowd::{Crowd, NODES, all_but};
use crate::lab::image::Image;
use crate::lab::world::World;

/// Every link, in each direction.
const MEGABITS: u32 = 100;

/// The layers of noise of each image: with busybox, ten images are 64 MiB.
const LAYERS_BYTES: [usize; 2] = [3 << 20, (1 << 20) + 4321];

/// What a node has received of an image when it ends.
const MIDDLE_BYTES: u64 = 1 << 20;

/// What the origin may send, over the images. Each is small, so what one agent took with it weighs more than in the other
/// cases: three pieces of 256 KiB are a tenth.
const ORIGIN_SHARE_MAX: f64 = 1.25;

/// Nodes of which each is killed.
const NODES_KILLED: usize = 20;

/// How an agent ends.
#[derive(Clone, Copy)]
enum End {
    /// SIGTERM, as at an upgrade.
    Stop,
    /// SIGKILL.
    Kill,
}

/// Ten agents are restarted as at an upgrade.
pub(super) async fn rolling(world: &mut World) -> Result<String> {
    each_in_turn(world, NODES, "rolling", End::Stop).await
}

/// Twenty agents are killed and started again.
pub(super) async fn each_killed(world: &mut World) -> Result<String> {
    each_in_turn(world, NODES_KILLED, "each-killed", End::Kill).await
}

/// Only the clients whose agent ends may be cut off; in the end every node pulls everything.
async fn each_in_turn(world: &mut World, nodes: usize, name: &str, end: End) -> Result<String> {
    let layout = world.directory("image")?;
    let images = (0..nodes).map(|turn| Image::build(&layout, &format!("{name} {turn}"), &LAYERS_BYTES));
    let images = images.collect::<Result<Vec<Image>>>()?;
    let mut crowd = Crowd::gather(world, nodes, MEGABITS, &images[0]).await?;
    for (victim, image) in images.iter().enumerate() {
        let before = crowd.received(victim).await?;
        let mut pulls = crowd.pull(image)?;
        crowd.wait_for_bytes(victim, before, MIDDLE_BYTES).await?;
        let agent = &mut crowd.cluster.agents[victim];
        match end {
            End::Stop => agent.stop().await?,
            End::Kill => agent.kill().await?,
        }
        agent.resume().await?;
        pulls.finish(all_but(&[victim])).await?;
    }
    let mut shares = Vec::new();
    for image in &images {
        crowd.pull(image)?.finish(|_| true).await?;
        shares.push(crowd.origin_share(image).await?);
    }
    let share = shares.iter().sum::<f64>() / shares.len() as f64;
    let worst = shares.iter().copied().fold(0.0, f64::max);
    ensure!(share <= ORIGIN_SHARE_MAX, "the origin sent {share:.3} x the images: {shares:.3?}");
    Ok(format!("{nodes} agents in turn, all others finished, origin {share:.3} x the images, at most {worst:.3} x one"))
}
