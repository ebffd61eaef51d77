//! One request and its response, both directions at once, in the caller's task.
//!
//! Nothing here decides what a request means; it only sees to it that each side gets what the other one sent,
//! as soon as it was sent, and that an end on one side becomes the same kind of end on the other. The rules for
//! the ends are what the wire taught: a clean end of a broken stream makes `docker build` exit 0, a RST behind
//! an early answer eats it, and a client that was killed on a silent stream is only seen by reading from it.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Sleep, sleep, timeout};

use super::framing::Body;
use super::head::{Framing, RequestHead, ResponseHead, Scanner, fault};
use super::io::{Peer, Side};
use crate::error::{Error, Kind};

/// How long a daemon may stay silent after it was passed the client's FIN. dockerd cancels such a request and
/// closes within milliseconds; a dead client frees its connection within a second.
const AFTER_FIN: Duration = Duration::from_millis(900);
/// How often a client is looked at while it is not being read.
const LOOK: Duration = Duration::from_millis(250);
/// How many bytes are read ahead of the next request while a response is under way.
const PIPELINED: usize = 16 * 1024;
/// How many bytes behind a hijack's request are held until the daemon has answered.
const HELD: usize = 64 * 1024;
/// How long, and for how many bytes, a client may go on sending after it was told the end. The time is what
/// bounds it; a client that reads only after its upload gets its chance.
const DRAIN_TIME: Duration = Duration::from_secs(2);
const DRAIN_BYTES: usize = 64 * 1024 * 1024;

/// What the caller knows of the request's class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// attach, exec start, `/session`, `/grpc`: the response may end HTTP on this connection.
    pub hijack: bool,
    /// The client has been sent a chunked 200 already, because it had to wait: the daemon's head is swallowed, and
    /// a daemon that answers anything else ends the exchange with [`Outcome::Unanswered`].
    pub answered: bool,
}

/// What the caller wants to see of an exchange. Every method has an empty default.
pub trait Observer {
    /// A head of the daemon, interim ones included, just before it is forwarded.
    fn response_head(&mut self, _head: &ResponseHead<'_>) {}

    /// The next bytes of the request body, without chunk framing, just before they are forwarded.
    fn request_body(&mut self, _payload: &[u8]) {}

    /// The next bytes of the response body, without chunk framing, just before they are forwarded.
    fn response_body(&mut self, _payload: &[u8]) {}

    /// Why the exchange must end now, as if the daemon had failed with this error. Asked whenever the exchange is
    /// polled: whoever has a reason wakes it.
    fn cut(&mut self) -> Option<io::Error> {
        None
    }

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
    /// The client has been answered with a chunked 200 ahead of time, and the daemon's answer is another one:
    /// its head is still in `daemon` ([`Side::read_response`]). Tell the client within its stream, and drop both.
    Unanswered {
        /// The daemon's status.
        status: u16,
    },
    /// The client has gone; the daemon's connection has been aborted. Drop both.
    ClientGone,
    /// The client broke the protocol within its body; the daemon's connection has been aborted. If
    /// `answerable`, nothing of a final response has been sent: [`refuse`] the client with the error. Drop both.
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

/// Sends the request to the daemon and relays its response. `request` has been read from `client`; what
/// follows it is still there. No byte is held back, neither side is read while the other has not taken what
/// came before, and there is no timeout but the one that follows the client's FIN.
///
/// When the future is dropped early, both sides are aborted: a FIN could look like the end of a body to either of them.
pub async fn exchange(
    client: &mut Side,
    daemon: &mut Side,
    request: &RequestHead,
    options: Options,
    observer: &mut impl Observer,
) -> Exchange {
    let mut pump = Pump {
        client,
        daemon,
        request,
        observer,
        hijack: options.hijack,
        answered: options.answered,
        up: Up::Head,
        up_body: Body::new(request.framing),
        sent: 0,
        taken: 0,
        down: Down::Head,
        down_body: Body::new(Framing::None),
        scanner: Scanner::default(),
        status: None,
        keep_alive: request.keep_alive,
        received: 0,
        heard: false,
        timer: None,
        unfinished: true,
    };
    let end = poll_fn(|cx| pump.poll(cx)).await;
    pump.unfinished = false;
    let (status, received) = (pump.status, pump.received);
    let sent = pump.sent.saturating_sub(pump.daemon.pending() as u64);
    pump.timer = None;
    let outcome = match end {
        End::Done => pump.done().await,
        End::Upgraded => Outcome::Upgraded,
        End::Unanswered(status) => {
            pump.status = None;
            Outcome::Unanswered { status }
        }
        End::ClientGone => {
            pump.daemon.abort();
            Outcome::ClientGone
        }
        End::BadRequest(error) => {
            pump.daemon.abort();
            let answerable = pump.down == Down::Head;
            if !answerable {
                pump.break_client().await;
            }
            Outcome::BadRequest { error, answerable }
        }
        End::DaemonFailed(error) => pump.daemon_failed(error).await,
    };
    Exchange { outcome, status, sent, received }
}

/// Answers a request that will not be relayed (any further), so that the client can read the answer although
/// it may still be sending: answer, FIN, bounded drain; a RST would eat the answer. Drop the client then.
pub async fn refuse(client: &mut Side, response: &[u8]) {
    if let Ok(Ok(())) = timeout(DRAIN_TIME, client.write_all(response)).await {
        finish(client).await;
    }
}

/// Ends a connection whose peer may still be sending: what is pending, FIN, bounded drain.
pub(super) async fn finish(side: &mut Side) {
    if side.shutdown_write().await.is_err() {
        return;
    }
    let drain = async {
        let mut left = DRAIN_BYTES;
        while let Ok(n @ 1..) = poll_fn(|cx| side.poll_discard(cx)).await {
            left = left.saturating_sub(n);
            if left == 0 {
                break;
            }
        }
    };
    // Either way the connection is over now.
    let _ = timeout(DRAIN_TIME, drain).await;
}

/// The direction from the client to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Up {
    /// Nothing has been sent yet.
    Head,
    /// The body is being relayed.
    Body,
    /// The client is watched. What it sends now is kept, up to a bound, for the next request or the tunnel.
    Watch,
    /// It has sent FIN behind bytes that are kept for a tunnel: the FIN follows them.
    Held,
    /// It has sent FIN, which is to be passed on.
    Finishing,
    /// Its FIN has been passed on.
    Finished,
    /// The daemon takes no more; its response may still come.
    Refused,
}

/// The direction from the daemon to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Down {
    Head,
    Body,
    Done,
}

