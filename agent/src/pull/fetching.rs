//! How much the pulls of this node fetch from registries, all together.

use tokio::sync::watch;

/// Runs of all pulls.
#[derive(Clone, Debug, Default)]
pub(super) struct Fetching(watch::Sender<usize>);

/// What one pull knows of the others. Dropped, it has none itself.
#[derive(Debug)]
pub(super) struct Share {
    all: Fetching,
    own: usize,
    changes: watch::Receiver<usize>,
}

impl Fetching {
    /// The share of a pull that fetches nothing yet.
    pub(super) fn share(&self) -> Share {
        Share { all: self.clone(), own: 0, changes: self.0.subscribe() }
    }
}

impl Share {
    /// Runs that the others have.
    pub(super) fn elsewhere(&self) -> usize {
        self.all.0.borrow().saturating_sub(self.own)
    }

    /// Tells how many this one has.
    pub(super) fn set(&mut self, own: usize) {
        let before = std::mem::replace(&mut self.own, own);
        if before != own {
            self.all.0.send_modify(|all| *all = (*all + own).saturating_sub(before));
        }
    }

    /// Waits until another number of runs is open.
    pub(super) async fn changed(&mut self) {
        // The sender is held by this very share.
        let _ = self.changes.changed().await;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pulls_know_what_the_others_fetch_until_those_end() {
        let all = Fetching::default();
        let (mut one, mut other) = (all.share(), all.share());
        one.set(2);
        other.changed().await;
        assert_eq!((one.elsewhere(), other.elsewhere()), (0, 2));
        other.set(1);
        assert_eq!(one.elsewhere(), 1);
        drop(one);
        assert_eq!((other.elsewhere(), all.share().elsewhere()), (0, 1));
    }
}
