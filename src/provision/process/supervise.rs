//! Keeps the daemons running: one task for each, which tells what is going on.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::log::{self, Log};
use super::plan::{self, Launch};
use super::prepare::{Site, create_private};
use super::state::{self, Process, State};
use super::{EXEC_DAEMON, Faults, cleanup};
use crate::engine::scaling::STARTING_AGAIN;
use crate::provision::crew::{Maker, News, Order, Pause, Post};
use crate::provision::{DaemonSpec, Endpoint};

/// How often somebody looks after a daemon that runs.
const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// How often a starting daemon is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_millis(50);
/// In the directory of a daemon that was made because there was work: it goes with the daemon.
const SCALED: &str = "dindpool.scaled";

impl Maker for Site {
    type Plan = Launch;

    async fn plan(&self, indices: &[usize]) -> Result<Vec<Launch>, String> {
        self.register(indices).await
    }

    fn spec(&self, launch: &Launch) -> DaemonSpec {
        spec(launch, Some("waiting to start".to_string()), false)
    }

    async fn live(self: Arc<Self>, launch: Launch, post: Post) -> bool {
        let version = self.version(&launch).to_string();
        Supervisor { site: self, launch, version, post, fresh: false, been_up: false, fault: None }
            .run()
            .await
    }

    async fn removed(&self, index: usize) {
        self.unregister(index).await;
    }

    async fn end(&self, gone: bool) {
        if gone {
            // Otherwise the register keeps the names, so that a later dindpool may try again.
            cleanup::forget(&self.run_dir, &*self.registration.lock().await).await;
        }
    }
}

fn spec(launch: &Launch, pending: Option<String>, faulty: bool) -> DaemonSpec {
    DaemonSpec {
        id: launch.id.clone(),
        endpoint: Some(Endpoint::Unix(launch.socket())),
        source_ips: vec![IpAddr::V4(launch.link.inner())],
        cgroup: Some(plan::cgroup(&launch.pool, &launch.id)),
        draining: false,
        pending,
        faulty,
        removal: Default::default(),
        slots: None,
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
    site: Arc<Site>,
    launch: Launch,
    version: String,
    post: Post,
    /// Its data was made by this supervisor.
    fresh: bool,
    /// It has been up: what is on it could be seen.
    been_up: bool,
    /// Why it did not start the last time.
    fault: Option<String>,
}

impl Supervisor {
    /// Until it is to end. Whether everything of the daemon is gone then.
    async fn run(mut self) -> bool {
        let mut adopted = self.adoptable().await;
        let mut pause = Pause::default();
        loop {
            let born = Instant::now();
            let end = match adopted.take() {
                Some(state) => {
                    self.say("adopted: its dockerd has been running on");
                    self.is_up();
                    self.watch(Keeper::Adopted(state.keeper)).await
                }
                None => self.live().await,
            };
            let End::Died(reason) = end else { break };
            let pause = pause.after(born.elapsed());
            self.say(&format!("{reason}; starting it again in {} s", pause.as_secs_f32()));
            self.fault = Some(reason.clone());
            self.tell(Some(format!("{reason}{STARTING_AGAIN} again in {} s", pause.as_secs_f32())));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.post.ending() => break,
            }
        }
        let mut gone = self.clean().await;
        if gone.is_ok() && self.post.order() == Order::Remove {
            gone = self.remove_data().await;
        }
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

    /// What it had goes with it, if it was made because there was work and nothing on it is unknown: it was seen when
    /// it was chosen, or nothing of an earlier pool was there.
    async fn remove_data(&self) -> Result<(), String> {
        let (data, run) = (self.launch.data.clone(), self.launch.run.clone());
        let known = self.fresh || self.been_up;
        let removed = cleanup::blocking(move || {
            let _ = fs::remove_dir_all(run);
            if known && data.join(SCALED).exists() { cleanup::remove_data(&data) } else { Ok(()) }
        });
        removed.await.unwrap_or(Ok(()))
    }

    /// Makes its directories. On a full disk that fails as all the rest would.
    fn make_directories(&mut self) -> Result<(), String> {
        let Launch { data, run, .. } = &self.launch;
        let new = !data.join("root").exists();
        create_private(data)?;
        create_private(run)?;
        if new {
            self.fresh = true;
            if self.site.scales {
                let mark = data.join(SCALED);
                fs::write(&mark, "").map_err(|error| format!("{}: {error}", mark.display()))?;
            }
        }
        Ok(())
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
    async fn live(&mut self) -> End {
        let born = Instant::now();
        let starting = format!("starting dockerd {}", self.version);
        self.say(&starting);
        self.tell(Some(match &self.fault {
            Some(fault) => format!("{fault}{STARTING_AGAIN} again"),
            None => starting,
        }));
        if let Err(fault) = self.clean().await {
            return End::Died(fault);
        }
        if let Err(fault) = self.make_directories() {
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
            Err(error) => {
                return End::Died(format!("cannot start {}: {error}", self.site.self_exe.display()));
            }
        };
        let socket = self.launch.socket();
        let reason = tokio::select! {
            () = keeper.dead() => {
                let why = log::telling_line(&log.since()).unwrap_or_else(|| "it said nothing".to_string());
                format!("dockerd did not start: {why}")
            }
            () = self.post.ending() => {
                keeper.end(self.launch.stop_grace).await;
                return End::Stopped;
            }
            ready = tokio::time::timeout(self.site.ready_deadline, answers(&socket)) => match ready {
                Ok(()) => {
                    let took = born.elapsed().as_secs_f32();
                    self.say(&format!("dockerd {} is ready after {took:.1} s", self.version));
                    self.is_up();
                    return self.watch(keeper).await;
                }
                Err(_) => {
                    let why = log::telling_line(&log.since()).unwrap_or_default();
                    format!("dockerd gave no answer within {:?}: {why}", self.site.ready_deadline)
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
        Command::new(&self.site.self_exe)
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
            () = self.post.ending() => {
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

    fn is_up(&mut self) {
        (self.been_up, self.fault) = (true, None);
        self.tell(None);
    }

    /// Tells how it is. What is wrong stays told until it is up again.
    fn tell(&self, pending: Option<String>) {
        let log = self.launch.log();
        let problem = |fault: &String| format!("{}: {fault} (its log: {})", self.launch.id, log.display());
        let problem = self.fault.as_ref().map(problem);
        self.post.tell(News { spec: spec(&self.launch, pending, problem.is_some()), problem });
    }

    fn say(&self, text: &str) {
        tracing::info!(daemon = self.launch.id, "{text}");
        if let Some(progress) = &self.site.progress {
            let _ = progress.send(format!("{}: {text}", self.launch.id));
        }
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
    let exchange = async { super::ping(tokio::net::UnixStream::connect(socket).await?).await };
    matches!(tokio::time::timeout(Duration::from_secs(5), exchange).await, Ok(Ok(true)))
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
