//! A seeded simulation of churn. Daemons come, go, are replaced and fail their probes; clients of several
//! tenants and kinds start, progress and vanish at any moment; containers run that nobody of the pool made; daemons
//! are cordoned and drained, limits change; what is learned arrives late, twice and out of order. After every event a
//! shadow model that shares no code with the engine checks it.
//!
//! Now and then another proxy takes over.
//!
//! A failing seed is printed with the way to replay it. `DINDPOOL_SEEDS` sets how many are tried,
//! `DINDPOOL_SEED` runs one of them and prints its events. The same simulations take their choices from the bytes
//! of a fuzzer (`crate::fuzzing`), which looks for orders of events that a seed does not find.

mod choices;
mod ledger;
mod queue;
mod shadow;

use std::collections::BTreeMap;
#[cfg(test)]
use std::panic::{catch_unwind, resume_unwind};
#[cfg(test)]
use std::sync::atomic::{AtomicU64, Ordering};

use super::model::*;
use super::{Config, Engine, images};
use choices::Choices;
use shadow::Shadow;

const STEPS: usize = 250;
const DAEMONS: usize = 5;
/// Key, tenant, sources of which each request has one.
const CLIENTS: [(&str, &str, &[&str]); 9] = [
    ("ip:1", "default", &[]),
    ("posix:1", "default", &[]),
    ("job:1", "default", &[]),
    ("red/ip:1", "red", &[]),
    ("red/posix:1", "red", &[]),
    ("name:a", "default", &["ip:s"]),
    ("name:b", "default", &["ip:s"]),
    ("name:far", "default", &["ip:s", "ip:t"]),
    ("ip:s", "default", &[]),
];
const IMAGES: [&str; 5] = ["alpine", "app", "app:2", "base", "localhost:5000/app"];
const NAMES: [&str; 3] = ["db", "web", "app_default"];
const PROJECTS: [&str; 2] = ["shop", "wiki"];

/// A container as it really is.
#[derive(Debug, Clone)]
struct Real {
    daemon: DaemonId,
    id: String,
    name: Option<String>,
    running: bool,
    /// Its compose project.
    project: Option<&'static str>,
}

struct Simulation {
    engine: Engine,
    shadow: Shadow,
    choices: Choices,
    now: Time,
    requests: u64,
    ids: u64,
    daemons: BTreeMap<DaemonId, Observed>,
    containers: Vec<Real>,
    /// Learned, and on its way.
    late: Vec<Event>,
    trace: bool,
}

impl Simulation {
    fn new(choices: Choices, seed: u64, trace: bool) -> Self {
        let config = Config {
            memory: Time::from_secs(48 * 3600),
            queue_limit: 0,
            deep_probe_interval: Time::from_secs(3 * 3600),
            ..Config::default()
        };
        Simulation {
            engine: Engine::new(config.clone(), seed),
            shadow: Shadow::new(config),
            choices,
            now: Time::from_secs(1),
            requests: 0,
            ids: 0,
            daemons: BTreeMap::new(),
            containers: Vec::new(),
            late: Vec::new(),
            trace,
        }
    }

    fn below(&mut self, n: usize) -> usize {
        self.choices.below(n as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        if from.is_empty() { None } else { Some(from[self.below(from.len())].clone()) }
    }

    fn tell(&mut self, event: Event) -> Vec<Effect> {
        if self.trace {
            println!("{:?} {event:?}", self.now);
        }
        let effects = self.engine.handle(event.clone(), self.now);
        if self.trace {
            effects.iter().for_each(|effect| println!("    {effect:?}"));
        }
        if !cfg!(debug_assertions) {
            self.engine.check_invariants(); // Otherwise it has done so itself.
        }
        self.shadow.follow(&event, &effects, &self.engine, self.now);
        for effect in &effects {
            if let Effect::ProbeDeeply { daemon } = effect {
                let result = match self.below(9) {
                    0 => DeepProbe::Failed("no space left on device".into()),
                    1 => DeepProbe::Slow("no answer within 10 s".into()),
                    2 => DeepProbe::Unreached,
                    _ => DeepProbe::Wrote,
                };
                self.late.push(Event::Wrote { daemon: daemon.clone(), result });
            }
        }
        effects
    }

    /// Time passes, with a tick whenever one is due, as the shell does it.
    fn pass(&mut self, by: Time) {
        let until = self.now + by;
        while let Some(at) = self.engine.next_tick().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.tell(Event::Tick);
        }
        self.now = until;
    }

