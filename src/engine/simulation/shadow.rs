//! The shadow model: a second, slower account of what the engine was told and what it answered. It shares no
//! code with the engine's bookkeeping and recounts from scratch, so a slot that the engine loses or counts
//! twice is a difference between the two.

use std::collections::{BTreeMap, BTreeSet};

use super::super::model::*;
use super::super::{Config, Engine};

/// A grant that has not been released.
#[derive(Debug, Clone)]
pub struct Granted {
    pub acquire: Acquire,
    pub daemon: DaemonId,
    pub lease: Option<LeaseId>,
    /// Whether it has been seen to build.
    pub solves: bool,
    /// Whether its daemon has gone since.
    pub orphan: bool,
}

impl Granted {
    /// Builds and other units of work that it counts for.
    fn units(&self) -> (u32, u32) {
        match self.acquire.class {
            _ if self.orphan || self.lease.is_none() => (0, 0),
            Class::Work(Work::Build) => (1, 0),
            Class::Work(Work::BuildKit) if self.solves => (1, 0),
            Class::Work(_) => (0, 1),
            _ => (0, 0),
        }
    }
}

#[derive(Debug, Clone)]
struct Lease {
    id: LeaseId,
    daemon: DaemonId,
    /// Whether it has work.
    works: bool,
    /// Until when it keeps its slot after its last work.
    lingers: Time,
    /// Until when anything of it was open or running, and whether it still is.
    active: (Time, bool),
    /// The same, counting also what its client opened before the session was bound, or elsewhere: that need
    /// not keep the lease, but may.
    latest: (Time, bool),
    sources: BTreeSet<SessionKey>,
}

#[derive(Debug, Clone, Default)]
struct Container {
    owner: Option<SessionKey>,
    tenant: Option<Tenant>,
    live: bool,
    started: bool,
    /// Until when it counts without having been started.
    until: Option<Time>,
    learned: Time,
    project: Option<String>,
    /// It is a stranger that counts: it runs, no session made it, and since it began nobody built beside it.
    counts: bool,
}

impl Container {
    fn is_stranger(&self) -> bool {
        self.live && self.owner.is_none() && self.tenant.is_none()
    }
}

#[derive(Debug, Clone, Default)]
struct Member {
    ready: bool,
    ejected: bool,
    draining: bool,
    failures: u32,
    successes: u32,
    /// Since when it has been well.
    well: Option<Time>,
    /// It went out because it could not write.
    writes: bool,
    /// The same, and it has answered ever since.
    passive: bool,
    /// It could not write when it last had to: answers alone may not bring it back, whatever it went out for.
    failing: bool,
    cordon: Option<CordonedBy>,
    /// The deadline of its drain, while that waits.
    drain: Option<Time>,
}

impl Member {
    fn takes_sessions(&self) -> bool {
        self.ready && !self.ejected && !self.draining && self.cordon.is_none()
    }
}

/// What should be, by the shadow's account.
#[derive(Debug)]
pub struct Shadow {
    config: Config,
    pub grants: BTreeMap<OpenId, Granted>,
    members: BTreeMap<DaemonId, Member>,
    leases: BTreeMap<SessionKey, Lease>,
    containers: BTreeMap<(DaemonId, String), Container>,
    /// Networks, volumes and containers that a session made on its home.
    owned: BTreeMap<SessionKey, BTreeSet<(DaemonId, Kind, String)>>,
    /// Sessions that have built.
    builders: BTreeSet<SessionKey>,
    /// Sessions that may be held by an image: the shadow does not follow those.
    makers: BTreeSet<SessionKey>,
    opens_seen: BTreeSet<OpenId>,
    leases_seen: BTreeSet<LeaseId>,
}

impl Shadow {
    pub fn new(config: Config) -> Self {
        Shadow {
            config,
            grants: BTreeMap::new(),
            members: BTreeMap::new(),
            leases: BTreeMap::new(),
            containers: BTreeMap::new(),
            owned: BTreeMap::new(),
            builders: BTreeSet::new(),
            makers: BTreeSet::new(),
            opens_seen: BTreeSet::new(),
            leases_seen: BTreeSet::new(),
        }
    }

