//! The composition root: binds early, serves late, stops in order.

use std::future::Future;
use std::io::Write;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::Context;
use tokio::net::TcpListener;

use crate::admin;
use crate::config::{Listener, Settings};
use crate::drain::Drain;
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::provision::Running;
use crate::proxy::Proxy;
use crate::proxy::cancel::WaitingBuilds;
use crate::proxy::listener::{self, Bound};
use crate::proxy::peer::Peers;

/// Bound sockets, so that every fault of an address is known before anything starts.
pub struct Sockets {
    listeners: Vec<(Listener, Bound)>,
    admin: TcpListener,
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
        let admin = match TcpListener::bind(&settings.admin).await {
            Ok(admin) => Some(admin),
            Err(error) => {
                faults.push(format!("cannot listen on {} (admin): {error}", settings.admin));
                None
            }
        };
        let (Some(admin), true) = (admin, faults.is_empty()) else {
            anyhow::bail!("{}", faults.join("\n"));
        };
        Ok(Sockets { listeners, admin })
    }

    /// Prints the real addresses, one a line: `listening on tcp://…`, `admin on http://…`.
    pub fn announce(&self) {
        for (listener, bound) in &self.listeners {
            say(&format!("listening on {}", bound.address()));
            if !listener.address.is_local() {
                tracing::warn!(
                    "{} is open to the network without TLS: whoever reaches it is root in every daemon",
                    bound.address()
                );
            }
        }
        if let Ok(address) = self.admin.local_addr() {
            say(&format!("admin on http://{address}"));
        }
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

/// Runs proxy and pool until `shutdown`, then ends open streams within their grace. `beside` makes a task that
/// runs beside them (progress, for `up`).
///
/// # Errors
/// When the metrics cannot be registered.
pub async fn run(
    settings: Settings,
    sockets: Sockets,
    provisioner: Running,
    shutdown: impl Future<Output = ()>,
    beside: impl FnOnce(Arc<Pool>) -> Beside,
) -> anyhow::Result<()> {
    let metrics = Metrics::new(prometheus::Registry::new()).context("metrics")?;
    let pool = Pool::new(settings.pool.clone(), metrics.clone(), seed());
    let proxy = Arc::new(Proxy {
        pool: pool.clone(),
        peers: Arc::new(Peers::new(&settings.session_env)),
        waiting: WaitingBuilds::default(),
        drain: Drain::new(),
        metrics,
    });
    let Running { observations, stop, stopped } = provisioner;
    let pool_task = tokio::spawn(pool.clone().run(observations));
    let admin_task = tokio::spawn(admin::run(sockets.admin, pool.clone(), proxy.drain.clone()));
    for (listener, bound) in sockets.listeners {
        tokio::spawn(listener::run(proxy.clone(), Arc::new(listener.identity), bound));
    }
    let beside_task = tokio::spawn(beside(pool.clone()));
    shutdown.await;
    let open = proxy.drain.open();
    tracing::info!(connections = open, grace_s = settings.shutdown_grace.as_secs(), "stopping");
    beside_task.abort();
    let cut = proxy.drain.finish(settings.shutdown_grace).await;
    if cut > 0 {
        tracing::warn!(cut, "connections cut at the end of the grace");
    }
    pool_task.abort();
    pool.stop();
    let _ = stop.send(());
    let _ = stopped.await;
    admin_task.abort();
    tracing::info!("stopped");
    Ok(())
}

/// The seed of the engine's ties: any number that differs between processes.
fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
