//! The command line: what is asked for ([`args`]), and the commands beside the agent ([`keys`], [`config`],
//! [`node`]).
//!
//! Not here: the agent and the demo, which are only parsed.

pub mod args;
pub mod config;
mod file;
pub mod keys;
pub mod node;

use std::io::{self, Write};
use std::process::ExitCode;

pub use args::{AgentArgs, Args, Command, ConfigCommand, DemoArgs, GenCaArgs, NodeCommand};

/// Exit code of what failed.
pub const EXIT_FAILED: u8 = 1;

/// Exit code of what was asked for wrongly: bad arguments (clap's own code), a configuration with problems.
pub const EXIT_USAGE: u8 = 2;

/// The version, with the architecture that it was built for.
#[must_use]
pub fn version() -> String {
    format!("darter {} ({}-{})", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH, std::env::consts::OS)
}

/// Prints `text` and a newline. A reader that went away, as `head` does, has seen what it wanted.
#[must_use]
pub fn print(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => fail(&format!("cannot write: {error}")),
        _ => ExitCode::SUCCESS,
    }
}

/// Prints why a command failed, and gives its exit code.
#[must_use]
pub fn fail(message: &str) -> ExitCode {
    complain(message);
    ExitCode::from(EXIT_FAILED)
}

/// Prints what was asked for wrongly, and gives its exit code.
#[must_use]
pub fn refuse(message: &str) -> ExitCode {
    complain(message);
    ExitCode::from(EXIT_USAGE)
}

/// Prints a line for the operator to stderr. When that is gone too, there is nobody to tell.
pub(crate) fn complain(message: &str) {
    let _ = writeln!(io::stderr().lock(), "{message}");
}