    fn step(&mut self) {
        match self.below(100) {
            0..20 => {
                let by = match self.below(20) {
                    0 => 400_000,
                    1..4 => 70_000,
                    4..10 => 6_000,
                    _ => 300,
                };
                let by = self.choices.below(by);
                self.pass(Time::from_millis(by));
            }
            20..45 => self.client_asks(),
            45..63 => self.grant_progresses(),
            63..72 => self.container_changes(),
            72..75 => self.stranger_starts(),
            75..88 => self.news_arrives(),
            88..92 => self.daemon_is_listed(),
            92..97 => self.pool_changes(),
            97 => self.another_proxy_admits(),
            _ => self.operator_acts(),
        }
    }

    fn acquire(&mut self, class: Class) -> Acquire {
        let (key, tenant, sources) = CLIENTS[self.below(CLIENTS.len())];
        self.requests += 1;
        Acquire {
            request: RequestId(self.requests),
            key: key.into(),
            tenant: tenant.into(),
            source: self.pick(sources).map(SessionKey::from),
            inside: None,
            shares_names: true,
            class,
            target: None,
            requirements: Requirements::default(),
            deadline: None,
        }
    }

    fn image(&mut self) -> String {
        images::normalise(IMAGES[self.below(IMAGES.len())])
    }

    fn client_asks(&mut self) {
        match self.below(12) {
            0 | 1 => {
                let acquire = self.acquire(Class::Work(Work::Build));
                self.tell(Event::Acquire(acquire));
            }
            2 => self.buildkit(),
            3..6 => {
                let mut acquire = self.acquire(Class::Work(Work::Container));
                acquire.requirements.image = self.chance(70).then(|| self.image());
                if self.chance(30) {
                    let kind = [Kind::Container, Kind::Network, Kind::Volume][self.below(3)];
                    let reference = NAMES[self.below(NAMES.len())].to_string();
                    acquire.requirements.beside.push(ObjectRef { kind, reference });
                }
                if self.chance(8) {
                    let daemons: Vec<DaemonId> = self.daemons.keys().cloned().collect();
                    acquire.inside = self.pick(&daemons);
                    acquire.key = "inside".into();
                    acquire.source = None;
                }
                self.tell(Event::Acquire(acquire));
            }
            6 => {
                let work = [Work::Pull, Work::Load][self.below(2)];
                let acquire = self.acquire(Class::Work(work));
                self.tell(Event::Acquire(acquire));
            }
            7 => {
                let acquire = self.acquire(Class::Work(Work::Resource));
                self.tell(Event::Acquire(acquire));
            }
            8 => {
                let class = [Class::Read, Class::Any][self.below(2)];
                let acquire = self.acquire(class);
                self.tell(Event::Acquire(acquire));
            }
            9 => {
                let mut acquire = self.acquire(Class::Follow);
                acquire.requirements.image = Some(self.image());
                self.tell(Event::Acquire(acquire));
            }
            _ => {
                let mut acquire = self.acquire(Class::Follow);
                let ids: Vec<String> = self.containers.iter().map(|c| c.id.clone()).collect();
                let reference = match self.pick(&ids) {
                    Some(id) if self.chance(60) => id,
                    _ => NAMES[self.below(NAMES.len())].to_string(),
                };
                acquire.target = Some(ObjectRef { kind: Kind::Container, reference });
                self.tell(Event::Acquire(acquire));
            }
        }
    }

