//! Whom to ask for a turn, and which piece to take when it comes: what a reader has waited for, so that clients stream; else the
//! rarest; of those what its holder names, else at random. What one neighbour is slow with is taken from a second.
//!
//! A turn is asked of everybody who offers something that is wanted; of two for each place that is given back, once a turn has come
//! for which there was none. The piece is chosen only when the turn has come, by what is wanted then: nothing waits for a busy
//! neighbour that another could give.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use darter_tracker::{Bitmap, ErrorKind, NodeId, PieceIndex};
use rand::RngExt as _;
use rand::seq::SliceRandom as _;

use super::{Action, Neighbour, Task, Waiting};

/// What a reader has waited for so long is taken before anything else. Whoever took what is next for his reader at once would ask
/// the one fetcher who has it for the same piece as everybody else, and leave the rest of what only that one has (simulated: 16
/// nodes took 1.57 instead of 1.08 times the bound with the next eight pieces first).
pub(super) const READER_PATIENCE: Duration = Duration::from_millis(100);

/// The same while only one neighbour has it and [`OTHERS`] want it as well, whose readers wait for it too: they all would take it from
/// him, one after the other, and what else only he has would wait, for seconds if his way out is slow. Simulated with two slow ones
/// among 16: 8 layers took 1.15 to 1.37 times the bound, and 1.14 to 1.20 times with this.
const SOLE_PATIENCE: Duration = Duration::from_secs(1);

/// The same for what others have as well, while this holder names something that only he has: else he would give the same few pieces
/// to everybody, one reader after the other, and what he alone has to nobody. In the lab a fetcher among 50 on links of 20 Mb/s gave
/// one piece 14 times, and another for the first time after six seconds. Longer than readers wait where links are slow (3.5 s, simulated),
/// shorter than it takes until a fetcher is said to keep a piece to himself. Simulated with 50 nodes at 5 Mb/s: no
/// second copy of anything instead of up to 1.8 %; with two slow ones among 16: 1.129 times the bound at most instead of 1.196.
const NAMED_PATIENCE: Duration = Duration::from_secs(4);

/// So many neighbours that lack a piece are others who want it.
const OTHERS: usize = 2;

/// Pieces on their way from peers at a time for a blob that is fetched ahead of its reading: one that comes, one that is waited
/// for.
const BACKGROUND: usize = 2;

/// Turns that are asked for when there is room for one more piece: one is likely to come soon, and who is not asked has others in
/// line. Simulated with 50 and 100 nodes, one cost 18 and 12 % of the time and three saved none; asking everybody who had been
/// turned away took 30 % more messages with 16 nodes and 8 layers.
const ASKS_PER_PLACE: usize = 2;

/// A pull that waits for room takes it that there is some after this time: whoever has been told of it may have had no use for it.
pub(super) const STARVED_MAX: Duration = Duration::from_secs(1);

/// Pieces that one neighbour is slow with.
#[derive(Debug, Default)]
struct Late {
    /// Those that a reader waits for.
    awaited: Vec<PieceIndex>,
    others: Vec<PieceIndex>,
}

impl Task {
    /// A peer offers the turn that it was asked for; it is taken only if this node has `room` for a piece, which
    /// [`crate::intake`] decides. Without room no turn is asked for until
    /// [`Self::handle_room`] tells of some. Of what is equally rare it takes what the peer would `rather` give.
    pub fn handle_turn(&mut self, peer: NodeId, rather: Option<PieceIndex>, room: bool, now: Instant) {
        let waited = self.neighbours.get_mut(&peer).is_some_and(|neighbour| {
            let _ = neighbour.heard(now);
            neighbour.leave_line()
        });
        if waited && !self.is_complete() {
            self.use_turn(peer, rather, room, now);
            self.drive_request(peer, now);
        } else {
            self.actions.push_back(Action::Decline { peer });
        }
    }

