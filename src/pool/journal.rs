//! What happened lately, for people: the page, `dindpool events` and `GET /events`. Written where the same is logged. Kept
//! in memory only, and in two rings: a night of builds does not push out the one daemon that was ejected.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{Pool, lock};
use crate::engine::model::{DaemonId, Outcome, Refusal, SessionKey, Tenant};
use crate::telemetry;

/// How many are kept of what somebody should look at, and as many of all the rest.
const KEPT: usize = 256;
/// How far back the same is looked for: it is told as one that happened several times.
const NEAR: usize = 8;
/// How much of a text that clients or daemons chose is kept.
const LONGEST: usize = 400;

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Happened {
    /// A daemon takes sessions, for the first time or again.
    Ready,
    /// A daemon is there and has not answered yet.
    Starting,
    /// A daemon was ejected.
    Ejected,
    /// A daemon is being deleted.
    Leaving,
    /// A daemon has gone.
    Gone,
    /// A daemon came back without anything that was on it.
    Emptied,
    /// A daemon does not belong into this pool.
    Misfit,
    /// A daemon takes no new sessions.
    Cordoned,
    /// It takes new sessions again.
    Uncordoned,
    /// A drain has begun.
    Draining,
    /// A drain has ended.
    Drained,
    /// The number of daemons was changed, or could not be.
    Scaled,
    /// The provisioner complains.
    Problem,
    /// A session was bound.
    Bound,
    /// A session's daemon has gone, and everything on it.
    Lost,
    /// A session's lease has run out.
    Ended,
    /// Nobody attends a session's containers.
    Overdue,
    /// A request waits for a slot.
    Waits,
    /// A request was refused.
    Refused,
    /// A build has ended.
    Built,
    /// This proxy admits from now on, or no longer.
    Admits,
}

impl Happened {
    /// Its word, as in the JSON.
    pub fn word(self) -> &'static str {
        match self {
            Happened::Ready => "ready",
            Happened::Starting => "starting",
            Happened::Ejected => "ejected",
            Happened::Leaving => "leaving",
            Happened::Gone => "gone",
            Happened::Emptied => "emptied",
            Happened::Misfit => "misfit",
            Happened::Cordoned => "cordoned",
            Happened::Uncordoned => "uncordoned",
            Happened::Draining => "draining",
            Happened::Drained => "drained",
            Happened::Scaled => "scaled",
            Happened::Problem => "problem",
            Happened::Bound => "bound",
            Happened::Lost => "lost",
            Happened::Ended => "ended",
            Happened::Overdue => "overdue",
            Happened::Waits => "waits",
            Happened::Refused => "refused",
            Happened::Built => "built",
            Happened::Admits => "admits",
        }
    }

    /// Whether it is the daily round, and goes before the rest when room is needed.
    fn is_routine(self) -> bool {
        matches!(self, Happened::Bound | Happened::Ended | Happened::Waits | Happened::Built)
    }
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts up within one process; the later one is higher.
    pub number: u64,
    /// When, in milliseconds since 1970.
    pub at: u64,
    /// What.
    pub kind: Happened,
    /// Of which daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub daemon: Option<String>,
    /// Of which session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Of which tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The same in words.
    pub message: String,
    /// How often, a moment apart; `at` is the last time.
    pub times: u32,
}

impl Entry {
    /// Something that happened now.
    pub(super) fn new(kind: Happened, message: impl Into<String>) -> Self {
        let message: String = message.into();
        let message = match message.char_indices().nth(LONGEST) {
            Some((end, _)) => format!("{}…", &message[..end]),
            None => message,
        };
        let at = telemetry::date();
        Entry { number: 0, at, kind, daemon: None, session: None, tenant: None, message, times: 1 }
    }

    pub(super) fn on(mut self, daemon: &DaemonId) -> Self {
        self.daemon = Some(daemon.to_string());
        self
    }

    pub(super) fn of(mut self, session: &SessionKey) -> Self {
        self.session = Some(session.to_string());
        self
    }

    pub(super) fn by(mut self, tenant: &Tenant) -> Self {
        self.tenant = Some(tenant.to_string());
        self
    }

    fn is_same(&self, other: &Entry) -> bool {
        let what = |e: &Entry| (e.kind, e.daemon.clone(), e.session.clone(), e.message.clone());
        self.kind == other.kind && what(self) == what(other)
    }
}

