//! The chart in helm/: what it renders is valid, safe, and what dindpool and the documents say. Without a cluster;
//! tests/kubernetes installs it.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{helm, parts};
use serde_json::Value;

mod alerts;
#[path = "../common/mod.rs"]
mod common;
mod examples;
mod monitoring;
mod safe;
mod true_to;
mod values;

/// The versions of Kubernetes that the chart is for.
const VERSIONS: &str = "1.33,1.34,1.35,1.36,1.37";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Sets of values: the defaults, and those in tests/chart/values.
fn sets() -> Vec<Option<PathBuf>> {
    let mut sets = vec![None];
    let files = fs::read_dir(root().join("tests/chart/values")).unwrap();
    sets.extend(files.map(|entry| Some(entry.unwrap().path())));
    assert!(sets.len() > 3, "the sets of values are no longer read");
    sets
}

/// helm, with the chart and further arguments after its own.
fn run(words: &[&str], args: &[&str]) -> Result<String, String> {
    let home = tempfile::tempdir().unwrap();
    let output = helm::command(home.path())?.args(words).arg(helm::chart()).args(args).output().unwrap();
    helm::said(output)
}

/// What `helm template` makes of some arguments.
fn template(args: &[&str]) -> Result<String, String> {
    run(&["template", "ci", "--namespace", "ci"], args)
}

fn with(set: Option<&Path>) -> Vec<String> {
    set.map(|path| vec!["--values".into(), path.display().to_string()]).unwrap_or_default()
}

/// The objects that a set of values makes.
fn objects(set: Option<&Path>) -> Vec<Value> {
    let args = with(set);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    helm::documents(&template(&args).unwrap()).unwrap()
}

/// The object of a kind with a component.
fn object<'a>(objects: &'a [Value], kind: &str, component: &str) -> &'a Value {
    let component = Some(component);
    let is = |o: &&Value| {
        o["kind"] == kind && o["metadata"]["labels"]["app.kubernetes.io/component"].as_str() == component
    };
    objects.iter().find(is).unwrap_or_else(|| panic!("no {kind} of {component:?}"))
}

/// Skips without helm.
fn needs() -> Result<(), String> {
    parts::part("helm/helm").map(drop)
}

#[test]
fn it_has_no_fault_that_helm_knows_of() {
    require!(needs());
    for set in sets() {
        let args = with(set.as_deref());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let said = run(&["lint", "--strict"], &args).unwrap_or_else(|fault| panic!("{set:?}: {fault}"));
        assert!(said.contains("0 chart(s) failed"), "{set:?}: {said}");
    }
}

/// Validates files of manifests; the faults, if there are any.
fn validate(files: &[PathBuf]) -> Result<String, String> {
    let python = parts::part("schemas/bin/python")?;
    let crds = parts::part("schemas/crds")?;
    let output = Command::new(python)
        .arg(root().join("tests/chart/validate.py"))
        .args([&crds, Path::new(VERSIONS)])
        .args(files)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() { Ok(said) } else { Err(said + &String::from_utf8_lossy(&output.stderr)) }
}

#[test]
fn its_manifests_are_valid_for_kubernetes_1_33_to_1_37() {
    require!(needs().and_then(|()| parts::part("schemas/bin/python")));
    let dir = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for (i, set) in sets().iter().enumerate() {
        let args = with(set.as_deref());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        files.push(dir.path().join(format!("{i}.yaml")));
        fs::write(&files[i], template(&args).unwrap()).unwrap();
    }
    let said = validate(&files).unwrap_or_else(|faults| panic!("{faults}"));
    let held: usize = said.split(' ').next().unwrap().parse().unwrap();
    assert!(held > 40, "{said}");

    // And it would say so.
    let text = fs::read_to_string(&files[0]).unwrap();
    for (what, wrong, told) in [
        ("enableServiceLinks", "enableServiceLink", "enableServiceLink"),
        ("kind: PodDisruptionBudget", "kind: PodDisruptionBudgets", "there is no PodDisruptionBudgets"),
        ("policy/v1\n", "policy/v1beta1\n", "there is no PodDisruptionBudget in policy/v1beta1"),
        ("maxUnavailable: 1\n", "maxUnavailable: [1]\n", "maxUnavailable"),
    ] {
        assert!(text.contains(what));
        fs::write(&files[0], text.replacen(what, wrong, 1)).unwrap();
        let faults = validate(&files[..1]).expect_err(wrong);
        assert_eq!(faults.matches(told).count(), 5, "one fault for each version: {faults}");
    }
}

/// Kubernetes is told by its chart, its documents and its test.
#[test]
fn the_versions_are_those_that_the_chart_and_the_documents_name() {
    assert!(read("helm/dindpool/Chart.yaml").contains("\nkubeVersion: \">=1.33.0-0\""));
    assert!(read("docs/kubernetes.md").contains("1.33 to 1.37"));
    require!(needs());
    let fault = template(&["--kube-version", "1.32.9"]).unwrap_err();
    assert!(fault.contains("requires kubeVersion: >=1.33"), "{fault}");
}
