//! Where a body ends. The tracker is fed with the bytes as they come and never changes, holds or joins them:
//! the daemon's chunks are the progress lines that a user is waiting for.

use super::head::{Framing, bad, is_control, is_token};
use crate::error::Error;

/// Bound of one chunk's extension, and of all trailers together.
const MAX_EXTENSION: u32 = 4096;
const MAX_TRAILERS: u32 = 64 * 1024;

/// Follows one body through the byte stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Body {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Done,
    Length(u64),
    UntilClose,
    /// In a chunk's size; how many digits there were.
    Size(u64, u8),
    Extension(u64, u32),
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// At the beginning of a trailer line, in its name, in its value, at its LF; how many bytes there were.
    Trailer(u32),
    TrailerName(u32),
    TrailerValue(u32),
    TrailerLf(u32),
    LastLf,
}

impl Body {
    /// A body that ends as `framing` says.
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(n) => State::Length(n),
            Framing::Chunked => State::Size(0, 0),
            Framing::UntilClose => State::UntilClose,
        };
        Body { state }
    }

    /// Whether the last byte of the body has been seen.
    pub fn is_complete(&self) -> bool {
        self.state == State::Done
    }

    /// Whether nothing but the end of the connection ends this body.
    pub fn is_until_close(&self) -> bool {
        self.state == State::UntilClose
    }

    /// Whether another chunk may be put in here.
    pub fn at_chunk_boundary(&self) -> bool {
        self.state == State::Size(0, 0)
    }

    /// Takes the next bytes of the stream and says how many of them belong to the body; the others follow it.
    /// `payload` is shown what the body says, without the framing of chunks.
    ///
    /// # Errors
    /// Chunk syntax. Nothing of `bytes` should be forwarded then, and the body is lost.
    pub fn feed(&mut self, bytes: &[u8], payload: impl FnMut(&[u8])) -> Result<usize, Error> {
        match self.feed_good(bytes, payload) {
            (used, None) => Ok(used),
            (_, Some(error)) => Err(error),
        }
    }

    /// Like [`Body::feed`], but what is wrong only ends it: the bytes before, up to the last chunk or piece of
    /// one, are taken, and the body is where it was behind them.
    pub fn feed_good(&mut self, bytes: &[u8], mut payload: impl FnMut(&[u8])) -> (usize, Option<Error>) {
        let (mut at, mut good) = (0, (0, self.state));
        while at < bytes.len() {
            match self.state {
                State::Done => break,
                State::UntilClose => {
                    payload(&bytes[at..]);
                    at = bytes.len();
                }
                State::Length(left) | State::Data(left) => {
                    let rest = &bytes[at..];
                    let take = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
                    payload(&rest[..take]);
                    at += take;
                    self.state = self.after_data(left - take as u64);
                    good = (at, self.state);
                }
                state => match state.next(bytes[at]) {
                    Ok(next) => {
                        self.state = next;
                        at += 1;
                        if self.at_chunk_boundary() {
                            good = (at, next);
                        }
                    }
                    Err(error) => {
                        self.state = good.1;
                        return (good.0, Some(error));
                    }
                },
            }
        }
        (at, None)
    }

    fn after_data(&self, left: u64) -> State {
        match (self.state, left) {
            (State::Length(_), 0) => State::Done,
            (State::Length(_), n) => State::Length(n),
            (_, 0) => State::DataCr,
            (_, n) => State::Data(n),
        }
    }
}

