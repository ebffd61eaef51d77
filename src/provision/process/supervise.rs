//! Keeps the daemons running and tells what is going on: one task per daemon, and one that puts their news
//! together into observations.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::log::{self, Log};
use super::plan::{self, Launch};
use super::state::{self, Lock, Process, Registration, State};
use super::{EXEC_DAEMON, Faults, cleanup};
use crate::provision::{DaemonSpec, Endpoint, Observation, Running};

/// How often somebody looks after a daemon that runs.
const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// A daemon that was up for this long has recovered: its next death is a new one.
const RECOVERED: Duration = Duration::from_secs(60);
/// How often a starting daemon is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_millis(50);

/// A pool that has been decided upon and locked, ready to run.
pub(super) struct Pool {
    /// Its daemons.
    pub launches: Vec<Launch>,
    /// The version of each one's dockerd, to show.
    pub versions: Vec<String>,
    /// What the operator should know for as long as the pool runs.
    pub problems: Vec<String>,
    /// Its entry in the register.
    pub registration: Registration,
    /// Where the register is.
    pub run_dir: PathBuf,
    /// Held until everything is removed.
    pub locks: Vec<Lock>,
    /// See [`super::Options`].
    pub ready_deadline: Duration,
    /// See [`super::Options`].
    pub self_exe: PathBuf,
    /// See [`super::Options`].
    pub progress: Option<mpsc::UnboundedSender<String>>,
}

/// News of one daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct News {
    pending: Option<String>,
    problem: Option<String>,
}

/// Starts the tasks.
pub(super) fn run(pool: Pool) -> Running {
    let (tx, observations) = mpsc::channel(1);
    let (stop, stop_rx) = oneshot::channel();
    let stopped = tokio::spawn(coordinate(pool, tx, stop_rx));
    Running { observations, stopped, stop, changes: None, notes: None }
}

async fn coordinate(pool: Pool, tx: mpsc::Sender<Observation>, mut stopped: oneshot::Receiver<()>) {
    let (news_tx, mut news_rx) = mpsc::unbounded_channel();
    let (stop, stop_rx) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for (index, launch) in pool.launches.iter().enumerate() {
        let supervisor = Supervisor {
            index,
            launch: launch.clone(),
            version: pool.versions[index].clone(),
            ready_deadline: pool.ready_deadline,
            self_exe: pool.self_exe.clone(),
            progress: pool.progress.clone(),
            news: news_tx.clone(),
            stop: stop_rx.clone(),
        };
        tasks.spawn(supervisor.run());
    }
    let starting = News { pending: Some("waiting to start".to_string()), problem: None };
    let mut news = vec![starting; pool.launches.len()];
    let mut told = false;
    loop {
        tokio::select! {
            // A dropped sender means the same.
            _ = &mut stopped => break,
            () = tx.closed() => break,
            Some((index, latest)) = news_rx.recv() => {
                let slot: &mut News = &mut news[index];
                told &= *slot == latest;
                *slot = latest;
            }
            permit = tx.reserve(), if !told => {
                let Ok(permit) = permit else { break };
                permit.send(observe(&pool, &news, false));
                told = true;
            }
        }
    }
    let _ = tx.try_send(observe(&pool, &news, true));
    let _ = stop.send(true);
    let mut gone = true;
    while let Some(end) = tasks.join_next().await {
        gone &= end.unwrap_or(false);
    }
    if gone {
        // Otherwise the register keeps the names, so that a later dindpool may try again.
        cleanup::forget(&pool.run_dir, &pool.registration).await;
    }
    drop(pool.locks);
}

fn observe(pool: &Pool, news: &[News], draining: bool) -> Observation {
    let daemon = |(launch, news): (&Launch, &News)| DaemonSpec {
        id: launch.id.clone(),
        endpoint: Some(Endpoint::Unix(launch.socket())),
        source_ips: vec![IpAddr::V4(launch.link.inner())],
        cgroup: Some(plan::cgroup(&launch.pool, &launch.id)),
        draining,
        pending: news.pending.clone(),
        faulty: news.problem.is_some(),
        removal: Default::default(),
        slots: None,
    };
    let problems = news.iter().filter_map(|news| news.problem.clone());
    Observation {
        daemons: pool.launches.iter().zip(news).map(daemon).collect(),
        problems: pool.problems.iter().cloned().chain(problems).collect(),
        ..Observation::default()
    }
}

/// How a life of a daemon ended.
enum End {
    /// We were asked to stop.
    Stopped,
    /// By itself, or it never came up; why, in words.
    Died(String),
}

/// A daemon's keeper.
enum Keeper {
    /// Our child.
    Ours {
        child: Box<Child>,
        /// The pipe whose end tells the keeper of temporary data that we are gone. It is not left in the child,
        /// because waiting for a child closes that.
        _alive: Option<ChildStdin>,
    },
    /// A former dindpool's, adopted.
    Adopted(Process),
}

