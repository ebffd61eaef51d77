//! The engine's rules, one scenario each. A test's name is the rule.

use super::model::*;
use super::{Config, Engine};

/// An engine and its clock, driven as the shell does.
struct Pool {
    engine: Engine,
    now: Time,
    requests: u64,
    told: Vec<Effect>,
}

/// A granted request.
#[derive(Debug, Clone)]
struct Grant {
    open: OpenId,
    daemon: DaemonId,
    lease: Option<LeaseId>,
    fresh: bool,
}

fn facts(api_min: u16, api_max: u16) -> Facts {
    Facts { api_min: (1, api_min), api_max: (1, api_max), arch: "amd64".into(), ..Facts::default() }
}

/// Asks for a daemon.
fn ask(key: &str, class: Class) -> Acquire {
    Acquire {
        request: RequestId(0),
        key: key.into(),
        tenant: "default".into(),
        source: None,
        inside: None,
        class,
        target: None,
        requirements: Requirements::default(),
        deadline: None,
    }
}

fn build(key: &str) -> Acquire {
    ask(key, Class::Work(Work::Build))
}

fn create(key: &str, image: &str) -> Acquire {
    ask(key, Class::Work(Work::Container)).image(image)
}

fn follow(key: &str) -> Acquire {
    ask(key, Class::Follow)
}

impl Acquire {
    fn image(mut self, reference: &str) -> Self {
        self.requirements.image = Some(super::images::normalise(reference));
        self
    }

    fn target(mut self, kind: Kind, reference: &str) -> Self {
        self.target = Some(ObjectRef { kind, reference: reference.into() });
        self
    }

    fn beside(mut self, kind: Kind, reference: &str) -> Self {
        self.requirements.beside.push(ObjectRef { kind, reference: reference.into() });
        self
    }

    fn from(mut self, source: &str) -> Self {
        self.source = Some(source.into());
        self
    }

    fn of(mut self, tenant: &str) -> Self {
        self.tenant = tenant.into();
        self
    }

    fn api(mut self, minor: u16) -> Self {
        self.requirements.api = Some((1, minor));
        self
    }
}

impl Pool {
    /// A pool of healthy daemons `a`, `b`, … with two slots each.
    fn of(daemons: usize) -> Self {
        Self::seeded(daemons, 1)
    }

    fn seeded(daemons: usize, seed: u64) -> Self {
        let mut pool = Pool {
            engine: Engine::new(Config::default(), seed),
            now: Time::from_secs(1),
            requests: 0,
            told: Vec::new(),
        };
        let ids: Vec<DaemonId> =
            (0..daemons).map(|i| char::from(b'a' + i as u8).to_string().into()).collect();
        pool.observe(&ids);
        for id in &ids {
            pool.answers(id);
        }
        pool
    }

    fn tell(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.engine.handle(event, self.now);
        self.told.extend(effects.iter().cloned());
        effects
    }

    fn observe(&mut self, ids: &[DaemonId]) {
        let observed = ids
            .iter()
            .map(|id| Observed { id: id.clone(), draining: false, pending: None, slots: Some(2) })
            .collect();
        self.tell(Event::Observed(observed));
    }

    fn answers(&mut self, daemon: &DaemonId) {
        let probe = Probe::Answered(facts(24, 51));
        self.tell(Event::Probed { daemon: daemon.clone(), probe });
    }

    fn refuses(&mut self, daemon: &DaemonId) {
        let probe = Probe::Refused("connection refused".into());
        self.tell(Event::Probed { daemon: daemon.clone(), probe });
    }

    fn ask(&mut self, mut acquire: Acquire) -> Result<Grant, Refusal> {
        self.requests += 1;
        acquire.request = RequestId(self.requests);
        self.tell(Event::Acquire(acquire))
            .into_iter()
            .find_map(|effect| match effect {
                Effect::Granted { open, daemon, lease, fresh, .. } => {
                    Some(Ok(Grant { open, daemon, lease, fresh }))
                }
                Effect::Refused { refusal, .. } => Some(Err(refusal)),
                _ => None,
            })
            .expect("an answer")
    }