impl State {
    /// One byte of chunk framing.
    fn next(self, b: u8) -> Result<State, Error> {
        Ok(match (self, b) {
            (State::Size(size, digits), _) if b.is_ascii_hexdigit() => {
                let digit = (b as char).to_digit(16).map_or(0, u64::from);
                // Sizes stay below 2^63, and leading zeros are bounded with the digits.
                if size >= 1 << 59 || digits >= 16 {
                    return Err(bad("a chunk size too large"));
                }
                State::Size(size << 4 | digit, digits + 1)
            }
            (State::Size(size, 1..), b'\r') => State::SizeLf(size),
            (State::Size(size, 1..), b';') => State::Extension(size, 0),
            (State::Size(..), _) => return Err(bad("a chunk size that is not hexadecimal")),
            (State::Extension(size, _), b'\r') => State::SizeLf(size),
            (State::Extension(size, n), _) if n < MAX_EXTENSION && !is_control(b) => {
                State::Extension(size, n + 1)
            }
            (State::Extension(..), _) => return Err(bad("a bad chunk extension")),
            (State::SizeLf(0), b'\n') => State::Trailer(0),
            (State::SizeLf(size), b'\n') => State::Data(size),
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::Size(0, 0),
            (State::Trailer(_), b'\r') => State::LastLf,
            (State::LastLf, b'\n') => State::Done,
            (State::Trailer(n) | State::TrailerName(n), _) if n < MAX_TRAILERS && is_token(b) => {
                State::TrailerName(n + 1)
            }
            (State::TrailerName(n), b':') => State::TrailerValue(n + 1),
            (State::TrailerValue(n), b'\r') => State::TrailerLf(n + 1),
            (State::TrailerValue(n), _) if n < MAX_TRAILERS && !is_control(b) => State::TrailerValue(n + 1),
            (State::TrailerLf(n), b'\n') => State::Trailer(n + 1),
            (State::Trailer(_) | State::TrailerName(_) | State::TrailerValue(_), _) => {
                return Err(bad("a bad trailer"));
            }
            _ => return Err(bad("a chunk that does not end with CRLF")),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHUNKED: &[u8] =
        b"5\r\nhello\r\n1;name=\"v\"\r\n \r\n00a\r\n0123456789\r\n0\r\nX-T: a b\r\nY:\r\n\r\n";

    /// Feeds the pieces and gives back (bytes of the body, payload).
    fn run(framing: Framing, pieces: &[&[u8]]) -> Result<(Body, usize, Vec<u8>), Error> {
        let (mut body, mut used, mut payload) = (Body::new(framing), 0, Vec::new());
        for piece in pieces {
            used += body.feed(piece, |p| payload.extend_from_slice(p))?;
        }
        Ok((body, used, payload))
    }

    #[test]
    fn a_chunked_body_ends_behind_its_trailers_wherever_it_is_cut() {
        let mut stream = CHUNKED.to_vec();
        stream.extend_from_slice(b"GET /");
        for cut in 0..=stream.len() {
            let (body, used, payload) = run(Framing::Chunked, &[&stream[..cut], &stream[cut..]]).unwrap();
            assert!(body.is_complete());
            assert_eq!(payload, b"hello 0123456789");
            assert_eq!(used, CHUNKED.len());
        }
    }

    #[test]
    fn a_chunk_may_be_put_in_between_two_chunks_only() {
        let boundaries: Vec<_> = (0..=CHUNKED.len())
            .filter(|&cut| run(Framing::Chunked, &[&CHUNKED[..cut]]).unwrap().0.at_chunk_boundary())
            .collect();
        assert_eq!(boundaries, [0, 10, 25, 42]);
    }

    #[test]
    fn the_other_framings_end_where_they_say() {
        for (framing, used, complete) in [
            (Framing::None, 0, true),
            (Framing::Length(0), 0, true),
            (Framing::Length(3), 3, true),
            (Framing::Length(9), 6, false),
            (Framing::Length(u64::MAX), 6, false),
            (Framing::UntilClose, 6, false),
        ] {
            let (body, n, payload) = run(framing, &[b"ab", b"cdef"]).unwrap();
            assert_eq!((n, body.is_complete(), payload.len()), (used, complete, used), "{framing:?}");
        }
    }

    #[test]
    fn bad_chunks_are_refused() {
        let long_extension = format!("1;{}\r\n", "a".repeat(5000));
        let long_trailers = format!("0\r\n{}", "A: b\r\n".repeat(20_000));
        for bytes in [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "+1\r\n",
            "0x1\r\n",
            " 1\r\n",
            "1 \r\n",
            "1\t;a\r\n",
            "1\n",
            "1\ra",
            "1;a\n",
            "1;a\u{1}\r\n",
            "1\r\nab",
            "1\r\na\n",
            "1\r\na\ra",
            "1\r\na\r\n\r\n",
            "8000000000000000\r\n",
            "fffffffffffffffff\r\n",
            "00000000000000001\r\n",
            "0\r\n\n",
            "0\r\nA\r\n",
            "0\r\nA b: c\r\n",
            "0\r\n a: c\r\n",
            "0\r\n: c\r\n",
            "0\r\nA: c\n",
            "0\r\nA: c\r\r",
            "0\r\nA: c\0\r\n",
            &long_extension,
            &long_trailers,
        ] {
            assert!(
                run(Framing::Chunked, &[bytes.as_bytes()]).is_err(),
                "{:?}",
                &bytes[..bytes.len().min(40)]
            );
        }
    }

    #[test]
    fn what_comes_before_a_bad_chunk_can_be_taken_alone() {
        for (bytes, good) in [("2\r\n{}\r\nraw", 7), ("2\r\n{}raw", 5), ("raw", 0), ("2\r\n{}\r\nab\n", 7)] {
            let (mut body, mut payload) = (Body::new(Framing::Chunked), Vec::new());
            let (used, error) = body.feed_good(bytes.as_bytes(), |p| payload.extend_from_slice(p));
            assert!(error.is_some());
            assert_eq!((used, payload.len()), (good, good.min(2)), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_split_of_a_body_gives_the_same(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..6),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..10),
            tail in prop::collection::vec(any::<u8>(), 0..10),
        ) {
            let mut stream = Vec::new();
            for chunk in &chunks {
                stream.extend_from_slice(format!("{:X}\r\n", chunk.len()).as_bytes());
                stream.extend_from_slice(chunk);
                stream.extend_from_slice(b"\r\n");
            }
            stream.extend_from_slice(b"0\r\n\r\n");
            let end = stream.len();
            stream.extend_from_slice(&tail);
            let mut cuts: Vec<_> = cuts.iter().map(|c| c.index(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|w| &stream[w[0]..w[1]]).collect();
            let (body, used, payload) = run(Framing::Chunked, &pieces).unwrap();
            prop_assert!(body.is_complete());
            prop_assert_eq!(used, end);
            prop_assert_eq!(payload, chunks.concat());
        }

        #[test]
        fn nothing_makes_the_tracker_panic(bytes in "[0-9a-f;\r\n:A \u{1}]{0,60}") {
            let _ = run(Framing::Chunked, &[bytes.as_bytes()]);
        }
    }
}
