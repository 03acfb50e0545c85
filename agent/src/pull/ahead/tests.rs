//! Clients as they really ask, layer by layer, and what was fetched for them in vain.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use darter_tracker::Digest;
use http::HeaderMap;
use http::header::AUTHORIZATION;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn task(layer: usize) -> TaskId {
    TaskId::blob(Digest::Sha256([u8::try_from(layer).unwrap(); 32]))
}

fn client(name: &'static str) -> Client {
    let headers: HeaderMap = [(AUTHORIZATION, http::HeaderValue::from_static(name))].into_iter().collect();
    Client::new("https://r:443", "library/app", &headers)
}

/// The shell: notes what is started, and lets a test end it.
struct Shell {
    ahead: Ahead<()>,
    now: Instant,
    running: BTreeMap<TaskId, AheadId>,
    kept: BTreeMap<TaskId, AheadId>,
    started: Vec<usize>,
    open: BTreeMap<usize, Vec<Asked>>,
    who: Client,
}

impl Shell {
    fn new(layers: impl IntoIterator<Item = usize>) -> Self {
        let who = client("a");
        let mut shell = Self {
            ahead: Ahead::default(),
            now: Instant::now(),
            running: BTreeMap::new(),
            kept: BTreeMap::new(),
            started: Vec::new(),
            open: BTreeMap::new(),
            who,
        };
        shell.list(layers);
        shell
    }

    fn list(&mut self, layers: impl IntoIterator<Item = usize>) {
        let layers: Vec<(TaskId, u64)> = layers.into_iter().map(|layer| (task(layer), 100)).collect();
        self.ahead.listed(self.who.clone(), &layers, self.now);
    }

    fn settle(&mut self) {
        while let Some(next) = self.ahead.poll(self.now) {
            match next {
                Move::Start { id, task, .. } => {
                    self.running.insert(task, id);
                    self.started.push(usize::from(task.digest().as_bytes()[0]));
                }
                Move::Stop { id } => {
                    self.kept.retain(|_, kept| *kept != id);
                    if let Some(task) = self.running.iter().find(|(_, running)| **running == id).map(|(task, _)| *task)
                    {
                        self.running.remove(&task);
                        self.ahead.stopped(id, 40, self.now);
                    }
                }
            }
        }
    }

    /// The client asks for a layer, and has a piece of it at once.
    fn ask(&mut self, layer: usize) {
        self.ask_part(layer, true);
        self.given(layer);
    }

    fn given(&mut self, layer: usize) {
        if let Some(asked) = self.open[&layer].last() {
            self.ahead.given(*asked);
        }
        self.settle();
    }

    fn ask_part(&mut self, layer: usize, whole: bool) {
        let asked = self.ahead.asked(&self.who, task(layer), whole, (), self.now);
        self.open.entry(layer).or_default().extend(asked);
        self.settle();
    }

    fn done(&mut self, layer: usize) {
        let asked = self.open.get_mut(&layer).unwrap().pop().unwrap();
        self.ahead.done(asked, self.now);
        self.settle();
    }

    /// What was started is whole.
    fn whole(&mut self, layer: usize) {
        let id = self.running.remove(&task(layer)).unwrap();
        self.kept.insert(task(layer), id);
        self.ahead.ended(id, true, 100, self.now);
        self.settle();
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.settle();
    }

    fn unread(&mut self) -> u64 {
        self.ahead.take_unread(self.now)
    }

    /// A client that has `at_once` requests open until it has all of `layers`; each takes a second.
    fn pull(&mut self, layers: &[usize], at_once: usize) {
        let mut open = VecDeque::new();
        for layer in layers {
            if open.len() == at_once {
                self.pass(SECOND);
                self.done(open.pop_front().unwrap());
            }
            self.ask(*layer);
            open.push_back(*layer);
        }
        for layer in open {
            self.pass(SECOND);
            self.done(layer);
        }
        self.pass(IMAGE_IDLE + COUNTED_AFTER);
    }
}

#[test]
fn a_cold_client_finds_its_next_layers_started() {
    // Docker and containerd: three at once; skopeo and CRI-O: six; crane: one; nerdctl: all.
    for at_once in [1, 3, 6, 12] {
        let mut shell = Shell::new(0..12);
        shell.pull(&(0..12).collect::<Vec<_>>(), at_once);
        assert_eq!(shell.started, (3..12).collect::<Vec<_>>(), "{at_once}");
        assert_eq!(shell.unread(), 0, "{at_once}");
        assert!(shell.running.is_empty() && shell.kept.is_empty(), "{at_once}");
    }
}

