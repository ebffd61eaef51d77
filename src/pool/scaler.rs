//! Applies the autoscaler: shows it the pool each second, and does what it says, one change at a time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::Pool;
use super::journal::{Entry, Happened};
use crate::engine::autoscaler::{self, Autoscaler, Decision, Reason, Step, View};
use crate::engine::model::*;
use crate::engine::scaling::{Growth, cause};
use crate::provision::{Change, DaemonSpec};

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long the provisioner may take for one change: meanwhile nobody is given back who is needed.
const PATIENCE: Duration = Duration::from_secs(15);

/// How many daemons there are to be, as the provisioner said last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Made {
    /// When it said so.
    pub confirmed: Option<Time>,
    /// How many; `None` if it cannot tell.
    pub replicas: Option<u32>,
    /// Whether it is replacing daemons of its own accord.
    pub rollout: bool,
}

/// The autoscaler in `/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScalerStatus {
    /// Whether it changes the number of daemons, or only tells it.
    pub active: bool,
    /// How many daemons there should be.
    pub desired: u32,
    /// How many the provisioner was asked for.
    pub replicas: Option<u32>,
    /// Why nothing else is done: `enough`, `demand`, `starting`, `maximum`, `stuck`, `stabilising`, `busy`, `settling`,
    /// `surplus`, `rollout`, `stale`.
    pub reason: Reason,
    /// Why daemons that were asked for do not come up, each a sentence.
    pub faults: Vec<String>,
    /// How many seconds a daemon takes to start here, once one has.
    pub startup: Option<f64>,
}

/// Somebody who asks something of the first daemon before there is one, and is no work yet.
pub struct Newcomer<'a>(&'a Pool);

impl Drop for Newcomer<'_> {
    fn drop(&mut self) {
        self.0.newcomers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    /// Counts a client that waits for the first daemon, until it is dropped: buildx asks for `/version` before it
    /// builds, and a pool of no daemons would not know that it is wanted.
    pub fn newcomer(&self) -> Newcomer<'_> {
        self.newcomers.fetch_add(1, Ordering::Relaxed);
        Newcomer(self)
    }

    /// The pool as the autoscaler looks at it.
    fn view(&self) -> View {
        let state = self.lock();
        let made = |spec: &DaemonSpec| {
            let fault = spec.pending.clone().filter(|_| spec.faulty);
            (DaemonId::from(spec.id.as_str()), autoscaler::Made { removal: spec.removal, fault })
        };
        let daemons = state.engine.candidates(&state.observed.iter().map(made).collect());
        let mut waiting = state.engine.waits_for_anybody();
        if self.newcomers.load(Ordering::Relaxed) > 0 {
            // However many they are: one daemon can answer them all.
            waiting = waiting.max(1);
        }
        let Made { confirmed, replicas, rollout } = state.made;
        View { confirmed, replicas, rollout, waiting, daemons }
    }

    /// Shows what was decided, and tells the engine whether anybody comes.
    fn decided(&self, decision: &Decision, autoscaler: &Autoscaler, active: bool) {
        let replicas = self.lock().made.replicas;
        let status = ScalerStatus {
            active,
            desired: decision.desired,
            replicas,
            reason: decision.reason,
            faults: decision.stuck.clone(),
            startup: autoscaler.startup().map(|took| took.as_secs_f64()),
        };
        let growth = Growth { coming: decision.coming, faults: decision.stuck.clone() };
        let mut state = self.lock();
        for fault in &decision.stuck {
            let fault = cause(fault);
            let known = state.scaler.as_ref().is_some_and(|s| s.faults.iter().any(|f| cause(f) == fault));
            if !known {
                tracing::warn!("a daemon does not come up: {fault}");
                self.record(Entry::new(Happened::Problem, format!("a daemon does not come up: {fault}")));
                self.tell("DaemonStuck", true, format!("a daemon does not come up: {fault}"));
            }
        }
        let max = self.config().scale.max;
        let full = replicas.is_some_and(|n| n >= max) && status.reason != Reason::Starting;
        if active && full && state.engine.waits_for_anybody() > 0 {
            self.tell(
                "PoolFull",
                true,
                format!("work waits, and there are {max} daemons, as many as there may be"),
            );
        }
        state.scaler = Some(status);
        if state.growth != growth {
            state.growth = growth.clone();
            self.handle(&mut state, Event::Growth(growth));
        }
    }
}

