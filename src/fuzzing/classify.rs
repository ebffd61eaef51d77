//! A request line.

use percent_encoding::percent_decode_str;

use crate::engine::images::normalise;
use crate::engine::model::{Class, Work};
use crate::proxy::classify::{Local, Route, classify as route_of, prefix};
use crate::proxy::relay::RequestHead;
use crate::proxy::without_prefix;

/// Lines of `METHOD TARGET`: anything that the relay takes has a class, and the same one however it is spelt: with
/// another API version, with its path or its query percent-encoded. Reading starts no work, and what changes a swarm is
/// refused.
pub fn classify(data: &[u8]) {
    data.split(|b| matches!(b, b'\r' | b'\n')).filter(|line| !line.is_empty()).for_each(request_line);
}

fn request_line(line: &[u8]) {
    let Ok(head) = RequestHead::parse([line, b" HTTP/1.1\r\n\r\n"].concat()) else { return };
    let prefix = prefix(head.target());
    for part in [prefix.tenant, prefix.session, prefix.project].into_iter().flatten() {
        assert!(!part.is_empty() && !part.contains(['/', '?']), "a prefix {part:?}");
    }
    assert!(prefix.length <= head.path().len(), "a prefix reaches into the query");
    let length = prefix.length;
    let head = without_prefix(head, length).unwrap_or_else(|e| panic!("without its prefix: {}", e.message));
    let (method, path, query) = (head.method(), head.path(), head.query());
    let route = route_of(method, path, query);
    rules(method, path, &route);
    if !path.starts_with('/') {
        return; // OPTIONS *
    }

    let encoded = encode(path);
    assert_eq!(route_of(method, &encoded, query), route, "the path as {encoded}");
    if let Some(query) = query {
        let encoded = encode_query(query);
        assert_eq!(route_of(method, path, Some(&encoded)), route, "the query as {encoded}");
    }
    if !is_versioned(path) {
        let versioned = route_of(method, &format!("/v1.44{path}"), query);
        assert_eq!(versioned.api, Some((1, 44)));
        assert_eq!(Route { api: None, ..versioned }, route, "with a version");
    }
}

fn rules(method: &str, path: &str, route: &Route) {
    assert!(route.label.bytes().all(|b| b.is_ascii_lowercase() || b"/_".contains(&b)), "{}", route.label);
    if matches!(method, "GET" | "HEAD" | "OPTIONS") {
        assert!(!matches!(route.class, Class::Work(_)), "{method} {path} starts work");
        assert_eq!(route.refuse, None);
    }
    assert!(!matches!(route.class, Class::Work(_)) || method == "POST");
    assert_eq!(route.local == Some(Local::Grpc), route.class == Class::Work(Work::BuildKit));
    assert!(route.hijack || !route.h2);
    let decoded: Vec<u8> = percent_decode_str(path).collect();
    for swarm in ["swarm", "services", "secrets"] {
        let reads = matches!(method, "GET" | "HEAD" | "OPTIONS");
        if decoded.starts_with(format!("/{swarm}/").as_bytes()) {
            assert_eq!(route.refuse.is_none(), reads, "{method} {path}");
        }
    }
    if let Some(image) = &route.image {
        assert_eq!(normalise(image), *image, "an image's full name is its own");
    }
    if let Some(project) = &route.project {
        let name = project.rsplit('/').next().unwrap_or_default();
        assert!(!name.contains([':', '@']), "a project with a tag: {project}");
    }
}

/// Every byte percent-encoded, but for the slash in front, without which it is no path.
fn encode(path: &str) -> String {
    let all: String = percent_decode_str(path).skip(1).map(|b| format!("%{b:02x}")).collect();
    format!("/{all}")
}

fn encode_query(query: &str) -> String {
    let each = |text: &str| -> String { percent_decode_str(text).map(|b| format!("%{b:02X}")).collect() };
    let pair = |pair: &str| match pair.split_once('=') {
        Some((name, value)) => format!("{}={}", each(name), each(&value.replace('+', " "))),
        None => each(pair),
    };
    query.split('&').map(pair).collect::<Vec<_>>().join("&")
}

fn is_versioned(path: &str) -> bool {
    let decoded: Vec<u8> = percent_decode_str(path).collect();
    decoded.starts_with(b"/v")
}
