//! What runs in the background as long as the shell does: it takes the shell's clients in and passes each on to the pool,
//! by the same tunnel as the proxy's. A half-close stays one. What the pool breaks off is broken off for its client as far
//! as a Unix socket carries that: nobody sees a reset there, but a response's framing tells. What a client breaks off, or
//! the end of the session cuts, is a reset for the pool: a FIN would end a container's input as if it were whole.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufRead};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::app::say;
use crate::cli::{signals, status};
use crate::error::{Error, Kind};
use crate::provision::{Stream, keepalive};
use crate::proxy::classify::{self, Local, classify};
use crate::proxy::limits::{self, raise_descriptors};
use crate::proxy::listener::Address;
use crate::proxy::relay::{Side, TunnelKind, tunnel};
use crate::proxy::session::{ACCEPTED, hello};
use crate::tls::Client;

/// How long the pool may take to accept a connection for the session.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// When a client that pings hears that the pool has not answered yet: the CLI waits two seconds, and buildx goes on with
/// another driver then.
const PING_PATIENCE: Duration = Duration::from_millis(1500);
/// How long whoever refuses may take to say why.
const SAYING: Duration = Duration::from_millis(500);
/// Between two looks at whether the shell is still there.
const LOOK: Duration = Duration::from_secs(1);
/// What it says when it listens. Anything else is why it does not.
pub const READY: &str = "ready";

/// Where a pool is, as `DOCKER_HOST` has it: an address, and what is before each path (`/t/team-a`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    address: Address,
    prefix: String,
}

impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, prefix) = match text.strip_prefix("tcp://").and_then(|rest| rest.split_once('/')) {
            Some((authority, path)) => (format!("tcp://{authority}"), path.trim_matches('/')),
            None => (text.to_string(), ""),
        };
        let prefix = if prefix.is_empty() { String::new() } else { format!("/{prefix}") };
        // It becomes part of a request's line.
        if prefix.bytes().any(|b| !b.is_ascii_graphic())
            || classify::prefix(&format!("{prefix}/")).length < prefix.len()
        {
            return Err(format!("{text}: what may follow the port is /t/TENANT, /s/SESSION, /p/PROJECT"));
        }
        Ok(Host { address: address.parse()?, prefix })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.address, self.prefix)
    }
}

/// A pool, and how it is spoken to.
#[derive(Debug)]
pub struct Pool {
    host: Host,
    tls: Option<Tls>,
}

#[derive(Debug)]
struct Tls {
    directory: PathBuf,
    client: Client,
    name: ServerName<'static>,
}

impl Pool {
    /// One at this address, with the certificates of this directory. A Unix socket needs none.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(host: Host, tls: Option<PathBuf>) -> Result<Pool, String> {
        let tls = match (&host.address, tls) {
            (Address::Tcp(address), Some(directory)) => {
                let client = Client::of_pool(&directory)?;
                let name = client.expects(address.rsplit_once(':').map_or(address, |(name, _)| name))?;
                Some(Tls { directory, client, name })
            }
            _ => None,
        };
        Ok(Pool { host, tls })
    }

    /// Where it is.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The directory of the certificates.
    pub fn tls_dir(&self) -> Option<&Path> {
        self.tls.as_ref().map(|tls| tls.directory.as_path())
    }

    async fn connect(&self) -> io::Result<Stream> {
        let address = match &self.host.address {
            Address::Unix(path) => return UnixStream::connect(path).await.map(Stream::Unix),
            Address::Tcp(address) => address,
        };
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        keepalive(&stream)?;
        let Some(Tls { client, name, .. }) = &self.tls else { return Ok(Stream::Tcp(stream)) };
        // A session may outlive its certificate, and new ones are put in the same place. Where they are no good, the old
        // ones are, or what the pool says of them.
        let _ = client.reload();
        Ok(Stream::Tls(Box::new(client.connect(stream, name.clone()).await?)))
    }
}

/// The session's name stands on its standard input, and not here, where `ps` shows it to everybody: who knows it is in.
#[derive(Debug, Args)]
pub struct Relay {
    dir: PathBuf,
    #[arg(value_parser = |text: &str| text.parse::<Host>())]
    host: Host,
    pid: i32,
    /// The certificates of a pool with TLS.
    tls: Option<PathBuf>,
}

