//! What we need to know of an X.509 certificate beyond what WebPKI checks.
//!
//! # Source
//! `tls-server-end-point` in RFC 5929 and `pgtls_get_peer_certificate_hash` in
//! `src/interfaces/libpq/fe-secure-openssl.c`; common names in
//! `pq_verify_peer_name_matches_certificate_name`, `src/interfaces/libpq/fe-secure-common.c`; who may
//! issue certificates in `check_ca`, OpenSSL's `crypto/x509/v3_purp.c`.

use ring::digest::{Algorithm, SHA256, SHA384, SHA512, digest};
use rustls::CertificateError;
use rustls::pki_types::{ServerName, SubjectPublicKeyInfoDer, UnixTime};
use x509_parser::asn1_rs::Any;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Version;

/// The largest certificate looked at; the handshake has its own limit of 64 KiB a message.
const CERTIFICATE_BYTES_MAX: usize = 64 << 10;

/// Signature algorithms and the hash that binds a channel to the certificate they signed: their own,
/// but SHA-256 in place of MD5 and SHA-1.
const SIGNATURE_HASHES: [(&str, &Algorithm); 9] = [
    ("1.2.840.113549.1.1.4", &SHA256),  // md5WithRSAEncryption
    ("1.2.840.113549.1.1.5", &SHA256),  // sha1WithRSAEncryption
    ("1.2.840.113549.1.1.11", &SHA256), // sha256WithRSAEncryption
    ("1.2.840.113549.1.1.12", &SHA384), // sha384WithRSAEncryption
    ("1.2.840.113549.1.1.13", &SHA512), // sha512WithRSAEncryption
    ("1.2.840.10045.4.1", &SHA256),     // ecdsa-with-SHA1
    ("1.2.840.10045.4.3.2", &SHA256),   // ecdsa-with-SHA256
    ("1.2.840.10045.4.3.3", &SHA384),   // ecdsa-with-SHA384
    ("1.2.840.10045.4.3.4", &SHA512),   // ecdsa-with-SHA512
];

/// RSASSA-PSS names its hash in its parameters.
const RSASSA_PSS: &str = "1.2.840.113549.1.1.10";

/// Hashes as RSASSA-PSS parameters name them, in DER.
const PSS_HASHES: [(&[u8], &Algorithm); 3] = [
    (&[0x06, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1], &SHA256),
    (&[0x06, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 2], &SHA384),
    (&[0x06, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 3], &SHA512),
];

/// Everything in it is a slice of `der`: a length that lies costs no memory.
fn parse(der: &[u8]) -> Option<X509Certificate<'_>> {
    if der.len() > CERTIFICATE_BYTES_MAX {
        return None;
    }
    let (rest, certificate) = X509Certificate::from_der(der).ok()?;
    rest.is_empty().then_some(certificate)
}

/// The key of a certificate of X.509 version 1, which WebPKI does not read; `None` for a later version.
pub(super) fn version_1_key(der: &[u8]) -> Option<SubjectPublicKeyInfoDer<'static>> {
    let certificate = parse(der).filter(|certificate| certificate.version() == X509Version::V1)?;
    Some(SubjectPublicKeyInfoDer::from(certificate.public_key().raw.to_vec()))
}

/// The algorithm and the key proper in a `SubjectPublicKeyInfo`, as signature algorithms take them: the
/// first without its outermost tag and length, the second without its count of unused bits.
pub(super) fn key_parts<'a>(key: &'a SubjectPublicKeyInfoDer<'_>) -> Option<(&'a [u8], &'a [u8])> {
    let (_, outer) = Any::from_der(key.as_ref()).ok()?;
    let (rest, algorithm) = Any::from_der(outer.data).ok()?;
    let (_, bits) = Any::from_der(rest).ok()?;
    let (unused, proper) = bits.data.split_first()?;
    (*unused == 0).then_some((algorithm.data, proper))
}

/// The `tls-server-end-point` data of a certificate; `None` when its signature algorithm has no hash
/// of its own (Ed25519), for which no binding is defined.
pub(super) fn end_point_hash(der: &[u8]) -> Option<Vec<u8>> {
    let certificate = parse(der)?;
    let algorithm = &certificate.signature_algorithm;
    let name = algorithm.algorithm.to_id_string();
    let hash = if name == RSASSA_PSS {
        let parameters = algorithm.parameters.as_ref()?.data;
        // The first hash named is the signature's; the one of the mask function comes after it.
        let place = |oid: &[u8]| parameters.windows(oid.len()).position(|part| part == oid);
        PSS_HASHES
            .iter()
            .filter_map(|(oid, hash)| Some((place(oid)?, *hash)))
            .min_by_key(|(place, _)| *place)
            .map_or(&SHA256, |(_, hash)| hash)
    } else {
        SIGNATURE_HASHES.iter().find(|(oid, _)| *oid == name).map(|(_, hash)| *hash)?
    };
    Some(digest(hash, der).as_ref().to_vec())
}

