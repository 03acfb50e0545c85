//! Pieces that are on their way from the registry, for clients that wait for them: a client hears of the registry's bytes as they
//! come, however large a piece is and however slow the link.
//!
//! There is nothing to compare such bytes with before the whole blob is here, be the piece complete or not. So they are given as
//! the registry gives them, and [`crate::store::Reader`] compares them with what was stored in the end, which may have come from
//! somebody else. Not here: pieces from peers, of which nothing is given before they have matched their digest.

use std::collections::BTreeMap;
use std::sync::Mutex;

use bytes::Bytes;
use darter_tracker::PieceIndex;
use tokio::sync::watch;

use super::flight::lock;

/// What has come of the pieces of one pull that are not complete.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    /// At most a piece for each run that is open.
    pieces: Mutex<BTreeMap<PieceIndex, Coming>>,
    /// Counts the parts and the arrivals, so that whoever waits looks again.
    come: watch::Sender<u64>,
}

#[derive(Debug)]
struct Coming {
    /// Two runs may bring the same piece, since a home can be late: it is the one that began last that is given.
    arrival: u64,
    parts: Vec<Bytes>,
}

/// One piece of one run, until it is stored or its response has broken off.
pub(super) struct Arrival<'a> {
    all: &'a Arriving,
    piece: PieceIndex,
    /// Which one of all it is.
    number: u64,
}

impl Arriving {
    /// A piece begins to come.
    pub(super) fn begin(&self, piece: PieceIndex) -> Arrival<'_> {
        let mut number = 0;
        self.come.send_modify(|count| {
            *count += 1;
            number = *count;
        });
        lock(&self.pieces).insert(piece, Coming { arrival: number, parts: Vec::new() });
        Arrival { all: self, piece, number }
    }

    /// Waits for what comes of `piece` from the byte `at` of it on, for as long as it takes.
    pub(super) async fn after(&self, piece: PieceIndex, at: u64) -> Bytes {
        let mut come = self.come.subscribe();
        loop {
            if let Some(bytes) = lock(&self.pieces).get(&piece).and_then(|it| following(&it.parts, at)) {
                return bytes;
            }
            if come.changed().await.is_err() {
                // The sender is a part of this very struct.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Arrival<'_> {
    /// More of the piece has come.
    pub(super) fn part(&self, bytes: &Bytes) {
        if let Some(coming) = lock(&self.all.pieces).get_mut(&self.piece).filter(|it| it.arrival == self.number) {
            coming.parts.push(bytes.clone());
        }
        self.all.come.send_modify(|count| *count += 1);
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        let mut pieces = lock(&self.all.pieces);
        if pieces.get(&self.piece).is_some_and(|it| it.arrival == self.number) {
            pieces.remove(&self.piece);
        }
    }
}

/// What of the part that has the byte `at` comes from there on.
fn following(parts: &[Bytes], at: u64) -> Option<Bytes> {
    let mut at = at as usize;
    for part in parts {
        if at < part.len() {
            return Some(part.slice(at..));
        }
        at -= part.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn what_comes_is_seen_until_the_piece_is_over() {
        let arriving = Arriving::default();
        let piece = PieceIndex(3);
        let arrival = arriving.begin(piece);
        assert_eq!(arriving.after(piece, 0).now_or_never(), None);
        let waits = arriving.after(piece, 2);
        let comes = async {
            tokio::task::yield_now().await;
            arrival.part(&Bytes::from("ab"));
            arrival.part(&Bytes::from("cde"));
        };
        assert_eq!(tokio::join!(waits, comes).0, Bytes::from("cde"));
        assert_eq!(arriving.after(piece, 1).now_or_never(), Some(Bytes::from("b")));
        assert_eq!(arriving.after(piece, 4).now_or_never(), Some(Bytes::from("e")));
        assert_eq!(arriving.after(piece, 5).now_or_never(), None);
        assert_eq!(arriving.after(PieceIndex(4), 0).now_or_never(), None);
        drop(arrival);
        assert_eq!(arriving.after(piece, 0).now_or_never(), None);
    }

    /// They may come in any order, and one may end before the other: what is given is always one response's.
    #[test]
    fn two_runs_that_bring_the_same_piece_are_not_mixed() {
        let (arriving, piece) = (Arriving::default(), PieceIndex(3));
        let first = arriving.begin(piece);
        first.part(&Bytes::from("ab"));
        let second = arriving.begin(piece);
        first.part(&Bytes::from("cd"));
        second.part(&Bytes::from("abc"));
        first.part(&Bytes::from("ef"));
        drop(first);
        assert_eq!(arriving.after(piece, 2).now_or_never(), Some(Bytes::from("c")));
        assert_eq!(arriving.after(piece, 3).now_or_never(), None);
        second.part(&Bytes::from("d"));
        assert_eq!(arriving.after(piece, 3).now_or_never(), Some(Bytes::from("d")));
        drop(second);
        assert_eq!(arriving.after(piece, 0).now_or_never(), None);
    }
}
