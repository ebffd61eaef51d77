//! `dindpool serve`: a pool of daemons that exist already.

use clap::Args;

use tokio::sync::watch;

use super::{Common, hangups, signals};
use crate::app::{self, Sockets};
use crate::config::Settings;
use crate::provision::fixed;
use crate::reload::Source;
use crate::telemetry;

#[derive(Debug, Clone, Args)]
pub struct Serve {
    #[command(flatten)]
    common: Common,
    /// A daemon: tcp://host:2375 or unix:///path; a name with several addresses is as many daemons; repeats
    #[arg(long, env = "DINDPOOL_DAEMONS", value_name = "URL", value_delimiter = ',')]
    daemon: Vec<String>,
}

impl Serve {
    pub async fn run(self) -> anyhow::Result<()> {
        let settings = self.settings()?;
        telemetry::start(settings.log_json, &settings.log_level);
        let sockets = Sockets::bind(&settings).await?;
        let shutdown = signals()?;
        sockets.announce();
        let (daemons, list) = watch::channel(settings.daemons.clone());
        let provisioner = fixed::start(list, fixed::Options::default());
        let read = Box::new(move || self.settings());
        let source = Source { read, hangups: hangups()?, daemons: Some(daemons) };
        app::run(settings, sockets, provisioner, source, shutdown, |_| Box::pin(async {})).await
    }

    fn settings(&self) -> anyhow::Result<Settings> {
        let mut raw = self.common.clone().raw()?;
        if !self.daemon.is_empty() {
            raw.daemons = Some(self.daemon.clone());
        }
        Ok(raw.validate(true)?)
    }
}
