//! Pure decisions: sessions, slots, health, balancing. One state machine, [`Engine::handle`]: an event and the
//! time go in, effects come out. There is no clock, no randomness and no I/O in here: time is passed in, the
//! seed is given at construction, events and effects are plain data. So the same code serves live requests, is
//! simulated from a seed, and is held against its invariants after every event in debug builds.

mod balancer;
mod daemon;
pub mod images;
pub mod model;
mod objects;
mod placement;
#[cfg(test)]
mod rules;
mod session;
#[cfg(test)]
mod simulation;
mod versions;

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub use daemon::Daemon;
use images::{Images, Write};
use model::*;
use objects::Objects;
use placement::Placement;
use session::Owned;
pub use session::{Home, Session};

/// What the engine is told once.
#[derive(Debug, Clone)]
pub struct Config {
    /// How long a lease outlives the last thing of its session that was open.
    pub grace: Time,
    /// How long a session keeps its last slot after its last unit of work: the next command of a script
    /// follows within seconds.
    pub linger: Time,
    /// How long a container that is never started counts as work.
    pub unstarted: Time,
    /// How long the former daemon of a session is preferred.
    pub memory: Time,
    /// How long an unpushed image holds the session that made it to its daemon after its last request.
    pub image_hold: Time,
    /// Failed probes in a row that eject a daemon.
    pub eject_after: u32,
    /// Good probes in a row that bring it back.
    pub recover_after: u32,
    /// One higher after each restart or hand-over.
    pub epoch: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            grace: Time::from_secs(300),
            linger: Time::from_secs(10),
            unstarted: Time::from_secs(60),
            memory: Time::from_secs(4 * 3600),
            image_hold: Time::from_secs(12 * 3600),
            eject_after: 2,
            recover_after: 2,
            epoch: 1,
        }
    }
}

/// How an open request counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// It keeps the lease, and is no work.
    None,
    /// A build: a slot each.
    Build,
    /// Other work: one slot for all of it.
    Other,
}

/// A request or stream that was granted.
#[derive(Debug, Clone)]
struct Open {
    key: SessionKey,
    daemon: DaemonId,
    unit: Unit,
    /// Whether its session counts it as open: a read of an unbound session has no session to count it.
    counted: bool,
    /// Whether images may come of it that only `/events` or a list will tell.
    builds: bool,
    /// The lease that this very request made.
    fresh: Option<LeaseId>,
    /// A BuildKit session's uuid, known as long as this is open.
    uuid: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Session(SessionKey),
    Container(DaemonId, String),
}

/// The state machine.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    random: balancer::Random,
    daemons: BTreeMap<DaemonId, Daemon>,
    sessions: BTreeMap<SessionKey, Session>,
    /// Sessions with a lease, by the source that they come from.
    sources: BTreeMap<SessionKey, BTreeSet<SessionKey>>,
    opens: HashMap<OpenId, Open>,
    objects: Objects,
    images: Images,
    timers: BTreeSet<(Time, Timer)>,
    range: Option<(ApiVersion, ApiVersion)>,
    /// Collected while one event is handled.
    effects: Vec<Effect>,
    next_open: u64,
    next_lease: u64,
}

impl Engine {
    /// An engine without daemons. `seed` decides ties.
    pub fn new(config: Config, seed: u64) -> Self {
        Engine {
            config,
            random: balancer::Random::new(seed),
            daemons: BTreeMap::new(),
            sessions: BTreeMap::new(),
            sources: BTreeMap::new(),
            opens: HashMap::new(),
            objects: Objects::default(),
            images: Images::default(),
            timers: BTreeSet::new(),
            range: None,
            effects: Vec::new(),
            next_open: 0,
            next_lease: 0,
        }
    }

