//! Who waits and who works, by an account of its own, and what must hold after each event of the queue's simulation.
//! It is written from the rules' words (docs/queueing.md, docs/operations.md), without a look at the queue:
//!
//! - one answer to each request, none to one that has left, none without a reason;
//! - no slot twice, those that strangers keep busy included; no tenant above its limit;
//! - nobody overtaken within a session; tenants in turns; of a tenant, no session twice before another one that any
//!   slot would do for, and after [`STREAK`] that belong to a daemon one that belongs nowhere;
//! - no free slot beside a ticket that it would do for: not for a moment, or, where more than [`WINDOW`] of one tenant
//!   wait, for no longer than those before it may wait for a cache;
//! - nobody new on a daemon that is cordoned or drains, and a drain that ends with the last work or at its deadline;
//! - a session's work stays on one daemon.

use std::collections::{BTreeMap, BTreeSet};

use super::super::model::*;
use super::super::{Config, Daemon, Engine};

/// Tickets of a tenant that are looked at for one slot.
const WINDOW: usize = 64;
/// How many that belong to a daemon are served in a row.
const STREAK: u32 = 2;
/// The longest that any configuration of the simulation lets a build wait for a cache.
const MOST_WARM: Time = Time::from_secs(90);

/// What a client asked for.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub tenant: &'static str,
    pub key: SessionKey,
    pub session: u64,
    pub work: Work,
    /// Until when it waits for a daemon that has built its project.
    pub cold: Option<Time>,
    /// The end of its longest wait.
    pub until: Time,
}

/// What was granted. Without a daemon once that has gone.
#[derive(Debug, Clone)]
pub(super) struct Running {
    pub asked: Asked,
    pub daemon: Option<DaemonId>,
    pub fresh: bool,
}

/// A container that a session made.
#[derive(Debug, Clone)]
pub(super) struct Container {
    pub key: SessionKey,
    pub daemon: DaemonId,
    pub live: bool,
    /// Until when it counts without having been started.
    pub until: Option<Time>,
}

#[derive(Debug, Clone)]
struct Stranger {
    daemon: DaemonId,
    project: Option<String>,
    live: bool,
    /// Since it runs nobody has built beside it.
    counts: bool,
}

#[derive(Debug, Clone, Default)]
struct Cordon {
    by: Option<CordonedBy>,
    /// The deadline of its drain, while that waits.
    drain: Option<Time>,
}

/// How things were before an event.
#[derive(Debug, Default)]
pub(super) struct Before {
    used: BTreeMap<DaemonId, u32>,
    held: BTreeMap<Tenant, u32>,
    slotted: BTreeSet<SessionKey>,
    /// Which of those that wait belong to a daemon.
    pub bound: BTreeMap<SessionKey, DaemonId>,
}

impl Before {
    pub fn of(engine: &Engine) -> Self {
        Before {
            used: engine.daemons().map(|d| (d.id.clone(), d.used)).collect(),
            held: held(engine),
            slotted: (engine.sessions.iter())
                .filter(|(_, s)| s.slots > 0)
                .map(|(key, _)| key.clone())
                .collect(),
            bound: BTreeMap::new(),
        }
    }
}

fn held(engine: &Engine) -> BTreeMap<Tenant, u32> {
    let mut held = BTreeMap::new();
    for session in engine.sessions.values().filter(|s| s.slots > 0) {
        *held.entry(session.tenant.clone()).or_default() += session.slots;
    }
    held
}

