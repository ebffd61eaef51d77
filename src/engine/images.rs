//! Which daemon has which image, who wrote a reference last, and what a reference means.
//!
//! A pool has no merged image list. What makes `docker build` in one CI step and `docker push` in the next
//! work all the same is this index: a reference that a session did not make itself leads to the daemon where
//! it was written last.

use std::collections::{BTreeMap, BTreeSet};

use super::model::{DaemonId, ListedImage, SessionKey, Tenant, Time, Written};

/// One reference on one daemon.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// `sha256:…`, when known.
    pub id: Option<String>,
    /// When it was written, as far as this engine saw it.
    pub at: Time,
    /// Orders the writes: two of one instant (a burst of events) must be in order, too.
    pub order: u64,
    /// How.
    pub written: Written,
    /// Whose it is; `None` is everybody's.
    pub tenant: Option<Tenant>,
    /// The sessions that made it here. More than one when builds ran side by side on the daemon and its
    /// events do not say whose it was.
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
    pub tenant: Option<Tenant>,
    pub makers: &'a [SessionKey],
}

/// Where a reference may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// No daemon is known to have it.
    Nowhere,
    /// Only these have what it means: elsewhere the request fails, or uses an older image of that name.
    Only(Vec<DaemonId>),
    /// These have it, and any other daemon can pull it.
    Better(Vec<DaemonId>),
}

/// All references of all daemons.
#[derive(Debug, Default)]
pub(super) struct Images {
    references: BTreeMap<String, BTreeMap<DaemonId, Entry>>,
    ids: BTreeMap<String, BTreeSet<DaemonId>>,
    writes: u64,
}

impl Images {
    /// Records a write. A write of what is there already keeps its time, so that relisting does not make an
    /// old image look like the newest.
    pub fn write(&mut self, write: Write<'_>, now: Time) {
        self.writes += 1;
        let order = self.writes;
        if let Some(id) = write.id {
            self.ids.entry(id.to_string()).or_default().insert(write.daemon.clone());
        }
        let entries = self.references.entry(write.reference.to_string()).or_default();
        match entries.get_mut(write.daemon) {
            // An event told of it a moment ago, and now the response says whose it is; or the other way round.
            Some(old) if write.id.is_none() || old.id.as_deref() == write.id || old.id.is_none() => {
                old.id = old.id.take().or_else(|| write.id.map(str::to_string));
                if write.written != Written::Found {
                    let known = old.written != Written::Found;
                    if !(known && write.makers.is_empty()) {
                        old.at = now;
                        old.order = order;
                    }
                    if !known || write.written == Written::Made {
                        old.written = write.written;
                    }
                    old.tenant = write.tenant.or_else(|| old.tenant.take());
                    for maker in write.makers {
                        if !old.makers.contains(maker) {
                            old.makers.push(maker.clone());
                        }
                    }
                }
            }
            _ => {
                entries.insert(
                    write.daemon.clone(),
                    Entry {
                        id: write.id.map(str::to_string),
                        at: now,
                        order,
                        written: write.written,
                        tenant: write.tenant,
                        makers: write.makers.to_vec(),
                        pushed: false,
                    },
                );
            }
        }
    }

