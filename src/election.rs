//! Which of several proxies admits, on a real cluster: carries out what [`crate::engine::election`] decides, and what
//! follows from it.
//!
//! ```text
//! claimed → import from the predecessor → admit → own label on → others' labels off
//! lost → admit no more (at once, in the pool) → own label off
//! leaving → admit no more → release; the successor takes the label off
//! ```
//!
//! The Service is to lead somewhere at any time: without an endpoint it refuses. So for a moment two pods are labelled,
//! and both of them serve.
//!
//! The Service selects the label, so that clients reach the one that admits directly; who reaches another one is served
//! there all the same ([`crate::pool::remote`]). In the Lease's annotations are the address of its holder's admin
//! listener, and a token that opens its peers' part: whoever may read the Lease is a peer.
//!
//! Needs, in the proxy's namespace: `leases` get, create and update; `pods` list and patch.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Empty};
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::admin::token::Token;
use crate::engine::election::{Answer, Call, Claim, Election, Next, Policy, Record, Tenure};
use crate::engine::model::Time;
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::pool::remote::{self, Holder};
use crate::pool::shared::Handover;

/// On the pod of the proxy that admits, with the Lease's name for a value: what the Service selects.
pub const LABEL: &str = "dindpool.io/admits";
/// In the Lease: which proxy held it last.
const PROXY: &str = "dindpool.io/proxy";
/// In the Lease: that one's admin listener.
const ADMIN: &str = "dindpool.io/admin";
/// In the Lease: what opens it for a peer.
const TOKEN: &str = "dindpool.io/token";

/// How long a predecessor may take for one answer.
const ANSWER: Duration = Duration::from_secs(3);
/// How long it is asked again while it admits by its own clock.
const STILL: Duration = Duration::from_secs(5);
/// How long daemons of the predecessor may be unknown here.
const NEWS: Duration = Duration::from_secs(5);
/// Between two attempts at what must be done.
const AGAIN: Duration = Duration::from_millis(500);
/// How long the end waits for the release.
const RELEASE: Duration = Duration::from_secs(2);

/// What was configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The Lease's name.
    pub name: String,
    /// How long it lasts without a renewal.
    pub duration: Duration,
}

/// What the pod is told about itself (downward API).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `POD_NAME`
    pub pod: String,
    /// `POD_NAMESPACE`; without it, the kubeconfig's or the service account's.
    pub namespace: Option<String>,
    /// `POD_IP`
    pub ip: IpAddr,
}

impl Identity {
    /// From the environment.
    ///
    /// # Errors
    /// A sentence that says what is missing.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let missing =
            |name: &str| format!("--lease needs {name} in its environment (the pod's downward API)");
        let ip = given("POD_IP").ok_or_else(|| missing("POD_IP"))?;
        Ok(Identity {
            pod: given("POD_NAME").ok_or_else(|| missing("POD_NAME"))?,
            namespace: given("POD_NAMESPACE"),
            ip: ip.parse().map_err(|_| format!("POD_IP: {ip} is no address"))?,
        })
    }

    /// A name that no other process has: a container that starts again in the same pod is another proxy.
    fn name(&self) -> String {
        use std::hash::{BuildHasher, Hasher};
        let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
        format!("{}_{:08x}", self.pod, random as u32)
    }
}

/// A contest that runs.
pub struct Running {
    leave: CancellationToken,
    released: watch::Receiver<bool>,
    tasks: [JoinHandle<()>; 2],
}

impl Running {
    /// The Lease is released, and not claimed again. The pool is told afterwards.
    pub fn leave(&self) {
        self.leave.cancel();
    }

