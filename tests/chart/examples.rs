//! deploy/examples: each can be read by whom it is for, runs scripts that a shell understands, and is documented.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::{helm, parts};
use crate::{needs, object, read, require, root, validate};

/// Where the pool is, if the chart is installed as the documents say.
const HOST: &str = "tcp://dindpool.dindpool.svc.cluster.local:2375";

/// Every example, by name, with its text.
fn examples() -> Vec<(String, String)> {
    let mut all: Vec<_> = fs::read_dir(root().join("deploy/examples"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| (name.clone(), read(&format!("deploy/examples/{name}"))))
        .collect();
    all.sort();
    assert!(all.len() >= 8, "the examples are no longer read");
    all
}

/// What a shell says of a script that it does not run.
fn shell(script: &str) -> String {
    let mut sh = Command::new("sh").arg("-n").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    sh.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    String::from_utf8_lossy(&sh.wait_with_output().unwrap().stderr).into_owned()
}

/// Every script in a document: what is below `run`, `script` and their like.
fn scripts(value: &Value, out: &mut Vec<String>) {
    match value {
        Value::Object(all) => {
            for (name, value) in all {
                match value {
                    Value::String(text) if ["run", "script"].contains(&name.as_str()) => {
                        out.push(text.clone())
                    }
                    Value::Array(lines) if name.ends_with("script") => {
                        out.extend(lines.iter().filter_map(|line| line.as_str().map(str::to_owned)));
                    }
                    _ => scripts(value, out),
                }
            }
        }
        Value::Array(all) => all.iter().for_each(|value| scripts(value, out)),
        _ => {}
    }
}

#[test]
fn each_is_yaml_or_groovy_whose_scripts_a_shell_understands() {
    let mut seen = 0;
    for (name, text) in examples() {
        let mut found = Vec::new();
        if name == "Jenkinsfile" {
            groovy(&text, &mut found);
        } else {
            let documents = helm::documents(&text).unwrap_or_else(|fault| panic!("{name}: {fault}"));
            assert!(!documents.is_empty());
            documents.iter().for_each(|document| scripts(document, &mut found));
        }
        for script in &found {
            // What GitHub and Tekton put in is not the shell's.
            assert_eq!(
                shell(&script.replace("${{", "{").replace("$(results", "(results")),
                "",
                "{name}: {script}"
            );
        }
        seen += found.len();
    }
    assert!(seen >= 10, "the scripts are no longer read");
    assert_ne!(shell("docker login | (\n"), "", "a shell tells what it does not understand");
}

/// Brackets that close as they opened, and quotes that end; what is quoted in threes is YAML or a script.
fn groovy(text: &str, scripts: &mut Vec<String>) {
    for (i, part) in text.split("'''").enumerate() {
        if i % 2 == 1 {
            if part.trim_start().starts_with("apiVersion:") {
                assert!(helm::documents(part).unwrap()[0]["spec"]["containers"].is_array());
            } else {
                scripts.push(part.to_owned());
            }
            continue;
        }
        for line in part.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for quote in ['\'', '"'] {
                assert_eq!(line.matches(quote).count() % 2, 0, "{line}");
            }
        }
        scripts.extend(
            part.lines()
                .filter_map(|line| line.trim().strip_prefix("sh '")?.strip_suffix('\''))
                .map(str::to_owned),
        );
    }
    let mut open = Vec::new();
    for c in text.split("'''").step_by(2).flat_map(str::chars).filter(|c| "(){}[]".contains(*c)) {
        match c {
            '(' | '{' | '[' => open.push(c),
            _ => {
                let opened = open.pop();
                assert!(
                    matches!((opened, c), (Some('('), ')') | (Some('{'), '}') | (Some('['), ']')),
                    "{opened:?} {c}"
                );
            }
        }
    }
    assert!(open.is_empty(), "{open:?} is not closed");
}

#[test]
fn each_names_the_pool_as_the_chart_makes_it_and_is_documented() {
    require!(needs());
    let document = read("docs/kubernetes.md");
    let yaml = crate::run(&["template", "dindpool", "--namespace", "dindpool"], &[]).unwrap();
    let objects = helm::documents(&yaml).unwrap();
    let name =
        |kind, component| object(&objects, kind, component)["metadata"]["name"].as_str().unwrap().to_owned();
    assert_eq!(HOST, format!("tcp://{}.dindpool.svc.cluster.local:2375", name("Service", "proxy")));
    let (dind, admin) = (name("Deployment", "dind"), name("Service", "admin"));
    for (file, text) in examples() {
        assert!(
            document.contains(&format!("](../deploy/examples/{file})")),
            "docs/kubernetes.md does not name {file}"
        );
        let documents = if file == "Jenkinsfile" { Vec::new() } else { helm::documents(&text).unwrap() };
        match file.as_str() {
            "github-workflow.yml" | "naive-dind.yaml" => {}
            "hpa.yaml" | "keda.yaml" => assert_eq!(documents[0]["spec"]["scaleTargetRef"]["name"], dind),
            _ => assert!(text.contains(HOST), "{file} does not say where the pool is"),
        }
        if file == "keda.yaml" {
            let trigger = &documents[0]["spec"]["triggers"][0]["metadata"];
            let url = format!("http://{admin}.dindpool.svc.cluster.local:9375/status");
            assert_eq!(trigger["url"], url);
            // The fields of `Status` and of its scaler.
            assert_eq!(trigger["valueLocation"], "scaler.desired");
            assert!(read("src/pool/status.rs").contains("pub scaler: Option<ScalerStatus>"));
            assert!(read("src/pool/scaler.rs").contains("    pub desired: u32"));
        }
        if file == "hpa.yaml" {
            let metric = documents[0]["spec"]["metrics"][0]["external"]["metric"]["name"].as_str().unwrap();
            assert!(read("docs/metrics.md").contains(&format!("| `{metric}` | gauge |")));
        }
    }
}

/// Those of Kubernetes itself and of KEDA: of Tekton's kinds there is no schema here.
#[test]
fn those_for_kubernetes_are_valid_for_all_its_versions() {
    require!(parts::part("schemas/bin/python"));
    let files: Vec<PathBuf> = ["hpa.yaml", "keda.yaml", "naive-dind.yaml"]
        .map(|name| root().join("deploy/examples").join(name))
        .to_vec();
    let said = validate(&files).unwrap_or_else(|faults| panic!("{faults}"));
    assert!(said.starts_with("4 objects"), "{said}");
}
