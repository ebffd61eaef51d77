//! Daemons that go and come back while clients want something of them: refused connections, daemons on which
//! everything fails, and the herd after a recovery.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::builds::{BUILDERS, works};
use crate::common::client::{self, Flavour, Session};
use crate::common::daemon::Daemon;
use crate::common::dockerd::Dockerd;
use crate::common::http::{self, Addr, Conn};
use crate::common::pool::Pool;
use crate::common::{holds_for, parts, poll, say, secs, short_dir, unique, wait_until};

const CONTEXT: &str = "FROM scratch\nADD rootfs.tar /\n";

fn needs() -> Result<(), String> {
    parts::all(&[
        "busybox/rootfs.tar",
        "cli-28/docker",
        "cli-20.10/docker",
        "buildx-0.29/docker-buildx",
        "docker-28.5/bin/dockerd",
    ])
}

/// The pool's daemon at this address, as `/status` has it.
fn standing(pool: &Pool, addr: &Addr) -> Value {
    let status = pool.status();
    let daemons = status["daemons"].as_array().cloned().unwrap_or_default();
    daemons.into_iter().find(|d| d["address"] == addr.url().as_str()).unwrap_or_else(|| panic!("{status}"))
}

fn is_healthy(pool: &Pool, addr: &Addr) -> bool {
    standing(pool, addr)["health"] == "healthy"
}

/// A dockerd whose socket refuses every new connection while this lives; those that are open go on, so that the pool
/// does not hear of it by its events.
struct Refusing {
    socket: PathBuf,
    aside: PathBuf,
}

impl Refusing {
    fn new(addr: &Addr) -> Refusing {
        let Addr::Unix(socket) = addr.clone() else { panic!("a Unix socket") };
        let aside = socket.with_extension("aside");
        fs::rename(&socket, &aside).unwrap();
        drop(UnixListener::bind(&socket).unwrap()); // its file stays, and nobody listens
        assert!(Conn::try_connect(addr).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused));
        Refusing { socket, aside }
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        let _ = fs::rename(&self.aside, &self.socket);
    }
}

/// Requests that were tried elsewhere so far, and whether this daemon takes sessions afterwards.
fn retries_and_up(pool: &Pool, id: &str) -> (f64, f64) {
    // One after the other: the daemons of a scrape are those of its beginning, the counters those of its end.
    let retries = pool.metric("dindpool_retries_total");
    (retries, pool.metric(&format!("dindpool_daemon_up{{daemon=\"{id}\"}}")))
}

#[test]
fn row_06_a_refused_connection_is_tried_elsewhere_if_unbound_and_a_bound_session_is_told() {
    crate::require!(needs());
    let roots = [short_dir(), short_dir()];
    let daemons = roots.each_ref().map(|root| Dockerd::start("28.5", root.path()));
    // Nothing tells the pool of a daemon that refuses but a request.
    let pool = Pool::serve(daemons.iter().map(|d| &d.addr))
        .env("DINDPOOL_PROBE_INTERVAL", "10m")
        .env("DINDPOOL_DEEP_PROBE_INTERVAL", "10m")
        .env("DINDPOOL_SLOT_LINGER", "0s")
        .start();
    pool.wait_healthy(2, secs(20));
    // A session on each of them: one with a container that runs, and then another one, with a container that is there.
    let (busy, two) = homed(&pool);
    busy.ok("docker run -d --name busy --network none $MINE sleep 1000");
    let (bound, one) = homed(&pool);
    bound.ok("docker run --name bound --network none $MINE true");
    assert_ne!(one.id, two.id, "the balancer takes the idle one");
    let (one, two) = (&one, &two);
    wait_until("one is idle and the other is not", secs(10), || {
        (standing(&pool, &one.addr)["used"] == 0) && (standing(&pool, &two.addr)["used"] == 1)
    });

    // Whoever comes is sent to the idle one, which refuses.
    let refusing = Refusing::new(&one.addr);
    assert!(is_healthy(&pool, &one.addr), "nobody knows yet");
    std::thread::scope(|scope| {
        for n in 0..6 {
            let pool = &pool;
            scope.spawn(move || works(pool, BUILDERS[n % 3]));
        }
        let seen = poll(secs(60), || {
            let (retries, up) = retries_and_up(&pool, &one.id);
            (retries > 0.0).then_some(up)
        });
        assert_eq!(seen.expect("a request is tried again").0, 0.0, "it is out with the first refusal");
    });
    let (retries, _) = retries_and_up(&pool, &one.id);
    say(format!("          row 6: six clients, {retries} requests tried elsewhere"));
    assert!(pool.metric("dindpool_ejections_total{reason=\"refused\"}") >= 1.0);
    // Where it is known, it is told; and nothing of the session is anywhere else afterwards.
    told_and_not_moved(&bound, one, two);
    drop(refusing);
    pool.wait_healthy(2, secs(20));
    bound.ok("docker start bound");

    // The bound session is the first to meet the refusal.
    let refusing = Refusing::new(&one.addr);
    let before = retries_and_up(&pool, &one.id);
    assert_eq!(before.1, 1.0, "nobody knows yet");
    told_and_not_moved(&bound, one, two);
    assert_eq!(retries_and_up(&pool, &one.id), (before.0, 0.0), "out at once, and not tried elsewhere");
    drop(refusing);
    pool.wait_healthy(2, secs(20));
    bound.ok("docker rm bound");

    // Requests that a new session sends at once, as BuildKit's clients do: the binding is undone when none got through.
    let refusing = Refusing::new(&one.addr);
    all_at_once(&pool, two, |_| "several".into());
    assert_eq!(retries_and_up(&pool, &one.id).1, 0.0, "they met the refusal");
    drop(refusing);
    pool.wait_healthy(2, secs(30));

    // A dockerd that is killed: the pool and its clients learn of it in the same moment.
    all_at_once(&pool, two, |n| {
        if n == 0 {
            daemons.iter().find(|d| d.addr == one.addr).unwrap().signal(Signal::SIGKILL);
            wait_until("it refuses", secs(5), || Conn::try_connect(&one.addr).is_err());
        }
        format!("new{n}")
    });
}

