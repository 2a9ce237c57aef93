//! Whether a server's certificate is good enough for the `sslmode` asked for.
//!
//! WebPKI's rules apply, with two allowances that OpenSSL and so libpq make and that real PostgreSQL
//! servers need: a certificate that is itself in the root file is trusted (the self-signed server
//! certificate of PostgreSQL's own manual; unless it is an authority's, it vouches for no other), and a
//! certificate without a subject alternative name of
//! the right type is matched by its common name, unless an authority limits the names it
//! may vouch for. WebPKI does not read certificates of X.509 version 1,
//! which `openssl x509 -req` makes when it is given no extensions; they encrypt like any other, but only
//! one that is itself in the root file is trusted.

use std::fmt;
use std::sync::Arc;

use rustls::CertificateError::{self, NotValidForName, NotValidForNameContext, Other};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
    verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{DigitallySignedStruct, Error, OtherError, SignatureScheme};

use super::certificate;

/// What must be certain about a certificate.
#[derive(Debug)]
pub(super) enum Certainty {
    /// Nothing but that the server holds its key.
    Encryption,
    /// It leads to a trusted root.
    Chain(Roots),
    /// It leads to a trusted root and is for the host we asked for.
    ChainAndName(Roots),
}

/// Whether there are lists of revoked certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Revocations {
    None,
    Listed,
}

/// Where a chain must lead.
#[derive(Debug)]
pub(super) struct Roots {
    /// To the authorities among the trusted ones; `None` without any.
    pub(super) chain: Option<Arc<WebPkiServerVerifier>>,
    pub(super) trusted: Vec<CertificateDer<'static>>,
    pub(super) revocations: Revocations,
}

impl Roots {
    /// Whether a certificate is trusted without a chain, being a root itself. One that an authority
    /// issued may have been revoked by it since.
    fn hold(&self, end_entity: &CertificateDer<'_>) -> bool {
        self.trusted.iter().any(|root| root.as_ref() == end_entity.as_ref())
            && (self.revocations == Revocations::None || certificate::is_self_issued(end_entity))
    }
}

/// A chain cannot be verified because of a certificate of X.509 version 1 in it.
#[derive(Debug)]
pub(super) struct OfVersion1;

impl fmt::Display for OfVersion1 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a certificate of X.509 version 1 cannot be verified")
    }
}

impl std::error::Error for OfVersion1 {}

/// Verifies certificates and handshake signatures.
#[derive(Debug)]
pub(super) struct Verifier {
    certainty: Certainty,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    pub(super) fn new(certainty: Certainty, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { certainty, algorithms }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let (roots, name_matters) = match &self.certainty {
            Certainty::Encryption => return Ok(ServerCertVerified::assertion()),
            Certainty::Chain(roots) => (roots, false),
            Certainty::ChainAndName(roots) => (roots, true),
        };
        if roots.hold(end_entity) {
            certificate::check_validity(end_entity, now)?;
        } else {
            let chain = roots.chain.as_ref().ok_or(CertificateError::UnknownIssuer)?;
            // WebPKI looks at the name last: with a name error everything else was in order.
            let verified = chain.verify_server_cert(
                end_entity,
                intermediates,
                server_name,
                ocsp_response,
                now,
            );
            match verified {
                Ok(_) => return Ok(ServerCertVerified::assertion()),
                Err(Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                }
                Err(Error::InvalidCertificate(Other(_)))
                    if std::iter::once(end_entity)
                        .chain(intermediates)
                        .any(|one| certificate::version_1_key(one).is_some()) =>
                {
                    return Err(Other(OtherError(Arc::new(OfVersion1))).into());
                }
                Err(error) => return Err(error),
            }
        }
        if name_matters {
            // WebPKI holds only alternative names against an authority's constraints.
            let by_common_name = if roots
                .trusted
                .iter()
                .chain(intermediates)
                .any(|authority| certificate::constrains_names(authority))
            {
                ByCommonName::Refused
            } else {
                ByCommonName::Accepted
            };
            verify_name(end_entity, server_name, by_common_name)?
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match certificate::version_1_key(cert) {
            Some(key) => verify_tls12_signature_with_raw_key(message, &key, dss, &self.algorithms),
            None => verify_tls12_signature(message, cert, dss, &self.algorithms),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match certificate::version_1_key(cert) {
            Some(key) => verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms),
            None => verify_tls13_signature(message, cert, dss, &self.algorithms),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// As [`verify_tls12_signature`], for a key without its certificate: TLS 1.2 leaves open which of a
/// scheme's algorithms is meant, so the one for the key's kind is.
fn verify_tls12_signature_with_raw_key(
    message: &[u8],
    key: &SubjectPublicKeyInfoDer<'_>,
    dss: &DigitallySignedStruct,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<HandshakeSignatureValid, Error> {
    let (kind, key) = certificate::key_parts(key).ok_or(CertificateError::BadEncoding)?;
    let candidates = algorithms.mapping.iter().filter(|(scheme, _)| *scheme == dss.scheme);
    let algorithm = candidates
        .flat_map(|(_, candidates)| *candidates)
        .find(|candidate| candidate.public_key_alg_id().as_ref() == kind)
        .ok_or(rustls::PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme)?;
    algorithm
        .verify_signature(key, message, dss.signature())
        .map_err(|_invalid| CertificateError::BadSignature)?;
    Ok(HandshakeSignatureValid::assertion())
}

/// Whether a common name may stand in for a missing alternative name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ByCommonName {
    Accepted,
    Refused,
}

/// The certificate names the host: by a subject alternative name, or without one of its type by its
/// common name.
fn verify_name(
    end_entity: &CertificateDer<'_>,
    name: &ServerName<'_>,
    by_common_name: ByCommonName,
) -> Result<(), Error> {
    let refused = match certificate::version_1_key(end_entity) {
        // It has no alternative names.
        Some(_) => CertificateError::NotValidForName.into(),
        None => {
            let parsed = ParsedCertificate::try_from(end_entity)?;
            match rustls::client::verify_server_name(&parsed, name) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            }
        }
    };
    match certificate::common_name_matches(end_entity, name) {
        Some(true) if by_common_name == ByCommonName::Accepted => Ok(()),
        Some(_) => Err(CertificateError::NotValidForName.into()),
        None => Err(refused),
    }
}
