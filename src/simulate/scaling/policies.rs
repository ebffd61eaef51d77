//! Who decides how many daemons there are: the autoscaler, and what others do.

use std::collections::VecDeque;

use super::day::{Daemon, Day, World, name};
use crate::engine::autoscaler::{Autoscaler, Candidate, Phase, Policy, Removal, Spare, Step, View};
use crate::engine::model::Time;

/// Something to be done about the number of daemons.
#[derive(Debug, Clone)]
pub(super) enum Act {
    /// A step of the autoscaler's.
    Step(Step),
    /// So many, and more come.
    Grow(u32),
    /// So many, and nobody is chosen to go.
    Shrink(u32),
}

/// Looks each second.
pub(super) trait Scaler {
    fn look(&mut self, world: &World) -> Vec<Act>;
}

type Make = Box<dyn Fn(u64) -> Box<dyn Scaler>>;

/// All of them by name.
pub(super) fn all(day: &Day) -> Vec<(String, Make)> {
    let ours = |spare: &'static str| -> Make {
        let day = day.clone();
        Box::new(move |_| Box::new(Ours::new(&day, spare)))
    };
    let replica = |min: u32, sees: Sees| -> Make {
        let max = day.max;
        Box::new(move |_| Box::new(Replicas::new(min, max, sees)))
    };
    let (most, half) = (day.max, day.max / 2);
    vec![
        (format!("{}, from zero", super::OURS), ours("0")),
        (format!("{}, spare 2", super::OURS), ours("2")),
        (format!("{}, spare 25%", super::OURS), ours("25%")),
        ("HPA, 70 % of the slots in use".to_string(), replica(1, Sees::Usage)),
        ("KEDA, builds that wait or run, from zero".to_string(), replica(0, Sees::Queue)),
        (format!("fixed, {most} daemons"), Box::new(move |_| Box::new(Fixed(most)))),
        (format!("fixed, {half} daemons"), Box::new(move |_| Box::new(Fixed(half)))),
    ]
}

/// The pool's own.
#[derive(Clone)]
pub(super) struct Ours(Autoscaler);

impl Ours {
    /// With its defaults, from zero, and this spare.
    pub fn new(day: &Day, spare: &str) -> Ours {
        let spare = match spare.strip_suffix('%') {
            Some(percent) => Spare::Percent(percent.parse().unwrap_or(0)),
            None => Spare::Slots(spare.parse().unwrap_or(0)),
        };
        Ours(Autoscaler::new(Policy { min: 0, max: day.max, spare, slots: day.slots, ..Policy::default() }))
    }

    /// How many it wants with so much more work that waits.
    #[cfg(test)]
    pub fn desired(mut self, world: &World, more: u32) -> u32 {
        let mut view = view(world);
        view.waiting += more;
        self.0.decide(&view, Time::from_secs(u64::from(world.now))).desired
    }
}

impl Scaler for Ours {
    fn look(&mut self, world: &World) -> Vec<Act> {
        let decision = self.0.decide(&view(world), Time::from_secs(u64::from(world.now)));
        decision.steps.into_iter().map(Act::Step).collect()
    }
}

fn view(world: &World) -> View {
    let candidate = |d: &Daemon| Candidate {
        id: name(d.number).as_str().into(),
        phase: if d.ready <= world.now { Phase::Ready } else { Phase::Starting },
        slots: world.day.slots,
        used: d.running.len() as u32,
        // Sessions keep their daemon for a while.
        empty: d.running.is_empty() && d.busy + world.day.grace <= world.now || d.ready > world.now,
        removal: if d.ready <= world.now { Removal::Ready } else { Removal::NotReady },
        warm: 0,
        cordon: d.cordon,
    };
    View {
        confirmed: Some(Time::from_secs(u64::from(world.now))),
        replicas: Some(world.there()),
        rollout: false,
        waiting: world.waiting.len() as u32,
        daemons: world.daemons.iter().map(candidate).collect(),
    }
}

/// What a replica autoscaler goes by.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sees {
    /// The share of slots in use, which is what the processors' load is at best.
    Usage,
    /// Builds that wait or run.
    Queue,
}

/// How often the Horizontal Pod Autoscaler looks (`--horizontal-pod-autoscaler-sync-period`).
const PERIOD: u32 = 15;
/// For how long it remembers what was recommended before it makes fewer (`stabilizationWindowSeconds`).
const WINDOW: u32 = 300;
/// What it takes for no difference (`--horizontal-pod-autoscaler-tolerance`).
const TOLERANCE: f64 = 0.1;
/// The share of slots that is aimed at.
const TARGET: f64 = 0.7;
/// How often KEDA looks whether there is anything at all (`pollingInterval`).
const POLLING: u32 = 30;
/// For how long there must be nothing before the last one goes (`cooldownPeriod`).
const COOLDOWN: u32 = 300;

/// The Horizontal Pod Autoscaler, with KEDA on top where there may be none.
pub(super) struct Replicas {
    min: u32,
    max: u32,
    sees: Sees,
    recommended: VecDeque<(u32, u32)>,
    active: u32,
}

impl Replicas {
    fn new(min: u32, max: u32, sees: Sees) -> Self {
        Replicas { min, max, sees, recommended: VecDeque::new(), active: 0 }
    }

    /// How many pods there should be by the formula of the manual: pods × metric / target.
    fn recommend(&self, world: &World) -> u32 {
        let there = world.there().max(1);
        let slots = f64::from(world.day.slots);
        let ratio = match self.sees {
            Sees::Usage => {
                let ready = world.daemons.iter().filter(|d| d.ready <= world.now).count() as f64;
                // Pods that are not ready count as if they used nothing, when more are made.
                f64::from(world.running()) / slots / ready.max(1.0) / TARGET
            }
            Sees::Queue => f64::from(world.running() + world.waiting.len() as u32) / slots / f64::from(there),
        };
        if (ratio - 1.0).abs() <= TOLERANCE { there } else { (f64::from(there) * ratio).ceil() as u32 }
    }
}

impl Scaler for Replicas {
    fn look(&mut self, world: &World) -> Vec<Act> {
        let (now, there) = (world.now, world.there());
        let work = world.running() > 0 || !world.waiting.is_empty();
        if work {
            self.active = now;
        }
        if there < self.min.max(u32::from(work && now.is_multiple_of(POLLING))) {
            return vec![Act::Grow(self.min.max(1))];
        }
        if there == 0 {
            return Vec::new();
        }
        if self.min == 0 && now.is_multiple_of(POLLING) && self.active + COOLDOWN <= now {
            self.recommended.clear();
            return vec![Act::Shrink(0)];
        }
        if !now.is_multiple_of(PERIOD) {
            return Vec::new();
        }
        // Up by the double or by four, whichever is more.
        let most = self.max.min((2 * there).max(there + 4));
        let wanted = self.recommend(world).clamp(self.min.max(1), most);
        self.recommended.push_back((now, wanted));
        self.recommended.retain(|(at, _)| at + WINDOW >= now);
        let highest = self.recommended.iter().map(|(_, n)| *n).max().unwrap_or(wanted);
        match wanted {
            more if more > there => vec![Act::Grow(more)],
            _ if highest < there => vec![Act::Shrink(highest)],
            _ => Vec::new(),
        }
    }
}

/// Always as many.
struct Fixed(u32);

impl Scaler for Fixed {
    fn look(&mut self, world: &World) -> Vec<Act> {
        if world.there() < self.0 { vec![Act::Grow(self.0)] } else { Vec::new() }
    }
}
