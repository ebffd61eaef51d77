//! What a decision costs. One lock is held for each, so this bounds the requests per second of a proxy:
//! targets are 1 µs for a known session, 5 µs for a new one over 128 daemons, and 50 µs for a new one over
//! 1,024 daemons with 10,000 sessions.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use dindpool::engine::images::normalise;
use dindpool::engine::model::*;
use dindpool::engine::{Config, Engine};

/// An engine and its clock.
struct Pool {
    engine: Engine,
    now: Time,
    requests: u64,
}

/// Ids are spread evenly, as digests are.
fn image_id(i: usize) -> String {
    format!("sha256:{:016x}{i:048x}", (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

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
        requirements: Requirements { api: Some((1, 44)), ..Requirements::default() },
        deadline: None,
    }
}

impl Pool {
    fn of(daemons: usize) -> Self {
        // Ten thousand sessions have built, and do not build now: with their slots kept, the next ones would wait.
        let config = Config { linger: Time::ZERO, ..Config::default() };
        let mut pool = Pool { engine: Engine::new(config, 1), now: Time::from_secs(1), requests: 0 };
        let ids: Vec<DaemonId> = (0..daemons).map(|i| format!("dind-{i}.dind.ci.svc").into()).collect();
        let observed = ids
            .iter()
            .map(|id| Observed { id: id.clone(), draining: false, pending: None, slots: Some(4) })
            .collect();
        pool.tell(Event::Observed(observed));
        for daemon in ids {
            let facts =
                Facts { api_min: (1, 24), api_max: (1, 51), arch: "amd64".into(), ..Facts::default() };
            pool.tell(Event::Probed { daemon, probe: Probe::Answered(facts) });
        }
        pool
    }

    fn with_sessions(mut self, sessions: usize) -> Self {
        for i in 0..sessions {
            self.work(ask(&format!("ip:10.{}.{}", i / 250, i % 250), Class::Work(Work::Build)));
        }
        self
    }

    fn tell(&mut self, event: Event) -> Vec<Effect> {
        self.engine.handle(event, self.now)
    }

    /// Acquires, and releases at once; as the shell does, ticks when one is due.
    fn work(&mut self, acquire: Acquire) -> DaemonId {
        self.now += Time::from_micros(100);
        if self.engine.next_tick().is_some_and(|at| at <= self.now) {
            self.tell(Event::Tick);
        }
        self.requests += 1;
        let (open, daemon) = self.open(Acquire { request: RequestId(self.requests), ..acquire });
        self.tell(Event::Release { open, outcome: Outcome::Done });
        daemon
    }

    fn open(&mut self, acquire: Acquire) -> (OpenId, DaemonId) {
        self.tell(Event::Acquire(acquire))
            .into_iter()
            .find_map(|effect| match effect {
                Effect::Granted { open, daemon, .. } => Some((open, daemon)),
                _ => None,
            })
            .expect("a daemon")
    }

    /// Containers, each with a name, and images, spread over the daemons.
    fn with_objects(mut self, containers: usize, images: usize) -> Self {
        let daemons: Vec<DaemonId> = self.engine.daemons().map(|d| d.id.clone()).collect();
        for i in 0..containers {
            let (id, name) = (format!("{:064x}", (i as u128 + 1) << 96), format!("job-{i}-db-1"));
            let fact = Fact::Created { kind: Kind::Container, id, name: Some(name) };
            self.tell(Event::Learned { daemon: daemons[i % daemons.len()].clone(), open: None, fact });
        }
        for i in 0..images {
            let fact = Fact::ImageWritten {
                reference: normalise(&format!("registry.ci:5000/team/app-{i}:1")),
                id: Some(image_id(i)),
                written: Written::Found,
            };
            self.tell(Event::Learned { daemon: daemons[i % daemons.len()].clone(), open: None, fact });
        }
        for daemon in &daemons {
            let reference = normalise("alpine:3");
            let fact =
                Fact::ImageWritten { reference, id: Some("sha256:aa".into()), written: Written::Pulled };
            self.tell(Event::Learned { daemon: daemon.clone(), open: None, fact });
        }
        self
    }
}

/// New sessions, each with a key of its own. The clock runs, and what runs out of the sessions before is ticked
/// away between the measurements: otherwise the pool would only grow.
fn new_sessions(c: &mut Criterion, name: &str, pool: impl Fn() -> Pool, ask: impl Fn(&str) -> Acquire) {
    let mut made = None;
    let mut keys = 0u64;
    c.bench_function(name, |b| {
        let pool = made.get_or_insert_with(&pool);
        b.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                keys += 1;
                let acquire = ask(&format!("posix:{keys}@{}", keys * 17));
                pool.now += Time::from_millis(30);
                pool.tell(Event::Tick);
                let began = Instant::now();
                black_box(pool.work(acquire));
                total += began.elapsed();
            }
            total
        })
    });
}

