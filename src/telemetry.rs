//! The log: text or JSON on standard error. Keys are shortened nowhere and never secret; headers, bodies, query
//! strings and build arguments are never logged.
//!
//! Lines are written by a thread of their own: a request does not pay for a system call, and a reader of the
//! log that has stopped reading stops no request.

use std::io::{self, IsTerminal, Write};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

/// How long lines are collected after some have been written: the first one of a burst is out at once, the
/// others go together.
const COLLECT: Duration = Duration::from_millis(20);
/// How many bytes wait for a reader that does not read; what comes then is counted and left out.
const MAX_WAITING: usize = 4 << 20;

static LINES: Lines =
    Lines { waiting: Mutex::new(Waiting { bytes: Vec::new(), lost: 0 }), some: Condvar::new() };
static LEVEL: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();
/// Held while lines are written, so that they stay in order.
static OUT: Mutex<()> = Mutex::new(());

/// Starts the log. Does nothing if there is one already (tests).
pub fn start(json: bool, level: &str) {
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("info"));
    let (filter, level) = reload::Layer::new(filter);
    let log = tracing_subscriber::fmt::layer()
        .with_writer(|| &LINES)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal());
    let base = tracing_subscriber::registry().with(filter);
    let started = if json {
        base.with(log.json().flatten_event(true)).try_init()
    } else {
        base.with(log.compact()).try_init()
    };
    if started.is_ok() {
        let _ = LEVEL.set(level);
        // Without a thread nothing would ever be written, so that is not ignored.
        let writer = std::thread::Builder::new().name("log".into()).spawn(write_on);
        writer.map(drop).unwrap_or_else(|error| eprintln!("dindpool: no thread for the log: {error}"));
    }
}

/// Logs what `level` says from now on; a filter that is none changes nothing.
pub fn set_level(level: &str) {
    if let (Some(handle), Ok(filter)) = (LEVEL.get(), EnvFilter::try_new(level)) {
        // It fails only when the log has gone.
        let _ = handle.reload(filter);
    }
}

/// The date, in milliseconds since 1970: to be shown, and for nothing else.
#[allow(clippy::disallowed_methods)] // This is the place for it.
pub fn date() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Writes what is waiting. To be called at the end of the process.
pub fn flush() {
    let _out = lock(&OUT);
    let Waiting { mut bytes, lost } = std::mem::take(&mut *lock(&LINES.waiting));
    if lost > 0 {
        bytes.extend_from_slice(format!("{lost} lines of the log were lost: nobody read it\n").as_bytes());
    }
    // A log that cannot be written is no reason to stop, and there is nobody to tell.
    let _ = io::stderr().write_all(&bytes);
}

#[allow(clippy::disallowed_methods)] // The thread is its own, and no runtime's.
fn write_on() {
    loop {
        let waiting = lock(&LINES.waiting);
        drop(LINES.some.wait_while(waiting, |w| w.bytes.is_empty()));
        flush();
        #[expect(clippy::disallowed_methods)] // this thread is the log's own
        std::thread::sleep(COLLECT);
    }
}

/// Lines that have not been written yet.
struct Lines {
    waiting: Mutex<Waiting>,
    some: Condvar,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    lost: u64,
}

impl Write for &Lines {
    /// One line a call: that is how the subscriber writes.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut waiting = lock(&self.waiting);
        if waiting.bytes.len() + line.len() > MAX_WAITING {
            waiting.lost += 1;
        } else {
            // Waking costs a system call, so only the first line does it.
            let wake = waiting.bytes.is_empty();
            waiting.bytes.extend_from_slice(line);
            drop(waiting);
            if wake {
                self.some.notify_one();
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Seconds since 1970, for a metric that shows a date, and for the dates of certificates.
#[expect(clippy::disallowed_methods, reason = "dates")]
pub fn unix_time() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_nobody_reads_is_bounded() {
        let lines = Lines { waiting: Mutex::default(), some: Condvar::new() };
        for _ in 0..10 {
            assert_eq!((&lines).write(&[b'x'; MAX_WAITING / 4]).unwrap(), MAX_WAITING / 4);
        }
        let waiting = lock(&lines.waiting);
        assert_eq!((waiting.bytes.len(), waiting.lost), (MAX_WAITING, 6));
    }
}
