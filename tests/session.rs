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
    let host = pool.host();
    let said = shell.ok(&format!(
        "{open}; d=$DINDPOOL_SESSION_DIR; eval \"$({DINDPOOL} session end)\"; \
         echo $DOCKER_HOST ${{DINDPOOL_SESSION-none}}; for i in 1 2 3 4 5 6 7 8 9; do [ -e $d ] && sleep 0.2; done; ls -d $d 2>&1; \
         docker version >/dev/null && echo plain"
    ));
    assert!(said.starts_with(&format!("{host} none\n")), "{said}");
    assert!(said.contains("No such file") && said.ends_with("plain\n"), "{said}");
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
    // Without a name there is no session to enter.
    let mut conn = Conn::connect(&Addr::parse(&pool.host()));
    conn.send("POST /dindpool/session HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(conn.head().status(), 400);
}
