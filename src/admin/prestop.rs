//! Answers the preStop hooks of daemons' pods (`deploy/prestop.sh`), on a listener of its own: pods need not reach the
//! admin listener, and hooks that wait take no place there.
//!
//! ```text
//! GET /drained/DAEMON      200 it may end · 409 it is busy, ask again · 503 not known yet · 404 no daemon of this pool
//! ```
//!
//! A question waits for the end of the work, [`WAIT`] at the longest. It says nothing but that one bit, takes no new
//! sessions to the daemon while it is asked, and needs the token of the hooks.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use percent_encoding::percent_decode_str;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::token::Token;
use crate::engine::departure::Departure;
use crate::engine::model::{DaemonId, Remaining};
use crate::pool::Pool;
use crate::provision::Stream;
use crate::proxy::listener::Bound;

/// How long one question waits. The hook gives up after twice this, and asks again.
const WAIT: Duration = Duration::from_secs(20);
/// How long a hook may take to send its question.
const HEAD: Duration = Duration::from_secs(5);
/// How many hooks wait at the same time; further ones try again. Their descriptors are among those that are kept back
/// for each daemon (`proxy/limits.rs`).
const HOOKS: usize = 256;
/// Between two log lines about wrong tokens.
const LOG_PAUSE: Duration = Duration::from_secs(60);

/// What the listener of the hooks answers from.
pub struct Prestop {
    /// The pool.
    pub pool: Arc<Pool>,
    /// What the hooks know.
    pub token: RwLock<Option<Token>>,
    room: Arc<Semaphore>,
    warned: Mutex<Option<Instant>>,
}

/// Serves the listener until it is dropped.
pub async fn run(bound: Bound, prestop: Arc<Prestop>) {
    loop {
        let stream = match bound.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("accept on the listener of preStop hooks: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = prestop.room.clone().try_acquire_owned() else { continue };
        let prestop = prestop.clone();
        tokio::spawn(async move {
            let _place = place;
            visit(prestop, stream).await;
        });
    }
}

async fn visit(prestop: Arc<Prestop>, stream: Stream) {
    let service = service_fn(|request| {
        let prestop = prestop.clone();
        async move { Ok::<_, Infallible>(prestop.answer(&request, WAIT).await) }
    });
    let serve = hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), service);
    let _ = timeout(WAIT + 2 * HEAD, serve).await;
}

impl Prestop {
    /// What is asked of this pool, by those who know the token.
    pub fn new(pool: Arc<Pool>, token: Option<Token>) -> Self {
        Prestop {
            pool,
            token: RwLock::new(token),
            room: Arc::new(Semaphore::new(HOOKS)),
            warned: Mutex::default(),
        }
    }

    async fn answer<B>(&self, request: &Request<B>, wait: Duration) -> Response<Full<Bytes>> {
        let outcome = self.outcome(request, wait).await;
        let (word, status, text) = outcome;
        self.pool.metrics().prestops.with_label_values(&[word]).inc();
        let mut response = Response::new(Full::new(Bytes::from(text + "\n")));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    }

    async fn outcome<B>(&self, request: &Request<B>, wait: Duration) -> (&'static str, StatusCode, String) {
        let refused = |status, text: &str| ("refused", status, text.to_string());
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return refused(StatusCode::METHOD_NOT_ALLOWED, "only GET");
        }
        let Some(daemon) = daemon(request.uri().path()) else {
            return refused(StatusCode::NOT_FOUND, "GET /drained/DAEMON");
        };
        if !self.knows(request) {
            self.warn_of_wrong_token();
            return refused(StatusCode::FORBIDDEN, "this is not the token of the pool's preStop hooks");
        }
        if !self.pool.admits() {
            let text = "another proxy knows what runs there".to_string();
            return ("unknown", StatusCode::SERVICE_UNAVAILABLE, text);
        }
        match self.pool.departs(&daemon, wait).await {
            Departure::LetGo | Departure::Idle => ("drained", StatusCode::OK, "drained".into()),
            Departure::Busy(work) => ("busy", StatusCode::CONFLICT, busy(&work)),
            Departure::Unlisted => {
                ("unknown", StatusCode::SERVICE_UNAVAILABLE, "what runs there is not known yet".into())
            }
            Departure::Unknown => ("unknown", StatusCode::NOT_FOUND, "no such daemon in this pool".into()),
        }
    }

    fn knows<B>(&self, request: &Request<B>) -> bool {
        let token = self.token.read().unwrap_or_else(PoisonError::into_inner);
        let given = request.headers().get(AUTHORIZATION);
        token.as_ref().zip(given).is_some_and(|(token, given)| token.is_proved_by(given.as_bytes()))
    }

    fn warn_of_wrong_token(&self) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= LOG_PAUSE) {
            tracing::warn!("a preStop hook came with a wrong token, or none: it goes by its own eyes");
            *warned = Some(Instant::now());
        }
    }
}

/// How much there is, and nothing of whose it is.
fn busy(work: &[Remaining]) -> String {
    let builds: u32 = work.iter().map(|w| w.builds).sum();
    let open: u32 = work.iter().map(|w| w.open).sum();
    let containers: usize = work.iter().map(|w| w.containers.len()).sum();
    let waiting: u32 = work.iter().map(|w| w.waiting).sum();
    format!("busy: {builds} builds, {open} requests, {containers} containers, {waiting} waiting")
}

/// `/drained/DAEMON`
fn daemon(path: &str) -> Option<DaemonId> {
    let id = path.strip_prefix("/drained/").filter(|id| !id.is_empty())?;
    let id = percent_decode_str(id).decode_utf8().ok()?;
    Some(DaemonId::from(&*id))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::metrics::Metrics;

    const TOKEN: &str = "0123456789abcdef";

    fn prestop() -> Prestop {
        let metrics = Metrics::new(prometheus::Registry::new()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, TOKEN).unwrap();
        let pool = Pool::new(crate::pool::Config::default(), metrics, 1);
        Prestop::new(pool, Some(Token::read(&path).unwrap()))
    }

    async fn ask(prestop: &Prestop, method: Method, path: &str, token: &str) -> (u16, String) {
        let request = Request::builder().method(method).uri(path).header(AUTHORIZATION, token);
        let response = prestop.answer(&request.body(()).unwrap(), Duration::ZERO).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn only_who_knows_the_token_is_told_anything() {
        let prestop = prestop();
        for token in ["", "Bearer ", "Bearer 0123456789abcdeX", TOKEN] {
            assert_eq!(ask(&prestop, Method::GET, "/drained/a", token).await.0, 403, "{token}");
        }
        let right = format!("Bearer {TOKEN}");
        assert_eq!(ask(&prestop, Method::GET, "/drained/a", &right).await.0, 404);
        for path in ["/", "/drained/", "/drained", "/status"] {
            assert_eq!(ask(&prestop, Method::GET, path, &right).await.0, 404, "{path}");
        }
        assert_eq!(ask(&prestop, Method::POST, "/drained/a", &right).await.0, 405);
        *prestop.token.write().unwrap() = None;
        assert_eq!(ask(&prestop, Method::GET, "/drained/a", &right).await.0, 403, "nobody knows no token");
    }

    #[test]
    fn the_answer_names_nobody() {
        let work = Remaining {
            key: Some("secret".into()),
            open: 2,
            builds: 1,
            containers: vec!["db".into()],
            waiting: 0,
        };
        assert_eq!(busy(&[work]), "busy: 1 builds, 2 requests, 1 containers, 0 waiting");
    }
}
