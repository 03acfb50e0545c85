//! What is wrong with a configuration, and where: all of it at once, so that nobody mends a file one error at a time.

use std::fmt;

/// Where a value was written. Ordered as they are reported.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Nowhere: a default, or the file as a whole.
    #[default]
    Whole,
    /// In the file.
    File {
        /// Line, from 1.
        line: u64,
        /// Column in characters, from 1.
        column: u64,
    },
    /// In an environment variable of this name.
    Environment(String),
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where it was written.
    pub place: Place,
    /// The key it is about, as in `proxy.listen`; empty for the file as a whole.
    pub key: String,
    /// What is wrong, without the text of any secret.
    pub message: String,
}

impl Problem {
    /// A problem of `key`.
    #[must_use]
    pub fn new(place: Place, key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { place, key: key.into(), message: message.into() }
    }
}

/// All that is wrong with one configuration. The operator's to mend; nothing was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    file: String,
    problems: Vec<Problem>,
}

impl Problems {
    /// The problems of `file`, in the order of their places.
    #[must_use]
    pub fn new(file: impl Into<String>, mut problems: Vec<Problem>) -> Self {
        problems.sort();
        problems.dedup();
        Self { file: file.into(), problems }
    }

    /// All of them, at least one.
    #[must_use]
    pub fn list(&self) -> &[Problem] {
        &self.problems
    }
}

impl fmt::Display for Problems {
    /// One line each, as compilers write them: `FILE:LINE:COLUMN: KEY: MESSAGE`, without a newline after the last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, Problem { place, key, message }) in self.problems.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            match place {
                Place::Whole => write!(f, "{}: ", self.file)?,
                Place::File { line, column } => write!(f, "{}:{line}:{column}: ", self.file)?,
                Place::Environment(variable) => write!(f, "{variable}: ")?,
            }
            if !key.is_empty() {
                write!(f, "{key}: ")?;
            }
            f.write_str(message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
