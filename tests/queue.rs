//! A full pool: who gets the next free slot, and what real clients show while they wait for it.
//!
//! Two real daemons carry the whole suite. Each scenario puts a proxy of its own in front of one of them (or of
//! both), with one slot each, so that a scenario's queue is its own. What was built where and when is told by the
//! daemons: by their events, their images, and what the builds themselves wrote into those.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use common::client::{self, Flavour, Job, Output, Session};
use common::daemon::{Daemon, processes};
use common::http::{self, Addr};
use common::pool::{Pool, PoolBuilder};
use common::registry::Registry;
use common::scenarios::Scenarios;
use common::{holds_for, millis, parts, poll, say, secs, unique, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

const APP: &str = "FROM scratch\nADD rootfs.tar /\nARG MARK\nRUN echo built-$MARK\n";
const CLASSIC: [Flavour; 2] = [client::CLI_28, client::CLI_20];
const BUILDKIT: [Flavour; 4] =
    [client::BUILDX_38, client::BUILDX_29, client::BUILDX_13, client::CLI_20_BUILDKIT];
/// Longer than a client waits before it is told of it.
const TOLD: std::time::Duration = millis(2500);

/// Two daemons that have `base:1`, and a registry.
struct Lab {
    registry: Registry,
    daemons: Vec<Daemon>,
    next: AtomicUsize,
    _up: Pool,
}

impl Lab {
    fn start() -> Result<Lab, String> {
        parts::all(&[
            "busybox/rootfs.tar",
            "registry/docker-registry",
            "cli-28/docker",
            "cli-20.10/docker",
            "buildx-0.13/docker-buildx",
            "buildx-0.29/docker-buildx",
            "buildx-0.38/docker-buildx",
            "compose-2.26/docker-compose",
        ])?;
        let dockerd = parts::dockerd("28.5")?;
        let registry = Registry::start();
        let up = Pool::up(&[dockerd], 2).arg(registry.dockerd_arg()).start();
        up.wait_healthy(2, secs(60));
        let daemons = up.daemons();
        for daemon in &daemons {
            let rootfs = parts::busybox("rootfs.tar");
            direct(daemon).ok(&format!("docker import {} base:1", rootfs.display()));
        }
        Ok(Lab { registry, daemons, next: AtomicUsize::new(0), _up: up })
    }

    /// One of the daemons; scenarios take turns.
    fn daemon(&self) -> &Daemon {
        &self.daemons[self.next.fetch_add(1, Ordering::Relaxed) % self.daemons.len()]
    }

    /// A pool of one daemon with one slot, which somebody has.
    fn full(&self) -> Full {
        self.full_with(&[])
    }

    fn full_with(&self, settings: &[(&str, &str)]) -> Full {
        let daemon = self.daemon().clone();
        let pool = settings.iter().fold(one_slot([&daemon]), |p, (k, v)| p.env(k, v)).start();
        pool.wait_healthy(1, secs(20));
        let holder = Holder::start(&pool);
        Full { pool, daemon, holder }
    }
}

fn one_slot<'a>(daemons: impl IntoIterator<Item = &'a Daemon>) -> PoolBuilder {
    Pool::serve(daemons.into_iter().map(|d| &d.addr))
        .env("DINDPOOL_SLOTS", "1")
        .env("DINDPOOL_SESSION_GRACE", "2s")
        .env("DINDPOOL_SLOT_LINGER", "100ms")
}

/// A terminal that speaks with one daemon, past every pool.
fn direct(daemon: &Daemon) -> Session {
    Session::new(&daemon.addr.url(), client::CLI_28)
}

/// A session that has a slot, by a container that runs until it is told to end.
struct Holder {
    session: Session,
    name: String,
    daemon: Daemon,
}

impl Holder {
    fn start(pool: &Pool) -> Holder {
        let session = Session::new(&pool.host(), client::BUILDX_29);
        let name = format!("hold{}", unique());
        session.ok(&format!("docker run -d --name {name} --network none base:1 sleep 3600"));
        let daemon = pool.daemons().into_iter().find(|d| d.has_container(&name)).unwrap();
        Holder { session, name, daemon }
    }