/// The account.
#[derive(Debug)]
pub(super) struct Ledger {
    pub config: Config,
    pub waiting: BTreeMap<RequestId, Asked>,
    pub running: BTreeMap<OpenId, Running>,
    pub containers: BTreeMap<String, Container>,
    pub abandoned: BTreeSet<RequestId>,
    strangers: BTreeMap<String, Stranger>,
    leases: BTreeMap<SessionKey, DaemonId>,
    cordons: BTreeMap<DaemonId, Cordon>,
    /// Daemons that have erred, or failed something: until they have written, they may be avoided.
    doubted: BTreeSet<DaemonId>,
    /// For each tenant that waits with work that any slot would do for: how often each other one was served since.
    passed: BTreeMap<&'static str, BTreeMap<&'static str, u32>>,
    /// The same for sessions, by the others of their tenant.
    passed_by: BTreeMap<SessionKey, BTreeMap<SessionKey, u32>>,
    /// And how many that belong to a daemon were served in a row.
    streaks: BTreeMap<&'static str, u32>,
    /// Since when a ticket has waited beside a slot that would do for it.
    beside: BTreeMap<RequestId, Time>,
}

impl Ledger {
    pub fn new(config: Config) -> Self {
        Ledger {
            config,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            containers: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            strangers: BTreeMap::new(),
            leases: BTreeMap::new(),
            cordons: BTreeMap::new(),
            doubted: BTreeSet::new(),
            passed: BTreeMap::new(),
            passed_by: BTreeMap::new(),
            streaks: BTreeMap::new(),
            beside: BTreeMap::new(),
        }
    }

    /// The daemon that a session belongs to: it has a lease there, or something that exists only there.
    fn bound(&self, key: &SessionKey) -> Option<&DaemonId> {
        let owns = || self.containers.values().find(|c| c.key == *key).map(|c| &c.daemon);
        self.leases.get(key).or_else(owns)
    }

    /// Those who wait, and belong to a daemon.
    pub fn bound_of_waiting(&self) -> BTreeMap<SessionKey, DaemonId> {
        let of = |asked: &Asked| Some((asked.key.clone(), self.bound(&asked.key)?.clone()));
        self.waiting.values().filter_map(of).collect()
    }

    /// What the event itself says.
    pub fn hear(&mut self, event: &Event, now: Time) {
        match event {
            Event::Observed(observed) => {
                let there: BTreeSet<&DaemonId> = observed.iter().map(|o| &o.id).collect();
                let known = self.running.values().filter_map(|r| r.daemon.clone());
                let known = known.chain(self.containers.values().map(|c| c.daemon.clone()));
                let known = known.chain(self.strangers.values().map(|s| s.daemon.clone()));
                let known: BTreeSet<DaemonId> = known.chain(self.cordons.keys().cloned()).collect();
                for daemon in known.iter().filter(|d| !there.contains(d)) {
                    self.lose(daemon);
                    self.cordons.remove(daemon);
                }
            }
            Event::Replaced { daemon } => self.lose(daemon),
            Event::Learned { daemon, open, fact } => self.learned(daemon, *open, fact, now),
            Event::Containers { daemon, containers, projects, .. } => {
                self.listed(daemon, containers, projects);
            }
            Event::Cordon { daemon, by } => self.cordon(daemon, *by),
            Event::Uncordon { daemon, by } => {
                let operators = |c: &Cordon| c.by == Some(CordonedBy::Operator);
                if *by == CordonedBy::Operator || !self.cordons.get(daemon).is_some_and(operators) {
                    self.cordons.remove(daemon);
                }
            }
            Event::Drain { daemon, deadline } => {
                self.cordon(daemon, CordonedBy::Operator);
                self.cordons.entry(daemon.clone()).or_default().drain.get_or_insert(*deadline);
            }
            Event::Release { open, outcome } => {
                let daemon = self.running.remove(open).and_then(|r| r.daemon);
                let failed = matches!(outcome, Outcome::Erred | Outcome::Failed | Outcome::DaemonFailed);
                if !self.config.deep_probe_interval.is_zero() {
                    self.doubted.extend(daemon.filter(|_| failed));
                }
            }
            Event::Wrote { daemon, result: DeepProbe::Wrote } => {
                self.doubted.remove(daemon);
            }
            Event::Wrote { daemon, .. } => {
                self.doubted.insert(daemon.clone());
            }
            Event::Configured(config) => {
                self.config = (**config).clone();
                self.passed.clear(); // Who could not be served by the old limits has not been passed.
                self.passed_by.clear();
                if self.config.deep_probe_interval.is_zero() {
                    self.doubted.clear();
                }
            }
            Event::Tick => {
                for container in self.containers.values_mut() {
                    if container.until.is_some_and(|until| until <= now) {
                        (container.until, container.live) = (None, false);
                    }
                }
            }
            _ => {}
        }
        // What may be a build's own is so until nobody builds there. Who is let in by this event builds after it.
        let builds = |r: &Running| r.daemon.clone().filter(|_| r.asked.work == Work::Build);
        let building: BTreeSet<DaemonId> = self.running.values().filter_map(builds).collect();
        for stranger in self.strangers.values_mut() {
            stranger.counts = stranger.live && (stranger.counts || !building.contains(&stranger.daemon));
        }
    }

