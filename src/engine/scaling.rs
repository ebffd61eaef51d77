//! What the autoscaler is shown of the engine, and what the engine is told of it.

use serde::{Deserialize, Serialize};

use super::Engine;
use super::autoscaler::{Candidate, Phase};
use super::model::*;

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
    pub fn candidates(&self) -> Vec<Candidate> {
        self.daemons
            .values()
            .map(|d| Candidate {
                id: d.id.clone(),
                phase: match d.state {
                    State::Starting => Phase::Starting,
                    State::Draining | State::Gone => Phase::Leaving,
                    State::Ready if d.is_well() => Phase::Ready,
                    State::Ready => Phase::Away,
                },
                slots: d.slots,
                used: d.used,
                empty: self.is_empty(&d.id),
                exposed: false,
                warm: self.warm.count(&d.id),
                cordon: d.cordon.as_ref().map(|c| c.by),
            })
            .collect()
    }

    /// Whether nothing would be lost with a daemon: no lease, no container, no image that is nowhere else.
    fn is_empty(&self, daemon: &DaemonId) -> bool {
        if self.has_work(daemon) {
            return false;
        }
        let left = self.left_on(daemon);
        left.containers.is_empty() && left.images.is_empty()
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
            Time::from_secs(1),
        )
    }

    #[test]
    fn an_empty_pool_that_can_grow_has_its_work_wait_until_it_cannot() {
        let mut engine = Engine::new(Config::default(), 1);
        let refused = |effects: &[Effect]| effects.iter().any(|e| matches!(e, Effect::Refused { .. }));
        assert!(refused(&ask(&mut engine, "a")), "nobody comes");
        engine.handle(Event::Growth(Growth { coming: true, faults: Vec::new() }), Time::from_secs(1));
        assert!(!refused(&ask(&mut engine, "b")));
        assert_eq!(engine.waits_for_anybody(), 1);
        let faults = vec!["d-1: ImagePullBackOff".to_string()];
        let effects = engine.handle(Event::Growth(Growth { coming: false, faults }), Time::from_secs(2));
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
        let candidate = |engine: &Engine| engine.candidates().remove(0);
        assert!(candidate(&engine).empty && candidate(&engine).phase == Phase::Ready);
        ask(&mut engine, "a");
        assert_eq!((candidate(&engine).empty, candidate(&engine).used), (false, 1));
    }
}
