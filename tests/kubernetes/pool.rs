//! A pool whose daemons are the pods of a Deployment, which it scales.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::client::{BUILDX_29, Session};
use crate::common::cluster::{self, Cluster};
use crate::common::pool::Pool;
use crate::common::{holds_for, say, secs, wait_until};
use crate::{API, require};

/// A build of some seconds that needs no registry.
const BUILD: &str = "FROM scratch\nADD rootfs.tar /\nARG N\nRUN sleep 6; echo built $N\n";

fn pool(cluster: &Cluster, args: &[(&str, &str)]) -> Pool {
    let target = format!("{}/dind", cluster.namespace);
    let mut pool = Pool::of_deployment(&cluster.restricted("dind"), &target)
        .short_grace()
        .arg("--scale-min")
        .arg("0")
        .arg("--scale-max")
        .arg("4");
    for (name, value) in args {
        pool = pool.arg(*name).arg(*value);
    }
    pool.start()
}

fn scaler(pool: &Pool, field: &str) -> Value {
    pool.status()["scaler"][field].clone()
}

/// Sessions of their own, each with a build in it.
fn jobs(pool: &Pool, n: usize) -> Vec<Session> {
    let jobs: Vec<Session> = (0..n).map(|_| Session::new(&pool.host(), BUILDX_29)).collect();
    for job in &jobs {
        job.context("ctx", BUILD);
    }
    jobs
}

#[test]
fn a_pool_grows_from_nothing_with_its_queue_and_shrinks_to_nothing_again() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    cluster.apply(&cluster::dind("dind", 0));
    let pool = pool(&cluster, &[("--slots", "1"), ("--scale-stabilisation", "5s")]);
    wait_until("the Deployment has been seen", secs(30), || scaler(&pool, "replicas") == 0);

    // Nobody is there, and whoever asks for the version first brings the first daemon.
    let start = Instant::now();
    let first = Session::new(&pool.host(), BUILDX_29);
    first.ok("docker version");
    say(format!("a pool of no daemons answered `docker version` after {:.1?}", start.elapsed()));

    let jobs = jobs(&pool, 6);
    let builds: Vec<_> = (jobs.iter().enumerate())
        .map(|(i, job)| {
            job.start(&format!("docker buildx build --progress plain --build-arg N={i} -t app{i} ctx"))
        })
        .collect();
    wait_until("the pool has grown to its maximum", secs(60), || scaler(&pool, "replicas") == 4);
    builds.iter().for_each(|build| drop(build.wait_ok(secs(120))));
    say(format!(
        "six builds of 6 s on one slot each, from one daemon to four, done after {:.1?}",
        start.elapsed()
    ));
    assert_eq!(pool.metric("dindpool_scale_steps_total{outcome=\"failed\",step=\"grow\"}"), 0.0);

    // What was built and not pushed is nowhere else: its daemons stay.
    wait_until("nothing is needed any more", secs(60), || scaler(&pool, "reason") == "busy");
    for (i, job) in jobs.iter().enumerate() {
        job.ok(&format!("docker rmi app{i}"));
    }
    let start = Instant::now();
    wait_until("the pool is empty", secs(120), || {
        scaler(&pool, "replicas") == 0 && cluster.pods("app=dind").is_empty()
    });
    say(format!("four idle daemons were gone after {:.1?}", start.elapsed()));
    assert_eq!(
        pool.status()["problems"],
        serde_json::json!([]),
        "the pods that went are those that were chosen"
    );
    let chosen = pool.log().matches("the pod that was chosen goes").count();
    assert_eq!(chosen, 4, "{}", pool.log());
}

#[test]
fn a_busy_pod_that_is_deleted_finishes_its_build_and_gets_no_new_one() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    // The grace of a daemon's pod is for its builds.
    let manifest = cluster::dind("dind", 1)
        .replace("terminationGracePeriodSeconds: 5", "terminationGracePeriodSeconds: 60");
    let waits = "lifecycle: {preStop: {exec: {command: [busybox, sleep, '20']}}}\n        securityContext:";
    cluster.apply(&manifest.replacen("securityContext:", waits, 1));
    cluster.wait_ready("app=dind", 1);
    let pool = pool(&cluster, &[("--slots", "4"), ("--scaler", "off")]);
    pool.wait_healthy(1, secs(30));

    let jobs = jobs(&pool, 2);
    let first = jobs[0].start("docker buildx build --progress plain -t app ctx");
    wait_until("the build has begun", secs(30), || !pool.sessions().is_empty());
    let busy = pool.daemons().remove(0).id;
    cluster.kubectl(&["delete", "pod", &busy, "--wait=false"]);
    let state = |id: &str| {
        let status = pool.status();
        let daemons = status["daemons"].as_array().cloned().unwrap_or_default();
        daemons.into_iter().find(|d| d["id"] == id).map(|d| d["state"].clone())
    };
    wait_until("its daemon takes no new sessions", secs(10), || state(&busy) == Some("draining".into()));
    // The Deployment has made another one, which takes whoever comes now.
    jobs[1].start("docker buildx build --progress plain -t app ctx").wait_ok(secs(60));
    first.wait_ok(secs(60));
    wait_until("the pod has gone", secs(90), || state(&busy).is_none());
}

#[test]
fn row_14_an_api_server_that_does_not_answer_is_not_noticed_by_builds_and_nothing_scales() {
    let _api = API.write();
    let cluster = require!(Cluster::start());
    cluster.apply(&cluster::dind("dind", 2));
    cluster.wait_ready("app=dind", 2);
    // The picture is too old before anybody has been idle for long enough.
    let pool = pool(&cluster, &[("--slots", "1"), ("--scale-stabilisation", "20s")]);
    pool.wait_healthy(2, secs(30));
    let before = pool.steps();
    let frozen = cluster.freeze();
    let jobs = jobs(&pool, 2);
    let builds: Vec<_> =
        jobs.iter().map(|job| job.start("docker buildx build --progress plain -t app ctx")).collect();
    builds.iter().for_each(|build| drop(build.wait_ok(secs(60))));
    jobs.iter().for_each(|job| drop(job.ok("docker rmi app")));
    wait_until("the picture is too old", secs(60), || scaler(&pool, "reason") == "stale");
    assert_eq!(pool.healthy(), 2);
    holds_for("nothing is even tried", secs(25), || pool.steps() == before);
    drop(frozen);
    wait_until("the pool catches up", Duration::from_secs(90), || scaler(&pool, "replicas") == 0);
}

/// The watch breaks off, and then goes on where it was: nothing is listed anew by itself.
#[test]
fn row_15_an_api_server_that_was_away_is_followed_again() {
    let _api = API.write();
    let cluster = require!(Cluster::start());
    cluster.apply(&cluster::dind("dind", 1));
    cluster.wait_ready("app=dind", 1);
    let pool = pool(&cluster, &[("--scaler", "off")]);
    pool.wait_healthy(1, secs(30));
    let noticed =
        || pool.log().contains("watching the pods") && pool.status()["problems"] != serde_json::json!([]);
    cluster.restart_api_server(|| {
        wait_until("the proxy has noticed", secs(30), noticed);
    });
    assert_eq!(pool.healthy(), 1, "the last known pool serves");
    cluster.kubectl(&["scale", "deployment", "dind", "--replicas=2"]);
    let start = Instant::now();
    pool.wait_healthy(2, secs(90));
    say(format!("after the API server was away a new daemon was seen and ready in {:.1?}", start.elapsed()));
    wait_until("nothing is the matter any more", secs(30), || {
        pool.status()["problems"] == serde_json::json!([])
    });
}
