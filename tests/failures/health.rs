//! How a sick daemon is found out, kept out and taken back: frozen, full, slow, emptied, or on a data root that it
//! shares.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::client::{self, Flavour, Session};
use crate::common::dockerd::{Dockerd, Tmpfs};
use crate::common::fake_daemon::FakeDaemon;
use crate::common::http::{self, Addr};
use crate::common::pool::Pool;
use crate::common::{holds_for, millis, parts, say, secs, short_dir, unique, wait_until};

const CONTEXT: &str = "FROM scratch\nARG MARK\nLABEL mark=$MARK\nADD rootfs.tar /\n";

fn needs() -> Result<(), String> {
    parts::all(&[
        "busybox/rootfs.tar",
        "cli-28/docker",
        "buildx-0.29/docker-buildx",
        "docker-28.5/bin/dockerd",
    ])
}

/// The pool's daemon at this address, as `/status` has it.
fn standing(pool: &Pool, addr: &Addr) -> Value {
    let url = addr.url();
    let status = pool.status();
    let daemons = status["daemons"].as_array().cloned().unwrap_or_default();
    daemons.into_iter().find(|d| d["address"] == url.as_str()).unwrap_or_else(|| panic!("no {url}: {status}"))
}

fn is_healthy(pool: &Pool, addr: &Addr) -> bool {
    let daemon = standing(pool, addr);
    daemon["health"] == "healthy" && daemon["state"] == "ready"
}

fn metric(pool: &Pool, name: &str) -> f64 {
    let text = pool.admin("/metrics").text();
    text.lines()
        .filter(|l| l.starts_with(name))
        .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// A build in a new session; whether it succeeded.
fn builds(pool: &Pool, flavour: Flavour) -> bool {
    let t = Session::new(&pool.host(), flavour);
    t.context("ctx", CONTEXT);
    let out = t.run(&format!("docker build -q --network none --build-arg MARK={} ctx", unique()));
    if out.code != 0 {
        assert!(out.all().contains("no space left on device"), "{}", out.all());
    }
    out.code == 0
}

#[test]
fn row_02_a_frozen_daemon_is_out_within_five_seconds() {
    crate::require!(needs());
    let roots = [short_dir(), short_dir()];
    let daemons = roots.each_ref().map(|root| Dockerd::start("28.5", root.path()));
    let pool = Pool::serve(daemons.iter().map(|d| &d.addr)).start();
    pool.wait_healthy(2, secs(20));
    daemons[0].signal(Signal::SIGSTOP);
    let out = wait_until("it is out", secs(5), || !is_healthy(&pool, &daemons[0].addr));
    say(format!("          row 2: a frozen daemon was out after {} ms", out.as_millis()));
    assert!(builds(&pool, client::CLI_28) && builds(&pool, client::BUILDX_29), "unbound work goes elsewhere");
    assert!(metric(&pool, "dindpool_ejections_total{reason=\"silent\"}") >= 1.0);
    daemons[0].signal(Signal::SIGCONT);
    pool.wait_healthy(2, secs(20));
}

#[test]
fn row_03_a_daemon_with_a_full_disk_costs_three_builds_at_most() {
    crate::require!(needs());
    let (small, roomy) = (Tmpfs::new(64), short_dir());
    let (full, good) = (Dockerd::start("28.5", small.path()), Dockerd::start("28.5", roomy.path()));
    let pool = Pool::serve([&full.addr, &good.addr]).start();
    pool.wait_healthy(2, secs(20));

    small.fill();
    assert!(is_healthy(&pool, &full.addr), "/info is as green as ever");
    let (mut victims, mut done) = (0, 0);
    let start = Instant::now();
    while is_healthy(&pool, &full.addr) {
        let flavour = [client::CLI_28, client::BUILDX_29][done % 2];
        victims += usize::from(!builds(&pool, flavour));
        done += 1;
        assert!(start.elapsed() < secs(60), "not noticed after {done} builds, {victims} of which failed");
    }
    say(format!(
        "          row 3: {victims} of {done} builds failed until it was out, {} ms after the disk was full",
        start.elapsed().as_millis()
    ));
    assert!(victims <= 3, "{victims} victims");
    let reason = standing(&pool, &full.addr)["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("cannot write") && reason.contains("no space left on device"), "{reason}");
    assert!((0..3).all(|_| builds(&pool, client::CLI_28)), "the other one serves");
    assert!(metric(&pool, "dindpool_ejections_total{reason=\"writes\"}") >= 1.0);

    // Four clients at once, BuildKit alone, when the disk fills up the next time.
    small.free();
    wait_until("it is back", secs(20), || is_healthy(&pool, &full.addr));
    small.fill();
    let failed = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while is_healthy(&pool, &full.addr) && start.elapsed() < secs(60) {
                    failed.fetch_add(usize::from(!builds(&pool, client::BUILDX_29)), Ordering::SeqCst);
                }
            });
        }
    });
    let (failed, took) = (failed.load(Ordering::SeqCst), start.elapsed().as_millis());
    say(format!("          row 3: {failed} of four clients' builds failed, out after {took} ms"));
    assert!(!is_healthy(&pool, &full.addr) && failed <= 3, "{failed} victims");

    // Row 34: it comes back by itself, and takes one session, then one more a second.
    small.free();
    let back = wait_until("it is back", secs(20), || is_healthy(&pool, &full.addr));
    let open = standing(&pool, &full.addr)["open_slots"].as_u64().unwrap();
    say(format!(
        "          row 34: back {} ms after there was space, with {open} of 64 slots",
        back.as_millis()
    ));
    assert!(open < 64, "a slow start");
    wait_until("all slots are open", secs(30), || standing(&pool, &full.addr)["open_slots"] == 64);
    for daemon in [&full, &good] {
        let images = http::get(&daemon.addr, "/images/json").text();
        assert!(!images.contains("dindpool-probe"), "a probe has left something: {images}");
    }
}

