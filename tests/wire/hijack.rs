//! Connections that stop being HTTP: attach, exec, websockets, and the HTTP/2 preface.

use serde_json::{Value, json};

use super::Lab;
use super::common::http::Conn;
use super::common::scenarios::Scenarios;
use super::common::{say, secs, unique, wait_until};
use super::transcript::{dateless, exchange};

/// Adds the scenarios.
pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("attach with an upgrade is a 101 and then raw bytes both ways", || attach(lab, true));
    all.add("attach without an upgrade is a bare 200 and then raw bytes both ways", || attach(lab, false));
    all.add("a half-closed stdin ends the reader, and its output still arrives", || half_close(lab));
    all.add("a refused upgrade has its body, and the connection goes on where the daemon lets it", || {
        refused(lab)
    });
    all.add("bytes behind a refused upgrade are never taken for a request", || {
        refused_with_bytes_behind(lab)
    });
    all.add("exec start upgrades a connection that has served other requests", || reused(lab));
    all.add("stdin right behind the head reaches the container", || behind_the_head(lab));
    all.add("stdin behind a Content-Length body is not parsed as a head", || behind_the_body(lab));
    all.add("attach/ws speaks websocket", || websocket(lab));
    all.add("a client that vanishes from attach ends the daemon's side", || vanished(lab));
    all.add("an HTTP/2 preface on the API port reaches the daemon", || preface(lab));
}

fn cat() -> Value {
    json!({ "Cmd": ["sh", "-c", "cat; echo end"], "OpenStdin": true, "StdinOnce": true,
            "AttachStdin": true, "AttachStdout": true })
}

fn attach_head(id: &str, upgrade: bool) -> String {
    let upgrade = if upgrade { "Connection: Upgrade\r\nUpgrade: tcp\r\n" } else { "" };
    format!(
        "POST /v1.44/containers/{id}/attach?stderr=1&stdin=1&stdout=1&stream=1 HTTP/1.1\r\nHost: x\r\n\
         Content-Length: 0\r\n{upgrade}\r\n"
    )
}

/// A frame of a multiplexed stream.
fn frame(text: &str) -> Vec<u8> {
    let n = u32::try_from(text.len()).unwrap().to_be_bytes();
    [&[1, 0, 0, 0][..], &n, text.as_bytes()].concat()
}

fn attach(lab: &Lab, upgrade: bool) {
    let heads = lab.ways().map(|addr| {
        let id = lab.container(cat());
        let mut conn = Conn::connect(addr);
        conn.send(attach_head(&id, upgrade));
        let head = conn.head();
        assert_eq!(head.status(), if upgrade { 101 } else { 200 });
        // What looks like a request is stdin now, and back and forth it goes.
        for line in ["GET /_ping HTTP/1.1\r\n\r\n", "0\r\n\r\n", "third\n"] {
            conn.send(line);
            let mut got = Vec::new();
            let wanted: Vec<u8> = frame(line);
            while got.len() < wanted.len() {
                got.extend(conn.some().unwrap());
            }
            assert_eq!(got, wanted, "{}", addr.url());
        }
        conn.half_close();
        assert_eq!(conn.try_rest().unwrap(), frame("end\n"));
        lab.remove(&id);
        dateless(&head)
    });
    assert_eq!(heads[0], heads[1]);
}

/// Every non-TTY `docker run` in the foreground does this.
fn half_close(lab: &Lab) {
    for addr in lab.ways() {
        let id = lab.container(json!({
            "Cmd": ["sh", "-c", "cat >/dev/null; usleep 500000; seq 1 20000"], "OpenStdin": true, "StdinOnce": true
        }));
        let mut conn = Conn::connect(addr);
        conn.send(attach_head(&id, true));
        assert_eq!(conn.head().status(), 101);
        conn.half_close();
        let rest = conn.try_rest().unwrap();
        let expected: usize = (1..=20000).map(|i: u32| i.to_string().len() + 1).sum();
        assert!(rest.len() > expected, "{}: {} bytes of {expected}", addr.url(), rest.len());
        lab.remove(&id);
    }
}

/// A refused exec has a length, and the connection goes on; a refused attach is ended by the end of the connection.
fn refused(lab: &Lab) {
    let answers = lab.ways().map(|addr| {
        let mut conn = Conn::connect(addr);
        conn.send(exec_start("no-such-thing", ""));
        let head = conn.head();
        let body = conn.body("POST", &head);
        conn.send("GET /v1.44/networks/none HTTP/1.1\r\nHost: x\r\n\r\n");
        let next = conn.head();
        (dateless(&head), body, dateless(&next), conn.body("GET", &next))
    });
    assert_eq!(answers[0], answers[1]);
    let attach = attach_head("no-such-thing", true);
    let [direct, via] = lab.ways().map(|addr| exchange(addr, attach.as_bytes(), &["POST"]));
    assert_eq!(direct, via);
}

