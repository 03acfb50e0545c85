//! Writing a file as a whole or not at all.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

/// Everybody may read what holds no secret.
pub(super) const PUBLIC_MODE: u32 = 0o644;

/// Writes a file under another name and renames it when it is on the disk. Never readable by more than `mode` says, not
/// even for a moment.
///
/// # Errors
/// With [`io::ErrorKind::AlreadyExists`] if it is there and not to be replaced, else whatever the system says. What was
/// there before is still there.
pub(super) fn write(path: &Path, text: &str, mode: u32, overwrite: bool) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Made with mode 0600 by the library.
    let mut file = NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    if overwrite { file.persist(path) } else { file.persist_noclobber(path) }.map_err(|error| error.error)?;
    // The new name is on the disk only with its folder.
    File::open(folder)?.sync_all()
}
