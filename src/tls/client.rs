//! TLS to the daemons: `dockerd --tlsverify`, as docker:dind listens on 2376. And to a pool, for who is its client.

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

/// Who is at the other end: what is to be done about a failure depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Daemon,
    Pool,
}

/// Makes TLS connections to daemons, or to a pool.
#[derive(Debug)]
pub struct Client {
    peer: Peer,
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
        Client::of(Peer::Daemon, settings)
    }

    /// Reads the files of a `DOCKER_CERT_PATH`, to reach a pool: `ca.pem`, and `cert.pem` and `key.pem` if they are there.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn of_pool(directory: &Path) -> Result<Client, String> {
        let DaemonTls { ca, pair, name } = DaemonTls::of(directory);
        let pair = pair.filter(|pair| pair.cert.exists() || pair.key.exists());
        Client::of(Peer::Pool, DaemonTls { ca, pair, name })
    }

    fn of(peer: Peer, settings: DaemonTls) -> Result<Client, String> {
        if let Some(name) = &settings.name {
            server_name(name)?;
        }
        let material = material(&settings)?;
        let config = config(&settings, &material)?;
        Ok(Client { peer, settings, current: RwLock::new(Current { material, refused: None, config }) })
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
        let explain = match self.peer {
            Peer::Daemon => |error| explained(Peer::Daemon, error),
            Peer::Pool => |error| explained(Peer::Pool, error),
        };
        match TlsConnector::from(config).connect(name, Wire::new(stream, Vec::new())).await {
            Ok(stream) => Ok(TlsStream::of_client(stream, explain)),
            Err(error) => Err(explain(error)),
        }
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

/// The same error, saying what to do about it if it is one of TLS.
fn explained(peer: Peer, error: io::Error) -> io::Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(tls) => io::Error::new(error.kind(), format!("TLS: {}", why(peer, tls))),
        None => error,
    }
}

/// Why there is no connection, and what to do.
fn why(peer: Peer, error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
    let of = |daemon: &str, pool: &str| match peer {
        Peer::Daemon => daemon.to_string(),
        Peer::Pool => pool.to_string(),
    };
    match error {
        Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => of(
            "its certificate is not from the CA of daemon_tls",
            "its certificate is not from the CA in ca.pem",
        ),
        Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => of(
            "its certificate is for another host: make one for the host in its address, or say daemon_tls.name",
            "its certificate is for another host: use one of its names, or make it one for this host (`dindpool certs DIR \
             --host NAME`)",
        ),
        Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => {
            "its certificate has expired: renew it (`dindpool certs` renews what it made)".into()
        }
        Error::AlertReceived(Alert::CertificateRequired) => of(
            "it wants a certificate: say daemon_tls.cert and daemon_tls.key",
            "it wants a certificate: cert.pem and key.pem beside ca.pem",
        ),
        Error::AlertReceived(Alert::CertificateExpired) => of(
            "it says that the certificate of daemon_tls has expired: renew it",
            "it says that cert.pem has expired: renew it",
        ),
        Error::AlertReceived(Alert::BadCertificate | Alert::UnknownCA | Alert::CertificateUnknown) => of(
            "it does not accept the certificate of daemon_tls: use one of the CA that it knows (its --tlscacert)",
            "it does not accept cert.pem: use one of the CA that it knows",
        ),
        Error::InvalidMessage(_) => of(
            "it does not speak TLS: its address is tcp://",
            "it does not speak TLS: unset DOCKER_TLS_VERIFY, or use a context without ca, cert and key",
        ),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::tls::Server;
    use crate::tls::make::{Order, make};
    use crate::tls::settings::RawTls;

    /// Certificates for this host, made so many days ago for a month, by the CA of another directory if there is one.
    fn certificates(host: &str, ago: i64, ca: Option<&Path>) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        if let Some(ca) = ca {
            std::fs::create_dir(directory.path().join("ca")).unwrap();
            for file in ["ca/cert.pem", "ca/key.pem"] {
                std::fs::copy(ca.join(file), directory.path().join(file)).unwrap();
            }
        }
        let order = Order {
            directory: directory.path().into(),
            hosts: vec![host.into()],
            client: "client".into(),
            days: 30,
        };
        make(&order, OffsetDateTime::now_utc() - time::Duration::days(ago)).unwrap();
        directory
    }

    /// What a client reads that has the certificate of `shown` and the CA of `trusted`, and why the server let it not in.
    async fn meet(
        server: &Path,
        trusted: &Path,
        shown: Option<&Path>,
        name: &str,
    ) -> (Result<String, String>, Option<String>) {
        let settings = RawTls::Directory(server.join("server")).validate().unwrap().unwrap();
        let server = Server::new(&settings).unwrap();
        let files = tempfile::tempdir().unwrap();
        std::fs::copy(trusted.join("client/ca.pem"), files.path().join("ca.pem")).unwrap();
        for file in ["cert.pem", "key.pem"] {
            let Some(shown) = shown else { continue };
            std::fs::copy(shown.join("client").join(file), files.path().join(file)).unwrap();
        }
        let client = Client::of_pool(files.path()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut visitor = match server.accept(Wire::new(stream, Vec::new())).await {
                Ok(visitor) => visitor,
                Err(why) => return Some(why),
            };
            let word = visitor.facts.map_or_else(|why| why, |_| "welcome".into());
            visitor.stream.write_all(word.as_bytes()).await.unwrap();
            visitor.stream.shutdown().await.unwrap();
            None
        };
        let ask = async {
            let stream = TcpStream::connect(address).await.unwrap();
            let mut stream =
                client.connect(stream, client.expects(name)?).await.map_err(|e| e.to_string())?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await.map_err(|e| e.to_string())?;
            Ok(text)
        };
        tokio::join!(ask, serve)
    }

    #[tokio::test]
    async fn what_is_wrong_with_a_certificate_is_said_with_what_to_do() {
        let (good, other) = (certificates("h", 0, None), certificates("h", 0, None));
        let old = certificates("h", 60, Some(good.path()));
        let [good, other, old] = [&good, &other, &old].map(tempfile::TempDir::path);
        assert_eq!(meet(good, good, Some(good), "h").await, (Ok("welcome".into()), None));
        for (server, trusted, name, client_reads, server_says) in [
            (good, other, "h", "not from the CA in ca.pem", "does not trust this listener's certificate"),
            (good, good, "elsewhere", "--host NAME", "does not trust this listener's certificate"),
            (old, good, "h", "has expired: renew it", "server/cert.pem has expired"),
        ] {
            let (read, said) = meet(server, trusted, Some(good), name).await;
            let (read, said) = (read.unwrap_err(), said.unwrap());
            assert!(read.starts_with("TLS: ") && read.contains(client_reads), "{read}");
            assert!(said.contains(server_says), "{said}");
        }
        for (shown, words) in [
            (None, "this listener needs a client certificate"),
            (Some(other), "not from a CA that is known here"),
            (Some(old), "your client certificate expired on"),
        ] {
            let read = meet(good, good, shown, "h").await.0.unwrap();
            assert!(read.contains(words), "{read}");
        }
    }

    #[tokio::test]
    async fn what_speaks_no_tls_is_named_so() {
        let directory = certificates("h", 0, None);
        let client = Client::of_pool(&directory.path().join("client")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let ask = async {
            let stream = TcpStream::connect(address).await.unwrap();
            client.connect(stream, client.expects("h").unwrap()).await.unwrap_err().to_string()
        };
        assert!(tokio::join!(serve, ask).1.contains("it does not speak TLS"));
    }
}
