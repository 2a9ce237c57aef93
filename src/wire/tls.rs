//! TLS by rustls with libpq's meanings of `sslmode`, root certificates and client certificates.
//!
//! # Shape
//! `prefer`, `allow` and `require` encrypt without looking at the certificate, unless a root
//! certificate is there (given, or `~/.postgresql/root.crt`): then its chain must lead to that root.
//! `verify-ca` always demands that, `verify-full` also that the certificate is for the host we asked
//! for. In every mode the server proves that it holds the certificate's key.
//!
//! # Source
//! `initialize_SSL` in `src/interfaces/libpq/fe-secure-openssl.c`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, InconsistentKeys, OtherError, RootCertStore,
    SupportedProtocolVersion,
};
use tokio_rustls::TlsConnector;

use super::certificate;
use super::transport::Transport;
use super::verifier::{Certainty, OfVersion1, Revocations, Roots, Verifier};
use crate::error::{Context, Error, Kind, Result};
use crate::file;

/// Longest file of certificates, revocations or a key that is read: the lists of large authorities have
/// some megabytes.
const PEM_FILE_BYTES_MAX: u64 = 64 << 20;

/// First byte of a certificate or a list that is not in PEM form.
const DER_SEQUENCE: u8 = 0x30;

/// How much encryption and proof is demanded, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// How TLS begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SslNegotiation {
    /// After an `SSLRequest`.
    Postgres,
    /// At once (PostgreSQL 17 and later).
    Direct,
}

/// Whether a client certificate is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CertificateMode {
    Disable,
    Allow,
    Require,
}

/// Where trusted roots come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RootSource {
    /// The operating system's.
    System,
    /// A file somebody named; must exist for the verifying modes.
    Named(PathBuf),
    /// `~/.postgresql/root.crt`, if there is a home and the file is there.
    Default(Option<PathBuf>),
}

/// Versions of TLS that may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TlsVersions {
    From12,
    Only12,
    Only13,
}

/// Everything a connection string says about TLS.
#[derive(Clone, Debug)]
pub(super) struct TlsOptions {
    pub(super) mode: SslMode,
    pub(super) negotiation: SslNegotiation,
    pub(super) root: RootSource,
    pub(super) certificate: Option<PathBuf>,
    /// The certificate was named, so that it must exist.
    pub(super) certificate_given: bool,
    pub(super) key: Option<PathBuf>,
    pub(super) certificate_mode: CertificateMode,
    pub(super) crl: Option<PathBuf>,
    /// `~/.postgresql/root.crl`, used when it exists.
    pub(super) crl_default: Option<PathBuf>,
    pub(super) crl_folder: Option<PathBuf>,
    pub(super) server_name_indication: bool,
    pub(super) versions: TlsVersions,
}

/// An encrypted connection.
pub(super) struct Secured {
    pub(super) transport: Box<dyn Transport>,
    /// What binds an authentication to this connection (`tls-server-end-point`), if the
    /// certificate's signature has a hash at all.
    pub(super) end_point: Option<Vec<u8>>,
}

/// Performs the handshake on a connected socket.
///
/// # Errors
/// `config` for files that are missing or broken, `denied` when the certificate is not trusted,
/// `unavailable` when the handshake breaks.
pub(super) async fn secure(
    socket: Box<dyn Transport>,
    options: &TlsOptions,
    host: &str,
) -> Result<Secured> {
    let requested = Arc::new(CertificateRequest::default());
    let config = client_config(options, Arc::clone(&requested))?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(server_name(host, options.mode)?, socket)
        .await
        .map_err(|error| handshake_failed(&error, host))?;
    let (_, session) = stream.get_ref();
    if options.negotiation == SslNegotiation::Direct && session.alpn_protocol().is_none() {
        return Err(Error::new(
            Kind::Unsupported,
            "the server answered direct TLS without the protocol 'postgresql'",
        )
        .hint("Use sslnegotiation=postgres: direct TLS needs PostgreSQL 17 or later."));
    }
    if options.certificate_mode == CertificateMode::Require && !requested.was_answered() {
        return Err(Error::new(
            Kind::Denied,
            "sslcertmode is 'require', but the server did not ask for our certificate",
        )
        .hint("Use clientcert=verify-ca or verify-full in the server's pg_hba.conf."));
    }
    let leaf = session.peer_certificates().and_then(|chain| chain.first());
    let end_point = leaf.and_then(|leaf| certificate::end_point_hash(leaf));
    Ok(Secured { transport: Box::new(stream), end_point })
}

