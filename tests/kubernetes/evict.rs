//! Pods with a build on them are deleted, evicted, replaced and drained: the hook of deploy/prestop.sh waits.

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::common::client::{BUILDX_29, Job, Session};
use crate::common::cluster::{self, Cluster};
use crate::common::pool::Pool;
use crate::common::{say, secs, wait_until};
use crate::{API, require};

/// How long a pod may take to go, in seconds: so much longer than any build here that its end cannot be mistaken.
const GRACE: u32 = 180;
/// From the end of the last work to the end of the pod: the linger, a look, and what dockerd takes for its own end.
const SOON: Duration = secs(25);

/// A build of some seconds that needs no registry.
fn dockerfile(seconds: u32) -> String {
    format!("FROM scratch\nADD rootfs.tar /\nRUN sleep {seconds}; echo built\n")
}

/// A pool whose daemons are ended by the hook.
fn pool(cluster: &Cluster, replicas: usize) -> Pool {
    let token = cluster.kubeconfig.with_extension("token");
    fs::write(&token, cluster::TOKEN).unwrap();
    let target = format!("{}/dind", cluster.namespace);
    let pool = Pool::of_deployment(&cluster.restricted("dind"), &target)
        .short_grace()
        .arg("--scaler")
        .arg("off")
        .arg("--prestop")
        .arg(format!("{}:0", cluster::HOST))
        .arg("--prestop-token-file")
        .arg(token.to_str().unwrap())
        .start();
    cluster.apply(&cluster::dind_with_prestop("dind", replicas, &pool.prestop(), GRACE));
    cluster.wait_ready("app=dind", replicas);
    pool.wait_healthy(replicas, secs(60));
    pool
}

/// A build that has begun, in a session of its own.
struct Build {
    job: Job,
    daemon: String,
    /// What was started in it ends with it.
    _session: Session,
}

/// Begins one that takes so many seconds.
fn begin(pool: &Pool, seconds: u32) -> Build {
    let session = Session::new(&pool.host(), BUILDX_29);
    session.context("ctx", &dockerfile(seconds));
    let before: Vec<String> = leases(pool).into_iter().map(|(key, _)| key).collect();
    let job = session.start("docker buildx build --progress plain -t app ctx");
    let mut daemon = String::new();
    wait_until("a build has begun", secs(60), || {
        let new = leases(pool).into_iter().find(|(key, _)| !before.contains(key));
        new.map(|(_, at)| daemon = at).is_some()
    });
    Build { job, daemon, _session: session }
}

fn leases(pool: &Pool) -> Vec<(String, String)> {
    let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
    pool.sessions()
        .iter()
        .filter(|s| s["slots"].as_u64() > Some(0))
        .map(|s| (text(&s["key"]), text(&s["daemon"])))
        .collect()
}

fn is_there(cluster: &Cluster, pod: &str) -> bool {
    cluster.try_kubectl(&["get", "pod", pod]).status.success()
}

/// Waits for the end of a build, and of its pod soon after.
fn ends(cluster: &Cluster, build: &Job, pod: &str, how: &str) {
    build.wait_ok(secs(120));
    let ended = Instant::now();
    assert!(is_there(cluster, pod), "{pod} did not wait for its build");
    wait_until("the pod has gone", SOON, || !is_there(cluster, pod));
    say(format!("{how}: the pod had gone {:.1?} after the end of its build", ended.elapsed()));
}

#[test]
fn row_07_a_busy_pod_that_is_deleted_goes_when_its_build_has_ended() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    let pool = pool(&cluster, 1);
    let build = begin(&pool, 20);
    let busy = build.daemon.clone();
    cluster.kubectl(&["delete", "pod", &busy, "--wait=false"]);
    // Another one comes, and takes whoever comes now.
    let next = begin(&pool, 1);
    assert_ne!(next.daemon, busy);
    next.job.wait_ok(secs(60));
    ends(&cluster, &build.job, &busy, "deleted");
    assert!(pool.metric("dindpool_prestop_answers_total{outcome=\"drained\"}") >= 1.0);
    assert!(!pool.log().contains(cluster::TOKEN), "the token is in the log");
    // Nobody works on this one.
    let idle = cluster.wait_ready("app=dind", 1).remove(0).name;
    wait_until("its session has gone", secs(60), || leases(&pool).is_empty());
    let start = Instant::now();
    cluster.kubectl(&["delete", "pod", &idle, "--wait=false"]);
    wait_until("the idle pod has gone", SOON, || !is_there(&cluster, &idle));
    say(format!("an idle pod had gone {:.1?} after it was deleted", start.elapsed()));
}

/// What kubectl drain and every autoscaler asks for.
fn evict(cluster: &Cluster, pod: &str) -> std::process::Output {
    let path = format!("/api/v1/namespaces/{}/pods/{pod}/eviction", cluster.namespace);
    let mut kubectl = cluster.command(&["create", "--raw", &path, "-f", "-"]);
    let kubectl = kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut kubectl = kubectl.spawn().unwrap();
    let eviction = serde_json::json!({
        "apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": { "name": pod, "namespace": cluster.namespace },
    });
    kubectl.stdin.take().unwrap().write_all(eviction.to_string().as_bytes()).unwrap();
    kubectl.wait_with_output().unwrap()
}

