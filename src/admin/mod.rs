//! The admin listeners. Everybody may look:
//!
//! ```text
//! GET  /                           the status page
//! GET  /metrics /livez /readyz
//! GET  /status                     the pool now
//! GET  /sessions                   its sessions
//! GET  /sessions/KEY               why one is where it is; a part of its key will do
//! GET  /events?after=N&follow=1    what happened, as JSON lines; follow: and what happens from now on
//! GET  /live                       the page's own: the pool, again and again, as server-sent events
//! ```
//!
//! Changing takes the token, or the admin's Unix socket:
//!
//! ```text
//! GET  /operator                          whether that is given
//! POST /daemons/ID/cordon
//! POST /daemons/ID/uncordon
//! POST /daemons/ID/drain?deadline=10m     progress as JSON lines; goes on when its client leaves
//! GET  /daemons/ID/drain                  how far it is
//! ```
//!
//! Where there are several proxies, only the one that admits knows of daemons' work, and changes them; `/peer` and `/handover` are for the others, with the token that is in the Lease.

pub mod feed;
mod page;
pub mod prestop;
pub mod token;

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame};
use hyper::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, UPGRADE,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use percent_encoding::percent_decode_str;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::config::{MAX_DURATION, duration};
use crate::drain::Drain;
use crate::engine::model::{CordonedBy, DaemonId};
use crate::pool::Pool;
use crate::pool::cordon::{Progress, Unknown};
use crate::pool::peers;
use crate::provision::Stream;
use crate::proxy::Origin;
use crate::proxy::classify::parameter;
use crate::proxy::listener::Bound;
use feed::{Feed, Followed};
use token::Token;

/// How many connections the Unix listeners take at the same time, and as many those for TCP: nobody from outside
/// keeps the operator out. The descriptors kept back for them are counted in `proxy/limits.rs`.
const CONNECTIONS: usize = 16;

/// How many drains are followed at the same time. One that nobody follows goes on all the same.
const FOLLOWED: usize = 8;

/// How long a client may take to send its request: who says nothing takes the place of a probe.
const HEAD: Duration = Duration::from_secs(2);

/// How long it may take to send its request and to read the answer. A drain is followed as long as it takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A drain without a deadline of its own.
pub const DEADLINE: Duration = Duration::from_secs(600);

/// Between two log lines about wrong tokens.
const LOG_PAUSE: Duration = Duration::from_secs(5);

const CROWDED: &str = "the drain has begun and goes on, but too many clients follow one already: GET \
                       /daemons/ID/drain tells how far it is";

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const JSON_LINES: &str = "application/x-ndjson";

type Answer = Response<Either<Full<Bytes>, Lines>>;

/// What the admin listeners show and change.
pub struct Admin {
    /// The pool.
    pub pool: Arc<Pool>,
    /// Whether the proxy is shutting down.
    pub drain: Drain,
    /// Who may change the pool over TCP; nobody without one.
    pub token: RwLock<Option<Token>>,
    /// Who is a peer, where there are several proxies.
    pub peers: Option<Token>,
    /// For connections of the Unix listeners.
    local: Arc<Semaphore>,
    /// For those of the others.
    remote: Arc<Semaphore>,
    /// For those that follow a drain.
    followed: Arc<Semaphore>,
    /// For those who watch.
    feed: Feed,
    /// Wrong tokens since the last log line about them, and when that was.
    wrong: Mutex<(u64, Option<Instant>)>,
}

/// Marks an answer that lasts as long as what it tells of.
#[derive(Debug, Clone)]
struct Lasting {
    /// Whether it has a place of its own, so that its connection needs none.
    placed: bool,
    /// Cancelled when it has told all.
    over: CancellationToken,
}

/// Serves an admin listener until it is dropped.
pub async fn run(bound: Bound, admin: Arc<Admin>) {
    loop {
        let (stream, origin) = match bound.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("accept on the admin listener: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let room = match origin {
            Origin::Unix(..) => &admin.local,
            Origin::Tcp(..) => &admin.remote,
        };
        // Closed at once: a probe that finds no room is repeated, one that waits for it hangs.
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        tokio::spawn(visit(admin.clone(), stream, is_owner(origin), place));
    }
}

