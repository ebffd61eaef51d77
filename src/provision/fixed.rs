//! A fixed list of daemons: addresses that somebody else keeps running.
//!
//! A DNS name is asked for again every few seconds, and each address behind it is a daemon of its own: that is
//! how a headless Service, or a round-robin name, lists its members. A name that cannot be resolved for a
//! moment changes nothing (the last known addresses go on serving) and is reported; losing DNS must not lose
//! the pool. One daemon that is reached by two *different* addresses is found later, by its identity.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::{DaemonSpec, Endpoint, Observation, Running};
use crate::tls::Client;

/// Docker's port for plain TCP.
pub const DEFAULT_PORT: u16 = 2375;
/// Docker's port for TLS.
const TLS_PORT: u16 = 2376;

/// Where somebody said that a daemon listens; a name may stand for several.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum FixedAddress {
    /// An IP address and port: one daemon.
    Ip(SocketAddr),
    /// A DNS name and port: as many daemons as it has addresses.
    Name {
        /// The host name, in lower case.
        host: String,
        /// The port of each of them.
        port: u16,
    },
    /// A Unix socket: one daemon.
    Unix(PathBuf),
    /// A host and port with TLS: as many daemons as it has addresses.
    Tls {
        /// A name, in lower case, or an address.
        host: String,
        /// The port of each of them.
        port: u16,
    },
}

impl FixedAddress {
    /// The name that is to be resolved.
    fn name(&self) -> Option<(&str, u16)> {
        match self {
            FixedAddress::Name { host, port } => Some((host, *port)),
            FixedAddress::Tls { host, port } if host.parse::<IpAddr>().is_err() => Some((host, *port)),
            _ => None,
        }
    }
}

/// Understands `tcp://host[:port]` (port 2375 when it is missing), `tcp+tls://host[:port]` and `https://host[:port]` (2376),
/// and `unix:///path`.
///
/// # Errors
/// A sentence that says what is wrong and what was expected.
pub fn parse(text: &str) -> Result<FixedAddress, String> {
    let expected = "expected tcp://host:port, tcp+tls://host:port or unix:///path";
    for scheme in ["tcp+tls://", "https://"] {
        if let Some(rest) = text.strip_prefix(scheme) {
            let bracketed = rest.rfind(']').map_or(rest, |end| &rest[end..]);
            let port = if bracketed.contains(':') { String::new() } else { format!(":{TLS_PORT}") };
            let plain = format!("tcp://{}{port}", rest.trim_end_matches('/'));
            let (host, port) = match parse(&plain).map_err(|fault| fault.replace(&plain, text))? {
                FixedAddress::Ip(address) => (address.ip().to_string(), address.port()),
                FixedAddress::Name { host, port } => (host, port),
                FixedAddress::Unix(_) | FixedAddress::Tls { .. } => {
                    return Err(format!("`{text}`: {expected}"));
                }
            };
            return Ok(FixedAddress::Tls { host, port });
        }
    }
    if let Some(path) = text.strip_prefix("unix://") {
        if !path.starts_with('/') {
            return Err(format!("`{text}`: the path of a Unix socket must be absolute (unix:///path)"));
        }
        if path.len() > super::MAX_SOCKET_PATH {
            return Err(format!(
                "`{text}`: a socket path may have {} bytes at most, this one has {}",
                super::MAX_SOCKET_PATH,
                path.len()
            ));
        }
        return Ok(FixedAddress::Unix(PathBuf::from(path)));
    }
    let Some(authority) = text.strip_prefix("tcp://") else {
        return Err(match text.split_once("://") {
            Some((scheme, _)) => format!("`{text}`: unknown scheme `{scheme}`; {expected}"),
            None => format!("`{text}`: no scheme; {expected}"),
        });
    };
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    if authority.contains(['/', '?', '#', '@']) {
        return Err(format!("`{text}`: only a host and a port may follow tcp://"));
    }
    let (host, port) = split_host_port(authority).map_err(|fault| format!("`{text}`: {fault}"))?;
    let literal = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = literal.parse::<IpAddr>() {
        return Ok(FixedAddress::Ip(SocketAddr::new(ip, port)));
    }
    let plausible = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if host.is_empty() || host.len() > 253 || !host.chars().all(plausible) {
        return Err(format!("`{text}`: `{host}` is neither an IP address nor a host name; {expected}"));
    }
    Ok(FixedAddress::Name { host: host.to_ascii_lowercase(), port })
}

