//! Which daemon has which image, who wrote a reference last, and what a reference means.
//!
//! A pool has no merged image list. What makes `docker build` in one CI step and `docker push` in the next
//! work all the same is this index: a reference that a session did not make itself leads to the daemon where
//! it was written last.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::model::{DaemonId, ListedImage, SessionKey, Tenant, Time, Written};

/// A reference that every job builds again from its cache, to the same id, has no more makers than this: the
/// latest ones.
const MAKERS: usize = 32;

/// One reference on one daemon.
#[derive(Debug, Clone)]
struct Entry {
    /// `sha256:…`, when known.
    id: Option<String>,
    /// When it was written, as far as this engine saw it.
    at: Time,
    /// Orders the writes: two of one instant (a burst of events) must be in order, too.
    order: u64,
    /// How.
    written: Written,
    /// Whose it is; without any, it is everybody's.
    tenants: Vec<Tenant>,
    /// The sessions that made it here. More than one when builds ran side by side on the daemon and its
    /// events do not say whose it was, or when they made the same.
    makers: Vec<SessionKey>,
    /// Whether a registry has it since.
    pushed: bool,
}

impl Entry {
    fn visible(&self, tenant: &Tenant) -> bool {
        self.tenants.is_empty() || self.tenants.contains(tenant)
    }

    /// Takes in another write of the same image. Returns the makers that are no longer counted.
    fn again(&mut self, write: &Write<'_>, now: Time, order: u64) -> Vec<SessionKey> {
        if write.written == Written::Found {
            return Vec::new();
        }
        let known = self.written != Written::Found;
        let told_before = write.began.is_some_and(|began| self.at >= began);
        if !known || write.written == Written::Made || told_before || !self.tenants.is_empty() {
            for tenant in write.tenants {
                if !self.tenants.contains(tenant) {
                    self.tenants.push(tenant.clone());
                }
            }
        }
        if !(known && write.makers.is_empty()) {
            self.at = now;
            self.order = order;
        }
        if !known || write.written == Written::Made {
            self.written = write.written;
        }
        for maker in write.makers {
            if !self.makers.contains(maker) {
                self.makers.push(maker.clone());
            }
        }
        let surplus = self.makers.len().saturating_sub(MAKERS);
        self.makers.drain(..surplus).collect()
    }
}

/// A reference on a daemon, as another proxy is told of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageExport {
    /// Normalised.
    pub reference: String,
    /// Where.
    pub daemon: DaemonId,
    /// `sha256:…`, when known.
    pub id: Option<String>,
    /// How long ago it was written.
    pub age: Time,
    /// Orders the writes.
    pub order: u64,
    /// How.
    pub written: Written,
    /// Whose it is; without any, it is everybody's.
    pub tenants: Vec<Tenant>,
    /// The sessions that made it.
    pub makers: Vec<SessionKey>,
    /// Whether a registry has it since.
    pub pushed: bool,
}

/// A write that is to be recorded.
pub(super) struct Write<'a> {
    pub daemon: &'a DaemonId,
    pub reference: &'a str,
    pub id: Option<&'a str>,
    pub written: Written,
    pub tenants: &'a [Tenant],
    pub makers: &'a [SessionKey],
    /// Since when the request that wrote it was open: what events told since then is the same write.
    pub began: Option<Time>,
}

/// What became of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wrote {
    /// Sessions that made what was there before, and are no longer held by it.
    pub displaced: Vec<SessionKey>,
    /// Whether it exists only there: made, and not pushed since.
    pub unpushed: bool,
}

/// Where a reference may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// No daemon is known to have it.
    Nowhere,
    /// Only these have what it means: elsewhere the request fails, or uses an older image of that name.
    Only(Vec<DaemonId>),
    /// Some have it ([`Images::holders`]), and any other daemon can pull it.
    Better,
}

/// What one daemon has.
#[derive(Debug, Default)]
struct Shelf {
    references: BTreeSet<String>,
    ids: BTreeSet<String>,
}

