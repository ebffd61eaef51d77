//! The shell around the engine: one lock, held briefly and never across an await; timers; the watch on each
//! daemon; the guard that gives a lease back.

pub mod about;
pub mod advice;
pub mod client;
pub mod cordon;
mod deep;
mod departure;
pub mod journal;
mod lease;
mod lookup;
pub mod notes;
pub mod peers;
mod recognised;
pub mod remote;
pub mod scaler;
pub mod shared;
pub mod snapshot;
pub mod status;
mod survey;
mod tally;
mod ticket;
pub(crate) mod watch;
pub mod why;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Notify, Semaphore, broadcast, mpsc, oneshot, watch as values};
use tokio::task::JoinHandle;

use crate::drain::Signal;
use crate::engine::autoscaler::Policy;
use crate::engine::handover::OpenExport;
use crate::engine::model::*;
use crate::engine::scaling::Growth;
use crate::engine::{self, Engine};
use crate::error::{Error, Kind as ErrorKind};
use crate::metrics::snapshot::Holds;
use crate::metrics::{Metrics, cause_word, health_word, state_word};
use crate::provision::{DaemonSpec, Endpoint, Note, Observation};
use about::About;
use journal::{Entry, Happened, Journal};
pub use lease::Lease;
use shared::{Hold, Shared};
use status::{DaemonStatus, QueueStatus, Status};
use tally::Tallies;
pub use tally::Tally;
use ticket::Answer;
pub use ticket::Ticket;

/// A container has 10 s, or what its `--stop-timeout` says, before dockerd kills it.
const STOP_DEADLINE: Duration = Duration::from_secs(120);

/// By how much the engine's clock is ahead: what another proxy tells of may be older than this process.
const BEFORE: Time = crate::config::MAX_DURATION;

/// How the pool watches its daemons.
#[derive(Debug, Clone)]
pub struct Config {
    /// What the engine is told.
    pub engine: engine::Config,
    /// Slots of each daemon; `None` derives them from what it says of itself.
    pub slots: Option<u32>,
    /// Whether containers that nobody attends for [`engine::Config::container_lease`] are stopped, or only told of.
    pub stop_overdue: bool,
    /// Time between two probes of a daemon that is well.
    pub probe_interval: Duration,
    /// How long a probe may take: a frozen daemon still accepts TCP.
    pub probe_deadline: Duration,
    /// How many daemons there are to be, where a provisioner can make them.
    pub scale: Policy,
    /// Whether the autoscaler changes their number, or only tells it.
    pub scaler: bool,
    /// How many bytes after connect a daemon's answer to a connection attempt may take.
    pub connect_deadline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            engine: engine::Config::default(),
            slots: None,
            scale: Policy::default(),
            scaler: true,
            stop_overdue: false,
            // Together: a frozen daemon is out within 5 s, two deadlines after the probe that meets it.
            probe_interval: Duration::from_millis(1500),
            probe_deadline: Duration::from_millis(1500),
            connect_deadline: Duration::from_secs(5),
        }
    }
}

/// A daemon as the proxy uses it.
#[derive(Debug)]
pub struct Handle {
    /// Its name.
    pub id: DaemonId,
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Where connections from its containers come from.
    pub source_ips: Vec<IpAddr>,
    /// The cgroup above those of its containers, if it is known.
    pub cgroup: Option<String>,
    /// Probe it now: a request has just failed.
    wake: Notify,
    /// Probe it deeply now.
    deep: Notify,
    /// List its images now.
    relist: Notify,
    /// When listing its images has failed last, if that was the last time.
    unlisted: Mutex<Option<Instant>>,
    /// It was met: look for what deep probes have left on it.
    sweep: Notify,
    /// What deep probes have made and was still there at the last look, and since when.
    leftovers: Mutex<BTreeMap<deep::Made, tokio::time::Instant>>,
    /// When it could last not be told whether it shares its data root, if that was the last time.
    unsure: Mutex<Option<Instant>>,
    about: Mutex<Option<Arc<About>>>,
    /// It was met: look what its data amounts to.
    survey: Notify,
    /// What was found.
    holds: Mutex<Holds>,
    /// Where its data is, by its own word.
    root: Mutex<Option<PathBuf>>,
    /// Probes in a row that had no answer, and when the first of them was given up.
    silence: Mutex<Option<(Instant, u32)>>,
    /// Breaks every stream to it that is open.
    cut: Mutex<Signal>,
    /// What is on it has been listed once, or nobody was there.
    met: AtomicBool,
}

/// So many probes in a row without an answer, and nobody should wait for this daemon: one more than eject it.
const SILENT: u32 = 3;

impl Handle {
    /// Since when the daemon answers nothing, if it has been asked often enough to be sure. It may have accepted
    /// connections all the while: a frozen one does.
    pub fn silent_since(&self) -> Option<Instant> {
        lock(&self.silence).filter(|(_, probes)| *probes >= SILENT).map(|(since, _)| since)
    }

