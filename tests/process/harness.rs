//! Real dockerd binaries, a Docker client, and pools to try them in.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

use dindpool::engine::autoscaler::Step;
use dindpool::provision::process::{self, Options};
use dindpool::provision::{Change, DaemonSpec, Endpoint, Observation, Running};
use tokio::sync::{mpsc, oneshot, watch};

/// Where `tests/parts/install` puts what tests need.
pub fn parts() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let cache = || std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
    std::env::var_os("DINDPOOL_PARTS").map_or_else(|| cache().join("dindpool/parts"), PathBuf::from)
}

pub fn dockerd(version: &str) -> PathBuf {
    parts().join(format!("docker-{version}/bin/dockerd"))
}

/// What keeps a test from running here; the caller returns when there is something. With CI=true it fails.
pub fn missing(test: &str, versions: &[&str]) -> bool {
    let root = nix::unistd::geteuid().is_root();
    let mut lacks: Vec<String> = if root { Vec::new() } else { vec!["root".to_string()] };
    let mut wanted: Vec<PathBuf> = versions.iter().map(|version| dockerd(version)).collect();
    wanted.extend(["cli-28/docker", "busybox/rootfs.tar"].map(|part| parts().join(part)));
    lacks.extend(wanted.iter().filter(|path| !path.exists()).map(|path| path.display().to_string()));
    if lacks.is_empty() {
        return false;
    }
    let message = format!("SKIPPED {test}: without {} (tests/parts/install)", lacks.join(", "));
    assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "{message}");
    eprintln!("{message}");
    true
}

/// Waits for a condition, not for a time.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Options for a test: short paths, this crate's binary, progress that shows up in a failing test's output.
pub fn options(data: &Path, daemons: usize, versions: &[&str]) -> Options {
    let mut options = Options::new(data);
    options.daemons = daemons;
    options.dockerd = versions.iter().map(|version| dockerd(version)).collect();
    options.remove_data = true; // so that nothing outlives a test that fails
    options.self_exe = PathBuf::from(env!("CARGO_BIN_EXE_dindpool"));
    let (progress, mut lines) = mpsc::unbounded_channel::<String>();
    options.progress = Some(progress);
    tokio::spawn(async move {
        while let Some(line) = lines.recv().await {
            eprintln!("  {line}");
        }
    });
    options
}

/// A running pool and its latest observation.
pub struct Pool {
    pub data: PathBuf,
    latest: watch::Receiver<Observation>,
    changes: Option<mpsc::Sender<Change>>,
    stop: oneshot::Sender<()>,
    stopped: tokio::task::JoinHandle<()>,
}

impl Pool {
    pub async fn start(options: Options) -> Pool {
        let data = options.data.clone();
        Pool::watch(data, process::start(options).await.unwrap_or_else(|faults| panic!("{faults}")))
    }

    fn watch(data: PathBuf, running: Running) -> Pool {
        let Running { mut observations, stopped, stop, changes, notes: _ } = running;
        let (tx, latest) = watch::channel(Observation::default());
        tokio::spawn(async move {
            while let Some(observation) = observations.recv().await {
                tx.send_replace(observation);
            }
        });
        Pool { data, latest, changes, stop, stopped }
    }

    /// Asks for more or fewer daemons.
    pub async fn change(&self, step: Step) -> Result<(), String> {
        let (done, answer) = oneshot::channel();
        let change = Change { step, done };
        self.changes.as_ref().expect("it scales").send(change).await.expect("it runs");
        answer.await.expect("an answer")
    }

    /// Waits until the latest observation is as wanted.
    pub async fn seen(&self, what: &str, wanted: impl Fn(&Observation) -> bool) -> Observation {
        let mut latest = self.latest.clone();
        let seen = tokio::time::timeout(Duration::from_secs(60), latest.wait_for(|seen| wanted(seen))).await;
        match seen {
            Ok(seen) => seen.unwrap_or_else(|_| panic!("the pool ended before: {what}")).clone(),
            Err(_) => panic!("not within 60 s: {what}; last seen: {:#?}", *self.latest.borrow()),
        }
    }

    pub async fn ready(&self) -> Vec<Daemon> {
        let all = |seen: &Observation| {
            !seen.daemons.is_empty() && seen.daemons.iter().all(|daemon| daemon.pending.is_none())
        };
        let seen = self.seen("all daemons are ready", all).await;
        seen.daemons.into_iter().map(Daemon).collect()
    }

    pub fn id(&self) -> String {
        pool_id(&self.data)
    }

    pub async fn stop(self) {
        self.stop.send(()).expect("it has not stopped by itself");
        let stopped = tokio::time::timeout(Duration::from_secs(60), self.stopped).await;
        stopped.expect("it stops").expect("without a panic");
    }
}

pub fn pool_id(data: &Path) -> String {
    std::fs::read_to_string(data.join("dindpool.id")).unwrap().trim().to_string()
}

/// A daemon, and a Docker client for it.
pub struct Daemon(pub DaemonSpec);

impl Daemon {
    pub fn socket(&self) -> PathBuf {
        match &self.0.endpoint {
            Some(Endpoint::Unix(path)) => path.clone(),
            other => panic!("{other:?}"),
        }
    }

