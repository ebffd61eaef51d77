//! One daemon: its state and the slots in use. Its health is in [`super::health`].

use std::collections::{BTreeMap, BTreeSet};

use super::health::Vitals;
use super::model::{ApiVersion, DaemonId, Facts, Health, SessionKey, State, Tenant, Time};
use super::strangers::Strangers;
use super::{Cordon, balancer};

/// A daemon as the engine sees it.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// Its name.
    pub id: DaemonId,
    /// Starting → Ready → Draining.
    pub state: State,
    /// Healthy or Ejected.
    pub health: Health,
    /// Why it is in this state, in words, empty when all is well.
    pub reason: String,
    /// What it said of itself, once it did.
    pub facts: Option<Facts>,
    /// Slots in all.
    pub slots: u32,
    /// Slots in use. May exceed `slots`: a full pool shares its least loaded daemon.
    pub used: u32,
    /// Requests and streams that are open here.
    pub(super) open: u32,
    /// What is here has been listed once.
    pub(super) listed: bool,
    /// Sessions with a lease here.
    pub sessions: BTreeSet<SessionKey>,
    /// Why it is refused, if its API range does not meet the others'.
    pub misfit: Option<String>,
    /// Why it takes no new sessions although it is well.
    pub cordon: Option<Cordon>,
    /// Until when it takes no new sessions because somebody is about to end it, if he does not ask again.
    pub(super) leaving: Option<Time>,
    /// He was told that he may.
    pub(super) let_go: bool,
    /// The daemons that keep their data where this one does: refused like a misfit.
    pub(super) shares: BTreeSet<DaemonId>,
    pub(super) vitals: Vitals,
    /// Whether it is still waited for, while it starts.
    pub(super) expected: bool,
    /// Until when, at the longest.
    pub(super) expected_until: Time,
    /// Its name's hash, for the placing of reads.
    pub(super) hash: u64,
    /// Who may have made an image of which only an event or a list tells.
    pub(super) builders: Builders,
    /// What runs here without a session.
    pub(super) strangers: Strangers,
    /// The provisioner's word on the slots.
    fixed_slots: Option<u32>,
}

impl Daemon {
    pub(super) fn new(id: DaemonId, slots: Option<u32>) -> Self {
        Daemon {
            hash: balancer::hash(id.as_str()),
            id,
            state: State::Starting,
            health: Health::Healthy,
            reason: "not probed yet".into(),
            facts: None,
            slots: slots.unwrap_or(1),
            used: 0,
            open: 0,
            listed: false,
            sessions: BTreeSet::new(),
            misfit: None,
            cordon: None,
            leaving: None,
            let_go: false,
            shares: BTreeSet::new(),
            vitals: Vitals::default(),
            expected: true,
            expected_until: Time::ZERO,
            builders: Builders::default(),
            strangers: Strangers::default(),
            fixed_slots: slots,
        }
    }

    /// Whether it is there and answers as it should.
    pub fn is_well(&self) -> bool {
        self.state == State::Ready && self.health == Health::Healthy && !self.is_refused()
    }

    /// Whether it takes new sessions.
    pub fn takes_sessions(&self) -> bool {
        self.is_well() && self.cordon.is_none() && !self.is_leaving()
    }

    /// Whether somebody is about to end it, and has asked for that.
    pub fn is_leaving(&self) -> bool {
        self.leaving.is_some() || self.let_go
    }

    /// Compose projects and lone containers that run here without a session of the pool.
    pub fn strangers(&self) -> u32 {
        self.strangers.count()
    }

    /// State and health as one value, to see whether they changed.
    pub(super) fn standing(&self) -> (State, Health, bool) {
        (self.state, self.health, self.is_refused())
    }

    /// Why it does not take sessions, in words; empty when all is well.
    pub fn why(&self) -> String {
        match self.refused() {
            Some(refused) if self.health == Health::Healthy => refused,
            _ => self.reason.clone(),
        }
    }

    pub(super) fn is_refused(&self) -> bool {
        self.misfit.is_some() || !self.shares.is_empty()
    }

    /// Why it is refused although it is well: it does not belong into this pool.
    pub fn refused(&self) -> Option<String> {
        let shares = self.shares.first().map(|with| format!("it shares its data root with {with}"));
        shares.or_else(|| self.misfit.clone())
    }

    /// Its health as others are told it: one that is refused counts as ejected.
    pub fn shown_health(&self) -> Health {
        if self.is_refused() { Health::Ejected } else { self.health }
    }

    /// The API versions that it serves, once it has said so.
    pub(super) fn api_range(&self) -> Option<(ApiVersion, ApiVersion)> {
        self.facts.as_ref().map(|f| (f.api_min, f.api_max))
    }

