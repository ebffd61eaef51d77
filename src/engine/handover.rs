//! What one engine knows that another one cannot find out from the daemons: whose everything is. A proxy that gives up
//! admitting exports it, its successor imports it before it admits, and from then on decides as the other would have.
//!
//! Both watch the same daemons, so what exists there, and how well they are, is not handed over, only whose it is. An
//! object that the successor's own watch does not show has gone, or is so new that its event is still on its way:
//! that is told by its age ([`NEWS`]).
//!
//! All times are ages, because the two have clocks of their own. Requests that are open stay with the proxy that
//! relays them: they are known here by their numbers there, and end when that proxy says so.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::cordon::{Cordon, Drain};
use super::daemon::Builders;
use super::images::ImageExport;
use super::model::*;
use super::objects::Object;
use super::session::{Home, Owned, Session};
use super::{Engine, Open, Timer, Unit};

/// The form of an [`Export`]. One of another form is not imported: as after a crash, the daemons tell what there is.
pub const VERSION: u32 = 1;

/// How long an object may be known to one proxy before the other one's watch shows it.
const NEWS: Time = Time::from_secs(10);

/// All that an engine knows of whose things are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Export {
    /// [`VERSION`]
    pub version: u32,
    /// The exporter's epoch.
    pub epoch: u64,
    /// Its daemons, and whose their objects are.
    pub daemons: Vec<DaemonExport>,
    /// Its sessions.
    pub sessions: Vec<SessionExport>,
    /// Requests that are open.
    pub opens: Vec<OpenExport>,
    /// Whose image references are, and which are the latest.
    pub images: Vec<ImageExport>,
    /// Ids of objects that went with their daemon, the oldest first.
    pub lost: Vec<(String, DaemonId)>,
}

/// A daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DaemonExport {
    /// Its name.
    pub id: DaemonId,
    /// Its engine id, if it has answered: under the same name there may be another one now.
    pub engine_id: Option<String>,
    /// Who cordoned it.
    pub cordon: Option<CordonedBy>,
    /// In what time its drain cuts, if one waits.
    pub drain: Option<Time>,
    /// Its objects.
    pub objects: Vec<ObjectExport>,
    /// The projects that it has built, the oldest first.
    pub projects: Vec<ProjectKey>,
    /// Builds that ended after its images were listed last: whose, and how long ago.
    pub built: Vec<(SessionKey, Tenant, Time)>,
}

/// A container, network, volume or exec.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ObjectExport {
    /// What it is.
    pub kind: Kind,
    /// Full id; for a volume its name.
    pub id: String,
    /// Its name.
    pub name: Option<String>,
    /// Whose it is.
    pub tenant: Option<Tenant>,
    /// The sessions that made it.
    pub owners: Vec<SessionKey>,
    /// Whether it is a container that counts as work.
    pub live: bool,
    /// Whether it has run.
    pub started: bool,
    /// For how long it still counts if it has not.
    pub unstarted: Time,
    /// Its compose project.
    pub project: Option<String>,
    /// Whether it is a container that counts as load that no session made; not what may be a build's own.
    pub stranger: bool,
    /// How long ago something was learned of it.
    pub age: Time,
}

/// A session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionExport {
    /// Its key.
    pub key: SessionKey,
    /// Who it belongs to.
    pub tenant: Tenant,
    /// The key of its source.
    pub source: Option<SessionKey>,
    /// The keys under which its lease is found.
    pub groups: Vec<SessionKey>,
    /// Where it is at home.
    pub home: Option<HomeExport>,
    /// The daemon that it lost.
    pub lost: Option<DaemonId>,
    /// Objects that exist on its home only.
    pub owned: Vec<(Kind, String)>,
    /// The same of unpushed images, by reference.
    pub images: Vec<String>,
    /// Slots that it holds.
    pub slots: u32,
    /// For how long it keeps the last one without work.
    pub linger: Option<Time>,
    /// For how long nothing of it has been open or has run.
    pub idle: Option<Time>,
    /// For how long it has had nothing but containers.
    pub unattended: Option<Time>,
    /// How long ago it was told that this is too long.
    pub overdue: Option<Time>,
}

/// A session's home.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HomeExport {
    /// The daemon.
    pub daemon: DaemonId,
    /// Its lease there.
    pub lease: Option<LeaseId>,
    /// For how long it has been at home there.
    pub age: Time,
    /// Whether anything of it has reached the daemon.
    pub proven: bool,
}

