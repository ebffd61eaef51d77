//! Where one request goes (design, decision 1): facts first, then the session's own daemon, then what its
//! client's other connections are bound to, then the balancer.

use std::collections::{BTreeMap, BTreeSet};

use super::balancer::{self, Weighed};
use super::images::Found;
use super::model::*;
use super::reason::{Because, short};
use super::session::Session;
use super::warm::undoubted;
use super::{Daemon, Engine};

/// The decision about one request.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Placement {
    /// It goes there and the session is bound there, for this reason.
    Bind(DaemonId, Because),
    /// It goes there and changes nothing about the session.
    Route(DaemonId),
    /// It goes there, changes nothing, and could as well go to another.
    Any(DaemonId),
    /// It goes nowhere.
    Refuse(Refusal),
}

/// Only some daemons will do.
struct Limit {
    daemons: BTreeSet<DaemonId>,
    /// What is there, in words.
    what: String,
}

impl Engine {
    pub(super) fn place(&mut self, acquire: &Acquire) -> Placement {
        if let Some(parent) = acquire.inside.as_ref().filter(|d| self.daemons.contains_key(*d)) {
            return Placement::Route(parent.clone());
        }
        if let Some(target) = &acquire.target
            && let Some(placement) = self.place_by_target(acquire, target)
        {
            return placement;
        }
        if acquire.class == Class::Remove
            && let Some(image) = &acquire.requirements.image
            && !acquire.shares_names
            && self.is_in_others_hands(acquire, image)
        {
            let name = image.strip_prefix("docker.io/library/").unwrap_or(image);
            let message =
                format!("No such image: {name} (one of this name is of another session, which works)");
            return Placement::Refuse(Refusal::NotFound(message));
        }
        if let Some(image) = &acquire.requirements.image
            && matches!(acquire.class, Class::Follow | Class::Remove)
            && self.images.find(image, &acquire.tenant) == Found::Nowhere
            && let Some(lost) = self.tell_lost(&acquire.key)
        {
            return lost_session(&lost, image); // Pushed or tagged by the one that made it there.
        }
        match self.limit(acquire) {
            Some(limit) => self.place_within(acquire, &limit),
            None => self.place_freely(acquire),
        }
    }

    /// The daemon of the object in the request's path.
    fn place_by_target(&mut self, acquire: &Acquire, target: &ObjectRef) -> Option<Placement> {
        let own = self.home_of(acquire);
        let daemons = self.objects.resolve(target.kind, &target.reference, &acquire.tenant);
        if own.as_ref().is_some_and(|own| daemons.contains(own)) {
            return None; // It is where the session is.
        }
        if acquire.class == Class::Read && !acquire.shares_names {
            return if own.is_some() { None } else { self.place_search(acquire, target, &daemons) };
        }
        let strangers = !daemons.is_empty();
        let daemons = self.elsewhere(acquire, target);
        if daemons.is_empty() && strangers {
            // A session with a daemon of its own hears "no such container" from that one. For another there
            // must be no daemon at which a stranger's container of that name would answer, or be removed.
            return own.is_none().then(|| Placement::Refuse(Refusal::NotFound(no_such(target))));
        }
        match &daemons[..] {
            [] => {
                let id = &target.reference;
                let lost = self.objects.lost_with(id).cloned();
                // A name on a daemon that went: the session that may have meant it is told, once.
                let lost = lost.or_else(|| match target.kind {
                    Kind::BuildSession => None,
                    _ => self.tell_lost(&acquire.key),
                })?;
                Some(lost_session(&lost, id))
            }
            // `/session` came before its `/build`, under another key: the build follows it.
            [one] if target.kind == Kind::BuildSession => {
                let what = "the other half of this build".to_string();
                Some(self.place_within(acquire, &Limit { daemons: BTreeSet::from([one.clone()]), what }))
            }
            [one] => Some(Placement::Route(one.clone())),
            // Several, and the session has a daemon of its own: that one says "no such container".
            _ if own.is_some() => None,
            several => Some(Placement::Refuse(Refusal::Ambiguous(format!(
                "{} exists on {} daemons of the pool ({}) and on none of this session's: {}",
                target.reference,
                several.len(),
                names(several),
                match target.kind {
                    Kind::Project => "name the session that it belongs to (DINDPOOL_SESSION)",
                    _ => "use its full id",
                }
            )))),
        }
    }

