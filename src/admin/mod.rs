//! The admin listener: `/metrics`, `/livez`, `/readyz`, `/status`. Nothing here changes anything.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::pool::Pool;

/// Serves the admin listener until it is dropped.
pub async fn run(listener: TcpListener, pool: Arc<Pool>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("accept on the admin listener: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
        };
        let pool = pool.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&pool, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            // A client that breaks off its own request is no fault of ours.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn answer(pool: &Pool, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return reply(StatusCode::METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", "only GET\n");
    }
    match request.uri().path() {
        "/metrics" => {
            let text = pool.metrics().render(&pool.status());
            reply(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
        }
        "/livez" => reply(StatusCode::OK, "text/plain; charset=utf-8", "ok\n"),
        "/readyz" if pool.is_ready() => reply(StatusCode::OK, "text/plain; charset=utf-8", "ok\n"),
        "/readyz" => {
            reply(StatusCode::SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", "no healthy daemon\n")
        }
        "/status" => match serde_json::to_string(&pool.status()) {
            Ok(json) => reply(StatusCode::OK, "application/json", json),
            Err(error) => {
                reply(StatusCode::INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", error.to_string())
            }
        },
        _ => reply(
            StatusCode::NOT_FOUND,
            "text/plain; charset=utf-8",
            "dindpool: /metrics /livez /readyz /status\n",
        ),
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
