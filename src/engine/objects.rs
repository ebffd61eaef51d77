//! Which daemon has which container, network, volume, exec and BuildKit session, and whose it is.
//!
//! Ids are facts: they route wherever the object is. Names are not: `db` and `app_default` exist on many
//! daemons, so a name means the session's own one first, and another daemon's only when it is the only one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::model::{DaemonId, Kind, SessionKey, Tenant, Time};

/// Execs stay until their container goes, because the CLI inspects them after they ended; a long-lived
/// container with a health check would collect them for ever, so the oldest are forgotten beyond this.
const EXECS: usize = 20_000;
/// Ids of objects that went with their daemon, kept so that their users get a true answer.
const LOST: usize = 20_000;

/// An object on a daemon.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub name: Option<String>,
    pub tenant: Option<Tenant>,
    /// The sessions that made it. More than one only for a volume: making one that exists succeeds.
    pub owners: Vec<SessionKey>,
    /// A container that counts as a unit of work: created a moment ago, or running.
    pub live: bool,
    /// Whether it has run at all: a container that is never started stops counting after a minute.
    pub started: bool,
    /// Until when it counts if it is not started.
    pub unstarted: Time,
    /// The compose project that it belongs to.
    pub project: Option<String>,
    /// When something was learned of it last: a list that was asked for before is older news.
    pub seen: Time,
}

/// All objects of all daemons.
#[derive(Debug, Default)]
pub(super) struct Objects {
    by_id: BTreeMap<(Kind, String), BTreeMap<DaemonId, Object>>,
    by_name: BTreeMap<(Kind, String), BTreeSet<(DaemonId, String)>>,
    /// What each daemon has, so that a list of one daemon costs nothing for all the others.
    on: BTreeMap<DaemonId, BTreeSet<(Kind, String)>>,
    /// How many others keep an object known that is none by itself: open connections a BuildKit session's uuid,
    /// containers and networks their compose project.
    held: BTreeMap<(DaemonId, Kind, String), u32>,
    execs: VecDeque<(DaemonId, String)>,
    lost: BTreeMap<String, DaemonId>,
    lost_order: VecDeque<String>,
}

impl Objects {
    /// Adds an object, or completes one that is known, as something learned at `seen`. Returns whether it is
    /// new.
    pub fn add(&mut self, daemon: &DaemonId, kind: Kind, id: &str, name: Option<&str>, seen: Time) -> bool {
        let entry = self.by_id.entry((kind, id.to_string())).or_default();
        let new = !entry.contains_key(daemon);
        let object = entry.entry(daemon.clone()).or_insert(Object {
            name: None,
            tenant: None,
            owners: Vec::new(),
            live: false,
            started: false,
            unstarted: Time::ZERO,
            project: None,
            seen,
        });
        object.seen = object.seen.max(seen);
        if let Some(name) = name
            && object.name.as_deref() != Some(name)
        {
            let old = object.name.replace(name.to_string());
            if let Some(old) = old {
                self.unname(kind, &old, daemon, id);
            }
            self.by_name
                .entry((kind, name.to_string()))
                .or_default()
                .insert((daemon.clone(), id.to_string()));
        }
        if new {
            self.on.entry(daemon.clone()).or_default().insert((kind, id.to_string()));
        }
        if new && kind == Kind::Exec {
            self.execs.push_back((daemon.clone(), id.to_string()));
            if self.execs.len() > EXECS
                && let Some((daemon, oldest)) = self.execs.pop_front()
            {
                self.remove(&daemon, Kind::Exec, &oldest);
            }
        }
        new
    }

    /// Makes a BuildKit session's uuid, or a compose project, known until it is let go as often as it was held.
    pub fn hold(&mut self, daemon: &DaemonId, kind: Kind, id: &str, tenant: Option<&Tenant>, now: Time) {
        self.add(daemon, kind, id, None, now);
        if let Some(object) = self.get_mut(daemon, kind, id)
            && let Some(tenant) = tenant
        {
            object.tenant = Some(tenant.clone());
        }
        *self.held.entry((daemon.clone(), kind, id.to_string())).or_default() += 1;
    }

    /// One less that keeps it known.
    pub fn let_go(&mut self, daemon: &DaemonId, kind: Kind, id: &str) {
        let key = (daemon.clone(), kind, id.to_string());
        let Some(holders) = self.held.get_mut(&key) else { return };
        *holders -= 1;
        if *holders == 0 {
            self.held.remove(&key);
            self.remove(daemon, kind, id);
        }
    }

