//! The pool at the moment of a scrape, written straight into the text format: a registry would look up, lock and
//! copy ten thousand series for a thousand daemons. What is 0 for nearly every daemon has a series only where it is
//! not: that bounds an exposition of a thousand daemons to less than a megabyte.
//!
//! Of several proxies only the one that admits tells of the pool: a sum over all of them counts nothing twice, and
//! nobody tells what was so before another one took over.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Write};

use super::names::{self, Metric};
use super::{health_word, state_word};
use crate::engine::autoscaler::Reason;
use crate::engine::model::{Health, State};

/// What is there at this moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// Of several proxies: whether this one admits.
    pub admits: Option<bool>,
    /// The pool, if this proxy admits.
    pub pool: Option<Pool>,
}

/// The pool.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pool {
    /// Every daemon.
    pub daemons: Vec<Daemon>,
    /// What tenants have and want.
    pub tenants: BTreeMap<String, Tenant>,
    /// Sessions with a lease.
    pub sessions: usize,
    /// Image references that are known.
    pub images: usize,
    /// How many tickets may wait.
    pub queue_limit: usize,
    /// For how many seconds the ticket has waited that has waited longest.
    pub oldest: f64,
    /// Problems that are there.
    pub problems: usize,
    /// The autoscaler, where there is one.
    pub scaler: Option<Scaler>,
}

/// One daemon.
#[derive(Debug, Clone, PartialEq)]
pub struct Daemon {
    /// Its name.
    pub id: String,
    /// starting, ready, draining.
    pub state: State,
    /// healthy, ejected.
    pub health: Health,
    /// Whether it takes sessions.
    pub up: bool,
    /// Whether it is cordoned or drained.
    pub cordoned: bool,
    /// Whether the autoscaler did that.
    pub victim: bool,
    /// Whether it does not belong into this pool.
    pub refused: bool,
    /// Its slots.
    pub slots: u32,
    /// Those in use.
    pub used: u32,
    /// Those that are open.
    pub open: u32,
    /// Compose projects and lone containers without a session.
    pub strangers: u32,
    /// Sessions with a lease.
    pub sessions: usize,
    /// For how many seconds it must be well before it is taken back.
    pub back_off: f64,
    /// How many seconds `/info` takes.
    pub latency: Option<f64>,
    /// Its engine's version; empty until it has answered.
    pub version: String,
    /// What it holds, as far as it is known.
    pub holds: Holds,
}

/// What a daemon says of its data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holds {
    /// Images.
    pub images: Option<u64>,
    /// Bytes of their layers.
    pub images_bytes: Option<u64>,
    /// Bytes of the build cache.
    pub build_cache: Option<u64>,
    /// Bytes used and free where its data is.
    pub disk: Option<(u64, u64)>,
}

/// What a tenant has and wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tenant {
    /// Sessions with a lease.
    pub sessions: u32,
    /// Slots that they hold.
    pub slots: u32,
    /// Tickets that wait.
    pub waiting: u32,
}

/// What the autoscaler has decided last.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaler {
    /// How many daemons there should be.
    pub desired: u32,
    /// How many the provisioner was asked for.
    pub replicas: Option<u32>,
    /// Why nothing else is done.
    pub reason: Reason,
    /// Faults for which daemons do not come up.
    pub faults: usize,
    /// How many seconds one takes to start.
    pub startup: Option<f64>,
    /// How many there may be at least and at most.
    pub limits: (u32, u32),
}

impl Snapshot {
    /// Appends the text. `label` gives a tenant's label, of which there is a limited number; those that are `known`
    /// have a series also when they have nothing.
    pub fn write(
        &self,
        out: &mut String,
        label: impl Fn(&str) -> String,
        known: impl FnOnce() -> BTreeSet<String>,
    ) {
        let mut text = Text { out };
        if let Some(admits) = self.admits {
            text.one(&names::LEASE_HOLDER, u8::from(admits));
        }
        if let Some(pool) = &self.pool {
            pool.write(&mut text, label, known);
        }
    }
}

impl Pool {
    fn write(
        &self,
        text: &mut Text,
        label: impl Fn(&str) -> String,
        known: impl FnOnce() -> BTreeSet<String>,
    ) {
        text.one(&names::IMAGE_REFERENCES, self.images);
        text.one(&names::PROBLEMS, self.problems);
        text.one(&names::QUEUE_LIMIT, self.queue_limit);
        text.one(&names::QUEUE_OLDEST, self.oldest);
        text.one(&names::SESSIONS, self.sessions);
        self.write_daemons(text);
        self.write_tenants(text, label, known);
        if let Some(scaler) = &self.scaler {
            text.one(&names::SCALE_VICTIMS, self.daemons.iter().filter(|d| d.victim).count());
            scaler.write(text);
        }
    }

