//! Content as registries hold it at the edges: as many layers as an image may have, a blob larger than any memory, layers that
//! are kept elsewhere, and uploads that go wrong (rows 22 to 35). Indexes, artifacts, referrers, mounts, empty blobs and SHA-512
//! are in `conformance`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use darter_agent::demo::cluster::Agent;
use futures_util::future::join_all;
use http::{Method, StatusCode};
use serde_json::json;

use crate::conformance::registry::{Slip, Store};
use crate::stage::{KIB, MIB, Plan, Stage, metric};
use crate::unruly::registry::{Algorithm, digest};
use crate::unruly::server::{Origin, Reply, Seen, reply};
use crate::unruly::{checked, stage};
use crate::wire::{self, Way};

/// As many layers as an image may have.
const LAYERS_MAX: usize = 127;

/// What an agent may take, whatever it serves.
pub(crate) const MEMORY_BYTES_MAX: u64 = 128 * MIB;

const GIGANTIC_BYTES: u64 = 10 << 30;

/// What its registry gives at a time, and how long it waits then, so 4 MiB/s on each connection: a blob that is asked for whole
/// is fetched as fast as it comes, and what has been fetched by the end of the test would else go by the machine's speed.
const GIGANTIC_STEP_BYTES: usize = 128 << 10;
const GIGANTIC_PAUSE: Duration = Duration::from_millis(31);

/// The most that may have been fetched for readers of some MiB: a run of pieces for each, and those around their positions.
const GIGANTIC_FETCHED_BYTES_MAX: u64 = 512 * MIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_of_127_layers_comes_whole_but_for_one_that_is_wrong() {
    let layers = (0..LAYERS_MAX as u64).map(|at| 20 * KIB + at).collect();
    let stage = Stage::start(Plan { agents: 2, layers, ..Plan::default() }).await;
    let wrong = stage.image.layers()[100].digest();
    stage.registry.corrupt(wrong);
    assert!(stage.try_pull(0).await.is_err());
    let way = stage.through(1);
    let pulls = stage.image.blobs().map(|blob| {
        let (way, path) = (way.clone(), stage.blob_path(&blob.digest()));
        async move { (blob, wire::get(&way, &path, &[]).await) }
    });
    for (blob, reply) in join_all(pulls).await {
        let status = reply.status;
        let ended = reply.end().await;
        let right = status == StatusCode::OK && !ended.cut && ended.bytes == blob.read(0..blob.length());
        assert_eq!(right, blob.digest() != wrong, "{} was answered {status}", blob.digest());
    }
    stage.registry.heal(&wrong);
    crate::wait::until("the layer that was wrong is right", async || stage.try_pull(0).await.is_ok()).await;
    // The manifest that they were given speaks for all layers.
    let heads = stage.registry.stats().blob_heads();
    stage.pull_all().await;
    assert_eq!(stage.settled().await.blob_heads(), heads);
    for agent in stage.agents() {
        crate::wait::until("everything is published", async || {
            checked(&agent.cache_dir().join("blobs")) == LAYERS_MAX + 1
        })
        .await;
    }
    stage.stop().await;
}

/// Bytes of a blob that nobody could hold: each eight are their own place.
fn gigantic(range: std::ops::Range<u64>) -> Vec<u8> {
    let first = range.start / 8;
    let words = (first..range.end.div_ceil(8)).flat_map(u64::to_le_bytes);
    let skipped = usize::try_from(range.start - first * 8).unwrap();
    words.skip(skipped).take(usize::try_from(range.end - range.start).unwrap()).collect()
}

fn gigantic_registry(seen: &Seen) -> Reply {
    let length = GIGANTIC_BYTES.to_string();
    let Some(range) = seen.range() else {
        assert_eq!(seen.method, "HEAD", "all of it is asked for at once");
        return Reply::Say(reply(200, &[("content-length", &length), ("accept-ranges", "bytes")], b""));
    };
    let range = range.start as u64..(range.end as u64).min(GIGANTIC_BYTES);
    assert!(range.end - range.start <= GIGANTIC_FETCHED_BYTES_MAX, "{range:?} is asked for at once");
    let content = format!("bytes {}-{}/{length}", range.start, range.end - 1);
    let bytes = reply(206, &[("content-range", &content)], &gigantic(range));
    Reply::Dribble { bytes, step: GIGANTIC_STEP_BYTES, pause: GIGANTIC_PAUSE }
}