    /// Takes in an event and what came of it, and checks the engine against it.
    pub fn follow(&mut self, event: &Event, effects: &[Effect], engine: &Engine, now: Time) {
        if let Event::Inventory { daemon, inventory, .. } = event
            && effects.contains(&Effect::Emptied { daemon: daemon.clone() })
        {
            let known = |c: &&ListedContainer| self.containers.contains_key(&(daemon.clone(), c.id.clone()));
            let left = inventory.containers.iter().find(known);
            assert!(left.is_none(), "{daemon} still has {left:?}");
            self.lose(daemon);
        }
        let ended = self.event(event, now);
        self.health(effects);
        self.effects(event, effects, ended.as_ref(), now);
        if let Event::Acquire(acquire) = event {
            self.acquired(acquire, effects, now);
        }
        self.count_strangers(engine);
        self.drains(event, effects, now);
        self.check(engine, now);
        let may_end = !matches!(event, Event::Configured(_)); // A shorter grace is seen to at the next tick.
        for (key, lease) in self.leases.iter().filter(|_| may_end) {
            assert!(now < lease.latest.0 + self.config.grace, "the lease of {key} should have ended");
        }
    }

    /// Requests that are open have other numbers from now on.
    pub fn renumber(&mut self, numbers: &BTreeMap<OpenId, OpenId>) {
        let grants = std::mem::take(&mut self.grants).into_iter();
        self.grants = grants.map(|(open, grant)| (*numbers.get(&open).unwrap_or(&open), grant)).collect();
        self.opens_seen.extend(numbers.values());
    }

    /// What the event itself says. Returns the grant that it ends.
    fn event(&mut self, event: &Event, now: Time) -> Option<Granted> {
        match event {
            Event::Observed(observed) => {
                let there: BTreeSet<&DaemonId> = observed.iter().map(|o| &o.id).collect();
                let gone: Vec<_> = self.members.keys().filter(|id| !there.contains(id)).cloned().collect();
                for daemon in gone {
                    self.lose(&daemon);
                    self.members.remove(&daemon);
                }
                for o in observed {
                    let member = self.members.entry(o.id.clone()).or_default();
                    // One that goes on, and has never answered, only starts: its first answer is enough.
                    member.ejected &= member.ready || o.draining;
                    member.draining = o.draining;
                }
            }
            Event::Probed { daemon, probe } => {
                self.probed(daemon, matches!(probe, Probe::Refused(_)), probe, now);
            }
            Event::Replaced { daemon } => self.lose(daemon),
            Event::Learned { daemon, open, fact } => self.learned(daemon, *open, fact, now),
            Event::Inventory { daemon, began, inventory } => {
                self.makers.extend(self.builders.iter().cloned());
                self.listed(daemon, *began, &inventory.containers, &inventory.projects);
            }
            Event::Containers { daemon, began, containers, projects } => {
                self.listed(daemon, *began, containers, projects);
            }
            Event::Images { .. } => self.makers.extend(self.builders.iter().cloned()),
            Event::Wrote { daemon, result } => {
                if let Some(member) = self.members.get_mut(daemon) {
                    match result {
                        DeepProbe::Failed(_) | DeepProbe::Slow(_) => member.failing = true,
                        DeepProbe::Wrote => member.failing = false,
                        DeepProbe::Unsupported | DeepProbe::Unreached => {}
                    }
                }
            }
            Event::Timed { .. } => {}
            Event::Shared { .. } | Event::Distinct { .. } => {}
            Event::Acquire(_) | Event::Abandon(_) | Event::Growth(_) => {}
            Event::BuildSeen(open) => {
                if let Some(grant) = self.grants.get_mut(open) {
                    grant.solves = true;
                }
            }
            Event::Release { open, outcome } => {
                let gone = self.grants.remove(open)?;
                if *outcome == Outcome::Unreached && !gone.orphan {
                    self.probed(&gone.daemon, true, &Probe::Refused(String::new()), now);
                }
                return Some(gone);
            }
            Event::Configured(config) => {
                self.config = (**config).clone();
                if self.config.deep_probe_interval.is_zero() {
                    // What has answered comes back, whether it can write or not.
                    for m in self.members.values_mut().filter(|m| m.writes) {
                        (m.writes, m.passive, m.well) = (false, false, None);
                    }
                }
            }
            Event::Cordon { daemon, by } => self.cordon(daemon, *by),
            Event::Uncordon { daemon, by } => {
                let operators = |m: &&mut Member| m.cordon == Some(CordonedBy::Operator);
                if let Some(member) = self.members.get_mut(daemon)
                    && (*by == CordonedBy::Operator || !operators(&member))
                {
                    (member.cordon, member.drain) = (None, None);
                }
            }
            Event::Drain { daemon, deadline } => {
                self.cordon(daemon, CordonedBy::Operator);
                if let Some(member) = self.members.get_mut(daemon) {
                    member.drain.get_or_insert(*deadline);
                }
            }
            // They move only what the engine may choose freely.
            Event::Retired
            | Event::Import { .. }
            | Event::Attach(_)
            | Event::Leaving { .. }
            | Event::LetGo { .. } => {}
            Event::Tick => {
                for container in self.containers.values_mut() {
                    if container.until.is_some_and(|until| until <= now) {
                        container.until = None;
                        container.live &= container.started;
                    }
                }
            }
        }
        None
    }

