//! The pods of one Deployment of `docker:dind`.
//!
//! Pods are watched by the Deployment's own selector, because only they show what is pending and why, and what is
//! being deleted. The number that was asked for is read every few seconds from the `scale` subresource; each such answer
//! confirms the picture. Without an answer (the API server is down or slow, says 410 or 429, the watch is being
//! restarted) nothing is said, and the last known pool goes on serving.
//!
//! What is written for others to read is in [`notes`].
//!
//! Needs, in the Deployment's namespace: `deployments/scale` get and update, `pods` list, watch and patch.

mod notes;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use futures_util::TryStreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v1::{Scale, ScaleSpec};
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use super::{Change, DaemonSpec, Endpoint, Observation, Running};
use crate::engine::autoscaler::{Removal, Step};

/// How often the number that was asked for is read.
const REFRESH: Duration = Duration::from_secs(5);
/// How long the API server may take for one answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// For how many seconds the API server keeps one watch: one that has broken unseen is noticed by then.
const WATCH: u32 = 60;
/// Compared among the pods of one ReplicaSet that gets smaller; the lowest goes first.
const COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// How long it is told that another pod went than the one that was chosen.
const ALARM: Duration = Duration::from_secs(600);
/// Why a container waits that does not start by waiting alone.
const FAULTS: &[&str] = &[
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
];

/// Which Deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its namespace; without one, that of the pod that dindpool runs in, or of the kubeconfig.
    pub namespace: Option<String>,
    /// Its name.
    pub deployment: String,
    /// The port of each daemon.
    pub port: u16,
}

/// Understands `[NAMESPACE/]DEPLOYMENT[:PORT]`.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse(text: &str) -> Result<Target, String> {
    let fault = |what: &str| format!("`{text}`: {what}; expected [NAMESPACE/]DEPLOYMENT[:PORT]");
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => match port.parse() {
            Ok(port) if port > 0 => (name, port),
            _ => return Err(fault(&format!("`{port}` is not a port"))),
        },
        None => (text, super::fixed::DEFAULT_PORT),
    };
    let (namespace, deployment) = match name.split_once('/') {
        Some((namespace, deployment)) => (Some(namespace), deployment),
        None => (None, name),
    };
    let plausible = |name: &str| {
        let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        !name.is_empty() && name.len() <= 253 && name.bytes().all(good)
    };
    match [Some(deployment), namespace].into_iter().flatten().find(|name| !plausible(name)) {
        Some(name) => Err(fault(&format!("`{name}` is no name of Kubernetes"))),
        None => {
            Ok(Target { namespace: namespace.map(str::to_string), deployment: deployment.to_string(), port })
        }
    }
}

/// Starts watching.
///
/// # Errors
/// When there is no way to an API server (no service account, no kubeconfig). One that does not answer is waited for.
pub async fn start(target: Target) -> Result<Running, String> {
    let client = Client::try_default().await.map_err(|e| format!("no way to Kubernetes: {e}"))?;
    let namespace = target.namespace.clone().unwrap_or_else(|| client.default_namespace().to_string());
    let (tx, observations) = mpsc::channel(1);
    let (changes, asked) = mpsc::channel(1);
    let (stop, stopping) = oneshot::channel();
    let provisioner = Provisioner {
        pods: Api::namespaced(client.clone(), &namespace),
        deployments: Api::namespaced(client.clone(), &namespace),
        target,
        tx,
    };
    let writer = notes::Notes {
        pods: provisioner.pods.clone(),
        events: Api::namespaced(client, &namespace),
        deployments: provisioner.deployments.clone(),
        deployment: provisioner.target.deployment.clone(),
        namespace,
    };
    let (notes, written) = mpsc::channel(1);
    tokio::spawn(writer.run(written));
    let stopped = tokio::spawn(async move {
        tokio::select! {
            _ = stopping => {}
            () = provisioner.run(asked) => {}
        }
    });
    Ok(Running { observations, stopped, stop, changes: Some(changes), notes: Some(notes) })
}

