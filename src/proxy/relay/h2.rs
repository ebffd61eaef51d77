//! The little of HTTP/2 that a proxy needs which never speaks it: enough to make a BuildKit client wait.
//!
//! A client that has been answered 101 on `/grpc` gives up after 20 s without the server's SETTINGS. If it must
//! wait for a slot, the proxy sends an empty SETTINGS frame in the daemon's name. The client acknowledges that
//! one and later the daemon's own; a daemon that sees two acknowledgements for its one frame closes with
//! PROTOCOL_ERROR, so one of them must not reach it.

use super::tunnel::{Tap, Verdict};

/// What an HTTP/2 client sends first.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const FRAME_HEAD: usize = 9;
const SETTINGS: u8 = 4;
const ACK: u8 = 1;

/// A SETTINGS frame that changes nothing.
pub fn empty_settings() -> [u8; 9] {
    [0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]
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
