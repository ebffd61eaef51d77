//! `eval "$(dindpool session)"`: a session of this shell's own, for every client, buildx included.
//!
//! A small process of its own ([`relay`]) listens on a Unix socket for as long as the shell lives, and passes each
//! connection on to the pool byte by byte. Before that it says once whose the connection is ([`crate::proxy::session`]), so
//! nothing depends on what the client can say. Whoever may open the socket's folder is in the session: that is this user.

mod context;
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

use self::context::{Environment, Found};
use self::relay::{Host, PATIENCE, Pool, READY, Relay, enter};
use crate::admin::token::Token;
use crate::app::say;

/// How many characters a key has that nobody chose.
const KEY: usize = 20;
/// What tells the shell's clients where their daemon is. Those of TLS would have them speak it to the session's socket.
const DOCKER: [&str; 4] = ["DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_TLS", "DOCKER_CERT_PATH"];

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
    /// The pool: tcp://host:port or unix:///path [default: DOCKER_HOST, else the docker context in use, else
    /// tcp://127.0.0.1:2375]
    #[arg(long, env = "DINDPOOL_POOL", value_name = "ADDR")]
    pool: Option<String>,
    /// For a pool with TLS: a directory with its ca.pem, and the cert.pem and key.pem that it wants [default:
    /// DOCKER_CERT_PATH with DOCKER_TLS_VERIFY, else those of the context]
    #[arg(long, env = "DINDPOOL_POOL_TLS_DIR", value_name = "DIR")]
    pool_tls_dir: Option<PathBuf>,
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
        let Found { host, tls } =
            context::find(self.pool, self.pool_tls_dir, &variable).map_err(anyhow::Error::msg)?;
        let host: Host = host.parse().map_err(anyhow::Error::msg)?;
        let tls = tls.map(std::path::absolute).transpose()?;
        let pool = Pool::new(host, tls).map_err(anyhow::Error::msg)?;
        let name = match self.key {
            Some(name) => name,
            None => Token::random().context("no random numbers")?.secret().chars().take(KEY).collect(),
        };
        // It becomes a line of a request's head.
        anyhow::ensure!(!name.chars().any(char::is_control), "--key: it has a character that no name has");
        // Whatever is wrong is said here, where somebody reads it.
        drop(enter(&pool, &name).await?);
        let pid = self.with_pid.unwrap_or_else(|| nix::unistd::getppid().as_raw());
        let dir = Folder::new()?;
        start(&dir.0, &pool, &name, pid).await?;
        say(&exports(&dir.keep(), &pool, &name, &variable));
        Ok(())
    }
}

/// Starts the process in the background, and waits until it listens.
async fn start(dir: &Path, pool: &Pool, name: &str, pid: i32) -> anyhow::Result<()> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(Relay::arguments(dir, pool, pid)).current_dir("/");
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
fn exports(dir: &Path, pool: &Pool, name: &str, environment: &impl Environment) -> String {
    let tls = pool.tls_dir().map(|tls| tls.display().to_string());
    let mut lines: Vec<String> =
        DOCKER.iter().map(|of| set(&before(of), environment.variable(of).as_deref())).collect();
    lines.extend([
        export("DOCKER_HOST", &format!("unix://{}", dir.join("docker.sock").display())),
        format!("unset {}", DOCKER[1..].join(" ")),
        export("DINDPOOL_SESSION", name),
        export("DINDPOOL_SESSION_HOST", &pool.host().to_string()),
        set("DINDPOOL_SESSION_TLS_DIR", tls.as_deref()),
        export("DINDPOOL_SESSION_DIR", &dir.display().to_string()),
    ]);
    lines.join("\n")
}

/// Where it stands what a variable was before the session.
fn before(variable: &str) -> String {
    variable.replacen("DOCKER", "DINDPOOL_SESSION_BEFORE", 1)
}

/// What undoes that. The shell's clients go where they went before; never to the pool all at once, where a `docker system
/// prune` that was meant for this machine would be everybody's.
fn undone(environment: &impl Environment) -> String {
    let mut lines: Vec<String> =
        DOCKER.iter().map(|of| set(of, environment.variable(&before(of)).as_deref())).collect();
    let own = "DINDPOOL_SESSION DINDPOOL_SESSION_HOST DINDPOOL_SESSION_TLS_DIR DINDPOOL_SESSION_DIR";
    lines.push(format!("unset {own} {}", DOCKER.map(before).join(" ")));
    lines.join("\n")
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
    say(&undone(&variable));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Pool {
        Pool::new("tcp://h:1".parse().unwrap(), None).unwrap()
    }

    fn none(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn what_a_shell_evaluates_is_quoted() {
        let environment = |name: &str| (name == "DOCKER_HOST").then(|| "unix:///a b".to_string());
        let text = exports(Path::new("/tmp/a'b"), &pool(), "$(x)", &environment);
        assert!(text.contains("export DOCKER_HOST='unix:///tmp/a'\\''b/docker.sock'"), "{text}");
        assert!(text.contains("export DINDPOOL_SESSION='$(x)'"), "{text}");
        assert!(text.contains("export DINDPOOL_SESSION_BEFORE_HOST='unix:///a b'"), "{text}");
    }

    #[test]
    fn the_end_gives_back_what_was_there_before() {
        for (of, value) in
            [("DOCKER_HOST", "tcp://h:1"), ("DOCKER_TLS_VERIFY", "1"), ("DOCKER_CERT_PATH", "/c")]
        {
            let begun =
                exports(Path::new("/d"), &pool(), "n", &|name: &str| (name == of).then(|| value.to_string()));
            assert!(begun.contains(&format!("export {}='{value}'", before(of))), "{begun}");
            let ended = undone(&|name: &str| (name == before(of)).then(|| value.to_string()));
            assert!(ended.contains(&format!("export {of}='{value}'\n")), "{ended}");
        }
        // A session without a DOCKER_HOST before it, within one that had one.
        let begun = exports(Path::new("/d"), &pool(), "n", &none);
        let ended = undone(&none);
        for of in DOCKER {
            assert!(begun.contains(&format!("unset {}\n", before(of))), "{begun}");
            assert!(ended.contains(&format!("unset {of}\n")), "{ended}");
        }
    }

    /// They would speak TLS to the session's socket.
    #[test]
    fn within_a_session_no_client_is_told_of_tls() {
        let begun = exports(Path::new("/d"), &pool(), "n", &|_: &str| Some("x".to_string()));
        assert!(begun.contains("\nunset DOCKER_TLS_VERIFY DOCKER_TLS DOCKER_CERT_PATH\n"), "{begun}");
    }
}
