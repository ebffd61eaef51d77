//! TLS beside plain HTTP on one port, with unmodified clients: contexts with `ca=,cert=,key=`, who is refused and what
//! they read, certificates that are replaced under live streams.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

#[path = "../common/mod.rs"]
mod common;
mod daemons;
mod refused;
mod rotation;
mod session;
mod work;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::client::{Flavour, Session};
use common::pool::Pool;
use common::registry::Registry;
use common::scenarios::Scenarios;
use common::{client, parts, secs};

/// A pool with certificates of its own, and a registry.
struct Lab {
    pool: Pool,
    registry: Registry,
}

/// `dindpool certs` with these arguments.
fn make_certs(dir: &Path, args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_dindpool")).arg("certs").arg(dir).args(args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

impl Lab {
    fn start() -> Result<Lab, String> {
        parts::all(&[
            "busybox/rootfs.tar",
            "registry/docker-registry",
            "cli-28/docker",
            "cli-20.10/docker",
            "buildx-0.29/docker-buildx",
            "compose-2.26/docker-compose",
            "docker-py/bin/python",
        ])?;
        let dockerd = parts::dockerd("28.5")?;
        let registry = Registry::start();
        let pool = Pool::up(&[dockerd], 2).arg(registry.dockerd_arg()).arg("--tls").start();
        pool.wait_healthy(2, secs(60));
        Ok(Lab { pool, registry })
    }

    /// What the pool made for itself.
    fn certs(&self) -> PathBuf {
        self.pool.data().join("certs")
    }

    fn client_files(&self) -> PathBuf {
        self.certs().join("client")
    }

    /// A terminal whose context has the certificates, made as a user makes it.
    fn terminal(&self, flavour: Flavour) -> Session {
        let terminal = self.without_context(flavour);
        terminal.ok(&self.create_context("dind", &self.client_files()));
        terminal.ok("unset DOCKER_HOST; docker context use dind");
        terminal
    }

    /// One that names no daemon.
    fn without_context(&self, flavour: Flavour) -> Session {
        Session::new("", flavour)
    }

    fn create_context(&self, name: &str, files: &Path) -> String {
        let file = |name: &str| files.join(name).display().to_string();
        format!(
            "unset DOCKER_HOST; docker context create {name} --docker \"host={},ca={},cert={},key={}\"",
            self.pool.host(),
            file("ca.pem"),
            file("cert.pem"),
            file("key.pem")
        )
    }

    /// Another pool of its daemons, which takes TLS only, with the certificates of this directory.
    fn guarded(&self, certs: &Path) -> Pool {
        let file = |name: &str| certs.join("server").join(name).display().to_string();
        let toml = format!(
            "[tls]\ncertificates = [{{ cert = '{}', key = '{}' }}]\nclient_ca = '{}'\nplain = 'refused'\n",
            file("cert.pem"),
            file("key.pem"),
            file("ca.pem")
        );
        let config = self.pool.dir().join(format!("{}.toml", common::unique()));
        std::fs::write(&config, toml).unwrap();
        let behind = self.pool.daemons();
        let guarded = Pool::serve(behind.iter().map(|d| &d.addr));
        let guarded = guarded.env("DINDPOOL_CONFIG", config.to_str().unwrap()).start();
        guarded.wait_healthy(2, secs(20));
        guarded
    }

    fn handshakes(&self, result: &str) -> f64 {
        self.pool.metric(&format!("dindpool_tls_handshakes_total{{result=\"{result}\"}}"))
    }
}

#[test]
fn clients_with_and_without_tls_share_a_port() {
    let lab = require!(Lab::start());
    let mut all = Scenarios::new("TLS");
    for flavour in [client::BUILDX_29, client::CLI_28, client::CLI_20, client::CLI_20_BUILDKIT] {
        work::add(&mut all, &lab, flavour);
    }
    work::add_others(&mut all, &lab);
    session::add(&mut all, &lab);
    refused::add(&mut all, &lab);
    all.at_last("certificates replaced 20 times cut no stream and no build", || {
        rotation::row_41_certificates_replaced_under_load(&lab)
    });
    all.run(3);
    assert!(lab.handshakes("done") > 50.0, "this was TLS");
    let log = lab.pool.log();
    assert!(!log.contains("panic"), "{log}");
}
