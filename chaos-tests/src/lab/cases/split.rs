//! A network that falls in two halves and comes together again.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::Result;
use futures_util::future::try_join_all;

use super::crowd::{Crowd, NODES, until};
use crate::lab::netns::Host;
use crate::lab::world::World;

/// For this long: long enough for each half to declare the other dead, about as long as the rest of the pull takes.
const SPLIT: Duration = Duration::from_secs(15);

/// What the origin may send, over the image: once to each half, and a tenth.
const ORIGIN_SHARE_MAX: f64 = 2.10;

/// Five nodes and five nodes do not reach each other for a while, in the middle of a pull; both reach the origin.
pub(super) async fn split(world: &mut World) -> Result<String> {
    let (crowd, image) = Crowd::usual(world, "split").await?;
    let mut pulls = crowd.pull(&image)?;
    let share = crowd.wait_for_middle(0, &image).await?;
    let hosts: Vec<&Host> = crowd.cluster.agents.iter().map(|agent| &agent.host).collect();
    let (left, right) = hosts.split_at(NODES / 2);
    let others: Vec<Ipv4Addr> = right.iter().map(|host| host.address).collect();
    try_join_all(left.iter().map(|host| host.part_from(&others))).await?;
    let since = Instant::now();
    let reunite = async {
        until(since, SPLIT).await;
        try_join_all(left.iter().map(|host| host.reunite())).await
    };
    let finish = async {
        pulls.finish(|_| true).await?;
        Ok(since.elapsed())
    };
    let (finished, _) = futures_util::future::try_join(finish, reunite).await?;
    let figures = crowd.judge(&pulls, |_| true, ORIGIN_SHARE_MAX).await?;
    let (share, finished) = (share * 100.0, finished.as_secs_f64());
    Ok(format!("split at {share:.0} % for {} s, all finished {finished:.1} s later: {figures}", SPLIT.as_secs()))
}
