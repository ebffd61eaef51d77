//! `dindpool up`: a local pool, from nothing to a `DOCKER_HOST` to paste.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use tokio::sync::mpsc;

use super::admin::{DATA, TOKEN_FILE};
use super::{Common, hangups, signals};
use crate::admin::token::Token;
use crate::app::{self, Sockets, say};
use crate::config::{RawListener, Settings};
use crate::pool::Pool;
use crate::provision::process;
use crate::reload::Source;
use crate::telemetry;

/// Where the Unix socket is unless another is asked for.
const SOCKET: &str = "unix:///run/dindpool/dindpool.sock";

#[derive(Debug, Clone, Args)]
pub struct Up {
    #[command(flatten)]
    common: Common,
    /// How many daemons
    #[arg(long, env = "DINDPOOL_UP_DAEMONS", default_value_t = 2, value_name = "N")]
    daemons: usize,
    /// Where the daemons keep images, containers and logs
    #[arg(long, env = "DINDPOOL_UP_DATA", default_value = DATA, value_name = "DIR")]
    data: PathBuf,
    /// The dockerd to run; repeats: daemon i runs the i-th, so that a pool may mix versions
    #[arg(
        long,
        env = "DINDPOOL_UP_DOCKERD",
        default_value = "dockerd",
        value_name = "PATH",
        value_delimiter = ','
    )]
    dockerd: Vec<PathBuf>,
    /// A further argument for every dockerd (--dockerd-arg=--registry-mirror=http://…); repeats
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    dockerd_arg: Vec<String>,
}

impl Up {
    pub async fn run(self) -> anyhow::Result<()> {
        let settings = self.settings()?;
        anyhow::ensure!(self.daemons > 0, "--daemons: a pool needs at least one");
        telemetry::start(settings.log_json, &settings.log_level);
        let sockets = Sockets::bind(&settings).await?;
        let addresses = sockets.addresses();
        let (progress, lines) = mpsc::unbounded_channel();
        let mut options = process::Options::new(&self.data);
        options.daemons = self.daemons;
        options.dockerd.clone_from(&self.dockerd);
        options.extra_args.clone_from(&self.dockerd_arg);
        options.progress = Some(progress);
        // From here on Ctrl-C stops in order: daemons are about to be started.
        let shutdown = signals()?;
        let provisioner = process::start(options).await?;
        sockets.announce();
        let daemons = self.daemons;
        let beside = move |pool| -> app::Beside { Box::pin(announce(pool, lines, addresses, daemons)) };
        let read = Box::new(move || self.settings());
        let source = Source { read, hangups: hangups()?, daemons: None };
        app::run(settings, sockets, provisioner, source, shutdown, beside).await
    }

    /// The settings with what is different for a local pool.
    fn settings(&self) -> anyhow::Result<Settings> {
        let mut raw = self.common.clone().raw()?;
        if raw.listen.is_none() {
            std::fs::create_dir_all("/run/dindpool").ok();
            raw.listen = Some(
                [SOCKET, "tcp://127.0.0.1:2375"]
                    .map(|a| RawListener { address: a.into(), ..RawListener::default() })
                    .to_vec(),
            );
        }
        if raw.slots.is_none() {
            // The daemons share this machine's processors. At least four each: on a person's machine a container
            // that runs for days (a database beside the work) holds a slot and needs no processor.
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            raw.slots = u32::try_from(cpus / self.daemons.max(1)).ok().map(|n| n.max(4));
        }
        // Ctrl-C at a terminal: nobody waits ten minutes for it.
        raw.shutdown_delay.get_or_insert_with(|| "0s".into());
        raw.shutdown_grace.get_or_insert_with(|| "5s".into());
        let warn = raw.log_level.is_none();
        let own_token = raw.admin_token_file.is_none();
        let mut settings = raw.validate(false)?;
        if own_token {
            // So that whoever runs the pool may cordon and drain without a word about it.
            std::fs::create_dir_all(&self.data)
                .with_context(|| format!("cannot make {}", self.data.display()))?;
            let token = Token::read_or_make(&self.data.join(TOKEN_FILE)).map_err(anyhow::Error::msg)?;
            settings.admin_token = Some(token);
        }
        if warn {
            // A person looks on: progress is enough, and what goes wrong.
            settings.log_level = "warn".into();
        }
        Ok(settings)
    }
}

/// Shows how the daemons come up, and in the end what to paste.
async fn announce(
    pool: Arc<Pool>,
    mut lines: mpsc::UnboundedReceiver<String>,
    addresses: Vec<String>,
    daemons: usize,
) {
    let started = Instant::now();
    let mut announced = false;
    loop {
        tokio::select! {
            line = lines.recv() => match line {
                Some(line) => say(&line),
                None => return,
            },
            () = tokio::time::sleep(Duration::from_millis(50)), if !announced => {
                let up = pool.status().daemons.iter().filter(|d| d.takes_sessions()).count();
                if up >= daemons {
                    announced = true;
                    say(&format!("{up} daemons are ready after {:.1} s. Use the pool with", started.elapsed().as_secs_f64()));
                    for address in &addresses {
                        say(&format!("export DOCKER_HOST={}", paste(address)));
                    }
                    say("Ctrl-C stops it.");
                }
            }
        }
    }
}

/// An address as a client on this machine uses it.
fn paste(address: &str) -> String {
    address.replace("tcp://0.0.0.0:", "tcp://127.0.0.1:").replace("tcp://[::]:", "tcp://[::1]:")
}