/// All references of all daemons.
#[derive(Debug, Default)]
pub(super) struct Images {
    references: BTreeMap<String, BTreeMap<DaemonId, Entry>>,
    /// Ids, the daemons that have them, and the references that point to them there.
    ids: BTreeMap<String, BTreeMap<DaemonId, BTreeSet<String>>>,
    /// What each daemon has, so that a list of one daemon costs nothing for all the others.
    on: BTreeMap<DaemonId, Shelf>,
    writes: u64,
}

impl Images {
    /// Records a write. A write of what is there already keeps its time, so that relisting does not make an
    /// old image look like the newest.
    pub fn write(&mut self, write: Write<'_>, now: Time) -> Wrote {
        self.writes += 1;
        let order = self.writes;
        let (daemon, reference) = (write.daemon, write.reference);
        let known = self.references.get_mut(reference).and_then(|entries| entries.get_mut(daemon));
        // An event told of it a moment ago, and now the response says whose it is; or the other way round.
        let same = known
            .as_ref()
            .is_some_and(|e| write.id.is_none() || e.id.is_none() || e.id.as_deref() == write.id);
        // Made anew, and nobody said what: the old id and the old push are those of another image.
        let anew = write.written == Written::Made
            && write.id.is_none()
            && known.as_ref().is_some_and(|e| write.began.is_none_or(|began| e.at < began));
        let displaced = match known {
            Some(old) if same => {
                let displaced = old.again(&write, now, order);
                let old_id = if anew { old.id.take() } else { None };
                old.pushed &= !anew;
                let id = write.id.filter(|_| old.id.is_none());
                old.id = old.id.take().or_else(|| id.map(str::to_string));
                if let Some(old_id) = old_id {
                    self.unlink(daemon, reference, &old_id);
                }
                if let Some(id) = id {
                    self.link(daemon, reference, id);
                }
                displaced
            }
            _ => {
                let mut displaced = self.drop_reference(daemon, reference);
                displaced.retain(|maker| !write.makers.contains(maker));
                let entry = Entry {
                    id: write.id.map(str::to_string),
                    at: now,
                    order,
                    written: write.written,
                    tenants: write.tenants.to_vec(),
                    makers: write.makers.to_vec(),
                    pushed: false,
                };
                self.references.entry(reference.to_string()).or_default().insert(daemon.clone(), entry);
                self.on.entry(daemon.clone()).or_default().references.insert(reference.to_string());
                if let Some(id) = write.id {
                    self.link(daemon, reference, id);
                }
                displaced
            }
        };
        let entry = self.references.get(reference).and_then(|entries| entries.get(daemon));
        Wrote { displaced, unpushed: entry.is_some_and(|e| e.written == Written::Made && !e.pushed) }
    }

    /// `reference` points to `id` on `daemon`.
    fn link(&mut self, daemon: &DaemonId, reference: &str, id: &str) {
        let references = self.ids.entry(id.to_string()).or_default().entry(daemon.clone()).or_default();
        references.insert(reference.to_string());
        self.on.entry(daemon.clone()).or_default().ids.insert(id.to_string());
    }

    /// `reference` no longer points to `id` on `daemon`. The image itself stays there.
    fn unlink(&mut self, daemon: &DaemonId, reference: &str, id: &str) {
        if let Some(references) = self.ids.get_mut(id).and_then(|daemons| daemons.get_mut(daemon)) {
            references.remove(reference);
        }
    }

    /// Forgets a reference on one daemon. Returns its makers.
    fn drop_reference(&mut self, daemon: &DaemonId, reference: &str) -> Vec<SessionKey> {
        let Some(entries) = self.references.get_mut(reference) else { return Vec::new() };
        let Some(entry) = entries.remove(daemon) else { return Vec::new() };
        if entries.is_empty() {
            self.references.remove(reference);
        }
        if let Some(shelf) = self.on.get_mut(daemon) {
            shelf.references.remove(reference);
        }
        if let Some(id) = &entry.id {
            self.unlink(daemon, reference, id);
        }
        entry.makers
    }

    /// Forgets an id on one daemon. Returns the references that pointed to it there.
    fn drop_id(&mut self, daemon: &DaemonId, id: &str) -> BTreeSet<String> {
        let Some(daemons) = self.ids.get_mut(id) else { return BTreeSet::new() };
        let references = daemons.remove(daemon).unwrap_or_default();
        if daemons.is_empty() {
            self.ids.remove(id);
        }
        if let Some(shelf) = self.on.get_mut(daemon) {
            shelf.ids.remove(id);
        }
        references
    }

