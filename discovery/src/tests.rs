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