    /// Where a job looks for its compose project, or a network of it, when it has no daemon: not at one of that name
    /// which another session has made. It would take that over, or down: compose goes by labels and names.
    fn place_search(
        &mut self,
        acquire: &Acquire,
        target: &ObjectRef,
        daemons: &[DaemonId],
    ) -> Option<Placement> {
        let taken = self.taken(acquire, target);
        if taken.is_empty() && daemons.len() != 1 {
            return None;
        }
        if let [one] = &daemons.iter().filter(|d| !taken.contains(d)).collect::<Vec<_>>()[..] {
            return Some(Placement::Route((*one).clone()));
        }
        let able = able(&self.daemons, acquire).into_iter().filter(|d| !taken.contains(&d.id));
        let free = balancer::rendezvous(able, acquire.key.as_str()).cloned();
        let Some(free) = free else {
            let (name, taken): (_, Vec<DaemonId>) = (&target.reference, taken.into_iter().collect());
            let message = format!(
                "compose project {name} is another session's on every daemon of the pool ({}): give this one a name \
                 of its own (COMPOSE_PROJECT_NAME)",
                names(&taken)
            );
            let refusal = Placement::Refuse(Refusal::Ambiguous(message));
            return (target.kind == Kind::Project).then_some(refusal);
        };
        Some(Placement::Any(free))
    }

    /// Where what has this name is another session's.
    fn taken(&self, acquire: &Acquire, object: &ObjectRef) -> BTreeSet<DaemonId> {
        let others = |owners: &[SessionKey]| {
            !owners.is_empty() && !owners.iter().any(|owner| self.is_of_client(acquire, owner))
        };
        let taken = self.objects.makers(object.kind, &object.reference).filter(|(_, owners)| others(owners));
        taken.map(|(daemon, _)| daemon.clone()).collect()
    }

