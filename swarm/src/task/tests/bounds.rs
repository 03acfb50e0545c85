//! How much is asked of whom at a time, and in which order.

// A simulation needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods)]

use super::net::Net;
use super::*;
use crate::intake::PIECES_MAX;
use crate::upload::{ACTIVE, AHEAD, QUEUE_PER_TASK, Step, Ticket, Uploads};
use darter_tracker::{Added, Digest, PieceSize, PieceSource};
use neighbour::PIPELINE;

fn node(byte: u8) -> NodeId {
    NodeId::from_bytes([byte; 16])
}

/// A downloader of 100 pieces that holds the first ten, and whose client waits for the eleventh.
fn reading(seed: u64, now: Instant) -> Task {
    let geometry = Geometry::new(100 << 18, PieceSize::new(1 << 18).unwrap()).unwrap();
    let mut have = Bitmap::new(100);
    (0..10).for_each(|piece| {
        have.insert(PieceIndex(piece));
    });
    let id = TaskId::blob(Digest::Sha256([1; 32]));
    let mut task = Task::new(id, geometry, have, vec![node(99)], seed, now);
    task.handle_reader(ReaderId(1), PieceIndex(10), now);
    while task.poll_action().is_some() {}
    task
}

fn holding(pieces: impl IntoIterator<Item = u32>) -> Bitmap {
    let mut has = Bitmap::new(100);
    pieces.into_iter().for_each(|piece| {
        has.insert(PieceIndex(piece));
    });
    has
}

/// What is taken if `peer` offers as many turns as it is asked for.
fn taken(task: &mut Task, peer: NodeId, now: Instant) -> Vec<u32> {
    taken_of_named(task, peer, None, now)
}

/// The same if it names a piece on each.
fn taken_of_named(task: &mut Task, peer: NodeId, rather: Option<PieceIndex>, now: Instant) -> Vec<u32> {
    let mut taken = Vec::new();
    while let Some(action) = task.poll_action() {
        match action {
            Action::Ask { peer: asked } if asked == peer => task.handle_turn(peer, rather, true, now),
            Action::Take { piece, .. } => taken.push(piece.0),
            _ => {}
        }
    }
    taken
}

/// Row 25: the pieces that the fewest neighbours hold come first, whichever they are.
#[test]
fn the_rarest_piece_is_taken_first() {
    let start = Instant::now();
    let mut chosen = [0_u32; 100];
    const SEEDS: u64 = 400;
    for seed in 0..SEEDS {
        let mut task = reading(seed, start);
        // Three hold all but every fifth piece, and offer no turn: they only make pieces common.
        for other in 2..5 {
            task.handle_neighbour_up(node(other), holding((10..100).filter(|piece| piece % 5 != 0)), start);
        }
        task.handle_neighbour_up(node(1), holding(10..100), start);
        let taken = taken(&mut task, node(1), start);
        assert_eq!(taken.len(), PIPELINE, "seed {seed}");
        for piece in taken {
            assert_eq!(piece % 5, 0, "seed {seed}: {piece} is held by four");
            chosen[piece as usize] += 1;
        }
    }
    // All of the eighteen rare ones alike, within four standard deviations: neighbours that all chose the same would be no swarm.
    let rare: Vec<u32> = (10..100).step_by(5).collect();
    let expected = f64::from(SEEDS as u32 * PIPELINE as u32) / rare.len() as f64;
    for piece in rare {
        let times = f64::from(chosen[piece as usize]);
        assert!((times - expected).abs() < 4.0 * expected.sqrt(), "{piece}: {times} times of {expected}");
    }
}

/// A neighbour that names what it alone has decides between pieces that are as rare, and nothing else.
#[test]
fn of_pieces_that_are_as_rare_the_named_one_is_taken() {
    let start = Instant::now();
    for seed in 0..50 {
        let mut task = reading(seed, start);
        task.handle_neighbour_up(node(2), holding([20]), start);
        task.handle_neighbour_up(node(1), holding(10..100), start);
        let named = |task: &mut Task, piece| taken_of_named(task, node(1), Some(PieceIndex(piece)), start);
        assert_eq!(named(&mut task, 77)[0], 77, "seed {seed}");
        let mut task = reading(seed, start);
        task.handle_neighbour_up(node(2), holding([20]), start);
        task.handle_neighbour_up(node(1), holding(10..100), start);
        // One that is not as rare, one that it does not offer, one that there is not.
        for piece in [20, 3, u32::MAX] {
            assert!(!named(&mut task, piece).contains(&piece), "seed {seed}: {piece}");
        }
    }
}

