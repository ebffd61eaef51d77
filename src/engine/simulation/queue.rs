//! The queue under churn: builds of several tenants and sessions ask, end, give up; daemons fail, come back, grow,
//! drain. What must hold is written here from the rules' words (docs/queueing.md), without a look at the queue:
//! no slot twice, no ticket lost, nobody overtaken within a session, tenants in turns, no free slot beside somebody
//! who could use it.

use std::collections::{BTreeMap, BTreeSet};

use super::super::model::*;
use super::super::{Config, Engine};
use super::choices::Choices;

const STEPS: u64 = 300;
const TENANTS: [&str; 3] = ["red", "green", "blue"];

/// A build as its client knows it.
#[derive(Debug, Clone)]
struct Build {
    tenant: &'static str,
    key: SessionKey,
    project: bool,
    asked: u64,
    since: Time,
}

struct Simulation {
    engine: Engine,
    choices: Choices,
    now: Time,
    trace: bool,
    requests: u64,
    observed: BTreeMap<DaemonId, Observed>,
    waiting: BTreeMap<RequestId, Build>,
    running: BTreeMap<OpenId, (Build, DaemonId)>,
    /// For each tenant that waits with a build that any slot would do for: how often each other one was served since.
    passed: BTreeMap<&'static str, BTreeMap<&'static str, u32>>,
    abandoned: BTreeSet<RequestId>,
}

pub(super) fn run(mut choices: Choices, seed: u64, trace: bool) {
    let config = Config {
        linger: Time::from_secs(choices.below(2) * 10),
        queue_limit: 5 + choices.below(60) as usize,
        tenant_waiting: (choices.below(3) == 0).then_some(4),
        tenant_slots: (choices.below(3) == 0).then_some(2),
        max_wait: Time::from_secs(600 + choices.below(3600)),
        warm_wait: Time::from_secs(choices.below(90)),
        deep_probe_interval: Time::ZERO,
        ..Config::default()
    };
    let mut simulation = Simulation {
        engine: Engine::new(config, seed),
        choices,
        now: Time::from_secs(1),
        trace,
        requests: 0,
        observed: BTreeMap::new(),
        waiting: BTreeMap::new(),
        running: BTreeMap::new(),
        passed: BTreeMap::new(),
        abandoned: BTreeSet::new(),
    };
    for daemon in 0..1 + simulation.below(4) {
        simulation.join(daemon);
    }
    for _ in 0..simulation.below(STEPS) {
        if simulation.choices.is_over() {
            break;
        }
        simulation.step();
    }
    simulation.end();
}

impl Simulation {
    fn below(&mut self, n: u64) -> u64 {
        self.choices.below(n)
    }

    fn join(&mut self, daemon: u64) {
        let id = DaemonId::from(format!("d{daemon}"));
        let slots = Some(1 + self.below(3) as u32);
        let observed = Observed { id: id.clone(), draining: false, pending: None, slots };
        self.observed.insert(id.clone(), observed);
        self.observe();
        self.answers(&id);
    }

    fn observe(&mut self) {
        let observed = self.observed.values().cloned().collect();
        self.tell(Event::Observed(observed));
    }

