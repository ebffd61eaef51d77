//! The engine's rules, one scenario each. A test's name is the rule.

mod apart;
mod cordon;
mod departure;
mod reason;

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
        shares_names: true,
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
            // The queue has rules of its own.
            engine: Engine::new(Config { queue_limit: 0, ..Config::default() }, seed),
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
            | Refusal::QueueFull(text)
            | Refusal::TenantFull(text)
            | Refusal::LongestWait(text)
            | Refusal::NotFound(text)
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

#[test]
fn a_sessions_second_build_goes_to_its_daemon() {
    let mut pool = Pool::of(8);
    let first = pool.grant(build("k"));
    pool.done(&first);
    for _ in 0..20 {
        pool.pass(60);
        let again = pool.grant(build("k"));
        assert_eq!((&again.daemon, again.lease), (&first.daemon, first.lease));
        pool.done(&again);
    }
}

#[test]
fn an_image_of_another_session_leads_to_its_latest_writer() {
    let mut pool = Pool::of(4);
    let old = pool.makes("monday", "app", "sha256:11");
    let elsewhere = pool.grant(build("x"));
    let new = loop {
        let key = format!("tuesday{}", pool.requests);
        let daemon = pool.makes(&key, "app", "sha256:22");
        if daemon != old {
            break daemon;
        }
    };
    pool.done(&elsewhere);
    assert_eq!(pool.call(follow("push").image("app")), new);
    assert_eq!(pool.call(create("run", "app")), new);
    assert_eq!(pool.home("push"), None, "a push follows the image and binds nothing");
}

#[test]
fn a_session_uses_its_own_image_although_another_wrote_one_later() {
    let mut pool = Pool::of(2);
    let mine = pool.makes("me", "app", "sha256:11");
    let other = pool.makes("you", "app", "sha256:22");
    assert_ne!(mine, other);
    assert_eq!(pool.call(create("me", "app")), mine);
    assert_eq!(pool.call(follow("me").image("app")), mine);
}

#[test]
fn daemons_with_the_same_image_id_count_as_equal() {
    let mut pool = Pool::of(3);
    let made = pool.makes("k", "app", "sha256:11");
    let loader = pool.grant(ask("l", Class::Work(Work::Load)));
    pool.writes(&loader, "app", "sha256:11", Written::Made);
    pool.done(&loader);
    assert_ne!(loader.daemon, made);
    let mut used: Vec<DaemonId> =
        (0..2).map(|i| pool.grant(create(&format!("r{i}"), "app")).daemon).collect();
    used.sort();
    let mut both = vec![made, loader.daemon];
    both.sort();
    assert_eq!(used, both, "the second goes where the first is not");
}

#[test]
fn a_pulled_image_does_not_pile_sessions_on_one_daemon() {
    let mut pool = Pool::of(4);
    let pull = pool.grant(ask("p", Class::Work(Work::Pull)));
    pool.writes(&pull, "alpine", "sha256:aa", Written::Pulled);
    pool.done(&pull);
    let mut daemons: Vec<DaemonId> = (0..8).map(|i| pool.call(create(&format!("k{i}"), "alpine"))).collect();
    assert!(daemons.contains(&pull.daemon));
    daemons.sort();
    daemons.dedup();
    assert_eq!(daemons.len(), 4);
}

#[test]
fn a_pulled_image_draws_a_session_at_equal_load() {
    for seed in 0..20 {
        let mut pool = Pool::seeded(4, seed);
        let c = DaemonId::from("c");
        let fact = Fact::ImageWritten {
            reference: super::images::normalise("alpine"),
            id: Some("sha256:aa".into()),
            written: Written::Pulled,
        };
        pool.learn(&c, None, fact);
        assert_eq!(pool.call(create("k", "alpine")), c);
    }
}

#[test]
fn a_rebuilt_image_no_longer_holds_the_session_that_made_the_old_one() {
    let mut pool = Pool::of(1);
    pool.makes("old", "app", "sha256:11");
    pool.makes("new", "app", "sha256:22");
    pool.pass(400);
    assert_eq!(pool.home("old"), None);
    assert!(pool.home("new").is_some());
}

#[test]
fn an_image_rebuilt_without_a_known_id_is_not_the_one_that_others_have() {
    let mut pool = Pool::of(2);
    let other = pool.makes("x", "app", "sha256:11");
    let mine = pool.makes("y", "app", "sha256:11");
    assert_ne!(mine, other);
    pool.pass(1);
    let grant = pool.grant(build("y"));
    let reference = super::images::normalise("app");
    let fact = Fact::ImageWritten { reference, id: None, written: Written::Made };
    pool.learn(&grant.daemon, Some(&grant), fact);
    pool.done(&grant);
    for i in 0..8 {
        assert_eq!(pool.call(follow(&format!("push{i}")).image("app")), mine);
    }
}

#[test]
fn an_image_that_many_sessions_make_again_remembers_only_the_latest() {
    let mut pool = Pool::of(1);
    for i in 0..100 {
        pool.makes(&format!("k{i:03}"), "app", "sha256:11");
    }
    pool.pass(400);
    assert_eq!(pool.home("k000"), None);
    assert!(pool.home("k099").is_some());
}

