//! The tables of `docs/metrics.md`, from the list of names.

use super::names::{ALL, Label, Metric, Values};

/// A table of all metrics, and one of what their labels say, as Markdown.
pub fn tables() -> String {
    let mut out = String::from("| Name | Type | Labels | |\n|---|---|---|---|\n");
    ALL.iter().for_each(|metric| out.push_str(&row(metric)));
    out.push_str("\n| Label | Values | |\n|---|---|---|\n");
    let mut labels: Vec<&Label> = Vec::new();
    for label in ALL.iter().flat_map(|metric| metric.labels) {
        if !labels.contains(&label) {
            labels.push(label);
        }
    }
    labels.sort_by_key(|label| (label.name, label.note));
    labels.iter().for_each(|label| out.push_str(&meaning(label)));
    out
}

fn cell(text: &str) -> String {
    if text.is_empty() { " ".into() } else { format!(" {text} ") }
}

fn row(metric: &Metric) -> String {
    let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{}`", label.name)).collect();
    let (name, kind) = (metric.name, metric.kind.as_str());
    format!("| `{name}` | {kind} |{}| {} |\n", cell(&labels.join(", ")), metric.help)
}

fn meaning(label: &Label) -> String {
    let values = match label.values {
        Values::Words(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        Values::Daemon | Values::Tenant | Values::Version | Values::Certificate => String::new(),
    };
    format!("| {} |{}|{}|\n", label.name, cell(&values), cell(label.note))
}
