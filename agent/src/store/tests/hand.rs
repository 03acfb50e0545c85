//! What a reader takes from the page cache by itself.

use super::*;
use crate::store::verify;

/// A piece that is not read at once.
const LARGE: u64 = 2 * CHUNK_BYTES as u64;

#[tokio::test]
async fn a_piece_in_memory_is_compared_and_read_without_another_thread() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(2 * PIECE + 9, 5);
    let blob = content.store(&store).await;
    let files = blob.files().unwrap();
    if files.read_cached(0, 1).is_none() {
        // This file system cannot say what is in memory; then everything is read elsewhere.
        return;
    }
    let second = PieceIndex(1);
    assert!(!files.is_checked(second), "the files were just opened");
    let offset = PIECE + 3;
    let range = verify::at_hand(&files, second, offset, 40).expect("it was written a moment ago");
    assert_eq!(range.into_bytes(), content.bytes[offset as usize..offset as usize + 40]);
    assert!(files.is_checked(second) && !files.is_checked(PieceIndex(0)));
    // To the end of the piece and no further, now that it is checked.
    let range = verify::at_hand(&files, second, offset, u64::MAX).expect("it is there still");
    assert_eq!(range.into_bytes(), content.bytes[offset as usize..2 * PIECE as usize]);

    // Hashing more than a chunk is for another thread.
    let large = Content::cut(3 * LARGE, LARGE, 7);
    let files = large.store(&store).await.files().unwrap();
    assert!(verify::at_hand(&files, second, LARGE, 40).is_none());
    assert_eq!(verify::range(&files, second, LARGE, 40).unwrap().into_bytes(), large.piece(1)[..40]);
    assert_eq!(verify::at_hand(&files, second, LARGE, 40).expect("checked").into_bytes(), large.piece(1)[..40]);
}

#[tokio::test]
async fn a_rotten_piece_is_not_at_hand() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = Content::new(2 * PIECE, 6);
    let blob = content.store(&store).await;
    flip(&path(dir.path(), &content, Place::Blobs), PIECE + 1);
    let files = blob.files().unwrap();
    // Far from the flipped bit, but of the same piece.
    assert!(verify::at_hand(&files, PieceIndex(1), 2 * PIECE - 8, 8).is_none());
    assert!(!files.is_checked(PieceIndex(1)));
    assert!(verify::range(&files, PieceIndex(1), 2 * PIECE - 8, 8).is_err());
    // And it is none of the reader's business how that was found.
    let mut reader = blob.reader(0..2 * PIECE);
    let (bytes, error) = drain(&mut reader).await;
    assert!(matches!(error, Some(StoreError::Lost)), "{error:?}");
    assert_eq!(bytes, content.bytes[..PIECE as usize]);
}