impl Keeper {
    async fn dead(&mut self) {
        match self {
            Keeper::Ours { child, .. } => drop(child.wait().await),
            Keeper::Adopted(process) => process.dead().await,
        }
    }

    /// Ends a child of ours that may be too young to hold its lock; others are found by theirs.
    async fn end(&mut self, grace: Duration) {
        let Keeper::Ours { child, .. } = self else { return };
        let process = child.id().and_then(|pid| Process::of(pid.cast_signed()));
        for (signal, patience) in
            [(libc::SIGTERM, grace + Duration::from_secs(3)), (libc::SIGKILL, Duration::from_secs(3))]
        {
            if let Some(process) = &process {
                process.signal(signal);
            }
            if tokio::time::timeout(patience, child.wait()).await.is_ok() {
                return;
            }
        }
    }
}

struct Supervisor {
    index: usize,
    launch: Launch,
    version: String,
    ready_deadline: Duration,
    self_exe: PathBuf,
    progress: Option<mpsc::UnboundedSender<String>>,
    news: mpsc::UnboundedSender<(usize, News)>,
    stop: watch::Receiver<bool>,
}

impl Supervisor {
    /// Until we are asked to stop. Whether everything of the daemon is gone then.
    async fn run(self) -> bool {
        let mut adopted = self.adoptable().await;
        let mut pause = Pause::default();
        loop {
            let born = Instant::now();
            let end = match adopted.take() {
                Some(state) => {
                    self.say("adopted: its dockerd has been running on");
                    self.tell(None, None);
                    self.watch(Keeper::Adopted(state.keeper)).await
                }
                None => self.live().await,
            };
            let End::Died(reason) = end else { break };
            let pause = pause.after(born.elapsed());
            self.say(&format!("{reason}; starting it again in {} s", pause.as_secs_f32()));
            let problem = format!("{}: {reason} (its log: {})", self.launch.id, self.launch.log().display());
            self.tell(Some(format!("{reason}; starting again in {} s", pause.as_secs_f32())), Some(problem));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stopping() => break,
            }
        }
        let gone = self.clean().await;
        match &gone {
            Ok(()) => self.say("stopped"),
            Err(fault) => self.say(fault),
        }
        gone.is_ok()
    }

    /// Ends what is alive of the daemon, and removes what is outside its namespaces.
    async fn clean(&self) -> Result<(), String> {
        let Launch { run, pool, id, link, stop_grace, .. } = &self.launch;
        cleanup::daemon(run, pool, id, &link.veth, *stop_grace).await
    }

    /// The running daemon of an earlier dindpool, if it is the one that we want and answers.
    async fn adoptable(&self) -> Option<State> {
        let run = &self.launch.run;
        let launched: Launch = state::read(&state::launch_file(run))?;
        let state: State = state::read(&state::state_file(run))?;
        let wanted = launched.same_daemon(&self.launch) && state.alive();
        if !wanted || !ping(&self.launch.socket()).await {
            return None;
        }
        // A firewall may have been reloaded while nobody looked.
        let link = self.launch.link.clone();
        let rules = cleanup::blocking(move || super::network::ensure_rules(&link)).await;
        matches!(rules, Some(Ok(()))).then_some(state)
    }

    /// One life, from the start to the end.
    async fn live(&self) -> End {
        let born = Instant::now();
        let starting = format!("starting dockerd {}", self.version);
        self.say(&starting);
        self.tell(Some(starting), None);
        if let Err(fault) = self.clean().await {
            return End::Died(fault);
        }
        let log = match Log::open(self.launch.log()) {
            Ok(log) => log,
            Err(error) => return End::Died(format!("cannot write its log: {error}")),
        };
        let mut keeper = match self.spawn(&log) {
            Ok(mut child) => {
                let alive = child.stdin.take();
                Keeper::Ours { child: Box::new(child), _alive: alive }
            }
            Err(error) => return End::Died(format!("cannot start {}: {error}", self.self_exe.display())),
        };
        let socket = self.launch.socket();
        let reason = tokio::select! {
            () = keeper.dead() => {
                let why = log::telling_line(&log.since()).unwrap_or_else(|| "it said nothing".to_string());
                format!("dockerd did not start: {why}")
            }
            () = self.stopping() => {
                keeper.end(self.launch.stop_grace).await;
                return End::Stopped;
            }
            ready = tokio::time::timeout(self.ready_deadline, answers(&socket)) => match ready {
                Ok(()) => {
                    let took = born.elapsed().as_secs_f32();
                    self.say(&format!("dockerd {} is ready after {took:.1} s", self.version));
                    self.tell(None, None);
                    return self.watch(keeper).await;
                }
                Err(_) => {
                    let why = log::telling_line(&log.since()).unwrap_or_default();
                    format!("dockerd gave no answer within {:?}: {why}", self.ready_deadline)
                }
            }
        };
        // What holds up a start holds up a stop: no long grace.
        keeper.end(Duration::from_secs(2).min(self.launch.stop_grace)).await;
        End::Died(reason)
    }

    /// Starts the hidden subcommand for this daemon.
    fn spawn(&self, log: &Log) -> std::io::Result<Child> {
        let file = state::launch_file(&self.launch.run);
        state::write(&file, &self.launch)?;
        Command::new(&self.self_exe)
            .arg0("dindpool")
            .arg(EXEC_DAEMON)
            .arg(file)
            // Held open by us alone: its end is how the keeper of temporary data learns of ours.
            .stdin(if self.launch.die_with_owner { Stdio::piped() } else { Stdio::null() })
            .stdout(log.file.try_clone()?)
            .stderr(log.file.try_clone()?)
            .current_dir("/")
            .spawn()
    }

    /// Waits for the end of a daemon that is up.
    async fn watch(&self, mut keeper: Keeper) -> End {
        tokio::select! {
            () = keeper.dead() => {
                let tail = log::tail(&self.launch.log());
                End::Died(log::end_line(&tail).unwrap_or_else(|| "dockerd ended".to_string()))
            }
            () = self.keep_house() => unreachable!("it has no end"),
            () = self.stopping() => {
                keeper.end(self.launch.stop_grace).await;
                End::Stopped
            }
        }
    }

    /// What a daemon that runs for months needs: room for its log, and its rules back when somebody has
    /// reloaded a firewall, which flushes them and leaves the daemon without a network, looking healthy.
    async fn keep_house(&self) {
        loop {
            tokio::time::sleep(HOUSEKEEPING).await;
            let (log, link) = (self.launch.log(), self.launch.link.clone());
            let done = cleanup::blocking(move || {
                let rotated = log::move_aside(&log).map_err(|error| format!("{}: {error}", log.display()));
                rotated.and(super::network::ensure_rules(&link))
            });
            if let Some(Err(fault)) = done.await {
                tracing::warn!(daemon = self.launch.id, "{fault}");
            }
        }
    }

    /// Completes when we are asked to stop.
    fn stopping(&self) -> impl Future<Output = ()> + use<> {
        let mut stop = self.stop.clone();
        async move { drop(stop.wait_for(|stop| *stop).await) }
    }

    fn tell(&self, pending: Option<String>, problem: Option<String>) {
        let _ = self.news.send((self.index, News { pending, problem }));
    }

    fn say(&self, text: &str) {
        tracing::info!(daemon = self.launch.id, "{text}");
        if let Some(progress) = &self.progress {
            let _ = progress.send(format!("{}: {text}", self.launch.id));
        }
    }
}