/// The name to ask the server for. Without verification any name will do.
fn server_name(host: &str, mode: SslMode) -> Result<ServerName<'static>> {
    let host = host.trim_end_matches('.');
    match ServerName::try_from(host.to_owned()) {
        Ok(name) => Ok(name),
        Err(_) if mode < SslMode::VerifyFull => {
            Ok(ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into()))
        }
        Err(_) => Err(Error::new(
            Kind::Config,
            format!("unable to verify host '{host}', which is no DNS name or IP address"),
        )),
    }
}

fn handshake_failed(error: &std::io::Error, host: &str) -> Error {
    if let Some(refused) = refusal(error) {
        return refused;
    }
    match tls_error(error) {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(why))))
            if why.is::<OfVersion1>() =>
        {
            Error::new(
                Kind::Denied,
                format!("the server's certificate is not trusted for '{host}': {why}"),
            )
            .hint(
                "Reissue it with extensions ('openssl x509 -req -extfile ...', with \
                 subjectAltName=DNS:HOST), or name the certificate itself with sslrootcert.",
            )
        }
        Some(rustls::Error::InvalidCertificate(why)) => Error::new(
            Kind::Denied,
            format!("the server's certificate is not trusted for '{host}': {why}"),
        )
        .hint(
            "Check sslrootcert (the certificate of the CA that signed the server's, or 'system') \
             and that the certificate names the host we connect to.",
        ),
        _ => Error::new(Kind::Unavailable, format!("the TLS handshake failed: {error}")),
    }
}

fn tls_error(error: &std::io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// The server's refusal, where a failed read or write carries one. With TLS 1.3 a client certificate
/// is refused only after the handshake.
pub(super) fn refusal(error: &std::io::Error) -> Option<Error> {
    let Some(rustls::Error::AlertReceived(alert)) = tls_error(error) else { return None };
    Some(Error::new(Kind::Denied, format!("the server refused our side of TLS: {alert:?}")).hint(
        "The server's log says why; it may want another client certificate (sslcert, sslkey) \
             or another version of TLS.",
    ))
}

fn client_config(options: &TlsOptions, requested: Arc<CertificateRequest>) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions: &[&SupportedProtocolVersion] = match options.versions {
        TlsVersions::From12 => &[&rustls::version::TLS13, &rustls::version::TLS12],
        TlsVersions::Only12 => &[&rustls::version::TLS12],
        TlsVersions::Only13 => &[&rustls::version::TLS13],
    };
    let verifier = verifier(options, &provider)?;
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
        .map_err(|error| config(format!("unable to set up TLS: {error}")))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let identity = client_identity(options, &provider)?;
    let mut made =
        builder.with_client_cert_resolver(Arc::new(ClientIdentity { identity, requested }));
    made.alpn_protocols = vec![b"postgresql".to_vec()];
    made.enable_sni = options.server_name_indication;
    // A session that is never resumed needs no memory for it.
    made.resumption = rustls::client::Resumption::disabled();
    Ok(made)
}

fn verifier(
    options: &TlsOptions,
    provider: &Arc<rustls::crypto::CryptoProvider>,
) -> Result<Verifier> {
    let algorithms = provider.signature_verification_algorithms;
    let Some(trusted) = trusted_roots(options)? else {
        return Ok(Verifier::new(Certainty::Encryption, algorithms));
    };
    if !trusted.iter().any(|one| certificate::is_readable(one)) {
        return Err(config("unable to use any of the trusted root certificates".to_owned())
            .hint("sslrootcert must be a file of certificates in PEM form, or 'system'."));
    }
    let lists = revocations(options)?;
    let revocations = if lists.is_empty() { Revocations::None } else { Revocations::Listed };
    let chain = chain_verifier(&trusted, lists, provider)?;
    let roots = Roots { chain, trusted, revocations };
    let certainty = if options.mode == SslMode::VerifyFull {
        Certainty::ChainAndName(roots)
    } else {
        Certainty::Chain(roots)
    };
    Ok(Verifier::new(certainty, algorithms))
}