struct Provisioner {
    pods: Api<Pod>,
    deployments: Api<Deployment>,
    target: Target,
    tx: mpsc::Sender<Observation>,
}

/// What is known.
#[derive(Debug, Default)]
struct Seen {
    pods: BTreeMap<String, Pod>,
    /// Those of a list that is under way.
    listing: Option<BTreeMap<String, Pod>>,
    /// All of them have been listed once.
    whole: bool,
    /// The watch has broken off. It goes on where it was, or lists anew, and does not tell which and when: until the
    /// pods have been listed beside it the picture may be old.
    unsure: bool,
    replicas: Option<u32>,
    /// Who was chosen to go, and is still there.
    victim: Option<String>,
    /// Another one went.
    alarm: Option<(String, Instant)>,
}

impl Provisioner {
    async fn run(self, mut asked: mpsc::Receiver<Change>) {
        loop {
            // The selector is the Deployment's own.
            match timeout(PATIENCE, self.deployments.get_scale(&self.target.deployment)).await {
                Ok(Ok(scale)) => match scale.status.as_ref().and_then(|s| s.selector.clone()) {
                    Some(selector) if !selector.is_empty() => {
                        self.watch(&selector, replicas(&scale), &mut asked).await;
                        return;
                    }
                    _ => self.cannot("it has no selector").await,
                },
                Ok(Err(error)) => self.cannot(&error.to_string()).await,
                Err(_) => self.cannot("the API server does not answer").await,
            }
            sleep(REFRESH).await;
        }
    }

    /// What is there is not known, or no longer; that much can be said.
    async fn cannot(&self, why: &str) {
        let problem = format!("cannot read the scale of Deployment {}: {why}", self.target.deployment);
        let _ = self
            .tx
            .send(Observation { blind: true, problems: vec![problem], ..Observation::default() })
            .await;
    }

