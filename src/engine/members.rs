//! The pool's members: who is there, how well, and what goes with a daemon that goes.

use std::collections::BTreeSet;

use super::daemon::Builders;
use super::model::*;
use super::strangers::Strangers;
use super::{Daemon, Engine, Timer, Unit, versions};

impl Engine {
    /// Recomputes the API range after a probe or a change of the pool, and refuses the daemons outside it.
    pub(super) fn agree_on_versions(&mut self) {
        let ranges =
            self.daemons.values().filter_map(|d| d.api_range().map(|range| (d.id.clone(), range))).collect();
        // Without daemons the last known range stays: clients negotiate before the first one is there.
        let Some(range) = versions::common(&ranges) else { return };
        self.range = Some((range.min, range.max));
        for d in self.daemons.values_mut() {
            let misfit = range.misfits.contains(&d.id);
            if misfit != d.misfit.is_some() {
                d.misfit = misfit.then(|| {
                    let text = |(major, minor): ApiVersion| format!("{major}.{minor}");
                    let (own_min, own_max) = d.api_range().unwrap_or_default();
                    format!(
                        "its API versions {} to {} do not meet the pool's {} to {}",
                        text(own_min),
                        text(own_max),
                        text(range.min),
                        text(range.max)
                    )
                });
                self.effects.push(changed(d));
                self.queue.changed = true;
            }
        }
    }

    pub(super) fn observed(&mut self, observed: Vec<Observed>, now: Time) {
        let there: BTreeSet<DaemonId> = observed.iter().map(|o| o.id.clone()).collect();
        let gone: Vec<DaemonId> = self.daemons.keys().filter(|id| !there.contains(*id)).cloned().collect();
        for id in gone {
            self.lose(&id, now);
            self.daemons.remove(&id);
            self.timers
                .retain(|(_, timer)| !matches!(timer, Timer::Deep(d) | Timer::SlowStart(d) | Timer::Leaving(d) if *d == id));
            self.shares_no_more(&id);
            self.effects.push(Effect::DaemonChanged {
                daemon: id,
                state: State::Gone,
                health: Health::Ejected,
                reason: "it is no longer part of the pool".into(),
            });
        }
        for o in observed {
            let new = !self.daemons.contains_key(&o.id);
            let d = self.daemons.entry(o.id.clone()).or_insert_with(|| Daemon::new(o.id.clone(), o.slots));
            if new {
                d.expected_until = now + self.config.patience;
                self.timers.insert((d.expected_until, Timer::Patience(o.id.clone())));
            }
            let before = d.standing();
            d.drain(o.draining);
            d.fix_slots(o.slots);
            if let Some(pending) = o.pending
                && d.state == State::Starting
            {
                d.reason = pending;
            }
            if d.standing() != before {
                self.effects.push(changed(d));
            }
        }
        self.queue.changed = true;
        self.agree_on_versions();
    }

    pub(super) fn replaced(&mut self, daemon: &DaemonId, now: Time) {
        if let Some(d) = self.daemons.get_mut(daemon) {
            d.forget_writes();
        }
        self.shares_no_more(daemon);
        self.lose(daemon, now);
    }

    /// The lists of a daemon were asked for at `began`. If nothing is left of what was there, its data has gone
    /// although it still calls itself the same.
    pub(super) fn lose_emptied(&mut self, daemon: &DaemonId, began: Time, inventory: &Inventory, now: Time) {
        let listed: BTreeSet<(Kind, &str)> =
            (inventory.containers.iter().map(|c| (Kind::Container, &c.id[..])))
                .chain(inventory.networks.iter().map(|(id, _)| (Kind::Network, &id[..])))
                .chain(inventory.volumes.iter().map(|name| (Kind::Volume, &name[..])))
                .collect();
        let known = self
            .objects
            .on(daemon)
            .filter(|(kind, _, _)| matches!(kind, Kind::Container | Kind::Network | Kind::Volume));
        let mut any = false;
        for (kind, id, object) in known {
            any = true;
            if object.seen >= began || listed.contains(&(kind, id)) {
                return;
            }
        }
        match self.images.emptied(daemon, began, &inventory.images) {
            Some(false) => return,
            images => any |= images.is_some(),
        }
        if any {
            self.effects.push(Effect::Emptied { daemon: daemon.clone() });
            self.replaced(daemon, now);
        }
    }

    fn shares_no_more(&mut self, daemon: &DaemonId) {
        for d in self.daemons.values_mut() {
            if d.shares.remove(daemon) {
                self.effects.push(changed(d));
            }
        }
    }

    /// Everything on a daemon is lost: its sessions, their containers and images.
    fn lose(&mut self, daemon: &DaemonId, now: Time) {
        self.queue.changed = true;
        self.objects.lose(daemon);
        self.images.forget(daemon);
        self.warm.forget(daemon);
        // Streams to it break by themselves and are released; they are no longer anybody's work.
        if let Some(d) = self.daemons.get_mut(daemon) {
            d.builders = Builders::default();
            d.strangers = Strangers::default();
            d.open = 0;
        }
        for open in self.opens.values_mut().filter(|o| o.daemon == *daemon) {
            (open.builds, open.orphan) = (false, true);
            let unit = std::mem::replace(&mut open.unit, Unit::None);
            if let Some(session) = self.sessions.get_mut(&open.key) {
                session.builds -= u32::from(unit == Unit::Build);
                session.others -= u32::from(unit == Unit::Other);
            }
        }
        let mut hit: Vec<SessionKey> = self
            .sessions
            .iter()
            .filter(|(_, s)| {
                s.home.as_ref().is_some_and(|h| h.daemon == *daemon) || s.foreign.contains_key(daemon)
            })
            .map(|(key, _)| key.clone())
            .collect();
        hit.sort_unstable();
        for key in hit {
            let Some(session) = self.sessions.get_mut(&key) else { continue };
            if session.foreign.remove(daemon).is_some()
                && let Some(d) = self.daemons.get_mut(daemon)
            {
                d.used -= 1;
            }
            if session.home.as_ref().is_some_and(|h| h.daemon == *daemon) {
                session.live.clear();
                if session.bound_to().is_some() {
                    session.lost = Some(daemon.clone());
                }
                session.owned.clear();
                self.end_lease(&key, now, true);
                if let Some(session) = self.sessions.get_mut(&key) {
                    session.home = None;
                }
            }
            self.settle(&key, now);
        }
    }
}

/// Tells how a daemon stands now.
pub(super) fn changed(daemon: &Daemon) -> Effect {
    Effect::DaemonChanged {
        daemon: daemon.id.clone(),
        state: daemon.state,
        health: daemon.shown_health(),
        reason: daemon.why(),
    }
}
