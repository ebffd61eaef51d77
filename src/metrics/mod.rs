//! What is counted and measured, in one struct on a registry that is passed in. All names are in [`names`]; what
//! the pool is at the moment of a scrape is written from a [`Snapshot`].

pub mod document;
pub mod names;
pub mod snapshot;

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::engine::model::{Cause, Health, Refusal, State};
use names::{Kind, Metric, Values};
pub use snapshot::Snapshot;

/// The metrics of one proxy.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    wait: HistogramVec,
    queued: IntCounterVec,
    refusals: IntCounterVec,
    abandoned: IntCounterVec,
    work: IntCounterVec,
    tenants: Arc<RwLock<BTreeSet<String>>>,
    request_seconds: HistogramVec,
    requests: IntCounterVec,
    /// When certificates expire, by their file.
    pub certificate_expiry: IntGaugeVec,
    /// Client connections that are open, by listener kind (`tcp`, `unix`).
    pub connections: IntGaugeVec,
    /// Client connections accepted, by listener kind.
    pub accepted: IntCounterVec,
    /// Client connections refused, by the limit that they met.
    pub refused: IntCounterVec,
    /// TLS handshakes of clients, by result (`done`, `failed`).
    pub tls_handshakes: IntCounterVec,
    /// Clients that are refused for want of a good certificate (`certificate`) or of TLS (`plain`).
    pub tls_refused: IntCounterVec,
    /// Certificate files that had changed, by result (`replaced`, `refused`).
    pub certificate_reloads: IntCounterVec,
    /// PROXY headers, by result (`taken`, `refused`).
    pub proxy_headers: IntCounterVec,
    /// Connections whose peer had vanished while data was on its way.
    pub peers_lost: IntCounterVec,
    /// Ids that the daemons were asked for, by outcome.
    pub lookups: IntCounterVec,
    /// Panics of a connection or another task.
    pub panics: IntCounter,
    /// Errors that the proxy itself answered, by whose fault.
    pub errors: IntCounterVec,
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
    /// What the proxy adds before a request reaches its daemon, in seconds.
    pub added: Histogram,
    /// Leases that began.
    pub leases: IntCounter,
    /// Leases that were lost with their daemon.
    pub leases_lost: IntCounter,
    /// Leases whose containers ran unattended for longer than they may.
    pub leases_overdue: IntCounter,
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
    /// What the autoscaler has done, by step (`grow`, `cordon`, `uncordon`, `remove`) and outcome (`done`, `failed`).
    pub scale_steps: IntCounterVec,
    /// Daemons that went instead of the one that was chosen.
    pub wrong_removals: IntCounter,
}

/// Registers metrics as the list of names has them.
struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> prometheus::Result<C> {
        let made = made?;
        self.0.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn counter(&self, metric: &Metric) -> prometheus::Result<IntCounter> {
        self.register(IntCounter::new(metric.name, metric.help))
    }

    fn counters(&self, metric: &Metric) -> prometheus::Result<IntCounterVec> {
        let made = self.register(IntCounterVec::new(Opts::new(metric.name, metric.help), &labels(metric)))?;
        for values in combinations(metric, None) {
            made.with_label_values(&values);
        }
        Ok(made)
    }

    fn gauge(&self, metric: &Metric) -> prometheus::Result<IntGauge> {
        self.register(IntGauge::new(metric.name, metric.help))
    }

    fn gauges(&self, metric: &Metric) -> prometheus::Result<IntGaugeVec> {
        self.register(IntGaugeVec::new(Opts::new(metric.name, metric.help), &labels(metric)))
    }

    fn histogram(&self, metric: &Metric) -> prometheus::Result<Histogram> {
        self.register(Histogram::with_opts(buckets(metric)))
    }

    fn histograms(&self, metric: &Metric) -> prometheus::Result<HistogramVec> {
        let made = self.register(HistogramVec::new(buckets(metric), &labels(metric)))?;
        for values in combinations(metric, None) {
            made.with_label_values(&values);
        }
        Ok(made)
    }
}

fn labels(metric: &Metric) -> Vec<&'static str> {
    metric.labels.iter().map(|label| label.name).collect()
}

fn buckets(metric: &Metric) -> HistogramOpts {
    let opts = HistogramOpts::new(metric.name, metric.help);
    match metric.kind {
        Kind::Histogram(bounds) => opts.buckets(bounds.to_vec()),
        _ => opts,
    }
}

/// Every series that a metric can have, those of one tenant if it has a label for it; none while it is not known
/// what they are.
fn combinations<'a>(metric: &Metric, tenant: Option<&'a str>) -> Vec<Vec<&'a str>> {
    let mut all = vec![Vec::new()];
    for label in metric.labels {
        let values: Vec<&str> = match (label.values, tenant) {
            (Values::Words(words), _) => words.to_vec(),
            (Values::Tenant, Some(tenant)) => vec![tenant],
            _ => Vec::new(),
        };
        let with = |one: &Vec<&'a str>| {
            let one = one.clone();
            values.clone().into_iter().map(move |value| [one.as_slice(), &[value]].concat())
        };
        all = all.iter().flat_map(with).collect::<Vec<_>>();
    }
    all
}

