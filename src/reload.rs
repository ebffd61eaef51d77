//! SIGHUP: the configuration is read again, with the flags and variables that the process was started with. What
//! can change while clients are served does; anything that cannot, and any fault, leaves the old one wholly in
//! place.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::signal::unix::Signal;
use tokio::sync::watch;

use crate::admin::Admin;
use crate::admin::prestop::Prestop;
use crate::config::{Faults, Settings};
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::provision::fixed::FixedAddress;
use crate::telemetry::{self, unix_time};
use crate::tls;

/// Where a configuration comes from, and how a change of it is asked for.
pub struct Source {
    /// Reads it once more.
    pub read: Box<dyn Fn() -> anyhow::Result<Settings> + Send>,
    /// Each SIGHUP.
    pub hangups: Signal,
    /// Takes the list of fixed daemons, if the pool has one.
    pub daemons: Option<watch::Sender<Vec<FixedAddress>>>,
}

/// What a reload changes.
pub struct Reload {
    /// Where the configuration comes from.
    pub source: Source,
    /// The one that applies.
    pub settings: Arc<RwLock<Settings>>,
    /// Takes its limits and times.
    pub pool: Arc<Pool>,
    /// Takes its token.
    pub admin: Arc<Admin>,
    /// Takes its token.
    pub prestop: Arc<Prestop>,
    /// Their certificates are looked at too.
    pub tls: tls::watch::Watched,
    /// Counts reloads.
    pub metrics: Metrics,
}

impl Reload {
    /// Reads the configuration again at each SIGHUP, until it is dropped.
    pub async fn run(mut self) {
        self.metrics.reloaded.set(1);
        self.metrics.reload_time.set(unix_time());
        while self.source.hangups.recv().await.is_some() {
            tls::watch::look(&self.tls, &self.metrics);
            match self.once() {
                Ok(()) => {
                    self.metrics.reloads.with_label_values(&["ok"]).inc();
                    self.metrics.reloaded.set(1);
                    self.metrics.reload_time.set(unix_time());
                    tracing::warn!("the configuration was read again and applies");
                }
                Err(error) => {
                    self.metrics.reloads.with_label_values(&["refused"]).inc();
                    self.metrics.reloaded.set(0);
                    tracing::error!("the configuration stays as it was: {error:#}");
                }
            }
        }
    }

    fn once(&self) -> anyhow::Result<()> {
        let new = (self.source.read)()?;
        let mut settings = self.settings.write().unwrap_or_else(PoisonError::into_inner);
        settings.may_become(&new)?;
        telemetry::set_level(&new.log_level);
        self.pool.configure(new.pool.clone());
        *self.admin.token.write().unwrap_or_else(PoisonError::into_inner) = new.admin_token.clone();
        *self.prestop.token.write().unwrap_or_else(PoisonError::into_inner) = new.prestop_token.clone();
        if let Some(daemons) = &self.source.daemons {
            daemons.send_if_modified(|old| {
                let changed = *old != new.daemons;
                old.clone_from(&new.daemons);
                changed
            });
        }
        *settings = new;
        Ok(())
    }
}

impl Settings {
    /// Whether a running process can take `new` in the place of these.
    ///
    /// # Errors
    /// All keys whose change needs a restart.
    pub fn may_become(&self, new: &Settings) -> Result<(), Faults> {
        let fixed = [
            ("listen", self.listen != new.listen),
            ("identify", self.identify != new.identify),
            ("admin", self.admin != new.admin),
            ("prestop", self.prestop != new.prestop),
            ("daemon_tls", self.daemon_tls != new.daemon_tls),
            ("kubernetes", self.kubernetes != new.kubernetes),
            ("lease, lease_duration", self.lease != new.lease),
            ("max_connections, max_connections_per_source", self.limits != new.limits),
            ("head_deadline", self.head_deadline != new.head_deadline),
            ("session_env", self.session_env != new.session_env),
            ("log_format", self.log_json != new.log_json),
        ];
        let changed = fixed.into_iter().filter(|(_, changed)| *changed);
        let faults: Vec<String> =
            changed.map(|(key, _)| format!("{key}: a change needs a restart")).collect();
        if faults.is_empty() { Ok(()) } else { Err(Faults(faults)) }
    }
}

#[cfg(test)]
mod tests {
    use tokio::signal::unix::{SignalKind, signal};

    use super::*;
    use crate::config::Raw;
    use crate::drain::Drain;

    fn settings(toml: &str) -> anyhow::Result<Settings> {
        Ok(Raw::from_toml(toml)?.validate(true)?)
    }

    const FIRST: &str = "daemons = ['tcp://10.0.0.1']\nslots = 2\nqueue_limit = 10\n";

    /// What a second configuration makes of a process that runs with the first, and what it says.
    fn reload(second: &'static str) -> (Reload, Result<(), String>, watch::Receiver<Vec<FixedAddress>>) {
        let first = settings(FIRST).unwrap();
        let (daemons, list) = watch::channel(first.daemons.clone());
        let metrics = Metrics::new(prometheus::Registry::new()).unwrap();
        let pool = Pool::new(first.pool.clone(), metrics.clone(), 1);
        let reload = Reload {
            source: Source {
                read: Box::new(|| settings(second)),
                hangups: signal(SignalKind::hangup()).unwrap(),
                daemons: Some(daemons),
            },
            settings: Arc::new(RwLock::new(first)),
            admin: Arc::new(Admin::new(pool.clone(), Drain::new(), None)),
            prestop: Arc::new(Prestop::new(pool.clone(), None)),
            pool,
            tls: tls::watch::Watched::default(),
            metrics,
        };
        let result = reload.once().map_err(|e| e.to_string());
        (reload, result, list)
    }

    #[tokio::test]
    async fn what_can_change_changes() {
        let second = "daemons = ['tcp://10.0.0.1', 'tcp://10.0.0.2']\nslots = 5\nqueue_limit = 7\nshutdown_grace = '1s'";
        let (reload, result, list) = reload(second);
        assert_eq!(result, Ok(()));
        let config = reload.pool.config();
        assert_eq!((config.slots, config.engine.queue_limit), (Some(5), 7));
        assert_eq!((list.borrow().len(), list.has_changed().unwrap()), (2, true));
        assert_eq!(reload.settings.read().unwrap().shutdown_grace.as_secs(), 1);
    }

    #[tokio::test]
    async fn a_bad_configuration_leaves_the_old_one_wholly_in_place() {
        for (second, words) in [
            ("daemons = ['tcp://10.0.0.2']\nslots = 0\nlog_format = 'xml'", ["slots", "log_format"]),
            (
                "daemons = ['tcp://10.0.0.2']\nslots = 5\nadmin = '127.0.0.1:1'\nlisten = ['unix:///x']",
                ["listen: a change needs a restart", "admin: a change needs a restart"],
            ),
            ("nonsense = 1\nslots = 'many'", ["nonsense", "slots"]),
        ] {
            let (reload, result, list) = reload(second);
            let said = result.unwrap_err();
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
            let config = reload.pool.config();
            assert_eq!((config.slots, config.engine.queue_limit), (Some(2), 10));
            assert!(!list.has_changed().unwrap());
            assert_eq!(reload.settings.read().unwrap().pool.slots, Some(2));
        }
    }
}
