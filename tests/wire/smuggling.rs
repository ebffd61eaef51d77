//! Requests that two parsers may read differently. The answer is 400 and a close, and the daemon, a fake one here,
//! can tell that nothing of them arrived.

use super::common::fake_daemon::FakeDaemon;
use super::common::http::Conn;
use super::common::pool::Pool;
use super::common::{millis, secs, unique};

/// What would be a second request if the first one were misread.
const INNER: &str = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";

/// Heads that must not pass; `MARK` becomes a marker.
fn bad_heads() -> Vec<(&'static str, String)> {
    let post = "POST /v1.44/containers/create?MARK HTTP/1.1\r\nHost: x\r\n";
    let both = |te: &str, cl: &str| format!("{post}{te}{cl}\r\n0\r\n\r\n{INNER}");
    let with = |lines: &str| format!("{post}{lines}\r\n\r\n");
    let line = |line: &str| format!("{line}\r\nHost: x\r\n\r\n");
    vec![
        ("CL and TE", both("Transfer-Encoding: chunked\r\n", "Content-Length: 4\r\n")),
        ("TE and CL", both("Content-Length: 40\r\n", "Transfer-Encoding: chunked\r\n")),
        ("TE and CL in odd case", both("tRANSFER-eNCODING: cHUNKED\r\n", "cONTENT-lENGTH: 4\r\n")),
        ("two different lengths", with("Content-Length: 0\r\nContent-Length: 38")),
        ("a list of lengths", with("Content-Length: 0, 38")),
        ("a signed length", with("Content-Length: +0")),
        ("a negative length", with("Content-Length: -1")),
        ("a hexadecimal length", with("Content-Length: 0x0")),
        ("an empty length", with("Content-Length:")),
        ("a length with a space in it", with("Content-Length: 1 0")),
        ("a length beyond 64 bits", with("Content-Length: 18446744073709551616")),
        ("an unknown coding", with("Transfer-Encoding: xchunked")),
        ("identity", with("Transfer-Encoding: identity")),
        ("chunked that is not last", with("Transfer-Encoding: chunked, identity")),
        ("gzip, chunked", with("Transfer-Encoding: gzip, chunked")),
        ("chunked twice", with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked")),
        ("a vertical tab before chunked", with("Transfer-Encoding: \x0bchunked")),
        ("a space before the colon", with("Transfer-Encoding : chunked")),
        ("obs-fold", with("X-A: 1\r\n  Transfer-Encoding: chunked")),
        ("obs-fold with a tab", with("Transfer-Encoding:\r\n\tchunked")),
        ("a space before the first header", "GET /MARK HTTP/1.1\r\n Host: x\r\n\r\n".into()),
        ("bare LF", "GET /MARK HTTP/1.1\nHost: x\n\n".into()),
        ("bare LF at the end of the head", "GET /MARK HTTP/1.1\r\nHost: x\r\n\n".into()),
        ("bare LF in a header", with("X-A: 1\nContent-Length: 0")),
        ("bare CR in a header", with("X-A: 1\rContent-Length: 0")),
        ("NUL in a header", with("X-A: 1\0")),
        ("a control character in a name", with("X\x01A: 1")),
        ("a name with a space", with("X A: 1")),
        ("no colon", with("X-A")),
        ("no name", with(": 1")),
        ("absolute-form", line("GET http://elsewhere/MARK HTTP/1.1")),
        ("authority-form", line("CONNECT elsewhere:80 HTTP/1.1\r\nX: MARK")),
        ("no slash", line("GET MARK HTTP/1.1")),
        ("two spaces", line("GET  /MARK HTTP/1.1")),
        ("a tab", line("GET\t/MARK HTTP/1.1")),
        ("a space in the path", line("GET /MARK x HTTP/1.1")),
        ("a control character in the path", line("GET /MARK\x01 HTTP/1.1")),
        ("no version", line("GET /MARK")),
        ("another version", line("GET /MARK HTTP/1.2")),
        ("a later version", line("GET /MARK HTTP/2.0")),
        ("a lower-case version", line("GET /MARK http/1.1")),
        ("a bad method", line("G@T /MARK HTTP/1.1").replace('@', "(")),
        ("an empty method", line(" /MARK HTTP/1.1")),
        ("TE in HTTP/1.0", "POST /MARK HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into()),
        ("two hosts", "GET /MARK HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".into()),
    ]
}

/// Bodies that must not pass.
const BAD_CHUNKS: &[(&str, &str)] = &[
    ("no number", "zz\r\nhello\r\n0\r\n\r\n"),
    ("an empty size", "\r\nhello\r\n0\r\n\r\n"),
    ("a sign", "+5\r\nhello\r\n0\r\n\r\n"),
    ("a minus", "-5\r\nhello\r\n0\r\n\r\n"),
    ("0x", "0x5\r\nhello\r\n0\r\n\r\n"),
    ("a size beyond 64 bits", "10000000000000005\r\nhello\r\n0\r\n\r\n"),
    ("a bare LF after the size", "5\nhello\r\n0\r\n\r\n"),
    ("a bare LF in an extension", "5;a\nb\r\nhello\r\n0\r\n\r\n"),
    ("no end of the data", "5\r\nhelloX\r\n0\r\n\r\n"),
    ("data that is longer than its size", "4\r\nhello\r\n0\r\n\r\n"),
    ("a bare LF after the data", "5\r\nhello\n0\r\n\r\n"),
    ("a bad trailer", "5\r\nhello\r\n0\r\nno colon\r\n\r\n"),
];

fn front() -> (FakeDaemon, Pool) {
    let fake = FakeDaemon::start("/containers/create", |exchange| {
        if exchange.body().is_ok() {
            exchange.json("201 Created", &serde_json::json!({ "Id": "f".repeat(64), "Warnings": [] }));
        } else {
            exchange.finish();
        }
    });
    let pool = Pool::serve([&fake.addr]).start();
    pool.wait_healthy(1, secs(20));
    (fake, pool)
}

/// 400 as Docker writes errors, and then the end of the connection.
fn refused(conn: &mut Conn) -> Result<(), String> {
    let head = conn.try_head().map_err(|e| format!("no answer: {e}"))?;
    if head.status() != 400 {
        return Err(head.line);
    }
    if head.get("content-type") != Some("application/json") {
        return Err(format!("Content-Type {:?}", head.get("content-type")));
    }
    let body = conn.try_body("POST", &head).map_err(|e| format!("no body: {e}"))?;
    let message = serde_json::from_slice::<serde_json::Value>(&body).unwrap_or_default();
    if message["message"].as_str().is_none_or(str::is_empty) {
        return Err(format!("no message in {:?}", String::from_utf8_lossy(&body)));
    }
    if conn.ends_within(secs(3)) { Ok(()) } else { Err("the connection stays open".into()) }
}

#[test]
fn a_malformed_head_is_refused_and_the_daemon_sees_nothing() {
    let (fake, pool) = front();
    let mut wrong = Vec::new();
    for (name, raw) in bad_heads() {
        // As the first request, and behind a good one on the same connection.
        for behind in [false, true] {
            let marker = format!("m{}", unique());
            let mut conn = Conn::connect(&pool.tcp);
            conn.patience(secs(3));
            if behind {
                conn.send("GET /images/json HTTP/1.1\r\nHost: x\r\n\r\n");
                let head = conn.head();
                conn.body("GET", &head);
            }
            let _ = conn.try_send(raw.replace("MARK", &marker));
            if let Err(why) = refused(&mut conn) {
                wrong.push(format!("{name} (behind a good request: {behind}): {why}"));
            }
            if !fake.seen_with(&marker).is_empty() {
                wrong.push(format!("{name}: the daemon saw it"));
            }
        }
    }
    wrong.extend(fake.seen_with("smuggled").iter().map(|s| format!("smuggled: {}", s.line)));
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_malformed_chunk_is_refused_and_nothing_behind_it_reaches_the_daemon() {
    let (fake, pool) = front();
    let mut wrong = Vec::new();
    for (name, body) in BAD_CHUNKS {
        let mut conn = Conn::connect(&pool.tcp);
        conn.patience(secs(3));
        let raw = format!(
            "POST /v1.44/containers/create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{body}{INNER}"
        );
        let _ = conn.try_send(raw);
        if let Err(why) = refused(&mut conn) {
            wrong.push(format!("{name}: {why}"));
        }
    }
    wrong.extend(fake.seen_with("smuggled").iter().map(|s| format!("smuggled: {}", s.line)));
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

/// The counterpart: strictness that refuses good requests would pass every test above.
#[test]
fn a_well_formed_request_still_reaches_the_daemon() {
    let (fake, pool) = front();
    let marker = unique();
    let mut conn = Conn::connect(&pool.tcp);
    for body in ["Content-Length: 2\r\n\r\n{}", "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"] {
        conn.send(format!("POST /v1.44/containers/create?{marker} HTTP/1.1\r\nHost: x\r\n{body}"));
        let head = conn.head();
        conn.body("POST", &head);
        assert_eq!(head.status(), 201);
    }
    assert_eq!(fake.seen_with(&marker).len(), 2);
    assert!(!conn.ends_within(millis(200)), "the connection stays open");
}
