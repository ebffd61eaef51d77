//! The guard of one granted request: whatever happens to its task, the slot is given back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::shared::{Hold, Said};
use super::{Granted, Handle, Pool, Tally};
use crate::drain::Signal;
use crate::engine::model::{Fact, LeaseId, Outcome};
use crate::provision::Stream;

/// One request's hold on a daemon. Dropped without [`Lease::finish`], it counts as abandoned by its client.
pub struct Lease {
    pool: Arc<Pool>,
    hold: Hold,
    lease: Option<LeaseId>,
    fresh: bool,
    daemon: Arc<Handle>,
    outcome: Outcome,
    cut: Signal,
    /// It was answered with a server error.
    erred: AtomicBool,
    /// It was answered with an error, or its stream says that it has failed.
    failed: AtomicBool,
}

impl Lease {
    pub(super) fn new(pool: Arc<Pool>, granted: Granted) -> Self {
        let Granted { hold, lease, fresh, daemon, cut } = granted;
        Lease {
            pool,
            hold,
            lease,
            fresh,
            daemon,
            outcome: Outcome::ClientGone,
            cut,
            erred: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        }
    }

    /// The daemon that the request goes to.
    pub fn daemon(&self) -> &Arc<Handle> {
        &self.daemon
    }

    /// Given when the request is to be broken off, because its daemon's drain did not end in time.
    pub fn cut(&self) -> &Signal {
        &self.cut
    }

    /// Whether the request's session was bound before: then it may not be tried elsewhere.
    pub fn is_bound(&self) -> bool {
        self.lease.is_some() && !self.fresh
    }

    /// Opens a connection to the daemon within the pool's deadline.
    ///
    /// # Errors
    /// What connect says, or that it took too long. No byte has reached the daemon then.
    pub async fn connect(&self) -> io::Result<Stream> {
        let deadline = self.pool.config().connect_deadline;
        match tokio::time::timeout(deadline, self.daemon.endpoint.connect()).await {
            Ok(result) => result,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no connection within {} s", deadline.as_secs()),
            )),
        }
    }

    /// Tells the pool what this request's response says about an object.
    pub fn learn(&self, fact: Fact) {
        self.pool.said(self.hold, Said::Learned(self.daemon.id.clone(), fact));
    }

    /// Tells the pool that this BuildKit connection builds.
    pub fn build_seen(&self) {
        self.pool.said(self.hold, Said::Builds);
    }

    /// The daemon's answer has this status.
    pub fn answered(&self, status: u16) {
        self.erred.store(status >= 500, Ordering::Relaxed);
        self.failed.store(status >= 400, Ordering::Relaxed);
    }

    /// Its stream says that what it was to do has failed.
    pub fn failed(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// What the request has come to, for the line that the log has at the lease's end.
    pub fn count(&self, request: Tally) {
        if let Some(lease) = self.lease {
            self.pool.tallies.add(lease, request);
        }
    }

    /// The request has ended in this way.
    pub fn finish(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.outcome == Outcome::Done && self.erred.load(Ordering::Relaxed) {
            self.outcome = Outcome::Erred;
        } else if self.outcome == Outcome::Done && self.failed.load(Ordering::Relaxed) {
            self.outcome = Outcome::Failed;
        }
        self.pool.said(self.hold, Said::Released(self.outcome));
        // Afterwards: how soon it is asked again depends on whether this has ejected it.
        if matches!(self.outcome, Outcome::DaemonFailed | Outcome::Unreached) {
            self.daemon.wake.notify_one();
        }
    }
}
