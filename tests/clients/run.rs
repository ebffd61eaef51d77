//! `docker run` and what is done with a running container.

use nix::sys::signal::Signal;

use super::common::client::{self, Flavour};
use super::common::{holds_for, secs, unique, wait_until};
use super::{Lab, Rule};

/// All rules about running.
pub const RULES: &[Rule] = &[
    ("run keeps stdout, stderr and exit code apart", foreground),
    ("run -i takes a pipe to its end", stdin),
    ("run -t is a terminal", terminal),
    ("run -d, wait, logs and rm follow the container", detached),
    ("run --rm leaves nothing", removed),
    ("exec gives output, exit code and stdin", exec),
    ("attach speaks with a running container", attach),
    ("logs -f shows every line and ends with the container", logs_follow),
    ("run of a missing command fails with 127 and a message", missing_command),
    ("kill, stop, restart, pause, rename, top and update reach the container", control),
];

fn foreground(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let out =
        t.run(&format!("docker run --rm --network none {image} sh -c 'echo out; echo err >&2; exit 7'"));
    assert_eq!((out.code, out.stdout.as_str(), out.stderr.as_str()), (7, "out\n", "err\n"));
    let long =
        t.ok(&format!("docker run --rm --network none {image} seq 1 100000 | md5sum; seq 1 100000 | md5sum"));
    let sums: Vec<&str> = long.lines().collect();
    assert_eq!(sums[0], sums[1], "600 KB of output arrive whole");
}

fn stdin(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let run = format!("docker run --rm -i --network none {image}");
    assert_eq!(t.ok(&format!("echo hi | {run} cat")), "hi\n");
    let sums = t.ok(&format!(
        "head -c 3M /dev/urandom >blob; md5sum <blob; {run} md5sum <blob; {run} cat <blob | md5sum"
    ));
    let sums: Vec<&str> = sums.lines().collect();
    assert_eq!(sums.len(), 3, "{sums:?}");
    assert!(sums[0] == sums[1] && sums[0] == sums[2], "3 MiB of stdin arrive whole: {sums:?}");
}

fn terminal(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let out = t.run(&format!(
        "script -qec 'docker run --rm -t --network none {image} sh -c \"tty; exit 5\"' /dev/null"
    ));
    assert_eq!((out.code, out.stdout.trim_end()), (5, "/dev/pts/0"), "{}", out.stderr);
    // What is typed is echoed by the container's terminal, and answered by its shell.
    t.ok("mkfifo keys");
    let shell =
        t.start(&format!("script -qec 'docker run --rm -it --network none {image} sh' /dev/null <keys"));
    let typing = t.start("exec 3>keys; until test -e stop; do sleep 0.05; done");
    wait_until("a prompt", secs(30), || shell.stdout().contains("# "));
    t.ok("echo 'echo $((40+2)) $(tty)' >keys");
    wait_until("the answer", secs(30), || shell.stdout().contains("42 /dev/pts/0\r\n"));
    t.ok("echo 'exit 6' >keys");
    t.write("stop", "");
    assert_eq!(shell.wait(secs(30)).code, 6);
    typing.wait_ok(secs(10));
}

fn detached(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let name = format!("d{}", unique());
    let id = t.ok(&format!("docker run -d --name {name} --network none {image} sh -c 'echo done; exit 4'"));
    assert_eq!(id.trim().len(), 64, "the id is printed: {id}");
    assert_eq!(t.ok(&format!("docker wait {name}")), "4\n");
    assert_eq!(t.ok(&format!("docker logs {}", id.trim())), "done\n");
    assert_eq!(
        t.ok(&format!("docker ps -a --filter name=^{name}$ --format '{{{{.Names}}}}'")),
        format!("{name}\n")
    );
    assert_eq!(t.ok(&format!("docker rm {name}")), format!("{name}\n"));
    assert!(t.fails(&format!("docker inspect {name}")).stderr.contains("No such"));
}

fn removed(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let name = format!("r{}", unique());
    assert_eq!(t.ok(&format!("docker run --rm --name {name} --network none {image} echo x")), "x\n");
    let left = || lab.pool.daemons().iter().any(|d| d.has_container(&name));
    wait_until("the container has gone from all daemons", secs(10), || !left());
}

fn exec(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let name = format!("e{}", unique());
    t.ok(&format!("docker run -d --name {name} --network none {image} sleep 600"));
    let out = t.run(&format!("docker exec {name} sh -c 'echo out; echo err >&2; exit 9'"));
    assert_eq!((out.code, out.stdout.as_str(), out.stderr.as_str()), (9, "out\n", "err\n"));
    assert_eq!(t.ok(&format!("echo typed | docker exec -i {name} cat")), "typed\n");
    let tty = t.ok(&format!("script -qec 'docker exec -t {name} tty' /dev/null"));
    assert_eq!(tty.trim_end(), "/dev/pts/0");
    t.ok(&format!("docker exec -d {name} touch /made"));
    wait_until("a detached exec does its work", secs(10), || {
        t.run(&format!("docker exec {name} test -e /made")).code == 0
    });
    t.ok(&format!("docker rm -f {name}"));
}

