//! One request and its response.

use std::io;

use super::head::{RequestHead, ResponseHead};
use super::io::Side;
use crate::error::Error;

/// What the caller knows of the request's class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// attach, exec start, `/session`, `/grpc`: the response may end HTTP on this connection.
    pub hijack: bool,
}

/// What the caller wants to see of an exchange. Every method has an empty default.
pub trait Observer {
    /// A head of the daemon, interim ones included, just before it is forwarded.
    fn response_head(&mut self, _head: &ResponseHead<'_>) {}

    /// The next bytes of the request body, without chunk framing, just before they are forwarded.
    fn request_body(&mut self, _payload: &[u8]) {}

    /// The next bytes of the response body, without chunk framing, just before they are forwarded.
    fn response_body(&mut self, _payload: &[u8]) {}

    /// The daemon has failed within the body of its response. If that is a Docker JSON stream, this gives
    /// the line ([`Error::stream_line`]) that tells the user so; it is sent if the framing still allows it.
    fn broken_stream(&mut self, _failure: &io::Error) -> Option<String> {
        None
    }
}

/// For callers that want to see nothing.
impl Observer for () {}

/// How an exchange ended.
#[derive(Debug)]
pub enum Outcome {
    /// The response has been relayed to its end.
    Done {
        /// The client's connection may carry its next request; if not, drop it. Everything that a proper
        /// end needs (FIN, drain) has been done.
        keep_client: bool,
        /// The daemon's connection may carry the next request of this client; if not, drop it.
        keep_daemon: bool,
    },
    /// The connection has been upgraded, and the head that says so has been forwarded: call
    /// [`tunnel`](super::tunnel::tunnel) now. Bytes that came behind it are buffered in the sides.
    Upgraded,
    /// The client has gone; the daemon's connection has been aborted. Drop both.
    ClientGone,
    /// The client broke the protocol within its body; the daemon's connection has been aborted. If
    /// `answerable`, nothing of a response has been sent: [`refuse`] the client with the error. Drop both.
    BadRequest {
        /// What to tell it.
        error: Error,
        /// Whether it can still be told.
        answerable: bool,
    },
    /// The daemon's connection failed, or what it sent is not HTTP; it has been aborted. Drop it.
    DaemonFailed(DaemonFailure),
}

/// How far an exchange had come when the daemon failed.
#[derive(Debug)]
pub struct DaemonFailure {
    /// What happened.
    pub error: io::Error,
    /// No byte of a final response has reached the client: [`refuse`] it with an error, or retry if that is
    /// safe. Otherwise the client's connection has been ended so that it cannot take this for a proper end.
    pub before_response: bool,
    /// The daemon has sent something before it failed.
    pub daemon_spoke: bool,
    /// Bytes of the request body that were taken from the client (a retry would lack them).
    pub body_taken: u64,
}

/// What an exchange has done.
#[derive(Debug)]
pub struct Exchange {
    /// How it ended.
    pub outcome: Outcome,
    /// The status of the final response, if one came.
    pub status: Option<u16>,
    /// Bytes of the request, head included, that were written to the daemon's connection. If this is 0, no
    /// byte of the request reached a daemon.
    pub sent: u64,
    /// Bytes of the response, heads included, that were relayed to the client.
    pub received: u64,
}

/// Sends the request to the daemon and relays its response. `request` has been read from `client`.
pub async fn exchange(
    client: &mut Side,
    daemon: &mut Side,
    request: &RequestHead,
    options: Options,
    observer: &mut impl Observer,
) -> Exchange {
    let _ = (client, daemon, request, options, observer);
    Exchange { outcome: Outcome::ClientGone, status: None, sent: 0, received: 0 }
}

/// Answers a request that will not be relayed (any further), so that the client can read the answer although
/// it may still be sending: answer, FIN, bounded drain. Drop the client then.
pub async fn refuse(client: &mut Side, response: &[u8]) {
    if client.write_all(response).await.is_ok() {
        finish(client).await;
    }
}

pub(super) async fn finish(_client: &mut Side) {}
