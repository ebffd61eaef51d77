//! One session: its binding, its units of work, and what it owns.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::model::{DaemonId, Kind, LeaseId, SessionKey, Tenant, Time};
use super::reason::Why;

/// Where a session belongs.
#[derive(Debug, Clone)]
pub struct Home {
    /// The daemon.
    pub daemon: DaemonId,
    /// The lease, while it lives. Without one the home is an affinity, or only a memory.
    pub lease: Option<LeaseId>,
    /// Since when.
    pub since: Time,
    /// Whether anything of the lease has reached the daemon. Until then the session may be tried elsewhere.
    pub(super) proven: bool,
    /// Why there; `None` where another proxy decided it.
    pub why: Option<Arc<Why>>,
}

/// Something of a session's that exists on its home only.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owned {
    Object(Kind, String),
    /// An unpushed image, by reference.
    Image(String),
}

/// The slots that each tenant's sessions hold. Tenants that hold none are not listed: their names are clients' to
/// choose.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Held(BTreeMap<Tenant, u32>);

impl Held {
    /// A session of the tenant holds this many slots now.
    pub fn change(&mut self, tenant: &Tenant, before: u32, now: u32) {
        if before == now {
            return;
        }
        if let Some(held) = self.0.get_mut(tenant) {
            *held = *held + now - before;
            if *held == 0 {
                self.0.remove(tenant);
            }
        } else {
            self.0.insert(tenant.clone(), now - before);
        }
    }

    /// How many slots the tenant's sessions hold.
    pub fn by(&self, tenant: &Tenant) -> u32 {
        self.0.get(tenant).copied().unwrap_or(0)
    }
}

/// Everything that must reach the same daemon.
#[derive(Debug, Clone)]
pub struct Session {
    /// Who it belongs to.
    pub tenant: Tenant,
    /// The key of its source when its own is explicit; the latest one, if it comes from several.
    pub source: Option<SessionKey>,
    /// The keys under which its lease is found by its client's other connections.
    pub(super) groups: BTreeSet<SessionKey>,
    /// Its binding.
    pub home: Option<Home>,
    /// The daemon that it lost, until it starts work again.
    pub lost: Option<DaemonId>,
    /// Requests and streams that are open.
    pub open: u32,
    /// Builds under way.
    pub builds: u32,
    /// Other units of work under way, which share one slot: pulls, loads, creates, BuildKit connections.
    pub others: u32,
    /// Its containers that are a unit of work, on its home.
    pub live: BTreeSet<String>,
    /// The same on other daemons, where an image or a name led.
    pub(super) foreign: BTreeMap<DaemonId, BTreeSet<String>>,
    pub(super) owned: BTreeSet<Owned>,
    /// Slots that it holds on its home.
    pub slots: u32,
    /// Since when it has held one.
    pub(super) held: Time,
    /// Until when it keeps its last slot without work.
    pub(super) linger: Option<Time>,
    /// Since when nothing of it is open and nothing runs; `None` while something does.
    pub(super) idle: Option<Time>,
    /// Since when it has nothing but containers that run.
    pub(super) unattended: Option<Time>,
    /// When it was told last that they have run for longer than that is allowed, if they have.
    pub(super) overdue: Option<Time>,
    /// When the engine looks at it again.
    pub(super) timer: Option<Time>,
}

impl Session {
    pub(super) fn new(tenant: Tenant, now: Time) -> Self {
        Session {
            tenant,
            source: None,
            groups: BTreeSet::new(),
            home: None,
            lost: None,
            open: 0,
            builds: 0,
            others: 0,
            live: BTreeSet::new(),
            foreign: BTreeMap::new(),
            owned: BTreeSet::new(),
            slots: 0,
            held: now,
            linger: None,
            idle: Some(now),
            unattended: None,
            overdue: None,
            timer: None,
        }
    }

    /// Whether its containers have run for longer than they may without anything else.
    pub fn is_overdue(&self) -> bool {
        self.overdue.is_some()
    }

    /// The lease, while it lives.
    pub fn lease(&self) -> Option<LeaseId> {
        self.home.as_ref()?.lease
    }

    /// Whether it has a lease on `daemon`, or a container that runs there.
    pub(super) fn is_on(&self, daemon: &DaemonId) -> bool {
        let home = self.home.as_ref().filter(|h| h.lease.is_some());
        home.is_some_and(|h| h.daemon == *daemon) || self.foreign.contains_key(daemon)
    }

    /// Whether a unit of work is under way on its home.
    pub fn works(&self) -> bool {
        self.builds + self.others > 0 || !self.live.is_empty()
    }

    /// Whether containers run, and nothing else of it is under way.
    pub(super) fn has_only_containers(&self) -> bool {
        let containers = !self.live.is_empty() || !self.foreign.is_empty();
        containers && self.open == 0 && self.builds + self.others == 0
    }

    /// Its containers that run, or were created a moment ago, and where.
    pub(super) fn containers(&self) -> Vec<(DaemonId, String)> {
        let home = self.home.iter().flat_map(|h| self.live.iter().map(move |id| (&h.daemon, id)));
        let away = self.foreign.iter().flat_map(|(daemon, ids)| ids.iter().map(move |id| (daemon, id)));
        home.chain(away).map(|(daemon, id)| (daemon.clone(), id.clone())).collect()
    }

    /// Whether anything keeps the lease alive.
    pub(super) fn busy(&self) -> bool {
        self.open > 0 || self.works()
    }

    /// The daemon that all its calls go to: by lease, or because it owns something there.
    pub(super) fn bound_to(&self) -> Option<&DaemonId> {
        self.home.as_ref().filter(|h| h.lease.is_some() || !self.owned.is_empty()).map(|h| &h.daemon)
    }

    /// Whether it may be given another home: nothing of it is open, runs, or exists only there.
    pub(super) fn movable(&self) -> bool {
        !self.busy() && self.owned.is_empty()
    }

    /// The slots that its work wants: one for each concurrent build, one for all the rest.
    pub(super) fn wants(&self) -> u32 {
        self.builds.max(u32::from(self.works()))
    }
}
