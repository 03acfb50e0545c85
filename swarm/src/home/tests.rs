// A simulation needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use crate::task::link::WAIT_MIN;
use darter_tracker::{Added, Bitmap, Digest, ErrorKind, Lease, LeaseState, PieceIndex, PieceRange, PieceSize};

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

struct Rig {
    home: Home,
    now: Instant,
}

impl Rig {
    fn new(cluster: usize) -> Self {
        let mut home = Home::new(node(0), 1);
        home.set_cluster_size(cluster);
        Self { home, now: Instant::now() }
    }

    fn register(&mut self, byte: u8) -> RegisterResponse {
        let request = RegisterRequest::new(task(), Some(geometry()), None);
        self.home.register(node(byte), request, self.now).unwrap()
    }

    fn pull(&mut self, byte: u8, urgent: Option<u32>, can_fetch: bool) -> PullPieceResponse {
        self.pull_from(byte, 0, urgent, can_fetch)
    }

    /// One that lacks, and is not offered, what lies behind `first`.
    fn pull_from(&mut self, byte: u8, first: u32, urgent: Option<u32>, can_fetch: bool) -> PullPieceResponse {
        let request = PullPieceRequest {
            task: task(),
            have: None,
            lacking: vec![PieceRange { first: PieceIndex(first), count: 256 - first }],
            urgent: urgent.map(PieceIndex),
            can_fetch,
            registry: Added::default(),
        };
        self.home.pull_piece(node(byte), &request, self.now).unwrap()
    }

    fn lease(&mut self, byte: u8) -> Lease {
        match self.pull(byte, None, true) {
            PullPieceResponse::Lease(lease) => lease,
            other => panic!("expected a lease, got {other:?}"),
        }
    }

    fn report(&mut self, byte: u8, lease: Option<Lease>, first: u32, count: u32) -> ReportPieceResponse {
        let pieces = vec![PieceRange { first: PieceIndex(first), count }];
        let request = ReportPieceRequest {
            task: task(),
            lease: lease.map(|lease| lease.id),
            pieces,
            release: false,
            pause: Added::default(),
        };
        self.home.report_piece(node(byte), &request, self.now).unwrap()
    }
}

#[test]
fn every_piece_is_leased_once_in_few_requests() {
    let mut rig = Rig::new(4);
    for byte in 1..=4 {
        rig.register(byte);
    }
    let mut fetched = Bitmap::new(256);
    let mut requests = 0;
    while !fetched.is_full() {
        for byte in 1..=4 {
            if let PullPieceResponse::Lease(lease) = rig.pull(byte, None, true) {
                requests += 1;
                for piece in lease.pieces.iter() {
                    assert!(fetched.insert(piece), "{piece:?} was leased twice");
                }
                rig.report(byte, Some(lease), lease.pieces.first.0, lease.pieces.count);
            }
            if fetched.is_full() {
                break;
            }
            // Others may not be sent to the registry for what is held; forget the holders to go on leasing.
            let lacking = PullPieceRequest {
                task: task(),
                have: None,
                lacking: vec![],
                urgent: None,
                can_fetch: true,
                registry: Added::default(),
            };
            if let PullPieceResponse::Lease(lease) = rig.home.pull_piece(node(byte), &lacking, rig.now).unwrap() {
                requests += 1;
                for piece in lease.pieces.iter() {
                    assert!(fetched.insert(piece), "{piece:?} was leased twice");
                }
                rig.report(byte, Some(lease), lease.pieces.first.0, lease.pieces.count);
            }
        }
    }
    assert!(requests <= 8 + 4, "{requests} requests for 64 MiB");
}

#[test]
fn alone_a_node_fetches_everything_at_once() {
    let mut rig = Rig::new(1);
    rig.register(1);
    assert_eq!(rig.lease(1).pieces, PieceRange { first: PieceIndex(0), count: 256 });
}

