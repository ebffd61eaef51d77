//! Configuration: what was typed (flags, `DINDPOOL_*` variables, a file; [`Raw`]) and what it means
//! ([`Settings`]) are two types. All faults are reported at once, before anything binds; unknown keys are
//! refused.
//!
//! A flag wins over its variable, that over the file, that over the default.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use toml::Value;

use crate::admin::token::Token;
use crate::election;
use crate::engine::autoscaler::Spare;
use crate::pool;
use crate::provision::fixed::{self, FixedAddress};
use crate::provision::kubernetes;
use crate::proxy::identify::ListenerIdentity;
use crate::proxy::limits::Limits;
use crate::proxy::listener::Address;
use crate::proxy::peer;
use crate::proxy::sniff::Network;
use crate::tls::identity::Rule;
use crate::tls::{self, Clients, DaemonTls, Plain, RawTls};

/// The port that Docker's clients know for plain TCP (IANA: docker).
pub const DEFAULT_LISTEN: &str = "tcp://0.0.0.0:2375";
/// Beside Docker's own metrics port (9323), free in the Prometheus exporters' list.
pub const DEFAULT_ADMIN: &str = "127.0.0.1:9375";

/// Sums of durations are computed with, and must not overflow.
pub(crate) const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 3600);

/// A listener as it was typed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RawListener {
    /// `tcp://…` or `unix://…`
    pub address: String,
    /// Who its clients belong to.
    pub tenant: Option<String>,
    /// Makes all of its clients one session.
    pub session: Option<String>,
    /// Its TLS, where it differs from the others'.
    pub tls: Option<RawTls>,
    /// Networks of load balancers, where they differ.
    pub proxy_protocol: Option<Vec<String>>,
}

/// Every setting as it was typed; `None` where it was not.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Raw {
    /// Where clients connect.
    pub listen: Option<Vec<RawListener>>,
    /// The TLS of all TCP listeners that have none of their own.
    pub tls: Option<RawTls>,
    /// What certificates and host names make of clients.
    pub identify: Option<Vec<Rule>>,
    /// Networks of load balancers whose PROXY headers count.
    pub proxy_protocol: Option<Vec<String>>,
    /// Where `/metrics`, `/status` and the probes are.
    pub admin: Option<Vec<String>>,
    /// The file of the token that allows changes over TCP.
    pub admin_token_file: Option<PathBuf>,
    /// Where the preStop hooks of daemons' pods ask.
    pub prestop: Option<String>,
    /// The file of the token that they know.
    pub prestop_token_file: Option<PathBuf>,
    /// Fixed daemons.
    pub daemons: Option<Vec<String>>,
    /// What daemons with TLS must show, and what they are shown.
    pub daemon_tls: Option<DaemonTls>,
    /// A Deployment whose pods are the daemons.
    pub kubernetes: Option<String>,
    /// The Lease that decides which of several proxies admits.
    pub lease: Option<String>,
    /// How long it lasts without a renewal.
    pub lease_duration: Option<String>,
    /// `on`, or `off`: somebody else changes the number of daemons.
    pub scaler: Option<String>,
    /// The least number of daemons.
    pub scale_min: Option<u32>,
    /// The greatest.
    pub scale_max: Option<u32>,
    /// What is kept free: a number of slots, or a share of those in use, `20%`.
    pub scale_spare: Option<String>,
    /// How many daemons are added at a time.
    pub scale_step: Option<u32>,
    /// For how long fewer daemons must have been enough.
    pub scale_stabilisation: Option<String>,
    /// How long a daemon may take to start.
    pub scale_startup: Option<String>,
    /// Slots of each daemon.
    pub slots: Option<u32>,
    /// How long a lease outlives its last request.
    pub session_grace: Option<String>,
    /// How long a session keeps its last slot without work.
    pub slot_linger: Option<String>,
    /// How long containers may run while nothing else of their session is under way.
    pub container_lease: Option<String>,
    /// How long an unpushed image holds its session to its daemon, and the daemon in the pool.
    pub image_hold: Option<String>,
    /// How long a build waits for a daemon that has built its project.
    pub warm_wait: Option<String>,
    /// `report` or `stop`: what becomes of them then.
    pub overdue_containers: Option<String>,
    /// How many tickets may wait; 0: no queue, a full pool shares its least loaded daemon.
    pub queue_limit: Option<u32>,
    /// How long a ticket may wait.
    pub queue_wait: Option<String>,
    /// How many tickets of one tenant may wait.
    pub tenant_waiting: Option<u32>,
    /// How many slots one tenant may hold.
    pub tenant_slots: Option<u32>,
    /// How many client connections there may be.
    pub max_connections: Option<u32>,
    /// How many of them from one address.
    pub max_connections_per_source: Option<u32>,
    /// How long a client may take to send a request's head.
    pub head_deadline: Option<String>,
    /// Environment variables of a client process that name its session.
    pub session_env: Option<Vec<String>>,
    /// Time between two probes.
    pub probe_interval: Option<String>,
    /// How long a probe may take.
    pub probe_deadline: Option<String>,
    /// Time between two deep probes of a daemon; 0: none.
    pub deep_probe_interval: Option<String>,
    /// How long a connection to a daemon may take.
    pub connect_deadline: Option<String>,
    /// How long new clients are taken after SIGTERM.
    pub shutdown_delay: Option<String>,
    /// How long open streams may go on after SIGTERM.
    pub shutdown_grace: Option<String>,
    /// `text` or `json`.
    pub log_format: Option<String>,
    /// A tracing filter, `info` or `dindpool=debug`.
    pub log_level: Option<String>,
}

