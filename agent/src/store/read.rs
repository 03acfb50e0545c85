//! Streaming a blob in order while its pieces arrive in any.
//!
//! What a reader may see (D7):
//!
//! - any piece that matched its digest, as soon as it is there;
//! - what this node gets from the registry itself, as it comes ([`Reader::run_ahead`]): there is nothing to compare it with before
//!   the whole is here. It is compared with what was stored before more is given, since that may have come from elsewhere;
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
    /// What was given of the piece at its end before that was stored.
    ahead: Vec<Bytes>,
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
            ahead: Vec::new(),
            lost: self.look(|state| state.lost()),
        }
    }
}

impl Reader {
    /// The next bytes, at least one and at most 256 KiB; `None` at the end of the range. Waits for as long as it takes:
    /// deadlines are the caller's. If the future is dropped, nothing is lost.
    ///
    /// # Errors
    /// [`StoreError::Poisoned`], [`StoreError::Gone`], [`StoreError::Lost`] and [`StoreError::Differs`] end this reader, anything
    /// else may be repeated.
    pub async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        self.compare_ahead().await?;
        if self.offset >= self.end {
            return Ok(None);
        }
        let chunk = self.stored(self.position(), self.offset, self.end).await?;
        self.offset += chunk.len() as u64;
        Ok(Some(chunk))
    }

    /// Waits until what was given before it was stored is stored, and compares the two.
    async fn compare_ahead(&mut self) -> Result<(), StoreError> {
        while !self.ahead.is_empty() {
            let waiting: u64 = self.ahead.iter().map(|bytes| bytes.len() as u64).sum();
            let start = self.offset - waiting;
            let stored = self.stored(self.blob.geometry().piece_at(start), start, self.offset).await?;
            let mut rest = &stored[..];
            for given in &mut self.ahead {
                let (compared, others) = rest.split_at(given.len().min(rest.len()));
                if given.split_to(compared.len()) != compared {
                    return Err(StoreError::Differs);
                }
                rest = others;
            }
            self.ahead.retain(|given| !given.is_empty());
        }
        Ok(())
    }

    /// Whether what is waited for may be given as it comes: all but the last piece of a whole blob, and nothing where everything
    /// waits for the whole.
    #[must_use]
    pub fn may_run_ahead(&self) -> bool {
        let begun = self.ahead.is_empty() || self.blob.geometry().piece_at(self.offset - 1) == self.position();
        let withheld = self.from_start && self.position() == self.blob.geometry().last();
        begun && self.offset < self.end && !withheld && !self.blob.context.verify_before_stream
    }

    /// Takes bytes that follow the [offset](Self::offset), from the piece there, and gives those of them that are in the range.
    pub fn run_ahead(&mut self, mut bytes: Bytes) -> Bytes {
        let left = self.end - self.offset;
        bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        self.offset += bytes.len() as u64;
        self.ahead.push(bytes.clone());
        bytes
    }

    /// Bytes of `piece` from `start` on, but none from `end` on, once they are there.
    async fn stored(&mut self, piece: PieceIndex, start: u64, end: u64) -> Result<Bytes, StoreError> {
        let files = self.files().await?;
        loop {
            self.progress.borrow_and_update();
            let Admission::Go { lost } = self.admit(piece)? else {
                self.progress.changed().await.map_err(|_| StoreError::Gone)?;
                continue;
            };
            let remembered = self.blob.remembered(piece).map(|it| it.range(self.blob.geometry(), start, end - start));
            let chunk = match remembered.or_else(|| verify::at_hand(&files, piece, start, end - start)) {
                Some(range) => range.into_bytes(),
                None => self.elsewhere(&files, piece, start, end - start).await?,
            };
            // A piece that was dropped and written again while it was read may be half of each.
            if matches!(self.admit(piece)?, Admission::Go { lost: now } if now == lost) {
                return Ok(chunk);
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
    async fn elsewhere(
        &self,
        files: &Arc<Files>,
        piece: PieceIndex,
        offset: u64,
        left: u64,
    ) -> Result<Bytes, StoreError> {
        let (blob, files) = (Arc::clone(&self.blob), Arc::clone(files));
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