#[test]
fn an_older_list_does_not_undo_what_was_learned_since() {
    let mut pool = Pool::of(1);
    let daemon = pool.container(create("k", "alpine"), "c1", None);
    pool.pass(5);
    let began = pool.now;
    let listed = |running| ListedContainer { id: "c1".into(), names: vec![], running };
    pool.pass(1);
    pool.learn(&daemon, None, Fact::Started { id: "c1".into() });
    pool.pass(1);
    let inventory = Inventory { containers: vec![listed(false)], ..Inventory::default() };
    pool.tell(Event::Inventory { daemon: daemon.clone(), began, inventory });
    pool.pass(600);
    assert_eq!(pool.used(&daemon), 1, "it runs");
    let (began, inventory) =
        (pool.now, Inventory { containers: vec![listed(false)], ..Inventory::default() });
    pool.pass(1);
    pool.tell(Event::Inventory { daemon: daemon.clone(), began, inventory });
    pool.pass(10);
    assert_eq!(pool.used(&daemon), 0, "its exit was missed, and the list tells");
    let began = pool.now;
    pool.pass(1);
    pool.learn(&daemon, None, Fact::Started { id: "c1".into() });
    pool.learn(&daemon, None, Fact::Stopped { id: "c1".into() });
    let inventory = Inventory { containers: vec![listed(true)], ..Inventory::default() };
    pool.tell(Event::Inventory { daemon: daemon.clone(), began, inventory });
    pool.pass(60);
    assert_eq!(pool.used(&daemon), 0, "the list is older than the exit");
}

#[test]
fn a_container_whose_start_only_a_list_told_counts_longer_than_a_minute() {
    let mut pool = Pool::of(1);
    let daemon = pool.container(create("k", "alpine"), "c1", None);
    pool.pass(5);
    let containers = vec![ListedContainer { id: "c1".into(), names: vec![], running: true }];
    let (began, inventory) = (pool.now, Inventory { containers, ..Inventory::default() });
    pool.tell(Event::Inventory { daemon: daemon.clone(), began, inventory });
    pool.pass(600);
    assert_eq!(pool.used(&daemon), 1);
}

#[test]
fn a_list_names_the_builders_also_those_whose_build_still_runs() {
    let mut pool = Pool::of(1);
    let slow = pool.grant(build("slow"));
    let listed = |reference: &str, id: &str| ListedImage {
        id: id.into(),
        references: vec![super::images::normalise(reference)],
        in_registry: false,
    };
    let began = pool.now;
    pool.pass(1);
    let images = vec![listed("slow", "sha256:11")];
    pool.tell(Event::Images { daemon: slow.daemon.clone(), began, images });
    let began = pool.now;
    pool.pass(1);
    pool.done(&slow);
    pool.pass(1);
    let images = vec![listed("slow", "sha256:11")];
    pool.tell(Event::Images { daemon: slow.daemon.clone(), began, images });
    assert_eq!(
        pool.engine.stale_images(),
        std::slice::from_ref(&slow.daemon),
        "the list began before the end"
    );
    pool.pass(400);
    assert!(pool.home("slow").is_some(), "its image holds it");
}

#[test]
fn builders_that_no_list_clears_do_not_pile_up() {
    let mut pool = Pool::of(1);
    for i in 0..1_000 {
        pool.pass(1);
        pool.call(build(&format!("k{i}")));
    }
    let (builders, _) = pool.engine.daemons().next().unwrap().builders.all();
    assert!(builders.len() <= 256 && builders.contains(&"k999".into()));
}

#[test]
fn a_container_name_means_the_sessions_own() {
    let mut pool = Pool::of(2);
    let a = pool.run(create("k", "alpine"), "1111", Some("db"));
    let b = pool.run(create("l", "alpine"), "2222", Some("db"));
    assert_ne!(a, b);
    assert_eq!(pool.call(follow("k").target(Kind::Container, "db")), a);
    assert_eq!(pool.call(follow("l").target(Kind::Container, "db")), b);
    let said = pool.refuse(follow("m").target(Kind::Container, "db"));
    assert_eq!(
        said,
        "db exists on 2 daemons of the pool (a, b) and on none of this session's: use its full id"
    );
    pool.run(create("l", "alpine"), "3333", Some("web"));
    assert_eq!(pool.call(follow("m").target(Kind::Container, "web")), b);
    assert_eq!(pool.call(follow("k").target(Kind::Container, "web")), b, "unique, so found from elsewhere");
    assert_eq!(pool.home("k"), Some(a), "and nothing is bound by it");
    assert_eq!(pool.home("m"), None);
}

#[test]
fn full_ids_and_prefixes_route_without_rebinding() {
    let mut pool = Pool::of(2);
    let a = pool.run(create("k", "alpine"), "1111", None);
    let b = pool.run(create("l", "alpine"), "2222", None);
    let lease = pool.lease("k");
    for reference in ["2222", "22"] {
        assert_eq!(pool.call(follow("k").target(Kind::Container, reference)), b);
    }
    assert_eq!((pool.home("k"), pool.lease("k")), (Some(a), lease));
    assert_eq!(
        pool.call(follow("m").target(Kind::Container, "1111")).as_str(),
        pool.home("k").unwrap().as_str()
    );
    assert_eq!(pool.home("m"), None);
}

#[test]
fn a_volume_of_a_stranger_does_not_draw_a_bound_session_away() {
    let mut pool = Pool::of(2);
    let grant = pool.grant(ask("k", Class::Work(Work::Resource)));
    let fact = Fact::Created { kind: Kind::Volume, id: "data".into(), name: Some("data".into()) };
    pool.learn(&grant.daemon, Some(&grant), fact);
    pool.done(&grant);
    let other = pool.call(build("l"));
    assert_ne!(other, grant.daemon);
    assert_eq!(pool.call(create("l", "alpine").beside(Kind::Volume, "data")), other);
    assert_eq!(
        pool.call(create("m", "alpine").beside(Kind::Volume, "data")),
        grant.daemon,
        "an unbound one uses it"
    );
}

#[test]
fn a_new_container_joins_the_network_and_the_containers_that_it_names() {
    let mut pool = Pool::of(4);
    let grant = pool.grant(ask("k", Class::Work(Work::Resource)));
    let fact = Fact::Created { kind: Kind::Network, id: "n1".into(), name: Some("app_default".into()) };
    pool.learn(&grant.daemon, Some(&grant), fact);
    pool.done(&grant);
    let joined = pool.call(create("l", "alpine").beside(Kind::Network, "app_default"));
    assert_eq!(joined, grant.daemon);
    let container = pool.run(create("m", "alpine"), "c1", Some("sidecar"));
    assert_ne!(container, grant.daemon);
    assert_eq!(pool.call(create("n", "alpine").beside(Kind::Container, "sidecar")), container);
}

