//! The runs that this node fetches from the registry, and their brake: what is fetched faster than the swarm takes it
//! only costs others the registry's bandwidth.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use darter_tracker::{Geometry, Lease, LeaseId, LeaseState, NodeId, Pause, PieceIndex, PieceRange, RegistryTag};

use super::link::{RENEW, Renewal};
use super::neighbour::Neighbour;
use super::{Action, OriginFailure, RunId, Task};
use crate::home::lease::LAPSE;
use crate::home::pause::{PAUSE_MAX, WORD_MAX};
use crate::upload::Unshared;

/// Pieces of one run that are read ahead of being stored: the registry's bytes must not wait for this node's disk.
const LEAD: u32 = 2;

/// Fetched pieces that no neighbour has taken yet, before the brake: two (simulated, D3), or this many bytes where
/// pieces are so small that two would not cover a round trip.
const UNPASSED_PIECES: usize = 2;
const UNPASSED_BYTES: u64 = 1024 * 1024;

/// What this node's own reader waits for does not mind the brake, up to so many times as much: a fetcher whose client reads
/// what it fetches would run ahead of the swarm alone, and take it all along when it dies.
const AWAITED: usize = 4;

/// A piece counts as passed on after this even if nobody took it, or after two piece times if those are longer.
const PASSED_AFTER: Duration = Duration::from_millis(250);

/// A fetched piece that no neighbour has taken for so long waits for a slow way out, or for neighbours that are busy.
const TAKEN_WITHIN: Duration = Duration::from_millis(100);

/// Who takes so many times as long to pass a piece on as neighbours take to give one, and [`TAKEN_WITHIN`] besides, has a slow way
/// out: what he fetches others get late. (Simulated with two such among 16: without this 1.13 to 1.24 times the bound, with it 1.11
/// to 1.20.)
const SLOWER: u32 = 2;

/// So long it counts how slowly a piece was passed on: who is lent nothing passes nothing on that would tell of a way out that has
/// become free, and the first pieces of a pull wait for connections as well.
const SLOW_FOR: Duration = Duration::from_secs(5);

/// Neighbours that have given something, before what they take says anything.
const GIVERS_MIN: usize = 3;

/// How long a registry may take to its first byte (a cold object store behind two redirects); after that silence costs
/// the lease.
const FIRST_BYTE: Duration = Duration::from_secs(10);

/// First and longest pause after a registry failed.
const BACKOFF_BASE: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Runs of one task that a node has at a time: one, and one more for what a reader needs at once.
const RUNS_MAX: usize = 2;

/// Runs of all tasks that a node has at a time, unless a reader waits. All layers of an image are begun at the same moment, and
/// the homes of all of them would lend to the same few that ask first: a slow one among them is the whole image's fetcher then
/// (simulated: two of 16 nodes with a quarter of the way out cost 1.8 to 2.3 times the bound in seven of sixteen draws).
pub(super) const RUNS_PER_NODE: usize = 2;

/// What this node fetches.
#[derive(Debug, Default)]
pub(super) struct Origin {
    runs: BTreeMap<RunId, Run>,
    next_run: u64,
    /// Fetched and not passed on, since when.
    unpassed: BTreeMap<PieceIndex, Instant>,
    /// Fetched, not uploaded to anybody, and not known to be held by a neighbour.
    unshared: BTreeSet<PieceIndex>,
    /// How long a piece takes from the moment that nothing but the registry held it up.
    piece_time: Duration,
    /// How long a fetched piece takes until a neighbour has taken it.
    passing_time: Duration,
    /// When that was last seen.
    passed_at: Option<Instant>,
    refused: bool,
    not_before: Option<Instant>,
    failures: u32,
    /// Leases that ended early and are owed back, with the pause that the registry asked for, and when.
    owed: VecDeque<Owed>,
}

#[derive(Debug)]
struct Owed {
    home: NodeId,
    lease: LeaseId,
    paused_until: Option<Instant>,
}

