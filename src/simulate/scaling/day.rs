//! The day, second by second: builds that arrive, daemons that start, work and end.

use std::collections::VecDeque;

use super::policies::{Act, Scaler};
use crate::engine::autoscaler::Step;
use crate::engine::model::CordonedBy;
use crate::simulate::workload::Random;

/// A day of a CI system. Times are in seconds unless they say otherwise.
#[derive(Debug, Clone)]
pub struct Day {
    /// The hour at which it begins.
    pub begins: u32,
    /// How many hours of it there are.
    pub hours: u32,
    /// Builds of a whole day.
    pub builds: u32,
    /// Builds of the nightly batch, at two o'clock, on top.
    pub batch: u32,
    /// Instead of all that: so many builds run at any time, each followed by the next.
    pub steady: Option<u32>,
    /// How long a build takes in the mean: four in five are short, one in five long.
    pub build: f64,
    /// Builds at a time on one daemon.
    pub slots: u32,
    /// The greatest number of daemons.
    pub max: u32,
    /// How long a daemon takes to start: between this and that, a node for it included.
    pub start: (u32, u32),
    /// How long a session keeps its daemon after its last build.
    pub grace: u32,
}

impl Default for Day {
    fn default() -> Self {
        Day {
            begins: 0,
            hours: 24,
            builds: 1500,
            batch: 40,
            steady: None,
            build: 240.0,
            slots: 2,
            max: 16,
            start: (15, 60),
            grace: 300,
        }
    }
}

/// How busy each hour is, in parts of the busiest.
const PROFILE: [f64; 24] = [
    0.08, 0.06, 0.05, 0.05, 0.05, 0.06, 0.10, 0.25, 0.55, 0.85, 1.00, 0.95, 0.70, 0.80, 1.00, 0.95, 0.85,
    0.65, 0.40, 0.30, 0.25, 0.20, 0.15, 0.10,
];
/// When the nightly batch arrives.
const BATCH: u32 = 2 * 3600;
/// Every so many seconds in the mean somebody pushes many branches at once; so many builds.
const BURST: (f64, usize) = (2400.0, 12);

impl Day {
    /// When each build arrives, and how long it takes.
    fn arrivals(&self, random: &mut Random) -> Vec<(u32, u32)> {
        let per_second = f64::from(self.builds) / (PROFILE.iter().sum::<f64>() * 3600.0);
        let mut arrivals = Vec::new();
        for second in 0..self.hours * 3600 {
            let busy = PROFILE[((self.begins + second / 3600) % 24) as usize];
            let mut now = usize::from(random.unit() < per_second * busy);
            if random.unit() < busy / BURST.0 {
                now += 2 + random.below(BURST.1 - 1);
            }
            if (self.begins * 3600 + second) % 86_400 == BATCH {
                now += self.batch as usize;
            }
            arrivals.extend((0..now).map(|_| (second, self.length(random))));
        }
        arrivals
    }

    fn length(&self, random: &mut Random) -> u32 {
        // One in five takes three times the mean, the others half of it.
        let scale = if random.below(5) == 0 { 3.0 } else { 0.5 };
        (self.build * scale * (0.5 + random.unit())).round().max(5.0) as u32
    }
}

/// A daemon.
#[derive(Debug, Clone)]
pub(super) struct Daemon {
    /// Its number: no two have the same.
    pub number: u32,
    /// When it has started.
    pub ready: u32,
    /// Its builds: which, and when each ends.
    pub running: Vec<(usize, u32)>,
    /// When it had its last build.
    pub busy: u32,
    /// Who lets it take no new ones.
    pub cordon: Option<CordonedBy>,
}

/// All of it at one moment.
pub(super) struct World {
    /// The day.
    pub day: Day,
    /// Now.
    pub now: u32,
    /// The daemons.
    pub daemons: Vec<Daemon>,
    /// Builds that wait, and since when.
    pub waiting: VecDeque<(usize, u32)>,
    /// For whoever chooses nobody.
    pub random: Random,
    lengths: Vec<u32>,
    started: Vec<bool>,
    made: u32,
    waits: Vec<u32>,
    idle: u64,
    seconds: u64,
    killed: u32,
    changes: u32,
    late: u32,
}

/// What came of a day.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Outcome {
    /// The median wait of a build until it starts first.
    pub median: f64,
    /// What one in a hundred exceeds.
    pub p99: f64,
    /// Hours of daemons without a build.
    pub idle: f64,
    /// Hours of daemons.
    pub hours: f64,
    /// Builds that died.
    pub killed: u32,
    /// Changes of the number of daemons.
    pub changes: u32,
    /// Those after the first hour.
    pub late: u32,
}

impl World {
    /// How many daemons there are.
    pub fn there(&self) -> u32 {
        u32::try_from(self.daemons.len()).unwrap_or(u32::MAX)
    }

    /// How many builds run.
    pub fn running(&self) -> u32 {
        self.daemons.iter().map(|d| d.running.len() as u32).sum()
    }