#[test]
fn what_a_session_owns_holds_it_longer_than_its_lease() {
    type Make = fn(&mut Pool) -> DaemonId;
    let stopped: Make = |pool| {
        let daemon = pool.run(create("k", "alpine"), "c1", None);
        pool.exits(&daemon, "c1");
        daemon
    };
    let network: Make = |pool| {
        let grant = pool.grant(ask("k", Class::Work(Work::Resource)));
        let fact = Fact::Created { kind: Kind::Network, id: "n1".into(), name: Some("n".into()) };
        pool.learn(&grant.daemon, Some(&grant), fact);
        pool.done(&grant);
        grant.daemon
    };
    let volume: Make = |pool| {
        let grant = pool.grant(ask("k", Class::Work(Work::Resource)));
        let fact = Fact::Created { kind: Kind::Volume, id: "v".into(), name: Some("v".into()) };
        pool.learn(&grant.daemon, Some(&grant), fact);
        pool.done(&grant);
        grant.daemon
    };
    let image: Make = |pool| pool.makes("k", "app", "sha256:11");
    for make in [stopped, network, volume, image] {
        let mut pool = Pool::of(4);
        let daemon = make(&mut pool);
        pool.pass(3600);
        assert_eq!(pool.lease("k"), None);
        assert_eq!(pool.home("k"), Some(daemon.clone()));
        for i in 0..6 {
            pool.grant(build(&format!("load{i}")));
        }
        assert_eq!(pool.call(build("k")), daemon, "also when others are free");
    }
}

#[test]
fn a_pushed_image_holds_nobody() {
    let mut pool = Pool::of(4);
    let daemon = pool.makes("k", "app", "sha256:11");
    pool.learn(&daemon, None, Fact::ImagePushed { reference: super::images::normalise("app") });
    pool.pass(400);
    assert_eq!(pool.home("k"), None);
    pool.makes("k", "app", "sha256:11");
    pool.pass(400);
    assert_eq!(pool.home("k"), None, "the same again: a registry has it already");
}

#[test]
fn an_unpushed_image_holds_its_session_for_hours_not_for_ever() {
    let mut pool = Pool::of(4);
    pool.makes("k", "app", "sha256:11");
    pool.pass(11 * 3600);
    assert!(pool.home("k").is_some());
    pool.pass(2 * 3600);
    assert_eq!(pool.home("k"), None);
    assert!(pool.engine.sessions().next().is_none(), "and then it is forgotten");
}

#[test]
fn the_former_daemon_is_preferred_while_it_has_room() {
    let mut pool = Pool::of(8);
    let former = pool.call(build("k"));
    pool.pass(3600);
    assert_eq!(pool.home("k"), None);
    assert_eq!(pool.call(build("k")), former);
    pool.pass(3600);
    let mut others = 0;
    while pool.used(&former) < 2 {
        others += 1;
        pool.grant(build(&format!("other{others}")));
    }
    assert_ne!(pool.call(build("k")), former);
}

#[test]
fn a_volume_made_by_two_sessions_holds_neither_once_it_is_gone() {
    let mut pool = Pool::of(1);
    let daemon = DaemonId::from("a");
    for key in ["k", "l"] {
        let grant = pool.grant(ask(key, Class::Work(Work::Resource)));
        let fact = Fact::Created { kind: Kind::Volume, id: "cache".into(), name: Some("cache".into()) };
        pool.learn(&daemon, Some(&grant), fact);
        pool.done(&grant);
    }
    pool.pass(400);
    assert!(pool.home("k").is_some() && pool.home("l").is_some());
    pool.learn(&daemon, None, Fact::Removed { kind: Kind::Volume, id: "cache".into() });
    assert!(pool.home("k").is_none() && pool.home("l").is_none());
}

#[test]
fn a_build_takes_a_slot_and_a_second_one_beside_it_another() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    let first = pool.grant(build("k"));
    assert_eq!(pool.used(&a), 1);
    let second = pool.grant(build("k"));
    assert_eq!(pool.used(&a), 2);
    pool.done(&first);
    assert_eq!(pool.used(&a), 1);
    pool.done(&second);
    assert_eq!(pool.used(&a), 1, "the last one lingers");
}

#[test]
fn all_containers_of_a_session_share_one_slot_with_its_build() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    for i in 0..5 {
        pool.run(create("k", "alpine"), &format!("c{i}"), None);
    }
    assert_eq!(pool.used(&a), 1);
    let building = pool.grant(build("k"));
    assert_eq!(pool.used(&a), 1);
    pool.done(&building);
    for i in 0..5 {
        assert_eq!(pool.used(&a), 1);
        pool.exits(&a, &format!("c{i}"));
    }
    pool.pass(9);
    assert_eq!(pool.used(&a), 1);
    pool.pass(1);
    assert_eq!(pool.used(&a), 0);
    assert!(pool.lease("k").is_some(), "the binding stays");
}

#[test]
fn work_within_the_linger_keeps_the_slot() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    pool.call(build("k"));
    pool.pass(8);
    let again = pool.grant(build("k"));
    pool.pass(100);
    assert_eq!(pool.used(&a), 1);
    pool.done(&again);
    pool.pass(9);
    assert_eq!(pool.used(&a), 1, "a whole linger again");
    pool.pass(1);
    assert_eq!(pool.used(&a), 0);
}

#[test]
fn a_container_that_is_never_started_counts_for_a_minute() {
    let mut pool = Pool::of(1);
    let a = pool.container(create("k", "alpine"), "c1", None);
    pool.pass(69);
    assert_eq!(pool.used(&a), 1);
    pool.pass(1);
    assert_eq!(pool.used(&a), 0, "a minute, and the linger");
    pool.learn(&a, None, Fact::Started { id: "c1".into() });
    assert_eq!(pool.used(&a), 1, "started after all, it takes a slot at once");
}

