//! The members of one task as its home sees them, and what it tells each: `neighbours` is whom it
//! introduces, `lending` which runs it lends, `bridge` what it tells other homes.

mod bridge;
mod lending;
mod neighbours;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use darter_tracker::{
    Added, Bitmap, ClientErrorRequest, ErrorKind, Geometry, Lease, LeaseId, LeaseState, NodeId, PieceIndex, PieceRange,
    PieceSource, PullPieceRequest, PullPieceResponse, RegisterRequest, RegisterResponse, ReportPieceRequest,
    ReportPieceResponse, TaskId, TrackerError,
};
use rand::Rng;
use rand::RngExt as _;

use self::bridge::Bridge;
use super::introductions::{DEGREE_MAX, Introductions, Zone};
use super::lease::Leases;
use super::pause::Pauses;

pub use self::bridge::{NEWS, TOLD};

/// Members of one task that a home keeps; a cluster is smaller.
pub const MEMBERS_MAX: usize = 16_384;

/// Members whose possession is gossiped to everybody, so that the task outlives its home (D4).
pub const ADVERTISERS: usize = 3;

/// Sources named in one answer.
const SOURCES_MAX: usize = 32;

/// How long a member that failed somebody is not named to him again.
pub const BLAME_DECAY: Duration = Duration::from_secs(30);

/// Distinct complainants after which a member is named to nobody, for [`BLAME_DECAY`]. One member's word is not enough.
pub const BLAME_QUORUM: usize = 2;

/// While members fetch, a piece that has been in the swarm for less than this is on its way to everybody through neighbours: its
/// holder is named only to those whose reader waits for it. Otherwise all who have nothing yet would stand in line at the few
/// fetchers.
const SPREADING: Duration = Duration::from_secs(1);

/// How long a home that takes over lends only what readers wait for: by then everybody whose home was the same has noticed,
/// and told what he is fetching.
const SETTLE: Duration = Duration::from_secs(1);

/// One task.
#[derive(Debug)]
pub struct Swarm {
    task: TaskId,
    geometry: Option<Geometry>,
    members: BTreeMap<NodeId, MemberState>,
    /// Holders per piece.
    holders: Vec<u32>,
    /// When each piece last came from the registry, if it was lent.
    fetched_at: Vec<Option<Instant>>,
    leases: Leases,
    introductions: Introductions,
    /// Members that somebody has complained of: the few for whom it has to be looked up.
    suspects: BTreeSet<NodeId>,
    pauses: Pauses,
    bridge: Bridge,
    advertisers: BTreeSet<NodeId>,
    /// While leases of another home may be running that nobody has told of yet.
    settling: Option<Instant>,
    last_used: Instant,
}

#[derive(Debug, Default)]
struct MemberState {
    /// What it holds; `None` is nothing, also while the cut is unknown.
    have: Option<Bitmap>,
    /// When it first registered.
    came: Option<Instant>,
    /// When all whom it knows were named to it.
    named: Option<Instant>,
    /// Whether it has spoken for itself; otherwise it is known by gossip only.
    registered: bool,
    /// Who was failed by this member, and when.
    blamed_by: BTreeMap<NodeId, Instant>,
}

impl MemberState {
    fn is_complete(&self) -> bool {
        self.have.as_ref().is_some_and(Bitmap::is_full)
    }
}

impl Swarm {
    /// A task that nobody takes part in yet.
    #[must_use]
    pub fn new(task: TaskId, now: Instant) -> Self {
        Self {
            task,
            geometry: None,
            members: BTreeMap::new(),
            holders: Vec::new(),
            fetched_at: Vec::new(),
            leases: Leases::default(),
            introductions: Introductions::default(),
            suspects: BTreeSet::new(),
            pauses: Pauses::default(),
            bridge: Bridge::default(),
            advertisers: BTreeSet::new(),
            settling: None,
            last_used: now,
        }
    }

    /// Whoever was a member may have another home by now: until they have told, only what readers wait for is lent.
    pub(super) fn stalled(&mut self, now: Instant) {
        self.leases = Leases::default();
        self.settling = Some(now + SETTLE);
        self.members.values_mut().for_each(|member| member.registered = false);
    }

    /// Whose signs of life count.
    pub(super) fn fetchers(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.leases.watched()
    }