    pub fn source_ip(&self) -> IpAddr {
        self.0.source_ips[0]
    }

    pub fn try_docker(&self, args: &[&str]) -> Output {
        Command::new(parts().join("cli-28/docker"))
            .env("DOCKER_CONFIG", std::env::temp_dir().join("dindpool-no-docker-config"))
            .env("DOCKER_BUILDKIT", "0")
            .arg(format!("--host=unix://{}", self.socket().display()))
            .args(args)
            .output()
            .unwrap()
    }

    /// A daemon of a pool that another process runs, by its place in the register.
    pub fn of(data: &Path, index: usize) -> Daemon {
        let id = format!("dind-{index}");
        let run = Path::new("/run/dindpool").join(pool_id(data)).join(&id);
        Daemon::at(&run.join("docker.sock"), &id)
    }

    /// Any daemon.
    pub fn at(socket: &Path, id: &str) -> Daemon {
        let (id, endpoint) = (id.to_string(), Some(Endpoint::Unix(socket.to_path_buf())));
        Daemon(DaemonSpec {
            id,
            endpoint,
            source_ips: Vec::new(),
            cgroup: None,
            draining: false,
            pending: None,
            faulty: false,
            removal: Default::default(),
            slots: None,
        })
    }

    /// The machine's address on the daemon's cable.
    pub fn gateway(&self) -> IpAddr {
        let IpAddr::V4(inner) = self.source_ip() else { panic!("IPv4 only") };
        IpAddr::V4((inner.to_bits() - 1).into())
    }

    /// Which address a server sees when a container of this daemon connects to it.
    pub fn address_seen_by(&self, server: SocketAddr) -> IpAddr {
        let (ip, port) = (server.ip().to_string(), server.port().to_string());
        let seen = self.docker(&["run", "--rm", "busybox", "nc", "-w", "10", &ip, &port]);
        seen.parse().unwrap_or_else(|_| panic!("{}: {server} said `{seen}`", self.0.id))
    }

    /// Builds with BuildKit, where buildx is installed.
    pub fn buildx(&self, context: &Path, scratch: &Path) -> Option<Output> {
        let buildx = parts().join("buildx-0.29/docker-buildx");
        if !buildx.exists() {
            return None;
        }
        let output = Command::new(buildx)
            .env("DOCKER_CONFIG", scratch)
            .env("DOCKER_HOST", format!("unix://{}", self.socket().display()))
            .args(["build", "-t", "buildkit"])
            .arg(context)
            .output();
        Some(output.unwrap())
    }

    /// Runs the client; it must succeed.
    pub fn docker(&self, args: &[&str]) -> String {
        let output = self.try_docker(args);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}: docker {args:?}: {out}{err}", self.0.id);
        out.trim().to_string()
    }

    pub fn import_busybox(&self) {
        let tar = parts().join("busybox/rootfs.tar");
        self.docker(&["import", tar.to_str().unwrap(), "busybox"]);
    }

    /// What is in a field of its state file.
    pub fn pid(&self, who: &str) -> i32 {
        let file = self.socket().with_file_name("state.json");
        let state: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        state[who]["pid"].as_i64().unwrap().try_into().unwrap()
    }

    /// Every process of it, containers included, ours too: all that descend from its keeper.
    pub fn processes(&self) -> BTreeSet<i32> {
        let parents: Vec<(i32, i32)> = all_processes();
        let mut found = BTreeSet::from([self.pid("keeper")]);
        loop {
            let before = found.len();
            let children: Vec<i32> =
                parents.iter().filter(|(_, parent)| found.contains(parent)).map(|(pid, _)| *pid).collect();
            found.extend(children);
            if found.len() == before {
                return found;
            }
        }
    }
}

/// Number and parent of every living process.
fn all_processes() -> Vec<(i32, i32)> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, stat(pid)?.1))
        })
        .collect()
}

