//! `darter config default` and `darter config check FILE`.

use std::path::Path;
use std::process::ExitCode;

use super::{EXIT_USAGE, complain, print};
use crate::config::{Config, defaults};

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
        Err(problems) => {
            complain(&problems.to_string());
            ExitCode::from(EXIT_USAGE)
        }
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
}