/// A fake daemon, since a real one cannot be made slow in `/info` alone.
#[test]
fn row_05_a_slow_daemon_is_avoided_and_does_not_flap() {
    let (over, asked) = (Arc::new((Mutex::new(false), Condvar::new())), Arc::new(AtomicUsize::new(0)));
    let (end, count) = (over.clone(), asked.clone());
    let slow = FakeDaemon::start("GET /info", move |exchange| {
        count.fetch_add(1, Ordering::SeqCst);
        // The delay is what this fake is for; the end of the test cuts it short.
        let guard = end.0.lock().unwrap();
        drop(end.1.wait_timeout_while(guard, millis(400), |over| !*over).unwrap());
        exchange.json(
            "200 OK",
            &json!({ "ID": "slow", "ServerVersion": "28.5.2", "NCPU": 2, "MemTotal": 8_000_000_000_u64 }),
        );
    });
    let fast = FakeDaemon::idle();
    let pool = Pool::serve([&slow.addr, &fast.addr]).env("DINDPOOL_PROBE_INTERVAL", "200ms").start();
    pool.wait_healthy(2, secs(20));
    wait_until("its latency is known", secs(20), || {
        asked.load(Ordering::SeqCst) > 2 && standing(&pool, &slow.addr)["latency"].as_f64().unwrap() > 0.25
    });
    for _ in 0..20 {
        let body = json!({ "Name": "v" });
        http::request(&pool.tcp, "POST", &format!("/s/{}/v1.44/volumes/create", unique()), Some(&body));
    }
    let to = |daemon: &FakeDaemon| daemon.seen_with("/volumes/create").len();
    say(format!("          row 5: of 20 sessions {} came to the slow daemon", to(&slow)));
    assert_eq!((to(&slow), to(&fast)), (0, 20));
    holds_for("both stay", secs(3), || pool.healthy() == 2);
    assert_eq!(metric(&pool, "dindpool_ejections_total"), 0.0);
    *over.0.lock().unwrap() = true;
    over.1.notify_all();
}

