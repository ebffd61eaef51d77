//! Request and response heads: found in the byte stream, validated, and then forwarded byte for byte.
//!
//! Two readers that disagree about where a message ends are a smuggling hole, so everything on which parsers
//! are known to differ is refused: bare CR or LF, folded lines, blanks before the colon, Content-Length beside
//! Transfer-Encoding, lists in Content-Length, any coding but `chunked`. What remains has one meaning.
//!
//! The parser is our own and not httparse, because a head has to be scanned incrementally anyway (a head of
//! 1 MiB may come in small pieces), and that scan already decides most of the strictness; httparse would be a
//! second pass that takes bare LF and needs a header array of fixed size. It is the oracle in the tests.

use std::ops::ControlFlow;

use crate::error::{Error, Kind};

/// The largest head that is taken: dockerd's own limit (Go's 1 MiB and the 4 KiB of its reader), since build
/// args travel in the query.
pub const MAX_HEAD: usize = (1 << 20) + 4096;

/// How the end of a message body is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    None,
    /// So many bytes.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// A response that ends with its connection.
    UntilClose,
}

/// The two versions that are spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
}

/// A validated request head, with its bytes as they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead {
    raw: Vec<u8>,
    method_len: u32,
    target_end: u32,
    fields_at: u32,
    /// The version in the request line.
    pub version: Version,
    /// How the request body ends; never [`Framing::UntilClose`].
    pub framing: Framing,
    /// Whether the client wants to use its connection again.
    pub keep_alive: bool,
    /// Whether it asks for another protocol: an `Upgrade` field that `Connection` names.
    pub upgrade: bool,
    /// Whether the client may hold its body back until a `100 Continue`.
    pub expect_continue: bool,
}

impl RequestHead {
    /// Parses a whole head, from its first letter to its empty line, as [`Scanner`] finds it.
    ///
    /// # Errors
    /// `Kind::BadRequest`, with the reason.
    pub fn parse(raw: Vec<u8>) -> Result<Self, Error> {
        let line = first_line(&raw);
        let fields_at = line.len() + 2;
        let method_len = position(line, b' ').ok_or_else(|| bad("the request line has no target"))?;
        let (method, rest) = (&line[..method_len], &line[method_len + 1..]);
        if method.is_empty() || !method.iter().all(|&b| is_token(b)) {
            return Err(bad("the method is not a token"));
        }
        let target_len = position(rest, b' ').ok_or_else(|| bad("the request line has no version"))?;
        let version = match &rest[target_len + 1..] {
            b"HTTP/1.1" => Version::Http11,
            b"HTTP/1.0" => Version::Http10,
            _ => return Err(bad("the request line does not end with HTTP/1.1 or HTTP/1.0")),
        };
        check_target(method, &rest[..target_len])?;
        let facts = Facts::collect(&raw[fields_at..])?;
        if facts.hosts > 1 {
            return Err(bad("more than one Host field"));
        }
        if facts.chunked && version == Version::Http10 {
            return Err(bad("Transfer-Encoding in an HTTP/1.0 request"));
        }
        let framing = facts.framing().unwrap_or(Framing::None);
        Ok(RequestHead {
            method_len: as_u32(method_len),
            target_end: as_u32(method_len + 1 + target_len),
            fields_at: as_u32(fields_at),
            version,
            framing,
            keep_alive: facts.keep_alive(version),
            upgrade: facts.upgrade && facts.connection_upgrade,
            expect_continue: facts.expect_continue,
            raw,
        })
    }

    /// The head as it came, with its empty line.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// `GET`, `POST`, …
    pub fn method(&self) -> &str {
        ascii(&self.raw[..self.method_len as usize])
    }

    /// Path and query as they came.
    pub fn target(&self) -> &str {
        ascii(&self.raw[self.method_len as usize + 1..self.target_end as usize])
    }

    /// The target up to its `?`.
    pub fn path(&self) -> &str {
        let target = self.target();
        target.split_once('?').map_or(target, |(path, _)| path)
    }

    /// The target after its `?`.
    pub fn query(&self) -> Option<&str> {
        self.target().split_once('?').map(|(_, query)| query)
    }

    /// All fields, in order.
    pub fn headers(&self) -> Fields<'_> {
        Fields { rest: &self.raw[self.fields_at as usize..] }
    }

    /// The first field of that name, in any case.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// A response head, borrowed from the buffer that it was read into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResponseHead<'a> {
    raw: &'a [u8],
    fields_at: usize,
    /// The status code.
    pub status: u16,
    /// The version in the status line.
    pub version: Version,
    /// How the body ends, given the method of the request.
    pub framing: Framing,
    /// Whether the daemon will use its connection again.
    pub keep_alive: bool,
}

