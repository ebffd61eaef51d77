//! The chart, installed by the real helm: clients in pods build, push, run and compose through its Service.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Instant;

use serde_json::Value;

use crate::common::cluster::{self, Cluster};
use crate::common::http::{self, Addr};
use crate::common::{helm, holds_for, parts, poll, say, secs, short_dir, wait_until};
use crate::{API, require};

/// The image that the test makes.
const IMAGE: &str = "localhost/dindpool:test";

/// A release of the chart.
struct Release<'a> {
    cluster: &'a Cluster,
    home: tempfile::TempDir,
}

impl Release<'_> {
    /// Runs helm, which must succeed; what it prints.
    #[track_caller]
    fn helm(&self, words: &[&str]) -> String {
        let mut helm = helm::command(self.home.path()).expect("it was there");
        helm.env("KUBECONFIG", &self.cluster.kubeconfig)
            .args(["--namespace", &self.cluster.namespace])
            .args(words);
        let said = helm::said(helm.output().expect("helm runs"));
        said.unwrap_or_else(|fault| panic!("helm {}: {fault}\n{}", words.join(" "), self.about()))
    }

    /// Installs or upgrades it, with values of its own besides those of this test cluster: it has no registry to pull
    /// from, and two processors for everything.
    #[track_caller]
    fn apply(&self, action: &str, set: &str) -> String {
        let ours = format!(
            "image.repository=localhost/dindpool,image.tag=test,\
             dind.image.repository=localhost/dind,dind.image.tag=28.5,\
             test.image.repository=localhost/docker-cli,\
             dind.insecureRegistries={{{}}},\
             dind.resources.requests.cpu=50m,dind.resources.requests.memory=64Mi,\
             proxy.resources.requests.cpu=50m,proxy.resources.requests.memory=32Mi,\
             scaler.min=0,scaler.max=2,scaler.stabilisation=5s,dind.terminationGracePeriodSeconds=60,\
             config.session_grace=15s,config.slot_linger=1s,config.image_hold=15s,config.shutdown_delay=1s",
            self.registry()
        );
        let chart = helm::chart();
        let chart = chart.to_str().unwrap();
        self.helm(&[
            action,
            "dindpool",
            chart,
            "--set",
            &ours,
            "--set",
            set,
            "--set-string",
            "test.image.tag=28",
            "--wait",
            "--timeout",
            "3m",
        ])
    }

    fn registry(&self) -> String {
        format!("registry.{}.svc.cluster.local:5000", self.cluster.namespace)
    }

    fn host(&self) -> String {
        format!("tcp://dindpool.{}.svc.cluster.local:2375", self.cluster.namespace)
    }

    /// How many daemons there are to be.
    fn replicas(&self) -> String {
        self.cluster.kubectl(&["get", "deployment", "dindpool-dind", "-o", "jsonpath={.spec.replicas}"])
    }

    /// `/status` of the proxy that serves now.
    fn status(&self) -> Option<Value> {
        let pods = self.cluster.pods("app.kubernetes.io/component=proxy");
        let pod = pods.iter().find(|pod| pod.ready)?;
        let answer = http::try_request(&Addr::Tcp(format!("{}:9375", pod.ip)), "GET", "/status", None);
        answer.ok().map(|answer| answer.json())
    }

    /// `/metrics` of it.
    #[track_caller]
    fn metrics(&self) -> String {
        let pods = self.cluster.pods("app.kubernetes.io/component=proxy");
        http::get(&Addr::Tcp(format!("{}:9375", pods[0].ip)), "/metrics").text()
    }

    /// Starts a pod with a client, and what it has to do.
    #[track_caller]
    fn client(&self, name: &str, host: Option<&str>, script: &str) {
        let image = format!("--image={}", cluster::DOCKER_CLI);
        let host = host.map(|host| format!("--env=DOCKER_HOST={host}"));
        let mut words = vec!["run", name, "--restart=Never", &image];
        words.extend(host.as_deref());
        words.extend(["--", "sh", "-exc", script]);
        self.cluster.kubectl(&words);
    }

    /// Waits for its end, which must be a good one; what it printed.
    #[track_caller]
    fn ended(&self, name: &str) -> String {
        let phase = || self.cluster.kubectl(&["get", "pod", name, "-o", "jsonpath={.status.phase}"]);
        let over = || ["Succeeded", "Failed"].contains(&phase().as_str());
        let ended = poll(secs(400), || over().then_some(()));
        let log = self.cluster.kubectl(&["logs", name]);
        assert!(ended.is_some() && phase() == "Succeeded", "{name}: {}: {log}\n{}", phase(), self.about());
        log
    }

    /// For the report of a failure.
    fn about(&self) -> String {
        let mut about = String::new();
        for words in [
            &["get", "pods", "-o", "wide"][..],
            &["get", "events", "--sort-by=.lastTimestamp"],
            &["logs", "deploy/dindpool", "--tail=40"],
        ] {
            let out = self.cluster.try_kubectl(words);
            let _ = writeln!(about, "{}", String::from_utf8_lossy(&out.stdout));
        }
        about
    }

    /// Everything in the namespace that has a name and stays: `kind/name`.
    fn everything(&self) -> BTreeSet<String> {
        let kinds = self.cluster.kubectl(&["api-resources", "--namespaced", "--verbs=list", "-o", "name"]);
        let kinds: Vec<&str> = kinds.lines().filter(|kind| !kind.starts_with("events")).collect();
        let all = self.cluster.kubectl(&["get", &kinds.join(","), "-o", "name", "--ignore-not-found"]);
        all.lines().map(str::to_owned).collect()
    }
}

