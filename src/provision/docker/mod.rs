//! Daemons as privileged containers of one Docker engine: a pool on a machine that has Docker and no dockerd of ours.
//!
//! Each daemon is a container with a volume of its own, on a network of the pool's own. They are found again by their
//! labels, so that a dindpool that was killed costs nothing: the next one of the same name adopts its daemons. A
//! container that dies is made anew on its volume, and is the same daemon then.
//!
//! The engine is looked at every two seconds, and whenever it tells that something happened. What it says and nobody
//! understands (another version's words) changes nothing, and neither does an engine that does not answer: the last
//! known pool goes on serving.

mod engine;
mod plan;
mod supervise;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use tokio::sync::mpsc;

use super::{Running, crew};
use engine::Engine;
pub use plan::{bytes, is_name};

/// Where an engine is unless DOCKER_HOST says otherwise.
pub const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";

/// What to run, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// The engine: `unix:///path` or `tcp://host:port`.
    pub host: String,
    /// The pool's name on this engine: of its network, and the beginning of its containers' and volumes' names.
    pub name: String,
    /// How many daemons; at least so many at first, in a pool that scales.
    pub daemons: usize,
    /// The pool takes changes of the number of daemons, up to this.
    pub most: Option<usize>,
    /// The image of the daemons. Its entry point runs dockerd, listens on port 2375 without TLS, and takes further
    /// arguments for dockerd, as `docker:dind` does.
    pub image: String,
    /// Processors of each daemon.
    pub cpus: Option<f64>,
    /// Memory of each daemon, in bytes.
    pub memory: Option<u64>,
    /// Further arguments of every dockerd.
    pub extra_args: Vec<String>,
    /// A network that is there already; `None` makes one for the pool.
    pub network: Option<String>,
    /// Where each daemon listens.
    pub port: u16,
    /// The daemons run on when the pool stops, for the next one of the same name.
    pub keep: bool,
    /// A daemon that does not answer for this long after its start is made anew.
    pub ready_deadline: Duration,
    /// Lines for a person who waits.
    pub progress: Option<mpsc::UnboundedSender<String>>,
}

impl Options {
    /// Two daemons of `docker:28-dind` on the engine of this machine.
    pub fn new(host: &str) -> Options {
        Options {
            host: host.to_string(),
            name: "dindpool".to_string(),
            daemons: 2,
            most: None,
            image: "docker:28-dind".to_string(),
            cpus: None,
            memory: None,
            extra_args: Vec::new(),
            network: None,
            port: super::fixed::DEFAULT_PORT,
            keep: false,
            ready_deadline: Duration::from_secs(60),
            progress: None,
        }
    }
}

/// The engine that DOCKER_HOST names, or this machine's.
pub fn host() -> String {
    std::env::var("DOCKER_HOST")
        .ok()
        .filter(|host| !host.is_empty())
        .unwrap_or_else(|| DEFAULT_HOST.to_string())
}

/// Whether an engine answers there.
pub async fn answers(host: &str) -> bool {
    Engine::connect(host).await.is_ok()
}

/// The listener, if any of `listeners` (`unix:///path`, `tcp://1.2.3.4:5`), that `host` leads to: a pool whose engine is
/// the pool itself would wait for itself.
pub fn own_listener<'a>(host: &str, listeners: &'a [String]) -> Option<&'a str> {
    let same = |listener: &&String| match (host.strip_prefix("unix://"), listener.strip_prefix("unix://")) {
        (Some(one), Some(other)) => same_file(one, other),
        (None, None) => same_socket(host, listener),
        _ => false,
    };
    listeners.iter().find(same).map(String::as_str)
}

fn same_file(one: &str, other: &str) -> bool {
    let place = |path: &str| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    place(one).map_or(one == other, |found| place(other) == Some(found))
}