    /// Forgets a reference, or an image with all its references, on one daemon. Returns the makers of what
    /// was forgotten, each with its reference.
    pub fn remove(&mut self, daemon: &DaemonId, reference: &str) -> Vec<(SessionKey, String)> {
        let gone = if reference.starts_with("sha256:") {
            self.drop_id(daemon, reference)
        } else {
            BTreeSet::from([reference.to_string()])
        };
        let mut makers = Vec::new();
        for reference in gone {
            let dropped = self.drop_reference(daemon, &reference);
            makers.extend(dropped.into_iter().map(|maker| (maker, reference.clone())));
        }
        makers
    }

    /// Notes that a registry has it now. Returns the sessions that it held.
    pub fn pushed(&mut self, daemon: &DaemonId, reference: &str) -> Vec<SessionKey> {
        match self.references.get_mut(reference).and_then(|entries| entries.get_mut(daemon)) {
            Some(entry) => {
                entry.pushed = true;
                entry.makers.clone()
            }
            None => Vec::new(),
        }
    }

    /// Takes over a list of everything that `daemon` has. References written after `began` are newer than the
    /// list and stay as they are. New ones are `builders`' work. Returns the makers of what has gone, each with
    /// its reference, and the new references that became the builders'.
    pub fn list(
        &mut self,
        daemon: &DaemonId,
        began: Time,
        images: &[ListedImage],
        builders: &[SessionKey],
        tenants: &[Tenant],
    ) -> (Vec<(SessionKey, String)>, Vec<String>) {
        let (mut gone, mut made) = (Vec::new(), Vec::new());
        let listed: BTreeSet<&str> =
            images.iter().flat_map(|i| i.references.iter().map(String::as_str)).collect();
        let shelf = self.on.remove(daemon).unwrap_or_default();
        let newer = |images: &Self, reference: &str| {
            images.references.get(reference).and_then(|e| e.get(daemon)).is_some_and(|e| e.at >= began)
        };
        let (keep, doomed): (BTreeSet<String>, BTreeSet<String>) = (shelf.references.into_iter())
            .partition(|reference| listed.contains(reference.as_str()) || newer(self, reference));
        self.on.insert(daemon.clone(), Shelf { references: keep, ids: shelf.ids.clone() });
        for reference in doomed {
            let makers = self.drop_reference(daemon, &reference);
            gone.extend(makers.into_iter().map(|maker| (maker, reference.clone())));
        }
        let listed_ids: BTreeSet<&str> = images.iter().map(|image| image.id.as_str()).collect();
        for id in shelf.ids {
            let pointed_to = self.ids.get(&id).and_then(|daemons| daemons.get(daemon));
            let newer = pointed_to.is_some_and(|names| names.iter().any(|name| newer(self, name)));
            if !listed_ids.contains(id.as_str()) && !newer {
                self.drop_id(daemon, &id);
            }
        }
        for image in images {
            self.ids.entry(image.id.clone()).or_default().entry(daemon.clone()).or_default();
            self.on.entry(daemon.clone()).or_default().ids.insert(image.id.clone());
            for reference in &image.references {
                if newer(self, reference) {
                    continue;
                }
                let new = self
                    .references
                    .get(reference)
                    .and_then(|entries| entries.get(daemon))
                    .is_none_or(|e| e.id.as_deref().is_some_and(|id| id != image.id));
                // Known already: only its id is news.
                let written = match (new, builders.is_empty(), image.in_registry) {
                    (true, false, _) => Written::Made,
                    (true, true, true) => Written::Pulled,
                    _ => Written::Found,
                };
                let made_now = written == Written::Made;
                let write = Write {
                    daemon,
                    reference,
                    id: Some(&image.id),
                    written,
                    tenants: if made_now { tenants } else { &[] },
                    makers: if made_now { builders } else { &[] },
                    began: None,
                };
                let wrote = self.write(write, began);
                gone.extend(wrote.displaced.into_iter().map(|maker| (maker, reference.clone())));
                if made_now {
                    made.push(reference.clone());
                }
            }
        }
        (gone, made)
    }