    /// Runs a scaler through a day, and until the last build has ended.
    pub fn run(day: &Day, seed: u64, scaler: &mut dyn Scaler) -> Outcome {
        let mut random = Random::new(seed);
        let arrivals = match day.steady {
            Some(n) => (0..n).map(|_| (0, day.length(&mut random))).collect(),
            None => day.arrivals(&mut random),
        };
        let mut world = World {
            day: day.clone(),
            now: 0,
            daemons: Vec::new(),
            waiting: VecDeque::new(),
            random: Random::new(seed + 1),
            lengths: arrivals.iter().map(|(_, length)| *length).collect(),
            started: vec![false; arrivals.len()],
            made: 0,
            waits: Vec::new(),
            idle: 0,
            seconds: 0,
            killed: 0,
            changes: 0,
            late: 0,
        };
        let end = day.hours * 3600;
        let mut next = 0;
        while world.now < end || next < arrivals.len() || !world.waiting.is_empty() || world.running() > 0 {
            while let Some((at, _)) = arrivals.get(next).filter(|(at, _)| *at <= world.now) {
                world.waiting.push_back((next, *at));
                next += 1;
            }
            world.pass(end);
            let acts = scaler.look(&world);
            acts.into_iter().for_each(|act| world.carry_out(act));
            world.now += 1;
            assert!(world.now < end + 86_400, "the builds of this day are never done");
        }
        world.outcome()
    }

    /// A second passes.
    fn pass(&mut self, end: u32) {
        let mut ended = 0;
        for d in &mut self.daemons {
            let before = d.running.len();
            d.running.retain(|(_, ends)| *ends > self.now);
            ended += before - d.running.len();
            if before > 0 {
                d.busy = self.now;
            }
        }
        if self.day.steady.is_some() && self.now < end {
            for _ in 0..ended {
                let length = self.day.length(&mut self.random);
                self.lengths.push(length);
                self.started.push(false);
                self.waiting.push_back((self.lengths.len() - 1, self.now));
            }
        }
        while let Some((build, since)) = self.waiting.front().copied() {
            let (now, slots) = (self.now, self.day.slots as usize);
            let room = |d: &&mut Daemon| d.ready <= now && d.cordon.is_none() && d.running.len() < slots;
            let Some(d) = self.daemons.iter_mut().filter(room).min_by_key(|d| d.running.len()) else { break };
            d.running.push((build, now + self.lengths[build]));
            d.busy = now;
            self.waiting.pop_front();
            if !std::mem::replace(&mut self.started[build], true) {
                self.waits.push(now - since);
            }
        }
        if self.now < end {
            self.seconds += self.daemons.len() as u64;
            self.idle += self.daemons.iter().filter(|d| d.running.is_empty()).count() as u64;
        }
    }

    fn carry_out(&mut self, act: Act) {
        let before = self.daemons.len();
        match act {
            Act::Step(Step::Grow { to, .. }) | Act::Grow(to) => {
                while self.there() < to.min(self.day.max) {
                    self.make();
                }
            }
            Act::Step(Step::Cordon(id)) => self.cordon(id.as_str(), Some(CordonedBy::Scaler)),
            Act::Step(Step::Uncordon(id)) => self.cordon(id.as_str(), None),
            Act::Step(Step::Remove { daemon, .. }) => {
                if let Some(at) = self.daemons.iter().position(|d| name(d.number) == daemon.as_str()) {
                    self.remove(at);
                }
            }
            Act::Shrink(to) => {
                // Those that do not run yet go first; then it is anybody.
                while self.there() > to {
                    let starting = self.daemons.iter().position(|d| d.ready > self.now);
                    let at = starting.unwrap_or_else(|| self.random.below(self.daemons.len()));
                    self.remove(at);
                }
            }
        }
        let changed = u32::from(before != self.daemons.len());
        self.changes += changed;
        self.late += if self.now > 3600 && self.now < self.day.hours * 3600 { changed } else { 0 };
    }

    fn make(&mut self) {
        let (least, most) = self.day.start;
        let takes = least + self.random.below((most - least + 1) as usize) as u32;
        self.made += 1;
        self.daemons.push(Daemon {
            number: self.made,
            ready: self.now + takes,
            running: Vec::new(),
            busy: self.now,
            cordon: None,
        });
    }

    fn cordon(&mut self, id: &str, by: Option<CordonedBy>) {
        if let Some(d) = self.daemons.iter_mut().find(|d| name(d.number) == id) {
            d.cordon = by;
        }
    }

    fn remove(&mut self, at: usize) {
        let gone = self.daemons.remove(at);
        self.killed += gone.running.len() as u32;
        for (build, _) in gone.running {
            self.waiting.push_back((build, self.now));
        }
    }

    fn outcome(mut self) -> Outcome {
        self.waits.sort_unstable();
        let n = self.waits.len();
        let at =
            |share: usize| self.waits.get((n * share / 100).min(n.saturating_sub(1))).copied().unwrap_or(0);
        Outcome {
            median: f64::from(at(50)),
            p99: f64::from(at(99)),
            idle: self.idle as f64 / 3600.0,
            hours: self.seconds as f64 / 3600.0,
            killed: self.killed,
            changes: self.changes,
            late: self.late,
        }
    }
}

/// A daemon's name, for the autoscaler.
pub(super) fn name(number: u32) -> String {
    format!("d{number:05}")
}
