//! The places that pieces from peers need while they are on their way here, shared by all pulls.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use darter_swarm::intake::{BYTES_MAX, Intake, Pace};
use tokio::sync::Notify;

/// All places of this node.
#[derive(Debug, Default)]
pub(crate) struct Places {
    desk: Mutex<Desk>,
}

#[derive(Debug, Default)]
struct Desk {
    intake: Intake,
    /// Pulls that wait for room, in the order in which they came.
    waiting: VecDeque<Waiting>,
    /// Places that were given back and that nobody was told of, no more than there are.
    spare: usize,
}

#[derive(Debug)]
struct Waiting {
    bytes: u32,
    told: Arc<Notify>,
}

/// Where one pull waits for room.
#[derive(Debug)]
pub(crate) struct Seat {
    places: Arc<Places>,
    /// The largest piece that it may ask for.
    bytes: u32,
    waits: bool,
    told: Arc<Notify>,
}

/// One place, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    bytes: u32,
    pace: Pace,
}

impl Places {
    /// A place for a piece of at most so many bytes from a peer of this pace, if there is one now.
    pub(crate) fn take(self: &Arc<Self>, bytes: u32, pace: Pace) -> Option<Place> {
        let mut desk = self.desk();
        if !desk.intake.take(bytes, pace) {
            return None;
        }
        desk.spare = desk.spare.min(desk.intake.left());
        Some(Place { places: self.clone(), bytes, pace })
    }

    /// Where a pull may wait whose pieces have at most so many bytes.
    pub(crate) fn seat(self: &Arc<Self>, bytes: u32) -> Seat {
        Seat { places: self.clone(), bytes, waits: false, told: Arc::default() }
    }