impl Relay {
    /// The arguments that say this.
    pub fn arguments(dir: &Path, pool: &Pool, pid: i32) -> Vec<OsString> {
        let own = [
            "session".into(),
            "relay".into(),
            dir.into(),
            pool.host.to_string().into(),
            pid.to_string().into(),
        ];
        own.into_iter().chain(pool.tls_dir().map(OsString::from)).collect()
    }

    pub async fn run(self) -> anyhow::Result<()> {
        // Each client needs two, and a shell may have 1024.
        raise_descriptors();
        let shell = start_time(self.pid);
        let mut name = String::new();
        let bound = async {
            // It is there already, and nothing else waits.
            io::stdin().lock().read_line(&mut name).context("no name")?;
            let bind = |name: &str| {
                let path = self.dir.join(name);
                UnixListener::bind(&path).with_context(|| {
                    format!("cannot listen on {} (a shorter XDG_RUNTIME_DIR or TMPDIR?)", path.display())
                })
            };
            let pool = Pool::new(self.host.clone(), self.tls.clone()).map_err(anyhow::Error::msg)?;
            anyhow::Ok((bind("docker.sock")?, bind("end.sock")?, signals()?, Arc::new(pool)))
        };
        let (clients, control, shutdown, pool) = match bound.await {
            Ok(bound) => bound,
            Err(fault) => {
                // Its standard error is nowhere.
                say(&format!("{fault:#}"));
                return Ok(());
            }
        };
        say(READY);
        let shell_ends = async {
            while goes_on(&shell, &start_time(self.pid)) {
                tokio::time::sleep(LOOK).await;
            }
        };
        let mut passing = JoinSet::new();
        let name = name.trim_end_matches('\n');
        let serve = async {
            loop {
                tokio::select! {
                    client = clients.accept() => match client {
                        Ok((client, _)) => {
                            let (pool, name) = (pool.clone(), name.to_string());
                            passing.spawn(async move { pass(client, &pool, &name).await });
                        }
                        Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                    },
                    Some(_) = passing.join_next() => {}
                }
            }
        };
        tokio::select! {
            () = shutdown => {}
            () = shell_ends => {}
            _ = control.accept() => {}
            () = serve => {}
        }
        let _ = std::fs::remove_dir_all(&self.dir);
        // What is open is cut, and the pool is to see that.
        passing.shutdown().await;
        Ok(())
    }
}

/// A connection to the pool that belongs to the session.
pub async fn enter(pool: &Pool, name: &str) -> anyhow::Result<Stream> {
    let host = &pool.host;
    let entered = async {
        let mut stream = pool.connect().await.with_context(|| format!("no connection to {host}"))?;
        stream.write_all(hello(&host.prefix, name).as_bytes()).await?;
        stream.flush().await?;
        let mut answer = vec![0; ACCEPTED.len()];
        stream
            .read_exact(&mut answer)
            .await
            .with_context(|| format!("{host} breaks off: is it a dindpool?"))?;
        if answer == ACCEPTED.as_bytes() {
            return Ok(stream);
        }
        let mut rest = Vec::new();
        // Whoever answers otherwise may keep the connection open.
        let _ = timeout(SAYING, stream.take(4096).read_to_end(&mut rest)).await;
        answer.extend_from_slice(&rest);
        let text = String::from_utf8_lossy(&answer);
        let said = status::plain(text.split_once("\r\n\r\n").map_or("", |(_, body)| body.trim()));
        match text.split(' ').nth(1) {
            // A dindpool has a reason of its own.
            Some("400" | "403" | "429" | "503") => anyhow::bail!("{host} refuses the session: {said}"),
            _ => anyhow::bail!("{host} has no sessions: is it a dindpool? It says: {said}"),
        }
    };
    timeout(PATIENCE, entered).await.with_context(|| format!("no answer of {host} within 10 s"))?
}

