//! Registries that want to be left alone, as the members of a task tell their home (429 or 503 with `Retry-After`).
//!
//! One fetcher sees the answer; nobody else shall ask before the time is over. A member can lie, though, and a task that waits
//! for a registry that is not busy is a pull that stands still. So one member's word counts for [`WORD_MAX`], once in
//! [`WORD_AGAIN`]; what two members say counts as they say it, up to [`PAUSE_MAX`]. After a word that was too short somebody asks
//! and gets the same answer, and then there are two.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use darter_tracker::{NodeId, Pause, RegistryTag};

/// How long one member's word keeps all others from the registry. Most registries ask for a few seconds.
pub const WORD_MAX: Duration = Duration::from_secs(10);

/// How soon the same member's word alone counts again: a liar stops a task for a sixtieth of the time.
pub const WORD_AGAIN: Duration = Duration::from_secs(600);

/// The longest pause that is honoured, whoever says so.
pub const PAUSE_MAX: Duration = Duration::from_secs(300);

/// Registries of one task, and members that have spoken of one of them. Beyond it nothing new is believed until old words lapse.
const REGISTRIES_MAX: usize = 8;
const WORDS_MAX: usize = 64;

/// What the members of one task have said.
#[derive(Debug, Default)]
pub struct Pauses {
    registries: BTreeMap<RegistryTag, BTreeMap<NodeId, Word>>,
}

#[derive(Clone, Copy, Debug)]
struct Word {
    /// When it last counted alone, and until when.
    alone: Instant,
    alone_until: Instant,
    /// Until when the registry wants to be left alone, as this member says.
    until: Instant,
}

impl Pauses {
    /// A member that was fetching says that its registry wants to be left alone.
    pub fn told(&mut self, from: NodeId, pause: Pause, now: Instant) {
        for words in self.registries.values_mut() {
            words.retain(|_, word| now < word.until || now < word.alone + WORD_AGAIN);
        }
        self.registries.retain(|_, words| !words.is_empty());
        if !self.registries.contains_key(&pause.registry) && self.registries.len() >= REGISTRIES_MAX {
            return;
        }
        let words = self.registries.entry(pause.registry).or_default();
        if !words.contains_key(&from) && words.len() >= WORDS_MAX {
            return;
        }
        let until = now + pause.left.min(PAUSE_MAX);
        let fresh = Word { alone: now, alone_until: now + pause.left.min(WORD_MAX), until };
        let word = words.entry(from).or_insert(fresh);
        *word = if now < word.alone + WORD_AGAIN { Word { until, ..*word } } else { fresh };
    }

    /// How long `registry` is still to be left alone; of any, where the asker's is not known.
    #[must_use]
    pub fn left(&self, registry: Option<RegistryTag>, now: Instant) -> Option<Pause> {
        let meant = self.registries.iter().filter(|(known, _)| registry.is_none_or(|registry| registry == **known));
        let pauses = meant.filter_map(|(registry, words)| {
            let mut until: Vec<Instant> = words.values().map(|word| word.until).collect();
            until.sort_unstable();
            // What the last but one says, a second member says as well.
            let agreed = until.iter().rev().nth(1).copied();
            let alone = words.values().map(|word| word.alone_until).max();
            let left = agreed.max(alone)?.checked_duration_since(now).filter(|left| !left.is_zero())?;
            Some(Pause { registry: *registry, left })
        });
        pauses.max_by_key(|pause| pause.left)
    }
}

#[cfg(test)]
// A simulation needs some instant to start at; from there its own clock moves it.
#[allow(clippy::disallowed_methods, clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn node(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 16])
    }

    fn pause(seconds: u32) -> Pause {
        Pause { registry: RegistryTag(1), left: SECOND * seconds }
    }

    fn left(pauses: &Pauses, now: Instant) -> Duration {
        pauses.left(Some(RegistryTag(1)), now).map_or(Duration::ZERO, |pause| pause.left)
    }

    #[test]
    fn a_short_pause_is_believed_of_one_and_ends() {
        let (mut pauses, now) = (Pauses::default(), Instant::now());
        pauses.told(node(1), pause(3), now);
        assert_eq!(left(&pauses, now), SECOND * 3);
        assert_eq!(pauses.left(None, now), Some(pause(3)), "of whom nothing is known, it holds as well");
        assert_eq!(pauses.left(Some(RegistryTag(2)), now), None, "another registry is not meant");
        assert_eq!(left(&pauses, now + SECOND * 3), Duration::ZERO);
    }

    #[test]
    fn one_member_stops_a_task_for_ten_seconds_in_ten_minutes() {
        let (mut pauses, start) = (Pauses::default(), Instant::now());
        let mut stopped = 0;
        for second in 0..1200 {
            let now = start + SECOND * second;
            pauses.told(node(1), pause(u32::MAX), now);
            stopped += u32::from(!left(&pauses, now).is_zero());
        }
        assert_eq!(stopped, 2 * 10);
    }

    #[test]
    fn what_two_say_holds_as_long_as_both_say_and_no_longer_than_the_bound() {
        let (mut pauses, now) = (Pauses::default(), Instant::now());
        pauses.told(node(1), pause(60), now);
        pauses.told(node(2), pause(100), now);
        assert_eq!(left(&pauses, now), SECOND * 60);
        pauses.told(node(3), pause(80), now);
        assert_eq!(left(&pauses, now), SECOND * 80);
        pauses.told(node(1), pause(100_000), now);
        pauses.told(node(3), pause(100_000), now);
        assert_eq!(left(&pauses, now), PAUSE_MAX);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut pauses, now) = (Pauses::default(), Instant::now());
        for n in 0..=u8::MAX {
            pauses.told(node(n), pause(60), now);
            pauses.told(node(n), Pause { registry: RegistryTag(n.into()), left: SECOND }, now);
        }
        assert_eq!(pauses.registries.len(), REGISTRIES_MAX);
        assert!(pauses.registries.values().all(|words| words.len() <= WORDS_MAX));
        pauses.told(node(1), Pause { registry: RegistryTag(999), left: SECOND }, now + WORD_AGAIN);
        assert_eq!(pauses.registries.len(), 1, "old words make room");
    }
}
