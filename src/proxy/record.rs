//! One request from its head to its end, for its line in the log.

use std::fmt;
use std::time::{Duration, Instant};

/// The header by which tracing systems follow a request: <https://www.w3.org/TR/trace-context/>. It is forwarded as it
/// came, like all headers.
pub const TRACEPARENT: &str = "traceparent";

/// What is to be told of a request.
#[derive(Debug)]
pub struct Record {
    /// Its number in this process.
    pub number: u64,
    /// When its head was there.
    pub began: Instant,
    /// How long it has waited for a slot.
    pub waited: Duration,
    /// Bytes to the daemon.
    pub up: u64,
    /// Bytes to the client.
    pub down: u64,
    /// In a box: most have none, and a stream that is open for hours holds this.
    trace: Option<Box<Trace>>,
}

impl Record {
    /// Begins with a request's head; `traceparent` is what it has for that header.
    pub fn begin(number: u64, traceparent: Option<&[u8]>) -> Self {
        let trace = traceparent.and_then(Trace::parse).map(Box::new);
        Record { number, began: Instant::now(), waited: Duration::ZERO, up: 0, down: 0, trace }
    }

    /// The `traceparent`, if it is one.
    pub fn trace(&self) -> Option<&impl fmt::Display> {
        self.trace.as_deref()
    }
}

/// A `traceparent` of version 00, as a client sent it: nothing else of that header is logged.
#[derive(Debug)]
struct Trace([u8; 55]);

impl Trace {
    fn parse(value: &[u8]) -> Option<Self> {
        let bytes: [u8; 55] = value.try_into().ok()?;
        let hex = |range: std::ops::Range<usize>| {
            bytes[range].iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let dashes = [2, 35, 52].iter().all(|at| bytes[*at] == b'-');
        let zero = |range: std::ops::Range<usize>| bytes[range].iter().all(|b| *b == b'0');
        let fine = bytes.starts_with(b"00-") && dashes && hex(3..35) && hex(36..52) && hex(53..55);
        (fine && !zero(3..35) && !zero(36..52)).then_some(Trace(bytes))
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.0).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(value: &str) -> Option<String> {
        Record::begin(1, Some(value.as_bytes())).trace().map(|trace| trace.to_string())
    }

    #[test]
    fn a_traceparent_is_told_as_it_came_and_nothing_else_is() {
        let fine = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(told(fine).as_deref(), Some(fine));
        for bad in [
            "",
            "s3cr3t",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0\n",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(told(bad), None, "{bad:?}");
        }
    }
}