#[derive(Debug)]
struct Run {
    /// The home that gave the lease; `None` for what was begun without one.
    lease: Option<(NodeId, LeaseId)>,
    pieces: PieceRange,
    /// The next piece to arrive.
    next: u32,
    /// Pieces that were allowed to be read and have not arrived.
    credit: u32,
    /// Pieces arrived since the last report.
    fresh: bool,
    reported: Instant,
    /// When bytes last came, or the run began, or the brake was on.
    alive: Instant,
    /// Since when the next piece is being read: what the brake held up is no sign of a slow registry.
    reading: Instant,
    begun: bool,
    /// Whether the response has more pieces than are to be read of it.
    cut: bool,
}

impl Run {
    /// How long the registry may be silent.
    fn patience(&self) -> Duration {
        if self.begun { LAPSE } else { FIRST_BYTE }
    }
}

/// Fetched pieces that no neighbour has taken, at which the brake is on.
fn unpassed_max(geometry: &Geometry) -> usize {
    UNPASSED_PIECES.max((UNPASSED_BYTES / u64::from(geometry.piece_size().bytes())) as usize)
}

impl Origin {
    /// Begins a run.
    pub(super) fn start(&mut self, lease: Option<(NodeId, LeaseId)>, pieces: PieceRange, now: Instant) -> Vec<Action> {
        self.next_run += 1;
        let run = RunId(self.next_run);
        self.runs.insert(
            run,
            Run {
                lease,
                pieces,
                next: pieces.first.0,
                credit: 0,
                fresh: false,
                reported: now,
                alive: now,
                reading: now,
                begun: false,
                cut: false,
            },
        );
        vec![Action::Fetch { run, pieces }]
    }

    pub(super) fn delivered(&mut self, run: RunId, piece: PieceIndex, now: Instant) {
        self.failures = 0;
        self.unpassed.insert(piece, now);
        self.unshared.insert(piece);
        if let Some(state) = self.runs.get_mut(&run) {
            state.next = state.next.max(piece.0 + 1);
            state.credit = state.credit.saturating_sub(1);
            (state.fresh, state.begun, state.alive) = (true, true, now);
            let took = now.saturating_duration_since(std::mem::replace(&mut state.reading, now));
            self.piece_time = (self.piece_time * 3 + took) / 4;
        }
    }

    pub(super) fn progress(&mut self, run: RunId, now: Instant) {
        if let Some(state) = self.runs.get_mut(&run) {
            (state.begun, state.alive) = (true, now);
        }
    }

    pub(super) fn failed(&mut self, run: RunId, failure: OriginFailure, now: Instant) {
        let Some(state) = self.runs.remove(&run) else { return };
        let pause = match failure {
            OriginFailure::Busy(pause) => Some(now + pause.min(PAUSE_MAX)),
            OriginFailure::Refused | OriginFailure::Transient => None,
        };
        self.owe(state.lease, pause);
        self.failures += 1;
        let backoff = (BACKOFF_BASE * 2u32.saturating_pow(self.failures.min(8) - 1)).min(BACKOFF_MAX);
        match failure {
            OriginFailure::Refused => self.refused = true,
            OriginFailure::Busy(pause) => self.not_before = Some(now + pause.max(backoff)),
            OriginFailure::Transient => self.not_before = Some(now + backoff),
        }
    }

    /// The home says that the registry is to be left alone. Its word counts for as long as that of one member at a home, and is
    /// asked for again before that is over.
    pub(super) fn pause(&mut self, pause: Option<Pause>, now: Instant) {
        if let Some(pause) = pause {
            let until = now + pause.left.min(WORD_MAX);
            self.not_before = self.not_before.max(Some(until));
        }
    }

    pub(super) fn offered(&mut self) {
        self.refused = false;
    }

    pub(super) fn refused(&self) -> bool {
        self.refused
    }

    /// What open runs have still to bring.
    pub(super) fn under_way(&self) -> Vec<PieceRange> {
        let left =
            |run: &Run| PieceRange { first: PieceIndex(run.next), count: run.pieces.end().saturating_sub(run.next) };
        self.runs.values().map(left).filter(|left| left.count > 0).collect()
    }