    fn cordon(&mut self, daemon: &DaemonId, by: CordonedBy) {
        let cordon = self.cordons.entry(daemon.clone()).or_default();
        if by == CordonedBy::Operator || cordon.by.is_none() {
            cordon.by = Some(by);
        }
    }

    fn lose(&mut self, daemon: &DaemonId) {
        self.containers.retain(|_, c| c.daemon != *daemon);
        self.strangers.retain(|_, s| s.daemon != *daemon);
        let there = self.running.values_mut().filter(|r| r.daemon.as_ref() == Some(daemon));
        there.for_each(|r| (r.daemon, r.fresh) = (None, false));
    }

    fn learned(&mut self, daemon: &DaemonId, open: Option<OpenId>, fact: &Fact, now: Time) {
        match fact {
            Fact::Created { id, .. } => {
                let running = open.and_then(|open| self.running.get_mut(&open)).expect("somebody makes it");
                running.fresh = false;
                let key = running.asked.key.clone();
                let until = Some(now + self.config.unstarted);
                let container = Container { key: key.clone(), daemon: daemon.clone(), live: true, until };
                self.containers.insert(id.clone(), container);
                // Something of its lease has been there.
                self.running.values_mut().filter(|r| r.asked.key == key).for_each(|r| r.fresh = false);
            }
            Fact::Labelled { id, project, .. } => self.labelled(id, project),
            Fact::Started { id } if self.containers.contains_key(id) => {
                let container = self.containers.get_mut(id).expect("it is there");
                (container.live, container.until) = (true, None);
            }
            Fact::Started { id } => self.stranger(daemon, id, true),
            Fact::Stopped { id } => {
                if let Some(container) = self.containers.get_mut(id) {
                    (container.live, container.until) = (false, None);
                } else if self.strangers.contains_key(id) {
                    self.stranger(daemon, id, false);
                }
            }
            Fact::Removed { id, .. } => {
                self.containers.remove(id);
                self.strangers.remove(id);
            }
            _ => {}
        }
    }

    fn stranger(&mut self, daemon: &DaemonId, id: &str, live: bool) {
        let new = Stranger { daemon: daemon.clone(), project: None, live, counts: false };
        self.strangers.entry(id.to_string()).or_insert(new).live = live;
    }

    fn labelled(&mut self, id: &str, project: &str) {
        if let Some(stranger) = self.strangers.get_mut(id) {
            stranger.project.get_or_insert(project.to_string());
        }
    }

    fn listed(
        &mut self,
        daemon: &DaemonId,
        containers: &[ListedContainer],
        projects: &[(Kind, String, String)],
    ) {
        let there: BTreeSet<&str> = containers.iter().map(|c| c.id.as_str()).collect();
        self.strangers.retain(|id, s| s.daemon != *daemon || there.contains(id.as_str()));
        for c in containers.iter().filter(|c| !self.containers.contains_key(&c.id)).collect::<Vec<_>>() {
            self.stranger(daemon, &c.id, c.running);
        }
        projects.iter().for_each(|(_, id, project)| self.labelled(id, project));
    }

