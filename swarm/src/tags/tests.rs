// A simulation needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

fn node(byte: u8) -> NodeId {
    NodeId::from_bytes([byte; 16])
}

fn tag(number: u32) -> TagId {
    TagId::new("https://r:443", "a/b", &number.to_string())
}

fn accepts(number: u8) -> Accepts {
    Accepts::new([number.to_string().as_str()])
}

fn meaning(byte: u8) -> Meaning {
    Meaning { digest: Digest::Sha256([byte; 32]), media_type: ManifestType::OciImage, length: 7 }
}

fn means(byte: u8, age: Duration) -> TagNews {
    TagNews::Means { accepts: accepts(0), meaning: meaning(byte), age }
}

/// One home, one kind of asker.
struct Home {
    tags: Tags,
    now: Instant,
}

impl Home {
    fn new() -> Self {
        Self { tags: Tags::default(), now: Instant::now() }
    }

    fn ask(&mut self, from: u8) -> TagAnswer {
        self.tags.ask(node(from), tag(1), accepts(0), MINUTE, self.now)
    }

    fn tell(&mut self, from: u8, news: TagNews) {
        self.tags.tell(node(from), tag(1), news, self.now);
    }

    fn waits(&mut self, from: u8) -> bool {
        matches!(self.ask(from), TagAnswer::Wait { .. })
    }
}

#[test]
fn one_asks_and_all_learn_of_it_until_it_is_too_old() {
    let mut home = Home::new();
    assert_eq!(home.ask(1), TagAnswer::Ask);
    assert!(home.waits(2) && home.waits(1));
    home.now += SECOND;
    home.tell(1, means(7, SECOND));
    assert_eq!(home.ask(2), TagAnswer::Means { meaning: meaning(7), age: SECOND });
    home.now += MINUTE - SECOND - Duration::from_nanos(1);
    assert!(matches!(home.ask(2), TagAnswer::Means { .. }));
    home.now += Duration::from_nanos(1);
    assert_eq!(home.ask(2), TagAnswer::Ask, "as old as is of use to nobody");
    // To one who is content with less it still is.
    let answer = home.tags.ask(node(3), tag(1), accepts(0), MINUTE * 2, home.now);
    assert_eq!(answer, TagAnswer::Means { meaning: meaning(7), age: MINUTE });
}

#[test]
fn who_does_not_answer_is_waited_for_no_longer_than_that() {
    let mut home = Home::new();
    assert_eq!(home.ask(1), TagAnswer::Ask);
    home.now += ASKING - Duration::from_nanos(1);
    assert!(home.waits(2));
    home.now += Duration::from_nanos(1);
    assert_eq!(home.ask(2), TagAnswer::Ask);
    assert!(home.waits(3));
    // The first one's failure is not the second one's.
    home.tell(1, TagNews::Failed { accepts: accepts(0) });
    assert!(home.waits(3));
    home.tell(2, TagNews::Failed { accepts: accepts(0) });
    assert_eq!(home.ask(3), TagAnswer::Ask);
}

