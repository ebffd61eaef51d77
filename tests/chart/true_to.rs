//! What else tells of the chart: the plain manifests, the metrics, the notes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::parts;
use crate::{needs, require, root, run};

/// The files of a directory.
fn files(dir: &Path) -> BTreeMap<String, String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(path).unwrap())
        })
        .collect()
}

#[test]
fn the_plain_manifests_are_what_the_chart_makes() {
    let helm = require!(parts::part("helm/helm"));
    let dir = tempfile::tempdir().unwrap();
    let made =
        Command::new(root().join("scripts/manifests")).arg(dir.path()).env("HELM", helm).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (made, there) = (files(dir.path()), files(&root().join("deploy/kubernetes")));
    let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&made), names(&there), "`make manifests` makes them");
    for (name, text) in &made {
        assert!(there[name] == *text, "deploy/kubernetes/{name} is another: `make manifests` makes it");
        assert!(!text.to_lowercase().contains("helm"), "{name} speaks of Helm");
    }
    let files: Vec<_> = there.keys().map(|name| root().join("deploy/kubernetes").join(name)).collect();
    let said = crate::validate(&files);
    assert!(said.as_ref().is_ok_and(|said| said.contains(" 0 faults")), "{said:?}");
}

#[test]
fn whoever_installs_it_is_told_where_the_pool_is_and_what_is_not_safe() {
    require!(needs());
    let notes = |args: &[&str]| {
        run(&["install", "ci", "--namespace", "ns", "--dry-run=client"], args)
            .unwrap()
            .split("NOTES:")
            .nth(1)
            .unwrap()
            .to_owned()
    };
    let said = notes(&[]);
    for words in [
        "export DOCKER_HOST=tcp://ci-dindpool.ns.svc.cluster.local:2375",
        "docker context create ci-dindpool --docker host=tcp://ci-dindpool.ns.svc.cluster.local:2375",
        "there is no TLS",
        "networkPolicy.clients is empty",
        "pod-security.kubernetes.io/enforce=privileged",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let said =
        notes(&["--set", "networkPolicy.enabled=false,service.type=NodePort,service.port=80,scaler.min=0"]);
    for words in [
        "every pod of the cluster reaches the daemons",
        "from outside the cluster",
        ".local:80",
        "An idle pool is empty",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}
