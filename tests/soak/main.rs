//! A random mixture of real work and faults on real daemons: whatever happens, only the work of a daemon that has been
//! killed, frozen, filled up or cut in its drain may be lost, and the pool ends as idle as it began.
//!
//! `make soak` runs this for SOAK_MINUTES; without them it is a mixture of 20 seconds, which shows that it works. The
//! seed is printed; SOAK_SEED takes one. It decides what is done in which order, the machine decides when.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod faults;
mod work;

#[path = "../common/mod.rs"]
mod common;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::pool::Pool;
use common::{millis, parts, poll, say, secs, wait_until};
use faults::Lab;
use work::{Outcome, Worker};

/// Clients at work at the same time: more than there are slots, so that some wait.
const WORKERS: u64 = 5;
const SLOTS: &str = "2";
/// What the proxy's memory may grow by after the first fifth.
const GROWTH: u64 = 24 << 10;

/// Numbers from a seed (splitmix64).
pub struct Dice(u64);

impl Dice {
    /// One from 0 to `n` - 1.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % n
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn a_random_mixture_of_work_and_faults_loses_nothing_that_was_not_hit_and_leaves_nothing_behind() {
    require!(parts::all(&[
        "busybox/rootfs.tar",
        "cli-28/docker",
        "cli-20.10/docker",
        "buildx-0.29/docker-buildx",
        "compose-2.26/docker-compose",
        "docker-28.5/bin/dockerd",
    ]));
    let time = number("SOAK_MINUTES").map_or(secs(20), |minutes| secs(60 * minutes));
    let seed = number("SOAK_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish());
    say(format!("  soak: SOAK_SEED={seed}, {time:?}"));
    let mut lab = Lab::start();
    let admin = lab.dir.path().join("admin.sock");
    let pool = Pool::serve(&lab.addresses)
        .short_grace()
        .arg("--admin")
        .arg(format!("unix://{}", admin.display()))
        .env("DINDPOOL_SLOTS", SLOTS)
        .start();
    pool.wait_healthy(faults::DAEMONS, secs(60));
    let (start, over) = (Instant::now(), AtomicBool::new(false));
    let outcomes: Mutex<Vec<Outcome>> = Mutex::default();
    let mut early = 0;
    std::thread::scope(|scope| {
        for n in 0..WORKERS {
            let mut worker = Worker::new(&pool, Dice(seed ^ (n + 1)));
            let (over, outcomes) = (&over, &outcomes);
            scope.spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    let outcome = worker.once();
                    outcomes.lock().unwrap().push(outcome);
                }
            });
        }
        let faulty = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut dice = Dice(seed);
            while start.elapsed() < time {
                lab.once(&mut dice, &pool, &admin);
                if early == 0 && start.elapsed() > time / 5 {
                    early = pool.rss();
                }
            }
        }));
        over.store(true, Ordering::SeqCst);
        if let Err(why) = faulty {
            std::panic::resume_unwind(why);
        }
    });
    let outcomes = outcomes.into_inner().unwrap();
    verdict(&outcomes, &lab, &pool.log());
    idle(&pool, early);
}

/// Each failure must have met a fault of its own daemon, while it was under way.
fn verdict(outcomes: &[Outcome], lab: &Lab, log: &str) {
    for kind in work::KINDS {
        let all = || outcomes.iter().filter(|o| o.kind == kind);
        let (good, killed) = (all().filter(|o| o.code == 0).count(), all().filter(|o| o.killed).count());
        say(format!(
            "  soak: {kind}: {} done, {good} good, {} failed, {killed} killed by us",
            all().count(),
            all().count() - good - killed
        ));
    }
    say(format!("  soak: faults: {}", lab.counts()));
    let truncated: Vec<&Outcome> = outcomes.iter().filter(|o| o.code == 0 && !o.whole).collect();
    assert!(truncated.is_empty(), "exit 0 without all that belongs to it: {truncated:#?}");
    let lost: Vec<&Outcome> =
        outcomes.iter().filter(|o| o.code != 0 && !o.killed && !lab.excuses(o, log)).collect();
    assert!(lost.is_empty(), "lost without a fault of their daemon: {lost:#?}\n{:#?}", lab.faults);
    assert!(outcomes.iter().any(|o| o.code == 0), "nothing was done at all");
}

/// Nothing of it is left in the pool.
fn idle(pool: &Pool, early: u64) {
    pool.wait_healthy(faults::DAEMONS, secs(120));
    pool.daemons().iter().for_each(common::daemon::Daemon::remove_containers);
    let busy = || {
        let status = pool.status();
        let used = status["daemons"].as_array().unwrap().iter().any(|d| d["used"] != 0);
        let streams = ["exchange", "tunnel"]
            .iter()
            .any(|kind| pool.metric(&format!("dindpool_streams{{kind=\"{kind}\"}}")) != 0.0);
        let left = !pool.sessions().is_empty() || status["queue"]["waiting"] != 0;
        used || streams || left || pool.metric("dindpool_connections{listener=\"tcp\"}") != 0.0
    };
    let Some(((), after)) = poll(secs(60), || (!busy()).then_some(())) else {
        panic!("it is not idle again: {:#}\n{}", pool.status(), pool.admin("/metrics").text());
    };
    assert_eq!(pool.metric("dindpool_panics_total"), 0.0);
    assert!(!pool.log().contains("panicked at"));
    let (now, peak) = (pool.rss(), pool.peak_rss());
    say(format!(
        "  soak: idle after {after:?}; memory {early} KiB after a fifth, {now} KiB now, {peak} KiB at most; {} sockets",
        pool.sockets()
    ));
    assert!(early == 0 || now < early + GROWTH, "{early} KiB became {now} KiB");
    wait_until("only its own sockets are left", secs(20), || pool.sockets() < 40);
}

/// A pause that the end of the mixture need not cut: it is short.
fn pause(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::thread::park_timeout(millis(10));
    }
}
