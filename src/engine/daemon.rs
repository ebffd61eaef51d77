//! One daemon: its state, its health with hysteresis, and the slots in use.

use std::collections::{BTreeMap, BTreeSet};

use super::model::{ApiVersion, DaemonId, Facts, Health, Probe, SessionKey, State, Tenant, Time};
use super::strangers::Strangers;
use super::{Config, Cordon, balancer};

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
    /// Sessions with a lease here.
    pub sessions: BTreeSet<SessionKey>,
    /// Why it is refused, if its API range does not meet the others'.
    pub misfit: Option<String>,
    /// Why it takes no new sessions although it is well.
    pub cordon: Option<Cordon>,
    /// Whether it is still waited for, while it starts.
    pub(super) expected: bool,
    /// Its name's hash, for the placing of reads.
    pub(super) hash: u64,
    /// Who may have made an image of which only an event or a list tells.
    pub(super) builders: Builders,
    /// What runs here without a session.
    pub(super) strangers: Strangers,
    /// The provisioner's word on the slots.
    fixed_slots: Option<u32>,
    failures: u32,
    successes: u32,
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
            sessions: BTreeSet::new(),
            misfit: None,
            cordon: None,
            expected: true,
            builders: Builders::default(),
            strangers: Strangers::default(),
            fixed_slots: slots,
            failures: 0,
            successes: 0,
        }
    }

    /// Whether it is there and answers as it should.
    pub fn is_well(&self) -> bool {
        self.state == State::Ready && self.health == Health::Healthy && self.misfit.is_none()
    }

    /// Whether it takes new sessions.
    pub fn takes_sessions(&self) -> bool {
        self.is_well() && self.cordon.is_none()
    }

    /// Compose projects and lone containers that run here without a session of the pool.
    pub fn strangers(&self) -> u32 {
        self.strangers.count()
    }

    /// State and health as one value, to see whether they changed.
    pub(super) fn standing(&self) -> (State, Health, bool) {
        (self.state, self.health, self.misfit.is_some())
    }

    /// Why it does not take sessions, in words; empty when all is well.
    pub fn why(&self) -> &str {
        match &self.misfit {
            Some(misfit) if self.health == Health::Healthy => misfit,
            _ => &self.reason,
        }
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

    /// Takes in a probe. One refused connection ejects at once (nobody listens); a slow or broken answer must
    /// repeat [`Config::eject_after`] times, and a recovery [`Config::recover_after`] times, so that a daemon
    /// under load does not flap.
    pub(super) fn probed(&mut self, probe: Probe, config: &Config) {
        match probe {
            Probe::Answered(facts) => {
                self.failures = 0;
                self.successes += 1;
                self.slots = self.fixed_slots.unwrap_or_else(|| default_slots(&facts));
                self.facts = Some(facts);
                if self.state == State::Starting {
                    self.state = State::Ready;
                    self.health = Health::Healthy;
                }
                if self.health == Health::Ejected && self.successes >= config.recover_after {
                    self.health = Health::Healthy;
                }
                if self.health == Health::Healthy && self.state == State::Ready {
                    self.reason.clear();
                }
            }
            Probe::Failed(reason) => {
                self.failures += 1;
                self.failed(reason, self.failures >= config.eject_after);
            }
            Probe::Refused(reason) => {
                self.failures += 1;
                self.failed(reason, true);
            }
        }
    }

    fn failed(&mut self, reason: String, eject: bool) {
        self.successes = 0;
        self.reason = reason;
        if eject && self.state != State::Starting {
            self.health = Health::Ejected;
        }
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

    #[test]
    fn one_slow_answer_ejects_nobody_and_a_refusal_does_at_once() {
        let config = Config::default();
        let mut daemon = Daemon::new("d".into(), None);
        daemon.probed(Probe::Answered(facts(2, 4)), &config);
        assert!(daemon.takes_sessions());
        daemon.probed(Probe::Failed("slow".into()), &config);
        assert!(daemon.takes_sessions());
        daemon.probed(Probe::Failed("slow".into()), &config);
        assert!(!daemon.takes_sessions());
        daemon.probed(Probe::Answered(facts(2, 4)), &config);
        assert!(!daemon.takes_sessions(), "one good answer is not a recovery");
        daemon.probed(Probe::Answered(facts(2, 4)), &config);
        assert!(daemon.takes_sessions());
        daemon.probed(Probe::Refused("connection refused".into()), &config);
        assert!(!daemon.takes_sessions());
        assert_eq!(daemon.reason, "connection refused");
    }

    #[test]
    fn a_starting_daemon_becomes_ready_with_its_first_answer() {
        let config = Config::default();
        let mut daemon = Daemon::new("d".into(), Some(3));
        daemon.probed(Probe::Refused("connection refused".into()), &config);
        assert_eq!((daemon.state, daemon.health), (State::Starting, Health::Healthy));
        daemon.probed(Probe::Answered(facts(64, 64)), &config);
        assert_eq!((daemon.state, daemon.slots), (State::Ready, 3));
    }
}
