//! What a listener's TLS settings mean.

use std::path::{Path, PathBuf};

use toml::Value;

/// The `tls` of the configuration as it was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RawTls {
    /// `false`: none on this listener, whatever the others have.
    Off,
    /// A directory with a certificate, its key and perhaps a CA of clients.
    Directory(PathBuf),
    /// A table.
    Table {
        /// Pairs of certificate and key.
        certificates: Vec<Pair>,
        /// The CA of client certificates.
        client_ca: Option<PathBuf>,
        /// `required`, `optional` or `off`.
        clients: Option<String>,
        /// `allowed` or `refused`.
        plain: Option<String>,
    },
}

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pair {
    /// The file of the certificate, and of those between it and its CA.
    pub cert: PathBuf,
    /// The file of its key.
    pub key: PathBuf,
}

/// Whether clients have certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// One that the CA has issued, or the client is refused.
    Required,
    /// One that the CA has issued, or none.
    Optional,
    /// Nobody is asked for one.
    Off,
}

/// Whether a client may come without TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plain {
    /// It may.
    Allowed,
    /// It is told to use TLS.
    Refused,
}

/// The TLS of one listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Its certificates; the first is for clients that name no host, or none of these.
    pub certificates: Vec<Pair>,
    /// The CA of client certificates.
    pub client_ca: Option<PathBuf>,
    /// Whether clients need one.
    pub clients: Clients,
    /// Whether there are clients without TLS.
    pub plain: Plain,
}

/// Names of certificate, key and CA in a directory: as Docker's own tools call them, and as a Secret of Kubernetes.
const NAMES: [[&str; 3]; 2] = [["cert.pem", "key.pem", "ca.pem"], ["tls.crt", "tls.key", "ca.crt"]];

impl RawTls {
    /// Reads the value of a `tls` key.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn from_toml(value: Value) -> Result<RawTls, String> {
        match value {
            Value::Boolean(false) => Ok(RawTls::Off),
            Value::String(directory) => Ok(RawTls::Directory(directory.into())),
            Value::Table(table) => {
                let (mut certificates, mut client_ca, mut clients, mut plain) =
                    (Vec::new(), None, None, None);
                for (key, value) in table {
                    match key.as_str() {
                        "certificates" => certificates = pairs(value)?,
                        "client_ca" => client_ca = Some(text(value)?.into()),
                        "clients" => clients = Some(text(value)?),
                        "plain" => plain = Some(text(value)?),
                        _ => {
                            return Err(format!(
                                "unknown key {key}; known are certificates, client_ca, clients, plain"
                            ));
                        }
                    }
                }
                Ok(RawTls::Table { certificates, client_ca, clients, plain })
            }
            other => Err(format!("expected a directory, a table or false, found {}", other.type_str())),
        }
    }

    /// The value that says the same.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn to_toml(&self) -> Value {
        let text = |path: &Path| Value::String(path.display().to_string());
        match self {
            RawTls::Off => Value::Boolean(false),
            RawTls::Directory(directory) => text(directory),
            RawTls::Table { certificates, client_ca, clients, plain } => {
                let pair = |pair: &Pair| {
                    let files = [("cert", text(&pair.cert)), ("key", text(&pair.key))];
                    Value::Table(files.map(|(name, file)| (name.to_string(), file)).into_iter().collect())
                };
                let mut table = toml::Table::new();
                table.insert("certificates".into(), Value::Array(certificates.iter().map(pair).collect()));
                table.extend(client_ca.as_deref().map(|path| ("client_ca".to_string(), text(path))));
                for (name, word) in [("clients", clients), ("plain", plain)] {
                    table.extend(word.clone().map(|word| (name.to_string(), Value::String(word))));
                }
                Value::Table(table)
            }
        }
    }

    /// What it means; None is a listener without TLS.
    ///
    /// # Errors
    /// Each fault, a sentence.
    pub fn validate(&self) -> Result<Option<Settings>, Vec<String>> {
        match self {
            RawTls::Off => Ok(None),
            RawTls::Directory(directory) => of(directory).map(Some).map_err(|fault| vec![fault]),
            RawTls::Table { certificates, client_ca, clients, plain } => {
                let mut faults = Vec::new();
                if certificates.is_empty() {
                    faults.push(
                        "certificates: none; use certificates = [{ cert = \"FILE\", key = \"FILE\" }]".into(),
                    );
                }
                let clients = match (clients.as_deref(), client_ca) {
                    (None, Some(_)) | (Some("required"), _) => Clients::Required,
                    (Some("optional"), _) => Clients::Optional,
                    (None, None) | (Some("off"), _) => Clients::Off,
                    (Some(other), _) => {
                        faults.push(format!("clients: {other} is none of required, optional, off"));
                        Clients::Required
                    }
                };
                if clients != Clients::Off && client_ca.is_none() && faults.is_empty() {
                    faults.push("clients: their certificates need a CA (client_ca)".into());
                }
                let plain = match plain.as_deref() {
                    None | Some("allowed") => Plain::Allowed,
                    Some("refused") => Plain::Refused,
                    Some(other) => {
                        faults.push(format!("plain: {other} is neither allowed nor refused"));
                        Plain::Refused
                    }
                };
                let (certificates, client_ca) = (certificates.clone(), client_ca.clone());
                match faults.is_empty() {
                    true => Ok(Some(Settings { certificates, client_ca, clients, plain })),
                    false => Err(faults),
                }
            }
        }
    }
}

