//! `dindpool serve`: a pool of daemons that exist already, or of the pods of a Deployment.

use std::path::PathBuf;

use clap::Args;

use tokio::sync::watch;

use super::scale::Scale;
use super::{Common, hangups, signals};
use crate::app::{self, Sockets};
use crate::config::{Raw, Settings};
use crate::provision::{fixed, kubernetes};
use crate::reload::Source;
use crate::telemetry;
use crate::tls::{DaemonTls, RawTls};

#[derive(Debug, Clone, Args)]
pub struct Serve {
    #[command(flatten)]
    common: Common,
    /// A daemon: tcp://host:2375, tcp+tls://host:2376 or unix:///path; a name with several addresses is as many daemons; repeats
    #[arg(long, env = "DINDPOOL_DAEMONS", value_name = "URL", value_delimiter = ',')]
    daemon: Vec<String>,
    /// For daemons at tcp+tls://host:2376: a directory with the ca.pem of their certificates, and the cert.pem and key.pem
    /// that dindpool shows them
    #[arg(long, env = "DINDPOOL_DAEMON_TLS_DIR", value_name = "DIR")]
    daemon_tls_dir: Option<PathBuf>,
    /// The daemons are the pods of this Deployment, which is scaled: NAME, NAMESPACE/NAME or NAMESPACE/NAME:PORT
    #[arg(long, env = "DINDPOOL_KUBERNETES", value_name = "DEPLOYMENT", conflicts_with = "daemon")]
    kubernetes: Option<String>,
    /// TLS beside plain HTTP on every TCP listener: a directory with cert.pem, key.pem and perhaps the ca.pem of clients,
    /// which then need a certificate (or tls.crt, tls.key, ca.crt)
    #[arg(long, env = "DINDPOOL_TLS_DIR", value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// Where the preStop hooks of daemons' pods ask whether nothing runs there any more (deploy/prestop.sh): host:port
    #[arg(long, env = "DINDPOOL_PRESTOP", value_name = "ADDR")]
    prestop: Option<String>,
    /// File of the token that these hooks know, at least 16 characters
    #[arg(long, env = "DINDPOOL_PRESTOP_TOKEN_FILE", value_name = "FILE")]
    prestop_token_file: Option<PathBuf>,
    /// Of several proxies the holder of this Lease admits; needs POD_NAME and POD_IP [default: there is one proxy]
    #[arg(long, env = "DINDPOOL_LEASE", value_name = "NAME")]
    lease: Option<String>,
    /// How long the Lease lasts when its holder does not renew it [default: 15s]
    #[arg(long, env = "DINDPOOL_LEASE_DURATION", value_name = "TIME")]
    lease_duration: Option<String>,
    #[command(flatten)]
    scale: Scale,
}

impl Serve {
    pub async fn run(self) -> anyhow::Result<()> {
        let settings = self.settings()?;
        telemetry::start(settings.log_json, &settings.log_level);
        let sockets = Sockets::bind(&settings).await?;
        let shutdown = signals()?;
        sockets.announce();
        let (provisioner, daemons) = match &settings.kubernetes {
            Some(target) => (kubernetes::start(target.clone()).await.map_err(anyhow::Error::msg)?, None),
            None => {
                let (daemons, list) = watch::channel(settings.daemons.clone());
                (
                    fixed::start(
                        list,
                        fixed::Options { tls: settings.daemon_tls.clone(), ..fixed::Options::default() },
                    ),
                    Some(daemons),
                )
            }
        };
        let read = Box::new(move || self.settings());
        let source = Source { read, hangups: hangups()?, daemons };
        app::run(settings, sockets, provisioner, source, shutdown, |_| Box::pin(async {})).await
    }

    fn settings(&self) -> anyhow::Result<Settings> {
        let mut raw = self.common.clone().raw()?;
        if !self.daemon.is_empty() {
            raw.daemons = Some(self.daemon.clone());
        }
        let typed = Raw {
            kubernetes: self.kubernetes.clone(),
            tls: self.tls_dir.clone().map(RawTls::Directory),
            daemon_tls: self.daemon_tls_dir.as_deref().map(DaemonTls::of),
            prestop: self.prestop.clone(),
            prestop_token_file: self.prestop_token_file.clone(),
            lease: self.lease.clone(),
            lease_duration: self.lease_duration.clone(),
            ..self.scale.clone().raw()
        };
        raw = typed.or(raw);
        Ok(raw.validate(true)?)
    }
}
