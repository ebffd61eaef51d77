//! Daemons that are containers of a real Docker engine.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use common::client::{BUILDX_29, CLI_28, Session};
use common::engine::{DIND, Engine};
use common::http::Addr;
use common::pool::{Pool, PoolBuilder};
use common::{holds_for, parts, say, secs, wait_until};

#[path = "../common/mod.rs"]
mod common;

/// A build of some seconds that needs no registry.
fn build(seconds: u32) -> String {
    format!("FROM scratch\nADD rootfs.tar /\nARG N\nRUN sleep {seconds}; echo built $N\n")
}

fn pool(engine: &Engine, image: &str) -> PoolBuilder {
    let (namespace, address) = engine.machine();
    Pool::containers(&engine.addr, image).on(namespace, &address).short_grace()
}

fn id(engine: &Engine, container: &str) -> String {
    engine.inspect(container)["Id"].as_str().unwrap_or_default().to_owned()
}

fn scaler(pool: &Pool, field: &str) -> Value {
    pool.status()["scaler"][field].clone()
}

/// `docker build` with buildx and without, and a run of what was built.
fn builds(pool: &Pool) {
    for client in [BUILDX_29, CLI_28] {
        let session = Session::new(&pool.host(), client);
        session.context("ctx", &build(0));
        session.ok("docker build -t app ctx");
        assert_eq!(session.ok("docker run --rm --network none app echo ran"), "ran\n");
        session.ok("docker rmi app");
    }
}

#[test]
fn daemons_are_containers_that_come_back_are_adopted_and_leave_nothing() {
    let engine = require!(Engine::start());
    let fixed = || pool(&engine, DIND).arg("--daemons").arg("2");
    let limited = || fixed().arg("--cpus").arg("1").arg("--memory").arg("2g");
    let start = Instant::now();
    let up = fixed().start();
    say(format!("two containers were ready after {:.1?}", start.elapsed()));
    builds(&up);
    let all = [
        "container dindpool-0",
        "container dindpool-1",
        "volume dindpool-0",
        "volume dindpool-1",
        "network dindpool",
    ];
    let mut traces = engine.traces();
    traces.sort_by_key(|trace| all.iter().position(|one| one == trace));
    assert_eq!(traces, all, "and no other volume");

    // One that is killed is made anew, on its volume.
    let (first, second) = (id(&engine, "dindpool-0"), id(&engine, "dindpool-1"));
    let identity = |pool: &Pool| {
        let daemons = pool.daemons();
        let own = daemons.iter().find(|d| d.id == "dindpool-0").unwrap();
        let inside = engine.docker(&["exec", "dindpool-0", "cat", "/var/lib/docker/engine-id"]);
        assert!(own.addr.url().starts_with("tcp://"));
        inside
    };
    let before = identity(&up);
    engine.docker(&["kill", "dindpool-0"]);
    let why = || up.status()["problems"].to_string();
    wait_until("its death is told", secs(20), || why().contains("dindpool-0: its container was killed"));
    wait_until("it is back", secs(60), || up.healthy() == 2 && id(&engine, "dindpool-0") != first);
    assert_eq!(identity(&up), before, "as itself");
    assert_eq!(id(&engine, "dindpool-1"), second, "the other one is not concerned");
    // One that is removed, too.
    engine.docker(&["rm", "-f", "dindpool-1"]);
    wait_until("it is back", secs(60), || up.healthy() == 2 && id(&engine, "dindpool-1") != second);
    builds(&up);

    // A dindpool that was killed costs nothing: the next one finds them by their labels.
    let before = [id(&engine, "dindpool-0"), id(&engine, "dindpool-1")];
    let session = Session::new(&up.host(), CLI_28);
    session.context("ctx", &build(0));
    session.ok("docker build -t kept ctx");
    up.kill();
    let up = fixed().start();
    assert_eq!([id(&engine, "dindpool-0"), id(&engine, "dindpool-1")], before, "the same containers");
    assert!(up.daemons().iter().any(|daemon| {
        let images = engine.docker(&[
            "exec",
            &daemon.id,
            "ls",
            "/var/lib/docker/image/overlay2/imagedb/content/sha256",
        ]);
        !images.is_empty()
    }));
    builds(&up);
    assert_eq!(up.stop(), Some(0));
    assert_eq!(engine.traces(), Vec::<String>::new(), "nothing is left");

    // With --keep they run on; with other limits they would be others.
    let up = fixed().arg("--keep").start();
    let before = [id(&engine, "dindpool-0"), id(&engine, "dindpool-1")];
    assert_eq!(up.stop(), Some(0));
    assert_eq!([id(&engine, "dindpool-0"), id(&engine, "dindpool-1")], before);
    let up = limited().start();
    assert_ne!(id(&engine, "dindpool-0"), before[0]);
    let host = engine.inspect("dindpool-0")["HostConfig"].clone();
    assert_eq!((&host["NanoCpus"], &host["Memory"]), (&json!(1_000_000_000), &json!(2_147_483_648_u64)));
    assert_eq!(up.stop(), Some(0));
    assert_eq!(engine.traces(), Vec::<String>::new());
}

