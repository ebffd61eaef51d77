//! A real Kubernetes cluster of one node (tests/cluster), with images for daemons and clients in it.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{parts, poll, say, secs, short_dir, unique, wait_until};

/// The image of a Docker daemon, which listens on port 2375 without TLS.
pub const DIND: &str = "localhost/dind:28.5";
/// The image of a client with buildx, which has [`BUSYBOX`] in `/busybox.tar` for `docker load`.
pub const DOCKER_CLI: &str = "localhost/docker-cli:28";
/// An image to build on.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// A registry without TLS on port 5000, whose archive a test loads itself: `registry.tar` of [`images`].
pub const REGISTRY: &str = "localhost/registry:2";
/// The host's address, as pods and the node reach it.
pub const HOST: &str = "10.98.0.1";

/// A test's namespace in the cluster. The cluster itself is shared with the tests that run at the same time: it comes
/// with the first of them and goes with the last.
pub struct Cluster {
    node: Arc<Node>,
    /// The namespace, which is that of the kubeconfig too.
    pub namespace: String,
    /// The administrator's kubeconfig.
    pub kubeconfig: PathBuf,
}

/// A pod as the API server tells it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pod {
    pub name: String,
    /// The host reaches it too. Empty until it is known.
    pub ip: String,
    pub ready: bool,
}

impl Cluster {
    /// Starts the cluster, or joins the one that other tests of this binary have; with an empty namespace.
    pub fn start() -> Result<Cluster, String> {
        static SHARED: Mutex<Weak<Node>> = Mutex::new(Weak::new());
        // A test that could not start it has said so, and the next one may try.
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let node = match shared.upgrade() {
            Some(node) => node,
            None => Arc::new(Node::start()?),
        };
        *shared = Arc::downgrade(&node);
        drop(shared);

        let namespace = format!("test-{}", unique());
        let kubeconfig = node.dir.path().join(format!("{namespace}.kubeconfig"));
        fs::copy(node.dir.path().join("admin.kubeconfig"), &kubeconfig).expect("the kubeconfig");
        let cluster = Cluster { node, namespace, kubeconfig };
        cluster.kubectl(&["config", "set-context", "--current", "--namespace", &cluster.namespace]);
        cluster.kubectl(&["create", "namespace", &cluster.namespace]);
        // No pod can be made without it.
        wait_until("the namespace has its service account", secs(30), || {
            cluster.try_kubectl(&["get", "serviceaccount", "default"]).status.success()
        });
        Ok(cluster)
    }

    /// Runs kubectl, which must succeed, in this namespace; what it prints.
    #[track_caller]
    pub fn kubectl(&self, args: &[&str]) -> String {
        printed(args, &self.try_kubectl(args))
    }

    /// The same with any outcome.
    pub fn try_kubectl(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().expect("kubectl runs")
    }

    /// kubectl, for whoever wants to go on while it runs.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(parts::dir().join("kubernetes/bin/kube"));
        command.arg("ctl").args(args).env("KUBECONFIG", &self.kubeconfig);
        command
    }

    /// Applies manifests in YAML.
    #[track_caller]
    pub fn apply(&self, yaml: &str) {
        let args = ["apply", "-f", "-"];
        let mut kubectl = self.command(&args);
        let kubectl = kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut kubectl = kubectl.spawn().expect("kubectl runs");
        kubectl.stdin.take().expect("a pipe").write_all(yaml.as_bytes()).expect("kubectl reads");
        printed(&args, &kubectl.wait_with_output().expect("kubectl ends"));
    }

    /// Brings images to the node.
    #[track_caller]
    pub fn load(&self, archives: &[PathBuf]) {
        self.node.cluster("load", archives);
    }

    /// The pods that a label selector selects and that nobody has deleted, by name.
    #[track_caller]
    pub fn pods(&self, selector: &str) -> Vec<Pod> {
        let list: Value = serde_json::from_str(&self.kubectl(&["get", "pods", "-l", selector, "-o", "json"]))
            .expect("JSON");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut pods: Vec<Pod> = list["items"]
            .as_array()
            .expect("a list")
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .map(|pod| Pod {
                name: text(&pod["metadata"]["name"]),
                ip: text(&pod["status"]["podIP"]),
                ready: pod["status"]["conditions"]
                    .as_array()
                    .is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True")),
            })
            .collect();
        pods.sort();
        pods
    }

    /// Waits until `n` pods are selected and all of them are ready.
    #[track_caller]
    pub fn wait_ready(&self, selector: &str, n: usize) -> Vec<Pod> {
        let ready = poll(secs(120), || {
            let pods = self.pods(selector);
            (pods.len() == n && pods.iter().all(|pod| pod.ready)).then_some(pods)
        });
        match ready {
            Some((pods, _)) => pods,
            None => panic!(
                "{n} pods with {selector} are not ready:\n{}\n{}",
                self.kubectl(&["describe", "pods", "-l", selector]),
                String::from_utf8_lossy(&self.try_kubectl(&["logs", "--tail=20", "-l", selector]).stdout)
            ),
        }
    }
}

