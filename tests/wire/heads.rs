//! Long heads: build args travel in the query, and dockerd takes 1 MiB.

use super::Lab;
use super::common::http::Conn;
use super::common::scenarios::Scenarios;
use super::transcript::exchange;

/// Adds the scenarios.
pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("a head of 100 KiB passes, in the query and in a header", || passes(lab, 100 * 1024));
    all.add("a head of almost 1 MiB passes, in the query and in a header", || {
        passes(lab, 1024 * 1024 - 8 * 1024)
    });
    all.add("a head of more than dockerd takes is refused with 431", || refused(lab));
    all.add("a head that comes byte by byte passes", || byte_by_byte(lab));
}

fn heads(n: usize) -> [String; 2] {
    let long = "a".repeat(n);
    let query = format!("GET /v1.44/containers/no-such-thing/json?x={long} HTTP/1.1\r\nHost: x\r\n\r\n");
    let header =
        format!("GET /v1.44/containers/no-such-thing/json HTTP/1.1\r\nHost: x\r\nX-Long: {long}\r\n\r\n");
    [query, header]
}

fn passes(lab: &Lab, n: usize) {
    for raw in heads(n) {
        let [direct, via] = lab.ways().map(|addr| exchange(addr, raw.as_bytes(), &["GET"]));
        assert_eq!(direct, via, "{raw:.80}");
    }
}

fn refused(lab: &Lab) {
    for raw in heads(1024 * 1024 + 64 * 1024) {
        let statuses = lab.ways().map(|addr| {
            let mut conn = Conn::connect(addr);
            let _ = conn.try_send(&raw);
            let head = conn.head();
            head.status()
        });
        assert_eq!(statuses, [431, 431], "{raw:.80}");
    }
}

fn byte_by_byte(lab: &Lab) {
    let [raw, _] = heads(40);
    let [direct, via] = lab.ways().map(|addr| {
        let mut conn = Conn::connect(addr);
        raw.bytes().for_each(|b| conn.send([b]));
        let head = conn.head();
        (head.status(), conn.body("GET", &head))
    });
    assert_eq!(direct, via);
}