/// The most memory that an agent has had in use.
pub(crate) fn memory_peak(agent: &Agent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.process_id().unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * KIB
}

/// Nobody reads all of it here, so that its digest is never known: a part is given as its reader has to check the whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_of_ten_gibibytes_is_read_where_it_is_wanted() {
    let stage = stage().await;
    let registry = Origin::start_at(&format!("{}:0", stage.subnet.registry()), None, gigantic_registry).await;
    let way = |at: usize| Way::Absolute { proxy: stage.agent(at).addresses().proxy, to: registry.address };
    let path = format!("/v2/gigantic/blobs/sha256:{}", "1".repeat(64));
    let head = wire::send(&way(0), Method::HEAD, &path, &[]).await;
    assert_eq!((head.status, head.header("content-length")), (StatusCode::OK, "10737418240"));

    let far = 9 << 30_u64;
    for (at, range, expected) in [
        (0, format!("bytes={far}-{}", far + 3 * MIB - 1), far..far + 3 * MIB),
        (1, format!("bytes={}-", GIGANTIC_BYTES - 2 * MIB), GIGANTIC_BYTES - 2 * MIB..GIGANTIC_BYTES),
        (0, "bytes=-5".to_owned(), GIGANTIC_BYTES - 5..GIGANTIC_BYTES),
        (1, "bytes=4294967295-4294967296".to_owned(), 4_294_967_295..4_294_967_297),
    ] {
        let part = wire::get(&way(at), &path, &[("range", &range)]).await;
        assert_eq!(part.status, StatusCode::PARTIAL_CONTENT, "{range}\n{}", stage.logs());
        let said = format!("bytes {}-{}/{GIGANTIC_BYTES}", expected.start, expected.end - 1);
        assert_eq!(part.header("content-range"), said);
        assert!(part.whole().await == gigantic(expected), "{range}");
    }
    let past = wire::get(&way(0), &path, &[("range", &format!("bytes={GIGANTIC_BYTES}-"))]).await;
    assert_eq!(past.status, StatusCode::RANGE_NOT_SATISFIABLE);

    // Two clients begin with the whole, and leave.
    let begins = [0, 1].map(|at| {
        let (way, path) = (way(at), &path);
        async move {
            let mut whole = wire::get(&way, path, &[]).await;
            assert_eq!((whole.status, whole.header("content-length")), (StatusCode::OK, "10737418240"));
            let mut read = 0;
            while read < 40 * MIB {
                let bytes = whole.next().await.unwrap().unwrap();
                assert!(bytes == gigantic(read..read + bytes.len() as u64), "wrong bytes from {read}");
                read += bytes.len() as u64;
            }
        }
    });
    join_all(begins).await;
    for agent in stage.agents() {
        let peak = memory_peak(agent);
        println!("{}: {} MiB at the most", agent.name(), peak / MIB);
        assert!(peak <= MEMORY_BYTES_MAX, "{} MiB", peak / MIB);
        assert_eq!(checked(&agent.cache_dir().join("blobs")), 0, "nothing that was not checked is kept as whole");
    }
    let fetched = stage.sum("darter_registry_received_bytes_total").await;
    assert!(fetched <= GIGANTIC_FETCHED_BYTES_MAX, "{} MiB were fetched", fetched / MIB);
    assert_eq!(stage.sum("darter_passed_bytes_total").await, 0, "all of it came through the swarm");
    stage.stop().await;
}

async fn push(to: &Way, path: &str, media_type: &str, bytes: &[u8]) -> String {
    let put = wire::send_body(to, Method::PUT, path, &[("content-type", media_type)], bytes.to_vec().into()).await;
    assert_eq!(put.status, StatusCode::CREATED, "{path}");
    put.header("docker-content-digest").to_owned()
}