/// From the first request to the last trace of it.
fn whole_life(c: &mut Criterion) {
    let mut made = None;
    let mut keys = 0u64;
    c.bench_function("a whole life, 128 daemons", |b| {
        let pool = made.get_or_insert_with(|| Pool::of(128));
        b.iter(|| {
            keys += 1;
            pool.now += Time::from_millis(30);
            pool.work(ask(&format!("posix:{keys}@{}", keys * 17), Class::Work(Work::Build)))
        })
    });
}

fn sessions(c: &mut Criterion) {
    let mut pool = Pool::of(128).with_sessions(1_000);
    let known = ask("ip:10.1.7", Class::Follow);
    pool.work(ask("ip:10.1.7", Class::Work(Work::Build)));
    c.bench_function("known session, follows", |b| b.iter(|| black_box(pool.work(known.clone()))));
    let known = ask("ip:10.1.7", Class::Work(Work::Build));
    c.bench_function("known session, builds", |b| b.iter(|| black_box(pool.work(known.clone()))));
    let mut pool = Pool::of(1_024).with_sessions(10_000);
    let known = ask("ip:10.1.7", Class::Work(Work::Build));
    c.bench_function("known session, builds, 1024 daemons, 10000 sessions", |b| {
        b.iter(|| black_box(pool.work(known.clone())))
    });

    let builds = |key: &str| ask(key, Class::Work(Work::Build));
    let reads = |key: &str| ask(key, Class::Read);
    let runs = |key: &str| {
        let mut acquire = ask(key, Class::Work(Work::Container));
        acquire.requirements.image = Some(normalise("alpine:3"));
        acquire
    };
    let small = || Pool::of(128).with_objects(1_000, 1_000);
    let large = || Pool::of(1_024).with_sessions(10_000).with_objects(20_000, 50_000);
    new_sessions(c, "new session, builds, 128 daemons", small, builds);
    new_sessions(c, "new session, runs what all have, 128 daemons", small, runs);
    new_sessions(c, "new session, builds, 1024 daemons, 10000 sessions", large, builds);
    new_sessions(c, "new session, runs what all have, 1024 daemons, 10000 sessions", large, runs);
    new_sessions(c, "no session, reads, 1024 daemons, 10000 sessions", large, reads);
}

fn lookups(c: &mut Criterion) {
    let mut pool = Pool::of(1_024).with_sessions(10_000).with_objects(20_000, 50_000);
    let mut look = |name: &str, change: &dyn Fn(&mut Acquire)| {
        let mut acquire = ask("posix:1@1", Class::Follow);
        change(&mut acquire);
        c.bench_function(name, |b| b.iter(|| black_box(pool.work(acquire.clone()))));
    };
    let container = |reference: &str| Some(ObjectRef { kind: Kind::Container, reference: reference.into() });
    look("container by name, of 20000", &|a| a.target = container("job-777-db-1"));
    look("image by name, of 50000", &|a| {
        a.requirements.image = Some(normalise("registry.ci:5000/team/app-777:1"));
    });
    look("image by id prefix, of 50000", &|a| {
        a.requirements.image = Some(normalise(&image_id(777)[..19]));
    });
}

/// What arrives from the daemons.
fn news(c: &mut Criterion) {
    let mut pool = Pool::of(1_024).with_sessions(10_000).with_objects(20_000, 50_000);
    let daemon: DaemonId = "dind-7.dind.ci.svc".into();
    let probe = || Probe::Answered(Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() });
    c.bench_function("probe, 1024 daemons", |b| {
        b.iter(|| pool.tell(Event::Probed { daemon: daemon.clone(), probe: probe() }))
    });
    let images: Vec<ListedImage> = (0..50_000)
        .filter(|i| i % 1_024 == 7)
        .map(|i| ListedImage {
            id: image_id(i),
            references: vec![normalise(&format!("registry.ci:5000/team/app-{i}:1"))],
            in_registry: true,
        })
        .collect();
    c.bench_function("images of one daemon listed, of 50000 in the pool", |b| {
        b.iter(|| {
            pool.now += Time::from_millis(1);
            let began = pool.now;
            pool.now += Time::from_millis(1);
            pool.tell(Event::Images { daemon: daemon.clone(), began, images: images.clone() })
        })
    });
}

criterion_group!(benches, sessions, whole_life, lookups, news);
criterion_main!(benches);