/// Follows chains to the authorities among `trusted`; `None` without any. WebPKI asks of no root whether it
/// is an authority's, and a server's own certificate, trusted for itself, must not vouch for others.
fn chain_verifier(
    trusted: &[CertificateDer<'static>],
    lists: Vec<CertificateRevocationListDer<'static>>,
    provider: &Arc<rustls::crypto::CryptoProvider>,
) -> Result<Option<Arc<WebPkiServerVerifier>>> {
    let mut roots = RootCertStore::empty();
    let authorities = trusted.iter().filter(|one| certificate::may_issue(one));
    roots.add_parsable_certificates(authorities.cloned());
    if roots.is_empty() {
        return Ok(None);
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .with_crls(lists)
        // A list that is out of date does not know who was revoked since.
        .enforce_revocation_expiration()
        .build()
        .map(Some)
        .map_err(|error| config(format!("unable to use the trusted root certificates: {error}")))
}

/// The trusted roots, or `None` when the chain is not to be looked at.
fn trusted_roots(options: &TlsOptions) -> Result<Option<Vec<CertificateDer<'static>>>> {
    let verify = options.mode >= SslMode::VerifyCa;
    let path = match &options.root {
        RootSource::System => return system_roots().map(Some),
        RootSource::Named(path) => Some(path),
        RootSource::Default(path) => path.as_ref(),
    };
    match path.filter(|path| path.exists()) {
        Some(path) => certificates(path).map(Some),
        None if verify => Err(config(match path {
            Some(path) => format!("root certificate file '{}' does not exist", path.display()),
            None => "no root certificate file is given and there is no home directory".to_owned(),
        })
        .hint(
            "Provide the file, use the system's roots with sslrootcert=system, or change sslmode \
             to not verify the server's certificate.",
        )),
        None => Ok(None),
    }
}

fn system_roots() -> Result<Vec<CertificateDer<'static>>> {
    let loaded = rustls_native_certs::load_native_certs();
    if loaded.certs.is_empty() {
        return Err(config("the operating system has no trusted root certificates".to_owned())
            .hint("Install the package ca-certificates, or name a file with sslrootcert."));
    }
    Ok(loaded.certs)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = read(path, "certificate file")?;
    CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| config(format!("certificate file '{}': {error}", path.display())))
}

/// Lists of revoked certificates. What is named holds some: without any nothing would be looked up, and
/// nobody would know. The default may be absent or no list, and goes with root certificates of our own only.
fn revocations(options: &TlsOptions) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let mut paths: Vec<PathBuf> = options.crl.iter().cloned().collect();
    if let Some(folder) = &options.crl_folder {
        let what = || format!("unable to read sslcrldir '{}'", folder.display());
        for entry in std::fs::read_dir(folder).context(what)? {
            paths.push(entry.context(what)?.path());
        }
        paths.sort();
        return revocation_lists("sslcrldir", folder, &paths);
    }
    if let Some(path) = &options.crl {
        return revocation_lists("sslcrl", path, &paths);
    }
    let default = options.crl_default.as_ref().filter(|_| options.root != RootSource::System);
    let Some(path) = default.filter(|path| path.exists()) else { return Ok(Vec::new()) };
    revocation_lists("revocation list", path, std::slice::from_ref(path)).or_else(|error| {
        tracing::warn!("nothing is looked up in it, as libpq has it: {error}");
        Ok(Vec::new())
    })
}

/// The lists in the files `paths` of `place`, which `what` is the name of: at least one. Other files may be
/// among them, for a certificate whose authority has no list is refused.
fn revocation_lists(
    what: &str,
    place: &Path,
    paths: &[PathBuf],
) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let mut lists = Vec::new();
    let mut in_der = None;
    for path in paths {
        let pem = read(path, "revocation list")?;
        for list in CertificateRevocationListDer::pem_slice_iter(&pem) {
            lists.push(list.map_err(|error| {
                config(format!("revocation list '{}': {error}", path.display()))
            })?);
        }
        if pem.first() == Some(&DER_SEQUENCE) {
            in_der.get_or_insert(path.display());
        }
    }
    if !lists.is_empty() {
        return Ok(lists);
    }
    let place = place.display();
    Err(match in_der {
        Some(path) => config(format!(
            "{what} '{place}' holds no revocation list in PEM form, but '{path}' in DER form"
        ))
        .hint(format!("Convert it: openssl crl -inform DER -in '{path}' -out '{path}.pem'.")),
        None => config(format!(
            "{what} '{place}' holds no revocation list in PEM form ({} files)",
            paths.len()
        ))
        .hint("Put one there, which begins with 'BEGIN X509 CRL', or leave it out."),
    })
}

