//! One downloader, fed by hand: what it does when homes, neighbours and registries misbehave.

// A test needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use darter_tracker::{Added, Digest, Lease, LeaseId, LeaseState, PieceSize, PieceSource};

const HOME: u8 = 9;
const SPARE: u8 = 8;

fn node(byte: u8) -> NodeId {
    NodeId::from_bytes([byte; 16])
}

fn run_of(first: u32, count: u32) -> PieceRange {
    PieceRange { first: PieceIndex(first), count }
}

struct Rig {
    task: Task,
    now: Instant,
}

impl Rig {
    /// 64 pieces of 1 MiB, a reader at the first.
    fn new(homes: &[u8]) -> Self {
        let now = Instant::now();
        let geometry = Geometry::new(64 << 20, PieceSize::new(1 << 20).unwrap()).unwrap();
        let homes = homes.iter().map(|home| node(*home)).collect();
        let id = TaskId::blob(Digest::Sha256([7; 32]));
        let mut task = Task::new(id, geometry, Bitmap::new(64), homes, 1, now);
        task.handle_reader(ReaderId(1), PieceIndex(0), now);
        Self { task, now }
    }

    /// Its first run, of four pieces, has brought one when the home that lent it is left.
    fn fetching_while_home_is_left() -> Self {
        let mut rig = Self::new(&[HOME, SPARE, 1]);
        rig.registered(HOME);
        rig.lease(HOME, 1, run_of(0, 4));
        rig.task.handle_origin_piece(RunId(1), PieceIndex(0), rig.now);
        rig.unreachable(HOME);
        rig
    }

    fn registered(&mut self, home: u8) {
        self.answered(home, Vec::new());
    }

    /// The home has taken a run over.
    fn adopted(&mut self, home: u8, id: u64, pieces: PieceRange) {
        self.answered(home, vec![Lease { id: LeaseId(id), pieces, lapse: Duration::from_secs(2) }]);
    }

    fn answered(&mut self, home: u8, leases: Vec<Lease>) {
        let response =
            RegisterResponse { task: self.task.id, geometry: None, neighbours: Vec::new(), advertise: false, leases };
        self.task.handle_registered(node(home), &response, self.now);
    }

    fn lease(&mut self, home: u8, id: u64, pieces: PieceRange) {
        let lease = Lease { id: LeaseId(id), pieces, lapse: Duration::from_secs(2) };
        self.task.handle_pulled(node(home), PullPieceResponse::Lease(lease), self.now);
    }

    fn named(&mut self, home: u8, peer: u8, pieces: PieceRange) {
        let sources = vec![PieceSource { node: node(peer), pieces }];
        self.task.handle_pulled(node(home), PullPieceResponse::Pieces(sources), self.now);
    }

    fn unreachable(&mut self, home: u8) {
        let error = TrackerError::Unreachable { reason: "test".to_owned() };
        self.task.handle_home_failed(node(home), &error, self.now);
    }

    fn reported(&mut self, home: u8, lease: u64, state: LeaseState) {
        let response = ReportPieceResponse { lease: state, advertise: false };
        self.task.handle_reported(node(home), Some(LeaseId(lease)), response, self.now);
    }

    /// The client reads what is there and waits for the next piece.
    fn read(&mut self) {
        let next = self.task.have.prefix().min(63);
        self.task.handle_reader(ReaderId(1), PieceIndex(next), self.now);
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = self.task.poll_timeout(self.now).min(end);
            self.task.handle_timeout(self.now);
        }
    }

    fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.task.poll_action()).collect()
    }

    fn count(&mut self, is: impl Fn(&Action) -> bool) -> usize {
        self.actions().iter().filter(|action| is(action)).count()
    }
}

fn fetches(actions: &[Action]) -> Vec<(RunId, PieceRange)> {
    let fetch = |action: &Action| match action {
        Action::Fetch { run, pieces } => Some((*run, *pieces)),
        _ => None,
    };
    actions.iter().filter_map(fetch).collect()
}

