//! The policies that pools of builders use, to compare with. Each is as simple as its name.

use super::workload::mix;
use super::world::{Policy, World};

/// How a policy chooses when a build arrives.
pub type Choose = fn(&mut World, usize, &mut usize) -> usize;

/// Every daemon has a queue, and a build joins one when it arrives.
pub struct Queues {
    /// Which.
    pub choose: Choose,
    /// A number of the policy's own.
    pub state: usize,
}

impl Policy for Queues {
    fn arrive(&mut self, world: &mut World, build: usize) {
        let daemon = (self.choose)(world, build, &mut self.state);
        if world.has_room(daemon) {
            world.start(build, daemon);
        } else {
            world.daemons[daemon].queue.push_back(build);
        }
    }

    fn end(&mut self, world: &mut World, _build: usize, daemon: usize) {
        if let Some(next) = world.daemons[daemon].queue.pop_front() {
            world.start(next, daemon);
        }
    }
}

/// Any of them.
pub fn random(world: &mut World, _: usize, _: &mut usize) -> usize {
    let n = world.daemons.len();
    world.random.below(n)
}

/// One after the other.
pub fn round_robin(world: &mut World, _: usize, last: &mut usize) -> usize {
    *last = (*last + 1) % world.daemons.len();
    *last
}

/// The one with the fewest builds.
pub fn least_connections(world: &mut World, _: usize, _: &mut usize) -> usize {
    least(world, |world, d| world.daemons[d].load() as f64)
}

/// The better of two that are drawn.
pub fn two_choices(world: &mut World, _: usize, _: &mut usize) -> usize {
    let n = world.daemons.len();
    let (a, b) = (world.random.below(n), world.random.below(n));
    if world.daemons[a].load() <= world.daemons[b].load() { a } else { b }
}

/// Always the same one for a project.
pub fn consistent_hash(world: &mut World, build: usize, _: &mut usize) -> usize {
    by_hash(world, build)[0]
}

/// The first in the project's order that has less than 1.25 times its share.
pub fn bounded_hash(world: &mut World, build: usize, _: &mut usize) -> usize {
    let all: usize = world.daemons.iter().map(|d| d.load()).sum();
    let bound = (1.25 * (all + 1) as f64 / world.daemons.len() as f64).ceil() as usize;
    let order = by_hash(world, build);
    order.iter().copied().find(|d| world.daemons[*d].load() < bound).unwrap_or(order[0])
}

/// The better of the project's first two.
pub fn two_rendezvous(world: &mut World, build: usize, _: &mut usize) -> usize {
    let order = by_hash(world, build);
    let (a, b) = (order[0], order[1 % order.len()]);
    if world.daemons[a].load() <= world.daemons[b].load() { a } else { b }
}

/// The least expected wait, with what a cold build takes longer.
pub fn least_wait_and_penalty(world: &mut World, build: usize, _: &mut usize) -> usize {
    let project = world.builds[build].project;
    let slots = world.workload.slots as f64;
    let penalty = world.workload.cold - 1.0;
    least(world, |world, d| {
        let daemon = &world.daemons[d];
        let wait = (daemon.load() as f64 + 1.0 - slots).max(0.0) / slots;
        wait + if daemon.is_warm(project) { 0.0 } else { penalty }
    })
}

/// One queue; who comes free takes the first build whose cache it has, else the first.
pub struct Central;

impl Policy for Central {
    fn arrive(&mut self, world: &mut World, build: usize) {
        let project = world.builds[build].project;
        let free: Vec<usize> = (0..world.daemons.len()).filter(|d| world.has_room(*d)).collect();
        let warm = free.iter().copied().find(|d| world.daemons[*d].is_warm(project));
        let any = free.iter().copied().min_by_key(|d| world.daemons[*d].running);
        match warm.or(any) {
            Some(daemon) => world.start(build, daemon),
            None => world.central.push_back(build),
        }
    }

    fn end(&mut self, world: &mut World, _build: usize, daemon: usize) {
        let warm = |b: &usize| world.daemons[daemon].is_warm(world.builds[*b].project);
        let at = world.central.iter().position(warm).unwrap_or(0);
        if let Some(build) = world.central.remove(at) {
            world.start(build, daemon);
        }
    }
}

/// The daemons in a project's order of preference (rendezvous hashing).
fn by_hash(world: &World, build: usize) -> Vec<usize> {
    let project = world.builds[build].project as u64;
    let mut order: Vec<usize> = (0..world.daemons.len()).collect();
    order.sort_unstable_by_key(|d| mix(mix(project + 1) ^ (*d as u64 + 1).wrapping_mul(0x9E37_79B9)));
    order
}

/// The daemon of the least cost; ties are drawn.
fn least(world: &mut World, cost: impl Fn(&World, usize) -> f64) -> usize {
    let costs: Vec<f64> = (0..world.daemons.len()).map(|d| cost(world, d)).collect();
    let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let equal: Vec<usize> = (0..costs.len()).filter(|d| costs[*d] <= least).collect();
    let at = world.random.below(equal.len());
    equal[at]
}
