#![allow(clippy::unwrap_used, clippy::panic)]

//! A seeded network in virtual time. Every run with the same seed is the same run.

mod network;

use std::time::Duration;

use darter_tracker::{Digest, EventBody, TaskId};

use super::*;
use network::Network;

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn started(count: usize, seed: u64) -> Network {
    let mut network = Network::new(seed);
    for number in 0..count {
        network.start(number, "lab");
    }
    network
}

#[test]
fn a_cold_start_through_one_seed_takes_three_seconds() {
    for (count, seed) in [(2, 1), (20, 2), (20, 3), (100, 4)] {
        let mut network = started(count, seed);
        let took = network.run_until(secs(3), Network::is_complete);
        assert!(took.is_some(), "{count}: {:?}", network.views());
    }
}

#[test]
fn the_dead_are_noticed_within_twelve_seconds() {
    for (count, seed) in [(20, 5), (100, 6)] {
        let mut network = started(count, seed);
        network.run_until(secs(10), Network::is_complete).unwrap();
        network.run_for(secs(5));
        network.kill(7);
        let took = network.run_until(secs(12), Network::is_complete);
        assert!(took.is_some(), "{count}: {:?}", network.views());
    }
}

#[test]
fn whoever_leaves_is_gone_within_two_seconds() {
    for (count, seed) in [(2, 7), (20, 8), (100, 9)] {
        let mut network = started(count, seed);
        network.run_until(secs(10), Network::is_complete).unwrap();
        network.leave(1);
        let took = network.run_until(secs(2), Network::is_complete);
        assert!(took.is_some(), "{count}: {:?}", network.views());
        network.run_for(secs(20));
        assert!(network.is_complete(), "nobody brings it back");
    }
}

#[test]
fn a_restarted_member_replaces_its_old_self() {
    // Whether its clock went on, stood still or went back.
    for (epoch, within) in [(1_000_600, 3), (1_000_000, 5), (996_400, 30)] {
        let mut network = started(10, 10);
        network.run_until(secs(10), Network::is_complete).unwrap();
        let old = network.id(3);
        network.kill(3);
        network.start_with(3, "lab", epoch);
        assert_ne!(network.id(3), old);
        let took = network.run_until(secs(within), Network::is_complete);
        assert!(took.is_some(), "epoch {epoch}: {:?}", network.views());
        let news = network.news(0);
        assert!(news.contains(&MembershipEvent::Down(old)), "its old promises are void");
    }
}

#[test]
fn a_tenth_lost_kills_nobody() {
    let mut network = started(20, 11);
    network.run_until(secs(10), Network::is_complete).unwrap();
    network.clear_news();
    network.loss = 0.1;
    network.run_for(secs(120));
    for number in 0..20 {
        let news = network.news(number);
        let lost =
            news.iter().filter(|news| matches!(news, MembershipEvent::Down(_) | MembershipEvent::Rejoined { .. }));
        assert_eq!(lost.count(), 0, "{number}: {news:?}");
    }
    assert!(network.is_complete());
}

#[test]
fn a_cold_start_with_a_tenth_lost_takes_seconds() {
    // Without comparisons of views 100 take up to half a minute, and 300 more than one.
    for (count, seed) in [(20, 21), (100, 22), (100, 23), (100, 24), (300, 25)] {
        let mut network = Network::new(seed);
        network.loss = 0.1;
        for number in 0..count {
            network.start(number, "lab");
        }
        let took = network.run_until(secs(10), Network::is_complete);
        assert!(took.is_some(), "{count}: {:?}", network.views());
    }
}

#[test]
fn an_event_is_handled_once_by_everybody_else() {
    let mut network = started(20, 12);
    network.run_until(secs(10), Network::is_complete).unwrap();
    network.clear_news();
    let body = EventBody::Start { task: TaskId::blob(Digest::Sha256([1; 32])) };
    let signed = network.member(5).publish(body).unwrap();
    network.run_for(secs(2));
    for number in 0..20 {
        let heard = network.news(number).iter().filter(|news| **news == MembershipEvent::Event(signed)).count();
        assert_eq!(heard, usize::from(number != 5), "{number}");
    }
    network.run_for(secs(10));
    let events = (0..20).flat_map(|number| network.news(number)).filter(|n| matches!(n, MembershipEvent::Event(_)));
    assert_eq!(events.count(), 19);
}

#[test]
fn clusters_do_not_mix() {
    let mut network = Network::new(13);
    for number in 0..10 {
        network.start(number, if number % 2 == 0 { "lab" } else { "other" });
    }
    network.run_for(secs(30));
    for number in 0..10 {
        // The others' only seed is of the wrong cluster: they stay alone.
        assert_eq!(network.member(number).members().len(), if number % 2 == 0 { 4 } else { 0 });
    }
    assert!(network.dropped.keys().any(|reason| reason.contains("unknown key")), "{:?}", network.dropped);
}

#[test]
fn the_halves_of_a_split_meet() {
    let mut network = started(20, 14);
    network.run_until(secs(10), Network::is_complete).unwrap();
    network.split = Some(10);
    network.run_for(secs(60));
    assert_eq!(network.member(0).members().len(), 9);
    assert_eq!(network.member(15).members().len(), 9);
    network.split = None;
    let took = network.run_until(secs(40), Network::is_complete);
    assert!(took.is_some(), "{:?}", network.views());
}

#[test]
fn a_member_that_starts_before_its_seed_joins_later() {
    let mut network = Network::new(15);
    network.start(1, "lab");
    network.run_for(secs(20));
    network.start(0, "lab");
    assert!(network.run_until(secs(7), Network::is_complete).is_some());
}

#[test]
fn a_seed_is_found_under_any_of_its_addresses() {
    let mut network = started(3, 18);
    network.start_with_alias(3);
    assert!(network.run_until(secs(3), Network::is_complete).is_some());
}

#[test]
fn a_run_is_the_same_every_time() {
    let run = || {
        let mut network = started(20, 16);
        network.loss = 0.05;
        network.run_for(secs(20));
        (0..20).map(|number| network.news(number)).collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
}

#[test]
fn one_address_for_two_members_does_not_flood() {
    let mut network = started(5, 17);
    network.run_until(secs(10), Network::is_complete).unwrap();
    // A sixth claims the address of the third without ever hearing what is sent there.
    network.start_impostor(9, 3);
    network.clear_news();
    network.run_for(secs(30));
    let rejoined = network.news(3).iter().filter(|n| matches!(n, MembershipEvent::Rejoined { .. })).count();
    assert!(rejoined <= 30, "{rejoined}");
}
