//! The watch on one daemon: probes it, learns what is on it, follows its events.
//!
//! ```text
//! contact: /_ping, /version, /info ──fail──▶ probe failed, again soon
//!    │ ok
//! subscribe to /events, then list everything (so that nothing falls between the two)
//!    │
//! ready: probe every few seconds, apply events as they come
//!    │ events end, or it is another daemon now
//!    └──▶ contact
//! ```

use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::Instant;

use super::about::{self, About, DaemonEvent, Told};
use super::client::{self, CallError};
use super::deep::{self, Kinship};
use super::{Handle, Pool, survey};
use crate::engine::model::{Event, Facts, Probe};

/// Between two attempts to reach a daemon that is not there (yet): a local dockerd is ready in 1–3 s, and the
/// user waits for it.
const RETRY: Duration = Duration::from_millis(200);
/// Lists of a busy daemon with thousands of containers take longer than a probe may.
const LIST_DEADLINE: Duration = Duration::from_secs(20);
/// Between two lists of a daemon's containers. Events tell of each at once; a list mends what they missed.
const RECOUNT: Duration = Duration::from_secs(30);
/// A list that a request waits for.
pub(super) const QUICK_LIST_DEADLINE: Duration = Duration::from_secs(2);
/// After a list that came too late, requests go on without one for so long.
const WITHOUT_LIST: Duration = Duration::from_secs(10);

/// Two daemons that do not tell what they are to each other are asked again after this time.
const UNSURE: Duration = Duration::from_secs(10);

/// Watches `handle` until it is aborted.
pub(super) async fn watch(pool: Arc<Pool>, handle: Arc<Handle>) {
    let deep = async {
        loop {
            let again = deep::next_sweep(&handle);
            tokio::select! {
                () = handle.deep.notified() => deep::probe(&pool, &handle).await,
                () = handle.sweep.notified() => deep::sweep(&handle).await,
                () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {
                    deep::sweep(&handle).await;
                }
            }
        }
    };
    tokio::join!(meet(&pool, &handle), deep, survey::survey(&pool, &handle));
}

async fn meet(pool: &Arc<Pool>, handle: &Handle) {
    let mut identity: Option<String> = None;
    let mut told = None;
    loop {
        match contact(pool, handle, &mut identity).await {
            Ok((facts, events)) => {
                told = None;
                let met = Instant::now();
                probed(pool, handle, Probe::Answered(facts));
                pool.meet(handle);
                handle.sweep.notify_one();
                handle.survey.notify_one();
                follow(pool, handle, events, &mut identity).await;
                // Something between that cuts every stream at once is no reason to list without a pause.
                tokio::time::sleep_until(met + RETRY).await;
            }
            Err(error) => {
                unanswered(handle, &error);
                // A daemon that starts is refused again and again, and then answers. A certificate that does not fit
                // goes on not to.
                let misfit = error.to_string();
                if misfit.contains("TLS: ") && told.as_ref() != Some(&misfit) {
                    tracing::warn!(daemon = %handle.id, "not used: {misfit}");
                    told = Some(misfit);
                }
                probed(pool, handle, failed(&error));
                if matches!(error, CallError::Refused(_)) {
                    pool.meet(handle);
                }
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => {}
                    () = handle.wake.notified() => {}
                }
            }
        }
    }
}

fn failed(error: &CallError) -> Probe {
    match error {
        CallError::Refused(_) => Probe::Refused(error.to_string()),
        _ => Probe::Failed(error.to_string()),
    }
}

/// Counts the probes that had no answer at all; [`probed`] forgets them with the first that had one.
fn unanswered(handle: &Handle, error: &CallError) {
    let mut silence = super::lock(&handle.silence);
    match error {
        CallError::Timeout(_) => silence.get_or_insert((std::time::Instant::now(), 0)).1 += 1,
        _ => *silence = None,
    }
}

