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

/// What is on its way, and what waits for a place. A turn is named by `T`.
#[derive(Debug)]
pub struct Intake<T> {
    pieces: usize,
    bytes: u64,
    held: VecDeque<(T, u32)>,
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
        Self { pieces: 0, bytes: 0, held: VecDeque::new() }
    }
}

impl<T: PartialEq> Intake<T> {
    /// A turn has come for a piece of at most so many bytes.
    #[must_use]
    pub fn offer(&mut self, turn: T, bytes: u32) -> Verdict {
        if self.held.is_empty() && self.admit(bytes) {
            Verdict::Take
        } else if self.held.len() < HELD_MAX {
            self.held.push_back((turn, bytes));
            Verdict::Hold
        } else {
            Verdict::Decline
        }
    }

    /// A turn that was kept is kept no longer; tells whether it was.
    pub fn forget(&mut self, turn: &T) -> bool {
        let before = self.held.len();
        self.held.retain(|(held, _)| held != turn);
        self.held.len() < before
    }

    /// A piece that had a place has come, or never will; names the turn that has its place now.
    pub fn release(&mut self, bytes: u32) -> Option<T> {
        self.pieces = self.pieces.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(u64::from(bytes));
        let bytes = self.held.front().map(|(_, bytes)| *bytes)?;
        if self.admit(bytes) { self.held.pop_front().map(|(turn, _)| turn) } else { None }
    }

    fn admit(&mut self, bytes: u32) -> bool {
        let bytes = u64::from(bytes);
        let room = self.pieces == 0 || self.pieces < PIECES_MAX && self.bytes + bytes <= BYTES_MAX;
        if room {
            self.pieces += 1;
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
            let taken = (0..20).filter(|turn| intake.offer(*turn, bytes) == Verdict::Take).count();
            assert_eq!(taken, most, "{bytes} bytes");
        }
    }

    #[test]
    fn turns_are_kept_for_the_next_place_in_their_order() {
        let mut intake = Intake::default();
        let mut verdicts: Vec<Verdict> = (0..PIECES_MAX + HELD_MAX + 1).map(|turn| intake.offer(turn, 1)).collect();
        assert_eq!(verdicts.pop(), Some(Verdict::Decline));
        assert_eq!(verdicts.split_off(PIECES_MAX), [Verdict::Hold; HELD_MAX]);
        assert_eq!(intake.release(1), Some(PIECES_MAX));
        assert_eq!(intake.offer(98, 1), Verdict::Hold, "there is no place for another");
        assert!(intake.forget(&98) && !intake.forget(&PIECES_MAX));
        assert_eq!(intake.release(1), None);
        assert_eq!(intake.offer(99, 1), Verdict::Take);
    }
}