impl Metrics {
    /// These certificates apply: files and dates of expiry.
    pub fn certificates(&self, expiries: &[(String, i64)]) {
        for (file, expires) in expiries {
            self.certificate_expiry.with_label_values(&[file]).set(*expires);
        }
    }

    /// Registers everything on `registry`.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn new(registry: Registry) -> prometheus::Result<Self> {
        let make = Maker(&registry);
        // Every request counts on these: finding a series by its labels hashes them, under a lock.
        let streams = make.gauges(&names::STREAMS)?;
        let bytes = make.counters(&names::BYTES)?;
        make.gauges(&names::BUILD_INFO)?.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Metrics {
            wait: make.histograms(&names::QUEUE_WAIT)?,
            queued: make.counters(&names::QUEUED)?,
            refusals: make.counters(&names::REFUSED)?,
            abandoned: make.counters(&names::QUEUE_ABANDONED)?,
            work: make.counters(&names::WORK)?,
            tenants: Arc::default(),
            request_seconds: make.histograms(&names::REQUEST_SECONDS)?,
            requests: make.counters(&names::REQUESTS)?,
            certificate_expiry: make.gauges(&names::CERTIFICATE_EXPIRY)?,
            connections: make.gauges(&names::CONNECTIONS)?,
            accepted: make.counters(&names::ACCEPTED)?,
            refused: make.counters(&names::CONNECTIONS_REFUSED)?,
            tls_handshakes: make.counters(&names::TLS_HANDSHAKES)?,
            tls_refused: make.counters(&names::TLS_REFUSED)?,
            certificate_reloads: make.counters(&names::CERTIFICATE_RELOADS)?,
            proxy_headers: make.counters(&names::PROXY_HEADERS)?,
            peers_lost: make.counters(&names::PEERS_LOST)?,
            lookups: make.counters(&names::LOOKUPS)?,
            panics: make.counter(&names::PANICS)?,
            errors: make.counters(&names::ERRORS)?,
            lease_changes: make.counters(&names::LEASE_CHANGES)?,
            lease_imports: make.counters(&names::LEASE_IMPORTS)?,
            lease_peers: make.gauge(&names::LEASE_PEERS)?,
            exchanges: streams.with_label_values(&["exchange"]),
            tunnels: streams.with_label_values(&["tunnel"]),
            bytes_up: bytes.with_label_values(&["up"]),
            bytes_down: bytes.with_label_values(&["down"]),
            added: make.histogram(&names::ADDED_SECONDS)?,
            leases: make.counter(&names::LEASES)?,
            leases_lost: make.counter(&names::LEASES_LOST)?,
            leases_overdue: make.counter(&names::LEASES_OVERDUE)?,
            ejections: make.counters(&names::EJECTIONS)?,
            shared_roots: make.counter(&names::SHARED_ROOTS)?,
            probes: make.counters(&names::PROBES)?,
            transitions: make.counters(&names::DAEMON_TRANSITIONS)?,
            reloads: make.counters(&names::CONFIG_RELOADS)?,
            reloaded: make.gauge(&names::CONFIG_RELOADED)?,
            reload_time: make.gauge(&names::CONFIG_READ)?,
            drains: make.counters(&names::DRAINS)?,
            notes: make.counters(&names::NOTES)?,
            prestops: make.counters(&names::PRESTOPS)?,
            retries: make.counter(&names::RETRIES)?,
            scale_steps: make.counters(&names::SCALE_STEPS)?,
            wrong_removals: make.counter(&names::WRONG_REMOVALS)?,
            registry,
        })
    }

    /// The exposition in the text format, with the pool as `snapshot` has it.
    pub fn render(&self, snapshot: &Snapshot) -> String {
        let mut out = String::with_capacity(16 << 10);
        // First the pool: a tenant that is met there has its counters from now on.
        let label = |tenant: &str| self.tenant(tenant);
        let known = || self.tenants.read().unwrap_or_else(PoisonError::into_inner).clone();
        snapshot.write(&mut out, label, known);
        // It fails only for a metric without series, which the registry leaves out.
        let _ = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut out);
        out
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
/// Nor is a label longer than this, in characters.
const TENANT_LENGTH: usize = 63;

impl Metrics {
    /// A request had to wait.
    pub fn queued(&self, tenant: &str) {
        self.queued.with_label_values(&[self.tenant(tenant).as_str()]).inc();
    }

    /// A request that waited was admitted.
    pub fn admitted(&self, tenant: &str, waited: Duration) {
        self.wait.with_label_values(&[self.tenant(tenant).as_str()]).observe(waited.as_secs_f64());
    }

    /// A request got no daemon.
    pub fn turned_away(&self, tenant: &str, refusal: &Refusal) {
        self.refusals.with_label_values(&[self.tenant(tenant).as_str(), refusal_word(refusal)]).inc();
    }