    /// Whether a list that was asked for at `began` has nothing any more of the references that were known on
    /// `daemon`; `None` if none were.
    pub fn emptied(&self, daemon: &DaemonId, began: Time, images: &[ListedImage]) -> Option<bool> {
        let shelf = self.on.get(daemon).filter(|shelf| !shelf.references.is_empty())?;
        let here: BTreeSet<&str> =
            images.iter().flat_map(|i| i.references.iter().map(String::as_str)).collect();
        let stays = |reference: &String| {
            let entry = self.references.get(reference).and_then(|e| e.get(daemon));
            here.contains(reference.as_str()) || entry.is_some_and(|e| e.at >= began)
        };
        Some(!shelf.references.iter().any(stays))
    }

    /// Whose references are, and how they came about.
    pub fn export(&self, now: Time) -> Vec<ImageExport> {
        let entries = self
            .references
            .iter()
            .flat_map(|(reference, on)| on.iter().map(move |(daemon, entry)| (reference, daemon, entry)));
        entries
            .map(|(reference, daemon, e)| ImageExport {
                reference: reference.clone(),
                daemon: daemon.clone(),
                id: e.id.clone(),
                age: now.saturating_sub(e.at),
                order: e.order,
                written: e.written,
                tenants: e.tenants.clone(),
                makers: e.makers.clone(),
                pushed: e.pushed,
            })
            .collect()
    }

    /// Forgets whose everything is.
    pub fn disown(&mut self) {
        for entry in self.references.values_mut().flat_map(BTreeMap::values_mut) {
            entry.tenants.clear();
            entry.makers.clear();
            if entry.written == Written::Made {
                entry.written = Written::Found;
            }
        }
    }

    /// Takes over another proxy's account of the daemons that are `there`. Of those that are `listed` here, a reference
    /// that is not known here is gone, unless it is younger than `news`.
    pub fn import(
        &mut self,
        exported: &[ImageExport],
        there: &BTreeSet<DaemonId>,
        listed: &BTreeSet<DaemonId>,
        news: Time,
        now: Time,
    ) {
        for e in exported.iter().filter(|e| there.contains(&e.daemon)) {
            let known = self.references.get(&e.reference).is_some_and(|on| on.contains_key(&e.daemon));
            if !known && listed.contains(&e.daemon) && e.age >= news {
                continue;
            }
            self.drop_reference(&e.daemon, &e.reference);
            let entry = Entry {
                id: e.id.clone(),
                at: now.saturating_sub(e.age),
                order: e.order,
                written: e.written,
                tenants: e.tenants.clone(),
                makers: e.makers.clone(),
                pushed: e.pushed,
            };
            self.references.entry(e.reference.clone()).or_default().insert(e.daemon.clone(), entry);
            self.on.entry(e.daemon.clone()).or_default().references.insert(e.reference.clone());
            if let Some(id) = &e.id {
                self.link(&e.daemon, &e.reference, id);
            }
            self.writes = self.writes.max(e.order);
        }
    }

    /// Forgets a daemon.
    pub fn forget(&mut self, daemon: &DaemonId) {
        let Some(shelf) = self.on.remove(daemon) else { return };
        for reference in &shelf.references {
            self.drop_reference(daemon, reference);
        }
        for id in &shelf.ids {
            self.drop_id(daemon, id);
        }
    }

    /// Whether `key` made `reference` on `daemon`.
    pub fn made_by(&self, key: &SessionKey, daemon: &DaemonId, reference: &str) -> bool {
        self.references
            .get(reference)
            .and_then(|entries| entries.get(daemon))
            .is_some_and(|e| e.makers.contains(key))
    }

    /// Who made what is called `reference`, and where.
    pub fn makers(&self, reference: &str, tenant: &Tenant) -> impl Iterator<Item = (&DaemonId, &SessionKey)> {
        let entries = self.references.get(reference).into_iter().flatten();
        let entries = entries.filter(move |(_, e)| e.visible(tenant));
        entries.flat_map(|(daemon, e)| e.makers.iter().map(move |maker| (daemon, maker)))
    }