    /// Whether it serves `api`. Without one in the request's path, any version will do.
    pub(super) fn serves(&self, api: Option<ApiVersion>) -> bool {
        let Some((min, max)) = self.api_range() else { return true };
        api.is_none_or(|api| min <= api && api <= max)
    }

    /// The provisioner has begun to delete it, or has thought better of it.
    pub(super) fn drain(&mut self, draining: bool) {
        self.state = match (self.state, draining) {
            (State::Ready | State::Starting, true) => State::Draining,
            (State::Draining, false) if self.facts.is_none() => State::Starting,
            (State::Draining, false) => State::Ready,
            (state, _) => state,
        };
    }

    /// Takes over the provisioner's word on the slots.
    pub(super) fn fix_slots(&mut self, slots: Option<u32>) {
        self.fixed_slots = slots;
        if let Some(slots) = slots.or_else(|| self.facts.as_ref().map(default_slots)) {
            self.slots = slots;
        }
    }

    /// What an answer says of it.
    pub(super) fn meet(&mut self, facts: Facts) {
        self.slots = self.fixed_slots.unwrap_or_else(|| default_slots(&facts));
        self.facts = Some(facts);
    }
}

/// A daemon whose images nobody lists remembers no more ended builds than this: when there are more, the older
/// half is forgotten.
const ENDED: usize = 256;

/// The sessions that build on a daemon, or whose builds ended after its images were listed last.
#[derive(Debug, Clone, Default)]
pub(super) struct Builders {
    under_way: BTreeMap<SessionKey, (Tenant, u32)>,
    ended: BTreeMap<SessionKey, (Tenant, Time)>,
}

impl Builders {
    /// A build starts.
    pub fn start(&mut self, key: &SessionKey, tenant: &Tenant) {
        self.under_way.entry(key.clone()).or_insert_with(|| (tenant.clone(), 0)).1 += 1;
    }

    /// A build ends; `at` is `None` if it never reached the daemon.
    pub fn end(&mut self, key: &SessionKey, at: Option<Time>) {
        let Some((tenant, builds)) = self.under_way.get_mut(key) else { return };
        *builds -= 1;
        if let Some(at) = at {
            self.ended.insert(key.clone(), (tenant.clone(), at));
        }
        if self.ended.len() > ENDED {
            let mut ends: Vec<Time> = self.ended.values().map(|(_, at)| *at).collect();
            ends.sort_unstable();
            let middle = ends[ends.len() / 2];
            self.ended.retain(|_, (_, at)| *at > middle);
        }
        if *builds == 0 {
            self.under_way.remove(key);
        }
    }

    /// The images were listed at `began`: builds that had ended by then can bring nothing new.
    pub fn listed(&mut self, began: Time) {
        self.ended.retain(|_, (_, at)| *at > began);
    }

    /// The builds that have ended since the images were listed last, and how long ago.
    pub fn ended(&self, now: Time) -> Vec<(SessionKey, Tenant, Time)> {
        let age = |at: Time| now.saturating_sub(at);
        self.ended.iter().map(|(key, (tenant, at))| (key.clone(), tenant.clone(), age(*at))).collect()
    }

    /// The same of another proxy's account. They are listed anew, whenever they ended.
    pub fn import_ended(&mut self, ended: &[(SessionKey, Tenant, Time)], now: Time) {
        let known = ended.iter().map(|(key, tenant, _)| (key.clone(), (tenant.clone(), now)));
        self.ended.extend(known);
    }

    /// Whether anybody builds.
    pub fn under_way(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Whether images may be there that no list and no event has told of.
    pub fn stale(&self) -> bool {
        !self.ended.is_empty()
    }

    /// All of them, and their tenants.
    pub fn all(&self) -> (Vec<SessionKey>, Vec<Tenant>) {
        let all: BTreeMap<_, _> = (self.under_way.iter().map(|(key, (tenant, _))| (key, tenant)))
            .chain(self.ended.iter().map(|(key, (tenant, _))| (key, tenant)))
            .collect();
        let tenants: BTreeSet<&Tenant> = all.values().copied().collect();
        (all.keys().map(|key| (*key).clone()).collect(), tenants.into_iter().cloned().collect())
    }
}

/// Slots of a daemon that nobody gave a number: one per two processors, one per 2 GiB of memory, whichever is
/// less, at least one. A build with BuildKit keeps about two processors busy.
fn default_slots(facts: &Facts) -> u32 {
    let by_memory = u32::try_from(facts.memory >> 31).unwrap_or(u32::MAX);
    (facts.cpus / 2).min(by_memory).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(cpus: u32, gib: u64) -> Facts {
        Facts { cpus, memory: gib << 30, ..Facts::default() }
    }

    #[test]
    fn slots_follow_processors_and_memory() {
        assert_eq!(default_slots(&facts(16, 64)), 8);
        assert_eq!(default_slots(&facts(16, 8)), 4);
        assert_eq!(default_slots(&facts(1, 1)), 1);
    }
}
