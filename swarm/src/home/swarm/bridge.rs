//! Other homes of the same task.
//!
//! Members need not agree about who is alive: one has joined a moment ago, or the halves of a cluster have just found each
//! other. Each of their homes would have the whole blob fetched. So a home that members come to tells the next in rank that it
//! is one, since whoever does not know this one has his home among those; two that know of each other then tell each other what
//! their members hold and fetch, and name some of them. Neither lends what the other has lent, and pieces cross by members that
//! were introduced across.
//!
//! Another home's word puts off a lease, and no more: it counts for a piece for [`CLAIM`], once, and the members it names are
//! neighbours beside those of this home's own.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use darter_tracker::{Bitmap, NodeId, PieceIndex, PieceRange};

use super::Swarm;
use crate::home::introductions::DEGREE;
use crate::rendezvous;
use crate::wire::HomeNews;

/// The next in rank that are told: who lacks every second member knows one of twelve in 4095 of 4096 cases.
pub const TOLD: usize = 12;

/// Homes of one task that a home listens to, beside itself; others are not heard while those say something.
const RIVALS_MAX: usize = 4;

/// How often two homes tell each other what is new. What both lend meanwhile is fetched twice, until one of them hears of it.
pub const NEWS: Duration = Duration::from_millis(25);

/// Those in rank that have nothing to tell are told half as often each time, and at last so rarely.
const HELLO_MAX: Duration = Duration::from_secs(1);

/// What a home has said counts no longer when nothing has come from it for so long.
const RIVAL_SILENT: Duration = Duration::from_secs(2);

/// How long a piece is left to another home: as long as a reader waits for peers that have something and do not give it. By then
/// it has come, or does not come.
const CLAIM: Duration = Duration::from_secs(10);

/// Members that one home names to another in one message.
const NAMES_MAX: usize = 64;

/// Members of another home that are remembered.
const STRANGERS_KEPT: usize = 1024;

/// Members of another home that a member is introduced to, and of all others together: a quarter and half of what it has for
/// neighbours otherwise. They come beside those, so that whoever makes up names is in nobody's place.
const STRANGERS_EACH: usize = DEGREE / 4;
const STRANGERS_MAX: usize = DEGREE / 2;

/// A task that nobody has mentioned for so long is nobody's business either.
const QUIET: Duration = Duration::from_secs(3);

/// What is known of other homes.
#[derive(Debug, Default)]
pub(super) struct Bridge {
    /// Those in rank that are told that this is a home, and how it stands with them.
    ranked: BTreeMap<NodeId, Told>,
    ranked_at: Option<Instant>,
    rivals: BTreeMap<NodeId, Rival>,
    /// Since when a piece is left to others, if it ever was.
    claimed: Vec<Option<Instant>>,
    /// Where this home begins if it is not the only one, drawn by its name.
    own_first: u32,
    /// The member with which the next names begin.
    named: Option<NodeId>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Told {
    at: Option<Instant>,
    /// How often since it last had something to tell itself.
    vain: u32,
}

/// Another home.
#[derive(Debug)]
struct Rival {
    heard: Instant,
    /// Whether it told that itself. Only that is passed on, so that nobody hears what he has said.
    itself: bool,
    /// Whether it comes before this one in rank.
    before: bool,
    /// What its members hold or fetch.
    claims: Bitmap,
    members: BTreeSet<NodeId>,
}

impl Rival {
    fn speaks(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.heard) < RIVAL_SILENT
    }
}

impl Bridge {
    /// Whether another home sees to it that `piece` comes.
    pub(super) fn claims(&self, piece: PieceIndex, now: Instant) -> bool {
        let since = self.claimed.get(piece.0 as usize).copied().flatten();
        since.is_some_and(|since| now.saturating_duration_since(since) < CLAIM)
            && self.rivals.values().any(|rival| rival.speaks(now) && rival.claims.contains(piece))
    }

    /// The piece with which this home begins to lend: not the first, if one that comes before it in rank lends as well.
    pub(super) fn first(&self, now: Instant) -> u32 {
        let second = self.rivals.values().any(|rival| rival.before && rival.speaks(now));
        if second { self.own_first } else { 0 }
    }

    /// Members of other homes for `node` to meet, the same ones each time.
    pub(super) fn strangers(&self, node: NodeId, fit: impl Fn(&NodeId) -> bool) -> Vec<NodeId> {
        let mut strangers = Vec::new();
        for rival in self.rivals.values() {
            let ring = rival.members.range(node..).chain(rival.members.range(..node));
            strangers.extend(ring.filter(|other| fit(other)).take(STRANGERS_EACH).copied());
        }
        strangers.truncate(STRANGERS_MAX);
        strangers
    }

    /// Forgets a member.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.ranked.remove(&node);
        self.rivals.remove(&node);
        for rival in self.rivals.values_mut() {
            rival.members.remove(&node);
        }
    }

    /// Whether there is room to listen to `home`.
    fn listens_to(&mut self, home: NodeId, now: Instant) -> bool {
        if self.rivals.len() >= RIVALS_MAX && !self.rivals.contains_key(&home) {
            self.rivals.retain(|_, rival| rival.speaks(now));
        }
        self.rivals.len() < RIVALS_MAX || self.rivals.contains_key(&home)
    }

    /// Those who are due to be told. What one has told by itself was answered.
    fn due(&mut self, now: Instant) -> Vec<NodeId> {
        let rivals = &self.rivals;
        let due = |(node, told): &(&NodeId, &mut Told)| {
            let last = told.at.max(rivals.get(node).map(|rival| rival.heard));
            let pause = (NEWS * 2u32.saturating_pow(told.vain.min(8))).min(HELLO_MAX);
            last.is_none_or(|last| now.saturating_duration_since(last) >= pause)
        };
        let tell = |(node, told): (&NodeId, &mut Told)| {
            *told = Told { at: Some(now), vain: told.vain + 1 };
            *node
        };
        self.ranked.iter_mut().filter(due).map(tell).collect()
    }
}

