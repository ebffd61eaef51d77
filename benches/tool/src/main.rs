//! What the side-by-side script needs and Python is too slow for: a small fast upstream that answers like a
//! dockerd, and clients that measure. `benches/run` starts it; it is no part of dindpool.
//!
//! ```text
//! tool upstream ADDR                    serves until killed
//! tool first ADDR N                     time to the first streamed chunk, µs: "p50 p90"
//! tool pingpong ADDR N                  round trip of one byte through a hijack, µs: "p50 p90"
//! tool download ADDR BYTES              a chunked response: seconds
//! tool upload ADDR BYTES chunked|length a request body: seconds
//! tool hold ADDR hijack|stream N        opens N silent streams, says "ready", keeps them until killed
//! ```
// A tool of the benches: what goes wrong ends it.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The one container that the upstream has.
const ID: &str = "6f1d3c5b7a99e0c2d4f6a8b0c1e3d5f7a9b1c3d5e7f90123456789abcdef0123";
/// dockerd's io.Copy and Go's HTTP server make chunks of this size.
const CHUNK: usize = 32 * 1024;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["upstream", address] => upstream(address),
        ["first", address, n] => print_times(first(address, n.parse().unwrap())),
        ["pingpong", address, n] => print_times(pingpong(address, n.parse().unwrap())),
        ["download", address, bytes] => println!("{}", download(address, bytes.parse().unwrap())),
        ["upload", address, bytes, framing] => {
            println!("{}", upload(address, bytes.parse().unwrap(), framing == "chunked"));
        }
        ["hold", address, kind, n] => hold(address, kind, n.parse().unwrap()),
        _ => panic!("see the comment at the top of this file"),
    }
}

// ---------------------------------------------------------------------------------------------- upstream

fn upstream(address: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await.unwrap();
        println!("ready");
        loop {
            if let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                tokio::spawn(async move {
                    // A client that leaves is no fault.
                    let _ = connection(stream).await;
                });
            }
        }
    });
}

struct Head {
    method: String,
    path: String,
    query: String,
    length: u64,
    chunked: bool,
    close: bool,
}

fn parse(raw: &[u8]) -> Head {
    let text = std::str::from_utf8(raw).unwrap();
    let mut lines = text.split("\r\n");
    let mut line = lines.next().unwrap_or_default().split(' ');
    let (method, target) = (line.next().unwrap_or_default(), line.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = match path.strip_prefix("/v1.") {
        Some(rest) => &rest[rest.find('/').unwrap_or(0)..],
        None => path,
    };
    let mut head = Head {
        method: method.into(),
        path: path.into(),
        query: query.into(),
        length: 0,
        chunked: false,
        close: false,
    };
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => head.length = value.parse().unwrap(),
            "transfer-encoding" => head.chunked = true,
            "connection" => head.close = value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
    head
}

async fn connection(mut stream: TcpStream) -> std::io::Result<()> {
    let mut input = Vec::with_capacity(1024);
    loop {
        let end = loop {
            if let Some(at) = input.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut input).await? == 0 {
                return Ok(());
            }
        };
        let head = parse(&input[..end]);
        input.drain(..end);
        if !respond(&mut stream, &head, &mut input).await? || head.close {
            return Ok(());
        }
    }
}