#[test]
fn containers_are_made_for_work_and_removed_when_they_are_idle() {
    let engine = require!(Engine::start());
    let up = pool(&engine, DIND).arg("--scale-min").arg("0").arg("--scale-max").arg("2");
    let up = up.env("DINDPOOL_SLOTS", "1").arg("--scale-stabilisation").arg("5s").start();
    wait_until("the autoscaler has looked", secs(10), || scaler(&up, "replicas") == 0);
    assert_eq!(engine.traces(), Vec::<String>::new(), "nobody is there without work");
    let start = Instant::now();
    let jobs: Vec<Session> = (0..3).map(|_| Session::new(&up.host(), BUILDX_29)).collect();
    jobs.iter().for_each(|job| job.context("ctx", &build(5)));
    let running: Vec<_> = (jobs.iter().enumerate())
        .map(|(i, job)| job.start(&format!("docker build --build-arg N={i} -t app ctx")))
        .collect();
    running.iter().for_each(|build| drop(build.wait_ok(secs(120))));
    say(format!("three builds of 5 s from no container to two, done after {:.1?}", start.elapsed()));
    assert_eq!(scaler(&up, "replicas"), 2);

    // The engine is away for a while: nothing is changed, and builds go on.
    engine.signal(Signal::SIGSTOP);
    let told = || up.status()["problems"].to_string().contains("does not answer");
    wait_until("the engine's silence is told", secs(30), told);
    assert_eq!(up.healthy(), 2, "the daemons answer");
    jobs[0].ok("docker build --build-arg N=7 -t app ctx");
    wait_until("the picture is too old", secs(30), || scaler(&up, "reason") == "stale");
    let steps = up.steps();
    holds_for("nothing is even tried", secs(5), || up.steps() == steps);
    assert_eq!(scaler(&up, "replicas"), 2, "nothing was changed");
    engine.signal(Signal::SIGCONT);
    wait_until("it is seen again", secs(30), || !told());

    jobs.iter().for_each(|job| drop(job.ok("docker rmi -f app")));
    let empty = || scaler(&up, "replicas") == 0 && up.daemons().is_empty();
    wait_until("the pool is empty", secs(120), empty);
    assert_eq!(engine.traces(), ["network dindpool"], "volumes go with their daemons");
    assert_eq!(up.stop(), Some(0));
    assert_eq!(engine.traces(), Vec::<String>::new());
}

