//! The commands: what was typed becomes a call of the library.

mod admin;
mod certs;
mod cordon;
mod events;
mod scale;
mod serve;
mod session;
mod simulate;
mod status;
mod up;
mod watch;
mod why;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{Raw, RawListener};

/// A pool of Docker daemons that looks like one.
#[derive(Debug, Parser)]
#[command(name = "dindpool", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a pool of daemons that exist already
    Serve(serve::Serve),
    /// Start a local pool of dockerd processes and serve it
    Up(up::Up),
    /// Show daemons, slots and sessions of a running pool
    Status(status::Status),
    /// Show what happened in a running pool
    Events(events::Events),
    /// Tell why a session is where it is, and what it waits or waited for
    Why(why::Why),
    /// Open a session of this shell's own, for every client: eval "$(dindpool session)"
    Session(session::Session),
    /// Let a daemon take no new sessions
    Cordon(cordon::Cordon),
    /// Let a cordoned or drained daemon take sessions again; ends its drain
    Uncordon(cordon::Uncordon),
    /// Cordon a daemon and wait for the end of its work; exits with 3 if something was cut
    Drain(cordon::Drain),
    /// Make or renew certificates of a pool and its clients
    Certs(certs::Certs),
    /// Compare the pool's balancing with other policies on a simulated day
    Simulate(simulate::Simulate),
    /// Print a completion script for a shell
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

/// The settings that `serve` and `up` share. Each is also a variable and, but for `--config`, a key of the file.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Configuration file (TOML); unknown keys are refused
    #[arg(long, env = "DINDPOOL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where clients connect: tcp://0.0.0.0:2375 or unix:///path; repeats
    #[arg(long, env = "DINDPOOL_LISTEN", value_name = "ADDR", value_delimiter = ',')]
    listen: Vec<String>,
    /// Where /metrics, /status, /livez and /readyz are, and changes are made: host:port or unix:///path; repeats
    /// [default: 127.0.0.1:9375]
    #[arg(long, env = "DINDPOOL_ADMIN", value_name = "ADDR", value_delimiter = ',')]
    admin: Vec<String>,
    /// File of the token that allows changes (cordon, drain) over TCP [default: none]
    #[arg(long, env = "DINDPOOL_ADMIN_TOKEN_FILE", value_name = "FILE")]
    admin_token_file: Option<PathBuf>,
    /// Sessions that work at the same time on one daemon [default: from its processors and memory]
    #[arg(long, env = "DINDPOOL_SLOTS", value_name = "N")]
    slots: Option<u32>,
    /// How long a session keeps its daemon after its last request [default: 5m]
    #[arg(long, env = "DINDPOOL_SESSION_GRACE", value_name = "TIME")]
    session_grace: Option<String>,
    /// How long a session keeps its slot after its last build or container [default: 10s]
    #[arg(long, env = "DINDPOOL_SLOT_LINGER", value_name = "TIME")]
    slot_linger: Option<String>,
    /// How long containers may run while nothing else of their session is under way [default: 12h]
    #[arg(long, env = "DINDPOOL_CONTAINER_LEASE", value_name = "TIME")]
    container_lease: Option<String>,
    /// How long an image that was built and not pushed holds its session to its daemon [default: 12h]
    #[arg(long, env = "DINDPOOL_IMAGE_HOLD", value_name = "TIME")]
    image_hold: Option<String>,
    /// How long a build waits for a daemon that has built its project while others have free slots [default: 60s]
    #[arg(long, env = "DINDPOOL_WARM_WAIT", value_name = "TIME")]
    warm_wait: Option<String>,
    /// What becomes of them then: report or stop [default: report]
    #[arg(long, env = "DINDPOOL_OVERDUE_CONTAINERS", value_name = "POLICY")]
    overdue_containers: Option<String>,
    /// How many builds may wait for a slot; 0: none waits, a full pool shares its least loaded daemon
    /// [default: 1000]
    #[arg(long, env = "DINDPOOL_QUEUE_LIMIT", value_name = "N")]
    queue_limit: Option<u32>,
    /// How long a build may wait for a slot [default: 1h]
    #[arg(long, env = "DINDPOOL_QUEUE_WAIT", value_name = "TIME")]
    queue_wait: Option<String>,
    /// How many builds of one tenant may wait [default: no limit of its own]
    #[arg(long, env = "DINDPOOL_TENANT_WAITING", value_name = "N")]
    tenant_waiting: Option<u32>,
    /// How many slots one tenant may hold [default: all]
    #[arg(long, env = "DINDPOOL_TENANT_SLOTS", value_name = "N")]
    tenant_slots: Option<u32>,
    /// Client connections in all; what the limit of open files allows is the most
    /// [default: from the limit of open files]
    #[arg(long, env = "DINDPOOL_MAX_CONNECTIONS", value_name = "N")]
    max_connections: Option<u32>,
    /// Client connections from one address of another machine [default: half of all]
    #[arg(long, env = "DINDPOOL_MAX_CONNECTIONS_PER_SOURCE", value_name = "N")]
    max_connections_per_source: Option<u32>,
    /// How long a client may take to send a request's head [default: 30s]
    #[arg(long, env = "DINDPOOL_HEAD_DEADLINE", value_name = "TIME")]
    head_deadline: Option<String>,
    /// Environment variables of a client on this machine that name its session; A+B: both together
    /// [default: CI_JOB_ID, BUILD_TAG, GITHUB_RUN_ID+GITHUB_RUN_ATTEMPT]
    #[arg(long, env = "DINDPOOL_SESSION_ENV", value_name = "NAME", value_delimiter = ',')]
    session_env: Vec<String>,
    /// Time between two probes of a daemon [default: 1.5s]
    #[arg(long, env = "DINDPOOL_PROBE_INTERVAL", value_name = "TIME")]
    probe_interval: Option<String>,
    /// How long a probe may take [default: 1.5s]
    #[arg(long, env = "DINDPOOL_PROBE_DEADLINE", value_name = "TIME")]
    probe_deadline: Option<String>,
    /// Time between two deep probes of a daemon, which write; 0s: none [default: 60s]
    #[arg(long, env = "DINDPOOL_DEEP_PROBE_INTERVAL", value_name = "TIME")]
    deep_probe_interval: Option<String>,
    /// How long connecting to a daemon may take [default: 5s]
    #[arg(long, env = "DINDPOOL_CONNECT_DEADLINE", value_name = "TIME")]
    connect_deadline: Option<String>,
    /// How long new clients are taken after SIGTERM, while /readyz fails already [default: 5s]
    #[arg(long, env = "DINDPOOL_SHUTDOWN_DELAY", value_name = "TIME")]
    shutdown_delay: Option<String>,
    /// How long open streams may go on after SIGTERM [default: 10m]
    #[arg(long, env = "DINDPOOL_SHUTDOWN_GRACE", value_name = "TIME")]
    shutdown_grace: Option<String>,
    /// text or json
    #[arg(long, env = "DINDPOOL_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<String>,
    /// What is logged: warn, info, debug, or a filter such as dindpool::proxy=debug
    #[arg(long, env = "DINDPOOL_LOG_LEVEL", value_name = "FILTER")]
    log_level: Option<String>,
}

