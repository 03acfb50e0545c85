//! What this node wants to say, held back to the rate that gossip carries: foca brings 20 events a second to a
//! thousand members and chokes at 50, so no single node may use all of that for long.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use darter_tracker::{EventBody, TaskId};

/// Events a second that one node may say for long.
const RATE: f64 = 5.0;
/// Events that it may say at once after a silence: the layers of a large image.
const BURST: f64 = 50.0;
/// Events that wait, on different subjects; the oldest goes first when there are more.
const WAITING_MAX: usize = 256;

/// A queue behind a token bucket.
pub(super) struct Outbox {
    waiting: VecDeque<EventBody>,
    tokens: f64,
    filled: Instant,
}

/// What an event is about: a later one replaces one that still waits.
fn subject(body: &EventBody) -> (u8, Option<TaskId>) {
    match body {
        EventBody::Start { task } | EventBody::Progress { task, .. } | EventBody::Remove { task } => (0, Some(*task)),
        EventBody::Length { task, .. } => (1, Some(*task)),
        EventBody::Recover { task } => (2, *task),
    }
}

impl Outbox {
    pub(super) fn new(now: Instant) -> Self {
        Self { waiting: VecDeque::new(), tokens: BURST, filled: now }
    }

    /// Queues an event; returns the one that was dropped for it, if any.
    pub(super) fn push(&mut self, body: EventBody) -> Option<EventBody> {
        let about = subject(&body);
        if let Some(stale) = self.waiting.iter_mut().find(|waiting| subject(waiting) == about) {
            *stale = body;
            return None;
        }
        self.waiting.push_back(body);
        if self.waiting.len() > WAITING_MAX { self.waiting.pop_front() } else { None }
    }

    /// The next event that may be said now.
    pub(super) fn pop(&mut self, now: Instant) -> Option<EventBody> {
        let gained = now.saturating_duration_since(self.filled).as_secs_f64() * RATE;
        self.tokens = (self.tokens + gained).min(BURST);
        self.filled = now;
        if self.tokens < 1.0 {
            return None;
        }
        let body = self.waiting.pop_front()?;
        self.tokens -= 1.0;
        Some(body)
    }

    /// When [`Self::pop`] has something.
    pub(super) fn due(&self) -> Option<Instant> {
        let missing = (1.0 - self.tokens).max(0.0);
        // Rounded up, or a wake-up might come just too early, again and again.
        let wait = Duration::from_secs_f64(missing / RATE) + Duration::from_millis(1);
        (!self.waiting.is_empty()).then(|| self.filled + wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_tracker::Digest;

    fn task(number: u16) -> TaskId {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        TaskId::blob(Digest::Sha256(bytes))
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let mut now = Instant::now();
        let mut outbox = Outbox::new(now);
        for number in 0..100 {
            assert_eq!(outbox.push(EventBody::Start { task: task(number) }), None);
        }
        let mut said = 0;
        while outbox.pop(now).is_some() {
            said += 1;
        }
        assert_eq!(said, 50);
        let begin = now;
        while let Some(due) = outbox.due() {
            now = due;
            said += u32::from(outbox.pop(now).is_some());
        }
        assert_eq!(said, 100);
        let took = (now - begin).as_secs_f64();
        assert!((9.9..10.5).contains(&took), "{took}");
    }

    #[test]
    fn later_words_replace_waiting_ones_and_the_oldest_are_dropped() {
        let now = Instant::now();
        let mut outbox = Outbox::new(now);
        outbox.push(EventBody::Start { task: task(0) });
        outbox.push(EventBody::Recover { task: None });
        outbox.push(EventBody::Progress { task: task(0), quarters: 4 });
        assert_eq!(outbox.pop(now), Some(EventBody::Progress { task: task(0), quarters: 4 }));
        assert_eq!(outbox.pop(now), Some(EventBody::Recover { task: None }));
        assert_eq!((outbox.pop(now), outbox.due()), (None, None));
        for number in 0..WAITING_MAX as u16 {
            assert_eq!(outbox.push(EventBody::Start { task: task(number) }), None);
        }
        assert_eq!(outbox.push(EventBody::Start { task: task(999) }), Some(EventBody::Start { task: task(0) }));
    }
}
