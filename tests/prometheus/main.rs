//! A real Prometheus scrapes a real pool through a bad day: it grows from nothing, its queue is full, a daemon is
//! killed, it shrinks. Every expression of dashboard and rules has data at some point of that.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::client::{BUILDX_29, CLI_28, Session};
use common::http::{self, Addr};
use common::monitoring::{queries, rules};
use common::pool::Pool;
use common::{parts, poll, say, secs, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

#[path = "../common/mod.rs"]
mod common;

/// What has no data here, by a part of the expression, and why.
const NOT_HERE: &[(&str, &str)] = &[
    ("dindpool_lease_holder", "several proxies, which need Kubernetes"),
    ("dindpool_lease_imports_total", "several proxies, which need Kubernetes"),
    ("dindpool_certificate_expiry_timestamp_seconds", "no listener has a certificate"),
    ("dindpool_prestop_answers_total", "preStop hooks, which pods of Kubernetes have"),
    ("dindpool_daemon_refused", "a daemon of other API versions, which tests/failures/versions.rs has"),
];

/// Alerts whose condition holds at some point of the day.
const FIRE: &[&str] =
    &["DindpoolAtMaximum", "DindpoolBuildsRefused", "DindpoolNoDaemon", "DindpoolQueueNearlyFull"];

/// A Prometheus with our rules that scrapes one pool each second.
struct Prometheus {
    process: Child,
    addr: Addr,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    fn start(pool: &Pool) -> Prometheus {
        let dir = tempfile::tempdir().unwrap();
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus/dindpool.rules.yaml");
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n\
             - job_name: dindpool\n  static_configs:\n  - targets: ['{}']\n    labels: {{namespace: ci}}\n",
            rules.display(),
            pool.admin_url()
        );
        let file = dir.path().join("prometheus.yml");
        fs::write(&file, config).unwrap();
        // It cannot be told to take a free port and say which.
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let process = Command::new(parts::dir().join("prometheus/prometheus"))
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={free}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let prometheus = Prometheus { process, addr: Addr::Tcp(free.to_string()), _dir: dir };
        wait_until("it has scraped the pool", secs(60), || prometheus.value("up") == Some(1.0));
        prometheus
    }

    fn ask(&self, path: &str) -> Option<Value> {
        let mut conn = http::Conn::try_connect(&self.addr).ok()?;
        conn.try_send(format!("GET {path} HTTP/1.1\r\nHost: p\r\nConnection: close\r\n\r\n")).ok()?;
        let head = conn.try_head().ok()?;
        serde_json::from_slice(&conn.try_body("GET", &head).ok()?).ok()
    }

    /// Its clock, in Unix time.
    fn now(&self) -> f64 {
        self.value("vector(time())").unwrap()
    }

    /// The value of an expression of one series, now.
    fn value(&self, expression: &str) -> Option<f64> {
        let answer = self.ask(&format!("/api/v1/query?query={}", encoded(expression)))?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }

    /// How many values an expression had since `begin`, a second apart; not a number is none.
    fn values(&self, expression: &str, begin: f64) -> usize {
        let path = format!(
            "/api/v1/query_range?query={}&start={begin}&end={}&step=1",
            encoded(expression),
            self.now()
        );
        let answer = self.ask(&path).unwrap_or_else(|| panic!("no answer to {expression}"));
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        let series = answer["data"]["result"].as_array().unwrap();
        let values = series.iter().flat_map(|series| series["values"].as_array().unwrap());
        values.filter(|value| value[1] != "NaN").count()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.process.id() as i32), Signal::SIGTERM);
        if poll(secs(20), || self.process.try_wait().ok().flatten()).is_none() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

