//! Daemons, and what is done to them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::common::dockerd::{Dockerd, Tmpfs};
use crate::common::http::Addr;
use crate::common::pool::Pool;
use crate::common::{millis, poll, say, secs, short_dir, wait_until};
use crate::work::Outcome;
use crate::{Dice, pause};

pub const DAEMONS: usize = 3;
/// How long after a fault its consequences may show: a request of a bound session to a frozen daemon ends after 11 s.
const AFTERMATH: Duration = secs(15);

/// One fault and the daemon that it has hit.
#[derive(Debug)]
pub struct Fault {
    what: &'static str,
    daemon: String,
    begin: Instant,
    end: Instant,
}

/// The daemons; the first has a small disk.
pub struct Lab {
    daemons: Vec<Dockerd>,
    disk: Tmpfs,
    pub addresses: Vec<Addr>,
    pub dir: tempfile::TempDir,
    _roots: Vec<tempfile::TempDir>,
    /// Those that may cost work.
    pub faults: Vec<Fault>,
    harmless: BTreeMap<&'static str, usize>,
}

impl Lab {
    pub fn start() -> Lab {
        let (disk, roots) = (Tmpfs::new(512), vec![short_dir(), short_dir()]);
        let mut daemons = vec![Dockerd::start("28.5", disk.path())];
        daemons.extend(roots.iter().map(|root| Dockerd::start("28.5", root.path())));
        let addresses = daemons.iter().map(|d| d.addr.clone()).collect();
        let (faults, harmless) = Default::default();
        Lab { daemons, disk, addresses, dir: short_dir(), _roots: roots, faults, harmless }
    }

    /// One fault from its beginning to its end, and a pause.
    pub fn once(&mut self, dice: &mut Dice, pool: &Pool, admin: &Path) {
        pause(millis(500 + dice.below(3000)));
        let victim = dice.below(DAEMONS as u64) as usize;
        let id = name(pool, &self.addresses[victim]);
        let begin = Instant::now();
        let what = match dice.below(10) {
            0 | 1 => {
                self.daemons[victim].signal(Signal::SIGKILL);
                wait_until("the kill is noticed", secs(30), || pool.healthy() < DAEMONS);
                pause(millis(dice.below(2000)));
                self.daemons[victim].restart();
                "kill"
            }
            2 | 3 => {
                self.daemons[victim].signal(Signal::SIGSTOP);
                pause(millis(300 + dice.below(8000)));
                self.daemons[victim].signal(Signal::SIGCONT);
                "freeze"
            }
            4 => {
                self.disk.fill();
                let id = name(pool, &self.addresses[0]);
                pause(millis(500 + dice.below(5000)));
                self.disk.free();
                return self.hit("full disk", id, begin, pool);
            }
            5 | 6 => {
                command(admin, &["drain", &id, "--deadline", &format!("{}s", 1 + dice.below(5))]);
                command(admin, &["uncordon", &id]);
                "drain"
            }
            7 => {
                command(admin, &["cordon", &id]);
                pause(millis(dice.below(4000)));
                command(admin, &["uncordon", &id]);
                return self.harmless("cordon");
            }
            _ => {
                pool.reload();
                return self.harmless("reload");
            }
        };
        self.hit(what, id, begin, pool);
    }

    fn hit(&mut self, what: &'static str, daemon: String, begin: Instant, pool: &Pool) {
        let took = begin.elapsed();
        // All of them are back before the next one: two daemons at once may be all that there is.
        pool.wait_healthy(DAEMONS, secs(150));
        say(format!("  soak: {what} of {daemon}, {took:?}, back after {:?}", begin.elapsed()));
        self.faults.push(Fault { what, daemon, begin, end: Instant::now() });
    }

    fn harmless(&mut self, what: &'static str) {
        *self.harmless.entry(what).or_default() += 1;
    }

    pub fn counts(&self) -> String {
        let mut counts = self.harmless.clone();
        self.faults.iter().for_each(|fault| *counts.entry(fault.what).or_default() += 1);
        format!("{counts:?}")
    }

    /// Whether work failed because of a fault of a daemon that it was on, by the pool's log.
    pub fn excuses(&self, outcome: &Outcome, log: &str) -> bool {
        let key = format!("posix:{}@", outcome.session);
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(&key)).collect();
        self.faults.iter().any(|fault| {
            lines.iter().any(|line| line.contains(&fault.daemon))
                && outcome.begin <= fault.end + AFTERMATH
                && fault.begin <= outcome.end
        })
    }
}

/// The pool's name for the daemon at this address.
fn name(pool: &Pool, address: &Addr) -> String {
    let all = pool.daemons();
    all.into_iter().find(|d| d.addr == *address).expect("a daemon of the pool").id
}

/// `dindpool …`, as an operator would.
fn command(admin: &Path, words: &[&str]) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_dindpool"));
    command.args(words).arg("--admin").arg(format!("unix://{}", admin.display()));
    let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    let ended = poll(secs(60), || child.try_wait().unwrap());
    let (status, _) = ended.unwrap_or_else(|| panic!("dindpool {words:?} does not end"));
    // 3: a drain that had to cut something.
    let told = status.success() || (words[0] == "drain" && status.code() == Some(3));
    assert!(told, "dindpool {words:?}: {status}");
}
