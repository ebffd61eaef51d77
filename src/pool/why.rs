//! Why a session is where it is, as `dindpool why` and `GET /sessions/KEY` tell it.

use serde::{Deserialize, Serialize};

use super::journal::Entry;
use super::recognised::recognised;
use super::status::{SessionStatus, TicketStatus};
use super::{Pool, State};
use crate::engine::model::{SessionKey, Time};
use crate::engine::reason::Because;

/// What there is to tell about a session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Why {
    /// Its key.
    pub key: String,
    /// Who it belongs to.
    pub tenant: String,
    /// How it was recognised, in words.
    pub recognised: String,
    /// The daemon that it is bound to, or was last.
    pub daemon: Option<String>,
    /// Whether it has a lease, and what runs under it.
    pub session: Option<SessionStatus>,
    /// Why that daemon, with what was compared; `null` where another proxy decided it.
    pub why: Option<Because>,
    /// The same in words.
    pub reason: String,
    /// For how many seconds the request that bound it waited.
    pub waited: f64,
    /// What it waited for, in words.
    pub awaited: Option<String>,
    /// What of it waits now.
    pub waiting: Vec<TicketStatus>,
    /// What happened to it lately, the oldest first.
    pub events: Vec<Entry>,
}

/// How many keys are told where a part of one means several.
const SEVERAL: usize = 20;

impl Pool {
    /// What there is to tell of the session with this key, or of the only one whose key holds this.
    ///
    /// # Errors
    /// When there is none, or several: their keys, some of them where they are many.
    pub fn why(&self, part: &str) -> Result<Why, Vec<String>> {
        let now = self.now();
        let mut why = {
            let state = self.lock();
            let key = find(&state, part)?;
            tell(&state, &key, now)
        };
        let entries = self.entries(0).into_iter();
        why.events = entries.filter(|e| e.session.as_deref() == Some(why.key.as_str())).collect();
        Ok(why)
    }
}

/// The session that is meant: bound ones, remembered ones, and those that wait for the first time.
fn find(state: &State, part: &str) -> Result<SessionKey, Vec<String>> {
    let exact = SessionKey::from(part);
    let tickets = state.engine.tickets();
    if state.engine.session(&exact).is_some() || tickets.iter().any(|t| *t.key == exact) {
        return Ok(exact);
    }
    let bound = state.engine.sessions().map(|(key, _)| key);
    let waiting = tickets.iter().map(|t| t.key);
    let mut found: Vec<&SessionKey> =
        bound.chain(waiting).filter(|key| !part.is_empty() && key.as_str().contains(part)).collect();
    found.sort_unstable();
    found.dedup();
    match &found[..] {
        [one] => Ok((*one).clone()),
        several => Err(several.iter().take(SEVERAL).map(ToString::to_string).collect()),
    }
}

fn tell(state: &State, key: &SessionKey, now: Time) -> Why {
    let waiting: Vec<TicketStatus> =
        super::status::tickets(&state.engine, now).into_iter().filter(|t| t.key == key.as_str()).collect();
    let session = state.engine.session(key);
    let tenant = session.map(|s| s.tenant.to_string());
    let tenant = tenant.or_else(|| waiting.first().map(|t| t.tenant.clone())).unwrap_or_default();
    let home = session.and_then(|s| s.home.as_ref());
    let decided = home.and_then(|home| home.why.as_deref());
    let reason = match (home, decided) {
        (Some(_), Some(why)) => why.because.to_string(),
        (Some(_), None) => "another proxy, which admitted before this one, put it there".to_string(),
        (None, _) if !waiting.is_empty() => "it has no daemon yet: it waits".to_string(),
        (None, _) => "it has no daemon: it has started no work".to_string(),
    };
    Why {
        key: key.to_string(),
        recognised: recognised(key, &tenant.as_str().into()),
        tenant,
        daemon: home.map(|home| home.daemon.to_string()),
        session: session.and_then(|s| super::status::session(&state.engine, key, s, now)),
        why: decided.map(|why| why.because.clone()),
        reason,
        waited: decided.map_or(0.0, |why| why.waited.as_secs_f64()),
        awaited: decided.and_then(|why| why.awaited.as_ref()).map(ToString::to_string),
        waiting,
        events: Vec::new(),
    }
}
