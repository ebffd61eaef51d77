//! What is kept of clients: the log and the metrics. A fake daemon, because a real one does not send control
//! characters.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpStream;

use serde_json::json;

use crate::common::fake_daemon::FakeDaemon;
use crate::common::http::{Addr, Conn, Stream};
use crate::common::pool::Pool;
use crate::common::{say, secs, wait_until};

/// What no log may have, whoever sent it.
const SECRET: &str = "s3cr3t-of-the-user";

/// A daemon that refuses one kind of request with a message of control characters.
fn rude() -> FakeDaemon {
    FakeDaemon::start("rude", |exchange| {
        let _ = exchange.body();
        let message = format!("refused\n2026-01-01 INFO forged\r\n\x1b[2Jgone {SECRET}");
        exchange.json("500 Internal Server Error", &json!({ "message": message }));
    })
}

/// Requests that carry secrets and control characters wherever a client can put them.
fn requests() -> Vec<String> {
    let secret = |line: &str, headers: &str, body: &str| {
        format!(
            "{line} HTTP/1.1\r\nHost: {SECRET}\r\nX-Registry-Auth: {SECRET}\r\nX-Registry-Config: {SECRET}\r\n\
             Authorization: Bearer {SECRET}\r\nUser-Agent: \t{SECRET}\r\nContent-Length: {}\r\n{headers}\r\n{body}",
            body.len()
        )
    };
    let forged = "%0a2026-01-01%20INFO%20forged%1b%5b2J";
    vec![
        secret(&format!("POST /v1.44/build?t=x&buildargs=%7B%22A%22%3A%22{SECRET}%22%7D"), "", SECRET),
        secret(&format!("POST /v1.44/build?t=rude&buildargs={SECRET}&remote={forged}"), "", SECRET),
        secret(
            "POST /v1.44/containers/create?name=rude",
            "Content-Type: application/json\r\n",
            &format!("{{\"Image\":\"x\\n\\u001b[2J\",\"Env\":[\"A={SECRET}\"]}}"),
        ),
        secret(&format!("GET /v1.44/containers/{forged}/json"), "", ""),
        secret(&format!("GET /v1.44/containers/{forged}/logs?rude={SECRET}"), "", ""),
        secret(&format!("GET /{forged}{forged}?{SECRET}"), "", ""),
        secret(&format!("GET /s/{forged}/v1.44/info"), "", ""),
        secret(&format!("GET /t/{forged}/v1.44/info"), "", ""),
        secret("GET /v1.44/images/json", &format!("X-Dindpool-Session: a\u{9b}2J{forged}\r\n"), ""),
        secret(&format!("POST /v1.44/images/create?fromImage={forged}"), "", ""),
        secret(&format!("POST /v9.99/build?{SECRET}"), "", ""),
        secret("POST /v1.44/swarm/init", "", SECRET),
        // No HTTP at all.
        format!("{SECRET} \x1b[2J\r\n\r\n"),
        format!("GET /v1.44/info HTTP/1.1\r\nX-A: \x1b[2J{SECRET}\r\n\r\n"),
    ]
}

#[test]
fn row_43_nothing_that_a_client_sends_forges_a_line_of_the_log_or_leaves_a_secret_in_it() {
    for format in ["text", "json"] {
        let fake = rude();
        let pool = Pool::serve([&fake.addr])
            .env("DINDPOOL_LOG_LEVEL", "trace")
            .env("DINDPOOL_LOG_FORMAT", format)
            .start();
        pool.wait_healthy(1, secs(20));
        for (n, request) in requests().iter().enumerate() {
            let mut client = Conn::connect(&pool.tcp);
            client.send(request);
            client.half_close();
            assert!(client.ends_within(secs(10)), "request {n} is not answered: {request:?}");
        }
        let mut last = Conn::connect(&pool.tcp);
        last.send("GET /v1.44/containers/json HTTP/1.1\r\nHost: x\r\nX-Dindpool-Session: the-last\r\n\r\n");
        assert_eq!(last.head().status(), 200);
        wait_until("the last request is in the log", secs(10), || pool.log().contains("the-last"));
        let log = pool.log();
        assert!(
            !log.contains(SECRET),
            "a secret is in the log:\n{}",
            lines_with(&log, |l| l.contains(SECRET))
        );
        let control = |c: char| c.is_control() && c != '\n';
        assert!(
            !log.contains(control),
            "a control character is in the log:\n{:?}",
            lines_with(&log, |l| l.contains(control))
        );
        for line in log.lines() {
            if format == "json" {
                serde_json::from_str::<serde_json::Value>(line)
                    .unwrap_or_else(|e| panic!("{e}: no line of its own: {line:?}"));
            } else {
                let own = line.starts_with("20") && line.as_bytes().get(10) == Some(&b'T');
                assert!(own && !line.contains("INFO forged "), "no line of its own: {line:?}");
            }
        }
        assert!(log.lines().count() > requests().len(), "the log is read:\n{log}");
    }
}