/// A request that is open at some proxy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OpenExport {
    /// Its number there; comes back in [`Effect::Attached`].
    pub open: OpenId,
    /// Whose it is.
    pub key: SessionKey,
    /// Who that belongs to.
    pub tenant: Tenant,
    /// The key of its source.
    pub source: Option<SessionKey>,
    /// Where it goes.
    pub daemon: DaemonId,
    /// How it counts.
    pub unit: Unit,
    /// The work that it started.
    pub work: Option<Work>,
    /// Whether images may come of it that only `/events` or a list will tell.
    pub builds: bool,
    /// Whether it holds its session to the daemon.
    pub leased: bool,
    /// Whether its session counts it as open.
    pub counted: bool,
    /// Its daemon has gone, or is another one now: it only keeps its session until it ends.
    pub orphan: bool,
    /// For how long it has been open.
    pub age: Time,
    /// A BuildKit session's uuid.
    pub uuid: Option<String>,
}

impl OpenExport {
    /// What an engine would export of a request that it has granted a moment ago.
    pub fn of(acquire: &Acquire, open: OpenId, daemon: DaemonId, leased: bool) -> Self {
        let class = acquire.class;
        let target = acquire.target.clone().filter(|target| target.kind == Kind::BuildSession);
        OpenExport {
            open,
            key: acquire.key.clone(),
            tenant: acquire.tenant.clone(),
            source: acquire.source.clone(),
            daemon,
            unit: if leased { Unit::of(class) } else { Unit::None },
            work: if let Class::Work(work) = class { Some(work) } else { None },
            builds: makes_images(class),
            leased,
            counted: leased,
            orphan: false,
            age: Time::ZERO,
            uuid: target.map(|target| target.reference),
        }
    }
}

/// Whether images may come of it that only `/events` or a list will tell.
pub(super) fn makes_images(class: Class) -> bool {
    matches!(class, Class::Work(Work::Build | Work::BuildKit | Work::Load))
}

impl Engine {
    /// All that a successor cannot find out by itself. What waits is not in it: whoever waits asks the successor.
    pub fn export(&self, now: Time) -> Export {
        let age = |at: Time| now.saturating_sub(at);
        let left = |at: Time| at.saturating_sub(now);
        let mut opens: Vec<OpenExport> = (self.opens.iter())
            .map(|(id, open)| OpenExport {
                open: *id,
                key: open.key.clone(),
                tenant: open.tenant.clone(),
                source: self.sessions.get(&open.key).and_then(|session| session.source.clone()),
                daemon: open.daemon.clone(),
                unit: open.unit,
                work: open.work,
                builds: open.builds,
                leased: open.lease.is_some(),
                counted: open.counted,
                orphan: open.orphan,
                age: age(open.since),
                uuid: open.uuid.clone(),
            })
            .collect();
        opens.sort_unstable_by_key(|open| open.open);
        let sessions = self.sessions().map(|(key, s)| SessionExport {
            key: key.clone(),
            tenant: s.tenant.clone(),
            source: s.source.clone(),
            groups: s.groups.iter().cloned().collect(),
            home: s.home.as_ref().map(|home| HomeExport {
                daemon: home.daemon.clone(),
                lease: home.lease,
                age: age(home.since),
                proven: home.proven,
            }),
            lost: s.lost.clone(),
            owned: (s.owned.iter())
                .filter_map(|o| match o {
                    Owned::Object(kind, id) => Some((*kind, id.clone())),
                    Owned::Image(_) => None,
                })
                .collect(),
            images: (s.owned.iter())
                .filter_map(|o| match o {
                    Owned::Image(reference) => Some(reference.clone()),
                    Owned::Object(..) => None,
                })
                .collect(),
            slots: s.slots,
            linger: s.linger.map(left),
            idle: s.idle.map(age),
            unattended: s.unattended.map(age),
            overdue: s.overdue.map(age),
        });
        Export {
            version: VERSION,
            epoch: self.config.epoch,
            daemons: self.daemons.values().map(|d| self.export_daemon(d, now)).collect(),
            sessions: sessions.collect(),
            opens,
            images: self.images.export(now),
            lost: self.objects.lost_ids(),
        }
    }

