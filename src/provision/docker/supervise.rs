//! Keeps the containers running: one task for each daemon.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::Options;
use super::engine::{Engine, Fault};
use super::plan::{self, Seen};
use crate::engine::scaling::STARTING_AGAIN;
use crate::provision::crew::{Maker, News, Order, Pause, Post};
use crate::provision::{DaemonSpec, Endpoint, process, slots_by_limits};

/// How often a container is looked at when the engine says nothing.
const LOOK: Duration = Duration::from_secs(2);
/// How often a daemon that starts is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_millis(100);
/// What a daemon that is to come back on its volume has to end by itself.
const GRACE: Duration = Duration::from_secs(10);
/// How often a volume is tried to be removed: its container may go on going for a moment.
const ATTEMPTS: u32 = 10;

/// What every daemon of a pool is made from.
pub(super) struct Site {
    engine: Arc<Engine>,
    options: Options,
    /// One task pulls the image and makes the network; the others wait for it.
    common: Mutex<()>,
    follower: JoinHandle<()>,
}

impl Site {
    pub fn new(engine: Engine, options: Options) -> Arc<Site> {
        let engine = Arc::new(engine);
        let follower = tokio::spawn(engine.clone().follow(options.name.clone()));
        Arc::new(Site { engine, options, common: Mutex::new(()), follower })
    }

    pub fn name(&self, index: usize) -> String {
        plan::name(&self.options.name, index)
    }

    /// Removes a daemon with all that it has.
    pub async fn discard(&self, index: usize) -> Result<(), Fault> {
        let (name, pool) = (self.name(index), &self.options.name);
        let found = self.engine.inspect(&name).await.map(|answer| plan::judge(&self.options, answer).ours);
        match found {
            Ok(true) => self.engine.remove_container(&name).await?,
            // Somebody else's.
            Ok(false) => return Ok(()),
            Err(Fault::Gone) => {}
            Err(fault) => return Err(fault),
        }
        let mut result = self.engine.remove_volume(&name, pool).await;
        for _ in 1..ATTEMPTS {
            if result.is_ok() {
                break;
            }
            sleep(Duration::from_millis(300)).await;
            result = self.engine.remove_volume(&name, pool).await;
        }
        result
    }

    pub fn say(&self, index: usize, text: &str) {
        let name = self.name(index);
        tracing::info!(daemon = name, "{text}");
        if let Some(progress) = &self.options.progress {
            let _ = progress.send(format!("{name}: {text}"));
        }
    }

    fn spec(&self, index: usize, ip: Option<IpAddr>, pending: Option<String>, faulty: bool) -> DaemonSpec {
        DaemonSpec {
            id: self.name(index),
            endpoint: ip.map(|ip| Endpoint::Tcp(SocketAddr::new(ip, self.options.port))),
            source_ips: ip.into_iter().collect(),
            cgroup: None,
            draining: false,
            pending,
            faulty,
            removal: Default::default(),
            slots: slots_by_limits(self.options.cpus, self.options.memory.map(|bytes| bytes as f64)),
        }
    }
}

impl Maker for Site {
    type Plan = usize;

    async fn plan(&self, indices: &[usize]) -> Result<Vec<usize>, String> {
        Ok(indices.to_vec())
    }

    fn spec(&self, index: &usize) -> DaemonSpec {
        self.spec(*index, None, Some("waiting to start".to_string()), false)
    }

    async fn live(self: Arc<Self>, index: usize, post: Post) -> bool {
        Supervisor { site: self, index, post, fault: None }.run().await
    }

    async fn removed(&self, _index: usize) {}

    async fn end(&self, gone: bool) {
        self.follower.abort();
        let Options { name, network, keep, .. } = &self.options;
        if gone && !keep && network.is_none() {
            let removed = self.engine.remove_network(name, name).await;
            let _ = removed.inspect_err(|why| tracing::warn!("network {name} stays: {why}"));
        }
    }

    fn blind(&self) -> Option<String> {
        self.engine.blind()
    }
}