/// One client's connection, to the end of both directions.
async fn pass(client: UnixStream, pool: &Pool, name: &str) {
    let mut client = Side::new(Stream::Unix(client));
    let mut entering = pin!(enter(pool, name));
    let entered = match timeout(PING_PATIENCE, entering.as_mut()).await {
        Ok(entered) => entered,
        Err(_) if pings(&mut client).await => Err(anyhow::anyhow!("{} does not answer", pool.host)),
        Err(_) => entering.await,
    };
    match entered {
        Ok(pool) => {
            tunnel(&mut client, &mut Side::new(pool), TunnelKind::Raw, None).await;
        }
        // As the proxy refuses: buildx must hear it where it pings, and an upload must not be cut by it.
        Err(fault) => {
            limits::tell(None, &mut client, Error::new(Kind::DaemonUnreachable, format!("{fault:#}"))).await;
        }
    }
}

/// Whether a client has sent a ping. What it sent stays to be read.
async fn pings(client: &mut Side) -> bool {
    let Ok(Ok(Some(head))) = timeout(Duration::ZERO, client.read_head()).await else { return false };
    client.unread(head.raw());
    let prefix = classify::prefix(head.target()).length;
    let path = head.path().get(prefix..).unwrap_or_default();
    classify(head.method(), path, head.query()).local == Some(Local::Ping)
}

/// When a process started, in ticks since the machine did: its number alone may be another's later. None: it has ended.
///
/// # Errors
/// When that cannot be seen now; it may live.
fn start_time(pid: i32) -> io::Result<Option<u64>> {
    let stat = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        // It has ended before the file was opened, or before it was read.
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {
            return Ok(None);
        }
        Err(other) => return Err(other),
    };
    let unknown = || io::Error::other("an unknown form of /proc/PID/stat");
    let mut fields = stat.rsplit_once(')').ok_or_else(unknown)?.1.split_whitespace();
    // A zombie has ended.
    if fields.next() == Some("Z") {
        return Ok(None);
    }
    fields.nth(18).and_then(|ticks| ticks.parse().ok()).map(Some).ok_or_else(unknown)
}

