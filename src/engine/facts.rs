//! What is learned about objects and images, from responses, events and lists, and whose they become.

use std::collections::BTreeSet;

use super::images::Write;
use super::model::*;
use super::reason::{Because, Why};
use super::session::Owned;
use super::{Engine, Open, Timer};

impl Engine {
    pub(super) fn learned(&mut self, daemon: &DaemonId, open: Option<OpenId>, fact: Fact, now: Time) {
        if !self.daemons.contains_key(daemon) {
            return;
        }
        if open.and_then(|open| self.opens.get(&open)).is_some_and(|open| open.orphan) {
            return;
        }
        // Facts of requests that have ended are nobody's: their sessions may own something else by now.
        let by = open.and_then(|open| self.opens.get(&open)).filter(|open| open.daemon == *daemon).cloned();
        if let Some(by) = &by {
            self.prove(by);
        }
        match fact {
            Fact::Created { kind, id, name } => {
                self.objects.add(daemon, kind, &id, name.as_deref(), now);
                if let Some(by) = by {
                    self.own(daemon, kind, &id, &by.key, &by.tenant, now);
                }
            }
            Fact::Labelled { kind, id, project } => self.labelled(daemon, kind, &id, &project, now),
            Fact::Started { id } => {
                self.objects.add(daemon, Kind::Container, &id, None, now);
                self.ran(daemon, &id, true, now, now);
            }
            Fact::Stopped { id } => {
                self.ran(daemon, &id, false, now, now);
            }
            Fact::Renamed { id, name } => {
                self.objects.add(daemon, Kind::Container, &id, Some(&name), now);
            }
            Fact::Removed { kind, id } => self.removed(daemon, kind, &id, now),
            Fact::ImageWritten { reference, id, written } => {
                self.image_written(daemon, &reference, id.as_deref(), written, by.as_ref(), now);
            }
            Fact::ImageRemoved { reference } => {
                let gone = self.images.remove(daemon, &reference);
                self.disown_images(daemon, gone, now);
            }
            Fact::ImagePushed { reference } => {
                let makers = self.images.pushed(daemon, &reference);
                self.disown_images(daemon, makers.into_iter().map(|m| (m, reference.clone())).collect(), now);
            }
        }
    }

    fn image_written(
        &mut self,
        daemon: &DaemonId,
        reference: &str,
        id: Option<&str>,
        written: Written,
        by: Option<&Open>,
        now: Time,
    ) {
        let (makers, tenants) = match by {
            Some(by) => (vec![by.key.clone()], vec![by.tenant.clone()]),
            // An event does not say whose it was.
            None => self.daemons.get(daemon).map(|d| d.builders.all()).unwrap_or_default(),
        };
        // An event without a maker tells of somebody who works on the daemon directly.
        let written = if makers.is_empty() && written == Written::Made { Written::Found } else { written };
        let (makers, began) = (&makers[..], by.map(|by| by.since));
        let write = Write { daemon, reference, id, written, tenants: &tenants, makers, began };
        let wrote = self.images.write(write, now);
        let displaced = wrote.displaced.into_iter().map(|maker| (maker, reference.to_string())).collect();
        self.disown_images(daemon, displaced, now);
        if written == Written::Made && wrote.unpushed {
            self.own_image(daemon, reference, makers, now);
        }
    }

    fn own_image(&mut self, daemon: &DaemonId, reference: &str, makers: &[SessionKey], now: Time) {
        for maker in makers {
            if let Some(session) = self.sessions.get_mut(maker)
                && session.home.as_ref().is_some_and(|h| h.daemon == *daemon)
            {
                session.owned.insert(Owned::Image(reference.to_string()));
                self.settle(maker, now);
            }
        }
    }

    fn disown_images(&mut self, daemon: &DaemonId, gone: Vec<(SessionKey, String)>, now: Time) {
        for (key, reference) in gone {
            if let Some(session) = self.sessions.get_mut(&key)
                && session.home.as_ref().is_some_and(|h| h.daemon == *daemon)
            {
                session.owned.remove(&Owned::Image(reference));
                self.owns_less(&key, now);
            }
        }
    }

