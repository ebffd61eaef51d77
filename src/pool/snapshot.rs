//! The pool for a scrape of its metrics: counts, where `/status` has everything. It is made under the pool's lock, so
//! it copies no more than names.

use std::collections::HashMap;

use super::{Pool, lock};
use crate::engine::model::{CordonedBy, DaemonId, Health, State, Tenant, Time};
use crate::engine::{Daemon, Engine};
use crate::metrics::snapshot::{self, Holds, Scaler, Snapshot};

impl Pool {
    /// What is there at this moment. Who does not admit knows nothing of the pool.
    pub fn snapshot(&self) -> Snapshot {
        let admits = self.admits();
        let pool = admits.then(|| self.counted());
        Snapshot { admits: self.is_shared().then_some(admits), pool }
    }

    fn counted(&self) -> snapshot::Pool {
        let config = self.config();
        let now = self.now();
        let state = self.lock();
        let holds = |id: &DaemonId| state.daemons.get(id).map(|m| *lock(&m.handle.holds)).unwrap_or_default();
        let mut pool = of_engine(&state.engine, now, holds);
        pool.queue_limit = config.engine.queue_limit;
        pool.problems += state.problems.len();
        pool.scaler = state.scaler.as_ref().map(|scaler| Scaler {
            desired: scaler.desired,
            replicas: scaler.replicas,
            reason: scaler.reason,
            faults: scaler.faults.len(),
            startup: scaler.startup,
            limits: (config.scale.min, config.scale.max),
        });
        pool
    }
}

/// What the engine knows; `holds` is what a daemon's data amounts to.
pub fn of_engine(engine: &Engine, now: Time, holds: impl Fn(&DaemonId) -> Holds) -> snapshot::Pool {
    let mut pool = snapshot::Pool {
        daemons: engine.daemons().map(|d| daemon(d, holds(&d.id))).collect(),
        images: engine.image_count(),
        problems: engine.alarms().len(),
        ..snapshot::Pool::default()
    };
    // By the engine's own names: ten thousand sessions are few tenants'.
    let mut tenants: HashMap<&Tenant, snapshot::Tenant> = HashMap::new();
    for (tenant, slots) in engine.leased() {
        let tenant = tenants.entry(tenant).or_default();
        tenant.sessions += 1;
        tenant.slots += slots;
        pool.sessions += 1;
    }
    let mut since: Option<Time> = None;
    for (tenant, at) in engine.waiters() {
        tenants.entry(tenant).or_default().waiting += 1;
        since = Some(since.map_or(at, |since| since.min(at)));
    }
    pool.tenants = tenants.into_iter().map(|(name, tenant)| (name.to_string(), tenant)).collect();
    pool.oldest = since.map_or(0.0, |since| now.saturating_sub(since).as_secs_f64());
    pool
}

fn daemon(d: &Daemon, holds: Holds) -> snapshot::Daemon {
    let (is, health) = (d.state, d.shown_health());
    snapshot::Daemon {
        id: d.id.to_string(),
        state: is,
        health,
        up: is == State::Ready && health == Health::Healthy && d.cordon.is_none(),
        cordoned: d.cordon.is_some(),
        victim: d.cordon.as_ref().is_some_and(|cordon| cordon.by == CordonedBy::Scaler),
        refused: d.refused().is_some(),
        slots: d.slots,
        used: d.used,
        open: d.capacity(),
        strangers: d.strangers(),
        sessions: d.sessions.len(),
        back_off: d.back_off().as_secs_f64(),
        latency: d.latency().map(|latency| latency.as_secs_f64()),
        version: d.facts.as_ref().map(|facts| facts.version.clone()).unwrap_or_default(),
        holds,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::Arc;

    use super::*;
    use crate::engine::model::*;
    use crate::metrics::Metrics;
    use crate::pool::{Config, Ticket, Want};
    use crate::provision::{DaemonSpec, Endpoint, Observation};
    use crate::proxy::classify;
    use crate::proxy::identify::{Identity, ListenerIdentity, Source, identify};

    /// A pool of one daemon that is said to be well: one slot, and one that may wait for it. It forgets sessions soon,
    /// because what it knows of each is looked through after every event of a test.
    fn pool() -> Arc<Pool> {
        let mut config = Config { slots: Some(1), ..Config::default() };
        (config.engine.queue_limit, config.engine.remembered) = (1, 16);
        (config.engine.linger, config.engine.grace) = (Time::ZERO, Time::ZERO);
        let pool = Pool::new(config, Metrics::new(prometheus::Registry::new()).unwrap(), 1);
        let daemon = DaemonSpec {
            id: "a".into(),
            endpoint: Some(Endpoint::Unix("/nonexistent/a".into())),
            source_ips: Vec::new(),
            cgroup: None,
            draining: false,
            pending: None,
            faulty: false,
            removal: Default::default(),
            slots: Some(1),
        };
        pool.observe(Observation { daemons: vec![daemon], ..Observation::default() });
        let facts = Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() };
        pool.event(Event::Probed { daemon: "a".into(), probe: Probe::Answered(facts) });
        pool
    }

    /// A build of who comes from the n-th address, and by his own word from a tenant that nobody else is of.
    async fn build(pool: &Arc<Pool>, n: u32) -> Ticket {
        let listener = ListenerIdentity { tenant: "default".into(), session: None };
        let source = Source::Ip(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n)));
        let target = if n.is_multiple_of(2) { "/build".into() } else { format!("/t/team{n}/build") };
        let identity = identify(&listener, &source, &classify::prefix(&target), None).unwrap();
        let Identity { key, source, tenant, .. } = identity;
        let want = Want {
            key,
            tenant,
            source,
            inside: None,
            shares_names: false,
            class: Class::Work(Work::Build),
            target: None,
            requirements: Requirements::default(),
        };
        pool.acquire(&want).await
    }

    /// Three addresses at a time: the first builds, the second waits and gives up, the third finds the queue full.
    async fn come(pool: &Arc<Pool>, addresses: std::ops::Range<u32>) {
        for n in addresses.step_by(3) {
            let (mut first, mut second) = (build(pool, n).await, build(pool, n + 1).await);
            let lease = first.now().expect("no wait").expect("a slot");
            assert!(second.now().is_none(), "it waits");
            let third = build(pool, n + 2).await.now().expect("no wait");
            assert!(third.is_err_and(|error| error.to_string().contains("queue is full")));
            drop(second);
            lease.finish(Outcome::Done);
            pool.event(Event::Tick);
        }
    }

    /// The names of all series with their labels, and the whole text.
    fn scrape(pool: &Pool) -> (BTreeSet<String>, String) {
        let text = pool.metrics().render(&pool.snapshot());
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let series = lines.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())).collect();
        (series, text)
    }

    #[tokio::test]
    async fn a_hundred_thousand_addresses_have_no_more_series_than_a_few_hundred() {
        let pool = pool();
        come(&pool, 0..300).await;
        let (few, text) = scrape(&pool);
        assert!(text.contains("tenant=\"team1\"") && text.contains("tenant=\"other\""), "tenants are labels");
        come(&pool, 300..100_002).await;
        let (many, text) = scrape(&pool);
        let new: Vec<&String> = many.difference(&few).take(10).collect();
        assert!(new.is_empty(), "{} series, {} before: {new:?}", many.len(), few.len());
        assert!(text.len() < 200_000, "{} bytes", text.len());
        assert!(!text.contains("10.0.") && !text.contains("10.1."), "an address is a label");
        assert!(text.contains("dindpool_leases_total 33334\n"), "all of them came");
        pool.stop();
    }
}
