//! What two terminals see of each other. These run alone: with an idle pool it is certain that a second session
//! is given another daemon than the first.

use super::common::client;
use super::common::daemon::where_is;
use super::common::scenarios::Scenarios;
use super::common::unique;
use super::{Lab, compose};

/// Runs the scenarios one by one.
pub fn run(title: &str, lab: &Lab) {
    let mut all = Scenarios::new(title);
    all.add("the same container name in two terminals is two containers", || same_name(lab));
    all.add("one compose project name in two terminals is two projects", || compose::one_name_twice(lab));
    all.add("a compose project goes down in another terminal than it went up in", || {
        compose::from_another_terminal(lab)
    });
    all.add("a second terminal reaches a container of the first by name and by id", || two_terminals(lab));
    all.add("DINDPOOL_SESSION makes one session of two terminals", || explicit(lab));
    all.run(1);
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