    /// A buildx build: two connections to the daemon's API, two for its session.
    fn buildkit(&mut self) {
        let first = self.acquire(Class::Work(Work::BuildKit));
        self.ids += 1;
        let uuid = ObjectRef { kind: Kind::BuildSession, reference: format!("uuid{}", self.ids) };
        for i in 0..4 {
            self.requests += 1;
            let mut acquire = Acquire { request: RequestId(self.requests), ..first.clone() };
            if i % 2 == 1 {
                acquire.class = Class::Join;
                acquire.target = Some(uuid.clone());
            }
            self.tell(Event::Acquire(acquire));
            if self.chance(5) {
                return; // It vanished half-way.
            }
        }
    }

    /// Something that is open learns something, solves, or ends.
    fn grant_progresses(&mut self) {
        let opens: Vec<OpenId> = self.shadow.grants.keys().copied().collect();
        let Some(open) = self.pick(&opens) else { return };
        let grant = self.shadow.grants[&open].clone();
        let mut learned = false;
        if self.chance(70) {
            learned = true;
            match grant.acquire.class {
                Class::Work(Work::BuildKit) => {
                    for _ in 0..=self.below(2) {
                        self.tell(Event::BuildSeen(open));
                    }
                    self.writes(&grant.daemon, None, Written::Made);
                }
                Class::Work(Work::Build) => self.writes(&grant.daemon, Some(open), Written::Made),
                Class::Work(Work::Pull) => self.writes(&grant.daemon, Some(open), Written::Pulled),
                Class::Work(Work::Load) => self.writes(&grant.daemon, Some(open), Written::Made),
                Class::Work(Work::Container) => self.creates(&grant.daemon, open),
                Class::Work(Work::Resource) => {
                    let kind = [Kind::Network, Kind::Volume][self.below(2)];
                    let name = NAMES[self.below(NAMES.len())].to_string();
                    self.ids += 1;
                    let id = if kind == Kind::Volume { name.clone() } else { format!("{:08x}", self.ids) };
                    let fact = Fact::Created { kind, id: id.clone(), name: Some(name) };
                    self.hears(&grant.daemon, Some(open), fact);
                    if self.chance(50) {
                        self.hears(&grant.daemon, None, Fact::Removed { kind, id });
                    }
                }
                _ => {}
            }
        }
        if self.chance(60) {
            let outcome = match self.below(12) {
                0 => Outcome::ClientGone,
                1 => Outcome::DaemonFailed,
                2 => Outcome::Aborted,
                3 if !learned => Outcome::Unreached,
                4 => Outcome::Erred,
                5 => Outcome::Failed,
                _ => Outcome::Done,
            };
            self.tell(Event::Release { open, outcome });
            if self.chance(5) {
                self.tell(Event::Release { open, outcome });
            }
        }
    }

    /// Learned, at once or later, once or twice.
    fn hears(&mut self, daemon: &DaemonId, open: Option<OpenId>, fact: Fact) {
        let event = Event::Learned { daemon: daemon.clone(), open, fact };
        if self.chance(20) {
            self.late.push(event.clone());
        }
        if self.chance(60) {
            self.tell(event);
        } else {
            self.late.push(event);
        }
    }

    fn writes(&mut self, daemon: &DaemonId, open: Option<OpenId>, written: Written) {
        let reference = self.image();
        let id = format!("sha256:{:04x}", self.below(8));
        let fact =
            Fact::ImageWritten { reference: reference.clone(), id: self.chance(70).then_some(id), written };
        self.hears(daemon, open, fact);
        match self.below(6) {
            0 => self.hears(daemon, None, Fact::ImagePushed { reference }),
            1 => self.hears(daemon, None, Fact::ImageRemoved { reference }),
            _ => {}
        }
    }

    fn creates(&mut self, daemon: &DaemonId, open: OpenId) {
        if !self.daemons.contains_key(daemon) {
            return;
        }
        self.ids += 1;
        let id = format!("{:08x}", self.ids * 0x0101_0101);
        let name = self.chance(40).then(|| NAMES[self.below(NAMES.len())].to_string());
        let fact = Fact::Created { kind: Kind::Container, id: id.clone(), name: name.clone() };
        if self.chance(50) {
            self.hears(daemon, None, fact.clone());
        }
        self.hears(daemon, Some(open), fact);
        self.containers.push(Real { daemon: daemon.clone(), id, name, running: false, project: None });
    }

