//! The attempts of one request to reach a daemon, and what follows from one that has failed.

use std::time::{Duration, Instant};

use crate::engine::model::DaemonId;

/// How many daemons a request tries before it gives up. Each that refuses is ejected, so in a pool with
/// anybody left this finds one.
const DAEMONS: usize = 8;
/// Between two attempts to reach the same daemon.
const PAUSE: Duration = Duration::from_millis(20);

/// What the request has tried so far.
#[derive(Debug)]
pub struct Attempts {
    tried: Vec<DaemonId>,
    /// How long it is still given a daemon that it could not reach.
    patience: Duration,
    /// Since when it has been.
    since: Option<Instant>,
}

/// What a request does that did not reach its daemon.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Its client is told.
    GiveUp,
    /// Another daemon.
    Elsewhere,
    /// The same question to the pool after this time.
    Again(Duration),
}

impl Attempts {
    /// None yet. A connection to a daemon takes `deadline` at most.
    pub fn new(deadline: Duration) -> Attempts {
        Attempts { tried: Vec::new(), patience: deadline + Duration::from_secs(1), since: None }
    }

    /// It could not reach `daemon`, to which its session was `bound` before or not.
    ///
    /// The pool gives the same daemon again while other requests that the session began at the same time (a BuildKit
    /// client opens several connections at once) have not tried it to the end: one of them may get through, and then
    /// the session is there. When none does, the binding is undone.
    pub fn failed(&mut self, daemon: &DaemonId, bound: bool, now: Instant) -> Next {
        if bound {
            return Next::GiveUp;
        }
        if self.tried.contains(daemon) {
            let since = *self.since.get_or_insert(now);
            let over = now.saturating_duration_since(since) >= self.patience;
            return if over { Next::GiveUp } else { Next::Again(PAUSE) };
        }
        if self.tried.len() >= DAEMONS {
            return Next::GiveUp;
        }
        self.tried.push(daemon.clone());
        self.since = None;
        Next::Elsewhere
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::super::isolation::{daemon, proxy};
    use super::super::relay::testing::{read_until, say, soon};
    use super::*;
    use crate::engine::model::{Class, Outcome, Requirements, Work};
    use crate::pool::Want;

    fn attempts() -> (Attempts, Instant) {
        (Attempts::new(Duration::from_secs(5)), Instant::now())
    }

    #[test]
    fn a_bound_session_is_never_tried_elsewhere() {
        let (mut attempts, now) = attempts();
        assert_eq!(attempts.failed(&"a".into(), true, now), Next::GiveUp);
    }

    #[test]
    fn each_daemon_is_tried_up_to_a_limit() {
        let (mut attempts, now) = attempts();
        for i in 0..DAEMONS {
            assert_eq!(attempts.failed(&i.to_string().as_str().into(), false, now), Next::Elsewhere);
        }
        assert_eq!(attempts.failed(&"another".into(), false, now), Next::GiveUp);
    }

    #[test]
    fn the_same_daemon_is_asked_for_again_until_the_sessions_other_requests_must_have_tried_it() {
        let (mut attempts, now) = attempts();
        let at = |seconds: u64| now + Duration::from_secs(seconds);
        assert_eq!(attempts.failed(&"a".into(), false, now), Next::Elsewhere);
        assert_eq!(attempts.failed(&"a".into(), false, at(1)), Next::Again(PAUSE));
        assert_eq!(attempts.failed(&"a".into(), false, at(6)), Next::Again(PAUSE));
        assert_eq!(attempts.failed(&"a".into(), false, at(7)), Next::GiveUp);
        // A daemon that one of them has been sent to meanwhile is a new one.
        assert_eq!(attempts.failed(&"b".into(), false, at(7)), Next::Elsewhere);
        assert_eq!(attempts.failed(&"b".into(), false, at(8)), Next::Again(PAUSE));
    }

    #[tokio::test]
    async fn a_request_waits_for_its_sessions_others_and_goes_elsewhere_when_none_got_through() {
        let [(one, accepting_one), (two, accepting_two)] = [daemon("a").await, daemon("b").await];
        let (proxy, address) = proxy(vec![("one", one), ("two", two)]).await;
        // Another request of a new session has its grant, and has not tried it yet.
        let want = Want {
            key: "name:k".into(),
            tenant: "default".into(),
            source: None,
            inside: None,
            shares_names: false,
            class: Class::Work(Work::Resource),
            target: None,
            requirements: Requirements::default(),
        };
        let sibling = proxy.pool.acquire(&want).await.granted().await.unwrap();
        let first = sibling.daemon().id.as_str() == "one";
        let accepting = if first { accepting_one } else { accepting_two };
        accepting.abort();
        let _ = accepting.await;
        let mut client = TcpStream::connect(&address).await.unwrap();
        say(&mut client, "POST /s/k/networks/create HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\n").await;
        soon(async {
            while proxy.metrics.retries.get() == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let answered = tokio::time::timeout(PAUSE * 5, client.readable()).await;
        assert!(answered.is_err(), "it waits for the other one");
        sibling.finish(Outcome::Unreached);
        read_until(&mut client, "{}").await;
        let sessions = proxy.pool.status().sessions;
        assert_eq!(sessions.len(), 1);
        assert_eq!(sessions[0].daemon, if first { "two" } else { "one" });
        assert_eq!(proxy.metrics.retries.get(), 1);
        proxy.pool.stop();
    }
}
