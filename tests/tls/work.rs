//! What CI jobs do, over TLS, while others do the same without it.

use super::Lab;
use super::common::client::{self, Flavour, Session};
use super::common::scenarios::Scenarios;
use super::common::{parts, secs, unique, wait_until};

const APP: &str =
    "FROM scratch\nADD rootfs.tar /\nARG MARK\nRUN echo \"$MARK\" >/mark\nCMD [\"cat\", \"/mark\"]\n";

/// `docker` of the context: the terminal's environment names no daemon then.
const CONTEXT: &str = "unset DOCKER_HOST; ";

pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab, flavour: Flavour) {
    let name = flavour.name;
    all.add(format!("{name}: the pipeline builds, pushes and runs"), move || pipeline(lab, flavour));
    all.add(format!("{name}: stdin, exec and attach end as they do without TLS"), move || {
        streams(lab, flavour)
    });
}

pub fn add_others<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.add("plain clients work on the same port", || plain(lab));
    all.add("DOCKER_TLS_VERIFY and DOCKER_CERT_PATH work", || environment(lab));
    all.add("compose goes up and down", || compose(lab));
    all.add("docker-py with TLSConfig builds, runs and execs", || docker_py(lab));
}

fn build(t: &Session, lab: &Lab, flavour: Flavour) -> String {
    let image = format!("{}/tls-{}:1", lab.registry.name, unique());
    t.context("ctx", APP);
    let mark = "--network none --build-arg MARK=m";
    if flavour.has_buildx() {
        t.ok(&format!(
            "{CONTEXT}docker build --platform=linux/amd64 {mark} -t {image} -f ctx/Dockerfile ctx --push"
        ));
    } else {
        t.ok(&format!("{CONTEXT}docker build {mark} -t {image} ctx && docker push {image}"));
    }
    image
}

fn pipeline(lab: &Lab, flavour: Flavour) {
    let t = lab.terminal(flavour);
    let image = build(&t, lab, flavour);
    let repository = image.split_once('/').unwrap().1.trim_end_matches(":1").to_string();
    assert_eq!(lab.registry.tags(&repository), ["1"]);
    assert_eq!(t.ok(&format!("{CONTEXT}docker run --rm --network none {image}")), "m\n");
    let out =
        t.run(&format!("{CONTEXT}docker run --rm --network none {image} sh -c 'echo o; echo e >&2; exit 7'"));
    assert_eq!((out.code, out.stdout.as_str(), out.stderr.as_str()), (7, "o\n", "e\n"));
}

fn streams(lab: &Lab, flavour: Flavour) {
    let t = lab.terminal(flavour);
    let image = build(&t, lab, flavour);
    let run = format!("docker run --rm -i --network none {image}");
    assert_eq!(t.ok(&format!("{CONTEXT}echo hi | {run} cat")), "hi\n");
    let sums = t.ok(&format!(
        "{CONTEXT}head -c 3M /dev/urandom >blob; md5sum <blob; {run} md5sum <blob; {run} cat <blob | md5sum"
    ));
    let sums: Vec<&str> = sums.lines().collect();
    assert!(sums.len() == 3 && sums[0] == sums[1] && sums[0] == sums[2], "3 MiB both ways: {sums:?}");
    // The input ends, and the answer comes a while after that.
    let late = t.ok(&format!("{CONTEXT}echo x | {run} sh -c 'cat; usleep 500000; echo after'"));
    assert_eq!(late, "x\nafter\n");
    let name = format!("t{}", unique());
    t.ok(&format!("{CONTEXT}docker run -d -i --name {name} --network none {image} sh -c 'read x; echo got $x; read y; exit 8'"));
    assert_eq!(t.ok(&format!("{CONTEXT}echo typed | docker exec -i {name} cat")), "typed\n");
    assert_eq!(t.run(&format!("{CONTEXT}docker exec {name} sh -c 'exit 9'")).code, 9);
    let attached = t.start(&format!(
        "{CONTEXT}(echo hello; until test -e go; do sleep 0.05; done; echo x) | docker attach {name}"
    ));
    wait_until("the container's answer", secs(20), || attached.stdout() == "got hello\n");
    t.write("go", "");
    assert_eq!(attached.wait(secs(20)).code, 8);
    t.ok(&format!("{CONTEXT}docker rm {name}"));
}

fn plain(lab: &Lab) {
    let t = Session::new(&lab.pool.host(), client::BUILDX_29);
    let image = format!("plain:{}", unique());
    t.context("ctx", APP);
    t.ok(&format!("docker build --network none --build-arg MARK=p -t {image} ctx"));
    assert_eq!(t.ok(&format!("docker run --rm --network none {image}")), "p\n");
}

fn environment(lab: &Lab) {
    let files = lab.client_files().display().to_string();
    for flavour in [client::BUILDX_29, client::CLI_20] {
        let t = Session::with(&lab.pool.host(), flavour)
            .env("DOCKER_TLS_VERIFY", "1")
            .env("DOCKER_CERT_PATH", &files)
            .open();
        let version = t.ok("docker version --format '{{.Server.Version}}'");
        assert!(version.starts_with("28.5"), "{version}");
    }
}

fn compose(lab: &Lab) {
    let t = lab.terminal(client::BUILDX_29);
    let image = build(&t, lab, client::BUILDX_29);
    let project = format!("p{}", unique());
    t.write(
        "compose.yaml",
        format!("services:\n  a: {{image: '{image}', command: sleep 600, network_mode: none}}\n"),
    );
    t.ok(&format!("{CONTEXT}docker compose -p {project} up -d"));
    let code = t.run(&format!("{CONTEXT}docker compose -p {project} exec -T a sh -c 'exit 3'")).code;
    assert_eq!(code, 3);
    t.ok(&format!("{CONTEXT}docker compose -p {project} down -t 0"));
}

const PYTHON: &str = r#"
import io, os, docker
from docker.tls import TLSConfig
files = os.environ["FILES"]
tls = TLSConfig(client_cert=(files + "/cert.pem", files + "/key.pem"), ca_cert=files + "/ca.pem", verify=True)
client = docker.DockerClient(base_url=os.environ["HOST"].replace("tcp://", "https://"), tls=tls)
image = client.images.pull(os.environ["BASE"])
made, log = client.images.build(fileobj=io.BytesIO(("FROM %s\nRUN echo m >/mark\n" % os.environ["BASE"]).encode()),
                                network_mode="none", tag=os.environ["TAG"])
assert client.containers.run(os.environ["TAG"], ["cat", "/mark"], remove=True, network_mode="none") == b"m\n"
box = client.containers.run(os.environ["TAG"], ["sleep", "600"], detach=True, network_mode="none")
for n in range(3):
    code, out = box.exec_run(["sh", "-c", f"usleep 200000; echo {n}; exit {n}"])
    assert (code, out) == (n, f"{n}\n".encode()), (code, out)
box.remove(force=True)
"#;

fn docker_py(lab: &Lab) {
    // requests takes this one's word over that of its caller.
    let t = Session::with("", client::CLI_28)
        .env("REQUESTS_CA_BUNDLE", "")
        .env("CURL_CA_BUNDLE", "")
        .env("FILES", &lab.client_files().display().to_string())
        .env("HOST", &lab.pool.host())
        .env("BASE", &lab.registry.busybox())
        .env("TAG", &format!("py:{}", unique()))
        .open();
    t.write("script.py", PYTHON);
    t.ok(&format!("{} script.py", parts::dir().join("docker-py/bin/python").display()));
}