    /// Notes that something has come from `node`.
    pub(super) fn heard(&mut self, node: NodeId, now: Instant) {
        self.leases.heard(node, now);
    }

    /// Whether somebody is known to hold a piece.
    pub(super) fn has_holders(&self) -> bool {
        self.holders.iter().any(|holders| *holders > 0)
    }

    /// How many pieces the task has; 0 while its cut is unknown.
    pub(super) fn pieces(&self) -> usize {
        self.holders.len()
    }

    /// When a member last said something about the task.
    #[must_use]
    pub fn last_used(&self) -> Instant {
        self.last_used
    }

    pub(super) fn register(
        &mut self,
        from: NodeId,
        request: RegisterRequest,
        now: Instant,
        zones: &BTreeMap<NodeId, Zone>,
        next_lease: &mut u64,
        rng: &mut impl Rng,
    ) -> Result<RegisterResponse, TrackerError> {
        self.agree(request.geometry)?;
        self.last_used = now;
        if !self.members.contains_key(&from) && self.members.len() >= MEMBERS_MAX {
            return Err(TrackerError::Overloaded);
        }
        if request.moved && !self.members.values().any(|member| member.registered) {
            self.settling = Some(now + SETTLE);
        }
        // A member that registers again has started anew: nothing of what it held or leased before counts.
        self.forget_pieces(from);
        self.leases.release_all(from);
        let draw = rng.random();
        let zone = zones.get(&from).copied().unwrap_or_default();
        self.introductions.enter(from, zone, draw);
        self.suspects.remove(&from);
        let member = self.members.entry(from).or_default();
        (member.registered, member.named) = (true, None);
        member.came.get_or_insert(now);
        member.blamed_by.clear();
        self.merge(from, request.have.as_ref(), now);
        Ok(RegisterResponse {
            task: self.task,
            geometry: self.geometry,
            neighbours: self.introduce(from, now, rng),
            advertise: self.nominate(from),
            leases: self.adopt(from, &request.runs, next_lease, now),
        })
    }

    /// Leases for what `node` is fetching already, as far as nobody else fetches or holds it.
    fn adopt(&mut self, node: NodeId, runs: &[PieceRange], next_lease: &mut u64, now: Instant) -> Vec<Lease> {
        let total = self.holders.len() as u32;
        let mut leases = Vec::new();
        for run in runs.iter().take(RegisterRequest::RUNS_MAX) {
            let free = |piece: &PieceIndex| {
                piece.0 < total && self.holders[piece.0 as usize] == 0 && !self.leases.covers(*piece, &BTreeSet::new())
            };
            let count = run.iter().take_while(free).count() as u32;
            if count > 0 {
                *next_lease += 1;
                let pieces = PieceRange { first: run.first, count };
                leases.push(self.leases.adopt(LeaseId(*next_lease), node, pieces, total, now));
            }
        }
        leases
    }

    pub(super) fn pull_piece(
        &mut self,
        from: NodeId,
        request: &PullPieceRequest,
        now: Instant,
        cluster_size: usize,
        next_lease: &mut u64,
        rng: &mut impl Rng,
    ) -> Result<PullPieceResponse, TrackerError> {
        let Some(geometry) = self.geometry.filter(|_| self.members.contains_key(&from)) else {
            return Err(TrackerError::NotRegistered { task: self.task });
        };
        self.last_used = now;
        self.leases.expire(now);
        self.merge(from, request.have.as_ref(), now);
        if self.members[&from].is_complete() {
            return Ok(PullPieceResponse::Finish { geometry });
        }
        self.find_keeper(from, request, now);
        let distrusted = self.distrusted(from, now);
        let sources = self.sources(from, request, &distrusted, now, rng);
        let urgent_served =
            request.urgent.is_none_or(|piece| sources.iter().any(|source| source.pieces.contains(piece)));
        if !sources.is_empty() && urgent_served {
            return Ok(PullPieceResponse::Pieces(sources));
        }
        let paused = self.pauses.left(request.registry.0, now);
        if request.can_fetch
            && paused.is_none()
            && let Some(pieces) = self.next_run(from, request, &distrusted, now, cluster_size)
        {
            *next_lease += 1;
            if request.urgent == Some(pieces.first) {
                self.leases.note_urgent(pieces);
            }
            tracing::debug!(task = %self.task, %from, first = pieces.first.0, count = pieces.count, urgent = ?request.urgent, "lease");
            return Ok(PullPieceResponse::Lease(self.leases.grant(
                LeaseId(*next_lease),
                from,
                pieces,
                geometry.pieces(),
                now,
            )));
        }
        if !sources.is_empty() {
            return Ok(PullPieceResponse::Pieces(sources));
        }
        let retry_after = self.retry_after(now).max(paused.map_or(Duration::ZERO, |pause| pause.left));
        let neighbours = self.introduce(from, now, rng);
        Ok(PullPieceResponse::Wait { retry_after, neighbours, paused: Added(paused) })
    }

