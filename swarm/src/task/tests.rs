//! Seeded pulls in virtual time: real homes, downloaders and upload queues on the toy network of [`net`].

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "tests/bounds.rs"]
mod bounds;
#[path = "tests/busy.rs"]
mod busy;
#[path = "tests/loss.rs"]
mod loss;
#[path = "tests/net.rs"]
mod net;

use net::{Net, ORIGIN};

use super::*;
use darter_tracker::ServiceDownRequest;
use rand::RngExt as _;
use std::collections::BTreeSet;

#[test]
fn a_cold_pull_costs_the_registry_one_copy() {
    for seed in 0..15 {
        let count = [2, 3, 5, 16, 40][seed as usize % 5];
        let mut net = Net::new(count, 200, seed);
        net.run();
        assert_eq!(net.fetched(), 200, "seed {seed}: every piece once");
        assert_eq!(net.fallbacks, 0, "seed {seed}");
        assert!(net.requests <= 8 + 4, "seed {seed}: {} requests", net.requests);
        // One node alone takes 600 ms; the last of many shall not take much longer.
        let last = net.nodes.iter().filter_map(|node| node.done_at).max().unwrap();
        assert!(last < Duration::from_millis(1200), "seed {seed}: {count} nodes took {last:?}");
    }
}

#[test]
fn one_node_alone_reads_without_a_pause() {
    let mut net = Net::new(1, 200, 3);
    net.run();
    assert_eq!((net.fetched(), net.requests, net.fallbacks), (200, 1, 0));
    assert!(net.nodes[0].done_at.unwrap() < ORIGIN * 210 + Duration::from_millis(20), "{:?}", net.nodes[0].done_at);
}

#[test]
fn the_rest_finish_when_any_node_dies() {
    for seed in 0..30 {
        let mut net = Net::new(6, 200, seed);
        let victim = seed as usize % 6;
        let at = Duration::from_millis(net.rng.random_range(20..400));
        net.push(at, victim, net::Event::Kill);
        net.run();
        // What only the dead one held or had leased is fetched again, nothing else.
        assert!(net.fetched() <= 200 + 70, "seed {seed}: {} pieces", net.fetched());
    }
}

#[test]
fn a_home_that_freezes_is_left_and_readers_do_not_wait_for_it() {
    for seed in 0..20 {
        let mut net = Net::new(5, 100, seed);
        let home = net.index(net.homes(0)[0]);
        net.push(Duration::ZERO, home, net::Event::Freeze(true));
        net.nodes[home].done_at = Some(Duration::ZERO);
        net.run();
        let last = net.nodes.iter().filter_map(|node| node.done_at).max().unwrap();
        assert!(last < Duration::from_secs(6), "seed {seed}: {last:?}");
        assert!(net.fetched() <= 200, "seed {seed}: {} pieces of 100", net.fetched());
    }
}

#[test]
fn whom_the_registry_refuses_gets_the_blob_from_the_others() {
    for seed in 0..20 {
        let mut net = Net::new(5, 100, seed);
        net.registry_refuses = BTreeSet::from([0, 1, 2]);
        net.run();
        assert_eq!(net.fetched(), 100, "seed {seed}");
    }
}

#[test]
fn a_latecomer_costs_the_registry_nothing() {
    let mut net = Net::new(4, 100, 9);
    net.run();
    let new = net.join();
    net.know(new);
    net.push(Duration::from_secs(1), new, net::Event::Start);
    net.run();
    assert_eq!(net.fetched(), 100);
}

#[test]
fn a_node_that_leaves_is_nobodys_source() {
    let mut net = Net::new(3, 100, 4);
    net.run();
    let gone = net.nodes[0].id;
    let id = net.id;
    for node in 0..3 {
        net.nodes[node].home.service_down(gone, ServiceDownRequest { task: id });
    }
    let at = net.index(net.homes(1)[0]);
    let now = net.now;
    let request = darter_tracker::RegisterRequest::new(id, Some(net.geometry), None);
    let response = net.nodes[at].home.register(NodeId::from_bytes([77; 16]), request, now).unwrap();
    assert!(!response.neighbours.contains(&gone));
}

#[test]
fn lost_news_between_neighbours_stops_nobody() {
    for seed in 0..20 {
        let mut net = Net::new([2, 5, 16][seed as usize % 3], 100, seed);
        net.loses_news = true;
        net.run();
        assert_eq!(net.fetched(), 100, "seed {seed}: the home names who has what nobody was told of");
        let last = net.nodes.iter().filter_map(|node| node.done_at).max().unwrap();
        assert!(last < Duration::from_secs(3), "seed {seed}: {last:?}");
    }
}

#[test]
fn who_has_dropped_a_blob_that_homes_believe_in_stops_nobody() {
    for seed in 0..20 {
        let mut net = Net::new(5, 100, seed);
        net.believed = BTreeSet::from([4]);
        net.nodes[4].done_at = Some(Duration::ZERO);
        net.nodes[4].absent = true;
        net.run();
        let last = net.nodes.iter().filter_map(|node| node.done_at).max().unwrap();
        assert!(last < Duration::from_secs(3), "seed {seed}: {last:?}");
        assert_eq!(net.fetched(), 100, "seed {seed}");
    }
}
