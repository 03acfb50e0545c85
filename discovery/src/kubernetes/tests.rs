//! Lists and watches of a scripted API server: what objects mean, and what every failure costs.

#![allow(clippy::unwrap_used)]

mod server;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::*;
use crate::{Address, Discovery, Source};
use server::{Fault, Server};

/// Far above what any of this takes; a test that reaches it has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// What is promised for a change, whatever has just gone wrong once.
const ACTED_ON: Duration = Duration::from_secs(2);

/// A seed of another source, which must never be touched by what happens here.
const OTHER: &str = "10.9.9.9:8002";

fn set(list: &[&str]) -> BTreeSet<SocketAddr> {
    list.iter().map(|seed| seed.parse().unwrap()).collect()
}

/// A slice with one port named as given.
fn slice(name: &str, port: u16, ips: &[&str]) -> Value {
    json!({"addressType": "IPv4", "ports": [{"name": "peer", "port": 15001}, {"name": name, "port": port}],
        "endpoints": [{"addresses": ips, "conditions": {"ready": false}}]})
}

fn endpoints(ips: &[&str]) -> Value {
    slice("gossip", 9001, ips)
}

fn start(server: &Server, what: Watched) -> Discovery {
    let query = Query { what, port: 8002, kubeconfig: Some(server.kubeconfig()) };
    let other: Address = OTHER.parse().unwrap();
    let sources = vec![Source::Fixed { addresses: vec![other] }, Source::Kubernetes(query)];
    Discovery::start(sources, vec!["10.0.0.99:9001".parse().unwrap()])
}

fn service() -> Watched {
    Watched::Service { namespace: Some("kube-system".to_owned()), service: "darter".to_owned() }
}

/// Waits until the seeds of the server are these, beside the other source's; gives the time that it took.
async fn until(seeds: &mut watch::Receiver<BTreeSet<SocketAddr>>, expected: &[&str]) -> Duration {
    let started = Instant::now();
    let mut expected = set(expected);
    expected.insert(OTHER.parse().unwrap());
    let waited =
        tokio::time::timeout(DEADLINE, seeds.wait_for(|now| *now == expected)).await.map(|found| found.is_ok());
    assert_eq!(waited, Ok(true), "expected {expected:?}, have {:?}", *seeds.borrow());
    started.elapsed()
}

