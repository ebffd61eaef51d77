//! What TLS says about a client (pure): its certificate and the host it asked for, and the rules that make a tenant or a
//! session of them. The first rule that fits decides. Fifty pods may share a certificate, so a session only comes of it
//! where a rule says so.

use std::net::IpAddr;

use toml::Value;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// What the client has shown: the fields of a certificate that was verified, and the host it asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// The host that the client asked for; anybody may ask for any.
    pub sni: Option<String>,
    /// The subject's common names.
    pub cn: Vec<String>,
    /// DNS names among the alternative names.
    pub dns: Vec<String>,
    /// URIs among them: a SPIFFE id is one.
    pub uri: Vec<String>,
    /// Mail addresses among them.
    pub email: Vec<String>,
}

/// What a rule looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Sni,
    Cn,
    Dns,
    Uri,
    Email,
}

const FIELDS: [(&str, Field); 5] = [
    ("sni", Field::Sni),
    ("cn", Field::Cn),
    ("dns", Field::Dns),
    ("uri", Field::Uri),
    ("email", Field::Email),
];

/// A rule: a pattern with at most one `*`, and what it makes of a client; a `*` there is what the pattern's stood for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    field: Field,
    pattern: String,
    tenant: Option<String>,
    session: Option<String>,
}

/// What the rules made of a client.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Named {
    /// Who it belongs to.
    pub tenant: Option<String>,
    /// Its session, where nothing more precise is said.
    pub session: Option<String>,
}

impl Rule {
    /// Reads the rules of the configuration's `identify`.
    ///
    /// # Errors
    /// What is wrong, in a sentence.
    pub fn from_toml(value: Value) -> Result<Vec<Rule>, String> {
        let Value::Array(items) = value else {
            return Err(format!("expected a list of rules, found {}", value.type_str()));
        };
        items.into_iter().map(Rule::one).collect()
    }

    fn one(value: Value) -> Result<Rule, String> {
        let Value::Table(table) = value else { return Err("a rule is a table".into()) };
        let (mut matches, mut tenant, mut session) = (Vec::new(), None, None);
        for (key, value) in table {
            let Value::String(text) = value else { return Err(format!("{key}: expected text")) };
            let field = FIELDS.iter().find(|(name, _)| *name == key);
            match (key.as_str(), field) {
                (_, Some((_, field))) => matches.push((*field, text)),
                ("tenant", _) => tenant = Some(text),
                ("session", _) => session = Some(text),
                _ => {
                    return Err(format!(
                        "unknown key {key}; known are sni, cn, dns, uri, email, tenant, session"
                    ));
                }
            }
        }
        let Ok([(field, pattern)]) = <[_; 1]>::try_from(matches) else {
            return Err("a rule looks at one of sni, cn, dns, uri, email".into());
        };
        if tenant.is_none() && session.is_none() {
            return Err(format!("the rule for {pattern} names neither a tenant nor a session"));
        }
        let stars = |text: &str| text.matches('*').count();
        if stars(&pattern) > 1 {
            return Err(format!("{pattern}: one * at most"));
        }
        for text in [&tenant, &session].into_iter().flatten() {
            if stars(text) > stars(&pattern) {
                return Err(format!("{text}: there is no * in {pattern} that it could stand for"));
            }
            if !is_name(&text.replacen('*', "x", 1)) {
                return Err(format!("{text}: use 1 to 128 of the characters A-Z a-z 0-9 . _ -"));
            }
        }
        let pattern = match field {
            Field::Sni | Field::Dns => pattern.to_ascii_lowercase(),
            _ => pattern,
        };
        Ok(Rule { field, pattern, tenant, session })
    }

