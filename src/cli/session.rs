//! `eval "$(dindpool session)"`: a session of this shell's own, for every client, buildx included.
//!
//! A small process of its own ([`relay`]) listens on a Unix socket for as long as the shell lives, and passes each
//! connection on to the pool byte by byte. Before that it says once whose the connection is ([`crate::proxy::session`]), so
//! nothing depends on what the client can say. Whoever may open the socket's folder is in the session: that is this user.

mod relay;

use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Context;
use clap::{Args, Subcommand};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use self::relay::{Host, PATIENCE, READY, Relay, enter};
use crate::admin::token::Token;
use crate::app::say;

/// Where a pool listens unless something else is said.
const HOST: &str = "tcp://127.0.0.1:2375";
/// How many characters a key has that nobody chose.
const KEY: usize = 20;
/// What the shell's DOCKER_HOST was.
const BEFORE: &str = "DINDPOOL_SESSION_BEFORE";

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
    #[arg(long, value_name = "NAME", allow_hyphen_values = true)]
    key: Option<String>,
    /// The process with which it ends [default: the one that runs this command]
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
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
        let before = variable("DOCKER_HOST");
        // A session within a session is one of the same pool.
        let outer = variable("DINDPOOL_SESSION_HOST").or_else(|| before.clone());
        let host = self.pool.or(outer).unwrap_or_else(|| HOST.to_string());
        let host: Host = host.parse().map_err(anyhow::Error::msg)?;
        let name = match self.key {
            Some(name) => name,
            None => Token::random().context("no random numbers")?.secret().chars().take(KEY).collect(),
        };
        // It becomes a line of a request's head.
        anyhow::ensure!(!name.chars().any(char::is_control), "--key: it has a character that no name has");
        // Whatever is wrong is said here, where somebody reads it.
        drop(enter(&host, &name).await?);
        let pid = self.with_pid.unwrap_or_else(|| nix::unistd::getppid().as_raw());
        let dir = Folder::new()?;
        start(&dir.0, &host, &name, pid).await?;
        say(&exports(&dir.keep(), &host, &name, before.as_deref()));
        Ok(())
    }
}

/// Starts the process in the background, and waits until it listens.
async fn start(dir: &Path, host: &Host, name: &str, pid: i32) -> anyhow::Result<()> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(Relay::arguments(dir, host, pid)).current_dir("/");
    // Ctrl-C in the shell is not for it.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let mut relay =
        tokio::process::Command::from(command).spawn().context("the session's process does not start")?;
    let (input, output) = (relay.stdin.take(), relay.stdout.take());
    let said = async {
        input.context("no pipe")?.write_all(format!("{name}\n").as_bytes()).await?;
        let mut said = String::new();
        BufReader::new(output.context("no pipe")?).read_line(&mut said).await?;
        anyhow::Ok(said)
    };
    let said = timeout(PATIENCE, said).await.unwrap_or_else(|_| Ok("it says nothing".into()));
    let fault = match said {
        Ok(said) if said.trim_end() == READY => return Ok(()),
        Ok(said) if said.is_empty() => "it has ended at once".to_string(),
        Ok(said) => said.trim_end().to_string(),
        Err(fault) => format!("{fault:#}"),
    };
    let _ = relay.kill().await;
    anyhow::bail!("the session's process: {fault}")
}

/// For the shell to evaluate. Nothing in it needs quotes that has not got them.
fn exports(dir: &Path, host: &Host, name: &str, before: Option<&str>) -> String {
    [
        export("DOCKER_HOST", &format!("unix://{}", dir.join("docker.sock").display())),
        export("DINDPOOL_SESSION", name),
        export("DINDPOOL_SESSION_HOST", &host.to_string()),
        export("DINDPOOL_SESSION_DIR", &dir.display().to_string()),
        set(BEFORE, before),
    ]
    .join("\n")
}

/// What undoes that. The shell's clients go where they went before; never to the pool all at once, where a `docker system
/// prune` that was meant for this machine would be everybody's.
fn undone(before: Option<&str>) -> String {
    let own = "DINDPOOL_SESSION DINDPOOL_SESSION_HOST DINDPOOL_SESSION_DIR";
    format!("{}\nunset {own} {BEFORE}", set("DOCKER_HOST", before))
}

fn set(variable: &str, value: Option<&str>) -> String {
    value.map_or_else(|| format!("unset {variable}"), |value| export(variable, value))
}

fn export(variable: &str, value: &str) -> String {
    format!("export {variable}={}", quoted(value))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A folder that this user alone can look into; it is removed again unless it is kept.
struct Folder(PathBuf);

impl Folder {
    fn new() -> anyhow::Result<Self> {
        let parent = variable("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
        let parent = std::path::absolute(parent.unwrap_or_else(std::env::temp_dir))?;
        let name: String = Token::random()?.secret().chars().take(12).collect();
        let dir = parent.join(format!("dindpool-{name}"));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Folder(dir))
    }

    fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

async fn end() -> anyhow::Result<()> {
    let dir = variable("DINDPOOL_SESSION_DIR")
        .context("this shell has no session (eval \"$(dindpool session)\")")?;
    let mut said = Vec::new();
    // It answers by ending; one that has ended already need not be told.
    if let Ok(mut control) = UnixStream::connect(Path::new(&dir).join("end.sock")).await {
        let _ = timeout(PATIENCE, control.read_to_end(&mut said)).await;
    }
    say(&undone(variable(BEFORE).as_deref()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_evaluates_is_quoted() {
        let host = "tcp://h:1".parse().unwrap();
        let text = exports(Path::new("/tmp/a'b"), &host, "$(x)", Some("unix:///a b"));
        assert!(text.contains("export DOCKER_HOST='unix:///tmp/a'\\''b/docker.sock'"), "{text}");
        assert!(text.contains("export DINDPOOL_SESSION='$(x)'"), "{text}");
        assert!(text.contains("export DINDPOOL_SESSION_BEFORE='unix:///a b'"), "{text}");
    }

    #[test]
    fn the_end_gives_back_what_was_there_before() {
        assert!(undone(Some("tcp://h:1")).starts_with("export DOCKER_HOST='tcp://h:1'\n"));
        assert!(undone(None).starts_with("unset DOCKER_HOST\n"));
        // A session without a DOCKER_HOST before it, within one that had one.
        let host = "tcp://h:1".parse().unwrap();
        assert!(exports(Path::new("/d"), &host, "n", None).ends_with("\nunset DINDPOOL_SESSION_BEFORE"));
    }
}
