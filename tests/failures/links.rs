//! Links that are cut for one proxy alone, and links that lose packets and are slow: iptables and tc between network
//! namespaces.

use std::time::Instant;

use serde_json::json;

use crate::builds::Counter;
use crate::common::client::{self, Session};
use crate::common::daemon::Daemon;
use crate::common::dockerd::Dockerd;
use crate::common::http::{self, Addr};
use crate::common::netns::Bridge;
use crate::common::pool::Pool;
use crate::common::{parts, poll, root, say, secs, short_dir, unique, wait_until};

fn needs() -> Result<(), String> {
    root()?;
    parts::all(&[
        "busybox/rootfs.tar",
        "cli-28/docker",
        "buildx-0.29/docker-buildx",
        "docker-28.5/bin/dockerd",
    ])
}

/// Starts counters in sessions of their own until there is one on each daemon.
fn on_each(proxy: &Pool, daemons: &[Daemon]) -> Vec<Counter> {
    let mut counters: Vec<Counter> = Vec::new();
    let place = |counters: &[Counter], d: &Daemon| counters.iter().position(|c| d.has_container(&c.name));
    let on_all = |counters: &[Counter]| daemons.iter().all(|d| place(counters, d).is_some());
    while !on_all(&counters) {
        assert!(counters.len() < 12, "twelve sessions are on one daemon");
        counters.push(Counter::start(&proxy.unix.url()));
    }
    let mut places: Vec<usize> = daemons.iter().filter_map(|d| place(&counters, d)).collect();
    let mut kept: Vec<Option<Counter>> = counters.into_iter().map(Some).collect();
    places.drain(..).map(|n| kept[n].take().unwrap()).collect()
}

#[test]
fn row_09_a_partition_that_one_proxy_sees_ejects_there_and_the_other_serves_undisturbed() {
    crate::require!(needs());
    let roots = [short_dir(), short_dir()];
    let dockerds = roots.each_ref().map(|root| Dockerd::start("28.5", root.path()));
    // Namespaces 0 and 1 are the daemons' machines, 2 and 3 the proxies'.
    let bridge = Bridge::new(4);
    let nodes: Vec<Addr> = (0..2)
        .map(|n| {
            let Addr::Unix(socket) = &dockerds[n].addr else { panic!("a Unix socket") };
            Addr::Tcp(bridge.node(n, socket))
        })
        .collect();
    let proxy = |i: usize| Pool::serve(&nodes).on(&bridge.namespaces[i], &bridge.address(i)).start();
    let (cut, whole) = (proxy(2), proxy(3));
    let all = [&cut, &whole];
    all.iter().for_each(|p| p.wait_healthy(2, secs(20)));
    let daemons = whole.daemons();
    // Through both proxies, on both daemons.
    let through_cut = on_each(&cut, &daemons);
    let through_whole = on_each(&whole, &daemons);

    bridge.part(2, 0);
    let start = Instant::now();
    let out = wait_until("the proxy that is cut off ejects", secs(10), || cut.healthy() == 1);
    say(format!("          row 9: out at the proxy that is cut off after {out:?}"));
    let ejected = format!("dindpool_daemon_up{{daemon=\"{}\"}}", daemons[0].id);
    assert_eq!((cut.metric(&ejected), whole.metric(&ejected)), (0.0, 1.0));
    let (aborted, took) = poll(secs(35).saturating_sub(start.elapsed()), || through_cut[0].ended())
        .expect("aborted within 30 s");
    say(format!("          row 9: its stream to there: exit {} {:?} after the ejection", aborted.code, took));
    assert_ne!(aborted.code, 0, "{}", aborted.all());
    // Its new sessions go to the daemon that it reaches.
    for _ in 0..4 {
        let name = unique();
        let body = json!({ "Name": name });
        let answer = http::request(&cut.tcp, "POST", &format!("/s/{name}/v1.44/volumes/create"), Some(&body));
        assert_eq!(answer.head.status(), 201, "{}", answer.text());
        assert!(daemons[1].has_volume(&name));
    }
    through_cut[1].counts();
    // The other proxy has noticed nothing, and serves new sessions on both.
    through_whole.iter().for_each(Counter::counts);
    assert_eq!(whole.healthy(), 2);
    assert_eq!(whole.metric("dindpool_ejections_total{reason=\"silent\"}"), 0.0);
    let on_both = on_each(&whole, &daemons);

    bridge.mend(2, 0);
    let back = wait_until("it takes the daemon back", secs(30), || cut.healthy() == 2);
    say(format!("          row 9: back {back:?} after the partition"));
    // It starts slowly: until all of its slots are open the other one is expected to be done sooner.
    let open = format!("dindpool_daemon_open_slots{{daemon=\"{}\"}}", daemons[0].id);
    wait_until("its slow start is over", secs(60), || cut.metric(&open) == 0.0);
    on_each(&cut, &daemons);
    assert_eq!(whole.healthy(), 2);
    on_both.iter().chain(&through_whole).chain(&through_cut[1..]).for_each(Counter::counts);
    daemons.iter().for_each(Daemon::remove_containers);
}

