//! A local pool that grows and shrinks with its work.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use dindpool::engine::autoscaler::Step;
use dindpool::provision::process::Options;
use serde_json::{Value, json};

use crate::common::client::{BUILDX_29, CLI_28, Session};
use crate::common::pool::Pool as Up;
use crate::common::{parts, poll, say, secs, wait_until};
use crate::harness::{Pool, missing, options};
use crate::require;

/// A build of some seconds that needs no registry.
fn build(seconds: u32) -> String {
    format!("FROM scratch\nADD rootfs.tar /\nARG N\nRUN sleep {seconds}; echo built $N\n")
}

/// A dockerd that takes some seconds more to start, so that it can be seen to; while a file `broken` is beside it, it
/// cannot start at all.
fn slow_dockerd(dir: &Path) -> PathBuf {
    let real = parts::dockerd("28.5").unwrap();
    for entry in fs::read_dir(real.parent().unwrap()).unwrap().flatten() {
        if entry.file_name() != "dockerd" {
            symlink(entry.path(), dir.join(entry.file_name())).unwrap();
        }
    }
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] || sleep 3\n\
         if [ -e {}/broken ] && [ \"$1\" != --version ]; then\n\
         echo 'failed to start daemon: no space left on device' >&2; exit 1; fi\n\
         exec {} \"$@\"\n",
        dir.display(),
        real.display()
    );
    let dockerd = dir.join("dockerd");
    fs::write(&dockerd, script).unwrap();
    fs::set_permissions(&dockerd, fs::Permissions::from_mode(0o755)).unwrap();
    dockerd
}

fn scaler(pool: &Up, field: &str) -> Value {
    pool.status()["scaler"][field].clone()
}

/// The directories that daemons have for what survives.
fn data(pool: &Up) -> Vec<String> {
    let entries = fs::read_dir(pool.dir().join("d")).unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("dind-")).collect()
}

#[test]
fn a_local_pool_grows_from_nothing_with_its_queue_and_only_idle_daemons_go() {
    require!(parts::all(&[
        "docker-28.5/bin/dockerd",
        "cli-28/docker",
        "buildx-0.29/docker-buildx",
        "busybox/rootfs.tar"
    ]));
    let dir = tempfile::tempdir().unwrap();
    let up = Up::scaled(&slow_dockerd(dir.path()), 3).short_grace().env("DINDPOOL_SLOTS", "1");
    let pool = up.arg("--scale-stabilisation").arg("5s").start();
    assert_eq!(
        (scaler(&pool, "replicas"), pool.daemons().len()),
        (json!(0), 0),
        "nobody is there without work"
    );

    // The first build waits, and its user sees why.
    let start = Instant::now();
    let first = Session::new(&pool.host(), CLI_28);
    first.context("ctx", &build(0));
    let out = first.ok("docker build -t first ctx");
    let line = "Waiting for a free daemon: position 1 of 1 (a daemon is starting)";
    assert!(out.contains(line), "{out}");
    say(format!(
        "a build from zero, with a dockerd that takes 3 s more, was done after {:.1?}",
        start.elapsed()
    ));
    first.ok("docker rmi first");

    let jobs: Vec<Session> = (0..5).map(|_| Session::new(&pool.host(), BUILDX_29)).collect();
    jobs.iter().for_each(|job| job.context("ctx", &build(6)));
    let builds: Vec<_> = (jobs.iter().enumerate())
        .map(|(i, job)| job.start(&format!("docker buildx build --build-arg N={i} -t app{i} ctx")))
        .collect();
    wait_until("the pool has grown to its maximum", secs(60), || scaler(&pool, "replicas") == 3);
    builds.iter().for_each(|build| drop(build.wait_ok(secs(180))));
    say(format!(
        "five builds of 6 s on one slot each, on up to 3 daemons, done after {:.1?}",
        start.elapsed()
    ));
    assert!(
        scaler(&pool, "startup").as_f64().is_some_and(|took| took > 2.0),
        "it has learned how long a start takes"
    );

    // What was built and not pushed is nowhere else: its daemons stay.
    wait_until("nothing is needed any more", secs(60), || scaler(&pool, "reason") == "busy");
    for (i, job) in jobs.iter().enumerate() {
        job.ok(&format!("docker rmi app{i}"));
    }
    // One goes on working, and it is the others that go.
    let long = &jobs[0];
    long.context("long", &build(40));
    let working = long.start("docker buildx build -t long long");
    let shrunk = || scaler(&pool, "replicas") == 1 && pool.daemons().len() == 1;
    wait_until("the idle ones have gone", secs(120), shrunk);
    assert_eq!(working.code(), None, "and the one that works has not");
    working.wait_ok(secs(120));
    long.ok("docker rmi long");
    wait_until("the pool is empty", secs(60), || scaler(&pool, "replicas") == 0 && pool.daemons().is_empty());
    assert_eq!(data(&pool), Vec::<String>::new(), "what they had went with them");
    let failed = pool
        .steps()
        .into_iter()
        .filter(|line| line.contains("failed") && !line.ends_with(" 0"))
        .collect::<Vec<_>>();
    assert_eq!(failed, Vec::<String>::new());
    assert_eq!(pool.status()["problems"], json!([]));
    // And again, under a name that was there before.
    first.ok("docker build -t first ctx");
}

