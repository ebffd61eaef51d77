//! A daemon that somebody is about to end, and that is asked for beforehand: the preStop of a pod. Its end waits for
//! the work on it, and nothing new comes.
//!
//! ```text
//! ready or draining ──is about to end──▶ closed ──nobody works there──▶ let go: nothing of it counts any more
//!        ▲                                 │ nobody asks any more                 │
//!        └─────────────────────────────────┴──it was met anew, and is not draining┘
//! ```
//!
//! That a daemon drains is the provisioner's word, which may come late (a slow API server) or never (a container that
//! is restarted because its probe failed). So who asks closes the daemon himself, for as long as he goes on asking.

use std::collections::BTreeMap;

use super::model::*;
use super::objects::Object;
use super::{Engine, Session, Timer};

/// Whether a daemon may end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Departure {
    /// There is no such daemon.
    Unknown,
    /// What is on it has not been listed yet.
    Unlisted,
    /// This is under way on it, or was a moment ago: the next command of a script follows within seconds.
    Busy(Vec<Remaining>),
    /// Nothing is under way on it.
    Idle,
    /// It was told that it may end.
    LetGo,
}

impl Engine {
    /// Somebody is about to end the daemon, and asks again before `until`.
    pub(super) fn leaving(&mut self, daemon: &DaemonId, until: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        if d.leaving.is_none_or(|before| before < until) {
            self.queue.changed |= d.leaving.is_none(); // As with a cordon.
            d.leaving = Some(until);
            self.timers.insert((until, Timer::Leaving(daemon.clone())));
        }
    }

    /// He has not asked again.
    pub(super) fn leaving_due(&mut self, daemon: &DaemonId, now: Time) {
        if let Some(d) = self.daemons.get_mut(daemon)
            && d.leaving.is_some_and(|until| until <= now)
        {
            d.leaving = None;
            self.queue.changed = true;
        }
    }

    /// Whether the daemon may end. A lease without work does not keep it, nor what its session owns there: the daemon
    /// goes anyway.
    pub fn departure(&self, daemon: &DaemonId) -> Departure {
        let Some(d) = self.daemons.get(daemon) else { return Departure::Unknown };
        if d.let_go {
            return Departure::LetGo;
        }
        if !d.listed {
            return Departure::Unlisted;
        }
        let runs = |(kind, id, object): (Kind, &str, &Object)| {
            kind == Kind::Container && object.live && !d.strangers.suspects(id)
        };
        let busy = d.open > 0
            || d.used > 0
            || d.strangers() > 0
            || d.builders.under_way()
            || self.objects.on(daemon).any(runs)
            || !self.waits_for(daemon).is_empty();
        if busy { Departure::Busy(self.work_on(daemon)) } else { Departure::Idle }
    }

    /// The daemon is told that it may end, if it may. Whoever was there before begins anew elsewhere; who owned
    /// something there is told that it is lost.
    pub(super) fn let_go(&mut self, daemon: &DaemonId, now: Time) {
        if self.departure(daemon) != Departure::Idle {
            return;
        }
        let lease_here = |s: &Session| s.home.as_ref().is_some_and(|h| h.daemon == *daemon);
        let mut keys: Vec<SessionKey> =
            self.sessions.iter().filter(|(_, s)| lease_here(s)).map(|(key, _)| key.clone()).collect();
        keys.sort_unstable();
        for key in &keys {
            self.end_lease(key, now, false);
        }
        self.replaced(daemon, now);
        if let Some(d) = self.daemons.get_mut(daemon) {
            d.let_go = true;
        }
    }

    /// Whether an event tells of a daemon that was let go: it would be known again although it ends. One that was
    /// not ended after all is met anew when it is back.
    pub(super) fn is_of_one_let_go(&mut self, event: &Event) -> bool {
        let daemon = match event {
            Event::Learned { daemon, .. }
            | Event::Containers { daemon, .. }
            | Event::Images { daemon, .. }
            | Event::Inventory { daemon, .. } => daemon,
            _ => return false,
        };
        let Some(d) = self.daemons.get_mut(daemon).filter(|d| d.let_go) else { return false };
        if matches!(event, Event::Inventory { .. }) && d.state != State::Draining {
            (d.let_go, d.leaving) = (false, None);
            self.queue.changed = true;
            return false;
        }
        true
    }
}

impl Engine {
    /// Whether anybody works on a daemon or has a lease there, of those of which it is known.
    pub fn busy_daemons(&self) -> BTreeMap<DaemonId, bool> {
        let known = self.daemons.values().filter(|d| d.listed && d.state == State::Ready && !d.let_go);
        known.map(|d| (d.id.clone(), self.has_work(&d.id))).collect()
    }
}