    /// Whether [`Self::handle_room`] is waited for.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        self.starved.is_some()
    }

    /// This node has room for one more piece; tells whether anybody is asked for one. Of the pulls that wait for room one is told
    /// at a time, and the next if it has no use for it.
    pub fn handle_room(&mut self, now: Instant) -> bool {
        self.is_starved() && self.ask_for_room(ASKS_PER_PLACE, now)
    }

    /// A peer offers no turn. `kind` is `None` if it merely has too many others.
    pub fn handle_turn_failed(&mut self, peer: NodeId, kind: Option<ErrorKind>, now: Instant) {
        let Some(neighbour) = self.neighbours.get_mut(&peer) else { return };
        if !neighbour.fail_turn(kind, now, &mut self.rng) {
            return;
        }
        self.unanswered += 1;
        if let Some(kind) = kind {
            if kind != ErrorKind::Unreachable {
                self.forget_offers(peer);
            }
            self.blame(peer, Vec::new(), kind);
        }
        self.advance(now);
    }

    /// Gives up what is past its deadline. A node that is late itself gives it up without blaming anybody.
    pub(super) fn expire_requests(&mut self, now: Instant) {
        let mut overdue: Vec<(NodeId, Option<PieceIndex>, bool)> = Vec::new();
        for (peer, neighbour) in self.neighbours.iter().filter(|(_, neighbour)| !neighbour.owes_nothing()) {
            overdue.extend(neighbour.overdue(now).into_iter().map(|(piece, silent)| (*peer, Some(piece), silent)));
            if neighbour.line_is_dead(now) {
                overdue.push((*peer, None, true));
            }
        }
        for (peer, piece, silent) in overdue {
            let kind = self.may_judge(now).then_some(ErrorKind::Unreachable);
            let Some(neighbour) = self.neighbours.get_mut(&peer) else { continue };
            let last = neighbour.silent_since().filter(|_| silent);
            match piece {
                Some(piece) => {
                    neighbour.fail(piece, kind, now, &mut self.rng);
                    self.actions.push_back(Action::Cancel { peer, piece });
                    self.want_again(piece);
                }
                None => {
                    neighbour.fail_turn(kind, now, &mut self.rng);
                    self.unanswered += 1;
                    self.actions.push_back(Action::Decline { peer });
                }
            }
            if let Some(last) = last {
                self.doubt(peer, last, now);
            }
            // A peer that is merely slow is of use to others.
            if let Some(kind) = kind.filter(|_| silent) {
                let pieces = piece.map(|first| darter_tracker::PieceRange { first, count: 1 });
                self.blame(peer, pieces.into_iter().collect(), kind);
            }
        }
    }

    /// Asks everybody for a turn who offers something that is wanted, unless what comes would find no room.
    pub(super) fn drive_requests(&mut self, now: Instant) {
        let unanswered = std::mem::take(&mut self.unanswered);
        if self.is_complete() {
            return;
        }
        match self.starved {
            None => {
                let (wanted, late) = (self.wanted(), self.late(now));
                self.askable(&wanted, &late, now).into_iter().for_each(|peer| self.ask(peer, now));
            }
            Some(since) if now >= since + STARVED_MAX => {
                self.ask_for_room(ASKS_PER_PLACE, now);
            }
            Some(_) if unanswered > 0 => {
                self.in_order_of_need(now).into_iter().take(unanswered).for_each(|peer| self.ask(peer, now));
            }
            Some(_) => {}
        }
    }

    /// Asks so many for what there is room for; tells whether anybody was asked.
    fn ask_for_room(&mut self, most: usize, now: Instant) -> bool {
        let mut askable = self.in_order_of_need(now);
        self.starved = None;
        if askable.len() > most {
            askable.truncate(most);
            self.starve(now);
        }
        askable.iter().for_each(|peer| self.ask(*peer, now));
        !askable.is_empty()
    }

    /// Those who may be asked for a turn: who can give what a reader waits for, then the others, at random.
    fn in_order_of_need(&mut self, now: Instant) -> Vec<NodeId> {
        let (wanted, late) = (self.wanted(), self.late(now));
        let due = |waiting: &&Waiting| now.saturating_duration_since(waiting.since) >= READER_PATIENCE;
        let awaited = self.readers.values().filter(due).map(|waiting| waiting.piece);
        let awaited: Vec<PieceIndex> =
            awaited.filter(|piece| wanted.contains(*piece) || late.awaited.contains(piece)).collect();
        let gives = |peer: &NodeId| self.neighbours.get(peer).is_some_and(|peer| peer.gives_any(&awaited));
        let (mut order, mut others): (Vec<_>, Vec<_>) = self.askable(&wanted, &late, now).into_iter().partition(gives);
        order.shuffle(&mut self.rng);
        others.shuffle(&mut self.rng);
        order.append(&mut others);
        order
    }

    /// Asks nobody until there is room.
    fn starve(&mut self, now: Instant) {
        self.starved.get_or_insert(now);
        self.sooner(now + STARVED_MAX);
    }

    /// Those who offer something that is wanted and are not asked for a turn yet.
    fn askable(&self, wanted: &Bitmap, late: &Late, now: Instant) -> Vec<NodeId> {
        if self.background && self.in_flight() >= BACKGROUND {
            return Vec::new();
        }
        let useful = |it: &Neighbour| {
            it.ready(now) && (it.offers_any(wanted) || it.gives_any(&late.awaited) || it.gives_any(&late.others))
        };
        self.neighbours.iter().filter(|(_, neighbour)| useful(neighbour)).map(|(peer, _)| *peer).collect()
    }

    /// Asks one neighbour for a turn, if it offers something that is wanted.
    pub(super) fn drive_request(&mut self, peer: NodeId, now: Instant) {
        if self.background && self.in_flight() >= BACKGROUND {
            return;
        }
        let useful = |neighbour: &Neighbour| neighbour.ready(now) && neighbour.offers_any(&self.wanted());
        if !self.is_complete() && !self.is_starved() && self.neighbours.get(&peer).is_some_and(useful) {
            self.ask(peer, now);
        }
    }

    /// Asks a neighbour for a turn.
    pub(super) fn ask(&mut self, peer: NodeId, now: Instant) {
        let Some(neighbour) = self.neighbours.get_mut(&peer) else { return };
        let judged = neighbour.line_up(now);
        self.sooner(judged);
        self.actions.push_back(Action::Ask { peer });
    }

    /// Takes a turn that has come for the piece that is best to have now, or leaves it to others.
    pub(super) fn use_turn(&mut self, peer: NodeId, rather: Option<PieceIndex>, room: bool, now: Instant) {
        if !room {
            self.starve(now);
        }
        let enough = self.background && self.in_flight() >= BACKGROUND;
        let piece = if room && !enough { self.choose(peer, rather, now) } else { None };
        let Some((piece, neighbour)) = piece.zip(self.neighbours.get_mut(&peer)) else {
            self.actions.push_back(Action::Decline { peer });
            return;
        };
        let looked_at = neighbour.ask(piece, self.geometry.piece_length(piece), now);
        self.unasked.remove(piece);
        self.sooner(looked_at);
        self.actions.push_back(Action::Take { peer, piece });
    }

    /// Pieces that neighbours were asked for.
    fn in_flight(&self) -> usize {
        self.neighbours.values().map(|neighbour| neighbour.requested().count()).sum()
    }

    /// The piece to take from `peer`, if it has one that is wanted.
    fn choose(&mut self, peer: NodeId, rather: Option<PieceIndex>, now: Instant) -> Option<PieceIndex> {
        let wanted = self.wanted().into_owned();
        let late = self.late(now);
        self.late_elsewhere(peer, &late.awaited)
            .or_else(|| self.awaited(peer, rather, &wanted, now))
            .or_else(|| self.rarest(peer, rather, &wanted))
            .or_else(|| self.late_elsewhere(peer, &late.others))
    }

    /// What is neither held nor on its way.
    pub(super) fn wanted(&self) -> Cow<'_, Bitmap> {
        if self.origin.idle() {
            return Cow::Borrowed(&self.unasked);
        }
        let mut wanted = self.unasked.clone();
        for piece in self.origin.covered() {
            wanted.remove(piece);
        }
        Cow::Owned(wanted)
    }

    /// A piece that was asked of a peer, and that it does not give, is wanted again unless another was asked as well.
    pub(super) fn want_again(&mut self, piece: PieceIndex) {
        if !self.have.contains(piece) && !self.neighbours.values().any(|neighbour| neighbour.asked(piece)) {
            self.unasked.insert(piece);
        }
    }

    /// Whether a piece is on its way, from the registry or from a peer.
    pub(super) fn coming(&self, piece: PieceIndex) -> bool {
        self.origin.covers(piece) || self.neighbours.values().any(|neighbour| neighbour.asked(piece))
    }

    /// What a reader has waited for long enough.
    fn awaited(&self, peer: NodeId, rather: Option<PieceIndex>, wanted: &Bitmap, now: Instant) -> Option<PieceIndex> {
        let neighbour = self.neighbours.get(&peer)?;
        let named = rather.is_some_and(|piece| wanted.contains(piece) && neighbour.has(piece));
        let due = |waiting: &&Waiting| {
            let waited = now.saturating_duration_since(waiting.since);
            let patience = if self.contended(waiting.piece) {
                SOLE_PATIENCE
            } else if named && self.availability[waiting.piece.0 as usize] >= 2 {
                NAMED_PATIENCE
            } else {
                READER_PATIENCE
            };
            waited >= patience
        };
        let waiting = self.readers.values().filter(due);
        waiting.map(|waiting| waiting.piece).filter(|piece| wanted.contains(*piece) && neighbour.has(*piece)).min()
    }

    /// Whether others want a piece from the only one who has it. The first of a blob is not counted among such: when it comes its
    /// holder has nothing else yet.
    fn contended(&self, piece: PieceIndex) -> bool {
        let lacking = || self.neighbours.values().filter(|neighbour| neighbour.lacks(piece));
        piece.0 > 0 && self.availability[piece.0 as usize] < 2 && lacking().nth(OTHERS - 1).is_some()
    }

    fn rarest(&mut self, peer: NodeId, rather: Option<PieceIndex>, wanted: &Bitmap) -> Option<PieceIndex> {
        let neighbour = self.neighbours.get(&peer)?;
        let mut best: Option<(u32, Option<u32>, PieceIndex)> = None;
        for piece in neighbour.offers(wanted) {
            let holders = self.availability[piece.0 as usize];
            if best.is_some_and(|(fewest, ..)| holders > fewest) {
                continue;
            }
            // `None` comes first.
            let tie = (rather != Some(piece)).then(|| self.rng.random());
            if best.is_none_or(|(fewest, lowest, _)| (holders, tie) < (fewest, lowest)) {
                best = Some((holders, tie, piece));
            }
        }
        best.map(|(.., piece)| piece)
    }

    /// What one neighbour was asked for and is slow with.
    fn late(&self, now: Instant) -> Late {
        let mut asked: BTreeMap<PieceIndex, (usize, bool)> = BTreeMap::new();
        for neighbour in self.neighbours.values() {
            for piece in neighbour.requested() {
                let (count, slow) = asked.entry(piece).or_default();
                *count += 1;
                *slow |= neighbour.slow(piece, now);
            }
        }
        let late =
            asked.into_iter().filter(|(piece, (count, slow))| *count == 1 && *slow && !self.have.contains(*piece));
        let awaited = |piece: &PieceIndex| self.readers.values().any(|waiting| waiting.piece == *piece);
        let (awaited, others) = late.map(|(piece, _)| piece).partition(awaited);
        Late { awaited, others }
    }

    /// Endgame and hedging: a piece that another neighbour is slow with.
    fn late_elsewhere(&self, peer: NodeId, late: &[PieceIndex]) -> Option<PieceIndex> {
        let neighbour = self.neighbours.get(&peer)?;
        late.iter().copied().find(|piece| neighbour.has(*piece) && !neighbour.asked(*piece))
    }
}
