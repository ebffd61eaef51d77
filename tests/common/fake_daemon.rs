//! A scriptable fake daemon, **only for faults that a real daemon cannot be made to show**: a reset in mid-body,
//! a wrong framing, silence, bytes counted to the last one. What a real dockerd can show is tested with a real
//! one, because a fake proves nothing about Docker.
//!
//! It answers what a pool asks of any daemon (`/_ping`, `/version`, `/info`, `/events`, the lists) plausibly, so
//! that it becomes ready; a script takes over the requests that a test is about. It keeps every head and every
//! byte that arrives, and when each connection ended: a test can assert that nothing arrived at all.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::http::{Addr, Conn, Head, Stream};
use super::unique;

/// What a test makes of one request: called when its head has come.
pub type Act = dyn Fn(&mut Exchange) + Send + Sync;

/// Which range of API versions it claims.
#[derive(Debug, Clone, Copy)]
pub struct Api {
    pub max: &'static str,
    pub min: &'static str,
}

/// The API of dockerd 28.5.
pub const API_28: Api = Api { max: "1.51", min: "1.24" };
/// The API of dockerd 26.1.
pub const API_26: Api = Api { max: "1.45", min: "1.24" };
/// The API of dockerd 29.3.
pub const API_29: Api = Api { max: "1.54", min: "1.40" };

/// One request as it arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Number of the connection.
    pub conn: usize,
    /// First line of its head.
    pub line: String,
    /// The head as it came.
    pub raw: Vec<u8>,
}

/// One request in the hands of a script.
pub struct Exchange {
    /// Its head.
    pub head: Head,
    /// The connection; the body, if any, is still to be read.
    pub conn: Conn,
    /// Set when the script has ended the connection itself.
    closed: bool,
}

impl Exchange {
    /// Method of the request.
    pub fn method(&self) -> &str {
        self.head.line.split(' ').next().unwrap_or_default()
    }

    /// Path with query.
    pub fn path(&self) -> &str {
        self.head.line.split(' ').nth(1).unwrap_or_default()
    }

    /// Reads the request's body by its framing.
    pub fn body(&mut self) -> io::Result<Vec<u8>> {
        if self.head.chunked() {
            let mut body = Vec::new();
            while let Some(chunk) = self.conn.chunk()? {
                body.extend(chunk);
            }
            return Ok(body);
        }
        self.conn.try_exact(self.head.length().unwrap_or(0))
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.conn.try_send(bytes);
    }

    /// A whole JSON answer.
    pub fn json(&mut self, status: &str, body: &Value) {
        let text = body.to_string();
        self.send(format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}",
            text.len(),
            if self.method() == "HEAD" { "" } else { &text }
        ));
    }

    /// The beginning of a chunked answer.
    pub fn begin_chunked(&mut self) {
        self.send("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n");
    }

    /// One chunk.
    pub fn chunk(&mut self, data: &str) {
        self.send(format!("{:x}\r\n{data}\r\n", data.len()));
    }

    /// Ends the connection with RST.
    pub fn reset(&mut self) {
        if let Stream::Tcp(s) = &self.conn.stream {
            let _ = socket2::SockRef::from(s).set_linger(Some(Duration::ZERO));
        }
        self.closed = true;
    }

    /// Ends the connection with FIN after what was sent.
    pub fn finish(&mut self) {
        self.closed = true;
    }

    /// Sends `total` bytes, as fast as they are taken.
    pub fn pour(&mut self, total: usize) {
        let block = vec![b'x'; 64 * 1024];
        let mut left = total;
        while left > 0 && self.conn.try_send(&block[..left.min(block.len())]).is_ok() {
            left -= left.min(block.len());
        }
    }

    /// Reads until the proxy ends the connection, and ends it then.
    pub fn until_closed(&mut self) -> Vec<u8> {
        self.conn.patience(Duration::from_secs(600));
        let mut all = Vec::new();
        while let Ok(some) = self.conn.some() {
            if some.is_empty() {
                break;
            }
            all.extend(some);
        }
        self.closed = true;
        all
    }
}

