//! Real clients. A [`Session`] is a terminal: a shell that leads a POSIX session of its own (setsid), with its
//! own `DOCKER_CONFIG`, its docker CLI and its plugins. Everything started in it is one dindpool session.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::{parts, poll, secs, short_dir};

/// Which docker CLI with which plugins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flavour {
    /// For names of scenarios.
    pub name: &'static str,
    /// `cli-…` of the parts.
    cli: &'static str,
    /// `buildx-…` of the parts.
    buildx: Option<&'static str>,
    /// What DOCKER_BUILDKIT says.
    buildkit: bool,
}

/// The newest CLI with the newest buildx.
pub const BUILDX_38: Flavour =
    Flavour { name: "buildx 0.38", cli: "cli-28", buildx: Some("buildx-0.38"), buildkit: true };
/// buildx of Docker 28.5's time.
pub const BUILDX_29: Flavour =
    Flavour { name: "buildx 0.29", cli: "cli-28", buildx: Some("buildx-0.29"), buildkit: true };
/// The oldest buildx that Debian has.
pub const BUILDX_13: Flavour =
    Flavour { name: "buildx 0.13", cli: "cli-28", buildx: Some("buildx-0.13"), buildkit: true };
/// The newest CLI and the classic builder.
pub const CLI_28: Flavour = Flavour { name: "cli 28 classic", cli: "cli-28", buildx: None, buildkit: false };
/// The oldest CLI and the classic builder.
pub const CLI_20: Flavour =
    Flavour { name: "cli 20.10 classic", cli: "cli-20.10", buildx: None, buildkit: false };
/// The oldest CLI and its own BuildKit client, without a plugin.
pub const CLI_20_BUILDKIT: Flavour =
    Flavour { name: "cli 20.10 BuildKit", cli: "cli-20.10", buildx: None, buildkit: true };

impl Flavour {
    /// Whether `docker build` speaks BuildKit.
    pub fn is_buildkit(&self) -> bool {
        self.buildkit
    }

    /// Whether there is a buildx.
    pub fn has_buildx(&self) -> bool {
        self.buildx.is_some()
    }
}

/// `says docker run …`, a command of every terminal: what a container says, asked once more if that is nothing.
///
/// dockerd itself now and then loses all that a short container has written: asked straight, without a pool between,
/// 28.5 had empty logs, then and later, of 1 in 1,200 containers of `echo done` (eight at a time on two processors,
/// load 30).
pub const SAYS: &str = "#!/bin/sh\n\
    out=$(\"$@\") code=$?\n\
    if [ $code = 0 ] && [ -z \"$out\" ]; then\n\
    echo \"AGAIN: it has said nothing: $*\" >&2\n\
    out=$(\"$@\") code=$?\n\
    fi\n\
    [ -z \"$out\" ] || printf '%s\\n' \"$out\"\n\
    exit $code\n";

