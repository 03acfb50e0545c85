//! `darter config default`, `darter config check FILE` and `darter config import FILE`.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use super::{complain, fail, file, print, refuse};
use crate::config::{Config, defaults, dfdaemon};

/// Prints every key with its default and its reason.
#[must_use]
pub fn default() -> ExitCode {
    print(defaults::yaml().trim_end())
}

/// Prints OK, or all problems of a file to stderr with exit code 2. The environment counts as it does for an agent.
#[must_use]
pub fn check(file: &Path) -> ExitCode {
    match Config::load(file, variables()) {
        Ok(config) => {
            for warning in &config.warnings {
                complain(&format!("warning: {warning}"));
            }
            print("OK")
        }
        Err(problems) => refuse(&problems.to_string()),
    }
}

/// Turns a `dfdaemon.yml` of Dragonfly v1 into a configuration, on stdout or as `output`, and tells on stderr what could
/// not come along. Exit code 2 with all problems if the file is broken, and nothing is written.
#[must_use]
pub fn import(from: &Path, output: Option<&Path>, overwrite: bool) -> ExitCode {
    let imported = match dfdaemon::load(from) {
        Ok(imported) => imported,
        Err(problems) => return refuse(&problems.to_string()),
    };
    complain(&imported.notes.to_string());
    let Some(output) = output else { return print(imported.yaml.trim_end()) };
    match file::write(output, &imported.yaml, file::PUBLIC_MODE, overwrite) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fail(&format!("{} exists already; --overwrite replaces it", output.display()))
        }
        Err(error) => fail(&format!("cannot write {}: {error}", output.display())),
    }
}

/// The environment. A variable that is not UTF-8 is none of ours, or a problem when its name is.
pub fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_problems_has_an_exit_code_of_its_own() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Exit codes can be compared by what they print only.
        let check = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            format!("{:?}", check(file.path()))
        };
        assert_eq!(check("verify: streaming"), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(check("verify: never"), format!("{:?}", ExitCode::from(2)));
        assert_eq!(format!("{:?}", super::check(Path::new("/nowhere"))), format!("{:?}", ExitCode::from(2)));
    }

    #[test]
    fn an_import_is_accepted_and_replaces_nothing_unasked() {
        let folder = tempfile::tempdir().unwrap();
        let (from, output) = (folder.path().join("dfdaemon.yml"), folder.path().join("config.yaml"));
        std::fs::write(&from, "proxies: [{regx: 'blobs/sha256.*'}]\nratelimit: 100M\n").unwrap();
        let import = |overwrite| format!("{:?}", super::import(&from, Some(&output), overwrite));
        let code = |code: u8| format!("{:?}", ExitCode::from(code));
        assert_eq!(import(false), code(0));
        assert_eq!(format!("{:?}", super::check(&output)), code(0));
        std::fs::write(&output, "mine").unwrap();
        assert_eq!((import(false), std::fs::read_to_string(&output).unwrap()), (code(1), "mine".to_owned()));
        assert_eq!(import(true), code(0));
        assert!(std::fs::read_to_string(&output).unwrap().contains("blobs/sha256.*"));
        std::fs::write(&from, "proxies: [{regx: '('}]\n").unwrap();
        assert_eq!(import(true), code(2));
    }
}
