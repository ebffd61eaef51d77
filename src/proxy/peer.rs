//! The client process behind a connection on this machine: `SO_PEERCRED` for Unix sockets, the owner of the
//! other end for loopback TCP. On one machine all clients share 127.0.0.1, and the process is what tells the
//! terminals and CI jobs apart.
//!
//! `docker` and the plugins that it starts (buildx, compose) are in one POSIX session and inherit one
//! environment (measured with setsid and without).

use std::collections::{HashMap, VecDeque};
use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fs, io};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};

use super::identify::{Source, sanitise};

/// How many processes are remembered and tried before all of /proc is searched: a buildx build opens eleven
/// connections.
const RECENT: usize = 32;
/// How many of them are tried on a thread of the runtime.
const AT_ONCE: usize = 2;
/// How many session leaders' start times are remembered after they may have exited.
const LEADERS: usize = 4096;
/// How many of a process's newest descriptors are looked at before all of them are: it may have opened some since. One
/// system call for each.
const LATELY: u32 = 64;

/// Recognises client processes.
#[derive(Debug)]
pub struct Peers {
    /// Variables that name a session, each a list of names that must all be set (`GITHUB_RUN_ID` and its
    /// attempt), in order of precedence.
    variables: Vec<Vec<String>>,
    /// The processes that connected last, the latest in front.
    recent: Mutex<VecDeque<Recent>>,
    /// Held by whoever searches: one at a time, because a search through a process with thousands of connections
    /// (an agent, a load generator) takes milliseconds and finds those of all who wait for their turn meanwhile.
    searching: Arc<tokio::sync::Mutex<()>>,
    /// Asks the kernel for the owners of sockets.
    kernel: Mutex<Option<Socket>>,
    /// Start times of session leaders: a leader may exit before its session does, and the key must not
    /// change then.
    leaders: Mutex<HashMap<u32, u64>>,
}

/// A process that has connected.
#[derive(Debug)]
struct Recent {
    pid: u32,
    /// Its sockets when all its descriptors were looked at last: inode and descriptor. Since then it may have closed
    /// them, or it may be another process by now, so a socket found here is looked at once more.
    sockets: HashMap<u32, u32>,
}

/// The variable that names a session whatever the CI system.
pub const VARIABLE: &str = "DINDPOOL_SESSION";

/// GitLab, Jenkins, GitHub Actions: what identifies a job in its environment.
pub fn default_variables() -> Vec<String> {
    ["CI_JOB_ID", "BUILD_TAG", "GITHUB_RUN_ID+GITHUB_RUN_ATTEMPT"].map(String::from).to_vec()
}

impl Peers {
    /// `variables` as in the configuration: names, joined by `+` where several belong together.
    /// [`VARIABLE`] comes before all of them.
    pub fn new(variables: &[String]) -> Self {
        let split = |v: &String| v.split('+').map(str::to_string).collect();
        Peers {
            variables: variables.iter().map(split).collect(),
            recent: Mutex::default(),
            searching: Arc::default(),
            kernel: Mutex::default(),
            leaders: Mutex::default(),
        }
    }

    /// The source of a connection over a Unix socket.
    pub fn unix(&self, pid: Option<i32>, uid: u32) -> Source {
        pid.and_then(|pid| u32::try_from(pid).ok())
            .and_then(|pid| self.process(pid))
            .map_or(Source::User(uid), Source::Process)
    }

    /// The source of a loopback TCP connection from `client` to `server`.
    pub async fn loopback(self: Arc<Self>, client: SocketAddr, server: SocketAddr) -> Source {
        let unknown = Source::Ip(client.ip());
        let Ok(Some((inode, uid))) = self.owner(client, server) else { return unknown };
        // The process that connected a moment ago, again: faster than handing it to another thread. While somebody
        // searches, many come at once, and that search will have met this one, too.
        let link = link_of(inode);
        let lately = || self.recent_holder(AT_ONCE, |pid| holds_lately(pid, &link));
        let idle = || self.searching.try_lock().is_ok();
        let at_hand = || self.seen(inode).or_else(|| if idle() { lately() } else { None });
        let process = match at_hand() {
            Some(pid) => self.process(pid),
            None => {
                let turn = self.searching.clone().lock_owned().await;
                match self.seen(inode) {
                    Some(pid) => self.process(pid),
                    // All of /proc takes milliseconds on a machine with many processes: off the runtime. The search
                    // keeps its turn when its client has gone.
                    None => {
                        let search = move || {
                            let pid = self.holder(inode);
                            drop(turn);
                            self.process(pid?)
                        };
                        tokio::task::spawn_blocking(search).await.ok().flatten()
                    }
                }
            }
        };
        // Another user's process, and not enough rights to look: at least users are told apart.
        process.map_or(Source::User(uid), Source::Process)
    }

