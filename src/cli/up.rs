//! `dindpool up`: a local pool, from nothing to a `DOCKER_HOST` to paste.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use time::OffsetDateTime;
use tokio::sync::mpsc;

use super::admin::{DATA, TOKEN_FILE};
use super::scale::{self, Scale};
use super::{Common, hangups, signals};
use crate::admin::token::Token;
use crate::app::{self, Sockets, say};
use crate::config::{RawListener, Settings};
use crate::pool::Pool;
use crate::provision::{docker, process};
use crate::reload::Source;
use crate::telemetry;
use crate::tls::RawTls;
use crate::tls::make::{Order, context_line, make};

/// The name of the client whose certificate `--tls` makes.
const CLIENT: &str = "client";
/// How long its certificates last.
const CERTIFICATE_DAYS: u32 = 365;
/// Where the Unix socket is unless another is asked for.
const SOCKET: &str = "unix:///run/dindpool/dindpool.sock";

#[derive(Debug, Clone, Args)]
pub struct Up {
    #[command(flatten)]
    common: Common,
    /// TLS beside plain HTTP, with certificates that are made in DATA/certs if there are none
    #[arg(long, env = "DINDPOOL_UP_TLS")]
    tls: bool,
    /// How many daemons; --scale-min and --scale-max name a range instead
    #[arg(long, env = "DINDPOOL_UP_DAEMONS", default_value_t = 2, value_name = "N")]
    daemons: u32,
    /// Where the daemons keep images, containers and logs
    #[arg(long, env = "DINDPOOL_UP_DATA", default_value = DATA, value_name = "DIR")]
    data: PathBuf,
    /// What makes the daemons: process (dockerd of this machine, which needs root), docker (containers of the engine that
    /// DOCKER_HOST names, or of this machine's), or auto: docker where an engine answers and there is no dockerd
    #[arg(long, env = "DINDPOOL_UP_PROVISIONER", default_value = "auto", value_name = "KIND")]
    provisioner: Kind,
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
    /// docker: the image of the daemons
    #[arg(long, env = "DINDPOOL_UP_IMAGE", default_value = "docker:28-dind", value_name = "IMAGE")]
    image: String,
    /// docker: the pool's name on the engine; its containers, volumes and network begin with it
    #[arg(long, env = "DINDPOOL_UP_NAME", default_value = "dindpool", value_name = "NAME")]
    name: String,
    /// docker: processors of each daemon [default: all]
    #[arg(long, env = "DINDPOOL_UP_CPUS", value_name = "N", value_parser = cpus)]
    cpus: Option<f64>,
    /// docker: memory of each daemon, 8g [default: no limit]
    #[arg(long, env = "DINDPOOL_UP_MEMORY", value_name = "SIZE", value_parser = memory)]
    memory: Option<u64>,
    /// docker: a network of the engine that is there already [default: one of the pool's own]
    #[arg(long, env = "DINDPOOL_UP_NETWORK", value_name = "NAME")]
    network: Option<String>,
    /// docker: the port of each daemon
    #[arg(long, env = "DINDPOOL_UP_PORT", default_value_t = 2375, value_name = "PORT",
          value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// docker: let the daemons run on at the end; the next pool of this name adopts them
    #[arg(long, env = "DINDPOOL_UP_KEEP")]
    keep: bool,
    #[command(flatten)]
    scale: Scale,
}

/// What makes the daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Auto,
    Process,
    Docker,
}

fn cpus(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|n| (0.01..=10_000.0).contains(n));
    number.ok_or_else(|| "use a number of processors, 1.5".to_string())
}

fn memory(text: &str) -> Result<u64, String> {
    docker::bytes(text).ok_or_else(|| "use a size of 6 MiB at least, 512m or 8g".to_string())
}

