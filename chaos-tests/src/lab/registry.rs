//! Debian's docker-registry, and what it says it has sent.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep};

use super::certificates::RegistryCertificates;
use super::command::wait_for;
use super::daemon::Daemon;
use super::netns::Host;
use super::world::World;

/// The registry's port.
pub const PORT: u16 = 5000;

/// How long the registry may take to listen.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// A response is logged when its handler returns, shortly after the client has its last byte. The count stands when it
/// has not changed for this long.
const QUIET: Duration = Duration::from_millis(500);

/// The longest that is waited for the count to stand: an aborted response ends at the registry's next write.
const QUIET_DEADLINE: Duration = Duration::from_secs(20);

/// How often the access log is read meanwhile.
const QUIET_POLL: Duration = Duration::from_millis(100);

/// The only user of a registry with credentials.
pub const USER: &str = "anna";
/// Her password.
pub const PASSWORD: &str = "swordfish";
/// `htpasswd` line of the two, bcrypt with cost 5.
const HTPASSWD: &str = "anna:$2y$05$abcdefghijklmnopqrstuupWDwJQeCHYIBQy8WvkVB6ImhZ476YYy\n";

/// Whether clients have to say who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody may pull and push.
    Open,
    /// Only [`USER`] may.
    Password,
    /// Anybody may pull and push, and that over plain HTTP: where clients are compared that would not all do TLS alike.
    Plain,
}

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    /// Where it runs.
    pub host: Host,
    /// What it is called in image names: `10.77.0.1:5000`.
    pub name: String,
    /// Its certificate authority; None where it speaks plain HTTP.
    pub ca: Option<PathBuf>,
    log: PathBuf,
    daemon: Daemon,
}

/// What the registry sent from a certain moment on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Body bytes of answers to `GET .../blobs/...` with 200 or 206.
    pub blob_bytes: u64,
    /// Number of such answers.
    pub blob_responses: u64,
    /// Requests refused for want of credentials.
    pub unauthorized: u64,
    /// What was asked.
    pub requests: Requests,
}

/// Answered requests by what they were for, with whatever status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// For manifests by a tag.
    pub tags: Asked,
    /// For manifests by their digest.
    pub manifests: Asked,
    /// For blobs.
    pub blobs: Asked,
    /// For `/v2/`: whether a registry is there, and what it wants to know of its clients.
    pub pings: u64,
    /// For anything else, such as uploads.
    pub other: u64,
}

/// Requests by their method.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// GET.
    pub gets: u64,
    /// HEAD.
    pub heads: u64,
}

impl Sent {
    /// What was sent after `before`, which is an earlier count of the same registry.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            blob_bytes: self.blob_bytes - before.blob_bytes,
            blob_responses: self.blob_responses - before.blob_responses,
            unauthorized: self.unauthorized - before.unauthorized,
            requests: self.requests.since(before.requests),
        }
    }
}

impl Requests {
    /// Counts a request.
    fn count(&mut self, method: &str, uri: &str) {
        let path = uri.split('?').next().unwrap_or_default();
        // aria2 escapes the colon.
        let is_digest = |reference: &str| reference.contains(':') || reference.to_ascii_lowercase().contains("%3a");
        let asked = match path.rsplit_once('/').map(|(before, last)| (before.rsplit('/').next(), last)) {
            Some((Some("manifests"), reference)) if is_digest(reference) => Some(&mut self.manifests),
            Some((Some("manifests"), _)) => Some(&mut self.tags),
            Some((Some("blobs"), reference)) if is_digest(reference) => Some(&mut self.blobs),
            _ => None,
        };
        match (asked, method) {
            (Some(asked), "GET") => asked.gets += 1,
            (Some(asked), "HEAD") => asked.heads += 1,
            _ if matches!(path, "/v2/" | "/v2") => self.pings += 1,
            _ => self.other += 1,
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            tags: self.tags.since(before.tags),
            manifests: self.manifests.since(before.manifests),
            blobs: self.blobs.since(before.blobs),
            pings: self.pings - before.pings,
            other: self.other - before.other,
        }
    }
}

impl Asked {
    fn since(self, before: Self) -> Self {
        Self { gets: self.gets - before.gets, heads: self.heads - before.heads }
    }
}

impl Registry {
    /// Starts a registry on a new host and waits until it answers.
    pub async fn start(world: &mut World, access: Access) -> Result<Self> {
        let host = world.host("registry").await?;
        let dir = world.directory("registry")?;
        let name = format!("{}:{PORT}", host.address);
        let mut config = serde_json::json!({
            "version": "0.1",
            "log": {"level": "info", "formatter": "json", "accesslog": {"disabled": true}},
            "storage": {
                "filesystem": {"rootdirectory": dir.join("data")},
                "cache": {"blobdescriptor": "inmemory"},
                "delete": {"enabled": true},
            },
            "http": {"addr": name, "secret": "one registry, so nobody to share it with"},
        });
        let ca = if access == Access::Plain {
            None
        } else {
            let certificates = RegistryCertificates::generate(&dir, host.address)?;
            config["http"]["tls"] =
                serde_json::json!({"certificate": certificates.certificate, "key": certificates.key});
            Some(certificates.ca)
        };
        if access == Access::Password {
            let path = dir.join("htpasswd");
            fs::write(&path, HTPASSWD)?;
            config["auth"] = serde_json::json!({"htpasswd": {"realm": "lab", "path": path}});
        }
        // JSON is YAML too.
        let config_file = dir.join("config.yml");
        fs::write(&config_file, config.to_string())?;
        let log = world.log("registry");
        let daemon =
            Daemon::start("docker-registry", host.run("docker-registry").arg("serve").arg(&config_file), &log)?;
        let registry = Self { host, name, ca, log, daemon };
        let listening = || async { registry.answers(&registry.host).await };
        wait_for("the registry to answer", START_DEADLINE, listening).await?;
        Ok(registry)
    }

