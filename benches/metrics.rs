//! What a scrape costs: 1,000 daemons, 10,000 sessions of 60 tenants, 200 that wait. The snapshot is taken under the
//! pool's one lock, so that requests wait for it: it is to take 5 ms at most, and the whole text 20 ms and a megabyte.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use dindpool::engine::model::*;
use dindpool::engine::{Config, Engine};
use dindpool::metrics::snapshot::Holds;
use dindpool::metrics::{Metrics, Snapshot};
use dindpool::pool::snapshot::of_engine;

const DAEMONS: usize = 1000;
const SESSIONS: u64 = 10_000;
const TENANTS: u64 = 60;
const NOW: Time = Time::from_secs(10);
const HOLDS: Holds = Holds {
    images: Some(120),
    images_bytes: Some(41_234_567_890),
    build_cache: Some(21_234_567_890),
    disk: Some((61_234_567_890, 38_765_432_110)),
};

fn engine() -> Engine {
    let mut engine = Engine::new(Config { queue_limit: 1000, ..Config::default() }, 1);
    let ids: Vec<DaemonId> =
        (0..DAEMONS).map(|i| format!("ci-dindpool-dind-7d9f8b6c5d-{i:05}").into()).collect();
    let observed =
        |id: &DaemonId| Observed { id: id.clone(), draining: false, pending: None, slots: Some(10) };
    engine.handle(Event::Observed(ids.iter().map(observed).collect()), NOW);
    for daemon in ids {
        let facts =
            Facts { api_min: (1, 24), api_max: (1, 51), version: "28.5.2".into(), ..Facts::default() };
        engine.handle(Event::Probed { daemon: daemon.clone(), probe: Probe::Answered(facts) }, NOW);
        engine.handle(Event::Timed { daemon, took: Time::from_micros(12_345) }, NOW);
    }
    for i in 0..SESSIONS + 200 {
        let acquire = Acquire {
            request: RequestId(i),
            key: format!("ip:10.{}.{}.{}", i >> 16, i >> 8 & 255, i & 255).into(),
            tenant: format!("team-{}", i % TENANTS).into(),
            source: None,
            inside: None,
            shares_names: true,
            class: Class::Work(Work::Build),
            target: None,
            requirements: Requirements::default(),
            deadline: None,
        };
        engine.handle(Event::Acquire(acquire), NOW);
    }
    engine
}

fn scrape(c: &mut Criterion) {
    let engine = engine();
    let metrics = Metrics::new(prometheus::Registry::new()).expect("metrics");
    let snapshot = || Snapshot { admits: None, pool: Some(of_engine(&engine, NOW, |_| HOLDS)) };
    let pool = snapshot().pool.expect("a pool");
    assert_eq!((pool.daemons.len(), pool.sessions as u64), (DAEMONS, SESSIONS), "the pool is full");
    assert_eq!(pool.tenants.values().map(|tenant| tenant.waiting).sum::<u32>(), 200);
    let text = metrics.render(&snapshot());
    println!("a scrape: {} bytes, {} lines", text.len(), text.lines().count());
    assert!(text.len() < 1_000_000);
    c.bench_function("snapshot", |b| b.iter(|| black_box(snapshot())));
    c.bench_function("scrape", |b| b.iter(|| black_box(metrics.render(&snapshot()))));
}

criterion_group!(benches, scrape);
criterion_main!(benches);