#[test]
fn runs_of_a_former_home_do_not_keep_new_ones_out() {
    let mut rig = Rig::new(&[HOME, SPARE, 1]);
    rig.registered(HOME);
    rig.lease(HOME, 1, run_of(0, 1));
    rig.lease(HOME, 2, run_of(1, 1));
    rig.unreachable(HOME);
    rig.task.handle_origin_piece(RunId(1), PieceIndex(0), rig.now);
    rig.task.handle_origin_piece(RunId(2), PieceIndex(1), rig.now);
    rig.actions();
    rig.registered(SPARE);
    let can_fetch = |action: &Action| matches!(action, Action::Pull { request, .. } if request.can_fetch);
    assert_eq!(rig.count(can_fetch), 1, "both runs are over");
}

#[test]
fn a_node_with_enough_runs_elsewhere_fetches_what_its_reader_needs_and_the_rest_later() {
    let mut rig = Rig::new(&[HOME, 1]);
    rig.task.handle_reader_gone(ReaderId(1), rig.now);
    rig.task.handle_fetching_elsewhere(origin::RUNS_PER_NODE, rig.now);
    rig.registered(HOME);
    let wait = || PullPieceResponse::Wait {
        retry_after: link::PULL_INTERVAL_MAX,
        neighbours: Vec::new(),
        paused: Added::default(),
    };
    let can_fetch = |action: &Action| matches!(action, Action::Pull { request, .. } if request.can_fetch);
    let asks = |action: &Action| matches!(action, Action::Pull { request, .. } if !request.can_fetch);
    assert_eq!(rig.count(asks), 1, "others may have it");
    rig.task.handle_pulled(node(HOME), wait(), rig.now);
    rig.pass(link::PULL_INTERVAL_MAX);
    assert_eq!(rig.count(can_fetch), 0);
    rig.task.handle_pulled(node(HOME), wait(), rig.now);
    rig.task.handle_fetching_elsewhere(0, rig.now);
    assert_eq!(rig.count(can_fetch), 1, "another run has ended");
    assert_eq!(rig.task.fetching(), 1, "it counts before the answer comes");
    rig.task.handle_fetching_elsewhere(origin::RUNS_PER_NODE, rig.now);
    rig.task.handle_pulled(node(HOME), wait(), rig.now);
    rig.task.handle_reader(ReaderId(1), PieceIndex(0), rig.now);
    rig.pass(fallback::READER_BUDGET + link::PULL_INTERVAL);
    assert_eq!(rig.count(can_fetch), 1, "a reader waits");
}

#[test]
fn a_node_that_knows_nobody_fetches_what_its_reader_needs_at_once() {
    let mut rig = Rig::new(&[HOME, 1]);
    rig.task.handle_fetching_elsewhere(origin::RUNS_PER_NODE, rig.now);
    rig.registered(HOME);
    let can_fetch = |action: &Action| matches!(action, Action::Pull { request, .. } if request.can_fetch);
    assert_eq!(rig.count(can_fetch), 0, "somebody may come yet");
    let wake = rig.task.poll_timeout(rig.now);
    assert!(wake <= rig.now + link::ALONE, "it wakes up for that");
    rig.pass(link::ALONE);
    assert_eq!(rig.count(can_fetch), 1);
}

/// A report of before the home was left is answered after it is back: its lease is over, and the run has another.
#[test]
fn what_is_said_of_a_former_lease_does_not_end_the_run() {
    let mut rig = Rig::fetching_while_home_is_left();
    rig.adopted(HOME, 2, run_of(1, 3));
    rig.actions();
    rig.reported(HOME, 1, LeaseState::Over);
    assert!(!rig.actions().contains(&Action::Stop { run: RunId(1) }));
    rig.reported(HOME, 2, LeaseState::Over);
    assert!(rig.actions().contains(&Action::Stop { run: RunId(1) }));
}

