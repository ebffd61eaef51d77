//! One socket of an exchange, with what has been read from it and not yet consumed, and what has been accepted
//! for it and not yet written.
//!
//! No buffer belongs to a connection: bytes are read into a scratch buffer of the thread, inside one poll, and
//! written to the other side from there. Only a remainder (of a write that the kernel took half of, of a head
//! that is not complete) is kept in a `Vec`, which is dropped as soon as it is drained. So an idle stream
//! costs its task and two sockets.

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::guard::{Guard, Pace};
use super::head::{RequestHead, ResponseHead, Scanner};
use crate::error::Error;
use crate::provision::Stream;

/// The scratch buffer of each runtime thread.
const SCRATCH: usize = 128 * 1024;

thread_local! {
    static BUFFER: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// Lends the thread's scratch buffer. It is taken out, so that a nested use would only allocate another.
fn with_scratch<R>(f: impl FnOnce(&mut [u8]) -> R) -> R {
    let mut buffer = BUFFER.take().unwrap_or_else(|| vec![0; SCRATCH].into_boxed_slice());
    let result = f(&mut buffer);
    BUFFER.set(Some(buffer));
    result
}

/// Why there is no head.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The connection broke, or ended within a head (`UnexpectedEof`).
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is not a head that is taken; the client should be told so.
    #[error(transparent)]
    Bad(#[from] Error),
}

/// What can be seen of a peer without reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Nothing has happened.
    Open,
    /// It has sent FIN: it will send no more.
    Finished,
    /// It is gone altogether.
    Reset,
}

/// One connection of either kind.
#[derive(Debug)]
pub struct Side {
    /// None after [`Side::abort`] or [`Side::close`].
    stream: Option<Stream>,
    input: Vec<u8>,
    consumed: usize,
    output: Vec<u8>,
    written: usize,
    scanner: Scanner,
    eof: bool,
    fin_sent: bool,
    guard: Option<Arc<Guard>>,
}

impl Drop for Side {
    fn drop(&mut self) {
        self.unguard();
        self.farewell();
    }
}

impl Side {
    /// Takes a connected socket. TCP_NODELAY and keepalive are up to whoever opened it.
    pub fn new(stream: Stream) -> Self {
        Side {
            stream: Some(stream),
            input: Vec::new(),
            consumed: 0,
            output: Vec::new(),
            written: 0,
            scanner: Scanner::default(),
            eof: false,
            fin_sent: false,
            guard: None,
        }
    }

    /// Lets `guard` see the socket, and end it.
    pub fn guard(&mut self, guard: Arc<Guard>) {
        guard.set(self.fd());
        self.guard = Some(guard);
    }