impl Common {
    /// What was typed, with the file under it.
    fn raw(self) -> anyhow::Result<Raw> {
        let file = match &self.config {
            Some(path) => Raw::from_file(path)?,
            None => Raw::default(),
        };
        let some = |list: Vec<String>| (!list.is_empty()).then_some(list);
        let listener = |address: String| RawListener { address, ..RawListener::default() };
        let typed = Raw {
            listen: some(self.listen).map(|l| l.into_iter().map(listener).collect()),
            admin: some(self.admin),
            admin_token_file: self.admin_token_file,
            slots: self.slots,
            session_grace: self.session_grace,
            slot_linger: self.slot_linger,
            container_lease: self.container_lease,
            image_hold: self.image_hold,
            warm_wait: self.warm_wait,
            overdue_containers: self.overdue_containers,
            queue_limit: self.queue_limit,
            queue_wait: self.queue_wait,
            tenant_waiting: self.tenant_waiting,
            tenant_slots: self.tenant_slots,
            max_connections: self.max_connections,
            max_connections_per_source: self.max_connections_per_source,
            head_deadline: self.head_deadline,
            session_env: some(self.session_env),
            probe_interval: self.probe_interval,
            probe_deadline: self.probe_deadline,
            deep_probe_interval: self.deep_probe_interval,
            connect_deadline: self.connect_deadline,
            shutdown_delay: self.shutdown_delay,
            shutdown_grace: self.shutdown_grace,
            log_format: self.log_format,
            log_level: self.log_level,
            // Where daemons come from is said to the command that makes or finds them.
            ..Raw::default()
        };
        Ok(typed.or(file))
    }
}

/// Runs what was typed.
///
/// # Errors
/// Everything that keeps the command from doing it, in words for its user.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Serve(serve) => runtime()?.block_on(serve.run()),
        Command::Up(up) => runtime()?.block_on(up.run()),
        Command::Status(status) => runtime()?.block_on(status.run()),
        Command::Events(events) => runtime()?.block_on(events.run()),
        Command::Why(why) => runtime()?.block_on(why.run()),
        Command::Session(session) => runtime()?.block_on(session.run()),
        Command::Cordon(cordon) => runtime()?.block_on(cordon.run()),
        Command::Uncordon(uncordon) => runtime()?.block_on(uncordon.run()),
        Command::Drain(drain) => return runtime()?.block_on(drain.run()),
        Command::Certs(certs) => certs.run(),
        Command::Simulate(simulate) => simulate.run(),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "dindpool", &mut std::io::stdout());
            Ok(())
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

/// Listens to SIGTERM and SIGINT from this call on; completes at the first. A second one ends the process at once: somebody does not want to wait for the
/// grace. (Local daemons live on then; the next `dindpool up` on the same data adopts them.)
///
/// # Errors
/// When the handlers cannot be installed.
fn signals() -> std::io::Result<impl Future<Output = ()>> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // nohup(1) ignores it for who is to outlive the terminal. To be asked before there is a handler.
    let outlives = is_ignored(libc::SIGHUP);
    let mut hangups = hangups()?;
    // Whose terminal is closed hears SIGHUP too, and that is no wish to read a file again.
    let terminal = || std::fs::File::open("/dev/tty").is_ok();
    let at_terminal = terminal() && !outlives;
    Ok(async move {
        let closed = async {
            while hangups.recv().await.is_some() {
                if at_terminal && !terminal() {
                    return;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            () = closed => {}
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            std::process::exit(130);
        });
    })
}

/// Whether a signal has been ignored since the process began.
fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: the structure is plain data, for which zero is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action this only asks; `action` is valid for the old one.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Listens to SIGHUP from this call on: it does not end the process any more.
fn hangups() -> std::io::Result<Signal> {
    signal(SignalKind::hangup())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
