//! Where a body ends. The tracker is fed with the bytes as they come and never changes, holds or joins them:
//! the daemon's chunks are the progress lines that a user is waiting for.

use super::head::{Framing, is_control, is_token};
use crate::error::{Error, Kind};

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
    pub fn feed(&mut self, bytes: &[u8], mut payload: impl FnMut(&[u8])) -> Result<usize, Error> {
        let mut at = 0;
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
                }
                state => {
                    self.state = state.next(bytes[at])?;
                    at += 1;
                }
            }
        }
        Ok(at)
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

fn bad(reason: &str) -> Error {
    Error::new(Kind::BadRequest, format!("bad HTTP body: {reason}"))
}
