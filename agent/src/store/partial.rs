//! The two open files of a blob: its bytes, written in place at their offsets, and its journal.
//!
//! Files are open while something is being done with a blob: an operation or a reader keeps them so. A cache of
//! thousands of idle blobs holds no descriptor, and a file that was removed from outside is noticed at the next use.
//!
//! Not here: whether bytes are right. What comes from here is for [`super::verify`] alone.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use darter_tracker::{Bitmap, Geometry, PieceIndex, PieceProof, TaskId};
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::directory::{Directory, Place};
use super::error::StoreError;
use super::journal;
use super::state::lock;
use super::verify::VerifiedPiece;

/// A blob's bytes and journal, open.
pub(super) struct Files {
    pub(super) task: TaskId,
    pub(super) geometry: Geometry,
    bytes: File,
    journal: File,
    /// The pieces whose bytes on disk were compared with their record since the files were opened, or were just written.
    checked: Mutex<Bitmap>,
    /// Held while a piece is written: the kernel lets one write to a file at a time, and has the others spin.
    writing: Mutex<()>,
    /// Comparing once is not enough.
    suspect: AtomicBool,
}

impl Files {
    pub(super) fn new(task: TaskId, geometry: Geometry, (bytes, journal): (File, File)) -> Self {
        let checked = Mutex::new(Bitmap::new(geometry.pieces()));
        Self { task, geometry, bytes, journal, checked, writing: Mutex::default(), suspect: AtomicBool::new(false) }
    }

    /// Makes the files of a new partial and takes the room for all of its bytes, so that a disk that is too small says so
    /// before the first byte and not in the middle.
    pub(super) fn create(directory: &Directory, task: TaskId, geometry: Geometry) -> Result<Self, StoreError> {
        let length = geometry.length();
        let failed = |source| StoreError::writing("creating the files", length, source);
        let files = Self::new(task, geometry, directory.create_pair(task.digest()).map_err(failed)?);
        let outcome = files.allocate().and_then(|()| files.journal.write_all_at(&journal::header(&task, &geometry), 0));
        if let Err(source) = outcome {
            if let Err(error) = directory.remove(Place::Partial, task.digest()) {
                tracing::warn!(%task, %error, "a file of the cache was left behind");
            }
            return Err(failed(source));
        }
        Ok(files)
    }

    /// Takes the room for the whole blob, and cuts off what is past its end.
    pub(super) fn allocate(&self) -> io::Result<()> {
        let length = self.geometry.length();
        if self.bytes.metadata()?.len() > length {
            self.bytes.set_len(length)?;
        }
        match rustix::fs::fallocate(&self.bytes, FallocateFlags::empty(), 0, length) {
            Ok(()) => Ok(()),
            // The room cannot be taken beforehand on this file system.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self.bytes.set_len(length),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reads `length` bytes at `offset` into `into`, in the place of what it held; fewer only at the end of the file.
    pub(super) fn read(&self, offset: u64, length: usize, into: &mut Vec<u8>) -> io::Result<()> {
        into.clear();
        into.reserve_exact(length);
        while into.len() < length {
            let at = offset + into.len() as u64;
            match rustix::io::pread(&self.bytes, rustix::buffer::spare_capacity(into), at) {
                Ok(0) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        // The vector may have more room than was asked for.
        into.truncate(length);
        Ok(())
    }

    /// The `length` bytes at `offset`, if the kernel has all of them in memory: never waits for the disk.
    ///
    /// The room is zeroed before it is read into, which takes a small part of the time of handing it to another thread.
    pub(super) fn read_cached(&self, offset: u64, length: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; length];
        cached(&self.bytes, &mut bytes, offset).then_some(bytes)
    }

    /// Writes a piece's bytes, then its record.
    pub(super) fn write(&self, verified: &VerifiedPiece) -> io::Result<()> {
        let piece = verified.piece();
        let _writing = lock(&self.writing);
        self.bytes.write_all_at(verified.bytes(), self.geometry.offset(piece))?;
        let record = journal::record(&self.task, &self.geometry, piece, verified.proof());
        self.journal.write_all_at(&record, journal::slot(piece))?;
        lock(&self.checked).insert(piece);
        Ok(())
    }

    /// Who vouches for a piece; `None` if the journal does not know it.
    pub(super) fn proof(&self, piece: PieceIndex) -> io::Result<Option<PieceProof>> {
        let mut record = [0; journal::RECORD_BYTES];
        match self.journal.read_exact_at(&mut record, journal::slot(piece)) {
            Ok(()) => Ok(journal::read_record(&self.task, &self.geometry, piece, &record)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The same where that is in memory.
    pub(super) fn proof_cached(&self, piece: PieceIndex) -> Option<PieceProof> {
        let mut record = [0; journal::RECORD_BYTES];
        let there = cached(&self.journal, &mut record, journal::slot(piece));
        there.then(|| journal::read_record(&self.task, &self.geometry, piece, &record)).flatten()
    }

    /// Every piece that the journal knows.
    pub(super) fn proofs(&self) -> io::Result<Vec<(PieceIndex, PieceProof)>> {
        let bytes = read_journal(&self.journal, journal::length_max(&self.geometry))?;
        Ok(journal::read_records(&self.task, &self.geometry, &bytes))
    }

    /// Forgets a piece.
    pub(super) fn forget(&self, piece: PieceIndex) -> io::Result<()> {
        lock(&self.checked).remove(piece);
        self.journal.write_all_at(&[0; journal::RECORD_BYTES], journal::slot(piece))
    }

    /// Whether a piece's bytes on disk are known to match since the files were opened.
    pub(super) fn is_checked(&self, piece: PieceIndex) -> bool {
        !self.suspect.load(Ordering::Relaxed) && lock(&self.checked).contains(piece)
    }

    /// From now on no piece counts as checked.
    pub(super) fn distrust(&self) {
        self.suspect.store(true, Ordering::Relaxed);
    }

    /// Notes that a piece's bytes on disk match.
    pub(super) fn set_checked(&self, piece: PieceIndex) {
        lock(&self.checked).insert(piece);
    }

    /// Makes both files durable.
    ///
    /// The descriptors stay open and nothing is written through them afterwards, so that closing them has nothing left to
    /// report (S7).
    pub(super) fn sync(&self) -> io::Result<()> {
        self.bytes.sync_all()?;
        self.journal.sync_all()
    }

    /// How many bytes the data file has.
    pub(super) fn length(&self) -> io::Result<u64> {
        Ok(self.bytes.metadata()?.len())
    }

    /// When the blob was last used, as far as the disk knows.
    pub(super) fn used(&self) -> io::Result<SystemTime> {
        self.journal.metadata()?.modified()
    }
}

/// Reads into the whole of `into`, if the kernel has all of it in memory, and this file system can say so.
fn cached(file: &File, into: &mut [u8], offset: u64) -> bool {
    let length = into.len();
    let read = rustix::io::preadv2(file, &mut [IoSliceMut::new(into)], offset, ReadWriteFlags::NOWAIT);
    read.is_ok_and(|count| count == length)
}

/// The cut that a journal names, if it is whole and this task's.
pub(super) fn geometry_of(task: &TaskId, file: &File) -> io::Result<Option<Geometry>> {
    Ok(journal::read_header(task, &read_journal(file, journal::HEADER_BYTES as u64)?))
}

fn read_journal(file: &File, length_max: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len().min(length_max);
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
