//! What is given from memory, and when it is not.

use super::*;

/// Room for four pieces.
const ROOM: u64 = 4 * PIECE;

fn open_with_memory(dir: &Path) -> Arc<Store> {
    let settings = Settings { memory_bytes: ROOM, ..settings(dir) };
    Store::open(settings, Arc::new(Metrics::default())).unwrap()
}

/// A blob of which the first is missing, so that it is neither hashed nor whole.
async fn partial(store: &Arc<Store>, content: &Content) -> Arc<Blob> {
    let blob = store.create(&content.task, content.geometry).unwrap();
    for piece in 1..content.geometry.pieces() {
        assert!(content.write(&blob, piece).await);
    }
    blob
}

fn remembered(blob: &Blob) -> Vec<u32> {
    (0..blob.geometry().pieces()).filter(|piece| blob.remembered(PieceIndex(*piece)).is_some()).collect()
}

#[tokio::test]
async fn what_has_just_come_is_given_without_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with_memory(dir.path());
    let content = Content::new(4 * PIECE + 9, 5);
    let blob = partial(&store, &content).await;
    assert_eq!(remembered(&blob), [1, 2, 3, 4]);
    // What the disk has become by now does not matter.
    flip(&path(dir.path(), &content, Place::Partial), 2 * PIECE);
    let (proof, bytes) = blob.piece(PieceIndex(2)).await.unwrap();
    assert_eq!((proof.digest, &bytes), (content.proof(2).digest, &content.piece(2)));
    // In the middle of a piece, and to its end.
    let mut reader = blob.reader(2 * PIECE + 5..4 * PIECE + 3);
    assert_eq!(next(&mut reader).await.unwrap().unwrap(), content.piece(2)[5..]);
    assert_eq!(next(&mut reader).await.unwrap().unwrap(), content.piece(3));
    assert_eq!(next(&mut reader).await.unwrap().unwrap(), content.piece(4)[..3]);
    assert_eq!(blob.state().borrow().lost, 0);
    // It is not written again, and nothing of it is remembered once it is whole.
    assert!(content.write(&blob, 0).await);
    outcome(&blob, Outcome::Complete).await;
    settled(&blob.context).await;
    assert!(remembered(&blob).is_empty());
    // The flipped bit was hashed from memory; now it is found.
    assert!(matches!(blob.piece(PieceIndex(2)).await, Err(StoreError::NotHeld { .. })));
}

#[tokio::test]
async fn memory_is_bounded_and_what_was_used_last_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with_memory(dir.path());
    let first = partial(&store, &Content::new(5 * PIECE, 1)).await;
    assert!(first.remembered(PieceIndex(1)).is_some(), "used last");
    let second = partial(&store, &Content::new(3 * PIECE, 2)).await;
    assert_eq!((remembered(&first), remembered(&second)), (vec![1, 4], vec![1, 2]));
    // More than half of all there is room for.
    let large = Content::cut(2 * 4 * PIECE, 4 * PIECE, 3);
    let large = partial(&store, &large).await;
    assert!(remembered(&large).is_empty());
    store.sweep_at(Instant::now());
    assert_eq!(remembered(&first), [1, 4]);
    store.sweep_at(Instant::now() + Duration::from_secs(11));
    assert!(remembered(&first).is_empty() && remembered(&second).is_empty());
}

#[tokio::test]
async fn nothing_of_what_is_wrong_or_gone_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with_memory(dir.path());
    let content = Content::new(3 * PIECE, 6);
    let blob = partial(&store, &content).await;
    // Somebody vouched for other bytes than the blob's.
    let wrong = Hashed::now(vec![7; PIECE as usize].into());
    let proof = proof_of(&[7; PIECE as usize]);
    assert!(blob.write(PieceIndex(0), &proof, wrong, PieceOrigin::Peer).await.unwrap());
    outcome(&blob, Outcome::Poisoned).await;
    settled(&blob.context).await;
    assert!(remembered(&blob).is_empty());
    assert!(matches!(blob.piece(PieceIndex(1)).await, Err(StoreError::Poisoned)));
    store.discard(&content.task);
    // The blob that takes its place knows nothing of it.
    let anew = partial(&store, &content).await;
    assert_eq!(remembered(&anew), [1, 2]);
    store.discard(&content.task);
    assert!(remembered(&anew).is_empty());
    assert!(matches!(anew.piece(PieceIndex(1)).await, Err(StoreError::NotHeld { .. })));
}

#[tokio::test]
async fn what_was_refused_is_not_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with_memory(dir.path());
    let content = Content::new(3 * PIECE, 8);
    let blob = store.create(&content.task, content.geometry).unwrap();
    let wrong = Hashed::now(content.piece(2));
    let refused = blob.write(PieceIndex(1), &content.proof(1), wrong, PieceOrigin::Peer).await;
    assert!(matches!(refused, Err(StoreError::Mismatch { .. })));
    assert!(remembered(&blob).is_empty());
}