fn encoded(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// What an alert looks at, without what it compares that with.
fn measured(expression: &str) -> String {
    let expression = expression.split("\nunless").next().unwrap();
    let expression =
        expression.strip_prefix("absent(").and_then(|e| e.strip_suffix(')')).unwrap_or(expression);
    let mut words = expression.split(' ').peekable();
    let mut kept = Vec::new();
    let is_number = |word: &str| word.starts_with(|c: char| c.is_ascii_digit());
    while let Some(word) = words.next() {
        let compares = matches!(word, ">" | "<" | ">=" | "==");
        match words.peek() {
            Some(next) if compares && is_number(next) => {
                let end = next.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').to_string();
                words.next();
                kept.push(end);
            }
            _ => kept.push(word.to_string()),
        }
    }
    kept.join(" ")
}

/// A build of some seconds that needs no registry.
fn build(seconds: u32) -> String {
    format!("FROM scratch\nADD rootfs.tar /\nARG N\nRUN sleep {seconds}; echo built $N\n")
}

/// What an operator does.
fn operate(pool: &Pool, words: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dindpool"));
    command.args(words).args(["--admin", &pool.admin_url()]);
    let done = command.arg("--token-file").arg(pool.dir().join("d/admin-token")).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// The pool's bad day. One slot for each daemon, two daemons at most, three may wait.
fn bad_day(pool: &Pool, prometheus: &Prometheus) {
    let terminal = |flavour| Session::new(&pool.host(), flavour);
    let waiting = || pool.status()["queue"]["waiting"].as_u64().unwrap();
    // From nothing.
    let first = terminal(CLI_28);
    first.context("ctx", &build(0));
    first.ok("docker build -t first ctx");
    // More than there may be: two build, three wait, one is refused, one leaves.
    let late = terminal(CLI_28);
    late.context("ctx", &build(0));
    let builders: Vec<Session> = (0..5).map(|_| terminal(BUILDX_29)).collect();
    let start = |i: usize, seconds| {
        builders[i].context("ctx", &build(seconds));
        builders[i].start(&format!("docker buildx build --build-arg N={i} -t app{i} ctx"))
    };
    // Two that take long, so that it stays full for some intervals.
    let mut jobs = vec![start(0, 60), start(1, 60)];
    let used = || pool.status()["daemons"].as_array().unwrap().iter().filter(|d| d["used"] == 1).count();
    wait_until("both daemons build", secs(60), || used() == 2);
    jobs.extend((2..5).map(|i| start(i, 5)));
    wait_until("the queue is full", secs(60), || waiting() == 3);
    let said = late.fails("docker build -t late ctx").all();
    assert!(said.contains("the queue is full"), "{said}");
    wait_until("Prometheus has seen a full queue", secs(40), || {
        prometheus.value("max_over_time(namespace_job:dindpool_queue_waiting:sum[2m])") == Some(3.0)
    });
    let seen = "max(max_over_time(dindpool_scale_reason{reason=\"maximum\"}[2m])) == 1";
    wait_until("Prometheus has seen why it does not grow", secs(40), || prometheus.value(seen).is_some());
    // Both are frozen for as long as Prometheus needs to see that none is well. One that is killed, or that starts, is there
    // within a second.
    let both: Vec<Pid> = pool.daemons().iter().map(|daemon| Pid::from_raw(daemon.pid())).collect();
    both.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
    let alert = rules().into_iter().find(|rule| rule["alert"] == "DindpoolNoDaemon").unwrap();
    let no_daemon = alert["expr"].as_str().unwrap();
    wait_until("Prometheus has seen no daemon", secs(60), || prometheus.value(no_daemon).is_some());
    both.iter().for_each(|pid| kill(*pid, Signal::SIGCONT).unwrap());
    wait_until("they answer again", secs(60), || pool.healthy() == 2);
    if let Some(left) = jobs.iter().rev().find(|job| job.code().is_none() && !job.stderr().contains("RUN")) {
        left.signal(Signal::SIGINT);
    }
    for job in &jobs {
        job.wait(secs(180));
    }
    // Killed with a session on it, and started again on its data.
    let victim = terminal(CLI_28);
    victim.context("ctx", &build(0));
    victim.ok("docker build -t lost ctx && docker run -d --name lost --network none lost /bin/sleep 600");
    let daemon = pool.daemons().into_iter().find(|d| d.has_container("lost")).unwrap();
    kill(Pid::from_raw(daemon.pid()), Signal::SIGKILL).unwrap();
    let up = format!("dindpool_daemon_up{{daemon=\"{}\"}}", daemon.id);
    wait_until("it is ejected", secs(30), || pool.metric(&up) == 0.0);
    wait_until("it is back", secs(60), || pool.metric(&up) == 1.0);
    daemon.remove_containers();
    // Who drains has a plan for the daemon: the autoscaler leaves it alone until it is uncordoned.
    operate(pool, &["drain", &daemon.id, "--deadline", "20s"]);
    operate(pool, &["uncordon", &daemon.id]);
    // Not needed any more.
    wait_until("the pool shrinks to nothing", secs(120), || pool.daemons().is_empty());
}

#[test]
fn every_expression_of_dashboard_and_rules_has_data_on_a_bad_day() {
    require!(parts::all(&[
        "docker-28.5/bin/dockerd",
        "cli-28/docker",
        "buildx-0.29/docker-buildx",
        "busybox/rootfs.tar",
        "prometheus/prometheus"
    ]));
    let pool = Pool::scaled(&parts::dockerd("28.5").unwrap(), 2)
        .short_grace()
        .env("DINDPOOL_SLOTS", "1")
        .env("DINDPOOL_QUEUE_LIMIT", "3")
        .arg("--scale-stabilisation")
        .arg("5s")
        .arg("--image-hold")
        .arg("0s")
        .start();
    let prometheus = Prometheus::start(&pool);
    let begin = prometheus.now();
    bad_day(&pool, &prometheus);

    let mut missing = Vec::new();
    let mut seen = 0;
    let mut look = |place: &str, expression: &str| {
        // A dockerd that is ready before the autoscaler has looked twice is not measured.
        if expression.contains("dindpool_daemon_startup_seconds") {
            return;
        }
        let excused = NOT_HERE.iter().any(|(part, _)| expression.contains(part));
        let values = prometheus.values(expression, begin);
        // An excuse that is none any more is taken off the list.
        if (values == 0) != excused && !(excused && expression.contains("or vector(0)")) {
            missing.push(format!("{place}: {values} values of {expression}"));
        }
        seen += values;
    };
    for (panel, expression) in queries("10s") {
        look(&panel, &expression);
    }
    for rule in rules() {
        let (expression, name) = (rule["expr"].as_str().unwrap(), rule["alert"].as_str());
        match name {
            Some(name) => look(name, &measured(expression)),
            None => look(rule["record"].as_str().unwrap(), expression),
        }
        if name.is_some_and(|name| FIRE.contains(&name)) {
            look(name.unwrap_or_default(), expression);
        }
    }
    say(format!(
        "          {seen} values of {} expressions in {:.0} s",
        queries("10s").len() + rules().len(),
        prometheus.now() - begin
    ));
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn what_an_alert_measures_is_what_stands_before_the_comparison() {
    assert_eq!(measured("sum by (a) (x{b=\"c\"}) > 3"), "sum by (a) (x{b=\"c\"}) ");
    assert_eq!(measured("a < 0.1\nand b >= 6"), "a \nand b ");
    assert_eq!(measured("a == 0\nunless on (b) c == 0"), "a ");
    assert_eq!(measured("absent(a{b=~\".*\"})"), "a{b=~\".*\"}");
}
