//! Who a client is by its certificate.
//!
//! The handshake takes any certificate whose key the client has, and [`Judge::judge`] decides right after it. A client
//! that is refused within the handshake reads `remote error: tls: bad certificate`; one that is refused after it reads
//! a sentence with the remedy, as an error of its daemon. Nothing of a client is read but that one request before it
//! has been judged.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
};

use super::files::describe;
use super::provider;

/// Takes every certificate in the handshake.
#[derive(Debug)]
pub(super) struct Lenient(Arc<dyn ClientCertVerifier>);

/// Says which certificates are good.
#[derive(Debug, Clone)]
pub(super) struct Judge(Arc<dyn ClientCertVerifier>);

/// A judge of certificates that these CAs have issued, and what the handshake uses.
///
/// # Errors
/// When there is no CA.
pub(super) fn verifiers(roots: RootCertStore) -> Result<(Judge, Arc<Lenient>), String> {
    let strict = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|e| e.to_string())?;
    Ok((Judge(strict.clone()), Arc::new(Lenient(strict))))
}

impl Judge {
    /// Whether a client with this chain is who it says.
    ///
    /// # Errors
    /// Why not, and what to do, for the client to read.
    pub(super) fn judge(&self, chain: &[CertificateDer<'_>]) -> Result<(), String> {
        let Some((own, between)) = chain.split_first() else { return Err("there is none".into()) };
        let Err(error) = self.0.verify_client_cert(own, between, UnixTime::now()) else { return Ok(()) };
        let until = describe(own).map_or_else(|e| e, |(_, date)| date);
        Err(match error {
            Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
                format!("your client certificate expired on {until}: renew it (`dindpool certs` renews what it made)")
            }
            Error::InvalidCertificate(
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
            ) => "your client certificate is not valid yet: look at the clocks".into(),
            Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                "your client certificate is not from a CA that is known here: use one that the listener's client_ca \
                 has issued"
                    .into()
            }
            Error::InvalidCertificate(
                CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
            ) => "your certificate is not one of a client (extended key usage clientAuth)".into(),
            other => format!("your client certificate is not accepted: {other}"),
        })
    }
}

impl ClientCertVerifier for Lenient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None: a client with a certificate of another CA would send nothing then, and not be told what is wrong with it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
