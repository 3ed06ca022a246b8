//! PEM files: read, parsed and checked for what a handshake would refuse without saying why.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::default_provider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Larger files are no certificates.
const MOST_BYTES: u64 = 1 << 20;

/// What is wrong with a file; every message names the flag and the file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It cannot be read.
    #[error("{flag} {}: cannot be read: {source}", path.display())]
    Read {
        /// Where its name was given.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It holds something else.
    #[error("{flag} {}: {why}", path.display())]
    Wrong {
        /// Where its name was given.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
}

impl TlsError {
    pub(crate) fn wrong(flag: &'static str, path: &Path, why: impl Into<String>) -> Self {
        Self::Wrong { flag, path: path.to_owned(), why: why.into() }
    }
}

/// The one implementation of cryptography in use.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(default_provider())
}

/// A whole file, if it is not absurdly large.
pub(crate) fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { flag, path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > MOST_BYTES {
        let why =
            format!("has {length} bytes, more than any certificate, key or secret; is it the right file?");
        return Err(TlsError::wrong(flag, path, why));
    }
    std::fs::read(path).map_err(failed)
}

/// The certificates of a file, all of them valid now.
pub fn certificates(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all = parse(flag, path)?;
    for der in &all {
        check_time(der).map_err(|why| TlsError::wrong(flag, path, why))?;
    }
    Ok(all)
}

fn parse(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(flag, path)?;
    let wrong = |why: String| TlsError::wrong(flag, path, why);
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let all = all.map_err(|e| wrong(format!("is not a PEM file: {e}")))?;
    if all.is_empty() {
        return Err(wrong("holds no certificate (PEM, -----BEGIN CERTIFICATE-----)".into()));
    }
    Ok(all)
}

/// The authorities of a file, those that are valid now. One that has expired is left out while another remains: a
/// rotation keeps both in the file for a time.
pub fn authorities(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all = parse(flag, path)?;
    let (mut valid, mut last) = (Vec::new(), None);
    for der in all {
        match check_time(&der) {
            Ok(()) => valid.push(der),
            Err(why) => last = Some(why),
        }
    }
    match last {
        Some(why) if valid.is_empty() => Err(TlsError::wrong(flag, path, why)),
        _ => Ok(valid),
    }
}

/// Seconds until certificates of a file end, of several the one that `choose` keeps; 0 when there is none to be read.
pub(crate) fn seconds_left(path: &Path, choose: fn(f64, f64) -> f64) -> f64 {
    let now = x509_parser::time::ASN1Time::now().timestamp();
    let left = |der: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        Some((parsed.validity().not_after.timestamp() - now) as f64)
    };
    let all = parse("", path).ok().and_then(|all| all.iter().map(left).collect::<Option<Vec<f64>>>());
    all.unwrap_or_default().into_iter().reduce(choose).unwrap_or(0.0)
}

fn check_time(der: &CertificateDer<'_>) -> Result<(), String> {
    let (_, parsed) = X509Certificate::from_der(der)
        .map_err(|e| format!("holds a certificate that cannot be read: {e}"))?;
    let validity = parsed.validity();
    if validity.is_valid() {
        return Ok(());
    }
    let now = x509_parser::time::ASN1Time::now();
    let name = parsed.subject();
    Err(match now < validity.not_before {
        true => {
            format!("the certificate of {name} is valid only from {}; check the clock", validity.not_before)
        }
        false => format!("the certificate of {name} expired on {}; renew it", validity.not_after),
    })
}

/// A certificate chain and its key.
pub struct Identity {
    /// Both, checked to belong together.
    pub certified: CertifiedKey,
    /// The same, as PEM.
    pub chain_pem: Vec<u8>,
    /// The key as PEM. Never printed.
    pub key_pem: Vec<u8>,
}

impl Identity {
    /// Reads both files.
    pub fn read(flags: [&'static str; 2], cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let [cert_flag, key_flag] = flags;
        let chain = certificates(cert_flag, cert)?;
        let key_pem = read(key_flag, key)?;
        let der = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|_| {
            TlsError::wrong(
                key_flag,
                key,
                "holds no private key that can be read (PEM, without a passphrase)",
            )
        })?;
        let certified = CertifiedKey::from_der(chain, der, &default_provider()).map_err(|_| {
            let why = format!("is not the key of the certificate in {cert_flag} {}", cert.display());
            TlsError::wrong(key_flag, key, why)
        })?;
        Ok(Self { certified, chain_pem: read(cert_flag, cert)?, key_pem })
    }
}
