//! What clients do, each time in a session of its own, and how it ended.

use std::time::Instant;

use nix::sys::signal::Signal;

use crate::Dice;
use crate::common::client::{self, Flavour, Output, Session};
use crate::common::pool::Pool;
use crate::common::{poll, secs, unique};

pub const KINDS: [&str; 6] = ["classic", "buildx", "buildkit 20.10", "run", "compose", "save"];

/// How far a container counts.
const LINES: usize = 40;
/// Longer than any work takes, waiting for a slot and for a frozen daemon included.
const PATIENCE: std::time::Duration = secs(180);

/// How one piece of work ended.
#[derive(Debug)]
#[allow(dead_code, reason = "what it said is for the report of a failure")]
pub struct Outcome {
    pub kind: &'static str,
    pub code: i32,
    /// Whether all is there that belongs to an exit with 0.
    pub whole: bool,
    /// Whether its client was killed by us.
    pub killed: bool,
    /// The leader of its session, by which the pool's log knows it.
    pub session: u32,
    pub begin: Instant,
    pub end: Instant,
    pub said: String,
}

/// A user who never rests.
pub struct Worker<'a> {
    pool: &'a Pool,
    dice: Dice,
}

impl<'a> Worker<'a> {
    pub fn new(pool: &'a Pool, dice: Dice) -> Self {
        Worker { pool, dice }
    }

    /// One piece of work.
    pub fn once(&mut self) -> Outcome {
        let kind = KINDS[self.dice.below(KINDS.len() as u64) as usize];
        let flavour = flavour(kind);
        let (t, name) = (Session::new(&self.pool.host(), flavour), format!("s{}", unique()));
        t.context("ctx", "FROM scratch\nADD rootfs.tar /\nARG MARK\nRUN usleep 300000; echo $MARK >/mark\n");
        let compose = format!(
            "services:\n  one:\n    build: {{ context: ctx, network: none, args: {{ MARK: {name} }} }}\n    image: {name}\n    \
             network_mode: none\n    command: sh -c 'usleep 500000; cat /mark'\n"
        );
        t.write("compose.yaml", compose);
        let kill = (self.dice.below(8) == 0).then(|| (100 + self.dice.below(1500), self.dice.below(2) == 0));
        let begin = Instant::now();
        let job = t.start(&script(kind, &name));
        let mut killed = false;
        let ended = poll(PATIENCE, || {
            if let Some((after, hard)) = kill
                && !killed
                && begin.elapsed().as_millis() as u64 > after
                && job.output().is_none()
            {
                job.signal(if hard { Signal::SIGKILL } else { Signal::SIGINT });
                killed = true;
            }
            // The shell that would tell the status of a killed job is killed with it.
            if killed && hard(kill) {
                return Some(Output { code: 137, stdout: job.stdout(), stderr: job.stderr() });
            }
            job.output()
        });
        let (out, _) = ended.unwrap_or_else(|| {
            panic!("{kind} {name} did not end within {PATIENCE:?}: {}\n{}", job.stderr(), self.pool.status())
        });
        let end = Instant::now();
        let whole = whole(kind, &name, &out.stdout);
        // What is left of it is nobody's affair, and may be on a daemon that is down. Without --no-prune the classic
        // builder's cache would go along, also from under a build that has just decided to use it (a race of dockerd's).
        if !killed {
            t.run(&format!(
                "docker rm -f {name} >/dev/null 2>&1; docker rmi -f --no-prune {name} >/dev/null 2>&1; true"
            ));
        }
        Outcome { kind, code: out.code, whole, killed, session: t.leader(), begin, end, said: out.all() }
    }
}

fn hard(kill: Option<(u64, bool)>) -> bool {
    kill.is_some_and(|(_, hard)| hard)
}

fn flavour(kind: &str) -> Flavour {
    match kind {
        "buildx" | "compose" => client::BUILDX_29,
        "buildkit 20.10" => client::CLI_20_BUILDKIT,
        _ => client::CLI_28,
    }
}

fn script(kind: &str, name: &str) -> String {
    let build = format!(
        "docker build --network none --build-arg MARK={name} -t {name} ctx >log 2>&1 || {{ r=$?; cat log >&2; exit $r; }}\n"
    );
    match kind {
        "run" => format!(
            "{build}docker run --name {name} --network none {name} sh -c \
             'i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo $i; usleep 30000; done; echo end'"
        ),
        "save" => format!("{build}docker save -o image.tar {name} && tar -xOf image.tar manifest.json"),
        "compose" => "docker compose up --build --abort-on-container-exit --exit-code-from one && \
                      docker compose down --rmi local"
            .replace("docker compose", &format!("docker compose -p {name}")),
        _ => {
            format!("{build}docker run --name {name} --network none {name} sh -c 'usleep 300000; cat /mark'")
        }
    }
}

/// Whether the output is all that the work had to say.
fn whole(kind: &str, name: &str, out: &str) -> bool {
    match kind {
        "run" => {
            let lines: Vec<&str> = out.lines().collect();
            let numbers = (1..=LINES).map(|n| n.to_string()).chain(["end".to_string()]);
            lines.into_iter().map(str::to_owned).eq(numbers)
        }
        "save" => out.contains("RepoTags") && out.contains(name),
        "compose" => out.lines().any(|l| l.ends_with(name)),
        _ => out == format!("{name}\n"),
    }
}