/// A listener as it is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Where.
    pub address: Address,
    /// What it says about its clients.
    pub identity: ListenerIdentity,
    /// Its TLS.
    pub tls: Option<tls::Settings>,
    /// Where load balancers are whose PROXY headers count.
    pub load_balancers: Vec<Network>,
}

impl Listener {
    /// Whether nobody comes in who has no certificate.
    pub fn is_guarded(&self) -> bool {
        let guarded = |tls: &tls::Settings| tls.clients == Clients::Required && tls.plain == Plain::Refused;
        self.tls.as_ref().is_some_and(guarded)
    }
}

/// What the settings mean.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where clients connect.
    pub listen: Vec<Listener>,
    /// What certificates and host names make of clients.
    pub identify: Vec<Rule>,
    /// Where the admin listeners are; port 0 takes a free one.
    pub admin: Vec<Address>,
    /// Who may change the pool over TCP.
    pub admin_token: Option<Token>,
    /// Where the preStop hooks of daemons' pods ask.
    pub prestop: Option<Address>,
    /// What they know.
    pub prestop_token: Option<Token>,
    /// Fixed daemons.
    pub daemons: Vec<FixedAddress>,
    /// Makes the connections to those with TLS.
    pub daemon_tls: Option<Arc<tls::Client>>,
    /// The Deployment whose pods are the daemons, instead of fixed ones.
    pub kubernetes: Option<kubernetes::Target>,
    /// The Lease that decides which of several proxies admits.
    pub lease: Option<election::Target>,
    /// How the pool behaves.
    pub pool: pool::Config,
    /// How many client connections there may be.
    pub limits: Limits,
    /// How long a client may take to send a request's head.
    pub head_deadline: Duration,
    /// Environment variables that name a session.
    pub session_env: Vec<String>,
    /// How long new clients are taken after SIGTERM, while whoever sends them hears of it.
    pub shutdown_delay: Duration,
    /// How long open streams may go on then.
    pub shutdown_grace: Duration,
    /// Whether the log is JSON.
    pub log_json: bool,
    /// A tracing filter.
    pub log_level: String,
}

/// All that is wrong, a sentence each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults(pub Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} fault(s):", self.0.len())?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  - {fault}"))
    }
}

impl std::error::Error for Faults {}

/// The keys of the file, for the message about an unknown one.
const KEYS: &[&str] = &[
    "listen",
    "tls",
    "identify",
    "proxy_protocol",
    "admin",
    "admin_token_file",
    "prestop",
    "prestop_token_file",
    "daemons",
    "daemon_tls",
    "kubernetes",
    "lease",
    "lease_duration",
    "scaler",
    "scale_min",
    "scale_max",
    "scale_spare",
    "scale_step",
    "scale_stabilisation",
    "scale_startup",
    "slots",
    "session_grace",
    "slot_linger",
    "container_lease",
    "image_hold",
    "warm_wait",
    "overdue_containers",
    "queue_limit",
    "queue_wait",
    "tenant_waiting",
    "tenant_slots",
    "max_connections",
    "max_connections_per_source",
    "head_deadline",
    "session_env",
    "probe_interval",
    "probe_deadline",
    "deep_probe_interval",
    "connect_deadline",
    "shutdown_delay",
    "shutdown_grace",
    "log_format",
    "log_level",
];

