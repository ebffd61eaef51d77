//! Every metric: its name, what it counts, its labels with the words that they may have. The registry, the
//! exposition, the table in `docs/metrics.md` and the tests of dashboard and rules are made from this list.

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only grows, until the process ends.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts what is at most so much, by the bounds of its buckets (in the metric's unit).
    Histogram(&'static [f64]),
}

impl Kind {
    /// The word of the text format.
    pub fn as_str(self) -> &'static str {
        match self {
            Counter => "counter",
            Gauge => "gauge",
            Histogram(_) => "histogram",
        }
    }
}

/// What a label may say. All of it is bounded: nothing that a client chooses, except the names of a few tenants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// One of these words. A counter has a series for each of them from the start: a rate or an increase has missed
    /// the first count of a series that began with it.
    Words(&'static [&'static str]),
    /// The name of a daemon.
    Daemon,
    /// The name of one of the first tenants, or `other`.
    Tenant,
    /// A version.
    Version,
    /// The file of a certificate, as the configuration names it.
    Certificate,
}

/// A label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// What it may say.
    pub values: Values,
    /// What that means, for the document.
    pub note: &'static str,
}

/// A metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metric {
    /// Its name, with unit and `_total` as Prometheus wants them.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [Label],
    /// What it counts, in a sentence.
    pub help: &'static str,
}

