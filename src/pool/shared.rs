//! One proxy of several ([`crate::engine::election`]): only one of them admits, all of them relay. What a proxy relays
//! has a number of its own, under which whoever admits knows it; so it goes on counting whoever that is.
//!
//! ```text
//! follower ──take_over (import)──▶ admits ──suspend──▶ suspended ──retire (export)──▶ follower
//! ```
//!
//! Suspended is who may not rely on its Lease any more, and knows no other that has it: what starts nothing is still
//! answered from what is known, all else waits.
//!
//! Who waits for a slot when the one that admits changes, asks the next one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::journal::{Entry, Happened};
use super::peers::Up;
use super::status::{LeaseStatus, Role};
use super::ticket::Answer;
use super::{Pool, State, Want};
use crate::engine::Unit;
use crate::engine::handover::{Export, OpenExport};
use crate::engine::model::*;

/// What is kept for the next one that admits while there is none. Beyond it the oldest is forgotten: events of the
/// daemons tell most of it, too.
const OUTBOX: usize = 10_000;
/// How long what is no work waits for somebody who admits.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a grant is given back by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// The engine's number of it: there is one proxy.
    Open(OpenId),
    /// This process's number of it.
    Stream(u64),
}

/// What a request that is open has to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Said {
    /// Something about an object.
    Learned(DaemonId, Fact),
    /// It builds.
    Builds,
    /// It has ended.
    Released(Outcome),
}

impl Said {
    fn event(self, open: OpenId) -> Event {
        match self {
            Said::Learned(daemon, fact) => Event::Learned { daemon, open: Some(open), fact },
            Said::Builds => Event::BuildSeen(open),
            Said::Released(outcome) => Event::Release { open, outcome },
        }
    }
}

/// A request that this process relays.
#[derive(Debug)]
struct Own {
    /// The engine's number of it, while this process admits.
    open: Option<OpenId>,
    about: OpenExport,
    since: Instant,
}

/// A request that waits for whoever admits.
#[derive(Debug)]
pub(super) struct Asking {
    pub want: Arc<Want>,
    pub answer: oneshot::Sender<Answer>,
    /// Its place in the queue there.
    pub place: Option<(usize, usize)>,
    since: Instant,
}

/// What a proxy of several knows beside the engine.
#[derive(Debug)]
pub(super) struct Shared {
    /// Its name, which no other process has or had.
    pub me: Arc<str>,
    /// Until when it admits, and the number of its tenure.
    tenure: Option<(Time, u64)>,
    /// It does not any more, and still knows what it knew.
    suspended: bool,
    /// What it relays.
    own: BTreeMap<u64, Own>,
    next: u64,
    /// What others relay.
    peers: BTreeMap<(Arc<str>, u64), OpenId>,
    /// Of those others, who is not connected, and since when.
    absent: BTreeMap<Arc<str>, Instant>,
    pub asking: BTreeMap<u64, Asking>,
    pub outbox: VecDeque<Up>,
    /// What it knew when it admitted last.
    handover: Option<Handover>,
    /// It admits no more, and is about to end.
    leaving: bool,
    /// Since when nobody who admits is connected.
    alone: Instant,
    /// From when on it lets in.
    opens: Instant,
    /// Who holds the Lease, and the number of that tenure, as it was seen last.
    seen: (Option<String>, u64),
}

/// What goes from one that admitted to its successor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Handover {
    /// Who admitted.
    pub proxy: String,
    /// What its engine knew.
    pub export: Export,
    /// Who relays the requests that are open: the engine's number, the proxy, and its number there.
    pub streams: Vec<(OpenId, String, u64)>,
}

/// How much came of an import.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Imported {
    /// Sessions.
    pub sessions: usize,
    /// Containers, networks, volumes and execs.
    pub objects: usize,
    /// Image references.
    pub images: usize,
    /// Requests that are open, here and at others.
    pub streams: usize,
}

impl Shared {
    pub fn new(me: &str) -> Self {
        Shared {
            me: me.into(),
            tenure: None,
            suspended: false,
            own: BTreeMap::new(),
            next: 0,
            peers: BTreeMap::new(),
            absent: BTreeMap::new(),
            asking: BTreeMap::new(),
            outbox: VecDeque::new(),
            handover: None,
            leaving: false,
            alone: Instant::now(),
            opens: Instant::now(),
            seen: (None, 0),
        }
    }

    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Whether it admits.
    pub fn admits(&self) -> bool {
        self.tenure.is_some()
    }

