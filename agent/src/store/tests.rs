//! The store from outside: what a pull, an upload, a client and a crash see.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod crash;
mod hand;
mod remember;
mod room;
mod tamper;

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use darter_tracker::{Digest, PieceDigest, PieceIndex, PieceProof, PieceSize, Signer};
use sha2::{Digest as _, Sha256, Sha512};

use super::verify::CHUNK_BYTES;
use super::verify::Hashed;
use super::*;
use crate::admin::metrics::PieceOrigin;

const PIECE: u64 = 4096;

/// Nothing here takes as long; a test that waits for ever fails instead.
const PATIENCE: Duration = Duration::from_secs(20);

/// A blob's bytes, with its name and cut.
#[derive(Clone)]
struct Content {
    bytes: Vec<u8>,
    task: TaskId,
    geometry: Geometry,
}

impl Content {
    fn cut(length: u64, piece_size: u64, seed: u8) -> Self {
        let mut bytes = vec![0; length as usize];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        let geometry = Geometry::new(length, PieceSize::new(piece_size as u32).unwrap()).unwrap();
        Self { task: TaskId::blob(Digest::Sha256(Sha256::digest(&bytes).into())), bytes, geometry }
    }

    fn new(length: u64, seed: u8) -> Self {
        Self::cut(length, PIECE, seed)
    }

    fn piece(&self, piece: u32) -> Bytes {
        let start = self.geometry.offset(PieceIndex(piece)) as usize;
        let length = self.geometry.piece_length(PieceIndex(piece)) as usize;
        Bytes::copy_from_slice(&self.bytes[start..start + length])
    }

    fn proof(&self, piece: u32) -> PieceProof {
        proof_of(&self.piece(piece))
    }

    async fn write(&self, blob: &Arc<Blob>, piece: u32) -> bool {
        blob.write(PieceIndex(piece), &self.proof(piece), Hashed::now(self.piece(piece)), PieceOrigin::Peer)
            .await
            .unwrap()
    }

    async fn write_all(&self, blob: &Arc<Blob>) {
        for piece in 0..self.geometry.pieces() {
            self.write(blob, piece).await;
        }
    }

    /// Puts the finished blob into the cache.
    async fn store(&self, store: &Arc<Store>) -> Arc<Blob> {
        let blob = store.create(&self.task, self.geometry).unwrap();
        self.write_all(&blob).await;
        outcome(&blob, Outcome::Complete).await;
        published(&blob).await;
        blob
    }
}

fn proof_of(bytes: &[u8]) -> PieceProof {
    let signer = Signer { public_key: [bytes[0]; 32], epoch: 7, tag: [3; 16] };
    PieceProof::new(PieceDigest::of(bytes), signer, &[5; 64])
}

fn settings(dir: &Path) -> Settings {
    Settings {
        dir: dir.to_path_buf(),
        max_bytes: u64::MAX,
        min_free_bytes: 0,
        idle: Duration::MAX,
        verify_before_stream: false,
        // What is damaged on the disk is to be seen; `memory` has tests of its own.
        memory_bytes: 0,
        put_off: Duration::ZERO,
    }
}

fn open(dir: &Path) -> Arc<Store> {
    Store::open(settings(dir), Arc::new(Metrics::default())).unwrap()
}

async fn outcome(blob: &Arc<Blob>, wanted: Outcome) {
    let mut state = blob.state();
    let reached = state.wait_for(|progress| progress.outcome == wanted);
    tokio::time::timeout(PATIENCE, reached).await.expect("the outcome comes in time").unwrap();
}

/// Publishing goes on after the blob is complete.
async fn published(blob: &Arc<Blob>) {
    settled(&blob.context).await;
    assert_eq!(blob.look(|state| state.place), Place::Blobs);
}

/// Jobs in the background hold their blob and its files; a test of what nobody holds waits for them.
async fn settled(context: &Context) {
    context.jobs.close();
    tokio::time::timeout(PATIENCE, context.jobs.wait()).await.expect("jobs end");
    context.jobs.reopen();
}

async fn next(reader: &mut Reader) -> Result<Option<Bytes>, StoreError> {
    tokio::time::timeout(PATIENCE, reader.next()).await.expect("the reader answers in time")
}

