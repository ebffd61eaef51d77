//! Rows of the queue, to the byte and the millisecond: raw clients, and a fake daemon that counts what reaches it.
//! What real clients show is in tests/queue.rs.

use std::time::Instant;

use crate::common::fake_daemon::{FakeDaemon, flood};
use crate::common::http::Conn;
use crate::common::pool::Pool;
use crate::common::{holds_for, millis, say, secs, wait_until};

/// A daemon with one slot, which a build holds that goes on until its client leaves.
struct Full {
    fake: FakeDaemon,
    pool: Pool,
    holder: Conn,
}

fn full(settings: &[(&str, &str)]) -> Full {
    let fake = FakeDaemon::start("t=holder", |exchange| {
        exchange.begin_chunked();
        exchange.until_closed();
    });
    let pool = Pool::serve([&fake.addr]).env("DINDPOOL_SLOTS", "1").env("DINDPOOL_SLOT_LINGER", "0s");
    let pool = settings.iter().fold(pool, |p, (k, v)| p.env(k, v)).start();
    pool.wait_healthy(1, secs(20));
    let mut holder = Conn::connect(&pool.tcp);
    holder.send(request("holder", "POST /v1.44/build?t=holder", "Content-Length: 0\r\n"));
    assert_eq!(holder.head().status(), 200);
    Full { fake, pool, holder }
}

fn request(session: &str, line: &str, headers: &str) -> String {
    format!("{line} HTTP/1.1\r\nHost: docker\r\nX-Dindpool-Session: {session}\r\n{headers}\r\n")
}

fn waiting(pool: &Pool) -> usize {
    pool.status()["queue"]["tickets"].as_array().unwrap().len()
}

const MARK: &str = "row-nineteen";

/// Each way in which a client can be in the queue, by what it sends first. Its upload is small, or has ended.
fn ways() -> Vec<(&'static str, String)> {
    let create = r#"{"Image":"row-nineteen"}"#;
    let entity = format!("Content-Type: application/json\r\nContent-Length: {}\r\n", create.len());
    let body = |line: &str, headers: &str, body: &str| format!("{}{body}", request(MARK, line, headers));
    vec![
        ("create", body("POST /v1.44/containers/create", &entity, create)),
        ("pull", body(&format!("POST /v1.44/images/create?fromImage={MARK}"), "Content-Length: 0\r\n", "")),
        ("build", body("POST /v1.44/build?t=x", "Content-Length: 8\r\n", "contexts")),
        ("build in mid-upload", body("POST /v1.44/build?t=x", "Content-Length: 9000\r\n", "context")),
        (
            "build in mid-chunk",
            body("POST /v1.44/build?t=x", "Transfer-Encoding: chunked\r\n", "ffff\r\ncontext"),
        ),
        ("quiet build", body("POST /v1.44/build?q=1", "Content-Length: 8\r\n", "contexts")),
    ]
}

#[test]
fn row_19_a_client_that_leaves_the_queue_is_gone_within_100_ms_and_starts_nothing() {
    let full = full(&[]);
    for (what, bytes) in ways() {
        for end in ["FIN", "RST"] {
            let mut client = Conn::connect(&full.pool.tcp);
            client.send(&bytes);
            wait_until("it waits", secs(5), || waiting(&full.pool) == 1);
            let start = Instant::now();
            if end == "RST" {
                client.reset()
            } else {
                drop(client)
            }
            wait_until("its ticket is gone", secs(3), || waiting(&full.pool) == 0);
            let took = start.elapsed();
            say(format!("          {what}, {end}: gone after {} ms", took.as_millis()));
            // Of the limit of 100 ms a status page every 10 ms and a busy machine may take some.
            assert!(took < millis(150), "{what}, {end}: {took:?}");
        }
    }
    // Behind an upload that nobody reads the FIN does not arrive: only a write finds out, and the first is made
    // after two seconds.
    let mut client = Conn::connect(&full.pool.tcp);
    client.send(request(MARK, "POST /v1.44/build?t=x", "Content-Length: 100000000\r\n"));
    let sent = flood(&mut client, 90_000_000);
    assert!(sent < 80_000_000, "the upload of one that waits is not taken: {sent}");
    wait_until("it waits", secs(5), || waiting(&full.pool) == 1);
    let start = Instant::now();
    drop(client);
    wait_until("its ticket is gone", secs(4), || waiting(&full.pool) == 0);
    say(format!("          build behind {sent} unread bytes: gone after {} ms", start.elapsed().as_millis()));
    let Full { fake, pool, holder } = full;
    drop(holder);
    wait_until("the slot is free", secs(5), || pool.status()["daemons"][0]["used"] == 0);
    holds_for("nothing is started", millis(200), || fake.seen_with(MARK).is_empty());
}

#[test]
fn row_20_a_full_queue_and_a_wait_too_long_are_refused_with_position_and_limit() {
    let full = full(&[("DINDPOOL_QUEUE_LIMIT", "2"), ("DINDPOOL_QUEUE_WAIT", "4s")]);
    let ask = |session: &str| {
        let mut client = Conn::connect(&full.pool.tcp);
        client.send(request(session, "POST /v1.44/images/create?fromImage=x", "Content-Length: 0\r\n"));
        client
    };
    let refusal = |mut client: Conn| {
        let head = client.head();
        assert_eq!((head.status(), head.get("content-type")), (503, Some("application/json")));
        let seconds: u32 = head.get("retry-after").expect("Retry-After").parse().expect("seconds");
        assert!(seconds > 0);
        let body = client.body("POST", &head);
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let (message, number) = body["message"].as_str().unwrap().rsplit_once(" (request ").unwrap();
        assert!(number.trim_end_matches(')').parse::<u64>().is_ok(), "{body}");
        message.to_owned()
    };
    let creates: Vec<Conn> = ["one", "two"]
        .into_iter()
        .enumerate()
        .map(|(n, session)| {
            let mut client = Conn::connect(&full.pool.tcp);
            let body = r#"{"Image":"x"}"#;
            let entity = format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
            client.send(request(session, "POST /v1.44/containers/create", &entity) + body);
            wait_until("it waits", secs(5), || waiting(&full.pool) == n + 1);
            client
        })
        .collect();
    let message = refusal(ask("three"));
    assert_eq!(message, "the queue is full: 2 of at most 2 builds wait already; try again later");
    for create in creates {
        let message = refusal(create);
        let told = message.starts_with("no slot came free within 4 s, the longest wait (position ")
            && message.ends_with("try again later");
        assert!(told, "{message}");
    }
    wait_until("nobody waits", secs(5), || waiting(&full.pool) == 0);
}