#[test]
fn daemons_that_cannot_start_are_not_made_without_end_and_everybody_hears_why() {
    require!(parts::all(&["docker-28.5/bin/dockerd", "cli-28/docker", "busybox/rootfs.tar"]));
    let dir = tempfile::tempdir().unwrap();
    let dockerd = slow_dockerd(dir.path());
    fs::write(dir.path().join("broken"), "").unwrap();
    let up = Up::scaled(&dockerd, 3).short_grace().env("DINDPOOL_SLOTS", "1");
    let pool = up.arg("--scale-startup").arg("12s").start();
    let why = "no space left on device";

    let jobs: Vec<Session> = (0..4).map(|_| Session::new(&pool.host(), CLI_28)).collect();
    jobs.iter().for_each(|job| job.context("ctx", &build(0)));
    let builds: Vec<_> = jobs.iter().map(|job| job.start("docker build -t app ctx")).collect();
    let told = || builds.iter().all(|build| build.stdout().contains(why) || build.code().is_some());
    wait_until("those who wait are told", secs(60), told);
    for build in &builds {
        let out = build.wait(secs(90));
        assert!(out.code != 0 && out.stderr.contains(why), "{}", out.all());
        assert!(out.stdout.contains("Waiting for a free daemon"), "{}", out.all());
    }
    let faults = scaler(&pool, "faults").to_string();
    assert!(faults.contains(why) && faults.contains("dind-0: dockerd did not start"), "{faults}");
    let problems = pool.status()["problems"].to_string();
    assert!(problems.contains("dind-0") && problems.contains("its log: "), "{problems}");
    assert_eq!(scaler(&pool, "reason"), "stuck");
    // Who comes now is told at once, and nothing more is made.
    let out = jobs[0].fails("docker build -t app ctx");
    assert!(out.stderr.contains(why), "{}", out.all());
    let grown = "dindpool_scale_steps_total{outcome=\"done\",step=\"grow\"}";
    assert_eq!(
        (scaler(&pool, "replicas"), pool.metric(grown)),
        (json!(3), 1.0),
        "made once, up to the maximum"
    );

    // As soon as one comes up, all is well again.
    fs::remove_file(dir.path().join("broken")).unwrap();
    wait_until("a daemon has come up", secs(90), || pool.healthy() > 0);
    jobs[0].ok("docker build -t app ctx");
    wait_until("no problem is left", secs(90), || pool.status()["problems"] == json!([]));
}

/// The directories that a pool on this data has left.
fn left(data: &Path) -> Vec<String> {
    let names = fs::read_dir(data).unwrap().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("dind-")).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_smaller_or_larger_pool_finds_comes_back_and_only_what_was_scaled_down_is_gone() {
    if missing(
        "what_a_smaller_or_larger_pool_finds_comes_back_and_only_what_was_scaled_down_is_gone",
        &["28.5"],
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let fixed = |daemons| Options { remove_data: false, ..options(&data, daemons, &["28.5"]) };
    let scaled = || Options { most: Some(4), ..fixed(0) };
    let ids = |daemons: &[crate::harness::Daemon]| daemons.iter().map(|d| d.0.id.clone()).collect::<Vec<_>>();

    // A fixed pool's daemon, and two that were made for work.
    let pool = Pool::start(fixed(1)).await;
    pool.ready().await[0].import_busybox();
    pool.stop().await;
    let pool = Pool::start(scaled()).await;
    assert_eq!(ids(&pool.ready().await), ["dind-0"], "what has data comes back");
    pool.change(Step::Grow { from: 1, to: 3 }).await.unwrap();
    let three = |seen: &dindpool::provision::Observation| {
        seen.daemons.len() == 3 && seen.daemons.iter().all(|d| d.pending.is_none())
    };
    pool.seen("there are three", three).await;
    let daemons = pool.ready().await;
    let addresses: std::collections::BTreeSet<_> = daemons.iter().map(|d| d.source_ip()).collect();
    assert_eq!(addresses.len(), 3);
    daemons[2].import_busybox();
    pool.stop().await;
    assert_eq!(left(&data), ["dind-0", "dind-1", "dind-2"], "nothing was scaled down");

    // A smaller fixed pool leaves the others' data alone.
    let pool = Pool::start(fixed(1)).await;
    pool.ready().await;
    pool.stop().await;
    assert_eq!(left(&data).len(), 3);

    let pool = Pool::start(scaled()).await;
    pool.seen("all of them are back", three).await;
    let daemons = pool.ready().await;
    assert!(daemons[2].docker(&["images", "-q", "busybox"]).len() > 3, "with what they had");
    let run = daemons[1].socket();
    for (victim, from) in [("dind-1", 3), ("dind-0", 2)] {
        pool.change(Step::Remove { daemon: victim.into(), from }).await.unwrap();
        pool.seen("it has gone", |seen| !seen.daemons.iter().any(|d| d.id == victim)).await;
    }
    assert_eq!(left(&data), ["dind-0", "dind-2"], "what a fixed pool has made stays");
    assert!(poll(secs(5), || (!run.exists()).then_some(())).is_some());
    let id = pool.id();
    pool.stop().await;
    assert_eq!(crate::harness::traces(&data, &id), Vec::<String>::new());
}