/// The latest entries.
#[derive(Debug)]
pub(super) struct Journal {
    notable: VecDeque<Entry>,
    routine: VecDeque<Entry>,
    latest: watch::Sender<u64>,
}

impl Default for Journal {
    fn default() -> Self {
        Journal { notable: VecDeque::new(), routine: VecDeque::new(), latest: watch::Sender::new(0) }
    }
}

impl Journal {
    fn add(&mut self, mut entry: Entry) {
        entry.number = *self.latest.borrow() + 1;
        let ring = if entry.kind.is_routine() { &mut self.routine } else { &mut self.notable };
        if let Some(at) = (0..ring.len()).rev().take(NEAR).find(|i| ring[*i].is_same(&entry)) {
            entry.times += ring.remove(at).map_or(0, |same| same.times);
        } else if ring.len() >= KEPT {
            ring.pop_front();
        }
        let number = entry.number;
        ring.push_back(entry);
        self.latest.send_replace(number);
    }

    /// Those after `number`, the oldest first.
    fn after(&self, number: u64) -> Vec<Entry> {
        let late = |ring: &VecDeque<Entry>| -> Vec<Entry> {
            let new = ring.iter().rev().take_while(|e| e.number > number).cloned();
            new.collect()
        };
        let mut entries = late(&self.notable);
        entries.extend(late(&self.routine));
        entries.sort_unstable_by_key(|e| e.number);
        entries
    }
}

impl Pool {
    /// Something happened that people want to see.
    pub(super) fn record(&self, entry: Entry) {
        lock(&self.journal).add(entry);
    }

    /// What happened after the entry of this number, the oldest first; 0 gives all that is kept.
    pub fn entries(&self, after: u64) -> Vec<Entry> {
        lock(&self.journal).after(after)
    }

    /// The number of the latest entry, to wait for the next.
    pub fn latest_entry(&self) -> watch::Receiver<u64> {
        lock(&self.journal).latest.subscribe()
    }
}

/// A refusal as an entry, if it is of interest: that a name means nothing to a session is not.
pub(super) fn refusal(refusal: &Refusal) -> Option<Entry> {
    match refusal {
        Refusal::NoDaemon(message)
        | Refusal::ApiVersion(message)
        | Refusal::SessionLost(message)
        | Refusal::QueueFull(message)
        | Refusal::TenantFull(message)
        | Refusal::LongestWait(message) => Some(Entry::new(Happened::Refused, message.as_str())),
        Refusal::Ambiguous(_) | Refusal::NotFound(_) => None,
    }
}

/// How a build ended, in words.
pub(super) fn ended(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "done",
        Outcome::Failed => "failed",
        Outcome::Erred => "failed: the daemon answered with a server error",
        Outcome::ClientGone => "broken off by its client",
        Outcome::DaemonFailed => "broken off by the daemon",
        Outcome::Unreached => "not begun: the daemon could not be reached",
        Outcome::Aborted => "broken off by the proxy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_night_of_builds_does_not_push_out_what_matters() {
        let mut journal = Journal::default();
        journal.add(Entry::new(Happened::Ejected, "cannot write").on(&"a".into()));
        for i in 0..10_000 {
            journal.add(Entry::new(Happened::Built, format!("{i}")));
        }
        let entries = journal.after(0);
        assert_eq!((entries.len(), entries[0].kind), (KEPT + 1, Happened::Ejected));
        assert!(entries.is_sorted_by_key(|e| e.number));
        assert_eq!(journal.after(entries[KEPT - 1].number).len(), 1);
    }

    #[test]
    fn the_same_again_is_one_entry_that_counts() {
        let mut journal = Journal::default();
        for key in ["x", "y", "x", "y", "x"] {
            journal.add(Entry::new(Happened::Refused, "the queue is full").of(&key.into()));
        }
        let times: Vec<_> = journal.after(0).iter().map(|e| (e.session.clone(), e.times)).collect();
        assert_eq!(times, [(Some("y".to_string()), 2), (Some("x".to_string()), 3)]);
        assert!(journal.after(4).len() == 1, "whoever follows hears of it again");
    }

    #[test]
    fn words_are_those_of_the_json() {
        for kind in [Happened::Ready, Happened::Misfit, Happened::Built, Happened::Admits] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.word());
        }
    }

    #[test]
    fn a_long_text_is_cut() {
        let entry = Entry::new(Happened::Problem, "ü".repeat(10_000));
        assert_eq!(entry.message.chars().count(), LONGEST + 1);
    }
}