/// Registries do not look whether a layer that is kept elsewhere is in the repository. An agent that took the manifest's word
/// for it would give everybody what others have pulled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_layer_is_not_anothers_blob() {
    const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
    let stage = stage().await;
    let store = Arc::new(Store::new(Slip::None));
    let at = format!("{}:0", stage.subnet.registry());
    let registry = Origin::start_at(&at, None, move |seen| store.answer(seen)).await;
    let direct = Way::To(registry.address, None);
    let secret = vec![7; 100_000];
    for (name, bytes) in [("private", &secret[..]), ("open", b"{}")] {
        let begun = wire::send(&direct, Method::POST, &format!("/v2/{name}/blobs/uploads/"), &[]).await;
        let end = format!("{}?digest={}", begun.header("location"), digest(Algorithm::Sha256, bytes));
        push(&direct, &end, "application/octet-stream", bytes).await;
    }
    let (secret_digest, config) = (digest(Algorithm::Sha256, &secret), digest(Algorithm::Sha256, b"{}"));
    let agent = Way::Absolute { proxy: stage.agent(0).addresses().proxy, to: registry.address };
    let pulled = wire::get(&agent, &format!("/v2/private/blobs/{secret_digest}"), &[]).await;
    assert!(pulled.whole().await == secret);

    for (kind, urls) in [
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", json!(["https://example.org/layer"])),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", json!(["https://example.org/layer"])),
        ("application/vnd.oci.image.layer.v1.tar", json!(["https://example.org/layer"])),
    ] {
        let manifest = json!({
            "schemaVersion": 2, "mediaType": IMAGE,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
            "layers": [{"mediaType": kind, "digest": secret_digest, "size": secret.len(), "urls": urls}],
        });
        push(&agent, "/v2/open/manifests/latest", IMAGE, manifest.to_string().as_bytes()).await;
        let given = wire::get(&agent, "/v2/open/manifests/latest", &[("accept", IMAGE)]).await;
        assert_eq!(given.whole().await, manifest.to_string());
        for range in [None, Some(("range", "bytes=0-9"))] {
            let headers: Vec<_> = range.into_iter().collect();
            let refused = wire::get(&agent, &format!("/v2/open/blobs/{secret_digest}"), &headers).await;
            assert_eq!(refused.status, StatusCode::NOT_FOUND, "{kind} {headers:?}");
            let document: serde_json::Value = serde_json::from_slice(&refused.whole().await).unwrap();
            assert_eq!(document["errors"][0]["code"], "BLOB_UNKNOWN");
        }
    }
    let sent = metric(stage.agent(0), "darter_client_sent_bytes_total").await;
    assert_eq!(sent, secret.len() as u64, "what was pulled from where it is");
    stage.stop().await;
}

/// Whether a request that changes something had its effect is not known when it fails, so it is the client who tries again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_is_made_once_and_ends_as_the_registry_says() {
    let stage = stage().await;
    let at = format!("{}:0", stage.subnet.registry());
    let registry = Origin::start_at(&at, None, |seen| match seen.path.rsplit_once('/').unwrap().1 {
        "taken" => Reply::Say(reply(202, &[("range", &format!("0-{}", seen.body.len() - 1))], b"")),
        // Without that word the next upload may go to a connection that is just being closed, and is not made twice.
        "too-large" => Reply::Close(reply(413, &[("connection", "close")], b"too large")),
        "down" => Reply::Say(reply(500, &[("retry-after", "1")], b"down")),
        "closed" => Reply::Close(Vec::new()),
        "reset" => Reply::Reset(Vec::new()),
        other => panic!("{other}"),
    })
    .await;
    let chunk = Bytes::from(vec![7; 3 << 20]);
    let way = Way::Absolute { proxy: stage.agent(0).addresses().proxy, to: registry.address };
    for (end, statuses, said) in [
        ("taken", &[202][..], ""),
        ("too-large", &[413], "too large"),
        ("down", &[500], "down"),
        ("closed", &[502, 503], ""),
        ("reset", &[502, 503], ""),
    ] {
        let path = format!("/v2/a/blobs/uploads/{end}");
        let reply = wire::send_body(&way, Method::PATCH, &path, &[], chunk.clone()).await;
        assert!(statuses.contains(&reply.status.as_u16()), "{end} was answered {}", reply.status);
        let taken = (reply.header("range").to_owned(), reply.header("retry-after").to_owned());
        assert_eq!(taken.0 == format!("0-{}", chunk.len() - 1), end == "taken");
        assert_eq!(taken.1 == "1", end == "down");
        let body = reply.whole().await;
        assert!(said.is_empty() || body == said.as_bytes(), "{end}: {body:?}");
        let seen: Vec<_> = registry.seen().into_iter().filter(|seen| seen.path == path).collect();
        assert_eq!(seen.len(), 1, "{end}");
        assert!(seen[0].method == "PATCH" && seen[0].body == chunk, "{end}: {} bytes", seen[0].body.len());
    }
    stage.stop().await;
}
