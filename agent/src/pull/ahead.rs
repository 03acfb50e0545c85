//! Which layers are started before their client asks for them, and when they are given up. Decides, and does nothing.
//!
//! A client asks for a few layers at a time and in the manifest's order, leaving out those it holds: Docker from the first
//! layer that it lacks to the last, since a layer counts only on top of those below it; containerd the same, less what is in its
//! content store; CRI-O and skopeo whatever they lack. `ARCHITECTURE.md` has the sources. So
//!
//! - what lies before a layer that was asked for is never started: it is held, or will be asked for anyway;
//! - a client that has asked for [`EVIDENCE`] layers in a row lacks a stretch of the image: the [`WINDOW`] layers after the
//!   last that it asked for are started. One that lacks a single layer starts nothing;
//! - they wait until each layer that the client reads has its first piece: what is not asked for yet shall not share the
//!   registry's link with what a client waits for;
//! - they are given up when the client passes them over, or has a request to spare for [`FREE_SLOT`] and does not use it.
//!
//! HEADs, manifests, configs and parts of blobs (lazy snapshotters read those) are no requests for a layer.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use darter_tracker::TaskId;

use super::Client;

/// Layers in a row that a client has asked for before others are started for it: what docker and containerd ask for at once.
/// One that lacks one or two layers of an image costs nothing.
pub(super) const EVIDENCE: usize = 3;

/// Layers after the last that was asked for that are started: as many as the client will ask for next. It is also how many
/// can be in vain.
pub(super) const WINDOW: usize = 3;

/// Layers that are being fetched ahead at a time over all clients; more wait. Together they have fewer requests at a registry
/// than the half of what it serves one agent at a time.
pub(super) const RUNNING_MAX: usize = 6;

/// Requests that a client makes at once arrive in any order: a layer counts as passed over when a later one was asked for this
/// long ago.
pub(super) const OUT_OF_ORDER: Duration = Duration::from_millis(500);

/// A client that has fewer requests open than it had, for this long, wants nothing more. It may also be writing a large layer
/// to its disk; then what was given up goes on when it asks.
pub(super) const FREE_SLOT: Duration = Duration::from_secs(2);

/// What was given up counts as bytes that nobody read if the client has not come for it by then.
pub(super) const COUNTED_AFTER: Duration = Duration::from_secs(10);

/// Manifests that are remembered, over all clients; at the bound the one longest unused is forgotten. One of a hundred layers
/// is some 10 KiB.
const IMAGES_MAX: usize = 256;

/// How long a manifest is remembered when nothing of it is asked for: as long as it authorizes.
const IMAGE_IDLE: Duration = Duration::from_secs(60);

/// Names one layer that was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct AheadId(u64);

/// Names one request of a client for a layer, until it is [done](Ahead::done).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    image: u64,
    layer: usize,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Move<T> {
    /// Start a layer. Answer with [`Ahead::ended`] when it has ended by itself, or with [`Ahead::stopped`] after a `Stop`.
    Start {
        id: AheadId,
        task: TaskId,
        length: u64,
        /// How the client asked for its last layer.
        how: T,
    },
    /// It is asked for, or given up: its client no longer has it fetched ahead.
    Stop { id: AheadId },
}

/// What clients were given the manifests of, and what was started for them.
#[derive(Debug)]
pub(super) struct Ahead<T> {
    /// The one used longest ago first.
    images: VecDeque<Image<T>>,
    /// What was started for images that are forgotten.
    orphans: Vec<AheadId>,
    unread: u64,
    next: u64,
}

/// A manifest that one client was given.
#[derive(Debug)]
struct Image<T> {
    id: u64,
    client: Client,
    layers: Vec<Layer>,
    how: Option<T>,
    used: Instant,
    /// The most requests that the client had open at a time, and since when it has fewer.
    peak: usize,
    free_since: Option<Instant>,
}

#[derive(Debug)]
struct Layer {
    task: TaskId,
    length: u64,
    asked: bool,
    /// Requests that are being answered.
    open: usize,
    /// The client has been given a piece of it.
    flows: bool,
    /// Since when a later one has been asked for.
    passed: Option<Instant>,
    started: Option<Started>,
    /// It was told to stop and has not ended.
    stopping: bool,
    /// Not to be started again before the client asks for something new.
    tried: bool,
    /// Bytes that were fetched ahead in vain, and since when they are given up.
    given_up: Option<(u64, Instant)>,
}

#[derive(Clone, Copy, Debug)]
struct Started {
    id: AheadId,
    running: bool,
    bytes: u64,
}

impl<T> Default for Ahead<T> {
    fn default() -> Self {
        Self { images: VecDeque::new(), orphans: Vec::new(), unread: 0, next: 0 }
    }
}