/// A directory as Docker's tools make it, or as a Secret is mounted. With a CA in it clients need a certificate of that.
fn of(directory: &Path) -> Result<Settings, String> {
    for [cert, key, ca] in NAMES {
        let [cert, key, ca] = [cert, key, ca].map(|name| directory.join(name));
        if cert.exists() && key.exists() {
            let client_ca = ca.exists().then_some(ca);
            return Ok(Settings {
                certificates: vec![Pair { cert, key }],
                clients: if client_ca.is_some() { Clients::Required } else { Clients::Off },
                client_ca,
                plain: Plain::Allowed,
            });
        }
    }
    let directory = directory.display();
    Err(format!(
        "{directory} has neither cert.pem and key.pem nor tls.crt and tls.key; `dindpool certs DIR` makes them in DIR/server"
    ))
}

fn text(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("expected text, found {}", other.type_str())),
    }
}

fn pairs(value: Value) -> Result<Vec<Pair>, String> {
    let expected = "expected certificates = [{ cert = \"FILE\", key = \"FILE\" }]";
    let Value::Array(items) = value else { return Err(expected.into()) };
    let pair = |item: Value| {
        let Value::Table(mut table) = item else { return Err(expected.to_string()) };
        let mut file = |key: &str| table.remove(key).ok_or(expected.to_string()).and_then(text);
        let pair = Pair { cert: file("cert")?.into(), key: file("key")?.into() };
        if table.is_empty() { Ok(pair) } else { Err(expected.to_string()) }
    };
    items.into_iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(toml: &str) -> Result<Option<Settings>, Vec<String>> {
        let table: toml::Table = toml.parse().unwrap();
        RawTls::from_toml(table["tls"].clone()).map_err(|fault| vec![fault])?.validate()
    }

    #[test]
    fn a_ca_of_clients_makes_their_certificates_required() {
        let certificates = "certificates = [{ cert = 'c', key = 'k' }]";
        let clients =
            |more: &str| settings(&format!("[tls]\n{certificates}\n{more}")).unwrap().unwrap().clients;
        assert_eq!(clients(""), Clients::Off);
        assert_eq!(clients("client_ca = 'ca'"), Clients::Required);
        assert_eq!(clients("client_ca = 'ca'\nclients = 'optional'"), Clients::Optional);
        assert_eq!(clients("client_ca = 'ca'\nclients = 'off'"), Clients::Off);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (toml, word) in [
            ("tls = 3", "expected a directory"),
            ("[tls]\nclients = 'off'", "certificates: none"),
            ("[tls]\ncertificates = [{ cert = 'c' }]", "expected certificates"),
            ("[tls]\ncertificates = [{ cert = 'c', key = 'k', x = 'y' }]", "expected certificates"),
            ("[tls]\ncertificates = [{ cert = 'c', key = 'k' }]\nclients = 'required'", "need a CA"),
            ("[tls]\ncertificates = [{ cert = 'c', key = 'k' }]\nclients = 'maybe'", "none of required"),
            (
                "[tls]\ncertificates = [{ cert = 'c', key = 'k' }]\nplain = 'no'",
                "neither allowed nor refused",
            ),
            ("[tls]\nca = 'x'", "unknown key ca"),
            ("tls = '/nonexistent'", "neither cert.pem and key.pem nor"),
        ] {
            let faults = settings(toml).unwrap_err();
            assert!(faults.iter().any(|fault| fault.contains(word)), "{toml}: {faults:?}");
        }
        assert_eq!(settings("tls = false"), Ok(None));
    }

    #[test]
    fn a_directory_is_docker_s_or_a_secret_s() {
        for [cert, key, ca] in NAMES {
            let dir = tempfile::tempdir().unwrap();
            for name in [cert, key] {
                std::fs::write(dir.path().join(name), "").unwrap();
            }
            let toml = format!("tls = '{}'", dir.path().display());
            assert_eq!(settings(&toml).unwrap().unwrap().clients, Clients::Off);
            std::fs::write(dir.path().join(ca), "").unwrap();
            let found = settings(&toml).unwrap().unwrap();
            assert_eq!((found.clients, found.client_ca), (Clients::Required, Some(dir.path().join(ca))));
        }
    }
}
