//! How many clients there may be: in total, because each may need two descriptors and the process has a limit of
//! them; and from one source, so that one that runs away does not keep out all others. Who comes on top is told
//! so, in a few bytes and little time, and never costs the health checks and the admin listener their descriptors.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::classify::{self, classify};
use super::local::{self, Known};
use super::relay::{Side, refuse};
use crate::error::{Error, Kind};
use crate::metrics::Metrics;

/// Descriptors that no client gets: listeners, the log, the admin listener's own connections (32, and as many that
/// watch), connections that are being refused ([`SHEDS`]), looks into /proc.
const KEPT: u64 = 160;
/// Descriptors for the probes, lists and events of one daemon.
const KEPT_PER_DAEMON: u64 = 8;
/// A client's own connection and the one to its daemon.
const PER_CLIENT: u64 = 2;
/// How many refused connections are told why at the same time. Others are just closed.
const SHEDS: usize = 32;
/// How long one of them may take to send its head.
const SHED_TIME: Duration = Duration::from_secs(2);
/// Between two log lines about refused connections.
const LOG_PAUSE: Duration = Duration::from_secs(5);

/// What was configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Client connections in all; without it, as many as there are descriptors for.
    pub total: Option<usize>,
    /// Client connections from one address of another machine; without it, half of all. A CI behind one address
    /// (NAT) is one source.
    pub per_source: Option<usize>,
}

/// Why a connection is refused; the value of the metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// There are too many.
    Total,
    /// There are too many from its source.
    Source,
    /// The process had no descriptor left.
    Descriptors,
}

impl Refused {
    fn as_str(self) -> &'static str {
        match self {
            Refused::Total => "total",
            Refused::Source => "source",
            Refused::Descriptors => "descriptors",
        }
    }
}

/// Counts the clients and lets them in.
#[derive(Debug)]
pub struct Gate {
    limits: Limits,
    descriptors: u64,
    total: AtomicUsize,
    open: AtomicUsize,
    /// Sources with connections.
    sources: Mutex<HashMap<IpAddr, usize>>,
    sheds: Arc<Semaphore>,
    logged: Mutex<Option<Instant>>,
    unlogged: AtomicUsize,
}

/// One client that was let in; counted until dropped.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    source: Option<IpAddr>,
}

impl Pass {
    /// Counts the client as one of this address: who it is was not known when it was let in.
    ///
    /// # Errors
    /// When that has too many.
    pub fn claim(&mut self, ip: IpAddr) -> Result<(), Refused> {
        let source = self.gate.count(ip)?;
        self.release();
        self.source = source;
        Ok(())
    }

    fn release(&mut self) {
        let Some(source) = self.source.take() else { return };
        let mut sources = self.gate.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = sources.get_mut(&source) {
            *open -= 1;
            if *open == 0 {
                sources.remove(&source);
            }
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.open.fetch_sub(1, Ordering::Relaxed);
        self.release();
    }
}

impl Gate {
    /// A gate of a process that may have so many descriptors.
    pub fn new(limits: Limits, descriptors: u64) -> Arc<Self> {
        let gate = Gate {
            limits,
            descriptors,
            total: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            sources: Mutex::default(),
            sheds: Arc::new(Semaphore::new(SHEDS)),
            logged: Mutex::default(),
            unlogged: AtomicUsize::new(0),
        };
        gate.keep_for(0);
        Arc::new(gate)
    }

    /// Keeps descriptors for the watches of so many daemons.
    pub fn keep_for(&self, daemons: usize) {
        let kept = KEPT + KEPT_PER_DAEMON * daemons as u64;
        // With hardly any descriptors a few clients are served all the same.
        let room = (self.descriptors.saturating_sub(kept) / PER_CLIENT).max(8);
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        self.total.store(self.limits.total.map_or(room, |total| total.min(room)), Ordering::Relaxed);
    }

    /// How many clients there may be now.
    pub fn total(&self) -> usize {
        self.total.load(Ordering::Relaxed)
    }

    /// How many of them may come from one address.
    pub fn per_source(&self) -> usize {
        self.limits.per_source.unwrap_or(self.total() / 2).max(1)
    }

    /// Counts a source's client that was let in already.
    fn count(&self, ip: IpAddr) -> Result<Option<IpAddr>, Refused> {
        let source = source(ip);
        if source.is_loopback() {
            return Ok(None);
        }
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let open = sources.entry(source).or_default();
        if *open >= self.per_source() {
            return Err(Refused::Source);
        }
        *open += 1;
        Ok(Some(source))
    }

    /// Lets a client in. `ip` is its address, if it came over TCP. Clients of this machine count only in total:
    /// all of them share an address.
    ///
    /// # Errors
    /// Which limit it meets.
    pub fn enter(self: &Arc<Self>, ip: Option<IpAddr>) -> Result<Pass, Refused> {
        if self.open.fetch_add(1, Ordering::Relaxed) >= self.total() {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return Err(Refused::Total);
        }
        let mut pass = Pass { gate: self.clone(), source: None };
        if let Some(ip) = ip {
            pass.source = self.count(ip)?;
        }
        Ok(pass)
    }

