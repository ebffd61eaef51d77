//! What must hold after every event.

use std::collections::{BTreeMap, BTreeSet};

use super::model::SessionKey;
use super::{Engine, Timer, Unit};

impl Engine {
    /// What must hold after every event: no slot counted twice or lost, no session on two daemons.
    ///
    /// # Panics
    /// When it does not.
    pub fn check_invariants(&self) {
        for daemon in self.daemons.values() {
            let mut used = 0;
            let mut sessions = BTreeSet::new();
            for (key, session) in &self.sessions {
                if session.home.as_ref().is_some_and(|h| h.daemon == daemon.id && h.lease.is_some()) {
                    used += session.slots;
                    sessions.insert(key.clone());
                }
                used += u32::from(session.foreign.contains_key(&daemon.id));
            }
            assert_eq!(daemon.used, used, "slots in use on {}", daemon.id);
            assert_eq!(daemon.sessions, sessions, "leases on {}", daemon.id);
        }
        let mut open: BTreeMap<&SessionKey, (u32, u32, u32)> = BTreeMap::new();
        for o in self.opens.values() {
            let counts = open.entry(&o.key).or_default();
            counts.0 += u32::from(o.counted);
            counts.1 += u32::from(o.unit == Unit::Build);
            counts.2 += u32::from(o.unit == Unit::Other);
        }
        for (key, session) in &self.sessions {
            assert_eq!(session.idle.is_none(), session.busy(), "{key} is idle or busy");
            let counts = open.get(key).copied().unwrap_or_default();
            assert_eq!((session.builds, session.others), (counts.1, counts.2), "units of {key}");
            assert_eq!(session.open, counts.0, "open requests of {key}");
            assert!(session.lease().is_none() || session.home.is_some());
            assert!(session.slots == 0 || session.lease().is_some(), "{key} has slots without a lease");
            assert!(
                session.slots >= session.wants() || session.lease().is_none(),
                "{key} works without a slot"
            );
            assert!(session.foreign.values().all(|ids| !ids.is_empty()));
            assert!(
                session.timer.is_none_or(|at| self.timers.contains(&(at, Timer::Session(key.clone())))),
                "timer of {key}"
            );
            assert!(
                session.timer.is_some() || Self::due(session, &self.config).is_none(),
                "{key} would be kept for ever"
            );
        }
        for siblings in self.sources.values() {
            assert!(siblings.iter().all(|k| self.sessions.get(k).is_some_and(|s| s.lease().is_some())));
        }
    }
}
