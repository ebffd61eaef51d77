//! What the proxy answers itself: `/_ping` and `/version` (design, decisions 2 and 11), and the 101 of `/grpc`.

use std::fmt::Write;
use std::sync::Arc;

use serde_json::Value;

use crate::engine::model::ApiVersion;
use crate::error::{Error, Kind};
use crate::pool::about::About;
use crate::pool::{Pool, rewrite_version};

/// What is advertised before any daemon has answered. Every dockerd from 20.10 to 29.7 serves it, except
/// 29.0–29.2 whose minimum is 1.44; a client that negotiated it works once daemons are there.
const UNKNOWN_API: ApiVersion = (1, 41);

/// The answer to `/_ping`. While no daemon takes sessions it is 429 with the reason: the docker CLI goes on and
/// gets a 503 that says the same, and buildx prints the message and exits 1. Anything else (503 on `/grpc`)
/// would make buildx fall back to pulling `moby/buildkit`. The same with the `refusal` of a
/// client that cannot be served now.
pub fn ping(pool: &Pool, head_only: bool, keep_alive: bool, refusal: Option<Error>) -> Vec<u8> {
    // Work waits for daemons that are on their way.
    let nobody = || (!pool.is_ready() && !pool.expects_room()).then(|| nobody(pool));
    pong(known(pool), head_only, keep_alive, refusal.or_else(nobody))
}

/// What is known of the daemons: the highest API version, and what they say of themselves.
pub type Known = (ApiVersion, Arc<About>);

/// What the pool knows of its daemons.
pub fn known(pool: &Pool) -> Option<Known> {
    pool.about(None).map(|(_, max, about)| (max, about))
}

/// As [`ping`], of whoever knows no more than this.
pub fn pong(known: Option<Known>, head_only: bool, keep_alive: bool, refusal: Option<Error>) -> Vec<u8> {
    let (api, about) = known.unwrap_or((UNKNOWN_API, Default::default()));
    let (status, content_type, body) = match &refusal {
        None => ("200 OK", "text/plain; charset=utf-8", "OK".to_string()),
        Some(error) => ("429 Too Many Requests", "application/json", error.body()),
    };
    let or =
        |value: &str, default: &str| if value.is_empty() { default.to_string() } else { value.to_string() };
    let mut out = String::with_capacity(512);
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "HTTP/1.1 {status}\r\nApi-Version: {}.{}\r\nBuilder-Version: {}\r\n\
         Cache-Control: no-cache, no-store, must-revalidate\r\nContent-Type: {content_type}\r\n\
         Docker-Experimental: {}\r\nOstype: {}\r\nPragma: no-cache\r\nServer: {}\r\nSwarm: inactive\r\n",
        api.0,
        api.1,
        or(&about.builder, "2"),
        or(&about.experimental, "false"),
        or(&about.os, "linux"),
        or(&about.server, concat!("dindpool/", env!("CARGO_PKG_VERSION"))),
    );
    if refusal.is_some() {
        out.push_str("Retry-After: 5\r\n");
    }
    if !keep_alive {
        out.push_str("Connection: close\r\n");
    }
    // dockerd answers HEAD with a length of 0 (28.5, measured).
    let body = if head_only { String::new() } else { body };
    let _ = write!(out, "Content-Length: {}\r\n\r\n{body}", body.len());
    out.into_bytes()
}

/// The refusal of a client that could only join a queue that is full.
pub fn queue_full(pool: &Pool) -> Error {
    let limit = pool.config().engine.queue_limit;
    Error::new(Kind::QueueFull, format!("the queue is full: {limit} builds wait already; try again later"))
}

/// Why nobody takes sessions, for a client that asks before it has a session.
fn nobody(pool: &Pool) -> Error {
    let status = pool.status();
    let daemons: Vec<String> = status
        .daemons
        .iter()
        .take(8)
        .map(|d| {
            let state = crate::metrics::state_word(d.state);
            let reason = if d.reason.is_empty() { String::new() } else { format!(" ({})", d.reason) };
            format!("{} {state}{reason}", d.id)
        })
        .collect();
    let message = if daemons.is_empty() {
        "no daemon: the pool is empty".to_string()
    } else {
        format!("no healthy daemon in the pool: {}", daemons.join(", "))
    };
    Error::new(Kind::NoDaemon, message)
}

/// The answer to `/version`: what a daemon says of itself, with the pool's API range.
///
/// # Errors
/// When no daemon has answered yet.
pub fn version(pool: &Pool, keep_alive: bool) -> Result<Vec<u8>, Error> {
    let Some((min, max, about)) = pool.about(None) else { return Err(nobody(pool)) };
    Ok(json(&rewrite_version(&about.version, min, max), &about, max, keep_alive))
}

fn json(body: &Value, about: &About, api: ApiVersion, keep_alive: bool) -> Vec<u8> {
    let body = format!("{body}\n");
    let close = if keep_alive { "" } else { "Connection: close\r\n" };
    format!(
        "HTTP/1.1 200 OK\r\nApi-Version: {}.{}\r\nContent-Type: application/json\r\n\
         Docker-Experimental: {}\r\nOstype: {}\r\nServer: {}\r\n{close}Content-Length: {}\r\n\r\n{body}",
        api.0,
        api.1,
        about.experimental,
        about.os,
        about.server,
        body.len()
    )
    .into_bytes()
}

/// A 200 without a body, as dockerd answers `/build/cancel`.
pub fn ok(keep_alive: bool) -> Vec<u8> {
    let close = if keep_alive { "" } else { "Connection: close\r\n" };
    format!("HTTP/1.1 200 OK\r\n{close}Content-Length: 0\r\n\r\n").into_bytes()
}

/// dockerd's own answer to `/grpc` (28.5, measured).
pub const GRPC_101: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n";
