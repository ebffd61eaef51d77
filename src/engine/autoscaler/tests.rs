//! Rules and seeds of the autoscaler.

use std::collections::BTreeMap;

use super::super::balancer::Random;
use super::*;

const SECOND: Time = Time::from_secs(1);

fn policy() -> Policy {
    Policy { min: 1, max: 8, step: 2, stabilisation: 60 * SECOND, settle: 3 * SECOND, ..Policy::default() }
}

fn daemon(id: &str, phase: Phase, used: u32) -> Candidate {
    Candidate {
        id: id.into(),
        phase,
        slots: 2,
        used,
        empty: used == 0,
        removal: Removal::Ready,
        warm: 0,
        cordon: None,
    }
}

fn view(waiting: u32, daemons: Vec<Candidate>) -> View {
    let replicas = u32::try_from(daemons.len()).ok();
    View { confirmed: Some(Time::MAX / 2), replicas, rollout: false, waiting, daemons }
}

fn grown(decision: &Decision) -> Option<u32> {
    decision.steps.iter().find_map(|step| match step {
        Step::Grow { to, .. } => Some(*to),
        _ => None,
    })
}

#[test]
fn work_that_waits_brings_daemons_at_once_and_not_twice() {
    let mut scaler = Autoscaler::new(policy());
    let busy = daemon("a", Phase::Ready, 2);
    let decision = scaler.decide(&view(3, vec![busy.clone()]), SECOND);
    assert_eq!((decision.desired, grown(&decision), decision.reason), (3, Some(3), Reason::Demand));
    // Asked for, and not to be seen yet.
    let asked = View { replicas: Some(3), ..view(3, vec![busy.clone()]) };
    let decision = scaler.decide(&asked, 2 * SECOND);
    assert_eq!((grown(&decision), decision.reason), (None, Reason::Starting));
    let start = |id: &str| daemon(id, Phase::Starting, 0);
    let decision = scaler.decide(&view(3, vec![busy, start("b"), start("c")]), 3 * SECOND);
    assert_eq!((grown(&decision), decision.reason, decision.coming), (None, Reason::Starting, true));
}

#[test]
fn growth_has_a_step_and_a_maximum() {
    let mut scaler = Autoscaler::new(policy());
    let full = |n: u32| (0..n).map(|i| daemon(&format!("d{i}"), Phase::Ready, 2)).collect::<Vec<_>>();
    let decision = scaler.decide(&view(100, full(1)), SECOND);
    assert_eq!((decision.desired, grown(&decision)), (8, Some(3)));
    let decision = scaler.decide(&view(100, full(7)), 2 * SECOND);
    assert_eq!(grown(&decision), Some(8));
    let decision = scaler.decide(&view(100, full(8)), 3 * SECOND);
    assert_eq!((grown(&decision), decision.reason), (None, Reason::Maximum), "as many as there may be");
    let mut lame = full(8);
    lame[0].phase = Phase::Away;
    let decision = scaler.decide(&view(100, lame), 4 * SECOND);
    assert_eq!((grown(&decision), decision.reason), (None, Reason::Maximum));
}

#[test]
fn an_empty_pool_waits_for_work_and_work_for_it() {
    let mut scaler = Autoscaler::new(Policy { min: 0, ..policy() });
    let decision = scaler.decide(&view(0, vec![]), SECOND);
    assert_eq!((decision.desired, grown(&decision), decision.coming), (0, None, true));
    let decision = scaler.decide(&view(1, vec![]), 2 * SECOND);
    assert_eq!((decision.desired, grown(&decision)), (1, Some(1)));
    // Nobody knows the provisioner's number: nobody comes.
    let blind = View { replicas: None, ..view(1, vec![]) };
    let decision = scaler.decide(&blind, 3 * SECOND);
    assert_eq!((grown(&decision), decision.reason, decision.coming), (None, Reason::Stale, false));
    // But before it has said anything at all, it may.
    let mut scaler = Autoscaler::new(policy());
    let unheard = View::default();
    assert!(scaler.decide(&unheard, SECOND).coming && !scaler.decide(&unheard, 121 * SECOND).coming);
}