impl Swarm {
    /// Whether somebody is getting the task by this home.
    fn acts(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_used) < QUIET
            && self.members.values().any(|member| member.registered && !member.is_complete())
    }

    /// What is to be told to whom. `rank` gives the members in rank, without this one.
    pub(in crate::home) fn news(
        &mut self,
        now: Instant,
        rank: impl FnOnce() -> Vec<NodeId>,
    ) -> Vec<(NodeId, HomeNews)> {
        if !self.acts(now) {
            return Vec::new();
        }
        if self.bridge.ranked_at.is_none_or(|at| now.saturating_duration_since(at) >= HELLO_MAX) {
            self.bridge.ranked_at = Some(now);
            let before = std::mem::take(&mut self.bridge.ranked);
            let told = |node: NodeId| (node, before.get(&node).copied().unwrap_or_default());
            self.bridge.ranked = rank().into_iter().take(TOLD).map(told).collect();
        }
        let due = self.bridge.due(now);
        due.into_iter().filter_map(|node| Some((node, self.tell(node, now)?))).collect()
    }

    /// What this home has to tell to another one.
    fn tell(&mut self, to: NodeId, now: Instant) -> Option<HomeNews> {
        let geometry = self.geometry?;
        let mut held = Bitmap::new(geometry.pieces());
        for (piece, _) in (0..).zip(&self.holders).filter(|(_, holders)| **holders > 0) {
            held.insert(PieceIndex(piece));
        }
        let mut open = Bitmap::new(geometry.pieces());
        self.leases.open().for_each(|run| open.add_all(run));
        let first = self.bridge.named.unwrap_or(NodeId::from_bytes([0; NodeId::BYTES]));
        let ring = self.members.range(first..).chain(self.members.range(..first));
        let names = ring.filter(|(_, member)| member.registered).map(|(node, _)| *node);
        let mut members: Vec<NodeId> = names.take(NAMES_MAX + 1).collect();
        self.bridge.named = if members.len() > NAMES_MAX { members.pop() } else { None };
        let told = |(home, rival): &(&NodeId, &Rival)| **home != to && rival.itself && rival.speaks(now);
        let others =
            self.bridge.rivals.iter().filter(told).map(|(home, rival)| (*home, rival.claims.clone())).collect();
        Some(HomeNews { task: self.task, geometry, held, lent: PieceRange::gather(open.iter()), members, others })
    }

    /// Another home has told what it knows, by itself or since it was told; says whether there is a home here that it concerns.
    pub(in crate::home) fn hear(&mut self, from: NodeId, me: NodeId, news: HomeNews, now: Instant) -> bool {
        let total = self.holders.len();
        let fits = self.geometry == Some(news.geometry) && news.held.pieces() as usize == total;
        if !fits || !self.acts(now) || !self.bridge.listens_to(from, now) {
            return false;
        }
        let (mut claims, held) = (news.held.clone(), news.held);
        let lent = news.lent.iter().flat_map(|run| run.iter().take_while(|piece| (piece.0 as usize) < total));
        for piece in lent.take(total) {
            claims.insert(piece);
        }
        self.leave_to(from, claims, &held, me, true, now);
        let bridge = &mut self.bridge;
        if let Some(told) = bridge.ranked.get_mut(&from) {
            told.vain = 0;
        }
        if let Some(rival) = bridge.rivals.get_mut(&from) {
            let room = STRANGERS_KEPT.saturating_sub(rival.members.len());
            rival.members.extend(news.members.into_iter().take(NAMES_MAX.min(room)));
        }
        for (other, claims) in news.others.into_iter().take(RIVALS_MAX) {
            let heard = self.bridge.rivals.get(&other).is_some_and(|rival| rival.itself && rival.speaks(now));
            if other != me && !heard && claims.pieces() as usize == total && self.bridge.listens_to(other, now) {
                let none = Bitmap::new(claims.pieces());
                self.leave_to(other, claims, &none, me, false, now);
            }
        }
        true
    }

    /// Leaves to another home what its members hold or fetch. What they are known to hold is among the `claims`.
    fn leave_to(&mut self, home: NodeId, claims: Bitmap, held: &Bitmap, me: NodeId, itself: bool, now: Instant) {
        let before = rendezvous::before(&self.task, home, me);
        let bridge = &mut self.bridge;
        bridge.claimed.resize(self.holders.len(), None);
        bridge.own_first = rendezvous::place(&self.task, me, claims.pieces());
        let mut new = Bitmap::new(claims.pieces());
        for piece in claims.iter() {
            let since = &mut bridge.claimed[piece.0 as usize];
            if since.replace(since.unwrap_or(now)).is_none() {
                new.insert(piece);
            }
        }
        if before {
            // If it is lent here as well, that was before either knew.
            self.leases.leave(&new, held);
        }
        let members = bridge.rivals.remove(&home).map(|rival| rival.members).unwrap_or_default();
        bridge.rivals.insert(home, Rival { heard: now, itself, before, claims, members });
    }

    /// What another home that has told what it knows is answered.
    pub(in crate::home) fn compare(
        &mut self,
        from: NodeId,
        me: NodeId,
        news: HomeNews,
        now: Instant,
    ) -> Option<HomeNews> {
        if self.hear(from, me, news, now) { self.tell(from, now) } else { None }
    }
}

#[cfg(test)]
#[path = "bridge/tests.rs"]
mod tests;
