//! What the autoscaler is shown of the engine, and what the engine is told of it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::autoscaler::{Candidate, Made, Phase, Removal};
use super::model::*;
use super::session::Owned;
use super::{Engine, Session};

/// Whether more daemons are on their way, or will be asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    /// Work that finds no daemon waits for one.
    pub coming: bool,
    /// Why daemons that were asked for do not come up, each a sentence; told to whoever waits in vain.
    pub faults: Vec<String>,
}

impl Engine {
    /// The autoscaler's word. When nobody comes any more, those who wait for that hear why.
    pub(super) fn growing(&mut self, growth: Growth) {
        let came = std::mem::replace(&mut self.growth, growth).coming;
        if came && !self.growth.coming {
            self.refuse_if_nobody_comes();
        }
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
        let faults = vec!["d-1: ImagePullBackOff".to_string()];
        let effects = engine.handle(Event::Growth(Growth { coming: false, faults }), Time::from_secs(6));
        assert!(effects.iter().any(|effect| matches!(
            effect,
            Effect::Refused { refusal: Refusal::NoDaemon(why), .. } if why.contains("ImagePullBackOff")
        )));
        assert_eq!(engine.waits_for_anybody(), 0);
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