fn needs() -> Result<Cluster, String> {
    parts::part("helm/helm")?;
    Cluster::start()
}

/// A registry in a pod.
const REGISTRY: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: registry}
spec:
  selector: {matchLabels: {app: registry}}
  template:
    metadata: {labels: {app: registry}}
    spec:
      containers:
      - {name: registry, image: 'localhost/registry:2', ports: [{containerPort: 5000}],
         readinessProbe: {tcpSocket: {port: 5000}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: registry}
spec: {selector: {app: registry}, ports: [{port: 5000}]}
";

/// What a job does: with buildx and with the classic builder, in one session.
fn job(registry: &str, name: &str) -> String {
    format!(
        "docker version
        docker load -qi /busybox.tar
        mkdir /ctx && cd /ctx
        printf 'FROM localhost/busybox:1\\nARG BY\\nRUN echo {name} by $BY >/told\\nCMD [\"cat\", \"/told\"]\\n' >Dockerfile
        docker build --build-arg BY=buildx --push -t {registry}/{name}:buildx .
        DOCKER_BUILDKIT=0 docker build --build-arg BY=classic -t {registry}/{name}:classic .
        docker push -q {registry}/{name}:classic
        docker rmi {registry}/{name}:buildx || true
        docker run --rm {registry}/{name}:buildx
        docker run --rm {registry}/{name}:classic
        printf 'services: {{app: {{build: {{context: ., args: {{BY: compose}}}}, image: {name}-composed}}}}' >compose.yaml
        docker compose up --build --exit-code-from app
        docker compose down --rmi all
        docker rmi -f {registry}/{name}:buildx {registry}/{name}:classic
        echo finished"
    )
}

#[test]
fn the_chart_is_installed_tested_upgraded_rolled_back_and_leaves_nothing() {
    let _api = API.read();
    let cluster = require!(needs());
    let dir = short_dir();
    let archive = dir.path().join("dindpool.tar");
    cluster::dindpool_image(IMAGE, &archive);
    cluster.load(&[archive, cluster::images().join("registry.tar")]);
    cluster.apply(REGISTRY);
    cluster.wait_ready("app=registry", 1);
    let release = Release { cluster: &cluster, home: tempfile::tempdir().unwrap() };
    let before = release.everything();

    let start = Instant::now();
    let notes = release.apply("install", "config.slots=1");
    assert!(notes.contains(&format!("export DOCKER_HOST={}", release.host())), "{notes}");
    say(format!("helm install --wait took {:.1?}", start.elapsed()));
    release.helm(&["test", "dindpool", "--timeout", "3m"]);
    the_proxy_is_restricted(&release);

    // From no daemon at all. The pod that goes asks whether it may.
    empties(&release);
    wait_until("its hook has been answered", secs(30), || release.metrics().lines().any(asked));
    let start = Instant::now();
    let registry = release.registry();
    release.client("by-host", Some(&release.host()), &job(&registry, "by-host"));
    let context = format!(
        "docker context create pool --docker host={}\ndocker context use pool\n{}",
        release.host(),
        job(&registry, "by-context")
    );
    release.client("by-context", None, &context);
    for name in ["by-host", "by-context"] {
        let log = release.ended(name);
        assert!(log.lines().any(|line| line == "finished"), "{log}");
        for by in ["buildx", "classic", "compose"] {
            assert!(log.lines().any(|line| line.ends_with(&format!("{name} by {by}"))), "{by}: {log}");
        }
    }
    say(format!("two clients did their jobs, from no daemon, in {:.1?}", start.elapsed()));

    upgrades(&release);

    release.helm(&["uninstall", "dindpool", "--wait", "--timeout", "3m"]);
    cluster.kubectl(&["delete", "pod", "by-host", "by-context", "during", "--wait"]);
    let left = || release.everything().difference(&before).cloned().collect::<Vec<_>>();
    wait_until("nothing is left", secs(120), || left().is_empty());
}

/// Whether a line of metrics says that a preStop hook was told that its daemon is drained.
fn asked(line: &str) -> bool {
    line.starts_with("dindpool_prestop_answers_total{outcome=\"drained\"} ") && !line.ends_with(" 0")
}

/// The namespace's Pod Security is asked which pods it would not have: the daemons, and no others.
fn the_proxy_is_restricted(release: &Release<'_>) {
    let out = release.cluster.try_kubectl(&[
        "label",
        "--dry-run=server",
        "namespace",
        &release.cluster.namespace,
        "pod-security.kubernetes.io/enforce=restricted",
    ]);
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(told.contains("dindpool-dind-"), "the daemons are privileged: {told}");
    assert!(!told.replace("dindpool-dind-", "").contains("dindpool-"), "{told}");
}

/// Waits until the idle pool has no daemon.
fn empties(release: &Release<'_>) {
    wait_until("the idle pool is empty", secs(120), || {
        release.replicas() == "0" && release.cluster.pods("app.kubernetes.io/component=dind").is_empty()
    });
}

/// An upgrade under a build: the build ends well, and the number of daemons stays what dindpool made it.
fn upgrades(release: &Release<'_>) {
    empties(release);
    let script = "docker load -qi /busybox.tar && mkdir /ctx && cd /ctx
        printf 'FROM localhost/busybox:1\\nRUN for i in $(seq 30); do echo step $i; sleep 1; done\\n' >Dockerfile
        docker build --progress plain -t during .
        echo finished";
    release.client("during", Some(&release.host()), script);
    wait_until("its build has begun", secs(120), || {
        // There is no log before there is a container.
        let log = release.cluster.try_kubectl(&["logs", "during"]).stdout;
        String::from_utf8_lossy(&log).contains("step 2")
    });
    let daemons = release.cluster.pods("app.kubernetes.io/component=dind");
    assert_eq!((release.replicas().as_str(), daemons.len()), ("1", 1));
    let start = Instant::now();
    release.apply("upgrade", "config.slots=3,scaler.min=1");
    say(format!("helm upgrade --wait under a build took {:.1?}", start.elapsed()));
    assert!(release.ended("during").lines().any(|line| line == "finished"));
    wait_until("the settings have arrived", secs(60), || {
        release.status().is_some_and(|status| status["daemons"][0]["slots"] == 3)
    });
    holds_for("the daemon stays", secs(10), || {
        release.cluster.pods("app.kubernetes.io/component=dind") == daemons
    });
    release.helm(&["rollback", "dindpool", "1", "--wait", "--timeout", "3m"]);
    empties(release);
}

/// Nothing is made of them here but their namespace: their image is one that somebody has still to push.
#[test]
fn a_real_api_server_takes_the_plain_manifests_and_the_example_of_an_hpa() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    let file = |path: &str| format!("{}/deploy/{path}", env!("CARGO_MANIFEST_DIR"));
    cluster.kubectl(&["apply", "-f", &file("kubernetes/00-namespace.yaml")]);
    let taken = |path: &str| {
        // As the server would keep them, with every unknown field a fault.
        let words = ["apply", "--dry-run=server", "--validate=strict", "-f", &file(path)];
        cluster.kubectl(&words).lines().filter(|line| line.ends_with("created (server dry run)")).count()
    };
    let manifests = taken("kubernetes/");
    assert!(manifests >= 12, "{manifests} were taken");
    assert_eq!(taken("examples/hpa.yaml"), 1);
    cluster.kubectl(&["delete", "namespace", "dindpool", "--wait=false"]);
}
