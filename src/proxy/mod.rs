//! The data path. One request, from top to bottom:
//!
//! ```text
//! accept → first bytes: PROXY header? TLS? HTTP/2 preface? → HTTP/1 head
//!   → classify   what it is, from method and path
//!   → identify   whose it is, from connection and head
//!   → local?     /_ping, /version, the 101 of /grpc are answered here
//!   → acquire    admit, pick, bind, in one place; returns a Lease guard
//!   → connect    tried elsewhere only while no byte has reached a daemon and the session is unbound
//!   → exchange   both ways, each by its framing; or tunnel, raw both ways
//!   → the guard's drop records the outcome and gives the slot back
//! ```

mod attempts;
pub(crate) mod body;
pub mod cancel;
pub mod classify;
mod greet;
pub mod identify;
#[cfg(test)]
mod isolation;
pub(crate) mod learn;
pub mod limits;
pub mod listener;
pub(crate) mod local;
pub mod peer;
mod record;
pub mod relay;
pub mod session;
pub mod sniff;
pub(crate) mod solve;
pub mod sweep;
mod wait;

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::time::{Sleep, sleep, timeout};

use self::attempts::{Attempts, Next as Attempt};
use self::cancel::WaitingBuilds;
use self::classify::{Learn, Local, Peek, Prefix, Route, classify};
use self::identify::{HEADER, Identity, ListenerIdentity, PROJECT, Source, identify};
use self::learn::{Named, Reader, Watcher};
use self::limits::{Gate, Pass};
use self::listener::Entry;
use self::peer::Peers;
use self::record::{Record, TRACEPARENT};
use self::relay::h2::PREFACE;
use self::relay::{
    Framing, HeadError, Options, Peer, Refusal, RequestHead, ResponseHead, Side, TunnelCause, TunnelKind,
    Version, exchange, refuse, tunnel,
};
use self::solve::SolveTap;
use self::sweep::Sweeper;
use self::wait::{Manner, Told, chunk, wait};
use crate::drain::Drain;
use crate::engine::model::{
    Class, DaemonId, Kind as ObjectKind, ObjectRef, Outcome, Requirements, SessionKey, Tenant, Work,
};
use crate::error::{Error, Kind};
use crate::metrics::{Counted, Metrics};
use crate::pool::{Handle, Lease, Pool, Tally, Want};
use crate::provision::Stream;

/// The largest create body that is read ahead. dockerd has no limit of its own; compose's are a few kilobytes.
const MAX_PEEK: usize = 4 << 20;
/// How long the first request of a client is waited for that has connected just before the proxy stops.
const NEWCOMER: Duration = Duration::from_secs(1);
/// How long a BuildKit client that was refused may keep its connection: it makes all its calls at once.
const REFUSED: Duration = Duration::from_secs(60);
/// How long a daemon that refuses a request may take to say why.
const SAYING: Duration = Duration::from_secs(2);
/// How long a daemon may take for the 101 of `/grpc`: then the client gives up anyway.
const UPGRADE: Duration = Duration::from_secs(20);

/// What all connections share.
pub struct Proxy {
    /// Where daemons come from.
    pub pool: Arc<Pool>,
    /// Recognises processes on this machine.
    pub peers: Arc<Peers>,
    /// Builds that wait and can be cancelled.
    pub waiting: WaitingBuilds,
    /// Counts connections and tells them to end.
    pub drain: Drain,
    /// How many clients there may be.
    pub gate: Arc<Gate>,
    /// Looks at all open sockets.
    pub sweeper: Sweeper,
    /// How long a client may take for a request's head.
    pub head_deadline: Duration,
    /// What is counted.
    pub metrics: Metrics,
}

/// Where a client comes from, before anybody has looked closer.
#[derive(Debug, Clone, Copy)]
pub enum Origin {
    /// Over TCP: the client's and our own address.
    Tcp(SocketAddr, SocketAddr),
    /// Over a Unix socket: the peer's credentials at the time of connect(2).
    Unix(Option<i32>, u32),
}

/// One client connection.
struct Connection {
    proxy: Arc<Proxy>,
    listener: Arc<ListenerIdentity>,
    client: Side,
    origin: Origin,
    source: Option<Source>,
    /// The daemon in a container of which the client's process runs, once that has been looked at.
    parent: OnceLock<Option<DaemonId>>,
    /// The daemon connection of the last exchange, if it may carry another.
    kept: Option<(Arc<Handle>, Side)>,
    /// A response or a tunnel is under way.
    streaming: bool,
    /// The number of the request that is served.
    number: Option<u64>,
}

impl Drop for Connection {
    /// Cut within a stream, by the end of the grace or by a panic: a FIN could look like the stream's end.
    fn drop(&mut self) {
        if self.streaming {
            self.client.abort();
        }
    }
}

/// A request that has its daemon.
struct Admitted {
    head: RequestHead,
    route: Route,
    who: Who,
    named: Named,
    lease: Lease,
    daemon: Side,
    told: Told,
    record: Record,
}

/// Whose request it is, for the log. All else that was wanted of the pool is forgotten once it was given.
struct Who {
    key: SessionKey,
    tenant: Tenant,
}

impl From<Want> for Who {
    fn from(want: Want) -> Self {
        Who { key: want.key, tenant: want.tenant }
    }
}

/// What becomes of the client's connection after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Request,
    Close,
}

/// Serves one client connection to its end.
pub async fn serve(proxy: Arc<Proxy>, entry: Arc<Entry>, stream: Stream, origin: Origin, pass: &mut Pass) {
    let mut client = Side::new(stream);
    if matches!(origin, Origin::Tcp(..)) {
        client.guard(proxy.sweeper.watch(None));
    }
    let mut connection = Connection::new(proxy, entry.identity.clone(), client, origin);
    // Its timer is not held any longer than that.
    if Box::pin(connection.greet(&entry, pass)).await == Next::Close {
        return;
    }
    drop(entry);
    while connection.next_request().await == Next::Request {}
}