    /// Takes in what came of an event, and checks the engine against it.
    pub fn follow(
        &mut self,
        event: &Event,
        effects: &[Effect],
        mut before: Before,
        engine: &Engine,
        now: Time,
    ) {
        let drained =
            |e: &Effect| if let Effect::Drained { daemon, .. } = e { Some(daemon.clone()) } else { None };
        let drained: BTreeSet<DaemonId> = effects.iter().filter_map(drained).collect();
        let mut admitted: BTreeSet<RequestId> = BTreeSet::new();
        for effect in effects {
            match effect {
                Effect::LeaseStarted { key, daemon, .. } => {
                    let other = self.leases.insert(key.clone(), daemon.clone());
                    assert!(other.is_none(), "{key} has two leases");
                }
                Effect::LeaseEnded { key, daemon, lost, .. } => {
                    assert_eq!(self.leases.remove(key).as_ref(), Some(daemon), "the lease of {key}");
                    let at_work = self.works(key, daemon);
                    assert!(*lost || !at_work, "the lease of {key} ended under its work");
                    match self.bound(key) {
                        Some(home) => before.bound.insert(key.clone(), home.clone()),
                        None => before.bound.remove(key),
                    };
                }
                Effect::Admitted { request, .. } => {
                    admitted.insert(*request);
                }
                Effect::Granted { request, open, daemon, fresh, .. } => {
                    let waited = admitted.contains(request);
                    let asked = self.granted(*request, daemon, waited, &mut before, engine);
                    self.running
                        .insert(*open, Running { asked, daemon: Some(daemon.clone()), fresh: *fresh });
                }
                Effect::Refused { request, refusal } => {
                    let asked = self.waiting.remove(request);
                    assert!(!self.abandoned.contains(request), "an answer to nobody");
                    let asked = asked.unwrap_or_else(|| panic!("{request:?} was answered twice"));
                    let new = matches!(event, Event::Acquire(a) if a.request == *request);
                    let home = before.bound.get(&asked.key);
                    let cut = home.is_some_and(|home| drained.contains(home));
                    self.refused(&asked, refusal, new, cut, engine, now);
                    if !new {
                        // Whoever is refused has had the turn of its tenant, and of its session.
                        self.passed.remove(asked.tenant);
                        self.streaks.remove(asked.tenant);
                        self.passed_by.remove(&asked.key);
                    }
                }
                Effect::ProbeDeeply { daemon } => {
                    // What was held against it before it went out is doubt enough until it has written.
                    self.doubted.insert(daemon.clone());
                }
                _ => {}
            }
        }
        for daemon in engine.daemons() {
            assert_eq!(daemon.strangers(), self.strangers_on(&daemon.id), "strangers on {}", daemon.id);
        }
        self.slots(event, &before, engine);
        self.drains(event, effects, now);
        self.tickets(engine, now);
    }

    /// Whether anything of a session is under way on a daemon.
    fn works(&self, key: &SessionKey, daemon: &DaemonId) -> bool {
        self.running.values().any(|r| r.asked.key == *key && r.daemon.as_ref() == Some(daemon))
            || self.containers.values().any(|c| c.key == *key && c.daemon == *daemon && c.live)
    }

