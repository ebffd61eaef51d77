//! Long streams through real daemons: silent ones, ones that nobody reads, ones whose daemon does not run, and ones
//! that end on one side first.

use std::path::Path;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::builds::works;
use crate::common::client::{self, Flavour, Job, Session};
use crate::common::daemon::processes;
use crate::common::dockerd::Dockerd;
use crate::common::pool::Pool;
use crate::common::{holds_for, parts, say, secs, short_dir, unique, wait_until};

const CONTEXT: &str = "FROM scratch\nADD rootfs.tar /\n";

fn needs() -> Result<(), String> {
    parts::all(&[
        "busybox/rootfs.tar",
        "cli-28/docker",
        "cli-20.10/docker",
        "buildx-0.29/docker-buildx",
        "docker-28.5/bin/dockerd",
        "docker-20.10/bin/dockerd",
    ])
}

/// A terminal with an image of busybox, whose name it tells.
fn terminal(pool: &Pool, flavour: Flavour) -> (Session, String) {
    let (t, image) = (Session::new(&pool.host(), flavour), format!("s{}", unique()));
    t.context("ctx", CONTEXT);
    t.ok(&format!("docker build -q --network none -t {image} ctx"));
    (t, image)
}

/// The time for which the streams are silent, while every deadline that can be set is a second.
const SILENCE: u64 = 3;

#[test]
fn row_23_streams_that_say_nothing_for_longer_than_every_deadline_are_not_cut() {
    crate::require!(needs());
    let root = short_dir();
    let daemon = Dockerd::start("28.5", root.path());
    let mut builder = Pool::serve([&daemon.addr]).env("DINDPOOL_SLOT_LINGER", "0s");
    for deadline in [
        "HEAD_DEADLINE",
        "PROBE_DEADLINE",
        "CONNECT_DEADLINE",
        "SESSION_GRACE",
        "CONTAINER_LEASE",
        "QUEUE_WAIT",
        "WARM_WAIT",
    ] {
        builder = builder.env(&format!("DINDPOOL_{deadline}"), "1s");
    }
    let pool = builder.start();
    pool.wait_healthy(1, secs(20));
    let (t, image) = terminal(&pool, client::CLI_28);
    let until = |file: &str| format!("until test -e /{file}; do usleep 50000; done");
    t.ok(&format!(
        "docker run -d --name {image} --network none {image} sh -c '{}; echo end; exit 7'",
        until("go")
    ));
    // Each in a terminal of its own, so that nobody's other requests keep its session busy.
    let start = |flavour: Flavour, script: String| {
        let t = Session::new(&pool.host(), flavour);
        t.context("ctx", CONTEXT);
        let job = t.start(&script);
        (t, job)
    };
    // The exec first: it goes with its container.
    let quiet = [
        ("exec", format!("exec docker exec {image} sh -c '{}; echo out'", until("out")), "out\n"),
        ("logs -f", format!("exec docker logs -f {image}"), "end\n"),
        ("wait", format!("exec docker wait {image}"), "7\n"),
        ("attach", format!("docker attach {image}; test $? = 7"), "end\n"),
    ];
    let quiet = quiet.map(|(what, script, said)| (what, start(client::CLI_28, script), said));
    let builds = [client::CLI_28, client::BUILDX_29, client::CLI_20_BUILDKIT].map(|flavour| {
        let (mark, tag) = (format!("7{}", unique().replace('x', ".")), format!("q{}", unique()));
        let t = Session::new(&pool.host(), flavour);
        t.context("ctx", &format!("{CONTEXT}RUN sleep {mark}; echo built >/mark\n"));
        let job = t.start(&format!("docker build --no-cache --network none -t {tag} ctx"));
        (flavour.name, mark, tag, (t, job))
    });
    wait_until("all builds are in their RUN", secs(60), || {
        builds.iter().all(|(_, mark, ..)| !processes(mark).is_empty())
    });
    let streams =
        || ["exchange", "tunnel"].map(|kind| pool.metric(&format!("dindpool_streams{{kind=\"{kind}\"}}")));
    // logs, wait and the classic build; exec, attach and two of BuildKit, each with its session at least.
    wait_until("all are under way", secs(20), || streams()[0] >= 3.0 && streams()[1] >= 4.0);
    let mut jobs: Vec<(&str, &Job)> = quiet.iter().map(|(what, (_, job), _)| (*what, job)).collect();
    jobs.extend(builds.iter().map(|(what, _, _, (_, job))| (*what, job)));
    let begun = Instant::now();
    holds_for("nothing ends", secs(SILENCE), || {
        if let Some((what, job)) = jobs.iter().find(|(_, job)| job.code().is_some()) {
            panic!("{what} was cut after {:?}: {:?}", begun.elapsed(), job.output());
        }
        true
    });
    for (what, (_, job), _) in &quiet {
        assert_eq!((job.stdout(), job.stderr()), (String::new(), String::new()), "{what} was silent");
    }
    let other = Session::new(&pool.host(), client::CLI_28);
    for (what, (_, job), said) in &quiet {
        match *what {
            "exec" => other.ok(&format!("docker exec {image} touch /out")),
            "logs -f" => other.ok(&format!("docker exec {image} touch /go")),
            _ => String::new(),
        };
        assert_eq!(job.wait(secs(20)).stdout, *said, "{what}");
    }
    for (what, mark, tag, (t, job)) in &builds {
        processes(mark).into_iter().for_each(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap());
        let out = job.wait(secs(60));
        assert_eq!(out.code, 0, "{what}: {}", out.all());
        assert_eq!(
            t.ok(&format!("says docker run --rm --network none {tag} cat /mark")),
            "built\n",
            "{what}"
        );
    }
    say(format!("          row 23: seven streams said nothing for {:?}", begun.elapsed()));
}