    fn release(&self) {
        http::request(&self.daemon.addr, "DELETE", &format!("/containers/{}?force=1", self.name), None);
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.release();
    }
}

/// A pool with a daemon, one slot, and somebody who has it.
struct Full {
    pool: Pool,
    daemon: Daemon,
    holder: Holder,
}

impl Full {
    fn terminal(&self, flavour: Flavour) -> Session {
        Session::new(&self.pool.host(), flavour)
    }

    /// A build that waits.
    fn build(&self, flavour: Flavour, dockerfile: &str) -> Waiting {
        let waiting = Waiting::start(&self.pool.host(), flavour, dockerfile, "");
        wait_tickets(&self.pool, 1);
        waiting
    }

    /// Watches for longer than a client waits silently that it waits, and says nothing.
    fn silent(&self, job: &Job) {
        holds_for("it waits, and says nothing", TOLD, || {
            tickets(&self.pool).len() == 1 && job.stdout().is_empty() && own_words(&job.stderr()).is_empty()
        });
    }
}

/// A build, by what it leaves.
struct Waiting {
    job: Job,
    /// Named after the session's build argument.
    image: String,
    mark: String,
    _session: Session,
}

impl Waiting {
    fn start(host: &str, flavour: Flavour, dockerfile: &str, more: &str) -> Waiting {
        let (session, mark) = (Session::new(host, flavour), unique());
        session.context("ctx", dockerfile);
        let image = format!("queue:{mark}");
        let job = session.start(&format!(
            "exec docker build --no-cache --network none --build-arg MARK={mark} -t {image} {more} ctx"
        ));
        Waiting { job, image, mark, _session: session }
    }
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

fn containers_made(daemon: &Daemon) -> usize {
    let events = daemon.events();
    events.iter().filter(|e| e["Type"] == "container" && e["Action"] == "create").count()
}

const LINE: &str = "Waiting for a free daemon: position 1 of 1\n";

/// Standard error without what CLI 28 says about every classic build.
fn own_words(stderr: &str) -> String {
    let about = ["DEPRECATED: ", "  BuildKit is currently disabled", "  environment-variable."];
    let other = stderr.lines().filter(|l| !l.trim().is_empty() && !about.iter().any(|a| l.contains(a)));
    other.collect::<Vec<_>>().join("\n")
}

/// The output of a client as it is in the report of a run.
fn seen(what: &str, out: &Output) {
    let text = format!("[exit {}] {}", out.code, out.all().trim());
    say(format!("          {what}: {}", text.replace('\n', "\n            | ")));
}

#[test]
fn a_full_pool_makes_everybody_wait_who_starts_work_and_nobody_else() {
    let lab = &require!(Lab::start());
    let mut all = Scenarios::new("queue");
    all.alone(
        "two daemons of one slot give eight clients of two tenants one build each at a time, in turn",
        || {
            eight_clients(lab);
        },
    );
    for flavour in
        [client::BUILDX_38, client::BUILDX_13, client::CLI_20_BUILDKIT, client::CLI_28, client::CLI_20]
    {
        let name = flavour.name;
        all.alone(
            format!("{name}: a build whose client is killed leaves the queue, and starts nothing"),
            move || {
                killed(lab, &format!("build, {name}"), flavour, "docker build --no-cache --network none ctx");
            },
        );
    }
    all.alone("a create whose client is killed leaves the queue, and starts nothing", || {
        killed(lab, "create", client::CLI_28, "docker create --network none base:1 true");
    });
    for flavour in CLASSIC {
        let name = flavour.name;
        all.alone(format!("{name}: Ctrl-C ends a build that waits at once"), move || {
            interrupted(lab, &format!("build, {name}"), flavour, "docker build --network none ctx");
        });
    }
    for flavour in CLASSIC {
        all.alone(format!("{}: Ctrl-C ends a run that waits at once", flavour.name), move || {
            interrupted(lab, &format!("run, {}", flavour.name), flavour, "docker run --rm base:1 true");
        });
    }
    for flavour in CLASSIC {
        let name = flavour.name;
        all.add(format!("{name}: a build that waits shows its position, then builds"), move || {
            shown(lab, flavour);
        });
        all.add(format!("{name}: build -q prints the image's id and nothing else"), move || {
            quiet(lab, flavour);
        });
        all.add(format!("{name}: a build that fails after it has waited fails its client"), move || {
            failing(lab, flavour);
        });
        all.add(
            format!("{name}: a build that the daemon refuses after it has waited fails its client"),
            move || {
                refused_by_daemon(lab, flavour);
            },
        );
        all.add(format!("{name}: pull and load show that they wait, create and run do not"), move || {
            other_work(lab, flavour);
        });
    }
    for flavour in BUILDKIT {
        let name = flavour.name;
        all.add(format!("{name}: a build waits without a word, then builds"), move || patient(lab, flavour));
        all.add(format!("{name}: a build that fails after it has waited fails its client"), move || {
            failing(lab, flavour);
        });
    }
    for first in ["/build", "/session"] {
        all.add(format!("cli 20.10 BuildKit: it waits and builds when its {first} comes first"), move || {
            both_at_once(lab, first);
        });
    }
    all.add("a full queue refuses whoever would wait, and nobody who has a daemon", || queue_full(lab));
    all.add("the longest wait ends with a refusal, also in a stream that has begun", || longest_wait(lab));
    all.add("a session that has its slot never queues for its containers and builds", || compose(lab));
    all.add("reads are answered while everything waits", || reads(lab));
    all.run(4);
}

/// Start and end of a RUN by the kernel's clock, as the build itself has written them into its image.
const TIMED: &str = "FROM scratch\nADD rootfs.tar /\nARG MARK\n\
                     RUN echo $MARK; cat /proc/uptime >/t; sleep 1.5; cat /proc/uptime >>/t\n";

struct Span {
    tenant: usize,
    daemon: String,
    flavour: &'static str,
    begin: f64,
    end: f64,
}

fn eight_clients(lab: &Lab) {
    let hosts = ["127.0.0.2", "127.0.0.3"];
    let pool = one_slot(&lab.daemons).tenant(hosts[0], "a").tenant(hosts[1], "b").start();
    pool.wait_healthy(2, secs(20));
    let holders = [Holder::start(&pool), Holder::start(&pool)];
    let flavours = [client::BUILDX_38, client::CLI_28, client::BUILDX_13, client::CLI_20];
    // All of one tenant are there before any of the other: who comes first does not matter.
    let mut builds = Vec::new();
    for (tenant, host) in hosts.iter().enumerate() {
        let host = pool.listener(host).url();
        for flavour in flavours {
            builds.push((tenant, flavour, Waiting::start(&host, flavour, TIMED, "")));
            wait_tickets(&pool, builds.len());
        }
    }
    let start = Instant::now();
    holders.iter().for_each(Holder::release);
    for (.., build) in &builds {
        build.job.wait_ok(secs(120));
    }
    let took = start.elapsed();
    let terminals: Vec<(&Daemon, Session)> = lab.daemons.iter().map(|d| (d, direct(d))).collect();
    let mut spans = Vec::new();
    for (tenant, flavour, build) in &builds {
        let homes: Vec<_> = terminals.iter().filter(|(d, _)| d.has_image(&build.image)).collect();
        assert_eq!(homes.len(), 1, "{} was built once", build.image);
        let (daemon, terminal) = homes[0];
        let text = terminal.ok(&format!("says docker run --rm --network none {} cat /t", build.image));
        let times: Vec<f64> = text.lines().map(|l| l.split(' ').next().unwrap().parse().unwrap()).collect();
        let (begin, end) = (times[0], times[1]);
        spans.push(Span { tenant: *tenant, daemon: daemon.id.clone(), flavour: flavour.name, begin, end });
    }
    spans.sort_by(|a, b| a.begin.total_cmp(&b.begin));
    let zero = spans[0].begin;
    for s in &spans {
        let (begin, end) = (s.begin - zero, s.end - zero);
        say(format!(
            "          {:5.2}-{:5.2} s {} tenant {} {}",
            begin,
            end,
            s.daemon,
            ["a", "b"][s.tenant],
            s.flavour
        ));
    }
    let order: String = spans.iter().map(|s| ["a", "b"][s.tenant]).collect();
    say(format!(
        "          all done {:.1} s after the first slot came free; order {order}",
        took.as_secs_f64()
    ));
    for daemon in &lab.daemons {
        let here: Vec<&Span> = spans.iter().filter(|s| s.daemon == daemon.id).collect();
        assert!(here.len() >= 2, "{} had its share", daemon.id);
        for pair in here.windows(2) {
            assert!(pair[0].end <= pair[1].begin, "two builds at once on {}", daemon.id);
        }
    }
    for n in 1..=spans.len() {
        let of_a = spans[..n].iter().filter(|s| s.tenant == 0).count() as f64;
        assert!((of_a - n as f64 / 2.0).abs() <= 1.0, "after {n} builds a tenant is off its share: {order}");
    }
}

/// Three times a client is killed: at once, and when it has been told that it waits.
fn killed(lab: &Lab, what: &str, flavour: Flavour, command: &str) {
    let full = lab.full();
    let before = containers_made(&full.daemon);
    let mark = format!("7{}", unique().replace('x', "."));
    let mut times = Vec::new();
    for round in 0..3 {
        let t = full.terminal(flavour);
        t.context("ctx", &format!("FROM scratch\nADD rootfs.tar /\nCOPY blob /\nRUN sleep {mark}\n"));
        t.ok("head -c 50M /dev/zero >ctx/blob");
        let job = t.start(&format!("exec {command}"));
        wait_tickets(&full.pool, 1);
        if round > 0 {
            holds_for("it waits", TOLD, || tickets(&full.pool).len() == 1);
        }
        let start = Instant::now();
        job.signal(Signal::SIGKILL);
        // Behind an upload that nobody reads only a write tells, and nothing is written in the first two seconds.
        wait_until("the ticket is gone", secs(3), || tickets(&full.pool).is_empty());
        times.push(start.elapsed().as_millis());
    }
    say(format!("          {what}: the ticket was gone {times:?} ms after SIGKILL"));
    full.holder.release();
    wait_until("the slot is free", secs(10), || full.pool.status()["daemons"][0]["used"] == 0);
    holds_for("nothing starts", millis(300), || {
        processes(&mark).is_empty() && tickets(&full.pool).is_empty()
    });
    assert_eq!(containers_made(&full.daemon), before, "a container was made for a client that had left");
    let outcomes = full.pool.admin("/metrics").text();
    assert!(
        outcomes.contains("dindpool_queue_abandoned_total{tenant=\"default\"} 3\n")
            && outcomes.contains("dindpool_requests_total{class=\"work\",outcome=\"client-gone\"} 3\n"),
        "{}",
        outcomes
            .lines()
            .filter(|l| l.contains("queue") || l.contains("requests"))
            .collect::<Vec<_>>()
            .join("\n")
    );
}

fn interrupted(lab: &Lab, what: &str, flavour: Flavour, command: &str) {
    let full = lab.full();
    let times: Vec<(u128, u128)> = (0..2)
        .map(|round| {
            let t = full.terminal(flavour);
            t.context("ctx", APP);
            let job = t.start(&format!("exec {command}"));
            wait_tickets(&full.pool, 1);
            if round > 0 {
                holds_for("it waits", TOLD, || tickets(&full.pool).len() == 1);
            }
            let start = Instant::now();
            job.signal(Signal::SIGINT);
            let out = job.wait(secs(20));
            let ended = start.elapsed().as_millis();
            assert_ne!(out.code, 0, "{}", out.all());
            // The BuildKit of CLI 20.10 cancels once the answer to its build has begun: after 2 s.
            assert!(ended <= 2500, "{ended} ms");
            wait_until("the ticket is gone", secs(3), || tickets(&full.pool).is_empty());
            (ended, start.elapsed().as_millis())
        })
        .collect();
    say(format!("          {what}: client ended, ticket gone {times:?} ms after Ctrl-C"));
}

fn shown(lab: &Lab, flavour: Flavour) {
    let full = lab.full();
    let first = full.build(flavour, APP);
    wait_until("the first is told", secs(10), || first.job.stdout().contains(LINE));
    let second = Waiting::start(&full.pool.host(), flavour, APP, "");
    wait_until("the first is told that one more waits", secs(10), || {
        first.job.stdout().contains("position 1 of 2\n")
    });
    wait_until("the second is told", secs(10), || second.job.stdout().contains("position 2 of 2\n"));
    assert!(!full.daemon.has_image(&first.image));
    full.holder.release();
    for build in [&first, &second] {
        let out = build.job.wait(secs(60));
        seen(flavour.name, &out);
        assert_eq!(out.code, 0, "{}", out.all());
        let (line, output) =
            (out.stdout.find("Waiting for"), out.stdout.find(&format!("built-{}", build.mark)));
        assert!(line.is_some() && line < output, "{}", out.stdout);
        assert!(!out.stdout.contains("\n\n"), "no empty lines are shown: {:?}", out.stdout);
        assert!(full.daemon.has_image(&build.image));
    }
}

fn quiet(lab: &Lab, flavour: Flavour) {
    let full = lab.full();
    let build = Waiting::start(&full.pool.host(), flavour, APP, "-q");
    wait_tickets(&full.pool, 1);
    full.silent(&build.job);
    full.holder.release();
    let out = build.job.wait(secs(60));
    assert_eq!((out.code, own_words(&out.stderr)), (0, String::new()), "{}", out.all());
    let id = out.stdout.trim_end();
    assert!(id.starts_with("sha256:") && id.len() == 71, "{id:?}");
    assert!(full.daemon.has_image(id));
}

fn failing(lab: &Lab, flavour: Flavour) {
    let full = lab.full();
    let build = full.build(flavour, "FROM scratch\nADD rootfs.tar /\nRUN echo so-far; exit 3\n");
    if flavour.is_buildkit() {
        holds_for("it waits", TOLD, || tickets(&full.pool).len() == 1);
    } else {
        wait_until("it is told", secs(10), || build.job.stdout().contains(LINE));
    }
    full.holder.release();
    let out = build.job.wait(secs(60));
    assert_ne!(out.code, 0, "{}", out.all());
    let told = ["returned a non-zero code: 3", "exit code: 3"];
    assert!(told.iter().any(|m| out.stderr.contains(m)) && out.all().contains("so-far"), "{}", out.all());
}

/// The daemon answers 400 where its client has its 200 already.
fn refused_by_daemon(lab: &Lab, flavour: Flavour) {
    let full = lab.full();
    let build = Waiting::start(&full.pool.host(), flavour, APP, "--platform linux/a/b/c/d");
    wait_until("it is told", secs(10), || build.job.stdout().contains(LINE));
    full.holder.release();
    let out = build.job.wait(secs(60));
    seen(flavour.name, &out);
    let own = direct(&full.daemon);
    own.context("ctx", APP);
    let own = own.fails("DOCKER_BUILDKIT=0 docker build --platform linux/a/b/c/d ctx");
    let message = own.stderr.trim().rsplit("daemon: ").next().unwrap();
    assert!(message.contains("linux/a/b/c/d"), "{message}");
    assert!(out.code == 1 && out.stderr.contains(message), "not {message:?}: {}", out.all());
}

fn other_work(lab: &Lab, flavour: Flavour) {
    let full = lab.full();
    let busybox = lab.registry.busybox();
    let tar = full.pool.dir().join("base.tar").display().to_string();
    direct(&full.daemon).ok(&format!("docker save -o {tar} base:1"));
    let mut holder = None;
    let jobs = [
        (format!("docker pull {busybox}"), true),
        (format!("docker load -i {tar}"), true),
        ("docker create --network none base:1 true".to_string(), false),
        ("says docker run --rm --network none base:1 echo ran".to_string(), false),
    ];
    for (command, told) in jobs {
        let t = full.terminal(flavour);
        let job = t.start(&format!("exec {command}"));
        wait_tickets(&full.pool, 1);
        if told {
            wait_until("it is told", secs(10), || job.stdout().contains(LINE));
        } else {
            full.silent(&job);
        }
        match holder.take() {
            None => full.holder.release(),
            Some(holder) => drop::<Holder>(holder),
        }
        let out = job.wait(secs(60));
        seen(&command, &out);
        let errors: Vec<&str> = out.stderr.lines().filter(|line| !line.starts_with("AGAIN")).collect();
        assert!(out.code == 0 && errors.is_empty(), "{command}: {}", out.all());
        if !told {
            assert_eq!(out.stdout.lines().count(), 1, "{command}: {}", out.stdout);
            full.daemon.containers().iter().filter(|c| c["Command"] == "true").for_each(|c| {
                let path = format!("/containers/{}?force=1", c["Id"].as_str().unwrap());
                http::request(&full.daemon.addr, "DELETE", &path, None);
            });
        }
        holder = Some(Holder::start(&full.pool));
    }
    assert!(full.daemon.has_image(&busybox));
}

fn patient(lab: &Lab, flavour: Flavour) {
    let full = lab.full();
    let build = full.build(flavour, APP);
    holds_for("it waits", TOLD, || tickets(&full.pool).len() == 1 && build.job.output().is_none());
    assert!(!full.daemon.has_image(&build.image));
    full.holder.release();
    let out = build.job.wait(secs(60));
    assert_eq!(out.code, 0, "{}", out.all());
    assert!(out.all().contains(&format!("built-{}", build.mark)), "{}", out.all());
    assert!(full.daemon.has_image(&build.image));
}

/// A relay in front of a pool that holds back requests for a path until it is opened.
struct Gate {
    addr: Addr,
    open: Arc<AtomicBool>,
    held: Arc<AtomicUsize>,
    passed: Arc<Mutex<Vec<String>>>,
}

impl Gate {
    fn start(pool: &Pool, path: &'static str) -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let gate = Gate {
            addr: Addr::Tcp(listener.local_addr().unwrap().to_string()),
            open: Arc::default(),
            held: Arc::default(),
            passed: Arc::default(),
        };
        let Addr::Tcp(to) = pool.tcp.clone() else { panic!("TCP") };
        let (open, held, passed) = (gate.open.clone(), gate.held.clone(), gate.passed.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&to) else { return };
                let (mut up, mut down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let (open, held, passed) = (open.clone(), held.clone(), passed.clone());
                std::thread::spawn(move || {
                    let mut server = server;
                    copy(&mut up, &mut server, |bytes| {
                        let line =
                            String::from_utf8_lossy(bytes).lines().next().unwrap_or_default().to_string();
                        if line.contains(path) && line.contains(" HTTP/1.1") {
                            held.fetch_add(1, Ordering::SeqCst);
                            poll(secs(60), || open.load(Ordering::SeqCst).then_some(()));
                        }
                        passed.lock().unwrap().push(line);
                    });
                });
                std::thread::spawn(move || {
                    let mut client = client;
                    copy(&mut down, &mut client, |_| {});
                });
            }
        });
        gate
    }

    fn holds(&self) -> bool {
        self.held.load(Ordering::SeqCst) > 0
    }

    fn let_through(&self, path: &str) -> bool {
        self.passed.lock().unwrap().iter().any(|line| line.contains(path) && line.contains(" HTTP/1.1"))
    }
}