/// One connection, of one request: who keeps one open between two would take the place of others.
async fn visit(admin: Arc<Admin>, stream: Stream, trusted: bool, place: OwnedSemaphorePermit) {
    let (lasts, mut lasting) = oneshot::channel::<Lasting>();
    let lasts = Mutex::new(Some(lasts));
    let service = service_fn(move |mut request| {
        let response = match request.uri().path() {
            "/peer" | "/handover" => admin.peer(&mut request),
            _ => admin.answer(&request, trusted),
        };
        if let Some(answer) = response.extensions().get::<Lasting>()
            && let Some(lasts) = lasts.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            let _ = lasts.send(answer.clone());
        }
        async move { Ok::<_, Infallible>(response) }
    });
    let serve = hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut serve = pin!(serve);
    // A client that breaks off its own request is no fault of ours.
    let ends = tokio::time::sleep(PATIENCE);
    let lasting = tokio::select! {
        _ = serve.as_mut() => return,
        () = ends => return,
        Ok(lasting) = &mut lasting => lasting,
    };
    let place = Some(place).filter(|_| !lasting.placed);
    tokio::select! {
        _ = serve.as_mut() => {}
        // What is left of it is read now, or never.
        () = async { lasting.over.cancelled().await; tokio::time::sleep(PATIENCE).await } => {}
    }
    drop(place);
}

/// Whether the client is who runs the proxy, or root. The socket's file mode says the same, but only from the moment
/// after it was bound.
fn is_owner(origin: Origin) -> bool {
    match origin {
        Origin::Unix(_, uid) => uid == 0 || uid == nix::unistd::geteuid().as_raw(),
        Origin::Tcp(..) => false,
    }
}

impl Admin {
    /// The admin side of a pool, and of the proxy whose end `drain` tells.
    pub fn new(pool: Arc<Pool>, drain: Drain, token: Option<Token>) -> Self {
        let room = |size| Arc::new(Semaphore::new(size));
        let feed = Feed::new(pool.clone());
        Admin {
            pool,
            drain,
            token: RwLock::new(token),
            peers: None,
            local: room(CONNECTIONS),
            remote: room(CONNECTIONS),
            followed: room(FOLLOWED),
            feed,
            wrong: Mutex::default(),
        }
    }

    fn answer<B>(&self, request: &Request<B>, trusted: bool) -> Answer {
        // What this one says of work on a daemon would be wrong: it knows of none.
        if request.uri().path().starts_with("/daemons/") && !self.pool.admits() {
            let holder = self.pool.status().lease.and_then(|lease| lease.holder);
            let holder = holder.as_deref().unwrap_or("none at the moment");
            let why = format!("this proxy does not admit: ask the one that does ({holder})");
            let mut answer = message(StatusCode::SERVICE_UNAVAILABLE, &why);
            answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            return answer;
        }
        match *request.method() {
            Method::GET if request.uri().path() == "/operator" => match self.why_not(request, trusted) {
                None => reply(StatusCode::OK, JSON, "{}\n"),
                Some((status, why)) => message(status, why),
            },
            Method::GET | Method::HEAD => self.show(request),
            Method::POST => match self.why_not(request, trusted) {
                None => self.change(request),
                Some((status, why)) => message(status, why),
            },
            _ => message(StatusCode::METHOD_NOT_ALLOWED, "only GET, and POST for changes"),
        }
    }

