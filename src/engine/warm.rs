//! Which daemon is warm for a project: cache hits decide more than evenness. In simulation at 60 % load a pool that
//! spreads builds evenly diverges, because half of them are cold (docs/performance.md, "Balancing").
//!
//! A build of a known project goes where it is expected to be *done* first: the wait there, and [`COLD`] more where
//! the project has not been built. A daemon counts as warm as soon as a build of the project is placed on it or waits
//! for it; it no longer does while it has more than [`BOUND`] times its share of the pool's work. Ties go by rendezvous
//! hash, so that a project that nobody has built finds the same daemon every time.
//!
//! A build may therefore wait for its warm daemon while another has a free slot, but no longer than
//! [`super::Config::warm_wait`]: then it takes any slot that nobody else wants. It does not come before those that are
//! warm there: if it did, a pool with long queues would turn every build into a cold one and never recover (seen in
//! simulation).

use std::collections::{BTreeMap, HashMap};

use super::daemon::Daemon;
use super::model::*;
use super::reason::{Because, Compared, best, short};
use super::{Engine, balancer};

/// For how long a build rather waits for a warm daemon than start on another one, in builds with a cache. Cold builds
/// take about four times as long (performance data of the design), so three would be even; but with three the builds
/// of a project that suddenly becomes popular wait long for one daemon: p99 at 70 % load .6 with 1 or 2, 1.6 with 3.
const COLD: f64 = 1.25;
/// How much more than its share of all work a daemon may have before its caches count for nothing: without a bound
/// a pool with one busy project would be one daemon (bounded loads, Mirrokni et al. 2016; design, decision 4).
const BOUND: f64 = 1.25;
/// Projects that a daemon is remembered to have built. Its own cache holds fewer or more; dockerd does not say.
const REMEMBERED: usize = 512;

/// The projects that daemons have built, the latest of each.
#[derive(Debug, Default)]
pub(super) struct Warm {
    /// When each daemon has built each project last, as a count of all builds.
    built: HashMap<ProjectKey, BTreeMap<DaemonId, u64>>,
    /// The same, by daemon and time.
    order: BTreeMap<DaemonId, BTreeMap<u64, ProjectKey>>,
    builds: u64,
}

impl Warm {
    /// A build of the project starts on the daemon.
    pub fn touch(&mut self, project: &ProjectKey, daemon: &DaemonId) {
        self.builds += 1;
        let before = self.built.entry(project.clone()).or_default().insert(daemon.clone(), self.builds);
        let order = self.order.entry(daemon.clone()).or_default();
        if let Some(before) = before {
            order.remove(&before);
        }
        order.insert(self.builds, project.clone());
        if order.len() > REMEMBERED
            && let Some((_, oldest)) = order.pop_first()
        {
            self.drop_from(&oldest, daemon);
        }
    }

    /// How many projects the daemon is known to have built.
    pub fn count(&self, daemon: &DaemonId) -> usize {
        self.order.get(daemon).map_or(0, BTreeMap::len)
    }

    /// The projects that the daemon is known to have built, the oldest first.
    pub fn projects(&self, daemon: &DaemonId) -> impl Iterator<Item = &ProjectKey> {
        self.order.get(daemon).into_iter().flat_map(BTreeMap::values)
    }

    /// Whether the daemon has built the project.
    pub fn is_warm(&self, project: &ProjectKey, daemon: &DaemonId) -> bool {
        self.built.get(project).is_some_and(|daemons| daemons.contains_key(daemon))
    }

    /// The daemon has gone, or is another one.
    pub fn forget(&mut self, daemon: &DaemonId) {
        for project in self.order.remove(daemon).into_iter().flatten().map(|(_, project)| project) {
            self.drop_from(&project, daemon);
        }
    }

    fn drop_from(&mut self, project: &ProjectKey, daemon: &DaemonId) {
        if let Some(daemons) = self.built.get_mut(project) {
            daemons.remove(daemon);
            if daemons.is_empty() {
                self.built.remove(project);
            }
        }
    }
}

/// The waiting builds of known projects, by the daemon that each waits for.
#[derive(Debug, Default)]
pub(super) struct Preferences {
    of: BTreeMap<RequestId, (ProjectKey, DaemonId)>,
    at: BTreeMap<DaemonId, (u32, HashMap<ProjectKey, u32>)>,
}