    /// Somebody works on a daemon directly, or a restart policy does: a container runs that no request made. Of its
    /// start, its making and its project any may be told first, late, or only by a list.
    fn stranger_starts(&mut self) {
        let daemons: Vec<DaemonId> = self.daemons.keys().cloned().collect();
        let Some(daemon) = self.pick(&daemons) else { return };
        self.ids += 1;
        let id = format!("{:08x}", self.ids * 0x0101_0101);
        let project = if self.chance(60) { self.pick(&PROJECTS) } else { None };
        if self.chance(50) {
            self.hears(&daemon, None, Fact::Created { kind: Kind::Container, id: id.clone(), name: None });
        }
        if let Some(project) = project.filter(|_| self.chance(70)) {
            let (id, project) = (id.clone(), project.to_string());
            self.hears(&daemon, None, Fact::Labelled { kind: Kind::Container, id, project });
        }
        if self.chance(80) {
            self.hears(&daemon, None, Fact::Started { id: id.clone() });
        }
        self.containers.push(Real { daemon, id, name: None, running: true, project });
    }

    fn container_changes(&mut self) {
        if self.containers.is_empty() {
            return;
        }
        let i = self.below(self.containers.len());
        let Real { daemon, id, running, .. } = self.containers[i].clone();
        match self.below(8) {
            0 => {
                self.containers.remove(i);
                self.hears(&daemon, None, Fact::Removed { kind: Kind::Container, id });
            }
            1 => {
                let name = NAMES[self.below(NAMES.len())].to_string();
                self.containers[i].name = Some(name.clone());
                self.hears(&daemon, None, Fact::Renamed { id, name });
            }
            _ => {
                self.containers[i].running = !running;
                let fact = if running { Fact::Stopped { id } } else { Fact::Started { id } };
                self.hears(&daemon, None, fact);
            }
        }
    }

    fn news_arrives(&mut self) {
        for _ in 0..=self.below(3) {
            if self.late.is_empty() {
                return;
            }
            let i = self.below(self.late.len());
            let event = self.late.swap_remove(i);
            self.tell(event);
        }
    }

    /// A list is asked for; its answer comes at once or later.
    fn daemon_is_listed(&mut self) {
        let daemons: Vec<DaemonId> = self.daemons.keys().cloned().collect();
        let Some(daemon) = self.pick(&daemons) else { return };
        let listed = |c: &Real| ListedContainer {
            id: c.id.clone(),
            names: c.name.iter().cloned().collect(),
            running: c.running,
        };
        let there = || self.containers.iter().filter(|c| c.daemon == daemon);
        let containers = there().map(listed).collect();
        let projects = there().filter_map(|c| Some((Kind::Container, c.id.clone(), c.project?.to_string())));
        let projects = projects.collect();
        let images: Vec<ListedImage> = (0..self.below(4))
            .map(|_| ListedImage {
                id: format!("sha256:{:04x}", self.below(8)),
                references: vec![self.image()],
                in_registry: self.chance(30),
            })
            .collect();
        let began = self.now;
        let event = if self.chance(20) {
            Event::Containers { daemon, began, containers, projects }
        } else if self.chance(50) {
            // The shadow follows networks and volumes by their facts: a list tells nothing new of them.
            let (networks, volumes) = self.known(&daemon);
            Event::Inventory {
                daemon,
                began,
                inventory: Inventory { containers, networks, volumes, images, projects },
            }
        } else {
            Event::Images { daemon, began, images }
        };
        if self.chance(60) {
            self.tell(event);
        } else {
            self.late.push(event);
        }
    }

