//! The places that pieces from peers need while they are on their way here, shared by all pulls.

use std::sync::{Arc, Mutex, PoisonError};

use darter_swarm::intake::Intake;
use tokio::sync::watch;

/// All places of this node.
#[derive(Debug)]
pub(crate) struct Places {
    intake: Mutex<Intake>,
    /// Counts the places that were given back.
    freed: watch::Sender<u64>,
}

/// One place, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    bytes: u32,
}

impl Places {
    /// All of them, free.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { intake: Mutex::default(), freed: watch::Sender::new(0) })
    }

    /// A place for a piece of at most so many bytes, if there is one.
    pub(crate) fn take(self: &Arc<Self>, bytes: u32) -> Option<Place> {
        let admitted = self.intake.lock().unwrap_or_else(PoisonError::into_inner).admit(bytes);
        admitted.then(|| Place { places: self.clone(), bytes })
    }

    /// Changes whenever a place is given back.
    pub(crate) fn freed(&self) -> watch::Receiver<u64> {
        self.freed.subscribe()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.intake.lock().unwrap_or_else(PoisonError::into_inner).release(self.bytes);
        self.places.freed.send_modify(|freed| *freed += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_swarm::intake::PIECES_MAX;

    #[test]
    fn a_place_is_free_again_when_it_is_dropped_and_others_hear_of_it() {
        let places = Places::new();
        let freed = places.freed();
        let mut taken: Vec<Place> = std::iter::from_fn(|| places.take(1)).collect();
        assert_eq!(taken.len(), PIECES_MAX);
        assert!(!freed.has_changed().unwrap());
        taken.pop();
        assert!(freed.has_changed().unwrap());
        assert!(places.take(1).is_some());
    }
}
