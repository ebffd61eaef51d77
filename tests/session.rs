//! `eval "$(dindpool session)"`: a shell's own session, for clients that cannot say whose they are.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::client::{self, Session};
use common::http::{Addr, Conn};
use common::pool::Pool;
use common::{parts, secs, wait_until};

const DINDPOOL: &str = env!("CARGO_BIN_EXE_dindpool");

fn pool() -> Result<Pool, String> {
    parts::all(&["busybox/rootfs.tar", "cli-28/docker", "buildx-0.29/docker-buildx"])?;
    let pool = Pool::up(&[parts::dockerd("28.5")?], 2).env("DINDPOOL_SLOTS", "2").start();
    pool.wait_healthy(2, secs(60));
    Ok(pool)
}

/// The line of a script that opens one.
fn open(pool: &Pool) -> String {
    format!("eval \"$({DINDPOOL} session --pool {})\"", pool.host())
}

/// Where the sessions of these names are.
fn daemons(pool: &Pool, names: &BTreeSet<&str>) -> BTreeSet<String> {
    let own = |s: &serde_json::Value| {
        s["key"].as_str().and_then(|key| key.strip_prefix("name:")).is_some_and(|name| names.contains(name))
    };
    let sessions = pool.sessions();
    sessions.iter().filter(|s| own(s)).map(|s| s["daemon"].as_str().unwrap().to_owned()).collect()
}

/// From one shell and one address they would be one session, and buildx says nothing else.
#[test]
fn buildx_builds_of_four_sessions_in_one_shell_spread_and_none_sees_another() {
    let pool = require!(pool());
    let shell = Session::new(&pool.host(), client::BUILDX_29);
    shell.context("ctx", "FROM scratch\nADD rootfs.tar /\nARG MARK\nRUN echo $MARK > /mark\n");
    let open = open(&pool);
    let one = "docker build -q --network none --build-arg MARK=$1 -t same:1 ctx >/dev/null && \
               docker run --name same$1 --network none same:1 true && echo $1 $DINDPOOL_SESSION";
    let said = shell.ok(&format!("one() {{ ( {open}; {one} ) }}; for i in 1 2 3 4; do one $i & done; wait"));
    let names: BTreeSet<&str> =
        said.lines().filter_map(|line| line.split_once(' ')).map(|(_, name)| name).collect();
    assert_eq!(names.len(), 4, "{said}");
    assert_eq!(daemons(&pool, &names).len(), 2, "both daemons are used");
    // The control: without it the same shell is one session.
    shell.ok("docker build -q --network none --build-arg MARK=5 -t other:1 ctx");
    assert_eq!(pool.sessions().len(), 5);
}

#[test]
fn a_session_ends_with_its_shell_or_when_it_is_told_to() {
    let pool = require!(pool());
    let open = open(&pool);
    let shell = Session::new(&pool.host(), client::CLI_28);
    let dir = shell.ok(&format!("{open}; docker version >/dev/null; echo $DINDPOOL_SESSION_DIR"));
    wait_until("it has gone with its shell", secs(10), || !Path::new(dir.trim()).exists());
    let ended = format!("eval \"$({DINDPOOL} session end)\"");
    let host = pool.host();
    let said = shell.ok(&format!(
        "{open}; d=$DINDPOOL_SESSION_DIR; {ended}; \
         echo $DOCKER_HOST ${{DINDPOOL_SESSION-none}}; for i in 1 2 3 4 5 6 7 8 9; do [ -e $d ] && sleep 0.2; done; ls -d $d 2>&1; \
         docker version >/dev/null && echo plain"
    ));
    assert!(said.starts_with(&format!("{host} none\n")), "{said}");
    assert!(said.contains("No such file") && said.ends_with("plain\n"), "{said}");
    // Where there was none before, a prune after the end is this machine's and not the pool's.
    let said = shell.ok(&format!("unset DOCKER_HOST; {open}; {ended}; echo ${{DOCKER_HOST-none}}"));
    assert_eq!(said, "none\n");
    let said = shell.ok(&format!("export DOCKER_HOST='unix:///a b'; {open}; {ended}; echo $DOCKER_HOST"));
    assert_eq!(said, "unix:///a b\n");
}

