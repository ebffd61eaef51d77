//! `POST /build/cancel?id=` for a build that waits.
//!
//! The BuildKit client of CLI 20.10 ends a build by this call, and by nothing else: on Ctrl-C it leaves its `/build`
//! open until that is answered (measured). A build that has its daemon is cancelled there; one that waits, here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::engine::model::SessionKey;
use crate::error::{Error, Kind};

/// The builds that wait and can be cancelled, by session and `buildid`.
#[derive(Debug, Default)]
pub struct WaitingBuilds(Mutex<HashMap<(SessionKey, String), Arc<Notify>>>);

/// One of them; it can be cancelled until this is dropped.
#[derive(Debug)]
pub struct WaitingBuild<'a> {
    builds: &'a WaitingBuilds,
    name: (SessionKey, String),
    cancel: Arc<Notify>,
}

impl WaitingBuilds {
    /// A build begins to wait.
    pub fn enter(&self, key: &SessionKey, id: &str) -> WaitingBuild<'_> {
        let (name, cancel) = ((key.clone(), id.to_string()), Arc::new(Notify::new()));
        self.lock().insert(name.clone(), cancel.clone());
        WaitingBuild { builds: self, name, cancel }
    }

    /// Cancels the build, if it waits.
    pub fn cancel(&self, key: &SessionKey, id: &str) -> bool {
        let cancel = self.lock().get(&(key.clone(), id.to_string())).cloned();
        cancel.inspect(|cancel| cancel.notify_one()).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(SessionKey, String), Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WaitingBuild<'_> {
    /// What the wait leads to, or the word that it was cancelled.
    ///
    /// # Errors
    /// The wait's own, and [`Kind::Cancelled`].
    pub async fn unless_cancelled<T>(
        &self,
        wait: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            // The word first: who was told that its build is cancelled must not see it start.
            biased;
            () = self.cancel.notified() => Err(Error::new(Kind::Cancelled, "the build was cancelled while it waited")),
            result = wait => result,
        }
    }
}

impl Drop for WaitingBuild<'_> {
    fn drop(&mut self) {
        let mut builds = self.builds.lock();
        // The same id again is another build.
        if builds.get(&self.name).is_some_and(|cancel| Arc::ptr_eq(cancel, &self.cancel)) {
            builds.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_build_is_cancelled_by_its_session_while_it_waits() {
        let builds = WaitingBuilds::default();
        let build = builds.enter(&"a".into(), "1");
        assert!(!builds.cancel(&"b".into(), "1"), "a stranger's id");
        assert!(!builds.cancel(&"a".into(), "2"));
        assert_eq!(build.unless_cancelled(async { Ok(7) }).await.unwrap(), 7);
        assert!(builds.cancel(&"a".into(), "1"));
        let error = build.unless_cancelled(std::future::pending::<Result<(), Error>>()).await.unwrap_err();
        assert_eq!(error.kind, Kind::Cancelled);
        drop(build);
        assert!(!builds.cancel(&"a".into(), "1"));
    }
}
