//! Writing a runtime's files so that it can be undone to the byte.
//!
//! A record under `/etc/darter/node/` holds each file as it was and as it was written. It is on the disk before the first
//! file is touched, so an interrupted run can be undone as well. A file that somebody has changed since is never touched.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{NodeError, Wanted, refused};
use crate::cli::args::Runtime;
use crate::cli::file;

/// Where records are kept: not in the cache, which may be thrown away.
const RECORDS: &str = "/etc/darter/node";

/// What was there before may hold credentials, as headers of a `hosts.toml` do.
const RECORD_MODE: u32 = 0o600;

/// Bound on a runtime's file: the longest are lists of some hundred registries.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// The file system that is worked on: the host's, or a copy below a folder.
#[derive(Clone, Debug)]
pub(super) struct Root(PathBuf);

impl Root {
    pub(super) fn new(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// Where a path of the host is. `..` and the like were refused where they could come in.
    pub(super) fn at(&self, path: &Path) -> PathBuf {
        let names = path.components().filter(|part| matches!(part, Component::Normal(_)));
        self.0.join(names.collect::<PathBuf>())
    }

    /// The text of a file; `None` if it is not there.
    pub(super) fn read(&self, path: &Path) -> Result<Option<String>, NodeError> {
        let failed = |source| NodeError::File { path: path.to_owned(), source };
        let there = self.at(path);
        match fs::metadata(&there) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(meta) if !meta.is_file() => return Err(refused(format!("{} is not a file", path.display()))),
            Ok(meta) if meta.len() > FILE_BYTES_MAX => {
                return Err(refused(format!("{} is larger than {FILE_BYTES_MAX} bytes", path.display())));
            }
            Ok(_) => {}
        }
        fs::read_to_string(&there).map(Some).map_err(failed)
    }

    /// The files of a folder with an extension, by name.
    pub(super) fn list(&self, folder: &Path, extension: &str) -> Result<Vec<PathBuf>, NodeError> {
        let entries = match fs::read_dir(self.at(folder)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => {
                entries.and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>())
            }
        };
        let mut names = entries.map_err(|source| NodeError::File { path: folder.to_owned(), source })?;
        names.sort();
        let paths = names.into_iter().map(|name| folder.join(name));
        Ok(paths.filter(|path| path.extension().is_some_and(|it| it == extension)).collect())
    }

    /// Writes a file, with the permissions and the owner of the one that is there.
    fn write(&self, path: &Path, text: &str, mode: u32) -> Result<(), NodeError> {
        let failed = |source| NodeError::File { path: path.to_owned(), source };
        let there = self.at(path);
        let before = fs::symlink_metadata(&there).ok();
        let mode = before.as_ref().map_or(mode, |before| before.permissions().mode() & 0o7777);
        file::write(&there, text, mode, true).map_err(failed)?;
        match before.filter(|before| {
            fs::metadata(&there).is_ok_and(|now| (now.uid(), now.gid()) != (before.uid(), before.gid()))
        }) {
            Some(before) => chown(&there, Some(before.uid()), Some(before.gid())).map_err(failed),
            None => Ok(()),
        }
    }

    /// Makes a folder and those above it; returns those that were not there, the topmost first.
    fn make(&self, folder: &Path) -> Result<Vec<PathBuf>, NodeError> {
        let missing = folder.ancestors().take_while(|folder| !self.at(folder).exists());
        let mut missing: Vec<_> = missing.map(Path::to_owned).collect();
        missing.reverse();
        fs::create_dir_all(self.at(folder)).map_err(|source| NodeError::File { path: folder.to_owned(), source })?;
        Ok(missing)
    }
}

/// What was done to a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    path: PathBuf,
    /// What was there; `None`: nothing.
    before: Option<String>,
    after: String,
}

/// What was done for a runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    files: Vec<Entry>,
    /// Folders that were made, each before those in it.
    folders: Vec<PathBuf>,
}

/// A record with what is still to be done.
#[derive(Debug)]
pub(super) struct Changes {
    record: Record,
    wanted: Vec<(Wanted, bool)>,
}

impl Record {
    /// The record of a runtime; an empty one if there is none.
    pub(super) fn load(root: &Root, runtime: Runtime) -> Result<Self, NodeError> {
        let path = path(runtime);
        let Some(text) = root.read(&path)? else { return Ok(Self::default()) };
        serde_json::from_str(&text).map_err(|error| refused(format!("{} is broken: {error}", path.display())))
    }