#[test]
fn spare_is_kept_as_a_count_or_a_share() {
    let busy = || vec![daemon("a", Phase::Ready, 2), daemon("b", Phase::Ready, 1)];
    for (spare, desired) in
        [(Spare::Slots(0), 2), (Spare::Slots(1), 2), (Spare::Slots(2), 3), (Spare::Percent(50), 3)]
    {
        let mut scaler = Autoscaler::new(Policy { spare, ..policy() });
        assert_eq!(scaler.decide(&view(0, busy()), SECOND).desired, desired, "{spare:?}");
    }
}

#[test]
fn daemons_that_do_not_come_up_are_no_capacity_and_are_not_made_without_end() {
    let mut scaler = Autoscaler::new(policy());
    let stuck = |id: &str| daemon(id, Phase::Stuck("ImagePullBackOff".into()), 0);
    let pool = view(5, vec![stuck("a"), stuck("b"), stuck("c")]);
    let early = scaler.decide(&pool, SECOND);
    assert!(early.coming && early.stuck[0] == "a: ImagePullBackOff", "it may still come up: {early:?}");
    let decision = scaler.decide(&pool, 200 * SECOND);
    assert_eq!((grown(&decision), decision.reason, decision.coming), (None, Reason::Stuck, false));
    // Where others come up, each of them is worth another try, once.
    let mut mixed = vec![daemon("ok", Phase::Ready, 2), stuck("a"), stuck("b")];
    let decision = scaler.decide(&view(4, mixed.clone()), 201 * SECOND);
    assert_eq!(grown(&decision), Some(5));
    mixed.extend([stuck("x"), stuck("y")]);
    scaler.decide(&view(4, mixed.clone()), 202 * SECOND);
    let decision = scaler.decide(&view(4, mixed), 500 * SECOND);
    assert_eq!((grown(&decision), decision.reason), (None, Reason::Stuck));
}

#[test]
fn daemons_that_never_appear_are_not_waited_for_for_ever() {
    let mut scaler = Autoscaler::new(policy());
    let asked = View { replicas: Some(2), ..view(1, vec![]) };
    assert!(scaler.decide(&asked, SECOND).coming);
    let decision = scaler.decide(&asked, 200 * SECOND);
    assert!(
        !decision.coming && decision.stuck == ["2 daemons that were asked for did not appear within 120 s"]
    );
}

#[test]
fn how_long_a_start_takes_is_learned() {
    let mut scaler = Autoscaler::new(policy());
    scaler.decide(&view(0, vec![daemon("a", Phase::Starting, 0)]), SECOND);
    scaler.decide(&view(0, vec![daemon("a", Phase::Ready, 0)]), 11 * SECOND);
    assert_eq!(scaler.startup(), Some(10 * SECOND));
}

/// Two idle daemons, long enough after the start.
fn idle() -> (Autoscaler, Vec<Candidate>) {
    let mut scaler = Autoscaler::new(policy());
    let pool = vec![daemon("a", Phase::Ready, 0), daemon("b", Phase::Ready, 0)];
    assert_eq!(scaler.decide(&view(0, pool.clone()), SECOND).reason, Reason::Stabilising);
    (scaler, pool)
}

#[test]
fn a_victim_is_cordoned_watched_and_removed() {
    let (mut scaler, mut pool) = idle();
    pool[0].warm = 3;
    let decision = scaler.decide(&view(0, pool.clone()), 60 * SECOND);
    assert_eq!(decision.reason, Reason::Stabilising, "not for long enough");
    let decision = scaler.decide(&view(0, pool.clone()), 61 * SECOND);
    assert_eq!(decision.steps, [Step::Cordon("b".into())], "the one whose cache is worth less");
    pool[1].cordon = Some(CordonedBy::Scaler);
    assert_eq!(scaler.decide(&view(0, pool.clone()), 63 * SECOND).reason, Reason::Settling);
    let decision = scaler.decide(&view(0, pool.clone()), 64 * SECOND);
    let remove = Step::Remove { daemon: "b".into(), from: 2 };
    assert_eq!(decision.steps, std::slice::from_ref(&remove));
    // It is there for some time still, and nobody else goes meanwhile.
    let shrunk = View { replicas: Some(1), ..view(0, pool.clone()) };
    assert_eq!(scaler.decide(&shrunk, 65 * SECOND).steps, []);
    // Had it failed, it would be decided anew.
    scaler.failed(&remove);
    assert_eq!(scaler.decide(&view(0, pool), 66 * SECOND).reason, Reason::Settling);
}