fn attach(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let name = format!("a{}", unique());
    t.ok(&format!(
        "docker run -d -i --name {name} --network none {image} sh -c 'read x; echo got $x; read y; exit 8'"
    ));
    let attached = t.start(&format!(
        "(echo hello; until test -e go; do sleep 0.05; done; echo x) | docker attach {name}"
    ));
    wait_until("the container's answer", secs(20), || attached.stdout() == "got hello\n");
    t.write("go", "");
    assert_eq!(attached.wait(secs(20)).code, 8, "attach ends with the container's exit code");
    t.ok(&format!("docker rm {name}"));
}

fn logs_follow(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let name = format!("l{}", unique());
    let work = "for i in $(seq 1 60); do echo line $i; usleep 20000; done; echo end >&2";
    t.ok(&format!("docker run -d --name {name} --network none {image} sh -c '{work}'"));
    let logs = t.start(&format!("docker logs -f {name}"));
    wait_until("a first line while it runs", secs(20), || logs.stdout().contains("line 1\n"));
    let out = logs.wait(secs(30));
    let expected: String = (1..=60).map(|i| format!("line {i}\n")).collect();
    assert_eq!((out.code, out.stdout.as_str(), out.stderr.as_str()), (0, expected.as_str(), "end\n"));
    t.ok(&format!("docker rm -f {name}"));
}

fn missing_command(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let out = t.run(&format!("docker run --rm --network none {image} /no/such/command"));
    assert_eq!(out.code, 127, "{}", out.all());
    assert!(out.stderr.contains("no such file or directory"), "{}", out.stderr);
}

fn control(lab: &Lab, flavour: Flavour) {
    let (t, image) = lab.terminal_with_image(flavour);
    let name = format!("c{}", unique());
    let state = |t: &client::Session, name: &str| {
        t.ok(&format!("docker inspect -f '{{{{.State.Status}}}} {{{{.State.ExitCode}}}}' {name}"))
            .trim()
            .to_owned()
    };
    let trap = "trap \"exit 3\" TERM; while :; do usleep 50000; done";
    t.ok(&format!("docker run -d --name {name} --network none {image} sh -c '{trap}'"));
    assert_eq!(state(&t, &name), "running 0");
    assert!(t.ok(&format!("docker top {name}")).contains("usleep"));
    t.ok(&format!("docker pause {name}"));
    assert_eq!(state(&t, &name), "paused 0");
    t.ok(&format!("docker unpause {name} && docker update --cpu-shares 512 {name}"));
    t.ok(&format!("docker rename {name} {name}b && docker stop {name}b"));
    assert_eq!(state(&t, &format!("{name}b")), "exited 3");
    t.ok(&format!("docker start {name}b && docker restart -t 5 {name}b && docker kill {name}b"));
    wait_until("killed", secs(10), || state(&t, &format!("{name}b")) == "exited 137");
    t.ok(&format!("docker rm {name}b"));
}

/// The closed window must neither be taken for a dead peer nor make the proxy hold what the reader does not take.
pub fn stopped_reader(lab: &Lab) {
    let (t, image) = lab.terminal_with_image(client::BUILDX_29);
    let name = format!("s{}", unique());
    t.ok(&format!("docker run -d --name {name} --network none {image} sh -c 'seq 1 4000000; echo end'"));
    let logs = t.start(&format!("exec docker logs -f {name}"));
    wait_until("the first lines", secs(30), || logs.stdout_len() > 0);
    logs.signal(Signal::SIGSTOP);
    let before = lab.pool.rss();
    let read = logs.stdout_len();
    holds_for("a stopped reader reads nothing", secs(120), || logs.stdout_len() == read);
    let after = lab.pool.rss();
    assert!(read < 20_000_000, "the reader stopped before the end: {read} bytes");
    assert!(after < before + 64 * 1024, "the proxy holds the log in memory: {before} → {after} KiB");
    logs.signal(Signal::SIGCONT);
    let out = logs.wait_ok(secs(120));
    let mut lines = out.lines();
    let in_order = (1..=4_000_000).all(|i: u32| lines.next().and_then(|l| l.parse().ok()) == Some(i));
    assert!(in_order, "every line, in order, after the stop");
    assert_eq!(lines.next(), Some("end"));
    t.ok(&format!("docker rm -f {name}"));
}