impl Raw {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read or is no TOML; and every unknown key and wrong type in it, all at once.
    pub fn from_file(path: &Path) -> Result<Raw, Faults> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Faults(vec![format!("cannot read {}: {e}", path.display())]))?;
        Raw::from_toml(&text)
            .map_err(|Faults(f)| Faults(f.into_iter().map(|f| format!("{}: {f}", path.display())).collect()))
    }

    /// Reads TOML text.
    ///
    /// # Errors
    /// As [`Raw::from_file`].
    pub fn from_toml(text: &str) -> Result<Raw, Faults> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| Faults(vec![e.to_string()]))?;
        let mut raw = Raw::default();
        let mut faults = Vec::new();
        for (key, value) in table {
            let result = match key.as_str() {
                "listen" => listeners(value).map(|v| raw.listen = Some(v)),
                "tls" => RawTls::from_toml(value).map(|v| raw.tls = Some(v)),
                "identify" => Rule::from_toml(value).map(|v| raw.identify = Some(v)),
                "proxy_protocol" => texts(value).map(|v| raw.proxy_protocol = Some(v)),
                "admin" => one_or_many(value).map(|v| raw.admin = Some(v)),
                "admin_token_file" => text_of(value).map(|v| raw.admin_token_file = Some(v.into())),
                "prestop" => text_of(value).map(|v| raw.prestop = Some(v)),
                "prestop_token_file" => text_of(value).map(|v| raw.prestop_token_file = Some(v.into())),
                "daemons" => texts(value).map(|v| raw.daemons = Some(v)),
                "daemon_tls" => DaemonTls::from_toml(value).map(|v| raw.daemon_tls = Some(v)),
                "kubernetes" => text_of(value).map(|v| raw.kubernetes = Some(v)),
                "lease" => text_of(value).map(|v| raw.lease = Some(v)),
                "lease_duration" => text_of(value).map(|v| raw.lease_duration = Some(v)),
                "scaler" => text_of(value).map(|v| raw.scaler = Some(v)),
                "scale_min" => number(value).map(|v| raw.scale_min = Some(v)),
                "scale_max" => number(value).map(|v| raw.scale_max = Some(v)),
                "scale_spare" => number_or_text(value).map(|v| raw.scale_spare = Some(v)),
                "scale_step" => number(value).map(|v| raw.scale_step = Some(v)),
                "scale_stabilisation" => text_of(value).map(|v| raw.scale_stabilisation = Some(v)),
                "scale_startup" => text_of(value).map(|v| raw.scale_startup = Some(v)),
                "slots" => number(value).map(|v| raw.slots = Some(v)),
                "session_grace" => text_of(value).map(|v| raw.session_grace = Some(v)),
                "slot_linger" => text_of(value).map(|v| raw.slot_linger = Some(v)),
                "image_hold" => text_of(value).map(|v| raw.image_hold = Some(v)),
                "warm_wait" => text_of(value).map(|v| raw.warm_wait = Some(v)),
                "container_lease" => text_of(value).map(|v| raw.container_lease = Some(v)),
                "overdue_containers" => text_of(value).map(|v| raw.overdue_containers = Some(v)),
                "queue_limit" => number(value).map(|v| raw.queue_limit = Some(v)),
                "queue_wait" => text_of(value).map(|v| raw.queue_wait = Some(v)),
                "tenant_waiting" => number(value).map(|v| raw.tenant_waiting = Some(v)),
                "tenant_slots" => number(value).map(|v| raw.tenant_slots = Some(v)),
                "max_connections" => number(value).map(|v| raw.max_connections = Some(v)),
                "max_connections_per_source" => {
                    number(value).map(|v| raw.max_connections_per_source = Some(v))
                }
                "head_deadline" => text_of(value).map(|v| raw.head_deadline = Some(v)),
                "session_env" => texts(value).map(|v| raw.session_env = Some(v)),
                "probe_interval" => text_of(value).map(|v| raw.probe_interval = Some(v)),
                "probe_deadline" => text_of(value).map(|v| raw.probe_deadline = Some(v)),
                "deep_probe_interval" => text_of(value).map(|v| raw.deep_probe_interval = Some(v)),
                "connect_deadline" => text_of(value).map(|v| raw.connect_deadline = Some(v)),
                "shutdown_delay" => text_of(value).map(|v| raw.shutdown_delay = Some(v)),
                "shutdown_grace" => text_of(value).map(|v| raw.shutdown_grace = Some(v)),
                "log_format" => text_of(value).map(|v| raw.log_format = Some(v)),
                "log_level" => text_of(value).map(|v| raw.log_level = Some(v)),
                _ => Err(format!("unknown key; known are {}", KEYS.join(", "))),
            };
            if let Err(fault) = result {
                faults.push(format!("{key}: {fault}"));
            }
        }
        if faults.is_empty() { Ok(raw) } else { Err(Faults(faults)) }
    }

    /// These settings, and `under` where these say nothing.
    #[must_use]
    pub fn or(self, under: Raw) -> Raw {
        Raw {
            listen: self.listen.or(under.listen),
            tls: self.tls.or(under.tls),
            identify: self.identify.or(under.identify),
            proxy_protocol: self.proxy_protocol.or(under.proxy_protocol),
            admin: self.admin.or(under.admin),
            admin_token_file: self.admin_token_file.or(under.admin_token_file),
            prestop: self.prestop.or(under.prestop),
            prestop_token_file: self.prestop_token_file.or(under.prestop_token_file),
            daemons: self.daemons.or(under.daemons),
            daemon_tls: self.daemon_tls.or(under.daemon_tls),
            kubernetes: self.kubernetes.or(under.kubernetes),
            lease: self.lease.or(under.lease),
            lease_duration: self.lease_duration.or(under.lease_duration),
            scaler: self.scaler.or(under.scaler),
            scale_min: self.scale_min.or(under.scale_min),
            scale_max: self.scale_max.or(under.scale_max),
            scale_spare: self.scale_spare.or(under.scale_spare),
            scale_step: self.scale_step.or(under.scale_step),
            scale_stabilisation: self.scale_stabilisation.or(under.scale_stabilisation),
            scale_startup: self.scale_startup.or(under.scale_startup),
            slots: self.slots.or(under.slots),
            session_grace: self.session_grace.or(under.session_grace),
            slot_linger: self.slot_linger.or(under.slot_linger),
            image_hold: self.image_hold.or(under.image_hold),
            warm_wait: self.warm_wait.or(under.warm_wait),
            container_lease: self.container_lease.or(under.container_lease),
            overdue_containers: self.overdue_containers.or(under.overdue_containers),
            queue_limit: self.queue_limit.or(under.queue_limit),
            queue_wait: self.queue_wait.or(under.queue_wait),
            tenant_waiting: self.tenant_waiting.or(under.tenant_waiting),
            tenant_slots: self.tenant_slots.or(under.tenant_slots),
            max_connections: self.max_connections.or(under.max_connections),
            max_connections_per_source: self.max_connections_per_source.or(under.max_connections_per_source),
            head_deadline: self.head_deadline.or(under.head_deadline),
            session_env: self.session_env.or(under.session_env),
            probe_interval: self.probe_interval.or(under.probe_interval),
            probe_deadline: self.probe_deadline.or(under.probe_deadline),
            deep_probe_interval: self.deep_probe_interval.or(under.deep_probe_interval),
            connect_deadline: self.connect_deadline.or(under.connect_deadline),
            shutdown_delay: self.shutdown_delay.or(under.shutdown_delay),
            shutdown_grace: self.shutdown_grace.or(under.shutdown_grace),
            log_format: self.log_format.or(under.log_format),
            log_level: self.log_level.or(under.log_level),
        }
    }

    /// What these settings mean. `needs_daemons` is false where the command makes its own.
    ///
    /// # Errors
    /// Every fault, all at once.
    pub fn validate(self, needs_daemons: bool) -> Result<Settings, Faults> {
        let mut faults = Vec::new();
        let default = || vec![RawListener { address: DEFAULT_LISTEN.into(), ..RawListener::default() }];
        let listen = self.listen.unwrap_or_else(default);
        if listen.is_empty() {
            faults.push("listen: no address; leave it out for the default, tcp://0.0.0.0:2375".into());
        }
        let (tls, networks) = (self.tls.as_ref(), self.proxy_protocol.as_deref());
        let listen: Vec<Listener> =
            listen.into_iter().filter_map(|l| listener(l, tls, networks, &mut faults)).collect();
        let identify = self.identify.unwrap_or_default();
        if !identify.is_empty() && listen.iter().all(|l| l.tls.is_none()) && faults.is_empty() {
            faults.push("identify: no listener has TLS".into());
        }
        let daemons: Vec<FixedAddress> = self
            .daemons
            .unwrap_or_default()
            .iter()
            .filter_map(|d| fixed::parse(d).map_err(|e| faults.push(format!("daemons: {e}"))).ok())
            .collect();
        let daemon_tls = self.daemon_tls.map(tls::Client::new).transpose();
        let daemon_tls =
            daemon_tls.map_err(|fault| faults.push(format!("daemon_tls: {fault}"))).ok().flatten();
        for daemon in &daemons {
            let FixedAddress::Tls { host, .. } = daemon else { continue };
            match &daemon_tls {
                Some(tls) => faults.extend(tls.expects(host).err().map(|fault| format!("daemons: {fault}"))),
                None if faults.iter().any(|fault| fault.starts_with("daemon_tls")) => {}
                None => faults.push(format!(
                    "daemons: {host} needs daemon_tls: a directory with the ca.pem of the daemons' certificates, and \
                     the cert.pem and key.pem that dindpool shows"
                )),
            }
        }
        let kubernetes = self.kubernetes.as_deref().map(kubernetes::parse);
        let kubernetes = kubernetes.and_then(|k| k.map_err(|e| faults.push(format!("kubernetes: {e}"))).ok());
        if needs_daemons && daemons.is_empty() && kubernetes.is_none() && faults.is_empty() {
            let how = "daemons: none given; use --daemon tcp://host:2375, once for each, or --kubernetes NAMESPACE/NAME";
            faults.push(how.into());
        }
        if !daemons.is_empty() && kubernetes.is_some() {
            faults
                .push("daemons, kubernetes: a pool has either fixed daemons or those of a Deployment".into());
        }
        let plausible = |name: &String| {
            let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            (1..=63).contains(&name.len()) && name.bytes().all(good)
        };
        if let Some(lease) = self.lease.as_ref().filter(|lease| !plausible(lease)) {
            faults.push(format!("lease: {lease} is no name; use up to 63 of the characters a-z 0-9 -"));
        }
        if self.lease.is_some() && self.kubernetes.is_none() {
            faults.push("lease: only a pool of a Deployment (kubernetes) can have several proxies".into());
        }
        if self.lease_duration.is_some() && self.lease.is_none() {
            faults.push("lease_duration: there is no lease".into());
        }
        let mut lease_duration = Duration::from_secs(15);
        if self.slots == Some(0) {
            faults.push("slots: a daemon needs at least one".into());
        }
        if self.tenant_slots == Some(0) || self.tenant_waiting == Some(0) {
            faults.push("tenant_slots, tenant_waiting: 0 would keep every tenant out".into());
        }
        if self.max_connections == Some(0) || self.max_connections_per_source == Some(0) {
            faults.push("max_connections, max_connections_per_source: 0 would keep every client out".into());
        }
        let limits = Limits {
            total: self.max_connections.map(|n| n as usize),
            per_source: self.max_connections_per_source.map(|n| n as usize),
        };
        let mut pool = pool::Config { slots: self.slots, ..pool::Config::default() };
        pool.engine.queue_limit = self.queue_limit.map_or(pool.engine.queue_limit, |n| n as usize);
        pool.engine.tenant_waiting = self.tenant_waiting.map(|n| n as usize);
        pool.engine.tenant_slots = self.tenant_slots;
        let scale = &mut pool.scale;
        scale.min = self.scale_min.unwrap_or(scale.min);
        scale.max = self.scale_max.unwrap_or(scale.max);
        scale.step = self.scale_step.unwrap_or(scale.step);
        if scale.max == 0 || scale.min > scale.max {
            let (min, max) = (scale.min, scale.max);
            faults.push(format!("scale_min, scale_max: {min} to {max} daemons are no pool"));
        }
        if scale.step == 0 {
            faults.push("scale_step: 0 would never add a daemon".into());
        }
        if let Some(text) = &self.scale_spare {
            match spare(text) {
                Some(spare) => scale.spare = spare,
                None => faults.push(format!(
                    "scale_spare: {text} is neither a number of slots nor a share; use 2 or 20%"
                )),
            }
        }
        pool.scaler = match self.scaler.as_deref() {
            None | Some("on") => true,
            Some("off") => false,
            Some(other) => {
                faults.push(format!("scaler: {other} is neither on nor off"));
                false
            }
        };
        let mut head_deadline = Duration::from_secs(30);
        let (mut shutdown_delay, mut shutdown_grace) = (Duration::from_secs(5), Duration::from_secs(600));
        let mut set = |name: &str, text: Option<String>, to: &mut Duration, min: Duration| {
            let Some(text) = text else { return };
            match duration(&text) {
                Some(value) if value > MAX_DURATION => {
                    faults.push(format!("{name}: {text} is more than a year"))
                }
                Some(value) if value >= min => *to = value,
                Some(_) => faults.push(format!("{name}: {text} is less than {} ms", min.as_millis())),
                None => faults.push(format!("{name}: {text} is no duration; use 500ms, 30s, 5m or 2h")),
            }
        };
        let zero = Duration::ZERO;
        set("session_grace", self.session_grace, &mut pool.engine.grace, zero);
        set("slot_linger", self.slot_linger, &mut pool.engine.linger, zero);
        set("image_hold", self.image_hold, &mut pool.engine.image_hold, zero);
        set("warm_wait", self.warm_wait, &mut pool.engine.warm_wait, zero);
        set(
            "container_lease",
            self.container_lease,
            &mut pool.engine.container_lease,
            Duration::from_secs(1),
        );
        set("lease_duration", self.lease_duration, &mut lease_duration, Duration::from_secs(3));
        set("scale_stabilisation", self.scale_stabilisation, &mut pool.scale.stabilisation, zero);
        set("scale_startup", self.scale_startup, &mut pool.scale.startup, Duration::from_secs(1));
        set("queue_wait", self.queue_wait, &mut pool.engine.max_wait, Duration::from_secs(1));
        set("probe_interval", self.probe_interval, &mut pool.probe_interval, Duration::from_millis(100));
        set("probe_deadline", self.probe_deadline, &mut pool.probe_deadline, Duration::from_millis(100));
        set("deep_probe_interval", self.deep_probe_interval, &mut pool.engine.deep_probe_interval, zero);
        set(
            "connect_deadline",
            self.connect_deadline,
            &mut pool.connect_deadline,
            Duration::from_millis(100),
        );
        set("head_deadline", self.head_deadline, &mut head_deadline, Duration::from_secs(1));
        set("shutdown_delay", self.shutdown_delay, &mut shutdown_delay, zero);
        set("shutdown_grace", self.shutdown_grace, &mut shutdown_grace, zero);
        pool.stop_overdue = match self.overdue_containers.as_deref() {
            None | Some("report") => false,
            Some("stop") => true,
            Some(other) => {
                faults.push(format!("overdue_containers: {other} is neither report nor stop"));
                false
            }
        };
        let log_json = match self.log_format.as_deref() {
            None | Some("text") => false,
            Some("json") => true,
            Some(other) => {
                faults.push(format!("log_format: {other} is neither text nor json"));
                false
            }
        };
        let log_level = self.log_level.unwrap_or_else(|| "info".into());
        if log_level.parse::<tracing_subscriber::filter::EnvFilter>().is_err() {
            faults.push(format!("log_level: {log_level} is no filter; use info, debug or dindpool=debug"));
        }
        let admin = self.admin.unwrap_or_else(|| vec![DEFAULT_ADMIN.into()]);
        if admin.is_empty() {
            faults.push("admin: no address; leave it out for the default, 127.0.0.1:9375".into());
        }
        let within = |a: &String| a.starts_with("unix://") || Address::Tcp(a.clone()).is_local();
        if self.lease.is_some() && admin.iter().all(within) {
            faults.push(
                "lease, admin: the other proxies must reach the admin listener; use 0.0.0.0:9375".into(),
            );
        }
        let admin = admin.iter().filter_map(|a| admin_address("admin", a, &mut faults)).collect();
        let prestop = self.prestop.as_deref().and_then(|a| admin_address("prestop", a, &mut faults));
        if self.prestop.is_some() != self.prestop_token_file.is_some() {
            faults.push("prestop, prestop_token_file: each needs the other".into());
        }
        let token = self.admin_token_file.as_deref().map(Token::read);
        let admin_token =
            token.and_then(|t| t.map_err(|fault| faults.push(format!("admin_token_file: {fault}"))).ok());
        let token = self.prestop_token_file.as_deref().map(Token::read);
        let prestop_token =
            token.and_then(|t| t.map_err(|fault| faults.push(format!("prestop_token_file: {fault}"))).ok());
        if !faults.is_empty() {
            return Err(Faults(faults));
        }
        Ok(Settings {
            listen,
            identify,
            admin,
            admin_token,
            prestop,
            prestop_token,
            daemons,
            daemon_tls: daemon_tls.map(Arc::new),
            kubernetes,
            lease: self.lease.map(|name| election::Target { name, duration: lease_duration }),
            pool,
            limits,
            head_deadline,
            session_env: self.session_env.unwrap_or_else(peer::default_variables),
            shutdown_delay,
            shutdown_grace,
            log_json,
            log_level,
        })
    }
}

