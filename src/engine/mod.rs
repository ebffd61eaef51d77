//! Pure decisions: sessions, slots, health, balancing. One state machine, [`Engine::handle`]: an event and the
//! time go in, effects come out. There is no clock, no randomness and no I/O in here: time is passed in, the
//! seed is given at construction, events and effects are plain data. So the same code serves live requests, is
//! simulated from a seed, and is held against its invariants after every event in debug builds.

pub mod autoscaler;
mod balancer;
mod cordon;
mod daemon;
pub mod departure;
pub mod election;
mod expectation;
mod facts;
pub mod handover;
mod health;
pub mod images;
mod invariants;
pub mod marks;
mod members;
pub mod model;
mod objects;
mod placement;
mod queue;
pub mod reason;
#[cfg(test)]
mod rules;
pub mod scaling;
mod session;
#[cfg(any(test, fuzzing))]
pub(crate) mod simulation;
mod strangers;
mod versions;
mod warm;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use cordon::{Cordon, Drain};
pub use daemon::Daemon;
pub use expectation::Expectation;
use images::Images;
use model::*;
use objects::Objects;
use placement::Placement;
pub use queue::Waiting;
use reason::{Awaited, Why};
use session::Owned;
pub use session::{Home, Session};

/// What the engine is told once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// How long a lease outlives the last thing of its session that was open.
    pub grace: Time,
    /// How long a session keeps its last slot after its last unit of work: the next command of a script
    /// follows within seconds.
    pub linger: Time,
    /// How long a container that is never started counts as work.
    pub unstarted: Time,
    /// How long containers may run while nothing else of their session is under way.
    pub container_lease: Time,
    /// How long the former daemon of a session is preferred.
    pub memory: Time,
    /// How many sessions are known before those that are only remembered are forgotten, the oldest first. One
    /// takes about 1 KiB.
    pub remembered: usize,
    /// How long an unpushed image holds the session that made it to its daemon after its last request.
    pub image_hold: Time,
    /// How many tickets may wait. With 0 there is no queue: a full pool shares its least loaded daemon.
    pub queue_limit: usize,
    /// How many of them may be one tenant's.
    pub tenant_waiting: Option<usize>,
    /// How many slots one tenant may hold.
    pub tenant_slots: Option<u32>,
    /// How long a ticket may wait.
    pub max_wait: Time,
    /// How long a build waits for a daemon that has built its project while others have slots that nobody wants.
    pub warm_wait: Time,
    /// How long a daemon that has not answered yet is waited for, from when it was first observed.
    pub patience: Time,
    /// Failed probes in a row that eject a daemon.
    pub eject_after: u32,
    /// Good probes in a row that bring it back.
    pub recover_after: u32,
    /// Time between two deep probes of a daemon that is well; zero: there are none.
    pub deep_probe_interval: Time,
    /// One higher after each restart or hand-over.
    pub epoch: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            grace: Time::from_secs(300),
            linger: Time::from_secs(10),
            unstarted: Time::from_secs(60),
            container_lease: Time::from_secs(12 * 3600),
            memory: Time::from_secs(4 * 3600),
            remembered: 100_000,
            image_hold: Time::from_secs(12 * 3600),
            queue_limit: 1000,
            tenant_waiting: None,
            tenant_slots: None,
            max_wait: Time::from_secs(3600),
            warm_wait: Time::from_secs(60),
            patience: Time::from_secs(120),
            eject_after: 2,
            recover_after: 2,
            deep_probe_interval: Time::from_secs(60),
            epoch: 1,
        }
    }
}

/// Between two times at which it is told that nobody attends a session's containers: stopping them may have failed, or
/// was not wanted the time before.
const OVERDUE_AGAIN: Time = Time::from_secs(3600);

/// How an open request counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// It keeps the lease, and is no work.
    None,
    /// A build: a slot each.
    Build,
    /// Other work: one slot for all of it.
    Other,
}

impl Unit {
    /// What a request of this class is to a session that is bound by it.
    fn of(class: Class) -> Self {
        match class {
            Class::Work(Work::Build) => Unit::Build,
            Class::Work(_) => Unit::Other,
            _ => Unit::None,
        }
    }
}

