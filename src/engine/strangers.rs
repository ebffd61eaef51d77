//! Load that no session of the pool made: containers that run on a daemon because somebody started them there
//! directly, because their restart policy did, or because the pool's memory of them went with a restart.
//!
//! A compose project, or a container without one, counts as one working session. A classic build's own containers
//! look the same (no label tells them, 20.10 to 29), so what starts while anybody builds there is left out until
//! nobody does.

use std::collections::{BTreeMap, BTreeSet};

use super::Engine;
use super::model::*;

/// The strangers on one daemon.
#[derive(Debug, Clone, Default)]
pub(super) struct Strangers {
    /// Containers that run, with what they count as one with.
    running: BTreeMap<String, String>,
    /// How many of them each of those is.
    groups: BTreeMap<String, u32>,
    /// They started while somebody built here.
    suspects: BTreeSet<String>,
}

impl Strangers {
    /// How many working sessions they are worth.
    pub fn count(&self) -> u32 {
        u32::try_from(self.groups.len()).unwrap_or(u32::MAX)
    }

    /// Whether a container may be a classic build's own.
    pub fn suspects(&self, id: &str) -> bool {
        self.suspects.contains(id)
    }

    /// Whether a container counts as load that nobody here made.
    pub fn counts(&self, id: &str) -> bool {
        self.running.contains_key(id)
    }

    /// A container is one of a group, or no stranger that runs.
    fn set(&mut self, id: &str, group: Option<&str>) {
        let before = match group {
            Some(group) => self.running.insert(id.to_string(), group.to_string()),
            None => self.running.remove(id),
        };
        if before.as_deref() == group {
            return;
        }
        if let Some(group) = group {
            *self.groups.entry(group.to_string()).or_default() += 1;
        }
        if let Some(before) = before
            && let Some(n) = self.groups.get_mut(&before)
        {
            *n -= 1;
            if *n == 0 {
                self.groups.remove(&before);
            }
        }
    }
}

impl Engine {
    /// Looks at a container again, after anything about it has changed.
    pub(super) fn count_stranger(&mut self, daemon: &DaemonId, id: &str) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        let object = self.objects.get(daemon, Kind::Container, id);
        let stranger = object.filter(|o| o.live && o.owners.is_empty() && o.tenant.is_none());
        let before = d.strangers.count();
        let Some(stranger) = stranger else {
            d.strangers.suspects.remove(id);
            d.strangers.set(id, None);
            self.queue.changed |= d.strangers.count() < before;
            return;
        };
        let known = d.strangers.running.contains_key(id);
        if !known && d.builders.under_way() {
            d.strangers.suspects.insert(id.to_string());
            return;
        }
        d.strangers.suspects.remove(id);
        d.strangers.set(id, Some(stranger.project.as_deref().unwrap_or(id)));
        // Two that turn out to be one project make room as well.
        self.queue.changed |= d.strangers.count() < before;
    }

    /// Nobody builds on the daemon any more: what still runs is no build's.
    pub(super) fn count_suspects(&mut self, daemon: &DaemonId) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        if d.strangers.suspects.is_empty() || d.builders.under_way() {
            return;
        }
        for id in std::mem::take(&mut d.strangers.suspects) {
            self.count_stranger(daemon, &id);
        }
    }

    /// The containers of a daemon, listed again: events may have been lost with a stream that broke.
    pub(super) fn containers(
        &mut self,
        daemon: &DaemonId,
        began: Time,
        listed: &[ListedContainer],
        projects: &[(Kind, String, String)],
        now: Time,
    ) {
        if !self.daemons.contains_key(daemon) {
            return;
        }
        let there: BTreeSet<&str> = listed.iter().map(|c| c.id.as_str()).collect();
        let doomed: Vec<String> = (self.objects.on(daemon))
            .filter(|(kind, id, o)| *kind == Kind::Container && !there.contains(id) && o.seen < began)
            .map(|(_, id, _)| id.to_string())
            .collect();
        for id in doomed {
            self.removed(daemon, Kind::Container, &id, now);
        }
        for container in listed {
            self.list_container(daemon, began, container, now);
        }
        for (kind, id, project) in projects {
            self.labelled(daemon, *kind, id, project, began);
        }
    }

    /// What the strangers count as, counted anew from the objects.
    ///
    /// # Panics
    /// When the running count is another.
    pub(super) fn check_strangers(&self) {
        for (id, daemon) in &self.daemons {
            let mut groups: BTreeMap<&str, u32> = BTreeMap::new();
            for (kind, container, o) in self.objects.on(id) {
                let stranger = o.live && o.owners.is_empty() && o.tenant.is_none();
                if kind == Kind::Container && stranger && !daemon.strangers.suspects.contains(container) {
                    *groups.entry(o.project.as_deref().unwrap_or(container)).or_default() += 1;
                }
            }
            let counted: BTreeMap<&str, u32> =
                daemon.strangers.groups.iter().map(|(group, n)| (group.as_str(), *n)).collect();
            assert_eq!(counted, groups, "strangers on {id}");
            assert!(
                daemon.strangers.suspects.is_empty() || daemon.builders.under_way(),
                "suspects on {id} while nobody builds"
            );
        }
    }
}
