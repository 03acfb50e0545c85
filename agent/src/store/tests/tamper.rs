//! A directory that is not as we left it.

use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;
use crate::admin::metrics::PieceOrigin;

fn refusal(dir: &Path) -> StoreError {
    Store::open(settings(dir), Arc::default()).expect_err("the directory is refused")
}

#[test]
fn s5_the_directory_must_be_ours_and_closed_to_others() {
    let top = tempfile::tempdir().unwrap();
    let dir = top.path().join("deep/cache");
    drop(open(&dir));
    for made in [dir.clone(), dir.join("partial/sha256"), dir.join("blobs")] {
        assert_eq!(made.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    }
    for (path, mode) in [(dir.clone(), 0o770), (dir.clone(), 0o702), (dir.join("blobs/sha512"), 0o720)] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        let error = refusal(&dir);
        assert!(matches!(&error, StoreError::Refused { path: named, .. } if *named == path), "{error}");
        assert!(error.to_string().contains("is writable by its group or by everybody"), "{error}");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
    }
    drop(open(&dir));
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&dir, Some(12345), None).unwrap();
        assert!(refusal(&dir).to_string().contains("belongs to another user"));
    }
}

#[test]
fn s5_links_are_refused_wherever_they_stand() {
    let top = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let dir = top.path().join("cache");
    symlink(elsewhere.path(), &dir).unwrap();
    for spelled in [dir.clone(), Path::new(&format!("{}/", dir.display())).to_path_buf()] {
        assert!(matches!(refusal(&spelled), StoreError::Refused { .. }));
    }
    std::fs::remove_file(&dir).unwrap();
    symlink(top.path().join("nowhere"), &dir).unwrap();
    assert!(matches!(refusal(&dir), StoreError::Refused { .. }));
    std::fs::remove_file(&dir).unwrap();
    std::fs::write(&dir, b"a file").unwrap();
    assert!(matches!(refusal(&dir), StoreError::Refused { .. }));
    std::fs::remove_file(&dir).unwrap();

    drop(open(&dir));
    for inside in ["partial", "blobs", "partial/sha256", "blobs/sha256/ab"] {
        let path = dir.join(inside);
        drop(std::fs::remove_dir_all(&path));
        symlink(elsewhere.path(), &path).unwrap();
        let error = refusal(&dir);
        assert!(matches!(&error, StoreError::Refused { path: named, .. } if *named == path), "{inside}: {error}");
        std::fs::remove_file(&path).unwrap();
        drop(open(&dir));
    }
    assert_eq!(elsewhere.path().read_dir().unwrap().count(), 0);
}

#[tokio::test]
async fn s5_links_under_a_blobs_name_are_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let content = Content::new(2 * PIECE, 1);
    drop(open(dir.path()));
    let victim = dir.path().join("victim");
    std::fs::write(&victim, b"precious").unwrap();
    let partial = path(dir.path(), &content, Place::Partial);
    symlink(&victim, &partial).unwrap();
    symlink(&victim, partial.with_extension("journal")).unwrap();
    let store = open(dir.path());
    assert!(store.find(&content.task).is_none());
    let blob = content.store(&store).await;
    assert!(drain(&mut blob.reader(0..u64::MAX)).await.0 == content.bytes);
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
    // In the place of a published blob: what the link leads to is never read.
    let published = path(dir.path(), &content, Place::Blobs);
    std::fs::remove_file(&published).unwrap();
    symlink(&victim, &published).unwrap();
    settled(&store.context).await;
    assert!(matches!(blob.piece(PieceIndex(0)).await, Err(StoreError::NotHeld { .. })));
    assert!(store.find(&content.task).is_none() && !published.is_symlink() && victim.exists());
}

#[test]
fn one_process_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    assert!(matches!(refusal(dir.path()), StoreError::InUse { .. }));
    drop(first);
    drop(open(dir.path()));
}

