//! The places that pieces from peers need while they are on their way here, shared by all pulls.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use darter_swarm::intake::{HELD_FOR, Intake, Pace, Verdict};
use tokio::sync::{oneshot, watch};

/// All places of this node.
#[derive(Debug)]
pub(crate) struct Places {
    desk: Mutex<Desk>,
    /// Counts the places that were given back and that nobody waited for.
    freed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Desk {
    intake: Intake<u64>,
    held: BTreeMap<u64, oneshot::Sender<Place>>,
    made: u64,
}

/// One place, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    bytes: u32,
    pace: Pace,
}

impl Places {
    /// All of them, free.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { desk: Mutex::default(), freed: watch::Sender::new(0) })
    }

    /// A place for a piece of at most so many bytes from a peer of this pace, if there is one now or soon.
    pub(crate) async fn take(self: &Arc<Self>, bytes: u32, pace: Pace) -> Option<Place> {
        let (number, mut place) = {
            let mut desk = self.desk();
            desk.made += 1;
            let number = desk.made;
            match desk.intake.offer(number, bytes, pace) {
                Verdict::Take => return Some(Place { places: self.clone(), bytes, pace }),
                Verdict::Decline => return None,
                Verdict::Hold => {}
            }
            let (give, place) = oneshot::channel();
            desk.held.insert(number, give);
            (number, place)
        };
        let _held = Held { places: self, number };
        match tokio::time::timeout(HELD_FOR, &mut place).await {
            Ok(place) => place.ok(),
            // It may have come at this moment.
            Err(_) => place.try_recv().ok(),
        }
    }

    /// Changes whenever a place is given back that nobody waits for.
    pub(crate) fn freed(&self) -> watch::Receiver<u64> {
        self.freed.subscribe()
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let next = {
            let mut desk = self.places.desk();
            desk.intake.release(self.bytes, self.pace).map(|next| (desk.held.remove(&next.turn), next))
        };
        match next {
            Some((give, next)) => {
                let place = Self { places: self.places.clone(), bytes: next.bytes, pace: next.pace };
                // One that went away meanwhile drops it, and the next has it.
                match give {
                    Some(give) => drop(give.send(place)),
                    None => drop(place),
                }
            }
            None => self.places.freed.send_modify(|freed| *freed += 1),
        }
    }
}

/// A turn that waits for a place; it does so no longer when this is dropped.
struct Held<'a> {
    places: &'a Places,
    number: u64,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut desk = self.places.desk();
        desk.intake.forget(&self.number);
        desk.held.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_swarm::intake::{BYTES_MAX, HELD_MAX, PIECES_MAX};

    #[tokio::test(start_paused = true)]
    async fn who_waits_has_the_place_that_is_given_back() {
        let places = Places::new();
        let mut freed = places.freed();
        let mut taken = Vec::new();
        for _ in 0..PIECES_MAX {
            taken.push(places.take(1, Pace::Usual).await.unwrap());
        }
        let waiting: Vec<_> = (0..HELD_MAX)
            .map(|_| {
                let places = places.clone();
                tokio::spawn(async move { places.take(1, Pace::Usual).await })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(places.take(1, Pace::Usual).await.is_none(), "the next is turned away at once");
        taken.pop();
        let mut waiting = waiting.into_iter();
        taken.push(waiting.next().unwrap().await.unwrap().expect("it has the place"));
        assert!(!freed.has_changed().unwrap(), "there is none for others");
        assert!(places.take(1, Pace::Usual).await.is_none(), "nor after a while");
        // One that gives up while it waits takes no place with it.
        let places_of = places.clone();
        let gone = tokio::spawn(async move { places_of.take(1, Pace::Usual).await });
        tokio::task::yield_now().await;
        gone.abort();
        let _ = gone.await;
        taken.clear();
        assert!(freed.has_changed().unwrap());
        freed.mark_unchanged();
        for _ in 0..PIECES_MAX {
            taken.push(places.take(1, Pace::Usual).await.unwrap());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_given_back_is_what_was_taken_whatever_the_sizes() {
        let places = Places::new();
        for (first, next) in [(1, BYTES_MAX as u32), (BYTES_MAX as u32, 1)] {
            let mut taken = vec![places.take(first, Pace::Usual).await.unwrap()];
            while let Verdict::Take = places.desk().intake.offer(0, 1, Pace::Slow) {
                taken.push(Place { places: places.clone(), bytes: 1, pace: Pace::Slow });
            }
            places.desk().intake.forget(&0);
            let waiting = tokio::spawn({
                let places = places.clone();
                async move { places.take(next, Pace::Usual).await }
            });
            tokio::task::yield_now().await;
            taken.clear();
            drop(waiting.await.unwrap());
            assert_eq!(places.desk().intake.bytes(), 0);
        }
    }
}
