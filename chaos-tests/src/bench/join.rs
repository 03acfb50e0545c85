//! The client of aria2 and rqbit: it hands the running daemon of its host a torrent at a given moment and says when the daemon
//! had all of it. The daemons run before that, as agents do.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::lab::client::http::Body;
use crate::lab::client::{Pulled, wait_until};

/// Where aria2's interface listens on its host.
pub const ARIA2_API: &str = "127.0.0.1:6800";

/// Where rqbit's does.
pub const RQBIT_API: &str = "127.0.0.1:3030";

/// How often the daemon is asked whether it is done; on average a pull seems half of this longer than it was, which is a
/// fiftieth of a second for pulls of more than ten.
const POLL_INTERVAL: Duration = Duration::from_millis(40);

/// Whose daemon is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// aria2's JSON-RPC.
    Aria2,
    /// rqbit's HTTP API.
    Rqbit,
}

impl Api {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Aria2 => "aria2",
            Self::Rqbit => "rqbit",
        }
    }

    /// By name.
    pub fn read(name: &str) -> Result<Self> {
        let found = [Self::Aria2, Self::Rqbit].into_iter().find(|api| api.name() == name);
        found.with_context(|| format!("{name} has no interface that is known here"))
    }

    /// Adds a torrent; what comes back names it.
    async fn add(self, torrent: &[u8]) -> Result<String> {
        match self {
            Self::Aria2 => {
                let gid = call("aria2.addTorrent", &json!([STANDARD.encode(torrent)])).await?;
                Ok(gid.as_str().context("no name of the download")?.to_owned())
            }
            Self::Rqbit => {
                // Files that are there are looked at and completed: for the seeder that is all of them.
                let answer = Body::post(RQBIT_API, "/torrents?overwrite=true", torrent).await?.whole().await?;
                let answer: Value = serde_json::from_slice(&answer)?;
                Ok(answer["id"].as_u64().context("no name of the torrent")?.to_string())
            }
        }
    }

    /// Whether all of it is there.
    async fn has(self, name: &str) -> Result<bool> {
        match self {
            Self::Aria2 => {
                let keys = json!([name, ["status", "completedLength", "totalLength", "errorMessage"]]);
                let status = call("aria2.tellStatus", &keys).await?;
                if status["status"] == "error" {
                    bail!("aria2 gave up: {}", status["errorMessage"]);
                }
                Ok(status["totalLength"] != "0" && status["completedLength"] == status["totalLength"])
            }
            Self::Rqbit => {
                let body = Body::get(RQBIT_API, &format!("/torrents/{name}/stats/v1")).await?.whole().await?;
                let stats: Value = serde_json::from_slice(&body)?;
                if !stats["error"].is_null() {
                    bail!("rqbit gave up: {}", stats["error"]);
                }
                Ok(stats["finished"] == true)
            }
        }
    }
}

/// Hands the torrent over, at once or at a given moment, and waits until all of it is there.
pub async fn join(api: Api, torrent: &Path, at: Option<SystemTime>) -> Result<Pulled> {
    let torrent = std::fs::read(torrent)?;
    if let Some(at) = at {
        wait_until(at).await;
    }
    let (began, begin) = (SystemTime::now(), Instant::now());
    let name = api.add(&torrent).await?;
    while !api.has(&name).await? {
        sleep(POLL_INTERVAL).await;
    }
    Ok(Pulled { blobs: Vec::new(), began, took: begin.elapsed() })
}

async fn call(method: &str, params: &Value) -> Result<Value> {
    let request = json!({"jsonrpc": "2.0", "id": "bench", "method": method, "params": params});
    let answer = Body::post(ARIA2_API, "/jsonrpc", request.to_string().as_bytes()).await?.whole().await?;
    let mut answer: Value = serde_json::from_slice(&answer)?;
    if !answer["error"].is_null() {
        bail!("{method}: {}", answer["error"]);
    }
    Ok(answer["result"].take())
}
