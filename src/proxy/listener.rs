//! Listening sockets: bound early, served late, so that their real addresses are known before the first client.

use std::net::IpAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, fs, io};

use prometheus::{IntCounter, IntGauge};
use tokio::net::{TcpListener, UnixListener};

use super::identify::ListenerIdentity;
use super::limits::{self, Refused, Spare, is_out_of_descriptors};
use super::local;
use super::relay::Side;
use super::sniff::Network;
use super::{Origin, Proxy, serve};
use crate::metrics::Counted;
use crate::provision::{Stream, keepalive};
use crate::tls::Server;
use crate::tls::identity::Rule;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp://host:port`; port 0 takes a free one.
    Tcp(String),
    /// `unix:///path`
    Unix(PathBuf),
}

impl Address {
    /// Whether only this machine reaches it.
    pub fn is_local(&self) -> bool {
        match self {
            Address::Unix(_) => true,
            Address::Tcp(address) => match address.parse::<std::net::SocketAddr>() {
                Ok(address) => address.ip().is_loopback(),
                Err(_) => address.starts_with("localhost:"),
            },
        }
    }
}

impl std::str::FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix://") {
            return match path.starts_with('/') {
                true => Ok(Address::Unix(path.into())),
                false => {
                    Err(format!("{text}: a Unix socket needs an absolute path, unix:///run/dindpool.sock"))
                }
            };
        }
        let Some(address) = text.strip_prefix("tcp://") else {
            return Err(format!("{text}: expected tcp://host:port or unix:///path"));
        };
        let address = address.trim_end_matches('/');
        let port = address.rsplit_once(':').filter(|(_, port)| !port.ends_with(']'));
        match port {
            None => Ok(Address::Tcp(format!("{address}:2375"))),
            Some((_, port)) if port.parse::<u16>().is_ok() => Ok(Address::Tcp(address.to_string())),
            Some((_, port)) => Err(format!("{text}: {port} is no port")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => write!(f, "tcp://{address}"),
            Address::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// What a listener does with its clients before it serves them.
#[derive(Debug)]
pub struct Entry {
    /// What it says about them.
    pub identity: Arc<ListenerIdentity>,
    /// Its TLS, if it has any.
    pub tls: Option<Arc<Server>>,
    /// Where load balancers are whose PROXY headers count.
    pub load_balancers: Vec<Network>,
    /// What becomes of those with TLS.
    pub rules: Arc<[Rule]>,
}

impl Entry {
    /// Whether a PROXY header from there counts.
    pub fn trusts(&self, ip: IpAddr) -> bool {
        self.load_balancers.iter().any(|network| network.contains(ip))
    }
}

impl From<ListenerIdentity> for Entry {
    /// A listener without TLS, which nobody stands in front of.
    fn from(identity: ListenerIdentity) -> Self {
        Entry { identity: Arc::new(identity), tls: None, load_balancers: Vec::new(), rules: Arc::default() }
    }
}

/// A bound listener.
#[derive(Debug)]
pub enum Bound {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket, and its file, which is removed in the end.
    Unix(UnixListener, PathBuf),
}

/// How many clients may have connected before they are accepted, as far as the kernel allows (`somaxconn`). The library's
/// 128 are full in a few milliseconds when many come at once: then a TCP client is heard again after a second, and one
/// of a Unix socket fails at once.
const BACKLOG: i32 = 4096;

impl Bound {
    /// Binds an address.
    ///
    /// # Errors
    /// What bind(2) says, and when another process listens on the Unix socket.
    pub async fn new(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address).await?;
                // Accepted sockets inherit both: no system calls for each.
                let socket = socket2::SockRef::from(&listener);
                socket.set_tcp_nodelay(true)?;
                socket.listen(BACKLOG)?;
                keepalive(&listener)?;
                Ok(Bound::Tcp(listener))
            }
            Address::Unix(path) => {
                // As docker.sock: reaching it is root in every daemon.
                Self::unix(path, 0o660)
            }
        }
    }

    /// Binds an address of the admin's: a Unix socket is its owner's alone.
    ///
    /// # Errors
    /// As [`Bound::new`].
    pub async fn admin(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Self::unix(path, 0o600),
            Address::Tcp(_) => Self::new(address).await,
        }
    }

    fn unix(path: &Path, mode: u32) -> io::Result<Self> {
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        socket2::SockRef::from(&listener).listen(BACKLOG)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        Ok(Bound::Unix(listener, path.to_path_buf()))
    }

    /// The real address, with the port that port 0 became.
    pub fn address(&self) -> String {
        match self {
            Bound::Tcp(listener) => {
                listener.local_addr().map_or_else(|_| "tcp://?".into(), |a| format!("tcp://{a}"))
            }
            Bound::Unix(_, path) => format!("unix://{}", path.display()),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Bound::Tcp(_) => "tcp",
            Bound::Unix(..) => "unix",
        }
    }

    /// The next client.
    ///
    /// # Errors
    /// What accept(2) says.
    pub async fn accept(&self) -> io::Result<(Stream, Origin)> {
        match self {
            Bound::Tcp(listener) => {
                let (stream, client) = listener.accept().await?;
                let server = stream.local_addr()?;
                Ok((Stream::Tcp(stream), Origin::Tcp(client, server)))
            }
            Bound::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                let credentials = stream.peer_cred()?;
                Ok((Stream::Unix(stream), Origin::Unix(credentials.pid(), credentials.uid())))
            }
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Bound::Unix(_, path) = self {
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes the socket file of a process that is gone; one that somebody listens on stays.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("another process listens on {}", path.display()),
            )),
            Err(_) => fs::remove_file(path),
        },
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("{} exists and is no socket", path.display()),
        )),
        Err(_) => Ok(()),
    }
}

