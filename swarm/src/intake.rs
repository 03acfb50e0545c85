//! How many pieces may be on their way to this node, over all tasks: they share its link, and have to be held in memory until
//! they are whole.
//!
//! A sender gives several at a time, and all members together send as much as they receive. Who took more at a time would get
//! each of them later, and keep senders waiting whose time others could use; who took fewer would have an idle link whenever one
//! of its senders is slow.

/// Pieces at a time: one more than a sender gives, so that the link is full though some come slowly. Simulated with 16 to 100
/// nodes on equal links: 3 cost 6 to 28 % of the time, 8 cost 20 % and more.
pub const PIECES_MAX: usize = 5;

/// Bytes at a time: large pieces are fewer, but one may always come.
pub const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What is on its way.
#[derive(Debug, Default)]
pub struct Intake {
    pieces: usize,
    bytes: u64,
}

impl Intake {
    /// Takes a place for a piece of so many bytes, if there is one; [`Self::release`] gives it back.
    #[must_use]
    pub fn admit(&mut self, bytes: u32) -> bool {
        let bytes = u64::from(bytes);
        let room = self.pieces == 0 || self.pieces < PIECES_MAX && self.bytes + bytes <= BYTES_MAX;
        if room {
            self.pieces += 1;
            self.bytes += bytes;
        }
        room
    }

    /// A piece that was admitted has come, or never will.
    pub fn release(&mut self, bytes: u32) {
        self.pieces = self.pieces.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(u64::from(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_by_number_and_by_bytes() {
        let mut intake = Intake::default();
        assert_eq!((0..20).filter(|_| intake.admit(1024)).count(), PIECES_MAX);
        intake.release(1024);
        assert!(intake.admit(1024) && !intake.admit(1024));
        let mut intake = Intake::default();
        assert_eq!((0..20).filter(|_| intake.admit(8 << 20)).count(), 2);
        let mut intake = Intake::default();
        assert!(intake.admit(32 << 20), "one may always come");
        assert!(!intake.admit(1));
    }
}
