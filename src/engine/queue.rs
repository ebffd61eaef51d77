//! The admission queue: who gets the next free slot.
//!
//! Round robin over tenants, then over a tenant's sessions, first come first served within a session. Within a
//! tenant's turn, a session that belongs to a daemon comes before one that any daemon would do for, because it
//! cannot go anywhere else; after [`STREAK`] of those in a row one of the others is served, so that neither
//! starves.
//!
//! Nothing that a session needs in order to finish waits behind itself: only what starts work is queued, and a
//! session that holds a slot is not queued for its first build nor for containers.

use std::collections::{BTreeMap, VecDeque};

use super::model::*;
use super::placement::{Placement, able};
use super::reason::Awaited;
use super::warm::{Preferences, undoubted};
use super::{Engine, Timer};

/// How many bound tickets of a tenant are served in a row while an unbound one waits.
const STREAK: u32 = 2;
/// How many of a tenant's tickets that belong nowhere are looked at for one free slot. One that waits for a daemon
/// that is warm for it lets others pass; beyond this they are not asked, because that is done under the lock.
const WINDOW: usize = 64;

/// A session that waits for a slot.
#[derive(Debug, Clone)]
struct Ticket {
    acquire: Acquire,
    since: Time,
    /// The end of the longest wait.
    until: Time,
    /// When it has waited long enough for a daemon that has built its project.
    cold: Option<Time>,
    awaited: Awaited,
}

/// A ticket as others are told of it.
#[derive(Debug, Clone, Copy)]
pub struct Waiting<'a> {
    /// The request that waits.
    pub request: RequestId,
    /// Whose it is.
    pub key: &'a SessionKey,
    /// Who waits.
    pub tenant: &'a Tenant,
    /// Since when.
    pub since: Time,
    /// For what, when it came.
    pub awaited: &'a Awaited,
}

/// A `/session` that waits for its build.
#[derive(Debug, Clone)]
struct Join {
    acquire: Acquire,
    until: Time,
}

/// The waiting sessions of one tenant.
#[derive(Debug, Default)]
struct Line {
    /// Sessions, the next to be served in front.
    ring: VecDeque<SessionKey>,
    tickets: BTreeMap<SessionKey, VecDeque<RequestId>>,
    /// Bound tickets served in a row.
    streak: u32,
}

/// All that waits.
#[derive(Debug, Default)]
pub(super) struct Queue {
    tickets: BTreeMap<RequestId, Ticket>,
    lines: BTreeMap<Tenant, Line>,
    /// Tenants, the next to be served in front.
    ring: VecDeque<Tenant>,
    /// `/session` of builds that wait: they wait with them.
    joins: BTreeMap<RequestId, Join>,
    /// Which daemons the builds of known projects wait for.
    pub(super) preferences: Preferences,
    /// Whether anything has happened that may let somebody in.
    pub(super) changed: bool,
}

impl Queue {
    /// What waits for a slot.
    pub(super) fn acquires(&self) -> impl Iterator<Item = &Acquire> {
        self.tickets.values().map(|ticket| &ticket.acquire)
    }

    fn push(&mut self, ticket: Ticket) {
        let Acquire { tenant, key, request, .. } = &ticket.acquire;
        let (tenant, key, request) = (tenant.clone(), key.clone(), *request);
        self.tickets.insert(request, ticket);
        if !self.ring.contains(&tenant) {
            self.ring.push_back(tenant.clone());
        }
        let line = self.lines.entry(tenant).or_default();
        if !line.ring.contains(&key) {
            line.ring.push_back(key.clone());
        }
        line.tickets.entry(key).or_default().push_back(request);
    }

    /// Takes a ticket out. If it was `served`, its session and its tenant go to the end of their rings.
    fn remove(&mut self, request: RequestId, served: bool) -> Option<Ticket> {
        let ticket = self.tickets.remove(&request)?;
        self.preferences.unset(request);
        let (tenant, key) = (&ticket.acquire.tenant, &ticket.acquire.key);
        let line = self.lines.get_mut(tenant)?;
        if let Some(tickets) = line.tickets.get_mut(key) {
            tickets.retain(|r| *r != request);
            let empty = tickets.is_empty();
            if empty {
                line.tickets.remove(key);
            }
            if served || empty {
                line.ring.retain(|k| k != key);
            }
            if served && !empty {
                line.ring.push_back(key.clone());
            }
        }
        let empty = line.tickets.is_empty();
        if empty {
            self.lines.remove(tenant);
        }
        if served || empty {
            self.ring.retain(|t| t != tenant);
        }
        if served && !empty {
            self.ring.push_back(tenant.clone());
        }
        Some(ticket)
    }

    /// The first ticket of each of a tenant's sessions, in their order.
    fn heads(&self, tenant: &Tenant) -> Vec<RequestId> {
        let Some(line) = self.lines.get(tenant) else { return Vec::new() };
        line.ring.iter().filter_map(|key| line.tickets.get(key)?.front().copied()).collect()
    }

    /// All tickets in the order in which they would be served if slots came free one by one anywhere.
    fn order(&self) -> Vec<RequestId> {
        let mut tenants: Vec<VecDeque<RequestId>> =
            self.ring.iter().filter_map(|t| self.lines.get(t)).map(Line::order).collect();
        let mut order = Vec::with_capacity(self.tickets.len());
        while tenants.iter().any(|t| !t.is_empty()) {
            order.extend(tenants.iter_mut().filter_map(VecDeque::pop_front));
        }
        order
    }

    /// Whether a waiting build of `key` is what a `/session` with this uuid belongs to.
    fn waits_with(&self, key: &SessionKey, uuid: Option<&str>, bound: bool) -> bool {
        self.tickets.values().any(|t| {
            let own = t.acquire.key == *key;
            let same = uuid.is_some()
                && t.acquire.target.as_ref().filter(|t| t.kind == Kind::BuildSession).map(|t| &*t.reference)
                    == uuid;
            same || (own && !bound)
        })
    }

    /// Whether a ticket of this session waits.
    pub(super) fn has_of(&self, key: &SessionKey) -> bool {
        self.lines.values().any(|line| line.tickets.contains_key(key))
    }