/// Row 25, the other half: what the client has waited for goes before what is rare.
#[test]
fn what_a_reader_has_waited_for_comes_first() {
    let start = Instant::now();
    let later = start + pick::READER_PATIENCE;
    for seed in 0..50 {
        let mut task = reading(seed, start);
        for other in 2..5 {
            task.handle_neighbour_up(node(other), holding([10]), start);
        }
        task.handle_neighbour_up(node(1), holding(10..100), later);
        assert_eq!(taken(&mut task, node(1), later)[0], 10, "seed {seed}");
    }
}

/// Rows 30 and 31, in whole pulls: at every moment.
#[test]
fn no_peer_is_asked_for_more_than_its_share_and_none_uploads_more() {
    for (count, seed) in [(2, 1), (5, 2), (16, 3), (40, 4)] {
        let mut net = Net::new(count, 200, seed);
        let (mut peer_most, mut all_most, mut uploads_most) = (0, 0, 0);
        while net.nodes.iter().any(|node| node.done_at.is_none()) {
            net.step();
            for node in &net.nodes {
                let in_flight = node
                    .task
                    .iter()
                    .flat_map(|task| task.neighbours.values().map(|neighbour| neighbour.requested().count()));
                let in_flight: Vec<usize> = in_flight.collect();
                peer_most = in_flight.iter().copied().max().unwrap_or(0).max(peer_most);
                all_most = in_flight.iter().sum::<usize>().max(all_most);
                uploads_most = node.uploads.active().max(uploads_most);
            }
        }
        assert!(peer_most <= PIPELINE && all_most <= PIECES_MAX && uploads_most <= ACTIVE, "{count} nodes");
        assert!(count < 16 || (all_most, uploads_most) == (PIECES_MAX, ACTIVE), "{count} nodes use what they may");
    }
}

/// A blob that nobody reads yet takes two pieces at a time from all its neighbours together, and its share when it is read.
#[test]
fn what_is_fetched_ahead_takes_little() {
    let start = Instant::now();
    let mut task = reading(1, start);
    task.handle_reader_gone(ReaderId(1), start);
    task.handle_background(true, start);
    for peer in 1..=8 {
        task.handle_neighbour_up(node(peer), holding(10..100), start);
    }
    let all = |task: &mut Task| (1..=8).map(|peer| taken(task, node(peer), start).len()).sum::<usize>();
    // Everybody is asked, and the first two turns are used.
    let asked: Vec<Action> = std::iter::from_fn(|| task.poll_action()).collect();
    assert_eq!(asked.iter().filter(|action| matches!(action, Action::Ask { .. })).count(), 8);
    (1..=8).for_each(|peer| task.handle_turn(node(peer), None, true, start));
    assert_eq!(all(&mut task), 2);
    task.handle_background(false, start);
    let asked: Vec<Action> = std::iter::from_fn(|| task.poll_action()).collect();
    assert_eq!(asked.iter().filter(|action| matches!(action, Action::Ask { .. })).count(), 8);
    (1..=8).for_each(|peer| task.handle_turn(node(peer), None, true, start));
    assert_eq!(all(&mut task), 8, "every turn is used");
}

/// With no room nobody is asked. A place has two asked, who has what a reader waits for among them, and another for each that has no
/// turn to give.
#[test]
fn a_place_is_worth_two_questions() {
    let start = Instant::now();
    let mut task = reading(1, start);
    (1..=7).for_each(|peer| task.handle_neighbour_up(node(peer), holding(11..100), start));
    task.handle_neighbour_up(node(8), holding(10..100), start);
    let asked = |task: &mut Task| -> Vec<NodeId> {
        let actions = std::iter::from_fn(|| task.poll_action());
        actions.filter_map(|action| if let Action::Ask { peer } = action { Some(peer) } else { None }).collect()
    };
    assert_eq!(asked(&mut task).len(), 8);
    (1..=8).for_each(|peer| task.handle_turn(node(peer), None, false, start));
    assert!(task.is_starved() && asked(&mut task).is_empty());
    let mut ever = std::collections::BTreeSet::new();
    let mut now = start + pick::READER_PATIENCE;
    assert!(task.handle_room(now));
    let two = asked(&mut task);
    assert!(two.len() == 2 && two.contains(&node(8)), "{two:?}");
    ever.extend(two.clone());
    for peer in two {
        now += Duration::from_millis(1);
        task.handle_turn_failed(peer, None, now);
        ever.extend(asked(&mut task));
    }
    assert_eq!(ever.len(), 4, "who was busy is left alone");
    // They are silent, and so are those who are asked instead.
    while ever.len() < 8 && now < start + Duration::from_secs(4) {
        now += LATE / 2;
        task.handle_timeout(now);
        ever.extend(asked(&mut task));
    }
    assert_eq!(ever.len(), 8);
    assert!(now < start + Duration::from_secs(3), "{:?}", now - start);
}