fn read(path: &Path, what: &str) -> Result<Vec<u8>> {
    file::read(path, PEM_FILE_BYTES_MAX)
        .context(|| format!("unable to read {what} '{}'", path.display()))
        .map_err(|error| error.with_kind(Kind::Config))
}

fn config(message: String) -> Error {
    Error::new(Kind::Config, message)
}

/// Our certificate and key, if there are any to send.
fn client_identity(
    options: &TlsOptions,
    provider: &rustls::crypto::CryptoProvider,
) -> Result<Option<Arc<CertifiedKey>>> {
    let Some(path) = options
        .certificate
        .as_ref()
        .filter(|_| options.certificate_mode != CertificateMode::Disable)
    else {
        return Ok(None);
    };
    if !path.exists() {
        return if options.certificate_given || options.certificate_mode == CertificateMode::Require
        {
            Err(config(format!("client certificate file '{}' does not exist", path.display())))
        } else {
            Ok(None)
        };
    }
    let chain = certificates(path)?;
    let key = options.key.as_deref().filter(|key| key.exists()).ok_or_else(|| {
        config(format!("client certificate '{}' is there, but its key is not", path.display()))
            .hint("Name the key's file with sslkey.")
    })?;
    check_key_mode(key)?;
    let pem = zeroize::Zeroizing::new(read(key, "client key")?);
    let private = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        config(format!("client key '{}': {error}", key.display())).hint(
            "The key must be in PEM form and not encrypted: 'openssl pkey -in KEY -out PLAIN' \
             decrypts it.",
        )
    })?;
    certified_key(chain, private, provider).map(|identity| Some(Arc::new(identity))).map_err(
        |error| config(format!("client certificate '{}' and its key: {error}", path.display())),
    )
}

/// As [`CertifiedKey::from_der`], for certificates of X.509 version 1 as well.
fn certified_key(
    chain: Vec<CertificateDer<'static>>,
    private: PrivateKeyDer<'static>,
    provider: &rustls::crypto::CryptoProvider,
) -> Result<CertifiedKey, rustls::Error> {
    let Some(public) = chain.first().and_then(|leaf| certificate::version_1_key(leaf)) else {
        return CertifiedKey::from_der(chain, private, provider);
    };
    let private = provider.key_provider.load_private_key(private)?;
    if private.public_key().is_some_and(|known| known != public) {
        return Err(InconsistentKeys::KeyMismatch.into());
    }
    Ok(CertifiedKey::new(chain, private))
}

/// A key that others may read is refused, as libpq does: 0600, or 0640 when root owns it.
fn check_key_mode(path: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let what = || format!("unable to read client key '{}'", path.display());
    let metadata = std::fs::metadata(path).context(what)?;
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & forbidden == 0 {
        return Ok(());
    }
    Err(config(format!("client key '{}' may be read by others", path.display()))
        .hint("Change its mode to 0600 (or 0640 when root owns it)."))
}

/// Whether the server asked for our certificate and got one.
#[derive(Debug, Default)]
struct CertificateRequest(std::sync::atomic::AtomicBool);

impl CertificateRequest {
    fn was_answered(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// Hands our certificate to whatever server asks, as libpq does.
#[derive(Debug)]
struct ClientIdentity {
    identity: Option<Arc<CertifiedKey>>,
    requested: Arc<CertificateRequest>,
}

impl rustls::client::ResolvesClientCert for ClientIdentity {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        let identity = self.identity.clone()?;
        self.requested.0.store(true, std::sync::atomic::Ordering::Relaxed);
        Some(identity)
    }

    fn has_certs(&self) -> bool {
        self.identity.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::certificate::tests::version_1;
    use crate::wire::options::ConnectOptions;
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
        GeneralSubtree, IsCa, Issuer, KeyIdMethod, KeyPair, NameConstraints, RevokedCertParams,
        SerialNumber, date_time_ymd,
    };

    const NAME: &str = "db.example.org";

    /// What a connection string says, in the home directory `/nowhere`.
    fn options(text: &str) -> TlsOptions {
        let env = |name: &str| (name == "HOME").then(|| "/nowhere".to_owned());
        ConnectOptions::parse(&format!("user=u {text}"), &env).unwrap().tls
    }

    fn named() -> CertificateParams {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, NAME);
        params
    }