    /// Those daemons where nothing is in the way of what is going to be made; all of them, if something is everywhere.
    fn apart<'a>(&self, acquire: &Acquire, able: Vec<&'a Daemon>) -> Vec<&'a Daemon> {
        if acquire.requirements.apart.is_empty() {
            return able;
        }
        let in_the_way = |d: &Daemon| {
            acquire.requirements.apart.iter().any(|o| match o.kind {
                Kind::Project => self.taken(acquire, o).contains(&d.id),
                kind => self.objects.has_named(&d.id, kind, &o.reference),
            })
        };
        let free: Vec<&Daemon> = able.iter().copied().filter(|d| !in_the_way(d)).collect();
        if free.is_empty() { able } else { free }
    }

    /// Where else something is that this session may mean by a name, or what has this full id.
    fn elsewhere(&self, acquire: &Acquire, object: &ObjectRef) -> Vec<DaemonId> {
        let only = (!acquire.shares_names).then_some(&acquire.key);
        self.objects.resolve_for(object.kind, &object.reference, &acquire.tenant, only)
    }

    /// Whether the image of this name is one that a session at work has made, and not this one or another of its
    /// client's. Jobs of one repository use the same tags and begin by clearing them away; between another one's
    /// build and its run that must not hit what it has just built.
    fn is_in_others_hands(&self, acquire: &Acquire, image: &str) -> bool {
        let mut works = false;
        for (daemon, maker) in self.images.makers(image, &acquire.tenant) {
            if self.is_of_client(acquire, maker) {
                return false;
            }
            let session = self.sessions.get(maker);
            works |= session.is_some_and(|s| s.slots > 0 && s.is_on(daemon));
        }
        works
    }

    /// Whether a session is the request's own, or another of the same client, whose connections do not all carry the
    /// same key.
    fn is_of_client(&self, acquire: &Acquire, key: &SessionKey) -> bool {
        let group = acquire.source.as_ref().unwrap_or(&acquire.key);
        let groups = |session: &Session| session.groups.contains(group);
        *key == acquire.key || key == group || self.sessions.get(key).is_some_and(groups)
    }

    /// The daemon that the session lost, if it has not been told yet.
    fn tell_lost(&mut self, key: &SessionKey) -> Option<DaemonId> {
        self.sessions.get_mut(key)?.lost.take()
    }

    /// Whether what it needs exists on some daemons only.
    pub(super) fn is_limited(&self, acquire: &Acquire) -> bool {
        self.limit(acquire).is_some()
    }

    /// Where an image or the objects beside a new container are. The first that limits wins; the next ones
    /// narrow it as long as something is left.
    fn limit<'a>(&self, acquire: &'a Acquire) -> Option<Limit> {
        let own = self.home_of(acquire);
        let mut only: Option<Limit> = None;
        let mut narrow = |(kind, name, daemons): (&str, &str, Vec<DaemonId>)| {
            let set: BTreeSet<DaemonId> = daemons.into_iter().collect();
            match &mut only {
                Some(limit) if limit.daemons.is_disjoint(&set) => {}
                Some(limit) => limit.daemons = &limit.daemons & &set,
                None => only = Some(Limit { daemons: set, what: format!("{kind} {}", short(name)) }),
            }
        };
        let (containers, others): (Vec<_>, Vec<_>) = acquire
            .requirements
            .beside
            .iter()
            .partition(|o| matches!(o.kind, Kind::Container | Kind::Project));
        let resolve = |o: &&'a ObjectRef| {
            let daemons = self.objects.resolve(o.kind, &o.reference, &acquire.tenant);
            let o: &'a ObjectRef = o;
            let found = |daemons| Some((word(o.kind), o.reference.as_str(), daemons));
            if let Some(own) = own.as_ref().filter(|own| daemons.contains(own)) {
                return found(vec![own.clone()]);
            }
            let daemons = self.elsewhere(acquire, o);
            match &own {
                // A volume that is not there is made, so a stranger's of that name must not draw it away.
                Some(_) if o.kind == Kind::Volume => None,
                _ if daemons.len() == 1 => found(daemons),
                _ => None,
            }
        };
        containers.iter().filter_map(resolve).for_each(&mut narrow);
        if let Some(image) = &acquire.requirements.image {
            let made_here = own.as_ref().filter(|own| self.images.made_by(&acquire.key, own, image)).cloned();
            match (made_here, self.images.find(image, &acquire.tenant)) {
                (Some(own), _) => narrow(("image", image, vec![own])),
                (None, Found::Only(daemons)) => narrow(("image", image, daemons)),
                // Starting a container elsewhere pulls it there; anything else needs it where it is.
                (None, Found::Better) if matches!(acquire.class, Class::Work(_)) => {}
                (None, Found::Better) => {
                    let holders = self.images.holders(image, &acquire.tenant).cloned().collect();
                    narrow(("image", image, holders));
                }
                (None, Found::Nowhere) => {}
            }
        }
        others.iter().filter_map(resolve).for_each(&mut narrow);
        only
    }

    /// Only these daemons will do.
    fn place_within(&mut self, acquire: &Acquire, limit: &Limit) -> Placement {
        let Limit { daemons, what } = limit;
        let own = self.home_of(acquire);
        if let Some(own) = own.filter(|own| daemons.contains(own)) {
            return self.at_home(acquire, own);
        }
        let there = || daemons.iter().filter_map(|id| self.daemons.get(id));
        let api = acquire.requirements.api;
        let able: Vec<&Daemon> = there().filter(|d| d.takes_sessions() && d.serves(api)).collect();
        let least = Weighed::new(self.apart(acquire, able)).least();
        let chosen = balancer::draw(&least, std::iter::empty(), |_| false, &mut self.random)
            .cloned()
            // What exists on one daemon only is asked for there, also while it takes no new sessions.
            .or_else(|| there().next().map(|d| d.id.clone()));
        let Some(chosen) = chosen else { return self.place_freely(acquire) };
        let binds = matches!(acquire.class, Class::Work(_) | Class::Join)
            && self.sessions.get(&acquire.key).is_none_or(|s| s.movable());
        let needs = || Because::Needs { what: what.clone() };
        if binds { Placement::Bind(chosen, needs()) } else { Placement::Route(chosen) }
    }

    /// Any daemon will do; at equal load one that has the image.
    fn place_freely(&mut self, acquire: &Acquire) -> Placement {
        let requirements = &acquire.requirements;
        if let Some(own) = self.home_of(acquire) {
            let well = self.daemons.get(&own).is_some_and(|d| d.health == Health::Healthy);
            if well || acquire.class != Class::Any {
                return self.at_home(acquire, own);
            }
        }
        let api = requirements.api;
        let able = self.apart(acquire, able(&self.daemons, acquire));
        let binds = matches!(acquire.class, Class::Work(_) | Class::Join);
        let former = self.former(acquire).map(|d| &d.id);
        if let Some(former) = former.filter(|former| able.iter().any(|d| d.id == **former)) {
            let former = former.clone();
            return if binds { Placement::Bind(former, Because::Former) } else { Placement::Any(former) };
        }
        if binds && let Some(project) = &requirements.project {
            return match self.done_first(acquire, project, &undoubted(able)) {
                Some((daemon, because)) => Placement::Bind(daemon, because),
                None => Placement::Refuse(self.why_nobody(api)),
            };
        }
        if binds {
            let image = requirements.image.iter();
            let holders = image.flat_map(|image| self.images.holders(image, &acquire.tenant));
            let holds = |d: &DaemonId| {
                let image = requirements.image.as_ref();
                image.is_some_and(|image| self.images.is_on(image, &acquire.tenant, d))
            };
            let weighed = Weighed::new(able);
            let least = weighed.least();
            let Some(chosen) = balancer::draw(&least, holders, holds, &mut self.random) else {
                return Placement::Refuse(self.why_nobody(api));
            };
            // Where all are full it is decided again when a slot comes free.
            let room = least.iter().any(|d| d.has_room());
            let compared = if room { weighed.compared(chosen, &least) } else { Vec::new() };
            let because = Because::LeastWait { equals: least.len(), image: holds(chosen), compared };
            return Placement::Bind(chosen.clone(), because);
        }
        match balancer::rendezvous(able.into_iter(), acquire.key.as_str()) {
            Some(daemon) => Placement::Any(daemon.clone()),
            None => Placement::Refuse(self.why_nobody(api)),
        }
    }

    /// The request goes to the daemon that its session is bound to, whatever the health of that: a bound
    /// session never silently moves.
    fn at_home(&self, acquire: &Acquire, own: DaemonId) -> Placement {
        match acquire.class {
            Class::Work(_) | Class::Join => {
                let because = self.why_home(acquire);
                Placement::Bind(own, because)
            }
            Class::Any => Placement::Any(own),
            Class::Follow | Class::Remove | Class::Read => Placement::Route(own),
        }
    }

    /// The daemon that the session belongs to: its own binding, else that of its client's other connections.
    pub(super) fn home_of(&self, acquire: &Acquire) -> Option<DaemonId> {
        if let Some(own) = self.home(&acquire.key) {
            return Some(own.clone());
        }
        let group = acquire.source.as_ref().unwrap_or(&acquire.key);
        let sibling = self.sources.get(group)?.first()?;
        self.home(sibling).cloned()
    }

    /// Why the daemon of [`Engine::home_of`] is the session's.
    fn why_home(&self, acquire: &Acquire) -> Because {
        let group = acquire.source.as_ref().unwrap_or(&acquire.key);
        let sibling = || self.sources.get(group)?.first();
        match self.home(&acquire.key) {
            Some(_) => Because::Own,
            None => sibling().map_or(Because::Own, |s| Because::Client { session: s.clone() }),
        }
    }

    /// The daemon that the session was bound to last, while it has a free slot and no grave reason against it.
    fn former(&self, acquire: &Acquire) -> Option<&Daemon> {
        let home = self.sessions.get(&acquire.key)?.home.as_ref()?;
        self.daemons.get(&home.daemon).filter(|d| d.has_room() && !d.is_doubted())
    }

    /// The sentence that says what was tried.
    pub(super) fn why_nobody(&self, api: Option<ApiVersion>) -> Refusal {
        if let Some((major, minor)) = api
            && self.daemons.values().any(Daemon::takes_sessions)
            && let Some((min, max)) = self.range
        {
            let (word, limit) = if (major, minor) > max { ("new", max) } else { ("old", min) };
            return Refusal::ApiVersion(format!(
                "client version {major}.{minor} is too {word}. {} supported API version of this pool is {}.{}",
                if word == "new" { "Maximum" } else { "Minimum" },
                limit.0,
                limit.1
            ));
        }
        if self.daemons.is_empty() {
            let faults = &self.growth.faults;
            let why = if faults.is_empty() { String::new() } else { format!(" ({})", faults.join("; ")) };
            return Refusal::NoDaemon(format!("no daemon: the pool is empty{why}"));
        }
        let mut tried: Vec<String> = self
            .daemons
            .values()
            .take(8)
            .map(|d| {
                let what = match (d.state, d.health, d.is_refused()) {
                    (State::Starting, _, _) => "starting",
                    (State::Draining, _, _) => "draining",
                    (_, Health::Ejected, _) => "ejected",
                    (_, _, true) => "refused",
                    _ if d.cordon.is_some() => "cordoned",
                    _ if d.is_leaving() => "leaving",
                    _ => "ready",
                };
                // That nobody listens there yet is less than why.
                let fault = (d.state == State::Starting).then(|| self.fault_of(&d.id)).flatten();
                let why = fault.map_or_else(|| d.why(), str::to_string);
                if why.is_empty() { format!("{} {what}", d.id) } else { format!("{} {what} ({why})", d.id) }
            })
            .collect();
        if self.daemons.len() > tried.len() {
            tried.push(format!("and {} more", self.daemons.len() - tried.len()));
        }
        let what = if self.daemons.values().any(Daemon::is_well) { "open" } else { "healthy" };
        Refusal::NoDaemon(format!("no {what} daemon in the pool: {}", tried.join(", ")))
    }
}

