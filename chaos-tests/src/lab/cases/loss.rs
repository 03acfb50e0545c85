//! Agents that are killed while ten nodes pull: everybody else's client finishes, and the origin hardly notices.

use anyhow::{Context as _, Result};

use super::crowd::{Crowd, all_but};
use crate::lab::image::Image;
use crate::lab::world::World;

/// What the origin may send, over the image: once, and a tenth for what died with the killed.
const ORIGIN_SHARE_MAX: f64 = 1.10;

/// The home of the largest layer dies.
pub(super) async fn home(world: &mut World) -> Result<String> {
    let (crowd, image) = Crowd::usual(world, "loss-home").await?;
    let victims = homes(&crowd, &image, 1).await?;
    lose(crowd, &image, &victims).await
}

/// The home of the largest layer and its first stand-by die together.
pub(super) async fn both(world: &mut World) -> Result<String> {
    let (crowd, image) = Crowd::usual(world, "loss-home-and-standby").await?;
    let victims = homes(&crowd, &image, 2).await?;
    lose(crowd, &image, &victims).await
}

/// The two that serve most, of those that are no layer's home, die together.
pub(super) async fn peers(world: &mut World) -> Result<String> {
    let (mut crowd, image) = Crowd::usual(world, "loss-peers").await?;
    let mut spared = Vec::new();
    for blob in &image.blobs {
        spared.extend(crowd.cluster.homes(&blob.digest).await?.first());
    }
    let served_before = served(&crowd).await?;
    let mut pulls = crowd.pull(&image)?;
    let watched = (0..crowd.cluster.agents.len()).find(|node| !spared.contains(node)).context("all are homes")?;
    let share = crowd.wait_for_middle(watched, &image).await?;
    let now = served(&crowd).await?;
    let mut ranked: Vec<(u64, usize)> =
        now.iter().zip(served_before).map(|(now, before)| now - before).zip(0..).collect();
    ranked.retain(|(_, node)| !spared.contains(node));
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    let victims: Vec<usize> = ranked.iter().take(2).map(|(_, node)| *node).collect();
    crowd.cluster.kill(&victims).await?;
    pulls.finish(all_but(&victims)).await?;
    let figures = crowd.judge(&pulls, all_but(&victims), ORIGIN_SHARE_MAX).await?;
    let mib: Vec<u64> = ranked.iter().take(2).map(|(bytes, _)| bytes >> 20).collect();
    Ok(format!("two that had served {mib:?} MiB killed at {:.0} %: {figures}", share * 100.0))
}

async fn lose(mut crowd: Crowd, image: &Image, victims: &[usize]) -> Result<String> {
    let mut pulls = crowd.pull(image)?;
    let first = *victims.first().context("nobody to kill")?;
    let share = crowd.wait_for_middle(first, image).await?;
    crowd.cluster.kill(victims).await?;
    pulls.finish(all_but(victims)).await?;
    let figures = crowd.judge(&pulls, all_but(victims), ORIGIN_SHARE_MAX).await?;
    Ok(format!("killed at {:.0} %: {figures}", share * 100.0))
}

/// The first `count` in rank for the largest layer.
async fn homes(crowd: &Crowd, image: &Image, count: usize) -> Result<Vec<usize>> {
    let mut homes = crowd.cluster.homes(&image.largest()?.digest).await?;
    homes.truncate(count);
    Ok(homes)
}

/// What each node has served to peers since it was started.
async fn served(crowd: &Crowd) -> Result<Vec<u64>> {
    Ok(crowd.cluster.metrics().await?.iter().map(|metrics| metrics.to_peers()).collect())
}
