//! Certificates to begin with, for who has no CA of their own: laid out as `docker:dind` lays out its own
//! (`DOCKER_TLS_CERTDIR`), so that each directory is what its user wants, a `DOCKER_CERT_PATH` or a `--tls-dir`.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::OffsetDateTime;

/// How long the CA lasts.
const CA_DAYS: u32 = 3650;
/// Certificates begin a day ago: not all clocks agree.
const SKEW: Duration = Duration::from_secs(24 * 3600);
/// What a server is called on its own machine.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// What is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Where.
    pub directory: PathBuf,
    /// Names and addresses under which clients reach the pool; none: those of the certificate that is there.
    pub hosts: Vec<String>,
    /// The client's name: its directory, and the common name of its certificate.
    pub client: String,
    /// How long the certificates last.
    pub days: u32,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Whether the CA is new.
    pub new_ca: bool,
    /// The names and addresses of the server's certificate.
    pub hosts: Vec<String>,
    /// The directory of the server's files.
    pub server: PathBuf,
    /// The directory of the client's.
    pub client: PathBuf,
}

/// Makes certificates of server and client, and the CA before them if there is none. What is there is replaced, by the
/// same CA: so this is also how they are renewed.
///
/// # Errors
/// What is wrong with the order, with the CA that is there, or with the directory.
pub fn make(order: &Order, now: OffsetDateTime) -> Result<Made, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let name = &order.client;
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(format!(
            "{name:?} is no client's name; use up to 64 of the characters A-Z a-z 0-9 . _ -"
        ));
    }
    if ["ca", "server"].contains(&name.as_str()) {
        return Err(format!("a client cannot be called {name}: the directory has another use"));
    }
    if order.days == 0 || order.days > CA_DAYS {
        return Err(format!("{} days: use 1 to {CA_DAYS}", order.days));
    }
    let [ca, server, client] = ["ca", "server", name].map(|part| order.directory.join(part));
    let mut hosts = match order.hosts.is_empty() {
        false => order.hosts.clone(),
        true => known_hosts(&server.join("cert.pem"))?,
    };
    for local in LOCAL {
        if !hosts.iter().any(|host| host == local) {
            hosts.push(local.into());
        }
    }
    let mut of_server =
        CertificateParams::new(hosts.clone()).map_err(|e| format!("{}: {e}", hosts.join(", ")))?;
    let (pem, issuer, new_ca) = authority(&ca, now)?;
    let fault = |e: rcgen::Error| e.to_string();
    of_server.distinguished_name.push(DnType::CommonName, hosts[0].clone());
    of_server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let mut of_client = CertificateParams::default();
    of_client.distinguished_name.push(DnType::CommonName, name.clone());
    of_client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    for (directory, mut params) in [(&server, of_server), (&client, of_client)] {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (now - SKEW, now + days(order.days));
        let key = KeyPair::generate().map_err(fault)?;
        let certificate = params.signed_by(&key, &issuer).map_err(fault)?;
        write(directory, &pem, &certificate.pem(), &key.serialize_pem())?;
    }
    Ok(Made { new_ca, hosts, server, client })
}

fn days(days: u32) -> Duration {
    Duration::from_secs(u64::from(days) * 24 * 3600)
}

/// The CA, made if there is none.
fn authority(ca: &Path, now: OffsetDateTime) -> Result<(String, Issuer<'static, KeyPair>, bool), String> {
    let (cert, key) = (ca.join("cert.pem"), ca.join("key.pem"));
    let fault = |e: rcgen::Error| format!("{}: {e}", ca.display());
    match (fs::read_to_string(&cert), fs::read_to_string(&key)) {
        (Ok(pem), Ok(key)) => {
            let key = KeyPair::from_pem(&key).map_err(fault)?;
            let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(fault)?;
            Ok((pem, issuer, false))
        }
        (Err(a), Err(b)) if [&a, &b].iter().all(|e| e.kind() == io::ErrorKind::NotFound) => {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, "dindpool CA");
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            (params.not_before, params.not_after) = (now - SKEW, now + days(CA_DAYS));
            let key = KeyPair::generate().map_err(fault)?;
            let certificate = params.self_signed(&key).map_err(fault)?;
            write(ca, "", &certificate.pem(), &key.serialize_pem())?;
            Ok((certificate.pem(), Issuer::new(params, key), true))
        }
        (Err(e), _) => Err(format!("cannot read {}: {e}", cert.display())),
        (_, Err(e)) => Err(format!("cannot read {}: {e}", key.display())),
    }
}

/// The hosts of the certificate that is there.
fn known_hosts(cert: &Path) -> Result<Vec<String>, String> {
    let Ok(pem) = fs::read(cert) else {
        return Err("no host: name those under which clients reach the pool, --host dind.example.com".into());
    };
    let chain = super::files::chain(&pem, cert)?;
    let found = super::identity::hosts(&chain[0]);
    if found.is_empty() { Err(format!("{} is for no host; use --host", cert.display())) } else { Ok(found) }
}

/// Writes `ca.pem` (unless it is empty), `cert.pem` and `key.pem`; each is replaced as a whole. Whoever reads them in
/// between finds a key that is not the certificate's, and reads them again.
fn write(directory: &Path, ca: &str, cert: &str, key: &str) -> Result<(), String> {
    let fault = |e: io::Error| format!("cannot write to {}: {e}", directory.display());
    fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(fault)?;
    for (name, text, mode) in [("ca.pem", ca, 0o644), ("key.pem", key, 0o600), ("cert.pem", cert, 0o644)] {
        if text.is_empty() {
            continue;
        }
        let new = directory.join(format!(".{name}.new"));
        let _ = fs::remove_file(&new);
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(mode).open(&new).map_err(fault)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(fault)?;
        fs::rename(&new, directory.join(name)).map_err(fault)?;
    }
    Ok(())
}

