//! Whether a daemon may end: what the preStop of its pod asks.

use std::time::Duration;

use super::Pool;
use crate::engine::departure::Departure;
use crate::engine::model::*;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// For how long after one question the next is waited for, until the daemon takes sessions again.
const AGAIN: Duration = Duration::from_secs(10);

impl Pool {
    /// Closes a daemon to new sessions, because it is about to end, and waits until nobody works there, `wait` at the
    /// longest. Asked again and again until it may end.
    pub async fn departs(&self, daemon: &DaemonId, wait: Duration) -> Departure {
        let until = self.now() + wait;
        self.event(Event::Leaving { daemon: daemon.clone(), until: until + AGAIN });
        loop {
            let departure = self.let_go(daemon);
            if !matches!(departure, Departure::Busy(_)) || self.now() >= until {
                return departure;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn let_go(&self, daemon: &DaemonId) -> Departure {
        let mut state = self.lock();
        let before = state.engine.departure(daemon);
        if before != Departure::Idle {
            return before;
        }
        self.handle(&mut state, Event::LetGo { daemon: daemon.clone() });
        tracing::info!(%daemon, "nobody works on the daemon: it may end");
        state.engine.departure(daemon)
    }
}