    fn granted(
        &mut self,
        request: RequestId,
        daemon: &DaemonId,
        waited: bool,
        before: &mut Before,
        engine: &Engine,
    ) -> Asked {
        assert!(!self.abandoned.contains(&request), "{request:?} had left, and was started");
        let asked = self.waiting.remove(&request).expect("answered once");
        let earlier = self.waiting.range(..request).find(|(_, other)| other.key == asked.key);
        assert!(
            earlier.is_none() || asked.work == Work::Container, // Which needs no slot if there is one.
            "{asked:?} overtook {earlier:?} of its own session"
        );
        let elsewhere = self
            .running
            .values()
            .find(|r| r.asked.key == asked.key && r.daemon.as_ref().is_some_and(|other| other != daemon));
        assert!(elsewhere.is_none(), "{asked:?} goes to {daemon}, beside {elsewhere:?}");
        let home = before.bound.get(&asked.key);
        assert!(home.is_none_or(|home| home == daemon), "{asked:?} of {home:?} goes to {daemon}");
        let bound = home.is_some();
        let open = !self.cordons.contains_key(daemon) && is_well(engine, daemon);
        assert!(bound || open, "{asked:?} is new on {daemon}, which takes no new sessions");
        // Everybody who could have had this slot has been passed once more.
        self.passed.remove(asked.tenant);
        self.passed_by.remove(&asked.key);
        for (tenant, by) in self.passed.iter_mut().filter(|_| !bound) {
            let n = by.entry(asked.tenant).or_default();
            *n += 1;
            assert!(*n <= 1, "{} was served {n} times while {tenant} waited", asked.tenant);
        }
        let rivals = self.passed_by.iter_mut().filter(|(key, _)| !bound && tenant_of(key) == asked.tenant);
        for (key, by) in rivals {
            let n = by.entry(asked.key.clone()).or_default();
            *n += 1;
            assert!(*n <= 1, "{} was served {n} times while {key} waited", asked.key);
        }
        if !bound {
            self.streaks.remove(asked.tenant);
        } else if let Some(streak) = self.streaks.get_mut(asked.tenant)
            && waited
            && open
            && !self.doubted.contains(daemon)
            && !before.slotted.contains(&asked.key)
        {
            *streak += 1;
            assert!(*streak <= STREAK, "{streak} in a row of {} that belong to a daemon", asked.tenant);
        }
        before.bound.insert(asked.key.clone(), daemon.clone());
        before.slotted.insert(asked.key.clone());
        asked
    }

    /// Nobody is refused without a reason: `new` has just come, `cut` is one whose daemon has just been drained.
    fn refused(&self, asked: &Asked, refusal: &Refusal, new: bool, cut: bool, engine: &Engine, now: Time) {
        let of = |tenant: &str| self.waiting.values().filter(|other| other.tenant == tenant).count();
        let full = self.waiting.len() >= self.config.queue_limit
            || self.config.tenant_waiting.is_some_and(|limit| of(asked.tenant) >= limit);
        let nobody = engine.daemons().all(|d| self.cordons.contains_key(&d.id) || !is_well(engine, &d.id));
        let never = engine.daemons().all(|d| d.state != State::Ready);
        let reason = match refusal {
            Refusal::QueueFull(_) | Refusal::TenantFull(_) if new => full && self.config.queue_limit > 0,
            Refusal::LongestWait(_) if !new => now >= asked.until,
            Refusal::NoDaemon(_) if new || self.config.queue_limit == 0 => nobody,
            Refusal::NoDaemon(_) => cut || never,
            _ => false,
        };
        assert!(reason, "{asked:?} was refused: {refusal:?}");
    }

    /// What runs without a session: compose projects, and lone containers.
    fn strangers_on(&self, daemon: &DaemonId) -> u32 {
        let there = self.strangers.iter().filter(|(_, s)| s.daemon == *daemon && s.counts);
        let groups: BTreeSet<&str> = there.map(|(id, s)| s.project.as_deref().unwrap_or(id)).collect();
        groups.len() as u32
    }

    /// The slots of a daemon that the pool may use: strangers keep the others busy, but never the last.
    fn ours(&self, daemon: &Daemon, slots: u32) -> u32 {
        slots - self.strangers_on(&daemon.id).min(daemon.slots.saturating_sub(1)).min(slots)
    }

