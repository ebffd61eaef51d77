//! A Docker engine of a test's own, as a machine would have one: with networks, in a network namespace.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::http::{self, Addr};
use super::netns::Bridge;
use super::{parts, poll, secs, short_dir, tail};

/// The image of daemons that tests/cluster/images makes.
pub const DIND: &str = "localhost/dind:28.5";

/// A running engine.
pub struct Engine {
    child: Child,
    dir: tempfile::TempDir,
    bridge: Bridge,
    /// Its socket.
    pub addr: Addr,
}

impl Engine {
    /// One with the image of daemons, or why there cannot be one here.
    pub fn start() -> Result<Engine, String> {
        parts::all(&[
            "docker-28.5/bin/dockerd",
            "cli-28/docker",
            "buildx-0.29/docker-buildx",
            "busybox/rootfs.tar",
        ])?;
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/images");
        let made = Command::new(images).output().map_err(|e| e.to_string())?;
        if !made.status.success() {
            return Err(format!("tests/cluster/images: {}", String::from_utf8_lossy(&made.stderr)));
        }
        let bridge = Bridge::new(1);
        let dir = short_dir();
        let child = launch(dir.path(), &bridge.namespaces[0]);
        let addr = Addr::Unix(dir.path().join("s"));
        let engine = Engine { child, dir, bridge, addr };
        engine.wait();
        let tar = parts::dir().join("images/dind.tar");
        engine.docker(&["load", "-q", "-i", tar.to_str().expect("UTF-8")]);
        Ok(engine)
    }

    fn wait(&self) {
        let answers = || http::try_request(&self.addr, "GET", "/_ping", None).is_ok();
        if poll(secs(60), || answers().then_some(())).is_none() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            panic!("the engine does not serve:\n{}", tail(&log, 20));
        }
    }

    /// Its network namespace, and the address that others reach there.
    pub fn machine(&self) -> (&str, String) {
        (&self.bridge.namespaces[0], self.bridge.address(0))
    }

    /// Runs the client on it, which must succeed.
    #[track_caller]
    pub fn docker(&self, args: &[&str]) -> String {
        let out = Command::new(parts::dir().join("cli-28/docker"))
            .env("DOCKER_CONFIG", self.dir.path().join("config"))
            .arg(format!("--host={}", self.addr.url()))
            .args(args)
            .output()
            .expect("docker");
        assert!(out.status.success(), "docker {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    /// All that bears the mark of a pool: containers, volumes, networks, by name.
    pub fn traces(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (kind, args) in [
            ("container", &["ps", "-a", "--format", "{{.Names}}"][..]),
            ("volume", &["volume", "ls", "--format", "{{.Name}}"][..]),
            ("network", &["network", "ls", "--format", "{{.Name}}"][..]),
        ] {
            let list = self.docker(args);
            let own = list.lines().filter(|name| !["bridge", "host", "none"].contains(name));
            found.extend(own.map(|name| format!("{kind} {name}")));
        }
        found
    }

    /// `docker inspect` of a container.
    pub fn inspect(&self, container: &str) -> Value {
        http::get(&self.addr, &format!("/containers/{container}/json")).json()
    }

    /// Freezes it, or lets it go on.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("the engine lives");
    }
}

fn launch(dir: &Path, namespace: &str) -> Child {
    let binary: PathBuf = parts::dockerd("28.5").expect("checked");
    let path =
        format!("{}:{}", binary.parent().expect("bin").display(), std::env::var("PATH").expect("PATH"));
    let at = |name: &str| dir.join(name).display().to_string();
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{namespace}"))
        .arg(binary)
        .args(["--data-root", &at("data"), "--exec-root", &at("x"), "--pidfile", &at("pid")])
        .args(["--host", &format!("unix://{}", at("s"))])
        .env("PATH", path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(dir.join("log")).expect("a log"));
    // SAFETY: between fork and exec only setsid is called.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    command.spawn().expect("nsenter")
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGCONT);
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            super::say(format!("--- the engine's log ends with\n{}", tail(&log, 30)));
        }
        let list = self.docker(&["ps", "-aq"]);
        for container in list.lines() {
            http::request(&self.addr, "DELETE", &format!("/containers/{container}?force=1&v=1"), None);
        }
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        if poll(secs(20), || self.child.try_wait().ok().flatten()).is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = Command::new("umount").arg("-l").arg(self.dir.path().join("x/netns/default")).output();
    }
}