#[test]
fn a_lease_for_a_run_that_has_ended_meanwhile_is_given_back() {
    let mut rig = Rig::fetching_while_home_is_left();
    rig.task.handle_origin_failed(RunId(1), OriginFailure::Transient, rig.now);
    rig.adopted(HOME, 2, run_of(1, 3));
    let returned = |action: &Action| matches!(action, Action::Report { request, .. } if request.release && request.lease == Some(LeaseId(2)));
    assert_eq!(rig.count(returned), 1);
}

/// The shell asks when to wake up after everything that happens, and signs of life happen all the time.
#[test]
fn a_lease_is_renewed_whatever_else_happens() {
    let mut rig = Rig::new(&[HOME, 1]);
    rig.registered(HOME);
    rig.lease(HOME, 1, run_of(0, 4));
    let (mut renewals, mut signs) = (Vec::new(), 0);
    for turn in 1..=50 {
        let pulse = rig.now + Duration::from_millis(100);
        // Bytes of the first piece come for two seconds, and then none.
        if turn <= 20 {
            rig.task.handle_origin_progress(RunId(1), rig.now);
        }
        loop {
            let wake = rig.task.poll_timeout(rig.now);
            if wake > pulse {
                break;
            }
            rig.now = wake;
            rig.task.handle_timeout(wake);
        }
        rig.now = pulse;
        rig.task.handle_alive(node(HOME), pulse);
        for action in rig.actions() {
            match action {
                Action::Report { request, .. } => {
                    match request.lease {
                        Some(_) => renewals.push(turn),
                        None => signs += 1,
                    }
                    rig.reported(HOME, 1, LeaseState::Held);
                }
                Action::Pull { .. } => {
                    let wait = PullPieceResponse::Wait {
                        retry_after: link::PULL_INTERVAL_MAX,
                        neighbours: Vec::new(),
                        paused: Added::default(),
                    };
                    rig.task.handle_pulled(node(HOME), wait, rig.now);
                }
                _ => {}
            }
        }
    }
    assert!(renewals.len() >= 5 && renewals.iter().all(|turn| *turn <= 28), "{renewals:?}");
    assert!(signs >= 4, "{signs}: it is alive though the registry is silent");
}

#[test]
fn homes_that_refuse_are_not_asked_without_a_pause() {
    let mut rig = Rig::new(&[HOME, 1]);
    let mut registers = 0;
    for _ in 0..100 {
        for action in rig.actions() {
            let Action::Register { home, .. } = action else { continue };
            registers += 1;
            let error = TrackerError::Refused { reason: "another length".to_owned() };
            rig.task.handle_home_failed(home, &error, rig.now);
        }
        rig.now += Duration::from_millis(1);
        rig.task.handle_timeout(rig.now);
    }
    assert_eq!(registers, 2, "each was asked once");
    rig.pass(link::PULL_INTERVAL_MAX);
    assert_eq!(rig.count(|action| matches!(action, Action::Register { .. })), 2, "and each once more in two seconds");
}

#[test]
fn a_lease_of_pieces_that_do_not_exist_is_cut_to_those_that_do() {
    for (first, count, expected) in [(60, 10, Some(run_of(60, 4))), (64, 1, None), (3, 0, None), (u32::MAX, 9, None)] {
        let mut rig = Rig::new(&[HOME, 1]);
        rig.registered(HOME);
        rig.actions();
        rig.lease(HOME, 1, run_of(first, count));
        let actions = rig.actions();
        assert_eq!(fetches(&actions).first().map(|(_, pieces)| *pieces), expected);
        let pulls = actions.iter().filter(|action| matches!(action, Action::Pull { .. })).count();
        assert!(expected.is_some() || pulls == 0, "nonsense is not asked for again at once");
    }
}