/// Twenty clients of these sessions whose requests the proxy finds in one moment, and which the daemon serves.
fn all_at_once(pool: &Pool, daemon: &Daemon, session: impl Fn(usize) -> String) {
    pool.signal(Signal::SIGSTOP);
    let mut clients: Vec<(String, Conn)> = (0..20)
        .map(|n| {
            let (key, name) = (session(n), format!("v{}", unique()));
            let (mut conn, body) = (Conn::connect(&pool.tcp), json!({ "Name": name }).to_string());
            conn.send(format!(
                "POST /s/{key}/v1.44/volumes/create HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            ));
            (name, conn)
        })
        .collect();
    pool.signal(Signal::SIGCONT);
    for (name, conn) in &mut clients {
        let head = conn.head();
        let body = conn.body("POST", &head);
        assert_eq!(head.status(), 201, "{name}: {}", String::from_utf8_lossy(&body));
        assert!(daemon.has_volume(name), "{name}");
    }
}

/// A session with an image of its own, `$MINE`, and the daemon that it is bound to.
fn homed(pool: &Pool) -> (Session, Daemon) {
    let image = format!("mine{}", unique());
    let t = Session::with(&pool.host(), client::CLI_28).env("MINE", &image).open();
    t.context("ctx", CONTEXT);
    t.ok("docker build -q --network none -t $MINE ctx");
    let daemon = pool.daemons().into_iter().find(|d| d.has_image(&image)).expect("the image is somewhere");
    (t, daemon)
}

fn told_and_not_moved(bound: &Session, own: &Daemon, other: &Daemon) {
    let elsewhere = other.containers().len();
    for command in ["docker start bound", "docker run --name more --network none $MINE true", "docker ps"] {
        let start = Instant::now();
        let out = bound.fails(command);
        say(format!("          {command}: {:?}: {}", start.elapsed(), out.stderr.trim()));
        assert!(out.stderr.contains(&own.id), "{command}: {}", out.all());
    }
    assert_eq!(other.containers().len(), elsewhere, "nothing of it was begun elsewhere");
}

/// A dockerd on which nothing that makes a layer succeeds, at once and with no word of a disk, while this lives.
struct Poisoned {
    folder: PathBuf,
    aside: PathBuf,
}

impl Poisoned {
    fn new(root: &Path) -> Poisoned {
        let folder = root.join("image/overlay2/layerdb/tmp");
        let aside = folder.with_extension("aside");
        fs::rename(&folder, &aside).unwrap();
        fs::write(&folder, "not a folder").unwrap();
        Poisoned { folder, aside }
    }
}

impl Drop for Poisoned {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.folder);
        let _ = fs::rename(&self.aside, &self.folder);
    }
}