impl Cluster {
    /// What dindpool's pods have written to the API server in this namespace, in order: each with the pod's name.
    pub fn written(&self) -> Vec<(String, Value)> {
        let log = fs::read_to_string(self.node.dir.path().join("log/audit")).expect("the audit log");
        let account = format!("system:serviceaccount:{}:dindpool", self.namespace);
        let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let ours = events.filter(|e| e["user"]["username"] == account.as_str());
        let done = ours.filter(|e| e["responseStatus"]["code"].as_u64().is_some_and(|code| code < 300));
        let pod = |e: &Value| {
            e["user"]["extra"]["authentication.kubernetes.io/pod-name"][0].as_str().map(str::to_owned)
        };
        done.filter_map(|e| Some((pod(&e)?, e))).collect()
    }

    /// Kills the first process of a container, by its id in containerd.
    pub fn kill(&self, container: &str) {
        let killed = Command::new(parts::dir().join("kubernetes/bin/ctr"))
            .arg("--address")
            .arg(self.node.dir.path().join("run/containerd.sock"))
            .args(["--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", container])
            .status();
        assert!(killed.expect("ctr runs").success(), "container {container} is not killed");
    }

    /// The kubeconfig of a service account that may do what docs/kubernetes.md says dindpool needs, and no more.
    pub fn restricted(&self, deployment: &str) -> PathBuf {
        self.apply(&rights(deployment));
        let token = self.kubectl(&["create", "token", "dindpool", "--duration=1h"]);
        let path = self.kubeconfig.with_extension("restricted");
        fs::copy(&self.kubeconfig, &path).expect("the kubeconfig");
        for args in [
            ["set-credentials", "dindpool", &format!("--token={token}")],
            ["set-context", "--current", "--user=dindpool"],
        ] {
            let mut kubectl = self.command(&[&["config"], args.as_slice()].concat());
            assert!(
                kubectl
                    .env("KUBECONFIG", &path)
                    .stdout(Stdio::null())
                    .status()
                    .expect("kubectl runs")
                    .success()
            );
        }
        path
    }
}

/// An API server that is stopped (SIGSTOP) until this is dropped.
pub struct Frozen(Pid);

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = kill(self.0, Signal::SIGCONT) {
            say(format!("the API server cannot go on: {error}"));
        }
    }
}

/// Where the pid of the API server is.
const API_SERVER: &str = "/run/dindpool-cluster/pid/apiserver";

fn api_server() -> Pid {
    let pid = fs::read_to_string(API_SERVER).expect("its pid");
    Pid::from_raw(pid.trim().parse().expect("a number"))
}

impl Cluster {
    /// Stops the API server, which all tests of this binary share.
    pub fn freeze(&self) -> Frozen {
        let pid = api_server();
        kill(pid, Signal::SIGSTOP).expect("SIGSTOP");
        Frozen(pid)
    }

    /// Has etcd forget all that was there before now, through its own HTTP gateway.
    pub fn compact(&self) {
        let ask = |path: &str, body: &str| -> Value {
            let script = format!("curl -fsS --noproxy '*' -d '{body}' http://127.0.0.1:2379{path}");
            let mut nsenter = Command::new("nsenter");
            nsenter.args(["--net=/run/netns/dindpool-kube", "sh", "-c", &script]);
            let answer = nsenter.output().expect("nsenter runs");
            assert!(answer.status.success(), "{path}: {}", String::from_utf8_lossy(&answer.stderr));
            serde_json::from_slice(&answer.stdout).expect("JSON")
        };
        let now = ask("/v3/kv/range", "{\"key\":\"AA==\"}");
        let revision = now["header"]["revision"].as_str().expect("a revision").to_owned();
        ask("/v3/kv/compaction", &format!("{{\"revision\":{revision}}}"));
    }

