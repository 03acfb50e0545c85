//! A node that reaches nobody although gossip still believes in the others.

use darter_agent::demo::image::Blob;
use http::{HeaderMap, Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};

use crate::events::{WHOLE, holdings};
use crate::stage::{MIB, Plan, Stage, log, metric, samples};
use crate::wait;

/// Frozen agents look like a node's own broken link to it: connections open, and nothing comes (row 29).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_reaches_nobody_asks_the_registry_alone() {
    let layers = vec![2 * MIB; 12];
    let mut stage = Stage::start(Plan { agents: 4, layers, ..Plan::default() }).await;
    let (node, others) = (0, [1, 2, 3]);
    others.iter().for_each(|at| signal(&stage, *at, Signal::STOP));
    // Each pull asks the home of its blob, and then others.
    let client = stage.client(node);
    let fetch = async |blob: &Blob| {
        let reply = client.request(Method::GET, &stage.blob_path(&blob.digest()), HeaderMap::new()).await.unwrap();
        assert_eq!(reply.status(), StatusCode::OK);
        assert_eq!(*reply.body(), blob.read(0..blob.length()));
    };
    let isolated = async || metric(stage.agent(node), "darter_isolations_total").await > 0;
    let mut blobs = stage.image.layers().iter();
    for blob in blobs.by_ref() {
        fetch(blob).await;
        if isolated().await {
            break;
        }
    }
    assert!(isolated().await, "{}", log(stage.agent(node)));
    assert!(log(stage.agent(node)).contains("isolated: no member answers"), "{}", log(stage.agent(node)));
    // From now on nobody is waited for.
    let fallbacks = async |reason: &str| {
        let series = format!("darter_fallbacks_total{{reason=\"{reason}\"}}");
        samples(stage.agent(node)).await.get(&series).copied().unwrap_or(0)
    };
    let before = fallbacks("HomeSilent").await;
    let rest: Vec<_> = blobs.collect();
    assert!(!rest.is_empty(), "it took every blob to find out");
    for blob in rest.iter().copied() {
        fetch(blob).await;
    }
    assert_eq!(fallbacks("HomeSilent").await, before);
    // The pull that found it out may have gone on alone as well.
    assert!(fallbacks("Isolated").await >= rest.len() as u64);
    others.iter().for_each(|at| signal(&stage, *at, Signal::CONT));
    stage.ready().await;
    // It tries again by itself.
    wait::until("a member answers", async || log(stage.agent(node)).contains("no longer isolated")).await;
    // The homes hear what it has fetched meanwhile, so nobody fetches it a second time.
    let holder = stage.agent(node).addresses().peer;
    wait::until("others hear what it has", async || {
        let known = holdings(&stage).await;
        let holders = |blob: &Blob| known.get(&blob.digest().to_string()).cloned().unwrap_or_default();
        stage.image.layers().iter().all(|blob| holders(blob).get(&holder) == Some(&WHOLE))
    })
    .await;
    stage.settled().await;
    stage.pull(others).await;
    let stats = stage.settled().await;
    for blob in stage.image.layers() {
        assert_eq!(stats.blobs[&blob.digest()].body_bytes, blob.length(), "{}", stage.logs());
    }
    stage.stop().await;
}

fn signal(stage: &Stage, at: usize, signal: Signal) {
    let process = stage.agent(at).process_id().and_then(|id| Pid::from_raw(id as i32)).unwrap();
    kill_process(process, signal).unwrap();
}