    /// No slot is used twice, and who works holds one.
    fn slots(&self, event: &Event, before: &Before, engine: &Engine) {
        // Containers start without asking. And without a queue nobody is kept out.
        let unasked = u32::from(matches!(event, Event::Learned { .. } | Event::Containers { .. }));
        let queues = self.config.queue_limit > 0;
        let mut works: BTreeMap<(&DaemonId, &SessionKey), (u32, bool)> = BTreeMap::new();
        for running in self.running.values() {
            let Some(daemon) = &running.daemon else { continue };
            let (builds, works) = works.entry((daemon, &running.asked.key)).or_default();
            *builds += u32::from(running.asked.work == Work::Build);
            *works = true;
        }
        for container in self.containers.values().filter(|c| c.live) {
            works.entry((&container.daemon, &container.key)).or_default().1 = true;
        }
        for d in engine.daemons() {
            // One that has shrunk, or where strangers have come, keeps what runs there.
            let most = self.ours(d, d.slots).max(before.used.get(&d.id).copied().unwrap_or(0) + unasked);
            assert!(d.used <= most || !queues, "{}: {} of {most} slots are in use", d.id, d.used);
            let there = works.iter().filter(|((daemon, _), _)| **daemon == d.id);
            let least: u32 = there.map(|(_, (builds, works))| (*builds).max(u32::from(*works))).sum();
            assert!(d.used >= least, "{}: work for {least} in {} slots", d.id, d.used);
        }
        if let Some(limit) = self.config.tenant_slots.filter(|_| queues) {
            for (tenant, held) in held(engine) {
                let most = limit.max(before.held.get(&tenant).copied().unwrap_or(0) + unasked);
                assert!(held <= most, "{tenant} holds {held} slots of {most}");
            }
        }
    }

    /// A drain ends when the last work is gone, not before, and at its deadline at the latest.
    fn drains(&mut self, event: &Event, effects: &[Effect], now: Time) {
        let mut drained: BTreeMap<&DaemonId, &Drained> = BTreeMap::new();
        for effect in effects {
            if let Effect::Drained { daemon, drained: how } = effect {
                assert!(drained.insert(daemon, how).is_none(), "{daemon} was drained twice at once");
            }
        }
        let waits = self.cordons.iter().filter_map(|(daemon, c)| Some((daemon.clone(), c.drain?)));
        for (daemon, deadline) in waits.collect::<Vec<_>>() {
            let open = self.running.values().filter(|r| r.daemon.as_ref() == Some(&daemon)).count();
            let own = self.containers.values().filter(|c| c.daemon == daemon && c.live).count();
            let strangers = self.strangers.values().filter(|s| s.daemon == daemon && s.counts).count();
            let tickets = self.waiting.values().filter(|a| self.bound(&a.key) == Some(&daemon)).count();
            let bound: Vec<&SessionKey> =
                self.leases.iter().filter(|(_, d)| **d == daemon).map(|(key, _)| key).collect();
            let works = open + own + strangers + tickets + bound.len() > 0;
            let Some(how) = drained.remove(&daemon) else {
                assert!(works, "the drain of {daemon} waits for nothing");
                // One of no time at all is told at the next tick.
                assert!(
                    now < deadline || matches!(event, Event::Drain { .. }),
                    "{daemon} drains for too long"
                );
                let idle = bound.into_iter().find(|key| {
                    !self.works(key, &daemon)
                        && self.running.values().all(|r| r.asked.key != **key)
                        && self.waiting.values().all(|a| a.key != **key)
                });
                assert!(idle.is_none(), "a drain waits for {idle:?}, who does nothing");
                continue;
            };
            assert!(!works || now >= deadline, "{daemon} was drained before its work ended");
            let cut: u32 = how.cut.iter().map(|r| r.open).sum();
            let ran: usize = how.cut.iter().map(|r| r.containers.len()).sum();
            assert_eq!((cut as usize, ran), (open, own + strangers), "what the drain of {daemon} has cut");
            assert_eq!(tickets, 0, "who waits for {daemon}, which is drained, waits in vain");
            self.cordons.entry(daemon).or_default().drain = None;
        }
        assert!(drained.is_empty(), "drained without a drain: {drained:?}");
    }