fn probed(pool: &Pool, handle: &Handle, probe: Probe) {
    if matches!(probe, Probe::Answered(_)) {
        *super::lock(&handle.silence) = None;
    }
    let outcome = match &probe {
        Probe::Answered(_) => "answered",
        Probe::Failed(_) => "failed",
        Probe::Refused(_) => "refused",
    };
    pool.metrics.probes.with_label_values(&["info", outcome]).inc();
    pool.event(Event::Probed { daemon: handle.id.clone(), probe });
}

/// Meets a daemon, for the first time or again: who it is, what it has, and what happens from now on.
async fn contact(
    pool: &Arc<Pool>,
    handle: &Handle,
    identity: &mut Option<String>,
) -> Result<(Facts, Incoming), CallError> {
    let deadline = pool.config().probe_deadline;
    let (ping, _) = client::get(&handle.endpoint, "/_ping", deadline).await?;
    // It answers, though perhaps slowly: nobody's request is in vain.
    *super::lock(&handle.silence) = None;
    let version: Value = client::json(&handle.endpoint, "/version", deadline).await?;
    let info = inform(pool, handle).await?;
    let facts = about::facts(&info, &version);
    recognise(pool, handle, identity, &facts);
    merge(pool, handle, &facts).await;
    let events = client::call(&handle.endpoint, Method::GET, "/events", None);
    let events = tokio::time::timeout(deadline, events).await.map_err(|_| CallError::Timeout(deadline))??;
    if !events.status().is_success() {
        return Err(CallError::Status { path: "/events".into(), status: events.status().as_u16() });
    }
    let began = pool.now();
    let list = |path: &'static str| client::json::<Value>(&handle.endpoint, path, LIST_DEADLINE);
    let (containers, networks, volumes, images) = tokio::try_join!(
        list("/containers/json?all=1"),
        list("/networks"),
        list("/volumes"),
        list("/images/json")
    )?;
    let inventory = about::inventory(&containers, &networks, &volumes, &images);
    pool.event(Event::Inventory { daemon: handle.id.clone(), began, inventory });
    pool.know(handle, About::new(&ping, version));
    Ok((facts, events.into_body()))
}

/// `/info`, and how long it took.
async fn inform(pool: &Pool, handle: &Handle) -> Result<about::Info, CallError> {
    let asked = Instant::now();
    let info: about::Info = client::json(&handle.endpoint, "/info", pool.config().probe_deadline).await?;
    pool.event(Event::Timed { daemon: handle.id.clone(), took: asked.elapsed() });
    super::lock(&handle.holds).images = info.images;
    *super::lock(&handle.root) = Some(&info.root).filter(|root| !root.is_empty()).map(Into::into);
    Ok(info)
}

/// Another engine id at the same address is another daemon: what the sessions had there is lost.
fn recognise(pool: &Pool, handle: &Handle, identity: &mut Option<String>, facts: &Facts) {
    if identity.as_ref().is_some_and(|known| *known != facts.engine_id) {
        tracing::warn!(daemon = %handle.id, "another daemon answers at this address now");
        pool.event(Event::Replaced { daemon: handle.id.clone() });
    }
    *identity = Some(facts.engine_id.clone());
}

/// Applies events and probes until the events end or the daemon is another.
async fn follow(pool: &Arc<Pool>, handle: &Handle, mut events: Incoming, identity: &mut Option<String>) {
    let mut lines = Lines::default();
    let mut next = Instant::now() + pool.until_probe(handle);
    let mut probe = None;
    // Beside the probes: a daemon that is slow to list must be found out in time all the same.
    let mut list = None;
    let mut count = None;
    let mut recount = Instant::now() + RECOUNT;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(recount), if count.is_none() => count = Some(Box::pin(list_containers(pool, handle))),
            () = pending_or(&mut count) => (count, recount) = (None, Instant::now() + RECOUNT),
            frame = events.frame() => match frame {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        lines.feed(&data, |line| take_line(pool, handle, line));
                    }
                }
                // The daemon stopped, or something between cut the stream: meet it again.
                _ => return,
            },
            () = tokio::time::sleep_until(next), if probe.is_none() => {
                probe = Some(Box::pin(inform(pool, handle)));
            }
            () = handle.wake.notified(), if probe.is_none() => {
                probe = Some(Box::pin(inform(pool, handle)));
            }
            () = handle.relist.notified(), if list.is_none() => list = Some(Box::pin(list_images(pool, handle, LIST_DEADLINE))),
            () = pending_or(&mut list) => list = None,
            result = pending_or(&mut probe) => {
                probe = None;
                match result {
                    Ok(info) => {
                        if identity.as_ref().is_some_and(|known| *known != info.id) {
                            return;
                        }
                        let facts = pool.facts(handle, &info);
                        probed(pool, handle, Probe::Answered(facts));
                        next = Instant::now() + pool.until_probe(handle);
                    }
                    Err(error) => {
                        let refused = matches!(error, CallError::Refused(_));
                        unanswered(handle, &error);
                        probed(pool, handle, failed(&error));
                        if refused {
                            return;
                        }
                        // A daemon that is slow once is asked again at once; the deadline paces this.
                        let pause = if matches!(error, CallError::Timeout(_)) { Duration::ZERO } else { RETRY };
                        next = Instant::now() + pause;
                    }
                }
            }
        }
    }
}

