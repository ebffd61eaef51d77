//! A request's place in the queue, or its daemon at once.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::peers::Up;
use super::shared::Said;
use super::{Granted, Lease, Pool, Want, refused};
use crate::engine::model::{Event, Outcome, Refusal, RequestId, Tenant};
use crate::error::{Error, Kind};

/// What a ticket is answered with.
#[derive(Debug)]
pub(super) enum Answer {
    /// It has its daemon.
    Granted(Granted),
    /// It gets none.
    Refused(Refusal),
    /// Another proxy admits from now on: it is to be asked.
    Moved,
}

/// Where it waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In this process.
    Here(RequestId),
    /// At the proxy that admits, under this number.
    There(u64),
}

/// What [`Pool::acquire`] gives: a lease to be had, now or later. Dropped before that, it leaves the queue, and
/// nothing is started for it.
pub struct Ticket {
    pool: Arc<Pool>,
    place: Place,
    tenant: Tenant,
    answer: oneshot::Receiver<Answer>,
    answered: bool,
    /// What was wanted, where it may have to be asked for once more.
    want: Option<Arc<Want>>,
}

impl Ticket {
    pub(super) fn new(pool: &Arc<Pool>, want: &Want) -> Self {
        let mut state = pool.lock();
        let want_again = state.shared.is_some().then(|| Arc::new(want.clone()));
        let (place, answer) = Self::enter(pool, &mut state, want, want_again.as_ref());
        drop(state);
        Ticket {
            pool: pool.clone(),
            place,
            tenant: want.tenant.clone(),
            answer,
            answered: false,
            want: want_again,
        }
    }

    /// Asks the engine, or the proxy that admits.
    fn enter(
        pool: &Pool,
        state: &mut super::State,
        want: &Want,
        again: Option<&Arc<Want>>,
    ) -> (Place, oneshot::Receiver<Answer>) {
        pool.expire(state);
        let asks = state.shared.as_ref().is_some_and(|shared| !shared.answers(want.class));
        if asks
            && let Some(want) = again
            && let Some((stream, answer)) = pool.ask(state, want)
        {
            return (Place::There(stream), answer);
        }
        let (request, answer) = pool.enter(state, want, again.cloned());
        (Place::Here(request), answer)
    }

    /// The lease, if the ticket does not have to wait.
    ///
    /// # Errors
    /// When no daemon can take the request; the message says what was tried.
    pub fn now(&mut self) -> Option<Result<Lease, Error>> {
        loop {
            match self.answer.try_recv() {
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Closed) => return Some(Err(stopped())),
                Ok(Answer::Moved) => self.ask_again(),
                Ok(Answer::Granted(granted)) => return Some(Ok(self.lease(granted))),
                Ok(Answer::Refused(refusal)) => {
                    self.answered = true;
                    return Some(Err(refused(refusal)));
                }
            }
        }
    }

    /// Waits for the lease. Cancel-safe.
    ///
    /// # Errors
    /// As [`Ticket::now`]; and when the longest wait is over.
    pub async fn granted(&mut self) -> Result<Lease, Error> {
        match self.settled().await {
            Some(Ok(granted)) => Ok(self.lease(granted)),
            Some(Err(refusal)) => Err(refused(refusal)),
            None => Err(stopped()),
        }
    }

    /// The same without a guard: who gets a grant must give it back. `None` if the pool has ended.
    pub(super) async fn settled(&mut self) -> Option<Result<Granted, Refusal>> {
        loop {
            let answer = (&mut self.answer).await.ok()?;
            self.answered = !matches!(answer, Answer::Moved);
            match answer {
                Answer::Moved => self.ask_again(),
                Answer::Granted(granted) => return Some(Ok(granted)),
                Answer::Refused(refusal) => return Some(Err(refusal)),
            }
        }
    }

    /// Position and number of those who wait.
    pub fn position(&self) -> Option<(usize, usize)> {
        let state = self.pool.lock();
        match self.place {
            Place::Here(request) => state.engine.position(request),
            Place::There(stream) => state.shared.as_ref()?.asking.get(&stream)?.place,
        }
    }

    /// Why daemons that are to come are not there, if that is what it waits for.
    pub fn why(&self) -> Option<String> {
        self.pool.lock().engine.why_waiting()
    }

    /// Another one admits now.
    fn ask_again(&mut self) {
        let Some(want) = self.want.clone() else { return };
        let mut state = self.pool.lock();
        (self.place, self.answer) = Self::enter(&self.pool, &mut state, &want, Some(&want));
    }

    fn lease(&mut self, granted: Granted) -> Lease {
        self.answered = true;
        Lease::new(self.pool.clone(), granted)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let mut state = self.pool.lock();
        let mut waited = false;
        match self.place {
            Place::Here(request) => {
                state.waiting.remove(&request);
                // A `/session` waits with its build's ticket, and is none of its own.
                waited = state.engine.waits(request);
                self.pool.handle(&mut state, Event::Abandon(request));
            }
            Place::There(stream) => {
                if let Some(shared) = &mut state.shared
                    && shared.asking.remove(&stream).is_some()
                {
                    shared.post(Up::Abandon { stream });
                    self.pool.outgoing.notify_one();
                }
            }
        }
        drop(state);
        // Granted in the very moment in which its client left: straight back.
        self.answer.close();
        match self.answer.try_recv() {
            Ok(Answer::Granted(granted)) => {
                self.pool.said(granted.hold, Said::Released(Outcome::ClientGone));
            }
            _ if waited => self.pool.metrics.abandoned(self.tenant.as_str()),
            _ => {}
        }
    }
}

fn stopped() -> Error {
    Error::new(Kind::ShuttingDown, "dindpool is shutting down")
}