impl Preferences {
    /// A waiting build prefers this daemon from now on.
    pub fn set(&mut self, request: RequestId, project: &ProjectKey, daemon: &DaemonId) {
        self.unset(request);
        self.of.insert(request, (project.clone(), daemon.clone()));
        let (all, projects) = self.at.entry(daemon.clone()).or_default();
        *all += 1;
        *projects.entry(project.clone()).or_default() += 1;
    }

    /// It waits no longer.
    pub fn unset(&mut self, request: RequestId) {
        let Some((project, daemon)) = self.of.remove(&request) else { return };
        let Some((all, projects)) = self.at.get_mut(&daemon) else { return };
        *all -= 1;
        if let Some(n) = projects.get_mut(&project) {
            *n -= 1;
            if *n == 0 {
                projects.remove(&project);
            }
        }
        if *all == 0 {
            self.at.remove(&daemon);
        }
    }

    /// How many builds wait for the daemon, and how many of them are of this project, `request` itself left out.
    fn waiting(&self, daemon: &DaemonId, project: &ProjectKey, request: RequestId) -> (u32, u32) {
        let Some((all, projects)) = self.at.get(daemon) else { return (0, 0) };
        let own = u32::from(self.of.get(&request).is_some_and(|(_, d)| d == daemon));
        (all - own, projects.get(project).copied().unwrap_or(0).saturating_sub(own))
    }
}

/// Those with no grave reason against them, or all if there is one against each. However long the wait for one of
/// them is, it helps; a cache on another does not.
pub(super) fn undoubted(able: Vec<&Daemon>) -> Vec<&Daemon> {
    let well: Vec<&Daemon> = able.iter().copied().filter(|d| !d.is_doubted()).collect();
    if well.is_empty() { able } else { well }
}

impl Engine {
    /// The daemon, among `able`, on which a build of the project is done first. Those that [`undoubted`] leaves out are
    /// not among them: what fails at once is done first.
    pub(super) fn done_first(
        &self,
        acquire: &Acquire,
        project: &ProjectKey,
        able: &[&Daemon],
    ) -> Option<(DaemonId, Because)> {
        let hash = balancer::hash(project.as_str());
        let waiting = |d: &Daemon| self.queue.preferences.waiting(&d.id, project, acquire.request);
        let load = |d: &Daemon| d.expected_load() as f64 / 4.0 + f64::from(waiting(d).0);
        let slots: f64 = able.iter().map(|d| f64::from(d.capacity())).sum();
        let full = (able.iter().map(|d| load(d)).sum::<f64>() + 1.0) / slots.max(1.0);
        let is_warm = |d: &Daemon| waiting(d).1 > 0 || self.warm.is_warm(project, &d.id);
        let cost = |d: &Daemon| {
            let (load, capacity) = (load(d), f64::from(d.capacity().max(1)));
            let ahead = (load + 1.0 - capacity).max(0.0) / capacity;
            let bounded = load < (BOUND * full * capacity).ceil();
            let warm = bounded && is_warm(d);
            // Of two that would start it at once the emptier one: builds slow each other down a little.
            ahead + if warm { 0.0 } else { COLD } + load / capacity / 1000.0
        };
        let rank = |d: &Daemon| balancer::mix(hash ^ d.hash.rotate_left(32));
        let all: Vec<(f64, u64, &Daemon)> = able.iter().map(|d| (cost(d), rank(d), *d)).collect();
        let order =
            |a: &(f64, u64, &Daemon), b: &(f64, u64, &Daemon)| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1));
        let first = all.iter().min_by(|a, b| order(a, b))?.2;
        let tell = |(cost, _, d): &(f64, u64, &Daemon)| Compared {
            warm: is_warm(d),
            waiting: waiting(d).0,
            cost: Some(*cost),
            ..Compared::of(d)
        };
        let warm = is_warm(first);
        // One that is full is decided about again when a slot comes free.
        let compared = if first.has_room() { best(all, order, tell) } else { Vec::new() };
        let project = short(project.as_str());
        Some((first.id.clone(), Because::DoneFirst { project, warm, compared }))
    }
}
