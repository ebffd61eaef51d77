//! Every metric, in one struct on a registry that is passed in. Names in one place, base units, bounded labels:
//! a label is a daemon's name or one of a fixed set of words, never a key, a path or an address of a client.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::engine::autoscaler::Reason;
use crate::engine::model::{Cause, Health, State};
use crate::pool::scaler::ScalerStatus;
use crate::pool::status::Status;

/// The metrics of one proxy.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    daemons: IntGaugeVec,
    daemon_up: IntGaugeVec,
    daemon_cordoned: IntGaugeVec,
    daemon_refused: IntGaugeVec,
    slots: IntGaugeVec,
    slots_used: IntGaugeVec,
    strangers: IntGaugeVec,
    daemon_sessions: IntGaugeVec,
    sessions: IntGauge,
    waiting: IntGaugeVec,
    wait: HistogramVec,
    /// Requests that had to wait, by tenant.
    queued: IntCounterVec,
    /// Requests that were refused because the queue was full or the longest wait was over.
    pub queue_refused: IntCounter,
    /// Tickets whose client left.
    pub queue_abandoned: IntCounter,
    tenants: Arc<Mutex<BTreeSet<String>>>,
    /// Held while the gauges of the pool are set and read: two scrapes at once would add up.
    rendering: Arc<Mutex<()>>,
    images: IntGauge,
    /// Client connections that are open, by listener kind (`tcp`, `unix`).
    pub connections: IntGaugeVec,
    /// Client connections accepted, by listener kind.
    pub accepted: IntCounterVec,
    /// Client connections refused, by the limit that they met.
    pub refused: IntCounterVec,
    /// Connections whose peer had vanished while data was on its way.
    pub peers_lost: IntCounterVec,
    /// Ids that the daemons were asked for, by outcome.
    pub lookups: IntCounterVec,
    /// Panics of a connection or another task.
    pub panics: IntCounter,
    /// Requests finished, by class and outcome.
    pub requests: IntCounterVec,
    /// Errors that the proxy itself answered, by whose fault.
    pub errors: IntCounterVec,
    /// 1 while this proxy holds the Lease.
    pub lease_holder: IntGauge,
    /// How often this proxy has begun and ended to admit, by which.
    pub lease_changes: IntCounterVec,
    /// What it has taken over, by kind and where from.
    pub lease_imports: IntCounterVec,
    /// Other proxies that are connected.
    pub lease_peers: IntGauge,
    /// Exchanges that are open.
    pub exchanges: IntGauge,
    /// Tunnels that are open.
    pub tunnels: IntGauge,
    /// Bytes relayed to daemons.
    pub bytes_up: IntCounter,
    /// Bytes relayed to clients.
    pub bytes_down: IntCounter,
    /// What the proxy adds before a request reaches its daemon: key, admission, connection.
    pub added: Histogram,
    /// Leases that began.
    pub leases: IntCounter,
    /// Leases that were lost with their daemon.
    pub leases_lost: IntCounter,
    /// Leases whose containers ran unattended for longer than they may.
    pub leases_overdue: IntCounter,
    open_slots: IntGaugeVec,
    back_off: GaugeVec,
    latency: GaugeVec,
    /// Times that a daemon was ejected, by why.
    pub ejections: IntCounterVec,
    /// Times that a daemon was refused because another one uses its data root.
    pub shared_roots: IntCounter,
    /// Probes, by kind (`info`, `deep`) and outcome (`answered`, `failed`, `refused`, `slow`, `unsupported`,
    /// `unreached`).
    pub probes: IntCounterVec,
    /// Changes of a daemon's standing, by what it became.
    pub transitions: IntCounterVec,
    /// Reloads of the configuration, by `result` (`ok`, `refused`).
    pub reloads: IntCounterVec,
    /// Whether the last one was taken.
    pub reloaded: IntGauge,
    /// When the configuration that applies was read.
    pub reload_time: IntGauge,
    /// Drains that ended, by how (`idle`, `cut`, `uncordoned`).
    pub drains: IntCounterVec,
    /// Notes for others to read, by kind (`mark`, `event`) and outcome (`done`, `failed`, `forbidden`).
    pub notes: IntCounterVec,
    /// Answers to preStop hooks, by outcome (`drained`, `busy`, `unknown`, `refused`).
    pub prestops: IntCounterVec,
    /// Requests that were tried on another daemon because the first could not be reached.
    pub retries: IntCounter,
    desired: IntGauge,
    replicas: IntGauge,
    scale_reason: IntGaugeVec,
    startup: GaugeVec,
    /// What the autoscaler has done, by step (`grow`, `cordon`, `uncordon`, `remove`) and outcome (`done`, `failed`).
    pub scale_steps: IntCounterVec,
}

