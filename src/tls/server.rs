//! The TLS of one listener: handshakes, and certificates that are replaced while clients are served.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use super::files::{Material, Shown};
use super::identity::{Facts, is_for};
use super::settings::{Clients, Settings};
use super::verify::{Judge, verifiers};
use super::{TlsStream, Wire, provider};
use crate::telemetry::unix_time;

/// How long a client that failed is listened to, so that it reads why: unread bytes would make a reset of the close.
const DRAIN: Duration = Duration::from_secs(1);
/// How much of it.
const DRAIN_BYTES: u64 = 256 * 1024;
/// Between two log lines about handshakes that failed.
const LOG_PAUSE: Duration = Duration::from_secs(5);

/// The TLS of one listener.
#[derive(Debug)]
pub struct Server {
    settings: Settings,
    state: RwLock<State>,
    logged: Mutex<Logged>,
}

struct State {
    material: Material,
    /// The last material that was refused: it is told once.
    refused: Option<Material>,
    current: Arc<Current>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the keys.
        f.debug_struct("State").finish_non_exhaustive()
    }
}

/// What applies to handshakes that begin now.
#[derive(Debug)]
struct Current {
    acceptor: Arc<ServerConfig>,
    judge: Option<Judge>,
    /// File and date of expiry of each certificate.
    expiries: Vec<(String, i64)>,
}

impl Current {
    /// The file of a certificate that has expired by then.
    fn expired(&self, now: i64) -> Option<&str> {
        self.expiries.iter().find(|(_, expires)| *expires <= now).map(|(file, _)| file.as_str())
    }
}

#[derive(Debug, Default)]
struct Logged {
    at: Option<Instant>,
    unlogged: u32,
}

/// A client after its handshake.
#[derive(Debug)]
pub struct Visitor {
    /// Its connection.
    pub stream: TlsStream,
    /// What it has shown; or why it is refused, for it to read.
    pub facts: Result<Facts, String>,
}

/// What a look at the files has brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reloaded {
    /// They are what they were.
    Same,
    /// New certificates apply to handshakes that begin from now on.
    Replaced,
    /// The old ones go on: a sentence.
    Refused(String),
    /// As before, and told before.
    StillRefused,
}

impl Server {
    /// Reads the files of these settings.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(settings: &Settings) -> Result<Server, String> {
        let material = Material::read(settings)?;
        let current = Arc::new(current(&material, settings)?);
        let state = RwLock::new(State { material, refused: None, current });
        Ok(Server { settings: settings.clone(), state, logged: Mutex::default() })
    }

    /// What was configured.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether a certificate has expired by then: its file.
    pub fn expired(&self, now: i64) -> Option<String> {
        self.current().expired(now).map(str::to_owned)
    }

    /// The file of each certificate and when that expires, in seconds since 1970.
    pub fn expiries(&self) -> Vec<(String, i64)> {
        self.current().expiries.clone()
    }

    fn current(&self) -> Arc<Current> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).current.clone()
    }

    /// Looks at the files, and takes what is new in them. Their bytes are compared: a Secret that is mounted is replaced
    /// with a link, and a clock may stand still. Connections that are open go on as they are.
    pub fn reload(&self, now: i64) -> Reloaded {
        let material = match Material::read(&self.settings) {
            Ok(material) => material,
            Err(fault) => return self.refuse(None, fault),
        };
        {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            if state.material == material {
                state.refused = None;
                return Reloaded::Same;
            }
        }
        match current(&material, &self.settings) {
            Ok(new) => {
                if let Some(file) = new.expired(now) {
                    let fault = format!("{file} has expired already");
                    return self.refuse(Some(material), fault);
                }
                let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
                *state = State { material, refused: None, current: Arc::new(new) };
                Reloaded::Replaced
            }
            Err(fault) => self.refuse(Some(material), fault),
        }
    }

    fn refuse(&self, material: Option<Material>, fault: String) -> Reloaded {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let material = material.unwrap_or_default();
        if state.refused.as_ref() == Some(&material) {
            return Reloaded::StillRefused;
        }
        state.refused = Some(material);
        Reloaded::Refused(fault)
    }

    /// The handshake. The caller sets the deadline.
    ///
    /// # Errors
    /// Why there is none, and what to do, for the log. The client has been told as much as TLS has words for.
    pub async fn accept(&self, wire: Wire) -> Result<Visitor, String> {
        let current = self.current();
        let accept = TlsAcceptor::from(current.acceptor.clone()).accept(wire).into_fallible();
        match accept.await {
            Ok(stream) => {
                let session = stream.get_ref().1;
                let sni = session.server_name().map(str::to_ascii_lowercase);
                let facts = self.facts(&current, session.peer_certificates().unwrap_or_default());
                let facts = facts.map(|facts| Facts { sni, ..facts });
                Ok(Visitor { stream: stream.into(), facts })
            }
            Err((error, mut wire)) => {
                let _ = wire.shutdown().await;
                let drain = async {
                    let _ = tokio::io::copy(&mut wire.take(DRAIN_BYTES), &mut tokio::io::sink()).await;
                };
                let _ = tokio::time::timeout(DRAIN, drain).await;
                Err(why(&error, current.expired(unix_time())))
            }
        }
    }

    fn facts(
        &self,
        current: &Current,
        chain: &[rustls::pki_types::CertificateDer<'_>],
    ) -> Result<Facts, String> {
        match (self.settings.clients, &current.judge, chain.first()) {
            (Clients::Off, ..) => Ok(Facts::default()),
            (Clients::Optional, _, None) => Ok(Facts::default()),
            (Clients::Required, _, None) => {
                Err("this listener needs a client certificate: use `docker context create NAME --docker \
                 \"host=tcp://…,ca=ca.pem,cert=cert.pem,key=key.pem\"`, or DOCKER_TLS_VERIFY=1 and \
                 DOCKER_CERT_PATH"
                    .into())
            }
            (_, Some(judge), Some(own)) => judge.judge(chain).map(|()| Facts::of(own)),
            // Without a CA nobody is who they say.
            (_, None, Some(_)) => Err("this listener knows no CA of client certificates".into()),
        }
    }

    /// How many failed handshakes this one's log line stands for; None if it is to have none.
    pub fn may_log(&self, now: Instant) -> Option<u32> {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.at.is_some_and(|at| now.saturating_duration_since(at) < LOG_PAUSE) {
            logged.unlogged += 1;
            return None;
        }
        logged.at = Some(now);
        Some(1 + std::mem::take(&mut logged.unlogged))
    }
}