/// Accepts clients until the drain begins.
pub async fn run(proxy: Arc<Proxy>, entry: Arc<Entry>, bound: Bound) {
    let kind = bound.kind();
    let accepted = proxy.metrics.accepted.with_label_values(&[kind]);
    let open = proxy.metrics.connections.with_label_values(&[kind]);
    let door = Door { proxy, entry, accepted, open };
    let mut spare = Spare::new();
    loop {
        let accepted = tokio::select! {
            accepted = bound.accept() => accepted,
            () = door.proxy.drain.stopping() => break,
        };
        match accepted {
            Ok((stream, origin)) => door.take(stream, origin),
            Err(error) if is_out_of_descriptors(&error) => {
                door.proxy.gate.refused(Refused::Descriptors, &door.proxy.metrics);
                if spare.give_up() {
                    // Its client is told by the close; without it, it would hang and the listener spin.
                    drop(now(&bound).await);
                } else {
                    tokio::time::sleep(REST).await;
                }
                spare.restore();
            }
            Err(error) => {
                // A client that left between SYN and accept is no reason to stop, nor to be busy with it.
                tracing::warn!("accept on {}: {error}", bound.address());
                tokio::time::sleep(REST).await;
            }
        }
    }
    // For the client these are connected: closing the listener would reset them.
    let mut faults = 0;
    while let Some(accepted) = now(&bound).await {
        match accepted {
            Ok((stream, origin)) => door.take(stream, origin),
            // One that has left again; the next ones may not have.
            Err(error) if faults < FAULTS && !is_out_of_descriptors(&error) => faults += 1,
            Err(_) => break,
        }
    }
}

/// After a failed accept.
const REST: Duration = Duration::from_millis(50);
/// How many failed accepts are passed over when the listener closes.
const FAULTS: u32 = 1024;

/// A client that waits to be accepted, if there is one.
async fn now(bound: &Bound) -> Option<io::Result<(Stream, Origin)>> {
    // With a task's budget used up, the runtime would say "nobody" of a full backlog.
    let accept = tokio::task::unconstrained(bound.accept());
    tokio::time::timeout(Duration::ZERO, accept).await.ok()
}

