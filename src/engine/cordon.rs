//! Cordon and drain: a daemon that takes no new sessions, and one that is to be rid of its last work.
//!
//! ```text
//! open ──cordon──▶ cordoned ──drain──▶ draining ──no work left──▶ drained (idle)
//!   ▲                  │                  │   └────the deadline───▶ drained (cut)
//!   └────uncordon──────┴──────────────────┴─────────────────────────────┘
//! ```
//!
//! Who is bound to a cordoned daemon, or has something that exists only there, goes on working on it. A drain ends
//! leases without work at once instead of after their grace. At its deadline the shell breaks the streams that
//! are left; containers that run stay, and are told of: whoever deletes the daemon decides about them.

use std::collections::BTreeMap;

use super::model::*;
use super::objects::Object;
use super::session::Owned;
use super::{Engine, Timer, Unit};

/// Why a daemon takes no new sessions although it is well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cordon {
    /// Who wanted it.
    pub by: CordonedBy,
    /// Its drain, if there is one.
    pub drain: Option<Drain>,
}

/// How far a drain has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drain {
    /// Work is left; it is cut at the deadline.
    Waiting {
        /// When that is.
        deadline: Time,
    },
    /// It has ended.
    Done(Drained),
}

impl Cordon {
    /// When the drain cuts what is left, while it waits.
    pub fn deadline(&self) -> Option<Time> {
        match self.drain {
            Some(Drain::Waiting { deadline }) => Some(deadline),
            _ => None,
        }
    }
}

