//! Raw duplex after an upgrade: two half-streams, each with its own end.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::timeout;

use super::exchange::finish;
use super::io::Side;

/// How long the last bytes of an HTTP/2 connection may take.
const FLUSH_TIME: Duration = Duration::from_secs(2);

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

/// Relays both ways until both directions have ended. What the sides have buffered goes first, and a FIN that
/// was read before is passed on. Drop both sides then.
///
/// Not cancel-safe: when the future is dropped early, drop both sides too.
pub async fn tunnel(
    client: &mut Side,
    daemon: &mut Side,
    kind: TunnelKind,
    tap: Option<&mut dyn Tap>,
) -> TunnelEnd {
    let mut duplex = Duplex { client, daemon, kind, tap, up: Half::default(), down: Half::default() };
    let cause = poll_fn(|cx| duplex.poll(cx)).await;
    let end = TunnelEnd { cause, up: duplex.up.bytes, down: duplex.down.bytes };
    let unread = duplex.up.state == State::Refused;
    match cause {
        TunnelCause::ClientReset => daemon.abort(),
        TunnelCause::DaemonReset => client.abort(),
        TunnelCause::ClientFinished | TunnelCause::DaemonFinished if kind == TunnelKind::H2 => {
            daemon.close();
            // Bounded in time as a whole: the other end of an HTTP/2 connection has nothing to wait for.
            let _ = timeout(FLUSH_TIME, Box::pin(finish(client))).await;
        }
        TunnelCause::ClientFinished | TunnelCause::DaemonFinished if unread => {
            daemon.close();
            Box::pin(finish(client)).await;
        }
        TunnelCause::ClientFinished | TunnelCause::DaemonFinished => {}
    }
    end
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Open,
    /// Its FIN has been passed on.
    Finished,
    /// The daemon takes no more; its output may still come.
    Refused,
}

#[derive(Debug, Default)]
struct Half {
    bytes: u64,
    state: State,
}

/// Which end of a half-stream broke.
enum Fault {
    Read,
    Write,
}

struct Duplex<'a, 'b> {
    client: &'a mut Side,
    daemon: &'a mut Side,
    kind: TunnelKind,
    tap: Option<&'b mut dyn Tap>,
    up: Half,
    down: Half,
}

impl Duplex<'_, '_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<TunnelCause> {
        let mut first = match (self.up.state, self.down.state) {
            (State::Open, State::Open) => None,
            (_, State::Open) => Some(TunnelCause::ClientFinished),
            _ => Some(TunnelCause::DaemonFinished),
        };
        if self.up.state == State::Open {
            match pump(cx, self.client, self.daemon, &mut self.up.bytes, &mut self.tap) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => self.up.state = State::Finished,
                Poll::Ready(Err(Fault::Read)) => return Poll::Ready(TunnelCause::ClientReset),
                // What the daemon said before it stopped reading is still to be delivered.
                Poll::Ready(Err(Fault::Write)) => self.up.state = State::Refused,
            }
            if self.up.state == State::Finished {
                first = first.or(Some(TunnelCause::ClientFinished));
            }
        }
        if self.down.state == State::Open {
            match pump(cx, self.daemon, self.client, &mut self.down.bytes, &mut None) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => self.down.state = State::Finished,
                Poll::Ready(Err(Fault::Read)) => return Poll::Ready(TunnelCause::DaemonReset),
                Poll::Ready(Err(Fault::Write)) => return Poll::Ready(TunnelCause::ClientReset),
            }
        }
        let cause = first.unwrap_or(TunnelCause::DaemonFinished);
        let over = match self.kind {
            TunnelKind::Raw => self.up.state != State::Open && self.down.state != State::Open,
            TunnelKind::H2 => self.up.state == State::Finished || self.down.state != State::Open,
        };
        if over { Poll::Ready(cause) } else { Poll::Pending }
    }
}

/// One direction, as far as it goes now. Ready when the end of `from` has been passed on.
fn pump(
    cx: &mut Context<'_>,
    from: &mut Side,
    to: &mut Side,
    count: &mut u64,
    tap: &mut Option<&mut dyn Tap>,
) -> Poll<Result<(), Fault>> {
    loop {
        if ready!(to.poll_flush(cx)).is_err() {
            return Poll::Ready(Err(Fault::Write));
        }
        let step = from.poll_input(cx, false, |cx, bytes| {
            *count += bytes.len() as u64;
            (bytes.len(), forward(cx, bytes, to, tap))
        });
        match ready!(step) {
            Err(_) => return Poll::Ready(Err(Fault::Read)),
            Ok(Some(Ok(()))) => {}
            Ok(Some(Err(_))) => return Poll::Ready(Err(Fault::Write)),
            Ok(None) => match tap.take().map(Tap::client_end) {
                Some(held) if !held.is_empty() => to.send_later(&held),
                _ => return to.poll_shutdown(cx).map_err(|_| Fault::Write),
            },
        }
    }
}

fn forward(
    cx: &mut Context<'_>,
    bytes: &[u8],
    to: &mut Side,
    tap: &mut Option<&mut dyn Tap>,
) -> io::Result<()> {
    let Some(look) = tap else { return to.send(cx, &[IoSlice::new(bytes)]) };
    let verdict = look.client_bytes(bytes);
    if verdict.done {
        *tap = None;
    }
    match verdict.replace {
        Some(other) if other.is_empty() => Ok(()),
        Some(other) => to.send(cx, &[IoSlice::new(&other)]),
        None => to.send(cx, &[IoSlice::new(bytes)]),
    }
}