    fn write_daemons(&self, text: &mut Text) {
        text.head(&names::DAEMONS);
        for state in [State::Starting, State::Ready, State::Draining] {
            for health in [Health::Healthy, Health::Ejected] {
                let n = self.daemons.iter().filter(|d| d.state == state && d.health == health).count();
                text.series(&names::DAEMONS, &[state_word(state), health_word(health)], n);
            }
        }
        let mut versions: BTreeMap<&str, u32> = BTreeMap::new();
        for daemon in self.daemons.iter().filter(|d| !d.version.is_empty()) {
            *versions.entry(&daemon.version).or_default() += 1;
        }
        text.head(&names::DAEMON_VERSIONS);
        for (version, n) in versions {
            text.series(&names::DAEMON_VERSIONS, &[version], n);
        }
        // A daemon that has gone leaves no series behind.
        let ids: Vec<Cow<str>> = self.daemons.iter().map(|d| escaped(&d.id)).collect();
        let mut each = |metric: &Metric, value: &dyn Fn(&Daemon) -> Option<f64>| {
            let mut told = false;
            for (daemon, id) in self.daemons.iter().zip(&ids) {
                if let Some(value) = value(daemon) {
                    if !told {
                        text.head(metric);
                        told = true;
                    }
                    text.daemon(metric, id, value);
                }
            }
        };
        let flag = |is: bool| is.then_some(1.0);
        let more = |n: f64| (n > 0.0).then_some(n);
        each(&names::DAEMON_UP, &|d| Some(f64::from(u8::from(d.up))));
        each(&names::DAEMON_CORDONED, &|d| flag(d.cordoned));
        each(&names::DAEMON_REFUSED, &|d| flag(d.refused));
        each(&names::SLOTS, &|d| Some(d.slots.into()));
        each(&names::SLOTS_USED, &|d| Some(d.used.into()));
        each(&names::DAEMON_OPEN_SLOTS, &|d| (d.open < d.slots).then_some(d.open.into()));
        each(&names::DAEMON_STRANGERS, &|d| more(d.strangers.into()));
        each(&names::DAEMON_SESSIONS, &|d| Some(d.sessions as f64));
        each(&names::DAEMON_BACK_OFF, &|d| more(d.back_off));
        each(&names::DAEMON_INFO_SECONDS, &|d| d.latency);
        each(&names::DAEMON_IMAGES, &|d| d.holds.images.map(|n| n as f64));
        each(&names::DAEMON_IMAGES_BYTES, &|d| d.holds.images_bytes.map(|n| n as f64));
        each(&names::DAEMON_BUILD_CACHE, &|d| d.holds.build_cache.map(|n| n as f64));
        each(&names::DAEMON_DISK_USED, &|d| d.holds.disk.map(|(used, _)| used as f64));
        each(&names::DAEMON_DISK_FREE, &|d| d.holds.disk.map(|(_, free)| free as f64));
    }

    fn write_tenants(
        &self,
        text: &mut Text,
        label: impl Fn(&str) -> String,
        known: impl FnOnce() -> BTreeSet<String>,
    ) {
        // Several may share one label.
        let mut tenants: BTreeMap<String, Tenant> = BTreeMap::new();
        for (name, tenant) in &self.tenants {
            let sum = tenants.entry(label(name)).or_default();
            sum.sessions += tenant.sessions;
            sum.slots += tenant.slots;
            sum.waiting += tenant.waiting;
        }
        for label in known() {
            tenants.entry(label).or_default();
        }
        let mut each = |metric: &Metric, value: &dyn Fn(&Tenant) -> u32| {
            text.head(metric);
            for (label, tenant) in &tenants {
                text.series(metric, &[label], value(tenant));
            }
        };
        each(&names::QUEUE_WAITING, &|t| t.waiting);
        each(&names::TENANT_SESSIONS, &|t| t.sessions);
        each(&names::TENANT_SLOTS_USED, &|t| t.slots);
    }
}

impl Scaler {
    fn write(&self, text: &mut Text) {
        text.one(&names::SCALE_DESIRED, self.desired);
        if let Some(replicas) = self.replicas {
            text.one(&names::SCALE_REPLICAS, replicas);
        }
        text.one(&names::SCALE_FAULTS, self.faults);
        text.head(&names::SCALE_LIMIT);
        text.series(&names::SCALE_LIMIT, &["min"], self.limits.0);
        text.series(&names::SCALE_LIMIT, &["max"], self.limits.1);
        text.head(&names::SCALE_REASON);
        for reason in Reason::ALL {
            text.series(&names::SCALE_REASON, &[reason.as_str()], u8::from(reason == self.reason));
        }
        if let Some(startup) = self.startup {
            text.one(&names::DAEMON_STARTUP, startup);
        }
    }
}

/// The text format: <https://prometheus.io/docs/instrumenting/exposition_formats/>. Writing to a string cannot fail.
struct Text<'a> {
    out: &'a mut String,
}