#[test]
fn fetching_without_a_lease_ends_when_a_home_answers_although_a_reader_follows() {
    let mut rig = Rig::new(&[HOME, SPARE, 1]);
    let (run, pieces) = loop {
        rig.pass(Duration::from_millis(100));
        let begun = fetches(&rig.actions());
        if let Some(rest) = begun.iter().find(|(_, pieces)| pieces.end() == 64) {
            break *rest;
        }
        // While the homes are merely late it is a piece at a time.
        for (run, pieces) in begun {
            rig.task.handle_origin_piece(run, pieces.first, rig.now);
            rig.read();
        }
    };
    for piece in pieces.first.0..pieces.first.0 + 4 {
        rig.now += Duration::from_millis(20);
        rig.task.handle_origin_piece(run, PieceIndex(piece), rig.now);
        rig.read();
    }
    let home = rig.task.home().unwrap();
    rig.registered(home.as_bytes()[0]);
    let mut fetched = 0;
    for piece in pieces.first.0 + 4..64 {
        if rig.actions().contains(&Action::Stop { run }) {
            break;
        }
        fetched += 1;
        rig.now += Duration::from_millis(20);
        rig.task.handle_origin_piece(run, PieceIndex(piece), rig.now);
        rig.read();
    }
    assert!(fetched <= 3, "{fetched} pieces more were fetched without a lease");
}

#[test]
fn a_pause_between_two_runs_does_not_tighten_the_brake() {
    let mut rig = Rig::new(&[HOME, 1]);
    rig.registered(HOME);
    rig.task.handle_neighbour_up(node(2), Bitmap::new(64), rig.now);
    rig.lease(HOME, 1, run_of(0, 1));
    rig.now += Duration::from_millis(5);
    rig.task.handle_origin_piece(RunId(1), PieceIndex(0), rig.now);
    rig.reported(HOME, 1, LeaseState::Over);
    rig.pass(Duration::from_secs(60));
    rig.actions();
    rig.read();
    // The neighbour takes nothing: the run goes on at the pace of the brake, two pieces each quarter of a second.
    rig.lease(HOME, 2, run_of(10, 20));
    let (mut next, mut credit, start) = (10, 0, rig.now);
    while next < 30 {
        credit += rig.count(|action| matches!(action, Action::ReadOn { run: RunId(2) }));
        if credit > 0 {
            (credit, rig.now) = (credit - 1, rig.now + Duration::from_millis(5));
            rig.task.handle_origin_piece(RunId(2), PieceIndex(next), rig.now);
            next += 1;
        } else {
            rig.now = rig.task.poll_timeout(rig.now);
            rig.task.handle_timeout(rig.now);
        }
        assert!(rig.now - start < Duration::from_secs(6), "piece {next} after {:?}", rig.now - start);
    }
}

#[test]
fn a_peer_that_is_gone_is_not_connected_to_again_and_again() {
    let mut rig = Rig::new(&[HOME, 1]);
    rig.registered(HOME);
    let connects = |action: &Action| matches!(action, Action::Connect { .. });
    rig.named(HOME, 2, run_of(0, 1));
    assert_eq!(rig.count(connects), 1);
    rig.task.handle_unreachable(node(2), rig.now);
    rig.named(HOME, 2, run_of(0, 1));
    assert_eq!(rig.count(connects), 0, "it could not be reached a moment ago");
    // Another has no session for us, though it serves.
    for serving in [false, true] {
        let peer = if serving { 3 } else { 4 };
        rig.named(HOME, peer, run_of(0, 1));
        assert_eq!(rig.count(connects), 1);
        rig.task.handle_neighbour_up(node(peer), Bitmap::new(64), rig.now);
        rig.task.handle_neighbour_gone(node(peer), serving, rig.now);
        rig.named(HOME, peer, run_of(0, 1));
        assert_eq!(rig.count(connects), 0, "its session has just ended");
        rig.now += Duration::from_secs(3);
        rig.named(HOME, peer, run_of(0, 1));
        assert_eq!(rig.count(connects), 1, "it may have begun anew");
    }
}

