//! The little of HTTP/2 that a proxy needs which never speaks it: enough to make a BuildKit client wait.
//!
//! A client that has been answered 101 on `/grpc` gives up after 20 s without the server's SETTINGS. If it must
//! wait for a slot, the proxy sends an empty SETTINGS frame in the daemon's name. The client acknowledges that
//! one and later the daemon's own; a daemon that sees two acknowledgements for its one frame closes with
//! PROTOCOL_ERROR, so one of them must not reach it.

use std::collections::BTreeSet;

use super::tunnel::{Tap, Verdict};

/// What an HTTP/2 client sends first.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const ACK: u8 = 1;

/// A SETTINGS frame that changes nothing.
pub fn empty_settings() -> [u8; 9] {
    [0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]
}

/// Whether a client has taken back every call that it has made since the preface, so far as its bytes are here.
/// `idle` says of a call's header block that nobody waits for it. A client that waits for its first answer resets
/// its calls when its user gives up, and keeps the connection open; buildx resets one of its calls after 35 s
/// while it waits on for another (0.13 to 0.38, measured), so one reset alone says nothing.
pub fn has_given_up(sent: &[u8], idle: impl Fn(&[u8]) -> bool) -> bool {
    let mut rest = sent.get(PREFACE.len()..).unwrap_or_default();
    let (mut calls, mut waiting) = (0_u32, BTreeSet::new());
    while let [a, b, c, kind, _flags, stream @ ..] = rest {
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let (Some(stream), Some(payload)) = (stream.get(..4), stream.get(4..4 + length)) else { break };
        match *kind {
            HEADERS if !idle(payload) => {
                calls += 1;
                waiting.insert(stream);
            }
            HEADERS => calls += 1,
            RST_STREAM => {
                waiting.remove(stream);
            }
            _ => {}
        }
        rest = &rest[FRAME_HEAD + length..];
    }
    calls > 0 && waiting.is_empty()
}

/// Removes the first SETTINGS frame with ACK from a client's byte stream and lets everything else pass. It
/// holds at most the eight first bytes of a frame, while it cannot yet tell what they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AckSwallower {
    preface_left: usize,
    head: [u8; FRAME_HEAD],
    head_len: usize,
    payload_left: usize,
    swallowed: bool,
}

impl AckSwallower {
    /// For a stream that begins with the preface.
    pub fn new() -> Self {
        AckSwallower {
            preface_left: PREFACE.len(),
            head: [0; FRAME_HEAD],
            head_len: 0,
            payload_left: 0,
            swallowed: false,
        }
    }

    /// Whether the frame has been removed; from then on every byte passes.
    pub fn is_done(&self) -> bool {
        self.swallowed
    }

    /// Takes the next bytes and appends to `out` those that may pass.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.swallowed {
                out.extend_from_slice(rest);
                return;
            }
            for left in [&mut self.preface_left, &mut self.payload_left] {
                let (pass, tail) = rest.split_at((*left).min(rest.len()));
                out.extend_from_slice(pass);
                *left -= pass.len();
                rest = tail;
                if *left > 0 {
                    return;
                }
            }
            let (part, tail) = rest.split_at((FRAME_HEAD - self.head_len).min(rest.len()));
            self.head[self.head_len..][..part.len()].copy_from_slice(part);
            self.head_len += part.len();
            rest = tail;
            if self.head_len == FRAME_HEAD {
                self.frame(out);
            }
        }
    }

    fn frame(&mut self, out: &mut Vec<u8>) {
        self.head_len = 0;
        let [a, b, c, kind, flags, ..] = self.head;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if kind == SETTINGS && flags & ACK != 0 && length == 0 {
            self.swallowed = true;
        } else {
            out.extend_from_slice(&self.head);
            self.payload_left = length;
        }
    }
}

impl Default for AckSwallower {
    fn default() -> Self {
        Self::new()
    }
}