#[test]
fn what_keeps_a_container_from_starting_is_told_and_the_pool_is_never_its_own_engine() {
    let engine = require!(Engine::start());
    // Nobody answers there, and Docker says so.
    let image = "127.0.0.1:1/dind:28";
    let up = pool(&engine, image).arg("--scale-min").arg("0").arg("--scale-max").arg("2");
    let up = up.arg("--scale-startup").arg("8s").start();
    let job = Session::new(&up.host(), CLI_28);
    job.context("ctx", &build(0));
    let out = job.fails("docker build -t app ctx");
    assert!(out.all().contains(&format!("cannot pull {image}: ")), "{}", out.all());
    assert!(out.stderr.contains("connection refused"), "{}", out.all());
    let problems = up.status()["problems"].to_string();
    assert!(problems.contains("dindpool-0: cannot pull"), "{problems}");
    assert_eq!(up.stop(), Some(0));
    assert_eq!(engine.traces(), Vec::<String>::new());

    // A dockerd that ends tells why, by the last line of its log.
    let up = pool(&engine, DIND).arg("--scale-min").arg("0").arg("--scale-max").arg("2");
    let up = up.arg("--dockerd-arg=--storage-driver=nonsense").arg("--scale-startup").arg("8s").start();
    let out = Session::new(&up.host(), CLI_28).fails("docker pull x");
    assert!(
        out.all().contains("its container ended with status 1: ") && out.all().contains("nonsense"),
        "{}",
        out.all()
    );
    assert_eq!(up.stop(), Some(0));

    // A container of somebody else under the name is left alone.
    let name = ["create", "--name", "dindpool-0", DIND];
    engine.docker(&name);
    let up = pool(&engine, DIND).arg("--daemons").arg("1").early().start();
    let told = || up.status()["problems"].to_string().contains("not this pool's");
    wait_until("it is told", secs(30), told);
    assert_eq!(up.stop(), Some(0));
    assert!(engine.traces().contains(&"container dindpool-0".to_string()), "{:?}", engine.traces());
    engine.docker(&["rm", "-v", "dindpool-0"]);

    let dir = tempfile::tempdir().unwrap();
    let socket = format!("unix://{}", dir.path().join("s").display());
    let binary = env!("CARGO_BIN_EXE_dindpool");
    let out = std::process::Command::new(binary)
        .args(["up", "--provisioner", "docker", "--listen", &socket, "--admin", "127.0.0.1:0"])
        .arg("--data")
        .arg(dir.path().join("d"))
        .env("DOCKER_HOST", &socket)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("would be this very pool"), "{said}");
}

/// deploy/compose.yaml as it is: dindpool in a container, beside its daemons.
#[test]
fn compose_runs_a_pool_on_one_machine_and_takes_all_of_it_away() {
    require!(parts::all(&["compose-2.26/docker-compose"]));
    let engine = require!(Engine::start());
    let (namespace, _) = engine.machine();
    let Addr::Unix(socket) = &engine.addr else { panic!("an engine of this machine") };
    let operator = Session::with(&engine.addr.url(), BUILDX_29)
        .env("DOCKER_SOCKET", &socket.display().to_string())
        .env("DINDPOOL_UP_IMAGE", DIND)
        .env("DINDPOOL_UP_CPUS", "1")
        .env("DINDPOOL_UP_MEMORY", "2g")
        .open();
    let root = env!("CARGO_MANIFEST_DIR");
    let binary = env!("CARGO_BIN_EXE_dindpool");
    operator
        .ok(&format!("make -s -C {root} image IMAGE=dindpool:latest BINARY={binary} ARGS='--network none'"));
    operator.ok(&format!("docker compose -f {root}/deploy/compose.yaml up -d"));
    let ours = engine.traces();
    assert!(!ours.contains(&"container dindpool-0".to_string()), "nobody is there without work: {ours:?}");

    let user = Session::with("tcp://127.0.0.1:2375", CLI_28).netns(namespace).open();
    user.context("ctx", &build(0));
    let start = Instant::now();
    user.ok("until docker version >/dev/null 2>&1; do read -t .2 <> <(:); done");
    user.ok("docker build -t app ctx && docker run --rm --network none app echo ran");
    say(format!(
        "a build and a run through compose's pool, from zero, were done after {:.1?}",
        start.elapsed()
    ));
    assert!(engine.traces().contains(&"container dindpool-0".to_string()), "{:?}", engine.traces());
    let status = operator.ok("docker exec dindpool-dindpool-1 dindpool status");
    assert!(status.contains("dindpool-0") && status.contains("ready"), "{status}");
    operator.ok("docker exec dindpool-dindpool-1 dindpool cordon dindpool-0");

    operator.ok(&format!("docker compose -f {root}/deploy/compose.yaml down -v"));
    assert_eq!(engine.traces(), Vec::<String>::new());
}