    /// The one entry: what happened, and when. Times never go back.
    pub fn handle(&mut self, event: Event, now: Time) -> Vec<Effect> {
        match event {
            Event::Acquire(acquire) => self.acquire(acquire, now),
            Event::Release { open, outcome } => self.release(open, outcome, now),
            Event::BuildSeen(open) => self.build_seen(open, now),
            Event::Learned { daemon, open, fact } => self.learned(&daemon, open, fact, now),
            Event::Probed { daemon, probe } => self.probed(&daemon, probe),
            Event::Observed(observed) => self.observed(observed, now),
            Event::Replaced { daemon } => self.replaced(&daemon, now),
            Event::Inventory { daemon, began, inventory } => self.inventory(&daemon, began, inventory, now),
            Event::Images { daemon, began, images } => self.relist(&daemon, began, &images, now),
            Event::Tick => self.tick(now),
        }
        #[cfg(debug_assertions)]
        self.check_invariants();
        std::mem::take(&mut self.effects)
    }

    /// When [`Event::Tick`] is due next.
    pub fn next_tick(&self) -> Option<Time> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// All daemons.
    pub fn daemons(&self) -> impl Iterator<Item = &Daemon> {
        self.daemons.values()
    }

    /// All sessions that are bound, own something, or are remembered.
    pub fn sessions(&self) -> impl Iterator<Item = (&SessionKey, &Session)> {
        self.sessions.iter()
    }

    /// The API range that the pool promises: of the daemons that are there, or of the last that were.
    pub fn api_range(&self) -> Option<(ApiVersion, ApiVersion)> {
        self.range
    }

    /// The daemon that a session's calls go to, if it is bound.
    pub fn home(&self, key: &SessionKey) -> Option<&DaemonId> {
        self.sessions.get(key)?.bound_to()
    }

    /// Daemons where BuildKit builds have ended since their images were listed last. dockerd 20.10 has no
    /// event for an image that BuildKit made, and newer ones' events may still be on their way: a request that
    /// goes by an image's name lists these first.
    pub fn stale_images(&self) -> Vec<DaemonId> {
        self.daemons.values().filter(|d| !d.builders.is_empty()).map(|d| d.id.clone()).collect()
    }

    /// How many image references the index knows.
    pub fn image_count(&self) -> usize {
        self.images.len()
    }

    fn acquire(&mut self, acquire: Acquire, now: Time) {
        let request = acquire.request;
        let (daemon, bind) = match self.place(&acquire) {
            Placement::Bind(daemon) => (daemon, true),
            Placement::Route(daemon) => (daemon, false),
            Placement::Refuse(refusal) => {
                self.effects.push(Effect::Refused { request, refusal });
                return;
            }
        };
        let key = acquire.key;
        let fresh = if bind { self.bind(&key, &acquire.tenant, acquire.source, &daemon, now) } else { None };
        let unit = match acquire.class {
            _ if !bind => Unit::None,
            Class::Work(Work::Build) => Unit::Build,
            Class::Work(_) => Unit::Other,
            _ => Unit::None,
        };
        let builds = matches!(acquire.class, Class::Work(Work::Build | Work::BuildKit));
        let uuid = acquire.target.filter(|t| t.kind == Kind::BuildSession).map(|t| t.reference);
        if let Some(uuid) = &uuid {
            self.objects.add(&daemon, Kind::BuildSession, uuid, None, now);
        }
        self.next_open += 1;
        let open = OpenId(self.next_open);
        let counted = self.sessions.contains_key(&key);
        let lease = match self.sessions.get_mut(&key) {
            Some(session) => {
                session.open += 1;
                match unit {
                    Unit::Build => session.builds += 1,
                    Unit::Other => session.others += 1,
                    Unit::None => {}
                }
                session.home.as_ref().filter(|h| h.daemon == daemon).and_then(|h| h.lease)
            }
            None => None,
        };
        let known = Open { key: key.clone(), daemon: daemon.clone(), unit, counted, builds, fresh, uuid };
        self.opens.insert(open, known);
        self.settle(&key, now);
        self.effects.push(Effect::Granted { request, open, daemon, lease, fresh: fresh.is_some() });
    }

