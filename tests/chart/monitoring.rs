//! Dashboard and rules: they are in PromQL, about metrics and labels that exist, the same with and without the chart,
//! and every alert has a section that says what to do.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use dindpool::metrics::names::{self, Metric, Values};
use serde_json::{Value, json};

use crate::common::monitoring::{dashboard, panels, queries, rules};
use crate::common::{helm, parts};
use crate::{needs, object, objects, read, require, sets, template};

/// The metric that a name in an expression is of: a histogram's has an end of its own.
fn metric(name: &str) -> Option<&'static Metric> {
    let of = |name: &str| names::ALL.iter().find(|metric| metric.name == name);
    of(name).or_else(|| ["_bucket", "_sum", "_count"].iter().find_map(|end| of(name.strip_suffix(end)?)))
}

/// Everything that an expression says of metrics is so: their names, labels and words. `records` are rules' own.
fn assert_exists(place: &str, expression: &str, records: &BTreeSet<String>) {
    let of_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut rest = expression;
    while let Some(at) = rest.find("dindpool_") {
        // A recorded series has its labels in front.
        let begin = rest[..at].rfind(|c| !of_name(c)).map_or(0, |before| before + 1);
        let name: String = rest[begin..].chars().take_while(|c| of_name(*c)).collect();
        rest = &rest[begin + name.len()..];
        if records.contains(&name) {
            continue;
        }
        let metric = metric(&name).unwrap_or_else(|| panic!("{place}: there is no {name}"));
        let Some(matchers) = rest.strip_prefix('{').and_then(|r| r.split_once('}')).map(|(inner, _)| inner)
        else {
            continue;
        };
        for matcher in matchers.split(", ") {
            let (label, value) = matcher.split_once(['=', '!']).unwrap();
            let value = value.trim_start_matches(['=', '~']).trim_matches('"');
            if matches!(label, "namespace" | "job" | "le") {
                continue;
            }
            let known = metric.labels.iter().find(|known| known.name == label);
            let known = known.unwrap_or_else(|| panic!("{place}: {name} has no label {label}"));
            if let Values::Words(words) = known.values {
                let all = value.split('|').all(|word| words.contains(&word));
                assert!(all, "{place}: {label} of {name} is never {value}");
            }
        }
    }
}

fn records(rules: &[Value]) -> BTreeSet<String> {
    rules.iter().filter_map(|rule| rule["record"].as_str().map(str::to_string)).collect()
}

/// What promtool says of rules.
fn check(promtool: &Path, groups: &Value, n: usize) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rules.json");
    fs::write(&file, groups.to_string()).unwrap();
    let checked = Command::new(promtool).args(["check", "rules"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&checked.stdout) + String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success() && said.contains(&format!("{n} rules found")), "{said}");
}

#[test]
fn the_metrics_are_as_prometheus_wants_them() {
    let promtool = require!(parts::part("promtool/promtool"));
    let metrics = dindpool::metrics::Metrics::new(prometheus::Registry::new()).unwrap();
    metrics.tenant("default");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("metrics");
    fs::write(&file, metrics.render(&dindpool::metrics::Snapshot::default())).unwrap();
    let checked = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(fs::File::open(&file).unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&checked.stdout) + String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success() && said.trim().is_empty(), "{said}");
}

#[test]
fn the_files_for_those_without_the_chart_are_the_charts() {
    for (copy, own) in [
        ("deploy/prometheus/dindpool.rules.yaml", "helm/dindpool/files/rules.yaml"),
        ("deploy/grafana/dindpool.json", "helm/dindpool/files/dashboard.json"),
    ] {
        assert!(read(copy) == read(own), "{copy} is not {own}: `make manifests` copies it");
    }
}

#[test]
fn every_rule_is_about_metrics_that_exist_and_every_alert_says_what_to_do() {
    let rules = rules();
    let records = records(&rules);
    let runbook = read("docs/runbook.md");
    let mut alerts = BTreeSet::new();
    for rule in &rules {
        let name = rule["alert"].as_str().or(rule["record"].as_str()).unwrap();
        assert_exists(name, rule["expr"].as_str().unwrap(), &records);
        let Some(alert) = rule["alert"].as_str() else { continue };
        alerts.insert(alert);
        let section = format!("docs/runbook.md#{}", alert.to_lowercase());
        assert_eq!(rule["annotations"]["runbook_url"], section.as_str(), "{alert}");
        assert!(runbook.contains(&format!("\n### {alert}\n")), "{alert} has no section in docs/runbook.md");
        assert!(matches!(rule["labels"]["severity"].as_str(), Some("critical" | "warning")), "{alert}");
        for text in ["summary", "description"] {
            assert!(rule["annotations"][text].as_str().is_some_and(|t| t.len() > 20), "{alert}: {text}");
        }
    }
    assert!(alerts.len() > 20, "the rules are no longer read");
    let sections = runbook.lines().filter_map(|l| l.strip_prefix("### Dindpool"));
    for section in sections {
        assert!(
            alerts.contains(format!("Dindpool{section}").as_str()),
            "there is no alert Dindpool{section}"
        );
    }
}