/// What a command left.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit status of the script.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Both streams, for searching messages.
    pub fn all(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// A terminal.
pub struct Session {
    dir: tempfile::TempDir,
    shell: Mutex<Child>,
    jobs: AtomicUsize,
}

/// How a session is to be.
pub struct SessionBuilder {
    flavour: Flavour,
    host: String,
    env: Vec<(String, String)>,
    netns: Option<String>,
}

impl Session {
    /// A terminal whose `DOCKER_HOST` is `host`.
    pub fn new(host: &str, flavour: Flavour) -> Session {
        Self::with(host, flavour).open()
    }

    /// The same with settings.
    pub fn with(host: &str, flavour: Flavour) -> SessionBuilder {
        SessionBuilder { flavour, host: host.into(), env: Vec::new(), netns: None }
    }

    /// Its working directory.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join("w").join(file)
    }

    /// Writes a file into the working directory.
    pub fn write(&self, file: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(file);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(&path, content).expect("a file");
        path
    }

    /// A build context `dir` with this Dockerfile and busybox' root file system.
    pub fn context(&self, dir: &str, dockerfile: &str) {
        self.write(&format!("{dir}/Dockerfile"), dockerfile);
        fs::copy(parts::busybox("rootfs.tar"), self.path(&format!("{dir}/rootfs.tar"))).expect("rootfs.tar");
    }

    /// Starts a bash script in this session, as a job with a process group of its own.
    pub fn start(&self, script: &str) -> Job {
        let job = self.dir.path().join(format!("j{}", self.jobs.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&job).expect("a job directory");
        fs::write(job.join("script"), script).expect("a script");
        let j = job.display();
        // The inner shell dies of a Ctrl-C as its user expects; the outer one survives it to tell the status.
        let line = format!(
            "{{ trap : INT TERM HUP; echo $BASHPID >{j}/pid.new; mv {j}/pid.new {j}/pid; \
             bash {j}/script >{j}/out 2>{j}/err </dev/null; echo $? >{j}/rc.new; mv {j}/rc.new {j}/rc; }} &\n"
        );
        let mut shell = self.shell.lock().unwrap();
        shell.stdin.as_mut().expect("stdin").write_all(line.as_bytes()).expect("the shell lives");
        Job { dir: job, script: script.into() }
    }

    /// Runs a script to its end, whatever its status.
    #[track_caller]
    pub fn run(&self, script: &str) -> Output {
        self.start(script).wait(secs(180))
    }

    /// Runs a script that must succeed; what it wrote to stdout.
    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        let out = self.run(script);
        assert_eq!(out.code, 0, "exit {} of `{script}`\n{}\n{}", out.code, out.stdout, out.stderr);
        out.stdout
    }

    /// Runs a script that must fail; both streams.
    #[track_caller]
    pub fn fails(&self, script: &str) -> Output {
        let out = self.run(script);
        assert_ne!(out.code, 0, "`{script}` should fail\n{}\n{}", out.stdout, out.stderr);
        out
    }

    /// Pid of the session's leader.
    pub fn leader(&self) -> u32 {
        self.shell.lock().unwrap().id()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for n in 0..self.jobs.load(Ordering::Relaxed) {
            let job = Job { dir: self.dir.path().join(format!("j{n}")), script: String::new() };
            job.kill_if_running();
        }
        let shell = self.shell.get_mut().unwrap();
        drop(shell.stdin.take());
        let _ = shell.kill();
        let _ = shell.wait();
    }
}

impl SessionBuilder {
    /// One more environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// In this network namespace, so with another source IP.
    pub fn netns(mut self, name: &str) -> Self {
        self.netns = Some(name.into());
        self
    }