    /// Inode and user of the client's socket, asked of the kernel over one socket for all connections.
    fn owner(&self, client: SocketAddr, server: SocketAddr) -> io::Result<Option<(u32, u32)>> {
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = match kernel.take() {
            Some(socket) => socket,
            None => ask_kernel()?,
        };
        let owner = owner(&socket, client, server)?;
        // Not kept after an error: a late answer would be taken for the next one.
        *kernel = Some(socket);
        Ok(owner)
    }

    fn recent(&self) -> MutexGuard<'_, VecDeque<Recent>> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process that has a socket open, if a search has met that socket.
    fn seen(&self, inode: u32) -> Option<u32> {
        let (pid, fd) = {
            let mut recent = self.recent();
            // Taken out: each connection is asked about once.
            recent.iter_mut().find_map(|r| r.sockets.remove(&inode).map(|fd| (r.pid, fd)))?
        };
        let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
        (link.as_os_str() == link_of(inode).as_str()).then_some(pid)
    }

    /// The process that has a socket open, if it is one of the last few. `holds` looks at one of them.
    fn recent_holder(&self, processes: usize, holds: impl Fn(u32) -> bool) -> Option<u32> {
        // Copied: the lock is not held while /proc is read.
        let recent: Vec<u32> = self.recent().iter().take(processes).map(|r| r.pid).collect();
        recent.into_iter().find(|pid| holds(*pid))
    }

    /// The process that has a socket open, by a search.
    fn holder(&self, inode: u32) -> Option<u32> {
        let link = link_of(inode);
        if let Some(pid) = self.recent_holder(RECENT, |pid| holds_lately(pid, &link)) {
            self.remember(pid, None);
            return Some(pid);
        }
        let recent: Vec<u32> = self.recent().iter().map(|r| r.pid).collect();
        let mut pids: Vec<u32> = fs::read_dir("/proc")
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| !recent.contains(pid))
            .collect();
        // A client has most likely started a moment ago.
        pids.sort_unstable_by(|a, b| b.cmp(a));
        recent.into_iter().chain(pids).find(|pid| {
            let sockets = sockets(*pid);
            let found = sockets.contains_key(&inode);
            if found {
                self.remember(*pid, Some(sockets));
            }
            found
        })
    }

    /// A process has connected, and these are all its sockets, if somebody has looked.
    fn remember(&self, pid: u32, sockets: Option<HashMap<u32, u32>>) {
        let mut recent = self.recent();
        let known = recent.iter().position(|r| r.pid == pid).and_then(|at| recent.remove(at));
        let sockets = sockets.or_else(|| known.map(|r| r.sockets)).unwrap_or_default();
        recent.push_front(Recent { pid, sockets });
        recent.truncate(RECENT);
    }

    /// How a process is recognised: by its environment, else by its POSIX session.
    fn process(&self, pid: u32) -> Option<String> {
        let environment = read_whole(&format!("/proc/{pid}/environ")).unwrap_or_default();
        if let Some(name) = variable(&environment, VARIABLE) {
            return Some(format!("name:{}", sanitise(&name)));
        }
        for names in &self.variables {
            let values: Option<Vec<String>> = names
                .iter()
                .map(|name| variable(&environment, name).map(|value| format!("{name}={value}")))
                .collect();
            if let Some(values) = values {
                return Some(format!("job:{}", sanitise(&values.join("+"))));
            }
        }
        let (session, _) = stat(pid)?;
        let mut leaders = self.leaders.lock().unwrap_or_else(PoisonError::into_inner);
        let started = match stat(session) {
            Some((_, started)) => {
                if leaders.len() >= LEADERS {
                    leaders.clear();
                }
                leaders.insert(session, started);
                started
            }
            None => leaders.get(&session).copied().unwrap_or_default(),
        };
        Some(format!("posix:{session}@{started}"))
    }
}

