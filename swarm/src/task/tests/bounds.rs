//! How much is asked of whom at a time, and in which order.

// A simulation needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods)]

use super::net::Net;
use super::*;
use crate::upload::{ACTIVE_PER_TASK, ACTIVE_TOTAL, Admission, QUEUE_PER_TASK, Ticket, Uploads};
use darter_tracker::{Digest, PieceSize};
use neighbour::PIPELINE;
use pick::WINDOW;

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

fn requests(task: &mut Task) -> Vec<(NodeId, u32)> {
    let mut asked = Vec::new();
    while let Some(action) = task.poll_action() {
        if let Action::Request { peer, piece } = action {
            asked.push((peer, piece.0));
        }
    }
    asked
}

/// Row 25: beyond the window at the reader the pieces that the fewest neighbours hold come first, whichever they are.
#[test]
fn beyond_the_window_the_rarest_piece_is_asked_for() {
    let start = Instant::now();
    let mut chosen = [0_u32; 100];
    const SEEDS: u64 = 400;
    for seed in 0..SEEDS {
        let mut task = reading(seed, start);
        // Three hold all but the window and every fifth piece, and are paused: they only make pieces common.
        let common = holding((10 + WINDOW..100).filter(|piece| piece % 5 != 0));
        for other in 2..5 {
            task.handle_neighbour_up(node(other), common.clone(), start);
            requests(&mut task);
        }
        task.handle_neighbour_up(node(1), holding(10 + WINDOW..100), start);
        let asked: Vec<u32> =
            requests(&mut task).iter().filter(|(peer, _)| *peer == node(1)).map(|(_, piece)| *piece).collect();
        assert_eq!(asked.len(), PIPELINE, "seed {seed}");
        for piece in asked {
            assert_eq!(piece % 5, 0, "seed {seed}: {piece} is held by four");
            chosen[piece as usize] += 1;
        }
    }
    // All of the sixteen rare ones alike, within four standard deviations: neighbours that all chose the same would be no swarm.
    let rare: Vec<u32> = (20..100).step_by(5).collect();
    let expected = f64::from(SEEDS as u32 * PIPELINE as u32) / rare.len() as f64;
    for piece in rare {
        let times = f64::from(chosen[piece as usize]);
        assert!((times - expected).abs() < 4.0 * expected.sqrt(), "{piece}: {times} times of {expected}");
    }
}

/// Row 25, the other half: what the client waits for goes before what is rare.
#[test]
fn within_the_window_pieces_are_asked_for_in_order() {
    let start = Instant::now();
    for seed in 0..50 {
        let mut task = reading(seed, start);
        let mut asked = Vec::new();
        for peer in 1..=(WINDOW / PIPELINE as u32) {
            task.handle_neighbour_up(node(peer as u8), holding(10..100), start);
            asked.extend(requests(&mut task).into_iter().map(|(_, piece)| piece));
        }
        assert_eq!(asked, (10..10 + WINDOW).collect::<Vec<_>>(), "seed {seed}");
    }
}

/// Rows 30 and 31, in whole pulls: at every moment.
#[test]
fn no_peer_is_asked_for_more_than_its_share_and_none_uploads_more() {
    for (count, seed) in [(2, 1), (5, 2), (16, 3), (40, 4)] {
        let mut net = Net::new(count, 200, seed);
        let (mut peer_most, mut uploads_most) = (0, 0);
        while net.nodes.iter().any(|node| node.done_at.is_none()) {
            net.step();
            for node in &net.nodes {
                let in_flight = node.task.iter().flat_map(|task| task.neighbours.values().map(Neighbour::in_flight));
                peer_most = in_flight.max().unwrap_or(0).max(peer_most);
                uploads_most = node.uploads.active().max(uploads_most);
            }
        }
        assert_eq!((peer_most, uploads_most), (PIPELINE, ACTIVE_PER_TASK), "{count} nodes");
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
    assert_eq!(requests(&mut task).len(), 2);
    task.handle_background(false, start);
    assert_eq!(requests(&mut task).len(), 6, "as many as it would ask for otherwise");
}

/// Row 30: whatever comes in whatever order.
#[test]
fn uploads_stay_within_their_caps() {
    let mut rng = StdRng::seed_from_u64(5);
    let mut uploads = Uploads::default();
    let (mut served, mut queued) = (BTreeMap::<Ticket, u8>::new(), BTreeMap::<Ticket, u8>::new());
    let (mut most, mut busy) = (0, 0);
    for _ in 0..20_000 {
        if rng.random::<bool>() {
            let task = rng.random_range(0..6_u8);
            let id = TaskId::blob(Digest::Sha256([task; 32]));
            match uploads.request(id, node(rng.random_range(0..50)), rng.random_range(0..9)) {
                Admission::Serve(ticket) => _ = served.insert(ticket, task),
                Admission::Queued(ticket) => _ = queued.insert(ticket, task),
                Admission::Busy => busy += 1,
            }
        } else if let Some(ticket) = served.keys().chain(queued.keys()).nth(rng.random_range(0..6)).copied() {
            served.remove(&ticket);
            queued.remove(&ticket);
            for turn in uploads.finish(ticket) {
                served.insert(turn, queued.remove(&turn).expect("who waited"));
            }
        }
        let of = |of: &BTreeMap<Ticket, u8>, task| of.values().filter(|of| **of == task).count();
        assert!((0..6).all(|task| of(&served, task) <= ACTIVE_PER_TASK && of(&queued, task) <= QUEUE_PER_TASK));
        assert!(served.len() <= ACTIVE_TOTAL && served.len() == uploads.active());
        most = most.max(served.len());
    }
    assert_eq!(most, ACTIVE_TOTAL);
    assert!(busy > 0, "and somebody was told so");
}
