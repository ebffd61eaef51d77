//! `eval "$(dindpool session)"`: a session of this shell's own, for every client, buildx included.
//!
//! A small process of its own listens on a Unix socket for as long as the shell lives, and passes each connection on to the
//! pool byte by byte. Before that it says once whose the connection is ([`crate::proxy::session`]), so nothing depends on
//! what the client can say. Whoever may open the socket's folder is in the session: that is this user.

use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpStream, UnixListener, UnixStream};

use crate::admin::token::Token;
use crate::app::say;
use crate::provision::Stream;
use crate::proxy::session::{ACCEPTED, hello};

/// How long the pool may take to accept a connection for the session.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long whoever refuses may take to say why.
const SAYING: Duration = Duration::from_millis(500);
/// Between two looks at whether the shell is still there.
const LOOK: Duration = Duration::from_secs(1);
/// Where a pool listens unless something else is said.
const HOST: &str = "tcp://127.0.0.1:2375";
/// How many characters a key has that nobody chose.
const KEY: usize = 20;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Session {
    #[command(subcommand)]
    step: Option<Step>,
    #[command(flatten)]
    open: Open,
}

#[derive(Debug, Args)]
struct Open {
    /// The pool: tcp://host:port or unix:///path [default: DOCKER_HOST, else tcp://127.0.0.1:2375]
    #[arg(long, env = "DINDPOOL_POOL", value_name = "ADDR")]
    pool: Option<String>,
    /// The session's name, to be in it from several machines [default: one that nobody can guess]
    #[arg(long, value_name = "NAME")]
    key: Option<String>,
    /// The process with which it ends [default: the one that runs this command]
    #[arg(long, value_name = "PID")]
    with_pid: Option<i32>,
}

#[derive(Debug, Subcommand)]
enum Step {
    /// End the session of this shell: eval "$(dindpool session end)"
    End,
    /// What runs in the background
    #[command(hide = true)]
    Relay(Relay),
}

#[derive(Debug, Args)]
struct Relay {
    dir: PathBuf,
    host: String,
    name: String,
    pid: i32,
}

impl Session {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.step {
            Some(Step::End) => end().await,
            Some(Step::Relay(relay)) => relay.run().await,
            None => self.open.run().await,
        }
    }
}

impl Open {
    async fn run(self) -> anyhow::Result<()> {
        // A session within a session is one of the same pool.
        let outer = variable("DINDPOOL_SESSION_HOST").or_else(|| variable("DOCKER_HOST"));
        let host = self.pool.or(outer).unwrap_or_else(|| HOST.to_string());
        let name = match self.key {
            Some(name) => name,
            None => Token::random().context("no random numbers")?.secret().chars().take(KEY).collect(),
        };
        // Whatever is wrong is said here, where somebody reads it.
        drop(enter(&host, &name).await?);
        let pid = self.with_pid.unwrap_or_else(|| nix::unistd::getppid().as_raw());
        let dir = folder()?;
        let mut relay = tokio::process::Command::from({
            let mut command = std::process::Command::new(std::env::current_exe()?);
            command.args(["session", "relay"]).arg(&dir).args([&host, &name, &pid.to_string()]);
            // Ctrl-C in the shell is not for it.
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
            command
        })
        .spawn()
        .context("the session's process does not start")?;
        let mut ready = String::new();
        let out = relay.stdout.take().context("the session's process says nothing")?;
        tokio::time::timeout(PATIENCE, BufReader::new(out).read_line(&mut ready)).await.ok();
        anyhow::ensure!(ready == "ready\n", "the session's process has ended at once");
        say(&exports(&dir, &host, &name));
        Ok(())
    }
}