impl Metrics {
    /// Another proxy decides: what this one decided last is not told as if it were still so.
    pub fn not_scaled(&self) {
        self.desired.set(0);
        self.replicas.set(0);
        self.scale_reason.reset();
    }

    /// What the autoscaler has decided.
    pub fn scaled(&self, status: &ScalerStatus) {
        self.desired.set(status.desired.into());
        self.replicas.set(status.replicas.unwrap_or(0).into());
        self.startup.with_label_values(&[] as &[&str]).set(status.startup.unwrap_or(0.0));
        for reason in Reason::ALL {
            self.scale_reason.with_label_values(&[reason.as_str()]).set(i64::from(reason == status.reason));
        }
    }

    /// Registers everything on `registry`.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn new(registry: Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| -> prometheus::Result<IntGauge> {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntGaugeVec> {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let float_gauges = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<GaugeVec> {
            let metric = GaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counter = |name: &str, help: &str| -> prometheus::Result<IntCounter> {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntCounterVec> {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let added = Histogram::with_opts(
            HistogramOpts::new(
                "dindpool_added_seconds",
                "Time from a request's head to its daemon: session key, admission, connection.",
            )
            .buckets(vec![
                0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25, 1.0, 10.0,
                60.0, 600.0, 3600.0,
            ]),
        )?;
        registry.register(Box::new(added.clone()))?;
        let wait = HistogramVec::new(
            HistogramOpts::new("dindpool_queue_wait_seconds", "How long admitted tickets have waited.")
                .buckets(vec![
                    0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0,
                ]),
            &["tenant"],
        )?;
        registry.register(Box::new(wait.clone()))?;
        // Every request counts on these: finding a series by its labels hashes them, under a lock.
        let streams = gauges("dindpool_streams", "Exchanges and tunnels that are open.", &["kind"])?;
        let bytes =
            counters("dindpool_bytes_total", "Bytes relayed, up to daemons or down.", &["direction"])?;
        let info = gauges("dindpool_build_info", "Always 1; the labels say what runs.", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Metrics {
            daemons: gauges("dindpool_daemons", "Daemons by state and health.", &["state", "health"])?,
            daemon_up: gauges("dindpool_daemon_up", "Whether a daemon takes sessions.", &["daemon"])?,
            daemon_cordoned: gauges(
                "dindpool_daemon_cordoned",
                "Whether a daemon is cordoned or drained.",
                &["daemon"],
            )?,
            daemon_refused: gauges(
                "dindpool_daemon_refused",
                "Whether a daemon is refused because it does not belong into this pool: API versions, data root.",
                &["daemon"],
            )?,
            slots: gauges("dindpool_slots", "Slots of a daemon.", &["daemon"])?,
            strangers: gauges(
                "dindpool_daemon_strangers",
                "Compose projects and lone containers that run on a daemon without a session.",
                &["daemon"],
            )?,
            slots_used: gauges("dindpool_slots_used", "Slots of a daemon that are in use.", &["daemon"])?,
            daemon_sessions: gauges(
                "dindpool_daemon_sessions",
                "Sessions with a lease on a daemon.",
                &["daemon"],
            )?,
            sessions: gauge("dindpool_sessions", "Sessions with a lease.")?,
            waiting: gauges("dindpool_queue_waiting", "Tickets that wait for a slot.", &["tenant"])?,
            wait,
            queued: counters("dindpool_queued_total", "Requests that had to wait for a slot.", &["tenant"])?,
            queue_refused: counter(
                "dindpool_queue_refused_total",
                "Requests refused because the queue was full or the longest wait was over.",
            )?,
            queue_abandoned: counter(
                "dindpool_queue_abandoned_total",
                "Tickets whose client left the queue.",
            )?,
            tenants: Arc::default(),
            rendering: Arc::default(),
            images: gauge("dindpool_image_references", "Image references that the pool knows.")?,
            connections: gauges("dindpool_connections", "Open client connections.", &["listener"])?,
            accepted: counters("dindpool_connections_total", "Client connections accepted.", &["listener"])?,
            refused: counters(
                "dindpool_connections_refused_total",
                "Client connections refused because there were too many, by the limit that they met.",
                &["reason"],
            )?,
            peers_lost: counters(
                "dindpool_peers_lost_total",
                "Connections ended because their peer acknowledged nothing for 20 s, by what the peer is.",
                &["side"],
            )?,
            lookups: counters(
                "dindpool_lookups_total",
                "Full ids that no list had and the daemons were asked for, by outcome.",
                &["outcome"],
            )?,
            panics: counter(
                "dindpool_panics_total",
                "Panics; each ended the connection or task that it happened in, and is a fault of dindpool.",
            )?,
            requests: counters(
                "dindpool_requests_total",
                "Requests finished, by class and by how they ended.",
                &["class", "outcome"],
            )?,
            errors: counters(
                "dindpool_errors_total",
                "Errors that the proxy itself answered, by whose fault they were.",
                &["fault"],
            )?,
            exchanges: streams.with_label_values(&["exchange"]),
            tunnels: streams.with_label_values(&["tunnel"]),
            bytes_up: bytes.with_label_values(&["up"]),
            bytes_down: bytes.with_label_values(&["down"]),
            leases: counter("dindpool_leases_total", "Leases that began.")?,
            leases_overdue: counter(
                "dindpool_leases_overdue_total",
                "Leases whose containers ran unattended for longer than container_lease.",
            )?,
            leases_lost: counter("dindpool_leases_lost_total", "Leases lost with their daemon.")?,
            probes: counters("dindpool_probes_total", "Probes by kind and outcome.", &["kind", "outcome"])?,
            open_slots: gauges(
                "dindpool_daemon_open_slots",
                "Slots of a daemon that are open: fewer than it has during its slow start.",
                &["daemon"],
            )?,
            back_off: float_gauges(
                "dindpool_daemon_back_off_seconds",
                "How long an ejected daemon must be well before it gets sessions again.",
                &["daemon"],
            )?,
            latency: float_gauges(
                "dindpool_daemon_info_seconds",
                "How long a daemon takes to answer /info, smoothed.",
                &["daemon"],
            )?,
            ejections: counters(
                "dindpool_ejections_total",
                "Times that a daemon was ejected, by why.",
                &["reason"],
            )?,
            shared_roots: counter(
                "dindpool_shared_data_roots_total",
                "Times that a daemon was refused because another one uses its data root.",
            )?,
            transitions: counters(
                "dindpool_daemon_transitions_total",
                "Changes of a daemon's state or health, by what it became.",
                &["became"],
            )?,
            reloads: counters("dindpool_config_reloads_total", "Reloads of the configuration.", &["result"])?,
            reloaded: gauge(
                "dindpool_config_last_reload_successful",
                "Whether the configuration that was read last is the one that applies.",
            )?,
            reload_time: gauge(
                "dindpool_config_read_timestamp_seconds",
                "When the configuration that applies was read, in Unix time.",
            )?,
            drains: counters("dindpool_drains_total", "Drains that ended, by how.", &["result"])?,
            lease_holder: gauge("dindpool_lease_holder", "1 while this proxy of several admits.")?,
            lease_changes: counters(
                "dindpool_lease_changes_total",
                "How often this proxy has begun or ended to admit.",
                &["change"],
            )?,
            lease_imports: counters(
                "dindpool_lease_imports_total",
                "What this proxy took over when it began to admit, by kind.",
                &["kind"],
            )?,
            lease_peers: gauge(
                "dindpool_lease_peers",
                "Other proxies that are connected to this one to ask it.",
            )?,
            desired: gauge("dindpool_scale_desired", "Daemons that there should be, by the autoscaler.")?,
            replicas: gauge("dindpool_scale_replicas", "Daemons that the provisioner was asked for.")?,
            scale_reason: gauges(
                "dindpool_scale_reason",
                "1 for why the autoscaler does nothing else now.",
                &["reason"],
            )?,
            startup: float_gauges(
                "dindpool_daemon_startup_seconds",
                "How long a daemon takes to start here, smoothed; 0 until one has.",
                &[],
            )?,
            scale_steps: counters(
                "dindpool_scale_steps_total",
                "What the autoscaler has done.",
                &["step", "outcome"],
            )?,
            notes: counters(
                "dindpool_notes_total",
                "Annotations and Events written for others to read.",
                &["kind", "outcome"],
            )?,
            prestops: counters(
                "dindpool_prestop_answers_total",
                "Answers to preStop hooks of daemons' pods, by what they said.",
                &["outcome"],
            )?,
            retries: counter(
                "dindpool_retries_total",
                "Requests tried on another daemon because the first was not reached.",
            )?,
            added,
            registry,
        })
    }

    /// The exposition in the text format, with the gauges of the pool as `status` has them.
    pub fn render(&self, status: &Status) -> String {
        let _one = self.rendering.lock().unwrap_or_else(PoisonError::into_inner);
        self.daemons.reset();
        // A daemon that has gone leaves no series behind.
        let gauges = [
            &self.daemon_up,
            &self.daemon_cordoned,
            &self.daemon_refused,
            &self.slots,
            &self.slots_used,
            &self.strangers,
            &self.daemon_sessions,
            &self.open_slots,
        ];
        gauges.iter().for_each(|gauge| gauge.reset());
        self.back_off.reset();
        self.latency.reset();
        for state in ["starting", "ready", "draining"] {
            for health in ["healthy", "ejected"] {
                self.daemons.with_label_values(&[state, health]).set(0);
            }
        }
        for daemon in &status.daemons {
            let up = daemon.takes_sessions();
            self.daemons.with_label_values(&[state_word(daemon.state), health_word(daemon.health)]).inc();
            let id = &[daemon.id.as_str()];
            self.daemon_up.with_label_values(id).set(i64::from(up));
            self.daemon_cordoned.with_label_values(id).set(i64::from(daemon.cordoned));
            self.daemon_refused.with_label_values(id).set(i64::from(daemon.refused));
            self.slots.with_label_values(id).set(i64::from(daemon.slots));
            self.slots_used.with_label_values(id).set(i64::from(daemon.used));
            self.strangers.with_label_values(id).set(i64::from(daemon.strangers));
            self.daemon_sessions.with_label_values(id).set(daemon.sessions as i64);
            self.open_slots.with_label_values(id).set(i64::from(daemon.open_slots));
            self.back_off.with_label_values(id).set(daemon.back_off);
            if let Some(latency) = daemon.latency {
                self.latency.with_label_values(id).set(latency);
            }
        }
        self.sessions.set(status.sessions.len() as i64);
        self.waiting.reset();
        self.waiting.with_label_values(&["default"]).set(0);
        for ticket in &status.queue.tickets {
            self.waiting.with_label_values(&[self.tenant(&ticket.tenant).as_str()]).inc();
        }
        self.images.set(status.images as i64);
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

/// Counts one thing that is open, until it is dropped: where it ends or where its task is cut.
#[derive(Debug)]
pub struct Counted(IntGauge);

impl Counted {
    /// One more.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Counted(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Tenants come from paths that clients choose: beyond this many they share the label `other`.
const TENANTS: usize = 50;

impl Metrics {
    /// A request had to wait.
    pub fn queued(&self, tenant: &str) {
        self.queued.with_label_values(&[self.tenant(tenant).as_str()]).inc();
    }

    /// A request that waited was admitted.
    pub fn admitted(&self, tenant: &str, waited: Duration) {
        self.wait.with_label_values(&[self.tenant(tenant).as_str()]).observe(waited.as_secs_f64());
    }

    fn tenant(&self, tenant: &str) -> String {
        let mut known = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if known.contains(tenant) || known.len() < TENANTS {
            known.insert(tenant.to_string());
            return tenant.to_string();
        }
        "other".into()
    }
}

/// The word for a state, in labels and tables.
pub fn state_word(state: State) -> &'static str {
    match state {
        State::Starting => "starting",
        State::Ready => "ready",
        State::Draining => "draining",
        State::Gone => "gone",
    }
}

/// The word for a health, in labels and tables.
pub fn health_word(health: Health) -> &'static str {
    match health {
        Health::Healthy => "healthy",
        Health::Ejected => "ejected",
    }
}

/// The word for why a daemon was ejected, in labels.
pub fn cause_word(cause: Cause) -> &'static str {
    match cause {
        Cause::Refused => "refused",
        Cause::Silent => "silent",
        Cause::Writes => "writes",
    }
}