    /// Whether a request of this class is answered here.
    pub fn answers(&self, class: Class) -> bool {
        self.admits() || (self.suspended && !matches!(class, Class::Work(_) | Class::Join))
    }

    /// A request is granted, and relayed by this process.
    pub fn grant(&mut self, number: u64, open: Option<OpenId>, about: OpenExport) -> Hold {
        self.own.insert(number, Own { open, about, since: Instant::now() });
        Hold::Stream(number)
    }

    /// Nobody relays it after all.
    pub fn forget(&mut self, number: u64) {
        self.own.remove(&number);
    }

    /// What this process relays, for one that does not know it.
    pub fn relayed(&self) -> Vec<(u64, OpenExport)> {
        self.own.iter().map(|(number, own)| (*number, own.export(*number))).collect()
    }

    /// Keeps something for whoever admits.
    pub fn post(&mut self, message: Up) {
        self.outbox.push_back(message);
        if self.outbox.len() > OUTBOX {
            self.outbox.pop_front();
        }
    }
}

impl Own {
    fn export(&self, number: u64) -> OpenExport {
        OpenExport { open: OpenId(number), age: self.since.elapsed(), ..self.about.clone() }
    }
}

impl Pool {
    /// From now on this is one proxy of several, of this name, and does not admit until it takes over.
    pub fn share(&self, me: &str) {
        self.lock().shared = Some(Box::new(Shared::new(me)));
        self.several.store(true, Ordering::Release);
    }

    /// Whether this is one proxy of several.
    pub fn is_shared(&self) -> bool {
        self.several.load(Ordering::Acquire)
    }

    /// Whether this proxy admits.
    pub fn admits(&self) -> bool {
        if !self.is_shared() {
            return true;
        }
        let mut state = self.lock();
        self.expire(&mut state);
        state.shared.as_ref().is_none_or(|shared| shared.admits())
    }

    /// Waits until this proxy lets in, if it does not admit for long enough yet.
    pub(super) async fn opened(&self) {
        let opens = self.lock().shared.as_ref().map(|shared| shared.opens);
        if let Some(opens) = opens {
            tokio::time::sleep_until(opens.into()).await;
        }
    }

    /// The Lease was seen.
    pub fn lease_seen(&self, holder: Option<String>, tenure: u64) {
        if let Some(shared) = &mut self.lock().shared {
            shared.seen = (holder, tenure);
        }
    }

    /// Which proxy admits, where there are several.
    pub(super) fn lease_status(&self, state: &State) -> Option<LeaseStatus> {
        let shared = state.shared.as_ref()?;
        let role = match (shared.admits(), shared.leaving) {
            (true, _) => Role::Holder,
            (false, true) => Role::Leaving,
            (false, false) => Role::Follower,
        };
        let (holder, tenure) = shared.seen.clone();
        let (peers, streams) = (self.metrics.lease_peers.get(), shared.peers.len());
        Some(LeaseStatus { role, holder, tenure, peers, streams })
    }

    /// The tenure lasts until then. False if it is over already, or has not begun.
    pub fn prolong(&self, until: Instant) -> bool {
        let until = self.time(until);
        let mut state = self.lock();
        self.expire(&mut state);
        let tenure = state.shared.as_mut().and_then(|shared| shared.tenure.as_mut());
        tenure.map(|(end, _)| *end = until).is_some()
    }

