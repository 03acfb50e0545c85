// A simulation needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use crate::home::Home;
use darter_tracker::{
    Added, Digest, Geometry, Lease, LeaseState, PieceSize, PullPieceRequest, PullPieceResponse, RegisterRequest,
    ReportPieceRequest, TaskId,
};

fn node(byte: u8) -> NodeId {
    NodeId::from_bytes([byte; 16])
}

fn task() -> TaskId {
    TaskId::blob(Digest::Sha256([7; 32]))
}

/// 64 MiB in 256 pieces.
fn geometry() -> Geometry {
    Geometry::new(64 << 20, PieceSize::new(256 << 10).unwrap()).unwrap()
}

/// Two homes, the first before the second in rank.
fn homes() -> [Home; 2] {
    let (one, other) = (node(250), node(251));
    let ranked = if rendezvous::before(&task(), one, other) { [one, other] } else { [other, one] };
    ranked.map(|node| {
        let mut home = Home::new(node, 1);
        home.set_cluster_size(100);
        home
    })
}

fn register(home: &mut Home, byte: u8, now: Instant) -> Vec<NodeId> {
    home.register(node(byte), RegisterRequest::new(task(), Some(geometry()), None), now).unwrap().neighbours
}

fn pull(home: &mut Home, byte: u8, now: Instant) -> Option<Lease> {
    let request = PullPieceRequest {
        task: task(),
        have: None,
        lacking: Vec::new(),
        urgent: None,
        can_fetch: true,
        registry: Added::default(),
    };
    match home.pull_piece(node(byte), &request, now).unwrap() {
        PullPieceResponse::Lease(lease) => Some(lease),
        PullPieceResponse::Wait { .. } => None,
        other => panic!("a lease, or none, and not {other:?}"),
    }
}

fn report(home: &mut Home, byte: u8, lease: Lease, pieces: Vec<PieceRange>, now: Instant) -> LeaseState {
    let request =
        ReportPieceRequest { task: task(), lease: Some(lease.id), pieces, release: false, pause: Added::default() };
    home.report_piece(node(byte), &request, now).unwrap().lease
}

/// Lets `from` tell `to` what it has to tell, and hear the answer.
fn exchange([from, to]: [&mut Home; 2], now: Instant) {
    for (whom, news) in from.poll_news(now, |_| vec![to.me()]) {
        assert_eq!(whom, to.me());
        if let Some(answer) = to.compare(from.me(), news, now) {
            from.handle_news(whom, answer, now);
        }
    }
}

fn news(held: Bitmap, lent: Vec<PieceRange>, members: Vec<NodeId>) -> HomeNews {
    HomeNews { task: task(), geometry: geometry(), held, lent, members, others: Vec::new() }
}

#[test]
fn two_homes_that_know_of_each_other_have_each_piece_fetched_once() {
    let ([mut first, mut second], mut now) = (homes(), Instant::now());
    for byte in 0..20 {
        register(&mut first, byte, now);
        register(&mut second, 100 + byte, now);
    }
    let (mut fetched, mut twice) = (Bitmap::new(256), 0usize);
    let mut fetch = |home: &mut Home, members: std::ops::Range<u8>, now| {
        for byte in members {
            let Some(lease) = pull(home, byte, now) else { continue };
            twice += lease.pieces.iter().filter(|piece| !fetched.insert(*piece)).count();
            report(home, byte, lease, vec![lease.pieces], now);
        }
    };
    for _ in 0..40 {
        exchange([&mut first, &mut second], now);
        fetch(&mut first, 0..20, now);
        now += NEWS;
        exchange([&mut first, &mut second], now);
        fetch(&mut second, 100..120, now);
        now += NEWS;
    }
    assert_eq!((fetched.count(), twice), (256, 0));
}

#[test]
fn what_both_have_lent_is_left_to_the_first_in_rank() {
    let ([mut first, mut second], now) = (homes(), Instant::now());
    register(&mut first, 1, now);
    register(&mut second, 101, now);
    let (kept, lost) = (pull(&mut first, 1, now).unwrap(), pull(&mut second, 101, now).unwrap());
    assert_eq!(kept.pieces, lost.pieces, "neither knew");
    exchange([&mut first, &mut second], now);
    assert_eq!(report(&mut first, 1, kept, Vec::new(), now), LeaseState::Held);
    assert_eq!(report(&mut second, 101, lost, Vec::new(), now), LeaseState::Over);
    let next = pull(&mut second, 101, now).unwrap().pieces;
    assert!(!next.iter().any(|piece| kept.pieces.contains(piece)), "{next:?}");
}

#[test]
fn a_word_puts_off_a_lease_once_and_only_while_something_comes_from_who_gave_it() {
    let ([mut home, liar], start) = (homes(), Instant::now());
    let liar = liar.me();
    let tell = |home: &mut Home, now: Instant| {
        home.handle_news(liar, news(Bitmap::full(256), Vec::new(), Vec::new()), now);
    };
    register(&mut home, 1, start);
    tell(&mut home, start);
    assert_eq!(pull(&mut home, 1, start), None, "another home says that all is there");
    assert!(pull(&mut home, 1, start + RIVAL_SILENT).is_some(), "it says nothing more");
    let ([mut home, _], mut now) = (homes(), start);
    register(&mut home, 1, now);
    while now < start + CLAIM {
        tell(&mut home, now);
        assert_eq!(pull(&mut home, 1, now), None);
        now += RIVAL_SILENT / 2;
    }
    tell(&mut home, now);
    assert!(pull(&mut home, 1, now).is_some(), "it does not come, whatever it says");
}

