//! `skopeo copy`, for pushing and as a third kind of client.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use super::command::{Finished, Run};
use super::docker::{PULL_DEADLINE, Route};
use super::image::{Image, hex};
use super::netns::Host;
use super::registry::{PASSWORD, USER};
use super::world::World;

/// Who the client says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// It does not say.
    None,
    /// The registry's user.
    Right,
    /// The registry's user with another password.
    Wrong,
}

impl Credentials {
    /// As `user:password`.
    #[must_use]
    pub fn pair(self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Right => Some(format!("{USER}:{PASSWORD}")),
            Self::Wrong => Some(format!("{USER}:not{PASSWORD}")),
        }
    }
}

/// Pushes `image` as `name` from `host`, blobs and manifest unchanged.
pub async fn push(
    world: &World,
    host: &Host,
    route: Route<'_>,
    credentials: Credentials,
    image: &Image,
    name: &str,
) -> Result<()> {
    let mut run = skopeo(world, host, route.proxy)?.args(["copy", "--quiet", "--preserve-digests", "--dest-cert-dir"]);
    run = run.arg(trust(world, host, route)?);
    if let Some(pair) = credentials.pair() {
        run = run.args(["--dest-creds", &pair]);
    }
    let source = format!("oci:{}:latest", image.layout.display());
    run.arg(source).arg(format!("docker://{name}")).within(PULL_DEADLINE).output().await.map(drop)
}

/// Pushes `image` as `name` from `host` to a registry that speaks plain HTTP.
pub async fn push_plain(world: &World, host: &Host, image: &Image, name: &str) -> Result<()> {
    let run = skopeo(world, host, None)?.args(["copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false"]);
    let source = format!("oci:{}:latest", image.layout.display());
    run.arg(source).arg(format!("docker://{name}")).within(PULL_DEADLINE).output().await.map(drop)
}

/// Pulls `name` into a new directory and checks every blob of `image` in it.
pub async fn pull(
    world: &World,
    host: &Host,
    route: Route<'_>,
    credentials: Credentials,
    image: &Image,
    name: &str,
) -> Result<()> {
    let target = world.directory(&format!("{}-skopeo", host.name))?;
    let _ = fs::remove_dir_all(&target);
    let finished = pull_to(world, host, route, credentials, name, &target).await?;
    ensure!(finished.code == 0, "skopeo ended with {}: {}", finished.code, finished.stderr);
    for blob in &image.blobs {
        let file = target.join(blob.digest.trim_start_matches("sha256:"));
        let bytes = fs::read(&file).with_context(|| format!("skopeo did not write {}", blob.digest))?;
        ensure!(format!("sha256:{}", hex(&Sha256::digest(&bytes))) == blob.digest, "{} is wrong", blob.digest);
    }
    fs::remove_dir_all(&target).context("cannot remove what skopeo pulled")
}

/// Pulls `name` into `target`, whatever comes of it.
pub async fn pull_to(
    world: &World,
    host: &Host,
    route: Route<'_>,
    credentials: Credentials,
    name: &str,
    target: &Path,
) -> Result<Finished> {
    let mut run = skopeo(world, host, route.proxy)?.args(["copy", "--quiet", "--preserve-digests", "--src-cert-dir"]);
    run = run.arg(trust(world, host, route)?);
    if let Some(pair) = credentials.pair() {
        run = run.args(["--src-creds", &pair]);
    }
    let run = run.arg(format!("docker://{name}")).arg(format!("dir:{}", target.display()));
    run.within(PULL_DEADLINE).finish().await
}

fn skopeo(world: &World, host: &Host, proxy: Option<&str>) -> Result<Run> {
    // Of its own, so that neither the user's logins nor the user's policy play a part.
    let home = world.directory("skopeo-home")?;
    let run = host.run("skopeo").env("HOME", &home).env("XDG_RUNTIME_DIR", &home).env("TMPDIR", &home);
    let run = run.arg("--insecure-policy");
    Ok(match proxy {
        Some(proxy) => run.env("HTTPS_PROXY", proxy),
        None => run,
    })
}

/// A directory as skopeo's `--cert-dir` wants it: any `*.crt` in it is trusted.
fn trust(world: &World, host: &Host, route: Route<'_>) -> Result<PathBuf> {
    let dir = world.directory(&format!("{}-trust", host.name))?;
    fs::copy(route.ca, dir.join("ca.crt")).context("cannot copy the certificate authority")?;
    Ok(dir)
}