/// The daemons that can take it: that serve its API version, and its architecture if any does.
pub(super) fn able<'a>(daemons: &'a BTreeMap<DaemonId, Daemon>, acquire: &Acquire) -> Vec<&'a Daemon> {
    let Requirements { api, arch, .. } = &acquire.requirements;
    let serves = |d: &&Daemon| d.takes_sessions() && d.serves(*api);
    let native = |d: &Daemon| d.facts.as_ref().map(|f| &f.arch) == arch.as_ref();
    let narrowed = arch.is_some() && daemons.values().any(|d| serves(&d) && native(d));
    daemons.values().filter(|d| serves(d) && (!narrowed || native(d))).collect()
}

/// A kind of object, in a sentence.
fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Container => "container",
        Kind::Network => "network",
        Kind::Volume => "volume",
        Kind::Exec => "exec",
        Kind::BuildSession => "build",
        Kind::Project => "compose project",
    }
}

/// dockerd's own words (28.5).
fn no_such(object: &ObjectRef) -> String {
    let name = &object.reference;
    match object.kind {
        Kind::Network => format!("network {name} not found"),
        Kind::Volume => format!("get {name}: no such volume"),
        _ => format!("No such container: {name}"),
    }
}

fn lost_session(daemon: &DaemonId, what: &str) -> Placement {
    Placement::Refuse(Refusal::SessionLost(format!(
        "session lost: its daemon {daemon} has gone, and {what} with it"
    )))
}

fn names(daemons: &[DaemonId]) -> String {
    daemons.iter().map(DaemonId::as_str).collect::<Vec<_>>().join(", ")
}