impl Connection {
    fn new(proxy: Arc<Proxy>, listener: Arc<ListenerIdentity>, client: Side, origin: Origin) -> Self {
        Connection {
            proxy,
            listener,
            client,
            origin,
            source: None,
            parent: OnceLock::new(),
            kept: None,
            streaming: false,
            number: None,
        }
    }

    async fn next_request(&mut self) -> Next {
        self.number = None;
        let Some(head) = self.head().await else { return Next::Close };
        match head {
            Ok(Some(head)) => {
                let next = self.request(head).await;
                if self.proxy.drain.is_stopping() { Next::Close } else { next }
            }
            Ok(None) | Err(HeadError::Io(_)) => Next::Close,
            Err(HeadError::Bad(error)) => self.refuse(&error, false).await,
        }
    }

    /// The next request's head; None if the proxy stops before it has begun. A client that has begun a request may
    /// end it, within the deadline. There is no timer for one that has not: thousands of connections are idle.
    async fn head(&mut self) -> Option<Result<Option<RequestHead>, HeadError>> {
        let Connection { client, proxy, .. } = self;
        let mut timer: Option<Pin<Box<Sleep>>> = None;
        poll_fn(|cx| {
            let head = pin!(client.read_head()).poll(cx);
            // Empty lines between two requests are no request's beginning (RFC 9112, 2.2).
            let begun = client.buffered().iter().any(|b| !b"\r\n".contains(b));
            match head {
                Poll::Ready(head) => return Poll::Ready(Some(head)),
                Poll::Pending if begun => {}
                Poll::Pending if proxy.drain.is_stopping() => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
            let deadline = proxy.head_deadline;
            let timer = timer.get_or_insert_with(|| Box::pin(sleep(deadline)));
            timer.as_mut().poll(cx).map(|()| Some(Err(too_slow("head", deadline).into())))
        })
        .await
    }

    /// One HTTP/1 request.
    async fn request(&mut self, head: RequestHead) -> Next {
        // In boxes of their own: what it took to find a daemon is freed before a stream that lasts for hours,
        // and a connection between two requests holds neither.
        match Box::pin(self.admit(head)).await {
            Ok(admitted) => Box::pin(self.relay(admitted)).await,
            Err(next) => next,
        }
    }

    /// From a request's head to its daemon; or what follows, if its answer does not come from there.
    async fn admit(&mut self, head: RequestHead) -> Result<Box<Admitted>, Next> {
        let mut record = self.record(Some(&head));
        let prefix = classify::prefix(head.target());
        let (tenant, session) = (prefix.tenant.map(str::to_string), prefix.session.map(str::to_string));
        let (project, prefix_length) = (prefix.project.map(str::to_string), prefix.length);
        let head = match without_prefix(head, prefix_length) {
            Ok(head) => head,
            Err(error) => return Err(self.refuse(&error, false).await),
        };
        if head.method() == "POST" && head.path() == session::PATH {
            let (tenant, session) = (tenant.as_deref(), session.as_deref());
            let prefix = Prefix { tenant, session, project: None, length: prefix_length };
            return Err(Box::pin(self.enter(&head, &prefix)).await);
        }
        let mut route = classify(head.method(), head.path(), head.query());
        let said = head
            .header(PROJECT)
            .map(|p| String::from_utf8_lossy(p).into_owned())
            .filter(|p| !p.is_empty())
            .or(project);
        route.project = said.or(route.project);
        let (tenant, session) = (tenant.as_deref(), session.as_deref());
        let prefix = Prefix { tenant, session, project: None, length: prefix_length };
        let head_only = head.method() == "HEAD";
        if let Some(why) = route.refuse {
            return Err(self.refuse(&Error::new(Kind::NotImplemented, why), head_only).await);
        }
        // A body that nobody reads would be taken for the next request.
        let keep_alive = head.keep_alive && has_no_body(&head) && !self.proxy.drain.is_stopping();
        match route.local {
            // Who runs on one of the pool's daemons never queues, and cannot be kept out by a full queue.
            Some(Local::Ping) if self.proxy.pool.queue_is_full() && self.inside().is_none() => {
                // BuildKit can only be refused here: anywhere later buildx falls back to another driver.
                let refused = match self.identify(&prefix, head.header(HEADER)).await {
                    Ok(identity) => self.proxy.pool.refuses(&identity.key),
                    Err(error) => return Err(self.refuse(&error, head_only).await),
                };
                let refused = refused.then(|| local::queue_full(&self.proxy.pool));
                let answer = local::ping(&self.proxy.pool, head_only, keep_alive, refused);
                return Err(self.answer(&head, answer).await);
            }
            Some(Local::Ping) => {
                let answer = local::ping(&self.proxy.pool, head_only, keep_alive, None);
                return Err(self.answer(&head, answer).await);
            }
            Some(Local::Version) => {
                if let Err(error) = self.first_daemon(|pool| pool.about(None).is_none()).await {
                    return Err(self.refuse_unless_gone(&error, head_only).await);
                }
                match local::version(&self.proxy.pool, keep_alive) {
                    Ok(answer) => return Err(self.answer(&head, answer).await),
                    Err(error) => return Err(self.refuse(&error, head_only).await),
                }
            }
            Some(Local::Grpc) | None => {}
        }
        let identity = match self.identify(&prefix, head.header(HEADER)).await {
            Ok(identity) => identity,
            Err(error) => return Err(self.refuse(&error, head_only).await),
        };
        if route.local == Some(Local::Grpc) {
            Box::pin(self.grpc(&head, &route, identity)).await;
            return Err(Next::Close);
        }
        if route.label == "build/cancel"
            && has_no_body(&head)
            && let Some(id) = &route.build_id
            && self.proxy.waiting.cancel(&identity.key, id)
        {
            return Err(self.answer(&head, local::ok(keep_alive)).await);
        }
        let queues = matches!(route.class, Class::Work(_) | Class::Join);
        if !queues && let Err(error) = self.first_daemon(Pool::has_nobody).await {
            return Err(self.refuse_unless_gone(&error, head_only).await);
        }
        let (want, named) = match self.want(&head, &route, identity).await {
            Ok(want) => want,
            Err(error) => return Err(self.refuse(&error, head_only).await),
        };
        let mut told = Told::default();
        let proxy = self.proxy.clone();
        let cancel = route.build_id.as_ref().map(|id| proxy.waiting.enter(&want.key, id));
        let reached = self.reach(&want, manner(&head, &route), &mut told);
        let reached = match cancel {
            Some(build) => build.unless_cancelled(reached).await,
            None => reached.await,
        };
        record.waited = told.waited;
        let (lease, daemon) = match reached {
            Ok(reached) => reached,
            Err(error) if error.kind == Kind::ClientGone => {
                self.done(&route, &want.into(), None, &record, word(Outcome::ClientGone));
                return Err(Next::Close);
            }
            Err(error) => {
                self.done(&route, &want.into(), None, &record, "refused");
                return Err(self.tell(&error, head_only, told).await);
            }
        };
        self.reached(&want, &record);
        Ok(Box::new(Admitted { head, route, who: want.into(), named, lease, daemon, told, record }))
    }

    /// Waits while `lacks` a daemon that is on its way, for what does not wait in the queue: buildx asks for `/version`
    /// before it builds, and ends if that fails; a job may begin with a login.
    ///
    /// # Errors
    /// As [`Self::may_wait`].
    async fn first_daemon(&self, lacks: impl Fn(&Pool) -> bool) -> Result<(), Error> {
        let pool = &self.proxy.pool;
        let _newcomer = pool.newcomer();
        while lacks(pool) && pool.expects_room() {
            self.may_wait()?;
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Whether there is a point in waiting outside the queue, which watches client and proxy by itself.
    ///
    /// # Errors
    /// When the client has left, and when the proxy stops.
    fn may_wait(&self) -> Result<(), Error> {
        if self.client.peer() != Peer::Open {
            return Err(Error::new(Kind::ClientGone, "the client left while it waited"));
        }
        if self.proxy.drain.is_stopping() && !self.proxy.pool.is_shared() {
            return Err(Error::new(Kind::ShuttingDown, "dindpool is shutting down; try again"));
        }
        Ok(())
    }

    /// Relays one request and its response, and the tunnel that it may become.
    async fn relay(&mut self, admitted: Box<Admitted>) -> Next {
        let Admitted { head, route, who, named, lease, mut daemon, told, mut record } = *admitted;
        let head_only = head.method() == "HEAD";
        let options = Options { hijack: route.hijack, answered: told.answered };
        let open = Counted::new(&self.proxy.metrics.exchanges);
        let reader = Reader::new(route.learn.as_ref(), &named);
        let mut watcher = Watcher::new(&lease, reader, route.json_stream);
        daemon.ask(route.pace());
        self.streaming = true;
        #[cfg(test)]
        isolation::failpoint(head.target());
        let (client, cut) = (&mut self.client, lease.cut());
        let result = cut.wakes(pin!(exchange(client, &mut daemon, &head, options, &mut watcher))).await;
        self.streaming = false;
        drop((watcher, open, head));
        self.count_bytes(&mut record, result.sent, result.received);
        match result.outcome {
            relay::Outcome::Done { keep_client, keep_daemon } => {
                if keep_daemon {
                    self.kept = Some((lease.daemon().clone(), daemon));
                }
                self.done(&route, &who, Some(&lease), &record, "done");
                lease.finish(Outcome::Done);
                if keep_client { Next::Request } else { Next::Close }
            }
            relay::Outcome::Upgraded => {
                let kind = if route.h2 { TunnelKind::H2 } else { TunnelKind::Raw };
                let outcome = self.tunnel(&lease, &mut daemon, kind, None, &mut record).await;
                self.done(&route, &who, Some(&lease), &record, word(outcome));
                lease.finish(outcome);
                Next::Close
            }
            relay::Outcome::Unanswered { status } => {
                lease.answered(status);
                let error = said(&mut daemon, status).await;
                self.done(&route, &who, Some(&lease), &record, "done");
                lease.finish(Outcome::Done);
                // What a daemon says may hold a URL with a password: it is for the user, not for the log.
                refuse(&mut self.client, chunk(&error.stream_line()).as_bytes()).await;
                Next::Close
            }
            relay::Outcome::ClientGone => {
                self.done(&route, &who, Some(&lease), &record, word(Outcome::ClientGone));
                lease.finish(Outcome::ClientGone);
                Next::Close
            }
            relay::Outcome::BadRequest { error, answerable } => {
                self.done(&route, &who, Some(&lease), &record, "bad-request");
                lease.finish(Outcome::Aborted);
                if answerable { self.tell(&error, head_only, told).await } else { Next::Close }
            }
            relay::Outcome::DaemonFailed(failure) => {
                let cut = lease.cut().is_given();
                let outcome = if cut { Outcome::Aborted } else { Outcome::DaemonFailed };
                self.done(&route, &who, Some(&lease), &record, word(outcome));
                let id = &lease.daemon().id;
                let error = match failure.error.kind() {
                    io::ErrorKind::TimedOut => Error::new(
                        Kind::DaemonTimeout,
                        format!("daemon {id} does not answer: {}", failure.error),
                    ),
                    _ => Error::new(
                        Kind::DaemonUnreachable,
                        format!("lost the connection to daemon {id}: {}", failure.error),
                    ),
                };
                lease.finish(outcome);
                if failure.before_response {
                    self.tell(&error, head_only, told).await
                } else {
                    self.proxy.metrics.errors.with_label_values(&[error.fault().as_str()]).inc();
                    Next::Close
                }
            }
        }
    }

    /// `/grpc`: 101 at once; the daemon is acquired when the client sends an HTTP/2 preface. Two of a buildx
    /// build's four connections are probes that never do.
    async fn grpc(&mut self, head: &RequestHead, route: &Route, identity: Identity) {
        if self.client.write_all(local::GRPC_101).await.is_err() {
            return;
        }
        if self.preface(None).await {
            self.buildkit(Some(head), route, identity).await;
        }
    }

    /// HTTP/2 with prior knowledge: Engine 29 serves gRPC (and its whole API) so.
    async fn native_h2(&mut self) {
        if !self.preface(Some(self.proxy.head_deadline)).await {
            return;
        }
        let route = Route { local: None, ..classify("POST", "/grpc", None) };
        match self.identify(&Prefix::default(), None).await {
            Ok(identity) => self.buildkit(None, &route, identity).await,
            Err(error) => tracing::debug!("{error}"),
        }
    }

    /// Waits for the HTTP/2 preface. False if the client sends something else, leaves, takes longer than `deadline`,
    /// or if the proxy stops.
    async fn preface(&mut self, deadline: Option<Duration>) -> bool {
        let Connection { client, proxy, .. } = self;
        let preface = async {
            match deadline {
                Some(deadline) => timeout(deadline, client.peek(PREFACE.len())).await.ok(),
                None => Some(client.peek(PREFACE.len()).await),
            }
        };
        let preface = proxy.drain.unless_stopping(preface).await;
        matches!(preface, Some(Some(Ok(bytes))) if bytes.starts_with(PREFACE))
    }

    /// A BuildKit connection whose client has begun to speak HTTP/2.
    async fn buildkit(&mut self, head: Option<&RequestHead>, route: &Route, identity: Identity) {
        let mut record = self.record(head);
        let want = Want {
            inside: self.inside(),
            shares_names: identity.interactive,
            class: Class::Work(Work::BuildKit),
            key: identity.key,
            tenant: identity.tenant,
            source: identity.source,
            target: None,
            requirements: Requirements::default(),
        };
        let mut told = Told::default();
        let reached = self.reach(&want, Manner::Http2, &mut told).await;
        record.waited = told.waited;
        let (lease, mut daemon) = match reached {
            Ok(reached) => reached,
            Err(error) if error.kind == Kind::ClientGone => {
                self.done(route, &want.into(), None, &record, word(Outcome::ClientGone));
                return;
            }
            Err(error) => {
                self.done(route, &want.into(), None, &record, "refused");
                self.refuse_calls(&error, told).await;
                return;
            }
        };
        self.reached(&want, &record);
        let who = Who::from(want);
        if let Some(head) = head
            && let Err(error) = upgrade(&mut daemon, head).await
        {
            let kind = match error.kind() {
                io::ErrorKind::TimedOut => Kind::DaemonTimeout,
                _ => Kind::DaemonUnreachable,
            };
            let error =
                Error::new(kind, format!("daemon {} does not serve BuildKit: {error}", lease.daemon().id));
            self.done(route, &who, Some(&lease), &record, word(Outcome::DaemonFailed));
            lease.finish(Outcome::DaemonFailed);
            self.refuse_calls(&error, told).await;
            return;
        }
        let outcome = {
            let mut tap = SolveTap::new(|| lease.build_seen(), told.settings);
            self.tunnel(&lease, &mut daemon, TunnelKind::H2, Some(&mut tap), &mut record).await
        };
        self.done(route, &who, Some(&lease), &record, word(outcome));
        lease.finish(outcome);
    }

    /// Nothing but HTTP/2 may be said to this client any more: each of its calls is answered with the error, until it
    /// leaves.
    async fn refuse_calls(&mut self, error: &Error, told: Told) {
        self.proxy.metrics.errors.with_label_values(&[error.fault().as_str()]).inc();
        let (request, numbered) = self.numbered(error);
        tracing::warn!(request, fault = error.fault().as_str(), "{}", error.for_log());
        let Connection { client, proxy, .. } = self;
        let mut refusal = Refusal::new(&numbered.message, told.settings);
        let answer = async {
            loop {
                let Ok(out) = refusal.feed(client.buffered()) else { return };
                client.consume(client.buffered().len());
                if client.write_all(&out).await.is_err() || !matches!(client.fill().await, Ok(1..)) {
                    return;
                }
            }
        };
        // It makes its calls when it has been greeted, also when the proxy stops.
        let time = if proxy.drain.is_stopping() { NEWCOMER } else { REFUSED };
        {
            let mut answer = pin!(timeout(time, answer));
            if proxy.drain.unless_stopping(answer.as_mut()).await.is_none() {
                let _ = timeout(NEWCOMER, answer).await;
            }
        }
        // Unread bytes would make a reset of the close, which eats what was said.
        refuse(client, &[]).await;
    }

    async fn tunnel(
        &mut self,
        lease: &Lease,
        daemon: &mut Side,
        kind: TunnelKind,
        tap: Option<&mut dyn relay::Tap>,
        record: &mut Record,
    ) -> Outcome {
        let open = Counted::new(&self.proxy.metrics.tunnels);
        self.streaming = true;
        let end = lease.cut().cuts(pin!(tunnel(&mut self.client, daemon, kind, tap))).await;
        self.streaming = false;
        drop(open);
        let Some(end) = end else {
            self.client.abort();
            daemon.abort();
            return Outcome::Aborted;
        };
        self.count_bytes(record, end.up, end.down);
        match end.cause {
            TunnelCause::ClientFinished | TunnelCause::DaemonFinished => Outcome::Done,
            TunnelCause::ClientReset => Outcome::ClientGone,
            TunnelCause::DaemonReset => Outcome::DaemonFailed,
        }
    }

    /// Whose request it is. The process behind a connection is looked up once, at its first request that needs
    /// it: half of all connections only ping.
    async fn identify(&mut self, prefix: &Prefix<'_>, header: Option<&[u8]>) -> Result<Identity, Error> {
        if self.source.is_none() {
            self.source = Some(match self.origin {
                Origin::Unix(pid, uid) => self.proxy.peers.unix(pid, uid),
                Origin::Tcp(client, server) if is_local(client, server) => {
                    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
                    self.proxy.peers.clone().loopback(canonical(client), canonical(server)).await
                }
                Origin::Tcp(client, _) => Source::Ip(client.ip().to_canonical()),
            });
        }
        let source = self.source.as_ref().ok_or_else(|| Error::new(Kind::Internal, "no source"))?;
        identify(&self.listener, source, prefix, header)
    }

    /// The connection says whose it is, and is as new from then on ([`session`]).
    async fn enter(&mut self, head: &RequestHead, prefix: &Prefix<'_>) -> Next {
        let identity = match self.identify(prefix, head.header(HEADER)).await {
            Ok(identity) => identity,
            Err(error) => return self.refuse(&error, false).await,
        };
        let named = head.header(HEADER).and_then(|name| std::str::from_utf8(name).ok()).or(prefix.session);
        let Some(name) = named.filter(|_| has_no_body(head)) else {
            let message =
                format!("{} takes a session's name, in X-Dindpool-Session, and no body", session::PATH);
            return self.refuse(&Error::new(Kind::BadRequest, message), false).await;
        };
        let name = name.to_string();
        tracing::debug!(session = %identity.key, "a connection says whose it is");
        // What follows may carry no path, and belongs to the same tenant.
        let session = self.listener.session.clone();
        self.listener = Arc::new(ListenerIdentity { tenant: identity.tenant, session });
        if self.client.write_all(session::ACCEPTED.as_bytes()).await.is_err() {
            return Next::Close;
        }
        self.source = Some(Source::Session(name));
        // What its client does not use yet may wait, as between two requests.
        let Connection { client, proxy, .. } = self;
        match proxy.drain.unless_stopping(client.peek(4)).await {
            Some(Ok(first)) if first.starts_with(b"PRI ") => {
                Box::pin(self.native_h2()).await;
                Next::Close
            }
            Some(Ok(_)) => Next::Request,
            Some(Err(_)) | None => Next::Close,
        }
    }

    /// The pool's daemon that this client runs on, in a container.
    fn inside(&self) -> Option<DaemonId> {
        match self.origin {
            Origin::Tcp(client, _) => self.proxy.pool.inside(client.ip().to_canonical()),
            Origin::Unix(pid, _) => self.parent.get_or_init(|| self.proxy.pool.inside_process(pid?)).clone(),
        }
    }

    /// What the request wants of the pool, and the name that a new object gets. Reads the body of a create
    /// ahead: its image decides where it goes.
    async fn want(
        &mut self,
        head: &RequestHead,
        route: &Route,
        identity: Identity,
    ) -> Result<(Want, Named), Error> {
        let mut requirements = Requirements {
            api: route.api,
            arch: route.arch.clone(),
            image: route.image.clone(),
            beside: Vec::new(),
            apart: Vec::new(),
            // Tenants may call theirs the same.
            project: route.project.as_ref().map(|p| format!("{}/{p}", identity.tenant).into()),
        };
        let mut named = Named { name: route.name.clone(), project: None };
        if let Some(peek) = route.peek {
            let body = peek_body(&mut self.client, head, self.proxy.head_deadline).await?;
            match peek {
                Peek::Container => {
                    let read = body::container(&body);
                    requirements.image = read.image;
                    requirements.beside = read.beside;
                    named.project = read.project;
                }
                Peek::Resource => (named.name, named.project) = body::resource(&body),
            }
        }
        if let (Some(Learn::Created(kind)), Some(name)) = (&route.learn, &named.name)
            && matches!(kind, ObjectKind::Container | ObjectKind::Network)
        {
            requirements.apart.push(ObjectRef { kind: *kind, reference: name.clone() });
        }
        if let Some(project) = &named.project {
            let project = ObjectRef { kind: ObjectKind::Project, reference: project.clone() };
            // What a terminal adds to a compose project that went up in another one goes where the project is. What
            // a CI job has of the same name goes anywhere but there.
            match identity.interactive {
                true => requirements.beside.insert(0, project),
                false => requirements.apart.push(project),
            }
        }
        // A terminal's list of networks by name is a list like any other; a job's must not show what is another's.
        let listed = |t: &ObjectRef| t.kind == ObjectKind::Network && route.class == Class::Read;
        let target = route.target.clone().filter(|t| !(identity.interactive && listed(t)));
        // The uuid of a BuildKit session is in its own head and in its build's query: they belong together.
        let target = target.or_else(|| build_session(head).filter(|_| route.class == Class::Join));
        let want = Want {
            key: identity.key,
            tenant: identity.tenant,
            source: identity.source,
            inside: self.inside(),
            shares_names: identity.interactive,
            class: route.class,
            target,
            requirements,
        };
        Ok((want, named))
    }

    /// A daemon for the request, and a connection to it. Another daemon is tried only while no byte of the
    /// request has reached one and the session was not bound before: a bound session never silently moves.
    async fn reach(&mut self, want: &Want, manner: Manner, told: &mut Told) -> Result<(Lease, Side), Error> {
        let mut attempts = Attempts::new(self.proxy.pool.config().connect_deadline);
        loop {
            let ticket = self.proxy.pool.acquire(want).await;
            let waiting = wait(&mut self.client, ticket, manner, told);
            // Who still waits when the proxy is told to stop, waits for nothing; unless another one admits.
            let lease = match self.proxy.pool.is_shared() {
                true => Some(waiting.await),
                false => self.proxy.drain.unless_stopping(waiting).await,
            };
            let Some(lease) = lease else {
                return Err(Error::new(Kind::ShuttingDown, "dindpool is shutting down; try again"));
            };
            let lease = lease?;
            let id = lease.daemon().id.clone();
            if let Some((kept, side)) = self.kept.take()
                // A daemon of the same name at another address is another one.
                && Arc::ptr_eq(&kept, lease.daemon())
                && !side.is_dead()
            {
                return Ok((lease, side));
            }
            match lease.connect().await {
                Ok(stream) => {
                    let mut side = Side::new(stream);
                    side.guard(self.proxy.sweeper.watch(Some(lease.daemon().clone())));
                    return Ok((lease, side));
                }
                // Our own want of descriptors or ports is no daemon's fault.
                Err(error) if is_own_fault(&error) => {
                    lease.finish(Outcome::Aborted);
                    return Err(Error::new(
                        Kind::Internal,
                        format!("dindpool cannot open a connection: {error}"),
                    ));
                }
                Err(error) => {
                    let bound = lease.is_bound();
                    let kind = if error.kind() == io::ErrorKind::TimedOut {
                        Kind::DaemonTimeout
                    } else {
                        Kind::DaemonUnreachable
                    };
                    let message = format!("daemon {id} cannot be reached: {error}");
                    lease.finish(Outcome::Unreached);
                    match attempts.failed(&id, bound, Instant::now()) {
                        Attempt::GiveUp => return Err(Error::new(kind, message)),
                        Attempt::Again(pause) => {
                            self.may_wait()?;
                            sleep(pause).await;
                        }
                        Attempt::Elsewhere => {
                            tracing::warn!(daemon = %id, session = %want.key, "{message}; trying another");
                            self.proxy.metrics.retries.inc();
                        }
                    }
                }
            }
        }
    }

    /// Writes an answer of the proxy's own.
    async fn answer(&mut self, head: &RequestHead, answer: Vec<u8>) -> Next {
        self.proxy.metrics.finished("local", "done", Duration::ZERO);
        if !has_no_body(head) {
            refuse(&mut self.client, &answer).await;
            return Next::Close;
        }
        match self.client.write_all(&answer).await {
            Ok(()) if head.keep_alive => Next::Request,
            _ => Next::Close,
        }
    }

    /// Tells the client what went wrong, so that it can read it, and closes.
    async fn refuse(&mut self, error: &Error, head_only: bool) -> Next {
        self.proxy.metrics.errors.with_label_values(&[error.fault().as_str()]).inc();
        let (request, told) = self.numbered(error);
        tracing::info!(
            request,
            fault = error.fault().as_str(),
            status = error.status().0,
            "{}",
            error.for_log()
        );
        refuse(&mut self.client, &told.response(head_only)).await;
        Next::Close
    }

    /// As [`Self::refuse`], if there is anybody to tell.
    async fn refuse_unless_gone(&mut self, error: &Error, head_only: bool) -> Next {
        match error.kind {
            Kind::ClientGone => Next::Close,
            _ => self.refuse(error, head_only).await,
        }
    }

    /// As [`Self::refuse`], also where the client has been answered while it waited: then within its stream.
    async fn tell(&mut self, error: &Error, head_only: bool, told: Told) -> Next {
        if !told.answered {
            return self.refuse(error, head_only).await;
        }
        self.proxy.metrics.errors.with_label_values(&[error.fault().as_str()]).inc();
        let (request, told) = self.numbered(error);
        tracing::info!(request, fault = error.fault().as_str(), "{}", error.for_log());
        // No terminating chunk: what failed must not look complete.
        refuse(&mut self.client, chunk(&told.stream_line()).as_bytes()).await;
        Next::Close
    }

    /// A request has its daemon: what that took without the wait for a slot is dindpool's own doing.
    fn reached(&self, want: &Want, record: &Record) {
        let own = record.began.elapsed().saturating_sub(record.waited);
        self.proxy.metrics.added.observe(own.as_secs_f64());
        if matches!(want.class, Class::Work(_)) {
            self.proxy.metrics.worked(want.tenant.as_str());
        }
    }

    fn count_bytes(&self, record: &mut Record, up: u64, down: u64) {
        record.up += up;
        record.down += down;
        self.proxy.metrics.bytes_up.inc_by(up);
        self.proxy.metrics.bytes_down.inc_by(down);
    }

    /// Begins to tell of a request.
    fn record(&mut self, head: Option<&RequestHead>) -> Record {
        let trace = head.and_then(|head| head.header(TRACEPARENT));
        let number = self.proxy.pool.next_log_id();
        self.number = Some(number);
        Record::begin(number, trace)
    }

    /// An error with the number by which its lines in the log are found; what is no request yet gets one.
    fn numbered(&mut self, error: &Error) -> (u64, Error) {
        let number = *self.number.get_or_insert_with(|| self.proxy.pool.next_log_id());
        (number, Error::new(error.kind, format!("{} (request {number})", error.message)))
    }

    /// One log line and one count for each request that is over.
    fn done(&self, route: &Route, who: &Who, lease: Option<&Lease>, record: &Record, outcome: &'static str) {
        let took = record.began.elapsed();
        self.proxy.metrics.finished(class_word(route.class), outcome, took);
        if let Some(lease) = lease {
            let Record { waited, up, down, .. } = *record;
            lease.count(Tally { requests: 1, waited, up, down });
        }
        tracing::info!(
            request = record.number,
            trace = record.trace().map(tracing::field::display),
            route = route.label,
            session = %who.key,
            tenant = %who.tenant,
            daemon = lease.map(|l| l.daemon().id.as_str()),
            waited_ms = record.waited.as_millis() as u64,
            ms = took.as_millis() as u64,
            up = record.up,
            down = record.down,
            outcome,
            "request"
        );
    }
}

/// The request's body without consuming it, as far as its framing tells. A body of great length is left alone:
/// the request is then placed without it.
///
/// # Errors
/// When the client leaves, breaks its framing, or sends nothing for `deadline`.
async fn peek_body(client: &mut Side, head: &RequestHead, deadline: Duration) -> Result<Vec<u8>, Error> {
    let gone = |_: io::Error| Error::new(Kind::BadRequest, "the client left while it sent its request");
    let small = match head.framing {
        Framing::Length(length) => length <= MAX_PEEK as u64,
        Framing::Chunked => true,
        Framing::None | Framing::UntilClose => false,
    };
    if !small {
        return Ok(Vec::new());
    }
    if head.expect_continue && head.version == Version::Http11 && client.buffered().is_empty() {
        // curl does for more than 1 KiB. The daemon will say it once more, which any client must bear (RFC 9110).
        client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.map_err(gone)?;
    }
    let (mut body, mut seen, mut payload) = (relay::Body::new(head.framing), 0, Vec::new());
    while !body.is_complete() {
        let bytes = timeout(deadline, client.peek(seen + 1)).await;
        let bytes = bytes.map_err(|_| too_slow("body", deadline))?.map_err(gone)?;
        if bytes.len() <= seen || seen > MAX_PEEK {
            return Ok(Vec::new());
        }
        seen += body.feed(&bytes[seen..], |part| payload.extend_from_slice(part))?;
    }
    Ok(payload)
}

fn too_slow(part: &str, deadline: Duration) -> Error {
    let seconds = deadline.as_secs_f64();
    Error::new(Kind::RequestTimeout, format!("the request's {part} did not come within {seconds} s"))
}

/// The header by which `/session` says which BuildKit session it is.
const SESSION_UUID: &str = "x-docker-expose-session-uuid";

fn build_session(head: &RequestHead) -> Option<ObjectRef> {
    let uuid = std::str::from_utf8(head.header(SESSION_UUID)?).ok()?;
    let plain = uuid.len() <= 128 && !uuid.is_empty() && uuid.bytes().all(|b| b.is_ascii_graphic());
    plain.then(|| ObjectRef { kind: ObjectKind::BuildSession, reference: uuid.to_string() })
}

/// How the client of this request can be told that it waits. `build -q` prints its whole stream as the image's
/// id, and import prints to standard output (CLI 28.2.2, measured).
fn manner(head: &RequestHead, route: &Route) -> Manner {
    let quiet = head.query().and_then(|q| classify::parameter(q, "q")).is_some_and(|q| is_true(&q));
    match route.class {
        Class::Work(Work::Build | Work::Pull) if !quiet && head.version == Version::Http11 => {
            Manner::Lines(route.api)
        }
        Class::Work(Work::Load) if route.label == "images/load" && head.version == Version::Http11 => {
            Manner::Lines(route.api)
        }
        _ => Manner::Silent,
    }
}

fn has_no_body(head: &RequestHead) -> bool {
    matches!(head.framing, Framing::None | Framing::Length(0))
}

/// As dockerd reads a flag in a query; docker-py sends `True`.
fn is_true(value: &str) -> bool {
    !matches!(value.trim().to_ascii_lowercase().as_str(), "" | "0" | "no" | "false" | "none")
}

/// What a daemon said instead of the 200 that its client has already: its own message, if it is one.
async fn said(daemon: &mut Side, status: u16) -> Error {
    let message = timeout(SAYING, its_message(daemon)).await.ok().flatten();
    let message = message.unwrap_or_else(|| format!("the daemon answered {status}"));
    Error::new(Kind::DaemonUnreachable, message)
}

async fn its_message(daemon: &mut Side) -> Option<String> {
    if let Ok(head) = daemon.read_response().await
        && let Ok(head) = ResponseHead::parse(&head, false)
        && let Framing::Length(length @ 1..=65_536) = head.framing
        && let Ok(body) = daemon.peek(length as usize).await
        && let Ok(body) = serde_json::from_slice::<serde_json::Value>(body)
    {
        return body["message"].as_str().map(str::to_string);
    }
    None
}

fn class_word(class: Class) -> &'static str {
    match class {
        Class::Work(_) => "work",
        Class::Join => "join",
        Class::Follow | Class::Remove => "follow",
        Class::Read => "read",
        Class::Any => "any",
    }
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Done | Outcome::Failed | Outcome::Erred => "done",
        Outcome::ClientGone => "client-gone",
        Outcome::DaemonFailed => "daemon-failed",
        Outcome::Unreached => "unreached",
        Outcome::Aborted => "aborted",
    }
}

/// Whether a client is on this machine: a connection to an own address comes from that address.
fn is_local(client: SocketAddr, server: SocketAddr) -> bool {
    let client = client.ip().to_canonical();
    client.is_loopback() || client == server.ip().to_canonical()
}

/// Whether a connection failed for want of something on this side.
fn is_own_fault(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::EADDRNOTAVAIL | libc::ENOBUFS | libc::ENOMEM)
    )
}

