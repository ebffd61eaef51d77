//! What is learned about objects and images, from responses, events and lists, and whose they become.

use std::collections::BTreeSet;

use super::images::Write;
use super::model::*;
use super::session::Owned;
use super::{Engine, Timer};

impl Engine {
    pub(super) fn learned(&mut self, daemon: &DaemonId, open: Option<OpenId>, fact: Fact, now: Time) {
        if !self.daemons.contains_key(daemon) {
            return;
        }
        let key = open.and_then(|o| self.opens.get(&o)).map(|o| o.key.clone());
        match fact {
            Fact::Created { kind, id, name } => {
                self.objects.add(daemon, kind, &id, name.as_deref(), now);
                if let Some(key) = key {
                    self.own(daemon, kind, &id, &key, now);
                }
            }
            Fact::Started { id } => {
                self.objects.add(daemon, Kind::Container, &id, None, now);
                if let Some(object) = self.objects.get_mut(daemon, Kind::Container, &id) {
                    object.started = true;
                }
                self.set_live(daemon, &id, true, now);
            }
            Fact::Stopped { id } => {
                if let Some(object) = self.objects.get_mut(daemon, Kind::Container, &id) {
                    object.started = true;
                }
                self.set_live(daemon, &id, false, now);
            }
            Fact::Renamed { id, name } => {
                self.objects.add(daemon, Kind::Container, &id, Some(&name), now);
            }
            Fact::Removed { kind, id } => self.removed(daemon, kind, &id, now),
            Fact::ImageWritten { reference, id, written } => {
                let makers = match key {
                    Some(key) => vec![key],
                    None => self.builders_on(daemon),
                };
                self.image_written(daemon, &reference, id.as_deref(), written, &makers, now);
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

    /// The sessions that may have made an image which only an event tells of.
    fn builders_on(&self, daemon: &DaemonId) -> Vec<SessionKey> {
        let mut keys: Vec<SessionKey> = self
            .opens
            .values()
            .filter(|o| o.daemon == *daemon && o.builds)
            .map(|o| o.key.clone())
            .chain(self.daemons.get(daemon).into_iter().flat_map(|d| d.builders.iter().cloned()))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    fn image_written(
        &mut self,
        daemon: &DaemonId,
        reference: &str,
        id: Option<&str>,
        written: Written,
        makers: &[SessionKey],
        now: Time,
    ) {
        // An event without a maker tells of somebody who works on the daemon directly.
        let written = if makers.is_empty() && written == Written::Made { Written::Found } else { written };
        let tenant = makers.first().and_then(|k| self.sessions.get(k)).map(|s| s.tenant.clone());
        self.images.write(Write { daemon, reference, id, written, tenant, makers }, now);
        if written == Written::Made {
            self.own_image(daemon, reference, makers);
        }
    }

    fn own_image(&mut self, daemon: &DaemonId, reference: &str, makers: &[SessionKey]) {
        for maker in makers {
            if let Some(session) = self.sessions.get_mut(maker)
                && session.home.as_ref().is_some_and(|h| h.daemon == *daemon)
            {
                session.owned.insert(Owned::Image(reference.to_string()));
            }
        }
    }

    fn disown_images(&mut self, daemon: &DaemonId, gone: Vec<(SessionKey, String)>, now: Time) {
        for (key, reference) in gone {
            if let Some(session) = self.sessions.get_mut(&key)
                && session.home.as_ref().is_some_and(|h| h.daemon == *daemon)
            {
                session.owned.remove(&Owned::Image(reference));
                self.settle(&key, now);
            }
        }
    }

    fn own(&mut self, daemon: &DaemonId, kind: Kind, id: &str, key: &SessionKey, now: Time) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        let home = session.home.as_ref().is_some_and(|h| h.daemon == *daemon);
        if let Some(object) = self.objects.get_mut(daemon, kind, id) {
            object.owner = Some(key.clone());
            object.tenant = Some(session.tenant.clone());
        }
        if home && matches!(kind, Kind::Container | Kind::Network | Kind::Volume) {
            session.owned.insert(Owned::Object(kind, id.to_string()));
        }
        if kind == Kind::Container {
            let started = self.objects.get(daemon, kind, id).is_some_and(|o| o.started);
            if !started {
                self.set_live(daemon, id, true, now);
                let timer = Timer::Container(daemon.clone(), id.to_string());
                self.timers.insert((now + self.config.unstarted, timer));
            } else {
                let live = self.objects.get(daemon, kind, id).is_some_and(|o| o.live);
                self.set_live(daemon, id, live, now);
            }
        }
    }

    /// Makes a container count as a unit of its owner's work, or no longer.
    pub(super) fn set_live(&mut self, daemon: &DaemonId, id: &str, live: bool, now: Time) {
        let Some(object) = self.objects.get_mut(daemon, Kind::Container, id) else { return };
        object.live = live;
        let Some(key) = object.owner.clone() else { return };
        let Some(session) = self.sessions.get_mut(&key) else { return };
        if session.home.as_ref().is_some_and(|h| h.daemon == *daemon) {
            if live {
                session.live.insert(id.to_string());
            } else {
                session.live.remove(id);
            }
            if live && session.lease().is_none() {
                self.revive(&key, now);
            }
            self.settle(&key, now);
            return;
        }
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
        self.settle(&key, now);
    }

    /// A container of a session whose lease has run out runs again (a restart policy, `docker start` from
    /// another session): the lease lives as long as it does.
    fn revive(&mut self, key: &SessionKey, now: Time) {
        let Some(session) = self.sessions.get(key) else { return };
        let Some(home) = &session.home else { return };
        let (tenant, source, daemon) = (session.tenant.clone(), session.source.clone(), home.daemon.clone());
        let _ = self.bind(key, &tenant, source, &daemon, now);
    }

    fn removed(&mut self, daemon: &DaemonId, kind: Kind, id: &str, now: Time) {
        if kind == Kind::Container {
            self.set_live(daemon, id, false, now);
        }
        if let Some(object) = self.objects.remove(daemon, kind, id)
            && let Some(key) = object.owner
            && let Some(session) = self.sessions.get_mut(&key)
        {
            if session.home.as_ref().is_some_and(|h| h.daemon == *daemon) {
                session.owned.remove(&Owned::Object(kind, id.to_string()));
            }
            self.settle(&key, now);
        }
    }

    pub(super) fn inventory(&mut self, daemon: &DaemonId, began: Time, inventory: Inventory, now: Time) {
        if !self.daemons.contains_key(daemon) {
            return;
        }
        let containers: BTreeSet<&str> = inventory.containers.iter().map(|c| c.id.as_str()).collect();
        let networks: BTreeSet<&str> = inventory.networks.iter().map(|(id, _)| id.as_str()).collect();
        let volumes: BTreeSet<&str> = inventory.volumes.iter().map(String::as_str).collect();
        let kinds = [Kind::Container, Kind::Network, Kind::Volume];
        let mut doomed = Vec::new();
        for (kind, id, d, object) in self.objects.iter() {
            let listed = match kind {
                Kind::Container => containers.contains(id),
                Kind::Network => networks.contains(id),
                _ => volumes.contains(id),
            };
            if d == daemon && kinds.contains(&kind) && !listed && object.seen < began {
                doomed.push((kind, id.to_string()));
            }
        }
        for (kind, id) in doomed {
            self.removed(daemon, kind, &id, now);
        }
        for container in &inventory.containers {
            let name = container.names.first().map(String::as_str);
            self.objects.add(daemon, Kind::Container, &container.id, name, now);
            let known =
                self.objects.get(daemon, Kind::Container, &container.id).map(|o| (o.live, o.started, o.seen));
            // A container that was created a moment ago and not started is live without running.
            if let Some((live, started, seen)) = known
                && live != container.running
                && (started || container.running)
                && seen < began
            {
                if let Some(o) = self.objects.get_mut(daemon, Kind::Container, &container.id) {
                    o.started = true;
                }
                self.set_live(daemon, &container.id, container.running, now);
            } else if container.running {
                self.set_live(daemon, &container.id, true, now);
            }
        }
        for (id, name) in &inventory.networks {
            self.objects.add(daemon, Kind::Network, id, Some(name), now);
        }
        for name in &inventory.volumes {
            self.objects.add(daemon, Kind::Volume, name, Some(name), now);
        }
        self.relist(daemon, began, &inventory.images, now);
    }

    pub(super) fn relist(&mut self, daemon: &DaemonId, began: Time, images: &[ListedImage], now: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        let builders: Vec<SessionKey> = std::mem::take(&mut d.builders).into_iter().collect();
        let tenant = builders.first().and_then(|k| self.sessions.get(k)).map(|s| s.tenant.clone());
        let (gone, made) = self.images.list(daemon, began, images, &builders, tenant, now);
        self.disown_images(daemon, gone, now);
        for reference in made {
            self.own_image(daemon, &reference, &builders);
        }
    }
}