    /// Another proxy: it asks this one, or takes over from it.
    fn peer<B>(&self, request: &mut Request<B>) -> Answer {
        let Some(token) = &self.peers else {
            return message(StatusCode::NOT_FOUND, "there is one proxy: this one");
        };
        if !request.headers().get(AUTHORIZATION).is_some_and(|given| token.is_proved_by(given.as_bytes())) {
            self.warn_of_wrong_token();
            return message(StatusCode::FORBIDDEN, "this needs the token that is in the Lease of this proxy");
        }
        let (admits, not_now) = (self.pool.admits(), StatusCode::CONFLICT);
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/handover") if admits => message(not_now, "this proxy admits"),
            (&Method::GET, "/handover") => match self.pool.handover().map(|h| serde_json::to_vec(&h)) {
                Some(Ok(json)) => reply(StatusCode::OK, JSON, json),
                Some(Err(error)) => message(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
                None => message(StatusCode::NOT_FOUND, "this proxy has never admitted"),
            },
            (&Method::POST, "/peer") if admits => {
                let (upgrade, pool) = (hyper::upgrade::on(request), self.pool.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = upgrade.await {
                        peers::serve(pool, TokioIo::new(stream)).await;
                    }
                });
                let mut response = reply(StatusCode::SWITCHING_PROTOCOLS, TEXT, "");
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
                response.headers_mut().insert(UPGRADE, HeaderValue::from_static("dindpool"));
                response
            }
            (&Method::POST, "/peer") => message(not_now, "this proxy does not admit"),
            _ => message(StatusCode::METHOD_NOT_ALLOWED, "POST /peer, GET /handover"),
        }
    }

    fn show<B>(&self, request: &Request<B>) -> Answer {
        match request.uri().path() {
            "/metrics" => {
                let text = self.pool.metrics().render(&self.pool.snapshot());
                reply(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
            }
            "/livez" => reply(StatusCode::OK, TEXT, "ok\n"),
            // Whoever sends clients here must stop before the listeners are gone for good.
            "/readyz" if self.drain.is_leaving() => {
                reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, "shutting down\n")
            }
            "/readyz" if self.pool.is_open() => reply(StatusCode::OK, TEXT, "ok\n"),
            "/readyz" => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, "no healthy daemon\n"),
            "/status" => match serde_json::to_string(&self.pool.status()) {
                Ok(json) => reply(StatusCode::OK, JSON, json),
                Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, error.to_string()),
            },
            "/sessions" => reply(StatusCode::OK, JSON, line(&self.pool.status().sessions)),
            "/events" => self.events(request),
            "/live" => match self.feed.watch() {
                Some(followed) => lasting(followed, "text/event-stream"),
                None => crowded(),
            },
            path if let Some(asset) = page::asset(path) => asset,
            path if let Some(part) = path.strip_prefix("/sessions/") => self.why(part),
            path => match target(path) {
                Some((daemon, "drain")) => match self.pool.drain_progress(&daemon) {
                    Progress::Gone => unknown(&self.pool.names()),
                    progress => reply(StatusCode::OK, JSON_LINES, line(&progress)),
                },
                _ => {
                    let there = "dindpool: / /metrics /livez /readyz /status /sessions /events\n";
                    reply(StatusCode::NOT_FOUND, TEXT, there)
                }
            },
        }
    }

    /// What happened, and with `follow=1` what happens from now on.
    fn events<B>(&self, request: &Request<B>) -> Answer {
        let given = |name| request.uri().query().and_then(|query| parameter(query, name));
        let after = match given("after").map(|n| n.parse()) {
            None => 0,
            Some(Ok(after)) => after,
            Some(Err(_)) => return message(StatusCode::BAD_REQUEST, "after: the number of an event"),
        };
        if *request.method() == Method::GET && given("follow").is_some_and(|follow| follow != "0") {
            return self.feed.events(after).map_or_else(crowded, |followed| lasting(followed, JSON_LINES));
        }
        let lines: String = self.pool.entries(after).iter().map(line).collect();
        reply(StatusCode::OK, JSON_LINES, lines)
    }

    /// Why a session is where it is. A key with a slash in it is percent-encoded or not: nothing follows it.
    fn why(&self, part: &str) -> Answer {
        let Ok(part) = percent_decode_str(part).decode_utf8() else {
            return message(StatusCode::BAD_REQUEST, "the session's key is no text");
        };
        match self.pool.why(&part) {
            Ok(why) => reply(StatusCode::OK, JSON, line(&why)),
            Err(none) if none.is_empty() => {
                let why = "no session of this key is bound, remembered or waits; GET /sessions lists those that are \
                           bound";
                message(StatusCode::NOT_FOUND, why)
            }
            Err(several) => {
                let why = format!("several sessions have that in their key: {}", several.join(", "));
                message(StatusCode::CONFLICT, &why)
            }
        }
    }

    /// Why a request may not change the pool.
    fn why_not<B>(&self, request: &Request<B>, trusted: bool) -> Option<(StatusCode, &'static str)> {
        if trusted {
            return None;
        }
        let token = self.token.read().unwrap_or_else(PoisonError::into_inner);
        let Some(token) = token.as_ref() else {
            let why = "this listener changes nothing: give dindpool an --admin-token-file, or a Unix socket to \
                       change it by (--admin unix:///path)";
            return Some((StatusCode::FORBIDDEN, why));
        };
        match request.headers().get(AUTHORIZATION) {
            None => {
                let why = "changing the pool needs its token: Authorization: Bearer TOKEN (dindpool's own \
                           commands read it from --token-file)";
                Some((StatusCode::UNAUTHORIZED, why))
            }
            Some(given) if token.is_proved_by(given.as_bytes()) => None,
            Some(_) => {
                self.warn_of_wrong_token();
                Some((StatusCode::FORBIDDEN, "this is not the pool's token"))
            }
        }
    }

    /// Once in a while: whoever guesses does not fill the log.
    fn warn_of_wrong_token(&self) {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        wrong.0 += 1;
        if wrong.1.is_none_or(|at| at.elapsed() >= LOG_PAUSE) {
            tracing::warn!(times = wrong.0, "a wrong token on the admin listener");
            *wrong = (0, Some(Instant::now()));
        }
    }

    fn change<B>(&self, request: &Request<B>) -> Answer {
        let by = CordonedBy::Operator;
        let done = match target(request.uri().path()) {
            Some((daemon, "cordon")) => self.pool.cordon(&daemon, by),
            Some((daemon, "uncordon")) => self.pool.uncordon(&daemon, by),
            Some((daemon, "drain")) => {
                let given = request.uri().query().and_then(|query| parameter(query, "deadline"));
                let within = given.as_deref().map_or(Some(DEADLINE), duration).filter(|d| *d <= MAX_DURATION);
                let Some(within) = within else {
                    return message(StatusCode::BAD_REQUEST, "deadline: no duration; use 30s, 10m or 2h");
                };
                match self.pool.drain(&daemon, within) {
                    Ok(()) => {
                        return match self.followed.clone().try_acquire_owned() {
                            Ok(place) => follow(self.pool.clone(), daemon, place),
                            Err(_) => message(StatusCode::SERVICE_UNAVAILABLE, CROWDED),
                        };
                    }
                    Err(unknown) => Err(unknown),
                }
            }
            _ => return message(StatusCode::NOT_FOUND, "POST /daemons/ID/cordon, /uncordon or /drain"),
        };
        match done {
            Ok(()) => reply(StatusCode::OK, JSON, "{}\n"),
            Err(Unknown(names)) => unknown(&names),
        }
    }
}

