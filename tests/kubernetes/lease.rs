//! Several proxies as pods behind a Service, of which one admits.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use serde_json::Value;

use crate::common::cluster::{self, Cluster};
use crate::common::http::{self, Addr};
use crate::common::{holds_for, poll, say, secs, short_dir, wait_until};
use crate::{API, require};

const IMAGE: &str = "localhost/dindpool:test";
const LEASE: &str = "dindpool";

/// The binary under test, as an image on the node.
fn load_image(cluster: &Cluster) {
    static MADE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let archive = |dir: &tempfile::TempDir| dir.path().join("dindpool.tar");
    let dir = MADE.get_or_init(|| {
        let dir = short_dir();
        cluster::dindpool_image(IMAGE, &archive(&dir));
        dir
    });
    cluster.load(&[archive(dir)]);
}

/// What several proxies need: rights, a Service that selects the label, a Deployment.
fn manifest(replicas: usize, grace: u32) -> String {
    // What comes before the grace, and a little more.
    let term = grace + 30;
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: dindpool}}
spec:
  selector: {{dindpool.io/admits: {LEASE}}}
  ports: [{{port: 2375}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: dindpool}}
spec:
  replicas: {replicas}
  selector:
    matchLabels: {{app: dindpool}}
  strategy: {{rollingUpdate: {{maxSurge: 1, maxUnavailable: 0}}}}
  template:
    metadata:
      labels: {{app: dindpool}}
    spec:
      serviceAccountName: dindpool
      terminationGracePeriodSeconds: {term}
      containers:
      - name: dindpool
        image: {IMAGE}
        args: [serve, --kubernetes, dind, --lease, {LEASE}, --scale-min, '1', --scale-max, '3', --slots, '1', --admin, '0.0.0.0:9375',
               --shutdown-grace, {grace}s]
        env:
        - {{name: POD_NAME, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}
        - {{name: POD_NAMESPACE, valueFrom: {{fieldRef: {{fieldPath: metadata.namespace}}}}}}
        - {{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}
        readinessProbe: {{httpGet: {{path: /readyz, port: 9375}}, periodSeconds: 1}}
"
    )
}

/// A pool of one to three daemons of one slot behind so many proxies, all of them ready.
fn pool(cluster: &Cluster, replicas: usize) {
    load_image(cluster);
    cluster.restricted("dind");
    cluster.apply(&cluster::dind("dind", 1));
    cluster.wait_ready("app=dind", 1);
    cluster.apply(&manifest(replicas, 60));
    cluster.wait_ready("app=dindpool", replicas);
    wait_until("one of them admits", secs(30), || admitting(cluster).is_some());
}

/// The pod that has the label and says itself that it admits.
fn admitting(cluster: &Cluster) -> Option<cluster::Pod> {
    let pods = cluster.pods(&format!("dindpool.io/admits={LEASE}"));
    pods.into_iter().find(|pod| lease(pod)["role"] == "holder")
}

/// What a proxy says of the Lease.
fn lease(pod: &cluster::Pod) -> Value {
    let answer = http::try_request(&Addr::Tcp(format!("{}:9375", pod.ip)), "GET", "/status", None);
    answer.map(|answer| answer.json()["lease"].clone()).unwrap_or_default()
}

/// A client's pod that runs a script; its address is its session's key.
fn client(cluster: &Cluster, name: &str, script: &str) {
    let image = format!("--image={}", cluster::DOCKER_CLI);
    let host = "--env=DOCKER_HOST=tcp://dindpool:2375";
    cluster.kubectl(&["run", name, "--restart=Never", &image, host, "--", "sh", "-c", script]);
}

fn phase(cluster: &Cluster, pod: &str) -> String {
    cluster.kubectl(&["get", "pod", pod, "-o", "jsonpath={.status.phase}"])
}

fn ended(cluster: &Cluster, pod: &str) -> bool {
    ["Succeeded", "Failed"].contains(&phase(cluster, pod).as_str())
}

