//! The admin listener: `/metrics`, `/livez`, `/readyz`, `/status`. Nothing here changes anything.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::drain::Drain;
use crate::pool::Pool;

/// How many connections it takes at the same time; the descriptors kept back for them are counted in
/// `proxy/limits.rs`.
const CONNECTIONS: usize = 32;

/// Serves the admin listener until it is dropped.
pub async fn run(listener: TcpListener, pool: Arc<Pool>, drain: Drain) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("accept on the admin listener: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
        };
        // Closed at once: a probe that finds no room is repeated, one that waits for it hangs.
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        let (pool, drain) = (pool.clone(), drain.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&pool, &drain, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let _place = place;
            // A client that breaks off its own request is no fault of ours.
            let _ = hyper::server::conn::http1::Builder::new()
                // With it, a client that sends no head is dropped after hyper's 30 s.
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn answer<B>(pool: &Pool, drain: &Drain, request: &Request<B>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return reply(StatusCode::METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", "only GET\n");
    }
    match request.uri().path() {
        "/metrics" => {
            let text = pool.metrics().render(&pool.status());
            reply(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
        }
        "/livez" => reply(StatusCode::OK, "text/plain; charset=utf-8", "ok\n"),
        // Whoever sends clients here must stop before the listeners are gone for good.
        "/readyz" if drain.is_leaving() => {
            reply(StatusCode::SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", "shutting down\n")
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn a_proxy_that_stops_is_alive_and_not_ready() {
        let metrics = Metrics::new(prometheus::Registry::new()).unwrap();
        let (pool, drain) = (Pool::new(crate::pool::Config::default(), metrics, 1), Drain::new());
        let get = |path: &str| {
            let request = Request::get(path).body(()).unwrap();
            let response = answer(&pool, &drain, &request);
            (response.status().as_u16(), response.into_body())
        };
        assert_eq!(get("/readyz").0, 503);
        drain.leave();
        assert!(!drain.is_stopping(), "whoever still comes is served");
        let (status, body) = get("/readyz");
        let body = http_body_util::BodyExt::collect(body).await.unwrap().to_bytes();
        assert_eq!((status, &body[..]), (503, &b"shutting down\n"[..]));
        assert_eq!(get("/livez").0, 200);
        assert_eq!(get("/nothing").0, 404);
    }
}
