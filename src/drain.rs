//! Counts connections and ends them in order: no new ones, idle ones at once, open ones within a grace, the
//! rest by force.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Shared by all that has to end when the proxy does.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    tasks: TaskTracker,
    stopping: CancellationToken,
    aborted: CancellationToken,
}

impl Drain {
    /// Nothing runs and nothing stops.
    pub fn new() -> Self {
        Drain::default()
    }

    /// Runs a connection. It is dropped where it stands when the grace is over.
    pub fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let aborted = self.aborted.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = connection => {}
                () = aborted.cancelled() => {}
            }
        });
    }

    /// Completes when the drain has begun.
    pub async fn stopping(&self) {
        self.stopping.cancelled().await;
    }

    /// Whether the drain has begun.
    pub fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Connections that are open.
    pub fn open(&self) -> usize {
        self.tasks.len()
    }

    /// Begins the drain and waits for its end, at most `grace`. Returns how many connections were cut.
    pub async fn finish(&self, grace: Duration) -> usize {
        self.stopping.cancel();
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait()).await.is_ok() {
            return 0;
        }
        let cut = self.tasks.len();
        self.aborted.cancel();
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