    pub(super) fn report_piece(
        &mut self,
        from: NodeId,
        request: &ReportPieceRequest,
        now: Instant,
    ) -> Result<ReportPieceResponse, TrackerError> {
        let Some(geometry) = self.geometry.filter(|_| self.members.contains_key(&from)) else {
            return Err(TrackerError::NotRegistered { task: self.task });
        };
        self.last_used = now;
        self.leases.expire(now);
        let held = request.lease.map(|lease| self.leases.renew(lease, from, now).is_some());
        if let Some(pause) = request.pause.0.filter(|_| held == Some(true)) {
            tracing::debug!(task = %self.task, %from, ?pause, "the registry wants to be left alone");
            self.pauses.told(from, pause, now);
        }
        // Nobody has more to report than there is: a list that repeats itself would keep this home from all others.
        let pieces = request.pieces.iter().flat_map(|run| run.iter()).take_while(|piece| geometry.contains(*piece));
        for piece in pieces.take(geometry.pieces() as usize) {
            self.hold(from, piece, now);
        }
        let lease = match (request.lease, held) {
            (Some(lease), Some(true)) if request.release => {
                self.leases.release(lease, from);
                LeaseState::Over
            }
            (Some(lease), Some(true)) if self.leases.renew(lease, from, now).is_some() => LeaseState::Held,
            (Some(_), _) => LeaseState::Over,
            (None, _) => LeaseState::None,
        };
        Ok(ReportPieceResponse { lease, advertise: self.nominate(from) })
    }

    pub(super) fn report_error(
        &mut self,
        from: NodeId,
        request: &ClientErrorRequest,
        now: Instant,
    ) -> Result<(), TrackerError> {
        if !self.members.contains_key(&from) {
            return Err(TrackerError::NotRegistered { task: self.task });
        }
        self.last_used = now;
        tracing::debug!(task = %self.task, %from, peer = %request.peer, kind = ?request.kind, pieces = ?request.pieces, "a member failed another");
        if request.kind == ErrorKind::NotFound && !request.pieces.is_empty() {
            // A piece that rotted is no reason to avoid a holder of all the others. It says so itself when it has it again.
            self.withdraw(request.peer, &request.pieces);
        } else if request.peer != from {
            self.blame(request.peer, from, now);
        }
        Ok(())
    }

    /// Notes that `node` has failed `whom`.
    pub(super) fn blame(&mut self, node: NodeId, whom: NodeId, now: Instant) {
        if let Some(member) = self.members.get_mut(&node) {
            member.blamed_by.retain(|_, at| now.saturating_duration_since(*at) < BLAME_DECAY);
            member.blamed_by.insert(whom, now);
            self.suspects.insert(node);
            if self.isolated(now).contains(&node) {
                self.leases.release_all(node);
            }
        }
    }

    fn withdraw(&mut self, node: NodeId, pieces: &[PieceRange]) {
        let Some(have) = self.members.get_mut(&node).and_then(|member| member.have.as_mut()) else { return };
        let total = have.pieces();
        let pieces = pieces.iter().flat_map(|run| run.iter().take_while(|piece| piece.0 < total));
        for piece in pieces.take(total as usize) {
            if have.remove(piece) {
                self.holders[piece.0 as usize] -= 1;
            }
        }
    }

    pub(super) fn learn_downloader(
        &mut self,
        geometry: Geometry,
        node: NodeId,
        (zone, draw): (Zone, u64),
        now: Instant,
    ) {
        if self.agree(Some(geometry)).is_ok() && self.members.len() < MEMBERS_MAX {
            self.last_used = now;
            self.members.entry(node).or_default();
            self.introductions.enter(node, zone, draw);
            self.advertisers.insert(node);
        }
    }