fn split_host_port(authority: &str) -> Result<(&str, u16), String> {
    let bare_ipv6 = authority.matches(':').count() > 1 && !authority.starts_with('[');
    if bare_ipv6 {
        return Err(format!("an IPv6 address needs brackets: tcp://[{authority}]:{DEFAULT_PORT}"));
    }
    let after_host = authority.rfind(']').map_or(0, |bracket| bracket + 1);
    match authority[after_host..].find(':') {
        None => Ok((authority, DEFAULT_PORT)),
        Some(colon) => {
            let port = &authority[after_host + colon + 1..];
            match port.parse::<u16>() {
                Ok(number) if number > 0 => Ok((&authority[..after_host + colon], number)),
                _ => Err(format!("`{port}` is not a port (1 to 65535)")),
            }
        }
    }
}

/// How the list is kept up to date.
#[derive(Debug, Clone)]
pub struct Options {
    /// How often names are resolved again.
    pub refresh: Duration,
    /// How long one resolution may take before it counts as failed.
    pub resolve_deadline: Duration,
    /// Makes the connections to those with TLS.
    pub tls: Option<Arc<Client>>,
}

impl Default for Options {
    fn default() -> Self {
        Options { refresh: Duration::from_secs(5), resolve_deadline: Duration::from_secs(5), tls: None }
    }
}

/// Starts watching `addresses`, whose list may change, resolving names through the system's resolver.
///
/// Must be called inside a tokio runtime.
pub fn start(addresses: watch::Receiver<Vec<FixedAddress>>, options: Options) -> Running {
    start_with(addresses, options, |host, port| async move {
        Ok(tokio::net::lookup_host((host.as_str(), port)).await?.collect())
    })
}

/// [`start`] with a resolver of the caller's.
pub fn start_with<R, F>(
    addresses: watch::Receiver<Vec<FixedAddress>>,
    options: Options,
    resolve: R,
) -> Running
where
    R: Fn(String, u16) -> F + Send + 'static,
    F: Future<Output = io::Result<Vec<SocketAddr>>> + Send,
{
    let (tx, observations) = mpsc::channel(1);
    let (stop, stop_rx) = oneshot::channel();
    let stopped = tokio::spawn(async move {
        tokio::select! {
            _ = stop_rx => {}
            () = follow(addresses, options, resolve, tx) => {}
        }
    });
    Running { observations, stopped, stop, changes: None, notes: None }
}