/// They were meant for a stream that is not there: read as a request they would smuggle one.
fn refused_with_bytes_behind(lab: &Lab) {
    let name = format!("smuggled{}", unique());
    let body = format!(r#"{{"Name":"{name}"}}"#);
    let behind = format!(
        "POST /v1.44/volumes/create HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut conn = Conn::connect(&lab.via.tcp);
    conn.send(exec_start("no-such-thing", &behind));
    let head = conn.head();
    conn.body("POST", &head);
    assert_eq!(head.status(), 404);
    assert!(conn.ends_within(secs(3)), "the connection is never used again");
    assert!(!lab.direct.has_volume(&name), "the bytes behind a refused upgrade were taken for a request");
}

fn exec(conn: &mut Conn, id: &str, config: &Value) -> String {
    let body = config.to_string();
    conn.send(format!(
        "POST /v1.44/containers/{id}/exec HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    ));
    let head = conn.head();
    let body = conn.body("POST", &head);
    assert_eq!(head.status(), 201, "{}", String::from_utf8_lossy(&body));
    serde_json::from_slice::<Value>(&body).unwrap()["Id"].as_str().unwrap().to_owned()
}

fn exec_start(exec: &str, behind: &str) -> String {
    let body = r#"{"Detach":false,"Tty":false}"#;
    format!(
        "POST /v1.44/exec/{exec}/start HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}{behind}",
        body.len()
    )
}

fn reused(lab: &Lab) {
    let id = lab.container(json!({ "Cmd": ["sleep", "600"] }));
    let heads = lab.ways().map(|addr| {
        let mut conn = Conn::connect(addr);
        for path in ["/_ping", "/version", &format!("/v1.44/containers/{id}/json")] {
            conn.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
            let head = conn.head();
            conn.body("GET", &head);
        }
        let made = exec(&mut conn, &id, &json!({ "Cmd": ["echo", "hi"], "AttachStdout": true }));
        conn.send(exec_start(&made, ""));
        let head = conn.head();
        assert_eq!(conn.try_rest().unwrap(), frame("hi\n"));
        dateless(&head)
    });
    assert_eq!(heads[0], heads[1]);
    lab.remove(&id);
}

/// dockerd itself may lose such bytes, so there is no oracle: the proxy keeps them until the 101 has come.
fn behind_the_head(lab: &Lab) {
    let id = lab.container(cat());
    let mut conn = Conn::connect(&lab.via.tcp);
    conn.send(format!("{}early\n", attach_head(&id, true)));
    assert_eq!(conn.head().status(), 101);
    assert_eq!(conn.exact(frame("early\n").len()), frame("early\n"));
    conn.half_close();
    assert_eq!(conn.try_rest().unwrap(), frame("end\n"));
    lab.remove(&id);
}

/// docker-modem does this.
fn behind_the_body(lab: &Lab) {
    let id = lab.container(json!({ "Cmd": ["sleep", "600"] }));
    let mut conn = Conn::connect(&lab.via.tcp);
    let config = json!({ "Cmd": ["cat"], "AttachStdin": true, "AttachStdout": true });
    let made = exec(&mut conn, &id, &config);
    let stdin = "GET /v1.44/containers/json HTTP/1.1\nHost: smuggled\n\n";
    conn.send(exec_start(&made, stdin));
    assert_eq!(conn.head().status(), 101);
    let mut got = Vec::new();
    while got.len() < stdin.len() + 8 {
        got.extend(conn.some().unwrap());
    }
    assert_eq!(got, frame(stdin));
    conn.half_close();
    assert_eq!(conn.try_rest().unwrap(), b"");
    lab.remove(&id);
}

fn websocket(lab: &Lab) {
    let heads = lab.ways().map(|addr| {
        let id = lab.container(cat());
        let mut conn = Conn::connect(addr);
        conn.send(format!(
            "GET /v1.44/containers/{id}/attach/ws?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: x\r\nUpgrade: \
             websocket\r\nConnection: Upgrade\r\nOrigin: http://x\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        ));
        let head = conn.head();
        assert_eq!(head.status(), 101, "{}", head.line);
        assert_eq!(head.get("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        conn.send(b"\x82\x83\0\0\0\0hi\n"); // a masked binary frame, its mask zero
        let answer = conn.exact(5);
        assert_eq!(&answer[1..], b"\x03hi\n", "{answer:?}");
        lab.remove(&id);
        dateless(&head)
    });
    assert_eq!(heads[0], heads[1]);
}

/// dockerd itself closes its end when the container has ended; the proxy's end is the proxy's to close.
fn vanished(lab: &Lab) {
    let id = lab.container(cat());
    let before = lab.via.sockets();
    let conns: Vec<Conn> = (0..10)
        .map(|_| {
            let mut conn = Conn::connect(&lab.via.tcp);
            conn.send(attach_head(&id, true));
            assert_eq!(conn.head().status(), 101);
            conn
        })
        .collect();
    assert!(lab.via.sockets() >= before + 20, "ten streams are open");
    conns.into_iter().for_each(Conn::reset);
    let took = wait_until("the proxy's connections are closed", secs(5), || lab.via.sockets() <= before + 1);
    say(format!("          ten vanished attach clients: closed after {} ms", took.as_millis()));
    assert!(took <= secs(1), "{took:?}");
    lab.remove(&id);
}

/// Engine 29 speaks HTTP/2 with prior knowledge on its API port; older ones refuse it in their own way.
fn preface(lab: &Lab) {
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let raw = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &settings].concat();
    let answers = lab.ways().map(|addr| {
        let mut conn = Conn::connect(addr);
        conn.send(&raw);
        conn.exact(9)
    });
    assert_eq!(answers[0], answers[1]);
    if lab.direct.get("/version")["ApiVersion"].as_str().unwrap() >= "1.53" {
        assert_eq!(answers[1][3], 4, "the daemon's SETTINGS frame: {:?}", answers[1]);
    }
}