/// What is uploaded, in MiB, and how much of it the daemon has when it is stopped.
const UPLOAD: u64 = 128;
const TAKEN: u64 = 16 << 20;

#[test]
fn row_28_a_giant_upload_to_a_stopped_daemon_costs_no_memory_and_goes_on_with_it() {
    crate::require!(needs());
    let root = short_dir();
    let daemon = Dockerd::start("28.5", root.path());
    let pool = Pool::serve([&daemon.addr]).start();
    pool.wait_healthy(1, secs(20));
    let (t, image) = terminal(&pool, client::CLI_28);
    let sum =
        t.ok(&format!("head -c {UPLOAD}M /dev/urandom >ctx/big; md5sum <ctx/big | cut -d' ' -f1 | tee sum"));
    t.write("ctx/Dockerfile", format!("FROM {image}\nCOPY big /\n"));
    let build = format!("exec docker build -q --network none -t big{image} ctx");
    stopped_in_mid_upload(&pool, &daemon, root.path(), &t, "a classic build", &build);
    let load = "exec docker load -i saved.tar";
    t.ok(&format!("docker save -o saved.tar big{image} && docker rmi -f big{image}"));
    stopped_in_mid_upload(&pool, &daemon, root.path(), &t, "a load", load);
    let seen = t.ok(&format!("says docker run --rm --network none big{image} md5sum /big"));
    assert_eq!(seen.split(' ').next(), Some(sum.trim()), "it came whole, through both");
}

fn stopped_in_mid_upload(pool: &Pool, daemon: &Dockerd, root: &Path, t: &Session, what: &str, script: &str) {
    let temporary = root.join("tmp");
    let before = size(&temporary);
    let (memory, job) = (pool.peak_rss(), t.start(script));
    wait_until("the daemon has some of it", secs(30), || {
        assert!(job.output().is_none(), "{what}: {:?}", job.output());
        size(&temporary) >= before + TAKEN
    });
    daemon.signal(Signal::SIGSTOP);
    let out = wait_until("it is noticed", secs(10), || pool.healthy() == 0);
    // What unpacks the context is a process of its own, and had some more to write.
    let taken = size(&temporary) - before;
    assert!(taken < UPLOAD << 20, "{what}: all {taken} bytes are there already");
    holds_for("it waits", secs(2), || job.code().is_none());
    let more = pool.peak_rss() - memory;
    assert_eq!(size(&temporary) - before, taken, "a stopped daemon takes nothing");
    daemon.signal(Signal::SIGCONT);
    job.wait_ok(secs(60));
    let all = pool.peak_rss() - memory;
    say(format!(
        "          row 28: {what}: stopped after {} of {UPLOAD} MiB, out after {out:?}; the proxy was {more} KiB \
         larger then, and {all} KiB at the end",
        taken >> 20
    ));
    assert!(all < 8 << 10, "{what}: {all} KiB");
    pool.wait_healthy(1, secs(20));
}

