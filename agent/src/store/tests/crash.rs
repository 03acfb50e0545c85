//! Kills, power cuts and rot.

use proptest::prelude::*;

use super::*;

/// What another process would find if this one were killed now: the kernel has the same files.
///
/// Copying takes time and a kill does not, so nothing is moved meanwhile; a move cut in two is a test of its own.
fn snapshot(store: &Store, from: &Path) -> tempfile::TempDir {
    let _disk = lock(&store.context.disk);
    fn copy(from: &Path, to: &Path) {
        use std::os::unix::fs::DirBuilderExt;
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                std::fs::DirBuilder::new().mode(0o700).create(&target).unwrap();
                copy(&entry.path(), &target);
            } else {
                std::fs::copy(entry.path(), target).unwrap();
            }
        }
    }
    let to = tempfile::tempdir().unwrap();
    copy(from, to.path());
    to
}

fn held(store: &Store, content: &Content) -> Vec<u32> {
    store.find(&content.task).map(|blob| blob.held().iter().map(|piece| piece.0).collect()).unwrap_or_default()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn journal(dir: &Path, content: &Content) -> std::path::PathBuf {
    path(dir, content, Place::Partial).with_extension("journal")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_kill_at_any_step_loses_nothing_that_was_written(
        length in 1..6 * PIECE, order in prop::collection::vec(any::<prop::sample::Index>(), 1..10),
    ) {
        let content = Content::new(length, 1);
        let dir = tempfile::tempdir().unwrap();
        block_on(async {
            let store = open(dir.path());
            let blob = store.create(&content.task, content.geometry).unwrap();
            let mut written = std::collections::BTreeSet::new();
            for pick in order {
                let piece = pick.index(content.geometry.pieces() as usize) as u32;
                assert_eq!(content.write(&blob, piece).await, written.insert(piece));
                let killed = snapshot(&store, dir.path());
                let store = open(killed.path());
                assert_eq!(held(&store, &content), written.iter().copied().collect::<Vec<_>>());
                // And goes on to the end from there.
                let blob = store.create(&content.task, content.geometry).unwrap();
                let mut reader = blob.reader(0..length);
                content.write_all(&blob).await;
                assert!(drain(&mut reader).await.0 == content.bytes);
            }
        });
    }

    #[test]
    fn a_torn_journal_and_flipped_bits_cost_only_what_they_hit(
        pieces in 2..8u32, cut in any::<Option<prop::sample::Index>>(),
        flips in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
    ) {
        let content = Content::new(u64::from(pieces) * PIECE - 3, 2);
        let dir = tempfile::tempdir().unwrap();
        block_on(async {
            // The last piece is missing, so that the blob stays a partial.
            let store = open(dir.path());
            let blob = store.create(&content.task, content.geometry).unwrap();
            for piece in 0..pieces - 1 {
                content.write(&blob, piece).await;
            }
            store.close().await;
        });
        let file = std::fs::File::options().write(true).open(journal(dir.path(), &content)).unwrap();
        let length = file.metadata().unwrap().len();
        let kept = cut.map_or(length, |cut| cut.index(length as usize) as u64);
        file.set_len(kept).unwrap();
        let mut expected: std::collections::BTreeSet<u32> =
            (0..pieces - 1).filter(|piece| super::journal::slot(PieceIndex(piece + 1)) <= kept).collect();
        if kept < super::journal::HEADER_BYTES as u64 {
            expected.clear();
        }
        for flipped in flips {
            let at = flipped.index(((pieces - 1) as u64 * PIECE) as usize) as u64;
            flip(&path(dir.path(), &content, Place::Partial), at);
            // Two flips of one bit heal it, and then nothing is wrong.
            let now = std::fs::read(path(dir.path(), &content, Place::Partial)).unwrap();
            let piece = (at / PIECE) as u32;
            let range = (u64::from(piece) * PIECE) as usize..((u64::from(piece) + 1) * PIECE) as usize;
            if now[range.clone()] != content.bytes[range] {
                expected.remove(&piece);
            } else if super::journal::slot(PieceIndex(piece + 1)) <= kept && kept >= super::journal::HEADER_BYTES as u64 {
                expected.insert(piece);
            }
        }
        block_on(async {
            let store = open(dir.path());
            assert_eq!(held(&store, &content), expected.iter().copied().collect::<Vec<_>>());
            let blob = store.create(&content.task, content.geometry).unwrap();
            let mut reader = blob.reader(0..u64::MAX);
            content.write_all(&blob).await;
            assert!(drain(&mut reader).await.0 == content.bytes);
        });
    }
}

#[tokio::test]
async fn a_partial_that_was_whole_is_hashed_and_published_after_the_restart() {
    let dir = tempfile::tempdir().unwrap();
    let content = Content::new(5 * PIECE, 3);
    let store = open(dir.path());
    store.context.stopping.store(true, Ordering::Relaxed);
    let blob = store.create(&content.task, content.geometry).unwrap();
    content.write_all(&blob).await;
    assert_eq!(blob.state().borrow().outcome, Outcome::Incomplete);
    let killed = snapshot(&store, dir.path());
    let metrics = Arc::new(Metrics::default());
    let store = Store::open(settings(killed.path()), metrics).unwrap();
    let blob = store.find(&content.task).unwrap();
    outcome(&blob, Outcome::Complete).await;
    published(&blob).await;
}

#[tokio::test]
async fn a_truncated_or_zeroed_partial_keeps_what_survives() {
    let dir = tempfile::tempdir().unwrap();
    let content = Content::new(4 * PIECE, 4);
    {
        let store = open(dir.path());
        let blob = store.create(&content.task, content.geometry).unwrap();
        for piece in 0..3 {
            content.write(&blob, piece).await;
        }
        store.close().await;
    }
    let file = std::fs::File::options().write(true).open(path(dir.path(), &content, Place::Partial)).unwrap();
    file.set_len(2 * PIECE + 1).unwrap();
    let store = open(dir.path());
    assert_eq!(held(&store, &content), [0, 1]);
    assert_eq!(file.metadata().unwrap().len(), 4 * PIECE);
}

#[tokio::test]
async fn a_crash_between_the_renames_is_completed() {
    use std::os::unix::fs::DirBuilderExt;
    for journal_moved in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::new(2 * PIECE, 5);
        {
            let store = open(dir.path());
            content.store(&store).await;
            store.close().await;
        }
        let (partial, blob) = (path(dir.path(), &content, Place::Partial), path(dir.path(), &content, Place::Blobs));
        if journal_moved {
            std::fs::rename(&blob, &partial).unwrap();
        } else {
            std::fs::rename(blob.with_extension("pieces"), partial.with_extension("journal")).unwrap();
        }
        let store = open(dir.path());
        let found = store.find(&content.task).unwrap();
        assert_eq!(found.state().borrow().outcome, Outcome::Complete);
        assert!(drain(&mut found.reader(0..2 * PIECE)).await.0 == content.bytes);
        assert!(!partial.exists() && !partial.with_extension("journal").exists());
        assert!(std::fs::DirBuilder::new().mode(0o700).create(blob.parent().unwrap()).is_err());
    }
}