/// How long to wait before the next start: doubling from 0.5 s to 30 s, so that a daemon that cannot start
/// does not keep the machine busy, and from the beginning again once one has recovered.
#[derive(Default)]
struct Pause {
    last: Option<Duration>,
}

impl Pause {
    fn after(&mut self, lived: Duration) -> Duration {
        let next = match self.last {
            Some(last) if lived < RECOVERED => (last * 2).min(Duration::from_secs(30)),
            _ => Duration::from_millis(500),
        };
        *self.last.insert(next)
    }
}

/// Completes when the daemon behind a socket answers.
async fn answers(socket: &Path) {
    while !ping(socket).await {
        tokio::time::sleep(PING_INTERVAL).await;
    }
}

/// Whether `GET /_ping` is answered by 200 within seconds. Whether the daemon is *well* is not asked here.
async fn ping(socket: &Path) -> bool {
    let exchange = async {
        let mut stream = tokio::net::UnixStream::connect(socket).await?;
        stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: dindpool\r\nConnection: close\r\n\r\n").await?;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await?;
        std::io::Result::Ok(head)
    };
    let answer = tokio::time::timeout(Duration::from_secs(5), exchange).await;
    matches!(answer, Ok(Ok(head)) if head.starts_with(b"HTTP/1.") && head.ends_with(b" 200"))
}

/// Says a step of the preparation, before there is a daemon that it belongs to.
pub(super) fn say(progress: Option<&mpsc::UnboundedSender<String>>, text: &str) {
    if let Some(progress) = progress {
        let _ = progress.send(text.to_string());
    }
}

impl From<String> for Faults {
    fn from(fault: String) -> Faults {
        Faults(vec![fault])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_slow_down_and_a_recovered_daemon_starts_anew() {
        let mut pause = Pause::default();
        let short = Duration::from_secs(1);
        let seconds: Vec<f32> = (0..8).map(|_| pause.after(short).as_secs_f32()).collect();
        assert_eq!(seconds, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        assert_eq!(pause.after(RECOVERED), Duration::from_millis(500));
    }
}
