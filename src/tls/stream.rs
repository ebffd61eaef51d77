//! A TLS connection over TCP, whose socket can still be seen.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The socket under TLS, with what was read from it before anybody knew that it is TLS.
#[derive(Debug)]
pub struct Wire {
    stream: TcpStream,
    early: Vec<u8>,
}

impl Wire {
    /// `early` is read first.
    pub fn new(stream: TcpStream, early: Vec<u8>) -> Self {
        Wire { stream, early }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let n = self.early.len().min(buf.remaining());
        let rest = self.early.split_off(n);
        buf.put_slice(&self.early);
        self.early = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Says in words why a connection failed.
pub(super) type Explain = fn(io::Error) -> io::Error;

/// A TLS connection.
#[derive(Debug)]
pub struct TlsStream(tokio_rustls::TlsStream<Wire>, Explain);

impl From<tokio_rustls::server::TlsStream<Wire>> for TlsStream {
    fn from(stream: tokio_rustls::server::TlsStream<Wire>) -> Self {
        TlsStream(stream.into(), |error| error)
    }
}

impl TlsStream {
    /// One of a client. In TLS 1.3 its handshake is over before the server has looked at its certificate: what that
    /// thinks of it comes instead of the first answer.
    pub(super) fn of_client(stream: tokio_rustls::client::TlsStream<Wire>, explain: Explain) -> Self {
        TlsStream(stream.into(), explain)
    }

    /// The socket, to look at and to set options of.
    pub fn socket(&self) -> &TcpStream {
        &self.0.get_ref().0.stream
    }

    /// Whether something is encrypted that the kernel has not taken: a write that was accepted is not written yet.
    pub fn has_output(&self) -> bool {
        self.0.get_ref().1.wants_write()
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf).map_err(self.1)
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    /// close_notify, then FIN; the peer may go on writing.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