#[test]
fn a_request_has_one_line_with_its_trace_and_its_number_is_in_its_error() {
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let fake = rude();
    let pool = Pool::serve([&fake.addr])
        .env("DINDPOOL_LOG_LEVEL", "info")
        .env("DINDPOOL_LOG_FORMAT", "json")
        .env("DINDPOOL_SESSION_GRACE", "1s")
        .start();
    pool.wait_healthy(1, secs(20));
    let ask = |line: &str, header: &str| {
        let mut client = Conn::connect(&pool.tcp);
        client.send(format!("{line} HTTP/1.1\r\nHost: x\r\n{header}Content-Length: 4\r\n\r\nbody"));
        let head = client.head();
        (head.status(), String::from_utf8(client.body("POST", &head)).unwrap())
    };
    let header = format!("traceparent: {trace}\r\nX-Dindpool-Session: traced\r\n");
    let (status, _) = ask("POST /v1.44/containers/create?name=rude", &header);
    assert_eq!(status, 500);
    let told = |message: &str| {
        let (log, message) = (pool.log(), format!("\"message\":\"{message}\""));
        let lines = log.lines().filter(|l| l.contains("name:traced") && l.contains(&message));
        lines.map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()).collect::<Vec<_>>()
    };
    wait_until("the request is in the log", secs(10), || !told("request").is_empty());
    let lines = told("request");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!((&lines[0]["trace"], &lines[0]["tenant"]), (&json!(trace), &json!("default")));
    for field in ["request", "waited_ms", "ms", "up", "down"] {
        assert!(lines[0][field].is_u64(), "{field}: {}", lines[0]);
    }
    assert!(lines[0]["up"].as_u64() > Some(4) && lines[0]["down"].as_u64() > Some(4), "{}", lines[0]);
    // Its session has been that one request.
    wait_until("the session is in the log", secs(20), || !told("lease ended").is_empty());
    let session = &told("lease ended")[0];
    assert_eq!((&session["requests"], &session["outcome"]), (&json!(1), &json!("done")), "{session}");
    for field in ["session", "tenant", "daemon", "waited_ms", "up", "down"] {
        assert_eq!(session[field], lines[0][field], "{field}: {session}");
    }
    assert!(session["seconds"].is_f64() && session["lease"].is_u64(), "{session}");
    let seen = fake.seen_with("name=rude");
    assert!(String::from_utf8_lossy(&seen[0].raw).contains(&format!("traceparent: {trace}\r\n")));
    // An error of the proxy's own names the number of its line.
    let (status, body) = ask("POST /v1.44/swarm/init", "");
    let message = serde_json::from_str::<serde_json::Value>(&body).unwrap()["message"].to_string();
    let number = message.rsplit_once("(request ").unwrap_or_else(|| panic!("{status} {message}")).1;
    let number = number.trim_end_matches([')', '"']);
    wait_until("its line has the number", secs(10), || {
        pool.log().contains(&format!("\"request\":{number},"))
    });
}

fn lines_with(log: &str, has: impl Fn(&str) -> bool) -> String {
    log.lines().filter(|l| has(l)).collect::<Vec<_>>().join("\n")
}