    /// Adds one who holds all of it. `advertised` tells that the whole cluster has heard so.
    pub(super) fn learn_holder(
        &mut self,
        geometry: Geometry,
        node: NodeId,
        (zone, draw): (Zone, u64),
        advertised: bool,
        now: Instant,
    ) {
        if self.agree(Some(geometry)).is_err() || self.members.len() >= MEMBERS_MAX {
            return;
        }
        self.last_used = now;
        self.members.entry(node).or_default();
        self.introductions.enter(node, zone, draw);
        if advertised {
            self.advertisers.insert(node);
        }
        let full = Bitmap::full(self.geometry.map_or(0, |geometry| geometry.pieces()));
        self.merge(node, Some(&full), now);
    }

    pub(super) fn remove(&mut self, node: NodeId) {
        self.bridge.forget(node);
        if !self.members.contains_key(&node) {
            return;
        }
        self.forget_pieces(node);
        self.leases.release_all(node);
        self.advertisers.remove(&node);
        self.members.remove(&node);
        self.introductions.leave(node);
        self.suspects.remove(&node);
        for suspect in self.suspects.clone() {
            if let Some(member) = self.members.get_mut(&suspect) {
                member.blamed_by.remove(&node);
            }
        }
        if self.members.is_empty() {
            // A length that nobody could fetch by was wrong, and shall not keep those out who know better.
            self.geometry = None;
            self.holders.clear();
            self.fetched_at.clear();
            self.bridge = Bridge::default();
            self.leases = Leases::default();
        }
    }

