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
//! What is not known takes nobody away: without a fresh word of the provisioner nobody is cordoned or removed, and the
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
            stale: Time::from_secs(15),
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

/// What a Deployment that gets smaller looks at before the cost, the first to go first (`ActivePodsWithRanks`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Removal {
    /// A pod without a node.
    Unassigned,
    /// One that does not run yet.
    Pending,
    /// One that is not ready.
    NotReady,
    /// Among these it is the cost that decides.
    #[default]
    Ready,
}

/// What the provisioner knows of a daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Made {
    /// When it would take it.
    pub removal: Removal,
    /// What keeps it from coming up.
    pub fault: Option<String>,
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
    /// When its provisioner would take it, whoever was chosen.
    pub removal: Removal,
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
        while self.needs.front().is_some_and(|(at, _)| *at + length < now) {
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
/// One that was removed has begun to go by then, or another one went instead of it.
const GOING: Time = Time::from_secs(60);
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
    /// When it looked first.
    began: Option<Time>,
    /// How long a daemon takes to start here, smoothed.
    startup: Option<Time>,
    /// Slots of a daemon, as last seen.
    slots: Option<u32>,
    /// Who was removed when, and has not gone yet.
    removed: Option<(DaemonId, Time)>,
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

impl Count {
    /// None has come up, and some have been given up: more of them would only be more of the same.
    fn is_hopeless(&self) -> bool {
        self.ready == 0 && self.stuck > 0
    }
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
            began: None,
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
        let began = *self.began.get_or_insert(now);
        // Nothing is known yet of what may be there.
        let blind = view.confirmed.is_none() && now < began + self.policy.startup;
        let count = self.count(view, now);
        let need = self.need(view);
        let fresh = view.confirmed.is_some_and(|at| at + self.policy.stale >= now);
        let mut decision = Decision {
            desired: need,
            steps: Vec::new(),
            reason: Reason::Enough,
            coming: blind || self.is_coming(view, &count),
            stuck: count.faults.clone(),
        };
        let Some(replicas) = view.replicas else {
            decision.reason = Reason::Stale;
            return decision;
        };
        if fresh {
            self.window.push(now, need, self.policy.stabilisation);
        } else {
            // What was missed is not made up for.
            self.window = Window::default();
        }
        if count.have < need {
            self.grow(view, &count, need, replicas, &mut decision);
        } else if !fresh {
            self.victim = None;
            decision.reason = Reason::Stale;
        } else if need < count.have + count.lame {
            self.shrink(view, &count, replicas, now, &mut decision);
        } else {
            self.release_victim(view, &mut decision);
        }
        if decision.reason == Reason::Enough && count.have > count.ready && count.ready < need {
            decision.reason = Reason::Starting;
        }
        if decision.reason == Reason::Enough && self.wanted(view) > need {
            // As many as there may be, and work that they have no slot for.
            decision.reason = Reason::Maximum;
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
        if let Some((id, since)) = &self.removed {
            let there = view.daemons.iter().any(|d| d.id == *id && d.phase != Phase::Leaving);
            if !there || *since + GOING <= now {
                self.removed = None;
            }
        }
    }

    /// How many daemons the work needs.
    fn need(&self, view: &View) -> u32 {
        self.wanted(view).clamp(self.policy.min, self.policy.max.max(self.policy.min))
    }

    /// As many as would be needed if there were no limits.
    fn wanted(&self, view: &View) -> u32 {
        let at_work = |d: &&Candidate| matches!(d.phase, Phase::Starting | Phase::Ready);
        let used: u32 = view.daemons.iter().filter(at_work).map(|d| d.used).sum();
        let demand = used.saturating_add(view.waiting);
        let slots = demand.saturating_add(self.policy.spare.slots(demand));
        let per = self.slots.unwrap_or(self.policy.slots).max(1);
        slots.div_ceil(per)
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

    /// Whether a daemon is on its way, would be asked for, or would be given back.
    fn is_coming(&self, view: &View, count: &Count) -> bool {
        let mut revocable = view.daemons.iter().filter(|d| d.cordon == Some(CordonedBy::Scaler));
        let room = view.replicas.is_some_and(|replicas| replicas < self.policy.max);
        count.have > count.ready || room && !count.is_hopeless() || revocable.any(|d| d.phase == Phase::Ready)
    }

    fn grow(&mut self, view: &View, count: &Count, need: u32, replicas: u32, decision: &mut Decision) {
        self.release_victim(view, decision);
        // Nothing shows that another one would come up where none does; where some do, it is worth as many again.
        let in_vain = if count.ready > 0 { count.stuck.min(self.policy.step) } else { 0 };
        let others = count.lame - count.stuck;
        let most = (need + others + in_vain).min(self.policy.max);
        let to = replicas.saturating_add((need - count.have).min(self.policy.step)).min(most);
        if to > replicas && !count.is_hopeless() {
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
            if self.removed.as_ref().is_none_or(|(id, _)| *id != d.id) && d.phase != Phase::Leaving {
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
        // Fewer would be made, and nobody would go.
        if replicas > there(view) {
            decision.reason = Reason::Starting;
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
                        self.removed = Some((victim.daemon.clone(), now));
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
        let spare_ready = count.ready > highest;
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

    /// Somebody else scales: whoever was cordoned for it takes sessions again.
    pub fn stand_down(&mut self, view: &View) -> Vec<Step> {
        (self.victim, self.removed) = (None, None);
        let cordoned = view.daemons.iter().filter(|d| d.cordon == Some(CordonedBy::Scaler));
        cordoned.map(|d| Step::Uncordon(d.id.clone())).collect()
    }

    /// What was asked of the provisioner has failed: it is decided anew.
    pub fn failed(&mut self, step: &Step) {
        if let Step::Remove { daemon, .. } = step
            && self.removed.as_ref().is_some_and(|(id, _)| id == daemon)
        {
            self.removed = None;
        }
    }
}

/// How many daemons there are that stay.
fn there(view: &View) -> u32 {
    let staying = view.daemons.iter().filter(|d| d.phase != Phase::Leaving).count();
    u32::try_from(staying).unwrap_or(u32::MAX)
}

/// In which order daemons go where the provisioner leaves the choice: those that are no use first.
fn rank(d: &Candidate) -> u8 {
    match d.phase {
        Phase::Stuck(_) => 0,
        Phase::Starting => 1,
        Phase::Away => 2,
        Phase::Ready | Phase::Leaving => 3,
    }
}

/// Whether a Deployment that gets smaller takes this one if it is the cheapest.
fn goes_first(d: &Candidate, view: &View) -> bool {
    let mut staying = view.daemons.iter().filter(|other| other.phase != Phase::Leaving);
    d.phase != Phase::Leaving && staying.all(|other| other.removal >= d.removal)
}

/// A duration in whole seconds, for a message.
pub fn seconds(time: Duration) -> u64 {
    time.as_secs_f64().round() as u64
}

#[cfg(test)]
mod tests;