/// State and parent of a process.
fn stat(pid: i32) -> Option<(char, i32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

pub fn alive(pid: i32) -> bool {
    stat(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

pub fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// Everything on the machine that bears the mark of a pool.
pub fn traces(data: &Path, pool: &str) -> Vec<String> {
    let mut found = Vec::new();
    let marks = [format!("dp{pool}"), format!("dindpool/{pool}"), data.display().to_string()];
    let mut search = |what: &str, text: &str| {
        let lines = text.lines().filter(|line| marks.iter().any(|mark| line.contains(mark.as_str())));
        found.extend(lines.map(|line| format!("{what}: {line}")));
    };
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    search("interface", &run("ip", &["-o", "link"]));
    search("address", &run("ip", &["-o", "addr"]));
    search("route", &run("ip", &["route", "show", "table", "all"]));
    search("namespace", &run("ip", &["netns"]));
    for table in ["filter", "nat", "mangle", "raw"] {
        search(table, &run("iptables", &["-w", "-t", table, "-S"]));
    }
    search("mount", &std::fs::read_to_string("/proc/self/mountinfo").unwrap());
    for (pid, _) in all_processes() {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if pid != std::process::id().cast_signed() {
            search(&format!("process {pid}"), &String::from_utf8_lossy(&command).replace('\0', " "));
        }
        search(
            &format!("cgroup of {pid}"),
            &std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default(),
        );
    }
    let cgroups = run("find", &["/sys/fs/cgroup", "-maxdepth", "4", "-type", "d"]);
    search("cgroup", &cgroups);
    search("file", &run("find", &["/run/dindpool"]));
    found
}

/// A process that runs a pool, to be killed: this test binary once more, in its test `owner`.
pub struct Owner(Child);

impl Owner {
    /// Returns when the pool's daemons are ready.
    pub fn start(data: &Path, daemons: usize, remove_data: bool) -> Owner {
        let mut owner = Owner::begin(data, daemons, remove_data);
        let lines = BufReader::new(owner.0.stdout.take().unwrap()).lines();
        let ready = lines.map_while(Result::ok).any(|line| line.contains("OWNER IS READY"));
        assert!(ready, "the owner's pool did not start");
        owner
    }

    /// Returns at once.
    pub fn begin(data: &Path, daemons: usize, remove_data: bool) -> Owner {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "owner", "--nocapture"])
            .env("OWNER", format!("{daemons} {remove_data} {}", data.display()))
            .stdout(Stdio::piped())
            .spawn();
        Owner(child.unwrap())
    }

    /// What [`Owner::start`] runs in the child.
    pub async fn main() {
        let Ok(order) = std::env::var("OWNER") else { return };
        let (daemons, rest) = order.split_once(' ').unwrap();
        let (remove_data, data) = rest.split_once(' ').unwrap();
        let mut options = options(Path::new(data), daemons.parse().unwrap(), &["28.5"]);
        options.remove_data = remove_data == "true";
        let pool = Pool::start(options).await;
        pool.ready().await;
        println!("\nOWNER IS READY");
        std::future::pending::<()>().await;
    }

    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Tells everybody who connects which address that came from.
fn serve(listener: TcpListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let peer = stream.peer_addr().unwrap().ip().to_string();
        let _ = stream.write_all(peer.as_bytes());
    }
}

/// A server on all addresses of this machine, where the proxy would listen. Gives its port.
pub fn server_here() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(|| serve(listener));
    port
}

/// A server beyond this machine: in a network namespace behind a cable of its own, which knows no way to the
/// daemons' networks. Gives its address, and the machine's address as it is seen from there.
pub fn server_outside() -> (SocketAddr, IpAddr) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let place = (std::process::id() + COUNT.fetch_add(1, Ordering::Relaxed)) % 64 * 4;
    let (cable, near, far) =
        (format!("outside{place}"), format!("198.51.100.{}", place + 1), format!("198.51.100.{}", place + 2));
    let (tid_tx, tid) = std_mpsc::channel();
    let (go, go_rx) = std_mpsc::channel();
    let (address_tx, address) = std_mpsc::channel();
    let inside = far.clone();
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        tid_tx.send(nix::unistd::gettid()).unwrap();
        go_rx.recv().unwrap();
        ip(&format!("addr add {inside}/30 dev eth0"));
        ip("link set eth0 up");
        let listener = TcpListener::bind(format!("{inside}:0")).unwrap();
        address_tx.send(listener.local_addr().unwrap()).unwrap();
        serve(listener);
    });
    ip(&format!("link add {cable} type veth peer name eth0 netns {}", tid.recv().unwrap()));
    ip(&format!("addr add {near}/30 dev {cable}"));
    ip(&format!("link set {cable} up"));
    go.send(()).unwrap();
    (address.recv().unwrap(), near.parse().unwrap())
}

pub fn ip(args: &str) {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A machine of its own, as far as Docker can tell: network, mounts and processes are new, /run and
/// /etc/docker are empty, and systemd-resolved seems to run. There, this test binary runs its test `name`.
pub fn on_another_machine(name: &str) {
    let script = "set -e; mkdir -p /etc/docker; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /etc/docker; \
                  mkdir -p /run/systemd/resolve; cd /run/systemd/resolve; \
                  echo nameserver 127.0.0.53 > stub-resolv.conf; echo nameserver 192.0.2.53 > resolv.conf; \
                  mount --bind stub-resolv.conf /etc/resolv.conf; cd /; ip link set lo up; exec \"$0\" \"$@\"";
    let output = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--propagation=private",
        ])
        .args(["sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("ON_ANOTHER_MACHINE", "1")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    eprintln!("{err}");
}

/// A program of a Docker version's, killed when the test ends.
pub struct Background(Child);

impl Background {
    pub fn start(version: &str, program: &str, args: &[&str], log: &Path) -> Background {
        let bin = dockerd(version).with_file_name(program);
        let path = format!("{}:{}", bin.parent().unwrap().display(), std::env::var("PATH").unwrap());
        let log = std::fs::File::create(log).unwrap();
        let mut command = Command::new(bin);
        command.args(args).env("PATH", path).stdout(log.try_clone().unwrap()).stderr(log).process_group(0);
        Background(command.spawn().unwrap())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
