//! Where daemons come from. A provisioner says which daemons exist; it never says whether they are well.
//!
//! The contract is level-triggered: each [`Observation`] is the whole pool as the provisioner knows it, so a
//! missed message heals with the next one, and a provisioner that cannot see (DNS down, API server down)
//! simply says nothing and the last known pool goes on serving.

mod crew;
pub mod docker;
pub mod fixed;
pub mod kubernetes;
pub mod process;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::engine::autoscaler::{Removal, Step};
use crate::engine::model::DaemonId;
use crate::tls::{Client, TlsStream};

/// The longest path of a Unix socket (`sun_path` has 108 bytes, the last of them 0).
pub const MAX_SOCKET_PATH: usize = 107;

/// Where a daemon listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Plain TCP.
    Tcp(SocketAddr),
    /// A Unix socket on this machine.
    Unix(PathBuf),
    /// TLS over TCP.
    Tls {
        /// Where.
        address: SocketAddr,
        /// Whose certificate it must show.
        name: ServerName<'static>,
        /// Makes the connection.
        client: Arc<Client>,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(addr) => write!(f, "tcp://{addr}"),
            Endpoint::Unix(path) => write!(f, "unix://{}", path.display()),
            Endpoint::Tls { address, .. } => write!(f, "tcp+tls://{address}"),
        }
    }
}

/// One daemon as its provisioner knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSpec {
    /// Stable name of this daemon, unique in the pool, short enough for a table and a metric label
    /// (`dind-0`, a pod's name, `10.0.0.3:2375`).
    pub id: String,
    /// Where it listens.
    /// Nowhere yet, while it is being made.
    pub endpoint: Option<Endpoint>,
    /// Addresses that connections from containers of this daemon come from, when known: such a client is
    /// bound to its own daemon, admitted without a slot (otherwise it would wait for its own parent).
    pub source_ips: Vec<IpAddr>,
    /// The cgroup above those of its containers, if they run on this machine: such a client may also come over a
    /// Unix socket of the pool that is mounted into its container.
    pub cgroup: Option<String>,
    /// Whether the provisioner wants no new sessions there (a pod that is being deleted).
    pub draining: bool,
    /// Why it is not there yet, in words for the status table (`starting dockerd`, `ImagePullBackOff`).
    pub pending: Option<String>,
    /// Whether that is a fault, which may or may not go away.
    pub faulty: bool,
    /// When the provisioner would take it if there were to be fewer.
    pub removal: Removal,
    /// Its slots, if the provisioner knows better than the daemon: one in a pod sees its node's processors.
    pub slots: Option<u32>,
}

/// The whole pool as the provisioner knows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observation {
    /// Nothing but the problems is told: it cannot see.
    pub blind: bool,
    /// Every daemon that exists or is being made.
    pub daemons: Vec<DaemonSpec>,
    /// Faults to tell the operator about, each a sentence (`cannot resolve dind.ci: …`).
    pub problems: Vec<String>,
    /// Another daemon went than the one that was chosen, not long ago: a sentence.
    pub alarm: Option<String>,
    /// How many daemons it has been asked for; `None` where nobody can ask for more or fewer, or it is not known.
    pub replicas: Option<u32>,
    /// Whether it is replacing daemons of its own accord: then it decides who goes.
    pub rollout: bool,
}

/// Something asked of a provisioner that can make more or fewer daemons.
#[derive(Debug)]
pub struct Change {
    /// What.
    pub step: Step,
    /// Takes the answer: what kept it from it. The observations tell what came of it.
    pub done: oneshot::Sender<Result<(), String>>,
}

/// Something to be written down where others look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// Whether a daemon has work on it, for those who may remove the machine under it.
    Mark {
        /// Which daemon.
        daemon: DaemonId,
        /// Whether it has.
        busy: bool,
    },
    /// Something that happened to the pool.
    Word {
        /// One of a fixed set of words, `ScaledUp`.
        reason: &'static str,
        /// Whether somebody should look into it.
        warning: bool,
        /// A sentence.
        text: String,
    },
}

/// Why a note was not written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unwritten {
    /// dindpool may not.
    Forbidden(String),
    /// Anything else, which may go away.
    Failed(String),
}

/// A note, and who waits for what came of it.
#[derive(Debug)]
pub struct Writing {
    /// What is to be written.
    pub note: Note,
    /// Takes the answer.
    pub done: oneshot::Sender<Result<(), Unwritten>>,
}

/// A running provisioner: observations come out of it until it is dropped or stopped.
pub struct Running {
    /// The latest observations, in order.
    pub observations: mpsc::Receiver<Observation>,
    /// Completes when everything that the provisioner started has been stopped. Send on `stop` first.
    pub stopped: tokio::task::JoinHandle<()>,
    /// Asks the provisioner to stop.
    pub stop: oneshot::Sender<()>,
    /// Takes what is asked of it, if it can make more or fewer daemons. While it can see at all, it tells what it sees
    /// again and again then: what was not confirmed for long is not known.
    pub changes: Option<mpsc::Sender<Change>>,
    /// Takes what is to be written down, where there is a place for it.
    pub notes: Option<mpsc::Sender<Writing>>,
}

/// An open connection to a daemon.
#[derive(Debug)]
pub enum Stream {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TLS.
    Tls(Box<TlsStream>),
}

impl Endpoint {
    /// Opens a connection. The caller sets the deadline.
    ///
    /// # Errors
    /// What connect(2) says; `ConnectionRefused` and `NotFound` mean that no byte reached a daemon.
    pub async fn connect(&self) -> io::Result<Stream> {
        match self {
            Endpoint::Tcp(addr) => Ok(Stream::Tcp(connect(*addr).await?)),
            Endpoint::Tls { address, name, client } => {
                let stream = connect(*address).await?;
                Ok(Stream::Tls(Box::new(client.connect(stream, name.clone()).await?)))
            }
            Endpoint::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).await?)),
        }
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    keepalive(&stream)?;
    Ok(stream)
}

/// Slots by the limits of a daemon's container, one for two processors and one for 2 GiB: a dockerd in a container sees
/// the processors and the memory of its machine.
fn slots_by_limits(cpus: Option<f64>, memory: Option<f64>) -> Option<u32> {
    let by_cpu = cpus.map(|cpus| cpus / 2.0);
    let by_memory = memory.map(|bytes| bytes / f64::from(1_u32 << 31));
    let least = match (by_cpu, by_memory) {
        (Some(a), Some(b)) => a.min(b),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => return None,
    };
    Some((least as u32).max(1))
}

/// Turns on TCP keepalive, so that a peer whose machine vanished is noticed within 30 s. Never
/// TCP_USER_TIMEOUT: that also kills a live peer whose window is closed (`docker logs -f | less`, measured).
///
/// # Errors
/// What setsockopt(2) says.
pub fn keepalive(socket: &impl AsFd) -> io::Result<()> {
    let probes = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(15))
        .with_interval(Duration::from_secs(5))
        .with_retries(3);
    socket2::SockRef::from(socket).set_tcp_keepalive(&probes)
}
