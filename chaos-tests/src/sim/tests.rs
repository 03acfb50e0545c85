//! Small runs of the simulator.

use std::time::Duration;

use super::trace::{Filter, record, replay};
use super::*;

fn scenario(change: impl FnOnce(&mut Scenario)) -> Scenario {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        scenario: Scenario,
    }
    let mut scenario = <Line as clap::Parser>::parse_from(["sim"]).scenario;
    (scenario.nodes, scenario.image, scenario.rate, scenario.registry_rate) = (40, 32 << 20, 100_000_000, 100_000_000);
    change(&mut scenario);
    assert_eq!(scenario.check(), Ok(()));
    scenario
}

fn of(scenario: &Scenario) -> Report {
    play(scenario, &mut |_, _| ())
}

#[test]
fn the_same_seed_gives_the_same_run_byte_for_byte() {
    let scenario = scenario(|it| (it.loss, it.kill, it.lying, it.layers) = (0.01, 2, 0.05, 3));
    let run = || {
        let mut record_ = Vec::new();
        let report = record(&scenario, &mut record_).expect("memory can be written");
        (record_, serde_json::to_string(&report).expect("a report can be written"))
    };
    let (one, other) = (run(), run());
    assert!(one == other, "two runs of one seed differ");
    let another = Scenario { seed: scenario.seed + 1, ..scenario.clone() };
    assert_ne!(serde_json::to_string(&of(&another)).expect("it can be written"), one.1);
}

#[test]
fn a_record_is_played_again_and_one_that_differs_is_found_out() {
    let scenario = scenario(|it| it.nodes = 5);
    let mut written = Vec::new();
    let report = record(&scenario, &mut written).expect("memory can be written");
    let mut shown = 0;
    let again = replay(written.as_slice(), Filter::default(), |_| shown += 1).expect("nothing has changed");
    assert_eq!((again, shown), (Some(report.clone()), report.events as usize));
    let only = Filter { node: Some(3), ..Filter::default() };
    let mut lines = Vec::new();
    replay(written.as_slice(), only, |line| lines.push(line.to_owned())).expect("nothing has changed");
    assert!(!lines.is_empty() && lines.len() < shown);
    let text = String::from_utf8(written).expect("a record is text");
    let forged = text.replacen("Asked(", "Asking(", 1);
    let error = replay(forged.as_bytes(), Filter::default(), |_| ()).expect_err("it differs");
    assert!(error.to_string().contains("Asking("), "{error}");
}

#[test]
fn a_calm_pull_costs_one_copy_and_little_more_than_the_bound() {
    for nodes in [2, 16, 100] {
        let report = of(&scenario(|it| it.nodes = nodes));
        assert_eq!((report.done, report.unfinished), (nodes, 0));
        assert!(report.egress <= 1.02, "{report:?}");
        assert!(report.last <= 1.35 && report.p50 <= report.last, "{report:?}");
    }
}

/// Homes that none of the other half knows would cost a copy each.
#[test]
fn views_that_disagree_cost_little_more_than_one_copy() {
    for (nodes, views, seed) in [(16, 2, 1), (50, 2, 2), (100, 2, 3), (100, 2, 7), (50, 3, 1)] {
        let report = of(&scenario(|it| (it.nodes, it.image, it.views, it.seed) = (nodes, 64 << 20, views, seed)));
        assert!(report.unfinished == 0 && report.egress <= 1.08 && report.last <= 1.25, "{report:?}");
    }
}

/// Answers that come late are no deaths: a crowded link must not send everybody to the registry, which crowds it more.
#[test]
fn long_ways_cost_time_and_no_copies() {
    for milliseconds in [100, 200, 300] {
        let report = of(&scenario(|it| (it.nodes, it.latency) = (8, Duration::from_millis(milliseconds))));
        assert_eq!(report.unfinished, 0, "{report:?}");
        assert!(report.egress <= 1.2, "{milliseconds} ms: {report:?}");
    }
}