    /// What a stream that begins now watches.
    fn cut(&self) -> Signal {
        lock(&self.cut).clone()
    }

    /// Breaks every stream that is open; later ones are not concerned.
    fn break_streams(&self) {
        std::mem::take(&mut *lock(&self.cut)).give();
    }
}

/// What the proxy wants of the pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Want {
    /// Whose request it is.
    pub key: SessionKey,
    /// Who waits.
    pub tenant: Tenant,
    /// The key of the client's source, when `key` is an explicit one.
    pub source: Option<SessionKey>,
    /// The daemon that the client itself runs on.
    pub inside: Option<DaemonId>,
    /// Whether names of what other sessions made mean anything to it.
    pub shares_names: bool,
    /// What kind of request it is.
    pub class: Class,
    /// The object in its path.
    pub target: Option<ObjectRef>,
    /// What the daemon must have.
    pub requirements: Requirements,
}

impl Want {
    fn acquire(&self, request: RequestId) -> Acquire {
        Acquire {
            request,
            key: self.key.clone(),
            tenant: self.tenant.clone(),
            source: self.source.clone(),
            inside: self.inside.clone(),
            shares_names: self.shares_names,
            class: self.class,
            target: self.target.clone(),
            requirements: self.requirements.clone(),
            deadline: None,
        }
    }
}

/// An acquisition without an answer.
struct Waiting {
    answer: oneshot::Sender<Answer>,
    key: SessionKey,
    tenant: Tenant,
    /// What was wanted, where other proxies may have to know it.
    want: Option<Arc<Want>>,
}

struct State {
    engine: Engine,
    daemons: BTreeMap<DaemonId, Member>,
    /// Acquisitions without an answer.
    waiting: HashMap<RequestId, Waiting>,
    /// Where this is one proxy of several.
    shared: Option<Box<Shared>>,
    /// The last `/version` and ping headers of any daemon: clients negotiate also while none is there.
    about: Option<Arc<About>>,
    observed: Vec<DaemonSpec>,
    /// How many there are to be, as the provisioner said last.
    made: scaler::Made,
    /// What the autoscaler decided last, if there is one.
    scaler: Option<scaler::ScalerStatus>,
    /// What the engine was told of it last.
    growth: Growth,
    /// The provisioner has said something.
    observing: bool,
    problems: Vec<String>,
    next_request: u64,
}

struct Member {
    handle: Arc<Handle>,
    watch: JoinHandle<()>,
    /// What it gave as its engine id last.
    engine_id: String,
    /// It is the same daemon as this other one, listed twice.
    alias_of: Option<DaemonId>,
}

/// What a ticket is answered with. The daemon and its cut signal are those of the moment of the grant: by the time
/// that the ticket's task looks, the daemon may be gone, or its streams have been broken, and that one concerns it.
#[derive(Debug)]
struct Granted {
    hold: Hold,
    lease: Option<LeaseId>,
    fresh: bool,
    daemon: Arc<Handle>,
    cut: Signal,
}

/// The pool.
pub struct Pool {
    /// Replaced as a whole by a reload.
    config: RwLock<Arc<Config>>,
    state: Mutex<State>,
    metrics: Metrics,
    origin: Instant,
    ticked: Notify,
    /// A drain has ended, or its daemon has gone.
    drain_ended: Notify,
    /// Every daemon that is there has been listed once: from then on, what is known is all there is.
    acquainted: AtomicBool,
    met: Notify,
    lookups: Semaphore,
    nowhere: Mutex<lookup::Nowhere>,
    next_log: AtomicU64,
    /// Clients that wait for the first daemon and are no work yet.
    newcomers: AtomicU32,
    /// What is to be told of the pool elsewhere.
    words: Mutex<Vec<Note>>,
    /// What the requests of each lease have come to. Locked for a moment.
    tallies: Tallies,
    /// What happened lately. Locked last, and for a moment.
    journal: Mutex<Journal>,
    /// This is one proxy of several.
    several: AtomicBool,
    /// The number of this process's tenure, where there are several and this one admits.
    tenures: values::Sender<Option<u64>>,
    /// It is connected to the one that admits.
    welcomed: values::Sender<bool>,
    /// There is something to tell to the one that admits.
    outgoing: Notify,
    /// Daemons whose streams are broken, for those that others relay.
    cuts: broadcast::Sender<DaemonId>,
}

impl Pool {
    /// An empty pool. `seed` decides ties.
    pub fn new(config: Config, metrics: Metrics, seed: u64) -> Arc<Self> {
        Arc::new(Pool {
            state: Mutex::new(State {
                engine: Engine::new(config.engine.clone(), seed),
                daemons: BTreeMap::new(),
                waiting: HashMap::new(),
                shared: None,
                about: None,
                observed: Vec::new(),
                made: scaler::Made::default(),
                scaler: None,
                growth: Growth::default(),
                observing: false,
                problems: Vec::new(),
                next_request: 0,
            }),
            config: RwLock::new(Arc::new(config)),
            metrics,
            origin: Instant::now(),
            ticked: Notify::new(),
            drain_ended: Notify::new(),
            acquainted: AtomicBool::new(false),
            met: Notify::new(),
            lookups: Semaphore::new(lookup::LOOKUPS),
            nowhere: Mutex::default(),
            next_log: AtomicU64::new(0),
            newcomers: AtomicU32::new(0),
            words: Mutex::default(),
            tallies: Tallies::default(),
            journal: Mutex::default(),
            several: AtomicBool::new(false),
            tenures: values::Sender::new(None),
            welcomed: values::Sender::new(false),
            outgoing: Notify::new(),
            cuts: broadcast::Sender::new(64),
        })
    }