/// Its name is all that guards a session, and `ps` shows arguments to everybody.
#[test]
fn the_name_is_no_argument_of_any_process() {
    let pool = require!(pool());
    let shell = Session::new(&pool.host(), client::CLI_28);
    // It may begin like a flag.
    let said = shell.ok(&format!(
        "eval \"$({DINDPOOL} session --pool {} --key=-secret)\"; docker version >/dev/null; echo $DINDPOOL_SESSION; \
         cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'",
        pool.host()
    ));
    let (name, arguments) = said.split_once('\n').unwrap();
    assert_eq!(name, "-secret");
    assert!(arguments.lines().any(|argument| argument == "relay"), "{arguments}");
    assert!(arguments.lines().all(|argument| !argument.contains("-secret")), "{arguments}");
}

#[test]
fn input_and_output_end_one_by_one() {
    let pool = require!(pool());
    let open = open(&pool);
    let shell = Session::new(&pool.host(), client::CLI_28);
    shell.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    let run = "docker run --rm -i --network none half:1";
    let said = shell.ok(&format!(
        "{open}; docker build -q -t half:1 ctx >/dev/null; echo hi | {run} sh -c 'cat; usleep 300000; echo after'; \
         head -c 3M /dev/urandom >blob; md5sum <blob; {run} md5sum <blob; {run} cat <blob | md5sum"
    ));
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..2], ["hi", "after"]);
    assert!(lines.len() == 5 && lines[2] == lines[3] && lines[2] == lines[4], "{said}");
}

#[test]
fn a_session_whose_pool_has_gone_says_so_to_each_client_and_buildx_stays_with_it() {
    let pool = require!(pool());
    let open = open(&pool);
    let shell = Session::new(&pool.host(), client::BUILDX_29);
    shell.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    let job = shell.start(&format!(
        "{open}; docker version >/dev/null; echo open; until test -e gone; do sleep 0.05; done; \
         docker ps; echo ps $?; docker build ctx; echo build $?; DOCKER_BUILDKIT=0 docker build ctx; echo classic $?"
    ));
    wait_until("the session is open", secs(30), || job.stdout().contains("open"));
    let host = pool.host();
    pool.stop();
    shell.write("gone", "");
    let out = job.wait(secs(60));
    for step in ["ps 1", "build 1", "classic 1"] {
        assert!(out.stdout.contains(step), "{}", out.all());
    }
    let words = format!("no connection to {host}");
    assert!(out.stderr.matches(&words).count() >= 3, "{}", out.all());
    assert!(!out.all().contains("docker-container") && !out.all().contains("moby/buildkit"), "{}", out.all());
}

#[test]
fn what_keeps_it_from_listening_is_said_and_leaves_nothing() {
    let pool = require!(pool());
    let shell = Session::new(&pool.host(), client::CLI_28);
    let long = shell.path(&"x".repeat(100));
    std::fs::create_dir_all(&long).unwrap();
    let long = long.display().to_string();
    let session = format!("env -u XDG_RUNTIME_DIR TMPDIR={long} {DINDPOOL} session --pool {}", pool.host());
    let said = shell.fails(&session).all();
    assert!(
        said.contains("cannot listen on") && said.contains("a shorter XDG_RUNTIME_DIR or TMPDIR"),
        "{said}"
    );
    assert_eq!(std::fs::read_dir(&long).unwrap().count(), 0);
}

#[test]
fn whatever_is_no_dindpool_is_told_so_at_once() {
    let pool = require!(pool());
    let plain = pool.daemons()[0].addr.url();
    let shell = Session::new(&pool.host(), client::CLI_28);
    let said = shell.fails(&format!("{DINDPOOL} session --pool {plain}")).all();
    assert!(said.contains("is it a dindpool?"), "{said}");
    let said = shell.fails(&format!("{DINDPOOL} session --pool tcp://127.0.0.1:9")).all();
    assert!(said.contains("no connection to tcp://127.0.0.1:9"), "{said}");
    let said = shell.fails(&format!("{DINDPOOL} session --key 'a b' --pool {}", pool.host())).all();
    assert!(said.contains("X-Dindpool-Session must be"), "{said}");
    // A path before all others is a tenant of the pool's, on everything.
    let said = shell.ok(&format!(
        "eval \"$({DINDPOOL} session --pool {}/t/team-a --key t1)\"; docker ps -q; docker network create t1net >/dev/null; echo ok",
        pool.host()
    ));
    assert_eq!(said, "ok\n");
    let sessions = pool.sessions();
    assert!(sessions.iter().any(|s| s["key"] == "team-a/name:t1" && s["tenant"] == "team-a"), "{sessions:?}");
    // Without a name there is no session to enter.
    let mut conn = Conn::connect(&Addr::parse(&pool.host()));
    conn.send("POST /dindpool/session HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(conn.head().status(), 400);
}