/// The homes of all layers would lend to the few that ask first, and who is slow to pass on would hold up the whole image.
#[test]
fn many_layers_are_fetched_by_many_and_slow_ones_hold_up_nobody() {
    let layers = |it: &mut Scenario| (it.nodes, it.image, it.layers) = (16, 128 << 20, 8);
    let calm = of(&scenario(layers));
    assert!(calm.egress <= 1.02 && calm.last <= 1.10, "{calm:?}");
    // The first pieces of the layers that are read share the registry's link with nothing else, however many are begun ahead.
    let all = of(&scenario(|it| {
        layers(it);
        it.ahead = 8;
    }));
    for report in [&calm, &all] {
        assert!(report.first_byte_p50_s <= 0.25 && report.first_byte_max_s <= 0.40, "{report:?}");
    }
    for seed in 1..=6 {
        let report = of(&scenario(|it| {
            layers(it);
            (it.slow, it.seed) = (0.125, seed);
        }));
        assert!(report.egress <= 1.02 && report.last <= 1.3, "{report:?}");
    }
}

#[test]
fn a_node_alone_reads_as_fast_as_its_link() {
    let report = of(&scenario(|it| it.nodes = 1));
    assert!((report.egress - 1.0).abs() < 1e-9 && report.last < 1.1, "{report:?}");
    assert_eq!(report.registry_requests, 1);
}

#[test]
fn nobody_else_suffers_from_the_dead_the_frozen_the_lying_and_the_lazy() {
    type Change = fn(&mut Scenario);
    let cases: [(&str, Change); 4] = [
        ("dead", |it| it.kill = 4),
        ("frozen", |it| it.freeze = 4),
        ("lying", |it| it.lying = 0.2),
        ("lazy", |it| it.lazy = 0.2),
    ];
    for (name, change) in cases {
        let report = of(&scenario(change));
        assert_eq!(report.unfinished, 0, "{name}: {report:?}");
        // What a lazy fetcher alone has is fetched again, once a reader has complained of it.
        assert!(report.egress <= 1.6, "{name}: {report:?}");
    }
}

/// What lazy ones keep that are among the first to be lent to is fetched by others after seconds, not one piece after the other, and
/// who waits for it fetches other runs meanwhile. How often that happens is a matter of the seed: of thirty, one took 2.1 times the
/// bound, and one cost 1.32 copies.
#[test]
fn fetchers_that_give_nothing_are_found_out() {
    const SEEDS: u64 = 12;
    let mut copies = 0.0;
    for seed in 1..=SEEDS {
        let lazy = |it: &mut Scenario| (it.nodes, it.image, it.lazy, it.seed) = (16, 128 << 20, 0.2, seed);
        let report = of(&scenario(lazy));
        assert!(report.unfinished == 0 && report.last <= 3.0 && report.egress <= 1.5, "{report:?}");
        copies += report.egress / SEEDS as f64;
    }
    assert!(copies <= 1.2, "{copies}");
}

#[test]
fn a_registry_with_trouble_is_asked_until_it_answers() {
    let report = of(&scenario(|it| (it.registry_errors, it.registry_requests_max) = (0.3, Some(3))));
    assert_eq!(report.unfinished, 0);
    assert!(report.registry_refusals > 0 && report.egress < 1.2, "{report:?}");
}

#[test]
fn a_sweep_writes_a_table_and_a_plot() {
    let out = tempfile::tempdir().expect("there is room");
    let scenario = scenario(|it| it.image = 4 << 20);
    let files = sweep::run(&scenario, "nodes=2,4", 2, out.path(), |_| ()).expect("it can be written");
    let table = std::fs::read_to_string(&files[0]).expect("it is there");
    assert_eq!(table.lines().count(), 1 + 4);
    assert!(table.lines().nth(3).is_some_and(|row| row.starts_with("nodes,4,1,")), "{table}");
    let plot = std::fs::read_to_string(&files[1]).expect("it is there");
    assert!(plot.starts_with("<svg") && plot.contains("egress / image"), "{plot}");
    assert!(sweep::run(&scenario, "knots=1", 1, out.path(), |_| ()).is_err());
    assert!(sweep::run(&scenario, "nodes=0", 1, out.path(), |_| ()).is_err());
}