    /// Opens it.
    pub fn open(self) -> Session {
        let dir = short_dir();
        fs::create_dir(dir.path().join("w")).expect("a working directory");
        let plugins = dir.path().join("config/cli-plugins");
        fs::create_dir_all(&plugins).expect("a configuration directory");
        if let Some(buildx) = self.flavour.buildx {
            link(&parts::dir().join(buildx).join("docker-buildx"), &plugins.join("docker-buildx"));
            link(&parts::dir().join("compose-2.26/docker-compose"), &plugins.join("docker-compose"));
        }
        let says = dir.path().join("bin/says");
        fs::create_dir(dir.path().join("bin")).expect("a directory of commands");
        fs::write(&says, SAYS).expect("a script");
        fs::set_permissions(&says, fs::Permissions::from_mode(0o755)).expect("its mode");
        let path = std::env::var("PATH").unwrap_or_default();
        let (commands, cli) = (dir.path().join("bin"), parts::dir().join(self.flavour.cli));
        let mut command = match &self.netns {
            Some(name) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{name}")).args(["setsid", "bash"]);
                command
            }
            None => {
                let mut command = Command::new("setsid");
                command.arg("bash");
                command
            }
        };
        for name in ["DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "CI_JOB_ID", "BUILD_TAG", "GITHUB_RUN_ID"] {
            command.env_remove(name); // or they would be the session of all of them
        }
        command
            .env("DOCKER_HOST", &self.host)
            .env("DOCKER_CONFIG", dir.path().join("config"))
            .env("HOME", dir.path())
            .env("DOCKER_BUILDKIT", if self.flavour.buildkit { "1" } else { "0" })
            .env("BUILDKIT_PROGRESS", "plain")
            .env("PATH", format!("{}:{}:{path}", commands.display(), cli.display()))
            .envs(self.env)
            .current_dir(dir.path().join("w"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut shell = command.spawn().expect("bash");
        // Job control: each job gets a process group of its own, which a Ctrl-C can be sent to.
        shell.stdin.as_mut().expect("stdin").write_all(b"set -m\n").expect("the shell lives");
        Session { dir, shell: Mutex::new(shell), jobs: AtomicUsize::new(0) }
    }
}

fn link(from: &Path, to: &Path) {
    std::os::unix::fs::symlink(from, to).expect("a link");
}

/// A running or finished command of a session.
#[derive(Debug)]
pub struct Job {
    dir: PathBuf,
    script: String,
}

impl Job {
    fn file(&self, name: &str) -> String {
        let bytes = fs::read(self.dir.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What it has written to stdout so far.
    pub fn stdout(&self) -> String {
        self.file("out")
    }

    /// What it has written to stderr so far.
    pub fn stderr(&self) -> String {
        self.file("err")
    }

    /// How much it has written to stdout so far.
    pub fn stdout_len(&self) -> u64 {
        fs::metadata(self.dir.join("out")).map(|m| m.len()).unwrap_or(0)
    }

    /// Its exit status once it has ended.
    pub fn code(&self) -> Option<i32> {
        self.file("rc").trim().parse().ok()
    }

    /// What it left, if it has ended.
    pub fn output(&self) -> Option<Output> {
        self.code().map(|code| Output { code, stdout: self.stdout(), stderr: self.stderr() })
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&self, deadline: Duration) -> Output {
        let Some((out, _)) = poll(deadline, || self.output()) else {
            let (out, err) = (self.stdout(), self.stderr());
            self.kill_if_running();
            panic!("`{}` did not end within {deadline:?}\n{out}\n{err}", self.script);
        };
        out
    }

    /// Waits for its end, which must be a good one.
    #[track_caller]
    pub fn wait_ok(&self, deadline: Duration) -> String {
        let out = self.wait(deadline);
        assert_eq!(out.code, 0, "exit {} of `{}`\n{}\n{}", out.code, self.script, out.stdout, out.stderr);
        out.stdout
    }

    fn group(&self) -> Option<Pid> {
        self.file("pid").trim().parse().ok().map(Pid::from_raw)
    }

    /// Sends a signal to all processes of the job, as a terminal does. After SIGSTOP every thread of theirs has
    /// stopped: the kernel lets one that runs on another processor go on for a moment.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let (group, _) = poll(secs(5), || self.group()).expect("the job has started");
        killpg(group, signal).expect("the job lives");
        if signal == Signal::SIGSTOP {
            super::wait_until("all of it has stopped", secs(5), || stands_still(group));
        }
    }

    fn kill_if_running(&self) {
        if self.code().is_none()
            && let Some(group) = self.group()
        {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Whether every thread of every process of a group is stopped, or has ended.
fn stands_still(group: Pid) -> bool {
    // proc(5): "pid (comm) state ppid pgrp …", and comm may have blanks and brackets.
    let stat = |path: PathBuf| fs::read_to_string(path.join("stat")).unwrap_or_default();
    let fields = |stat: String| {
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        rest.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let list = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    list("/proc".into())
        .filter(|process| fields(stat(process.clone())).get(2) == Some(&group.to_string()))
        .flat_map(|process| list(process.join("task")))
        .all(|thread| {
            fields(stat(thread)).first().is_none_or(|state| ["T", "t", "Z", "X"].contains(&state.as_str()))
        })
}
