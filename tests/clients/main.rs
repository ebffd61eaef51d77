//! The main job on real input: unmodified clients build, run and push through pools of several real daemons,
//! and never notice that there is more than one.
//!
//! Each pool is started once and shared by its scenarios, which are reported one by one
//! (`DINDPOOL_SCENARIO=WORD` runs those with the word). Pools run one after the other: two cores cannot hold
//! more than three daemons and their clients.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod build;
mod compose;
mod isolation;
mod load;
mod objects;
mod run;
mod sdk;
mod sessions;

#[path = "../common/mod.rs"]
mod common;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::client::{self, Flavour, Session};
use common::pool::Pool;
use common::registry::Registry;
use common::scenarios::Scenarios;
use common::{parts, unique};

/// A named rule that a client of any flavour must show.
type Rule = (&'static str, fn(&Lab, Flavour));

/// A pool with its registry.
struct Lab {
    pool: Arc<Pool>,
    registry: Arc<Registry>,
    /// The `DOCKER_CERT_PATH` of its terminals, if they speak TLS.
    tls: Option<PathBuf>,
    _alone: Option<MutexGuard<'static, ()>>,
}

impl Lab {
    /// Three daemons of these versions, in turn.
    fn start(versions: &[&str]) -> Result<Lab, String> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        parts::all(&[
            "busybox/rootfs.tar",
            "registry/docker-registry",
            "cli-28/docker",
            "cli-20.10/docker",
            "buildx-0.13/docker-buildx",
            "buildx-0.29/docker-buildx",
            "buildx-0.38/docker-buildx",
            "compose-2.26/docker-compose",
            "docker-py/bin/python",
            "dockerode/node_modules",
        ])?;
        let dockerds = versions.iter().map(|v| parts::dockerd(v)).collect::<Result<Vec<_>, _>>()?;
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let registry = Arc::new(Registry::start());
        let pool = Pool::up(&dockerds, 3).arg(registry.dockerd_arg()).arg("--tls").short_grace().start();
        pool.wait_healthy(3, common::secs(60));
        Ok(Lab { pool: Arc::new(pool), registry, tls: None, _alone: Some(alone) })
    }

    /// The same pool on the same port, spoken to by TLS.
    fn over_tls(&self) -> Lab {
        let (pool, registry) = (self.pool.clone(), self.registry.clone());
        let tls = Some(pool.data().join("certs/client"));
        Lab { pool, registry, tls, _alone: None }
    }

    /// What makes a client speak TLS, if it is to.
    fn tls_env(&self) -> Vec<(&'static str, String)> {
        let files = self.tls.iter().map(|files| ("DOCKER_CERT_PATH", files.display().to_string()));
        files.chain(self.tls.iter().map(|_| ("DOCKER_TLS_VERIFY", "1".into()))).collect()
    }

    /// Removes what earlier scenarios left, and waits until every lease has gone: a pool as if it were new.
    fn quiet(&self) {
        self.pool.daemons().iter().for_each(common::daemon::Daemon::remove_containers);
        self.pool.wait_no_sessions(common::secs(60));
    }

    /// A terminal with this client.
    fn terminal(&self, flavour: Flavour) -> Session {
        let terminal = Session::with(&self.pool.host(), flavour);
        let env = self.tls_env();
        env.iter().fold(terminal, |terminal, (name, value)| terminal.env(name, value)).open()
    }

    /// A terminal in which an image named `mark` is built: `docker run IMAGE` prints its mark.
    fn terminal_with_image(&self, flavour: Flavour) -> (Session, String) {
        let terminal = self.terminal(flavour);
        let image = format!("app:{}", unique());
        terminal.context("ctx", build::APP);
        terminal.ok(&format!("docker build -q --network none --build-arg MARK={image} -t {image} ctx"));
        (terminal, image)
    }
}

/// Everything that every client and version must pass.
fn build_scenarios<'a>(all: &mut Scenarios<'a>, lab: &'a Lab, flavour: Flavour) {
    let name = flavour.name;
    for (rule, scenario) in build::RULES {
        if scenario.fits(flavour) {
            all.add(format!("{name}: {rule}"), move || scenario.run(lab, flavour));
        }
    }
}

/// The rules of building that every client shows over TLS as well: each kind of upload, download and upgrade once.
const OVER_TLS: &[&str] = &[
    "a build from a directory runs where it was built",
    "a build from a tar on stdin runs",
    "a build, then a push, then a pull give the same image",
    "a build exports files to the client",
    "a failing RUN makes the client fail with its exit code in the message",
];
/// The same of commands.
const COMMANDS_OVER_TLS: &[&str] = &[
    "run keeps stdout, stderr and exit code apart",
    "run -i takes a pipe to its end",
    "exec gives output, exit code and stdin",
    "attach speaks with a running container",
    "logs -f shows every line and ends with the container",
    "cp carries files, folders and tars both ways",
];