/// The host or address that stands for all of them in an example.
pub fn example(hosts: &[String]) -> &str {
    hosts.iter().find(|host| !host.starts_with('*')).map_or("localhost", String::as_str)
}

/// `tcp://host:port`, with brackets where an address needs them.
pub fn url(host: &str, port: u16) -> String {
    match host.parse::<std::net::Ipv6Addr>() {
        Ok(ip) => format!("tcp://[{ip}]:{port}"),
        Err(_) => format!("tcp://{host}:{port}"),
    }
}

/// The line that makes a context of a client's directory.
pub fn context_line(name: &str, url: &str, client: &Path) -> String {
    let file = |name: &str| client.join(name).display().to_string();
    let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
    format!("docker context create {name} --docker \"host={url},ca={ca},cert={cert},key={key}\"")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::tls::server::{Reloaded, Server};
    use crate::tls::settings::RawTls;

    fn order(directory: &Path) -> Order {
        Order {
            directory: directory.into(),
            hosts: vec!["dind.ci".into(), "10.0.0.7".into()],
            client: "client".into(),
            days: 90,
        }
    }

    #[test]
    fn a_directory_serves_as_it_is_and_keys_are_their_owner_s() {
        let dir = tempfile::tempdir().unwrap();
        let now = OffsetDateTime::now_utc();
        let made = make(&order(dir.path()), now).unwrap();
        assert!(made.new_ca);
        assert_eq!(made.hosts, ["dind.ci", "10.0.0.7", "localhost", "127.0.0.1", "::1"]);
        for part in ["ca", "server", "client"] {
            let mode = fs::metadata(dir.path().join(part).join("key.pem")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{part}");
        }
        let settings = RawTls::Directory(made.server).validate().unwrap().unwrap();
        let server = Server::new(&settings).unwrap();
        let expires = server.expiries()[0].1;
        assert_eq!(expires, (now + days(90)).unix_timestamp());
    }

    #[test]
    fn a_second_call_renews_by_the_same_ca_for_the_same_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let now = OffsetDateTime::now_utc();
        let made = make(&order(dir.path()), now).unwrap();
        let settings = RawTls::Directory(made.server.clone()).validate().unwrap().unwrap();
        let server = Server::new(&settings).unwrap();
        let ca = fs::read(dir.path().join("ca/cert.pem")).unwrap();
        let again =
            make(&Order { hosts: Vec::new(), client: "team-a".into(), ..order(dir.path()) }, now).unwrap();
        assert!(!again.new_ca);
        assert_eq!(again.hosts, made.hosts);
        assert_eq!(again.client, dir.path().join("team-a"));
        assert_eq!(fs::read(dir.path().join("ca/cert.pem")).unwrap(), ca);
        assert_eq!(server.reload(now.unix_timestamp()), Reloaded::Replaced);
        assert_eq!(server.reload(now.unix_timestamp()), Reloaded::Same);
    }

    #[test]
    fn row_41_a_bad_pair_leaves_the_old_one_and_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let now = OffsetDateTime::now_utc();
        let made = make(&order(dir.path()), now).unwrap();
        let settings = RawTls::Directory(made.server.clone()).validate().unwrap().unwrap();
        let server = Server::new(&settings).unwrap();
        let before = server.expiries();
        let refused = |now: OffsetDateTime| match server.reload(now.unix_timestamp()) {
            Reloaded::Refused(fault) => fault,
            other => panic!("{other:?}"),
        };
        fs::copy(made.client.join("key.pem"), made.server.join("key.pem")).unwrap();
        let fault = refused(now);
        assert!(fault.ends_with("cert.pem") && fault.contains("key.pem is not the key of"), "{fault}");
        assert_eq!(server.reload(now.unix_timestamp()), Reloaded::StillRefused);
        fs::write(made.server.join("key.pem"), "rubbish").unwrap();
        assert!(refused(now).contains("no private key"));
        fs::remove_file(made.server.join("key.pem")).unwrap();
        assert!(refused(now).contains("cannot read"));
        assert_eq!(server.expiries(), before);
        let late = now + days(91);
        make(&Order { hosts: Vec::new(), ..order(dir.path()) }, now).unwrap();
        assert!(refused(late).contains("has expired already"));
        assert_eq!(server.reload(now.unix_timestamp()), Reloaded::Replaced);
    }

    #[test]
    fn wrong_orders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let now = OffsetDateTime::now_utc();
        for (order, word) in [
            (Order { client: "ca".into(), ..order(dir.path()) }, "another use"),
            (Order { client: "../x".into(), ..order(dir.path()) }, "no client's name"),
            (Order { days: 0, ..order(dir.path()) }, "use 1 to 3650"),
            (Order { hosts: Vec::new(), ..order(dir.path()) }, "--host"),
        ] {
            assert!(make(&order, now).unwrap_err().contains(word), "{word}");
        }
        assert!(!dir.path().join("ca").exists(), "nothing was begun");
    }

    #[test]
    fn lines_to_paste() {
        assert_eq!(url("::1", 2375), "tcp://[::1]:2375");
        assert_eq!(
            context_line("dind", &url("dind.ci", 2375), Path::new("/c")),
            "docker context create dind --docker \"host=tcp://dind.ci:2375,ca=/c/ca.pem,cert=/c/cert.pem,key=/c/key.pem\""
        );
    }
}