    async fn watch(&self, selector: &str, replicas: u32, asked: &mut mpsc::Receiver<Change>) {
        let mut seen = Seen { replicas: Some(replicas), ..Seen::default() };
        let config = watcher::Config::default().labels(selector).timeout(WATCH);
        let mut events = pin!(watcher(self.pods.clone(), config).default_backoff());
        let mut refresh = tokio::time::interval(REFRESH);
        refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.try_next() => match event {
                    Ok(Some(event)) => {
                        if seen.take(event) && !self.tell(&mut seen).await {
                            return;
                        }
                    }
                    Ok(None) => return tracing::error!("the watch of the pods has ended"),
                    Err(error) => {
                        seen.unsure = true;
                        tracing::warn!("watching the pods of {}: {error}", self.target.deployment);
                    }
                },
                _ = refresh.tick() => {
                    let confirmed = timeout(PATIENCE, self.confirm(selector, &mut seen)).await;
                    match confirmed.unwrap_or_else(|_| Err("no answer".into())) {
                        Ok(()) if !self.tell(&mut seen).await => return,
                        Ok(()) => {}
                        Err(why) => self.cannot(&why).await,
                    }
                }
                Some(Change { step, done }) = asked.recv() => {
                    // Whoever has given it up decides anew.
                    if done.is_closed() {
                        continue;
                    }
                    let result = timeout(PATIENCE, self.change(&step, &mut seen)).await;
                    let _ = done.send(result.unwrap_or_else(|_| {
                        // Nobody knows whether it was taken: who goes next is not held against it.
                        seen.victim = None;
                        Err("the API server does not answer".into())
                    }));
                }
                () = self.tx.closed() => return,
            }
        }
    }

    /// Asks how many there are to be, and for the pods themselves if what is known of them may be old.
    async fn confirm(&self, selector: &str, seen: &mut Seen) -> Result<(), String> {
        let scale = self.deployments.get_scale(&self.target.deployment).await.map_err(|e| e.to_string())?;
        seen.replicas = Some(replicas(&scale));
        if seen.unsure {
            let pods =
                self.pods.list(&ListParams::default().labels(selector)).await.map_err(|e| e.to_string())?;
            seen.relisted(pods.items);
        }
        Ok(())
    }

    /// Whether anybody listens.
    async fn tell(&self, seen: &mut Seen) -> bool {
        if !seen.whole || seen.unsure {
            return true;
        }
        self.tx.send(seen.observation(self.target.port)).await.is_ok()
    }

    async fn change(&self, step: &Step, seen: &mut Seen) -> Result<(), String> {
        match step {
            Step::Grow { from, to } => self.scale(*from, *to, seen).await,
            Step::Remove { daemon, from } => {
                // Two that are equally cheap, and one of them at work: marks of former victims go first.
                for marked in seen.marked().filter(|pod| *pod != daemon.as_str()) {
                    self.set_cost(marked, None).await?;
                }
                self.set_cost(daemon.as_str(), Some("-1000")).await?;
                seen.victim = Some(daemon.to_string());
                let scaled = self.scale(*from, from - 1, seen).await;
                if scaled.is_err() {
                    seen.victim = None;
                    // Whoever else scales must not take it for the cheapest. If this fails, the next victim's mark
                    // is not set before this one is removed.
                    let _ = self.set_cost(daemon.as_str(), None).await;
                }
                scaled
            }
            // Else it would be the cheapest for ever, whatever runs on it.
            Step::Uncordon(daemon) if seen.marked().any(|pod| pod == daemon.as_str()) => {
                self.set_cost(daemon.as_str(), None).await
            }
            Step::Cordon(_) | Step::Uncordon(_) => Ok(()),
        }
    }

    async fn set_cost(&self, pod: &str, cost: Option<&str>) -> Result<(), String> {
        let patch = serde_json::json!({ "metadata": { "annotations": { COST: cost } } });
        let patched = self.pods.patch_metadata(pod, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.map(drop).map_err(|e| format!("pod {pod}: {e}"))
    }

    /// Replaces the number, if it is still the one that was seen: the resource version guards it.
    async fn scale(&self, from: u32, to: u32, seen: &mut Seen) -> Result<(), String> {
        let fault = |e: kube::Error| format!("scaling {}: {e}", self.target.deployment);
        let mut scale = self.deployments.get_scale(&self.target.deployment).await.map_err(fault)?;
        let now = replicas(&scale);
        if now != from {
            seen.replicas = Some(now);
            return Err(format!(
                "somebody else scales {}, too: {now} instead of {from}",
                self.target.deployment
            ));
        }
        scale.spec = Some(ScaleSpec { replicas: Some(i32::try_from(to).unwrap_or(i32::MAX)) });
        let params = PostParams::default();
        self.deployments.replace_scale(&self.target.deployment, &params, &scale).await.map_err(fault)?;
        seen.replicas = Some(to);
        Ok(())
    }
}

impl Seen {
    /// Takes in what a watch tells. Whether the picture is another one.
    fn take(&mut self, event: watcher::Event<Pod>) -> bool {
        let name = |pod: &Pod| pod.metadata.name.clone().unwrap_or_default();
        match event {
            watcher::Event::Init => {
                self.listing = Some(BTreeMap::new());
                false
            }
            watcher::Event::InitApply(pod) => {
                self.listing.get_or_insert_default().insert(name(&pod), pod);
                false
            }
            watcher::Event::InitDone => {
                let listed = self.listing.take().unwrap_or_default();
                self.relisted(listed.into_values());
                true
            }
            watcher::Event::Apply(pod) => {
                let before = self.pods.get(&name(&pod));
                if is_leaving(&pod) && before.is_some_and(|before| !is_leaving(before)) {
                    self.goes(&name(&pod));
                }
                self.pods.insert(name(&pod), pod);
                true
            }
            watcher::Event::Delete(pod) => {
                if self.pods.remove(&name(&pod)).is_some_and(|before| !is_leaving(&before)) {
                    self.goes(&name(&pod));
                }
                true
            }
        }
    }