/// What each new client of a listener gets.
struct Door {
    proxy: Arc<Proxy>,
    entry: Arc<Entry>,
    accepted: IntCounter,
    open: IntGauge,
}

impl Door {
    /// Lets a client in, or has it told why not.
    fn take(&self, stream: Stream, origin: Origin) {
        self.accepted.inc();
        let proxy = self.proxy.clone();
        let source = match origin {
            // Whose client it is, a load balancer says in a moment.
            Origin::Tcp(client, _) if self.entry.trusts(client.ip()) => None,
            Origin::Tcp(client, _) => Some(client.ip()),
            Origin::Unix(..) => None,
        };
        match proxy.gate.enter(source) {
            Ok(pass) => {
                let (connection, entry) = (proxy.clone(), self.entry.clone());
                let open = Counted::new(&self.open);
                // A panic ends this task and its connection; the guards in it give everything back.
                proxy.drain.spawn(async move {
                    let (_open, mut pass) = (open, pass);
                    serve(connection, entry, stream, origin, &mut pass).await;
                });
            }
            Err(why) => {
                proxy.gate.refused(why, &proxy.metrics);
                if let Some(place) = proxy.gate.shed() {
                    let (told, error) = (proxy.clone(), proxy.gate.error(why));
                    proxy.drain.spawn(async move {
                        let _place = place;
                        limits::tell(local::known(&told.pool), &mut Side::new(stream), error).await;
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_faults_named() {
        let parse = |t: &str| t.parse::<Address>().map(|a| a.to_string());
        assert_eq!(parse("tcp://0.0.0.0:2375").unwrap(), "tcp://0.0.0.0:2375");
        assert_eq!(parse("tcp://127.0.0.1").unwrap(), "tcp://127.0.0.1:2375");
        assert_eq!(parse("tcp://[::1]").unwrap(), "tcp://[::1]:2375");
        assert_eq!(parse("tcp://[::1]:80/").unwrap(), "tcp://[::1]:80");
        assert_eq!(parse("unix:///run/x.sock").unwrap(), "unix:///run/x.sock");
        for bad in ["0.0.0.0:2375", "tcp://a:x", "unix://x", "http://a:1", "tcp://a:99999"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn accepted_sockets_inherit_what_the_listener_has() {
        let bound = Bound::new(&Address::Tcp("127.0.0.1:0".into())).await.unwrap();
        let address = bound.address().strip_prefix("tcp://").unwrap().to_string();
        let _client = tokio::net::TcpStream::connect(address).await.unwrap();
        let (Stream::Tcp(stream), _) = bound.accept().await.unwrap() else { panic!("not TCP") };
        let socket = socket2::SockRef::from(&stream);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(15));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(5));
    }

    #[tokio::test]
    async fn many_clients_connect_before_one_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        let many = allowed.trim().parse::<usize>().unwrap().min(400);
        let path = dir.path().join("s");
        let unix = Bound::new(&Address::Unix(path.clone())).await.unwrap();
        let tcp = Bound::new(&Address::Tcp("127.0.0.1:0".into())).await.unwrap();
        let address: std::net::SocketAddr = tcp.address().strip_prefix("tcp://").unwrap().parse().unwrap();
        let over_unix: Vec<socket2::Socket> = (0..many)
            .map(|_| {
                let client =
                    socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
                // Else it would wait for a place.
                client.set_nonblocking(true).unwrap();
                client.connect(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
                client
            })
            .collect();
        // Whoever finds no place is heard again a second later.
        let patience = Duration::from_millis(900);
        let over_tcp: Vec<std::net::TcpStream> =
            (0..many).map(|_| std::net::TcpStream::connect_timeout(&address, patience).unwrap()).collect();
        assert_eq!((over_unix.len(), over_tcp.len()), (many, many));
        drop(unix);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = Address::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let bound = Bound::new(&address).await.unwrap();
        assert_eq!(Bound::new(&address).await.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(bound);
        assert!(!path.exists());
    }
}
