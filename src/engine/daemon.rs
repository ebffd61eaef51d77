//! One daemon: its state, its health with hysteresis, and the slots in use.

use std::collections::BTreeSet;

use super::Config;
use super::model::{DaemonId, Facts, Health, Probe, SessionKey, State};

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
    /// Whether its API range does not meet the others'.
    pub misfit: bool,
    /// Sessions whose BuildKit builds ended here since the images were listed last.
    pub(super) builders: BTreeSet<SessionKey>,
    /// The provisioner's word on the slots.
    fixed_slots: Option<u32>,
    failures: u32,
    successes: u32,
}

impl Daemon {
    pub(super) fn new(id: DaemonId, slots: Option<u32>) -> Self {
        Daemon {
            id,
            state: State::Starting,
            health: Health::Healthy,
            reason: "not probed yet".into(),
            facts: None,
            slots: slots.unwrap_or(1),
            used: 0,
            sessions: BTreeSet::new(),
            misfit: false,
            builders: BTreeSet::new(),
            fixed_slots: slots,
            failures: 0,
            successes: 0,
        }
    }

    /// Whether it takes new sessions.
    pub fn takes_sessions(&self) -> bool {
        self.state == State::Ready && self.health == Health::Healthy && !self.misfit
    }

    /// State and health as one value, to see whether they changed.
    pub(super) fn standing(&self) -> (State, Health, bool) {
        (self.state, self.health, self.misfit)
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
