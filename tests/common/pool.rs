//! The product: `dindpool up` with real daemons, or `dindpool serve` in front of given ones.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::daemon::Daemon;
use super::http::{self, Addr};
use super::{poll, secs, short_dir, tail, wait_until};

/// A running pool.
pub struct Pool {
    process: Child,
    lines: Arc<Mutex<Vec<String>>>,
    log: PathBuf,
    /// Its TCP listener on loopback.
    pub tcp: Addr,
    /// Its Unix listener.
    pub unix: Addr,
    admin: Addr,
    dir: tempfile::TempDir,
}

/// How a pool is to be.
pub struct PoolBuilder {
    command: &'static str,
    args: Vec<String>,
    env: Vec<(String, String)>,
    tenants: Vec<(String, String)>,
    up: bool,
    early: bool,
    machine: Option<(String, String)>,
}

impl Pool {
    /// `daemons` local dockerds; daemon i runs the i-th of `dockerds` modulo.
    pub fn up(dockerds: &[PathBuf], daemons: usize) -> PoolBuilder {
        let mut args = vec!["--daemons".into(), daemons.to_string()];
        for path in dockerds {
            args.extend(["--dockerd".into(), path.display().to_string()]);
        }
        PoolBuilder {
            command: "up",
            args,
            env: roomy(),
            tenants: Vec::new(),
            up: true,
            early: false,
            machine: None,
        }
    }

    /// Local dockerds, as many as there is work for, up to `max`.
    pub fn scaled(dockerd: &Path, max: usize) -> PoolBuilder {
        let mut builder = Pool::up(&[dockerd.to_path_buf()], max);
        builder.args = builder.args.split_off(2);
        builder.arg("--scale-min").arg("0").arg("--scale-max").arg(max.to_string())
    }

    /// Containers of the engine at this socket; how many is up to the caller.
    pub fn containers(engine: &Addr, image: &str) -> PoolBuilder {
        let mut builder = Pool::up(&[], 0);
        builder.args = ["--provisioner", "docker", "--image", image].map(String::from).to_vec();
        builder.env("DOCKER_HOST", &engine.url())
    }

