//! The queue under churn: builds and containers of several tenants and sessions ask, end, give up; strangers run beside
//! them; daemons fail, err, come back, grow, are cordoned and drained, go; limits change while tickets wait. What must
//! hold after each event is in [`super::ledger`].

use std::collections::{BTreeMap, BTreeSet};

use super::super::model::*;
use super::super::{Config, Engine};
use super::choices::Choices;
use super::ledger::{Asked, Before, Ledger};

const STEPS: u64 = 300;
const TENANTS: [&str; 3] = ["red", "green", "blue"];
const PROJECTS: [&str; 2] = ["shop", "wiki"];
/// Daemons there may be.
const DAEMONS: u64 = 5;

/// A container that nobody of the pool made, as it really is.
#[derive(Debug, Clone)]
struct Stranger {
    id: String,
    daemon: DaemonId,
    project: Option<&'static str>,
    running: bool,
}

struct Simulation {
    engine: Engine,
    choices: Choices,
    now: Time,
    trace: bool,
    requests: u64,
    ids: u64,
    observed: BTreeMap<DaemonId, Observed>,
    strangers: Vec<Stranger>,
    /// Deep probes that are under way.
    probes: Vec<DaemonId>,
    ledger: Ledger,
}

pub(super) fn run(mut choices: Choices, seed: u64, trace: bool) {
    let crowded = choices.below(8) == 0;
    let config = Config {
        linger: Time::from_secs(choices.below(2) * 10),
        queue_limit: if crowded { 150 } else { 5 + choices.below(60) as usize },
        tenant_waiting: (!crowded && choices.below(3) == 0).then_some(4),
        tenant_slots: (choices.below(3) == 0).then_some(2),
        max_wait: Time::from_secs(600 + choices.below(3600)),
        warm_wait: Time::from_secs(choices.below(90)),
        deep_probe_interval: Time::from_secs([0, 60, 3600][choices.below(3) as usize]),
        ..Config::default()
    };
    let mut simulation = Simulation {
        engine: Engine::new(config.clone(), seed),
        choices,
        now: Time::from_secs(1),
        trace,
        requests: 0,
        ids: 0,
        observed: BTreeMap::new(),
        strangers: Vec::new(),
        probes: Vec::new(),
        ledger: Ledger::new(config),
    };
    for daemon in 0..1 + simulation.below(4) {
        simulation.join(daemon);
    }
    if crowded {
        simulation.crowd();
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

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        if from.is_empty() { None } else { Some(from[self.below(from.len() as u64) as usize].clone()) }
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
        let daemons: Vec<DaemonId> = self.observed.keys().cloned().collect();
        self.pick(&daemons)
    }

    fn step(&mut self) {
        if !self.probes.is_empty() && self.chance(50) {
            self.writes();
        }
        match self.below(100) {
            0..40 => self.ask(),
            40..62 => self.finish(),
            62..68 => self.give_up(),
            68..79 => {
                let seconds = [1, 5, 20, 400][self.choices.below(4) as usize];
                self.pass(Time::from_secs(seconds));
            }
            79..84 => self.session_runs(),
            84..89 => self.stranger(),
            89..91 => {
                if let Some(daemon) = self.any_daemon() {
                    let probe = Probe::Refused("connection refused".into());
                    self.tell(Event::Probed { daemon, probe });
                }
            }
            91..93 => self.all_answer(),
            93..96 => self.pool_changes(),
            _ => self.operator_acts(),
        }
    }

    fn pool_changes(&mut self) {
        let Some(daemon) = self.any_daemon() else { return self.join(0) };
        match self.below(5) {
            0 => {
                let daemon = self.below(DAEMONS);
                self.join(daemon);
            }
            1 => {
                let slots = Some(1 + self.below(4) as u32);
                if let Some(o) = self.observed.get_mut(&daemon) {
                    (o.slots, o.draining) = (slots, false);
                }
                self.observe();
            }
            2 => {
                self.observed.get_mut(&daemon).expect("it is there").draining = true;
                self.observe();
            }
            3 => {
                // Its builds end by themselves; a daemon of that name is another one.
                self.strangers.retain(|s| s.daemon != daemon);
                self.tell(Event::Replaced { daemon });
            }
            _ if self.observed.len() > 1 => {
                self.observed.remove(&daemon);
                self.strangers.retain(|s| s.daemon != daemon);
                self.observe();
            }
            _ => {}
        }
    }

    /// Cordon, drain, and the configuration read again.
    fn operator_acts(&mut self) {
        let Some(daemon) = self.any_daemon() else { return };
        let by = if self.chance(70) { CordonedBy::Operator } else { CordonedBy::Scaler };
        match self.below(9) {
            0 => self.tell(Event::Cordon { daemon, by }),
            1 | 2 => self.tell(Event::Uncordon { daemon, by }),
            3..6 => {
                let deadline = self.now + Time::from_secs([0, 30, 3600][self.choices.below(3) as usize]);
                self.tell(Event::Drain { daemon, deadline });
                self.pass(Time::ZERO);
            }
            _ => self.configure(),
        }
    }

    fn configure(&mut self) {
        let before = self.ledger.config.clone();
        let config = Config {
            grace: Time::from_secs([20, 300][self.choices.below(2) as usize]),
            linger: Time::from_secs(self.below(2) * 10),
            queue_limit: [0, 5, 150][self.choices.below(3) as usize],
            tenant_waiting: (self.below(3) == 0).then_some(4),
            tenant_slots: (self.below(2) == 0).then_some(1 + self.choices.below(2) as u32),
            max_wait: Time::from_secs(60 + self.below(256) * 16),
            warm_wait: Time::from_secs(self.below(90)),
            deep_probe_interval: Time::from_secs([0, 60][self.choices.below(2) as usize]),
            ..before
        };
        self.tell(Event::Configured(Box::new(config)));
        self.pass(Time::ZERO); // A shorter grace may be over already.
    }

    /// More come at once than are looked at for one slot, most of them for one tenant and with caches to wait for.
    fn crowd(&mut self) {
        for _ in 0..70 + self.below(40) {
            let tenant = if self.chance(90) { TENANTS[0] } else { TENANTS[1] };
            let project = self.chance(90).then(|| format!("{tenant}/{}", self.choices.below(3)).into());
            let session = 1000 + self.requests;
            self.asks(tenant, session, Work::Build, project);
        }
    }

    fn ask(&mut self) {
        let tenant = TENANTS[self.below(3) as usize];
        // Half of them come again and again, the others once.
        let session = if self.below(2) == 0 { self.below(4) } else { 1000 + self.requests };
        let work = if self.chance(15) { Work::Container } else { Work::Build };
        let project = (work == Work::Build && self.below(3) == 0)
            .then(|| format!("{tenant}/{}", self.choices.below(5)).into());
        self.asks(tenant, session, work, project);
    }

    fn asks(&mut self, tenant: &'static str, session: u64, work: Work, project: Option<ProjectKey>) {
        let key = SessionKey::from(format!("{tenant}/name:{session}"));
        self.requests += 1;
        let request = RequestId(self.requests);
        let config = &self.ledger.config;
        let asked = Asked {
            tenant,
            key: key.clone(),
            session,
            work,
            cold: project.is_some().then_some(self.now + config.warm_wait),
            until: self.now + config.max_wait,
        };
        self.ledger.waiting.insert(request, asked);
        self.tell(Event::Acquire(Acquire {
            request,
            key,
            tenant: tenant.into(),
            source: None,
            inside: None,
            shares_names: false,
            class: Class::Work(work),
            target: None,
            requirements: Requirements { project, ..Requirements::default() },
            deadline: None,
        }));
    }

    fn finish(&mut self) {
        let opens: Vec<OpenId> = self.ledger.running.keys().copied().collect();
        let Some(open) = self.pick(&opens) else { return };
        let running = self.ledger.running[&open].clone();
        let outcome = match self.below(8) {
            0 => Outcome::ClientGone,
            1 => Outcome::DaemonFailed,
            2 => Outcome::Failed,
            3 => Outcome::Erred,
            4 if running.fresh => Outcome::Unreached,
            _ => Outcome::Done,
        };
        self.tell(Event::Release { open, outcome });
        if outcome == Outcome::Unreached {
            // As the shell does, it is tried elsewhere.
            let Asked { tenant, session, work, .. } = running.asked;
            self.asks(tenant, session, work, None);
        }
    }

    fn give_up(&mut self) {
        let waiting: Vec<RequestId> = self.ledger.waiting.keys().copied().collect();
        if let Some(request) = self.pick(&waiting) {
            self.ledger.waiting.remove(&request);
            self.ledger.abandoned.insert(request);
            self.tell(Event::Abandon(request));
        }
    }

    /// A session makes, starts, stops or removes a container.
    fn session_runs(&mut self) {
        let ids: Vec<String> = self.ledger.containers.keys().cloned().collect();
        if let Some(id) = self.pick(&ids).filter(|_| self.choices.below(3) > 0) {
            let daemon = self.ledger.containers[&id].daemon.clone();
            let fact = match self.below(4) {
                0 => Fact::Started { id },
                1 | 2 => Fact::Stopped { id },
                _ => Fact::Removed { kind: Kind::Container, id },
            };
            self.tell(Event::Learned { daemon, open: None, fact });
            return;
        }
        let there = |(open, r): (&OpenId, &super::ledger::Running)| Some((*open, r.daemon.clone()?));
        let opens: Vec<(OpenId, DaemonId)> = self.ledger.running.iter().filter_map(there).collect();
        let Some((open, daemon)) = self.pick(&opens) else { return };
        self.ids += 1;
        let id = format!("c{}", self.ids);
        let fact = Fact::Created { kind: Kind::Container, id: id.clone(), name: None };
        self.tell(Event::Learned { daemon: daemon.clone(), open: Some(open), fact });
        if self.chance(80) {
            self.tell(Event::Learned { daemon, open: None, fact: Fact::Started { id } });
        }
    }

    /// Somebody works on a daemon directly; events tell it, or the next list does.
    fn stranger(&mut self) {
        let Some(daemon) = self.any_daemon() else { return };
        match self.below(4) {
            0 | 1 => {
                self.ids += 1;
                let id = format!("s{}", self.ids);
                let project = if self.chance(60) { self.pick(&PROJECTS) } else { None };
                self.strangers.push(Stranger {
                    id: id.clone(),
                    daemon: daemon.clone(),
                    project,
                    running: true,
                });
                if self.chance(30) {
                    return; // The event is lost.
                }
                let learned = |fact| Event::Learned { daemon: daemon.clone(), open: None, fact };
                self.tell(learned(Fact::Started { id: id.clone() }));
                if let Some(project) = project.filter(|_| self.chance(70)) {
                    let kind = Kind::Container;
                    self.tell(learned(Fact::Labelled { kind, id, project: project.into() }));
                }
            }
            2 if !self.strangers.is_empty() => {
                let i = self.below(self.strangers.len() as u64) as usize;
                let Stranger { id, daemon, .. } = self.strangers[i].clone();
                let fact = if self.chance(50) {
                    self.strangers[i].running = false;
                    Fact::Stopped { id }
                } else {
                    self.strangers.remove(i);
                    Fact::Removed { kind: Kind::Container, id }
                };
                if self.chance(70) {
                    self.tell(Event::Learned { daemon, open: None, fact });
                }
            }
            _ => self.lists(daemon),
        }
    }

    /// The containers of a daemon, listed again.
    fn lists(&mut self, daemon: DaemonId) {
        self.pass(Time::from_millis(1)); // What was learned before is older than the list.
        let there = || self.strangers.iter().filter(|s| s.daemon == daemon);
        let mut containers: Vec<ListedContainer> = there()
            .map(|s| ListedContainer { id: s.id.clone(), names: Vec::new(), running: s.running })
            .collect();
        let projects = there().filter_map(|s| Some((Kind::Container, s.id.clone(), s.project?.to_string())));
        let projects = projects.collect();
        let own = self.ledger.containers.iter().filter(|(_, c)| c.daemon == daemon);
        containers.extend(own.map(|(id, c)| ListedContainer {
            id: id.clone(),
            names: Vec::new(),
            running: c.live && c.until.is_none(),
        }));
        self.tell(Event::Containers { daemon, began: self.now, containers, projects });
    }

    /// A deep probe ends.
    fn writes(&mut self) {
        let daemon = self.probes.swap_remove(self.choices.below(self.probes.len() as u64) as usize);
        let result = match self.below(6) {
            0 => DeepProbe::Failed("no space left on device".into()),
            1 => DeepProbe::Slow("no answer within 10 s".into()),
            2 => DeepProbe::Unreached,
            _ => DeepProbe::Wrote,
        };
        self.tell(Event::Wrote { daemon, result });
    }

    fn all_answer(&mut self) {
        for daemon in self.observed.keys().cloned().collect::<Vec<_>>() {
            for _ in 0..3 {
                self.answers(&daemon);
                self.pass(Time::from_secs(1));
            }
        }
    }

    fn pass(&mut self, by: Time) {
        let until = self.now + by;
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
        let mut before = Before::of(&self.engine);
        self.ledger.hear(&event, self.now);
        before.bound = self.ledger.bound_of_waiting();
        let effects = self.engine.handle(event.clone(), self.now);
        if self.trace {
            effects.iter().for_each(|effect| println!("    {effect:?}"));
        }
        for effect in &effects {
            if let Effect::ProbeDeeply { daemon } = effect {
                self.probes.push(daemon.clone());
            }
        }
        self.ledger.follow(&event, &effects, before, &self.engine, self.now);
    }

    /// Daemons get well, work ends, and everybody has had an answer. Strangers stay: one slot is always the pool's.
    fn end(&mut self) {
        self.observed.values_mut().for_each(|o| o.draining = false);
        self.observe();
        for daemon in self.observed.keys().cloned().collect::<Vec<_>>() {
            self.tell(Event::Uncordon { daemon, by: CordonedBy::Operator });
        }
        for _ in 0..200 {
            for daemon in std::mem::take(&mut self.probes) {
                self.tell(Event::Wrote { daemon, result: DeepProbe::Wrote });
            }
            self.all_answer();
            for open in self.ledger.running.keys().copied().collect::<Vec<_>>() {
                self.tell(Event::Release { open, outcome: Outcome::Done });
            }
            for (id, container) in self.ledger.containers.clone() {
                let fact = Fact::Removed { kind: Kind::Container, id };
                self.tell(Event::Learned { daemon: container.daemon, open: None, fact });
            }
            self.pass(Time::from_secs(60));
            if self.ledger.waiting.is_empty() && self.ledger.running.is_empty() {
                break;
            }
        }
        assert!(self.ledger.waiting.is_empty(), "{:?} were never answered", self.ledger.waiting);
        for daemon in std::mem::take(&mut self.probes) {
            self.tell(Event::Wrote { daemon, result: DeepProbe::Wrote });
        }
        // Nothing is left to happen but deep probes, of which there is no end.
        let config = Config { deep_probe_interval: Time::ZERO, ..self.ledger.config.clone() };
        self.tell(Event::Configured(Box::new(config)));
        self.pass(Time::from_secs(24 * 3600));
        assert!(self.engine.daemons().all(|d| d.used == 0), "slots that nobody holds");
        let daemons: BTreeSet<DaemonId> = self.engine.daemons().map(|d| d.id.clone()).collect();
        assert!(daemons.into_iter().eq(self.observed.keys().cloned()));
    }
}

#[test]
fn no_order_of_events_loses_a_ticket_or_books_a_slot_twice() {
    super::over_seeds("loses_a_ticket", |seed, trace| {
        run(Choices::seeded(seed ^ 0xD00D), seed, trace);
    });
}