/// Whether `now` is within the certificate's validity.
pub(super) fn check_validity(der: &[u8], now: UnixTime) -> Result<(), CertificateError> {
    let certificate = parse(der).ok_or(CertificateError::BadEncoding)?;
    let validity = certificate.validity();
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if now < validity.not_before.timestamp() {
        return Err(CertificateError::NotValidYet);
    }
    if now > validity.not_after.timestamp() {
        return Err(CertificateError::Expired);
    }
    Ok(())
}

/// Whether a certificate names itself as its issuer.
pub(super) fn is_self_issued(der: &[u8]) -> bool {
    parse(der).is_some_and(|one| one.issuer().as_raw() == one.subject().as_raw())
}

/// Whether it can be read at all.
pub(super) fn is_readable(der: &[u8]) -> bool {
    parse(der).is_some()
}

/// Whether the certificate may be that of an authority: by its basic constraints; without them by a key
/// usage that says so, or as a root of X.509 version 1, which has no extensions.
pub(super) fn may_issue(der: &[u8]) -> bool {
    let Some(certificate) = parse(der) else { return false };
    let Ok(usage) = certificate.key_usage() else { return false };
    let may_sign = usage.map(|usage| usage.value.key_cert_sign());
    match certificate.basic_constraints() {
        Ok(Some(constraints)) => constraints.value.ca && may_sign != Some(false),
        Ok(None) if certificate.version() == X509Version::V1 => is_self_issued(der),
        Ok(None) => may_sign == Some(true),
        Err(_unreadable) => false,
    }
}

/// Whether the certificate limits the names of those it leads to. One that cannot be read may.
pub(super) fn constrains_names(der: &[u8]) -> bool {
    parse(der).is_none_or(|certificate| !matches!(certificate.name_constraints(), Ok(None)))
}

/// Whether the common name is the host's, for a certificate without a subject alternative name of
/// the host's type; `None` when it has one, or no common name. An address may also be written as the
/// alternative name of a host.
pub(super) fn common_name_matches(der: &[u8], name: &ServerName<'_>) -> Option<bool> {
    let certificate = parse(der)?;
    if let Some(alternatives) = certificate.subject_alternative_name().ok()? {
        let alternatives = &alternatives.value.general_names;
        let is_address = !matches!(name, ServerName::DnsName(_));
        let as_host = |alternative: &GeneralName<'_>| matches!(alternative, GeneralName::DNSName(text) if *text == name.to_str());
        if is_address && alternatives.iter().any(as_host) {
            return Some(true);
        }
        let same_type = |alternative: &GeneralName<'_>| match alternative {
            // One that cannot be read may be of any type.
            GeneralName::Invalid(..) => true,
            GeneralName::DNSName(_) => !is_address,
            GeneralName::IPAddress(_) => is_address,
            _ => false,
        };
        if alternatives.iter().any(same_type) {
            return None;
        }
    }
    let common_name =
        certificate.subject().iter_common_name().find_map(|attribute| attribute.as_str().ok())?;
    Some(names_match(common_name, &name.to_str()))
}