#[test]
fn a_container_made_anew_under_an_old_id_has_a_whole_minute() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    let grant = pool.grant(create("k", "alpine"));
    let created = Fact::Created { kind: Kind::Container, id: "c1".into(), name: None };
    pool.learn(&a, Some(&grant), created.clone());
    pool.pass(50);
    pool.learn(&a, None, Fact::Removed { kind: Kind::Container, id: "c1".into() });
    pool.learn(&a, Some(&grant), created);
    pool.done(&grant);
    pool.pass(59);
    assert_eq!(pool.engine.sessions().next().unwrap().1.live.len(), 1);
    pool.pass(1);
    assert_eq!(pool.engine.sessions().next().unwrap().1.live.len(), 0);
}

#[test]
fn a_fact_told_twice_counts_once() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    let grant = pool.grant(create("k", "alpine"));
    let created = Fact::Created { kind: Kind::Container, id: "c1".into(), name: None };
    pool.learn(&a, None, created.clone());
    pool.learn(&a, Some(&grant), created.clone());
    for _ in 0..2 {
        pool.learn(&a, None, Fact::Started { id: "c1".into() });
    }
    pool.exits(&a, "c1");
    pool.learn(&a, Some(&grant), created);
    pool.done(&grant);
    pool.pass(10);
    assert_eq!(pool.used(&a), 0);
}

#[test]
fn a_buildkit_connection_is_a_build_only_when_it_solves() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    let buildkit = || ask("k", Class::Work(Work::BuildKit));
    let (workers, solve) = (pool.grant(buildkit()), pool.grant(buildkit()));
    let uuid = |u: &str| ask("k", Class::Join).target(Kind::BuildSession, u);
    let (session, auth) = (pool.grant(uuid("u1")), pool.grant(uuid("u1")));
    assert_eq!(pool.used(&a), 1);
    pool.tell(Event::BuildSeen(solve.open));
    pool.tell(Event::BuildSeen(solve.open));
    assert_eq!(pool.used(&a), 1);
    let second = pool.grant(buildkit());
    assert_eq!(pool.used(&a), 1);
    pool.tell(Event::BuildSeen(second.open));
    assert_eq!(pool.used(&a), 2, "two that solve are two builds");
    for grant in [workers, solve, second, session, auth] {
        pool.done(&grant);
    }
    pool.pass(10);
    assert_eq!(pool.used(&a), 0);
}

#[test]
fn a_buildkit_session_is_found_by_its_uuid_until_its_last_connection_ends() {
    let mut pool = Pool::of(8);
    let uuid = |key: &str| ask(key, Class::Join).target(Kind::BuildSession, "u1");
    let first = pool.grant(uuid("k"));
    let second = pool.grant(uuid("l"));
    assert_eq!(second.daemon, first.daemon);
    pool.done(&first);
    assert_eq!(pool.grant(uuid("m")).daemon, first.daemon);
}

#[test]
fn an_explicit_key_and_its_sources_stay_together() {
    for seed in 0..8 {
        let mut pool = Pool::seeded(8, seed);
        let keyed = pool.grant(build("name:release").from("ip:1"));
        let bare = pool.grant(ask("ip:1", Class::Work(Work::BuildKit)));
        assert_eq!(bare.daemon, keyed.daemon);
        let sibling = pool.grant(build("name:other").from("ip:1"));
        assert_eq!(sibling.daemon, keyed.daemon);
        // The same key from a second machine.
        let far = pool.grant(build("name:release").from("ip:2"));
        assert_eq!(far.daemon, keyed.daemon);
        let bare = pool.grant(ask("ip:2", Class::Work(Work::BuildKit)));
        assert_eq!(bare.daemon, keyed.daemon);
        // The other way round: the bare connection first.
        let bare = pool.grant(ask("ip:3", Class::Work(Work::BuildKit)));
        assert_eq!(pool.grant(build("name:third").from("ip:3")).daemon, bare.daemon);
    }
}

#[test]
fn a_client_inside_a_container_of_a_daemon_goes_there_without_a_slot() {
    let mut pool = Pool::of(4);
    for i in 0..8 {
        pool.grant(build(&format!("k{i}")));
    }
    let c = DaemonId::from("c");
    let mut acquire = build("ip:172.17.0.2");
    acquire.inside = Some(c.clone());
    let grant = pool.grant(acquire);
    assert_eq!((&grant.daemon, grant.lease), (&c, None));
    assert_eq!(pool.used(&c), 2);
    assert_eq!(pool.home("ip:172.17.0.2"), None);
}

#[test]
fn what_a_client_inside_makes_is_its_tenants() {
    let mut pool = Pool::of(2);
    let mut acquire = create("ip:172.17.0.2", "alpine").of("red");
    acquire.inside = Some("b".into());
    pool.container(acquire, "1111", Some("db"));
    assert_eq!(pool.call(follow("r").of("red").target(Kind::Container, "db")).as_str(), "b");
    let grants: Vec<DaemonId> = (0..20)
        .map(|i| pool.call(follow(&format!("g{i}")).of("green").target(Kind::Container, "db")))
        .collect();
    assert!(grants.iter().any(|d| d.as_str() == "a"), "unknown to others, it draws nobody");
}