#[test]
fn those_who_wait_come_again_the_later_the_more_they_are() {
    let mut home = Home::new();
    home.ask(0);
    let waits: Vec<Duration> = (0..1000)
        .map(|_| match home.ask(1) {
            TagAnswer::Wait { retry_after } => retry_after,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(waits.is_sorted());
    assert_eq!((waits[0], waits[999]), (RETRY_MIN, RETRY_MAX));
}

#[test]
fn the_younger_answer_counts() {
    let mut home = Home::new();
    home.tell(1, means(1, SECOND * 10));
    home.tell(2, means(2, SECOND * 20));
    assert_eq!(home.ask(3), TagAnswer::Means { meaning: meaning(1), age: SECOND * 10 });
    home.now += SECOND;
    home.tell(2, means(2, SECOND * 10));
    assert_eq!(home.ask(3), TagAnswer::Means { meaning: meaning(2), age: SECOND * 10 });
}

#[test]
fn what_was_asked_before_a_push_does_not_come_back() {
    let mut home = Home::new();
    home.tell(1, means(1, Duration::ZERO));
    home.now += SECOND;
    assert!(matches!(home.ask(2), TagAnswer::Means { .. }));
    home.tell(3, TagNews::Forget);
    assert_eq!(home.ask(2), TagAnswer::Ask);
    home.now += SECOND;
    // Asked a moment before the push, said a second later.
    home.tell(1, means(1, SECOND + Duration::from_nanos(1)));
    assert!(home.waits(3), "who was told to ask is still asking");
    home.tell(2, means(2, SECOND / 2));
    assert_eq!(home.ask(3), TagAnswer::Means { meaning: meaning(2), age: SECOND / 2 });
}

#[test]
fn a_push_counts_whatever_was_accepted_and_for_no_other_tag() {
    let (mut tags, now) = (Tags::default(), Instant::now());
    for (of, kind) in [(1, 0), (1, 1), (2, 0)] {
        let news = TagNews::Means { accepts: accepts(kind), meaning: meaning(kind), age: SECOND };
        tags.tell(node(1), tag(of), news, now);
    }
    let held = |tags: &Tags, of, kind| tags.meaning(tag(of), accepts(kind), MINUTE, now);
    assert_eq!(held(&tags, 1, 0), Some((meaning(0), SECOND)));
    assert_eq!(held(&tags, 1, 1), Some((meaning(1), SECOND)));
    assert_eq!(held(&tags, 1, 2), None, "another kind of asker");
    tags.tell(node(2), tag(1), TagNews::Forget, now);
    assert_eq!([held(&tags, 1, 0), held(&tags, 1, 1)], [None; 2]);
    assert_eq!(held(&tags, 2, 0), Some((meaning(0), SECOND)));
}

#[test]
fn nonsense_is_not_kept() {
    let mut home = Home::new();
    home.tell(1, means(1, TTL_MAX));
    home.tell(1, means(1, Duration::MAX));
    for length in [0, LENGTH_MAX + 1, u64::MAX] {
        let meaning = Meaning { length, ..meaning(1) };
        home.tell(1, TagNews::Means { accepts: accepts(0), meaning, age: Duration::ZERO });
    }
    home.tell(1, TagNews::Failed { accepts: accepts(9) });
    assert_eq!(home.tags.tags.len(), 0);
    // And nobody gets what is a day old, however long it is of use to him.
    home.tell(1, means(1, TTL_MAX - SECOND));
    let ask = |home: &mut Home| home.tags.ask(node(1), tag(1), accepts(0), Duration::MAX, home.now);
    assert!(matches!(ask(&mut home), TagAnswer::Means { .. }));
    home.now += SECOND;
    assert_eq!(ask(&mut home), TagAnswer::Ask);
}

#[test]
fn order_and_case_of_what_is_accepted_do_not_count_and_all_else_does() {
    let same = Accepts::new(["a/b, c/d"]);
    for other in [&["c/d,a/b"][..], &["c/d", "a/b"], &["A/B", "c/d", " a/b ,"]] {
        assert_eq!(Accepts::new(other.iter().copied()), same, "{other:?}");
    }
    for other in [&["a/b"][..], &["a/b", "c/d", "e/f"], &["a/b", "c/d;q=0.5"], &["a/bc/d"], &[], &["*/*"]] {
        assert_ne!(Accepts::new(other.iter().copied()), same, "{other:?}");
    }
}

#[test]
fn names_do_not_run_together() {
    let ids = [["r", "a/b", "c"], ["r", "a", "b/c"], ["ra", "/b", "c"], ["r", "a/bc", ""], ["r", "a/b", "d"]];
    let ids: BTreeSet<TagId> = ids.iter().map(|[registry, name, tag]| TagId::new(registry, name, tag)).collect();
    assert_eq!(ids.len(), 5);
}

#[derive(Clone, Debug)]
enum Step {
    Ask { from: u8, tag: u32, kind: u8, fresh: u64 },
    Means { from: u8, tag: u32, kind: u8, digest: u8, age: u64 },
    Failed { from: u8, tag: u32, kind: u8 },
    Forget { tag: u32 },
    Pass { millis: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let (from, tag, kind) = (0..4u8, 0..3u32, 0..3u8);
    let of = (from, tag, kind);
    prop_oneof![
        (of.clone(), 0..30u64).prop_map(|((from, tag, kind), fresh)| Step::Ask { from, tag, kind, fresh }),
        (of.clone(), 0..=u8::MAX, 0..30u64).prop_map(|((from, tag, kind), digest, age)| Step::Means {
            from,
            tag,
            kind,
            digest,
            age
        }),
        of.prop_map(|(from, tag, kind)| Step::Failed { from, tag, kind }),
        (0..3u32).prop_map(|tag| Step::Forget { tag }),
        (1..5000u64).prop_map(|millis| Step::Pass { millis }),
    ]
}

proptest! {
    /// Whatever is said in whatever order: an answer was told by somebody for this tag and kind, is as young as was asked for and
    /// was not asked for before the tag was written; and one member at a time is sent to the registry.
    #[test]
    fn answers_are_young_enough_and_one_asks_at_a_time(steps in proptest::collection::vec(step(), 1..200)) {
        let (mut tags, start) = (Tags::default(), Instant::now());
        let mut now = start;
        let mut told: Vec<(u32, u8, u8, Duration, Instant)> = Vec::new();
        let mut forgotten = [None; 3];
        let mut asking: std::collections::BTreeMap<(u32, u8), (u8, Instant)> = std::collections::BTreeMap::new();
        for step in steps {
            match step {
                Step::Pass { millis } => now += Duration::from_millis(millis),
                Step::Forget { tag: of } => {
                    tags.tell(node(9), tag(of), TagNews::Forget, now);
                    forgotten[of as usize] = Some(now);
                    asking.retain(|(tag, _), _| *tag != of);
                }
                Step::Failed { from, tag: of, kind } => {
                    tags.tell(node(from), tag(of), TagNews::Failed { accepts: accepts(kind) }, now);
                    if asking.get(&(of, kind)).is_some_and(|(node, _)| *node == from) {
                        asking.remove(&(of, kind));
                    }
                }
                Step::Means { from, tag: of, kind, digest, age } => {
                    let age = Duration::from_secs(age);
                    let news = TagNews::Means { accepts: accepts(kind), meaning: meaning(digest), age };
                    tags.tell(node(from), tag(of), news, now);
                    told.push((of, kind, digest, age, now));
                    asking.remove(&(of, kind));
                }
                Step::Ask { from, tag: of, kind, fresh } => {
                    let fresh = Duration::from_secs(fresh);
                    match tags.ask(node(from), tag(of), accepts(kind), fresh, now) {
                        TagAnswer::Means { meaning: said, age } => {
                            prop_assert!(age < fresh);
                            let is_it = |(tag, k, digest, then, at): &(u32, u8, u8, Duration, Instant)| {
                                *tag == of && *k == kind && meaning(*digest) == said && *then + (now - *at) == age
                            };
                            prop_assert!(told.iter().any(is_it));
                            if let Some(at) = forgotten[of as usize] {
                                prop_assert!(age < now - at);
                            }
                        }
                        TagAnswer::Ask => {
                            if let Some((_, since)) = asking.insert((of, kind), (from, now)) {
                                prop_assert!(now - since >= ASKING);
                            }
                        }
                        TagAnswer::Wait { retry_after } => prop_assert!(retry_after <= RETRY_MAX),
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_kept_is_bounded(many in 1..40u32) {
        let (mut tags, now) = (Tags { tags: Recent::new(8) }, Instant::now());
        for number in 0..many {
            for kind in 0..(ACCEPTS_MAX as u8 + 3) {
                tags.ask(node(1), tag(number), accepts(kind), MINUTE, now);
            }
        }
        prop_assert!(tags.tags.len() <= 8);
        prop_assert!(tags.tags.iter().all(|(_, tag)| tag.accepts.len() <= ACCEPTS_MAX));
    }
}
