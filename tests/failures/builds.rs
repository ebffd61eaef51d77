//! What a user sees when something breaks: Ctrl-C, a daemon that dies in mid-build, a pool that is down.
use std::time::Instant;

use crate::common::client::{self, Flavour, Session};
use crate::common::daemon::{Daemon, processes};
use crate::common::http::Addr;
use crate::common::pool::Pool;
use crate::common::scenarios::Scenarios;
use crate::common::{parts, say, secs, unique, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub const BUILDERS: [Flavour; 3] = [client::BUILDX_29, client::CLI_28, client::CLI_20_BUILDKIT];

fn start(daemons: usize) -> Result<Pool, String> {
    parts::all(&[
        "busybox/rootfs.tar",
        "cli-28/docker",
        "cli-20.10/docker",
        "buildx-0.29/docker-buildx",
        "compose-2.26/docker-compose",
    ])?;
    let pool = Pool::up(&[parts::dockerd("28.5")?], daemons).short_grace().start();
    pool.wait_healthy(daemons, secs(60));
    Ok(pool)
}

/// A build that hangs in a RUN which the whole machine can see.
pub struct HangingBuild {
    pub job: client::Job,
    session: Session,
    /// The argument by which the RUN's process is known.
    mark: String,
}

impl HangingBuild {
    pub fn start(pool: &Pool, flavour: Flavour) -> HangingBuild {
        let session = Session::new(&pool.host(), flavour);
        let mark = format!("7{}", unique().replace('x', "."));
        session.context("ctx", &format!("FROM scratch\nADD rootfs.tar /\nRUN echo begun; sleep {mark}\n"));
        let job = session.start("exec docker build --no-cache --network none ctx");
        let build = HangingBuild { job, session, mark };
        wait_until("the RUN runs", secs(60), || {
            let ended = build.job.output();
            assert!(ended.is_none(), "the build ended: {ended:?}");
            build.runs()
        });
        build
    }

    pub fn runs(&self) -> bool {
        !processes(&self.mark).is_empty()
    }

    /// The address of the daemon that its session is bound to, as the pool has it.
    pub fn bound_to(&self, pool: &Pool) -> Addr {
        let key = format!("posix:{}@", self.session.leader());
        let sessions = pool.sessions();
        let own = sessions.iter().find(|s| s["key"].as_str().unwrap().starts_with(&key));
        let id = own.expect("the build's session")["daemon"].as_str().unwrap().to_owned();
        pool.daemons().into_iter().find(|d| d.id == id).expect("its daemon").addr
    }

    /// The daemon on which it runs: an ancestor of the RUN's process lives in its network namespace.
    pub fn daemon(&self, daemons: &[Daemon]) -> Daemon {
        let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let mut pid = processes(&self.mark)[0];
        while pid > 1 {
            if let Some(daemon) = daemons.iter().find(|d| namespace(d.pid()) == namespace(pid)) {
                return daemon.clone();
            }
            pid = parent(pid);
        }
        panic!("no daemon of the pool runs {}", self.mark);
    }
}

fn parent(pid: i32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    rest.split(' ').nth(1).and_then(|p| p.parse().ok()).unwrap_or(0)
}

fn signal(daemon: &Daemon, signal: Signal) {
    kill(Pid::from_raw(daemon.pid()), signal).unwrap();
}

/// A container whose output goes on until it is told to stop; each line is the next number.
pub struct Counter {
    session: Session,
    job: client::Job,
    /// Its container.
    pub name: String,
}

impl Counter {
    pub fn start(host: &str) -> Counter {
        let (session, name) = (Session::new(host, client::CLI_28), format!("n{}", unique()));
        session.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
        session.ok(&format!("docker build -q -t counter:{name} ctx"));
        let count = "i=0; until test -e /stop; do i=$((i+1)); echo $i; usleep 50000; done; echo end";
        let job = session
            .start(&format!("exec docker run --name {name} --network none counter:{name} sh -c '{count}'"));
        wait_until("it counts", secs(30), || job.stdout().contains("3\n"));
        Counter { session, job, name }
    }

    pub fn counts(&self) {
        let seen = self.job.stdout_len();
        wait_until("it goes on", secs(5), || self.job.stdout_len() > seen);
    }

    /// What its client left, if that has ended.
    pub fn ended(&self) -> Option<client::Output> {
        self.job.output()
    }

    /// Ends it, and checks that nothing of it was lost.
    pub fn stop(&self, host: &str) {
        let other = Session::new(host, client::CLI_28);
        other.ok(&format!("docker exec {} touch /stop", self.name));
        self.check();
        self.session.ok(&format!("docker rm {}", self.name));
    }

    fn check(&self) {
        let out = self.job.wait_ok(secs(20));
        let lines: Vec<&str> = out.lines().collect();
        let numbers = lines.len() - 1;
        assert_eq!(lines[numbers], "end");
        assert!((0..numbers).all(|i| lines[i] == (i + 1).to_string()), "a line is missing:\n{out}");
    }
}

/// Builds and runs something in a new session.
pub fn works(pool: &Pool, flavour: Flavour) {
    let (t, mark) = (Session::new(&pool.host(), flavour), unique());
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\nARG MARK\nRUN echo $MARK >/mark\n");
    t.ok(&format!("docker build -q --network none --build-arg MARK={mark} -t works:{mark} ctx"));
    assert_eq!(
        t.ok(&format!("says docker run --rm --network none works:{mark} cat /mark")),
        format!("{mark}\n")
    );
}

#[test]
fn failures_of_daemons_and_clients_stay_where_they_are() {
    let pool = &crate::require!(start(3));
    let mut all = Scenarios::new("28.5");
    for flavour in BUILDERS {
        all.add(
            format!("{}: Ctrl-C in mid-build stops the daemon's work within a second", flavour.name),
            move || {
                row_46_ctrl_c_in_mid_build_stops_the_daemons_work_within_a_second(pool, flavour);
            },
        );
    }
    for flavour in BUILDERS {
        all.add(
            format!("{}: a daemon killed in mid-build fails its client within a second", flavour.name),
            move || {
                row_01_a_daemon_killed_in_mid_build_fails_its_client_within_a_second(pool, flavour);
            },
        );
    }
    all.add("a frozen daemon gets no new sessions, and is taken back when it thaws", || {
        row_02_a_frozen_daemon_gets_no_new_sessions_and_is_taken_back_when_it_thaws(pool);
    });
    all.add("SIGTERM lets open streams finish", || {
        row_13_a_proxy_that_is_told_to_stop_lets_open_streams_finish(pool)
    });
    all.run(1);
}

fn row_46_ctrl_c_in_mid_build_stops_the_daemons_work_within_a_second(pool: &Pool, flavour: Flavour) {
    let mut times: Vec<u128> = (0..3)
        .map(|_| {
            let build = HangingBuild::start(pool, flavour);
            let start = Instant::now();
            build.job.signal(Signal::SIGINT);
            wait_until("the RUN's process is gone", secs(20), || !build.runs());
            let time = start.elapsed().as_millis();
            let out = build.job.wait(secs(20));
            assert_ne!(out.code, 0, "{}", out.all());
            time
        })
        .collect();
    times.sort_unstable();
    say(format!("          {}: the RUN was gone {times:?} ms after Ctrl-C", flavour.name));
    assert!(times[1] <= 1000, "the median of {times:?} ms is more than a second");
}

fn row_01_a_daemon_killed_in_mid_build_fails_its_client_within_a_second(pool: &Pool, flavour: Flavour) {
    let host = pool.host();
    let build = HangingBuild::start(pool, flavour);
    let victim = build.daemon(&pool.daemons());
    // Somebody on another daemon, who must notice nothing.
    let others: Vec<Counter> = (0..3).map(|_| Counter::start(&host)).collect();
    let (near, far): (Vec<Counter>, Vec<Counter>) =
        others.into_iter().partition(|c| victim.has_container(&c.name));
    assert!(!far.is_empty(), "three sessions beside a build, and all on its daemon");
    let start = Instant::now();
    signal(&victim, Signal::SIGKILL);
    let out = build.job.wait(secs(30));
    let time = start.elapsed().as_millis();
    say(format!("          {}: exit {} after {time} ms: {}", flavour.name, out.code, last_line(&out.stderr)));
    assert_ne!(out.code, 0, "{}", out.all());
    assert!(!out.stderr.trim().is_empty(), "there is a message");
    assert!(time <= 1000, "{time} ms");
    // At once, while the daemon is still dead.
    works(pool, flavour);
    for counter in &far {
        counter.counts();
        counter.stop(&host);
    }
    drop(near);
    pool.wait_healthy(3, secs(60));
    works(pool, flavour);
}

pub fn last_line(text: &str) -> &str {
    text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or_default()
}

fn row_02_a_frozen_daemon_gets_no_new_sessions_and_is_taken_back_when_it_thaws(pool: &Pool) {
    let daemons = pool.daemons();
    signal(&daemons[0], Signal::SIGSTOP);
    let out = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let took = wait_until("it is ejected", secs(30), || pool.healthy() == 2);
        say(format!("          ejected after {} ms", took.as_millis()));
        for flavour in BUILDERS {
            works(pool, flavour);
        }
    }));
    // Its socket still takes connections, so its pid is known though it answers nothing.
    signal(&daemons[0], Signal::SIGCONT);
    if let Err(why) = out {
        std::panic::resume_unwind(why);
    }
    pool.wait_healthy(3, secs(60));
}

fn row_13_a_proxy_that_is_told_to_stop_lets_open_streams_finish(pool: &Pool) {
    let daemons = pool.daemons();
    let front = Pool::serve(daemons.iter().map(|d| &d.addr)).env("DINDPOOL_SHUTDOWN_GRACE", "30s").start();
    front.wait_healthy(3, secs(20));
    let counter = Counter::start(&front.host());
    let addr = front.tcp.clone();
    let stopping = std::thread::spawn(move || front.stop());
    wait_until("it takes no new connections", secs(5), || {
        crate::common::http::Conn::try_connect(&addr).is_err()
    });
    counter.counts();
    // Through the other proxy in front of the same daemons, since this one is closing.
    let other = Session::new(&pool.host(), client::CLI_28);
    other.ok(&format!("docker exec {} touch /stop", counter.name));
    counter.check();
    assert_eq!(stopping.join().unwrap(), Some(0), "it ends with 0 once the stream is done");
    other.ok(&format!("docker rm {}", counter.name));
}