    /// Takes in what the provisioner observes, and lets time pass. A provisioner that ends leaves the last known
    /// pool serving.
    pub async fn run(self: Arc<Self>, mut observations: mpsc::Receiver<Observation>) {
        let mut observing = true;
        loop {
            let due = self.lock().engine.next_tick().map(|at| self.origin + at.saturating_sub(BEFORE));
            let sleep = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                observation = observations.recv(), if observing => match observation {
                    Some(observation) => self.observe(observation),
                    None => {
                        tracing::error!("the provisioner has ended: the pool stays as it is");
                        observing = false;
                    }
                },
                () = sleep => self.event(Event::Tick),
                () = self.ticked.notified() => {}
            }
        }
    }

    /// Watches nothing any more: the daemons are about to be stopped, and that is no failure of theirs.
    pub fn stop(&self) {
        for member in self.lock().daemons.values() {
            member.watch.abort();
        }
    }

    /// Asks for a daemon for one request: the only way from the proxy to the engine. The ticket has its lease at
    /// once, or waits in the queue; dropped, it has left the queue.
    pub async fn acquire(self: &Arc<Self>, want: &Want) -> Ticket {
        // The one that admits finds it.
        if self.admits() {
            if self.is_shared() {
                self.opened().await;
            }
            self.find(want).await;
            if want.requirements.image.is_some() {
                self.refresh_images().await;
            }
        }
        Ticket::new(self, want)
    }

    /// Asks the engine. To be called where this process admits.
    fn enter(
        &self,
        state: &mut State,
        want: &Want,
        shared: Option<Arc<Want>>,
    ) -> (RequestId, oneshot::Receiver<Answer>) {
        let (answer, answered) = oneshot::channel();
        state.next_request += 1;
        let request = RequestId(state.next_request);
        let (key, tenant) = (want.key.clone(), want.tenant.clone());
        state.waiting.insert(request, Waiting { answer, key, tenant, want: shared });
        self.handle(state, Event::Acquire(want.acquire(request)));
        (request, answered)
    }

    /// The daemon, if any, whose containers' connections come from `ip`.
    pub fn inside(&self, ip: IpAddr) -> Option<DaemonId> {
        let state = self.lock();
        state.daemons.values().find(|m| m.handle.source_ips.contains(&ip)).map(|m| m.handle.id.clone())
    }

    /// The daemon, if any, in one of whose containers this process of the machine runs.
    pub fn inside_process(&self, pid: i32) -> Option<DaemonId> {
        let parents: Vec<(String, DaemonId)> = {
            let state = self.lock();
            let handles = state.daemons.values().map(|m| &m.handle);
            handles.filter_map(|h| Some((format!("/{}/", h.cgroup.as_ref()?), h.id.clone()))).collect()
        };
        if parents.is_empty() {
            return None;
        }
        let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        parents.into_iter().find(|(parent, _)| cgroups.contains(parent)).map(|(_, id)| id)
    }

    /// The API range that the pool advertises, and what its daemons (the session's own, if it is bound) say of
    /// themselves. `None` until a daemon has answered.
    pub fn about(&self, key: Option<&SessionKey>) -> Option<(ApiVersion, ApiVersion, Arc<About>)> {
        let state = self.lock();
        let (min, max) = state.engine.api_range()?;
        let own = key.and_then(|key| state.engine.home(key)).and_then(|id| state.daemons.get(id));
        let own = own.and_then(|m| lock(&m.handle.about).clone());
        let about = own.or_else(|| state.about.clone())?;
        Some((min, max, about))
    }

    /// Whether nobody may join the queue, except sessions that have their daemon already.
    pub fn refuses(&self, key: &SessionKey) -> bool {
        let state = self.lock();
        state.engine.queue_is_full() && state.engine.session(key).is_none_or(|s| s.lease().is_none())
    }

    /// Whether the queue is full: then it matters whose ping it is.
    pub fn queue_is_full(&self) -> bool {
        self.lock().engine.queue_is_full()
    }

    /// Whether a daemon is on its way that work may wait for. Only the one that admits knows that.
    pub fn expects_room(&self) -> bool {
        let state = self.lock();
        let asks = state.shared.as_ref().is_some_and(|shared| !shared.admits());
        asks || state.engine.expects_room()
    }

    /// How many daemons are watched.
    pub fn size(&self) -> usize {
        self.lock().daemons.len()
    }

    /// Whether no daemon has come up yet, or none is left.
    pub fn has_nobody(&self) -> bool {
        self.lock().engine.daemons().all(|d| d.state == engine::model::State::Starting)
    }

    /// Whether at least one daemon takes sessions.
    pub fn is_ready(&self) -> bool {
        self.lock().engine.daemons().any(|d| d.takes_sessions())
    }

    /// Whether clients are to be sent here. Where the number of daemons can be changed, also while none takes sessions:
    /// who comes makes the pool grow from nothing, waits, or hears why nobody comes, and without him nobody would.
    pub fn is_open(&self) -> bool {
        let state = self.lock();
        state.made.replicas.is_some() || state.engine.daemons().any(|d| d.takes_sessions())
    }

    /// The pool now.
    pub fn status(&self) -> Status {
        let now = self.now();
        let state = self.lock();
        let version = |v: ApiVersion| format!("{}.{}", v.0, v.1);
        let tickets = status::tickets(&state.engine, now);
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            api: state.engine.api_range().map(|(min, max)| (version(min), version(max))),
            daemons: state
                .engine
                .daemons()
                .map(|d| DaemonStatus {
                    id: d.id.to_string(),
                    address: state
                        .daemons
                        .get(&d.id)
                        .map(|m| m.handle.endpoint.to_string())
                        .unwrap_or_default(),
                    state: d.state,
                    health: d.shown_health(),
                    reason: d.why(),
                    cordoned: d.cordon.is_some(),
                    cordon: d.cordon.as_ref().map(|c| cordon::status(c, now)),
                    version: d.facts.as_ref().map(|f| f.version.clone()).unwrap_or_default(),
                    slots: d.slots,
                    used: d.used,
                    strangers: d.strangers(),
                    refused: d.refused().is_some(),
                    sessions: d.sessions.len(),
                    open_slots: d.capacity(),
                    back_off: d.back_off().as_secs_f64(),
                    latency: d.latency().map(|l| l.as_secs_f64()),
                })
                .collect(),
            sessions: state
                .engine
                .sessions()
                .filter_map(|(key, s)| status::session(&state.engine, key, s, now))
                .collect(),
            queue: QueueStatus {
                waiting: u32::try_from(tickets.len()).unwrap_or(u32::MAX),
                limit: self.config().engine.queue_limit,
                tickets,
            },
            scaler: state.scaler.clone(),
            lease: self.lease_status(&state),
            problems: state.problems.iter().cloned().chain(state.engine.alarms()).collect(),
            images: state.engine.image_count(),
        }
    }

    /// The metrics that this pool counts on.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// How the pool was configured.
    pub fn config(&self) -> Arc<Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Behaves as `config` says from now on.
    pub fn configure(self: &Arc<Self>, config: Config) {
        let engine = Box::new(config.engine.clone());
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        let mut state = self.lock();
        self.handle(&mut state, Event::Configured(engine));
        self.reconcile(&mut state);
    }

    /// A number for the next request's log line and error message.
    pub fn next_log_id(&self) -> u64 {
        self.next_log.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn now(&self) -> Time {
        BEFORE + self.origin.elapsed()
    }

    /// A moment on the engine's clock.
    fn time(&self, at: Instant) -> Time {
        BEFORE + at.saturating_duration_since(self.origin)
    }

    /// The one lock. A poisoned one is used on: a panic in one connection is that connection's end only, and
    /// the engine's own checks are what guards its state.
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn event(&self, event: Event) {
        let mut state = self.lock();
        self.handle(&mut state, event);
    }

    /// Hands an event to the engine and carries out what comes of it.
    fn handle(&self, state: &mut State, event: Event) {
        self.expire(state);
        let due = state.engine.next_tick();
        for effect in state.engine.handle(event, self.now()) {
            self.carry_out(state, effect);
        }
        let next = state.engine.next_tick();
        if next.is_some_and(|next| due.is_none_or(|due| next < due)) {
            self.ticked.notify_one();
        }
    }

    fn carry_out(&self, state: &mut State, effect: Effect) {
        match effect {
            Effect::Granted { request, open, daemon, lease, fresh } => {
                let waiting = state.waiting.remove(&request);
                let handle = state.daemons.get(&daemon).map(|m| m.handle.clone());
                let back = match (waiting, handle) {
                    (Some(Waiting { answer, want, .. }), Some(daemon)) => {
                        let cut = daemon.cut();
                        let hold = match (&mut state.shared, want) {
                            (Some(shared), Some(want)) => {
                                let (acquire, id) = (want.acquire(request), daemon.id.clone());
                                let number = shared.number();
                                shared.grant(
                                    number,
                                    Some(open),
                                    OpenExport::of(&acquire, open, id, lease.is_some()),
                                )
                            }
                            _ => Hold::Open(open),
                        };
                        let granted = Granted { hold, lease, fresh, daemon, cut };
                        let gone = answer.send(Answer::Granted(granted)).is_err();
                        if let (true, Hold::Stream(number), Some(shared)) = (gone, hold, &mut state.shared) {
                            shared.forget(number);
                        }
                        gone.then_some(Outcome::ClientGone)
                    }
                    // The engine knows no daemon that the pool does not.
                    (Some(Waiting { answer, .. }), None) => {
                        let gone = Refusal::SessionLost(format!("daemon {daemon} has gone"));
                        let _ = answer.send(Answer::Refused(gone));
                        Some(Outcome::Unreached)
                    }
                    (None, _) => Some(Outcome::ClientGone),
                };
                if let Some(outcome) = back {
                    // Nobody will use it: give it straight back.
                    for effect in state.engine.handle(Event::Release { open, outcome }, self.now()) {
                        self.carry_out(state, effect);
                    }
                }
            }
            Effect::Refused { request, refusal } => {
                if let Some(waiting) = state.waiting.remove(&request) {
                    self.metrics.turned_away(waiting.tenant.as_str(), &refusal);
                    if let Some(entry) = journal::refusal(&refusal) {
                        self.record(entry.of(&waiting.key).by(&waiting.tenant));
                    }
                    let _ = waiting.answer.send(Answer::Refused(refusal));
                }
            }
            Effect::Attached { .. } => {}
            Effect::Queued { key, tenant, awaited, .. } => {
                self.metrics.queued(tenant.as_str());
                tracing::info!(session = %key, %tenant, "waits for a free daemon");
                let entry = Entry::new(Happened::Waits, format!("waits for {awaited}"));
                self.record(entry.of(&key).by(&tenant));
            }
            Effect::Admitted { tenant, waited, .. } => {
                self.metrics.admitted(tenant.as_str(), waited);
            }
            Effect::LeaseStarted { key, lease, daemon } => {
                self.metrics.leases.inc();
                self.tallies.begin(lease);
                let session = state.engine.session(&key);
                let tenant = session.map(|s| tracing::field::display(&s.tenant));
                tracing::info!(session = %key, tenant, lease = lease.number, %daemon, "session bound");
                let why = session.and_then(|s| s.home.as_ref()?.why.clone());
                let message = why.map_or_else(|| "bound".into(), |why| format!("bound: {}", why.because));
                self.record(Entry::new(Happened::Bound, message).on(&daemon).of(&key));
            }
            Effect::LeaseEnded { key, tenant, lease, daemon, lasted, lost } => {
                let seconds = lasted.as_secs_f64();
                let Tally { requests, waited, up, down } = self.tallies.end(lease);
                let waited_ms = waited.as_millis() as u64;
                let (kind, message) = if lost {
                    self.metrics.leases_lost.inc();
                    tracing::warn!(
                        session = %key, %tenant, lease = lease.number, %daemon, requests, waited_ms, seconds, up, down,
                        outcome = "lost", "session lost"
                    );
                    (Happened::Lost, "its daemon has gone, and everything on it".to_string())
                } else {
                    tracing::info!(
                        session = %key, %tenant, lease = lease.number, %daemon, requests, waited_ms, seconds, up, down,
                        outcome = "done", "lease ended"
                    );
                    (Happened::Ended, format!("nothing of it was left after {seconds:.0} s"))
                };
                self.record(Entry::new(kind, message).on(&daemon).of(&key).by(&tenant));
            }
            Effect::Built { key, tenant, daemon, outcome, lasted } => {
                let message =
                    format!("build {} after {:.1} s", journal::ended(outcome), lasted.as_secs_f64());
                self.record(Entry::new(Happened::Built, message).on(&daemon).of(&key).by(&tenant));
            }
            Effect::Overdue { key, containers, again } => {
                if !again {
                    self.metrics.leases_overdue.inc();
                }
                let admits = state.shared.as_ref().is_none_or(|shared| shared.admits());
                let stop = self.config().stop_overdue && admits;
                let n = containers.len();
                tracing::warn!(session = %key, containers = n, stop, "nobody attends its containers");
                let what = if stop { "; they are stopped" } else { "" };
                let message = format!("nobody attends its {n} containers{what}");
                self.record(Entry::new(Happened::Overdue, message).of(&key));
                if stop {
                    let handle = |(id, container): (DaemonId, String)| {
                        Some((state.daemons.get(&id)?.handle.clone(), container))
                    };
                    tokio::spawn(stop_containers(containers.into_iter().filter_map(handle).collect()));
                }
            }
            Effect::Cordoned { .. }
            | Effect::Uncordoned { .. }
            | Effect::Draining { .. }
            | Effect::Drained { .. } => self.cordon_changed(state, effect),
            Effect::ProbeDeeply { daemon } => {
                if let Some(member) = state.daemons.get(&daemon) {
                    member.handle.deep.notify_one();
                }
            }
            Effect::Ejected { cause, .. } => {
                self.metrics.ejections.with_label_values(&[cause_word(cause)]).inc();
            }
            Effect::Emptied { daemon } => {
                tracing::warn!(%daemon, "the daemon came back without anything that was on it");
                let message = "it came back without anything that was on it";
                self.record(Entry::new(Happened::Emptied, message).on(&daemon));
            }
            Effect::SharesData { daemon, with } => {
                self.metrics.shared_roots.inc();
                tracing::error!(
                    %daemon, %with,
                    "two daemons share one data root, which destroys what is in it: neither gets new sessions"
                );
            }
            Effect::DaemonChanged { daemon, state: is, health, reason } => {
                let became = match (is, health) {
                    (engine::model::State::Ready, Health::Ejected) => "ejected",
                    _ => state_word(is),
                };
                self.metrics.transitions.with_label_values(&[became]).inc();
                let (word, health) = (state_word(is), health_word(health));
                let misfit = state.engine.daemons().any(|d| d.id == daemon && d.misfit.is_some());
                let kind = match (became, is) {
                    _ if misfit => Happened::Misfit,
                    ("ejected", _) => Happened::Ejected,
                    (_, engine::model::State::Ready) => Happened::Ready,
                    (_, engine::model::State::Starting) => Happened::Starting,
                    (_, engine::model::State::Draining) => Happened::Leaving,
                    (_, engine::model::State::Gone) => Happened::Gone,
                };
                let message = if reason.is_empty() { "takes sessions" } else { &reason };
                self.record(Entry::new(kind, message).on(&daemon));
                if became == "ready" {
                    tracing::info!(%daemon, state = word, health, "daemon ready");
                } else if misfit {
                    // Nothing but a change of the pool ends this, so somebody must hear of it.
                    tracing::error!(%daemon, state = word, health, reason, "daemon refused");
                } else {
                    tracing::warn!(%daemon, state = word, health, reason, "daemon {became}");
                }
            }
        }
    }

    fn observe(self: &Arc<Self>, mut observation: Observation) {
        let mut state = self.lock();
        if let Some(alarm) = observation.alarm.take() {
            if !state.problems.contains(&alarm) {
                self.metrics.wrong_removals.inc();
                self.tell("WrongPodRemoved", true, alarm.clone());
            }
            observation.problems.push(alarm);
        }
        for problem in &observation.problems {
            if !state.problems.contains(problem) {
                tracing::warn!("{problem}");
                self.record(Entry::new(Happened::Problem, problem.as_str()));
            }
        }
        state.problems = observation.problems;
        if observation.blind {
            return;
        }
        state.observed = observation.daemons;
        state.observing = true;
        state.made = scaler::Made {
            confirmed: Some(self.now()),
            replicas: observation.replicas,
            rollout: observation.rollout,
        };
        self.reconcile(&mut state);
        drop(state);
        self.met.notify_waiters();
    }

    /// Brings the watches and the engine in line with what was observed last, aliases left out.
    fn reconcile(self: &Arc<Self>, state: &mut State) {
        let specs = state.observed.clone();
        let gone: Vec<DaemonId> = state
            .daemons
            .iter()
            .filter(|(id, member)| {
                // Another address under the same name is another daemon.
                let at = Some(&member.handle.endpoint);
                !specs.iter().any(|s| s.id == id.as_str() && s.endpoint.as_ref() == at)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            if let Some(member) = state.daemons.remove(&id) {
                member.watch.abort();
            }
            // Its aliases stand for themselves again.
            for member in state.daemons.values_mut().filter(|m| m.alias_of.as_ref() == Some(&id)) {
                member.alias_of = None;
                // The engine does not know them yet: what is on them must be listed anew.
                member.watch.abort();
                member.watch = tokio::spawn(watch::watch(self.clone(), member.handle.clone()));
            }
        }
        for spec in &specs {
            let id = DaemonId::from(spec.id.as_str());
            // One that has no address yet cannot be watched.
            let Some(endpoint) = spec.endpoint.clone().filter(|_| !state.daemons.contains_key(&id)) else {
                continue;
            };
            let handle = Arc::new(Handle {
                id: id.clone(),
                endpoint,
                source_ips: spec.source_ips.clone(),
                cgroup: spec.cgroup.clone(),
                wake: Notify::new(),
                deep: Notify::new(),
                relist: Notify::new(),
                unlisted: Mutex::new(None),
                unsure: Mutex::new(None),
                sweep: Notify::new(),
                leftovers: Mutex::default(),
                about: Mutex::new(None),
                survey: Notify::new(),
                holds: Mutex::default(),
                root: Mutex::new(None),
                silence: Mutex::new(None),
                cut: Mutex::default(),
                met: AtomicBool::new(false),
            });
            let watch = tokio::spawn(watch::watch(self.clone(), handle.clone()));
            state.daemons.insert(id, Member { handle, watch, engine_id: String::new(), alias_of: None });
        }
        let slots = self.config().slots;
        let observed = specs
            .iter()
            .filter(|spec| {
                let member = state.daemons.get(&DaemonId::from(spec.id.as_str()));
                member.map_or(spec.endpoint.is_none(), |m| m.alias_of.is_none())
            })
            .map(|spec| Observed {
                id: spec.id.as_str().into(),
                draining: spec.draining,
                pending: spec.pending.clone(),
                slots: slots.or(spec.slots),
            })
            .collect();
        self.handle(state, Event::Observed(observed));
    }

    /// Lists the images of daemons where BuildKit builds have ended, before a request goes by an image's name.
    async fn refresh_images(self: &Arc<Self>) {
        let stale: Vec<Arc<Handle>> = {
            let state = self.lock();
            // One that does not answer would hold every request that names an image.
            let well =
                |id: &DaemonId| state.engine.daemons().any(|d| d.id == *id && d.health == Health::Healthy);
            let stale = state.engine.stale_images().into_iter().filter(well);
            let handles = stale.filter_map(|id| state.daemons.get(&id).map(|m| m.handle.clone()));
            handles.filter(|handle| watch::lists_quickly(handle)).collect()
        };
        let mut lists = tokio::task::JoinSet::new();
        for handle in stale {
            let pool = self.clone();
            lists.spawn(async move { watch::list_images(&pool, &handle, watch::QUICK_LIST_DEADLINE).await });
        }
        while lists.join_next().await.is_some() {}
    }

    /// The `/version` document of a daemon became known.
    fn know(&self, handle: &Handle, about: About) {
        let about = Arc::new(about);
        *lock(&handle.about) = Some(about.clone());
        self.lock().about = Some(about);
    }
}

/// Stops containers as `docker stop` does. Events tell when they have exited.
async fn stop_containers(containers: Vec<(Arc<Handle>, String)>) {
    for (handle, id) in containers {
        let path = format!("/containers/{id}/stop");
        let stop = client::call(&handle.endpoint, Method::POST, &path, None);
        match tokio::time::timeout(STOP_DEADLINE, stop).await {
            // 304: it has exited meanwhile; 404: it is gone.
            Ok(Ok(r)) if r.status().is_success() || matches!(r.status().as_u16(), 304 | 404) => {
                tracing::warn!(daemon = %handle.id, container = id, "stopped: nobody attended it");
            }
            Ok(Ok(r)) => {
                tracing::error!(daemon = %handle.id, container = id, status = r.status().as_u16(), "cannot be stopped")
            }
            Ok(Err(error)) => {
                tracing::error!(daemon = %handle.id, container = id, "cannot be stopped: {error}")
            }
            Err(_) => tracing::error!(daemon = %handle.id, container = id, "cannot be stopped: no answer"),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refused(refusal: Refusal) -> Error {
    match refusal {
        Refusal::NoDaemon(message) => Error::new(ErrorKind::NoDaemon, message),
        Refusal::ApiVersion(message) => Error::new(ErrorKind::BadRequest, message),
        Refusal::Ambiguous(message) | Refusal::NotFound(message) => Error::new(ErrorKind::NotFound, message),
        Refusal::QueueFull(message) | Refusal::TenantFull(message) | Refusal::LongestWait(message) => {
            Error::new(ErrorKind::QueueFull, message)
        }
        Refusal::SessionLost(message) => Error::new(ErrorKind::SessionLost, message),
    }
}

/// `/version` as the pool answers it: what a daemon says, with the pool's own API range (docker-py and bollard
/// negotiate there).
pub fn rewrite_version(version: &Value, min: ApiVersion, max: ApiVersion) -> Value {
    let mut version = if version.is_object() { version.clone() } else { serde_json::json!({}) };
    let (min, max) = (format!("{}.{}", min.0, min.1), format!("{}.{}", max.0, max.1));
    version["ApiVersion"] = Value::from(max.clone());
    version["MinAPIVersion"] = Value::from(min.clone());
    if let Some(components) = version["Components"].as_array_mut() {
        let engines = components.iter_mut().filter(|c| c["Name"] == "Engine" && c["Details"].is_object());
        for component in engines {
            component["Details"]["ApiVersion"] = Value::from(max.clone());
            component["Details"]["MinAPIVersion"] = Value::from(min.clone());
        }
    }
    version
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Arc<Pool> {
        Pool::new(Config::default(), Metrics::new(prometheus::Registry::new()).unwrap(), 1)
    }

    /// Daemons that nobody is.
    fn observe(pool: &Arc<Pool>, ids: &[&str]) {
        let spec = |id: &&str| DaemonSpec {
            id: id.to_string(),
            endpoint: Some(Endpoint::Unix(format!("/nonexistent/{id}").into())),
            source_ips: Vec::new(),
            cgroup: None,
            draining: false,
            pending: None,
            faulty: false,
            removal: Default::default(),
            slots: None,
        };
        pool.observe(Observation {
            daemons: ids.iter().map(spec).collect(),
            problems: Vec::new(),
            ..Observation::default()
        });
    }

    fn ids(pool: &Pool) -> Vec<String> {
        pool.status().daemons.into_iter().map(|d| d.id).collect()
    }

    fn handle(pool: &Pool, id: &str) -> Arc<Handle> {
        pool.lock().daemons[&DaemonId::from(id)].handle.clone()
    }

    #[tokio::test]
    async fn of_two_names_of_one_daemon_one_stays() {
        let pool = pool();
        observe(&pool, &["a", "b"]);
        // Both found each other at the same time.
        pool.alias(&handle(&pool, "a"), &"b".into());
        pool.alias(&handle(&pool, "b"), &"a".into());
        assert_eq!(ids(&pool), ["b"]);
        // The one behind the other name is another daemon now.
        pool.distinct(&handle(&pool, "a"));
        assert_eq!(ids(&pool), ["a", "b"]);
        pool.alias(&handle(&pool, "a"), &"b".into());
        observe(&pool, &["a"]);
        assert_eq!(ids(&pool), ["a"], "its other name has gone");
    }

    /// A build is granted on a daemon that is said to be well, and its task has not looked yet.
    async fn granted(pool: &Arc<Pool>) -> Ticket {
        observe(pool, &["a"]);
        let facts = Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() };
        pool.event(Event::Probed { daemon: "a".into(), probe: Probe::Answered(facts) });
        let want = Want {
            key: "ip:1".into(),
            tenant: "default".into(),
            source: None,
            inside: None,
            shares_names: true,
            class: Class::Work(Work::Build),
            target: None,
            requirements: Requirements::default(),
        };
        pool.acquire(&want).await
    }

    #[tokio::test]
    async fn a_daemon_that_goes_before_its_grant_is_looked_at_is_tried_and_then_another() {
        let pool = pool();
        let mut ticket = granted(&pool).await;
        observe(&pool, &[]);
        let lease =
            ticket.now().expect("it was granted").expect("no session is lost of which nothing was there");
        assert!(!lease.is_bound(), "it may be tried elsewhere");
        assert!(lease.connect().await.is_err());
        // The next one of that name has no part in it.
        observe(&pool, &["a"]);
        let facts = Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() };
        pool.event(Event::Probed { daemon: "a".into(), probe: Probe::Answered(facts) });
        lease.finish(Outcome::Unreached);
        assert!(pool.is_ready());
        pool.stop();
    }

    #[tokio::test]
    async fn streams_that_are_broken_are_those_that_were_granted_before() {
        let pool = pool();
        let mut ticket = granted(&pool).await;
        handle(&pool, "a").break_streams();
        let lease = ticket.now().expect("it was granted").expect("a lease");
        assert!(lease.cut().is_given());
        pool.stop();
    }

    #[tokio::test]
    async fn a_daemon_that_cannot_list_its_images_is_not_waited_for_again_at_once() {
        let pool = pool();
        observe(&pool, &["a"]);
        let handle = handle(&pool, "a");
        assert!(watch::lists_quickly(&handle));
        watch::list_images(&pool, &handle, watch::QUICK_LIST_DEADLINE).await;
        assert!(!watch::lists_quickly(&handle));
        // Its watch does it instead, without anybody waiting.
        handle.relist.notified().await;
    }

    #[tokio::test(start_paused = true)]
    async fn time_passes_although_the_provisioner_has_ended() {
        let pool = pool();
        observe(&pool, &["a"]);
        assert!(pool.expects_room());
        let (_, ended) = mpsc::channel(1);
        let running = tokio::spawn(pool.clone().run(ended));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(!running.is_finished());
        assert_eq!(ids(&pool), ["a"]);
        running.abort();
        pool.stop();
    }

    #[tokio::test]
    async fn clients_are_sent_to_a_pool_of_no_daemons_only_if_it_can_grow() {
        let pool = pool();
        assert!(!pool.is_open(), "nothing is known yet");
        pool.observe(Observation::default());
        assert!(!pool.is_open());
        pool.observe(Observation { replicas: Some(0), ..Observation::default() });
        assert!(pool.is_open() && !pool.is_ready());
        pool.observe(Observation { blind: true, ..Observation::default() });
        assert!(pool.is_open(), "the last known picture serves");
        pool.stop();
    }

    #[tokio::test]
    async fn a_panic_under_the_lock_leaves_the_pool_working() {
        let pool = pool();
        observe(&pool, &["a"]);
        let other = pool.clone();
        let panicked = std::thread::spawn(move || {
            let _held = other.lock();
            panic!("under the lock");
        });
        assert!(panicked.join().is_err() && pool.state.is_poisoned());
        observe(&pool, &["a", "b"]);
        assert_eq!(ids(&pool), ["a", "b"]);
        pool.stop();
    }

    #[test]
    fn nonsense_for_a_version_harms_nobody() {
        let rewrite = |v: Value| rewrite_version(&v, (1, 24), (1, 51));
        assert_eq!(rewrite(serde_json::json!([1]))["ApiVersion"], "1.51");
        let odd = serde_json::json!({"Components": [{"Name": "Engine", "Details": "x"}, 7]});
        assert_eq!(rewrite(odd)["MinAPIVersion"], "1.24");
    }
}
