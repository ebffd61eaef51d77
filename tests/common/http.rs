//! HTTP/1 on a raw blocking socket: what is sent is what the test says, byte for byte, and what comes is kept
//! as it came. A client library would repair exactly the faults that the tests are about.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::secs;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addr {
    /// host:port
    Tcp(String),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl Addr {
    /// Parses `tcp://…`, `http://…` and `unix://…`.
    pub fn parse(url: &str) -> Addr {
        match url.split_once("://") {
            Some(("unix", path)) => Addr::Unix(path.into()),
            Some(("tcp" | "http", host)) => Addr::Tcp(host.trim_end_matches('/').into()),
            _ => panic!("neither tcp:// nor unix://: {url}"),
        }
    }

    /// As `DOCKER_HOST` wants it.
    pub fn url(&self) -> String {
        match self {
            Addr::Tcp(host) => format!("tcp://{host}"),
            Addr::Unix(path) => format!("unix://{}", path.display()),
        }
    }
}

/// A socket of either kind.
#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn timeout(&self, time: Option<Duration>) {
        match self {
            Stream::Tcp(s) => s.set_read_timeout(time),
            Stream::Unix(s) => s.set_read_timeout(time),
        }
        .expect("a read timeout");
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(s) => s.as_fd(),
            Stream::Unix(s) => s.as_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.read(buf),
            Stream::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.write(buf),
            Stream::Unix(s) => s.write(buf),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A response head (or, at the fake daemon, a request head).
#[derive(Debug, Clone)]
pub struct Head {
    /// First line, without its end.
    pub line: String,
    /// Names as they came.
    pub headers: Vec<(String, String)>,
    /// Everything, as it came, with the empty line.
    pub raw: Vec<u8>,
}

impl Head {
    fn parse(raw: Vec<u8>) -> Head {
        let text = String::from_utf8_lossy(&raw).into_owned();
        let mut lines = text.split("\r\n");
        let line = lines.next().unwrap_or_default().to_owned();
        let headers = lines
            .filter_map(|l| l.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        Head { line, headers, raw }
    }

    /// The status code; 0 when this is no status line.
    pub fn status(&self) -> u16 {
        self.line.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0)
    }

    /// A header's value, its name in any case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// Whether the body is chunked.
    pub fn chunked(&self) -> bool {
        self.get("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked"))
    }

    /// The declared length.
    pub fn length(&self) -> Option<usize> {
        self.get("content-length").and_then(|v| v.parse().ok())
    }
}

/// A connection with a read buffer.
#[derive(Debug)]
pub struct Conn {
    pub stream: Stream,
    buf: Vec<u8>,
}

impl Conn {
    /// Connects; every read gives up after 30 s unless told otherwise.
    pub fn connect(addr: &Addr) -> Conn {
        Self::try_connect(addr).unwrap_or_else(|e| panic!("cannot connect to {}: {e}", addr.url()))
    }

    /// Connects, or tells why not.
    pub fn try_connect(addr: &Addr) -> io::Result<Conn> {
        let stream = match addr {
            Addr::Tcp(host) => {
                let stream = TcpStream::connect(host)?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Addr::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        };
        Ok(Self::over(stream))
    }

    /// A connection over an open socket.
    pub fn over(stream: Stream) -> Conn {
        stream.timeout(Some(secs(30)));
        Conn { stream, buf: Vec::new() }
    }

    /// How long a read may wait.
    pub fn patience(&self, time: Duration) {
        self.stream.timeout(Some(time));
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).expect("the peer takes the bytes");
    }

    /// Sends bytes as they are, to a peer that may have closed.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    /// Sends FIN and goes on reading.
    pub fn half_close(&self) {
        match &self.stream {
            Stream::Tcp(s) => s.shutdown(Shutdown::Write),
            Stream::Unix(s) => s.shutdown(Shutdown::Write),
        }
        .expect("half-close");
    }

