//! How many daemons there should be, and which one goes. Pure: a look at the pool and the time go in, steps come out.
//!
//! ```text
//! need    = (slots in use + work that waits and a new daemon could take + spare) / slots of a daemon,
//!           within minimum and maximum
//! up      at once, at most `step` at a time; daemons on their way count, those that do not come up do not
//! down    to the highest need of the last `stabilisation`, one at a time:
//!         cordon a victim with nothing on it → settle → still nothing → remove → see which one went
//! ```
//!
//! What is not known changes nothing: without a fresh word of the provisioner nobody is cordoned or removed, and the
//! window begins anew.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::model::{CordonedBy, DaemonId, Time};

/// Daemons on top of what is needed, so that the next build starts on a daemon that runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Spare {
    /// So many free slots.
    Slots(u32),
    /// Such a share of the slots in use, in percent, rounded up.
    Percent(u32),
}

impl Spare {
    fn slots(self, demand: u32) -> u32 {
        match self {
            Spare::Slots(slots) => slots,
            Spare::Percent(percent) => {
                let share = (u64::from(demand) * u64::from(percent)).div_ceil(100);
                u32::try_from(share).unwrap_or(u32::MAX)
            }
        }
    }
}

/// What is configured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// There are never fewer daemons. With 0 an idle pool is empty, and the first build waits for a daemon to start.
    pub min: u32,
    /// Nor more.
    pub max: u32,
    /// Kept free.
    pub spare: Spare,
    /// How many daemons are added at a time.
    pub step: u32,
    /// For how long fewer daemons must have been enough before one goes.
    pub stabilisation: Time,
    /// How long a cordoned victim is watched before it goes: a request that was on its way has arrived by then.
    pub settle: Time,
    /// How long a daemon may take to start until one has been seen to.
    pub startup: Time,
    /// Slots of a daemon, until one has said how many it has.
    pub slots: u32,
    /// An older picture of the pool is none: nothing is removed.
    pub stale: Time,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            min: 1,
            max: 10,
            spare: Spare::Slots(0),
            step: 4,
            stabilisation: Time::from_secs(300),
            settle: Time::from_secs(5),
            startup: Time::from_secs(120),
            slots: 1,
            stale: Time::from_secs(30),
        }
    }
}

/// How a daemon stands, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// It is on its way.
    Starting,
    /// It is on its way, and something is in it (an image that cannot be pulled, no node with room); what.
    Stuck(String),
    /// It works.
    Ready,
    /// It does not answer, or does not belong here.
    Away,
    /// It is being deleted.
    Leaving,
}

/// One daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its name.
    pub id: DaemonId,
    /// How it stands.
    pub phase: Phase,
    /// Slots in all.
    pub slots: u32,
    /// Slots in use.
    pub used: u32,
    /// Nothing would be lost with it: no lease, no container, no unpushed image, and nobody waits for it.
    pub empty: bool,
    /// Its provisioner would take it before those that work (a pod that is not ready), whoever was chosen.
    pub exposed: bool,
    /// How much its cache is worth: projects that were built there.
    pub warm: usize,
    /// Who cordoned it.
    pub cordon: Option<CordonedBy>,
}

/// The pool at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// When the provisioner last confirmed its picture.
    pub confirmed: Option<Time>,
    /// How many daemons it has been asked for; `None` if it cannot tell.
    pub replicas: Option<u32>,
    /// Whether it is replacing daemons of its own accord (a rollout): then it decides who goes.
    pub rollout: bool,
    /// Work that waits and that a new daemon could take.
    pub waiting: u32,
    /// All daemons.
    pub daemons: Vec<Candidate>,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Ask for more daemons.
    Grow {
        /// How many were asked for until now: another number means that somebody else scales, too.
        from: u32,
        /// How many in all from now on.
        to: u32,
    },
    /// The victim takes no new sessions.
    Cordon(DaemonId),
    /// It is needed after all.
    Uncordon(DaemonId),
    /// The victim goes, and no other.
    Remove {
        /// Which.
        daemon: DaemonId,
        /// How many were asked for until now.
        from: u32,
    },
}