/// A peer that offers what a reader needs and does not give it keeps this node from nothing else.
#[test]
fn who_waits_for_one_peer_asks_for_what_the_registry_has() {
    let start = Instant::now();
    let (home, idle, awaited) = (node(99), node(1), PieceIndex(10));
    let mut task = reading(1, start);
    let id = task.id;
    let registered =
        RegisterResponse { task: id, geometry: None, neighbours: vec![], advertise: false, leases: vec![] };
    task.handle_registered(home, &registered, start);
    task.handle_neighbour_up(idle, holding([awaited.0]), start);
    let (mut urgent, mut lent, mut now) = (0, 0, start);
    while now < start + Duration::from_secs(3) {
        now += LATE / 2;
        task.handle_alive(idle, now);
        task.handle_timeout(now);
        while let Some(action) = task.poll_action() {
            let Action::Pull { request, .. } = action else { continue };
            let answer = if request.urgent == Some(awaited) {
                urgent += 1;
                PullPieceResponse::Pieces(vec![PieceSource {
                    node: idle,
                    pieces: PieceRange { first: awaited, count: 1 },
                }])
            } else {
                lent += u32::from(request.can_fetch);
                PullPieceResponse::Wait { retry_after: LATE, neighbours: vec![], paused: Added::default() }
            };
            task.handle_pulled(home, answer, now);
        }
    }
    assert!((2..=4).contains(&urgent), "{urgent}: about once a second");
    assert!(lent >= 10, "{lent}");
}

/// Row 30: whatever comes in whatever order.
#[test]
fn uploads_stay_within_their_caps() {
    let mut rng = StdRng::seed_from_u64(5);
    let mut uploads = Uploads::default();
    let mut states = BTreeMap::<Ticket, &str>::new();
    let (mut most, mut busy) = (0, 0);
    for _ in 0..20_000 {
        // Those who wait are many, and few of them are soon offered anything.
        let moving = states.iter().filter(|(_, state)| **state != "waiting").nth(rng.random_range(0..ACTIVE + AHEAD));
        let any = moving.map(|(ticket, _)| ticket).or_else(|| states.keys().nth(rng.random_range(0..8))).copied();
        let steps = match (rng.random_range(0..8), any) {
            (0, Some(ticket)) => {
                states.remove(&ticket);
                uploads.finish(ticket)
            }
            (1..4, Some(ticket)) => {
                if states[&ticket] == "offered" {
                    states.insert(ticket, "ready");
                }
                uploads.take(ticket)
            }
            _ => {
                let id = TaskId::blob(Digest::Sha256([rng.random_range(0..6_u8); 32]));
                match uploads.request(id, node(rng.random_range(0..90)), rng.random_range(0..9)) {
                    Some((ticket, steps)) => {
                        states.insert(ticket, "waiting");
                        steps
                    }
                    None => {
                        busy += 1;
                        Vec::new()
                    }
                }
            }
        };
        for step in steps {
            let (ticket, before, after) = match step {
                Step::Offer(ticket) => (ticket, "waiting", "offered"),
                Step::Serve(ticket) => (ticket, "ready", "served"),
            };
            assert_eq!(states.insert(ticket, after), Some(before));
        }
        let count = |state: &str| states.values().filter(|of| **of == state).count();
        assert!(count("served") <= ACTIVE && count("served") == uploads.active());
        assert!(count("served") + count("ready") + count("offered") <= ACTIVE + AHEAD);
        assert!(count("waiting") <= 6 * QUEUE_PER_TASK);
        most = most.max(count("served"));
    }
    assert_eq!(most, ACTIVE);
    assert!(busy > 0, "and somebody was told so");
}
