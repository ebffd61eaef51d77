//! The same bytes to a real dockerd, directly and through the proxy: the same bytes must come back.

use serde_json::json;

use super::Lab;
use super::common::http::Conn;
use super::common::parts;
use super::common::scenarios::Scenarios;
use super::common::unique;
use super::transcript::{dateless, exchange};

/// Adds the scenarios.
pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("plain requests get the daemon's own bytes", || corpus(lab));
    all.add("Expect: 100-continue is the daemon's to answer", || expect(lab));
    all.add("a long keep-alive connection mixes every kind of answer", || keep_alive(lab));
    all.add("a client gets each chunk when the daemon sends it", || chunks(lab));
}

/// Whole requests, and the methods in them.
fn requests(id: &str, image: &str) -> Vec<(String, Vec<&'static str>)> {
    let get = |path: &str| (format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"), vec!["GET"]);
    let json = |method: &'static str, path: &str, body: &str| {
        let n = body.len();
        let head = "Host: x\r\nContent-Type: application/json";
        (format!("{method} {path} HTTP/1.1\r\n{head}\r\nContent-Length: {n}\r\n\r\n{body}"), vec![method])
    };
    let mut all = vec![
        get("/v1.44/images/json?filters=%7B%22label%22%3A%5B%22none%22%5D%7D"),
        get(&format!("/v1.44/images/{image}/json")),
        get("/v1.44/networks/none"),
        get(&format!("/v1.44/containers/{id}/json")),
        get(&format!("/containers/{id}/json")),
        get(&format!("/v1.44/containers/{id}/archive?path=/bin/busybox")),
        get(&format!("/v1.44/containers/{id}/logs?stdout=1")),
        get("/v1.44/containers/no-such-thing/json"),
        get("/v1.44/images/no/such:thing/json"),
        get("/v1.44/images/10.1.1.1:5000%2Fa%2Fb:c/json"),
        get("/v1.44/no/such/endpoint"),
        get("//v1.44/containers/json"),
        get("/v1.44/containers/json?filters=%7B%22label%22%3A%5B%22a%3Db%22%5D%7D"),
        get("/v1.44/containers/json?filters=broken"),
        json("POST", "/v1.44/containers/create", "{broken"),
        json("POST", "/v1.44/containers/create", r#"{"Image":"no-such-image:1"}"#),
        json("DELETE", "/v1.44/containers/no-such-thing", ""),
        json("POST", &format!("/v1.44/containers/{id}/start"), ""), // 304: it runs
        json("POST", &format!("/v1.44/containers/{id}/update"), r#"{"CpuShares":512}"#),
        json("POST", &format!("/v1.44/containers/{id}/resize?h=1&w=1"), ""),
        (format!("HEAD /v1.44/containers/{id}/archive?path=/bin HTTP/1.1\r\nHost: x\r\n\r\n"), vec!["HEAD"]),
        ("HEAD /v1.44/containers/json HTTP/1.1\r\nHost: x\r\n\r\n".into(), vec!["HEAD"]),
        // Old and odd, but valid.
        ("GET /v1.44/networks/none HTTP/1.0\r\n\r\n".into(), vec!["GET"]),
        ("GET /v1.44/networks/none HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".into(), vec!["GET"]),
        (
            "GET /v1.44/containers/no/json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".into(),
            vec!["GET"],
        ),
        ("GET /v1.44/networks/none HTTP/1.1\r\nHost:\r\n\r\n".into(), vec!["GET"]),
        (
            "GET /v1.44/networks/none HTTP/1.1\r\nhOsT:x\r\nX-A:   spaces \t \r\nX-Empty:\r\n\r\n".into(),
            vec!["GET"],
        ),
        ("OPTIONS /v1.44/containers/json HTTP/1.1\r\nHost: x\r\n\r\n".into(), vec!["OPTIONS"]),
    ];
    // A chunked body in small pieces, with an extension and a trailer.
    all.push((
        "POST /v1.44/containers/create HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
         Transfer-Encoding: chunked\r\n\r\n9;ext=1\r\n{\"Image\":\r\n9\r\n\"nope:9\"}\r\n0\r\nX-Trailer: 1\r\n\r\n"
            .into(),
        vec!["POST"],
    ));
    // Two requests in one write: answered one after the other.
    let twice = "GET /v1.44/networks/none HTTP/1.1\r\nHost: x\r\n\r\n";
    all.push((twice.repeat(2), vec!["GET", "GET"]));
    all
}

fn corpus(lab: &Lab) {
    let id = lab.container(json!({ "Cmd": ["sh", "-c", "echo said; exec sleep 600"] }));
    let mut wrong = Vec::new();
    for (raw, methods) in requests(&id, &lab.image) {
        let [direct, via] = lab.ways().map(|addr| exchange(addr, raw.as_bytes(), &methods));
        if direct != via {
            let (direct, via) = (format!("{direct:?}"), format!("{via:?}"));
            wrong.push(format!("{raw}direct {direct:.700}\nvia    {via:.700}"));
        }
    }
    lab.remove(&id);
    assert!(wrong.is_empty(), "{} of the corpus differ:\n{}", wrong.len(), wrong.join("\n\n"));
}

fn expect(lab: &Lab) {
    let tar = std::fs::read(parts::busybox("rootfs.tar")).unwrap();
    let answers = lab.ways().map(|addr| {
        let mut conn = Conn::connect(addr);
        let name = "expect";
        conn.send(format!(
            "POST /v1.44/images/create?fromSrc=-&repo={name}&tag=1 HTTP/1.1\r\nHost: x\r\nContent-Type: \
             application/x-tar\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
            tar.len()
        ));
        let go_on = conn.head();
        assert_eq!(go_on.line, "HTTP/1.1 100 Continue", "before any byte of the body was sent");
        conn.send(&tar);
        let head = conn.head();
        let body = conn.body("POST", &head);
        assert!(String::from_utf8_lossy(&body).contains("sha256:"), "{}", String::from_utf8_lossy(&body));
        (dateless(&go_on), dateless(&head))
    });
    assert_eq!(answers[0], answers[1]);
    // One that is refused is refused without the body, and the connection stays in step.
    let refused = lab.ways().map(|addr| {
        let mut conn = Conn::connect(addr);
        conn.send(
            "PUT /v1.44/containers/no-such-thing/archive?path=/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\
             Content-Length: 5\r\n\r\n",
        );
        let head = conn.head();
        conn.body("PUT", &head);
        head.status()
    });
    assert_eq!(refused, [404, 404]);
}

fn keep_alive(lab: &Lab) {
    let id = lab.container(json!({ "Cmd": ["sleep", "600"] }));
    let mut conn = Conn::connect(&lab.via.tcp);
    let name = unique();
    for round in 0..20 {
        for (method, path, status) in [
            ("HEAD", "/_ping".to_owned(), 200),
            ("GET", "/v1.44/images/json".to_owned(), 200),
            ("GET", format!("/v1.44/containers/{id}/json"), 200),
            ("POST", format!("/v1.44/containers/{id}/start"), 304),
            ("HEAD", format!("/v1.44/containers/{id}/archive?path=/bin"), 200),
            ("GET", format!("/v1.44/containers/{name}/json"), 404),
            ("POST", format!("/v1.44/containers/{id}/rename?name=n{name}x{round}"), 204),
            ("GET", "/version".to_owned(), 200),
        ] {
            conn.send(format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"));
            let head = conn.head();
            assert_eq!(head.status(), status, "round {round}: {method} {path}");
            conn.body(method, &head);
        }
    }
    lab.remove(&id);
}

/// HAProxy in http mode held the first chunk for 214 ms.
fn chunks(lab: &Lab) {
    let id = lab
        .container(json!({ "Cmd": ["sh", "-c", "read x; echo one; read x; echo two"], "OpenStdin": true }));
    let mut input = Conn::connect(&lab.direct.addr);
    input.send(format!(
        "POST /v1.44/containers/{id}/attach?stream=1&stdin=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n\
         Upgrade: tcp\r\nContent-Length: 0\r\n\r\n"
    ));
    assert_eq!(input.head().status(), 101);
    let mut logs = Conn::connect(&lab.via.tcp);
    logs.send(format!(
        "GET /v1.44/containers/{id}/logs?follow=1&stdout=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    ));
    assert_eq!(logs.head().status(), 200, "the head comes before there is anything to say");
    for word in ["one\n", "two\n"] {
        input.send("go\n");
        let mut got = Vec::new();
        while !got.ends_with(word.as_bytes()) {
            got.extend(logs.chunk().unwrap().expect("a chunk before the end"));
        }
    }
    assert_eq!(logs.chunk().unwrap(), None, "a clean end when the container ends");
    lab.remove(&id);
}