    /// A client left the queue.
    pub fn abandoned(&self, tenant: &str) {
        self.abandoned.with_label_values(&[self.tenant(tenant).as_str()]).inc();
    }

    /// Work got a daemon.
    pub fn worked(&self, tenant: &str) {
        self.work.with_label_values(&[self.tenant(tenant).as_str()]).inc();
    }

    /// A request is over.
    pub fn finished(&self, class: &str, outcome: &str, took: Duration) {
        self.requests.with_label_values(&[class, outcome]).inc();
        self.request_seconds.with_label_values(&[class]).observe(took.as_secs_f64());
    }

    /// The label of a tenant, whose series begin with the first time that it is heard of: to be called in time for
    /// those that are known from the start.
    pub fn tenant(&self, tenant: &str) -> String {
        let short: String = tenant.chars().take(TENANT_LENGTH).collect();
        if self.tenants.read().unwrap_or_else(PoisonError::into_inner).contains(&short) {
            return short;
        }
        let mut known = self.tenants.write().unwrap_or_else(PoisonError::into_inner);
        let label = if known.len() < TENANTS { short } else { "other".into() };
        if known.insert(label.clone()) {
            let counters = [
                (&self.queued, &names::QUEUED),
                (&self.refusals, &names::REFUSED),
                (&self.abandoned, &names::QUEUE_ABANDONED),
                (&self.work, &names::WORK),
            ];
            for (counter, metric) in counters {
                for values in combinations(metric, Some(&label)) {
                    counter.with_label_values(&values);
                }
            }
            self.wait.with_label_values(&[label.as_str()]);
        }
        label
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

/// The word for why a request gets no daemon, in labels.
pub fn refusal_word(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::QueueFull(_) => "queue-full",
        Refusal::TenantFull(_) => "tenant-full",
        Refusal::LongestWait(_) => "longest-wait",
        Refusal::NoDaemon(_) => "no-daemon",
        Refusal::SessionLost(_) => "session-lost",
        Refusal::ApiVersion(_) => "api-version",
        Refusal::NotFound(_) => "not-found",
        Refusal::Ambiguous(_) => "ambiguous",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::snapshot::tests::full;

    fn metrics() -> Metrics {
        Metrics::new(Registry::new()).unwrap()
    }

    /// The names of the families of an exposition.
    fn families(text: &str) -> Vec<&str> {
        text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect()
    }

    #[test]
    fn every_metric_of_the_list_is_there_once_and_no_other() {
        let metrics = metrics();
        metrics.certificate_expiry.with_label_values(&["tls.crt"]).set(1);
        metrics.connections.with_label_values(&["tcp"]).inc();
        let text = metrics.render(&full(3, 2));
        let mut found = families(&text);
        found.sort_unstable();
        let listed: Vec<&str> = names::ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(found, listed);
        for metric in names::ALL {
            assert!(text.contains(&format!("# HELP {} {}\n", metric.name, metric.help)), "{}", metric.name);
            assert!(text.contains(&format!("# TYPE {} {}\n", metric.name, metric.kind.as_str())));
        }
    }

    #[test]
    fn a_counter_of_words_begins_with_all_of_them_at_zero() {
        let text = metrics().render(&Snapshot::default());
        assert!(text.contains("dindpool_ejections_total{reason=\"writes\"} 0\n"), "{text}");
        assert!(text.contains("dindpool_requests_total{class=\"work\",outcome=\"daemon-failed\"} 0\n"));
        assert!(!text.contains("tenant="), "nobody knows of a tenant yet");
    }

    #[test]
    fn a_tenant_has_all_of_its_series_with_the_first_and_the_fifty_first_has_none_of_its_own() {
        let metrics = metrics();
        metrics.tenant("red");
        let text = metrics.render(&Snapshot::default());
        assert!(text.contains("dindpool_refused_total{reason=\"queue-full\",tenant=\"red\"} 0\n"), "{text}");
        for n in 0..100 {
            metrics.turned_away(&format!("t{n}"), &Refusal::QueueFull(String::new()));
        }
        let text = metrics.render(&Snapshot::default());
        assert!(text.contains("dindpool_refused_total{reason=\"queue-full\",tenant=\"t48\"} 1\n"));
        assert!(
            text.contains("dindpool_refused_total{reason=\"queue-full\",tenant=\"other\"} 51\n"),
            "{text}"
        );
        assert_eq!(metrics.tenant(&"x".repeat(70)), "other");
        assert_eq!(self::metrics().tenant(&"x".repeat(70)), "x".repeat(63));
    }

    #[test]
    fn a_thousand_daemons_and_fifty_tenants_stay_below_a_megabyte() {
        let metrics = metrics();
        let text = metrics.render(&full(1000, 60));
        assert!(text.len() < 1_000_000, "{} bytes", text.len());
        assert!(text.lines().filter(|l| l.starts_with("dindpool_daemon_up{")).count() == 1000);
    }
}