    /// Whether an image that `key` made on `daemon` exists nowhere else.
    #[cfg(test)]
    pub fn holds(&self, key: &SessionKey, daemon: &DaemonId) -> bool {
        self.references.values().any(|entries| {
            entries
                .get(daemon)
                .is_some_and(|e| e.written == Written::Made && !e.pushed && e.makers.contains(key))
        })
    }

    /// Where `reference` may be used by `tenant`.
    pub fn find(&self, reference: &str, tenant: &Tenant) -> Found {
        let Some(entries) = self.references.get(reference) else {
            return self.find_by_id(reference, tenant);
        };
        let visible = || entries.iter().filter(|(_, e)| e.visible(tenant));
        let latest = visible().filter(|(_, e)| e.written == Written::Made).max_by_key(|(_, e)| e.order);
        if let Some((daemon, made)) = latest {
            let same = |d: &DaemonId, e: &Entry| d == daemon || (e.id.is_some() && e.id == made.id);
            return Found::Only(visible().filter(|(d, e)| same(d, e)).map(|(d, _)| d.clone()).collect());
        }
        if visible().next().is_none() {
            Found::Nowhere
        } else if visible().any(|(_, e)| e.written == Written::Pulled) {
            Found::Better
        } else {
            Found::Only(visible().map(|(d, _)| d.clone()).collect())
        }
    }

    /// The daemons that have something under this name, in the order of their names.
    pub fn holders(&self, reference: &str, tenant: &Tenant) -> impl Iterator<Item = &DaemonId> {
        let entries = self.references.get(reference).into_iter().flatten();
        entries.filter(move |(_, e)| e.visible(tenant)).map(|(d, _)| d)
    }

    /// Whether a daemon has something under this name.
    pub fn is_on(&self, reference: &str, tenant: &Tenant, daemon: &DaemonId) -> bool {
        let entry = self.references.get(reference).and_then(|entries| entries.get(daemon));
        entry.is_some_and(|e| e.visible(tenant))
    }

    /// `sha256:…`, a bare id, an id prefix, or `name@sha256:…`.
    fn find_by_id(&self, reference: &str, tenant: &Tenant) -> Found {
        let digest = reference.rsplit_once('@').map_or(reference, |(_, digest)| digest);
        // A bare id or prefix was normalised as if it were a repository name.
        let bare = digest.strip_prefix("docker.io/library/").unwrap_or(digest);
        let bare = bare.strip_suffix(":latest").unwrap_or(bare);
        let prefix = bare.strip_prefix("sha256:").unwrap_or(bare);
        if prefix.len() < 2 || !prefix.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Found::Nowhere;
        }
        let prefix = format!("sha256:{}", prefix.to_ascii_lowercase());
        let daemons: BTreeSet<DaemonId> = self
            .ids
            .range(prefix.clone()..)
            .take_while(|(id, _)| id.starts_with(&prefix))
            .flat_map(|(_, daemons)| daemons.iter())
            .filter(|(daemon, names)| self.any_visible(daemon, names, tenant))
            .map(|(daemon, _)| daemon.clone())
            .collect();
        if daemons.is_empty() { Found::Nowhere } else { Found::Only(daemons.into_iter().collect()) }
    }

    /// Whether `tenant` may use an image by its id: it has no name, or at least one that the tenant sees.
    fn any_visible(&self, daemon: &DaemonId, names: &BTreeSet<String>, tenant: &Tenant) -> bool {
        let mut entries = names.iter().filter_map(|name| self.references.get(name)?.get(daemon)).peekable();
        entries.peek().is_none() || entries.any(|e| e.visible(tenant))
    }

    /// How many references are known, for the metrics.
    pub fn len(&self) -> usize {
        self.references.len()
    }
}

