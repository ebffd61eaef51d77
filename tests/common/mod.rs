//! The harness of the real-daemon suites: pools of real dockerds, real clients in POSIX sessions of their own,
//! a real registry, raw sockets, and a scriptable fake daemon for what a real one cannot be made to show.
//!
//! Nothing here sleeps for a fixed time: everything waits for a condition with a deadline. Every process is
//! stopped by the pid that started it.
#![allow(dead_code, reason = "each test binary uses its own part of the harness")]

pub mod browser;
pub mod client;
pub mod cluster;
pub mod daemon;
pub mod dockerd;
pub mod engine;
pub mod fake_daemon;
pub mod helm;
pub mod http;
pub mod monitoring;
pub mod netns;
pub mod parts;
pub mod pool;
pub mod registry;
pub mod robin;
pub mod scenarios;

use std::io::Write;
use std::time::{Duration, Instant};

/// Short for `Duration::from_secs`.
pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Short for `Duration::from_millis`.
pub const fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Says something that cargo's output capture must not swallow: skips, scenarios, measured figures.
pub fn say(line: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr(), "{}", line.as_ref());
}

/// Waits until `cond` gives a value, and tells how long that took; `None` at the deadline.
pub fn poll<T>(deadline: Duration, mut cond: impl FnMut() -> Option<T>) -> Option<(T, Duration)> {
    let start = Instant::now();
    loop {
        if let Some(value) = cond() {
            return Some((value, start.elapsed()));
        }
        if start.elapsed() >= deadline {
            return None;
        }
        // Nobody unparks this thread, so this is the pace of the polling and not a wait for something.
        std::thread::park_timeout(millis(10));
    }
}

/// Waits until `cond` holds and tells how long that took; fails the test at the deadline.
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut cond: impl FnMut() -> bool) -> Duration {
    match poll(deadline, || cond().then_some(())) {
        Some(((), took)) => took,
        None => panic!("{what}: not within {deadline:?}"),
    }
}

/// Watches that `cond` keeps holding for `time`; fails the test as soon as it does not.
#[track_caller]
pub fn holds_for(what: &str, time: Duration, mut cond: impl FnMut() -> bool) {
    if let Some(((), after)) = poll(time, || (!cond()).then_some(())) {
        panic!("{what}: no longer so after {after:?}");
    }
}

/// The value of an `Ok`, or the end of this test: it is skipped, loudly and by name, and with `CI=true` fails.
#[macro_export]
macro_rules! require {
    ($what:expr) => {
        match $what {
            Ok(value) => value,
            Err(reason) => return $crate::common::skip(&reason.to_string()),
        }
    };
}

/// See [`require!`].
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("a test");
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{name} may not be skipped under CI=true: {reason}"
    );
    say(format!("SKIPPED {name}: {reason}"));
}

/// What only root can set up: daemons, network namespaces.
pub fn root() -> Result<(), String> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err("real daemons need root".into()) }
}

/// A number that is different in every use, for names that must not meet those of another scenario.
pub fn unique() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A directory with a path short enough for the Unix sockets in it.
pub fn short_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("dp").rand_bytes(5).tempdir_in("/tmp").expect("a temporary directory")
}

/// The last lines of a log, for the report of a failure.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