    /// Forgets a reference, or an image with all its references, on one daemon. Returns the makers of what
    /// was forgotten, each with its reference.
    pub fn remove(&mut self, daemon: &DaemonId, reference: &str) -> Vec<(SessionKey, String)> {
        let mut makers = Vec::new();
        if reference.starts_with("sha256:") {
            if let Some(daemons) = self.ids.get_mut(reference) {
                daemons.remove(daemon);
                if daemons.is_empty() {
                    self.ids.remove(reference);
                }
            }
            self.references.retain(|name, entries| {
                if entries.get(daemon).is_some_and(|e| e.id.as_deref() == Some(reference))
                    && let Some(entry) = entries.remove(daemon)
                {
                    makers.extend(entry.makers.into_iter().map(|m| (m, name.clone())));
                }
                !entries.is_empty()
            });
        } else if let Some(entries) = self.references.get_mut(reference) {
            let gone = entries.remove(daemon).map(|e| e.makers).unwrap_or_default();
            makers.extend(gone.into_iter().map(|m| (m, reference.to_string())));
            if entries.is_empty() {
                self.references.remove(reference);
            }
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

    /// Takes over a list of everything that `daemon` has. References written after `began` stay even if the
    /// list lacks them. New ones are `builders`' work. Returns the makers of what has gone, each with its
    /// reference, and the new references that became the builders'.
    pub fn list(
        &mut self,
        daemon: &DaemonId,
        began: Time,
        images: &[ListedImage],
        builders: &[SessionKey],
        tenant: Option<Tenant>,
        now: Time,
    ) -> (Vec<(SessionKey, String)>, Vec<String>) {
        let (mut gone, mut made) = (Vec::new(), Vec::new());
        let listed: BTreeSet<&str> =
            images.iter().flat_map(|i| i.references.iter().map(String::as_str)).collect();
        self.references.retain(|reference, entries| {
            if !listed.contains(reference.as_str())
                && entries.get(daemon).is_some_and(|e| e.at < began)
                && let Some(entry) = entries.remove(daemon)
            {
                gone.extend(entry.makers.into_iter().map(|m| (m, reference.clone())));
            }
            !entries.is_empty()
        });
        self.ids.retain(|_, daemons| {
            daemons.remove(daemon);
            !daemons.is_empty()
        });
        for image in images {
            self.ids.entry(image.id.clone()).or_default().insert(daemon.clone());
            for reference in &image.references {
                let new = self
                    .references
                    .get(reference)
                    .and_then(|entries| entries.get(daemon))
                    .is_none_or(|e| e.id.as_deref().is_some_and(|id| id != image.id));
                let written = match (new, builders.is_empty(), image.in_registry) {
                    (true, false, _) => Written::Made,
                    (_, _, true) => Written::Pulled,
                    _ => Written::Found,
                };
                let makers = if written == Written::Made { builders } else { &[] };
                if written == Written::Made {
                    made.push(reference.clone());
                }
                // Known already: only its id is news.
                let written = if new { written } else { Written::Found };
                self.write(
                    Write { daemon, reference, id: Some(&image.id), written, tenant: tenant.clone(), makers },
                    now,
                );
            }
        }
        (gone, made)
    }

    /// Forgets a daemon.
    pub fn forget(&mut self, daemon: &DaemonId) {
        self.references.retain(|_, entries| {
            entries.remove(daemon);
            !entries.is_empty()
        });
        self.ids.retain(|_, daemons| {
            daemons.remove(daemon);
            !daemons.is_empty()
        });
    }

    /// Whether `key` made `reference` on `daemon`.
    pub fn made_by(&self, key: &SessionKey, daemon: &DaemonId, reference: &str) -> bool {
        self.references
            .get(reference)
            .and_then(|entries| entries.get(daemon))
            .is_some_and(|e| e.makers.contains(key))
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
            return self.find_by_id(reference);
        };
        let visible = |e: &Entry| e.tenant.as_ref().is_none_or(|t| t == tenant);
        let latest = entries
            .iter()
            .filter(|(_, e)| visible(e) && e.written == Written::Made)
            .max_by_key(|(_, e)| e.order);
        if let Some((daemon, made)) = latest {
            let same = |d: &DaemonId, e: &Entry| d == daemon || (e.id.is_some() && e.id == made.id);
            return Found::Only(
                entries.iter().filter(|(d, e)| visible(e) && same(d, e)).map(|(d, _)| d.clone()).collect(),
            );
        }
        let having: Vec<DaemonId> =
            entries.iter().filter(|(_, e)| visible(e)).map(|(d, _)| d.clone()).collect();
        if having.is_empty() {
            Found::Nowhere
        } else if entries.values().any(|e| e.written == Written::Pulled) {
            Found::Better(having)
        } else {
            Found::Only(having)
        }
    }

    /// `sha256:…`, a bare id, an id prefix, or `name@sha256:…`.
    fn find_by_id(&self, reference: &str) -> Found {
        let digest = reference.rsplit_once('@').map_or(reference, |(_, digest)| digest);
        // A bare id or prefix was normalised as if it were a repository name.
        let bare = digest.strip_prefix("docker.io/library/").unwrap_or(digest);
        let bare = bare.strip_suffix(":latest").unwrap_or(bare);
        let prefix = match bare.strip_prefix("sha256:") {
            Some(hex) => hex,
            None => bare,
        };
        if prefix.len() < 2 || !prefix.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Found::Nowhere;
        }
        let prefix = format!("sha256:{}", prefix.to_ascii_lowercase());
        let daemons: BTreeSet<DaemonId> = self
            .ids
            .range(prefix.clone()..)
            .take_while(|(id, _)| id.starts_with(&prefix))
            .flat_map(|(_, daemons)| daemons.iter().cloned())
            .collect();
        if daemons.is_empty() { Found::Nowhere } else { Found::Only(daemons.into_iter().collect()) }
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
    let has_domain = name.contains('/') && (first.contains(['.', ':']) || first == "localhost");
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
        Write { daemon, reference, id: Some(id), written, tenant: None, makers }
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
        assert_eq!(images.find("alpine:3", &tenant), Found::Better(vec![a]));
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
        images.list(&a, at(3), &[], &[], None, at(6));
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
        images.list(&a, at(3), std::slice::from_ref(&listed), std::slice::from_ref(&key), None, at(4));
        assert!(images.made_by(&key, &a, "app:1"));
        assert!(images.holds(&key, &a));
        images.pushed(&a, "app:1");
        assert!(!images.holds(&key, &a));
        // Listed again without a build in between: nothing changes.
        images.list(&a, at(5), &[listed], &["other".into()], None, at(6));
        assert!(!images.made_by(&"other".into(), &a, "app:1"));
    }
}