fn current(material: &Material, settings: &Settings) -> Result<Current, String> {
    let shown = material.shown(settings)?;
    let files = settings.certificates.iter().map(|pair| pair.cert.display().to_string());
    let expiries = files.zip(&shown).map(|(file, shown)| (file, shown.expires)).collect();
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let roots = if settings.clients == Clients::Off { None } else { material.client_roots(settings)? };
    let (judge, builder) = match roots.map(verifiers).transpose()? {
        Some((judge, lenient)) => (Some(judge), builder.with_client_cert_verifier(lenient)),
        None => (None, builder.with_no_client_auth()),
    };
    let mut config = builder.with_cert_resolver(Arc::new(BySni(shown)));
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Current { acceptor: Arc::new(config), judge, expiries })
}

/// The certificate for the host that a client asks for; the first one for all others, and for those that ask for an
/// address.
#[derive(Debug)]
struct BySni(Vec<Shown>);

impl ResolvesServerCert for BySni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let host = hello.server_name().map(str::to_ascii_lowercase);
        let of_host = host
            .and_then(|host| self.0.iter().find(|shown| shown.names.iter().any(|name| is_for(name, &host))));
        of_host.or(self.0.first()).map(|shown| shown.key.clone())
    }
}

/// Why a handshake failed, and what to do. `expired` is a certificate of the listener that has.
fn why(error: &io::Error, expired: Option<&str>) -> String {
    use AlertDescription as Alert;
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        // Most clients, those in Go among them, have one word for all that is wrong with a certificate.
        Some(rustls::Error::AlertReceived(
            Alert::BadCertificate | Alert::CertificateUnknown | Alert::CertificateExpired,
        )) if expired.is_some() => {
            let file = expired.unwrap_or_default();
            format!("{file} has expired, and clients refuse it: renew it (`dindpool certs` renews what it made)")
        }
        Some(rustls::Error::AlertReceived(
            Alert::BadCertificate
            | Alert::UnknownCA
            | Alert::CertificateUnknown
            | Alert::UnsupportedCertificate
            | Alert::DecryptError, // of a CA with the same name as the one that the client trusts
        )) => "the client does not trust this listener's certificate: give it the CA that issued it (ca=ca.pem), and \
               see that the certificate is for the host that the client uses"
            .into(),
        Some(rustls::Error::AlertReceived(Alert::CertificateExpired)) => {
            "the client says that this listener's certificate has expired: renew it".into()
        }
        Some(rustls::Error::PeerIncompatible(what)) => {
            format!("the client has no version or cipher in common (TLS 1.2 and 1.3 are spoken): {what:?}")
        }
        Some(other) => other.to_string(),
        None if error.kind() == io::ErrorKind::UnexpectedEof => "the client left during the handshake".into(),
        None => error.to_string(),
    }
}