/// A request or stream that was granted.
#[derive(Debug, Clone)]
struct Open {
    key: SessionKey,
    daemon: DaemonId,
    unit: Unit,
    /// The work that it started.
    work: Option<Work>,
    /// Whether its session counts it as open: a read of an unbound session has no session to count it.
    counted: bool,
    /// Whether images may come of it that only `/events` or a list will tell.
    builds: bool,
    /// The lease that it was granted under.
    lease: Option<LeaseId>,
    /// Whose objects come of it.
    tenant: Tenant,
    since: Time,
    /// A BuildKit session's uuid, known as long as this is open.
    uuid: Option<String>,
    /// Its daemon has gone, or is another one now: what it still says is of nothing that exists.
    orphan: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Session(SessionKey),
    Container(DaemonId, String),
    Ticket(RequestId),
    /// A build has waited long enough for a daemon that has built its project.
    Warm(RequestId),
    /// The patience with a daemon that starts is over.
    Patience(DaemonId),
    /// The deadline of a drain is over.
    Drain(DaemonId),
    /// Nobody has asked again whether a daemon may end.
    Leaving(DaemonId),
    /// A daemon's next deep probe.
    Deep(DaemonId),
    /// The next step of a daemon's slow start.
    SlowStart(DaemonId),
}

/// The state machine.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    random: balancer::Random,
    daemons: BTreeMap<DaemonId, Daemon>,
    /// Those whose drain waits for the end of their work.
    draining: BTreeSet<DaemonId>,
    /// Hashed, because keys are looked up several times for each request. So nothing that can be seen from
    /// outside may follow the order of this map.
    sessions: HashMap<SessionKey, Session>,
    /// Sessions with a lease, by the source that they come from.
    sources: HashMap<SessionKey, BTreeSet<SessionKey>>,
    opens: HashMap<OpenId, Open>,
    objects: Objects,
    images: Images,
    timers: BTreeSet<(Time, Timer)>,
    queue: queue::Queue,
    held: session::Held,
    warm: warm::Warm,
    growth: scaling::Growth,
    holds: expectation::Holds,
    /// An autoscaler tells whether anybody comes.
    scaled: bool,
    range: Option<(ApiVersion, ApiVersion)>,
    /// Collected while one event is handled.
    effects: Vec<Effect>,
    next_open: u64,
    next_lease: u64,
}

impl Engine {
    /// An engine without daemons. `seed` decides ties.
    pub fn new(config: Config, seed: u64) -> Self {
        Engine {
            config,
            random: balancer::Random::new(seed),
            daemons: BTreeMap::new(),
            draining: BTreeSet::new(),
            sessions: HashMap::new(),
            sources: HashMap::new(),
            opens: HashMap::new(),
            objects: Objects::default(),
            images: Images::default(),
            timers: BTreeSet::new(),
            queue: queue::Queue::default(),
            held: session::Held::default(),
            warm: warm::Warm::default(),
            growth: scaling::Growth::default(),
            holds: expectation::Holds::default(),
            scaled: false,
            range: None,
            effects: Vec::new(),
            next_open: 0,
            next_lease: 0,
        }
    }