    /// The value that says the same.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn to_toml(&self) -> Value {
        let mut table = toml::Table::new();
        let field = FIELDS.iter().find(|(_, field)| *field == self.field);
        table.extend(field.map(|(name, _)| (name.to_string(), Value::String(self.pattern.clone()))));
        for (name, text) in [("tenant", &self.tenant), ("session", &self.session)] {
            table.extend(text.clone().map(|text| (name.to_string(), Value::String(text))));
        }
        Value::Table(table)
    }

    /// What it makes of a client; None if it does not fit.
    fn apply(&self, facts: &Facts) -> Option<Named> {
        let (values, within): (&[String], &[char]) = match self.field {
            Field::Sni => (facts.sni.as_slice(), &['.']),
            Field::Dns => (&facts.dns, &['.']),
            Field::Cn => (&facts.cn, &[]),
            Field::Uri => (&facts.uri, &['/']),
            Field::Email => (&facts.email, &['@']),
        };
        let star = values.iter().find_map(|value| fits(&self.pattern, value, within))?;
        // What is no name is no tenant: a client must not choose it freely.
        let fill = |text: &Option<String>| match text {
            None => Some(None),
            Some(text) => Some(text.replacen('*', star, 1)).filter(|name| is_name(name)).map(Some),
        };
        Some(Named { tenant: fill(&self.tenant)?, session: fill(&self.session)? })
    }
}

/// What the first rule that fits makes of a client.
pub fn named(rules: &[Rule], facts: &Facts) -> Named {
    rules.iter().find_map(|rule| rule.apply(facts)).unwrap_or_default()
}

/// What the pattern's `*` stands for in `value`, if it fits; it stands for one character at least and for none of `not`.
fn fits<'a>(pattern: &str, value: &'a str, not: &[char]) -> Option<&'a str> {
    let Some((before, after)) = pattern.split_once('*') else { return (pattern == value).then_some("") };
    let star = value.strip_prefix(before)?.strip_suffix(after)?;
    (!star.is_empty() && !star.contains(not)).then_some(star)
}

fn is_name(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

impl Facts {
    /// The facts of a certificate that was verified.
    pub fn of(der: &[u8]) -> Facts {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Facts::default() };
        let cn = certificate.subject().iter_common_name();
        let mut facts = Facts {
            cn: cn.filter_map(|cn| cn.as_str().ok().map(str::to_string)).collect(),
            dns: dns_names(&certificate),
            ..Facts::default()
        };
        for name in alternative_names(&certificate) {
            match name {
                GeneralName::URI(uri) => facts.uri.push((*uri).to_string()),
                GeneralName::RFC822Name(email) => facts.email.push((*email).to_string()),
                _ => {}
            }
        }
        facts
    }
}

/// The DNS names that a certificate is for, in lower case.
pub(super) fn dns_names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let dns = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    };
    alternative_names(certificate).iter().filter_map(dns).collect()
}

/// The hosts and addresses that a certificate is for, as people write them.
pub(super) fn hosts(der: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Vec::new() };
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_string()),
        GeneralName::IPAddress(ip) => match ip.len() {
            4 => <[u8; 4]>::try_from(*ip).ok().map(|ip| IpAddr::from(ip).to_string()),
            _ => <[u8; 16]>::try_from(*ip).ok().map(|ip| IpAddr::from(ip).to_string()),
        },
        _ => None,
    };
    alternative_names(&certificate).iter().filter_map(host).collect()
}

fn alternative_names<'a>(certificate: &'a X509Certificate<'_>) -> &'a [GeneralName<'a>] {
    match certificate.subject_alternative_name() {
        Ok(Some(names)) => &names.value.general_names,
        _ => &[],
    }
}

