//! Which pool a shell means, as the docker CLI would find it: an address that is given, `DOCKER_HOST`, or the context in use,
//! each with the certificates that belong to it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where a pool listens unless something else is said.
const HOST: &str = "tcp://127.0.0.1:2375";
/// The context that stands for the environment.
const NO_CONTEXT: &str = "default";

/// What is known of a pool before anybody has connected to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its address, as `DOCKER_HOST` has it.
    pub host: String,
    /// The folder with `ca.pem`, and `cert.pem` and `key.pem` if it wants them; `None` without TLS.
    pub tls: Option<PathBuf>,
}

/// What a shell's environment says.
pub trait Environment {
    /// A variable that is not empty.
    fn variable(&self, name: &str) -> Option<String>;
}

impl<F: Fn(&str) -> Option<String>> Environment for F {
    fn variable(&self, name: &str) -> Option<String> {
        self(name)
    }
}

/// Finds the pool. `host` and `tls` are what was said on the command's line.
///
/// # Errors
/// What is wrong with the context that is in use.
pub fn find(
    host: Option<String>,
    tls: Option<PathBuf>,
    environment: &impl Environment,
) -> Result<Found, String> {
    let variable = |name: &str| environment.variable(name);
    // A session within a session is one of the same pool, which the environment does not name any more.
    if let (None, Some(host)) = (&host, variable("DINDPOOL_SESSION_HOST")) {
        return Ok(Found { host, tls: tls.or(variable("DINDPOOL_SESSION_TLS_DIR").map(PathBuf::from)) });
    }
    let files = || {
        let wanted = variable("DOCKER_TLS_VERIFY").or(variable("DOCKER_TLS")).is_some();
        let own = || variable("DOCKER_CERT_PATH").map(PathBuf::from).or(configuration(environment));
        if wanted { own() } else { None }
    };
    if let Some(host) = host.or(variable("DOCKER_HOST")) {
        return Ok(Found { host, tls: tls.or_else(files) });
    }
    let configuration = configuration(environment);
    let name = variable("DOCKER_CONTEXT").or_else(|| current(configuration.as_deref()?));
    match (name.filter(|name| name != NO_CONTEXT), configuration) {
        (Some(name), Some(folder)) => {
            let found = context(&folder, &name)?;
            Ok(Found { tls: tls.or(found.tls), ..found })
        }
        _ => Ok(Found { host: HOST.into(), tls: tls.or_else(files) }),
    }
}

/// The folder of the docker CLI's configuration.
fn configuration(environment: &impl Environment) -> Option<PathBuf> {
    let home = || environment.variable("HOME").map(|home| Path::new(&home).join(".docker"));
    environment.variable("DOCKER_CONFIG").map(PathBuf::from).or_else(home)
}

/// The context that `docker context use` has chosen.
fn current(configuration: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(rename = "currentContext")]
        context: Option<String>,
    }
    let text = std::fs::read(configuration.join("config.json")).ok()?;
    serde_json::from_slice::<Config>(&text).ok()?.context.filter(|name| !name.is_empty())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Meta {
    name: String,
    endpoints: Endpoints,
}

