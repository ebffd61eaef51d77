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

/// A TLS connection.
#[derive(Debug)]
pub struct TlsStream(tokio_rustls::TlsStream<Wire>);

impl From<tokio_rustls::server::TlsStream<Wire>> for TlsStream {
    fn from(stream: tokio_rustls::server::TlsStream<Wire>) -> Self {
        TlsStream(stream.into())
    }
}

impl From<tokio_rustls::client::TlsStream<Wire>> for TlsStream {
    fn from(stream: tokio_rustls::client::TlsStream<Wire>) -> Self {
        TlsStream(stream.into())
    }
}

impl TlsStream {
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
        Pin::new(&mut self.0).poll_read(cx, buf)
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
