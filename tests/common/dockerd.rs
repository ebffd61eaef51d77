//! A dockerd of a test's own, with a data root that the test chooses: a small tmpfs that fills up, one that is
//! emptied while it is down, one that two daemons share. It has no bridge, so builds and runs need
//! `--network none`.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::http::{self, Addr};
use super::{parts, poll, secs, short_dir, tail};

/// A file system of a few MiB in memory.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    pub fn new(mib: u32) -> Tmpfs {
        let dir = short_dir();
        let size = format!("size={mib}m");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).status();
        assert!(mounted.unwrap().success(), "a tmpfs");
        Tmpfs(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes all that is left.
    pub fn fill(&self) {
        let mut file = File::create(self.filler()).unwrap();
        for size in [64 << 10, 512] {
            while file.write_all(&vec![b'x'; size]).is_ok() {}
        }
    }

    /// Gives it back.
    pub fn free(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// How much memory a dockerd and what it starts may use: a memory cgroup, of either version. The containers are not in
/// it, they get cgroups of their own beside it.
pub struct MemoryLimit {
    dir: PathBuf,
    unified: bool,
}

impl MemoryLimit {
    /// One without a limit yet, or why there cannot be one here.
    pub fn new() -> Result<MemoryLimit, String> {
        super::root()?;
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let hierarchies = mounts.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let (at, options) = (Path::new(fields[1]), fields[3]);
            match fields[2] {
                "cgroup" if options.split(',').any(|o| o == "memory") => Some((at.to_path_buf(), false)),
                "cgroup2" => {
                    let _ = fs::write(at.join("cgroup.subtree_control"), "+memory");
                    let given = fs::read_to_string(at.join("cgroup.subtree_control")).unwrap_or_default();
                    given.split_whitespace().any(|c| c == "memory").then(|| (at.to_path_buf(), true))
                }
                _ => None,
            }
        });
        for (root, unified) in hierarchies {
            let dir = root.join(format!("dp{}", super::unique()));
            if fs::create_dir(&dir).is_ok() {
                return Ok(MemoryLimit { dir, unified });
            }
        }
        Err("there is no memory cgroup that can be written to".into())
    }

    fn number(&self, file: &str) -> u64 {
        fs::read_to_string(self.dir.join(file)).unwrap().trim().parse().unwrap()
    }

    /// From now on there is room for this much more.
    pub fn leave(&self, more: u64) {
        let (used, limit) = if self.unified {
            ("memory.current", "memory.max")
        } else {
            ("memory.usage_in_bytes", "memory.limit_in_bytes")
        };
        let bytes = self.number(used) + more;
        fs::write(self.dir.join(limit), bytes.to_string()).unwrap();
    }

    /// Takes the limit away.
    pub fn lift(&self) {
        let (file, all) = if self.unified { ("memory.max", "max") } else { ("memory.limit_in_bytes", "-1") };
        fs::write(self.dir.join(file), all).unwrap();
    }

    /// How many processes the kernel has killed for want of memory.
    pub fn kills(&self) -> u64 {
        let file = if self.unified { "memory.events" } else { "memory.oom_control" };
        let text = fs::read_to_string(self.dir.join(file)).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("oom_kill "));
        line.expect("a count of OOM kills").parse().unwrap()
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Killed processes are in it until they are reaped, which init may do a moment later.
        poll(secs(5), || fs::remove_dir(&self.dir).ok());
    }
}

/// How a dockerd is started, again and again.
struct Setup {
    binary: PathBuf,
    data: PathBuf,
    locks: bool,
    env: Vec<(String, String)>,
    cgroup: Option<PathBuf>,
    /// Where it listens with TLS as well, and the directory of its ca.pem, cert.pem and key.pem.
    tls: Option<(String, PathBuf)>,
}

/// A running dockerd.
pub struct Dockerd {
    child: Child,
    dir: tempfile::TempDir,
    setup: Setup,
    /// Its socket.
    pub addr: Addr,
}

impl Dockerd {
    /// One of this version on this data root.
    pub fn start(version: &str, data: &Path) -> Dockerd {
        Self::of(Setup::new(version, data))
    }

    /// One on a file system whose locks keep nobody out (some network file systems): `flock` succeeds without
    /// locking, for it and for its containerd. With locks, no dockerd from 20.10 to 29 starts on a data root that
    /// another one has.
    pub fn without_locks(version: &str, data: &Path) -> Dockerd {
        Self::of(Setup { locks: false, ..Setup::new(version, data) })
    }

