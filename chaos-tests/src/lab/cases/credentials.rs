//! A cached private blob stays private (D8): the cache gives nobody what the registry would refuse him.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use super::stage::{LAYERS_BYTES, Stage};
use crate::lab::agent::{Agent, PROXY};
use crate::lab::command::Run;
use crate::lab::image::{Blob, hex};
use crate::lab::registry::Access;
use crate::lab::skopeo::{self, Credentials};
use crate::lab::world::World;

/// The largest answer that may be a refusal: the registry's own is some 100 bytes of JSON.
const REFUSAL_MAX_BYTES: usize = 2048;

/// How a client asks the agent for a blob.
#[derive(Clone, Copy, Debug)]
enum Door {
    /// As an HTTPS proxy that is hijacked, like docker.
    Proxy,
    /// As a mirror, like containerd.
    Mirror,
}

/// What came back.
struct Answer {
    status: String,
    body: Vec<u8>,
}

/// Two agents hold a private image. Without or with wrong credentials neither gives a byte of it, by either door; with
/// the right ones both do, without asking the registry for blob bytes.
pub(super) async fn credentials(world: &mut World) -> Result<String> {
    let mut stage = Stage::set(world, Access::Password, 2, "private", &LAYERS_BYTES).await?;
    stage.pull_all(world, &stage.cluster.agents).await?;
    let before = stage.registry.sent().await?;
    let mut refused = 0;
    for agent in &stage.cluster.agents {
        let served = agent.metrics().await?.total("darter_client_sent_bytes_total");
        for credentials in [Credentials::None, Credentials::Wrong] {
            for blob in &stage.image.blobs {
                for door in [Door::Proxy, Door::Mirror] {
                    let answer = ask(world, &stage, agent, door, credentials, blob).await?;
                    expect_refusal(&stage, blob, &answer)
                        .with_context(|| format!("{credentials:?} by {door:?} on {}", agent.host.name))?;
                    refused += 1;
                }
            }
            let target = world.directory("refused")?;
            let ca = agent.hijack_ca();
            let pull = skopeo::pull_to(world, &agent.host, agent.route(&ca), credentials, &stage.name, &target).await?;
            ensure!(pull.code != 0, "skopeo pulled a private image with credentials {credentials:?}");
        }
        let now = agent.metrics().await?.total("darter_client_sent_bytes_total");
        ensure!(now == served, "{} blob bytes went to clients without credentials", now - served);
        let blob = stage.image.largest()?;
        for door in [Door::Proxy, Door::Mirror] {
            let answer = ask(world, &stage, agent, door, Credentials::Right, blob).await?;
            ensure!(answer.status == "200", "right credentials by {door:?}: {}", answer.status);
            let digest = format!("sha256:{}", hex(&Sha256::digest(&answer.body)));
            ensure!(digest == blob.digest, "right credentials by {door:?}: {digest} instead of {}", blob.digest);
        }
    }
    let sent = stage.registry.sent_since(before).await?;
    ensure!(sent.blob_bytes == 0, "a cached blob took {} bytes from the registry", sent.blob_bytes);
    ensure!(sent.unauthorized > 0, "nobody asked the registry about the wrong credentials");
    Ok(format!("{refused} requests refused without a byte, the right ones answered from the cache"))
}

async fn ask(
    world: &World,
    stage: &Stage,
    agent: &Agent,
    door: Door,
    credentials: Credentials,
    blob: &Blob,
) -> Result<Answer> {
    let path = format!("v2/lab/private/blobs/{}", blob.digest);
    let registry = &stage.registry.name;
    let run: Run = match door {
        Door::Proxy => agent.curl_proxied().arg(format!("https://{registry}/{path}")),
        Door::Mirror => {
            let url = format!("{PROXY}/{path}?ns={registry}");
            agent.host.run("curl").args(["-sS", "--max-time", "60"]).arg(url)
        }
    };
    let file = world.directory("answers")?.join("body");
    let mut run = run.args(["--write-out", "%{http_code}", "--output"]).arg(&file);
    if let Some(pair) = credentials.pair() {
        run = run.args(["--user", &pair]);
    }
    fs::write(&file, "")?;
    let status = run.output().await?;
    Ok(Answer { status, body: fs::read(&file)? })
}

fn expect_refusal(stage: &Stage, blob: &Blob, answer: &Answer) -> Result<()> {
    ensure!(answer.status == "401", "the answer for {} was {}", blob.digest, answer.status);
    ensure!(answer.body.len() <= REFUSAL_MAX_BYTES, "{} bytes came with the 401", answer.body.len());
    let content = fs::read(stage.image.layout.join("blobs").join(blob.digest.replace(':', "/")))?;
    ensure!(answer.body.is_empty() || !content.starts_with(&answer.body), "the 401 came with bytes of the blob");
    Ok(())
}
