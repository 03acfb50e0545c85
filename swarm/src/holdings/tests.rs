#![allow(clippy::unwrap_used)]

use darter_tracker::{Digest, PieceSize};
use proptest::prelude::*;

use super::*;

fn node(number: u16) -> NodeId {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    NodeId::from_bytes(bytes)
}

fn task(number: u16) -> TaskId {
    let mut bytes = [0; 32];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    TaskId::blob(Digest::Sha256(bytes))
}

fn cut(length: u64) -> Geometry {
    Geometry::new(length, PieceSize::new(1 << 18).unwrap()).unwrap()
}

fn event(author: u16, epoch: u64, sequence: u64, body: EventBody) -> Event {
    Event { author: node(author), epoch, sequence, body }
}

/// What anybody can see of a task.
type View = (TaskId, Vec<(NodeId, u8)>, Option<Geometry>);

fn view(holdings: &Holdings) -> Vec<View> {
    holdings.tasks.iter().map(|(task, _)| (*task, holdings.holders(task), holdings.geometry(task))).collect()
}

#[test]
fn a_task_is_started_held_and_removed() {
    let (mut holdings, task) = (Holdings::default(), task(1));
    assert!(holdings.apply(&event(1, 1, 1, EventBody::Start { task })));
    assert_eq!(holdings.holders(&task), [(node(1), 0)]);
    assert!(holdings.apply(&event(1, 1, 3, EventBody::Progress { task, quarters: 4 })));
    assert!(!holdings.apply(&event(1, 1, 2, EventBody::Progress { task, quarters: 2 })), "overtaken");
    assert_eq!(holdings.holders(&task), [(node(1), 4)]);
    assert!(holdings.apply(&event(1, 1, 4, EventBody::Remove { task })));
    assert!(!holdings.apply(&event(1, 1, 3, EventBody::Progress { task, quarters: 4 })));
    assert_eq!(holdings.holders(&task), []);
    assert!(holdings.apply(&event(1, 2, 1, EventBody::Start { task })), "a new epoch begins anew");
    assert_eq!(holdings.tasks().count(), 1);
}

#[test]
fn nonsense_changes_nothing() {
    let mut holdings = Holdings::default();
    for quarters in [0, 5, 255] {
        assert!(!holdings.apply(&event(1, 1, 1, EventBody::Progress { task: task(1), quarters })));
    }
    assert!(!holdings.apply(&event(1, 1, 1, EventBody::Recover { task: None })));
    assert_eq!(view(&holdings), []);
}

#[test]
fn a_lone_liar_does_not_cut_the_task() {
    let (mut holdings, task) = (Holdings::default(), task(1));
    for (author, length) in [(1, 1 << 20), (2, 1 << 20), (3, 7)] {
        holdings.apply(&event(author, u64::from(author), 1, EventBody::Length { task, geometry: cut(length) }));
    }
    assert_eq!(holdings.geometry(&task), Some(cut(1 << 20)));
    assert_eq!(holdings.holders(&task), [], "to know the length is not to hold");
}

#[test]
fn the_dead_are_hidden_and_come_back() {
    let (mut holdings, task) = (Holdings::default(), task(1));
    holdings.apply(&event(1, 1, 1, EventBody::Progress { task, quarters: 4 }));
    holdings.apply(&event(1, 1, 2, EventBody::Length { task, geometry: cut(9) }));
    holdings.member_down(node(1));
    assert_eq!(holdings.holders(&task), []);
    assert_eq!(holdings.geometry(&task), Some(cut(9)), "a length outlives who said it");
    holdings.member_up(node(1));
    assert_eq!(holdings.holders(&task), [(node(1), 4)]);
}

#[test]
fn bounds_hold() {
    let mut holdings = Holdings::default();
    for number in 0..=TASKS_MAX as u16 {
        holdings.apply(&event(1, 1, u64::from(number) + 1, EventBody::Start { task: task(number) }));
    }
    assert_eq!(holdings.tasks.len(), TASKS_MAX);
    assert_eq!(holdings.holders(&task(0)), [], "the oldest went");

    let crowded = task(1);
    holdings.apply(&event(1, 2, 1, EventBody::Remove { task: crowded }));
    for author in 2..=AUTHORS_PER_TASK_MAX as u16 + 1 {
        holdings.apply(&event(author, 1, 1, EventBody::Start { task: crowded }));
    }
    assert_eq!(holdings.holders(&crowded).len(), AUTHORS_PER_TASK_MAX, "who holds nothing went first");
    holdings.apply(&event(100, 1, 1, EventBody::Start { task: crowded }));
    assert_eq!(holdings.holders(&crowded).len(), AUTHORS_PER_TASK_MAX);
    assert!(!holdings.holders(&crowded).contains(&(node(2), 0)));

    for author in 2..DOWN_MAX as u16 + 3 {
        holdings.member_down(node(author));
    }
    assert_eq!(holdings.down.len(), DOWN_MAX);
    holdings.member_up(node(2));
    assert!(!holdings.holders(&crowded).contains(&(node(2), 0)), "forgotten for good");
}

fn bodies() -> impl Strategy<Value = EventBody> {
    let task = (0..3u16).prop_map(task);
    prop_oneof![
        task.clone().prop_map(|task| EventBody::Start { task }),
        (task.clone(), 0..6u8).prop_map(|(task, quarters)| EventBody::Progress { task, quarters }),
        task.clone().prop_map(|task| EventBody::Remove { task }),
        (task, 1..4u64).prop_map(|(task, length)| EventBody::Length { task, geometry: cut(length) }),
    ]
}

proptest! {
    #[test]
    fn order_and_repetition_do_not_matter(
        said in prop::collection::vec((0..4u16, 1..3u64, bodies()), 1..40),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..200),
    ) {
        // An author never uses a sequence number twice.
        let events: Vec<Event> = said
            .into_iter()
            .enumerate()
            .map(|(at, (author, epoch, body))| event(author, epoch, at as u64 + 1, body))
            .collect();
        let (mut straight, mut shuffled) = (Holdings::default(), Holdings::default());
        for event in &events {
            straight.apply(event);
        }
        for index in order {
            shuffled.apply(index.get(&events));
        }
        for event in events.iter().rev() {
            shuffled.apply(event);
        }
        prop_assert_eq!(view(&straight), view(&shuffled));
        for event in &events {
            prop_assert!(!shuffled.apply(event), "idempotent");
        }
    }
}
