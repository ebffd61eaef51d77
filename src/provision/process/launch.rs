//! The hidden subcommand: two small processes of ours around each dockerd.
//!
//! ```text
//! dindpool ── keeper ── init ── dockerd ── containerd
//!             outside │ inside        └─ shims and containers
//! ```
//!
//! **init** is process 1 of a PID namespace. When it ends the kernel kills everything else in there, however
//! deep containers and shims have daemonised; it ends when dockerd does, so a dockerd that dies leaves
//! nothing behind that its successor would stumble over. A cgroup walk or a subreaper would have to race with
//! processes that fork; this cannot. **keeper** stays outside, in the machine's namespaces: it lays the cable,
//! passes SIGTERM on, kills when the grace is over, and takes the cable away. If somebody kills the keeper,
//! the kernel kills init (PDEATHSIG). Keeper and daemon outlive the dindpool that started them (unless their
//! data is temporary): the next one adopts them.
//!
//! Both are made by fork(2) of a process that has one thread only, and never exec: hence the subcommand, and
//! hence it must be dispatched before any runtime exists.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigHandler, SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::plan::Launch;
use super::state::{self, Lock, Process, State};
use super::{namespace, network};

/// `dindpool __exec-daemon FILE`: runs the daemon that FILE describes, until it ends. Call it before any
/// thread or runtime exists.
pub fn exec_daemon(args: &[OsString]) -> ! {
    let code = match args {
        [file] => keep(Path::new(file)),
        _ => Err("expected one argument, the file that describes the daemon".to_string()),
    };
    let code = code.unwrap_or_else(|fault| {
        say(&fault);
        125
    });
    std::process::exit(code)
}

/// A line of our own in the daemon's log.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "dindpool: {text}");
}

fn fault<'a>(what: &'a str) -> impl Fn(Errno) -> String + 'a {
    move |errno| format!("{what}: {errno}")
}

/// The keeper.
fn keep(file: &Path) -> Result<i32, String> {
    let launch: Launch =
        state::read(file).ok_or_else(|| format!("{}: not a daemon's description", file.display()))?;
    // Init inherits it: while it is held, something of this daemon is alive.
    let lock = launch.run.join(state::KEEPER_LOCK);
    let _lock = Lock::try_take(&lock).map_err(|held| format!("{}: {held}", lock.display()))?;
    // Run through /proc/self/exe we would be called `exe`.
    let _ = nix::sys::prctl::set_name(c"dindpool");
    // A session of its own: the Ctrl-C and the hang-up of a terminal are for dindpool, which stops us.
    nix::unistd::setsid().map_err(fault("setsid"))?;
    let signals = block_signals()?;
    namespace::prepare_directories(&launch)
        .map_err(|error| format!("cannot prepare directories: {error}"))?;

    let (from_init, to_keeper) = pipe()?;
    let (from_keeper, to_init) = pipe()?;
    let init = fork_into_pid_namespace()?;
    let Some(init) = init else {
        drop((from_init, to_init));
        let end = init_main(&launch, from_keeper, to_keeper);
        let code = end.unwrap_or_else(|fault| {
            say(&fault);
            125
        });
        std::process::exit(code)
    };
    drop((from_keeper, to_keeper));

    let started = introduce(&launch, init, File::from(from_init), File::from(to_init));
    if let Err(fault) = &started {
        say(fault);
        let _ = kill(init, Signal::SIGKILL);
    }
    let code = watch(&launch, init, &signals);
    network::disconnect(&launch.link.veth);
    started.and(code)
}

/// The keeper's part of the start: cable, then the word to go on, then the record of who is who.
fn introduce(launch: &Launch, init: Pid, mut from_init: File, mut to_init: File) -> Result<(), String> {
    // Wherever init has ended meanwhile, it has said why, and the caller will find it dead.
    if from_init.read_exact(&mut [0]).is_err() {
        return Ok(());
    }
    network::connect(&launch.link, init.as_raw())?;
    let mut pid = [0; 4];
    if to_init.write_all(b"+").and_then(|()| from_init.read_exact(&mut pid)).is_err() {
        return Ok(());
    }
    let processes = [std::process::id().cast_signed(), init.as_raw(), i32::from_ne_bytes(pid)];
    let [Some(keeper), Some(init), Some(dockerd)] = processes.map(Process::of) else { return Ok(()) };
    let state = State { boot: state::boot(), keeper, init, dockerd };
    state::write(&state::state_file(&launch.run), &state)
        .map_err(|error| format!("cannot write state: {error}"))
}