#[test]
fn deep_probes_leave_nothing_and_are_nobodys() {
    for version in ["20.10", "28.5", "29"] {
        crate::require!(parts::dockerd(version));
        let root = short_dir();
        let daemon = Dockerd::start(version, root.path());
        let direct = Session::new(&daemon.addr.url(), client::CLI_28);
        let tar = parts::busybox("rootfs.tar");
        // What a probe leaves that is cut off half-way.
        direct.ok(&format!("docker import {} dindpool-probe:left", tar.display()));
        direct.ok("docker volume create --label dindpool=probe dindpool-probe-1-2");
        direct.ok("docker volume create dindpool-probe-data");
        let pool = Pool::serve([&daemon.addr]).env("DINDPOOL_DEEP_PROBE_INTERVAL", "300ms").start();
        pool.wait_healthy(1, secs(20));
        let probed = || metric(&pool, "dindpool_probes_total{kind=\"deep\",outcome=\"answered\"}");
        wait_until("some probes", secs(30), || probed() >= 4.0);
        wait_until("nothing is left", secs(20), || {
            let volumes = direct.ok("docker volume ls -q");
            direct.ok("docker images -aq").trim().is_empty() && volumes.trim() == "dindpool-probe-data"
        });
        let status = pool.status();
        assert_eq!(status["images"], 0, "the pool knows of none: {status}");
        assert_eq!(status["sessions"].as_array().map(Vec::len), Some(0), "{status}");
        assert_eq!(status["daemons"][0]["used"], 0, "it is no work: {status}");
        // Where there are no deep probes, another proxy's are swept all the same when the daemon is met.
        drop(pool);
        direct.ok(&format!("docker import {} dindpool-probe:left", tar.display()));
        let pool = Pool::serve([&daemon.addr]).env("DINDPOOL_DEEP_PROBE_INTERVAL", "0s").start();
        pool.wait_healthy(1, secs(20));
        wait_until("it is swept", secs(20), || direct.ok("docker images -aq").trim().is_empty());
    }
}

#[test]
fn row_38_a_daemon_that_comes_back_empty_has_lost_its_sessions() {
    crate::require!(needs());
    let root = short_dir();
    let mut daemon = Dockerd::start("28.5", root.path());
    let pool = Pool::serve([&daemon.addr]).start();
    pool.wait_healthy(1, secs(20));
    let (t, name) = (Session::new(&pool.host(), client::CLI_28), format!("c{}", unique()));
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    t.ok(&format!("docker build -q --network none -t img{name} ctx"));
    t.ok(&format!("docker create --name {name} --network none img{name} true"));

    // A restart alone loses nothing.
    daemon.restart();
    wait_until("it is met again", secs(20), || t.run(&format!("docker inspect {name}")).code == 0);

    let id = std::fs::read(root.path().join("engine-id")).unwrap();
    daemon.stop();
    wait_until("it is out", secs(10), || pool.healthy() == 0);
    for entry in std::fs::read_dir(root.path()).unwrap().flatten() {
        let path = entry.path();
        let _ = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path));
    }
    std::fs::write(root.path().join("engine-id"), id).unwrap();
    daemon.restart();
    pool.wait_healthy(1, secs(20));
    let out = t.fails(&format!("docker start {name}"));
    assert!(out.stderr.contains("session lost: its daemon"), "{}", out.all());
    let told = "the daemon came back without anything that was on it";
    wait_until("the log says so", secs(5), || pool.log().contains(told));
    t.ok(&format!("docker build -q --network none -t img{name} ctx"));
    t.ok(&format!("docker run --rm --network none img{name} true"));
}

/// Not on 29: there the images are in containerd's database as well, and the first write through the second daemon
/// makes one containerd or both of them panic ("page 5 already freed"), so that there is nobody left to refuse.
#[test]
fn row_40_two_daemons_on_one_data_root_are_both_refused() {
    for version in ["20.10", "26.1", "28.5"] {
        crate::require!(parts::dockerd(version));
        let (shared, other) = (short_dir(), short_dir());
        let twins = [(); 2].map(|()| Dockerd::without_locks(version, shared.path()));
        let good = Dockerd::start(version, other.path());
        let pool = Pool::serve([&twins[0].addr, &twins[1].addr, &good.addr]).start();
        wait_until("both are refused and the third is not", secs(20), || {
            let out = |d: &Dockerd| {
                standing(&pool, &d.addr)["reason"].as_str().unwrap().contains("shares its data root")
            };
            twins.iter().all(out) && is_healthy(&pool, &good.addr)
        });
        assert_eq!(pool.healthy(), 1, "{}", pool.status());
        let problems = pool.status()["problems"].to_string();
        assert!(problems.contains("share one data root"), "{problems}");
        assert!(metric(&pool, "dindpool_shared_data_roots_total") >= 2.0);
        wait_until("the log says so", secs(5), || pool.log().contains("two daemons share one data root"));
        say(format!(
            "          row 40: two dockerd {version} on one data root were told apart from a stranger"
        ));
    }
}