/// Resolves, tells what changed, waits; until nobody listens.
async fn follow<R, F>(
    mut list: watch::Receiver<Vec<FixedAddress>>,
    options: Options,
    resolve: R,
    tx: mpsc::Sender<Observation>,
) where
    R: Fn(String, u16) -> F,
    F: Future<Output = io::Result<Vec<SocketAddr>>>,
{
    let mut known: BTreeMap<(String, u16), Vec<SocketAddr>> = BTreeMap::new();
    let mut told: Option<Observation> = None;
    loop {
        let addresses = list.borrow_and_update().clone();
        let has_names = addresses.iter().any(|address| address.name().is_some());
        let mut problems = Vec::new();
        for address in &addresses {
            let Some((host, port)) = address.name() else { continue };
            let answer =
                tokio::time::timeout(options.resolve_deadline, resolve(host.to_string(), port)).await;
            let fault = match answer {
                Ok(Ok(found)) if !found.is_empty() => {
                    known.insert((host.to_string(), port), found);
                    continue;
                }
                Ok(Ok(_)) => "it has no address".to_string(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {:?}", options.resolve_deadline),
            };
            let kept = known.get(&(host.to_string(), port)).map_or(0, Vec::len);
            let kept = if kept > 0 { format!("; {kept} known before go on serving") } else { String::new() };
            let problem = format!("cannot resolve {host}: {fault}{kept}");
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
        let daemons = daemons(&addresses, &known, options.tls.as_ref());
        let observation = Observation { daemons, problems, ..Observation::default() };
        if told.as_ref() != Some(&observation) {
            if tx.send(observation.clone()).await.is_err() {
                return;
            }
            told = Some(observation);
        }
        let changed = async {
            if list.changed().await.is_err() {
                std::future::pending::<()>().await; // Nobody changes it any more.
            }
        };
        tokio::select! {
            () = tokio::time::sleep(options.refresh), if has_names => {}
            () = changed => {}
            () = tx.closed() => return,
        }
    }
}

/// The daemons behind the addresses, each once, in the order of the list; the addresses of a name are sorted,
/// because DNS rotates them and a rotation is not a change.
fn daemons(
    addresses: &[FixedAddress],
    known: &BTreeMap<(String, u16), Vec<SocketAddr>>,
    tls: Option<&Arc<Client>>,
) -> Vec<DaemonSpec> {
    let mut specs: Vec<DaemonSpec> = Vec::new();
    let mut add = |endpoint: Endpoint| {
        if !specs.iter().any(|spec| spec.endpoint.as_ref() == Some(&endpoint)) {
            specs.push(spec(endpoint));
        }
    };
    for address in addresses {
        match address {
            FixedAddress::Ip(addr) => add(Endpoint::Tcp(canonical(*addr))),
            FixedAddress::Unix(path) => add(Endpoint::Unix(path.clone())),
            FixedAddress::Tls { host, port } => {
                let literal = host.parse::<IpAddr>().ok().map(|ip| vec![SocketAddr::new(ip, *port)]);
                let found =
                    literal.or_else(|| known.get(&(host.clone(), *port)).cloned()).unwrap_or_default();
                let mut found: Vec<SocketAddr> = found.iter().map(|addr| canonical(*addr)).collect();
                found.sort();
                // The configuration has been held against both.
                let Some((client, name)) = tls.and_then(|tls| Some((tls, tls.expects(host).ok()?))) else {
                    continue;
                };
                for address in found {
                    add(Endpoint::Tls { address, name: name.clone(), client: client.clone() });
                }
            }
            FixedAddress::Name { host, port } => {
                let found = known.get(&(host.clone(), *port)).map(Vec::as_slice).unwrap_or_default();
                let mut found: Vec<SocketAddr> = found.iter().map(|addr| canonical(*addr)).collect();
                found.sort();
                found.into_iter().for_each(|addr| add(Endpoint::Tcp(addr)));
            }
        }
    }
    shorten_socket_ids(&mut specs);
    specs
}

/// An IPv4 address written as IPv6 (`::ffff:10.0.0.3`) is the same daemon; so is one with another scope's
/// flow label.
fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => SocketAddr::new(ip.to_canonical(), addr.port()),
        _ => addr,
    }
}

fn spec(endpoint: Endpoint) -> DaemonSpec {
    let (id, source_ips) = match &endpoint {
        // On loopback every client of the machine has that address: it tells nothing.
        Endpoint::Tcp(addr) | Endpoint::Tls { address: addr, .. } if addr.ip().is_loopback() => {
            (addr.to_string(), Vec::new())
        }
        Endpoint::Tcp(addr) | Endpoint::Tls { address: addr, .. } => (addr.to_string(), vec![addr.ip()]),
        Endpoint::Unix(path) => (path.display().to_string(), Vec::new()),
    };
    DaemonSpec {
        id,
        endpoint: Some(endpoint),
        source_ips,
        cgroup: None,
        draining: false,
        pending: None,
        faulty: false,
        removal: Default::default(),
        slots: None,
    }
}

