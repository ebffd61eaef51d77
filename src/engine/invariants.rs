//! What must hold after every event. Checked in debug builds, so that a test of anything above the engine
//! fails at the event that broke it, and not where the wrong count shows.

use std::collections::BTreeMap;

use super::model::{DaemonId, SessionKey};
use super::session::{Held, Session};
use super::{Engine, Timer, Unit};

#[derive(Default)]
struct Counts {
    open: u32,
    builds: u32,
    others: u32,
}

impl Engine {
    /// What must hold after every event: no slot counted twice or lost, no session on two daemons.
    ///
    /// # Panics
    /// When it does not.
    pub fn check_invariants(&self) {
        let mut counts: BTreeMap<&SessionKey, Counts> = BTreeMap::new();
        for open in self.opens.values() {
            let count = counts.entry(&open.key).or_default();
            count.open += u32::from(open.counted);
            count.builds += u32::from(open.unit == Unit::Build);
            count.others += u32::from(open.unit == Unit::Other);
            if open.unit != Unit::None {
                let home = self.sessions.get(&open.key).and_then(|s| s.home.as_ref());
                assert!(
                    home.is_some_and(|h| h.lease.is_some() && h.daemon == open.daemon),
                    "{} works on {} without a lease there",
                    open.key,
                    open.daemon
                );
            }
        }
        self.check_counters();
        self.check_queue();
        let none = Counts::default();
        for (key, session) in &self.sessions {
            self.check_session(key, session, counts.get(key).unwrap_or(&none));
        }
        self.check_daemons();
        // It looks at every container of every daemon.
        if self.next_open.is_multiple_of(8) {
            self.check_strangers();
        }
        for (group, siblings) in &self.sources {
            assert!(!siblings.is_empty(), "nobody comes from {group}");
            for key in siblings {
                let session = self.sessions.get(key);
                assert!(
                    session.is_some_and(|s| s.lease().is_some() && s.groups.contains(group)),
                    "{key} is found from {group} without a lease"
                );
            }
        }
    }

    fn check_session(&self, key: &SessionKey, session: &Session, counts: &Counts) {
        assert_eq!(session.idle.is_none(), session.busy(), "{key} is idle or busy");
        assert_eq!((session.builds, session.others), (counts.builds, counts.others), "units of {key}");
        assert_eq!(session.open, counts.open, "open requests of {key}");
        match &session.home {
            Some(home) => {
                assert!(
                    self.daemons.contains_key(&home.daemon),
                    "{key} is at home on a daemon that is not there"
                );
                assert!(!session.foreign.contains_key(&home.daemon), "{key} is a stranger at home");
            }
            None => assert!(session.live.is_empty() && session.owned.is_empty(), "{key} owns without a home"),
        }
        if session.lease().is_some() {
            assert!(session.slots >= session.wants(), "{key} works without a slot");
            assert!(
                session.groups.iter().all(|g| self.sources.get(g).is_some_and(|s| s.contains(key))),
                "{key} is not found from its sources"
            );
        } else {
            assert_eq!(session.slots, 0, "{key} has slots without a lease");
            assert!(!session.works(), "{key} works without a lease");
            assert!(session.groups.is_empty(), "{key} has no lease to find");
        }
        assert!(session.foreign.values().all(|ids| !ids.is_empty()));
        assert!(
            session.timer.is_none_or(|at| self.timers.contains(&(at, Timer::Session(key.clone())))),
            "timer of {key}"
        );
        assert!(
            Self::due(session, &self.config).is_none_or(|due| session.timer.is_some_and(|at| at <= due)),
            "{key} would be kept for ever"
        );
    }

    /// What is counted as it changes, counted anew.
    fn check_counters(&self) {
        let mut open: BTreeMap<&DaemonId, u32> = BTreeMap::new();
        self.opens.values().filter(|o| !o.orphan).for_each(|o| *open.entry(&o.daemon).or_default() += 1);
        for daemon in self.daemons.values() {
            assert_eq!(daemon.open, open.remove(&daemon.id).unwrap_or(0), "open requests on {}", daemon.id);
        }
        assert!(open.is_empty(), "open on daemons that are not there: {open:?}");
        let mut held = Held::default();
        for session in self.sessions.values() {
            let before = held.by(&session.tenant);
            held.change(&session.tenant, before, before + session.slots);
        }
        assert_eq!(self.held, held, "slots of tenants");
    }

    fn check_daemons(&self) {
        let mut counts: BTreeMap<&DaemonId, (u32, usize)> = BTreeMap::new();
        for (key, session) in &self.sessions {
            if let Some(home) = session.home.as_ref().filter(|h| h.lease.is_some()) {
                let (used, leases) = counts.entry(&home.daemon).or_default();
                *used += session.slots;
                *leases += 1;
                let daemon = self.daemons.get(&home.daemon);
                assert!(daemon.is_some_and(|d| d.sessions.contains(key)), "{} forgot {key}", home.daemon);
            }
            for daemon in session.foreign.keys() {
                counts.entry(daemon).or_default().0 += 1;
            }
        }
        for daemon in self.daemons.values() {
            let (used, leases) = counts.remove(&daemon.id).unwrap_or_default();
            assert_eq!(daemon.used, used, "slots in use on {}", daemon.id);
            assert_eq!(daemon.sessions.len(), leases, "leases on {}", daemon.id);
            if self.draining.contains(&daemon.id) {
                let work = leases > 0 || !self.work_on(&daemon.id).is_empty();
                assert_eq!(self.has_work(&daemon.id), work, "work on {}", daemon.id);
            }
        }
        assert!(counts.is_empty(), "on daemons that are not there: {counts:?}");
    }
}
