//! Each alert fires when it should, and is silent again afterwards: `promtool test rules` on invented series.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::common::monitoring::rules;
use crate::common::parts;
use crate::{require, root};

/// Series in promtool's notation, a value for each minute; when the alert is there, and when no longer.
struct Case {
    alert: &'static str,
    series: &'static [(&'static str, &'static str)],
    fires: u32,
    silent: u32,
}

const CASES: &[Case] = &[
    Case { alert: "DindpoolAbsent", series: &[("dindpool_build_info", "_x9 1x30")], fires: 7, silent: 12 },
    Case {
        alert: "DindpoolNobodyAdmits",
        series: &[
            ("dindpool_lease_holder{pod=\"a\"}", "0x30"),
            ("dindpool_lease_holder{pod=\"b\"}", "0x10 1x30"),
        ],
        fires: 5,
        silent: 12,
    },
    Case {
        alert: "DindpoolNoDaemon",
        series: &[
            ("dindpool_daemons{state=\"ready\",health=\"healthy\"}", "0x10 1x30"),
            ("dindpool_scale_desired", "2x40"),
        ],
        fires: 8,
        silent: 12,
    },
    // A fixed pool has no autoscaler.
    Case {
        alert: "DindpoolNoDaemon",
        series: &[("dindpool_daemons{state=\"ready\",health=\"healthy\"}", "0x10 1x30")],
        fires: 8,
        silent: 12,
    },
    // A pool that is empty because nobody needs it, and then should not be.
    Case {
        alert: "DindpoolNoDaemon",
        series: &[
            ("dindpool_daemons{state=\"ready\",health=\"healthy\"}", "0x90"),
            ("dindpool_scale_desired", "2x20 0x70"),
        ],
        fires: 8,
        silent: 30,
    },
    Case {
        alert: "DindpoolDaemonsStuck",
        series: &[("dindpool_scale_reason{reason=\"stuck\"}", "1x10 0x30")],
        fires: 8,
        silent: 12,
    },
    Case {
        alert: "DindpoolAtMaximum",
        series: &[("dindpool_scale_reason{reason=\"maximum\"}", "1x20 0x30")],
        fires: 17,
        silent: 22,
    },
    Case {
        alert: "DindpoolScalerBlind",
        series: &[("dindpool_scale_reason{reason=\"stale\"}", "1x10 0x30")],
        fires: 8,
        silent: 12,
    },
    Case {
        alert: "DindpoolScalingFails",
        series: &[("dindpool_scale_steps_total{step=\"grow\",outcome=\"failed\"}", "0+1x8 8x60")],
        fires: 8,
        silent: 40,
    },
    Case {
        alert: "DindpoolWrongPodRemoved",
        series: &[("dindpool_wrong_removals_total", "0x5 1x60")],
        fires: 8,
        silent: 40,
    },
    Case {
        alert: "DindpoolQueueGrowing",
        series: &[("dindpool_queue_waiting{tenant=\"a\"}", "1+1x40 41x60")],
        fires: 30,
        silent: 70,
    },
    Case {
        alert: "DindpoolQueueNearlyFull",
        series: &[
            ("dindpool_queue_waiting{tenant=\"a\"}", "50x10 0x30"),
            ("dindpool_queue_waiting{tenant=\"b\"}", "40x10 0x30"),
            ("dindpool_queue_limit", "100x40"),
        ],
        fires: 5,
        silent: 12,
    },
    Case {
        alert: "DindpoolBuildsWait",
        series: &[("dindpool_queue_oldest_seconds", "400x20 0x30")],
        fires: 15,
        silent: 22,
    },
    Case {
        alert: "DindpoolBuildsWait",
        series: &[
            ("dindpool_queue_wait_seconds_bucket{tenant=\"a\",le=\"300\"}", "0x120"),
            ("dindpool_queue_wait_seconds_bucket{tenant=\"a\",le=\"600\"}", "0+5x30 150x90"),
            ("dindpool_queue_wait_seconds_bucket{tenant=\"a\",le=\"+Inf\"}", "0+5x30 150x90"),
        ],
        fires: 25,
        silent: 60,
    },
    Case {
        alert: "DindpoolWaitBudgetBurnsFast",
        series: &[
            ("dindpool_queue_wait_seconds_count{tenant=\"a\"}", "0x300"),
            ("dindpool_queue_wait_seconds_bucket{tenant=\"a\",le=\"300\"}", "0x300"),
            ("dindpool_refused_total{tenant=\"a\",reason=\"queue-full\"}", "0+5x40 200x260"),
            ("dindpool_work_total{tenant=\"a\"}", "0+10x300"),
        ],
        fires: 30,
        silent: 55,
    },
    // Prometheus 3 writes the bound of a bucket with a fraction.
    Case {
        alert: "DindpoolWaitBudgetBurns",
        series: &[
            ("dindpool_queue_wait_seconds_count{tenant=\"a\"}", "0+2x60 120x300"),
            ("dindpool_queue_wait_seconds_bucket{tenant=\"a\",le=\"300.0\"}", "0+1x60 60x300"),
            ("dindpool_refused_total{tenant=\"a\",reason=\"queue-full\"}", "0x360"),
            ("dindpool_work_total{tenant=\"a\"}", "0+10x360"),
        ],
        fires: 50,
        silent: 200,
    },
    Case {
        alert: "DindpoolBuildsRefused",
        series: &[("dindpool_refused_total{tenant=\"a\",reason=\"tenant-full\"}", "0x5 2x40")],
        fires: 7,
        silent: 30,
    },
    Case {
        alert: "DindpoolClientsRefused",
        series: &[("dindpool_connections_refused_total{reason=\"total\"}", "0x5 2x40")],
        fires: 7,
        silent: 30,
    },
    Case {
        alert: "DindpoolDaemonEjected",
        series: &[("dindpool_daemons{state=\"ready\",health=\"ejected\"}", "1x15 0x30")],
        fires: 12,
        silent: 17,
    },
    Case {
        alert: "DindpoolDaemonFlapping",
        series: &[("dindpool_daemon_up{daemon=\"d\"}", "1 0 1 0 1 0 1 0 1x60")],
        fires: 9,
        silent: 50,
    },
    Case {
        alert: "DindpoolDiskNearlyFull",
        series: &[
            ("dindpool_daemon_disk_free_bytes{daemon=\"d\"}", "5x10 50x30"),
            ("dindpool_daemon_disk_used_bytes{daemon=\"d\"}", "95x10 50x30"),
        ],
        fires: 8,
        silent: 12,
    },
    Case {
        alert: "DindpoolDiskFillsUp",
        series: &[
            ("dindpool_daemon_disk_free_bytes{daemon=\"d\"}", "250-2x40 800x60"),
            ("dindpool_daemon_disk_used_bytes{daemon=\"d\"}", "750+2x40 200x60"),
        ],
        fires: 30,
        silent: 45,
    },
    Case {
        alert: "DindpoolDaemonCannotWrite",
        series: &[("dindpool_ejections_total{reason=\"writes\"}", "0x5 1x40")],
        fires: 7,
        silent: 30,
    },
    Case {
        alert: "DindpoolSharedDataRoot",
        series: &[("dindpool_shared_data_roots_total", "0x5 2x40")],
        fires: 7,
        silent: 30,
    },
    Case {
        alert: "DindpoolDaemonRefused",
        series: &[("dindpool_daemon_refused{daemon=\"d\"}", "1x10 stale")],
        fires: 8,
        silent: 12,
    },
    Case {
        alert: "DindpoolSessionsLost",
        series: &[("dindpool_leases_lost_total", "0x5 1x40")],
        fires: 7,
        silent: 30,
    },
    Case {
        alert: "DindpoolRequestsFail",
        series: &[
            ("dindpool_requests_total{class=\"work\",outcome=\"daemon-failed\"}", "0+10x20 200x40"),
            ("dindpool_requests_total{class=\"work\",outcome=\"done\"}", "0+90x60"),
        ],
        fires: 15,
        silent: 30,
    },
    Case {
        alert: "DindpoolCertificateExpires",
        series: &[(
            "dindpool_certificate_expiry_timestamp_seconds{certificate=\"tls.crt\"}",
            "500000x30 2000000x30",
        )],
        fires: 20,
        silent: 35,
    },
    Case {
        alert: "DindpoolConfigRefused",
        series: &[("dindpool_config_last_reload_successful", "0x10 1x30")],
        fires: 8,
        silent: 12,
    },
    Case { alert: "DindpoolPanic", series: &[("dindpool_panics_total", "0x5 1x40")], fires: 7, silent: 30 },
];