#[test]
fn what_a_client_waits_for_comes_before_what_it_will_ask_for() {
    let mut shell = Shell::new(0..10);
    (0..3).for_each(|layer| shell.ask_part(layer, true));
    [2, 0].into_iter().for_each(|layer| shell.given(layer));
    assert!(shell.started.is_empty(), "it has nothing of one of them");
    shell.given(1);
    assert_eq!(shell.started, [3, 4, 5]);
    shell.done(0);
    shell.ask_part(3, true);
    assert_eq!(shell.started, [3, 4, 5], "and again with each that it asks for");
    assert!(!shell.running.contains_key(&task(3)) && shell.running.len() == 2, "what runs goes on");
    shell.given(3);
    assert_eq!(shell.started, [3, 4, 5, 6]);
    // One that goes away without a byte is not waited for.
    shell.done(1);
    shell.ask_part(4, true);
    shell.done(4);
    shell.ask(5);
    assert_eq!(shell.started, [3, 4, 5, 6, 7, 8]);
}

#[test]
fn whoever_lacks_one_layer_or_two_costs_nothing() {
    for lacks in [vec![0], vec![4], vec![9], vec![0, 1], vec![8, 9], vec![2, 6], vec![0, 4, 9], vec![0, 2, 4, 6, 8]] {
        for at_once in [1, 3, 6] {
            let mut shell = Shell::new(0..10);
            shell.pull(&lacks, at_once);
            assert!(shell.started.is_empty(), "{lacks:?}: {:?}", shell.started);
            assert_eq!(shell.unread(), 0, "{lacks:?}");
        }
    }
}

#[test]
fn docker_lacks_all_from_a_layer_on_and_reads_all_that_is_started() {
    for first in 0..10 {
        let mut shell = Shell::new(0..10);
        shell.pull(&(first..10).collect::<Vec<_>>(), 3);
        assert_eq!(shell.unread(), 0, "{first}");
        assert!(shell.started.iter().all(|layer| *layer >= first + EVIDENCE), "{first}: {:?}", shell.started);
        assert_eq!(shell.started.is_empty(), first + EVIDENCE >= 10, "{first}");
    }
}

#[test]
fn held_layers_in_the_middle_are_given_up_when_they_are_passed_over() {
    let mut shell = Shell::new(0..10);
    (0..3).for_each(|layer| shell.ask(layer));
    assert_eq!(shell.started, [3, 4, 5], "no more than a client could want next");
    shell.whole(3);
    assert_eq!(shell.started, [3, 4, 5], "what is whole and not asked for counts");
    shell.done(0);
    shell.ask(9);
    shell.pass(OUT_OF_ORDER - Duration::from_millis(1));
    assert_eq!((shell.running.len(), shell.kept.len()), (2, 1));
    shell.pass(Duration::from_millis(1));
    assert_eq!((shell.running.len(), shell.kept.len()), (0, 0));
    assert_eq!(shell.unread(), 0, "it may come yet");
    shell.pass(COUNTED_AFTER);
    assert_eq!(shell.unread(), 100 + 40 + 40);
    assert_eq!(shell.unread(), 0, "counted once");
}

#[test]
fn requests_made_at_once_come_in_any_order() {
    let mut shell = Shell::new(0..8);
    [2, 0, 1].into_iter().for_each(|layer| shell.ask(layer));
    assert_eq!(shell.started, [3, 4, 5]);
    shell.done(2);
    shell.done(0);
    shell.ask(5);
    shell.pass(OUT_OF_ORDER / 2);
    shell.ask(3);
    assert_eq!(
        shell.running.keys().copied().collect::<BTreeSet<_>>(),
        [4, 6, 7].map(task).into(),
        "3 and 5 are the client's"
    );
    assert_eq!(shell.unread(), 0);
}

