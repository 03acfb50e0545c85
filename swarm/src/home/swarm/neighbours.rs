//! Whom a member of a task is introduced to, and when it is told whom it knows.

use std::time::{Duration, Instant};

use darter_tracker::NodeId;
use rand::Rng;

use super::Swarm;
use crate::home::introductions::{DEGREE, DEGREE_MAX, DEGREE_NEW};

/// How long a member is new: those who begin with it have come by then, and know it.
const NEW: Duration = Duration::from_millis(250);

/// All neighbours of a member are named to it again after this; in between those alone whom it does not know. Names are most of
/// what a home of thousands says.
const NAMED_AGAIN: Duration = Duration::from_secs(5);

impl Swarm {
    /// Introduces `from` to others, and names them, and now and then all whom it knows, since it may have lost one. Whoever failed
    /// it or several is left out: a neighbour is asked for pieces like a source.
    pub(super) fn introduce(&mut self, from: NodeId, now: Instant, rng: &mut impl Rng) -> Vec<NodeId> {
        let distrusted = self.distrusted(from, now);
        let came = self.members.get(&from).and_then(|member| member.came);
        let new = came.is_some_and(|at| now.saturating_duration_since(at) < NEW) && self.members.len() > DEGREE_MAX;
        let degree = if new { DEGREE_NEW } else { DEGREE };
        let mut neighbours = self.introductions.introduce(from, degree, &distrusted, rng);
        if let Some(member) = self.members.get_mut(&from)
            && member.named.is_none_or(|at| now.saturating_duration_since(at) >= NAMED_AGAIN)
        {
            member.named = Some(now);
            neighbours = self.introductions.known(from, &distrusted);
        }
        let registered = |node: &NodeId| self.members.get(node).is_some_and(|member| member.registered);
        neighbours.extend(self.bridge.strangers(from, |node| !registered(node) && !distrusted.contains(node)));
        neighbours
    }
}