/// Why nothing else is done; a label of a metric, so there are few.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// There are as many as needed.
    Enough,
    /// More are needed.
    Demand,
    /// Those that are needed are on their way.
    Starting,
    /// More are needed, and there may be no more.
    Maximum,
    /// More are needed, and those that were asked for do not come up.
    Stuck,
    /// Fewer are needed, but not for long enough.
    Stabilising,
    /// Fewer are needed, and each has something on it.
    Busy,
    /// A victim is watched before it goes.
    Settling,
    /// One that is not needed goes.
    Surplus,
    /// The provisioner is replacing daemons.
    Rollout,
    /// The picture of the pool is missing or too old.
    Stale,
}

impl Reason {
    /// All of them, for a metric that has a series each.
    pub const ALL: [Reason; 11] = [
        Reason::Enough,
        Reason::Demand,
        Reason::Starting,
        Reason::Maximum,
        Reason::Stuck,
        Reason::Stabilising,
        Reason::Busy,
        Reason::Settling,
        Reason::Surplus,
        Reason::Rollout,
        Reason::Stale,
    ];

    /// The value of the label.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Enough => "enough",
            Reason::Demand => "demand",
            Reason::Starting => "starting",
            Reason::Maximum => "maximum",
            Reason::Stuck => "stuck",
            Reason::Stabilising => "stabilising",
            Reason::Busy => "busy",
            Reason::Settling => "settling",
            Reason::Surplus => "surplus",
            Reason::Rollout => "rollout",
            Reason::Stale => "stale",
        }
    }
}

/// What comes of one look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// How many daemons there should be now, for those who scale by something else.
    pub desired: u32,
    /// What to do, in this order.
    pub steps: Vec<Step>,
    /// Why that and no more.
    pub reason: Reason,
    /// Whether work that finds no daemon should wait: one is on its way, or will be asked for.
    pub coming: bool,
    /// Why daemons that were asked for do not come up.
    pub stuck: Vec<String>,
}

/// The victim that is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Victim {
    daemon: DaemonId,
    since: Time,
}

/// The needs of the past and when each was seen last, as a queue in which each is higher than all that follow.
#[derive(Debug, Clone, Default)]
struct Window {
    began: Option<Time>,
    needs: VecDeque<(Time, u32)>,
}

impl Window {
    fn push(&mut self, now: Time, need: u32, length: Time) {
        self.began.get_or_insert(now);
        while self.needs.back().is_some_and(|(_, last)| *last <= need) {
            self.needs.pop_back();
        }
        self.needs.push_back((now, need));
        while self.needs.front().is_some_and(|(at, _)| *at + length <= now) {
            self.needs.pop_front();
        }
    }

    /// The highest need of the whole window, if it has been watched for so long.
    fn highest(&self, now: Time, length: Time) -> Option<u32> {
        let whole = self.began.is_some_and(|began| began + length <= now);
        self.needs.front().filter(|_| whole).map(|(_, need)| *need)
    }
}

/// How much a new start weighs against those before.
const WEIGHT: f64 = 0.3;
/// A daemon that takes so many times as long as others is not on its way any more.
const OVERDUE: f64 = 3.0;

/// Decides, and remembers what it has to.
#[derive(Debug, Clone)]
pub struct Autoscaler {
    policy: Policy,
    window: Window,
    victim: Option<Victim>,
    /// When each daemon that has not come up yet was first seen.
    starting: BTreeMap<DaemonId, Time>,
    /// Since when daemons that were asked for are not even seen.
    unseen: Option<Time>,
    /// How long a daemon takes to start here, smoothed.
    startup: Option<Time>,
    /// Slots of a daemon, as last seen.
    slots: Option<u32>,
    /// Who was removed, and has not gone yet.
    removed: Option<DaemonId>,
}

/// What is there and what is on its way, counted.
#[derive(Debug, Default)]
struct Count {
    /// Those that take work now, or will.
    have: u32,
    /// Those of them that have come up.
    ready: u32,
    /// Those that were asked for and do not take work.
    lame: u32,
    /// Those that have not come up for so long that nobody waits for them.
    stuck: u32,
    /// What is wrong with those that do not come up, or not yet.
    faults: Vec<String>,
}

