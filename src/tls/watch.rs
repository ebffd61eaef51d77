//! Looks at the files of certificates again and again, and when it is asked to.

use std::sync::Arc;
use std::time::Duration;

use super::server::{Reloaded, Server};
use crate::metrics::Metrics;
use crate::telemetry::unix_time;

/// Between two looks. The kubelet takes a minute to bring a Secret into a pod; nobody waits for these seconds.
const PERIOD: Duration = Duration::from_secs(5);

/// Looks until it is aborted.
pub async fn run(servers: Vec<Arc<Server>>, metrics: Metrics) {
    for server in &servers {
        metrics.certificates(&server.expiries());
    }
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !servers.is_empty() {
        tick.tick().await;
        look(&servers, &metrics);
    }
}

/// Takes what is new in the files. The files are small, and read at once.
pub fn look(servers: &[Arc<Server>], metrics: &Metrics) {
    for server in servers {
        match server.reload(unix_time()) {
            Reloaded::Same | Reloaded::StillRefused => {}
            Reloaded::Replaced => {
                metrics.certificate_reloads.with_label_values(&["replaced"]).inc();
                let expiries = server.expiries();
                metrics.certificates(&expiries);
                for (file, _) in expiries {
                    tracing::info!(file, "new certificates apply to new connections");
                }
            }
            Reloaded::Refused(fault) => {
                metrics.certificate_reloads.with_label_values(&["refused"]).inc();
                tracing::error!("the certificates stay as they were: {fault}");
            }
        }
    }
}