    /// A proxy in front of daemons that somebody else runs.
    pub fn serve<'a>(daemons: impl IntoIterator<Item = &'a Addr>) -> PoolBuilder {
        let args = daemons.into_iter().flat_map(|addr| ["--daemon".into(), addr.url()]).collect();
        PoolBuilder {
            command: "serve",
            args,
            env: roomy(),
            tenants: Vec::new(),
            up: false,
            early: false,
            machine: None,
        }
    }

    /// A proxy that runs the pods of a Deployment.
    pub fn of_deployment(kubeconfig: &Path, deployment: &str) -> PoolBuilder {
        let daemons: [&Addr; 0] = [];
        let pool = Pool::serve(daemons).arg("--kubernetes").arg(deployment).early();
        pool.env("KUBECONFIG", kubeconfig.to_str().expect("UTF-8"))
    }

    /// What `DOCKER_HOST` is to be.
    pub fn host(&self) -> String {
        self.tcp.url()
    }

    /// The address of the listener that was asked for on `host`.
    pub fn listener(&self, host: &str) -> Addr {
        let lines = self.lines.lock().unwrap();
        let wanted = format!("listening on tcp://{host}:");
        let line = lines.iter().find(|l| l.starts_with(&wanted)).expect("a listener on this host");
        Addr::parse(line.trim_start_matches("listening on "))
    }

    /// Where it listens for preStop hooks, if it was told to: `http://…`.
    pub fn prestop(&self) -> String {
        let lines = self.lines.lock().unwrap();
        let line = lines.iter().find_map(|l| l.strip_prefix("prestop on "));
        line.expect("a listener of preStop hooks").to_owned()
    }

    /// Where its admin listener is.
    pub fn admin_url(&self) -> String {
        self.admin.url().replace("tcp://", "")
    }

    /// A page of the admin listener.
    pub fn admin(&self, path: &str) -> http::Answer {
        http::get(&self.admin, path)
    }

    /// `/status`.
    pub fn status(&self) -> Value {
        self.admin("/status").json()
    }

    /// The real daemons behind it, with their own sockets.
    pub fn daemons(&self) -> Vec<Daemon> {
        let status = self.status();
        let daemons = status["daemons"].as_array().cloned().unwrap_or_default();
        daemons
            .iter()
            .map(|d| Daemon {
                id: d["id"].as_str().expect("id").into(),
                addr: Addr::parse(d["address"].as_str().expect("address")),
            })
            .collect()
    }

    /// How many daemons may get new sessions.
    pub fn healthy(&self) -> usize {
        let status = self.status();
        let daemons = status["daemons"].as_array().cloned().unwrap_or_default();
        daemons.iter().filter(|d| d["state"] == "ready" && d["health"] == "healthy").count()
    }

    /// Waits until this many daemons may get new sessions.
    #[track_caller]
    pub fn wait_healthy(&self, n: usize, deadline: Duration) {
        wait_until(&format!("{n} healthy daemons"), deadline, || self.healthy() == n);
    }

    /// The sessions that hold a lease now.
    pub fn sessions(&self) -> Vec<Value> {
        self.status()["sessions"].as_array().cloned().unwrap_or_default()
    }

    /// Waits until no session holds a lease any more: every grace is over.
    #[track_caller]
    pub fn wait_no_sessions(&self, deadline: Duration) {
        if poll(deadline, || self.sessions().is_empty().then_some(())).is_none() {
            panic!("leases outlive their grace: {:?}", self.sessions());
        }
    }

    /// Reads its configuration again.
    pub fn reload(&self) {
        kill(Pid::from_raw(self.process.id() as i32), Signal::SIGHUP).expect("the pool lives");
    }

    /// Resident memory of the proxy, in KiB.
    pub fn rss(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most resident memory that the proxy has ever had, in KiB.
    pub fn peak_rss(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("the pool lives");
        let line = status.lines().find(|l| l.starts_with(field)).expect("a size");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
    }

    /// The processor time of the proxy so far.
    pub fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).expect("the pool lives");
        let fields: Vec<&str> = stat.rsplit_once(") ").expect("a name").1.split(' ').collect();
        let ticks = |n: usize| fields[n].parse::<u64>().expect("ticks");
        super::millis((ticks(11) + ticks(12)) * 10)
    }

    /// How many sockets the proxy has open.
    pub fn sockets(&self) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.process.id())).expect("the pool lives").flatten();
        fds.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")))
            .count()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).expect("the pool lives");
    }

    /// The value of one series of `/metrics`; 0 if it has none.
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.admin("/metrics").text();
        let line = text.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or(0.0)
    }

    /// What the autoscaler has tried so far.
    pub fn steps(&self) -> Vec<String> {
        let text = self.admin("/metrics").text();
        text.lines().filter(|l| l.starts_with("dindpool_scale_steps_total")).map(str::to_owned).collect()
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The `--data` of `up`.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("d")
    }

    /// A folder that lives as long as the pool.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Kills it, as a machine's end would: nothing is put in order.
    pub fn kill(mut self) {
        self.process.kill().expect("the pool lives");
        self.process.wait().expect("the pool ends");
    }

    /// Ends it as `kill` does, and tells its exit status.
    pub fn stop(mut self) -> Option<i32> {
        self.end()
    }

    fn end(&mut self) -> Option<i32> {
        if let Ok(Some(status)) = self.process.try_wait() {
            return status.code();
        }
        let _ = kill(Pid::from_raw(self.process.id() as i32), Signal::SIGTERM);
        let ended = poll(secs(40), || self.process.try_wait().ok().flatten());
        if ended.is_none() {
            super::say("a pool did not end within 40 s of SIGTERM: killed");
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
        ended.and_then(|(status, _)| status.code())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            super::say(format!("--- the pool's log ends with\n{}", tail(&self.log(), 60)));
        }
    }
}

/// Slots enough that nobody waits, whatever a scenario leaves running; the queue has suites of its own.
fn roomy() -> Vec<(String, String)> {
    vec![("DINDPOOL_SLOTS".into(), "64".into())]
}

impl PoolBuilder {
    /// One more argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// One more environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// A session's grace and linger of seconds instead of minutes, so that a gap longer than it is quick.
    pub fn short_grace(self) -> Self {
        self.env("DINDPOOL_SESSION_GRACE", "2s").env("DINDPOOL_SLOT_LINGER", "1s")
    }