/// Whether the shell that was there at first still is. What cannot be seen is no end: a process without descriptors for a
/// moment must not lose its session.
fn goes_on(first: &io::Result<Option<u64>>, now: &io::Result<Option<u64>>) -> bool {
    match (first, now) {
        (_, Ok(None)) => false,
        (Ok(first), Ok(now)) => first == now,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::task::JoinHandle;

    use super::{ACCEPTED, Duration, Host, Pool, UnixStream, goes_on, io, pass, start_time};
    use crate::proxy::relay::testing::{Ending, read_to_end, read_until, reset, say, soon};

    fn plain(host: Host) -> Pool {
        Pool::new(host, None).unwrap()
    }

    /// A pool that has let the session in, as far as its connection.
    async fn passed() -> (UnixStream, TcpStream, JoinHandle<()>) {
        let pool = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host: Host = format!("tcp://{}/t/team-a", pool.local_addr().unwrap()).parse().unwrap();
        let (client, near) = UnixStream::pair().unwrap();
        let task = tokio::spawn(async move { pass(near, &plain(host), "n").await });
        let (mut pool, _) = soon(pool.accept()).await.unwrap();
        let hello = read_until(&mut pool, "\r\n\r\n").await;
        assert!(hello.starts_with("POST /t/team-a/dindpool/session HTTP/1.1\r\n"), "{hello}");
        say(&mut pool, ACCEPTED).await;
        (client, pool, task)
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let (mut client, mut pool, task) = passed().await;
        say(&mut client, "input").await;
        client.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut pool).await, (b"input".to_vec(), Ending::Fin));
        say(&mut pool, "output").await;
        drop(pool);
        assert_eq!(read_to_end(&mut client).await, (b"output".to_vec(), Ending::Fin));
        soon(task).await.unwrap();
    }

    #[tokio::test]
    async fn a_break_of_the_pool_ends_the_client_after_what_came() {
        let (mut client, mut pool, task) = passed().await;
        say(&mut pool, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf").await;
        read_until(&mut client, "half").await;
        reset(pool);
        // Nothing of an end that its framing promises, and no reset: a Unix socket has none.
        assert_eq!(read_to_end(&mut client).await, (Vec::new(), Ending::Fin));
        soon(task).await.unwrap();
    }

    #[tokio::test]
    async fn an_end_of_the_session_is_a_break_for_the_pool() {
        let (mut client, mut pool, task) = passed().await;
        say(&mut client, "half of a file").await;
        read_until(&mut pool, "half of a file").await;
        task.abort();
        assert_eq!(read_to_end(&mut pool).await.1, Ending::Rst);
    }

    async fn refused(sent: &str) -> String {
        let (mut client, near) = UnixStream::pair().unwrap();
        let nobody: Host = "tcp://127.0.0.1:9".parse().unwrap();
        let task = tokio::spawn(async move { pass(near, &plain(nobody), "n").await });
        say(&mut client, sent).await;
        let said = String::from_utf8(read_to_end(&mut client).await.0).unwrap();
        soon(task).await.unwrap();
        said
    }

    #[tokio::test]
    async fn without_a_pool_each_client_hears_it_where_it_can() {
        let ping = refused("GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n").await;
        assert!(
            ping.starts_with("HTTP/1.1 429 ") && ping.contains("no connection to tcp://127.0.0.1:9"),
            "{ping}"
        );
        for route in ["/grpc", "/session"] {
            let said = refused(&format!("POST {route} HTTP/1.1\r\nHost: d\r\nUpgrade: h2c\r\n\r\n")).await;
            assert_eq!(said, "", "any answer but 101 sends buildx to another driver");
        }
        let list = refused("GET /v1.51/containers/json HTTP/1.1\r\nHost: d\r\n\r\n").await;
        assert!(list.starts_with("HTTP/1.1 502 ") && list.contains("{\"message\":"), "{list}");
        let body = "x".repeat(1 << 20);
        let upload =
            format!("POST /build HTTP/1.1\r\nHost: d\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        assert!(refused(&upload).await.starts_with("HTTP/1.1 502 "), "it is read although it was still sent");
    }

    #[tokio::test(start_paused = true)]
    async fn a_ping_is_not_kept_waiting_for_a_pool_that_says_nothing() {
        let pool = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host: Host = format!("tcp://{}", pool.local_addr().unwrap()).parse().unwrap();
        let (mut client, near) = UnixStream::pair().unwrap();
        let began = tokio::time::Instant::now();
        tokio::spawn(async move { pass(near, &plain(host), "n").await });
        client.write_all(b"HEAD /_ping HTTP/1.1\r\nHost: d\r\n\r\n").await.unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).await.unwrap();
        assert!(said.starts_with(b"HTTP/1.1 429 "), "{}", String::from_utf8_lossy(&said));
        assert!(began.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_host_is_what_docker_host_may_be() {
        let host = |text: &str| text.parse::<Host>().map(|host| host.to_string());
        assert_eq!(host("tcp://h").unwrap(), "tcp://h:2375");
        assert_eq!(host("tcp://h:80/").unwrap(), "tcp://h:80");
        assert_eq!(host("tcp://h:2375/t/team-a").unwrap(), "tcp://h:2375/t/team-a");
        assert_eq!(host("tcp://h/t/team-a/s/x/").unwrap(), "tcp://h:2375/t/team-a/s/x");
        assert_eq!(host("unix:///run/d/t/x.sock").unwrap(), "unix:///run/d/t/x.sock");
        for bad in ["h:2375", "tcp://h/v1.40", "tcp://h/t/a b", "tcp://h/t/a\r\nX: y", "ssh://h"] {
            assert!(host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_process_is_known_by_when_it_started() {
        let own = i32::try_from(std::process::id()).unwrap();
        let first = start_time(own);
        assert!(first.as_ref().is_ok_and(Option::is_some) && goes_on(&first, &start_time(own)));
        assert!(!goes_on(&first, &start_time(i32::MAX)), "it has ended");
        assert!(!goes_on(&first, &Ok(Some(1))), "its number is another's");
        assert!(goes_on(&first, &Err(io::Error::from_raw_os_error(libc::EMFILE))), "nobody can tell");
    }
}
