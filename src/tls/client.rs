//! TLS to the daemons: `dockerd --tlsverify`, as docker:dind listens on 2376.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use toml::Value;

use super::files::{self, read};
use super::{TlsStream, Wire, provider};

/// What a daemon must show, and what it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonTls {
    /// The file of the CAs of the daemons' certificates.
    pub ca: PathBuf,
    /// The certificate and key that the proxy shows.
    pub pair: Option<super::settings::Pair>,
    /// The name in the daemons' certificates, where that is not the name or address by which they are reached.
    pub name: Option<String>,
}

impl DaemonTls {
    /// Reads the value of `daemon_tls`: a directory with `ca.pem`, `cert.pem` and `key.pem`, or a table.
    ///
    /// # Errors
    /// What is wrong, in a sentence.
    pub fn from_toml(value: Value) -> Result<DaemonTls, String> {
        match value {
            Value::String(directory) => Ok(DaemonTls::of(Path::new(&directory))),
            Value::Table(table) => {
                let [mut ca, mut cert, mut key, mut name] = [None, None, None, None];
                for (word, value) in table {
                    let Value::String(text) = value else { return Err(format!("{word}: expected text")) };
                    match word.as_str() {
                        "ca" => ca = Some(text),
                        "cert" => cert = Some(text),
                        "key" => key = Some(text),
                        "name" => name = Some(text),
                        _ => return Err(format!("unknown key {word}; known are ca, cert, key, name")),
                    }
                }
                let ca = ca.ok_or("ca: name the file of the CA of the daemons' certificates")?.into();
                let pair = match (cert, key) {
                    (Some(cert), Some(key)) => {
                        Some(super::settings::Pair { cert: cert.into(), key: key.into() })
                    }
                    (None, None) => None,
                    _ => return Err("cert, key: each needs the other".into()),
                };
                Ok(DaemonTls { ca, pair, name })
            }
            other => Err(format!("expected a directory or a table, found {}", other.type_str())),
        }
    }

    /// The files of a directory as a `DOCKER_CERT_PATH` has them.
    pub fn of(directory: &Path) -> DaemonTls {
        let [ca, cert, key] = ["ca.pem", "cert.pem", "key.pem"].map(|name| directory.join(name));
        DaemonTls { ca, pair: Some(super::settings::Pair { cert, key }), name: None }
    }

    /// The value that says the same.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn to_toml(&self) -> Value {
        let text = |path: &Path| Value::String(path.display().to_string());
        let mut table = toml::Table::new();
        table.insert("ca".into(), text(&self.ca));
        if let Some(pair) = &self.pair {
            table.insert("cert".into(), text(&pair.cert));
            table.insert("key".into(), text(&pair.key));
        }
        table.extend(self.name.clone().map(|name| ("name".to_string(), Value::String(name))));
        Value::Table(table)
    }
}

/// Makes TLS connections to daemons.
#[derive(Debug)]
pub struct Client {
    settings: DaemonTls,
    current: RwLock<Current>,
}

struct Current {
    material: Vec<Vec<u8>>,
    /// What was refused last: it is told once.
    refused: Option<Vec<Vec<u8>>>,
    config: Arc<ClientConfig>,
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the key.
        f.debug_struct("Current").finish_non_exhaustive()
    }
}

/// Two are the same if they were told the same.
impl PartialEq for Client {
    fn eq(&self, other: &Self) -> bool {
        self.settings == other.settings
    }
}

impl Eq for Client {}

impl Client {
    /// Reads the files.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(settings: DaemonTls) -> Result<Client, String> {
        if let Some(name) = &settings.name {
            server_name(name)?;
        }
        let material = material(&settings)?;
        let config = config(&settings, &material)?;
        Ok(Client { settings, current: RwLock::new(Current { material, refused: None, config }) })
    }

    /// Takes what is new in the files, for connections that begin from then on. Whether something was taken.
    ///
    /// # Errors
    /// Why the old ones stay, told once.
    pub fn reload(&self) -> Result<bool, String> {
        let read = material(&self.settings);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let new = read.clone().unwrap_or_default();
        if new == current.material {
            current.refused = None;
            return Ok(false);
        }
        if current.refused.as_ref() == Some(&new) {
            return Ok(false);
        }
        match read.and_then(|material| config(&self.settings, &material)) {
            Ok(config) => {
                *current = Current { material: new, refused: None, config };
                Ok(true)
            }
            Err(fault) => {
                current.refused = Some(new);
                Err(fault)
            }
        }
    }

    /// Whose certificate a daemon at `host` must have.
    ///
    /// # Errors
    /// When that is neither a name nor an address.
    pub fn expects(&self, host: &str) -> Result<ServerName<'static>, String> {
        server_name(self.settings.name.as_deref().unwrap_or(host))
    }

    /// The handshake. The caller sets the deadline.
    ///
    /// # Errors
    /// Why there is none, with what to do.
    pub async fn connect(&self, stream: TcpStream, name: ServerName<'static>) -> io::Result<TlsStream> {
        let config = self.current.read().unwrap_or_else(PoisonError::into_inner).config.clone();
        let stream = TlsConnector::from(config).connect(name, Wire::new(stream, Vec::new())).await;
        stream.map(TlsStream::from).map_err(|error| io::Error::new(error.kind(), why(&error)))
    }
}

fn server_name(name: &str) -> Result<ServerName<'static>, String> {
    let literal = name.trim_start_matches('[').trim_end_matches(']');
    match literal.parse::<IpAddr>() {
        Ok(ip) => Ok(ServerName::IpAddress(ip.to_canonical().into())),
        Err(_) => ServerName::try_from(name.to_string()).map_err(|_| format!("{name} is no host's name")),
    }
}

fn material(settings: &DaemonTls) -> Result<Vec<Vec<u8>>, String> {
    let pair = settings.pair.iter().flat_map(|pair| [&pair.cert, &pair.key]);
    std::iter::once(&settings.ca).chain(pair).map(|path| read(path)).collect()
}

fn config(settings: &DaemonTls, material: &[Vec<u8>]) -> Result<Arc<ClientConfig>, String> {
    let roots = files::roots(&material[0], &settings.ca)?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots);
    let mut config = match &settings.pair {
        Some(pair) => {
            let (chain, key) =
                (files::chain(&material[1], &pair.cert)?, files::key(&material[2], &pair.key)?);
            let fault = |e| format!("{}, {}: {e}", pair.cert.display(), pair.key.display());
            builder.with_client_auth_cert(chain, key).map_err(fault)?
        }
        None => builder.with_no_client_auth(),
    };
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// Why a daemon's handshake failed, and what to do.
fn why(error: &io::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match tls {
        Some(Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature)) => {
            "TLS: its certificate is not from the CA of daemon_tls".into()
        }
        Some(Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. })) => {
            "TLS: its certificate is for another host: make one for the host in its address, or say daemon_tls.name"
                .into()
        }
        Some(Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. })) => {
            "TLS: its certificate has expired".into()
        }
        Some(Error::AlertReceived(Alert::CertificateRequired)) => {
            "TLS: it wants a certificate: say daemon_tls.cert and daemon_tls.key".into()
        }
        Some(Error::AlertReceived(Alert::BadCertificate | Alert::UnknownCA)) => {
            "TLS: it does not accept the certificate of daemon_tls".into()
        }
        Some(Error::InvalidMessage(_)) => "TLS: it does not speak TLS: its address is tcp://".into(),
        Some(other) => format!("TLS: {other}"),
        None => format!("TLS: {error}"),
    }
}