/// Waits for init's end and gives its exit code. On SIGTERM, or when the owner of temporary data is gone:
/// init is asked to end, and killed when the grace is over.
fn watch(launch: &Launch, init: Pid, signals: &SignalFd) -> Result<i32, String> {
    let stdin = io::stdin();
    let mut owned = launch.die_with_owner;
    let mut deadline: Option<Instant> = None;
    loop {
        match waitpid(init, Some(WaitPidFlag::WNOHANG)).map_err(fault("waitpid"))? {
            WaitStatus::Exited(_, code) => return Ok(code),
            WaitStatus::Signaled(_, signal, _) => return Ok(128 + signal as i32),
            _ => {}
        }
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if owned {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
        wait(&mut fds, left)?;
        let mut stop = false;
        if fds.get(1).is_some_and(|fd| fd.any() == Some(true)) {
            owned = false; // nothing is ever written there: this is its end
            stop = true;
        }
        while let Ok(Some(signal)) = signals.read_signal() {
            stop |= signal.ssi_signo != libc::SIGCHLD.cast_unsigned();
        }
        match deadline {
            None if stop => {
                let _ = kill(init, Signal::SIGTERM);
                deadline = Some(Instant::now() + launch.stop_grace);
            }
            Some(end) if Instant::now() >= end => {
                say("the grace is over; killing what is left");
                let _ = kill(init, Signal::SIGKILL);
                deadline = Some(Instant::now() + Duration::from_secs(3600));
            }
            _ => {}
        }
    }
}

/// Process 1 of the PID namespace: makes the other namespaces, starts dockerd, reaps. Its end is everybody's.
fn init_main(launch: &Launch, from_keeper: OwnedFd, to_keeper: OwnedFd) -> Result<i32, String> {
    nix::sys::prctl::set_pdeathsig(Some(Signal::SIGKILL)).map_err(fault("prctl"))?;
    // The IPC namespace takes the System V segments of `--ipc=host` containers with it.
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    unshare(flags).map_err(fault("cannot make namespaces"))?;
    let (mut from_keeper, mut to_keeper) = (File::from(from_keeper), File::from(to_keeper));
    // A keeper that died before PDEATHSIG was set is noticed here.
    let gone = |_: io::Error| "the keeper is gone".to_string();
    to_keeper.write_all(b"+").map_err(gone)?;
    from_keeper.read_exact(&mut [0]).map_err(gone)?;
    drop(from_keeper);

    network::configure_inside(&launch.link)?;
    // Opened before ours covers it: through it a process of this namespace learns its number outside.
    let outside = File::open("/proc").map_err(|error| format!("/proc: {error}"))?;
    namespace::enter(launch)?;
    let devnull = File::open("/dev/null").map_err(|error| format!("/dev/null: {error}"))?;
    nix::unistd::dup2_stdin(&devnull).map_err(fault("dup2"))?;
    let signals = block_signals()?;

    let exec = Exec::new(launch)?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(fault("fork"))? {
        ForkResult::Child => {
            let Err(fault) = exec.run(&outside, to_keeper);
            say(&fault);
            std::process::exit(127)
        }
        ForkResult::Parent { child } => {
            drop((outside, to_keeper));
            reap(child, &signals)
        }
    }
}

/// Waits for dockerd, reaping whatever is left to us meanwhile, and gives its exit code.
fn reap(dockerd: Pid, signals: &SignalFd) -> Result<i32, String> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)).map_err(fault("waitpid"))? {
            WaitStatus::Exited(pid, code) if pid == dockerd => {
                say(&format!("dockerd exited with status {code}"));
                return Ok(code);
            }
            WaitStatus::Signaled(pid, signal, _) if pid == dockerd => {
                say(&format!("dockerd was killed by {signal}"));
                return Ok(128 + signal as i32);
            }
            WaitStatus::StillAlive => {}
            _ => continue,
        }
        wait(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], None)?;
        while let Ok(Some(signal)) = signals.read_signal() {
            if signal.ssi_signo != libc::SIGCHLD.cast_unsigned() {
                let _ = kill(dockerd, Signal::SIGTERM);
            }
        }
    }
}

