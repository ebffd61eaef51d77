//! Local `dockerd` processes: a pool on one machine, which may run a Docker of its own.
//!
//! Several dockerd on a machine step on each other, so each gets
//!
//! | what | why |
//! |---|---|
//! | a data root, exec root, pidfile, socket and configuration of its own | the obvious ones |
//! | a network namespace | each dockerd flushes the iptables chain DOCKER at its start, and claims `docker0` |
//! | a mount namespace ([`namespace`]) | `/etc/docker/key.json`, `/run/containerd`, `/run/docker` are at fixed places |
//! | a PID namespace ([`launch`]) | its end takes every process with it, however deep that has daemonised |
//! | a containerd of its own | the machine's would mix all containers in its namespace `moby`, and outlive us |
//! | the containerd and runc beside its binary | versions mix |
//! | a cgroup parent | what a killed daemon leaves is found and removed |
//!
//! What a daemon needs from the machine is in the machine's namespaces: one cable and three iptables rules
//! ([`network`]). They and every process can be found again from files ([`state`]), so that a dindpool that
//! was killed costs nothing: the next one on the same data adopts its daemons, or removes them.

mod address;
mod cleanup;
pub mod launch;
mod log;
mod namespace;
mod network;
mod plan;
mod prepare;
mod state;
mod supervise;

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;

use super::{Running, crew};
use prepare::Prepared;

pub(super) use log::telling_line;

/// The hidden subcommand: `dindpool __exec-daemon FILE`.
pub const EXEC_DAEMON: &str = "__exec-daemon";

/// What to run, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many daemons; at least so many at first, in a pool that scales.
    pub daemons: usize,
    /// The pool takes changes of the number of daemons: so many at most are started at first, where an earlier pool has
    /// left data of more. `None`: the number stays.
    pub most: Option<usize>,
    /// The binaries: daemon i runs the i-th modulo their number, so that a pool may mix versions. Each uses
    /// the containerd and runc beside it, if there are any. A bare name is looked up in PATH.
    pub dockerd: Vec<PathBuf>,
    /// Where the daemons keep images, volumes, identities and logs. Made absolute if it is not.
    pub data: PathBuf,
    /// Whether `data` is temporary: it is removed at the end, and the daemons do not outlive their owner.
    pub remove_data: bool,
    /// Sockets and other state that does not outlive a boot; also the register in which the dindpools of this
    /// machine find each other's leftovers.
    pub run_dir: PathBuf,
    /// Further arguments of every dockerd (`--registry-mirror=…`).
    pub extra_args: Vec<String>,
    /// A daemon that does not answer for this long after its start is killed and started again.
    pub ready_deadline: Duration,
    /// How long dockerd may take to stop its containers and itself before it is killed.
    pub stop_grace: Duration,
    /// The `dindpool` binary, for its hidden subcommand [`EXEC_DAEMON`]: `/proc/self/exe` in that binary, which
    /// is still ours when a package manager has replaced the file.
    pub self_exe: PathBuf,
    /// The network and prefix length from which each daemon gets a /30. `None` chooses one that nothing on
    /// this machine uses, 10.231.0.0/16 first.
    pub network: Option<(Ipv4Addr, u8)>,
    /// Lines for a person who waits (`dind-0: dockerd 28.5.2 is ready after 2.1 s`).
    pub progress: Option<mpsc::UnboundedSender<String>>,
}

impl Options {
    /// Two daemons of the `dockerd` in PATH, with their data in `data`.
    pub fn new(data: impl AsRef<Path>) -> Options {
        Options {
            daemons: 2,
            most: None,
            dockerd: vec![PathBuf::from("dockerd")],
            data: data.as_ref().to_path_buf(),
            remove_data: false,
            run_dir: PathBuf::from("/run/dindpool"),
            extra_args: Vec::new(),
            ready_deadline: Duration::from_secs(60),
            stop_grace: Duration::from_secs(20),
            self_exe: PathBuf::from("/proc/self/exe"),
            network: None,
            progress: None,
        }
    }
}

/// Everything that keeps a local pool from starting, each with its remedy; found before anything is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults(pub Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Faults {}

/// Starts the daemons, or adopts those that a dindpool which was killed left running on the same data.
///
/// Returns as soon as nothing speaks against it; the observations tell when each daemon answers. Must be
/// called inside a tokio runtime.
///
/// # Errors
/// All faults at once.
pub async fn start(options: Options) -> Result<Running, Faults> {
    let Prepared { site, first, problems } = prepare::prepare(options).await?;
    let scales = site.scales;
    Ok(crew::run(site, first, scales, problems))
}

/// Whether all of these dockerd binaries are installed here.
pub fn is_installed(dockerd: &[PathBuf]) -> bool {
    dockerd.iter().all(|wanted| network::find(wanted, &network::search_path(None)).is_some())
}

/// Whether `GET /_ping` is answered by 200 on this connection. The caller sets the deadline.
pub(super) async fn ping(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<bool> {
    stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: dindpool\r\nConnection: close\r\n\r\n").await?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).await?;
    Ok(head.starts_with(b"HTTP/1.") && head.ends_with(b" 200"))
}
