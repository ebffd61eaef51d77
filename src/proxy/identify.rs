//! Whose request it is (pure): the session key and the tenant, by the precedence of design decision 1.

use std::net::IpAddr;

use super::classify::Prefix;
use crate::engine::model::{SessionKey, Tenant};
use crate::error::{Error, Kind};

/// The header that names a session explicitly.
pub const HEADER: &str = "x-dindpool-session";
/// Keys are stored, logged and listed: they have a length.
const MAX_KEY: usize = 128;

/// What the listener says about its connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerIdentity {
    /// Who its clients belong to.
    pub tenant: Tenant,
    /// The one session of a dedicated listener.
    pub session: Option<String>,
}

/// What the connection says about its client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A connection that said once of which session all that follows on it is ([`super::session`]).
    Session(String),
    /// A machine, a pod, a container.
    Ip(IpAddr),
    /// A process on this machine, recognised by its environment or its POSIX session.
    Process(String),
    /// A process on this machine of which only the user is known.
    User(u32),
    /// The session that a rule has made of its certificate or the host it asked for.
    Tls(String),
}

/// Whose request it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The session.
    pub key: SessionKey,
    /// The source's own key, when the session's is explicit and other connections of the same client may
    /// not carry it.
    pub source: Option<SessionKey>,
    /// Who it belongs to.
    pub tenant: Tenant,
    /// A person's shell on this machine, and no job that a CI system or anybody else named.
    pub interactive: bool,
}

/// The header that names what is built, for daemons that have built it before.
pub const PROJECT: &str = "x-dindpool-project";

/// The identity of a request. `header` is the value of [`HEADER`], if it was sent.
///
/// # Errors
/// When an explicit key or tenant has characters or a length that it may not have.
pub fn identify(
    listener: &ListenerIdentity,
    source: &Source,
    prefix: &Prefix<'_>,
    header: Option<&[u8]>,
) -> Result<Identity, Error> {
    let tenant = match prefix.tenant {
        // Who listens for one team only does not let a client choose another: quota and fairness are the team's.
        Some(tenant) if listener.tenant.as_str() != "default" && tenant != listener.tenant.as_str() => {
            let message = format!("this client is of tenant {}, not of {tenant}", listener.tenant);
            return Err(Error::new(Kind::BadRequest, message));
        }
        Some(tenant) => Tenant::from(checked_tenant(tenant)?),
        None => listener.tenant.clone(),
    };
    let own = source_key(&tenant, source);
    // buildx's `/grpc` and `/session` carry no path: they have the source's key under the listener's tenant.
    let bare = source_key(&listener.tenant, source);
    if let Some(session) = &listener.session {
        // Every connection of a dedicated listener is keyed: nothing needs to be kept together by its source.
        let key = key(&tenant, "listener", session);
        return Ok(Identity { key, source: None, tenant, interactive: false });
    }
    if let Source::Session(name) = source {
        let key = key(&tenant, "name", checked("the session of the connection", name)?);
        return Ok(Identity { key, source: None, tenant, interactive: false });
    }
    let header = match header {
        Some(value) => Some(std::str::from_utf8(value).map_err(|_| bad("X-Dindpool-Session"))?),
        None => None,
    };
    let explicit = match (header, prefix.session) {
        (Some(name), _) => Some(checked("X-Dindpool-Session", name)?),
        (None, Some(name)) => Some(checked("the session in the path", name)?),
        (None, None) => None,
    };
    Ok(match explicit {
        Some(name) => {
            Identity { key: key(&tenant, "name", name), source: Some(bare), tenant, interactive: false }
        }
        None => {
            let interactive = match source {
                Source::Process(process) => process.starts_with("posix:"),
                Source::User(_) => true,
                Source::Ip(_) | Source::Tls(_) | Source::Session(_) => false,
            };
            let other = tenant != listener.tenant;
            Identity { key: own, source: other.then_some(bare), tenant, interactive }
        }
    })
}