/// Reads to the end, or to the error.
async fn drain(reader: &mut Reader) -> (Vec<u8>, Option<StoreError>) {
    let mut bytes = Vec::new();
    loop {
        match next(reader).await {
            Ok(Some(chunk)) => {
                assert!(!chunk.is_empty() && chunk.len() <= CHUNK_BYTES);
                bytes.extend_from_slice(&chunk);
            }
            Ok(None) => return (bytes, None),
            Err(error) => return (bytes, Some(error)),
        }
    }
}

/// Whether a reader has nothing to give: true once it waits.
async fn waits(reader: &mut Reader) -> bool {
    let mut waiting = Box::pin(reader.next());
    let short = Duration::from_millis(50);
    tokio::time::timeout(short, &mut waiting).await.is_err()
}

fn path(dir: &Path, content: &Content, place: Place) -> std::path::PathBuf {
    let (algorithm, hex) = (content.task.digest().algorithm(), content.task.digest().hex());
    match place {
        Place::Partial => dir.join("partial").join(algorithm).join(hex),
        Place::Blobs => dir.join("blobs").join(algorithm).join(&hex[..2]).join(hex),
    }
}

fn flip(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

#[tokio::test]
async fn blobs_of_every_awkward_size_arrive_backwards_and_survive() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = [1, 2, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE - 1, 3 * PIECE, 3 * PIECE + 1];
    let contents: Vec<Content> = sizes.into_iter().map(|size| Content::new(size, size as u8)).collect();
    {
        let store = open(dir.path());
        for content in &contents {
            let blob = store.create(&content.task, content.geometry).unwrap();
            let mut reader = blob.reader(0..u64::MAX);
            for piece in (0..content.geometry.pieces()).rev() {
                assert!(content.write(&blob, piece).await);
                assert!(!content.write(&blob, piece).await);
            }
            let (bytes, error) = drain(&mut reader).await;
            assert!(error.is_none(), "{error:?}");
            assert!(bytes == content.bytes);
            published(&blob).await;
        }
        store.close().await;
    }
    let store = open(dir.path());
    assert_eq!(store.tasks().len(), contents.len());
    for content in &contents {
        let blob = store.find(&content.task).unwrap();
        assert_eq!(blob.state().borrow().outcome, Outcome::Complete);
        assert_eq!(*blob.geometry(), content.geometry);
        let (bytes, error) = drain(&mut blob.reader(0..content.geometry.length())).await;
        assert!(error.is_none() && bytes == content.bytes);
        let last = content.geometry.last();
        let (proof, bytes) = blob.piece(last).await.unwrap();
        assert_eq!((proof, bytes), (content.proof(last.0), content.piece(last.0)));
    }
}

/// A store that puts syncing off, a whole blob, and another of which nothing has come yet.
async fn whole_beside_one_that_comes(
    settings: Settings,
    whole: &Content,
    other: &Content,
) -> (Arc<Store>, Arc<Blob>, Arc<Blob>) {
    let store = Store::open(Settings { put_off: PATIENCE * 2, ..settings }, Arc::default()).unwrap();
    let coming = store.create(&other.task, other.geometry).unwrap();
    let blob = store.create(&whole.task, whole.geometry).unwrap();
    whole.write_all(&blob).await;
    outcome(&blob, Outcome::Complete).await;
    (store, blob, coming)
}

#[tokio::test]
async fn a_whole_blob_is_not_synced_while_another_one_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (Content::new(2 * PIECE, 1), Content::new(2 * PIECE, 2));
    let (store, blob, coming) = whole_beside_one_that_comes(settings(dir.path()), &first, &second).await;
    let job = async { store.context.jobs.wait().await };
    store.context.jobs.close();
    assert!(tokio::time::timeout(Duration::from_secs(2), job).await.is_err(), "it is put off");
    store.context.jobs.reopen();
    assert_eq!(blob.look(|state| state.place), Place::Partial);
    assert!(drain(&mut blob.reader(0..2 * PIECE)).await.0 == first.bytes, "and given meanwhile");
    second.write_all(&coming).await;
    outcome(&coming, Outcome::Complete).await;
    published(&blob).await;
    published(&coming).await;
}

