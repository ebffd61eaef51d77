//! Cordon, drain and reload on real daemons.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::builds::HangingBuild;
use crate::common::client::{self, Session};
use crate::common::daemon::{Daemon, where_is};
use crate::common::pool::Pool;
use crate::common::scenarios::Scenarios;
use crate::common::{parts, say, secs, unique, wait_until};

fn start(daemons: usize) -> Result<Pool, String> {
    parts::all(&["busybox/rootfs.tar", "cli-28/docker", "cli-20.10/docker", "buildx-0.29/docker-buildx"])?;
    let pool = Pool::up(&[parts::dockerd("28.5")?], daemons).start();
    pool.wait_healthy(daemons, secs(60));
    Ok(pool)
}

/// What `dindpool VERB …` says of this pool.
fn command(pool: &Pool, words: &[&str]) -> std::process::Output {
    let token = pool.dir().join("d/admin-token");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_dindpool"));
    command.args(words).args(["--admin", &pool.admin_url()]);
    command.arg("--token-file").arg(token).output().unwrap()
}

fn text(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn row(pool: &Pool, id: &str) -> Value {
    let status = pool.status();
    let all = status["daemons"].as_array().unwrap();
    all.iter().find(|d| d["id"] == id).unwrap().clone()
}

#[test]
fn cordons_and_drains() {
    let pool = &crate::require!(start(2));
    let mut all = Scenarios::new("28.5");
    all.add("a cordoned daemon gets no new session, and keeps those that it has", || cordoned(pool));
    all.add("a drain waits for the last work and ends idle", || ends_idle(pool));
    for flavour in [client::BUILDX_29, client::CLI_28, client::CLI_20_BUILDKIT] {
        all.add(format!("{}: a drain that does not end is cut at its deadline", flavour.name), move || {
            row_37_a_stuck_drain_is_cut_at_its_deadline(pool, flavour);
        });
    }
    all.add("a reload changes what can change, and a bad one nothing", || {
        row_42_a_bad_configuration_leaves_the_old_one_in_place(pool);
    });
    all.add("without a token only the admin socket changes anything", || socket(pool));
    all.add("a container that nobody attends is stopped after its lease, and its slot comes free", || {
        overdue(pool);
    });
    all.add("an unknown daemon is answered with the names that there are", || {
        let out = command(pool, &["cordon", "nobody"]);
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out).contains("dind-0, dind-1"), "{}", text(&out));
    });
    all.run(1);
}

/// Builds an image, and tells where.
fn made_on(pool: &Pool, session: &Session) -> Daemon {
    let name = format!("c{}", unique());
    session.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    session.ok(&format!("docker build -q --network none -t {name} ctx"));
    let daemons = pool.daemons();
    let here = where_is(&daemons, |d| d.has_image(&name));
    assert_eq!(here.len(), 1);
    daemons.into_iter().find(|d| d.id == here[0]).unwrap()
}

fn cordoned(pool: &Pool) {
    let old = Session::new(&pool.host(), client::CLI_28);
    let home = made_on(pool, &old);
    let out = command(pool, &["cordon", &home.id]);
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(row(pool, &home.id)["cordoned"], true);
    assert_eq!(row(pool, &home.id)["cordon"]["by"], "operator");
    for _ in 0..4 {
        assert_ne!(made_on(pool, &Session::new(&pool.host(), client::CLI_28)).id, home.id);
    }
    assert_eq!(made_on(pool, &old).id, home.id, "its own session goes on there");
    let shown = command_plain(pool, "status");
    assert!(shown.contains("cordoned"), "{shown}");
    assert!(command(pool, &["uncordon", &home.id]).status.success());
    assert_eq!(row(pool, &home.id)["cordoned"], false);
}

fn command_plain(pool: &Pool, word: &str) -> String {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_dindpool"));
    text(&command.args([word, "--admin", &pool.admin_url()]).output().unwrap())
}

fn ends_idle(pool: &Pool) {
    let session = Session::new(&pool.host(), client::CLI_28);
    let home = made_on(pool, &session);
    let image = format!("i{}", unique());
    session.ok(&format!("docker build -q --network none -t {image} ctx"));
    session.ok(&format!("docker run -d --name {image} --network none {image} sleep 1000"));
    let id = home.id.clone();
    let draining = std::thread::scope(|scope| {
        let drain = scope.spawn(|| command(pool, &["drain", &id, "--deadline", "5m"]));
        wait_until("it drains", secs(10), || row(pool, &home.id)["cordon"]["deadline"].is_f64());
        assert!(!drain.is_finished(), "a container runs");
        let since = Instant::now();
        session.ok(&format!("docker kill {image}"));
        let out = drain.join().unwrap();
        // The session's grace is five minutes, the linger ten seconds: neither is waited for.
        assert!(since.elapsed() < secs(8), "{:?}", since.elapsed());
        out
    });
    let said = text(&draining);
    assert_eq!(draining.status.code(), Some(0), "{said}");
    assert!(said.contains(&format!("running containers {image}")), "progress: {said}");
    assert!(said.contains("images that were not pushed") && said.contains("stopped containers"), "{said}");
    assert_eq!(row(pool, &home.id)["cordoned"], true, "it stays cordoned");
    assert!(command(pool, &["uncordon", &home.id]).status.success());
    session.ok(&format!("docker rm -f {image}"));
}

