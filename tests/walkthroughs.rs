//! Whole stories, as users live them: what a CI system, a compose project, a machine behind NAT or a container does
//! with a pool from beginning to end. docs/sessions.md has the list. Real daemons and real clients, and the evidence
//! is what each daemon itself has.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod common;

use std::path::Path;

use common::client::{self, Session};
use common::daemon::Daemon;
use common::http::Addr;
use common::netns::{Bridge, listen_inside};
use common::pool::Pool;
use common::{parts, poll, secs, unique, wait_until};
use serde_json::Value;

/// A terminal that speaks with one daemon, past every pool.
fn direct(daemon: &Daemon) -> Session {
    Session::new(&daemon.addr.url(), client::CLI_28)
}

/// Gives a daemon the image `base:1`, past every pool.
fn import_base(daemon: &Daemon) {
    direct(daemon).ok(&format!("docker import {} base:1", parts::busybox("rootfs.tar").display()));
}

fn tickets(pool: &Pool) -> Vec<Value> {
    pool.status()["queue"]["tickets"].as_array().unwrap().clone()
}

#[track_caller]
fn wait_tickets(pool: &Pool, n: usize) {
    if poll(secs(30), || (tickets(pool).len() == n).then_some(())).is_none() {
        panic!("not {n} tickets within 30 s: {:?}", tickets(pool));
    }
}

/// What a container is given to be a client: the CLI, buildx, and the libraries that they are linked with.
fn client_mounts() -> String {
    let parts = parts::dir();
    let part = |name: &str, to: &str| format!("-v {}:{to}:ro", parts.join(name).display());
    let mut mounts = vec![part("cli-28", "/cli"), part("buildx-0.29", "/root/.docker/cli-plugins")];
    let libraries = ["/lib", "/lib64"].into_iter().filter(|dir| Path::new(dir).exists());
    mounts.extend(libraries.map(|dir| format!("-v {dir}:{dir}:ro")));
    mounts.join(" ")
}

/// One daemon with one slot, and the session that has it is a container that itself builds and runs through the
/// pool. If that queued, it would wait for its own end. The queue is not only there but full: nobody else gets past.
#[test]
fn a_client_in_a_container_never_waits_for_the_slot_of_its_own_parent() {
    require!(parts::all(&["busybox/rootfs.tar", "cli-28/docker", "buildx-0.29/docker-buildx"]));
    let dockerd = require!(parts::dockerd("28.5"));
    let bridge = Bridge::new(1);
    let listen = format!("tcp://{}:0", bridge.ip);
    let settings = [("SLOTS", "1"), ("QUEUE_LIMIT", "1"), ("SESSION_GRACE", "2s"), ("SLOT_LINGER", "100ms")];
    let with = |pool: common::pool::PoolBuilder| {
        settings.iter().fold(pool, |pool, (name, value)| pool.env(&format!("DINDPOOL_{name}"), value))
    };
    let up = with(Pool::up(&[dockerd], 1).listen(&listen)).start();
    up.wait_healthy(1, secs(60));
    let daemon = up.daemons().remove(0);
    import_base(&daemon);
    inside_a_container(&up, &daemon, &bridge);

    // The same daemon, known by nothing but its address.
    let Addr::Unix(socket) = &daemon.addr else { panic!("a local pool has Unix sockets") };
    let namespace = format!("/proc/{}/ns/net", daemon.pid());
    let address = format!("{}:2375", ip_inside(&namespace));
    listen_inside(&namespace, &address, socket);
    let serve = with(Pool::serve(&[Addr::Tcp(address)]).listen(&listen)).start();
    serve.wait_healthy(1, secs(20));
    inside_a_container(&serve, &daemon, &bridge);
}

/// A daemon's address on its cable.
fn ip_inside(namespace: &str) -> String {
    let out = std::process::Command::new("nsenter")
        .arg(format!("--net={namespace}"))
        .args(["ip", "-j", "-4", "addr", "show", "eth0"])
        .output()
        .unwrap();
    let links: Value = serde_json::from_slice(&out.stdout).unwrap();
    links[0]["addr_info"][0]["local"].as_str().unwrap().to_owned()
}

fn inside_a_container(pool: &Pool, daemon: &Daemon, bridge: &Bridge) {
    let (host, mark) = (pool.listener(&bridge.ip).url(), unique());
    let parent = Session::new(&pool.host(), client::CLI_28);
    parent.write("Dockerfile", format!("FROM base:1\nRUN echo {mark} >/mark\n"));
    parent.write(
        "story",
        format!(
            "set -e\n\
             until test -e go; do usleep 50000; done\n\
             for kit in 0 1; do\n\
             export DOCKER_BUILDKIT=$kit\n\
             docker build --no-cache --network none -t inside{kit}:{mark} .\n\
             docker run --rm --network none inside{kit}:{mark} cat /mark\n\
             done >built\n\
             docker run -d --name left-{mark} --network none base:1 sleep 600 >left\n\
             touch done\n\
             until test -e end; do usleep 50000; done\n",
            kit = "$kit"
        ),
    );
    let work = parent.path("").display().to_string();
    let run = parent.start(&format!(
        "docker run --rm --name parent-{mark} -v {work}:/w -w /w -e HOME=/root -e DOCKER_HOST={host} \
         -e PATH=/cli:/bin:/usr/bin {} base:1 sh /w/story",
        client_mounts()
    ));
    wait_until("the parent has the slot", secs(30), || daemon.has_container(&format!("parent-{mark}")));

    // The control: a client from any other address waits, and one more is refused.
    let stranger = Session::with(&host, client::CLI_28).netns(&bridge.namespaces[0]).open();
    let waiting =
        stranger.start(&format!("docker run --rm --name stranger-{mark} --network none base:1 true"));
    wait_tickets(pool, 1);
    let refused = stranger.fails("docker create --network none base:1 true");
    assert!(refused.stderr.contains("the queue is full"), "{}", refused.all());

    parent.write("go", "");
    let ended = || parent.path("done").exists() || run.code().is_some();
    wait_until("the client inside is done", secs(60), ended);
    assert!(parent.path("done").exists(), "{}", run.wait(secs(1)).all());
    for kit in 0..2 {
        assert!(daemon.has_image(&format!("inside{kit}:{mark}")), "built on the parent's daemon");
    }
    let built = std::fs::read_to_string(parent.path("built")).unwrap();
    assert_eq!(built.lines().filter(|line| *line == mark).count(), 2, "both ran: {built}");
    assert!(daemon.has_container(&format!("left-{mark}")));
    assert_eq!(tickets(pool).len(), 1, "the stranger has waited all the time");
    assert!(!daemon.has_container(&format!("stranger-{mark}")));
    assert_eq!(pool.sessions().len(), 1, "the client inside is no session: {:?}", pool.sessions());

    parent.write("end", "");
    run.wait_ok(secs(30));
    waiting.wait_ok(secs(30));
    parent.ok(&format!("docker rm -f left-{mark}"));
}
