//! Looks at the files of certificates again and again, and when it is asked to.

use std::sync::Arc;
use std::time::Duration;

use super::client::Client;
use super::server::{Reloaded, Server};
use crate::metrics::Metrics;
use crate::telemetry::unix_time;

/// Between two looks. The kubelet takes a minute to bring a Secret into a pod; nobody waits for these seconds.
const PERIOD: Duration = Duration::from_secs(5);

/// What has files.
#[derive(Debug, Clone, Default)]
pub struct Watched {
    /// The TLS of the listeners.
    pub servers: Vec<Arc<Server>>,
    /// That to the daemons.
    pub client: Option<Arc<Client>>,
}

/// Looks until it is aborted.
pub async fn run(watched: Watched, metrics: Metrics) {
    for server in &watched.servers {
        metrics.certificates(&server.expiries());
        if let Some(file) = server.expired(unix_time()) {
            tracing::error!(
                "{file} has expired, so no client takes it: renew it (`dindpool certs` renews what it made)"
            );
        }
    }
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !watched.servers.is_empty() || watched.client.is_some() {
        tick.tick().await;
        look(&watched, &metrics);
    }
}

/// Takes what is new in the files. The files are small, and read at once.
pub fn look(watched: &Watched, metrics: &Metrics) {
    let count = |result| metrics.certificate_reloads.with_label_values(&[result]).inc();
    match watched.client.as_ref().map(|client| client.reload()) {
        None | Some(Ok(false)) => {}
        Some(Ok(true)) => {
            count("replaced");
            tracing::info!("new certificates apply to new connections to daemons");
        }
        Some(Err(fault)) => {
            count("refused");
            tracing::error!("daemon_tls stays as it was: {fault}");
        }
    }
    for server in &watched.servers {
        match server.reload(unix_time()) {
            Reloaded::Same | Reloaded::StillRefused => {}
            Reloaded::Replaced => {
                count("replaced");
                let expiries = server.expiries();
                metrics.certificates(&expiries);
                for (file, _) in expiries {
                    tracing::info!(file, "new certificates apply to new connections");
                }
            }
            Reloaded::Refused(fault) => {
                count("refused");
                tracing::error!("the certificates stay as they were: {fault}");
            }
        }
    }
}
