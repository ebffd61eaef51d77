//! Pools of real local dockerd: they live side by side, come back after a death, and leave nothing behind.
#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

#[path = "../common/mod.rs"]
mod common;
mod harness;
mod scaling;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dindpool::provision::process::{self, Options};
use harness::*;

/// A container that ends at once when it is asked to.
const SLEEP: [&str; 6] = ["run", "-d", "--stop-signal=KILL", "busybox", "sleep", "1000"];

#[tokio::test(flavor = "multi_thread")]
async fn three_daemons_are_three_and_nothing_is_left_of_them() {
    if missing("three_daemons_are_three_and_nothing_is_left_of_them", &["28.5"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::start(options(&dir.path().join("data"), 3, &["28.5"])).await;
    let daemons = pool.ready().await;
    let field = |template: &'static str| -> BTreeSet<String> {
        daemons.iter().map(|daemon| daemon.docker(&["info", "--format", template])).collect()
    };
    assert_eq!(field("{{.ID}}").len(), 3, "three identities");
    assert_eq!(field("{{.Name}}"), BTreeSet::from(["dind-0", "dind-1", "dind-2"].map(String::from)));

    let (outside, machine) = server_outside();
    let here = server_here();
    let mut all = BTreeSet::new();
    for daemon in &daemons {
        daemon.import_busybox();
        daemon.docker(&SLEEP);
        assert_eq!(daemon.address_seen_by(outside), machine, "masqueraded on the way out");
        let proxy = SocketAddr::new(daemon.gateway(), here);
        assert_eq!(daemon.address_seen_by(proxy), daemon.source_ip(), "the proxy sees whose container it is");
        all.extend(daemon.processes());
    }
    assert!(all.len() >= 3 * 6, "keeper, init, dockerd, containerd, shim, container: {all:?}");

    let (data, id) = (pool.data.clone(), pool.id());
    assert!(!traces(&data, &id).is_empty(), "the search finds something while they live");
    pool.stop().await;
    assert_eq!(all.into_iter().filter(|pid| alive(*pid)).collect::<Vec<_>>(), Vec::<i32>::new());
    assert_eq!(traces(&data, &id), Vec::<String>::new());
    assert!(!data.exists(), "temporary data is removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_mix_and_each_can_do_what_docker_can() {
    let versions = ["20.10", "26.1", "28.5", "29"];
    if missing("versions_mix_and_each_can_do_what_docker_can", &versions) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::start(options(&dir.path().join("data"), 4, &versions)).await;
    let daemons = pool.ready().await;
    let context = dir.path().join("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::write(context.join("Dockerfile"), "FROM busybox\nRUN echo built > /made\n").unwrap();
    for (daemon, version) in daemons.iter().zip(versions) {
        let served = daemon.docker(&["version", "--format", "{{.Server.Version}}"]);
        assert!(served.starts_with(version), "{served} is not {version}");
        daemon.import_busybox();
        let id = daemon.docker(&SLEEP);
        assert!(daemon.docker(&["top", &id]).contains("sleep 1000"), "{version}: top");
        let stats = daemon.docker(&["stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}}", &id]);
        assert!(stats.ends_with(" 1") && !stats.starts_with("0B"), "{version}: stats: {stats}");
        assert_eq!(daemon.docker(&["exec", &id, "echo", "in"]), "in");
        assert_eq!(daemon.docker(&["run", "--rm", "--init", "-m", "64m", "busybox", "echo", "init"]), "init");
        assert_eq!(
            daemon.docker(&["run", "--rm", "--net=host", "--pid=host", "busybox", "hostname"]),
            daemon.0.id
        );
        let privileged = daemon.try_docker(&["run", "--rm", "--privileged", "busybox", "true"]);
        // 20.10's runtime wants every capability there is, and a virtual machine may lack one.
        assert!(privileged.status.success() || version == "20.10", "{version}: {privileged:?}");
        daemon.docker(&["network", "create", "own"]);
        daemon.docker(&[
            "run",
            "-d",
            "--stop-signal=KILL",
            "--net=own",
            "-p",
            "8080:80",
            "busybox",
            "httpd",
            "-f",
        ]);
        let published = format!("{}:8080", daemon.source_ip());
        until("a published port answers", || std::net::TcpStream::connect(&published).is_ok()).await;
        daemon.docker(&["build", "-q", "-t", "classic", context.to_str().unwrap()]);
        assert_eq!(daemon.docker(&["run", "--rm", "classic", "cat", "/made"]), "built");
        if let Some(output) = daemon.buildx(&context, dir.path()) {
            assert!(output.status.success(), "{version}: {}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(daemon.docker(&["run", "--rm", "buildkit", "cat", "/made"]), "built");
        }
    }
    let (data, id) = (pool.data.clone(), pool.id());
    let all: Vec<i32> = daemons.iter().flat_map(Daemon::processes).collect();
    pool.stop().await;
    assert_eq!(all.into_iter().filter(|pid| alive(*pid)).collect::<Vec<_>>(), Vec::<i32>::new());
    assert_eq!(traces(&data, &id), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_comes_back_as_itself_without_its_old_processes() {
    if missing("a_killed_daemon_comes_back_as_itself_without_its_old_processes", &["28.5"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::start(options(&dir.path().join("data"), 2, &["28.5"])).await;
    let daemons = pool.ready().await;
    let (victim, other) = (&daemons[0], &daemons[1]);
    let identity = victim.docker(&["info", "--format", "{{.ID}}"]);
    victim.import_busybox();
    victim.docker(&SLEEP);
    // dockerd itself, our init, our keeper: whoever dies, all of it goes and comes back.
    for who in ["dockerd", "init", "keeper"] {
        let before = victim.processes();
        let bystander = other.pid("dockerd");
        kill(victim.pid(who));
        let noticed = |seen: &dindpool::provision::Observation| seen.daemons[0].pending.is_some();
        let seen = pool.seen("its death is told", noticed).await;
        assert!(seen.daemons[1].pending.is_none(), "the other one is not concerned");
        let back = pool.ready().await;
        assert_eq!(back[0].0.endpoint, victim.0.endpoint);
        assert_eq!(before.into_iter().filter(|pid| alive(*pid)).collect::<Vec<_>>(), Vec::<i32>::new());
        assert_eq!(victim.docker(&["info", "--format", "{{.ID}}"]), identity);
        assert_eq!(victim.docker(&["ps", "-aq"]).lines().count(), 1, "it knows its container");
        let id = victim.docker(&["ps", "-aq"]);
        victim.docker(&["start", &id]);
        assert_eq!(other.pid("dockerd"), bystander);
    }
    pool.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_owners_daemons_are_adopted_with_all_that_runs_on_them() {
    if missing("a_killed_owners_daemons_are_adopted_with_all_that_runs_on_them", &["28.5"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let owner = Owner::start(&data, 3, false);
    let second = process::start(options(&data, 1, &["28.5"])).await.err().expect("the data is in use");
    assert!(second.to_string().contains("in use by another dindpool (process "), "{second}");
    owner.kill();

    let left: Vec<Daemon> = (0..3).map(|index| Daemon::of(&data, index)).collect();
    left[0].import_busybox();
    let container = left[0].docker(&SLEEP);
    let before: Vec<i32> = left.iter().map(|daemon| daemon.pid("dockerd")).collect();

    // The next one wants two daemons: the third is ended.
    let lasting = |daemons| Options { remove_data: false, ..options(&data, daemons, &["28.5"]) };
    let pool = Pool::start(lasting(2)).await;
    assert_eq!(pool.ready().await.len(), 2);
    assert_eq!(
        (left[0].pid("dockerd"), left[1].pid("dockerd")),
        (before[0], before[1]),
        "the same processes"
    );
    assert_eq!(left[0].docker(&["ps", "-q", "--no-trunc"]), container, "and it runs on");
    assert!(!alive(before[2]), "the third is not wanted any more");
    // An adopted one is watched like one of our own.
    kill(before[1]);
    pool.seen("the death of an adopted daemon is told", |seen| seen.daemons[1].pending.is_some()).await;
    pool.ready().await;
    pool.stop().await;

    // With other arguments it would be another daemon: not adopted, but started anew on the same data.
    let owner = Owner::start(&data, 1, false);
    owner.kill();
    let former = left[0].pid("dockerd");
    let pool = Pool::start(Options { extra_args: vec!["--label=changed=1".into()], ..lasting(1) }).await;
    pool.ready().await;
    assert!(!alive(former));
    assert_eq!(left[0].docker(&["info", "--format", "{{.Labels}}"]), "[changed=1]");
    let id = pool.id();
    pool.stop().await;
    assert_eq!(traces(&data, &id), Vec::<String>::new());
    assert!(data.join("dind-2/root").is_dir(), "lasting data is the user's");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_killed_at_any_moment_of_a_start_costs_nothing() {
    if missing("an_owner_killed_at_any_moment_of_a_start_costs_nothing", &["28.5"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    for moment in [10, 30, 60, 100, 150, 250, 400, 700, 1000] {
        let owner = Owner::begin(&data, 2, false);
        tokio::time::sleep(Duration::from_millis(moment)).await; // not a wait: another moment each time
        owner.kill();
    }
    let pool = Pool::start(Options { remove_data: false, ..options(&data, 2, &["28.5"]) }).await;
    let daemons = pool.ready().await;
    daemons[1].import_busybox();
    daemons[1].docker(&SLEEP);
    let (data, id) = (pool.data.clone(), pool.id());
    pool.stop().await;
    assert_eq!(traces(&data, &id), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_owner_of_temporary_data_takes_its_daemons_along() {
    if missing("a_killed_owner_of_temporary_data_takes_its_daemons_along", &["28.5"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (data, other) = (dir.path().join("temporary"), dir.path().join("other"));
    let owner = Owner::start(&data, 1, true);
    let processes = Daemon::of(&data, 0).processes();
    let id = pool_id(&data);
    owner.kill();
    until("all of it is dead", || !processes.iter().any(|pid| alive(*pid))).await;
    // Files are left, until any dindpool starts on this machine.
    let pool = Pool::start(options(&other, 1, &["28.5"])).await;
    assert!(!data.exists(), "removed");
    assert_eq!(traces(&data, &id), Vec::<String>::new());
    pool.ready().await;
    pool.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pools_live_side_by_side() {
    if missing("two_pools_live_side_by_side", &["28.5"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = tokio::join!(
        Pool::start(options(&dir.path().join("one"), 2, &["28.5"])),
        Pool::start(options(&dir.path().join("two"), 2, &["28.5"])),
    );
    let daemons: Vec<Daemon> = one.ready().await.into_iter().chain(two.ready().await).collect();
    let distinct: BTreeSet<_> = daemons.iter().map(Daemon::source_ip).collect();
    assert_eq!(distinct.len(), 4);
    one.stop().await;
    daemons[2].import_busybox();
    let (outside, machine) = server_outside();
    assert_eq!(daemons[2].address_seen_by(outside), machine, "the other pool's end costs it nothing");
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_cannot_start_says_why_and_is_tried_again() {
    if missing("a_daemon_that_cannot_start_says_why_and_is_tried_again", &["28.5"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(&dir.path().join("data"), 1, &["28.5"]);
    options.extra_args = vec!["--storage-driver=nonsense".into()];
    let pool = Pool::start(options).await;
    let seen = pool.seen("a second failure", |seen| {
        seen.daemons.iter().any(|daemon| daemon.pending.as_ref().is_some_and(|text| text.contains("in 1 s")))
    });
    let seen = seen.await;
    assert!(seen.problems[0].starts_with("dind-0: dockerd did not start: "), "{seen:?}");
    assert!(seen.problems[0].contains("nonsense"), "{seen:?}");
    pool.stop().await;
}

#[test]
fn it_works_beside_a_docker_of_the_machines_own() {
    if missing("it_works_beside_a_docker_of_the_machines_own", &["26.1", "28.5"]) {
        return;
    }
    on_another_machine("beside_a_docker_of_the_machines_own");
}

/// Runs on the machine that `it_works_beside_a_docker_of_the_machines_own` makes, and nowhere else.
#[tokio::test(flavor = "multi_thread")]
async fn beside_a_docker_of_the_machines_own() {
    if std::env::var_os("ON_ANOTHER_MACHINE").is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let root = format!("--root={}", at("containerd"));
    let _containerd = Background::start("26.1", "containerd", &[&root], Path::new(&at("containerd.log")));
    until("the machine's containerd", || Path::new("/run/containerd/containerd.sock").exists()).await;
    std::fs::write("/etc/docker/daemon.json", r#"{"labels": ["machine=yes"]}"#).unwrap();
    let root = format!("--data-root={}", at("docker"));
    let dockerd = Background::start("26.1", "dockerd", &[&root], Path::new(&at("docker.log")));
    let system = Daemon::at(Path::new("/run/docker.sock"), "system");
    until("the machine's dockerd", || system.try_docker(&["info"]).status.success()).await;
    system.import_busybox();
    let container = system.docker(&SLEEP);
    assert!(Command::new("iptables").args(["-P", "FORWARD", "DROP"]).status().unwrap().success());

    let pool = Pool::start(options(&dir.path().join("data"), 2, &["26.1", "28.5"])).await;
    let (outside, machine) = server_outside();
    for daemon in pool.ready().await {
        daemon.import_busybox();
        daemon.docker(&SLEEP);
        assert_eq!(daemon.address_seen_by(outside), machine);
        assert_eq!(
            daemon.docker(&["info", "--format", "{{.Labels}}"]),
            "[]",
            "not the machine's daemon.json"
        );
    }
    let ctr = Command::new(harness::dockerd("26.1").with_file_name("ctr"))
        .args(["--namespace=moby", "containers", "list", "-q"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&ctr.stdout).trim(),
        container,
        "ours are not in the machine's containerd"
    );
    pool.stop().await;
    assert_eq!(system.docker(&["ps", "-q", "--no-trunc"]), container, "the machine's own is as before");
    assert_eq!(system.address_seen_by(outside), machine);
    system.docker(&["rm", "-f", &container]);
    drop(dockerd);
}

/// The process that other tests start and kill; by itself it does nothing.
#[tokio::test(flavor = "multi_thread")]
async fn owner() {
    Owner::main().await;
}
