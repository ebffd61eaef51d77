//! Who a client says that it is.

use std::net::IpAddr;

use crate::proxy::classify::prefix;
use crate::proxy::identify::{ListenerIdentity, Source, identify as identity_of, sanitise};

/// Lines: the request's target, the header that names the session, the listener's tenant and session, then where the
/// client comes from (an IP address, a number for a user, or `KIND:VALUE` of its environment). No two tenants have a
/// key in common, no listener of one tenant lets a client choose another, and keys can be listed and logged.
pub fn identify(data: &[u8]) {
    let mut lines = data.splitn(5, |b| *b == b'\n');
    let mut text = || std::str::from_utf8(lines.next().unwrap_or_default());
    let Ok(target) = text() else { return };
    let header = text();
    let (Ok(tenant), Ok(session)) = (text(), text()) else { return };
    let source = lines.next().unwrap_or_default();
    let word = |text: &str| {
        (1..=128).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    let listener = ListenerIdentity {
        // As the configuration takes them.
        tenant: if word(tenant) { tenant } else { "default" }.into(),
        session: word(session).then(|| session.to_string()),
    };
    let source = source_of(&String::from_utf8_lossy(source));
    let header = match &header {
        Ok("") => None,
        Ok(text) => Some(text.as_bytes()),
        Err(_) => Some(&b"\xff"[..]),
    };
    let prefix = prefix(target);
    let Ok(identity) = identity_of(&listener, &source, &prefix, header) else { return };

    if listener.tenant.as_str() != "default" {
        assert_eq!(identity.tenant, listener.tenant);
    }
    let expected = prefix.tenant.map_or(listener.tenant.clone(), Into::into);
    assert_eq!(identity.tenant, expected);
    assert_eq!(tenant_in(identity.key.as_str()), identity.tenant.as_str(), "the tenant of {}", identity.key);
    if let Some(source) = &identity.source {
        assert_eq!(tenant_in(source.as_str()), listener.tenant.as_str(), "the tenant of {source}");
    }
    for key in [Some(&identity.key), identity.source.as_ref()].into_iter().flatten() {
        assert!(key.as_str().bytes().all(|b| b.is_ascii_graphic()), "{key}");
        assert!(key.as_str().len() <= 128 + 1 + 16 + 128, "{key} is long");
    }
    let named = header.map(|h| String::from_utf8_lossy(h).into_owned());
    let named = listener.session.or(named).or(prefix.session.map(str::to_string));
    if let Some(named) = named {
        assert!(identity.key.as_str().ends_with(&format!(":{named}")));
        assert!(!identity.interactive);
    }
}

fn source_of(text: &str) -> Source {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Source::Ip(ip);
    }
    if let Ok(uid) = text.parse() {
        return Source::User(uid);
    }
    // As a process's environment and its POSIX session are read.
    match text.split_once(':') {
        Some((kind @ ("name" | "job"), value)) => {
            let value = sanitise(value);
            assert!(value.len() <= 128 && value.bytes().all(|b| b.is_ascii_graphic()), "{value}");
            Source::Process(format!("{kind}:{value}"))
        }
        _ => Source::Process(format!("posix:{}@{}", text.len(), text.len())),
    }
}

/// Whose key it is, from the key alone: `TENANT/KIND:VALUE`, or `KIND:VALUE` of the default tenant.
fn tenant_in(key: &str) -> &str {
    match key.find([':', '/']).map(|at| key.split_at(at)) {
        Some((tenant, rest)) if rest.starts_with('/') => tenant,
        _ => "default",
    }
}