    /// What has to be written for `wanted`.
    ///
    /// # Errors
    /// If a file of somebody else would have to go.
    pub(super) fn changes(mut self, root: &Root, wanted: &[Wanted]) -> Result<Changes, NodeError> {
        let mut done = Vec::new();
        for file in wanted {
            let there = root.read(&file.path)?;
            if root.at(&file.path).is_symlink() {
                return Err(refused(format!("{} is a link, so it is left alone", file.path.display())));
            }
            let changed = there.as_deref() != Some(&file.text);
            if changed {
                let known = self.files.iter_mut().find(|entry| entry.path == file.path);
                let own = known.as_ref().is_some_and(|entry| there.as_ref() == Some(&entry.after));
                if there.is_some() && !own && !file.merged {
                    let shown = file.path.display();
                    return Err(refused(format!(
                        "{shown} is there already and says something else: move it away first"
                    )));
                }
                match known {
                    Some(entry) => {
                        entry.before = if own { entry.before.take() } else { there };
                        entry.after.clone_from(&file.text);
                    }
                    None => {
                        let entry = Entry { path: file.path.clone(), before: there, after: file.text.clone() };
                        self.files.push(entry);
                    }
                }
            }
            done.push((file.clone(), changed));
        }
        Ok(Changes { record: self, wanted: done })
    }

    fn save(&mut self, root: &Root, runtime: Runtime) -> Result<(), NodeError> {
        self.folders.extend(root.make(Path::new(RECORDS))?);
        let text = serde_json::to_string_pretty(self)
            .map_err(|source| NodeError::File { path: path(runtime), source: source.into() })?;
        root.write(&path(runtime), &text, RECORD_MODE)
    }
}

impl Changes {
    /// Whether anything has to be written.
    pub(super) fn is_needed(&self) -> bool {
        self.wanted.iter().any(|(_, changed)| *changed)
    }

    /// Writes what has to be, and says of each file what was done.
    pub(super) fn apply(mut self, root: &Root, runtime: Runtime) -> Result<Vec<(PathBuf, &'static str)>, NodeError> {
        if self.is_needed() {
            // The record first: what it says of a file that is not written yet is noticed by undo.
            self.record.save(root, runtime)?;
        }
        let mut done = Vec::new();
        for (file, changed) in self.wanted {
            if changed {
                let made = root.make(file.path.parent().unwrap_or(Path::new("/")))?;
                if !made.is_empty() {
                    self.record.folders.extend(made);
                    self.record.save(root, runtime)?;
                }
                root.write(&file.path, &file.text, file::PUBLIC_MODE)?;
            }
            done.push((file.path, if changed { "written" } else { "unchanged" }));
        }
        Ok(done)
    }
}

/// Puts everything back as it was.
///
/// # Errors
/// If a file has been changed since; nothing is put back then.
pub(super) fn undo(root: &Root, runtime: Runtime) -> Result<Vec<(PathBuf, &'static str)>, NodeError> {
    let record = Record::load(root, runtime)?;
    let mut changed = Vec::new();
    let mut restore = Vec::new();
    for entry in &record.files {
        let there = root.read(&entry.path)?;
        if there == entry.before {
            restore.push((entry, "unchanged"));
        } else if there.as_ref() == Some(&entry.after) {
            restore.push((entry, if entry.before.is_some() { "restored" } else { "removed" }));
        } else {
            changed.push(entry.path.display().to_string());
        }
    }
    if !changed.is_empty() {
        return Err(refused(format!(
            "changed since they were written, so nothing is undone: {}. Take the agent out of them by hand, remove {}",
            changed.join(", "),
            path(runtime).display()
        )));
    }
    for (entry, _) in restore.iter().filter(|(_, done)| *done != "unchanged") {
        match &entry.before {
            Some(before) => root.write(&entry.path, before, file::PUBLIC_MODE)?,
            None => fs::remove_file(root.at(&entry.path))
                .map_err(|source| NodeError::File { path: entry.path.clone(), source })?,
        }
    }
    match fs::remove_file(root.at(&path(runtime))) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(NodeError::File { path: path(runtime), source });
        }
        _ => {}
    }
    for folder in record.folders.iter().rev() {
        // One that somebody else uses by now is not empty, and stays.
        let _ = fs::remove_dir(root.at(folder));
    }
    Ok(restore.into_iter().map(|(entry, done)| (entry.path.clone(), done)).collect())
}

fn path(runtime: Runtime) -> PathBuf {
    Path::new(RECORDS).join(format!("{}.json", runtime.name()))
}
