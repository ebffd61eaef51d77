//! How a session was recognised, in words: what the proxy's `identify` put into the key, read back.

use crate::engine::model::{SessionKey, Tenant};

/// How the key of a tenant's session came about.
pub fn recognised(key: &SessionKey, tenant: &Tenant) -> String {
    let key = key.as_str();
    let own = key.strip_prefix(tenant.as_str()).and_then(|rest| rest.strip_prefix('/')).unwrap_or(key);
    let (kind, value) = own.split_once(':').unwrap_or(("", own));
    match kind {
        "listener" => format!("by the listener that it came to, which has the session {value}"),
        "name" => format!(
            "by its name, {value}: the header X-Dindpool-Session, /s/{value} in DOCKER_HOST, or DINDPOOL_SESSION in \
             its client's environment"
        ),
        "job" => match value.split_once('=') {
            Some((variable, id)) => {
                format!("by the CI job that its client runs in: {variable} is {id} there")
            }
            None => format!("by the CI job that its client runs in: {value}"),
        },
        "posix" => format!("by its client's terminal or script: POSIX session {value} (leader@start)"),
        "uid" => {
            format!("by the user that its client runs as, {value}: the process itself could not be looked at")
        }
        "ip" => format!("by the address that it comes from, {value}: it said nothing else"),
        "tls" => format!(
            "by a rule of `identify`: its client's certificate or the host that it asked for gives {value}"
        ),
        kind => format!("by its {kind}: {value}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_key_is_told_in_words() {
        let words = |key: &str, tenant: &str| recognised(&key.into(), &tenant.into());
        assert!(words("ip:10.0.0.7", "default").contains("10.0.0.7"));
        assert!(words("job:CI_JOB_ID=17", "default").contains("CI_JOB_ID is 17"));
        assert!(words("team-a/name:release", "team-a").contains("its name, release"));
        // A tenant is told from a name that holds a slash.
        assert!(words("name:team-a/x", "default").contains("its name, team-a/x"));
        assert!(words("posix:8@9", "default").contains("POSIX session 8@9"));
        assert!(words("tls:ci", "default").contains("certificate"));
    }
}
