//! What the autoscaler is shown of the engine, and what the engine is told of it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::autoscaler::{Candidate, Made, Phase, Removal};
use super::model::*;
use super::session::Owned;
use super::{Daemon, Engine, Session};

/// Whether more daemons are on their way, or will be asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    /// Work that finds no daemon waits for one.
    pub coming: bool,
    /// Why daemons that were asked for do not come up, each a sentence; told to whoever waits in vain.
    pub faults: Vec<String>,
}

/// What stands between the reason why a daemon does not start and when it is tried again.
pub const STARTING_AGAIN: &str = "; starting";

/// A fault without when it is tried again, which changes all the time.
pub fn cause(fault: &str) -> &str {
    fault.split(STARTING_AGAIN).next().unwrap_or(fault)
}

impl Engine {
    /// The autoscaler's word. When nobody comes any more, those who wait for that hear why.
    pub(super) fn growing(&mut self, growth: Growth) {
        self.scaled = true;
        let came = std::mem::replace(&mut self.growth, growth).coming;
        if came && !self.growth.coming {
            self.refuse_if_nobody_comes();
        }
    }

    /// Why a daemon does not come up, as the autoscaler has it.
    pub(super) fn fault_of(&self, daemon: &DaemonId) -> Option<&str> {
        self.growth
            .faults
            .iter()
            .find_map(|fault| Some(cause(fault.strip_prefix(daemon.as_str())?.strip_prefix(": ")?)))
    }

    /// What is the matter with daemons that are to come, for who waits: nothing, where those that are there are only
    /// busy.
    pub fn why_waiting(&self) -> Option<String> {
        let fault = self.growth.faults.first().map(|fault| cause(fault).to_string());
        let nobody = !self.daemons.values().any(Daemon::takes_sessions);
        fault.or_else(|| (nobody && self.growth.coming).then(|| "a daemon is starting".into()))
    }

    /// The work that waits and that a new daemon could take: not what is bound to a daemon or needs something that
    /// only some have, nor what its tenant's limit holds back.
    pub fn waits_for_anybody(&self) -> u32 {
        let free = |acquire: &&Acquire| {
            let held = self.tenant_is_full(&acquire.tenant);
            !held && self.home_of(acquire).is_none() && !self.is_limited(acquire)
        };
        let waiting = self.queue.acquires().filter(free).count();
        u32::try_from(waiting).unwrap_or(u32::MAX)
    }

    /// All daemons, as the autoscaler looks at them.
    pub fn candidates(&self, made: &BTreeMap<DaemonId, Made>) -> Vec<Candidate> {
        // In one go: there may be a thousand daemons and ten times as many sessions.
        let owns_images = |s: &&Session| s.owned.iter().any(|o| matches!(o, Owned::Image(_)));
        let holders = self.sessions.values().filter(owns_images);
        let held: BTreeSet<&DaemonId> = holders.filter_map(|s| Some(&s.home.as_ref()?.daemon)).collect();
        self.daemons
            .values()
            .map(|d| {
                let Made { removal, fault } = made.get(&d.id).cloned().unwrap_or_default();
                // What was never listed may be anything, unless it does not even run.
                let known = d.listed || removal < Removal::NotReady;
                let left = held.contains(&d.id) || d.builders.stale() || self.has_containers(&d.id);
                Candidate {
                    id: d.id.clone(),
                    phase: match (d.state, fault) {
                        (State::Starting, Some(fault)) => Phase::Stuck(fault),
                        (State::Starting, None) => Phase::Starting,
                        (State::Draining | State::Gone, _) => Phase::Leaving,
                        (State::Ready, _) if d.is_leaving() => Phase::Leaving,
                        (State::Ready, _) if d.is_well() => Phase::Ready,
                        (State::Ready, _) => Phase::Away,
                    },
                    slots: d.slots,
                    used: d.taken(),
                    empty: known && !left && !self.has_work(&d.id),
                    removal,
                    warm: self.warm.count(&d.id),
                    cordon: d.cordon.as_ref().map(|c| c.by),
                }
            })
            .collect()
    }