fn unknown(names: &[String]) -> Answer {
    let known = if names.is_empty() { "none".into() } else { names.join(", ") };
    message(StatusCode::NOT_FOUND, &format!("no such daemon; there are: {known}"))
}

/// `/daemons/ID/VERB`; an id with a slash in it is percent-encoded.
fn target(path: &str) -> Option<(DaemonId, &str)> {
    let (id, verb) = path.strip_prefix("/daemons/")?.rsplit_once('/')?;
    let id = percent_decode_str(id).decode_utf8().ok()?;
    Some((DaemonId::from(&*id), verb))
}

/// Tells how a drain goes, to its end or until the client leaves; the drain itself goes on.
fn follow(pool: Arc<Pool>, daemon: DaemonId, place: OwnedSemaphorePermit) -> Answer {
    let (lines, body) = mpsc::channel(1);
    let over = CancellationToken::new();
    let end = over.clone().drop_guard();
    tokio::spawn(async move {
        let _kept = (place, end);
        let mut told = None;
        loop {
            let progress = tokio::select! {
                progress = pool.drain_advances(&daemon, told.as_ref()) => progress,
                () = lines.closed() => return,
            };
            if lines.send(Bytes::from(line(&progress))).await.is_err() || progress.is_end() {
                return;
            }
            told = Some(progress);
        }
    });
    lines_of(body, JSON_LINES, Lasting { placed: false, over })
}

/// An answer that goes on for as long as somebody reads it.
fn lasting(followed: Followed, content_type: &'static str) -> Answer {
    let Followed { lines, over } = followed;
    lines_of(lines, content_type, Lasting { placed: true, over })
}

