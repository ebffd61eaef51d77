//! Daemons that are reached by TLS: a real `dockerd --tlsverify`.

use std::path::Path;

use super::common::client::{self, Session};
use super::common::dockerd::Dockerd;
use super::common::http::{self, Addr};
use super::common::pool::{Pool, PoolBuilder};
use super::common::{parts, secs, short_dir, unique, wait_until};
use super::make_certs;
use crate::require;

fn needs() -> Result<(), String> {
    parts::all(&["busybox/rootfs.tar", "cli-28/docker", "buildx-0.29/docker-buildx"])?;
    parts::dockerd("28.5").map(drop)
}

/// A pool of the daemon at this address, which shows what is in this directory.
fn pool(host: &str, certs: &Path) -> PoolBuilder {
    let daemons: [&Addr; 0] = [];
    let pool = Pool::serve(daemons).arg("--daemon").arg(format!("tcp+tls://{host}"));
    pool.arg("--daemon-tls-dir").arg(certs.display().to_string())
}

#[test]
fn a_daemon_behind_tls_builds_runs_and_ends_each_direction_by_itself() {
    require!(needs());
    let (root, certs, others) = (short_dir(), short_dir(), short_dir());
    // dockerd takes no port 0, so it has an address of its own, where every port is free.
    let [.., high, low] = std::process::id().to_be_bytes();
    let address = format!("127.77.{high}.{low}");
    make_certs(certs.path(), &["--host", &address]);
    make_certs(others.path(), &["--host", &address]);
    let host = format!("{address}:2376");
    let _daemon = Dockerd::with_tls("28.5", root.path(), &host, &certs.path().join("server"));
    let plain = http::try_request(&Addr::Tcp(host.clone()), "GET", "/_ping", None).unwrap();
    assert_eq!(plain.head.status(), 400, "it takes TLS only: {}", plain.text());

    let files = certs.path().join("client");
    let good = pool(&host, &files).start();
    good.wait_healthy(1, secs(60));
    assert_eq!(good.status()["daemons"][0]["address"], format!("tcp+tls://{host}"));
    for flavour in [client::BUILDX_29, client::CLI_28] {
        work(&good, flavour);
    }
    // One that was never let in: the log says why, and does so once.
    let words = "its certificate is not from the CA of daemon_tls";
    let wrong = pool(&host, &others.path().join("client")).start();
    let reason = |pool: &Pool| pool.status()["daemons"][0]["reason"].as_str().unwrap_or_default().to_owned();
    wait_until("the status says why", secs(30), || reason(&wrong).contains(words));
    wait_until("the log says why", secs(5), || {
        wrong.log().contains(&format!("not used: cannot connect: TLS: {words}"))
    });
    let probes = || wrong.metric("dindpool_probes_total{kind=\"info\",outcome=\"failed\"}");
    let before = probes();
    wait_until("it is tried again", secs(20), || probes() > before + 2.0);
    assert_eq!(wrong.log().matches("not used").count(), 1, "{}", wrong.log());
    // Files that are replaced by wrong ones, and by good ones again.
    let own = short_dir();
    let put = |ca: &Path, pair: &Path| {
        for (file, from) in [("ca.pem", ca), ("cert.pem", pair), ("key.pem", pair)] {
            std::fs::copy(from.join(file), own.path().join(file)).unwrap();
        }
    };
    put(&files, &files);
    let changed = pool(&host, own.path()).start();
    let theirs = others.path().join("client");
    for (ca, pair, words) in
        [(&theirs, &files, words), (&files, &theirs, "it does not accept the certificate of daemon_tls")]
    {
        changed.wait_healthy(1, secs(60));
        put(ca, pair);
        changed.reload();
        wait_until("it is ejected", secs(30), || changed.healthy() == 0 && reason(&changed).contains(words));
        let out = Session::new(&changed.host(), client::CLI_28).fails("docker ps");
        assert!(out.stderr.contains(words), "{}", out.stderr);
        put(&files, &files);
        changed.reload();
    }
    changed.wait_healthy(1, secs(60));
}

fn work(pool: &Pool, flavour: client::Flavour) {
    let t = Session::new(&pool.host(), flavour);
    let (image, mark) = (format!("app:{}", unique()), unique());
    t.context(
        "ctx",
        "FROM scratch\nADD rootfs.tar /\nARG MARK\nRUN echo \"$MARK\" >/mark\nCMD [\"cat\", \"/mark\"]\n",
    );
    t.ok(&format!("docker build --network none --build-arg MARK={mark} -t {image} ctx"));
    assert_eq!(t.ok(&format!("docker run --rm --network none {image}")), format!("{mark}\n"));
    let run = format!("docker run --rm -i --network none {image}");
    let late = t.ok(&format!("echo x | {run} sh -c 'cat; usleep 500000; echo after'"));
    assert_eq!(late, "x\nafter\n", "the input ends, and the answer comes a while after that");
    let sums = t.ok(&format!(
        "head -c 3M /dev/urandom >blob; md5sum <blob; {run} md5sum <blob; {run} cat <blob | md5sum"
    ));
    let sums: Vec<&str> = sums.lines().collect();
    assert!(sums.len() == 3 && sums[0] == sums[1] && sums[0] == sums[2], "3 MiB both ways: {sums:?}");
    assert_eq!(t.run(&format!("{run} sh -c 'cat >/dev/null; exit 7' </dev/null")).code, 7);
}