    struct Authority {
        der: CertificateDer<'static>,
        issuer: Issuer<'static, KeyPair>,
    }

    fn authority() -> Authority {
        authority_for(&[])
    }

    /// An authority for hosts under `domains` only; for any without a domain.
    fn authority_for(domains: &[&str]) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        let subtree = |domain: &&str| GeneralSubtree::DnsName((*domain).to_owned());
        params.name_constraints = (!domains.is_empty()).then(|| NameConstraints {
            permitted_subtrees: domains.iter().map(subtree).collect(),
            excluded_subtrees: Vec::new(),
        });
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let der = params.self_signed(&key).unwrap().der().clone();
        Authority { der, issuer: Issuer::new(params, key) }
    }

    fn write_pem(folder: &Path, label: &str, der: &[u8]) -> PathBuf {
        use base64::Engine as _;
        use std::os::unix::fs::PermissionsExt as _;
        let body = base64::engine::general_purpose::STANDARD.encode(der);
        let lines: Vec<_> = body.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
        let path = folder.join(label.replace(' ', "-"));
        let text =
            format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"));
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Our side of a handshake with a server that shows `chain` and signs with `key`.
    async fn shake_hands(
        options: &TlsOptions,
        host: &str,
        chain: &[CertificateDer<'static>],
        key: &KeyPair,
    ) -> Result<Secured> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let private = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let private = provider.key_provider.load_private_key(private).unwrap();
        let shown =
            rustls::sign::SingleCertAndKey::from(CertifiedKey::new(chain.to_vec(), private));
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(shown));
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let accepting = tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(theirs);
        let (secured, _) = tokio::join!(secure(Box::new(ours), options, host), accepting);
        secured
    }

    #[tokio::test]
    async fn a_certificate_of_version_1_encrypts_but_proves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let authority = authority();
        let root = write_pem(folder.path(), "CERTIFICATE", &authority.der);
        let root = format!("sslrootcert={}", root.display());
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let issued = named().signed_by(&key, &authority.issuer).unwrap();
            let der = version_1(issued.der(), authority.issuer.key());
            let chain = [CertificateDer::from(der)];
            for version in ["TLSv1.2", "TLSv1.3"] {
                let text = format!("ssl_max_protocol_version={version} sslmode");
                for mode in ["prefer", "require"] {
                    let options = options(&format!("{text}={mode}"));
                    let secured = shake_hands(&options, NAME, &chain, &key).await.unwrap();
                    assert_eq!(secured.end_point, certificate::end_point_hash(&chain[0]));
                    // Its key is another's.
                    let other = KeyPair::generate_for(algorithm).unwrap();
                    assert!(shake_hands(&options, NAME, &chain, &other).await.is_err());
                }
                for mode in ["require", "verify-ca", "verify-full"] {
                    let options = options(&format!("{text}={mode} {root}"));
                    let refused = shake_hands(&options, NAME, &chain, &key).await.err().unwrap();
                    assert_eq!(refused.kind(), Kind::Denied);
                    assert!(refused.message().contains("X.509 version 1"), "{refused:?}");
                    assert!(refused.hint_text().unwrap().contains("Reissue it with extensions"));
                }
            }
        }
    }

    #[tokio::test]
    async fn a_certificate_of_version_1_that_is_itself_a_root_is_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let der = version_1(named().self_signed(&key).unwrap().der(), &key);
        let chain = [CertificateDer::from(der)];
        let root = write_pem(folder.path(), "CERTIFICATE", &chain[0]);
        let options = options(&format!("sslmode=verify-full sslrootcert={}", root.display()));
        shake_hands(&options, NAME, &chain, &key).await.unwrap();
        assert!(shake_hands(&options, "other.example.org", &chain, &key).await.is_err());
    }

    #[tokio::test]
    async fn a_certificate_that_is_trusted_itself_vouches_for_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let authority = authority();
        let authority_pem = write_pem(folder.path(), "CERTIFICATE", &authority.der);
        let authority_pem = std::fs::read_to_string(authority_pem).unwrap();
        for is_ca in [IsCa::NoCa, IsCa::ExplicitNoCa] {
            let own_key = KeyPair::generate().unwrap();
            let mut own = named();
            own.is_ca = is_ca;
            let own_der = own.self_signed(&own_key).unwrap().der().clone();
            let own = Issuer::new(own, &own_key);
            let key = KeyPair::generate().unwrap();
            let forged = named().signed_by(&key, &own).unwrap().der().clone();
            let issued = named().signed_by(&key, &authority.issuer).unwrap().der().clone();
            let root = write_pem(folder.path(), "CERTIFICATE", &own_der);
            let options = options(&format!("sslmode=verify-full sslrootcert={}", root.display()));
            let own_pem = std::fs::read_to_string(&root).unwrap();
            // Alone, and beside an authority.
            for (pem, accepts_issued) in
                [(own_pem.clone(), false), (own_pem + &authority_pem, true)]
            {
                std::fs::write(&root, pem).unwrap();
                shake_hands(&options, NAME, std::slice::from_ref(&own_der), &own_key)
                    .await
                    .unwrap();
                let chain = [forged.clone(), own_der.clone()];
                let refused = shake_hands(&options, NAME, &chain, &key).await.err().unwrap();
                assert_eq!(refused.kind(), Kind::Denied, "{refused:?}");
                let secured =
                    shake_hands(&options, NAME, std::slice::from_ref(&issued), &key).await;
                assert_eq!(secured.is_ok(), accepts_issued);
            }
        }
    }

    #[test]
    fn a_client_certificate_of_version_1_is_used_when_its_key_fits() {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let der = version_1(named().self_signed(&key).unwrap().der(), &key);
        let path = write_pem(folder.path(), "CERTIFICATE", &der);
        let provider = rustls::crypto::ring::default_provider();
        let identity = |key: &KeyPair| {
            let key = write_pem(folder.path(), "PRIVATE KEY", &key.serialize_der());
            let text = format!("sslcert={} sslkey={}", path.display(), key.display());
            client_identity(&options(&text), &provider)
        };
        assert!(identity(&key).unwrap().is_some());
        let refused = identity(&KeyPair::generate().unwrap()).unwrap_err();
        assert_eq!(refused.kind(), Kind::Config);
    }
    #[tokio::test]
    async fn a_common_name_does_not_get_around_an_authoritys_name_constraints() {
        let folder = tempfile::tempdir().unwrap();
        for (domains, by_common_name) in [(&[][..], true), (&["example.net"], false)] {
            let authority = authority_for(domains);
            let root = write_pem(folder.path(), "CERTIFICATE", &authority.der);
            let key = KeyPair::generate().unwrap();
            let chain = [named().signed_by(&key, &authority.issuer).unwrap().der().clone()];
            for (mode, accepted) in [("verify-full", by_common_name), ("verify-ca", true)] {
                let options = options(&format!("sslmode={mode} sslrootcert={}", root.display()));
                let secured = shake_hands(&options, NAME, &chain, &key).await;
                assert_eq!(secured.is_ok(), accepted, "{mode} {domains:?}");
            }
        }
    }
    /// The authority's list of the certificates it revoked.
    fn revoked(
        authority: &Authority,
        serial_numbers: &[u64],
        next_update_year: i32,
    ) -> CertificateRevocationListDer<'static> {
        let revoke = |number: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*number),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(next_update_year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serial_numbers.iter().map(revoke).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&authority.issuer).unwrap().der().clone()
    }

    #[tokio::test]
    async fn a_revoked_certificate_and_a_list_out_of_date_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let authority = authority();
        let key = KeyPair::generate().unwrap();
        let mut params = named();
        params.serial_number = Some(SerialNumber::from(7));
        let chain = [params.signed_by(&key, &authority.issuer).unwrap().der().clone()];
        // The server's own certificate is in the root file as well.
        let root = write_pem(folder.path(), "CERTIFICATE", &authority.der);
        let pem = std::fs::read_to_string(&root).unwrap();
        let own = write_pem(folder.path(), "CERTIFICATE", &chain[0]);
        let both = pem + &std::fs::read_to_string(own).unwrap();
        std::fs::write(&root, both).unwrap();
        for (serial_numbers, next_update_year, accepted) in
            [(&[8][..], 2900, true), (&[7], 2900, false), (&[8], 2021, false)]
        {
            let list = revoked(&authority, serial_numbers, next_update_year);
            let list = write_pem(folder.path(), "X509 CRL", &list);
            let (root, list) = (root.display(), list.display());
            let options = options(&format!("sslmode=verify-full sslrootcert={root} sslcrl={list}"));
            let secured = shake_hands(&options, NAME, &chain, &key).await;
            assert_eq!(secured.is_ok(), accepted, "{serial_numbers:?} {next_update_year}");
        }
    }

    #[tokio::test]
    async fn revocations_that_are_asked_for_and_not_there_are_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let authority = authority();
        let root = write_pem(folder.path(), "CERTIFICATE", &authority.der);
        let list = revoked(&authority, &[7], 2900);
        let der = folder.path().join("list.der");
        std::fs::write(&der, &list).unwrap();
        let (empty, mixed) = (folder.path().join("empty"), folder.path().join("mixed"));
        std::fs::create_dir(&empty).unwrap();
        std::fs::create_dir(&mixed).unwrap();
        let pem = write_pem(&mixed, "X509 CRL", &list);
        std::fs::copy(&der, mixed.join("other")).unwrap();
        let tried = |text: &str| {
            let options = options(&format!("sslmode=verify-ca sslrootcert={}", root.display()));
            let named = self::options(&format!("sslmode=verify-ca {text}"));
            revocations(&TlsOptions { crl: named.crl, crl_folder: named.crl_folder, ..options })
        };
        assert_eq!(tried(&format!("sslcrl={}", pem.display())).unwrap(), [list]);
        // Beside a list other files may lie, as 'openssl rehash' leaves them.
        assert_eq!(tried(&format!("sslcrldir={}", mixed.display())).unwrap().len(), 1);
        let both = format!("sslcrl={} sslcrldir={}", pem.display(), empty.display());
        assert_eq!(tried(&both).unwrap().len(), 1);
        std::fs::remove_file(pem).unwrap();
        for (text, message, hint) in [
            (format!("sslcrl={}", der.display()), "in DER form", "openssl crl -inform DER"),
            (format!("sslcrl={}", root.display()), "(1 files)", "X509 CRL"),
            (format!("sslcrl={}", mixed.join("none").display()), "unable to read", ""),
            (format!("sslcrldir={}", empty.display()), "no revocation list", "X509 CRL"),
            (format!("sslcrldir={}", mixed.display()), "in DER form", "openssl crl -inform DER"),
        ] {
            let refused = tried(&text).unwrap_err();
            assert_eq!(refused.kind(), Kind::Config, "{text}");
            assert!(refused.message().contains(message), "{text}: {refused}");
            assert!(refused.hint_text().unwrap_or_default().contains(hint), "{text}: {refused:?}");
        }
    }

    #[test]
    fn the_default_list_may_be_absent_or_none_and_does_not_go_with_the_systems_roots() {
        let home = tempfile::tempdir().unwrap();
        let ours = home.path().join(".postgresql");
        std::fs::create_dir(&ours).unwrap();
        let env = |name: &str| (name == "HOME").then(|| home.path().display().to_string());
        let found = |text: &str| {
            let tls = ConnectOptions::parse(&format!("user=u {text}"), &env).unwrap().tls;
            revocations(&tls).map(|lists| lists.len())
        };
        assert_eq!(found("sslmode=verify-ca").unwrap(), 0);
        let list = write_pem(&ours, "X509 CRL", &revoked(&authority(), &[8], 2900));
        std::fs::rename(list, ours.join("root.crl")).unwrap();
        assert_eq!(found("sslmode=verify-ca").unwrap(), 1);
        assert_eq!(found("sslrootcert=system").unwrap(), 0);
        std::fs::write(ours.join("root.crl"), "").unwrap();
        assert_eq!(found("sslmode=verify-ca").unwrap(), 0, "nobody has asked for it");
    }

    #[tokio::test]
    async fn a_self_signed_certificate_is_on_nobodys_list_of_revocations() {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let chain = [named().self_signed(&key).unwrap().der().clone()];
        let root = write_pem(folder.path(), "CERTIFICATE", &chain[0]);
        let list = write_pem(folder.path(), "X509 CRL", &revoked(&authority(), &[8], 2900));
        let (root, list) = (root.display(), list.display());
        let options = options(&format!("sslmode=verify-full sslrootcert={root} sslcrl={list}"));
        shake_hands(&options, NAME, &chain, &key).await.unwrap();
    }
}
