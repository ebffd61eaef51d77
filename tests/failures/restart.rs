//! A proxy that is killed, and the next one: nothing is stored, so it learns from the daemons before it answers.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::builds::HangingBuild;
use crate::common::client::{self, Session};
use crate::common::daemon::Daemon;
use crate::common::fake_daemon::FakeDaemon;
use crate::common::http::{self, Addr, Conn};
use crate::common::pool::Pool;
use crate::common::{millis, parts, say, secs, unique, wait_until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// A request of the session `key`.
fn ask(addr: &Addr, key: &str, method: &str, path: &str, body: Option<&Value>) -> http::Answer {
    http::request(addr, method, &format!("/s/{key}{path}"), body)
}

#[test]
fn row_12_a_proxy_that_was_killed_is_followed_by_one_that_knows_containers_and_execs() {
    crate::require!(parts::all(&["busybox/rootfs.tar", "cli-28/docker", "buildx-0.29/docker-buildx"]));
    let daemons = crate::require!(parts::dockerd("28.5").map(|dockerd| Pool::up(&[dockerd], 2).start()));
    daemons.wait_healthy(2, secs(60));
    let all: Vec<Daemon> = daemons.daemons();
    let front = Pool::serve(all.iter().map(|d| &d.addr)).start();
    front.wait_healthy(2, secs(20));

    // A container and an exec of it on each daemon, made directly: neither session nor list tells of the execs.
    let t = Session::new(&front.host(), client::CLI_28);
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    let mut made = Vec::new();
    for daemon in &all {
        let (name, at) = (format!("r{}", unique()), format!("docker -H {}", daemon.addr.url()));
        t.ok(&format!("{at} build -q -t r ctx && {at} run -d --name {name} --network none r sleep 600"));
        let container = daemon.get(&format!("/containers/{name}/json"))["Id"].as_str().unwrap().to_owned();
        let command = json!({ "Cmd": ["echo", name], "AttachStdout": true });
        let path = format!("/containers/{container}/exec");
        let exec = http::request(&daemon.addr, "POST", &path, Some(&command)).json()["Id"].clone();
        made.push((name, container, exec.as_str().unwrap().to_owned()));
    }
    // And two builds and a wait, which end when the proxy does, neither of them well.
    let build = HangingBuild::start(&front, client::BUILDX_29);
    let classic = HangingBuild::start(&front, client::CLI_28);
    let wait = t.start(&format!("exec docker wait {}", made[0].0));
    wait_until("it waits", secs(10), || front.metric("dindpool_streams{kind=\"exchange\"}") >= 2.0);
    front.signal(Signal::SIGKILL);
    let killed = Instant::now();
    drop(front);
    for (what, job) in [("buildx", &build.job), ("classic build", &classic.job), ("wait", &wait)] {
        let out = job.wait(secs(10));
        assert!(out.code != 0 && !out.stderr.trim().is_empty(), "{what}: {}: {}", out.code, out.all());
    }
    wait_until("the daemons have stopped the builds", secs(10), || !build.runs() && !classic.runs());
    say(format!(
        "          row 12: three streams ended badly, and their builds, {:?} after a SIGKILL",
        killed.elapsed()
    ));

    let next = Pool::serve(all.iter().map(|d| &d.addr)).start();
    // At once, from sessions that have no daemon, and from one that is bound to the other daemon.
    for key in ["fresh", "bound"] {
        for (n, (name, container, exec)) in made.iter().enumerate() {
            let key = &format!("{key}{n}");
            if key.starts_with("bound") {
                let other = &made[1 - n].0;
                let body = json!({ "Image": "r", "Cmd": ["true"], "HostConfig": { "VolumesFrom": [other] } });
                assert_eq!(ask(&next.tcp, key, "POST", "/containers/create", Some(&body)).head.status(), 201);
            }
            for reference in [name, container] {
                let answer = ask(&next.tcp, key, "GET", &format!("/containers/{reference}/json"), None);
                assert_eq!(answer.head.status(), 200, "{key} {reference}: {}", answer.text());
                assert_eq!(answer.json()["Id"].as_str(), Some(container.as_str()));
            }
            let answer = ask(&next.tcp, key, "GET", &format!("/exec/{exec}/json"), None);
            assert_eq!(answer.head.status(), 200, "{key}: {}", answer.text());
            assert_eq!(answer.json()["ContainerID"].as_str(), Some(container.as_str()));
        }
    }
    assert_eq!(next.metric("dindpool_lookups_total{outcome=\"found\"}"), 2.0, "each exec is asked for once");
    for (name, _, exec) in &made {
        let body = json!({ "Detach": false, "Tty": true });
        let answer = ask(&next.tcp, "starter", "POST", &format!("/exec/{exec}/start"), Some(&body));
        assert!(answer.text().contains(name.as_str()), "{}", answer.text());
    }
    let nobody = format!("/exec/{}/json", "ab".repeat(32));
    assert_eq!(ask(&next.tcp, "fresh0", "GET", &nobody, None).head.status(), 404);
    assert_eq!(next.metric("dindpool_lookups_total{outcome=\"nowhere\"}"), 1.0);
    all.iter().for_each(Daemon::remove_containers);
}

#[test]
fn row_12_nothing_is_looked_for_on_the_wrong_daemon_while_the_right_one_is_still_being_listed() {
    let id = "c0".repeat(32);
    let container = json!([{ "Id": id, "Names": ["/db"], "Image": "x", "ImageID": "", "State": "running", "Labels": {} }]);
    let ready = Arc::new(AtomicBool::new(false));
    let listed = ready.clone();
    let slow = FakeDaemon::start("/containers/", move |exchange| {
        if exchange.path().contains("/containers/json") {
            while !listed.load(Ordering::SeqCst) {
                std::thread::park_timeout(millis(5));
            }
            exchange.json("200 OK", &container);
        } else {
            exchange.json("200 OK", &json!({ "Id": "here" }));
        }
    });
    let quick = FakeDaemon::idle();
    let pool = Pool::serve([&quick.addr, &slow.addr]).start();
    pool.wait_healthy(1, secs(20));
    let paths = ["/containers/db/json".to_owned(), format!("/containers/{id}/json")];
    let mut asked: Vec<Conn> = paths
        .iter()
        .map(|path| {
            let mut conn = Conn::connect(&pool.tcp);
            conn.send(format!("GET {path} HTTP/1.1\r\nHost: d\r\n\r\n"));
            conn
        })
        .collect();
    // What goes by no object is answered meanwhile.
    assert_eq!(http::get(&pool.tcp, "/info").head.status(), 200);
    assert_eq!(http::get(&pool.tcp, "/containers/json").head.status(), 200);
    ready.store(true, Ordering::SeqCst);
    for conn in &mut asked {
        let head = conn.head();
        assert_eq!(head.status(), 200);
        assert_eq!(conn.body("GET", &head), br#"{"Id":"here"}"#);
    }
    assert!(quick.seen_with("/db/").is_empty() && quick.seen_with(&id).is_empty());
}