/// Waits for a condition on what the server was asked.
async fn asked(server: &Server, condition: impl Fn(&server::State) -> bool) {
    let waited = tokio::time::timeout(DEADLINE, async {
        while !condition(&server.state()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap();
}

/// A server with one slice that an agent is watching.
async fn watched() -> (Server, Discovery, watch::Receiver<BTreeSet<SocketAddr>>) {
    let server = Server::start().await;
    server.put("darter-a", endpoints(&["10.0.0.1"]));
    let discovery = start(&server, service());
    let mut seeds = discovery.seeds.clone();
    until(&mut seeds, &["10.0.0.1:9001"]).await;
    asked(&server, |state| state.watches().len() == 1).await;
    (server, discovery, seeds)
}

#[test]
fn a_slice_says_where_gossip_is() {
    let seeds = |slice: Value| serde_json::from_value::<EndpointSlice>(slice).unwrap().seeds(8002);
    let slice = json!({"addressType": "IPv4", "metadata": {"name": "a"}, "ports": [{"name": "gossip", "port": 9001}],
    "endpoints": [
        {"addresses": ["10.0.0.1", "10.0.0.2"], "conditions": {"ready": true}},
        {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": false}},
        {"addresses": ["10.0.0.4"], "conditions": {"serving": true, "terminating": true}},
        {"addresses": ["10.0.0.5"], "conditions": {"serving": false, "terminating": true}},
        {"addresses": ["fd00::6"]},
        {"addresses": ["host.example.org"]},
    ]});
    let expected = ["10.0.0.1:9001", "10.0.0.2:9001", "10.0.0.3:9001", "10.0.0.4:9001", "[fd00::6]:9001"];
    assert_eq!(seeds(slice.clone()), set(&expected));
    for ports in
        [json!(null), json!([]), json!([{"name": "peer", "port": 1}]), json!([{"name": "gossip", "port": null}])]
    {
        let mut slice = slice.clone();
        slice["ports"] = ports.clone();
        assert!(seeds(slice).iter().all(|seed| seed.port() == 8002), "{ports}");
    }
    assert_eq!(seeds(json!({"addressType": "IPv6", "metadata": {}, "endpoints": []})), set(&[]));
}

#[test]
fn a_node_says_its_internal_addresses() {
    let node = json!({"metadata": {"name": "n"}, "status": {"addresses": [
        {"type": "Hostname", "address": "n"}, {"type": "ExternalIP", "address": "192.0.2.1"},
        {"type": "InternalIP", "address": "10.0.0.1"}, {"type": "InternalIP", "address": "fd00::1"},
    ]}});
    let node: Node = serde_json::from_value(node).unwrap();
    assert_eq!(node.seeds(8002), set(&["10.0.0.1:8002", "[fd00::1]:8002"]));
    assert_eq!(Node::default().seeds(8002), set(&[]));
}

#[test]
fn refusals_are_told_apart() {
    let status = |reason: &str| Status { reason: reason.to_owned(), ..Status::default() };
    assert_eq!(refusal(410, &status(""), None), Failure::Expired);
    assert_eq!(refusal(0, &status("Expired"), None), Failure::Expired);
    assert!(matches!(refusal(403, &status("Forbidden"), None), Failure::Forbidden { code: 403, .. }));
    let pause = Some(Duration::from_secs(3));
    assert_eq!(refusal(429, &status("x"), pause), Failure::Refused { code: 429, message: "x".into(), pause });
}

#[tokio::test]
async fn changes_of_slices_are_acted_on() {
    let (server, discovery, mut seeds) = watched().await;
    let first = server.state().asked[0].clone();
    assert_eq!(first.path, "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices");
    assert_eq!(first.parameter("labelSelector"), Some("kubernetes.io%2Fservice-name%3Ddarter"));
    assert_eq!(first.authorization, "Bearer of-the-agent");
    let watch = server.state().watches()[0].clone();
    assert_eq!(watch.parameter("allowWatchBookmarks"), Some("true"));
    // Its own address is among them.
    server.put("darter-b", endpoints(&["10.0.0.2", "10.0.0.99"]));
    let mut took = vec![until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9001"]).await];
    server.put("darter-a", endpoints(&["10.0.0.3"]));
    took.push(until(&mut seeds, &["10.0.0.3:9001", "10.0.0.2:9001"]).await);
    server.delete("darter-b");
    took.push(until(&mut seeds, &["10.0.0.3:9001"]).await);
    server.delete("darter-a");
    took.push(until(&mut seeds, &[]).await);
    assert!(took.iter().all(|took| *took < ACTED_ON), "{took:?}");
    assert_eq!(server.state().lists(), 1);
    assert_eq!(server.state().watches().len(), 1);
    discovery.shutdown().await;
}

#[tokio::test]
async fn nodes_are_seeds_and_lists_come_in_pages() {
    let server = Server::start().await;
    server.page_max(2);
    let node = |ip: &str| json!({"status": {"addresses": [{"type": "InternalIP", "address": ip}]}});
    for at in 1..=5 {
        server.put(&format!("node-{at}"), node(&format!("10.0.0.{at}")));
    }
    let discovery = start(&server, Watched::Nodes);
    let mut seeds = discovery.seeds.clone();
    until(&mut seeds, &["10.0.0.1:8002", "10.0.0.2:8002", "10.0.0.3:8002", "10.0.0.4:8002", "10.0.0.5:8002"]).await;
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    let pages: Vec<_> = server.state().asked.iter().filter(|asked| !asked.is_watch()).cloned().collect();
    assert_eq!(pages.len(), 3);
    assert!(pages.iter().all(|page| page.path == "/api/v1/nodes" && page.parameter("limit") == Some("100")));
    server.delete("node-5");
    until(&mut seeds, &["10.0.0.1:8002", "10.0.0.2:8002", "10.0.0.3:8002", "10.0.0.4:8002"]).await;
    discovery.shutdown().await;
}

#[tokio::test]
async fn without_a_namespace_it_is_that_of_the_credentials() {
    let server = Server::start().await;
    let discovery = start(&server, Watched::Service { namespace: None, service: "darter".to_owned() });
    asked(&server, |state| !state.asked.is_empty()).await;
    assert_eq!(server.state().asked[0].path, "/apis/discovery.k8s.io/v1/namespaces/of-the-pod/endpointslices");
    discovery.shutdown().await;
}

#[tokio::test]
async fn a_version_that_is_too_old_costs_one_list_and_no_seeds() {
    for told_in_stream in [true, false] {
        let (server, discovery, mut seeds) = watched().await;
        // All values that the seeds take, from here on.
        let mut all = discovery.seeds.clone();
        all.mark_unchanged();
        let record = tokio::spawn(async move {
            let mut values = Vec::new();
            while all.changed().await.is_ok() {
                values.push(all.borrow_and_update().clone());
            }
            values
        });
        server.state().watch_faults.push_back(Fault::Status(500));
        server.cut();
        asked(&server, |state| state.watches().len() >= 2).await;
        // While nobody watches, there is a change, and the history is lost.
        server.put("darter-b", endpoints(&["10.0.0.2"]));
        server.forget(told_in_stream);
        let took = until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9001"]).await;
        assert!(took < ACTED_ON, "{took:?}");
        assert_eq!(server.state().lists(), 2);
        // And on it goes.
        server.put("darter-c", endpoints(&["10.0.0.3"]));
        assert!(until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9001", "10.0.0.3:9001"]).await < ACTED_ON);
        discovery.shutdown().await;
        drop(seeds);
        let values = tokio::time::timeout(DEADLINE, record).await.unwrap().unwrap();
        let kept = "10.0.0.1:9001".parse().unwrap();
        assert!(values.iter().all(|seeds| seeds.contains(&kept)), "{values:?}");
    }
}

#[tokio::test]
async fn a_watch_that_breaks_off_goes_on_where_it_was() {
    let (server, discovery, mut seeds) = watched().await;
    server.put("darter-b", endpoints(&["10.0.0.2"]));
    until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9001"]).await;
    let started = Instant::now();
    server.cut();
    server.delete("darter-b");
    until(&mut seeds, &["10.0.0.1:9001"]).await;
    assert!(started.elapsed() < ACTED_ON, "{:?}", started.elapsed());
    let watches = server.state().watches();
    let versions: Vec<_> = watches.iter().map(|watch| watch.parameter("resourceVersion").unwrap()).collect();
    assert_eq!(versions[..2], ["11", "12"]);
    assert_eq!(server.state().lists(), 1);
    discovery.shutdown().await;
}

#[tokio::test]
async fn bookmarks_are_where_a_watch_goes_on() {
    let (server, discovery, mut seeds) = watched().await;
    server.bookmark(100);
    // A change after it shows that it was read.
    server.put("darter-b", endpoints(&["10.0.0.2"]));
    until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9001"]).await;
    server.bookmark(100);
    asked(&server, server::State::all_sent).await;
    // History ends at the bookmark: only who knows of it can go on without a list.
    server.forget(true);
    server.cut();
    server.put("darter-c", endpoints(&["10.0.0.3"]));
    let took = until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9001", "10.0.0.3:9001"]).await;
    assert!(took < ACTED_ON, "{took:?}");
    assert_eq!(server.state().lists(), 1);
    assert_eq!(server.state().watches()[1].parameter("resourceVersion"), Some("212"));
    discovery.shutdown().await;
}

#[tokio::test]
async fn what_cannot_be_understood_makes_it_list_again() {
    let unknown = json!({"type": "SURPRISE", "object": {}}).to_string();
    let unfit = json!({"type": "ADDED", "object": {"metadata": {"name": "x"}, "endpoints": 5}}).to_string();
    let error = json!({"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "etcd"}}).to_string();
    for line in ["{\"type\": \"ADD", &unknown, &unfit, &error] {
        let (server, discovery, mut seeds) = watched().await;
        server.line(line);
        server.put("darter-b", endpoints(&["10.0.0.2"]));
        let took = until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9001"]).await;
        assert!(took < ACTED_ON, "{line} {took:?}");
        assert_eq!(server.state().lists(), 2, "{line}");
        discovery.shutdown().await;
    }
}

#[tokio::test]
async fn a_line_without_an_end_is_given_up() {
    let (server, discovery, mut seeds) = watched().await;
    server.line(&"x".repeat(3 << 20));
    server.put("darter-b", endpoints(&["10.0.0.2"]));
    assert!(until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9001"]).await < ACTED_ON);
    assert_eq!(server.state().lists(), 2);
    discovery.shutdown().await;
}

#[tokio::test]
async fn a_server_that_fails_is_asked_again() {
    let server = Server::start().await;
    server.put("darter-a", endpoints(&["10.0.0.1"]));
    server.state().list_faults.extend([Fault::Status(500), Fault::Garbage, Fault::Status(503)]);
    server.state().watch_faults.extend([Fault::Status(500), Fault::Status(429)]);
    let discovery = start(&server, service());
    let mut seeds = discovery.seeds.clone();
    // Waits of 0.25, 0.5 and 1 s at most.
    let took = until(&mut seeds, &["10.0.0.1:9001"]).await;
    assert!(took < ACTED_ON, "{took:?}");
    server.put("darter-b", endpoints(&["10.0.0.2"]));
    until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9001"]).await;
    assert_eq!(server.state().lists(), 4, "what was listed is not listed again");
    discovery.shutdown().await;
}

#[tokio::test]
async fn seeds_outlive_the_server_and_nothing_waits_for_it() {
    let (server, discovery, mut seeds) = watched().await;
    seeds.mark_unchanged();
    server.state().watch_faults.extend(vec![Fault::Status(500); 3]);
    server.cut();
    asked(&server, |state| state.watches().len() >= 4).await;
    assert!(!seeds.has_changed().unwrap());
    drop(server);
    // The server is gone for good now; stopping does not wait for it.
    tokio::time::timeout(DEADLINE, discovery.shutdown()).await.unwrap();
    // One that never was holds up the first round for its patience, and no other source.
    let kubeconfig = Some(PathBuf::from("/nowhere/kubeconfig"));
    let gone = Source::Kubernetes(Query { what: Watched::Nodes, port: 8002, kubeconfig });
    let discovery = Discovery::start(vec![gone, Source::Fixed { addresses: vec![OTHER.parse().unwrap()] }], Vec::new());
    until(&mut discovery.seeds.clone(), &[]).await;
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    discovery.shutdown().await;
}

#[tokio::test]
async fn a_slow_server_is_given_up_and_asked_again() {
    let server = Server::start().await;
    server.put("darter-a", endpoints(&["10.0.0.1"]));
    server.state().list_faults.push_back(Fault::Hangs);
    let discovery = start(&server, service());
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    let took = until(&mut discovery.seeds.clone(), &["10.0.0.1:9001"]).await;
    assert!(took < follow::ANSWER_MAX + ACTED_ON, "{took:?}");
    discovery.shutdown().await;
}