impl Text<'_> {
    fn head(&mut self, metric: &Metric) {
        let (name, kind) = (metric.name, metric.kind.as_str());
        let _ = write!(self.out, "# HELP {name} {}\n# TYPE {name} {kind}\n", metric.help);
    }

    fn one(&mut self, metric: &Metric, value: impl Display) {
        self.head(metric);
        self.series(metric, &[], value);
    }

    fn series(&mut self, metric: &Metric, values: &[&str], value: impl Display) {
        self.out.push_str(metric.name);
        let mut open = '{';
        for (label, value) in metric.labels.iter().zip(values) {
            let _ = write!(self.out, "{open}{}=\"{}\"", label.name, escaped(value));
            open = ',';
        }
        let close = if values.is_empty() { "" } else { "}" };
        let _ = writeln!(self.out, "{close} {value}");
    }

    /// A series of a daemon whose name is escaped already.
    fn daemon(&mut self, metric: &Metric, id: &str, value: f64) {
        for part in [metric.name, "{daemon=\"", id, "\"} "] {
            self.out.push_str(part);
        }
        let _ = writeln!(self.out, "{value}");
    }
}

/// A label's value: backslash, quote and line end are escaped.
fn escaped(value: &str) -> Cow<'_, str> {
    if !value.contains(['\\', '"', '\n']) {
        return value.into();
    }
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n").into()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A pool in which every metric has a series.
    pub(crate) fn full(daemons: usize, tenants: u32) -> Snapshot {
        let daemon = |n: usize| Daemon {
            id: format!("dindpool-dind-7d9f8b6c5d-{n:05}"),
            state: State::Ready,
            health: Health::Healthy,
            up: n > 0,
            cordoned: n == 0,
            victim: n == 0,
            refused: n == 0,
            slots: 8,
            used: 3,
            open: if n == 0 { 4 } else { 8 },
            strangers: u32::from(n == 0),
            sessions: 10,
            back_off: if n == 0 { 4.0 } else { 0.0 },
            latency: Some(0.012_345_678),
            version: "28.5.2".into(),
            holds: Holds {
                images: Some(120),
                images_bytes: Some(41_234_567_890),
                build_cache: Some(21_234_567_890),
                disk: Some((61_234_567_890, 38_765_432_110)),
            },
        };
        let pool = Pool {
            daemons: (0..daemons).map(daemon).collect(),
            tenants: (0..tenants)
                .map(|n| (format!("tenant-{n}"), Tenant { sessions: 5, slots: 3, waiting: 2 }))
                .collect(),
            sessions: 10 * daemons,
            images: 5,
            queue_limit: 100,
            oldest: 1.5,
            problems: 1,
            scaler: Some(Scaler {
                desired: 4,
                replicas: Some(3),
                reason: Reason::Demand,
                faults: 1,
                startup: Some(12.5),
                limits: (1, 10),
            }),
        };
        Snapshot { admits: Some(true), pool: Some(pool) }
    }

    fn text(snapshot: &Snapshot) -> String {
        let mut out = String::new();
        snapshot.write(&mut out, str::to_string, BTreeSet::new);
        out
    }

    #[test]
    fn what_is_rare_has_a_series_only_where_it_is() {
        let text = text(&full(3, 1));
        let series = |name: &str| text.lines().filter(|l| l.starts_with(&format!("{name}{{"))).count();
        assert_eq!(series("dindpool_daemon_up"), 3);
        for rare in ["cordoned", "refused", "open_slots", "strangers", "back_off_seconds"] {
            assert_eq!(series(&format!("dindpool_daemon_{rare}")), 1, "{rare}");
        }
        assert!(text.contains("\ndindpool_daemons{state=\"ready\",health=\"healthy\"} 3\n"), "{text}");
        assert!(text.contains("\ndindpool_scale_reason{reason=\"demand\"} 1\n"));
        assert!(text.contains(
            "\ndindpool_daemon_disk_free_bytes{daemon=\"dindpool-dind-7d9f8b6c5d-00001\"} 38765432110\n"
        ));
    }

    #[test]
    fn who_does_not_admit_tells_nothing_of_the_pool() {
        let follower = Snapshot { admits: Some(false), pool: None };
        assert_eq!(text(&follower).lines().last(), Some("dindpool_lease_holder 0"));
        assert_eq!(text(&Snapshot::default()), "");
    }

    #[test]
    fn a_label_cannot_break_out_of_its_quotes() {
        let mut snapshot = full(1, 0);
        if let Some(pool) = &mut snapshot.pool {
            pool.daemons[0].id = "a\"} 1\nb\\".into();
        }
        assert!(text(&snapshot).contains("dindpool_daemon_up{daemon=\"a\\\"} 1\\nb\\\\\"} 0\n"));
    }

    #[test]
    fn tenants_of_one_label_are_added_up() {
        let mut out = String::new();
        full(0, 4).write(&mut out, |_| "other".into(), || ["idle".to_string()].into());
        assert!(out.contains("\ndindpool_tenant_slots_used{tenant=\"other\"} 12\n"), "{out}");
        assert!(out.contains("\ndindpool_queue_waiting{tenant=\"idle\"} 0\n"), "{out}");
    }
}