/// A client with a source address of its own: all of 127.0.0.0/8 is this machine.
fn from(source: [u8; 4], to: &Addr) -> Conn {
    let Addr::Tcp(to) = to else { panic!("TCP") };
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&std::net::SocketAddr::from((source, 0)).into()).unwrap();
    socket.connect(&to.parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    Conn::over(Stream::Tcp(TcpStream::from(socket)))
}

/// The series of `/metrics`: names with their labels.
fn series(pool: &Pool) -> BTreeSet<String> {
    let text = pool.admin("/metrics").text();
    let lines = text.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
    lines.map(|l| l.rsplit_once(' ').unwrap().0.to_owned()).collect()
}

/// A pull of a tenant of its own, whose answer has not been read.
fn pull(pool: &Pool, fresh: u16) -> Conn {
    let mut client = from([127, 9, 0, fresh.to_be_bytes()[1]], &pool.tcp);
    let line = format!("POST /t/team{fresh}/v1.44/images/create?fromImage=image{fresh}");
    client.send(format!("{line} HTTP/1.1\r\nHost: h{fresh}\r\nConnection: close\r\n\r\n"));
    client
}

/// One of everything that a client can choose, by number: source, session, tenant, path, method, image, version.
fn chosen(pool: &Pool, fresh: u16) {
    let [high, low] = fresh.to_be_bytes();
    for line in [
        format!("GET /t/team{fresh}/s/key{fresh}/v1.44/containers/c{fresh}/json"),
        format!("GET /path{fresh}/of{fresh}"),
        format!("METHOD{fresh} /v1.44/info"),
        format!("POST /t/team{fresh}/v1.44/images/create?fromImage=image{fresh}"),
        format!("GET /v1.{fresh}/info"),
    ] {
        let mut client = from([127, 9, high, low], &pool.tcp);
        client.send(format!("{line} HTTP/1.1\r\nHost: h{fresh}\r\nConnection: close\r\n\r\n"));
        client.head();
    }
}

#[test]
fn row_44_many_clients_sessions_tenants_and_paths_leave_no_more_series_than_a_few() {
    let fake = FakeDaemon::idle();
    // One slot, so that of pulls that come at once all but one wait, and the queue's metrics have a tenant each.
    let pool =
        Pool::serve([&fake.addr]).env("DINDPOOL_SLOTS", "1").env("DINDPOOL_SLOT_LINGER", "20ms").start();
    pool.wait_healthy(1, secs(20));
    let mut waiting: Vec<Conn> = (100..160).map(|fresh| pull(&pool, fresh)).collect();
    waiting.iter_mut().for_each(|client| drop(client.head()));
    // Beyond its limit of tenants a metric has no new label.
    (0..80).for_each(|fresh| chosen(&pool, fresh));
    let before = series(&pool);
    assert!(before.len() < 2200, "{} series", before.len());
    for name in ["path7", "key7", "image7", "c7", "127.9", "METHOD7", "h7"] {
        let found: Vec<_> = before.iter().filter(|s| s.contains(name)).collect();
        assert!(found.is_empty(), "what a client chose is a label: {found:?}");
    }
    (1000..1400).for_each(|fresh| chosen(&pool, fresh));
    let after = series(&pool);
    let new: Vec<_> = after.difference(&before).collect();
    say(format!("          {} series after 480 of each, {} after 80", after.len(), before.len()));
    // A series may begin with a rare outcome; one for each of 400 would be 400. Each metric has tenants of its own that
    // it names, those that it met first (50, and `other`).
    let other: Vec<_> = new.iter().filter(|s| !s.contains("tenant=\"")).collect();
    assert!(other.len() <= 20, "{other:?}");
    let mut tenants: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for one in &after {
        if let Some((_, rest)) = one.split_once("tenant=\"") {
            let name = one.split('{').next().unwrap();
            tenants.entry(name).or_default().insert(rest.split('"').next().unwrap());
        }
    }
    assert!(tenants.values().any(|named| named.len() > 20), "tenants are labels: {tenants:?}");
    let many: Vec<_> = tenants.iter().filter(|(_, named)| named.len() > 51).collect();
    assert!(many.is_empty(), "{many:?}");
}