#[test]
fn a_client_that_wants_no_more_is_noticed_and_may_come_back() {
    let mut shell = Shell::new(0..10);
    (0..3).for_each(|layer| shell.ask(layer));
    shell.done(0);
    shell.pass(FREE_SLOT - Duration::from_millis(1));
    assert_eq!(shell.running.len(), 3);
    shell.pass(Duration::from_millis(1));
    assert_eq!(shell.running.len(), 0);
    // It was writing a layer to its disk.
    shell.pass(SECOND);
    shell.ask(3);
    assert_eq!(shell.started, [3, 4, 5, 4, 5, 6], "what was given up goes on");
    (4..10).for_each(|layer| {
        shell.done(layer - 3);
        shell.ask(layer);
    });
    (7..10).for_each(|layer| shell.done(layer));
    shell.pass(IMAGE_IDLE + COUNTED_AFTER);
    assert_eq!(shell.unread(), 0, "it has all been read");
}

#[test]
fn scanners_and_lazy_readers_start_nothing() {
    let mut shell = Shell::new(0..10);
    // The config is no layer, and HEADs do not come here at all.
    shell.ask(77);
    (0..10).for_each(|layer| shell.ask_part(layer, false));
    shell.pass(IMAGE_IDLE);
    assert_eq!((shell.started.len(), shell.ahead.images.len()), (0, 0));
    // The rest of a layer that broke off is a request for that layer.
    shell.list(0..10);
    shell.ask(0);
    shell.done(0);
    shell.ask_part(0, false);
    assert_eq!(shell.open[&0].len(), 1);
}

#[test]
fn clients_do_not_speak_for_each_other() {
    let mut shell = Shell::new(0..10);
    shell.who = client("b");
    (0..3).for_each(|layer| shell.ask(layer));
    assert!(shell.started.is_empty(), "it was given no manifest");
    shell.list(0..10);
    (0..2).for_each(|layer| shell.ask(layer));
    shell.who = client("a");
    shell.ask(2);
    assert!(shell.started.is_empty(), "two and one are not three");
    (0..2).for_each(|layer| shell.ask(layer));
    shell.who = client("b");
    shell.ask(2);
    assert_eq!(shell.started, [3, 4, 5, 3, 4, 5], "each for itself; the pulls are shared");
}

#[test]
fn of_two_images_that_share_layers_the_later_is_meant() {
    let mut shell = Shell::new([0, 1, 2, 3, 4, 5]);
    shell.list([0, 1, 2, 13, 14, 15]);
    (0..3).for_each(|layer| shell.ask(layer));
    assert_eq!(shell.started, [13, 14, 15]);
    shell.list([0, 1, 2, 3, 4, 5]);
    assert_eq!(shell.ahead.images.len(), 2, "the same manifest again is the same image");
}

#[test]
fn no_more_than_the_bounds() {
    let mut shell = Shell::new(0..10);
    for base in [20, 40, 60] {
        shell.list(base..base + 10);
        (base..base + 3).for_each(|layer| shell.ask(layer));
    }
    assert_eq!(shell.running.len(), RUNNING_MAX);
    for n in 0..2 * IMAGES_MAX {
        let layers: Vec<(TaskId, u64)> = (0..4).map(|layer| (task(layer), n as u64)).collect();
        shell.ahead.listed(client("c"), &layers, shell.now);
    }
    shell.settle();
    assert_eq!(shell.ahead.images.len(), IMAGES_MAX);
    assert!(shell.running.is_empty(), "what was started for a forgotten image is stopped");
    assert_eq!(shell.unread(), 40 * RUNNING_MAX as u64);
}

#[test]
fn what_cannot_be_started_is_not_tried_again_at_once() {
    let mut shell = Shell::new(0..10);
    (0..3).for_each(|layer| shell.ask(layer));
    for (_, id) in std::mem::take(&mut shell.running) {
        shell.ahead.ended(id, false, 0, shell.now);
    }
    shell.settle();
    assert_eq!(shell.started, [3, 4, 5]);
    assert_eq!(shell.unread(), 0);
}

#[test]
fn it_is_looked_at_when_something_is_due() {
    let mut shell = Shell::new(0..10);
    assert_eq!(shell.ahead.deadline(), Some(shell.now + IMAGE_IDLE));
    (0..3).for_each(|layer| shell.ask(layer));
    assert_eq!(shell.ahead.deadline(), None);
    shell.done(1);
    assert_eq!(shell.ahead.deadline(), Some(shell.now + FREE_SLOT));
    shell.pass(FREE_SLOT);
    assert_eq!(shell.ahead.deadline(), Some(shell.now + COUNTED_AFTER));
}
