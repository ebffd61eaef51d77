//! A dockerd of a test's own, with a data root that the test chooses: a small tmpfs that fills up, one that is
//! emptied while it is down, one that two daemons share. It has no bridge, so builds and runs need
//! `--network none`.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::http::{self, Addr};
use crate::common::{parts, poll, secs, short_dir, tail};

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
            while std::io::Write::write_all(&mut file, &vec![b'x'; size]).is_ok() {}
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

/// A running dockerd.
pub struct Dockerd {
    child: Child,
    dir: tempfile::TempDir,
    binary: PathBuf,
    data: PathBuf,
    locks: bool,
    /// Its socket.
    pub addr: Addr,
}

impl Dockerd {
    /// One of this version on this data root.
    pub fn start(version: &str, data: &Path) -> Dockerd {
        Self::with(version, data, true)
    }

    /// One on a file system whose locks keep nobody out (some network file systems): `flock` succeeds without
    /// locking, for it and for its containerd. With locks, no dockerd from 20.10 to 29 starts on a data root that
    /// another one has.
    pub fn without_locks(version: &str, data: &Path) -> Dockerd {
        Self::with(version, data, false)
    }

    fn with(version: &str, data: &Path, locks: bool) -> Dockerd {
        let dir = short_dir();
        let binary = parts::dockerd(version).unwrap();
        let addr = Addr::Unix(dir.path().join("s"));
        let child = launch(&binary, dir.path(), data, locks);
        let daemon = Dockerd { child, dir, binary, data: data.to_path_buf(), locks, addr };
        daemon.wait();
        daemon
    }

    fn wait(&self) {
        let answers = || http::try_request(&self.addr, "GET", "/_ping", None).is_ok();
        if poll(secs(60), || answers().then_some(())).is_none() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            panic!("{} does not serve:\n{}", self.binary.display(), tail(&log, 20));
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
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
        self.child = launch(&self.binary, self.dir.path(), &self.data, self.locks);
        self.wait();
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        self.stop();
        let _ = Command::new("umount").arg("-l").arg(self.dir.path().join("x/netns/default")).output();
    }
}

fn launch(binary: &Path, dir: &Path, data: &Path, locks: bool) -> Child {
    let path = format!("{}:{}", binary.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(binary);
    command
        .args(["--bridge", "none", "--iptables=false"])
        .arg("--data-root")
        .arg(data)
        .arg("--exec-root")
        .arg(dir.join("x"))
        .arg("--pidfile")
        .arg(dir.join("pid"))
        .arg("--host")
        .arg(format!("unix://{}", dir.join("s").display()))
        .env("PATH", path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(dir.join("log")).unwrap());
    let locks_off = move || if locks { Ok(()) } else { unlock() };
    // SAFETY: between fork and exec only setsid and prctl are called, on memory of this frame.
    unsafe {
        command.pre_exec(move || {
            libc::setsid();
            locks_off()
        });
    }
    command.spawn().unwrap()
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
