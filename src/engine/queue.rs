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
use super::placement::Placement;
use super::{Engine, Timer};

/// How many bound tickets of a tenant are served in a row while an unbound one waits.
const STREAK: u32 = 2;

/// A session that waits for a slot.
#[derive(Debug, Clone)]
struct Ticket {
    acquire: Acquire,
    since: Time,
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
    joins: BTreeMap<RequestId, Acquire>,
    /// Whether anything has happened that may let somebody in.
    pub(super) changed: bool,
}

impl Queue {
    fn push(&mut self, acquire: Acquire, now: Time) {
        let (tenant, key, request) = (acquire.tenant.clone(), acquire.key.clone(), acquire.request);
        self.tickets.insert(request, Ticket { acquire, since: now });
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

    /// The waiting tickets in their order: request, key, tenant, since when.
    pub fn tickets(&self) -> Vec<(RequestId, &SessionKey, &Tenant, Time)> {
        let ticket = |request: RequestId| {
            let t = self.queue.tickets.get(&request)?;
            Some((request, &t.acquire.key, &t.acquire.tenant, t.since))
        };
        self.queue.order().into_iter().filter_map(ticket).collect()
    }

    /// Where a ticket stands: its position from 1, and how many wait. `None` if it does not wait.
    pub fn position(&self, request: RequestId) -> Option<(usize, usize)> {
        let order = self.queue.order();
        let position = order.iter().position(|r| *r == request)?;
        Some((position + 1, order.len()))
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
            Placement::Bind(_) if acquire.class == Class::Join => {
                let uuid = acquire.target.as_ref().map(|t| t.reference.as_str());
                let bound = self.sessions.get(&acquire.key).is_some_and(|s| s.lease().is_some());
                self.queue.waits_with(&acquire.key, uuid, bound)
            }
            Placement::Bind(daemon) => {
                self.needs_slot(acquire, daemon)
                    && (!self.has_room(daemon)
                        || self.tenant_is_full(&acquire.tenant)
                        // Nobody overtakes those who wait; who of them is next is decided in one place.
                        || !self.queue.tickets.is_empty())
            }
            Placement::Refuse(Refusal::NoDaemon(_)) => {
                matches!(acquire.class, Class::Work(_)) && self.expects_room()
            }
            _ => false,
        }
    }

    /// Puts a request into the queue, or refuses it because the queue is full.
    pub(super) fn enqueue(&mut self, acquire: Acquire, now: Time) {
        let request = acquire.request;
        if acquire.class == Class::Join {
            self.queue.joins.insert(request, acquire);
            return;
        }
        let tenant = acquire.tenant.clone();
        let of_tenant = self.queue.len_of(&tenant);
        let refusal = if self.queue_is_full() {
            let limit = self.config.queue_limit;
            Some(format!(
                "the queue is full: {limit} of at most {limit} builds wait already; try again later"
            ))
        } else {
            self.config.tenant_waiting.filter(|limit| of_tenant >= *limit).map(|limit| {
                format!(
                    "the queue is full for {tenant}: {of_tenant} of at most {limit} builds wait already; try \
                     again later"
                )
            })
        };
        if let Some(message) = refusal {
            self.effects.push(Effect::Refused { request, refusal: Refusal::QueueFull(message) });
            return;
        }
        let until = acquire.deadline.unwrap_or(Time::MAX).min(now + self.config.max_wait);
        self.timers.insert((until, Timer::Ticket(request)));
        let (key, tenant) = (acquire.key.clone(), acquire.tenant.clone());
        self.queue.push(acquire, now);
        self.queue.changed = true;
        self.effects.push(Effect::Queued { request, key, tenant });
    }

    /// The client of a waiting request has gone.
    pub(super) fn abandon(&mut self, request: RequestId) {
        self.queue.joins.remove(&request);
        if self.queue.remove(request, false).is_some() {
            self.queue.changed = true;
        }
    }

    pub(super) fn ticket_due(&mut self, request: RequestId, now: Time) {
        let place = self.position(request);
        let Some(ticket) = self.queue.remove(request, false) else { return };
        self.queue.changed = true;
        let waited = now.saturating_sub(ticket.since).as_secs();
        let (position, of) = place.unwrap_or_default();
        let message = format!(
            "no slot came free within {waited} s, the longest wait (position {position} of {of} now); try again \
             later"
        );
        self.effects.push(Effect::Refused { request, refusal: Refusal::QueueFull(message) });
    }

    /// Lets in who can be let in, after anything that may have made room.
    pub(super) fn admit_waiting(&mut self, now: Time) {
        if !std::mem::take(&mut self.queue.changed) {
            return;
        }
        while self.admit_one(now) {}
        let joins: Vec<RequestId> = self.queue.joins.keys().copied().collect();
        for request in joins {
            let Some(acquire) = self.queue.joins.get(&request).cloned() else { continue };
            let placement = self.place(&acquire);
            if !self.must_wait(&acquire, &placement) {
                self.queue.joins.remove(&request);
                self.grant(acquire, placement, now);
            }
        }
    }

    fn admit_one(&mut self, now: Time) -> bool {
        let room = self.daemons.values().any(|d| d.used < d.slots && d.takes_sessions());
        for tenant in self.queue.ring.clone() {
            let mut heads: Vec<(bool, RequestId)> = (self.queue.heads(&tenant).into_iter())
                .filter_map(|r| Some((self.home_of(&self.queue.tickets.get(&r)?.acquire).is_some(), r)))
                .collect();
            let streak = self.queue.lines.get(&tenant).map_or(0, |l| l.streak);
            // Stable: within bound and unbound the sessions' order stays.
            heads.sort_by_key(|(bound, _)| *bound == (streak >= STREAK));
            for (bound, request) in heads {
                if !bound && !room {
                    continue;
                }
                let Some(ticket) = self.queue.tickets.get(&request) else { continue };
                let acquire = ticket.acquire.clone();
                match self.place(&acquire) {
                    Placement::Bind(daemon)
                        if self.needs_slot(&acquire, &daemon)
                            && (!self.has_room(&daemon) || self.tenant_is_full(&tenant)) => {}
                    Placement::Refuse(Refusal::NoDaemon(_)) => {}
                    placement => {
                        let waited = now.saturating_sub(ticket_since(&self.queue, request));
                        if let Some(line) = self.queue.lines.get_mut(&tenant) {
                            line.streak = if bound { line.streak + 1 } else { 0 };
                        }
                        self.queue.remove(request, true);
                        self.effects.push(Effect::Admitted { request, tenant, waited });
                        self.grant(acquire, placement, now);
                        return true;
                    }
                }
            }
        }
        false
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

    fn has_room(&self, daemon: &DaemonId) -> bool {
        self.daemons.get(daemon).is_some_and(|d| d.used < d.slots)
    }

    fn tenant_is_full(&self, tenant: &Tenant) -> bool {
        let Some(limit) = self.config.tenant_slots else { return false };
        let used: u32 = self.sessions.values().filter(|s| s.tenant == *tenant).map(|s| s.slots).sum();
        used >= limit
    }

    /// Whether a daemon is on its way: then work waits for it instead of being refused.
    pub fn expects_room(&self) -> bool {
        self.daemons.values().any(|d| d.state == State::Starting && d.expected)
    }
}

fn ticket_since(queue: &Queue, request: RequestId) -> Time {
    queue.tickets.get(&request).map_or(Time::ZERO, |t| t.since)
}