/// Why the pump stopped.
enum End {
    Done,
    Upgraded,
    Unanswered(u16),
    ClientGone,
    BadRequest(Error),
    DaemonFailed(io::Error),
}

/// What a piece of a response head brought.
enum HeadStep {
    More,
    Interim(usize),
    Final {
        status: u16,
        keep_alive: bool,
        body: Body,
        relayed: usize,
    },
    Upgraded {
        status: u16,
        relayed: usize,
    },
    /// Not the response that the client has been promised; it is still in the daemon's buffer.
    Unanswered(u16),
}

struct Pump<'a, O> {
    client: &'a mut Side,
    daemon: &'a mut Side,
    request: &'a RequestHead,
    observer: &'a mut O,
    hijack: bool,
    answered: bool,
    up: Up,
    up_body: Body,
    sent: u64,
    taken: u64,
    down: Down,
    down_body: Body,
    scanner: Scanner,
    status: Option<u16>,
    keep_alive: bool,
    received: u64,
    /// Whether the daemon has sent anything since the timer was set.
    heard: bool,
    timer: Option<Pin<Box<Sleep>>>,
    /// How it ends is not known yet.
    unfinished: bool,
}

impl<O> Drop for Pump<'_, O> {
    fn drop(&mut self) {
        if self.unfinished {
            self.client.abort();
            self.daemon.abort();
        }
    }
}

