//! Ten nodes pull one blob of 64 MiB, and in the middle of it something dies, freezes, parts or restarts. The laboratory plays the same
//! scenes with real agents.

use super::net::{Event, Net};
use super::*;

/// Each scene is played with so many seeds, unless the environment says otherwise.
const SEEDS: u64 = 500;
const SEEDS_VARIABLE: &str = "DARTER_SEEDS";

const NODES: usize = 10;
const PIECES: u32 = 256;

/// What the registry may send when some die or freeze: 99 seeds of a hundred cost a tenth more than one copy at most. What is
/// lost with two fetchers that die at the same moment is what they alone had: eight pieces each, and what the one has passed
/// on to the other.
const KILLED: [f64; 3] = [1.03, 1.10, 1.20];

const ONE_SECOND: Duration = Duration::from_secs(1);

/// What all seeds of a scene have shown.
struct Shown {
    /// Pieces that left the registry over those that the blob has, of each seed, in order.
    copies: Vec<f64>,
    /// The longest wait of each client whose node was not disturbed itself, in order.
    stalls: Vec<Duration>,
}

impl Shown {
    fn stall(&self, percent: usize) -> Duration {
        self.stalls[(self.stalls.len() * percent).div_ceil(100) - 1]
    }

    fn copies(&self, percent: usize) -> f64 {
        self.copies[(self.copies.len() * percent).div_ceil(100) - 1]
    }

    /// Judges the copies that half of the seeds, 99 in a hundred and all of them cost, and the stalls of 99 in a hundred
    /// clients.
    fn check(&self, scene: &str, [half, most, all]: [f64; 3], stall_max: Duration) {
        let copies = [50, 99, 100].map(|percent| self.copies(percent));
        let figures = format!(
            "{scene}: copies p50 {:.3} p99 {:.3} max {:.3}; stalls p50 {:?} p99 {:?} max {:?}",
            copies[0],
            copies[1],
            copies[2],
            self.stall(50),
            self.stall(99),
            self.stall(100)
        );
        println!("{figures}");
        assert!(copies[0] <= half && copies[1] <= most && copies[2] <= all, "{figures}");
        assert!(self.stall(99) <= stall_max, "{figures}");
    }
}

/// Plays a scene with every seed. It gets the swarm in the middle of its pull, disturbs it, and returns the nodes whose own
/// clients do not count.
#[allow(clippy::disallowed_methods, reason = "the core reads no environment; its tests may be asked for more seeds")]
fn play(disturb: impl Fn(&mut Net) -> Vec<usize>) -> Shown {
    let mut shown = Shown { copies: Vec::new(), stalls: Vec::new() };
    let seeds = std::env::var(SEEDS_VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS);
    for seed in 0..seeds {
        let mut net = Net::new(NODES, PIECES, seed);
        let middle = net.rng.random_range(PIECES / 10..PIECES * 2 / 3);
        net.run_until(middle);
        let disturbed = disturb(&mut net);
        net.run();
        let copies = f64::from(net.fetched()) / f64::from(PIECES);
        shown.copies.push(copies);
        let others = net.nodes.iter().enumerate().filter(|(node, _)| !disturbed.contains(node));
        shown.stalls.extend(others.map(|(_, node)| node.stall));
    }
    shown.copies.sort_by(f64::total_cmp);
    shown.stalls.sort_unstable();
    shown
}

/// The first so many in rank.
fn homes(net: &Net, count: usize) -> Vec<usize> {
    net.homes(0).into_iter().take(count).map(|home| net.index(home)).collect()
}

fn kill(net: &mut Net, victims: Vec<usize>) -> Vec<usize> {
    for victim in &victims {
        net.push(Duration::ZERO, *victim, Event::Kill);
    }
    victims
}

#[test]
fn nothing_happens() {
    play(|_| Vec::new()).check("calm", [1.0, 1.0, 1.0], Duration::from_millis(200));
}

#[test]
fn the_home_dies() {
    play(|net| kill(net, homes(net, 1))).check("home killed", KILLED, ONE_SECOND);
}

#[test]
fn the_home_and_its_first_stand_by_die() {
    play(|net| kill(net, homes(net, 2))).check("home and stand-by killed", KILLED, ONE_SECOND);
}

#[test]
fn two_that_serve_die() {
    let scene = |net: &mut Net| {
        let homes = homes(net, 3);
        let victims = (0..NODES).filter(|node| !homes.contains(node)).take(2).collect();
        kill(net, victims)
    };
    play(scene).check("two peers killed", KILLED, ONE_SECOND);
}

#[test]
fn three_freeze_for_twenty_seconds() {
    let scene = |net: &mut Net| {
        let first = net.rng.random_range(0..NODES);
        let frozen: Vec<usize> = (first..first + 3).map(|node| node % NODES).collect();
        for node in &frozen {
            net.push(Duration::ZERO, *node, Event::Freeze(true));
            net.push(Duration::from_secs(20), *node, Event::Freeze(false));
        }
        frozen
    };
    play(scene).check("three frozen", KILLED, ONE_SECOND);
}

#[test]
fn the_swarm_parts_for_fifteen_seconds() {
    let scene = |net: &mut Net| {
        net.push(Duration::ZERO, 0, Event::Part(Some(NODES / 2)));
        net.push(Duration::from_secs(15), 0, Event::Part(None));
        Vec::new()
    };
    play(scene).check("parted", [2.0, 2.1, 2.6], ONE_SECOND * 2);
}

#[test]
fn all_restart_one_after_the_other() {
    let scene = |net: &mut Net| {
        for node in 0..NODES {
            net.push(Duration::from_millis(200) * node as u32, node, Event::Restart);
        }
        // Whatever was begun is begun anew by a node of another name.
        (0..2 * NODES).collect()
    };
    let mut shown = play(scene);
    shown.stalls.push(Duration::ZERO);
    shown.check("restarted", [1.10, 1.50, 1.75], Duration::ZERO);
}
