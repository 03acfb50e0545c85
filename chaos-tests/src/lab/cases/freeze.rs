//! Agents that stop for a while and come back, with all their connections and everything they believed.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::crowd::{Crowd, NODES, all_but, until};
use crate::lab::world::World;

/// For this long at least: long enough for them to be declared dead, and to find that out.
const FROZEN: Duration = Duration::from_secs(20);

/// What the origin may send, over the image. More than beside a killed agent: the kernel of a frozen one goes on taking in
/// what was asked of the registry, as much as its receive buffers hold, and others have to fetch that again. Seen in 8
/// runs: 1.02 to 1.10 before the thaw and 1.02 to 1.13 after it; in one with 1.116, pieces that two agents wrote were 0.03.
const ORIGIN_SHARE_MAX: f64 = 1.20;

/// Three of ten agents freeze, among them the home of the largest layer. All other clients finish meanwhile, their own
/// wait and finish afterwards.
pub(super) async fn freeze(world: &mut World) -> Result<String> {
    let (crowd, image) = Crowd::usual(world, "freeze").await?;
    let home = *crowd.cluster.homes(&image.largest()?.digest).await?.first().context("no home")?;
    let frozen = [home, (home + 1) % NODES, (home + 2) % NODES];
    let mut pulls = crowd.pull(&image)?;
    let share = crowd.wait_for_middle(home, &image).await?;
    for node in frozen {
        crowd.cluster.agents[node].freeze(true)?;
    }
    let since = Instant::now();
    pulls.finish(all_but(&frozen)).await.context("while three were frozen")?;
    let others = crowd.judge(&pulls, all_but(&frozen), ORIGIN_SHARE_MAX).await?;
    until(since, FROZEN).await;
    let lasted = since.elapsed();
    for node in frozen {
        crowd.cluster.agents[node].freeze(false)?;
    }
    let thawed = Instant::now();
    pulls.finish(|_| true).await.context("after the thaw")?;
    let took = thawed.elapsed().as_secs_f64();
    let share_after = crowd.origin_share(&image).await?;
    anyhow::ensure!(share_after <= ORIGIN_SHARE_MAX, "origin {share_after:.3} x after the thaw, before: {others}");
    Ok(format!(
        "three frozen at {:.0} % for {:.0} s: {others}; they finished {took:.1} s later, origin {share_after:.3} x",
        share * 100.0,
        lasted.as_secs_f64()
    ))
}
