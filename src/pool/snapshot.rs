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
