//! What the page and the commands follow: events as lines, and the whole pool as server-sent events. One snapshot is made
//! for all watchers, when something has happened or a second has passed, and none while nobody watches. Watchers have
//! places of their own, and one that does not read is dropped: nobody keeps probes or the operator out.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::pool::Pool;
use crate::pool::advice::{Advice, advice};
use crate::pool::journal::Entry;
use crate::pool::status::Status;
use crate::telemetry;

/// How many watch at the same time. Their descriptors are counted in `proxy/limits.rs`.
pub const WATCHERS: usize = 32;
/// How long one may take to read what it is sent.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two snapshots, at the least and at the most.
const SOONEST: Duration = Duration::from_millis(300);
const LATEST: Duration = Duration::from_secs(1);
/// A large pool's snapshot is made less often: so many bytes a second, whoever watches.
const BYTES_PER_SECOND: u64 = 512 * 1024;
/// How many of each the page shows; the rest is counted.
const DAEMONS: usize = 200;
const SESSIONS: usize = 200;
const TICKETS: usize = 100;
const ENTRIES: usize = 60;

/// A body that somebody follows: its lines, and its end.
pub struct Followed {
    /// What is sent.
    pub lines: mpsc::Receiver<Bytes>,
    /// Cancelled when nothing more is sent: then the connection may go, read or not.
    pub over: CancellationToken,
}

/// The watchers of one admin side.
pub struct Feed {
    pool: Arc<Pool>,
    places: Arc<Semaphore>,
    snapshots: watch::Sender<Bytes>,
    came: Arc<Notify>,
    maker: JoinHandle<()>,
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.maker.abort();
    }
}

/// The pool as the page shows it.
#[derive(Serialize)]
struct View {
    now: u64,
    advice: Vec<Advice>,
    #[serde(flatten)]
    status: Status,
    totals: Totals,
    events: Vec<Entry>,
}

/// How many there are, shown or not.
#[derive(Serialize)]
struct Totals {
    daemons: usize,
    sessions: usize,
    waiting: usize,
    slots: u32,
    used: u32,
    ready: usize,
}

impl Feed {
    /// Nobody watches yet.
    pub fn new(pool: Arc<Pool>) -> Self {
        let snapshots = watch::Sender::new(Bytes::new());
        let came = Arc::new(Notify::new());
        let maker = tokio::spawn(make(pool.clone(), snapshots.clone(), came.clone()));
        Feed { pool, places: Arc::new(Semaphore::new(WATCHERS)), snapshots, came, maker }
    }

    /// The pool, again and again, as server-sent events; `None` if too many watch.
    pub fn watch(&self) -> Option<Followed> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let mut snapshots = self.snapshots.subscribe();
        // A first one is made for whoever comes, however old the last is.
        snapshots.mark_unchanged();
        self.came.notify_one();
        Some(follow(place, move |lines| async move {
            // A browser that is cut off comes back after this.
            let mut next = Some(Bytes::from_static(b"retry: 2000\n\n"));
            loop {
                if let Some(next) = next.take().filter(|next| !next.is_empty())
                    && !send(&lines, next).await
                {
                    return;
                }
                tokio::select! {
                    changed = snapshots.changed() => match changed {
                        Ok(()) => next = Some(snapshots.borrow_and_update().clone()),
                        Err(_) => return,
                    },
                    () = lines.closed() => return,
                }
            }
        }))
    }

    /// What has happened, and with it what happens from now on, as JSON lines; `None` if too many watch.
    pub fn events(&self, after: u64) -> Option<Followed> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let pool = self.pool.clone();
        Some(follow(place, move |lines| async move {
            let mut latest = pool.latest_entry();
            let mut after = after;
            loop {
                latest.mark_unchanged();
                let entries = pool.entries(after);
                if let Some(last) = entries.last() {
                    after = last.number;
                    let text: String = entries.iter().map(super::line).collect();
                    if !send(&lines, text.into()).await {
                        return;
                    }
                }
                tokio::select! {
                    changed = latest.changed() => if changed.is_err() { return },
                    () = lines.closed() => return,
                }
            }
        }))
    }
}

