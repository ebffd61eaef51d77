//! What dindpool writes down at the API server for others: annotations of pods, and Events.

use serde_json::Value;

use crate::common::client::{BUILDX_29, Job, Session};
use crate::common::cluster::{self, Cluster};
use crate::common::pool::Pool;
use crate::common::{say, secs, wait_until};
use crate::{API, require};

const BUILD: &str = "FROM scratch\nADD rootfs.tar /\nRUN sleep 12; echo built\n";

fn pool(cluster: &Cluster, max: &str) -> Pool {
    let target = format!("{}/dind", cluster.namespace);
    let pool = Pool::of_deployment(&cluster.restricted("dind"), &target).short_grace();
    let args = ["--scale-min", "0", "--scale-max", max, "--slots", "1", "--scale-stabilisation", "5s"];
    args.iter().fold(pool, |pool, arg| pool.arg(*arg)).start()
}

fn begin(pool: &Pool) -> (Session, Job) {
    let session = Session::new(&pool.host(), BUILDX_29);
    session.context("ctx", BUILD);
    let job = session.start("docker buildx build --progress plain -t app ctx");
    (session, job)
}

/// The Events of the Deployment, by their reasons.
fn events(cluster: &Cluster) -> Vec<(String, String)> {
    let list = cluster.kubectl(&["get", "events.events.k8s.io", "-o", "json"]);
    let list: Value = serde_json::from_str(&list).unwrap();
    let ours = |e: &&Value| e["reportingController"] == "dindpool.io/dindpool";
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let all = list["items"].as_array().unwrap().iter().filter(ours);
    all.inspect(|e| assert_eq!(e["regarding"]["name"], "dind", "{e}"))
        .map(|e| (text(&e["reason"]), text(&e["note"])))
        .collect()
}

fn annotation(cluster: &Cluster, name: &str) -> String {
    let path = format!("jsonpath={{.items[*].metadata.annotations.{}}}", name.replace('.', "\\."));
    cluster.kubectl(&["get", "pods", "-l", "app=dind", "-o", &path])
}

#[test]
fn annotations_follow_busy_and_idle_and_events_say_what_happened() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    cluster.apply(&cluster::dind("dind", 0));
    let pool = pool(&cluster, "1");
    let (session, build) = begin(&pool);
    let (second, waiting) = begin(&pool);
    let safe = || annotation(&cluster, "cluster-autoscaler.kubernetes.io/safe-to-evict");
    let keep = || annotation(&cluster, "karpenter.sh/do-not-disrupt");
    wait_until("the busy pod is marked", secs(60), || safe() == "false" && keep() == "true");
    assert_eq!(build.code(), None, "it was marked while it built");
    let has = |reason: &str| events(&cluster).iter().any(|(r, _)| r == reason);
    wait_until("it is told that the pool grew", secs(20), || has("ScaledUp"));
    wait_until("it is told that the pool is full", secs(20), || has("PoolFull"));
    build.wait_ok(secs(60));
    waiting.wait_ok(secs(60));
    // The images keep the daemon, and no session does after its grace.
    let idle = wait_until("the idle pod is marked", secs(90), || safe() == "true" && keep() == "false");
    say(format!("marked as idle {idle:.1?} after the last build"));
    for session in [&session, &second] {
        session.ok("docker rmi -f app || true");
    }
    wait_until("it is told that the pool shrank", secs(90), || has("ScaledDown"));
    let described = cluster.kubectl(&["describe", "deployment", "dind"]);
    assert!(described.contains("ScaledDown") && described.contains("dindpool.io/dindpool"), "{described}");

    // An image that is not there.
    wait_until("the pool is empty", secs(60), || cluster.pods("app=dind").is_empty());
    let patch = r#"{"spec":{"template":{"spec":{"containers":[{"name":"dockerd","image":"localhost/none:1","imagePullPolicy":"Never"}]}}}}"#;
    cluster.kubectl(&["patch", "deployment", "dind", "-p", patch]);
    let (_session, _vain) = begin(&pool);
    let stuck = || events(&cluster).into_iter().find(|(reason, _)| reason == "DaemonStuck");
    wait_until("it is told that no daemon comes up", secs(90), || stuck().is_some());
    assert!(stuck().unwrap().1.contains("ErrImageNeverPull"), "{:?}", stuck());
    let told = events(&cluster);
    assert!(told.len() < 12, "too much is told: {told:?}");
}

#[test]
fn without_the_right_to_write_events_the_pool_works_and_says_so_once() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    cluster.apply(&cluster::dind("dind", 0));
    let pool = pool(&cluster, "2");
    // The Role of an older dindpool.
    let path = r#"[{"op":"remove","path":"/rules/2"}]"#;
    cluster.kubectl(&["patch", "role", "dindpool", "--type=json", "-p", path]);
    let (_one, build) = begin(&pool);
    build.wait_ok(secs(90));
    let (_two, build) = begin(&pool);
    let (_three, other) = begin(&pool);
    build.wait_ok(secs(90));
    other.wait_ok(secs(90));
    assert!(pool.metric("dindpool_notes_total{kind=\"event\",outcome=\"forbidden\"}") >= 1.0);
    assert!(pool.metric("dindpool_notes_total{kind=\"mark\",outcome=\"done\"}") >= 1.0);
    assert_eq!(pool.log().matches("dindpool may not write events").count(), 1, "{}", pool.log());
    assert_eq!(pool.status()["problems"], serde_json::json!([]));
}
