//! What goes wrong: nodes die or stand still, and gossip tells of the dead.

use rand::RngExt as _;

use super::agenda::{MILLISECOND, Nanos, SECOND};
use super::event::{Event, NodeNumber};
use super::world::{Upload, World};

/// When everybody has heard what one node has told all.
pub(super) const GOSSIP: Nanos = 500 * MILLISECOND;

/// When gossip has found out that a member is dead, at the earliest and the latest.
const DETECTED: std::ops::Range<Nanos> = 6 * SECOND..8 * SECOND;

/// A connection on which nothing comes ends after this.
const IDLE: Nanos = 5 * SECOND;

/// An upload to a node from which nothing comes is given up after this: the agent's time.
const SILENT_RECEIVER: Nanos = 500 * MILLISECOND;

/// How long a frozen node stands still.
const FROZEN_FOR: Nanos = 20 * SECOND;

impl World {
    /// Once the first node has half of the image, what was planned for the middle happens.
    pub(super) fn middle(&mut self, node: NodeNumber) {
        if self.disturbed || self.plan.killed.is_empty() && self.plan.frozen.is_empty() {
            return;
        }
        let pulls = &self.nodes[node as usize].pulls;
        let held: u64 = pulls.iter().map(|pull| u64::from(pull.task.have().count())).sum();
        let all: u64 = self.layers.iter().map(|layer| u64::from(layer.geometry.pieces())).sum();
        if held * 2 < all {
            return;
        }
        self.disturbed = true;
        for node in self.plan.killed.clone() {
            self.after(0, Event::Kill(node));
        }
        for node in self.plan.frozen.clone() {
            self.after(0, Event::Freeze(node, true));
            self.after(FROZEN_FOR, Event::Freeze(node, false));
        }
    }

    pub(super) fn kill(&mut self, node: NodeNumber) {
        let this = &mut self.nodes[node as usize];
        (this.alive, this.still_since) = (false, Some(self.now));
        if this.done.is_none() {
            self.left -= 1;
        }
        for run in self.links.of(node) {
            let Some(flow) = self.links.close(run) else { continue };
            if flow.from == self.registry {
                self.registry_open -= 1;
            }
        }
        for other in 0..self.nodes.len() as NodeNumber {
            if self.nodes[other as usize].alive {
                let noticed = self.rng.random_range(DETECTED);
                self.after(noticed, Event::Gone(other, node));
                self.after(IDLE, Event::Parted(other, node));
            }
        }
    }

    pub(super) fn freeze(&mut self, node: NodeNumber, frozen: bool) {
        self.links.stop(node, frozen);
        let this = &mut self.nodes[node as usize];
        this.still_since = frozen.then_some(self.now);
        if frozen {
            this.frozen = Some(Vec::new());
            for other in 0..self.nodes.len() as NodeNumber {
                self.after(IDLE, Event::Parted(other, node));
            }
        } else {
            for event in this.frozen.take().into_iter().flatten() {
                self.after(0, event);
            }
            self.begin(node);
        }
    }

    /// Uploads to those from whom nothing has come for a while are given up.
    pub(super) fn forsake_the_silent(&mut self, node: NodeNumber) {
        let silent = |upload: &Upload| {
            self.nodes[upload.to as usize].still_since.is_some_and(|since| self.now >= since + SILENT_RECEIVER)
        };
        let uploads = self.nodes[node as usize].uploading.iter();
        let forsaken: Vec<_> = uploads.filter(|(_, upload)| silent(upload)).map(|(ticket, _)| *ticket).collect();
        for ticket in forsaken {
            self.upload_ends(node, ticket);
        }
    }

    /// Gossip has told a node that another is down.
    pub(super) fn gone(&mut self, node: NodeNumber, other: NodeNumber) {
        let (name, now) = (self.nodes[other as usize].id, self.instant());
        let this = &mut self.nodes[node as usize];
        this.gone.insert(other);
        this.home.member_down(name);
        for layer in 0..self.nodes[node as usize].pulls.len() as u16 {
            let homes = self.homes(node, layer);
            let present = self.pull(node, layer).task.registered_home();
            let is_member = present.is_some_and(|home| self.knows(node, home));
            self.with(node, layer, |task| task.handle_members(homes, is_member, now));
        }
    }
}