fn same_socket(host: &str, listener: &str) -> bool {
    let address = |url: &str| url.split_once("://").map(|(_, rest)| rest.trim_end_matches('/').to_string());
    let (Some(host), Some(Ok(listener))) =
        (address(host), address(listener).map(|a| a.parse::<SocketAddr>()))
    else {
        return false;
    };
    let found = std::net::ToSocketAddrs::to_socket_addrs(&host).into_iter().flatten();
    found.filter(|to| to.port() == listener.port()).any(|to| {
        let everywhere = listener.ip().is_unspecified() && is_local(to.ip());
        to.ip().is_unspecified() || everywhere || to.ip().to_canonical() == listener.ip().to_canonical()
    })
}

/// Whether it is an address of this machine: another one cannot be bound to.
fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || UdpSocket::bind(SocketAddr::new(ip, 0)).is_ok()
}

/// Starts the daemons, or adopts those that an earlier dindpool of this name has left on the engine.
///
/// # Errors
/// What keeps the engine from being used, in words. What keeps a daemon from starting is told by the observations.
pub async fn start(options: Options) -> Result<Running, String> {
    if !is_name(&options.name) {
        return Err(format!("`{}` is no name: use letters, digits, - _ .", options.name));
    }
    let engine = Engine::connect(&options.host).await?;
    let found = engine.numbers(&options.name).await.map_err(|e| format!("{}: {e}", options.host))?;
    let (first, surplus) = at_first(&found, options.daemons, options.most);
    let scales = options.most.is_some();
    let site = supervise::Site::new(engine, options);
    for index in surplus {
        site.say(index, "removed: the pool is smaller now");
        if let Err(fault) = site.discard(index).await {
            return Err(format!("{}: {fault}", site.name(index)));
        }
    }
    let first = first.into_iter().map(|index| (index, index)).collect();
    Ok(crew::run(site, first, scales, Vec::new()))
}

/// Which daemons there are at first, and which of those that are there are too many. A fixed pool has the first so
/// many. One that scales takes back all that are there; the autoscaler takes away what is not needed.
fn at_first(found: &BTreeSet<usize>, daemons: usize, most: Option<usize>) -> (Vec<usize>, Vec<usize>) {
    if most.is_none() {
        return ((0..daemons).collect(), found.iter().filter(|index| **index >= daemons).copied().collect());
    }
    let mut first = found.clone();
    let missing: Vec<usize> =
        (0..).filter(|i| !found.contains(i)).take(daemons.saturating_sub(found.len())).collect();
    first.extend(missing);
    (first.into_iter().collect(), Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_never_its_own_engine() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, link) = (dir.path().join("s"), dir.path().join("l"));
        let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        let listeners = [format!("unix://{}", socket.display()), "tcp://0.0.0.0:2375".into()];
        let own = |host: &str| own_listener(host, &listeners).is_some();
        assert!(own(&format!("unix://{}", link.display())), "the same socket by another name");
        assert!(own("tcp://127.0.0.1:2375") && own("tcp://localhost:2375/"));
        assert!(!own("tcp://127.0.0.1:2376") && !own("tcp://192.0.2.1:2375") && !own(DEFAULT_HOST));
        let loopback = ["tcp://127.0.0.1:2375".to_string()];
        assert!(own_listener("tcp://127.0.0.1:2375", &loopback).is_some());
        assert!(own_listener("tcp://127.0.0.2:2375", &loopback).is_none());
        assert_eq!(own_listener("unix:///gone", &["unix:///gone".to_string()]), Some("unix:///gone"));
    }

    #[test]
    fn what_is_there_comes_back_and_a_smaller_fixed_pool_gives_it_up() {
        let found = BTreeSet::from([1, 4]);
        assert_eq!(at_first(&found, 2, None), (vec![0, 1], vec![4]));
        assert_eq!(at_first(&found, 0, Some(3)), (vec![1, 4], vec![]));
        assert_eq!(at_first(&found, 3, Some(3)), (vec![0, 1, 4], vec![]));
        assert_eq!(at_first(&BTreeSet::new(), 0, Some(3)), (vec![], vec![]));
    }
}