fn listener(
    raw: RawListener,
    tls: Option<&RawTls>,
    networks: Option<&[String]>,
    faults: &mut Vec<String>,
) -> Option<Listener> {
    let word = |name: &str, value: &Option<String>| {
        value
            .as_ref()
            .filter(|v| {
                !(1..=128).contains(&v.len())
                    || !v.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            })
            .map(|v| format!("listen: {name} {v:?} must be 1 to 128 of the characters A-Z a-z 0-9 . _ -"))
    };
    faults.extend(word("tenant", &raw.tenant));
    faults.extend(word("session", &raw.session));
    let address = match raw.address.parse() {
        Ok(address) => address,
        Err(fault) => {
            faults.push(format!("listen: {fault}"));
            return None;
        }
    };
    let is_tcp = matches!(address, Address::Tcp(_));
    if !is_tcp
        && (matches!(raw.tls, Some(RawTls::Directory(_) | RawTls::Table { .. }))
            || raw.proxy_protocol.is_some())
    {
        faults.push(format!("listen: {address}: tls and proxy_protocol are for tcp:// only"));
    }
    let tls = raw.tls.as_ref().or(tls).filter(|_| is_tcp).map(RawTls::validate).transpose();
    let tls = tls.unwrap_or_else(|wrong| {
        faults.extend(wrong.into_iter().map(|fault| format!("tls: {fault}")));
        None
    });
    let tls = tls.flatten().inspect(|tls| {
        if let Err(fault) = tls::Server::new(tls) {
            faults.push(format!("tls: {fault}"));
        }
    });
    let networks = raw.proxy_protocol.as_deref().or(networks).filter(|_| is_tcp).unwrap_or_default();
    let network =
        |text: &String| text.parse().map_err(|fault| faults.push(format!("proxy_protocol: {fault}"))).ok();
    let load_balancers = networks.iter().filter_map(network).collect();
    let tenant = raw.tenant.as_deref().unwrap_or("default").into();
    Some(Listener {
        address,
        identity: ListenerIdentity { tenant, session: raw.session },
        tls,
        load_balancers,
    })
}