impl<T: Clone> Ahead<T> {
    /// A client was given a manifest with these layers.
    pub(super) fn listed(&mut self, client: Client, layers: &[(TaskId, u64)], now: Instant) {
        let same = |image: &Image<T>| {
            image.client == client
                && image.layers.iter().map(|layer| (layer.task, layer.length)).eq(layers.iter().copied())
        };
        let image = match self.images.iter().position(same).and_then(|at| self.images.remove(at)) {
            Some(image) => Image { used: now, ..image },
            // There is nothing to start.
            None if layers.len() <= EVIDENCE => return,
            None => {
                self.next += 1;
                let layers = layers.iter().map(|(task, length)| Layer::new(*task, *length)).collect();
                Image { id: self.next, client, layers, how: None, used: now, peak: 0, free_since: None }
            }
        };
        self.images.push_back(image);
        if self.images.len() > IMAGES_MAX
            && let Some(forgotten) = self.images.pop_front()
        {
            self.forget(forgotten);
        }
    }

    /// A client asks for a blob, `whole` or a part of it. Of several manifests that list it, the latest is meant.
    pub(super) fn asked(&mut self, client: &Client, task: TaskId, whole: bool, how: T, now: Instant) -> Option<Asked> {
        let lists = |image: &Image<T>| image.client == *client && image.layers.iter().any(|layer| layer.task == task);
        let at = self.images.iter().rposition(lists)?;
        let mut image = self.images.remove(at)?;
        let asked = image.ask(task, whole, how, now);
        self.images.push_back(image);
        asked
    }

    /// A client has been given a whole piece of what it asked for.
    pub(super) fn given(&mut self, asked: Asked) {
        if let Some(layer) = self.image(asked.image).and_then(|image| image.layers.get_mut(asked.layer)) {
            layer.flows = true;
        }
    }

    /// A client's request has been answered, or it went away.
    pub(super) fn done(&mut self, asked: Asked, now: Instant) {
        let Some(image) = self.image(asked.image) else { return };
        if let Some(layer) = image.layers.get_mut(asked.layer) {
            layer.open = layer.open.saturating_sub(1);
        }
        image.used = now;
        if image.open() < image.peak {
            image.free_since.get_or_insert(now);
        }
    }

    /// What was started has ended by itself: `bytes` were fetched, and are kept if that is all of it.
    pub(super) fn ended(&mut self, id: AheadId, whole: bool, bytes: u64, now: Instant) {
        if let Some(layer) = self.layer(id)
            && let Some(started) = &mut layer.started
        {
            (started.running, started.bytes) = (false, bytes);
            // It may have been told to stop at this moment; then it is told again to let go of what it has.
            layer.stopping = false;
            if !whole {
                layer.give_up(now);
            }
        }
    }

    /// What was to be stopped while it was running has ended; `bytes` were fetched that nobody has read.
    pub(super) fn stopped(&mut self, id: AheadId, bytes: u64, now: Instant) {
        match self.layer(id) {
            Some(layer) if !layer.asked => {
                if let Some(started) = &mut layer.started {
                    started.bytes = bytes;
                }
                layer.give_up(now);
            }
            Some(layer) => (layer.started, layer.stopping) = (None, false),
            None => self.unread += bytes,
        }
    }

    /// The next thing to do, until there is none.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Move<T>> {
        self.forget_idle(now);
        if let Some(id) = self.orphans.pop() {
            return Some(Move::Stop { id });
        }
        if let Some(id) = self.images.iter_mut().find_map(|image| image.next_to_stop(now)) {
            return Some(Move::Stop { id });
        }
        if self.running() >= RUNNING_MAX {
            return None;
        }
        // The client that came last is the likeliest to be there still.
        for image in self.images.iter_mut().rev() {
            let Some(how) = image.how.clone() else { continue };
            if let Some(layer) = image.next_to_start() {
                self.next += 1;
                let id = AheadId(self.next);
                (layer.started, layer.tried) = (Some(Started { id, running: true, bytes: 0 }), true);
                return Some(Move::Start { id, task: layer.task, length: layer.length, how });
            }
        }
        None
    }

    /// Bytes that nobody has read and that were not counted before.
    pub(super) fn take_unread(&mut self, now: Instant) -> u64 {
        let layers = self.images.iter_mut().flat_map(|image| &mut image.layers);
        let due = layers.filter_map(|layer| layer.given_up.take_if(|(_, since)| now >= *since + COUNTED_AFTER));
        self.unread += due.map(|(bytes, _)| bytes).sum::<u64>();
        std::mem::take(&mut self.unread)
    }

    /// When to look again if nothing happens before.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let of = |image: &Image<T>| {
            let ahead = image.layers.iter().any(Layer::is_ahead);
            let free = image.free_since.filter(|_| ahead).map(|since| since + FREE_SLOT);
            let passed = image.layers.iter().filter(|layer| layer.is_ahead()).filter_map(|layer| layer.passed);
            let counted =
                image.layers.iter().filter_map(|layer| layer.given_up).map(|(_, since)| since + COUNTED_AFTER);
            let idle = Some(image.used + IMAGE_IDLE).filter(|_| image.open() == 0);
            passed.map(|since| since + OUT_OF_ORDER).chain(counted).chain(free).chain(idle).min()
        };
        self.images.iter().filter_map(of).min()
    }

    fn running(&self) -> usize {
        let layers = self.images.iter().flat_map(|image| &image.layers);
        layers.filter(|layer| layer.started.is_some_and(|started| started.running)).count()
    }

    fn image(&mut self, id: u64) -> Option<&mut Image<T>> {
        self.images.iter_mut().find(|image| image.id == id)
    }

    fn layer(&mut self, id: AheadId) -> Option<&mut Layer> {
        let layers = self.images.iter_mut().flat_map(|image| &mut image.layers);
        layers.into_iter().find(|layer| layer.started.is_some_and(|started| started.id == id))
    }

    fn forget_idle(&mut self, now: Instant) {
        while let Some(at) = self.images.iter().position(|image| image.open() == 0 && now >= image.used + IMAGE_IDLE)
            && let Some(image) = self.images.remove(at)
        {
            self.forget(image);
        }
    }

    fn forget(&mut self, image: Image<T>) {
        for layer in image.layers {
            self.unread += layer.given_up.map_or(0, |(bytes, _)| bytes);
            // What runs tells its bytes when it has stopped.
            if let Some(started) = layer.started {
                self.orphans.push(started.id);
                self.unread += if started.running || layer.asked { 0 } else { started.bytes };
            }
        }
    }
}

