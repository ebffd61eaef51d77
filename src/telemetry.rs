//! The log: text or JSON on standard error. Keys are shortened nowhere and never secret; headers, bodies, query
//! strings and build arguments are never logged.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts the log. Does nothing if there is one already (tests).
pub fn start(json: bool, level: &str) {
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    let _ = if json { log.json().flatten_event(true).try_init() } else { log.compact().try_init() };
}
