//! A registry that wants to be left alone (429 with `Retry-After`): one fetcher hears it, and everybody holds back.

use super::net::{Bad, Net};
use super::*;
use crate::home::pause::WORD_MAX;
use fallback::STRANDED;

/// What is under way when the registry says so: each fetcher may have asked, and its answer and the news of it take a moment.
const UNDER_WAY: Duration = Duration::from_millis(20);

/// The pull goes on so soon after the pause: members ask their home again every two seconds.
const GOES_ON: Duration = Duration::from_secs(5);

fn busy(count: usize, seed: u64, rest: Duration) -> Net {
    let mut net = Net::new(count, 200, seed);
    let before = net.rng.random_range(1..100);
    net.run_until(before);
    net.rest = Some(rest);
    net.run();
    net
}

#[test]
fn nobody_asks_while_the_registry_rests() {
    for seed in 0..60 {
        let count = [1, 2, 5, 16][seed as usize % 4];
        let rest = Duration::from_secs(1 + seed % 9);
        let net = busy(count, seed, rest);
        let late = net.asked_in_rest.iter().filter(|left| rest - **left > UNDER_WAY).count();
        assert_eq!(late, 0, "seed {seed}: {count} nodes, {rest:?}: {:?} before the end", net.asked_in_rest);
        assert_eq!(net.fetched(), 200, "seed {seed}: and every piece is fetched once");
        let last = net.nodes.iter().filter_map(|node| node.done_at).max().unwrap();
        assert!(last < rest + GOES_ON, "seed {seed}: {rest:?}, done after {last:?}");
    }
}

#[test]
fn a_longer_rest_is_asked_about_once_more() {
    for seed in 0..20 {
        let rest = WORD_MAX * 3;
        let net = busy(16, seed, rest);
        // After one member's word has lapsed the next fetchers find out for themselves, which makes them two.
        let late = net.asked_in_rest.iter().filter(|left| rest - **left > UNDER_WAY).count();
        assert!(late <= crate::home::lease::FETCHERS_SMALL, "seed {seed}: {:?}", net.asked_in_rest);
        assert_eq!(net.fetched(), 200, "seed {seed}");
    }
}

/// Row 132: of twenty members four are of no use: two send wrong bytes, one takes requests and says nothing, one dies.
#[test]
fn everybody_else_finishes_where_every_fifth_is_bad() {
    let (mut copies, mut stalls) = (Vec::new(), Vec::new());
    for seed in 0..100 {
        let mut net = Net::new(20, 200, seed);
        for (node, bad) in [(3, Bad::Lies), (7, Bad::Lies), (11, Bad::Idles)] {
            net.nodes[node].bad = Some(bad);
        }
        let at = Duration::from_millis(net.rng.random_range(20..400));
        net.push(at, 15, net::Event::Kill);
        net.run();
        copies.push(f64::from(net.fetched()) / 200.0);
        stalls.extend(net.nodes.iter().enumerate().filter(|(node, _)| *node != 15).map(|(_, node)| node.stall));
    }
    copies.sort_by(f64::total_cmp);
    stalls.sort_unstable();
    let (half, most) = (copies[copies.len() / 2], copies[copies.len() - 1]);
    let stall = stalls[stalls.len() * 99 / 100];
    println!("every fifth is bad: copies p50 {half:.3} max {most:.3}; stalls p99 {stall:?} max {:?}", stalls.last());
    assert!(half <= 1.15 && most <= 1.5, "copies p50 {half:.3} max {most:.3}");
    // Who is alive and gives nothing of what he alone has is given up after that; he costs one such wait, not one for each piece.
    assert!(stall <= STRANDED + Duration::from_secs(1), "stalls p99 {stall:?}");
}