    /// Takes over the caller's cut if none is known. Piece sizes may differ, then the home's is binding.
    fn agree(&mut self, offered: Option<Geometry>) -> Result<(), TrackerError> {
        match (self.geometry, offered) {
            (Some(known), Some(offered)) if known.length() != offered.length() => Err(TrackerError::Refused {
                reason: format!("{} has {} bytes, not {}", self.task, known.length(), offered.length()),
            }),
            (None, Some(offered)) => {
                self.geometry = Some(offered);
                self.holders = vec![0; offered.pieces() as usize];
                self.fetched_at = vec![None; offered.pieces() as usize];
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn merge(&mut self, node: NodeId, have: Option<&Bitmap>, now: Instant) {
        // A bitmap of another cut says nothing about these pieces.
        let Some(have) = have.filter(|have| have.pieces() as usize == self.holders.len()) else { return };
        let mut news = have.clone();
        if let Some(known) = self.members.get(&node).and_then(|member| member.have.as_ref()) {
            news.remove_all(known);
        }
        for piece in news.iter() {
            self.hold(node, piece, now);
        }
    }

    fn hold(&mut self, node: NodeId, piece: PieceIndex, now: Instant) {
        let Some(member) = self.members.get_mut(&node) else { return };
        let have = member.have.get_or_insert_with(|| Bitmap::new(self.holders.len() as u32));
        if have.insert(piece) {
            let lent = self.leases.covers(piece, &BTreeSet::new());
            if lent || self.holders[piece.0 as usize] == 0 {
                self.fetched_at[piece.0 as usize] = lent.then_some(now);
            }
            self.holders[piece.0 as usize] += 1;
            self.leases.landed(piece);
        }
    }

    fn forget_pieces(&mut self, node: NodeId) {
        let Some(have) = self.members.get_mut(&node).and_then(|member| member.have.take()) else { return };
        for piece in have.iter() {
            self.holders[piece.0 as usize] -= 1;
        }
    }

    /// The members that `asker` is not sent to: himself, and who failed him or several. They are few, so whether a piece
    /// can be had is what is left of its holders without them, and nobody goes through a thousand members per piece.
    fn distrusted(&self, asker: NodeId, now: Instant) -> BTreeSet<NodeId> {
        let failed_him = |node: &&NodeId| {
            let blamed_by = self.members.get(*node).and_then(|member| member.blamed_by.get(&asker));
            blamed_by.is_some_and(|at| now.saturating_duration_since(*at) < BLAME_DECAY)
        };
        let failing = self.suspects.iter().filter(failed_him).copied();
        self.isolated(now).into_iter().chain(failing).chain([asker]).collect()
    }

    /// The members that nobody is sent to, since they failed several.
    pub(super) fn isolated(&self, now: Instant) -> BTreeSet<NodeId> {
        if self.suspects.is_empty() {
            return BTreeSet::new();
        }
        let fresh = |at: &&Instant| now.saturating_duration_since(**at) < BLAME_DECAY;
        // Where only one is left who could complain, his word is all there is.
        let askers = self.members.values().filter(|member| !member.is_complete()).take(BLAME_QUORUM).count();
        let failed_many = |node: &&NodeId| {
            let complaints =
                self.members.get(*node).map_or(0, |member| member.blamed_by.values().filter(fresh).count());
            complaints >= askers.max(1)
        };
        self.suspects.iter().filter(failed_many).copied().collect()
    }

    /// How many members hold `piece` and are not in `distrusted`.
    pub(super) fn reachable(&self, piece: PieceIndex, distrusted: &BTreeSet<NodeId>) -> usize {
        match self.holders[piece.0 as usize] as usize {
            0 => 0,
            holders => holders - distrusted.iter().filter(|node| self.holds(**node, piece)).count(),
        }
    }

    /// Members that hold what `from` lacks, one per run, drawn at random so that load spreads.
    fn sources(
        &self,
        from: NodeId,
        request: &PullPieceRequest,
        distrusted: &BTreeSet<NodeId>,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Vec<PieceSource> {
        // What is on its way to everybody is not fetched from where it began, unless a reader waits for it. Where all may know the
        // fetcher anyway there is nothing to spare.
        let many = self.members.len() > DEGREE_MAX;
        let spreading = |piece: PieceIndex| {
            let since = self.fetched_at(piece);
            many && self.leases.fetchers() > 0
                && since.is_some_and(|since| now.saturating_duration_since(since) < SPREADING)
        };
        let wanted = request.urgent.into_iter().map(|first| PieceRange { first, count: 1 });
        let lacking = request.lacking.iter().copied().take(PullPieceRequest::LACKING_MAX);
        let mut sources: Vec<PieceSource> = Vec::new();
        let pieces = self.holders.len() as u32;
        for piece in wanted.chain(lacking).flat_map(|run| run.iter().take_while(|piece| piece.0 < pieces)) {
            let reachable = self.reachable(piece, distrusted);
            if reachable == 0 || self.holds(from, piece) || request.urgent != Some(piece) && spreading(piece) {
                continue;
            }
            if let Some(last) = sources.last_mut()
                && last.pieces.end() == piece.0
                && self.holds(last.node, piece)
            {
                last.pieces.count += 1;
                continue;
            }
            if sources.len() >= SOURCES_MAX {
                break;
            }
            // From a random member on, so that load spreads and nobody goes through a thousand members for a piece that many hold.
            let holds = |member: &MemberState| member.have.as_ref().is_some_and(|have| have.contains(piece));
            let start = NodeId::from_bytes(rng.random());
            let members = self.members.range(start..).chain(self.members.range(..start));
            let mut holders = members.filter(|(node, member)| holds(member) && !distrusted.contains(*node));
            if let Some((node, _)) = holders.next() {
                sources.push(PieceSource { node: *node, pieces: PieceRange { first: piece, count: 1 } });
            }
        }
        sources
    }

    /// When `piece` last came from the registry, if it was lent.
    pub(super) fn fetched_at(&self, piece: PieceIndex) -> Option<Instant> {
        self.fetched_at.get(piece.0 as usize).copied().flatten()
    }

    pub(super) fn members_with(&self, piece: PieceIndex) -> impl Iterator<Item = NodeId> + '_ {
        self.members.keys().copied().filter(move |node| self.holds(*node, piece))
    }

    fn holds(&self, node: NodeId, piece: PieceIndex) -> bool {
        self.members.get(&node).and_then(|member| member.have.as_ref()).is_some_and(|have| have.contains(piece))
    }

    fn nominate(&mut self, node: NodeId) -> bool {
        if self.advertisers.len() < ADVERTISERS {
            self.advertisers.insert(node);
        }
        self.advertisers.contains(&node)
    }
}
