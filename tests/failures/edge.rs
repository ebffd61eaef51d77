//! The proxy's own bad day: too many connections, clients that trickle or go silent, daemons that answer nothing.
use std::io::Write;
use std::time::Instant;

use crate::common::client::{self, Session};
use crate::common::fake_daemon::FakeDaemon;
use crate::common::http::{self, Conn, Stream};
use crate::common::pool::Pool;
use crate::common::{holds_for, millis, parts, poll, say, secs, unique, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

fn real(daemons: usize) -> Result<Pool, String> {
    parts::all(&["busybox/rootfs.tar", "cli-28/docker"])?;
    let pool = Pool::up(&[parts::dockerd("28.5")?], daemons).start();
    pool.wait_healthy(daemons, secs(60));
    Ok(pool)
}

/// A daemon that does not run while this lives.
struct Frozen(Pid);

impl Frozen {
    fn new(pid: i32) -> Frozen {
        kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
        Frozen(Pid::from_raw(pid))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// A terminal with an image of its own and a container that counts to the log, on the daemon that it tells.
fn counting(pool: &Pool) -> (Session, String, usize) {
    let (t, name) = (Session::new(&pool.host(), client::CLI_28), format!("e{}", unique()));
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    t.ok(&format!("docker build -q -t {name} ctx"));
    let count = "i=0; while true; do i=$((i+1)); echo $i; usleep 100000; done";
    t.ok(&format!("docker run -d --name {name} --network none {name} sh -c '{count}'"));
    let at = pool.daemons().iter().position(|d| d.has_container(&name)).expect("it is on a daemon");
    (t, name, at)
}

#[test]
fn row_02_requests_of_a_bound_session_to_a_frozen_daemon_end_with_504() {
    let pool = crate::require!(real(2));
    let (t, name, at) = counting(&pool);
    let daemon = &pool.daemons()[at];
    let logs = t.start(&format!("exec docker logs -f {name}"));
    wait_until("the logs go on", secs(10), || logs.stdout().contains("3\n"));
    let frozen = Frozen::new(daemon.pid());
    let start = Instant::now();
    // Sent while nobody knows yet that the daemon is frozen.
    let inspect = t.start(&format!("docker inspect {name}"));
    let run = t.start(&format!("docker run --rm --network none {name} true"));
    for (what, job) in [("inspect", inspect), ("run", run)] {
        let out = job.wait(secs(30));
        say(format!("          {what}: {:?} after the freeze: {}", start.elapsed(), out.stderr.trim()));
        assert_ne!(out.code, 0);
        let told = format!("daemon {} does not answer", daemon.id);
        assert!(out.stderr.contains(&told), "{}", out.stderr);
    }
    // A create has 10 s from when it was sent, and as long from when its daemon fell silent.
    assert!(start.elapsed() < secs(25));
    assert_eq!(pool.healthy(), 1);
    // Sent afterwards: also what may take long as a rule.
    let start = Instant::now();
    let wait = t.start(&format!("docker wait {name}"));
    let answer = http::get(&pool.tcp, &format!("/containers/{name}/json"));
    assert_eq!(answer.head.status(), 504, "{}", answer.text());
    assert_eq!(answer.head.get("content-type"), Some("application/json"));
    assert!(answer.head.get("retry-after").is_some() && answer.json()["message"].is_string());
    say(format!("          a later inspect: 504 after {:?}", start.elapsed()));
    let out = wait.wait(secs(30));
    say(format!("          a later wait: {:?}: {}", start.elapsed(), out.stderr.trim()));
    assert!(out.code != 0 && out.stderr.contains("does not answer"));
    assert!(logs.output().is_none(), "a stream that is under way waits: {:?}", logs.output());
    drop(frozen);
    pool.wait_healthy(2, secs(30));
    let seen = logs.stdout_len();
    wait_until("the logs go on after the thaw", secs(10), || logs.stdout_len() > seen);
    t.ok(&format!("docker rm -f {name}"));
    logs.wait_ok(secs(10));
    let numbers: Vec<u64> = logs.stdout().lines().map(|l| l.parse().unwrap()).collect();
    assert!(numbers.windows(2).all(|n| n[1] == n[0] + 1), "a line is missing: {numbers:?}");
}

#[test]
fn row_22_a_head_that_trickles_is_answered_408_and_a_builds_body_is_not_hurried() {
    let fake = FakeDaemon::start("/build", |exchange| {
        let body = exchange.body().unwrap_or_default();
        exchange.json("200 OK", &json!({ "stream": body.len().to_string() }));
    });
    let pool = Pool::serve([&fake.addr]).arg("--head-deadline").arg("1s").start();
    pool.wait_healthy(1, secs(20));
    let start = Instant::now();
    // Idle before its head, which is nobody's fault; then byte by byte.
    let mut slow = Conn::connect(&pool.tcp);
    slow.send("GET /v1.51/containers/slow");
    // A create whose body never comes, and one connection that says nothing at all.
    let mut create = Conn::connect(&pool.tcp);
    create.send("POST /v1.51/containers/create HTTP/1.1\r\nHost: d\r\nContent-Length: 90\r\n\r\n{");
    let mut mute = Conn::connect(&pool.tcp);
    // Between two requests of one connection there is no deadline.
    let mut kept = Conn::connect(&pool.tcp);
    let ping = "GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n";
    kept.send(ping);
    let head = kept.head();
    kept.body("GET", &head);
    // A context that comes at a trickle.
    let mut build = Conn::connect(&pool.tcp);
    build.send("POST /v1.51/build HTTP/1.1\r\nHost: d\r\nContent-Length: 4\r\n\r\n");
    for (what, conn) in [("a head", &mut slow), ("a create's body", &mut create)] {
        let head = conn.head();
        let body = conn.body("GET", &head);
        assert_eq!(head.status(), 408, "{what}");
        assert_eq!(head.get("content-type"), Some("application/json"));
        assert!(String::from_utf8_lossy(&body).contains("did not come within 1 s"));
        assert!(conn.ends_within(secs(5)), "{what}");
    }
    assert!(start.elapsed() >= secs(1) && start.elapsed() < secs(5), "{:?}", start.elapsed());
    assert_eq!(mute.try_rest().unwrap(), b"", "one that asked nothing is told nothing");
    build.send("ab");
    holds_for("the build's body may take its time", millis(1500), || {
        fake.seen_with("/build").len() == 1 && pool.metric("dindpool_streams{kind=\"exchange\"}") == 1.0
    });
    build.send("cd");
    let head = build.head();
    assert_eq!(head.status(), 200);
    assert_eq!(build.body("POST", &head), br#"{"stream":"4"}"#);
    kept.send(ping);
    assert_eq!(kept.head().status(), 200, "an idle connection is kept");
    assert!(fake.seen_with("create").is_empty() && fake.seen_with("slow").is_empty());
}

#[test]
fn row_24_a_flood_is_shed_with_503_while_admin_and_probes_go_on() {
    let fake = FakeDaemon::idle();
    let pool = Pool::serve([&fake.addr]).arg("--max-connections").arg("50").start();
    pool.wait_healthy(1, secs(20));
    let mut held: Vec<Conn> = (0..50).map(|_| Conn::connect(&pool.tcp)).collect();
    wait_until("all are in", secs(5), || pool.metric("dindpool_connections{listener=\"tcp\"}") == 50.0);
    let more: Vec<Conn> = (0..300).map(|_| Conn::connect(&pool.tcp)).collect();
    let answer = poll(secs(10), || http::try_request(&pool.tcp, "GET", "/v1.51/info", None).ok());
    let (answer, _) = answer.expect("one of those that are shed is told why");
    assert_eq!(answer.head.status(), 503);
    assert!(answer.head.get("retry-after").is_some());
    assert!(answer.json()["message"].as_str().unwrap().contains("too many connections (50 may be open)"));
    // Where buildx asks, it gets what it understands; and never anything but 101 on /grpc.
    let ping = || http::try_request(&pool.tcp, "GET", "/_ping", None).ok();
    assert_eq!(poll(secs(10), ping).expect("an answer").0.head.status(), 429);
    let mut grpc = Conn::connect(&pool.tcp);
    grpc.send("POST /grpc HTTP/1.1\r\nHost: \r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n");
    assert!(grpc.try_head().is_err());
    let probes = pool.metric("dindpool_probes_total{kind=\"info\",outcome=\"answered\"}");
    assert_eq!(pool.admin("/livez").head.status(), 200);
    assert_eq!(pool.admin("/readyz").head.status(), 200);
    wait_until("probes go on", secs(5), || {
        pool.metric("dindpool_probes_total{kind=\"info\",outcome=\"answered\"}") > probes
    });
    assert!(pool.metric("dindpool_connections_refused_total{reason=\"total\"}") >= 300.0);
    let lines = pool.log().matches("connection refused: too many").count();
    assert!((1..=5).contains(&lines), "{lines} lines for 300 connections");
    drop(more);
    held.truncate(40);
    let served =
        || http::try_request(&pool.tcp, "GET", "/v1.51/info", None).is_ok_and(|a| a.head.status() == 200);
    wait_until("a place that came free is used", secs(5), served);
}

#[test]
fn row_24_without_a_descriptor_left_clients_are_closed_and_nothing_spins() {
    let fake = FakeDaemon::idle();
    let pool = Pool::serve([&fake.addr]).start();
    pool.wait_healthy(1, secs(20));
    let limit = |n: u64| {
        let pid = pool.pid().to_string();
        let to = format!("--nofile={n}:{}", 4096);
        let done = std::process::Command::new("prlimit").args(["--pid", &pid, &to]).status().unwrap();
        assert!(done.success());
    };
    let open = std::fs::read_dir(format!("/proc/{}/fd", pool.pid())).unwrap().count() as u64;
    limit(open + 20);
    let many: Vec<Conn> = (0..200).map(|_| Conn::connect(&pool.tcp)).collect();
    let closed = || many.iter().filter(|c| is_closed(c)).count();
    wait_until("those without a descriptor are closed", secs(10), || closed() >= 150);
    let before = pool.cpu();
    holds_for("it lives", secs(1), || std::fs::metadata(format!("/proc/{}", pool.pid())).is_ok());
    let used = pool.cpu() - before;
    assert!(used < millis(500), "{used:?} of processor time in an idle second");
    limit(4096);
    drop(many);
    let served =
        || http::try_request(&pool.tcp, "GET", "/v1.51/info", None).is_ok_and(|a| a.head.status() == 200);
    wait_until("it serves again", secs(10), served);
    assert!(pool.metric("dindpool_connections_refused_total{reason=\"descriptors\"}") >= 150.0);
    pool.wait_healthy(1, secs(10));
}

/// Whether the peer has closed this connection, on which nothing is to be read.
fn is_closed(conn: &Conn) -> bool {
    let Stream::Tcp(stream) = &conn.stream else { return false };
    stream.set_nonblocking(true).unwrap();
    let closed = match stream.peek(&mut [0]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    };
    stream.set_nonblocking(false).unwrap();
    closed
}

#[test]
fn row_13_a_proxy_that_leaves_serves_on_and_cuts_no_stream() {
    let fake = FakeDaemon::start("/logs", |exchange| {
        exchange.begin_chunked();
        exchange.chunk("begin");
        exchange.conn.patience(secs(60));
        let _ = exchange.conn.try_exact(1);
    });
    let pool = Pool::serve([&fake.addr])
        .env("DINDPOOL_SHUTDOWN_DELAY", "2s")
        .env("DINDPOOL_SHUTDOWN_GRACE", "30s")
        .start();
    pool.wait_healthy(1, secs(20));
    let mut streams: Vec<Conn> = (0..200)
        .map(|_| {
            let mut conn = Conn::connect(&pool.tcp);
            conn.send("GET /v1.51/containers/x/logs?follow=1 HTTP/1.1\r\nHost: d\r\n\r\n");
            conn
        })
        .collect();
    for stream in &mut streams {
        assert_eq!(stream.head().status(), 200);
        assert_eq!(stream.chunk().unwrap().unwrap(), b"begin");
    }
    pool.signal(Signal::SIGTERM);
    wait_until("it is not ready", secs(2), || pool.admin("/readyz").head.status() == 503);
    let mut served = 0;
    // Whoever comes until the listener closes is served, and whoever was connected by then.
    let refused = wait_until("the listener closes", secs(10), || match Conn::try_connect(&pool.tcp) {
        Err(_) => true,
        Ok(mut conn) => {
            conn.send("GET /v1.51/info HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n");
            let status = conn.try_head().expect("a connected client is answered").status();
            assert_eq!(status, 200);
            served += 1;
            false
        }
    });
    say(format!("          {served} requests served in {refused:?} after SIGTERM"));
    assert!(served > 10 && refused > secs(1));
    assert!(streams.iter().all(|s| !is_closed(s)), "no stream is cut");
    for stream in &mut streams {
        stream.stream.write_all(b"x").unwrap();
    }
    drop(streams);
    let took = wait_until("it ends with its last stream", secs(10), || {
        !std::path::Path::new(&format!("/proc/{}/fd/0", pool.pid())).exists()
    });
    say(format!("          ended {took:?} after the last stream"));
}

/// Streams that one process is to hold (docs/reliability.md).
const HELD: usize = 9_000;

#[test]
fn row_24_nine_thousand_held_streams_leave_health_admin_and_builds_as_they_were() {
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    let resource = nix::sys::resource::Resource::RLIMIT_NOFILE;
    nix::sys::resource::setrlimit(resource, hard, hard).unwrap();
    // The proxy needs two for each and 144 for itself, leaves as many to spare as a build needs, and this process one.
    // A debug build checks all that the engine holds after each event, which grows with the square of the streams.
    let debug = cfg!(debug_assertions) && std::env::var_os("DINDPOOL_BIN").is_none();
    let wanted = if debug { 500 } else { HELD };
    let held = wanted.min((hard as usize).saturating_sub(400) / 2);
    if held < HELD {
        say(format!("          {held} of {HELD} streams: debug build: {debug}, limit of open files: {hard}"));
    }
    let pool = crate::require!(real(2));
    let empty = pool.rss();
    let (begun, used) = (Instant::now(), pool.cpu());
    let streams: Vec<Conn> = (0..held)
        .map(|n| {
            let mut conn = Conn::connect(&pool.tcp);
            // Ten sessions, so that both daemons hold some.
            let path =
                format!("/s/held{}/v1.51/events?filters=%7B%22type%22%3A%5B%22plugin%22%5D%7D", n % 10);
            conn.send(format!("GET {path} HTTP/1.1\r\nHost: d\r\n\r\n"));
            conn
        })
        .collect();
    let open = || pool.metric("dindpool_streams{kind=\"exchange\"}");
    wait_until("all streams are open", secs(120), || open() >= held as f64);
    say(format!(
        "          {held} streams are open after {:?}, {:?} of the proxy's processor time",
        begun.elapsed(),
        pool.cpu() - used
    ));
    // No daemon was taken for a dead one meanwhile.
    let ejected = pool.metric("dindpool_ejections_total{reason=\"silent\"}");
    assert!(debug || ejected == 0.0, "{ejected} ejections");
    let full = pool.rss();
    let each = (full.saturating_sub(empty)) as f64 / held as f64;
    say(format!("          {held} streams: {empty} KiB became {full} KiB, {each:.2} KiB for each"));
    // All come at once, so this is the most that they ever held; a stream that only idles costs less (benches/run).
    assert!(debug || each <= 8.0, "{each} KiB for each stream");
    for page in ["/livez", "/readyz", "/status", "/metrics"] {
        let start = Instant::now();
        assert_eq!(pool.admin(page).head.status(), 200, "{page}");
        assert!(start.elapsed() < secs(2), "{page}: {:?}", start.elapsed());
    }
    let t = Session::new(&pool.host(), client::CLI_28);
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\nRUN echo built >/mark\n");
    t.ok("docker build -q --no-cache --network none -t held ctx");
    assert_eq!(t.ok("says docker run --rm --network none held cat /mark"), "built\n");
    // The debug build's checks may make it late for a probe; it must find its daemons well all the same.
    if debug {
        pool.wait_healthy(2, secs(30));
    }
    assert_eq!(pool.healthy(), 2);
    assert!(open() >= held as f64 && streams.iter().all(|s| !is_closed(s)), "none is cut");
    drop(streams);
    wait_until("all are given back", secs(60), || open() == 0.0);
}