    /// A home has taken over: runs go on under its `leases`, and end where those end. Others stop, and a lease for a run that has
    /// ended meanwhile is given back: the home would else wait for it until it lapses.
    pub(super) fn rebind(&mut self, home: NodeId, leases: &[Lease]) -> Vec<Action> {
        // Leases of a former home are not owed back to it.
        self.owed.clear();
        let mut stopped = Vec::new();
        self.runs.retain(|id, run| {
            // A run that has ended meanwhile is none that could stop.
            let finished = run.next >= run.pieces.end();
            let own =
                |lease: &&Lease| run.pieces.contains(lease.pieces.first) && lease.pieces.end() <= run.pieces.end();
            let Some(lease) = leases.iter().find(own).filter(|lease| finished || run.next < lease.pieces.end()) else {
                if !finished {
                    tracing::debug!(%home, run = ?id, "a run is stopped, since a new home does not lend it");
                    stopped.push(Action::Stop { run: *id });
                }
                return false;
            };
            run.lease = Some((home, lease.id));
            run.cut |= lease.pieces.end() < run.pieces.end();
            run.pieces.count = lease.pieces.end() - run.pieces.first.0;
            run.fresh = true;
            true
        });
        for lease in leases {
            let lease = Some((home, lease.id));
            if !self.runs.values().any(|run| run.lease == lease) {
                self.owe(lease, None);
            }
        }
        stopped
    }

    pub(super) fn passed_on(&mut self, piece: PieceIndex, now: Instant) {
        self.shared(piece);
        if let Some(since) = self.unpassed.remove(&piece) {
            self.passing_time = (self.passing_time * 3 + now.saturating_duration_since(since)) / 4;
            self.passed_at = Some(now);
        }
    }

    /// Somebody else has `piece`.
    pub(super) fn shared(&mut self, piece: PieceIndex) {
        self.unshared.remove(&piece);
    }

    /// Whether a run that is open will bring `piece`.
    pub(super) fn covers(&self, piece: PieceIndex) -> bool {
        self.runs.values().any(|run| run.pieces.contains(piece) && piece.0 >= run.next)
    }

    /// Whether the registry may be asked for another run. While the last pieces of one are on their way the next may
    /// be asked for, so that there is no gap.
    pub(super) fn can_start(&self, now: Instant) -> bool {
        !self.refused
            && self.runs.len() < RUNS_MAX
            && self.not_before.is_none_or(|at| now >= at)
            && self.runs.values().all(|run| run.next + run.credit >= run.pieces.end())
    }

    /// Whether neighbours take what is fetched as fast as it comes, and as fast as they give what they have, which `takes` them so
    /// long: who is slow to pass on shall not be lent more.
    pub(super) fn keeps_up(&self, takes: Option<Duration>, now: Instant) -> bool {
        let slow = takes.is_some_and(|takes| self.passing_time > takes * SLOWER + TAKEN_WITHIN);
        let lately = self.passed_at.is_some_and(|at| now.saturating_duration_since(at) < SLOW_FOR);
        !(slow && lately) && self.unpassed.values().all(|since| now.saturating_duration_since(*since) < TAKEN_WITHIN)
    }

    /// Runs of which there is more to ask for.
    pub(super) fn open(&self) -> usize {
        self.runs.values().filter(|run| run.next + run.credit < run.pieces.end()).count()
    }

    /// Whether something was fetched that no neighbour has taken yet.
    pub(super) fn waits_to_pass_on(&self) -> bool {
        !self.unpassed.is_empty()
    }

    /// Whether no response is open.
    pub(super) fn idle(&self) -> bool {
        self.runs.is_empty()
    }