    /// This process admits from now on, and goes on where the other one has stopped.
    /// Nobody is let in before it has `opened`: others may have to tell what they relay.
    pub fn take_over(
        self: &Arc<Self>,
        number: u64,
        handover: Handover,
        until: Instant,
        opened: Duration,
    ) -> Imported {
        let until = self.time(until);
        let mut guard = self.lock();
        let state = &mut *guard;
        self.retire_now(state);
        let Some(shared) = state.shared.as_mut().filter(|shared| !shared.leaving) else {
            return Imported::default();
        };
        shared.tenure = Some((until, number));
        shared.opens = Instant::now() + opened;
        let Handover { export, streams, .. } = handover;
        let mut imported = Imported {
            sessions: export.sessions.len(),
            objects: export.daemons.iter().map(|d| d.objects.len()).sum(),
            images: export.images.len(),
            streams: 0,
        };
        self.record(Entry::new(Happened::Admits, format!("this proxy admits from now on (tenure {number})")));
        let event = Event::Import { epoch: number, export: Box::new(export) };
        let attached = self.attached(state, event);
        let streams: BTreeMap<OpenId, (String, u64)> =
            streams.into_iter().map(|(open, proxy, number)| (open, (proxy, number))).collect();
        let mut ended = Vec::new();
        let Some(shared) = &mut state.shared else { return imported };
        shared.peers.clear();
        for (theirs, open) in attached {
            imported.streams += 1;
            match streams.get(&theirs) {
                Some((proxy, number)) if **proxy == *shared.me => match shared.own.get_mut(number) {
                    Some(own) => own.open = Some(open),
                    None => ended.push(open),
                },
                Some((proxy, number)) => {
                    let proxy: Arc<str> = proxy.as_str().into();
                    shared.absent.entry(proxy.clone()).or_insert_with(Instant::now);
                    shared.peers.insert((proxy, *number), open);
                }
                None => ended.push(open),
            }
        }
        // What it was granted by one of whom nothing is known any more.
        let unknown = shared.own.iter().filter(|(_, own)| own.open.is_none());
        let unknown: Vec<OpenExport> = unknown.map(|(number, own)| own.export(*number)).collect();
        let outbox = std::mem::take(&mut shared.outbox);
        let asking = std::mem::take(&mut shared.asking);
        imported.streams += unknown.len();
        for (theirs, open) in self.attached(state, Event::Attach(unknown)) {
            if let Some(own) = state.shared.as_mut().and_then(|shared| shared.own.get_mut(&theirs.0)) {
                own.open = Some(open);
            }
        }
        for open in ended {
            self.handle(state, Event::Release { open, outcome: Outcome::Done });
        }
        for message in outbox {
            if let Up::Said { stream, said } = message
                && let Some(open) = state.shared.as_ref().and_then(|shared| shared.own.get(&stream)?.open)
            {
                self.handle(state, said.event(open));
            }
        }
        for (_, asking) in asking {
            let _ = asking.answer.send(Answer::Moved);
        }
        drop(guard);
        self.tenures.send_replace(Some(number));
        imported
    }

    /// Hands an event to the engine, and tells which numbers requests have there now.
    fn attached(&self, state: &mut State, event: Event) -> Vec<(OpenId, OpenId)> {
        let mut attached = Vec::new();
        for effect in state.engine.handle(event, self.now()) {
            match effect {
                Effect::Attached { theirs, open, .. } => attached.push((theirs, open)),
                other => self.carry_out(state, other),
            }
        }
        self.ticked.notify_one();
        attached
    }

    /// This process may not admit any more; whether another one does is not known.
    pub fn suspend(&self) {
        let mut state = self.lock();
        self.suspend_now(&mut state);
    }

    /// Another process admits. What this one knew is kept for it.
    pub fn retire(&self) {
        let mut state = self.lock();
        self.retire_now(&mut state);
    }

    /// The same, and it is about to end: it does not admit again.
    pub fn leave(&self) {
        let mut state = self.lock();
        self.retire_now(&mut state);
        if let Some(shared) = &mut state.shared {
            (shared.leaving, shared.alone) = (true, Instant::now());
        }
    }

    /// The end of the tenure is not waited for: every use of it looks at the clock.
    pub(super) fn expire(&self, state: &mut State) {
        let Some(shared) = &state.shared else { return };
        if shared.tenure.is_some_and(|(until, _)| until <= self.now()) {
            self.suspend_now(state);
        }
    }

    fn suspend_now(&self, state: &mut State) {
        let Some(shared) = &mut state.shared else { return };
        if shared.tenure.take().is_none() {
            return;
        }
        (shared.suspended, shared.alone) = (true, Instant::now());
        // With nobody in its queue the engine grants nothing by itself.
        let waiting = std::mem::take(&mut state.waiting);
        for request in waiting.keys() {
            state.engine.handle(Event::Abandon(*request), self.now());
        }
        for (_, waiting) in waiting {
            let _ = waiting.answer.send(Answer::Moved);
        }
        self.tenures.send_replace(None);
        tracing::warn!("this proxy admits no more");
        self.record(Entry::new(Happened::Admits, "this proxy admits no more"));
    }