/// Whether a certificate's name (`*.example.com` among them) is that of `host`.
pub(super) fn is_for(name: &str, host: &str) -> bool {
    match name.strip_prefix("*.") {
        None => name == host,
        Some(domain) => host.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == domain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(toml: &str) -> Result<Vec<Rule>, String> {
        let table: toml::Table = toml.parse().unwrap();
        Rule::from_toml(table["identify"].clone())
    }

    fn tenant_of(toml: &str, facts: &Facts) -> Option<String> {
        named(&rules(toml).unwrap(), facts).tenant
    }

    fn sni(name: &str) -> Facts {
        Facts { sni: Some(name.into()), ..Facts::default() }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let toml = "[[identify]]\nsni = 'team-a.pool.ci'\ntenant = 'first'\n\
                    [[identify]]\nsni = '*.pool.ci'\ntenant = '*'\n";
        assert_eq!(tenant_of(toml, &sni("team-a.pool.ci")).as_deref(), Some("first"));
        assert_eq!(tenant_of(toml, &sni("team-b.pool.ci")).as_deref(), Some("team-b"));
        assert_eq!(tenant_of(toml, &sni("pool.ci")), None);
        assert_eq!(tenant_of(toml, &sni("a.b.pool.ci")), None, "a label is not two");
    }

    #[test]
    fn a_spiffe_id_is_a_uri() {
        let toml = "[[identify]]\nuri = 'spiffe://ci.example/ns/*/sa/builder'\ntenant = '*'";
        let with = |uri: &str| Facts { uri: vec!["https://x".into(), uri.into()], ..Facts::default() };
        assert_eq!(
            tenant_of(toml, &with("spiffe://ci.example/ns/team-a/sa/builder")).as_deref(),
            Some("team-a")
        );
        assert_eq!(tenant_of(toml, &with("spiffe://ci.example/ns/a/sa/x/sa/builder")), None);
        assert_eq!(tenant_of(toml, &with("spiffe://evil.example/ns/a/sa/builder")), None);
    }

    #[test]
    fn what_is_no_name_is_no_tenant() {
        let toml = "[[identify]]\ncn = 'ci-*'\ntenant = '*'";
        let with = |cn: &str| Facts { cn: vec![cn.into()], ..Facts::default() };
        assert_eq!(tenant_of(toml, &with("ci-a")).as_deref(), Some("a"));
        for bad in ["ci-a/b", "ci-a b", "ci-", "ci-ä"] {
            assert_eq!(tenant_of(toml, &with(bad)), None, "{bad}");
        }
    }

    #[test]
    fn a_session_comes_of_a_certificate_only_where_a_rule_says_so() {
        let toml = "[[identify]]\ncn = 'release'\ntenant = 'release'\nsession = 'release'";
        let facts = Facts { cn: vec!["release".into()], ..Facts::default() };
        let both = named(&rules(toml).unwrap(), &facts);
        assert_eq!((both.tenant.as_deref(), both.session.as_deref()), (Some("release"), Some("release")));
        assert_eq!(named(&[], &facts), Named::default());
    }

    #[test]
    fn wrong_rules_are_refused() {
        for (rule, word) in [
            ("cn = 'a'", "neither a tenant nor a session"),
            ("tenant = 'a'", "looks at one of"),
            ("cn = 'a'\nsni = 'b'\ntenant = 'c'", "looks at one of"),
            ("cn = '*-*'\ntenant = 'c'", "one * at most"),
            ("cn = 'a'\ntenant = '*'", "no * in a"),
            ("cn = 'a'\ntenant = 'b/c'", "characters"),
            ("cn = 'a'\ntenants = 'b'", "unknown key tenants"),
            ("cn = 3\ntenant = 'b'", "expected text"),
        ] {
            let fault = rules(&format!("[[identify]]\n{rule}")).unwrap_err();
            assert!(fault.contains(word), "{rule}: {fault}");
        }
    }

    #[test]
    fn a_wildcard_certificate_is_for_one_label() {
        assert!(is_for("*.pool.ci", "a.pool.ci") && is_for("pool.ci", "pool.ci"));
        assert!(
            !is_for("*.pool.ci", "pool.ci")
                && !is_for("*.pool.ci", "a.b.pool.ci")
                && !is_for("*.pool.ci", ".pool.ci")
        );
    }
}
