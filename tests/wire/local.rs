//! What the proxy answers by itself: ping, the version's range, and the 101 of `/grpc`.

use super::Lab;
use super::common::fake_daemon::{API_26, API_28, API_29, FakeDaemon};
use super::common::http::{self, Addr, Conn};
use super::common::pool::Pool;
use super::common::scenarios::Scenarios;
use super::common::{holds_for, millis, secs, unique, wait_until};

/// What is compared with a real daemon.
pub fn add_real<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("a ping has every header of the daemon's own ping", || same_ping(lab));
    all.add("a version out of the range is refused as a daemon refuses it", || out_of_range(lab));
    all.add("/version is the daemon's own when there is only one", || same_version(lab));
}

fn same_ping(lab: &Lab) {
    for (method, path) in
        [("GET", "/_ping"), ("HEAD", "/_ping"), ("GET", "/v1.44/_ping"), ("HEAD", "/v1.44/_ping")]
    {
        let [direct, via] = lab.ways().map(|addr| http::request(addr, method, path, None));
        assert_eq!(via.head.status(), 200);
        assert_eq!(via.text(), direct.text(), "{method} {path}");
        for name in [
            "Api-Version",
            "Builder-Version",
            "Docker-Experimental",
            "Ostype",
            "Server",
            "Cache-Control",
            "Pragma",
            "Swarm",
            "Content-Type",
        ] {
            assert_eq!(via.head.get(name), direct.head.get(name), "{method} {path}: {name}");
        }
    }
}

fn same_version(lab: &Lab) {
    let [direct, via] = lab.ways().map(|addr| http::get(addr, "/version"));
    assert_eq!(via.json(), direct.json());
    assert_eq!(via.head.get("content-type"), Some("application/json"));
}

/// The range is the pool's, so the words are its own; every client shows them.
fn out_of_range(lab: &Lab) {
    for (path, words) in [
        ("/v1.99/containers/json", "client version 1.99 is too new. Maximum supported API version"),
        ("/v1.10/containers/json", "client version 1.10 is too old. Minimum supported API version"),
    ] {
        let [direct, via] = lab.ways().map(|addr| http::get(addr, path));
        assert_eq!(via.head.status(), direct.head.status());
        assert!(direct.text().contains(words) && via.text().contains(words), "{}", via.text());
    }
}

fn front(fakes: &[&FakeDaemon]) -> Pool {
    let pool = Pool::serve(fakes.iter().map(|f| &f.addr)).start();
    pool.wait_healthy(fakes.len(), secs(20));
    pool
}

/// A request with a marker by which the fake daemon would know it.
fn marked(method: &str, path: &str, marker: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: x\r\nX-Marker: {marker}\r\n\r\n")
}

#[test]
fn a_ping_is_answered_without_a_daemon() {
    let fake = FakeDaemon::idle();
    let pool = front(&[&fake]);
    let marker = unique();
    let mut conn = Conn::connect(&pool.tcp);
    for (method, path) in
        [("HEAD", "/_ping"), ("GET", "/_ping"), ("GET", "/v1.41/_ping"), ("HEAD", "/v1.24/_ping")]
    {
        conn.send(marked(method, path, &marker));
        let head = conn.head();
        let body = conn.body(method, &head);
        assert_eq!(head.status(), 200, "{method} {path}");
        assert_eq!(head.get("api-version"), Some("1.51"));
        assert_eq!(body, if method == "GET" { b"OK".as_slice() } else { b"" });
    }
    assert!(fake.seen_with(&marker).is_empty(), "a ping reached the daemon");
    // Also when there is no daemon any more: the range of the last known ones.
    fake.die();
    wait_until("the daemon is given up", secs(30), || pool.healthy() == 0);
    conn.send(marked("HEAD", "/_ping", &marker));
    assert_eq!(conn.head().get("api-version"), Some("1.51"));
}

