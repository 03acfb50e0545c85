//! Discovery as a whole, with names that resolve without a network.

#![allow(clippy::unwrap_used)]

use super::*;

/// Far above what any of this takes; a test that reaches it has failed.
const DEADLINE: Duration = Duration::from_secs(20);

fn fixed(addresses: &[&str]) -> Source {
    Source::Fixed { addresses: addresses.iter().map(|address| address.parse().unwrap()).collect() }
}

/// An address on loopback that no test speaks of: with it, others on loopback count.
fn local() -> Vec<SocketAddr> {
    vec!["127.0.0.1:9".parse().unwrap()]
}

fn seeds(list: &[&str]) -> BTreeSet<SocketAddr> {
    list.iter().map(|seed| seed.parse().unwrap()).collect()
}

#[tokio::test]
async fn without_sources_the_first_round_is_over_at_once() {
    let discovery = Discovery::start(Vec::new(), Vec::new());
    assert!(*discovery.first_round.borrow());
    discovery.first_round().await;
    assert!(discovery.seeds.borrow().is_empty());
    discovery.shutdown().await;
}

#[tokio::test]
async fn literals_of_all_sources_are_seeds_and_own_ones_are_not() {
    let sources = vec![fixed(&["10.0.0.1:8002", "10.0.0.2:8002"]), fixed(&["[fd00::3]:8002"]), fixed(&[])];
    let discovery = Discovery::start(sources, vec!["10.0.0.1:8002".parse().unwrap()]);
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    assert_eq!(*discovery.seeds.borrow(), seeds(&["10.0.0.2:8002", "[fd00::3]:8002"]));
    discovery.shutdown().await;
}

#[tokio::test]
async fn an_agent_that_listens_everywhere_is_not_its_own_seed() {
    // Loopback is the only address that every host has; the second entry lets it count at all.
    let own = vec!["0.0.0.0:8002".parse().unwrap(), "127.0.0.1:9".parse().unwrap()];
    let said = fixed(&["127.0.0.1:8002", "127.0.0.1:8003", "192.0.2.1:8002"]);
    let discovery = Discovery::start(vec![said], own);
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    assert_eq!(*discovery.seeds.borrow(), seeds(&["127.0.0.1:8003", "192.0.2.1:8002"]));
    discovery.shutdown().await;
}

#[tokio::test]
async fn names_are_looked_up() {
    let discovery = Discovery::start(vec![fixed(&["localhost:8002", "10.0.0.2:8002"])], local());
    let mut updates = discovery.seeds.clone();
    let local = |set: &BTreeSet<SocketAddr>| set.iter().any(|seed| seed.ip().is_loopback() && seed.port() == 8002);
    let found = tokio::time::timeout(DEADLINE, updates.wait_for(local)).await.unwrap().unwrap().clone();
    assert!(found.contains(&"10.0.0.2:8002".parse().unwrap()));
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    discovery.shutdown().await;
}

#[tokio::test]
async fn a_name_that_does_not_resolve_holds_up_neither_the_others_nor_the_first_round_for_long() {
    let started = Instant::now();
    let discovery = Discovery::start(vec![fixed(&["10.0.0.2:8002", "nowhere.invalid:8002"])], Vec::new());
    let mut updates = discovery.seeds.clone();
    tokio::time::timeout(DEADLINE, updates.wait_for(|set| !set.is_empty())).await.unwrap().unwrap();
    assert!(!*discovery.first_round.borrow());
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    assert!(started.elapsed() >= FIRST_ROUND_PATIENCE);
    discovery.shutdown().await;
}

#[tokio::test]
async fn shutdown_ends_the_tasks() {
    let discovery = Discovery::start(vec![fixed(&["localhost:8002"])], local());
    let mut updates = discovery.seeds.clone();
    tokio::time::timeout(DEADLINE, discovery.shutdown()).await.unwrap();
    // The sender went with the task that held it.
    let ended = async { while updates.changed().await.is_ok() {} };
    tokio::time::timeout(DEADLINE, ended).await.unwrap();
}

/// Waits until the seeds are these; gives the time that it took.
async fn until(seeds: &mut watch::Receiver<BTreeSet<SocketAddr>>, expected: &[&str]) -> Duration {
    let started = Instant::now();
    let expected = self::seeds(expected);
    let waited =
        tokio::time::timeout(DEADLINE, seeds.wait_for(|now| *now == expected)).await.map(|found| found.is_ok());
    assert_eq!(waited, Ok(true), "expected {expected:?}, have {:?}", *seeds.borrow());
    started.elapsed()
}

#[tokio::test]
async fn a_file_is_read_again_when_it_changes_and_may_be_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peers");
    let sources = vec![Source::File { path: path.clone() }, fixed(&["10.0.0.9:8002"])];
    let discovery = Discovery::start(sources, Vec::new());
    let mut seeds = discovery.seeds.clone();
    // No file is an answer: nothing is waited for.
    let started = Instant::now();
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    assert!(started.elapsed() < FIRST_ROUND_PATIENCE);
    let limit = Duration::from_secs(2);
    std::fs::write(&path, "10.0.0.1:8002\n# 10.0.0.2:8002\nnonsense\n").unwrap();
    assert!(until(&mut seeds, &["10.0.0.1:8002", "10.0.0.9:8002"]).await < limit);
    // Of the same length, and perhaps within the same tick of the file system's clock.
    std::fs::write(&path, "10.0.0.3:8002\n# 10.0.0.2:8002\nnonsense\n").unwrap();
    assert!(until(&mut seeds, &["10.0.0.3:8002", "10.0.0.9:8002"]).await < limit);
    // Replaced as a mounted ConfigMap is: by something else under the same name.
    std::fs::write(dir.path().join("new"), "[fd00::1]:8002").unwrap();
    std::fs::rename(dir.path().join("new"), &path).unwrap();
    assert!(until(&mut seeds, &["[fd00::1]:8002", "10.0.0.9:8002"]).await < limit);
    std::fs::remove_file(&path).unwrap();
    assert!(until(&mut seeds, &["10.0.0.9:8002"]).await < limit);
    discovery.shutdown().await;
}

#[tokio::test]
async fn names_in_a_file_are_looked_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peers");
    std::fs::write(&path, "localhost:8002\n10.0.0.1:8002\n").unwrap();
    let discovery = Discovery::start(vec![Source::File { path }], local());
    let mut updates = discovery.seeds.clone();
    let both = |set: &BTreeSet<SocketAddr>| {
        set.iter().any(|seed| seed.ip().is_loopback()) && set.contains(&"10.0.0.1:8002".parse().unwrap())
    };
    tokio::time::timeout(DEADLINE, updates.wait_for(both)).await.unwrap().unwrap();
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    discovery.shutdown().await;
}

#[tokio::test]
async fn an_agent_is_useful_while_every_source_is_down() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere");
    // A port that nobody listens at.
    let closed = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let what = kubernetes::Watched::Nodes;
    let sources = vec![
        Source::File { path: nowhere.clone() },
        Source::Dns(dns::Query { name: "a.b".to_owned(), port: 8002, servers: vec![closed] }),
        Source::Kubernetes(kubernetes::Query { what, port: 8002, kubeconfig: Some(nowhere) }),
        fixed(&["nowhere.invalid:8002"]),
    ];
    let started = Instant::now();
    let discovery = Discovery::start(sources, Vec::new());
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    // The patience, and a busy machine's delay.
    assert!(started.elapsed() < FIRST_ROUND_PATIENCE + Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(discovery.seeds.borrow().is_empty());
    tokio::time::timeout(Duration::from_secs(2), discovery.shutdown()).await.unwrap();
}