/// dockerd's program, arguments and environment, ready for execve(2).
struct Exec {
    program: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Exec {
    fn new(launch: &Launch) -> Result<Exec, String> {
        let c = |bytes: &[u8]| CString::new(bytes).map_err(|_| "a NUL byte in an argument".to_string());
        let program = c(launch.dockerd.as_os_str().as_bytes())?;
        let mut args = vec![program.clone()];
        for arg in &launch.args {
            args.push(c(arg.as_bytes())?);
        }
        // The containerd and runc of its own version lie beside it.
        let path = network::search_path(launch.dockerd.parent());
        let mut env = vec![c(format!("PATH={path}").as_bytes())?];
        for (name, value) in std::env::vars_os().filter(|(name, _)| inherited(&name.to_string_lossy())) {
            env.push(c(&[name.as_bytes(), b"=", value.as_bytes()].concat())?);
        }
        Ok(Exec { program, args, env })
    }

    /// Becomes dockerd, after telling its number outside.
    fn run(&self, outside: &File, mut to_keeper: File) -> Result<Infallible, String> {
        let pid = nix::fcntl::readlinkat(outside, "self").map_err(fault("readlink /proc/self"))?;
        let pid: i32 = pid.to_string_lossy().parse().map_err(|_| "a strange /proc/self".to_string())?;
        to_keeper.write_all(&pid.to_ne_bytes()).map_err(|_| "the keeper is gone".to_string())?;
        // Rust ignores SIGPIPE; what a container's shell pipes into `head` must die of it.
        // SAFETY: the default action is no function of ours.
        unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(fault("signal"))?;
        SigSet::empty().thread_set_mask().map_err(fault("sigmask"))?;
        nix::unistd::execve(&self.program, &self.args, &self.env)
            .map_err(|errno| format!("cannot run {}: {errno}", self.program.to_string_lossy()))
    }
}

/// Whether dockerd gets a variable of our environment: not what systemd said to us alone, nor what is for
/// clients.
fn inherited(name: &str) -> bool {
    !matches!(
        name,
        "PATH" | "NOTIFY_SOCKET" | "WATCHDOG_PID" | "WATCHDOG_USEC" | "DOCKER_HOST" | "DOCKER_CONTEXT"
    ) && !["LISTEN_", "DINDPOOL_"].iter().any(|prefix| name.starts_with(prefix))
}

/// Forks with the child at the head of a new PID namespace; the parent's other children stay in its own.
/// `None` in the child.
fn fork_into_pid_namespace() -> Result<Option<Pid>, String> {
    let own = File::open("/proc/self/ns/pid").map_err(|error| format!("/proc/self/ns/pid: {error}"))?;
    unshare(CloneFlags::CLONE_NEWPID).map_err(fault("cannot make a PID namespace"))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(fault("fork"))? {
        ForkResult::Child => Ok(None),
        ForkResult::Parent { child } => {
            setns(own, CloneFlags::CLONE_NEWPID).map_err(fault("setns"))?;
            Ok(Some(child))
        }
    }
}

/// From now on these signals are read, not suffered.
fn block_signals() -> Result<SignalFd, String> {
    let set = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD]);
    set.thread_block().map_err(fault("sigmask"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(fault("signalfd"))
}

fn wait(fds: &mut [PollFd<'_>], patience: Option<Duration>) -> Result<(), String> {
    // Rounded up: a rounded-down wait would spin through the last millisecond.
    let timeout = match patience {
        None => PollTimeout::NONE,
        Some(left) => PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX),
    };
    match poll(fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(format!("poll: {errno}")),
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), String> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(fault("pipe"))
}

#[cfg(test)]
mod tests {
    use super::inherited;

    #[test]
    fn dockerd_does_not_hear_what_systemd_says_to_us() {
        assert!(!inherited("NOTIFY_SOCKET") && !inherited("LISTEN_FDS") && !inherited("DINDPOOL_TOKEN"));
        assert!(inherited("HTTPS_PROXY") && inherited("HOME"));
    }
}