fn copy(from: &mut TcpStream, to: &mut TcpStream, mut look: impl FnMut(&[u8])) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut buffer) {
        look(&buffer[..n]);
        if n == 0 || to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

fn both_at_once(lab: &Lab, first: &str) {
    let full = lab.full();
    let held = if first == "/build" { "/session" } else { "/build?" };
    let gate = Gate::start(&full.pool, held);
    let build = Waiting::start(&gate.addr.url(), client::CLI_20_BUILDKIT, APP, "");
    wait_until("both are sent", secs(20), || gate.holds() && gate.let_through(first));
    if first == "/build" {
        wait_tickets(&full.pool, 1);
    } else {
        holds_for("the /session waits", millis(500), || build.job.output().is_none());
    }
    gate.open.store(true, Ordering::SeqCst);
    wait_tickets(&full.pool, 1);
    holds_for("both wait", TOLD, || tickets(&full.pool).len() == 1 && build.job.output().is_none());
    full.holder.release();
    let out = build.job.wait(secs(60));
    assert_eq!(out.code, 0, "{}", out.all());
    assert!(full.daemon.has_image(&build.image));
}

fn queue_full(lab: &Lab) {
    let full = lab.full_with(&[("DINDPOOL_QUEUE_LIMIT", "1")]);
    let waiting = full.build(client::CLI_28, APP);
    let message = "the queue is full: 1 of at most 1 builds wait already; try again later";
    for flavour in CLASSIC {
        let t = full.terminal(flavour);
        t.context("ctx", APP);
        for (command, code) in
            [("docker build ctx", 1), ("docker create base:1 true", 1), ("docker run base:1 true", 125)]
        {
            let out = t.run(command);
            assert_eq!(out.code, code, "{command}: {}", out.all());
            assert!(
                out.stderr.contains(&format!("Error response from daemon: {message}")),
                "{command}: {}",
                out.all()
            );
        }
    }
    for flavour in BUILDKIT {
        let t = full.terminal(flavour);
        t.context("ctx", APP);
        let out = t.run("docker build ctx");
        seen(flavour.name, &out);
        assert_eq!(out.code, 1, "{}: {}", flavour.name, out.all());
        assert!(out.stderr.contains("the queue is full: 1 "), "{}: {}", flavour.name, out.all());
        assert!(!out.all().contains("moby/buildkit"), "{}: {}", flavour.name, out.all());
    }
    let mine = &full.holder.session;
    mine.context("ctx", APP);
    mine.ok("docker build --network none -t mine ctx");
    assert_eq!(mine.ok("says docker run --rm --network none base:1 echo mine"), "mine\n");
    assert_eq!(tickets(&full.pool).len(), 1, "the one that waited still does");
    full.holder.release();
    waiting.job.wait_ok(secs(60));
}

fn longest_wait(lab: &Lab) {
    let full = lab.full_with(&[("DINDPOOL_QUEUE_WAIT", "3s")]);
    let message = "no slot came free within 3 s, the longest wait (position 1 of ";
    let t = full.terminal(client::CLI_28);
    let start = Instant::now();
    let out = t.run("docker create base:1 true");
    let took = start.elapsed();
    seen("create", &out);
    assert_eq!(out.code, 1);
    assert!(out.stderr.contains(&format!("Error response from daemon: {message}")), "{}", out.all());
    assert!(out.stderr.contains("try again"), "{}", out.all());
    assert!((secs(3)..secs(6)).contains(&took), "{took:?}");
    for flavour in CLASSIC {
        let out = full.build(flavour, APP).job.wait(secs(20));
        seen(flavour.name, &out);
        assert_eq!(out.code, 1, "{}", out.all());
        assert!(out.stdout.contains(LINE) && out.stderr.contains(message), "{}", out.all());
    }
    for flavour in BUILDKIT {
        let out = full.build(flavour, APP).job.wait(secs(20));
        seen(flavour.name, &out);
        assert_ne!(out.code, 0, "{}: {}", flavour.name, out.all());
        assert!(!out.all().contains("moby/buildkit"), "{}: {}", flavour.name, out.all());
    }
    wait_tickets(&full.pool, 0);
}

const PROJECT: &str = "services:\n  one: { image: 'base:1', command: sleep 3600, network_mode: none }\n  \
                       two: { image: 'base:1', command: sleep 3600, network_mode: none }\n  \
                       made: { build: { context: ctx, network: none }, command: sleep 3600, network_mode: none }\n  \
                       also: { build: { context: ctx2, network: none }, command: sleep 3600, network_mode: none }\n";

fn compose(lab: &Lab) {
    let full = lab.full();
    let t = full.terminal(client::BUILDX_29);
    t.context("ctx", APP);
    t.context("ctx2", &format!("{APP}RUN echo more\n"));
    t.write("compose.yaml", PROJECT);
    let name = format!("p{}", unique());
    let job = t.start(&format!("exec docker compose -p {name} up -d --build"));
    wait_until("it waits", secs(30), || !tickets(&full.pool).is_empty());
    full.holder.release();
    let out = job.wait(secs(90));
    assert_eq!(out.code, 0, "{}", out.all());
    let there = full.daemon.labelled(&format!("com.docker.compose.project={name}"));
    assert_eq!(there.len(), 4, "{there:?}");
    let queued = || {
        let text = full.pool.admin("/metrics").text();
        text.lines().find(|l| l.starts_with("dindpool_queued_total{")).unwrap().to_string()
    };
    let before = queued();
    t.ok(&format!("docker compose -p {name} up -d --scale one=2 --no-build"));
    t.ok(&format!("docker compose -p {name} run --rm two true"));
    t.ok("docker run --rm --network none base:1 true");
    assert_eq!(queued(), before, "somebody queued behind their own slot");
    t.ok(&format!("docker compose -p {name} down -t 0"));
}

fn reads(lab: &Lab) {
    let full = lab.full();
    let waiting = full.build(client::CLI_28, APP);
    let t = full.terminal(client::BUILDX_29);
    for command in
        ["docker ps", "docker images -q", "docker version", "docker info", "docker image inspect base:1"]
    {
        t.ok(command);
    }
    t.ok(&format!("docker exec {} true", full.holder.name));
    assert_eq!(tickets(&full.pool).len(), 1);
    full.holder.release();
    waiting.job.wait_ok(secs(60));
}

/// A dockerd that does not start before the file `go` is beside it.
fn late_dockerd(dir: &Path) -> Result<PathBuf, String> {
    let real = parts::dockerd("28.5")?;
    for entry in fs::read_dir(real.parent().unwrap()).unwrap().flatten() {
        if entry.file_name() != "dockerd" {
            std::os::unix::fs::symlink(entry.path(), dir.join(entry.file_name())).unwrap();
        }
    }
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] || until test -e {}; do sleep 0.05; done\nexec {} \"$@\"\n",
        dir.join("go").display(),
        real.display()
    );
    let path = dir.join("dockerd");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Ok(path)
}