#[tokio::test]
async fn a_blob_whose_syncing_is_put_off_can_be_evicted_and_does_not_keep_the_store_open() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (Content::new(PIECE, 1), Content::new(2 * PIECE, 2));
    let settings = Settings { idle: Duration::ZERO, ..settings(dir.path()) };
    let (store, blob, _coming) = whole_beside_one_that_comes(settings, &first, &second).await;
    drop(blob);
    let gone = async {
        while store.find(&first.task).is_some() {
            tokio::task::yield_now().await;
            store.sweep().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("nobody holds it");
    tokio::time::timeout(PATIENCE, store.close()).await.expect("the store closes");
}

#[tokio::test]
async fn what_is_not_synced_in_time_when_the_store_closes_is_whole_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (Content::new(2 * PIECE, 1), Content::new(2 * PIECE, 2));
    let (store, blob, coming) = whole_beside_one_that_comes(settings(dir.path()), &first, &second).await;
    store.context.closing.set(Instant::now() - PATIENCE).unwrap();
    tokio::time::timeout(PATIENCE, store.close()).await.expect("the store closes");
    assert!(path(dir.path(), &first, Place::Partial).exists());
    drop((coming, blob, store));
    let store = open(dir.path());
    let blob = store.find(&first.task).unwrap();
    assert!(drain(&mut blob.reader(0..2 * PIECE)).await.0 == first.bytes);
    published(&blob).await;
}

#[tokio::test]
async fn a_sha512_blob_is_checked_with_sha512() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut content = Content::new(2 * PIECE + 9, 1);
    content.task = TaskId::blob(Digest::Sha512(Sha512::digest(&content.bytes).into()));
    content.store(&store).await;
    assert!(path(dir.path(), &content, Place::Blobs).exists());
    let mut wrong = Content::new(PIECE, 2);
    wrong.task = TaskId::blob(Digest::Sha512([1; 64]));
    let blob = store.create(&wrong.task, wrong.geometry).unwrap();
    wrong.write(&blob, 0).await;
    outcome(&blob, Outcome::Poisoned).await;
}

#[tokio::test]
async fn large_pieces_come_in_small_chunks_and_ranges_are_exact() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::cut(5 * 512 * 1024 + 77, 1024 * 1024, 3);
    let blob = content.store(&store).await;
    let length = content.geometry.length();
    for range in [0..length, 0..1, 1..2, 300_000..1_900_000, 1_048_575..1_048_577, length - 1..length, 5..5] {
        let (bytes, error) = drain(&mut blob.reader(range.clone())).await;
        assert!(error.is_none());
        assert!(bytes == content.bytes[range.start as usize..range.end as usize], "{range:?}");
    }
    let mut past = blob.reader(length + 5..length + 9);
    assert!(next(&mut past).await.unwrap().is_none());
    let mut reader = blob.reader(1_048_575..length);
    assert_eq!((reader.position(), reader.offset()), (PieceIndex(0), 1_048_575));
    assert_eq!(next(&mut reader).await.unwrap().unwrap().len(), 1);
    assert_eq!((reader.position(), reader.offset()), (PieceIndex(1), 1_048_576));
}

#[tokio::test]
async fn the_last_piece_waits_for_the_whole_and_a_later_range_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(3 * PIECE, 4);
    let blob = store.create(&content.task, content.geometry).unwrap();
    let (mut whole, mut tail) = (blob.reader(0..3 * PIECE), blob.reader(1..3 * PIECE));
    let mut end = blob.reader(2 * PIECE..3 * PIECE);
    // As if hashing the whole took for ever.
    store.context.stopping.store(true, Ordering::Relaxed);
    content.write(&blob, 2).await;
    assert_eq!(next(&mut end).await.unwrap().unwrap(), content.piece(2));
    assert!(waits(&mut whole).await);
    content.write(&blob, 0).await;
    assert_eq!(next(&mut whole).await.unwrap().unwrap(), content.piece(0));
    assert_eq!(whole.position(), PieceIndex(1));
    assert!(waits(&mut whole).await);
    content.write(&blob, 1).await;
    assert!(drain(&mut tail).await.0 == content.bytes[1..]);
    assert_eq!(next(&mut whole).await.unwrap().unwrap(), content.piece(1));
    assert!(waits(&mut whole).await, "all is there, but nobody knows that it is right");
    store.context.stopping.store(false, Ordering::Relaxed);
    assert!(store.find(&content.task).is_some());
    assert!(drain(&mut whole).await.0 == content.bytes[2 * PIECE as usize..]);
}