    /// All pods that there are now. Who has gone meanwhile went as those do that are seen to go.
    fn relisted(&mut self, pods: impl IntoIterator<Item = Pod>) {
        let named = |pod: Pod| (pod.metadata.name.clone().unwrap_or_default(), pod);
        let before = std::mem::replace(&mut self.pods, pods.into_iter().map(named).collect());
        for (name, pod) in before {
            if !is_leaving(&pod) && self.pods.get(&name).is_none_or(is_leaving) {
                self.goes(&name);
            }
        }
        (self.whole, self.unsure) = (true, false);
    }

    /// The pods that are marked as the cheapest.
    fn marked(&self) -> impl Iterator<Item = &str> {
        let is_marked =
            |pod: &Pod| pod.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(COST));
        self.pods
            .iter()
            .filter(move |(_, pod)| is_marked(pod) && !is_leaving(pod))
            .map(|(name, _)| name.as_str())
    }

    /// A pod goes: the one that was chosen, or, while that one is still there, perhaps instead of it.
    fn goes(&mut self, pod: &str) {
        match self.victim.take() {
            None => {}
            Some(victim) if victim == pod => tracing::info!(pod, "the pod that was chosen goes"),
            Some(victim) => {
                let alarm = format!("pod {pod} goes, but {victim} was chosen");
                tracing::error!("{alarm}");
                self.alarm = Some((alarm, Instant::now() + ALARM));
            }
        }
    }

    fn observation(&mut self, port: u16) -> Observation {
        self.alarm.take_if(|(_, until)| *until <= Instant::now());
        let there = || self.pods.values().filter(|pod| !has_ended(pod));
        // Two ReplicaSets: the Deployment is replacing one by the other.
        let owners: BTreeSet<&str> = there()
            .filter(|pod| !is_leaving(pod))
            .filter_map(|pod| pod.metadata.owner_references.as_ref()?.first().map(|o| o.uid.as_str()))
            .collect();
        Observation {
            blind: false,
            daemons: there().map(|pod| spec(pod, port)).collect(),
            problems: Vec::new(),
            alarm: self.alarm.as_ref().map(|(alarm, _)| alarm.clone()),
            replicas: self.replicas,
            rollout: owners.len() > 1,
        }
    }
}

fn replicas(scale: &Scale) -> u32 {
    scale.spec.as_ref().and_then(|s| s.replicas).and_then(|r| u32::try_from(r).ok()).unwrap_or(0)
}