#[test]
fn the_first_fetcher_is_left_alone_until_its_first_piece_is_there() {
    let begun = || {
        let mut rig = Rig::new(3);
        (1..=3).for_each(|byte| drop(rig.register(byte)));
        let first = rig.lease(1);
        assert!(
            matches!(rig.pull(2, None, true), PullPieceResponse::Wait { retry_after, .. } if retry_after == WAIT_MIN),
            "it shall come again soon"
        );
        (rig, first)
    };
    let (mut rig, first) = begun();
    rig.report(1, Some(first), 0, 1);
    for byte in [2, 3] {
        assert!(matches!(rig.pull_from(byte, 1, None, true), PullPieceResponse::Lease(_)), "it is there");
    }

    let (mut rig, _) = begun();
    rig.now += lease::FIRST_ALONE - Duration::from_millis(1);
    assert!(matches!(rig.pull(2, None, true), PullPieceResponse::Wait { .. }));
    rig.now += Duration::from_millis(1);
    rig.home.handle_alive(node(1), rig.now);
    assert!(rig.lease(2).pieces.first > PieceIndex(0), "it takes long");

    let (mut rig, mut lease) = begun();
    let give_back = |rig: &mut Rig, lease: Lease| {
        let (lease, pieces) = (Some(lease.id), Vec::new());
        let request = ReportPieceRequest { task: task(), lease, pieces, release: true, pause: Added::default() };
        rig.home.report_piece(node(1), &request, rig.now).unwrap();
    };
    for _ in 0..10 {
        rig.now += lease::FIRST_ALONE / 10;
        give_back(&mut rig, lease);
        lease = rig.lease(1);
        assert_eq!(lease.pieces.first, PieceIndex(0), "what is given back is the next one's");
    }
    rig.lease(2);

    // A home that takes over does not know yet what there is.
    let mut rig = Rig::new(3);
    for byte in 1..=3 {
        let moved = RegisterRequest { moved: true, ..RegisterRequest::new(task(), Some(geometry()), None) };
        rig.home.register(node(byte), moved, rig.now).unwrap();
    }
    rig.now += Duration::from_secs(1);
    rig.lease(1);
    rig.lease(2);
}