/// What is under way, if anything is.
async fn pending_or<F: Future + Unpin>(under_way: &mut Option<F>) -> F::Output {
    match under_way {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// What an event may say: its container's labels are in it.
const MAX_LINE: usize = 16 << 20;

/// Cuts a stream into lines. One beyond [`MAX_LINE`] is left out.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    begun: Vec<u8>,
    skip: bool,
}

impl Lines {
    pub(crate) fn feed(&mut self, data: &[u8], mut line: impl FnMut(&[u8])) {
        for part in data.split_inclusive(|b| *b == b'\n') {
            self.skip |= self.begun.len() + part.len() > MAX_LINE;
            if self.skip {
                self.begun = Vec::new();
            } else {
                self.begun.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                if !std::mem::take(&mut self.skip) {
                    line(&self.begun);
                }
                self.begun.clear();
            }
        }
    }
}

fn take_line(pool: &Pool, handle: &Handle, line: &[u8]) {
    let Ok(event) = serde_json::from_slice::<DaemonEvent>(line) else { return };
    let project = event.project();
    let learn = |fact| pool.event(Event::Learned { daemon: handle.id.clone(), open: None, fact });
    match event.told() {
        Some(Told::Fact(fact)) => learn(fact),
        Some(Told::ImagesChanged) => handle.relist.notify_one(),
        None => {}
    }
    project.into_iter().for_each(learn);
}

/// Whether a request may wait for a list of this daemon's images.
pub(super) fn lists_quickly(handle: &Handle) -> bool {
    super::lock(&handle.unlisted).is_none_or(|at| at.elapsed() > WITHOUT_LIST)
}

/// Lists the images of a daemon anew. A failure changes nothing: the next probe will tell.
pub(super) async fn list_images(pool: &Pool, handle: &Handle, deadline: Duration) {
    let began = pool.now();
    let images = client::json::<Value>(&handle.endpoint, "/images/json", deadline).await;
    *super::lock(&handle.unlisted) = images.is_err().then(std::time::Instant::now);
    match images {
        Ok(images) => {
            let images = about::listed_images(&images);
            pool.event(Event::Images { daemon: handle.id.clone(), began, images });
        }
        // A daemon with thousands of images takes longer than a request waits: its watch has the time.
        Err(_) if deadline < LIST_DEADLINE => handle.relist.notify_one(),
        Err(_) => {}
    }
}

/// Lists the containers of a daemon anew: what runs there is load, whether an event told of it or not.
async fn list_containers(pool: &Pool, handle: &Handle) {
    let began = pool.now();
    let list = client::json::<Value>(&handle.endpoint, "/containers/json?all=1", LIST_DEADLINE).await;
    if let Ok(list) = list {
        let (containers, projects) = about::containers(&list);
        pool.event(Event::Containers { daemon: handle.id.clone(), began, containers, projects });
    }
}

/// If this daemon has the engine id of another one, finds out what they are to each other. Equal ids alone prove
/// nothing: 20.10 daemons of one host share `/etc/docker/key.json`.
async fn merge(pool: &Arc<Pool>, handle: &Handle, facts: &Facts) {
    if super::lock(&handle.unsure).is_some_and(|at| at.elapsed() < UNSURE) {
        return;
    }
    let mut unsure = false;
    for other in pool.twins(handle, &facts.engine_id) {
        match deep::kinship(pool, handle, &other).await {
            Kinship::Same => {
                tracing::info!(daemon = %handle.id, same_as = %other.id, "one daemon listed twice: merged");
                pool.alias(handle, &other.id);
                return;
            }
            Kinship::Shared => {
                pool.event(Event::Shared { one: handle.id.clone(), other: other.id.clone() });
            }
            Kinship::Strangers => {
                pool.event(Event::Distinct { one: handle.id.clone(), other: other.id.clone() });
            }
            Kinship::Unknown => {
                unsure = true;
                tracing::warn!(
                    daemon = %handle.id, other = %other.id,
                    "two daemons have the same engine id, and it cannot be told whether they share a data root"
                );
            }
        }
    }
    *super::lock(&handle.unsure) = unsure.then(std::time::Instant::now);
    if !unsure {
        pool.distinct(handle);
    }
}

impl Pool {
    /// The other daemons that gave this engine id and are no aliases themselves.
    fn twins(&self, handle: &Handle, engine_id: &str) -> Vec<Arc<Handle>> {
        let mut state = self.lock();
        // Noted under the lock that the others are read under: of two that meet at once, the second sees the
        // first.
        if let Some(member) = state.daemons.get_mut(&handle.id) {
            member.engine_id = engine_id.to_string();
        }
        state
            .daemons
            .values()
            .filter(|m| m.handle.id != handle.id && m.engine_id == engine_id && m.alias_of.is_none())
            .map(|m| m.handle.clone())
            .collect()
    }

    /// Leaves `handle` out of the pool because it is `other`. Of two that find each other at the same time, the
    /// second stays.
    pub(super) fn alias(self: &Arc<Self>, handle: &Handle, other: &crate::engine::model::DaemonId) {
        let mut state = self.lock();
        if state.daemons.get(other).is_none_or(|m| m.alias_of.is_some()) {
            return;
        }
        if let Some(member) = state.daemons.get_mut(&handle.id) {
            member.alias_of = Some(other.clone());
        }
        self.reconcile(&mut state);
    }

    /// `handle` is no other's second name, or no longer.
    pub(super) fn distinct(self: &Arc<Self>, handle: &Handle) {
        let mut state = self.lock();
        let alias = state.daemons.get_mut(&handle.id).and_then(|m| m.alias_of.take());
        if alias.is_some() {
            self.reconcile(&mut state);
        }
    }

    /// How long after a good probe the next one is due.
    fn until_probe(&self, handle: &Handle) -> Duration {
        let interval = self.config().probe_interval;
        let state = self.lock();
        let daemon = state.engine.daemons().find(|d| d.id == handle.id);
        daemon.map_or(interval, |d| d.until_probe(interval))
    }

    /// Facts from a probe's `/info`, with the versions of the last contact.
    fn facts(&self, handle: &Handle, info: &about::Info) -> Facts {
        let version = super::lock(&handle.about).as_ref().map(|a| a.version.clone()).unwrap_or_default();
        about::facts(info, &version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_come_and_bounded() {
        let (mut lines, mut seen) = (Lines::default(), Vec::new());
        for data in ["{\"a\":\"\u{e4}", "\"}\n\n{", "}\nrest"] {
            lines.feed(data.as_bytes(), |line| seen.push(String::from_utf8(line.to_vec()).unwrap()));
        }
        assert_eq!(seen, ["{\"a\":\"\u{e4}\"}\n", "\n", "{}\n"]);
        let mut count = 0;
        for _ in 0..17 {
            lines.feed(&vec![b'x'; 1 << 20], |_| count += 1);
        }
        assert!(lines.begun.is_empty());
        lines.feed(b"\nnext\n", |line| {
            assert_eq!(line, b"next\n");
            count += 1;
        });
        assert_eq!(count, 1);
    }
}