impl<O: Observer> Pump<'_, O> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        match self.try_poll(cx) {
            Ok(()) => Poll::Pending,
            Err(end) => Poll::Ready(end),
        }
    }

    fn try_poll(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        if let Some(error) = self.observer.cut() {
            return Err(End::DaemonFailed(error));
        }
        let mut watching = self.poll_up(cx)?;
        self.poll_down(cx)?;
        while self.poll_timer(cx, watching)? {
            watching = self.poll_up(cx)?;
        }
        Ok(())
    }

    /// Client to daemon. Says whether the client is being read, so that its end would be noticed.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        loop {
            if self.up != Up::Refused {
                match self.daemon.poll_flush(cx) {
                    Poll::Pending => return Ok(false),
                    Poll::Ready(Err(_)) => self.up = Up::Refused,
                    Poll::Ready(Ok(())) => {}
                }
            }
            match self.up {
                Up::Head => self.send_head(cx)?,
                Up::Body if self.up_body.is_complete() => self.up = Up::Watch,
                Up::Body => {
                    if self.relay_up(cx)?.is_pending() {
                        return Ok(true);
                    }
                }
                Up::Watch => {
                    let bound = if self.hijack { HELD } else { PIPELINED };
                    let room = bound.saturating_sub(self.client.buffered().len());
                    if room == 0 {
                        return Ok(false);
                    }
                    match self.client.poll_fill(cx, room) {
                        Poll::Pending => return Ok(true),
                        Poll::Ready(Ok(0)) => self.client_finished(),
                        Poll::Ready(Ok(_)) => {}
                        Poll::Ready(Err(_)) => return Err(End::ClientGone),
                    }
                }
                Up::Finishing => {
                    // A daemon that cannot be told has gone, which reading from it will show.
                    if self.daemon.poll_shutdown(cx).is_pending() {
                        return Ok(true);
                    }
                    self.up = Up::Finished;
                    (self.heard, self.timer) = (false, None);
                }
                Up::Finished => return Ok(true),
                Up::Held | Up::Refused => return Ok(false),
            }
        }
    }

    /// The head, and as much of the body as came with it, in one write.
    fn send_head(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        let (request, observer) = (self.request, &mut *self.observer);
        let show = |payload: &[u8]| observer.request_body(payload);
        let (n, error) = self.up_body.feed_good(self.client.buffered(), show);
        self.up = Up::Body;
        self.taken = n as u64;
        self.bad_body(error)?;
        let parts = [IoSlice::new(request.raw()), IoSlice::new(&self.client.buffered()[..n])];
        match self.daemon.send(cx, if n == 0 { &parts[..1] } else { &parts }) {
            Ok(()) => self.sent = (request.raw().len() + n) as u64,
            Err(_) => self.up = Up::Refused,
        }
        self.client.consume(n);
        Ok(())
    }

    fn relay_up(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, End> {
        let Pump { client, daemon, observer, up_body, hijack, .. } = self;
        let step = client.poll_input(cx, false, |cx, bytes| {
            let (n, error) = up_body.feed_good(bytes, |payload| observer.request_body(payload));
            let send = n > 0 && (error.is_none() || *hijack);
            let result = if send { daemon.send(cx, &[IoSlice::new(&bytes[..n])]) } else { Ok(()) };
            (n, (n as u64, result, error))
        });
        match step {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Err(_)) => return Err(End::ClientGone),
            Poll::Ready(Ok(None)) => self.up = Up::Finishing,
            Poll::Ready(Ok(Some((n, result, error)))) => {
                self.taken += n;
                self.bad_body(error)?;
                match result {
                    Ok(()) => self.sent += n,
                    Err(_) => self.up = Up::Refused,
                }
            }
        }
        Ok(Poll::Ready(()))
    }

    /// docker-modem may leave a chunked body unterminated and send raw stdin behind it: whether that is wrong
    /// is known when the daemon has answered, and until then it is held.
    fn bad_body(&mut self, error: Option<Error>) -> Result<(), End> {
        match error {
            None => {}
            Some(_) if self.hijack && self.taken > 0 => self.up = Up::Watch,
            Some(error) => return Err(End::BadRequest(error)),
        }
        Ok(())
    }

    fn client_finished(&mut self) {
        let held = self.hijack && !self.client.buffered().is_empty();
        self.up = if held { Up::Held } else { Up::Finishing };
    }

    /// Daemon to client.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        loop {
            match self.client.poll_flush(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Err(_)) => return Err(End::ClientGone),
                Poll::Ready(Ok(())) => {}
            }
            let step = match self.down {
                Down::Head => self.relay_head(cx)?,
                Down::Body if self.down_body.is_complete() => {
                    self.down = Down::Done;
                    continue;
                }
                Down::Body => self.relay_down(cx)?,
                Down::Done if self.request_is_over() => return Err(End::Done),
                // The response came early. The daemon goes on reading the body, or closes.
                Down::Done => match self.daemon.poll_fill(cx, 1) {
                    Poll::Pending => Poll::Pending,
                    Poll::Ready(_) => return Err(End::Done),
                },
            };
            if step.is_pending() {
                return Ok(());
            }
        }
    }

    fn request_is_over(&self) -> bool {
        match self.up {
            Up::Head | Up::Body => self.up_body.is_complete() && !self.daemon.has_output(),
            Up::Watch => !self.daemon.has_output(),
            Up::Held | Up::Finishing | Up::Finished | Up::Refused => true,
        }
    }

    fn relay_head(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, End> {
        let Pump { client, daemon, observer, scanner, request, .. } = self;
        let (hijack, upgrade, answered) = (self.hijack, request.upgrade, self.answered);
        let to_head = request.method() == "HEAD";
        let more = daemon.buffered().len() <= scanner.reach();
        let step = daemon.poll_input(cx, more, |cx, bytes| {
            let mut relay = || -> Result<(usize, HeadStep, io::Result<()>), Error> {
                let Some((start, end)) = scanner.scan(bytes)? else {
                    return Ok((0, HeadStep::More, Ok(())));
                };
                let head = ResponseHead::parse(&bytes[start..end], to_head)?;
                let ResponseHead { status, keep_alive, framing, .. } = head;
                if status == 101 && !(hijack || upgrade) {
                    return Err(unexpected_upgrade());
                }
                if head.is_interim() && answered {
                    return Ok((end, HeadStep::Interim(0), Ok(())));
                }
                if answered && !(status == 200 && framing == Framing::Chunked) {
                    return Ok((0, HeadStep::Unanswered(status), Ok(())));
                }
                if head.is_interim() {
                    observer.response_head(&head);
                    return Ok((end, HeadStep::Interim(end), client.send(cx, &[IoSlice::new(head.raw())])));
                }
                let bare = hijack && status == 200 && framing == Framing::UntilClose;
                if status == 101 || bare {
                    observer.response_head(&head);
                    let step = HeadStep::Upgraded { status, relayed: end };
                    return Ok((end, step, client.send(cx, &[IoSlice::new(head.raw())])));
                }
                let mut body = Body::new(framing);
                observer.response_head(&head);
                let n = body.feed(&bytes[end..], |payload| observer.response_body(payload))?;
                // A client that has been answered has a head already.
                let from = if answered { end } else { start };
                let result = client.send(cx, &[IoSlice::new(&bytes[from..end + n])]);
                let step = HeadStep::Final { status, keep_alive, body, relayed: end + n };
                Ok((end + n, step, result))
            };
            match relay() {
                Ok((used, step, result)) => (used, Ok((step, result))),
                Err(error) => (0, Err(error)),
            }
        });
        let (step, result) = match step {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Err(error)) => return Err(End::DaemonFailed(error)),
            Poll::Ready(Ok(None)) => return Err(End::DaemonFailed(eof("before its response"))),
            Poll::Ready(Ok(Some(Err(error)))) => return Err(End::DaemonFailed(invalid(error))),
            Poll::Ready(Ok(Some(Ok(step)))) => step,
        };
        self.heard = true;
        if !matches!(step, HeadStep::More) {
            self.scanner = Scanner::default();
        }
        let upgraded = matches!(step, HeadStep::Upgraded { .. });
        match step {
            HeadStep::More => {}
            HeadStep::Interim(relayed) => self.received += relayed as u64,
            HeadStep::Final { status, keep_alive, body, relayed } => {
                (self.down, self.down_body, self.status) = (Down::Body, body, Some(status));
                self.keep_alive &= keep_alive && !body.is_until_close();
                self.received += relayed as u64;
            }
            HeadStep::Upgraded { status, relayed } => {
                self.status = Some(status);
                self.received += relayed as u64;
            }
            HeadStep::Unanswered(status) => return Err(End::Unanswered(status)),
        }
        match result {
            Err(_) => Err(End::ClientGone),
            Ok(()) if upgraded => Err(End::Upgraded),
            Ok(()) => Ok(Poll::Ready(())),
        }
    }

    fn relay_down(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, End> {
        let Pump { client, daemon, observer, down_body, .. } = self;
        let step = daemon.poll_input(cx, false, |cx, bytes| {
            let (n, error) = down_body.feed_good(bytes, |payload| observer.response_body(payload));
            let result = if n > 0 { client.send(cx, &[IoSlice::new(&bytes[..n])]) } else { Ok(()) };
            (n, (n as u64, result, error))
        });
        match step {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Err(error)) => return Err(End::DaemonFailed(error)),
            // After a failed write the end may have been a reset, so only a body with an end of its own is
            // believed to be complete.
            Poll::Ready(Ok(None)) if self.down_body.is_until_close() && self.up != Up::Refused => {
                self.down = Down::Done;
            }
            Poll::Ready(Ok(None)) => return Err(End::DaemonFailed(eof("within its response"))),
            Poll::Ready(Ok(Some((n, result, error)))) => {
                self.heard = true;
                self.received += n;
                result.map_err(|_| End::ClientGone)?;
                if let Some(error) = error {
                    return Err(End::DaemonFailed(invalid(error)));
                }
            }
        }
        Ok(Poll::Ready(()))
    }

    /// After the client's FIN: the daemon has a while to say something. While the client is not being read:
    /// looks from time to time whether it is still there. True if there is something new for `poll_up`.
    fn poll_timer(&mut self, cx: &mut Context<'_>, watching: bool) -> Result<bool, End> {
        let span = match self.up {
            Up::Finished => AFTER_FIN,
            _ if watching => return Ok(false),
            _ => LOOK,
        };
        loop {
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(span)));
            if timer.as_mut().poll(cx).is_pending() {
                return Ok(false);
            }
            self.timer = None;
            if self.up == Up::Finished {
                // A client that is slow to read is alive.
                if !self.heard && !self.client.has_output() {
                    return Err(End::ClientGone);
                }
                self.heard = false;
                continue;
            }
            match self.client.peer() {
                Peer::Reset => return Err(End::ClientGone),
                Peer::Finished if self.up == Up::Watch && !self.hijack && !self.daemon.has_output() => {
                    self.up = Up::Finishing;
                    return Ok(true);
                }
                Peer::Finished | Peer::Open => {}
            }
        }
    }

    async fn done(&mut self) -> Outcome {
        let complete = self.up_body.is_complete() && self.up != Up::Refused;
        // A refused upgrade with bytes behind it: nobody knows what they were meant to be.
        let stray = self.hijack && !self.client.buffered().is_empty();
        let keep_client = self.keep_alive && complete && !stray && !self.client.is_eof();
        let keep_daemon = keep_client && !self.daemon.is_dirty();
        if !keep_client {
            self.daemon.close();
            // An unread byte would turn our close into a RST, which eats the response.
            if !self.client.is_eof() && (!complete || !self.client.buffered().is_empty()) {
                Box::pin(finish(self.client)).await;
            }
        }
        Outcome::Done { keep_client, keep_daemon }
    }

    async fn daemon_failed(&mut self, error: io::Error) -> Outcome {
        let before_response = self.down == Down::Head;
        let daemon_spoke = self.received > 0 || !self.daemon.buffered().is_empty();
        self.daemon.abort();
        if !before_response {
            if self.down_body.at_chunk_boundary()
                && let Some(line) = self.observer.broken_stream(&error)
            {
                self.client.send_later(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes());
            }
            self.break_client().await;
        }
        Outcome::DaemonFailed(DaemonFailure { error, before_response, daemon_spoke, body_taken: self.taken })
    }

    /// Ends the client's connection so that what it has received arrives, but is not taken for complete: a
    /// FIN does that where the framing shows what is missing; where it would look like the end, a RST.
    async fn break_client(&mut self) {
        if self.down == Down::Body && self.down_body.is_until_close() {
            self.client.abort();
        } else {
            Box::pin(finish(self.client)).await;
        }
    }
}

fn eof(place: &str) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the daemon closed the connection {place}"))
}

fn invalid(error: Error) -> io::Error {
    let message = if error.kind == Kind::BadRequest { fault(&error.message).message } else { error.message };
    io::Error::new(io::ErrorKind::InvalidData, message)
}

fn unexpected_upgrade() -> Error {
    Error::new(Kind::DaemonUnreachable, "the daemon switched protocols unasked")
}

#[cfg(test)]
mod tests;