/// The familiar form of a reference in full: `app` → `docker.io/library/app:latest`,
/// `localhost:5000/a` → `localhost:5000/a:latest`. Ids and digests stay (distribution/reference, the rules
/// that CLI and daemon use).
pub fn normalise(reference: &str) -> String {
    if reference.starts_with("sha256:") {
        return reference.to_string();
    }
    let (name, digest) = match reference.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (reference, None),
    };
    let first = name.split('/').next().unwrap_or_default();
    // A repository's name has no capitals, so what has some is a host's.
    let is_host = first.contains(['.', ':']) || first == "localhost" || first.to_lowercase() != first;
    let has_domain = name.contains('/') && is_host;
    let (domain, path) =
        if has_domain { name.split_once('/').unwrap_or(("docker.io", name)) } else { ("docker.io", name) };
    let domain = if domain == "index.docker.io" { "docker.io" } else { domain };
    let path = if domain == "docker.io" && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_string()
    };
    match digest {
        Some(digest) => {
            let path = path.split_once(':').map_or(path.as_str(), |(path, _)| path);
            format!("{domain}/{path}@{digest}")
        }
        None if path.contains(':') => format!("{domain}/{path}"),
        None => format!("{domain}/{path}:latest"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Time {
        Time::from_secs(seconds)
    }

    fn write<'a>(
        daemon: &'a DaemonId,
        reference: &'a str,
        id: &'a str,
        written: Written,
        makers: &'a [SessionKey],
    ) -> Write<'a> {
        Write { daemon, reference, id: Some(id), written, tenants: &[], makers, began: None }
    }

    #[test]
    fn references_are_normalised_as_docker_does() {
        for (given, full) in [
            ("app", "docker.io/library/app:latest"),
            ("app:1", "docker.io/library/app:1"),
            ("team/app", "docker.io/team/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("reg.example:5000/a/b:c", "reg.example:5000/a/b:c"),
            ("index.docker.io/app", "docker.io/library/app:latest"),
            ("app@sha256:ab", "docker.io/library/app@sha256:ab"),
            ("app:1@sha256:ab", "docker.io/library/app@sha256:ab"),
            ("sha256:ab", "sha256:ab"),
            ("MyRegistry/app", "MyRegistry/app:latest"),
        ] {
            assert_eq!(normalise(given), full, "{given}");
        }
    }

    #[test]
    fn the_latest_maker_wins_and_equal_ids_count_as_the_same() {
        let (a, b, c) = (DaemonId::from("a"), DaemonId::from("b"), DaemonId::from("c"));
        let mut images = Images::default();
        let tenant = Tenant::from("default");
        images.write(write(&a, "app:1", "sha256:11", Written::Made, &["k".into()]), at(1));
        images.write(write(&b, "app:1", "sha256:22", Written::Made, &["l".into()]), at(2));
        images.write(write(&c, "app:1", "sha256:22", Written::Pulled, &[]), at(3));
        assert_eq!(images.find("app:1", &tenant), Found::Only(vec![b.clone(), c.clone()]));
        images.remove(&b, "app:1");
        assert_eq!(images.find("app:1", &tenant), Found::Only(vec![a]));
    }

    #[test]
    fn pulled_is_a_preference_and_found_a_must() {
        let (a, b) = (DaemonId::from("a"), DaemonId::from("b"));
        let mut images = Images::default();
        let tenant = Tenant::from("default");
        images.write(write(&a, "alpine:3", "sha256:11", Written::Pulled, &[]), at(1));
        images.write(write(&b, "base:1", "sha256:22", Written::Found, &[]), at(1));
        assert_eq!(images.find("alpine:3", &tenant), Found::Better);
        assert_eq!(images.find("base:1", &tenant), Found::Only(vec![b]));
    }

    #[test]
    fn ids_and_prefixes_are_found() {
        let a = DaemonId::from("a");
        let mut images = Images::default();
        let tenant = Tenant::from("default");
        images.write(write(&a, "x:1", "sha256:abcdef0123", Written::Made, &[]), at(1));
        for reference in ["sha256:abcdef0123", "abcdef", "sha256:abc"] {
            assert_eq!(
                images.find(&normalise(reference), &tenant),
                Found::Only(vec![a.clone()]),
                "{reference}"
            );
        }
        assert_eq!(images.find(&normalise("fed"), &tenant), Found::Nowhere);
    }

    #[test]
    fn relisting_keeps_what_was_written_after_the_list_began() {
        let a = DaemonId::from("a");
        let mut images = Images::default();
        let tenant = Tenant::from("default");
        images.write(write(&a, "old:1", "sha256:11", Written::Made, &[]), at(1));
        images.write(write(&a, "new:1", "sha256:22", Written::Made, &[]), at(5));
        images.list(&a, at(3), &[], &[], &[]);
        assert_eq!(images.find("old:1", &tenant), Found::Nowhere);
        assert_eq!(images.find("new:1", &tenant), Found::Only(vec![a]));
    }

    #[test]
    fn a_list_after_a_build_names_its_builder() {
        let a = DaemonId::from("a");
        let key = SessionKey::from("k");
        let mut images = Images::default();
        let listed =
            ListedImage { id: "sha256:11".into(), references: vec!["app:1".into()], in_registry: false };
        images.list(&a, at(3), std::slice::from_ref(&listed), std::slice::from_ref(&key), &[]);
        assert!(images.made_by(&key, &a, "app:1"));
        assert!(images.holds(&key, &a));
        images.pushed(&a, "app:1");
        assert!(!images.holds(&key, &a));
        // Listed again without a build in between: nothing changes.
        images.list(&a, at(5), &[listed], &["other".into()], &[]);
        assert!(!images.made_by(&"other".into(), &a, "app:1"));
    }

    proptest! {
        #[test]
        fn normal_is_normal(reference in "[a-zA-Z0-9:/@._-]{0,40}") {
            let once = normalise(&reference);
            prop_assert_eq!(normalise(&once), once);
        }

        #[test]
        fn every_way_to_write_a_reference_means_the_same(
            path in "[a-z][a-z0-9_-]{0,8}(/[a-z0-9]{1,8}){0,2}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9._-]{0,8}"),
        ) {
            prop_assume!(!path.starts_with("localhost/"));
            let official = if path.contains('/') { path.clone() } else { format!("library/{path}") };
            let given = tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
            let full = format!("docker.io/{official}:{}", tag.as_deref().unwrap_or("latest"));
            for domain in ["", "docker.io/", "index.docker.io/"] {
                prop_assert_eq!(&normalise(&format!("{domain}{path}{given}")), &full);
            }
            for host in ["localhost", "localhost:5000", "reg.example", "reg.example:5000"] {
                let full = format!("{host}/{path}:{}", tag.as_deref().unwrap_or("latest"));
                prop_assert_eq!(normalise(&format!("{host}/{path}{given}")), full);
            }
        }

        #[test]
        fn what_was_written_is_found_until_it_is_removed(
            writes in proptest::collection::vec((0u8..3, 0u8..3, 0u8..3, 0u8..4), 1..30),
        ) {
            // A plain account: the last write of each reference on each daemon.
            let mut images = Images::default();
            let mut plain: BTreeMap<(String, DaemonId), (String, usize)> = BTreeMap::new();
            let tenant = Tenant::from("default");
            for (i, (reference, daemon, id, what)) in writes.iter().enumerate() {
                let daemon = DaemonId::from(format!("d{daemon}"));
                let (reference, id) = (format!("r{reference}:1"), format!("sha256:{id:02}"));
                match what {
                    0 => {
                        images.remove(&daemon, &reference);
                        plain.remove(&(reference, daemon));
                    }
                    1 => {
                        images.remove(&daemon, &id);
                        plain.retain(|(_, d), (i, _)| *d != daemon || *i != id);
                    }
                    _ => {
                        let maker = [SessionKey::from("k")];
                        images.write(write(&daemon, &reference, &id, Written::Made, &maker), at(i as u64));
                        plain.insert((reference, daemon), (id, i));
                    }
                }
                for reference in ["r0:1", "r1:1", "r2:1"] {
                    let having = || plain.iter().filter(|((r, _), _)| r == reference);
                    let latest = having().max_by_key(|(_, (_, at))| *at).map(|(_, (id, _))| id);
                    let expected = match latest {
                        None => Found::Nowhere,
                        Some(latest) => Found::Only(
                            having().filter(|(_, (id, _))| id == latest).map(|((_, d), _)| d.clone()).collect(),
                        ),
                    };
                    prop_assert_eq!(images.find(reference, &tenant), expected);
                }
            }
            for daemon in ["d0", "d1", "d2"] {
                images.forget(&daemon.into());
            }
            prop_assert_eq!(images.len(), 0);
            prop_assert!(images.ids.is_empty() && images.on.is_empty());
        }
    }
}
