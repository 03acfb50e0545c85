//! Streaming a blob in order while its pieces arrive in any.
//!
//! What a reader may see (D7):
//!
//! - any piece that matched its digest, as soon as it is there;
//! - except the last one, when the range starts at the blob's first byte: it is given out once the whole has matched, so
//!   that a client that wanted the whole blob never has the end of a wrong one. A range that starts later is part of
//!   something that its reader must check himself;
//! - nothing before the whole has matched, where the configuration says so;
//! - nothing of a poisoned blob.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use darter_tracker::PieceIndex;
use tokio::sync::watch;

use super::blob::Blob;
use super::error::StoreError;
use super::partial::Files;
use super::publish;
use super::state::{Outcome, Progress};
use super::verify::{self, VerifiedRange};

/// Reads a range of a blob in order, waiting for pieces that are not there. Holds at most one chunk in memory, and the
/// blob in the cache.
pub struct Reader {
    blob: Arc<Blob>,
    progress: watch::Receiver<Progress>,
    files: Option<Arc<Files>>,
    offset: u64,
    end: u64,
    from_start: bool,
    /// How many pieces the blob had lost when the reader was made.
    lost: u64,
}

/// Whether a reader may go on.
enum Admission {
    Go { lost: u64 },
    Wait,
}

impl Blob {
    /// A reader of the bytes in `range`; what is past the blob's end is cut off.
    #[must_use]
    pub fn reader(self: &Arc<Self>, range: Range<u64>) -> Reader {
        let end = range.end.min(self.geometry().length());
        Reader {
            blob: Arc::clone(self),
            progress: self.state(),
            files: None,
            offset: range.start.min(end),
            end,
            from_start: range.start == 0,
            lost: self.look(|state| state.lost()),
        }
    }
}

impl Reader {
    /// The next bytes, at least one and at most 256 KiB; `None` at the end of the range. Waits for as long as it takes:
    /// deadlines are the caller's. If the future is dropped, nothing is lost.
    ///
    /// # Errors
    /// [`StoreError::Poisoned`], [`StoreError::Gone`] and [`StoreError::Lost`] end this reader, anything else may be
    /// repeated.
    pub async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        if self.offset >= self.end {
            return Ok(None);
        }
        let files = self.files().await?;
        loop {
            self.progress.borrow_and_update();
            let piece = self.position();
            let Admission::Go { lost } = self.admit(piece)? else {
                self.progress.changed().await.map_err(|_| StoreError::Gone)?;
                continue;
            };
            let chunk = match verify::at_hand(&files, piece, self.offset, self.end - self.offset) {
                Some(range) => range.into_bytes(),
                None => self.elsewhere(&files, piece).await?,
            };
            // A piece that was dropped and written again while it was read may be half of each.
            if matches!(self.admit(piece)?, Admission::Go { lost: now } if now == lost) {
                self.offset += chunk.len() as u64;
                return Ok(Some(chunk));
            }
        }
    }

    /// The piece that is read or waited for; the last one of the range at its end.
    #[must_use]
    pub fn position(&self) -> PieceIndex {
        let offset = if self.offset >= self.end { self.end.saturating_sub(1) } else { self.offset };
        self.blob.geometry().piece_at(offset)
    }

    /// The position in bytes from the start of the blob: everything of the range before it has been given out.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The blob that is read.
    #[must_use]
    pub fn blob(&self) -> &Arc<Blob> {
        &self.blob
    }

    /// The next bytes of a piece, on a thread that may block.
    async fn elsewhere(&self, files: &Arc<Files>, piece: PieceIndex) -> Result<Bytes, StoreError> {
        let (blob, files, offset, left) =
            (Arc::clone(&self.blob), Arc::clone(files), self.offset, self.end - self.offset);
        let chunk = self.blob.blocking(move || {
            verify::range(&files, piece, offset, left).map(VerifiedRange::into_bytes).map_err(|_| {
                publish::lose(&blob, &files, piece);
                StoreError::Lost
            })
        });
        chunk.await?
    }

    async fn files(&mut self) -> Result<Arc<Files>, StoreError> {
        if let Some(files) = &self.files {
            return Ok(Arc::clone(files));
        }
        let blob = Arc::clone(&self.blob);
        let files = self.blob.blocking(move || blob.files()).await??;
        verify::kick(&self.blob, Some(Arc::clone(&files)));
        Ok(Arc::clone(self.files.insert(files)))
    }

    fn admit(&self, piece: PieceIndex) -> Result<Admission, StoreError> {
        let before_stream = self.blob.context.verify_before_stream;
        self.blob.look(|state| {
            let open = match state.outcome() {
                Outcome::Poisoned => return Err(StoreError::Poisoned),
                Outcome::Gone => return Err(StoreError::Gone),
                Outcome::Complete => true,
                Outcome::Incomplete => !(before_stream || self.from_start && piece == self.blob.geometry().last()),
            };
            state.touch();
            if open && state.held().contains(piece) {
                Ok(Admission::Go { lost: state.lost() })
            } else if state.lost() > self.lost {
                // Whoever pulls may believe that the piece is still there; waiting for it might have no end.
                Err(StoreError::Lost)
            } else {
                Ok(Admission::Wait)
            }
        })
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reader({}, {}..{})", self.blob.task(), self.offset, self.end)
    }
}