/// `2`, `20%`.
fn spare(text: &str) -> Option<Spare> {
    match text.strip_suffix('%') {
        Some(percent) => percent.parse().ok().map(Spare::Percent),
        None => text.parse().ok().map(Spare::Slots),
    }
}

/// `500ms`, `30s`, `5m`, `2h`.
pub fn duration(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().ok()?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(seconds).ok()
}

fn admin_address(key: &str, text: &str, faults: &mut Vec<String>) -> Option<Address> {
    if text.starts_with("unix://") {
        return text.parse().map_err(|fault| faults.push(format!("{key}: {fault}"))).ok();
    }
    if text.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
        faults.push(format!("{key}: {text} is no address; use 127.0.0.1:9375 or unix:///path"));
        return None;
    }
    Some(Address::Tcp(text.to_string()))
}

fn one_or_many(value: Value) -> Result<Vec<String>, String> {
    match value {
        Value::Array(_) => texts(value),
        one => text_of(one).map(|text| vec![text]),
    }
}

fn text_of(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("expected text, found {}", other.type_str())),
    }
}

fn texts(value: Value) -> Result<Vec<String>, String> {
    match value {
        Value::Array(items) => items.into_iter().map(text_of).collect(),
        other => Err(format!("expected a list of texts, found {}", other.type_str())),
    }
}