impl Tap for AckSwallower {
    fn client_bytes(&mut self, bytes: &[u8]) -> Verdict {
        let mut out = Vec::with_capacity(bytes.len() + FRAME_HEAD);
        self.feed(bytes, &mut out);
        Verdict { replace: Some(out), done: self.swallowed }
    }

    fn client_end(&mut self) -> Vec<u8> {
        self.head[..std::mem::take(&mut self.head_len)].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let [_, a, b, c] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[a, b, c, kind, flags, 0, 0, 0, 0], payload].concat()
    }

    fn stream() -> (Vec<u8>, Vec<u8>) {
        let ack = frame(SETTINGS, ACK, b"");
        let before =
            [PREFACE.to_vec(), frame(SETTINGS, 0, &[0, 3, 0, 0, 0, 100]), frame(8, 0, &[0, 1, 0, 0])]
                .concat();
        let after = [frame(1, 4, b"\0\0\0\x04\x01\0\0\0\0"), ack.clone(), frame(0, 1, &[7; 300])].concat();
        ([before.clone(), ack, after.clone()].concat(), [before, after].concat())
    }

    #[test]
    fn a_client_has_given_up_when_all_its_calls_are_reset_but_the_idle_ones() {
        let frame = |kind: u8, stream: u8, payload: &[u8]| {
            [&[0, 0, payload.len() as u8, kind, 4, 0, 0, 0, stream][..], payload].concat()
        };
        let given_up = |frames: &[Vec<u8>]| {
            let sent = [&PREFACE[..], &empty_settings(), &frames.concat()].concat();
            has_given_up(&sent, |block| block == b"traces")
        };
        let (one, two) = (frame(HEADERS, 1, b"list"), frame(HEADERS, 3, b"status"));
        let reset = |stream| frame(RST_STREAM, stream, &[0, 0, 0, 8]);
        let traces = frame(HEADERS, 5, b"traces");
        assert!(!given_up(&[]));
        assert!(!given_up(std::slice::from_ref(&one)));
        assert!(!given_up(&[one.clone(), two.clone(), reset(1)]));
        assert!(given_up(&[one.clone(), two, reset(1), reset(3)]));
        assert!(given_up(&[one.clone(), reset(1), traces.clone()]));
        assert!(given_up(std::slice::from_ref(&traces)));
        assert!(!given_up(&[one, traces]));
        // Within a payload, or cut off, it is no frame.
        assert!(!given_up(&[frame(HEADERS, 1, &reset(1))]));
    }

    #[test]
    fn exactly_one_ack_is_removed_wherever_the_stream_is_cut() {
        let (input, expected) = stream();
        for cut in 0..=input.len() {
            let (mut swallower, mut out) = (AckSwallower::new(), Vec::new());
            swallower.feed(&input[..cut], &mut out);
            swallower.feed(&input[cut..], &mut out);
            assert_eq!(out, expected, "cut at {cut}");
            assert!(swallower.is_done());
        }
    }

    #[test]
    fn single_bytes_pass_too() {
        let (input, expected) = stream();
        let (mut swallower, mut out) = (AckSwallower::new(), Vec::new());
        input.iter().for_each(|b| swallower.feed(&[*b], &mut out));
        assert_eq!(out, expected);
    }

    #[test]
    fn a_stream_without_ack_passes_whole_and_its_end_gives_out_the_rest() {
        let mut swallower = AckSwallower::new();
        let mut input = [PREFACE.to_vec(), frame(SETTINGS, 0, b""), frame(0, 0, b"abc")].concat();
        input.extend_from_slice(&[0, 0, 0, 4]);
        let verdict = swallower.client_bytes(&input);
        assert!(!verdict.done);
        let out = [verdict.replace.unwrap(), swallower.client_end()].concat();
        assert_eq!(out, input);
    }

    #[test]
    fn the_empty_settings_frame_is_one() {
        assert_eq!(empty_settings().to_vec(), frame(SETTINGS, 0, b""));
    }
}