#[test]
fn a_session_whose_daemon_went_is_told_and_starts_anew() {
    let mut pool = Pool::of(2);
    let gone = pool.run(create("k", "alpine"), "1111", Some("db"));
    let stays: Vec<DaemonId> = ["a", "b"].into_iter().map(DaemonId::from).filter(|d| *d != gone).collect();
    pool.observe(&stays);
    let lost = pool
        .told
        .iter()
        .any(|e| matches!(e, Effect::LeaseEnded { key, lost: true, .. } if key.as_str() == "k"));
    assert!(lost);
    let said = format!("session lost: its daemon {gone} has gone, and db with it");
    assert_eq!(pool.refuse(follow("k").target(Kind::Container, "db")), said);
    assert_eq!(pool.call(follow("k").target(Kind::Container, "db")), stays[0], "told once");
    for _ in 0..2 {
        let said = format!("session lost: its daemon {gone} has gone, and 1111 with it");
        assert_eq!(pool.refuse(follow("anybody").target(Kind::Container, "1111")), said);
    }
    let anew = pool.grant(create("k", "alpine"));
    assert!(anew.fresh && anew.lease.is_some());
    assert_eq!(anew.daemon, stays[0]);
}

#[test]
fn a_push_of_an_image_that_went_with_its_daemon_says_so() {
    let mut pool = Pool::of(2);
    let gone = pool.makes("k", "app", "sha256:11");
    pool.tell(Event::Replaced { daemon: gone.clone() });
    assert_eq!(
        pool.refuse(follow("k").image("app")),
        format!("session lost: its daemon {gone} has gone, and docker.io/library/app:latest with it")
    );
}

#[test]
fn an_unreached_fresh_binding_is_undone_and_tried_elsewhere() {
    let mut pool = Pool::of(2);
    let first = pool.grant(build("k"));
    assert!(first.fresh);
    pool.end(&first, Outcome::Unreached);
    assert_eq!(pool.lease("k"), None);
    assert_eq!(pool.used(&first.daemon), 0);
    let second = pool.grant(build("k"));
    assert!(second.fresh);
    assert_ne!(second.daemon, first.daemon);
    pool.done(&second);
    assert!(!pool.grant(build("k")).fresh, "it has been there");
}

#[test]
fn a_binding_of_several_requests_is_undone_when_none_of_them_got_through() {
    let mut pool = Pool::of(2);
    let first = pool.grant(build("k"));
    let second = pool.grant(ask("k", Class::Join));
    assert!(second.fresh);
    pool.end(&first, Outcome::Unreached);
    pool.end(&second, Outcome::Unreached);
    assert_ne!(pool.grant(build("k")).daemon, first.daemon);
}

#[test]
fn a_binding_that_was_never_reached_owns_no_image() {
    let mut pool = Pool::of(2);
    let grant = pool.grant(build("k"));
    let reference = super::images::normalise("app");
    let fact = Fact::ImageWritten { reference, id: Some("sha256:11".into()), written: Written::Made };
    pool.learn(&grant.daemon, None, fact);
    pool.end(&grant, Outcome::Unreached);
    assert_eq!(pool.home("k"), None);
    assert_ne!(pool.grant(build("k")).daemon, grant.daemon);
}

#[test]
fn a_binding_that_was_reached_once_is_not_undone() {
    let mut pool = Pool::of(2);
    let first = pool.grant(build("k"));
    let second = pool.grant(ask("k", Class::Work(Work::Pull)));
    pool.done(&second);
    pool.end(&first, Outcome::Unreached);
    let third = pool.grant(build("k"));
    assert_eq!((&third.daemon, third.fresh), (&first.daemon, false));
}

#[test]
fn a_read_without_a_session_may_be_tried_elsewhere() {
    let mut pool = Pool::of(2);
    let first = pool.grant(ask("k", Class::Read));
    assert!(first.fresh && first.lease.is_none());
    pool.end(&first, Outcome::Unreached);
    assert_ne!(pool.grant(ask("k", Class::Read)).daemon, first.daemon);
    assert_eq!(pool.home("k"), None, "reads bind nothing");
}

#[test]
fn an_ejected_daemon_gets_no_new_sessions_and_keeps_its_own() {
    let mut pool = Pool::of(2);
    let own = pool.grant(build("k"));
    pool.refuses(&own.daemon);
    assert_eq!(pool.call(build("k")), own.daemon, "a bound session never silently moves");
    assert_eq!(pool.call(ask("k", Class::Read)), own.daemon);
    assert_ne!(pool.call(ask("k", Class::Any)), own.daemon, "what any daemon can do, a healthy one does");
    for i in 0..10 {
        assert_ne!(pool.call(build(&format!("new{i}"))), own.daemon);
    }
}

#[test]
fn a_draining_daemon_gets_no_new_sessions_and_keeps_its_own() {
    let mut pool = Pool::of(2);
    let own = pool.grant(build("k"));
    let observed = ["a", "b"].map(|id| Observed {
        id: id.into(),
        draining: id == own.daemon.as_str(),
        pending: None,
        slots: Some(2),
    });
    pool.tell(Event::Observed(observed.to_vec()));
    pool.answers(&own.daemon);
    assert_eq!(pool.call(build("k")), own.daemon);
    for i in 0..10 {
        assert_ne!(pool.call(build(&format!("new{i}"))), own.daemon);
    }
}

#[test]
fn a_daemon_that_drains_while_it_starts_never_takes_sessions() {
    let mut pool = Pool::of(0);
    let observed = Observed { id: "a".into(), draining: true, pending: None, slots: None };
    pool.tell(Event::Observed(vec![observed]));
    pool.answers(&"a".into());
    assert_eq!(pool.refuse(build("k")), "no healthy daemon in the pool: a draining (not probed yet)");
}

#[test]
fn with_nobody_well_the_answer_says_what_was_tried() {
    let mut pool = Pool::of(0);
    assert_eq!(pool.refuse(build("k")), "no daemon: the pool is empty");
    pool.observe(&["a".into(), "b".into()]);
    pool.answers(&"a".into());
    pool.refuses(&"a".into());
    assert_eq!(
        pool.refuse(build("k")),
        "no healthy daemon in the pool: a ejected (connection refused), b starting (not probed yet)"
    );
}