#[tokio::test]
async fn what_was_given_as_it_came_is_compared_with_what_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(3 * PIECE, 11);
    let blob = store.create(&content.task, content.geometry).unwrap();
    let (mut right, mut wrong) = (blob.reader(0..3 * PIECE), blob.reader(5..3 * PIECE));
    let whole = content.piece(0);
    for part in [whole.slice(..10), whole.slice(10..100)] {
        assert!(right.may_run_ahead());
        assert_eq!(right.run_ahead(part.clone()), part);
    }
    assert!(wrong.may_run_ahead());
    wrong.run_ahead(Bytes::from_static(b"not what comes later"));
    assert!(waits(&mut right).await && waits(&mut wrong).await);
    content.write(&blob, 0).await;
    assert_eq!(next(&mut right).await.unwrap().unwrap(), whole[100..]);
    assert!(matches!(next(&mut wrong).await, Err(StoreError::Differs)));
    // A piece that was given to its end is compared before anything of the next one is given.
    assert_eq!(right.run_ahead(content.piece(1)), content.piece(1));
    assert!(!right.may_run_ahead());
    content.write(&blob, 2).await;
    assert!(waits(&mut right).await);
    content.write(&blob, 1).await;
    assert!(drain(&mut right).await.0 == content.piece(2));
}

#[tokio::test]
async fn the_end_of_a_whole_blob_is_not_given_as_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(2 * PIECE, 12);
    let blob = store.create(&content.task, content.geometry).unwrap();
    let (mut whole, mut part) = (blob.reader(0..2 * PIECE), blob.reader(PIECE - 2..PIECE + 3));
    whole.run_ahead(content.piece(0));
    part.run_ahead(content.piece(0).slice(PIECE as usize - 2..));
    content.write(&blob, 0).await;
    assert!(waits(&mut whole).await && waits(&mut part).await);
    assert!(!whole.may_run_ahead());
    assert!(part.may_run_ahead(), "who begins later has to check for himself");
    assert_eq!(part.run_ahead(content.piece(1)), content.piece(1).slice(..3));
    assert!(!part.may_run_ahead(), "it has what it wanted");
    drop(store);
    let careful = tempfile::tempdir().unwrap();
    let settings = Settings { verify_before_stream: true, ..settings(careful.path()) };
    let store = Store::open(settings, Arc::default()).unwrap();
    let blob = store.create(&content.task, content.geometry).unwrap();
    assert!(!blob.reader(0..2 * PIECE).may_run_ahead());
}

#[tokio::test]
async fn nothing_leaves_before_the_whole_has_matched_where_that_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings { verify_before_stream: true, ..settings(dir.path()) };
    let store = Store::open(settings, Arc::default()).unwrap();
    let content = Content::new(2 * PIECE, 5);
    let blob = store.create(&content.task, content.geometry).unwrap();
    let (mut whole, mut range) = (blob.reader(0..2 * PIECE), blob.reader(7..9));
    store.context.stopping.store(true, Ordering::Relaxed);
    content.write_all(&blob).await;
    assert!(waits(&mut whole).await && waits(&mut range).await);
    store.context.stopping.store(false, Ordering::Relaxed);
    assert!(store.find(&content.task).is_some());
    assert!(drain(&mut whole).await.0 == content.bytes);
    assert!(drain(&mut range).await.0 == content.bytes[7..9]);
}

#[tokio::test]
async fn what_does_not_match_its_proof_is_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(2 * PIECE + 5, 6);
    let blob = store.create(&content.task, content.geometry).unwrap();
    let mut wrong = content.piece(0).to_vec();
    wrong[9] ^= 1;
    for bytes in [Bytes::from(wrong), content.piece(0).slice(1..), Bytes::new(), content.piece(1)] {
        let refused = blob.write(PieceIndex(0), &content.proof(0), Hashed::now(bytes), PieceOrigin::Peer).await;
        assert!(matches!(refused, Err(StoreError::Mismatch { piece: PieceIndex(0) })), "{refused:?}");
    }
    // The right digest of too few bytes.
    let short = content.piece(0).slice(..100);
    assert!(matches!(
        blob.write(PieceIndex(0), &proof_of(&short), Hashed::now(short), PieceOrigin::Peer).await,
        Err(StoreError::Mismatch { .. })
    ));
    let past = blob.write(PieceIndex(3), &content.proof(0), Hashed::now(content.piece(0)), PieceOrigin::Peer).await;
    assert!(matches!(past, Err(StoreError::NoSuchPiece { .. })));
    assert!(blob.held().is_empty());
    assert!(matches!(blob.piece(PieceIndex(0)).await, Err(StoreError::NotHeld { .. })));
    content.write_all(&blob).await;
    outcome(&blob, Outcome::Complete).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pieces_are_written_by_many_at_once_and_each_counts_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(40 * PIECE + 1, 7);
    let blob = store.create(&content.task, content.geometry).unwrap();
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let mut reader = blob.reader(0..u64::MAX);
        readers.spawn(async move { drain(&mut reader).await });
    }
    let mut writers = tokio::task::JoinSet::new();
    for at in 0..content.geometry.pieces() * 3 {
        let (content, blob) = (content.clone(), Arc::clone(&blob));
        writers.spawn(async move { content.write(&blob, (at * 29) % content.geometry.pieces()).await });
    }
    let new = writers.join_all().await.into_iter().filter(|new| *new).count();
    assert_eq!(new, content.geometry.pieces() as usize);
    for (bytes, error) in readers.join_all().await {
        assert!(error.is_none() && bytes == content.bytes);
    }
}