#[test]
fn where_another_one_went_the_victim_is_not_lost() {
    let (mut scaler, mut pool) = idle();
    pool.push(daemon("c", Phase::Ready, 0));
    scaler.decide(&view(0, pool.clone()), 61 * SECOND);
    pool[0].cordon = Some(CordonedBy::Scaler);
    let removed = scaler.decide(&view(0, pool.clone()), 64 * SECOND).steps;
    assert_eq!(removed, [Step::Remove { daemon: "a".into(), from: 3 }]);
    pool.remove(2);
    assert_eq!(scaler.decide(&view(0, pool.clone()), 65 * SECOND).steps, [], "it may still go");
    assert_ne!(scaler.decide(&view(0, pool.clone()), 124 * SECOND).reason, Reason::Surplus);
    let decision = scaler.decide(&view(4, pool), 125 * SECOND);
    assert!(decision.steps.contains(&Step::Uncordon("a".into())), "it is of use again: {decision:?}");
}

#[test]
fn nobody_is_chosen_while_fewer_are_there_than_were_asked_for() {
    let (mut scaler, pool) = idle();
    let asked = View { replicas: Some(3), ..view(0, pool.clone()) };
    assert_eq!(scaler.decide(&asked, 61 * SECOND).steps, [], "with 2 of them nobody would go");
    assert_eq!(scaler.decide(&view(0, pool), 62 * SECOND).reason, Reason::Settling);
}

#[test]
fn who_is_no_use_and_ready_for_the_provisioner_does_not_protect_the_idle() {
    let (mut scaler, mut pool) = idle();
    pool.push(Candidate { empty: false, ..daemon("c", Phase::Away, 1) });
    assert_eq!(scaler.decide(&view(0, pool), 61 * SECOND).steps, [Step::Cordon("a".into())]);
}

#[test]
fn no_stabilisation_is_none() {
    let mut scaler = Autoscaler::new(Policy { stabilisation: Time::ZERO, ..policy() });
    let pool = vec![daemon("a", Phase::Ready, 0), daemon("b", Phase::Ready, 0)];
    assert_eq!(scaler.decide(&view(0, pool), SECOND).reason, Reason::Settling);
}

#[test]
fn who_scales_no_more_leaves_nobody_cordoned() {
    let (mut scaler, mut pool) = idle();
    scaler.decide(&view(0, pool.clone()), 61 * SECOND);
    pool[0].cordon = Some(CordonedBy::Scaler);
    pool[1].cordon = Some(CordonedBy::Operator);
    assert_eq!(scaler.stand_down(&view(0, pool)), [Step::Uncordon("a".into())]);
}

#[test]
fn who_finds_nobody_waits_only_where_somebody_may_come() {
    let coming = |replicas: u32, daemons: Vec<Candidate>| {
        let mut scaler = Autoscaler::new(Policy { min: 0, max: 2, ..policy() });
        scaler.decide(&View { replicas: Some(replicas), ..view(0, daemons) }, SECOND).coming
    };
    let away = |id: &str| daemon(id, Phase::Away, 0);
    assert!(coming(0, vec![]) && coming(1, vec![away("a")]));
    assert!(!coming(2, vec![away("a"), away("b")]), "as many as there may be, and none answers");
    let victim = Candidate { cordon: Some(CordonedBy::Scaler), ..daemon("b", Phase::Ready, 0) };
    assert!(coming(2, vec![away("a"), victim]), "it is given back");
}