/// A series with the labels that a scrape in a cluster adds.
fn scraped(series: &str) -> String {
    let own = "namespace=\"ci\",job=\"dindpool\"";
    match series.strip_suffix('}') {
        Some(labelled) => format!("{labelled},{own}}}"),
        None => format!("{series}{{{own}}}"),
    }
}

fn case(case: &Case) -> Value {
    let alert = case.alert;
    let expression = format!("count(ALERTS{{alertname=\"{alert}\", alertstate=\"firing\"}}) or vector(0)");
    let at = |minute: u32, n: u32| json!({ "expr": expression, "eval_time": format!("{minute}m"), "exp_samples": [{ "labels": "{}", "value": n }] });
    let series: Vec<Value> = case
        .series
        .iter()
        .map(|(name, values)| json!({ "series": scraped(name), "values": values }))
        .collect();
    json!({
        "interval": "1m",
        "name": alert,
        "input_series": series,
        "promql_expr_test": [at(0, 0), at(case.fires, 1), at(case.silent, 0)],
    })
}

#[test]
fn every_alert_fires_and_is_silent_again() {
    let promtool = require!(parts::part("promtool/promtool"));
    let rules = rules();
    let alerts: BTreeSet<&str> = rules.iter().filter_map(|rule| rule["alert"].as_str()).collect();
    let tried: BTreeSet<&str> = CASES.iter().map(|case| case.alert).collect();
    assert_eq!(tried, alerts, "alerts without a case, or cases without an alert");
    let tests: Vec<Value> = CASES.iter().map(case).collect();
    let file = root().join("deploy/prometheus/dindpool.rules.yaml");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tests.json");
    let suite = json!({ "rule_files": [file], "evaluation_interval": "1m", "tests": tests });
    fs::write(&path, suite.to_string()).unwrap();
    let tested = Command::new(promtool).args(["test", "rules"]).arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&tested.stdout) + String::from_utf8_lossy(&tested.stderr);
    assert!(tested.status.success() && said.contains("SUCCESS"), "{said}");
}