    /// What this engine knows goes to one that knows only what is there, and comes back: the shadow sees no
    /// difference.
    fn another_proxy_admits(&mut self) {
        let export = self.engine.export(self.now);
        let text = serde_json::to_string(&export).expect("plain data");
        self.engine.handle(Event::Retired, self.now);
        assert!(self.engine.sessions.is_empty() && self.engine.opens.is_empty());
        let export = Box::new(serde_json::from_str(&text).expect("the same data"));
        let epoch = self.engine.config.epoch + 1;
        let mut numbers = BTreeMap::new();
        for effect in self.engine.handle(Event::Import { epoch, export }, self.now) {
            if let Effect::Attached { theirs, open, .. } = effect {
                numbers.insert(theirs, open);
            }
        }
        if self.trace {
            println!("{:?} handed over: {text} {numbers:?}", self.now);
        }
        self.shadow.renumber(&numbers);
        for late in &mut self.late {
            if let Event::Learned { open: Some(open), .. } = late {
                *open = numbers.get(open).copied().unwrap_or(*open);
            }
        }
    }

    /// The networks and volumes that the engine knows of on `daemon`.
    fn known(&self, daemon: &DaemonId) -> (Vec<(String, String)>, Vec<String>) {
        let on = || self.engine.objects.on(daemon);
        (
            on().filter(|(kind, _, _)| *kind == Kind::Network)
                .map(|(_, id, o)| (id.to_string(), o.name.clone().unwrap_or_default()))
                .collect(),
            on().filter(|(kind, _, _)| *kind == Kind::Volume).map(|(_, id, _)| id.to_string()).collect(),
        )
    }

    fn pool_changes(&mut self) {
        let daemons: Vec<DaemonId> = self.daemons.keys().cloned().collect();
        let daemon = self.pick(&daemons);
        match (self.below(20), daemon) {
            (0, Some(daemon)) => {
                self.daemons.remove(&daemon);
                self.containers.retain(|c| c.daemon != daemon);
                self.observe();
            }
            (1, Some(daemon)) => {
                self.containers.retain(|c| c.daemon != daemon);
                self.tell(Event::Replaced { daemon });
            }
            (2, Some(daemon)) => {
                let observed = self.daemons.get_mut(&daemon).expect("one of them");
                observed.draining = !observed.draining;
                self.observe();
            }
            (3..5, _) | (_, None) => {
                let id: DaemonId = format!("d{}", self.below(DAEMONS)).into();
                self.daemons.entry(id.clone()).or_insert(Observed {
                    id,
                    draining: false,
                    pending: None,
                    slots: Some(2),
                });
                self.observe();
            }
            (5, Some(daemon)) => {
                let probe = Probe::Refused("connection refused".into());
                self.tell(Event::Probed { daemon, probe });
            }
            (6..8, Some(daemon)) => {
                let probe = Probe::Failed("no answer in 5 s".into());
                self.tell(Event::Probed { daemon, probe });
            }
            (_, Some(daemon)) => self.answers(daemon),
        }
    }

    /// Cordon, drain, and the configuration read again.
    fn operator_acts(&mut self) {
        let daemons: Vec<DaemonId> = self.daemons.keys().cloned().collect();
        let Some(daemon) = self.pick(&daemons) else { return };
        let by = if self.chance(50) { CordonedBy::Operator } else { CordonedBy::Scaler };
        match self.below(8) {
            0 | 1 => self.tell(Event::Cordon { daemon, by }),
            2 | 3 => self.tell(Event::Uncordon { daemon, by }),
            4 | 5 => {
                let wait = [0, 5, 400][self.below(3)];
                let deadline = self.now + Time::from_secs(wait);
                self.tell(Event::Drain { daemon, deadline })
            }
            6 => {
                let slots = Some(1 + self.below(4) as u32);
                self.daemons.get_mut(&daemon).expect("one of them").slots = slots;
                self.observe();
                Vec::new()
            }
            _ => {
                let config = Config {
                    grace: Time::from_secs([20, 300, 900][self.below(3)]),
                    linger: Time::from_secs([0, 10, 60][self.below(3)]),
                    unstarted: Time::from_secs([10, 60][self.below(2)]),
                    deep_probe_interval: Time::from_secs([0, 60, 3 * 3600][self.below(3)]),
                    ..self.engine.config.clone()
                };
                self.tell(Event::Configured(Box::new(config)))
            }
        };
        self.pass(Time::ZERO);
    }