/// How many bytes are in the files below a folder, which others change.
fn size(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[test]
fn row_29_a_client_that_does_not_read_costs_no_memory_and_gets_all_lines_when_it_does() {
    crate::require!(needs());
    let root = short_dir();
    let daemon = Dockerd::start("28.5", root.path());
    let pool = Pool::serve([&daemon.addr]).start();
    pool.wait_healthy(1, secs(20));
    let (t, name) = terminal(&pool, client::CLI_28);
    // Lines of 1 KiB that begin with their number, in bursts of 1 MiB.
    let burst = "awk -v n=$n 'BEGIN { for (i = n; i < n + 1024; i++) printf \"%d %01016d\\n\", i, i }'";
    let print = format!("n=1; until test -e /stop; do {burst}; n=$((n+1024)); usleep 20000; done; echo end");
    t.write("ctx/print", print);
    t.write("ctx/Dockerfile", format!("{CONTEXT}ADD print /\n"));
    t.ok(&format!("docker build -q --network none -t {name} ctx"));
    let id = t.ok(&format!("docker run -d --name {name} --network none {name} sh /print"));
    let log = root.path().join(format!("containers/{0}/{0}-json.log", id.trim()));
    let printed = || std::fs::metadata(&log).map_or(0, |m| m.len());
    let logs = Session::new(&pool.host(), client::CLI_28);
    let job = logs.start(&format!("exec docker logs -f {name}"));
    wait_until("it reads", secs(20), || job.stdout_len() > 2 << 20);
    let memory = pool.peak_rss();
    job.signal(Signal::SIGSTOP);
    let (read, begun, at) = (job.stdout_len(), printed(), Instant::now());
    wait_until("much more is printed than any buffer between holds", secs(60), || {
        printed() > begun + (32 << 20)
    });
    let took = at.elapsed();
    assert!(job.stdout_len() < read + (1 << 20), "it is stopped");
    for flavour in [client::CLI_28, client::BUILDX_29] {
        works(&pool, flavour);
    }
    t.ok(&format!("docker exec {name} touch /stop"));
    assert_eq!(t.ok(&format!("docker wait {name}")), "0\n");
    let more = pool.peak_rss() - memory;
    job.signal(Signal::SIGCONT);
    let out = job.wait_ok(secs(60));
    let all = pool.peak_rss() - memory;
    let lines: Vec<&str> = out.lines().collect();
    let (end, lines) = lines.split_last().unwrap();
    assert_eq!(*end, "end");
    for (n, line) in (1..).zip(lines) {
        assert_eq!(*line, format!("{n} {n:01016}"), "a line is missing or broken");
    }
    say(format!(
        "          row 29: {} lines of 1 KiB, {} of them read before {took:?} without reading; the proxy was {more} KiB \
         larger then, and {all} KiB at the end",
        lines.len(),
        read >> 10
    ));
    assert!(all < 8 << 10, "{all} KiB");
}

#[test]
fn row_30_what_comes_after_the_end_of_stdin_comes_whole() {
    crate::require!(needs());
    for (version, flavour) in [("28.5", client::CLI_28), ("20.10", client::CLI_20)] {
        let root = short_dir();
        let daemon = Dockerd::start(version, root.path());
        let pool = Pool::serve([&daemon.addr]).start();
        pool.wait_healthy(1, secs(20));
        let (t, image) = terminal(&pool, flavour);
        // Nothing is said before the end of stdin has come, and all of it a while afterwards.
        let echo = "cat >/f; usleep 300000; wc -c </f; cat /f";
        let lines = "seq 1 40000";
        let run = |args: &str| format!("docker run -i --rm --network none {args}");
        let ways: [(&str, String); 5] = [
            ("wc", format!("printf 'a word' | {}", run(&format!("{image} wc -c")))),
            ("run -i", format!("{lines} | {}", run(&format!("{image} sh -c '{echo}'")))),
            ("empty", format!("{} </dev/null", run(&format!("{image} sh -c '{echo}'")))),
            (
                "attach",
                format!(
                    "docker create -i --name a{image} --network none {image} sh -c '{echo}' >/dev/null; \
                     docker start a{image} >/dev/null; \
                     {lines} | docker attach a{image}; docker wait a{image}; docker rm a{image} >/dev/null"
                ),
            ),
            (
                "exec -i",
                format!(
                    "docker run -d --name x{image} --network none {image} sleep 600 >/dev/null; \
                     {lines} | docker exec -i x{image} sh -c '{echo}'; docker rm -f x{image} >/dev/null"
                ),
            ),
        ];
        let whole: String = (1..=40_000).map(|n: u32| format!("{n}\n")).collect();
        let echoed = format!("{}\n{whole}", whole.len());
        let expected = ["6\n", &echoed, "0\n", &format!("{echoed}0\n"), &echoed];
        let begun = Instant::now();
        for ((what, script), expected) in ways.iter().zip(expected) {
            let out = t.ok(script);
            let ends =
                |s: &str| s.chars().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect::<String>();
            assert!(
                out == expected,
                "dockerd {version}: {what}: {} bytes of {}, which end with {:?}",
                out.len(),
                expected.len(),
                ends(&out)
            );
        }
        say(format!(
            "          row 30: dockerd {version}: five ways with {} bytes: {:?}",
            whole.len(),
            begun.elapsed()
        ));
    }
}
