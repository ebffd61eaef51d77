//! Machines that vanish: their packets are dropped by iptables in a network namespace, and nobody is told.
use std::time::{Duration, Instant};

use crate::common::client::{self, Job, Session};
use crate::common::http::{Addr, Conn};
use crate::common::netns::Bridge;
use crate::common::pool::Pool;
use crate::common::{parts, poll, root, say, secs, wait_until};

/// Bytes of the log that nobody reads for half a minute.
const LOG: usize = 20_000_000;

/// When a job ended; it must not have ended well.
fn aborted(what: &str, job: &Job, since: Instant, limit: Duration) {
    let left = limit.saturating_sub(since.elapsed());
    let Some((out, _)) = poll(left, || job.output()) else { panic!("{what}: not within {limit:?}") };
    say(format!("          {what}: exit {} after {:?}: {}", out.code, since.elapsed(), out.stderr.trim()));
    assert_ne!(out.code, 0, "{what}: {}", out.all());
}

#[test]
fn row_08_a_lost_node_and_row_10_a_half_open_client_are_found_within_30_s_and_a_closed_window_is_neither() {
    crate::require!(root());
    crate::require!(parts::all(&["busybox/rootfs.tar", "cli-28/docker"]));
    let daemons = crate::require!(parts::dockerd("28.5").map(|dockerd| Pool::up(&[dockerd], 2).start()));
    daemons.wait_healthy(2, secs(60));
    let all = daemons.daemons();
    let bridge = Bridge::new(2);
    let Addr::Unix(socket) = &all[0].addr else { panic!("a local pool has Unix sockets") };
    let node = Addr::Tcp(bridge.node(0, socket));
    let front = Pool::serve([&node, &all[1].addr]).listen(&format!("tcp://{}:0", bridge.ip)).start();
    front.wait_healthy(2, secs(20));

    // Containers with the same work on both, each under a name of its own.
    let t = Session::new(&front.host(), client::CLI_28);
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\n");
    for (n, daemon) in all.iter().enumerate() {
        let at = format!("docker -H {}", daemon.addr.url());
        t.ok(&format!(
            "{at} build -q -t r ctx
             {at} run -d --name silent{n} --network none r sleep 600
             {at} run -d --name ticks{n} --network none r sh -c 'while true; do echo tick; usleep 100000; done'
             {at} create -i --name eats{n} --network none r sh -c 'cat >/dev/null'"
        ));
    }
    let line = "$(printf 'x%.0s' $(seq 1 4000))";
    t.ok(&format!(
        "docker -H {} run --name long --network none r sh -c \"yes {line} | head -c {LOG}\" >/dev/null",
        all[1].addr.url()
    ));

    // Through the proxy: one that sends, one that is silent, to the node that will be lost.
    let sends = t.start("(while true; do echo x; sleep 0.1; done) | docker start -ai eats0");
    let silent = t.start("exec docker logs -f silent0");
    // From a machine that will be lost: one that is sent to, one that is silent.
    let away = Session::with(&front.listener(&bridge.ip).url(), client::CLI_28).netns(&bridge.namespaces[1]);
    let away = away.open();
    let ticks = away.start("exec docker logs -f ticks1");
    let _quiet = away.start("exec docker logs -f silent1");
    // One that lives, and does not read.
    let mut stalled = Conn::connect(&front.tcp);
    stalled.send("GET /containers/long/logs?stdout=1 HTTP/1.1\r\nHost: d\r\n\r\n");
    let running = |name: &str| t.run(&format!("docker inspect -f '{{{{.State.Running}}}}' {name}")).stdout;
    wait_until("the sender runs", secs(20), || running("eats0") == "true\n");
    wait_until("the ticks come", secs(20), || ticks.stdout().contains("tick"));
    wait_until("all five stream", secs(10), || {
        front.metric("dindpool_streams{kind=\"exchange\"}")
            + front.metric("dindpool_streams{kind=\"tunnel\"}")
            >= 5.0
    });

    let start = Instant::now();
    bridge.lose(0);
    bridge.lose(1);
    let others = std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let streams = || front.metric("dindpool_streams{kind=\"exchange\"}");
            let lost = "dindpool_peers_lost_total{side=\"client\"}";
            let found =
                wait_until("the client that is sent to is found", secs(30), || front.metric(lost) >= 1.0);
            say(format!("          a vanished client that is sent to: found after {found:?}"));
            // What is left: nobody but the one that does not read.
            wait_until("the silent client is found", secs(40), || streams() == 1.0);
            start.elapsed()
        });
        aborted("a stream to the lost node with data on its way", &sends, start, secs(30));
        aborted("a silent stream to the lost node", &silent, start, secs(34));
        clients.join().unwrap()
    });
    say(format!("          a vanished client that was silent: found after {others:?}"));
    assert!(others < secs(34), "{others:?}");
    // Each of the two streams may be found by its own silence.
    assert!(front.metric("dindpool_peers_lost_total{side=\"daemon\"}") >= 1.0);
    assert!(front.log().contains("peer lost: it acknowledges nothing"));
    // Half a minute with a closed window later, everything is there.
    assert!(start.elapsed() > secs(25));
    let head = stalled.head();
    assert_eq!(head.status(), 200);
    assert!(stalled.body("GET", &head).len() >= LOG);
    all.iter().for_each(crate::common::daemon::Daemon::remove_containers);
}
