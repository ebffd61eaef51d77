//! A build context that is small on its way and huge where it is unpacked.

use std::time::Instant;

use crate::common::client::{self, Session};
use crate::common::dockerd::{Dockerd, Tmpfs};
use crate::common::pool::Pool;
use crate::common::{millis, parts, say, secs};

/// What the context becomes, in MiB; the data root holds a small part of that.
const UNPACKED: u64 = 600;

#[test]
fn row_31_a_zip_bomb_costs_the_proxy_nothing_and_its_client_gets_the_daemons_error() {
    crate::require!(parts::all(&["busybox/rootfs.tar", "cli-28/docker", "docker-28.5/bin/dockerd"]));
    let data = Tmpfs::new(96);
    let daemon = Dockerd::start("28.5", data.path());
    let pool = Pool::serve([&daemon.addr]).start();
    pool.wait_healthy(1, secs(20));
    let t = Session::new(&pool.host(), client::CLI_28);
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    t.context("bomb", "FROM scratch\nCOPY zeros /\n");
    t.ok(&format!(
        "truncate -s {UNPACKED}M bomb/zeros; tar -cf - -C bomb . | gzip -1 >bomb.tar.gz; rm -r bomb"
    ));
    let packed = std::fs::metadata(t.path("bomb.tar.gz")).unwrap().len();
    // What a good build costs the proxy, so that the bomb's cost is seen beside it.
    t.ok("docker build -q --network none -t good ctx");
    let (memory, cpu, start) = (pool.peak_rss(), pool.cpu(), Instant::now());
    let out = t.fails("docker build --network none - <bomb.tar.gz");
    let (memory, cpu) = (pool.peak_rss() - memory, pool.cpu() - cpu);
    say(format!(
        "          row 31: {packed} bytes that become {UNPACKED} MiB: exit {} after {:?}, the proxy used {cpu:?} of \
         processor time and {memory} KiB more: {}",
        out.code,
        start.elapsed(),
        out.stderr.trim()
    ));
    assert!(out.stderr.contains("no space left on device"), "{}", out.all());
    assert!(memory < 8 << 10, "{memory} KiB");
    assert!(cpu < millis(500), "{cpu:?}");
    // The daemon has thrown the context away, and builds on.
    pool.wait_healthy(1, secs(20));
    t.ok("docker build -q --no-cache --network none ctx");
}
