//! Tells a BuildKit connection that builds from one that only asks.
//!
//! A buildx build opens four `/grpc` connections: two never send a preface, one lists workers, one calls
//! `Control/Solve` (0.29 and 0.38, measured). Only the last is a build. What tells it is the request's `:path`,
//! which every HTTP/2 client sends as an HPACK literal the first time, Huffman-coded because that is shorter
//! (grpc-go and hyper's h2 do so). So the coded bytes of that path are looked for; the tunnel itself stays
//! opaque.

use super::relay::{Tap, Verdict, h2};

/// `/moby.buildkit.v1.Control/Solve` in HPACK's Huffman code (RFC 7541 B; checked in the tests against the
/// code's table for these letters).
pub(crate) const SOLVE: [u8; 23] = [
    0x62, 0x93, 0xc7, 0xe9, 0x78, 0xed, 0x35, 0x12, 0x75, 0x32, 0x57, 0xee, 0x15, 0xef, 0x1e, 0xa4, 0xd8,
    0x7a, 0x18, 0xdc, 0x7a, 0x3b, 0x97,
];
/// `/opentelemetry.proto.collector.trace.v1.TraceService/Export`
const TRACES: [u8; 42] = [
    0x60, 0xf5, 0x96, 0xa4, 0x96, 0x82, 0xd2, 0x54, 0xd9, 0xe9, 0x7a, 0xec, 0x3a, 0x4e, 0xb9, 0x0f, 0x45,
    0x05, 0x22, 0x4f, 0x62, 0xe9, 0xb0, 0x64, 0x2a, 0xfd, 0xc2, 0xbe, 0xfb, 0x06, 0x42, 0xee, 0x2d, 0x9d,
    0xcc, 0x42, 0xb1, 0x83, 0xcd, 0x67, 0xb1, 0x3f,
];
/// Solve comes within the first few kilobytes; a connection that has sent this much is watched no longer.
const ENOUGH: usize = 1 << 20;

/// Whether a header block is that of a call that delivers traces. Nobody waits for its answer, but buildx does
/// not end before it has one, also after Ctrl-C: 0.29 even comes back for that with a new connection.
pub fn is_traces(block: &[u8]) -> bool {
    block.windows(TRACES.len()).any(|w| w == TRACES)
}

/// Looks for the call of Solve.
pub struct SolveTap<F> {
    build_seen: F,
    seen: usize,
    looking: bool,
    /// Removes the ACK of the SETTINGS frame that the client got while it waited: with two, dockerd ends the
    /// connection with PROTOCOL_ERROR.
    swallow: Option<h2::AckSwallower>,
    /// The end of what was seen, one byte shorter than what is looked for.
    tail: Vec<u8>,
}

impl<F: FnMut() + Send> SolveTap<F> {
    /// Watches a connection whose client has been sent a SETTINGS frame if `settings`. The first call of Solve
    /// is told to `build_seen`.
    pub fn new(build_seen: F, settings: bool) -> Self {
        let swallow = settings.then(h2::AckSwallower::new);
        SolveTap { build_seen, seen: 0, looking: true, swallow, tail: Vec::new() }
    }
}

impl<F: FnMut() + Send> Tap for SolveTap<F> {
    fn client_bytes(&mut self, bytes: &[u8]) -> Verdict {
        self.seen += bytes.len();
        if self.looking && contains(&mut self.tail, bytes, &SOLVE) {
            (self.build_seen)();
            self.looking = false;
        }
        self.looking &= self.seen <= ENOUGH;
        let mut verdict = match &mut self.swallow {
            Some(swallow) => swallow.client_bytes(bytes),
            None => Verdict::done(),
        };
        if verdict.done {
            self.swallow = None;
        }
        verdict.done &= !self.looking;
        verdict
    }

    fn client_end(&mut self) -> Vec<u8> {
        self.swallow.as_mut().map(Tap::client_end).unwrap_or_default()
    }
}

/// Whether `needle` ends within `bytes`; `tail` carries over what a split left.
fn contains(tail: &mut Vec<u8>, bytes: &[u8], needle: &[u8]) -> bool {
    let found = |hay: &[u8]| hay.windows(needle.len()).any(|w| w == needle);
    let across = bytes.len().min(needle.len() - 1);
    tail.extend_from_slice(&bytes[..across]);
    if found(tail) || found(bytes) {
        return true;
    }
    if bytes.len() >= needle.len() - 1 {
        tail.clear();
        tail.extend_from_slice(&bytes[bytes.len() - (needle.len() - 1)..]);
    } else if tail.len() > needle.len() - 1 {
        tail.drain(..tail.len() - (needle.len() - 1));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_found_across_any_split() {
        let mut stream = b"PRI * HTTP/2.0".to_vec();
        stream.extend_from_slice(&SOLVE);
        stream.extend_from_slice(b"rest");
        for a in 0..stream.len() {
            for b in a..stream.len() {
                let mut tail = Vec::new();
                let parts = [&stream[..a], &stream[a..b], &stream[b..]];
                assert!(parts.into_iter().any(|p| contains(&mut tail, p, &SOLVE)), "{a} {b}");
            }
        }
        let mut tail = Vec::new();
        assert!(!stream[..30].chunks(1).any(|p| contains(&mut tail, p, &SOLVE)));
    }

    #[test]
    fn traces_are_told_from_builds() {
        assert!(is_traces(&[b"..", &TRACES[..], b".."].concat()));
        assert!(!is_traces(&SOLVE));
    }

    #[test]
    fn the_bytes_are_the_huffman_code_of_the_path() {
        // RFC 7541 B, the symbols of this path.
        let table: &[(char, u32, u32)] = &[
            ('/', 0x18, 6),
            ('.', 0x17, 6),
            ('1', 0x1, 5),
            ('C', 0x5e, 7),
            ('S', 0x6e, 7),
            ('b', 0x23, 6),
            ('d', 0x24, 6),
            ('e', 0x5, 5),
            ('i', 0x6, 5),
            ('k', 0x75, 7),
            ('l', 0x28, 6),
            ('m', 0x29, 6),
            ('n', 0x2a, 6),
            ('o', 0x7, 5),
            ('r', 0x2c, 6),
            ('t', 0x9, 5),
            ('u', 0x2d, 6),
            ('v', 0x77, 7),
            ('y', 0x7a, 7),
        ];
        let mut bits = String::new();
        for c in "/moby.buildkit.v1.Control/Solve".chars() {
            let (_, code, length) = table.iter().find(|(s, _, _)| *s == c).unwrap();
            bits.push_str(&format!("{code:0width$b}", width = *length as usize));
        }
        while !bits.len().is_multiple_of(8) {
            bits.push('1');
        }
        let bytes: Vec<u8> = bits
            .as_bytes()
            .chunks(8)
            .map(|c| u8::from_str_radix(std::str::from_utf8(c).unwrap(), 2).unwrap())
            .collect();
        assert_eq!(bytes, SOLVE);
    }
}