/// Looks and acts until it is dropped, or the provisioner has ended. When it is switched off it tells how many daemons
/// there should be, for whoever scales instead.
pub async fn run(pool: Arc<Pool>, changes: mpsc::Sender<Change>) {
    let mut autoscaler = Autoscaler::new(pool.config().scale.clone());
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let config = pool.config();
        if !pool.admits() {
            // Whoever admits decides; what was seen until now is old when it is this one again.
            if pool.lock().scaler.take().is_some() {
                autoscaler = Autoscaler::new(config.scale.clone());
            }
            continue;
        }
        autoscaler.configure(config.scale.clone());
        let view = pool.view();
        let decision = autoscaler.decide(&view, pool.now());
        pool.decided(&decision, &autoscaler, config.scaler);
        let steps = if config.scaler { decision.steps } else { autoscaler.stand_down(&view) };
        for step in &steps {
            if let Err(error) = apply(&pool, &changes, step).await {
                tracing::warn!("scaling: {error}");
                pool.metrics.scale_steps.with_label_values(&[word(step), "failed"]).inc();
                autoscaler.failed(step);
                break;
            }
            pool.metrics.scale_steps.with_label_values(&[word(step), "done"]).inc();
        }
        if decision.reason == Reason::Busy {
            // A build may be over whose image nobody has told of; nothing goes before that is known.
            pool.refresh_images().await;
        }
    }
}

fn word(step: &Step) -> &'static str {
    match step {
        Step::Grow { .. } => "grow",
        Step::Cordon(_) => "cordon",
        Step::Uncordon(_) => "uncordon",
        Step::Remove { .. } => "remove",
    }
}

async fn apply(pool: &Arc<Pool>, changes: &mpsc::Sender<Change>, step: &Step) -> Result<(), String> {
    if !pool.admits() {
        return Err("another proxy decides now".into());
    }
    match step {
        // One that has gone meanwhile needs neither.
        Step::Cordon(daemon) => drop(pool.cordon(daemon, CordonedBy::Scaler)),
        Step::Uncordon(daemon) => {
            drop(pool.uncordon(daemon, CordonedBy::Scaler));
            ask(changes, step).await?;
        }
        Step::Grow { from, to } => {
            tracing::info!(from, to, "scaling up");
            pool.record(Entry::new(Happened::Scaled, format!("up, from {from} to {to} daemons")));
            let waiting = pool.view().waiting;
            ask(changes, step).await?;
            pool.tell(
                "ScaledUp",
                false,
                format!("from {from} to {to} daemons: {waiting} builds or others wait"),
            );
            pool.asked_for(*to);
        }
        Step::Remove { daemon, from } => {
            // The view was a moment ago: whoever came back to it since then keeps it.
            if !pool.view().daemons.iter().any(|d| d.id == *daemon && d.empty) {
                return Err(format!("{daemon} is in use again"));
            }
            tracing::info!(%daemon, from, to = from - 1, "scaling down");
            let message = format!("down, from {from} to {} daemons: it is idle and not needed", from - 1);
            pool.record(Entry::new(Happened::Scaled, message).on(daemon));
            ask(changes, step).await?;
            let to = from - 1;
            pool.tell(
                "ScaledDown",
                false,
                format!("from {from} to {to} daemons: {daemon} is idle and not needed"),
            );
            pool.asked_for(to);
        }
    }
    Ok(())
}

async fn ask(changes: &mpsc::Sender<Change>, step: &Step) -> Result<(), String> {
    let (done, answer) = oneshot::channel();
    let gone = || "the provisioner has ended".to_string();
    changes.send(Change { step: step.clone(), done }).await.map_err(|_| gone())?;
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer.map_err(|_| gone())?,
        Err(_) => Err(format!("no answer of the provisioner within {} s", PATIENCE.as_secs())),
    }
}

impl Pool {
    /// The provisioner has taken a change: its next observation may be older than that.
    fn asked_for(&self, replicas: u32) {
        self.lock().made.replicas = Some(replicas);
    }
}
