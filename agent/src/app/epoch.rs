//! The boot epoch: a number that is higher at each start of this node, whatever the clock does, so that the cluster
//! believes the restarted node and not its former self.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The file beside the cache that remembers the last one.
const FILE: &str = "epoch";

/// The epoch for this start: the wall clock in milliseconds, or one more than the last where the clock went back.
///
/// # Errors
/// If it cannot be remembered; a node that might repeat an epoch must not start.
pub fn next(dir: &Path) -> io::Result<u64> {
    let path = dir.join(FILE);
    let last = match fs::read_to_string(&path) {
        // Something else than a number is a torn write: the clock alone decides.
        Ok(text) => text.trim().parse::<u64>().unwrap_or(0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    // A clock before 1970 counts as 0; it needs no more than 64 bits for half a billion years.
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let epoch = clock.max(last.saturating_add(1));
    let new = dir.join("epoch.new");
    let mut file = fs::File::create(&new)?;
    writeln!(file, "{epoch}")?;
    file.sync_all()?;
    fs::rename(&new, &path)?;
    Ok(epoch)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn it_only_rises() {
        let dir = tempfile::tempdir().unwrap();
        let first = next(dir.path()).unwrap();
        assert!(next(dir.path()).unwrap() > first);
        fs::write(dir.path().join(FILE), "9000000000000000000\n").unwrap();
        assert_eq!(next(dir.path()).unwrap(), 9_000_000_000_000_000_001, "the clock went back");
        fs::write(dir.path().join(FILE), "torn").unwrap();
        assert!(next(dir.path()).unwrap() >= first);
    }
}