    fn export_daemon(&self, d: &super::Daemon, now: Time) -> DaemonExport {
        let objects = self.objects.on(&d.id).filter(|(kind, _, _)| is_object(*kind));
        DaemonExport {
            id: d.id.clone(),
            engine_id: d.facts.as_ref().map(|facts| facts.engine_id.clone()),
            cordon: d.cordon.as_ref().map(|cordon| cordon.by),
            drain: d.cordon.as_ref().and_then(Cordon::deadline).map(|at| at.saturating_sub(now)),
            objects: objects
                .map(|(kind, id, o)| ObjectExport {
                    kind,
                    id: id.to_string(),
                    name: o.name.clone(),
                    tenant: o.tenant.clone(),
                    owners: o.owners.clone(),
                    live: o.live,
                    started: o.started,
                    unstarted: o.unstarted.saturating_sub(now),
                    project: o.project.clone(),
                    stranger: kind == Kind::Container && d.strangers.counts(id),
                    age: now.saturating_sub(o.seen),
                })
                .collect(),
            projects: self.warm.projects(&d.id).cloned().collect(),
            built: d.builders.ended(now),
        }
    }

    /// It admits no more: whose things are is forgotten, what there is stays. Who waits is refused nothing: the shell
    /// asks the successor for them.
    pub(super) fn retire(&mut self) {
        self.sessions.clear();
        self.sources.clear();
        self.opens.clear();
        self.held = super::session::Held::default();
        self.queue = super::queue::Queue::default();
        self.draining.clear();
        self.timers
            .retain(|(_, timer)| matches!(timer, Timer::Patience(_) | Timer::Deep(_) | Timer::SlowStart(_)));
        self.objects.disown();
        self.images.disown();
        for d in self.daemons.values_mut() {
            (d.used, d.open, d.cordon, d.builders) = (0, 0, None, Builders::default());
            d.sessions.clear();
        }
        self.strangers_begin_anew();
        self.count_all_strangers();
        self.queue.changed = true;
    }

    /// Takes over what another engine has exported, whose place it takes. Its own account of whose things are, if it
    /// has any, is an older one.
    pub(super) fn import(&mut self, epoch: u64, export: &Export, now: Time) {
        self.retire();
        self.config.epoch = epoch;
        if export.version != VERSION {
            return;
        }
        let there: BTreeSet<DaemonId> =
            export.daemons.iter().filter(|d| self.is_that(d)).map(|d| d.id.clone()).collect();
        for d in export.daemons.iter().filter(|d| there.contains(&d.id)) {
            self.import_daemon(d, now);
        }
        self.objects.import_lost(&export.lost);
        // Execs and containers of daemons that have gone meanwhile are as lost as their sessions.
        for d in export.daemons.iter().filter(|d| !there.contains(&d.id)) {
            let gone = d.objects.iter().filter(|o| matches!(o.kind, Kind::Container | Kind::Exec));
            let gone: Vec<_> = gone.map(|o| (o.id.clone(), d.id.clone())).collect();
            self.objects.import_lost(&gone);
        }
        let listed: BTreeSet<DaemonId> =
            self.daemons.values().filter(|d| d.listed).map(|d| d.id.clone()).collect();
        self.images.import(&export.images, &there, &listed, NEWS, now);
        // Before anybody builds here: what counted while others built goes on to count.
        self.strangers_begin_anew();
        for d in export.daemons.iter().filter(|d| there.contains(&d.id)) {
            for stranger in d.objects.iter().filter(|o| o.stranger) {
                self.count_stranger(&d.id, &stranger.id);
            }
        }
        let mut live = self.live();
        for session in &export.sessions {
            self.import_session(session, &there, live.remove(&session.key).unwrap_or_default(), now);
        }
        for open in &export.opens {
            let orphan = open.orphan || !there.contains(&open.daemon);
            self.attach(&OpenExport { orphan, ..open.clone() }, now);
        }
        self.count_all_strangers();
        for session in &export.sessions {
            self.settle(&session.key, now);
        }
        self.queue.changed = true;
    }

    /// Whether a daemon of this name is there and, as far as is known, the same one.
    fn is_that(&self, export: &DaemonExport) -> bool {
        self.daemons.get(&export.id).is_some_and(|d| match (&d.facts, &export.engine_id) {
            (Some(facts), Some(id)) => facts.engine_id == *id,
            _ => true,
        })
    }

