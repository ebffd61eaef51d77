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
/// When the future is dropped early, both sides are aborted: a FIN would look like the stream's end to either of them.
pub async fn tunnel(
    client: &mut Side,
    daemon: &mut Side,
    kind: TunnelKind,
    tap: Option<&mut dyn Tap>,
) -> TunnelEnd {
    let (cause, up, down) = {
        let (up, down) = (Half::default(), Half::default());
        let mut duplex = Duplex { client, daemon, kind, tap, up, down, unfinished: true };
        let cause = poll_fn(|cx| duplex.poll(cx)).await;
        duplex.unfinished = false;
        (cause, std::mem::take(&mut duplex.up), std::mem::take(&mut duplex.down))
    };
    let end = TunnelEnd { cause, up: up.bytes, down: down.bytes };
    let unread = up.state == State::Refused;
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
    /// Neither direction's end is known yet.
    unfinished: bool,
}

impl Drop for Duplex<'_, '_> {
    fn drop(&mut self) {
        if self.unfinished {
            self.client.abort();
            self.daemon.abort();
        }
    }
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

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;

    use super::super::h2::{AckSwallower, PREFACE};
    use super::super::testing::{Ending, Far, read_to_end, read_until, reset, say, soon, tcp, tls, unix};
    use super::*;

    fn start(mut client: Side, mut daemon: Side, kind: TunnelKind) -> JoinHandle<TunnelEnd> {
        tokio::spawn(async move { tunnel(&mut client, &mut daemon, kind, None).await })
    }

    async fn world(kind: TunnelKind) -> (TcpStream, TcpStream, JoinHandle<TunnelEnd>) {
        let ((near_client, client), (near_daemon, daemon)) = (tcp().await, tcp().await);
        (client, daemon, start(near_client, near_daemon, kind))
    }