#[test]
fn a_daemon_whose_versions_meet_nobodys_is_refused_and_says_why_each_time() {
    let mut pool = Pool::of(2);
    pool.observe(&["a".into(), "b".into(), "old".into()]);
    for _ in 0..2 {
        pool.tell(Event::Probed { daemon: "old".into(), probe: Probe::Answered(facts(12, 23)) });
    }
    for i in 0..10 {
        assert_ne!(pool.call(build(&format!("k{i}"))).as_str(), "old");
    }
    assert_eq!(pool.engine.api_range(), Some(((1, 24), (1, 51))));
    pool.refuses(&"a".into());
    pool.refuses(&"b".into());
    assert_eq!(
        pool.refuse(build("new")),
        "no healthy daemon in the pool: a ejected (connection refused), b ejected (connection refused), \
         old refused (its API versions 1.12 to 1.23 do not meet the pool's 1.24 to 1.51)"
    );
}

#[test]
fn a_session_goes_only_to_daemons_that_serve_its_version() {
    let mut pool = Pool::of(2);
    pool.observe(&["a".into(), "b".into(), "new".into()]);
    pool.tell(Event::Probed { daemon: "new".into(), probe: Probe::Answered(facts(44, 54)) });
    for i in 0..10 {
        assert_ne!(pool.call(build(&format!("old{i}")).api(30)).as_str(), "new");
        assert_eq!(pool.call(build(&format!("new{i}")).api(53)).as_str(), "new");
    }
    assert_eq!(
        pool.refuse(build("k").api(60)),
        "client version 1.60 is too new. Maximum supported API version of this pool is 1.51"
    );
    // The memory of a daemon is no reason to go to one that does not serve it.
    let former = pool.call(build("m").api(53));
    pool.pass(3600);
    assert_ne!(pool.call(build("m").api(30)), former);
}

#[test]
fn the_range_outlives_the_daemons() {
    let mut pool = Pool::of(1);
    pool.observe(&[]);
    assert_eq!(pool.engine.api_range(), Some(((1, 24), (1, 51))));
}

#[test]
fn tenants_do_not_see_each_others_objects() {
    let mut pool = Pool::of(2);
    let red = pool.run(create("r", "alpine").of("red"), "1111", Some("db"));
    let green = pool.run(create("g", "alpine").of("green"), "2222", Some("db"));
    assert_ne!(red, green);
    assert_eq!(pool.call(follow("r2").of("red").target(Kind::Container, "db")), red);
    assert_eq!(pool.call(follow("g2").of("green").target(Kind::Container, "db")), green);
    assert_eq!(pool.call(follow("g").of("green").target(Kind::Container, "1111")), green, "not even by id");
}

#[test]
fn tenants_do_not_see_each_others_images() {
    let mut pool = Pool::of(4);
    let grant = pool.grant(build("r").of("red"));
    pool.writes(&grant, "app", "sha256:abcdef", Written::Made);
    pool.done(&grant);
    for reference in ["app", "sha256:abcdef", "abcd"] {
        assert_eq!(pool.call(follow("r2").of("red").image(reference)), grant.daemon);
        let others: std::collections::BTreeSet<DaemonId> =
            (0..40).map(|i| pool.call(follow(&format!("g{i}")).of("green").image(reference))).collect();
        assert_eq!(others.len(), 4, "{reference} leads green nowhere");
    }
}

#[test]
fn an_image_that_two_tenants_make_is_both_theirs() {
    let mut pool = Pool::of(1);
    for tenant in ["red", "green"] {
        let grant = pool.grant(build(tenant).of(tenant));
        pool.writes(&grant, "app", "sha256:11", Written::Made);
        pool.done(&grant);
    }
    pool.observe(&["a".into(), "b".into(), "c".into()]);
    for id in ["b", "c"] {
        pool.answers(&id.into());
    }
    for tenant in ["red", "green"] {
        for i in 0..10 {
            let daemon = pool.call(follow(&format!("{tenant}{i}")).of(tenant).image("app"));
            assert_eq!(daemon.as_str(), "a");
        }
    }
}

#[test]
fn a_container_that_runs_again_revives_its_sessions_lease() {
    let mut pool = Pool::of(2);
    let daemon = pool.run(create("k", "alpine"), "c1", None);
    pool.exits(&daemon, "c1");
    pool.pass(3600);
    assert_eq!((pool.lease("k"), pool.used(&daemon)), (None, 0));
    pool.learn(&daemon, None, Fact::Started { id: "c1".into() });
    assert!(pool.lease("k").is_some());
    assert_eq!(pool.used(&daemon), 1);
    pool.pass(3600);
    assert!(pool.lease("k").is_some(), "as long as it runs");
}

#[test]
fn a_container_elsewhere_takes_a_slot_there() {
    let mut pool = Pool::of(2);
    let made = pool.makes("maker", "app", "sha256:11");
    pool.pass(10);
    let home = pool.grant(build("k"));
    assert_ne!(home.daemon, made);
    let led = pool.run(create("k", "app"), "c1", None);
    assert_eq!(led, made, "the image is only there");
    assert_eq!((pool.used(&home.daemon), pool.used(&made)), (1, 1));
    assert_eq!(pool.home("k"), Some(home.daemon.clone()));
    pool.exits(&made, "c1");
    assert_eq!(pool.used(&made), 0);
}

#[test]
fn a_session_that_moves_to_where_its_container_runs_has_one_slot_there() {
    let mut pool = Pool::of(2);
    let made = pool.makes("maker", "app", "sha256:11");
    pool.pass(10);
    let home = pool.grant(build("k"));
    pool.run(create("k", "app"), "c1", None);
    pool.done(&home);
    pool.pass(600);
    assert_eq!(pool.lease("k"), None);
    assert_eq!(pool.call(create("k", "app")), made);
    assert_eq!(pool.home("k"), Some(made.clone()));
    assert_eq!(pool.used(&made), 1);
    pool.exits(&made, "c1");
    pool.pass(10);
    assert_eq!(pool.used(&made), 0);
}

