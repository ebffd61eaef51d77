//! Daemons with caches, and the builds on them. A policy says where each build goes; this says what comes of it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::workload::{Build, Random, Workload};

/// A daemon: what runs, what waits for it, and which projects' caches it has.
#[derive(Debug, Default)]
pub struct Daemon {
    /// Builds that run.
    pub running: usize,
    /// Builds that wait for this daemon.
    pub queue: VecDeque<usize>,
    /// Projects, the least recently built in front.
    pub cache: VecDeque<usize>,
}

impl Daemon {
    /// What runs and what waits.
    pub fn load(&self) -> usize {
        self.running + self.queue.len()
    }

    /// Whether it has a project's cache.
    pub fn is_warm(&self, project: usize) -> bool {
        self.cache.contains(&project)
    }

    fn touch(&mut self, project: usize, size: usize) {
        self.cache.retain(|p| *p != project);
        self.cache.push_back(project);
        if self.cache.len() > size {
            self.cache.pop_front();
        }
    }
}

/// All of it at one moment.
#[derive(Debug)]
pub struct World {
    /// What it is.
    pub workload: Workload,
    /// What arrives.
    pub builds: Vec<Build>,
    /// The daemons.
    pub daemons: Vec<Daemon>,
    /// Builds that wait for any daemon.
    pub central: VecDeque<usize>,
    /// For the policies.
    pub random: Random,
    /// Now, in mean warm builds.
    pub now: f64,
    ends: BinaryHeap<Reverse<End>>,
    waits: Vec<f64>,
    warm: usize,
    started: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct End {
    at: f64,
    build: usize,
    daemon: usize,
}

impl Eq for End {}

impl PartialOrd for End {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for End {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.total_cmp(&other.at).then(self.build.cmp(&other.build))
    }
}

/// Where builds go.
pub trait Policy {
    /// A build arrives: it is started, or put into a queue.
    fn arrive(&mut self, world: &mut World, build: usize);
    /// A build has ended on a daemon: the next is started, if any waits.
    fn end(&mut self, world: &mut World, build: usize, daemon: usize);
    /// When it wants to be woken, if nothing else happens.
    fn wakes(&self) -> Option<f64> {
        None
    }
    /// It is woken.
    fn wake(&mut self, _world: &mut World) {}
}

/// What came of a run.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Mean wait of a build, in mean warm builds.
    pub mean: f64,
    /// The wait that one build in a hundred exceeds.
    pub p99: f64,
    /// Share of builds that found their cache.
    pub warm: f64,
    /// When the last build ended.
    pub makespan: f64,
}

impl World {
    /// Starts a build.
    pub fn start(&mut self, build: usize, daemon: usize) {
        let Build { at, project, size } = self.builds[build];
        let d = &mut self.daemons[daemon];
        let warm = d.is_warm(project);
        d.running += 1;
        if warm {
            d.touch(project, self.workload.cache);
        }
        self.started += 1;
        // Until the first fifth is through nobody has a cache, whatever the policy.
        if build * 5 >= self.builds.len() {
            self.waits.push(self.now - at);
            self.warm += usize::from(warm);
        }
        let takes = if warm { size } else { size * self.workload.cold };
        self.ends.push(Reverse(End { at: self.now + takes, build, daemon }));
    }

    /// Whether a daemon has a free slot.
    pub fn has_room(&self, daemon: usize) -> bool {
        self.daemons[daemon].running < self.workload.slots
    }

    /// Runs a policy on a workload to its end.
    pub fn run(workload: Workload, load: Option<f64>, seed: u64, policy: &mut dyn Policy) -> Outcome {
        let builds = workload.builds(load, seed);
        let mut world = World {
            workload,
            daemons: (0..workload.daemons).map(|_| Daemon::default()).collect(),
            central: VecDeque::new(),
            random: Random::new(seed + 1),
            now: 0.0,
            ends: BinaryHeap::new(),
            waits: Vec::with_capacity(builds.len()),
            warm: 0,
            started: 0,
            builds,
        };
        let mut next = 0;
        loop {
            let arrival = world.builds.get(next).map_or(f64::INFINITY, |b| b.at);
            let end = world.ends.peek().map_or(f64::INFINITY, |Reverse(end)| end.at);
            let wake = policy.wakes().unwrap_or(f64::INFINITY);
            if arrival.is_infinite() && end.is_infinite() && world.started == world.builds.len() {
                break;
            }
            if wake < arrival.min(end) {
                world.now = world.now.max(wake);
                policy.wake(&mut world);
            } else if arrival <= end && arrival.is_finite() {
                world.now = arrival;
                policy.arrive(&mut world, next);
                next += 1;
            } else if let Some(Reverse(End { at, build, daemon })) = world.ends.pop() {
                world.now = at;
                world.daemons[daemon].running -= 1;
                let project = world.builds[build].project;
                world.daemons[daemon].touch(project, workload.cache);
                policy.end(&mut world, build, daemon);
            } else {
                break;
            }
        }
        world.outcome()
    }

    fn outcome(mut self) -> Outcome {
        assert_eq!(self.started, self.builds.len(), "a build was lost");
        self.waits.sort_unstable_by(f64::total_cmp);
        let n = self.waits.len();
        Outcome {
            mean: self.waits.iter().sum::<f64>() / n as f64,
            p99: self.waits[(n * 99 / 100).min(n - 1)],
            warm: self.warm as f64 / n as f64,
            makespan: self.now,
        }
    }
}