fn row_37_a_stuck_drain_is_cut_at_its_deadline(pool: &Pool, flavour: client::Flavour) {
    let stuck = HangingBuild::start(pool, flavour);
    let home = stuck.daemon(&pool.daemons());
    let cut = pool.metric("dindpool_drains_total{result=\"cut\"}");
    assert!(command(pool, &["cordon", &home.id]).status.success());
    let other = HangingBuild::start(pool, client::CLI_28);
    assert_ne!(other.daemon(&pool.daemons()).id, home.id);
    let since = Instant::now();
    let out = command(pool, &["drain", &home.id, "--deadline", "2s"]);
    let took = since.elapsed();
    let said = text(&out);
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(said.contains("this was cut") && said.contains("open request"), "{said}");
    assert!(took >= secs(2) && took < secs(4), "{took:?}");
    let build = stuck.job.wait(Duration::from_secs(5));
    assert_ne!(build.code, 0, "{}", build.all());
    let words: Vec<&str> = build.stderr.lines().filter(|l| !l.trim().is_empty()).collect();
    say(format!("          {}: exit {}: {}", flavour.name, build.code, words.last().unwrap_or(&"")));
    assert!(!words.is_empty(), "there is a message");
    if !flavour.is_buildkit() {
        assert!(build.all().contains("it was drained"), "{}", build.all());
    }
    wait_until("the RUN is gone", secs(10), || !stuck.runs());
    assert!(other.runs() && other.job.output().is_none(), "another daemon's build goes on");
    assert_eq!(pool.metric("dindpool_drains_total{result=\"cut\"}"), cut + 1.0);
    assert!(command(pool, &["uncordon", &home.id]).status.success());
}

fn row_42_a_bad_configuration_leaves_the_old_one_in_place(pool: &Pool) {
    let daemons: Vec<String> = pool.daemons().iter().map(|d| d.addr.url()).collect();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dindpool.toml");
    let write = |daemons: &[String], rest: &str| {
        std::fs::write(&file, format!("daemons = {daemons:?}\n{rest}\n")).unwrap();
    };
    write(&daemons[..1], "queue_limit = 5");
    let front = Pool::serve([]).arg("--config").arg(file.display().to_string()).start();
    front.wait_healthy(1, secs(20));
    assert_eq!(front.status()["queue"]["limit"], 5);
    let metric = |text: &str| front.admin("/metrics").text().contains(text);
    let build = HangingBuild::start(&front, client::CLI_28);
    // A good one: another daemon, another limit.
    write(&daemons, "queue_limit = 7\nlog_level = \"debug\"");
    front.reload();
    front.wait_healthy(2, secs(20));
    assert_eq!(front.status()["queue"]["limit"], 7);
    assert!(metric("dindpool_config_reloads_total{result=\"ok\"} 1"));
    // It would take both daemons away, if anything of it applied.
    write(&[], "queue_limit = 9\nqueue_wait = \"soon\"\nadmin = \"127.0.0.1:1\"\nnonsense = 1");
    front.reload();
    wait_until("it is refused", secs(10), || metric("dindpool_config_reloads_total{result=\"refused\"} 1"));
    assert!(metric("dindpool_config_last_reload_successful 0"));
    write(&daemons, "queue_limit = 9\nqueue_wait = \"soon\"\nslots = 0");
    front.reload();
    wait_until("that too", secs(10), || metric("dindpool_config_reloads_total{result=\"refused\"} 2"));
    assert_eq!(front.status()["queue"]["limit"], 7, "the old one applies");
    assert_eq!(front.healthy(), 2);
    for fault in ["nonsense: unknown key", "queue_wait: soon is no duration"] {
        wait_until(fault, secs(5), || front.log().contains(fault));
    }
    assert!(build.runs() && build.job.output().is_none(), "the build goes on through all of it");
}

fn socket(pool: &Pool) {
    let daemons = pool.daemons();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let url = format!("unix://{}", path.display());
    let front = Pool::serve([&daemons[0].addr]).arg("--admin").arg(&url).start();
    front.wait_healthy(1, secs(20));
    let id = front.status()["daemons"][0]["id"].as_str().unwrap().to_string();
    let cordon = |admin: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_dindpool"));
        command.args(["cordon", &id, "--admin", admin]).output().unwrap()
    };
    let refused = cordon(&front.admin_url());
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused).contains("--admin-token-file"), "{}", text(&refused));
    assert_eq!(row(&front, &id)["cordoned"], false);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let done = cordon(&url);
    assert!(done.status.success(), "{}", text(&done));
    assert_eq!(row(&front, &id)["cordoned"], true);
}

fn overdue(pool: &Pool) {
    let daemon = &pool.daemons()[0];
    let front = Pool::serve([&daemon.addr])
        .short_grace()
        .env("DINDPOOL_CONTAINER_LEASE", "2s")
        .env("DINDPOOL_OVERDUE_CONTAINERS", "stop")
        .start();
    front.wait_healthy(1, secs(20));
    let session = Session::new(&front.host(), client::CLI_28);
    let name = format!("o{}", unique());
    session.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    session.ok(&format!("docker build -q --network none -t {name} ctx"));
    session.ok(&format!("docker run -d --name {name} --stop-timeout 1 --network none {name} sleep 1000"));
    let state = || daemon.get(&format!("/containers/{name}/json"))["State"]["Status"].clone();
    assert_eq!(state(), "running");
    wait_until("it is stopped", secs(20), || state() == "exited");
    wait_until("its slot is free", secs(10), || front.status()["daemons"][0]["used"] == 0);
    assert!(front.admin("/metrics").text().contains("dindpool_leases_overdue_total 1"));
    assert!(front.log().contains("nobody attends its containers"), "{}", front.log());
    Session::new(&pool.host(), client::CLI_28).ok(&format!("docker rm {name}"));
}