#[test]
fn work_waits_for_a_daemon_that_starts() {
    require!(parts::all(&[
        "busybox/rootfs.tar",
        "cli-28/docker",
        "cli-20.10/docker",
        "buildx-0.38/docker-buildx",
        "compose-2.26/docker-compose",
    ]));
    let dir = common::short_dir();
    let pool = Pool::up(&[require!(late_dockerd(dir.path()))], 1).early().start();
    let builds = [client::BUILDX_38, client::CLI_28, client::CLI_20_BUILDKIT]
        .map(|f| Waiting::start(&pool.host(), f, APP, ""));
    // buildx waits before it has a ticket: for `/version`.
    wait_tickets(&pool, 2);
    holds_for("all of them wait", TOLD, || builds.iter().all(|b| b.job.output().is_none()));
    assert_eq!(pool.healthy(), 0, "they came before the daemon");
    fs::write(dir.path().join("go"), "").unwrap();
    for build in &builds {
        build.job.wait_ok(secs(60));
    }
    assert!(builds.iter().all(|b| pool.daemons()[0].has_image(&b.image)));
}

/// That of CLI 20.10 by its `/build/cancel`.
#[test]
fn ctrl_c_ends_a_buildkit_build_that_waits() {
    let lab = &require!(Lab::start());
    let mut all = Scenarios::new("queue");
    for flavour in BUILDKIT {
        let name = flavour.name;
        all.alone(format!("{name}: Ctrl-C ends a build that waits at once"), move || {
            interrupted(lab, &format!("build, {name}"), flavour, "docker build --network none ctx");
        });
    }
    all.run(1);
}

/// 35 s after its start each buildx resets one of its calls, and waits on for another.
#[test]
fn buildx_waits_on_after_it_has_reset_a_call() {
    let lab = &require!(Lab::start());
    let full = lab.full();
    let host = full.pool.host();
    let builds = BUILDKIT.map(|f| Waiting::start(&host, f, APP, ""));
    wait_tickets(&full.pool, builds.len());
    let all_wait = || builds.iter().all(|b| b.job.output().is_none());
    holds_for("all of them wait", secs(42), all_wait);
    full.holder.release();
    for build in &builds {
        build.job.wait_ok(secs(120));
    }
}