    /// Nobody is lost, and nobody waits beside a slot that would do.
    fn tickets(&mut self, engine: &Engine, now: Time) {
        let engine_waits: BTreeSet<RequestId> = engine.queue.acquires().map(|a| a.request).collect();
        assert!(
            engine_waits.iter().eq(self.waiting.keys()),
            "{engine_waits:?}, and clients {:?}",
            self.waiting
        );
        let late = self.waiting.values().find(|a| a.until <= now);
        assert!(late.is_none(), "{late:?} has waited for too long");
        assert!(self.config.queue_limit > 0 || self.waiting.is_empty(), "they wait without a queue");
        let mut heads: BTreeMap<&SessionKey, (RequestId, &Asked)> = BTreeMap::new();
        for (request, asked) in &self.waiting {
            heads.entry(&asked.key).or_insert((*request, asked));
        }
        let held = held(engine);
        let limited = |asked: &Asked| {
            let held = held.get(&Tenant::from(asked.tenant)).copied().unwrap_or(0);
            self.config.tenant_slots.is_some_and(|limit| held >= limit)
        };
        let has_room = |d: &Daemon| d.used < self.ours(d, d.capacity());
        let open = |d: &&Daemon| !self.cordons.contains_key(&d.id) && !self.doubted.contains(&d.id);
        let rooms: BTreeSet<&DaemonId> = engine.daemons().filter(|d| has_room(d)).map(|d| &d.id).collect();
        let room = engine.daemons().filter(open).any(|d| rooms.contains(&d.id) && is_well(engine, &d.id));
        let mut unbound: BTreeMap<&'static str, usize> = BTreeMap::new();
        let mut free: Vec<(RequestId, &Asked)> = Vec::new();
        for (request, asked) in heads.into_values() {
            let home = self.bound(&asked.key);
            assert_eq!(engine.home(&asked.key), home, "where {} belongs", asked.key);
            if let Some(home) = home {
                let could = !limited(asked) && rooms.contains(home);
                assert!(!could, "{asked:?} waits, and {home} has a slot");
                let session = engine.sessions.get(&asked.key);
                let spare = session.is_some_and(|s| {
                    s.lease().is_some() && s.slots > if asked.work == Work::Build { s.builds } else { 0 }
                });
                assert!(!spare, "{asked:?} waits, and its session has a slot");
                continue;
            }
            *unbound.entry(asked.tenant).or_default() += 1;
            if asked.cold.is_none_or(|at| at <= now) && !limited(asked) {
                free.push((request, asked));
            }
        }
        let crowded = |tenant: &str| unbound.get(tenant).is_some_and(|n| *n > WINDOW);
        let beside: Vec<RequestId> = free.iter().filter(|_| room).map(|(request, _)| *request).collect();
        for (request, asked) in free.iter().filter(|_| room) {
            assert!(crowded(asked.tenant), "a slot is free at one of {rooms:?}, and {asked:?} waits");
            let since = self.beside.get(request).copied().unwrap_or(now);
            assert!(now - since <= MOST_WARM, "{asked:?} waits beside free slots since {since:?}");
        }
        // A build that has lost its patience with a warm daemon takes what nobody else wants: that is no turn. Nor has
        // one a turn that is not looked at.
        let turns = free.iter().filter(|(_, a)| a.cold.is_none() && !crowded(a.tenant));
        let turns: Vec<(SessionKey, &'static str)> = turns.map(|(_, a)| (a.key.clone(), a.tenant)).collect();
        self.beside.retain(|request, _| beside.contains(request));
        for request in beside {
            self.beside.entry(request).or_insert(now);
        }
        let tenants: BTreeSet<&'static str> = turns.iter().map(|(_, tenant)| *tenant).collect();
        self.passed.retain(|tenant, _| tenants.contains(tenant));
        self.streaks.retain(|tenant, _| tenants.contains(tenant));
        self.passed_by.retain(|key, _| turns.iter().any(|(k, _)| k == key));
        for (key, tenant) in turns {
            self.passed.entry(tenant).or_default();
            self.streaks.entry(tenant).or_default();
            self.passed_by.entry(key).or_default();
        }
    }
}

/// Whether a daemon is there and answers as it should.
fn is_well(engine: &Engine, daemon: &DaemonId) -> bool {
    let well = |d: &Daemon| d.state == State::Ready && d.health == Health::Healthy;
    engine.daemons.get(daemon).is_some_and(well)
}

/// Whose a session is: its key begins with that.
fn tenant_of(key: &SessionKey) -> &str {
    key.as_str().split('/').next().unwrap_or_default()
}
