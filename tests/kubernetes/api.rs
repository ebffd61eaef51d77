//! An API server that refuses: it has forgotten where a watch was (410), or has no time for us (429).

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::common::client::{BUILDX_29, Session};
use crate::common::cluster::{self, Cluster};
use crate::common::pool::Pool;
use crate::common::{holds_for, say, secs, wait_until};
use crate::{API, require};

const BUILD: &str = "FROM scratch\nADD rootfs.tar /\nRUN sleep 6; echo built\n";

fn pool(cluster: &Cluster, args: &[&str]) -> Pool {
    let target = format!("{}/dind", cluster.namespace);
    let pool = Pool::of_deployment(&cluster.restricted("dind"), &target).short_grace();
    args.iter().fold(pool, |pool, arg| pool.arg(*arg)).start()
}

/// Goes on when it is dropped.
struct Stopped<'a>(&'a Pool);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGCONT);
    }
}

#[test]
fn row_15_a_watch_that_is_answered_410_begins_anew_and_nobody_flaps() {
    let _api = API.write();
    let cluster = require!(Cluster::start());
    cluster.apply(&cluster::dind("dind", 2));
    cluster.wait_ready("app=dind", 2);
    let pool = pool(&cluster, &["--scaler", "off"]);
    pool.wait_healthy(2, secs(30));
    let ejected = pool.metric("dindpool_daemon_transitions_total{became=\"ejected\"}");
    // While dindpool does not look, a pod goes and two come, and whatever the API server remembers of that is forgotten.
    pool.signal(Signal::SIGSTOP);
    let stopped = Stopped(&pool);
    let gone = cluster.pods("app=dind").remove(0).name;
    cluster.kubectl(&["delete", "pod", &gone, "--wait=true"]);
    cluster.kubectl(&["scale", "deployment", "dind", "--replicas=3"]);
    cluster.wait_ready("app=dind", 3);
    cluster.restart_api_server(|| ());
    cluster.compact();
    drop(stopped);
    let start = Instant::now();
    pool.wait_healthy(3, secs(90));
    say(format!("after a 410 the new pods were seen and ready in {:.1?}", start.elapsed()));
    let log = pool.log();
    assert!(log.contains("410") || log.contains("Expired") || log.contains("too old"), "no 410:\n{log}");
    assert!(!pool.daemons().iter().any(|d| d.id == gone));
    assert_eq!(pool.metric("dindpool_daemon_transitions_total{became=\"ejected\"}"), ejected);
    wait_until("nothing is the matter any more", secs(30), || pool.status()["problems"] == json!([]));
}

/// One request at a time for dindpool's service account: whatever else it asks is refused with 429.
fn flow_control(namespace: &str) -> String {
    format!(
        "
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: PriorityLevelConfiguration
metadata: {{name: {namespace}}}
spec:
  type: Limited
  limited: {{nominalConcurrencyShares: 0, borrowingLimitPercent: 0, limitResponse: {{type: Reject}}}}
---
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: FlowSchema
metadata: {{name: {namespace}}}
spec:
  matchingPrecedence: 10
  priorityLevelConfiguration: {{name: {namespace}}}
  rules:
  - subjects: [{{kind: ServiceAccount, serviceAccount: {{name: dindpool, namespace: {namespace}}}}}]
    resourceRules: [{{verbs: ['*'], apiGroups: ['*'], resources: ['*'], namespaces: ['*']}}]
"
    )
}

/// A request of dindpool's service account that does not end: its body does not.
struct Endless(Child);

impl Drop for Endless {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn endless(cluster: &Cluster) -> Endless {
    let token = cluster.kubectl(&["create", "token", "dindpool", "--duration=1h"]);
    let server =
        cluster.kubectl(&["config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"]);
    let url = format!("{server}/api/v1/namespaces/{}/pods", cluster.namespace);
    let mut curl = Command::new("curl");
    curl.args(["-sk", "--noproxy", "*", "-X", "POST", "-T", "-", "-H", "Expect:"]);
    curl.args([
        "-H",
        "Content-Type: application/json",
        "-H",
        &format!("Authorization: Bearer {token}"),
        &url,
    ]);
    let mut child = curl.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // The pipe stays open with the child.
    child.stdin.as_mut().unwrap().write_all(b"{").unwrap();
    Endless(child)
}

/// Whether the API server has refused anything with 429 under the rule of this test.
fn refused(cluster: &Cluster) -> bool {
    let metrics = cluster.kubectl(&["get", "--raw", "/metrics"]);
    let ours = |l: &&str| {
        l.starts_with("apiserver_flowcontrol_rejected_requests_total{") && l.contains(&cluster.namespace)
    };
    metrics.lines().filter(ours).any(|l| !l.ends_with(" 0"))
}

#[test]
fn row_14_an_api_server_that_answers_429_is_not_noticed_by_builds_and_nothing_scales() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    cluster.apply(&cluster::dind("dind", 2));
    cluster.wait_ready("app=dind", 2);
    let args = ["--scale-min", "0", "--scale-max", "4", "--slots", "1", "--scale-stabilisation", "40s"];
    let pool = pool(&cluster, &args);
    pool.wait_healthy(2, secs(30));
    let before = pool.steps();
    cluster.apply(&flow_control(&cluster.namespace));
    let _endless = endless(&cluster);
    wait_until("dindpool is refused", secs(30), || {
        refused(&cluster) && pool.status()["problems"] != json!([])
    });
    let session = Session::new(&pool.host(), BUILDX_29);
    session.context("ctx", BUILD);
    session.start("docker buildx build --progress plain -t app ctx").wait_ok(secs(60));
    session.ok("docker rmi app");
    wait_until("the picture is too old", secs(60), || pool.status()["scaler"]["reason"] == "stale");
    assert_eq!(pool.healthy(), 2, "the last known pool serves");
    // Such a request is given up by the API server after a minute.
    holds_for("nothing is even tried", secs(10), || pool.steps() == before);
    for kind in ["flowschema", "prioritylevelconfiguration"] {
        cluster.kubectl(&["delete", kind, &cluster.namespace]);
    }
    let start = Instant::now();
    wait_until("the pool catches up", secs(90), || pool.status()["scaler"]["replicas"] == 0);
    say(format!("after 429 the pool had shrunk to nothing in {:.1?}", start.elapsed()));
}
