//! The cache directory: where files are, that nobody else can have put them there, and the system calls on names.
//!
//! ```text
//! partial/<algorithm>/<hex>            bytes, at their offsets, preallocated
//! partial/<algorithm>/<hex>.journal    piece map
//! blobs/<algorithm>/<2 hex>/<hex>      bytes that match their digest
//! blobs/<algorithm>/<2 hex>/<hex>.pieces
//! ```
//!
//! Names are computed from digests and from nothing else (S11). Every directory is opened step by step without following
//! links, and must be ours and closed to other writers (S5). One process at a time holds the lock on the top one.
//!
//! Not here: what is in the files ([`super::journal`], [`super::partial`]).

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use darter_tracker::Digest;
use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::error::StoreError;

/// Directories are for us alone: a cached private blob is as private as the credentials it was fetched with (D8).
const DIRECTORY_MODE: Mode = Mode::RWXU;

/// And so are files.
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Without a reader of its own a FIFO under one of our names would block the open for ever.
const FILE_FLAGS: OFlags = OFlags::NOFOLLOW.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

const DIRECTORY_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Which half of the directory a blob's files are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Not all there, or not yet found to match.
    Partial,
    /// Published.
    Blobs,
}

/// The directories of one algorithm.
struct Folders {
    partial: OwnedFd,
    blobs: OwnedFd,
}

/// The opened and locked cache directory.
pub(super) struct Directory {
    root: OwnedFd,
    path: PathBuf,
    sha256: Folders,
    sha512: Folders,
}

/// Which of a blob's two files are in one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) bytes: bool,
    pub(super) journal: bool,
}

/// What is on disk for one digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) partial: Pair,
    pub(super) blobs: Pair,
}

/// The directories that a move changed.
#[must_use = "a move is durable only after its directories were synced"]
pub(super) struct Moved {
    changed: Vec<OwnedFd>,
}

impl Moved {
    /// Makes the move durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        for folder in &self.changed {
            rustix::fs::fsync(folder)?;
        }
        Ok(())
    }
}