    /// Notes the compose project of an object.
    pub fn label(&mut self, daemon: &DaemonId, kind: Kind, id: &str, project: &str, now: Time) {
        let Some(object) = self.get_mut(daemon, kind, id) else { return };
        if object.project.is_some() {
            return; // Told twice; a label does not change.
        }
        object.project = Some(project.to_string());
        let (tenant, owners) = (object.tenant.clone(), object.owners.clone());
        self.hold(daemon, Kind::Project, project, tenant.as_ref(), now);
        owners.iter().for_each(|owner| self.join(daemon, project, owner));
    }

    /// A session has made something of a compose project.
    pub fn join(&mut self, daemon: &DaemonId, project: &str, owner: &SessionKey) {
        if let Some(object) = self.get_mut(daemon, Kind::Project, project)
            && !object.owners.contains(owner)
        {
            object.owners.push(owner.clone());
        }
    }

    /// Where something of this name is, or a compose project, and who has made it there.
    pub fn makers<'a>(
        &'a self,
        kind: Kind,
        name: &str,
    ) -> impl Iterator<Item = (&'a DaemonId, &'a [SessionKey])> + use<'a> {
        let key = (kind, name.to_string());
        let named = self.by_name.get(&key).into_iter().flatten();
        let named = named.filter_map(move |(daemon, id)| Some((daemon, self.get(daemon, kind, id)?)));
        let project = self.by_id.get(&key).filter(|_| kind == Kind::Project).into_iter().flatten();
        named.chain(project).map(|(daemon, o)| (daemon, &o.owners[..]))
    }

    /// Whether anything of this kind and name, whoever's it is, is on `daemon`.
    pub fn has_named(&self, daemon: &DaemonId, kind: Kind, name: &str) -> bool {
        let named = self.by_name.get(&(kind, name.to_string()));
        named.is_some_and(|set| {
            set.range((daemon.clone(), String::new())..).next().is_some_and(|(d, _)| d == daemon)
        })
    }

    fn unname(&mut self, kind: Kind, name: &str, daemon: &DaemonId, id: &str) {
        let key = (kind, name.to_string());
        if let Some(set) = self.by_name.get_mut(&key) {
            set.remove(&(daemon.clone(), id.to_string()));
            if set.is_empty() {
                self.by_name.remove(&key);
            }
        }
    }

    /// Removes an object and returns what it was.
    pub fn remove(&mut self, daemon: &DaemonId, kind: Kind, id: &str) -> Option<Object> {
        let key = (kind, id.to_string());
        let entry = self.by_id.get_mut(&key)?;
        let object = entry.remove(daemon)?;
        if entry.is_empty() {
            self.by_id.remove(&key);
        }
        if let Some(name) = &object.name {
            self.unname(kind, name, daemon, id);
        }
        if let Some(all) = self.on.get_mut(daemon) {
            all.remove(&key);
            if all.is_empty() {
                self.on.remove(daemon);
            }
        }
        if let Some(project) = &object.project {
            self.let_go(daemon, Kind::Project, project);
        }
        Some(object)
    }

    /// The object itself.
    pub fn get(&self, daemon: &DaemonId, kind: Kind, id: &str) -> Option<&Object> {
        self.by_id.get(&(kind, id.to_string()))?.get(daemon)
    }

    /// The object itself, to be changed.
    pub fn get_mut(&mut self, daemon: &DaemonId, kind: Kind, id: &str) -> Option<&mut Object> {
        self.by_id.get_mut(&(kind, id.to_string()))?.get_mut(daemon)
    }

    /// The daemons on which `reference` means an object that `tenant` may use: by full id, else by name, else
    /// by id prefix (the order in which dockerd itself resolves it).
    pub fn resolve(&self, kind: Kind, reference: &str, tenant: &Tenant) -> Vec<DaemonId> {
        self.resolve_for(kind, reference, tenant, None)
    }

    /// As [`Self::resolve`], without what only other sessions than `only` made. A full id is a fact all the same.
    pub fn resolve_for(
        &self,
        kind: Kind,
        reference: &str,
        tenant: &Tenant,
        only: Option<&SessionKey>,
    ) -> Vec<DaemonId> {
        let of_tenant = |o: &Object| o.tenant.as_ref().is_none_or(|t| t == tenant);
        let visible =
            |o: &Object| of_tenant(o) && only.is_none_or(|key| o.owners.is_empty() || o.owners.contains(key));
        if kind != Kind::Volume
            && let Some(entry) = self.by_id.get(&(kind, reference.to_string()))
        {
            return entry.iter().filter(|(_, o)| of_tenant(o)).map(|(d, _)| d.clone()).collect();
        }
        if let Some(entry) = self.by_id.get(&(kind, reference.to_string())) {
            return entry.iter().filter(|(_, o)| visible(o)).map(|(d, _)| d.clone()).collect();
        }
        if let Some(set) = self.by_name.get(&(kind, reference.to_string())) {
            let mut daemons: Vec<DaemonId> = set
                .iter()
                .filter(|(d, id)| self.get(d, kind, id).is_some_and(visible))
                .map(|(d, _)| d.clone())
                .collect();
            daemons.dedup();
            if !daemons.is_empty() {
                return daemons;
            }
        }
        let prefixed = matches!(kind, Kind::Container | Kind::Network);
        if !prefixed || reference.is_empty() || !reference.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Vec::new();
        }
        let mut daemons: BTreeSet<DaemonId> = BTreeSet::new();
        for ((k, id), entry) in self.by_id.range((kind, reference.to_string())..) {
            if *k != kind || !id.starts_with(reference) {
                break;
            }
            daemons.extend(entry.iter().filter(|(_, o)| visible(o)).map(|(d, _)| d.clone()));
        }
        daemons.into_iter().collect()
    }

    /// Removes everything on `daemon`, and remembers the ids as lost.
    pub fn lose(&mut self, daemon: &DaemonId) {
        let all: Vec<(Kind, String)> = self.on.get(daemon).into_iter().flatten().cloned().collect();
        for (kind, id) in all {
            self.remove(daemon, kind, &id);
            if matches!(kind, Kind::Container | Kind::Exec) {
                self.lost_order.push_back(id.clone());
                self.lost.insert(id, daemon.clone());
                if self.lost_order.len() > LOST
                    && let Some(oldest) = self.lost_order.pop_front()
                {
                    self.lost.remove(&oldest);
                }
            }
        }
    }

    /// The ids that are remembered as lost, the oldest first.
    pub fn lost_ids(&self) -> Vec<(String, DaemonId)> {
        let of = |id: &String| Some((id.clone(), self.lost.get(id)?.clone()));
        self.lost_order.iter().filter_map(of).collect()
    }

    /// These ids are lost, too.
    pub fn import_lost(&mut self, lost: &[(String, DaemonId)]) {
        for (id, daemon) in lost {
            if self.lost.insert(id.clone(), daemon.clone()).is_none() {
                self.lost_order.push_back(id.clone());
            }
            if self.lost_order.len() > LOST
                && let Some(oldest) = self.lost_order.pop_front()
            {
                self.lost.remove(&oldest);
            }
        }
    }

    /// Forgets whose everything is, and what only requests keep known.
    pub fn disown(&mut self) {
        let requests: Vec<(DaemonId, String)> = (self.by_id.iter())
            .filter(|((kind, _), _)| *kind == Kind::BuildSession)
            .flat_map(|((_, id), on)| on.keys().map(|daemon| (daemon.clone(), id.clone())))
            .collect();
        for (daemon, id) in requests {
            self.held.remove(&(daemon.clone(), Kind::BuildSession, id.clone()));
            self.remove(&daemon, Kind::BuildSession, &id);
        }
        for object in self.by_id.values_mut().flat_map(BTreeMap::values_mut) {
            (object.tenant, object.live) = (None, object.live && object.started);
            object.owners.clear();
        }
    }

    /// Whether anything is known of this id.
    pub fn knows(&self, kind: Kind, id: &str) -> bool {
        self.by_id.contains_key(&(kind, id.to_string())) || self.lost.contains_key(id)
    }

    /// The daemon that a full id went with.
    pub fn lost_with(&self, id: &str) -> Option<&DaemonId> {
        self.lost.get(id)
    }

    /// Every object on `daemon`.
    pub fn on(&self, daemon: &DaemonId) -> impl Iterator<Item = (Kind, &str, &Object)> {
        self.on.get(daemon).into_iter().flatten().filter_map(|key| {
            let object = self.by_id.get(key)?.get(daemon)?;
            Some((key.0, key.1.as_str(), object))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Time = Time::ZERO;

    fn objects() -> (Objects, DaemonId, DaemonId, Tenant) {
        let (a, b) = (DaemonId::from("a"), DaemonId::from("b"));
        let mut objects = Objects::default();
        objects.add(&a, Kind::Container, "aa11", Some("db"), NOW);
        objects.add(&b, Kind::Container, "aa22", Some("db"), NOW);
        objects.add(&b, Kind::Container, "cc33", Some("web"), NOW);
        (objects, a, b, Tenant::from("default"))
    }

    #[test]
    fn ids_names_and_prefixes_resolve_in_dockers_order() {
        let (objects, a, b, tenant) = objects();
        assert_eq!(objects.resolve(Kind::Container, "aa11", &tenant), vec![a.clone()]);
        assert_eq!(objects.resolve(Kind::Container, "db", &tenant), vec![a.clone(), b.clone()]);
        assert_eq!(objects.resolve(Kind::Container, "web", &tenant), vec![b.clone()]);
        assert_eq!(objects.resolve(Kind::Container, "aa", &tenant), vec![a, b.clone()]);
        assert_eq!(objects.resolve(Kind::Container, "cc", &tenant), vec![b]);
        assert!(objects.resolve(Kind::Container, "dd", &tenant).is_empty());
        assert!(objects.resolve(Kind::Network, "db", &tenant).is_empty());
    }

    #[test]
    fn another_tenants_objects_are_not_seen() {
        let (mut objects, a, b, tenant) = objects();
        if let Some(object) = objects.get_mut(&b, Kind::Container, "aa22") {
            object.tenant = Some(Tenant::from("other"));
        }
        assert_eq!(objects.resolve(Kind::Container, "db", &tenant), vec![a]);
    }

    #[test]
    fn a_rename_moves_the_name() {
        let (mut objects, _, b, tenant) = objects();
        objects.add(&b, Kind::Container, "cc33", Some("front"), NOW);
        assert!(objects.resolve(Kind::Container, "web", &tenant).is_empty());
        assert_eq!(objects.resolve(Kind::Container, "front", &tenant), vec![b]);
    }

    #[test]
    fn what_went_with_its_daemon_is_remembered_as_lost() {
        let (mut objects, a, b, tenant) = objects();
        objects.lose(&b);
        assert_eq!(objects.resolve(Kind::Container, "db", &tenant), vec![a]);
        assert_eq!(objects.lost_with("cc33"), Some(&b));
        assert_eq!(objects.lost_with("aa11"), None);
    }

    proptest! {
        #[test]
        fn a_reference_means_what_a_search_through_everything_finds(
            steps in proptest::collection::vec((0u8..3, "[0-9a-c]{4}", "[a-c]{1,2}", 0u8..3, 0u8..5), 1..40),
            asked in "[0-9a-c]{1,4}",
        ) {
            let mut objects = Objects::default();
            // Daemon and id; name and tenant.
            let mut plain: BTreeMap<(DaemonId, String), (String, Option<Tenant>)> = BTreeMap::new();
            for (daemon, id, name, tenant, what) in steps {
                let daemon = DaemonId::from(format!("d{daemon}"));
                let tenant = (tenant > 0).then(|| Tenant::from(format!("t{tenant}")));
                if what == 0 {
                    objects.remove(&daemon, Kind::Container, &id);
                    plain.remove(&(daemon, id));
                    continue;
                }
                objects.add(&daemon, Kind::Container, &id, Some(&name), NOW);
                objects.get_mut(&daemon, Kind::Container, &id).unwrap().tenant = tenant.clone();
                plain.insert((daemon, id), (name, tenant));
            }
            let mine = Tenant::from("t1");
            let any_id = plain.keys().any(|(_, id)| *id == asked);
            let seen = || plain.iter().filter(|(_, (_, t))| t.as_ref().is_none_or(|t| *t == mine));
            let daemons = |found: &dyn Fn(&str, &str) -> bool| -> BTreeSet<DaemonId> {
                seen().filter(|((_, id), (name, _))| found(id, name)).map(|((d, _), _)| d.clone()).collect()
            };
            let by_name = daemons(&|_, name| name == asked);
            let expected = match () {
                () if any_id => daemons(&|id, _| id == asked),
                () if !by_name.is_empty() => by_name,
                () => daemons(&|id, _| id.starts_with(&asked)),
            };
            let found = objects.resolve(Kind::Container, &asked, &mine);
            prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
            for daemon in ["d0", "d1", "d2"] {
                objects.lose(&daemon.into());
            }
            prop_assert!(objects.by_id.is_empty() && objects.by_name.is_empty() && objects.on.is_empty());
        }
    }
}