    fn retire_now(&self, state: &mut State) {
        self.suspend_now(state);
        let Some(shared) = &mut state.shared else { return };
        if !std::mem::take(&mut shared.suspended) {
            return;
        }
        let me = &shared.me;
        let own = shared.own.iter_mut().filter_map(|(n, own)| Some((own.open.take()?, me.to_string(), *n)));
        let others = std::mem::take(&mut shared.peers).into_iter();
        let others = others.map(|((proxy, number), open)| (open, proxy.to_string(), number));
        let streams = own.chain(others).collect();
        shared.absent.clear();
        let export = state.engine.export(self.now());
        shared.handover = Some(Handover { proxy: shared.me.to_string(), export, streams });
        state.engine.handle(Event::Retired, self.now());
    }

    /// Completes when another one admits, and this one is connected to it.
    pub async fn succeeded(&self) {
        // The sender is the pool's own.
        let _ = self.welcomed.subscribe().wait_for(|welcomed| *welcomed).await;
    }

    /// What this process knew when it admitted last, for its successor; `None` while it admits, or if it never did.
    pub fn handover(&self) -> Option<Handover> {
        let mut state = self.lock();
        self.expire(&mut state);
        if state.shared.as_ref().is_none_or(|shared| shared.admits()) {
            return None;
        }
        self.retire_now(&mut state);
        state.shared.as_ref()?.handover.clone()
    }

    /// A request that is open has something to say: to the engine, or to whoever admits.
    pub(super) fn said(&self, hold: Hold, said: Said) {
        let mut guard = self.lock();
        self.expire(&mut guard);
        let state = &mut *guard;
        let open = match (hold, &mut state.shared) {
            (Hold::Open(open), _) => Some(open),
            (Hold::Stream(_), None) => None,
            (Hold::Stream(stream), Some(shared)) => {
                let own = shared.own.get_mut(&stream);
                let open = own.as_ref().and_then(|own| own.open);
                match (&said, own) {
                    (Said::Builds, Some(own)) if own.about.unit == Unit::Other => {
                        own.about.unit = Unit::Build
                    }
                    (Said::Released(_), _) => drop(shared.own.remove(&stream)),
                    _ => {}
                }
                if open.is_none() {
                    shared.post(Up::Said { stream, said: said.clone() });
                    self.outgoing.notify_one();
                }
                open
            }
        };
        if let Some(open) = open {
            self.handle(state, said.event(open));
        }
    }

    /// Whoever waits for one that admits has waited long enough, or waits in vain.
    pub(super) fn end_vain_waits(&self, connected: bool, holder: Option<&str>) {
        let longest = self.config().engine.max_wait;
        let mut state = self.lock();
        let Some(shared) = &mut state.shared else { return };
        if connected || shared.admits() {
            shared.alone = Instant::now();
        }
        let left = shared.leaving && shared.alone.elapsed() > PATIENCE;
        let in_vain = |asking: &Asking| {
            let work = matches!(asking.want.class, Class::Work(_) | Class::Join);
            left || asking.since.elapsed() > if work || connected { longest } else { PATIENCE }
        };
        let ended: Vec<u64> =
            shared.asking.iter().filter(|(_, asking)| in_vain(asking)).map(|(n, _)| *n).collect();
        for number in ended {
            let Some(asking) = shared.asking.remove(&number) else { continue };
            let who = match holder {
                Some(holder) => format!("proxy {holder} did last"),
                None => "none has yet".to_string(),
            };
            let message = format!("no proxy admits at the moment ({who}); try again");
            let _ = asking.answer.send(Answer::Refused(Refusal::NoDaemon(message)));
        }
    }

    /// A request asks whoever admits.
    pub(super) fn ask(
        &self,
        state: &mut State,
        want: &Arc<Want>,
    ) -> Option<(u64, oneshot::Receiver<Answer>)> {
        let shared = state.shared.as_mut()?;
        let stream = shared.number();
        let (answer, answered) = oneshot::channel();
        let asking = Asking { want: want.clone(), answer, place: None, since: Instant::now() };
        shared.asking.insert(stream, asking);
        shared.post(Up::Acquire { stream, want: want.clone() });
        self.outgoing.notify_one();
        Some((stream, answered))
    }

