//! How many pieces may be on their way to this node, over all tasks: they share its link, and have to be held in memory until
//! they are whole.
//!
//! A sender gives several at a time, and all members together send as much as they receive. Who took more at a time would get
//! each of them later, and keep senders waiting whose time others could use; who took fewer would have an idle link whenever one
//! of its senders is slow.

use std::collections::VecDeque;
use std::time::Duration;

/// Pieces at a time: one more than a sender gives, so that the link is full though some come slowly. Simulated with 16 to 100
/// nodes on equal links: 3 cost 6 to 28 % of the time, 8 cost 20 % and more.
pub const PIECES_MAX: usize = 5;

/// Bytes at a time: large pieces are fewer, but one may always come.
pub const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Turns that are kept for the next free place instead of being left to others: who declines asks again, which costs both sides
/// more than the piece's head.
pub const HELD_MAX: usize = 1;

/// How long a turn is kept so: its sender has offered the next one meanwhile, but not more than that.
pub const HELD_FOR: Duration = Duration::from_millis(100);

/// Pieces of slow peers that do not count among those: each keeps its place for several times as long, and a node with
/// many slow neighbours would have hardly a place left for what the rest could give. Simulated with 1000 nodes, a tenth of them
/// with a quarter of the rate: without such places the last one took 1.22 times the bound instead of 1.08.
pub const SLOW_MAX: usize = 3;

/// How long the pieces of a peer take, beside those of others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// About as long as those of the fast ones, as far as is known.
    #[default]
    Usual,
    /// Much longer.
    Slow,
}

/// What is on its way, and what waits for a place. A turn is named by `T`.
#[derive(Debug)]
pub struct Intake<T> {
    usual: usize,
    slow: usize,
    bytes: u64,
    held: VecDeque<Held<T>>,
}

/// A turn that waits for a place, with what was said when it was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held<T> {
    /// Its name.
    pub turn: T,
    /// The most that its piece can have.
    pub bytes: u32,
    /// The pace of its peer.
    pub pace: Pace,
}

/// What becomes of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is a place, and it is taken now; [`Intake::release`] gives it back.
    Take,
    /// It is kept; [`Intake::release`] of another names it when it has a place.
    Hold,
    /// It is left to others.
    Decline,
}

impl<T> Default for Intake<T> {
    fn default() -> Self {
        Self { usual: 0, slow: 0, bytes: 0, held: VecDeque::new() }
    }
}

impl<T: PartialEq> Intake<T> {
    /// A turn has come, from a peer of this pace, for a piece of at most so many bytes.
    #[must_use]
    pub fn offer(&mut self, turn: T, bytes: u32, pace: Pace) -> Verdict {
        let waiting = self.held.iter().filter(|held| held.pace == pace).count();
        if waiting == 0 && self.admit(bytes, pace) {
            Verdict::Take
        } else if waiting < HELD_MAX {
            self.held.push_back(Held { turn, bytes, pace });
            Verdict::Hold
        } else {
            Verdict::Decline
        }
    }

    /// Bytes that have places at the most.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A turn that was kept is kept no longer; tells whether it was.
    pub fn forget(&mut self, turn: &T) -> bool {
        let before = self.held.len();
        self.held.retain(|held| held.turn != *turn);
        self.held.len() < before
    }

    /// A piece that had a place has come, or never will, and was offered with these figures; returns the turn that has a place
    /// now.
    pub fn release(&mut self, bytes: u32, pace: Pace) -> Option<Held<T>> {
        let count = self.count(pace);
        *count = count.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(u64::from(bytes));
        let next = (0..self.held.len()).find(|at| self.admit(self.held[*at].bytes, self.held[*at].pace))?;
        self.held.remove(next)
    }

    fn count(&mut self, pace: Pace) -> &mut usize {
        match pace {
            Pace::Usual => &mut self.usual,
            Pace::Slow => &mut self.slow,
        }
    }

    fn admit(&mut self, bytes: u32, pace: Pace) -> bool {
        let bytes = u64::from(bytes);
        let nothing = self.usual + self.slow == 0;
        let place =
            self.usual + self.slow.saturating_sub(SLOW_MAX) < PIECES_MAX || pace == Pace::Slow && self.slow < SLOW_MAX;
        let room = nothing || place && self.bytes + bytes <= BYTES_MAX;
        if room {
            *self.count(pace) += 1;
            self.bytes += bytes;
        }
        room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_by_number_and_by_bytes() {
        for (bytes, most) in [(1024, PIECES_MAX), (8 << 20, 2), (32 << 20, 1)] {
            let mut intake = Intake::default();
            let taken = (0..20).filter(|turn| intake.offer(*turn, bytes, Pace::Usual) == Verdict::Take).count();
            assert_eq!(taken, most, "{bytes} bytes");
        }
    }

    #[test]
    fn turns_are_kept_for_the_next_place_in_their_order() {
        let mut intake = Intake::default();
        let mut verdicts: Vec<Verdict> =
            (0..PIECES_MAX + HELD_MAX + 1).map(|turn| intake.offer(turn, 1, Pace::Usual)).collect();
        assert_eq!(verdicts.pop(), Some(Verdict::Decline));
        assert_eq!(verdicts.split_off(PIECES_MAX), [Verdict::Hold; HELD_MAX]);
        let held = Held { turn: PIECES_MAX, bytes: 1, pace: Pace::Usual };
        assert_eq!(intake.release(1, Pace::Usual), Some(held));
        assert_eq!(intake.offer(98, 1, Pace::Usual), Verdict::Hold, "there is no place for another");
        assert!(intake.forget(&98) && !intake.forget(&PIECES_MAX));
        assert_eq!(intake.release(1, Pace::Usual), None);
        assert_eq!(intake.offer(99, 1, Pace::Usual), Verdict::Take);
    }

    #[test]
    fn a_few_slow_pieces_take_no_place_from_others() {
        let mut intake = Intake::default();
        let mut taken = |pace, most| (0..most).filter(|turn| intake.offer(*turn, 1, pace) == Verdict::Take).count();
        assert_eq!(taken(Pace::Slow, SLOW_MAX), SLOW_MAX);
        assert_eq!(taken(Pace::Usual, PIECES_MAX), PIECES_MAX);
        assert_eq!(intake.offer(10, 1, Pace::Slow), Verdict::Hold);
        assert_eq!(intake.offer(11, 1, Pace::Usual), Verdict::Hold);
        assert_eq!(intake.offer(12, 1, Pace::Slow), Verdict::Decline);
        assert_eq!(intake.release(1, Pace::Slow).map(|held| held.turn), Some(10), "its place is for no other");
        assert_eq!(intake.release(1, Pace::Usual).map(|held| held.turn), Some(11));
        // A slow one beyond the few takes a place like any other.
        assert_eq!(intake.release(1, Pace::Usual), None);
        assert_eq!(intake.offer(13, 1, Pace::Slow), Verdict::Take);
        assert_eq!(intake.offer(14, 1, Pace::Usual), Verdict::Hold);
        assert_eq!(intake.release(1, Pace::Slow).map(|held| held.turn), Some(14), "there is one slow one less");
    }
}