impl Up {
    pub async fn run(self) -> anyhow::Result<()> {
        self.make_certificates()?;
        let settings = self.settings()?;
        telemetry::start(settings.log_json, &settings.log_level);
        let sockets = Sockets::bind(&settings).await?;
        let addresses = sockets.addresses();
        let (progress, lines) = mpsc::unbounded_channel();
        let (min, max) = (settings.pool.scale.min, settings.pool.scale.max);
        // From here on Ctrl-C stops in order: daemons are about to be started.
        let shutdown = signals()?;
        let host = docker::host();
        let provisioner = match self.kind(&host).await {
            Kind::Docker => {
                if let Some(own) = docker::own_listener(&host, &addresses) {
                    anyhow::bail!(
                        "the engine of the daemons would be this very pool: DOCKER_HOST={host} leads to its listener {own}; unset DOCKER_HOST, or set it to the engine's socket"
                    );
                }
                let mut options = docker::Options::new(&host);
                options.name.clone_from(&self.name);
                options.daemons = min as usize;
                options.most = (min != max).then_some(max as usize);
                options.image.clone_from(&self.image);
                (options.cpus, options.memory) = (self.cpus, self.memory);
                options.extra_args.clone_from(&self.dockerd_arg);
                options.network.clone_from(&self.network);
                (options.port, options.keep) = (self.port, self.keep);
                options.progress = Some(progress);
                docker::start(options).await.map_err(anyhow::Error::msg)?
            }
            Kind::Process | Kind::Auto => {
                let mut options = process::Options::new(&self.data);
                options.daemons = min as usize;
                options.most = (min != max).then_some(max as usize);
                options.dockerd.clone_from(&self.dockerd);
                options.extra_args.clone_from(&self.dockerd_arg);
                options.progress = Some(progress);
                process::start(options).await?
            }
        };
        sockets.announce();
        let client = self.certificates().map(|directory| directory.join(CLIENT));
        let beside = move |pool| -> app::Beside {
            Box::pin(announce(pool, lines, paste(&addresses, client), min, max))
        };
        let read = Box::new(move || {
            let settings = self.settings()?;
            let new = (settings.pool.scale.min, settings.pool.scale.max);
            // A fixed pool has nobody who would change it.
            anyhow::ensure!(
                min != max || new == (min, max),
                "daemons, scale_min, scale_max: a change needs a restart"
            );
            Ok(settings)
        });
        let source = Source { read, hangups: hangups()?, daemons: None };
        app::run(settings, sockets, provisioner, source, shutdown, beside).await
    }

    /// Where the certificates are that this pool makes by itself.
    fn certificates(&self) -> Option<PathBuf> {
        self.tls.then(|| self.data.join("certs"))
    }

    /// Makes them if there are none. They are the user's then: `dindpool certs` renews them.
    fn make_certificates(&self) -> anyhow::Result<()> {
        let Some(directory) = self.certificates().filter(|d| !d.join("server/cert.pem").exists()) else {
            return Ok(());
        };
        let hosts = vec!["localhost".to_string()];
        let order = Order { directory, hosts, client: CLIENT.into(), days: CERTIFICATE_DAYS };
        make(&order, OffsetDateTime::now_utc()).map(drop).map_err(anyhow::Error::msg)
    }

    async fn kind(&self, host: &str) -> Kind {
        let use_docker = match self.provisioner {
            Kind::Auto => !process::is_installed(&self.dockerd) && docker::answers(host).await,
            kind => kind == Kind::Docker,
        };
        if use_docker { Kind::Docker } else { Kind::Process }
    }

    /// The settings with what is different for a local pool.
    fn settings(&self) -> anyhow::Result<Settings> {
        let mut raw = self.scale.clone().raw().or(self.common.clone().raw()?);
        let (min, max) = scale::range(self.daemons, raw.scale_min, raw.scale_max);
        anyhow::ensure!(max > 0, "--daemons: a pool needs at least one");
        (raw.scale_min, raw.scale_max) = (Some(min), Some(max));
        if raw.listen.is_none() {
            std::fs::create_dir_all("/run/dindpool").ok();
            raw.listen = Some(
                [SOCKET, "tcp://127.0.0.1:2375"]
                    .map(|a| RawListener { address: a.into(), ..RawListener::default() })
                    .to_vec(),
            );
        }
        if let Some(directory) = self.certificates() {
            raw.tls = Some(RawTls::Directory(directory.join("server")));
        }
        // With limits of their own the daemons' slots follow those.
        if raw.slots.is_none() && self.cpus.is_none() && self.memory.is_none() {
            // The daemons share this machine's processors. At least four each: on a person's machine a container
            // that runs for days (a database beside the work) holds a slot and needs no processor.
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            raw.slots = u32::try_from(cpus / max as usize).ok().map(|n| n.max(4));
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
    paste: Vec<String>,
    min: u32,
    max: u32,
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
                if up >= min as usize {
                    announced = true;
                    let took = started.elapsed().as_secs_f64();
                    say(&match (min, max) {
                        (0, _) if up == 0 => format!("the pool is empty, and grows to {max} daemons with its work. Use it with"),
                        _ if min < max => format!("{up} daemons are ready after {took:.1} s; there will be {min} to {max}. Use the pool with"),
                        _ => format!("{up} daemons are ready after {took:.1} s. Use the pool with"),
                    });
                    paste.iter().for_each(|line| say(line));
                    say("Ctrl-C stops it.");
                }
            }
        }
    }
}

/// The lines for a client on this machine. With TLS there is one for it beside the others, which are served as well.
fn paste(addresses: &[String], client: Option<PathBuf>) -> Vec<String> {
    let near = |address: &String| {
        address.replace("tcp://0.0.0.0:", "tcp://127.0.0.1:").replace("tcp://[::]:", "tcp://[::1]:")
    };
    let mut lines: Vec<String> =
        addresses.iter().map(|a| format!("export DOCKER_HOST={}", near(a))).collect();
    if let Some(client) = client
        && let Some(address) = addresses.iter().find(|address| address.starts_with("tcp://"))
    {
        lines.push(context_line("dindpool", &near(address), &client));
    }
    lines
}