    /// Closes with RST instead of FIN.
    pub fn reset(self) {
        if let Stream::Tcp(s) = &self.stream {
            socket2::SockRef::from(s).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 64 * 1024];
        // A read with a deadline is interrupted by any signal: a process that has children hears of their ends.
        let n = loop {
            match self.stream.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        self.buf.extend_from_slice(&chunk[..n]);
        Ok(n)
    }

    /// Reads a head; `UnexpectedEof` when the peer ends before its end.
    pub fn try_head(&mut self) -> io::Result<Head> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.buf[searched..].windows(4).position(|w| w == b"\r\n\r\n") {
                let rest = self.buf.split_off(searched + at + 4);
                return Ok(Head::parse(std::mem::replace(&mut self.buf, rest)));
            }
            searched = self.buf.len().saturating_sub(3);
            if self.fill()? == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("the connection ended in a head: {:?}", String::from_utf8_lossy(&self.buf)),
                ));
            }
        }
    }

    /// Reads a head.
    #[track_caller]
    pub fn head(&mut self) -> Head {
        self.try_head().unwrap_or_else(|e| panic!("no head: {e}"))
    }

    /// Exactly `n` bytes.
    pub fn try_exact(&mut self, n: usize) -> io::Result<Vec<u8>> {
        while self.buf.len() < n {
            if self.fill()? == 0 {
                let have = self.buf.len();
                let what = format!("ended after {have} of {n} bytes");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
            }
        }
        let rest = self.buf.split_off(n);
        Ok(std::mem::replace(&mut self.buf, rest))
    }

    /// Exactly `n` bytes.
    #[track_caller]
    pub fn exact(&mut self, n: usize) -> Vec<u8> {
        self.try_exact(n).unwrap_or_else(|e| panic!("no {n} bytes: {e}"))
    }

    /// The next bytes, at least one unless the peer has ended.
    pub fn some(&mut self) -> io::Result<Vec<u8>> {
        if self.buf.is_empty() {
            self.fill()?;
        }
        Ok(std::mem::take(&mut self.buf))
    }

    /// Everything up to the end of the stream, which must be a clean one.
    pub fn try_rest(&mut self) -> io::Result<Vec<u8>> {
        while self.fill()? > 0 {}
        Ok(std::mem::take(&mut self.buf))
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(at) = self.buf.windows(2).position(|w| w == b"\r\n") {
                let line = self.try_exact(at + 2)?;
                return Ok(String::from_utf8_lossy(&line[..at]).into_owned());
            }
            if self.fill()? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "ended in a chunk's size"));
            }
        }
    }

    /// One chunk of a chunked body; `None` after the last one.
    pub fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = self.line()?;
        let size = usize::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("no chunk size: {line:?}")))?;
        let mut data = self.try_exact(size + 2)?;
        data.truncate(size);
        Ok((size > 0).then_some(data))
    }

    /// The body of a response by its framing. A cut body is an error, never a short one.
    pub fn try_body(&mut self, method: &str, head: &Head) -> io::Result<Vec<u8>> {
        let status = head.status();
        if method == "HEAD" || status < 200 || status == 204 || status == 304 {
            Ok(Vec::new())
        } else if head.chunked() {
            let mut body = Vec::new();
            while let Some(chunk) = self.chunk()? {
                body.extend(chunk);
            }
            Ok(body)
        } else if let Some(n) = head.length() {
            self.try_exact(n)
        } else {
            self.try_rest()
        }
    }

    /// The body of a response by its framing.
    #[track_caller]
    pub fn body(&mut self, method: &str, head: &Head) -> Vec<u8> {
        self.try_body(method, head).unwrap_or_else(|e| panic!("no body for {}: {e}", head.line))
    }

    /// Whether the peer ends the connection within `deadline`; what it still sends is dropped.
    pub fn ends_within(&mut self, deadline: Duration) -> bool {
        let end = Instant::now() + deadline;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.patience(left);
            match self.fill() {
                Ok(0) => return true,
                Ok(_) => self.buf.clear(),
                Err(e) => {
                    return !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                }
            }
        }
    }

    /// The pid of the process that listens on the other end of this Unix socket.
    pub fn peer_pid(&self) -> i32 {
        let cred = nix::sys::socket::getsockopt(&self.stream, nix::sys::socket::sockopt::PeerCredentials);
        cred.expect("SO_PEERCRED").pid()
    }

    /// For messages.
    pub fn fd(&self) -> i32 {
        self.stream.as_fd().as_raw_fd()
    }
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub head: Head,
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("no JSON ({e}) after {}: {}", self.head.line, self.text()))
    }
}

/// One request on a connection of its own.
pub fn try_request(addr: &Addr, method: &str, path: &str, body: Option<&Value>) -> io::Result<Answer> {
    let mut conn = Conn::try_connect(addr)?;
    let body = body.map(Value::to_string);
    let entity = match &body {
        Some(b) => format!("Content-Type: application/json\r\nContent-Length: {}\r\n", b.len()),
        None => String::new(),
    };
    conn.try_send(format!(
        "{method} {path} HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n{entity}\r\n{}",
        body.unwrap_or_default()
    ))?;
    let head = conn.try_head()?;
    let body = conn.try_body(method, &head)?;
    Ok(Answer { head, body })
}

/// One request on a connection of its own, which must be answered.
#[track_caller]
pub fn request(addr: &Addr, method: &str, path: &str, body: Option<&Value>) -> Answer {
    try_request(addr, method, path, body).unwrap_or_else(|e| panic!("{method} {path} at {}: {e}", addr.url()))
}

/// `GET`, whatever its status.
#[track_caller]
pub fn get(addr: &Addr, path: &str) -> Answer {
    request(addr, "GET", path, None)
}
