//! What real Docker clients do on the wire, replayed byte by byte: against real daemons with a direct connection
//! as the oracle, and against the fake daemon where it must be proved that nothing reached a daemon, or where a
//! daemon must misbehave.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod differential;
mod faults;
mod heads;
mod hijack;
mod local;
mod smuggling;
mod transcript;

#[path = "../common/mod.rs"]
mod common;

use common::client;
use common::daemon::Daemon;
use common::http::Addr;
use common::pool::Pool;
use common::scenarios::Scenarios;
use common::{parts, secs, unique};

/// A real daemon, reached directly and through a proxy that has only this one: whatever differs is the proxy's.
struct Lab {
    direct: Daemon,
    /// The proxy in front of it.
    via: Pool,
    /// An image on it that has a shell.
    image: String,
}

impl Lab {
    fn new(direct: Daemon) -> Lab {
        let via = Pool::serve([&direct.addr]).start();
        via.wait_healthy(1, secs(30));
        let image = format!("wire:{}", unique());
        let t = client::Session::new(&direct.addr.url(), client::CLI_28);
        t.ok(&format!("docker import {} {image}", parts::busybox("rootfs.tar").display()));
        Lab { direct, via, image }
    }

    /// Both ways to the daemon, the oracle first.
    fn ways(&self) -> [&Addr; 2] {
        [&self.direct.addr, &self.via.tcp]
    }

    /// Creates and starts a container directly; its id.
    fn container(&self, config: serde_json::Value) -> String {
        let mut config = config;
        config["Image"] = self.image.as_str().into();
        config["HostConfig"] = serde_json::json!({ "NetworkMode": "none" });
        let made =
            common::http::request(&self.direct.addr, "POST", "/v1.44/containers/create", Some(&config));
        assert_eq!(made.head.status(), 201, "{}", made.text());
        let id = made.json()["Id"].as_str().unwrap().to_owned();
        let started =
            common::http::request(&self.direct.addr, "POST", &format!("/v1.44/containers/{id}/start"), None);
        assert_eq!(started.head.status(), 204, "{}", started.text());
        id
    }

    /// Removes a container directly.
    fn remove(&self, id: &str) {
        common::http::request(&self.direct.addr, "DELETE", &format!("/v1.44/containers/{id}?force=1"), None);
    }
}

#[test]
fn the_wire_of_real_daemons_is_unchanged() {
    require!(parts::all(&["busybox/rootfs.tar", "cli-28/docker"]));
    let dockerds = [require!(parts::dockerd("28.5")), require!(parts::dockerd("29"))];
    let pool = Pool::up(&dockerds, 2).start();
    for daemon in pool.daemons() {
        let title = daemon.get("/version")["Version"].as_str().unwrap().to_owned();
        let lab = Lab::new(daemon);
        let mut all = Scenarios::new(&title);
        local::add_real(&mut all, &lab);
        differential::add(&mut all, &lab);
        heads::add(&mut all, &lab);
        hijack::add(&mut all, &lab);
        all.run(1); // side by side they would see each other's images in the lists that are compared
    }
}
