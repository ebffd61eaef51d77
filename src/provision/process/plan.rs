//! What a daemon will be, decided before anything is touched: names, addresses, paths and arguments. Pure.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::address::Subnet;

/// The cable between the machine and a daemon's network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Link {
    /// The machine's end; the daemon's is called eth0.
    pub veth: String,
    /// Its four addresses.
    pub subnet: Subnet,
    /// That of the machine's own way out: a larger one would lose packets there.
    pub mtu: u32,
}

impl Link {
    /// The machine's address on it: the daemon's gateway.
    pub fn host(&self) -> Ipv4Addr {
        self.subnet.address(1)
    }

    /// The daemon's address on it: where connections of its containers come from.
    pub fn inner(&self) -> Ipv4Addr {
        self.subnet.address(2)
    }
}

/// The name of the machine's end of daemon `index`'s cable: unique on the machine, within IFNAMSIZ.
pub(super) fn veth(pool: &str, index: usize) -> String {
    format!("dp{pool}-{index}")
}

/// Everything that the hidden subcommand needs to know about one daemon. It is also the record by which a
/// later dindpool decides whether a daemon that still runs is the one it wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Launch {
    /// The pool's id.
    pub pool: String,
    /// The daemon's (`dind-0`).
    pub id: String,
    /// The binary.
    pub dockerd: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its directory for what survives.
    pub data: PathBuf,
    /// Its directory for what does not.
    pub run: PathBuf,
    /// Its cable.
    pub link: Link,
    /// What replaces /etc/resolv.conf, where that names resolvers on loopback only.
    pub resolv: Option<PathBuf>,
    /// Whether it ends when the dindpool that started it does.
    pub die_with_owner: bool,
    /// How long it may take to stop.
    pub stop_grace: Duration,
}

impl Launch {
    /// Whether a daemon started as `self` is the one that `wanted` describes. How long it may take to stop is
    /// no reason to end what runs on it.
    pub fn same_daemon(&self, wanted: &Launch) -> bool {
        Launch { stop_grace: wanted.stop_grace, ..self.clone() } == *wanted
    }

    /// Where the API listens.
    pub fn socket(&self) -> PathBuf {
        self.run.join("docker.sock")
    }

    /// Where everything the daemon and its containers say about themselves goes.
    pub fn log(&self) -> PathBuf {
        self.data.join("dockerd.log")
    }
}

/// The cgroup above those of a daemon's containers, without a leading slash.
pub(super) fn cgroup(pool: &str, daemon: &str) -> String {
    format!("dindpool/{pool}/{daemon}")
}

/// Flags by which an extra argument would undo what keeps the daemons apart.
const OURS: [&str; 13] = [
    "--data-root",
    "--graph",
    "-g",
    "--exec-root",
    "--pidfile",
    "-p",
    "--host",
    "-H",
    "--cgroup-parent",
    "--containerd",
    "--config-file",
    "--bridge",
    "-b",
];

/// The extra arguments that dindpool sets itself.
pub(super) fn forbidden(extra: &[String]) -> Vec<&str> {
    let flag = |arg: &'_ str| arg.split('=').next().unwrap_or_default().to_string();
    extra.iter().map(String::as_str).filter(|arg| OURS.contains(&flag(arg).as_str())).collect()
}

/// What decides a daemon's arguments, beside its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Features {
    /// Major and minor version of dockerd.
    pub version: (u32, u32),
    /// Whether docker-proxy is found: without it dockerd ≥ 28 refuses to start, unless told to do without.
    pub docker_proxy: bool,
    /// The MTU of the cable.
    pub mtu: u32,
}

/// dockerd's arguments. The exec root is the default one, which is private to the daemon in its mount
/// namespace: so the sockets of managed plugins, which contain a 64-digit id, stay below 108 bytes.
pub(super) fn arguments(
    pool: &str,
    id: &str,
    data: &Path,
    run: &Path,
    features: Features,
    extra: &[String],
) -> Vec<String> {
    let show = |path: PathBuf| path.display().to_string();
    let mut args = vec![
        format!("--data-root={}", show(data.join("root"))),
        "--exec-root=/run/docker".to_string(),
        format!("--pidfile={}", show(run.join("docker.pid"))),
        format!("--config-file={}", show(run.join("daemon.json"))),
        format!("--host=unix://{}", show(run.join("docker.sock"))),
        format!("--cgroup-parent=/{}", cgroup(pool, id)),
        // systemd would be told process ids of the daemon's PID namespace, which mean others outside.
        "--exec-opt=native.cgroupdriver=cgroupfs".to_string(),
    ];
    if !features.docker_proxy {
        args.push("--userland-proxy=false".to_string());
    }
    if features.mtu < 1500 {
        args.push(format!("--mtu={}", features.mtu));
        if features.version >= (24, 0) {
            // --mtu is for docker0 only; compose makes networks of its own.
            let option = format!("bridge=com.docker.network.driver.mtu={}", features.mtu);
            args.push(format!("--default-network-opt={option}"));
        }
    }
    args.extend(extra.iter().cloned());
    args
}

/// Understands `Docker version 28.5.2+dfsg1, build …`: the version to show, and major and minor.
pub(super) fn version(output: &str) -> Option<(String, (u32, u32))> {
    let word = output.split("version ").nth(1)?.split([',', ' ', '\n']).next()?;
    let shown = word.split('+').next()?;
    let mut numbers = shown.split('.').map(|part| part.parse::<u32>());
    let pair = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((shown.to_string(), pair))
}