fn lines_of(lines: mpsc::Receiver<Bytes>, content_type: &'static str, lasting: Lasting) -> Answer {
    let mut response = Response::new(Either::Right(Lines(lines)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response.extensions_mut().insert(lasting);
    response
}

fn crowded() -> Answer {
    let mut answer =
        message(StatusCode::SERVICE_UNAVAILABLE, "too many watch already; GET /status tells the same");
    answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    answer
}

/// A body of lines that come when there is something to tell.
struct Lines(mpsc::Receiver<Bytes>);

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.get_mut().0.poll_recv(cx).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

fn line(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default() + "\n"
}

fn message(status: StatusCode, text: &str) -> Answer {
    reply(status, JSON, line(&serde_json::json!({ "message": text })))
}

fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Either::Left(Full::new(body.into())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    // No browser is to take JSON for a page.
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpStream, UnixStream};
    use tokio::time::timeout;

    use super::*;
    use crate::metrics::Metrics;
    use crate::proxy::listener::Address;

    fn admin() -> Admin {
        let metrics = Metrics::new(prometheus::Registry::new()).unwrap();
        Admin::new(Pool::new(crate::pool::Config::default(), metrics, 1), Drain::new(), None)
    }

    async fn ask(
        admin: &Admin,
        method: Method,
        path: &str,
        token: Option<&str>,
        trusted: bool,
    ) -> (u16, String) {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, token);
        }
        let response = admin.answer(&request.body(()).unwrap(), trusted);
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_proxy_that_stops_is_alive_and_not_ready() {
        let admin = admin();
        let get = async |path| ask(&admin, Method::GET, path, None, false).await;
        assert_eq!(get("/readyz").await.0, 503);
        admin.drain.leave();
        assert!(!admin.drain.is_stopping(), "whoever still comes is served");
        assert_eq!(get("/readyz").await, (503, "shutting down\n".into()));
        assert_eq!(get("/livez").await.0, 200);
        assert_eq!(get("/nothing").await.0, 404);
    }

    #[tokio::test]
    async fn who_holds_connections_keeps_neither_probes_nor_the_operator_out() {
        let admin = Arc::new(admin());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let tcp = Bound::admin(&"tcp://127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = tcp.address().trim_start_matches("tcp://").to_string();
        let unix = Bound::admin(&Address::Unix(path.clone())).await.unwrap();
        let listeners = [tokio::spawn(run(tcp, admin.clone())), tokio::spawn(run(unix, admin.clone()))];
        let request = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n";
        // One that would like to keep its connection gives its place back.
        let mut kept = Vec::new();
        for _ in 0..2 * CONNECTIONS {
            let mut client = TcpStream::connect(&address).await.unwrap();
            client.write_all(request).await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            kept.push(client);
        }
        // Those that say nothing hold theirs for a while, and the socket is another room.
        let mut silent = Vec::new();
        while admin.remote.available_permits() > 0 {
            silent.push(TcpStream::connect(&address).await.unwrap());
            tokio::task::yield_now().await;
        }
        let mut operator = UnixStream::connect(&path).await.unwrap();
        operator.write_all(request).await.unwrap();
        let mut answer = String::new();
        operator.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // Nor for long.
        let free = async {
            while admin.remote.available_permits() < CONNECTIONS {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(4 * HEAD, free).await.unwrap();
        listeners.into_iter().for_each(|l| l.abort());
    }

    #[test]
    fn the_socket_is_trusted_for_its_owner_and_root_only() {
        let own = nix::unistd::geteuid().as_raw();
        assert!(is_owner(Origin::Unix(None, own)) && is_owner(Origin::Unix(None, 0)));
        assert!(!is_owner(Origin::Unix(Some(1), own + 1)));
        let address = "127.0.0.1:1".parse().unwrap();
        assert!(!is_owner(Origin::Tcp(address, address)));
    }

    #[tokio::test]
    async fn who_may_change_the_pool_and_what_the_others_hear() {
        let admin = admin();
        let post =
            async |token, trusted| ask(&admin, Method::POST, "/daemons/d/cordon", token, trusted).await;
        let (status, text) = post(None, false).await;
        assert!(status == 403 && text.contains("--admin-token-file"), "{text}");
        let dir = tempfile::tempdir().unwrap();
        let token = Token::read_or_make(&dir.path().join("t")).unwrap();
        let bearer = token.bearer();
        *admin.token.write().unwrap() = Some(token);
        assert_eq!(post(None, false).await.0, 401);
        assert_eq!(post(Some("Bearer 0123456789abcdef0123"), false).await.0, 403);
        for (token, trusted) in [(Some(bearer.as_str()), false), (None, true)] {
            let (status, text) = post(token, trusted).await;
            assert!(status == 404 && text.contains("there are: none"), "{text}");
        }
    }
}
