//! Daemons whose API versions have nothing in common.

use crate::common::client::{self, Session};
use crate::common::dockerd::Dockerd;
use crate::common::pool::Pool;
use crate::common::{parts, say, secs, short_dir, unique, wait_until};

/// 20.10 ends at 1.41, and 29.0 to 29.2 begin at 1.44; later ones begin lower again, unless they are told.
#[test]
fn row_45_a_daemon_without_a_common_version_is_refused_with_an_alarm_and_clients_go_on_elsewhere() {
    crate::require!(parts::all(&[
        "busybox/rootfs.tar",
        "cli-28/docker",
        "cli-20.10/docker",
        "buildx-0.29/docker-buildx",
        "docker-20.10/bin/dockerd",
        "docker-29/bin/dockerd",
    ]));
    let roots = [short_dir(), short_dir(), short_dir()];
    let old = Dockerd::start("20.10", roots[0].path());
    let new = [1, 2].map(|n| Dockerd::with_env("29", roots[n].path(), "DOCKER_MIN_API_VERSION", "1.44"));
    let pool = Pool::serve([&old.addr, &new[0].addr, &new[1].addr]).start();
    pool.wait_healthy(2, secs(30));
    let told = "its API versions 1.12 to 1.41 do not meet the pool's 1.44 to";
    wait_until("the old one is refused", secs(60), || pool.status()["daemons"].to_string().contains(told));
    let status = pool.status();
    let all = status["daemons"].as_array().unwrap();
    // In the order of their random paths.
    let old_one = all.iter().position(|d| d["reason"].as_str().unwrap().contains(told)).unwrap();
    let daemon = &all[old_one];
    assert_eq!(
        (daemon["health"].as_str(), daemon["version"].as_str().map(|v| &v[..5])),
        (Some("ejected"), Some("20.10"))
    );
    assert_eq!(status["api"][0], "1.44", "{status}");
    // The alarm, in each place where somebody may look.
    let problems = status["problems"].to_string();
    assert!(problems.contains(told), "{problems}");
    let id = daemon["id"].as_str().unwrap();
    let refused = |id: &str| pool.metric(&format!("dindpool_daemon_refused{{daemon=\"{id}\"}}"));
    assert_eq!(refused(id), 1.0);
    let mut others = all.iter().enumerate().filter(|(i, _)| *i != old_one);
    assert!(others.all(|(_, d)| refused(d["id"].as_str().unwrap()) == 0.0));
    let logged = || pool.log().lines().any(|l| l.contains("ERROR") && l.contains(told));
    wait_until("the log says so", secs(5), logged);
    let shown = std::process::Command::new(env!("CARGO_BIN_EXE_dindpool"))
        .args(["status", "--admin", &pool.admin_url()])
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains(&format!("problem: daemon {id} is refused: {told}")), "{shown}");
    say(format!("          row 45: {}", shown.lines().find(|l| l.starts_with("problem")).unwrap()));

    // Everything that clients do goes to the majority.
    let daemons = pool.daemons();
    for flavour in [client::CLI_28, client::BUILDX_29, client::CLI_28, client::BUILDX_29] {
        let (t, name) = (Session::new(&pool.host(), flavour), format!("v{}", unique()));
        t.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
        t.ok(&format!("docker build -q --network none -t {name} ctx"));
        t.ok(&format!("docker run --name {name} --network none {name} true"));
        let here: Vec<bool> = daemons.iter().map(|d| d.has_container(&name)).collect();
        assert!(!here[old_one] && here.iter().filter(|h| **h).count() == 1, "{here:?}");
    }
    // A client that speaks nothing that the majority does is told so, and not sent to the minority.
    let t = Session::new(&pool.host(), client::CLI_20);
    let out = t.fails("docker create --network none nothing");
    say(format!("          row 45: a client of 20.10: {}", out.stderr.trim()));
    assert!(out.stderr.contains("1.41") && out.stderr.contains("1.44"), "{}", out.all());
    // Where the majority is met, the minority is not refused any more.
    drop(pool);
    let alone = Pool::serve([&old.addr]).start();
    alone.wait_healthy(1, secs(20));
    assert_eq!(alone.status()["problems"].as_array().map(Vec::len), Some(0));
}
