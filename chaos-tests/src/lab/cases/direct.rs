//! The lab itself: three kinds of clients pull without any agent, and the oracle must notice.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::stage::LAYERS_BYTES;
use crate::lab::containerd::Containerd;
use crate::lab::docker::{Docker, Route};
use crate::lab::image::Image;
use crate::lab::oracle::ColdPull;
use crate::lab::registry::{self, Access, Registry};
use crate::lab::skopeo::{self, Credentials};
use crate::lab::world::World;

/// A rate at which the pull of one image visibly takes its time.
const SLOW_MEGABITS: u32 = 400;

/// The least time that one image can take at that rate. Its queue's burst of 256 KiB is nothing beside it.
fn slowest(bytes: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 * 8.0 / 1e6 / f64::from(SLOW_MEGABITS))
}

/// Direct pulls work, each is counted as exactly one image, and the oracle refuses them as a swarm's work. A link that
/// is limited is slow, and one that is cut carries nothing.
pub(super) async fn direct(world: &mut World) -> Result<String> {
    let mut registry = Registry::start(world, Access::Open).await?;
    let (ca, address) = (registry.ca.clone().context("a registry without TLS")?, registry.name.clone());
    let route = Route { registry: &address, ca: &ca, proxy: None };
    let hosts = [world.host("h1").await?, world.host("h2").await?, world.host("h3").await?];
    let image = Image::build(&world.directory("image")?, "direct", &LAYERS_BYTES)?;
    let name = registry.image("lab/direct");
    skopeo::push(world, &hosts[0], route, Credentials::None, &image, &name).await?;
    ensure!(registry.sent().await?.blob_bytes == 0, "a push is counted as a pull");

    let docker = Docker::start(world, &hosts[0], route).await?;
    docker.pull(&name).await?;
    docker.verify(&name, &image).await?;
    docker.stop().await?;
    let sent = registry.sent().await?;
    ensure!(sent.blob_bytes == image.bytes(), "docker pulled {} bytes, counted are {sent:?}", image.bytes());

    let mirror = format!("https://{address}");
    let containerd = Containerd::start(world, &hosts[1], &address, &mirror, Some(&ca)).await?;
    containerd.pull(&name).await?;
    containerd.verify(&name, &image).await?;
    containerd.stop().await?;

    registry.host.limit_egress(SLOW_MEGABITS).await?;
    let start = Instant::now();
    skopeo::pull(world, &hosts[2], route, Credentials::None, &image, &name).await?;
    ensure!(start.elapsed() >= slowest(image.bytes()), "a limited link carried an image in {:?}", start.elapsed());
    let sent = registry.sent().await?;
    ensure!(sent.blob_bytes == 3 * image.bytes(), "three clients pulled {} bytes each, {sent:?}", image.bytes());
    let pull = ColdPull {
        image_bytes: image.bytes(),
        registry_bytes: sent.blob_bytes,
        peer_bytes: vec![0, 0, 0],
        fallbacks: 0,
    };
    ensure!(pull.check().is_err(), "the oracle takes three direct pulls for the work of a swarm");
    let [connected, .., cut] = &hosts;
    cut.cut_off(&[registry::PORT]).await?;
    ensure!(registry.answers(connected).await, "the registry does not answer any more");
    ensure!(!registry.answers(cut).await, "the registry answers over a link that was cut");
    registry.stop().await?;
    Ok(format!("docker, containerd and skopeo: 1 x {} MiB each", image.bytes() >> 20))
}
