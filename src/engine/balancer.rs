//! Which daemon a new session gets: the one with the least expected wait.
//!
//! Expected wait is work against capacity, so a daemon of eight slots with four in use equals one of two with
//! one in use. Leases without work come second: a session between two builds will work again where it is.
//! What counts against a daemon's health counts as work ([`Daemon::expected_load`]). What still ties is drawn at random, because any fixed order would send every burst to the same daemon.

use std::cmp::Ordering;

use super::daemon::Daemon;
use super::model::DaemonId;
use super::reason::{COMPARED, Compared, best};

/// A small deterministic generator (SplitMix64, Steele et al. 2014), seeded by the shell.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `n`, which is at least 1. The bias of the remainder does not matter for a tie-break.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Spreads the bits of a number over all of it.
pub(super) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What is compared of a daemon: work against capacity, then leases against capacity.
#[derive(Debug, Clone, Copy)]
struct Load {
    work: u64,
    leases: u64,
    capacity: u64,
}

impl Load {
    fn of(daemon: &Daemon) -> Self {
        Load {
            work: daemon.expected_load(),
            leases: daemon.sessions.len() as u64,
            capacity: u64::from(daemon.capacity().max(1)),
        }
    }

    /// a/b < c/d without division, so that equal loads are exactly equal.
    fn compare(&self, other: &Load) -> Ordering {
        let share = |load: &Load, of: &Load| (load.work * of.capacity, load.leases * of.capacity);
        share(self, other).cmp(&share(other, self))
    }
}

/// Daemons with their loads, each read once for a decision: over a hundred of them that reading is what it costs.
#[derive(Debug, Clone)]
pub(super) struct Weighed<'a>(Vec<(Load, &'a Daemon)>);

impl<'a> Weighed<'a> {
    pub fn new(daemons: impl IntoIterator<Item = &'a Daemon>) -> Self {
        Weighed(daemons.into_iter().map(|daemon| (Load::of(daemon), daemon)).collect())
    }

    /// Those with the least expected wait, in the order in which they came.
    pub fn least(&self) -> Vec<&'a Daemon> {
        let Some((least, _)) = self.0.iter().min_by(|(a, _), (b, _)| a.compare(b)) else { return Vec::new() };
        self.0.iter().filter(|(load, _)| load.compare(least).is_eq()).map(|(_, daemon)| *daemon).collect()
    }

    /// What was compared, `chosen` first: it is one of the `least`, which are as good as each other.
    pub fn compared(self, chosen: &DaemonId, least: &[&'a Daemon]) -> Vec<Compared> {
        let is_chosen = |daemon: &Daemon| daemon.id == *chosen;
        if least.len() >= COMPARED {
            let others = least.iter().filter(|daemon| !is_chosen(daemon)).take(COMPARED - 1);
            let chosen = least.iter().filter(|daemon| is_chosen(daemon));
            return chosen.chain(others).map(|daemon| Compared::of(daemon)).collect();
        }
        let order = |(a, x): &(Load, &Daemon), (b, y): &(Load, &Daemon)| {
            a.compare(b).then_with(|| is_chosen(y).cmp(&is_chosen(x)))
        };
        best(self.0, order, |(_, daemon)| Compared::of(daemon))
    }
}

/// How often a warm one is drawn for before all are looked at.
const DRAWS: usize = 8;

/// One of `equals` at random; if some of them are among `warm`, one of those. `is_warm` says whether one is. Where many
/// are, one is soon drawn; where few are, one walk through both finds them, which are in the order of the daemons'
/// names.
pub(super) fn draw<'a>(
    equals: &[&'a Daemon],
    warm: impl Iterator<Item = &'a DaemonId>,
    is_warm: impl Fn(&DaemonId) -> bool,
    random: &mut Random,
) -> Option<&'a DaemonId> {
    let mut warm = warm.peekable();
    if equals.len() > 1 && warm.peek().is_some() {
        for _ in 0..DRAWS {
            let drawn = &equals[random.below(equals.len() as u64) as usize].id;
            if is_warm(drawn) {
                return Some(drawn);
            }
        }
        let is_warm = |daemon: &&Daemon| {
            while warm.next_if(|w| **w < daemon.id).is_some() {}
            warm.next_if(|w| **w == daemon.id).is_some()
        };
        let warm: Vec<&Daemon> = equals.iter().copied().filter(is_warm).collect();
        if !warm.is_empty() {
            return one(&warm, random);
        }
    }
    one(equals, random)
}

