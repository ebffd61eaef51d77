//! The pool at one moment, in the shape of the admin listener's `/status`. A stable interface: fields are
//! added, never renamed.

use serde::{Deserialize, Serialize};

use super::scaler::ScalerStatus;
use crate::engine::model::{CordonedBy, Drained, Health, SessionKey, State, Time};
use crate::engine::{Engine, Session};

/// How many containers of a session are named.
const NAMED: usize = 8;

/// The whole pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// dindpool's own version.
    pub version: String,
    /// The API versions that the pool advertises, `["1.40", "1.45"]`, once a daemon has answered.
    pub api: Option<(String, String)>,
    /// Every daemon.
    pub daemons: Vec<DaemonStatus>,
    /// Every session that has a lease.
    pub sessions: Vec<SessionStatus>,
    /// The admission queue.
    pub queue: QueueStatus,
    /// The autoscaler, where a provisioner can make daemons.
    #[serde(default)]
    pub scaler: Option<ScalerStatus>,
    /// Which proxy admits, where there are several.
    #[serde(default)]
    pub lease: Option<LeaseStatus>,
    /// What the provisioner has to complain of.
    pub problems: Vec<String>,
    /// How many image references are known.
    pub images: usize,
}

/// Which of several proxies admits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// This proxy: `holder` if it admits, `follower` if it asks the holder, `leaving` if it is about to end.
    pub role: Role,
    /// Who holds the Lease, as this proxy saw it last.
    pub holder: Option<String>,
    /// The number of the holder's tenure.
    pub tenure: u64,
    /// Other proxies that are connected to this one.
    pub peers: i64,
    /// Requests and streams that other proxies relay, as far as this one admits them.
    pub streams: usize,
}

/// What one of several proxies does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It admits.
    Holder,
    /// It asks the holder.
    Follower,
    /// It is about to end, and asks the holder until then.
    Leaving,
}

/// One daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its name.
    pub id: String,
    /// `tcp://…` or `unix://…`
    pub address: String,
    /// starting, ready, draining.
    pub state: State,
    /// healthy, ejected.
    pub health: Health,
    /// Why it is in this state; empty when all is well.
    pub reason: String,
    /// Whether it takes no new sessions although it may be well.
    #[serde(default)]
    pub cordoned: bool,
    /// By whom, and how far its drain is.
    #[serde(default)]
    pub cordon: Option<CordonStatus>,
    /// Engine version, empty until it answered.
    pub version: String,
    /// Slots in all.
    pub slots: u32,
    /// Slots in use.
    pub used: u32,
    /// Compose projects and lone containers that run there without a session of the pool.
    #[serde(default)]
    pub strangers: u32,
    /// Whether it is well and does not belong into this pool; the reason tells why.
    #[serde(default)]
    pub refused: bool,
    /// Sessions with a lease.
    pub sessions: usize,
    /// Slots that are open: fewer than `slots` during a slow start.
    #[serde(default)]
    pub open_slots: u32,
    /// For how many seconds it must be well before it gets sessions again; 0 unless it is ejected.
    #[serde(default)]
    pub back_off: f64,
    /// How many seconds `/info` takes, smoothed; `null` until it has answered.
    #[serde(default)]
    pub latency: Option<f64>,
}

impl DaemonStatus {
    /// Whether it takes new sessions.
    pub fn takes_sessions(&self) -> bool {
        self.state == State::Ready && self.health == Health::Healthy && !self.cordoned
    }

    /// `cordoned`, `draining` or `drained`, if it is any of these.
    pub fn cordon_word(&self) -> Option<&'static str> {
        self.cordon.as_ref().map(|c| match (&c.drained, c.deadline) {
            (Some(_), _) => "drained",
            (None, Some(_)) => "draining",
            (None, None) => "cordoned",
        })
    }
}

/// A daemon's cordon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CordonStatus {
    /// Who wanted it: operator, scaler.
    pub by: CordonedBy,
    /// Of a drain that waits: in how many seconds it cuts what is left.
    pub deadline: Option<f64>,
    /// Of a drain that has ended: how.
    pub drained: Option<Drained>,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// How it is recognised.
    pub key: String,
    /// Who it belongs to.
    pub tenant: String,
    /// Its daemon.
    pub daemon: String,
    /// Slots that it holds.
    pub slots: u32,
    /// Requests and streams that are open.
    pub open: u32,
    /// Its containers that run, or were created a moment ago.
    pub containers: usize,
    /// Their names, or short ids; some of them where they are many.
    #[serde(default)]
    pub names: Vec<String>,
    /// Builds under way.
    #[serde(default)]
    pub builds: u32,
    /// Whether they have run for longer than `container_lease` while nothing else of it was under way.
    #[serde(default)]
    pub overdue: bool,
    /// For how many seconds it has had this lease.
    pub since: f64,
}

/// The admission queue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QueueStatus {
    /// Tickets that wait.
    pub waiting: u32,
    /// How many may wait; 0 without a queue.
    pub limit: usize,
    /// Who waits, the next in front.
    pub tickets: Vec<TicketStatus>,
}

/// One ticket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TicketStatus {
    /// Where it stands, from 1.
    pub position: usize,
    /// The session that waits.
    pub key: String,
    /// Who it belongs to.
    pub tenant: String,
    /// For how many seconds it has waited.
    pub waited: f64,
    /// What it waits for, in words.
    #[serde(default)]
    pub awaits: String,
    /// For how many more seconds it can expect to wait; `null` while nobody knows.
    #[serde(default)]
    pub expected: Option<f64>,
}

/// All that waits, the next in front.
pub(super) fn tickets(engine: &Engine, now: Time) -> Vec<TicketStatus> {
    let expectation = engine.expectation(now);
    let tickets = engine.tickets().into_iter().enumerate();
    let told = tickets.map(|(i, ticket)| TicketStatus {
        position: i + 1,
        key: ticket.key.to_string(),
        tenant: ticket.tenant.to_string(),
        waited: now.saturating_sub(ticket.since).as_secs_f64(),
        awaits: ticket.awaited.to_string(),
        expected: expectation.map(|e| e.wait(i + 1).as_secs_f64()),
    });
    told.collect()
}

/// A session, if it has a lease.
pub(super) fn session(
    engine: &Engine,
    key: &SessionKey,
    session: &Session,
    now: Time,
) -> Option<SessionStatus> {
    let home = session.home.as_ref().filter(|h| h.lease.is_some())?;
    Some(SessionStatus {
        key: key.to_string(),
        tenant: session.tenant.to_string(),
        daemon: home.daemon.to_string(),
        slots: session.slots,
        open: session.open,
        containers: session.live.len(),
        names: session.live.iter().take(NAMED).map(|id| engine.container_name(&home.daemon, id)).collect(),
        builds: session.builds,
        overdue: session.is_overdue(),
        since: now.saturating_sub(home.since).as_secs_f64(),
    })
}