#[test]
fn the_charts_rules_are_those_of_its_namespace() {
    require!(needs());
    let promtool = require!(parts::part("promtool/promtool"));
    let sets = sets();
    let set = sets.iter().flatten().find(|path| path.ends_with("everything.yaml")).unwrap();
    let objects = objects(Some(set));
    let spec = &object(&objects, "PrometheusRule", "admin")["spec"];
    let made: Vec<&Value> =
        spec["groups"].as_array().unwrap().iter().flat_map(|g| g["rules"].as_array().unwrap()).collect();
    // One is disabled there, one is added.
    assert_eq!(made.len(), rules().len());
    let find = |name: &str| made.iter().find(|rule| rule["alert"] == name);
    assert!(find("DindpoolAtMaximum").is_none() && find("DindpoolBusy").is_some());
    let wait = find("DindpoolBuildsWait").unwrap();
    assert_eq!(wait["expr"].as_str().unwrap().matches("> 120").count(), 2, "{wait}");
    assert_eq!(
        wait["annotations"]["runbook_url"],
        "https://git.example.com/dindpool/blob/main/docs/runbook.md#dindpoolbuildswait"
    );
    for rule in made.iter().filter(|rule| rule["alert"] != "DindpoolBusy") {
        let expression = rule["expr"].as_str().unwrap();
        let (series, own) =
            (expression.matches("dindpool_").count(), expression.matches("namespace=\"ci\"").count());
        assert!(own >= 1 && own <= series && !expression.contains("=~\".*\""), "{expression}");
    }
    check(&promtool, spec, made.len());
}

#[test]
fn the_charts_dashboard_is_found_by_the_sidecar_and_is_off_by_default() {
    require!(needs());
    assert!(!template(&[]).unwrap().contains("grafana_dashboard"));
    let made = template(&["--set", "monitoring.dashboard.enabled=true"]).unwrap();
    let made = helm::documents(&made).unwrap();
    let map = object(&made, "ConfigMap", "admin");
    assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
    let inside: Value = serde_json::from_str(map["data"]["dindpool.json"].as_str().unwrap()).unwrap();
    assert_eq!(inside, dashboard());
}

#[test]
fn the_dashboard_asks_for_what_exists_in_promql() {
    let promtool = require!(parts::part("promtool/promtool"));
    let queries = queries("1m");
    assert!(queries.len() > 60, "the dashboard is no longer read");
    for (panel, expression) in &queries {
        assert_exists(panel, expression, &BTreeSet::new());
    }
    let rule = |(n, (_, expression)): (usize, &(String, String))| json!({ "record": format!("q:{n}"), "expr": expression });
    let rules: Vec<Value> = queries.iter().enumerate().map(rule).collect();
    check(&promtool, &json!({ "groups": [{ "name": "dashboard", "rules": rules }] }), queries.len());
}

#[test]
fn every_metric_is_on_the_dashboard_or_in_a_rule() {
    let shown: String = queries("1m").into_iter().map(|(_, expression)| expression + "\n").collect();
    let ruled: String = rules().iter().map(|rule| format!("{}\n", rule["expr"])).collect();
    let all = shown + &ruled;
    for metric in names::ALL {
        assert!(all.contains(metric.name), "nobody looks at {}", metric.name);
    }
}

#[test]
fn the_dashboard_is_laid_out_and_explained() {
    let dashboard = dashboard();
    let panels = panels(&dashboard);
    let mut ids = BTreeSet::new();
    let mut titles = BTreeSet::new();
    for panel in &panels {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: its id is another's");
        assert!(titles.insert(title), "{title}: its title is another's");
        let at = |side: &str| panel["gridPos"][side].as_u64().unwrap();
        assert!(at("w") > 0 && at("h") > 0 && at("x") + at("w") <= 24, "{title} is too wide");
        if panel["type"] == "row" {
            continue;
        }
        assert!(panel["description"].as_str().is_some_and(|d| d.len() > 10), "{title}: no description");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title}: no unit");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        let x = at("x")..at("x") + at("w");
        let y = at("y")..at("y") + at("h");
        for other in panels.iter().filter(|other| other["id"] != panel["id"] && other["type"] != "row") {
            let other_at = |side: &str| other["gridPos"][side].as_u64().unwrap();
            let (ox, oy) =
                (other_at("x")..other_at("x") + other_at("w"), other_at("y")..other_at("y") + other_at("h"));
            let together = same_row(&dashboard, panel, other);
            let apart = x.end <= ox.start || ox.end <= x.start || y.end <= oy.start || oy.end <= y.start;
            assert!(!together || apart, "{title} lies on {}", other["title"]);
        }
    }
    let variables: Vec<&str> = dashboard["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|v| v["name"].as_str())
        .collect();
    assert_eq!(variables, ["datasource", "namespace", "pool"]);
}

/// What is in a closed row is laid out for when it alone is open.
fn same_row(dashboard: &Value, one: &Value, other: &Value) -> bool {
    let row = |panel: &Value| {
        let rows = dashboard["panels"].as_array().unwrap().iter();
        rows.filter_map(|row| row["panels"].as_array()).position(|inside| inside.contains(panel))
    };
    row(one) == row(other)
}
