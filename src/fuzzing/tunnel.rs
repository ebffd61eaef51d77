//! What a BuildKit client sends behind its preface.

use super::{Dice, cut};
use crate::proxy::relay::h2::{PREFACE, has_given_up};
use crate::proxy::relay::{Refusal, Tap};
use crate::proxy::solve::{SOLVE, SolveTap, is_traces};

/// However the stream is cut: exactly the first acknowledgement of SETTINGS is taken out of it and nothing else, a
/// build is seen where its path is, and a refused client gets the same answer, of whole frames, one for each call.
pub fn tunnel(data: &[u8]) {
    // Behind the preface, so that nothing has to be guessed that is always there.
    let sent = [&PREFACE[..], data].concat();
    for settings in [false, true] {
        tap(&sent, settings);
    }
    refusal(&sent, Dice::of(data).below(2) == 0);
    let (whole, _) = frames(data);
    let end = PREFACE.len() + whole.iter().map(Frame::length).sum::<usize>();
    let given_up = has_given_up(&sent, is_traces);
    assert_eq!(given_up, has_given_up(&sent[..end], is_traces), "half a frame says nothing");
    assert!(!given_up || whole.iter().any(|f| f.kind == HEADERS));
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
/// The longest payload that a client may send (RFC 9113, 6.5.2).
const MAX_PAYLOAD: usize = 16_384;

#[derive(Debug, PartialEq, Eq)]
struct Frame<'a> {
    kind: u8,
    flags: u8,
    stream: &'a [u8],
    payload: &'a [u8],
}

impl Frame<'_> {
    fn length(&self) -> usize {
        9 + self.payload.len()
    }

    fn is_ack(&self) -> bool {
        self.kind == SETTINGS && self.flags & 1 == 1 && self.payload.is_empty()
    }
}

/// The whole frames, and what is left.
fn frames(mut data: &[u8]) -> (Vec<Frame<'_>>, &[u8]) {
    let mut frames = Vec::new();
    while data.len() >= 9 {
        let length = usize::from(data[0]) << 16 | usize::from(data[1]) << 8 | usize::from(data[2]);
        let Some(payload) = data.get(9..9 + length) else { break };
        frames.push(Frame { kind: data[3], flags: data[4], stream: &data[5..9], payload });
        data = &data[9 + length..];
    }
    (frames, data)
}

fn tap(sent: &[u8], settings: bool) {
    let mut expected = sent.to_vec();
    if settings {
        let (frames, _) = frames(&sent[PREFACE.len()..]);
        if let Some(ack) = frames.iter().position(Frame::is_ack) {
            let at = PREFACE.len() + frames[..ack].iter().map(Frame::length).sum::<usize>();
            expected.drain(at..at + 9);
        }
    }
    let builds = usize::from(sent.windows(SOLVE.len()).any(|w| w == SOLVE));
    let (mut seen, mut out) = (0, Vec::new());
    let mut tap = Some(SolveTap::new(|| seen += 1, settings));
    for piece in cut(sent) {
        let Some(looks) = &mut tap else {
            out.extend_from_slice(piece);
            continue;
        };
        let verdict = looks.client_bytes(piece);
        out.extend_from_slice(verdict.replace.as_deref().unwrap_or(piece));
        if verdict.done {
            tap = None;
        }
    }
    if let Some(mut tap) = tap {
        out.extend_from_slice(&tap.client_end());
    }
    assert!(out == expected, "{} bytes where {} are due", out.len(), expected.len());
    assert_eq!(seen, builds, "builds seen");
}

fn refusal(sent: &[u8], greeted: bool) {
    let message = "no daemon: 100 % \u{fc}ber";
    let whole = Refusal::new(message, greeted).feed(sent);
    let mut refusal = Refusal::new(message, greeted);
    let answers: Result<Vec<_>, _> = cut(sent).into_iter().map(|piece| refusal.feed(piece)).collect();
    assert_eq!(answers.map(|a| a.concat()), whole);
    let Ok(answer) = whole else { return };
    let (asked, _) = frames(&sent[PREFACE.len()..]);
    let (said, left) = frames(&answer);
    assert!(left.is_empty(), "half a frame was said");
    assert!(said.iter().all(|f| f.payload.len() <= MAX_PAYLOAD));
    let of = |frames: &[Frame<'_>], kind: u8| frames.iter().filter(|f| f.kind == kind).count();
    let asks = |kind: u8| asked.iter().filter(|f| f.kind == kind && f.flags & 1 == 0).count();
    assert_eq!(of(&said, HEADERS), of(&asked, HEADERS), "a call is answered once");
    assert_eq!(of(&said, RST_STREAM), of(&asked, HEADERS));
    assert_eq!(of(&said, SETTINGS), asks(SETTINGS) + usize::from(!greeted));
    assert_eq!(of(&said, PING), asks(PING));
    for (call, answer) in
        asked.iter().filter(|f| f.kind == HEADERS).zip(said.iter().filter(|f| f.kind == HEADERS))
    {
        assert_eq!(call.stream, answer.stream);
    }
}
