//! Which blobs have to go. Least recently used first, never one that somebody holds.
//!
//! Not here: files. This module decides; [`Store`](super::Store) removes.

use std::time::Duration;

use darter_tracker::TaskId;

/// The bounds of the cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of all blobs together.
    pub(super) max_bytes: u64,
    /// Bytes that are left to others on the file system.
    pub(super) min_free_bytes: u64,
    /// How long a blob is kept that nobody uses.
    pub(super) idle: Duration,
}

/// A blob that may have to go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) task: TaskId,
    pub(super) bytes: u64,
    pub(super) idle: Duration,
    /// Somebody holds it.
    pub(super) in_use: bool,
    /// Poisoned: there is nothing to keep.
    pub(super) void: bool,
}

/// What has to go so that a blob of `wanted` bytes has room; `None`, and nothing should go, if it would not be enough.
pub(super) fn room_for(
    wanted: u64,
    candidates: Vec<Candidate>,
    limits: &Limits,
    free_bytes: u64,
) -> Option<Vec<TaskId>> {
    let over = excess(wanted, &candidates, limits, free_bytes);
    let evictable: u64 = candidates.iter().filter(|blob| !blob.in_use).map(|blob| blob.bytes).sum();
    (over <= evictable).then(|| shed(candidates, over))
}

/// What has to go by itself: what nobody has used for too long, then what is over the limits, as far as possible.
pub(super) fn overdue(candidates: Vec<Candidate>, limits: &Limits, free_bytes: u64) -> Vec<TaskId> {
    let (expired, rest): (Vec<_>, Vec<_>) =
        candidates.into_iter().partition(|blob| !blob.in_use && (blob.void || blob.idle > limits.idle));
    let freed: u64 = expired.iter().map(|blob| blob.bytes).sum();
    let over = excess(0, &rest, limits, free_bytes.saturating_add(freed));
    let mut gone: Vec<TaskId> = expired.into_iter().map(|blob| blob.task).collect();
    gone.extend(shed(rest, over));
    gone
}

/// By how many bytes the cache would be over one of its limits.
fn excess(wanted: u64, candidates: &[Candidate], limits: &Limits, free_bytes: u64) -> u64 {
    let total = candidates.iter().fold(wanted, |sum, blob| sum.saturating_add(blob.bytes));
    let over_size = total.saturating_sub(limits.max_bytes);
    let over_free = limits.min_free_bytes.saturating_add(wanted).saturating_sub(free_bytes);
    over_size.max(over_free)
}

fn shed(mut candidates: Vec<Candidate>, over: u64) -> Vec<TaskId> {
    candidates.retain(|blob| !blob.in_use && blob.bytes > 0);
    candidates.sort_by_key(|blob| std::cmp::Reverse(blob.idle));
    let mut freed = 0_u64;
    candidates
        .into_iter()
        .take_while(|blob| {
            let needed = freed < over;
            freed = freed.saturating_add(blob.bytes);
            needed
        })
        .map(|blob| blob.task)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_tracker::Digest;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits { max_bytes: 100, min_free_bytes: 10, idle: Duration::from_secs(60) };

    fn blob(id: u8, bytes: u64, idle: u64, in_use: bool) -> Candidate {
        let task = TaskId::blob(Digest::Sha256([id; 32]));
        Candidate { task, bytes, idle: Duration::from_secs(idle), in_use, void: false }
    }

    fn ids(tasks: Vec<TaskId>) -> Vec<u8> {
        tasks.iter().map(|task| task.digest().as_bytes()[0]).collect()
    }

    #[test]
    fn the_least_recently_used_goes_first_and_only_as_much_as_needed() {
        let cache = || vec![blob(1, 40, 5, false), blob(2, 40, 9, false), blob(3, 20, 50, true)];
        for (wanted, free, gone) in [
            (0, 1000, Some(vec![])),
            (1, 1000, Some(vec![2])),
            (40, 1000, Some(vec![2])),
            (41, 1000, Some(vec![2, 1])),
            (80, 1000, Some(vec![2, 1])),
            (81, 1000, None),
            (0, 9, Some(vec![2])),
            (40, 10, Some(vec![2])),
            (40, 9, Some(vec![2, 1])),
            (80, 9, None),
            (u64::MAX, 1000, None),
        ] {
            assert_eq!(room_for(wanted, cache(), &LIMITS, free).map(ids), gone, "{wanted} {free}");
        }
    }

    #[test]
    fn idle_blobs_go_by_themselves() {
        let cache = vec![blob(1, 60, 61, false), blob(2, 60, 61, true), blob(3, 30, 60, false), blob(4, 30, 7, false)];
        assert_eq!(ids(overdue(cache, &LIMITS, 1000)), [1, 3]);
        let void = Candidate { void: true, ..blob(1, 0, 0, false) };
        assert_eq!(ids(overdue(vec![void, blob(2, 30, 0, false)], &LIMITS, 1000)), [1]);
        assert_eq!(ids(overdue(vec![blob(1, 60, 61, false), blob(2, 10, 1, false)], &LIMITS, 0)), [1]);
    }

    proptest! {
        #[test]
        fn room_is_room(
            cache in prop::collection::vec((0..50u64, 0..100u64, any::<bool>()), 0..12),
            wanted in 0..150u64, free in 0..300u64,
        ) {
            let cache: Vec<_> =
                cache.into_iter().zip(0u8..).map(|((bytes, idle, used), id)| blob(id, bytes, idle, used)).collect();
            let fits = |gone: &[TaskId]| {
                let (out, stay): (Vec<Candidate>, Vec<Candidate>) = cache.iter().copied().partition(|blob| gone.contains(&blob.task));
                let freed: u64 = out.iter().map(|blob| blob.bytes).sum();
                let kept: u64 = stay.iter().map(|blob| blob.bytes).sum();
                kept + wanted <= LIMITS.max_bytes && free + freed >= LIMITS.min_free_bytes + wanted
            };
            let evictable: Vec<_> = cache.iter().filter(|blob| !blob.in_use).map(|blob| blob.task).collect();
            match room_for(wanted, cache.clone(), &LIMITS, free) {
                Some(gone) => {
                    prop_assert!(fits(&gone));
                    prop_assert!(gone.iter().all(|task| evictable.contains(task)));
                    if let Some((_, fewer)) = gone.split_last() {
                        prop_assert!(!fits(fewer));
                    }
                }
                None => prop_assert!(!fits(&evictable)),
            }
        }
    }
}
