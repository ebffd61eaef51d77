//! Faults that a real daemon or client shows only by accident.

use std::time::Instant;

use super::common::fake_daemon::{Exchange, FakeDaemon, flood};
use super::common::http::{Conn, Head};
use super::common::pool::Pool;
use super::common::{holds_for, millis, poll, say, secs, wait_until};

const ID: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

fn front(fake: &FakeDaemon) -> Pool {
    let pool = Pool::serve([&fake.addr]).start();
    pool.wait_healthy(1, secs(20));
    pool
}

fn ask(conn: &mut Conn, method: &str, path: &str) {
    conn.send(format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"));
}

/// HAProxy in http mode and a hyper server with half_close(true) both leaked 50 of 50.
#[test]
fn a_client_that_vanishes_from_a_silent_stream_closes_the_daemons_connection_within_a_second() {
    let fake = FakeDaemon::start("/logs", |exchange| {
        exchange.begin_chunked();
        exchange.until_closed();
    });
    let pool = front(&fake);
    for way in ["FIN", "RST"] {
        let before = fake.seen_with("/logs").len();
        let mut conns: Vec<Conn> = (0..50)
            .map(|_| {
                let mut conn = Conn::connect(&pool.tcp);
                ask(&mut conn, "GET", &format!("/v1.44/containers/{ID}/logs?follow=1"));
                assert_eq!(conn.head().status(), 200);
                conn
            })
            .collect();
        let mine: Vec<usize> = fake.seen_with("/logs")[before..].iter().map(|s| s.conn).collect();
        assert_eq!(mine.len(), 50);
        let gone = Instant::now();
        conns.drain(..).for_each(|conn| if way == "RST" { conn.reset() } else { drop(conn) });
        let _ = poll(secs(5), || mine.iter().all(|c| fake.ended(*c).is_some()).then_some(()));
        let times: Vec<_> =
            mine.iter().filter_map(|c| Some(fake.ended(*c)?.saturating_duration_since(gone))).collect();
        let last = times.iter().max().copied().unwrap_or_default();
        say(format!(
            "  vanished clients ({way}): {} of 50 closed, the last after {} ms",
            times.len(),
            last.as_millis()
        ));
        assert_eq!(times.len(), 50, "{way}: {} daemon connections leaked", 50 - times.len());
        assert!(last <= secs(1), "{way}: {last:?}");
    }
}

/// A client that has asked and vanished before any answer is the same.
#[test]
fn a_client_that_vanishes_before_the_answer_closes_the_daemons_connection() {
    let fake = FakeDaemon::start("/wait", |exchange| drop(exchange.until_closed()));
    let pool = front(&fake);
    let mut conn = Conn::connect(&pool.tcp);
    ask(&mut conn, "POST", &format!("/v1.44/containers/{ID}/wait"));
    wait_until("the request arrives", secs(5), || !fake.seen_with("/wait").is_empty());
    let number = fake.seen_with("/wait")[0].conn;
    drop(conn);
    wait_until("the daemon's connection is closed", secs(1), || fake.ended(number).is_some());
}

#[test]
fn a_half_closed_client_of_a_hijack_keeps_its_stream() {
    let fake = FakeDaemon::start("/attach", |exchange| {
        exchange.send("HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n");
        let stdin = exchange.conn.try_rest().unwrap();
        // All of stdin has come; the answer takes its time.
        std::thread::park_timeout(millis(1500));
        exchange.send(format!("got {}", String::from_utf8_lossy(&stdin)));
        exchange.finish();
    });
    let pool = front(&fake);
    let mut conn = Conn::connect(&pool.tcp);
    conn.send(format!(
        "POST /v1.44/containers/{ID}/attach?stream=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\
         Content-Length: 0\r\n\r\n"
    ));
    assert_eq!(conn.head().status(), 101);
    conn.send("all of it");
    conn.half_close();
    let number = fake.seen_with("/attach")[0].conn;
    holds_for("the stream stays open", millis(1200), || fake.ended(number).is_none());
    assert_eq!(conn.try_rest().unwrap(), b"got all of it");
}

/// What the daemon does after a good beginning, and how many bytes of it are good.
type Fault = (&'static str, fn(&mut Exchange));

/// Only a RST tells this from a good end, and a Unix socket has none: dockerd cannot tell it there either.
const ENDED_BY_CLOSE: &str = "a reset of a body that the end of the connection ends";

const FAULTS: &[Fault] = &[
    ("a reset in a chunked body", |e| {
        e.begin_chunked();
        e.chunk("hello");
        std::thread::park_timeout(millis(50));
        e.reset();
    }),
    ("a FIN in a chunked body", |e| {
        e.begin_chunked();
        e.chunk("hello");
        e.finish();
    }),
    ("a FIN in a chunk", |e| {
        e.begin_chunked();
        e.send("a\r\nhello");
        e.finish();
    }),
    ("a reset in a body with a length", |e| {
        e.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello");
        std::thread::park_timeout(millis(50));
        e.reset();
    }),
    ("a FIN in a body with a length", |e| {
        e.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello");
        e.finish();
    }),
    ("a chunk size that is none", |e| {
        e.begin_chunked();
        e.send("5\r\nhello\r\nzz\r\nhello\r\n0\r\n\r\n");
        e.until_closed();
    }),
    ("a chunk that is longer than its size", |e| {
        e.begin_chunked();
        e.send("5\r\nhello too long\r\n0\r\n\r\n");
        e.until_closed();
    }),
    (ENDED_BY_CLOSE, |e| {
        e.send("HTTP/1.0 200 OK\r\n\r\nhello");
        std::thread::park_timeout(millis(50));
        e.reset();
    }),
];

/// A broken stream that ends cleanly makes build, pull, save and logs exit 0.
#[test]
fn a_body_that_the_daemon_breaks_never_ends_cleanly() {
    for (name, fault) in FAULTS {
        let fake = FakeDaemon::start("json?fault", fault);
        let pool = front(&fake);
        for addr in [&pool.tcp, &pool.unix] {
            if *name == ENDED_BY_CLOSE && *addr == pool.unix {
                continue;
            }
            let mut conn = Conn::connect(addr);
            conn.patience(secs(5));
            ask(&mut conn, "GET", "/v1.44/containers/json?fault");
            match conn.try_head() {
                Ok(head) if head.status() == 200 => {
                    let body = conn.try_body("GET", &head);
                    let why = body.expect_err(&format!("{name}: a clean end at {}", addr.url()));
                    let waited =
                        matches!(why.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut);
                    assert!(!waited, "{name}: the client is left waiting at {}", addr.url());
                }
                Ok(head) => assert_eq!(head.status(), 502, "{name}"),
                Err(why) => panic!("{name}: no answer at all: {why}"),
            }
        }
    }
}

/// Before anything of an answer has come, there can still be a message.
#[test]
fn an_answer_that_is_none_becomes_a_502_that_names_the_daemon() {
    let faults: &[Fault] = &[
        ("a reset", Exchange::reset),
        ("a FIN", Exchange::finish),
        ("garbage", |e| e.send("220 smtp.example ready\r\n\r\n")),
        ("half a head", |e| {
            e.send("HTTP/1.1 200 OK\r\nContent-Le");
            e.finish();
        }),
        ("CL and TE", |e| {
            e.send("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
            e.until_closed();
        }),
    ];
    for (name, fault) in faults {
        let fake = FakeDaemon::start("json?fault", fault);
        let pool = front(&fake);
        let mut conn = Conn::connect(&pool.tcp);
        conn.patience(secs(10));
        ask(&mut conn, "GET", "/v1.44/containers/json?fault");
        let head = conn.try_head().unwrap_or_else(|e| panic!("{name}: no answer: {e}"));
        let body = conn.body("GET", &head);
        assert_eq!(head.status(), 502, "{name}");
        assert_eq!(head.get("content-type"), Some("application/json"), "{name}");
        let message = serde_json::from_slice::<serde_json::Value>(&body).unwrap()["message"].to_string();
        let id = pool.daemons()[0].id.clone();
        let named = message.contains(&id) || message.contains(fake.addr.url().trim_start_matches("tcp://"));
        assert!(named, "{name}: {message} names no daemon");
    }
}

/// A RST would eat the message: answer, FIN, and a bounded drain.
#[test]
fn a_refusal_in_mid_upload_reaches_the_client() {
    let fake = FakeDaemon::start("/build", |exchange| {
        let _ = exchange.conn.try_exact(1024);
        exchange.send(
            "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: 21\r\n\r\n{\"message\":\"too much\"}"
                .replace("21", "22"),
        );
        exchange.finish();
    });
    let pool = front(&fake);
    for _ in 0..10 {
        let mut conn = Conn::connect(&pool.tcp);
        conn.send("POST /v1.44/build HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n");
        flood(&mut conn, 8 << 20);
        let head = conn.head();
        assert_eq!(head.status(), 500);
        assert_eq!(conn.body("POST", &head), b"{\"message\":\"too much\"}");
    }
}

#[test]
fn a_reset_of_a_raw_stream_stays_a_reset() {
    let fake = FakeDaemon::start("/attach", |exchange| {
        exchange.send("HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhello");
        std::thread::park_timeout(millis(100));
        exchange.reset();
    });
    let pool = front(&fake);
    let mut conn = Conn::connect(&pool.tcp);
    conn.send(format!(
        "POST /v1.44/containers/{ID}/attach?stream=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\
         Content-Length: 0\r\n\r\n"
    ));
    assert_eq!(conn.head().status(), 101);
    let end = conn.try_rest();
    assert_eq!(end.expect_err("not a clean end").kind(), std::io::ErrorKind::ConnectionReset);
}

/// Backpressure: the proxy must not keep what its client does not read.
#[test]
fn a_client_that_never_reads_costs_no_memory() {
    let fake = FakeDaemon::start("/export", |exchange| {
        exchange.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n");
        exchange.pour(1_000_000_000);
    });
    let pool = front(&fake);
    let before = pool.rss();
    let mut conns: Vec<Conn> = (0..10)
        .map(|_| {
            let mut conn = Conn::connect(&pool.tcp);
            ask(&mut conn, "GET", &format!("/v1.44/containers/{ID}/export"));
            conn
        })
        .collect();
    holds_for("memory stays flat", secs(3), || pool.rss() < before + 16 * 1024);
    say(format!("  ten unread streams: {} KiB before, {} KiB now", before, pool.rss()));
    let head: Head = conns[0].head();
    assert_eq!(head.status(), 200);
    assert_eq!(conns[0].exact(50_000_000).len(), 50_000_000, "whoever reads again gets it");
}

#[test]
fn an_upload_to_a_daemon_that_does_not_read_costs_no_memory() {
    let fake = FakeDaemon::start("/load", |_| {
        // Neither reads nor closes.
        poll(secs(20), || None::<()>);
    });
    let pool = front(&fake);
    let before = pool.rss();
    let mut conn = Conn::connect(&pool.tcp);
    conn.send("POST /v1.44/images/load HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n");
    let sent = flood(&mut conn, 1_000_000_000);
    assert!(sent < 500_000_000, "somebody took {sent} bytes that the daemon did not read");
    assert!(pool.rss() < before + 16 * 1024, "{} KiB before, {} KiB now", before, pool.rss());
}

#[test]
fn a_refused_connection_is_tried_elsewhere() {
    let act = |exchange: &mut Exchange| exchange.json("200 OK", &serde_json::json!([{ "Id": "here" }]));
    let fakes = [FakeDaemon::start("json?marked", act), FakeDaemon::start("json?marked", act)];
    let pool = Pool::serve(fakes.iter().map(|f| &f.addr)).start();
    pool.wait_healthy(2, secs(20));
    fakes[0].die();
    // At once, before any probe can have noticed.
    for _ in 0..20 {
        let answer = super::common::http::get(&pool.tcp, "/v1.44/images/json?marked");
        assert_eq!(answer.head.status(), 200, "{}", answer.text());
    }
}