#[tokio::test]
async fn files_that_are_removed_under_us_are_not_held() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut removed = store.removed();
    let [whole, part] = [1, 2].map(|seed| Content::new(2 * PIECE, seed));
    let whole_blob = whole.store(&store).await;
    let part_blob = store.create(&part.task, part.geometry).unwrap();
    part.write(&part_blob, 0).await;
    // Open files are still good.
    settled(&store.context).await;
    std::fs::remove_file(path(dir.path(), &whole, Place::Blobs)).unwrap();
    std::fs::remove_file(path(dir.path(), &part, Place::Partial).with_extension("journal")).unwrap();
    for (content, blob) in [(&whole, &whole_blob), (&part, &part_blob)] {
        let mut reader = blob.reader(0..2 * PIECE);
        assert!(matches!(blob.piece(PieceIndex(0)).await, Err(StoreError::NotHeld { .. })));
        assert!(matches!(next(&mut reader).await, Err(StoreError::Gone)));
        assert!(store.find(&content.task).is_none());
        assert_eq!(removed.try_recv(), Ok(content.task));
        assert_eq!(blob.state().borrow().outcome, Outcome::Gone);
    }
    assert_eq!(walk(dir.path()), Vec::<std::path::PathBuf>::new());
    // And the cache goes on.
    let again = store.create(&whole.task, whole.geometry).unwrap();
    assert!(again.held().is_empty());
}

/// The files below a directory.
fn walk(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in dir.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}

/// Puts files that fail into the place of a blob's own, for as long as what is returned lives.
fn sabotage(blob: &Arc<Blob>, bytes: std::fs::File, journal: std::fs::File) -> Arc<Files> {
    let files = Arc::new(Files::new(*blob.task(), *blob.geometry(), (bytes, journal)));
    *lock(&blob.files) = Arc::downgrade(&files);
    files
}

#[tokio::test]
async fn a_disk_that_takes_no_writes_is_told_from_a_peer_that_lies() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(2 * PIECE, 1);
    let blob = store.create(&content.task, content.geometry).unwrap();
    let own = path(dir.path(), &content, Place::Partial);
    let (full, readable) = (|| std::fs::File::options().write(true).open("/dev/full"), || std::fs::File::open(&own));
    for (bytes, is_full) in [(full().unwrap(), true), (readable().unwrap(), false)] {
        let files = sabotage(&blob, bytes, readable().unwrap());
        let error = blob
            .write(PieceIndex(0), &content.proof(0), Hashed::now(content.piece(0)), PieceOrigin::Peer)
            .await
            .unwrap_err();
        assert_eq!(matches!(error, StoreError::Full { bytes: PIECE }), is_full, "{error:?}");
        assert!(error.is_disk() && (is_full || matches!(error, StoreError::Unwritable { .. })));
        assert!(blob.held().is_empty());
        drop(files);
    }
    // The piece was not claimed for ever.
    content.write_all(&blob).await;
    outcome(&blob, Outcome::Complete).await;
}

#[tokio::test]
async fn s7_a_blob_that_cannot_be_published_is_served_and_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let content = Content::new(2 * PIECE, 1);
    let in_the_way = path(dir.path(), &content, Place::Blobs).parent().unwrap().to_path_buf();
    {
        let store = open(dir.path());
        std::fs::write(&in_the_way, b"not a directory").unwrap();
        let blob = store.create(&content.task, content.geometry).unwrap();
        let mut reader = blob.reader(0..u64::MAX);
        content.write_all(&blob).await;
        assert!(drain(&mut reader).await.0 == content.bytes);
        settled(&store.context).await;
        assert_eq!(blob.look(|state| state.place), Place::Partial);
        assert!(blob.piece(PieceIndex(1)).await.is_ok());
    }
    std::fs::remove_file(&in_the_way).unwrap();
    let store = open(dir.path());
    let blob = store.find(&content.task).unwrap();
    outcome(&blob, Outcome::Complete).await;
    published(&blob).await;
}

#[tokio::test]
async fn s7_after_a_failed_sync_every_reading_is_compared() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(3 * PIECE, 1);
    let blob = content.store(&store).await;
    blob.look(|state| state.suspect = true);
    let mut reader = blob.reader(0..u64::MAX);
    assert_eq!(next(&mut reader).await.unwrap().unwrap(), content.piece(0));
    flip(&path(dir.path(), &content, Place::Blobs), 7);
    let mut again = blob.reader(0..1);
    assert!(matches!(next(&mut again).await, Err(StoreError::Lost)));
    assert_eq!(next(&mut reader).await.unwrap().unwrap(), content.piece(1));
}
