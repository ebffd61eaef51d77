//! Dashboard and rules, as Grafana and Prometheus read them.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::helm;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect(path)
}

/// The rules.
pub fn rules() -> Vec<Value> {
    let document = helm::documents(&read("deploy/prometheus/dindpool.rules.yaml")).expect("YAML").remove(0);
    let groups = document["groups"].as_array().expect("groups");
    groups.iter().flat_map(|group| group["rules"].as_array().expect("rules").clone()).collect()
}

/// The dashboard.
pub fn dashboard() -> Value {
    serde_json::from_str(&read("deploy/grafana/dindpool.json")).expect("JSON")
}

/// Its rows and panels, those of closed rows too.
pub fn panels(dashboard: &Value) -> Vec<&Value> {
    let mut all = Vec::new();
    for panel in dashboard["panels"].as_array().expect("panels") {
        all.push(panel);
        all.extend(panel["panels"].as_array().into_iter().flatten());
    }
    all
}

/// Every expression of the dashboard with the title of its panel, its variables as Grafana fills them in; `rate` is
/// the interval of rates.
pub fn queries(rate: &str) -> Vec<(String, String)> {
    let dashboard = dashboard();
    let filled = |expression: &str| {
        let filled = expression.replace("$__rate_interval", rate);
        let filled = filled.replace("$namespace", ".*").replace("$pool", ".*");
        assert!(!filled.contains('$'), "a variable that is not known: {filled}");
        filled
    };
    let of = |panel: &Value| -> Vec<(String, String)> {
        let title = panel["title"].as_str().expect("a title");
        let targets = panel["targets"].as_array().into_iter().flatten();
        targets.map(|t| (title.into(), filled(t["expr"].as_str().expect("an expression")))).collect()
    };
    panels(&dashboard).into_iter().flat_map(of).collect()
}