    /// Whether a container is there, also one that does not run: nobody else has it.
    fn has_containers(&self, daemon: &DaemonId) -> bool {
        self.objects.on(daemon).any(|(kind, _, _)| kind == Kind::Container)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn observed(ids: &[&str]) -> Event {
        let one = |id: &&str| Observed { id: (*id).into(), draining: false, pending: None, slots: Some(1) };
        Event::Observed(ids.iter().map(one).collect())
    }

    fn ask(engine: &mut Engine, key: &str) -> Vec<Effect> {
        engine.handle(
            Event::Acquire(Acquire {
                request: RequestId(key.bytes().map(u64::from).sum()),
                key: key.into(),
                tenant: "t".into(),
                source: None,
                inside: None,
                shares_names: false,
                class: Class::Work(Work::Build),
                target: None,
                requirements: Requirements::default(),
                deadline: None,
            }),
            Time::from_secs(5),
        )
    }

    #[test]
    fn an_empty_pool_that_can_grow_has_its_work_wait_until_it_cannot() {
        let mut engine = Engine::new(Config::default(), 1);
        let refused = |effects: &[Effect]| effects.iter().any(|e| matches!(e, Effect::Refused { .. }));
        assert!(refused(&ask(&mut engine, "a")), "nobody comes");
        engine.handle(Event::Growth(Growth { coming: true, faults: Vec::new() }), Time::from_secs(5));
        assert!(!refused(&ask(&mut engine, "b")));
        assert_eq!(engine.waits_for_anybody(), 1);
        assert_eq!(engine.why_waiting().as_deref(), Some("a daemon is starting"));
        let faults = vec!["d-0: no space left; starting again in 4 s".to_string()];
        engine.handle(Event::Growth(Growth { coming: true, faults }), Time::from_secs(6));
        assert_eq!(engine.why_waiting().as_deref(), Some("d-0: no space left"));
        let faults = vec!["d-1: ImagePullBackOff".to_string()];
        let effects = engine.handle(Event::Growth(Growth { coming: false, faults }), Time::from_secs(6));
        assert!(effects.iter().any(|effect| matches!(
            effect,
            Effect::Refused { refusal: Refusal::NoDaemon(why), .. } if why.contains("ImagePullBackOff")
        )));
        assert_eq!(engine.waits_for_anybody(), 0);
    }

    #[test]
    fn nobody_waits_for_a_daemon_that_the_autoscaler_has_given_up() {
        let mut engine = Engine::new(Config::default(), 1);
        engine.handle(observed(&["a"]), Time::ZERO);
        engine.handle(Event::Growth(Growth { coming: true, faults: Vec::new() }), Time::from_secs(1));
        let refused = |effects: &[Effect]| effects.iter().any(|e| matches!(e, Effect::Refused { .. }));
        assert!(!refused(&ask(&mut engine, "b")), "it is on its way");
        let faults = vec!["a: no space left; starting again in 2 s".to_string()];
        let effects = engine.handle(Event::Growth(Growth { coming: false, faults }), Time::from_secs(9));
        assert!(effects.iter().any(|effect| matches!(
            effect,
            Effect::Refused { refusal: Refusal::NoDaemon(why), .. } if why.contains("a starting (no space left)")
        )), "long before the engine's own patience is over: {effects:?}");
        assert!(refused(&ask(&mut engine, "c")));
    }

    #[test]
    fn a_daemon_with_a_lease_is_not_empty() {
        let mut engine = Engine::new(Config::default(), 1);
        engine.handle(observed(&["a"]), Time::ZERO);
        let facts = Facts { api_max: (1, 45), api_min: (1, 24), ..Facts::default() };
        for second in 0..5 {
            let probe = Probe::Answered(facts.clone());
            engine.handle(Event::Probed { daemon: "a".into(), probe }, Time::from_secs(second));
        }
        let candidate = |engine: &Engine| engine.candidates(&BTreeMap::new()).remove(0);
        assert!(!candidate(&engine).empty, "nobody knows what is on it");
        let (daemon, began) = ("a".into(), Time::from_secs(4));
        engine.handle(Event::Inventory { daemon, began, inventory: Inventory::default() }, began);
        assert!(candidate(&engine).empty && candidate(&engine).phase == Phase::Ready);
        ask(&mut engine, "a");
        assert_eq!((candidate(&engine).empty, candidate(&engine).used), (false, 1));
    }
}