#[test]
fn a_replaced_daemons_open_builds_make_nothing_on_the_new_one() {
    let mut pool = Pool::of(1);
    let grant = pool.grant(build("k"));
    pool.tell(Event::Replaced { daemon: grant.daemon.clone() });
    assert_eq!(pool.used(&grant.daemon), 0);
    pool.end(&grant, Outcome::DaemonFailed);
    assert!(pool.engine.stale_images().is_empty());
    assert_eq!(pool.home("k"), None);
}

#[test]
fn the_provisioners_word_on_slots_may_change() {
    let mut pool = Pool::of(1);
    let observed = Observed { id: "a".into(), draining: false, pending: None, slots: Some(7) };
    pool.tell(Event::Observed(vec![observed]));
    assert_eq!(pool.engine.daemons().next().unwrap().slots, 7);
}

#[test]
fn a_lease_names_the_epoch_that_granted_it() {
    let mut pool = Pool::of(1);
    pool.engine = Engine::new(Config { epoch: 7, ..Config::default() }, 1);
    pool.observe(&["a".into()]);
    pool.answers(&"a".into());
    let leases = ["k", "l"].map(|key| pool.grant(build(key)).lease);
    assert_eq!(leases, [1, 2].map(|number| Some(LeaseId { epoch: 7, number })));
}

#[test]
fn events_and_effects_are_plain_data() {
    let event = Event::Acquire(create("k", "app").target(Kind::Container, "x").from("ip:1"));
    let text = serde_json::to_string(&event).unwrap();
    assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
    let mut pool = Pool::of(2);
    pool.run(create("k", "alpine"), "c1", None);
    for effect in &pool.told {
        let text = serde_json::to_string(effect).unwrap();
        assert_eq!(&serde_json::from_str::<Effect>(&text).unwrap(), effect);
    }
}

impl Acquire {
    /// As a CI job asks, to whom the names of other jobs mean nothing.
    fn job(mut self) -> Self {
        self.shares_names = false;
        self
    }
}

#[test]
fn a_jobs_names_are_its_own_also_where_another_jobs_would_be_unique() {
    let mut pool = Pool::of(2);
    let theirs = pool.run(create("other", "busybox").job(), "aa11", Some("db"));
    // Unbound, `docker rm -f db` must reach nobody's `db`.
    let text = pool.refuse(follow("job").target(Kind::Container, "db").job());
    assert_eq!(text, "No such container: db");
    assert_eq!(pool.refuse(follow("job").target(Kind::Container, "aa1").job()), "No such container: aa1");
    // Bound elsewhere, the own daemon says that it has none.
    let mine = pool.run(create("job", "busybox").job(), "bb22", Some("web"));
    assert_ne!(mine, theirs);
    assert_eq!(pool.call(follow("job").target(Kind::Container, "db").job()), mine);
    // A full id is a fact, and what nobody made is everybody's.
    assert_eq!(pool.call(follow("job").target(Kind::Container, "aa11").job()), theirs);
    let fact = Fact::Created { kind: Kind::Volume, id: "cache".into(), name: Some("cache".into()) };
    pool.learn(&theirs, None, fact);
    assert_eq!(pool.call(follow("new").target(Kind::Volume, "cache").job()), theirs);
}

#[test]
fn a_jobs_network_is_made_anew_where_another_job_has_one_of_that_name() {
    let mut pool = Pool::of(2);
    let network = |pool: &mut Pool, key: &str, id: &str| {
        let grant = pool.grant(ask(key, Class::Work(Work::Resource)).job());
        let fact = Fact::Created { kind: Kind::Network, id: id.into(), name: Some("app_default".into()) };
        pool.learn(&grant.daemon, Some(&grant), fact);
        pool.done(&grant);
        grant.daemon
    };
    let theirs = network(&mut pool, "other", "n1");
    let mine = pool.makes("job", "app", "sha256:11");
    assert_ne!(mine, theirs);
    assert_eq!(pool.call(follow("job").target(Kind::Network, "app_default").job()), mine);
    assert_eq!(network(&mut pool, "job", "n2"), mine);
    let run = create("job", "app").beside(Kind::Network, "app_default").job();
    assert_eq!(pool.call(run), mine);
}

#[test]
fn what_a_terminal_adds_to_a_project_goes_where_the_project_is() {
    let mut pool = Pool::of(2);
    let up = pool.run(create("one", "busybox"), "aa11", Some("app-web-1"));
    let fact = Fact::Labelled { kind: Kind::Container, id: "aa11".into(), project: "app".into() };
    pool.learn(&up, None, fact);
    let other = pool.makes("two", "tool", "sha256:22");
    assert_ne!(other, up);
    assert_eq!(pool.call(create("two", "busybox").beside(Kind::Project, "app")), up);
    pool.learn(&up, None, Fact::Removed { kind: Kind::Container, id: "aa11".into() });
    assert_eq!(pool.call(create("two", "busybox").beside(Kind::Project, "app")), other);
}

#[test]
fn of_too_many_sessions_those_that_are_only_remembered_are_forgotten_the_oldest_first() {
    let mut pool = Pool::of(1);
    pool.engine.config.remembered = 8;
    let grace = pool.engine.config.grace;
    let kept = pool.ask(build("kept")).unwrap();
    for i in 0..100 {
        let grant = pool.ask(build(&format!("name:{i}"))).unwrap();
        pool.tell(Event::Release { open: grant.open, outcome: Outcome::Done });
        pool.now += grace;
        pool.tell(Event::Tick);
    }
    let known: Vec<String> = pool.engine.sessions().map(|(key, _)| key.to_string()).collect();
    assert!(known.len() <= 8, "{known:?}");
    assert!(known.contains(&"kept".to_string()) && known.contains(&"name:99".to_string()), "{known:?}");
    assert!(pool.engine.timers.len() <= 9, "timers of sessions that are forgotten");
    pool.tell(Event::Release { open: kept.open, outcome: Outcome::Done });
}