/// A socket's id is its path; when its last two components tell it from all others, they are enough.
fn shorten_socket_ids(specs: &mut [DaemonSpec]) {
    let short = |spec: &DaemonSpec| match &spec.endpoint {
        Some(Endpoint::Unix(path)) => {
            let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
            (parts.len() > 3).then(|| parts[parts.len() - 2..].join("/"))
        }
        _ => None,
    };
    let shorts: Vec<Option<String>> = specs.iter().map(short).collect();
    for (index, spec) in specs.iter_mut().enumerate() {
        let unique = shorts.iter().filter(|other| **other == shorts[index]).count() == 1;
        if let (Some(short), true) = (&shorts[index], unique) {
            spec.id.clone_from(short);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A list that does not change.
    fn given(list: Vec<FixedAddress>) -> watch::Receiver<Vec<FixedAddress>> {
        watch::channel(list).1
    }

    #[tokio::test]
    async fn a_list_that_changes_is_told_at_once() {
        let (list, addresses) = watch::channel(vec![parse("tcp://10.0.0.3").unwrap()]);
        let mut running = start(addresses, Options::default());
        assert_eq!(ids(&running.observations.recv().await.unwrap()), ["10.0.0.3:2375"]);
        list.send(vec![parse("unix:///run/a.sock").unwrap(), parse("tcp://10.0.0.3").unwrap()]).unwrap();
        assert_eq!(ids(&running.observations.recv().await.unwrap()), ["/run/a.sock", "10.0.0.3:2375"]);
        drop(list);
        drop(running.observations);
        running.stopped.await.unwrap();
    }

    fn ids(observation: &Observation) -> Vec<&str> {
        observation.daemons.iter().map(|daemon| daemon.id.as_str()).collect()
    }

    fn name(host: &str, port: u16) -> FixedAddress {
        FixedAddress::Name { host: host.into(), port }
    }

    #[test]
    fn addresses_are_understood() {
        let ip = |text: &str| FixedAddress::Ip(text.parse().unwrap());
        assert_eq!(parse("tcp://10.0.0.3:2376"), Ok(ip("10.0.0.3:2376")));
        assert_eq!(parse("tcp://10.0.0.3"), Ok(ip("10.0.0.3:2375")));
        assert_eq!(parse("tcp://10.0.0.3/"), Ok(ip("10.0.0.3:2375")));
        assert_eq!(parse("tcp://[fd00::1]:99"), Ok(ip("[fd00::1]:99")));
        assert_eq!(parse("tcp://[fd00::1]"), Ok(ip("[fd00::1]:2375")));
        assert_eq!(parse("tcp://Dind.CI:99"), Ok(name("dind.ci", 99)));
        let tls = |host: &str, port| FixedAddress::Tls { host: host.into(), port };
        assert_eq!(parse("tcp+tls://Dind.CI"), Ok(tls("dind.ci", 2376)));
        assert_eq!(parse("https://10.0.0.3:99/"), Ok(tls("10.0.0.3", 99)));
        assert_eq!(parse("tcp+tls://[fd00::1]"), Ok(tls("fd00::1", 2376)));
        assert!(parse("https://a/b").unwrap_err().contains("`https://a/b`"));
        assert_eq!(parse("unix:///run/docker.sock"), Ok(FixedAddress::Unix("/run/docker.sock".into())));
    }

    #[test]
    fn a_wrong_address_says_what_is_wrong() {
        let long = format!("unix:///{}", "x".repeat(107));
        for (text, word) in [
            ("10.0.0.3:2375", "no scheme"),
            ("http://x", "unknown scheme `http`"),
            ("unix://docker.sock", "absolute"),
            (long.as_str(), "107 bytes at most, this one has 108"),
            ("tcp://", "neither an IP address nor a host name"),
            ("tcp://:2375", "neither"),
            ("tcp://a b", "neither"),
            ("tcp://host:0", "`0` is not a port"),
            ("tcp://host:70000", "`70000` is not a port"),
            ("tcp://host:", "`` is not a port"),
            ("tcp://fd00::1", "needs brackets"),
            ("tcp://host/prefix", "only a host and a port"),
        ] {
            let fault = parse(text).unwrap_err();
            assert!(fault.contains(word), "{text}: {fault}");
            assert!(fault.contains(text), "names the address: {fault}");
        }
    }

    #[tokio::test]
    async fn a_list_without_names_is_told_once_and_asks_no_resolver() {
        let list = ["tcp://10.0.0.3", "unix:///run/a.sock", "tcp://127.0.0.1:1", "tcp://10.0.0.3:2375"];
        let list = given(list.iter().map(|text| parse(text).unwrap()).collect());
        let mut running =
            start_with(list, Options::default(), |_, _| async { panic!("the resolver was asked") });
        let seen = running.observations.recv().await.unwrap();
        assert_eq!(ids(&seen), ["10.0.0.3:2375", "/run/a.sock", "127.0.0.1:1"], "merged, in order");
        assert_eq!(seen.daemons[0].source_ips, ["10.0.0.3".parse::<IpAddr>().unwrap()]);
        assert!(seen.daemons[1].source_ips.is_empty());
        assert!(seen.daemons[2].source_ips.is_empty(), "loopback tells nothing");
        running.stop.send(()).unwrap();
        running.stopped.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn each_address_of_a_name_is_a_daemon_and_a_rotation_is_no_change() {
        let answers =
            [vec!["10.0.0.2:7", "10.0.0.1:7"], vec!["10.0.0.1:7", "10.0.0.2:7"], vec!["10.0.0.2:7"]];
        let turn = Arc::new(Mutex::new(0));
        let mut running =
            start_with(given(vec![name("dind.ci", 7)]), Options::default(), move |host, port| {
                assert_eq!((host.as_str(), port), ("dind.ci", 7));
                let mut turn = turn.lock().unwrap();
                let answer = answers[(*turn).min(2)].iter().map(|text| text.parse().unwrap()).collect();
                *turn += 1;
                async move { Ok(answer) }
            });
        let seen = running.observations.recv().await.unwrap();
        assert_eq!(ids(&seen), ["10.0.0.1:7", "10.0.0.2:7"]);
        let seen = running.observations.recv().await.unwrap();
        assert_eq!(ids(&seen), ["10.0.0.2:7"], "the rotated answer in between was not told");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_resolution_keeps_what_was_known_and_is_reported() {
        let turn = Arc::new(Mutex::new(0));
        let mut running = start_with(given(vec![name("dind.ci", 7)]), Options::default(), move |_, _| {
            *turn.lock().unwrap() += 1;
            let turn = *turn.lock().unwrap();
            async move {
                match turn {
                    1 => Err(io::Error::other("server failure")),
                    3 => std::future::pending().await,
                    4 => Ok(Vec::new()),
                    _ => Ok(vec!["10.0.0.1:7".parse().unwrap()]),
                }
            }
        });
        let seen = running.observations.recv().await.unwrap();
        assert_eq!(seen.problems, ["cannot resolve dind.ci: server failure"]);
        assert!(seen.daemons.is_empty());
        let seen = running.observations.recv().await.unwrap();
        assert_eq!((ids(&seen), seen.problems.len()), (vec!["10.0.0.1:7"], 0));
        let seen = running.observations.recv().await.unwrap();
        assert_eq!(ids(&seen), ["10.0.0.1:7"]);
        assert_eq!(
            seen.problems,
            ["cannot resolve dind.ci: no answer within 5s; 1 known before go on serving"]
        );
        let seen = running.observations.recv().await.unwrap();
        assert_eq!(ids(&seen), ["10.0.0.1:7"]);
        assert!(seen.problems[0].contains("it has no address"));
    }

    #[tokio::test]
    async fn it_ends_when_nobody_listens() {
        let Running { observations, stopped, stop: _stop, .. } =
            start_with(given(vec![name("dind.ci", 7)]), Options::default(), |_, _| async { Ok(Vec::new()) });
        drop(observations);
        stopped.await.unwrap();
    }

    #[test]
    fn deep_socket_paths_get_short_ids_where_these_are_unique() {
        let unix = |path: &str| FixedAddress::Unix(path.into());
        let list = [unix("/srv/p/a/docker.sock"), unix("/srv/p/b/docker.sock"), unix("/srv/q/b/docker.sock")];
        let specs = daemons(&list, &BTreeMap::new(), None);
        let ids: Vec<_> = specs.iter().map(|spec| spec.id.as_str()).collect();
        assert_eq!(ids, ["a/docker.sock", "/srv/p/b/docker.sock", "/srv/q/b/docker.sock"]);
    }

    #[test]
    fn an_ipv4_address_written_as_ipv6_is_the_same_daemon() {
        let list = [parse("tcp://[::ffff:10.0.0.1]:7").unwrap(), parse("tcp://10.0.0.1:7").unwrap()];
        assert_eq!(daemons(&list, &BTreeMap::new(), None).len(), 1);
    }
}