    /// The one entry: what happened, and when. Times never go back.
    pub fn handle(&mut self, event: Event, now: Time) -> Vec<Effect> {
        if self.is_of_one_let_go(&event) {
            return std::mem::take(&mut self.effects);
        }
        match event {
            Event::Acquire(acquire) => self.acquire(acquire, now),
            Event::Release { open, outcome } => self.release(open, outcome, now),
            Event::BuildSeen(open) => self.build_seen(open, now),
            Event::Learned { daemon, open, fact } => self.learned(&daemon, open, fact, now),
            Event::Probed { daemon, probe } => self.probed(&daemon, probe, now),
            Event::Timed { daemon, took } => self.timed(&daemon, took),
            Event::Wrote { daemon, result } => self.wrote(&daemon, result, now),
            Event::Shared { one, other } => self.share(&one, &other),
            Event::Distinct { one, other } => self.distinct(&one, &other),
            Event::Observed(observed) => self.observed(observed, now),
            Event::Replaced { daemon } => self.replaced(&daemon, now),
            Event::Inventory { daemon, began, inventory } => self.inventory(&daemon, began, inventory, now),
            Event::Containers { daemon, began, containers, projects } => {
                self.containers(&daemon, began, &containers, &projects, now);
            }
            Event::Images { daemon, began, images } => self.relist(&daemon, began, &images, now),
            Event::Abandon(request) => self.abandon(request),
            Event::Cordon { daemon, by } => self.cordon(&daemon, by),
            Event::Uncordon { daemon, by } => self.uncordon(&daemon, by),
            Event::Drain { daemon, deadline } => self.drain(&daemon, deadline),
            Event::Leaving { daemon, until } => self.leaving(&daemon, until),
            Event::LetGo { daemon } => self.let_go(&daemon, now),
            Event::Growth(growth) => self.growing(growth),
            Event::Configured(config) => self.configured(*config, now),
            Event::Retired => self.retire(),
            Event::Import { epoch, export } => self.import(epoch, &export, now),
            Event::Attach(opens) => opens.iter().for_each(|open| self.attach(open, now)),
            Event::Tick => self.tick(now),
        }
        self.advance_drains(now);
        self.admit_waiting(now);
        #[cfg(debug_assertions)]
        self.check_invariants();
        std::mem::take(&mut self.effects)
    }

    /// Other limits and times from now on. A ticket keeps the longest wait that it came with.
    fn configured(&mut self, config: Config, now: Time) {
        let (epoch, interval) = (self.config.epoch, self.config.deep_probe_interval);
        self.config = Config { epoch, ..config };
        if self.config.deep_probe_interval != interval {
            self.deep_probes_configured(now);
        }
        self.queue.changed = true;
        // A shorter grace may be over already.
        let mut keys: Vec<SessionKey> = self.sessions.keys().cloned().collect();
        keys.sort_unstable();
        keys.iter().for_each(|key| self.settle(key, now));
        if self.config.queue_limit == 0 {
            self.dissolve_queue(now);
        }
    }

    /// When [`Event::Tick`] is due next.
    pub fn next_tick(&self) -> Option<Time> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// All daemons.
    pub fn daemons(&self) -> impl Iterator<Item = &Daemon> {
        self.daemons.values()
    }

    /// All sessions that are bound, own something, or are remembered, in the order of their keys.
    pub fn sessions(&self) -> impl Iterator<Item = (&SessionKey, &Session)> {
        let mut sessions: Vec<_> = self.sessions.iter().collect();
        sessions.sort_unstable_by_key(|(key, _)| *key);
        sessions.into_iter()
    }

    /// Every session that has a lease, in no order: its tenant, and the slots that it holds.
    pub fn leased(&self) -> impl Iterator<Item = (&Tenant, u32)> {
        let leased = |s: &&Session| s.lease().is_some();
        self.sessions.values().filter(leased).map(|s| (&s.tenant, s.slots))
    }

    /// One session.
    pub fn session(&self, key: &SessionKey) -> Option<&Session> {
        self.sessions.get(key)
    }

    /// The API range that the pool promises: of the daemons that are there, or of the last that were.
    pub fn api_range(&self) -> Option<(ApiVersion, ApiVersion)> {
        self.range
    }

    /// The daemon that a session's calls go to, if it is bound.
    pub fn home(&self, key: &SessionKey) -> Option<&DaemonId> {
        self.sessions.get(key)?.bound_to()
    }

    /// Daemons where BuildKit builds have ended since their images were listed last. dockerd 20.10 has no
    /// event for an image that BuildKit made, and newer ones' events may still be on their way: a request that
    /// goes by an image's name lists these first.
    pub fn stale_images(&self) -> Vec<DaemonId> {
        self.daemons.values().filter(|d| d.builders.stale()).map(|d| d.id.clone()).collect()
    }

    /// Whether this object is known by its id: where it is, or that it went with its daemon.
    pub fn knows(&self, kind: Kind, id: &str) -> bool {
        self.objects.knows(kind, id)
    }

    /// How many image references the index knows.
    pub fn image_count(&self) -> usize {
        self.images.len()
    }