/// For the shell to evaluate. Nothing in it needs quotes that has not got them.
fn exports(dir: &Path, host: &str, name: &str) -> String {
    let line = |variable: &str, value: &str| format!("export {variable}={}", quoted(value));
    [
        line("DOCKER_HOST", &format!("unix://{}", dir.join("docker.sock").display())),
        line("DINDPOOL_SESSION", name),
        line("DINDPOOL_SESSION_HOST", host),
        line("DINDPOOL_SESSION_DIR", &dir.display().to_string()),
    ]
    .join("\n")
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A new folder that this user alone can look into.
fn folder() -> anyhow::Result<PathBuf> {
    let parent = variable("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
    let parent = parent.unwrap_or_else(std::env::temp_dir);
    let name: String = Token::random()?.secret().chars().take(12).collect();
    let dir = parent.join(format!("dindpool-{name}"));
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

async fn end() -> anyhow::Result<()> {
    let dir = variable("DINDPOOL_SESSION_DIR")
        .context("this shell has no session (eval \"$(dindpool session)\")")?;
    let mut said = Vec::new();
    // It answers by ending; one that has ended already need not be told.
    if let Ok(mut control) = UnixStream::connect(Path::new(&dir).join("end.sock")).await {
        let _ = tokio::time::timeout(PATIENCE, control.read_to_end(&mut said)).await;
    }
    let host = variable("DINDPOOL_SESSION_HOST").unwrap_or_else(|| HOST.to_string());
    say(&format!(
        "export DOCKER_HOST={}\nunset DINDPOOL_SESSION DINDPOOL_SESSION_HOST DINDPOOL_SESSION_DIR",
        quoted(&host)
    ));
    Ok(())
}

/// A connection to the pool that belongs to the session.
async fn enter(host: &str, name: &str) -> anyhow::Result<Stream> {
    let entered = async {
        let connected = match (host.strip_prefix("tcp://"), host.strip_prefix("unix://")) {
            (Some(address), _) => {
                TcpStream::connect(address.trim_end_matches('/')).await.and_then(|stream| {
                    stream.set_nodelay(true)?;
                    Ok(Stream::Tcp(stream))
                })
            }
            (_, Some(path)) => UnixStream::connect(path).await.map(Stream::Unix),
            _ => anyhow::bail!("{host}: a pool is at tcp://HOST:PORT or unix:///PATH"),
        };
        let mut stream = connected.with_context(|| format!("no connection to {host}"))?;
        stream.write_all(hello(name).as_bytes()).await?;
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
        let _ = tokio::time::timeout(SAYING, stream.take(4096).read_to_end(&mut rest)).await;
        answer.extend_from_slice(&rest);
        let text = String::from_utf8_lossy(&answer);
        let said = text.split_once("\r\n\r\n").map_or("", |(_, body)| body.trim());
        anyhow::bail!("{host} has no sessions: is it a dindpool? It says: {}", super::status::plain(said))
    };
    tokio::time::timeout(PATIENCE, entered)
        .await
        .with_context(|| format!("no answer of {host} within 10 s"))?
}

impl Relay {
    async fn run(self) -> anyhow::Result<()> {
        let clients = UnixListener::bind(self.dir.join("docker.sock"))?;
        let control = UnixListener::bind(self.dir.join("end.sock"))?;
        let shell = start_time(self.pid);
        say("ready");
        let shutdown = super::signals()?;
        let shell_ends = async {
            while shell.is_some() && start_time(self.pid) == shell {
                tokio::time::sleep(LOOK).await;
            }
        };
        let serve = async {
            loop {
                match clients.accept().await {
                    Ok((client, _)) => {
                        let (host, name) = (self.host.clone(), self.name.clone());
                        tokio::spawn(async move { pass(client, &host, &name).await });
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
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
        Ok(())
    }
}

/// One client's connection, to the end of both directions.
async fn pass(mut client: UnixStream, host: &str, name: &str) {
    match enter(host, name).await {
        // What a client or the pool breaks off is broken off.
        Ok(mut pool) => drop(copy_bidirectional(&mut client, &mut pool).await),
        Err(error) => {
            let body = serde_json::json!({ "message": format!("{error:#}") }).to_string();
            let head = "HTTP/1.1 502 Bad Gateway\r\nContent-Type: application/json\r\nConnection: close\r\n";
            let answer = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
            let _ = client.write_all(answer.as_bytes()).await;
        }
    }
}

/// When a process started, in ticks since the machine did: its number alone may be another's later.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    // A zombie has ended.
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_evaluates_is_quoted() {
        let text = exports(Path::new("/tmp/a'b"), "tcp://h:1", "$(x)");
        assert!(text.contains("export DOCKER_HOST='unix:///tmp/a'\\''b/docker.sock'"), "{text}");
        assert!(text.contains("export DINDPOOL_SESSION='$(x)'"), "{text}");
    }

    #[test]
    fn a_process_is_known_by_when_it_started() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(start_time(own).is_some() && start_time(own) == start_time(own));
        assert_eq!(start_time(i32::MAX), None);
    }
}