#[test]
fn a_piece_that_a_home_names_is_asked_for_though_the_neighbour_has_not_offered_it() {
    let mut rig = Rig::new(&[HOME, 1]);
    rig.registered(HOME);
    rig.task.handle_neighbour_up(node(2), Bitmap::new(64), rig.now);
    rig.named(HOME, 2, run_of(0, 1));
    assert!(rig.actions().contains(&Action::Ask { peer: node(2) }));
    rig.task.handle_turn(node(2), None, true, rig.now);
    assert!(rig.actions().contains(&Action::Take { peer: node(2), piece: PieceIndex(0) }));
    // It does not have it after all: the home is told, so that it names somebody else or the registry.
    rig.task.handle_piece_failed(node(2), PieceIndex(0), Some(ErrorKind::NotFound), rig.now);
    let blames = |action: &Action| matches!(action, Action::Blame { request, .. } if request.peer == node(2));
    assert_eq!(rig.count(blames), 1);
}

#[test]
fn who_sent_a_wrong_piece_is_not_asked_sooner_because_it_was_busy_as_well() {
    let mut rig = Rig::new(&[HOME, 1]);
    rig.registered(HOME);
    rig.task.handle_neighbour_up(node(2), Bitmap::full(64), rig.now);
    let asked = |action: &Action| *action == Action::Ask { peer: node(2) };
    let mut taken = Vec::new();
    for _ in 0..neighbour::PIPELINE {
        assert_eq!(rig.count(asked), 1);
        rig.task.handle_turn(node(2), None, true, rig.now);
        let take = |action: &Action| if let Action::Take { piece, .. } = action { Some(*piece) } else { None };
        let actions = rig.actions();
        taken.extend(actions.iter().filter_map(take));
        if actions.iter().any(asked) {
            rig.task.handle_turn_failed(node(2), None, rig.now);
            rig.pass(Duration::from_millis(100));
        }
    }
    rig.task.handle_piece_failed(node(2), taken[0], Some(ErrorKind::Mismatch), rig.now);
    rig.task.handle_piece_failed(node(2), taken[1], None, rig.now);
    // It offers everything once more.
    rig.task.handle_have(node(2), &[run_of(0, 64)], rig.now);
    rig.pass(Duration::from_secs(20));
    assert_eq!(rig.count(asked), 0);
}

#[test]
fn neighbours_are_bounded_and_the_useless_make_room() {
    let mut rig = Rig::new(&[HOME, 1]);
    rig.registered(HOME);
    for peer in 100..100 + 2 * neighbour::NEIGHBOURS_MAX as u8 {
        rig.task.handle_neighbour_up(node(peer), Bitmap::new(64), rig.now);
        rig.task.handle_neighbour_gone(node(peer), true, rig.now);
    }
    assert_eq!(rig.task.neighbours.len(), neighbour::NEIGHBOURS_MAX);
    rig.named(HOME, 2, run_of(0, 1));
    assert!(rig.actions().contains(&Action::Connect { peer: node(2) }));
}

#[test]
fn a_second_session_does_not_take_back_what_the_first_has_told() {
    let mut rig = Rig::new(&[HOME, 1]);
    rig.task.handle_neighbour_up(node(2), Bitmap::new(64), rig.now);
    rig.task.handle_have(node(2), &[run_of(5, 1)], rig.now);
    // Both have begun one at the same time; what this offer holds was written down before the news above.
    rig.task.handle_neighbour_up(node(2), Bitmap::new(64), rig.now);
    assert!(rig.task.neighbours[&node(2)].has(PieceIndex(5)));
}

#[test]
fn a_late_answer_of_a_former_home_does_not_hold_up_the_present_one() {
    let mut rig = Rig::new(&[HOME, SPARE, 1]);
    rig.registered(HOME);
    rig.unreachable(HOME);
    rig.registered(SPARE);
    let pulls = |action: &Action| matches!(action, Action::Pull { home, .. } if *home == node(SPARE));
    let wait = |retry_after| PullPieceResponse::Wait { retry_after, neighbours: Vec::new(), paused: Added::default() };
    rig.task.handle_pulled(node(SPARE), wait(link::PULL_INTERVAL), rig.now);
    rig.task.handle_pulled(node(HOME), wait(link::PULL_INTERVAL_MAX), rig.now);
    rig.actions();
    rig.pass(link::PULL_INTERVAL + Duration::from_millis(1));
    assert_eq!(rig.count(pulls), 1);
}

