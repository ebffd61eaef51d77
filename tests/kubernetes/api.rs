//! An API server that has forgotten where a watch was (410).

use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::common::cluster::{self, Cluster};
use crate::common::pool::Pool;
use crate::common::{say, secs, wait_until};
use crate::{API, require};

fn pool(cluster: &Cluster) -> Pool {
    let target = format!("{}/dind", cluster.namespace);
    let pool = Pool::of_deployment(&cluster.restricted("dind"), &target).short_grace();
    pool.arg("--scaler").arg("off").start()
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
    let pool = pool(&cluster);
    pool.wait_healthy(2, secs(30));
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
    // The one that has gone may be found dead before the new list tells that it has; nobody else is.
    let ejected = |line: &&str| line.contains("daemon ejected") && !line.contains(&gone);
    assert_eq!(log.lines().find(ejected), None);
    wait_until("nothing is the matter any more", secs(30), || pool.status()["problems"] == json!([]));
}