/// Bytes that no compression makes smaller, in a context and an image.
const BLOB: usize = 24 << 20;
/// What the proxy's memory may grow by while that passes: far less than a blob.
const GROWTH: u64 = 8 << 10;

#[test]
fn row_11_a_build_a_save_and_a_load_complete_over_a_slow_link_that_loses_a_tenth_of_its_packets() {
    crate::require!(needs());
    let data = short_dir();
    let dockerd = Dockerd::start("28.5", data.path());
    let bridge = Bridge::new(2);
    let Addr::Unix(socket) = &dockerd.addr else { panic!("a Unix socket") };
    let node = Addr::Tcp(bridge.node(0, socket));
    let front = Pool::serve([&node]).listen(&format!("tcp://{}:0", bridge.ip)).start();
    front.wait_healthy(1, secs(20));
    // The client beside the proxy is fast, and its daemon is slow; the client far away is slow, too.
    let near = Session::new(&front.host(), client::BUILDX_29);
    let far = Session::with(&front.listener(&bridge.ip).url(), client::CLI_28).netns(&bridge.namespaces[1]);
    let far = far.open();
    for t in [&near, &far] {
        t.context("ctx", "FROM scratch\nADD rootfs.tar /\nCOPY blob /blob\n");
        t.ok(&format!("head -c {BLOB} /dev/urandom >ctx/blob; sha256sum <ctx/blob >sum"));
    }
    near.ok("docker info >/dev/null");
    for i in 0..2 {
        let shaped = bridge.worsen(i, 0.1, "40mbit");
        say(format!("          row 11: 10 % loss each way, 40 Mbit/s: {shaped}"));
    }
    let before = front.peak_rss();
    for (who, t) in [("from beside the proxy", &near), ("from far away", &far)] {
        let timed = |what: &str, script: &str| {
            let start = Instant::now();
            t.start(script).wait_ok(secs(240));
            say(format!("          row 11: {who}: {what}: {:?}", start.elapsed()));
        };
        let name = format!("lossy{}", unique());
        let sum = "says docker run --rm --network none NAME sha256sum /blob | cut -d' ' -f1 | grep -qf - sum";
        let sum = sum.replace("NAME", &name);
        timed("build", &format!("docker build -q --network none -t {name} ctx"));
        timed("run", &sum);
        timed("save", &format!("docker save -o image.tar {name}"));
        timed("load", &format!("docker rmi {name} && docker load -q -i image.tar"));
        timed("run", &sum);
        let rss = front.peak_rss();
        say(format!("          row 11: {who}: the proxy's memory: {before} KiB became {rss} KiB at most"));
        assert!(rss < before + GROWTH, "{before} KiB became {rss} KiB");
    }
    say(format!(
        "          row 11: ejected {} times meanwhile",
        front.metric("dindpool_ejections_total{reason=\"silent\"}")
    ));
}