fn number(value: Value) -> Result<u32, String> {
    match value {
        Value::Integer(n) => u32::try_from(n).map_err(|_| format!("{n} is out of range")),
        other => Err(format!("expected a number, found {}", other.type_str())),
    }
}

fn number_or_text(value: Value) -> Result<String, String> {
    match value {
        Value::Integer(n) => Ok(n.to_string()),
        Value::String(text) => Ok(text),
        other => Err(format!("expected a number or a text, found {}", other.type_str())),
    }
}

fn listeners(value: Value) -> Result<Vec<RawListener>, String> {
    let Value::Array(items) = value else {
        return Err(format!("expected a list, found {}", value.type_str()));
    };
    items
        .into_iter()
        .map(|item| match item {
            Value::String(address) => Ok(RawListener { address, ..RawListener::default() }),
            Value::Table(table) => {
                let mut raw = RawListener::default();
                for (key, value) in table {
                    match key.as_str() {
                        "address" => raw.address = text_of(value)?,
                        "tenant" => raw.tenant = Some(text_of(value)?),
                        "session" => raw.session = Some(text_of(value)?),
                        "tls" => raw.tls = Some(RawTls::from_toml(value)?),
                        "proxy_protocol" => raw.proxy_protocol = Some(texts(value)?),
                        _ => {
                            return Err(format!(
                                "unknown key {key}; known are address, tenant, session, tls, proxy_protocol"
                            ));
                        }
                    }
                }
                Ok(raw)
            }
            other => Err(format!("expected an address or a table, found {}", other.type_str())),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_are_reported_at_once() {
        let raw = Raw::from_toml("slots = 0\nadmin = \"x\"\nsession_grace = \"soon\"\nlisten = [\"tcp:/x\"]")
            .unwrap();
        let Faults(faults) = raw.validate(true).unwrap_err();
        for word in ["slots", "admin", "session_grace", "listen"] {
            assert!(faults.iter().any(|f| f.starts_with(word)), "{word} in {faults:?}");
        }
        let raw = Raw::from_toml("listen = []\nqueue_wait = \"999999999999h\"").unwrap();
        let Faults(faults) = raw.validate(false).unwrap_err();
        for word in ["listen: no address", "queue_wait: 999999999999h is more"] {
            assert!(faults.iter().any(|f| f.starts_with(word)), "{word} in {faults:?}");
        }
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_refused_together() {
        let Faults(faults) = Raw::from_toml("slot = 3\nadmin = 7\n").unwrap_err();
        assert_eq!(faults.len(), 2);
        assert!(faults.iter().any(|f| f.starts_with("slot: unknown key")));
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let flags = Raw { slots: Some(4), ..Raw::default() };
        let file = Raw::from_toml("slots = 2\ndaemons = [\"tcp://10.0.0.1:2375\"]").unwrap();
        let settings = flags.or(file).validate(true).unwrap();
        assert_eq!(settings.pool.slots, Some(4));
        assert_eq!(settings.daemons.len(), 1);
        assert_eq!(settings.listen[0].address.to_string(), DEFAULT_LISTEN);
    }

    #[test]
    fn listeners_carry_a_tenant_and_a_session() {
        let raw = Raw::from_toml(
            "daemons = [\"tcp://10.0.0.1\"]\n[[listen]]\naddress = \"unix:///run/a.sock\"\ntenant = \"team-a\"\nsession = \"release\"",
        )
        .unwrap();
        let settings = raw.validate(true).unwrap();
        assert_eq!(settings.listen[0].identity.tenant.as_str(), "team-a");
        assert_eq!(settings.listen[0].identity.session.as_deref(), Some("release"));
    }

    #[test]
    fn a_listeners_words_have_a_length_as_their_sessions_keys_do() {
        for (word, fine) in [("a".repeat(128), true), ("a".repeat(129), false), (String::new(), false)] {
            let listener =
                RawListener { address: DEFAULT_LISTEN.into(), tenant: Some(word), ..RawListener::default() };
            let raw = Raw { listen: Some(vec![listener]), ..Raw::default() };
            assert_eq!(raw.validate(false).is_ok(), fine);
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration("1.5m"), Some(Duration::from_secs(90)));
        for bad in ["5", "s", "5d", "-1s", ""] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn without_daemons_serve_says_what_to_do() {
        let Faults(faults) = Raw::default().validate(true).unwrap_err();
        assert!(faults[0].contains("--daemon tcp://host:2375"));
        assert!(Raw::default().validate(false).is_ok());
    }
}