#[test]
fn a_victim_that_somebody_comes_back_to_stays() {
    let (mut scaler, mut pool) = idle();
    scaler.decide(&view(0, pool.clone()), 61 * SECOND);
    pool[0].cordon = Some(CordonedBy::Scaler);
    (pool[0].used, pool[0].empty) = (1, false);
    let decision = scaler.decide(&view(0, pool.clone()), 62 * SECOND);
    assert_eq!(decision.steps, [Step::Uncordon("a".into()), Step::Cordon("b".into())]);
    // And one that is needed again is uncordoned before anything is made.
    pool[0].cordon = None;
    pool[1].cordon = Some(CordonedBy::Scaler);
    let decision = scaler.decide(&view(2, pool), 63 * SECOND);
    assert_eq!(decision.steps, [Step::Uncordon("b".into())]);
}

#[test]
fn nobody_is_removed_where_the_provisioner_would_take_another() {
    let (mut scaler, mut pool) = idle();
    pool.push(daemon("c", Phase::Ready, 1));
    pool[2].removal = Removal::NotReady;
    let decision = scaler.decide(&view(0, pool.clone()), 61 * SECOND);
    assert_eq!((decision.steps.as_slice(), decision.reason), ([].as_slice(), Reason::Busy));
    pool[2].removal = Removal::Ready;
    let rollout = View { rollout: true, ..view(0, pool.clone()) };
    assert_eq!(scaler.decide(&rollout, 62 * SECOND).reason, Reason::Rollout);
    assert_eq!(scaler.decide(&view(0, pool), 63 * SECOND).steps, [Step::Cordon("a".into())]);
}

#[test]
fn row_18_stale_or_missing_data_never_scales_down() {
    let (mut scaler, pool) = idle();
    let stale = View { confirmed: Some(SECOND), ..view(0, pool.clone()) };
    assert_eq!(scaler.decide(&stale, 61 * SECOND).reason, Reason::Stale);
    // More daemons harm nobody: the provisioner looks again before it makes them.
    let more = View { waiting: 9, ..stale.clone() };
    assert!(grown(&scaler.clone().decide(&more, 61 * SECOND)).is_some());
    assert_eq!(scaler.decide(&View { confirmed: None, ..stale }, 62 * SECOND).steps, []);
    // And what it missed is not made up for: the window begins anew.
    assert_eq!(scaler.decide(&view(0, pool.clone()), 63 * SECOND).reason, Reason::Stabilising);
    assert_eq!(scaler.decide(&view(0, pool.clone()), 122 * SECOND).reason, Reason::Stabilising);
    assert_eq!(scaler.decide(&view(0, pool), 123 * SECOND).reason, Reason::Settling);
}

#[test]
fn more_work_never_asks_for_fewer_daemons() {
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let phases = [Phase::Ready, Phase::Ready, Phase::Starting, Phase::Away, Phase::Leaving];
        let mut pool = Vec::new();
        for i in 0..random.below(9) {
            let phase = phases[random.below(5) as usize].clone();
            pool.push(daemon(&format!("d{i}"), phase, random.below(3) as u32));
        }
        let mut before = (0, 0);
        for waiting in 0..40 {
            let decision = Autoscaler::new(policy()).decide(&view(waiting, pool.clone()), SECOND);
            let now = (decision.desired, grown(&decision).unwrap_or(0));
            assert!(now >= before && now.0 <= 8, "seed {seed}, {waiting} waiting: {before:?} then {now:?}");
            before = now;
        }
    }
}

/// A cluster of one slot per daemon, as slow and unreliable as real ones.
struct Cluster {
    random: Random,
    now: Time,
    replicas: u32,
    daemons: BTreeMap<DaemonId, (Phase, Option<CordonedBy>, Time)>,
    /// Who works where, until when.
    work: BTreeMap<DaemonId, Time>,
    waiting: u32,
    made: u32,
    changes: Vec<Time>,
}

impl Cluster {
    fn new(seed: u64) -> Self {
        Cluster {
            random: Random::new(seed),
            now: Time::ZERO,
            replicas: 1,
            daemons: BTreeMap::new(),
            work: BTreeMap::new(),
            waiting: 0,
            made: 0,
            changes: Vec::new(),
        }
    }

    fn view(&self) -> View {
        let daemons = self.daemons.iter().map(|(id, (phase, cordon, _))| {
            let used = u32::from(self.work.contains_key(id));
            Candidate { cordon: *cordon, slots: 1, ..daemon(id.as_str(), phase.clone(), used) }
        });
        let waiting = self.waiting;
        View { replicas: Some(self.replicas), ..view(waiting, daemons.collect()) }
    }