/// The main scenarios of each client through the same port with TLS.
fn tls_scenarios<'a>(all: &mut Scenarios<'a>, lab: &'a Lab, flavours: &[Flavour]) {
    for flavour in flavours.iter().copied() {
        let name = flavour.name;
        for (rule, scenario) in build::RULES {
            if scenario.fits(flavour) && OVER_TLS.contains(rule) {
                all.add(format!("over TLS: {name}: {rule}"), move || scenario.run(lab, flavour));
            }
        }
    }
    for flavour in [client::BUILDX_29, client::CLI_20] {
        let name = flavour.name;
        for (rule, scenario) in run::RULES.iter().chain(objects::RULES) {
            if COMMANDS_OVER_TLS.contains(rule) {
                all.add(format!("over TLS: {name}: {rule}"), move || scenario(lab, flavour));
            }
        }
    }
    compose::add_over_tls(all, lab);
    sdk::add_over_tls(all, lab);
}

fn command_scenarios<'a>(all: &mut Scenarios<'a>, lab: &'a Lab, flavour: Flavour) {
    let name = flavour.name;
    for (rule, scenario) in run::RULES.iter().chain(objects::RULES) {
        all.add(format!("{name}: {rule}"), move || scenario(lab, flavour));
    }
}

/// Oldest and newest clients, for the versions at the edges.
fn oldest_and_newest(title: &str, lab: &Lab) {
    let mut all = Scenarios::new(title).second_tries(2);
    isolation::add(&mut all, lab);
    for flavour in [client::BUILDX_38, client::CLI_20, client::CLI_20_BUILDKIT] {
        build_scenarios(&mut all, lab, flavour);
    }
    for flavour in [client::BUILDX_38, client::CLI_20] {
        command_scenarios(&mut all, lab, flavour);
    }
    compose::add(&mut all, lab);
    sdk::add(&mut all, lab);
    all.run(4);
}

#[test]
fn every_client_works_on_three_daemons_of_28_5() {
    let lab = require!(Lab::start(&["28.5"]));
    let tls = lab.over_tls();
    let mut all = Scenarios::new("28.5").second_tries(2);
    isolation::add(&mut all, &lab);
    sessions::add(&mut all, &lab);
    // First, because it takes its two minutes beside the others.
    all.add("logs -f to a reader that stops for two minutes goes on afterwards", || {
        run::stopped_reader(&lab)
    });
    let flavours = [
        client::BUILDX_38,
        client::BUILDX_29,
        client::BUILDX_13,
        client::CLI_28,
        client::CLI_20,
        client::CLI_20_BUILDKIT,
    ];
    for flavour in flavours {
        build_scenarios(&mut all, &lab, flavour);
    }
    tls_scenarios(&mut all, &tls, &flavours);
    for flavour in [client::BUILDX_29, client::CLI_20] {
        command_scenarios(&mut all, &lab, flavour);
    }
    compose::add(&mut all, &lab);
    sdk::add(&mut all, &lab);
    load::add(&mut all, &lab);
    let before = handshakes(&lab);
    all.run(5);
    if std::env::var_os("DINDPOOL_SCENARIO").is_none() {
        assert!(handshakes(&lab) > before + 100.0, "what is over TLS was over TLS");
    }
}

fn handshakes(lab: &Lab) -> f64 {
    lab.pool.metric("dindpool_tls_handshakes_total{result=\"done\"}")
}

#[test]
fn oldest_and_newest_clients_work_on_three_daemons_of_20_10() {
    let lab = require!(Lab::start(&["20.10"]));
    oldest_and_newest("20.10", &lab);
}

#[test]
fn oldest_and_newest_clients_work_on_three_daemons_of_26_1() {
    let lab = require!(Lab::start(&["26.1"]));
    oldest_and_newest("26.1", &lab);
}

#[test]
fn oldest_and_newest_clients_work_on_three_daemons_of_29() {
    let lab = require!(Lab::start(&["29"]));
    oldest_and_newest("29", &lab);
}

#[test]
fn oldest_and_newest_clients_work_on_a_pool_of_mixed_versions() {
    let lab = require!(Lab::start(&["26.1", "28.5", "29"]));
    oldest_and_newest("mixed", &lab);
}
