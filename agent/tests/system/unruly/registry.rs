//! A registry that serves one blob per repository, each repository in a manner of its own: as the field's registries do
//! on a bad day, by script.
//!
//! A manner is a function from a request to the bytes that are said, so that nothing here can repair what is meant to be
//! wrong. Blobs lie in a second server under another name too, as with registries that keep them in an object store.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::json;
use sha2::{Digest as _, Sha256, Sha512};

use super::server::{Origin, Reply, Seen, reply};

/// A well-formed image manifest.
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// One request for a repository's blob.
pub(crate) struct Asked<'a> {
    pub(crate) blob: &'a [u8],
    pub(crate) seen: &'a Seen,
    /// How many requests of this method for this blob came before.
    pub(crate) before: usize,
    /// Where the blob lies in the object store.
    pub(crate) stored: String,
}

/// What a registry makes of a request for a blob.
pub(crate) type Manner = fn(&Asked<'_>) -> Reply;

/// How a repository names its blob.
#[derive(Clone, Copy)]
pub(crate) enum Algorithm {
    Sha256,
    Sha512,
}

/// One repository to begin with.
pub(crate) struct Repository {
    pub(crate) name: &'static str,
    pub(crate) blob: Vec<u8>,
    pub(crate) algorithm: Algorithm,
    pub(crate) manner: Manner,
}

struct Served {
    blob: Vec<u8>,
    digest: String,
    manner: Mutex<Manner>,
    gets: AtomicUsize,
    heads: AtomicUsize,
}

/// Both servers. They end when this is dropped.
pub(crate) struct Unruly {
    registry: Origin,
    storage: Origin,
    repositories: Arc<BTreeMap<String, Served>>,
}

impl Unruly {
    /// Listens at `ip`, the object store at `localhost`.
    pub(crate) async fn start(ip: IpAddr, repositories: Vec<Repository>) -> Self {
        let served = |it: Repository| {
            let digest = digest(it.algorithm, &it.blob);
            let (gets, heads) = (AtomicUsize::new(0), AtomicUsize::new(0));
            (it.name.to_owned(), Served { blob: it.blob, digest, manner: Mutex::new(it.manner), gets, heads })
        };
        let repositories: Arc<BTreeMap<_, _>> = Arc::new(repositories.into_iter().map(served).collect());
        let stored = Arc::clone(&repositories);
        let storage = Origin::start(move |seen| object(&stored, seen)).await;
        let host = format!("localhost:{}", storage.address.port());
        let held = Arc::clone(&repositories);
        let registry = Origin::start_at(&format!("{ip}:0"), None, move |seen| answer(&held, &host, seen)).await;
        Self { registry, storage, repositories }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.registry.address
    }

    /// Everything that the object store was asked.
    pub(crate) fn stored_seen(&self) -> Vec<Seen> {
        self.storage.seen()
    }

    /// Everything that the registry was asked about a repository's blob.
    pub(crate) fn seen(&self, name: &str) -> Vec<Seen> {
        let path = self.blob_path(name);
        self.registry.seen().into_iter().filter(|seen| seen.path == path).collect()
    }

    pub(crate) fn blob_path(&self, name: &str) -> String {
        format!("/v2/{name}/blobs/{}", self.repositories[name].digest)
    }

    /// A tag's manifest that lists the blob.
    pub(crate) fn manifest_path(name: &str) -> String {
        format!("/v2/{name}/manifests/latest")
    }

    pub(crate) fn blob(&self, name: &str) -> &[u8] {
        &self.repositories[name].blob
    }

    /// From now on a repository is served as it should be.
    pub(crate) fn mend(&self, name: &str) {
        *self.repositories[name].manner.lock().unwrap() = serve;
    }
}

/// The digest of some bytes, as registries write it.
pub(crate) fn digest(algorithm: Algorithm, bytes: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match algorithm {
        Algorithm::Sha256 => format!("sha256:{}", hex(&Sha256::digest(bytes))),
        Algorithm::Sha512 => format!("sha512:{}", hex(&Sha512::digest(bytes))),
    }
}

fn answer(repositories: &BTreeMap<String, Served>, storage: &str, seen: &Seen) -> Reply {
    let named = seen.path.strip_prefix("/v2/").and_then(|rest| {
        let (name, what) = rest.split_once('/')?;
        Some((name, repositories.get(name)?, what))
    });
    let Some((name, served, what)) = named else { return Reply::Say(reply(404, &[], b"{}")) };
    if what == "manifests/latest" {
        return Reply::Say(said(seen, reply(200, &[("content-type", MANIFEST_TYPE)], &manifest(served))));
    }
    if what != format!("blobs/{}", served.digest) {
        return Reply::Say(reply(404, &[], b"{}"));
    }
    let counter = if seen.method == "HEAD" { &served.heads } else { &served.gets };
    let before = counter.fetch_add(1, Ordering::SeqCst);
    let stored = format!("http://{storage}/{name}?signature={before}");
    let manner = *served.manner.lock().unwrap();
    manner(&Asked { blob: &served.blob, seen, before, stored })
}

fn manifest(served: &Served) -> Vec<u8> {
    let config = digest(Algorithm::Sha256, b"{}");
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": served.digest,
            "size": served.blob.len(),
        }],
    })
    .to_string()
    .into_bytes()
}

/// The object store: signatures below the first good one have expired, and HEAD is not what a URL was signed for.
fn object(repositories: &BTreeMap<String, Served>, seen: &Seen) -> Reply {
    let asked = seen.path.trim_start_matches('/').split_once("?signature=");
    let Some((name, signature)) = asked.and_then(|(name, number)| Some((name, number.parse::<usize>().ok()?))) else {
        return Reply::Say(reply(400, &[], b"<Error>"));
    };
    let good = match name {
        "expired-once" => signature > 0,
        "expired-always" => false,
        _ => true,
    };
    if seen.method == "HEAD" || !good {
        return Reply::Say(said(seen, reply(403, &[], b"<Error><Code>AccessDenied</Code></Error>")));
    }
    serve(&Asked { blob: &repositories[name].blob, seen, before: 0, stored: String::new() })
}

/// A reply as HEAD has it: the head alone.
pub(crate) fn said(seen: &Seen, mut reply: Vec<u8>) -> Vec<u8> {
    if seen.method == "HEAD" {
        let end = reply.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        reply.truncate(end + 4);
    }
    reply
}

/// As it should be.
pub(crate) fn serve(asked: &Asked<'_>) -> Reply {
    Reply::Say(right(asked, &[]))
}

/// The right answer, with further headers, or with another framing if they name one.
pub(crate) fn right(asked: &Asked<'_>, headers: &[(&str, &str)]) -> Vec<u8> {
    let (status, range, part) = part(asked);
    let headers: Vec<_> = range.iter().map(|range| ("content-range", range.as_str())).chain(headers.to_vec()).collect();
    said(asked.seen, reply(status, &headers, part))
}

/// Status, `Content-Range` and bytes of the right answer.
pub(crate) fn part<'a>(asked: &Asked<'a>) -> (u16, Option<String>, &'a [u8]) {
    let length = asked.blob.len();
    match asked.seen.range().filter(|range| range.start < length && asked.seen.method != "HEAD") {
        Some(range) => {
            let range = range.start..range.end.min(length);
            (206, Some(format!("bytes {}-{}/{length}", range.start, range.end - 1)), &asked.blob[range])
        }
        None => (200, None, asked.blob),
    }
}