    /// A second passes.
    fn pass(&mut self, arrivals: u32) {
        self.now += SECOND;
        self.waiting += arrivals;
        self.work.retain(|_, until| *until > self.now);
        for (phase, _, at) in self.daemons.values_mut() {
            if *phase == Phase::Starting && *at <= self.now {
                *phase = Phase::Ready;
            }
        }
        self.daemons.retain(|_, (phase, _, at)| *phase != Phase::Leaving || *at > self.now);
        while (self.daemons.values().filter(|(phase, _, _)| *phase != Phase::Leaving).count() as u32)
            < self.replicas
        {
            self.made += 1;
            let at = self.now + SECOND * (3 + self.random.below(12) as u32);
            self.daemons.insert(format!("d{:04}", self.made).as_str().into(), (Phase::Starting, None, at));
        }
        let idle: Vec<DaemonId> = (self.daemons.iter())
            .filter(|(id, (phase, cordon, _))| {
                *phase == Phase::Ready && cordon.is_none() && !self.work.contains_key(*id)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in idle {
            if self.waiting > 0 {
                self.waiting -= 1;
                let until = self.now + SECOND * (5 + self.random.below(40) as u32);
                self.work.insert(id, until);
            }
        }
    }

    fn carry_out(&mut self, steps: &[Step], policy: &Policy, seed: u64) {
        for step in steps {
            match step {
                Step::Grow { from, to } => {
                    assert_eq!(*from, self.replicas);
                    assert!(
                        to > from && *to <= policy.max && to - from <= policy.step,
                        "seed {seed}: {step:?}"
                    );
                    self.replicas = *to;
                    self.changes.push(self.now);
                }
                Step::Cordon(id) => self.daemons.get_mut(id).unwrap().1 = Some(CordonedBy::Scaler),
                Step::Uncordon(id) => self.daemons.get_mut(id).unwrap().1 = None,
                Step::Remove { daemon, from } => {
                    assert_eq!(*from, self.replicas);
                    assert!(!self.work.contains_key(daemon), "seed {seed}: {daemon} works, and goes");
                    let one = self.daemons.get_mut(daemon).unwrap();
                    assert_eq!(one.1, Some(CordonedBy::Scaler), "seed {seed}: not cordoned");
                    *one = (Phase::Leaving, None, self.now + 2 * SECOND);
                    self.replicas -= 1;
                    assert!(self.replicas >= policy.min, "seed {seed}: below the minimum");
                    self.changes.push(self.now);
                }
            }
        }
    }
}

#[test]
fn row_35_whatever_the_load_no_work_is_removed_all_is_served_and_a_steady_load_does_not_flap() {
    for seed in 0..300 {
        let mut random = Random::new(seed ^ 0xa5a5);
        let min = random.below(3) as u32;
        let policy = Policy {
            min,
            max: min + 1 + random.below(12) as u32,
            step: 1 + random.below(4) as u32,
            ..policy()
        };
        let mut scaler = Autoscaler::new(policy.clone());
        let mut cluster = Cluster::new(seed);
        let mut step = |cluster: &mut Cluster, arrivals| {
            cluster.pass(arrivals);
            let decision = scaler.decide(&cluster.view(), cluster.now);
            assert!((policy.min..=policy.max).contains(&decision.desired), "seed {seed}");
            cluster.carry_out(&decision.steps, &policy, seed);
        };
        for _ in 0..1500 {
            let burst = if random.below(60) == 0 { random.below(12) as u32 } else { 0 };
            step(&mut cluster, burst);
        }
        // Nobody comes any more: what waits is served, and the pool shrinks to its minimum and stays there.
        let backlog = 10 * cluster.waiting * 45 / policy.max;
        for _ in 0..600 + backlog {
            step(&mut cluster, 0);
        }
        assert_eq!((cluster.waiting, cluster.replicas), (0, policy.min), "seed {seed}");
        let settled = cluster.changes.len();
        for _ in 0..300 {
            step(&mut cluster, 0);
        }
        assert_eq!(cluster.changes.len(), settled, "seed {seed}: it flaps");
    }
}