    /// Gives the session a lease on `daemon`. Returns it if it is new.
    fn bind(
        &mut self,
        key: &SessionKey,
        tenant: &Tenant,
        source: Option<SessionKey>,
        daemon: &DaemonId,
        now: Time,
    ) -> Option<LeaseId> {
        let session = self
            .sessions
            .entry(key.clone())
            .or_insert_with(|| Session::new(tenant.clone(), source.clone(), now));
        if session.lease().is_some() && session.home.as_ref().is_some_and(|h| h.daemon == *daemon) {
            return None;
        }
        self.end_lease(key, now, false);
        self.next_lease += 1;
        let lease = LeaseId { epoch: self.config.epoch, number: self.next_lease };
        let session = self.sessions.get_mut(key)?;
        if session.home.as_ref().is_some_and(|h| h.daemon != *daemon) {
            session.owned.clear();
        }
        session.home = Some(Home { daemon: daemon.clone(), lease: Some(lease), since: now });
        session.lost = None;
        session.source = source;
        let group = session.source.clone().unwrap_or_else(|| key.clone());
        self.sources.entry(group).or_default().insert(key.clone());
        if let Some(d) = self.daemons.get_mut(daemon) {
            d.sessions.insert(key.clone());
        }
        self.effects.push(Effect::LeaseStarted { key: key.clone(), lease, daemon: daemon.clone() });
        Some(lease)
    }

