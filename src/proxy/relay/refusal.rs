//! Refuses gRPC calls one by one, in place of a daemon that cannot be had. Whatever ends the whole connection instead
//! (GOAWAY, FIN) makes a gRPC client dial again at once, because it counts a connection that was up as a success:
//! buildx 0.29 did so a thousand times a second until the daemon was back (measured), and printed "the connection is
//! draining" for a reason. A call that is answered with a status is over, and its message is what the user reads.

use super::h2::{PREFACE, empty_settings};

const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// gRPC's UNAVAILABLE.
const STATUS: &str = "14";
/// A frame's payload before SETTINGS say otherwise (RFC 9113, 6.5.2); a longer one is a fault of the client.
const MAX_PAYLOAD: usize = 16_384;
/// A message in a header block of one frame.
const MAX_MESSAGE: usize = 4_096;

/// Answers what a client sends, from its preface on.
#[derive(Debug)]
pub struct Refusal {
    greeted: bool,
    preface_left: usize,
    /// A frame that has begun.
    frame: Vec<u8>,
    /// The header block that ends a call.
    answer: Vec<u8>,
}

/// What the client sent is no HTTP/2.
#[derive(Debug, PartialEq, Eq)]
pub struct Nonsense;

impl Refusal {
    /// Refuses every call with this message. `greeted` says that the client has had an empty SETTINGS frame.
    pub fn new(message: &str, greeted: bool) -> Self {
        // `:status: 200` and `content-type` from HPACK's static table, the rest as literals without Huffman.
        let mut answer = vec![0x88, 0x0f, 0x10];
        string(&mut answer, "application/grpc");
        for (name, value) in [("grpc-status", STATUS), ("grpc-message", &percent(message))] {
            answer.push(0);
            string(&mut answer, name);
            string(&mut answer, value);
        }
        Refusal { greeted, preface_left: PREFACE.len(), frame: Vec::new(), answer }
    }

    /// Takes in what the client has sent, and gives what is to be sent to it.
    ///
    /// # Errors
    /// When a frame is longer than any that a client may send.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Nonsense> {
        let mut out =
            if std::mem::replace(&mut self.greeted, true) { Vec::new() } else { empty_settings().to_vec() };
        let preface = self.preface_left.min(bytes.len());
        self.preface_left -= preface;
        self.frame.extend_from_slice(&bytes[preface..]);
        let mut at = 0;
        while let Some(&[a, b, c, kind, flags, ref stream @ ..]) = self.frame.get(at..at + FRAME_HEAD) {
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if length > MAX_PAYLOAD {
                return Err(Nonsense);
            }
            let Some(payload) = self.frame.get(at + FRAME_HEAD..at + FRAME_HEAD + length) else { break };
            match kind {
                SETTINGS if flags & ACK == 0 => frame(&mut out, SETTINGS, ACK, &[0; 4], &[]),
                PING if flags & ACK == 0 => frame(&mut out, PING, ACK, &[0; 4], payload),
                HEADERS => {
                    frame(&mut out, HEADERS, END_STREAM | END_HEADERS, stream, &self.answer);
                    // NO_ERROR: what it still sends of this call is not wanted.
                    frame(&mut out, RST_STREAM, 0, stream, &[0; 4]);
                }
                _ => {}
            }
            at += FRAME_HEAD + length;
        }
        self.frame.drain(..at);
        Ok(out)
    }
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: &[u8], payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or_default();
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(stream);
    out.extend_from_slice(payload);
}

/// A string of HPACK (RFC 7541, 5.2), not Huffman coded: its length with a prefix of 7 bits, and its bytes.
fn string(out: &mut Vec<u8>, text: &str) {
    let mut length = text.len();
    if length < 127 {
        out.push(length as u8);
    } else {
        out.push(127);
        length -= 127;
        while length >= 128 {
            out.push((length % 128) as u8 | 128);
            length /= 128;
        }
        out.push(length as u8);
    }
    out.extend_from_slice(text.as_bytes());
}