/// The head as the daemon is to see it: without dindpool's own path prefixes, otherwise as it came.
pub(crate) fn without_prefix(head: RequestHead, length: usize) -> Result<RequestHead, Error> {
    if length == 0 {
        return Ok(head);
    }
    let at = head.method().len() + 1;
    let mut raw = head.raw().to_vec();
    raw.drain(at..at + length);
    RequestHead::parse(raw)
}

/// Sends the upgrade request that the proxy has already answered, and takes in the daemon's 101.
async fn upgrade(daemon: &mut Side, head: &RequestHead) -> io::Result<()> {
    // A frozen daemon accepts connections; nobody watches the client here, and its slot must come free.
    timeout(UPGRADE, upgraded(daemon, head))
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer to the upgrade in time")))
}

async fn upgraded(daemon: &mut Side, head: &RequestHead) -> io::Result<()> {
    daemon.write_all(head.raw()).await?;
    loop {
        let end = daemon.buffered().windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4);
        if let Some(end) = end {
            let response = ResponseHead::parse(&daemon.buffered()[..end], false).map_err(io::Error::other)?;
            let status = response.status;
            daemon.consume(end);
            return match status {
                101 => Ok(()),
                other => Err(io::Error::other(format!("the daemon answered {other}"))),
            };
        }
        if daemon.fill().await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::relay::testing::{Ending, read_to_end, read_until, say, soon, tcp};
    use super::*;

    fn head(text: &str) -> RequestHead {
        RequestHead::parse(text.replace('\n', "\r\n").into_bytes()).unwrap()
    }

    #[tokio::test]
    async fn a_create_that_expects_100_continue_is_still_placed_by_its_image() {
        let (mut client, mut far) = tcp().await;
        let head = head("POST /containers/create HTTP/1.1\nExpect: 100-continue\nContent-Length: 15\n\n");
        let sender = async {
            read_until(&mut far, "HTTP/1.1 100 Continue\r\n\r\n").await;
            say(&mut far, r#"{"Image":"app"}"#).await;
        };
        let (body, ()) =
            soon(async { tokio::join!(peek_body(&mut client, &head, Duration::from_secs(9)), sender) }).await;
        assert_eq!(body::container(&body.unwrap()).image.as_deref(), Some("docker.io/library/app:latest"));
        assert_eq!(client.buffered().len(), 15, "the body stays for the daemon");
    }

    #[tokio::test]
    async fn a_chunked_body_is_read_ahead_wherever_it_is_cut() {
        let (mut client, mut far) = tcp().await;
        let head = head("POST /containers/create HTTP/1.1\nTransfer-Encoding: chunked\n\n");
        let wire = b"3\r\n{\"a\r\n4\r\n\":1}\r\n0\r\n\r\nGET";
        let sender = async {
            for byte in wire {
                far.write_all(&[*byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let (body, ()) =
            soon(async { tokio::join!(peek_body(&mut client, &head, Duration::from_secs(9)), sender) }).await;
        assert_eq!(body.unwrap(), b"{\"a\":1}");
        let head = self::head("POST /volumes/create HTTP/1.1\nContent-Length: 0\n\n");
        assert_eq!(
            soon(peek_body(&mut client, &head, Duration::from_secs(9))).await.unwrap(),
            b"",
            "nothing is waited for"
        );
    }

    #[tokio::test]
    async fn a_connection_that_is_cut_within_a_stream_does_not_end_like_the_stream() {
        for (streaming, ending) in [(true, Ending::Rst), (false, Ending::Fin)] {
            let (mut connection, mut far) = connection().await;
            connection.streaming = streaming;
            drop(connection);
            assert_eq!(read_to_end(&mut far).await.1, ending);
        }
    }

    async fn connection() -> (Connection, tokio::net::TcpStream) {
        let (client, far) = tcp().await;
        let metrics = Metrics::new(prometheus::Registry::new()).unwrap();
        let proxy = Proxy {
            pool: Pool::new(crate::pool::Config::default(), metrics.clone(), 1),
            peers: Arc::new(Peers::new(&[])),
            waiting: WaitingBuilds::default(),
            drain: Drain::new(),
            gate: Gate::new(limits::Limits::default(), 1024),
            sweeper: Sweeper::default(),
            head_deadline: Duration::from_secs(30),
            metrics,
        };
        let listener = ListenerIdentity { tenant: "default".into(), session: None };
        (Connection::new(Arc::new(proxy), Arc::new(listener), client, Origin::Unix(None, 0)), far)
    }

    #[tokio::test]
    async fn an_empty_line_between_two_requests_is_no_beginning_of_one() {
        for (sent, begun) in [("\r\n", false), ("\r\nG", true)] {
            let (mut connection, mut far) = connection().await;
            say(&mut far, sent).await;
            connection.proxy.drain.stop();
            let mut head = pin!(connection.head());
            let ends = poll_fn(|cx| Poll::Ready(head.as_mut().poll(cx).is_ready())).await;
            assert_eq!(ends, !begun, "{sent:?}");
        }
    }

    #[test]
    fn a_quiet_build_is_told_nothing_however_it_says_so() {
        for (query, quiet) in [("q=1", true), ("q=True", true), ("q=0", false), ("q=", false), ("t=a", false)]
        {
            let target = format!("/build?{query}");
            let head = head(&format!("POST {target} HTTP/1.1\n\n"));
            let route = classify("POST", "/build", Some(query));
            assert_eq!(manner(&head, &route) == Manner::Silent, quiet, "{query}");
        }
    }

    #[test]
    fn a_client_of_this_machine_is_known_by_any_of_its_addresses() {
        let local = |client: &str, server: &str| is_local(client.parse().unwrap(), server.parse().unwrap());
        assert!(local("127.0.0.1:9", "127.0.0.1:2375"));
        assert!(local("[::ffff:127.0.0.1]:9", "[::ffff:127.0.0.1]:2375"));
        assert!(local("10.0.0.5:9", "[::ffff:10.0.0.5]:2375"));
        assert!(!local("10.0.0.6:9", "10.0.0.5:2375"));
    }

    #[test]
    fn a_session_belongs_to_the_build_that_names_its_uuid() {
        let uuid = |value: &str| {
            let field = if value.is_empty() {
                String::new()
            } else {
                format!("X-Docker-Expose-Session-Uuid: {value}\n")
            };
            build_session(&head(&format!("POST /session HTTP/1.1\n{field}\n"))).map(|o| o.reference)
        };
        assert_eq!(uuid("u1").as_deref(), Some("u1"));
        assert_eq!(uuid(""), None);
        assert_eq!(uuid("a b"), None);
    }

    /// The size of what an async function leaves on the heap while it waits.
    fn size<'a, A, F>(_: fn(&'a mut Connection, A) -> F) -> usize {
        size_of::<F>()
    }

    fn size_of_serve<'a, F>(_: fn(Arc<Proxy>, Arc<Entry>, Stream, Origin, &'a mut Pass) -> F) -> usize {
        size_of::<F>()
    }

    /// Thousands of streams are silent for hours (events, logs, wait): each holds these two.
    #[test]
    fn an_idle_stream_is_small() {
        let (serve, relay) = (size_of_serve(serve), size(Connection::relay));
        println!("serve {serve}, relay {relay}");
        assert!(serve <= 1260 && relay <= 1440, "serve {serve}, relay {relay}");
    }
}