#[test]
fn ping_and_version_tell_the_range_that_all_daemons_share() {
    let fakes = [
        FakeDaemon::with_api(API_26, "\0", |_| {}),
        FakeDaemon::with_api(API_29, "\0", |_| {}),
        FakeDaemon::with_api(API_28, "\0", |_| {}),
    ];
    let pool = front(&fakes.each_ref());
    for path in ["/version", "/v1.44/version"] {
        let version = http::get(&pool.tcp, path).json();
        assert_eq!(version["ApiVersion"], "1.45", "the lowest maximum");
        assert_eq!(version["MinAPIVersion"], "1.40", "the highest minimum");
        assert_eq!(version["Version"], "28.5.2", "the rest is a daemon's own");
    }
    let ping = http::request(&pool.tcp, "HEAD", "/_ping", None);
    assert_eq!(ping.head.get("api-version"), Some("1.45"));
}

/// Two of a build's four `/grpc` connections never send a preface: they must cost no daemon anything.
#[test]
fn grpc_is_answered_101_before_a_daemon_is_touched() {
    let fake = FakeDaemon::start("/grpc", |exchange| {
        exchange.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n");
        let preface = exchange.conn.try_exact(24).unwrap_or_default();
        exchange.send(preface);
        exchange.until_closed();
    });
    let pool = front(&[&fake]);
    let upgrade = "POST /grpc HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 0\r\n\
                   Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n";
    let open = |addr: &Addr| {
        let mut conn = Conn::connect(addr);
        conn.send(upgrade);
        let head = conn.head();
        assert_eq!(
            head.raw,
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        );
        conn
    };
    let probe = open(&pool.tcp);
    let mut silent = open(&pool.unix);
    drop(probe);
    holds_for("no daemon hears of probes", millis(300), || fake.seen_with("POST /grpc").is_empty());
    silent.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    assert_eq!(
        silent.exact(24),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "the preface reaches the daemon, and it answers"
    );
    let seen = fake.seen_with("POST /grpc");
    assert_eq!(seen.len(), 1, "one daemon connection for one preface");
    drop(silent);
    wait_until("the daemon's connection ends", secs(1), || fake.ended(seen[0].conn).is_some());
    // Anything but 101 makes buildx fall back to pulling moby/buildkit: also without any daemon.
    fake.die();
    wait_until("the daemon is given up", secs(30), || pool.healthy() == 0);
    open(&pool.tcp);
}

/// The client has its 101 already: whatever is wrong now can only be said in gRPC, and a connection that ends without
/// that makes buildx dial again a thousand times a second.
#[test]
fn a_daemon_that_does_not_upgrade_is_told_to_each_call() {
    let fake = FakeDaemon::start("/grpc", |exchange| {
        exchange.json("403 Forbidden", &serde_json::json!({ "message": "not here" }));
    });
    let pool = front(&[&fake]);
    let mut conn = Conn::connect(&pool.tcp);
    conn.send("POST /grpc HTTP/1.1\r\nHost: \r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n");
    assert_eq!(conn.head().status(), 101);
    // The preface, empty SETTINGS, and the HEADERS (`:method: POST`) of two calls.
    let headers = |stream: u8| [0, 0, 1, 1, 5, 0, 0, 0, stream, 0x83];
    let calls = [headers(1), headers(3)].concat();
    conn.send([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".as_slice(), &calls].concat());
    let mut said = Vec::new();
    let told = |said: &[u8]| String::from_utf8_lossy(said).matches("does not serve BuildKit").count();
    while told(&said) < 2 {
        let more = conn.some().expect("an answer to each call, and the connection stays");
        assert!(!more.is_empty(), "it ended after {:?}", String::from_utf8_lossy(&said));
        said.extend(more);
    }
    assert_eq!(fake.seen_with("POST /grpc").len(), 1, "it is asked once");
    assert!(pool.metric("dindpool_errors_total{fault=\"daemon\"}") >= 1.0);
}