    fn import_daemon(&mut self, export: &DaemonExport, now: Time) {
        let id = &export.id;
        for project in &export.projects {
            self.warm.touch(project, id);
        }
        let Some(d) = self.daemons.get_mut(id) else { return };
        d.builders.import_ended(&export.built, now);
        let listed = d.listed;
        if let Some(by) = export.cordon {
            let deadline = export.drain.map(|left| now + left);
            let drain = deadline.map(|deadline| Drain::Waiting { deadline });
            d.cordon = Some(Cordon { by, drain });
            if let Some(deadline) = deadline {
                self.draining.insert(id.clone());
                self.timers.insert((deadline, Timer::Drain(id.clone())));
            }
        }
        for object in &export.objects {
            self.import_object(id, object, listed, now);
        }
    }

    fn import_object(&mut self, daemon: &DaemonId, export: &ObjectExport, listed: bool, now: Time) {
        let ObjectExport { kind, id, name, .. } = export;
        let known = self.objects.get(daemon, *kind, id);
        // No list has execs.
        let may_be_new = *kind == Kind::Exec || !listed || export.age < NEWS;
        if known.is_none() && !may_be_new {
            return;
        }
        let (known, started) = (known.is_some(), known.is_some_and(|o| o.started));
        let seen = if known { Time::ZERO } else { now };
        // A name that is known here is as new as the other one's, or newer.
        let named = self.objects.get(daemon, *kind, id).is_some_and(|o| o.name.is_some());
        self.objects.add(daemon, *kind, id, name.as_deref().filter(|_| !named), seen);
        let Some(object) = self.objects.get_mut(daemon, *kind, id) else { return };
        object.tenant.clone_from(&export.tenant);
        object.owners.clone_from(&export.owners);
        // Whether it runs was seen here as well, once it has.
        if !started {
            let unstarted = now + export.unstarted;
            (object.live, object.started, object.unstarted) = (export.live, export.started, unstarted);
            if export.live && !export.started {
                self.timers.insert((unstarted, Timer::Container(daemon.clone(), id.clone())));
            }
        }
        if let Some(project) = &export.project {
            self.objects.label(daemon, *kind, id, project, seen);
            for owner in &export.owners {
                self.objects.join(daemon, project, owner);
            }
        }
    }

    /// A session, and its containers that run.
    fn import_session(
        &mut self,
        export: &SessionExport,
        there: &BTreeSet<DaemonId>,
        live: Vec<(DaemonId, String)>,
        now: Time,
    ) {
        let ago = |age: Time| now.saturating_sub(age);
        let mut session = Session::new(export.tenant.clone(), now);
        session.lost.clone_from(&export.lost);
        session.idle = Some(export.idle.map_or(now, ago));
        session.unattended = export.unattended.map(ago);
        session.overdue = export.overdue.map(ago);
        let key = &export.key;
        match &export.home {
            Some(home) if there.contains(&home.daemon) => {
                let HomeExport { daemon, lease, age, proven } = home.clone();
                session.owned = self.still_owned(&daemon, export);
                session.home =
                    Some(Home { daemon: daemon.clone(), lease, since: ago(age), proven, why: None });
                if lease.is_some() {
                    session.source.clone_from(&export.source);
                    session.groups = export.groups.iter().cloned().collect();
                    session.slots = export.slots;
                    session.linger = export.linger.map(|left| now + left);
                    self.held.change(&export.tenant, 0, export.slots);
                    for group in &session.groups {
                        self.sources.entry(group.clone()).or_default().insert(key.clone());
                    }
                    if let Some(d) = self.daemons.get_mut(&daemon) {
                        d.sessions.insert(key.clone());
                        d.used += export.slots;
                    }
                }
            }
            Some(home) if home.lease.is_some() || !(export.owned.is_empty() && export.images.is_empty()) => {
                session.lost = Some(home.daemon.clone());
            }
            _ => {}
        }
        for (daemon, id) in live {
            if session.home.as_ref().is_some_and(|home| home.daemon == daemon) {
                session.live.insert(id);
            } else {
                session.foreign.entry(daemon).or_default().insert(id);
            }
        }
        for daemon in session.foreign.keys() {
            if let Some(d) = self.daemons.get_mut(daemon) {
                d.used += 1;
            }
        }
        let runs = !session.live.is_empty() && session.lease().is_none();
        self.sessions.insert(key.clone(), session);
        if runs {
            self.revive(key, now);
        }
    }