#[test]
fn those_in_rank_are_told_at_once_and_ever_more_rarely() {
    let ([mut home, _], start) = (homes(), Instant::now());
    let rank = |_: &TaskId| (1..=20).map(|byte| node(100 + byte)).collect();
    assert!(home.poll_news(start, rank).is_empty(), "nobody comes to it");
    register(&mut home, 1, start);
    assert_eq!(home.poll_news(start, rank).len(), TOLD);
    let mut told = 0;
    for step in 1..400u32 {
        let now = start + Duration::from_millis(10) * step;
        // Somebody says something, so the task is not forgotten.
        pull(&mut home, 1, now);
        told += home.poll_news(now, rank).len();
    }
    assert!((5 * TOLD..=9 * TOLD).contains(&told), "{told} in four seconds");
    let quiet = start + Duration::from_secs(4) + QUIET;
    assert!(home.poll_news(quiet, rank).is_empty());
}

#[test]
fn members_meet_across_and_made_up_ones_are_in_nobodys_place() {
    let ([mut home, other], now) = (homes(), Instant::now());
    for byte in 1..=60 {
        register(&mut home, byte, now);
    }
    let alone = register(&mut home, 1, now).len();
    for rival in [other.me(), node(252), node(253), node(254)] {
        let names = (0..200).map(|number| NodeId::from_bytes([number; 16])).filter(|name| name.as_bytes()[0] > 60);
        home.handle_news(rival, news(Bitmap::new(256), Vec::new(), names.collect()), now);
    }
    let neighbours = register(&mut home, 1, now);
    let strangers = neighbours.iter().filter(|node| node.as_bytes()[0] > 60).count();
    assert!((STRANGERS_EACH..=STRANGERS_MAX).contains(&strangers), "{strangers}");
    assert_eq!(neighbours.len() - strangers, alone);
}

#[test]
fn a_home_without_the_task_or_with_another_cut_has_nothing_to_tell() {
    let ([mut first, mut second], now) = (homes(), Instant::now());
    let told = news(Bitmap::new(256), Vec::new(), Vec::new());
    assert_eq!(second.compare(first.me(), told.clone(), now), None);
    register(&mut second, 1, now);
    assert!(second.compare(first.me(), told.clone(), now).is_some_and(|answer| answer.members == [node(1)]));
    let other = Geometry::new(64 << 20, PieceSize::new(512 << 10).unwrap()).unwrap();
    assert_eq!(second.compare(first.me(), HomeNews { geometry: other, ..told.clone() }, now), None);
    let endless = vec![PieceRange { first: PieceIndex(3), count: u32::MAX }; 9];
    assert!(second.compare(first.me(), HomeNews { lent: endless, ..told }, now).is_some());
    assert!(first.poll_news(now, |_| vec![second.me()]).is_empty());
}

#[test]
fn homes_that_cannot_tell_each_other_hear_of_each_other_from_a_third() {
    let ([mut first, mut second], now) = (homes(), Instant::now());
    let mut third = Home::new(node(252), 1);
    third.set_cluster_size(100);
    register(&mut first, 1, now);
    register(&mut second, 101, now);
    register(&mut third, 201, now);
    let lent = pull(&mut first, 1, now).unwrap();
    exchange([&mut first, &mut third], now);
    exchange([&mut second, &mut third], now);
    let next = pull(&mut second, 101, now).unwrap().pieces;
    assert!(!next.iter().any(|piece| lent.pieces.contains(piece)), "{next:?}");
    let again = second.compare(third.me(), news(Bitmap::new(256), Vec::new(), Vec::new()), now).unwrap();
    assert!(again.others.is_empty(), "what a third has told is not passed on: {again:?}");
}

/// A member that takes one home for silent brings its run to the next, and the first still counts on him.
#[test]
fn what_a_member_has_brought_along_is_not_taken_from_him_for_the_sake_of_the_home_that_he_left() {
    let ([mut first, mut second], now) = (homes(), Instant::now());
    register(&mut first, 1, now);
    let lease = pull(&mut first, 1, now).unwrap();
    let mut request = RegisterRequest::new(task(), Some(geometry()), None);
    (request.moved, request.runs) = (true, vec![lease.pieces]);
    let adopted = second.register(node(1), request, now).unwrap().leases;
    assert_eq!(adopted[0].pieces, lease.pieces);
    exchange([&mut first, &mut second], now);
    let piece = |at: u32| vec![PieceRange { first: PieceIndex(lease.pieces.first.0 + at), count: 1 }];
    assert_eq!(report(&mut second, 1, adopted[0], piece(0), now), LeaseState::Held);
    // The first has heard that somebody has all of it.
    let mut have = Bitmap::new(geometry().pieces());
    lease.pieces.iter().for_each(|piece| assert!(have.insert(piece)));
    let told = second.compare(first.me(), news(have, Vec::new(), Vec::new()), now);
    assert!(told.is_some());
    assert_eq!(report(&mut second, 1, adopted[0], piece(1), now), LeaseState::Over);
}