/// How a life of a daemon ended.
enum End {
    /// We were asked to stop.
    Stopped,
    /// By itself, or it never came up; why, in words.
    Died(String),
}

struct Supervisor {
    site: Arc<Site>,
    index: usize,
    post: Post,
    /// Why it did not start the last time.
    fault: Option<String>,
}

impl Supervisor {
    /// Until it is to end. Whether nothing is left of it.
    async fn run(mut self) -> bool {
        let mut pause = Pause::default();
        loop {
            let born = Instant::now();
            let life = self.life().await;
            let End::Died(reason) = life else { break };
            let pause = pause.after(born.elapsed());
            self.say(&format!("{reason}; starting it again in {} s", pause.as_secs_f32()));
            self.fault = Some(reason.clone());
            self.tell(None, Some(format!("{reason}{STARTING_AGAIN} again in {} s", pause.as_secs_f32())));
            tokio::select! {
                () = sleep(pause) => {}
                () = self.post.ending() => break,
            }
        }
        if self.post.order() == Order::Stop && self.site.options.keep {
            self.say("runs on");
            return false;
        }
        match self.site.discard(self.index).await {
            Ok(()) => self.say("removed"),
            Err(fault) => {
                self.say(&format!("cannot be removed: {fault}"));
                return false;
            }
        }
        true
    }

    /// One life, from the start to the end.
    async fn life(&mut self) -> End {
        let ending = self.post.ending();
        let started = tokio::select! {
            started = self.start() => started,
            () = ending => return End::Stopped,
        };
        let container = match started {
            Ok(container) => container,
            Err(reason) => return End::Died(reason),
        };
        let born = Instant::now();
        let deadline = born + self.site.options.ready_deadline;
        let ending = self.post.ending();
        tokio::select! {
            ready = self.ready(&container, deadline) => match ready {
                Ok(seen) => {
                    self.say(&format!("ready after {:.1} s", born.elapsed().as_secs_f32()));
                    self.fault = None;
                    self.tell(seen.ip, None);
                    self.watch(seen).await
                }
                Err(reason) => End::Died(reason),
            },
            () = ending => End::Stopped,
        }
    }

    fn name(&self) -> String {
        self.site.name(self.index)
    }

    /// Adopts the container that is there, or makes one on the volume. Its id.
    async fn start(&mut self) -> Result<String, String> {
        let (name, engine) = (self.name(), self.site.engine.clone());
        match self.look().await {
            Ok(seen) if !seen.ours => {
                return Err(format!(
                    "there is a container {name} that is not this pool's: remove it, or choose another name"
                ));
            }
            Ok(seen) if seen.fits && seen.ended.is_none() => {
                self.say("adopted: its container has been running on");
                return Ok(seen.id);
            }
            Ok(_) => {
                engine
                    .stop(&name, GRACE)
                    .await
                    .map_err(|why| format!("its former container does not stop: {why}"))?;
                engine
                    .remove_container(&name)
                    .await
                    .map_err(|why| format!("its former container stays: {why}"))?;
            }
            Err(Fault::Gone) => {}
            Err(fault) => return Err(fault.to_string()),
        }
        self.common().await?;
        self.progress("starting its container");
        let body = plan::container(&self.site.options, self.index);
        let created = engine.create(&self.site.options.name, self.index, body).await;
        created.map_err(|why| match why {
            Fault::Gone => "its image or its network is not there".to_string(),
            why => format!("its container cannot be made: {why}"),
        })?;
        self.look().await.map(|seen| seen.id).map_err(|why| why.to_string())
    }

    /// What all daemons need.
    async fn common(&mut self) -> Result<(), String> {
        let site = self.site.clone();
        let Options { image, name, network, .. } = &site.options;
        let _only = site.common.lock().await;
        if !site.engine.has_image(image).await.map_err(|why| why.to_string())? {
            self.progress(&format!("pulling {image}"));
            site.engine.pull(image).await.map_err(|why| format!("cannot pull {image}: {why}"))?;
        }
        if network.is_none() {
            let made = site.engine.make_network(name, name).await;
            made.map_err(|why| format!("network {name} cannot be made: {why}"))?;
        }
        Ok(())
    }