/// One of them at random.
fn one<'a>(daemons: &[&'a Daemon], random: &mut Random) -> Option<&'a DaemonId> {
    let n = daemons.len() as u64;
    (n > 0).then(|| &daemons[random.below(n) as usize].id)
}

/// The daemon that reads of an unbound session go to: always the same one for the same key (rendezvous
/// hashing), without keeping anything about it.
pub(super) fn rendezvous<'a>(daemons: impl Iterator<Item = &'a Daemon>, key: &str) -> Option<&'a DaemonId> {
    let key = hash(key);
    daemons.max_by_key(|d| mix(key ^ d.hash.rotate_left(32))).map(|d| &d.id)
}

/// FNV-1a, stable between processes and versions, unlike the standard library's hasher.
pub(super) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn daemon(id: &str, used: u32, slots: u32) -> Daemon {
        let mut daemon = Daemon::new(id.into(), Some(slots));
        daemon.used = used;
        daemon
    }

    #[test]
    fn the_least_share_in_use_wins() {
        let pool = [daemon("a", 2, 4), daemon("b", 1, 4), daemon("c", 1, 2)];
        assert_eq!(Weighed::new(&pool).least()[0].id.as_str(), "b");
    }

    #[test]
    fn leases_without_work_break_a_tie() {
        let mut pool = [daemon("a", 0, 2), daemon("b", 0, 2)];
        pool[0].sessions.insert("k".into());
        let least: Vec<&str> = Weighed::new(&pool).least().iter().map(|d| d.id.as_str()).collect();
        assert_eq!(least, ["b"]);
    }

    #[test]
    fn ties_are_drawn_evenly() {
        let pool = [daemon("a", 0, 2), daemon("b", 0, 2), daemon("c", 0, 2)];
        let mut random = Random::new(7);
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..3000 {
            *counts
                .entry(
                    draw(&Weighed::new(&pool).least(), std::iter::empty(), |_| false, &mut random)
                        .unwrap()
                        .clone(),
                )
                .or_insert(0) += 1;
        }
        assert!(counts.values().all(|n| (850..1150).contains(n)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn whoever_is_drawn_has_no_more_to_do_than_any_other(
            loads in proptest::collection::vec((0u32..6, 1u32..5, 0usize..3), 1..20),
            warm in proptest::collection::btree_set(0usize..20, 0..20),
            seed: u64,
        ) {
            let pool: Vec<Daemon> = (loads.iter().enumerate())
                .map(|(i, (used, slots, sessions))| {
                    let mut daemon = daemon(&format!("d{i:02}"), *used, *slots);
                    daemon.sessions = (0..*sessions).map(|s| format!("k{s}").into()).collect();
                    daemon
                })
                .collect();
            let warm: Vec<DaemonId> = warm.into_iter().map(|i| format!("d{i:02}").into()).collect();
            let equals = Weighed::new(&pool).least();
            let is_warm = |daemon: &DaemonId| warm.contains(daemon);
            let drawn = draw(&equals, warm.iter(), is_warm, &mut Random::new(seed)).unwrap();
            let load = |d: &Daemon| {
                let slots = f64::from(d.slots);
                (f64::from(d.used) / slots, d.sessions.len() as f64 / slots)
            };
            let chosen = pool.iter().find(|d| d.id == *drawn).unwrap();
            prop_assert!(pool.iter().all(|d| load(chosen) <= load(d)));
            let some_warm = equals.iter().any(|d| warm.contains(&d.id));
            prop_assert!(!some_warm || warm.contains(drawn), "a warm one wins a tie");
        }
    }

    #[test]
    fn reads_stay_and_move_only_with_their_daemon() {
        let pool = [daemon("a", 0, 2), daemon("b", 0, 2), daemon("c", 0, 2)];
        for i in 0..50 {
            let key = format!("ip:10.0.0.{i}");
            let home = rendezvous(pool.iter(), &key).unwrap();
            assert_eq!(rendezvous(pool.iter().filter(|d| d.id != "x".into()), &key).unwrap(), home);
            let others = || pool.iter().filter(|d| d.id.as_str() != "c");
            if home.as_str() != "c" {
                assert_eq!(rendezvous(others(), &key).unwrap(), home);
            }
        }
    }
}