/// Answers one request. False ends the connection.
async fn respond(stream: &mut TcpStream, head: &Head, input: &mut Vec<u8>) -> std::io::Result<bool> {
    let inspect = format!("/containers/{ID}/json");
    match (head.method.as_str(), head.path.as_str()) {
        (_, path) if *path == inspect => {
            let body = format!("{{\"Id\":\"{ID}\",\"Name\":\"/bench\",\"Args\":[\"{:400}\"]}}\n", "");
            json(stream, head, &body).await
        }
        (_, "/_ping") => json(stream, head, "OK").await,
        (_, "/version") => {
            let body = r#"{"Version":"28.5.2","ApiVersion":"1.51","MinAPIVersion":"1.24","Os":"linux","Arch":"amd64"}"#;
            json(stream, head, body).await
        }
        (_, "/info") => {
            let body = r#"{"ID":"bench","NCPU":64,"MemTotal":68719476736,"ServerVersion":"28.5.2"}"#;
            json(stream, head, body).await
        }
        (_, "/containers/json") => {
            let body = format!(r#"[{{"Id":"{ID}","Names":["/bench"],"State":"running"}}]"#);
            json(stream, head, &body).await
        }
        (_, "/networks" | "/images/json") => json(stream, head, "[]").await,
        (_, "/volumes") => json(stream, head, r#"{"Volumes":[]}"#).await,
        (_, path) if path == "/events" || path.ends_with("/logs") => {
            // One chunk at once, then silence until the client leaves.
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n")
                .await?;
            while stream.read(&mut [0; 64]).await? > 0 {}
            Ok(false)
        }
        (_, path) if path.ends_with("/attach") => {
            stream
                .write_all(b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
                .await?;
            let mut byte = [0; 64];
            loop {
                match stream.read(&mut byte).await? {
                    0 => return Ok(false),
                    n => stream.write_all(&byte[..n]).await?,
                }
            }
        }
        ("GET", "/images/get") => {
            let bytes: u64 = head.query.trim_start_matches("names=").parse().unwrap_or(0);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-tar\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
            let chunk = chunk();
            for _ in 0..bytes / CHUNK as u64 {
                stream.write_all(&chunk).await?;
            }
            stream.write_all(b"0\r\n\r\n").await?;
            Ok(true)
        }
        ("POST", "/images/load") => {
            drain(stream, head, input).await?;
            json(stream, head, "{}").await
        }
        _ => {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await?;
            Ok(true)
        }
    }
}

async fn json(stream: &mut TcpStream, head: &Head, body: &str) -> std::io::Result<bool> {
    let close = if head.close { "Connection: close\r\n" } else { "" };
    let shown = if head.method == "HEAD" { "" } else { body };
    let answer = format!(
        "HTTP/1.1 200 OK\r\nApi-Version: 1.51\r\nContent-Type: application/json\r\nOstype: linux\r\n\
         Server: Docker/28.5.2 (linux)\r\n{close}Content-Length: {}\r\n\r\n{shown}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    Ok(true)
}

/// Reads a body away: one of known length by its length, a chunked one up to its last chunk.
async fn drain(stream: &mut TcpStream, head: &Head, input: &mut Vec<u8>) -> std::io::Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    let mut seen = input.len() as u64;
    let mut tail = std::mem::take(input);
    while if head.chunked { !tail.ends_with(b"\r\n0\r\n\r\n") } else { seen < head.length } {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        seen += n as u64;
        tail.extend_from_slice(&buffer[n.saturating_sub(7)..n]);
        tail.drain(..tail.len().saturating_sub(7));
    }
    Ok(())
}

fn chunk() -> Vec<u8> {
    let mut chunk = format!("{CHUNK:x}\r\n").into_bytes();
    chunk.resize(chunk.len() + CHUNK, b'x');
    chunk.extend_from_slice(b"\r\n");
    chunk
}

// ---------------------------------------------------------------------------------------------- clients

type Socket = std::net::TcpStream;

fn connect(address: &str) -> Socket {
    let socket = Socket::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    socket
}

/// Reads until what has come ends with `end`.
fn read_until(socket: &mut Socket, end: &[u8]) {
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    while !seen.ends_with(end) {
        let n = socket.read(&mut buffer).unwrap();
        assert!(n > 0, "the connection ended: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..n]);
    }
}

/// A request that opens a stream, and what is the last of its answer before the silence.
struct Opening {
    request: String,
    end: &'static [u8],
}

fn attach() -> Opening {
    let request = format!(
        "POST /v1.51/containers/{ID}/attach?stream=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
    );
    Opening { request, end: b"\r\n\r\n" }
}

fn logs() -> Opening {
    let request = format!("GET /v1.51/containers/{ID}/logs?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n");
    Opening { request, end: b"\r\n{}\n\r\n" }
}

/// Opens `n` streams at once.
fn open(address: &str, opening: &Opening, n: usize) -> Vec<Socket> {
    let mut sockets: Vec<Socket> = (0..n)
        .map(|_| {
            let mut socket = connect(address);
            socket.write_all(opening.request.as_bytes()).unwrap();
            socket
        })
        .collect();
    sockets.iter_mut().for_each(|socket| read_until(socket, opening.end));
    sockets
}

fn first(address: &str, n: usize) -> Vec<Duration> {
    (0..n)
        .map(|_| {
            let start = Instant::now();
            let _socket = open(address, &logs(), 1);
            start.elapsed()
        })
        .collect()
}

fn pingpong(address: &str, n: usize) -> Vec<Duration> {
    let mut socket = open(address, &attach(), 1).remove(0);
    let mut byte = [0];
    (0..n)
        .map(|_| {
            let start = Instant::now();
            socket.write_all(b"x").unwrap();
            socket.read_exact(&mut byte).unwrap();
            start.elapsed()
        })
        .collect()
}

fn print_times(mut times: Vec<Duration>) {
    times.sort_unstable();
    let micros = |share: usize| times[times.len() * share / 100].as_nanos() as f64 / 1000.0;
    println!("{} {}", micros(50), micros(90));
}

fn download(address: &str, bytes: u64) -> f64 {
    let mut socket = connect(address);
    let start = Instant::now();
    write!(socket, "GET /v1.51/images/get?names={bytes} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let (mut buffer, mut tail, mut seen) = (vec![0; 256 * 1024], Vec::new(), 0);
    while !tail.ends_with(b"\r\n0\r\n\r\n") {
        let n = socket.read(&mut buffer).unwrap();
        assert!(n > 0, "the connection ended after {seen} bytes");
        seen += n as u64;
        tail.extend_from_slice(&buffer[n.saturating_sub(7)..n]);
        tail.drain(..tail.len().saturating_sub(7));
    }
    assert!(seen > bytes, "{seen}");
    start.elapsed().as_secs_f64()
}

fn upload(address: &str, bytes: u64, chunked: bool) -> f64 {
    let mut socket = connect(address);
    let start = Instant::now();
    let framing =
        if chunked { "Transfer-Encoding: chunked".into() } else { format!("Content-Length: {bytes}") };
    write!(socket, "POST /v1.51/images/load?quiet=1 HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n").unwrap();
    let chunk = chunk();
    let piece = if chunked { &chunk[..] } else { &chunk[6..6 + CHUNK] };
    for _ in 0..bytes / CHUNK as u64 {
        socket.write_all(piece).unwrap();
    }
    if chunked {
        socket.write_all(b"0\r\n\r\n").unwrap();
    }
    read_until(&mut socket, b"{}");
    start.elapsed().as_secs_f64()
}

fn hold(address: &str, kind: &str, n: usize) {
    let opening = if kind == "hijack" { attach() } else { logs() };
    // Not one by one: HAProxy holds the first chunk of each for 200 ms.
    let _held: Vec<Vec<Socket>> =
        (0..n).step_by(100).map(|at| open(address, &opening, 100.min(n - at))).collect();
    println!("ready");
    loop {
        std::thread::park();
    }
}
