//! A dockerd that the kernel kills because its memory is all used.

use std::io::Write;
use std::time::Instant;

use crate::builds::{BUILDERS, Counter, HangingBuild, last_line, works};
use crate::common::dockerd::{Dockerd, MemoryLimit};
use crate::common::http::{Addr, Conn};
use crate::common::pool::Pool;
use crate::common::{parts, poll, say, secs, short_dir, wait_until};

/// What dockerd reads into memory before it answers: the body of a `create`, of a size that only its memory bounds.
const GREED: usize = 512 << 20;

/// Makes a dockerd need memory until it has none left.
fn greedy(daemon: &Addr) {
    let Ok(mut conn) = Conn::try_connect(daemon) else { return };
    let head = format!(
        "POST /containers/create HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: {GREED}\r\n\r\n"
    );
    let block = vec![b'x'; 1 << 20];
    let mut sent =
        conn.stream.write_all(head.as_bytes()).and_then(|()| conn.stream.write_all(b"{\"Image\":\""));
    while sent.is_ok() {
        sent = conn.stream.write_all(&block); // until nobody is there any more
    }
}

#[test]
fn row_04_a_daemon_killed_for_want_of_memory_fails_its_builds_within_a_second_and_nobody_elses() {
    crate::require!(parts::all(&[
        "busybox/rootfs.tar",
        "cli-28/docker",
        "cli-20.10/docker",
        "buildx-0.29/docker-buildx",
        "docker-28.5/bin/dockerd",
    ]));
    let limits = [crate::require!(MemoryLimit::new()), crate::require!(MemoryLimit::new())];
    let roots = [short_dir(), short_dir()];
    let mut daemons = [0, 1].map(|n| Dockerd::within("28.5", roots[n].path(), &limits[n]));
    let pool = Pool::serve(daemons.iter().map(|d| &d.addr))
        .env("DINDPOOL_SLOTS", "8")
        .env("DINDPOOL_SLOT_LINGER", "0s")
        .start();
    let host = pool.host();
    for flavour in BUILDERS {
        // Whoever comes next must find both daemons alike: no slow start, no work.
        wait_until("both are idle", secs(90), || {
            let status = pool.status();
            let mut all = status["daemons"].as_array().unwrap().iter();
            all.all(|d| d["health"] == "healthy" && d["open_slots"] == 8 && d["used"] == 0)
        });
        let build = HangingBuild::start(&pool, flavour);
        let own = build.bound_to(&pool);
        let victim = daemons.iter().position(|d| d.addr == own).unwrap();
        let victims = pool.daemons().into_iter().find(|d| d.addr == own).unwrap();
        let others: Vec<Counter> = (0..3).map(|_| Counter::start(&host)).collect();
        let (near, far): (Vec<Counter>, Vec<Counter>) =
            others.into_iter().partition(|c| victims.has_container(&c.name));
        assert!(!far.is_empty(), "three sessions beside a build, and all on its daemon");
        let kills = limits[victim].kills();
        limits[victim].leave(8 << 20);
        let (time, out) = std::thread::scope(|scope| {
            let (one, limit) = (&mut daemons[victim], &limits[victim]);
            let addr = one.addr.clone();
            scope.spawn(move || greedy(&addr));
            let (signal, _) = poll(secs(30), || one.died_of()).expect("the kernel kills it");
            let start = Instant::now();
            assert_eq!(
                (signal, limit.kills() > kills),
                (libc::SIGKILL, true),
                "it is the kernel that kills it"
            );
            let out = build.job.wait(secs(30));
            (start.elapsed().as_millis(), out)
        });
        say(format!(
            "          row 4: {}: exit {} after {time} ms: {}",
            flavour.name,
            out.code,
            last_line(&out.stderr)
        ));
        assert_ne!(out.code, 0, "{}", out.all());
        assert!(!out.stderr.trim().is_empty(), "there is a message");
        assert!(time <= 1000, "{time} ms");
        works(&pool, flavour);
        for counter in &far {
            counter.counts();
            counter.stop(&host);
        }
        drop(near);
        assert_eq!(pool.healthy(), 1);
        limits[victim].lift();
        daemons[victim].restart();
    }
    pool.wait_healthy(2, secs(60));
}
