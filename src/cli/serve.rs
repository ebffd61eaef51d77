//! `dindpool serve`: a pool of daemons that exist already.

use clap::Args;

use super::{Common, signals};
use crate::app::{self, Sockets};
use crate::provision::fixed;
use crate::telemetry;

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    common: Common,
    /// A daemon: tcp://host:2375 or unix:///path; a name with several addresses is as many daemons; repeats
    #[arg(long, env = "DINDPOOL_DAEMONS", value_name = "URL", value_delimiter = ',')]
    daemon: Vec<String>,
}

impl Serve {
    pub async fn run(self) -> anyhow::Result<()> {
        let mut raw = self.common.raw()?;
        if !self.daemon.is_empty() {
            raw.daemons = Some(self.daemon);
        }
        let settings = raw.validate(true)?;
        telemetry::start(settings.log_json, &settings.log_level);
        let sockets = Sockets::bind(&settings).await?;
        let shutdown = signals()?;
        sockets.announce();
        let provisioner = fixed::start(settings.daemons.clone(), fixed::Options::default());
        app::run(settings, sockets, provisioner, shutdown, |_| Box::pin(async {})).await
    }
}
