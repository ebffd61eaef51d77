//! What the pool must know before it may say where something is. Nothing is stored, so a proxy that has just started
//! knows no container: it first lists what is on its daemons. And no list has the ids of execs: of one that nobody
//! knows, the daemons are asked.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::{Handle, Pool, Want, client, lock};
use crate::engine::model::{Event, Fact, Kind, ObjectRef};

/// How long after its start a pool waits for the first list of a daemon that is there and does not answer.
const ACQUAINTANCE: Duration = Duration::from_secs(10);
/// How long a daemon may take to say whether it has something.
const ANSWER: Duration = Duration::from_secs(2);
/// How many ids are asked for at the same time.
pub(super) const LOOKUPS: usize = 8;
/// Of how many ids that no daemon has it is remembered, and for how long.
const NOWHERE: usize = 256;
const NOWHERE_TIME: Duration = Duration::from_secs(5);

impl Want {
    /// Whether its place follows from what is on the daemons.
    fn goes_by_objects(&self) -> bool {
        let needs = &self.requirements;
        self.target.is_some() || needs.image.is_some() || !needs.beside.is_empty()
    }
}

impl Pool {
    /// Waits until the pool can say where the objects of `want` are.
    pub(super) async fn find(self: &Arc<Self>, want: &Want) {
        if !want.goes_by_objects() {
            return;
        }
        self.acquainted().await;
        if let Some(target) = &want.target {
            self.look_up(target).await;
        }
    }

    /// Waits until each daemon that is there has been listed once.
    async fn acquainted(&self) {
        if self.acquainted.load(Ordering::Relaxed) {
            return;
        }
        let deadline = tokio::time::Instant::from_std(self.origin + ACQUAINTANCE);
        loop {
            let met = self.met.notified();
            tokio::pin!(met);
            met.as_mut().enable();
            if self.knows_all() || tokio::time::timeout_at(deadline, met).await.is_err() {
                self.acquainted.store(true, Ordering::Relaxed);
                return;
            }
        }
    }

    fn knows_all(&self) -> bool {
        let state = self.lock();
        state.observing && state.daemons.values().all(|m| m.handle.met.load(Ordering::Relaxed))
    }

    /// A daemon has been listed, or nobody is there.
    pub(super) fn meet(&self, handle: &Handle) {
        if !handle.met.swap(true, Ordering::Relaxed) {
            self.met.notify_waiters();
        }
    }

    /// Asks the daemons for a full id that the pool has never heard of.
    async fn look_up(self: &Arc<Self>, target: &ObjectRef) {
        let Some(path) = path(target) else { return };
        let daemons: Vec<Arc<Handle>> = {
            let state = self.lock();
            if state.engine.knows(target.kind, &target.reference) {
                return;
            }
            let well = state.engine.daemons().filter(|d| d.takes_sessions());
            well.filter_map(|d| state.daemons.get(&d.id).map(|m| m.handle.clone())).collect()
        };
        if lock(&self.nowhere).has(&target.reference) {
            return;
        }
        // Who asks for very many ids that do not exist gets the answer of one daemon, as for a name.
        let Ok(_place) = self.lookups.try_acquire() else { return };
        let mut answers = JoinSet::new();
        for daemon in daemons {
            let path = path.clone();
            answers.spawn(async move {
                let found = client::get(&daemon.endpoint, &path, ANSWER).await.is_ok();
                found.then_some(daemon)
            });
        }
        while let Some(answer) = answers.join_next().await {
            let Ok(Some(daemon)) = answer else { continue };
            self.metrics.lookups.with_label_values(&["found"]).inc();
            tracing::info!(daemon = %daemon.id, "found by its id what no list had");
            let fact = Fact::Created { kind: target.kind, id: target.reference.clone(), name: None };
            self.event(Event::Learned { daemon: daemon.id.clone(), open: None, fact });
            return;
        }
        self.metrics.lookups.with_label_values(&["nowhere"]).inc();
        lock(&self.nowhere).add(&target.reference);
    }
}

/// Where a daemon tells whether it has this. Only a full id is a fact; names and prefixes exist on many daemons.
fn path(target: &ObjectRef) -> Option<String> {
    let id = &target.reference;
    let full = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    match target.kind {
        Kind::Exec if full => Some(format!("/exec/{id}/json")),
        Kind::Container if full => Some(format!("/containers/{id}/json")),
        _ => None,
    }
}

/// Ids that no daemon had a moment ago.
#[derive(Debug, Default)]
pub(super) struct Nowhere(VecDeque<(Instant, String)>);

impl Nowhere {
    fn has(&mut self, id: &str) -> bool {
        while self.0.front().is_some_and(|(at, _)| at.elapsed() > NOWHERE_TIME) {
            self.0.pop_front();
        }
        self.0.iter().any(|(_, known)| known == id)
    }

    fn add(&mut self, id: &str) {
        self.0.push_back((Instant::now(), id.to_string()));
        if self.0.len() > NOWHERE {
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_full_ids_are_asked_for() {
        let of = |kind, reference: &str| path(&ObjectRef { kind, reference: reference.to_string() });
        let id = "0f".repeat(32);
        assert_eq!(of(Kind::Exec, &id), Some(format!("/exec/{id}/json")));
        assert_eq!(of(Kind::Container, &id), Some(format!("/containers/{id}/json")));
        for other in ["db", "0f0f", &format!("{}/../x", &id[..59]), &"zz".repeat(32)] {
            assert_eq!(of(Kind::Container, other), None, "{other}");
        }
        assert_eq!(of(Kind::Network, &id), None);
    }

    #[test]
    fn what_is_nowhere_is_remembered_within_bounds() {
        let mut nowhere = Nowhere::default();
        for n in 0..=NOWHERE {
            nowhere.add(&n.to_string());
        }
        assert!(!nowhere.has("0") && nowhere.has("1") && nowhere.has(&NOWHERE.to_string()));
    }
}
