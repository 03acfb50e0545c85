//! Logs: to stderr, one line an event, level from `DARTER_LOG` (default `info`).

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// What is logged unless `DARTER_LOG` says otherwise. The libraries' own chatter is only of use to their authors.
const DEFAULT: &str = "info,quinn=warn,quinn_proto=warn,foca=warn,rustls=warn,hyper=warn";

/// Sets the log up. Called once, first.
///
/// # Errors
/// If `DARTER_LOG` is not a filter, such as `debug` or `info,darter_agent::pull=debug`.
pub fn init() -> Result<(), String> {
    let filter = match std::env::var("DARTER_LOG") {
        Ok(text) if !text.is_empty() => {
            EnvFilter::try_new(&text).map_err(|error| format!("DARTER_LOG={text:?} is not a log filter: {error}"))?
        }
        _ => EnvFilter::new(DEFAULT),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    Ok(())
}