#[tokio::test]
async fn a_poisoned_blob_gives_nothing_away_and_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = Arc::new(Metrics::default());
    let store = Store::open(settings(dir.path()), Arc::clone(&metrics)).unwrap();
    let right = Content::new(3 * PIECE, 8);
    // Somebody signed bytes for piece 1 that are not the blob's.
    let mut lie = right.clone();
    lie.bytes[PIECE as usize] ^= 1;
    let blob = store.create(&right.task, right.geometry).unwrap();
    let mut reader = blob.reader(0..3 * PIECE);
    lie.write_all(&blob).await;
    let (bytes, error) = drain(&mut reader).await;
    assert!(matches!(error, Some(StoreError::Poisoned)), "{error:?}");
    assert!(bytes.len() as u64 <= 2 * PIECE, "the last piece never left");
    assert_eq!(metrics.poisoned.get(), 1);
    for piece in 0..3 {
        assert!(matches!(blob.piece(PieceIndex(piece)).await, Err(StoreError::Poisoned)));
    }
    assert!(blob.held().is_empty() && store.tasks().is_empty());
    let mut late = blob.reader(PIECE..2 * PIECE);
    assert!(matches!(next(&mut late).await, Err(StoreError::Poisoned)));
    assert!(matches!(
        blob.write(PieceIndex(0), &right.proof(0), Hashed::now(right.piece(0)), PieceOrigin::Peer).await,
        Err(StoreError::Poisoned)
    ));
    assert!(matches!(store.create(&right.task, right.geometry), Err(StoreError::Poisoned)));
    let proofs = blob.proofs();
    assert_eq!(proofs, (0..3).map(|p| (PieceIndex(p), lie.proof(p))).collect::<Vec<_>>());
    assert!(blob.proofs().is_empty());

    store.discard(&right.task);
    assert!(store.find(&right.task).is_none());
    let again = right.store(&store).await;
    assert!(drain(&mut again.reader(0..3 * PIECE)).await.0 == right.bytes);
    // What was right tells who lied.
    assert_eq!(again.proofs(), (0..3).map(|p| (PieceIndex(p), right.proof(p))).collect::<Vec<_>>());
    assert_eq!(blob.state().borrow().outcome, Outcome::Poisoned, "its readers must not take it for the new one");
}

#[tokio::test]
async fn a_poisoned_blob_of_one_piece_is_withheld_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut content = Content::new(1, 9);
    content.task = TaskId::blob(Digest::Sha256([9; 32]));
    let blob = store.create(&content.task, content.geometry).unwrap();
    let mut reader = blob.reader(0..1);
    content.write(&blob, 0).await;
    let (bytes, error) = drain(&mut reader).await;
    assert!(bytes.is_empty() && matches!(error, Some(StoreError::Poisoned)));
    assert!(!path(dir.path(), &content, Place::Partial).exists());
}

#[tokio::test]
async fn readers_hear_of_a_discard() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(2 * PIECE, 10);
    let blob = store.create(&content.task, content.geometry).unwrap();
    let mut reader = blob.reader(0..2 * PIECE);
    assert!(waits(&mut reader).await);
    store.discard(&content.task);
    assert!(matches!(next(&mut reader).await, Err(StoreError::Gone)));
    assert!(matches!(
        blob.write(PieceIndex(0), &content.proof(0), Hashed::now(content.piece(0)), PieceOrigin::Peer).await,
        Err(StoreError::Gone)
    ));
    // The old handle does not harm what came after it.
    let again = store.create(&content.task, content.geometry).unwrap();
    content.write(&again, 0).await;
    assert!(blob.piece(PieceIndex(0)).await.is_err());
    assert_eq!(again.held().count(), 1);
}