    /// Kills the API server, which all tests of this binary share, and starts it again when `away` has returned.
    pub fn restart_api_server(&self, away: impl FnOnce()) {
        let pid = api_server();
        let command = fs::read(format!("/proc/{pid}/cmdline")).expect("its command");
        let words = command.split(|b| *b == 0).filter(|word| !word.is_empty());
        let words: Vec<&OsStr> = words.map(OsStr::from_bytes).collect();
        let exe = fs::read_link(format!("/proc/{pid}/exe")).expect("its program");
        kill(pid, Signal::SIGKILL).expect("SIGKILL");
        away();
        let log =
            File::options().append(true).open(self.node.dir.path().join("log/apiserver")).expect("its log");
        // Not a child that somebody has to wait for: `cluster down` finds it by its pid.
        let started = Command::new("setsid")
            .args(["--fork", "nsenter", "--net=/run/netns/dindpool-kube", "sh", "-c"])
            .args([&format!("echo $$ >{API_SERVER}; exec \"$@\""), "sh"])
            .arg(exe)
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("dup"))
            .stderr(log)
            .status();
        assert!(started.expect("setsid runs").success());
        wait_until("the API server is back", secs(60), || {
            self.try_kubectl(&["get", "--raw", "/readyz"]).status.success()
        });
    }
}

/// The rights that dindpool needs.
fn rights(deployment: &str) -> String {
    format!(
        "
apiVersion: v1
kind: ServiceAccount
metadata: {{name: dindpool}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: dindpool}}
rules:
- {{apiGroups: [apps], resources: [deployments/scale], resourceNames: [{deployment}], verbs: [get, update]}}
- {{apiGroups: [''], resources: [pods], verbs: [list, watch, patch]}}
- {{apiGroups: [events.k8s.io], resources: [events], verbs: [create]}}
- {{apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get, create, update]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: dindpool}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: dindpool}}
subjects: [{{kind: ServiceAccount, name: dindpool}}]
"
    )
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // With the last test all of it goes.
        if Arc::strong_count(&self.node) > 1 {
            let _ = self.try_kubectl(&["delete", "namespace", &self.namespace, "--wait=false"]);
        }
    }
}

/// A Deployment of Docker daemons, privileged, each with an empty `/var/lib/docker`. Pods have the label `app` with
/// the Deployment's name.
pub fn dind(name: &str, replicas: usize) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
spec:
  replicas: {replicas}
  selector:
    matchLabels: {{app: {name}}}
  template:
    metadata:
      labels: {{app: {name}}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: dockerd
        image: {DIND}
        ports: [{{containerPort: 2375}}]
        securityContext: {{privileged: true}}
        readinessProbe: {{httpGet: {{path: /_ping, port: 2375}}, periodSeconds: 1}}
        volumeMounts: [{{name: data, mountPath: /var/lib/docker}}]
      volumes:
      - name: data
        emptyDir: {{}}
"
    )
}

/// Where the archives of the images are.
pub fn images() -> PathBuf {
    parts::dir().join("images")
}