impl<'a> ResponseHead<'a> {
    /// Parses a whole head. `to_head` says that the request was a HEAD, whose response never has a body.
    ///
    /// # Errors
    /// What is wrong with it; the daemon's fault.
    pub fn parse(raw: &'a [u8], to_head: bool) -> Result<Self, Error> {
        let line = first_line(raw);
        let fields_at = line.len() + 2;
        let version = match line.get(..9) {
            Some(b"HTTP/1.1 ") => Version::Http11,
            Some(b"HTTP/1.0 ") => Version::Http10,
            _ => return Err(fault("its status line does not begin with HTTP/1.1 or HTTP/1.0")),
        };
        let status = match &line[9..] {
            [a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9', rest @ ..]
                if rest.first().is_none_or(|&b| b == b' ') =>
            {
                u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0')
            }
            _ => return Err(fault("its status code is not a number of three digits")),
        };
        let facts = Facts::collect(&raw[fields_at..]).map_err(|e| fault(&e.message))?;
        if facts.chunked && version == Version::Http10 {
            return Err(fault("Transfer-Encoding in an HTTP/1.0 response"));
        }
        let framing = if to_head || matches!(status, 100..=199 | 204 | 304) {
            Framing::None
        } else {
            facts.framing().unwrap_or(Framing::UntilClose)
        };
        let keep_alive = facts.keep_alive(version);
        Ok(ResponseHead { raw, fields_at, status, version, framing, keep_alive })
    }

    /// The head as it came, with its empty line.
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// Whether a final response follows (1xx but not 101, which is final).
    pub fn is_interim(&self) -> bool {
        matches!(self.status, 100..=199) && self.status != 101
    }

    /// All fields, in order.
    pub fn headers(&self) -> Fields<'a> {
        Fields { rest: &self.raw[self.fields_at..] }
    }

    /// The first field of that name, in any case.
    pub fn header(&self, name: &str) -> Option<&'a [u8]> {
        self.headers().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// The fields of a validated head: name, and value without the blanks around it.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Fields<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let line = first_line(self.rest);
        self.rest = self.rest.get(line.len() + 2..).unwrap_or_default();
        let colon = position(line, b':')?;
        Some((ascii(&line[..colon]), line[colon + 1..].trim_ascii()))
    }
}

/// Finds the end of a head in a growing buffer, without looking at any byte twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scanner {
    at: usize,
    line: usize,
    start: usize,
    reach: usize,
}

impl Scanner {
    /// Looks at what has been added to `buf` since the last call. Yields where the head starts (behind the
    /// empty line that RFC 9112 allows before a request) and where it ends.
    ///
    /// # Errors
    /// As soon as the bytes cannot become a head: bare CR or LF, control characters, a first line without a
    /// version, two leading empty lines, more than [`MAX_HEAD`] bytes.
    pub fn scan(&mut self, buf: &[u8]) -> Result<Option<(usize, usize)>, Error> {
        self.reach = buf.len();
        while let Some(skip) = buf[self.at..].iter().position(|&b| is_control(b)) {
            self.at += skip;
            match (buf[self.at], buf.get(self.at + 1)) {
                (b'\r', Some(b'\n')) => {
                    if let ControlFlow::Break(end) = self.end_of_line(buf)? {
                        return Ok(Some((self.start, end)));
                    }
                }
                (b'\r', None) => return self.incomplete(buf),
                (b'\r', Some(_)) => return Err(bad("a CR without LF in the head")),
                (b'\n', _) => return Err(bad("a LF without CR in the head")),
                _ => return Err(bad("a control character in the head")),
            }
        }
        self.at = buf.len();
        self.incomplete(buf)
    }

    /// How many bytes have been looked at; when a buffer holds no more, more must be read.
    pub(super) fn reach(&self) -> usize {
        self.reach
    }

    fn end_of_line(&mut self, buf: &[u8]) -> Result<ControlFlow<usize>, Error> {
        let line = &buf[self.line..self.at];
        let first = self.line == self.start;
        self.at += 2;
        self.line = self.at;
        match (line.is_empty(), first) {
            (true, true) if self.start == 0 => self.start = 2,
            (true, true) => return Err(bad("empty lines before the head")),
            (true, false) if self.at - self.start > MAX_HEAD => return Err(too_large()),
            (true, false) => return Ok(ControlFlow::Break(self.at)),
            // Said at once, since the empty line may never come (HTTP/0.9, another protocol).
            (false, true) if position(line, b' ').is_none() || !speaks_http1(line) => {
                return Err(bad("the first line is not HTTP/1.1 or HTTP/1.0"));
            }
            (false, _) => {}
        }
        Ok(ControlFlow::Continue(()))
    }

    fn incomplete(&self, buf: &[u8]) -> Result<Option<(usize, usize)>, Error> {
        if buf.len() - self.start > MAX_HEAD { Err(too_large()) } else { Ok(None) }
    }
}

/// Whether a first line ends (request) or begins (response) with a version that is spoken here.
fn speaks_http1(line: &[u8]) -> bool {
    let (head, tail) = (line.get(..8), line.len().checked_sub(8).map(|at| &line[at..]));
    [head, tail].into_iter().flatten().any(|v| v == b"HTTP/1.1" || v == b"HTTP/1.0")
}