/// What a descriptor of this socket is a link to.
fn link_of(inode: u32) -> String {
    format!("socket:[{inode}]")
}

/// Whether one of the newest descriptors of a process is this socket: of a process with few, any of them. The kernel
/// gives out the lowest number that is free, so those of a process with thousands of connections (an agent, a load
/// generator) lie without a gap, and a new one is the last. To look through all of them costs 12 ms at 9,000, for each
/// connection, and even the beginning of their list costs much, since the kernel fills a whole buffer.
fn holds_lately(pid: u32, link: &str) -> bool {
    let open = |fd: u32| fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok();
    // In all that follows the last descriptor is between these two.
    let (mut from, mut to) = (0, LATELY);
    while open(to).is_some() {
        (from, to) = (to, 2 * to);
    }
    while from > 0 && to - from > 1 {
        let middle = from + (to - from) / 2;
        if open(middle).is_some() {
            from = middle;
        } else {
            to = middle;
        }
    }
    (to.saturating_sub(LATELY)..=to).rev().any(|fd| open(fd).is_some_and(|l| l.as_os_str() == link))
}

/// All sockets of a process: inode and descriptor.
fn sockets(pid: u32) -> HashMap<u32, u32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return HashMap::new() };
    let socket = |entry: fs::DirEntry| {
        let link = fs::read_link(entry.path()).ok()?;
        let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()?;
        Some((inode, entry.file_name().to_str()?.parse().ok()?))
    };
    entries.filter_map(|entry| socket(entry.ok()?)).collect()
}

/// A non-empty variable of an environment block.
fn variable(environment: &[u8], name: &str) -> Option<String> {
    environment.split(|b| *b == 0).find_map(|entry| {
        let value = entry.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        (!value.is_empty()).then(|| String::from_utf8_lossy(value).into_owned())
    })
}

/// A file of /proc, whose length is 0 until it is read: `fs::read` would feel its way up from 32 bytes.
fn read_whole(path: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(8 * 1024);
    fs::File::open(path)?.take(u64::MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// POSIX session id and start time (clock ticks since boot) of a process, from `/proc/PID/stat`.
fn stat(pid: u32) -> Option<(u32, u64)> {
    let stat = read_whole(&format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    // The command's name may hold anything, also blanks and parentheses.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    Some((fields.get(3)?.parse().ok()?, fields.get(19)?.parse().ok()?))
}

/// Inode and user of the client's socket, asked of the kernel by the connection's addresses (sock_diag(7)).
/// Reading /proc/net/tcp instead would cost milliseconds with thousands of connections.
fn owner(socket: &Socket, client: SocketAddr, server: SocketAddr) -> io::Result<Option<(u32, u32)>> {
    let request = InetRequest {
        family: if client.is_ipv4() { AF_INET } else { AF_INET6 },
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: client.port(),
            destination_port: server.port(),
            source_address: client.ip(),
            destination_address: server.ip(),
            interface_id: 0,
            // No cookie: INET_DIAG_NOCOOKIE.
            cookie: [0xff; 8],
        },
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.header.length as usize];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<SockDiagMessage>::deserialize(&answer).map_err(io::Error::other)?;
    Ok(match answer.payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
            Some((response.header.inode, response.header.uid)).filter(|(inode, _)| *inode != 0)
        }
        _ => None,
    })
}

fn ask_kernel() -> io::Result<Socket> {
    let socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.connect(&NetlinkAddr::new(0, 0))?;
    // The kernel answers at once or not at all; a lost answer must not hold a client.
    timeout(&socket)?;
    Ok(socket)
}