    /// What of a session's things is still there.
    fn still_owned(&self, daemon: &DaemonId, export: &SessionExport) -> BTreeSet<Owned> {
        let objects = export.owned.iter().filter(|(kind, id)| self.objects.get(daemon, *kind, id).is_some());
        let objects = objects.map(|(kind, id)| Owned::Object(*kind, id.clone()));
        let images = export.images.iter().filter(|r| self.images.made_by(&export.key, daemon, r));
        objects.chain(images.map(|reference| Owned::Image(reference.clone()))).collect()
    }

    /// A request that is open at a proxy counts here from now on.
    pub(super) fn attach(&mut self, export: &OpenExport, now: Time) {
        let OpenExport { key, tenant, daemon, orphan, .. } = export.clone();
        if !orphan && !self.daemons.contains_key(&daemon) {
            return;
        }
        let home = self.sessions.get(&key).and_then(|s| s.home.as_ref());
        let elsewhere = home.is_some_and(|home| home.lease.is_some() && home.daemon != daemon);
        let leased = export.leased && !elsewhere && !orphan;
        let uuid = export.uuid.clone().filter(|_| !orphan);
        let builds = export.builds && !orphan;
        if leased {
            self.bind(&key, &tenant, &daemon, None, now);
            self.group(&key, export.source.clone());
        }
        let unit = if leased { export.unit } else { Unit::None };
        if builds && let Some(d) = self.daemons.get_mut(&daemon) {
            d.builders.start(&key, &tenant);
        }
        if let Some(uuid) = &uuid {
            self.objects.hold(&daemon, Kind::BuildSession, uuid, Some(&tenant), now);
        }
        self.next_open += 1;
        let open = OpenId(self.next_open);
        let mut lease = None;
        let counted = (export.counted || leased) && self.sessions.contains_key(&key);
        if let Some(session) = self.sessions.get_mut(&key).filter(|_| counted) {
            session.open += 1;
            match unit {
                Unit::Build => session.builds += 1,
                Unit::Other => session.others += 1,
                Unit::None => {}
            }
            if let Some(home) = session.home.as_mut().filter(|_| leased) {
                // It has been there, or it would not be open.
                home.proven = true;
                lease = home.lease;
            }
        }
        let known = Open {
            counted,
            key: key.clone(),
            daemon: daemon.clone(),
            unit,
            work: export.work,
            builds,
            lease,
            tenant,
            since: now.saturating_sub(export.age),
            uuid,
            orphan,
        };
        self.opens.insert(open, known);
        if let Some(d) = self.daemons.get_mut(&daemon).filter(|_| !orphan) {
            d.open += 1;
        }
        self.settle(&key, now);
        self.effects.push(Effect::Attached { theirs: export.open, open, daemon, lease });
    }

    fn strangers_begin_anew(&mut self) {
        for d in self.daemons.values_mut() {
            d.strangers = super::strangers::Strangers::default();
        }
    }

    /// Looks at every container, whether it is a stranger.
    fn count_all_strangers(&mut self) {
        let daemons: Vec<DaemonId> = self.daemons.keys().cloned().collect();
        for daemon in daemons {
            let is_container =
                |(kind, id, _): (Kind, &str, &Object)| (kind == Kind::Container).then(|| id.to_string());
            let containers: Vec<String> = self.objects.on(&daemon).filter_map(is_container).collect();
            containers.iter().for_each(|id| self.count_stranger(&daemon, id));
        }
    }

    /// The containers that run, by the sessions that made them.
    fn live(&self) -> BTreeMap<SessionKey, Vec<(DaemonId, String)>> {
        let mut live: BTreeMap<SessionKey, Vec<(DaemonId, String)>> = BTreeMap::new();
        for daemon in self.daemons.keys() {
            let containers =
                self.objects.on(daemon).filter(|(kind, _, o)| *kind == Kind::Container && o.live);
            for (_, id, object) in containers {
                for owner in &object.owners {
                    live.entry(owner.clone()).or_default().push((daemon.clone(), id.to_string()));
                }
            }
        }
        live
    }
}

/// What is an object by itself: the others are known as long as something else is.
fn is_object(kind: Kind) -> bool {
    !matches!(kind, Kind::BuildSession | Kind::Project)
}

#[cfg(test)]
mod tests;