    fn probed(&mut self, daemon: &DaemonId, refused: bool, probe: &Probe, now: Time) {
        let Some(member) = self.members.get_mut(daemon) else { return };
        if matches!(probe, Probe::Answered(_)) {
            member.failures = 0;
            member.successes += 1;
            member.ready = true;
            // It may be back before ([`Shadow::health`]), and is after the longest pause.
            let well = now - *member.well.get_or_insert(now) >= Time::from_secs(60);
            member.ejected &=
                member.writes || member.failing || !well || member.successes < self.config.recover_after;
        } else {
            member.failures += 1;
            (member.successes, member.well) = (0, None);
            member.passive &= !refused && member.failures < self.config.eject_after;
            member.ejected |=
                (member.ready || member.draining) && (refused || member.failures >= self.config.eject_after);
        }
    }

    /// Daemons that come back do so after good probes, and no more than half are out because they cannot write.
    fn health(&mut self, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::Ejected { daemon, cause: Cause::Writes } => {
                    let member = self.members.get_mut(daemon).expect("one of them");
                    (member.ejected, member.writes, member.passive) = (true, true, true);
                    let ready = self.members.values().filter(|m| m.ready && !m.draining);
                    let out = ready.clone().filter(|m| m.passive).count();
                    assert!(out * 2 <= ready.count(), "{daemon} is one too many");
                }
                Effect::DaemonChanged { daemon, health: Health::Healthy, .. } => {
                    let Some(member) = self.members.get_mut(daemon).filter(|m| m.ejected) else { continue };
                    let enough = if member.writes { 1 } else { self.config.recover_after };
                    assert!(member.successes >= enough, "{daemon} is back too soon");
                    (member.ejected, member.writes, member.passive) = (false, false, false);
                }
                _ => {}
            }
        }
    }

    fn lose(&mut self, daemon: &DaemonId) {
        self.containers.retain(|(d, _), _| d != daemon);
        for owned in self.owned.values_mut() {
            owned.retain(|(d, _, _)| d != daemon);
        }
        for grant in self.grants.values_mut().filter(|g| g.daemon == *daemon) {
            grant.orphan = true;
        }
    }

    fn learned(&mut self, daemon: &DaemonId, open: Option<OpenId>, fact: &Fact, now: Time) {
        if !self.members.contains_key(daemon) {
            return;
        }
        let by = open.and_then(|open| self.grants.get(&open)).cloned();
        if by.as_ref().is_some_and(|by| by.orphan) {
            return;
        }
        match fact {
            Fact::Labelled { id, project, .. } => self.labelled(daemon, id, project),
            Fact::Created { kind, id, .. } => {
                if *kind == Kind::Container {
                    let container = self.containers.entry((daemon.clone(), id.clone())).or_default();
                    container.learned = now;
                    if let Some(by) = &by
                        && container.owner.is_none()
                    {
                        container.tenant = Some(by.acquire.tenant.clone());
                        if by.acquire.inside.is_none() {
                            container.owner = Some(by.acquire.key.clone());
                            container.live |= !container.started;
                            container.until = (!container.started).then_some(now + self.config.unstarted);
                        }
                    }
                }
                if let Some(by) = by
                    && self.leases.get(&by.acquire.key).is_some_and(|l| l.daemon == *daemon)
                {
                    let owned = self.owned.entry(by.acquire.key).or_default();
                    owned.insert((daemon.clone(), *kind, id.clone()));
                }
            }
            Fact::Started { id } => {
                let container = self.containers.entry((daemon.clone(), id.clone())).or_default();
                (container.live, container.started, container.learned) = (true, true, now);
            }
            Fact::Stopped { id } => {
                if let Some(container) = self.containers.get_mut(&(daemon.clone(), id.clone())) {
                    (container.live, container.started, container.learned) = (false, true, now);
                }
            }
            Fact::Renamed { id, .. } => {
                self.containers.entry((daemon.clone(), id.clone())).or_default().learned = now;
            }
            Fact::Removed { kind, id } => self.removed(daemon, *kind, id),
            Fact::ImageWritten { written, .. } => {
                if *written == Written::Made {
                    self.makers.extend(by.map(|by| by.acquire.key));
                    self.makers.extend(self.builders.iter().cloned());
                }
            }
            Fact::ImageRemoved { .. } | Fact::ImagePushed { .. } => {}
        }
    }

    fn removed(&mut self, daemon: &DaemonId, kind: Kind, id: &str) {
        if kind == Kind::Container {
            self.containers.remove(&(daemon.clone(), id.to_string()));
        }
        for owned in self.owned.values_mut() {
            owned.remove(&(daemon.clone(), kind, id.to_string()));
        }
    }

    fn labelled(&mut self, daemon: &DaemonId, id: &str, project: &str) {
        if let Some(container) = self.containers.get_mut(&(daemon.clone(), id.to_string())) {
            container.project.get_or_insert(project.to_string());
        }
    }

    /// An operator's cordon is not the scaler's to lift.
    fn cordon(&mut self, daemon: &DaemonId, by: CordonedBy) {
        let Some(member) = self.members.get_mut(daemon) else { return };
        if by == CordonedBy::Operator || member.cordon.is_none() {
            member.cordon = Some(by);
        }
    }

    fn listed(
        &mut self,
        daemon: &DaemonId,
        began: Time,
        containers: &[ListedContainer],
        projects: &[(Kind, String, String)],
    ) {
        if !self.members.contains_key(daemon) {
            return;
        }
        let listed: BTreeMap<&str, bool> = containers.iter().map(|c| (c.id.as_str(), c.running)).collect();
        let doomed: Vec<String> = (self.containers.iter())
            .filter(|((d, id), c)| d == daemon && !listed.contains_key(id.as_str()) && c.learned < began)
            .map(|((_, id), _)| id.clone())
            .collect();
        for id in doomed {
            self.removed(daemon, Kind::Container, &id);
        }
        for (id, running) in listed {
            let container = self
                .containers
                .entry((daemon.clone(), id.to_string()))
                .or_insert(Container { learned: Time::ZERO, ..Container::default() });
            if container.learned < began {
                container.learned = began;
                if container.started || running {
                    container.live = running;
                    container.started = true;
                }
            }
        }
        for (_, id, project) in projects {
            self.labelled(daemon, id, project);
        }
    }

    /// Whether a build is under way on a daemon that may run containers of its own there.
    fn is_building(&self, daemon: &DaemonId) -> bool {
        let builds = |a: &Acquire| matches!(a.class, Class::Work(Work::Build | Work::BuildKit | Work::Load));
        self.grants.values().any(|g| g.daemon == *daemon && !g.orphan && builds(&g.acquire))
    }

    /// What runs without a session: compose projects, and lone containers.
    fn count_strangers(&mut self, engine: &Engine) {
        let building: BTreeSet<DaemonId> =
            self.members.keys().filter(|d| self.is_building(d)).cloned().collect();
        let mut groups: BTreeSet<(&DaemonId, &str)> = BTreeSet::new();
        for ((daemon, id), container) in &mut self.containers {
            container.counts = container.is_stranger() && (container.counts || !building.contains(daemon));
            if container.counts {
                groups.insert((daemon, container.project.as_deref().unwrap_or(id)));
            }
        }
        for daemon in engine.daemons() {
            let ours = groups.iter().filter(|(d, _)| **d == daemon.id).count();
            assert_eq!(daemon.strangers() as usize, ours, "strangers on {}", daemon.id);
        }
    }

    /// A drain ends when the last work is gone, not before, and at its deadline at the latest.
    fn drains(&mut self, event: &Event, effects: &[Effect], now: Time) {
        let mut drained: BTreeMap<&DaemonId, &Drained> = BTreeMap::new();
        for effect in effects {
            match effect {
                Effect::Drained { daemon, drained: how } => {
                    assert!(drained.insert(daemon, how).is_none(), "{daemon} was drained twice at once");
                }
                Effect::Cordoned { daemon, by } => {
                    assert_eq!(self.members.get(daemon).and_then(|m| m.cordon), Some(*by), "{daemon}");
                }
                Effect::Uncordoned { daemon, .. } => {
                    assert!(self.members.get(daemon).is_some_and(|m| m.cordon.is_none()), "{daemon}");
                }
                _ => {}
            }
        }
        let waits = self.members.iter().filter_map(|(id, m)| Some((id.clone(), m.drain?)));
        for (daemon, deadline) in waits.collect::<Vec<_>>() {
            let open = self.grants.values().filter(|g| g.daemon == daemon && !g.orphan).count() as u32;
            // What may be a build's own goes with the build, which is open.
            let containers = (self.containers.iter())
                .filter(|((d, _), c)| *d == daemon && c.live && c.counts == c.is_stranger())
                .count();
            let bound: Vec<&SessionKey> =
                self.leases.iter().filter(|(_, l)| l.daemon == daemon).map(|(key, _)| key).collect();
            let works = open > 0 || containers > 0 || !bound.is_empty();
            let Some(how) = drained.remove(&daemon) else {
                assert!(works, "the drain of {daemon} waits for nothing");
                // One of no time at all is told at the next tick.
                assert!(
                    now < deadline || matches!(event, Event::Drain { .. }),
                    "{daemon} drains for too long"
                );
                let idle = bound.into_iter().find(|key| {
                    let open = self.grants.values().any(|g| g.acquire.key == **key);
                    !open && !self.runs(key, &daemon)
                });
                assert!(idle.is_none(), "a drain waits for {idle:?}, who does nothing");
                continue;
            };
            assert!(!works || now >= deadline, "{daemon} was drained while {open} + {containers} work there");
            let cut: u32 = how.cut.iter().map(|r| r.open).sum();
            let ran: usize = how.cut.iter().map(|r| r.containers.len()).sum();
            assert_eq!((cut, ran), (open, containers), "what the drain of {daemon} has cut");
            self.members.get_mut(&daemon).expect("it is there").drain = None;
        }
        assert!(drained.is_empty(), "drained without a drain: {drained:?}");
    }

    /// Leases start and end only when they may.
    fn effects(&mut self, event: &Event, effects: &[Effect], ended: Option<&Granted>, now: Time) {
        for effect in effects {
            match effect {
                Effect::LeaseStarted { key, lease, daemon } => {
                    assert!(self.leases_seen.insert(*lease), "lease {lease:?} was given twice");
                    assert!(self.members.contains_key(daemon), "a lease on {daemon}, which is not there");
                    let lease = Lease {
                        id: *lease,
                        daemon: daemon.clone(),
                        works: false,
                        lingers: Time::ZERO,
                        active: (now, false),
                        latest: (now, false),
                        sources: BTreeSet::new(),
                    };
                    let other = self.leases.insert(key.clone(), lease);
                    assert!(other.is_none(), "{key} has leases on two daemons");
                    // What it runs there becomes its own.
                    for ((d, id), container) in &self.containers {
                        if d == daemon && container.live && container.owner.as_ref() == Some(key) {
                            let owned = self.owned.entry(key.clone()).or_default();
                            owned.insert((d.clone(), Kind::Container, id.clone()));
                        }
                    }
                }
                Effect::LeaseEnded { key, lease, daemon, lost, .. } => {
                    let ours = self.leases.remove(key).expect("only what was given ends");
                    assert_eq!((ours.id, &ours.daemon), (*lease, daemon));
                    if *lost {
                        let gone = !self.members.contains_key(daemon);
                        let replaced = matches!(event, Event::Replaced { daemon: d } if d == daemon);
                        let emptied = effects.contains(&Effect::Emptied { daemon: daemon.clone() });
                        assert!(gone || replaced || emptied, "{key} lost {daemon}, which is there");
                        continue;
                    }
                    let open = self.grants.values().any(|g| g.lease == Some(*lease) && !g.orphan);
                    assert!(!open, "the lease of {key} ended under an open request");
                    assert!(!self.runs(key, daemon), "the lease of {key} ended under a running container");
                    let moved = matches!(event, Event::Acquire(_));
                    let drains = self.members.get(daemon).is_some_and(|m| m.drain.is_some());
                    let undone = matches!(event, Event::Release { outcome: Outcome::Unreached, .. })
                        && ended.is_some();
                    assert!(
                        moved || undone || drains || now >= ours.active.0 + self.config.grace,
                        "the lease of {key} ended early"
                    );
                }
                _ => {}
            }
        }
    }

    fn runs(&self, key: &SessionKey, daemon: &DaemonId) -> bool {
        self.containers.iter().any(|((d, _), c)| d == daemon && c.live && c.owner.as_ref() == Some(key))
    }

    /// One request, one answer, in the right place.
    fn acquired(&mut self, acquire: &Acquire, effects: &[Effect], now: Time) {
        let (mut granted, mut refused) = (None, None);
        for effect in effects {
            match effect {
                Effect::Granted { request, open, daemon, lease, .. } => {
                    assert_eq!(*request, acquire.request);
                    assert!(granted.replace((*open, daemon.clone(), *lease)).is_none(), "answered twice");
                }
                Effect::Refused { request, refusal } => {
                    assert_eq!(*request, acquire.request);
                    assert!(refused.replace(refusal.clone()).is_none(), "answered twice");
                }
                _ => {}
            }
        }
        assert_ne!(granted.is_some(), refused.is_some(), "one answer to each request");
        let Some((open, daemon, lease)) = granted else {
            let plain = acquire.target.is_none();
            let able = self.members.values().any(Member::takes_sessions);
            assert!(
                !(plain && able && matches!(acquire.class, Class::Work(_))),
                "refused although daemons are well: {refused:?}"
            );
            return;
        };
        assert!(self.opens_seen.insert(open), "{open:?} was given twice");
        assert!(self.members.contains_key(&daemon), "sent to {daemon}, which is not there");
        self.placed(acquire, &daemon, lease, effects);
        if let Some(lease) = self.leases.get_mut(&acquire.key).filter(|l| Some(l.id) == lease) {
            lease.active = (now, true);
            if matches!(acquire.class, Class::Work(_) | Class::Join) {
                lease.sources.extend(acquire.source.clone());
            }
        }
        if matches!(acquire.class, Class::Work(Work::Build | Work::BuildKit | Work::Load)) {
            self.builders.insert(acquire.key.clone());
        }
        let grant = Granted { acquire: acquire.clone(), daemon, lease, solves: false, orphan: false };
        self.grants.insert(open, grant);
    }

    /// Where bound and plain work may go.
    fn placed(&self, acquire: &Acquire, daemon: &DaemonId, lease: Option<LeaseId>, effects: &[Effect]) {
        let key = &acquire.key;
        let now_held = self.leases.get(key);
        if let Some(lease) = lease {
            let held = now_held.expect("a grant names a lease that lives");
            assert_eq!((held.id, &held.daemon), (lease, daemon), "{key} works beside its lease");
        }
        if let Some(inside) = acquire.inside.as_ref().filter(|d| self.members.contains_key(*d)) {
            assert_eq!((inside, lease), (daemon, None));
            return;
        }
        if let Some(target) = &acquire.target {
            let at = (daemon.clone(), target.reference.clone());
            let elsewhere = self.containers.iter().any(|((d, id), c)| {
                d != daemon && *id == at.1 && c.tenant.as_ref().is_none_or(|t| *t == acquire.tenant)
            });
            assert!(
                target.kind != Kind::Container || !elsewhere || self.containers.contains_key(&at),
                "{} is not on {daemon}",
                target.reference
            );
        }
        let needs = acquire.requirements.image.is_some() || !acquire.requirements.beside.is_empty();
        if !matches!(acquire.class, Class::Work(_) | Class::Join) || acquire.target.is_some() || needs {
            return;
        }
        assert!(lease.is_some(), "plain work of {key} is bound");
        let owned = self.owned.get(key).and_then(|owned| owned.first());
        if let Some((home, _, _)) = owned {
            assert_eq!(daemon, home, "{key} owns something on {home}");
        }
        let fresh = effects.iter().any(|e| matches!(e, Effect::LeaseStarted { key: k, .. } if k == key));
        let ended = effects.iter().any(|e| matches!(e, Effect::LeaseEnded { .. }));
        assert!(!ended, "plain work moves nobody");
        if !fresh || owned.is_some() || self.makers.contains(key) {
            return;
        }
        let group = acquire.source.as_ref().unwrap_or(key);
        let siblings: BTreeSet<&DaemonId> = (self.leases.iter())
            .filter(|(k, l)| *k != key && (*k == group || l.sources.contains(group)))
            .map(|(_, l)| &l.daemon)
            .collect();
        if siblings.is_empty() {
            let member = &self.members[daemon];
            assert!(member.takes_sessions(), "a new session on {daemon}: {member:?}");
        } else {
            assert!(siblings.contains(daemon), "{key} is not with what comes from {group}");
        }
    }

    /// Slots in use per daemon, recounted; leases that should have ended.
    fn check(&mut self, engine: &Engine, now: Time) {
        let mut used: BTreeMap<DaemonId, u32> = BTreeMap::new();
        let mut live: BTreeMap<(SessionKey, DaemonId), u32> = BTreeMap::new();
        for ((daemon, _), container) in self.containers.iter().filter(|(_, c)| c.live) {
            if let Some(owner) = &container.owner {
                *live.entry((owner.clone(), daemon.clone())).or_default() += 1;
            }
        }
        for (key, lease) in &mut self.leases {
            let (mut builds, mut others) =
                (0, live.remove(&(key.clone(), lease.daemon.clone())).unwrap_or(0));
            let mut active = others > 0;
            let mut latest = active;
            for grant in self.grants.values().filter(|g| g.acquire.key == *key) {
                latest = true;
                if grant.lease == Some(lease.id) {
                    active = true;
                    let (b, o) = grant.units();
                    builds += b;
                    others += o;
                }
            }
            let wants = builds.max(others.min(1));
            // What was so after the event before has lasted until this one.
            lease.active = (if active || lease.active.1 { now } else { lease.active.0 }, active);
            lease.latest = (if latest || lease.latest.1 { now } else { lease.latest.0 }, latest);
            if std::mem::replace(&mut lease.works, wants > 0) && wants == 0 {
                lease.lingers = now + self.config.linger;
            }
            let lingers = wants == 0 && now < lease.lingers;
            *used.entry(lease.daemon.clone()).or_default() += wants.max(u32::from(lingers));
        }
        for (_, daemon) in live.into_keys() {
            *used.entry(daemon).or_default() += 1; // Away from home, all of a session's containers take one.
        }
        for daemon in engine.daemons() {
            let ours = used.remove(&daemon.id).unwrap_or(0);
            assert_eq!(daemon.used, ours, "slots in use on {}", daemon.id);
        }
        assert!(used.is_empty(), "slots in use on daemons that are not there: {used:?}");
        let leases: BTreeMap<&SessionKey, LeaseId> = self.leases.iter().map(|(k, l)| (k, l.id)).collect();
        let theirs: BTreeMap<&SessionKey, LeaseId> =
            engine.sessions().filter_map(|(k, s)| Some((k, s.lease()?))).collect();
        assert_eq!(theirs, leases, "leases");
    }
}