    /// To be called before the socket is closed: its number may be another's at once.
    fn unguard(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.set(None);
        }
    }

    /// A request is about to be sent that the peer answers at this pace.
    pub fn ask(&self, pace: Pace) {
        if let Some(guard) = &self.guard {
            guard.ask(pace);
        }
    }

    /// Gives the socket away, and what had been read from it, for another protocol (TLS) to take over; the side is
    /// closed then.
    pub fn take_parts(&mut self) -> (Option<Stream>, Vec<u8>) {
        self.unguard();
        let unread = self.buffered().to_vec();
        (self.input, self.consumed) = (Vec::new(), 0);
        (self.stream.take(), unread)
    }

    /// Says that a TLS connection ends here, as far as the kernel takes that now: without it the peer would have to
    /// take the end for a break.
    fn farewell(&mut self) {
        if let Some(Stream::Tls(stream)) = &mut self.stream
            && !self.fin_sent
        {
            let mut cx = Context::from_waker(Waker::noop());
            let _ = Pin::new(stream).poll_shutdown(&mut cx);
        }
    }

    /// What has been read and not consumed.
    pub fn buffered(&self) -> &[u8] {
        &self.input[self.consumed..]
    }

    /// Drops the first `n` buffered bytes (a PROXY header, a preface).
    pub fn consume(&mut self, n: usize) {
        self.consumed += n;
        if self.consumed >= self.input.len() {
            (self.input, self.consumed) = (Vec::new(), 0);
        }
    }

    /// Puts bytes in front of what is read next.
    pub fn unread(&mut self, bytes: &[u8]) {
        let mut input = bytes.to_vec();
        input.extend_from_slice(self.buffered());
        (self.input, self.consumed) = (input, 0);
    }

    /// Whether the peer's FIN has been read.
    pub fn is_eof(&self) -> bool {
        self.eof
    }

    /// Whether [`Side::shutdown_write`] has been done.
    pub fn is_shut(&self) -> bool {
        self.fin_sent
    }

    /// Whether [`Side::abort`] or [`Side::close`] has been done.
    pub fn is_closed(&self) -> bool {
        self.stream.is_none()
    }

    /// Reads once and appends to what is buffered; 0 is the end. Cancel-safe.
    ///
    /// # Errors
    /// What the socket says.
    pub async fn fill(&mut self) -> io::Result<usize> {
        poll_fn(|cx| self.poll_fill(cx, SCRATCH)).await
    }

    /// Waits for at least `n` bytes, or the end, and shows what is buffered without consuming it. Cancel-safe.
    ///
    /// # Errors
    /// What the socket says.
    pub async fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        while self.buffered().len() < n && self.fill().await? > 0 {}
        Ok(self.buffered())
    }

    /// Waits for the next request head and consumes it; None if the client has closed instead. What follows
    /// it stays buffered. Cancel-safe: the caller sets the deadline.
    ///
    /// # Errors
    /// [`HeadError`]
    pub async fn read_head(&mut self) -> Result<Option<RequestHead>, HeadError> {
        poll_fn(|cx| self.poll_head(cx, |raw| RequestHead::parse(raw.to_vec()))).await
    }

    /// Waits for a response head and consumes it, for a caller that speaks to a daemon itself (an upgrade that
    /// the client has been promised already). What follows it stays buffered. Cancel-safe.
    ///
    /// # Errors
    /// [`HeadError`]; a daemon that closes instead is `UnexpectedEof`.
    pub async fn read_response(&mut self) -> Result<Vec<u8>, HeadError> {
        let checked = |raw: &[u8]| ResponseHead::parse(raw, false).map(|_| raw.to_vec());
        let head = poll_fn(|cx| self.poll_head(cx, checked)).await?;
        head.ok_or_else(|| HeadError::Io(io::ErrorKind::UnexpectedEof.into()))
    }

    fn poll_head<T>(
        &mut self,
        cx: &mut Context<'_>,
        parse: impl Fn(&[u8]) -> Result<T, Error>,
    ) -> Poll<Result<Option<T>, HeadError>> {
        let mut scanner = std::mem::take(&mut self.scanner);
        loop {
            // What is buffered may be pipelined: only bytes beyond the scanner's reach must be waited for.
            let more = self.buffered().len() <= scanner.reach();
            let step = self.poll_input(cx, more, |_, bytes| match scanner.scan(bytes) {
                Ok(Some((start, end))) => (end, Some(parse(&bytes[start..end]))),
                Ok(None) => (0, None),
                Err(error) => (0, Some(Err(error))),
            });
            match step {
                Poll::Ready(Ok(Some(Some(result)))) => return Poll::Ready(Ok(Some(result?))),
                Poll::Ready(Ok(Some(None))) => {}
                Poll::Ready(Ok(None)) if self.buffered().iter().all(|b| b"\r\n".contains(b)) => {
                    return Poll::Ready(Ok(None));
                }
                Poll::Ready(Ok(None)) => {
                    return Poll::Ready(Err(HeadError::Io(io::ErrorKind::UnexpectedEof.into())));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(HeadError::Io(error))),
                Poll::Pending => {
                    self.scanner = scanner;
                    return Poll::Pending;
                }
            }
        }
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// What the socket says.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        poll_fn(|cx| self.poll_flush(cx)).await?;
        poll_fn(|cx| Poll::Ready(self.send(cx, &[IoSlice::new(bytes)]))).await?;
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Whether the kernel has taken all that was accepted for the peer. Tries to write it, and does not wait.
    ///
    /// # Errors
    /// What the socket says.
    pub async fn is_flushed(&mut self) -> io::Result<bool> {
        poll_fn(|cx| match self.poll_flush(cx) {
            Poll::Ready(result) => Poll::Ready(result.map(|()| true)),
            Poll::Pending => Poll::Ready(Ok(false)),
        })
        .await
    }

    /// Writes as much as the kernel takes now, and keeps the rest in front of what is written next. Only to be
    /// called when [`Side::is_flushed`], which is what bounds the memory.
    ///
    /// # Errors
    /// What the socket says.
    pub async fn offer(&mut self, bytes: &[u8]) -> io::Result<()> {
        poll_fn(|cx| Poll::Ready(self.send(cx, &[IoSlice::new(bytes)]))).await
    }

    /// Writes what is pending, then FIN; the other direction stays open.
    ///
    /// # Errors
    /// What the socket says.
    pub async fn shutdown_write(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_shutdown(cx)).await
    }

    /// Closes both directions; what the kernel has accepted is still delivered.
    pub fn close(&mut self) {
        self.farewell();
        self.forget();
    }

    fn forget(&mut self) {
        self.unguard();
        self.stream = None;
        (self.input, self.consumed) = (Vec::new(), 0);
        (self.output, self.written) = (Vec::new(), 0);
    }

    /// Closes at once: the peer sees RST on TCP, a plain close on a Unix socket.
    pub fn abort(&mut self) {
        let socket = match &self.stream {
            Some(Stream::Tcp(stream)) => Some(stream),
            Some(Stream::Tls(stream)) => Some(stream.socket()),
            Some(Stream::Unix(_)) | None => None,
        };
        if let Some(socket) = socket {
            // Best effort: a socket that refuses the option is closed all the same.
            let _ = socket2::SockRef::from(socket).set_linger(Some(std::time::Duration::ZERO));
        }
        // No farewell: a broken stream must not look complete.
        self.forget();
    }

    /// Whether anything is left over that another message would trip on.
    pub(super) fn is_dirty(&self) -> bool {
        self.eof || self.fin_sent || self.stream.is_none() || !self.buffered().is_empty() || self.has_output()
    }

    /// Whether a kept connection cannot take another request: the peer has closed it, or sent bytes that
    /// nobody asked for. One system call, no waiting.
    pub fn is_dead(&self) -> bool {
        let Some(fd) = self.fd() else { return true };
        if self.is_dirty() {
            return true;
        }
        let mut byte = 0_u8;
        // SAFETY: `fd` is open as long as `self.stream` is, and `byte` is the one byte that recv may write.
        let n = unsafe { libc::recv(fd, (&raw mut byte).cast(), 1, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
        n >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock
    }

    /// What the kernel knows of the peer, although unread bytes may be in between. One system call.
    pub fn peer(&self) -> Peer {
        let Some(fd) = self.fd() else { return Peer::Reset };
        let mut poll = libc::pollfd { fd, events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one valid pollfd, and a zero timeout.
        unsafe { libc::poll(&raw mut poll, 1, 0) };
        match poll.revents {
            // Once we have sent FIN ourselves, the peer's FIN looks like this too.
            r if r & libc::POLLHUP != 0 && r & libc::POLLERR == 0 && self.fin_sent => Peer::Finished,
            r if r & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0 => Peer::Reset,
            r if r & libc::POLLRDHUP != 0 => Peer::Finished,
            _ => Peer::Open,
        }
    }

    fn fd(&self) -> Option<RawFd> {
        Some(match self.stream.as_ref()? {
            Stream::Tcp(stream) => stream.as_raw_fd(),
            Stream::Unix(stream) => stream.as_raw_fd(),
            Stream::Tls(stream) => stream.socket().as_raw_fd(),
        })
    }

    /// How many accepted bytes are waiting for the peer to read.
    pub(super) fn pending(&self) -> usize {
        self.output.len() - self.written
    }

    /// Whether there are any.
    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty() || matches!(&self.stream, Some(Stream::Tls(stream)) if stream.has_output())
    }

    /// Reads once, at most `max` bytes, and appends them to what is buffered; 0 is the end.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<io::Result<usize>> {
        if self.eof {
            return Poll::Ready(Ok(0));
        }
        with_scratch(|scratch| {
            let room = max.min(scratch.len());
            let n = ready!(self.poll_read(cx, &mut scratch[..room]))?;
            self.eof = n == 0;
            self.input.extend_from_slice(&scratch[..n]);
            Poll::Ready(Ok(n))
        })
    }

    /// Reads once and forgets what came; 0 is the end.
    pub(super) fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let read = ready!(self.poll_input(cx, false, |_, bytes| (bytes.len(), bytes.len())))?;
        Poll::Ready(Ok(read.unwrap_or(0)))
    }

    /// Shows the next bytes to `f`, which says how many it consumed; the others stay buffered. What is
    /// buffered is shown first; `more` asks for fresh bytes behind it. None is the end of the stream.
    pub(super) fn poll_input<R>(
        &mut self,
        cx: &mut Context<'_>,
        more: bool,
        f: impl FnOnce(&mut Context<'_>, &[u8]) -> (usize, R),
    ) -> Poll<io::Result<Option<R>>> {
        let buffered = !self.buffered().is_empty();
        if buffered && !more {
            let (used, result) = f(cx, &self.input[self.consumed..]);
            self.consume(used);
            return Poll::Ready(Ok(Some(result)));
        }
        if self.eof {
            return Poll::Ready(Ok(None));
        }
        with_scratch(|scratch| {
            let n = ready!(self.poll_read(cx, scratch))?;
            if n == 0 {
                self.eof = true;
                return Poll::Ready(Ok(None));
            }
            let fresh = &scratch[..n];
            let result = if buffered {
                self.input.extend_from_slice(fresh);
                let (used, result) = f(cx, &self.input[self.consumed..]);
                self.consume(used);
                result
            } else {
                let (used, result) = f(cx, fresh);
                self.input.extend_from_slice(&fresh[used..]);
                result
            };
            Poll::Ready(Ok(Some(result)))
        })
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(into);
        let result = match self.stream.as_mut() {
            Some(Stream::Tcp(stream)) => ready!(Pin::new(stream).poll_read(cx, &mut buf)),
            Some(Stream::Unix(stream)) => ready!(Pin::new(stream).poll_read(cx, &mut buf)),
            Some(Stream::Tls(stream)) => ready!(Pin::new(stream).poll_read(cx, &mut buf)),
            None => return Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        };
        let n = buf.filled().len();
        match &self.guard {
            Some(guard) if n > 0 => guard.answered(),
            // An end that was made from outside is not the peer's.
            Some(guard) if let Some(error) = guard.error() => return Poll::Ready(Err(error)),
            _ => {}
        }
        Poll::Ready(result.map(|()| n))
    }

    /// Writes as much as the kernel takes now and keeps the rest for [`Side::poll_flush`]. Only to be called
    /// without output pending; that is what bounds the memory.
    pub(super) fn send(&mut self, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> io::Result<()> {
        debug_assert!(self.output.is_empty());
        let mut taken = match self.poll_write(cx, parts) {
            Poll::Ready(result) => result?,
            Poll::Pending => 0,
        };
        for part in parts {
            let skip = taken.min(part.len());
            taken -= skip;
            self.output.extend_from_slice(&part[skip..]);
        }
        Ok(())
    }

    /// Keeps bytes behind what is pending.
    pub(super) fn send_later(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    /// Writes what is pending.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_empty() {
            let output = std::mem::take(&mut self.output);
            let result = self.poll_write(cx, &[IoSlice::new(&output[self.written..])]);
            self.output = output;
            self.written += ready!(result)?;
            if self.written == self.output.len() {
                (self.output, self.written) = (Vec::new(), 0);
            }
        }
        match &mut self.stream {
            // What it has encrypted is not with the kernel yet.
            Some(Stream::Tls(stream)) if stream.has_output() => Pin::new(stream).poll_flush(cx),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let n = match (self.stream.as_mut(), parts) {
            (Some(Stream::Tcp(stream)), [one]) => ready!(Pin::new(stream).poll_write(cx, one))?,
            (Some(Stream::Tcp(stream)), _) => ready!(Pin::new(stream).poll_write_vectored(cx, parts))?,
            (Some(Stream::Unix(stream)), [one]) => ready!(Pin::new(stream).poll_write(cx, one))?,
            (Some(Stream::Unix(stream)), _) => ready!(Pin::new(stream).poll_write_vectored(cx, parts))?,
            (Some(Stream::Tls(stream)), _) => ready!(Pin::new(stream).poll_write_vectored(cx, parts))?,
            (None, _) => return Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        };
        let empty = parts.iter().all(|part| part.is_empty());
        if n == 0 && !empty {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        if let Some(guard) = &self.guard {
            guard.sent();
        }
        Poll::Ready(Ok(n))
    }

    /// Writes what is pending, then FIN, once.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(cx))?;
        if !self.fin_sent {
            match self.stream.as_mut() {
                Some(Stream::Tcp(stream)) => ready!(Pin::new(stream).poll_shutdown(cx))?,
                Some(Stream::Unix(stream)) => ready!(Pin::new(stream).poll_shutdown(cx))?,
                // close_notify, then FIN.
                Some(Stream::Tls(stream)) => ready!(Pin::new(stream).poll_shutdown(cx))?,
                None => return Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
            }
            self.fin_sent = true;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::super::testing::{Ending, read_to_end, reset, say, soon, tcp, unix};
    use super::*;
    use crate::error::Kind;

    #[tokio::test]
    async fn a_head_of_a_mebibyte_comes_in_small_pieces() {
        let (mut near, mut far) = tcp().await;
        let mut head = b"POST /build?buildargs=".to_vec();
        head.resize((1 << 20) - 50, b'x');
        head.extend_from_slice(b" HTTP/1.1\r\nContent-Length: 4\r\n\r\n");
        let bytes = [&head[..], b"body"].concat();
        let writer = tokio::spawn(async move {
            for piece in bytes.chunks(100) {
                far.write_all(piece).await.unwrap();
            }
            far
        });
        let request = soon(near.read_head()).await.unwrap().unwrap();
        assert!(request.raw() == head);
        assert_eq!(soon(near.peek(4)).await.unwrap(), b"body");
        soon(writer).await.unwrap();
    }

    #[tokio::test]
    async fn a_head_may_come_byte_by_byte_and_waiting_for_it_may_be_cancelled() {
        let (mut near, mut far) = unix();
        let bytes = b"\r\nGET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\n\r\n";
        let mut targets = Vec::new();
        for byte in bytes {
            say(&mut far, [*byte]).await;
            tokio::select! {
                biased;
                head = near.read_head() => targets.push(head.unwrap().unwrap().target().to_string()),
                () = tokio::task::yield_now() => {}
            }
        }
        assert_eq!(targets, ["/1", "/2"]);
        assert_eq!(near.input.capacity() + near.output.capacity(), 0, "an idle side holds memory");
        drop(far);
        assert_eq!(near.read_head().await.unwrap(), None);
    }

    #[tokio::test]
    async fn two_heads_in_one_read_are_two_heads() {
        let (mut near, mut far) = tcp().await;
        say(&mut far, "GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\nGET /3 HT").await;
        far.shutdown().await.unwrap();
        for target in ["/1", "/2"] {
            assert_eq!(soon(near.read_head()).await.unwrap().unwrap().target(), target);
        }
        match soon(near.read_head()).await {
            Err(HeadError::Io(error)) => assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_head_that_is_not_taken_is_an_error_to_tell_the_client() {
        let huge = [b"GET /", &vec![b'a'; 2 << 20][..]].concat();
        for (bytes, kind) in [
            (&b"GET / HTTP/1.1\nHost: a\n\n"[..], Kind::BadRequest),
            (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", Kind::BadRequest),
            (&huge, Kind::HeadTooLarge),
        ] {
            let (mut near, mut far) = tcp().await;
            let bytes = bytes.to_vec();
            let writer = tokio::spawn(async move {
                let _ = far.write_all(&bytes).await;
                far
            });
            match soon(near.read_head()).await {
                Err(HeadError::Bad(error)) => assert_eq!(error.kind, kind),
                other => panic!("{other:?}"),
            }
            drop(near);
            soon(writer).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_connection_with_bytes_that_nobody_asked_for_is_dead() {
        let (near, mut far) = tcp().await;
        assert!(!near.is_dead());
        say(&mut far, "HTTP/1.1 408 Request Timeout\r\n\r\n").await;
        soon(async {
            while !near.is_dead() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    #[tokio::test]
    async fn the_peers_state_is_seen_behind_unread_bytes() {
        let (near, mut far) = tcp().await;
        say(&mut far, "unread").await;
        assert_eq!(near.peer(), Peer::Open);
        far.shutdown().await.unwrap();
        let seen = |wanted| {
            let near = &near;
            async move {
                while near.peer() != wanted {
                    tokio::task::yield_now().await;
                }
            }
        };
        soon(seen(Peer::Finished)).await;
        reset(far);
        soon(seen(Peer::Reset)).await;
    }

    #[tokio::test]
    async fn what_is_offered_to_a_peer_that_does_not_read_is_kept_and_waited_for_by_nobody() {
        let (mut near, mut far) = tcp().await;
        let mut offered = 0;
        soon(async {
            while near.is_flushed().await.unwrap() {
                near.offer(&[b'x'; 65_536]).await.unwrap();
                offered += 65_536;
            }
        })
        .await;
        assert!(near.pending() > 0, "the kernel has not taken it all");
        let reader = tokio::spawn(async move { read_to_end(&mut far).await.0.len() });
        soon(near.write_all(b"end")).await.unwrap();
        near.close();
        assert_eq!(soon(reader).await.unwrap(), offered + 3);
    }

    #[tokio::test]
    async fn an_abort_is_a_reset_and_a_close_is_not() {
        let ((mut a, mut far_a), (mut b, mut far_b), (mut c, mut far_c)) = (tcp().await, tcp().await, unix());
        a.abort();
        b.close();
        c.abort();
        assert_eq!(read_to_end(&mut far_a).await.1, Ending::Rst);
        assert_eq!(read_to_end(&mut far_b).await.1, Ending::Fin);
        assert_eq!(read_to_end(&mut far_c).await.1, Ending::Fin);
        assert!(a.is_closed() && a.is_dead() && a.fill().await.is_err());
    }

    #[tokio::test]
    async fn a_response_head_is_read_for_a_caller_of_its_own() {
        let (mut near, mut far) = unix();
        near.write_all(b"POST /grpc HTTP/1.1\r\n\r\n").await.unwrap();
        say(&mut far, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n\0\0").await;
        let raw = soon(near.read_response()).await.unwrap();
        assert_eq!(ResponseHead::parse(&raw, false).unwrap().status, 101);
        assert_eq!(near.buffered(), b"\0\0");
        near.consume(2);
        drop(far);
        assert!(matches!(near.read_response().await, Err(HeadError::Io(_))));
    }

    #[tokio::test]
    async fn unread_bytes_come_first() {
        let (mut near, mut far) = unix();
        say(&mut far, "cd").await;
        near.unread(b"ab");
        assert_eq!(soon(near.peek(4)).await.unwrap(), b"abcd");
        near.consume(3);
        assert_eq!(near.buffered(), b"d");
        assert_eq!(near.take_parts().1, b"d");
    }
}
