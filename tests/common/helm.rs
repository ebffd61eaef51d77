//! The real helm, and the chart.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::parts;

/// The chart's directory.
pub fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("helm/dindpool")
}

/// helm, with directories of its own: what this user has configured is nobody's business here.
pub fn command(home: &Path) -> Result<Command, String> {
    let mut helm = Command::new(parts::part("helm/helm")?);
    for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        helm.env(name, home);
    }
    helm.env_remove("KUBECONFIG").stdin(Stdio::null());
    Ok(helm)
}

/// Everything that it printed, or everything that it complained of.
pub fn said(output: Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// The documents of a YAML file, the empty ones left out.
pub fn documents(yaml: &str) -> Result<Vec<Value>, String> {
    let all: Vec<Value> = serde_saphyr::from_multiple(yaml).map_err(|error| error.to_string())?;
    Ok(all.into_iter().filter(|document| !document.is_null()).collect())
}