    /// An image's name in this registry.
    #[must_use]
    pub fn image(&self, repository: &str) -> String {
        format!("{}/{repository}:latest", self.name)
    }

    /// Whether it answers a client on this host, with whatever status.
    pub async fn answers(&self, from: &Host) -> bool {
        let curl = from.run("curl").args(["-sS", "--max-time", "2"]);
        let curl = match &self.ca {
            Some(ca) => curl.arg("--cacert").arg(ca).arg(format!("https://{}/v2/", self.name)),
            None => curl.arg(format!("http://{}/v2/", self.name)),
        };
        curl.output().await.is_ok()
    }

    /// What was sent since `before`, once no answer has ended for a moment.
    pub async fn sent_since(&mut self, before: Sent) -> Result<Sent> {
        self.daemon.check()?;
        let end = Instant::now() + QUIET_DEADLINE;
        let mut last = self.count()?;
        let mut since = Instant::now();
        while since.elapsed() < QUIET && Instant::now() < end {
            sleep(QUIET_POLL).await;
            let now = self.count()?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(last.since(before))
    }

    /// What was sent so far.
    pub async fn sent(&mut self) -> Result<Sent> {
        self.sent_since(Sent::default()).await
    }

    /// Ends it, as a registry that went down.
    pub async fn stop(self) -> Result<()> {
        self.daemon.stop().await
    }

    fn count(&self) -> Result<Sent> {
        let log = fs::read(&self.log).context("cannot read the registry's log")?;
        Ok(count(&String::from_utf8_lossy(&log)))
    }
}

fn count(log: &str) -> Sent {
    let mut sent = Sent::default();
    // The last line may be half written.
    for line in log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()) {
        let text = |key: &str| line[key].as_str().unwrap_or_default();
        // A request without sufficient credentials ends here, in version 2.8 without a line about its answer.
        if text("msg").starts_with("error authorizing context") {
            sent.unauthorized += 1;
            continue;
        }
        // "response completed", or "response completed with error" for 4xx and 5xx. Lines about the same request from
        // inside a handler carry no size.
        let Some(bytes) = line["http.response.written"].as_u64() else { continue };
        let status = line["http.response.status"].as_u64().unwrap_or_default();
        let before = sent.requests.blobs.gets;
        sent.requests.count(text("http.request.method"), text("http.request.uri"));
        if sent.requests.blobs.gets > before && (status == 200 || status == 206) {
            sent.blob_bytes += bytes;
            sent.blob_responses += 1;
        }
    }
    sent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_bodies_of_blobs_and_requests_of_every_kind() {
        let line = |method: &str, uri: &str, status: u64, bytes: u64| {
            serde_json::json!({
                "http.request.method": method, "http.request.uri": uri, "http.response.status": status,
                "http.response.written": bytes, "msg": "response completed"
            })
            .to_string()
        };
        let log = [
            line("GET", "/v2/a/blobs/sha256:00", 200, 10),
            line("GET", "/v2/a/blobs/sha256%3A00", 206, 5),
            line("HEAD", "/v2/a/blobs/sha256:00", 200, 0),
            r#"{"level":"warning","msg":"error authorizing context: basic authentication challenge"}"#.to_owned(),
            line("GET", "/v2/a/manifests/latest", 200, 700),
            line("HEAD", "/v2/a/b/manifests/latest", 404, 0),
            line("HEAD", "/v2/a/manifests/sha256:00", 200, 0),
            line("GET", "/v2/a/manifests/sha256:00?x=y", 200, 700),
            line("PUT", "/v2/a/manifests/latest", 201, 0),
            line("PATCH", "/v2/a/blobs/uploads/1", 202, 0),
            line("GET", "/v2/", 200, 2),
            line("GET", "/v2/a/tags/list", 200, 20),
            "not json".to_owned(),
            "{\"http.request.method\":\"GET\",\"http.requ".to_owned(),
        ];
        let expected = Sent {
            blob_bytes: 15,
            blob_responses: 2,
            unauthorized: 1,
            requests: Requests {
                tags: Asked { gets: 1, heads: 1 },
                manifests: Asked { gets: 1, heads: 1 },
                blobs: Asked { gets: 2, heads: 1 },
                pings: 1,
                other: 3,
            },
        };
        assert_eq!(count(&log.join("\n")), expected);
        assert_eq!(expected.since(expected), Sent::default());
    }
}
