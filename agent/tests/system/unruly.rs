//! Registries as they are (rows 22 to 35): whatever one does, a client gets the right bytes or a clear error, and nothing
//! wrong is in any cache, so that everything is right as soon as the registry is.

mod cases;
pub(crate) mod registry;

#[path = "../../src/source/registry/testing/server.rs"]
// The crate's own tests have a use for what is not used here.
#[allow(dead_code)]
pub(crate) mod server;

use std::path::Path;

use darter_agent::demo::image::Blob;
use futures_util::future::join_all;
use http::StatusCode;
use serde_json::json;

use crate::stage::{KIB, Plan, Stage};
use crate::wait;
use crate::wire::{self, Way};
use cases::{CASES, Case, Outcome};
use registry::{Algorithm, Repository, Unruly, digest};

/// What came of one request.
#[derive(Debug, PartialEq, Eq)]
enum Came {
    Right,
    /// An answer other than 200.
    Status(u16),
    /// Cut before its end.
    Cut,
    /// A success that the client may take for the blob.
    Wrong(usize),
    /// Under a `Content-Encoding` that the client did not ask for.
    Encoded,
}

impl Outcome {
    fn admits(self, came: &Came) -> bool {
        match self {
            Self::Right => *came == Came::Right,
            Self::Refused(statuses) => matches!(came, Came::Status(status) if statuses.contains(status)),
            Self::RightOrFailed => matches!(came, Came::Right | Came::Status(500 | 502 | 503)),
            Self::RightOrCut => matches!(came, Came::Right | Came::Cut),
            Self::Broken => matches!(came, Came::Cut | Came::Status(307 | 502 | 503)),
            Self::Encoded => *came == Came::Encoded,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_registry_does_nothing_wrong_is_kept_or_passed_for_right() {
    let stage = stage().await;
    let repositories = CASES.iter().zip(1..).map(|(case, seed)| Repository {
        name: case.name,
        blob: Blob::layer(seed, case.blob_bytes).read(0..case.blob_bytes).to_vec(),
        algorithm: if case.name == "sha512" { Algorithm::Sha512 } else { Algorithm::Sha256 },
        manner: case.manner,
    });
    let unruly = Unruly::start(stage.subnet.registry(), repositories.collect()).await;
    let faults: Vec<String> = join_all(CASES.iter().map(|case| run(&stage, &unruly, case))).await.concat();
    assert!(faults.is_empty(), "{}\n{}", faults.join("\n"), stage.logs());
    // What the object store needs not know it was not told.
    let leaked = unruly.stored_seen().into_iter().filter(|seen| seen.header("authorization").is_some());
    assert_eq!(leaked.count(), 0);
    assert!(!unruly.stored_seen().is_empty());
    let cached = || stage.agents().iter().map(|agent| checked(&agent.cache_dir().join("blobs"))).sum::<usize>();
    crate::wait::until("what was right is in both caches", async || cached() > CASES.len()).await;
    stage.stop().await;
}

/// Agents that take whatever listens at the registry's address for a registry that speaks plain HTTP.
pub(crate) async fn stage() -> Stage {
    let plan = Plan {
        layers: vec![64 * KIB],
        tls: false,
        overrides: |registry| {
            let plain = json!({"insecure_http": true});
            json!({"registries": {registry.ip().to_string(): plain, "localhost": plain}})
        },
        ..Plan::default()
    };
    Stage::start(plan).await
}

/// Pulls a blob through both agents at once, one of which was shown a manifest before, and again when the registry has
/// been mended. Returns what was not as it should be.
async fn run(stage: &Stage, unruly: &Unruly, case: &Case) -> Vec<String> {
    let started = tokio::time::Instant::now();
    let way = |at: usize| Way::Absolute { proxy: stage.agent(at).addresses().proxy, to: unruly.address() };
    let credential = format!("Bearer {}", case.name);
    let who = [("authorization", credential.as_str())];
    let (first, second) = (way(0), way(1));
    let listed = async {
        assert_eq!(wire::get(&first, &Unruly::manifest_path(case.name), &who).await.status, StatusCode::OK);
        pull(unruly, case, &first).await
    };
    let came = tokio::join!(listed, pull(unruly, case, &second));
    let mut faults = Vec::new();
    for (at, came) in [(0, came.0), (1, came.1)] {
        if !case.outcome.admits(&came) {
            faults.push(format!("{} through agent {at}: {came:?} instead of {:?}", case.name, case.outcome));
        }
    }
    let asked = unruly.seen(case.name).len();
    println!("{:24} {:?} after {:?}, {asked} requests", case.name, case.outcome, started.elapsed());
    if asked > case.requests_max {
        faults.push(format!("{}: {asked} requests", case.name));
    }
    unruly.mend(case.name);
    for way in [&first, &second] {
        // A registry's no, or its wish to be left alone, is kept for some seconds.
        wait::until(case.name, async || pull(unruly, case, way).await == Came::Right).await;
    }
    faults
}

async fn pull(unruly: &Unruly, case: &Case, way: &Way) -> Came {
    let credential = format!("Bearer {}", case.name);
    let reply = wire::get(way, &unruly.blob_path(case.name), &[("authorization", &credential)]).await;
    if reply.status != StatusCode::OK {
        return Came::Status(reply.status.as_u16());
    }
    let encoded = !reply.header("content-encoding").is_empty();
    let ended = reply.end().await;
    match ended.bytes == unruly.blob(case.name) {
        _ if ended.cut => Came::Cut,
        _ if encoded => Came::Encoded,
        true => Came::Right,
        false => Came::Wrong(ended.bytes.len()),
    }
}

/// Hashes every blob of a cache; how many there are.
pub(crate) fn checked(directory: &Path) -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            count += checked(&path);
            continue;
        }
        // What is known of its pieces.
        if path.extension().is_some() {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap();
        let algorithm = if name.len() == 128 { Algorithm::Sha512 } else { Algorithm::Sha256 };
        let own = digest(algorithm, &std::fs::read(&path).unwrap());
        assert_eq!(own.split_once(':').unwrap().1, name, "{}", path.display());
        count += 1;
    }
    count
}