/// What to do about names inside a network namespace of its own, where the machine's loopback is out of reach.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Resolver {
    /// The machine's file names a resolver that can be reached.
    AsIs,
    /// It names systemd-resolved's stub: this file names the real ones.
    Systemd,
    /// It names loopback only, and nobody tells what is behind.
    LoopbackOnly,
}

/// Judges the text of /etc/resolv.conf.
pub(super) fn resolver(conf: &str, systemd_upstream: bool) -> Resolver {
    let servers = nameservers(conf);
    if servers.iter().any(|server| !is_loopback(server)) {
        Resolver::AsIs
    } else if systemd_upstream {
        Resolver::Systemd
    } else if servers.is_empty() {
        Resolver::AsIs
    } else {
        Resolver::LoopbackOnly
    }
}

/// The servers that a resolv.conf names.
pub(super) fn nameservers(conf: &str) -> Vec<&str> {
    conf.lines().filter_map(|line| line.trim().strip_prefix("nameserver")).map(str::trim).collect()
}

fn is_loopback(server: &str) -> bool {
    let bare = server.split('%').next().unwrap_or_default();
    bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cable_has_a_gateway_and_a_daemon() {
        let link =
            Link { veth: veth("0a1b2c3d", 9999), subnet: Subnet::parse("10.231.7.4/30").unwrap(), mtu: 1500 };
        assert_eq!(link.host(), Ipv4Addr::new(10, 231, 7, 5));
        assert_eq!(link.inner(), Ipv4Addr::new(10, 231, 7, 6));
        assert!(link.veth.len() <= 15, "IFNAMSIZ");
    }

    fn render(version: (u32, u32), docker_proxy: bool, mtu: u32) -> Vec<String> {
        let features = Features { version, docker_proxy, mtu };
        let extra = ["--debug".to_string()];
        arguments("0a1b2c3d", "dind-1", Path::new("/d/dind-1"), Path::new("/r/dind-1"), features, &extra)
    }

    #[test]
    fn arguments_by_version_and_machine() {
        let plain = render((28, 5), true, 1500);
        for wanted in [
            "--data-root=/d/dind-1/root",
            "--host=unix:///r/dind-1/docker.sock",
            "--cgroup-parent=/dindpool/0a1b2c3d/dind-1",
        ] {
            assert!(plain.iter().any(|arg| arg == wanted), "{plain:?}");
        }
        assert_eq!(plain.last().unwrap(), "--debug", "the user's come last, so that they win");
        assert!(!plain.iter().any(|arg| arg.contains("mtu") || arg.contains("userland")));
        assert!(render((28, 5), false, 1500).contains(&"--userland-proxy=false".to_string()));
        let narrow =
            |version| render(version, true, 1450).iter().filter(|arg| arg.contains("mtu=1450")).count();
        assert_eq!((narrow((20, 10)), narrow((28, 5))), (1, 2), "20.10 has no --default-network-opt");
    }

    #[test]
    fn arguments_that_would_undo_the_isolation_are_named() {
        let extra = ["--debug", "--data-root=/x", "-H", "--hosts-are-fine", "--containerd=/run/c.sock"];
        let extra: Vec<String> = extra.iter().map(ToString::to_string).collect();
        assert_eq!(forbidden(&extra), ["--data-root=/x", "-H", "--containerd=/run/c.sock"]);
    }

    #[test]
    fn versions_are_understood() {
        let debian = "Docker version 20.10.24+dfsg1, build 5d6db84\n";
        assert_eq!(version(debian), Some(("20.10.24".into(), (20, 10))));
        assert_eq!(version("Docker version 29.9.3, build x"), Some(("29.9.3".into(), (29, 9))));
        assert_eq!(version("something else"), None);
    }

    #[test]
    fn a_stub_resolver_is_replaced_by_the_real_ones() {
        let stub = "# stub\nnameserver 127.0.0.53\noptions edns0\n";
        assert_eq!(resolver(stub, true), Resolver::Systemd);
        assert_eq!(resolver(stub, false), Resolver::LoopbackOnly);
        assert_eq!(resolver("nameserver ::1\nnameserver 10.0.0.1\n", true), Resolver::AsIs);
        assert_eq!(resolver("search ci\n", false), Resolver::AsIs);
    }

    #[test]
    fn a_longer_grace_is_the_same_daemon_and_another_binary_is_not() {
        let launch = Launch {
            pool: "0a1b2c3d".into(),
            id: "dind-0".into(),
            dockerd: "/usr/bin/dockerd".into(),
            args: vec!["--debug".into()],
            data: "/d".into(),
            run: "/r".into(),
            link: Link {
                veth: "dp0a1b2c3d-0".into(),
                subnet: Subnet::parse("10.231.0.0/30").unwrap(),
                mtu: 1500,
            },
            resolv: None,
            die_with_owner: false,
            stop_grace: Duration::from_secs(20),
        };
        assert!(launch.same_daemon(&Launch { stop_grace: Duration::ZERO, ..launch.clone() }));
        assert!(!launch.same_daemon(&Launch { dockerd: "/opt/dockerd".into(), ..launch.clone() }));
        assert!(!launch.same_daemon(&Launch { args: Vec::new(), ..launch.clone() }));
        let text = serde_json::to_string(&launch).unwrap();
        assert_eq!(serde_json::from_str::<Launch>(&text).unwrap(), launch, "survives its file");
    }
}