    fn answers(&mut self, daemon: &DaemonId) {
        let facts = Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() };
        self.tell(Event::Probed { daemon: daemon.clone(), probe: Probe::Answered(facts) });
    }

    fn any_daemon(&mut self) -> Option<DaemonId> {
        let n = self.observed.len() as u64;
        (n > 0).then(|| self.observed.keys().nth(self.choices.below(n) as usize).cloned()).flatten()
    }

    fn step(&mut self) {
        match self.below(100) {
            0..45 => self.ask(),
            45..70 => self.finish(),
            70..78 => self.give_up(),
            78..90 => {
                let seconds = [1, 5, 20, 400][self.choices.below(4) as usize];
                self.pass(seconds);
            }
            90..93 => {
                if let Some(daemon) = self.any_daemon() {
                    let probe = Probe::Refused("connection refused".into());
                    self.tell(Event::Probed { daemon, probe });
                }
            }
            93..96 => self.all_answer(),
            96 => {
                let daemon = self.below(5);
                self.join(daemon);
            }
            97 => {
                if let Some(daemon) = self.any_daemon() {
                    let slots = Some(1 + self.below(4) as u32);
                    if let Some(o) = self.observed.get_mut(&daemon) {
                        (o.slots, o.draining) = (slots, false);
                    }
                    self.observe();
                }
            }
            98 => {
                if let Some(daemon) = self.any_daemon() {
                    self.observed.get_mut(&daemon).expect("it is there").draining = true;
                    self.observe();
                }
            }
            _ => {
                if let Some(daemon) = self.any_daemon().filter(|_| self.observed.len() > 1) {
                    self.observed.remove(&daemon);
                    // Its builds end by themselves; a daemon of that name is another one.
                    let lost = self.running.values_mut().filter(|(_, d)| *d == daemon);
                    lost.for_each(|(_, d)| *d = "gone".into());
                    self.observe();
                }
            }
        }
    }

    fn ask(&mut self) {
        self.requests += 1;
        let request = RequestId(self.requests);
        let tenant = TENANTS[self.below(3) as usize];
        // Half of them come again and again, the others once.
        let session = if self.below(2) == 0 { self.below(4) } else { 100 + self.requests };
        let key = SessionKey::from(format!("{tenant}/name:{session}"));
        let project = (self.below(3) == 0).then(|| format!("{tenant}/{}", self.choices.below(5)).into());
        let build = Build {
            tenant,
            key: key.clone(),
            project: project.is_some(),
            asked: self.requests,
            since: self.now,
        };
        self.waiting.insert(request, build);
        self.tell(Event::Acquire(Acquire {
            request,
            key,
            tenant: tenant.into(),
            source: None,
            inside: None,
            shares_names: false,
            class: Class::Work(Work::Build),
            target: None,
            requirements: Requirements { project, ..Requirements::default() },
            deadline: None,
        }));
    }

    fn finish(&mut self) {
        let n = self.running.len() as u64;
        if n > 0 {
            let at = self.below(n) as usize;
            let open = *self.running.keys().nth(at).expect("it runs");
            self.running.remove(&open);
            let outcome = [Outcome::Done, Outcome::ClientGone, Outcome::DaemonFailed][self.below(3) as usize];
            self.tell(Event::Release { open, outcome });
        }
    }

    fn give_up(&mut self) {
        let n = self.waiting.len() as u64;
        if n > 0 {
            let at = self.below(n) as usize;
            let request = *self.waiting.keys().nth(at).expect("it waits");
            self.waiting.remove(&request);
            self.abandoned.insert(request);
            self.tell(Event::Abandon(request));
        }
    }

    fn all_answer(&mut self) {
        for daemon in self.observed.keys().cloned().collect::<Vec<_>>() {
            for _ in 0..3 {
                self.answers(&daemon);
                self.pass(1);
            }
        }
    }

    fn pass(&mut self, seconds: u64) {
        let until = self.now + Time::from_secs(seconds);
        while let Some(at) = self.engine.next_tick().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.tell(Event::Tick);
            let next = self.engine.next_tick();
            assert!(next.is_none_or(|next| next > self.now), "a tick that changes nothing: {next:?}");
        }
        self.now = until;
    }

    fn tell(&mut self, event: Event) {
        if self.trace {
            println!("{:?} {event:?}", self.now);
        }
        let before: BTreeMap<DaemonId, u32> = self.engine.daemons().map(|d| (d.id.clone(), d.used)).collect();
        let held = TENANTS.map(|tenant| self.held(tenant));
        let keys = self.waiting.values().map(|b| b.key.clone());
        // A session that belongs to a daemon is served there out of its tenant's turn with the others.
        let mut bound: BTreeSet<SessionKey> = keys.filter(|k| self.engine.home(k).is_some()).collect();
        let effects = self.engine.handle(event, self.now);
        for effect in effects {
            if self.trace {
                println!("    {effect:?}");
            }
            match effect {
                Effect::Granted { request, open, daemon, .. } => {
                    self.granted(request, open, &daemon, &mut bound)
                }
                Effect::Refused { request, .. } => {
                    assert!(!self.abandoned.contains(&request), "an answer to nobody");
                    assert!(self.waiting.remove(&request).is_some(), "{request:?} was answered twice");
                }
                _ => {}
            }
        }
        for d in self.engine.daemons() {
            // One that has shrunk keeps what runs there.
            let most = d.slots.max(before.get(&d.id).copied().unwrap_or(0));
            assert!(d.used <= most, "{}: {} of {} slots are in use", d.id, d.used, d.slots);
        }
        for (tenant, held) in TENANTS.into_iter().zip(held) {
            let most = self.engine.config.tenant_slots.unwrap_or(u32::MAX).max(held);
            assert!(self.held(tenant) <= most, "{tenant} holds {} slots of {most}", self.held(tenant));
        }
        self.check();
    }

    fn granted(
        &mut self,
        request: RequestId,
        open: OpenId,
        daemon: &DaemonId,
        bound: &mut BTreeSet<SessionKey>,
    ) {
        assert!(!self.abandoned.contains(&request), "{request:?} had left, and was started");
        let build = self.waiting.remove(&request).expect("answered twice");
        let earlier = self.waiting.values().find(|b| b.key == build.key && b.asked < build.asked);
        assert!(earlier.is_none(), "{build:?} overtook {earlier:?} of its own session");
        // Every tenant that could have had this slot has been passed once more by this one.
        self.passed.remove(build.tenant);
        for (tenant, by) in &mut self.passed {
            let n = by.entry(build.tenant).or_default();
            *n += u32::from(!bound.contains(&build.key));
            assert!(*n <= 1, "{} was served {n} times while {tenant} waited", build.tenant);
        }
        bound.insert(build.key.clone());
        self.running.insert(open, (build, daemon.clone()));
    }

    /// Whether this ticket could be served by any slot: it belongs nowhere, waits for no cache any more, is the first
    /// of its session, and its tenant is below its limit.
    fn is_free(&self, build: &Build) -> bool {
        let first = self.waiting.values().all(|b| b.key != build.key || b.asked >= build.asked);
        let patient = build.project && self.now < build.since + self.engine.config.warm_wait;
        first && !patient && self.engine.home(&build.key).is_none() && !self.is_at_limit(build.tenant)
    }

    fn held(&self, tenant: &str) -> u32 {
        self.engine.sessions().filter(|(_, s)| s.tenant.as_str() == tenant).map(|(_, s)| s.slots).sum()
    }

    fn is_at_limit(&self, tenant: &str) -> bool {
        self.engine.config.tenant_slots.is_some_and(|limit| self.held(tenant) >= limit)
    }

    fn check(&mut self) {
        // Who builds holds a slot.
        let mut builds: BTreeMap<&DaemonId, u32> = BTreeMap::new();
        self.running.values().for_each(|(_, daemon)| *builds.entry(daemon).or_default() += 1);
        for d in self.engine.daemons() {
            let n = builds.get(&d.id).copied().unwrap_or(0);
            assert!(d.used >= n, "{}: {n} builds in {} slots", d.id, d.used);
        }
        let engine_waits: BTreeSet<RequestId> = self.engine.tickets().iter().map(|t| t.0).collect();
        let waits: BTreeSet<RequestId> = self.waiting.keys().copied().collect();
        assert_eq!(engine_waits, waits, "tickets of the engine, and clients that wait");
        // No free slot beside somebody who could use it.
        let room = self.engine.daemons().any(|d| d.takes_sessions() && d.has_room());
        let free: Vec<&Build> = self.waiting.values().filter(|b| self.is_free(b)).collect();
        assert!(!room || free.is_empty(), "a slot is free, and {free:?} wait");
        // A build that has lost its patience with a warm daemon takes what nobody else wants: that is no turn.
        let tenants: BTreeSet<&'static str> = free.iter().filter(|b| !b.project).map(|b| b.tenant).collect();
        self.passed.retain(|tenant, _| tenants.contains(tenant));
        for tenant in tenants {
            self.passed.entry(tenant).or_default();
        }
    }

    /// Daemons get well, builds end, and everybody has had an answer.
    fn end(&mut self) {
        self.observed.values_mut().for_each(|o| o.draining = false);
        self.observe();
        for _ in 0..200 {
            self.all_answer();
            for open in self.running.keys().copied().collect::<Vec<_>>() {
                self.running.remove(&open);
                self.tell(Event::Release { open, outcome: Outcome::Done });
            }
            self.pass(60);
            if self.waiting.is_empty() && self.running.is_empty() {
                break;
            }
        }
        assert!(self.waiting.is_empty(), "{:?} were never answered", self.waiting);
        self.pass(24 * 3600);
        assert!(self.engine.daemons().all(|d| d.used == 0), "slots that nobody holds");
    }
}

#[test]
fn no_order_of_events_loses_a_ticket_or_books_a_slot_twice() {
    super::over_seeds("loses_a_ticket", |seed, trace| {
        run(Choices::seeded(seed ^ 0xD00D), seed, trace);
    });
}
