//! A registry that knows byte for byte what it has sent. docker-registry's log has no ranges, and its sockets buffer
//! megabytes, so what was asked for twice cannot be told from what was sent twice.

mod ledger;
mod serve;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};

pub use ledger::{Coverage, Response};
pub use serve::serve;

use super::command::wait_for;
use super::daemon::Daemon;
use super::image::Image;
use super::netns::Host;
use super::world::World;

/// The origin's port.
const PORT: u16 = 5080;

/// How long it may take to listen.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// A running origin.
#[derive(Debug)]
pub struct Origin {
    /// Where it runs.
    pub host: Host,
    /// What it is called in image names.
    pub name: String,
    _daemon: Daemon,
}

impl Origin {
    /// Serves one image's layout over plain HTTP on a new host, under every repository name.
    pub async fn start(world: &mut World, image: &Image) -> Result<Self> {
        let host = world.host("origin").await?;
        let address = SocketAddr::from((host.address, PORT));
        // This very program, which is thus the only one that the host needs.
        let program = std::env::current_exe()?;
        let program = program.to_str().context("the path of this program is not UTF-8")?;
        let run = host.run(program).args(["origin", &address.to_string()]).arg(&image.layout);
        let daemon = Daemon::start("origin", run, &world.log("origin"))?;
        let origin = Self { host, name: address.to_string(), _daemon: daemon };
        wait_for("the origin to answer", START_DEADLINE, || async { origin.sent().await.is_ok() }).await?;
        Ok(origin)
    }

    /// What was sent so far, by digest, responses still under way included.
    pub async fn sent(&self) -> Result<BTreeMap<String, Vec<Response>>> {
        let url = format!("http://{}{}", self.name, serve::LEDGER_PATH);
        let text = self.host.run("curl").args(["-sS", "--fail", "--max-time", "5", &url]).output().await?;
        ledger::read(&text)
    }
}
