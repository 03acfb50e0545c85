//! Names asked of a scripted server on loopback: what becomes of its answers, of changes, and of its failures.

#![allow(clippy::unwrap_used)]

mod server;

use std::collections::BTreeSet;

use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RecordType;
use tokio::sync::watch;
use tokio::time::Instant;

use super::*;
use crate::{Discovery, Source};
use server::{Mood, Server};

/// Far above what any of this takes; a test that reaches it has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// The name of a headless service.
const NAME: &str = "darter.kube-system.svc.cluster.local";

/// The TTL of all records here, in seconds.
const TTL: u32 = 1;

fn seeds(list: &[&str]) -> BTreeSet<SocketAddr> {
    list.iter().map(|seed| seed.parse().unwrap()).collect()
}

fn start(server: &Server) -> Discovery {
    let query = Query { name: NAME.to_owned(), port: 8002, servers: vec![server.address] };
    Discovery::start(vec![Source::Dns(query)], vec!["10.0.0.9:8002".parse().unwrap()])
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

/// Waits for a condition on what the server was asked.
async fn asked(server: &Server, condition: impl Fn(&server::Zone) -> bool) {
    let waited = tokio::time::timeout(DEADLINE, async {
        while !condition(&server.zone()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap();
}

#[test]
fn a_port_has_its_own_name_first() {
    let query = |name: &str| Query { name: name.to_owned(), port: 1, servers: Vec::new() };
    assert_eq!(query("a.b").srv_names(), ["_gossip._udp.a.b.", "a.b."]);
    assert_eq!(query("a.b.").host_name().as_deref(), Some("a.b."));
    assert_eq!(query("_gossip._udp.a.b").srv_names(), ["_gossip._udp.a.b."]);
    assert_eq!(query("_gossip._udp.a.b").host_name(), None);
}

#[test]
fn waits_follow_the_ttl_and_lacking_answers_come_sooner() {
    let round = |seeds: &[&str], ttl, complete| {
        let ttl = Duration::from_secs(ttl);
        Round { seeds: self::seeds(seeds), ttl, complete }
    };
    let mut backoff = Backoff::up_to(DELAY_MAX);
    assert_eq!(next(&round(&["10.0.0.1:1"], 30, true), &mut backoff, 0.0), Duration::from_secs(30));
    assert_eq!(next(&round(&[], 3600, true), &mut backoff, 0.0), NOTHING_MAX);
    assert_eq!(next(&round(&["10.0.0.1:1"], 30, false), &mut backoff, 1.0), Duration::from_millis(250));
    assert_eq!(next(&round(&["10.0.0.1:1"], 30, false), &mut backoff, 1.0), Duration::from_millis(500));
}

#[tokio::test]
async fn srv_records_give_ports_and_changes_are_acted_on_within_the_ttl_and_a_second() {
    for brings_along in [true, false] {
        let server = Server::start().await;
        {
            let mut zone = server.zone();
            zone.brings_along = brings_along;
            zone.services(&format!("_gossip._udp.{NAME}."), TTL, &[("a.lab.", 9001), ("B.lab.", 9002)]);
            zone.services(&format!("{NAME}."), TTL, &[("a.lab.", 15001)]);
            zone.addresses("a.lab.", TTL, &["10.0.0.1"]);
            zone.addresses("b.lab.", TTL, &["10.0.0.2", "fd00::2"]);
        }
        let discovery = start(&server);
        let mut seeds = discovery.seeds.clone();
        until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9002", "[fd00::2]:9002"]).await;
        assert_eq!(server.zone().asked.iter().any(|(_, kind)| *kind == RecordType::A), !brings_along);
        // First an address, then the service.
        let limit = Duration::from_secs(u64::from(TTL) + 1);
        server.zone().addresses("a.lab.", TTL, &["10.0.0.3"]);
        assert!(until(&mut seeds, &["10.0.0.3:9001", "10.0.0.2:9002", "[fd00::2]:9002"]).await < limit);
        server.zone().services(&format!("_gossip._udp.{NAME}."), TTL, &[("a.lab.", 9007)]);
        assert!(until(&mut seeds, &["10.0.0.3:9007"]).await < limit);
        discovery.shutdown().await;
    }
}

#[tokio::test]
async fn addresses_of_both_families_get_the_port_of_gossip() {
    let server = Server::start().await;
    // As a server does that knows the name, and forwards what is below it to nobody.
    server.zone().refused = Some("_gossip".to_owned());
    server.zone().addresses(&format!("{NAME}."), TTL, &["10.0.0.1", "10.0.0.9", "127.0.0.1", "fd00::1"]);
    let discovery = start(&server);
    let mut seeds = discovery.seeds.clone();
    until(&mut seeds, &["10.0.0.1:8002", "[fd00::1]:8002"]).await;
    server.zone().addresses(&format!("{NAME}."), TTL, &["10.0.0.4"]);
    let took = until(&mut seeds, &["10.0.0.4:8002"]).await;
    assert!(took < Duration::from_secs(u64::from(TTL) + 1), "{took:?}");
    // A service that appears is preferred.
    server.zone().services(&format!("{NAME}."), TTL, &[("c.lab.", 9003)]);
    server.zone().addresses("c.lab.", TTL, &["10.0.0.5"]);
    until(&mut seeds, &["10.0.0.5:9003"]).await;
    // None at all is an answer as well.
    server.zone().services(&format!("{NAME}."), TTL, &[(".", 0)]);
    until(&mut seeds, &[]).await;
    discovery.shutdown().await;
}

#[tokio::test]
async fn the_last_good_answer_outlives_the_server() {
    for mood in [Mood::Fails(ResponseCode::ServFail), Mood::Fails(ResponseCode::Refused), Mood::Silent] {
        let server = Server::start().await;
        server.zone().addresses(&format!("{NAME}."), TTL, &["10.0.0.1"]);
        let discovery = start(&server);
        let mut seeds = discovery.seeds.clone();
        until(&mut seeds, &["10.0.0.1:8002"]).await;
        seeds.mark_unchanged();
        server.zone().mood = mood;
        let before = server.zone().asked.len();
        // It is asked several times, in vain.
        asked(&server, |zone| zone.asked.len() >= before + 4).await;
        assert!(!seeds.has_changed().unwrap(), "{mood:?}: {:?}", *seeds.borrow());
        server.zone().addresses(&format!("{NAME}."), TTL, &["10.0.0.2"]);
        server.zone().mood = Mood::Answers;
        until(&mut seeds, &["10.0.0.2:8002"]).await;
        discovery.shutdown().await;
    }
}

#[tokio::test]
async fn a_target_that_fails_keeps_what_it_had() {
    let server = Server::start().await;
    {
        let mut zone = server.zone();
        zone.brings_along = false;
        zone.services(&format!("{NAME}."), TTL, &[("a.lab.", 9001), ("b.lab.", 9002)]);
        zone.addresses("a.lab.", TTL, &["10.0.0.1"]);
        zone.addresses("b.lab.", TTL, &["10.0.0.2"]);
    }
    let discovery = start(&server);
    let mut seeds = discovery.seeds.clone();
    until(&mut seeds, &["10.0.0.1:9001", "10.0.0.2:9002"]).await;
    server.zone().refused = Some("a.lab".to_owned());
    server.zone().addresses("b.lab.", TTL, &["10.0.0.3"]);
    until(&mut seeds, &["10.0.0.1:9001", "10.0.0.3:9002"]).await;
    discovery.shutdown().await;
}

#[tokio::test]
async fn a_large_answer_comes_over_tcp_and_is_bounded() {
    let server = Server::start().await;
    let hosts: Vec<String> = (0..300).map(|host| format!("h{host:03}.a-rather-long-name-of-a-rack.lab.")).collect();
    let targets: Vec<(&str, u16)> = hosts.iter().map(|host| (host.as_str(), 9001)).collect();
    server.zone().services(&format!("{NAME}."), TTL, &targets);
    for (at, host) in hosts.iter().enumerate() {
        server.zone().addresses(host, TTL, &[&format!("10.0.{}.{}", 1 + at / 200, 1 + at % 200)]);
    }
    let discovery = start(&server);
    let mut seeds = discovery.seeds.clone();
    let full = tokio::time::timeout(DEADLINE, seeds.wait_for(|now| !now.is_empty())).await.unwrap().unwrap().clone();
    assert_eq!(full.len(), crate::index::SEEDS_PER_SOURCE_MAX);
    assert!(full.contains(&"10.0.1.1:9001".parse().unwrap()));
    assert!(server.zone().over_tcp > 0);
    discovery.shutdown().await;
}

#[tokio::test]
async fn without_a_server_the_first_round_ends_all_the_same() {
    let server = Server::start().await;
    server.zone().mood = Mood::Silent;
    let discovery = start(&server);
    tokio::time::timeout(DEADLINE, discovery.first_round()).await.unwrap();
    assert_eq!(*discovery.seeds.borrow(), seeds(&[]));
    server.zone().mood = Mood::Answers;
    server.zone().addresses(&format!("{NAME}."), TTL, &["10.0.0.1"]);
    until(&mut discovery.seeds.clone(), &["10.0.0.1:8002"]).await;
    discovery.shutdown().await;
}