    #[tokio::test]
    async fn a_fin_of_the_client_closes_its_direction_only() {
        let (mut client, mut daemon, task) = world(TunnelKind::Raw).await;
        say(&mut client, "stdin").await;
        client.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut daemon).await, (b"stdin".to_vec(), Ending::Fin));
        say(&mut daemon, "output").await;
        read_until(&mut client, "output").await;
        drop(daemon);
        assert_eq!(read_to_end(&mut client).await.1, Ending::Fin);
        let end = soon(task).await.unwrap();
        assert_eq!(end, TunnelEnd { cause: TunnelCause::ClientFinished, up: 5, down: 6 });
    }

    #[tokio::test]
    async fn a_fin_of_the_daemon_closes_its_direction_only() {
        let (mut client, mut daemon, task) = world(TunnelKind::Raw).await;
        daemon.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut client).await.1, Ending::Fin);
        say(&mut client, "more").await;
        read_until(&mut daemon, "more").await;
        drop(client);
        assert_eq!(soon(task).await.unwrap().cause, TunnelCause::DaemonFinished);
    }

    #[tokio::test]
    async fn a_tunnel_that_is_dropped_ends_cleanly_for_nobody() {
        for kind in [TunnelKind::Raw, TunnelKind::H2] {
            let (mut client, mut daemon, task) = world(kind).await;
            say(&mut client, "half of a file").await;
            read_until(&mut daemon, "half of a file").await;
            task.abort();
            assert_eq!(read_to_end(&mut daemon).await.1, Ending::Rst);
            assert_eq!(read_to_end(&mut client).await.1, Ending::Rst);
        }
    }

    #[tokio::test]
    async fn a_reset_stays_a_reset() {
        for kind in [TunnelKind::Raw, TunnelKind::H2] {
            let (client, mut daemon, task) = world(kind).await;
            reset(client);
            assert_eq!(read_to_end(&mut daemon).await.1, Ending::Rst);
            assert_eq!(soon(task).await.unwrap().cause, TunnelCause::ClientReset);

            let (mut client, daemon, task) = world(kind).await;
            reset(daemon);
            assert_eq!(read_to_end(&mut client).await.1, Ending::Rst);
            assert_eq!(soon(task).await.unwrap().cause, TunnelCause::DaemonReset);
        }
    }

    #[tokio::test]
    async fn close_notify_closes_its_direction_only() {
        let ((near_client, mut client), (near_daemon, mut daemon)) = (tls().await, tcp().await);
        let task = start(near_client, near_daemon, TunnelKind::Raw);
        say(&mut client, "stdin").await;
        client.flush().await.unwrap();
        // As Go's CloseWrite: no FIN with it.
        client.get_mut().1.send_close_notify();
        client.flush().await.unwrap();
        assert_eq!(read_to_end(&mut daemon).await, (b"stdin".to_vec(), Ending::Fin));
        say(&mut daemon, "output").await;
        read_until(&mut client, "output").await;
        drop(daemon);
        assert_eq!(read_to_end(&mut client).await.1, Ending::Fin);
        let end = soon(task).await.unwrap();
        assert_eq!(end, TunnelEnd { cause: TunnelCause::ClientFinished, up: 5, down: 6 });
    }

    #[tokio::test]
    async fn tls_that_is_cut_is_a_break_and_no_end() {
        for with_reset in [false, true] {
            let ((near_client, client), (near_daemon, mut daemon)) = (tls().await, tcp().await);
            let task = start(near_client, near_daemon, TunnelKind::Raw);
            let (socket, _) = client.into_inner();
            if with_reset {
                reset(socket)
            } else {
                drop(socket)
            }
            assert_eq!(read_to_end(&mut daemon).await.1, Ending::Rst);
            assert_eq!(soon(task).await.unwrap().cause, TunnelCause::ClientReset);
        }
        // A daemon that breaks off is no clean end for the client either.
        let ((near_client, mut client), (near_daemon, daemon)) = (tls().await, tcp().await);
        let task = start(near_client, near_daemon, TunnelKind::Raw);
        reset(daemon);
        assert_eq!(read_to_end(&mut client).await.1, Ending::Rst);
        assert_eq!(soon(task).await.unwrap().cause, TunnelCause::DaemonReset);
    }

    #[tokio::test]
    async fn tls_ends_with_close_notify() {
        let ((near_client, mut client), (near_daemon, mut daemon)) = (tls().await, tls().await);
        let task = start(near_client, near_daemon, TunnelKind::H2);
        say(&mut daemon, "goaway").await;
        daemon.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut client).await, (b"goaway".to_vec(), Ending::Fin));
        drop(client);
        soon(task).await.unwrap();
        let (side, mut far) = tls().await;
        drop(side);
        assert_eq!(read_to_end(&mut far).await.1, Ending::Fin, "a side that is dropped says so");
    }

    #[tokio::test]
    async fn http2_ends_as_a_whole_after_what_was_sent() {
        let (mut client, mut daemon, task) = world(TunnelKind::H2).await;
        say(&mut client, "last").await;
        client.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut daemon).await, (b"last".to_vec(), Ending::Fin));
        assert_eq!(soon(task).await.unwrap().cause, TunnelCause::ClientFinished);
        assert_eq!(read_to_end(&mut client).await.1, Ending::Fin);

        let (mut client, mut daemon, task) = world(TunnelKind::H2).await;
        say(&mut daemon, "goaway").await;
        daemon.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut client).await, (b"goaway".to_vec(), Ending::Fin));
        drop(client);
        assert_eq!(soon(task).await.unwrap().cause, TunnelCause::DaemonFinished);
    }

    #[tokio::test]
    async fn output_arrives_although_the_daemon_takes_no_more_input() {
        let (client, mut daemon, task) = world(TunnelKind::Raw).await;
        let (mut reading, mut writing) = tokio::io::split(client);
        let stdin = tokio::spawn(async move { while writing.write_all(&[b'x'; 4096]).await.is_ok() {} });
        read_until(&mut daemon, "x").await;
        say(&mut daemon, "head of it").await;
        daemon.shutdown().await.unwrap();
        let mut seen = [0; 10];
        soon(tokio::io::AsyncReadExt::read_exact(&mut reading, &mut seen)).await.unwrap();
        assert_eq!(&seen, b"head of it");
        drop(daemon);
        soon(stdin).await.unwrap();
        soon(task).await.unwrap();
    }

    #[tokio::test]
    async fn what_came_before_the_tunnel_goes_first() {
        let ((mut near_client, mut client), (mut near_daemon, mut daemon)) = (tcp().await, unix());
        near_client.unread(b"held ");
        near_daemon.unread(b"early ");
        client.shutdown().await.unwrap();
        assert_eq!(near_client.fill().await.unwrap(), 0);
        let task = start(near_client, near_daemon, TunnelKind::Raw);
        assert_eq!(read_to_end(&mut daemon).await, (b"held ".to_vec(), Ending::Fin));
        say(&mut daemon, "late").await;
        drop(daemon);
        assert_eq!(read_to_end(&mut client).await, (b"early late".to_vec(), Ending::Fin));
        soon(task).await.unwrap();
    }

    #[tokio::test]
    async fn a_tap_sees_the_first_bytes_until_it_has_seen_enough() {
        struct First(Vec<u8>);
        impl Tap for First {
            fn client_bytes(&mut self, bytes: &[u8]) -> Verdict {
                self.0.extend_from_slice(bytes);
                if self.0.len() < 4 { Verdict::go_on() } else { Verdict::done() }
            }
        }
        let ((mut near_client, mut client), (mut near_daemon, mut daemon)) = (tcp().await, tcp().await);
        let task = tokio::spawn(async move {
            let mut tap = First(Vec::new());
            tunnel(&mut near_client, &mut near_daemon, TunnelKind::Raw, Some(&mut tap)).await;
            tap.0
        });
        for piece in ["ab", "cdef", "ghi"] {
            say(&mut client, piece).await;
            read_until(&mut daemon, piece).await;
        }
        drop((client, daemon));
        assert_eq!(soon(task).await.unwrap(), b"abcdef");
    }

    #[tokio::test]
    async fn one_acknowledgement_is_swallowed_on_the_way() {
        let ((mut near_client, mut client), (mut near_daemon, mut daemon)) = (tcp().await, tcp().await);
        let task = tokio::spawn(async move {
            let mut tap = AckSwallower::new();
            tunnel(&mut near_client, &mut near_daemon, TunnelKind::H2, Some(&mut tap)).await
        });
        let (ack, ping) = (b"\0\0\0\x04\x01\0\0\0\0", b"\0\0\x08\x06\0\0\0\0\x0012345678");
        say(&mut client, [&PREFACE[..], ack, ping, ack].concat()).await;
        client.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut daemon).await.0, [&PREFACE[..], ping, ack].concat());
        drop(daemon);
        soon(task).await.unwrap();
    }

    /// With TLS a write that is done may still be in the library: only the flush sends its end.
    async fn written(to: &mut (impl tokio::io::AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
        to.write_all(bytes).await?;
        to.flush().await
    }

    #[tokio::test]
    async fn much_data_arrives_whole_both_ways() {
        async fn run(client: impl Far, daemon: impl Far, task: JoinHandle<TunnelEnd>) {
            let bytes: Vec<u8> = (0..20_000_000_usize).map(|i| (i / 7) as u8).collect();
            let (mut client_in, mut client_out) = tokio::io::split(client);
            let (mut daemon_in, mut daemon_out) = tokio::io::split(daemon);
            let (mut up, mut down) = (vec![0; bytes.len()], vec![0; bytes.len()]);
            let all = async {
                tokio::join!(
                    written(&mut client_out, &bytes),
                    written(&mut daemon_out, &bytes),
                    tokio::io::AsyncReadExt::read_exact(&mut daemon_in, &mut up),
                    tokio::io::AsyncReadExt::read_exact(&mut client_in, &mut down),
                )
            };
            let (a, b, c, d) = soon(all).await;
            assert!(a.is_ok() && b.is_ok() && c.is_ok() && d.is_ok());
            assert!(up == bytes && down == bytes);
            drop((client_in, client_out, daemon_in, daemon_out));
            let end = soon(task).await.unwrap();
            assert_eq!((end.up, end.down), (20_000_000, 20_000_000));
        }
        let (client, daemon, task) = world(TunnelKind::Raw).await;
        run(client, daemon, task).await;
        let ((near_client, client), (near_daemon, daemon)) = (unix(), unix());
        run(client, daemon, start(near_client, near_daemon, TunnelKind::Raw)).await;
        let ((near_client, client), (near_daemon, daemon)) = (tls().await, tls().await);
        run(client, daemon, start(near_client, near_daemon, TunnelKind::Raw)).await;
    }

    #[test]
    fn the_future_is_small() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let ((mut client, _a), (mut daemon, _b)) = (unix(), unix());
        let size = size_of_val(&tunnel(&mut client, &mut daemon, TunnelKind::Raw, None));
        println!("tunnel {size}");
        assert!(size <= 384, "{size}");
    }
}