    fn answers(&mut self, daemon: DaemonId) {
        let facts = Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() };
        self.tell(Event::Probed { daemon, probe: Probe::Answered(facts) });
    }

    fn observe(&mut self) {
        let observed = self.daemons.values().cloned().collect();
        self.tell(Event::Observed(observed));
    }

    /// Everything ends; nothing may be left.
    fn end(&mut self) {
        for event in std::mem::take(&mut self.late) {
            self.tell(event);
        }
        for open in self.shadow.grants.keys().copied().collect::<Vec<_>>() {
            self.tell(Event::Release { open, outcome: Outcome::Done });
        }
        self.pass(Time::from_secs(3600));
        for daemon in self.daemons.keys().cloned().collect::<Vec<_>>() {
            let began = self.now;
            self.tell(Event::Inventory { daemon, began, inventory: Inventory::default() });
        }
        self.pass(Time::from_secs(5 * 24 * 3600));
        assert!(self.engine.opens.is_empty(), "open: {:?}", self.engine.opens);
        assert!(self.engine.sessions.is_empty(), "sessions: {:?}", self.engine.sessions);
        assert!(self.engine.sources.is_empty(), "sources: {:?}", self.engine.sources);
        for daemon in self.daemons.keys() {
            let left: Vec<_> = self.engine.objects.on(daemon).collect();
            assert!(left.is_empty(), "objects on {daemon}: {left:?}");
        }
        self.daemons.clear();
        self.observe();
        assert_eq!(self.engine.image_count(), 0);
        assert!(self.engine.timers.is_empty(), "timers: {:?}", self.engine.timers);
    }

    fn run(&mut self) {
        for i in 0..3 {
            let id: DaemonId = format!("d{i}").into();
            let observed = Observed { id: id.clone(), draining: false, pending: None, slots: Some(2) };
            self.daemons.insert(id.clone(), observed);
            self.observe();
            self.answers(id);
        }
        for _ in 0..self.below(STEPS) {
            if self.choices.is_over() {
                break;
            }
            self.step();
        }
        self.end();
    }
}

#[test]
fn no_order_of_events_splits_a_session_or_loses_a_slot() {
    over_seeds("no_order_of_events", |seed, trace| {
        Simulation::new(Choices::seeded(seed ^ 0x5EED), seed, trace).run();
    });
}

/// One of the two simulations, as the first byte says, with its choices from the others.
pub(crate) fn run_choices(bytes: &[u8], trace: bool) {
    let Some((which, rest)) = bytes.split_first() else { return };
    let (choices, seed) = (Choices::given(rest), u64::from(which >> 1));
    match which % 2 {
        0 => Simulation::new(choices, seed, trace).run(),
        _ => queue::run(choices, seed, trace),
    }
}

#[cfg(test)]
/// Runs a simulation for many seeds, or for the one that `DINDPOOL_SEED` says.
fn over_seeds(name: &str, run: fn(u64, bool)) {
    if let Ok(seed) = std::env::var("DINDPOOL_SEED") {
        return run(seed.parse().expect("DINDPOOL_SEED is a number"), true);
    }
    let seeds =
        std::env::var("DINDPOOL_SEEDS").map_or(10_000, |n| n.parse().expect("DINDPOOL_SEEDS is a number"));
    let next = AtomicU64::new(0);
    let run_all = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return;
            }
            if let Err(panic) = catch_unwind(|| run(seed, false)) {
                next.store(seeds, Ordering::Relaxed);
                eprintln!("seed {seed} fails; to replay it:");
                eprintln!("DINDPOOL_SEED={seed} cargo test --lib {name} -- --nocapture");
                resume_unwind(panic);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(run_all);
        }
    });
}
