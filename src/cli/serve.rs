//! `dindpool serve`: a pool of daemons that exist already, or of the pods of a Deployment.

use clap::Args;

use tokio::sync::watch;

use super::{Common, hangups, signals};
use crate::app::{self, Sockets};
use crate::config::{Raw, Settings};
use crate::provision::{fixed, kubernetes};
use crate::reload::Source;
use crate::telemetry;

#[derive(Debug, Clone, Args)]
pub struct Serve {
    #[command(flatten)]
    common: Common,
    /// A daemon: tcp://host:2375 or unix:///path; a name with several addresses is as many daemons; repeats
    #[arg(long, env = "DINDPOOL_DAEMONS", value_name = "URL", value_delimiter = ',')]
    daemon: Vec<String>,
    /// The daemons are the pods of this Deployment, which is scaled: NAME, NAMESPACE/NAME or NAMESPACE/NAME:PORT
    #[arg(long, env = "DINDPOOL_KUBERNETES", value_name = "DEPLOYMENT", conflicts_with = "daemon")]
    kubernetes: Option<String>,
    /// Of several proxies the holder of this Lease admits; needs POD_NAME and POD_IP [default: there is one proxy]
    #[arg(long, env = "DINDPOOL_LEASE", value_name = "NAME")]
    lease: Option<String>,
    /// How long the Lease lasts when its holder does not renew it [default: 15s]
    #[arg(long, env = "DINDPOOL_LEASE_DURATION", value_name = "TIME")]
    lease_duration: Option<String>,
    #[command(flatten)]
    scale: Scale,
}

/// How many daemons there are to be.
#[derive(Debug, Clone, Args)]
struct Scale {
    /// on, or off: somebody else changes the number of daemons (HPA, KEDA), and dindpool only tells it [default: on]
    #[arg(long, env = "DINDPOOL_SCALER", value_name = "WORD")]
    scaler: Option<String>,
    /// The least number of daemons; with 0 an idle pool is empty [default: 1]
    #[arg(long, env = "DINDPOOL_SCALE_MIN", value_name = "N")]
    scale_min: Option<u32>,
    /// The greatest number of daemons [default: 10]
    #[arg(long, env = "DINDPOOL_SCALE_MAX", value_name = "N")]
    scale_max: Option<u32>,
    /// What is kept free for the next builds: a number of slots, or a share of those in use, 20% [default: 0]
    #[arg(long, env = "DINDPOOL_SCALE_SPARE", value_name = "SPARE")]
    scale_spare: Option<String>,
    /// How many daemons are added at a time [default: 4]
    #[arg(long, env = "DINDPOOL_SCALE_STEP", value_name = "N")]
    scale_step: Option<u32>,
    /// For how long fewer daemons must have been enough before one goes [default: 5m]
    #[arg(long, env = "DINDPOOL_SCALE_STABILISATION", value_name = "TIME")]
    scale_stabilisation: Option<String>,
    /// How long a daemon may take to start before nobody waits for it [default: 2m]
    #[arg(long, env = "DINDPOOL_SCALE_STARTUP", value_name = "TIME")]
    scale_startup: Option<String>,
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
                (fixed::start(list, fixed::Options::default()), Some(daemons))
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
        let Scale {
            scaler,
            scale_min,
            scale_max,
            scale_spare,
            scale_step,
            scale_stabilisation,
            scale_startup,
        } = self.scale.clone();
        let typed = Raw {
            kubernetes: self.kubernetes.clone(),
            lease: self.lease.clone(),
            lease_duration: self.lease_duration.clone(),
            scaler,
            scale_min,
            scale_max,
            scale_spare,
            scale_step,
            scale_stabilisation,
            scale_startup,
            ..Raw::default()
        };
        raw = typed.or(raw);
        Ok(raw.validate(true)?)
    }
}