#[test]
fn containers_that_nobody_attends_are_reported_each_hour_and_keep_their_slot() {
    let mut pool = Pool::of(1);
    let overdue = |pool: &Pool| pool.told.iter().filter(|e| matches!(e, Effect::Overdue { .. })).count();
    let grant = pool.grant(create("k", "alpine"));
    let a = grant.daemon.clone();
    pool.learn(&a, Some(&grant), Fact::Created { kind: Kind::Container, id: "c1".into(), name: None });
    pool.learn(&a, None, Fact::Started { id: "c1".into() });
    let limit = pool.engine.config.container_lease.as_secs();
    pool.pass(limit);
    assert_eq!(overdue(&pool), 0, "its create is still under way");
    pool.done(&grant);
    pool.pass(limit - 1);
    pool.call(follow("k"));
    pool.pass(limit - 1);
    assert_eq!(overdue(&pool), 0, "somebody looked after it");
    pool.pass(1);
    assert_eq!(
        pool.told.last(),
        Some(&Effect::Overdue { key: "k".into(), containers: vec![(a.clone(), "c1".into())], again: false })
    );
    pool.pass(3599);
    assert_eq!(overdue(&pool), 1);
    pool.pass(1);
    assert!(
        matches!(pool.told.last(), Some(Effect::Overdue { again: true, .. })),
        "they may have to be stopped still"
    );
    assert_eq!(pool.used(&a), 1);
    pool.call(follow("k"));
    assert!(!pool.engine.session(&"k".into()).unwrap().is_overdue());
    pool.pass(limit);
    assert!(matches!(pool.told.last(), Some(Effect::Overdue { again: false, .. })));
    pool.exits(&a, "c1");
    assert!(!pool.engine.session(&"k".into()).unwrap().is_overdue());
    pool.pass(limit);
    assert_eq!(overdue(&pool), 3);
}

#[test]
fn what_runs_without_a_session_counts_by_compose_projects_and_not_while_somebody_builds() {
    let mut pool = Pool::of(1);
    let a = DaemonId::from("a");
    let strangers = |pool: &Pool| pool.engine.daemons[&DaemonId::from("a")].strangers.count();
    let start = |pool: &mut Pool, id: &str| {
        pool.learn(&"a".into(), None, Fact::Created { kind: Kind::Container, id: id.into(), name: None });
        pool.learn(&"a".into(), None, Fact::Started { id: id.into() });
    };
    for id in ["lone", "web", "db"] {
        start(&mut pool, id);
    }
    assert_eq!(strangers(&pool), 3);
    for id in ["web", "db"] {
        let (kind, project) = (Kind::Container, "shop".to_string());
        pool.learn(&a, None, Fact::Labelled { kind, id: id.into(), project });
    }
    assert_eq!(strangers(&pool), 2, "a project counts once");
    // A classic build's own containers look like anybody's.
    let grant = pool.grant(build("k"));
    start(&mut pool, "step");
    assert_eq!(strangers(&pool), 2);
    pool.done(&grant);
    assert_eq!(strangers(&pool), 3, "it was no build's: it still runs");
    // A list mends what events have missed.
    let listed = |id: &str, running| ListedContainer { id: id.into(), names: Vec::new(), running };
    let containers = vec![listed("web", true), listed("lone", false), listed("new", true)];
    pool.now += Time::from_secs(1);
    let began = pool.now;
    pool.tell(Event::Containers { daemon: a.clone(), began, containers, projects: Vec::new() });
    assert_eq!(strangers(&pool), 2, "web and new");
    // What a session makes is its own.
    let grant = pool.grant(create("k", "alpine"));
    start(&mut pool, "mine");
    assert_eq!(strangers(&pool), 3, "the event comes before the answer");
    pool.learn(&a, Some(&grant), Fact::Created { kind: Kind::Container, id: "mine".into(), name: None });
    assert_eq!(strangers(&pool), 2);
}

#[test]
fn a_stranger_that_exits_makes_room_for_who_waits() {
    let mut pool = Pool::of(1);
    pool.engine.config.queue_limit = 10;
    let a = DaemonId::from("a");
    for id in ["web", "db"] {
        pool.learn(&a, None, Fact::Created { kind: Kind::Container, id: id.into(), name: None });
        pool.learn(&a, None, Fact::Started { id: id.into() });
    }
    // Of two slots one is always the pool's.
    let _first = pool.grant(build("one"));
    pool.requests += 1;
    let waits = Acquire { request: RequestId(pool.requests), ..build("two") };
    let told = pool.tell(Event::Acquire(waits));
    assert!(told.iter().any(|e| matches!(e, Effect::Queued { .. })));
    let granted = |told: &[Effect]| told.iter().any(|e| matches!(e, Effect::Granted { .. }));
    pool.learn(&a, None, Fact::Stopped { id: "db".into() });
    assert!(!granted(&pool.told[pool.told.len() - 1..]), "one is left in the second slot");
    let told = pool.tell(Event::Learned { daemon: a, open: None, fact: Fact::Stopped { id: "web".into() } });
    assert!(granted(&told));
}

#[test]
fn strangers_keep_no_slot_from_the_pool_that_is_said_to_be_free() {
    let mut pool = Pool::of(2);
    pool.engine.config.queue_limit = 10;
    for id in ["one", "two", "three", "four", "five"] {
        pool.learn(&"a".into(), None, Fact::Created { kind: Kind::Container, id: id.into(), name: None });
        pool.learn(&"a".into(), None, Fact::Started { id: id.into() });
    }
    // Of the two slots of `a` one is always the pool's: nobody waits for `b` beside it.
    let builds: Vec<Grant> = ["k1", "k2", "k3"].iter().map(|key| pool.grant(build(key))).collect();
    assert_eq!(builds.iter().filter(|grant| grant.daemon.as_str() == "a").count(), 1);
}