    fn grant(&mut self, acquire: Acquire) -> Grant {
        self.ask(acquire).expect("a daemon")
    }

    fn refuse(&mut self, acquire: Acquire) -> String {
        match self.ask(acquire).expect_err("a refusal") {
            Refusal::NoDaemon(text)
            | Refusal::ApiVersion(text)
            | Refusal::Ambiguous(text)
            | Refusal::SessionLost(text) => text,
        }
    }

    fn end(&mut self, grant: &Grant, outcome: Outcome) {
        self.tell(Event::Release { open: grant.open, outcome });
    }

    fn done(&mut self, grant: &Grant) {
        self.end(grant, Outcome::Done);
    }

    /// Asks, and is done at once.
    fn call(&mut self, acquire: Acquire) -> DaemonId {
        let grant = self.grant(acquire);
        self.done(&grant);
        grant.daemon
    }

    fn learn(&mut self, daemon: &DaemonId, open: Option<&Grant>, fact: Fact) {
        self.tell(Event::Learned { daemon: daemon.clone(), open: open.map(|g| g.open), fact });
    }

    /// A container is created and its id learned from the response.
    fn container(&mut self, acquire: Acquire, id: &str, name: Option<&str>) -> DaemonId {
        let grant = self.grant(acquire);
        let fact = Fact::Created { kind: Kind::Container, id: id.into(), name: name.map(str::to_string) };
        self.learn(&grant.daemon, Some(&grant), fact);
        self.done(&grant);
        grant.daemon
    }

    fn run(&mut self, acquire: Acquire, id: &str, name: Option<&str>) -> DaemonId {
        let daemon = self.container(acquire, id, name);
        self.learn(&daemon, None, Fact::Started { id: id.into() });
        daemon
    }

    fn exits(&mut self, daemon: &DaemonId, id: &str) {
        self.learn(daemon, None, Fact::Stopped { id: id.into() });
    }

    fn removed(&mut self, daemon: &DaemonId, id: &str) {
        self.learn(daemon, None, Fact::Removed { kind: Kind::Container, id: id.into() });
    }

    fn writes(&mut self, grant: &Grant, reference: &str, id: &str, written: Written) {
        let fact = Fact::ImageWritten {
            reference: super::images::normalise(reference),
            id: Some(id.into()),
            written,
        };
        self.learn(&grant.daemon, Some(grant), fact);
    }

    /// Builds an image from start to end.
    fn makes(&mut self, key: &str, reference: &str, id: &str) -> DaemonId {
        let grant = self.grant(build(key));
        self.writes(&grant, reference, id, Written::Made);
        self.done(&grant);
        grant.daemon
    }

    /// Time passes, with a tick whenever the engine asked for one.
    fn pass(&mut self, seconds: u64) {
        let until = self.now + Time::from_secs(seconds);
        while let Some(at) = self.engine.next_tick().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.tell(Event::Tick);
        }
        self.now = until;
    }

    fn used(&self, daemon: &DaemonId) -> u32 {
        self.engine.daemons().find(|d| d.id == *daemon).expect("a daemon").used
    }

    fn lease(&self, key: &str) -> Option<LeaseId> {
        self.engine.sessions().find(|(k, _)| k.as_str() == key)?.1.lease()
    }

    fn home(&self, key: &str) -> Option<DaemonId> {
        self.engine.home(&key.into()).cloned()
    }
}

#[test]
fn a_lease_ends_a_grace_after_the_last_work_and_not_after_its_start() {
    let mut pool = Pool::of(2);
    let grant = pool.grant(build("k"));
    pool.pass(3600);
    pool.done(&grant);
    pool.pass(299);
    assert_eq!(pool.lease("k"), grant.lease, "an hour's build is followed by a whole grace");
    pool.pass(1);
    assert_eq!(pool.lease("k"), None);
}
