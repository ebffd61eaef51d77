//! A request's place in the queue, or its daemon at once.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Granted, Lease, Pool, refused};
use crate::engine::model::{Event, Outcome, Refusal, RequestId};
use crate::error::{Error, Kind};

/// What [`Pool::acquire`] gives: a lease to be had, now or later. Dropped before that, it leaves the queue, and
/// nothing is started for it.
pub struct Ticket {
    pub(super) pool: Arc<Pool>,
    pub(super) request: RequestId,
    pub(super) answer: oneshot::Receiver<Result<Granted, Refusal>>,
    pub(super) answered: bool,
}

impl Ticket {
    /// The lease, if the ticket does not have to wait.
    ///
    /// # Errors
    /// When no daemon can take the request; the message says what was tried.
    pub fn now(&mut self) -> Option<Result<Lease, Error>> {
        match self.answer.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => None,
            Ok(answer) => Some(self.take(answer)),
            Err(oneshot::error::TryRecvError::Closed) => Some(Err(stopped())),
        }
    }

    /// Waits for the lease. Cancel-safe.
    ///
    /// # Errors
    /// As [`Ticket::now`]; and when the longest wait is over.
    pub async fn granted(&mut self) -> Result<Lease, Error> {
        match (&mut self.answer).await {
            Ok(answer) => self.take(answer),
            Err(_) => Err(stopped()),
        }
    }

    /// Position and number of those who wait.
    pub fn position(&self) -> Option<(usize, usize)> {
        self.pool.lock().engine.position(self.request)
    }

    /// Why daemons that are to come are not there, if that is what it waits for.
    pub fn why(&self) -> Option<String> {
        self.pool.lock().engine.why_waiting()
    }

    fn take(&mut self, answer: Result<Granted, Refusal>) -> Result<Lease, Error> {
        self.answered = true;
        match answer {
            Ok(granted) => Ok(Lease::new(self.pool.clone(), granted)),
            Err(refusal) => Err(refused(refusal)),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let mut state = self.pool.lock();
        state.waiting.remove(&self.request);
        // A `/session` waits with its build's ticket, and is none of its own.
        let waited = state.engine.waits(self.request);
        self.pool.handle(&mut state, Event::Abandon(self.request));
        // Granted in the very moment in which its client left: straight back.
        self.answer.close();
        match self.answer.try_recv() {
            Ok(Ok(granted)) => {
                let outcome = Outcome::ClientGone;
                self.pool.handle(&mut state, Event::Release { open: granted.open, outcome });
            }
            _ if waited => self.pool.metrics.queue_abandoned.inc(),
            _ => {}
        }
    }
}

fn stopped() -> Error {
    Error::new(Kind::ShuttingDown, "dindpool is shutting down")
}