/// The key of a client that says nothing.
fn source_key(tenant: &Tenant, source: &Source) -> SessionKey {
    match source {
        Source::Ip(ip) => key(tenant, "ip", &ip.to_string()),
        Source::Process(process) => match process.split_once(':') {
            Some((kind, value)) => key(tenant, kind, value),
            None => key(tenant, "posix", process),
        },
        Source::User(uid) => key(tenant, "uid", &uid.to_string()),
        Source::Tls(session) => key(tenant, "tls", session),
        Source::Session(name) => key(tenant, "name", name),
    }
}

fn key(tenant: &Tenant, kind: &str, value: &str) -> SessionKey {
    if tenant.as_str() == "default" {
        SessionKey::from(format!("{kind}:{value}"))
    } else {
        SessionKey::from(format!("{tenant}/{kind}:{value}"))
    }
}

fn checked<'a>(what: &str, name: &'a str) -> Result<&'a str, Error> {
    if consists_of(name, b"._:@+-") { Ok(name) } else { Err(bad(what)) }
}

/// As the configuration takes a tenant. Without a colon: in a key, what is before the first colon or slash must tell
/// whose it is, and a name in a process's environment may hold both.
fn checked_tenant(name: &str) -> Result<&str, Error> {
    if consists_of(name, b"._-") {
        return Ok(name);
    }
    let message = format!("a tenant in the path must be 1 to {MAX_KEY} of the characters A-Z a-z 0-9 . _ -");
    Err(Error::new(Kind::BadRequest, message))
}

fn consists_of(name: &str, also: &[u8]) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || also.contains(&b);
    (1..=MAX_KEY).contains(&name.len()) && name.bytes().all(fine)
}

fn bad(what: &str) -> Error {
    let message = format!("{what} must be 1 to {MAX_KEY} of the characters A-Z a-z 0-9 . _ : @ + -");
    Error::new(Kind::BadRequest, message)
}