impl Directory {
    /// Opens, and where missing makes, the cache directory at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        // A trailing slash would make the system follow a link in the last place.
        let path: PathBuf = path.components().collect();
        let unusable = |source| StoreError::Unwritable { doing: "opening the directory", source };
        DirBuilder::new().recursive(true).mode(DIRECTORY_MODE.bits()).create(&path).map_err(|source| {
            match source.kind() {
                // A dangling link or a file in the place of the directory.
                io::ErrorKind::AlreadyExists => refused(&path),
                _ => unusable(source),
            }
        })?;
        let root = checked(rustix::fs::open(&path, DIRECTORY_FLAGS, Mode::empty()), &path)?;
        match rustix::fs::flock(&root, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(StoreError::InUse { path }),
            // A file system without locks is no reason to go without a cache.
            Err(errno) => tracing::debug!(%errno, "the cache directory cannot be locked"),
            Ok(()) => {}
        }
        let partial = subdirectory(root.as_fd(), &path.join("partial"), true)?;
        let blobs = subdirectory(root.as_fd(), &path.join("blobs"), true)?;
        let folders = |algorithm: &str| -> Result<Folders, StoreError> {
            Ok(Folders {
                partial: subdirectory(partial.as_fd(), &path.join("partial").join(algorithm), true)?,
                blobs: subdirectory(blobs.as_fd(), &path.join("blobs").join(algorithm), true)?,
            })
        };
        let (sha256, sha512) = (folders("sha256")?, folders("sha512")?);
        Ok(Self { root, path, sha256, sha512 })
    }

    fn folders(&self, digest: &Digest) -> &Folders {
        match digest {
            Digest::Sha256(_) => &self.sha256,
            Digest::Sha512(_) => &self.sha512,
        }
    }

    /// The directory of a blob's files, and the names of bytes and journal in it.
    fn locate(&self, place: Place, digest: &Digest) -> io::Result<(OwnedFd, String, String)> {
        let hex = digest.hex();
        let folders = self.folders(digest);
        Ok(match place {
            Place::Partial => (folders.partial.try_clone()?, hex.clone(), format!("{hex}.journal")),
            Place::Blobs => {
                let folder = rustix::fs::openat(&folders.blobs, &hex[..2], DIRECTORY_FLAGS, Mode::empty())?;
                (folder, hex.clone(), format!("{hex}.pieces"))
            }
        })
    }

    /// Opens a blob's bytes and journal; read-only where the disk is.
    pub(super) fn open_pair(&self, place: Place, digest: &Digest) -> io::Result<(File, File)> {
        let (folder, bytes, journal) = self.locate(place, digest)?;
        let pair = |flags: OFlags| -> io::Result<(File, File)> {
            let open = |name: &str| regular(rustix::fs::openat(&folder, name, flags | FILE_FLAGS, Mode::empty()));
            Ok((open(&bytes)?, open(&journal)?))
        };
        match pair(OFlags::RDWR) {
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => pair(OFlags::RDONLY),
            outcome => outcome,
        }
    }

    /// Makes empty files for a partial, in the place of whatever had their names.
    pub(super) fn create_pair(&self, digest: &Digest) -> io::Result<(File, File)> {
        self.remove(Place::Partial, digest)?;
        let (folder, bytes, journal) = self.locate(Place::Partial, digest)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | FILE_FLAGS;
        let create = |name: &str| regular(rustix::fs::openat(&folder, name, flags, FILE_MODE));
        Ok((create(&bytes)?, create(&journal)?))
    }

    /// Removes a blob's files; missing ones are no error.
    pub(super) fn remove(&self, place: Place, digest: &Digest) -> io::Result<()> {
        let (folder, bytes, journal) = match self.locate(place, digest) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            located => located?,
        };
        // The journal goes first: bytes without one are never believed.
        for name in [journal, bytes] {
            match rustix::fs::unlinkat(&folder, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Moves those of a blob's files that are at `from`. A move that a crash cut in two is completed by calling this
    /// again. It is durable once the directories that are returned have been synced, which the caller does without a
    /// lock: that may take seconds.
    pub(super) fn relocate(&self, from: Place, to: Place, digest: &Digest) -> io::Result<Moved> {
        let mut changed = Vec::with_capacity(3);
        if to == Place::Blobs {
            let algorithm = &self.folders(digest).blobs;
            match rustix::fs::mkdirat(algorithm, &digest.hex()[..2], DIRECTORY_MODE) {
                Ok(()) => changed.push(algorithm.try_clone()?),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let (source, bytes, journal) = self.locate(from, digest)?;
        let (target, new_bytes, new_journal) = self.locate(to, digest)?;
        for (old, new) in [(&journal, &new_journal), (&bytes, &new_bytes)] {
            match rustix::fs::renameat(&source, old, &target, new) {
                Ok(()) => {}
                // Moved before a crash, if it is where it should be.
                Err(Errno::NOENT) => drop(rustix::fs::statat(&target, new, AtFlags::SYMLINK_NOFOLLOW)?),
                Err(errno) => return Err(errno.into()),
            }
        }
        changed.extend([target, source]);
        Ok(Moved { changed })
    }

    /// Bytes that an ordinary process may still write on this file system.
    pub(super) fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Every digest that has a regular file, and which. Other names are left alone.
    pub(super) fn scan(&self) -> Result<BTreeMap<Digest, Found>, StoreError> {
        let mut found: BTreeMap<Digest, Found> = BTreeMap::new();
        for (algorithm, folders) in [("sha256", &self.sha256), ("sha512", &self.sha512)] {
            files(folders.partial.as_fd(), |name| {
                note(&mut found, algorithm, name, ".journal", |found| &mut found.partial);
            })?;
            for prefix in prefixes(folders.blobs.as_fd())? {
                let path = self.path.join("blobs").join(algorithm).join(&prefix);
                let folder = subdirectory(folders.blobs.as_fd(), &path, false)?;
                files(folder.as_fd(), |name| {
                    if name.starts_with(&prefix) {
                        note(&mut found, algorithm, name, ".pieces", |found| &mut found.blobs);
                    }
                })?;
            }
        }
        Ok(found)
    }
}

fn note(
    found: &mut BTreeMap<Digest, Found>,
    algorithm: &str,
    name: &str,
    suffix: &str,
    pair: impl FnOnce(&mut Found) -> &mut Pair,
) {
    let (hex, journal) = name.strip_suffix(suffix).map_or((name, false), |hex| (hex, true));
    let Ok(digest) = format!("{algorithm}:{hex}").parse::<Digest>() else {
        tracing::debug!(name, "a file in the cache directory is not ours");
        return;
    };
    let pair = pair(found.entry(digest).or_default());
    if journal { pair.journal = true } else { pair.bytes = true }
}

/// Calls `each` with the names of the regular files of a directory.
fn files(folder: BorrowedFd<'_>, mut each: impl FnMut(&str)) -> Result<(), StoreError> {
    for (name, kind) in entries(folder)? {
        if kind == FileType::RegularFile {
            each(&name);
        }
    }
    Ok(())
}

/// The two-digit directories of published blobs.
fn prefixes(folder: BorrowedFd<'_>) -> Result<Vec<String>, StoreError> {
    let hex = |name: &str| name.len() == 2 && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    Ok(entries(folder)?.into_iter().map(|(name, _)| name).filter(|name| hex(name)).collect())
}

fn entries(folder: BorrowedFd<'_>) -> Result<Vec<(String, FileType)>, StoreError> {
    let unreadable = |errno: Errno| StoreError::Unreadable { doing: "listing the directory", source: errno.into() };
    let mut entries = Vec::new();
    for entry in Dir::read_from(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        let kind = match entry.file_type() {
            // Some file systems do not say it in the listing.
            FileType::Unknown => {
                let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).map_err(unreadable)?;
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        entries.push((name.to_owned(), kind));
    }
    Ok(entries)
}

/// Opens the directory that is named like the end of `path` in `parent`.
fn subdirectory(parent: BorrowedFd<'_>, path: &Path, make: bool) -> Result<OwnedFd, StoreError> {
    let name = path.file_name().unwrap_or_default();
    if make {
        match rustix::fs::mkdirat(parent, name, DIRECTORY_MODE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => {
                return Err(StoreError::Unwritable { doing: "making the directory", source: errno.into() });
            }
        }
    }
    checked(rustix::fs::openat(parent, name, DIRECTORY_FLAGS, Mode::empty()), path)
}

/// Refuses a directory that is a link, somebody else's, or writable by somebody else.
fn checked(opened: rustix::io::Result<OwnedFd>, path: &Path) -> Result<OwnedFd, StoreError> {
    let unusable = |errno: Errno| StoreError::Unwritable { doing: "opening the directory", source: errno.into() };
    let folder = match opened {
        Err(Errno::LOOP | Errno::NOTDIR) => return Err(refused(path)),
        opened => opened.map_err(unusable)?,
    };
    let stat = rustix::fs::fstat(&folder).map_err(unusable)?;
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(StoreError::Refused { path: path.into(), reason: "belongs to another user" });
    }
    if Mode::from_raw_mode(stat.st_mode).intersects(Mode::WGRP | Mode::WOTH) {
        return Err(StoreError::Refused { path: path.into(), reason: "is writable by its group or by everybody" });
    }
    Ok(folder)
}

fn refused(path: &Path) -> StoreError {
    StoreError::Refused { path: path.into(), reason: "is a symbolic link or not a directory" }
}

/// Something else in a file's place, a link first of all, is as good as no file.
fn regular(opened: rustix::io::Result<OwnedFd>) -> io::Result<File> {
    let other = || io::Error::new(io::ErrorKind::NotFound, "there is something else in the file's place");
    let file = match opened {
        Err(Errno::LOOP) => return Err(other()),
        opened => File::from(opened?),
    };
    if file.metadata()?.is_file() { Ok(file) } else { Err(other()) }
}