/// A job that builds, runs what it has built, and what it built the time before, until there is /tmp/stop. Prints a
/// line for each round, or what failed.
const JOB: &str = "
docker load -qi /busybox.tar && mkdir /ctx && cd /ctx || exit 1
printf 'FROM localhost/busybox:1\\nARG N\\nRUN sleep 2; echo built $N > /told\\n' > Dockerfile
n=0
while [ ! -e /tmp/stop ]; do
    n=$((n + 1))
    docker build -q --build-arg N=$n -t app:$n . || { echo \"build $n failed\"; exit 1; }
    for m in $n $((n > 1 ? n - 1 : 1)); do
        [ \"$(docker run --rm app:$m cat /told)\" = \"built $m\" ] || { echo \"run $m failed\"; exit 1; }
    done
    echo round $n
done";

fn rounds(cluster: &Cluster, job: &str) -> usize {
    let log = cluster.try_kubectl(&["logs", job]).stdout;
    String::from_utf8_lossy(&log).lines().filter(|line| line.starts_with("round")).count()
}

fn jobs(cluster: &Cluster, n: usize) -> Vec<String> {
    let names: Vec<String> = (0..n).map(|i| format!("job-{i}")).collect();
    names.iter().for_each(|name| client(cluster, name, JOB));
    wait_until("all of them build", secs(120), || names.iter().all(|name| rounds(cluster, name) > 0));
    names
}

#[track_caller]
fn stop(cluster: &Cluster, jobs: &[String]) -> usize {
    for job in jobs {
        cluster.try_kubectl(&["exec", job, "--", "touch", "/tmp/stop"]);
    }
    wait_until("all jobs have ended", secs(120), || jobs.iter().all(|job| ended(cluster, job)));
    for job in jobs {
        assert_eq!(phase(cluster, job), "Succeeded", "{job}: {}", cluster.kubectl(&["logs", job]));
    }
    jobs.iter().map(|job| rounds(cluster, job)).sum()
}

/// Follows the labels while it lives: how many pods had it at once at most, and how often one got it.
struct Labelled {
    kubectl: Child,
    seen: Arc<Mutex<(usize, usize)>>,
}

impl Labelled {
    fn watch(cluster: &Cluster) -> Labelled {
        let selector = format!("dindpool.io/admits={LEASE}");
        let line = "jsonpath={.type} {.object.metadata.name}{\"\\n\"}";
        let args = ["get", "pods", "-l", &selector, "--watch", "--output-watch-events", "-o", line];
        let mut kubectl = cluster.command(&args).stdout(Stdio::piped()).spawn().expect("kubectl runs");
        let lines = BufReader::new(kubectl.stdout.take().expect("a pipe")).lines();
        let seen = Arc::new(Mutex::new((0, 0)));
        let told = seen.clone();
        std::thread::spawn(move || {
            let mut labelled = BTreeSet::new();
            for line in lines.map_while(Result::ok) {
                match line.split_once(' ') {
                    Some(("DELETED", pod)) => drop(labelled.remove(pod)),
                    Some((_, pod)) => {
                        let new = labelled.insert(pod.to_owned());
                        let mut seen = told.lock().unwrap();
                        seen.0 = seen.0.max(labelled.len());
                        seen.1 += usize::from(new);
                    }
                    None => {}
                }
            }
        });
        Labelled { kubectl, seen }
    }

    fn end(mut self) -> (usize, usize) {
        self.kubectl.kill().expect("kubectl ends");
        self.kubectl.wait().expect("kubectl has ended");
        *self.seen.lock().unwrap()
    }
}

/// Only the holder of the Lease writes, and only it labels itself, by the API server's own record.
fn check_writers(cluster: &Cluster) {
    let (mut holder, mut tenures, mut scaled) = (None, 0, 0);
    for (pod, event) in cluster.written() {
        let object = &event["objectRef"];
        let (kind, name) =
            (object["resource"].as_str().unwrap(), object["name"].as_str().unwrap_or_default());
        match kind {
            "leases" => {
                let now = event["requestObject"]["spec"]["holderIdentity"].as_str().map(str::to_owned);
                if let Some(now) = &now {
                    assert_eq!(now.rsplit_once('_').map(|(of, _)| of), Some(&*pod), "it holds it for itself");
                }
                tenures += usize::from(now.is_some() && now != holder);
                holder = now;
            }
            "deployments" => {
                assert!(
                    holder.as_ref().is_some_and(|h| h.starts_with(&pod)),
                    "{pod} scales, {holder:?} holds"
                );
                scaled += 1;
            }
            "pods" => {
                let label = &event["requestObject"]["metadata"]["labels"]["dindpool.io/admits"];
                let on = label.is_string();
                assert!(!on || name == pod, "{pod} labels {name}");
                let holds = holder.as_ref().is_some_and(|h| h.starts_with(&pod));
                // One that stops takes its own label off.
                assert!(holds || (!on && name == pod), "{pod} writes to {name}, {holder:?} holds: {event}");
            }
            other => panic!("{pod} writes {other}"),
        }
    }
    say(format!("{tenures} tenures, {scaled} changes of scale, no write but by the holder"));
    assert!(tenures > 0);
}

#[test]
fn three_proxies_are_one_pool_through_rolling_updates_under_load() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    pool(&cluster, 3);
    let labelled = Labelled::watch(&cluster);
    let jobs = jobs(&cluster, 3);
    for update in 1..=3 {
        let start = Instant::now();
        let before = admitting(&cluster);
        cluster.kubectl(&["rollout", "restart", "deployment", "dindpool"]);
        cluster.kubectl(&["rollout", "status", "deployment", "dindpool", "--timeout=180s"]);
        wait_until("another one admits", secs(60), || {
            let now = admitting(&cluster);
            now.is_some() && now.map(|pod| pod.name) != before.as_ref().map(|pod| pod.name.clone())
        });
        for job in &jobs {
            assert!(!ended(&cluster, job), "update {update}, {job}: {}", cluster.kubectl(&["logs", job]));
        }
        say(format!("rolling update {update} of three proxies under load: {:.1?}", start.elapsed()));
    }
    let rounds = stop(&cluster, &jobs);
    let (most, changes) = labelled.end();
    say(format!(
        "{rounds} rounds of build and run through three updates; {changes} proxies admitted in turn"
    ));
    // The old one and the new one, so that the Service never leads nowhere.
    assert!(most <= 2, "{most} pods were labelled at once");
    assert_eq!(cluster.pods(&format!("dindpool.io/admits={LEASE}")).len(), 1);
    assert!(changes >= 4, "{changes}");
    check_writers(&cluster);
    // No session was split, or its second image would be on another daemon than its first: then it had failed.
    let daemons = cluster.pods("app=dind").len();
    assert!(daemons > 1, "three jobs at once on daemons of one slot");
}

#[test]
fn a_proxy_that_is_killed_is_followed_within_the_leases_duration() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    pool(&cluster, 2);
    let labelled = Labelled::watch(&cluster);
    let slow = "docker load -qi /busybox.tar && mkdir /ctx && cd /ctx && \
                printf 'FROM localhost/busybox:1\\nRUN sleep 100\\n' > Dockerfile && docker build -q -t slow .";
    client(&cluster, "slow", slow);
    let streams = |pod: &cluster::Pod| {
        let status = http::get(&Addr::Tcp(format!("{}:9375", pod.ip)), "/status").json();
        status["daemons"].as_array().map_or(0, |all| all.iter().filter(|d| d["used"] != 0).count())
    };
    let before = admitting(&cluster).expect("one admits");
    wait_until("a build runs", secs(60), || streams(&before) > 0);

    let killed = Instant::now();
    let id = cluster.kubectl(&[
        "get",
        "pod",
        &before.name,
        "-o",
        "jsonpath={.status.containerStatuses[0].containerID}",
    ]);
    cluster.kill(id.trim_start_matches("containerd://"));
    wait_until("its client hears of it", secs(20), || phase(&cluster, "slow") == "Failed");
    say(format!("the client of a build was told after {:.1?}", killed.elapsed()));
    let (after, _) = poll(secs(40), || admitting(&cluster).filter(|pod| pod.name != before.name))
        .expect("another one admits");
    let took = killed.elapsed();
    say(format!("another proxy admitted {took:.1?} after the first was killed"));
    assert!(took < secs(25), "{took:?}");
    assert_eq!(lease(&after)["tenure"], 2, "nobody in between");
    // New work goes on.
    client(&cluster, "next", &JOB.replace("[ ! -e /tmp/stop ]", "[ $n -lt 2 ]"));
    wait_until("the next job has ended", secs(90), || ended(&cluster, "next"));
    assert_eq!(phase(&cluster, "next"), "Succeeded", "{}", cluster.kubectl(&["logs", "next"]));
    assert!(labelled.end().0 <= 2, "the old one and the new one");
    assert_eq!(cluster.pods(&format!("dindpool.io/admits={LEASE}")).len(), 1);
    check_writers(&cluster);
}

#[test]
fn a_follower_serves_its_clients_by_asking_the_one_that_admits() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    pool(&cluster, 2);
    let holder = admitting(&cluster).expect("one admits");
    let pods = cluster.wait_ready("app=dindpool", 2);
    let follower = pods.into_iter().find(|pod| pod.name != holder.name).expect("another one");
    assert_eq!(lease(&follower)["role"], "follower");
    let job = JOB.replace("[ ! -e /tmp/stop ]", "[ $n -lt 2 ]");
    client(&cluster, "far", &format!("export DOCKER_HOST=tcp://{}:2375\n{job}", follower.ip));
    // The engine of the other one knows of it.
    wait_until("what it relays counts", secs(60), || lease(&holder)["streams"].as_u64() > Some(0));
    wait_until("its job has ended", secs(90), || ended(&cluster, "far"));
    assert_eq!(phase(&cluster, "far"), "Succeeded", "{}", cluster.kubectl(&["logs", "far"]));
    wait_until("nothing is open any more", secs(10), || lease(&holder)["streams"] == 0);
    holds_for("the same one admits", secs(2), || lease(&holder)["role"] == "holder");
}
