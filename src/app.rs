//! The composition root: binds early, serves late, stops in order.

use std::future::Future;
use std::io::Write;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context;
use tokio::task::JoinSet;

use crate::admin::prestop::{self, Prestop};
use crate::admin::token::Token;
use crate::admin::{self, Admin};
use crate::config::{Listener, Settings};
use crate::drain::Drain;
use crate::election::{self, Identity};
use crate::metrics::Metrics;
use crate::pool::{Pool, notes, scaler};
use crate::provision::Running;
use crate::proxy::Proxy;
use crate::proxy::cancel::WaitingBuilds;
use crate::proxy::limits::{Gate, raise_descriptors};
use crate::proxy::listener::{self, Bound, Entry};
use crate::proxy::peer::Peers;
use crate::proxy::sweep::{self, Sweeper};
use crate::reload::{Reload, Source};
use crate::tls;
use crate::tls::identity::Rule;

/// Bound sockets, so that every fault of an address is known before anything starts.
pub struct Sockets {
    listeners: Vec<(Listener, Bound)>,
    admin: Vec<Bound>,
    prestop: Option<Bound>,
}

impl Sockets {
    /// Binds all addresses.
    ///
    /// # Errors
    /// Every address that cannot be bound, all at once.
    pub async fn bind(settings: &Settings) -> anyhow::Result<Self> {
        let mut listeners = Vec::new();
        let mut faults = Vec::new();
        for listener in &settings.listen {
            match Bound::new(&listener.address).await {
                Ok(bound) => listeners.push((listener.clone(), bound)),
                Err(error) => faults.push(format!("cannot listen on {}: {error}", listener.address)),
            }
        }
        let mut admin = Vec::new();
        for address in &settings.admin {
            match Bound::admin(address).await {
                Ok(bound) => admin.push(bound),
                Err(error) => faults.push(format!("cannot listen on {address} (admin): {error}")),
            }
        }
        let mut prestop = None;
        if let Some(address) = &settings.prestop {
            match Bound::admin(address).await {
                Ok(bound) => prestop = Some(bound),
                Err(error) => faults.push(format!("cannot listen on {address} (prestop): {error}")),
            }
        }
        anyhow::ensure!(faults.is_empty(), "{}", faults.join("\n"));
        Ok(Sockets { listeners, admin, prestop })
    }

    /// Prints the real addresses, one a line: `listening on tcp://…`, `admin on http://…`, `prestop on …`.
    pub fn announce(&self) {
        for (listener, bound) in &self.listeners {
            say(&format!("listening on {}", bound.address()));
            if !listener.address.is_local() && !listener.is_guarded() {
                tracing::warn!(
                    "{} is open to the network without TLS and client certificates: whoever reaches it is root in every daemon",
                    bound.address()
                );
            }
        }
        for bound in &self.admin {
            say(&format!("admin on {}", bound.address().replace("tcp://", "http://")));
        }
        if let Some(bound) = &self.prestop {
            say(&format!("prestop on {}", bound.address().replace("tcp://", "http://")));
        }
    }

    /// The port of the first admin listener on TCP.
    fn admin_port(&self) -> Option<u16> {
        let port = |bound: &Bound| bound.address().rsplit_once(':')?.1.parse().ok();
        self.admin.iter().filter(|bound| matches!(bound, Bound::Tcp(_))).find_map(port)
    }

    /// The real addresses of the listeners, `tcp://…` and `unix://…`.
    pub fn addresses(&self) -> Vec<String> {
        self.listeners.iter().map(|(_, bound)| bound.address()).collect()
    }
}