/// A build in a new session that makes a layer; whether it succeeded.
fn builds(pool: &Pool, flavour: Flavour) -> bool {
    let t = Session::new(&pool.host(), flavour);
    t.context("ctx", CONTEXT);
    t.write("ctx/mark", unique());
    t.write("ctx/Dockerfile", format!("{CONTEXT}ADD mark /\n"));
    t.run("docker build -q --no-cache --network none ctx").code == 0
}

#[test]
fn row_32_ten_broken_dockerfiles_eject_nobody_and_a_daemon_that_fails_everything_is_out_for_ever_longer() {
    crate::require!(needs());
    let roots = [short_dir(), short_dir()];
    let daemons = roots.each_ref().map(|root| Dockerd::start("28.5", root.path()));
    let pool = Pool::serve(daemons.iter().map(|d| &d.addr)).start();
    pool.wait_healthy(2, secs(20));
    let ejections = || pool.metric("dindpool_ejections_total{reason=\"writes\"}");
    let deep = || pool.metric("dindpool_probes_total{kind=\"deep\",outcome=\"answered\"}");
    let begun = deep();
    let faults = [(client::CLI_28, "NONSENSE"), (client::BUILDX_29, "COPY nothing /")];
    for (flavour, fault) in faults {
        let t = Session::new(&pool.host(), flavour);
        t.context("ctx", &format!("FROM scratch\n{fault}\n"));
        for _ in 0..5 {
            t.fails("docker build --network none ctx");
            assert_eq!(pool.healthy(), 2, "{}", pool.status());
        }
    }
    wait_until("they were looked into", secs(20), || deep() > begun);
    holds_for("nobody is out", secs(1), || pool.healthy() == 2);
    assert_eq!(ejections(), 0.0);

    let mut pauses = Vec::new();
    for round in 1..=2 {
        let poisoned = Poisoned::new(roots[0].path());
        assert!(is_healthy(&pool, &daemons[0].addr), "/info is as green as ever");
        let (start, mut victims, mut done) = (Instant::now(), 0, 0);
        while is_healthy(&pool, &daemons[0].addr) {
            // On a machine without a moment to spare, of BuildKit's builds nobody but their client knows that they fail.
            victims += usize::from(!builds(&pool, [client::CLI_28, client::CLI_20][done % 2]));
            done += 1;
            assert!(start.elapsed() < secs(60), "not noticed after {done} builds, {victims} of which failed");
        }
        let out = start.elapsed();
        let sick = standing(&pool, &daemons[0].addr);
        assert!(sick["reason"].as_str().unwrap().contains("cannot write"), "{sick}");
        assert_eq!(ejections(), f64::from(round));
        assert!((0..2).all(|_| builds(&pool, client::CLI_28)), "the other one serves");
        pauses.push(sick["back_off"].as_f64().unwrap());
        // As a rule at most half of the pool is out for this, so the second stays and says what is wrong.
        if round == 1 {
            let other = Poisoned::new(roots[1].path());
            wait_until("the second is noticed", secs(60), || {
                assert!(!builds(&pool, client::CLI_28), "there is nothing that could");
                pool.status()["problems"].to_string().contains("too few are left")
            });
            assert!(is_healthy(&pool, &daemons[1].addr));
            drop(other);
            wait_until("it is well", secs(60), || {
                builds(&pool, client::CLI_28) && pool.status()["problems"] == json!([])
            });
        }
        drop(poisoned);
        let back = wait_until("it is back", secs(60), || is_healthy(&pool, &daemons[0].addr));
        say(format!(
            "          row 32: {victims} of {done} builds failed, out after {out:?}, back {back:?} after it was well"
        ));
        assert!(victims <= 3, "{victims} victims");
    }
    assert_eq!(pauses, [1.0, 2.0], "the second pause is longer");
}

/// Slots of each daemon, and clients that wait for one.
const SLOTS: usize = 4;

