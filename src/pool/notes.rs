//! What the pool tells those who look elsewhere than at dindpool: who must not be removed now, and what happened. Only
//! the proxy that scales writes it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::{Pool, lock};
use crate::engine::marks::{Chronicle, Marks};
use crate::engine::model::Time;
use crate::provision::{Note, Unwritten, Writing};

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long one note may take: longer than the provisioner waits itself.
const PATIENCE: Duration = Duration::from_secs(15);
/// What is not allowed is tried again after so long: somebody may have given the right meanwhile.
const FORBIDDEN: Time = Time::from_secs(600);
/// What waits to be told, at the most.
const WAITING: usize = 64;

impl Pool {
    /// Something happened that those who run the pool want to hear of. Not told twice within some minutes.
    pub(super) fn tell(&self, reason: &'static str, warning: bool, text: String) {
        let mut words = lock(&self.words);
        if words.len() < WAITING {
            words.push(Note::Word { reason, warning, text });
        }
    }
}

/// The notes of one pool.
struct Notes {
    pool: Arc<Pool>,
    to: mpsc::Sender<Writing>,
    marks: Marks,
    chronicle: Chronicle,
    /// Until when each kind of note is not tried, because it is not allowed.
    forbidden: [Option<Time>; 2],
    /// Whether the last of each kind was not written for another reason.
    failed: [bool; 2],
}

/// Writes what is to be written, until it is dropped or the provisioner has ended.
pub async fn run(pool: Arc<Pool>, to: mpsc::Sender<Writing>) {
    let mut notes = Notes {
        pool,
        to,
        marks: Marks::default(),
        chronicle: Chronicle::default(),
        forbidden: [None; 2],
        failed: [false; 2],
    };
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if !notes.pool.admits() {
            // Of several proxies the one that admits writes.
            lock(&notes.pool.words).clear();
            (notes.marks, notes.chronicle) = (Marks::default(), Chronicle::default());
            continue;
        }
        notes.write_words().await;
        notes.write_marks().await;
    }
}

impl Notes {
    async fn write_marks(&mut self) {
        if self.is_forbidden(0) {
            return;
        }
        let daemons = self.pool.lock().engine.busy_daemons();
        for (daemon, busy) in self.marks.due(&daemons, self.pool.now()) {
            let done = self.write(0, Note::Mark { daemon: daemon.clone(), busy }).await;
            self.marks.wrote(&daemon, busy, done, self.pool.now());
        }
    }

    async fn write_words(&mut self) {
        let words = std::mem::take(&mut *lock(&self.pool.words));
        for word in words {
            let Note::Word { reason, text, .. } = &word else { continue };
            if !self.is_forbidden(1) && self.chronicle.tells(&format!("{reason} {text}"), self.pool.now()) {
                self.write(1, word).await;
            }
        }
    }

    fn is_forbidden(&self, kind: usize) -> bool {
        self.forbidden[kind].is_some_and(|until| self.pool.now() < until)
    }

    /// Whether it was written.
    async fn write(&mut self, kind: usize, note: Note) -> bool {
        let (done, answer) = oneshot::channel();
        let result = match self.to.send(Writing { note, done }).await {
            Ok(()) => timeout(PATIENCE, answer).await.ok().and_then(Result::ok),
            Err(_) => None,
        };
        let result = result.unwrap_or_else(|| Err(Unwritten::Failed("no answer".into())));
        let word = ["mark", "event"][kind];
        let outcome = match &result {
            Ok(()) => "done",
            Err(Unwritten::Forbidden(_)) => "forbidden",
            Err(Unwritten::Failed(_)) => "failed",
        };
        self.pool.metrics.notes.with_label_values(&[word, outcome]).inc();
        match &result {
            Ok(()) => (self.forbidden[kind], self.failed[kind]) = (None, false),
            Err(Unwritten::Forbidden(why)) => {
                // Once: it is nothing that dindpool cannot do without.
                if self.forbidden[kind].is_none() {
                    tracing::warn!(
                        "dindpool may not write {word}s, and goes on without (docs/kubernetes.md): {why}"
                    );
                }
                self.forbidden[kind] = Some(self.pool.now() + FORBIDDEN);
            }
            Err(Unwritten::Failed(why)) => {
                // One line for an API server that is away, not one a second.
                if !std::mem::replace(&mut self.failed[kind], true) {
                    tracing::warn!("a {word} was not written: {why}");
                }
            }
        }
        result.is_ok()
    }
}