    /// Ends it.
    pub async fn stop(mut self) {
        let _ = timeout(RELEASE, self.released.wait_for(|released| *released)).await;
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Takes part for `pool`, which does not admit until it is elected. `port` is where its admin listener is.
///
/// # Errors
/// When there is no way to an API server, or no randomness.
pub async fn start(
    target: Target,
    identity: Identity,
    port: u16,
    token: Token,
    pool: Arc<Pool>,
) -> Result<Running, String> {
    let client = Client::try_default().await.map_err(|e| format!("no way to Kubernetes: {e}"))?;
    let namespace = identity.namespace.clone().unwrap_or_else(|| client.default_namespace().to_string());
    let me = identity.name();
    pool.share(&me);
    let holder = watch::Sender::new(None);
    let following = tokio::spawn(remote::follow(pool.clone(), holder.subscribe()));
    let (leave, released) = (CancellationToken::new(), watch::Sender::new(false));
    let own = Holder { name: me.clone(), address: SocketAddr::new(identity.ip, port), token };
    let contest = Contest {
        election: Election::new(me, Policy::of(target.duration)),
        origin: Instant::now(),
        leases: Api::namespaced(client.clone(), &namespace),
        last: None,
        current: None,
        predecessor: None,
        entering: None,
        checked: Instant::now(),
        holder,
        shared: Arc::new(Contender {
            labels: Labels {
                pods: Api::namespaced(client, &namespace),
                pod: identity.pod,
                lease: target.name.clone(),
            },
            own,
            metrics: pool.metrics().clone(),
            pool,
            until: Mutex::new(Instant::now()),
            entered: AtomicU64::new(0),
            policy: Policy::of(target.duration),
        }),
        target,
        leave: leave.clone(),
        leaving: false,
        released: released.clone(),
    };
    let contest = tokio::spawn(contest.run());
    Ok(Running { leave, released: released.subscribe(), tasks: [contest, following] })
}

/// What the task that takes over shares with the contest.
struct Contender {
    labels: Labels,
    own: Holder,
    pool: Arc<Pool>,
    metrics: Metrics,
    /// Until when the tenure lasts by now.
    until: Mutex<Instant>,
    /// The number of the tenure that was entered last: the pool admits.
    entered: AtomicU64,
    policy: Policy,
}

struct Contest {
    election: Election,
    origin: Instant,
    target: Target,
    leases: Api<Lease>,
    /// The Lease as it was read or written last.
    last: Option<Lease>,
    /// The tenure that is under way.
    current: Option<u64>,
    /// Who held the Lease before it was claimed.
    predecessor: Option<Holder>,
    entering: Option<JoinHandle<()>>,
    /// When the labels were looked at last.
    checked: Instant,
    holder: watch::Sender<Option<Holder>>,
    shared: Arc<Contender>,
    leave: CancellationToken,
    leaving: bool,
    released: watch::Sender<bool>,
}

impl Contest {
    fn now(&self) -> Time {
        self.origin.elapsed()
    }

    async fn run(mut self) {
        // Of a process that was here before.
        let shared = self.shared.clone();
        let cleaning = tokio::spawn(async move { shared.unlabel().await });
        loop {
            if self.leave.is_cancelled() && !self.leaving {
                self.leaving = true;
                self.election.leave(self.now());
                self.released.send_replace(self.current.is_none());
            }
            match self.election.step(self.now()) {
                Next::Ask(call) => self.ask(call).await,
                Next::Wait(until) => {
                    let until = tokio::time::Instant::from_std(self.origin + until.min(self.now() + AGAIN));
                    let leave = self.leave.clone();
                    tokio::select! {
                        () = tokio::time::sleep_until(until) => {}
                        () = leave.cancelled(), if !self.leaving => continue,
                    }
                }
            }
            self.follow().await;
            if self.current.is_some() {
                cleaning.abort();
            }
        }
    }

    async fn ask(&mut self, call: Call) {
        if let Call::Create(Claim { begins: true, .. }) | Call::Replace(_, Claim { begins: true, .. }) = call
        {
            self.predecessor = self.last.as_ref().and_then(holder_of);
        }
        let asked = self.now();
        let answer = timeout(self.shared.policy.patience, self.call(&call)).await.unwrap_or(Answer::Failed);
        if matches!((&call, &answer), (Call::Replace(_, Claim { holder: None, .. }), Answer::Wrote(_))) {
            tracing::info!(lease = self.target.name, "released");
            self.released.send_replace(true);
        }
        self.election.answered(&call, answer, asked, self.now());
    }

    async fn call(&mut self, call: &Call) -> Answer {
        let result = match call {
            Call::Read => self.leases.get_opt(&self.target.name).await,
            Call::Create(claim) => {
                let lease = self.written(claim, Lease::default());
                self.leases.create(&PostParams::default(), &lease).await.map(Some)
            }
            Call::Replace(version, claim) => {
                let mut lease = self.written(claim, self.last.clone().unwrap_or_default());
                lease.metadata.resource_version = Some(version.clone());
                lease.metadata.managed_fields = None;
                self.leases.replace(&self.target.name, &PostParams::default(), &lease).await.map(Some)
            }
        };
        match result {
            Ok(lease) => {
                let record = lease.as_ref().map(|lease| self.record(lease));
                self.last = lease;
                match (call, record) {
                    (Call::Read, record) => Answer::Read(record),
                    (_, Some(record)) => Answer::Wrote(record),
                    (_, None) => Answer::Failed,
                }
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Answer::Conflict,
            // It was removed meanwhile.
            Err(kube::Error::Api(status)) if status.code == 404 => Answer::Conflict,
            Err(error) => {
                tracing::warn!(lease = self.target.name, "the Lease: {error}");
                Answer::Failed
            }
        }
    }

    fn record(&self, lease: &Lease) -> Record {
        let spec = lease.spec.clone().unwrap_or_default();
        let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
        Record {
            holder: spec.holder_identity.filter(|holder| !holder.is_empty()),
            duration: seconds.map_or(self.target.duration, Duration::from_secs),
            transitions: spec.lease_transitions.and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
            version: lease.metadata.resource_version.clone().unwrap_or_default(),
        }
    }

    /// The Lease as a claim makes it. What others have written into it stays.
    fn written(&self, claim: &Claim, before: Lease) -> Lease {
        let own = &self.shared.own;
        let now = Some(MicroTime(Timestamp::now()));
        let ObjectMeta { annotations, .. } = before.metadata.clone();
        let mut annotations = annotations.unwrap_or_default();
        if claim.holder.is_some() {
            annotations.insert(PROXY.into(), own.name.clone());
            annotations.insert(ADMIN.into(), own.address.to_string());
            annotations.insert(TOKEN.into(), own.token.secret().into());
        }
        let old = before.spec.unwrap_or_default();
        // Whole seconds, and never less than what is waited for.
        let duration = i32::try_from(self.target.duration.as_millis().div_ceil(1000)).unwrap_or(i32::MAX);
        Lease {
            metadata: ObjectMeta {
                name: Some(self.target.name.clone()),
                annotations: Some(annotations),
                ..before.metadata
            },
            spec: Some(LeaseSpec {
                holder_identity: claim.holder.clone(),
                lease_duration_seconds: Some(duration),
                lease_transitions: Some(i32::try_from(claim.transitions).unwrap_or(i32::MAX)),
                acquire_time: if claim.begins { now.clone() } else { old.acquire_time },
                renew_time: now,
                ..LeaseSpec::default()
            }),
        }
    }

    /// Does what follows from what the election says now.
    async fn follow(&mut self) {
        let tenure = self.election.tenure(self.now());
        let seen = self.election.seen();
        let other =
            seen.and_then(|record| record.holder.clone()).filter(|name| *name != self.shared.own.name);
        let holder =
            self.last.as_ref().and_then(holder_of).filter(|holder| other.as_ref() == Some(&holder.name));
        self.holder.send_if_modified(|known| {
            let changed = *known != holder;
            *known = holder;
            changed
        });
        let seen = seen.map(|record| (record.holder.clone(), record.transitions));
        self.shared.pool.lease_seen(seen.clone().and_then(|seen| seen.0), seen.map_or(0, |seen| seen.1));
        if self.current.is_some() && tenure.map(|tenure| tenure.number) != self.current {
            self.ended();
        }
        if other.is_some() {
            self.shared.pool.retire();
        }
        let Some(Tenure { number, until }) = tenure else { return };
        let until = self.origin + until;
        *self.shared.until.lock().unwrap_or_else(PoisonError::into_inner) = until;
        let entered = self.current.is_some_and(|n| self.shared.entered.load(Ordering::Acquire) == n);
        if !self.shared.pool.prolong(until) && entered {
            // The renewal came in the very moment in which the pool stopped by its own clock.
            self.election.forfeit(self.now());
            self.ended();
            return;
        }
        self.shared.pool.forget_absent(self.target.duration);
        if self.current.is_none() {
            self.began(number);
        } else if self.checked.elapsed() > self.target.duration
            && self.entering.as_ref().is_some_and(JoinHandle::is_finished)
        {
            // Somebody else may have changed them.
            self.checked = Instant::now();
            let shared = self.shared.clone();
            self.entering = Some(tokio::spawn(async move { shared.label(false).await }));
        }
    }

    fn began(&mut self, number: u64) {
        tracing::warn!(lease = self.target.name, number, "elected: this proxy is going to admit");
        self.shared.metrics.lease_changes.with_label_values(&["begun"]).inc();
        self.current = Some(number);
        self.checked = Instant::now();
        let (shared, predecessor) = (self.shared.clone(), self.predecessor.take());
        self.entering = Some(tokio::spawn(async move { shared.enter(number, predecessor).await }));
    }

    fn ended(&mut self) {
        let leaving = self.leaving;
        tracing::warn!(lease = self.target.name, leaving, "no longer the holder of the Lease");
        self.shared.metrics.lease_changes.with_label_values(&["ended"]).inc();
        self.shared.pool.suspend();
        self.current = None;
        if let Some(entering) = self.entering.take() {
            entering.abort();
        }
        if !leaving {
            let shared = self.shared.clone();
            self.entering = Some(tokio::spawn(async move { shared.unlabel().await }));
        }
    }
}

/// Who held the Lease last, if it is a proxy that can be asked.
fn holder_of(lease: &Lease) -> Option<Holder> {
    let annotations: &BTreeMap<String, String> = lease.metadata.annotations.as_ref()?;
    Some(Holder {
        name: annotations.get(PROXY)?.clone(),
        address: annotations.get(ADMIN)?.parse().ok()?,
        token: Token::of(annotations.get(TOKEN)?)?,
    })
}

impl Contender {
    /// Takes over, and labels the pod.
    async fn enter(&self, number: u64, predecessor: Option<Holder>) {
        let began = Instant::now();
        let handover = match &predecessor {
            None => None,
            Some(before) if before.name == self.own.name => self.pool.handover(),
            Some(before) => self.fetch(before).await,
        };
        if let Some(handover) = &handover {
            let until = Instant::now() + NEWS;
            while !self.pool.has_observed(handover) && Instant::now() < until {
                sleep(Duration::from_millis(20)).await;
            }
        }
        let whole = handover.is_some();
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that relay tell of it as soon as they have read the Lease.
        let opens =
            if whole || predecessor.is_none() { Duration::ZERO } else { 2 * self.policy.retry + AGAIN };
        let imported = self.pool.take_over(number, handover.unwrap_or_default(), until, opens);
        self.entered.store(number, Ordering::Release);
        let counts = [
            ("sessions", imported.sessions),
            ("objects", imported.objects),
            ("images", imported.images),
            ("streams", imported.streams),
        ];
        for (kind, n) in counts {
            self.metrics.lease_imports.with_label_values(&[kind]).inc_by(n as u64);
        }
        let from = predecessor.as_ref().map(|before| before.name.as_str());
        let ms = began.elapsed().as_millis() as u64;
        let (sessions, streams) = (imported.sessions, imported.streams);
        tracing::warn!(number, from, whole, sessions, streams, ms, "this proxy admits");
        self.label(true).await;
    }

    /// Labels this pod, and then no other.
    async fn label(&self, told: bool) {
        loop {
            let labelled = async {
                self.labels.set(Some(())).await?;
                self.labels.remove_others().await
            };
            match labelled.await {
                Ok(()) if told => {
                    return tracing::info!(pod = self.labels.pod, "labelled: the Service leads here");
                }
                Ok(()) => return,
                Err(error) => tracing::warn!("the label of this pod: {error}"),
            }
            sleep(AGAIN).await;
        }
    }

    /// Takes this pod's label off.
    async fn unlabel(&self) {
        while let Err(error) = self.labels.set(None).await {
            tracing::warn!("the label of this pod: {error}");
            sleep(AGAIN).await;
        }
    }

    /// What the predecessor knew, if it lives.
    async fn fetch(&self, before: &Holder) -> Option<Handover> {
        let until = Instant::now() + STILL;
        let mut attempts = 0;
        loop {
            let error = match timeout(ANSWER, ask(before)).await {
                Ok(Ok(Some(handover))) => return Some(handover),
                // By its clock its tenure lasts a little longer.
                Ok(Ok(None)) => "it still admits".to_string(),
                Ok(Err(error)) => {
                    attempts += 1;
                    error
                }
                Err(_) => {
                    attempts = u32::MAX;
                    "no answer".to_string()
                }
            };
            if attempts > 1 || Instant::now() >= until {
                tracing::warn!(
                    predecessor = before.name,
                    "nothing is taken over from the predecessor: {error}"
                );
                return None;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Asks a predecessor for what it knew; `None` while it admits.
async fn ask(before: &Holder) -> Result<Option<Handover>, String> {
    let broken = |e: hyper::Error| e.to_string();
    let stream = TcpStream::connect(before.address).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    tokio::spawn(connection);
    let request = Request::get("/handover")
        .header(header::HOST, "dindpool")
        .header(header::AUTHORIZATION, before.token.bearer())
        .body(Empty::<bytes::Bytes>::new())
        .map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(broken)?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(broken)?.to_bytes();
    match status {
        StatusCode::OK => serde_json::from_slice(&body).map(Some).map_err(|e| e.to_string()),
        StatusCode::CONFLICT => Ok(None),
        status => Err(format!("it answered {status}")),
    }
}

/// The label on pods.
struct Labels {
    pods: Api<Pod>,
    pod: String,
    lease: String,
}

impl Labels {
    async fn patch(&self, pod: &str, value: Option<&str>) -> Result<(), String> {
        let patch = serde_json::json!({ "metadata": { "labels": { LABEL: value } } });
        match self.pods.patch_metadata(pod, &PatchParams::default(), &Patch::Merge(patch)).await {
            Err(kube::Error::Api(status)) if status.code == 404 && value.is_none() => Ok(()),
            patched => patched.map(drop).map_err(|e| format!("pod {pod}: {e}")),
        }
    }

    /// Sets this pod's label, or takes it off.
    async fn set(&self, on: Option<()>) -> Result<(), String> {
        self.patch(&self.pod, on.map(|()| self.lease.as_str())).await
    }

    /// Takes the label off every other pod.
    async fn remove_others(&self) -> Result<(), String> {
        let labelled = ListParams::default().labels(&format!("{LABEL}={}", self.lease));
        let pods = self.pods.list_metadata(&labelled).await.map_err(|e| e.to_string())?;
        for pod in pods.items.iter().filter_map(|pod| pod.metadata.name.as_deref()) {
            if pod != self.pod {
                self.patch(pod, None).await?;
                tracing::info!(pod, "the label of a former holder was taken off");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_must_know_who_it_is() {
        let with = |given: &'static [(&str, &str)]| {
            Identity::from_env(|name| given.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_string()))
        };
        let whole = with(&[("POD_NAME", "p-1"), ("POD_IP", "10.0.0.7")]).unwrap();
        assert_eq!((whole.pod.as_str(), whole.namespace.as_deref()), ("p-1", None));
        assert_ne!(whole.name(), whole.name(), "each process has a name of its own");
        assert!(with(&[("POD_IP", "10.0.0.7")]).unwrap_err().contains("POD_NAME"));
        assert!(with(&[("POD_NAME", "p-1"), ("POD_IP", "")]).unwrap_err().contains("POD_IP"));
        assert!(with(&[("POD_NAME", "p-1"), ("POD_IP", "x")]).unwrap_err().contains("no address"));
    }
}