#[test]
fn row_34_who_waited_for_a_daemon_that_comes_back_gets_it_one_after_the_other() {
    crate::require!(needs());
    let roots = [short_dir(), short_dir()];
    let mut daemons = roots.each_ref().map(|root| Dockerd::start("28.5", root.path()));
    let pool = Pool::serve(daemons.iter().map(|d| &d.addr)).env("DINDPOOL_SLOTS", &SLOTS.to_string()).start();
    pool.wait_healthy(2, secs(20));
    let (dead, alive) = (daemons[0].addr.clone(), daemons[1].addr.clone());
    daemons[0].signal(Signal::SIGKILL);
    wait_until("it is out", secs(5), || pool.healthy() == 1);
    // One session takes all slots of the daemon that is left, and as many clients wait as it has.
    let hold = |n: usize| {
        let t = Session::new(&pool.host(), client::CLI_28);
        t.context("ctx", &format!("{CONTEXT}RUN sleep 1000\n"));
        let job = t.start("exec docker build --no-cache --network none ctx");
        (n, t, job)
    };
    let holders: Vec<_> = (0..SLOTS).map(hold).collect();
    wait_until("it is full", secs(60), || standing(&pool, &alive)["used"] == SLOTS);
    let waiters: Vec<_> = (0..SLOTS).map(hold).collect();
    wait_until("all wait", secs(60), || pool.status()["queue"]["waiting"] == SLOTS);

    daemons[0].restart();
    // By the daemon's own word: the containers of its builds.
    let running = || http::get(&dead, "/containers/json").json().as_array().map_or(0, Vec::len);
    let out = || !is_healthy(&pool, &dead);
    let (mut back, mut times) = (Instant::now(), Vec::new());
    wait_until("all are served", secs(60), || {
        if times.is_empty() && running() == 0 && out() {
            back = Instant::now();
            return false;
        }
        let (now, since) = (running(), back.elapsed());
        times.extend((times.len()..now).map(|_| since));
        assert!(now <= 1 + since.as_secs() as usize, "{now} clients {since:?} after it came back");
        now == SLOTS
    });
    say(format!("          row 34: {SLOTS} clients that waited were served {times:.1?} after it came back"));
    assert!(times[SLOTS - 1] >= secs(SLOTS as u64 - 1));
    assert!(waiters.iter().chain(&holders).all(|(_, _, job)| job.code().is_none()), "nobody was lost");
}

#[test]
fn row_33_when_nobody_is_well_every_client_is_told_so_and_nothing_is_sent_anywhere() {
    crate::require!(needs());
    let roots = [short_dir(), short_dir()];
    let mut daemons = roots.each_ref().map(|root| Dockerd::start("28.5", root.path()));
    let pool = Pool::serve(daemons.iter().map(|d| &d.addr)).start();
    pool.wait_healthy(2, secs(20));
    assert_eq!(pool.admin("/readyz").head.status(), 200);
    // One is dead, and one takes connections and answers nothing.
    daemons[0].signal(Signal::SIGKILL);
    daemons[1].signal(Signal::SIGSTOP);
    wait_until("both are out", secs(20), || pool.healthy() == 0);
    assert_eq!(pool.admin("/readyz").head.status(), 503);
    assert_eq!(pool.admin("/livez").head.status(), 200, "the proxy itself lives");

    let name = format!("v{}", unique());
    let volume = json!({ "Name": name });
    let start = Instant::now();
    for (method, path) in [("GET", "/v1.44/containers/json"), ("POST", "/v1.44/volumes/create")] {
        let body = (method == "POST").then_some(&volume);
        let answer = http::request(&pool.tcp, method, path, body);
        assert_eq!(answer.head.status(), 503);
        assert_eq!(answer.head.get("content-type"), Some("application/json"));
        assert!(answer.head.get("retry-after").is_some());
        let message = answer.json()["message"].as_str().unwrap().to_owned();
        for daemon in pool.daemons() {
            assert!(message.contains(&daemon.id), "{message:?} does not tell that {} was tried", daemon.id);
        }
        assert_eq!(message.matches("ejected").count(), 2, "each is listed: {message}");
    }
    for flavour in BUILDERS {
        let t = Session::new(&pool.host(), flavour);
        t.context("ctx", CONTEXT);
        for (command, code) in [("docker ps", 1), ("docker run --rm nothing", 125), ("docker build ctx", 1)] {
            let out = t.run(command);
            assert_eq!(out.code, code, "{}: {command}: {}", flavour.name, out.all());
            let told = out.stderr.contains("daemon") && !out.stderr.contains("moby/buildkit");
            assert!(told, "{}: {command}: {}", flavour.name, out.all());
        }
    }
    say(format!("          row 33: eleven requests were refused, all in {:?}", start.elapsed()));
    daemons[1].signal(Signal::SIGCONT);
    daemons[0].restart();
    pool.wait_healthy(2, secs(30));
    for daemon in pool.daemons() {
        assert!(!daemon.has_volume(&name), "what was refused has been done on {}", daemon.id);
    }
    works(&pool, client::CLI_28);
}