fn is_leaving(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Evicted or finished pods stay in the list until somebody removes them.
fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

fn spec(pod: &Pod, port: u16) -> DaemonSpec {
    let status = pod.status.as_ref();
    let ips = status.and_then(|s| s.pod_ips.as_ref()).into_iter().flatten();
    let source_ips: Vec<IpAddr> = ips.filter_map(|ip| ip.ip.parse().ok()).collect();
    let ready = is_ready(pod);
    let (pending, faulty) = match why_pending(pod) {
        Some((why, faulty)) => (Some(why), faulty),
        None if ready => (None, false),
        None => (Some("starting".into()), false),
    };
    DaemonSpec {
        id: pod.metadata.name.clone().unwrap_or_default(),
        endpoint: source_ips.first().map(|ip| Endpoint::Tcp(SocketAddr::new(*ip, port))),
        source_ips,
        cgroup: None,
        draining: is_leaving(pod),
        pending,
        faulty,
        removal: removal(pod),
        slots: slots(pod, port),
    }
}

/// When its ReplicaSet would take it.
fn removal(pod: &Pod) -> Removal {
    let assigned = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    let runs = pod.status.as_ref().is_some_and(|status| status.phase.as_deref() == Some("Running"));
    match (assigned, runs) {
        (false, _) => Removal::Unassigned,
        (true, false) => Removal::Pending,
        (true, true) if is_ready(pod) => Removal::Ready,
        (true, true) => Removal::NotReady,
    }
}

/// Why a pod is not there yet, in words, and whether that is a fault.
fn why_pending(pod: &Pod) -> Option<(String, bool)> {
    let status = pod.status.as_ref()?;
    let words = |reason: &str, message: &Option<String>| match message {
        Some(message) => format!("{reason}: {}", message.lines().next().unwrap_or_default()),
        None => reason.to_string(),
    };
    let unscheduled =
        status.conditions.iter().flatten().find(|c| c.type_ == "PodScheduled" && c.status == "False");
    if let Some(condition) = unscheduled {
        let reason = condition.reason.as_deref().unwrap_or("not scheduled");
        return Some((words(reason, &condition.message), true));
    }
    let waits = |status: &ContainerStatus| status.state.as_ref()?.waiting.clone();
    let statuses = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let waiting = statuses.filter_map(waits).find(|waiting| waiting.reason.is_some())?;
    let reason = waiting.reason.unwrap_or_default();
    let faulty = FAULTS.contains(&reason.as_str());
    // `ContainerCreating` says all; of an image that cannot be pulled the message tells which.
    let message = waiting.message.filter(|_| faulty);
    Some((words(&reason, &message), faulty))
}

/// Slots by the limits of the daemon's container: a dockerd in a pod sees the processors and the memory of its node.
fn slots(pod: &Pod, port: u16) -> Option<u32> {
    let containers = &pod.spec.as_ref()?.containers;
    let listens = |c: &&Container| c.ports.iter().flatten().any(|p| p.container_port == i32::from(port));
    let container = containers.iter().find(listens).or(containers.first())?;
    let limits = container.resources.as_ref()?.limits.as_ref()?;
    let limit = |name: &str| limits.get(name).and_then(|q| quantity(&q.0));
    super::slots_by_limits(limit("cpu"), limit("memory"))
}

/// A number of Kubernetes: `500m`, `4`, `8Gi`, `8G`, `1e3`.
fn quantity(text: &str) -> Option<f64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && !"+-.".contains(c)).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let number: f64 = number.parse().ok()?;
    let binary = |power: i32| 1024_f64.powi(power);
    let factor = match suffix {
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        exponent => 10_f64.powi(exponent.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    Some(number * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, owner: &str, status: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": { "name": name, "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": owner,
            }] },
            "spec": { "nodeName": "node1", "containers": [
                { "name": "sidecar", "resources": { "limits": { "cpu": "100m" } } },
                { "name": "dind", "ports": [{ "containerPort": 2375 }],
                  "resources": { "limits": { "cpu": "8", "memory": "6Gi" } } },
            ] },
            "status": status,
        }))
        .unwrap()
    }

    fn running(name: &str) -> Pod {
        pod(
            name,
            "rs-1",
            serde_json::json!({
                "phase": "Running", "podIPs": [{ "ip": "10.0.0.7" }],
                "conditions": [{ "type": "Ready", "status": "True" }],
            }),
        )
    }

    fn leaving(name: &str) -> Pod {
        let mut value = serde_json::to_value(running(name)).unwrap();
        value["metadata"]["deletionTimestamp"] = "2026-11-24T10:00:00Z".into();
        serde_json::from_value(value).unwrap()
    }

    fn seen(pods: Vec<Pod>) -> Seen {
        let mut seen = Seen { replicas: Some(2), ..Seen::default() };
        seen.take(watcher::Event::Init);
        for pod in pods {
            assert!(!seen.take(watcher::Event::InitApply(pod)), "half a list is none");
        }
        assert!(seen.take(watcher::Event::InitDone));
        seen
    }

    #[test]
    fn a_deployment_is_named_with_or_without_its_namespace_and_port() {
        let target = |namespace: Option<&str>, deployment: &str, port| {
            Ok(Target { namespace: namespace.map(Into::into), deployment: deployment.into(), port })
        };
        assert_eq!(parse("dind"), target(None, "dind", 2375));
        assert_eq!(parse("ci/dind:2376"), target(Some("ci"), "dind", 2376));
        for (text, word) in [
            ("", "no name"),
            ("ci/", "no name"),
            ("Dind", "`Dind`"),
            ("dind:0", "not a port"),
            ("a/b/c", "`b/c`"),
        ] {
            let fault = parse(text).unwrap_err();
            assert!(fault.contains(word), "{text}: {fault}");
        }
    }

    #[test]
    fn a_pod_that_runs_is_a_daemon_with_slots_by_its_limits() {
        let observation = seen(vec![running("a")]).observation(2375);
        let [daemon] = observation.daemons.as_slice() else { panic!("{observation:?}") };
        assert_eq!(daemon.endpoint, Some(Endpoint::Tcp("10.0.0.7:2375".parse().unwrap())));
        assert_eq!(daemon.slots, Some(3), "6 GiB are less than 8 processors");
        assert_eq!((daemon.pending.clone(), daemon.faulty, daemon.draining), (None, false, false));
        assert_eq!(daemon.removal, Removal::Ready);
        assert_eq!((observation.replicas, observation.rollout), (Some(2), false));
    }

    #[test]
    fn why_a_pod_is_pending_is_told() {
        let waiting = |reason: &str| {
            serde_json::json!({
                "phase": "Pending",
                "containerStatuses": [{ "name": "dind", "image": "x", "imageID": "", "ready": false, "restartCount": 0,
                    "state": { "waiting": { "reason": reason, "message": "of registry/x\nsecond line" } } }],
            })
        };
        let unscheduled = serde_json::json!({ "phase": "Pending", "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available",
        }] });
        for (status, why, faulty) in [
            (waiting("ContainerCreating"), "ContainerCreating", false),
            (waiting("ImagePullBackOff"), "ImagePullBackOff: of registry/x", true),
            (unscheduled, "Unschedulable: 0/3 nodes are available", true),
            (serde_json::json!({ "phase": "Running" }), "starting", false),
        ] {
            let daemon = spec(&pod("a", "rs-1", status), 2375);
            assert_eq!((daemon.pending.as_deref(), daemon.faulty), (Some(why), faulty));
            assert!(daemon.removal < Removal::Ready && daemon.endpoint.is_none());
        }
    }

    #[test]
    fn evicted_pods_are_none_and_two_replica_sets_are_a_rollout() {
        let evicted = pod("gone", "rs-0", serde_json::json!({ "phase": "Failed", "reason": "Evicted" }));
        let observation = seen(vec![running("a"), evicted]).observation(2375);
        assert_eq!((observation.daemons.len(), observation.rollout), (1, false));
        let other = pod("b", "rs-2", serde_json::json!({ "phase": "Pending" }));
        assert!(seen(vec![running("a"), other]).observation(2375).rollout);
    }

    #[test]
    fn row_36_a_pod_that_goes_instead_of_the_one_that_was_chosen_is_an_alarm() {
        for (goes, alarms) in [("b", 0), ("a", 1)] {
            let mut seen = seen(vec![running("a"), running("b")]);
            seen.victim = Some("b".into());
            seen.take(watcher::Event::Apply(leaving(goes)));
            let observation = seen.observation(2375);
            assert_eq!(observation.alarm.iter().len(), alarms, "{:?}", observation.alarm);
            assert!(observation.daemons.iter().any(|d| d.id == goes && d.draining));
        }
    }

    #[test]
    fn row_15_a_watch_that_begins_anew_loses_nobody_meanwhile() {
        let mut seen = seen(vec![running("a"), running("b")]);
        seen.unsure = true;
        seen.take(watcher::Event::Init);
        seen.take(watcher::Event::InitApply(running("a")));
        assert!(seen.unsure && seen.pods.len() == 2);
        seen.take(watcher::Event::InitApply(running("c")));
        assert!(seen.take(watcher::Event::InitDone) && !seen.unsure);
        assert_eq!(seen.pods.keys().collect::<Vec<_>>(), ["a", "c"]);
        // A watch that goes on where it was lists nothing: the list beside it does the same, and sees who went.
        (seen.unsure, seen.victim) = (true, Some("a".into()));
        seen.relisted([running("a"), leaving("c")]);
        assert!(!seen.unsure && seen.alarm.is_some() && seen.victim.is_none());
    }

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for (text, value) in
            [("500m", 0.5), ("4", 4.0), ("1.5", 1.5), ("8Gi", 8_589_934_592.0), ("8G", 8e9), ("1e3", 1e3)]
        {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        assert_eq!((quantity("x"), quantity("4X")), (None, None));
    }
}
