//! Certificates and keys from their files.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::provider;
use super::settings::{Pair, Settings};

/// What a listener's files hold, byte for byte: whether they changed is asked of this.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Material {
    /// Certificate and key of each pair.
    pairs: Vec<(Vec<u8>, Vec<u8>)>,
    client_ca: Option<Vec<u8>>,
}

/// A certificate that a listener shows.
#[derive(Debug, Clone)]
pub(super) struct Shown {
    /// It and its key.
    pub key: Arc<CertifiedKey>,
    /// The hosts it is for, in lower case, `*.example.com` among them.
    pub names: Vec<String>,
    /// When it expires, in seconds since 1970.
    pub expires: i64,
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

impl Material {
    /// Reads all files of these settings.
    ///
    /// # Errors
    /// Which one cannot be read.
    pub fn read(settings: &Settings) -> Result<Material, String> {
        let pair = |pair: &Pair| Ok((read(&pair.cert)?, read(&pair.key)?));
        let pairs = settings.certificates.iter().map(pair).collect::<Result<_, String>>()?;
        let client_ca = settings.client_ca.as_deref().map(read).transpose()?;
        Ok(Material { pairs, client_ca })
    }

    /// The certificates, each with its key.
    pub(super) fn shown(&self, settings: &Settings) -> Result<Vec<Shown>, String> {
        self.pairs
            .iter()
            .zip(&settings.certificates)
            .map(|((cert, key), pair)| shown(cert, key, pair))
            .collect()
    }

    /// The CAs of client certificates, if there are any.
    pub(super) fn client_roots(&self, settings: &Settings) -> Result<Option<RootCertStore>, String> {
        let (Some(pem), Some(path)) = (&self.client_ca, &settings.client_ca) else { return Ok(None) };
        roots(pem, path).map(Some)
    }
}

/// The CAs in a file.
pub(super) fn roots(pem: &[u8], path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(pem, path)? {
        roots.add(certificate).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(roots)
}

/// All certificates in a file.
pub(super) fn chain(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let chain = chain.map_err(|e| format!("{}: {e}", path.display()))?;
    if chain.is_empty() {
        return Err(format!("{} has no certificate in PEM", path.display()));
    }
    Ok(chain)
}

/// The key in a file.
pub(super) fn key(pem: &[u8], path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|e| format!("{} has no private key in PEM: {e}", path.display()))
}

fn shown(cert: &[u8], key_pem: &[u8], pair: &Pair) -> Result<Shown, String> {
    let chain = chain(cert, &pair.cert)?;
    let key = key(key_pem, &pair.key)?;
    let (names, expires) = facts(&chain[0]).map_err(|e| format!("{}: {e}", pair.cert.display()))?;
    let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|e| {
        let (cert, key) = (pair.cert.display(), pair.key.display());
        match e {
            rustls::Error::InconsistentKeys(_) => format!("{key} is not the key of {cert}"),
            other => format!("{cert}, {key}: {other}"),
        }
    })?;
    Ok(Shown { key: Arc::new(key), names, expires })
}

/// The hosts that a certificate is for, and when it expires.
fn facts(der: &[u8]) -> Result<(Vec<String>, i64), String> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
    Ok((super::identity::dns_names(&certificate), certificate.validity().not_after.timestamp()))
}

/// When it expires, and the date of that as people write it.
///
/// # Errors
/// When it is no certificate.
pub fn describe(der: &[u8]) -> Result<(i64, String), String> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
    let end = certificate.validity().not_after;
    Ok((end.timestamp(), end.to_string()))
}