    /// What waited for a session's daemon alone may go to any, once nothing of its own is there.
    fn owns_less(&mut self, key: &SessionKey, now: Time) {
        let bound = self.sessions.get(key).is_some_and(|s| s.bound_to().is_some());
        self.queue.changed |= !bound && self.queue.has_of(key);
        self.settle(key, now);
    }

    fn own(&mut self, daemon: &DaemonId, kind: Kind, id: &str, key: &SessionKey, tenant: &Tenant, now: Time) {
        let Some(object) = self.objects.get_mut(daemon, kind, id) else { return };
        object.tenant = Some(tenant.clone());
        if kind == Kind::Container {
            self.count_stranger(daemon, id); // No stranger any more.
        }
        let Some(object) = self.objects.get_mut(daemon, kind, id) else { return };
        let Some(session) = self.sessions.get_mut(key) else { return };
        if object.owners.contains(key) {
            return; // Told twice.
        }
        object.owners.push(key.clone());
        if let Some(project) = object.project.clone() {
            self.objects.join(daemon, &project, key);
        }
        let Some(object) = self.objects.get_mut(daemon, kind, id) else { return };
        let home = session.home.as_ref().is_some_and(|h| h.daemon == *daemon);
        if home && matches!(kind, Kind::Container | Kind::Network | Kind::Volume) {
            session.owned.insert(Owned::Object(kind, id.to_string()));
        }
        if kind == Kind::Container {
            let (started, live) = (object.started, object.live);
            if !started {
                object.unstarted = now + self.config.unstarted;
                let timer = Timer::Container(daemon.clone(), id.to_string());
                self.timers.insert((object.unstarted, timer));
            }
            self.set_live(daemon, id, live || !started, now);
        }
    }

    /// A container has started or exited, as was seen at `seen`.
    fn ran(&mut self, daemon: &DaemonId, id: &str, running: bool, seen: Time, now: Time) {
        if let Some(object) = self.objects.get_mut(daemon, Kind::Container, id) {
            object.started = true;
            object.seen = seen;
        }
        self.set_live(daemon, id, running, now);
    }

    /// Makes a container count as a unit of its owner's work, or no longer.
    pub(super) fn set_live(&mut self, daemon: &DaemonId, id: &str, live: bool, now: Time) {
        let Some(object) = self.objects.get_mut(daemon, Kind::Container, id) else { return };
        object.live = live;
        for key in object.owners.clone() {
            self.count_container(&key, daemon, id, live, now);
        }
        self.count_stranger(daemon, id);
    }

    /// An object belongs to a compose project.
    pub(super) fn labelled(&mut self, daemon: &DaemonId, kind: Kind, id: &str, project: &str, seen: Time) {
        self.objects.label(daemon, kind, id, project, seen);
        if kind == Kind::Container {
            self.count_stranger(daemon, id);
        }
    }

