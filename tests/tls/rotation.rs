//! Certificates that are replaced while they are in use.

use super::common::client::{self, Job};
use super::common::{say, secs, unique, wait_until};
use super::{Lab, make_certs};

/// How many streams are open meanwhile.
const STREAMS: usize = 50;
/// How often the certificates are replaced.
const ROTATIONS: usize = 20;

pub fn row_41_certificates_replaced_under_load(lab: &Lab) {
    let t = lab.terminal(client::BUILDX_29);
    let image = format!("rotate:{}", unique());
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    t.ok(&format!("unset DOCKER_HOST; docker build -t {image} ctx"));
    let work = "until test -e /stop; do echo tick; sleep 1; done; echo end";
    let name = format!("r{}", unique());
    t.ok(&format!("unset DOCKER_HOST; docker run -d --name {name} --network none {image} sh -c '{work}'"));
    let streams: Vec<Job> =
        (0..STREAMS).map(|_| t.start(&format!("unset DOCKER_HOST; docker logs -f {name}"))).collect();
    wait_until("all streams run", secs(60), || streams.iter().all(|s| s.stdout().contains("tick")));
    let slow = "FROM scratch\nADD rootfs.tar /\nARG N\nRUN for i in $(seq 1 20); do echo $N; sleep 1; done\n";
    t.context("slow", slow);
    let builds: Vec<Job> = (0..2)
        .map(|n| t.start(&format!("unset DOCKER_HOST; docker build --network none --build-arg N={n} slow")))
        .collect();
    wait_until("the builds run", secs(60), || {
        builds.iter().all(|b| b.stderr().contains("RUN for i") || b.stdout().contains("RUN for i"))
    });
    let replaced = || lab.pool.metric("dindpool_certificate_reloads_total{result=\"replaced\"}");
    let expiry = || {
        let series = format!(
            "dindpool_certificate_expiry_timestamp_seconds{{certificate=\"{}\"}}",
            lab.certs().join("server/cert.pem").display()
        );
        lab.pool.metric(&series)
    };
    let before = replaced();
    for n in 1..=ROTATIONS {
        make_certs(&lab.certs(), &["--days", &(100 + n).to_string()]);
        let expired = expiry();
        lab.pool.reload();
        wait_until("the new certificate applies", secs(20), || {
            replaced() >= before + n as f64 && expiry() != expired
        });
        assert!(!t.ok("unset DOCKER_HOST; docker ps -q").is_empty());
    }
    let cut = streams.iter().filter(|s| s.code().is_some()).count();
    assert_eq!(cut, 0, "streams that ended");
    for build in &builds {
        build.wait_ok(secs(90));
    }
    t.ok(&format!("unset DOCKER_HOST; docker exec {name} touch /stop"));
    for stream in &streams {
        let out = stream.wait(secs(30));
        assert!(out.code == 0 && out.stdout.ends_with("end\n"), "{}", out.all());
    }
    t.ok(&format!("unset DOCKER_HOST; docker rm -f {name}"));
    say(format!("{ROTATIONS} certificates under {STREAMS} streams and {} builds: none cut", builds.len()));
}