#[derive(Debug, Default)]
struct Record {
    seen: Vec<Seen>,
    ended: Vec<(usize, Instant)>,
}

struct Shared {
    id: String,
    api: Api,
    act: Box<dyn Fn(&mut Exchange) -> bool + Send + Sync>,
    record: Mutex<Record>,
    conns: AtomicUsize,
    open: AtomicUsize,
    gone: AtomicBool,
    /// A second handle to each open connection, so that all of them can die at once.
    sockets: Mutex<HashMap<usize, TcpStream>>,
}

/// A running fake daemon.
pub struct FakeDaemon {
    /// Where it listens.
    pub addr: Addr,
    shared: Arc<Shared>,
}

impl FakeDaemon {
    /// One that answers as dockerd 28.5 and hands requests whose line contains `pattern` to `act`.
    pub fn start(pattern: &'static str, act: impl Fn(&mut Exchange) + Send + Sync + 'static) -> FakeDaemon {
        Self::with_api(API_28, pattern, act)
    }

    /// One that answers with this API's range.
    pub fn with_api(
        api: Api,
        pattern: &'static str,
        act: impl Fn(&mut Exchange) + Send + Sync + 'static,
    ) -> FakeDaemon {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let addr = Addr::Tcp(listener.local_addr().expect("an address").to_string());
        let act = move |exchange: &mut Exchange| {
            let mine = exchange.head.line.contains(pattern);
            if mine {
                act(exchange);
            }
            mine
        };
        let shared = Arc::new(Shared {
            id: unique(),
            api,
            act: Box::new(act),
            record: Mutex::default(),
            conns: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            gone: AtomicBool::new(false),
            sockets: Mutex::default(),
        });
        let server = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if server.gone.load(Ordering::SeqCst) {
                    return;
                }
                let number = server.conns.fetch_add(1, Ordering::SeqCst);
                let server = server.clone();
                std::thread::spawn(move || server.serve(number, stream));
            }
        });
        FakeDaemon { addr, shared }
    }

    /// One that only answers probes.
    pub fn idle() -> FakeDaemon {
        Self::start("\0", |_| {})
    }

    /// Every request that has arrived, probes included.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.record.lock().unwrap().seen.clone()
    }

    /// Requests that contain `marker` anywhere in their head.
    pub fn seen_with(&self, marker: &str) -> Vec<Seen> {
        let has = |s: &Seen| String::from_utf8_lossy(&s.raw).contains(marker);
        self.seen().into_iter().filter(has).collect()
    }

    /// When a connection ended, if it has.
    pub fn ended(&self, conn: usize) -> Option<Instant> {
        let record = self.shared.record.lock().unwrap();
        record.ended.iter().find(|(n, _)| *n == conn).map(|(_, at)| *at)
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Dies as a killed process does: the listener is gone, every connection is reset.
    pub fn die(&self) {
        self.shared.gone.store(true, Ordering::SeqCst);
        let Addr::Tcp(host) = &self.addr else { return };
        let _ = TcpStream::connect(host); // wakes the accepting thread, which drops the listener
        for socket in self.shared.sockets.lock().unwrap().values() {
            let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for FakeDaemon {
    fn drop(&mut self) {
        self.die();
    }
}

impl Shared {
    fn serve(&self, number: usize, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        if let Ok(copy) = stream.try_clone() {
            self.sockets.lock().unwrap().insert(number, copy);
        }
        self.open.fetch_add(1, Ordering::SeqCst);
        let conn = Conn::over(Stream::Tcp(stream));
        conn.patience(Duration::from_secs(600));
        self.requests(number, conn);
        self.sockets.lock().unwrap().remove(&number); // the last handle: now the peer hears of the end
        self.open.fetch_sub(1, Ordering::SeqCst);
        self.record.lock().unwrap().ended.push((number, Instant::now()));
    }

    fn requests(&self, number: usize, mut conn: Conn) {
        while let Ok(head) = conn.try_head() {
            let seen = Seen { conn: number, line: head.line.clone(), raw: head.raw.clone() };
            self.record.lock().unwrap().seen.push(seen);
            let mut exchange = Exchange { head, conn, closed: false };
            if !(self.act)(&mut exchange) {
                self.plausible(&mut exchange);
            }
            if exchange.closed {
                return;
            }
            conn = exchange.conn;
        }
    }

    /// What any dockerd would say.
    fn plausible(&self, exchange: &mut Exchange) {
        let _ = exchange.body();
        let path = exchange.path().split('?').next().unwrap_or_default().to_owned();
        let path = match path.strip_prefix("/v1.") {
            Some(rest) => rest.find('/').map_or("", |at| &rest[at..]).to_owned(),
            None => path,
        };
        let max = self.api.max;
        match (exchange.method(), path.as_str()) {
            (method, "/_ping") => {
                let body = if method == "HEAD" { "" } else { "OK" };
                exchange.send(format!(
                    "HTTP/1.1 200 OK\r\nApi-Version: {max}\r\nBuilder-Version: 2\r\nCache-Control: no-cache, \
                     no-store, must-revalidate\r\nContent-Type: text/plain; charset=utf-8\r\n\
                     Docker-Experimental: false\r\nOstype: linux\r\nPragma: no-cache\r\nServer: Docker/28.5.2 \
                     (linux)\r\nSwarm: inactive\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                ));
            }
            (_, "/version") => exchange.json("200 OK", &self.version()),
            (_, "/info") => exchange.json("200 OK", &self.info()),
            (_, "/events") => {
                exchange.begin_chunked();
                exchange.until_closed();
            }
            (_, "/volumes") => exchange.json("200 OK", &json!({ "Volumes": [], "Warnings": null })),
            (_, "/system/df") => exchange.json("200 OK", &json!({ "LayersSize": 0, "Images": [] })),
            (_, "/containers/json" | "/images/json" | "/networks") => exchange.json("200 OK", &json!([])),
            _ => exchange.json("404 Not Found", &json!({ "message": "the fake daemon has no such thing" })),
        }
    }

    fn version(&self) -> Value {
        let Api { max, min } = self.api;
        json!({
            "Platform": { "Name": "" },
            "Components": [{ "Name": "Engine", "Version": "28.5.2", "Details": {
                "ApiVersion": max, "Arch": "amd64", "MinAPIVersion": min, "Os": "linux"
            } }],
            "Version": "28.5.2", "ApiVersion": max, "MinAPIVersion": min, "Os": "linux", "Arch": "amd64",
            "GitCommit": "0", "GoVersion": "go1.24", "KernelVersion": "6.1", "BuildTime": "2026-09-15T11:02:57Z"
        })
    }

    fn info(&self) -> Value {
        json!({
            "ID": self.id, "Name": "fake", "ServerVersion": "28.5.2", "Containers": 0, "ContainersRunning": 0,
            "ContainersPaused": 0, "ContainersStopped": 0, "Images": 0, "Driver": "overlay2", "NCPU": 2,
            "MemTotal": 8_000_000_000_u64, "OSType": "linux", "Architecture": "x86_64",
            "OperatingSystem": "none", "DockerRootDir": "/var/lib/docker", "Labels": [],
            "SystemTime": "2026-09-15T11:02:57Z", "Swarm": { "LocalNodeState": "inactive" }
        })
    }
}

/// Writes to a peer until it takes no more for a moment; how much it took.
pub fn flood(conn: &mut Conn, limit: usize) -> usize {
    let block = [b'x'; 64 * 1024];
    let mut sent = 0;
    if let Stream::Tcp(s) = &conn.stream {
        s.set_write_timeout(Some(Duration::from_secs(1))).expect("a write timeout");
    }
    while sent < limit {
        match conn.stream.write(&block) {
            Ok(n) => sent += n,
            Err(_) => break,
        }
    }
    sent
}