impl<T> Image<T> {
    fn open(&self) -> usize {
        self.layers.iter().map(|layer| layer.open).sum()
    }

    fn ask(&mut self, task: TaskId, whole: bool, how: T, now: Instant) -> Option<Asked> {
        let at = self.layers.iter().position(|layer| layer.task == task)?;
        // The rest of what broke off is asked for as a part.
        if !whole && !self.layers[at].asked {
            return None;
        }
        let new = !std::mem::replace(&mut self.layers[at].asked, true);
        self.layers[at].open += 1;
        self.layers[at].given_up = None;
        (self.how, self.used) = (Some(how), now);
        if new {
            for before in &mut self.layers[..at] {
                before.passed.get_or_insert(now);
            }
            self.layers[at..].iter_mut().for_each(|after| after.tried = false);
        }
        let open = self.open();
        self.peak = self.peak.max(open);
        if open >= self.peak {
            self.free_since = None;
        }
        Some(Asked { image: self.id, layer: at })
    }

    /// A layer that is no longer to be fetched ahead. What runs is asked to stop once.
    fn next_to_stop(&mut self, now: Instant) -> Option<AheadId> {
        let free = self.free_since.is_some_and(|since| now >= since + FREE_SLOT);
        for layer in self.layers.iter_mut().filter(|layer| layer.is_ahead()) {
            let passed = layer.passed.is_some_and(|since| now >= since + OUT_OF_ORDER);
            if !(layer.asked || passed || free) {
                continue;
            }
            let started = layer.started.as_mut()?;
            let id = started.id;
            if started.running {
                layer.stopping = true;
            } else if layer.asked {
                layer.started = None;
            } else {
                layer.give_up(now);
            }
            return Some(id);
        }
        None
    }

    /// A layer that the client will ask for soon.
    fn next_to_start(&mut self) -> Option<&mut Layer> {
        let lacks = self.layers.windows(EVIDENCE).any(|row| row.iter().all(|layer| layer.asked));
        let waits = self.layers.iter().any(|layer| layer.open > 0 && !layer.flows);
        if !lacks || waits || self.free_since.is_some() {
            return None;
        }
        let last = self.layers.iter().rposition(|layer| layer.asked)?;
        let window = self.layers.iter_mut().skip(last + 1).take(WINDOW);
        window.into_iter().find(|layer| layer.started.is_none() && !layer.tried)
    }
}

impl Layer {
    fn new(task: TaskId, length: u64) -> Self {
        Self {
            task,
            length,
            asked: false,
            open: 0,
            flows: false,
            passed: None,
            started: None,
            stopping: false,
            tried: false,
            given_up: None,
        }
    }

    /// Whether it was started and not told to stop.
    fn is_ahead(&self) -> bool {
        self.started.is_some() && !self.stopping
    }

    fn give_up(&mut self, now: Instant) {
        self.stopping = false;
        if let Some(started) = self.started.take() {
            let before = self.given_up.map_or(0, |(bytes, _)| bytes);
            self.given_up = Some((before + started.bytes, now)).filter(|(bytes, _)| *bytes > 0);
        }
    }
}

#[cfg(test)]
#[path = "ahead/tests.rs"]
mod tests;