    /// Whose ticket it is.
    pub(super) fn key_of(&self, request: RequestId) -> Option<&SessionKey> {
        self.tickets.get(&request).map(|t| &t.acquire.key)
    }

    fn len_of(&self, tenant: &Tenant) -> usize {
        self.lines.get(tenant).map_or(0, |l| l.tickets.values().map(VecDeque::len).sum())
    }
}

impl Line {
    fn order(&self) -> VecDeque<RequestId> {
        let mut sessions: Vec<VecDeque<RequestId>> =
            self.ring.iter().filter_map(|key| self.tickets.get(key).cloned()).collect();
        let mut order = VecDeque::new();
        while sessions.iter().any(|s| !s.is_empty()) {
            order.extend(sessions.iter_mut().filter_map(VecDeque::pop_front));
        }
        order
    }
}

impl Engine {
    /// How many tickets wait, by tenant.
    pub fn waiting(&self) -> BTreeMap<Tenant, usize> {
        self.queue.lines.keys().map(|t| (t.clone(), self.queue.len_of(t))).collect()
    }

    /// The waiting tickets in their order.
    pub fn tickets(&self) -> Vec<Waiting<'_>> {
        let ticket = |request: RequestId| {
            let Ticket { acquire, since, awaited, .. } = self.queue.tickets.get(&request)?;
            Some(Waiting { request, key: &acquire.key, tenant: &acquire.tenant, since: *since, awaited })
        };
        self.queue.order().into_iter().filter_map(ticket).collect()
    }

    /// Who waits, in no order: the tenant of each ticket, and since when it waits.
    pub fn waiters(&self) -> impl Iterator<Item = (&Tenant, Time)> {
        self.queue.tickets.values().map(|ticket| (&ticket.acquire.tenant, ticket.since))
    }

    /// Where a ticket stands: its position from 1, and how many wait. `None` if it does not wait.
    pub fn position(&self, request: RequestId) -> Option<(usize, usize)> {
        if !self.waits(request) {
            return None;
        }
        let order = self.queue.order();
        let position = order.iter().position(|r| *r == request)?;
        Some((position + 1, order.len()))
    }

    /// Whether a ticket waits.
    pub fn waits(&self, request: RequestId) -> bool {
        self.queue.tickets.contains_key(&request)
    }

    /// Whether nobody can join the queue.
    pub fn queue_is_full(&self) -> bool {
        self.config.queue_limit > 0 && self.queue.tickets.len() >= self.config.queue_limit
    }

    /// Whether a request has to wait, or to be refused, before it may go where it was placed.
    pub(super) fn must_wait(&self, acquire: &Acquire, placement: &Placement) -> bool {
        if self.config.queue_limit == 0 {
            return false; // Without a queue a full pool shares its least loaded daemon.
        }
        match placement {
            Placement::Bind(..) if acquire.class == Class::Join => {
                let bound = self.sessions.get(&acquire.key).is_some_and(|s| s.lease().is_some());
                // `/session` may come before its `/build` (CLI 20.10 sends both at once): bound to a full daemon
                // by it, the build could wait nowhere else.
                self.waits_with_build(acquire) || (!bound && !self.any_room() && !self.is_somewhere(acquire))
            }
            Placement::Bind(daemon, _) => {
                self.needs_slot(acquire, daemon)
                    && (!self.has_room(daemon)
                        || self.tenant_is_full(&acquire.tenant)
                        || self.goes_behind(acquire))
            }
            Placement::Refuse(Refusal::NoDaemon(_)) => {
                matches!(acquire.class, Class::Work(_) | Class::Join) && self.expects_room()
            }
            _ => false,
        }
    }

    /// Puts a request into the queue, or refuses it because the queue is full.
    pub(super) fn enqueue(&mut self, acquire: Acquire, placement: &Placement, now: Time) {
        let request = acquire.request;
        let until = acquire.deadline.unwrap_or(Time::MAX).min(now + self.config.max_wait);
        if acquire.class == Class::Join {
            let too_many = self.queue.joins.len() >= self.config.queue_limit;
            if too_many || (self.queue_is_full() && !self.waits_with_build(&acquire)) {
                // Its build is refused, or has been: a client that is left with this alone never ends.
                let refusal = Refusal::QueueFull(self.full_message());
                self.effects.push(Effect::Refused { request, refusal });
                return;
            }
            self.timers.insert((until, Timer::Ticket(request)));
            self.queue.joins.insert(request, Join { acquire, until });
            return;
        }
        if let Some(refusal) = self.full_for(&acquire.tenant) {
            self.effects.push(Effect::Refused { request, refusal: refusal.clone() });
            self.refuse_joins(&acquire, &refusal);
            return;
        }
        self.timers.insert((until, Timer::Ticket(request)));
        let (key, tenant) = (acquire.key.clone(), acquire.tenant.clone());
        let mut cold = None;
        if let Some(project) = &acquire.requirements.project {
            if let Placement::Bind(daemon, _) = placement {
                self.queue.preferences.set(request, project, daemon);
            }
            let at = now + self.config.warm_wait;
            self.timers.insert((at, Timer::Warm(request)));
            cold = Some(at);
        }
        let awaited = self.awaited(&acquire, placement);
        self.queue.push(Ticket { acquire, since: now, until, cold, awaited: awaited.clone() });
        self.queue.changed = true;
        self.effects.push(Effect::Queued { request, key, tenant, awaited });
    }

    /// Takes a ticket out of the queue, and its timers along.
    fn take_ticket(&mut self, request: RequestId, served: bool) -> Option<Ticket> {
        let ticket = self.queue.remove(request, served)?;
        self.timers.remove(&(ticket.until, Timer::Ticket(request)));
        if let Some(at) = ticket.cold {
            self.timers.remove(&(at, Timer::Warm(request)));
        }
        self.queue.changed |= !served;
        Some(ticket)
    }

    /// The same for a `/session`.
    fn take_join(&mut self, request: RequestId) {
        if let Some(join) = self.queue.joins.remove(&request) {
            self.timers.remove(&(join.until, Timer::Ticket(request)));
        }
    }

    /// Every timer of the queue is somebody's who waits.
    ///
    /// # Panics
    /// When one is not.
    pub(super) fn check_queue(&self) {
        for (at, timer) in &self.timers {
            let (Timer::Ticket(request) | Timer::Warm(request)) = timer else { continue };
            let ticket = self.queue.tickets.get(request);
            let join = self.queue.joins.get(request).map(|join| join.until);
            let due = match timer {
                Timer::Warm(_) => ticket.and_then(|t| t.cold),
                _ => ticket.map(|t| t.until).or(join),
            };
            assert_eq!(due, Some(*at), "a timer of {request:?}");
        }
    }

    /// The client of a waiting request has gone.
    pub(super) fn abandon(&mut self, request: RequestId) {
        self.take_join(request);
        if let Some(ticket) = self.take_ticket(request, false) {
            let message = "the build that this session belongs to has left the queue".to_string();
            self.refuse_joins(&ticket.acquire, &Refusal::QueueFull(message));
        }
    }

    /// Refuses the `/session` of a build that waits no longer and got no slot. Its client ends only when that is
    /// answered (CLI 20.10, measured: it ignores Ctrl-C until then).
    fn refuse_joins(&mut self, build: &Acquire, refusal: &Refusal) {
        let uuid = |a: &Acquire| a.target.as_ref().filter(|t| t.kind == Kind::BuildSession).cloned();
        let of_build = |join: &Acquire| {
            join.key == build.key || uuid(join).is_some_and(|join| uuid(build) == Some(join))
        };
        let orphans: Vec<RequestId> = (self.queue.joins.iter())
            .filter(|(_, join)| of_build(&join.acquire) && !self.waits_with_build(&join.acquire))
            .map(|(request, _)| *request)
            .collect();
        for request in orphans {
            self.take_join(request);
            self.effects.push(Effect::Refused { request, refusal: refusal.clone() });
        }
    }

    /// Whether a request for which there is room has to queue all the same. Nobody overtakes those who wait; who
    /// of them is next is decided in one place. But of them nobody could be let in, or he would have been: so if
    /// the queue takes no more, the request need not be refused.
    fn goes_behind(&self, acquire: &Acquire) -> bool {
        let waits = self.queue.has_of(&acquire.key);
        waits || (!self.queue.tickets.is_empty() && self.full_for(&acquire.tenant).is_none())
    }

    /// Why the queue takes no more work of a tenant.
    fn full_for(&self, tenant: &Tenant) -> Option<Refusal> {
        if self.queue_is_full() {
            return Some(Refusal::QueueFull(self.full_message()));
        }
        let waiting = self.queue.len_of(tenant);
        self.config.tenant_waiting.filter(|limit| waiting >= *limit).map(|limit| {
            Refusal::TenantFull(format!(
                "the queue is full for {tenant}: {waiting} of at most {limit} builds wait already; try again \
                 later"
            ))
        })
    }

    /// Whether something of the BuildKit session that a build or its `/session` names is open on a daemon: it goes
    /// there.
    fn is_somewhere(&self, acquire: &Acquire) -> bool {
        let uuid = acquire.target.as_ref().filter(|t| t.kind == Kind::BuildSession);
        uuid.is_some_and(|u| !self.objects.resolve(u.kind, &u.reference, &acquire.tenant).is_empty())
    }

    fn waits_with_build(&self, join: &Acquire) -> bool {
        let uuid = join.target.as_ref().map(|t| t.reference.as_str());
        let bound = self.sessions.get(&join.key).is_some_and(|s| s.lease().is_some());
        self.queue.waits_with(&join.key, uuid, bound)
    }

    fn full_message(&self) -> String {
        let limit = self.config.queue_limit;
        format!("the queue is full: {limit} of at most {limit} builds wait already; try again later")
    }

    pub(super) fn ticket_due(&mut self, request: RequestId, now: Time) {
        if let Some(join) = self.queue.joins.get(&request) {
            if self.waits_with_build(&join.acquire) {
                return; // What becomes of its build becomes of it.
            }
            self.take_join(request);
            let message = "no build that belongs to this session got a slot".to_string();
            self.effects.push(Effect::Refused { request, refusal: Refusal::LongestWait(message) });
            return;
        }
        let place = self.position(request);
        let Some(ticket) = self.take_ticket(request, false) else { return };
        let waited = now.saturating_sub(ticket.since).as_secs();
        let (position, of) = place.unwrap_or_default();
        let message = format!(
            "no slot came free within {waited} s, the longest wait (position {position} of {of} now); try again \
             later"
        );
        let refusal = Refusal::LongestWait(message);
        self.effects.push(Effect::Refused { request, refusal: refusal.clone() });
        self.refuse_joins(&ticket.acquire, &refusal);
    }

    /// The tickets that wait for this daemon and would go nowhere else.
    pub(super) fn waits_for(&self, daemon: &DaemonId) -> Vec<RequestId> {
        let at_home = |t: &Ticket| self.home_of(&t.acquire).as_ref() == Some(daemon);
        self.queue.tickets.iter().filter(|(_, t)| at_home(t)).map(|(request, _)| *request).collect()
    }

    /// Refuses one that waits, and what waits with it.
    pub(super) fn refuse_ticket(&mut self, request: RequestId, refusal: &Refusal) {
        let Some(ticket) = self.take_ticket(request, false) else { return };
        self.effects.push(Effect::Refused { request, refusal: refusal.clone() });
        self.refuse_joins(&ticket.acquire, refusal);
    }

    /// The patience with a daemon that starts is over. If no other is there or on its way, those who wait hear
    /// why, as newcomers do. A pool that was there and is ejected may recover: that is waited for.
    pub(super) fn refuse_if_nobody_comes(&mut self) {
        let was_there = self.daemons.values().any(|d| d.state == State::Ready);
        if was_there || self.expects_room() {
            return;
        }
        let refusal = self.why_nobody(None);
        let joins: Vec<RequestId> = self.queue.joins.keys().copied().collect();
        for request in self.queue.order() {
            self.take_ticket(request, false);
            self.effects.push(Effect::Refused { request, refusal: refusal.clone() });
        }
        for request in joins {
            self.take_join(request);
            self.effects.push(Effect::Refused { request, refusal: refusal.clone() });
        }
    }

    /// Lets in who can be let in, after anything that may have made room.
    pub(super) fn admit_waiting(&mut self, now: Time) {
        if !std::mem::take(&mut self.queue.changed) {
            return;
        }
        while self.admit_one(now) {}
        let joins: Vec<RequestId> = self.queue.joins.keys().copied().collect();
        for request in joins {
            let Some(Join { acquire, .. }) = self.queue.joins.get(&request).cloned() else { continue };
            let placement = self.place(&acquire);
            if !self.must_wait(&acquire, &placement) {
                self.take_join(request);
                self.grant(acquire, placement, None, now);
            }
        }
    }

    /// There is no queue any more: who waits goes where a newcomer would. Behind it those would share the daemons that
    /// it waits for, and leave it there to the end of its longest wait.
    pub(super) fn dissolve_queue(&mut self, now: Time) {
        for request in self.queue.order() {
            let Some(ticket) = self.queue.tickets.get(&request) else { continue };
            let acquire = ticket.acquire.clone();
            let bound = self.home_of(&acquire).is_some();
            let placement = self.place(&acquire);
            self.serve(request, bound, placement, now);
        }
    }

    fn admit_one(&mut self, now: Time) -> bool {
        let room = self.any_room();
        // What exists on one daemon only goes there also while it takes no new sessions.
        let any_slot = self.daemons.values().any(|d| d.used < d.slots);
        for tenant in self.queue.ring.clone() {
            let mut unbound = 0;
            for (bound, request) in self.turn(&tenant) {
                unbound += usize::from(!bound);
                let Some(ticket) = self.queue.tickets.get(&request) else { continue };
                let somewhere = room || (any_slot && ticket.acquire.is_led());
                if !bound && (!somewhere || unbound > WINDOW) {
                    continue;
                }
                let acquire = ticket.acquire.clone();
                let placement = self.place(&acquire);
                match &placement {
                    Placement::Bind(daemon, _)
                        if self.needs_slot(&acquire, daemon)
                            && (!self.has_room(daemon) || self.tenant_is_full(&tenant)) =>
                    {
                        if let Some(project) = acquire.requirements.project.as_ref().filter(|_| !bound) {
                            self.queue.preferences.set(request, project, daemon);
                        }
                    }
                    Placement::Refuse(Refusal::NoDaemon(_)) => {}
                    _ => {
                        self.serve(request, bound, placement, now);
                        return true;
                    }
                }
            }
        }
        room && self.admit_cold(now)
    }

    /// A tenant's tickets in the order of its turn, and which of them belong to a daemon.
    fn turn(&self, tenant: &Tenant) -> Vec<(bool, RequestId)> {
        let mut heads: Vec<(bool, RequestId)> = (self.queue.heads(tenant).into_iter())
            .filter_map(|r| Some((self.home_of(&self.queue.tickets.get(&r)?.acquire).is_some(), r)))
            .collect();
        let streak = self.queue.lines.get(tenant).map_or(0, |l| l.streak);
        // Stable: within bound and unbound the sessions' order stays.
        heads.sort_by_key(|(bound, _)| *bound == (streak >= STREAK));
        heads
    }

    /// Nobody wants the slots that are free: a build that has waited long enough for its warm daemon gets one.
    fn admit_cold(&mut self, now: Time) -> bool {
        for tenant in self.queue.ring.clone() {
            if self.tenant_is_full(&tenant) {
                continue;
            }
            let turn = self.turn(&tenant).into_iter().filter(|(bound, _)| !bound);
            let cold: Vec<RequestId> = turn.map(|(_, r)| r).filter(|r| self.may_be_cold(*r, now)).collect();
            for request in cold.into_iter().take(WINDOW) {
                let Some(ticket) = self.queue.tickets.get(&request) else { continue };
                let Some(project) = &ticket.acquire.requirements.project else { continue };
                let mut free = undoubted(able(&self.daemons, &ticket.acquire));
                free.retain(|d| d.has_room());
                if let Some((daemon, because)) = self.done_first(&ticket.acquire, project, &free) {
                    self.serve(request, false, Placement::Bind(daemon, because), now);
                    return true;
                }
            }
        }
        false
    }

    /// Whether a ticket that belongs to no session's daemon has waited long enough for a warm one, and could do with
    /// any other: `/session` of its build, or something that it needs, may have led it to one.
    fn may_be_cold(&self, request: RequestId, now: Time) -> bool {
        let Some(Ticket { acquire, cold, .. }) = self.queue.tickets.get(&request) else { return false };
        cold.is_some_and(|at| at <= now)
            && !(acquire.is_led() && (self.is_somewhere(acquire) || self.is_limited(acquire)))
    }

    /// A ticket's wait is over.
    fn serve(&mut self, request: RequestId, bound: bool, placement: Placement, now: Time) {
        let Some(Ticket { acquire, since, awaited, .. }) = self.take_ticket(request, true) else { return };
        let tenant = acquire.tenant.clone();
        if let Some(line) = self.queue.lines.get_mut(&tenant) {
            line.streak = if bound { line.streak + 1 } else { 0 };
        }
        let waited = now.saturating_sub(since);
        self.effects.push(Effect::Admitted { request, tenant, waited });
        if let Placement::Refuse(refusal) = &placement {
            self.refuse_joins(&acquire, refusal);
        }
        self.grant(acquire, placement, Some((waited, awaited)), now);
    }

    /// Whether this work takes a slot that its session does not hold yet.
    fn needs_slot(&self, acquire: &Acquire, daemon: &DaemonId) -> bool {
        let Class::Work(work) = acquire.class else { return false };
        let Some(session) = self.sessions.get(&acquire.key) else { return true };
        let here = session.home.as_ref().is_some_and(|h| h.lease.is_some() && h.daemon == *daemon);
        if !here || session.slots == 0 {
            return true;
        }
        work == Work::Build && session.builds >= session.slots
    }

    fn any_room(&self) -> bool {
        self.daemons.values().any(|d| d.has_room() && d.takes_sessions())
    }

    pub(super) fn has_room(&self, daemon: &DaemonId) -> bool {
        self.daemons.get(daemon).is_some_and(|d| d.has_room())
    }

    pub(super) fn tenant_is_full(&self, tenant: &Tenant) -> bool {
        self.config.tenant_slots.is_some_and(|limit| self.held.by(tenant) >= limit)
    }

    /// Whether a daemon is on its way: then work waits for it instead of being refused.
    pub fn expects_room(&self) -> bool {
        // An autoscaler knows better how long a daemon takes to start here.
        self.growth.coming
            || !self.scaled && self.daemons.values().any(|d| d.state == State::Starting && d.expected)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    /// An engine of daemons with one slot each, driven as the shell does.
    struct Pool {
        engine: Engine,
        now: Time,
        requests: u64,
        granted: BTreeMap<RequestId, (OpenId, DaemonId)>,
        refused: BTreeMap<RequestId, Refusal>,
    }

    impl Pool {
        fn of(daemons: &[&str], config: Config) -> Self {
            let mut pool = Pool {
                engine: Engine::new(config, 7),
                now: Time::from_secs(1),
                requests: 0,
                granted: BTreeMap::new(),
                refused: BTreeMap::new(),
            };
            pool.observe(daemons);
            for daemon in daemons {
                pool.answers(daemon);
            }
            pool
        }

        fn observe(&mut self, daemons: &[&str]) {
            let observed =
                |id: &&str| Observed { id: (*id).into(), draining: false, pending: None, slots: Some(1) };
            self.tell(Event::Observed(daemons.iter().map(observed).collect()));
        }

        fn answers(&mut self, daemon: &str) {
            let facts = Facts { api_min: (1, 24), api_max: (1, 51), ..Facts::default() };
            self.tell(Event::Probed { daemon: daemon.into(), probe: Probe::Answered(facts) });
        }

        fn tell(&mut self, event: Event) {
            for effect in self.engine.handle(event, self.now) {
                match effect {
                    Effect::Granted { request, open, daemon, .. } => {
                        self.granted.insert(request, (open, daemon));
                    }
                    Effect::Refused { request, refusal } => {
                        self.refused.insert(request, refusal);
                    }
                    _ => {}
                }
            }
        }

        fn ask(&mut self, tenant: &str, key: &str, class: Class, uuid: Option<&str>) -> RequestId {
            self.requests += 1;
            let request = RequestId(self.requests);
            let target = uuid.map(|u| ObjectRef { kind: Kind::BuildSession, reference: u.into() });
            self.tell(Event::Acquire(Acquire {
                request,
                key: key.into(),
                tenant: tenant.into(),
                source: None,
                inside: None,
                shares_names: true,
                class,
                target,
                requirements: Requirements::default(),
                deadline: None,
            }));
            request
        }

        fn build(&mut self, tenant: &str, key: &str) -> RequestId {
            self.ask(tenant, key, Class::Work(Work::Build), None)
        }

        /// The build ends, and the slot comes free after the linger.
        fn end(&mut self, request: RequestId) {
            let (open, _) = self.granted[&request].clone();
            self.tell(Event::Release { open, outcome: Outcome::Done });
            self.pass(Config::default().linger);
        }

        fn pass(&mut self, time: Time) {
            self.now += time;
            self.tell(Event::Tick);
        }

        fn waits(&self, request: RequestId) -> bool {
            !self.granted.contains_key(&request) && !self.refused.contains_key(&request)
        }
    }

    fn config() -> Config {
        Config::default()
    }

    #[test]
    fn a_full_pool_lets_wait_and_a_free_slot_lets_in() {
        let mut pool = Pool::of(&["a", "b"], config());
        let (x, y, z) = (pool.build("t", "x"), pool.build("t", "y"), pool.build("t", "z"));
        assert!(!pool.waits(x) && !pool.waits(y) && pool.waits(z));
        assert_ne!(pool.granted[&x].1, pool.granted[&y].1);
        assert_eq!(pool.engine.position(z), Some((1, 1)));
        pool.end(y);
        assert_eq!(pool.granted[&z].1, pool.granted[&y].1);
        assert_eq!(pool.engine.position(z), None);
    }

    #[test]
    fn without_a_queue_from_now_on_nobody_waits_any_longer() {
        let mut pool = Pool::of(&["a"], config());
        let first = pool.build("t", "x");
        let build = pool.ask("t", "y", Class::Work(Work::BuildKit), Some("uuid"));
        let session = pool.ask("t", "y", Class::Join, Some("uuid"));
        assert!(!pool.waits(first) && pool.waits(build) && pool.waits(session));
        pool.tell(Event::Configured(Box::new(Config { queue_limit: 0, ..config() })));
        assert!(pool.granted.contains_key(&build) && pool.granted.contains_key(&session));
    }

    #[test]
    fn tenants_take_turns_and_so_do_their_sessions() {
        let mut pool = Pool::of(&["a"], config());
        let first = pool.build("red", "r0");
        let waiting = [
            pool.build("red", "r1"),
            pool.build("red", "r2"),
            pool.build("red", "r3"),
            pool.build("blue", "b1"),
            pool.build("blue", "b2"),
        ];
        let places: Vec<_> = waiting.iter().map(|r| pool.engine.position(*r).unwrap().0).collect();
        assert_eq!(places, [1, 3, 5, 2, 4]);
        let mut running = first;
        for place in 1..=5 {
            let next = waiting[places.iter().position(|p| *p == place).unwrap()];
            assert!(pool.waits(next), "{place}");
            pool.end(running);
            assert!(!pool.waits(next), "{place}");
            running = next;
        }
    }

    #[test]
    fn nobody_overtakes_those_who_wait() {
        let mut pool = Pool::of(&["a"], config());
        let first = pool.build("t", "x");
        let second = pool.build("t", "y");
        pool.tell(Event::Release { open: pool.granted[&first].0, outcome: Outcome::Done });
        let third = pool.build("t", "z");
        pool.pass(Config::default().linger);
        assert!(!pool.waits(second) && pool.waits(third));
    }

    #[test]
    fn a_session_with_a_slot_waits_for_a_second_build_only() {
        let mut pool = Pool::of(&["a"], config());
        let _build = pool.build("t", "x");
        let other = pool.build("t", "y");
        let create = pool.ask("t", "x", Class::Work(Work::Container), None);
        let pull = pool.ask("t", "x", Class::Work(Work::Pull), None);
        let read = pool.ask("t", "y", Class::Read, None);
        assert!(pool.waits(other));
        assert!(!pool.waits(create) && !pool.waits(pull) && !pool.waits(read));
        let second = pool.build("t", "x");
        assert!(pool.waits(second));
    }

    #[test]
    fn the_session_of_a_build_that_waits_waits_with_it() {
        let mut pool = Pool::of(&["a"], config());
        let first = pool.build("t", "x");
        let build = pool.ask("t", "y", Class::Work(Work::Build), Some("uuid"));
        let session = pool.ask("t", "y", Class::Join, Some("uuid"));
        assert!(pool.waits(build) && pool.waits(session));
        // That of the build that runs does not.
        let running = pool.ask("t", "x", Class::Join, Some("other"));
        assert!(!pool.waits(running));
        pool.end(first);
        assert!(!pool.waits(build) && !pool.waits(session));
    }

    #[test]
    fn a_session_that_comes_before_its_build_does_not_bind_it_to_a_full_daemon() {
        let mut pool = Pool::of(&["a", "b"], config());
        let (first, _) = (pool.build("t", "x"), pool.build("t", "y"));
        let session = pool.ask("t", "z", Class::Join, Some("uuid"));
        assert!(pool.waits(session));
        let build = pool.ask("t", "z", Class::Work(Work::Build), Some("uuid"));
        pool.end(first);
        assert_eq!(pool.granted[&build].1, pool.granted[&first].1);
        assert_eq!(pool.granted[&session].1, pool.granted[&first].1);
    }

    #[test]
    fn a_ticket_whose_client_leaves_is_gone_and_starts_nothing() {
        let mut pool = Pool::of(&["a"], config());
        let first = pool.build("t", "x");
        let (gone, next) = (pool.build("t", "y"), pool.build("t", "z"));
        pool.tell(Event::Abandon(gone));
        assert_eq!(pool.engine.position(next), Some((1, 1)));
        pool.end(first);
        assert!(pool.waits(gone) && !pool.waits(next));
    }

    #[test]
    fn a_bound_session_comes_before_unbound_ones_and_starves_nobody() {
        let mut pool = Pool::of(&["a"], config());
        let first = pool.build("t", "bound");
        let unbound = pool.build("t", "u");
        let mut running = first;
        // `bound` has a lease on the daemon: its further builds belong there.
        let bound: Vec<_> = (0..4).map(|_| pool.build("t", "bound")).collect();
        let mut order = Vec::new();
        for _ in 0..4 {
            pool.end(running);
            running =
                *bound.iter().chain([&unbound]).find(|r| !order.contains(*r) && !pool.waits(**r)).unwrap();
            order.push(running);
        }
        assert_eq!(order[..3], [bound[0], bound[1], unbound]);
    }

    #[test]
    fn limits_refuse_with_a_word() {
        let config = Config { queue_limit: 2, tenant_waiting: Some(1), ..config() };
        let mut pool = Pool::of(&["a"], config);
        pool.build("red", "r0");
        pool.build("red", "r1");
        let own_limit = pool.build("red", "r2");
        let Refusal::TenantFull(text) = &pool.refused[&own_limit] else { panic!("no refusal") };
        assert!(text.contains("full for red: 1 of at most 1"), "{text}");
        pool.build("blue", "b1");
        let full = pool.build("green", "g1");
        let Refusal::QueueFull(text) = &pool.refused[&full] else { panic!("no refusal") };
        assert!(text.contains("2 of at most 2"), "{text}");
        assert!(pool.engine.queue_is_full());
    }

    #[test]
    fn a_tenant_holds_no_more_slots_than_it_may() {
        let config = Config { tenant_slots: Some(1), ..config() };
        let mut pool = Pool::of(&["a", "b"], config);
        let first = pool.build("red", "r1");
        let second = pool.build("red", "r2");
        let other = pool.build("blue", "b1");
        assert!(pool.waits(second) && !pool.waits(other));
        pool.end(first);
        assert!(!pool.waits(second));
        // What goes with a daemon is held no more.
        let third = pool.build("red", "r3");
        assert!(pool.waits(third));
        let lost = pool.granted[&second].1.clone();
        pool.tell(Event::Replaced { daemon: lost });
        assert!(!pool.waits(third));
    }

    #[test]
    fn who_leaves_the_queue_takes_its_timers_along() {
        let mut pool = Pool::of(&["a"], Config { linger: Time::ZERO, ..config() });
        let first = project(&mut pool, "1", "app");
        let timers = |pool: &Pool| {
            let of_queue = |t: &Timer| matches!(t, Timer::Ticket(_) | Timer::Warm(_));
            pool.engine.timers.iter().filter(|(_, t)| of_queue(t)).count()
        };
        let (served, gone) = (project(&mut pool, "2", "app"), project(&mut pool, "3", "app"));
        let build = pool.ask("t", "4", Class::Work(Work::Build), Some("uuid"));
        let session = pool.ask("t", "4", Class::Join, Some("uuid"));
        assert!([served, gone, build, session].iter().all(|r| pool.waits(*r)));
        assert_eq!(timers(&pool), 6);
        pool.tell(Event::Abandon(gone));
        assert_eq!(timers(&pool), 4);
        pool.end(first);
        assert_eq!(timers(&pool), 2);
        pool.tell(Event::Abandon(build));
        assert!(pool.refused.contains_key(&session) && !pool.waits(served));
        assert_eq!(timers(&pool), 0);
    }

    #[test]
    fn the_longest_wait_ends_in_a_refusal_with_the_position() {
        let mut pool = Pool::of(&["a"], config());
        pool.build("t", "x");
        let late = pool.build("t", "y");
        pool.pass(config().max_wait);
        let Refusal::LongestWait(text) = &pool.refused[&late] else { panic!("no refusal") };
        assert!(text.contains("position 1 of 1"), "{text}");
        assert!(pool.engine.tickets().is_empty());
    }

    #[test]
    fn a_session_is_refused_with_the_build_that_it_waits_for() {
        let mut pool = Pool::of(&["a"], Config { queue_limit: 1, ..config() });
        pool.build("t", "x");
        // The client leaves.
        let build = pool.ask("t", "y", Class::Work(Work::Build), Some("1"));
        let session = pool.ask("t", "y", Class::Join, Some("1"));
        let other = pool.ask("t", "z", Class::Join, Some("2"));
        assert!(matches!(pool.refused[&other], Refusal::QueueFull(_)), "its build would be refused");
        assert!(pool.waits(build) && pool.waits(session));
        pool.tell(Event::Abandon(build));
        assert!(matches!(pool.refused[&session], Refusal::QueueFull(_)));
        // The longest wait is over.
        let session = pool.ask("t", "y", Class::Join, Some("3"));
        assert!(pool.waits(session), "it came before its build");
        let build = pool.ask("t", "y", Class::Work(Work::Build), Some("3"));
        // The queue is full for another's build, whichever of its two requests came first.
        let late = pool.ask("t", "z", Class::Work(Work::Build), Some("4"));
        assert!(matches!(pool.refused[&late], Refusal::QueueFull(_)));
        assert!(pool.waits(build) && pool.waits(session));
        pool.pass(config().max_wait);
        assert_eq!(pool.refused[&session], pool.refused[&build]);
        // Without any build it does not wait for ever.
        let session = pool.ask("t", "y", Class::Join, Some("5"));
        assert!(pool.waits(session));
        pool.pass(config().max_wait);
        assert!(!pool.waits(session));
    }

    #[test]
    fn work_waits_for_a_daemon_that_starts_but_not_for_ever() {
        let mut pool = Pool::of(&[], config());
        pool.observe(&["a"]);
        let early = pool.build("t", "x");
        assert!(pool.waits(early));
        pool.answers("a");
        assert!(!pool.waits(early));
        let mut pool = Pool::of(&[], config());
        pool.observe(&["a"]);
        let (waiting, session) = (pool.build("t", "w"), pool.ask("t", "w", Class::Join, Some("1")));
        assert!(pool.waits(waiting) && pool.waits(session));
        pool.pass(config().patience);
        assert!(matches!(&pool.refused[&waiting], Refusal::NoDaemon(why) if why.contains("a starting")));
        assert_eq!(pool.refused[&session], pool.refused[&waiting]);
        let late = pool.build("t", "x");
        assert!(matches!(pool.refused[&late], Refusal::NoDaemon(_)));
    }

    #[test]
    fn a_new_daemon_lets_in_who_waits_anywhere_but_not_who_belongs_elsewhere() {
        let mut pool = Pool::of(&["a"], config());
        pool.build("t", "bound");
        let (bound, unbound) = (pool.build("t", "bound"), pool.build("t", "u"));
        pool.observe(&["a", "b"]);
        pool.answers("b");
        assert!(pool.waits(bound));
        assert_eq!(pool.granted[&unbound].1, "b".into());
    }

    #[test]
    fn a_build_that_ends_beside_a_container_lets_in_the_next_of_its_session() {
        let mut pool = Pool::of(&["a"], config());
        let (first, second) = (pool.build("t", "x"), pool.build("t", "x"));
        let create = pool.ask("t", "x", Class::Work(Work::Container), None);
        assert!(pool.waits(second) && !pool.waits(create));
        pool.tell(Event::Release { open: pool.granted[&first].0, outcome: Outcome::Done });
        assert!(!pool.waits(second), "the slot is the session's already");
    }

    #[test]
    fn a_full_queue_refuses_nobody_for_whom_a_slot_is_free() {
        let config = Config { queue_limit: 1, tenant_slots: Some(1), ..config() };
        let mut pool = Pool::of(&["a", "b"], config);
        pool.build("red", "x");
        let waiting = pool.build("red", "y");
        let other = pool.build("blue", "z");
        assert!(pool.waits(waiting) && pool.granted.contains_key(&other));
    }

    #[test]
    fn the_session_of_a_build_that_runs_does_not_wait() {
        let mut pool = Pool::of(&["a"], config());
        let build = pool.ask("t", "x", Class::Work(Work::Build), Some("uuid"));
        let session = pool.ask("t", "y", Class::Join, Some("uuid"));
        assert!(!pool.waits(build) && !pool.waits(session));
    }

    #[test]
    fn a_daemon_that_grows_lets_in_who_waits() {
        let mut pool = Pool::of(&[], config());
        let observed = Observed { id: "a".into(), draining: false, pending: None, slots: None };
        pool.tell(Event::Observed(vec![observed]));
        let grow = |pool: &mut Pool, cpus| {
            let facts =
                Facts { api_min: (1, 24), api_max: (1, 51), cpus, memory: 64 << 30, ..Facts::default() };
            pool.tell(Event::Probed { daemon: "a".into(), probe: Probe::Answered(facts) });
        };
        grow(&mut pool, 2);
        let (first, second) = (pool.build("t", "x"), pool.build("t", "y"));
        assert!(!pool.waits(first) && pool.waits(second));
        grow(&mut pool, 4);
        assert!(!pool.waits(second));
    }

    /// A build of a project.
    fn project(pool: &mut Pool, key: &str, project: &str) -> RequestId {
        pool.requests += 1;
        let request = RequestId(pool.requests);
        let requirements = Requirements { project: Some(project.into()), ..Requirements::default() };
        pool.tell(Event::Acquire(Acquire {
            request,
            key: key.into(),
            tenant: "t".into(),
            source: None,
            inside: None,
            shares_names: true,
            class: Class::Work(Work::Build),
            target: None,
            requirements,
            deadline: None,
        }));
        request
    }

    #[test]
    fn a_build_waits_a_while_for_the_daemon_that_has_its_cache_and_then_takes_any_slot() {
        let mut pool = Pool::of(&["a", "b"], Config { linger: Time::ZERO, ..config() });
        let first = project(&mut pool, "1", "app");
        let (_, warm) = pool.granted[&first].clone();
        let second = project(&mut pool, "2", "app");
        assert!(pool.waits(second), "one build is done sooner than a cold one");
        // Who has no project takes the free slot, and one of another project, too.
        let other = project(&mut pool, "3", "other");
        assert_ne!(pool.granted[&other].1, warm);
        pool.end(first);
        assert_eq!(pool.granted[&second].1, warm);
        pool.end(other);
        let third = project(&mut pool, "4", "app");
        assert!(pool.waits(third));
        pool.pass(config().warm_wait);
        assert_ne!(pool.granted[&third].1, warm, "its patience is over");
    }

    #[test]
    fn no_cache_no_memory_and_no_patience_leads_a_build_to_a_daemon_that_cannot_write() {
        let mut pool = Pool::of(&["a", "b", "c"], Config { linger: Time::ZERO, ..config() });
        let builds: Vec<RequestId> =
            (0..3).map(|i| project(&mut pool, &i.to_string(), &format!("{i}"))).collect();
        let on = |pool: &Pool, daemon: &str| {
            let there = |b: &&RequestId| pool.granted[b].1 == daemon.into();
            builds.iter().position(|b| there(&b)).expect("one on each")
        };
        // One is ejected for it, and the other not, because too few would be left.
        for daemon in ["a", "b"] {
            let result = DeepProbe::Failed("no space left on device".into());
            pool.tell(Event::Wrote { daemon: daemon.into(), result });
        }
        pool.end(builds[on(&pool, "b")]);
        let plain = pool.build("t", "plain");
        pool.pass(config().grace);
        let former = pool.build("t", &on(&pool, "b").to_string());
        let (cached, cold) = (on(&pool, "b").to_string(), on(&pool, "c").to_string());
        let (cached, cold) = (project(&mut pool, "3", &cached), project(&mut pool, "4", &cold));
        pool.pass(config().warm_wait);
        let all = [plain, former, cached, cold];
        assert!(all.iter().all(|b| pool.waits(*b)), "one slot is free, on b");
        pool.tell(Event::Wrote { daemon: "b".into(), result: DeepProbe::Wrote });
        assert_eq!(pool.granted[&plain].1, "b".into());
    }

    #[test]
    fn where_all_daemons_err_who_waits_for_a_better_one_takes_the_free_slot() {
        let mut pool = Pool::of(&["a", "b"], Config { linger: Time::ZERO, ..config() });
        pool.pass(Time::from_secs(60));
        let (first, second) = (pool.build("t", "1"), pool.build("t", "2"));
        let third = pool.build("u", "3");
        pool.pass(config().linger);
        pool.tell(Event::Release { open: pool.granted[&first].0, outcome: Outcome::Erred });
        assert!(pool.waits(third), "its slot is free, but it errs");
        let pull = pool.ask("t", "2", Class::Work(Work::Pull), None);
        pool.tell(Event::Release { open: pool.granted[&pull].0, outcome: Outcome::Erred });
        assert_eq!(pool.granted[&third].1, pool.granted[&first].1);
        assert!(!pool.waits(second));
    }

    #[test]
    fn builds_of_a_project_stay_together_and_a_long_queue_spreads_them() {
        let mut pool = Pool::of(&["a", "b"], Config { linger: Time::ZERO, ..config() });
        let builds: Vec<RequestId> = (0..4).map(|i| project(&mut pool, &i.to_string(), "app")).collect();
        let running = builds.iter().filter(|b| pool.granted.contains_key(b)).count();
        assert_eq!(running, 2, "the third would wait for two builds: it starts cold elsewhere");
        assert_ne!(
            pool.granted[&builds[0]].1,
            builds.iter().skip(1).find_map(|b| pool.granted.get(b)).unwrap().1
        );
    }

    #[test]
    fn builds_of_one_project_do_not_make_one_daemon_of_a_pool() {
        let mut pool = Pool::of(&["a", "b", "c"], config());
        let slots =
            |id: &&str| Observed { id: (*id).into(), draining: false, pending: None, slots: Some(64) };
        pool.tell(Event::Observed(["a", "b", "c"].iter().map(slots).collect()));
        for i in 0..60 {
            let build = project(&mut pool, &i.to_string(), "app");
            assert!(!pool.waits(build));
        }
        let used: Vec<u32> = pool.engine.daemons().map(|d| d.used).collect();
        assert!(used.iter().all(|n| (15..=25).contains(n)), "{used:?}");
    }

    #[test]
    fn a_build_whose_session_is_open_on_a_daemon_waits_for_that_one() {
        let mut pool = Pool::of(&["a", "b"], Config { linger: Time::ZERO, ..config() });
        let elsewhere = project(&mut pool, "1", "app");
        let session = pool.ask("t", "s", Class::Join, Some("uuid"));
        let other = pool.build("t", "2");
        assert_eq!(pool.granted[&session].1, pool.granted[&other].1);
        pool.requests += 1;
        let build = RequestId(pool.requests);
        pool.tell(Event::Acquire(Acquire {
            request: build,
            key: "3".into(),
            tenant: "t".into(),
            source: None,
            inside: None,
            shares_names: true,
            class: Class::Work(Work::Build),
            target: Some(ObjectRef { kind: Kind::BuildSession, reference: "uuid".into() }),
            requirements: Requirements { project: Some("app".into()), ..Requirements::default() },
            deadline: None,
        }));
        pool.end(elsewhere);
        pool.pass(config().warm_wait);
        assert!(pool.waits(build), "on the free daemon it would not find its session");
        pool.end(other);
        assert_eq!(pool.granted[&build].1, pool.granted[&session].1);
    }

    #[test]
    fn those_who_belong_elsewhere_hide_nobody_who_would_take_any_slot() {
        let mut pool = Pool::of(&["a"], Config { linger: Time::ZERO, ..config() });
        let bound: Vec<String> = (0..=WINDOW).map(|i| format!("bound{i}")).collect();
        for key in &bound {
            let session = pool.ask("t", key, Class::Join, None);
            assert!(!pool.waits(session));
        }
        let first = project(&mut pool, "1", "app");
        let builds: Vec<RequestId> = bound.iter().map(|key| pool.build("t", key)).collect();
        pool.observe(&["a", "b"]);
        pool.answers("b");
        let cold = project(&mut pool, "2", "app");
        assert!(pool.waits(cold) && builds.iter().all(|b| pool.waits(*b)));
        pool.pass(config().warm_wait);
        assert_eq!(pool.granted[&first].1, "a".into());
        assert_eq!(pool.granted[&cold].1, "b".into(), "nobody else can have that slot");
    }

    #[test]
    fn a_daemon_that_goes_takes_its_warmth_along() {
        let mut pool = Pool::of(&["a", "b"], Config { linger: Time::ZERO, ..config() });
        let first = project(&mut pool, "1", "app");
        let (_, warm) = pool.granted[&first].clone();
        pool.end(first);
        pool.tell(Event::Replaced { daemon: warm.clone() });
        assert!(!pool.engine.warm.is_warm(&"app".into(), &warm));
    }
}
