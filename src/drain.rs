//! Counts connections and ends them in order: no new ones, idle ones at once, open ones within a grace, the
//! rest by force.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Shared by all that has to end when the proxy does.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    tasks: TaskTracker,
    leaving: Arc<AtomicBool>,
    stopping: Signal,
    aborted: Signal,
}

/// Given once. The flag is what is looked at on every request and every wake-up: looking at a token takes a
/// lock that all connections share.
#[derive(Debug, Clone, Default)]
pub struct Signal {
    given: Arc<AtomicBool>,
    token: CancellationToken,
}

impl Signal {
    /// Gives it.
    pub fn give(&self) {
        self.given.store(true, Ordering::Release);
        self.token.cancel();
    }

    /// Whether it has been given.
    pub fn is_given(&self) -> bool {
        self.given.load(Ordering::Acquire)
    }

    /// Runs `work`, which looks at the signal by itself, and wakes it when the signal is given.
    /// It is pinned by the caller, or there would be room for it twice.
    pub async fn wakes<T>(&self, mut work: Pin<&mut impl Future<Output = T>>) -> T {
        let mut wake = pin!(self.token.cancelled());
        let mut watching = false;
        poll_fn(|cx| {
            // Asked once, as in [`Drain::spawn`].
            if !watching {
                watching = true;
                let _ = wake.as_mut().poll(cx);
            }
            work.as_mut().poll(cx)
        })
        .await
    }

    /// Runs `work`, and drops it where it stands when the signal is given: `None` then.
    pub async fn cuts<T>(&self, mut work: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        self.wakes(pin!(poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending if self.is_given() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        })))
        .await
    }
}

impl Drain {
    /// Nothing runs and nothing stops.
    pub fn new() -> Self {
        Drain::default()
    }

    /// Runs a connection. It is woken when the drain begins, and dropped where it stands when the grace is
    /// over.
    pub fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let Drain { stopping, aborted, .. } = self.clone();
        // Boxed, or the task would have room for it twice: as it is handed over, and where it is pinned.
        let mut connection = Box::pin(connection);
        self.tasks.spawn(async move {
            let mut wake = pin!(stopping.token.cancelled());
            let mut cut = pin!(aborted.token.cancelled());
            let mut watching = false;
            poll_fn(|cx| {
                // Asked once, so that they wake this task, whose waker never changes.
                if !watching {
                    watching = true;
                    let _ = (wake.as_mut().poll(cx), cut.as_mut().poll(cx));
                }
                if aborted.is_given() { Poll::Ready(()) } else { connection.as_mut().poll(cx) }
            })
            .await;
        });
    }

    /// Waits for what an idle connection waits for; None when the drain begins first. Only within a task of
    /// [`Drain::spawn`], which wakes it then.
    pub async fn unless_stopping<T>(&self, idle: impl Future<Output = T>) -> Option<T> {
        let mut idle = pin!(idle);
        poll_fn(|cx| match idle.as_mut().poll(cx) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending if self.is_stopping() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    /// Completes when the drain has begun.
    pub async fn stopping(&self) {
        self.stopping.token.cancelled().await;
    }

    /// Whether the drain has begun.
    pub fn is_stopping(&self) -> bool {
        self.stopping.is_given()
    }

    /// Connections that are open.
    pub fn open(&self) -> usize {
        self.tasks.len()
    }

    /// Clients should go elsewhere from now on; those that come are served all the same.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    /// Whether clients should go elsewhere.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire) || self.is_stopping()
    }

    /// Begins the drain: no new connections, idle ones end.
    pub fn stop(&self) {
        self.stopping.give();
    }

    /// Begins the drain and waits for its end, at most `grace`. Returns how many connections were cut.
    pub async fn finish(&self, grace: Duration) -> usize {
        self.stop();
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait()).await.is_ok() {
            return 0;
        }
        let cut = self.tasks.len();
        self.aborted.give();
        self.tasks.wait().await;
        cut
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_ends_in_time_is_not_cut() {
        let drain = Drain::new();
        let inner = drain.clone();
        drain.spawn(async move { inner.stopping().await });
        let inner = drain.clone();
        drain.spawn(
            async move { assert_eq!(inner.unless_stopping(std::future::pending::<()>()).await, None) },
        );
        tokio::task::yield_now().await;
        assert_eq!(drain.finish(Duration::from_secs(60)).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_is_cut_after_the_grace() {
        let drain = Drain::new();
        drain.spawn(std::future::pending());
        assert_eq!(drain.finish(Duration::from_secs(60)).await, 1);
        assert_eq!(drain.open(), 0);
    }
}