    /// Another proxy is connected, and relays this. False if this one does not admit.
    pub(super) fn greet(&self, proxy: &Arc<str>, streams: &[(u64, OpenExport)]) -> bool {
        let mut guard = self.lock();
        self.expire(&mut guard);
        let state = &mut *guard;
        let Some(shared) = state.shared.as_mut().filter(|shared| shared.admits()) else { return false };
        shared.absent.remove(proxy);
        let there: BTreeSet<u64> = streams.iter().map(|(stream, _)| *stream).collect();
        let known: BTreeMap<u64, OpenId> = (shared.peers.iter())
            .filter(|((of, _), _)| of == proxy)
            .map(|((_, stream), open)| (*stream, *open))
            .collect();
        let ended: Vec<(u64, OpenId)> =
            known.iter().filter(|(n, _)| !there.contains(n)).map(|(n, open)| (*n, *open)).collect();
        for (stream, _) in &ended {
            shared.peers.remove(&(proxy.clone(), *stream));
        }
        let new = streams.iter().filter(|(stream, _)| !known.contains_key(stream));
        let new: Vec<OpenExport> = new.map(|(_, export)| export.clone()).collect();
        for (_, open) in ended {
            self.handle(state, Event::Release { open, outcome: Outcome::Done });
        }
        if !new.is_empty() {
            tracing::info!(%proxy, streams = new.len(), "a proxy relays what was granted before");
        }
        for (theirs, open) in self.attached(state, Event::Attach(new)) {
            if let Some(shared) = &mut state.shared {
                shared.peers.insert((proxy.clone(), theirs.0), open);
            }
        }
        true
    }

    /// The connection of another proxy has ended.
    pub(super) fn miss(&self, proxy: &Arc<str>) {
        if let Some(shared) = self.lock().shared.as_mut().filter(|shared| shared.admits()) {
            shared.absent.insert(proxy.clone(), Instant::now());
        }
    }

    /// A grant is another proxy's. False if this one does not admit any more.
    pub(super) fn lend(&self, hold: Hold, proxy: &Arc<str>, stream: u64) -> bool {
        let mut state = self.lock();
        let Hold::Stream(number) = hold else { return false };
        let Some(shared) = &mut state.shared else { return false };
        let Some(open) = shared.own.remove(&number).and_then(|own| own.open) else { return false };
        shared.peers.insert((proxy.clone(), stream), open);
        true
    }

    /// A request that another proxy relays has something to say.
    pub(super) fn said_by(&self, proxy: &Arc<str>, stream: u64, said: Said) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(shared) = &mut state.shared else { return };
        let key = (proxy.clone(), stream);
        let open = match said {
            Said::Released(_) => shared.peers.remove(&key),
            _ => shared.peers.get(&key).copied(),
        };
        if let Some(open) = open {
            self.handle(state, said.event(open));
        }
    }

    /// What is relayed by proxies of which nothing was heard for so long counts no more.
    pub fn forget_absent(&self, patience: Duration) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(shared) = &mut state.shared else { return };
        let gone: Vec<Arc<str>> = (shared.absent.iter())
            .filter(|(_, since)| since.elapsed() > patience)
            .map(|(proxy, _)| proxy.clone())
            .collect();
        for proxy in gone {
            let Some(shared) = &mut state.shared else { return };
            shared.absent.remove(&proxy);
            let lost: Vec<(Arc<str>, u64)> =
                shared.peers.keys().filter(|(of, _)| *of == proxy).cloned().collect();
            let lost: Vec<OpenId> = lost.iter().filter_map(|key| shared.peers.remove(key)).collect();
            if !lost.is_empty() {
                tracing::warn!(%proxy, streams = lost.len(), "a proxy has gone with what it relayed");
            }
            for open in lost {
                self.handle(state, Event::Release { open, outcome: Outcome::ClientGone });
            }
        }
    }

    /// Whether the daemons of a handover have been observed here: they were made a moment ago, or have gone.
    pub fn has_observed(&self, handover: &Handover) -> bool {
        let state = self.lock();
        let there = |id: &DaemonId| state.observed.iter().any(|spec| spec.id == id.as_str());
        state.observing && handover.export.daemons.iter().all(|d| there(&d.id))
    }
}

#[cfg(test)]
mod tests;
