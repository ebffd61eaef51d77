//! The pool's own requests to a daemon: probes, lists, events. These are ordinary HTTP/1.1 calls, so hyper
//! makes them; clients' requests go through the relay.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::provision::{Endpoint, Stream};

/// A list of a busy daemon may be long, but not endless.
const MAX_BODY: usize = 64 << 20;

/// Why a call to a daemon failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection was refused, or the socket does not exist: nobody is there.
    #[error("cannot connect: {0}")]
    Refused(io::Error),
    /// No connection for another reason: the daemon's backlog is full, the proxy has no more descriptors.
    #[error("cannot connect: {0}")]
    Unconnected(io::Error),
    /// No answer within the deadline.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The connection broke, or what came is not HTTP.
    #[error("{0}")]
    Broken(String),
    /// An answer, but not a good one.
    #[error("{path} answered {status}")]
    Status {
        /// What was asked for.
        path: String,
        /// The status code.
        status: u16,
    },
    /// An answer that is not what this endpoint says.
    #[error("{path} answered something else: {error}")]
    Parse {
        /// What was asked for.
        path: String,
        /// What does not fit.
        error: String,
    },
}

/// hyper says what it did, and its causes say why that failed.
fn broken(error: hyper::Error) -> CallError {
    let causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
    CallError::Broken(causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}")))
}

/// One call on a connection of its own. The response's body is still to be read; the connection lives as long
/// as that.
///
/// # Errors
/// What connect or HTTP says; a bad status is no error here.
pub async fn call(
    endpoint: &Endpoint,
    method: Method,
    path: &str,
    body: Option<String>,
) -> Result<Response<Incoming>, CallError> {
    let kind = if body.is_some() { "application/json" } else { "" };
    send(endpoint, method, path, kind, body.unwrap_or_default().into()).await
}

/// The same with any body; `kind` is its Content-Type, empty without a body.
///
/// # Errors
/// As [`call`].
pub async fn send(
    endpoint: &Endpoint,
    method: Method,
    path: &str,
    kind: &'static str,
    body: Bytes,
) -> Result<Response<Incoming>, CallError> {
    let stream = endpoint.connect().await.map_err(|e| match e.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound | io::ErrorKind::ConnectionReset => {
            CallError::Refused(e)
        }
        _ => CallError::Unconnected(e),
    })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // Ends with the response's body, or when that is dropped.
    tokio::spawn(connection);
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "docker")
        .header(hyper::header::USER_AGENT, concat!("dindpool/", env!("CARGO_PKG_VERSION")));
    if !kind.is_empty() {
        request = request.header(hyper::header::CONTENT_TYPE, kind);
    }
    let request = request.body(Full::new(body)).map_err(|e| CallError::Broken(e.to_string()))?;
    sender.send_request(request).await.map_err(broken)
}

/// Status and body of a GET within `deadline`, whatever the status.
///
/// # Errors
/// What connect or HTTP says.
pub async fn answer(endpoint: &Endpoint, path: &str, deadline: Duration) -> Result<(u16, Bytes), CallError> {
    let answer = async {
        let response = call(endpoint, Method::GET, path, None).await?;
        let status = response.status().as_u16();
        let body = http_body_util::Limited::new(response.into_body(), MAX_BODY);
        let body = body.collect().await.map_err(|e| CallError::Broken(e.to_string()))?;
        Ok((status, body.to_bytes()))
    };
    tokio::time::timeout(deadline, answer).await.unwrap_or(Err(CallError::Timeout(deadline)))
}

/// Headers and body of a successful GET within `deadline`.
///
/// # Errors
/// Every way in which that can fail, a status other than 2xx among them.
pub async fn get(
    endpoint: &Endpoint,
    path: &str,
    deadline: Duration,
) -> Result<(hyper::HeaderMap, Bytes), CallError> {
    let answer = async {
        let response = call(endpoint, Method::GET, path, None).await?;
        let status = response.status();
        if !status.is_success() {
            return Err(CallError::Status { path: path.into(), status: status.as_u16() });
        }
        let headers = response.headers().clone();
        let body = http_body_util::Limited::new(response.into_body(), MAX_BODY);
        let body = body.collect().await.map_err(|e| CallError::Broken(e.to_string()))?;
        Ok((headers, body.to_bytes()))
    };
    tokio::time::timeout(deadline, answer).await.unwrap_or(Err(CallError::Timeout(deadline)))
}

/// The JSON of a successful GET within `deadline`.
///
/// # Errors
/// As [`get`], and when the body is not a `T`.
pub async fn json<T: DeserializeOwned>(
    endpoint: &Endpoint,
    path: &str,
    deadline: Duration,
) -> Result<T, CallError> {
    let (_, body) = get(endpoint, path, deadline).await?;
    serde_json::from_slice(&body).map_err(|e| CallError::Parse { path: path.into(), error: e.to_string() })
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Stream::Unix(s) => Pin::new(s).poll_read(cx, buf),
            Stream::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Stream::Unix(s) => Pin::new(s).poll_write(cx, buf),
            Stream::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(s) => Pin::new(s).poll_flush(cx),
            Stream::Unix(s) => Pin::new(s).poll_flush(cx),
            Stream::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Stream::Unix(s) => Pin::new(s).poll_shutdown(cx),
            Stream::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
