//! Daemons that are pods of a real Kubernetes cluster.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

use std::sync::RwLock;
use std::time::Instant;

use common::cluster::{self, Cluster};
use common::http::{self, Addr};
use common::{say, secs, wait_until};

mod api;
mod chart;
#[path = "../common/mod.rs"]
mod common;
mod evict;
mod lease;
mod notes;
mod pool;

/// The API server that all tests share: written by the one that stops it.
static API: RwLock<()> = RwLock::new(());

#[test]
fn pods_with_docker_daemons_become_ready_and_answer_the_host() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    let start = Instant::now();
    cluster.apply(&cluster::dind("dind", 2));
    let pods = cluster.wait_ready("app=dind", 2);
    say(format!("two pods are ready after {:.1?}", start.elapsed()));
    let ids: Vec<String> = pods
        .iter()
        .map(|pod| {
            let addr = Addr::Tcp(format!("{}:2375", pod.ip));
            assert_eq!(http::get(&addr, "/_ping").text(), "OK");
            http::get(&addr, "/info").json()["ID"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_ne!(ids[0], ids[1], "they are two daemons");
}

#[test]
fn a_client_in_a_pod_builds_and_runs_on_a_daemon_in_another() {
    let _api = API.read();
    let cluster = require!(Cluster::start());
    cluster.apply(&cluster::dind("dind", 1));
    let daemon = &cluster.wait_ready("app=dind", 1)[0].ip;
    // Once more if it says nothing: see `client::SAYS`.
    let script = "docker load -qi /busybox.tar && mkdir /ctx && cd /ctx && \
                  printf 'FROM localhost/busybox:1\\nRUN echo built > /told\\n' > Dockerfile && \
                  docker build -q -t told . && { docker run --rm told cat /told | grep . || docker run --rm told cat /told; }";
    let image = format!("--image={}", cluster::DOCKER_CLI);
    let host = format!("--env=DOCKER_HOST=tcp://{daemon}:2375");
    cluster.kubectl(&["run", "client", "--restart=Never", &image, &host, "--", "sh", "-c", script]);
    let phase = || cluster.kubectl(&["get", "pod", "client", "-o", "jsonpath={.status.phase}"]);
    wait_until("the client has ended", secs(120), || ["Succeeded", "Failed"].contains(&phase().as_str()));
    let log = cluster.kubectl(&["logs", "client"]);
    assert_eq!(log.lines().last(), Some("built"), "{log}");
}
