//! One task that looks at all open sockets, instead of a timer for each: it finds peers whose machine has gone while
//! data for them was on its way (keepalive finds those of silent connections), and requests to daemons that answer
//! nothing at all.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Proxy;
use super::relay::{Asked, Fate, Guard, Pace};
use crate::pool::Handle;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a peer may acknowledge nothing while data is sent to it again and again. With the time until that is
/// noticed a lost machine is found in less than 30 s.
const LOST: Duration = Duration::from_secs(20);
/// How long a request that dockerd answers at once waits for a daemon that answers no probe either.
const PROMPT: Duration = Duration::from_secs(2);
/// How long any other one does: a busy disk makes a create, a start and the probe's `/info` wait for each other.
const PATIENT: Duration = Duration::from_secs(10);
/// How many are looked at before other tasks get their turn.
const BATCH: usize = 512;

/// All sockets that are looked at.
#[derive(Debug, Default)]
pub struct Sweeper {
    /// Those that are gone are taken out at the next look.
    watched: Mutex<Vec<Watched>>,
}

#[derive(Debug)]
struct Watched {
    guard: Weak<Guard>,
    /// None for a client.
    daemon: Option<Arc<Handle>>,
}

impl Sweeper {
    /// A guard for a connection to `daemon`, or to a client.
    pub fn watch(&self, daemon: Option<Arc<Handle>>) -> Arc<Guard> {
        let guard = Arc::new(Guard::default());
        self.watched().push(Watched { guard: Arc::downgrade(&guard), daemon });
        guard
    }

    fn watched(&self) -> std::sync::MutexGuard<'_, Vec<Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks until it is aborted.
pub async fn run(proxy: Arc<Proxy>) {
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        proxy.gate.keep_for(proxy.pool.size());
        look(&proxy).await;
    }
}

async fn look(proxy: &Proxy) {
    let mut watched = std::mem::take(&mut *proxy.sweeper.watched());
    let now = Instant::now();
    let mut seen = 0;
    let mut kept = Vec::with_capacity(watched.len());
    for one in watched.drain(..) {
        let Some(guard) = one.guard.upgrade() else { continue };
        judge(proxy, &guard, one.daemon.as_deref(), now);
        kept.push(one);
        seen += 1;
        if seen % BATCH == 0 {
            tokio::task::yield_now().await;
        }
    }
    proxy.sweeper.watched().append(&mut kept);
}

fn judge(proxy: &Proxy, guard: &Guard, daemon: Option<&Handle>, now: Instant) {
    let side = if daemon.is_some() { "daemon" } else { "client" };
    let name = daemon.map(|d| d.id.as_str());
    if let Some(time) = guard.unacknowledged(now, LOST)
        && guard.end(Fate::Lost(time))
    {
        proxy.metrics.peers_lost.with_label_values(&[side]).inc();
        tracing::warn!(side, daemon = name, seconds = time.as_secs(), "peer lost: it acknowledges nothing");
        return;
    }
    let silent = daemon.and_then(Handle::silent_since);
    if let (Some(asked), Some(silent)) = (guard.asked(), silent)
        && let Some(time) = in_vain(asked, silent, now)
    {
        guard.end(Fate::Silent(time));
    }
}

/// For how long a request has waited since it was sent, if there is no point in waiting longer. A daemon that is
/// merely slow may be at work on what it was asked before it fell silent.
fn in_vain(asked: Asked, silent: Instant, now: Instant) -> Option<Duration> {
    let waited = now.saturating_duration_since(asked.sent);
    let over = match asked.pace {
        Pace::AtOnce => waited >= PROMPT,
        Pace::Soon => waited >= PATIENT && now.saturating_duration_since(silent) >= PATIENT,
        Pace::Long => waited >= PATIENT && silent < asked.since,
    };
    over.then_some(waited)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_daemon_may_be_at_work_on_is_waited_for() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let asked = |pace| Asked { since: at(10), sent: at(10), pace };
        let quick = asked(Pace::AtOnce);
        assert_eq!(in_vain(quick, at(12), at(11)), None);
        assert_eq!(in_vain(quick, at(12), at(13)), Some(Duration::from_secs(3)));
        let soon = asked(Pace::Soon);
        assert_eq!(in_vain(soon, at(12), at(21)), None, "a busy disk");
        assert_eq!(in_vain(soon, at(12), at(22)), Some(Duration::from_secs(12)));
        let long = asked(Pace::Long);
        assert_eq!(in_vain(long, at(12), at(10_000)), None, "a build that was under way");
        assert_eq!(in_vain(long, at(5), at(19)), None);
        assert_eq!(in_vain(long, at(5), at(20)), Some(Duration::from_secs(10)), "a build that came too late");
        let upload = Asked { sent: at(60), ..long };
        assert_eq!(in_vain(upload, at(5), at(69)), None, "its context is still being taken");
        assert_eq!(in_vain(upload, at(5), at(70)), Some(Duration::from_secs(10)));
    }

    #[test]
    fn the_dead_are_forgotten_and_the_living_are_not() {
        let sweeper = Sweeper::default();
        let (dead, living) = (sweeper.watch(None), sweeper.watch(None));
        drop(dead);
        assert_eq!(sweeper.watched().iter().filter(|w| w.guard.strong_count() > 0).count(), 1);
        drop(living);
    }
}
