//! Who belongs to a pool: one daemon that is listed twice, two that only look alike, a proxy that is restarted.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod common;

use common::client::{self, Session};
use common::http::Addr;
use common::pool::Pool;
use common::{parts, secs, unique, wait_until};

#[test]
fn a_daemon_listed_twice_is_one_member_and_a_restarted_proxy_learns_what_is_there() {
    require!(parts::all(&["busybox/rootfs.tar", "cli-28/docker", "buildx-0.29/docker-buildx"]));
    let daemons = require!(parts::dockerd("28.5").map(|dockerd| Pool::up(&[dockerd], 2).start()));
    daemons.wait_healthy(2, secs(60));
    let all: Vec<Addr> = daemons.daemons().into_iter().map(|d| d.addr).collect();

    // The same socket under another name: another address, the same engine id, the same process.
    let Addr::Unix(socket) = &all[0] else { panic!("a local pool has Unix sockets") };
    let again = daemons.dir().join("again.sock");
    std::os::unix::fs::symlink(socket, &again).unwrap();
    let listed = [all[0].clone(), Addr::Unix(again), all[1].clone()];
    let front = Pool::serve(&listed).start();
    wait_until("two members are left", secs(20), || front.healthy() == 2 && front.daemons().len() == 2);
    wait_until("the log says why", secs(5), || front.log().contains("one daemon listed twice: merged"));
    for addr in &all {
        let volumes = common::http::get(addr, "/volumes").json();
        assert!(volumes["Volumes"].as_array().is_none_or(Vec::is_empty), "the marker stays: {volumes}");
    }

    // A container and an image of a session; then another proxy, which has seen none of it.
    let name = unique();
    let first = Session::new(&front.host(), client::BUILDX_29);
    first.context("ctx", "FROM scratch\nADD rootfs.tar /\nCMD [\"sleep\",\"60\"]\n");
    first.ok(&format!("docker build -q --network none -t img{name} ctx"));
    first.ok(&format!("docker run -d --name box{name} --network none img{name}"));
    front.stop();
    let second = Pool::serve(&all).start();
    second.wait_healthy(2, secs(20));
    let other = Session::new(&second.host(), client::BUILDX_29);
    other.ok(&format!("docker exec box{name} true"));
    other.ok(&format!("docker rm -f box{name}"));
    other.ok(&format!("docker run --rm --network none img{name} true"));
}
