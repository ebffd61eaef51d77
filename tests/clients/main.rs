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

use std::sync::{Mutex, MutexGuard, PoisonError};

use common::client::{self, Flavour, Session};
use common::pool::Pool;
use common::registry::Registry;
use common::scenarios::Scenarios;
use common::{parts, unique};

/// A named rule that a client of any flavour must show.
type Rule = (&'static str, fn(&Lab, Flavour));

/// A pool with its registry.
struct Lab {
    pool: Pool,
    registry: Registry,
    _alone: MutexGuard<'static, ()>,
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
        let registry = Registry::start();
        let pool = Pool::up(&dockerds, 3).arg(registry.dockerd_arg()).short_grace().start();
        pool.wait_healthy(3, common::secs(60));
        Ok(Lab { pool, registry, _alone: alone })
    }

    /// Removes what earlier scenarios left, and waits until every lease has gone: a pool as if it were new.
    fn quiet(&self) {
        self.pool.daemons().iter().for_each(common::daemon::Daemon::remove_containers);
        self.pool.wait_no_sessions(common::secs(60));
    }

    /// A terminal with this client.
    fn terminal(&self, flavour: Flavour) -> Session {
        Session::new(&self.pool.host(), flavour)
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
    let mut all = Scenarios::new("28.5").second_tries(2);
    isolation::add(&mut all, &lab);
    sessions::add(&mut all, &lab);
    // First, because it takes its two minutes beside the others.
    all.add("logs -f to a reader that stops for two minutes goes on afterwards", || {
        run::stopped_reader(&lab)
    });
    for flavour in [
        client::BUILDX_38,
        client::BUILDX_29,
        client::BUILDX_13,
        client::CLI_28,
        client::CLI_20,
        client::CLI_20_BUILDKIT,
    ] {
        build_scenarios(&mut all, &lab, flavour);
    }
    for flavour in [client::BUILDX_29, client::CLI_20] {
        command_scenarios(&mut all, &lab, flavour);
    }
    compose::add(&mut all, &lab);
    sdk::add(&mut all, &lab);
    load::add(&mut all, &lab);
    all.run(5);
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