    fn acquire(&mut self, acquire: Acquire, now: Time) {
        let placement = self.place(&acquire);
        if self.must_wait(&acquire, &placement) {
            self.enqueue(acquire, &placement, now);
        } else {
            self.grant(acquire, placement, None, now);
        }
    }

    /// Carries out a placement. `wait` is how long the request waited, and for what.
    fn grant(&mut self, acquire: Acquire, placement: Placement, wait: Option<(Time, Awaited)>, now: Time) {
        let request = acquire.request;
        let (daemon, because, free) = match placement {
            Placement::Bind(daemon, because) => (daemon, Some(because), false),
            Placement::Route(daemon) => (daemon, None, false),
            Placement::Any(daemon) => (daemon, None, true),
            Placement::Refuse(refusal) => {
                self.effects.push(Effect::Refused { request, refusal });
                return;
            }
        };
        let Acquire { key, tenant, source, class, target, requirements, .. } = acquire;
        let bind = because.is_some();
        if let Some(because) = because {
            let (waited, awaited) = wait.unzip();
            let why = Why { because, waited: waited.unwrap_or_default(), awaited };
            self.bind(&key, &tenant, &daemon, Some(why), now);
            self.group(&key, source);
        }
        let unit = if bind { Unit::of(class) } else { Unit::None };
        let builds = handover::makes_images(class);
        if builds && let Some(d) = self.daemons.get_mut(&daemon) {
            d.builders.start(&key, &tenant);
            if let Some(project) = &requirements.project {
                self.warm.touch(project, &daemon);
            }
        }
        let uuid = target.filter(|t| t.kind == Kind::BuildSession).map(|t| t.reference);
        if let Some(uuid) = &uuid {
            self.objects.hold(&daemon, Kind::BuildSession, uuid, Some(&tenant), now);
            self.queue.changed = true; // Its other half may wait.
        }
        self.next_open += 1;
        let open = OpenId(self.next_open);
        let mut lease = None;
        let mut fresh = free;
        let session = self.sessions.get_mut(&key);
        let counted = session.is_some();
        if let Some(session) = session {
            session.open += 1;
            match unit {
                Unit::Build => session.builds += 1,
                Unit::Other => session.others += 1,
                Unit::None => {}
            }
            if let Some(home) = session.home.as_ref().filter(|h| h.daemon == daemon) {
                lease = home.lease;
                fresh |= bind && !home.proven;
            }
        }
        self.settle(&key, now);
        let known = Open {
            key,
            daemon: daemon.clone(),
            unit,
            work: if let Class::Work(work) = class { Some(work) } else { None },
            counted,
            builds,
            lease,
            tenant,
            since: now,
            uuid,
            orphan: false,
        };
        self.opens.insert(open, known);
        if let Some(d) = self.daemons.get_mut(&daemon) {
            d.open += 1;
        }
        self.effects.push(Effect::Granted { request, open, daemon, lease, fresh });
    }

    /// Forgets the older half of the sessions that are only remembered, when there are too many: keys are the
    /// clients' to choose (`/s/<key>`), and must not fill the memory.
    fn bound_memory(&mut self) {
        if self.sessions.len() < self.config.remembered {
            return;
        }
        let mut remembered: Vec<(Time, SessionKey)> = (self.sessions.iter())
            .filter(|(_, s)| s.lease().is_none() && s.owned.is_empty() && s.foreign.is_empty())
            .filter_map(|(key, s)| Some((s.idle?, key.clone())))
            .collect();
        remembered.sort_unstable();
        remembered.truncate(remembered.len().div_ceil(2));
        for (_, key) in remembered {
            if let Some(at) = self.sessions.remove(&key).and_then(|s| s.timer) {
                self.timers.remove(&(at, Timer::Session(key)));
            }
        }
    }