fn timeout(socket: &Socket) -> io::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
    use nix::sys::time::{TimeVal, TimeValLike};
    use std::os::fd::BorrowedFd;
    // SAFETY: the descriptor is the socket's own, which outlives this borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    setsockopt(&fd, ReceiveTimeout, &TimeVal::milliseconds(200)).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    #[test]
    fn a_variable_is_found_in_an_environment_block() {
        let block = b"PATH=/bin\0CI_JOB_ID=17\0EMPTY=\0XCI_JOB_ID=18\0";
        assert_eq!(variable(block, "CI_JOB_ID").as_deref(), Some("17"));
        assert_eq!(variable(block, "EMPTY"), None);
        assert_eq!(variable(block, "JOB_ID"), None);
    }

    #[tokio::test]
    async fn this_process_is_found_behind_its_own_loopback_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client_side = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server_side, _) = listener.accept().unwrap();
        let peers = Arc::new(Peers::new(&[]));
        let (client, server) = (client_side.local_addr().unwrap(), server_side.local_addr().unwrap());
        let (inode, _) = peers.owner(client, server).unwrap().unwrap();
        assert!(peers.recent().is_empty() && peers.seen(inode).is_none());
        // A child of another test has it, too, between its fork and its exec.
        while peers.holder(inode) != Some(std::process::id()) {
            std::thread::yield_now();
        }
        assert_eq!(peers.recent().front().map(|r| r.pid), Some(std::process::id()));
        let source = peers.clone().loopback(client, server).await;
        let (session, started) =
            stat(std::process::id()).map(|(s, _)| (s, stat(s).map_or(0, |x| x.1))).unwrap();
        assert_eq!(source, Source::Process(format!("posix:{session}@{started}")));
    }

    #[test]
    fn among_thousands_of_descriptors_the_newest_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let many: Vec<fs::File> = (0..300).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let client = TcpStream::connect(address).unwrap();
        let link = fs::read_link(format!("/proc/self/fd/{}", client.as_raw_fd())).unwrap();
        let (pid, link) = (std::process::id(), link.to_str().unwrap());
        assert!(!holds_lately(pid, "socket:[1]"));
        // Other tests open and close descriptors of this process all the time.
        while !holds_lately(pid, link) {
            std::thread::yield_now();
        }
        drop(many);
    }

    #[test]
    fn one_search_finds_all_sockets_of_a_process_and_a_stale_finding_is_nobodys() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let clients: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
        let peers = Peers::new(&[]);
        let inode =
            |client: &TcpStream| peers.owner(client.local_addr().unwrap(), address).unwrap().unwrap().0;
        let inodes: Vec<u32> = clients.iter().map(inode).collect();
        let this = std::process::id();
        peers.remember(this, Some(sockets(this)));
        assert_eq!(peers.seen(inodes[0]), Some(this));
        assert_eq!(peers.seen(inodes[0]), None, "each connection is asked about once");
        // Its descriptor is another file by now: the finding must not be believed.
        let (fd, null) = (clients[1].as_raw_fd(), fs::File::open("/dev/null").unwrap());
        // SAFETY: both descriptors are open, and owned by this test until it ends.
        assert!(unsafe { libc::dup2(null.as_raw_fd(), fd) } == fd);
        assert_eq!(peers.seen(inodes[1]), None);
        // Nor where the process has gone.
        peers.recent()[0].pid = u32::MAX >> 1;
        assert_eq!(peers.seen(inodes[2]), None);
    }

    #[test]
    fn processes_of_different_sessions_and_jobs_differ_and_plugins_do_not() {
        let peers = Peers::new(&default_variables());
        let spawn = |command: &mut Command| {
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            // `cat` echoes one byte once it runs, so its environment is the new one.
            use std::io::Write;
            child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            child
        };
        let cat = || {
            let mut command = Command::new("cat");
            command.env_clear();
            command
        };
        let detached = |mut command: Command| {
            // SAFETY: setsid(2) is async-signal-safe.
            unsafe { command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from)) };
            command
        };
        let mut plain = spawn(&mut cat());
        let mut sibling = spawn(&mut cat());
        let mut other = spawn(&mut detached(cat()));
        let mut job = spawn(cat().env("CI_JOB_ID", "17"));
        let mut same_job = spawn(detached(cat()).env("CI_JOB_ID", "17"));
        let mut run = spawn(cat().env("GITHUB_RUN_ID", "5").env("GITHUB_RUN_ATTEMPT", "2"));
        let mut named = spawn(cat().env("CI_JOB_ID", "17").env(VARIABLE, "mine"));
        let key = |child: &std::process::Child| peers.process(child.id()).unwrap();
        assert_eq!(key(&plain), key(&sibling));
        assert_ne!(key(&plain), key(&other));
        assert_eq!(key(&job), "job:CI_JOB_ID=17");
        assert_eq!(key(&job), key(&same_job));
        assert_eq!(key(&run), "job:GITHUB_RUN_ID=5+GITHUB_RUN_ATTEMPT=2");
        assert_eq!(key(&named), "name:mine");
        for child in [&mut plain, &mut sibling, &mut other, &mut job, &mut same_job, &mut run, &mut named] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