/// Whether it was read in time.
async fn send(lines: &mpsc::Sender<Bytes>, bytes: Bytes) -> bool {
    matches!(timeout(PATIENCE, lines.send(bytes)).await, Ok(Ok(())))
}

fn follow<F, Fut>(place: OwnedSemaphorePermit, tell: F) -> Followed
where
    F: FnOnce(mpsc::Sender<Bytes>) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let (sender, lines) = mpsc::channel(1);
    let over = CancellationToken::new();
    let (telling, end) = (tell(sender), over.clone().drop_guard());
    tokio::spawn(async move {
        let _kept = (place, end);
        telling.await;
    });
    Followed { lines, over }
}

/// Makes a snapshot when there is something new, for as long as anybody watches.
async fn make(pool: Arc<Pool>, snapshots: watch::Sender<Bytes>, came: Arc<Notify>) {
    let mut happened = pool.latest_entry();
    loop {
        if snapshots.receiver_count() == 0 {
            came.notified().await;
        }
        happened.mark_unchanged();
        let began = Instant::now();
        let text = snapshot(&pool);
        let pause = Duration::from_millis(text.len() as u64 * 1000 / BYTES_PER_SECOND).max(SOONEST);
        snapshots.send_replace(text);
        sleep_until(began + pause).await;
        tokio::select! {
            _ = happened.changed() => {}
            () = came.notified() => {}
            () = sleep_until(began + LATEST) => {}
        }
    }
}

/// The pool now, as one server-sent event.
fn snapshot(pool: &Pool) -> Bytes {
    let view = view(pool.status(), pool.entries(0));
    match serde_json::to_string(&view) {
        // JSON holds no bare line end: one `data:` line is the whole of it.
        Ok(json) => format!("event: pool\ndata: {json}\n\n").into(),
        Err(error) => {
            tracing::error!("the pool cannot be shown: {error}");
            Bytes::new()
        }
    }
}

/// What fits the page of all this, what needs attention first.
fn view(mut status: Status, mut events: Vec<Entry>) -> View {
    let advice = advice(&status);
    let totals = Totals {
        daemons: status.daemons.len(),
        sessions: status.sessions.len(),
        waiting: status.queue.tickets.len(),
        slots: status.daemons.iter().map(|d| d.slots).sum(),
        used: status.daemons.iter().map(|d| d.used).sum(),
        ready: status.daemons.iter().filter(|d| d.takes_sessions()).count(),
    };
    status.daemons.sort_by_key(|d| d.takes_sessions());
    status.daemons.truncate(DAEMONS);
    status.sessions.sort_by_key(|s| (s.slots == 0, !s.overdue));
    status.sessions.truncate(SESSIONS);
    status.queue.tickets.truncate(TICKETS);
    events.drain(..events.len().saturating_sub(ENTRIES));
    View { now: telemetry::date(), advice, status, totals, events }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    fn pool() -> Arc<Pool> {
        Pool::new(crate::pool::Config::default(), Metrics::new(prometheus::Registry::new()).unwrap(), 1)
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_watches_hears_of_the_pool_at_once_and_then_again() {
        let feed = Feed::new(pool());
        let mut watching = feed.watch().unwrap();
        assert_eq!(watching.lines.recv().await.unwrap(), "retry: 2000\n\n");
        for _ in 0..3 {
            let told = watching.lines.recv().await.unwrap();
            assert!(told.starts_with(b"event: pool\ndata: {") && told.ends_with(b"}\n\n"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_is_dropped_and_gives_the_place_back() {
        let feed = Feed::new(pool());
        let kept: Vec<Followed> = (0..WATCHERS).map(|_| feed.watch().unwrap()).collect();
        assert!(feed.watch().is_none(), "there are so many places");
        tokio::time::sleep(3 * PATIENCE).await;
        assert!(kept.iter().all(|followed| followed.over.is_cancelled()));
        assert!(feed.watch().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_gives_the_place_back_at_once() {
        let feed = Feed::new(pool());
        let followed = feed.events(0).unwrap();
        drop(followed.lines);
        followed.over.cancelled().await;
        assert_eq!(feed.places.available_permits(), WATCHERS);
    }
}