const fn words(name: &'static str, words: &'static [&'static str], note: &'static str) -> Label {
    Label { name, values: Values::Words(words), note }
}

const DAEMON: Label = Label { name: "daemon", values: Values::Daemon, note: "a daemon's name" };
const TENANT: Label = Label {
    name: "tenant",
    values: Values::Tenant,
    note: "the names of the first 50 tenants, `other` for the rest",
};
const CERTIFICATE: Label = Label {
    name: "certificate",
    values: Values::Certificate,
    note: "a certificate's file, as it is configured",
};
const VERSION: Label = Label { name: "version", values: Values::Version, note: "dindpool's, or an engine's" };
const LISTENER: Label = words("listener", &["tcp", "unix"], "");
/// The values of `state`.
pub const STATES: &[&str] = &["starting", "ready", "draining"];
const STATE: Label = words("state", STATES, "");
/// The values of `health`.
pub const HEALTHS: &[&str] = &["healthy", "ejected"];
const HEALTH: Label = words("health", HEALTHS, "");
const BECAME: Label = words("became", &["starting", "ready", "ejected", "draining", "gone"], "");
const CLASS: Label = words(
    "class",
    &["work", "join", "follow", "read", "any", "local"],
    "what a request needs: it starts work; belongs to work; acts on what exists; reads; goes anywhere; is answered by \
     the proxy",
);
const OUTCOME: Label = words(
    "outcome",
    &["done", "client-gone", "daemon-failed", "aborted", "bad-request", "refused"],
    "of a request: `aborted` by the proxy (shutdown, a drain's deadline), `refused` without a daemon",
);
const LOOKUP: Label = words("outcome", &["found", "nowhere"], "of a lookup");
const LIMIT: Label = words(
    "reason",
    &["total", "source", "descriptors"],
    "of a refused connection: `max_connections`, or open files; `max_connections_per_source`; the process had no \
     descriptor left",
);
const SIDE: Label = words("side", &["client", "daemon"], "");
/// The values of `reason` where a request gets no daemon.
pub const REFUSALS: &[&str] = &[
    "queue-full",
    "tenant-full",
    "longest-wait",
    "no-daemon",
    "session-lost",
    "api-version",
    "not-found",
    "ambiguous",
];
const REFUSAL: Label = words(
    "reason",
    REFUSALS,
    "of a refusal: `queue_limit`; `tenant_waiting`; `queue_wait` is over; no daemon takes it; the session's has gone; \
     none serves the API version; the object is nowhere; or on several",
);
const PROBE: Label = words("kind", &["info", "deep"], "of a probe ([health](reliability.md#health))");
const PROBED: Label = words(
    "outcome",
    &["answered", "failed", "refused", "slow", "unsupported", "unreached"],
    "of a probe; of `info` only the first three, of `deep` all but `refused`",
);
const CAUSE: Label = words(
    "reason",
    &["refused", "silent", "writes"],
    "of an ejection: it refuses connections; does not answer `/info`; the deep probe fails",
);
const FAULT: Label = words("fault", &["client", "daemon", "pool", "proxy"], "");
const STREAM: Label = words(
    "kind",
    &["exchange", "tunnel"],
    "of a stream: a request and its response; raw both ways, after an upgrade",
);
const DIRECTION: Label = words("direction", &["up", "down"], "to daemons; to clients");
const RELOAD: Label = words("result", &["ok", "refused"], "of a reload");
const DRAIN: Label = words("result", &["idle", "cut", "uncordoned"], "of a drain");
const NOTE: Label = words("kind", &["mark", "event"], "of a note: an annotation, an Event");
const NOTED: Label = words("outcome", &["done", "failed", "forbidden"], "of a note");
const HANDSHAKE: Label = words("result", &["done", "failed"], "of a TLS handshake");
const LACK: Label = words(
    "reason",
    &["certificate", "plain"],
    "of a refused client: it has no good certificate; it came without TLS where that is refused",
);
const ROTATION: Label = words("result", &["replaced", "refused"], "of certificate files that changed");
const HEADER: Label = words("result", &["taken", "refused"], "of a PROXY header");
const PRESTOP: Label =
    words("outcome", &["drained", "busy", "unknown", "refused"], "of a preStop hook's question");
const CHANGE: Label = words("change", &["begun", "ended"], "");
const IMPORT: Label = words(
    "kind",
    &["sessions", "objects", "images", "streams"],
    "of an import; objects are containers, networks, volumes, execs",
);
const SCALING: Label = words(
    "reason",
    &[
        "enough",
        "demand",
        "starting",
        "maximum",
        "stuck",
        "stabilising",
        "busy",
        "settling",
        "surplus",
        "rollout",
        "stale",
    ],
    "of the autoscaler ([what they mean](scaling.md#how-many-daemons))",
);
const STEP: Label = words("step", &["grow", "cordon", "uncordon", "remove"], "");
const STEPPED: Label = words("outcome", &["done", "failed"], "of a step");
const BOUND: Label = words("bound", &["min", "max"], "`scale_min`, `scale_max`");

/// What dindpool adds to a request: from tens of microseconds, and an hour where something is wrong.
const ADDED: &[f64] = &[
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25, 1.0, 10.0, 60.0, 600.0,
    3600.0,
];
/// What a build may wait: from milliseconds to hours.
const WAITS: &[f64] = &[
    0.005, 0.05, 0.25, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0,
];
/// What a request may take: a list takes milliseconds, a build or `logs -f` hours.
const DURATIONS: &[f64] = &[
    0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0,
    14400.0,
];

/// A constant for each metric, and [`ALL`] of them.
macro_rules! metrics {
    ($($id:ident: $kind:expr, $name:literal, [$($label:expr),*], $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Metric = Metric { name: $name, kind: $kind, labels: &[$($label),*], help: $help };
        )*
        /// Every metric, by name.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

use Kind::{Counter, Gauge, Histogram};

metrics! {
    ADDED_SECONDS: Histogram(ADDED), "dindpool_added_seconds", [],
        "What dindpool adds before a request reaches its daemon: session key, decision, connection; not the wait for a slot.";
    BUILD_INFO: Gauge, "dindpool_build_info", [VERSION], "Always 1; the label says what runs.";
    BYTES: Counter, "dindpool_bytes_total", [DIRECTION], "Bytes relayed, up to daemons or down.";
    CERTIFICATE_EXPIRY: Gauge, "dindpool_certificate_expiry_timestamp_seconds", [CERTIFICATE],
        "When a certificate that is shown to clients or daemons expires, in Unix time.";
    CERTIFICATE_RELOADS: Counter, "dindpool_certificate_reloads_total", [ROTATION],
        "Changes of certificate files, by whether they were taken.";
    CONFIG_RELOADED: Gauge, "dindpool_config_last_reload_successful", [],
        "Whether the configuration that was read last is the one that applies.";
    CONFIG_READ: Gauge, "dindpool_config_read_timestamp_seconds", [],
        "When the configuration that applies was read, in Unix time.";
    CONFIG_RELOADS: Counter, "dindpool_config_reloads_total", [RELOAD], "Reloads of the configuration.";
    CONNECTIONS: Gauge, "dindpool_connections", [LISTENER], "Open client connections.";
    CONNECTIONS_REFUSED: Counter, "dindpool_connections_refused_total", [LIMIT],
        "Client connections refused because there were too many, by the limit that they met.";
    ACCEPTED: Counter, "dindpool_connections_total", [LISTENER], "Client connections accepted.";
    DAEMON_BACK_OFF: Gauge, "dindpool_daemon_back_off_seconds", [DAEMON],
        "How long an ejected daemon must be well before it gets sessions again; only of those that are.";
    DAEMON_BUILD_CACHE: Gauge, "dindpool_daemon_build_cache_bytes", [DAEMON],
        "BuildKit's cache of a daemon, by its own count, at most some minutes old.";
    DAEMON_CORDONED: Gauge, "dindpool_daemon_cordoned", [DAEMON],
        "1 for a daemon that is cordoned or drained; only of those that are.";
    DAEMON_DISK_FREE: Gauge, "dindpool_daemon_disk_free_bytes", [DAEMON],
        "What is left for a daemon's data, where dindpool can see it.";
    DAEMON_DISK_USED: Gauge, "dindpool_daemon_disk_used_bytes", [DAEMON],
        "What is used where a daemon's data is, where dindpool can see it.";
    DAEMON_IMAGES: Gauge, "dindpool_daemon_images", [DAEMON], "Images on a daemon.";
    DAEMON_IMAGES_BYTES: Gauge, "dindpool_daemon_images_bytes", [DAEMON],
        "Layers of a daemon's images, by its own count, at most some minutes old.";
    DAEMON_INFO_SECONDS: Gauge, "dindpool_daemon_info_seconds", [DAEMON],
        "How long a daemon takes to answer /info, smoothed.";
    DAEMON_OPEN_SLOTS: Gauge, "dindpool_daemon_open_slots", [DAEMON],
        "Slots of a daemon that are open during its slow start; only of those that are in it.";
    DAEMON_REFUSED: Gauge, "dindpool_daemon_refused", [DAEMON],
        "1 for a daemon that is refused because it does not belong into this pool (API versions, data root); only of those that are.";
    DAEMON_SESSIONS: Gauge, "dindpool_daemon_sessions", [DAEMON], "Sessions with a lease on a daemon.";
    DAEMON_STARTUP: Gauge, "dindpool_daemon_startup_seconds", [],
        "How long a daemon takes to start here, smoothed, once one has.";
    DAEMON_STRANGERS: Gauge, "dindpool_daemon_strangers", [DAEMON],
        "Compose projects and lone containers that run on a daemon without a session; only where there are any.";
    DAEMON_TRANSITIONS: Counter, "dindpool_daemon_transitions_total", [BECAME],
        "Changes of a daemon's state or health, by what it became.";
    DAEMON_UP: Gauge, "dindpool_daemon_up", [DAEMON], "Whether a daemon takes sessions.";
    DAEMON_VERSIONS: Gauge, "dindpool_daemon_versions", [VERSION], "Daemons by the version of their engine.";
    DAEMONS: Gauge, "dindpool_daemons", [STATE, HEALTH], "Daemons by state and health.";
    DRAINS: Counter, "dindpool_drains_total", [DRAIN], "Drains that ended, by how.";
    EJECTIONS: Counter, "dindpool_ejections_total", [CAUSE], "Times that a daemon was ejected, by why.";
    ERRORS: Counter, "dindpool_errors_total", [FAULT],
        "Errors that the proxy itself answered, by whose fault they were.";
    IMAGE_REFERENCES: Gauge, "dindpool_image_references", [], "Image references that the pool knows.";
    LEASE_CHANGES: Counter, "dindpool_lease_changes_total", [CHANGE],
        "How often this proxy has begun or ended to admit.";
    LEASE_HOLDER: Gauge, "dindpool_lease_holder", [],
        "1 while this proxy admits, 0 while another one does; only where there may be several.";
    LEASE_IMPORTS: Counter, "dindpool_lease_imports_total", [IMPORT],
        "What this proxy took over when it began to admit, by kind.";
    LEASE_PEERS: Gauge, "dindpool_lease_peers", [], "Other proxies that are connected to this one to ask it.";
    LEASES_LOST: Counter, "dindpool_leases_lost_total", [], "Leases lost with their daemon.";
    LEASES_OVERDUE: Counter, "dindpool_leases_overdue_total", [],
        "Leases whose containers ran unattended for longer than container_lease.";
    LEASES: Counter, "dindpool_leases_total", [], "Leases that began.";
    LOOKUPS: Counter, "dindpool_lookups_total", [LOOKUP],
        "Full ids that no list had and the daemons were asked for, by outcome.";
    NOTES: Counter, "dindpool_notes_total", [NOTE, NOTED], "Annotations and Events written for others to read.";
    PANICS: Counter, "dindpool_panics_total", [],
        "Panics; each ended the connection or task that it happened in, and is a fault of dindpool.";
    PEERS_LOST: Counter, "dindpool_peers_lost_total", [SIDE],
        "Connections ended because their peer acknowledged nothing for 20 s, by what the peer is.";
    PRESTOPS: Counter, "dindpool_prestop_answers_total", [PRESTOP],
        "Answers to preStop hooks of daemons' pods, by what they said.";
    PROBES: Counter, "dindpool_probes_total", [PROBE, PROBED], "Probes by kind and outcome.";
    PROBLEMS: Gauge, "dindpool_problems", [],
        "Problems that are there now, each a sentence in the status: of the provisioner, of daemons that do not fit.";
    PROXY_HEADERS: Counter, "dindpool_proxy_headers_total", [HEADER],
        "PROXY headers of load balancers, by whether they were taken.";
    QUEUE_ABANDONED: Counter, "dindpool_queue_abandoned_total", [TENANT], "Tickets whose client left the queue.";
    QUEUE_LIMIT: Gauge, "dindpool_queue_limit", [], "Tickets that may wait; 0 without a queue.";
    QUEUE_OLDEST: Gauge, "dindpool_queue_oldest_seconds", [],
        "How long the ticket has waited that has waited longest; 0 if nobody waits.";
    QUEUE_WAIT: Histogram(WAITS), "dindpool_queue_wait_seconds", [TENANT], "How long admitted tickets have waited.";
    QUEUE_WAITING: Gauge, "dindpool_queue_waiting", [TENANT], "Tickets that wait for a slot.";
    QUEUED: Counter, "dindpool_queued_total", [TENANT], "Requests that had to wait for a slot.";
    REFUSED: Counter, "dindpool_refused_total", [TENANT, REFUSAL], "Requests that got no daemon, by why.";
    REQUEST_SECONDS: Histogram(DURATIONS), "dindpool_request_seconds", [CLASS],
        "How long requests took, from their head to the end of their stream, with their wait.";
    REQUESTS: Counter, "dindpool_requests_total", [CLASS, OUTCOME],
        "Requests finished, by class and by how they ended.";
    RETRIES: Counter, "dindpool_retries_total", [],
        "Requests tried on another daemon because the first was not reached.";
    SCALE_DESIRED: Gauge, "dindpool_scale_desired", [], "Daemons that there should be, by the autoscaler.";
    SCALE_FAULTS: Gauge, "dindpool_scale_faults", [], "Faults for which daemons that were asked for do not come up.";
    SCALE_LIMIT: Gauge, "dindpool_scale_limit", [BOUND], "Daemons that there may be at least and at most.";
    SCALE_REASON: Gauge, "dindpool_scale_reason", [SCALING], "1 for why the autoscaler does nothing else now.";
    SCALE_REPLICAS: Gauge, "dindpool_scale_replicas", [], "Daemons that the provisioner was asked for.";
    SCALE_STEPS: Counter, "dindpool_scale_steps_total", [STEP, STEPPED], "What the autoscaler has done.";
    SCALE_VICTIMS: Gauge, "dindpool_scale_victims", [], "Daemons that the autoscaler has cordoned because fewer are needed.";
    SESSIONS: Gauge, "dindpool_sessions", [], "Sessions with a lease.";
    SHARED_ROOTS: Counter, "dindpool_shared_data_roots_total", [],
        "Times that a daemon was refused because another one uses its data root.";
    SLOTS: Gauge, "dindpool_slots", [DAEMON], "Slots of a daemon.";
    SLOTS_USED: Gauge, "dindpool_slots_used", [DAEMON], "Slots of a daemon that are in use.";
    STREAMS: Gauge, "dindpool_streams", [STREAM], "Exchanges and tunnels that are open.";
    TENANT_SESSIONS: Gauge, "dindpool_tenant_sessions", [TENANT], "Sessions of a tenant with a lease.";
    TENANT_SLOTS_USED: Gauge, "dindpool_tenant_slots_used", [TENANT], "Slots that a tenant's sessions hold.";
    TLS_HANDSHAKES: Counter, "dindpool_tls_handshakes_total", [HANDSHAKE],
        "TLS handshakes of clients, by result.";
    TLS_REFUSED: Counter, "dindpool_tls_refused_total", [LACK],
        "Clients refused for what they lack: a good certificate, or TLS itself.";
    WORK: Counter, "dindpool_work_total", [TENANT],
        "Requests that start work (builds, pulls, new containers) and got a daemon, at once or after a wait.";
    WRONG_REMOVALS: Counter, "dindpool_wrong_removals_total", [],
        "Times that another daemon went than the one that the autoscaler had chosen.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_order_and_as_prometheus_wants_them() {
        for pair in ALL.windows(2) {
            assert!(pair[0].name < pair[1].name, "{} stands before {}", pair[0].name, pair[1].name);
        }
        for metric in ALL {
            assert!(metric.name.starts_with("dindpool_"), "{}", metric.name);
            assert_eq!(metric.kind == Counter, metric.name.ends_with("_total"), "{}", metric.name);
            assert!(metric.help.ends_with('.') && !metric.help.contains('\n'), "{}", metric.help);
            if let Histogram(bounds) = metric.kind {
                assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]), "{}", metric.name);
            }
        }
    }
}