    /// Counts a client that was not let in, and logs that now and then.
    pub fn refused(&self, why: Refused, metrics: &Metrics) {
        metrics.refused.with_label_values(&[why.as_str()]).inc();
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_some_and(|at| at.elapsed() < LOG_PAUSE) {
            self.unlogged.fetch_add(1, Ordering::Relaxed);
            return;
        }
        *logged = Some(Instant::now());
        drop(logged);
        let before = self.unlogged.swap(0, Ordering::Relaxed);
        let (open, limit) = (self.open.load(Ordering::Relaxed), self.total());
        tracing::warn!(reason = why.as_str(), open, limit, before, "connection refused: too many");
    }

    /// Room for one more client that is told why it is refused.
    pub fn shed(&self) -> Option<OwnedSemaphorePermit> {
        self.sheds.clone().try_acquire_owned().ok()
    }

    /// What a refused client is told.
    pub fn error(&self, why: Refused) -> Error {
        let message = match why {
            Refused::Source => format!(
                "too many connections from this address ({} may be open); try again later",
                self.per_source()
            ),
            Refused::Total | Refused::Descriptors => {
                format!("too many connections ({} may be open); try again later", self.total())
            }
        };
        Error::new(Kind::Overloaded, message)
    }
}

/// Tells a client that is not let in why, if it has a request. `known` is what is known of the daemons.
pub async fn tell(known: Option<Known>, client: &mut Side, error: Error) {
    let Ok(Ok(Some(head))) = tokio::time::timeout(SHED_TIME, client.read_head()).await else { return };
    let prefix = classify::prefix(head.target()).length;
    let path = head.path().get(prefix..).unwrap_or_default();
    let head_only = head.method() == "HEAD";
    let route = classify(head.method(), path, head.query());
    let answer = match route.local {
        // BuildKit clients must be refused where they ping: with any answer but 101 to these two, buildx builds with
        // another driver.
        Some(classify::Local::Ping) => local::pong(known, head_only, false, Some(error)),
        Some(classify::Local::Grpc) => return,
        _ if route.h2 => return,
        _ => error.response(head_only),
    };
    refuse(client, &answer).await;
}

/// What counts as one source: an IPv4 address; the /64 that an IPv6 host chooses its addresses from.
fn source(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) if !ip.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from(u128::from(ip) & !u128::from(u64::MAX)))
        }
        other => other,
    }
}

/// Raises the limit of open descriptors as far as this process may, and says how many there may be then.
pub fn raise_descriptors() -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(error) => {
            tracing::warn!("the limit of {soft} open files stays: {error}");
            soft
        }
    }
}

/// A descriptor in reserve. When the process has no other left, it is given up for a moment to take a connection
/// and close it: without that, the listener would be ready again and again and its client would wait for ever.
#[derive(Debug, Default)]
pub struct Spare(Option<std::fs::File>);

impl Spare {
    /// Takes one.
    pub fn new() -> Self {
        Spare(std::fs::File::open("/dev/null").ok())
    }

    /// Gives it up; false if there is none.
    pub fn give_up(&mut self) -> bool {
        self.0.take().is_some()
    }

    /// Takes one again.
    pub fn restore(&mut self) {
        *self = Spare::new();
    }
}

/// Whether accept(2) failed for want of descriptors.
pub fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn each_limit_holds_and_a_place_comes_free() {
        let gate = Gate::new(Limits { total: Some(3), per_source: Some(2) }, 20_000);
        let first = gate.enter(ip("10.0.0.1")).unwrap();
        let _second = gate.enter(ip("::ffff:10.0.0.1")).unwrap();
        assert_eq!(gate.enter(ip("10.0.0.1")).unwrap_err(), Refused::Source);
        let third = gate.enter(ip("10.0.0.2")).unwrap();
        assert_eq!(gate.enter(ip("10.0.0.3")).unwrap_err(), Refused::Total);
        assert_eq!(gate.enter(None).unwrap_err(), Refused::Total);
        drop(first);
        drop(third);
        let _again = gate.enter(ip("10.0.0.1")).unwrap();
        let _local = gate.enter(None).unwrap();
        assert_eq!(gate.open.load(Ordering::Relaxed), 3);
        assert_eq!(gate.sources.lock().unwrap().len(), 1);
    }

    #[test]
    fn clients_of_this_machine_count_in_total_only() {
        let gate = Gate::new(Limits { total: Some(5), per_source: Some(1) }, 20_000);
        let _all: Vec<Pass> = (0..5).map(|_| gate.enter(ip("127.0.0.1")).unwrap()).collect();
        assert_eq!(gate.enter(ip("::1")).unwrap_err(), Refused::Total);
    }

    #[test]
    fn a_network_of_ipv6_is_one_source() {
        assert_eq!(source("2001:db8:1:2:3::1".parse().unwrap()), source("2001:db8:1:2::9".parse().unwrap()));
        assert_ne!(source("2001:db8:1:2::1".parse().unwrap()), source("2001:db8:1:3::1".parse().unwrap()));
    }

    #[test]
    fn descriptors_are_kept_for_daemons_and_admin() {
        let gate = Gate::new(Limits::default(), 20_000);
        gate.keep_for(9);
        assert_eq!((gate.total(), gate.per_source()), (9_884, 4_942));
        // What was configured is not more than there is.
        let gate = Gate::new(Limits { total: Some(1_000_000), per_source: None }, 1024);
        assert_eq!(gate.total(), (1024 - 160) / 2);
    }
}