/// Makes an image of dindpool around the binary of this test, as deploy/Dockerfile.binary does.
#[track_caller]
pub fn dindpool_image(name: &str, archive: &Path) {
    let dir = short_dir();
    let (root, tar) = (dir.path().join("root"), dir.path().join("root.tar"));
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let run = |command: &mut Command| {
        let out = command.output().expect("it runs");
        assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let binary = std::env::var_os("DINDPOOL_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_dindpool").into());
    run(Command::new(here.join("deploy/rootfs")).arg(binary).arg(&root));
    run(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."));
    let config = r#"{"Entrypoint": ["dindpool"], "Env": ["PATH=/usr/local/bin"], "User": "65532:65532"}"#;
    run(Command::new(here.join("tests/cluster/image")).arg(archive).arg(name).arg(&tar).arg(config));
}

/// The token of preStop hooks in tests.
pub const TOKEN: &str = "a-token-of-the-tests";

/// Docker daemons as [`dind`], whose pods are ended by deploy/prestop.sh, within `grace` seconds. The hook asks at
/// `url`.
pub fn dind_with_prestop(name: &str, replicas: usize, url: &str, grace: u32) -> String {
    let hook = include_str!("../../deploy/prestop.sh").replace('\n', "\n    ");
    let container = format!(
        "lifecycle: {{preStop: {{exec: {{command: [sh, /etc/dindpool/prestop.sh]}}}}}}
        env:
        - {{name: DINDPOOL_PRESTOP_URL, value: '{url}'}}
        - {{name: PRESTOP_QUIET, value: '3'}}
        - {{name: POD_NAME, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}
        volumeMounts:
        - {{name: hook, mountPath: /etc/dindpool}}
        - {{name: data,"
    );
    let deployment = dind(name, replicas)
        .replace("terminationGracePeriodSeconds: 5", &format!("terminationGracePeriodSeconds: {grace}"))
        .replace("volumeMounts: [{name: data,", &container)
        .replace("/var/lib/docker}]", "/var/lib/docker}")
        .replace(
            "      volumes:\n",
            "      volumes:\n      - name: hook\n        projected: {sources: [{configMap: {name: hook}}, \
             {secret: {name: hook}}]}\n",
        );
    format!(
        "
apiVersion: v1
kind: ConfigMap
metadata: {{name: hook}}
data:
  prestop.sh: |
    {hook}
---
apiVersion: v1
kind: Secret
metadata: {{name: hook}}
stringData: {{prestop-token: {TOKEN}}}
---
{deployment}"
    )
}

/// The running cluster. Its addresses are there once on a machine, so it has a lock for as long as it lives.
struct Node {
    dir: tempfile::TempDir,
    _lock: File,
}

impl Node {
    fn start() -> Result<Node, String> {
        parts::all(&[
            "kubernetes/bin/kube",
            "busybox/rootfs.tar",
            "docker-28.5/bin/dockerd",
            "cli-28/docker",
            "buildx-0.29/docker-buildx",
            "compose-2.26/docker-compose",
            "registry/docker-registry",
        ])?;
        script("images", &[]);
        let images = images();
        let node = Node { _lock: lock(), dir: short_dir() };
        let start = Instant::now();
        node.cluster("up", &[]);
        let up = start.elapsed();
        node.cluster("load", &["dind.tar", "docker-cli.tar", "busybox.tar"].map(|name| images.join(name)));
        say(format!("a cluster is up after {up:.1?}, with its images after {:.1?}", start.elapsed()));
        Ok(node)
    }

    fn cluster(&self, action: &str, files: &[PathBuf]) {
        let mut args = vec![Path::new(action), self.dir.path()];
        args.extend(files.iter().map(PathBuf::as_path));
        script("cluster", &args);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let start = Instant::now();
        // A test that has failed already is to say so itself.
        match try_script("cluster", &[Path::new("down"), self.dir.path()]) {
            Ok(()) => say(format!("the cluster is down after {:.1?}", start.elapsed())),
            Err(fault) => say(format!("the cluster is not down: {fault}")),
        }
    }
}

/// Waits for the clusters of other test binaries, and keeps them waiting from now on.
fn lock() -> File {
    let dir = Path::new("/run/dindpool-cluster");
    fs::create_dir_all(dir).expect("a directory in /run");
    let file = File::create(dir.join("lock")).expect("a lock file");
    let locked = |file: &File| match file.try_lock() {
        Ok(()) => true,
        Err(TryLockError::WouldBlock) => false,
        Err(TryLockError::Error(error)) => panic!("the lock of clusters: {error}"),
    };
    if !locked(&file) {
        say("waiting until another cluster on this machine is down");
        wait_until("the lock of clusters is free", secs(1200), || locked(&file));
    }
    file
}

/// Runs a script of tests/cluster, which must succeed.
#[track_caller]
fn script(name: &str, args: &[&Path]) {
    try_script(name, args).unwrap_or_else(|fault| panic!("{fault}"));
}

fn try_script(name: &str, args: &[&Path]) -> Result<(), String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster").join(name);
    let log = tempfile::tempfile().expect("a file");
    // Not through a pipe: what the script leaves running would hold it open.
    let status = Command::new(&path)
        .args(args)
        .env("DINDPOOL_PARTS", parts::dir())
        .env("CLUSTER_LOCKED", "1")
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("dup"))
        .stderr(log.try_clone().expect("dup"))
        .status()
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let text = || std::io::read_to_string(std::io::Seek::rewind(&mut &log).map(|()| &log).expect("a log"));
    if status.success() {
        Ok(())
    } else {
        Err(format!("tests/cluster/{name} {args:?}: {}", text().unwrap_or_default()))
    }
}

#[track_caller]
fn printed(args: &[&str], output: &Output) -> String {
    assert!(
        output.status.success(),
        "kubectl {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}