fn check_target(method: &[u8], target: &[u8]) -> Result<(), Error> {
    if target == b"*" && method == b"OPTIONS" {
        return Ok(());
    }
    if target.first() != Some(&b'/') {
        return Err(bad("the request target does not begin with /"));
    }
    if !target.iter().all(|b| (0x21..=0x7e).contains(b)) {
        return Err(bad("the request target holds a byte that must be percent-encoded"));
    }
    Ok(())
}

/// What the fields of a head say about framing and connection.
#[derive(Default)]
struct Facts<'a> {
    length: Option<(&'a [u8], u64)>,
    chunked: bool,
    close: bool,
    keep: bool,
    connection_upgrade: bool,
    upgrade: bool,
    expect_continue: bool,
    hosts: usize,
}

impl<'a> Facts<'a> {
    fn collect(mut fields: &'a [u8]) -> Result<Self, Error> {
        let mut facts = Facts::default();
        loop {
            let line = first_line(fields);
            if line.is_empty() {
                break;
            }
            fields = fields.get(line.len() + 2..).unwrap_or_default();
            facts.field(line)?;
        }
        if facts.chunked && facts.length.is_some() {
            return Err(bad("both Content-Length and Transfer-Encoding"));
        }
        Ok(facts)
    }

    fn field(&mut self, line: &'a [u8]) -> Result<(), Error> {
        if matches!(line[0], b' ' | b'\t') {
            return Err(bad("a folded header line"));
        }
        let name_len = line.iter().position(|&b| !is_token(b)).unwrap_or(line.len());
        if name_len == 0 || line.get(name_len) != Some(&b':') {
            return Err(bad("a header line without a valid name before its colon"));
        }
        let (name, value) = (&line[..name_len], line[name_len + 1..].trim_ascii());
        let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
        match name_len {
            4 if is("host") => self.hosts += 1,
            6 if is("expect") => self.expect_continue |= value.eq_ignore_ascii_case(b"100-continue"),
            7 if is("upgrade") => self.upgrade = true,
            10 if is("connection") => self.connection(value),
            14 if is("content-length") => self.content_length(value)?,
            17 if is("transfer-encoding") => self.transfer_encoding(value)?,
            _ => {}
        }
        Ok(())
    }

    fn connection(&mut self, value: &[u8]) {
        for token in value.split(|&b| b == b',').map(<[u8]>::trim_ascii) {
            self.close |= token.eq_ignore_ascii_case(b"close");
            self.keep |= token.eq_ignore_ascii_case(b"keep-alive");
            self.connection_upgrade |= token.eq_ignore_ascii_case(b"upgrade");
        }
    }

    fn content_length(&mut self, value: &'a [u8]) -> Result<(), Error> {
        let digits = !value.is_empty() && value.len() <= 19 && value.iter().all(u8::is_ascii_digit);
        let length = digits.then(|| ascii(value).parse::<u64>().ok()).flatten();
        let length = length
            .filter(|&n| n <= i64::MAX as u64)
            .ok_or_else(|| bad("Content-Length is not one decimal number"))?;
        if self.length.is_some_and(|(other, _)| other != value) {
            return Err(bad("several different Content-Length fields"));
        }
        self.length = Some((value, length));
        Ok(())
    }

    fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), Error> {
        if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(bad("Transfer-Encoding is not exactly chunked"));
        }
        self.chunked = true;
        Ok(())
    }

    fn framing(&self) -> Option<Framing> {
        if self.chunked { Some(Framing::Chunked) } else { self.length.map(|(_, n)| Framing::Length(n)) }
    }

    fn keep_alive(&self, version: Version) -> bool {
        !self.close && (version == Version::Http11 || self.keep)
    }
}

/// A tchar of RFC 9110.
pub(super) fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// Anything that no head may hold inside a line.
pub(super) fn is_control(b: u8) -> bool {
    (b < 0x20 && b != b'\t') || b == 0x7f
}

fn position(bytes: &[u8], wanted: u8) -> Option<usize> {
    bytes.iter().position(|&b| b == wanted)
}

/// Up to the first CR: the scanner has seen to it that a CR is always half of a CRLF.
fn first_line(bytes: &[u8]) -> &[u8] {
    position(bytes, b'\r').map_or(bytes, |end| &bytes[..end])
}

/// Methods, targets, field names and digits: all checked to be ASCII before.
fn ascii(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// Heads are bounded by [`MAX_HEAD`].
fn as_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn bad(reason: &str) -> Error {
    Error::new(Kind::BadRequest, format!("bad HTTP request: {reason}"))
}

fn fault(reason: &str) -> Error {
    Error::new(Kind::DaemonUnreachable, format!("the daemon sent a bad HTTP response: {reason}"))
}

fn too_large() -> Error {
    Error::new(Kind::HeadTooLarge, "the request head is larger than 1 MiB, the limit of dockerd")
}