/// `pattern` is the host, or `*.` and the host's part after its first dot.
fn names_match(pattern: &str, host: &str) -> bool {
    if pattern.contains('\0') {
        return false;
    }
    let wildcard = pattern.strip_prefix("*.").zip(host.split_once('.'));
    pattern.eq_ignore_ascii_case(host)
        || wildcard.is_some_and(|(suffix, (label, rest))| {
            suffix.contains('.') && !label.is_empty() && suffix.eq_ignore_ascii_case(rest)
        })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The certificate as one of X.509 version 1, signed anew: without version and extensions.
    pub(in crate::wire) fn version_1(der: &[u8], issuer: &rcgen::KeyPair) -> Vec<u8> {
        let parts = |der| {
            let (_, outer) = Any::from_der(der).unwrap();
            let mut rest = outer.data;
            std::iter::from_fn(move || {
                let (after, _) = Any::from_der(rest).ok()?;
                let (part, _) = rest.split_at(rest.len() - after.len());
                rest = after;
                Some(part)
            })
        };
        let sequence = |parts: &[&[u8]]| {
            let body = parts.concat();
            let length = u16::try_from(body.len()).unwrap().to_be_bytes();
            let head = match length {
                [0, short @ 0..128] => vec![0x30, short],
                [0, long] => vec![0x30, 0x81, long],
                [high, low] => vec![0x30, 0x82, high, low],
            };
            [head, body].concat()
        };
        let outer: Vec<&[u8]> = parts(der).collect();
        let fields: Vec<&[u8]> =
            parts(outer[0]).filter(|part| !matches!(part[0], 0xa0 | 0xa3)).collect();
        let signed = sequence(&fields);
        let signature = rcgen::SigningKey::sign(issuer, &signed).unwrap();
        let length = u8::try_from(signature.len() + 1).unwrap();
        assert!(length < 128);
        let bits = [&[3, length, 0], signature.as_slice()].concat();
        sequence(&[&signed, outer[1], &bits])
    }

    fn self_signed(algorithm: &'static rcgen::SignatureAlgorithm, names: &[&str]) -> Vec<u8> {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut parameters = rcgen::CertificateParams::new(names).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "db.example.org");
        parameters.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_binding_hash_is_the_signatures() {
        let p256 = self_signed(&rcgen::PKCS_ECDSA_P256_SHA256, &[]);
        assert_eq!(end_point_hash(&p256).unwrap(), digest(&SHA256, &p256).as_ref());
        let p384 = self_signed(&rcgen::PKCS_ECDSA_P384_SHA384, &[]);
        assert_eq!(end_point_hash(&p384).unwrap(), digest(&SHA384, &p384).as_ref());
        assert_eq!(end_point_hash(&self_signed(&rcgen::PKCS_ED25519, &[])), None);
        assert_eq!(end_point_hash(b"no certificate"), None);
    }

    #[test]
    fn the_common_name_counts_only_without_alternative_names() {
        let host = |name: &str| ServerName::try_from(name.to_owned()).unwrap();
        let bare = self_signed(&rcgen::PKCS_ECDSA_P256_SHA256, &[]);
        assert_eq!(common_name_matches(&bare, &host("db.example.org")), Some(true));
        assert_eq!(common_name_matches(&bare, &host("other.example.org")), Some(false));
        let named = self_signed(&rcgen::PKCS_ECDSA_P256_SHA256, &["x.example.org"]);
        assert_eq!(common_name_matches(&named, &host("db.example.org")), None);
    }

    #[test]
    fn an_address_may_be_a_common_name_or_written_as_a_host() {
        let key = rcgen::KeyPair::generate().unwrap();
        let matches = |alternatives: &[rcgen::SanType], name: &str| {
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, "10.0.0.1");
            params.subject_alt_names = alternatives.to_vec();
            let der = params.self_signed(&key).unwrap().der().to_vec();
            common_name_matches(&der, &ServerName::try_from(name.to_owned()).unwrap())
        };
        let host = |text: &str| rcgen::SanType::DnsName(text.try_into().unwrap());
        let address = rcgen::SanType::IpAddress([10, 0, 0, 2].into());
        assert_eq!(matches(&[host("db.example.org")], "10.0.0.1"), Some(true));
        assert_eq!(matches(&[host("10.0.0.3")], "10.0.0.3"), Some(true));
        assert_eq!(matches(&[host("10.0.0.3")], "10.0.0.4"), Some(false));
        assert_eq!(matches(&[host("10.0.0.3"), address.clone()], "10.0.0.3"), Some(true));
        assert_eq!(matches(&[address], "10.0.0.1"), None);
        assert_eq!(matches(&[host("db.example.org")], "other.example.org"), None);
    }

    #[test]
    fn an_authority_says_that_it_is_one_or_is_too_old_to() {
        use rcgen::{BasicConstraints, IsCa, KeyUsagePurpose};
        let key = rcgen::KeyPair::generate().unwrap();
        let made = |is_ca, key_usages: &[KeyUsagePurpose]| {
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = is_ca;
            params.key_usages = key_usages.to_vec();
            params.self_signed(&key).unwrap().der().to_vec()
        };
        let ca = || IsCa::Ca(BasicConstraints::Unconstrained);
        let sign = [KeyUsagePurpose::KeyCertSign];
        let other = [KeyUsagePurpose::DigitalSignature];
        for (is_ca, key_usages, expected) in [
            (ca(), &[][..], true),
            (ca(), &sign, true),
            (ca(), &other, false),
            (IsCa::ExplicitNoCa, &[], false),
            (IsCa::ExplicitNoCa, &sign, false),
            (IsCa::NoCa, &[], false),
            (IsCa::NoCa, &other, false),
            (IsCa::NoCa, &sign, true),
        ] {
            let der = made(is_ca, key_usages);
            assert_eq!(may_issue(&der), expected, "{is_ca:?} {key_usages:?}");
        }
        assert!(may_issue(&version_1(&made(IsCa::NoCa, &[]), &key)));
        assert!(!may_issue(b"no certificate"));
    }

    #[test]
    fn a_wildcard_stands_for_one_label() {
        assert!(names_match("*.example.org", "DB.example.org"));
        assert!(!names_match("*.example.org", "a.b.example.org"));
        assert!(!names_match("*.org", "example.org"));
        assert!(!names_match("*.example.org", ".example.org"));
    }

    #[test]
    fn a_certificate_counts_only_within_its_validity() {
        let certificate = self_signed(&rcgen::PKCS_ECDSA_P256_SHA256, &[]);
        let at = |year: u64| {
            UnixTime::since_unix_epoch(std::time::Duration::from_secs((year - 1970) * 31_556_952))
        };
        assert_eq!(check_validity(&certificate, at(2026)), Ok(()));
        assert_eq!(check_validity(&certificate, at(1971)), Err(CertificateError::NotValidYet));
        assert_eq!(check_validity(&certificate, at(5000)), Err(CertificateError::Expired));
    }
}
