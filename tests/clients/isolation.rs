//! What two terminals see of each other. These run alone: with an idle pool it is certain that a second session
//! is given another daemon than the first.

use super::common::client;
use super::common::daemon::where_is;
use super::common::scenarios::Scenarios;
use super::common::unique;
use super::{Lab, compose};

/// Adds the scenarios.
pub fn add<'a>(all: &mut Scenarios<'a>, lab: &'a Lab) {
    all.alone("the same container name in two terminals is two containers", || same_name(lab));
    all.alone("one compose project name in two CI jobs is two projects", || compose::one_name_twice(lab));
    all.alone("names that another CI job uses are free in this one", || other_job(lab));
    all.alone("a compose project goes down in another terminal than it went up in", || {
        compose::from_another_terminal(lab);
    });
    all.alone("a second terminal reaches a container of the first by name and by id", || two_terminals(lab));
    all.alone("DINDPOOL_SESSION makes one session of two terminals", || explicit(lab));
}

/// Jobs of a CI system come from one repository, so they use the same names, and begin by clearing them away.
fn other_job(lab: &Lab) {
    lab.quiet();
    let name = format!("job{}", unique());
    let script = format!(
        "docker build -q --network none --build-arg MARK=$CI_JOB_ID -t {name} ctx || exit\n\
         docker rm -f {name} 2>/dev/null\n\
         docker network inspect {name} >/dev/null 2>&1 || docker network create {name} || exit\n\
         docker run -d --name {name} --network {name} {name} sh -c 'cat /mark; sleep 600'"
    );
    let jobs: Vec<(client::Session, String)> = (0..2)
        .map(|_| {
            let id = unique();
            let job = client::Session::with(&lab.pool.host(), client::BUILDX_29).env("CI_JOB_ID", &id).open();
            job.context("ctx", super::build::APP);
            job.ok(&script);
            (job, id)
        })
        .collect();
    for (job, id) in &jobs {
        assert_eq!(job.ok(&format!("docker logs {name}")), format!("{id}\n"));
        assert_eq!(
            job.ok(&format!("docker ps -q --filter name={name} | wc -l")).trim(),
            "1",
            "its own still runs"
        );
    }
    jobs.iter()
        .for_each(|(job, _)| drop(job.ok(&format!("docker rm -f {name} && docker network rm {name}"))));
}

fn same_name(lab: &Lab) {
    lab.quiet();
    let name = format!("db{}", unique());
    let terminals: Vec<_> = (0..2).map(|_| lab.terminal_with_image(client::BUILDX_29)).collect();
    for (n, (t, image)) in terminals.iter().enumerate() {
        t.ok(&format!("docker run -d --name {name} --network none {image} sh -c 'echo I am {n}; sleep 600'"));
    }
    for (n, (t, _)) in terminals.iter().enumerate() {
        assert_eq!(t.ok(&format!("docker logs {name}")), format!("I am {n}\n"));
    }
    assert_eq!(where_is(&lab.pool.daemons(), |d| d.has_container(&name)).len(), 2);
    terminals.iter().for_each(|(t, _)| drop(t.ok(&format!("docker rm -f {name}"))));
}

fn two_terminals(lab: &Lab) {
    let (first, image) = lab.terminal_with_image(client::BUILDX_29);
    let name = format!("app{}", unique());
    let id =
        first.ok(&format!("docker run -d --name {name} --network none {image} sh -c 'cat /mark; sleep 600'"));
    let (second, own_image) = lab.terminal_with_image(client::CLI_28);
    for what in [&name, id.trim(), &id[..12]] {
        assert_eq!(second.ok(&format!("docker logs {what}")), format!("{image}\n"));
        assert_eq!(second.ok(&format!("docker exec {what} cat /mark")), format!("{image}\n"));
    }
    // That has not moved the second terminal: its own work still goes where its own image is.
    assert_eq!(second.ok(&format!("docker run --rm --network none {own_image}")), format!("{own_image}\n"));
    second.ok(&format!("docker rm -f {name}"));
    assert!(first.fails(&format!("docker inspect {name}")).stderr.contains("No such"));
}

fn explicit(lab: &Lab) {
    lab.quiet();
    let key = unique();
    let with_key =
        || client::Session::with(&lab.pool.host(), client::BUILDX_29).env("DINDPOOL_SESSION", &key).open();
    let (first, second) = (with_key(), with_key());
    for (n, t) in [&first, &second].into_iter().enumerate() {
        t.context("ctx", &format!("{}LABEL session={key}\nRUN echo {n} >/n\n", super::build::APP));
        t.ok(&format!("docker build --network none -t one:{key}-{n} ctx"));
        t.ok(&format!("docker run -d --network none --label session={key} one:{key}-{n} sleep 600"));
    }
    let daemons = lab.pool.daemons();
    let holders = where_is(&daemons, |d| d.labelled(&format!("session={key}")).len() == 2);
    assert_eq!(holders.len(), 1, "both containers on one daemon");
    first.ok(&format!("docker rm -f $(docker ps -q --filter label=session={key})"));
}