    /// The pieces that open runs will bring.
    pub(super) fn covered(&self) -> impl Iterator<Item = PieceIndex> + '_ {
        self.runs.values().flat_map(|run| (run.next..run.pieces.end()).map(PieceIndex))
    }

    /// Whether the registry may be asked at all.
    pub(super) fn may_ask(&self, now: Instant) -> bool {
        !self.refused && self.runs.len() < RUNS_MAX && self.not_before.is_none_or(|at| now >= at)
    }

    /// What became of a lease. The run that had it may have another by now, as a home that was left and is back gives a new one;
    /// what is said of the former one says nothing about it.
    pub(super) fn lease_state(&mut self, lease: (NodeId, LeaseId), state: LeaseState) -> Option<Action> {
        if state != LeaseState::Over {
            return None;
        }
        let run = self.runs.iter().find(|(_, run)| run.lease == Some(lease)).map(|(id, _)| *id)?;
        // A run whose last piece has arrived is over anyway.
        let unfinished = self.runs.remove(&run).is_some_and(|run| run.next < run.pieces.end());
        if unfinished {
            tracing::debug!(home = %lease.0, ?run, "a run is stopped, since its lease is over");
        }
        unfinished.then_some(Action::Stop { run })
    }

    pub(super) fn stop_all(&mut self, actions: &mut VecDeque<Action>) {
        for (run, state) in std::mem::take(&mut self.runs) {
            self.owe(state.lease.filter(|_| state.fresh), None);
            if state.next < state.pieces.end() || state.cut {
                actions.push_back(Action::Stop { run });
            }
        }
    }

    fn owe(&mut self, lease: Option<(NodeId, LeaseId)>, paused_until: Option<Instant>) {
        if let Some((home, lease)) = lease {
            self.owed.push_back(Owed { home, lease, paused_until });
        }
    }

    /// The report that is due to `home`: pieces arrived, a lease wants renewal, or one is given back.
    pub(super) fn renewal(&mut self, home: NodeId, now: Instant) -> Option<Renewal> {
        // Leases of a former home are moot.
        self.owed.retain(|owed| owed.home == home);
        if let Some(Owed { lease, paused_until, .. }) = self.owed.pop_front() {
            let left = paused_until.map(|until| until.saturating_duration_since(now)).filter(|left| !left.is_zero());
            // Which registry it is, whoever carries the report out knows.
            let pause = left.map(|left| Pause { registry: RegistryTag::default(), left });
            return Some(Renewal { lease: Some(lease), release: true, pause });
        }
        for state in self.runs.values_mut() {
            let Some((to, lease)) = state.lease else { continue };
            let alive = now.saturating_duration_since(state.alive) < RENEW * 2 || !state.begun;
            let due = now.saturating_duration_since(state.reported) >= RENEW;
            if to == home && (state.fresh || due) {
                // A registry that pauses costs the lease in time; what still speaks for the fetcher is that it says something.
                let lease = Some(lease).filter(|_| state.fresh || alive);
                (state.fresh, state.reported) = (false, now);
                return Some(Renewal { lease, release: false, pause: None });
            }
        }
        None
    }

    pub(super) fn deadlines(&self, now: Instant) -> impl Iterator<Item = Instant> {
        // Both are points in time: one that moved with `now` would never come while something else happens more often.
        let runs = self.runs.values().flat_map(|run| {
            let renew = run.lease.map(|_| run.reported + RENEW);
            [renew, (run.credit > 0).then(|| run.alive + run.patience())]
        });
        let passed = self.unpassed.values().min().map(|since| *since + self.passed_after());
        runs.chain([passed, self.not_before]).flatten().filter(move |at| *at > now)
    }

    fn passed_after(&self) -> Duration {
        PASSED_AFTER.max(self.piece_time * 2)
    }
}