#[tokio::test]
async fn files_without_their_other_half_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let content = Content::new(2 * PIECE, 6);
    drop(open(dir.path()));
    let partial = path(dir.path(), &content, Place::Partial);
    std::fs::write(&partial, b"bytes nobody vouches for").unwrap();
    std::fs::write(dir.path().join("partial/sha256/README"), b"not ours").unwrap();
    let store = open(dir.path());
    assert!(store.tasks().is_empty() && !partial.exists());
    assert!(dir.path().join("partial/sha256/README").exists());
}

#[tokio::test]
async fn a_blob_of_another_size_or_version_is_dropped() {
    for version in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::new(2 * PIECE, 7);
        {
            let store = open(dir.path());
            content.store(&store).await;
            store.close().await;
        }
        let blob = path(dir.path(), &content, Place::Blobs);
        if version {
            flip(&blob.with_extension("pieces"), 8);
        } else {
            std::fs::File::options().write(true).open(&blob).unwrap().set_len(PIECE).unwrap();
        }
        let store = open(dir.path());
        assert!(store.find(&content.task).is_none() && !blob.exists());
    }
}

#[tokio::test]
async fn rot_in_a_published_blob_costs_one_piece() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(4 * PIECE, 8);
    let blob = content.store(&store).await;
    flip(&path(dir.path(), &content, Place::Blobs), PIECE + 1);
    assert!(blob.piece(PieceIndex(0)).await.is_ok());
    assert!(matches!(blob.piece(PieceIndex(1)).await, Err(StoreError::NotHeld { piece: PieceIndex(1) })));
    assert_eq!(held(&store, &content), [0, 2, 3]);
    let progress = *blob.state().borrow();
    assert_eq!((progress.outcome, progress.lost, progress.held), (Outcome::Incomplete, 1, 3));
    assert!(!path(dir.path(), &content, Place::Blobs).exists());
    // The same is found after a kill.
    let killed = snapshot(&store, dir.path());
    assert_eq!(held(&open(killed.path()), &content), [0, 2, 3]);

    let mut reader = blob.reader(0..4 * PIECE);
    assert!(content.write(&blob, 1).await);
    let (bytes, error) = drain(&mut reader).await;
    assert!(error.is_none() && bytes == content.bytes);
    published(&blob).await;
}

#[tokio::test]
async fn a_reader_never_gives_rot_out() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::cut(4 * 1024 * 1024, 1024 * 1024, 9);
    let blob = content.store(&store).await;
    // In the last chunk of the second piece: none of that piece may leave.
    flip(&path(dir.path(), &content, Place::Blobs), 2 * 1024 * 1024 - 1);
    let mut reader = blob.reader(0..u64::MAX);
    let (bytes, error) = drain(&mut reader).await;
    assert!(matches!(error, Some(StoreError::Lost)), "{error:?}");
    assert!(error.is_some_and(|error| error.is_disk()));
    assert!(bytes == content.bytes[..1024 * 1024]);
    assert_eq!(reader.offset(), 1024 * 1024);
    // One that waits for a lost piece hears of it, too, instead of waiting for somebody who does not know.
    assert!(matches!(next(&mut reader).await, Err(StoreError::Lost)));
    let mut rest = blob.reader(reader.offset()..u64::MAX);
    content.write(&blob, 1).await;
    assert!(drain(&mut rest).await.0 == content.bytes[1024 * 1024..]);
}