impl Autoscaler {
    /// One that has seen nothing.
    pub fn new(policy: Policy) -> Self {
        Autoscaler {
            policy,
            window: Window::default(),
            victim: None,
            starting: BTreeMap::new(),
            unseen: None,
            startup: None,
            slots: None,
            removed: None,
        }
    }

    /// Takes another policy.
    pub fn configure(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// How long a daemon takes to start here, once one has.
    pub fn startup(&self) -> Option<Time> {
        self.startup
    }

    /// Looks at the pool.
    pub fn decide(&mut self, view: &View, now: Time) -> Decision {
        self.learn(view, now);
        let count = self.count(view, now);
        let need = self.need(view);
        let fresh = view.confirmed.is_some_and(|at| at + self.policy.stale >= now);
        let mut decision = Decision {
            desired: need,
            steps: Vec::new(),
            reason: Reason::Enough,
            coming: self.policy.max > 0 && view.replicas.is_some() && (count.have > 0 || count.stuck == 0),
            stuck: count.faults.clone(),
        };
        let Some(replicas) = view.replicas.filter(|_| fresh) else {
            self.window = Window::default();
            self.victim = None;
            decision.reason = Reason::Stale;
            return decision;
        };
        self.window.push(now, need, self.policy.stabilisation);
        if count.have < need {
            self.grow(view, &count, need, replicas, &mut decision);
        } else if need < count.have + count.lame {
            self.shrink(view, &count, replicas, now, &mut decision);
        } else {
            self.release_victim(view, &mut decision);
        }
        if decision.reason == Reason::Enough && count.have > count.ready && count.ready < need {
            decision.reason = Reason::Starting;
        }
        decision
    }

    /// Takes in how many slots daemons have, and how long they take to start.
    fn learn(&mut self, view: &View, now: Time) {
        let ready = view.daemons.iter().filter(|d| d.phase == Phase::Ready);
        let (sum, number) = ready.clone().fold((0, 0), |(sum, number), d| (sum + d.slots, number + 1));
        if let Some(mean) = sum.checked_div(number) {
            self.slots = Some(mean.max(1));
        }
        for d in ready {
            if let Some(since) = self.starting.remove(&d.id) {
                let took = now.saturating_sub(since);
                self.startup = Some(match self.startup {
                    Some(before) => before.mul_f64(1.0 - WEIGHT) + took.mul_f64(WEIGHT),
                    None => took,
                });
            }
        }
        let on_their_way = |d: &&Candidate| matches!(d.phase, Phase::Starting | Phase::Stuck(_));
        let there: Vec<&DaemonId> = view.daemons.iter().filter(on_their_way).map(|d| &d.id).collect();
        self.starting.retain(|id, _| there.contains(&id));
        for id in there {
            self.starting.entry(id.clone()).or_insert(now);
        }
        if self
            .removed
            .as_ref()
            .is_some_and(|id| view.daemons.iter().all(|d| d.id != *id || d.phase == Phase::Leaving))
        {
            self.removed = None;
        }
    }

    /// How many daemons the work needs.
    fn need(&self, view: &View) -> u32 {
        let at_work = |d: &&Candidate| matches!(d.phase, Phase::Starting | Phase::Ready);
        let used: u32 = view.daemons.iter().filter(at_work).map(|d| d.used).sum();
        let demand = used.saturating_add(view.waiting);
        let slots = demand.saturating_add(self.policy.spare.slots(demand));
        let per = self.slots.unwrap_or(self.policy.slots).max(1);
        slots.div_ceil(per).clamp(self.policy.min, self.policy.max.max(self.policy.min))
    }

    /// After so long a daemon that starts is given up.
    fn overdue(&self) -> Time {
        self.startup.map_or(self.policy.startup, |took| took.mul_f64(OVERDUE).max(self.policy.startup))
    }

    fn count(&mut self, view: &View, now: Time) -> Count {
        let mut count = Count::default();
        let (overdue, mut there) = (self.overdue(), 0);
        for d in view.daemons.iter().filter(|d| d.phase != Phase::Leaving) {
            there += 1;
            let late = self.starting.get(&d.id).is_some_and(|since| *since + overdue <= now);
            match &d.phase {
                Phase::Starting | Phase::Stuck(_) => {
                    match &d.phase {
                        Phase::Stuck(why) => count.faults.push(format!("{}: {why}", d.id)),
                        _ if late => {
                            let fault = format!("{} has not started within {} s", d.id, seconds(overdue));
                            count.faults.push(fault);
                        }
                        _ => {}
                    }
                    if late { count.stuck += 1 } else { count.have += 1 }
                }
                // The scaler's own cordon is lifted when it is needed.
                Phase::Ready if d.cordon != Some(CordonedBy::Operator) => {
                    count.have += 1;
                    count.ready += 1;
                }
                Phase::Ready | Phase::Away | Phase::Leaving => count.lame += 1,
            }
        }
        let unseen = view.replicas.unwrap_or(0).saturating_sub(there);
        if unseen == 0 {
            self.unseen = None;
        } else if *self.unseen.get_or_insert(now) + overdue > now {
            count.have += unseen;
        } else {
            let what =
                if unseen == 1 { "a daemon that was".into() } else { format!("{unseen} daemons that were") };
            count.faults.push(format!("{what} asked for did not appear within {} s", seconds(overdue)));
            count.stuck += unseen;
        }
        count.lame += count.stuck;
        count
    }

    fn grow(&mut self, view: &View, count: &Count, need: u32, replicas: u32, decision: &mut Decision) {
        self.release_victim(view, decision);
        // Nothing shows that another one would come up where none does; where some do, it is worth as many again.
        let in_vain = if count.ready > 0 { count.stuck.min(self.policy.step) } else { 0 };
        let others = count.lame - count.stuck;
        let most = (need + others + in_vain).min(self.policy.max);
        let to = replicas.saturating_add((need - count.have).min(self.policy.step)).min(most);
        // None has come up, and some have been given up: more of them would only be more of the same.
        let hopeless = count.ready == 0 && count.stuck > 0;
        if to > replicas && !hopeless {
            decision.steps.push(Step::Grow { from: replicas, to });
            decision.reason = Reason::Demand;
        } else if count.stuck > 0 {
            decision.reason = Reason::Stuck;
        } else {
            decision.reason = Reason::Maximum;
        }
    }

    /// The victim is needed.
    fn release_victim(&mut self, view: &View, decision: &mut Decision) {
        self.victim = None;
        // Also of a scaler before this one, which was restarted in between.
        for d in view.daemons.iter().filter(|d| d.cordon == Some(CordonedBy::Scaler)) {
            if self.removed.as_ref() != Some(&d.id) && d.phase != Phase::Leaving {
                decision.steps.push(Step::Uncordon(d.id.clone()));
            }
        }
    }

    fn shrink(&mut self, view: &View, count: &Count, replicas: u32, now: Time, decision: &mut Decision) {
        let Some(highest) = self.window.highest(now, self.policy.stabilisation) else {
            decision.reason = Reason::Stabilising;
            return;
        };
        if view.rollout {
            self.release_victim(view, decision);
            decision.reason = Reason::Rollout;
            return;
        }
        if highest >= count.have + count.lame || replicas <= highest.max(self.policy.min) {
            self.release_victim(view, decision);
            decision.reason = Reason::Stabilising;
            return;
        }
        // The one before has not gone yet: until then it is not known what is left.
        if self.removed.is_some() {
            decision.reason = Reason::Surplus;
            return;
        }
        if let Some(victim) = self.victim.clone() {
            let still = view.daemons.iter().find(|d| d.id == victim.daemon);
            match still {
                Some(d) if d.empty && d.cordon == Some(CordonedBy::Scaler) && goes_first(d, view) => {
                    if victim.since + self.policy.settle <= now {
                        self.victim = None;
                        self.removed = Some(victim.daemon.clone());
                        decision.steps.push(Step::Remove { daemon: victim.daemon, from: replicas });
                        decision.reason = Reason::Surplus;
                    } else {
                        decision.reason = Reason::Settling;
                    }
                    return;
                }
                // Somebody came back to it, or it has gone.
                _ => self.release_victim(view, decision),
            }
        }
        let spare_ready = count.have > highest;
        let victim = view
            .daemons
            .iter()
            .filter(|d| d.empty && d.cordon != Some(CordonedBy::Operator) && goes_first(d, view))
            // One that works goes only if enough are left that do.
            .filter(|d| d.phase != Phase::Ready || spare_ready)
            .min_by(|a, b| (rank(a), a.warm, &a.id).cmp(&(rank(b), b.warm, &b.id)));
        match victim {
            Some(d) => {
                self.victim = Some(Victim { daemon: d.id.clone(), since: now });
                if d.cordon.is_none() {
                    decision.steps.push(Step::Cordon(d.id.clone()));
                }
                decision.reason = Reason::Settling;
            }
            None => decision.reason = Reason::Busy,
        }
    }

    /// What was asked of the provisioner has failed: it is decided anew.
    pub fn failed(&mut self, step: &Step) {
        if let Step::Remove { daemon, .. } = step
            && self.removed.as_ref() == Some(daemon)
        {
            self.removed = None;
        }
    }
}

/// In which order daemons go: those that are no use first.
fn rank(d: &Candidate) -> u8 {
    match d.phase {
        Phase::Stuck(_) => 0,
        Phase::Starting => 1,
        _ if d.exposed => 2,
        Phase::Away => 3,
        Phase::Ready | Phase::Leaving => 4,
    }
}

/// Whether a Deployment that gets smaller would take this one, and none that comes before it: pods that are not
/// assigned, pending or not ready go first, whatever they cost (Kubernetes, `ActivePodsWithRanks`).
fn goes_first(d: &Candidate, view: &View) -> bool {
    d.phase != Phase::Leaving
        && view.daemons.iter().all(|other| rank(other) >= rank(d) || other.phase == Phase::Leaving)
}

/// A duration in whole seconds, for a message.
pub fn seconds(time: Duration) -> u64 {
    time.as_secs_f64().round() as u64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::balancer::Random;
    use super::*;

    const SECOND: Time = Time::from_secs(1);

    fn policy() -> Policy {
        Policy {
            min: 1,
            max: 8,
            step: 2,
            stabilisation: 60 * SECOND,
            settle: 3 * SECOND,
            ..Policy::default()
        }
    }

    fn daemon(id: &str, phase: Phase, used: u32) -> Candidate {
        Candidate {
            id: id.into(),
            phase,
            slots: 2,
            used,
            empty: used == 0,
            exposed: false,
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
        assert_eq!((grown(&decision), decision.reason), (None, Reason::Enough), "as many as there may be");
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
            !decision.coming
                && decision.stuck == ["2 daemons that were asked for did not appear within 120 s"]
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
        pool[2].exposed = true;
        let decision = scaler.decide(&view(0, pool.clone()), 61 * SECOND);
        assert_eq!((decision.steps.as_slice(), decision.reason), ([].as_slice(), Reason::Busy));
        pool[2].exposed = false;
        let rollout = View { rollout: true, ..view(0, pool.clone()) };
        assert_eq!(scaler.decide(&rollout, 62 * SECOND).reason, Reason::Rollout);
        assert_eq!(scaler.decide(&view(0, pool), 63 * SECOND).steps, [Step::Cordon("a".into())]);
    }

    #[test]
    fn row_18_stale_or_missing_data_never_scales_down() {
        let (mut scaler, pool) = idle();
        let stale = View { confirmed: Some(SECOND), ..view(0, pool.clone()) };
        assert_eq!(scaler.decide(&stale, 61 * SECOND).reason, Reason::Stale);
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
                assert!(
                    now >= before && now.0 <= 8,
                    "seed {seed}, {waiting} waiting: {before:?} then {now:?}"
                );
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
                self.daemons
                    .insert(format!("d{:04}", self.made).as_str().into(), (Phase::Starting, None, at));
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
}