    /// Takes the lease away and gives its slots back. What the session owns, and its home, stay.
    fn end_lease(&mut self, key: &SessionKey, now: Time, lost: bool) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        let group = session.source.clone().unwrap_or_else(|| key.clone());
        let Some(home) = session.home.as_mut() else { return };
        let Some(lease) = home.lease.take() else { return };
        let (daemon, since) = (home.daemon.clone(), home.since);
        let slots = std::mem::take(&mut session.slots);
        session.linger = None;
        // What is remembered, is remembered from the end of the lease on.
        session.idle = session.idle.map(|_| now);
        if let Some(d) = self.daemons.get_mut(&daemon) {
            d.used -= slots;
            d.sessions.remove(key);
        }
        if let Some(siblings) = self.sources.get_mut(&group) {
            siblings.remove(key);
            if siblings.is_empty() {
                self.sources.remove(&group);
            }
        }
        let lasted = now.saturating_sub(since);
        self.effects.push(Effect::LeaseEnded { key: key.clone(), lease, daemon, lasted, lost });
    }

    fn release(&mut self, open: OpenId, outcome: Outcome, now: Time) {
        let Some(gone) = self.opens.remove(&open) else { return };
        if let Some(uuid) = &gone.uuid
            && !self.opens.values().any(|o| o.uuid.as_ref() == Some(uuid))
        {
            self.objects.remove(&gone.daemon, Kind::BuildSession, uuid);
        }
        if gone.builds
            && let Some(daemon) = self.daemons.get_mut(&gone.daemon)
        {
            daemon.builders.insert(gone.key.clone());
        }
        if let Some(session) = self.sessions.get_mut(&gone.key) {
            session.open -= u32::from(gone.counted);
            match gone.unit {
                Unit::Build => session.builds -= 1,
                Unit::Other => session.others -= 1,
                Unit::None => {}
            }
            let unbind = outcome == Outcome::Unreached
                && gone.fresh.is_some()
                && session.lease() == gone.fresh
                && session.open == 0;
            if unbind {
                self.end_lease(&gone.key, now, false);
                if let Some(session) = self.sessions.get_mut(&gone.key)
                    && session.owned.is_empty()
                {
                    session.home = None;
                }
            }
        }
        self.settle(&gone.key, now);
        if outcome == Outcome::Unreached {
            let probe = Probe::Refused("connection refused".into());
            self.probed(&gone.daemon, probe);
        }
    }

    fn build_seen(&mut self, open: OpenId, now: Time) {
        let Some(known) = self.opens.get_mut(&open) else { return };
        if known.unit != Unit::Other {
            return;
        }
        known.unit = Unit::Build;
        let key = known.key.clone();
        if let Some(session) = self.sessions.get_mut(&key) {
            session.others -= 1;
            session.builds += 1;
        }
        self.settle(&key, now);
    }

    /// Brings a session's slots, linger and timer in line with its work. Called after every change to it.
    fn settle(&mut self, key: &SessionKey, now: Time) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        session.idle = if session.busy() { None } else { session.idle.or(Some(now)) };
        if let Some(home) = session.home.clone().filter(|h| h.lease.is_some()) {
            let mut slots = session.wants();
            if slots > 0 {
                session.linger = None;
            } else if session.slots > 0 {
                // The last unit has just ended, or it ended a while ago and the linger runs.
                let until = *session.linger.get_or_insert(now + self.config.linger);
                slots = u32::from(now < until);
            }
            if slots != session.slots {
                if let Some(daemon) = self.daemons.get_mut(&home.daemon) {
                    daemon.used = daemon.used + slots - session.slots;
                }
                session.slots = slots;
            }
        }
        let due = Self::due(session, &self.config);
        if session.timer.is_none_or(|at| due.is_some_and(|due| due < at)) {
            if let Some(old) = session.timer.take() {
                self.timers.remove(&(old, Timer::Session(key.clone())));
            }
            if let Some(due) = due {
                session.timer = Some(due);
                self.timers.insert((due, Timer::Session(key.clone())));
            }
        }
    }

    /// When the next thing of a session's runs out.
    fn due(session: &Session, config: &Config) -> Option<Time> {
        let lease_end = session.idle.map(|idle| idle + config.grace);
        if session.lease().is_some() {
            let linger = session.linger.filter(|_| session.slots > 0);
            return match (linger, lease_end) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        let idle = session.idle.filter(|_| session.foreign.is_empty())?;
        let only_images = session.owned.iter().all(|o| matches!(o, Owned::Image(_)));
        let keep = match (session.owned.is_empty(), only_images) {
            (true, _) => config.memory,
            (false, true) => config.image_hold,
            (false, false) => return None,
        };
        Some(idle + keep)
    }

    fn tick(&mut self, now: Time) {
        while let Some((at, timer)) = self.timers.first().cloned() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            match timer {
                Timer::Session(key) => self.session_due(&key, now),
                Timer::Container(daemon, id) => self.container_due(&daemon, &id, now),
            }
        }
    }

    fn session_due(&mut self, key: &SessionKey, now: Time) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        session.timer = None;
        let due = Self::due(session, &self.config);
        if due.is_none_or(|due| due > now) {
            self.settle(key, now);
            return;
        }
        if session.lease().is_some() {
            if session.idle.is_some_and(|idle| idle + self.config.grace <= now) {
                self.end_lease(key, now, false);
            }
            self.settle(key, now);
            return;
        }
        if session.owned.iter().any(|o| matches!(o, Owned::Image(_))) {
            // The hold is over; the index still knows where the image is.
            session.owned.retain(|o| !matches!(o, Owned::Image(_)));
            self.settle(key, now);
            return;
        }
        self.sessions.remove(key);
    }

    fn container_due(&mut self, daemon: &DaemonId, id: &str, now: Time) {
        let unstarted = self.objects.get(daemon, Kind::Container, id).is_some_and(|o| o.live && !o.started);
        if unstarted {
            self.set_live(daemon, id, false, now);
        }
    }

    fn learned(&mut self, daemon: &DaemonId, open: Option<OpenId>, fact: Fact, now: Time) {
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
    fn set_live(&mut self, daemon: &DaemonId, id: &str, live: bool, now: Time) {
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

    fn inventory(&mut self, daemon: &DaemonId, began: Time, inventory: Inventory, now: Time) {
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

    fn relist(&mut self, daemon: &DaemonId, began: Time, images: &[ListedImage], now: Time) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        let builders: Vec<SessionKey> = std::mem::take(&mut d.builders).into_iter().collect();
        let tenant = builders.first().and_then(|k| self.sessions.get(k)).map(|s| s.tenant.clone());
        let (gone, made) = self.images.list(daemon, began, images, &builders, tenant, now);
        self.disown_images(daemon, gone, now);
        for reference in made {
            self.own_image(daemon, &reference, &builders);
        }
    }

    fn probed(&mut self, daemon: &DaemonId, probe: Probe) {
        let Some(d) = self.daemons.get_mut(daemon) else { return };
        let before = d.standing();
        d.probed(probe, &self.config);
        if d.standing() != before {
            self.effects.push(changed(d));
        }
        self.agree_on_versions();
    }

    /// Recomputes the API range after a probe or a change of the pool, and refuses the daemons outside it.
    fn agree_on_versions(&mut self) {
        let ranges = self
            .daemons
            .values()
            .filter(|d| d.state != State::Starting)
            .filter_map(|d| d.facts.as_ref().map(|f| (d.id.clone(), (f.api_min, f.api_max))))
            .collect();
        // Without daemons the last known range stays: clients negotiate before the first one is there.
        let Some(range) = versions::common(&ranges) else { return };
        self.range = Some((range.min, range.max));
        for d in self.daemons.values_mut() {
            let misfit = range.misfits.contains(&d.id);
            if misfit != d.misfit {
                d.misfit = misfit;
                d.reason = match (&d.facts, misfit) {
                    (Some(facts), true) => format!(
                        "its API versions {}.{} to {}.{} do not meet the pool's {}.{} to {}.{}",
                        facts.api_min.0,
                        facts.api_min.1,
                        facts.api_max.0,
                        facts.api_max.1,
                        range.min.0,
                        range.min.1,
                        range.max.0,
                        range.max.1
                    ),
                    _ => String::new(),
                };
                self.effects.push(changed(d));
            }
        }
    }

    fn observed(&mut self, observed: Vec<Observed>, now: Time) {
        let there: BTreeSet<DaemonId> = observed.iter().map(|o| o.id.clone()).collect();
        let gone: Vec<DaemonId> = self.daemons.keys().filter(|id| !there.contains(*id)).cloned().collect();
        for id in gone {
            self.lose(&id, now);
            self.daemons.remove(&id);
            self.effects.push(Effect::DaemonChanged {
                daemon: id,
                state: State::Gone,
                health: Health::Ejected,
                reason: "it is no longer part of the pool".into(),
            });
        }
        for o in observed {
            let d = self.daemons.entry(o.id.clone()).or_insert_with(|| Daemon::new(o.id.clone(), o.slots));
            let before = d.standing();
            d.state = match (d.state, o.draining) {
                (State::Ready, true) => State::Draining,
                (State::Draining, false) => State::Ready,
                (state, _) => state,
            };
            if let Some(pending) = o.pending
                && d.state == State::Starting
            {
                d.reason = pending;
            }
            if d.standing() != before {
                self.effects.push(changed(d));
            }
        }
        self.agree_on_versions();
    }

    fn replaced(&mut self, daemon: &DaemonId, now: Time) {
        self.lose(daemon, now);
        if let Some(d) = self.daemons.get_mut(daemon) {
            d.builders.clear();
        }
    }

    /// Everything on a daemon is lost: its sessions, their containers and images.
    fn lose(&mut self, daemon: &DaemonId, now: Time) {
        self.objects.lose(daemon);
        self.images.forget(daemon);
        // Streams to it break by themselves and are released; they are no longer anybody's work.
        for open in self.opens.values_mut().filter(|o| o.daemon == *daemon) {
            let unit = std::mem::replace(&mut open.unit, Unit::None);
            if let Some(session) = self.sessions.get_mut(&open.key) {
                session.builds -= u32::from(unit == Unit::Build);
                session.others -= u32::from(unit == Unit::Other);
            }
        }
        let hit: Vec<SessionKey> = self
            .sessions
            .iter()
            .filter(|(_, s)| {
                s.home.as_ref().is_some_and(|h| h.daemon == *daemon) || s.foreign.contains_key(daemon)
            })
            .map(|(key, _)| key.clone())
            .collect();
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

fn changed(daemon: &Daemon) -> Effect {
    Effect::DaemonChanged {
        daemon: daemon.id.clone(),
        state: daemon.state,
        health: if daemon.misfit { Health::Ejected } else { daemon.health },
        reason: daemon.reason.clone(),
    }
}