impl Task {
    /// Lets runs read on, drops the dead ones, forgets the finished ones.
    pub(super) fn drive_origin(&mut self, now: Instant) {
        self.drop_dead_runs(now);
        self.forget_passed(now);
        let unpassed_max = unpassed_max(&self.geometry);
        let unpassed = self.origin.unpassed.len();
        let (braked, stopped) = (unpassed >= unpassed_max, unpassed >= unpassed_max * AWAITED);
        let home_silent = self.link.silent(&self.patience, now);
        for (id, run) in &mut self.origin.runs {
            while run.credit < LEAD && run.next + run.credit < run.pieces.end() {
                let piece = run.next + run.credit;
                let awaited = self.readers.values().any(|waiting| waiting.piece.0 == piece);
                // What was begun without a lease goes on only while there is nobody to get one from, whoever reads it:
                // what it covers is asked of nobody else.
                let allowed = if run.lease.is_none() { home_silent } else { !braked || awaited && !stopped };
                if !allowed {
                    run.alive = now;
                    break;
                }
                if run.credit == 0 {
                    run.reading = now;
                }
                run.credit += 1;
                self.actions.push_back(Action::ReadOn { run: *id });
            }
        }
        let home = self.link.home();
        let actions = &mut self.actions;
        self.origin.runs.retain(|id, run| {
            let finished = run.next >= run.pieces.end();
            // A former home is not reported to.
            let reported = !run.fresh || run.lease.is_none_or(|(to, _)| Some(to) != home);
            if finished && run.cut {
                run.cut = false;
                actions.push_back(Action::Stop { run: *id });
            }
            !(finished && reported)
        });
    }

    /// What this node has fetched and nobody else has, as far as it knows, the first [`Unshared::PIECES_MAX`] of it: to be named to
    /// those who are offered turns.
    pub fn unshared(&self) -> impl Iterator<Item = PieceIndex> + Clone + '_ {
        self.origin.unshared.iter().copied().take(Unshared::PIECES_MAX)
    }

    /// How long neighbours take to give a piece, if enough have given one.
    pub(super) fn giving_time(&self) -> Option<Duration> {
        let times: Vec<Duration> = self.neighbours.values().filter_map(Neighbour::latency).collect();
        (times.len() >= GIVERS_MIN).then(|| times.iter().sum::<Duration>() / times.len() as u32)
    }

    fn drop_dead_runs(&mut self, now: Instant) {
        if !self.may_judge(now) {
            return;
        }
        let dead: Vec<RunId> = self
            .origin
            .runs
            .iter()
            .filter(|(_, run)| run.credit > 0 && now.saturating_duration_since(run.alive) >= run.patience())
            .map(|(id, _)| *id)
            .collect();
        for run in dead {
            tracing::debug!(task = %self.id, ?run, "the registry is silent");
            self.origin.failed(run, OriginFailure::Transient, now);
            self.actions.push_back(Action::Stop { run });
        }
    }

    fn forget_passed(&mut self, now: Instant) {
        let patience = self.origin.passed_after();
        let neighbours = &self.neighbours;
        self.origin.unpassed.retain(|piece, since| {
            now.saturating_duration_since(*since) < patience
                && neighbours.values().any(|neighbour| neighbour.lacks(*piece))
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "a test needs some instant to start at")]

    use super::*;

    #[test]
    fn what_was_fetched_is_unshared_until_somebody_has_it() {
        let (mut origin, now) = (Origin::default(), Instant::now());
        (3..7).for_each(|piece| origin.delivered(RunId(1), PieceIndex(piece), now));
        origin.passed_on(PieceIndex(4), now);
        origin.shared(PieceIndex(6));
        assert_eq!(origin.unshared.iter().map(|piece| piece.0).collect::<Vec<_>>(), [3, 5]);
    }

    #[test]
    fn who_passes_on_more_slowly_than_others_give_does_not_keep_up() {
        let mut origin = Origin::default();
        let mut now = Instant::now();
        for piece in 0..20 {
            origin.unpassed.insert(PieceIndex(piece), now);
            now += Duration::from_millis(400);
            origin.passed_on(PieceIndex(piece), now);
        }
        assert!(!origin.keeps_up(Some(Duration::from_millis(80)), now));
        assert!(origin.keeps_up(Some(Duration::from_millis(300)), now), "all are as slow");
        assert!(origin.keeps_up(None, now), "nobody has given anything yet");
        now += SLOW_FOR;
        assert!(origin.keeps_up(Some(Duration::from_millis(80)), now), "it is tried again");
    }
}
