//! Cordon and drain, as the admin listener and the autoscaler use them.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::journal::{Entry, Happened};
use super::status::CordonStatus;
use super::{Pool, State};
use crate::engine::model::*;
use crate::engine::{Cordon, Drain};

/// Between two looks at a drain that waits.
const LOOK: Duration = Duration::from_secs(1);

/// How far a drain is, or how it ended: a line of the answer to `POST /daemons/ID/drain`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Progress {
    /// Work is left.
    Draining {
        /// In how many seconds it is cut.
        deadline: f64,
        /// What it is.
        remaining: Vec<Remaining>,
    },
    /// The drain has ended.
    Drained(Drained),
    /// It was lifted.
    Uncordoned,
    /// The daemon has gone.
    Gone,
}

impl Progress {
    /// Whether nothing follows.
    pub fn is_end(&self) -> bool {
        !matches!(self, Progress::Draining { .. })
    }
}

/// No daemon of that name: the names that there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown(pub Vec<String>);

fn names(state: &State) -> Vec<String> {
    state.engine.daemons().map(|d| d.id.to_string()).collect()
}

impl Pool {
    /// A daemon takes no new sessions from now on.
    ///
    /// # Errors
    /// When there is no such daemon.
    pub fn cordon(&self, daemon: &DaemonId, by: CordonedBy) -> Result<(), Unknown> {
        self.change(daemon, Event::Cordon { daemon: daemon.clone(), by })
    }

    /// It takes new sessions again; a drain ends. The scaler lifts its own cordon only.
    ///
    /// # Errors
    /// When there is no such daemon.
    pub fn uncordon(&self, daemon: &DaemonId, by: CordonedBy) -> Result<(), Unknown> {
        self.change(daemon, Event::Uncordon { daemon: daemon.clone(), by })
    }

    /// Begins a drain, or joins the one that is under way: then that one's deadline stands.
    ///
    /// # Errors
    /// When there is no such daemon.
    pub fn drain(&self, daemon: &DaemonId, within: Duration) -> Result<(), Unknown> {
        let deadline = self.now() + within;
        self.change(daemon, Event::Drain { daemon: daemon.clone(), deadline })
    }

    fn change(&self, daemon: &DaemonId, event: Event) -> Result<(), Unknown> {
        let mut state = self.lock();
        if !state.engine.daemons().any(|d| d.id == *daemon) {
            return Err(Unknown(names(&state)));
        }
        self.handle(&mut state, event);
        Ok(())
    }

    /// The daemons that there are.
    pub fn names(&self) -> Vec<String> {
        names(&self.lock())
    }

    /// How far the drain of a daemon is.
    pub fn drain_progress(&self, daemon: &DaemonId) -> Progress {
        let now = self.now();
        let state = self.lock();
        let Some(d) = state.engine.daemons().find(|d| d.id == *daemon) else { return Progress::Gone };
        match d.cordon.as_ref().and_then(|c| c.drain.as_ref()) {
            None => Progress::Uncordoned,
            Some(Drain::Done(drained)) => Progress::Drained(drained.clone()),
            Some(Drain::Waiting { deadline }) => Progress::Draining {
                deadline: deadline.saturating_sub(now).as_secs_f64(),
                remaining: state.engine.work_on(daemon),
            },
        }
    }

    /// The next that is to be told of a drain: its end, or what is left when that has changed since `told`.
    pub async fn drain_advances(self: &Arc<Self>, daemon: &DaemonId, told: Option<&Progress>) -> Progress {
        loop {
            let ended = self.drain_ended.notified();
            let progress = self.drain_progress(daemon);
            let known = match (&progress, told) {
                (Progress::Draining { remaining: a, .. }, Some(Progress::Draining { remaining: b, .. })) => {
                    a == b
                }
                _ => false,
            };
            if !known {
                return progress;
            }
            // A drain that ends is told at once, all else within a second.
            let _ = tokio::time::timeout(LOOK, ended).await;
        }
    }

    pub(super) fn cordon_changed(&self, state: &State, effect: Effect) {
        match effect {
            Effect::Cordoned { daemon, by } => {
                tracing::warn!(%daemon, ?by, "daemon cordoned");
                let by = if by == CordonedBy::Operator { "an operator" } else { "the autoscaler" };
                let message = format!("takes no new sessions: {by} cordoned it");
                self.record(Entry::new(Happened::Cordoned, message).on(&daemon));
            }
            Effect::Draining { daemon } => {
                tracing::warn!(%daemon, "drain begins");
                self.record(Entry::new(Happened::Draining, "the drain has begun").on(&daemon));
            }
            Effect::Uncordoned { daemon, draining } => {
                if draining {
                    self.metrics.drains.with_label_values(&["uncordoned"]).inc();
                }
                self.drain_ended.notify_waiters();
                tracing::warn!(%daemon, draining, "daemon uncordoned");
                let message =
                    if draining { "takes sessions again; its drain is off" } else { "takes sessions again" };
                self.record(Entry::new(Happened::Uncordoned, message).on(&daemon));
            }
            Effect::Drained { daemon, drained } => {
                let result = if drained.cut.is_empty() { "idle" } else { "cut" };
                self.metrics.drains.with_label_values(&[result]).inc();
                for cut in &drained.cut {
                    let session = cut.key.as_ref().map(SessionKey::as_str);
                    let containers = cut.containers.join(",");
                    let (open, builds, waiting) = (cut.open, cut.builds, cut.waiting);
                    tracing::warn!(%daemon, session, open, builds, waiting, containers, "cut by the drain");
                }
                let (containers, images) = (drained.left.containers.len(), drained.left.images.len());
                tracing::warn!(%daemon, result, containers, images, "daemon drained");
                let message = match drained.cut.len() {
                    0 => "drained: nothing was cut".to_string(),
                    n => format!("drained: at the deadline the work of {n} sessions was cut"),
                };
                self.record(Entry::new(Happened::Drained, message).on(&daemon));
                if !drained.cut.is_empty()
                    && let Some(member) = state.daemons.get(&daemon)
                {
                    member.handle.break_streams();
                    // Nobody listens where there is one proxy.
                    let _ = self.cuts.send(daemon.clone());
                }
                self.drain_ended.notify_waiters();
            }
            _ => {}
        }
    }
}

pub(super) fn status(cordon: &Cordon, now: Time) -> CordonStatus {
    let drained = match &cordon.drain {
        Some(Drain::Done(drained)) => Some(drained.clone()),
        _ => None,
    };
    let deadline = cordon.deadline().map(|at| at.saturating_sub(now).as_secs_f64());
    CordonStatus { by: cordon.by, deadline, drained }
}