    /// Gives the session a lease on `daemon`, if it has none there.
    fn bind(&mut self, key: &SessionKey, tenant: &Tenant, daemon: &DaemonId, why: Option<Why>, now: Time) {
        if !self.sessions.contains_key(key) {
            self.bound_memory();
        }
        let session = self.sessions.entry(key.clone()).or_insert_with(|| Session::new(tenant.clone(), now));
        if session.home.as_ref().is_some_and(|h| h.daemon == *daemon && h.lease.is_some()) {
            return;
        }
        self.end_lease(key, now, false);
        self.next_lease += 1;
        let lease = LeaseId { epoch: self.config.epoch, number: self.next_lease };
        let Some(session) = self.sessions.get_mut(key) else { return };
        if session.home.as_ref().is_some_and(|h| h.daemon != *daemon) {
            session.owned.clear();
        }
        let elsewhere = session.foreign.remove(daemon);
        let d = self.daemons.get_mut(daemon);
        if let Some(d) = d {
            d.sessions.insert(key.clone());
            // Its containers there share its slot from now on, instead of one for themselves.
            d.used -= u32::from(elsewhere.is_some());
        }
        for id in elsewhere.into_iter().flatten() {
            session.owned.insert(Owned::Object(Kind::Container, id.clone()));
            session.live.insert(id);
        }
        let proven = !session.owned.is_empty();
        session.home = Some(Home {
            daemon: daemon.clone(),
            lease: Some(lease),
            since: now,
            proven,
            why: why.map(Arc::new),
        });
        session.lost = None;
        session.groups.insert(key.clone());
        self.sources.entry(key.clone()).or_default().insert(key.clone());
        self.effects.push(Effect::LeaseStarted { key: key.clone(), lease, daemon: daemon.clone() });
    }