    fn count_container(&mut self, key: &SessionKey, daemon: &DaemonId, id: &str, live: bool, now: Time) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        if session.home.as_ref().is_some_and(|h| h.daemon == *daemon) {
            if live {
                session.live.insert(id.to_string());
            } else {
                session.live.remove(id);
            }
            if live && session.lease().is_none() {
                self.revive(key, now);
            }
        } else {
            let elsewhere = session.foreign.entry(daemon.clone()).or_default();
            let before = u32::from(!elsewhere.is_empty());
            if live {
                elsewhere.insert(id.to_string());
            } else {
                elsewhere.remove(id);
            }
            let after = u32::from(!elsewhere.is_empty());
            if after == 0 {
                session.foreign.remove(daemon);
            }
            if let Some(d) = self.daemons.get_mut(daemon) {
                d.used = d.used + after - before;
            }
            self.queue.changed |= after < before;
        }
        self.settle(key, now);
    }

    /// A container of a session whose lease has run out runs again (a restart policy, `docker start` from
    /// another session): the lease lives as long as it does.
    pub(super) fn revive(&mut self, key: &SessionKey, now: Time) {
        let Some(session) = self.sessions.get(key) else { return };
        let Some(home) = &session.home else { return };
        let (tenant, daemon) = (session.tenant.clone(), home.daemon.clone());
        let why = Why { because: Because::Own, waited: Time::ZERO, awaited: None };
        self.bind(key, &tenant, &daemon, Some(why), now);
    }

    pub(super) fn removed(&mut self, daemon: &DaemonId, kind: Kind, id: &str, now: Time) {
        if kind == Kind::Container {
            self.set_live(daemon, id, false, now);
        }
        let owners = self.objects.remove(daemon, kind, id).map(|o| o.owners).unwrap_or_default();
        for key in owners {
            if let Some(session) = self.sessions.get_mut(&key)
                && session.home.as_ref().is_some_and(|h| h.daemon == *daemon)
            {
                session.owned.remove(&Owned::Object(kind, id.to_string()));
                self.owns_less(&key, now);
            }
        }
    }

    pub(super) fn inventory(&mut self, daemon: &DaemonId, began: Time, inventory: Inventory, now: Time) {
        match self.daemons.get_mut(daemon) {
            Some(d) => d.listed = true,
            None => return,
        }
        self.lose_emptied(daemon, began, &inventory, now);
        let containers: BTreeSet<&str> = inventory.containers.iter().map(|c| c.id.as_str()).collect();
        let networks: BTreeSet<&str> = inventory.networks.iter().map(|(id, _)| id.as_str()).collect();
        let volumes: BTreeSet<&str> = inventory.volumes.iter().map(String::as_str).collect();
        let doomed: Vec<(Kind, String)> = (self.objects.on(daemon))
            .filter(|(kind, id, object)| {
                let listed = match kind {
                    Kind::Container => containers.contains(id),
                    Kind::Network => networks.contains(id),
                    Kind::Volume => volumes.contains(id),
                    Kind::Exec | Kind::BuildSession | Kind::Project => true,
                };
                !listed && object.seen < began
            })
            .map(|(kind, id, _)| (kind, id.to_string()))
            .collect();
        for (kind, id) in doomed {
            self.removed(daemon, kind, &id, now);
        }
        for container in &inventory.containers {
            self.list_container(daemon, began, container, now);
        }
        for (id, name) in &inventory.networks {
            self.objects.add(daemon, Kind::Network, id, Some(name), began);
        }
        for name in &inventory.volumes {
            self.objects.add(daemon, Kind::Volume, name, Some(name), began);
        }
        for (kind, id, project) in &inventory.projects {
            self.labelled(daemon, *kind, id, project, began);
        }
        self.relist(daemon, began, &inventory.images, now);
    }

    pub(super) fn list_container(
        &mut self,
        daemon: &DaemonId,
        began: Time,
        listed: &ListedContainer,
        now: Time,
    ) {
        let known = self.objects.get(daemon, Kind::Container, &listed.id).map(|o| (o.seen, o.started));
        if known.is_some_and(|(seen, _)| seen >= began) {
            return; // What is known is newer than the list.
        }
        let name = listed.names.first().map(String::as_str);
        self.objects.add(daemon, Kind::Container, &listed.id, name, began);
        let started = known.is_some_and(|(_, started)| started);
        // A container that was created a moment ago and not started is live without running.
        if listed.running || started {
            self.ran(daemon, &listed.id, listed.running, began, now);
        }
    }

    pub(super) fn relist(&mut self, daemon: &DaemonId, began: Time, images: &[ListedImage], now: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        // A build that is under way may have written its image already.
        let (builders, tenants) = d.builders.all();
        d.builders.listed(began);
        let (gone, made) = self.images.list(daemon, began, images, &builders, &tenants);
        self.disown_images(daemon, gone, now);
        for reference in made {
            self.own_image(daemon, &reference, &builders, now);
        }
    }
}