    /// One with this variable in its environment.
    pub fn with_env(version: &str, data: &Path, name: &str, value: &str) -> Dockerd {
        Self::of(Setup { env: vec![(name.into(), value.into())], ..Setup::new(version, data) })
    }

    /// One whose memory is limited.
    pub fn within(version: &str, data: &Path, limit: &MemoryLimit) -> Dockerd {
        Self::of(Setup { cgroup: Some(limit.dir.clone()), ..Setup::new(version, data) })
    }

    /// One that also listens at this host and port with `--tlsverify`, with the ca.pem, cert.pem and key.pem of this
    /// directory.
    pub fn with_tls(version: &str, data: &Path, at: &str, certs: &Path) -> Dockerd {
        Self::of(Setup { tls: Some((at.into(), certs.into())), ..Setup::new(version, data) })
    }

    fn of(setup: Setup) -> Dockerd {
        let dir = short_dir();
        let addr = Addr::Unix(dir.path().join("s"));
        let child = setup.launch(dir.path());
        let daemon = Dockerd { child, dir, setup, addr };
        daemon.wait();
        daemon
    }

    fn wait(&self) {
        let answers = || http::try_request(&self.addr, "GET", "/_ping", None).is_ok();
        if poll(secs(60), || answers().then_some(())).is_none() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            panic!("{} does not serve:\n{}", self.setup.binary.display(), tail(&log, 20));
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// The signal that it died of, once it has died of one.
    pub fn died_of(&mut self) -> Option<i32> {
        self.child.try_wait().unwrap().and_then(|status| status.signal())
    }

    /// Ends it, and everything that it started.
    pub fn stop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGCONT);
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        if poll(secs(20), || self.child.try_wait().ok().flatten()).is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        // It led a session of its own; containerd outlives a killed dockerd.
        let pid = fs::read_to_string(self.dir.path().join("x/containerd/containerd.pid"));
        if let Some(pid) = pid.ok().and_then(|pid| pid.trim().parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// Starts it again, on what is in its data root now.
    pub fn restart(&mut self) {
        self.stop();
        self.child = self.setup.launch(self.dir.path());
        self.wait();
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        self.stop();
        let _ = Command::new("umount").arg("-l").arg(self.dir.path().join("x/netns/default")).output();
    }
}

impl Setup {
    fn new(version: &str, data: &Path) -> Setup {
        let binary = parts::dockerd(version).unwrap();
        Setup { binary, data: data.into(), locks: true, env: Vec::new(), cgroup: None, tls: None }
    }

    fn launch(&self, dir: &Path) -> Child {
        let path = format!("{}:{}", self.binary.parent().unwrap().display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(&self.binary);
        command
            .args(["--bridge", "none", "--iptables=false"])
            .arg("--data-root")
            .arg(&self.data)
            .arg("--exec-root")
            .arg(dir.join("x"))
            .arg("--pidfile")
            .arg(dir.join("pid"))
            .arg("--host")
            .arg(format!("unix://{}", dir.join("s").display()))
            .env("PATH", path)
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("log")).unwrap());
        if let Some((at, certs)) = &self.tls {
            command.args(["--host", &format!("tcp://{at}"), "--tlsverify"]);
            for (flag, file) in
                [("--tlscacert", "ca.pem"), ("--tlscert", "cert.pem"), ("--tlskey", "key.pem")]
            {
                command.arg(flag).arg(certs.join(file));
            }
        }
        let locks = self.locks;
        let members = self
            .cgroup
            .as_ref()
            .map(|dir| fs::OpenOptions::new().write(true).open(dir.join("cgroup.procs")).unwrap());
        // SAFETY: between fork and exec only setsid, write and prctl are called, on memory of this frame.
        unsafe {
            command.pre_exec(move || {
                libc::setsid();
                if let Some(mut members) = members.as_ref() {
                    members.write_all(b"0")?; // whoever writes it
                }
                if locks { Ok(()) } else { unlock() }
            });
        }
        command.spawn().unwrap()
    }
}

/// From here on `flock` does nothing and succeeds: a seccomp filter of four instructions (load the call's number;
/// if it is flock, return "errno 0", else allow).
fn unlock() -> std::io::Result<()> {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_flock as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the filter outlives the call, which copies it.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) };
    if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
