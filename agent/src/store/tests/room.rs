//! Limits, eviction and what is told of it.

use super::*;

fn bounded(dir: &Path, pieces: u64) -> (Arc<Store>, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::default());
    let settings = Settings { max_bytes: pieces * PIECE, idle: Duration::from_secs(60), ..settings(dir) };
    (Store::open(settings, Arc::clone(&metrics)).unwrap(), metrics)
}

fn present(store: &Store, contents: &[&Content]) -> Vec<bool> {
    let tasks: Vec<TaskId> = store.tasks().into_iter().map(|(task, ..)| task).collect();
    contents.iter().map(|content| tasks.contains(&content.task)).collect()
}

#[tokio::test]
async fn the_least_recently_used_makes_room_and_others_hear_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, metrics) = bounded(dir.path(), 6);
    let mut removed = store.removed();
    let [a, b, c, d] = [1, 2, 3, 4].map(|seed| Content::new(2 * PIECE, seed));
    for content in [&a, &b, &c] {
        drop(content.store(&store).await);
    }
    settled(&store.context).await;
    assert!(store.find(&a.task).is_some());
    settled(&store.context).await;
    drop(d.store(&store).await);
    assert_eq!(present(&store, &[&a, &b, &c, &d]), [true, false, true, true]);
    assert_eq!(removed.try_recv(), Ok(b.task));
    assert!(removed.try_recv().is_err());
    assert_eq!(metrics.evictions.get(), 1);
    assert!(!path(dir.path(), &b, Place::Blobs).exists());
    assert!(!path(dir.path(), &b, Place::Blobs).with_extension("pieces").exists());
}

#[tokio::test]
async fn what_is_in_use_stays_and_nothing_is_evicted_in_vain() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = bounded(dir.path(), 6);
    let [a, b, c] = [1, 2, 3].map(|seed| Content::new(2 * PIECE, seed));
    let reader = a.store(&store).await.reader(0..PIECE);
    drop(b.store(&store).await);
    let pulled = store.create(&c.task, c.geometry).unwrap();
    settled(&store.context).await;
    let large = Content::new(3 * PIECE, 5);
    assert!(matches!(store.create(&large.task, large.geometry), Err(StoreError::Full { bytes }) if bytes == 3 * PIECE));
    assert_eq!(present(&store, &[&a, &b]), [true, true], "evicting all that may go would not have been enough");
    let small = Content::new(PIECE, 6);
    drop(store.create(&small.task, small.geometry).unwrap());
    assert_eq!(present(&store, &[&a, &b]), [true, false]);
    // A use by a reader or a pull outlasts idleness.
    store.sweep_at(Instant::now() + Duration::from_secs(3600));
    assert!(store.find(&a.task).is_some() && store.find(&c.task).is_some() && store.find(&small.task).is_none());
    drop((reader, pulled));
    settled(&store.context).await;
    store.sweep_at(Instant::now() + Duration::from_secs(3600));
    assert!(store.find(&a.task).is_none() && store.find(&c.task).is_none());
    assert!(!path(dir.path(), &c, Place::Partial).exists(), "partials go, too");
}

#[tokio::test]
async fn a_sweep_takes_what_is_idle_and_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = bounded(dir.path(), 100);
    let content = Content::new(PIECE, 1);
    drop(content.store(&store).await);
    settled(&store.context).await;
    store.sweep_at(Instant::now() + Duration::from_secs(50));
    assert!(store.find(&content.task).is_some());
    store.sweep().await;
    settled(&store.context).await;
    assert!(store.find(&content.task).is_some());
    settled(&store.context).await;
    store.sweep_at(Instant::now() + Duration::from_secs(70));
    assert!(store.find(&content.task).is_none());
}

#[tokio::test]
async fn a_disk_that_is_too_full_takes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings { min_free_bytes: u64::MAX / 2, ..settings(dir.path()) };
    let store = Store::open(settings, Arc::default()).unwrap();
    let content = Content::new(PIECE, 1);
    let full = store.create(&content.task, content.geometry);
    assert!(matches!(full, Err(StoreError::Full { .. })), "{full:?}");
    assert!(full.is_err_and(|error| error.is_disk()));
    let (none, _) = bounded(&dir.path().join("none"), 0);
    assert!(matches!(none.create(&content.task, content.geometry), Err(StoreError::Full { .. })));
}

#[tokio::test]
async fn the_order_of_use_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b, c] = [1, 2, 3].map(|seed| Content::new(2 * PIECE, seed));
    {
        let (store, _) = bounded(dir.path(), 4);
        drop(a.store(&store).await);
        drop(b.store(&store).await);
        store.close().await;
    }
    // As after an hour in which only `a` was used, and a night switched off.
    for (content, hours) in [(&a, 10), (&b, 11)] {
        let journal = path(dir.path(), content, Place::Blobs).with_extension("pieces");
        let file = std::fs::File::options().write(true).open(journal).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
    }
    let (store, _) = bounded(dir.path(), 4);
    drop(c.store(&store).await);
    assert_eq!(present(&store, &[&a, &b, &c]), [true, false, true]);
    settled(&store.context).await;
    store.sweep_at(Instant::now());
    assert!(store.find(&a.task).is_some(), "the night does not count");
}

#[tokio::test]
async fn another_cut_replaces_a_partial_that_nobody_uses() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let small = Content::cut(4 * PIECE, PIECE, 1);
    let large = Content::cut(4 * PIECE, 2 * PIECE, 1);
    let blob = store.create(&small.task, small.geometry).unwrap();
    small.write(&blob, 1).await;
    let refused = store.create(&large.task, large.geometry);
    assert!(matches!(refused, Err(StoreError::Geometry { held }) if held == small.geometry), "{refused:?}");
    drop((blob, refused));
    settled(&store.context).await;
    let blob = large.store(&store).await;
    // A blob that is there is there, however somebody would have cut it.
    assert!(Arc::ptr_eq(&store.create(&small.task, small.geometry).unwrap(), &blob));
    let longer = Geometry::new(5 * PIECE, small.geometry.piece_size()).unwrap();
    assert!(matches!(store.create(&small.task, longer), Err(StoreError::Geometry { .. })));
}
