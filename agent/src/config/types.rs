//! What a configuration says, in the types that the agent works with. Made by [`super::Config::load`] alone, so a value
//! of these types has been checked.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use darter_tracker::Role;
use regex::Regex;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::hosts::{HostPattern, HostPort};

/// A value that is never printed: what `Debug` shows is that there is one. It has no `Display`.
#[derive(Clone)]
pub struct Redacted<T>(T);

impl<T> Redacted<T> {
    /// Hides `value`.
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// The value, for the one place that needs it.
    pub const fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> fmt::Debug for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Section `node`: who this agent is.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name, shown to people. The host's name unless set.
    pub name: String,
    /// The cluster that it belongs to; enters every key, so members of another one cannot even read its datagrams.
    pub cluster: String,
    /// The address that peers reach it at, for gossip and pieces.
    pub advertise: IpAddr,
    /// Where it stands, for preferring near peers.
    pub zone: Option<String>,
    /// What it is there for.
    pub role: Role,
}

/// Section `proxy`: the port that container runtimes talk to.
#[derive(Clone, Debug)]
pub struct Proxy {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The certificate it serves TLS with; plain HTTP without one.
    pub tls: Option<Arc<Identity>>,
}

/// A certificate chain and the key that fits its first certificate.
#[derive(Debug)]
pub struct Identity {
    /// Where the chain was read.
    pub cert_file: PathBuf,
    /// Where the key was read.
    pub key_file: PathBuf,
    /// The chain, its own certificate first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key.
    pub key: Redacted<PrivateKeyDer<'static>>,
}

/// Section `peer`: pieces and tracker calls.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it listens.
    pub listen: SocketAddr,
    /// How bytes travel between members.
    pub transport: Transport,
}

/// How bytes travel between members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Pieces over TCP where it gets through, since that is cheaper; everything else over QUIC.
    Auto,
    /// QUIC, always; TCP is not listened on.
    Quic,
    /// TCP for everything, where the member takes it.
    Tcp,
}

/// Section `gossip`: membership and events.
#[derive(Clone, Debug)]
pub struct Gossip {
    /// Where it listens.
    pub listen: SocketAddr,
}

/// Section `admin`: health, metrics, status.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Where it listens.
    pub listen: SocketAddr,
}

/// Section `cache`: what is kept on disk.
#[derive(Clone, Debug)]
pub struct Cache {
    /// The folder, absolute. Need not exist.
    pub dir: PathBuf,
    /// How much may be kept.
    pub max_size: Space,
    /// How much of the file system must stay free.
    pub min_free: Space,
    /// How long a blob is kept that nobody asks for; more than zero. Unless it was said, longer on a seed.
    pub idle: Duration,
}

/// An amount of disk space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Bytes.
    Bytes(u64),
    /// Percent of the file system that the cache is on, 0 to 100.
    Percent(u8),
}

impl Space {
    /// The amount in bytes on a file system of `total_bytes`.
    #[must_use]
    pub fn bytes(self, total_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            // The division first: the product could overflow, and a hundredth of a disk is exact enough.
            Self::Percent(percent) => total_bytes / 100 * u64::from(percent),
        }
    }
}

/// Section `limits`, in bytes per second; 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All downloads together, from peers and registries.
    pub download: u64,
    /// All uploads to peers together.
    pub upload: u64,
    /// One task's download.
    pub per_task: u64,
}

/// Section `registry_mirror`: whom origin-form requests are for.
#[derive(Clone, Debug)]
pub struct RegistryMirror {
    /// The registry of requests that do not name one with `?ns=`; `None` refuses those. Scheme and authority only.
    pub remote: Option<http::Uri>,
    /// Whether such requests are passed on, without the swarm.
    pub direct: bool,
}

/// One of `rules`: what to do with a URL. The first whose expression is found in it wins.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Searched in the whole URL, unanchored.
    pub regex: Regex,
    /// Pass it through, without the swarm.
    pub direct: bool,
    /// Ask upstream over HTTPS, whatever the client spoke.
    pub use_https: bool,
    /// Ask this host instead.
    pub redirect: Option<HostPort>,
}

/// Section `hijack`: whose TLS the proxy terminates.
#[derive(Clone, Debug)]
pub struct Hijack {
    /// The CA that leaves are signed with, or a static certificate. There whenever `hosts` is not empty.
    pub identity: Option<Arc<Identity>>,
    /// The hosts; empty: none.
    pub hosts: Vec<HostPattern>,
}

/// One of `registries`: how a host is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registry {
    /// Plain HTTP instead of HTTPS.
    pub insecure_http: bool,
    /// PEM certificates that are trusted for this registry beside the system's.
    pub ca_file: Option<PathBuf>,
    /// How long its answers for tags may be used again; `None`: as for all others.
    pub tag_ttl: Option<Duration>,
}

/// Who is served from the cache while a registry cannot be asked whether he may have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenRegistryDown {
    /// Whom the registry has let in before, with this credential, to this repository.
    Seen,
    /// Everybody.
    Allow,
    /// Nobody.
    Deny,
}

/// When bytes may leave for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// As pieces pass their digest; the last one only when the whole blob has passed its own.
    Streaming,
    /// When the whole blob has passed its digest.
    BeforeStream,
}