impl Engine {
    pub(super) fn cordon(&mut self, daemon: &DaemonId, by: CordonedBy) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        match &mut d.cordon {
            // The scaler's is lifted when it is needed, an operator's only by an operator.
            Some(cordon) if by == CordonedBy::Operator && cordon.by != by => cordon.by = by,
            Some(_) => return,
            none => *none = Some(Cordon { by, drain: None }),
        }
        // Without it the best that is left may be one that nobody was to go to as long as this one was there.
        self.queue.changed = true;
        self.effects.push(Effect::Cordoned { daemon: daemon.clone(), by });
    }

    pub(super) fn uncordon(&mut self, daemon: &DaemonId, by: CordonedBy) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        if by == CordonedBy::Scaler && d.cordon.as_ref().is_some_and(|c| c.by != by) {
            return;
        }
        let Some(cordon) = d.cordon.take() else { return };
        self.draining.remove(daemon);
        let draining = cordon.deadline().is_some();
        self.effects.push(Effect::Uncordoned { daemon: daemon.clone(), draining });
        self.queue.changed = true;
    }

    /// A second drain joins the first: that one's deadline stands.
    pub(super) fn drain(&mut self, daemon: &DaemonId, deadline: Time) {
        self.cordon(daemon, CordonedBy::Operator);
        let Some(cordon) = self.daemons.get_mut(daemon).and_then(|d| d.cordon.as_mut()) else { return };
        if cordon.deadline().is_some() {
            return;
        }
        cordon.drain = Some(Drain::Waiting { deadline });
        self.draining.insert(daemon.clone());
        self.timers.insert((deadline, Timer::Drain(daemon.clone())));
        self.effects.push(Effect::Draining { daemon: daemon.clone() });
    }

    /// Ends what a drain need not wait for, and the drains that have nothing left to wait for.
    pub(super) fn advance_drains(&mut self, now: Time) {
        for daemon in self.draining.clone() {
            let Some(d) = self.daemons.get(&daemon) else {
                self.draining.remove(&daemon);
                continue;
            };
            let busy = |key: &SessionKey| self.sessions.get(key).is_some_and(|s| s.busy());
            let idle: Vec<SessionKey> =
                d.sessions.iter().filter(|key| !busy(key) && !self.queue.has_of(key)).cloned().collect();
            for key in &idle {
                self.end_lease(key, now, false);
                self.settle(key, now);
            }
            if !self.has_work(&daemon) {
                self.drained(&daemon, Vec::new());
            }
        }
    }

    /// The deadline of a drain is over: what is left is cut.
    pub(super) fn drain_due(&mut self, daemon: &DaemonId, now: Time) {
        let cordon = self.daemons.get(daemon).and_then(|d| d.cordon.as_ref());
        if cordon.and_then(Cordon::deadline).is_none_or(|deadline| deadline > now) {
            return; // Of a drain that has ended.
        }
        let cut = self.work_on(daemon);
        for request in self.waits_for(daemon) {
            let message = format!("daemon {daemon} was drained before a slot came free on it");
            self.refuse_ticket(request, &Refusal::NoDaemon(message));
        }
        self.drained(daemon, cut);
    }

    fn drained(&mut self, daemon: &DaemonId, cut: Vec<Remaining>) {
        let left = self.left_on(daemon);
        let drained = Drained { cut, left };
        self.draining.remove(daemon);
        if let Some(cordon) = self.daemons.get_mut(daemon).and_then(|d| d.cordon.as_mut()) {
            cordon.drain = Some(Drain::Done(drained.clone()));
        }
        self.effects.push(Effect::Drained { daemon: daemon.clone(), drained });
    }

    /// Whether [`Engine::work_on`] has anything to tell. Asked after every event while a daemon drains: what is counted
    /// comes first, and as long as anybody works there nothing else is looked at.
    pub(super) fn has_work(&self, daemon: &DaemonId) -> bool {
        let Some(d) = self.daemons.get(daemon) else { return false };
        let counted = !d.sessions.is_empty() || d.open > 0 || d.used > 0 || d.strangers() > 0;
        let runs = |(kind, id, object): (Kind, &str, &Object)| {
            kind == Kind::Container && object.live && !d.strangers.suspects(id)
        };
        counted || self.objects.on(daemon).any(runs) || !self.waits_for(daemon).is_empty()
    }

    /// The work that is under way on a daemon or waits for it, by session.
    pub fn work_on(&self, daemon: &DaemonId) -> Vec<Remaining> {
        let mut work: BTreeMap<Option<&SessionKey>, Remaining> = BTreeMap::new();
        for open in self.opens.values().filter(|o| o.daemon == *daemon && !o.orphan) {
            let of = work.entry(Some(&open.key)).or_default();
            of.open += 1;
            of.builds += u32::from(open.unit == Unit::Build);
        }
        let of_a_build = |id| self.daemons.get(daemon).is_some_and(|d| d.strangers.suspects(id));
        for (kind, id, object) in self.objects.on(daemon) {
            if kind == Kind::Container && object.live && !of_a_build(id) {
                work.entry(object.owners.first()).or_default().containers.push(name_of(id, object));
            }
        }
        for request in self.waits_for(daemon) {
            work.entry(self.queue.key_of(request)).or_default().waiting += 1;
        }
        work.into_iter().map(|(key, of)| Remaining { key: key.cloned(), ..of }).collect()
    }

    /// A container as `docker ps` shows it.
    pub fn container_name(&self, daemon: &DaemonId, id: &str) -> String {
        match self.objects.get(daemon, Kind::Container, id) {
            Some(object) => name_of(id, object),
            None => id.chars().take(12).collect(),
        }
    }

    /// Stopped containers and unpushed images: nothing of it is work, and all of it goes with the daemon.
    fn left_on(&self, daemon: &DaemonId) -> Left {
        let mut left = Left::default();
        for (kind, id, object) in self.objects.on(daemon) {
            if kind == Kind::Container && !object.live {
                left.containers.push(name_of(id, object));
            }
        }
        let at_home = |s: &&super::Session| s.home.as_ref().is_some_and(|h| h.daemon == *daemon);
        for session in self.sessions.values().filter(at_home) {
            left.images.extend(session.owned.iter().filter_map(|o| match o {
                Owned::Image(reference) => Some(reference.clone()),
                Owned::Object(..) => None,
            }));
        }
        // The sessions are hashed: their order must not show.
        left.images.sort_unstable();
        left.images.dedup();
        left
    }
}

/// A container as `docker ps` shows it.
fn name_of(id: &str, object: &Object) -> String {
    object.name.clone().unwrap_or_else(|| id.chars().take(12).collect())
}
