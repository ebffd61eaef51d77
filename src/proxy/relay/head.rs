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

const BAD: &str = "bad HTTP request: ";

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

pub(super) fn bad(reason: &str) -> Error {
    Error::new(Kind::BadRequest, format!("{BAD}{reason}"))
}

/// What is wrong with a message, when it is the daemon's.
pub(super) fn fault(reason: &str) -> Error {
    let reason = reason.strip_prefix(BAD).unwrap_or(reason);
    Error::new(Kind::DaemonUnreachable, format!("the daemon sent a bad HTTP response: {reason}"))
}

fn too_large() -> Error {
    Error::new(Kind::HeadTooLarge, "the HTTP head is larger than 1 MiB, the limit of dockerd")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the relay reads it: scanned, then parsed.
    fn request(bytes: &[u8]) -> Result<RequestHead, Error> {
        match Scanner::default().scan(bytes)? {
            Some((start, end)) => RequestHead::parse(bytes[start..end].to_vec()),
            None => Err(bad("incomplete")),
        }
    }

    fn response(text: &str, to_head: bool) -> Result<ResponseHead<'_>, Error> {
        ResponseHead::parse(text.as_bytes(), to_head)
    }

    #[test]
    fn a_head_is_kept_as_it_came() {
        let raw = b"POST /v1.50/build?t=a%3A1&x=1 HTTP/1.1\r\nHost:\r\nX-a:  b c \t\r\nTransfer-encoding: Chunked\r\n\r\n";
        let head = request(raw).unwrap();
        assert_eq!(head.raw(), raw);
        assert_eq!((head.method(), head.path(), head.query()), ("POST", "/v1.50/build", Some("t=a%3A1&x=1")));
        assert_eq!(head.framing, Framing::Chunked);
        assert_eq!(head.header("x-A"), Some(&b"b c"[..]));
        assert_eq!(head.header("host"), Some(&b""[..]));
        assert_eq!(head.header("nothing"), None);
        assert_eq!(head.headers().count(), 3);
        assert!(head.keep_alive && !head.upgrade);
    }

    #[test]
    fn what_docker_clients_send_is_taken() {
        let heads: &[(&str, Framing, bool, bool)] = &[
            ("HEAD /_ping HTTP/1.1\r\nHost: 127.0.0.1:2375\r\n\r\n", Framing::None, true, false),
            ("GET / HTTP/1.0\r\n\r\n", Framing::None, false, false),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", Framing::None, true, false),
            ("GET / HTTP/1.1\r\nConnection: a, close\r\n\r\n", Framing::None, false, false),
            ("OPTIONS * HTTP/1.1\r\n\r\n", Framing::None, true, false),
            (
                "POST /grpc HTTP/1.1\r\nHost: \r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
                Framing::None,
                true,
                true,
            ),
            ("POST / HTTP/1.1\r\nUpgrade: tcp\r\n\r\n", Framing::None, true, false),
            ("POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", Framing::Length(0), true, false),
            (
                "PUT /a//b/../c:1@x HTTP/1.1\r\ncontent-length: 9223372036854775807\r\n\r\n",
                Framing::Length(9_223_372_036_854_775_807),
                true,
                false,
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
                Framing::Length(5),
                true,
                false,
            ),
            ("GET / HTTP/1.1\r\nX: \u{e9}\r\nY:\ttab\tin\r\nZ:\r\n\r\n", Framing::None, true, false),
            ("\r\nGET / HTTP/1.1\r\n\r\n", Framing::None, true, false),
        ];
        for (text, framing, keep_alive, upgrade) in heads {
            let head = request(text.as_bytes()).unwrap_or_else(|e| panic!("{text:?}: {e}"));
            assert_eq!(
                (head.framing, head.keep_alive, head.upgrade),
                (*framing, *keep_alive, *upgrade),
                "{text:?}"
            );
            assert_eq!(head.raw(), text.trim_start().as_bytes());
        }
    }

    #[test]
    fn whatever_two_parsers_may_read_differently_is_refused() {
        let heads: &[&[u8]] = &[
            b"GET / HTTP/1.1\nHost: a\n\n",
            b"GET / HTTP/1.1\r\nHost: a\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\n\n",
            b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n",
            b"GET / HTTP/1.1\rHost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\r\n\tc\r\n\r\n",
            b"GET / HTTP/1.1\r\n A: b\r\n\r\n",
            b"GET / HTTP/1.1\r\nA : b\r\n\r\n",
            b"GET / HTTP/1.1\r\nA\t: b\r\n\r\n",
            b"GET / HTTP/1.1\r\n: b\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/1.1\r\nnocolon\r\n\r\n",
            b"GET / HTTP/1.1\r\nA(b): c\r\n\r\n",
            b"GET / HTTP/1.1\r\nA\xe9: c\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\0c\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\x07c\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\x7fc\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 05\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 5, 5\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 0x5\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 5 5\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length:\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 9223372036854775808\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 18446744073709551621\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding:\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked;a=b\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
            b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET a HTTP/1.1\r\n\r\n",
            b"GET * HTTP/1.1\r\n\r\n",
            b"GET  HTTP/1.1\r\n\r\n",
            b"GET HTTP/1.1\r\n\r\n",
            b"GET  / HTTP/1.1\r\n\r\n",
            b"GET /  HTTP/1.1\r\n\r\n",
            b"GET /a b HTTP/1.1\r\n\r\n",
            b"GET\t/ HTTP/1.1\r\n\r\n",
            b"GET /\xe9 HTTP/1.1\r\n\r\n",
            b"GET /\tx HTTP/1.1\r\n\r\n",
            b"G(T / HTTP/1.1\r\n\r\n",
            b" GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1 \r\n\r\n",
            b"GET / HTTP/1.2\r\n\r\n",
            b"GET / HTTP/2.0\r\n\r\n",
            b"GET / http/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\r\nGET / HTTP/1.1\r\n\r\n",
            b"GET /\r\n",
            b"GET / HTTP/1.1, HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\r\n\r\nGET / HTTP/1.1\r\n\r\n",
            b"\nGET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"xxxx\r\nGET / HTTP/1.1\r\n\r\n",
        ];
        for head in heads {
            let error = match request(head) {
                Ok(_) => panic!("taken: {:?}", String::from_utf8_lossy(head)),
                Err(error) => error,
            };
            assert_eq!(error.kind, Kind::BadRequest);
            assert_ne!(error.message, "bad HTTP request: incomplete", "{:?}", String::from_utf8_lossy(head));
        }
    }

    #[test]
    fn a_head_beyond_dockerds_limit_is_too_large() {
        let mut head = b"GET /".to_vec();
        head.resize(MAX_HEAD - 20, b'a');
        let mut fits = head.clone();
        fits.extend_from_slice(b" HTTP/1.1\r\n\r\n");
        assert!(request(&fits).is_ok());
        head.resize(MAX_HEAD + 1, b'a');
        assert_eq!(Scanner::default().scan(&head).unwrap_err().kind, Kind::HeadTooLarge);
        head.extend_from_slice(b" HTTP/1.1\r\n\r\n");
        assert_eq!(Scanner::default().scan(&head).unwrap_err().kind, Kind::HeadTooLarge);
    }

    #[test]
    fn the_body_of_a_response_depends_on_request_and_status() {
        let ok = "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n";
        assert_eq!(response(ok, false).unwrap().framing, Framing::Length(7));
        assert_eq!(response(ok, true).unwrap().framing, Framing::None);
        for status in [100, 101, 103, 204, 304] {
            let text = format!("HTTP/1.1 {status} X\r\nContent-Length: 7\r\n\r\n");
            assert_eq!(response(&text, false).unwrap().framing, Framing::None);
        }
        let chunked = "HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(response(chunked, false).unwrap().framing, Framing::Chunked);
        let bare = response("HTTP/1.1 200 OK\r\nContent-Type: a\r\n\r\n", false).unwrap();
        assert_eq!((bare.framing, bare.keep_alive), (Framing::UntilClose, true));
        assert_eq!(bare.header("content-type"), Some(&b"a"[..]));
        let old = response("HTTP/1.0 200 OK\r\nContent-Length: 7\r\n\r\n", false).unwrap();
        assert_eq!((old.framing, old.keep_alive), (Framing::Length(7), false));
    }

    #[test]
    fn a_response_with_unclear_framing_is_the_daemons_fault() {
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/1.1 2000\r\n\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "ICY 200 OK\r\n\r\n",
        ] {
            assert_eq!(response(text, false).unwrap_err().kind, Kind::DaemonUnreachable, "{text:?}");
        }
    }

    #[test]
    fn a_head_of_a_mebibyte_in_small_pieces_is_scanned_once() {
        let mut head = b"GET /?buildargs=".to_vec();
        head.resize(1 << 20, b'x');
        head.extend_from_slice(b" HTTP/1.1\r\nHost: a\r\n\r\n");
        let mut scanner = Scanner::default();
        for end in (100..head.len()).step_by(100) {
            assert_eq!(scanner.scan(&head[..end]).unwrap(), None);
            assert!(scanner.at + 1 >= end);
        }
        assert_eq!(scanner.scan(&head).unwrap(), Some((0, head.len())));
    }

    proptest! {
        #[test]
        fn any_split_finds_the_same_end(cuts in prop::collection::vec(0_usize..80, 0..12)) {
            let bytes = b"\r\nPOST /a?b HTTP/1.1\r\nHost: x\r\nA: b\r\nContent-Length: 3\r\n\r\nabcGET / HTT";
            let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let mut scanner = Scanner::default();
            let found = cuts.iter().find_map(|&cut| scanner.scan(&bytes[..cut]).unwrap());
            prop_assert_eq!(found, Some((2, bytes.len() - 12)));
        }

        /// What is taken, httparse takes too, and reads the same in it.
        #[test]
        fn httparse_agrees(
            line in "(GET|PO ST|P\u{e9}T|POST|) ?(/[a-z?%\u{e9} ]{0,8}|\\*|http://a/) ?(HTTP/1.[0129])",
            fields in prop::collection::vec("[A-Za-z\u{e9} -]{0,6} ?: ?[a-z ,\t\u{e9}\u{1}]{0,8}(\r\n [a-z]|\n|\r)?", 0..4),
        ) {
            let text = format!("{line}\r\n{}\r\n", fields.iter().map(|f| format!("{f}\r\n")).collect::<String>());
            if let Ok(head) = request(text.as_bytes()) {
                let mut space = [httparse::EMPTY_HEADER; 16];
                let mut oracle = httparse::Request::new(&mut space);
                let parsed = oracle.parse(text.as_bytes()).unwrap();
                prop_assert_eq!(parsed, httparse::Status::Complete(head.raw().len()));
                prop_assert_eq!(oracle.method, Some(head.method()));
                prop_assert_eq!(oracle.path, Some(head.target()));
                let theirs: Vec<_> = oracle.headers.iter().map(|h| (h.name, h.value.trim_ascii())).collect();
                prop_assert_eq!(theirs, head.headers().collect::<Vec<_>>());
            }
        }

        #[test]
        fn nothing_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), tail in ".{0,80}") {
            let _ = request(&bytes);
            let text = format!("GET / HTTP/1.1\r\n{tail}\r\n\r\n");
            let _ = request(text.as_bytes());
            let _ = ResponseHead::parse(&bytes, false);
            let _ = RequestHead::parse(bytes);
        }
    }
}