#[test]
fn row_07_a_busy_pod_that_is_evicted_goes_when_its_build_has_ended_and_a_budget_holds_the_others() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    let pool = pool(&cluster, 2);
    cluster.apply(
        "
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: dind}
spec: {maxUnavailable: 1, selector: {matchLabels: {app: dind}}}
",
    );
    wait_until("the budget allows one", secs(60), || {
        cluster.kubectl(&["get", "pdb", "dind", "-o", "jsonpath={.status.disruptionsAllowed}"]) == "1"
    });
    let build = begin(&pool, 20);
    let busy = build.daemon.clone();
    let other = cluster.pods("app=dind").into_iter().find(|pod| pod.name != busy).unwrap().name;
    // One right after the other: as soon as the first one's replacement is ready, the budget allows another.
    let (evicted, refused) = (evict(&cluster, &busy), evict(&cluster, &other));
    assert!(evicted.status.success(), "{}", String::from_utf8_lossy(&evicted.stderr));
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && why.contains("disruption budget"), "{why}");
    let next = begin(&pool, 1);
    assert_ne!(next.daemon, busy);
    next.job.wait_ok(secs(60));
    ends(&cluster, &build.job, &busy, "evicted");
}

#[test]
fn row_07_a_rollout_restart_under_load_loses_no_build() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    let pool = pool(&cluster, 2);
    let old: Vec<String> = cluster.pods("app=dind").into_iter().map(|pod| pod.name).collect();
    let mut builds: Vec<Build> = (0..3).map(|_| begin(&pool, 15)).collect();
    cluster.kubectl(&["rollout", "restart", "deployment/dind"]);
    // While one half replaces the other somebody comes again and again.
    let left = || old.iter().filter(|pod| is_there(&cluster, pod)).count();
    let start = Instant::now();
    while left() > 0 && start.elapsed() < secs(120) && builds.len() < 12 {
        builds.push(begin(&pool, 3));
    }
    for build in &builds {
        build.job.wait_ok(secs(120));
    }
    wait_until("the old pods have gone", SOON, || left() == 0);
    let n = builds.len();
    say(format!(
        "rollout restart: {n} builds, none lost; the old pods had gone after {:.1?}",
        start.elapsed()
    ));
    assert!(start.elapsed() < secs(u64::from(GRACE)), "it was the grace that ended them");
}

#[test]
fn row_07_a_node_that_is_drained_waits_for_its_builds() {
    // Whatever another test makes while no node takes pods would wait, too.
    let _api = API.write();
    let cluster = require!(Cluster::start());
    let pool = pool(&cluster, 1);
    let build = begin(&pool, 20);
    let busy = build.daemon.clone();
    let drain = ["drain", "node1", "--pod-selector=app=dind", "--delete-emptydir-data", "--timeout=150s"];
    let namespace = format!("--namespace={}", cluster.namespace);
    let mut drain = cluster.command(&[&drain[..], &[&namespace]].concat());
    let mut drain = drain.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let pending = || cluster.pods("app=dind").into_iter().find(|pod| pod.name != busy && pod.ip.is_empty());
    wait_until("another pod is to come, and finds no node", secs(30), || pending().is_some());
    let waits = Session::new(&pool.host(), BUILDX_29);
    waits.context("ctx", &dockerfile(1));
    let waiting = waits.start("docker buildx build --progress plain -t app ctx");
    wait_until("the next build waits", secs(30), || pool.status()["queue"]["waiting"] == 1);
    build.job.wait_ok(secs(120));
    let ended = Instant::now();
    wait_until("the node is drained", SOON, || drain.try_wait().unwrap().is_some());
    say(format!("drained: kubectl drain had ended {:.1?} after the build", ended.elapsed()));
    let drained = drain.wait_with_output().unwrap();
    assert!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
    assert!(!is_there(&cluster, &busy));
    cluster.kubectl(&["uncordon", "node1"]);
    waiting.wait_ok(secs(120));
}

#[test]
fn a_pod_whose_pool_does_not_answer_goes_when_nobody_is_connected_and_nothing_runs() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    // Nobody listens there.
    let url = format!("http://{}:9", cluster::HOST);
    cluster.apply(&cluster::dind_with_prestop("dind", 1, &url, GRACE));
    let pod = cluster.wait_ready("app=dind", 1).remove(0);
    let session = Session::new(&format!("tcp://{}:2375", pod.ip), BUILDX_29);
    session.context("ctx", &dockerfile(15));
    let build = session.start("docker buildx build --progress plain -t app ctx");
    wait_until("the build has begun", secs(60), || build.stderr().contains("RUN sleep"));
    cluster.kubectl(&["delete", "pod", &pod.name, "--wait=false"]);
    ends(&cluster, &build, &pod.name, "without a pool");
}