    async fn look(&self) -> Result<Seen, Fault> {
        let answer = self.site.engine.inspect(&self.name()).await?;
        Ok(plan::judge(&self.site.options, answer))
    }

    /// Waits until dockerd answers in the container.
    async fn ready(&mut self, container: &str, deadline: Instant) -> Result<Seen, String> {
        let mut unwell = None;
        loop {
            match self.look().await {
                Ok(seen) if seen.id != container => return Err("its container was replaced".into()),
                Ok(Seen { ended: Some(why), .. }) => return Err(self.with_last_words(why).await),
                Ok(seen) => {
                    if let Some(ip) = seen.ip
                        && ping(SocketAddr::new(ip, self.site.options.port)).await
                    {
                        return Ok(seen);
                    }
                    if let (Some(why), true) = (&seen.unwell, seen.unwell != unwell) {
                        self.tell(None, Some(why.clone()));
                    }
                    unwell = seen.unwell;
                }
                Err(Fault::Gone) => return Err("its container was removed".into()),
                // What the engine says, or that it says nothing, is no fault of the daemon.
                Err(fault) => tracing::debug!(daemon = self.name(), "{fault}"),
            }
            if Instant::now() >= deadline {
                let within = self.site.options.ready_deadline;
                // What does not answer may be half alive: the next life begins with a container of its own.
                let _ = self.site.engine.remove_container(&self.name()).await;
                let why = unwell.unwrap_or_else(|| "dockerd gives no answer".into());
                return Err(format!("{why}, not within {within:?}"));
            }
            sleep(PING_INTERVAL).await;
        }
    }

    /// Waits for the end of a daemon that is up.
    async fn watch(&self, was: Seen) -> End {
        let mut happened = self.site.engine.happened();
        loop {
            tokio::select! {
                () = sleep(LOOK) => {}
                changed = happened.changed() => if changed.is_err() { sleep(LOOK).await },
                () = self.post.ending() => return End::Stopped,
            }
            match self.look().await {
                Ok(seen) if seen.id != was.id => return End::Died("its container was replaced".into()),
                Ok(Seen { ended: Some(why), .. }) => return End::Died(self.with_last_words(why).await),
                Ok(seen) if seen.ip.is_some() && seen.ip != was.ip => {
                    return End::Died("its container has another address".into());
                }
                Ok(_) => {}
                Err(Fault::Gone) => return End::Died("its container was removed".into()),
                Err(fault) => tracing::debug!(daemon = self.name(), "{fault}"),
            }
        }
    }

    /// A container's end, with what its log tells about it.
    async fn with_last_words(&self, why: String) -> String {
        let log = self.site.engine.log(&self.name()).await;
        process::telling_line(&log).map_or(why.clone(), |line| format!("{why}: {line}"))
    }

    fn progress(&self, text: &str) {
        self.say(text);
        self.tell(
            None,
            Some(match &self.fault {
                Some(fault) => format!("{fault}{STARTING_AGAIN} again: {text}"),
                None => text.to_string(),
            }),
        );
    }

    /// Tells how it is. What is wrong stays told until it is up again.
    fn tell(&self, ip: Option<IpAddr>, pending: Option<String>) {
        let problem = self.fault.as_ref().map(|fault| format!("{}: {fault}", self.name()));
        let spec = self.site.spec(self.index, ip, pending, problem.is_some());
        self.post.tell(News { spec, problem });
    }

    fn say(&self, text: &str) {
        self.site.say(self.index, text);
    }
}

/// Whether `GET /_ping` is answered by 200.
async fn ping(addr: SocketAddr) -> bool {
    let asked = async {
        let stream = tokio::net::TcpStream::connect(addr).await?;
        process::ping(stream).await
    };
    matches!(tokio::time::timeout(Duration::from_secs(2), asked).await, Ok(Ok(true)))
}