#[test]
fn a_lease_lapses_without_progress_and_goes_to_another() {
    let mut rig = Rig::new(2);
    rig.register(1);
    rig.register(2);
    let first = rig.lease(1);
    rig.now += lease::FIRST_ALONE;
    rig.home.handle_alive(node(1), rig.now);
    let second = rig.lease(2);
    assert!(!first.pieces.contains(second.pieces.first));
    rig.report(1, Some(first), 0, 3);
    // Both are alive, and neither gets anything from the registry.
    let lapse = rig.now + lease::LAPSE;
    while rig.now + Duration::from_millis(100) < lapse {
        rig.now += Duration::from_millis(100);
        rig.home.handle_alive(node(1), rig.now);
        rig.home.handle_alive(node(2), rig.now);
        assert_eq!(rig.home.fetchers().len(), 2);
    }
    rig.now = lapse - Duration::from_millis(1);
    assert_eq!(rig.report(2, Some(second), second.pieces.first.0, 1).lease, LeaseState::Held);
    rig.now += Duration::from_millis(1);
    // The first three pieces arrived; the rest of the first run is free again, from piece 3 on.
    assert_eq!(rig.report(1, Some(first), 3, 1).lease, LeaseState::Over, "it lapsed");
    let mut again = PullPieceRequest {
        task: task(),
        have: None,
        lacking: vec![],
        urgent: None,
        can_fetch: true,
        registry: Added::default(),
    };
    again.lacking.clear();
    match rig.home.pull_piece(node(1), &again, rig.now).unwrap() {
        PullPieceResponse::Lease(lease) => assert_eq!(lease.pieces.first, PieceIndex(4)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_lease_of_a_silent_fetcher_is_free_soon_and_for_a_reader_sooner() {
    let mut rig = Rig::new(3);
    for byte in 1..=3 {
        rig.register(byte);
    }
    let lease = rig.lease(1);
    rig.now += lease::SILENT_URGENT - Duration::from_millis(1);
    let urgent = Some(lease.pieces.first.0);
    assert!(
        !matches!(rig.pull(2, urgent, true), PullPieceResponse::Lease(other) if other.pieces.first == lease.pieces.first)
    );
    rig.now += Duration::from_millis(1);
    let PullPieceResponse::Lease(single) = rig.pull(2, urgent, true) else {
        panic!("a reader waits for nobody silent")
    };
    assert_eq!(single.pieces, PieceRange { first: lease.pieces.first, count: 1 });
    rig.now += lease::SILENT_FETCHER - lease::SILENT_URGENT;
    assert_eq!(rig.report(1, Some(lease), 3, 1).lease, LeaseState::Over);
}

#[test]
fn holders_are_named_before_the_registry() {
    let mut rig = Rig::new(3);
    rig.register(1);
    rig.register(2);
    let lease = rig.lease(1);
    assert!(matches!(rig.pull(2, Some(0), false), PullPieceResponse::Wait { .. }), "the lease makes progress");
    rig.report(1, Some(lease), 0, 2);
    match rig.pull(2, Some(0), true) {
        PullPieceResponse::Pieces(sources) => {
            assert_eq!(sources[0].node, node(1));
            assert_eq!(sources[0].pieces, PieceRange { first: PieceIndex(0), count: 1 });
        }
        other => panic!("{other:?}"),
    }
    // Node 2 cannot reach node 1: it gets an urgent lease, while node 3 is still sent to node 1.
    let complaint = ClientErrorRequest { task: task(), peer: node(1), pieces: vec![], kind: ErrorKind::Unreachable };
    rig.home.report_error(node(2), &complaint, rig.now).unwrap();
    match rig.pull(2, Some(0), true) {
        PullPieceResponse::Lease(lease) => assert_eq!(lease.pieces, PieceRange { first: PieceIndex(0), count: 1 }),
        other => panic!("{other:?}"),
    }
    rig.register(3);
    assert!(matches!(rig.pull(3, Some(0), true), PullPieceResponse::Pieces(_)));
}

#[test]
fn who_leaves_is_named_no_more_and_frees_his_lease() {
    let mut rig = Rig::new(3);
    rig.register(1);
    let lease = rig.lease(1);
    rig.report(1, Some(lease), 0, 1);
    assert_eq!(rig.register(2).neighbours, vec![node(1)]);
    rig.home.service_down(node(1), ServiceDownRequest { task: task() });
    assert_eq!(rig.register(3).neighbours, vec![node(2)]);
    assert_eq!(rig.lease(2).pieces.first, PieceIndex(0), "what only the leaver held is fetched again");
}

#[test]
fn another_length_is_refused() {
    let mut rig = Rig::new(3);
    rig.register(1);
    let other = Geometry::new(65 << 20, PieceSize::new(256 << 10).unwrap()).unwrap();
    let request = RegisterRequest::new(task(), Some(other), None);
    assert!(matches!(rig.home.register(node(2), request, rig.now), Err(TrackerError::Refused { .. })));
    // The home's piece size is binding, whatever the caller's.
    let coarse = Geometry::new(64 << 20, PieceSize::new(4 << 20).unwrap()).unwrap();
    let request = RegisterRequest::new(task(), Some(coarse), Some(Bitmap::full(16)));
    assert_eq!(rig.home.register(node(2), request, rig.now).unwrap().geometry, Some(geometry()));
}

#[test]
fn neighbourhoods_are_even() {
    let mut rig = Rig::new(200);
    for byte in 1..=200 {
        rig.register(byte);
    }
    // Nobody is a newcomer any more.
    rig.now += Duration::from_secs(1);
    for byte in 1..=200 {
        rig.register(byte);
    }
    let degrees: Vec<usize> = (1..=200).map(|byte| rig.register(byte).neighbours.len()).collect();
    assert!(
        degrees.iter().all(|degree| (introductions::DEGREE..=introductions::DEGREE_MAX).contains(degree)),
        "{degrees:?}"
    );
}

/// Whoever is introduced to those alone who came just before stands in a chain: with a thousand members a piece would need many
/// steps from one end to the other, and all would wait for it.
#[test]
fn members_that_come_together_are_few_steps_from_each_other() {
    let (mut home, now) = (Home::new(node(0), 1), Instant::now());
    let name = |number: u16| NodeId::from_bytes([number.to_be_bytes(); 8].concat().try_into().unwrap());
    let mut knows: BTreeMap<NodeId, BTreeSet<NodeId>> = BTreeMap::new();
    for number in 0..1000 {
        let request = RegisterRequest::new(task(), Some(geometry()), None);
        for other in home.register(name(number), request, now).unwrap().neighbours {
            knows.entry(name(number)).or_default().insert(other);
            knows.entry(other).or_default().insert(name(number));
        }
    }
    let mut reached = BTreeSet::from([name(0)]);
    for _ in 0..6 {
        reached = reached.iter().flat_map(|node| &knows[node]).copied().chain(reached.iter().copied()).collect();
    }
    assert_eq!(reached.len(), 1000, "are within six steps of the first");
}

#[test]
fn a_new_home_learns_holders_from_gossip() {
    let mut rig = Rig::new(3);
    rig.home.learn_holder(task(), geometry(), node(9), rig.now);
    let request = RegisterRequest::new(task(), None, None);
    let response = rig.home.register(node(1), request, rig.now).unwrap();
    assert_eq!(response.geometry, Some(geometry()), "nobody needs to ask the registry for the length");
    assert_eq!(response.neighbours, vec![node(9)]);
    assert!(matches!(rig.pull(1, None, true), PullPieceResponse::Pieces(_)), "and nothing is fetched");
}

#[test]
fn tasks_are_bounded() {
    let mut rig = Rig::new(2);
    for n in 0..=TASKS_MAX as u32 {
        let mut digest = [0; 32];
        digest[..4].copy_from_slice(&n.to_le_bytes());
        let request = RegisterRequest::new(TaskId::blob(Digest::Sha256(digest)), None, None);
        rig.now += Duration::from_millis(1);
        rig.home.register(node(1), request, rig.now).unwrap();
    }
    assert_eq!(rig.home.tasks(), TASKS_MAX);
}

#[test]
fn who_does_not_have_what_it_is_named_for_sends_nobody_in_circles() {
    let mut rig = Rig::new(3);
    rig.home.learn_holder(task(), geometry(), node(9), rig.now);
    rig.register(1);
    assert!(matches!(rig.pull(1, Some(0), true), PullPieceResponse::Pieces(_)));
    let kind = ErrorKind::NotFound;
    let complaint = ClientErrorRequest { task: task(), peer: node(9), pieces: vec![], kind };
    rig.home.report_error(node(1), &complaint, rig.now).unwrap();
    assert_eq!(rig.lease(1).pieces.first, PieceIndex(0));
}

#[test]
fn a_length_is_forgotten_with_the_last_who_claimed_it() {
    let mut rig = Rig::new(3);
    let wrong = Geometry::new(65 << 20, PieceSize::new(256 << 10).unwrap()).unwrap();
    let request = RegisterRequest::new(task(), Some(wrong), None);
    rig.home.register(node(2), request, rig.now).unwrap();
    rig.home.service_down(node(2), ServiceDownRequest { task: task() });
    assert_eq!(rig.register(1).geometry, Some(geometry()));
    assert_eq!(rig.lease(1).pieces.first, PieceIndex(0));
}

/// A thousand members and 4096 pieces: what a home does for one call must not grow with their product, or it answers
/// nobody in time. The work is counted in virtual calls per real second, with a wide margin for a slow machine.
#[test]
fn a_home_of_a_thousand_answers_in_time() {
    let geometry = Geometry::new(4096 << 20, PieceSize::new(1 << 20).unwrap()).unwrap();
    let mut home = Home::new(node(0), 1);
    home.set_cluster_size(1000);
    let now = Instant::now();
    let member = |n: u32| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&(n + 1).to_be_bytes());
        NodeId::from_bytes(bytes)
    };
    for n in 0..1000 {
        // The last holds everything, and the asker cannot reach it.
        let have = (n == 999).then(|| Bitmap::full(4096));
        let request = RegisterRequest::new(task(), Some(geometry), have);
        home.register(member(n), request, now).unwrap();
    }
    let kind = ErrorKind::Unreachable;
    let complaint = ClientErrorRequest { task: task(), peer: member(999), pieces: vec![], kind };
    home.report_error(member(0), &complaint, now).unwrap();
    let request = PullPieceRequest {
        task: task(),
        have: Some(Bitmap::new(4096)),
        lacking: vec![PieceRange { first: PieceIndex(0), count: 4096 }],
        urgent: None,
        can_fetch: true,
        registry: Added::default(),
    };
    let begun = Instant::now();
    for _ in 0..20 {
        home.pull_piece(member(0), &request, now).unwrap();
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?} for 20 calls", begun.elapsed());
}

fn urgent(rig: &mut Rig, piece: u32) -> Lease {
    match rig.pull(1, Some(piece), true) {
        PullPieceResponse::Lease(lease) => lease,
        other => panic!("expected a lease, got {other:?}"),
    }
}

#[test]
fn a_rotten_piece_does_not_make_its_holder_an_outcast() {
    let mut rig = Rig::new(3);
    rig.home.learn_holder(task(), geometry(), node(9), rig.now);
    rig.register(1);
    let piece = PieceRange { first: PieceIndex(7), count: 1 };
    let complaint = ClientErrorRequest { task: task(), peer: node(9), pieces: vec![piece], kind: ErrorKind::NotFound };
    rig.home.report_error(node(1), &complaint, rig.now).unwrap();
    assert_eq!(urgent(&mut rig, 7).pieces, piece, "that one piece comes from the registry");
    match rig.pull(1, None, true) {
        PullPieceResponse::Pieces(sources) => assert!(sources.iter().all(|source| source.node == node(9))),
        other => panic!("{other:?}"),
    }
}

/// A member that cannot get from the only holder what its reader needs, and the piece that it needs next.
fn stranded() -> (Rig, u32, Vec<u32>) {
    let mut rig = Rig::new(16);
    rig.home.learn_holder(task(), geometry(), node(9), rig.now);
    (1..=3).for_each(|byte| drop(rig.register(byte)));
    complain(&mut rig, 1, 9, ErrorKind::Unreachable);
    let (mut first, mut counts) = (7, Vec::new());
    for _ in 0..9 {
        let lease = urgent(&mut rig, first);
        assert_eq!(lease.pieces.first.0, first);
        rig.report(1, Some(lease), first, lease.pieces.count);
        first = lease.pieces.end();
        counts.push(lease.pieces.count);
    }
    (rig, first, counts)
}

#[test]
fn a_reader_that_needs_what_follows_again_and_again_is_lent_more_each_time() {
    let longest = lease::run_length(&geometry(), geometry().pieces(), 16);
    let (mut rig, first, counts) = stranded();
    assert_eq!(counts, [1, 1, 1, 1, 2, 4, 8, 16, 32].map(|count| longest.min(count)));
    let lease = urgent(&mut rig, first);
    assert_eq!(lease.pieces.count, longest);
    assert_eq!(urgent(&mut rig, lease.pieces.end()).pieces.count, 1, "no second one beside an open one");
    let (mut rig, first, _) = stranded();
    assert_eq!(urgent(&mut rig, first + 1).pieces.count, 1, "another place is another matter");
    let (mut rig, first, _) = stranded();
    rig.report(1, None, first + 2, 1);
    assert_eq!(urgent(&mut rig, first).pieces.count, 2, "what it holds ends the run");
    let (mut rig, first, _) = stranded();
    complain(&mut rig, 2, 1, ErrorKind::Unreachable);
    complain(&mut rig, 3, 1, ErrorKind::Unreachable);
    assert_eq!(urgent(&mut rig, first).pieces.count, 1, "who fails others is lent no more than a reader needs");
}

fn complain(rig: &mut Rig, byte: u8, about: u8, kind: ErrorKind) {
    let pieces = vec![PieceRange { first: PieceIndex(0), count: 1 }];
    let complaint = ClientErrorRequest { task: task(), peer: node(about), pieces, kind };
    rig.home.report_error(node(byte), &complaint, rig.now).unwrap();
}

fn is_named(response: &PullPieceResponse, byte: u8) -> bool {
    match response {
        PullPieceResponse::Pieces(sources) => sources.iter().any(|source| source.node == node(byte)),
        PullPieceResponse::Wait { neighbours, .. } => neighbours.contains(&node(byte)),
        _ => false,
    }
}

/// Row 28: one complaint hides a member from him who complains, two hide it from everybody, for [`swarm::BLAME_DECAY`].
#[test]
fn a_member_that_failed_two_is_named_to_nobody_for_a_while() {
    for kind in [ErrorKind::Mismatch, ErrorKind::Unreachable] {
        let mut rig = Rig::new(6);
        let bad = 9;
        rig.home.learn_holder(task(), geometry(), node(bad), rig.now);
        for byte in 1..=4 {
            rig.register(byte);
        }
        assert!((1..=4).all(|byte| is_named(&rig.pull(byte, None, false), bad)), "before anybody complains");

        complain(&mut rig, 1, bad, kind);
        complain(&mut rig, 1, bad, kind);
        assert!(!is_named(&rig.pull(1, None, false), bad), "not to him who complained");
        assert!(
            (2..=4).all(|byte| is_named(&rig.pull(byte, None, false), bad)),
            "one word, however often, is not enough"
        );

        rig.now += Duration::from_secs(1);
        complain(&mut rig, 2, bad, kind);
        for byte in 1..=4 {
            assert!(!is_named(&rig.pull(byte, None, false), bad), "{byte}");
        }
        assert!(!rig.register(5).neighbours.contains(&node(bad)), "nor is a newcomer introduced to it");
        assert!(!is_named(&rig.pull(5, None, false), bad));
        assert_eq!(rig.lease(5).pieces.first, PieceIndex(0), "what only that member held is fetched from the registry");

        // The first complaint is forgotten, then the second.
        rig.now += swarm::BLAME_DECAY - Duration::from_secs(1) - Duration::from_millis(1);
        assert!(!is_named(&rig.pull(4, None, false), bad), "until the first complaint has decayed");
        rig.now += Duration::from_millis(1);
        assert!([1, 3, 4].iter().all(|byte| is_named(&rig.pull(*byte, None, false), bad)), "one is left");
        assert!(!is_named(&rig.pull(2, None, false), bad), "which still holds for him who made it");
        rig.now += Duration::from_secs(1);
        assert!(is_named(&rig.pull(2, None, false), bad));
        rig.now += Duration::from_millis(1);
        assert!(rig.register(6).neighbours.contains(&node(bad)));
    }
}

/// Nobody gets himself cleared, or another blamed, by complaining about himself or for others.
#[test]
fn complaints_about_oneself_and_of_strangers_do_not_count() {
    let mut rig = Rig::new(6);
    rig.home.learn_holder(task(), geometry(), node(9), rig.now);
    for byte in 1..=3 {
        rig.register(byte);
    }
    complain(&mut rig, 1, 9, ErrorKind::Mismatch);
    complain(&mut rig, 9, 9, ErrorKind::Mismatch);
    let stranger = ClientErrorRequest { task: task(), peer: node(9), pieces: vec![], kind: ErrorKind::Mismatch };
    let refused = rig.home.report_error(node(77), &stranger, rig.now);
    assert!(matches!(refused, Err(TrackerError::NotRegistered { .. })));
    assert!(is_named(&rig.pull(2, None, false), 9));
}

/// Lists from the wire are short in bytes and may name everything again and again; a home works for all tasks in turn.
#[test]
fn a_report_is_read_no_further_than_the_blob_has_pieces() {
    let mut rig = Rig::new(3);
    rig.register(1);
    rig.register(2);
    let run = |first, count| PieceRange { first: PieceIndex(first), count };
    let lacking = |piece| PullPieceRequest {
        task: task(),
        have: None,
        lacking: vec![run(piece, 1)],
        urgent: None,
        can_fetch: false,
        registry: Added::default(),
    };
    for (repeated, is_named) in [(255, true), (256, false)] {
        let piece = 200 + u32::from(is_named);
        let mut pieces = vec![run(0, 1); repeated];
        pieces.push(run(piece, 1));
        let request = ReportPieceRequest { task: task(), lease: None, pieces, release: false, pause: Added::default() };
        rig.home.report_piece(node(1), &request, rig.now).unwrap();
        let answer = rig.home.pull_piece(node(2), &lacking(piece), rig.now).unwrap();
        assert_eq!(matches!(answer, PullPieceResponse::Pieces(_)), is_named, "{answer:?}");
    }
}

#[test]
fn invented_tasks_do_not_fill_the_memory_nor_drive_out_what_is_pulled() {
    let mut rig = Rig::new(3);
    rig.register(1);
    rig.register(2);
    // As many pieces as a task may have.
    let most = Geometry::new(1 << 40, PieceSize::new(16 << 20).unwrap()).unwrap();
    assert_eq!(most.pieces(), 65_536);
    for n in 0..1000_u32 {
        let mut digest = [0; 32];
        digest[..4].copy_from_slice(&n.to_le_bytes());
        let invented = TaskId::blob(Digest::Sha256(digest));
        rig.home.register(node(3), RegisterRequest::new(invented, Some(most), None), rig.now).unwrap();
        assert!(rig.home.tasks.values().map(Swarm::pieces).sum::<usize>() <= PIECES_MAX);
        rig.now += Duration::from_millis(10);
        if n % 10 == 0 {
            rig.pull(1, None, false);
        }
    }
    assert!(rig.home.knows(&task()), "it is being pulled");
    assert_eq!(rig.home.tasks(), 1 + (PIECES_MAX - 256) / 65_536);
}
