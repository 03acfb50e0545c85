//! Who has, or is getting, which task, from the events that everybody hears.
//!
//! Each author has two registers per task: what it holds (Start, Progress, Remove) and how the task is cut (Length).
//! The last writer by (epoch, sequence) wins in each, so any order and any repetition of the same events gives the same
//! state, as long as no bound is reached. A member that is down is hidden, not forgotten: one that was declared dead
//! by mistake still has what it had.
//!
//! Not here: signatures (checked before an event gets here), pieces (neighbours tell each other), what this node itself
//! holds (the store knows).

use std::collections::BTreeMap;

use darter_tracker::{Event, EventBody, Geometry, NodeId, TaskId};

use crate::recent::Recent;

/// Tasks remembered, under 1 KiB each with the few authors that a home nominates: the layers of some thousand images.
/// The one that was longest not heard of is forgotten; whoever wants it asks its home.
pub const TASKS_MAX: usize = 16_384;
/// Authors remembered per task: the home nominates about 3, and some change. The one longest not heard of is forgotten,
/// those that hold nothing before others.
pub const AUTHORS_PER_TASK_MAX: usize = 32;
/// Members that are down and whose words are kept, in case they come back. Beyond that the oldest are forgotten.
pub const DOWN_MAX: usize = 1024;

/// All of a task, in quarters.
pub const QUARTERS_ALL: u8 = 4;

/// (epoch, sequence) of the event that a register holds.
type Version = (u64, u64);

/// What one author said about one task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Record {
    /// Quarters held; `None` after Remove, which must be remembered so that a late Start does not undo it.
    holding: Option<(Version, Option<u8>)>,
    length: Option<(Version, Geometry)>,
}

impl Record {
    fn quarters(&self) -> Option<u8> {
        self.holding.and_then(|(_, quarters)| quarters)
    }
}

/// What is known of all tasks.
#[derive(Clone, Debug)]
pub struct Holdings {
    tasks: Recent<TaskId, Recent<NodeId, Record>>,
    down: Recent<NodeId, ()>,
}

impl Default for Holdings {
    fn default() -> Self {
        Self { tasks: Recent::new(TASKS_MAX), down: Recent::new(DOWN_MAX) }
    }
}

impl Holdings {
    /// Takes an event in; tells whether it changed anything.
    ///
    /// Recover changes nothing here: it is a question. Neither does a Progress that is not 1 to 4 quarters.
    pub fn apply(&mut self, event: &Event) -> bool {
        let version = (event.epoch, event.sequence);
        let (task, said) = match event.body {
            EventBody::Start { task } => (task, Said::Holding(Some(0))),
            EventBody::Progress { task, quarters } if (1..=QUARTERS_ALL).contains(&quarters) => {
                (task, Said::Holding(Some(quarters)))
            }
            EventBody::Remove { task } => (task, Said::Holding(None)),
            EventBody::Length { task, geometry } => (task, Said::Length(geometry)),
            EventBody::Progress { .. } | EventBody::Recover { .. } => return false,
        };
        let authors = self.authors(task);
        let mut record = authors.peek(&event.author).copied().unwrap_or_default();
        let newer = match said {
            Said::Holding(quarters) => replace(&mut record.holding, version, quarters),
            Said::Length(geometry) => replace(&mut record.length, version, geometry),
        };
        if newer {
            if authors.peek(&event.author).is_none() && authors.len() >= AUTHORS_PER_TASK_MAX {
                make_room(authors);
            }
            authors.insert(event.author, record);
        }
        newer
    }

    /// Who has or is getting `task`, in order of [`NodeId`], with how many quarters of it: 0 is a start, 4 is all.
    #[must_use]
    pub fn holders(&self, task: &TaskId) -> Vec<(NodeId, u8)> {
        let records = self.tasks.peek(task).into_iter().flat_map(Recent::iter);
        let live = records.filter(|(node, _)| self.down.peek(node).is_none());
        live.filter_map(|(node, record)| Some((*node, record.quarters()?))).collect()
    }

    /// How `task` is cut. Where authors differ, what most of them say, then the shorter, then the smaller pieces: every
    /// member decides alike, and a lone liar is outvoted.
    #[must_use]
    pub fn geometry(&self, task: &TaskId) -> Option<Geometry> {
        let mut votes: BTreeMap<(u64, u32), (usize, Geometry)> = BTreeMap::new();
        for (_, record) in self.tasks.peek(task)?.iter() {
            if let Some((_, geometry)) = record.length {
                let cut = (geometry.length(), geometry.piece_size().bytes());
                votes.entry(cut).or_insert((0, geometry)).0 += 1;
            }
        }
        let most = votes.values().map(|(count, _)| *count).max()?;
        votes.into_values().find(|(count, _)| *count == most).map(|(_, geometry)| geometry)
    }

    /// Every task that a live member has or is getting, ordered.
    pub fn tasks(&self) -> impl Iterator<Item = (TaskId, Vec<(NodeId, u8)>)> + '_ {
        let tasks = self.tasks.iter().map(|(task, _)| (*task, self.holders(task)));
        tasks.filter(|(_, holders)| !holders.is_empty())
    }

    /// Hides what a member holds until it is back.
    pub fn member_down(&mut self, node: NodeId) {
        if let Some((forgotten, ())) = self.down.insert(node, ()) {
            self.forget(forgotten);
        }
    }

    /// A member lives: what it said counts.
    pub fn member_up(&mut self, node: NodeId) {
        self.down.remove(&node);
    }

    fn forget(&mut self, node: NodeId) {
        let tasks: Vec<TaskId> = self.tasks.iter().map(|(task, _)| *task).collect();
        for task in tasks {
            // Forgetting is no sign that a task is in use, but neither does the order among them matter much: this
            // happens once in a thousand deaths.
            let emptied = self.tasks.get_mut(&task).is_some_and(|authors| {
                authors.remove(&node);
                authors.len() == 0
            });
            if emptied {
                self.tasks.remove(&task);
            }
        }
    }

    fn authors(&mut self, task: TaskId) -> &mut Recent<NodeId, Record> {
        self.tasks.get_or_insert_with(task, || Recent::new(AUTHORS_PER_TASK_MAX))
    }
}

enum Said {
    Holding(Option<u8>),
    Length(Geometry),
}

/// Writes a register unless what it holds is as new.
fn replace<T>(register: &mut Option<(Version, T)>, version: Version, value: T) -> bool {
    if register.as_ref().is_some_and(|(known, _)| *known >= version) {
        return false;
    }
    *register = Some((version, value));
    true
}

/// Forgets the author longest not heard of, those that hold nothing first.
fn make_room(authors: &mut Recent<NodeId, Record>) {
    let first = authors.oldest_first().next().map(|(node, _)| *node);
    let idle = authors.oldest_first().find(|(_, record)| record.quarters().is_none()).map(|(node, _)| *node);
    if let Some(node) = idle.or(first) {
        authors.remove(&node);
    }
}

#[cfg(test)]
mod tests;