    /// Another listener.
    pub fn listen(self, url: &str) -> Self {
        self.arg("--listen").arg(url)
    }

    /// Another TCP listener, on this loopback address, whose clients belong to a tenant.
    pub fn tenant(mut self, host: &str, tenant: &str) -> Self {
        self.tenants.push((host.into(), tenant.into()));
        self
    }

    /// On a machine of its own: in this network namespace, with its listeners at the namespace's address.
    pub fn on(mut self, namespace: &str, address: &str) -> Self {
        self.machine = Some((namespace.into(), address.into()));
        self
    }

    /// `up` counts as started as soon as it listens, whatever its daemons do.
    pub fn early(mut self) -> Self {
        self.early = true;
        self
    }

    /// Starts it and waits until it serves; `up` also until all daemons are ready.
    #[track_caller]
    pub fn start(self) -> Pool {
        let dir = short_dir();
        let log = dir.path().join("log");
        let socket = dir.path().join("s");
        let binary =
            std::env::var_os("DINDPOOL_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_dindpool").into());
        let host = self.machine.as_ref().map_or("127.0.0.1", |(_, address)| address);
        let mut command = match &self.machine {
            Some((namespace, _)) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{namespace}")).arg(binary);
                command
            }
            None => Command::new(binary),
        };
        command.arg(self.command).args(["--admin", &format!("{host}:0")]);
        let own = [format!("tcp://{host}:0"), format!("unix://{}", socket.display())];
        if self.tenants.is_empty() {
            command.args(own.iter().flat_map(|address| ["--listen", address]));
        } else {
            // A flag would replace the file's list, and only the file names tenants.
            let tenants = self
                .tenants
                .iter()
                .map(|(host, tenant)| format!("{{ address = \"tcp://{host}:0\", tenant = \"{tenant}\" }}"));
            let all: Vec<String> =
                own.iter().map(|address| format!("\"{address}\"")).chain(tenants).collect();
            let file = dir.path().join("dindpool.toml");
            fs::write(&file, format!("listen = [{}]\n", all.join(", "))).expect("a configuration");
            command.arg("--config").arg(file);
        }
        if self.up {
            command.arg("--data").arg(dir.path().join("d"));
        }
        let mut process = command
            .args(&self.args)
            .env("DINDPOOL_SHUTDOWN_DELAY", "0s")
            .env("DINDPOOL_SHUTDOWN_GRACE", "2s") // streams that a test leaves open are not waited for
            .envs(self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).expect("a log"))
            .spawn()
            .expect("dindpool starts");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let out = BufReader::new(process.stdout.take().expect("stdout"));
        let sink = lines.clone();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                sink.lock().unwrap().push(line);
            }
        });
        let find = |what: &str| -> Option<String> {
            let lines = lines.lock().unwrap();
            lines.iter().find_map(|l| l.strip_prefix(what).map(str::to_owned))
        };
        let ready = |process: &mut Child| {
            if let Ok(Some(status)) = process.try_wait() {
                let log = fs::read_to_string(&log).unwrap_or_default();
                panic!("dindpool {} ended at once ({status}):\n{}", self.command, tail(&log, 60));
            }
            let tcp = find(&format!("listening on tcp://{host}:"))?;
            find("listening on unix://")?;
            let admin = find("admin on ")?;
            (!self.up || self.early || find("export DOCKER_HOST=").is_some())
                .then(|| (Addr::Tcp(format!("{host}:{tcp}")), Addr::parse(&admin)))
        };
        let Some(((tcp, admin), _)) = poll(secs(180), || ready(&mut process)) else {
            let _ = kill(Pid::from_raw(process.id() as i32), Signal::SIGTERM);
            let _ = poll(secs(30), || process.try_wait().ok().flatten());
            let _ = process.kill();
            let log = fs::read_to_string(&log).unwrap_or_default();
            panic!(
                "dindpool {} does not serve after 180 s; it said {:?}\n{}",
                self.command,
                lines.lock().unwrap(),
                tail(&log, 60)
            );
        };
        Pool { process, lines, log, tcp, unix: Addr::Unix(socket), admin, dir }
    }
}