/// A message as `grpc-message` takes it: all but visible ASCII and the blank percent-encoded (gRPC over HTTP/2).
fn percent(message: &str) -> String {
    let mut out = String::new();
    for byte in message.bytes().take(MAX_MESSAGE) {
        match byte {
            b' '..=b'~' if byte != b'%' => out.push(byte.into()),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The frames of a stream: kind, flags, stream, payload.
    fn frames(mut bytes: &[u8]) -> Vec<(u8, u8, u32, Vec<u8>)> {
        let mut frames = Vec::new();
        while let [a, b, c, kind, flags, s, t, u, v, rest @ ..] = bytes {
            let (payload, tail) = rest.split_at(u32::from_be_bytes([0, *a, *b, *c]) as usize);
            frames.push((*kind, *flags, u32::from_be_bytes([*s, *t, *u, *v]), payload.to_vec()));
            bytes = tail;
        }
        assert!(bytes.is_empty());
        frames
    }

    fn sent() -> Vec<u8> {
        let mut sent = PREFACE.to_vec();
        frame(&mut sent, SETTINGS, 0, &[0; 4], &[]);
        frame(&mut sent, HEADERS, END_HEADERS, &[0, 0, 0, 1], b"block");
        frame(&mut sent, 0, 1, &[0, 0, 0, 1], b"data");
        frame(&mut sent, SETTINGS, ACK, &[0; 4], &[]);
        frame(&mut sent, HEADERS, END_HEADERS, &[0, 0, 0, 3], b"block");
        frame(&mut sent, PING, 0, &[0; 4], b"12345678");
        sent
    }

    #[test]
    fn each_call_is_answered_with_the_message_however_it_comes() {
        let whole = Refusal::new("no daemon: 100 % busy", false).feed(&sent()).unwrap();
        let seen = frames(&whole);
        let kinds: Vec<(u8, u8, u32)> =
            seen.iter().map(|(kind, flags, stream, _)| (*kind, *flags, *stream)).collect();
        let call = |stream| [(HEADERS, 5, stream), (RST_STREAM, 0, stream)];
        let expected =
            [&[(SETTINGS, 0, 0), (SETTINGS, ACK, 0)][..], &call(1), &call(3), &[(PING, ACK, 0)]].concat();
        assert_eq!(kinds, expected);
        assert!(seen[2].3.ends_with(b"\x0cgrpc-message\x17no daemon: 100 %25 busy"));
        assert_eq!(seen[6].3, b"12345678");
        let (mut refusal, mut out) = (Refusal::new("no daemon: 100 % busy", false), Vec::new());
        sent().iter().for_each(|byte| out.extend(refusal.feed(&[*byte]).unwrap()));
        assert_eq!(out, whole);
    }

    #[test]
    fn one_that_was_greeted_is_not_greeted_again() {
        let out = Refusal::new("x", true).feed(&sent()).unwrap();
        assert_eq!(frames(&out)[0].1, ACK);
    }

    #[test]
    fn a_long_message_keeps_its_length_and_a_long_frame_is_none() {
        let mut refusal = Refusal::new(&"ä".repeat(200), true);
        let out = refusal.feed(&sent()).unwrap();
        assert_eq!(frames(&out).len(), 6);
        let block = &frames(&out)[1].3;
        // 400 bytes become 1,200 characters: 127 + 1,073 = 0xb1 0x08 behind the prefix.
        let at = block.windows(12).position(|w| w == b"grpc-message").unwrap() + 12;
        assert_eq!(block[at..at + 3], [127, 0xb1, 0x08]);
        assert_eq!(block.len() - at - 3, 1200);
        assert_eq!(Refusal::new("x", true).feed(&[PREFACE.to_vec(), vec![0xff; 9]].concat()), Err(Nonsense));
    }
}