    /// What comes from peers, in bytes per second, as far as that is known.
    pub(crate) fn rate(&self) -> Option<u64> {
        self.desk().intake.rate(Instant::now())
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desk {
    /// There is one more place to tell of.
    fn offer(&mut self) {
        self.spare += 1;
        self.tell();
        // What only slow peers may use is told of, but not remembered.
        self.spare = self.spare.min(self.intake.left());
    }

    /// Tells those who wait of what is there. While the first of them needs more bytes than there are the others wait as well, or it
    /// would never have its turn.
    fn tell(&mut self) {
        let mut promised = 0;
        while self.spare > 0
            && let Some(Waiting { bytes, told }) = self.waiting.front()
            && (promised == 0 && self.intake.fits(*bytes)
                || self.intake.bytes() + promised + u64::from(*bytes) <= BYTES_MAX)
        {
            promised += u64::from(*bytes);
            told.notify_one();
            self.waiting.pop_front();
            self.spare -= 1;
        }
    }
}

impl Seat {
    /// Waits until it is this pull's turn to use a place. Cancelled, it keeps its position.
    pub(crate) async fn room(&mut self) {
        if !std::mem::replace(&mut self.waits, true) {
            let mut desk = self.places.desk();
            desk.waiting.push_back(Waiting { bytes: self.bytes, told: self.told.clone() });
            desk.tell();
        }
        self.told.notified().await;
        self.waits = false;
    }

    /// Does not wait any more.
    pub(crate) fn leave(&mut self) {
        if !std::mem::take(&mut self.waits) {
            return;
        }
        let mut desk = self.places.desk();
        let before = desk.waiting.len();
        desk.waiting.retain(|waiting| !Arc::ptr_eq(&waiting.told, &self.told));
        if desk.waiting.len() == before {
            // Told meanwhile.
            desk.offer();
            self.told = Arc::default();
        } else {
            // Whoever is behind it may need less.
            desk.tell();
        }
    }

    /// Leaves a place to the next of which it was told.
    pub(crate) fn pass_on(&self) {
        self.places.desk().offer();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Place {
    /// What it was taken for has come, so many bytes.
    pub(crate) fn came(&self, bytes: u32) {
        self.places.desk().intake.came(bytes, Instant::now());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut desk = self.places.desk();
        desk.intake.release(self.bytes, self.pace);
        desk.offer();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use darter_swarm::intake::PIECES_MAX;

    /// Whether it is told of a place, looked at as a loop does that has other things to do as well.
    fn told(seat: &mut Seat) -> bool {
        std::pin::pin!(seat.room()).now_or_never().is_some()
    }

    fn full(places: &Arc<Places>, bytes: u32) -> Vec<Place> {
        (0..).map_while(|_| places.take(bytes, Pace::Usual)).collect()
    }

    #[test]
    fn of_those_who_wait_one_is_told_of_each_place_in_their_order() {
        let places = Arc::new(Places::default());
        let mut taken = full(&places, 1);
        assert_eq!(taken.len(), PIECES_MAX);
        let mut seats = [0; 3].map(|_| places.seat(1));
        // However often one looks, it stays before the others.
        let look = |seats: &mut [Seat; 3]| [2, 1, 0, 0].map(|which| told(&mut seats[which]));
        assert_eq!(look(&mut seats), [false; 4]);
        taken.pop();
        assert_eq!(look(&mut seats), [true, false, false, false]);
        assert!(places.take(1, Pace::Usual).is_some(), "it asks, and gets it");
        assert_eq!(look(&mut seats), [false, true, false, false], "which is given back");
        taken.truncate(2);
        assert_eq!(look(&mut seats), [true, false, true, false], "two at once are told to two");
    }

    #[test]
    fn a_place_is_told_to_another_where_the_first_has_no_use_for_it() {
        let places = Arc::new(Places::default());
        let mut taken = full(&places, 1);
        let [mut first, mut second, mut third] = [0; 3].map(|_| places.seat(1));
        for seat in [&mut first, &mut second, &mut third] {
            assert!(!told(seat));
        }
        taken.pop();
        assert!(told(&mut first) && !told(&mut second));
        first.pass_on();
        // Told, it goes away before it looks.
        drop(second);
        assert!(told(&mut third));
    }

    #[test]
    fn what_nobody_waits_for_is_remembered_until_it_is_taken() {
        let places = Arc::new(Places::default());
        let mut taken = full(&places, 1);
        let mut late = places.seat(1);
        taken.truncate(PIECES_MAX - 2);
        assert!(told(&mut late));
        taken.extend(places.take(1, Pace::Usual));
        assert!(told(&mut late), "of the other");
        taken.extend(places.take(1, Pace::Usual));
        assert!(!told(&mut late));
        taken.pop();
        assert!(told(&mut late));
        // One that is taken before anybody waits is not told of.
        taken.pop();
        taken.extend(places.take(1, Pace::Usual));
        taken.extend(places.take(1, Pace::Usual));
        assert!(taken.len() == PIECES_MAX && !told(&mut late));
    }

    #[test]
    fn whoever_needs_many_bytes_has_its_turn() {
        let places = Arc::new(Places::default());
        let mut taken = full(&places, BYTES_MAX as u32 / 4);
        assert_eq!(taken.len(), 4);
        let [mut large, mut small] = [BYTES_MAX as u32, 1].map(|bytes| places.seat(bytes));
        assert!(!told(&mut large) && !told(&mut small));
        for _ in 0..3 {
            taken.pop();
            assert!(!told(&mut large) && !told(&mut small), "one after the other");
        }
        taken.pop();
        assert!(told(&mut large) && !told(&mut small), "nobody takes it from under its eyes");
        taken.extend(places.take(BYTES_MAX as u32, Pace::Usual));
        drop(taken);
        assert!(told(&mut small));
    }

    #[test]
    fn what_is_given_back_is_what_was_taken_whatever_the_sizes() {
        let places = Arc::new(Places::default());
        for bytes in [[1, BYTES_MAX as u32], [BYTES_MAX as u32, 1]] {
            for pace in [[Pace::Usual, Pace::Slow], [Pace::Slow, Pace::Usual]] {
                let taken: Vec<_> = bytes.into_iter().zip(pace).filter_map(|(n, pace)| places.take(n, pace)).collect();
                assert!(!taken.is_empty());
                drop(taken);
                assert_eq!(places.desk().intake.bytes(), 0);
            }
        }
    }
}