#[test]
fn without_any_home_everything_comes_from_the_registry_at_once() {
    let mut rig = Rig::new(&[]);
    let mut begun = Vec::new();
    for turn in 0..200 {
        let actions = rig.actions();
        assert!(!actions.iter().any(|action| matches!(action, Action::Register { .. } | Action::Connect { .. })));
        begun.extend(fetches(&actions));
        let Some((run, pieces)) = begun.last().copied() else { panic!("nothing is fetched") };
        rig.now += Duration::from_millis(300);
        match PieceRange::gather(rig.task.have.missing()).first().filter(|first| pieces.contains(first.first)) {
            // The response breaks off once, where no reader waits for what is missing.
            Some(_) if turn == 20 => {
                rig.task.handle_reader(ReaderId(1), PieceIndex(0), rig.now);
                rig.task.handle_origin_failed(run, OriginFailure::Transient, rig.now);
            }
            Some(next) => rig.task.handle_origin_piece(run, next.first, rig.now),
            None => rig.task.handle_timeout(rig.now),
        }
    }
    assert!(rig.task.is_complete(), "{:?}", rig.task.have);
    assert_eq!(begun.len(), 2, "one response, and one more after it broke off");
}

/// Everybody's reader waits for the same piece; taken from its only holder by all of them it would be all that he gives.
#[test]
fn what_only_one_has_is_not_taken_in_order_while_others_want_it() {
    let taken = |others: u8, waits: Duration| {
        let mut rig = Rig::new(&[HOME]);
        rig.task.handle_reader(ReaderId(1), PieceIndex(1), rig.now);
        let mut has = Bitmap::new(64);
        for piece in 1..41 {
            has.insert(PieceIndex(piece));
        }
        rig.task.handle_neighbour_up(node(1), has, rig.now);
        (2..2 + others).for_each(|peer| rig.task.handle_neighbour_up(node(peer), Bitmap::new(64), rig.now));
        let now = rig.now + waits;
        rig.task.handle_alive(node(1), now);
        rig.task.handle_turn(node(1), None, true, now);
        let take = |action| if let Action::Take { piece, .. } = action { Some(piece) } else { None };
        std::iter::from_fn(|| rig.task.poll_action()).find_map(take).unwrap()
    };
    let patience = super::pick::READER_PATIENCE;
    assert_eq!(taken(1, patience), PieceIndex(1), "there is nobody to spread the others");
    assert_ne!(taken(2, patience), PieceIndex(1));
    assert_eq!(taken(2, Duration::from_secs(2)), PieceIndex(1), "a reader does not wait for ever");
}

/// What a reader waits for and others have as well is left to them while its holder names what he alone has.
#[test]
fn what_a_holder_names_goes_before_what_others_have_too() {
    let taken = |rather: Option<u32>, waits: Duration| {
        let mut rig = Rig::new(&[HOME]);
        rig.task.handle_reader(ReaderId(1), PieceIndex(1), rig.now);
        let mut has = Bitmap::new(64);
        has.insert(PieceIndex(1));
        rig.task.handle_neighbour_up(node(2), has.clone(), rig.now);
        has.insert(PieceIndex(40));
        rig.task.handle_neighbour_up(node(1), has, rig.now);
        let now = rig.now + waits;
        rig.task.handle_alive(node(1), now);
        rig.task.handle_turn(node(1), rather.map(PieceIndex), true, now);
        let take = |action| if let Action::Take { piece, .. } = action { Some(piece) } else { None };
        std::iter::from_fn(|| rig.task.poll_action()).find_map(take).unwrap()
    };
    let waits = Duration::from_secs(2);
    assert_eq!(taken(None, waits), PieceIndex(1));
    assert_eq!(taken(Some(40), waits), PieceIndex(40));
    assert_eq!(taken(Some(41), waits), PieceIndex(1), "he does not have it");
    assert_eq!(taken(Some(40), waits * 2), PieceIndex(1), "a reader does not wait for ever");
}