/// Prints a line for a person or a script to read. A reader that has gone is no reason to stop.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// What runs beside the pool; boxed, because each command has its own.
pub type Beside = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs proxy and pool until `shutdown`, with the settings of `source` after each SIGHUP; then ends open streams
/// within their grace. `beside` makes a task that runs beside them (progress, for `up`).
///
/// # Errors
/// When the metrics cannot be registered.
pub async fn run(
    settings: Settings,
    sockets: Sockets,
    provisioner: Running,
    source: Source,
    shutdown: impl Future<Output = ()>,
    beside: impl FnOnce(Arc<Pool>) -> Beside,
) -> anyhow::Result<()> {
    let metrics = Metrics::new(prometheus::Registry::new()).context("metrics")?;
    for listener in &settings.listen {
        metrics.tenant(listener.identity.tenant.as_str());
    }
    let pool = Pool::new(settings.pool.clone(), metrics.clone(), seed());
    let proxy = Arc::new(Proxy {
        pool: pool.clone(),
        peers: Arc::new(Peers::new(&settings.session_env)),
        waiting: WaitingBuilds::default(),
        drain: Drain::new(),
        gate: Gate::new(settings.limits, raise_descriptors()),
        sweeper: Sweeper::default(),
        head_deadline: settings.head_deadline,
        metrics: metrics.clone(),
    });
    count_panics(metrics.panics.clone());
    let Running { observations, stop, stopped, changes, notes } = provisioner;
    let pool_task = tokio::spawn(pool.clone().run(observations));
    let scaler_task = changes.map(|changes| tokio::spawn(scaler::run(pool.clone(), changes)));
    // Whoever scales also writes, and nobody else does.
    let notes_task = notes.map(|to| tokio::spawn(notes::run(pool.clone(), to)));
    let mut admin = Admin::new(pool.clone(), proxy.drain.clone(), settings.admin_token.clone());
    let election = match &settings.lease {
        Some(target) => {
            let identity = Identity::from_env(|name| std::env::var(name).ok()).map_err(anyhow::Error::msg)?;
            let port = sockets.admin_port().context("the other proxies need an admin listener on TCP")?;
            let token = Token::random()?;
            admin.peers = Some(token.clone());
            let started = election::start(target.clone(), identity, port, token, pool.clone()).await;
            Some(started.map_err(anyhow::Error::msg)?)
        }
        None => None,
    };
    let admin = Arc::new(admin);
    let admins: Vec<_> =
        sockets.admin.into_iter().map(|bound| tokio::spawn(admin::run(bound, admin.clone()))).collect();
    let prestop = Arc::new(Prestop::new(pool.clone(), settings.prestop_token.clone()));
    let prestop_task = sockets.prestop.map(|bound| tokio::spawn(prestop::run(bound, prestop.clone())));
    let rules: Arc<[Rule]> = settings.identify.clone().into();
    let daemon_tls = settings.daemon_tls.clone();
    let settings = Arc::new(RwLock::new(settings));
    let entries = sockets.listeners.into_iter().map(|(listener, bound)| {
        let tls = listener.tls.as_ref().map(tls::Server::new).transpose().map_err(anyhow::Error::msg)?;
        let entry = Entry {
            identity: Arc::new(listener.identity),
            tls: tls.map(Arc::new),
            load_balancers: listener.load_balancers,
            rules: rules.clone(),
        };
        Ok((Arc::new(entry), bound))
    });
    let entries: Vec<(Arc<Entry>, Bound)> = entries.collect::<anyhow::Result<_>>()?;
    let servers = entries.iter().filter_map(|(entry, _)| entry.tls.clone()).collect();
    let watched = tls::watch::Watched { servers, client: daemon_tls };
    let reload = Reload {
        tls: watched.clone(),
        source,
        settings: settings.clone(),
        pool: pool.clone(),
        admin: admin.clone(),
        prestop,
        metrics: metrics.clone(),
    };
    let reload_task = tokio::spawn(reload.run());
    let mut listeners = JoinSet::new();
    for (entry, bound) in entries {
        listeners.spawn(listener::run(proxy.clone(), entry, bound));
    }
    let certificates_task = tokio::spawn(tls::watch::run(watched, metrics.clone()));
    let sweep_task = tokio::spawn(sweep::run(proxy.clone()));
    let beside_task = tokio::spawn(beside(pool.clone()));
    shutdown.await;
    // Whoever comes after us decides anew.
    scaler_task.iter().chain(&notes_task).for_each(|task| task.abort());
    if let Some(election) = &election {
        // Whoever comes now is admitted by the next one, and relayed here as long as this process lives.
        let admitted = pool.admits();
        election.leave();
        pool.leave();
        let lease = settings.read().unwrap_or_else(PoisonError::into_inner).lease.clone();
        if let Some(target) = lease.filter(|_| admitted) {
            // Until then the Service leads here, and nowhere else.
            let _ = tokio::time::timeout(target.duration, pool.succeeded()).await;
        }
    }
    reload_task.abort();
    let settings = settings.read().unwrap_or_else(PoisonError::into_inner).clone();
    proxy.drain.leave();
    if !settings.shutdown_delay.is_zero() {
        // Whoever sends clients here needs a moment to hear that they should go elsewhere.
        tracing::info!(delay_s = settings.shutdown_delay.as_secs_f64(), "leaving: not ready, still serving");
        tokio::time::sleep(settings.shutdown_delay).await;
    }
    let open = proxy.drain.open();
    tracing::info!(connections = open, grace_s = settings.shutdown_grace.as_secs(), "stopping");
    beside_task.abort();
    proxy.drain.stop();
    // They take in whom the kernel has connected already.
    while listeners.join_next().await.is_some() {}
    let cut = proxy.drain.finish(settings.shutdown_grace).await;
    if cut > 0 {
        tracing::warn!(cut, "connections cut at the end of the grace");
    }
    if let Some(election) = election {
        election.stop().await;
    }
    sweep_task.abort();
    certificates_task.abort();
    pool_task.abort();
    pool.stop();
    let _ = stop.send(());
    let _ = stopped.await;
    admins.iter().chain(&prestop_task).for_each(|task| task.abort());
    tracing::info!("stopped");
    Ok(())
}

/// Counts each panic, and logs where it was. A panic ends the task that it happens in, one connection or one call,
/// and its guards give back what it held; nothing else notices.
fn count_panics(panics: prometheus::IntCounter) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        panics.inc();
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(location, "panic: a fault of dindpool; please report it");
        before(info);
    }));
}

/// The seed of the engine's ties: any number that differs between processes.
fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