/// A value from a process's environment as part of a key: whatever a CI system puts there, in a form that can
/// be listed and logged.
pub fn sanitise(value: &str) -> String {
    let clean: String = value
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._:@+-/=#".contains(c) { c } else { '_' })
        .collect();
    if clean.len() <= MAX_KEY && clean == value {
        return clean;
    }
    // Two values that differ must not become one key.
    let hash = value
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3));
    format!("{}~{hash:016x}", &clean[..clean.len().min(MAX_KEY - 17)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener() -> ListenerIdentity {
        ListenerIdentity { tenant: "default".into(), session: None }
    }

    fn ip() -> Source {
        Source::Ip(IpAddr::from([10, 0, 0, 7]))
    }

    #[test]
    fn a_silent_client_is_its_address() {
        let identity = identify(&listener(), &ip(), &Prefix::default(), None).unwrap();
        assert_eq!((identity.key.as_str(), identity.source), ("ip:10.0.0.7", None));
    }

    #[test]
    fn the_precedence_is_listener_then_header_then_path_then_process() {
        let prefix = Prefix { session: Some("path"), tenant: None, project: None, length: 7 };
        let process = Source::Process("job:CI_JOB_ID=17".into());
        let dedicated = ListenerIdentity { tenant: "default".into(), session: Some("own".into()) };
        let key = |l: &ListenerIdentity, p: &Prefix<'_>, h: Option<&[u8]>| {
            identify(l, &process, p, h).unwrap().key.to_string()
        };
        assert_eq!(key(&dedicated, &prefix, Some(b"header")), "listener:own");
        assert_eq!(key(&listener(), &prefix, Some(b"header")), "name:header");
        assert_eq!(key(&listener(), &prefix, None), "name:path");
        assert_eq!(key(&listener(), &Prefix::default(), None), "job:CI_JOB_ID=17");
    }

    #[test]
    fn an_explicit_session_remembers_its_source_and_a_dedicated_one_need_not() {
        let identity = identify(&listener(), &ip(), &Prefix::default(), Some(b"job-1")).unwrap();
        assert_eq!(identity.source.unwrap().as_str(), "ip:10.0.0.7");
    }

    #[test]
    fn a_session_by_certificate_gives_way_to_an_explicit_one() {
        let tls = Source::Tls("release".into());
        let of = |header: Option<&[u8]>| identify(&listener(), &tls, &Prefix::default(), header).unwrap();
        assert_eq!((of(None).key.as_str(), of(None).source), ("tls:release", None));
        assert_eq!(of(Some(b"job-1")).key.as_str(), "name:job-1");
        assert_eq!(
            of(Some(b"job-1")).source.unwrap().as_str(),
            "tls:release",
            "buildx says no more than that"
        );
        assert!(!of(None).interactive);
    }

    #[test]
    fn a_connection_that_said_whose_it_is_needs_nothing_else() {
        let source = Source::Session("ci-7".into());
        let bare = identify(&listener(), &source, &Prefix::default(), None).unwrap();
        assert_eq!((bare.key.as_str(), bare.source, bare.interactive), ("name:ci-7", None, false));
        let other = identify(&listener(), &source, &Prefix::default(), Some(b"other")).unwrap();
        assert_eq!(other.key.as_str(), "name:ci-7", "it is as on a listener of its own");
    }

    #[test]
    fn only_a_shell_that_nobody_named_is_interactive() {
        let of = |source: &Source, header: Option<&[u8]>| {
            identify(&listener(), source, &Prefix::default(), header).unwrap().interactive
        };
        let shell = Source::Process("posix:8@9".into());
        assert!(of(&shell, None));
        assert!(!of(&shell, Some(b"job")));
        assert!(!of(&Source::Process("job:CI_JOB_ID=1".into()), None));
        assert!(!of(&ip(), None));
    }

    #[test]
    fn tenants_do_not_share_keys() {
        let prefix = Prefix { session: Some("x"), tenant: Some("team-a"), project: None, length: 0 };
        let identity = identify(&listener(), &ip(), &prefix, None).unwrap();
        assert_eq!(identity.key.as_str(), "team-a/name:x");
        assert_eq!(identity.tenant.as_str(), "team-a");
    }

    #[test]
    fn no_name_in_an_environment_is_a_key_of_another_tenant() {
        let process = Source::Process(format!("name:{}", sanitise("x/name:y")));
        let own = identify(&listener(), &process, &Prefix::default(), None).unwrap();
        let of_tenant = |tenant| {
            let prefix = Prefix { session: Some("y"), tenant: Some(tenant), project: None, length: 0 };
            identify(&listener(), &ip(), &prefix, None)
        };
        assert_eq!(of_tenant("x").unwrap().key.as_str(), "x/name:y");
        // Its key would be the very same.
        assert_eq!(own.key.as_str(), "name:x/name:y");
        assert_eq!(of_tenant("name:x").unwrap_err().kind, Kind::BadRequest);
    }

    #[test]
    fn a_tenant_in_the_path_keeps_to_the_connections_that_cannot_carry_it() {
        let prefix = Prefix { session: None, tenant: Some("team-a"), project: None, length: 9 };
        let with = identify(&listener(), &ip(), &prefix, None).unwrap();
        let without = identify(&listener(), &ip(), &Prefix::default(), None).unwrap();
        assert_eq!(with.key.as_str(), "team-a/ip:10.0.0.7");
        assert_eq!(with.source, Some(without.key));
    }

    #[test]
    fn a_listener_of_one_tenant_takes_no_other() {
        let own = ListenerIdentity { tenant: "team-a".into(), session: None };
        let path = |tenant| Prefix { session: None, tenant: Some(tenant), project: None, length: 9 };
        assert!(identify(&own, &ip(), &path("team-a"), None).is_ok());
        assert!(identify(&own, &ip(), &path("team-b"), None).unwrap_err().message.contains("team-a"));
    }

    #[test]
    fn bad_keys_are_refused_with_a_word() {
        for bad in [&b""[..], b"a b", b"\xff", b"x\n", "a/b".as_bytes(), "y".repeat(129).as_bytes()] {
            let error = identify(&listener(), &ip(), &Prefix::default(), Some(bad)).unwrap_err();
            assert_eq!(error.kind, Kind::BadRequest);
        }
    }

    #[test]
    fn environment_values_become_keys_that_differ_when_they_do() {
        assert_eq!(sanitise("jenkins-app-12"), "jenkins-app-12");
        assert_ne!(sanitise("a b"), sanitise("a_b"));
        assert!(sanitise(&"z".repeat(500)).len() <= MAX_KEY);
        assert!(sanitise("x\ny").bytes().all(|b| b.is_ascii_graphic()));
    }
}