    /// Lets the other connections of the session's client find its lease. A key may come from many sources.
    fn group(&mut self, key: &SessionKey, source: Option<SessionKey>) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        if let Some(source) = source
            && session.source.replace(source.clone()).as_ref() != Some(&source)
            && session.groups.insert(source.clone())
        {
            self.sources.entry(source).or_default().insert(key.clone());
        }
    }

    /// Takes the lease away and gives its slots back. What the session owns, and its home, stay.
    fn end_lease(&mut self, key: &SessionKey, now: Time, lost: bool) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        let Some(home) = session.home.as_mut() else { return };
        let Some(lease) = home.lease.take() else { return };
        let (daemon, since) = (home.daemon.clone(), home.since);
        let slots = std::mem::take(&mut session.slots);
        if slots > 0 {
            self.holds.ended(now.saturating_sub(session.held));
        }
        let groups = std::mem::take(&mut session.groups);
        session.source = None;
        session.linger = None;
        // What is remembered, is remembered from the end of the lease on.
        session.idle = session.idle.map(|_| now);
        if let Some(d) = self.daemons.get_mut(&daemon) {
            d.used -= slots;
            d.sessions.remove(key);
        }
        let tenant = session.tenant.clone();
        self.held.change(&tenant, slots, 0);
        self.queue.changed = true;
        for group in groups {
            if let Some(siblings) = self.sources.get_mut(&group) {
                siblings.remove(key);
                if siblings.is_empty() {
                    self.sources.remove(&group);
                }
            }
        }
        let lasted = now.saturating_sub(since);
        self.effects.push(Effect::LeaseEnded { key: key.clone(), tenant, lease, daemon, lasted, lost });
    }

    fn release(&mut self, open: OpenId, outcome: Outcome, now: Time) {
        let Some(gone) = self.opens.remove(&open) else { return };
        if let Some(uuid) = &gone.uuid {
            self.objects.let_go(&gone.daemon, Kind::BuildSession, uuid);
        }
        if let Some(d) = self.daemons.get_mut(&gone.daemon).filter(|_| !gone.orphan) {
            d.open -= 1;
        }
        let unreached = outcome == Outcome::Unreached;
        if gone.builds
            && let Some(daemon) = self.daemons.get_mut(&gone.daemon)
        {
            daemon.builders.end(&gone.key, (!unreached).then_some(now));
            self.count_suspects(&gone.daemon);
        }
        if gone.unit == Unit::Build && !gone.orphan && !unreached {
            let (key, tenant, daemon) = (gone.key.clone(), gone.tenant.clone(), gone.daemon.clone());
            let lasted = now.saturating_sub(gone.since);
            self.effects.push(Effect::Built { key, tenant, daemon, outcome, lasted });
        }
        if let Some(session) = self.sessions.get_mut(&gone.key) {
            session.open -= u32::from(gone.counted);
            match gone.unit {
                Unit::Build => {
                    session.builds -= 1;
                    // Its slot may stay, for a container that runs: then it is the session's next build's.
                    self.queue.changed = true;
                }
                Unit::Other => session.others -= 1,
                Unit::None => {}
            }
        }
        if unreached {
            self.unbind(&gone, now);
        } else {
            self.prove(&gone);
        }
        self.settle(&gone.key, now);
        if gone.orphan {
            // What is at that name now is another daemon.
        } else if unreached {
            let probe = Probe::Refused("connection refused".into());
            self.probed(&gone.daemon, probe, now);
        } else {
            self.judge(&gone, outcome, now);
        }
    }

    /// What the end of a request says about its daemon's health.
    fn judge(&mut self, gone: &Open, outcome: Outcome, now: Time) {
        let Some(work) = gone.work else { return };
        // A stream says whether it has failed, and a cached build that has not is done as fast as one that has. What
        // comes of a BuildKit connection only its client sees; one that does not build is done at once when all is well.
        let end = match (work, outcome) {
            (_, Outcome::Erred) => health::End::Erred,
            (Work::Build | Work::Load | Work::Pull, Outcome::Failed | Outcome::DaemonFailed) => {
                health::End::Failed
            }
            (Work::BuildKit, Outcome::Done | Outcome::Failed | Outcome::DaemonFailed)
                if gone.unit == Unit::Build =>
            {
                health::End::Unknown
            }
            _ => return,
        };
        self.ended(&gone.daemon, end, now.saturating_sub(gone.since), now);
    }

    /// Something of the open's lease has reached its daemon: from now on the session stays there.
    fn prove(&mut self, open: &Open) {
        if let Some(session) = self.sessions.get_mut(&open.key)
            && let Some(home) = session.home.as_mut()
            && home.lease == open.lease
        {
            home.proven |= home.lease.is_some();
        }
    }

    /// Undoes a binding of which nothing has reached the daemon, so that the session is tried elsewhere.
    fn unbind(&mut self, open: &Open, now: Time) {
        let Some(session) = self.sessions.get(&open.key) else { return };
        let unproven =
            session.home.as_ref().is_some_and(|h| h.lease.is_some() && h.lease == open.lease && !h.proven);
        if unproven && !session.busy() {
            self.end_lease(&open.key, now, false);
            if let Some(session) = self.sessions.get_mut(&open.key) {
                session.home = None;
                // An event may have named it among an image's possible makers.
                session.owned.clear();
            }
        }
    }

    fn build_seen(&mut self, open: OpenId, now: Time) {
        let Some(known) = self.opens.get_mut(&open) else { return };
        if known.unit != Unit::Other {
            return;
        }
        known.unit = Unit::Build;
        let known = known.clone();
        self.prove(&known);
        if let Some(session) = self.sessions.get_mut(&known.key) {
            session.others -= 1;
            session.builds += 1;
        }
        self.settle(&known.key, now);
    }

    /// Brings a session's slots, linger and timer in line with its work. Called after every change to it.
    fn settle(&mut self, key: &SessionKey, now: Time) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        session.idle = if session.busy() { None } else { session.idle.or(Some(now)) };
        session.unattended =
            if session.has_only_containers() { session.unattended.or(Some(now)) } else { None };
        session.overdue = session.overdue.filter(|_| session.unattended.is_some());
        if let Some(home) = session.home.clone().filter(|h| h.lease.is_some()) {
            let mut slots = session.wants();
            if slots > 0 {
                session.linger = None;
            } else if session.slots > 0 {
                // The last unit has just ended, or it ended a while ago and the linger runs.
                // One that waits with more work takes its turn with the others instead.
                let linger = if self.queue.has_of(key) { Time::ZERO } else { self.config.linger };
                let until = *session.linger.get_or_insert(now + linger);
                slots = u32::from(now < until);
            }
            if slots != session.slots {
                // Fewer make room; the first one lets in what the session itself waits with.
                self.queue.changed = true;
                if let Some(daemon) = self.daemons.get_mut(&home.daemon) {
                    daemon.used = daemon.used + slots - session.slots;
                }
                self.held.change(&session.tenant, session.slots, slots);
                match (session.slots, slots) {
                    (0, _) => session.held = now,
                    (_, 0) => self.holds.ended(now.saturating_sub(session.held)),
                    _ => {}
                }
                session.slots = slots;
            }
        }
        let due = Self::due(session, &self.config);
        if session.timer.is_none_or(|at| due.is_some_and(|due| due < at)) {
            if let Some(old) = session.timer.take() {
                self.timers.remove(&(old, Timer::Session(key.clone())));
            }
            if let Some(due) = due {
                session.timer = Some(due);
                self.timers.insert((due, Timer::Session(key.clone())));
            }
        }
    }

    /// When the next thing of a session's runs out.
    fn due(session: &Session, config: &Config) -> Option<Time> {
        match (Self::overdue(session, config), Self::ends(session, config)) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// When it is next to be told that nobody attends its containers.
    fn overdue(session: &Session, config: &Config) -> Option<Time> {
        let unattended = session.unattended?;
        Some(session.overdue.map_or(unattended + config.container_lease, |told| told + OVERDUE_AGAIN))
    }

    /// When its linger, its lease or its memory ends.
    fn ends(session: &Session, config: &Config) -> Option<Time> {
        let lease_end = session.idle.map(|idle| idle + config.grace);
        if session.lease().is_some() {
            let linger = session.linger.filter(|_| session.slots > 0);
            return match (linger, lease_end) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        let idle = session.idle.filter(|_| session.foreign.is_empty())?;
        let only_images = session.owned.iter().all(|o| matches!(o, Owned::Image(_)));
        let keep = match (session.owned.is_empty(), only_images) {
            (true, _) => config.memory,
            (false, true) => config.image_hold,
            (false, false) => return None,
        };
        Some(idle + keep)
    }

    fn tick(&mut self, now: Time) {
        while let Some((at, timer)) = self.timers.first().cloned() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            match timer {
                Timer::Session(key) => self.session_due(&key, now),
                Timer::Container(daemon, id) => self.container_due(&daemon, &id, now),
                Timer::Ticket(request) => self.ticket_due(request, now),
                Timer::Warm(_) => self.queue.changed = true,
                Timer::Deep(daemon) => self.deep_due(&daemon, now),
                Timer::SlowStart(daemon) => self.step(&daemon, now),
                Timer::Patience(daemon) => {
                    if let Some(d) = self.daemons.get_mut(&daemon).filter(|d| d.expected_until <= now) {
                        d.expected = false;
                    }
                    self.refuse_if_nobody_comes();
                }
                Timer::Drain(daemon) => self.drain_due(&daemon, now),
                Timer::Leaving(daemon) => self.leaving_due(&daemon, now),
            }
        }
    }

    fn session_due(&mut self, key: &SessionKey, now: Time) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        session.timer = None;
        let due = Self::due(session, &self.config);
        if due.is_none_or(|due| due > now) {
            self.settle(key, now);
            return;
        }
        if Self::overdue(session, &self.config).is_some_and(|at| at <= now) {
            let again = session.overdue.replace(now).is_some();
            let containers = session.containers();
            self.effects.push(Effect::Overdue { key: key.clone(), containers, again });
            self.settle(key, now);
            return;
        }
        if session.lease().is_some() {
            if session.idle.is_some_and(|idle| idle + self.config.grace <= now) {
                self.end_lease(key, now, false);
            }
            self.settle(key, now);
            return;
        }
        if session.owned.iter().any(|o| matches!(o, Owned::Image(_))) {
            // The hold is over; the index still knows where the image is.
            session.owned.retain(|o| !matches!(o, Owned::Image(_)));
            self.settle(key, now);
            return;
        }
        self.sessions.remove(key);
    }

    fn container_due(&mut self, daemon: &DaemonId, id: &str, now: Time) {
        let object = self.objects.get(daemon, Kind::Container, id);
        if object.is_some_and(|o| o.live && !o.started && o.unstarted <= now) {
            self.set_live(daemon, id, false, now);
        }
    }
}