#[derive(Deserialize)]
struct Endpoints {
    docker: Docker,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Docker {
    #[serde(default)]
    host: String,
    #[serde(default, rename = "SkipTLSVerify")]
    unverified: bool,
}

/// A context by its name. Its folder is called by a hash of that; which one it is says the file in it.
fn context(configuration: &Path, name: &str) -> Result<Found, String> {
    let contexts = configuration.join("contexts");
    let all = std::fs::read_dir(contexts.join("meta")).into_iter().flatten().flatten();
    let meta =
        |folder: &Path| serde_json::from_slice::<Meta>(&std::fs::read(folder.join("meta.json")).ok()?).ok();
    let (folder, docker) = all
        .filter_map(|entry| Some((entry.file_name(), meta(&entry.path())?)))
        .find_map(|(folder, meta)| (meta.name == name).then_some((folder, meta.endpoints.docker)))
        .ok_or(format!("there is no context {name} in {}", contexts.display()))?;
    let tls = contexts.join("tls").join(folder).join("docker");
    let tls = tls.is_dir().then_some(tls);
    if docker.unverified && tls.is_some() {
        return Err(format!(
            "context {name} does not verify its pool's certificate (skip-tls-verify): make one with ca=ca.pem"
        ));
    }
    let host = if docker.host.is_empty() { HOST.into() } else { docker.host };
    Ok(Found { host, tls })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Finds the pool in an environment of these variables; host and folder of the certificates, or the fault.
    fn found(
        host: Option<&str>,
        tls: Option<&str>,
        variables: &[(&str, &str)],
    ) -> Result<(String, String), String> {
        let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
        let environment = |name: &str| variables.get(name).map(ToString::to_string);
        let found = find(host.map(str::to_owned), tls.map(PathBuf::from), &environment)?;
        Ok((found.host, found.tls.map(|tls| tls.display().to_string()).unwrap_or_default()))
    }

    fn is(host: &str, tls: &str) -> Result<(String, String), String> {
        Ok((host.into(), tls.into()))
    }

    #[test]
    fn an_address_has_the_certificates_of_the_environment() {
        let tls = [("DOCKER_TLS_VERIFY", "1"), ("DOCKER_CERT_PATH", "/c"), ("HOME", "/h")];
        assert_eq!(found(None, None, &[]), is(HOST, ""));
        assert_eq!(found(Some("tcp://a:1"), None, &[("DOCKER_HOST", "tcp://b:1")]), is("tcp://a:1", ""));
        assert_eq!(found(Some("tcp://a:1"), None, &tls), is("tcp://a:1", "/c"));
        assert_eq!(found(Some("tcp://a:1"), Some("/d"), &tls), is("tcp://a:1", "/d"));
        assert_eq!(
            found(None, None, &[&tls[..], &[("DOCKER_HOST", "tcp://b:1")]].concat()),
            is("tcp://b:1", "/c")
        );
        assert_eq!(found(None, None, &tls), is(HOST, "/c"));
        assert_eq!(found(None, None, &tls[1..]), is(HOST, ""), "a folder alone is no wish");
        assert_eq!(found(None, None, &[("DOCKER_TLS", "1"), ("HOME", "/h")]), is(HOST, "/h/.docker"));
    }

    #[test]
    fn a_session_within_a_session_is_one_of_the_same_pool() {
        let outer = [
            ("DINDPOOL_SESSION_HOST", "tcp://a:1"),
            ("DINDPOOL_SESSION_TLS_DIR", "/a"),
            ("DOCKER_HOST", "unix:///run/session"),
        ];
        assert_eq!(found(None, None, &outer), is("tcp://a:1", "/a"));
        assert_eq!(found(Some("tcp://b:1"), None, &outer), is("tcp://b:1", ""));
    }

    #[test]
    fn without_an_address_the_context_in_use_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(
            "contexts/meta/11/meta.json",
            r#"{"Name":"plain","Metadata":{},"Endpoints":{"docker":{"Host":"tcp://p:1"}}}"#,
        );
        write(
            "contexts/meta/22/meta.json",
            r#"{"Name":"dind","Endpoints":{"docker":{"Host":"tcp://d:1","SkipTLSVerify":false}}}"#,
        );
        write("contexts/tls/22/docker/ca.pem", "");
        write(
            "contexts/meta/33/meta.json",
            r#"{"Name":"lax","Endpoints":{"docker":{"Host":"tcp://l:1","SkipTLSVerify":true}}}"#,
        );
        write("contexts/tls/33/docker/cert.pem", "");
        write("contexts/meta/44/meta.json", "half of a fi");
        let config = dir.path().display().to_string();
        let tls = format!("{config}/contexts/tls/22/docker");
        let named = |name| found(None, None, &[("DOCKER_CONFIG", &config), ("DOCKER_CONTEXT", name)]);
        assert_eq!(named("plain"), is("tcp://p:1", ""));
        assert_eq!(named("dind"), is("tcp://d:1", &tls));
        assert_eq!(named("default"), is(HOST, ""));
        assert!(named("lax").unwrap_err().contains("ca=ca.pem"));
        assert!(named("none").unwrap_err().contains("no context none in"));
        let own = ("DOCKER_CONFIG", config.as_str());
        assert_eq!(found(None, None, &[own]), is(HOST, ""));
        write("config.json", r#"{"auths":{},"currentContext":"dind"}"#);
        assert_eq!(found(None, None, &[own]), is("tcp://d:1", &tls));
        assert_eq!(found(None, Some("/d"), &[own]), is("tcp://d:1", "/d"));
        // An address comes before every context, as for the CLI.
        let both = [own, ("DOCKER_HOST", "tcp://b:1"), ("DOCKER_CONTEXT", "plain")];
        assert_eq!(found(None, None, &both), is("tcp://b:1", ""));
    }
}
